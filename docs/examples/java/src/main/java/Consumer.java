import java.nio.file.Path;
import java.time.Duration;
import java.util.Map;
import org.apache.kafka.clients.consumer.ConsumerRecords;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.StringDeserializer;

/**
 * Keeps the balances of all wallets in an SQLite file, by their events alone.
 *
 * <pre>
 * mvn compile
 * java -cp 'target/classes:target/lib/*' Consumer 127.0.0.1:9092 wallet.events balances.db
 * </pre>
 *
 * Kill it at any moment and start it again: no event counts twice, and none is left out. With --stop before
 * the rest it ends once it has read what there is. It ends with status 3 when the chain of a wallet's events
 * is broken.
 */
public class Consumer {
    static final String WHAT_TO_DO = """
        Broken chain: %s.
        Nothing of this batch was stored; what was stored before is right. Do not skip the event. Run
        "wallet -audit", which compares the topic with the ledger. If it finds nothing, this file was made of
        another topic: delete it and start again, and all is read from the beginning. If it finds something,
        keep the file for who mends it.
        """;

    public static void main(String[] args) throws Exception {
        boolean stop = args.length > 0 && args[0].equals("--stop");
        int first = stop ? 1 : 0;
        if (args.length != first + 3) {
            System.err.println("usage: Consumer [--stop] BROKERS TOPIC DATABASE");
            System.exit(2);
        }
        System.setProperty("org.slf4j.simpleLogger.defaultLogLevel", "warn");
        Map<String, Object> settings = Map.of("bootstrap.servers", args[first],
            "isolation.level", "read_committed", // else there are events that were never committed
            "enable.auto.commit", false,
            "auto.offset.reset", "none"); // an offset that is gone is for a human to see
        var text = new StringDeserializer();
        try (var consumer = new KafkaConsumer<>(settings, text, text)) {
            consume(consumer, args[first + 1], new Projection(Path.of(args[first + 2])), stop);
        } catch (Projection.BrokenChain broken) {
            System.err.printf(WHAT_TO_DO, broken.getMessage());
            System.exit(3);
        }
    }

    static void consume(KafkaConsumer<String, String> consumer, String topic, Projection projection,
            boolean stop) throws Exception {
        // There is no consumer group: the database alone says where to go on, as it moves with the balances.
        var partitions = consumer.partitionsFor(topic).stream()
            .map(p -> new TopicPartition(topic, p.partition())).toList();
        consumer.assign(partitions);
        for (TopicPartition p : partitions) {
            consumer.seek(p, projection.position(p.partition()));
        }
        var ends = consumer.endOffsets(partitions);
        while (!stop || partitions.stream().anyMatch(p -> consumer.position(p) < ends.get(p))) {
            store(consumer.poll(Duration.ofMillis(100)), projection);
        }
    }

    /**
     * Applies a batch and moves the position, in one transaction: killed before it is committed, we read the
     * batch again; killed afterwards, never more.
     */
    static void store(ConsumerRecords<String, String> records, Projection projection) throws Exception {
        for (var r : records) {
            try {
                projection.apply(r.value());
            } catch (Projection.BrokenChain broken) {
                throw new Projection.BrokenChain("%s, in partition %d at offset %d: %s".formatted(r.value(),
                    r.partition(), r.offset(), broken.getMessage()));
            }
            projection.move(r.partition(), r.offset());
        }
        projection.commit();
        if (!records.isEmpty()) {
            System.out.println("stored " + records.count());
        }
    }
}

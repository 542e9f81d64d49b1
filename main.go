package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"
)

// config is everything that can be set, read once from the environment at start. settings gives each field's variable, default,
// unit and meaning, which -h prints.
type config struct {
	databaseURL    string
	migrateURL     string
	replicationURL string

	redisURL     string
	cacheTTL     time.Duration
	cacheTimeout time.Duration

	kafkaBrokers         []string
	kafkaTopic           string
	kafkaCheckpointTopic string
	kafkaPartitions      int32
	kafkaReplication     int16
	kafkaRetention       time.Duration
	kafkaTLS             bool
	kafkaTLSCA           string
	kafkaTLSCert         string
	kafkaTLSKey          string
	kafkaSASLMechanism   string
	kafkaSASLUser        string
	kafkaSASLPassword    string

	replicationSlot string
	outboxRetention time.Duration

	listenAddr      string
	defaultCurrency string
	writers         int
	batchOpsMax     int
	queueOpsMax     int
	readConns       int
	requestTimeout  time.Duration
	drainDelay      time.Duration
	shutdownTimeout time.Duration

	logLevel  slog.Level
	logFormat string
}

// setting is one environment variable: its default as one would write it, and what reads a value into the config.
type setting struct {
	name, fallback, help string
	set                  func(value string) error
}

func (c *config) settings() []setting {
	return []setting{
		{"DATABASE_URL", "", "Postgres, as the service's role; required. postgres://user:password@host:5432/wallet", url(&c.databaseURL, "postgres", "postgresql")},
		{"MIGRATE_URL", "", "Postgres, as the tables' owner, who applies the schema at start; default: DATABASE_URL", url(&c.migrateURL, "postgres", "postgresql")},
		{"REPLICATION_URL", "", "Postgres, as a role with REPLICATION, for the relay; default: DATABASE_URL", url(&c.replicationURL, "postgres", "postgresql")},
		{"REPLICATION_SLOT", "wallet_relay", "name of the relay's replication slot (unique in the Postgres cluster)", matching(&c.replicationSlot, 63, "abcdefghijklmnopqrstuvwxyz0123456789_")},
		{"OUTBOX_RETENTION", "24h", "how long a published outbox row is kept, in whole partitions of an hour", duration(&c.outboxRetention, 0, 90*24*time.Hour)},

		{"REDIS_URL", "", "Redis, which caches balances; without it there is no cache. redis://host:6379/0", url(&c.redisURL, "redis", "rediss")},
		{"CACHE_TTL", "24h", "how long a balance that nobody touches stays cached", duration(&c.cacheTTL, time.Second, 30*24*time.Hour)},
		{"CACHE_TIMEOUT", "50ms", "how long a read waits for Redis before it asks Postgres", duration(&c.cacheTimeout, time.Millisecond, 10*time.Second)},

		{"KAFKA_BROKERS", "", "host:port, comma-separated, of some brokers; without it no event leaves the database", list(&c.kafkaBrokers)},
		{"KAFKA_TOPIC", "wallet.events", "topic of the events; made if absent", matching(&c.kafkaTopic, 249, topicChars)},
		{"KAFKA_CHECKPOINT_TOPIC", "wallet.checkpoints", "topic of the relay's checkpoints; made if absent", matching(&c.kafkaCheckpointTopic, 249, topicChars)},
		{"KAFKA_PARTITIONS", "12", "partitions of a new events topic; final, since another number would break each wallet's order", integer(&c.kafkaPartitions, 1, 10_000)},
		{"KAFKA_REPLICATION", "-1", "replication factor of new topics; -1: the broker's default", integer(&c.kafkaReplication, -1, 100)},
		{"KAFKA_RETENTION", "-1ns", "how long the events topic keeps an event; negative: for ever", duration(&c.kafkaRetention, -1, 100*365*24*time.Hour)},
		{"KAFKA_TLS", "false", "true: speak TLS to the brokers", boolean(&c.kafkaTLS)},
		{"KAFKA_TLS_CA", "", "file with the brokers' CA certificates (PEM); default: the system's", text(&c.kafkaTLSCA)},
		{"KAFKA_TLS_CERT", "", "file with a client certificate (PEM)", text(&c.kafkaTLSCert)},
		{"KAFKA_TLS_KEY", "", "file with the client certificate's key (PEM)", text(&c.kafkaTLSKey)},
		{"KAFKA_SASL_MECHANISM", "", "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; empty: no SASL", oneOf(&c.kafkaSASLMechanism, "", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")},
		{"KAFKA_SASL_USER", "", "SASL user name", text(&c.kafkaSASLUser)},
		{"KAFKA_SASL_PASSWORD", "", "SASL password", text(&c.kafkaSASLPassword)},

		{"LISTEN_ADDR", "127.0.0.1:8080", "address of the HTTP API", text(&c.listenAddr)},
		{"DEFAULT_CURRENCY", "USD", "currency of a wallet that is made by a deposit or transfer that names none", text(&c.defaultCurrency)},
		{"WRITERS", "2", "batches at Postgres at the same time", integer(&c.writers, 1, 64)},
		{"WRITE_BATCH_MAX", "1000", "operations in one batch, at most", integer(&c.batchOpsMax, 1, 10_000)},
		{"WRITE_QUEUE_MAX", "10000", "operations that wait for a batch, at most; further ones are answered 503", integer(&c.queueOpsMax, 1, 1_000_000)},
		{"READ_CONNECTIONS", "8", "Postgres connections for reads, at most", integer(&c.readConns, 1, 1000)},
		{"REQUEST_TIMEOUT", "5s", "how long a request may take in all", duration(&c.requestTimeout, 100*time.Millisecond, time.Minute)},
		{"DRAIN_DELAY", "0s", "how long to go on serving, not ready, after SIGTERM, so that load balancers look away first", duration(&c.drainDelay, 0, 5*time.Minute)},
		{"SHUTDOWN_TIMEOUT", "15s", "deadline for everything that follows: open requests, batches, the relay's last confirmation", duration(&c.shutdownTimeout, time.Second, 5*time.Minute)},

		{"LOG_LEVEL", "info", "debug, info, warn or error", level(&c.logLevel)},
		{"LOG_FORMAT", "text", "text or json", oneOf(&c.logFormat, "text", "json")},
	}
}

const topicChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"

// readConfig reads the environment. Its error is one sentence that says what to do.
func readConfig(getenv func(string) string) (*config, error) {
	c := new(config)
	for _, s := range c.settings() {
		value := getenv(s.name)
		if value == "" {
			value = s.fallback
		}
		if value == "" {
			continue
		}
		if err := s.set(value); err != nil {
			return nil, fmt.Errorf("set %s to %w (it is %q): %s", s.name, err, redact(s.name, value), s.help)
		}
	}
	if c.databaseURL == "" {
		return nil, fmt.Errorf("set DATABASE_URL to a Postgres URL such as postgres://user:password@host:5432/wallet")
	}
	if c.migrateURL == "" {
		c.migrateURL = c.databaseURL
	}
	if c.replicationURL == "" {
		c.replicationURL = c.databaseURL
	}
	return c, nil
}

// redact keeps secrets out of error sentences.
func redact(name, value string) string {
	if strings.HasSuffix(name, "_URL") || strings.HasSuffix(name, "_PASSWORD") {
		return "a secret, not shown"
	}
	return value
}

func printSettings(w io.Writer) {
	for _, s := range new(config).settings() {
		fmt.Fprintf(w, "  %-23s %s", s.name, s.help)
		if s.fallback != "" {
			fmt.Fprintf(w, " (default %s)", s.fallback)
		}
		fmt.Fprintln(w)
	}
}

func text(p *string) func(string) error {
	return func(v string) error { *p = v; return nil }
}

func url(p *string, schemes ...string) func(string) error {
	return func(v string) error {
		for _, scheme := range schemes {
			if strings.HasPrefix(v, scheme+"://") {
				*p = v
				return nil
			}
		}
		return fmt.Errorf("a URL that begins with %s://", schemes[0])
	}
}

func matching(p *string, lenMax int, chars string) func(string) error {
	return func(v string) error {
		if len(v) > lenMax || strings.Trim(v, chars) != "" {
			return fmt.Errorf("at most %d characters of %s", lenMax, chars)
		}
		*p = v
		return nil
	}
}

func oneOf(p *string, values ...string) func(string) error {
	return func(v string) error {
		for _, allowed := range values {
			if v == allowed {
				*p = v
				return nil
			}
		}
		return fmt.Errorf("one of %s", strings.TrimPrefix(strings.Join(values, ", "), ", "))
	}
}

func list(p *[]string) func(string) error {
	return func(v string) error {
		for _, item := range strings.Split(v, ",") {
			host, port, found := strings.Cut(strings.TrimSpace(item), ":")
			if _, err := strconv.ParseUint(port, 10, 16); !found || host == "" || err != nil {
				return fmt.Errorf("host:port, comma-separated")
			}
			*p = append(*p, host+":"+port)
		}
		return nil
	}
}

func integer[T int | int16 | int32](p *T, least, most T) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < int64(least) || n > int64(most) {
			return fmt.Errorf("a whole number from %d to %d", least, most)
		}
		*p = T(n)
		return nil
	}
}

func duration(p *time.Duration, least, most time.Duration) func(string) error {
	return func(v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < least || d > most {
			return fmt.Errorf("a duration from %v to %v, such as 1500ms, 30s or 24h", least, most)
		}
		*p = d
		return nil
	}
}

func boolean(p *bool) func(string) error {
	return func(v string) error {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("true or false")
		}
		*p = b
		return nil
	}
}

func level(p *slog.Level) func(string) error {
	return func(v string) error {
		if p.UnmarshalText([]byte(v)) != nil {
			return fmt.Errorf("debug, info, warn or error")
		}
		return nil
	}
}

// sample is one value of a metric; labels is `name="value",...` or empty.
type sample struct {
	labels string
	value  float64
}

// writeMetric writes one metric in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/).
// typ is counter or gauge; a counter's name ends in _total.
func writeMetric(w io.Writer, name, typ, help string, samples ...sample) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, typ)
	for _, s := range samples {
		if s.labels != "" {
			fmt.Fprintf(w, "%s{%s} %s\n", name, s.labels, strconv.FormatFloat(s.value, 'g', -1, 64))
		} else {
			fmt.Fprintf(w, "%s %s\n", name, strconv.FormatFloat(s.value, 'g', -1, 64))
		}
	}
}

func main() {
	if _, err := readConfig(os.Getenv); err != nil {
		fmt.Fprintln(os.Stderr, "wallet:", err)
		os.Exit(2)
	}
}

// Package kafka publishes exactly once: two topics made or checked, a transactional producer that sends each
// request once, a reader of what is committed. One topic carries the messages, the other, of one partition,
// the checkpoint that is written with them.
//
// It touches the brokers, these two topics and the certificate files that its Config names. It promises
// that what only an operator can put right is a ConfigError, and it never guesses: whether a request that
// failed has had an effect is for its caller to look up.
//
// kafka.go is the connection and its login; topics.go makes and checks; producer.go writes; reader.go reads;
// unstable.go finds transactions that nobody ends.
package kafka

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/IBM/sarama"
)

// Config says which brokers and topics, and how long to wait for them.
type Config struct {
	Brokers  []string // host:port
	ClientID string   // as the brokers' logs show it

	Topic       string // of the messages
	Checkpoints string // the topic of the checkpoints, with one partition
	// For topics that are missing. A topic that is there keeps its partitions; its retention is checked.
	Partitions  int32         // of Topic
	Replication int16         // of both; -1 is the brokers' default
	Retention   time.Duration // of Topic; below 0 is for ever

	TLS            bool
	TLSCA          string // file with PEM certificates; empty: the system's
	TLSCert        string // the client's own, a file, or empty
	TLSKey         string // its key's file
	SASLMechanism  string // PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, or empty
	SASLUser       string
	SASLPassword   string
	MetadataMaxAge time.Duration // how late we may hear of partitions that were added
	FetchBytes     int32         // asked for at a time, compressed; 0 is 1 MB. It bounds a reader's memory

	// Settings are what an operator knows some of these fields by, for the sentences of a ConfigError.
	Settings Settings

	// TransactionTimeout is how long the brokers leave a dead producer's transaction open, which holds back
	// consumers.
	TransactionTimeout time.Duration
	// Patience is how long a producer puts a question again to a coordinator that answers "not yet".
	Patience time.Duration
	// Busy is given each question of Bounds, Since, Scan and Last to put, so that its owner can tell how long
	// the brokers keep it waiting, apart from the time for which the records themselves keep it busy. It is
	// called by the goroutine that asks. Without one the question is just put.
	Busy func(question func() error) error
}

// Settings names the fields of a Config that a ConfigError may ask to set.
type Settings struct{ Checkpoints, Retention, TLSCA, TLSCert, TLSKey string }

// ConfigError is what only an operator can put right, in one sentence that says how.
type ConfigError string

func (e ConfigError) Error() string { return string(e) }

func configError(format string, args ...any) error { return ConfigError(fmt.Sprintf(format, args...)) }

// Client is a connection to the brokers and the two topics, checked. Several goroutines may use it at once.
type Client struct {
	cfg         Config
	client      sarama.Client
	partitioner sarama.Partitioner
	partitions  int32 // of cfg.Topic, as found at the start

	closing sync.Once
}

// Open connects, and makes or checks the topics. It may take as long as the brokers do: see Within.
func Open(cfg Config) (*Client, error) {
	if cfg.Busy == nil {
		cfg.Busy = func(question func() error) error { return question() }
	}
	conf, err := cfg.sarama()
	if err != nil {
		return nil, err
	}
	client, err := sarama.NewClient(cfg.Brokers, conf)
	if err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, client: client, partitioner: newPartitioner(cfg.Topic)}
	if err := c.prepareTopics(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Close may be called more than once, by several goroutines; sarama's panics then.
func (c *Client) Close() { c.closing.Do(func() { c.client.Close() }) }

// Partitions is how many the messages' topic had at the start.
func (c *Client) Partitions() int32 { return c.partitions }

// Partition is where messages with this key go.
func (c *Client) Partition(key []byte) (int32, error) {
	return c.partition(new(sarama.ProducerMessage), key)
}

// partition is Partition without an allocation of scratch, which may be used again.
func (c *Client) partition(scratch *sarama.ProducerMessage, key []byte) (int32, error) {
	scratch.Key = sarama.ByteEncoder(key)
	return c.partitioner.Partition(scratch, c.partitions)
}

// newPartitioner spreads keys as the Java clients do by default.
func newPartitioner(topic string) sarama.Partitioner { return sarama.NewMurmur2Partitioner(topic) }

// sarama is the configuration of the library.
func (cfg *Config) sarama() (*sarama.Config, error) {
	conf := sarama.NewConfig()
	conf.ClientID = cfg.ClientID
	conf.Version = sarama.V2_8_0_0 // the oldest broker; the requests used are the same since
	conf.Net.DialTimeout = 3 * time.Second
	conf.Net.ReadTimeout, conf.Net.WriteTimeout = 8*time.Second, 8*time.Second
	conf.Metadata.AllowAutoTopicCreation = false
	conf.Metadata.RefreshFrequency = cfg.MetadataMaxAge
	conf.Consumer.IsolationLevel = sarama.ReadCommitted
	if cfg.TLS {
		secure, err := cfg.tls()
		if err != nil {
			return nil, err
		}
		conf.Net.TLS.Enable, conf.Net.TLS.Config = true, secure
	}
	if cfg.SASLMechanism != "" {
		sasl := &conf.Net.SASL
		sasl.Enable, sasl.Mechanism = true, sarama.SASLMechanism(cfg.SASLMechanism)
		sasl.User, sasl.Password = cfg.SASLUser, cfg.SASLPassword
		hashes := map[sarama.SASLMechanism]func() hash.Hash{
			sarama.SASLTypeSCRAMSHA256: sha256.New, sarama.SASLTypeSCRAMSHA512: sha512.New}
		sasl.SCRAMClientGeneratorFunc = func() sarama.SCRAMClient {
			return &scram{hash: hashes[sasl.Mechanism], nonce: rand.Text()}
		}
	}
	return conf, nil
}

func (cfg *Config) tls() (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.TLSCA != "" {
		pem, err := os.ReadFile(cfg.TLSCA)
		if err != nil {
			return nil, configError("set %s to a file that can be read: %v", cfg.Settings.TLSCA, err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, configError("set %s to a file with PEM certificates: %s holds none",
				cfg.Settings.TLSCA, cfg.TLSCA)
		}
	}
	if cfg.TLSCert != "" {
		cert, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey)
		if err != nil {
			return nil, configError("set %s and %s to a certificate and its key: %v",
				cfg.Settings.TLSCert, cfg.Settings.TLSKey, err)
		}
		conf.Certificates = []tls.Certificate{cert}
	}
	return conf, nil
}

// Within waits for fn at most d, and no longer than ctx. What a late fn returns is discarded: sarama knows no
// contexts.
func Within[T any](ctx context.Context, d time.Duration, fn func() (T, error), discard func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := fn()
		done <- result{value, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				discard(r.value)
			}
		}()
		var none T
		return none, fmt.Errorf("no answer within %v: %w", d, ctx.Err())
	}
}

// scram is the client's side of SCRAM (RFC 5802, RFC 7677), without channel binding. Passwords are taken as
// they are, which for ASCII is what SASLprep gives.
type scram struct {
	hash           func() hash.Hash
	nonce          string
	user, password string

	step      int
	firstBare string
	signature []byte // the server's, expected
}

func (s *scram) Begin(user, password, _ string) error {
	s.user, s.password = strings.NewReplacer("=", "=3D", ",", "=2C").Replace(user), password
	return nil
}

func (s *scram) Done() bool { return s.step == 3 }

func (s *scram) Step(challenge string) (string, error) {
	s.step++
	switch s.step {
	case 1:
		s.firstBare = "n=" + s.user + ",r=" + s.nonce
		return "n,," + s.firstBare, nil
	case 2:
		fields := scramFields(challenge)
		salt, err := base64.StdEncoding.DecodeString(fields["s"])
		iterations, errI := strconv.Atoi(fields["i"])
		longer := strings.HasPrefix(fields["r"], s.nonce) && len(fields["r"]) > len(s.nonce)
		if err != nil || errI != nil || iterations < 1 || !longer {
			return "", fmt.Errorf("SCRAM: unexpected challenge %q", challenge)
		}
		salted, err := pbkdf2.Key(s.hash, s.password, salt, iterations, s.hash().Size())
		if err != nil {
			return "", fmt.Errorf("SCRAM: %w", err)
		}
		final := "c=biws,r=" + fields["r"] // biws is "n,,"
		message := s.firstBare + "," + challenge + "," + final
		clientKey := s.mac(salted, "Client Key")
		stored := s.hash()
		stored.Write(clientKey)
		proof := s.mac(stored.Sum(nil), message)
		for i := range proof {
			proof[i] ^= clientKey[i]
		}
		s.signature = s.mac(s.mac(salted, "Server Key"), message)
		return final + ",p=" + base64.StdEncoding.EncodeToString(proof), nil
	case 3:
		fields := scramFields(challenge)
		signature, err := base64.StdEncoding.DecodeString(fields["v"])
		if err != nil || !hmac.Equal(signature, s.signature) {
			return "", fmt.Errorf("SCRAM: the broker does not know the password either, or refuses: %q",
				fields["e"])
		}
		return "", nil
	}
	return "", errors.New("SCRAM: one step too many")
}

func (s *scram) mac(key []byte, message string) []byte {
	m := hmac.New(s.hash, key)
	m.Write([]byte(message))
	return m.Sum(nil)
}

func scramFields(message string) map[string]string {
	fields := make(map[string]string)
	for field := range strings.SplitSeq(message, ",") {
		name, value, _ := strings.Cut(field, "=")
		fields[name] = value
	}
	return fields
}

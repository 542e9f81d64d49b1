// Kafka: kfake in a process of its own, one or more real Apache Kafka brokers, or somebody else's.
//
// kfake keeps its data over a clean stop only: killed with a transaction open, it writes no abort marker, and
// later commits of that transactional id stay hidden from read_committed consumers. So it ends by end of its
// input, it leaves a marker while it runs, and a folder with that marker is refused. Whatever is about
// crashes needs the real one.

package main

import (
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"golang.org/x/sync/errgroup"
)

// broker is one process that speaks Kafka's protocol.
type broker struct {
	name    string
	node    int32
	port    int
	secured int // port of its second listener, under -secure
	data    string
	last    *child // its process, or the one it had
	clock   *clock
	disk    *disk
}

func (b *broker) address() string        { return fmt.Sprintf("127.0.0.1:%d", b.port) }
func (b *broker) securedAddress() string { return fmt.Sprintf("127.0.0.1:%d", b.secured) }

// ready waits until the broker itself says that it is a member of its cluster and in sync with all that it
// replicates: only then may the next one of a cluster be killed.
func (b *broker) ready(ctx context.Context) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(b.address()))
	if err != nil {
		return err
	}
	defer client.Close()
	everything := kmsg.NewPtrMetadataRequest()
	everything.Topics = nil
	for {
		try, cancel := context.WithTimeout(ctx, time.Second)
		answer, err := client.SeedBrokers()[0].Request(try, everything)
		cancel()
		if err == nil && b.inSync(answer.(*kmsg.MetadataResponse)) {
			return nil
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func (b *broker) inSync(cluster *kmsg.MetadataResponse) bool {
	for _, topic := range cluster.Topics {
		for _, p := range topic.Partitions {
			if slices.Contains(p.Replicas, b.node) && (p.Leader < 0 || !slices.Contains(p.ISR, b.node)) {
				return false
			}
		}
	}
	return slices.ContainsFunc(cluster.Brokers, func(m kmsg.MetadataResponseBroker) bool {
		return m.NodeID == b.node
	})
}

// newEmbedded is the one broker that kfake is.
func newEmbedded(procs *processes, data string, port int) (*server, string, error) {
	if _, err := os.Stat(runningMarker(data)); err == nil {
		return nil, "", fmt.Errorf("the embedded Kafka in %s was not stopped in order and may hide events: "+
			"start with -fresh (which wipes all data), or take -kafka apache, which survives that", data)
	}
	b := &broker{name: "kafka", port: port}
	s := &server{name: b.name, ready: b.ready}
	s.noKill = "the embedded Kafka does not survive SIGKILL (it may hide events afterwards): " +
		"start with -kafka apache to kill it"
	s.start = func(context.Context) (*child, error) {
		cmd, err := self("_kfake", fmt.Sprint(port), data)
		if err != nil {
			return nil, err
		}
		return procs.start(b.name, cmd, 0)
	}
	return s, b.address(), os.MkdirAll(data, 0o755)
}

// runningMarker is a file beside kfake's data, there from its start to its orderly end.
func runningMarker(data string) string { return data + ".running" }

// runKfake is the hidden subcommand.
func runKfake(port int, data string) error {
	// Only the end of input ends it; a signal for everyone is not for it.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	if err := os.WriteFile(runningMarker(data), nil, 0o644); err != nil {
		return err
	}
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.Ports(port), kfake.DataDir(data))
	if err != nil {
		return errors.Join(err, os.Remove(runningMarker(data)))
	}
	untilEndOfInput()
	cluster.Close()
	return os.Remove(runningMarker(data))
}

func untilEndOfInput() { io.Copy(io.Discard, os.Stdin) }

//go:embed pom.xml
var pom []byte

// apacheVersion names the cache folder; pom.xml is what decides.
const apacheVersion = "4.3.0"

// defaultJava suits tests and short benchmarks: it compiles early and quickly rather than well, and stays
// small. By Java's own thresholds a broker interprets a third of its work for minutes.
const defaultJava = "-Xmx192m -XX:TieredStopAtLevel=1 -XX:CompileThresholdScaling=0.02 -XX:+UseSerialGC"

// apache is a cluster: one controller and brokers, each a process of its own.
//
// Roles are apart for the sake of transactions. A process that is both comes back from SIGKILL as leader of
// all it led, by its old registration, until that expires and leaves no leader for a moment. If the markers
// of a commit that was acknowledged before the kill are still to be written then, Kafka 4.3 takes the
// leaderless partition for a deleted one ("likely deleted already and hence can be skipped"): the commit
// counts as complete, yet read_committed consumers never get past it, until the same producer writes to that
// partition again. A broker that starts after its old registration expired, at a controller that lived on, is
// never in that place.
type apache struct {
	procs   *processes
	java    func(dir string, args ...string) *exec.Cmd
	quorum  string // the controller's address
	size    int
	logDirs int           // of each broker
	secure  *credentials  // nil without -secure
	started chan struct{} // closed when the controller is up for the first time
	upSince time.Time     // the controller; read only after started
}

const (
	controllerNode = 1000
	// brokerSession is how long a dead broker's registration stands in its successor's way; Kafka's default
	// is 9 s. A broker that is frozen or starved for longer is taken for dead.
	brokerSession = 3 * time.Second
	// sessionMargin is for the controller to notice.
	sessionMargin = time.Second
)

// newApache makes a controller and the brokers, and fetches Kafka if need be. It returns the brokers'
// addresses too and, under -secure, what a client of their secured listeners sets. With a faketime library
// each has a clock that can be stepped.
func newApache(ctx context.Context, procs *processes, cfg config, faketime string,
	port func(name string) (int, error), say func(string, ...any),
) ([]*server, string, map[string]string, error) {
	program, err := exec.LookPath("java")
	if err != nil {
		return nil, "", nil, errors.New("-kafka apache needs Java 17 or later in PATH; " +
			"-kafka embedded needs none")
	}
	jars, err := fetchApache(ctx, procs, say)
	if err != nil {
		return nil, "", nil, err
	}
	// A cluster of another size is another cluster, and so is one that knows a user.
	data := filepath.Join(cfg.data, fmt.Sprintf("kafka-apache-%d", cfg.brokers))
	if cfg.logDirs > 1 {
		data += fmt.Sprintf("-logs-%d", cfg.logDirs)
	}
	a := &apache{procs: procs, size: cfg.brokers, logDirs: cfg.logDirs, started: make(chan struct{})}
	if cfg.secure {
		data += "-secure"
		if a.secure, err = newCredentials(data); err != nil {
			return nil, "", nil, err
		}
	}
	a.java = func(dir string, args ...string) *exec.Cmd {
		options := append(strings.Fields(cfg.java), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp",
			filepath.Join(jars, "*"))
		cmd := exec.Command(program, append(options, args...)...)
		cmd.Dir = dir
		return cmd
	}
	controller := &broker{name: "controller", node: controllerNode}
	if controller.port, err = port(controller.name); err != nil {
		return nil, "", nil, err
	}
	a.quorum = controller.address()
	brokers := []*broker{controller}
	var addresses, securedAddresses []string
	for i := range cfg.brokers {
		b := &broker{name: "kafka", node: int32(i + 1)}
		if cfg.brokers > 1 {
			b.name = fmt.Sprintf("kafka%d", b.node)
		}
		if b.port, err = port(b.name); err != nil {
			return nil, "", nil, err
		}
		brokers = append(brokers, b)
		addresses = append(addresses, b.address())
		if a.secure != nil {
			if b.secured, err = port(b.name + "-secure"); err != nil {
				return nil, "", nil, err
			}
			securedAddresses = append(securedAddresses, b.securedAddress())
		}
	}
	var servers []*server
	formats, together := errgroup.WithContext(ctx)
	for _, b := range brokers {
		b.data = filepath.Join(data, b.name)
		formats.Go(func() error { return a.format(together, b) })
		if err := os.MkdirAll(data, 0o755); err != nil {
			return nil, "", nil, err
		}
		if b.clock, err = newClock(faketime, b.data+".clock"); err != nil {
			return nil, "", nil, err
		}
		if b.disk, err = newDisk(ctx, procs, cfg.disks, b.data); err != nil {
			return nil, "", nil, err
		}
		s := &server{name: b.name, ready: b.ready, quit: syscall.SIGTERM, clock: b.clock, disk: b.disk}
		s.start = func(ctx context.Context) (*child, error) {
			if err := a.awaitExpiry(ctx, b); err != nil {
				return nil, err
			}
			// Its last resort is SIGKILL, which Kafka is made to survive: asked to end all at once, brokers
			// would wait in vain for their controller.
			var err error
			cmd := a.java(b.data, "kafka.Kafka", b.config())
			b.clock.give(cmd)
			b.disk.give(cmd)
			b.last, err = procs.start(b.name, cmd, syscall.SIGKILL)
			return b.last, err
		}
		if b == controller {
			s.ready = a.controllerReady
		}
		servers = append(servers, s)
	}
	var settings map[string]string
	if a.secure != nil {
		settings = a.secure.settings(securedAddresses)
	}
	return servers, strings.Join(addresses, ","), settings, formats.Wait()
}

func (b *broker) config() string { return filepath.Join(b.data, "server.properties") }
func (b *broker) log() string    { return filepath.Join(b.data, "log") }

// logs are its log directories: log, log2 and so on. The cluster's metadata are in the first.
func (a *apache) logs(b *broker) []string {
	logs := []string{b.log()}
	for i := 2; i <= a.logDirs && b.node != controllerNode; i++ {
		logs = append(logs, b.log()+fmt.Sprint(i))
	}
	return logs
}

// format writes the configuration, whose ports may be new, and makes the folder a member of the cluster.
func (a *apache) format(ctx context.Context, b *broker) error {
	if err := os.MkdirAll(b.data, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(b.config(), []byte(a.properties(b)), 0o644); err != nil {
		return err
	}
	meta := filepath.Join(b.log(), "meta.properties")
	if _, err := os.Stat(meta); err == nil {
		return nil
	}
	const cluster = "d2FsbGV0LWRldi1zdGFjaw" // any 16 bytes; all members need the same ones
	if b.node == controllerNode {
		args := []string{"kafka.tools.StorageTool", "format", "-t", cluster, "-c", b.config()}
		if a.secure != nil {
			args = append(args, a.secure.format()...)
		}
		return a.procs.run(ctx, b.name+"-format", a.java(b.data, args...))
	}
	// All that the tool would leave for a broker is this file in each directory, after a second of Java.
	for _, dir := range a.logs(b) {
		id := make([]byte, 16)
		rand.Read(id)
		text := fmt.Sprintf("version=1\ncluster.id=%s\nnode.id=%d\ndirectory.id=%s\n", cluster, b.node,
			base64.RawURLEncoding.EncodeToString(id))
		meta := filepath.Join(dir, "meta.properties")
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(meta, []byte(text), 0o644)); err != nil {
			return err
		}
	}
	return nil
}

// awaitExpiry returns when the registration of this broker's last, killed process has expired.
func (a *apache) awaitExpiry(ctx context.Context, b *broker) error {
	_, err := os.Stat(filepath.Join(b.log(), "__cluster_metadata-0"))
	_, err2 := os.Stat(filepath.Join(b.log(), ".kafka_cleanshutdown")) // Kafka's own marker
	if ran, clean := err == nil, err2 == nil; b.node == controllerNode || !ran || clean {
		return nil
	}
	select {
	case <-a.started:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	since := a.upSince // a controller that starts takes all brokers for alive
	if b.last != nil && b.last.ended.After(since) {
		since = b.last.ended
	}
	return sleep(ctx, time.Until(since.Add(brokerSession+sessionMargin)))
}

// controllerReady waits until the controller leads its quorum of one.
func (a *apache) controllerReady(ctx context.Context) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(a.quorum))
	if err != nil {
		return err
	}
	defer client.Close()
	request := kmsg.NewPtrDescribeQuorumRequest()
	topic := kmsg.NewDescribeQuorumRequestTopic()
	topic.Topic = "__cluster_metadata"
	topic.Partitions = append(topic.Partitions, kmsg.NewDescribeQuorumRequestTopicPartition())
	request.Topics = append(request.Topics, topic)
	for {
		try, cancel := context.WithTimeout(ctx, time.Second)
		answer, err := client.SeedBrokers()[0].Request(try, request)
		cancel()
		if err == nil && answer.(*kmsg.DescribeQuorumResponse).ErrorCode == 0 {
			break
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	first := a.upSince.IsZero()
	a.upSince = time.Now()
	if first {
		close(a.started)
	}
	return nil
}

func (a *apache) properties(b *broker) string {
	if b.node == controllerNode {
		return fmt.Sprintf(`process.roles=controller
node.id=%d
listeners=CONTROLLER://%[2]s
controller.listener.names=CONTROLLER
controller.quorum.voters=%[1]d@%[2]s
log.dirs=%[3]s
default.replication.factor=%[4]d
min.insync.replicas=%[5]d
broker.session.timeout.ms=%[6]d
`, b.node, a.quorum, b.log(), a.replicas(), a.inSync(), brokerSession.Milliseconds())
	}
	listeners, security := "PLAINTEXT://"+b.address(), ""
	if a.secure != nil {
		listeners += ",SECURED://" + b.securedAddress()
		security = a.secure.properties()
	}
	return fmt.Sprintf(`process.roles=broker
node.id=%d
listeners=%s
controller.listener.names=CONTROLLER
controller.quorum.voters=%d@%s
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURED:SASL_SSL
log.dirs=%s
auto.create.topics.enable=false
default.replication.factor=%[6]d
offsets.topic.replication.factor=%[6]d
transaction.state.log.replication.factor=%[6]d
share.coordinator.state.topic.replication.factor=%[6]d
min.insync.replicas=%[7]d
transaction.state.log.min.isr=%[7]d
share.coordinator.state.topic.min.isr=%[7]d
broker.session.timeout.ms=%[8]d
broker.heartbeat.interval.ms=500

# Fewer files and no waits, for a machine that is started often.
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
# The cleaner takes 128 MB at once otherwise, more than the small heap has.
log.cleaner.dedupe.buffer.size=4194304
`, b.node, listeners, controllerNode, a.quorum, strings.Join(a.logs(b), ","), a.replicas(), a.inSync(),
		brokerSession.Milliseconds()) + security
}

// replicas and inSync: what is written survives the loss of one broker of three, and goes on meanwhile.
func (a *apache) replicas() int { return min(a.size, 3) }
func (a *apache) inSync() int   { return max(a.replicas()-1, 1) }

// fetchApache has Maven fetch what pom.xml names and returns the folder of jars.
func fetchApache(ctx context.Context, procs *processes, say func(string, ...any)) (string, error) {
	cache, err := cacheFolder()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "kafka-"+apacheVersion)
	return dir, once(ctx, dir, func(tmp string) error {
		mvn, err := exec.LookPath("mvn")
		if err != nil {
			return errors.New("-kafka apache needs Maven (mvn) in PATH to fetch Apache Kafka once; " +
				"-kafka embedded needs neither")
		}
		say("fetching Apache Kafka %s by Maven (44 MB, once)", apacheVersion)
		file := filepath.Join(tmp, "pom.xml")
		if err := os.WriteFile(file, pom, 0o644); err != nil {
			return err
		}
		return procs.run(ctx, "maven", exec.Command(mvn, "-B", "-q", "-f", file,
			"org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies",
			"-DincludeScope=runtime", "-DoutputDirectory="+tmp))
	})
}

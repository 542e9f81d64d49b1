// Kafka: kfake in a process of its own, one or more real Apache Kafka brokers, or somebody else's.
//
// kfake keeps its data over a clean stop only: killed with a transaction open, it writes no abort marker, and later
// commits of that transactional id stay hidden from read_committed consumers. So it ends by end of its input, it
// leaves a marker while it runs, and a folder with that marker is refused. Whatever is about crashes needs the real one.

package main

import (
	"context"
	_ "embed"
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
)

// broker is one process that speaks Kafka's protocol.
type broker struct {
	procs *processes
	name  string
	node  int32
	port  int
	start func() (*child, error)
}

func (b *broker) address() string { return fmt.Sprintf("127.0.0.1:%d", b.port) }

// ready waits until the broker itself says that it is a member of its cluster and in sync with all that it replicates:
// only then may the next one of a cluster be killed.
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
	return slices.ContainsFunc(cluster.Brokers, func(m kmsg.MetadataResponseBroker) bool { return m.NodeID == b.node })
}

// newEmbedded is the one broker that kfake is.
func newEmbedded(procs *processes, data string, port int) (*broker, error) {
	if _, err := os.Stat(runningMarker(data)); err == nil {
		return nil, fmt.Errorf("the embedded Kafka in %s was not stopped in order and may hide events: start with -fresh (which wipes all data), or take -kafka apache, which survives that", data)
	}
	b := &broker{procs: procs, name: "kafka", port: port}
	b.start = func() (*child, error) {
		cmd, err := self("_kfake", fmt.Sprint(port), data)
		if err != nil {
			return nil, err
		}
		return procs.start("kafka", cmd, 0)
	}
	return b, os.MkdirAll(data, 0o755)
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

// defaultJava suits tests: it compiles quickly rather than well, and stays small. A benchmark passes its own.
const defaultJava = "-Xmx192m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

// newApache makes count brokers of one KRaft cluster, each of them also a controller, and fetches Kafka if need be.
func newApache(ctx context.Context, procs *processes, data string, count int, javaOptions string, ports func() int, say func(string, ...any)) ([]*broker, error) {
	java, err := exec.LookPath("java")
	if err != nil {
		return nil, errors.New("-kafka apache needs Java 17 or later in PATH; -kafka embedded needs none")
	}
	jars, err := fetchApache(ctx, procs, say)
	if err != nil {
		return nil, err
	}
	// A cluster of another size is another cluster.
	data = filepath.Join(data, fmt.Sprintf("kafka-apache-%d", count))
	var brokers []*broker
	var voters []string
	for i := range count {
		b := &broker{procs: procs, name: "kafka", node: int32(i + 1), port: ports()}
		if count > 1 {
			b.name = fmt.Sprintf("kafka%d", b.node)
		}
		brokers = append(brokers, b)
		voters = append(voters, fmt.Sprintf("%d@127.0.0.1:%d", b.node, ports()))
	}
	for i, b := range brokers {
		dir := filepath.Join(data, fmt.Sprint(b.node))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		file := filepath.Join(dir, "server.properties")
		if err := os.WriteFile(file, []byte(b.properties(voters, i, filepath.Join(dir, "log"))), 0o644); err != nil {
			return nil, err
		}
		command := func(args ...string) *exec.Cmd {
			options := append(strings.Fields(javaOptions), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", filepath.Join(jars, "*"))
			cmd := exec.Command(java, append(options, args...)...)
			cmd.Dir = dir
			return cmd
		}
		if _, err := os.Stat(filepath.Join(dir, "log", "meta.properties")); err != nil {
			// The cluster id is any; all brokers need the same one.
			err := procs.run(ctx, b.name+"-format", command("kafka.tools.StorageTool", "format", "-g", "-t", "d2FsbGV0LWRldi1zdGFjaw", "-c", file))
			if err != nil {
				return nil, err
			}
		}
		b.start = func() (*child, error) {
			quit := syscall.SIGTERM
			if count > 1 {
				// A cluster that stops loses its quorum, and the last broker would wait for it in vain.
				quit = syscall.SIGKILL
			}
			return procs.start(b.name, command("kafka.Kafka", file), quit)
		}
	}
	return brokers, nil
}

// properties is the configuration of the broker whose controller is voters[i].
func (b *broker) properties(voters []string, i int, data string) string {
	_, controller, _ := strings.Cut(voters[i], "@")
	replicas := min(len(voters), 3)
	inSync := max(replicas-1, 1)
	return fmt.Sprintf(`process.roles=broker,controller
node.id=%d
listeners=CLIENT://%[2]s,CONTROLLER://%[3]s
advertised.listeners=CLIENT://%[2]s
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
controller.quorum.voters=%[4]s
log.dirs=%[5]s
auto.create.topics.enable=false
default.replication.factor=%[6]d
offsets.topic.replication.factor=%[6]d
transaction.state.log.replication.factor=%[6]d
share.coordinator.state.topic.replication.factor=%[6]d
min.insync.replicas=%[7]d
transaction.state.log.min.isr=%[7]d
share.coordinator.state.topic.min.isr=%[7]d

# Fewer files and no waits, for a machine that is started often.
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
# The cleaner takes 128 MB at once otherwise, more than the small heap has.
log.cleaner.dedupe.buffer.size=4194304
# After a SIGKILL the old registration stands in a restart's way for so long (default 9 s).
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
`, b.node, b.address(), controller, strings.Join(voters, ","), data, replicas, inSync)
}

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
			return errors.New("-kafka apache needs Maven (mvn) in PATH to fetch Apache Kafka once; -kafka embedded needs neither")
		}
		say("fetching Apache Kafka %s by Maven (44 MB, once)", apacheVersion)
		file := filepath.Join(tmp, "pom.xml")
		if err := os.WriteFile(file, pom, 0o644); err != nil {
			return err
		}
		return procs.run(ctx, "maven", exec.Command(mvn, "-B", "-q", "-f", file,
			"org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory="+tmp))
	})
}

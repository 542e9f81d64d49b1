// Command markers shows whether a Kafka drops transaction markers when its only broker stops or starts.
// KAFKA-20734: 4.3.0 does, 4.2.0 does not. Run it before raising the version that k8s.yaml pins:
//
//	go run -C dev ./k8s/lab/markers -libs FOLDER [-kill]
//
// FOLDER has Kafka's jars, as images.sh leaves them in the lab's cache.
//
// Several producers commit small transactions until the broker is stopped, again and again; what the
// coordinator dropped it says in its own log.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

const (
	address   = "127.0.0.1:29092"
	producers = 12
	commits   = 300 // before each stop
)

const properties = `process.roles=broker,controller
node.id=0
listeners=CLIENT://127.0.0.1:29092,CONTROLLER://127.0.0.1:29093
advertised.listeners=CLIENT://127.0.0.1:29092
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
controller.quorum.voters=0@127.0.0.1:29093
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
log.cleaner.dedupe.buffer.size=4194304
num.partitions=12
`

func main() {
	libs := flag.String("libs", "", "`folder` with Kafka's jars")
	rounds := flag.Int("rounds", 8, "stops and starts")
	kill := flag.Bool("kill", false, "SIGKILL, not SIGTERM")
	flag.Parse()
	dropped, err := run(*libs, *rounds, *kill)
	if err != nil {
		log.Fatal(err)
	}
	if dropped > 0 {
		log.Fatalf("%d times markers were dropped", dropped)
	}
	fmt.Println("no marker was dropped")
}

func run(libs string, rounds int, kill bool) (dropped int, err error) {
	dir, err := os.MkdirTemp("", "markers-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "server.properties")
	if err := os.WriteFile(file, []byte(properties+"log.dirs="+filepath.Join(dir, "log")+"\n"),
		0o600); err != nil {
		return 0, err
	}
	java := func(args ...string) *exec.Cmd {
		return exec.Command("java",
			append([]string{"-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp",
				filepath.Join(libs, "*")}, args...)...)
	}
	if out, err := java("kafka.tools.StorageTool", "format", "-g", "-t", "d2FsbGV0LWRldi1zdGFjaw", "-c",
		file).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("format: %w\n%s", err, out)
	}
	for round := range rounds {
		output := filepath.Join(dir, fmt.Sprintf("broker%d.log", round))
		logFile, err := os.Create(output)
		if err != nil {
			return dropped, err
		}
		broker := java("kafka.Kafka", file)
		broker.Stdout, broker.Stderr = logFile, logFile
		if err := broker.Start(); err != nil {
			return dropped, err
		}
		done := commit(round)
		if kill {
			broker.Process.Kill()
		} else {
			broker.Process.Signal(syscall.SIGTERM)
		}
		broker.Wait()
		done()
		logFile.Close()
		text, err := os.ReadFile(output)
		if err != nil {
			return dropped, err
		}
		n := strings.Count(string(text), "likely deleted already and hence can be skipped")
		dropped += n
		fmt.Printf("round %d: dropped %d times\n", round, n)
	}
	return dropped, nil
}

// commit starts the producers and returns once they have committed enough; they go on until the function that
// it returns is called.
func commit(round int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	var committed atomic.Int64
	for i := range producers {
		all.Go(func() {
			client, err := kgo.NewClient(kgo.SeedBrokers(address),
				kgo.TransactionalID(fmt.Sprintf("%d-%d", round, i)),
				kgo.DefaultProduceTopic("events"), kgo.AllowAutoTopicCreation(),
				kgo.RecordPartitioner(kgo.RoundRobinPartitioner()), kgo.ProducerLinger(0))
			if err != nil {
				log.Fatal(err)
			}
			defer client.CloseAllowingRebalance()
			for ctx.Err() == nil {
				if client.BeginTransaction() != nil {
					time.Sleep(100 * time.Millisecond)
					continue
				}
				record := func() *kgo.Record { return &kgo.Record{Value: []byte("x")} }
				if client.ProduceSync(ctx, record(), record(), record()).FirstErr() != nil {
					client.EndTransaction(ctx, kgo.TryAbort)
				} else if client.EndTransaction(ctx, kgo.TryCommit) == nil {
					committed.Add(1)
				}
			}
		})
	}
	for range 600 {
		if committed.Load() >= commits {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return func() {
		cancel()
		ended := make(chan struct{})
		go func() { all.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(4 * time.Second): // some wait for the broker that we stopped
		}
	}
}

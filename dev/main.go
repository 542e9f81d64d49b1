// Command dev is the development stack: Postgres, Redis, Kafka and the wallet service in one command, on
// loopback, with no containers and no configuration. `go run -C dev . -h` says how.
//
// File by file: main.go is flags and help; stack.go is what runs and who watches it; process.go is child
// processes and leaving none behind; postgres.go, redis.go, kafka.go and service.go are one server each;
// ports.go gives them their ports; clock.go steps their clocks; disk.go fills their disks; secure.go is
// what Kafka demands under -secure; fetch.go is the cache of downloads; events.go prints a topic; audit.go
// compares it with the ledger; advice.go says what to do about faults.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const usage = `The development stack of the wallet service.

  go run -C dev . [flags]            everything, and the service; Ctrl-C stops it
  go run -C dev . services [flags]   only the servers, until standard input ends
  go run -C dev . events [flags]     the topic's events as JSON lines, read_committed
  go run -C dev . audit              the running stack's ledger compared with its topic
  go run -C dev . COMMAND -h         the flags of each

All listen on 127.0.0.1 only. Nothing is left running, however the stack ends.
`

const servicesUsage = `Starts only the servers, for tests. Once they are ready it prints one JSON line on
standard output, which is broken here:

  {"database_url":"postgres://...","redis_url":"redis://...","kafka_brokers":"127.0.0.1:10004",
   "pids":{"postgres":1,"redis":2,"kafka":3}}

With -secure there is "secure_kafka" too: the service's settings for the secured listener,
{"KAFKA_BROKERS":"127.0.0.1:10005","KAFKA_TLS":"true",...}.

It stops when its standard input ends. Lines on standard input are obeyed, each answered by one JSON line
when done:

  kill NAME     SIGKILL to the server's whole process tree, as a crash
  stop NAME     stop in order; "stop postgres immediate" is SIGQUIT, "fast" (SIGINT) is the default
  start NAME    start again, same port and data; answered when ready
  pause NAME    SIGSTOP to the whole process tree
  resume NAME   SIGCONT
  full NAME [FOLDER]
                under -disks, of Postgres and Apache Kafka: from now on no file grows in its data folder,
                or in one folder of that, such as log2 of a broker
  room NAME     there is room again; answered when it is ready, started anew if it ended meanwhile. A broker
                that lost one folder takes it back when it is started again
  clock NAME OFFSET
                under -clocks, of Postgres and Apache Kafka: from now on its clock is that far from the
                machine's: -3h, +90s, +2d, 0; its monotonic clock, by which it waits, stays

NAME is postgres, redis or kafka; under -kafka apache also controller, and kafka1, kafka2 ... with -brokers.
Answers are {"ok":"kill redis","pids":{...}} or {"error":"..."}. The embedded Kafka cannot be
killed, only stopped. A killed Apache broker takes some 7 s to start again (4 of them until its cluster has
noticed).
`

const eventsUsage = `Prints events, one JSON line each: partition, offset, key, headers, value.
Finds the brokers of the running stack by itself.
Goes on until Ctrl-C, or until -n events are printed. With -from start it begins with what is there already.
`

const auditUsage = `Compares every entry of the running stack's ledger with every event of its topic, by
` + "`wallet -audit`" + `, and says what it found. Exit status 0: clean, 1: findings, 2: it could not tell.
`

// Exit statuses.
const (
	exitFailed = 1
	exitUsage  = 2
)

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	var command string
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	var err error
	switch command {
	case "", "services":
		var cfg config
		if cfg, err = stackConfig(command == "services", args); err == nil {
			// With SIGPIPE caught, a reader that went away with `go run` is an error like others.
			signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
			ctx, release := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM,
				syscall.SIGHUP)
			context.AfterFunc(ctx, release) // a second Ctrl-C ends us at once; the janitor does the rest
			err = runStack(untilParentEnds(ctx), cfg, os.Stdin, os.Stdout)
		}
	case "events":
		var cfg eventsConfig
		if cfg, err = newEventsConfig(args); err == nil {
			ctx, release := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM,
				syscall.SIGHUP)
			defer release()
			err = runEvents(untilParentEnds(ctx), cfg, os.Stdout)
		}
	case "audit":
		var data string
		f := flag.NewFlagSet("audit", flag.ContinueOnError)
		f.StringVar(&data, "data", "", "data `folder` of the running stack (default dev/.data)")
		if err = errors.Join(parse(f, auditUsage, args), defaultData(&data)); err == nil {
			ctx, release := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM,
				syscall.SIGHUP)
			defer release()
			err = runAudit(untilParentEnds(ctx), data)
		}
	// What the stack starts of itself.
	case "_janitor":
		janitor(os.Stdin)
	case "_miniredis":
		err = runMiniredis(args[0])
	case "_kfake":
		var port int
		if port, err = strconv.Atoi(args[0]); err == nil {
			err = runKfake(port, args[1])
		}
	case "_true":
	default:
		err = usageError(fmt.Sprintf("there is no command %q; see go run -C dev . -h", command))
	}
	var bad usageError
	var said exitStatus
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &said):
		return int(said)
	case errors.As(err, &bad):
		fmt.Fprintln(os.Stderr, "dev:", bad)
		return exitUsage
	default:
		fmt.Fprintln(os.Stderr, "dev:", err)
		if advice := advise(err); advice != "" {
			fmt.Fprintln(os.Stderr, "dev:", advice)
		}
		return exitFailed
	}
}

// usageError is a command line that cannot be obeyed, in one sentence that says what to do.
type usageError string

func (e usageError) Error() string { return string(e) }

// list is a flag that may be repeated.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(v string) error { *l = append(*l, v); return nil }

func stackConfig(services bool, args []string) (config, error) {
	c := config{services: services}
	var set list
	f := flag.NewFlagSet("dev", flag.ContinueOnError)
	f.StringVar(&c.postgres, "postgres", "download",
		"`where` Postgres comes from: download (18, once; the machine's own if that fails),\n"+
			"local (PATH, /usr/lib/postgresql, Homebrew) or a folder with its programs")
	f.Var(&set, "pgset", "a further Postgres setting, `name=value`; may be repeated")
	f.StringVar(&c.redis, "redis", "auto",
		"`which` Redis: redis-server, miniredis, or auto: the first if there is one")
	f.StringVar(&c.kafka, "kafka", "embedded",
		"`which` Kafka: embedded (no Java), apache (real brokers; needs Java 17 and, once, Maven)\n"+
			"or the host:port of one that runs already")
	f.IntVar(&c.brokers, "brokers", 1, "how many brokers -kafka apache starts, as one cluster")
	f.BoolVar(&c.secure, "secure", false,
		"with -kafka apache: a second listener by TLS and SASL, with certificates and a password "+
			"made for it;\nthe service uses that one")
	f.StringVar(&c.java, "java", defaultJava, "`options` of the Java machine under -kafka apache")
	f.IntVar(&c.logDirs, "logdirs", 1, "how many log directories each broker of -kafka apache has")
	f.BoolVar(&c.disks, "disks", false, "obey the lines full and room, which fill the disk of Postgres or\n"+
		"Apache Kafka; needs a C compiler, cc")
	f.BoolVar(&c.clocks, "clocks", false, "obey the line clock, which steps the clock of Postgres or\n"+
		"Apache Kafka; needs the Debian package libfaketime")
	f.Var(&c.ports, "port", "fix a server's port, `name=number` as in postgres=5432; may be repeated.\n"+
		"Otherwise each keeps the port that it had at the last start")
	f.BoolVar(&c.fresh, "fresh", false, "wipe the data folder's data first")
	help, dataHelp := usage, "data `folder`, locked while in use (default dev/.data)"
	if services {
		help = servicesUsage
		dataHelp = "data `folder`, locked while in use (default: a temporary one, removed at the end)"
	} else {
		f.StringVar(&c.listen, "listen", "127.0.0.1:8080", "`address` of the service")
		f.IntVar(&c.replicas, "replicas", 1,
			"how many processes of the service, on ports following -listen's")
		f.BoolVar(&c.key, "key", false, "make an API key, which the service then demands")
		f.BoolVar(&c.rateLimit, "rate-limit", false, "keep the service's rate limit on")
		f.BoolVar(&c.json, "json", false, "once ready, print exactly one JSON line on standard output")
	}
	f.StringVar(&c.data, "data", "", dataHelp)
	if err := parse(f, help, args); err != nil {
		return c, err
	}
	c.postgresSet, c.dataNamed = set, c.data != ""
	for _, setting := range set {
		if name, _, ok := strings.Cut(setting, "="); !ok || name == "" {
			return c, usageError(fmt.Sprintf("-pgset %s: say name=value", setting))
		}
	}
	switch {
	case !slices.Contains([]string{"auto", "redis-server", "miniredis"}, c.redis):
		return c, usageError("-redis is auto, redis-server or miniredis")
	case c.kafka != "embedded" && c.kafka != "apache" && !strings.Contains(c.kafka, ":"):
		return c, usageError("-kafka is embedded, apache or host:port")
	case c.brokers < 1 || c.brokers > 1 && c.kafka != "apache":
		return c, usageError("-brokers is at least 1, and more than 1 only with -kafka apache")
	case c.logDirs < 1 || c.logDirs > 1 && c.kafka != "apache":
		return c, usageError("-logdirs is at least 1, and more than 1 only with -kafka apache")
	case c.secure && c.kafka != "apache":
		return c, usageError("-secure goes with -kafka apache")
	case !services && c.replicas < 1:
		return c, usageError("-replicas is at least 1")
	}
	if _, err := newPorts(c.data, c.ports, nil); err != nil || services {
		return c, err
	}
	return c, defaultData(&c.data)
}

func newEventsConfig(args []string) (eventsConfig, error) {
	var c eventsConfig
	f := flag.NewFlagSet("events", flag.ContinueOnError)
	f.StringVar(&c.from, "from", "", "`where` to begin: start, or absent for new events only")
	f.IntVar(&c.count, "n", 0, "stop after so `many` events")
	f.StringVar(&c.topic, "topic", "wallet.events", "the topic")
	f.StringVar(&c.brokers, "brokers", "", "`host:port,...` of Kafka (default: the running stack's)")
	f.StringVar(&c.data, "data", "", "data `folder` of the running stack (default dev/.data)")
	if err := parse(f, eventsUsage, args); err != nil {
		return c, err
	}
	if c.from != "" && c.from != "start" {
		return c, usageError("-from is start, or absent for new events only")
	}
	return c, defaultData(&c.data)
}

func parse(f *flag.FlagSet, help string, args []string) error {
	f.SetOutput(io.Discard) // what it has to say is said here: an error last, and not above a list
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		f.SetOutput(os.Stdout)
		fmt.Fprint(os.Stdout, help, "\nFlags:\n")
		f.PrintDefaults()
		return err
	} else if err != nil {
		return usageError(err.Error() + "; -h lists the flags")
	}
	if f.NArg() > 0 {
		return usageError(fmt.Sprintf("what is %q? see -h", f.Arg(0)))
	}
	return nil
}

// defaultData fills in the checkout's own data folder.
func defaultData(data *string) error {
	if *data != "" {
		return nil
	}
	root, err := checkout()
	if err == nil {
		*data = filepath.Join(root, "dev", ".data")
	}
	return err
}

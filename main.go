// Wallet is a wallet service: deposits, withdrawals, transfers, holds and reversals over HTTP, each one
// Postgres commit and exactly one Kafka event per wallet touched.
//
//	wallet            serve; configuration comes from the environment (-settings lists it)
//	wallet -migrate   apply the schema as the owner (MIGRATE_URL), then exit
//	wallet -new-key   make an API key for a client: name and scopes, as in checkout:read+write
//	wallet -audit     compare ledger and topic, then exit: 0 clean, 1 findings
//	wallet -adopt     let the relay go on after a restore or an upgrade into another database, then exit
//	wallet -rebuild   make the ledger whole out of the topic, in an empty or restored database, then exit
//
// This file: configuration, start and stop, the table of routes, and the handlers that read. It holds no rule
// about money, no event and no answer (internal/book), no movement (wallet.go), no row (outbox.go), no relay
// (cdc.go), no query (cache.go). What stands around every route is in internal/api, who may ask in
// internal/gate.
package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"wallet/internal/api"
	"wallet/internal/book"
	"wallet/internal/cmdline"
	"wallet/internal/env"
	"wallet/internal/export"
	"wallet/internal/gate"
	"wallet/internal/jsontext"
	"wallet/internal/kafka"
	"wallet/internal/logs"
	"wallet/internal/look"
	"wallet/internal/metric"
	"wallet/internal/migrate"
	"wallet/internal/moved"
	"wallet/internal/parts"
	"wallet/internal/pg"
	"wallet/internal/rebuild"
	"wallet/internal/wal"
)

func main() {
	program := cmdline.Program{Name: "wallet", Serves: "serve", Jobs: jobs,
		Settings: new(config).settings(),
		Try:      "To start everything on this machine, in a checkout: " + startEverything}
	asked, status, done := program.Parse(os.Args[1:], os.Stdout, os.Stderr)
	if done {
		os.Exit(status)
	}
	switch asked.Job {
	case "version":
		fmt.Println(buildVersion())
		return
	case "new-key":
		key, line, err := gate.MakeKey(asked.Argument)
		if err != nil {
			fmt.Fprintf(os.Stderr, "wallet: %v; say it as in -new-key checkout:read+write\n", err)
			os.Exit(2)
		}
		fmt.Printf("for the client:  Authorization: Bearer %s\nfor API_KEYS:    %s\n", key, line)
		return
	}
	since, err := auditSpan(asked.Options)
	if err != nil {
		fmt.Fprintln(os.Stderr, "wallet:", err)
		os.Exit(2)
	}
	cfg, err := readConfig(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, "wallet:", err)
		os.Exit(2)
	}
	log, flush := logs.New(os.Stderr, cfg.logLevel, cfg.logFormat)
	slog.SetDefault(log)

	ctx := parts.UntilSignal(os.Stderr, os.Exit)
	exit := 0
	switch asked.Job {
	case "migrate":
		err = parts.WaitFor(ctx, "Postgres",
			func(ctx context.Context) error { return migrateSchema(ctx, cfg) })
		if err == nil {
			err = validateSchema(ctx, cfg)
		}
	case "audit":
		var findings int
		if findings, err = runAudit(ctx, &cfg.relayConfig, since, os.Stdout); findings > 0 {
			exit = 1
		}
	case "adopt":
		err = adopt(ctx, &cfg.relayConfig)
	case "rebuild":
		parts.LimitMemory(rebuildMemory)
		err = rebuildLedger(ctx, cfg, asked.Options["rebuild-skip"], os.Stdout)
	default:
		parts.TuneCollector()
		var s *service
		if s, err = newService(cfg); err != nil {
			break
		}
		var listener net.Listener
		if listener, err = net.Listen("tcp", cfg.listenAddr); err != nil {
			err = fmt.Errorf("set LISTEN_ADDR to an address that can be listened on: %w", err)
			break
		}
		err = s.run(ctx, listener)
	}
	flush()
	if err != nil {
		fmt.Fprintln(os.Stderr, "wallet:", err)
		exit = 2
	}
	os.Exit(exit)
}

var jobs = []cmdline.Job{
	{Name: "migrate", Help: "apply the schema as the owner (MIGRATE_URL), then exit"},
	{Name: "audit", Help: "compare ledger and topic, then exit: 0 clean, 1 findings",
		Options: []cmdline.Job{{Name: "since", Argument: "24h", Help: "only what moved in a last while"}}},
	{Name: "adopt", Help: "let the relay go on in another database (say, a restore), then exit"},
	{Name: "rebuild", Help: "make the ledger whole out of the topic, then exit",
		Options: []cmdline.Job{{Name: "rebuild-skip", Argument: "IDS",
			Help: "wallets to leave as they are, comma-separated"}}},
	{Name: "new-key", Argument: "NAME:SCOPES",
		Help: "make an API key, as in checkout:read+write (also: operate), then exit"},
	{Name: "version", Help: "print the version, then exit"},
}

// auditSpan is how far back -audit is to look; 0 is to the beginning.
func auditSpan(options map[string]string) (since time.Duration, err error) {
	text, said := options["since"]
	if !said {
		return 0, nil
	}
	since, err = time.ParseDuration(text)
	if err != nil || since <= 0 || since > auditSpanMax {
		return 0, fmt.Errorf("-since %s: write a while such as 24h or 90m, of at most 48h", text)
	}
	return since, nil
}

const startEverything = "go run -C dev ."

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && stamp == "" {
		return info.Main.Version
	}
	return cmp.Or(stamp, "unknown")
}

var stamp string // the image's version, set by the linker (Dockerfile)

// -----------------------------------------------------------------------------------------------------------
// Start and stop
// -----------------------------------------------------------------------------------------------------------

// service is the program without its listener: what there is to run, wired together.
type service struct {
	cfg           *config
	reads, writes *pgxpool.Pool
	balances      *cache // nil without Redis
	ledger        *ledger
	relay         *relay // nil without Kafka
	api           *server
	certificate   *gate.Certificate // nil without TLS
}

// newService wires a service. It connects to nothing yet.
func newService(cfg *config) (*service, error) {
	s := &service{cfg: cfg}
	var err error
	if cfg.redisURL != "" {
		if s.balances, err = newCache(cfg.cacheConfig); err != nil {
			return nil, err
		}
	} else {
		slog.Warn("no REDIS_URL: balances are read from Postgres, nothing is cached")
	}
	if s.reads, err = openPool(cfg, cfg.readConns, "wallet read", s.balances); err != nil {
		return nil, err
	}
	if s.writes, err = openPool(cfg, cfg.writers, "wallet write", s.balances); err != nil {
		return nil, err
	}
	s.ledger = newLedger(cfg.ledgerConfig, s.reads, s.writes, s.balances)
	if len(cfg.kafkaBrokers) > 0 {
		s.relay = newRelay(&cfg.relayConfig, s.reads, s.balances)
	} else {
		slog.Warn("NO KAFKA_BROKERS: THIS SERVICE RUNS WITHOUT A RELAY, NO EVENT LEAVES THE DATABASE")
	}
	keys, err := gate.NewKeyring(cfg.apiKeys, cfg.apiKeysFile)
	if err != nil {
		return nil, keysAdvice(err)
	}
	if err := checkListen(cfg, keys); err != nil {
		return nil, err
	}
	if cfg.tlsCert != "" || cfg.tlsKey != "" {
		if s.certificate, err = gate.LoadCertificate(cfg.tlsCert, cfg.tlsKey); err != nil {
			return nil, certificateAdvice(err)
		}
	}
	s.api = newServer(cfg, s.ledger, s.relay, keys)
	return s, nil
}

// run serves until ctx ends or a part fails. It listens at once (alive, not ready), waits for the servers it
// needs, and stops in the order that loses nothing: not ready, HTTP drained, writers drained, the relay's
// last confirmation; operators can look on to the end.
func (s *service) run(ctx context.Context, listener net.Listener) error {
	defer s.reads.Close()
	defer s.writes.Close()

	// Every part runs in one of these groups, which stop one after the other. The first part that fails stops
	// them all.
	failed := make(chan error, 1)
	web, keeping, writing := parts.NewGroup(failed), parts.NewGroup(failed), parts.NewGroup(failed)
	relaying, operating := parts.NewGroup(failed), parts.NewGroup(failed)
	limited := gate.Connections(listener, s.cfg.connectionsMax)
	public := gate.Server(s.api.public, 10*time.Second+s.cfg.requestTimeout)
	web.Run(func(context.Context) error { return gate.Serve(public, limited, s.certificate) })
	slog.Info("listening", "address", listener.Addr().String(), "tls", s.certificate != nil,
		"version", buildVersion())
	if s.cfg.operateAddr != "" {
		operators, err := net.Listen("tcp", s.cfg.operateAddr)
		if err != nil {
			return fmt.Errorf("set OPERATE_ADDR to an address that can be listened on: %w", err)
		}
		server := gate.Server(s.api.operator, 5*time.Minute)
		few := gate.Connections(operators, 100)
		operating.Run(func(context.Context) error { return gate.Serve(server, few, s.certificate) })
		operating.Run(func(ctx context.Context) error { <-ctx.Done(); return server.Close() })
		slog.Info("listening for operators", "address", operators.Addr().String())
	}
	keeping.Run(func(ctx context.Context) error {
		if err := parts.WaitFor(ctx, "Postgres", s.prepare); err != nil {
			return err
		}
		if s.relay != nil {
			began := time.Now()
			may := func(ctx context.Context) error { return s.relay.mayBegin(ctx, began) }
			if err := parts.WaitFor(ctx, "the ledger", may); err != nil {
				return err
			}
		}
		writing.Run(s.ledger.run)
		keeping.Run(s.ledger.sweep)
		if s.balances != nil {
			writing.Run(s.balances.run)
		}
		if s.relay != nil {
			relaying.Run(s.relay.run)
		}
		if s.cfg.apiKeysFile != "" {
			keeping.Run(func(ctx context.Context) error {
				load := func() error { return keysAdvice(s.api.Keys.Load()) }
				return gate.Watch(ctx, 5*time.Second, load, s.cfg.apiKeysFile)
			})
		}
		if s.certificate != nil {
			keeping.Run(func(ctx context.Context) error {
				load := func() error { return certificateAdvice(s.certificate.Load()) }
				return gate.Watch(ctx, 5*time.Second, load, s.cfg.tlsCert, s.cfg.tlsKey)
			})
		}
		keeping.Run(func(ctx context.Context) error {
			if err := validateSchema(ctx, s.cfg); err != nil && ctx.Err() == nil {
				slog.Warn("old rows not checked against new constraints; the next start tries again",
					"error", err)
			}
			return nil
		})
		s.api.Started.Store(true)
		slog.Info("ready")
		return s.keep(ctx)
	})

	var err error
	select {
	case <-ctx.Done():
		slog.Info("stopping; a second Ctrl-C ends at once")
	case err = <-failed:
		slog.Error("stopping, since a part failed", "error", err)
	}
	s.api.Draining.Store(true)
	if err == nil {
		time.Sleep(s.cfg.drainDelay)
	}
	deadline, cancel := context.WithTimeout(context.Background(), s.cfg.shutdownTimeout)
	defer cancel()
	if shutdownErr := public.Shutdown(deadline); shutdownErr != nil {
		slog.Warn("requests were still open at the deadline", "error", shutdownErr)
	}
	for _, g := range []*parts.Group{web, keeping, writing, relaying, operating} {
		if !g.Stop(deadline) {
			return fmt.Errorf("not everything stopped within SHUTDOWN_TIMEOUT (%v)", s.cfg.shutdownTimeout)
		}
	}
	slog.Info("stopped")
	return err
}

//go:embed schema.sql
var schemaSQL string

// schema is what the database must have. It is at version 4: that of schema.sql's last step.
var schema = migrate.Schema{
	File: schemaSQL, Version: 4, ServerMin: 150000, Table: "wallet_schema",
	Tables: []string{"wallet", "entry", "currency", "outbox"},
}

// migrateSchema brings the schema up to date, unless it is so or newer, and names the two other roles in it.
func migrateSchema(ctx context.Context, cfg *config) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	service, err := pgx.ParseConfig(cfg.databaseURL)
	if err != nil {
		return parts.Final(fmt.Errorf("DATABASE_URL: %w", err))
	}
	relay, err := pgx.ParseConfig(cfg.replicationURL)
	if err != nil {
		return parts.Final(fmt.Errorf("REPLICATION_URL: %w", err))
	}
	conn, err := pgx.Connect(ctx, cfg.migrateURL)
	if err != nil {
		return fmt.Errorf("connect with MIGRATE_URL: %w", err)
	}
	defer conn.Close(context.Background())
	has, err := schema.Apply(ctx, conn, map[string]string{
		"wallet.service_role": service.User, "wallet.relay_role": relay.User})
	switch {
	case pg.State(err) == "42501": // insufficient_privilege
		return fmt.Errorf("the schema is at version %d and this program needs %d: "+
			"run `wallet -migrate` with MIGRATE_URL of the tables' owner: %w", has, schema.Version, err)
	case pg.State(err) != "":
		return fmt.Errorf("apply the schema: %w", err)
	case errors.As(err, new(migrate.Unfit)):
		return parts.Final(err)
	}
	return err
}

// validateSchema checks old rows against the constraints that a migration left NOT VALID.
func validateSchema(ctx context.Context, cfg *config) error {
	conn, err := pgx.Connect(ctx, cfg.migrateURL)
	if err != nil {
		return fmt.Errorf("connect with MIGRATE_URL: %w", err)
	}
	defer conn.Close(context.Background())
	return schema.Validate(ctx, conn)
}

// rebuildMemory is above what a rebuild has live at a time, and leaves room below 200 MB for what the
// collector does not see.
const rebuildMemory = 120 << 20

// rebuildLedger is `wallet -rebuild`: it adds to the ledger what the topic holds beyond it, and then makes
// this database the topic's.
func rebuildLedger(ctx context.Context, cfg *config, skipped string, out io.Writer) error {
	skip, err := rebuild.ParseSkip(skipped)
	if err != nil {
		return err
	}
	if len(cfg.kafkaBrokers) == 0 {
		return errors.New("set KAFKA_BROKERS to host:port of a broker: the ledger is rebuilt out of the " +
			"topic")
	}
	pool, err := rebuild.Pool(cfg.databaseURL)
	if err != nil {
		return err
	}
	defer pool.Close()
	if has, err := schema.Has(ctx, pool); err != nil {
		return err
	} else if has != schema.Version {
		return fmt.Errorf("the schema is at version %d and this program needs %d: run `wallet -migrate` "+
			"first",
			has, schema.Version)
	}
	r := newRelay(&cfg.relayConfig, pool, nil)
	r.adopting, r.rebuilt = true, true
	if _, err := r.awaitSlot(ctx); err != nil {
		return err
	}
	guard, err := rebuild.KeepOut(ctx, cfg.migrateURL)
	if err != nil {
		return err
	}
	defer guard.Release()
	brokers := kafkaConfig(&cfg.relayConfig, nil)
	brokers.FetchBytes = 128 << 10 // a MB or two unpacked, for each of several readers
	k, err := kafka.Open(brokers)
	if err != nil {
		return fmt.Errorf("kafka: %w", err)
	}
	defer k.Close()
	topic, last, err := r.takeTopic(ctx, k)
	if err != nil {
		return err
	}
	ledger, err := rebuild.NewPostgres(ctx, pool, guard.Check)
	if err != nil {
		return err
	}
	totals, err := rebuild.Run(ctx, topic, ledger,
		rebuild.Options{Skip: skip, Published: last.Events, Out: out, Progress: os.Stderr})
	if err != nil {
		return err
	}
	if err := topic.Unchanged(k); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d wallets and %d events in the topic, %d entries added\n", totals.Wallets,
		totals.Events,
		totals.Written)
	if totals.NotSeen > 0 {
		fmt.Fprintf(out, "%d wallets of this ledger have no event in what is left of the topic\n",
			totals.NotSeen)
	}
	if len(skip) > 0 {
		fmt.Fprintf(out, "%d events of %d wallets were left out: give the ledger new topics (KAFKA_TOPIC, "+
			"KAFKA_CHECKPOINT_TOPIC) before the service starts, since their numbers will be used again\n",
			totals.Skipped, len(skip))
	} else if err := r.lead(ctx); err != nil { // to the point where slot and checkpoint are this database's
		return err
	}
	fmt.Fprintln(out, "not in the topic, so here only if a backup had them: wallets never used, keys that "+
		"created wallets\nlost: what was not yet published when the data were lost")
	return nil
}

// takeTopic fences the topic's relay, whichever database it is of, and reads how far the topic goes.
func (r *relay) takeTopic(ctx context.Context, k *kafka.Client) (topic rebuild.Topic, last checkpoint,
	err error,
) {
	found, err := lastCheckpoint(k, r.cfg.kafkaCheckpointTopic)
	if err == nil {
		err = r.fits(ctx, found, wal.Identity{}, k)
	}
	if err == nil && found != nil {
		last = *found
		_, err = k.NewProducer(transactionalID(last.System, last.Slot))
	}
	if err == nil {
		topic, err = rebuild.ReadTopic(ctx, k, r.cfg.kafkaTopic, eventIDOf)
	}
	if err == nil && topic.Empty() {
		err = fmt.Errorf("topic %s holds no event: set KAFKA_TOPIC and KAFKA_CHECKPOINT_TOPIC to the "+
			"topics that this ledger published to", topic.Name)
	}
	return topic, last, err
}

// emptyPatience is how long an empty ledger waits for Kafka's word on its topic.
const emptyPatience = 5 * time.Second

// mayBegin refuses an empty ledger whose topic holds events: they are all that is left of it, and what is
// posted before a rebuild would get their numbers. Any other ledger may serve without Kafka, and so may this
// one when Kafka has not answered for emptyPatience since: then its relay will refuse instead.
func (r *relay) mayBegin(ctx context.Context, since time.Time) error {
	var empty bool
	err := r.db.QueryRow(ctx, `SELECT NOT EXISTS (SELECT FROM wallet)`).Scan(&empty)
	if err != nil || !empty {
		return err
	}
	open := func() (*kafka.Client, error) { return kafka.Open(kafkaConfig(r.cfg, nil)) }
	k, err := kafka.Within(ctx, emptyPatience, open, (*kafka.Client).Close)
	if err == nil {
		err = r.checkTail(ctx, k)
		go k.Close()
	}
	var refusal relayRefusal
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refusal):
		r.refusal.Store(string(refusal))
		r.enter("refused")
		return err
	case time.Since(since) > emptyPatience:
		slog.WarnContext(ctx, "this ledger is empty, and is served though Kafka does not say whether its "+
			"topic is: if a ledger was lost, stop the service and run wallet -rebuild", "error", err)
		return nil
	}
	return fmt.Errorf("it is empty, and whether its topic is cannot be seen yet: %w", err)
}

// prepare makes the database ready for writes.
func (s *service) prepare(ctx context.Context) error {
	if err := migrateSchema(ctx, s.cfg); err != nil {
		return err
	}
	if err := makeOutboxPartitions(ctx, s.reads); err != nil {
		return err
	}
	return s.ledger.loadCurrencies(ctx)
}

// keep does, at once and every minute, what a long life needs: outbox partitions ahead, old ones dropped
// where no relay does it, new currencies, a count of what is held.
func (s *service) keep(ctx context.Context) error {
	for tick := time.NewTicker(time.Minute); ; {
		work := []error{makeOutboxPartitions(ctx, s.reads), s.ledger.loadCurrencies(ctx),
			s.ledger.countHolds(ctx)}
		if s.relay == nil {
			work = append(work, dropOutboxPartitions(ctx, s.reads, s.cfg.outboxRetention, nil, 0),
				moved.Forget(ctx, s.reads, math.MaxInt64, movedKept))
		}
		for _, err := range work {
			if err != nil && ctx.Err() == nil {
				slog.Error("upkeep failed, next try in a minute", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// openPool makes a pool of connections as the service's role.
func openPool(cfg *config, connections int, name string, balances *cache) (*pgxpool.Pool, error) {
	var entered func(ledger, life string)
	if balances != nil {
		entered = balances.enter
	}
	pool, err := pg.Pool(cfg.databaseURL, name, connections, entered)
	if err != nil {
		return nil, fmt.Errorf("set DATABASE_URL to a Postgres URL such as "+
			"postgres://user:password@host:5432/wallet: %w", err)
	}
	return pool, nil
}

// -----------------------------------------------------------------------------------------------------------
// Routes
// -----------------------------------------------------------------------------------------------------------

// server is the HTTP side: public is the whole handler of the clients' address, operator that of the
// operators'.
type server struct {
	*api.Server
	ledger   *ledger
	relay    *relay // nil without Kafka
	public   *http.ServeMux
	operator *http.ServeMux
	document []byte // OpenAPI
	page     *look.Page
}

func newServer(cfg *config, l *ledger, r *relay, keys *gate.Keyring) *server {
	s := &server{ledger: l, relay: r, Server: api.New(api.Config{
		Problems:    problems,
		Overloaded:  errOverloaded,
		Starting:    book.Refuse("starting", "The service is waiting for its database."),
		Unavailable: book.Refuse("unavailable", "The ledger could not be read in time. Try again."),
		Unreachable: pg.Unreachable,
		Keys:        keys, Proxies: cfg.trustedProxies,
		Timeout: cfg.requestTimeout, RequestsMax: int64(cfg.requestsMax),
	})}
	if cfg.rateLimit > 0 {
		s.Limits = gate.NewLimiter(float64(cfg.rateLimit), float64(cfg.rateBurst))
	}
	source := look.Source{Server: s.Server, Metrics: s.writeMetrics,
		Plain: []string{"kind"}, Private: []string{"currency", "amount"}}
	if r != nil {
		source.Events, source.Refusal = &r.recent, &r.refusal
	}
	s.page = look.New(source)
	s.document = s.OpenAPI(s.routes(), apiContract)
	s.public = s.Mux(s.routes())
	s.operator = s.Mux(s.operatorRoutes())
	s.Profiles(s.operator, gate.Operate)
	return s
}

func (s *server) routes() []api.Route {
	routes := []api.Route{
		{Method: "POST", Path: "/v1/wallets", Scope: gate.Write, Handle: s.ledger.createWallet, Status: 201,
			Doc: api.Doc{Summary: "Create a wallet", Body: creationBody, Answer: "Wallet",
				Refusals: "wallet_id_malformed currency_malformed currency_unknown idempotency_key_missing " +
					"idempotency_key_reused wallet_exists"}},
		{Method: "GET", Path: "/v1/wallets", Scope: gate.Read, Handle: s.getWallets,
			Doc: api.Doc{Summary: "Read the wallets by id, a page at a time", Query: listQuery,
				Answer: "Wallets"}},
		{Method: "GET", Path: "/v1/wallets/{id}", Scope: gate.Read, Handle: s.getWallet,
			Doc: api.Doc{Summary: "Read a wallet", ID: "WalletID", Answer: "Wallet",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "GET", Path: "/v1/wallets/{id}/balance", Scope: gate.Read, Handle: s.getBalance,
			Doc: api.Doc{Summary: "Read a balance: cached unless Cache-Control says no-cache; or as it was",
				ID: "WalletID", Query: balanceQuery, Answer: "Balance",
				Refusals: "wallet_id_malformed wallet_not_found seq_not_reached"}},
		{Method: "GET", Path: "/v1/wallets/{id}/history", Scope: gate.Read, Handle: s.getHistory,
			Doc: api.Doc{Summary: "Read a wallet's entries, a page at a time",
				ID: "WalletID", Query: historyQuery, Answer: "History",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "GET", Path: "/v1/wallets/{id}/statement", Scope: gate.Read, Handle: s.getStatement,
			Doc: api.Doc{Summary: "Read a statement: entries, what was before and after, sums by kind",
				ID: "WalletID", Query: statementQuery, Answer: "Statement",
				Forms:    map[string]string{export.Lines: "StatementLines", export.CSV: "StatementTable"},
				Refusals: "wallet_id_malformed wallet_not_found not_acceptable"}},
		{Method: "GET", Path: "/v1/wallets/{id}/holds", Scope: gate.Read, Handle: s.getHolds,
			Doc: api.Doc{Summary: "Read a wallet's holds, a page at a time",
				ID: "WalletID", Query: holdsQuery, Answer: "HoldsPage",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "GET", Path: "/v1/wallets/{id}/transactions", Scope: gate.Read, Handle: s.getByKey,
			Doc: api.Doc{Summary: "Find the transaction that an idempotency key stands for: none or one",
				ID: "WalletID", Query: byKeyQuery, Required: byKeyQuery, Answer: "Transactions",
				Refusals: "wallet_id_malformed"}},
		{Method: "GET", Path: "/v1/holds/{hold_id}", Scope: gate.Read, Handle: s.getHold,
			Doc: api.Doc{Summary: "Read a hold", ID: "HoldID", Answer: "Hold",
				Refusals: "hold_id_malformed hold_not_found"}},
		{Method: "GET", Path: "/v1/transactions", Scope: gate.Read, Handle: s.getByReference,
			Doc: api.Doc{Summary: "Find transactions by their reference, a page at a time",
				Query: byReferenceQuery, Required: []string{"reference"}, Answer: "Transactions"}},
		{Method: "GET", Path: "/v1/transactions/{id}", Scope: gate.Read, Handle: s.getTransaction,
			Doc: api.Doc{Summary: "Read a movement of money by its id",
				ID: "TransactionID", Answer: "Transaction",
				Refusals: "transaction_id_malformed transaction_not_found"}},
		{Method: "GET", Path: "/openapi.json", Scope: gate.Open, Handle: api.Static(s.document),
			Doc: api.Doc{Summary: "This document", Answer: "Document"}},
		{Method: "GET", Path: "/healthz", Scope: gate.Open, Handle: alive,
			Doc: api.Doc{Summary: "Is the process alive?", Answer: "Health"}},
		{Method: "GET", Path: "/readyz", Scope: gate.Open, Handle: s.readyz,
			Doc: api.Doc{Summary: "Can it serve?", Answer: "Health", Refusals: "starting unavailable"}},
	}
	many := api.Route{Method: "POST", Path: "/v1/batches", Scope: gate.Write, Handle: s.ledger.moveMany,
		Doc: api.Doc{Summary: "Post up to 1,000 operations: all or none, or each by itself", Body: manyBody,
			Required: []string{"operations"}, Answer: "BatchResults", Refusals: manyRefusals()}}
	routes = append(routes, many)
	for i := range movements {
		m := &movements[i]
		routes = append(routes, api.Route{Method: "POST", Path: m.path, Scope: m.scope, Status: m.status,
			Handle: func(r *http.Request) (*api.Reply, error) { return s.ledger.move(m, r) }, Doc: m.doc()})
	}
	return routes
}

// operatorRoutes are those of OPERATE_ADDR; the profiles (/debug/pprof/) come on top.
func (s *server) operatorRoutes() []api.Route {
	return []api.Route{
		{Method: "GET", Path: "/{$}", Scope: gate.Open, Handle: s.page.HTML},
		{Method: "GET", Path: "/status.json", Scope: gate.Operate, Handle: s.page.Status},
		{Method: "GET", Path: "/metrics", Scope: gate.Operate, Handle: api.Metrics(s.writeMetrics)},
		{Method: "GET", Path: "/healthz", Scope: gate.Open, Handle: alive},
		{Method: "GET", Path: "/readyz", Scope: gate.Open, Handle: s.readyz},
	}
}

// The parameters of each query: anything else is refused.
var (
	balanceQuery     = []string{"min_seq", "at", "seq"}
	historyQuery     = []string{"limit", "since", "until", "order", "cursor"}
	statementQuery   = []string{"since", "until"}
	listQuery        = []string{"limit", "cursor"}
	holdsQuery       = []string{"status", "limit", "cursor"}
	byKeyQuery       = []string{"idempotency_key"}
	byReferenceQuery = []string{"reference", "limit", "cursor"}
)

// problems is every refusal besides the API's own (internal/api): its stable code, its status and its title.
var problems = map[string]api.Problem{
	"operation_unknown":        {Status: 400, Title: "Not an operation of a batch"},
	"field_missing":            {Status: 400, Title: "The body lacks a field"},
	"wallet_id_malformed":      {Status: 400, Title: "Not a wallet id"},
	"transaction_id_malformed": {Status: 400, Title: "Not a transaction id"},
	"amount_malformed":         {Status: 400, Title: "Not an amount"},
	"amount_exponent":          {Status: 400, Title: "An amount with an exponent"},
	"amount_not_positive":      {Status: 400, Title: "An amount that is not positive"},
	"amount_too_large":         {Status: 400, Title: "An amount with too many digits"},
	"hold_id_malformed":        {Status: 400, Title: "Not a hold id"},
	"expires_in_malformed":     {Status: 400, Title: "Not a duration, or too short or long a one"},
	"reference_malformed":      {Status: 400, Title: "Not a reference"},
	"metadata_malformed":       {Status: 400, Title: "Not metadata, or too many"},
	"state_malformed":          {Status: 400, Title: "Not a wallet's state"},
	"note_malformed":           {Status: 400, Title: "Not a note"},
	"currency_malformed":       {Status: 400, Title: "Not a currency code"},
	"same_wallet":              {Status: 400, Title: "A transfer to the same wallet"},
	"idempotency_key_missing":  {Status: 400, Title: "No idempotency key"},
	"wallet_not_found":         {Status: 404, Title: "No such wallet"},
	"transaction_not_found":    {Status: 404, Title: "No such transaction"},
	"hold_not_found":           {Status: 404, Title: "No such hold"},
	"not_acceptable":           {Status: 406, Title: "A form that this does not come in"},
	"wallet_exists":            {Status: 409, Title: "The wallet exists already"},
	"wallet_frozen":            {Status: 409, Title: "The wallet's state does not allow this"},
	"wallet_closed":            {Status: 409, Title: "The wallet is closed"},
	"wallet_not_empty":         {Status: 409, Title: "The wallet is not empty"},
	"hold_closed":              {Status: 409, Title: "The hold has ended"},
	"hold_expired":             {Status: 409, Title: "The hold has expired"},
	"seq_not_reached":          {Status: 409, Title: "The wallet has no such entry yet"},
	"amount_scale":             {Status: 422, Title: "More decimals than the currency has"},
	"currency_unknown":         {Status: 422, Title: "Unknown currency"},
	"currency_mismatch":        {Status: 422, Title: "Another currency than the wallet's"},
	"insufficient_funds":       {Status: 422, Title: "Insufficient funds"},
	"balance_limit":            {Status: 422, Title: "The balance would become too large"},
	"hold_exceeded":            {Status: 422, Title: "More than remains of the hold"},
	"payee_mismatch":           {Status: 422, Title: "Another payee than the hold's"},
	"not_reversible":           {Status: 422, Title: "Not a transaction that can be reversed"},
	"reversal_exceeds":         {Status: 422, Title: "More than is left to reverse"},
	"idempotency_key_reused":   {Status: 422, Title: "The key was used for another operation"},
}

func (s *server) getWallet(r *http.Request) (*api.Reply, error) {
	id, err := book.ParseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	w, err := s.ledger.wallet(r.Context(), id)
	if err != nil {
		return nil, err
	}
	return &api.Reply{Body: book.AppendWallet(nil, w)}, nil
}

func (s *server) getBalance(r *http.Request) (*api.Reply, error) {
	id, err := book.ParseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, balanceQuery...)
	if err != nil {
		return nil, err
	}
	if query["at"] != "" || query["seq"] != "" {
		return s.balanceAsItWas(r.Context(), id, query)
	}
	minSeq, err := query.Integer("min_seq", 0, 0, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	fresh := strings.Contains(strings.ToLower(r.Header.Get("Cache-Control")), "no-cache")
	b, err := s.ledger.balance(r.Context(), id, minSeq, fresh)
	if err != nil {
		return nil, err
	}
	o := jsontext.Open(nil)
	o.Integer("wallet_id", b.walletID)
	o.Text("currency", b.currency)
	o.Text("balance", b.balance)
	if b.held != "0" {
		available, err := b.available()
		if err != nil {
			return nil, err
		}
		o.Text("held", b.held)
		o.Text("available", available)
	}
	o.Integer("seq", b.seq)
	return &api.Reply{Body: append(o.Dst, '}')}, nil
}

// balanceAsItWas is that at a time, what happened at that very time included, or after an entry.
func (s *server) balanceAsItWas(ctx context.Context, id int64, query api.Query) (*api.Reply, error) {
	if len(query) > 1 {
		return nil, book.Refuse("parameter_malformed", "Send one of at, seq and min_seq.")
	}
	at, err := query.Time("at", time.Time{})
	if err != nil {
		return nil, err
	}
	seq, err := query.Integer("seq", -1, 0, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	var m *moment
	if seq >= 0 {
		m, err = s.ledger.momentAfter(ctx, id, seq)
	} else {
		m, err = s.ledger.momentBefore(ctx, id, at.Truncate(time.Microsecond).Add(time.Microsecond),
			endOfTime)
	}
	if err != nil {
		return nil, err
	}
	o := appendMoment(id, m)
	if seq < 0 {
		o.Time("at", at)
	}
	o.Flag("final", m.final)
	return &api.Reply{Body: o.Close()}, nil
}

// getStatement answers with a wallet's entries of a span, what was there before and after, and sums by kind.
// It is as long as it is: entries go out a page at a time.
func (s *server) getStatement(r *http.Request) (*api.Reply, error) {
	id, err := book.ParseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, statementQuery...)
	if err != nil {
		return nil, err
	}
	since, err := query.Time("since", time.Time{})
	if err != nil {
		return nil, err
	}
	until, err := query.Time("until", endOfTime)
	if err != nil {
		return nil, err
	}
	format, ok := export.Negotiate(strings.Join(r.Header.Values("Accept"), ","))
	if !ok {
		return nil, book.Refuse("not_acceptable", "A statement comes as %s, %s or %s.",
			export.JSON, export.Lines, export.CSV)
	}
	end, err := s.ledger.momentBefore(r.Context(), id, until, since)
	if err != nil {
		return nil, err
	}
	st, err := s.ledger.statement(r.Context(), id, query, since, until, end)
	if err != nil {
		return nil, err
	}
	header := map[string]string{"Content-Type": format, "Trailer": "Statement-Sha256"}
	if format == export.CSV {
		header["Content-Disposition"] = fmt.Sprintf(`attachment; filename="wallet-%d.csv"`, id)
	}
	return &api.Reply{Header: header, Stream: func(ctx context.Context, w io.Writer) error {
		return st.write(ctx, w, format)
	}}, nil
}

func (s *server) getHistory(r *http.Request) (*api.Reply, error) {
	id, err := book.ParseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, historyQuery...)
	if err != nil {
		return nil, err
	}
	p, err := pageOf(query)
	if err != nil {
		return nil, err
	}
	limit := p.limit
	p.limit++ // one more tells whether there is a next page
	entries, err := s.ledger.history(r.Context(), id, &p)
	if err != nil {
		return nil, err
	}
	answer := &api.Reply{}
	if len(entries) > limit {
		entries = entries[:limit]
		if last := entries[limit-1].Seq; p.descending {
			p.to = last
		} else {
			p.from = last + 1
		}
		answer.Header = api.Next(fmt.Sprintf("/v1/wallets/%d/history?", id), limit, p.cursor())
	}
	answer.Body = api.AppendList(nil, entries, book.AppendEvent)
	return answer, nil
}

func (s *server) getTransaction(r *http.Request) (*api.Reply, error) {
	walletID, seq, err := book.ParseEntryID(r.PathValue("id"), book.ErrTransactionID)
	if err != nil {
		return nil, err
	}
	m, err := s.ledger.transaction(r.Context(), walletID, seq)
	if err != nil {
		return nil, err
	}
	return &api.Reply{Body: book.AppendTransaction(nil, m)}, nil
}

// getByKey answers "did my write land?".
func (s *server) getByKey(r *http.Request) (*api.Reply, error) {
	id, err := book.ParseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, byKeyQuery...)
	if err != nil {
		return nil, err
	}
	key, err := book.ParseKey(query["idempotency_key"])
	if err != nil {
		return nil, book.Refuse("parameter_malformed",
			"Send the idempotency_key: 1 to %d printable ASCII characters.",
			book.KeyLenMax)
	}
	found, err := s.ledger.transactions(r.Context(), transactionByKey, id, key)
	if err != nil {
		return nil, err
	}
	return api.List("", found, len(found), book.AppendTransaction, nil), nil
}

func (s *server) getByReference(r *http.Request) (*api.Reply, error) {
	query, err := api.ReadQuery(r, byReferenceQuery...)
	if err != nil {
		return nil, err
	}
	reference := query["reference"]
	if reference == "" || len(reference) > noteBytesMax || !api.Printable(reference) {
		return nil, book.Refuse("parameter_malformed",
			"Send the reference: 1 to %d bytes of printable UTF-8.", noteBytesMax)
	}
	limit, after, err := query.Page("r")
	if err != nil {
		return nil, err
	}
	found, err := s.ledger.transactions(r.Context(), transactionsByReference, reference, after[0], after[1],
		limit+1)
	if err != nil {
		return nil, err
	}
	path := "/v1/transactions?reference=" + url.QueryEscape(reference) + "&"
	return api.List(path, found, limit, book.AppendTransaction, func(m *book.Posted) string {
		return api.Cursor("r", m.WalletID, m.Seq)
	}), nil
}

func (s *server) getWallets(r *http.Request) (*api.Reply, error) {
	query, err := api.ReadQuery(r, listQuery...)
	if err != nil {
		return nil, err
	}
	limit, after, err := query.Page("w")
	if err != nil {
		return nil, err
	}
	found, err := s.ledger.walletsAfter(r.Context(), after[0], limit+1)
	if err != nil {
		return nil, err
	}
	return api.List("/v1/wallets?", found, limit, book.AppendWallet, func(w *book.Wallet) string {
		return api.Cursor("w", w.ID, 1)
	}), nil
}

func (s *server) getHold(r *http.Request) (*api.Reply, error) {
	walletID, seq, err := book.ParseEntryID(r.PathValue("hold_id"), book.ErrHoldID)
	if err != nil {
		return nil, err
	}
	h, err := s.ledger.hold(r.Context(), walletID, seq)
	if err != nil {
		return nil, err
	}
	return &api.Reply{Body: book.AppendHold(nil, h)}, nil
}

func (s *server) getHolds(r *http.Request) (*api.Reply, error) {
	id, err := book.ParseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, holdsQuery...)
	if err != nil {
		return nil, err
	}
	status := query["status"]
	if status != "" && !slices.Contains(book.HoldStatuses, status) {
		return nil, book.Refuse("parameter_malformed", "status is one of %s.",
			strings.Join(book.HoldStatuses, ", "))
	}
	limit, after, err := query.Page("h")
	if err != nil {
		return nil, err
	}
	w, found, err := s.ledger.holds(r.Context(), id, status, after[0], limit+1)
	if err != nil {
		return nil, err
	}
	answer := &api.Reply{}
	if len(found) > limit {
		found = found[:limit]
		path := fmt.Sprintf("/v1/wallets/%d/holds?", id)
		if status != "" {
			path += "status=" + status + "&"
		}
		answer.Header = api.Next(path, limit, api.Cursor("h", found[limit-1].Seq, 1))
	}
	answer.Body = appendHolds(w, found)
	return answer, nil
}

// alive asks nobody, since restarting us would not mend another server.
var alive = api.Static([]byte(`{"status":"alive"}`))

// readyz: Postgres is reachable and its schema at least ours, and we are not on our way out.
func (s *server) readyz(r *http.Request) (*api.Reply, error) {
	if s.Draining.Load() || !s.Started.Load() {
		return nil, book.Refuse("starting", "The service is starting or stopping.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	version, err := schema.Has(ctx, s.ledger.db)
	if err != nil || version < schema.Version {
		slog.WarnContext(ctx, "not ready", "schema", version, "error", err)
		return nil, book.Refuse("unavailable",
			"Postgres cannot be reached, or its schema is older than this program.")
	}
	return &api.Reply{Body: []byte(`{"status":"ready"}`)}, nil
}

func (s *server) writeMetrics(w *metric.Writer) {
	version := metric.Sample{Labels: fmt.Sprintf("version=%q", buildVersion()), Value: 1}
	w.Gauges("wallet_build_info", "1; the version is the label.", version)
	w.Runtime("wallet_go")
	w.Process()
	s.WriteMetrics(w, "wallet_http")
	s.ledger.writeMetrics(w)
	w.Gauge("wallet_queue_operations_max", "WRITE_QUEUE_MAX.", float64(s.ledger.queue.Queue))
	if s.ledger.cache != nil {
		s.ledger.cache.writeMetrics(w)
	}
	if s.relay != nil {
		s.relay.writeMetrics(w)
	}
}

// -----------------------------------------------------------------------------------------------------------
// Who may, and how much
// -----------------------------------------------------------------------------------------------------------

// keysAdvice says which setting mends what gate says of its keys.
func keysAdvice(err error) error {
	var malformed gate.MalformedKey
	switch {
	case err == nil:
		return nil
	case errors.Is(err, gate.ErrNoKeys):
		return errors.New("put a line NAME:SCOPES:HASH into API_KEYS_FILE (wallet -new-key makes one): " +
			"an empty file would open the service to everybody")
	case errors.As(err, &malformed):
		return fmt.Errorf("write each API key as NAME:SCOPES:HASH, "+
			"scopes of read, write and operate joined by +, as `wallet -new-key NAME:SCOPES` prints it "+
			"(key %d is not so)", int(malformed))
	}
	return fmt.Errorf("set API_KEYS_FILE to a file that can be read: %w", err)
}

// certificateAdvice does so for its certificate.
func certificateAdvice(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("set TLS_CERT and TLS_KEY to files (PEM) that belong together: %w", err)
}

// checkListen refuses an address that others can reach while nobody needs a key, unless the operator vouches
// for what stands in front.
func checkListen(cfg *config, k *gate.Keyring) error {
	if !k.Empty() || cfg.authenticatedUpstream {
		return nil
	}
	addresses := map[string]string{"LISTEN_ADDR": cfg.listenAddr, "OPERATE_ADDR": cfg.operateAddr}
	for name, address := range addresses {
		if gate.Exposed(address) {
			return fmt.Errorf("set API_KEYS or API_KEYS_FILE (wallet -new-key makes a key), or %s to a "+
				"loopback address: %s can be reached by others, who could all move money; "+
				"AUTHENTICATED_UPSTREAM=true says that something in front authenticates", name, address)
		}
	}
	return nil
}

// -----------------------------------------------------------------------------------------------------------
// Configuration
// -----------------------------------------------------------------------------------------------------------

// config is everything that can be set, read once from the environment at start. settings gives each field's
// variable, default, unit and meaning, which -h prints.
type config struct {
	cacheConfig
	ledgerConfig
	relayConfig

	migrateURL string
	listenAddr string
	readConns  int

	drainDelay      time.Duration
	shutdownTimeout time.Duration

	apiKeys               string
	apiKeysFile           string
	authenticatedUpstream bool
	rateLimit             int
	rateBurst             int
	trustedProxies        []netip.Prefix
	connectionsMax        int
	requestsMax           int
	operateAddr           string
	tlsCert               string
	tlsKey                string

	logLevel  slog.Level
	logFormat string
}

func (c *config) settings() []env.Setting {
	return []env.Setting{
		{Name: "DATABASE_URL", Group: "Postgres", Main: true, Secret: true,
			Set:  env.URL(&c.databaseURL, "postgres", "postgresql"),
			Help: "Postgres, as the service's role; required. postgres://user:password@host:5432/wallet"},
		{Name: "MIGRATE_URL", Secret: true, Set: env.URL(&c.migrateURL, "postgres", "postgresql"),
			Help: "Postgres, as the tables' owner, who applies the schema at start; default: DATABASE_URL"},
		{Name: "REPLICATION_URL", Secret: true, Set: env.URL(&c.replicationURL, "postgres", "postgresql"),
			Help: "Postgres, as a role with REPLICATION, for the relay; default: DATABASE_URL"},
		{Name: "REPLICATION_SLOT", Default: "wallet_relay",
			Set:  env.Matching(&c.replicationSlot, 63, "abcdefghijklmnopqrstuvwxyz0123456789_"),
			Help: "name of the relay's replication slot (unique in the Postgres cluster)"},
		{Name: "OUTBOX_RETENTION", Default: "10m", Set: env.Duration(&c.outboxRetention, 0, 90*24*time.Hour),
			Help: "how long a published outbox row is kept, in whole partitions of ten minutes"},

		{Name: "REDIS_URL", Group: "Redis", Main: true, Secret: true,
			Set:  env.URL(&c.redisURL, "redis", "rediss"),
			Help: "Redis (6.2 or later) for balances; without it nothing is cached. redis://host:6379/0"},
		{Name: "CACHE_TTL", Default: "10m", Set: env.Duration(&c.cacheTTL, time.Second, 30*24*time.Hour),
			Help: "how long a balance stays cached, and so the bound for one that a fault left behind"},
		{Name: "CACHE_TIMEOUT", Default: "50ms",
			Set:  env.Duration(&c.cacheTimeout, time.Millisecond, 10*time.Second),
			Help: "how long a read waits for Redis before it asks Postgres"},

		{Name: "KAFKA_BROKERS", Group: "Kafka", Main: true, Set: env.HostPorts(&c.kafkaBrokers),
			Help: "host:port, comma-separated, of some brokers; without it no event leaves the database"},
		{Name: "KAFKA_TOPIC", Default: "wallet.events", Set: env.Matching(&c.kafkaTopic, 249, topicChars),
			Help: "topic of the events; made if absent"},
		{Name: "KAFKA_CHECKPOINT_TOPIC", Default: "wallet.checkpoints",
			Set:  env.Matching(&c.kafkaCheckpointTopic, 249, topicChars),
			Help: "topic of the relay's checkpoints; made if absent"},
		{Name: "KAFKA_PARTITIONS", Default: "12", Set: env.Int(&c.kafkaPartitions, 1, 10_000),
			Help: "partitions of a new events topic; final, since another number would break each " +
				"wallet's order"},
		{Name: "KAFKA_REPLICATION", Default: "-1", Set: env.Int(&c.kafkaReplication, -1, 100),
			Help: "replication factor of new topics; -1: the broker's default"},
		{Name: "KAFKA_RETENTION", Default: "-1ns",
			Set:  env.Duration(&c.kafkaRetention, -1, 100*365*24*time.Hour),
			Help: "how long the events topic keeps an event; negative: for ever"},
		{Name: "KAFKA_TLS", Default: "false", Set: env.Bool(&c.kafkaTLS),
			Help: "true: speak TLS to the brokers"},
		{Name: "KAFKA_TLS_CA", Set: env.Text(&c.kafkaTLSCA),
			Help: "file with the brokers' CA certificates (PEM); default: the system's"},
		{Name: "KAFKA_TLS_CERT", Set: env.Text(&c.kafkaTLSCert),
			Help: "file with a client certificate (PEM)"},
		{Name: "KAFKA_TLS_KEY", Set: env.Text(&c.kafkaTLSKey),
			Help: "file with the client certificate's key (PEM)"},
		{Name: "KAFKA_SASL_MECHANISM",
			Set:  env.OneOf(&c.kafkaSASLMechanism, "", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
			Help: "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; empty: no SASL"},
		{Name: "KAFKA_SASL_USER", Set: env.Text(&c.kafkaSASLUser),
			Help: "SASL user name"},
		{Name: "KAFKA_SASL_PASSWORD", Secret: true, Set: env.Text(&c.kafkaSASLPassword),
			Help: "SASL password"},

		{Name: "LISTEN_ADDR", Group: "HTTP", Default: "127.0.0.1:8080", Set: env.Text(&c.listenAddr),
			Help: "address of the HTTP API"},
		{Name: "OPERATE_ADDR", Set: env.Text(&c.operateAddr),
			Help: "address for operators: a page to look at, /status.json, /metrics, /debug/pprof/, " +
				"/healthz, /readyz; empty: none. Such as 127.0.0.1:8081"},
		{Name: "API_KEYS", Secret: true, Set: env.Text(&c.apiKeys),
			Help: "keys that clients must send, NAME:SCOPES:HASH, comma-separated (wallet -new-key " +
				"makes one); without any, loopback only"},
		{Name: "API_KEYS_FILE", Secret: true, Set: env.Text(&c.apiKeysFile),
			Help: "file with further keys, one a line; read again when it changes"},
		{Name: "AUTHENTICATED_UPSTREAM", Default: "false", Set: env.Bool(&c.authenticatedUpstream),
			Help: "true: no key is needed on any address, since something in front authenticates"},
		{Name: "TLS_CERT", Set: env.Text(&c.tlsCert),
			Help: "file with the certificate (PEM); with it both addresses speak TLS 1.2 or later; read " +
				"again when it changes"},
		{Name: "TLS_KEY", Set: env.Text(&c.tlsKey),
			Help: "file with the certificate's key (PEM)"},
		{Name: "RATE_LIMIT", Group: "Limits", Default: "100", Set: env.Int(&c.rateLimit, 0, 1_000_000),
			Help: "requests a second of one client (by key, else by address), in the long run; 0: no limit"},
		{Name: "RATE_BURST", Default: "200", Set: env.Int(&c.rateBurst, 1, 1_000_000),
			Help: "requests that a client may send at once"},
		{Name: "TRUSTED_PROXIES", Set: env.Prefixes(&c.trustedProxies),
			Help: "address ranges, comma-separated, whose X-Forwarded-For is believed. Such as 10.0.0.0/8"},
		{Name: "CONNECTIONS_MAX", Default: "10000", Set: env.Int(&c.connectionsMax, 1, 1_000_000),
			Help: "connections at a time; further ones wait"},
		{Name: "REQUESTS_MAX", Default: "5000", Set: env.Int(&c.requestsMax, 1, 1_000_000),
			Help: "requests at a time; further ones are answered 503"},
		{Name: "DEFAULT_CURRENCY", Group: "Ledger", Default: "USD", Set: env.Text(&c.defaultCurrency),
			Help: "currency of a wallet that is made by a deposit or transfer that names none"},
		{Name: "HOLD_TTL", Default: "168h", Set: env.Duration(&c.holdTTL, time.Second, holdTTLMax),
			Help: "how long a hold stands whose request does not say; at most 8760h (365 days)"},
		{Name: "WRITERS", Default: "2", Set: env.Int(&c.writers, 1, 64),
			Help: "batches at Postgres at the same time, at most"},
		{Name: "WRITE_BATCH_MAX", Default: "1000", Set: env.Int(&c.batchOpsMax, 1, 10_000),
			Help: "operations in one batch, at most"},
		{Name: "WRITE_QUEUE_MAX", Default: "4000", Set: env.Int(&c.queueOpsMax, 1, 1_000_000),
			Help: "operations that wait for a batch, at most; further ones are answered 503"},
		{Name: "READ_CONNECTIONS", Default: "8", Set: env.Int(&c.readConns, 1, 1000),
			Help: "Postgres connections for reads, at most"},
		{Name: "REQUEST_TIMEOUT", Default: "5s",
			Set:  env.Duration(&c.requestTimeout, 100*time.Millisecond, time.Minute),
			Help: "how long a request may take in all"},
		{Name: "DRAIN_DELAY", Group: "Stopping", Default: "0s",
			Set: env.Duration(&c.drainDelay, 0, 5*time.Minute),
			Help: "how long to go on serving, not ready, after SIGTERM, so that load balancers look " +
				"away first"},
		{Name: "SHUTDOWN_TIMEOUT", Default: "15s",
			Set: env.Duration(&c.shutdownTimeout, time.Second, 5*time.Minute),
			Help: "deadline for everything that follows: open requests, batches, the relay's last " +
				"confirmation"},

		{Name: "LOG_LEVEL", Group: "Log", Default: "info", Set: env.Level(&c.logLevel),
			Help: "debug, info, warn or error"},
		{Name: "LOG_FORMAT", Default: "text", Set: env.OneOf(&c.logFormat, "text", "json"),
			Help: "text or json"},
	}
}

const topicChars = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"

// readConfig reads the environment. Its error is one sentence that says what to do.
func readConfig(getenv func(string) string) (*config, error) {
	c := new(config)
	if err := env.Read(c.settings(), getenv); err != nil {
		return nil, err
	}
	if c.databaseURL == "" {
		return nil, errors.New("set DATABASE_URL to a Postgres URL such as " +
			"postgres://user:password@host:5432/wallet\n" +
			"  KAFKA_BROKERS=host:9092 lets events out, REDIS_URL=redis://host:6379/0 is a cache; " +
			"wallet -h lists the rest\n" +
			"  to start everything on this machine instead: `" + startEverything + "` in a checkout")
	}
	if c.migrateURL == "" {
		c.migrateURL = c.databaseURL
	}
	if c.replicationURL == "" {
		c.replicationURL = c.databaseURL
	}
	// Half a protection is none, and would not show.
	switch given := func(value string) bool { return value != "" }; {
	case !c.kafkaTLS && (given(c.kafkaTLSCA) || given(c.kafkaTLSCert) || given(c.kafkaTLSKey)):
		return nil, errors.New("set KAFKA_TLS to true, " +
			"or leave out KAFKA_TLS_CA, KAFKA_TLS_CERT and KAFKA_TLS_KEY")
	case given(c.kafkaTLSCert) != given(c.kafkaTLSKey):
		return nil, errors.New("set KAFKA_TLS_CERT and KAFKA_TLS_KEY both, or neither")
	case given(c.kafkaSASLMechanism) != given(c.kafkaSASLUser),
		given(c.kafkaSASLMechanism) != given(c.kafkaSASLPassword):
		return nil, errors.New("set KAFKA_SASL_MECHANISM, " +
			"KAFKA_SASL_USER and KAFKA_SASL_PASSWORD all three, or none")
	}
	return c, nil
}

// -----------------------------------------------------------------------------------------------------------
// The API's contract
// -----------------------------------------------------------------------------------------------------------

//go:embed docs/schemas.json
var schemasJSON []byte

// apiContract is what the names in the route table stand for.
var apiContract = api.ReadContract(schemasJSON, api.Contract{
	Title: "wallet", Version: buildVersion(),
	Description: "Deposits, withdrawals, transfers, holds and reversals. Amounts are decimal strings; " +
		"errors are RFC 9457 problem documents with a stable code.",
})

// Wallet is a wallet service: deposits, withdrawals and transfers over HTTP, each one Postgres commit and
// exactly one Kafka event per wallet touched.
//
//	wallet            serve; configuration comes from the environment (-h lists it)
//	wallet -migrate   apply the schema as the owner (MIGRATE_URL), then exit
//	wallet -new-key   make an API key for a client: name and scopes, as in checkout:read+write
//	wallet -audit     compare ledger and topic, then exit: 0 clean, 1 findings
//	wallet -adopt     let the relay go on after a restore or an upgrade into another database, then exit
//
// This file: configuration, start and stop, the table of routes and their handlers. It holds no rule about
// money (wallet.go), no event (outbox.go), no relay (cdc.go), no cache (cache.go); what stands around every
// route is in internal/api, who may ask in internal/gate.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/api"
	"wallet/internal/env"
	"wallet/internal/gate"
	"wallet/internal/logs"
	"wallet/internal/metric"
	"wallet/internal/migrate"
	"wallet/internal/money"
)

func main() {
	flags := flag.NewFlagSet("wallet", flag.ContinueOnError)
	migrateOnly := flags.Bool("migrate", false, "apply the schema as the owner (MIGRATE_URL), then exit")
	auditOnly := flags.Bool("audit", false, "compare ledger and topic, then exit: 0 clean, 1 findings")
	adoptOnly := flags.Bool("adopt", false,
		"let the relay go on in another database (a restore, an upgrade), then exit")
	makeKey := flags.String("new-key", "",
		"make an API key for a client and its scopes, as in `checkout:read+write`, then exit")
	version := flags.Bool("version", false, "print the version, then exit")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(),
			"Usage: wallet [-migrate | -audit | -adopt | -new-key NAME:SCOPES | -version]")
		fmt.Fprintln(flags.Output())
		flags.PrintDefaults()
		fmt.Fprintln(flags.Output(), "\nEnvironment:")
		env.Print(flags.Output(), new(config).settings())
	}
	if err := flags.Parse(os.Args[1:]); errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	} else if err != nil {
		os.Exit(2)
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "wallet: leave out %q: there are options and environment variables only "+
			"(-h lists them)\n", flags.Arg(0))
		os.Exit(2)
	}
	if *version {
		fmt.Println(buildVersion())
		return
	}
	if *makeKey != "" {
		key, line, err := gate.MakeKey(*makeKey)
		if err != nil {
			fmt.Fprintln(os.Stderr,
				"wallet: name a client and its scopes, as in -new-key checkout:read+write")
			os.Exit(2)
		}
		fmt.Printf("for the client:  Authorization: Bearer %s\nfor API_KEYS:    %s\n", key, line)
		return
	}
	cfg, err := readConfig(os.Getenv)
	if err != nil {
		fmt.Fprintln(os.Stderr, "wallet:", err)
		os.Exit(2)
	}
	log, flush := logs.New(os.Stderr, cfg.logLevel, cfg.logFormat)
	slog.SetDefault(log)

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	exit := 0
	switch {
	case *migrateOnly:
		err = waitFor(ctx, "Postgres", func(ctx context.Context) error { return migrateSchema(ctx, cfg) })
		if err == nil {
			err = validateSchema(ctx, cfg)
		}
	case *auditOnly:
		var findings int
		if findings, err = runAudit(ctx, &cfg.relayConfig, os.Stdout); findings > 0 {
			exit = 1
		}
	case *adoptOnly:
		err = adopt(ctx, &cfg.relayConfig)
	default:
		tuneCollector()
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

// tuneCollector spends memory on fewer collections while serving: a few MB live, so that by Go's default a
// fifth of the processor time under load went into collecting every few milliseconds. GOGC and GOMEMLIMIT,
// where set, decide instead: thousands of connections live in more than 90 MB, and the collector would work
// hard to no avail.
func tuneCollector() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(90 << 20)
	}
}

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
	web, keeping, writing := newGroup(failed), newGroup(failed), newGroup(failed)
	relaying, operating := newGroup(failed), newGroup(failed)
	limited := gate.Connections(listener, s.cfg.connectionsMax)
	public := s.listen(web, limited, s.api.public, 10*time.Second+s.cfg.requestTimeout)
	slog.Info("listening", "address", listener.Addr().String(), "tls", s.certificate != nil,
		"version", buildVersion())
	if s.cfg.operateAddr != "" {
		operators, err := net.Listen("tcp", s.cfg.operateAddr)
		if err != nil {
			return fmt.Errorf("set OPERATE_ADDR to an address that can be listened on: %w", err)
		}
		server := s.listen(operating, gate.Connections(operators, 100), s.api.operator, 5*time.Minute)
		operating.run(func(ctx context.Context) error { <-ctx.Done(); return server.Close() })
		slog.Info("listening for operators", "address", operators.Addr().String())
	}
	keeping.run(func(ctx context.Context) error {
		if err := waitFor(ctx, "Postgres", s.prepare); err != nil {
			return err
		}
		writing.run(s.ledger.run)
		if s.balances != nil {
			writing.run(s.balances.run)
		}
		if s.relay != nil {
			relaying.run(s.relay.run)
		}
		if s.cfg.apiKeysFile != "" {
			keeping.run(func(ctx context.Context) error {
				load := func() error { return keysAdvice(s.api.Keys.Load()) }
				return gate.Watch(ctx, 5*time.Second, load, s.cfg.apiKeysFile)
			})
		}
		if s.certificate != nil {
			keeping.run(func(ctx context.Context) error {
				load := func() error { return certificateAdvice(s.certificate.Load()) }
				return gate.Watch(ctx, 5*time.Second, load, s.cfg.tlsCert, s.cfg.tlsKey)
			})
		}
		keeping.run(func(ctx context.Context) error {
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
		slog.Info("stopping")
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
	for _, g := range []*group{web, keeping, writing, relaying, operating} {
		if !g.stop(deadline) {
			return fmt.Errorf("not everything stopped within SHUTDOWN_TIMEOUT (%v)", s.cfg.shutdownTimeout)
		}
	}
	slog.Info("stopped")
	return err
}

// listen serves a handler on a listener. The timeouts let no slow client hold anything for long.
func (s *service) listen(g *group, l net.Listener, h http.Handler, writeTimeout time.Duration) *http.Server {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		// Clients that break off.
		ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	g.run(func(context.Context) (err error) {
		if s.certificate != nil {
			server.TLSConfig = s.certificate.Config()
			err = server.ServeTLS(l, "", "")
		} else {
			err = server.Serve(l)
		}
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	})
	return server
}

// group runs parts that stop together.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	parts  sync.WaitGroup
	failed chan<- error
}

func newGroup(failed chan<- error) *group {
	g := &group{failed: failed}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

func (g *group) run(part func(context.Context) error) {
	g.parts.Go(func() {
		if err := part(g.ctx); err != nil && g.ctx.Err() == nil {
			select {
			case g.failed <- err:
			default:
			}
		}
	})
}

// stop ends the group's context and waits for its parts, or false at the deadline.
func (g *group) stop(deadline context.Context) bool {
	g.cancel()
	done := make(chan struct{})
	go func() { g.parts.Wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-deadline.Done():
		return false
	}
}

// finalError is a fault that waiting does not cure.
type finalError struct{ error }

// waitFor calls try until it succeeds, with a log line whenever the reason changes and at least every 10 s.
func waitFor(ctx context.Context, what string, try func(context.Context) error) error {
	var last string
	var logged time.Time
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		err := try(ctx)
		var final finalError
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &final):
			return err
		case err.Error() != last || time.Since(logged) > 10*time.Second:
			last, logged = err.Error(), time.Now()
			slog.Warn("waiting for "+what, "error", err)
		}
		select {
		case <-time.After(pause/2 + mathrand.N(pause)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// openPool makes a pool of connections as the service's role. No connection is made before the first is
// needed.
func openPool(cfg *config, connections int, name string, balances *cache) (*pgxpool.Pool, error) {
	pool, err := pgxpool.ParseConfig(cfg.databaseURL)
	if err != nil {
		return nil, fmt.Errorf("set DATABASE_URL to a Postgres URL such as "+
			"postgres://user:password@host:5432/wallet: %w", err)
	}
	pool.MaxConns = int32(connections)
	pool.MaxConnIdleTime = 10 * time.Minute
	pool.ConnConfig.ConnectTimeout = 3 * time.Second
	for name, value := range map[string]string{
		"application_name": name,
		// A statement prepared while its table is empty is planned for an empty table and stays so. All of
		// ours are lookups by an index: leave the planner nothing else, plan once, and do not compile.
		"enable_seqscan":   "off",
		"enable_hashjoin":  "off",
		"enable_mergejoin": "off",
		"plan_cache_mode":  "force_generic_plan",
		"jit":              "off",
		// A stalled writer holds row locks that stall every replica; each of these makes its batch run again.
		"lock_timeout":                        "500ms",
		"statement_timeout":                   "4s",
		"idle_in_transaction_session_timeout": "2s",
		"tcp_user_timeout":                    "5s",
		"tcp_keepalives_idle":                 "5",
		"tcp_keepalives_interval":             "2",
		"tcp_keepalives_count":                "3",
	} {
		pool.ConnConfig.RuntimeParams[name] = value
	}
	pool.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		// Fails on a standby, as it should. An acknowledged write is on disk: asynchronous commit is not for
		// us.
		var ledger, life string
		err := conn.QueryRow(ctx, `
SELECT format('%s.%s.%s', system_identifier, d.oid, current_schema()),
       format('%s.%s', substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8),
              extract(epoch FROM pg_postmaster_start_time())),
       CASE WHEN current_setting('synchronous_commit') = 'off'
            THEN set_config('synchronous_commit', 'on', false) END
FROM pg_control_system(), pg_database d WHERE d.datname = current_database()`).Scan(&ledger, &life, nil)
		if err == nil && balances != nil {
			balances.enter(ledger, life)
		}
		return err
	}
	return pgxpool.NewWithConfig(context.Background(), pool)
}

//go:embed schema.sql
var schemaSQL string

const (
	schemaVersion      = 3 // of schema.sql's last step
	postgresVersionMin = 150000
	schemaLock         = "wallet.schema"
)

// migrateSchema brings the schema up to schemaVersion, unless it is there or newer.
func migrateSchema(ctx context.Context, cfg *config) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, cfg.migrateURL)
	if err != nil {
		return fmt.Errorf("connect with MIGRATE_URL: %w", err)
	}
	defer conn.Close(context.Background())
	version, err := readSchemaVersion(ctx, conn)
	if err != nil || version >= schemaVersion {
		return err
	}
	service, err := pgx.ParseConfig(cfg.databaseURL)
	if err != nil {
		return finalError{fmt.Errorf("DATABASE_URL: %w", err)}
	}
	relay, err := pgx.ParseConfig(cfg.replicationURL)
	if err != nil {
		return finalError{fmt.Errorf("REPLICATION_URL: %w", err)}
	}
	var schema string
	if err := conn.QueryRow(ctx, `SELECT quote_ident(current_schema())`).Scan(&schema); err != nil {
		return err
	}
	settings := map[string]string{"wallet.service_role": service.User, "wallet.relay_role": relay.User,
		"search_path": schema + ", pg_temp", "client_min_messages": "warning"}
	applied, err := migrate.Apply(ctx, conn, schemaLock, migrate.Steps(schemaSQL), settings,
		func(ctx context.Context, conn *pgx.Conn) (int, error) { return readSchemaVersion(ctx, conn) })
	switch {
	case sqlState(err) == "42501": // insufficient_privilege
		return fmt.Errorf("the schema is at version %d and this program needs %d: "+
			"run `wallet -migrate` with MIGRATE_URL of the tables' owner: %w", version, schemaVersion, err)
	case err != nil:
		return fmt.Errorf("apply the schema: %w", err)
	}
	if applied {
		slog.Info("schema applied", "version", schemaVersion)
	}
	return nil
}

// validateSchema checks old rows against the constraints that a migration left NOT VALID.
func validateSchema(ctx context.Context, cfg *config) error {
	conn, err := pgx.Connect(ctx, cfg.migrateURL)
	if err != nil {
		return fmt.Errorf("connect with MIGRATE_URL: %w", err)
	}
	defer conn.Close(context.Background())
	return migrate.Validate(ctx, conn, schemaLock)
}

// readSchemaVersion is 0 for a database without any of our tables. Tables of our names that are not ours are
// refused, and so is a schema that asks for a newer program.
func readSchemaVersion(ctx context.Context, db interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}) (int, error) {
	var ours bool
	var server int
	var foreign string
	err := db.QueryRow(ctx, `
SELECT current_setting('server_version_num')::int, to_regclass('wallet_schema') IS NOT NULL,
       coalesce((SELECT string_agg(t, ', ') FROM unnest('{wallet,entry,currency,outbox}'::text[]) AS t
                 WHERE to_regclass(t) IS NOT NULL), '')`).Scan(&server, &ours, &foreign)
	switch {
	case err != nil:
		return 0, err
	case server < postgresVersionMin:
		return 0, finalError{fmt.Errorf("this Postgres is too old (server_version_num %d): "+
			"use version 15 or later", server)}
	case !ours && foreign != "":
		return 0, finalError{fmt.Errorf("this database has tables of our names that are not ours (%s): "+
			"give the service a database of its own", foreign)}
	case !ours:
		return 0, nil
	}
	var version, programMin int
	err = db.QueryRow(ctx, `
SELECT coalesce(max(version), 0), coalesce(max((to_jsonb(s) ->> 'program_min')::int), 0) FROM wallet_schema s`,
	).Scan(&version, &programMin)
	if err == nil && programMin > schemaVersion {
		return version, finalError{fmt.Errorf("the schema is at version %d and asks for a program that knows "+
			"version %d, this one knows %d: run a newer release", version, programMin, schemaVersion)}
	}
	return version, err
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

// keep does, every minute, what a long life needs: outbox partitions ahead, old ones dropped where no relay
// does it, new currencies.
func (s *service) keep(ctx context.Context) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		work := []error{makeOutboxPartitions(ctx, s.reads), s.ledger.loadCurrencies(ctx)}
		if s.relay == nil {
			work = append(work, dropOutboxPartitions(ctx, s.reads, s.cfg.outboxRetention, nil, 0))
		}
		for _, err := range work {
			if err != nil && ctx.Err() == nil {
				slog.Error("upkeep failed, next try in a minute", "error", err)
			}
		}
	}
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
}

func newServer(cfg *config, l *ledger, r *relay, keys *gate.Keyring) *server {
	s := &server{ledger: l, relay: r, Server: api.New(api.Config{
		Problems:    problems,
		Overloaded:  errOverloaded,
		Starting:    refuse("starting", "The service is waiting for its database."),
		Unavailable: refuse("unavailable", "The ledger could not be read in time. Try again."),
		Unreachable: unreachable,
		Keys:        keys, Proxies: cfg.trustedProxies,
		Timeout: cfg.requestTimeout, RequestsMax: int64(cfg.requestsMax),
	})}
	if cfg.rateLimit > 0 {
		s.Limits = gate.NewLimiter(float64(cfg.rateLimit), float64(cfg.rateBurst))
	}
	s.document = s.OpenAPI(s.routes(), apiContract)
	s.public = s.Mux(s.routes())
	s.operator = s.Mux(s.operatorRoutes())
	for path, profile := range map[string]http.HandlerFunc{
		"": pprof.Index, "cmdline": pprof.Cmdline, "profile": pprof.Profile, "symbol": pprof.Symbol,
		"trace": pprof.Trace,
	} {
		s.operator.Handle("GET /debug/pprof/"+path, s.Guard("/debug/pprof/", gate.Operate, profile))
	}
	return s
}

// unreachable says whether a read failed because Postgres was not there, too slow, or not as a primary.
func unreachable(err error) bool {
	var connectErr *pgconn.ConnectError
	var netErr net.Error
	switch {
	case pgconn.Timeout(err), errors.As(err, &connectErr), errors.As(err, &netErr), errors.Is(err, io.EOF),
		errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return true
	}
	rerun, _ := remedy(err)
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && rerun
}

func (s *server) routes() []api.Route {
	return []api.Route{
		{Method: "POST", Path: "/v1/wallets", Scope: gate.Write, Handle: s.createWallet, Status: 201,
			Doc: api.Doc{Summary: "Create a wallet", Fields: creationFields, Answer: "Wallet",
				Refusals: "wallet_id_malformed currency_malformed currency_unknown idempotency_key_missing " +
					"idempotency_key_reused wallet_exists"}},
		{Method: "GET", Path: "/v1/wallets/{id}", Scope: gate.Read, Handle: s.getWallet,
			Doc: api.Doc{Summary: "Read a wallet", ID: "WalletID", Answer: "Wallet",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "GET", Path: "/v1/wallets/{id}/balance", Scope: gate.Read, Handle: s.getBalance,
			Doc: api.Doc{Summary: "Read a balance, from the cache unless Cache-Control says no-cache",
				ID: "WalletID", Query: balanceQuery, Answer: "Balance",
				Refusals: "wallet_id_malformed wallet_not_found seq_not_reached"}},
		{Method: "GET", Path: "/v1/wallets/{id}/history", Scope: gate.Read, Handle: s.getHistory,
			Doc: api.Doc{Summary: "Read a wallet's entries, a page at a time",
				ID: "WalletID", Query: historyQuery, Answer: "History",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "POST", Path: "/v1/wallets/{id}/deposit", Scope: gate.Write, Handle: s.deposit,
			Doc: api.Doc{Summary: "Deposit; creates the wallet if need be",
				ID: "WalletID", Fields: movementFields, Required: []string{"amount"}, Answer: "Receipt",
				Refusals: movementRefusals + " currency_unknown balance_limit"}},
		{Method: "POST", Path: "/v1/wallets/{id}/withdraw", Scope: gate.Write, Handle: s.withdraw,
			Doc: api.Doc{Summary: "Withdraw",
				ID: "WalletID", Fields: movementFields, Required: []string{"amount"}, Answer: "Receipt",
				Refusals: movementRefusals + " wallet_not_found insufficient_funds"}},
		{Method: "POST", Path: "/v1/wallets/{id}/transfer", Scope: gate.Write, Handle: s.transfer,
			Doc: api.Doc{Summary: "Transfer to another wallet; creates it if need be",
				ID: "WalletID", Fields: transferFields, Required: []string{"to_id", "amount"},
				Answer: "TransferReceipt",
				Refusals: movementRefusals + " wallet_not_found insufficient_funds same_wallet " +
					"balance_limit"}},
		{Method: "GET", Path: "/v1/transactions/{id}", Scope: gate.Read, Handle: s.getTransaction,
			Doc: api.Doc{Summary: "Read a movement of money by its id",
				ID: "TransactionID", Answer: "Transaction",
				Refusals: "transaction_id_malformed transaction_not_found"}},
		{Method: "GET", Path: "/openapi.json", Scope: gate.Open, Handle: s.getOpenAPI,
			Doc: api.Doc{Summary: "This document", Answer: "Document"}},
		{Method: "GET", Path: "/healthz", Scope: gate.Open, Handle: s.healthz,
			Doc: api.Doc{Summary: "Is the process alive?", Answer: "Status"}},
		{Method: "GET", Path: "/readyz", Scope: gate.Open, Handle: s.readyz,
			Doc: api.Doc{Summary: "Can it serve?", Answer: "Status", Refusals: "starting unavailable"}},
	}
}

// operatorRoutes are those of OPERATE_ADDR; the profiles (/debug/pprof/) come on top.
func (s *server) operatorRoutes() []api.Route {
	return []api.Route{
		{Method: "GET", Path: "/metrics", Scope: gate.Operate, Handle: s.getMetrics},
		{Method: "GET", Path: "/healthz", Scope: gate.Open, Handle: s.healthz},
		{Method: "GET", Path: "/readyz", Scope: gate.Open, Handle: s.readyz},
	}
}

// The fields of each body and the parameters of each query: anything else is refused.
var (
	creationFields = []string{"id", "currency", "idempotency_key"}
	movementFields = []string{"amount", "currency", "idempotency_key"}
	transferFields = append([]string{"to_id"}, movementFields...)
	balanceQuery   = []string{"min_seq"}
	historyQuery   = []string{"limit", "since", "until", "order", "cursor"}
)

const movementRefusals = "wallet_id_malformed field_missing idempotency_key_missing idempotency_key_reused " +
	"amount_malformed amount_exponent amount_not_positive amount_too_large amount_scale currency_malformed " +
	"currency_mismatch"

// problems is every refusal besides the API's own (internal/api): its stable code, its status and its title.
var problems = map[string]api.Problem{
	"field_missing":            {Status: 400, Title: "The body lacks a field"},
	"wallet_id_malformed":      {Status: 400, Title: "Not a wallet id"},
	"transaction_id_malformed": {Status: 400, Title: "Not a transaction id"},
	"amount_malformed":         {Status: 400, Title: "Not an amount"},
	"amount_exponent":          {Status: 400, Title: "An amount with an exponent"},
	"amount_not_positive":      {Status: 400, Title: "An amount that is not positive"},
	"amount_too_large":         {Status: 400, Title: "An amount with too many digits"},
	"currency_malformed":       {Status: 400, Title: "Not a currency code"},
	"same_wallet":              {Status: 400, Title: "A transfer to the same wallet"},
	"idempotency_key_missing":  {Status: 400, Title: "No idempotency key"},
	"wallet_not_found":         {Status: 404, Title: "No such wallet"},
	"transaction_not_found":    {Status: 404, Title: "No such transaction"},
	"wallet_exists":            {Status: 409, Title: "The wallet exists already"},
	"seq_not_reached":          {Status: 409, Title: "The wallet has no such entry yet"},
	"amount_scale":             {Status: 422, Title: "More decimals than the currency has"},
	"currency_unknown":         {Status: 422, Title: "Unknown currency"},
	"currency_mismatch":        {Status: 422, Title: "Another currency than the wallet's"},
	"insufficient_funds":       {Status: 422, Title: "Insufficient funds"},
	"balance_limit":            {Status: 422, Title: "The balance would become too large"},
	"idempotency_key_reused":   {Status: 422, Title: "The key was used for another operation"},
}

func (s *server) createWallet(r *http.Request) (*api.Reply, error) {
	body, err := api.ReadFields(r, creationFields...)
	if err != nil {
		return nil, err
	}
	op := &operation{kind: kindCreation}
	if op.currency, err = currencyOf(body); err != nil {
		return nil, err
	}
	if id, given := body["id"]; given {
		if op.walletID, err = parseWalletID(id.Text); err != nil {
			return nil, err
		}
	} else {
		op.walletID, op.idChosen = 1+mathrand.Int64N(walletIDAutoMax), true
	}
	switch op.key, err = api.Key(r, body, parseKey); {
	case err != nil:
		return nil, err
	case op.key == "" && op.idChosen:
		return nil, refuse("idempotency_key_missing", "Send an Idempotency-Key header or an "+
			"\"idempotency_key\", so that a retry does not create a second wallet; or choose the id "+
			"yourself.")
	case op.key == "":
		// Without a key a repeat is wallet_exists; but our own rerun of a batch must recognise its wallet.
		op.key = "\x01" + rand.Text() // which no client can send
	}
	if err := s.ledger.do(r.Context(), op); err != nil {
		return nil, err
	}
	location := map[string]string{"Location": fmt.Sprintf("/v1/wallets/%d", op.created.ID)}
	return &api.Reply{Body: appendWallet(nil, &op.created), Replayed: op.replayed, Header: location}, nil
}

func (s *server) deposit(r *http.Request) (*api.Reply, error) {
	return s.move(r, kindDeposit, movementFields)
}
func (s *server) withdraw(r *http.Request) (*api.Reply, error) {
	return s.move(r, kindWithdrawal, movementFields)
}
func (s *server) transfer(r *http.Request) (*api.Reply, error) {
	return s.move(r, kindTransferOut, transferFields)
}

// move is every movement of money: it reads the operation, has it posted and shows it as the ledger has it.
func (s *server) move(r *http.Request, kind string, allowed []string) (*api.Reply, error) {
	op := &operation{kind: kind, traceparent: api.Traceparent(r.Header)}
	var err error
	if op.walletID, err = parseWalletID(r.PathValue("id")); err != nil {
		return nil, err
	}
	body, err := api.ReadFields(r, allowed...)
	if err != nil {
		return nil, err
	}
	if op.key, err = api.Key(r, body, parseKey); err != nil {
		return nil, err
	}
	if op.key == "" {
		return nil, refuse("idempotency_key_missing", "Send an Idempotency-Key header or an "+
			"\"idempotency_key\" in the body, unique to this operation; a retry sends the same key.")
	}
	amount, given := body["amount"]
	if !given {
		return nil, refuse("field_missing", "Send the \"amount\", such as \"10.50\".")
	}
	if op.amount, err = money.Parse(amount.Text); err != nil {
		return nil, err
	}
	if op.currency, err = currencyOf(body); err != nil {
		return nil, err
	}
	if kind == kindTransferOut {
		to, given := body["to_id"]
		if !given {
			return nil, refuse("field_missing", "Send the \"to_id\", the wallet that receives.")
		}
		if op.toID, err = parseWalletID(to.Text); err != nil {
			return nil, err
		}
		if op.toID == op.walletID {
			return nil, refuse("same_wallet",
				"A transfer goes to another wallet; this one names wallet %d twice.", op.toID)
		}
	}
	if err := s.ledger.do(r.Context(), op); err != nil {
		return nil, err
	}
	return &api.Reply{Body: append(appendReceipt(nil, &op.posted), '}'), Replayed: op.replayed}, nil
}

func (s *server) getWallet(r *http.Request) (*api.Reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	w, err := s.ledger.wallet(r.Context(), id)
	if err != nil {
		return nil, err
	}
	return &api.Reply{Body: appendWallet(nil, w)}, nil
}

func (s *server) getBalance(r *http.Request) (*api.Reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, balanceQuery...)
	if err != nil {
		return nil, err
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
	return &api.Reply{Body: fmt.Appendf(nil, `{"wallet_id":%d,"currency":"%s","balance":"%s","seq":%d}`,
		b.walletID, b.currency, b.balance, b.seq)}, nil
}

const historyLimit, historyLimitMax = 50, 1000 // by default, and at most

// endOfTime is the until of a history that has none.
var endOfTime = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)

func (s *server) getHistory(r *http.Request) (*api.Reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, historyQuery...)
	if err != nil {
		return nil, err
	}
	limit, err := query.Integer("limit", historyLimit, 1, historyLimitMax)
	if err != nil {
		return nil, err
	}
	var p page
	if cursor := query["cursor"]; cursor != "" {
		if query["since"] != "" || query["until"] != "" || query["order"] != "" {
			return nil, refuse("parameter_malformed",
				"A cursor stands for since, until and order: send it with a limit only.")
		}
		if p, err = parseCursor(cursor); err != nil {
			return nil, err
		}
	} else {
		switch query["order"] {
		case "", "asc":
		case "desc":
			p.descending = true
		default:
			return nil, refuse("parameter_malformed", "order is asc or desc.")
		}
		since, err := query.Time("since", time.Time{})
		if err != nil {
			return nil, err
		}
		if query["since"] != "" {
			p.since = &since
		}
		if p.until, err = query.Time("until", endOfTime); err != nil {
			return nil, err
		}
		if !p.descending && query["until"] == "" {
			p.to = math.MaxInt64 // entries that come while a client pages are on its last page
		}
	}
	p.limit = int(limit) + 1 // one more tells whether there is a next page
	entries, err := s.ledger.history(r.Context(), id, &p)
	if err != nil {
		return nil, err
	}
	answer := &api.Reply{Body: []byte{'['}}
	if len(entries) > int(limit) {
		entries = entries[:limit]
		if last := entries[limit-1].Seq; p.descending {
			p.to = last
		} else {
			p.from = last + 1
		}
		answer.Header = map[string]string{"Link": fmt.Sprintf(
			`</v1/wallets/%d/history?limit=%d&cursor=%s>; rel="next"`, id, limit, p.cursor())}
	}
	for i := range entries {
		if i > 0 {
			answer.Body = append(answer.Body, ',')
		}
		answer.Body = appendEvent(answer.Body, &entries[i])
	}
	answer.Body = append(answer.Body, ']')
	return answer, nil
}

func (s *server) getTransaction(r *http.Request) (*api.Reply, error) {
	id := r.PathValue("id")
	wallet, number, found := strings.Cut(id, "-")
	walletID, err := parseWalletID(wallet)
	seq, seqErr := parseWalletID(number) // the same form
	if !found || err != nil || seqErr != nil {
		return nil, refuse("transaction_id_malformed", "A transaction id is <wallet_id>-<seq>, such as 1-1.")
	}
	m, err := s.ledger.transaction(r.Context(), walletID, seq)
	if err != nil {
		return nil, err
	}
	body := appendReceipt(nil, m)
	body = append(body, `,"kind":"`...)
	// The transaction is a transfer, the entry its transfer_out.
	body = append(body, strings.TrimSuffix(m.Kind, "_out")...)
	body = append(body, `","idempotency_key":`...)
	body = strconv.AppendQuote(body, m.Key)
	return &api.Reply{Body: append(body, '}')}, nil
}

// healthz: the process is alive. It asks nobody, since restarting us would not mend another server.
func (s *server) healthz(*http.Request) (*api.Reply, error) {
	return &api.Reply{Body: []byte(`{"status":"alive"}`)}, nil
}

// readyz: Postgres is reachable and its schema at least ours, and we are not on our way out.
func (s *server) readyz(r *http.Request) (*api.Reply, error) {
	if s.Draining.Load() || !s.Started.Load() {
		return nil, refuse("starting", "The service is starting or stopping.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	version, err := readSchemaVersion(ctx, s.ledger.reads)
	if err != nil || version < schemaVersion {
		slog.WarnContext(ctx, "not ready", "schema", version, "error", err)
		return nil, refuse("unavailable",
			"Postgres cannot be reached, or its schema is older than this program.")
	}
	return &api.Reply{Body: []byte(`{"status":"ready"}`)}, nil
}

func (s *server) getMetrics(*http.Request) (*api.Reply, error) {
	var out bytes.Buffer
	w := metric.NewWriter(&out)
	version := metric.Sample{Labels: fmt.Sprintf("version=%q", buildVersion()), Value: 1}
	w.Gauges("wallet_build_info", "1; the version is the label.", version)
	runtime := []metrics.Sample{
		{Name: "/sched/goroutines:goroutines"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/total:bytes"},
		{Name: "/gc/cycles/total:gc-cycles"},
	}
	metrics.Read(runtime)
	value := func(i int) float64 { return float64(runtime[i].Value.Uint64()) }
	w.Gauge("wallet_go_goroutines", "Goroutines.", value(0))
	w.Gauge("wallet_go_heap_bytes", "Memory of live and not yet collected objects.", value(1))
	w.Gauge("wallet_go_memory_bytes", "Memory that Go's runtime has mapped.", value(2))
	w.Counter("wallet_go_gc_cycles_total", "Garbage collections.", value(3))
	s.WriteMetrics(w, "wallet_http_request_seconds")
	s.ledger.writeMetrics(w)
	if s.ledger.cache != nil {
		s.ledger.cache.writeMetrics(w)
	}
	if s.relay != nil {
		s.relay.writeMetrics(w)
	}
	kind := map[string]string{"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
	return &api.Reply{Body: out.Bytes(), Header: kind}, nil
}

// -----------------------------------------------------------------------------------------------------------
// Answers
// -----------------------------------------------------------------------------------------------------------

// appendReceipt appends a movement as a JSON object that still lacks its closing brace. It is a pure function
// of the ledger, so that a replay is equal byte for byte.
func appendReceipt(dst []byte, m *posted) []byte {
	dst = append(slices.Grow(dst, 320), `{"transaction_id":"`...)
	dst = m.appendTransactionID(dst)
	dst = append(dst, '"')
	integer := func(name string, v int64) { dst = strconv.AppendInt(append(dst, name...), v, 10) }
	text := func(name, v string) { dst = append(append(append(dst, name...), v...), '"') }
	number := func(name string, v decimal.Decimal) {
		dst = append(money.Append(append(dst, name...), v), '"')
	}
	if m.Kind == kindTransferOut {
		integer(`,"from_id":`, m.WalletID)
		integer(`,"to_id":`, m.CounterpartyID)
	} else {
		integer(`,"wallet_id":`, m.WalletID)
	}
	text(`,"currency":"`, m.Currency)
	number(`,"amount":"`, m.Amount.Abs())
	if m.Kind == kindTransferOut {
		number(`,"from_balance":"`, m.Balance)
		number(`,"to_balance":"`, m.toBalance)
		integer(`,"from_seq":`, m.Seq)
		integer(`,"to_seq":`, m.CounterpartySeq)
	} else {
		number(`,"balance":"`, m.Balance)
		integer(`,"seq":`, m.Seq)
	}
	dst = append(dst, `,"created_at":"`...)
	dst = m.CreatedAt.UTC().AppendFormat(dst, timeFormat)
	return append(dst, '"')
}

func appendWallet(dst []byte, w *wallet) []byte {
	dst = fmt.Appendf(dst, `{"wallet_id":%d,"currency":"%s","balance":"%s","seq":%d,"created_at":"`,
		w.ID, w.Currency, w.Balance, w.Seq)
	dst = w.CreatedAt.UTC().AppendFormat(dst, timeFormat)
	return append(dst, `"}`...)
}

// -----------------------------------------------------------------------------------------------------------
// Requests
// -----------------------------------------------------------------------------------------------------------

// currencyOf is the request's currency code, or empty where it names none.
func currencyOf(body api.Fields) (string, error) {
	code, given := body["currency"]
	if !given {
		return "", nil
	}
	wellFormed := code.Quoted && len(code.Text) >= 3 && len(code.Text) <= 10 &&
		strings.Trim(code.Text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == ""
	if !wellFormed {
		return "", refuse("currency_malformed",
			"A currency is a string of 3 to 10 capital letters or digits, such as \"USD\".")
	}
	return code.Text, nil
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
		host, _, err := net.SplitHostPort(address)
		ip, notIP := netip.ParseAddr(host)
		loopback := host == "localhost" || notIP == nil && ip.IsLoopback()
		if err == nil && address != "" && !loopback {
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
		{Name: "DATABASE_URL", Secret: true, Set: env.URL(&c.databaseURL, "postgres", "postgresql"),
			Help: "Postgres, as the service's role; required. postgres://user:password@host:5432/wallet"},
		{Name: "MIGRATE_URL", Secret: true, Set: env.URL(&c.migrateURL, "postgres", "postgresql"),
			Help: "Postgres, as the tables' owner, who applies the schema at start; default: DATABASE_URL"},
		{Name: "REPLICATION_URL", Secret: true, Set: env.URL(&c.replicationURL, "postgres", "postgresql"),
			Help: "Postgres, as a role with REPLICATION, for the relay; default: DATABASE_URL"},
		{Name: "REPLICATION_SLOT", Default: "wallet_relay",
			Set:  env.Matching(&c.replicationSlot, 63, "abcdefghijklmnopqrstuvwxyz0123456789_"),
			Help: "name of the relay's replication slot (unique in the Postgres cluster)"},
		{Name: "OUTBOX_RETENTION", Default: "24h", Set: env.Duration(&c.outboxRetention, 0, 90*24*time.Hour),
			Help: "how long a published outbox row is kept, in whole partitions of an hour"},

		{Name: "REDIS_URL", Secret: true, Set: env.URL(&c.redisURL, "redis", "rediss"),
			Help: "Redis (6.2 or later), which caches balances; without it there is no cache. " +
				"redis://host:6379/0"},
		{Name: "CACHE_TTL", Default: "10m", Set: env.Duration(&c.cacheTTL, time.Second, 30*24*time.Hour),
			Help: "how long a balance stays cached, and so the bound for one that a fault left behind"},
		{Name: "CACHE_TIMEOUT", Default: "50ms",
			Set:  env.Duration(&c.cacheTimeout, time.Millisecond, 10*time.Second),
			Help: "how long a read waits for Redis before it asks Postgres"},

		{Name: "KAFKA_BROKERS", Set: env.HostPorts(&c.kafkaBrokers),
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

		{Name: "LISTEN_ADDR", Default: "127.0.0.1:8080", Set: env.Text(&c.listenAddr),
			Help: "address of the HTTP API"},
		{Name: "OPERATE_ADDR", Set: env.Text(&c.operateAddr),
			Help: "address for operators: /metrics, /debug/pprof/, /healthz, /readyz; empty: none. Such " +
				"as 127.0.0.1:8081"},
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
		{Name: "RATE_LIMIT", Default: "100", Set: env.Int(&c.rateLimit, 0, 1_000_000),
			Help: "requests a second of one client (by key, else by address), in the long run; 0: no limit"},
		{Name: "RATE_BURST", Default: "200", Set: env.Int(&c.rateBurst, 1, 1_000_000),
			Help: "requests that a client may send at once"},
		{Name: "TRUSTED_PROXIES", Set: env.Prefixes(&c.trustedProxies),
			Help: "address ranges, comma-separated, whose X-Forwarded-For is believed. Such as 10.0.0.0/8"},
		{Name: "CONNECTIONS_MAX", Default: "10000", Set: env.Int(&c.connectionsMax, 1, 1_000_000),
			Help: "connections at a time; further ones wait"},
		{Name: "REQUESTS_MAX", Default: "5000", Set: env.Int(&c.requestsMax, 1, 1_000_000),
			Help: "requests at a time; further ones are answered 503"},
		{Name: "DEFAULT_CURRENCY", Default: "USD", Set: env.Text(&c.defaultCurrency),
			Help: "currency of a wallet that is made by a deposit or transfer that names none"},
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
		{Name: "DRAIN_DELAY", Default: "0s", Set: env.Duration(&c.drainDelay, 0, 5*time.Minute),
			Help: "how long to go on serving, not ready, after SIGTERM, so that load balancers look " +
				"away first"},
		{Name: "SHUTDOWN_TIMEOUT", Default: "15s",
			Set: env.Duration(&c.shutdownTimeout, time.Second, 5*time.Minute),
			Help: "deadline for everything that follows: open requests, batches, the relay's last " +
				"confirmation"},

		{Name: "LOG_LEVEL", Default: "info", Set: env.Level(&c.logLevel),
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
			"postgres://user:password@host:5432/wallet")
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

// apiContract is what the names in the route table stand for.
var apiContract = api.Contract{
	Title: "wallet", Version: buildVersion(),
	Description: "Deposits, withdrawals and transfers. Amounts are decimal strings in answers; errors are " +
		"RFC 9457 problem documents with a stable code.",
	Schemas: schemas, Fields: fieldSchemas, Parameters: parameterSchemas,
}

func (s *server) getOpenAPI(*http.Request) (*api.Reply, error) {
	return &api.Reply{Body: s.document}, nil
}

type object = api.Object

var (
	textSchema     = object{"type": "string"}
	amountSchema   = object{"type": "string", "pattern": `^-?[0-9]{1,20}(\.[0-9]{1,18})?$`}
	timeSchema     = object{"type": "string", "format": "date-time"}
	seqSchema      = object{"type": "integer", "minimum": 0}
	walletIDSchema = object{"type": "integer", "minimum": 1, "maximum": math.MaxInt64}
	currencySchema = object{"type": "string", "pattern": "^[A-Z0-9]{3,10}$"}
	keySchema      = object{"type": "string", "pattern": "^[ -~]{1,255}$"}

	// What clients send is read more widely than what they get is written.
	walletIDInput = object{"oneOf": []any{walletIDSchema,
		object{"type": "string", "pattern": "^[1-9][0-9]{0,18}$"}}}
	amountInput = object{"oneOf": []any{
		object{"type": "string", "pattern": `^(0|[1-9][0-9]{0,19})(\.[0-9]{1,18})?$`},
		object{"type": "number", "exclusiveMinimum": 0}}}
	fieldSchemas = object{"id": walletIDInput, "to_id": walletIDInput, "amount": amountInput,
		"currency": currencySchema, "idempotency_key": keySchema}
	parameterSchemas = object{"min_seq": seqSchema, "since": timeSchema, "until": timeSchema,
		"cursor": textSchema, "order": object{"enum": []string{"asc", "desc"}, "default": "asc"},
		"limit": object{"type": "integer", "minimum": 1, "maximum": historyLimitMax, "default": historyLimit}}

	schemas = object{
		"WalletID":       walletIDSchema,
		"TransactionID":  object{"type": "string", "pattern": "^[1-9][0-9]{0,18}-[1-9][0-9]{0,18}$"},
		"IdempotencyKey": keySchema,
		"Wallet":         api.Record(with(balance, object{"created_at": timeSchema})),
		"Balance":        api.Record(balance),
		"Receipt":        api.Record(receipt), "TransferReceipt": api.Record(transferReceipt),
		"Transaction": object{"oneOf": []any{api.Record(with(receipt, transactionExtra)),
			api.Record(with(transferReceipt, transactionExtra))}},
		"History":  object{"type": "array", "items": with(api.Record(historyItem), counterparty)},
		"Status":   api.Record(object{"status": textSchema}),
		"Document": object{"type": "object"},
	}
	balance = object{"wallet_id": walletIDSchema, "currency": currencySchema, "balance": amountSchema,
		"seq": seqSchema}
	receipt = object{"transaction_id": textSchema, "wallet_id": walletIDSchema, "currency": currencySchema,
		"amount": amountSchema, "balance": amountSchema, "seq": seqSchema, "created_at": timeSchema}
	transferReceipt = object{"transaction_id": textSchema, "from_id": walletIDSchema, "to_id": walletIDSchema,
		"currency": currencySchema, "amount": amountSchema, "from_balance": amountSchema,
		"to_balance": amountSchema, "from_seq": seqSchema, "to_seq": seqSchema, "created_at": timeSchema}
	transactionExtra = object{"kind": object{"enum": []string{kindDeposit, kindWithdrawal, "transfer"}},
		"idempotency_key": keySchema}
	historyItem = object{"wallet_id": walletIDSchema, "seq": seqSchema, "transaction_id": textSchema,
		"kind":     object{"enum": []string{kindDeposit, kindWithdrawal, kindTransferOut, kindTransferIn}},
		"currency": currencySchema, "amount": amountSchema, "balance_before": amountSchema,
		"balance_after": amountSchema, "idempotency_key": keySchema, "created_at": timeSchema}
	counterparty = object{ // of a transfer
		"additionalProperties": api.Record(object{"wallet_id": walletIDSchema, "seq": seqSchema})}
)

func with(a, b object) object {
	both := maps.Clone(a)
	maps.Copy(both, b)
	return both
}

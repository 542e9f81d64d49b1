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
	"encoding/json"
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
	"net/url"
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
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/api"
	"wallet/internal/env"
	"wallet/internal/export"
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
		keeping.run(s.ledger.sweep)
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
		work := []error{makeOutboxPartitions(ctx, s.reads), s.ledger.loadCurrencies(ctx),
			s.ledger.countHolds(ctx)}
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
	routes := []api.Route{
		{Method: "POST", Path: "/v1/wallets", Scope: gate.Write, Handle: s.createWallet, Status: 201,
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
			Doc: api.Doc{Summary: "Read a balance, from the cache unless Cache-Control says no-cache; or as it was",
				ID: "WalletID", Query: balanceQuery, Answer: "Balance",
				Refusals: "wallet_id_malformed wallet_not_found seq_not_reached"}},
		{Method: "GET", Path: "/v1/wallets/{id}/history", Scope: gate.Read, Handle: s.getHistory,
			Doc: api.Doc{Summary: "Read a wallet's entries, a page at a time",
				ID: "WalletID", Query: historyQuery, Answer: "History",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "GET", Path: "/v1/wallets/{id}/statement", Scope: gate.Read, Handle: s.getStatement,
			Doc: api.Doc{Summary: "Read a statement: a span's entries, what was before and after, sums by kind",
				ID: "WalletID", Query: statementQuery, Answer: "Statement",
				Forms:    map[string]string{export.Lines: "StatementLines", export.CSV: "StatementTable"},
				Refusals: "wallet_id_malformed wallet_not_found not_acceptable"}},
		{Method: "GET", Path: "/v1/wallets/{id}/holds", Scope: gate.Read, Handle: s.getHolds,
			Doc: api.Doc{Summary: "Read a wallet's holds, a page at a time",
				ID: "WalletID", Query: holdsQuery, Answer: "Holds",
				Refusals: "wallet_id_malformed wallet_not_found"}},
		{Method: "GET", Path: "/v1/wallets/{id}/transactions", Scope: gate.Read, Handle: s.getByKey,
			Doc: api.Doc{Summary: "Find the transaction that an idempotency key stands for: none or one",
				ID: "WalletID", Query: byKeyQuery, Required: byKeyQuery, Answer: "Transactions",
				Refusals: "wallet_id_malformed"}},
		{Method: "GET", Path: "/v1/holds/{hold_id}", Scope: gate.Read, Handle: s.getHold,
			Doc: api.Doc{Summary: "Read a hold", ID: "TransactionID", Answer: "Hold",
				Refusals: "hold_id_malformed hold_not_found"}},
		{Method: "GET", Path: "/v1/transactions", Scope: gate.Read, Handle: s.getByReference,
			Doc: api.Doc{Summary: "Find transactions by their reference, a page at a time",
				Query: byReferenceQuery, Required: []string{"reference"}, Answer: "Transactions"}},
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
	for i := range movements {
		m := &movements[i]
		routes = append(routes, api.Route{Method: "POST", Path: m.path, Scope: m.scope, Status: m.status,
			Handle: func(r *http.Request) (*api.Reply, error) { return s.move(m, r) }, Doc: m.doc()})
	}
	return routes
}

// movementKind is a kind of operation on money: its route, what its body may say, and who decides (wallet.go).
type movementKind struct {
	path     string
	scope    gate.Scope
	status   int
	summary  string
	of       subject
	kind     string // of the entry that it makes, as far as the route tells
	decide   func(*posting, *operation) error
	fields   string // of the body, besides the idempotency key
	required string // of these
	all      bool   // "amount" may be "all"
	answer   string
	refusals string // besides those of its fields
}

// subject is what a movement's path names.
type subject struct {
	id       string // schema
	refusals string
	read     func(ctx context.Context, l *ledger, op *operation, text string) error
}

// movements is what money may do.
var movements = []movementKind{
	{path: "/v1/wallets/{id}/deposit", scope: gate.Write, summary: "Deposit; creates the wallet if need be",
		of: ofWallet, kind: kindDeposit, decide: decideDeposit, fields: "amount currency reference metadata",
		required: "amount", answer: "Receipt",
		refusals: "currency_mismatch currency_unknown balance_limit wallet_frozen wallet_closed"},
	{path: "/v1/wallets/{id}/withdraw", scope: gate.Write, summary: "Withdraw", of: ofWallet,
		kind: kindWithdrawal, decide: decideWithdrawal, fields: "amount currency reference metadata",
		required: "amount", all: true, answer: "Receipt",
		refusals: "currency_mismatch currency_unknown wallet_not_found insufficient_funds wallet_frozen " +
			"wallet_closed"},
	{path: "/v1/wallets/{id}/transfer", scope: gate.Write,
		summary: "Transfer to another wallet; creates it if need be", of: ofWallet, kind: kindTransferOut,
		decide: decideTransfer, fields: "to_id amount currency reference metadata", required: "to_id amount",
		all: true, answer: "TransferReceipt",
		refusals: "currency_mismatch currency_unknown wallet_not_found insufficient_funds balance_limit " +
			"wallet_frozen wallet_closed"},
	{path: "/v1/wallets/{id}/holds", scope: gate.Write, status: 201,
		summary: "Hold: reserve a part of what is available, until it is captured, voided or expires",
		of:      ofWallet, kind: kindHold, decide: decideHold,
		fields: "amount to_id expires_in currency reference metadata", required: "amount", answer: "HoldReceipt",
		refusals: "currency_mismatch currency_unknown wallet_not_found insufficient_funds wallet_frozen " +
			"wallet_closed"},
	{path: "/v1/holds/{hold_id}/capture", scope: gate.Write,
		summary: "Capture what is held, or a part of it: pay the payee, or withdraw where there is none",
		of:      ofHold, kind: kindWithdrawal, decide: decideCapture,
		fields: "amount to_id final reference metadata", answer: "Capture",
		refusals: "hold_not_found hold_closed hold_expired hold_exceeded payee_mismatch currency_mismatch " +
			"balance_limit wallet_frozen wallet_closed"},
	{path: "/v1/holds/{hold_id}/void", scope: gate.Write, summary: "Void a hold: release what remains of it",
		of: ofHold, kind: kindRelease, decide: decideVoid, fields: "reference metadata", answer: "Release",
		refusals: "hold_not_found hold_closed hold_expired"},
	{path: "/v1/transactions/{id}/reverse", scope: gate.Write,
		summary: "Reverse a transaction, or a part of it: post the opposite movement",
		of:      ofTransaction, decide: decideReversal, fields: "amount reference metadata", answer: "Reversal",
		refusals: "transaction_not_found not_reversible reversal_exceeds insufficient_funds balance_limit " +
			"wallet_frozen wallet_closed"},
	{path: "/v1/wallets/{id}/state", scope: gate.Operate,
		summary: "Set what a wallet lets in and out: open, no_out, frozen or closed", of: ofWallet,
		kind: kindState, decide: decideState, fields: "state note", required: "state", answer: "State",
		refusals: "wallet_not_found wallet_closed wallet_not_empty"},
}

var (
	ofWallet = subject{"WalletID", "wallet_id_malformed",
		func(_ context.Context, _ *ledger, op *operation, text string) (err error) {
			op.walletID, err = parseWalletID(text)
			return err
		}}

	ofHold = subject{"TransactionID", "hold_id_malformed",
		func(ctx context.Context, l *ledger, op *operation, text string) (err error) {
			if op.walletID, op.ofSeq, err = parseEntryID(text, errHoldID); err != nil {
				return err
			}
			h, err := l.hold(ctx, op.walletID, op.ofSeq)
			if err == nil && op.kind == kindWithdrawal && h.ToID != 0 { // else the body may name a payee
				op.toID, op.kind = h.ToID, kindTransferOut
			}
			return err
		}}

	ofTransaction = subject{"TransactionID", "transaction_id_malformed",
		func(ctx context.Context, l *ledger, op *operation, text string) error {
			walletID, seq, err := parseEntryID(text, errTransactionID)
			if err != nil {
				return err
			}
			m, err := l.transaction(ctx, walletID, seq)
			if err != nil {
				return err
			}
			return op.undo(m)
		}}
)

// body is the shape of the movement's body.
func (m *movementKind) body() *api.Shape {
	return &api.Shape{BytesMax: bodyBytesMax, Fields: append(strings.Fields(m.fields), "idempotency_key"),
		Flags: []string{"final"}, Objects: []string{"metadata"}}
}

// doc is what the OpenAPI document says of the movement.
func (m *movementKind) doc() api.Doc {
	refusals := m.of.refusals + " idempotency_key_missing idempotency_key_reused " + m.refusals
	for _, field := range strings.Fields(m.fields) {
		refusals += " " + fieldRefusals[field]
	}
	if m.required != "" {
		refusals += " field_missing"
	}
	doc := api.Doc{Summary: m.summary, ID: m.of.id, Body: m.body(), Required: strings.Fields(m.required),
		Answer: m.answer, Refusals: refusals}
	if m.all {
		doc.As = map[string]string{"amount": "amount_or_all"}
	}
	return doc
}

// fieldRefusals are the codes that each field may be refused with, by itself.
var fieldRefusals = map[string]string{
	"amount": "amount_malformed amount_exponent amount_not_positive amount_too_large amount_scale",
	"to_id":  "wallet_id_malformed same_wallet", "currency": "currency_malformed",
	"expires_in": "expires_in_malformed", "reference": "reference_malformed",
	"metadata": "metadata_malformed", "state": "state_malformed", "note": "note_malformed",
}

// operatorRoutes are those of OPERATE_ADDR; the profiles (/debug/pprof/) come on top.
func (s *server) operatorRoutes() []api.Route {
	return []api.Route{
		{Method: "GET", Path: "/metrics", Scope: gate.Operate, Handle: s.getMetrics},
		{Method: "GET", Path: "/healthz", Scope: gate.Open, Handle: s.healthz},
		{Method: "GET", Path: "/readyz", Scope: gate.Open, Handle: s.readyz},
	}
}

const bodyBytesMax = 8 << 10

// The parameters of each query, and the one body that is no movement's: anything else is refused.
var (
	creationBody = &api.Shape{BytesMax: bodyBytesMax,
		Fields: []string{"id", "currency", "idempotency_key"}}
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

func (s *server) createWallet(r *http.Request) (*api.Reply, error) {
	body, err := api.ReadFields(r, creationBody)
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

// move is every movement of money: it reads the operation, has it posted and shows it as the ledger has it.
func (s *server) move(m *movementKind, r *http.Request) (*api.Reply, error) {
	op := &operation{kind: m.kind, decide: m.decide, traceparent: api.Traceparent(r.Header)}
	id := r.PathValue("id")
	if id == "" {
		id = r.PathValue("hold_id")
	}
	if m.of.id == "WalletID" { // the others' are looked up, which what is malformed is not worth
		if err := m.of.read(r.Context(), s.ledger, op, id); err != nil {
			return nil, err
		}
	}
	body, err := api.ReadFields(r, m.body())
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
	if err := m.read(body, op, s.ledger.holdTTL); err != nil {
		return nil, err
	}
	if m.of.id != "WalletID" {
		if err := m.of.read(r.Context(), s.ledger, op, id); err != nil {
			return nil, err
		}
	}
	if op.toID == op.walletID || op.note.ToID == op.walletID {
		return nil, refuse("same_wallet",
			"A transfer goes to another wallet; this one names wallet %d twice.", op.walletID)
	}
	op.note.Client = api.Client(r.Context())
	if err := s.ledger.do(r.Context(), op); err != nil {
		return nil, err
	}
	answer := &api.Reply{Body: append(appendReceipt(nil, &op.posted), '}'), Replayed: op.replayed}
	if op.kind == kindHold {
		answer.Header = map[string]string{"Location": "/v1/holds/" + entryID(op.posted.WalletID, op.posted.Seq)}
	}
	return answer, nil
}

// read reads what the body says.
func (m *movementKind) read(body api.Fields, op *operation, holdTTL time.Duration) (err error) {
	for _, field := range strings.Fields(m.required) {
		if _, given := body[field]; !given && field != "to_id" {
			return missing(field)
		}
	}
	if amount, given := body["amount"]; !given {
		op.note.All = m.kind == kindWithdrawal || m.of.id == "TransactionID" && m.kind != kindRelease
	} else if m.all && amount == (api.Field{Text: "all", Quoted: true}) {
		op.note.All = true
	} else if op.amount, err = money.Parse(amount.Text); err != nil {
		return err
	}
	if op.currency, err = currencyOf(body); err != nil {
		return err
	}
	if to, given := body["to_id"]; given {
		toID, err := parseWalletID(to.Text)
		if err != nil {
			return err
		}
		switch m.kind {
		case kindHold: // which touches the payer alone
			op.note.ToID = toID
		default:
			op.toID, op.kind = toID, kindTransferOut
		}
	} else if slices.Contains(strings.Fields(m.required), "to_id") {
		return missing("to_id")
	}
	if m.kind == kindHold {
		op.expiresIn, op.anyExpiry = holdTTL, true
		if in, given := body["expires_in"]; given {
			op.anyExpiry = false
			if op.expiresIn, err = parseExpiry(in.Text); err != nil {
				return err
			}
		}
	}
	op.note.Partial = body["final"].Text == "false"
	if m.kind == kindRelease {
		op.note.Reason = reasonVoid
	}
	return readNote(body, &op.note)
}

func missing(field string) error {
	switch field {
	case "amount":
		return refuse("field_missing", "Send the \"amount\", such as \"10.50\".")
	case "to_id":
		return refuse("field_missing", "Send the \"to_id\", the wallet that receives.")
	}
	return refuse("field_missing", "Send the %q.", field)
}

var (
	errReference = refuse("reference_malformed",
		"The \"reference\" is a string of 1 to %d bytes of printable UTF-8.", noteBytesMax)
	errNote = refuse("note_malformed", "The \"note\" is a string of 1 to %d bytes of printable UTF-8.",
		noteBytesMax)
)

// readNote reads what a movement says in words.
func readNote(body api.Fields, n *note) error {
	text := func(name string, malformed *refusal) (string, error) {
		f, given := body[name]
		if given && (!f.Quoted || len(f.Text) == 0 || len(f.Text) > noteBytesMax || !printable(f.Text)) {
			return "", malformed
		}
		return f.Text, nil
	}
	var err error
	if n.Reference, err = text("reference", errReference); err != nil {
		return err
	}
	if n.Text, err = text("note", errNote); err != nil {
		return err
	}
	if state, given := body["state"]; given {
		if n.State = state.Text; !state.Quoted || !slices.Contains(walletStates, n.State) {
			return refuse("state_malformed", "The \"state\" is one of %s.", strings.Join(walletStates, ", "))
		}
	}
	if metadata, given := body["metadata"]; given {
		if n.Metadata, err = canonicalMetadata(metadata.Text); err != nil {
			return err
		}
	}
	return nil
}

// Bounds of what a movement says in words.
const (
	noteBytesMax       = 255
	metadataMembersMax = 16
	metadataBytesMax   = 2 << 10
)

var walletStates = []string{stateOpen, stateNoOut, stateFrozen, stateClosed}

// printable says whether all of a text is visible, or a space between.
func printable(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(c rune) bool {
		return !unicode.IsPrint(c) || c == utf8.RuneError
	})
}

// canonicalMetadata is the one form of an object of strings: its members by name, without white space. An
// empty one is none.
func canonicalMetadata(object string) (string, error) {
	names, values, ok := api.ParseTexts(object)
	if !ok || len(names) > metadataMembersMax || values[""] != "" || slices.Contains(names, "") {
		return "", refuse("metadata_malformed", "The \"metadata\" is an object of at most %d members, each "+
			"with a name of its own and a string of valid UTF-8.", metadataMembersMax)
	}
	if len(names) == 0 {
		return "", nil
	}
	slices.Sort(names)
	dst := []byte{'{'}
	for i, name := range names {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(appendText(dst, name), ':')
		dst = appendText(dst, values[name])
	}
	if dst = append(dst, '}'); len(dst) > metadataBytesMax {
		return "", refuse("metadata_malformed", "The \"metadata\" may have %d bytes in all; these are %d.",
			metadataBytesMax, len(dst))
	}
	return string(dst), nil
}

const holdTTLMax = 365 * 24 * time.Hour // no hold is for ever

// parseExpiry reads a duration such as 15m: a whole number of s, m, h or d.
func parseExpiry(text string) (time.Duration, error) {
	bad := refuse("expires_in_malformed",
		"\"expires_in\" is a whole number of s, m, h or d, such as \"15m\", from 1s to 365d.")
	if len(text) < 2 || len(text) > 10 || text[0] == '0' {
		return 0, bad
	}
	unit := map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour}
	n, err := strconv.ParseUint(text[:len(text)-1], 10, 32)
	each := unit[text[len(text)-1]]
	if err != nil || each == 0 || n > uint64(holdTTLMax/each) {
		return 0, bad
	}
	return time.Duration(n) * each, nil
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
	o := object{[]byte{'{'}}
	o.integer("wallet_id", b.walletID)
	o.text("currency", b.currency)
	o.text("balance", b.balance)
	if b.held != "0" {
		available, err := b.available()
		if err != nil {
			return nil, err
		}
		o.text("held", b.held)
		o.text("available", available)
	}
	o.integer("seq", b.seq)
	return &api.Reply{Body: append(o.dst, '}')}, nil
}

// balanceAsItWas is that at a time, what happened at that very time included, or after an entry.
func (s *server) balanceAsItWas(ctx context.Context, id int64, query api.Query) (*api.Reply, error) {
	if len(query) > 1 {
		return nil, refuse("parameter_malformed", "Send one of at, seq and min_seq.")
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
		m, err = s.ledger.momentBefore(ctx, id, at.Truncate(time.Microsecond).Add(time.Microsecond), endOfTime)
	}
	if err != nil {
		return nil, err
	}
	o := object{[]byte{'{'}}
	o.integer("wallet_id", id)
	o.text("currency", m.currency)
	o.number("balance", m.balance)
	o.number("held", m.held)
	o.number("available", m.balance.Sub(m.held))
	o.integer("seq", m.seq)
	if seq < 0 {
		o.time("at", at)
	}
	o.flag("final", m.final)
	return &api.Reply{Body: append(o.dst, '}')}, nil
}

// statementColumns are those of a statement as CSV.
var statementColumns = []string{"seq", "created_at", "transaction_id", "kind", "credit", "debit", "balance", "held",
	"counterparty", "reference", "metadata", "idempotency_key"}

// getStatement answers with a wallet's entries of a span, what was there before and after, and sums by kind.
// It is as long as it is: entries go out a page at a time.
func (s *server) getStatement(r *http.Request) (*api.Reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
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
	until, err := query.Time("until", time.Now().Add(time.Hour)) // which is not final
	if err != nil {
		return nil, err
	}
	format, ok := export.Negotiate(strings.Join(r.Header.Values("Accept"), ","))
	if !ok {
		return nil, refuse("not_acceptable", "A statement comes as %s, %s or %s.", export.JSON, export.Lines,
			export.CSV)
	}
	end, err := s.ledger.momentBefore(r.Context(), id, until, since)
	if err != nil {
		return nil, err
	}
	first := min(end.low, end.seq+1) // an empty span may end before it begins
	begin, err := s.ledger.momentAfter(r.Context(), id, first-1)
	if err != nil {
		return nil, err
	}
	head := object{[]byte{'{'}}
	head.integer("wallet_id", id)
	head.text("currency", end.currency)
	if query["since"] != "" {
		head.time("since", since)
	}
	if query["until"] != "" {
		head.time("until", until)
	}
	head.flag("final", end.final)
	head.moment("opening", begin)
	head.moment("closing", end)
	if first <= end.seq {
		head.integer("first_seq", first)
		head.integer("last_seq", end.seq)
	}
	st := &statement{ledger: s.ledger, walletID: id, head: head.dst, begin: begin, end: end}
	header := map[string]string{"Content-Type": format, "Trailer": "Statement-Sha256"}
	if format == export.CSV {
		header["Content-Disposition"] = fmt.Sprintf(`attachment; filename="wallet-%d.csv"`, id)
	}
	return &api.Reply{Header: header, Stream: func(ctx context.Context, w io.Writer) error {
		return st.write(ctx, w, format)
	}}, nil
}

// statement is one on its way to a client.
type statement struct {
	ledger     *ledger
	walletID   int64
	head       []byte // of the JSON object, without its closing brace
	begin, end *moment
}

func (st *statement) write(ctx context.Context, w io.Writer, format string) error {
	out, err := export.NewWriter(w, format, st.head, statementColumns)
	if err != nil {
		return err
	}
	edge := func(kind string, m *moment) error {
		return out.Row([]string{strconv.FormatInt(m.seq, 10), "", "", kind, "", "", money.Text(m.balance),
			money.Text(m.held), "", "", "", ""})
	}
	if err := edge("opening", st.begin); err != nil {
		return err
	}
	type total struct {
		count int64
		sum   decimal.Decimal
	}
	totals := make(map[string]total)
	var buf []byte
	err = st.ledger.entriesBetween(ctx, st.walletID, st.begin.seq+1, st.end.seq, func(e *entry) error {
		sum := totals[e.Kind]
		totals[e.Kind] = total{sum.count + 1, sum.sum.Add(e.Amount)}
		buf = appendEvent(buf[:0], e)
		return out.Item(buf, func() []string { return statementRow(e) })
	})
	if err != nil {
		return err
	}
	if err := edge("closing", st.end); err != nil {
		return err
	}
	o := object{[]byte{'{'}}
	o.name("totals")
	o.dst = append(o.dst, '{')
	for _, kind := range slices.Sorted(maps.Keys(totals)) {
		o.name(kind)
		inner := object{append(o.dst, '{')}
		inner.integer("count", totals[kind].count)
		inner.number("sum", totals[kind].sum)
		o.dst = append(inner.dst, '}')
	}
	o.dst = append(o.dst, '}')
	o.text("sha256", out.Sum())
	if w, ok := w.(http.ResponseWriter); ok {
		w.Header().Set("Statement-Sha256", out.Sum())
	}
	return out.Close("statement", st.head, o.dst[1:])
}

func statementRow(e *entry) []string {
	credit, debit, counterparty := "", "", ""
	switch {
	case e.Amount.IsPositive():
		credit = money.Text(e.Amount)
	case e.Amount.IsNegative():
		debit = money.Text(e.Amount.Neg())
	}
	if e.CounterpartyID != 0 {
		counterparty = strconv.FormatInt(e.CounterpartyID, 10)
	}
	d := e.says()
	return []string{strconv.FormatInt(e.Seq, 10), e.CreatedAt.UTC().Format(timeFormat),
		string(e.appendTransactionID(nil)), e.Kind, credit, debit, money.Text(e.Balance), money.Text(d.Held),
		counterparty, d.Note.Reference, d.Note.Metadata, e.Key}
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
	answer := &api.Reply{}
	if len(entries) > int(limit) {
		entries = entries[:limit]
		if last := entries[limit-1].Seq; p.descending {
			p.to = last
		} else {
			p.from = last + 1
		}
		answer.Header = next(fmt.Sprintf("/v1/wallets/%d/history?", id), int(limit), p.cursor())
	}
	answer.Body = appendList(nil, entries, appendEvent)
	return answer, nil
}

func (s *server) getTransaction(r *http.Request) (*api.Reply, error) {
	walletID, seq, err := parseEntryID(r.PathValue("id"), errTransactionID)
	if err != nil {
		return nil, err
	}
	m, err := s.ledger.transaction(r.Context(), walletID, seq)
	if err != nil {
		return nil, err
	}
	return &api.Reply{Body: appendTransaction(nil, m)}, nil
}

// getByKey answers "did my write land?".
func (s *server) getByKey(r *http.Request) (*api.Reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, byKeyQuery...)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(query["idempotency_key"])
	if err != nil {
		return nil, refuse("parameter_malformed", "Send the idempotency_key: 1 to %d printable ASCII characters.",
			keyLenMax)
	}
	found, err := s.ledger.transactions(r.Context(), transactionByKey, id, key)
	if err != nil {
		return nil, err
	}
	return list("", found, len(found), appendTransaction, nil), nil
}

func (s *server) getByReference(r *http.Request) (*api.Reply, error) {
	query, err := api.ReadQuery(r, byReferenceQuery...)
	if err != nil {
		return nil, err
	}
	reference := query["reference"]
	if reference == "" || len(reference) > noteBytesMax || !printable(reference) {
		return nil, refuse("parameter_malformed", "Send the reference: 1 to %d bytes of printable UTF-8.",
			noteBytesMax)
	}
	limit, after, err := paging(query, "r")
	if err != nil {
		return nil, err
	}
	found, err := s.ledger.transactions(r.Context(), transactionsByReference, reference, after[0], after[1],
		limit+1)
	if err != nil {
		return nil, err
	}
	path := "/v1/transactions?reference=" + url.QueryEscape(reference) + "&"
	return list(path, found, limit, appendTransaction, func(m *posted) string {
		return cursorOf("r", m.WalletID, m.Seq)
	}), nil
}

// paging reads a page's limit and where it begins.
func paging(query api.Query, kind string) (limit int, after [2]int64, err error) {
	n, err := query.Integer("limit", historyLimit, 1, historyLimitMax)
	if err == nil && query["cursor"] != "" {
		after[0], after[1], err = parseCursorOf(kind, query["cursor"])
	}
	return int(n), after, err
}

// list answers with an array of at most limit items, and where there are more, with the way to them.
func list[T any](path string, items []T, limit int, show func([]byte, T) []byte, cursor func(T) string,
) *api.Reply {
	answer := &api.Reply{}
	if len(items) > limit {
		items = items[:limit]
		answer.Header = next(path, limit, cursor(items[limit-1]))
	}
	answer.Body = appendList(nil, items, show)
	return answer
}

func next(path string, limit int, cursor string) map[string]string {
	return map[string]string{"Link": fmt.Sprintf(`<%slimit=%d&cursor=%s>; rel="next"`, path, limit, cursor)}
}

func appendList[T any](dst []byte, items []T, show func([]byte, T) []byte) []byte {
	dst = append(dst, '[')
	for i, item := range items {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = show(dst, item)
	}
	return append(dst, ']')
}

func (s *server) getWallets(r *http.Request) (*api.Reply, error) {
	query, err := api.ReadQuery(r, listQuery...)
	if err != nil {
		return nil, err
	}
	limit, after, err := paging(query, "w")
	if err != nil {
		return nil, err
	}
	found, err := s.ledger.walletsAfter(r.Context(), after[0], limit+1)
	if err != nil {
		return nil, err
	}
	return list("/v1/wallets?", found, limit, appendWallet, func(w *wallet) string {
		return cursorOf("w", w.ID, 1)
	}), nil
}

func (s *server) getHold(r *http.Request) (*api.Reply, error) {
	walletID, seq, err := parseEntryID(r.PathValue("hold_id"), errHoldID)
	if err != nil {
		return nil, err
	}
	h, err := s.ledger.hold(r.Context(), walletID, seq)
	if err != nil {
		return nil, err
	}
	return &api.Reply{Body: appendHold(nil, h)}, nil
}

func (s *server) getHolds(r *http.Request) (*api.Reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := api.ReadQuery(r, holdsQuery...)
	if err != nil {
		return nil, err
	}
	status := query["status"]
	if status != "" && !slices.Contains(holdStatuses, status) {
		return nil, refuse("parameter_malformed", "status is one of %s.", strings.Join(holdStatuses, ", "))
	}
	limit, after, err := paging(query, "h")
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
		answer.Header = next(path, limit, cursorOf("h", found[limit-1].Seq, 1))
	}
	answer.Body = fmt.Appendf(nil, `{"wallet_id":%d,"currency":"%s","balance":"%s","held":"%s",`+
		`"available":"%s","seq":%d,"holds":`, w.ID, w.Currency, money.Text(w.Balance), money.Text(w.Held),
		money.Text(w.available()), w.Seq)
	answer.Body = append(appendList(answer.Body, found, appendHold), '}')
	return answer, nil
}

var holdStatuses = []string{holdOpen, holdCaptured, holdVoided, holdExpired}

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

// object appends the members of a JSON object, one after the other; close ends it.
type object struct{ dst []byte }

func (o *object) name(name string) {
	if len(o.dst) == 0 || o.dst[len(o.dst)-1] != '{' {
		o.dst = append(o.dst, ',')
	}
	o.dst = append(append(append(o.dst, '"'), name...), `":`...)
}
func (o *object) flag(name string, v bool) { o.name(name); o.dst = strconv.AppendBool(o.dst, v) }
func (o *object) moment(name string, m *moment) {
	o.name(name)
	inner := object{append(o.dst, '{')}
	inner.number("balance", m.balance)
	inner.number("held", m.held)
	o.dst = append(inner.dst, '}')
}
func (o *object) text(name, v string) { o.name(name); o.dst = appendText(o.dst, v) }
func (o *object) integer(name string, v int64) {
	o.name(name)
	o.dst = strconv.AppendInt(o.dst, v, 10)
}
func (o *object) number(name string, v decimal.Decimal) {
	o.name(name)
	o.dst = append(money.Append(append(o.dst, '"'), v), '"')
}
func (o *object) time(name string, v time.Time) {
	o.name(name)
	o.dst = append(v.UTC().AppendFormat(append(o.dst, '"'), timeFormat), '"')
}

// appendReceipt appends a movement as a JSON object that still lacks its closing brace. It is a pure function
// of the ledger, so that a replay is equal byte for byte. Each kind of entry is shown by one function.
func appendReceipt(dst []byte, m *posted) []byte {
	o := object{append(slices.Grow(dst, 320), '{')}
	shows[m.Kind](&o, m)
	d := m.says()
	if m.captures() {
		o.text("hold_id", m.of)
		o.number("remaining", d.Remaining)
		o.number("held", d.Held)
	} else if m.reverses() {
		o.text("reverses", m.of)
		o.number("reversible", d.Remaining)
	}
	o.words(&d.Note)
	return o.dst
}

// words are what a movement says in words, where it does.
func (o *object) words(n *note) {
	if n.Reference != "" {
		o.text("reference", n.Reference)
	}
	if n.Metadata != "" {
		o.name("metadata")
		o.dst = append(o.dst, n.Metadata...)
	}
}

var shows = map[string]func(*object, *posted){
	kindDeposit: showOne, kindWithdrawal: showOne, kindTransferOut: showTransfer, kindHold: showHold,
	kindRelease: showRelease, kindState: showState,
}

func (o *object) transactionID(m *posted) { o.text("transaction_id", entryID(m.WalletID, m.Seq)) }

// showOne is a movement of one wallet.
func showOne(o *object, m *posted) {
	o.transactionID(m)
	o.integer("wallet_id", m.WalletID)
	o.text("currency", m.Currency)
	o.number("amount", m.Amount.Abs())
	o.number("balance", m.Balance)
	o.integer("seq", m.Seq)
	o.time("created_at", m.CreatedAt)
}

func showTransfer(o *object, m *posted) {
	o.transactionID(m)
	o.integer("from_id", m.WalletID)
	o.integer("to_id", m.CounterpartyID)
	o.text("currency", m.Currency)
	o.number("amount", m.Amount.Abs())
	o.number("from_balance", m.Balance)
	o.number("to_balance", m.toBalance)
	o.integer("from_seq", m.Seq)
	o.integer("to_seq", m.CounterpartySeq)
	o.time("created_at", m.CreatedAt)
}

// head is the wallet's, after the entry.
func (o *object) head(m *posted) {
	held := m.says().Held
	o.number("balance", m.Balance)
	o.number("held", held)
	o.number("available", m.Balance.Sub(held))
	o.integer("seq", m.Seq)
	o.time("created_at", m.CreatedAt)
}

func showHold(o *object, m *posted) {
	d := m.says()
	o.text("hold_id", entryID(m.WalletID, m.Seq))
	o.integer("wallet_id", m.WalletID)
	o.text("currency", m.Currency)
	o.number("amount", d.HeldChange)
	o.number("remaining", d.Remaining)
	o.text("status", holdOpen)
	o.time("expires_at", d.Note.ExpiresAt)
	if d.Note.ToID != 0 {
		o.integer("to_id", d.Note.ToID)
	}
	o.head(m)
}

func showRelease(o *object, m *posted) {
	d := m.says()
	status := holdVoided
	if d.Note.Reason == reasonExpiry {
		status = holdExpired
	}
	o.text("hold_id", m.of)
	o.integer("wallet_id", m.WalletID)
	o.text("currency", m.Currency)
	o.number("released", d.HeldChange.Neg())
	o.number("remaining", d.Remaining)
	o.text("status", status)
	o.head(m)
}

func showState(o *object, m *posted) {
	d := m.says()
	o.transactionID(m)
	o.integer("wallet_id", m.WalletID)
	o.text("currency", m.Currency)
	o.text("state", d.Note.State)
	if d.Note.Text != "" {
		o.text("note", d.Note.Text)
	}
	o.head(m)
}

// appendTransaction appends a movement as who asks for it later sees it.
func appendTransaction(dst []byte, m *posted) []byte {
	o := object{appendReceipt(dst, m)}
	o.text("kind", strings.TrimSuffix(m.Kind, "_out")) // the transaction is a transfer
	o.text("idempotency_key", m.Key)
	if !m.reversed.IsZero() {
		o.number("reversed", m.reversed)
	}
	return append(o.dst, '}')
}

// appendHold appends a hold as it stands now.
func appendHold(dst []byte, h *shownHold) []byte {
	o := object{append(dst, '{')}
	o.text("hold_id", entryID(h.WalletID, h.Seq))
	o.integer("wallet_id", h.WalletID)
	o.text("currency", h.currency)
	o.number("amount", h.Amount)
	o.number("captured", h.Captured)
	o.number("remaining", h.Remaining)
	o.text("status", h.Status)
	o.time("expires_at", h.ExpiresAt)
	if h.ToID != 0 {
		o.integer("to_id", h.ToID)
	}
	o.time("created_at", h.createdAt)
	o.words(&h.note)
	return append(o.dst, '}')
}

func appendWallet(dst []byte, w *wallet) []byte {
	o := object{append(dst, '{')}
	o.integer("wallet_id", w.ID)
	o.text("currency", w.Currency)
	o.number("balance", w.Balance)
	if !w.Held.IsZero() {
		o.number("held", w.Held)
		o.number("available", w.available())
	}
	o.integer("seq", w.Seq)
	if w.State != "" {
		o.text("state", w.State)
	}
	o.time("created_at", w.CreatedAt)
	return append(o.dst, '}')
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

//go:embed docs/schemas.json
var schemasJSON []byte

// apiContract is what the names in the route table stand for.
var apiContract = func() api.Contract {
	c := api.Contract{
		Title: "wallet", Version: buildVersion(),
		Description: "Deposits, withdrawals, transfers, holds and reversals. Amounts are decimal strings; errors " +
			"are RFC 9457 problem documents with a stable code.",
	}
	if err := json.Unmarshal(schemasJSON, &c); err != nil {
		panic(fmt.Sprintf("docs/schemas.json: %v", err))
	}
	return c
}()

func (s *server) getOpenAPI(*http.Request) (*api.Reply, error) {
	return &api.Reply{Body: s.document}, nil
}

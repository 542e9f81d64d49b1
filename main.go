// Wallet is a wallet service: deposits, withdrawals and transfers over HTTP, each one Postgres commit and exactly one Kafka
// event per wallet touched.
//
//	wallet            serve; configuration comes from the environment (-h lists it)
//	wallet -migrate   apply the schema as the owner (MIGRATE_URL), then exit
//	wallet -new-key   make an API key for a client: name and scopes, as in checkout:read+write
//	wallet -audit     compare ledger and topic, then exit: 0 clean, 1 findings
//	wallet -adopt     let the relay go on after a restore or an upgrade into another database, then exit
//
// This file: configuration, start and stop, the routes and what stands around them (decoding, problems, logs, metrics). It holds no
// rule about money (wallet.go), no event (outbox.go), no relay (cdc.go), no cache (cache.go).
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"mime"
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
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/shopspring/decimal"

	"wallet/internal/env"
	"wallet/internal/gate"
	"wallet/internal/logs"
	"wallet/internal/metric"
)

func main() {
	flags := flag.NewFlagSet("wallet", flag.ContinueOnError)
	migrateOnly := flags.Bool("migrate", false, "apply the schema as the owner (MIGRATE_URL), then exit")
	auditOnly := flags.Bool("audit", false, "compare ledger and topic, then exit: 0 clean, 1 findings")
	adoptOnly := flags.Bool("adopt", false, "let the relay go on in another database (a restore, an upgrade), then exit")
	makeKey := flags.String("new-key", "", "make an API key for a client and its scopes, as in `checkout:read+write`, then exit")
	version := flags.Bool("version", false, "print the version, then exit")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "Usage: wallet [-migrate | -audit | -adopt | -new-key NAME:SCOPES | -version]")
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
		fmt.Fprintf(os.Stderr, "wallet: leave out %q: there are options and environment variables only (-h lists them)\n", flags.Arg(0))
		os.Exit(2)
	}
	if *version {
		fmt.Println(buildVersion())
		return
	}
	if *makeKey != "" {
		if err := gate.MakeKey(*makeKey, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "wallet:", err)
			os.Exit(2)
		}
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
		err = waitFor(ctx, "Postgres", func(ctx context.Context) error { return migrate(ctx, cfg) })
	case *auditOnly:
		var findings int
		if findings, err = runAudit(ctx, cfg, os.Stdout); findings > 0 {
			exit = 1
		}
	case *adoptOnly:
		err = adopt(ctx, cfg)
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

// tuneCollector spends memory on fewer collections while serving: a few MB live, so that by Go's default a fifth of the processor time under load went into
// collecting every few milliseconds. GOGC and GOMEMLIMIT, where set, decide instead: thousands of connections live in more than 90 MB, and
// the collector would work hard to no avail.
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

// ---------------------------------------------------------------------------------------------------------------------
// Start and stop
// ---------------------------------------------------------------------------------------------------------------------

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
		if s.balances, err = newCache(cfg); err != nil {
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
	s.ledger = newLedger(cfg, s.reads, s.writes, s.balances)
	if len(cfg.kafkaBrokers) > 0 {
		s.relay = newRelay(cfg, s.reads, s.balances)
	} else {
		slog.Warn("NO KAFKA_BROKERS: THIS SERVICE RUNS WITHOUT A RELAY, NO EVENT LEAVES THE DATABASE")
	}
	keys, err := gate.NewKeyring(cfg.apiKeys, cfg.apiKeysFile)
	if err != nil {
		return nil, err
	}
	if err := checkListen(cfg, keys); err != nil {
		return nil, err
	}
	if cfg.tlsCert != "" || cfg.tlsKey != "" {
		if s.certificate, err = gate.LoadCertificate(cfg.tlsCert, cfg.tlsKey); err != nil {
			return nil, err
		}
	}
	s.api = newServer(cfg, s.ledger, s.relay, keys)
	return s, nil
}

// run serves until ctx ends or a part fails. It listens at once (alive, not ready), waits for the servers it needs, and stops in
// the order that loses nothing: not ready, HTTP drained, writers drained, the relay's last confirmation; operators can look on to the end.
func (s *service) run(ctx context.Context, listener net.Listener) error {
	defer s.reads.Close()
	defer s.writes.Close()

	// Every part runs in one of these groups, which stop one after the other. The first part that fails stops them all.
	failed := make(chan error, 1)
	web, keeping, writing, relaying, operating := newGroup(failed), newGroup(failed), newGroup(failed), newGroup(failed), newGroup(failed)
	public := s.listen(web, gate.Connections(listener, s.cfg.connectionsMax), s.api.public, 10*time.Second+s.cfg.requestTimeout)
	slog.Info("listening", "address", listener.Addr().String(), "tls", s.certificate != nil, "version", buildVersion())
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
				gate.Watch(ctx, 5*time.Second, s.api.keys.Load, s.cfg.apiKeysFile)
				return nil
			})
		}
		if s.certificate != nil {
			keeping.run(func(ctx context.Context) error {
				gate.Watch(ctx, 5*time.Second, s.certificate.Load, s.cfg.tlsCert, s.cfg.tlsKey)
				return nil
			})
		}
		s.api.started.Store(true)
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
	s.api.draining.Store(true)
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
func (s *service) listen(g *group, listener net.Listener, handler http.Handler, writeTimeout time.Duration) *http.Server {
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug), // clients that break off
	}
	g.run(func(context.Context) (err error) {
		if s.certificate != nil {
			server.TLSConfig = s.certificate.Config()
			err = server.ServeTLS(listener, "", "")
		} else {
			err = server.Serve(listener)
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

// openPool makes a pool of connections as the service's role. No connection is made before the first is needed.
func openPool(cfg *config, connections int, name string, balances *cache) (*pgxpool.Pool, error) {
	pool, err := pgxpool.ParseConfig(cfg.databaseURL)
	if err != nil {
		return nil, fmt.Errorf("set DATABASE_URL to a Postgres URL such as postgres://user:password@host:5432/wallet: %w", err)
	}
	pool.MaxConns = int32(connections)
	pool.MaxConnIdleTime = 10 * time.Minute
	pool.ConnConfig.ConnectTimeout = 3 * time.Second
	for name, value := range map[string]string{
		"application_name": name,
		// A statement prepared while its table is empty is planned for an empty table and stays so. All of ours are lookups by
		// an index: leave the planner nothing else, plan once, and do not compile.
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
		// Fails on a standby, as it should. An acknowledged write is on disk: asynchronous commit is not for us.
		var ledger, life string
		err := conn.QueryRow(ctx, `
SELECT format('%s.%s.%s', system_identifier, d.oid, current_schema()),
       format('%s.%s', substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), extract(epoch FROM pg_postmaster_start_time())),
       CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false) END
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
	schemaVersion      = 2 // of schema.sql's last line
	postgresVersionMin = 150000
)

// migrate brings the schema up to schemaVersion, unless it is there or newer. Replicas that start together take turns.
func migrate(ctx context.Context, cfg *config) error {
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
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `
SELECT pg_advisory_xact_lock(hashtext('wallet.schema')), set_config('wallet.service_role', $1, true), set_config('wallet.relay_role', $2, true),
       set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true), set_config('client_min_messages', 'warning', true)`,
			service.User, relay.User); err != nil {
			return err
		}
		if version, err = readSchemaVersion(ctx, tx); err != nil || version >= schemaVersion {
			return err // another replica came first
		}
		_, err := tx.Conn().PgConn().Exec(ctx, schemaSQL).ReadAll()
		return err
	})
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &pgErr) && pgErr.Code == "42501": // insufficient_privilege
		return fmt.Errorf("the schema is at version %d and this program needs %d: run `wallet -migrate` with MIGRATE_URL of the tables' owner: %w", version, schemaVersion, err)
	case err != nil:
		return fmt.Errorf("apply the schema: %w", err)
	}
	slog.Info("schema applied", "version", schemaVersion)
	return nil
}

// readSchemaVersion is 0 for a database without any of our tables. Tables of our names that are not ours are refused.
func readSchemaVersion(ctx context.Context, db interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}) (int, error) {
	var ours bool
	var server int
	var foreign string
	err := db.QueryRow(ctx, `
SELECT current_setting('server_version_num')::int, to_regclass('wallet_schema') IS NOT NULL,
       coalesce((SELECT string_agg(t, ', ') FROM unnest('{wallet,entry,currency,outbox}'::text[]) AS t WHERE to_regclass(t) IS NOT NULL), '')`).Scan(&server, &ours, &foreign)
	switch {
	case err != nil:
		return 0, err
	case server < postgresVersionMin:
		return 0, finalError{fmt.Errorf("this Postgres is too old (server_version_num %d): use version 15 or later", server)}
	case !ours && foreign != "":
		return 0, finalError{fmt.Errorf("this database has tables of our names that are not ours (%s): give the service a database of its own", foreign)}
	case !ours:
		return 0, nil
	}
	var version int
	err = db.QueryRow(ctx, `SELECT coalesce(max(version), 0) FROM wallet_schema`).Scan(&version)
	return version, err
}

// prepare makes the database ready for writes.
func (s *service) prepare(ctx context.Context) error {
	if err := migrate(ctx, s.cfg); err != nil {
		return err
	}
	if err := makeOutboxPartitions(ctx, s.reads); err != nil {
		return err
	}
	return s.ledger.loadCurrencies(ctx)
}

// keep does, every minute, what a long life needs: outbox partitions ahead, old ones dropped where no relay does it, new
// currencies.
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

// ---------------------------------------------------------------------------------------------------------------------
// Routes
// ---------------------------------------------------------------------------------------------------------------------

// route is one operation of the API: what runs, who may, and what the OpenAPI document says of it.
type route struct {
	method, path string
	scope        gate.Scope
	handle       func(*http.Request) (*reply, error) // its error becomes a problem document

	summary  string
	fields   []string // of the body
	query    []string
	answers  string // schema of the answer
	refusals string // codes, space-separated, besides those that every route has
}

func (s *server) routes() []route {
	return []route{
		{"POST", "/v1/wallets", gate.Write, s.createWallet, "Create a wallet", creationFields, nil, "Wallet",
			bodyRefusals + " wallet_id_malformed currency_malformed currency_unknown idempotency_key_missing wallet_exists"},
		{"GET", "/v1/wallets/{id}", gate.Read, s.getWallet, "Read a wallet", nil, nil, "Wallet", "wallet_id_malformed wallet_not_found"},
		{"GET", "/v1/wallets/{id}/balance", gate.Read, s.getBalance, "Read a balance, from the cache unless Cache-Control says no-cache", nil, balanceQuery, "Balance",
			"wallet_id_malformed parameter_malformed wallet_not_found seq_not_reached"},
		{"GET", "/v1/wallets/{id}/history", gate.Read, s.getHistory, "Read a wallet's entries, a page at a time", nil, historyQuery, "History",
			"wallet_id_malformed parameter_malformed wallet_not_found"},
		{"POST", "/v1/wallets/{id}/deposit", gate.Write, s.deposit, "Deposit; creates the wallet if need be", movementFields, nil, "Receipt",
			movementRefusals + " currency_unknown balance_limit"},
		{"POST", "/v1/wallets/{id}/withdraw", gate.Write, s.withdraw, "Withdraw", movementFields, nil, "Receipt",
			movementRefusals + " wallet_not_found insufficient_funds"},
		{"POST", "/v1/wallets/{id}/transfer", gate.Write, s.transfer, "Transfer to another wallet; creates it if need be", transferFields, nil, "TransferReceipt",
			movementRefusals + " wallet_not_found insufficient_funds same_wallet balance_limit"},
		{"GET", "/v1/transactions/{id}", gate.Read, s.getTransaction, "Read a movement of money by its id", nil, nil, "Transaction",
			"transaction_id_malformed transaction_not_found"},
		{"GET", "/openapi.json", gate.Open, s.getOpenAPI, "This document", nil, nil, "Document", ""},
		{"GET", "/healthz", gate.Open, s.healthz, "Is the process alive?", nil, nil, "Status", ""},
		{"GET", "/readyz", gate.Open, s.readyz, "Can it serve?", nil, nil, "Status", ""},
	}
}

// operatorRoutes are those of OPERATE_ADDR; the profiles (/debug/pprof/) come on top.
func (s *server) operatorRoutes() []route {
	return []route{
		{method: "GET", path: "/metrics", scope: gate.Operate, handle: s.getMetrics},
		{method: "GET", path: "/healthz", scope: gate.Open, handle: s.healthz},
		{method: "GET", path: "/readyz", scope: gate.Open, handle: s.readyz},
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

const (
	bodyRefusals = "body_malformed body_too_large content_type_unsupported field_unknown field_duplicate idempotency_key_malformed idempotency_key_conflict " +
		"idempotency_key_reused"
	movementRefusals = bodyRefusals + " wallet_id_malformed field_missing idempotency_key_missing amount_malformed amount_exponent amount_not_positive " +
		"amount_too_large amount_scale currency_malformed currency_mismatch"
	// commonRefusals may come from any route that is not open to all.
	commonRefusals = "unauthenticated forbidden rate_limited overloaded starting unavailable internal"
)

// problems is every refusal there is: its stable code, its status and its title.
var problems = map[string]struct {
	status int
	title  string
}{
	"body_malformed":            {400, "The body is not the JSON object that this route takes"},
	"field_unknown":             {400, "The body has a field that this route does not know"},
	"field_duplicate":           {400, "The body has a field twice"},
	"field_missing":             {400, "The body lacks a field"},
	"wallet_id_malformed":       {400, "Not a wallet id"},
	"transaction_id_malformed":  {400, "Not a transaction id"},
	"amount_malformed":          {400, "Not an amount"},
	"amount_exponent":           {400, "An amount with an exponent"},
	"amount_not_positive":       {400, "An amount that is not positive"},
	"amount_too_large":          {400, "An amount with too many digits"},
	"currency_malformed":        {400, "Not a currency code"},
	"same_wallet":               {400, "A transfer to the same wallet"},
	"idempotency_key_missing":   {400, "No idempotency key"},
	"idempotency_key_malformed": {400, "Not an idempotency key"},
	"idempotency_key_conflict":  {400, "Two different idempotency keys"},
	"parameter_malformed":       {400, "A query parameter with a bad value"},
	"wallet_not_found":          {404, "No such wallet"},
	"transaction_not_found":     {404, "No such transaction"},
	"route_not_found":           {404, "No such route"},
	"method_not_allowed":        {405, "Not a method of this route"},
	"wallet_exists":             {409, "The wallet exists already"},
	"seq_not_reached":           {409, "The wallet has no such entry yet"},
	"body_too_large":            {413, "The body is too large"},
	"content_type_unsupported":  {415, "Not JSON by its content type"},
	"amount_scale":              {422, "More decimals than the currency has"},
	"currency_unknown":          {422, "Unknown currency"},
	"currency_mismatch":         {422, "Another currency than the wallet's"},
	"insufficient_funds":        {422, "Insufficient funds"},
	"balance_limit":             {422, "The balance would become too large"},
	"idempotency_key_reused":    {422, "The key was used for another operation"},
	"unauthenticated":           {401, "No valid API key"},
	"forbidden":                 {403, "The API key's scopes do not include this"},
	"rate_limited":              {429, "Too many requests"},
	"internal":                  {500, "A fault of ours"},
	"overloaded":                {503, "Too busy"},
	"unavailable":               {503, "Not available"},
	"starting":                  {503, "Not ready"},
}

const bodyBytesMax = 4 << 10

func (s *server) createWallet(r *http.Request) (*reply, error) {
	body, err := readFields(r, creationFields...)
	if err != nil {
		return nil, err
	}
	op := &operation{kind: kindCreation}
	if op.currency, err = body.currency(); err != nil {
		return nil, err
	}
	if id, given := body["id"]; given {
		if op.walletID, err = parseWalletID(id.text); err != nil {
			return nil, err
		}
	} else {
		op.walletID, op.idChosen = 1+mathrand.Int64N(walletIDAutoMax), true
	}
	switch op.key, err = body.idempotencyKey(r); {
	case err != nil:
		return nil, err
	case op.key == "" && op.idChosen:
		return nil, refuse("idempotency_key_missing", "Send an Idempotency-Key header or an \"idempotency_key\", so that a retry does not create a second wallet; or choose the id yourself.")
	case op.key == "":
		// Without a key a repeat is wallet_exists; but our own rerun of a batch must recognise its wallet.
		op.key = "\x01" + rand.Text() // which no client can send
	}
	if err := s.ledger.do(r.Context(), op); err != nil {
		return nil, err
	}
	w := &op.created
	return &reply{
		status:   http.StatusCreated,
		body:     appendWallet(nil, w),
		replayed: op.replayed,
		header:   map[string]string{"Location": fmt.Sprintf("/v1/wallets/%d", w.ID)},
	}, nil
}

func (s *server) deposit(r *http.Request) (*reply, error)  { return s.move(r, kindDeposit) }
func (s *server) withdraw(r *http.Request) (*reply, error) { return s.move(r, kindWithdrawal) }
func (s *server) transfer(r *http.Request) (*reply, error) { return s.move(r, kindTransferOut) }

// move is every movement of money: it reads the operation, has it posted and shows how it stands in the ledger.
func (s *server) move(r *http.Request, kind string) (*reply, error) {
	op := &operation{kind: kind, traceparent: traceparent(r.Header)}
	var err error
	if op.walletID, err = parseWalletID(r.PathValue("id")); err != nil {
		return nil, err
	}
	allowed := movementFields
	if kind == kindTransferOut {
		allowed = transferFields
	}
	body, err := readFields(r, allowed...)
	if err != nil {
		return nil, err
	}
	if op.key, err = body.idempotencyKey(r); err != nil {
		return nil, err
	}
	if op.key == "" {
		return nil, refuse("idempotency_key_missing", "Send an Idempotency-Key header or an \"idempotency_key\" in the body, unique to this operation; a retry sends the same key.")
	}
	amount, given := body["amount"]
	if !given {
		return nil, refuse("field_missing", "Send the \"amount\", such as \"10.50\".")
	}
	if op.amount, err = parseAmount(amount.text); err != nil {
		return nil, err
	}
	if op.currency, err = body.currency(); err != nil {
		return nil, err
	}
	if kind == kindTransferOut {
		to, given := body["to_id"]
		if !given {
			return nil, refuse("field_missing", "Send the \"to_id\", the wallet that receives.")
		}
		if op.toID, err = parseWalletID(to.text); err != nil {
			return nil, err
		}
		if op.toID == op.walletID {
			return nil, refuse("same_wallet", "A transfer goes to another wallet; this one names wallet %d twice.", op.toID)
		}
	}
	if err := s.ledger.do(r.Context(), op); err != nil {
		return nil, err
	}
	return &reply{body: append(appendReceipt(nil, &op.posted), '}'), replayed: op.replayed}, nil
}

func (s *server) getWallet(r *http.Request) (*reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	w, err := s.ledger.wallet(r.Context(), id)
	if err != nil {
		return nil, err
	}
	return &reply{body: appendWallet(nil, w)}, nil
}

func (s *server) getBalance(r *http.Request) (*reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := readQuery(r, balanceQuery...)
	if err != nil {
		return nil, err
	}
	minSeq, err := query.integer("min_seq", 0, 0, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	fresh := strings.Contains(strings.ToLower(r.Header.Get("Cache-Control")), "no-cache")
	b, err := s.ledger.balance(r.Context(), id, minSeq, fresh)
	if err != nil {
		return nil, err
	}
	return &reply{body: fmt.Appendf(nil, `{"wallet_id":%d,"currency":"%s","balance":"%s","seq":%d}`, b.walletID, b.currency, b.balance, b.seq)}, nil
}

const (
	historyLimit    = 50
	historyLimitMax = 1000
)

// endOfTime is the until of a history that has none.
var endOfTime = time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)

func (s *server) getHistory(r *http.Request) (*reply, error) {
	id, err := parseWalletID(r.PathValue("id"))
	if err != nil {
		return nil, err
	}
	query, err := readQuery(r, historyQuery...)
	if err != nil {
		return nil, err
	}
	limit, err := query.integer("limit", historyLimit, 1, historyLimitMax)
	if err != nil {
		return nil, err
	}
	var p page
	if cursor := query["cursor"]; cursor != "" {
		if query["since"] != "" || query["until"] != "" || query["order"] != "" {
			return nil, refuse("parameter_malformed", "A cursor stands for since, until and order: send it with a limit only.")
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
		since, err := query.time("since", time.Time{})
		if err != nil {
			return nil, err
		}
		if query["since"] != "" {
			p.since = &since
		}
		if p.until, err = query.time("until", endOfTime); err != nil {
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
	answer := &reply{body: []byte{'['}}
	if len(entries) > int(limit) {
		entries = entries[:limit]
		if last := entries[limit-1].Seq; p.descending {
			p.to = last
		} else {
			p.from = last + 1
		}
		answer.header = map[string]string{"Link": fmt.Sprintf(`</v1/wallets/%d/history?limit=%d&cursor=%s>; rel="next"`, id, limit, p.cursor())}
	}
	for i := range entries {
		if i > 0 {
			answer.body = append(answer.body, ',')
		}
		answer.body = appendEvent(answer.body, &entries[i])
	}
	answer.body = append(answer.body, ']')
	return answer, nil
}

func (s *server) getTransaction(r *http.Request) (*reply, error) {
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
	body = append(body, strings.TrimSuffix(m.Kind, "_out")...) // the transaction is a transfer, the entry its transfer_out
	body = append(body, `","idempotency_key":`...)
	body = strconv.AppendQuote(body, m.Key)
	return &reply{body: append(body, '}')}, nil
}

// healthz: the process is alive. It asks nobody, since restarting us would not mend another server.
func (s *server) healthz(*http.Request) (*reply, error) {
	return &reply{body: []byte(`{"status":"alive"}`)}, nil
}

// readyz: Postgres is reachable and its schema at least ours, and we are not on our way out.
func (s *server) readyz(r *http.Request) (*reply, error) {
	if s.draining.Load() || !s.started.Load() {
		return nil, refuse("starting", "The service is starting or stopping.")
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	version, err := readSchemaVersion(ctx, s.ledger.reads)
	if err != nil || version < schemaVersion {
		slog.WarnContext(ctx, "not ready", "schema", version, "error", err)
		return nil, refuse("unavailable", "Postgres cannot be reached, or its schema is older than this program.")
	}
	return &reply{body: []byte(`{"status":"ready"}`)}, nil
}

func (s *server) getMetrics(*http.Request) (*reply, error) {
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
	s.writeMetrics(w)
	s.ledger.writeMetrics(w)
	if s.ledger.cache != nil {
		s.ledger.cache.writeMetrics(w)
	}
	if s.relay != nil {
		s.relay.writeMetrics(w)
	}
	return &reply{body: out.Bytes(), header: map[string]string{"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}}, nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Answers
// ---------------------------------------------------------------------------------------------------------------------

// reply is a successful answer; status 0 is 200.
type reply struct {
	status   int
	body     []byte
	replayed bool
	header   map[string]string
}

// appendReceipt appends a movement as a JSON object that still lacks its closing brace. It is a pure function of the ledger, so that
// a replay is equal byte for byte.
func appendReceipt(dst []byte, m *posted) []byte {
	dst = append(slices.Grow(dst, 320), `{"transaction_id":"`...)
	dst = m.appendTransactionID(dst)
	dst = append(dst, '"')
	integer := func(name string, v int64) { dst = strconv.AppendInt(append(dst, name...), v, 10) }
	text := func(name, v string) { dst = append(append(append(dst, name...), v...), '"') }
	number := func(name string, v decimal.Decimal) { dst = append(appendDecimal(append(dst, name...), v), '"') }
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
	dst = fmt.Appendf(dst, `{"wallet_id":%d,"currency":"%s","balance":"%s","seq":%d,"created_at":"`, w.ID, w.Currency, w.Balance, w.Seq)
	dst = w.CreatedAt.UTC().AppendFormat(dst, timeFormat)
	return append(dst, `"}`...)
}

// problem is an RFC 9457 document. Error repeats Detail under the name that the predecessor's clients read.
type problem struct {
	Type      string `json:"type"`
	Title     string `json:"title"`
	Status    int    `json:"status"`
	Code      string `json:"code"`
	Detail    string `json:"detail"`
	Error     string `json:"error"`
	RequestID string `json:"request_id"`
}

// problemOf turns any error into a problem. What is not a refusal is ours: bare outside, whole in the log.
func problemOf(ctx context.Context, err error) *problem {
	var no *refusal
	switch {
	case errors.As(err, &no):
	case ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err) || unreachable(err):
		slog.WarnContext(ctx, "request not served", "request_id", requestID(ctx), "error", err)
		no = refuse("unavailable", "The ledger could not be read in time. Try again.")
	default:
		slog.ErrorContext(ctx, "request failed", "request_id", requestID(ctx), "error", err)
		no = refuse("internal", "Something went wrong on our side. The request id leads to it in our log.")
	}
	p, known := problems[no.code]
	if !known {
		panic("refusal without a place in the table: " + no.code)
	}
	return &problem{"about:blank", p.title, p.status, no.code, no.detail, no.detail, requestID(ctx)}
}

// unreachable says whether a read failed because Postgres was not there, or not as a primary.
func unreachable(err error) bool {
	var connectErr *pgconn.ConnectError
	var netErr net.Error
	if errors.As(err, &connectErr) || errors.As(err, &netErr) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return true
	}
	rerun, _ := remedy(err)
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && rerun
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests
// ---------------------------------------------------------------------------------------------------------------------

// parseWalletID reads 1..2^63-1 in its one decimal form.
func parseWalletID(s string) (int64, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id < 1 || strconv.FormatInt(id, 10) != s {
		return 0, refuse("wallet_id_malformed", "A wallet id is a whole number from 1 to %d.", math.MaxInt64)
	}
	return id, nil
}

// fields is a request's JSON object: scalars only, each as its text.
type fields map[string]field

type field struct {
	text   string
	quoted bool
}

// readFields reads a body that is one JSON object with no other fields than those allowed, each at most once. A number stays the
// text it was: nothing passes through a float.
func readFields(r *http.Request, allowed ...string) (fields, error) {
	kind := r.Header.Get("Content-Type")
	if kind != "application/json" { // mostly it is just that
		kind, _, _ = mime.ParseMediaType(kind)
	}
	if kind != "application/json" {
		return nil, refuse("content_type_unsupported", "Send Content-Type: application/json (curl --json does).")
	}
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, bodyBytesMax))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return nil, refuse("body_too_large", "The body may have %d bytes.", bodyBytesMax)
	}
	if err != nil {
		return nil, refuse("body_malformed", "The body could not be read to its end.")
	}
	return parseFields(body, allowed...)
}

var errBodyMalformed = refuse("body_malformed", "Send one JSON object whose values are strings or numbers.")

func parseFields(body []byte, allowed ...string) (fields, error) {
	found := make(fields, len(allowed))
	rest, ok := bytes.CutPrefix(trimSpace(body), []byte{'{'})
	if rest = trimSpace(rest); !ok || len(rest) == 0 {
		return nil, errBodyMalformed
	}
	for more := rest[0] != '}'; more; {
		var name, value field
		if name, rest, ok = parseScalar(rest); !ok || !name.quoted {
			return nil, errBodyMalformed
		}
		if !slices.Contains(allowed, name.text) {
			return nil, refuse("field_unknown", "This route has no field %.40q. It takes %s.", name.text, strings.Join(allowed, ", "))
		}
		if _, twice := found[name.text]; twice {
			return nil, refuse("field_duplicate", "The field %q is there twice.", name.text)
		}
		if rest, ok = bytes.CutPrefix(trimSpace(rest), []byte{':'}); !ok {
			return nil, errBodyMalformed
		}
		if value, rest, ok = parseScalar(trimSpace(rest)); !ok {
			return nil, refuse("body_malformed", "The field %q must be a string or a number.", name.text)
		}
		found[name.text] = value
		rest, more = bytes.CutPrefix(trimSpace(rest), []byte{','})
		rest = trimSpace(rest)
	}
	if rest, ok = bytes.CutPrefix(rest, []byte{'}'}); !ok {
		return nil, errBodyMalformed
	}
	if len(trimSpace(rest)) > 0 {
		return nil, refuse("body_malformed", "Something follows the JSON object. Send one object only.")
	}
	return found, nil
}

func trimSpace(text []byte) []byte { return bytes.TrimLeft(text, " \t\r\n") } // what JSON takes for white space

// parseScalar reads a JSON string or number (RFC 8259) off the front of text. What is more than plain ASCII is left to encoding/json: to
// have it read whole bodies, token by token, took as long as all of net/http's own work on a request.
func parseScalar(text []byte) (f field, rest []byte, ok bool) {
	if len(text) > 0 && text[0] == '"' {
		plain := true
		for i := 1; i < len(text); i++ {
			switch c := text[i]; {
			case c == '"':
				f = field{string(text[1:i]), true}
				if !plain {
					ok = json.Unmarshal(text[:i+1], &f.text) == nil
				}
				return f, text[i+1:], plain || ok
			case c == '\\':
				i++ // whatever it escapes, it ends nothing
				plain = false
			case c < ' ' || c > '~':
				plain = false
			}
		}
		return f, nil, false
	}
	end := bytes.IndexFunc(text, func(c rune) bool { return !strings.ContainsRune("0123456789+-.eE", c) })
	if end <= 0 || !json.Valid(text[:end]) {
		return f, nil, false
	}
	return field{string(text[:end]), false}, text[end:], true
}

// currency is the request's currency code, or empty where it names none.
func (f fields) currency() (string, error) {
	code, given := f["currency"]
	if !given {
		return "", nil
	}
	wellFormed := code.quoted && len(code.text) >= 3 && len(code.text) <= 10 && strings.Trim(code.text, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") == ""
	if !wellFormed {
		return "", refuse("currency_malformed", "A currency is a string of 3 to 10 capital letters or digits, such as \"USD\".")
	}
	return code.text, nil
}

// idempotencyKey is the key from the header or the body, or empty where neither has one.
func (f fields) idempotencyKey(r *http.Request) (string, error) {
	inBody, given := f["idempotency_key"]
	if given && !inBody.quoted {
		return "", refuse("idempotency_key_malformed", "The \"idempotency_key\" must be a string.")
	}
	values := r.Header.Values("Idempotency-Key")
	if len(values) == 0 {
		if !given {
			return "", nil
		}
		return parseKey(inBody.text)
	}
	key, err := parseKeyHeader(values[0])
	switch {
	case err != nil:
		return "", err
	case len(values) > 1:
		return "", refuse("idempotency_key_conflict", "Send one Idempotency-Key header.")
	case given && inBody.text != key:
		return "", refuse("idempotency_key_conflict", "The Idempotency-Key header and the body's \"idempotency_key\" differ. Send one, or the same twice.")
	}
	return key, nil
}

// parseKeyHeader reads an Idempotency-Key header: bare, or quoted as a structured-field string (RFC 9651, 3.3.3).
func parseKeyHeader(value string) (string, error) {
	if !strings.HasPrefix(value, `"`) {
		return parseKey(value)
	}
	var key strings.Builder
	for i := 1; i < len(value); i++ {
		switch c := value[i]; {
		case c == '"' && i == len(value)-1:
			return parseKey(key.String())
		case c == '\\' && i+1 < len(value) && (value[i+1] == '"' || value[i+1] == '\\'):
			i++
			key.WriteByte(value[i])
		case c == '"' || c == '\\':
			return "", refuse("idempotency_key_malformed", "A quoted Idempotency-Key ends at its second quote, and escapes only \\\" and \\\\.")
		default:
			key.WriteByte(c)
		}
	}
	return "", refuse("idempotency_key_malformed", "A quoted Idempotency-Key ends with a quote.")
}

// query is a request's query parameters, each at most once.
type query map[string]string

func readQuery(r *http.Request, allowed ...string) (query, error) {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, refuse("parameter_malformed", "The query string is not well-formed.")
	}
	q := make(query)
	for name, v := range values {
		if !slices.Contains(allowed, name) {
			return nil, refuse("parameter_malformed", "This route has no parameter %.40q. It takes %s.", name, strings.Join(allowed, ", "))
		}
		if len(v) > 1 {
			return nil, refuse("parameter_malformed", "The parameter %q is there twice.", name)
		}
		q[name] = v[0]
	}
	return q, nil
}

func (q query) integer(name string, fallback, least, most int64) (int64, error) {
	if q[name] == "" {
		return fallback, nil
	}
	n, err := strconv.ParseInt(q[name], 10, 64)
	if err != nil || n < least || n > most {
		return 0, refuse("parameter_malformed", "%s is a whole number from %d to %d.", name, least, most)
	}
	return n, nil
}

func (q query) time(name string, fallback time.Time) (time.Time, error) {
	if q[name] == "" {
		return fallback, nil
	}
	at, err := time.Parse(time.RFC3339, q[name])
	if err != nil || at.Year() < 1 || at.Year() > 9999 {
		return at, refuse("parameter_malformed", "%s is an RFC 3339 time, such as 2026-01-02T03:04:05Z (a + must be sent as %%2B).", name)
	}
	return at, nil
}

// cursor names the rest of a history after a page: opaque to clients.
func (p page) cursor() string {
	order := 'a'
	if p.descending {
		order = 'd'
	}
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "%c.%d.%d", order, p.from, p.to))
}

func parseCursor(s string) (page, error) {
	bad := refuse("parameter_malformed", "This cursor is not one of ours. Take it from the Link header of the page before.")
	raw, err := base64.RawURLEncoding.DecodeString(s)
	parts := strings.Split(string(raw), ".")
	if err != nil || len(parts) != 3 || parts[0] != "a" && parts[0] != "d" {
		return page{}, bad
	}
	p := page{descending: parts[0] == "d"}
	var errs [2]error
	p.from, errs[0] = strconv.ParseInt(parts[1], 10, 64)
	p.to, errs[1] = strconv.ParseInt(parts[2], 10, 64)
	if errs[0] != nil || errs[1] != nil || p.from < 1 || p.to < 1 || p.cursor() != s {
		return page{}, bad
	}
	return p, nil
}

// traceparent is the request's W3C trace context (https://www.w3.org/TR/trace-context/#traceparent-header), or empty.
func traceparent(h http.Header) string {
	v := h.Get("Traceparent")
	if len(v) != 55 || v[2] != '-' || v[35] != '-' || v[52] != '-' || v[:2] == "ff" || strings.Trim(v, "0123456789abcdef-") != "" ||
		strings.Trim(v[3:35], "0") == "" || strings.Trim(v[36:52], "0") == "" || strings.Count(v, "-") != 3 {
		return ""
	}
	return v
}

// ---------------------------------------------------------------------------------------------------------------------
// What stands around every route
// ---------------------------------------------------------------------------------------------------------------------

// server is the HTTP side. Its ServeHTTP is the whole public handler, operator the other one: tests use them through httptest.
type server struct {
	ledger         *ledger
	relay          *relay // nil without Kafka
	keys           *gate.Keyring
	limits         *gate.Limiter // nil: no limit
	proxies        []netip.Prefix
	requestTimeout time.Duration
	requestsMax    int64
	public         *http.ServeMux
	operator       *http.ServeMux
	document       []byte // OpenAPI

	started  atomic.Bool // the servers we need have been there once
	draining atomic.Bool
	requests atomic.Int64 // being served

	statistics sync.Map // requestLabels -> *metric.Histogram of seconds
}

func newServer(cfg *config, l *ledger, r *relay, keys *gate.Keyring) *server {
	s := &server{ledger: l, relay: r, keys: keys, proxies: cfg.trustedProxies, requestTimeout: cfg.requestTimeout, requestsMax: int64(cfg.requestsMax)}
	if cfg.rateLimit > 0 {
		s.limits = gate.NewLimiter(float64(cfg.rateLimit), float64(cfg.rateBurst))
	}
	s.document = openAPI(s.routes())
	s.public = s.mux(s.routes())
	s.operator = s.mux(s.operatorRoutes())
	for path, profile := range map[string]http.HandlerFunc{"": pprof.Index, "cmdline": pprof.Cmdline, "profile": pprof.Profile, "symbol": pprof.Symbol, "trace": pprof.Trace} {
		s.operator.HandleFunc("GET /debug/pprof/"+path, func(w http.ResponseWriter, r *http.Request) {
			if _, err := s.admit(r, gate.Operate); err != nil {
				s.serve(route{path: "/debug/pprof/", handle: func(*http.Request) (*reply, error) { return nil, err }}).ServeHTTP(w, r)
				return
			}
			profile(w, r)
		})
	}
	return s
}

// mux serves routes, and answers what is none of them.
func (s *server) mux(routes []route) *http.ServeMux {
	mux := http.NewServeMux()
	methods := make(map[string][]string)
	for _, r := range routes {
		methods[r.path] = append(methods[r.path], r.method)
		mux.Handle(r.method+" "+r.path, s.serve(r))
	}
	for path, allowed := range methods {
		if slices.Contains(allowed, "GET") {
			allowed = append(allowed, "HEAD")
		}
		allow := strings.Join(allowed, ", ")
		mux.Handle(path, s.serve(route{path: path, handle: func(r *http.Request) (*reply, error) {
			return &reply{header: map[string]string{"Allow": allow}}, refuse("method_not_allowed", "%.100q takes %s.", r.URL.Path, allow)
		}}))
	}
	mux.Handle("/", s.serve(route{path: "other", handle: func(r *http.Request) (*reply, error) {
		return nil, refuse("route_not_found", "There is no %.100q here. /openapi.json lists the routes.", r.URL.Path)
	}}))
	return mux
}

type requestIDKey struct{}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

// serve wraps a route's handle: request id, deadline, the problem document of an error or a panic, one log line, statistics.
func (s *server) serve(route route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		started := time.Now()
		id := r.Header.Get("X-Request-Id")
		if len(id) > 64 || strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" || id == "" {
			id = rand.Text()
		}
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), requestIDKey{}, id), s.requestTimeout)
		defer cancel()
		h := w.Header()
		h["X-Request-Id"] = []string{id}
		h["Content-Type"], h["Cache-Control"], h["X-Content-Type-Options"] = contentJSON, noStore, noSniff
		if s.draining.Load() {
			h.Set("Connection", "close") // else Shutdown may close a kept connection just as the next request arrives on it
		}
		if len(r.TransferEncoding) > 0 {
			// It may have had a Content-Length too, which Go does not tell: what follows could be a smuggled request (RFC 9112, 6.1).
			h.Set("Connection", "close")
		}

		answer, client, err := s.admitAndHandle(route, r.WithContext(ctx), h)
		if answer != nil {
			for name, value := range answer.header {
				h.Set(name, value)
			}
		}
		var status int
		var body []byte
		code := ""
		if err != nil {
			p := problemOf(ctx, err)
			status, code = p.Status, p.Code
			switch status {
			case http.StatusServiceUnavailable:
				h.Set("Retry-After", "1")
			case http.StatusUnauthorized:
				h.Set("WWW-Authenticate", "Bearer")
			}
			h.Set("Content-Type", "application/problem+json")
			body, _ = json.Marshal(p)
		} else {
			status, body = cmp.Or(answer.status, http.StatusOK), answer.body
			if answer.replayed {
				h.Set("Idempotent-Replayed", "true")
			}
		}
		h.Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			w.Write(body)
		}
		took := time.Since(started)
		s.observe(route.path, r.Method, status, took)
		s.log(ctx, accessLevel(route.path, status), slog.String("method", r.Method), slog.String("path", r.URL.Path), slog.Int("status", status),
			slog.String("code", code), slog.String("client", client), slog.Float64("seconds", took.Round(time.Microsecond).Seconds()), slog.String("request_id", id),
			slog.String("trace", traceparent(r.Header)))
	})
}

// Headers that all answers have alike; not to be changed in place.
var contentJSON, noStore, noSniff = []string{"application/json"}, []string{"no-store"}, []string{"nosniff"}

// log writes a request's line, without attributes that say nothing. slog's own functions look up their caller each time.
func (s *server) log(ctx context.Context, level slog.Level, attrs ...slog.Attr) {
	handler := slog.Default().Handler()
	if !handler.Enabled(ctx, level) {
		return
	}
	line := slog.NewRecord(time.Now(), level, "request", 0)
	line.AddAttrs(slices.DeleteFunc(attrs, func(a slog.Attr) bool { return a.Value.Kind() == slog.KindString && a.Value.String() == "" })...)
	_ = handler.Handle(ctx, line)
}

// admitAndHandle lets a request in, or not: overload first, then the client's rate, then its key, then whether we have started. A panic of one
// request does not end the others.
func (s *server) admitAndHandle(route route, r *http.Request, h http.Header) (answer *reply, client string, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			answer, err = nil, fmt.Errorf("panic: %v\n%s", fault, debug.Stack())
		}
	}()
	defer s.requests.Add(-1)
	if s.requests.Add(1) > s.requestsMax && route.scope != gate.Open {
		return nil, "", errOverloaded
	}
	client, err = s.admit(r, route.scope)
	if client == "" {
		client = gate.Client(r, s.proxies)
	}
	if s.limits != nil && (route.scope != gate.Open || err != nil) {
		if wait := s.limits.Take(client, h); wait > 0 {
			h.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
			return nil, client, refuse("rate_limited", "This client sends more than %g requests a second. Try again after the time in Retry-After.", s.limits.Rate())
		}
	}
	if err != nil {
		return nil, client, err
	}
	if strings.HasPrefix(route.path, "/v1/") && !s.started.Load() {
		return nil, client, refuse("starting", "The service is waiting for its database.")
	}
	answer, err = route.handle(r)
	return answer, client, err
}

// admit names the client whose key a request carries; its error is a refusal.
func (s *server) admit(r *http.Request, needed gate.Scope) (client string, err error) {
	switch client, err = s.keys.Admit(r.Header, needed); {
	case errors.Is(err, gate.ErrUnauthenticated):
		err = refuse("unauthenticated", "Send a valid API key as \"Authorization: Bearer KEY\".")
	case errors.Is(err, gate.ErrForbidden):
		err = refuse("forbidden", "The key of %q does not have the scope that this route needs. "+
			"Ask the operator for one that has.", client)
	}
	return client, err
}

// accessLevel keeps probes and scrapes out of the log.
func accessLevel(path string, status int) slog.Level {
	if !strings.HasPrefix(path, "/v1/") && status < 400 {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

// ---------------------------------------------------------------------------------------------------------------------
// Who may, and how much
// ---------------------------------------------------------------------------------------------------------------------

// checkListen refuses an address that others can reach while nobody needs a key, unless the operator vouches for what stands in front.
func checkListen(cfg *config, k *gate.Keyring) error {
	if !k.Empty() || cfg.authenticatedUpstream {
		return nil
	}
	for name, address := range map[string]string{"LISTEN_ADDR": cfg.listenAddr, "OPERATE_ADDR": cfg.operateAddr} {
		host, _, err := net.SplitHostPort(address)
		if ip, notIP := netip.ParseAddr(host); err == nil && address != "" && host != "localhost" && (notIP != nil || !ip.IsLoopback()) {
			return fmt.Errorf("set API_KEYS or API_KEYS_FILE (wallet -new-key makes a key), or %s to a loopback address: %s can be reached by others, "+
				"who could all move money; AUTHENTICATED_UPSTREAM=true says that something in front authenticates", name, address)
		}
	}
	return nil
}

// ---------------------------------------------------------------------------------------------------------------------
// Configuration
// ---------------------------------------------------------------------------------------------------------------------

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
		{Name: "REPLICATION_SLOT", Default: "wallet_relay", Set: env.Matching(&c.replicationSlot, 63, "abcdefghijklmnopqrstuvwxyz0123456789_"),
			Help: "name of the relay's replication slot (unique in the Postgres cluster)"},
		{Name: "OUTBOX_RETENTION", Default: "24h", Set: env.Duration(&c.outboxRetention, 0, 90*24*time.Hour),
			Help: "how long a published outbox row is kept, in whole partitions of an hour"},

		{Name: "REDIS_URL", Secret: true, Set: env.URL(&c.redisURL, "redis", "rediss"),
			Help: "Redis (6.2 or later), which caches balances; without it there is no cache. " +
				"redis://host:6379/0"},
		{Name: "CACHE_TTL", Default: "10m", Set: env.Duration(&c.cacheTTL, time.Second, 30*24*time.Hour),
			Help: "how long a balance stays cached, and so the bound for one that a fault left behind"},
		{Name: "CACHE_TIMEOUT", Default: "50ms", Set: env.Duration(&c.cacheTimeout, time.Millisecond, 10*time.Second),
			Help: "how long a read waits for Redis before it asks Postgres"},

		{Name: "KAFKA_BROKERS", Set: env.HostPorts(&c.kafkaBrokers),
			Help: "host:port, comma-separated, of some brokers; without it no event leaves the database"},
		{Name: "KAFKA_TOPIC", Default: "wallet.events", Set: env.Matching(&c.kafkaTopic, 249, topicChars),
			Help: "topic of the events; made if absent"},
		{Name: "KAFKA_CHECKPOINT_TOPIC", Default: "wallet.checkpoints", Set: env.Matching(&c.kafkaCheckpointTopic, 249, topicChars),
			Help: "topic of the relay's checkpoints; made if absent"},
		{Name: "KAFKA_PARTITIONS", Default: "12", Set: env.Int(&c.kafkaPartitions, 1, 10_000),
			Help: "partitions of a new events topic; final, since another number would break each " +
				"wallet's order"},
		{Name: "KAFKA_REPLICATION", Default: "-1", Set: env.Int(&c.kafkaReplication, -1, 100),
			Help: "replication factor of new topics; -1: the broker's default"},
		{Name: "KAFKA_RETENTION", Default: "-1ns", Set: env.Duration(&c.kafkaRetention, -1, 100*365*24*time.Hour),
			Help: "how long the events topic keeps an event; negative: for ever"},
		{Name: "KAFKA_TLS", Default: "false", Set: env.Bool(&c.kafkaTLS),
			Help: "true: speak TLS to the brokers"},
		{Name: "KAFKA_TLS_CA", Set: env.Text(&c.kafkaTLSCA),
			Help: "file with the brokers' CA certificates (PEM); default: the system's"},
		{Name: "KAFKA_TLS_CERT", Set: env.Text(&c.kafkaTLSCert),
			Help: "file with a client certificate (PEM)"},
		{Name: "KAFKA_TLS_KEY", Set: env.Text(&c.kafkaTLSKey),
			Help: "file with the client certificate's key (PEM)"},
		{Name: "KAFKA_SASL_MECHANISM", Set: env.OneOf(&c.kafkaSASLMechanism, "", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"),
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
		{Name: "REQUEST_TIMEOUT", Default: "5s", Set: env.Duration(&c.requestTimeout, 100*time.Millisecond, time.Minute),
			Help: "how long a request may take in all"},
		{Name: "DRAIN_DELAY", Default: "0s", Set: env.Duration(&c.drainDelay, 0, 5*time.Minute),
			Help: "how long to go on serving, not ready, after SIGTERM, so that load balancers look " +
				"away first"},
		{Name: "SHUTDOWN_TIMEOUT", Default: "15s", Set: env.Duration(&c.shutdownTimeout, time.Second, 5*time.Minute),
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
		return nil, fmt.Errorf("set DATABASE_URL to a Postgres URL such as postgres://user:password@host:5432/wallet")
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
		return nil, errors.New("set KAFKA_TLS to true, or leave out KAFKA_TLS_CA, KAFKA_TLS_CERT and KAFKA_TLS_KEY")
	case given(c.kafkaTLSCert) != given(c.kafkaTLSKey):
		return nil, errors.New("set KAFKA_TLS_CERT and KAFKA_TLS_KEY both, or neither")
	case given(c.kafkaSASLMechanism) != given(c.kafkaSASLUser) || given(c.kafkaSASLMechanism) != given(c.kafkaSASLPassword):
		return nil, errors.New("set KAFKA_SASL_MECHANISM, KAFKA_SASL_USER and KAFKA_SASL_PASSWORD all three, or none")
	}
	return c, nil
}

// ---------------------------------------------------------------------------------------------------------------------
// The API's contract
// ---------------------------------------------------------------------------------------------------------------------

func (s *server) getOpenAPI(*http.Request) (*reply, error) { return &reply{body: s.document}, nil }

// object is a JSON object.
type object = map[string]any

// openAPI makes the OpenAPI 3.1 document out of the route table: no route, parameter or refusal stands in it that is not there.
func openAPI(routes []route) []byte {
	ref := func(name string) object { return object{"$ref": "#/components/schemas/" + name} }
	paths := make(object)
	for _, r := range routes {
		operation := object{"summary": r.summary, "operationId": strings.ToLower(r.method) + strings.NewReplacer("/", "_", "{", "", "}", "", ".", "_").Replace(r.path)}
		var parameters []any
		if strings.Contains(r.path, "{id}") {
			parameters = append(parameters, object{"name": "id", "in": "path", "required": true, "schema": ref(pathID(r.path))})
		}
		for _, name := range r.query {
			parameters = append(parameters, object{"name": name, "in": "query", "schema": parameterSchemas[name]})
		}
		if len(r.fields) > 0 {
			parameters = append(parameters, object{"name": "Idempotency-Key", "in": "header", "schema": ref("IdempotencyKey"), "description": "In place of the body's idempotency_key; one of them is needed."})
			properties, required := make(object), []string{}
			for _, name := range r.fields {
				properties[name] = fieldSchemas[name]
				if name == "amount" || name == "to_id" {
					required = append(required, name)
				}
			}
			operation["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": object{
				"type": "object", "properties": properties, "required": required, "additionalProperties": false}}}}
		}
		if len(parameters) > 0 {
			operation["parameters"] = parameters
		}
		success := "200"
		if r.method == "POST" && r.path == "/v1/wallets" {
			success = "201"
		}
		answers := object{success: object{"description": "Done.", "content": object{"application/json": object{"schema": ref(r.answers)}}}}
		codes := make(map[int][]string)
		for _, code := range strings.Fields(refusalsOf(r)) {
			codes[problems[code].status] = append(codes[problems[code].status], code)
		}
		for status, list := range codes {
			slices.Sort(list)
			answers[strconv.Itoa(status)] = object{"description": strings.Join(list, ", "), "content": object{"application/problem+json": object{"schema": object{
				"allOf": []any{ref("Problem"), object{"properties": object{"code": object{"enum": list}}}}}}}}
		}
		operation["responses"] = answers
		if r.scope == gate.Open {
			operation["security"] = []any{}
		}
		item, _ := paths[r.path].(object)
		if item == nil {
			item = make(object)
			paths[r.path] = item
		}
		item[strings.ToLower(r.method)] = operation
	}
	document, err := json.MarshalIndent(object{
		"openapi":  "3.1.0",
		"info":     object{"title": "wallet", "version": buildVersion(), "description": "Deposits, withdrawals and transfers. Amounts are decimal strings in answers; errors are RFC 9457 problem documents with a stable code."},
		"paths":    paths,
		"security": []any{object{"key": []string{}}},
		"components": object{
			"schemas":         schemas,
			"securitySchemes": object{"key": object{"type": "http", "scheme": "bearer"}},
		},
	}, "", " ")
	if err != nil {
		panic(err)
	}
	return document
}

// refusalsOf is every code that a route may refuse with, by itself or by what stands around it.
func refusalsOf(r route) string {
	switch {
	case r.path == "/readyz":
		return "starting unavailable"
	case r.scope == gate.Open:
		return r.refusals
	}
	return r.refusals + " " + commonRefusals
}

func pathID(path string) string {
	if strings.HasPrefix(path, "/v1/transactions/") {
		return "TransactionID"
	}
	return "WalletID"
}

var (
	textSchema     = object{"type": "string"}
	amountSchema   = object{"type": "string", "pattern": `^-?[0-9]{1,20}(\.[0-9]{1,18})?$`}
	timeSchema     = object{"type": "string", "format": "date-time"}
	seqSchema      = object{"type": "integer", "minimum": 0}
	walletIDSchema = object{"type": "integer", "minimum": 1, "maximum": math.MaxInt64}
	currencySchema = object{"type": "string", "pattern": "^[A-Z0-9]{3,10}$"}
	keySchema      = object{"type": "string", "pattern": "^[ -~]{1,255}$"}
	walletIDInput  = object{"oneOf": []any{walletIDSchema, object{"type": "string", "pattern": "^[1-9][0-9]{0,18}$"}}}

	fieldSchemas = object{
		"id": walletIDInput, "to_id": walletIDInput, "currency": currencySchema, "idempotency_key": keySchema,
		"amount": object{"oneOf": []any{object{"type": "string", "pattern": `^(0|[1-9][0-9]{0,19})(\.[0-9]{1,18})?$`}, object{"type": "number", "exclusiveMinimum": 0}}},
	}
	parameterSchemas = object{
		"min_seq": seqSchema, "limit": object{"type": "integer", "minimum": 1, "maximum": historyLimitMax, "default": historyLimit},
		"since": timeSchema, "until": timeSchema, "order": object{"enum": []string{"asc", "desc"}, "default": "asc"}, "cursor": textSchema,
	}
	schemas = object{
		"WalletID": walletIDSchema, "TransactionID": object{"type": "string", "pattern": "^[1-9][0-9]{0,18}-[1-9][0-9]{0,18}$"}, "IdempotencyKey": keySchema,
		"Wallet":  record(object{"wallet_id": walletIDSchema, "currency": currencySchema, "balance": amountSchema, "seq": seqSchema, "created_at": timeSchema}),
		"Balance": record(object{"wallet_id": walletIDSchema, "currency": currencySchema, "balance": amountSchema, "seq": seqSchema}),
		"Receipt": record(receipt), "TransferReceipt": record(transferReceipt),
		"Transaction": object{"oneOf": []any{record(with(receipt, transactionExtra)), record(with(transferReceipt, transactionExtra))}},
		"History": object{"type": "array", "items": with(record(object{
			"wallet_id": walletIDSchema, "seq": seqSchema, "transaction_id": textSchema, "kind": object{"enum": []string{kindDeposit, kindWithdrawal, kindTransferOut, kindTransferIn}},
			"currency": currencySchema, "amount": amountSchema, "balance_before": amountSchema, "balance_after": amountSchema, "idempotency_key": keySchema, "created_at": timeSchema,
		}), object{"additionalProperties": record(object{"wallet_id": walletIDSchema, "seq": seqSchema})})}, // counterparty, of a transfer
		"Problem": with(record(object{"type": textSchema, "title": textSchema, "status": object{"type": "integer"}, "code": textSchema, "detail": textSchema, "error": textSchema,
			"request_id": textSchema}), object{"additionalProperties": true}),
		"Status": record(object{"status": textSchema}), "Document": object{"type": "object"},
	}
	receipt = object{"transaction_id": textSchema, "wallet_id": walletIDSchema, "currency": currencySchema, "amount": amountSchema, "balance": amountSchema,
		"seq": seqSchema, "created_at": timeSchema}
	transferReceipt = object{"transaction_id": textSchema, "from_id": walletIDSchema, "to_id": walletIDSchema, "currency": currencySchema, "amount": amountSchema,
		"from_balance": amountSchema, "to_balance": amountSchema, "from_seq": seqSchema, "to_seq": seqSchema, "created_at": timeSchema}
	transactionExtra = object{"kind": object{"enum": []string{kindDeposit, kindWithdrawal, "transfer"}}, "idempotency_key": keySchema}
)

// record is the schema of an object that has all of these members and no others.
func record(members object) object {
	names := slices.Sorted(maps.Keys(members))
	return object{"type": "object", "properties": members, "required": names, "additionalProperties": false}
}

func with(a, b object) object {
	both := maps.Clone(a)
	maps.Copy(both, b)
	return both
}

// ---------------------------------------------------------------------------------------------------------------------
// Metrics, as Prometheus text
// ---------------------------------------------------------------------------------------------------------------------

// requestLabels are what requests are counted by.
type requestLabels struct {
	method, route string
	status        int
}

// observe counts a request. The method is a label only where it is one of ours: labels are bounded.
func (s *server) observe(path, method string, status int, took time.Duration) {
	if method != http.MethodGet && method != http.MethodPost {
		method = "other"
	}
	labels := requestLabels{method, path, status}
	h, ok := s.statistics.Load(labels)
	if !ok {
		fresh := metric.NewHistogram(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5)
		h, _ = s.statistics.LoadOrStore(labels, fresh)
	}
	h.(*metric.Histogram).Observe(took.Seconds())
}

func (s *server) writeMetrics(w *metric.Writer) {
	const help = "Requests by route and status, and how long they took."
	w.Histograms("wallet_http_request_seconds", help, func(yield func(string, *metric.Histogram) bool) {
		s.statistics.Range(func(key, h any) bool {
			is := key.(requestLabels)
			labels := fmt.Sprintf(`method="%s",route="%s",status="%d"`, is.method, is.route, is.status)
			return yield(labels, h.(*metric.Histogram))
		})
	})
}

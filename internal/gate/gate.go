// Package gate decides who gets in, and how much of them: API keys with scopes, a rate for each client, a
// bound on connections, a certificate.
//
// It touches key and certificate files, which it reads again when they change; a bad one leaves in force what
// was. Its state is bounded, however many clients come. Its errors say what is wrong; what to set instead,
// the program says that knows its settings.
package gate

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
)

// Scope is what a key may do: a set of bits.
type Scope uint8

const (
	Open Scope = 0 // open to all
	Read Scope = 1 << (iota - 1)
	Write
	Operate
)

var scopeNames = map[string]Scope{"read": Read, "write": Write, "operate": Operate}

// String names a scope of one bit.
func (s Scope) String() string {
	for name, scope := range scopeNames {
		if scope == s {
			return name
		}
	}
	return fmt.Sprintf("Scope(%d)", uint8(s))
}

// apiKey is one client's key. We keep only its SHA-256: a key is 26 random characters (MakeKey), so no
// dictionary finds it.
type apiKey struct {
	name   string // in the log
	scopes Scope
	hash   [sha256.Size]byte
}

// Keyring holds the keys in force. One without any key admits everybody to everything.
type Keyring struct {
	file   string
	inline string
	keys   atomic.Pointer[[]apiKey]
}

// NewKeyring reads keys from inline, comma-separated, and from a file, one a line; either may be empty.
func NewKeyring(inline, file string) (*Keyring, error) {
	k := &Keyring{inline: inline, file: file}
	return k, k.Load()
}

// Empty says that there is no key: nobody is asked for one.
func (k *Keyring) Empty() bool { return len(*k.keys.Load()) == 0 }

// ErrNoKeys says that a file of keys has none: it would open the service to everybody.
var ErrNoKeys = errors.New("the file has no keys")

// MalformedKey says which key, counted from 1, is not NAME:SCOPES:HASH.
type MalformedKey int

func (n MalformedKey) Error() string { return fmt.Sprintf("key %d is not NAME:SCOPES:HASH", int(n)) }

// Load reads the keys, at start and whenever the file changes; on an error the keys in force stay so. The
// error is ErrNoKeys, a MalformedKey, or the file's.
func (k *Keyring) Load() error {
	text := k.inline
	if k.file != "" {
		content, err := os.ReadFile(k.file)
		if err != nil {
			return err
		}
		text += "\n" + string(content)
	}
	keys, err := parseKeys(text)
	if err == nil && k.file != "" && len(keys) == 0 {
		err = ErrNoKeys
	}
	if err == nil {
		k.keys.Store(&keys)
	}
	return err
}

// parseKeys reads lines "name:scopes:hash", scopes joined by +, hash the key's SHA-256 in hex; # begins a
// comment.
func parseKeys(text string) (keys []apiKey, err error) {
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '\n' || r == ',' }) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		parts := strings.Split(line, ":")
		var key apiKey
		hash := []byte{}
		if len(parts) == 3 {
			key.name = parts[0]
			hash, err = hex.DecodeString(parts[2])
			for name := range strings.SplitSeq(parts[1], "+") {
				if scopeNames[name] == 0 {
					err = errors.New("unknown scope")
				}
				key.scopes |= scopeNames[name]
			}
		}
		if err != nil || len(hash) != sha256.Size || key.name == "" {
			return nil, MalformedKey(len(keys) + 1)
		}
		copy(key.hash[:], hash)
		keys = append(keys, key)
	}
	return keys, nil
}

// MakeKey makes a key, and the line that admits it. Its error says what is wrong with the name or the scopes.
func MakeKey(nameAndScopes string) (key, line string, err error) {
	name, scopes, _ := strings.Cut(nameAndScopes, ":")
	// It stands in logs, between colons, in lists with commas.
	if name == "" || strings.ContainsFunc(name, func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-._@", r)
	}) {
		return "", "", fmt.Errorf("%q is no client's name: it has letters, digits and -._@ only, no blanks",
			name)
	}
	for scope := range strings.SplitSeq(scopes, "+") {
		if scopeNames[scope] == 0 {
			return "", "", fmt.Errorf("%q is no scope: there are %s, joined by +", scope,
				strings.Join(slices.Sorted(maps.Keys(scopeNames)), ", "))
		}
	}
	key = rand.Text()
	line = fmt.Sprintf("%s:%x", nameAndScopes, sha256.Sum256([]byte(key)))
	_, err = parseKeys(line)
	return key, line, err
}

// ErrUnauthenticated says that a request carries no key of ours.
var ErrUnauthenticated = errors.New("no valid API key")

// ErrForbidden says that a request's key does not have the scope needed.
var ErrForbidden = errors.New("the API key lacks the scope")

// Admit names the client whose key a request carries, also where it is forbidden. Without keys, and where the
// scope is Open, the client is empty. Every key is compared, in constant time.
func (k *Keyring) Admit(h http.Header, needed Scope) (client string, err error) {
	keys := *k.keys.Load()
	if len(keys) == 0 || needed == Open {
		return "", nil
	}
	token, bearer := strings.CutPrefix(h.Get("Authorization"), "Bearer ")
	hash := sha256.Sum256([]byte(token))
	var found *apiKey
	for i := range keys {
		if subtle.ConstantTimeCompare(hash[:], keys[i].hash[:]) == 1 {
			found = &keys[i]
		}
	}
	switch {
	case !bearer || found == nil:
		return "", ErrUnauthenticated
	case found.scopes&needed == 0:
		return found.name, ErrForbidden
	}
	return found.name, nil
}

// Client is who sent a request: the peer, or, if that is a proxy of ours, whom it names. An IPv6
// client is its /64, which is what one client usually has.
func Client(r *http.Request, proxies []netip.Prefix) string {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return "unknown"
	}
	address := peer.Addr().Unmap()
	forwarded := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for i := len(forwarded) - 1; i >= 0; i-- {
		if !slices.ContainsFunc(proxies, func(p netip.Prefix) bool { return p.Contains(address) }) {
			break
		}
		next, err := netip.ParseAddr(strings.TrimSpace(forwarded[i]))
		if err != nil {
			break
		}
		address = next.Unmap()
	}
	if address.Is6() {
		prefix, _ := address.WithZone("").Prefix(64)
		return prefix.String()
	}
	return address.String()
}

// Limiter is a token bucket per client. Its state is bounded: clientsMax buckets, and one for all whom that
// leaves out.
type Limiter struct {
	rate, burst float64 // tokens a second; tokens at most

	mu      sync.Mutex
	clients map[string]*bucket
	swept   time.Time
}

type bucket struct {
	tokens float64
	at     time.Time
}

const clientsMax = 50_000

// NewLimiter makes a limiter of rate requests a second in the long run, and burst at once.
func NewLimiter(rate, burst float64) *Limiter {
	return &Limiter{rate: rate, burst: burst, clients: make(map[string]*bucket)}
}

// Rate is how many requests a second a client may send in the long run.
func (l *Limiter) Rate() float64 { return l.rate }

// Take takes a token, or says how long until there is one. The headers are those of
// draft-ietf-httpapi-ratelimit-headers-10.
func (l *Limiter) Take(client string, h http.Header) (wait time.Duration) {
	return l.spend(client, 1, 1, h)
}

// Charge takes so many tokens more, of a request that was let in. There need not be that many: the client is
// in debt then, until time has paid it.
func (l *Limiter) Charge(client string, tokens int, h http.Header) {
	l.spend(client, float64(tokens), math.Inf(-1), h)
}

// spend takes tokens where there are at least so many, or says how long until there are.
func (l *Limiter) spend(client string, tokens, least float64, h http.Header) (wait time.Duration) {
	now := time.Now()
	l.mu.Lock()
	b := l.clients[client]
	if b == nil {
		if len(l.clients) >= clientsMax && now.Sub(l.swept) > time.Second {
			l.swept = now
			for name, b := range l.clients {
				if b.tokens+now.Sub(b.at).Seconds()*l.rate >= l.burst {
					delete(l.clients, name) // full again: as good as new
				}
			}
		}
		if len(l.clients) >= clientsMax {
			client = ""
		}
		if b = l.clients[client]; b == nil {
			b = &bucket{l.burst, now}
			l.clients[client] = b
		}
	}
	b.tokens = min(l.burst, b.tokens+now.Sub(b.at).Seconds()*l.rate)
	b.at = now
	if b.tokens >= least {
		b.tokens -= tokens
	} else {
		wait = time.Duration((least - b.tokens) / l.rate * float64(time.Second))
	}
	left := max(b.tokens, 0)
	full := l.burst - b.tokens
	l.mu.Unlock()
	h.Set("RateLimit-Policy", fmt.Sprintf(`"default";q=%g;w=%g`, l.burst, math.Ceil(l.burst/l.rate)))
	h.Set("RateLimit", fmt.Sprintf(`"default";r=%d;t=%d`, int(left), int(math.Ceil(full/l.rate))))
	return wait
}

// limitedListener accepts at most so many connections at a time; the others wait in the kernel's queue.
type limitedListener struct {
	net.Listener
	slots chan struct{}
}

// Connections limits a listener to most connections at a time.
func Connections(l net.Listener, most int) net.Listener {
	return &limitedListener{l, make(chan struct{}, most)}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	l.slots <- struct{}{}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: conn, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// Certificate is a certificate and its key, as last read from their files.
type Certificate struct {
	certFile, keyFile string
	current           atomic.Pointer[tls.Certificate]
}

// LoadCertificate reads a certificate and its key from PEM files.
func LoadCertificate(certFile, keyFile string) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile}
	return c, c.Load()
}

// Load reads the files, which must belong together. On an error the certificate in force stays so.
func (c *Certificate) Load() error {
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err == nil {
		c.current.Store(&pair)
	}
	return err
}

// Config is TLS 1.2 or later with whichever certificate is in force at a handshake.
func (c *Certificate) Config() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
	}
}

// Watch calls load whenever one of the files has changed: a mounted Secret, a renewed certificate. A load
// that fails is logged, and tried again at the next change. It returns nil when ctx ends.
func Watch(ctx context.Context, every time.Duration, load func() error, files ...string) error {
	state := func() (s string) {
		for _, file := range files {
			if info, err := os.Stat(file); err == nil {
				s += fmt.Sprint(info.ModTime().UnixNano(), " ", info.Size(), " ")
			}
		}
		return s
	}
	for last := state(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
		if now := state(); now != last {
			last = now
			if err := load(); err != nil {
				slog.Error("changed files are not used", "files", files, "error", err)
			} else {
				slog.Info("changed files are in use", "files", files)
			}
		}
	}
}

// Server is an HTTP server whose timeouts let no slow client hold anything for long. An answer may take up to
// writeTimeout.
func Server(h http.Handler, writeTimeout time.Duration) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		// Clients that break off.
		ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
}

// Serve serves on a listener, by TLS where there is a certificate, until the server is shut down.
func Serve(server *http.Server, l net.Listener, certificate *Certificate) (err error) {
	if certificate != nil {
		server.TLSConfig = certificate.Config()
		err = server.ServeTLS(l, "", "")
	} else {
		err = server.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// Exposed says whether others can reach what listens on an address.
func Exposed(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip, notIP := netip.ParseAddr(host)
	loopback := host == "localhost" || notIP == nil && ip.IsLoopback()
	return err == nil && !loopback
}

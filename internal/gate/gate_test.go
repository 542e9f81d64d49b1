package gate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func hashed(name, scopes, key string) string {
	return fmt.Sprintf("%s:%s:%x", name, scopes, sha256.Sum256([]byte(key)))
}

// TestKeysRotate: a changed file counts without a restart; a broken one changes nothing.
func TestKeysRotate(t *testing.T) { synctest.Test(t, keysRotate) }

func keysRotate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys")
	// The bubble's clock and the disk's are two: each write gets a time of its own.
	written := time.Now()
	write := func(text string) {
		written = written.Add(time.Second)
		err := os.WriteFile(file, []byte(text), 0o600)
		if err = errors.Join(err, os.Chtimes(file, written, written)); err != nil {
			t.Fatal(err)
		}
	}
	seen := func() { time.Sleep(6 * time.Second); synctest.Wait() }
	write(hashed("old", "read", "old-key"))
	k, err := NewKeyring("", file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go Watch(ctx, 5*time.Second, k.Load, file)
	admitted := func(key string) bool {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header.Set("Authorization", "Bearer "+key)
		_, err := k.Admit(r.Header, Read)
		return err == nil
	}
	if !admitted("old-key") || admitted("new-key") {
		t.Fatal("the old key is not the only one")
	}
	synctest.Wait() // the watcher has looked once
	write(hashed("old", "read", "old-key") + "\n" + hashed("new", "read", "new-key"))
	seen()
	if !admitted("old-key") || !admitted("new-key") {
		t.Error("not both keys are admitted")
	}
	write("nonsense")
	seen()
	if !admitted("old-key") || !admitted("new-key") {
		t.Error("a broken file took keys away")
	}
	write("")
	seen()
	if !admitted("new-key") || admitted("none") {
		t.Error("an empty file opened the service, or took keys away")
	}
	write(hashed("new", "read", "new-key"))
	seen()
	if admitted("old-key") || !admitted("new-key") {
		t.Error("the old key is still admitted, or the new one is not")
	}
}

func TestNewKeyIsAdmitted(t *testing.T) {
	key, line, err := MakeKey("checkout:read+write")
	if err != nil {
		t.Fatal(err)
	}
	k, err := NewKeyring(line, "")
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set("Authorization", "Bearer "+key)
	if client, err := k.Admit(r.Header, Write); err != nil || client != "checkout" {
		t.Errorf("%q %v", client, err)
	}
	if strings.Contains(line, key) {
		t.Error("the line holds the key itself")
	}
	for bad, says := range map[string]string{
		"": `"" is no client's name`, ":read": `"" is no client's name`,
		"al ice:read": `"al ice" is no client's name`, "a,b:read": `"a,b" is no client's name`,
		"alice:reed": `"reed" is no scope: there are operate, read, write, joined by +`,
		"x":          `"" is no scope`, "x:": `"" is no scope`, "x:read+": `"" is no scope`,
		"a:b:c": `"b:c" is no scope`,
	} {
		if _, _, err := MakeKey(bad); err == nil || !strings.HasPrefix(err.Error(), says) {
			t.Errorf("a key for %q: %v", bad, err)
		}
	}
}

func TestClientAddress(t *testing.T) {
	proxies := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for _, c := range []struct {
		peer      string
		forwarded []string
		want      string
	}{
		{"192.0.2.1:5", nil, "192.0.2.1"},
		{"192.0.2.1:5", []string{"198.51.100.9"}, "192.0.2.1"}, // not from a proxy of ours: a claim
		{"10.0.0.1:5", []string{"198.51.100.9"}, "198.51.100.9"},
		// What the client claims stands further left.
		{"10.0.0.1:5", []string{"203.0.113.7, 198.51.100.9"}, "198.51.100.9"},
		{"10.0.0.1:5", []string{"203.0.113.7", "198.51.100.9, 10.0.0.2"}, "198.51.100.9"},
		{"10.0.0.1:5", []string{"nonsense"}, "10.0.0.1"},
		{"10.0.0.1:5", nil, "10.0.0.1"},
		{"[2001:db8::1:2:3]:5", nil, "2001:db8::/64"},
		{"[::ffff:192.0.2.1]:5", nil, "192.0.2.1"},
	} {
		r := &http.Request{RemoteAddr: c.peer, Header: http.Header{"X-Forwarded-For": c.forwarded}}
		if got := Client(r, proxies); got != c.want {
			t.Errorf("%s forwarded for %v: %s, want %s", c.peer, c.forwarded, got, c.want)
		}
	}
}

// TestLimiterStateIsBounded: a flood of addresses costs a bounded memory, and the clients it leaves out share
// one bucket.
func TestLimiterStateIsBounded(t *testing.T) {
	l := NewLimiter(.0001, 5) // so slow that no bucket is full again, however slow the machine
	h := make(http.Header)
	refused := 0
	for i := range clientsMax + 1000 {
		if l.Take(strconv.Itoa(i), h) > 0 {
			refused++
		}
	}
	if len(l.clients) > clientsMax+1 || refused < 900 {
		t.Errorf("%d buckets, %d refused", len(l.clients), refused)
	}
}

// What moves money in every way that there is, and what kills the replicas that do.

package consumers

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"wallet/dev/testbed"
)

const (
	clients = 4
	wallets = 40
	// pace keeps two cores free enough for the consumers to start: about 300 requests a second.
	pace = 12 * time.Millisecond
	// patience is for a replica that is being started again, and for one leader to follow another.
	patience = 20 * time.Second
)

// load sends requests to all replicas.
type load struct {
	t        *testing.T
	replicas []*testbed.Service
	keys     atomic.Int64
}

type fields map[string]any

// answer has what further requests need.
type answer struct {
	TransactionID string `json:"transaction_id"`
	HoldID        string `json:"hold_id"`
	Code          string `json:"code"`
}

// send sends a request, again and again with the same key while it may not have been done. It is refused
// where the code is not empty: that is no fault of a load that draws at random.
func (l *load) send(dice *rand.Rand, path string, body fields) (a answer) {
	body["idempotency_key"] = fmt.Sprintf("k%d", l.keys.Add(1))
	text, _ := json.Marshal(body)
	web := http.Client{Timeout: 3 * time.Second}
	var err error
	var response *http.Response
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(pace) {
		one := l.replicas[dice.IntN(len(l.replicas))]
		response, err = web.Post(one.URL+"/v1/"+path, "application/json", bytes.NewReader(text))
		if err != nil {
			continue
		}
		a = answer{}
		err = json.NewDecoder(response.Body).Decode(&a)
		response.Body.Close()
		if err != nil || response.StatusCode == http.StatusServiceUnavailable {
			continue
		}
		if response.StatusCode >= 500 {
			l.t.Errorf("%s %s: %s", path, text, response.Status)
		}
		return a
	}
	l.t.Errorf("%s %s: not answered within %v: %v", path, text, patience, err)
	return answer{}
}

// client does one thing after the other.
func (l *load) client(dice *rand.Rand, until time.Time) {
	var holds, transactions []string
	one := func(of []string) string { return of[len(of)-1-dice.IntN(min(len(of), 10))] } // a late one
	done := func(a answer) {
		if a.TransactionID != "" {
			transactions = append(transactions, a.TransactionID)
		}
	}
	for ; time.Now().Before(until); time.Sleep(time.Duration(dice.Int64N(int64(2 * pace)))) {
		wallet, other := 1+dice.IntN(wallets), 1+dice.IntN(wallets)
		path := func(route string) string { return fmt.Sprintf("wallets/%d/%s", wallet, route) }
		body := fields{"amount": fmt.Sprintf("%d.%02d", dice.IntN(50), 1+dice.IntN(99))}
		switch what := dice.IntN(100); {
		case what < 25:
			body["amount"] = fmt.Sprintf("%d.%02d", dice.IntN(400), 1+dice.IntN(99))
			done(l.send(dice, path("deposit"), body))
		case what < 35:
			done(l.send(dice, path("withdraw"), body))
		case what < 55:
			body["to_id"] = other
			if other != wallet {
				done(l.send(dice, path("transfer"), body))
			}
		case what < 70:
			body["expires_in"] = []string{"1s", "1h", "1h"}[dice.IntN(3)]
			if other != wallet && dice.IntN(2) == 0 {
				body["to_id"] = other
			}
			if a := l.send(dice, path("holds"), body); a.HoldID != "" {
				holds = append(holds, a.HoldID)
			}
		case what < 82 && len(holds) > 0:
			body["final"] = dice.IntN(2) == 0
			if dice.IntN(3) == 0 {
				delete(body, "amount")
			}
			done(l.send(dice, "holds/"+one(holds)+"/capture", body))
		case what < 86 && len(holds) > 0:
			l.send(dice, "holds/"+one(holds)+"/void", fields{})
		case what < 96 && len(transactions) > 0:
			if dice.IntN(3) == 0 {
				delete(body, "amount")
			}
			l.send(dice, "transactions/"+one(transactions)+"/reverse", body)
		case what >= 96:
			state := []string{"no_out", "frozen"}[dice.IntN(2)]
			l.send(dice, path("state"), fields{"state": state, "note": "a while"})
			time.Sleep(time.Duration(dice.Int64N(int64(100 * time.Millisecond))))
			l.send(dice, path("state"), fields{"state": "open"})
		}
	}
}

// killReplicas kills one replica after the other: a leader that dies leaves a Kafka transaction open, whose
// records its successor aborts.
func (l *load) killReplicas(dice *rand.Rand, until time.Time) {
	for i := 0; time.Until(until) > 5*time.Second; i++ {
		time.Sleep(time.Second + time.Duration(dice.Int64N(int64(2*time.Second))))
		one := l.replicas[i%len(l.replicas)]
		one.Kill()
		one.Start(l.t)
		if !one.IsReady(30 * time.Second) {
			l.t.Errorf("%s is not ready, see %s", one.Name, one.Log)
			return
		}
	}
}

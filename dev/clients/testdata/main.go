// The client that oapi-codegen makes, in use: see ../clients_test.go.
package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	api "walletclient/walletapi"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func demand(ok bool, what string, seen ...any) {
	if !ok {
		panic(fmt.Sprint(what, ": ", seen))
	}
}

func to[T any](value T) *T { return &value }

func main() {
	ctx := context.Background()
	key := func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+os.Getenv("WALLET_KEY"))
		return nil
	}
	c := must(api.NewClientWithResponses(os.Getenv("WALLET_URL"), api.WithRequestEditorFn(key)))
	keys := 0
	next := func() *string { keys++; return to(fmt.Sprint("go-", keys)) }
	create := func() int64 {
		w := must(c.CreateWalletWithResponse(ctx, &api.CreateWalletParams{IdempotencyKey: next()},
			api.CreateWalletRequest{Currency: to("USD")}))
		demand(w.JSON201 != nil, "create", string(w.Body))
		return w.JSON201.WalletId
	}
	payer, payee, rich := create(), create(), create()

	deposit := func(wallet int64, amount string) *api.DepositResponse {
		d := must(c.DepositWithResponse(ctx, wallet, &api.DepositParams{IdempotencyKey: to("d")},
			api.DepositRequest{Amount: amount, Reference: to("invoice 7"),
				Metadata: &map[string]string{"cart": "c-19"}}))
		demand(d.JSON200 != nil && d.JSON200.Amount == amount && d.JSON200.Balance == amount, "deposit",
			string(d.Body))
		b := must(c.GetBalanceWithResponse(ctx, wallet, &api.GetBalanceParams{CacheControl: to("no-cache")}))
		demand(b.JSON200 != nil && b.JSON200.Balance == amount, "balance", string(b.Body))
		return d
	}
	first := deposit(payer, "16777217.25")
	deposit(rich, "98765432109876543210")
	again := deposit(payer, "16777217.25")
	demand(again.JSON200.TransactionId == first.JSON200.TransactionId &&
		again.HTTPResponse.Header.Get("Idempotent-Replayed") == "true", "a retry", again.HTTPResponse.Header)

	transfer := must(c.TransferWithResponse(ctx, payer, &api.TransferParams{IdempotencyKey: next()},
		api.TransferRequest{ToId: payee, Amount: "10.50"}))
	demand(transfer.JSON200 != nil && transfer.JSON200.ToBalance == "10.5", "transfer", string(transfer.Body))

	hold := func(to *int64) string {
		h := must(c.PlaceHoldWithResponse(ctx, payer, &api.PlaceHoldParams{IdempotencyKey: next()},
			api.PlaceHoldRequest{Amount: "5", ToId: to}))
		demand(h.JSON201 != nil && h.JSON201.Held == "5", "hold", string(h.Body))
		return h.JSON201.HoldId
	}
	capture := func(hold string, body api.CaptureHoldRequest) *api.Capture {
		params := &api.CaptureHoldParams{IdempotencyKey: next()}
		got := must(c.CaptureHoldWithResponse(ctx, hold, params, body))
		demand(got.JSON200 != nil, "capture", string(got.Body))
		return got.JSON200
	}
	taken := capture(hold(nil), api.CaptureHoldRequest{Amount: to("3")})
	demand(taken.WalletId != nil && *taken.WalletId == payer && taken.FromId == nil && taken.Held == "0",
		"a captured withdrawal", taken)
	paid := capture(hold(&payee), api.CaptureHoldRequest{})
	demand(paid.FromId != nil && *paid.ToId == payee && paid.Amount == "5", "a captured transfer", paid)

	var entries []api.Entry
	page := &api.GetHistoryParams{Limit: to(4)}
	for page != nil {
		h := must(c.GetHistoryWithResponse(ctx, payer, page))
		demand(h.JSON200 != nil, "history", string(h.Body))
		entries, page = append(entries, *h.JSON200...), nil
		if target, _, ok := strings.Cut(strings.TrimPrefix(h.HTTPResponse.Header.Get("Link"), "<"), ">"); ok {
			cursor := must(url.Parse(target)).Query().Get("cursor")
			page = &api.GetHistoryParams{Limit: to(4), Cursor: &cursor}
		}
	}
	demand(len(entries) == 6, "history", entries)
	for i, e := range entries {
		demand(e.Seq == int64(i+1), "the history's order", entries)
	}
	out := entries[1]
	demand(out.Kind == api.EntryKindTransferOut && out.Amount == "-10.5" &&
		out.Counterparty.WalletId == payee, "a transfer's entry", out)

	transaction := func(id string) any {
		seen := must(c.GetTransactionWithResponse(ctx, id))
		demand(seen.JSON200 != nil, "a transaction", string(seen.Body))
		return must(seen.JSON200.ValueByDiscriminator())
	}
	m := transaction(transfer.JSON200.TransactionId)
	t, ok := m.(api.Transfer)
	demand(ok && t.ToId == payee, "a transfer", m)
	m = transaction(first.JSON200.TransactionId)
	d, ok := m.(api.Movement)
	demand(ok && d.Amount == "16777217.25" && (*d.Metadata)["cart"] == "c-19", "a deposit", m)

	var both [2]api.BatchOperation
	must(0, both[0].FromDepositOperation(api.DepositOperation{WalletId: payer, Amount: "1"}))
	must(0, both[1].FromTransferOperation(api.TransferOperation{WalletId: payer, ToId: payee, Amount: "1"}))
	batch := must(c.PostBatchWithResponse(ctx, &api.PostBatchParams{IdempotencyKey: next()},
		api.PostBatchRequest{Operations: both[:]}))
	demand(batch.JSON200 != nil && len(batch.JSON200.Results) == 2, "a batch", string(batch.Body))

	no := must(c.WithdrawWithResponse(ctx, payee, &api.WithdrawParams{IdempotencyKey: next()},
		api.WithdrawRequest{Amount: "1000"}))
	problem := no.ApplicationproblemJSON422
	demand(problem != nil && problem.Code == api.ProblemCodeInsufficientFunds && problem.Detail != "",
		"a refusal", string(no.Body))
	fmt.Println("ok")
}

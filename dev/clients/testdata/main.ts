// The client of openapi-typescript and openapi-fetch, in use: see ../clients_test.go.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const api = createClient<paths>({
  baseUrl: process.env.WALLET_URL!,
  headers: { Authorization: `Bearer ${process.env.WALLET_KEY}` },
});

function demand(ok: boolean, what: string, seen?: unknown): asserts ok {
  if (!ok) throw new Error(`${what}: ${JSON.stringify(seen)}`);
}

let keys = 0;
const header = () => ({ "Idempotency-Key": `ts-${++keys}` });

async function create(): Promise<number> {
  const { data, error } = await api.POST("/v1/wallets", {
    params: { header: header() },
    body: { currency: "USD" },
  });
  demand(data !== undefined, "create", error);
  return data.wallet_id;
}
const payer = await create();
const payee = await create();
const rich = await create();

async function deposit(id: number, amount: string) {
  const { data, error, response } = await api.POST("/v1/wallets/{id}/deposit", {
    params: { path: { id }, header: { "Idempotency-Key": "d" } },
    body: { amount, reference: "invoice 7", metadata: { cart: "c-19" } },
  });
  demand(data !== undefined && data.amount === amount && data.balance === amount, "deposit", error);
  const balance = await api.GET("/v1/wallets/{id}/balance", {
    params: { path: { id }, header: { "Cache-Control": "no-cache" } },
  });
  demand(balance.data?.balance === amount, "balance", balance);
  return { id: data.transaction_id, replayed: response.headers.get("Idempotent-Replayed") };
}
const first = await deposit(payer, "16777217.25");
await deposit(rich, "98765432109876543210");
const again = await deposit(payer, "16777217.25");
demand(again.id === first.id && again.replayed === "true", "a retry", again);

const transfer = await api.POST("/v1/wallets/{id}/transfer", {
  params: { path: { id: payer }, header: header() },
  body: { to_id: payee, amount: "10.50" },
});
demand(transfer.data?.to_balance === "10.5", "transfer", transfer);

async function hold(to_id?: number): Promise<string> {
  const { data, error } = await api.POST("/v1/wallets/{id}/holds", {
    params: { path: { id: payer }, header: header() },
    body: { amount: "5", to_id },
  });
  demand(data?.held === "5", "hold", error);
  return data.hold_id;
}
async function capture(hold_id: string, body: components["schemas"]["CaptureHoldRequest"]) {
  const { data, error } = await api.POST("/v1/holds/{hold_id}/capture", {
    params: { path: { hold_id }, header: header() },
    body,
  });
  demand(data !== undefined, "capture", error);
  return data;
}
const taken = await capture(await hold(), { amount: "3" });
demand(taken.wallet_id === payer && taken.from_id === undefined && taken.held === "0", "a withdrawal", taken);
const paid = await capture(await hold(payee), {});
demand(paid.to_id === payee && paid.amount === "5", "a captured transfer", paid);

const entries: components["schemas"]["Entry"][] = [];
for (let cursor: string | undefined, more = true; more; more = cursor !== undefined) {
  const { data, error, response } = await api.GET("/v1/wallets/{id}/history", {
    params: { path: { id: payer }, query: { limit: 4, cursor } },
  });
  demand(data !== undefined, "history", error);
  entries.push(...data);
  const next = response.headers.get("Link")?.match(/<([^>]*)>/)?.[1];
  cursor = next === undefined ? undefined : new URL(next, process.env.WALLET_URL).searchParams.get("cursor")!;
}
demand(entries.length === 6 && entries.every((e, i) => e.seq === i + 1), "history", entries);
const out = entries[1]!;
demand(out.kind === "transfer_out" && out.amount === "-10.5", "a transfer's entry", out);
demand(out.counterparty?.wallet_id === payee, "its counterparty", out);
// @ts-expect-error an entry has no such member: a slip of the pen must not compile
out.ballance;

async function transaction(id: string) {
  const { data, error } = await api.GET("/v1/transactions/{id}", { params: { path: { id } } });
  demand(data !== undefined, "transaction", error);
  return data;
}
const moved = await transaction(transfer.data.transaction_id);
demand(moved.kind === "transfer" && moved.to_id === payee, "a transfer", moved);
const came = await transaction(first.id);
demand(came.kind === "deposit" && came.amount === "16777217.25", "a deposit", came);
demand(came.metadata?.cart === "c-19", "its metadata", came);

const batch = await api.POST("/v1/batches", {
  params: { header: header() },
  body: {
    operations: [
      { op: "deposit", wallet_id: payer, amount: "1" },
      { op: "transfer", wallet_id: payer, to_id: payee, amount: "1" },
    ],
  },
});
demand(batch.data?.results.length === 2, "a batch", batch);

const no = await api.POST("/v1/wallets/{id}/withdraw", {
  params: { path: { id: payee }, header: header() },
  body: { amount: "1000" },
});
demand(no.error?.code === "insufficient_funds" && no.error.detail !== "", "a refusal", no);
// @ts-expect-error codes are a closed set
demand(no.error.code !== "insufficient_founds", "a code");
console.log("ok");

// The operators' page: asks for /status.json once a second and shows it. What moves is the difference of two
// snapshots; the server keeps no history. The API key stays in a variable: a reload forgets it.
"use strict";

const windowSeconds = 5, sparkPoints = 120;
const el = (id) => document.getElementById(id);

let key = "", amounts = false;
let snapshots = [];             // of the last windowSeconds, the newest last
let timer = 0, asking = false;
let lostSince = null;           // when this replica was first found not to answer
const lines = { movements: [], lag: [] };

// ------------------------------------------------------------------------------------------------ numbers

const metric = (s, name) => s.metrics[name];
// One sample; undefined where there is none.
const sample = (s, name, label) => {
  const m = metric(s, name);
  return label === undefined || m === undefined ? m : m[label];
};
const newest = () => snapshots[snapshots.length - 1];
const oldest = () => snapshots[0];
const seconds = () => newest().uptime_seconds - oldest().uptime_seconds;

// How much a counter rose a second within the window; undefined before there are two snapshots.
function rate(name, label) {
  const now = sample(newest(), name, label);
  if (now === undefined || seconds() <= 0) return undefined;
  return (now - (sample(oldest(), name, label) || 0)) / seconds();
}

// What a histogram counted within the window: of all label sets that want() takes.
function counted(name, want) {
  const sum = { bounds: [], counts: [], total: 0, sum: 0 };
  const add = (h, sign) => {
    sum.bounds = h.bounds;
    h.counts.forEach((n, i) => {
      sum.counts[i] = (sum.counts[i] || 0) + sign * n;
      sum.total += sign * n;
    });
    sum.sum += sign * h.sum;
  };
  for (const [s, sign] of [[newest(), 1], [oldest(), -1]]) {
    const m = metric(s, name);
    if (m === undefined) continue;
    if (m.bounds) add(m, sign);
    else for (const [labels, h] of Object.entries(m)) if (want(labels)) add(h, sign);
  }
  return sum;
}

// The value below which a part q of what was counted lies, by its bucket, as Prometheus does it; undefined
// where nothing was.
function quantile(h, q) {
  let below = 0;
  for (let i = 0; i < h.counts.length && h.total > 0; i++) {
    if (below + h.counts[i] >= q * h.total && h.counts[i] > 0) {
      if (i === h.bounds.length) return Infinity;
      const from = i === 0 ? 0 : h.bounds[i - 1];
      return from + (h.bounds[i] - from) * (q * h.total - below) / h.counts[i];
    }
    below += h.counts[i];
  }
  return undefined;
}

const isWrite = (labels) => /^method="POST",route="\/v1\/.*",status="2/.test(labels);
const isRead = (labels) => /^method="GET",route="\/v1\/.*",status="2/.test(labels);

// The one label that is 1, such as the state of state="leader".
function present(name) {
  for (const [labels, v] of Object.entries(metric(newest(), name) || {})) {
    if (v === 1) return labels.replace(/^[a-z]+="|"$/g, "");
  }
  return undefined;
}

// -------------------------------------------------------------------------------------------------- words

const none = "–";
const count = (n) => n === undefined ? none : n >= 100 || Number.isInteger(n) ?
  Math.round(n).toLocaleString("en") : n.toFixed(n >= 10 ? 1 : 2);
const duration = (s) => {
  if (s === undefined) return none;
  if (s === Infinity) return "beyond 5 s";
  if (s >= 3600) return `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;
  if (s >= 60) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  return s >= 1 ? `${s.toFixed(1)} s` : s === 0 ? "0 s" : `${(s * 1000).toPrecision(2)} ms`;
};
const bytes = (n) => {
  if (n === undefined) return none;
  let unit = 0;
  for (; n >= 1000 && unit < 4; unit++) n /= 1000;
  return `${unit === 0 || n >= 100 ? Math.round(n) : n.toFixed(1)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
};
const lsn = (n) => n === undefined ? none :
  `${Math.floor(n / 2 ** 32).toString(16)}/${(n % 2 ** 32).toString(16)}`.toUpperCase();
const clock = (date) => date.toTimeString().slice(0, 8);

const states = {
  leader: "This replica leads", standby: "Another replica leads", recovering: "Recovering from the ledger",
  starting: "Starting", refused: "Refused", stopped: "Stopped",
};

// What is off at this moment: id, how many snapshots in a row it must be so, title, what to do, where
// docs/operate.md says more (one of its headings), and the numbers that it concerns.
function findings() {
  const s = newest(), found = [];
  const add = (id, hold, title, text, see, ...marks) => found.push({ id, hold, title, text, see, marks });
  const refusing = (code) => rate("wallet_http_refusals_total", `code="${code}"`) > 0;
  const state = present("wallet_relay_state"), slot = present("wallet_relay_slot");
  const silent = sample(s, "wallet_relay_kafka_silent_seconds"), kafkaAway = silent > 2;
  const lag = sample(s, "wallet_relay_lag_seconds");

  if (s.phase === "starting") {
    add("starting", 2, "This replica waits for its database.",
      "It is alive and not ready. The log says what it waits for.", "503s");
  }
  if (state === undefined) {
    add("no-relay", 1, "This service runs without a relay.",
      "No event leaves the database. Set KAFKA_BROKERS.", "No relay leads");
  } else if (s.refusal) {
    add("refused", 1, "The relay refuses to publish.",
      `It needs you: ${s.refusal}. It tries again every 15 s.`, "The relay refuses", "relay-state");
  } else if (kafkaAway) {
    const since = clock(new Date(Date.parse(s.at) - silent * 1000));
    add("kafka", 2, `Kafka is away since ${since}.`, "Nothing is lost: Postgres keeps the WAL for the " +
      "slot, and the relay catches up by itself. Mend Kafka.", "The lag grows", "kafka", "lag",
      "lag-bytes");
  } else if (slot !== undefined && sample(s, "wallet_relay_slot_active") === 0 && state !== "leader") {
    add("no-leader", 4, "No relay leads.", "Events wait in Postgres, none is lost. The log line \"relay " +
      "starts over\" of each replica says why.", "No relay leads", "relay-state");
  } else if (lag > 2) {
    add("lag", 2, "Events are behind.", "Kafka is slow, or one huge transaction is on its way. Nothing is " +
      "lost, and the relay catches up by itself.", "The lag grows", "lag");
  }
  if (sample(s, "wallet_relay_stuck_partitions") > 0) {
    add("stuck", 1, "Consumers are held back.", "A Kafka transaction is open that nobody ends. The log " +
      "names it, with the command that ends it.", "Consumers are held back", "kafka");
  }
  if (state !== undefined && slot === undefined) {
    add("postgres", 2, "Postgres does not answer.", "Clients get 503 and lose nothing: they send the same " +
      "request with the same key again. Mend Postgres.", "503s", "slot", "outbox");
  }
  if (["lost", "unreserved", "missing"].includes(slot)) {
    add("slot", 3, slot === "unreserved" ? "The slot is about to be lost." : "The slot is lost.",
      "There is nothing to do: the next leader makes it anew, and publishes what is missing. Look why it " +
      "happened.", "The slot is lost", "slot");
  }
  if (sample(s, "wallet_relay_slot_retained_bytes") > 1e9 || sample(s, "wallet_outbox_bytes") > 20e9) {
    add("disk", 2, "The disk fills.", "The relay is behind, or OUTBOX_RETENTION is longer than the disk " +
      "allows.", "The disk fills", "retained", "outbox");
  }
  if (sample(s, "wallet_outbox_partitions") < 3) {
    add("partitions", 2, "The outbox runs out of partitions.", "Without one for the present hour no write " +
      "succeeds. The log's line \"upkeep failed\" says why none is made.", "The outbox has no partition",
      "partitions");
  }
  if (sample(s, "wallet_cache_in_use") === 0) {
    add("cache", 2, "The cache is not in use.", "Balances come from Postgres until Redis is back. There is " +
      "nothing to do but to mend Redis.", "Redis is away", "cache-state");
  }
  if (refusing("overloaded")) {
    add("overloaded", 1, "Requests are refused, since too many wait.", "Writes reach what Postgres " +
      "carries: see how long a batch takes. Clients lose nothing: they try again.", "503s", "queue",
      "refusals-rate");
  } else if (sample(s, "wallet_queue_operations") > sample(s, "wallet_queue_operations_max") / 2) {
    add("queue", 2, "The queue fills.", "Writes reach what Postgres carries: see how long a batch takes. " +
      "When it is full, further writes are answered 503.", "503s", "queue");
  }
  if (refusing("unavailable")) {
    add("unavailable", 1, "Requests are not served.", "Postgres is away, or too slow. The log's line " +
      "\"batch is run again\" has each error. Clients lose nothing: they try again.", "503s",
      "refusals-rate");
  }
  if (refusing("internal")) {
    add("internal", 1, "Requests fail by a fault of ours.", "The log's line \"request failed\" with the " +
      "same request id has the whole error.", "What to watch", "refusals-rate");
  }
  return found;
}

// ------------------------------------------------------------------------------------------------ showing

// Only what has changed is touched: a screen reader's place is kept, and a live region is silent.
const text = (node, value) => { if (node.textContent !== value) node.textContent = value; };
const hide = (node, yes) => { if (node.hidden !== yes) node.hidden = yes; };
const set = (id, value) => text(el(id), value);

// One row an item, its cells' texts.
function rows(body, items) {
  while (body.rows.length > items.length) body.deleteRow(-1);
  items.forEach((cells, i) => {
    const row = body.rows[i] || body.insertRow();
    while (row.cells.length > cells.length) row.deleteCell(-1);
    cells.forEach((value, j) => text(row.cells[j] || row.insertCell(), value));
  });
}

function draw(id, points) {
  const most = Math.max(...points, 1e-9);
  const from = sparkPoints - points.length;
  const at = (v, i) => `${from + i},${(29 - 28 * v / most).toFixed(1)}`;
  el(id).setAttribute("points", points.map(at).join(" "));
}

// What was found, by id: for how many snapshots in a row, and for how many it has been gone. A finding is
// shown when it has held, and stays until it is gone for two: so words do not flicker.
const held = new Map();

function settle(found) {
  for (const f of found) {
    const before = held.get(f.id);
    // A title or text with a time in it is that of the first sight; the relay's own words may change.
    const first = before && f.id !== "refused" ? before.finding : f;
    held.set(f.id, { finding: first, seen: (before ? before.seen : 0) + 1, gone: 0 });
  }
  for (const [id, h] of held) {
    if (!found.some((f) => f.id === id) && ++h.gone > 1) held.delete(id);
  }
  return [...held.values()].filter((h) => h.seen >= h.finding.hold).map((h) => h.finding);
}

function say(found, well) {
  const verdict = el("verdict"), list = el("advice");
  verdict.classList.toggle("off", found.length > 0);
  text(verdict, found.length > 0 ? found.map((f) => f.title).join(" ") : well);
  const title = (found.length > 0 ? "⚠ " : "") + "wallet " + location.host;
  if (document.title !== title) document.title = title;
  hide(list, found.length === 0);
  while (list.children.length > found.length) list.lastChild.remove();
  found.forEach((f, i) => {
    const item = list.children[i] || list.appendChild(document.createElement("li"));
    text(item, `${f.title} ${f.text}` + (f.see ? ` See docs/operate.md, “${f.see}”.` : ""));
  });
  const marked = new Set(found.flatMap((f) => f.marks || []));
  for (const node of document.querySelectorAll(".attend")) {
    if (!marked.has(node.id)) node.classList.remove("attend");
  }
  marked.forEach((id) => el(id).classList.add("attend"));
}

function show(s) {
  const build = Object.keys(metric(s, "wallet_build_info") || {})[0] || "";
  set("about", `Version ${build.replace(/^version="|"$/g, "")}, ${s.phase} for ${
    duration(Math.floor(s.uptime_seconds / 60) * 60 || s.uptime_seconds)}`);

  const movements = rate("wallet_operations_total");
  const writes = counted("wallet_http_request_seconds", isWrite);
  const reads = counted("wallet_http_request_seconds", isRead);
  const perSecond = (h) => seconds() > 0 ? h.total / seconds() : undefined;
  set("movements-rate", count(movements));
  set("write-p50", duration(quantile(writes, .5)));
  set("write-p99", duration(quantile(writes, .99)));
  set("reads-rate", count(perSecond(reads)));
  set("read-p50", duration(quantile(reads, .5)));
  set("read-p99", duration(quantile(reads, .99)));

  const sizes = counted("wallet_batch_operations"), commits = counted("wallet_batch_seconds");
  set("batch-mean", sizes.total > 0 ? count(sizes.sum / sizes.total) : none);
  for (const [id, q] of [["batch-p50", .5], ["batch-p99", .99]]) {
    const size = quantile(sizes, q);
    set(id, size === undefined ? none : size === Infinity ? `beyond ${sizes.bounds.at(-1)}` :
      count(Math.ceil(size)));
  }
  set("batch-rate", count(perSecond(sizes)));
  set("commit-p50", duration(quantile(commits, .5)));
  set("commit-p99", duration(quantile(commits, .99)));
  set("reruns", count(sample(s, "wallet_batch_reruns_total")));
  set("queue", `${count(sample(s, "wallet_queue_operations"))} of ${
    count(sample(s, "wallet_queue_operations_max"))}`);

  const inUse = sample(s, "wallet_cache_in_use");
  set("cache-state", inUse === undefined ? "None is set" : inUse ? "In use" : "Not in use");
  const hits = rate("wallet_cache_lookups_total", 'result="hit"');
  const misses = rate("wallet_cache_lookups_total", 'result="miss"');
  set("cache-hits", hits + misses > 0 ? `${(100 * hits / (hits + misses)).toFixed(1)} %` : none);
  set("cache-rate", inUse === undefined ? none : count(hits + misses || 0));
  set("cache-errors", count(sample(s, "wallet_cache_errors_total")));
  set("cache-generations", count(sample(s, "wallet_cache_generations_total")));

  const state = present("wallet_relay_state"), active = sample(s, "wallet_relay_slot_active");
  const lag = sample(s, "wallet_relay_lag_seconds");
  set("relay-state", state === undefined ? "None" :
    state === "starting" && active === 1 ? "Another replica leads" : states[state]);
  let before;
  for (const of of ["end", "received", "published", "confirmed"]) {
    const at = sample(s, "wallet_relay_position_bytes", `of="${of}"`);
    set("at-" + of, lsn(at));
    set("behind-" + of, before === undefined || at === undefined ? "\u00a0" :
      at >= before ? "level" : `${bytes(before - at)} behind`);
    before = at === undefined ? before : at;
  }
  set("lag", state === "leader" || lag > 0 ? duration(lag) : none);
  set("lag-bytes", bytes(sample(s, "wallet_relay_lag_bytes")));
  set("events-rate", count(rate("wallet_relay_events_total")));
  set("kafka", duration(sample(s, "wallet_relay_kafka_silent_seconds")));
  set("txn", duration(sample(s, "wallet_relay_last_batch_seconds") || undefined));
  set("slot", (present("wallet_relay_slot") || none) +
    (active === undefined ? "" : active ? ", held" : ", free"));
  set("retained", bytes(sample(s, "wallet_relay_slot_retained_bytes")));
  set("outbox", bytes(sample(s, "wallet_outbox_bytes")));
  set("partitions", count(sample(s, "wallet_outbox_partitions")));
  set("takeovers", `${count(sample(s, "wallet_relay_takeovers_total"))}, ${
    count(sample(s, "wallet_relay_recoveries_total"))}`);

  const refused = Object.entries(metric(s, "wallet_http_refusals_total") || {}).filter(([, n]) => n > 0)
    .map(([label, n]) =>
      [label.replace(/^code="|"$/g, ""), rate("wallet_http_refusals_total", label) || 0, n]);
  refused.sort((a, b) => b[1] - a[1] || b[2] - a[2] || (a[0] < b[0] ? -1 : 1));
  set("refusals-rate", seconds() > 0 ? count(refused.reduce((sum, r) => sum + r[1], 0)) : none);
  rows(el("refused"), refused.map(([code, a, all]) => [code, count(a), count(all)]));
  hide(el("no-refusals"), refused.length > 0);

  hide(el("amount-head"), !amounts);
  rows(el("published"), s.events.map((e) => [e.id, e.kind || none,
    ...(amounts ? [e.amount === undefined ? none : `${e.amount} ${e.currency}`] : []),
    clock(new Date(e.published_at))]));
  hide(el("no-events"), s.events.length > 0);

  lines.movements.push(movements || 0);
  lines.lag.push(sample(s, "wallet_relay_lag_bytes") || 0);
  for (const points of Object.values(lines)) while (points.length > sparkPoints) points.shift();
  draw("movements-spark", lines.movements);
  draw("lag-spark", lines.lag);

  say(settle(findings()), "All is well." +
    (s.phase === "stopping" ? " This replica stops." : state === "leader" ? " This replica leads." :
      active === 1 ? " Another replica leads." : ""));
}

// ------------------------------------------------------------------------------------------------- asking

function take(s) {
  const last = newest();
  // After a restart, or a while in which nobody looked, the former numbers say nothing.
  if (last && (s.uptime_seconds < last.uptime_seconds || s.uptime_seconds > last.uptime_seconds + 10)) {
    snapshots = [];
  }
  if (last && s.uptime_seconds === last.uptime_seconds) snapshots.pop();
  snapshots.push(s);
  while (snapshots.length > 2 && seconds() > windowSeconds + .5) snapshots.shift();
}

// Asks for the key, and asks this replica nothing until there is one.
function lock(words) {
  key = "";
  snapshots = [];
  held.clear();
  el("cards").hidden = el("forget").hidden = true;
  rows(el("published"), []);
  el("door").hidden = false;
  say([], words);
  el("key").focus();
}

async function ask() {
  const asked = key;
  const headers = key === "" ? {} : { Authorization: "Bearer " + key };
  const response = await fetch("status.json" + (amounts ? "?private=1" : ""), {
    headers, cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(5000),
  });
  const body = await response.json();
  lostSince = null;
  if (asked !== key) return; // forgotten or replaced meanwhile
  if (response.ok) {
    hide(el("door"), true);
    hide(el("cards"), false);
    hide(el("forget"), key === "");
    take(body);
    show(body);
  } else if (response.status === 403 && amounts) {
    amounts = el("amounts").checked = false;
    set("amounts-no", "This key does not have the scope read.");
  } else if (response.status === 401 || response.status === 403) {
    lock(key === "" ? "A key is needed." : `This key does not do: ${body.detail}`);
  } else {
    say([{ title: "This replica refuses to tell.", text: body.detail, see: "503s" }]);
  }
}

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden || !el("door").hidden) return;
  asking = true;
  const began = performance.now();
  try {
    await ask();
  } catch {
    lostSince = lostSince || new Date();
    held.clear();
    say([{ title: `This replica does not answer since ${clock(lostSince)}.`,
      text: "What stands below is what it said last. Look at the page of another replica, and whether this " +
        "process runs. This page goes on asking." }]);
  } finally {
    asking = false;
  }
  timer = setTimeout(poll, Math.max(0, 1000 - (performance.now() - began)));
}

el("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = el("key").value.trim();
  el("key").value = "";
  el("door").hidden = true;
  text(el("verdict"), "Asking this replica.");
  poll();
});
el("forget").addEventListener("click", () => {
  lock("The key is forgotten.");
});
el("amounts").addEventListener("change", () => {
  amounts = el("amounts").checked;
  set("amounts-no", "");
  poll();
});
document.addEventListener("visibilitychange", poll);

set("host", location.host);
if (document.documentElement.hasAttribute("data-key")) {
  el("amounts-need").hidden = false;
  lock("A key is needed.");
} else {
  poll();
}

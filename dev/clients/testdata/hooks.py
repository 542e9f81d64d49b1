"""What schemathesis is told of the service: see ../clients_test.go.

A request that is as the document says may be refused for what no schema can say: what stands in the ledger
(404, 409, 422: schemathesis.toml), and the rules below (400). Any other 400 is a gap in the document.
"""

import re

import schemathesis

INT64 = 2**63 - 1
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def body(case):
    return case.body if isinstance(case.body, dict) else {}


def query(case):
    return case.query or {}


def header(case, name):
    return next((v for k, v in (case.headers or {}).items() if k.lower() == name.lower()), None)


def key(case):
    return header(case, "Idempotency-Key")


def path(case):
    return str(next(iter((case.path_parameters or {}).values()), ""))


def beyond_int64(case):
    return any(int(part) > INT64 for part in path(case).split("-"))


def unprintable(text):
    return len(text.encode("utf-8", "surrogatepass")) > 255 or not text.isprintable()


# By code: whether this is what a schema cannot say.
BEYOND = {
    "same_wallet": lambda c: str(body(c).get("to_id")) == path(c).split("-")[0],
    "idempotency_key_missing": lambda c: not key(c) and "idempotency_key" not in body(c),
    "idempotency_key_conflict": lambda c: key(c) and "idempotency_key" in body(c),
    # Blanks around a header's value are no part of it (RFC 9110, 5.5); in quotes it is a structured field.
    "idempotency_key_malformed": lambda c: key(c) is not None and (not key(c).strip() or key(c).strip()[0] == '"'),
    "transaction_id_malformed": beyond_int64,
    "hold_id_malformed": beyond_int64,
    "expires_in_malformed": lambda c: int(body(c)["expires_in"][:-1]) * SECONDS[body(c)["expires_in"][-1]] > 365 * 86400,
    "reference_malformed": lambda c: unprintable(body(c)["reference"]),
    "note_malformed": lambda c: unprintable(body(c)["note"]),
    "metadata_malformed": lambda c: "metadata" in body(c),  # 2 KiB in all, and no member without a name
    "parameter_malformed": lambda c: "cursor" in query(c)
    or len({"at", "seq", "min_seq"} & query(c).keys()) > 1
    or unprintable(query(c).get("reference", ""))
    or any(re.search(":60", query(c).get(name, "")) for name in ("at", "since", "until")),  # leap seconds
}


@schemathesis.check
def said_by_the_document(ctx, response, case):
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    code = response.json()["code"]
    if not BEYOND.get(code, lambda _: False)(case):
        raise AssertionError(f"400 {code}: the document lets this request through")

"""What schemathesis is told of the service: see ../clients_test.go.

A request that is as the document says may be refused for what no schema can say: what stands in the ledger
(404, 409, 422: schemathesis.toml), and the rules below (400). Any other 400 is a gap in the document.
"""

import schemathesis

INT64 = 2**63 - 1
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def operations(case):
    """What the request asks for: the id that it is about, and the fields."""
    body = case.body if isinstance(case.body, dict) else {}
    for op in body.get("operations", []):
        yield str(op.get("wallet_id") or op.get("hold_id") or op.get("transaction_id")), op
    yield str(next(iter((case.path_parameters or {}).values()), "")), body


def key(case):
    return next((v for k, v in (case.headers or {}).items() if k.lower() == "idempotency-key"), None)


def beyond_int64(text):
    return any(not part.isdecimal() or int(part) > INT64 for part in str(text).split("-"))


def unprintable(text):
    return len(text.encode("utf-8", "surrogatepass")) > 255 or not text.isprintable()


def seconds(text):
    return int(text[:-1]) * SECONDS[text[-1]]


def blank(case):
    """Blanks around a header's value are no part of it (RFC 9110, 5.5); quotes make it a structured field."""
    value = key(case)
    return value is not None and (not value.strip() or value.strip()[0] == '"')


def query(case):
    q = {name: value for name, value in (case.query or {}).items() if value != ""}
    return (
        "cursor" in q  # of another list, or with more than limit beside it
        or len({"at", "seq", "min_seq"} & q.keys()) > 1
        or unprintable(str(q.get("reference", "")))
        or any(":60" in str(q.get(name, "")) for name in ("at", "since", "until"))  # a leap second
    )


# By code: whether this is what a schema cannot say, of a request's operation or of the request.
OF_OPERATION = {
    "same_wallet": lambda id, op: str(op["to_id"]) == id.split("-")[0],
    # 1.0 is a whole number to JSON Schema; a service that reads no floats does not take it for one.
    "wallet_id_malformed": lambda id, op: any(
        isinstance(op.get(name), float) for name in ("id", "wallet_id", "to_id")),
    "transaction_id_malformed": lambda id, op: beyond_int64(id),
    "hold_id_malformed": lambda id, op: beyond_int64(id),
    "expires_in_malformed": lambda id, op: seconds(op["expires_in"]) > 365 * SECONDS["d"],
    "reference_malformed": lambda id, op: unprintable(op["reference"]),
    "note_malformed": lambda id, op: unprintable(op["note"]),
    "metadata_malformed": lambda id, op: "metadata" in op,  # 2 KiB in all, and no member without a name
}
OF_REQUEST = {
    "idempotency_key_missing": lambda case: not key(case),
    "idempotency_key_conflict": lambda case: key(case) or case.path == "/v1/batches",
    "idempotency_key_malformed": lambda case: blank(case) or case.path == "/v1/batches",  # 251 characters
    "parameter_malformed": query,
}


def beyond_schemas(case, code):
    if code in OF_REQUEST:
        return OF_REQUEST[code](case)
    rule = OF_OPERATION.get(code, lambda id, op: False)
    for id, op in operations(case):
        try:
            if rule(id, op):
                return True
        except KeyError:  # the operation does not say this
            pass
    return False


@schemathesis.check
def said_by_the_document(ctx, response, case):
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code != 400:
        return
    code = response.json()["code"]
    if not beyond_schemas(case, code):
        raise AssertionError(f"400 {code}: the document lets this request through")

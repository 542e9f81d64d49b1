"""The client of openapi-python-client, in use: see ../clients_test.go."""

import os
from urllib.parse import parse_qs, urlsplit

from wallet_client import AuthenticatedClient
from wallet_client.api.holds import capture_hold, place_hold
from wallet_client.api.movements import deposit, post_batch, transfer, withdraw
from wallet_client.api.transactions import get_transaction
from wallet_client.api.wallets import create_wallet, get_balance, get_history
from wallet_client.models import (
    Balance, BatchResults, Capture, CaptureHoldRequest, CreateWalletRequest, DepositOperation,
    DepositOperationOp, DepositRequest, DepositRequestMetadata, Entry, EntryKind, HoldReceipt, Movement,
    PlaceHoldRequest, PostBatchRequest, Problem, ProblemCode, Receipt, Transfer, TransferOperation,
    TransferOperationOp, TransferReceipt, TransferRequest, Wallet, WithdrawRequest,
)
from wallet_client.types import UNSET, Unset

client = AuthenticatedClient(base_url=os.environ["WALLET_URL"], token=os.environ["WALLET_KEY"])
keys = (f"py-{n}" for n in range(100))


def create() -> int:
    wallet = create_wallet.sync(
        client=client, body=CreateWalletRequest(currency="USD"), idempotency_key=next(keys))
    assert isinstance(wallet, Wallet), wallet
    return wallet.wallet_id


def pay_in(wallet: int, amount: str) -> tuple[str, str | None]:
    body = DepositRequest(
        amount=amount, reference="invoice 7", metadata=DepositRequestMetadata.from_dict({"cart": "c-19"}))
    answer = deposit.sync_detailed(wallet, client=client, body=body, idempotency_key="d")
    receipt = answer.parsed
    assert isinstance(receipt, Receipt) and receipt.amount == receipt.balance == amount, answer
    balance = get_balance.sync(wallet, client=client, cache_control="no-cache")
    assert isinstance(balance, Balance) and balance.balance == amount, balance
    return receipt.transaction_id, answer.headers.get("Idempotent-Replayed")


payer, payee, rich = create(), create(), create()
first, _ = pay_in(payer, "16777217.25")
pay_in(rich, "98765432109876543210")
assert pay_in(payer, "16777217.25") == (first, "true")

moved = transfer.sync(
    payer, client=client, body=TransferRequest(to_id=payee, amount="10.50"), idempotency_key=next(keys))
assert isinstance(moved, TransferReceipt) and moved.to_balance == "10.5", moved


def hold(to_id: int | Unset = UNSET) -> str:
    body = PlaceHoldRequest(amount="5", to_id=to_id)
    held = place_hold.sync(payer, client=client, body=body, idempotency_key=next(keys))
    assert isinstance(held, HoldReceipt) and held.held == "5", held
    return held.hold_id


def capture(hold_id: str, body: CaptureHoldRequest) -> Capture:
    taken = capture_hold.sync(hold_id, client=client, body=body, idempotency_key=next(keys))
    assert isinstance(taken, Capture), taken
    return taken


taken = capture(hold(), CaptureHoldRequest(amount="3"))
assert taken.wallet_id == payer and taken.from_id is UNSET and taken.held == "0", taken
paid = capture(hold(payee), CaptureHoldRequest())
assert paid.to_id == payee and paid.amount == "5", paid

entries: list[Entry] = []
cursor: str | Unset | None = UNSET
while cursor is not None:
    page = get_history.sync_detailed(payer, client=client, limit=4, cursor=cursor)
    assert isinstance(page.parsed, list), page
    entries += page.parsed
    link, cursor = page.headers.get("Link"), None
    if link:
        cursor = parse_qs(urlsplit(link[1:link.index(">")]).query)["cursor"][0]
assert [e.seq for e in entries] == [1, 2, 3, 4, 5, 6], entries
assert entries[1].kind is EntryKind.TRANSFER_OUT and entries[1].amount == "-10.5", entries[1]
assert not isinstance(entries[1].counterparty, Unset) and entries[1].counterparty.wallet_id == payee

seen = get_transaction.sync(moved.transaction_id, client=client)
assert isinstance(seen, Transfer) and seen.to_id == payee, seen
seen = get_transaction.sync(first, client=client)
assert isinstance(seen, Movement) and seen.amount == "16777217.25", seen
assert not isinstance(seen.metadata, Unset) and seen.metadata["cart"] == "c-19", seen

batch = post_batch.sync(
    client=client, idempotency_key=next(keys), body=PostBatchRequest(operations=[
        DepositOperation(op=DepositOperationOp.DEPOSIT, wallet_id=payer, amount="1"),
        TransferOperation(op=TransferOperationOp.TRANSFER, wallet_id=payer, to_id=payee, amount="1"),
    ]))
assert isinstance(batch, BatchResults) and len(batch.results) == 2, batch

no = withdraw.sync(payee, client=client, body=WithdrawRequest(amount="1000"), idempotency_key=next(keys))
assert isinstance(no, Problem) and no.code is ProblemCode.INSUFFICIENT_FUNDS and no.detail, no
print("ok")

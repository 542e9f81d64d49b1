"""Keeps the balances of all wallets in an SQLite file, by their events alone.

    pip install -r requirements.txt
    python3 consumer.py 127.0.0.1:9092 wallet.events balances.db

Kill it at any moment and start it again: no event counts twice, and none is left out. With --stop it ends
once it has read what there is. It ends with status 3 when the chain of a wallet's events is broken.
"""

import argparse
import decimal
import sqlite3
import sys
from decimal import Decimal  # money is never a float

from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

decimal.getcontext().prec = 60  # an amount has 38 digits at most, and Python rounds to 28 by default

# The projection, and the position in the topic that it is of. Amounts are text, which SQLite does not round.
# In remains is what remains of a hold, or of an entry that was undone in part, by its seq.
SCHEMA = """
CREATE TABLE IF NOT EXISTS wallet (id INTEGER PRIMARY KEY, currency TEXT, seq INTEGER, balance TEXT,
    held TEXT, state TEXT);
CREATE TABLE IF NOT EXISTS remains (wallet INTEGER, seq INTEGER, amount TEXT, PRIMARY KEY (wallet, seq));
CREATE TABLE IF NOT EXISTS position (partition INTEGER PRIMARY KEY, next INTEGER, events INTEGER)"""

WHAT_TO_DO = """Broken chain: {}.
Nothing of this batch was stored; what was stored before is right. Do not skip the event. Run "wallet -audit",
which compares the topic with the ledger. If it finds nothing, this file was made of another topic: delete it
and start again, and all is read from the beginning. If it finds something, keep the file for who mends it."""


class BrokenChain(Exception):
    pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop", action="store_true", help="end once everything is read")
    parser.add_argument("brokers")
    parser.add_argument("topic")
    parser.add_argument("database")
    args = parser.parse_args()
    db = sqlite3.connect(args.database, isolation_level=None)  # transactions begin where this code says so
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(SCHEMA)
    consumer = Consumer({
        "bootstrap.servers": args.brokers,
        "isolation.level": "read_committed",  # else there are events that were never committed
        "enable.auto.commit": False,
        "auto.offset.reset": "error",  # an offset that is gone is for a human to see
        "enable.partition.eof": True,
        "group.id": "none",  # the client demands one; nothing is ever committed to it
    })
    try:
        consume(consumer, db, args.topic, args.stop)
    except BrokenChain as broken:
        print(WHAT_TO_DO.format(broken), file=sys.stderr)
        sys.exit(3)


def consume(consumer, db, topic, stop):
    metadata = consumer.list_topics(topic, timeout=30).topics[topic]
    if metadata.error:
        raise KafkaException(metadata.error)
    # There is no consumer group: the database alone says where to go on, as it moves with the balances.
    positions = []
    for partition in metadata.partitions:
        db.execute("INSERT INTO position VALUES (?, 0, 0) ON CONFLICT DO NOTHING", (partition,))
        (offset,) = db.execute("SELECT next FROM position WHERE partition = ?", (partition,)).fetchone()
        positions.append(TopicPartition(topic, partition, offset))
    consumer.assign(positions)
    unread = set(metadata.partitions)
    while unread or not stop:
        messages = []  # what one transaction of the database takes
        for message in consumer.consume(num_messages=500, timeout=0.1):
            if not message.error():
                messages.append(message)
            elif message.error().code() == KafkaError._PARTITION_EOF:
                unread.discard(message.partition())
            else:
                raise KafkaException(message.error())
        if messages:
            store(db, messages)
            print("stored", len(messages), flush=True)


def store(db, messages):
    """Applies a batch and moves the position, in one transaction: killed before it is committed, we read
    the batch again; killed afterwards, never more."""
    db.execute("BEGIN IMMEDIATE")
    for message in messages:
        partition, offset = message.partition(), message.offset()
        binary = KafkaMessage(dict(message.headers()), message.key(), message.value())
        event = from_binary(binary, JSONFormat())
        try:
            apply(db, event.get_data())
        except BrokenChain as broken:
            raise BrokenChain(f"event {event.get_id()}, partition {partition}, offset {offset}: {broken}")
        moved = db.execute("UPDATE position SET next = ?1 + 1, events = events + 1"
                           " WHERE partition = ?2 AND next <= ?1", (offset, partition))
        if moved.rowcount == 0:
            sys.exit("another process has moved the position: only one may use a file")
    db.execute("COMMIT")  # without it, the end of the process undoes the batch


def apply(db, e):
    """Proves that the event is its wallet's next one, and makes it the wallet's head. A kind that it does
    not know is applied as well: balances are right for each."""
    def amount(member):
        return Decimal(e.get(member, "0"))

    wallet, kind, of = e["wallet_id"], e["kind"], e.get("of_seq", 0)
    head = db.execute("SELECT seq, balance, held, state FROM wallet WHERE id = ?", (wallet,)).fetchone()
    seq, balance, held, state = head or (0, "0", "0", "")
    balance, held = Decimal(balance), Decimal(held)
    known = db.execute("SELECT amount FROM remains WHERE wallet = ? AND seq = ?", (wallet, of)).fetchone()
    left, remaining = Decimal(known[0] if known else "0"), amount("remaining")
    taken, freed = abs(amount("amount")), held - amount("held_after")
    gives = freed > 0  # a capture or a release
    spends = kind == "hold" or amount("amount") < 0 and not gives
    if e["seq"] != seq + 1:
        raise BrokenChain(f"the wallet's last event was number {seq}")
    if amount("balance_before") != balance or amount("held_before") != held:
        raise BrokenChain(f"the wallet had {balance}, {held} of it held")
    if (amount("balance_after") != balance + amount("amount")
            or not 0 <= amount("held_after") <= amount("balance_after")):
        raise BrokenChain("it does not add up")
    if (state == "closed" or state == "frozen" and kind not in ("release", "state")
            or state == "no_out" and spends):
        raise BrokenChain(f"the wallet was {state}")
    if gives and not known or freed < 0 and kind != "hold" or remaining < 0:
        raise BrokenChain("there is no such hold")
    if (kind == "hold" and remaining != -freed
            or gives and remaining != left - freed
            or gives and taken > freed  # the last capture of a hold may free more than it takes
            or gives and taken != freed and remaining != 0
            or freed == 0 and known and remaining != left - taken):  # undone once more
        raise BrokenChain(f"it does not fit the {left} that remained")
    db.execute("REPLACE INTO wallet VALUES (?, ?, ?, ?, ?, ?)",
               (wallet, e["currency"], e["seq"], e["balance_after"], e.get("held_after", "0"),
                e.get("state", state)))
    if of or kind == "hold":
        db.execute("REPLACE INTO remains VALUES (?, ?, ?)", (wallet, of or e["seq"], e["remaining"]))


main()

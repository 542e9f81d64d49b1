-- The ledger's tables, and every rule about money that a database can enforce by itself: constraint names
-- state the rule.
--
-- Each step below is a transaction of its own; its number is the version that it belongs to. main.go applies
-- those of later versions than the database has, at start, as the owner (MIGRATE_URL) and under an advisory
-- lock: whichever replica comes first does it. A step may be run again, and changes nothing then. It waits
-- for no lock longer than a moment, since writers would queue behind it; it is tried again instead. Nothing
-- rewrites or scans a table under a lock that writers wait for: columns are nullable or have a constant
-- default, and constraints are NOT VALID at first, which binds what is new; the service validates them
-- afterwards, beside its work.
--
-- Three roles meet here:
--   owner    owns the tables and the publication, makes and drops outbox partitions (the SECURITY DEFINER
--            functions below);
--   service  reads everything, adds wallets, entries and outbox rows, moves a wallet's head: no DDL, and no
--            change of an entry;
--   relay    REPLICATION only; it reads the outbox from the WAL, through the publication.
-- The names of the last two arrive as settings of the migrating session, wallet.service_role and
-- wallet.relay_role. On a laptop all three may be one role.

-- step 2: wallets, entries, outbox

CREATE TABLE IF NOT EXISTS wallet_schema (
    version    integer     PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE wallet_schema IS 'The wallet service''s schema: its highest version is the one in force.';

-- -----------------------------------------------------------------------------------------------------------
-- Ledger
-- -----------------------------------------------------------------------------------------------------------

-- A currency's scale is how many decimals its amounts may have. It must never change once a wallet uses it.
CREATE TABLE IF NOT EXISTS currency (
    code  text     PRIMARY KEY CONSTRAINT currency_code_well_formed CHECK (code ~ '^[A-Z][A-Z0-9]{2,9}$'),
    scale smallint NOT NULL    CONSTRAINT currency_scale_in_range   CHECK (scale BETWEEN 0 AND 18)
);

-- A wallet's row is the head of its chain of entries: balance and time of entry number seq. fillfactor leaves
-- room on each page for the next versions of its rows, so that an update stays on the page and touches no
-- index (HOT). Its creation_key is the idempotency key of POST /v1/wallets, and null where a deposit or
-- transfer made the wallet.
CREATE TABLE IF NOT EXISTS wallet (
    id           bigint      PRIMARY KEY CONSTRAINT wallet_id_positive CHECK (id > 0),
    seq          bigint      NOT NULL DEFAULT 0 CONSTRAINT seq_not_negative CHECK (seq >= 0),
    entry_at     timestamptz,           -- the last entry's created_at; null before the first
    created_at   timestamptz NOT NULL,
    currency     text        NOT NULL CONSTRAINT wallet_currency_known REFERENCES currency (code),
    balance      numeric     NOT NULL DEFAULT 0
        CONSTRAINT balance_not_negative CHECK (balance >= 0)
        CONSTRAINT balance_at_most_20_digits CHECK (balance < 100000000000000000000),
    creation_key text        COLLATE "C",
    CONSTRAINT wallet_without_entries_is_empty
        CHECK ((seq = 0) = (entry_at IS NULL) AND (seq > 0 OR balance = 0))
) WITH (fillfactor = 60);
CREATE UNIQUE INDEX IF NOT EXISTS wallet_creation_key_once
    ON wallet (creation_key) WHERE creation_key IS NOT NULL;

DO $$ BEGIN
    CREATE TYPE entry_kind AS ENUM ('deposit', 'withdrawal', 'transfer_out', 'transfer_in');
EXCEPTION WHEN duplicate_object THEN NULL;
END $$;

-- One signed leg of a movement of money, never changed once written. seq counts a wallet's entries from 1
-- without a gap; created_at never decreases with it, so a time is found by bisecting the primary key. The
-- idempotency key is unique among a wallet's initiating entries (a transfer_in carries the payer's key, which
-- may equal one of the payee's). Keys compare by their bytes: that is quicker than by a language, and an
-- operating system's new version of a language cannot unsettle the index. (Ledgers that versions before 4
-- made have the database's collation.)
CREATE TABLE IF NOT EXISTS entry (
    wallet_id        bigint      NOT NULL,   -- of a wallet: entry_fits_wallet
    seq              bigint      NOT NULL CONSTRAINT entry_seq_positive CHECK (seq > 0),
    counterparty_id  bigint,
    counterparty_seq bigint      CONSTRAINT counterparty_seq_positive CHECK (counterparty_seq > 0),
    created_at       timestamptz NOT NULL,
    kind             entry_kind  NOT NULL,
    amount           numeric     NOT NULL CONSTRAINT amount_at_most_18_decimals CHECK (scale(amount) <= 18),
    balance          numeric     NOT NULL                                       -- after this entry
        CONSTRAINT entry_balance_not_negative CHECK (balance >= 0),
    idempotency_key  text        COLLATE "C" NOT NULL
        CONSTRAINT idempotency_key_1_to_255 CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255),
    PRIMARY KEY (wallet_id, seq),
    CONSTRAINT balance_before_not_negative CHECK (balance >= amount),
    CONSTRAINT transfer_has_counterparty CHECK (
        (kind IN ('transfer_out', 'transfer_in')) = (counterparty_id IS NOT NULL)
        AND (counterparty_id IS NULL) = (counterparty_seq IS NULL)),
    CONSTRAINT counterparty_is_another CHECK (counterparty_id <> wallet_id)
);
CREATE UNIQUE INDEX IF NOT EXISTS idempotency_key_posts_once
    ON entry (wallet_id, idempotency_key) WHERE kind <> 'transfer_in';

CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: %', lower(TG_OP), TG_TABLE_NAME, TG_ARGV[0]
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE OR REPLACE TRIGGER entry_is_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON entry
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('an entry is never changed; post a correcting one');
CREATE OR REPLACE TRIGGER wallet_identity_is_immutable
    BEFORE UPDATE OF id, currency, created_at, creation_key ON wallet
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('id, currency and creation of a wallet are final');
CREATE OR REPLACE TRIGGER wallet_is_never_deleted BEFORE DELETE OR TRUNCATE ON wallet
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('a wallet is never deleted');
CREATE OR REPLACE TRIGGER currency_scale_is_immutable BEFORE UPDATE OR TRUNCATE ON currency
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('a scale is final; add another code');

-- -----------------------------------------------------------------------------------------------------------
-- Outbox: one row per entry, in the same commit; the relay streams it out of the WAL, so nothing ever reads
-- or updates it
-- -----------------------------------------------------------------------------------------------------------

-- Partitioned by the writing transaction's start, by the database's clock. No index: rows are never looked
-- up, and leave by DROP TABLE of a whole partition, so that there is no bloat and no vacuum debt. The
-- event's id is aggregate_id-seq.
CREATE TABLE IF NOT EXISTS outbox (
    created_at     timestamptz NOT NULL DEFAULT now(),
    aggregate_id   bigint      NOT NULL,     -- the wallet
    seq            bigint      NOT NULL,     -- the entry's number within the wallet
    aggregate_type text        NOT NULL DEFAULT 'wallet',
    event_type     text        NOT NULL,
    payload        text        NOT NULL,     -- the event's JSON, byte for byte what Kafka gets
    traceparent    text                      -- W3C Trace Context of the request
) PARTITION BY RANGE (created_at);

-- What partitions there are. A partition's name holds the UTC hour that it covers.
CREATE OR REPLACE VIEW outbox_partition AS
SELECT c.relname::text AS name,
       to_timestamp(substr(c.relname, 8) || '+00', 'YYYYMMDDHH24TZH') AS starts_at,
       to_timestamp(substr(c.relname, 8) || '+00', 'YYYYMMDDHH24TZH') + interval '1 hour' AS ends_at,
       pg_total_relation_size(c.oid) AS bytes
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = 'outbox'::regclass;

-- Makes the partitions from this hour until `ahead` from now that are missing, and returns how many. Without
-- a partition for the present hour no write succeeds, so every replica calls this, hours ahead. CREATE then
-- ATTACH takes no lock that a writer waits for.
CREATE OR REPLACE FUNCTION outbox_make_partitions(ahead interval) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET lock_timeout = '1s' SET search_path FROM CURRENT AS $$
DECLARE
    made integer := 0;
    hour timestamptz;
    part text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('wallet.outbox_partitions'));
    FOR hour IN
        SELECT generate_series(date_trunc('hour', now(), 'UTC'), now() + ahead, interval '1 hour')
    LOOP
        part := 'outbox_' || to_char(hour AT TIME ZONE 'UTC', 'YYYYMMDDHH24');
        IF EXISTS (SELECT FROM outbox_partition p WHERE p.name = part) THEN
            CONTINUE;
        END IF;
        EXECUTE format('CREATE TABLE %I (LIKE outbox INCLUDING DEFAULTS)', part);
        EXECUTE format('ALTER TABLE outbox ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            part, hour, hour + interval '1 hour');
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;

-- Returns an LSN after every commit in a closed partition. The SHARE lock waits for the transactions that
-- still have rows in it; later ones start after its hour and write to another.
CREATE OR REPLACE FUNCTION outbox_close_partition(part text) RETURNS pg_lsn
    LANGUAGE plpgsql SECURITY DEFINER SET lock_timeout = '200ms' SET search_path FROM CURRENT AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM outbox_partition p WHERE p.name = part AND p.ends_at <= now()) THEN
        RAISE EXCEPTION '% is not a past partition of the outbox', part
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format('LOCK TABLE %I IN SHARE MODE', part);
    RETURN pg_current_wal_insert_lsn();
END $$;

-- Drops a past partition. The caller knows that its rows were published (or that nobody is to publish them).
CREATE OR REPLACE FUNCTION outbox_drop_partition(part text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET lock_timeout = '200ms' SET search_path FROM CURRENT AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM outbox_partition p WHERE p.name = part AND p.ends_at <= now()) THEN
        RAISE EXCEPTION '% is not a past partition of the outbox', part
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format('DROP TABLE %I', part);
END $$;

-- Inserts only, under the root's name (dropping a partition is silent), and only what an event is made of:
-- each further column would be decoded, sent and dropped.
--
-- A publication is the whole database's, a ledger its schema's: that of any schema but public bears its name.
-- A database that was made before that was so has wallet_outbox only, which the relay takes then.
DO $$
DECLARE
    publication name := 'wallet_outbox'
        || CASE current_schema() WHEN 'public' THEN '' ELSE '_' || current_schema() END;
BEGIN
    BEGIN
        EXECUTE format('CREATE PUBLICATION %I WITH (publish = ''insert'', publish_via_partition_root = true)',
            publication);
    EXCEPTION WHEN duplicate_object THEN NULL;
    END;
    EXECUTE format('ALTER PUBLICATION %I SET TABLE outbox (aggregate_id, seq, payload, traceparent)',
        publication);
END $$;

-- step 3: kinds of entries that move no money (a new label can be used only after its commit)

ALTER TYPE entry_kind ADD VALUE IF NOT EXISTS 'hold';
ALTER TYPE entry_kind ADD VALUE IF NOT EXISTS 'release';
ALTER TYPE entry_kind ADD VALUE IF NOT EXISTS 'state';

-- step 3: what an entry may say besides

-- program_min is the lowest version that a program must know to serve on this schema. An older one would
-- spend what is held.
ALTER TABLE wallet_schema ADD COLUMN IF NOT EXISTS program_min integer NOT NULL DEFAULT 1;

-- held is what open holds reserve of the balance; the rest is available. state is null until it is set for
-- the first time: open, no_out (nothing more is spent), frozen (nothing but releases) or closed (nothing, for
-- ever); state_seq is the entry that set it.
ALTER TABLE wallet
    ADD COLUMN IF NOT EXISTS held      numeric NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS state     text,
    ADD COLUMN IF NOT EXISTS state_seq bigint;

-- Null where there is nothing to say, as with every plain deposit, withdrawal and transfer. of_seq is the
-- same wallet's entry that this one captures, releases or undoes; held_change is that of what is held, and
-- held what is held after this entry; remaining is what remains of the hold, or of what can still be
-- undone; note is JSON: reference, metadata, client and the like (wallet.go).
ALTER TABLE entry
    ADD COLUMN IF NOT EXISTS of_seq      bigint,
    ADD COLUMN IF NOT EXISTS held_change numeric,
    ADD COLUMN IF NOT EXISTS held        numeric,
    ADD COLUMN IF NOT EXISTS remaining   numeric,
    ADD COLUMN IF NOT EXISTS note        text;

-- step 3: holds, reversals, references

-- A hold's row says where entry number seq of the wallet stands now. The sum of what was captured, and what
-- remains, is bounded by its amount. fillfactor leaves room for its end.
CREATE TABLE IF NOT EXISTS hold (
    wallet_id  bigint      NOT NULL,
    seq        bigint      NOT NULL,
    amount     numeric     NOT NULL CONSTRAINT hold_amount_positive CHECK (amount > 0),
    captured   numeric     NOT NULL DEFAULT 0 CONSTRAINT captured_not_negative CHECK (captured >= 0),
    remaining  numeric     NOT NULL,
    status     text        NOT NULL,
    expires_at timestamptz NOT NULL,
    to_id      bigint,              -- who will be paid, where that was said
    last_seq   bigint      NOT NULL CONSTRAINT hold_last_seq_not_before CHECK (last_seq >= seq),
    PRIMARY KEY (wallet_id, seq),
    CONSTRAINT hold_status_known CHECK (status IN ('open', 'captured', 'voided', 'expired')),
    CONSTRAINT hold_captured_at_most_its_amount CHECK (captured + remaining <= amount),
    CONSTRAINT open_hold_is_whole CHECK (status <> 'open' OR remaining > 0 AND captured + remaining = amount),
    CONSTRAINT ended_hold_holds_nothing CHECK (status = 'open' OR remaining = 0)
) WITH (fillfactor = 80);
CREATE INDEX IF NOT EXISTS hold_due ON hold (expires_at) WHERE status = 'open';
CREATE INDEX IF NOT EXISTS hold_open ON hold (wallet_id, seq) WHERE status = 'open';

-- How much of a transaction, named by its initiating entry, has been undone.
CREATE TABLE IF NOT EXISTS reversal (
    wallet_id bigint  NOT NULL,
    seq       bigint  NOT NULL,
    amount    numeric NOT NULL,
    reversed  numeric NOT NULL CONSTRAINT reversed_positive CHECK (reversed > 0),
    PRIMARY KEY (wallet_id, seq),
    CONSTRAINT reversed_at_most_its_amount CHECK (reversed <= amount)
);

-- Which initiating entries carry a reference.
CREATE TABLE IF NOT EXISTS reference (
    reference text COLLATE "C" NOT NULL
        CONSTRAINT reference_1_to_255 CHECK (octet_length(reference) BETWEEN 1 AND 255),
    wallet_id bigint NOT NULL,
    seq       bigint NOT NULL,
    PRIMARY KEY (reference, wallet_id, seq)
);

-- step 3: rules

ALTER TABLE wallet
    DROP CONSTRAINT IF EXISTS held_within_balance,
    ADD CONSTRAINT held_within_balance CHECK (held BETWEEN 0 AND balance) NOT VALID,
    DROP CONSTRAINT IF EXISTS wallet_state_known,
    ADD CONSTRAINT wallet_state_known CHECK (state IN ('open', 'no_out', 'frozen', 'closed')
        AND (state IS NULL) = (state_seq IS NULL)) NOT VALID,
    DROP CONSTRAINT IF EXISTS closed_wallet_is_empty,
    ADD CONSTRAINT closed_wallet_is_empty CHECK (state <> 'closed' OR balance = 0 AND held = 0) NOT VALID;

ALTER TABLE entry
    DROP CONSTRAINT IF EXISTS entry_wallet_exists, -- version 1's foreign key
    DROP CONSTRAINT IF EXISTS amount_sign_fits_kind,
    ADD CONSTRAINT amount_sign_fits_kind CHECK (CASE
        WHEN kind IN ('deposit', 'transfer_in') THEN amount > 0
        WHEN kind IN ('withdrawal', 'transfer_out') THEN amount < 0
        ELSE amount = 0 END) NOT VALID,
    DROP CONSTRAINT IF EXISTS entry_held_within_balance,
    ADD CONSTRAINT entry_held_within_balance CHECK (held IS NULL OR held > 0 AND held <= balance) NOT VALID,
    DROP CONSTRAINT IF EXISTS held_before_within_balance,
    ADD CONSTRAINT held_before_within_balance CHECK (held_change IS NULL
        OR coalesce(held, 0) - held_change BETWEEN 0 AND balance - amount) NOT VALID,
    -- A hold reserves what it names; a release gives some back; a capture takes no more than it gives back.
    DROP CONSTRAINT IF EXISTS held_change_fits_kind,
    ADD CONSTRAINT held_change_fits_kind CHECK (CASE
        WHEN held_change IS NULL THEN kind NOT IN ('hold', 'release')
        WHEN kind = 'hold' THEN
            coalesce(held_change > 0 AND remaining = held_change AND of_seq IS NULL, false)
        WHEN kind = 'release' THEN coalesce(held_change < 0 AND remaining = 0 AND of_seq > 0, false)
        WHEN kind IN ('withdrawal', 'transfer_out') THEN
            coalesce(held_change <= amount AND remaining >= 0 AND of_seq > 0, false)
        ELSE false END) NOT VALID,
    DROP CONSTRAINT IF EXISTS of_an_earlier_entry,
    ADD CONSTRAINT of_an_earlier_entry CHECK (of_seq IS NULL
        OR of_seq BETWEEN 1 AND seq - 1 AND coalesce(remaining >= 0, false)) NOT VALID,
    DROP CONSTRAINT IF EXISTS note_at_most_8_kib,
    ADD CONSTRAINT note_at_most_8_kib CHECK (octet_length(note) <= 8192) NOT VALID;

-- New entries fit the wallets that they belong to, whose rows are brought up to date first: seq, balance,
-- time, held. After the entry that set its state, a wallet takes none that the state forbids. A foreign key
-- would say less (only that the wallet exists) and cost more: a query and a row lock for each entry,
-- against a wallet that is never deleted.
CREATE OR REPLACE FUNCTION entry_fits_wallet() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT AS $$
DECLARE
    misfit    text;
    forbidden boolean;
BEGIN
    SELECT a.wallet_id || '-' || a.seq, w.state <> 'open' AND w.state_seq < a.seq
    INTO misfit, forbidden
    FROM added a LEFT JOIN LATERAL (
        SELECT w.seq, w.balance, w.entry_at, w.held, w.state, w.state_seq FROM wallet w
        WHERE w.id = a.wallet_id LIMIT 1
    ) w ON true
    WHERE w.seq IS NULL OR w.seq < a.seq
       OR w.seq = a.seq AND (w.balance <> a.balance OR w.entry_at <> a.created_at
                             OR w.held <> coalesce(a.held, 0))
       OR w.state_seq < a.seq AND NOT CASE w.state
              WHEN 'open' THEN true
              WHEN 'no_out' THEN a.kind IN ('deposit', 'transfer_in', 'release', 'state')
                                 OR a.held_change IS NOT NULL AND a.held_change < 0
              WHEN 'frozen' THEN a.kind IN ('release', 'state')
              ELSE false END
    LIMIT 1;
    IF FOUND AND forbidden THEN
        RAISE EXCEPTION 'entry % is not one that its wallet''s state lets in', misfit
            USING ERRCODE = 'check_violation', CONSTRAINT = 'state_allows_entry';
    ELSIF FOUND THEN
        RAISE EXCEPTION 'entry % does not fit its wallet', misfit
            USING ERRCODE = 'check_violation', CONSTRAINT = 'entry_fits_wallet';
    END IF;
    RETURN NULL;
END $$;
-- Citus has no transition tables: MIGRATE_URL with ?wallet.entry_fits_wallet=off leaves the trigger out, and
-- then only the service keeps this rule.
DO $$ BEGIN
    IF current_setting('wallet.entry_fits_wallet', true) IS DISTINCT FROM 'off' THEN
        CREATE OR REPLACE TRIGGER entry_fits_wallet AFTER INSERT ON entry REFERENCING NEW TABLE AS added
            FOR EACH STATEMENT EXECUTE FUNCTION entry_fits_wallet();
    END IF;
END $$;

CREATE OR REPLACE TRIGGER closed_is_final BEFORE UPDATE OF state ON wallet FOR EACH ROW
    WHEN (OLD.state = 'closed' AND NEW.state IS DISTINCT FROM 'closed')
    EXECUTE FUNCTION refuse_change('a closed wallet stays closed');
CREATE OR REPLACE TRIGGER hold_identity_is_immutable
    BEFORE UPDATE OF wallet_id, seq, amount, expires_at, to_id ON hold
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('amount, payee and end of a hold are final');
CREATE OR REPLACE TRIGGER ended_hold_is_final BEFORE UPDATE ON hold FOR EACH ROW
    WHEN (OLD.status <> 'open')
    EXECUTE FUNCTION refuse_change('a hold ends once');
CREATE OR REPLACE TRIGGER hold_is_never_deleted BEFORE DELETE OR TRUNCATE ON hold
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('a hold is never deleted');
CREATE OR REPLACE TRIGGER reversal_is_never_undone BEFORE UPDATE ON reversal FOR EACH ROW
    WHEN (NEW.reversed < OLD.reversed OR NEW.amount <> OLD.amount)
    EXECUTE FUNCTION refuse_change('a reversal stays');
CREATE OR REPLACE TRIGGER reversal_is_never_deleted BEFORE DELETE OR TRUNCATE ON reversal
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('a reversal stays');

-- step 3: rights and currencies

-- -----------------------------------------------------------------------------------------------------------
-- Rights
-- -----------------------------------------------------------------------------------------------------------

REVOKE ALL ON FUNCTION outbox_make_partitions(interval), outbox_close_partition(text),
    outbox_drop_partition(text) FROM PUBLIC;
DO $$
DECLARE
    service text := current_setting('wallet.service_role');
    relay   text := current_setting('wallet.relay_role');
BEGIN
    IF service <> current_user THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), service);
        EXECUTE format('GRANT SELECT ON wallet_schema, currency, wallet, entry, hold, reversal, reference, '
            'outbox, outbox_partition TO %I', service);
        EXECUTE format('GRANT INSERT ON wallet, entry, hold, reversal, reference, outbox TO %I', service);
        EXECUTE format('GRANT UPDATE (seq, entry_at, balance, held, state, state_seq) ON wallet TO %I',
            service);
        EXECUTE format('GRANT UPDATE (captured, remaining, status, last_seq) ON hold TO %I', service);
        EXECUTE format('GRANT UPDATE (reversed) ON reversal TO %I', service);
        EXECUTE format('GRANT EXECUTE ON FUNCTION outbox_make_partitions(interval), '
            'outbox_close_partition(text), outbox_drop_partition(text) TO %I', service);
    END IF;
    IF relay <> current_user THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), relay);
    END IF;
END $$;

-- -----------------------------------------------------------------------------------------------------------
-- Currencies: ISO 4217 with its minor units (funds and metals left out), and the common crypto assets with
-- the decimals of their own ledgers. Add others with INSERT; the service sees them within a minute.
-- -----------------------------------------------------------------------------------------------------------

INSERT INTO currency (code, scale)
SELECT code, scale
FROM (VALUES
    (0, 'BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF'),
    (2, 'AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN BZD CAD '
        'CDF CHF CNY COP CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD '
        'GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL '
        'MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN '
        'PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP '
        'SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG'),
    (3, 'BHD IQD JOD KWD LYD OMR TND'),
    (4, 'CLF UYW'),
    (6, 'ADA ALGO ATOM TRX USDC USDT XRP'),
    (7, 'XLM'),
    (8, 'BCH BTC DOGE HBAR LTC'),
    (9, 'SOL SUI TON'),
    (10, 'DOT'),
    (12, 'XMR'),
    (18, 'AVAX BNB DAI ETC ETH LINK POL SHIB UNI')
) AS scales (scale, codes), LATERAL unnest(string_to_array(codes, ' ')) AS code
ON CONFLICT (code) DO NOTHING;

-- step 4: what moved

-- The log of what moved: a row for each statement that added entries, so one a batch. A recovery and an
-- audit of what moved read it, in proportion to that, instead of looking at every wallet.
CREATE TABLE IF NOT EXISTS moved (
    xid        bigint      NOT NULL,  -- of the transaction, with its epoch: it never wraps
    xid_oldest bigint      NOT NULL,  -- all below it had ended by then
    at         timestamptz NOT NULL,
    ids        bigint[]    NOT NULL,  -- the entries' wallets
    seqs       bigint[]    NOT NULL   -- and their numbers within them
) WITH (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE moved -- compressing them would cost as much as the rest of the log
    ALTER COLUMN ids SET STORAGE EXTERNAL,
    ALTER COLUMN seqs SET STORAGE EXTERNAL;
CREATE INDEX IF NOT EXISTS moved_xid ON moved (xid);

-- The log is whole from from_xid on: each transaction with this number or one above is in it, if it added
-- entries. kept_from has one row.
CREATE TABLE IF NOT EXISTS moved_kept (
    one      boolean PRIMARY KEY DEFAULT true CONSTRAINT moved_kept_is_one_row CHECK (one),
    from_xid bigint  NOT NULL
);

-- As the owner, so that nobody but this trigger writes the log. The former release's program keeps it, too.
CREATE OR REPLACE FUNCTION entry_moves_wallet() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO moved (xid, xid_oldest, at, ids, seqs)
    SELECT pg_current_xact_id()::text::bigint, pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
           clock_timestamp(), array_agg(a.wallet_id), array_agg(a.seq)
    FROM added a
    HAVING count(*) > 0; -- a statement may add none
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER entry_moves_wallet AFTER INSERT ON entry REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION entry_moves_wallet();

-- Forgets what is older than `age`, of transactions below `below`, in bites: true means that there is more.
-- A clock that steps forward cannot take what a recovery needs, since the relay says what is below.
CREATE OR REPLACE FUNCTION moved_forget(below bigint, age interval) RETURNS boolean
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    bite CONSTANT integer := 10000;
    mine CONSTANT bigint  := pg_current_xact_id()::text::bigint;
    kept  bigint;
    young bigint;
    next  bigint;
    n     integer;
BEGIN
    SELECT from_xid INTO kept FROM moved_kept FOR UPDATE SKIP LOCKED;
    IF kept IS NULL THEN
        RETURN false; -- somebody else is at it
    END IF;
    IF kept > mine THEN -- out of a dump: these are another server's numbers
        DELETE FROM moved WHERE xid >= kept;
        UPDATE moved_kept SET from_xid = mine;
        RETURN false;
    END IF;
    SELECT min(m.xid) FILTER (WHERE m.at >= clock_timestamp() - age), max(m.xid) + 1, count(*)
    INTO young, next, n
    FROM (SELECT o.xid, o.at FROM moved o WHERE o.xid >= kept AND o.xid < below ORDER BY o.xid LIMIT bite) m;
    next := coalesce(young, next, kept);
    DELETE FROM moved WHERE xid < next;
    IF FOUND THEN
        UPDATE moved_kept SET from_xid = next WHERE from_xid < next;
    END IF;
    RETURN FOUND AND n = bite;
END $$;

REVOKE ALL ON FUNCTION moved_forget(bigint, interval) FROM PUBLIC;
DO $$
DECLARE
    service text := current_setting('wallet.service_role');
BEGIN
    IF service <> current_user THEN
        EXECUTE format('GRANT SELECT ON moved, moved_kept TO %I', service);
        EXECUTE format('GRANT EXECUTE ON FUNCTION moved_forget(bigint, interval) TO %I', service);
    END IF;
END $$;

-- step 4: an entry by its time

-- The first entry of a wallet that is not older than `since` (one past the last where there is none), by
-- probes of the primary key. Each one far back costs pages of its own. So the first ten guess from the times
-- at both ends, and probe a little beyond the guess, where the farther end may come near. Bisecting does the
-- rest: log2(n) probes at most, whatever the times are. In PL/pgSQL, which plans its queries once a session.
CREATE OR REPLACE FUNCTION seq_since(wallet_id bigint, since timestamptz) RETURNS bigint
    LANGUAGE plpgsql STABLE STRICT AS $$
DECLARE
    low     bigint := 1; -- this entry is older than since,
    high    bigint;      -- and this one is not
    low_at  timestamptz;
    high_at timestamptz;
    probe   bigint;
    at      timestamptz;
    beyond  bigint;
    guesses integer := 10;
BEGIN
    SELECT w.seq, w.entry_at INTO high, high_at FROM wallet w WHERE w.id = $1;
    IF high_at IS NULL OR high_at < since THEN
        RETURN coalesce(high, 0) + 1;
    END IF;
    SELECT e.created_at INTO low_at FROM entry e WHERE e.wallet_id = $1 AND e.seq = 1;
    IF low_at >= since THEN
        RETURN 1;
    END IF;
    WHILE high - low > 1 LOOP
        probe := (low + high) / 2;
        IF guesses > 0 AND high - low > 64 THEN
            guesses := guesses - 1;
            probe := low + (extract(epoch FROM since - low_at)::float8
                            / extract(epoch FROM high_at - low_at)::float8 * (high - low))::bigint;
            beyond := sqrt(high - low)::bigint; -- twice the deviation of entries that come by chance
            probe := CASE WHEN high - probe > probe - low THEN least(probe + beyond, high - 1)
                          ELSE greatest(probe - beyond, low + 1) END;
        END IF;
        SELECT e.created_at INTO at FROM entry e WHERE e.wallet_id = $1 AND e.seq = probe;
        IF at < since THEN
            low := probe;
            low_at := at;
        ELSE
            high := probe;
            high_at := at;
        END IF;
    END LOOP;
    RETURN high;
END $$;

-- step 4: the outbox by ten minutes

-- A partition's name holds when it begins in UTC: ten minutes of one with minutes in it, such as
-- outbox_202601020310, and an hour of one without, which version 3 made.
CREATE OR REPLACE VIEW outbox_partition AS
SELECT n.name, n.starts_at,
       n.starts_at + CASE length(n.name) WHEN 17 THEN interval '1 hour' ELSE interval '10 minutes' END
           AS ends_at,
       pg_total_relation_size(n.oid) AS bytes
FROM (SELECT c.oid, c.relname::text AS name,
             to_timestamp(rpad(substr(c.relname, 8), 12, '0') || '+00', 'YYYYMMDDHH24MITZH') AS starts_at
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
      WHERE i.inhparent = 'outbox'::regclass) n;

-- As above, by ten minutes, and those that lie in an hour that is there already are not missing.
CREATE OR REPLACE FUNCTION outbox_make_partitions(ahead interval) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER SET lock_timeout = '1s' SET search_path FROM CURRENT AS $$
DECLARE
    span CONSTANT interval := '10 minutes';
    made integer := 0;
    slot timestamptz;
    part text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('wallet.outbox_partitions'));
    FOR slot IN
        SELECT s FROM generate_series(date_bin(span, now(), 'epoch'), now() + ahead, span) s
        WHERE NOT EXISTS (SELECT FROM outbox_partition p WHERE p.starts_at <= s AND s < p.ends_at)
    LOOP
        part := 'outbox_' || to_char(slot AT TIME ZONE 'UTC', 'YYYYMMDDHH24MI');
        EXECUTE format('CREATE TABLE %I (LIKE outbox INCLUDING DEFAULTS)', part);
        EXECUTE format('ALTER TABLE outbox ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
            part, slot, slot + span);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;

-- step 4: from where on the log is whole

-- A step of its own: whoever gets a transaction number above this one's adds entries after the trigger was
-- there.
INSERT INTO moved_kept (from_xid) VALUES (pg_current_xact_id()::text::bigint) ON CONFLICT (one) DO NOTHING;

INSERT INTO wallet_schema (version, program_min) VALUES (2, 1), (3, 3), (4, 3)
ON CONFLICT (version) DO NOTHING;

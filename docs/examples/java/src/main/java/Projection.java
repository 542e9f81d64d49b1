import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import java.math.BigDecimal; // money is never a double
import java.nio.file.Path;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.util.List;

/** What is kept, and the proof of a wallet's chain of events. */
class Projection {
    // The balances, and the position in the topic that they are of. Amounts are text, which SQLite does not
    // round. In remains is what remains of a hold, or of an entry that was undone in part, by its seq.
    static final List<String> SCHEMA = List.of("""
        CREATE TABLE IF NOT EXISTS wallet (id INTEGER PRIMARY KEY, currency TEXT, seq INTEGER, balance TEXT,
            held TEXT, state TEXT)""", """
        CREATE TABLE IF NOT EXISTS remains (wallet INTEGER, seq INTEGER, amount TEXT,
            PRIMARY KEY (wallet, seq))""", """
        CREATE TABLE IF NOT EXISTS position (partition INTEGER PRIMARY KEY, next INTEGER, events INTEGER)""");

    static class BrokenChain extends Exception {
        BrokenChain(String what) { super(what); }
    }

    final ObjectMapper json = new ObjectMapper();
    final Connection db;

    Projection(Path file) throws SQLException {
        db = DriverManager.getConnection("jdbc:sqlite:" + file + "?journal_mode=WAL");
        db.setAutoCommit(false);
        for (String table : SCHEMA) {
            change(table);
        }
        db.commit();
    }

    /** The offset to read next. */
    long position(int partition) throws SQLException {
        change("INSERT INTO position VALUES (?, 0, 0) ON CONFLICT DO NOTHING", partition);
        db.commit();
        return Long.parseLong(read("SELECT next FROM position WHERE partition = ?", partition)[0]);
    }

    void move(int partition, long offset) throws SQLException {
        if (change("UPDATE position SET next = ?1 + 1, events = events + 1"
                + " WHERE partition = ?2 AND next <= ?1", offset, partition) == 0) {
            throw new IllegalStateException("another process moved the position: only one may use a file");
        }
    }

    void commit() throws SQLException { db.commit(); }

    /**
     * Proves that the event is its wallet's next one, and makes it the wallet's head. A kind that it does not
     * know is applied as well: balances are right for each.
     */
    void apply(String value) throws Exception {
        JsonNode e = json.readTree(value);
        long wallet = e.get("wallet_id").asLong(), seq = e.get("seq").asLong();
        long of = e.path("of_seq").asLong();
        String kind = e.get("kind").asText();
        String[] head = read("SELECT seq, balance, held, state FROM wallet WHERE id = ?", wallet);
        if (head == null) {
            head = new String[] {"0", "0", "0", ""};
        }
        String[] known = read("SELECT amount FROM remains WHERE wallet = ? AND seq = ?", wallet, of);
        BigDecimal balance = new BigDecimal(head[1]), held = new BigDecimal(head[2]);
        BigDecimal left = new BigDecimal(known == null ? "0" : known[0]), remaining = amount(e, "remaining");
        BigDecimal balanceAfter = amount(e, "balance_after"), heldAfter = amount(e, "held_after");
        BigDecimal amount = amount(e, "amount"), taken = amount.abs(), freed = held.subtract(heldAfter);
        String state = head[3];
        boolean holds = kind.equals("hold");
        boolean gives = freed.signum() > 0; // a capture or a release
        boolean spends = holds || amount.signum() < 0 && !gives;
        if (seq != Long.parseLong(head[0]) + 1) {
            throw new BrokenChain("the wallet's last event was number " + head[0]);
        }
        if (differ(amount(e, "balance_before"), balance) || differ(amount(e, "held_before"), held)) {
            throw new BrokenChain("the wallet had " + balance + ", " + held + " of it held");
        }
        if (differ(balanceAfter, balance.add(amount)) || heldAfter.signum() < 0
                || heldAfter.compareTo(balanceAfter) > 0) {
            throw new BrokenChain("it does not add up");
        }
        if (state.equals("closed") || state.equals("no_out") && spends
                || state.equals("frozen") && !kind.equals("release") && !kind.equals("state")) {
            throw new BrokenChain("the wallet was " + state);
        }
        if (gives && known == null || freed.signum() < 0 && !holds || remaining.signum() < 0) {
            throw new BrokenChain("there is no such hold");
        }
        if (holds && differ(remaining, freed.negate())
                || gives && differ(remaining, left.subtract(freed))
                || gives && taken.compareTo(freed) > 0 // a hold's last capture may free more than it takes
                || gives && differ(taken, freed) && remaining.signum() != 0
                || freed.signum() == 0 && known != null && differ(remaining, left.subtract(taken))) {
            throw new BrokenChain("it does not fit the " + left + " that remained");
        }
        change("REPLACE INTO wallet VALUES (?, ?, ?, ?, ?, ?)", wallet, e.get("currency").asText(), seq,
            balanceAfter.toPlainString(), heldAfter.toPlainString(), e.path("state").asText(state));
        if (of != 0 || holds) {
            change("REPLACE INTO remains VALUES (?, ?, ?)", wallet, holds ? seq : of,
                remaining.toPlainString());
        }
    }

    static BigDecimal amount(JsonNode e, String member) { return new BigDecimal(e.path(member).asText("0")); }

    static boolean differ(BigDecimal a, BigDecimal b) { return a.compareTo(b) != 0; } // 1.0 is 1

    int change(String sql, Object... values) throws SQLException {
        try (PreparedStatement s = prepare(sql, values)) {
            return s.executeUpdate();
        }
    }

    /** The first row, or null. */
    String[] read(String sql, Object... values) throws SQLException {
        try (PreparedStatement s = prepare(sql, values); ResultSet rows = s.executeQuery()) {
            String[] row = rows.next() ? new String[rows.getMetaData().getColumnCount()] : null;
            for (int i = 0; row != null && i < row.length; i++) {
                row[i] = rows.getString(i + 1);
            }
            return row;
        }
    }

    PreparedStatement prepare(String sql, Object... values) throws SQLException {
        PreparedStatement s = db.prepareStatement(sql);
        for (int i = 0; i < values.length; i++) {
            s.setObject(i + 1, values[i]);
        }
        return s;
    }
}

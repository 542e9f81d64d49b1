// The client that openapi-generator makes for Java, in use: see ../clients_test.go.

import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.openapitools.client.ApiClient;
import org.openapitools.client.ApiException;
import org.openapitools.client.ApiResponse;
import org.openapitools.client.api.HoldsApi;
import org.openapitools.client.api.MovementsApi;
import org.openapitools.client.api.TransactionsApi;
import org.openapitools.client.api.WalletsApi;
import org.openapitools.client.model.*;

class Main {
    static int keys;

    static String next() {
        return "java-" + ++keys;
    }

    static void demand(boolean ok, String what, Object seen) {
        if (!ok) throw new AssertionError(what + ": " + seen);
    }

    static WalletsApi wallets;
    static MovementsApi movements;
    static HoldsApi holds;

    static long create() throws ApiException {
        return wallets.createWallet(new CreateWalletRequest().currency("USD"), next()).getWalletId();
    }

    static ApiResponse<Receipt> deposit(long wallet, String amount) throws ApiException {
        DepositRequest body = new DepositRequest().amount(amount).reference("invoice 7")
            .metadata(Map.of("cart", "c-19"));
        ApiResponse<Receipt> answer = movements.depositWithHttpInfo(wallet, body, "d");
        Receipt receipt = answer.getData();
        demand(receipt.getAmount().equals(amount) && receipt.getBalance().equals(amount), "deposit", receipt);
        Balance balance = wallets.getBalance(wallet, null, null, null, "no-cache");
        demand(balance.getBalance().equals(amount), "balance", balance);
        return answer;
    }

    static String hold(long payer, Long payee) throws ApiException {
        HoldReceipt hold = holds.placeHold(payer, new PlaceHoldRequest().amount("5").toId(payee), next());
        demand(hold.getHeld().equals("5"), "hold", hold);
        return hold.getHoldId();
    }

    public static void main(String[] args) throws Exception {
        ApiClient client = new ApiClient();
        client.updateBaseUri(System.getenv("WALLET_URL"));
        client.setRequestInterceptor(r -> r.header("Authorization", "Bearer " + System.getenv("WALLET_KEY")));
        wallets = new WalletsApi(client);
        movements = new MovementsApi(client);
        holds = new HoldsApi(client);
        TransactionsApi transactions = new TransactionsApi(client);
        long payer = create(), payee = create(), rich = create();

        String first = deposit(payer, "16777217.25").getData().getTransactionId();
        deposit(rich, "98765432109876543210");
        ApiResponse<Receipt> again = deposit(payer, "16777217.25");
        demand(again.getData().getTransactionId().equals(first)
            && again.getHeaders().get("idempotent-replayed").equals(List.of("true")), "a retry", again);

        TransferRequest pay = new TransferRequest().toId(payee).amount("10.50");
        TransferReceipt transfer = movements.transfer(payer, pay, next());
        demand(transfer.getToBalance().equals("10.5"), "transfer", transfer);

        Capture taken = holds.captureHold(hold(payer, null), new CaptureHoldRequest().amount("3"), next());
        demand(taken.getWalletId() == payer && taken.getFromId() == null && taken.getHeld().equals("0"),
            "a captured withdrawal", taken);
        Capture paid = holds.captureHold(hold(payer, payee), new CaptureHoldRequest(), next());
        demand(paid.getToId() == payee && paid.getAmount().equals("5"), "a captured transfer", paid);

        List<Entry> entries = new ArrayList<>();
        Pattern cursorOf = Pattern.compile("[?&]cursor=([^&>]*)");
        for (String cursor = null, more = ""; more != null; ) {
            ApiResponse<List<Entry>> page =
                wallets.getHistoryWithHttpInfo(payer, 4, null, null, null, cursor);
            entries.addAll(page.getData());
            List<String> link = page.getHeaders().get("link");
            more = link == null ? null : link.get(0);
            if (more != null) {
                Matcher found = cursorOf.matcher(more);
                demand(found.find(), "a link", more);
                cursor = found.group(1);
            }
        }
        demand(entries.size() == 6, "history", entries);
        for (int i = 0; i < 6; i++) demand(entries.get(i).getSeq() == i + 1, "the history's order", entries);
        Entry out = entries.get(1);
        demand(out.getKind() == Entry.KindEnum.TRANSFER_OUT && out.getAmount().equals("-10.5")
            && out.getCounterparty().getWalletId() == payee, "a transfer's entry", out);

        Transaction moved = transactions.getTransaction(transfer.getTransactionId());
        demand(moved.getActualInstance() instanceof Transfer t && t.getToId() == payee, "a transfer", moved);
        Transaction came = transactions.getTransaction(first);
        demand(came.getActualInstance() instanceof Movement d && d.getAmount().equals("16777217.25")
            && d.getMetadata().get("cart").equals("c-19"), "a deposit", came);

        DepositOperation in = new DepositOperation().op(DepositOperation.OpEnum.DEPOSIT)
            .walletId(payer).amount("1");
        TransferOperation over = new TransferOperation().op(TransferOperation.OpEnum.TRANSFER)
            .walletId(payer).toId(payee).amount("1");
        BatchResults batch = movements.postBatch(new PostBatchRequest()
            .addOperationsItem(new BatchOperation(in)).addOperationsItem(new BatchOperation(over)), next());
        demand(batch.getResults().size() == 2, "a batch", batch);

        try {
            movements.withdraw(payee, new WithdrawRequest().amount("1000"), next());
            demand(false, "a refusal", "it was done");
        } catch (ApiException no) {
            Problem problem = client.getObjectMapper().readValue(no.getResponseBody(), Problem.class);
            demand(no.getCode() == 422 && problem.getCode() == Problem.CodeEnum.INSUFFICIENT_FUNDS
                && !problem.getDetail().isEmpty(), "a refusal", problem);
        }
        System.out.println("ok");
    }
}

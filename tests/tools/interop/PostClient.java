// POSTs its second argument to the URL in the first, in chunks, as if the length were unknown. Exits with 0 for a 202.

import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

class PostClient {
    public static void main(String[] arguments) throws Exception {
        byte[] body = arguments[1].getBytes("UTF-8");
        HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .expectContinue(true)
            .POST(HttpRequest.BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(body)))
            .build();
        HttpResponse<String> response = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString());
        System.exit(response.statusCode() == 202 ? 0 : 1);
    }
}

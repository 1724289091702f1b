"""HTTP on the same port, origins, and the log (RFC 9110, 9112; RFC 6455 10.2)."""

from __future__ import annotations

import email.utils
import functools
import gzip
import json
import re
import time
import typing
import unittest.mock

import pywebsock
from pywebsock import HandshakeError, WebSocketHandler
from tests.tools import faults
from tests.tools.support import DEADLINE, ROOT, Client, Recorder, ServerTestCase, at_once, eventually, exchange, request

PAGE = "pywebsock.html"


def http(method: str, target: str = "/", body: bytes = b"", **fields: str | None) -> bytes:
    """Return a request; header fields are keyword arguments, with _ for -, and None for no such field."""
    lines = {"Host": "localhost:4545", "Content_Length": str(len(body)) if body else None, **fields}
    head = [f"{method} {target} HTTP/1.1"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in lines.items() if value is not None]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


class Page(ServerTestCase):
    """GET / returns the page."""

    def test_get(self) -> None:
        port = self.serve().server_address[1]
        page = (ROOT / PAGE).read_bytes()
        for target in ("/", "/?query", "http://localhost:4545/", "http://localhost:4545", "HTTP://localhost:4545/?x"):
            with self.subTest(target=target):
                status, fields, body = exchange(port, http("GET", target))
                self.assertEqual((status, body), (200, page))
                self.assertEqual(fields["content-type"], "text/html; charset=utf-8")
                self.assertEqual(fields["content-length"], str(len(page)))
                self.assertEqual(fields["connection"], "close")

    def test_head(self) -> None:
        port = self.serve().server_address[1]
        self.assertEqual(exchange(port, http("HEAD"))[:2], exchange(port, http("GET"))[:2])
        self.assertEqual(exchange(port, http("HEAD"))[2], b"")

    def test_policy(self) -> None:
        """The header field is the policy of the page itself (the value here is in lower case)."""
        policy = exchange(self.serve().server_address[1], http("GET"))[1]["content-security-policy"]
        self.assertRegex(policy, "^default-src 'none'; [ -~]*; frame-ancestors 'none'$")
        self.assertIn(policy.rpartition(";")[0], " ".join((ROOT / PAGE).read_text("utf-8").lower().split()))

    def test_http_1_0(self) -> None:
        """HTTP/1.0 requires no Host."""
        port = self.serve().server_address[1]
        self.assertEqual(exchange(port, b"GET / HTTP/1.0\r\n\r\n")[0], 200)

    def test_slow_reader(self) -> None:
        """Earlier broadcasts do not count: the backlog of a request is its response."""
        server = self.serve(max_backlog=50_000, ping_interval=60, ping_timeout=0.2)  # a check every 0.05 s
        faults.small_buffers(server)
        listener = self.connect(server)
        for _ in range(2):
            server.broadcast(bytes(50_000))
            listener.read()
        client = self.connect(server, handshake=False, small=True)
        client.send_raw(http("GET"))
        client.read_some(1)
        eventually(lambda: server.status()["slow"])
        now = server._loop.now
        eventually(lambda: server._loop.now > now + 2 * server._loop.deadlines.interval)  # it is looked after
        self.assertTrue(client.read_all().endswith((ROOT / PAGE).read_bytes()))

    def test_missing(self) -> None:
        port = self.serve().server_address[1]
        with unittest.mock.patch.object(pywebsock, "__file__", "/nowhere/pywebsock.py"):
            status, _, body = exchange(port, http("GET"))
        self.assertEqual(status, 404)
        self.assertIn(b"pywebsock.html cannot be read", body)


class Status(ServerTestCase):
    """GET /status returns JSON for monitoring."""

    def test_figures(self) -> None:
        server = self.serve()
        client = self.connect(server)
        for message in ("12345", b"678"):
            client.send(message)
            client.read()
        eventually(lambda: server.status()["messages"] == 2)  # messages are counted after they were sent
        status, fields, body = exchange(server.server_address[1], http("GET", "/status"))
        self.assertEqual((status, fields["content-type"]), (200, "application/json"))
        figures = json.loads(body)
        self.assertEqual([figures[name] for name in ("clients", "messages", "bytes")], [1, 2, 8])
        self.assertGreaterEqual(figures["uptime"], 0)
        self.assertLess(figures["uptime"], 60)
        self.assertIs(figures["read_only"], False)

    def test_head(self) -> None:
        status, fields, body = exchange(self.serve().server_address[1], http("HEAD", "/status?x"))
        self.assertEqual((status, fields["content-type"], body), (200, "application/json", b""))

    def test_names(self) -> None:
        """DNS rebinding: a page from a name that points to this machine sends no Origin with GET."""
        listed = ["https://chat.example.com", "http://*.intern:8080"]
        for origins, host, expected in (
            *(((), host, 200) for host in ("localhost", "a.localhost:1", "127.0.0.1:4545", "[::1]", "LOCALHOST:4545")),
            *(((), host, 403) for host in ("evil.example:4545", "localhost.evil.example", "chat.example.com")),
            *((listed, host, 200) for host in ("chat.example.com", "Chat.Example.com:4545", "a.intern:1", "localhost")),
            *(
                (listed, host, 403)
                for host in ("example.com", "evil.example", "intern", "xintern", "chat.example.com.")
            ),
            (["*"], "evil.example", 200),
            (["null"], "null", 200),
            (["file://"], "file", 403),
        ):
            with self.subTest(host, origins=origins):
                port = self.serve(origins=origins).server_address[1]
                status, _, body = exchange(port, http("GET", "/status", Host=host))
                self.assertEqual(status, expected)
                self.assertEqual(b'"uptime"' in body, expected == 200)
                if expected == 403:
                    hint = body.decode().partition("--origin ")[2].partition(" ")[0]
                    port = self.serve(origins=[hint]).server_address[1]
                    self.assertEqual(exchange(port, http("GET", "/status", Host=host))[0], 200)
        self.assertEqual(exchange(port, http("GET", Host="evil.example"))[0], 200)  # the page is public


class Post(ServerTestCase):
    """POST / broadcasts its body: curl -d 'deploy done' localhost:4545."""

    FORM = "application/x-www-form-urlencoded"  # the type that curl -d sends

    BODIES = (
        (b"deploy done", FORM, "deploy done"),
        (b"deploy done", None, "deploy done"),
        ("κόσμε".encode(), "text/plain; charset=utf-8", "κόσμε"),
        (b'{"a": 1}', "application/json", '{"a": 1}'),
        (b"text", "application/octet-stream", b"text"),
        (b"text", "Application/Octet-Stream; x=y", b"text"),
        (b"\xff\xfe", "text/plain", b"\xff\xfe"),
        (b"\xff\xfe", None, b"\xff\xfe"),
        (b"x" * 200_000, FORM, "x" * 200_000),
    )

    REFUSED = (
        (411, "no length", http("POST")),
        (400, "no chunks", http("POST", Transfer_Encoding="chunked") + b"x\r\n"),
        (400, "both", http("POST", body=b"x", Transfer_Encoding="chunked")),
        (413, "long chunks", http("POST", Transfer_Encoding="chunked") + b"493E1\r\n" + bytes(300_001)),
        (400, "negative", http("POST", Content_Length="-1")),
        (400, "signed", http("POST", Content_Length="+1")),
        (400, "a word", http("POST", Content_Length="one")),
        (400, "hexadecimal", http("POST", Content_Length="0x1")),
        (400, "two lengths", http("POST", Content_Length="1\r\nContent-Length: 2")),
        (400, "not ASCII", http("POST", Content_Length="\xb2")),
        (400, "no Host", http("POST", body=b"x", Host=None)),
        (413, "too long", http("POST", Content_Length="300001")),
        (413, "much too long", http("POST", Content_Length="9" * 18)),
        (415, "compressed otherwise", http("POST", "/", b"x", Content_Encoding="br")),
        (400, "not compressed", http("POST", "/", b"x", Content_Encoding="gzip")),
        (413, "a bomb", http("POST", "/", gzip.compress(bytes(300_001)), Content_Encoding="gzip")),
        (405, "not here", http("POST", "/status", b"x")),
        (404, "nowhere", http("POST", "/x", b"x")),
    )

    def test_broadcast(self) -> None:
        server = self.serve()
        client = self.connect(server)
        for body, kind, message in self.BODIES:
            with self.subTest(body=body[:20], kind=kind):
                self.assertEqual(exchange(server.server_address[1], http("POST", "/", body, Content_Type=kind))[0], 202)
                self.assertEqual(client.read(), message)

    def test_compressed(self) -> None:
        server = self.serve(max_message=1000)
        client = self.connect(server)
        data = http("POST", "/", gzip.compress(b"x" * 1000), Content_Encoding="gzip", Content_Type=self.FORM)
        self.assertEqual(exchange(server.server_address[1], data)[0], 202)
        self.assertEqual(client.read(), "x" * 1000)

    def test_empty(self) -> None:
        server = self.serve()
        client = self.connect(server)
        self.assertEqual(exchange(server.server_address[1], http("POST", Content_Length="0"))[0], 202)
        self.assertEqual(client.read(), "")

    def test_refused(self) -> None:
        server = self.serve(max_message=300_000)
        client = self.connect(server)
        for status, what, data in self.REFUSED:
            with self.subTest(what):
                self.assertEqual(exchange(server.server_address[1], data)[0], status)
        server.broadcast("end")
        self.assertEqual(client.read(), "end")

    def test_at_the_limit(self) -> None:
        server = self.serve(max_message=1000)
        client = self.connect(server)
        self.assertEqual(exchange(server.server_address[1], http("POST", "/", bytes(1000)))[0], 202)
        self.assertEqual(client.read(), "\0" * 1000)
        self.assertEqual(exchange(server.server_address[1], http("POST", "/", bytes(1001)))[0], 413)

    def test_in_pieces(self) -> None:
        server = self.serve()
        client, poster = self.connect(server), self.connect(server, handshake=False)
        for byte in http("POST", "/", b"piecemeal"):
            poster.send_raw(bytes([byte]))
        self.assertEqual(client.read(), "piecemeal")
        self.assertTrue(poster.read_all().startswith(b"HTTP/1.1 202 "))

    def test_chunked(self) -> None:
        """RFC 9112 7.1: chunks, as programs send data of unknown length; later data is ignored."""
        server = self.serve(max_message=100_000)
        client, poster = self.connect(server), self.connect(server, handshake=False)
        poster.send_raw(http("POST", Transfer_Encoding="chunked", Expect="100-continue"))
        self.assertEqual(poster.read_head(), b"HTTP/1.1 100 Continue\r\n\r\n")
        for piece in (b"5;x=y\r", b"\nchunk", b"\r\n186A", b"0\r\n", b" " * 99_990):
            poster.send_raw(piece)
        poster.send_raw(b"12345ended!\r\n0\r\nX-Trailer: 1\r\n\r\n" + http("POST", "/", b"smuggled"))
        self.assertTrue(poster.read_all().startswith(b"HTTP/1.1 413 "))
        small = http("POST", Transfer_Encoding="chunked") + b"5\r\nchunk\r\n4\r\ns!!!\r\n0\r\nX: 1\r\n\r\n"
        self.assertEqual(exchange(server.server_address[1], small + http("POST", "/", b"smuggled"))[0], 202)
        server.broadcast("end")
        self.assertEqual([client.read(), client.read()], ["chunks!!!", "end"])

    def test_100_continue(self) -> None:
        """curl expects it before a large body."""
        server = self.serve()
        client, poster = self.connect(server), self.connect(server, handshake=False)
        poster.send_raw(http("POST", Content_Length="5", Expect="100-continue"))
        self.assertEqual(poster.read_head(), b"HTTP/1.1 100 Continue\r\n\r\n")
        poster.send_raw(b"Hello")
        self.assertEqual(client.read(), "Hello")
        self.assertTrue(poster.read_all().startswith(b"HTTP/1.1 202 "))
        refused = exchange(server.server_address[1], http("POST", Content_Length="9" * 18, Expect="100-continue"))
        self.assertEqual(refused[0], 413)  # without a 100 before

    def test_no_100_continue(self) -> None:
        """RFC 9110 10.1.1: no 100 for HTTP/1.0, which does not know it, or for other expectations."""
        port = self.serve().server_address[1]
        asked = http("POST", body=b"Hello", Expect="100-Continue")
        for data, status in (
            (asked, 100),
            (asked.replace(b"HTTP/1.1", b"HTTP/1.2"), 100),
            (asked.replace(b"HTTP/1.1", b"HTTP/1.0"), 202),
            (asked.replace(b"100-", b"200-"), 202),
        ):
            with self.subTest(data):
                self.assertEqual(exchange(port, data)[0], status)

    def test_body_that_does_not_come(self) -> None:
        server = self.serve(handshake_timeout=0.3, max_message=1000)
        client = self.connect(server)
        requests = (
            http("POST", Content_Length="5") + b"Hell",
            http("POST", Transfer_Encoding="chunked") + b"5\r\nHello\r\n",
            http("POST", Transfer_Encoding="chunked") + b"5\r\nHello\r\n0\r\nX: y\r\n",
        )
        responses = at_once(lambda data: exchange(server.server_address[1], data), requests)
        self.assertEqual([status for status, _, _ in responses], [408] * 3)
        server.broadcast("end")
        self.assertEqual(client.read(), "end")

    def test_connection_that_ends_in_the_body(self) -> None:
        server = self.serve()
        with self.assertLogs("pywebsock", "INFO") as logged:
            with self.connect(server, handshake=False) as client:
                client.send_raw(http("POST", Content_Length="5") + b"Hell")
            eventually(lambda: logged.output)
        self.assertIn("gone before the response: the connection ended", logged.output[0])

    def test_time_for_a_body(self) -> None:
        """The deadline of a long body is later than that of the head."""
        server = self.serve(handshake_timeout=20.0)
        late = server._loop.now + 20.0 + (1 << 20) / pywebsock.SLOWEST_POST
        self.connect(server, handshake=False).send_raw(http("POST", Content_Length=str(1 << 20)) + b"x")
        eventually(lambda: [handler for handler in list(server._room.pending) if handler.deadline >= late])

    def test_endless_trailers(self) -> None:
        """The deadline is there for those too who always have something more to say."""
        server = self.serve(max_message=1000, handshake_timeout=0.1, close_timeout=0.1)
        client = self.connect(server, handshake=False)
        client.send_raw(http("POST", Transfer_Encoding="chunked") + b"0\r\n")
        end = time.monotonic() + DEADLINE
        with self.assertRaises(ConnectionError):
            while time.monotonic() < end:
                client.send_raw(b"Field: value\r\n" * 10_000)


class Date(ServerTestCase):
    """A Date field is in all responses but 1xx (RFC 9110 6.6.1)."""

    def test_date(self) -> None:
        port = self.serve().server_address[1]
        for data in (
            http("GET"),
            http("HEAD"),
            http("GET", "/status"),
            http("OPTIONS"),
            http("POST", body=b"x"),
            http("POST"),
            http("GET", "/nothing"),
            request(Sec_WebSocket_Version="8"),
        ):
            with self.subTest(data[:40]):
                before = int(time.time()) - 1  # gmtime() may use a coarser clock
                with Client(port, handshake=False) as client:
                    client.send_raw(data)
                    head = client.read_all().partition(b"\r\n\r\n")[0].decode("latin-1")
                (date,) = re.findall("\r\nDate: (.*?)(?:\r\n|$)", head)
                moment = email.utils.parsedate_to_datetime(date)
                self.assertTrue(before <= moment.timestamp() <= time.time(), date)
                self.assertEqual(email.utils.format_datetime(moment, usegmt=True), date)

    def test_first_days_of_a_month(self) -> None:
        with unittest.mock.patch("time.gmtime", return_value=time.gmtime(784111777 - 5 * 86400)):
            self.assertIn(b"\r\nDate: Tue, 01 Nov 1994 08:49:37 GMT\r\n", pywebsock.serialize_response(200, ()))

    def test_not_in_101(self) -> None:
        with self.connect(self.serve()) as client:
            self.assertNotIn(b"\r\nDate:", client.response)


class Elsewhere(ServerTestCase):
    """404 for other paths, 405 with Allow for other methods."""

    CASES = (
        (404, "GET", "/nothing", None),
        (404, "GET", "//", None),
        (404, "GET", "/status/", None),
        (404, "GET", "/../pywebsock.py", None),
        (404, "GET", "/pywebsock.py", None),
        (404, "GET", "/%2e%2e/etc/passwd", None),
        (404, "GET", "http://localhost:4545/nothing", None),
        (405, "PUT", "/", {"get", "head", "post", "options"}),
        (405, "DELETE", "/", {"get", "head", "post", "options"}),
        (405, "GET", "*", {"options"}),
        (404, "OPTIONS", "/nothing", None),
        (405, "get", "/", {"get", "head", "post", "options"}),
        (405, "POST", "/status", {"get", "head", "options"}),
    )

    def test_host_first(self) -> None:
        """A request with a wrong Host field gets 400, also where nothing is (RFC 9112 3.2)."""
        port = self.serve().server_address[1]
        for method, target in (("GET", "/nothing"), ("PUT", "/")):
            for host in (None, "a\r\nHost: b"):
                with self.subTest(method, host=host):
                    self.assertEqual(exchange(port, http(method, target, Host=host))[0], 400)

    def test_elsewhere(self) -> None:
        port = self.serve().server_address[1]
        for status, method, target, allowed in self.CASES:
            with self.subTest(method=method, target=target):
                got, fields, body = exchange(port, http(method, target))
                self.assertEqual((got, fields["content-length"]), (status, str(len(body))))
                self.assertEqual(set(fields["allow"].split(", ")) if "allow" in fields else None, allowed)

    def test_log(self) -> None:
        """The log has the path of the request, and a hint for clients of other protocols."""
        port = self.serve().server_address[1]
        for target, named, hint in (
            ("/nothing?token=secret", "/nothing is not here", False),
            ("/socket.io/?EIO=4&transport=polling", "/socket.io/ is not here", True),
            ("/hub/negotiate?negotiateVersion=1", "/hub/negotiate is not here", True),
            ("/chat/sockjs/info", "/chat/sockjs/info is not here", True),
            ("/" + "x" * 1000, f"/{'x' * 79} is not here", False),
        ):
            with self.subTest(target[:40]), self.assertLogs("pywebsock", "WARNING") as logged:
                exchange(port, http("GET", target))
            self.assertIn(f"refused: 404, {named}: there are / and /status", logged.output[0])
            self.assertEqual("does not speak the protocol" in logged.output[0], hint)


class Options(ServerTestCase):
    """OPTIONS: preflight requests of browsers (Fetch 3.3, 4.8) and health checks."""

    ASKED: typing.ClassVar[dict[str, typing.Any]] = {
        "Access_Control_Request_Method": "POST",
        "Access_Control_Request_Headers": "authorization,content-type",
    }

    def test_allowed(self) -> None:
        server = self.serve(origins=["https://example.com"])
        for origin in ("https://example.com", "http://localhost:4545"):
            with self.subTest(origin):
                data = http("OPTIONS", Origin=origin, **self.ASKED)
                status, fields, body = exchange(server.server_address[1], data)
                self.assertEqual((status, body), (204, b""))
                self.assertEqual(fields["access-control-allow-origin"], origin)
                self.assertEqual(fields["access-control-allow-credentials"], "true")
                self.assertEqual(fields["access-control-allow-methods"], "get, head, post")
                self.assertEqual(fields["access-control-allow-headers"], "authorization,content-type")
                self.assertGreater(int(fields["access-control-max-age"]), 0)
                self.assertNotIn("content-length", fields)  # RFC 9110 8.6
        self.assertEqual(server.heard, [])

    def test_refused(self) -> None:
        port = self.serve().server_address[1]
        status, fields, body = exchange(port, http("OPTIONS", Origin="https://example.com", **self.ASKED))
        self.assertEqual(status, 403)
        self.assertNotIn("access-control-allow-headers", fields)
        self.assertIn(b"--origin https://example.com", body)

    def test_no_page(self) -> None:
        port = self.serve().server_address[1]
        for target, allowed in (("/", "get, head, post, options"), ("/status", "get, head, options"), ("*", "options")):
            with self.subTest(target):
                status, fields, body = exchange(port, http("OPTIONS", target))
                self.assertTrue(fields.pop("date"))
                self.assertEqual((status, fields, body), (204, {"allow": allowed, "connection": "close"}, b""))
        self.assertEqual(exchange(port, b"OPTIONS / HTTP/1.0\r\n\r\n")[0], 204)  # from HAProxy

    def test_the_page_may_read_the_response(self) -> None:
        """Also with credentials, for which * is not enough, and after a refusal."""

        class Server(Recorder):
            refusal = HandshakeError(401, "no token", ("WWW-Authenticate", "Bearer"))

            def admit(self, client: WebSocketHandler) -> None:
                if "authorization" not in client.headers:
                    raise self.refusal

        port = self.serve(Server, max_message=10).server_address[1]
        for status, data in (
            (202, http("POST", "/", b"x", Origin="null", Authorization="Bearer x")),
            (401, http("POST", "/", b"x", Origin="null")),
            (401, http("POST", "/", b"x", Origin="null")),
            (413, http("POST", "/", b"x" * 11, Origin="null", Authorization="Bearer x")),
            (200, http("GET", "/status", Origin="null")),
        ):
            with self.subTest(status, data=data):
                client = Client(port, handshake=False)
                self.addCleanup(client.__exit__)
                client.send_raw(data)
                head = client.read_head()
                self.assertEqual(head[9:12], b"%d" % status)
                self.assertEqual(head.count(b"\r\nAccess-Control-Allow-Origin: null\r\n"), 1)
                self.assertEqual(head.count(b"Access-Control-Allow-Origin"), 1)
                self.assertEqual(head.count(b"\r\nAccess-Control-Allow-Credentials: true\r\n"), 1)


class Host(ServerTestCase):
    """RFC 9112 3.2: an HTTP/1.1 request without a well-formed Host gets 400."""

    def test_host(self) -> None:
        port = self.serve().server_address[1]
        for host in ("localhost", "localhost:4545", "LOCALHOST:1", "127.0.0.1", "[::1]:4545", "example.com", "a.b:"):
            with self.subTest(host=host):
                self.assertEqual(exchange(port, http("GET", Host=host))[0], 200)
        for wrong in (None, "", "a b", "a/b", "a@b", "a,b", "a\r\nHost: a", "<script>", "a:b", "a:123456", "[::1"):
            with self.subTest(host=wrong):
                self.assertEqual(exchange(port, http("GET", Host=wrong))[0], 400)


LISTED = ("https://example.com", "http://[2001:db8::1]:80")

# --origin, Host, Origin, whether the client may connect
ORIGINS = (
    # programs
    ((), "localhost:4545", None, True),
    ((), "example.com", None, True),
    (LISTED, "localhost:4545", None, True),
    # the page from disk, in browsers
    ((), "localhost:4545", "null", True),
    ((), "localhost:4545", "file://", True),
    ((), "192.168.1.2:4545", "null", True),
    (LISTED, "localhost:4545", "null", False),
    (LISTED, "localhost:4545", "file://", False),
    (("null",), "localhost:4545", "null", True),
    (("null", "file://"), "localhost:4545", "file://", True),
    # the page from this server
    ((), "localhost:4545", "http://localhost:4545", True),
    ((), "localhost:4545", "https://localhost:4545", True),
    ((), "LOCALHOST:4545", "http://localhost:4545", True),
    ((), "localhost", "http://localhost", True),
    ((), "127.0.0.1:4545", "http://127.0.0.1:4545", True),
    ((), "192.168.1.2:4545", "http://192.168.1.2:4545", True),
    ((), "192.168.1.2:80", "http://192.168.1.2", True),
    ((), "chat.localhost:4545", "http://chat.localhost:4545", True),
    # the page from this server, in libraries
    ((), "localhost:4545", "http://localhost:4545/", True),
    ((), "localhost:4545", "ws://localhost:4545", True),
    ((), "[::1]:4545", "http://[::1]:4545", True),
    (LISTED, "localhost:4545", "http://localhost:4545", True),
    # another port or name is another origin
    ((), "localhost:4545", "http://localhost:8000", False),
    ((), "localhost:4545", "http://localhost", False),
    ((), "localhost:4545", "http://127.0.0.1:4545", False),
    ((), "127.0.0.1:4545", "http://localhost:4545", False),
    ((), "localhost:4545", "ws://localhost:4546", False),
    # other pages
    ((), "localhost:4545", "https://example.com", False),
    ((), "localhost:4545", "http://localhost.example.com", False),
    ((), "localhost:4545", "http://localhost:4545.example.com", False),
    ((), "localhost:4545", "http://localhost:4545@example.com", False),
    ((), "localhost:4545", "http://example.com/http://localhost:4545", False),
    ((), "localhost:4545", "chrome-extension://abc", False),
    ((), "localhost:4545", "", False),
    ((), "localhost:4545", "http://localhost:4545, http://localhost:4545", False),
    # DNS rebinding: a name that points to this machine
    ((), "evil.example:4545", "http://evil.example:4545", False),
    ((), "localhost.evil.example:4545", "http://localhost.evil.example:4545", False),
    ((), "127.0.0.1.evil.example", "http://127.0.0.1.evil.example", False),
    (LISTED, "evil.example:4545", "http://evil.example:4545", False),
    # the list
    (LISTED, "localhost:4545", "https://example.com", True),
    (LISTED, "anything", "https://example.com", True),
    (LISTED, "localhost:4545", "HTTPS://Example.com", True),
    (LISTED, "localhost:4545", "http://[2001:db8::1]", True),
    (("https://example.com/",), "localhost:4545", "https://example.com", True),
    (LISTED, "localhost:4545", "http://example.com", False),
    (LISTED, "localhost:4545", "https://example.com:8443", False),
    (LISTED, "localhost:4545", "https://www.example.com", False),
    (LISTED, "localhost:4545", "https://example.com.evil.example", False),
    (("https://*.example.com",), "localhost:4545", "https://www.example.com", True),
    (("https://*.example.com",), "localhost:4545", "https://example.com", False),
    # any
    (("*",), "localhost:4545", "https://example.com", True),
    (("*",), "evil.example", "http://evil.example", True),
    (("*",), "localhost:4545", "null", True),
)


class Origin(ServerTestCase):
    """Web pages of other sites must not reach a server on the user's own machine."""

    def test_origins(self) -> None:
        """The same rule holds for WebSockets and POST; a refused POST is not broadcast."""
        for origins in dict.fromkeys(case[0] for case in ORIGINS):
            server = self.serve(origins=origins)
            port = server.server_address[1]
            witness = self.connect(server)
            for _, host, origin, may in (case for case in ORIGINS if case[0] == origins):
                with self.subTest(origins=origins, host=host, origin=origin):
                    post = exchange(port, http("POST", "/", b"posted", Host=host, Origin=origin))
                    self.assertEqual(post[0], 202 if may else 403)
                    client = self.connect(server, handshake=False)
                    client.send_raw(request(Host=host, Origin=origin))
                    self.assertEqual(client.read_head()[9:12], b"101" if may else b"403")
                    client.socket.close()
                    server.broadcast("next")
                    self.assertEqual([witness.read() for _ in range(1 + may)], ["posted", "next"][1 - may :])

    def test_reason_by_get(self) -> None:
        """A browser does not tell a page why its WebSocket was refused; a GET does, and any origin may read that."""
        port = self.serve().server_address[1]
        for target in ("/", "/status"):
            status, fields, body = exchange(port, http("GET", target, Origin="https://example.com"))
            self.assertEqual((status, fields["access-control-allow-origin"]), (403, "https://example.com"))
            self.assertIn(b"--origin https://example.com", body)
            status, fields, _ = exchange(port, http("GET", target, Origin="null"))
            self.assertEqual((status, fields["access-control-allow-origin"]), (200, "null"))
            self.assertEqual(exchange(port, http("GET", target))[0], 200)

    def test_the_log_names_the_option(self) -> None:
        port = self.serve().server_address[1]
        with self.assertLogs("pywebsock", "WARNING") as logged:
            self.assertEqual(exchange(port, request(Origin="https://example.com"))[0], 403)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("--origin https://example.com", logged.output[0])


class Log(ServerTestCase):
    """Data from the network is escaped before it is logged."""

    HOSTILE = (
        request(Origin="http://a\x1b[2Jb"),
        request(Origin="http://\xe9"),
        request(Origin="http://\x85x\x9bx"),
        request(Origin="http://" + "x" * 8000),
        http("GET", "/\xe9\x9b"),
        http("G\x1bT"),
        b"\x1b[2J\r\n\r\n",
        b"GET /\x1b HTTP/1.1\r\n\r\n",
        request(Sec_WebSocket_Extensions="\x9b"),
        request(Host="\x9b"),
    )

    def test_escaped(self) -> None:
        port = self.serve().server_address[1]
        for data in self.HOSTILE:
            with self.subTest(data=data[:100]), self.assertLogs("pywebsock", "INFO") as logged:
                self.assertGreaterEqual(exchange(port, data)[0], 400)
            self.check(logged.output)

    def test_reason_of_a_close(self) -> None:
        server = self.serve()
        client = self.connect(server)
        with self.assertLogs("pywebsock", "INFO") as logged:
            client.close(4000, "a\nb\x1b[2J\u2028\u202e\x9b")
            client.read_close()
            eventually(functools.partial(getattr, logged, "output"))
        self.check(logged.output)

    def check(self, lines: list[str]) -> None:
        """Check that the log has one short line of printable ASCII."""
        self.assertEqual(len(lines), 1)
        self.assertTrue(lines[0].isascii() and lines[0].isprintable(), ascii(lines[0]))
        self.assertLess(len(lines[0]), 1000)

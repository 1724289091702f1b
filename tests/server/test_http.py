"""HTTP on the same port, who may connect, and what reaches the log (RFC 9110, 9112; RFC 6455 10.2)."""

from __future__ import annotations

import functools
import json
import unittest.mock

import pywebsock
from tests.tools.support import ROOT, ServerTestCase, eventually, exchange, request

PAGE = "pywebsock.html"


def http(method: str, target: str = "/", body: bytes = b"", **fields: str | None) -> bytes:
    """An ordinary request; fields by their name with _ for -, None to leave one out."""
    lines = {"Host": "localhost:4545", "Content_Length": str(len(body)) if body else None, **fields}
    head = [f"{method} {target} HTTP/1.1"]
    head += [f"{name.replace('_', '-')}: {value}" for name, value in lines.items() if value is not None]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


class Page(ServerTestCase):
    """GET / is the page that lies beside the module."""

    def test_get(self) -> None:
        port = self.serve().server_address[1]
        page = (ROOT / PAGE).read_bytes()
        for target in ("/", "/?query", "http://localhost:4545/", "http://localhost:4545", "HTTP://localhost:4545/?x"):
            with self.subTest(target=target):
                status, fields, body = exchange(port, http("GET", target))
                self.assertEqual((status, body), (200, page))
                self.assertEqual(fields["content-type"], "text/html; charset=utf-8")
                self.assertRegex(fields["content-security-policy"], "^default-src 'none'; .*; form-action 'none'")
                self.assertIn(fields["content-security-policy"], " ".join(page.decode().split()))
                self.assertEqual(fields["content-length"], str(len(page)))
                self.assertEqual(fields["connection"], "close")

    def test_head(self) -> None:
        port = self.serve().server_address[1]
        self.assertEqual(exchange(port, http("HEAD"))[:2], exchange(port, http("GET"))[:2])
        self.assertEqual(exchange(port, http("HEAD"))[2], b"")

    def test_http_1_0(self) -> None:
        """Without a Host, which HTTP/1.0 does not demand."""
        port = self.serve().server_address[1]
        self.assertEqual(exchange(port, b"GET / HTTP/1.0\r\n\r\n")[0], 200)

    def test_missing(self) -> None:
        port = self.serve().server_address[1]
        with unittest.mock.patch.object(pywebsock, "__file__", "/nowhere/pywebsock.py"):
            status, _, body = exchange(port, http("GET"))
        self.assertEqual(status, 404)
        self.assertIn(PAGE.encode(), body)


class Status(ServerTestCase):
    """GET /status is JSON for monitoring."""

    def test_figures(self) -> None:
        server = self.serve()
        client = self.connect(server)
        for message in ("12345", b"678"):
            client.send(message)
            client.read()
        eventually(lambda: server.status()["messages"] == 2)  # they are counted after they have been sent
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


class Post(ServerTestCase):
    """POST / broadcasts its body: curl -d 'deploy done' localhost:4545."""

    FORM = "application/x-www-form-urlencoded"  # what curl -d says

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
        (411, "chunked", http("POST", Transfer_Encoding="chunked") + b"1\r\nx\r\n0\r\n\r\n"),
        (411, "both", http("POST", body=b"x", Transfer_Encoding="chunked")),
        (400, "negative", http("POST", Content_Length="-1")),
        (400, "signed", http("POST", Content_Length="+1")),
        (400, "a word", http("POST", Content_Length="one")),
        (400, "hexadecimal", http("POST", Content_Length="0x1")),
        (400, "two lengths", http("POST", Content_Length="1\r\nContent-Length: 2")),
        (400, "not ASCII", http("POST", Content_Length="\xb2")),
        (400, "no Host", http("POST", body=b"x", Host=None)),
        (413, "too long", http("POST", Content_Length="300001")),
        (413, "much too long", http("POST", Content_Length="9" * 18)),
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

    def test_100_continue(self) -> None:
        """curl asks for it before a body of some size."""
        server = self.serve()
        client, poster = self.connect(server), self.connect(server, handshake=False)
        poster.send_raw(http("POST", Content_Length="5", Expect="100-continue"))
        self.assertEqual(poster.read_head(), b"HTTP/1.1 100 Continue\r\n\r\n")
        poster.send_raw(b"Hello")
        self.assertEqual(client.read(), "Hello")
        self.assertTrue(poster.read_all().startswith(b"HTTP/1.1 202 "))
        refused = exchange(server.server_address[1], http("POST", Content_Length="9" * 18, Expect="100-continue"))
        self.assertEqual(refused[0], 413)  # and no 100 before

    def test_100_continue_is_not_for_everybody(self) -> None:
        """RFC 9110 10.1.1: not for HTTP/1.0, where nobody knows what 100 means; nor for what else is expected."""
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
        server = self.serve(handshake_timeout=0.3)
        client, poster = self.connect(server), self.connect(server, handshake=False)
        poster.send_raw(http("POST", Content_Length="5") + b"Hell")
        self.assertTrue(poster.read_all().startswith(b"HTTP/1.1 408 "))
        server.broadcast("end")
        self.assertEqual(client.read(), "end")


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
        (404, "OPTIONS", "*", None),
        (405, "PUT", "/", {"get", "head", "post"}),
        (405, "DELETE", "/", {"get", "head", "post"}),
        (405, "OPTIONS", "/", {"get", "head", "post"}),
        (405, "get", "/", {"get", "head", "post"}),
        (405, "POST", "/status", {"get", "head"}),
    )

    def test_elsewhere(self) -> None:
        port = self.serve().server_address[1]
        for status, method, target, allowed in self.CASES:
            with self.subTest(method=method, target=target):
                got, fields, body = exchange(port, http(method, target))
                self.assertEqual((got, fields["content-length"]), (status, str(len(body))))
                self.assertEqual(set(fields["allow"].split(", ")) if "allow" in fields else None, allowed)


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

# --origin, Host, Origin, whether it may connect
ORIGINS = (
    # programs
    ((), "localhost:4545", None, True),
    ((), "example.com", None, True),
    (LISTED, "localhost:4545", None, True),
    # the page from disk: as the browser has it
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
    ((), "[::1]:4545", "http://[::1]:4545", True),
    (LISTED, "localhost:4545", "http://localhost:4545", True),
    # another port or name is another origin
    ((), "localhost:4545", "http://localhost:8000", False),
    ((), "localhost:4545", "http://localhost", False),
    ((), "localhost:4545", "http://127.0.0.1:4545", False),
    ((), "127.0.0.1:4545", "http://localhost:4545", False),
    ((), "localhost:4545", "ws://localhost:4545", False),
    # other pages
    ((), "localhost:4545", "https://example.com", False),
    ((), "localhost:4545", "http://localhost.example.com", False),
    ((), "localhost:4545", "http://localhost:4545.example.com", False),
    ((), "localhost:4545", "http://localhost:4545@example.com", False),
    ((), "localhost:4545", "http://example.com/http://localhost:4545", False),
    ((), "localhost:4545", "chrome-extension://abc", False),
    ((), "localhost:4545", "", False),
    ((), "localhost:4545", "http://localhost:4545, http://localhost:4545", False),
    # DNS rebinding: a name that was made to point here
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
    # any
    (("*",), "localhost:4545", "https://example.com", True),
    (("*",), "evil.example", "http://evil.example", True),
    (("*",), "localhost:4545", "null", True),
)


class Origin(ServerTestCase):
    """Who may connect: other people's web pages must not reach a server on the user's own machine."""

    def test_origins(self) -> None:
        """The same rule for upgrades and POST; whoever may not, changes nothing."""
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

    def test_a_page_may_ask_why(self) -> None:
        """A browser tells no page why its WebSocket was refused; GET does, and lets those read who may connect."""
        port = self.serve().server_address[1]
        for target in ("/", "/status"):
            status, fields, body = exchange(port, http("GET", target, Origin="https://example.com"))
            self.assertEqual((status, fields["access-control-allow-origin"]), (403, "*"))
            self.assertIn(b"--origin https://example.com", body)
            status, fields, _ = exchange(port, http("GET", target, Origin="null"))
            self.assertEqual((status, fields["access-control-allow-origin"]), (200, "*"))
            self.assertEqual(exchange(port, http("GET", target))[0], 200)

    def test_a_page_may_say_its_origin(self) -> None:
        """In the query, where its browser sends none; it counts no more than that, and never gets into the answer."""
        for origins in ((), ("*",)):
            port = self.serve(origins=origins).server_address[1]
            for said, status in (
                ("https://example.com", 403),
                ("https%3A%2F%2Fexample.com", 403),
                ("null", 200),
                ("http%3A%2F%2Flocalhost%3A4545", 200),
                ("%0d%0aX-Evil:%20yes%0d%0a%0d%0aevil", 403),
                ("%e2%82%ac", 403),
                ("%ff%00", 403),
            ):
                for target in (f"/status?origin={said}", f"/?a=b&origin={said}&c=d"):
                    with self.subTest(target, origins=origins):
                        answer = exchange(port, http("GET", target))
                        self.assertEqual(answer[0], 200 if origins else status)
                        self.assertNotIn("x-evil", answer[1])
                        self.assertEqual(len(answer[2]), int(answer[1]["content-length"]))
                        self.assertEqual(exchange(port, http("GET", target, Origin="null"))[0], 200)
                self.assertEqual(exchange(port, http("POST", f"/?origin={said}", b"by a program"))[0], 202)

    def test_the_log_says_what_would_allow_it(self) -> None:
        port = self.serve().server_address[1]
        with self.assertLogs("pywebsock", "WARNING") as logged:
            self.assertEqual(exchange(port, request(Origin="https://example.com"))[0], 403)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("--origin https://example.com", logged.output[0])


class Log(ServerTestCase):
    """Bytes from the network are escaped before they reach a log."""

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
        """One line, of printable ASCII, not too long."""
        self.assertEqual(len(lines), 1)
        self.assertTrue(lines[0].isascii() and lines[0].isprintable(), ascii(lines[0]))
        self.assertLess(len(lines[0]), 1000)

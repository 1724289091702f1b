"""The opening handshake (RFC 6455 4): requests, their checks, origins, responses."""

from __future__ import annotations

import base64
import contextlib
import gzip
import random
import sys
import typing
import unittest
import zlib
from collections import deque

import pywebsock
from pywebsock import MAX_FIELDS, MAX_HEAD, MAX_LINE, HandshakeError, Request, parse_request
from tests.tools.support import ACCEPT, KEY, arriving, growth, peak_memory, request

START = b"GET / HTTP/1.1\r\n"


def outcome(*pieces: bytes) -> tuple[Request | int | None, bytes]:
    """Parse pieces; return a request, the status of an error, or None if it is not complete; and the data after it."""
    data, left = bytearray(), iter(pieces)
    try:
        for piece in left:
            parsed = parse_request(data, piece)
            if parsed:
                return parsed, bytes(data) + b"".join(left)
    except HandshakeError as error:
        return int(error.status), b""
    return None, b""


def parse(data: bytes) -> Request:
    """Parse a complete request."""
    parsed = parse_request(bytearray(), data)
    assert parsed
    return parsed


def in_bytes(data: bytes) -> tuple[Request | int | None, bytes]:
    """Parse a request byte by byte."""
    return outcome(*(data[i : i + 1] for i in range(len(data))))


def headers(**fields: str) -> Request:
    """Return a request with these header fields, whose names have _ for -."""
    return Request("GET", "/", (1, 1), {name.replace("_", "-").lower(): value for name, value in fields.items()})


class Requests(unittest.TestCase):
    """parse_request: the head of a request (RFC 9112 2 to 5)."""

    GOOD: tuple[tuple[str, bytes, Request, bytes], ...] = (
        ("no fields", b"GET / HTTP/1.1\r\n\r\n", Request("GET", "/", (1, 1), {}), b""),
        ("another method", b"OPTIONS * HTTP/1.0\r\n\r\n", Request("OPTIONS", "*", (1, 0), {}), b""),
        ("a strange method", b"M-SEARCH /a?b=%20 HTTP/1.9\r\n\r\n", Request("M-SEARCH", "/a?b=%20", (1, 9), {}), b""),
        ("what follows", b"GET / HTTP/1.1\r\n\r\n\r\n\x00more", Request("GET", "/", (1, 1), {}), b"\r\n\x00more"),
        ("names in any case", START + b"hOsT: A\r\n\r\n", Request("GET", "/", (1, 1), {"host": "A"}), b""),
        ("no space", START + b"a:b\r\n\r\n", Request("GET", "/", (1, 1), {"a": "b"}), b""),
        ("much space", START + b"a: \t b c \t\r\n\r\n", Request("GET", "/", (1, 1), {"a": "b c"}), b""),
        (
            "no value",
            START + b"a:\r\nb: \r\nc:\t \r\n\r\n",
            Request("GET", "/", (1, 1), {"a": "", "b": "", "c": ""}),
            b"",
        ),
        ("colons", START + b"a: b:c: d\r\n\r\n", Request("GET", "/", (1, 1), {"a": "b:c: d"}), b""),
        (
            "repeated",
            START + b"a: 1\r\nb: 2\r\nA: 3\r\na:\r\n\r\n",
            Request("GET", "/", (1, 1), {"a": "1, 3, ", "b": "2"}),
            b"",
        ),
        ("an empty line first", b"\r\n" + START + b"\r\n", Request("GET", "/", (1, 1), {}), b""),
        ("a few of them", b"\r\n" * 9 + START + b"a: b\r\n\r\n\r\n", Request("GET", "/", (1, 1), {"a": "b"}), b"\r\n"),
        ("bytes above 127", START + b"a: \xe9\xff\r\n\r\n", Request("GET", "/", (1, 1), {"a": "\xe9\xff"}), b""),
        (
            "every token",
            START + b"!#$%&'*+-.^_`|~09azAZ: x\r\n\r\n",
            Request("GET", "/", (1, 1), {"!#$%&'*+-.^_`|~09azaz": "x"}),
            b"",
        ),
    )
    WRONG: tuple[tuple[str, bytes, int], ...] = (
        ("TLS after an empty line", b"\r\n\x16\x03\x01", 400),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        ("a WebSocket frame", b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58", 400),
        ("zeros", b"\x00\x00\x00\x00", 400),
        ("a space", b" GET / HTTP/1.1\r\n", 400),
        ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", 400),
        ("no version", b"GET /\r\n", 400),
        ("no target", b"GET HTTP/1.1\r\n", 400),
        ("an empty target", b"GET  HTTP/1.1\r\n", 400),
        ("two spaces", b"GET  / HTTP/1.1\r\n", 400),
        ("a space at the end", b"GET / HTTP/1.1 \r\n", 400),
        ("a space in the target", b"GET /a b HTTP/1.1\r\n", 400),
        ("tabs", b"GET\t/\tHTTP/1.1\r\n", 400),
        ("a control character", b"GET /\x1b[2J HTTP/1.1\r\n", 400),
        ("a DEL", b"GET /\x7f HTTP/1.1\r\n", 400),
        ("a target that is not ASCII", b"GET /\xe9 HTTP/1.1\r\n", 400),
        ("a method that is not ASCII", b"G\xe9T / HTTP/1.1\r\n", 400),
        ("a separator in the method", b"G(T / HTTP/1.1\r\n", 400),
        ("http", b"GET / http/1.1\r\n", 400),
        ("another protocol", b"GET / ICAP/1.0\r\n", 400),
        ("HTTP/1", b"GET / HTTP/1\r\n", 400),
        ("HTTP/1.10", b"GET / HTTP/1.10\r\n", 400),
        ("HTTP/01.1", b"GET / HTTP/01.1\r\n", 400),
        ("HTTP/0.9", b"GET / HTTP/0.9\r\n", 400),
        ("HTTP/2.0", b"GET / HTTP/2.0\r\n", 400),
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        ("a line that ends in LF", b"GET / HTTP/1.1\n", 400),
        ("a field that ends in LF", START + b"a: b\n", 400),
        ("a head that ends in LF", START + b"\n", 400),
        ("CR CR LF", START + b"a: b\r\r\n", 400),
        ("CR within a line", START + b"a: b\rc: d\r\n", 400),
        ("no colon", START + b"a\r\n", 400),
        ("no name", START + b": a\r\n", 400),
        ("a space before the colon", START + b"a : b\r\n", 400),
        ("a space before the name", START + b" a: b\r\n", 400),
        ("a field that is folded", START + b"a: b\r\n c\r\n", 400),
        ("a separator in a name", START + b"a(b: c\r\n", 400),
        ("a name that is not ASCII", START + b"\xe9: c\r\n", 400),
        ("spaces alone", START + b"  \r\n", 400),
        *(
            (f"{code:#04x} in a value", START + b"a: b" + bytes((code,)) + b"c\r\n", 400)
            for code in range(32)
            if code not in b"\t\n"
        ),
        ("DEL in a value", START + b"a: b\x7fc\r\n", 400),
        ("NUL alone", START + b"\x00\r\n", 400),
    )

    def test_good(self) -> None:
        """Split at each position, and one byte at a time."""
        for what, data, expected, rest in self.GOOD:
            for cut in range(len(data) + 1):
                with self.subTest(what, cut=cut):
                    self.assertEqual(outcome(data[:cut], data[cut:]), (expected, rest))
            with self.subTest(what, cut="everywhere"):
                self.assertEqual(in_bytes(data), (expected, rest))

    def test_wrong(self) -> None:
        """Split at each position, one byte at a time, and with data after it."""
        for what, start, status in self.WRONG:
            data = start + b"\r\n\r\n"
            for cut in range(len(data) + 1):
                with self.subTest(what, cut=cut):
                    self.assertEqual(outcome(data[:cut], data[cut:]), (status, b""))
            with self.subTest(what, cut="everywhere"):
                self.assertEqual(in_bytes(data), (status, b""))
            with self.subTest(what, cut="nowhere"):
                self.assertEqual(outcome(start + b"b: c\r\n\r\nrest"), (status, b""))

    def test_wrong_ends_of_lines(self) -> None:
        """They are refused at once, since a client such as `printf ... | nc` sends no other line end."""
        for data in (b"GET / HTTP/1.1\n\n", b"GET / HTTP/1.1\r\n\n", b"GET / HTTP/1.1\n\r\n", START + b"a: b\n\n"):
            for cut in range(len(data) + 1):
                with self.subTest(data, cut=cut):
                    self.assertEqual(outcome(data[:cut], data[cut:])[0], 400)

    def test_incomplete(self) -> None:
        """No result, up to the last byte."""
        data = request()
        for end in range(len(data)):
            self.assertEqual(outcome(data[:end]), (None, b""))
        self.assertEqual(outcome(b"", b"", b""), (None, b""))

    def test_proxy_protocol(self) -> None:
        """The setting of the proxy is named."""
        for data in (
            b"PROXY TCP4 192.0.2.1 192.0.2.2 56324 4545\r\n" + request(),
            b"PROXY UNKNOWN\r\n" + request(),
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\2\1\xc0\0\2\2\xdc\4\x11\xc1" + request(),
        ):
            with self.subTest(data):
                with self.assertRaises(HandshakeError) as caught:
                    parse(data)
                self.assertEqual(caught.exception.status, 400)
                self.assertIn("PROXY protocol header", str(caught.exception))
        self.assertEqual(parse(b"PROXYX / HTTP/1.1\r\n\r\n").method, "PROXYX")

    def test_other_data_is_refused_at_once(self) -> None:
        for code in range(256):
            waits = bytes((code,)).isalpha() or code in b"\r\n"
            self.assertEqual(outcome(bytes((code,))), (None if waits else 400, b""), code)

    def test_a_browser(self) -> None:
        data = (
            b"GET /chat?room=1 HTTP/1.1\r\nHost: localhost:4545\r\nConnection: keep-alive, Upgrade\r\n"
            b"Pragma: no-cache\r\nUpgrade: websocket\r\nOrigin: file://\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: " + KEY.encode() + b"\r\n"
            b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
        )
        browser = parse(data)
        self.assertEqual((browser.method, browser.target, browser.version), ("GET", "/chat?room=1", (1, 1)))
        self.assertEqual(browser.headers["sec-websocket-extensions"], "permessage-deflate; client_max_window_bits")
        self.assertEqual(pywebsock.check_upgrade(browser), ACCEPT)


class Limits(unittest.TestCase):
    """The maximum length of a request."""

    def assert_limit(self, good: bytes, bad: bytes, status: int) -> None:
        """Check that one request is accepted and the other refused, in one piece and in many."""
        for data, expected in ((good, None), (bad, status)):
            end = len(data)
            for pieces in ([data[:cut], data[cut:]] for cut in (0, 1, 20, end // 2, *range(end - 5, end))):
                with self.subTest(length=end, cut=len(pieces[0])):
                    result, _ = outcome(*pieces)
                    self.assertEqual(result if isinstance(result, int) else None, expected)
            result, _ = in_bytes(data)
            self.assertEqual(result if isinstance(result, int) else None, expected)

    def test_request_line(self) -> None:
        def line(size: int) -> bytes:  # bytes before the line feed
            return b"GET /" + b"a" * (size - 14) + b" HTTP/1.1\r\n\r\n"

        self.assertEqual(len(line(MAX_LINE)), MAX_LINE + 4)
        self.assert_limit(line(MAX_LINE), line(MAX_LINE + 1), 414)
        self.assert_limit(b"G" * MAX_HEAD, b"G" * (MAX_HEAD + 1), 414)

    def test_field(self) -> None:
        def field(size: int) -> bytes:
            return b"a:" + b"b" * (size - 2) + b"\r\n\r\n"

        self.assert_limit(START + field(MAX_LINE), START + field(MAX_LINE + 1), 431)

    def test_number_of_fields(self) -> None:
        for field in (b"a:b\r\n", b"a:\r\n"):
            good = START + field * MAX_FIELDS + b"\r\n"
            self.assert_limit(good, START + field * (MAX_FIELDS + 1) + b"\r\n", 431)

    def test_head(self) -> None:
        """The limit counts the whole head, with the empty line."""

        def head(size: int) -> bytes:
            fields, rest = divmod(size - len(START) - 2, 1000)
            self.assertGreater(rest, 5)
            return START + (b"a:" + b"b" * 996 + b"\r\n") * fields + b"c:" + b"d" * (rest - 4) + b"\r\n\r\n"

        self.assertEqual(len(head(MAX_HEAD)), MAX_HEAD)
        self.assert_limit(head(MAX_HEAD), head(MAX_HEAD + 1), 431)

    def test_data_after_the_head_is_not_limited(self) -> None:
        for size in (MAX_LINE + 1, MAX_HEAD + 1, 1 << 17):
            body = b"x" * size
            self.assertEqual(outcome(START + b"\r\n" + body)[1], body)
            self.assertEqual(outcome(START, b"\r\n" + body)[1], body)

    def test_errors_come_early(self) -> None:
        """A head that is too long is refused before its end, even if it comes at once."""
        self.assertEqual(outcome(b"G" * (1 << 20)), (414, b""))
        self.assertEqual(outcome(START + b"a" * (1 << 20)), (431, b""))
        self.assertEqual(outcome(START + b"a:b\r\n" * (1 << 16)), (431, b""))
        self.assertEqual(outcome(START + b"a:b\r\n" * (1 << 13), b"\r\n"), (431, b""))

    def test_memory(self) -> None:
        """Memory is bounded: the head as bytes and as text, and each of its lines."""

        def feed() -> None:
            for piece in (b"GET", START, b"\r\n"):
                data, most = bytearray(), 1 << 17
                with contextlib.suppress(HandshakeError):
                    while most:
                        parse_request(data, piece)
                        most -= 1
                self.assertEqual(not most, piece == b"\r\n")  # which may come first

        line = sys.getsizeof(START.decode().rstrip(), 0) + 4 * 8  # in two lists, each of which is copied when it grows
        self.assertLess(peak_memory(feed), 2 * MAX_HEAD + MAX_HEAD // len(START) * line)

    def test_in_linear_time(self) -> None:
        """Lines of many kinds, up to 8 KiB."""
        for start, end in (
            (b"", b"\x00\r\n"),
            (b"GET ", b"\x00\r\n"),
            (b"GET / HTTP/1.1", b"\r\n"),
            (START, b"\x00\r\n"),
            (START + b"a", b"\x00\r\n"),
            (START + b"a:", b"\x00\r\n"),
            (START + b"a:", b"\r\n\r\n"),
            (START + b"a:b", b"\r\n\r\n"),
        ):
            for unit in (b" ", b"\t", b"a", b":", b",", b" a", b"a ", b"\xe9", b": "):

                def feed(size: int, start: bytes = start, end: bytes = end, unit: bytes = unit) -> None:
                    outcome(start + unit * ((size - 30) // len(unit)) + end)

                with self.subTest(start=start, unit=unit, end=end):
                    self.assertLess(growth(feed, MAX_LINE // 4), 9)

    def test_pieces_in_linear_time(self) -> None:
        """One byte at a time, up to 16 KiB."""
        for unit in (b"a", b"a:b\r\n", b"\r", b"\n", b"\r\n"):

            def feed(size: int, unit: bytes = unit) -> None:
                in_bytes(unit * (size // len(unit)))

            with self.subTest(unit):
                self.assertLess(growth(feed, MAX_HEAD // 8), 9)

    def test_values_in_linear_time(self) -> None:
        """The later checks, with 2 and with 8 KiB in a field."""
        for unit in (" ", ",", "a", "a,", "a, ", ":", "[", "0", ".", "/", "\t", "=", "A", "%"):

            def check(size: int, unit: str = unit) -> None:
                value = unit * (size // len(unit)) + "\x00"
                for name in ("host", "origin", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version"):
                    fields = {
                        "host": "localhost",
                        "upgrade": "websocket",
                        "connection": "upgrade",
                        "origin": "http://a",
                    }
                    asked = Request("GET", f"http://{value}", (1, 1), {**fields, name: value})
                    for act in (
                        pywebsock.check_host,
                        pywebsock.check_upgrade,
                        lambda asked: pywebsock.check_origin(asked, ["http://b"]),
                        lambda asked: (asked.path, asked.upgrades),
                    ):
                        try:
                            act(asked)
                        except HandshakeError:
                            pass

            with self.subTest(unit):
                self.assertLess(growth(check, MAX_HEAD // 16), 9)


class RequestValues(unittest.TestCase):
    """The methods of a Request."""

    def test_path(self) -> None:
        for target, path in (
            ("/", "/"),
            ("/?a", "/"),
            ("/a/b?c=d?e", "/a/b"),
            ("/a//b", "/a//b"),
            ("//a/b", "//a/b"),
            ("http://localhost:4545/a?b", "/a"),
            ("HTTPS://localhost/a", "/a"),
            ("http://localhost", "/"),
            ("http://localhost?a", "/"),
            ("http://[::1]:4545/status", "/status"),
            ("/http://a/b", "/http://a/b"),
            ("*", "*"),
        ):
            with self.subTest(target):
                self.assertEqual(Request("GET", target, (1, 1), {}).path, path)

    def test_tokens(self) -> None:
        for value, tokens in (
            ("Upgrade", ["upgrade"]),
            ("keep-alive, Upgrade", ["keep-alive", "upgrade"]),
            ("a,b ,\tc", ["a", "b", "c"]),
        ):
            with self.subTest(value):
                self.assertEqual(headers(Connection=value).tokens("connection"), tokens)
        self.assertEqual(headers().tokens("connection"), [])
        self.assertEqual(headers(Connection=", a,,B ,").elements("connection"), ["a", "B"])

    def test_upgrades(self) -> None:
        """A request asks for a WebSocket even if it does so incorrectly."""
        for asked, upgrades in (
            (headers(Upgrade="websocket"), True),
            (headers(Upgrade="WebSocket"), True),
            (headers(Upgrade="foo, websocket"), True),
            (headers(Sec_WebSocket_Key="bad"), True),
            (headers(Upgrade="h2c"), False),
            (headers(), False),
        ):
            with self.subTest(asked.headers):
                self.assertEqual(asked.upgrades, upgrades)


class Upgrade(unittest.TestCase):
    """check_upgrade (4.2.1), for requests from the network."""

    UPGRADE_REQUIRED = ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")  # 4.2.2, item 4; RFC 9110 15.5.22

    def test_good(self) -> None:
        for what, data in (
            ("plain", request()),
            ("Upgrade in any case", request(Upgrade="WebSocket", Connection="UPGRADE")),
            ("lists", request(Upgrade="h2c, websocket", Connection="keep-alive, Upgrade, foo")),
            ("lists with nothing in them", request(Upgrade=",websocket,", Connection=", ,Upgrade\t,")),
            ("two fields", request(Connection="keep-alive\r\nConnection: Upgrade")),
            ("any target", request(target="/any/where?at=all")),
            ("a later version of HTTP", request(version="1.2")),
            ("more fields", request(Origin="null", Sec_WebSocket_Protocol="chat", Cookie="a=b")),
        ):
            with self.subTest(what):
                self.assertEqual(pywebsock.check_upgrade(parse(data)), ACCEPT)

    def test_wrong(self) -> None:
        for what, data, status, fields in (
            *(
                (method, request(method=method), 405, (("Allow", "GET"),))
                for method in ("POST", "HEAD", "get", "CONNECT")
            ),
            ("HTTP/1.0", request(version="1.0"), 400, ()),
            ("no Upgrade", request(Upgrade=None), 400, ()),
            ("another Upgrade", request(Upgrade="h2c"), 400, ()),
            ("nearly websocket", request(Upgrade="websocket2"), 400, ()),
            ("websocket with a version", request(Upgrade="websocket/13"), 400, ()),
            ("no Connection", request(Connection=None), 400, ()),
            ("another Connection", request(Connection="keep-alive"), 400, ()),
            ("nearly upgrade", request(Connection="keep-alive upgrade"), 400, ()),
            *(
                (f"version {version}", request(Sec_WebSocket_Version=version), 426, self.UPGRADE_REQUIRED)
                for version in (None, "", "8", "0", "12", "14", "130", "013", "13.0", "13, 13", "13, 8", "+13", "x")
            ),
            ("no key", request(Sec_WebSocket_Key=None), 400, ()),
            ("two keys", request(Sec_WebSocket_Key=f"{KEY}\r\nSec-WebSocket-Key: {KEY}"), 400, ()),
        ):
            with self.subTest(what):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.check_upgrade(parse(data))
                self.assertEqual((caught.exception.status, caught.exception.fields), (status, fields))
                self.assertTrue(str(caught.exception))


class Subprotocols(unittest.TestCase):
    """choose_subprotocol (4.2.2, item 5)."""

    def test_choice(self) -> None:
        """The client's order decides; names are case-sensitive (RFC 6455 11.5)."""
        for offered, served, chosen in (
            ("chat", ("chat",), "chat"),
            ("chat, json", ("json", "chat"), "chat"),
            ("superchat,\tv2.json ,chat", ("chat", "v2.json"), "v2.json"),
            (",, chat,", ("chat",), "chat"),
            ("Chat", ("chat",), ""),
            ("chat2", ("chat",), ""),
            ("chat json", ("chat",), ""),
            ("mqtt", ("chat",), ""),
            ("chat", (), ""),
            ("chat", None, ""),
            ("", ("chat",), ""),
        ):
            with self.subTest(offered, served=served):
                asked = headers(Sec_WebSocket_Protocol=offered)
                self.assertEqual(pywebsock.choose_subprotocol(asked, served), chosen)
        self.assertEqual(pywebsock.choose_subprotocol(headers(), ("chat",)), "")
        asked = parse(request(Sec_WebSocket_Protocol="a\r\nSec-WebSocket-Protocol: chat"))
        self.assertEqual(pywebsock.choose_subprotocol(asked, ("chat",)), "chat")


class AcceptKey(unittest.TestCase):
    """compute_accept (4.2.2)."""

    def test_example(self) -> None:
        """RFC 6455 1.3."""
        self.assertEqual(pywebsock.compute_accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")

    def test_any_nonce(self) -> None:
        rng, seen = random.Random(7), set()
        for nonce in (bytes(16), b"\xff" * 16, *(rng.randbytes(16) for _ in range(100))):
            accept = pywebsock.compute_accept(base64.b64encode(nonce).decode())
            self.assertEqual(len(base64.b64decode(accept)), 20)
            seen.add(accept)
        self.assertEqual(len(seen), 102)

    def test_wrong(self) -> None:
        for key in (
            *("", "x", "=", "====", "=" * 24, "A" * 24, "A" * 22, "A" * 22 + "=", "A" * 22 + "===", "A" * 21 + "==="),
            *(base64.b64encode(bytes(size)).decode() for size in (0, 1, 12, 15, 17, 18, 24, 32, 1000)),
            *(KEY[:-1], KEY + "=", KEY[:-2], "=" + KEY[:-1], f" {KEY}", f"{KEY} ", f"{KEY}\n", f"{KEY}, {KEY}"),
            *("A" * 10 + " " + "A" * 11 + "==", "A" * 10 + "-" + "A" * 11 + "==", "A" * 10 + "_" + "A" * 11 + "=="),
            *("A" * 10 + "==" + "A" * 12, "A" * 20 + "=A==", "é" * 22 + "==", "\x00" * 22 + "==", "A" * 21 + "é=="),
        ):
            with self.subTest(key):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.compute_accept(key)
                self.assertEqual(caught.exception.status, 400)


class Host(unittest.TestCase):
    """check_host (RFC 9112 3.2)."""

    def test_good(self) -> None:
        for host in (
            *("localhost", "localhost:4545", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:4545", "example.com"),
            *("EXAMPLE.com:1", "a-b.c_d.example", "xn--bcher-kva.example", "localhost:", "a~b"),
        ):
            with self.subTest(host):
                self.assertEqual(pywebsock.check_host(headers(Host=host)), host)

    def test_wrong(self) -> None:
        for host in (
            *("", " ", "a b", "a, b", "a,b", "localhost:x", "localhost:123456", "localhost:4545:1", "http://a", "a/b"),
            *(
                "a@b",
                "user@localhost",
                "[::1",
                "::1",
                "[localhost]",
                "[]",
                ":4545",
                "a?b",
                "a#b",
                "é",
                "a\\b",
                "<a>",
                "a;b",
            ),
        ):
            with self.subTest(host):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.check_host(headers(Host=host))
                self.assertEqual(caught.exception.status, 400)

    def test_missing(self) -> None:
        """HTTP/1.1 requires it, HTTP/1.0 does not."""
        with self.assertRaises(HandshakeError) as caught:
            pywebsock.check_host(headers())
        self.assertEqual(caught.exception.status, 400)
        self.assertEqual(pywebsock.check_host(Request("GET", "/", (1, 0), {})), "")
        with self.assertRaises(HandshakeError):
            pywebsock.check_host(Request("GET", "/", (1, 0), {"host": "a b"}))

    def test_absolute_form(self) -> None:
        """The host of the target counts (RFC 9112 3.2.2), but the field is required, too."""
        for target, host in (
            ("http://localhost:4545/a?b", "localhost:4545"),
            ("HTTPS://[::1]", "[::1]"),
            ("http://127.0.0.1?a", "127.0.0.1"),
            ("/http://localhost", "example.com"),
        ):
            with self.subTest(target):
                self.assertEqual(pywebsock.check_host(Request("GET", target, (1, 1), {"host": "example.com"})), host)
        for target, fields in (
            ("http://", {"host": "localhost"}),
            ("http:///a", {"host": "localhost"}),
            ("http://user@localhost/", {"host": "localhost"}),
            ("http://a:b:c/", {"host": "localhost"}),
            ("http://localhost/", {}),
            ("http://localhost/", {"host": "a b"}),
        ):
            with self.subTest(target, fields=fields):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.check_host(Request("GET", target, (1, 1), fields))
                self.assertEqual(caught.exception.status, 400)


class Origin(unittest.TestCase):
    """check_origin (10.2): the pages that may connect."""

    HERE = "localhost:4545"
    # Origin, Host, and the list of origins; the first ones may connect, the others may not.
    MAY: tuple[tuple[str | None, str, tuple[str, ...]], ...] = (
        (None, HERE, ()),
        (None, HERE, ("https://example.com",)),
        ("null", HERE, ()),
        ("file://", HERE, ()),
        ("FILE://", HERE, ()),
        ("http://localhost:4545", HERE, ()),
        ("https://localhost:4545", HERE, ()),
        ("http://LOCALHOST:4545", HERE, ()),
        ("http://localhost:4545", "LocalHost:4545", ()),
        ("http://localhost", "localhost", ()),
        ("http://127.0.0.1:4545", "127.0.0.1:4545", ()),
        ("http://192.168.1.2:4545", "192.168.1.2:4545", ()),
        ("http://[::1]:4545", "[::1]:4545", ()),
        ("https://[2001:db8::1]", "[2001:db8::1]", ()),
        ("http://localhost:4545", HERE, ("https://example.com",)),
        ("https://example.com", HERE, ("https://example.com",)),
        ("HTTPS://Example.com", HERE, ("https://example.com",)),
        ("https://example.com", HERE, ("http://a", "https://example.com")),
        ("https://example.com", "example.com", ("https://example.com",)),
        ("null", HERE, ("null",)),
        ("file://", HERE, ("file://",)),
        ("https://anything.example", HERE, ("*",)),
        ("null", HERE, ("*",)),
        ("", HERE, ("*",)),
        # the default port may be given or not (RFC 6454 4)
        ("http://192.168.1.5", "192.168.1.5:80", ()),
        ("http://192.168.1.5:80", "192.168.1.5", ()),
        ("https://localhost", "localhost:443", ()),
        ("http://localhost", "localhost:", ()),
        ("https://example.com:443", HERE, ("https://example.com",)),
        # RFC 6761 6.3: all names below localhost are this machine
        ("http://chat.localhost:4545", "chat.localhost:4545", ()),
        ("http://a.b.localhost:4545", "A.b.localhost:4545", ()),
        # Go's x/net/websocket, ws4py
        ("http://localhost:4545/", HERE, ()),
        ("ws://localhost:4545", HERE, ()),
        ("wss://localhost:4545", HERE, ()),
        ("wss://example.com", HERE, ("https://example.com",)),
        # one label or more
        ("https://www.example.com", HERE, ("https://*.example.com",)),
        ("https://a.b.example.com", HERE, ("http://a", "https://*.example.com")),
        ("https://a.example.com:8443", HERE, ("https://*.example.com:8443",)),
    )
    MAY_NOT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("https://evil.example", HERE, ()),
        ("https://evil.example", HERE, ("https://example.com",)),
        ("", HERE, ()),
        ("NaN", HERE, ()),
        ("*", HERE, ()),
        ("null", HERE, ("https://example.com",)),
        ("file://", HERE, ("https://example.com",)),
        ("null, null", HERE, ()),
        ("null, https://evil.example", HERE, ()),
        ("http://localhost:4545, https://evil.example", HERE, ()),
        # another port, another scheme, a similar name
        ("http://localhost:4546", HERE, ()),
        ("http://localhost", HERE, ()),
        ("ws://localhost:4546", HERE, ()),
        ("https://localhost", "localhost:80", ()),
        ("http://localhost:4545.evil.example", HERE, ()),
        ("http://evil.example/localhost:4545", HERE, ()),
        ("http://evil@localhost:4545", HERE, ()),
        ("http://127.0.0.1:4545", HERE, ()),
        ("localhost:4545", HERE, ()),
        ("chrome-extension://abc", HERE, ()),
        ("file://evil.example", HERE, ()),
        # DNS rebinding: a name that points to this machine
        ("http://evil.example:4545", "evil.example:4545", ()),
        ("http://localhost.evil.example", "localhost.evil.example", ()),
        ("http://127.0.0.1.evil.example", "127.0.0.1.evil.example", ()),
        ("http://127.1", "127.1", ()),
        ("http://2130706433", "2130706433", ()),
        ("http://a.localhost:4545", HERE, ()),
        ("http://xlocalhost:4545", "xlocalhost:4545", ()),
        # similar to a listed origin
        ("http://example.com", HERE, ("https://example.com",)),
        ("https://example.com:8443", HERE, ("https://example.com",)),
        ("https://www.example.com", HERE, ("https://example.com",)),
        ("https://example.com.evil.example", HERE, ("https://example.com",)),
        ("https://evilexample.com", HERE, ("https://example.com",)),
        ("https://exampleXcom", HERE, ("https://example.com",)),
        ("https://example.com", HERE, ("https://*.example.com",)),
        ("https://.example.com", HERE, ("https://*.example.com.",)),
        ("https://evilexample.com", HERE, ("https://*.example.com",)),
        ("https://*.example.com", HERE, ("https://*.example.com",)),
        ("http://a.example.com", HERE, ("https://*.example.com",)),
        ("https://a.example.com:444", HERE, ("https://*.example.com",)),
        ("https://evil.example/.example.com", HERE, ("https://*.example.com",)),
        ("https://evil.example:80.example.com", HERE, ("https://*.example.com",)),
        ("https://evil.example?.example.com", HERE, ("https://*.example.com",)),
    )

    def test_star(self) -> None:
        """The star is for one or more characters; the text around it must match."""
        for text, good in (("https://a.b", True), ("https://.b", False), ("https://a.c", False), ("http://a.b", False)):
            self.assertEqual(pywebsock.matches(text, "https://*.b"), good, text)

    def test_may(self) -> None:
        for origin, host, listed in self.MAY:
            with self.subTest(origin=origin, host=host, listed=listed):
                asked = headers(Host=host) if origin is None else headers(Host=host, Origin=origin)
                pywebsock.check_origin(asked, listed)

    def test_may_not(self) -> None:
        for origin, host, listed in self.MAY_NOT:
            with self.subTest(origin=origin, host=host, listed=listed):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.check_origin(headers(Host=host, Origin=origin), listed)
                self.assertEqual(caught.exception.status, 403)

    def test_absolute_form(self) -> None:
        """The host is that of the target, not that of the Host field (RFC 9112 3.2.2)."""
        here, there = "http://localhost:4545", "http://evil.example"
        for target, host, origin, may in (
            (f"{here}/", "evil.example", here, True),
            (f"{here}/", "127.0.0.1", "http://127.0.0.1", False),
            (f"{there}/", "localhost:4545", here, False),
            (f"{there}/", "localhost:4545", there, False),
        ):
            with self.subTest(target=target, host=host, origin=origin):
                asked = Request("GET", target, (1, 1), {"host": host, "origin": origin})
                if may:
                    pywebsock.check_origin(asked, ())
                else:
                    with self.assertRaises(HandshakeError) as caught:
                        pywebsock.check_origin(asked, ())
                    self.assertEqual(caught.exception.status, 403)

    def test_parse(self) -> None:
        """An origin is changed to the form that browsers send."""
        for text, origin in (
            ("https://example.com", "https://example.com"),
            ("HTTPS://Example.COM", "https://example.com"),
            ("https://example.com/", "https://example.com"),
            ("https://example.com:443", "https://example.com"),
            ("http://example.com:80/", "http://example.com"),
            ("http://example.com:443", "http://example.com:443"),
            ("https://example.com:80", "https://example.com:80"),
            ("http://localhost:8080", "http://localhost:8080"),
            ("http://[::1]:80", "http://[::1]"),
            ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
            ("capacitor://localhost", "capacitor://localhost"),
            *((word, word) for word in ("*", "null", "file://")),
            ("NULL", "null"),
            ("https://*.Example.com:443/", "https://*.example.com"),
        ):
            with self.subTest(text):
                self.assertEqual(pywebsock.parse_origin(text), origin)
                self.assertEqual(pywebsock.parse_origin(origin), origin)
                if "*" not in origin:
                    pywebsock.check_origin(headers(Host=self.HERE, Origin=origin), [origin])

    def test_parse_wrong(self) -> None:
        """An origin that no browser sends is an error, in one line."""
        for text in (
            *(
                "",
                "example.com",
                "localhost:4545",
                "//example.com",
                "https://",
                "https:///",
                "https://a/b",
                "https://a//",
            ),
            *("https://a?b", "https://a#b", "https://a b", "https://user@a", "https://a:x", "https://*"),
            *("https://*example.com", "https://a.*.com", "https://*.*.com", "https://a*.com", "*.example.com"),
            *("ws://localhost", "wss://example.com", "https://a,https://b", "https://b\xfccher.example", "file:", "**"),
            *("https://example.com\n", " https://example.com", "1http://a", "http:/a"),
        ):
            with self.subTest(text):
                with self.assertRaises(ValueError) as caught:
                    pywebsock.parse_origin(text)
                self.assertRegex(str(caught.exception), r"^[ -~]+$")

    def test_the_error_helps(self) -> None:
        """The error has the option and the setting that allow the page, or says that the value is not an origin."""
        for said, origin in (
            ("https://example.com", "https://example.com"),
            ("HTTPS://Example.com:443/", "https://example.com"),
            ("ws://h", "http://h"),
            ("http://localhost/", "http://localhost"),
            ("null", "null"),
            (f"https://{'x' * 253}:65535", f"https://{'x' * 253}:65535"),
            *((wrong, "") for wrong in ("", "localhost", "127.0.0.1", "*", "https://*.example.com", "\x1b[2J\xe9")),
            ("https://" + "x" * 254, ""),
        ):
            with self.subTest(said):
                asked = headers(Host="h", Origin=said)
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.check_origin(asked, ["https://other.example"])
                hint = str(caught.exception)
                self.assertTrue(hint.isascii() and hint.isprintable())
                if origin:
                    self.assertIn(f'(--origin {origin} or origins=["{origin}"] allows it)', hint)
                    pywebsock.check_origin(asked, [pywebsock.parse_origin(origin)])
                else:
                    self.assertIn("is not an origin (only --origin '*' allows it", hint)

    def test_needs_a_host(self) -> None:
        """Without a host, a page from this server is refused."""
        for host in ("", "a b", "a, b"):
            with self.assertRaises(HandshakeError):
                pywebsock.check_origin(headers(Host=host, Origin="http://localhost"), ())


class Bodies(unittest.TestCase):
    """body_length, read_body, decode_body (RFC 9112 6): messages by POST."""

    def test_length(self) -> None:
        for value, length in (("0", 0), ("1", 1), ("100", 100), ("0000000000000000", 0), ("000000000000000099", 99)):
            with self.subTest(value):
                self.assertEqual(pywebsock.body_length(headers(Content_Length=value), 100), length)

    def test_wrong(self) -> None:
        for status, fields in (
            (411, {}),
            (411, {"Content_Length": ""}),
            (400, {"Transfer_Encoding": "chunked", "Content_Length": "5"}),
            (400, {"Transfer_Encoding": "chunked", "Content_Length": ""}),
            (501, {"Transfer_Encoding": "gzip, chunked"}),
            (501, {"Transfer_Encoding": "chunked, chunked"}),
            (501, {"Transfer_Encoding": "chunked\r\nTransfer-Encoding: chunked"}),
            (501, {"Transfer_Encoding": "identity"}),
            *(
                (415, {"Content_Length": "5", "Content_Encoding": value})
                for value in ("br", "zstd", "gzip, gzip", "gzip, deflate", "compress", "g\xe9zip", "identity, br")
            ),
            (501, {"Transfer_Encoding": ""}),
            (501, {"Transfer_Encoding": "\x0bchunked"}),
            (413, {"Content_Length": "101"}),
            (413, {"Content_Length": "9" * 18}),
            *(
                (400, {"Content_Length": value})
                for value in ("-1", "+1", "1, 1", "1e3", "0x1", "\xb2", "9" * 19, "a", "1.0")
            ),
            (415, {"Content_Length": "5", "Content_Type": "multipart/form-data; boundary=x"}),
            (415, {"Content_Length": "999", "Content_Type": "Multipart/Mixed"}),
            (415, {"Transfer_Encoding": "chunked", "Content_Type": "multipart/form-data; boundary=x"}),
        ):
            with self.subTest(fields):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.body_length(headers(**fields), 100)
                self.assertEqual(caught.exception.status, status)

    def test_empty_elements(self) -> None:
        for field in ("chunked,", ", chunked", ",,Chunked ,"):
            self.assertEqual(pywebsock.body_length(headers(Transfer_Encoding=field), 100), 100, field)

    def test_chunked_needs_http_1_1(self) -> None:
        asked = headers(Transfer_Encoding="Chunked")
        self.assertEqual(pywebsock.body_length(asked, 100), 100)
        with self.assertRaises(HandshakeError) as caught:
            pywebsock.body_length(asked._replace(version=(1, 0)), 100)
        self.assertEqual(caught.exception.status, 400)

    def read(self, data: bytes, size: int, **fields: str) -> bytes:
        """Read the body in data that arrives in pieces of this size."""
        pieces = (data[i : i + size] for i in range(0, len(data), size))
        asked = headers(**fields)
        return b"".join(pywebsock.read_body(asked, pywebsock.body_length(asked, 100), arriving(pieces), 100))

    CHUNKS = (
        (b"0\r\n\r\n", b""),
        (b"5\r\nHello\r\n0\r\n\r\n", b"Hello"),
        (b"2\r\n\r\n\r\n03\r\n0\r\n\r\n0\r\n\r\n", b"\r\n0\r\n"),
        (b"a\r\n" + b"x" * 10 + b"\r\nA\r\n" + b"y" * 10 + b"\r\n0\r\n\r\n", b"x" * 10 + b"y" * 10),
        (b'1;a=b;c="d e;\\""\r\nx\r\n1 ; f\r\ny\r\n0;last\r\n\r\n', b"xy"),
        (b"1\r\nx\r\n0\r\nX-Sum: 1\r\nContent-Length: 7\r\n\r\n", b"x"),
        (b"64\r\n" + bytes(100) + b"\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n", bytes(100)),
        (b"0" * 15 + b"1\r\nx\r\n" + b"0" * 16 + b"\r\n\r\n", b"x"),
    )
    NO_CHUNKS = (
        *(b"", b"\r\n", b"5\r\nHello", b"5\r\nHello\r\n", b"0\r\n", b"1\r\nx\r\n0\r\nX: y\r\n"),
        *(b"-1\r\nx\r\n0\r\n\r\n", b"+1\r\nx\r\n0\r\n\r\n", b"0x1\r\nx\r\n0\r\n\r\n", b"1_0\r\nx\r\n0\r\n\r\n"),
        *(b" 1\r\nx\r\n0\r\n\r\n", b"1 \r\nx\r\n0\r\n\r\n", b"g\r\nx\r\n0\r\n\r\n", b"1" * 17 + b"\r\nx\r\n0\r\n\r\n"),
        *(b"1\nx\n0\n\n", b"1\r\nx\n0\r\n\r\n", b"1;a\nb\r\nx\r\n0\r\n\r\n", b"1;\0\r\nx\r\n0\r\n\r\n"),
        *(b"1\r\nxy\r\n0\r\n\r\n", b"2\r\nx\r\n0\r\n\r\n", b"1\r\nx0\r\n\r\n", b"\xb2\r\nxx\r\n0\r\n\r\n"),
        *(b"1;" + b"x" * 9000 + b"\r\nx\r\n0\r\n\r\n", b"0\r\nX: " + b"x" * 9000 + b"\r\n\r\n"),
    )
    TOO_MUCH = (
        b"65\r\n" + bytes(101) + b"\r\n0\r\n\r\n",
        b"1\r\nx\r\n" * 101 + b"0\r\n\r\n",
        b"F" * 16 + b"\r\n" + bytes(101),
    )

    def test_chunks(self) -> None:
        for size in (1, 2, 7, 1000):
            for data, body in self.CHUNKS:
                with self.subTest(data[:60], size=size):
                    self.assertEqual(self.read(data, size, Transfer_Encoding="chunked"), body)
            for status, cases in ((400, self.NO_CHUNKS), (413, self.TOO_MUCH)):
                for data in cases:
                    with self.subTest(data[:60], size=size):
                        with self.assertRaises(HandshakeError) as caught:
                            self.read(data, size, Transfer_Encoding="chunked")
                        self.assertEqual(caught.exception.status, status)

    def test_compressed(self) -> None:
        hello, long = b"Hello " * 10, b"x" * 80
        for coding, data, body in (
            ("gzip", gzip.compress(hello), hello),
            ("GZip", gzip.compress(hello), hello),
            ("x-gzip", gzip.compress(hello), hello),
            ("gzip", gzip.compress(b""), b""),
            ("gzip", gzip.compress(hello[:30]) + gzip.compress(b"") + gzip.compress(hello[30:]), hello),
            ("deflate", zlib.compress(hello), hello),
            ("deflate", zlib.compress(long, 0), long),
            ("identity", hello, hello),
            ("", hello, hello),
        ):
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (data[:7], data[7:]) if part)
            for size in (1, 7, 1000):
                with self.subTest(coding, body=body, size=size):
                    got = self.read(data, size, Content_Length=str(len(data)), Content_Encoding=coding)
                    self.assertEqual(got, body)
                    chunked = {"Transfer_Encoding": "chunked", "Content_Encoding": coding}
                    self.assertEqual(self.read(chunks + b"0\r\n\r\n", size, **chunked), body)

    def test_badly_compressed(self) -> None:
        good = gzip.compress(b"Hello")
        for status, data in (
            (400, b""),
            (400, b"Hello"),
            (400, good[:-1]),
            (400, good[:10] + b"\xff" + good[11:]),
            (400, good[:-8] + b"\0" * 8),  # the checksum
            (400, good + b"Hello"),
            (400, zlib.compress(b"Hello")[2:-4]),
            (413, gzip.compress(bytes(101))),
            (413, gzip.compress(bytes(60)) + gzip.compress(bytes(60))),
            (413, gzip.compress(bytes(1 << 20), 1)[:100]),
        ):
            for size in (1, 100):
                with self.subTest(data[:20], size=size):
                    with self.assertRaises(HandshakeError) as caught:
                        self.read(data, size, Content_Length=str(len(data)), Content_Encoding="gzip")
                    self.assertEqual(caught.exception.status, status)

    def test_415_names_the_accepted_codings(self) -> None:
        with self.assertRaises(HandshakeError) as caught:
            self.read(b"x", 1, Content_Length="1", Content_Encoding="br")
        self.assertEqual(caught.exception.fields, (("Accept-Encoding", "gzip, deflate"),))

    @unittest.skipIf(sys.implementation.name != "cpython", "its memory")
    def test_memory_of_a_compressed_body(self) -> None:
        """32 KB that inflate to 32 MB are refused at the limit."""
        bomb = gzip.compress(bytes(1 << 25))
        asked = headers(Content_Length=str(len(bomb)), Content_Encoding="gzip")

        def read() -> None:
            with contextlib.suppress(HandshakeError):
                deque(pywebsock.read_body(asked, len(bomb), iter([bomb]), 1 << 20), 0)

        self.assertLess(peak_memory(read), 1 << 20)

    def test_counted_bytes(self) -> None:
        for size in (1, 2, 100):
            self.assertEqual(self.read(b"Hello, more", size, Content_Length="5"), b"Hello")
            self.assertEqual(self.read(b"", size, Content_Length="0"), b"")
            with self.assertRaises(HandshakeError):
                self.read(b"Hell", size, Content_Length="5")

    def test_chunks_in_linear_time(self) -> None:
        asked = headers(Transfer_Encoding="chunked")
        for data in (b"1\r\nx\r\n", b"0\r\nx\r\n" + b"x\r\n" * 8, b"1" + b" " * 8):  # chunks, trailers, spaces

            def read(size: int) -> None:
                with contextlib.suppress(HandshakeError):
                    deque(pywebsock.read_body(asked, 100_000, arriving([data * size]), 100_000), 0)  # noqa: B023

            with self.subTest(data):
                self.assertLess(growth(read, MAX_LINE // 4), 9)

    def test_message(self) -> None:
        """A body is text if it is UTF-8 and its type is not binary."""
        for body, kind, message in (
            (b"", "", ""),
            ("é".encode(), "", "é"),
            ("é".encode(), "text/plain; charset=latin-1", "é"),
            (b"a=b", "application/x-www-form-urlencoded", "a=b"),
            (b"\xff", "text/plain", b"\xff"),
            (b"\xed\xa0\x80", "", b"\xed\xa0\x80"),
            (b"a", "application/octet-stream", b"a"),
            (b"a", "Application/Octet-Stream; x=y", b"a"),
            (b"", "application/octet-stream", b""),
        ):
            with self.subTest(body, kind=kind):
                self.assertEqual(pywebsock.decode_body(headers(Content_Type=kind), body), message)


class Responses(unittest.TestCase):
    """serialize_response, http_response (RFC 9112 4)."""

    def test_upgrade(self) -> None:
        fields = (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", ACCEPT))
        expected = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {ACCEPT}\r\n\r\n"
        response = pywebsock.serialize_response(101, fields)
        self.assertEqual(response, b"HTTP/1.1 101 Switching Protocols\r\n" + expected.encode())

    def test_every_status(self) -> None:
        """Each status in use has a phrase."""
        for status in (101, 200, 202, 400, 403, 404, 405, 408, 411, 413, 414, 415, 426, 431, 500, 503):
            response = pywebsock.serialize_response(status, ())
            self.assertRegex(response.decode(), rf"^HTTP/1\.1 {status} [A-Z][A-Za-z -]+\r\n(Date: [^\r]+\r\n)?\r\n$")

    def test_http(self) -> None:
        response = pywebsock.http_response(headers(), 200, "text/plain; charset=utf-8", "é".encode(), ("Allow", "GET"))
        head, _, body = response.partition(b"\r\n\r\n")
        start, *lines = head.decode("ascii").split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines)
        self.assertEqual((start, body), ("HTTP/1.1 200 OK", b"\xc3\xa9"))
        for name, value in (
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", "2"),
            ("Connection", "close"),
            ("X-Content-Type-Options", "nosniff"),
            ("Allow", "GET"),
        ):
            self.assertEqual(fields[name], value)

    def test_upgrade_required(self) -> None:
        """Connection has Upgrade, too (RFC 9110 7.8)."""
        response = pywebsock.http_response(headers(), 426, "text/plain", b"", ("Upgrade", "websocket"))
        self.assertIn(b"\r\nConnection: close, Upgrade\r\n", response)

    def test_head(self) -> None:
        """The response to HEAD has no body."""
        full = pywebsock.http_response(headers(), 404, "text/plain", b"body")
        self.assertEqual(
            pywebsock.http_response(headers()._replace(method="HEAD"), 404, "text/plain", b"body") + b"body", full
        )


class Printable(unittest.TestCase):
    """printable: escape text from the network for the log."""

    def test_printable(self) -> None:
        for text, expected in (
            ("", ""),
            ("https://example.com", "https://example.com"),
            ("a\r\nb\x00\x1b[2J\x7f", r"a\r\nb\x00\x1b[2J\x7f"),
            ("é€𝄞\u202e", r"\xe9\u20ac\U0001d11e\u202e"),
            ("\\", "\\\\"),
            ("\udcff\x80\x9b", r"\udcff\x80\x9b"),
        ):
            with self.subTest(text):
                self.assertEqual(pywebsock.printable(text), expected)

    def test_every_byte(self) -> None:
        for code in range(256):
            text = pywebsock.printable(chr(code))
            self.assertTrue(text.isascii() and text.isprintable(), code)

    def test_cut(self) -> None:
        self.assertEqual(pywebsock.printable("a" * 300), "a" * 200)
        self.assertEqual(pywebsock.printable("abc", 2), "ab")
        self.assertLessEqual(len(pywebsock.printable("\x00" * 1000)), 1000)


class Errors(unittest.TestCase):
    """HandshakeError and ProtocolError."""

    def test_values(self) -> None:
        error = HandshakeError(426, "why", ("Sec-WebSocket-Version", "13"))
        self.assertEqual((error.status, error.status.phrase), (426, "Upgrade Required"))
        self.assertEqual((str(error), error.fields), ("why", (("Sec-WebSocket-Version", "13"),)))
        self.assertEqual(HandshakeError(400, "why").fields, ())
        self.assertEqual(HandshakeError(401, "who?", ("WWW-Authenticate", 'Bearer realm="a"')).status, 401)

    def test_wrong_values(self) -> None:
        """Wrong values raise an error in the constructor, so that they are never sent."""
        wrong: tuple[tuple[object, tuple[tuple[str, str], ...]], ...] = (
            *((status, ()) for status in (0, 99, 100, 101, 200, 299, 418000, 600, -1, "401", "x", None, b"")),
            *((401, (field,)) for field in (("a b", "c"), ("", "c"), ("a:", "c"), ("a\r\nb", "c"), ("\xe9", "c"))),
            *((401, (("A", value),)) for value in ("b\r\nC: d", "b\nc", "\r", "\x00", "\x1b[2J", "\xe9", "\u20ac")),
            (401, (("A", "b"), ("C", "d\r\n"))),
        )
        for value, fields in wrong:
            with self.subTest(value, fields=fields), self.assertRaises(ValueError):
                HandshakeError(typing.cast(int, value), "why", *fields)

    def test_protocol_error(self) -> None:
        wrong = pywebsock.ProtocolError("why", pywebsock.CloseCode.MESSAGE_TOO_BIG)
        self.assertEqual((wrong.code, str(wrong)), (1009, "why"))


if __name__ == "__main__":
    unittest.main()

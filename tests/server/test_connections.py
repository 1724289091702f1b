"""A connection, from its opening handshake to its end (RFC 6455 4.2, 5.4, 5.5, 7, 8.1), over real sockets."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct

import pywebsock

from tests.tools.support import (
    ACCEPT,
    KEY,
    Frame,
    Recorder,
    ServerTestCase,
    compress,
    eventually,
    exchange,
    masked_frame,
    request,
)

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
DEFLATE = "permessage-deflate"


def pieces(opcode: int, *payloads: bytes) -> bytes:
    """A message in as many frames as there are payloads (5.4)."""
    last = len(payloads) - 1
    return b"".join(masked_frame(CONT if i else opcode, payload, fin=i == last) for i, payload in enumerate(payloads))


class Messages(ServerTestCase):
    """RFC 6455 5.6: what one client sends, all clients get, itself included."""

    def test_every_size(self) -> None:
        """Each length encoding on both sides of its borders, up to the limit."""
        limit = 70_000
        server = self.serve(max_message=limit)
        sender, reader = self.connect(server), self.connect(server)
        for size in (0, 1, 125, 126, 127, 65535, 65536, limit):
            for message in ("x" * size, b"\xff" * size):
                with self.subTest(size=size, kind=type(message).__name__):
                    sender.send(message)
                    for client in (sender, reader):
                        frame = client.read_frame()
                        expected = (1, message.encode()) if isinstance(message, str) else (2, message)
                        self.assertTrue(frame.fin)
                        self.assertFalse(frame.rsv1)
                        self.assertEqual((frame.opcode, frame.payload), expected)

    def test_every_masking_key(self) -> None:
        client = self.connect(self.serve())
        for key in (bytes(4), b"\xff" * 4, b"\x01\x02\x03\x04", b"\r\n\r\n"):
            for size in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 1026, 1027):
                with self.subTest(key=key, size=size):
                    message = bytes(i % 251 for i in range(size))
                    client.frame(BINARY, message, key=key)
                    self.assertEqual(client.read(), message)

    def test_text(self) -> None:
        client = self.connect(self.serve())
        for text in ("", "κόσμε", "\0", "\r\n", "\U0001f600", "\uffff", "\U0010ffff", "\ufeffx"):
            with self.subTest(text=text):
                client.send(text)
                self.assertEqual(client.read(), text)

    def test_many_in_one_segment(self) -> None:
        client = self.connect(self.serve())
        client.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(1000)))
        self.assertEqual([client.read() for _ in range(1000)], [str(i) for i in range(1000)])

    def test_byte_by_byte(self) -> None:
        client = self.connect(self.serve())
        for byte in masked_frame(TEXT, b"short") + masked_frame(BINARY, bytes(200)) + masked_frame(PING, b"?"):
            client.send_raw(bytes([byte]))
        self.assertEqual([client.read(), client.read()], ["short", bytes(200)])
        self.assertEqual(client.read_frame(), Frame(True, False, PONG, b"?"))


class Fragments(ServerTestCase):
    """RFC 6455 5.4: a message may come in many frames; it leaves in one."""

    CASES = (
        (b"Hello",),
        (b"Hel", b"lo"),
        (b"H", b"e", b"l", b"l", b"o"),
        (b"", b"Hello"),
        (b"Hello", b""),
        (b"", b"", b"Hello", b"", b""),
        (b"", b""),
        (b"\xce", b"\xba\xe1", b"\xbd\xb9", b"\xcf\x83"),  # within characters
        (b"\xf0\x9f", b"", b"\x98\x80"),
        (b"x" * 40_000, b"y" * 40_000),
    )

    def test_fragments_become_one_frame(self) -> None:
        server = self.serve()
        sender, reader = self.connect(server), self.connect(server)
        for opcode in (TEXT, BINARY):
            for fragments in self.CASES:
                with self.subTest(opcode=opcode, fragments=fragments):
                    sender.send_raw(pieces(opcode, *fragments))
                    for client in (sender, reader):
                        self.assertEqual(client.read_frame(), Frame(True, False, opcode, b"".join(fragments)))

    def test_control_frames_between_fragments(self) -> None:
        client = self.connect(self.serve())
        client.frame(TEXT, b"Hel", fin=False)
        for payload in (b"1", b"2"):
            client.frame(PING, payload)
            self.assertEqual(client.read_frame(), Frame(True, False, PONG, payload))
            client.frame(PONG, b"unasked for")
            client.frame(CONT, b"", fin=False)
        client.frame(CONT, b"lo")
        self.assertEqual(client.read(), "Hello")

    def test_close_between_fragments(self) -> None:
        server = self.serve()
        client = self.connect(server)
        client.send_raw(masked_frame(TEXT, b"Hel", fin=False) + masked_frame(CLOSE, b"\x03\xe8"))
        self.assertEqual(client.read_close(), (1000, ""))
        server.wait_for("close", 1000, "")

    def test_fragments_of_several_clients(self) -> None:
        server = self.serve()
        a, b = self.connect(server), self.connect(server)
        a.frame(TEXT, b"a1", fin=False)
        b.frame(BINARY, b"b1", fin=False)
        a.frame(CONT, b"a2")
        self.assertEqual([a.read(), b.read()], ["a1a2", "a1a2"])
        b.frame(CONT, b"b2")
        self.assertEqual([a.read(), b.read()], [b"b1b2", b"b1b2"])

    def test_very_many_tiny_fragments(self) -> None:
        client = self.connect(self.serve(max_message=100_000))
        count = 100_000
        client.frame(TEXT, b"", fin=False)
        client.send_raw(masked_frame(CONT, b"", fin=False) * count)
        client.send_raw(masked_frame(CONT, b"x", fin=False) * count)
        client.frame(CONT)
        self.assertEqual(client.read(), "x" * count)


class Ping(ServerTestCase):
    """RFC 6455 5.5.2: a Ping is answered, and nobody else's business."""

    def test_payload_comes_back(self) -> None:
        client = self.connect(self.serve())
        for payload in (b"", b"x", b"\xff\x00", bytes(125)):
            with self.subTest(payload=payload):
                client.frame(PING, payload)
                self.assertEqual(client.read_frame(), Frame(True, False, PONG, payload))

    def test_in_order_with_messages(self) -> None:
        client = self.connect(self.serve())
        client.send_raw(masked_frame(TEXT, b"1") + masked_frame(PING, b"2") + masked_frame(TEXT, b"3"))
        frames = [client.read_frame() for _ in range(3)]
        self.assertEqual([(frame.opcode, frame.payload) for frame in frames], [(1, b"1"), (10, b"2"), (1, b"3")])

    def test_not_broadcast(self) -> None:
        server = self.serve()
        a, b = self.connect(server), self.connect(server)
        a.send_raw(masked_frame(PING, b"ping") + masked_frame(PONG, b"pong") + masked_frame(TEXT, b"text"))
        self.assertEqual(b.read_frame(), Frame(True, False, TEXT, b"text"))


class Pong(ServerTestCase):
    """RFC 6455 5.5.3."""

    def test_unsolicited_is_ignored(self) -> None:
        client = self.connect(self.serve())
        for payload in (b"", b"x", bytes(125)):
            client.frame(PONG, payload)
        client.send("still here")
        self.assertEqual(client.read_frame(), Frame(True, False, TEXT, b"still here"))

    def test_newest_is_enough_for_a_client_that_does_not_read(self) -> None:
        """Where pongs would have to wait, the newest is kept: pings cannot fill the memory."""
        server = self.serve()
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets have it too
        reader, sleeper = self.connect(server), self.connect(server, small=True)
        for _ in range(4):
            server.broadcast(bytes(250_000))  # far more than both buffers: it has a backlog
        pings = 5000
        sleeper.send_raw(b"".join(masked_frame(PING, b"%d" % i) for i in range(pings)))
        sleeper.send("awake")
        self.assertEqual([reader.read() for _ in range(5)], [bytes(250_000)] * 4 + ["awake"])
        frames = [sleeper.read_frame()]
        while frames[-1].opcode != PONG:
            frames.append(sleeper.read_frame())
        self.assertEqual([len(frame.payload) for frame in frames[:-1]], [250_000] * 4 + [5])
        self.assertEqual(frames[-1].payload, b"%d" % (pings - 1))
        sleeper.send("that was all")
        self.assertEqual(sleeper.read_frame(), Frame(True, False, TEXT, b"that was all"))


class OpeningHandshake(ServerTestCase):
    """RFC 6455 4.2: which request gets which status."""

    ACCEPTED = (
        request(),
        request(target="/any/path?with=query"),
        request(target="http://localhost:4545/absolute"),
        request(Upgrade="WebSocket"),
        request(Upgrade="h2c, websocket"),
        request(Connection="keep-alive, Upgrade"),
        request(Connection="upgrade"),
        request(Host="127.0.0.1"),
        request(Host="[::1]:80"),
        request(Host="example.com"),
        request(Sec_WebSocket_Protocol="chat", Sec_WebSocket_Extensions="x-unknown; y=1"),
        request(X_Text="caf\xe9"),
        request(X_Long="x" * 8000),
        request(**{f"X_{i}": "x" for i in range(95)}),
        request().replace(b"Host: ", b"hOST:").replace(b"Sec-WebSocket-Key: ", b"sec-websocket-key: \t "),
    )

    REFUSED = (
        (400, "no Connection", request(Connection=None)),
        (400, "wrong Connection", request(Connection="keep-alive")),
        (400, "no Upgrade", request(Upgrade=None)),
        (400, "wrong Upgrade", request(Upgrade="websockets")),
        (400, "no key", request(Sec_WebSocket_Key=None)),
        (400, "empty key", request(Sec_WebSocket_Key="")),
        (400, "key of 15 bytes", request(Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAA")),
        (400, "key of 17 bytes", request(Sec_WebSocket_Key="AAAAAAAAAAAAAAAAAAAAAAA=")),
        (400, "key not in base64", request(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZ!==")),
        (400, "key not in ASCII", request(Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZ\xe9==")),
        (400, "two keys", request(Sec_WebSocket_Key=f"{KEY}\r\nSec-WebSocket-Key: {KEY}")),
        (400, "no Host", request(Host=None)),
        (400, "empty Host", request(Host="")),
        (400, "two Hosts", request(Host="localhost\r\nHost: localhost")),
        (400, "malformed Host", request(Host="local host")),
        (400, "Host with a path", request(Host="localhost/x")),
        (400, "Host with a user", request(Host="user@localhost")),
        (400, "HTTP/1.0", request(version="1.0")),
        (400, "extensions malformed", request(Sec_WebSocket_Extensions=";;")),
        (400, "lines that end in LF", request().replace(b"\r\n", b"\n")),
        (400, "CR alone", request(X_Field="a\rb")),
        (400, "NUL", request(X_Field="a\0b")),
        (400, "a folded line", request(X_Field="a\r\n b")),
        (400, "a space before the colon", request().replace(b"Host:", b"Host :")),
        (400, "a line without a colon", request().replace(b"Host: ", b"Host ")),
        (400, "no target", request().replace(b"GET / ", b"GET ")),
        (400, "two spaces", request().replace(b"GET / ", b"GET  / ")),
        (400, "no version", request().replace(b" HTTP/1.1", b"")),
        (400, "lower case", request().replace(b"HTTP/", b"http/")),
        (400, "garbage", b"garbage\r\n\r\n"),
        (400, "bytes", bytes(range(256))),
        (400, "a frame at once", masked_frame(TEXT, b"hello")),
        (405, "POST", request(method="POST")),
        (405, "get", request(method="get")),
        (414, "a long target", request(target="/" + "x" * 8192)),
        (414, "a request line that does not end", b"GET /" + b"x" * 32768),
        (426, "version 8", request(Sec_WebSocket_Version="8")),
        (426, "version 14", request(Sec_WebSocket_Version="14")),
        (426, "no version", request(Sec_WebSocket_Version=None)),
        (431, "a long field", request(X_Long="x" * 8192)),
        (431, "a field that does not end", request()[:-2] + b"X: " + b"x" * 32768),
        (431, "too many fields", request(**{f"X_{i}": "x" for i in range(96)})),
        (431, "too many bytes", request(**{f"X_{i}": "x" * 8000 for i in range(5)})),
        (505, "HTTP/2", request(version="2.0")),
        (505, "HTTP/0.9", request(version="0.9")),
    )

    def test_accepted(self) -> None:
        server = self.serve()
        for data in self.ACCEPTED:
            with self.subTest(data=data[:300]):
                client = self.connect(server, handshake=False)
                client.send_raw(data)
                start, *lines = client.read_head().decode().split("\r\n")
                self.assertEqual(start, "HTTP/1.1 101 Switching Protocols")
                fields = dict(line.split(": ", 1) for line in lines if line)
                expected = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": ACCEPT}
                self.assertEqual(fields, expected)
                client.frame(PING, b"?")
                self.assertEqual(client.read_frame(), Frame(True, False, PONG, b"?"))

    def test_refused(self) -> None:
        server = self.serve()
        required = {405: ("allow", "get"), 426: ("sec-websocket-version", "13")}
        for status, what, data in self.REFUSED:
            with self.subTest(what, status=status), self.assertLogs("pywebsock", "WARNING") as logged:
                got, fields, body = exchange(server.server_address[1], data)
                self.assertEqual((got, fields["connection"]), (status, "close, upgrade" if status == 426 else "close"))
                self.assertEqual(fields["content-length"], str(len(body)))
                name, value = required.get(status, ("cache-control", "no-store"))
                self.assertEqual(fields[name], value)
                self.assertEqual(len(logged.records), 1)
                self.assertIsNone(logged.records[0].exc_info)
                self.assertNotIn("\n", logged.records[0].getMessage())
        self.assertEqual(server.heard, [])

    def test_byte_by_byte_with_a_frame_behind(self) -> None:
        client = self.connect(self.serve(), handshake=False)
        for byte in request() + masked_frame(TEXT, b"early"):
            client.send_raw(bytes([byte]))
        client.read_head()
        self.assertEqual(client.read(), "early")

    def test_frames_in_the_segment_of_the_request(self) -> None:
        client = self.connect(self.serve(), handshake=False)
        client.send_raw(request() + masked_frame(TEXT, b"early") + masked_frame(PING)[:3])
        client.read_head()
        self.assertEqual(client.read(), "early")
        client.send_raw(masked_frame(PING)[3:])
        self.assertEqual(client.read_frame(), Frame(True, False, PONG, b""))

    def test_408_too_slow(self) -> None:
        """The time is for the whole head, not for each read."""
        server = self.serve(handshake_timeout=0.5)
        silent, dripping = self.connect(server, handshake=False), self.connect(server, handshake=False)
        with contextlib.suppress(ConnectionError):  # it is closed in the midst
            dripping.socket.settimeout(0.05)
            for byte in request(X_Long="x" * 1000):
                dripping.send_raw(bytes([byte]))
                with contextlib.suppress(socket.timeout):
                    self.assertTrue(dripping.read_head().startswith(b"HTTP/1.1 408 "))
                    break
            else:
                self.fail("it waited for all")
        self.assertTrue(silent.read_all().startswith(b"HTTP/1.1 408 "))

    def test_503_no_seat(self) -> None:
        server = self.serve(max_clients=1)
        self.connect(server)
        self.assertEqual(exchange(server.server_address[1], request())[0], 503)

    def test_no_request_at_all(self) -> None:
        """A port scan: nothing worth a warning, and nobody is disturbed."""
        server = self.serve()
        with self.assertLogs("pywebsock", "DEBUG") as logged:
            for data in (b"", b"G", request()[:-2]):
                client = self.connect(server, handshake=False)
                client.send_raw(data)
                client.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(client.read_all(), b"")
            eventually(lambda: len(logged.records) == 3)
        self.assertEqual({record.levelname for record in logged.records}, {"INFO"})
        self.assertEqual([record.exc_info for record in logged.records], [None] * 3)

    def test_tls_on_a_plain_port(self) -> None:
        server = self.serve()
        context = ssl.create_default_context()
        with self.assertLogs("pywebsock", "INFO") as logged:
            with self.assertRaises((ssl.SSLError, ConnectionError)):
                self.connect(server, tls=context)
            eventually(lambda: logged.records)
        self.assertEqual([record.exc_info for record in logged.records], [None])


class ClosingHandshake(ServerTestCase):
    """RFC 6455 5.5.1, 7."""

    CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)

    def test_begun_by_the_client(self) -> None:
        """The same code comes back, and the server ends the TCP connection first (7.1.1)."""
        server = self.serve()
        for code in (*self.CODES, None):
            with self.subTest(code=code):
                client = self.connect(server)
                reason = "" if code is None else f"for {code} reasons \u2713"
                client.close(code, reason)
                self.assertEqual(client.read_close()[0], code or 1005)
                server.wait_for("close", code or 1005, reason)

    def test_longest_reason(self) -> None:
        server = self.serve()
        client = self.connect(server)
        client.close(1000, "x" * 123)
        self.assertEqual(client.read_close()[0], 1000)
        server.wait_for("close", 1000, "x" * 123)

    def test_begun_by_the_server(self) -> None:
        server = self.serve()
        for code in self.CODES:
            with self.subTest(code=code):
                client = self.connect(server)
                (handler,) = server.clients
                handler.close(code, "enough")
                frame = client.read_frame()
                self.assertEqual(frame, Frame(True, False, CLOSE, struct.pack("!H", code) + b"enough"))
                self.assertNotIn(("close", code, ""), server.heard)  # it waits for the answer
                client.close(code)
                self.assertEqual(client.read_all(), b"")
                server.wait_for("close", code, "")
                eventually(lambda: not server.clients)

    def test_begun_by_both(self) -> None:
        server = self.serve()
        client = self.connect(server)
        (handler,) = server.clients
        handler.close(4001)
        client.close(4002)
        self.assertEqual(client.read_close(), (4001, ""))
        server.wait_for("close", 4002, "")

    def test_nothing_after_the_clients_close(self) -> None:
        server = self.serve()
        client, other = self.connect(server), self.connect(server)
        client.send_raw(masked_frame(CLOSE, b"\x03\xe8") + masked_frame(TEXT, b"late") + masked_frame(PING))
        self.assertEqual(client.read_close(), (1000, ""))
        other.send("next")
        self.assertEqual(other.read(), "next")

    def test_nothing_after_the_servers_close(self) -> None:
        """It sends nothing after its Close (5.5.1), and what the client sends is nobody's message any more."""
        server = self.serve()
        client = self.connect(server)
        (handler,) = server.clients
        other = self.connect(server)
        handler.close()
        handler.send("too late")
        handler.close(4000)
        server.broadcast("for those who stay")
        self.assertEqual(other.read(), "for those who stay")
        client.send("late")
        client.frame(PING)
        client.close()
        self.assertEqual(client.read_close(), (1000, ""))
        other.send("next")
        self.assertEqual(other.read(), "next")

    def test_unanswered(self) -> None:
        """The client does not answer: the server waits for the close timeout."""
        server = self.serve(close_timeout=0.2)
        client = self.connect(server)
        (handler,) = server.clients
        handler.close(4000, "go")
        self.assertEqual(client.read_frame().opcode, CLOSE)
        self.assertEqual(client.read_all(), b"")
        eventually(lambda: [heard[:2] for heard in server.heard] == [("open", "/"), ("close", 1006)])

    def test_client_that_does_not_end_the_connection(self) -> None:
        """The Close is answered, but the client keeps its side open: it is not waited for very long."""
        server = self.serve(close_timeout=0.2)
        client = self.connect(server)
        client.close()
        self.assertEqual(client.read_close(), (1000, ""))

        def refused() -> bool:
            try:
                client.send_raw(b"more")
            except ConnectionError:
                return True
            return False

        eventually(refused)

    def test_no_close_frame(self) -> None:
        """1006: the connection just ended (7.1.5)."""
        for what in ("end", "half of a frame", "half-closed", "reset"):
            with self.subTest(what):
                server = self.serve()
                client = self.connect(server)
                server.wait_for("open", "/")
                if what == "half of a frame":
                    client.send_raw(masked_frame(TEXT, b"Hello")[:-1])
                if what == "half-closed":
                    client.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.read_all(), b"")
                if what == "reset":
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.socket.close()
                eventually(lambda: any(heard[:2] == ("close", 1006) for heard in server.heard))  # noqa: B023
                self.assertEqual(len(server.clients), 0)

    def test_messages_before_the_close_are_delivered(self) -> None:
        server = self.serve()
        client, other = self.connect(server), self.connect(server)
        client.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(100)) + masked_frame(CLOSE))
        self.assertEqual([other.read() for _ in range(100)], [str(i) for i in range(100)])
        self.assertEqual([client.read() for _ in range(100)], [str(i) for i in range(100)])
        self.assertEqual(client.read_close(), (1005, ""))


LIMIT = 1000  # bytes of a message, in the tables that follow

BAD_FRAMES = (
    # 5.2: reserved bits and opcodes
    *((1002, f"RSV {rsv:03b} on text", masked_frame(TEXT, b"x", rsv=rsv)) for rsv in range(1, 8)),
    *((1002, f"RSV {rsv:03b} on a Ping", masked_frame(PING, b"x", rsv=rsv)) for rsv in (1, 2, 4)),
    *((1002, f"RSV {rsv:03b} on a Close", masked_frame(CLOSE, rsv=rsv)) for rsv in (1, 2, 4)),
    (1002, "RSV1 on a continuation", masked_frame(TEXT, b"x", fin=False) + masked_frame(CONT, b"x", rsv=4)),
    *((1002, f"opcode {opcode}", masked_frame(opcode, b"x")) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    # 5.1: masking
    (1002, "text not masked", b"\x81\x05Hello"),
    (1002, "empty text not masked", b"\x81\x00"),
    (1002, "Ping not masked", b"\x89\x00"),
    (1002, "Close not masked", b"\x88\x02\x03\xe8"),
    # 5.5: control frames
    *((1002, f"fragmented {opcode}", masked_frame(opcode, fin=False)) for opcode in (CLOSE, PING, PONG)),
    *((1002, f"126 bytes of {opcode}", masked_frame(opcode, bytes(126))) for opcode in (CLOSE, PING, PONG)),
    (1002, "65536 bytes of Ping", masked_frame(PING, length=65536)),
    # 5.4: fragments
    (1002, "nothing to continue", masked_frame(CONT, b"x")),
    (1002, "nothing to continue, not final", masked_frame(CONT, b"x", fin=False)),
    (1002, "nothing to continue, empty", masked_frame(CONT)),
    (1002, "text within text", masked_frame(TEXT, b"x", fin=False) + masked_frame(TEXT, b"x")),
    (1002, "binary within text", masked_frame(TEXT, b"x", fin=False) + masked_frame(BINARY, b"x", fin=False)),
    (1002, "empty text within empty text", masked_frame(TEXT, fin=False) + masked_frame(TEXT)),
    # 5.2: lengths
    (1002, "0 in 16 bits", b"\x82\xfe\x00\x00\0\0\0\0"),
    (1002, "125 in 16 bits", b"\x82\xfe\x00\x7d\0\0\0\0" + bytes(125)),
    (1002, "0 in 64 bits", b"\x82\xff" + bytes(8) + bytes(4)),
    (1002, "125 in 64 bits", b"\x82\xff" + struct.pack("!Q", 125) + bytes(4) + bytes(125)),
    (1002, "65535 in 64 bits", b"\x82\xff" + struct.pack("!Q", 65535) + bytes(4)),
    (1002, "top bit of 64", b"\x82\xff" + struct.pack("!Q", 1 << 63) + bytes(4)),
    (1002, "all bits of 64", b"\x82\xff" + b"\xff" * 8 + bytes(4)),
    # 5.5.1, 7.4: Close
    (1002, "Close of 1 byte", masked_frame(CLOSE, b"\x03")),
    *(
        (1002, f"Close with {code}", masked_frame(CLOSE, struct.pack("!H", code)))
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    ),
    (1007, "reason not UTF-8", masked_frame(CLOSE, b"\x03\xe8\xff")),
    (1007, "reason cut", masked_frame(CLOSE, b"\x03\xe8" + "é".encode()[:1])),
    # 8.1: UTF-8
    (1007, "text not UTF-8", masked_frame(TEXT, b"\xff")),
    (1007, "lone continuation byte", masked_frame(TEXT, b"\x80")),
    (1007, "overlong", masked_frame(TEXT, b"\xc0\x80")),
    (1007, "surrogate", masked_frame(TEXT, b"\xed\xa0\x80")),
    (1007, "beyond Unicode", masked_frame(TEXT, b"\xf4\x90\x80\x80")),
    (1007, "cut at the end", masked_frame(TEXT, b"\xe2\x82")),
    (1007, "cut at the end, in fragments", pieces(TEXT, b"\xe2", b"\x82")),
    (1007, "found before the frame is complete", masked_frame(TEXT, b"\xff", length=100)),
    (1007, "found far into the frame", masked_frame(TEXT, b"x" * 500 + b"\xe0\x80", length=900)),
    (1007, "found before the last fragment", masked_frame(TEXT, b"\xff", fin=False)),
    (1007, "found across fragments", masked_frame(TEXT, b"\xe2", fin=False) + masked_frame(CONT, b"A", fin=False)),
    (1007, "found across, incomplete", masked_frame(TEXT, b"\xf4", fin=False) + masked_frame(CONT, b"\x90", length=9)),
    # 7.4.1: too big, said by the header, before the payload is sent
    (1009, "one more than the limit", masked_frame(BINARY, length=LIMIT + 1)),
    (1009, "text", masked_frame(TEXT, length=LIMIT + 1)),
    (1009, "65536", masked_frame(BINARY, length=65536)),
    (1009, "the longest there is", masked_frame(BINARY, length=(1 << 63) - 1)),
    (1009, "first fragment", masked_frame(BINARY, length=LIMIT + 1, fin=False)),
    (1009, "with the payload", masked_frame(BINARY, bytes(LIMIT + 1))),
    (1009, "fragments", masked_frame(TEXT, b"x" * 600, fin=False) + masked_frame(CONT, length=401)),
    (1009, "very many fragments", masked_frame(TEXT, b"x", fin=False) + masked_frame(CONT, b"x", fin=False) * LIMIT),
)


def halves(first: bytes, second: bytes) -> bytes:
    """A compressed message in two fragments."""
    return masked_frame(BINARY, first, rsv=4, fin=False) + masked_frame(CONT, second)


BAD_DEFLATE = (
    (1002, "RSV1 on a Ping", masked_frame(PING, b"x", rsv=4)),
    (1002, "RSV1 on a continuation", masked_frame(TEXT, b"x", fin=False) + masked_frame(CONT, b"x", rsv=4)),
    (1002, "RSV2", masked_frame(TEXT, compress(b"x"), rsv=6)),
    (1007, "no deflate at all", masked_frame(BINARY, b"\xff" * 20, rsv=4)),
    (1007, "corrupt in the second fragment", halves(compress(b"x" * 99), b"\xff" * 20)),
    (1007, "text not UTF-8", masked_frame(TEXT, compress(b"\xff"), rsv=4)),
    (1009, "inflates beyond the limit", masked_frame(BINARY, compress(bytes(LIMIT + 1)), rsv=4)),
    (1009, "a bomb", masked_frame(BINARY, compress(bytes(900_000)), rsv=4)),
    (1009, "a bomb in fragments", halves(compress(bytes(900_000))[:500], compress(bytes(900_000))[500:])),
)


class BadFrames(ServerTestCase):
    """RFC 6455 7.1.7: the connection fails with the right code, and nobody else notices."""

    def check(self, server: Recorder, code: int, data: bytes, *, slowly: bool = False, **fields: str) -> None:
        """A good message, then what is bad; a Close with this code must come, and others hear the good alone."""
        with self.connect(server) as witness, self.connect(server, **fields) as client:
            data = masked_frame(TEXT, b"good") + data
            for part in [data[i : i + 1] for i in range(len(data))] if slowly else [data]:
                client.send_raw(part)
            self.assertEqual(client.read(), "good")
            self.assertEqual(client.read_close()[0], code)
            witness.send("all is well")
            self.assertEqual([witness.read(), witness.read()], ["good", "all is well"])

    def test_bad_frames(self) -> None:
        server = self.serve(max_message=LIMIT)
        for code, what, data in BAD_FRAMES:
            with self.subTest(what, code=code):
                self.check(server, code, data)
        codes = [heard[1] for heard in server.heard if heard[0] == "close" and heard[1] != 1006]
        self.assertEqual(sorted(codes), sorted(code for code, _, _ in BAD_FRAMES))

    def test_bad_frames_byte_by_byte(self) -> None:
        server = self.serve(max_message=LIMIT)
        for code, what, data in BAD_FRAMES:
            if len(data) < 200:
                with self.subTest(what, code=code):
                    self.check(server, code, data, slowly=True)

    def test_bad_deflate(self) -> None:
        server = self.serve(max_message=LIMIT)
        for code, what, data in BAD_DEFLATE:
            with self.subTest(what, code=code):
                self.check(server, code, data, Sec_WebSocket_Extensions=DEFLATE)

    def test_reason_says_what_was_wrong(self) -> None:
        client = self.connect(self.serve())
        client.send_raw(b"\x81\x05Hello")
        code, reason = client.read_close()
        self.assertEqual(code, 1002)
        self.assertIn("mask", reason)

    def test_close_survives_what_was_still_coming(self) -> None:
        """A reset would destroy the Close on its way: the server reads what it does not want."""
        client = self.connect(self.serve(max_message=LIMIT))
        client.send_raw(masked_frame(BINARY, length=4_000_000) + bytes(4_000_000))
        self.assertEqual(client.read_close()[0], 1009)

    def test_nothing_is_heard_after_the_failure(self) -> None:
        server = self.serve()
        client, other = self.connect(server), self.connect(server)
        client.send_raw(b"\x81\x05Hello" + masked_frame(TEXT, b"after"))
        self.assertEqual(client.read_close()[0], 1002)
        other.send("next")
        self.assertEqual(other.read(), "next")
        self.assertNotIn(("message", "after"), server.heard)


class Vocabulary(ServerTestCase):
    """The tables above agree with the names of the module."""

    def test_codes(self) -> None:
        self.assertEqual(
            {code for code, _, _ in (*BAD_FRAMES, *BAD_DEFLATE)},
            {
                pywebsock.CloseCode.PROTOCOL_ERROR,
                pywebsock.CloseCode.INVALID_FRAME_PAYLOAD_DATA,
                pywebsock.CloseCode.MESSAGE_TOO_BIG,
            },
        )

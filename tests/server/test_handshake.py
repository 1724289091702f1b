"""The opening handshake over real sockets (RFC 6455 4.2)."""

from __future__ import annotations

import contextlib
import socket
import ssl
import typing
import unittest.mock

import pywebsock
from tests.tools.support import (
    ACCEPT,
    DEADLINE,
    KEY,
    PING,
    PONG,
    TEXT,
    Client,
    Frame,
    Recorder,
    ServerTestCase,
    eventually,
    exchange,
    in_thread,
    masked_frame,
    request,
)


class OpeningHandshake(ServerTestCase):
    """RFC 6455 4.2: the status for each request."""

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
        request(Content_Length="0"),
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
        (400, "no Host, version 8", request(Host=None, Sec_WebSocket_Version="8")),
        (400, "no Host, POST", request(Host=None, method="POST")),
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
        (400, "a body", request(Content_Length="5") + b"hello"),
        (400, "a body in chunks", request(Transfer_Encoding="chunked") + b"0\r\n\r\n"),
        (400, "a body of no length", request(Content_Length="-3")),
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
        (400, "HTTP/2", request(version="2.0")),
        (400, "HTTP/0.9", request(version="0.9")),
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
        """The timeout is for the whole head, not for each read."""
        server = self.serve(handshake_timeout=0.3)
        stopped, dripping = self.connect(server, handshake=False), self.connect(server, handshake=False)
        stopped.send_raw(b"GET")
        with contextlib.suppress(ConnectionError):  # the server closes the connection
            dripping.socket.settimeout(0.05)
            for byte in request(X_Long="x" * 1000):
                dripping.send_raw(bytes([byte]))
                with contextlib.suppress(socket.timeout):
                    self.assertTrue(dripping.read_head().startswith(b"HTTP/1.1 408 "))
                    break
            else:
                self.fail("it waited for all")
        self.assertTrue(stopped.read_all().startswith(b"HTTP/1.1 408 "))

    def test_503_no_seat(self) -> None:
        server = self.serve(max_clients=1)
        self.connect(server)
        self.assertEqual(exchange(server.server_address[1], request())[0], 503)

    def test_no_request_at_all(self) -> None:
        """A port scan gives no warning."""
        server = self.serve()
        with self.assertLogs("pywebsock", "DEBUG") as logged:
            for data in (b"", b"G", request()[:-2]):
                client = self.connect(server, handshake=False)
                client.send_raw(data)
                client.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(client.read_all(), b"")
            eventually(lambda: len(logged.records) == 3)
        self.assertEqual([record.levelname for record in logged.records], ["DEBUG", "INFO", "INFO"])
        self.assertEqual([record.exc_info for record in logged.records], [None] * 3)
        self.assertEqual(server.status()["refused"], 0)

    def test_a_spare_connection(self) -> None:
        """Browsers and health checks connect and send nothing: no response, and no log line."""
        server = self.serve(handshake_timeout=0.2)
        with self.assertLogs("pywebsock", "DEBUG") as logged:
            self.assertEqual(self.connect(server, handshake=False).read_all(), b"")
        self.assertEqual([record.levelname for record in logged.records], ["DEBUG"])
        self.assertEqual(server.status()["refused"], 0)

    def test_tls_on_a_plain_port(self) -> None:
        server = self.serve()
        context = ssl.create_default_context()
        with self.assertLogs("pywebsock", "INFO") as logged:
            with self.assertRaises((ssl.SSLError, ConnectionError)):
                self.connect(server, tls=context)
            eventually(lambda: logged.records)
        self.assertEqual([record.exc_info for record in logged.records], [None])


class WithoutHooks(OpeningHandshake):
    """The same for a server that has no hook for a handshake: the thread that accepts answers."""

    class Server(Recorder):
        on_open = pywebsock.BroadcastServer.on_open

    kind = Server

    def test_without_a_thread(self) -> None:
        """If the request is there when its connection is accepted, its handshake needs no hook thread."""
        with self.Server(("127.0.0.1", 0)) as server, unittest.mock.patch.object(pywebsock.Hooks, "_add_worker"):
            client = self.connect(server, handshake=False)
            client.send_raw(request() + masked_frame(PING, b"?"))
            with in_thread(server.serve_forever, 0.005):
                self.assertTrue(client.read_head().startswith(b"HTTP/1.1 101 "))
                self.assertEqual(client.read_frame(), Frame(True, False, PONG, b"?"))
                server.shutdown()
            client.socket.close()

    def test_ctrl_c(self) -> None:
        """A KeyboardInterrupt during a handshake ends serve_forever(), and the other clients get 1001."""
        for place in ("parse_request", "check_origin", "serialize_response"):
            function = getattr(pywebsock, place)

            def interrupt(*arguments: object, function: typing.Any = function) -> object:
                if "interrupt" in str(arguments):
                    raise KeyboardInterrupt
                return function(*arguments)

            with (
                self.subTest(place),
                unittest.mock.patch.object(pywebsock, place, interrupt),
                self.Server(("127.0.0.1", 0), subprotocols=["interrupt"]) as server,
            ):
                witness, client = self.connect(server, handshake=False), self.connect(server, handshake=False)
                witness.send_raw(request())
                client.send_raw(request(Sec_WebSocket_Protocol="interrupt"))
                self.assertRaises(KeyboardInterrupt, server.serve_forever)
                self.assertEqual(client.read_all(), b"")
                witness.read_head()
                with in_thread(server.server_close):
                    self.assertEqual(witness.read_frame().payload, b"\x03\xe9")
                    witness.socket.close()

    def test_ctrl_c_at_the_beginning(self) -> None:
        """The server forgets a connection that it has accepted a moment ago."""
        with self.Server(("127.0.0.1", 0)) as server:
            add = server._room.add_pending

            def interrupt(handler: pywebsock.RequestHandler, now: float) -> None:
                add(handler, now)
                raise KeyboardInterrupt

            client = self.connect(server, handshake=False)
            with unittest.mock.patch.object(server._room, "add_pending", interrupt):
                self.assertRaises(KeyboardInterrupt, server.serve_forever)
            self.assertEqual((client.read_all(), server._room.size, server._room.waiting), (b"", 0, set()))

    def test_at_once(self) -> None:
        """The loop, which sleeps, is woken for all connections that wait."""
        server = self.serve()
        server._loop.deadlines.interval = 2 * DEADLINE
        eventually(lambda: server._loop.deadlines.next_look > server._loop.now + DEADLINE)
        with server._room.lock:  # nobody joins
            clients = [self.connect(server, handshake=False) for _ in range(3 * pywebsock.ACCEPTED_AT_ONCE)]
            for client in clients:
                client.send_raw(request())
        for client in clients:
            self.assertTrue(client.read_head().startswith(b"HTTP/1.1 101 "))


class Subprotocols(ServerTestCase):
    """The choice of a subprotocol (RFC 6455 4.2.2, item 5)."""

    @staticmethod
    def answer(server: pywebsock.BroadcastServer, offered: str | None) -> tuple[int, str | None]:
        """Return the status and the chosen subprotocol."""
        with Client(server.server_address[1], handshake=False) as client:
            client.send_raw(request(Sec_WebSocket_Protocol=offered))
            start, *lines = client.read_head().decode().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines if line)
        return int(start.split()[1]), fields.get("Sec-WebSocket-Protocol")

    def test_served(self) -> None:
        """With a list, a client that offers only other subprotocols is refused."""
        server = self.serve(subprotocols=("chat", "json"))
        for offered, expected in (
            (None, (101, None)),
            ("chat", (101, "chat")),
            ("x, json, chat", (101, "json")),
            ("mqtt", (400, None)),
            ("Chat", (400, None)),
        ):
            with self.subTest(offered):
                self.assertEqual(self.answer(server, offered), expected)
        empty = self.serve(subprotocols=())
        self.assertEqual([self.answer(empty, offered) for offered in (None, "mqtt")], [(101, None), (400, None)])

    def test_none_chosen(self) -> None:
        """Without a list, the client may go on (RFC 6455); browsers do not, so the log says why they left."""
        server = self.serve()
        with self.assertLogs("pywebsock", "WARNING") as logged:
            self.assertEqual(self.answer(server, "chat,\xe9"), (101, None))
        self.assertEqual(len(logged.output), 1)
        self.assertIn(r"offers the subprotocol chat, \xe9", logged.output[0])

    def test_admit(self) -> None:
        """admit sees the chosen subprotocol, and may choose another, for example if the field has a token."""

        class Token(Recorder):
            def admit(self, client: pywebsock.WebSocketHandler) -> None:
                self._tell("chosen", client.subprotocol)
                offered = client.headers.get("sec-websocket-protocol", "")
                if "token.secret" in offered:
                    client.subprotocol = "v1"
                elif "bad" in offered:
                    client.subprotocol = "v1\r\nX-Evil: yes"

            def on_open(self, client: pywebsock.WebSocketHandler) -> None:
                self._tell("open", client.subprotocol)

        server = self.serve(Token, subprotocols=["chat"])
        for offered, expected, told in (
            ("v1, token.secret", (101, "v1"), [("chosen", ""), ("open", "v1")]),
            ("chat", (101, "chat"), [("chosen", "chat"), ("open", "chat")]),
            ("v1, token.wrong", (400, None), [("chosen", "")]),
            ("bad", (500, None), [("chosen", "")]),
        ):
            with self.subTest(offered):
                server.heard.clear()
                self.assertEqual(self.answer(server, offered), expected)
                for each in told:
                    server.wait_for(*each)

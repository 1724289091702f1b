"""The hooks of a library program: admission, POSTs, exceptions in hooks, and calls of methods in hooks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import subprocess
import sys
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from pywebsock import BroadcastServer, HandshakeError, Message, WebSocketHandler
from tests.tools.support import (
    DEADLINE,
    ROOT,
    Client,
    Recorder,
    ServerTestCase,
    eventually,
    exchange,
    in_thread,
    masked_frame,
    request,
    running,
)

GOODBYE = (1001, "")


def post(body: bytes = b"posted", **fields: typing.Any) -> bytes:
    """Return a POST with this body."""
    changes = {"Upgrade": None, "Connection": None, "Sec_WebSocket_Key": None, "Sec_WebSocket_Version": None}
    return request(**{"method": "POST", "Content_Length": str(len(body)), **changes, **fields}) + body


def wait_for_the_loop(server: BroadcastServer, now: float) -> None:
    """Wait until the loop has begun a round at this time or later."""

    def has_come() -> bool:
        server._queue.wake()
        return server._loop.now > now

    eventually(has_come)


class Tokens(Recorder):
    """A server that admits clients with a token."""

    def admit(self, client: WebSocketHandler) -> None:
        self._tell("admit", client.target)
        if client.headers.get("authorization") != "Bearer sesame":
            raise HandshakeError(401, "who are you?", ("WWW-Authenticate", "Bearer"))
        client.data = "admitted"

    def on_open(self, client: WebSocketHandler) -> None:
        self._tell("open", client.data)

    def on_post(self, client: WebSocketHandler, message: Message) -> None:
        self._tell("post", client.data, message)
        super().on_post(client, message)


class Admit(ServerTestCase):
    """admit runs before the 101, and before the body of a POST is read; its HandshakeError is the response."""

    def refusal(self, data: bytes, **settings: typing.Any) -> tuple[int, dict[str, str], bytes]:
        """Return the response to a refused request, and check the log."""
        server = self.serve(Tokens, **settings)
        with self.assertLogs("pywebsock", "WARNING") as logged:
            answer = exchange(server.server_address[1], data)
        self.assertEqual(len(logged.output), 1)
        self.assertIn("refused: 401, who are you?", logged.output[0])
        self.assertEqual([kind for kind, *_ in server.heard], ["admit"])
        self.assertEqual(server.status()["refused"], 1)
        return answer

    def test_websocket(self) -> None:
        status, fields, body = self.refusal(request(target="/a?b=c"))
        self.assertEqual((status, fields["www-authenticate"]), (401, "bearer"))
        self.assertEqual(body, b"401 Unauthorized: who are you?\n")

    def test_absolute_target(self) -> None:
        """client.target begins with the path (RFC 9112 3.2.2)."""
        server = self.serve(Tokens)
        for target, expected in (
            ("http://localhost/a?b=c", "/a?b=c"),
            ("HTTPS://localhost:4545/?b=http://c", "/?b=http://c"),
            ("http://localhost?b", "/?b"),
            ("http://localhost", "/"),
            ("/http://a", "/http://a"),
        ):
            self.assertEqual(exchange(server.server_address[1], request(target=target))[0], 401)
            server.wait_for("admit", expected)

    def test_post(self) -> None:
        self.assertEqual(self.refusal(post())[0], 401)

    def test_fields_replace_others(self) -> None:
        """The names of fields are case-insensitive."""

        class Refusing(Recorder):
            def admit(self, client: WebSocketHandler) -> None:
                raise HandshakeError(401, "no", ("content-TYPE", "application/json"), ("upgrade", "websocket"))

        server = self.serve(Refusing)
        with self.connect(server, handshake=False) as client:
            client.send_raw(request())
            names = [line.partition(b":")[0].lower() for line in client.read_all().split(b"\r\n")]
            self.assertEqual(names.count(b"content-type"), 1)
        self.assertEqual(exchange(server.server_address[1], request())[1]["connection"], "close, upgrade")

    def test_post_before_its_body(self) -> None:
        """A refused client gets the response before it sends its body."""
        self.assertEqual(self.refusal(post(b"", Content_Length="16000000"))[0], 401)

    def test_post_that_expects_continue(self) -> None:
        """A 401 comes in place of the 100."""
        self.assertEqual(self.refusal(post(b"", Content_Length="6", Expect="100-continue"))[0], 401)

    def test_no_history_before_it(self) -> None:
        server = self.serve(Tokens, history=10)
        server.broadcast("secret")
        with Client(server.server_address[1], handshake=False) as stranger:
            stranger.send_raw(request())
            self.assertNotIn(b"secret", stranger.read_all())
        self.assertEqual(self.connect(server, Authorization="Bearer sesame").read(), "secret")

    def test_admitted(self) -> None:
        """Later hooks see client.data as admit has set it."""
        server = self.serve(Tokens)
        client = self.connect(server, Authorization="Bearer sesame")
        self.assertEqual(exchange(server.server_address[1], post(Authorization="Bearer sesame"))[0], 202)
        self.assertEqual(client.read(), "posted")
        server.wait_for("post", "admitted", "posted")
        server.wait_for("open", "admitted")

    def test_requests_without_admit(self) -> None:
        """admit is not called for the page, the status and invalid requests."""
        server = self.serve(Tokens)
        get: dict[str, typing.Any] = {"Upgrade": None, "Sec_WebSocket_Key": None}
        for status, data in (
            (200, request(**get)),
            (200, request(target="/status", **get)),
            (404, request(target="/nothing", **get)),
            (403, request(Origin="https://evil.example")),
            (403, post(Origin="https://evil.example")),
            (426, request(Sec_WebSocket_Version="12")),
        ):
            self.assertEqual(exchange(server.server_address[1], data)[0], status)
        self.assertEqual(server.heard, [])

    def test_status_cannot_be_a_success(self) -> None:
        """A HandshakeError with a status of success is an error of the program: the client gets a 500."""

        class Wrong(BroadcastServer):
            """A server that refuses with a 200."""

            def admit(self, client: WebSocketHandler) -> None:
                raise HandshakeError(200, "come in")

        server = self.serve(Wrong)
        with self.assertLogs("pywebsock", "ERROR"):
            self.assertEqual(exchange(server.server_address[1], request())[0], 500)
        self.assertEqual(server.clients, set())

    def test_message_from_the_network(self) -> None:
        """The reason of a refusal may have data from the network, which is escaped in the log."""

        class Echo(BroadcastServer):
            """A server whose refusal has the target of the request."""

            def admit(self, client: WebSocketHandler) -> None:
                raise HandshakeError(403, f"not {client.headers['x-name']}")

        server = self.serve(Echo)
        with self.assertLogs("pywebsock", "WARNING") as logged:
            status, _, _ = exchange(server.server_address[1], request(X_Name="caf\xe9\x85 \x9b31m"))
        self.assertEqual(status, 403)
        self.assertTrue(logged.output[0].isprintable() and logged.output[0].isascii(), logged.output)

    def test_method(self) -> None:
        """client.method depends on the request line, and not on header fields such as Upgrade."""
        methods: list[str] = []

        class TwoTokens(BroadcastServer):
            """A server with one token for WebSockets and another one for POSTs."""

            def admit(self, client: WebSocketHandler) -> None:
                methods.append(client.method)
                if client.headers.get("authorization") != f"Bearer {client.method}":
                    raise HandshakeError(401, "who are you?")

        server = self.serve(TwoTokens)
        port = server.server_address[1]
        for fields in ({"Upgrade": "h2c, websocket"}, {"Upgrade": "WebSocket"}, {"Content_Length": "0"}):
            self.assertEqual(exchange(port, request(Authorization="Bearer POST", **fields))[0], 401)
        self.connect(server, Authorization="Bearer GET")
        self.assertEqual(exchange(port, post(Authorization="Bearer GET"))[0], 401)
        self.assertEqual(exchange(port, post(Authorization="Bearer POST"))[0], 202)
        self.assertEqual(methods, [*["GET"] * 4, "POST", "POST"])

    def test_close_of_a_post(self) -> None:
        """In on_post, client.close() refuses, so that on_post may be the same function as on_message."""

        class Refuses(BroadcastServer):
            """A server that refuses POSTs."""

            def on_post(self, client: WebSocketHandler, message: pywebsock.Message) -> None:
                client.close(1008, "you may not")

        self.assertEqual(exchange(self.serve(Refuses).server_address[1], post())[0], 403)

    def test_close(self) -> None:
        """client.close() in admit refuses, too."""

        class ClosesInAdmit(BroadcastServer):
            """A server that refuses by client.close()."""

            def admit(self, client: WebSocketHandler) -> None:
                client.close(1008, "no")

        server = self.serve(ClosesInAdmit)
        self.assertEqual(exchange(server.server_address[1], request())[0], 403)

    def test_slow(self) -> None:
        """admit may take longer than the handshake timeout."""
        asked, go_on = threading.Event(), threading.Event()

        class Slow(BroadcastServer):
            """A server with a slow admit."""

            def admit(self, client: WebSocketHandler) -> None:
                asked.set()
                go_on.wait(DEADLINE)

        server = self.serve(Slow, handshake_timeout=0.1)
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(Client(server.server_address[1], handshake=False))
            client.send_raw(request())
            self.assertTrue(asked.wait(DEADLINE))
            now = server._loop.now
            wait_for_the_loop(server, now + 0.3)
            go_on.set()
            self.assertIn(b" 101 ", client.read_head())
            for text in ("in time", "and still here"):
                client.send(text)
                self.assertEqual(client.read(), text)


class Post(ServerTestCase):
    """on_post is called for each POST."""

    def test_default(self) -> None:
        server = self.serve()
        client = self.connect(server)
        self.assertEqual(exchange(server.server_address[1], post())[0], 202)
        self.assertEqual(client.read(), "posted")
        self.assertNotIn("message", [kind for kind, *_ in server.heard])

    def test_refused(self) -> None:
        class JSONOnly(BroadcastServer):
            """A server that accepts only JSON."""

            def on_post(self, client: WebSocketHandler, message: Message) -> None:
                raise HandshakeError(415, "JSON, please", ("Accept-Post", "application/json"))

        server = self.serve(JSONOnly)
        client = self.connect(server)
        status, fields, _ = exchange(server.server_address[1], post())
        self.assertEqual((status, fields["accept-post"]), (415, "application/json"))
        server.broadcast("end")
        self.assertEqual(client.read(), "end")

    def test_an_error_in_it(self) -> None:
        class Broken(BroadcastServer):
            """A server whose hook raises an exception."""

            def on_post(self, client: WebSocketHandler, message: Message) -> None:
                raise LookupError("in on_post")

        server = self.serve(Broken)
        with self.assertLogs("pywebsock", "ERROR") as logged:
            self.assertEqual(exchange(server.server_address[1], post())[0], 500)
        self.assertIn("LookupError: in on_post", logged.output[0])

    def test_attributes_of_the_client(self) -> None:
        """The client of a POST has the attributes of the request; send() to it has no effect."""

        class AttributesOfPosts(Recorder):
            """A server that keeps the attributes of the client."""

            def on_post(self, client: WebSocketHandler, message: Message) -> None:
                client.send("nobody hears this")
                self._tell(client.target, client.headers["x-name"], client in self.clients)

        server = self.serve(AttributesOfPosts)
        self.assertEqual(exchange(server.server_address[1], post(target="/?room=1", X_Name="me"))[0], 202)
        self.assertEqual(server.heard, [("/?room=1", "me", False)])

    def test_rate(self) -> None:
        """POSTs count; a POST that would wait for too long gets 429."""
        server = self.serve(rate=0.1, handshake_timeout=1.0)
        self.assertEqual(exchange(server.server_address[1], post())[0], 202)
        status, fields, _ = exchange(server.server_address[1], post())
        self.assertEqual((status, fields["retry-after"]), (429, "1"))

    def test_many_above_the_rate(self) -> None:
        """Few POSTs wait for the rate, since each takes a thread."""
        server = self.serve(rate=1)
        clients = [self.connect(server, handshake=False) for _ in range(10)]
        for client in clients:
            client.send_raw(post())
        responses = [client.read_all() for client in clients]
        self.assertIn(b" 202 ", responses[0])
        self.assertGreater(sum(b" 429 " in response for response in responses), 0)

    def test_read_only(self) -> None:
        """With read_only, no hook is called for a POST."""
        server = self.serve(Tokens, read_only=True)
        self.assertEqual(exchange(server.server_address[1], post(Authorization="Bearer sesame"))[0], 403)
        client = self.connect(server, Authorization="Bearer sesame")
        server.broadcast("to all")
        self.assertEqual(client.read(), "to all")
        client.send("to all")
        self.assertEqual(client.read_close()[0], 1008)
        self.assertNotIn("post", [kind for kind, *_ in server.heard])


class NotAnException(BaseException):
    """An exception that is not an Exception."""

    def __str__(self) -> str:
        raise ValueError("not even a name")


def refusal() -> HandshakeError:
    """Return an exception that is allowed only in hooks for requests."""
    return HandshakeError(401, "too late")


EVERYTHING = (
    *(SystemExit, KeyboardInterrupt, asyncio.CancelledError, MemoryError, GeneratorExit, RecursionError, StopIteration),
    *(OSError, BlockingIOError, ConnectionResetError, EOFError, TimeoutError, NotAnException),
    *(lambda: pywebsock.ProtocolError("said by a hook", pywebsock.CloseCode.PROTOCOL_ERROR),),
    refusal,
)


class Raising(ServerTestCase):
    """An exception in a hook ends only that client: the server goes on, and no thread or descriptor is left."""

    class Server(Recorder):
        """A server that raises a given exception in a given hook."""

        def admit(self, client: WebSocketHandler) -> None:
            self._raise(client, "admit")

        def on_open(self, client: WebSocketHandler) -> None:
            self._raise(client, "on_open")

        def on_message(self, client: WebSocketHandler, message: Message) -> None:
            self._raise(client, "on_message")
            client.send(message)

        def on_post(self, client: WebSocketHandler, message: Message) -> None:
            self._raise(client, "on_post")

        def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
            super().on_close(client, code, reason)
            self._raise(client, "on_close")

        def _raise(self, client: WebSocketHandler, where: str) -> None:
            if client.target.startswith(f"/?{where}="):
                raise EVERYTHING[int(client.target.rpartition("=")[2])]()

    def check(self, where: str, end: typing.Callable[[Client, typing.Any], object]) -> None:
        """Raise each exception in this hook; `end` checks the result for the client."""
        server = self.serve(self.Server)
        witness = self.connect(server)
        for number, what in enumerate(EVERYTHING):
            with self.subTest(what=what), Client(server.server_address[1], handshake=False) as client:
                target = f"/?{where}={number}"
                client.send_raw(post(bytes(200_000), target=target) if where == "on_post" else request(target=target))
                end(client, what)
                witness.send("still here")
                self.assertEqual(witness.read(), "still here")
        eventually(lambda: server._room.size == 1)
        self.assertEqual(len(server.clients), 1)
        self.assertEqual(server._budget.left, pywebsock.Budget(max(64 << 20, 8 * server.max_message)).left)

    def check_status(self, client: Client, what: typing.Any) -> None:
        """Check the response: the status of a HandshakeError, or 500 after another exception."""
        status = 401 if what is refusal else 500
        self.assertEqual(int(client.read_all().split(b" ")[1]), status)

    def check_close(self, client: Client, _: object) -> None:
        """Check the close code: the same for all exceptions, and no text of the exception."""
        client.read_head()
        client.send("hello")
        self.assertEqual(client.read_close(), (1011, "internal error"))

    def check_echo(self, client: Client, _: object) -> None:
        """Check that an exception in on_close does not affect the client."""
        client.read_head()
        client.send("hello")
        self.assertEqual(client.read(), "hello")
        client.close(4000)
        self.assertEqual(client.read_close(), (4000, ""))

    def test_admit(self) -> None:
        self.check("admit", self.check_status)

    def test_on_open(self) -> None:
        self.check("on_open", self.check_close)

    def test_on_message(self) -> None:
        self.check("on_message", self.check_close)

    def test_on_post(self) -> None:
        self.check("on_post", self.check_status)

    def test_on_close(self) -> None:
        with self.assertLogs("pywebsock", "ERROR") as logged:
            self.check("on_close", self.check_echo)
        self.assertEqual(len(logged.records), len(EVERYTHING))


class BetweenHooks(ServerTestCase):
    """Events between two hooks, or while a hook blocks."""

    def test_closed_while_it_waits_for_its_rate(self) -> None:
        server = self.serve(rate=0.3)  # after the first message, three seconds: less than the close timeout
        client = self.connect(server)
        client.send("1")
        client.send("2")
        self.assertEqual(client.read(), "1")
        eventually(lambda: server._loop.sender.gate.wait_time(0) < math.inf)
        (handler,) = server.clients
        handler.close(1008, "banned")
        client.close(1008)
        self.assertEqual(client.read_frame().payload[2:], b"banned")
        eventually(lambda: not server.clients)
        self.assertIn(("message", "1"), server.heard)
        self.assertNotIn(("message", "2"), server.heard)

    def test_closed_while_its_body_comes(self) -> None:
        """A POST that gets a 403 is not broadcast."""
        admitted: list[WebSocketHandler] = []

        class Server(Recorder):
            def admit(self, client: WebSocketHandler) -> None:
                admitted.append(client)

            def on_post(self, client: WebSocketHandler, message: Message) -> None:
                self._tell("post", message)

        server = self.serve(Server)
        client = self.connect(server, handshake=False)
        client.send_raw(post()[:-1])
        eventually(lambda: admitted)
        admitted[0].close()
        client.send_raw(post()[-1:])
        self.assertIn(b" 403 ", client.read_head())
        self.assertEqual(server.heard, [])

    def test_admitted_slowly(self) -> None:
        """The time of a hook does not count for the timeout of the body."""

        class Server(BroadcastServer):
            def admit(self, client: WebSocketHandler) -> None:
                now = self._loop.now
                wait_for_the_loop(self, now + 2 * self.handshake_timeout)

        server = self.serve(Server, handshake_timeout=0.3)
        client = self.connect(server, handshake=False)
        client.send_raw(post(Expect="100-continue")[:-6])
        self.assertIn(b" 100 ", client.read_head())
        time.sleep(0.15)
        client.send_raw(b"posted")
        self.assertIn(b" 202 ", client.read_head())

    def test_out_of_memory_in_a_body(self) -> None:
        """After a MemoryError in a body, its part of the budget is free again."""
        server = self.serve()
        with unittest.mock.patch("pywebsock.decode_body", side_effect=MemoryError), self.assertLogs("pywebsock"):
            for _ in range(10):
                exchange_nothing(server.server_address[1], post(bytes(1024 * 1024)))
        eventually(lambda: not server._room.pending)
        self.assertEqual(server._budget.left, pywebsock.Budget(max(64 << 20, 8 * server.max_message)).left)
        self.assertEqual(exchange(server.server_address[1], post(bytes(16 * 1024 * 1024)))[0], 202)

    def test_out_of_memory_for_one(self) -> None:
        """After a MemoryError for one client, it gets a Close, and the others get the message."""
        server = self.serve()
        clients = [self.connect(server) for _ in range(3)]
        eventually(lambda: len(server.clients) == 3)
        line = server._room._sends[0]
        line[next(iter(line))] = unittest.mock.Mock(side_effect=MemoryError)
        server.broadcast("Hello")
        self.assertEqual(clients[0].read_close(), (1009, "out of memory"))
        self.assertEqual([client.read() for client in clients[1:]], ["Hello"] * 2)

    def test_out_of_memory_for_a_message(self) -> None:
        """After a MemoryError in a broadcast, its recipients get a Close: nobody misses a message without notice."""
        server = self.serve()
        clients = [self.connect(server) for _ in range(3)]
        eventually(lambda: len(server.clients) == 3)
        with unittest.mock.patch.object(pywebsock.Outgoing, "frame", side_effect=MemoryError):
            server.broadcast("lost")
            for client in clients:
                self.assertEqual(client.read_close(), (1009, "out of memory"))
        other = self.connect(server)
        server.broadcast("Hello")
        self.assertEqual(other.read(), "Hello")

    def test_a_pong_does_not_wait_for_a_hook(self) -> None:
        go_on = threading.Event()

        class Server(BroadcastServer):
            def on_message(self, client: WebSocketHandler, message: Message) -> None:
                go_on.wait(2 * DEADLINE)

        server = self.serve(Server)
        client = self.connect(server)
        client.send_raw(masked_frame(1, b"Hello") + masked_frame(9, b"?"))
        self.assertEqual(client.read_frame().payload, b"?")
        go_on.set()

    def test_half_a_character_in_a_refusal(self) -> None:
        class Server(BroadcastServer):
            def admit(self, client: WebSocketHandler) -> None:
                raise HandshakeError(400, "no command \ud800")

        status, _, body = exchange(self.serve(Server).server_address[1], request())
        self.assertEqual((status, body), (400, b"400 Bad Request: no command ?\n"))

    def test_a_status_that_fails(self) -> None:
        for error in (TypeError("a set"), OSError("no such file")):
            with self.subTest(error=error), self.assertLogs("pywebsock") as logged:
                server = self.serve()
                with unittest.mock.patch.object(server, "status", side_effect=error):
                    data = request(target="/status", Upgrade=None, Sec_WebSocket_Key=None)
                    self.assertEqual(exchange(server.server_address[1], data)[0], 500)
            self.assertTrue(any("an error in a hook" in line for line in logged.output), logged.output)

    def test_the_end_in_a_hook(self) -> None:
        """A hook closes a client that does not answer; the connection ends at the timeout."""

        class Server(Recorder):
            def on_message(self, client: WebSocketHandler, message: Message) -> None:
                self.shutdown()
                self.server_close()

        server = self.serve(Server, close_timeout=0.3)
        client = self.connect(server)
        client.send("stop")
        eventually(lambda: any(kind == "close" for kind, *_ in server.heard))
        eventually(lambda: not server._room.size)


def exchange_nothing(port: int, data: bytes) -> None:
    """Send a request without reading the response."""
    with Client(port, handshake=False) as client:
        client.send_raw(data)
        assert client.read_all() == b""


class Stopping(ServerTestCase):
    """server_close() and shutdown() in a hook, or while a hook blocks."""

    class Server(Recorder):
        """A server that stops in the hook that a client names."""

        close_timeout = 2.0
        took = math.inf

        def __init__(self, *arguments: typing.Any, **settings: typing.Any) -> None:
            self.stopped = threading.Event()
            super().__init__(*arguments, **settings)

        def on_open(self, client: WebSocketHandler) -> None:
            self._stop(client, "on_open")

        def on_message(self, client: WebSocketHandler, message: Message) -> None:
            self._stop(client, "on_message")

        def on_post(self, client: WebSocketHandler, message: Message) -> None:
            self._stop(client, "on_post")

        def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
            self._stop(client, "on_close")

        def admit(self, client: WebSocketHandler) -> None:
            self._stop(client, "admit")

        def _stop(self, client: WebSocketHandler, where: str) -> None:
            if client.target == f"/?{where}":
                start = time.monotonic()
                self.shutdown()
                self.server_close()
                self.took = time.monotonic() - start
                self.stopped.set()

    def test_in_a_hook(self) -> None:
        """server_close() in a hook waits for all other clients, but not for the client of the hook."""
        for where in ("admit", "on_open", "on_message", "on_post", "on_close"):
            with self.subTest(where), running(self.Server) as server:
                witness = self.connect(server)
                with Client(server.server_address[1], handshake=False) as client:
                    target = f"/?{where}"
                    closing = masked_frame(1, b"x") + masked_frame(8, b"\x03\xe8")
                    client.send_raw(post(target=target) if where == "on_post" else request(target=target) + closing)
                    self.assertEqual(witness.read_frame().payload, b"\x03\xe9")
                    witness.close(1001)
                    witness.read_all()
                    witness.socket.close()
                    client.read_all()
                    server.stopped.wait(DEADLINE)
                    self.assertLess(server.took, 1.0)
                    self.assertEqual(server.socket.fileno(), -1)
            self.assertFalse(server._room.size)

    def test_in_on_close_beside_a_slow_client(self) -> None:
        """server_close() in on_close waits for a client that still has to read."""
        with running(self.Server, close_timeout=DEADLINE) as server:
            slow = self.connect(server, small=True)
            with self.connect(server, target="/?on_close") as client:
                for _ in range(12):
                    server.broadcast(bytes(1_000_000))
                    client.read()
                client.close(1000)
                client.read_all()
            eventually(lambda: server.socket.fileno() < 0)  # accepts no more
            self.assertEqual([len(slow.read()) for _ in range(12)], [1_000_000] * 12)
            self.assertEqual(slow.read_frame().payload, b"\x03\xe9")
            slow.close(1001)
            slow.read_all()
            slow.socket.close()
            self.assertTrue(server.stopped.wait(DEADLINE))

    def test_out_of_memory_for_a_client_that_does_not_answer(self) -> None:
        """An error for one client at the end does not make server_close() wait forever."""
        server = self.serve(close_timeout=0.2)
        self.connect(server)
        (client,) = server.clients
        self.addCleanup(client.request.close)
        patch = unittest.mock.patch.object(server._loop.sender, "drop", side_effect=MemoryError)
        with patch, in_thread(server.server_close):
            pass

    def test_while_a_hook_blocks(self) -> None:
        """server_close() returns at the close timeout; the thread ends when the hook does."""
        go_on, stuck = threading.Event(), threading.Event()

        class Stuck(Recorder):
            """A server whose hook blocks, and then goes on."""

            close_timeout = 0.2

            def on_message(self, client: WebSocketHandler, message: Message) -> None:
                stuck.set()
                go_on.wait(DEADLINE)
                self.broadcast(message)
                client.send(message)
                client.close()

        with running(Stuck) as server:
            client = self.connect(server)
            client.send("x")
            self.assertTrue(stuck.wait(DEADLINE))
            server.shutdown()
            start = time.monotonic()
            server.server_close()
            self.assertLess(time.monotonic() - start, 2.0)
            self.assertEqual(client.read_frame().payload, b"\x03\xe9")
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(client.read_all(), b"")  # the connection ends before the hook does
            go_on.set()
            eventually(lambda: server.heard[-1][:2] == ("close", 1006))
            eventually(lambda: not server._room.size)

    def test_without_shutdown(self) -> None:
        """serve_forever() ends with server_close()."""
        server = pywebsock.BroadcastServer(("127.0.0.1", 0))
        with in_thread(server.serve_forever, 0.02) as thread:
            Client(server.server_address[1]).__exit__()
            server.server_close()
            thread.join(DEADLINE)
            self.assertFalse(thread.is_alive())

    def test_fifty_times(self) -> None:
        """After fifty servers, no thread, file descriptor or client is left."""
        before: list[int] = []
        for _ in range(50):
            with running(Recorder) as server, Client(server.server_address[1]) as client:
                client.send("hello")
                self.assertEqual(client.read(), "hello")
            eventually(lambda: threading.active_count() <= (before or [100])[0])
            before.append(threading.active_count())
            self.assertEqual((server.clients, server._room.connections, server._room.pending), (set(), set(), {}))
        self.assertLessEqual(before[-1], before[0])

    def test_two_servers(self) -> None:
        """Two servers are independent; a hook may broadcast in the other server."""
        other = self.serve()

        class Bridge(BroadcastServer):
            """A server that broadcasts its messages in another server."""

            def on_message(self, client: WebSocketHandler, message: Message) -> None:
                other.broadcast(message)

        bridge = self.serve(Bridge)
        here, there = self.connect(bridge), self.connect(other)
        for number in range(100):
            here.send(f"over {number}")
        self.assertEqual([there.read() for _ in range(100)], [f"over {number}" for number in range(100)])
        bridge.broadcast("here")
        other.broadcast("there")
        self.assertEqual([here.read(), there.read()], ["here", "there"])


class Log(logging.Handler):
    """A log handler that broadcasts the log."""

    def __init__(self, server: BroadcastServer) -> None:
        super().__init__()
        self.server = server

    def emit(self, record: logging.LogRecord) -> None:
        self.server.broadcast(self.format(record))


# A program whose objects broadcast when they are collected, which may happen inside of a broadcast, and in the loop.
# While one thread collects, gc.collect() in another does nothing, so it is called until all objects are freed.
DEL = """
import gc, threading, time
from pywebsock import BroadcastServer

collected = []

class Thing:
    def __init__(self):
        self.itself = self
    def __del__(self):
        collected.append(None)
        server.broadcast("collected")
        server.clients
        server.status()

def wait_for_messages(things):
    end = time.monotonic() + 60
    while server.status()["messages"] < 20_000 + things and time.monotonic() < end:
        if len(collected) < things:
            gc.collect()
        time.sleep(0.005)

with BroadcastServer(("127.0.0.1", 0)) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    if hasattr(gc, "set_threshold"):  # not in PyPy
        gc.set_threshold(10, 5, 5)
    for _ in range(20_000):
        Thing()
        server.broadcast("on purpose")
        server.clients
    if hasattr(gc, "set_threshold"):
        gc.set_threshold(700, 10, 10)
    wait_for_messages(things=20_000)
    with server._room.lock, server._queue._lock, server._hooks.lock:  # wherever a lock is held
        Thing()
        gc.collect()
    wait_for_messages(things=20_001)
    print(server.status()["messages"], len(collected))
    server.shutdown()
    thread.join()
"""


class UnexpectedBroadcasts(ServerTestCase):
    """broadcast() in unexpected places."""

    def test_log_handler(self) -> None:
        """A log handler broadcasts the log, including the server's own lines about clients and errors in hooks."""

        class Broken(Recorder):
            """A server whose hook raises an exception."""

            def on_message(self, client: WebSocketHandler, message: Message) -> None:
                raise LookupError("in on_message")

        server = self.serve(Broken)
        handler = Log(server)
        log = logging.getLogger("pywebsock")
        self.addCleanup(log.setLevel, log.level)
        self.addCleanup(log.removeHandler, handler)
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        witness = self.connect(server)
        with self.connect(server) as client:
            client.send("x")
            self.assertEqual(client.read_frame().opcode, 1)  # a client has joined
            exchange(server.server_address[1], b"nonsense\r\n\r\n")
        heard = str(witness.read())
        while not all(word in heard for word in ("joined", "LookupError", "left: 1011", "refused: 400")):
            heard += str(witness.read())

    def test_log_handler_of_an_operation(self) -> None:
        """Errors in the loop are logged in another thread, so a handler that broadcasts does not wait for the loop."""
        server = self.serve()
        client = self.connect(server)
        handler = Log(server)
        logging.getLogger("pywebsock").addHandler(handler)
        self.addCleanup(logging.getLogger("pywebsock").removeHandler, handler)
        server._queue.put(lambda: 1 // 0)
        self.assertIn("ZeroDivisionError", str(client.read()))

    def test_del(self) -> None:
        """Objects whose __del__ broadcasts; in another process, which can be killed if it hangs."""
        command = [sys.executable, "-c", DEL]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=130, check=False)
        self.assertEqual((ended.stdout, ended.stderr), ("40001 20001\n", ""))

    def test_within_a_lock(self) -> None:
        """A __del__ may run where a thread has a lock that the loop needs: then broadcast() does not wait for space."""
        server = self.serve(BroadcastServer)
        eventually(lambda: server._queue.loop_thread)
        locks = server._room.lock, server._hooks.lock, server._budget.lock
        with unittest.mock.patch.object(pywebsock.Queue, "is_full", True):
            for lock in locks:
                self.assertFalse(server._wait_for_space(0.01))
                with lock:
                    self.assertTrue(server._wait_for_space(0.01))


if __name__ == "__main__":
    unittest.main()

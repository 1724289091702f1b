"""The closing handshake, started by a client or by the server (RFC 6455 5.5.1, 7), and the end of the server."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    CLOSE,
    DEADLINE,
    DEFLATE,
    PING,
    TEXT,
    Client,
    Frame,
    Recorder,
    ServerTestCase,
    eventually,
    in_thread,
    masked_frame,
    request,
)


class ClosingHandshake(ServerTestCase):
    """RFC 6455 5.5.1, 7."""

    CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)

    def test_started_by_the_client(self) -> None:
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

    def test_a_log_that_blocks(self) -> None:
        """Log lines may wait (for a pager, say), but no client waits for its Close."""
        server, go_on = self.serve(), threading.Event()

        class Stuck(logging.Handler):
            """A log handler that blocks in its first line."""

            def emit(self, record: logging.LogRecord) -> None:
                go_on.wait(3 * DEADLINE)

        clients = [self.connect(server) for _ in range(3)]
        handler = Stuck()
        level = pywebsock.log.level
        pywebsock.log.addHandler(handler)
        pywebsock.log.setLevel(logging.INFO)
        try:
            for client in clients:
                client.close(1000)
                self.assertEqual(client.read_close()[0], 1000)
        finally:
            go_on.set()
            pywebsock.log.removeHandler(handler)
            pywebsock.log.setLevel(level)

    def test_nothing_after_the_clients_close(self) -> None:
        server = self.serve()
        client, other = self.connect(server), self.connect(server)
        client.send_raw(masked_frame(CLOSE, b"\x03\xe8") + masked_frame(TEXT, b"late") + masked_frame(PING))
        self.assertEqual(client.read_close(), (1000, ""))
        other.send("next")
        self.assertEqual(other.read(), "next")

    def test_nothing_after_the_servers_close(self) -> None:
        """The server sends nothing after its Close (5.5.1), and does not broadcast later messages of the client."""
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
        """If the client does not answer, the server waits for the close timeout."""
        server = self.serve(close_timeout=0.1)
        client = self.connect(server)
        (handler,) = server.clients
        handler.close(4000, "go")
        self.assertEqual(client.read_frame().opcode, CLOSE)
        self.assertEqual(client.read_all(), b"")
        eventually(lambda: [heard[:2] for heard in server.heard] == [("open", "/"), ("close", 1006)])

    def test_client_that_does_not_end_the_connection(self) -> None:
        """If the client keeps its side open after the Close, the server waits for the close timeout."""
        server = self.serve(close_timeout=0.1)
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

    def closing(self, size: int, close_timeout: float) -> tuple[Recorder, Client]:
        """Return a server, and a client that it closes before a message of this size is sent."""
        server = self.serve(close_timeout=close_timeout)
        faults.small_buffers(server)
        client = self.connect(server, small=True)
        server.broadcast("x" * size)
        (handler,) = server.clients
        handler.close(4000)
        return server, client

    def test_a_slow_line(self) -> None:
        """The timeout ends a client without progress; a slow client gets all earlier data, and the Close."""
        _, client = self.closing(150_000, close_timeout=0.3)
        for _ in range(30):
            client.read_some(4096)
            time.sleep(0.03)  # three times the timeout in all
        self.assertEqual(client.read(), "x" * 150_000)
        client.close(4000)
        self.assertEqual(client.read_close(), (4000, ""))

    def test_a_stuck_line(self) -> None:
        server, client = self.closing(1_000_000, close_timeout=0.1)
        eventually(lambda: server.status()["connections"] == 0)
        self.assertLess(len(client.read_all()), 1_000_000)  # the connection was reset

    def test_data_in_the_kernel(self) -> None:
        """The server does not wait for data that the kernel has accepted; the kernel goes on sending."""
        server = self.serve(close_timeout=0.2)
        client = self.connect(server, handshake=False, small=True)
        client.send_raw(request(Upgrade=None, Sec_WebSocket_Key=None))
        eventually(lambda: server.status()["connections"] == 0)
        head, body = client.read_head().decode(), client.read_all()
        self.assertIn(f"Content-Length: {len(body)}\r\n", head)

    def test_no_close_frame(self) -> None:
        """Without a Close frame, the code is 1006 (7.1.5)."""
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

    def test_messages_of_a_client_that_does_not_read(self) -> None:
        """A client sends many messages and a Close, and leaves: they arrive, although nothing can be sent to it."""
        number = 3000
        server = self.serve()
        client = self.connect(server)
        client.send_raw(masked_frame(TEXT, b"Hello") * number + masked_frame(CLOSE, b"\x03\xe8"))
        client.socket.close()
        server.wait_for("close", 1000, "")
        self.assertEqual(server.heard.count(("message", "Hello")), number)

    def test_messages_before_the_close_are_delivered(self) -> None:
        server = self.serve()
        client, other = self.connect(server), self.connect(server)
        client.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(100)) + masked_frame(CLOSE))
        self.assertEqual([other.read() for _ in range(100)], [str(i) for i in range(100)])
        self.assertEqual([client.read() for _ in range(100)], [str(i) for i in range(100)])
        self.assertEqual(client.read_close(), (1005, ""))


class Held(Recorder):
    """A server whose hook waits for the test before it broadcasts a message."""

    def __init__(self, *arguments: typing.Any, **settings: typing.Any) -> None:
        self.here, self.go_on = threading.Event(), threading.Event()
        super().__init__(*arguments, **settings)

    def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
        self.here.set()
        self.go_on.wait(2 * DEADLINE)
        super().on_message(client, message)


class BusyHooks(ServerTestCase):
    """A Close that comes while a hook of its client runs."""

    def test_started_by_the_client(self) -> None:
        """The answer comes after the messages of the hooks; data after the Close is ignored meanwhile."""
        server = self.serve(Held)
        self.addCleanup(server.go_on.set)
        client, other = self.connect(server), self.connect(server)
        client.send_raw(masked_frame(TEXT, b"Hello") + masked_frame(CLOSE, b"\x03\xe8"))
        self.assertTrue(server.here.wait(DEADLINE))
        client.send("late")
        for _ in range(2):  # the loop has read both clients
            other.frame(PING)
            other.read_frame()
        server.go_on.set()
        self.assertEqual(client.read(), "Hello")
        self.assertEqual(client.read_close(), (1000, ""))
        server.wait_for("close", 1000, "")
        self.assertNotIn(("message", "late"), server.heard)

    def test_begun_by_the_server(self) -> None:
        """The server reads the client's Close even if it did not read the client before, because of its hook."""
        server = self.serve(Held, close_timeout=3 * DEADLINE)
        self.addCleanup(server.go_on.set)
        client = self.connect(server)
        client.send_raw(masked_frame(TEXT, b"x" * 1000) * 100)
        eventually(lambda: [each for each in server._room.connections if each.paused])
        (handler,) = server.clients
        handler.close(4000)
        self.assertEqual(client.read_frame().opcode, CLOSE)
        client.close(4000)
        self.assertEqual(client.read_all(), b"")
        server.go_on.set()
        server.wait_for("close", 4000, "")


class ServerClose(ServerTestCase):
    """server_close() sends the queued messages, then 1001 to all clients, and waits up to the close timeout."""

    def test_queued_messages_then_1001(self) -> None:
        server = self.serve()
        clients = [self.connect(server), self.connect(server, Sec_WebSocket_Extensions=DEFLATE)]
        for i in range(200):
            server.broadcast(str(i) * 1000)
        with in_thread(server.server_close):
            for client in clients:
                self.assertEqual([client.read() for _ in range(200)], [str(i) * 1000 for i in range(200)])
                self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
                client.close(1001)
                self.assertEqual(client.read_all(), b"")
                client.socket.close()
        server.wait_for("close", 1001, "")

    def test_messages_after_1001(self) -> None:
        """Messages that come after the 1001 reach no hook."""
        server = self.serve()
        client = self.connect(server)
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame().payload, b"\x03\xe9")
            client.send("late")
            client.close(1001)
            self.assertEqual(client.read_all(), b"")
            client.socket.close()
        server.wait_for("close", 1001, "")
        self.assertNotIn(("message", "late"), server.heard)

    def test_a_slow_client_gets_all_before(self) -> None:
        server = self.serve()
        faults.small_buffers(server)
        slow = self.connect(server, small=True)
        for _ in range(50):
            server.broadcast(bytes(10_000))
        with in_thread(server.server_close):
            self.assertEqual([slow.read() for _ in range(50)], [bytes(10_000)] * 50)
            self.assertEqual(slow.read_frame().payload, b"\x03\xe9")
            slow.close(1001)
            slow.socket.close()

    def test_join_during_the_end(self) -> None:
        """A client whose handshake ends after the 1001 of the others gets a 1001, too."""
        server = self.serve()
        early, late = self.connect(server), self.connect(server, handshake=False)
        here, go_on = threading.Event(), threading.Event()

        def hold(*_: object) -> None:
            here.set()
            go_on.wait(DEADLINE)

        with unittest.mock.patch.object(pywebsock, "check_origin", hold):
            late.send_raw(request())
            self.assertTrue(here.wait(DEADLINE))
            server.shutdown()
            with in_thread(server.server_close):
                self.assertEqual(early.read_frame().payload, b"\x03\xe9")
                go_on.set()
                self.assertTrue(late.read_head().startswith(b"HTTP/1.1 101"))
                self.assertEqual(late.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
                early.socket.close()
                late.socket.close()

    def test_silent_clients_and_connections(self) -> None:
        server = self.serve(close_timeout=0.1)
        mute = self.connect(server)
        nothing, half = self.connect(server, handshake=False), self.connect(server, handshake=False)
        half.send_raw(request()[:-2])
        start = time.monotonic()
        server.shutdown()
        server.server_close()
        self.assertLess(time.monotonic() - start, 5)
        self.assertEqual(mute.read_close(), (1001, ""))
        self.assertEqual((nothing.read_all(), half.read_all()), (b"", b""))
        with self.assertRaises(ConnectionRefusedError):
            self.connect(server)

    def test_stuck_clients_do_not_keep_it_open(self) -> None:
        server = self.serve(close_timeout=0.1)
        faults.small_buffers(server)
        for _ in range(5):
            self.connect(server, small=True)
        for _ in range(20):
            server.broadcast(bytes(10_000))
        start = time.monotonic()
        server.shutdown()
        server.server_close()
        self.assertLess(time.monotonic() - start, 5)

    def test_threads_end(self) -> None:
        before = set(threading.enumerate())
        server = self.serve()
        self.connect(server).socket.close()
        server.shutdown()
        server.server_close()
        eventually(lambda: set(threading.enumerate()) <= before)

    def test_calls_afterwards_do_no_harm(self) -> None:
        server = self.serve()
        client = self.connect(server)
        (handler,) = server.clients
        client.socket.close()
        server.shutdown()
        server.server_close()
        handler.send("too late")
        handler.close()
        server.broadcast("too late")
        server.server_close()

    def test_shutdown_by_a_client(self) -> None:
        """A hook, which does not run in the thread of serve_forever, may call shutdown."""

        class Server(Recorder):
            """A server that stops at the first message."""

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                self.broadcast(message)
                self.shutdown()
                self._tell("stopped")

        server = self.serve(Server)
        client = self.connect(server)
        client.send("stop")
        self.assertEqual(client.read(), "stop")
        server.wait_for("stopped")

    def test_a_port_in_use(self) -> None:
        """The constructor raises OSError, and leaves no thread or socket behind."""
        server = self.serve()
        eventually(lambda: server._loop._thread)  # the thread of the other server is not new
        before = set(threading.enumerate())
        with self.assertRaises(OSError):
            pywebsock.BroadcastServer(("127.0.0.1", server.server_address[1]))
        self.assertEqual(set(threading.enumerate()) - before, set())

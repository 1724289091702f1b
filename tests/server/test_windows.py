"""Without features that Windows lacks: poll(), partial sends, shutdown() that wakes readers, SIGTERM."""

from __future__ import annotations

import contextlib
import errno
import json
import selectors
import signal
import socket
import socketserver
import subprocess
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    CLOSE,
    DEFLATE,
    IS_WINDOWS,
    PING,
    PONG,
    Client,
    Frame,
    Process,
    Recorder,
    ServerTestCase,
    eventually,
    exchange,
    in_thread,
    request,
)

SELECT = """if 1:
    import selectors
    class Selector(selectors.SelectSelector):
        def select(self, timeout=None):
            if len(self.get_map()) > 512:
                raise ValueError("too many file descriptors in select()")
            return super().select(timeout)
    selectors.DefaultSelector = Selector
"""


class DeafSocket(socket.socket):
    """A socket as on Windows: shutdown() wakes no thread that reads it, and later reads fail."""

    _is_deaf = False

    def shutdown(self, how: int) -> None:
        """End one direction, or both."""
        if how != socket.SHUT_WR:
            self._is_deaf = True
        if how != socket.SHUT_RD:
            super().shutdown(socket.SHUT_WR)

    def recv(self, *arguments: typing.Any) -> bytes:
        """Read as on Windows."""
        if self._is_deaf:
            raise OSError(errno.ESHUTDOWN, "cannot receive after a shutdown")
        return super().recv(*arguments)


def accept(server: socketserver.TCPServer) -> tuple[socket.socket, typing.Any]:
    """Replace TCPServer.get_request()."""
    request, address = server.socket.accept()
    return DeafSocket(fileno=request.detach()), address


class Windows(ServerTestCase):
    """Only select(), sends in slices, and sockets whose shutdown() wakes no reader."""

    def setUp(self) -> None:
        for where, name, value in (
            (pywebsock, "IS_WINDOWS", True),
            (selectors, "DefaultSelector", selectors.SelectSelector),
            (socketserver.TCPServer, "get_request", accept),
        ):
            patch = unittest.mock.patch.object(where, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def test_exchange(self) -> None:
        server = self.serve()
        a, b = self.connect(server), self.connect(server, Sec_WebSocket_Extensions=DEFLATE)
        for message in ("Hello", b"\xff", "x" * 70_000, ""):
            for sender in (a, b):
                sender.send(message)
                self.assertEqual([a.read(), b.read()], [message] * 2)
        a.frame(PING, b"?")
        self.assertEqual(a.read_frame(), Frame(True, False, PONG, b"?"))
        a.close(4000)
        self.assertEqual(a.read_close(), (4000, ""))
        b.send_raw(b"\x81\x00")
        self.assertEqual(b.read_close()[0], 1002)

    def test_slow_client(self) -> None:
        server = self.serve()
        slow, messages = self.fall_behind(server)
        self.assertEqual([slow.read() for _ in messages], messages)

    def fall_behind(self, server: Recorder) -> tuple[Client, list[bytes]]:
        """Return a client that does not read, and the number of messages that another client has sent and got."""
        faults.small_buffers(server)
        quick, slow = self.connect(server), self.connect(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(50)]
        for message in messages:
            quick.send(message)
            self.assertEqual(quick.read(), message)
        return slow, messages

    def test_stuck_client(self) -> None:
        server = self.serve(max_backlog=100_000)
        faults.small_buffers(server)
        quick = self.connect(server)
        self.connect(server, small=True)
        for _ in range(40):
            quick.send(bytes(10_000))
            self.assertEqual(quick.read(), bytes(10_000))
        eventually(lambda: [told[:2] for told in server.heard if told[0] == "close"] == [("close", 1006)])
        eventually(lambda: len(server._room.connections) == 1)
        self.assertEqual(len(server.clients), 1)

    def test_stuck_client_that_closes(self) -> None:
        """A stuck client that half-closes the connection still gets its queued messages."""
        server = self.serve()
        slow, messages = self.fall_behind(server)
        slow.socket.shutdown(socket.SHUT_WR)
        self.assertEqual([slow.read() for _ in messages], messages)
        self.assertEqual(slow.read_all(), b"")
        eventually(lambda: len(server._room.connections) == 1)

    def test_silent_client(self) -> None:
        server = self.serve(ping_interval=0.1, ping_timeout=0.1)
        client = self.connect(server)
        self.assertEqual(client.read_frame().opcode, PING)
        eventually(lambda: server.heard[-1][:2] == ("close", 1006))
        eventually(lambda: not server._room.size)
        with contextlib.suppress(ConnectionError):
            self.assertEqual(client.read_all(), b"")

    def test_slow_request(self) -> None:
        server = self.serve(handshake_timeout=0.3, close_timeout=0.1)
        client = self.connect(server, handshake=False)
        client.send_raw(request()[:-2])
        self.assertTrue(client.read_all().startswith(b"HTTP/1.1 408 "))
        eventually(lambda: not server._room.size)

    def test_too_many_connections(self) -> None:
        """The oldest pending connection is ended, although its socket wakes no thread."""
        server = self.serve(handshake_timeout=60)
        server._most_connections = 3
        self.connect(server)
        waiting = [self.connect(server, handshake=False) for _ in range(2)]
        eventually(lambda: server._room.size == 3)
        for each in server._room.pending:
            server._room.pending[each] -= 1.1  # seconds: they are older than the time to send a request
        self.connect(server).send("Hello")
        with contextlib.suppress(ConnectionError):
            self.assertEqual(waiting[0].read_all(), b"")

    def test_server_close_without_answers(self) -> None:
        """The end of the server, with a client that does not answer, and a silent connection."""
        server = self.serve(close_timeout=0.2)
        client, waiting = self.connect(server), self.connect(server, handshake=False)
        eventually(lambda: server._room.size == 2)
        start = time.monotonic()
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            self.assertEqual(waiting.read_all(), b"")
        self.assertLess(time.monotonic() - start, 3)
        self.assertEqual(server._room.size, 0)
        self.assertEqual(server.heard[-1][:2], ("close", 1006))

    def test_closed_while_it_accepts(self) -> None:
        """Windows cannot wait for a closed socket: serve_forever() returns."""
        server = pywebsock.BroadcastServer(("127.0.0.1", 0))

        class Selector(selectors.SelectSelector):
            """A selector as on Windows, when another thread closes the socket."""

            def select(self, timeout: float | None = None) -> typing.NoReturn:
                """Raise OSError."""
                server.socket.close()
                raise OSError(errno.ENOTSOCK, "not a socket")

        with unittest.mock.patch.object(socketserver, "_ServerSelector", Selector):
            server.serve_forever(0.01)
        server.server_close()

    def test_the_end(self) -> None:
        server = self.serve()
        client = self.connect(server)
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            client.close(1001)
            self.assertEqual(client.read_all(), b"")
            client.socket.close()


class Port(ServerTestCase):
    """No other program can bind the port of a server."""

    def test_not_shared(self) -> None:
        """Windows would let a program with SO_REUSEADDR bind it."""
        server = self.serve()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with self.assertRaises(OSError):
                other.bind(server.server_address)

    def test_exclusive_use(self) -> None:
        """The option is set before the address is bound (the test uses another option on other systems)."""
        option = pywebsock.EXCLUSIVE_USE or socket.SO_KEEPALIVE

        def bind(server: socketserver.TCPServer) -> None:
            """Replace TCPServer.server_bind()."""
            self.assertTrue(server.socket.getsockopt(socket.SOL_SOCKET, option))
            raise OSError(errno.EADDRINUSE, "bound by another")

        in_place = unittest.mock.patch.object
        with in_place(pywebsock, "EXCLUSIVE_USE", option), in_place(socketserver.TCPServer, "server_bind", bind):
            self.assertRaisesRegex(OSError, "bound by another", pywebsock.BroadcastServer, ("127.0.0.1", 0))


class Crowd(ServerTestCase):
    """As many clients as select() accepts on Windows."""

    process: Process
    clients: list[Client]

    @classmethod
    def setUpClass(cls) -> None:
        pywebsock.raise_file_limit()
        cls.process, cls.clients = Process(python=() if IS_WINDOWS else faults.changed(SELECT)), []
        cls.addClassCleanup(cls.process.stop)
        cls.addClassCleanup(cls.close_all)

    @classmethod
    def close_all(cls) -> None:
        """Close all clients, without their Close frames."""
        for client in cls.clients:
            client.socket.close()

    def setUp(self) -> None:
        """Connect as many clients as the server takes."""
        eventually(lambda: self.connections() == len(self.clients) + 1)
        while len(self.clients) < pywebsock.MOST_SELECTED:
            self.clients.append(Client(self.process.port))

    def connections(self) -> int:
        """Return the number of connections, with the one that asks for it."""
        body = exchange(self.process.port, request(target="/status", Upgrade=None, Sec_WebSocket_Key=None))[2]
        return int(json.loads(body)["connections"])

    def leave(self) -> None:
        """Let a client leave."""
        with self.clients.pop(0) as client:
            client.close()
            self.assertEqual(client.read_close(), (1000, ""))

    def test_503(self) -> None:
        """The next client gets a 503 with the reason, and a place when another client has left."""
        status, _, body = exchange(self.process.port, request())
        self.assertEqual(status, 503)
        self.assertIn(b"there are 500 clients already, the most that this system allows (select)", body)
        self.check_all_hear()
        self.leave()
        eventually(lambda: b" 101 " in self.shake_hands())

    def test_refused(self) -> None:
        """A connection that got the 503, and stays, takes nobody's place."""
        with Client(self.process.port, handshake=False) as refused:
            refused.send_raw(request())
            self.assertIn(b" 503 ", refused.read_head())
            self.leave()
            eventually(lambda: b" 101 " in self.shake_hands(), deadline=3)

    def test_those_who_ask_for_nothing(self) -> None:
        """Connections that are no clients take room in select(), too; above a number, the oldest goes."""
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(Client(self.process.port, handshake=False)) for _ in range(20)]
            with contextlib.suppress(ConnectionError):
                self.assertEqual(silent[0].read_all(), b"")
            self.check_all_hear()

    def check_all_hear(self) -> None:
        """The room is alive."""
        self.clients[0].send("Hello")
        self.assertEqual([client.read() for client in self.clients], ["Hello"] * len(self.clients))

    def shake_hands(self) -> bytes:
        """Return the response to one more client."""
        with Client(self.process.port, handshake=False) as client:
            client.send_raw(request())
            return client.read_head()


# A process sends itself the signal when its standard input ends: Wine cannot send it to another process.
RAISE = """if 1:
    import signal, sys, threading
    def wait():
        sys.stdin.read()
        signal.raise_signal({number})
    threading.Thread(target=wait, daemon=True).start()
"""


class Break(ServerTestCase):
    """Ctrl-Break on Windows, and SIGTERM elsewhere: all clients get 1001."""

    def test_break(self) -> None:
        number = int(getattr(signal, "SIGBREAK", signal.SIGTERM))
        python = faults.changed(RAISE.format(number=number))
        with Process(python=python, stdin=subprocess.PIPE) as process, Client(process.port) as client:
            assert process.stdin
            process.stdin.close()
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            client.close(1001)
            client.socket.close()
            self.assertEqual(process.wait(), 0)
        self.assertIn("stopping", process.log())
        self.assertNotIn("Traceback", process.log())

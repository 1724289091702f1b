"""Limits: messages a second of one client, and clients at once."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    CLOSE,
    DEADLINE,
    TEXT,
    Blocking,
    Client,
    ServerTestCase,
    eventually,
    exchange,
    in_thread,
    masked_frame,
    request,
)


class Rate(ServerTestCase):
    """A client that sends too fast is slowed down."""

    def test_waits_and_loses_nothing(self) -> None:
        server = self.serve(rate=160)
        sender, other = self.connect(server), self.connect(server)
        start = time.monotonic()
        sender.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(200)))
        other.send("not held up")
        messages = [sender.read() for _ in range(201)]
        self.assertGreater(time.monotonic() - start, 0.2)  # a burst of one second is allowed
        self.assertLess(messages.index("not held up"), 199)
        messages.remove("not held up")
        self.assertEqual(messages, [str(i) for i in range(200)])

    def test_enough(self) -> None:
        """A client below the rate is not slowed down."""
        client = self.connect(self.serve(rate=1000))
        start = time.monotonic()
        for i in range(20):
            client.send(str(i))
            self.assertEqual(client.read(), str(i))
        self.assertLess(time.monotonic() - start, 5)

    def test_while_a_hook_blocks(self) -> None:
        """The rate lets one message after another go on, but no more than MAX_SUBMITTED wait for a hook."""
        server = self.serve(Blocking, rate=30)
        client = self.connect(server)
        client.send_raw(masked_frame(TEXT) * 31)  # a burst of one second, and one that waits
        large = masked_frame(TEXT, bytes(pywebsock.MAX_SUBMITTED // 3))
        with in_thread(client.send_raw, large * 20):
            (connection,) = server._room.connections
            eventually(lambda: connection.submitted > pywebsock.MAX_SUBMITTED, deadline=DEADLINE / 5)
            self.assertTrue(connection.paused)
            server.go_on.set()
        eventually(lambda: not server._hooks.busy)

    def test_a_long_message(self) -> None:
        """A long message that must wait is not read: it counts for the budget, and TCP slows its sender down."""
        server = self.serve(rate=0.1)
        client = self.connect(server)
        client.send_raw(masked_frame(TEXT) + masked_frame(TEXT, bytes(pywebsock.READ_SIZE)))
        (connection,) = server._room.connections
        eventually(lambda: connection.paused)
        self.assertGreater(connection.reader.size, 0)
        self.assertEqual(connection.client._is_closing, False)


def visit(port: int, data: bytes = b"") -> bool:
    """Open a WebSocket, send a message, and leave; return whether the server accepted the client."""
    with Client(port, handshake=False) as client:
        client.send_raw(request() + data)
        return client.read_head().startswith(b"HTTP/1.1 101 ")


class Waiting(ServerTestCase):
    """Connections are accepted as fast as they are served, so that those that are here do not wait for the others."""

    def test_many_wait_to_be_served(self) -> None:
        server = self.serve()
        waiting = [pywebsock.RequestHandler.__new__(pywebsock.RequestHandler) for _ in range(51)]
        server._room.waiting.update(waiting)
        start = time.monotonic()
        self.connect(server)
        self.assertGreater(time.monotonic() - start, 0.3)
        with server._room.lock:
            server._room.waiting.difference_update(waiting)
        self.connect(server).send("Hello")

    def test_another_process_is_faster(self) -> None:
        """After a fork, several processes accept from one socket; those that find no connection do not wait for one."""
        server = self.serve()
        refused = threading.Event()

        def accept() -> None:
            with contextlib.suppress(OSError):
                server.get_request()
            refused.set()

        with in_thread(accept):
            self.assertTrue(refused.wait(DEADLINE))

    def test_everybody_has_arrived(self) -> None:
        """No handler waits after its connection has ended."""
        server = self.serve(handshake_timeout=0.3)
        for data in (request(), request(Upgrade=None, Sec_WebSocket_Key=None), request()[:9], b"garbage\r\n\r\n", b""):
            for how in (socket.SHUT_WR, socket.SHUT_RDWR):
                client = self.connect(server, handshake=False)
                client.send_raw(data)
                client.socket.shutdown(how)
        eventually(lambda: not server._room.size)
        self.assertFalse(server._room.waiting)


class MaxClients(ServerTestCase):
    """The number of clients is limited; a place is free again when its client has left."""

    def test_full_and_free_again(self) -> None:
        server = self.serve(max_clients=2)
        port = server.server_address[1]
        first = self.connect(server)
        self.connect(server)
        for _ in range(3):
            self.assertEqual(exchange(port, request())[0], 503)
        self.assertEqual(exchange(port, request(Upgrade=None, Sec_WebSocket_Key=None))[0], 200)
        first.socket.close()
        eventually(lambda: visit(port))

    def test_every_way_to_leave_frees_the_seat(self) -> None:
        port = self.serve(max_clients=1).server_address[1]
        half = masked_frame(TEXT, b"Hello")[:-1]
        for data in (b"", masked_frame(CLOSE), b"\x81\x00", masked_frame(TEXT, b"\xff"), half):
            for _ in range(2):
                with self.subTest(data=data):
                    eventually(functools.partial(visit, port, data))

    def test_slow_readers_of_a_response(self) -> None:
        """No more connections fit: the oldest of them that is no client goes."""
        server = self.serve(close_timeout=3600.0)
        server._most_connections = 3
        faults.small_buffers(server)
        client = self.connect(server)
        slow = [self.connect(server, handshake=False, small=True) for _ in range(2)]
        for each in slow:
            each.send_raw(request(Upgrade=None, Sec_WebSocket_Key=None))
            each.read_some(1)
        eventually(lambda: len(server._room.answered) == 2)
        for response in server._room.answered:
            server._room.answered[response] -= 1.1  # seconds: they have had the time to read
        other = self.connect(server)
        other.send("Hello")
        self.assertEqual((client.read(), other.read()), ("Hello", "Hello"))
        self.assertFalse(slow[0].read_all().endswith(b"</html>\n"))
        self.assertTrue(slow[1].read_all().endswith(b"</html>\n"))

    def test_refused_handshakes_take_no_seat(self) -> None:
        server = self.serve(max_clients=1)
        for _ in range(3):
            self.assertEqual(exchange(server.server_address[1], request(Origin="http://example.com"))[0], 403)
            self.assertEqual(exchange(server.server_address[1], request(Sec_WebSocket_Key="?"))[0], 400)
        self.connect(server)

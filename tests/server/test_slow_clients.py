"""A client that reads slowly, or not at all."""

from __future__ import annotations

import contextlib
import socket
import time

from tests.tools import faults
from tests.tools.support import (
    CLOSE,
    PING,
    PONG,
    Client,
    ServerTestCase,
    eventually,
)


def read_to_the_end(client: Client) -> list[str | bytes]:
    """Read all messages up to the end of the connection, which may be a reset."""
    messages: list[str | bytes] = []
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            messages.append(client.read())
    return messages


class SlowClients(ServerTestCase):
    """A client that stops reading delays no other."""

    def test_gets_everything_later(self) -> None:
        server = self.serve()
        faults.small_buffers(server)
        quick, slow = self.connect(server), self.connect(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(100)]
        for message in messages:
            server.broadcast(message)
            self.assertEqual(quick.read(), message)
        self.assertEqual([slow.read() for _ in messages], messages)
        server.broadcast("next")  # the client is quick again
        self.assertEqual([quick.read(), slow.read()], ["next"] * 2)

    def test_dropped_alone_beyond_the_backlog(self) -> None:
        server = self.serve(max_backlog=100_000)
        faults.small_buffers(server)
        quick, stuck = self.connect(server), self.connect(server, small=True)
        quick.frame(PING)  # both are in the room
        self.assertEqual(quick.read_frame().opcode, PONG)
        for i in range(40):
            server.broadcast(b"%5d" % i * 2000)
            self.assertEqual(quick.read(), b"%5d" % i * 2000)
        eventually(lambda: len(server.clients) == 1)
        self.assertLess(len(read_to_the_end(stuck)), 40)
        eventually(lambda: [heard[:2] for heard in server.heard if heard[0] == "close"] == [("close", 1006)])
        quick.send("all is well")
        self.assertEqual(quick.read(), "all is well")

    def test_dropped_when_nothing_moves(self) -> None:
        server = self.serve(send_timeout=0.3, ping_interval=0)
        faults.small_buffers(server)
        quick, stuck = self.connect(server), self.connect(server, small=True)
        for _ in range(10):
            server.broadcast(bytes(10_000))
        self.assertEqual([quick.read() for _ in range(10)], [bytes(10_000)] * 10)
        eventually(lambda: len(server.clients) == 1)
        self.assertLess(len(read_to_the_end(stuck)), 10)

    def test_not_dropped_while_it_moves(self) -> None:
        """Send timeout and keepalive drop a stuck client, but not a slow one that makes progress."""
        server = self.serve(send_timeout=0.4, ping_interval=0.2, ping_timeout=0.2)
        faults.small_buffers(server)
        slow, stuck = self.connect(server, small=True), self.connect(server, small=True)
        messages = [bytes([i]) * 10_000 for i in range(40)]
        for message in messages:
            server.broadcast(message)
        start = time.monotonic()
        received = 0
        while time.monotonic() < start + 1:  # longer than all timeouts together
            slow.read_some(2000)
            received += 2000
            time.sleep(0.02)
        self.assertLess(received, 200_000)  # the client was behind all the time
        eventually(lambda: len(server.clients) == 1)
        self.assertEqual([slow.read() for _ in messages], messages)
        self.assertLess(len(read_to_the_end(stuck)), len(messages))

    def test_a_stuck_client_delays_nobody(self) -> None:
        """With many stuck clients, the others still get each message at once, and in order."""
        server = self.serve()
        faults.small_buffers(server)
        for _ in range(10):
            self.connect(server, small=True)
        a, b = self.connect(server), self.connect(server)
        for i in range(100):
            a.send(str(i) * 1000)
            self.assertEqual([a.read(), b.read()], [str(i) * 1000] * 2)

    def test_close_comes_after_the_backlog(self) -> None:
        server = self.serve()
        faults.small_buffers(server)
        slow = self.connect(server, small=True)
        (handler,) = server.clients
        for _ in range(20):
            server.broadcast(bytes(10_000))
        handler.close(4000, "that was all")
        self.assertEqual([slow.read() for _ in range(20)], [bytes(10_000)] * 20)
        frame = slow.read_frame()
        self.assertEqual((frame.opcode, frame.payload[2:]), (CLOSE, b"that was all"))
        slow.close(4000)
        self.assertEqual(slow.read_all(), b"")

    def test_a_slow_client_closes(self) -> None:
        """Queued messages come before the answer to a Close, also if the client half-closes the connection (7.1.1)."""
        for half in (False, True):
            with self.subTest(half_closed=half):
                server = self.serve()
                faults.small_buffers(server)
                slow = self.connect(server, small=True)
                for _ in range(20):
                    server.broadcast(bytes(10_000))
                slow.close(4000)
                if half:
                    slow.socket.shutdown(socket.SHUT_WR)
                    time.sleep(0.1)  # the server may have seen that or not
                self.assertEqual([slow.read() for _ in range(20)], [bytes(10_000)] * 20)
                self.assertEqual(slow.read_close(), (4000, ""))
                slow.socket.close()
                eventually(lambda: server.status()["connections"] == 0)  # noqa: B023

    def test_old_bytes(self) -> None:
        """A closing client keeps queued data alive: at most as much as any other client."""
        server = self.serve(max_backlog=100_000, close_timeout=60.0, handshake_timeout=0.2)
        faults.small_buffers(server)
        slow = self.connect(server, small=True)
        server.broadcast(bytes(90_000))
        (handler,) = server.clients
        handler.close()
        reader = self.connect(server)
        server.broadcast(bytes(90_000))
        self.assertEqual(len(reader.read()), 90_000)
        time.sleep(0.25)  # two checks of deadlines, without effect
        self.assertEqual(server.status()["connections"], 2)
        server.broadcast(bytes(90_000))
        self.assertEqual(len(reader.read()), 90_000)
        eventually(lambda: server.status()["connections"] == 1)
        self.assertLess(len(slow.read_all()), 90_000)

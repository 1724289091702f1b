"""The server: one order for all, slow clients, keepalive, the end, and everything that may go wrong around it."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import random
import selectors
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
import typing
import unittest
import unittest.mock
import zlib

import pywebsock

from .support import (
    DEADLINE,
    Client,
    Frame,
    Process,
    Recorder,
    ServerTestCase,
    eventually,
    exchange,
    masked_frame,
    request,
    require,
)

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
DEFLATE = "permessage-deflate"


@contextlib.contextmanager
def in_thread(call: typing.Callable[..., object], *arguments: object) -> typing.Iterator[threading.Thread]:
    """Another thread that calls something; it must have ended when the block is left, or soon after."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    yield thread
    thread.join(DEADLINE)
    assert not thread.is_alive(), f"{call} did not return"


def small_buffers(server: pywebsock.BroadcastServer) -> None:
    """Give all sockets that the server accepts from now on a small send buffer, so that it soon has to keep a backlog."""
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def read_to_the_end(client: Client) -> list[str | bytes]:
    """All messages that still come, however the connection ends."""
    messages: list[str | bytes] = []
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            messages.append(client.read())
    return messages


class OneOrder(ServerTestCase):
    """Every client sees the same messages in the same order."""

    SENDERS, MESSAGES = 4, 250

    def check(self, server: pywebsock.BroadcastServer, **how: typing.Any) -> None:
        """Several clients send at once, some threads of the program too; all clients must see one sequence."""
        clients = [self.connect(server, **how) for _ in range(self.SENDERS + 3)]
        with contextlib.ExitStack() as stack:
            for name, client in enumerate(clients[: self.SENDERS]):
                frames = [masked_frame(TEXT, b"%d %d" % (name, i)) for i in range(self.MESSAGES)]
                for start in range(0, self.MESSAGES, 50):  # a few segments each
                    stack.enter_context(in_thread(client.send_raw, b"".join(frames[start : start + 50]))).join()
            stack.enter_context(in_thread(self._broadcast, server))
        seen = [[client.read() for _ in range((self.SENDERS + 1) * self.MESSAGES)] for client in clients]
        for other in seen[1:]:
            self.assertEqual(other, seen[0])
        by_sender: dict[str, list[int]] = collections.defaultdict(list)
        for message in seen[0]:
            sender, number = str(message).split()
            by_sender[sender].append(int(number))
        self.assertEqual(len(by_sender), self.SENDERS + 1)
        for sender, numbers in by_sender.items():
            self.assertEqual(numbers, list(range(self.MESSAGES)), sender)

    def _broadcast(self, server: pywebsock.BroadcastServer) -> None:
        for i in range(self.MESSAGES):
            server.broadcast(f"program {i}")

    def test_one_order(self) -> None:
        self.check(self.serve())

    def test_one_order_where_all_are_slow(self) -> None:
        server = self.serve()
        small_buffers(server)
        self.check(server, small=True)

    def test_messages_to_one_client_are_in_the_order(self) -> None:
        server = self.serve()
        one = self.connect(server)
        (handler,) = server.clients
        other = self.connect(server)
        for i in range(50):
            server.broadcast(f"all {i}")
            handler.send(b"you %d" % i)
        server.broadcast("end")
        expected: list[str | bytes] = []
        for i in range(50):
            expected += [f"all {i}", b"you %d" % i]
        self.assertEqual([one.read() for _ in range(101)], [*expected, "end"])
        self.assertEqual([other.read() for _ in range(51)], [f"all {i}" for i in range(50)] + ["end"])


class Joining(ServerTestCase):
    """Trap 1: a client has every message after its 101, and none twice."""

    def test_everything_after_the_101(self) -> None:
        server = self.serve()
        for i in range(100):
            client = self.connect(server)
            server.broadcast(str(i))
            self.assertEqual(client.read(), str(i))

    def check_under_load(self, history: int, **how: typing.Any) -> None:
        """Clients that join while numbers are broadcast see all numbers from one on."""
        server = self.serve(history=history)
        begun = [0]
        enough = threading.Event()

        def count() -> None:
            while not enough.is_set():
                begun[0] += 1
                server.broadcast(str(begun[0]))

        clients: list[tuple[Client, int]] = []
        with in_thread(count):
            try:
                for _ in range(30):
                    client = self.connect(server, **how)
                    clients.append((client, begun[0]))
            finally:
                enough.set()
        for client, begun_at_101 in clients:
            first = int(client.read())
            self.assertLessEqual(first, begun_at_101 + 1)
            if first <= begun[0] - 100:
                following = [int(client.read()) for _ in range(100)]
                self.assertEqual(following, list(range(first + 1, first + 101)))

    def test_under_load(self) -> None:
        self.check_under_load(history=0)

    def test_under_load_with_history(self) -> None:
        self.check_under_load(history=20)

    def test_under_load_with_compression(self) -> None:
        self.check_under_load(history=20, Sec_WebSocket_Extensions=DEFLATE)

    def test_history(self) -> None:
        """The last messages, oldest first, then what follows."""
        server = self.serve(history=3)
        first = self.connect(server)
        for message in ("1", b"2", "3" * 5000, "4"):
            first.send(message)
            first.read()
        for how in ({}, {"Sec_WebSocket_Extensions": DEFLATE}):
            late = self.connect(server, **how)
            self.assertEqual([late.read() for _ in range(3)], [b"2", "3" * 5000, "4"])
        server.broadcast("5")
        self.assertEqual(late.read(), "5")

    def test_no_history(self) -> None:
        server = self.serve()
        server.broadcast("before")
        late = self.connect(server)
        server.broadcast("after")
        self.assertEqual(late.read(), "after")

    def test_messages_to_one_client_are_no_history(self) -> None:
        server = self.serve(history=9)
        self.connect(server)
        (handler,) = server.clients
        handler.send("secret")
        server.broadcast("news")
        self.assertEqual(self.connect(server).read(), "news")


class SlowClients(ServerTestCase):
    """One client that stops reading never holds up another."""

    def test_gets_everything_later(self) -> None:
        server = self.serve()
        small_buffers(server)
        quick, slow = self.connect(server), self.connect(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(100)]
        for message in messages:
            server.broadcast(message)
            self.assertEqual(quick.read(), message)
        self.assertEqual([slow.read() for _ in messages], messages)
        server.broadcast("next")  # and it is quick again
        self.assertEqual([quick.read(), slow.read()], ["next"] * 2)

    def test_dropped_alone_beyond_the_backlog(self) -> None:
        server = self.serve(max_backlog=100_000)
        small_buffers(server)
        quick, stuck = self.connect(server), self.connect(server, small=True)
        quick.frame(PING)  # see that both are there
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
        small_buffers(server)
        quick, stuck = self.connect(server), self.connect(server, small=True)
        for _ in range(10):
            server.broadcast(bytes(10_000))
        self.assertEqual([quick.read() for _ in range(10)], [bytes(10_000)] * 10)
        eventually(lambda: len(server.clients) == 1)
        self.assertLess(len(read_to_the_end(stuck)), 10)

    def test_not_dropped_while_it_moves(self) -> None:
        """Neither the send timeout nor keepalive ends a client that is slow but takes what it gets."""
        server = self.serve(send_timeout=1, ping_interval=0.5, ping_timeout=0.5)
        small_buffers(server)
        slow = self.connect(server, small=True)
        for _ in range(10):
            server.broadcast(bytes(10_000))
        received = 0
        end = time.monotonic() + 2.5  # longer than all timeouts
        while time.monotonic() < end:
            received += len(slow.socket.recv(2000))
            time.sleep(0.05)
        self.assertLess(received, 101_000)
        self.assertEqual(len(server.clients), 1)

    def test_a_stuck_client_delays_nobody(self) -> None:
        """With many stuck clients the others still get each message at once, and in the order."""
        server = self.serve()
        small_buffers(server)
        for _ in range(10):
            self.connect(server, small=True)
        a, b = self.connect(server), self.connect(server)
        for i in range(100):
            a.send(str(i) * 1000)
            self.assertEqual([a.read(), b.read()], [str(i) * 1000] * 2)

    def test_close_comes_after_the_backlog(self) -> None:
        server = self.serve()
        small_buffers(server)
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
        """What it has not read comes before the answer to its Close."""
        server = self.serve()
        small_buffers(server)
        slow = self.connect(server, small=True)
        for _ in range(20):
            server.broadcast(bytes(10_000))
        slow.close(4000)
        self.assertEqual([slow.read() for _ in range(20)], [bytes(10_000)] * 20)
        self.assertEqual(slow.read_close(), (4000, ""))


class HeldBack(ServerTestCase):
    """Senders wait where too much is queued; the memory stays bounded and nothing is lost."""

    class Server(Recorder):
        """Notes how much is queued whenever something comes."""

        peak = 0

        def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
            pywebsock.BroadcastServer.on_message(self, client, message)
            self.peak = max(self.peak, self._queued)

    def test_senders(self) -> None:
        server = self.serve(self.Server)
        senders = [self.connect(server) for _ in range(3)]
        message = bytes(40_000)
        flood = masked_frame(BINARY, message) * 250  # 10 MB each
        with contextlib.ExitStack() as stack:
            with server._turn:  # nothing is carried out meanwhile
                for sender in senders:
                    stack.enter_context(in_thread(sender.send_raw, flood))
                eventually(lambda: server._queued > pywebsock.QUEUE_SIZE)
            for sender in senders:
                stack.enter_context(in_thread(self.check_all, sender, message, 250 * 3))
        self.assertGreater(server.peak, pywebsock.QUEUE_SIZE)
        self.assertLess(server.peak, pywebsock.QUEUE_SIZE + 3 * (pywebsock.READ_SIZE + 2 * len(message)))
        eventually(lambda: server._queued == 0)

    def check_all(self, client: Client, message: bytes, count: int) -> None:
        """Read so many times this message."""
        size = (len(message) + 4) * count
        received = bytearray()
        while len(received) < size:
            received += client.socket.recv(1 << 20)
        frame = b"\x82\x7e" + struct.pack("!H", len(message)) + message
        self.assertEqual(received, frame * count)

    def test_broadcast(self) -> None:
        server = self.serve()
        client = self.connect(server)
        done: list[int] = []

        def broadcast() -> None:
            for i in range(200):
                server.broadcast(bytes(100_000))
                done.append(i)

        with contextlib.ExitStack() as stack:
            with server._turn:
                stack.enter_context(in_thread(broadcast))
                eventually(lambda: server._queued > pywebsock.QUEUE_SIZE)
                self.assertLess(len(done), 200)
            for _ in range(200):
                self.assertEqual(client.read(), bytes(100_000))
        self.assertEqual(done, list(range(200)))


class Keepalive(ServerTestCase):
    """RFC 6455 5.5.2: a Ping finds out who is still there."""

    def test_ping_and_pong(self) -> None:
        server = self.serve(ping_interval=0.05, ping_timeout=60)
        client = self.connect(server)
        for _ in range(5):
            frame = client.read_frame()
            self.assertEqual(frame.opcode, PING)
            client.frame(PONG, frame.payload)
        self.assertEqual(len(server.clients), 1)

    def test_dropped_after_more_silence(self) -> None:
        server = self.serve(ping_interval=0.1, ping_timeout=0.2)
        client = self.connect(server)
        self.assertEqual(client.read_frame().opcode, PING)
        self.assertEqual(client.read_all(), b"")
        eventually(lambda: [heard[:2] for heard in server.heard] == [("open", "/"), ("close", 1006)])
        self.assertEqual(len(server.clients), 0)

    def test_one_ping_is_enough(self) -> None:
        server = self.serve(ping_interval=0.1, ping_timeout=0.5)
        client = self.connect(server)
        self.assertEqual(client.read_all(), b"\x89\x00")

    def test_a_client_that_only_listens_is_pinged(self) -> None:
        """Trap 2: broadcasts that go out are no sign of life."""
        server = self.serve(ping_interval=0.2, ping_timeout=60)
        client = self.connect(server)
        enough = threading.Event()

        def chatter() -> None:
            while not enough.wait(0.01):
                server.broadcast("chatter")

        with in_thread(chatter):
            try:
                while client.read_frame().opcode != PING:
                    pass
            finally:
                enough.set()

    def test_a_stuck_client_is_removed(self) -> None:
        """Trap 3: no Ping can reach it, but its silence is heard."""
        server = self.serve(ping_interval=0.2, ping_timeout=0.2, send_timeout=3600)
        small_buffers(server)
        self.connect(server, small=True)
        for _ in range(10):
            server.broadcast(bytes(10_000))
        eventually(lambda: not server.clients)

    def test_none(self) -> None:
        client = self.connect(self.serve(ping_interval=0))
        client.socket.settimeout(0.3)
        with self.assertRaises(socket.timeout):
            client.read_frame()


class Rate(ServerTestCase):
    """A client that sends too fast is made to wait."""

    def test_waits_and_loses_nothing(self) -> None:
        server = self.serve(rate=40)
        sender, other = self.connect(server), self.connect(server)
        start = time.monotonic()
        sender.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(100)))
        other.send("not held up")
        self.assertEqual(sorted(str(other.read()) for _ in range(11))[-1], "not held up")
        self.assertEqual([sender.read() for _ in range(101)].count("not held up"), 1)
        self.assertGreater(time.monotonic() - start, 1.0)  # a second's worth may come at once
        sender.close()
        self.assertEqual(sender.read_close()[0], 1000)
        numbers = [int(message) for kind, message in server.heard_messages() if message != "not held up"]
        self.assertEqual(numbers, list(range(100)))

"""One order of messages for all clients, also for new ones, and while senders wait."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
import typing
import unittest.mock

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    BINARY,
    DEADLINE,
    DEFLATE,
    PING,
    PONG,
    TEXT,
    Client,
    Frame,
    ServerTestCase,
    eventually,
    in_thread,
    masked_frame,
)


class OneOrder(ServerTestCase):
    """All clients get the same messages in the same order."""

    SENDERS, MESSAGES = 4, 250

    def check(self, server: pywebsock.BroadcastServer, **how: typing.Any) -> None:
        """Let several clients and threads of the program send at once; all clients must get one sequence."""
        clients = [self.connect(server, **how) for _ in range(self.SENDERS + 3)]
        with contextlib.ExitStack() as stack:
            for name, client in enumerate(clients[: self.SENDERS]):
                frames = [masked_frame(TEXT, b"%d %d" % (name, i)) for i in range(self.MESSAGES)]
                for start in range(0, self.MESSAGES, 50):  # several TCP segments each
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
        faults.small_buffers(server)
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
    """A client gets each message after its 101, once."""

    def test_everything_after_the_101(self) -> None:
        server = self.serve()
        for i in range(100):
            client = self.connect(server)
            server.broadcast(str(i))
            self.assertEqual(client.read(), str(i))

    def check_under_load(self, history: int, **how: typing.Any) -> None:
        """Join clients while numbers are broadcast: each gets all numbers from its first one on."""
        server = self.serve(history=history)
        begun, last = [0], [1 << 60]

        def count() -> None:
            while begun[0] < last[0]:
                begun[0] += 1
                server.broadcast(str(begun[0]))

        clients: list[tuple[Client, int]] = []
        interval = sys.getswitchinterval()
        with in_thread(count):
            sys.setswitchinterval(0.0005)  # seconds; by default, each step of a handshake waits 5 ms for that thread
            try:
                for _ in range(15):
                    client = self.connect(server, **how)
                    clients.append((client, begun[0]))
            finally:
                last[0] = begun[0] + 150
                sys.setswitchinterval(interval)
        for client, begun_at_101 in clients:
            numbers = [int(client.read()) for _ in range(100)]
            self.assertLessEqual(numbers[0], begun_at_101 + 1)
            self.assertEqual(numbers, list(range(numbers[0], numbers[0] + 100)))

    def test_under_load(self) -> None:
        self.check_under_load(history=0)

    def test_under_load_with_history(self) -> None:
        self.check_under_load(history=20)

    def test_under_load_with_compression(self) -> None:
        self.check_under_load(history=20, Sec_WebSocket_Extensions=DEFLATE)

    def test_history(self) -> None:
        """A new client gets the last messages, oldest first, then the later ones."""
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

    def test_mark(self) -> None:
        """A page that has a mark in its query gets it after the history; hooks and other clients do not see it."""
        for history, query, target in ((2, "?mark=1f", "/"), (0, "?mark=1f", "/"), (2, "?a=b&mark=0", "/?a=b")):
            with self.subTest(history=history, query=query):
                server = self.serve(history=history)
                for message in ("1", "2", "3"):
                    server.broadcast(message)
                client = self.connect(server, target="/" + query)
                server.broadcast("4")
                expected = [*("1", "2", "3")[3 - history :], query.partition("mark=")[2], "4"]
                self.assertEqual([client.read() for _ in expected], expected)
                server.wait_for("open", target)
        for query in ("?mark=", "?mark=xyz", "?mark=" + "a" * 33, "?marks=1", "?mark=1&a=b"):
            client = self.connect(server, target="/" + query)
            self.assertEqual([client.read(), client.read()], ["3", "4"], query)
            server.wait_for("open", "/" + query)

    def test_history_is_not_compressed_in_the_loop(self) -> None:
        """The history is compressed in a thread of the new client, since all others would wait for the loop."""
        server = self.serve(history=1)
        server.broadcast("x" * 5000)
        eventually(lambda: server._room._history)
        with contextlib.ExitStack() as stack, server._queue._lock:  # the loop waits
            stack.enter_context(in_thread(lambda: self.connect(server, Sec_WebSocket_Extensions=DEFLATE)))
            server._queue._lock.release()
            eventually(lambda: 15 in (server._room._history[0]._frames or {}))
            server._queue._lock.acquire()

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


class WaitingSenders(ServerTestCase):
    """Senders wait while too much is queued: memory stays bounded, and no message is lost."""

    def test_senders(self) -> None:
        """Messages of clients are delivered before more are read."""
        server = self.serve(pywebsock.BroadcastServer, max_backlog=64 * 1024 * 1024)  # no client is dropped
        senders = [self.connect(server) for _ in range(3)]
        message = bytes(40_000)
        flood = masked_frame(BINARY, message) * 250  # 10 MB each
        with self.watch_queue(server) as sizes, contextlib.ExitStack() as stack:
            for sender in senders:
                stack.enter_context(in_thread(sender.send_raw, flood))
                stack.enter_context(in_thread(self.check_all, sender, message, 250 * 3))
        self.assertLess(max(sizes), pywebsock.RUN_SIZE + 2 * (pywebsock.READ_SIZE + len(message)))

    def test_tiny_messages(self) -> None:
        server = self.serve(pywebsock.BroadcastServer)
        senders = [self.connect(server) for _ in range(3)]
        count = 20_000
        with self.watch_queue(server) as sizes, contextlib.ExitStack() as stack:
            for sender in senders:
                stack.enter_context(in_thread(sender.send_raw, masked_frame(BINARY, b"") * count))
                stack.enter_context(in_thread(self.check_all, sender, b"", count * len(senders)))
        self.assertLess(max(sizes), pywebsock.QUEUE_SIZE)

    @contextlib.contextmanager
    def watch_queue(self, server: pywebsock.BroadcastServer) -> typing.Iterator[list[int]]:
        """Record the number of bytes that the loop takes from the queue at once."""
        take, sizes = server._queue.take, [0]

        def watched() -> list[typing.Any]:
            operations = take()
            messages = [each for each in operations if isinstance(each, pywebsock.Outgoing)]
            sizes.append(sum(each.size + pywebsock.MESSAGE_COST for each in messages))
            return operations

        with unittest.mock.patch.object(server._queue, "take", watched):
            yield sizes

    def test_other_clients_meanwhile(self) -> None:
        """While senders wait for a client that is behind, others join, send Pings and leave."""
        server = self.serve(send_timeout=0.4)  # the loop looks around every tenth of a second
        sender = self.connect(server)
        with unittest.mock.patch.object(server._loop.sender.gate, "look", lambda *_: server._queue.hold(True)):
            server._queue.wake()
            eventually(lambda: server._queue.held)
            sender.send("not yet")
            other = self.connect(server)
            other.frame(PING, b"?")
            self.assertEqual(other.read_frame(), Frame(True, False, PONG, b"?"))
            other.close()
            self.assertEqual(other.read_close(), (1000, ""))
            self.assertEqual(len(server._loop.receiver.gate._held_back), 1)
            server._hooks.wait(0, time.monotonic() + DEADLINE)
            self.assertNotIn(("message", "not yet"), server.heard)
        server._queue.wake()
        self.assertEqual(sender.read(), "not yet")

    def check_all(self, client: Client, message: bytes, count: int) -> None:
        """Read this message a number of times."""
        frame = pywebsock.serialize_frame(BINARY, message)
        received = bytearray()
        while len(received) < len(frame) * count:
            data = client.socket.recv(1 << 20)
            self.assertTrue(data, "the connection ended")
            received += data
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
            with unittest.mock.patch.object(server._queue, "take", list):  # the loop waits meanwhile
                stack.enter_context(in_thread(broadcast))
                eventually(lambda: server._queue._size > pywebsock.QUEUE_SIZE)
                self.assertLess(len(done), 200)
            for _ in range(200):
                self.assertEqual(client.read(), bytes(100_000))
        self.assertEqual(done, list(range(200)))

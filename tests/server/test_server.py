"""The server: one order for all, slow clients, keepalive, the end, and everything that may go wrong around it."""

from __future__ import annotations

import collections
import contextlib
import functools
import pathlib
import random
import selectors
import socket
import ssl
import tempfile
import threading
import time
import typing
import unittest
import unittest.mock
import zlib

import pywebsock

from tests.tools import load
from tests.tools.support import (
    DEADLINE,
    Client,
    Frame,
    Process,
    Recorder,
    ServerTestCase,
    certificate,
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
    """Give the sockets that the server accepts from now on a small send buffer, so that it soon keeps a backlog."""
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
        begun, last = [0], [1 << 60]

        def count() -> None:
            while begun[0] < last[0]:
                begun[0] += 1
                server.broadcast(str(begun[0]))

        clients: list[tuple[Client, int]] = []
        with in_thread(count):
            try:
                for _ in range(30):
                    client = self.connect(server, **how)
                    clients.append((client, begun[0]))
            finally:
                last[0] = begun[0] + 150
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

    def test_history_is_compressed_by_who_joins(self) -> None:
        """Not in the turn, in which it would hold up everybody."""
        server = self.serve(history=1)
        server.broadcast("x" * 5000)
        with contextlib.ExitStack() as stack, server._turn:
            stack.enter_context(in_thread(lambda: self.connect(server, Sec_WebSocket_Extensions=DEFLATE)))
            eventually(lambda: server._queue)
            self.assertEqual(list(server._history[0]._deflated), [15])

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
            server.take_turn()
            for sender in senders:
                stack.enter_context(in_thread(self.check_all, sender, message, 250 * 3))
        self.assertGreater(server.peak, pywebsock.QUEUE_SIZE)
        self.assertLess(server.peak, pywebsock.QUEUE_SIZE + 3 * (pywebsock.READ_SIZE + 2 * len(message)))
        eventually(lambda: server._queued == 0)

    def test_tiny_messages(self) -> None:
        """Many that come at once are not all put in the queue at once."""
        server = self.serve(self.Server)
        client = self.connect(server)
        count = 50_000
        with contextlib.ExitStack() as stack:
            with server._turn:
                stack.enter_context(in_thread(client.send_raw, masked_frame(BINARY, b"") * count))
                eventually(lambda: len(server._queue) > pywebsock.MANY_FRAMES // 2)
            self.check_all(client, b"", count)
        self.assertLess(server.peak, 2 * pywebsock.MANY_FRAMES * (pywebsock.OVERHEAD + 2))

    def check_all(self, client: Client, message: bytes, count: int) -> None:
        """Read so many times this message."""
        frame = pywebsock.serialize_frame(BINARY, message)
        received = bytearray()
        while len(received) < len(frame) * count:
            received += client.socket.recv(1 << 20)
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
            server.take_turn()
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
        sender.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(80)))
        other.send("not held up")
        messages = [sender.read() for _ in range(81)]
        self.assertGreater(time.monotonic() - start, 0.7)  # a second's worth may come at once
        self.assertLess(messages.index("not held up"), 79)
        messages.remove("not held up")
        self.assertEqual(messages, [str(i) for i in range(80)])

    def test_enough(self) -> None:
        """Who stays below the rate notices nothing."""
        client = self.connect(self.serve(rate=1000))
        start = time.monotonic()
        for i in range(20):
            client.send(str(i))
            self.assertEqual(client.read(), str(i))
        self.assertLess(time.monotonic() - start, 5)


class MaxClients(ServerTestCase):
    """Seats are limited; a seat is free again when its client has gone."""

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

    def test_refused_handshakes_take_no_seat(self) -> None:
        server = self.serve(max_clients=1)
        for _ in range(3):
            self.assertEqual(exchange(server.server_address[1], request(Origin="http://example.com"))[0], 403)
            self.assertEqual(exchange(server.server_address[1], request(Sec_WebSocket_Key="?"))[0], 400)
        self.connect(server)


def visit(port: int, data: bytes = b"") -> bool:
    """Open a WebSocket, send something, and leave: whether it was opened."""
    with Client(port, handshake=False) as client:
        client.send_raw(request() + data)
        return client.read_head().startswith(b"HTTP/1.1 101 ")


class TheEnd(ServerTestCase):
    """server_close() sends what is queued, then 1001 to everybody, and waits, but not for ever."""

    def test_what_is_queued_then_1001(self) -> None:
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

    def test_a_slow_client_gets_all_before(self) -> None:
        server = self.serve()
        small_buffers(server)
        slow = self.connect(server, small=True)
        for _ in range(50):
            server.broadcast(bytes(10_000))
        with in_thread(server.server_close):
            self.assertEqual([slow.read() for _ in range(50)], [bytes(10_000)] * 50)
            self.assertEqual(slow.read_frame().payload, b"\x03\xe9")
            slow.close(1001)
            slow.socket.close()

    def test_who_joins_meanwhile(self) -> None:
        """Trap 6: its handshake is complete, the others have had their 1001 already."""
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

    def test_who_does_not_answer_or_never_asked(self) -> None:
        server = self.serve(close_timeout=0.3)
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
        server = self.serve(close_timeout=0.3)
        small_buffers(server)
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
        """A hook, which does not run in the thread of serve_forever, may call shutdown (trap 5)."""

        class Server(Recorder):
            """Stops at the first message."""

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                self.broadcast(message)
                self.shutdown()
                self._tell("stopped")

        server = self.serve(Server)
        client = self.connect(server)
        client.send("stop")
        self.assertEqual(client.read(), "stop")
        server.wait_for("stopped")

    def test_a_port_that_is_taken(self) -> None:
        """The constructor raises OSError, and leaves no thread and no socket behind."""
        server = self.serve()
        before = threading.active_count()
        with self.assertRaises(OSError):
            pywebsock.BroadcastServer(("127.0.0.1", server.server_address[1]))
        self.assertEqual(threading.active_count(), before)


class Hooks(ServerTestCase):
    """An exception in a hook is logged with its traceback and closes that client with 1011; nobody else notices."""

    class Server(Recorder):
        """Fails where a client's path or message says so."""

        def on_open(self, client: pywebsock.WebSocketHandler) -> None:
            if client.path == "/open":
                self.broadcast("good")
                raise LookupError("in on_open")

        def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
            if message == "fail":
                raise LookupError("in on_message")
            super().on_message(client, message)

        def on_close(self, client: pywebsock.WebSocketHandler, code: int, reason: str) -> None:
            super().on_close(client, code, reason)
            if client.path == "/close":
                raise LookupError("in on_close")

    def check(self, data: bytes, code: int, what: str) -> None:
        """What a client sends gets it this code and the log a traceback; another client gets the good message alone."""
        server = self.serve(self.Server)
        witness, client = self.connect(server), self.connect(server, handshake=False)
        with self.assertLogs("pywebsock", "ERROR") as logged:
            client.send_raw(data)
            client.read_head()
            self.assertEqual(client.read(), "good")
            self.assertEqual(client.read_close()[0], code)
            eventually(lambda: logged.records)
        self.assertEqual(len(logged.records), 1)
        self.assertIn(f"LookupError: {what}", logged.output[0])
        server.wait_for("close", code, "" if code == 1000 else "internal error")
        witness.send("all is well")
        self.assertEqual(witness.read(), "good")
        self.assertEqual(witness.read_frame(), Frame(True, False, TEXT, b"all is well"))

    def test_on_open(self) -> None:
        self.check(request(target="/open") + masked_frame(TEXT, b"never"), 1011, "in on_open")

    def test_on_message(self) -> None:
        texts = b"".join(masked_frame(TEXT, text) for text in (b"good", b"fail", b"never"))
        self.check(request() + texts, 1011, "in on_message")

    def test_on_close(self) -> None:
        close = masked_frame(CLOSE, b"\x03\xe8")
        self.check(request(target="/close") + masked_frame(TEXT, b"good") + close, 1000, "in on_close")

    def test_each_in_its_own_thread(self) -> None:
        """A hook may take its time: only its client waits."""
        go_on = threading.Event()

        class Server(Recorder):
            """Waits where a message says so."""

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                if message == "wait":
                    go_on.wait(DEADLINE)
                super().on_message(client, message)

        server = self.serve(Server)
        a, b = self.connect(server), self.connect(server)
        a.send_raw(masked_frame(TEXT, b"before") + masked_frame(TEXT, b"wait"))
        for i in range(10):
            b.send(str(i))
        messages = [b.read() for _ in range(10)]
        while messages[-1] != "9":
            messages.append(b.read())
        self.assertNotIn("wait", messages)
        go_on.set()
        while messages[-1] != "wait":
            messages.append(b.read())
        self.assertEqual(sorted(map(str, messages)), [*map(str, range(10)), "before", "wait"])

    def test_order_of_hooks(self) -> None:
        server = self.serve()
        client = self.connect(server, handshake=False)
        client.send_raw(request(target="/p?q") + masked_frame(TEXT, b"x") + masked_frame(CLOSE, b"\x0f\xa0bye"))
        client.read_all()
        expected = [("open", "/p?q"), ("message", "x"), ("close", 4000, "bye")]
        server.wait_for(*expected[-1])
        self.assertEqual(server.heard, expected)

    def test_a_hook_may_call_everything(self) -> None:
        class Server(Recorder):
            """Answers, tells all, and ends it."""

            def on_open(self, client: pywebsock.WebSocketHandler) -> None:
                client.send("welcome")
                self.broadcast("somebody came")

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                client.send(b"to you")
                self.broadcast("to all")
                client.close(4000, "enough")

            def on_close(self, client: pywebsock.WebSocketHandler, code: int, reason: str) -> None:
                client.send("nobody hears this")
                client.close()
                self.broadcast(f"somebody left: {code}")

        server = self.serve(Server)
        a = self.connect(server)
        self.assertEqual([a.read(), a.read()], ["welcome", "somebody came"])
        b = self.connect(server)
        self.assertEqual([b.read(), b.read()], ["welcome", "somebody came"])
        b.send("x")
        self.assertEqual([b.read(), b.read()], [b"to you", "to all"])
        self.assertEqual(b.read_frame().payload[2:], b"enough")
        b.close(4000)
        self.assertEqual(b.read_all(), b"")
        self.assertEqual([a.read() for _ in range(3)], ["somebody came", "to all", "somebody left: 4000"])


class AnyThread(ServerTestCase):
    """broadcast, send and close check what they are given where they are called."""

    def setUp(self) -> None:
        self.server = self.serve()
        self.client = self.connect(self.server)
        (self.handler,) = self.server.clients

    def tearDown(self) -> None:
        """Whatever was refused, nothing of it was sent, and all goes on."""
        self.server.broadcast("end")
        self.assertEqual(self.client.read(), "end")

    def test_messages(self) -> None:
        for message in ("text", "", b"bytes", b"", bytearray(b"array"), memoryview(b"view")):
            with self.subTest(message=message):
                expected = message if isinstance(message, str) else bytes(message)
                self.server.broadcast(message)  # type: ignore[arg-type]
                self.handler.send(message)  # type: ignore[arg-type]
                self.assertEqual([self.client.read(), self.client.read()], [expected] * 2)

    def test_what_was_sent_may_be_changed(self) -> None:
        changing = bytearray(b"before")
        with self.server._turn:
            self.server.broadcast(changing)  # type: ignore[arg-type]
            changing[:] = b"after!"
        self.server.broadcast("next")
        self.assertEqual([self.client.read(), self.client.read()], [b"before", "next"])

    def test_type_error(self) -> None:
        for message in (None, 1, ["x"], object()):
            with self.subTest(message=message):
                with self.assertRaises(TypeError):
                    self.server.broadcast(message)  # type: ignore[arg-type]
                with self.assertRaises(TypeError):
                    self.handler.send(message)  # type: ignore[arg-type]

    def test_value_error(self) -> None:
        for code in (-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65536):
            with self.subTest(code=code), self.assertRaises(ValueError):
                self.handler.close(code)
        lone = "\ud800"  # half of a surrogate pair: no UTF-8 for it
        with self.assertRaises(ValueError):
            self.server.broadcast(lone)
        with self.assertRaises(ValueError):
            self.handler.send(lone)

    def test_value_error_for_a_reason(self) -> None:
        with self.assertRaises(ValueError):
            self.handler.close(1000, "\ud800")

    def test_long_reason_is_cut(self) -> None:
        """A Close frame has 125 bytes at most, and never half a character."""
        for reason, expected in (
            ("x" * 200, "x" * 123),
            ("\u20ac" * 100, "\u20ac" * 41),
            ("x\u20ac" * 50, "x\u20ac" * 30 + "x"),
        ):
            client = self.connect(self.server)
            (handler,) = self.server.clients - {self.handler}
            handler.close(4000, reason)
            frame = client.read_frame()
            self.assertEqual(frame.payload[2:].decode(), expected)
            client.close(4000)
            self.assertEqual(client.read_all(), b"")
            eventually(lambda: len(self.server.clients) == 1)

    def test_to_a_client_that_has_gone(self) -> None:
        client = self.connect(self.server)
        (handler,) = self.server.clients - {self.handler}
        client.close()
        client.read_close()
        handler.send("nobody hears this")
        handler.close()

    def test_large_broadcast(self) -> None:
        """The limit is for what clients send; a large message does not wait for ever in the queue."""
        message = bytes(range(256)) * 4 * 1024 * 6  # 6 MiB
        with in_thread(self.server.broadcast, message):
            self.assertEqual(self.client.read(), message)


class Compression(ServerTestCase):
    """permessage-deflate on the wire (RFC 7692)."""

    LONG = "all work and no play makes Jack a dull boy " * 100

    OFFERS = (
        ("permessage-deflate", ""),
        ("permessage-deflate; client_max_window_bits", ""),
        ("permessage-deflate; client_no_context_takeover; server_no_context_takeover", ""),
        ("x-other; a=b, permessage-deflate", ""),
        ("permessage-deflate; server_max_window_bits=12", "; server_max_window_bits=12"),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", ""),
    )
    DECLINED = (
        "permessage-deflate; server_max_window_bits=8",
        "permessage-deflate; server_max_window_bits=16",
        "permessage-deflate; unknown",
        "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
        "x-webkit-deflate-frame",
    )

    def test_negotiation(self) -> None:
        server = self.serve()
        answer = b"permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        for offer, more in self.OFFERS:
            with self.subTest(offer=offer):
                client = self.connect(server, Sec_WebSocket_Extensions=offer)
                self.assertIn(b"Sec-WebSocket-Extensions: " + answer + more.encode() + b"\r\n", client.response)
        for offer in self.DECLINED:
            with self.subTest(offer=offer):
                client = self.connect(server, Sec_WebSocket_Extensions=offer)
                self.assertNotIn(b"Extensions", client.response)

    def test_only_for_those_who_negotiated(self) -> None:
        server = self.serve()
        plain, deflate = self.connect(server), self.connect(server, Sec_WebSocket_Extensions=DEFLATE)
        for message in (self.LONG, self.LONG.encode()):
            opcode = TEXT if isinstance(message, str) else BINARY
            for sender in (plain, deflate):
                sender.send(message)
                self.assertEqual(plain.read_frame(), Frame(True, False, opcode, self.LONG.encode()))
                frame = deflate.read_frame()
                self.assertEqual((frame.fin, frame.rsv1, frame.opcode), (True, True, opcode))
                self.assertLess(len(frame.payload), len(self.LONG) // 10)
                inflated = zlib.decompressobj(-15).decompress(frame.payload + b"\0\0\xff\xff")
                self.assertEqual(inflated, self.LONG.encode())

    def test_short_and_incompressible_messages_go_plain(self) -> None:
        client = self.connect(self.serve(), Sec_WebSocket_Extensions=DEFLATE)
        for message in (b"", b"x", b"x" * 200, random.Random(1).randbytes(5000)):
            client.send(message)
            self.assertEqual(client.read_frame(), Frame(True, False, BINARY, message))

    def test_each_window(self) -> None:
        """A client that limits the window can inflate with it."""
        server = self.serve()
        text = "".join(random.Random(2).choices("abcdef", k=2000)) * 20  # repeats beyond a small window
        clients = {}
        for bits in range(9, 16):
            offer = f"permessage-deflate; server_max_window_bits={bits}"
            clients[bits] = self.connect(server, Sec_WebSocket_Extensions=offer)
        server.broadcast(text)
        for bits, client in clients.items():
            with self.subTest(bits=bits):
                frame = client.read_frame()
                self.assertTrue(frame.rsv1)
                inflated = zlib.decompressobj(-bits).decompress(frame.payload + b"\0\0\xff\xff")
                self.assertEqual(inflated.decode(), text)

    def test_compressed_by_the_client(self) -> None:
        server = self.serve()
        sender, plain = self.connect(server, Sec_WebSocket_Extensions=DEFLATE), self.connect(server)
        for message in ("", "Hello", self.LONG, "x" * 1_000_000):
            compressor = zlib.compressobj(wbits=-15)
            data = (compressor.compress(message.encode()) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
            for cut in (0, 1, len(data) // 2, len(data)):
                with self.subTest(length=len(message), cut=cut):
                    sender.frame(TEXT, data[:cut], rsv=4, fin=False)
                    sender.frame(PING, b"between")
                    sender.frame(CONT, data[cut:])
                    self.assertEqual(plain.read(), message)
                    self.assertEqual([sender.read_frame().opcode, sender.read()], [PONG, message])
            sender.frame(TEXT, message.encode()[:100_000])  # and it need not compress
            self.assertEqual([plain.read(), sender.read()], [message[:100_000]] * 2)

    def test_examples_of_the_rfc(self) -> None:
        """RFC 7692 7.2.3."""
        client = self.connect(self.serve(), Sec_WebSocket_Extensions=DEFLATE)
        for example in (
            b"\xf2\x48\xcd\xc9\xc9\x07\x00",  # 7.2.3.1: one block
            b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00",  # 7.2.3.3: no compression
            b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00",  # 7.2.3.4: BFINAL set
            b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00",  # 7.2.3.5: two blocks
        ):
            with self.subTest(example=example):
                client.frame(TEXT, example, rsv=4)
                self.assertEqual(client.read(), "Hello")

    def test_none(self) -> None:
        server = self.serve(compression=False)
        client = self.connect(server, Sec_WebSocket_Extensions=DEFLATE)
        self.assertNotIn(b"Extensions", client.response)
        client.send(self.LONG)
        self.assertEqual(client.read_frame(), Frame(True, False, TEXT, self.LONG.encode()))


class TLS(ServerTestCase):
    """wss:// and https://, on the same port."""

    server_context: ssl.SSLContext
    context: ssl.SSLContext

    @classmethod
    def setUpClass(cls) -> None:
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        path, cls.context = certificate(directory.name)
        cls.server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.server_context.load_cert_chain(path)

    def secure(self, **settings: typing.Any) -> Recorder:
        """A server with the certificate."""
        return self.serve(Recorder, tls_context=self.server_context, **settings)

    def client(self, server: Recorder, **how: typing.Any) -> Client:
        """A client that trusts it."""
        return self.connect(server, tls=self.context, **how)

    def test_both_versions(self) -> None:
        server = self.secure()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            with self.subTest(version=version.name):
                client = self.connect(server, tls=context)
                for message in ("Hello", b"", bytes(300_000)):
                    client.send(message)
                    self.assertEqual(client.read(), message)
                client.frame(PING, b"?")
                self.assertEqual(client.read_frame(), Frame(True, False, PONG, b"?"))
                client.close(4000)
                self.assertEqual(client.read_close(), (4000, ""))  # and a proper end: read_close() wants one

    def test_one_order(self) -> None:
        """Everybody writes to everybody: reading and writing meet on one TLS object."""
        server = self.secure()
        clients = [self.client(server) for _ in range(4)]
        with contextlib.ExitStack() as stack:
            for name, client in enumerate(clients):
                frames = b"".join(masked_frame(TEXT, b"%d %d" % (name, i)) for i in range(200))
                stack.enter_context(in_thread(client.send_raw, frames))
        seen = [[client.read() for _ in range(4 * 200)] for client in clients]
        self.assertEqual(seen, [seen[0]] * 4)

    def test_http(self) -> None:
        port = self.secure().server_address[1]
        for target, expected in (("/", 200), ("/status", 200), ("/nothing", 404)):
            data = request(target=target, Upgrade=None, Sec_WebSocket_Key=None)
            status, fields, body = exchange(port, data, tls=self.context)
            self.assertEqual((status, fields["content-length"]), (expected, str(len(body))))

    def test_slow_client(self) -> None:
        server = self.secure()
        small_buffers(server)
        quick, slow = self.client(server), self.client(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(50)]
        for message in messages:
            server.broadcast(message)
            self.assertEqual(quick.read(), message)
        self.assertEqual([slow.read() for _ in messages], messages)

    def test_the_end(self) -> None:
        server = self.secure()
        client = self.client(server)
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            client.close(1001)
            self.assertEqual(client.read_all(), b"")
            client.socket.close()

    def test_strangers(self) -> None:
        """No TLS, half of it, or silence: one line in the log, no traceback, nobody disturbed."""
        server = self.secure(handshake_timeout=0.3)
        witness = self.client(server)
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        for data in (b"", request(), b"garbage\r\n\r\n", hello, bytes(1000)):
            with self.subTest(data=data[:20]), self.assertLogs("pywebsock", "INFO") as logged:
                client = self.connect(server, handshake=False)
                client.send_raw(data)
                client.read_all()
                client.socket.close()
                eventually(functools.partial(getattr, logged, "records"))
                self.assertEqual([record.exc_info for record in logged.records], [None])
        witness.send("all is well")
        self.assertEqual(witness.read(), "all is well")

    def test_a_client_that_does_not_trust_it(self) -> None:
        server = self.secure()
        with self.assertLogs("pywebsock", "INFO") as logged:
            with self.assertRaises(ssl.SSLError):
                self.connect(server, tls=ssl.create_default_context())
            eventually(lambda: logged.records)
        self.assertEqual([record.exc_info for record in logged.records], [None])


class TLSEnds(unittest.TestCase):
    """Every way in which a peer may end TLS, or half of it (RFC 8446 6.1), at every point of a connection."""

    def test_nobody_else_notices(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path, context = certificate(directory)
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context.minimum_version = ssl.TLSVersion.TLSv1_2
                context.maximum_version = version
                for first in (b"", request(), request(method="POST", Upgrade=None, Content_Length="9") + b"half"):
                    with self.subTest(version=version.name, first=first[:4]), Process("--cert", path) as server:
                        self.end_of_tls(server, context, first)

    def end_of_tls(self, server: Process, context: ssl.SSLContext, first: bytes) -> None:
        with Client(server.port, tls=context) as witness, Client(server.port, tls=context, handshake=False) as client:
            client.send_raw(first)
            if first.startswith(b"GET"):
                client.read_head()
            assert isinstance(client.socket, ssl.SSLSocket)
            with contextlib.suppress(OSError):
                client.socket.unwrap()  # sends close_notify, and waits for theirs
            before = load.cpu(server.pid)
            for _ in range(20):  # the room is alive, and nobody is busy with the connection
                witness.send("Hello")
                self.assertEqual(witness.read(), "Hello")
                time.sleep(0.02)
            self.assertLess(load.cpu(server.pid) - before, 0.3)
        self.assertEqual(server.stop(), 0)


class Exhaustion(ServerTestCase):
    """Trap 4: where the process has no more file descriptors or threads, others are not disturbed."""

    LIMITED = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def test_file_descriptors(self) -> None:
        """New connections wait, without a busy loop, one line in the log, and are served when others have gone."""
        require(pathlib.Path("/proc/self/stat").exists(), "/proc")
        with Process(python=("-c", self.LIMITED)) as process:
            clients = [Client(process.port)]
            for client in clients:
                self.addCleanup(client.__exit__)
            for _ in range(80):
                clients.append(Client(process.port, handshake=False))
                self.addCleanup(clients[-1].__exit__)
                clients[-1].send_raw(request())
            eventually(lambda: "cannot accept" in process.log())
            before = load.cpu(process.pid)
            start = time.monotonic()
            while time.monotonic() - start < 1.2:  # those who are in do not notice
                clients[0].send("still here")
                self.assertEqual(clients[0].read(), "still here")
                time.sleep(0.05)
            self.assertLess(load.cpu(process.pid) - before, 0.6)
            self.assertEqual(process.log().count("cannot accept"), 1)
            for client in clients[:60]:
                client.socket.close()
            for client in clients[60:]:
                self.assertTrue(client.read_head().startswith(b"HTTP/1.1 101 "))
            clients[-1].frame(PING, b"?")
            self.assertEqual(clients[-1].read_frame(), Frame(True, False, PONG, b"?"))
            for client in clients:
                client.socket.close()
        self.assertNotIn("Traceback", process.log())

    def test_threads(self) -> None:
        """A connection that cannot have its thread is refused."""
        server = self.serve()
        witness = self.connect(server)
        error = RuntimeError("can't start new thread")
        with self.assertLogs("pywebsock", "WARNING") as logged:
            with unittest.mock.patch.object(pywebsock, "start_new_thread", side_effect=error):
                refused = self.connect(server, handshake=False)
                self.assertEqual(refused.read_all(), b"")
                eventually(lambda: logged.records)
            self.assertEqual([record.exc_info for record in logged.records], [None])
        self.connect(server)
        witness.send("all is well")
        self.assertEqual(witness.read(), "all is well")


class Storm(ServerTestCase):
    """Trap 4: socketserver lets five connections wait; here a storm of them is let in."""

    def test_many_at_once(self) -> None:
        server = pywebsock.BroadcastServer(("127.0.0.1", 0))
        self.addCleanup(server.server_close)
        clients = [self.connect(server, handshake=False) for _ in range(200)]  # nobody accepts yet
        for client in clients:
            client.send_raw(request())
        with in_thread(server.serve_forever, 0.02):
            self.addCleanup(server.shutdown)
            for client in clients:
                self.assertTrue(client.read_head().startswith(b"HTTP/1.1 101 "))
            server.broadcast("all here?")
            self.assertEqual([client.read() for client in clients], ["all here?"] * 200)
            for client in clients:
                client.socket.close()
            server.shutdown()


class Windows(ServerTestCase):
    """Where MSG_DONTWAIT and epoll are missing, the sockets of clients never wait."""

    def setUp(self) -> None:
        for where, name, value in (
            (pywebsock, "DONT_WAIT", 0),
            (selectors, "DefaultSelector", selectors.SelectSelector),
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
        small_buffers(server)
        quick, slow = self.connect(server), self.connect(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(50)]
        for message in messages:
            quick.send(message)
            self.assertEqual(quick.read(), message)
        self.assertEqual([slow.read() for _ in messages], messages)

    def test_stuck_client(self) -> None:
        server = self.serve(max_backlog=100_000)
        small_buffers(server)
        quick = self.connect(server)
        self.connect(server, small=True)
        for _ in range(40):
            quick.send(bytes(10_000))
            self.assertEqual(quick.read(), bytes(10_000))
        eventually(lambda: len(server.clients) == 1)

    def test_the_end(self) -> None:
        server = self.serve()
        client = self.connect(server)
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            client.close(1001)
            self.assertEqual(client.read_all(), b"")
            client.socket.close()

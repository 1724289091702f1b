"""The room, step by step: joining, the queue that wakes the loop, senders that wait, the budget.

The server is not started: the test carries out the queue.
"""

from __future__ import annotations

import contextlib
import random
import selectors
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from pywebsock import Outgoing
from tests.server.test_connection import RESPONSE, make_connection
from tests.tools.support import (
    BINARY,
    DEADLINE,
    IS_WINDOWS,
    TEXT,
    Client,
    Pipe,
    Recorder,
    ServerTestCase,
    eventually,
    in_thread,
    masked_frame,
)


def text(*messages: str) -> bytes:
    """Return the frames of text messages."""
    return b"".join(pywebsock.serialize_frame(TEXT, message.encode()) for message in messages)


class QuietPipe(Pipe):
    """A pipe for which the selector never waits."""

    closed = False

    def close(self) -> None:
        """Do nothing; socket.close() of the loop."""
        self.closed = True

    def setsockopt(self, *_: object) -> None:
        """Do nothing; socket.setsockopt() of the loop."""


class RoomTestCase(ServerTestCase):
    """A server that is not started."""

    def setUp(self) -> None:
        self.begin()

    def begin(self, **settings: typing.Any) -> None:
        """Make a server with these settings."""
        self.server = Recorder(("127.0.0.1", 0), close_timeout=0, **settings)
        self.addCleanup(self.server.server_close)
        self.room, self.queue, self.loop = self.server._room, self.server._queue, self.server._loop
        self.loop.sender.selector = unittest.mock.Mock()

    def prepare(self, window: int = 0) -> tuple[pywebsock.Connection, QuietPipe]:
        """Return a connection that is about to join."""
        pipe = QuietPipe()
        connection = make_connection(self.server, pipe, window)
        self.room.add_pending(connection.client, 0.0)
        return connection, pipe

    def join(self, window: int = 0, mark: str = "") -> tuple[pywebsock.Connection, QuietPipe]:
        """Join a connection; the operation is queued."""
        connection, pipe = self.prepare(window)
        self.room.join(connection, RESPONSE, mark)
        return connection, pipe

    def put(self, message: str, *to: pywebsock.Connection) -> None:
        """Queue a message, for all clients or some."""
        handlers = [connection.client for connection in to] or None
        self.queue.put_message(pywebsock.outgoing_message(message, handlers))

    def carry_out(self) -> None:
        """Carry out the queue, as the loop does."""
        self.loop._carry_out()


class Joining(RoomTestCase):
    """A client gets messages from its place in the queue on, and the history up to there."""

    def test_place_in_the_queue(self) -> None:
        self.put("before")
        _, pipe = self.join()
        self.put("after")
        self.assertEqual(pipe.stream, b"")
        self.carry_out()
        self.assertEqual(pipe.stream, RESPONSE + text("after"))

    def test_history_while_joining(self) -> None:
        """A client gets each message once and in order, also those that are broadcast while it joins."""
        for history in (1, 2, 3, 5):
            for early, queued in ((0, 0), (0, 2), (2, 0), (2, 1), (4, 4), (9, 9)):
                with self.subTest(history=history, early=early, queued=queued):
                    self.begin(history=history)
                    numbers = [str(number) for number in range(early + queued)]
                    for number in numbers[:early]:
                        self.put(number)
                    self.carry_out()
                    for number in numbers[early:]:
                        self.put(number)
                    _, pipe = self.join(mark="1f")
                    self.put("after")
                    self.carry_out()
                    self.assertEqual(pipe.stream, RESPONSE + text(*numbers[-history:], "1f", "after"))

    def test_messages_to_some_are_no_history(self) -> None:
        self.begin(history=2)
        other, _ = self.join()
        self.put("for all")
        self.put("for one", other)
        _, pipe = self.join()
        self.carry_out()
        self.assertEqual(pipe.stream, RESPONSE + text("for all"))

    def test_history_in_bytes(self) -> None:
        """The history has at most half of max_backlog, and no longer message; a message counts more than its bytes."""
        limit = 2 * pywebsock.MESSAGE_COST + 50
        self.begin(history=100, max_backlog=2 * limit)
        for message in ("a" * 20, "b" * 20, "c" * 20):
            self.put(message)
        self.carry_out()
        _, pipe = self.join()
        self.carry_out()
        self.assertEqual(pipe.stream, RESPONSE + text("b" * 20, "c" * 20))
        for _ in range(100):
            self.put("")
        self.carry_out()
        self.assertEqual(len(self.room._history), 2)
        self.put("d" * (limit - pywebsock.MESSAGE_COST + 1))
        self.carry_out()
        self.assertEqual((len(self.room._history), self.room._history_size), (0, 0))

    def test_too_many(self) -> None:
        self.begin(max_clients=2)
        self.join()
        first, _ = self.join()
        connection, _ = self.prepare()
        with self.assertRaises(pywebsock.HandshakeError) as caught:
            self.room.join(connection, RESPONSE, "")
        self.assertEqual((caught.exception.status, len(self.server.clients)), (503, 2))
        self.carry_out()
        self.loop.sender.drop(first, "a test")
        self.room.join(connection, RESPONSE, "")
        self.assertEqual(len(self.server.clients), 2)

    def test_after_the_end(self) -> None:
        connection, _ = self.prepare()
        self.loop.stop()
        with self.assertRaises(pywebsock.HandshakeError):
            self.room.join(connection, RESPONSE, "")
        self.assertEqual(self.server.clients, set())

    def test_closed_before(self) -> None:
        """A client that is closed before it joins (by a hook or the end of the server) gets one Close after its 101."""
        for frames in ([], [pywebsock.serialize_close(4000, "bye"), pywebsock.serialize_close(4001)]):
            self.begin()
            connection, pipe = self.prepare()
            pipe.shutdown = lambda how: None  # type: ignore[method-assign]
            for frame in frames:
                self.room.close(connection.client, frame)
            if not frames:
                self.room.close_all()
            self.room.join(connection, RESPONSE, "")
            self.put("never")
            self.carry_out()
            self.assertEqual(pipe.stream, RESPONSE + [*frames, pywebsock.serialize_close(1001)][0])
            self.assertIs(connection.state, pywebsock.State.CLOSING)

    def test_close_all(self) -> None:
        """1001 comes after the queued messages; a closing client gets no second Close."""
        first, one = self.join()
        _, two = self.join()
        self.put("last")
        self.room.close(first.client, pywebsock.serialize_close(4000))
        self.room.close_all()
        self.put("never")
        self.carry_out()
        self.assertEqual(one.stream, RESPONSE + text("last") + pywebsock.serialize_close(4000))
        self.assertEqual(two.stream, RESPONSE + text("last") + pywebsock.serialize_close(1001))


class TooMany(RoomTestCase):
    """If there are too many connections, those end that are no clients."""

    def test_oldest_first(self) -> None:
        """First those with a response, then pending ones: each once, and none that is younger than a second."""
        ended: list[pywebsock.RequestHandler] = []
        self.room.drop = lambda connection, why: ended.append(connection.client)
        self.room.give_up = lambda handler, why: ended.append(handler)
        young = time.monotonic() + DEADLINE
        answered = [self.prepare()[0] for _ in range(2)]
        pending = [self.prepare()[0].client for _ in range(3)]
        for connection in answered:
            self.room.dismiss(connection, RESPONSE)
        self.room.answered.update(zip(answered, (0.0, young)))
        self.room.pending[pending[2]] = young
        for _ in range(5):
            self.server._give_up_oldest()
        self.carry_out()
        self.assertEqual(ended, [answered[0].client, *pending[:2]])

    def test_none_can_end(self) -> None:
        """A new connection waits to be accepted."""
        self.server._most_connections = 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(unittest.mock.patch.object(self.room, "wait_for"))
            stack.enter_context(Client(self.server.server_address[1], handshake=False))
            with self.assertRaises(OSError):
                self.server.get_request()[0].close()


class Recipients(RoomTestCase):
    """The clients that get a message."""

    def test_some(self) -> None:
        clients = [self.join(window) for window in (0, 15, 0, 9)]
        a, b, _, d = (connection for connection, _ in clients)
        self.put("b and d", b, d)
        self.put("all")
        self.put("a", a)
        self.put("a again", a, a)
        self.carry_out()
        self.assertEqual(
            [pipe.stream.removeprefix(RESPONSE) for _, pipe in clients],
            [text("all", "a", "a again"), text("b and d", "all"), text("all"), text("b and d", "all")],
        )

    def test_one_send(self) -> None:
        """Messages with different recipients: each client still gets its messages in one send, in order."""
        clients = [self.join(window) for window in (0, 15, 0, 0)]
        self.carry_out()
        for _, pipe in clients:
            pipe.taken.clear()
        connections = [connection for connection, _ in clients]
        for number, own in enumerate(connections):
            self.put(f"{number}", *(each for each in connections if each is not own))
        self.put("0 and 3", connections[0], connections[3])
        self.carry_out()
        expected = (
            text("1", "2", "3", "0 and 3"),
            text("0", "2", "3"),
            text("0", "1", "3"),
            text("0", "1", "2", "0 and 3"),
        )
        for (_, pipe), its in zip(clients, expected):
            self.assertEqual(pipe.stream.removeprefix(RESPONSE), its)
            self.assertEqual(len(pipe.taken), 1)

    def test_long_messages_to_some(self) -> None:
        """Longer messages to some clients are sent one by one, so that slow clients share their bytes."""
        (one, first), (two, second) = self.join(), self.join()
        self.carry_out()
        for pipe in (first, second):
            pipe.taken.clear()
        long = "x" * (pywebsock.RUN_SIZE // pywebsock.OWN_COST)
        for _ in range(3):
            self.put(long, one, two)
        self.carry_out()
        if not IS_WINDOWS:  # a send is a slice there
            self.assertEqual([len(pipe.taken) for pipe in (first, second)], [3, 3])
        self.assertEqual(first.stream, second.stream)

    def test_no_recipient(self) -> None:
        """Clients that have left, have not joined, or belong to another server; and no client."""
        gone, gone_pipe = self.join()
        _, other = self.join()
        self.carry_out()
        self.loop.sender.drop(gone, "a test")
        stranger, stranger_pipe = self.prepare()
        self.put("?", gone, stranger)
        self.queue.put_message(pywebsock.outgoing_message("nobody", []))
        self.carry_out()
        self.assertEqual([pipe.stream for pipe in (gone_pipe, stranger_pipe, other)], [RESPONSE, b"", RESPONSE])

    def test_counts(self) -> None:
        """The status counts broadcasts, and the bytes of their payload."""
        connection, _ = self.join()
        self.put("four")
        self.put("one alone", connection)
        self.put("\xfcber")
        self.carry_out()
        self.assertEqual((self.room.messages, self.room.bytes), (2, 9))

    def test_the_set_is_a_copy(self) -> None:
        connection, _ = self.join()
        clients = self.server.clients
        clients.clear()
        self.assertEqual(self.server.clients, {connection.client})
        self.assertEqual([self.room.leave(connection), self.room.leave(connection)], [True, False])
        self.room.set_send(connection, pywebsock.discard)
        self.assertEqual((self.server.clients, len(self.room)), (set(), 0))

    def test_windows_in_use(self) -> None:
        """The server compresses as long as a client with compression is there."""
        self.join()
        connection, _ = self.join(window=15)
        self.assertTrue(self.room.compresses)
        self.room.leave(connection)
        self.assertFalse(self.room.compresses)

    def test_long_runs(self) -> None:
        """Many messages are sent at once, if they are not too large."""
        connection, pipe = self.join()
        self.carry_out()
        pipe.taken.clear()
        messages = [f"{number}" for number in range(1000)] + ["x" * 600_000] * 4
        for message in messages:
            self.put(message)
        self.carry_out()
        if IS_WINDOWS:  # a send is a slice there
            while connection.size:
                self.loop.sender.flush(connection)
        else:
            self.assertEqual(len(pipe.taken), 2)
        self.assertEqual(pipe.stream, text(*messages))

    def test_a_send_that_fails(self) -> None:
        """A client that misses a message gets none of the later ones."""
        _, pipe = self.join()
        self.carry_out()
        pipe.error = OSError("a test")
        self.put("lost")
        self.queue.put(lambda: setattr(pipe, "error", None))
        self.put("later")
        self.carry_out()
        self.assertEqual(pipe.stream, RESPONSE)

    def test_an_operation_that_fails(self) -> None:
        """An exception in an operation does not affect those before and after it."""
        _, pipe = self.join()
        self.servers = [self.server]
        with self.assertLogs("pywebsock", "ERROR") as logged:
            self.put("before")
            self.queue.put(lambda: 1 // 0)
            self.put("behind")
            self.carry_out()
        self.assertEqual(pipe.stream, RESPONSE + text("before", "behind"))
        self.assertEqual(len(logged.records), 1)


class QueueTestCase(unittest.TestCase):
    """A queue, and a loop of the test."""

    def setUp(self) -> None:
        self.queue = pywebsock.Queue()
        self.selector = selectors.DefaultSelector()
        self.addCleanup(self.selector.close)
        self.queue.open(self.selector)
        self.addCleanup(self.queue.end)


class WakeUp(QueueTestCase):
    """Each operation wakes the loop, once."""

    def woken(self, timeout: float = 0) -> bool:
        """Return whether the loop would wake up now."""
        return bool(self.selector.select(timeout))

    def test_asleep(self) -> None:
        self.assertTrue(self.queue.fall_asleep())
        self.assertFalse(self.woken())
        self.queue.put("operation")
        self.assertTrue(self.woken())
        self.queue._hear_alarm()
        self.assertFalse(self.woken())
        self.assertFalse(self.queue.fall_asleep())  # the queue is not empty
        self.queue.put("another")
        self.assertFalse(self.woken())  # the loop checks the queue without a wake-up
        self.assertEqual((self.queue.take(), self.queue.take()), (["operation", "another"], []))

    def test_awake(self) -> None:
        """While the loop is awake, operations write nothing."""
        for _ in range(1000):
            self.queue.put("operation")
        self.assertFalse(self.woken())
        self.queue.take()
        self.assertTrue(self.queue.fall_asleep())
        for _ in range(1000):
            self.queue.put("operation")
        alarm = self.queue._alarm
        self.assertEqual(alarm and alarm.recv(10), b"!")
        self.assertFalse(self.woken())

    def test_quiet(self) -> None:
        """Operations of the quiet thread do not wake the loop, those of other threads do."""
        self.assertTrue(self.queue.fall_asleep())
        self.queue.quiet_thread = threading.get_ident()
        self.queue.put("operation")
        self.assertFalse(self.woken())
        with in_thread(self.queue.put, "another"):
            self.assertTrue(self.woken(DEADLINE))
        self.assertEqual(self.queue.take(), ["operation", "another"])

    def test_never_lost(self) -> None:
        """Threads wait for each of their operations, so a lost wake-up would stop them."""
        count, ended = 700, threading.Event()
        overslept: list[int] = []

        def loop() -> None:
            while not ended.is_set():
                if self.queue.fall_asleep() and not self.woken(DEADLINE):
                    overslept.append(1)
                self.queue._hear_alarm()
                for operation in self.queue.take():
                    operation()

        def put(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(count):
                done = threading.Event()
                self.queue.put(done.set)
                assert done.wait(DEADLINE)
                for _ in range(chance.randrange(200)):
                    pass

        with in_thread(loop):
            with contextlib.ExitStack() as stack:
                for seed in range(3):
                    stack.enter_context(in_thread(put, seed))
            ended.set()
            self.queue.put(ended.set)
        self.assertEqual(overslept, [])


class QueuedSenders(QueueTestCase):
    """Senders wait while too much is queued, or a quick client is behind."""

    def setUp(self) -> None:
        super().setUp()
        self.queue.loop_thread = -1  # of no client here
        self.sent: list[int] = []

    def send(self) -> contextlib.AbstractContextManager[threading.Thread]:
        """Start a thread that sends twenty messages, more than the queue holds."""

        def send() -> None:
            for number in range(20):
                self.queue.put_message(Outgoing(BINARY, bytes(pywebsock.QUEUE_SIZE // 10)))
                self.sent.append(number)

        return in_thread(send)

    def test_too_much(self) -> None:
        with self.send():
            eventually(lambda: self.queue._size > pywebsock.QUEUE_SIZE)
            self.assertLess(self.queue._size, 1.2 * pywebsock.QUEUE_SIZE)
            self.assertFalse(self.queue.wait_for_space(0.01))
            self.assertLessEqual(len(self.sent), 9)
            taken = len(self.queue.take())
            while taken < 20:
                taken += len(self.queue.take())
                time.sleep(0.001)
        self.assertEqual((self.sent, taken), (list(range(20)), 20))

    def test_held(self) -> None:
        self.queue.hold(True)
        with self.send():
            eventually(lambda: len(self.queue) == 1)
            self.assertFalse(self.queue.wait_for_space(0.01))
            self.assertEqual((self.sent, len(self.queue.take())), ([], 1))
            self.assertFalse(self.queue.wait_for_space(0.01))  # they still wait, although the queue is empty
            self.queue.hold(False)
            self.assertTrue(self.queue.wait_for_space(DEADLINE))
            eventually(lambda: self.queue.take() is not None and len(self.sent) == 20)

    def test_the_end(self) -> None:
        """No thread waits for a loop that has ended."""
        with self.send():
            eventually(lambda: self.queue._size > pywebsock.QUEUE_SIZE)
            self.queue.end()
        self.assertEqual(len(self.sent), 20)

    def test_the_loop_never_waits(self) -> None:
        self.queue.loop_thread = threading.get_ident()
        self.queue.hold(True)
        for _ in range(20):
            self.queue.put_message(Outgoing(BINARY, bytes(pywebsock.QUEUE_SIZE // 10)))
        self.assertTrue(self.queue.wait_for_space(0))

    def test_before_it_begins(self) -> None:
        """A program may send before the server is started, without waiting for the loop."""
        self.queue.loop_thread = 0
        with self.send():
            pass
        self.assertEqual(len(self.sent), 20)

    def test_many_recipients_count(self) -> None:
        """A message to hundreds of clients counts more than its bytes; one to thousands leaves room for a second."""
        for number, size in ((100, 100 * pywebsock.RECIPIENT_COST), (10_000, pywebsock.QUEUE_SIZE // 2)):
            self.queue.take()
            self.queue.put_message(Outgoing(TEXT, b"x", typing.cast(typing.Any, (number,) * number)))
            self.assertEqual(self.queue._size, size + pywebsock.MESSAGE_COST + 1)

    def test_known_recipients(self) -> None:
        """A recipient counts less if it gets another queued message, too: both are one send."""
        size = 0
        for first, known in ((0, 0), (0, 100), (50, 50), (300, 0)):
            to = typing.cast(typing.Any, tuple(range(first, first + 100)))
            self.queue.put_message(Outgoing(TEXT, b"x", to))
            size += pywebsock.MESSAGE_COST + 1
            size += pywebsock.KNOWN_COST * known + pywebsock.RECIPIENT_COST * (100 - known)
            self.assertEqual(self.queue._size, size)
        self.queue.take()
        self.queue.put_message(Outgoing(TEXT, b"x", to))
        self.assertEqual(self.queue._size, pywebsock.MESSAGE_COST + 1 + pywebsock.RECIPIENT_COST * 100)


class Count(unittest.TestCase):
    """The number of connections, for which the end of the server waits."""

    def setUp(self) -> None:
        self.room = pywebsock.Room(pywebsock.Queue(), 10, 0, 0)

    def test_wait(self) -> None:
        handlers = [typing.cast(pywebsock.WebSocketHandler, object()) for _ in range(3)]
        for handler in handlers:
            self.room.add_pending(handler, 0.0)
        self.room.wait_for(2, time.monotonic() + 0.01)
        self.assertEqual(self.room.size, 3)
        with in_thread(self.room.wait_for, 1, time.monotonic() + 2 * DEADLINE):
            self.assertEqual([self.room.remove(handler) for handler in handlers[:2] * 2], [True] * 2 + [False] * 2)
        self.assertEqual(self.room.size, 1)
        self.room.wait_for(0, time.monotonic() + 2 * DEADLINE, handlers[2])  # all but this one have ended

    def test_accepted_too_late(self) -> None:
        """A connection that is accepted while the server closes does not wait for its request."""
        handler = unittest.mock.Mock(verdict="")
        self.room.close_connections = unittest.mock.Mock()
        self.room.close_all()
        self.room.add_pending(handler, 0.0)
        self.assertEqual(handler.verdict, "the server is stopping")

    def test_turns(self) -> None:
        """The server accepts a connection when the number of waiting handlers falls: one gets its turn, or ends."""
        handlers = [typing.cast(pywebsock.RequestHandler, object()) for _ in range(pywebsock.MOST_WAITING + 1)]
        for leave in (self.room.take_turn, self.room.remove):
            for handler in handlers:
                self.room.add_pending(handler, 0.0)
            start = time.monotonic()
            with self.room.lock, in_thread(leave, handlers[0]):  # it gets the lock when this thread waits
                self.room.wait_for_turn(DEADLINE)
            self.assertLess(time.monotonic() - start, DEADLINE / 2, leave.__name__)


class Unfinished(RoomTestCase):
    """Connections with unfinished messages share the budget; if it is used up, they go on one at a time."""

    SIZE = 1000

    def setUp(self) -> None:
        super().setUp()
        self.budget = pywebsock.Budget(self.SIZE)
        self.unfinished = pywebsock.Unfinished(self.budget)

    def grow(self, connection: pywebsock.Connection, size: int, now: float = 0.0) -> bool:
        """Let the message of a connection grow; return whether the connection may go on."""
        opcode = 0 if connection.reader.size else BINARY
        list(connection.reader.feed(masked_frame(opcode, bytes(size), fin=False)))
        grown = self.unfinished.grow(connection, now)
        connection.paused = not grown
        return grown

    def connections(self, number: int) -> list[pywebsock.Connection]:
        """Return connections that have joined."""
        return [self.join()[0] for _ in range(number)]

    def test_the_first_may_exceed(self) -> None:
        a, b, c = self.connections(3)
        self.assertTrue(self.grow(a, 600))
        self.assertTrue(self.grow(b, 600))  # the first one above the budget
        self.assertTrue(self.grow(b, 5000))  # as many bytes as it needs
        self.assertFalse(self.grow(a, 1))
        self.assertFalse(self.grow(c, 1))
        self.assertEqual((self.unfinished.waiting, self.unfinished.take_ready()), ({a, c}, []))
        self.assertEqual((a.kept, b.kept, c.kept), (600, 5600, 0))

    def test_one_after_another(self) -> None:
        """After the first one, the connection that needs the fewest bytes goes on, also above the budget."""
        a, b, c = self.connections(3)
        self.grow(a, 5000)
        self.grow(b, 3000)
        self.grow(c, 2000)
        self.unfinished.release(a)
        self.assertEqual((self.unfinished.take_ready(), self.unfinished.waiting), ([c], {b}))
        self.assertTrue(self.unfinished.grow(c, 0.0))
        self.assertEqual(self.unfinished.take_ready(), [])
        self.unfinished.release(c)
        self.assertEqual((self.unfinished.take_ready(), self.unfinished.waiting), ([b], set()))

    def test_all_that_fit(self) -> None:
        """All connections go on that fit into the budget, the shortest first."""
        a, b, c, d = self.connections(4)
        self.grow(a, 5000)
        self.grow(b, 601)
        self.grow(c, 100)
        self.grow(d, 300)
        self.unfinished.release(a)
        self.assertEqual((self.unfinished.take_ready(), self.unfinished.waiting), ([c, d], {b}))
        self.assertEqual([self.unfinished.grow(each, 0.0) for each in (c, d)], [True, True])

    def test_room_to_the_last_byte(self) -> None:
        a, b, c = self.connections(3)
        self.grow(a, 5000)
        self.grow(b, 600)
        self.grow(c, 400)
        self.unfinished.release(a)
        self.assertEqual((self.unfinished.take_ready(), self.unfinished.waiting), ([c, b], set()))

    def test_a_reserve_for_short_messages(self) -> None:
        """Long messages leave an eighth of the budget to short ones."""
        a, b, c, d = self.connections(4)
        self.budget = pywebsock.Budget(800_000)
        self.unfinished = pywebsock.Unfinished(self.budget)
        self.grow(a, 650_000)
        self.assertTrue(self.grow(b, 120_000))  # the first one above its part of the budget
        self.assertTrue(self.grow(c, 20_000))
        self.assertFalse(self.grow(d, 110_000))
        self.assertEqual(self.budget.left, 10_000)

    def test_closed_while_it_waits(self) -> None:
        """If a waiting connection is closed, the next one gets its place."""
        a, b, c, d = self.connections(4)
        self.loop.sender.gate.unfinished = self.unfinished
        self.carry_out()
        self.grow(a, 5000)
        for connection in (b, c, d):
            self.grow(connection, 1)
        self.loop.sender.drop(b, "a test")
        self.assertEqual(self.unfinished.waiting, {c, d})
        c.state = pywebsock.State.ENDING
        self.unfinished.release(a)
        self.assertEqual((self.unfinished.take_ready(), self.unfinished.waiting), ([d], set()))

    def test_ended(self) -> None:
        """The part of an unfinished message is free again at once when the server ends the connection."""
        sender = pywebsock.Sender
        for act, arguments in ((sender.drop, ("a test",)), (sender.refuse, (1008, "a test"))):
            with self.subTest(act=act.__name__):
                self.setUp()
                (a,) = self.connections(1)
                self.loop.sender.gate.unfinished = self.unfinished
                self.carry_out()
                self.grow(a, 600)
                act(self.loop.sender, a, *arguments)
                self.assertEqual((self.budget.left, self.unfinished._holders), (self.SIZE, set()))

    def test_all_comes_back(self) -> None:
        chance = random.Random(1)
        connections = self.connections(10)
        for _ in range(300):
            connection = chance.choice(connections)
            if not connection.paused:
                self.grow(connection, chance.randrange(400))
            if chance.random() < 0.3:
                self.unfinished.release(connection)
                connection.reader = pywebsock.MessageReader(1 << 20)
            for ready in self.unfinished.take_ready():
                ready.paused = not self.unfinished.grow(ready, 0.0)
        for connection in connections:
            self.unfinished.release(connection)
        self.assertEqual((self.budget.left, self.unfinished._holders), (self.SIZE, set()))

    def test_slow_ones_that_have_gone(self) -> None:
        """An error while the loop ends a slow connection ends no other."""
        a, b = self.connections(2)
        gone = unittest.mock.Mock(side_effect=ConnectionResetError)
        with (
            unittest.mock.patch.object(self.loop.sender.gate.unfinished, "slow_ones", lambda _: [a, b]),
            unittest.mock.patch.object(self.loop.sender, "refuse", gone),
        ):
            self.loop._look_around()
        self.assertEqual(gone.call_count, 2)

    def test_slow_ones(self) -> None:
        """A connection is slow if others wait for it, and it has sent too few bytes in the time of grace."""
        grace = pywebsock.Unfinished.GRACE
        enough = int(grace * pywebsock.SLOWEST_POST)
        slow, quick, paused, first, waiting = self.connections(5)
        for connection in (slow, quick, paused, first):
            self.assertTrue(self.grow(connection, 300, now=100.0))
        slow.received, quick.received, first.received = enough - 1, enough, enough
        paused.received, paused.paused = 0, True
        self.assertEqual(self.unfinished.slow_ones(100.0 + grace), [])  # no connection waits
        self.assertFalse(self.grow(waiting, 1, now=100.0))
        self.assertEqual(self.unfinished.slow_ones(100.0 + grace - 0.01), [])
        self.assertEqual(self.unfinished.slow_ones(100.0 + grace), [slow])
        self.assertEqual((quick.began, quick.received), (100.0 + grace, 0))  # and again
        self.assertEqual(set(self.unfinished.slow_ones(100.0 + 2 * grace)), {slow, quick, first})


if __name__ == "__main__":
    unittest.main()

"""The outbox of one client: a Connection without a server, whose socket accepts as many bytes as the test sets."""

from __future__ import annotations

import random
import types
import typing
import unittest

import pywebsock
from pywebsock import QUICK_RATE, QUICK_TIME, SEND_SIZE, SENDS_AT_ONCE
from tests.tools.support import Pipe, peak_memory

EVERYTHING = 1 << 40  # bytes, more than any test sends


class ConnectionTestCase(unittest.TestCase):
    """A connection, its pipe, and a clock."""

    def setUp(self) -> None:
        self.now = 1000.0
        self.pipe = Pipe()
        self.connection = self.connect()

    def connect(self) -> pywebsock.Connection:
        """Return a new client; all clients have the same pipe."""
        client = types.SimpleNamespace(request=self.pipe, _tracers=())
        reader = pywebsock.MessageReader(1000)
        return pywebsock.Connection(typing.cast(pywebsock.WebSocketHandler, client), reader, 0, self.now)

    def keep(self, *pieces: bytes, sent: int = 0) -> None:
        """Queue these buffers, of whose first one some bytes were sent."""
        for piece in pieces:
            self.connection.keep(piece, sent, self.now)
            sent = 0

    def flush(self, room: int) -> None:
        """Send as much as the socket accepts with this room."""
        self.pipe.room = room
        self.connection.flush(self.now)

    def flush_all(self) -> None:
        """Send all queued data."""
        for _ in range(1 + self.connection.size):
            if not self.connection.size:
                return
            self.flush(EVERYTHING)


class Order(ConnectionTestCase):
    """Each byte is sent once, in order."""

    def test_part_by_part(self) -> None:
        self.keep(b"Hello, ", b"world", b"!", sent=3)
        for room, stream, size in ((0, b"", 10), (6, b"lo, wo", 4), (0, b"lo, wo", 4), (1, b"lo, wor", 3)):
            self.flush(room)
            self.assertEqual((self.pipe.stream, self.connection.size), (stream, size))
        self.flush_all()
        self.assertEqual((self.pipe.stream, self.connection.size), (b"lo, world!", 0))
        self.flush(EVERYTHING)
        self.assertEqual(self.pipe.stream, b"lo, world!")

    def test_empty_queue(self) -> None:
        self.flush(EVERYTHING)
        self.assertEqual((self.pipe.taken, self.connection.size), ([], 0))

    def test_any_pieces_and_any_socket(self) -> None:
        chance = random.Random(1)
        for _ in range(100):
            self.setUp()
            self.pipe.most = chance.choice((1, 7, EVERYTHING))
            expected = b""
            for _ in range(chance.randrange(20)):
                pieces = [chance.randbytes(chance.choice((1, 5, 100))) for _ in range(chance.randrange(4))]
                sent = 0 if self.connection.size or not pieces else chance.randrange(len(pieces[0]))
                self.keep(*pieces, sent=sent)
                expected += b"".join(pieces)[sent:]
                self.flush(chance.choice((0, 1, 50, 1000)))
                self.assertEqual(self.connection.size, len(expected) - len(self.pipe.stream))
            self.flush_all()
            self.assertEqual(self.pipe.stream, expected)

    def test_queue_is_empty_again(self) -> None:
        """A client with an empty queue has no list."""
        self.keep(b"Hello")
        self.assertIsNot(self.connection.pieces, pywebsock.NOTHING)
        self.flush_all()
        self.assertIs(self.connection.pieces, pywebsock.NOTHING)

    def test_errors(self) -> None:
        """Exceptions of the socket are raised, except BlockingIOError."""
        for error in (ConnectionResetError(), BrokenPipeError()):
            self.keep(b"Hello")
            self.pipe.error = error
            with self.assertRaises(type(error)):
                self.flush(EVERYTHING)


class SendingCost(ConnectionTestCase):
    """Queued data is shared, and sending it is cheap."""

    def test_shared_by_all(self) -> None:
        """A hundred stuck clients share their bytes."""
        message = bytes(4_000_000)
        connections = [self.connect() for _ in range(100)]

        def keep() -> None:
            for connection in connections:
                connection.keep(message, 0, self.now)

        self.assertLess(peak_memory(keep), 1_000_000)
        self.assertEqual({connection.size for connection in connections}, {len(message)})

    def test_a_large_piece_is_not_copied(self) -> None:
        """Neither the buffer nor its rest is copied."""
        self.keep(bytes(1_000_000), sent=1000)
        self.assertLess(peak_memory(self.flush_all), 300_000)
        self.assertEqual(self.connection.size, 0)

    def test_a_large_piece_among_others(self) -> None:
        """A large buffer is not copied, before or after other buffers."""
        for pieces in ((bytes(1_000_000), b"more"), (b"short", bytes(1_000_000))):
            self.setUp()
            self.keep(*pieces)
            self.assertLess(peak_memory(self.flush_all), 300_000)
            self.assertEqual(len(self.pipe.stream), sum(map(len, pieces)))

    def test_a_few_sends(self) -> None:
        """Few sends, none of which is much longer than SEND_SIZE."""
        self.keep(*[b"x" * 100] * 2000)
        self.flush_all()
        self.assertLess(max(map(len, self.pipe.taken)), 2 * SEND_SIZE)

    def test_many_short_pieces(self) -> None:
        """A thousand messages take a few sends."""
        self.keep(*[b"x" * 100] * 1000)
        self.flush_all()
        self.assertEqual(len(self.pipe.stream), 100_000)
        self.assertLess(len(self.pipe.taken), 5)

    def test_a_part_at_a_time(self) -> None:
        """Only a part of a long queue is sent at once, since other clients wait."""
        much = 10 * SENDS_AT_ONCE * SEND_SIZE
        for size in (SEND_SIZE, SEND_SIZE // 32):
            with self.subTest(size=size):
                self.setUp()
                self.keep(*[bytes(size)] * (much // size))
                self.flush(EVERYTHING)
                self.assertLessEqual(len(self.pipe.stream), 2 * SENDS_AT_ONCE * SEND_SIZE)
                self.assertGreater(self.connection.size, 0)
                while self.connection.size:
                    self.flush(EVERYTHING)
                self.assertEqual(len(self.pipe.stream), much)


class Quick(ConnectionTestCase):
    """A client counts as quick if it reads without delay."""

    def wait(self, seconds: float) -> bool:
        """Let time pass, and return whether the client is quick."""
        self.now += seconds
        return self.connection.is_quick(self.now)

    def test_empty_queue_before(self) -> None:
        """A client whose queue was empty is quick for a moment."""
        self.now += 10
        self.keep(bytes(100))
        self.assertTrue(self.wait(QUICK_TIME / 2))
        self.assertFalse(self.wait(QUICK_TIME / 2))

    def test_how_long(self) -> None:
        """It is quick for three quarters of QUICK_TIME, and not again without reading."""
        self.now += 4.01 * QUICK_TIME
        self.keep(bytes(100))
        self.assertTrue(self.wait(0.7 * QUICK_TIME))
        self.assertFalse(self.wait(0.1 * QUICK_TIME))
        self.keep(bytes(100))
        self.assertFalse(self.wait(0))

    def test_joined_a_moment_ago(self) -> None:
        self.now += 3.99 * QUICK_TIME
        self.keep(bytes(100))
        self.assertFalse(self.wait(0))

    def test_one_flush(self) -> None:
        """Data that is sent at once may fill only the kernel's buffer."""
        self.keep(*[bytes(SEND_SIZE)] * 2 * SENDS_AT_ONCE)
        self.flush(EVERYTHING)
        self.assertGreater(self.connection.size, 0)
        self.assertFalse(self.wait(0))

    def test_just_joined(self) -> None:
        """A new client is not quick yet."""
        self.keep(bytes(100))
        self.assertFalse(self.wait(0))

    def test_rate(self) -> None:
        """A client is quick while it reads at QUICK_RATE or faster."""
        self.keep(bytes(6 * QUICK_RATE))
        step = QUICK_TIME / 8
        for rate, is_quick in ((1.2, True), (0.8, False), (1.2, True), (0, False)):
            for _ in range(40):
                self.now += step
                self.flush(int(rate * QUICK_RATE * step))
            with self.subTest(rate=rate):
                self.assertEqual(self.wait(0), is_quick)

    def test_one_large_send(self) -> None:
        """One large send makes a client quick only for a moment."""
        self.keep(bytes(2 * QUICK_RATE))
        self.flush(QUICK_RATE)
        self.assertFalse(self.wait(QUICK_TIME))

    def test_moved(self) -> None:
        """The time at which the socket accepted data for the last time."""
        self.keep(b"Hello")
        for room, moved in ((0, 1000.0), (2, 1002.0), (0, 1002.0), (1, 1004.0)):
            self.now += 1
            self.flush(room)
            self.assertEqual(self.connection.moved, moved)


if __name__ == "__main__":
    unittest.main()

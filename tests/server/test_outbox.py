"""One connection's outbox: what its socket has yet to take. No server; the socket is as full as the test says."""

from __future__ import annotations

import random
import socket
import types
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.support import peak_memory

LIMIT = 1_000_000  # bytes, of each outbox


class Pipe:
    """A socket that takes `room` bytes, `most` in one send; what it took is in `taken`."""

    def __init__(self) -> None:
        self.room = self.most = 1 << 40
        self.taken: list[bytes] = []
        self.ends: list[int] = []  # shutdowns
        self.error: OSError | None = None

    def send(self, data: typing.Any, flags: int = 0) -> int:
        """What socket.send does."""
        if self.error:
            raise self.error
        size = min(len(data), self.room, self.most)
        if data and not size:
            raise BlockingIOError
        self.room -= size
        self.taken.append(data if size == len(data) else bytes(data[:size]))
        return size

    def shutdown(self, how: int) -> None:
        """What socket.shutdown does."""
        self.ends.append(how)

    @property
    def stream(self) -> bytes:
        """All that it took."""
        return b"".join(self.taken)


class OutboxTestCase(unittest.TestCase):
    """An outbox, its pipe, and a clock."""

    def setUp(self) -> None:
        self.clock = 1000.0
        clock = types.SimpleNamespace(monotonic=lambda: self.clock)
        patch = unittest.mock.patch.object(pywebsock, "time", clock)
        patch.start()
        self.addCleanup(patch.stop)
        self.pipe = Pipe()
        self.outbox = pywebsock.Outbox(self.pipe, LIMIT)

    def flush_all(self) -> None:
        """The socket takes everything."""
        self.pipe.room = 1 << 40
        for _ in range(1 + self.outbox.size):
            if self.outbox.size:
                self.outbox.flush(self.clock)


class Order(OutboxTestCase):
    """Every byte, once, in the order in which it was written."""

    def test_at_once(self) -> None:
        self.outbox.write([b"Hello, ", b"world"], self.clock)
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"Hello, world", 0))

    def test_the_rest_later(self) -> None:
        self.pipe.room = 3
        self.outbox.write([b"Hello, ", b"world"], self.clock)
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"Hel", 9))
        self.outbox.write([b"!"], self.clock)
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"Hel", 10))
        self.pipe.room = 6
        self.outbox.flush(self.clock)
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"Hello, wo", 4))
        self.flush_all()
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"Hello, world!", 0))

    def test_a_part_is_sent_already(self) -> None:
        """A fan-out has sent some bytes of the first piece."""
        for sent in range(6):
            with self.subTest(sent=sent):
                self.setUp()
                self.pipe.room = 1
                self.outbox.keep([b"Hello"], self.clock, sent)
                self.outbox.write([b", world"], self.clock)
                self.flush_all()
                self.assertEqual((self.pipe.stream, self.outbox.size), (b"Hello, world"[sent:], 0))

    def test_nothing(self) -> None:
        self.outbox.write([], self.clock)
        self.outbox.write([b""], self.clock)
        self.outbox.flush(self.clock)
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"", 0))

    def test_any_pieces_and_any_socket(self) -> None:
        chance = random.Random(1)
        for _ in range(300):
            self.setUp()
            self.pipe.most = chance.choice((1, 7, 1 << 40))
            expected = b""
            for _ in range(chance.randrange(20)):
                pieces = [chance.randbytes(chance.choice((0, 1, 5, 100))) for _ in range(chance.randrange(4))]
                expected += b"".join(pieces)
                self.pipe.room = chance.choice((0, 1, 50, 1000))
                if chance.random() < 0.5:
                    self.outbox.write(pieces, self.clock)
                else:
                    self.outbox.flush(self.clock)
                    expected = expected[: len(expected) - sum(map(len, pieces))]
                self.assertEqual(self.outbox.size, len(expected) - len(self.pipe.stream))
            self.flush_all()
            self.assertEqual(self.pipe.stream, expected)

    def test_forgotten(self) -> None:
        self.pipe.room = 1
        self.outbox.write([b"Hello"], self.clock)
        self.outbox.clear()
        self.assertEqual(self.outbox.size, 0)
        self.pipe.room = 100
        self.outbox.flush(self.clock)
        self.assertEqual(self.pipe.stream, b"H")


class Cost(OutboxTestCase):
    """What waits is shared; sending it on costs little."""

    def test_shared_by_all(self) -> None:
        """A hundred that are stuck have no bytes of their own."""
        message = bytes(4_000_000)
        outboxes = [pywebsock.Outbox(self.pipe, LIMIT) for _ in range(100)]
        self.pipe.room = 0

        def write() -> None:
            for outbox in outboxes:
                outbox.write([message], self.clock)

        self.assertLess(peak_memory(write), 1_000_000)
        self.assertEqual({outbox.size for outbox in outboxes}, {len(message)})

    def test_a_large_piece_is_not_copied(self) -> None:
        """Not even its rest."""
        message = bytes(4_000_000)
        self.pipe.room = 1000
        self.outbox.write([message], self.clock)
        self.pipe.room = 1 << 40
        self.assertLess(peak_memory(lambda: self.outbox.flush(self.clock)), 1_000_000)
        self.assertEqual(self.outbox.size, 0)

    def test_many_short_pieces(self) -> None:
        """A thousand messages are a few sends."""
        self.pipe.room = 0
        for _ in range(1000):
            self.outbox.write([b"x" * 100], self.clock)
        self.flush_all()
        self.assertEqual(len(self.pipe.stream), 100_000)
        self.assertLess(len(self.pipe.taken), 5)

    def test_a_part_at_a_time(self) -> None:
        """Others wait for the turn: of very much, only so much is sent at once."""
        self.pipe.room = 0
        pieces = 10 * pywebsock.SENDS_AT_ONCE
        for _ in range(pieces):
            self.outbox.write([bytes(pywebsock.SEND_SIZE)], self.clock + pywebsock.QUICK_TIME / 2)
            self.outbox._limit = 1 << 40
        self.pipe.room = 1 << 40
        self.outbox.flush(self.clock)
        self.assertLessEqual(len(self.pipe.stream), 2 * pywebsock.SENDS_AT_ONCE * pywebsock.SEND_SIZE)
        self.assertGreater(self.outbox.size, 0)
        self.flush_all()
        self.assertEqual(len(self.pipe.stream), pieces * pywebsock.SEND_SIZE)


class Behind(OutboxTestCase):
    """A client that is too far behind is lost; one that was quick until just now gets a moment."""

    def fall_behind(self) -> None:
        """As far as one may."""
        self.pipe.room = 0
        self.outbox.write([bytes(LIMIT)], self.clock)

    def grow_up(self) -> None:
        """Let the time pass in which a client has only just joined."""
        self.clock += 10

    def be_quick(self) -> None:
        """Take much in a short time, and have much to take."""
        self.grow_up()
        self.pipe.room = 0
        self.outbox.write([bytes(pywebsock.QUICK_SIZE + LIMIT)], self.clock)
        self.pipe.room = pywebsock.QUICK_SIZE
        self.outbox.flush(self.clock)
        self.assertEqual(self.outbox.size, LIMIT)

    def test_beyond_the_limit(self) -> None:
        self.grow_up()
        self.fall_behind()
        self.clock += 10
        self.outbox.write([b"x"], self.clock)  # up to the limit
        with self.assertRaisesRegex(ConnectionAbortedError, f"{LIMIT + 1} bytes behind"):
            self.outbox.write([b"x"], self.clock)

    def test_one_large_message_is_no_reason(self) -> None:
        """What is larger than the limit goes out to whoever had nothing waiting."""
        self.grow_up()
        self.pipe.room = 1000
        self.outbox.write([bytes(10 * LIMIT)], self.clock)
        self.flush_all()
        self.assertEqual(len(self.pipe.stream), 10 * LIMIT)

    def test_quick(self) -> None:
        self.be_quick()
        self.assertTrue(self.outbox.is_quick_but_behind())
        self.outbox.write([bytes(LIMIT)], self.clock)  # no error: senders wait for it
        self.outbox.write([b"x"], self.clock)

    def test_quick_for_a_moment_only(self) -> None:
        """One that takes nothing more is stuck."""
        self.be_quick()
        self.clock += pywebsock.QUICK_TIME * 1.01
        self.assertFalse(self.outbox.is_quick_but_behind())
        self.outbox.write([b"x"], self.clock)
        with self.assertRaises(ConnectionAbortedError):
            self.outbox.write([b"x"], self.clock)

    def test_just_joined(self) -> None:
        """Whoever joins, gets a long history and does not read has shown nothing yet."""
        self.fall_behind()
        self.assertFalse(self.outbox.is_quick_but_behind())
        self.outbox.write([b"x"], self.clock)
        self.clock += pywebsock.QUICK_TIME * 1.01
        self.assertTrue(self.outbox.is_too_far_behind())

    def test_just_joined_and_quick(self) -> None:
        """Whoever joins a room that is faster, and reads much, is waited for: else what waits would have no bound."""
        self.fall_behind()
        for _ in range(10):
            self.clock += pywebsock.QUICK_TIME / 10
            self.outbox.write([bytes(pywebsock.QUICK_SIZE // 4)], self.clock)
            self.pipe.room = pywebsock.QUICK_SIZE // 5
            self.outbox.flush(self.clock)
        self.assertTrue(self.outbox.is_quick_but_behind())
        self.assertFalse(self.outbox.is_too_far_behind())

    def test_not_quite_quick(self) -> None:
        """However long it goes on, and however large the pieces are that it takes."""
        self.grow_up()
        self.fall_behind()
        self.outbox.write([bytes(20 * pywebsock.QUICK_SIZE)], self.clock)
        self.clock += pywebsock.QUICK_TIME * 2
        for _ in range(40):
            self.clock += pywebsock.QUICK_TIME / 4
            self.pipe.room = pywebsock.QUICK_SIZE // 5
            self.outbox.flush(self.clock)
            self.assertFalse(self.outbox.is_quick_but_behind())

    def test_quick_and_not_behind(self) -> None:
        self.grow_up()
        self.outbox.write([bytes(pywebsock.QUICK_SIZE)], self.clock)
        self.assertFalse(self.outbox.is_quick_but_behind())

    def test_a_moment_for_everybody(self) -> None:
        """What has only just begun to wait is no reason either, however much it is."""
        self.grow_up()
        self.pipe.room = 0
        self.outbox.write([bytes(2 * LIMIT)], self.clock)
        self.outbox.write([b"x"], self.clock + pywebsock.QUICK_TIME * 0.99)

    def test_since_when(self) -> None:
        """`moved` says when the socket took something at last, or when something began to wait."""
        self.pipe.room = 0
        self.outbox.write([b"Hi"], 0.5)
        self.assertEqual(self.outbox.moved, 0.5)
        self.flush_all()
        self.pipe.room = 2
        self.outbox.write([b"Hello"], 1.0)
        self.assertEqual(self.outbox.moved, 1.0)
        self.outbox.flush(2.0)
        self.outbox.write([b"more"], 3.0)
        self.assertEqual(self.outbox.moved, 1.0)
        self.pipe.room = 1
        self.outbox.flush(4.0)
        self.assertEqual(self.outbox.moved, 4.0)


class Pongs(OutboxTestCase):
    """Pings are answered; where the answers would have to wait, the newest is enough (RFC 6455 5.5.3)."""

    def test_at_once(self) -> None:
        self.outbox.write_pongs([b"1", b"2", b"3"], self.clock)
        self.assertEqual(self.pipe.stream, b"123")

    def test_the_newest(self) -> None:
        """Behind what waits already, whatever follows."""
        self.pipe.room = 0
        self.outbox.write([b"message"], self.clock)
        for i in range(10_000):
            self.outbox.write_pongs([b"old", b"%d" % i], self.clock)
        self.assertEqual(self.outbox.size, len(b"message"))
        self.flush_all()
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"message9999", 0))
        self.outbox.write_pongs([b"next"], self.clock)
        self.assertEqual(self.pipe.stream, b"message9999next")

    def test_the_pong_has_to_wait_itself(self) -> None:
        self.pipe.room = 0
        self.outbox.write([b"message"], self.clock)
        self.outbox.write_pongs([b"pong"], self.clock)
        self.pipe.room = len(b"messagepo")
        self.outbox.flush(self.clock)
        self.assertEqual((self.pipe.stream, self.outbox.size), (b"messagepo", 2))
        self.flush_all()
        self.assertEqual(self.pipe.stream, b"messagepong")


class End(OutboxTestCase):
    """The own side of the connection is ended behind the last byte."""

    def test_at_once(self) -> None:
        self.outbox.write([b"bye"], self.clock)
        self.outbox.end(self.clock)
        self.assertEqual((self.pipe.stream, self.pipe.ends), (b"bye", [socket.SHUT_WR]))

    def test_behind_what_waits(self) -> None:
        """And no Pong after the Close (5.5.1)."""
        self.pipe.room = 0
        self.outbox.write([b"message"], self.clock)
        self.outbox.write_pongs([b"pong"], self.clock)
        self.outbox.write([b"close"], self.clock)
        self.outbox.end(self.clock)
        self.pipe.room = 8
        self.outbox.flush(self.clock)
        self.assertEqual(self.pipe.ends, [])
        self.flush_all()
        self.assertEqual((self.pipe.stream, self.pipe.ends), (b"messageclose", [socket.SHUT_WR]))

    def test_behind_very_much(self) -> None:
        """Of which only a part is sent at once."""
        self.pipe.room = 0
        self.outbox.write([bytes(2 * pywebsock.SENDS_AT_ONCE)], self.clock)
        self.outbox.end(self.clock)
        self.pipe.room, self.pipe.most = 1 << 40, 1
        self.outbox.flush(self.clock)
        self.assertEqual((len(self.pipe.stream), self.pipe.ends), (pywebsock.SENDS_AT_ONCE, []))
        self.flush_all()
        self.assertEqual((self.outbox.size, self.pipe.ends), (0, [socket.SHUT_WR]))


class Errors(OutboxTestCase):
    """What the socket raises comes out, wherever it happens."""

    def test_broken(self) -> None:
        for broken in (ConnectionResetError(), BrokenPipeError()):
            with self.subTest(error=broken):
                self.setUp()
                self.pipe.error = broken
                with self.assertRaises(type(broken)):
                    self.outbox.write([b"Hello"], self.clock)
                self.pipe.error = None
                self.setUp()
                self.pipe.room = 1
                self.outbox.write([b"Hello"], self.clock)
                self.pipe.error = broken
                with self.assertRaises(type(broken)):
                    self.outbox.flush(self.clock)

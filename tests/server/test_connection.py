"""The states of a connection, step by step. The server is not started; the test does the work of the loop."""

from __future__ import annotations

import collections
import contextlib
import math
import selectors
import socket
import ssl
import struct
import sys
import time
import typing
import unittest
import unittest.mock

import pywebsock
from pywebsock import QUICK_TIME, READ_SIZE, SEND_SIZE, SENDS_AT_ONCE, SMALL_READ_SIZE, State
from tests.tools.support import (
    CLOSE,
    DEADLINE,
    IS_WINDOWS,
    IS_WINE,
    NO_RESET,
    PING,
    PONG,
    TEXT,
    Pipe,
    Recorder,
    ServerTestCase,
    eventually,
    masked_frame,
    request,
)

LIMIT = 1_000_000  # bytes that may wait for a client
RESPONSE = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"


class Handler(pywebsock.WebSocketHandler):
    """A client without a handshake."""

    def handle(self) -> None:
        """The constructor calls this."""


def make_connection(server: pywebsock.BroadcastServer, request: typing.Any, window: int = 0) -> pywebsock.Connection:
    """Return a connection that has not joined."""
    handler = Handler(request, ("192.0.2.1", 5000), server)
    return pywebsock.Connection(handler, pywebsock.MessageReader(server.max_message), window, server._loop.now)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets with small buffers; the first one does not block."""
    far = socket.socket()
    far.settimeout(DEADLINE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        far.connect(listener.getsockname())
        near, _ = listener.accept()
    near.setblocking(False)
    return near, far


class ConnectionTestCase(ServerTestCase):
    """A server that is not started, and a connection whose socket is a pipe."""

    server: Recorder

    def setUp(self) -> None:
        self.server = self.make_server()
        self.now = 1000.0
        self.renew()

    def make_server(self, **settings: typing.Any) -> Recorder:
        """Make a server that is not started."""
        server = Recorder(("127.0.0.1", 0), **settings)
        self.addCleanup(server.server_close)
        return server

    def renew(self) -> None:
        """Make another pipe, and a connection that is not new."""
        self.pipe: typing.Any = Pipe()
        self.connection = make_connection(self.server, self.pipe)
        self.connection.joined = self.now - 100


class Slices(ConnectionTestCase):
    """With TLS, on Windows and with the trace, data is sent in slices; the sum is limited, too."""

    def test_much(self) -> None:
        sent = self.connection._send_slices(bytes(10_000_000))
        self.assertEqual(sent, len(self.pipe.stream))
        self.assertLess(sent, SENDS_AT_ONCE * SEND_SIZE)
        self.assertLessEqual(max(map(len, self.pipe.taken)), SEND_SIZE)

    def test_a_part(self) -> None:
        self.pipe.room = SEND_SIZE + 5
        self.assertEqual(self.connection._send_slices(bytes(3 * SEND_SIZE)), SEND_SIZE + 5)
        with self.assertRaises(BlockingIOError):
            self.connection._send_slices(b"Hello")

    def test_trace(self) -> None:
        """The trace gets only the bytes that the socket has accepted."""
        traced: list[bytes] = []

        def follow() -> typing.Generator[None, bytes, None]:
            while True:
                traced.append((yield))

        tracers = follow(), follow()
        for tracer in tracers:
            next(tracer)
        self.connection.client._tracers = tracers
        connection = pywebsock.Connection(self.connection.client, self.connection.reader, 0, self.now)
        self.pipe.room = 5
        self.assertEqual(connection.send(b"Hello, world"), 5)
        self.assertEqual(traced, [b"Hello"])


class Receive(ServerTestCase):
    """Reading from a socket, and the number of bytes to read at once."""

    def setUp(self) -> None:
        self.server = Recorder(("127.0.0.1", 0))
        self.addCleanup(self.server.server_close)
        near, self.far = tcp_pair()
        self.addCleanup(near.close)
        self.addCleanup(self.far.close)
        self.connection = make_connection(self.server, near)

    def receive(self) -> bytes | None:
        """Return the next bytes from the socket, within the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection.socket, selectors.EVENT_READ)
            self.assertTrue(selector.select(DEADLINE))
        return self.connection.receive()

    def test_nothing_yet(self) -> None:
        self.assertIsNone(self.connection.receive())
        self.assertFalse(self.connection.is_blocked)

    def test_the_end(self) -> None:
        self.far.sendall(b"bye")
        self.far.shutdown(socket.SHUT_WR)
        self.assertEqual([self.receive(), self.receive()], [b"bye", b""])

    @unittest.skipIf(IS_WINE, NO_RESET)
    def test_a_reset(self) -> None:
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if IS_WINDOWS else "ii", 1, 0))
        self.far.close()
        with self.assertRaises(ConnectionResetError):
            self.receive()

    def test_how_much(self) -> None:
        """Few bytes at first; four times as many if all of them have come; then few again."""
        for size, following in (
            (SMALL_READ_SIZE - 1, SMALL_READ_SIZE),
            (SMALL_READ_SIZE, 4 * SMALL_READ_SIZE),
            (SMALL_READ_SIZE // 2, 4 * SMALL_READ_SIZE),
            (4 * SMALL_READ_SIZE, 16 * SMALL_READ_SIZE),
            (16 * SMALL_READ_SIZE, 64 * SMALL_READ_SIZE),
            (64 * SMALL_READ_SIZE, READ_SIZE),
            (3, SMALL_READ_SIZE),
        ):
            with self.subTest(size=size):
                self.connection.socket = unittest.mock.Mock()
                self.connection.socket.recv.side_effect = lambda asked, size=size: bytes(min(asked, size))
                self.assertEqual(len(self.connection.receive() or b""), size)
                self.assertEqual(self.connection.read_size, following)

    def test_tls_has_to_write_first(self) -> None:
        self.connection.socket = unittest.mock.Mock(recv=unittest.mock.Mock(side_effect=ssl.SSLWantWriteError))
        self.assertIsNone(self.connection.receive())
        self.assertTrue(self.connection.is_blocked)
        self.connection.tls = unittest.mock.Mock(flush=unittest.mock.Mock(side_effect=BlockingIOError))
        self.connection.flush(0.0)
        self.assertTrue(self.connection.is_blocked)
        self.connection.tls.flush.side_effect = None
        self.connection.flush(0.0)
        self.assertFalse(self.connection.is_blocked)

    def test_tls_has_an_answer_to_send(self) -> None:
        """An answer of TLS that the socket did not accept is sent before more is read, or with the outbox."""
        self.connection.tls = unittest.mock.Mock(unsent=b"encrypted")
        self.connection.socket = unittest.mock.Mock(recv=lambda size: b"data")
        for pieces, blocked in ((b"", True), (b"x", False)):
            self.connection.is_blocked = False
            self.connection.pieces = collections.deque([pieces] if pieces else [])
            self.assertEqual(self.connection.receive(), b"data")
            self.assertEqual(self.connection.is_blocked, blocked)
        self.connection.pieces = pywebsock.NOTHING

    def test_end_of_sending(self) -> None:
        self.connection.end_sending()
        self.assertTrue(self.connection.is_shut)
        self.assertEqual(self.far.recv(1), b"")

    def test_end_of_sending_too_late(self) -> None:
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.far.close()
        with contextlib.suppress(ConnectionResetError):
            self.receive()
        self.connection.end_sending()
        self.assertTrue(self.connection.is_shut)

    def test_tls_sends_its_answers_before_it_reads(self) -> None:
        """If many answers wait, reading sends them first, or fails until the socket accepts them."""
        near, far = tcp_pair()
        for end in (near, far):
            self.addCleanup(end.close)
        tls = pywebsock.TLSSocket(near, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        self.addCleanup(tls.close)
        tls.setblocking(False)
        tls.unsent = bytes(1 << 20)
        with self.assertRaises(ssl.SSLWantWriteError):  # the socket is full
            tls.recv(1)
        left = len(tls.unsent)
        far.settimeout(DEADLINE)
        while tls.unsent:
            far.recv(1 << 20)
            with self.assertRaises((ssl.SSLWantWriteError, BlockingIOError)):  # there is nothing to read
                tls.recv(1)
        self.assertGreater(left, pywebsock.SEND_SIZE)

    def test_end_of_tls(self) -> None:
        """The server's alert must be sent; that of the peer need not come."""
        for error, shut in ((BlockingIOError, False), (None, True)):
            with self.subTest(error=error):
                tls = unittest.mock.Mock(spec=pywebsock.TLSSocket)
                tls.end_tls.side_effect = error
                connection = make_connection(self.server, tls)
                with contextlib.nullcontext() if shut else self.assertRaises(BlockingIOError):
                    connection.end_sending()
                self.assertEqual((connection.is_shut, tls.shutdown.called), (shut, shut))


class SenderTestCase(ServerTestCase):
    """A server that is not started: the test carries out the queue, and sets the clock."""

    server: Recorder

    def setUp(self) -> None:
        self.begin()

    def begin(self, **settings: typing.Any) -> None:
        """Start with a new server with these settings, and its first client."""
        self.doCleanups()
        self.use(Recorder(("127.0.0.1", 0), max_backlog=LIMIT, **settings))

    def use(self, server: typing.Any) -> None:
        """Use a server that is not started, and join its first client."""
        self.server, self.sender, self.room = server, server._loop.sender, server._room
        self.servers = [server]  # assertLogs waits for its log
        self.addCleanup(server.server_close)
        self.sender.selector = selectors.DefaultSelector()
        self.addCleanup(self.sender.selector.close)
        self.sender.now = 1000.0
        self.join()

    def join(self) -> None:
        """Join a client; `far` is its end of the connection."""
        near, self.far = tcp_pair()
        for end in (near, self.far):
            self.addCleanup(end.close)
        self.connection = make_connection(self.server, near)
        self.room.add_pending(self.connection.client, 0.0)
        self.room.join(self.connection, RESPONSE, "")
        self.server._loop._carry_out()
        self.assertEqual(self.far.recv(len(RESPONSE)), RESPONSE)
        self.connection.joined -= 100
        self.addCleanup(self.sender.drop, self.connection, "the end of the test")

    def fill(self) -> None:
        """Fill the socket, since the peer does not read."""
        self.sender.write(self.connection, bytes(LIMIT // 4))
        self.assertGreater(self.connection.size, LIMIT // 8)

    def drain(self) -> bytes:
        """Send until all data has arrived, and return it. The connection may end with a reset."""
        received, end = bytearray(), time.monotonic() + DEADLINE
        while time.monotonic() < end:
            self.sender.flush(self.connection)
            self.far.settimeout(DEADLINE if self.connection.state is State.CLOSED else 0)
            arrived = not self.connection.size and not pywebsock.bytes_in_kernel(self.connection.socket)[0]
            try:
                data = self.far.recv(1 << 20)
            except BlockingIOError:
                if arrived:
                    return bytes(received)
                time.sleep(0.001)
                continue
            except ConnectionResetError:
                data = b""
            if not data:
                return bytes(received)
            received += data
        raise AssertionError(f"{self.connection.size} bytes still wait")

    def was_reset(self) -> bool:
        """Return whether the peer sees a reset instead of the end; under Wine, only send() tells."""
        self.far.settimeout(DEADLINE)
        try:
            while self.far.recv(1 << 20):
                pass
            if IS_WINE:
                self.far.send(b"?")
        except ConnectionResetError:
            return True
        return False

    def heard(self) -> list[tuple[typing.Any, ...]]:
        """Return the arguments of on_close."""
        self.server._hooks.wait(0, time.monotonic() + DEADLINE)
        return [what[1:] for what in self.server.heard if what[0] == "close"]


FIRST, SECOND = pywebsock.serialize_close(1000, "first"), pywebsock.serialize_close(4000, "second")


class Transitions(SenderTestCase):
    """The table of State: each event in each state."""

    def reach(self, state: State) -> None:
        """Make a new connection in this state; the peer has read all earlier data."""
        self.begin()
        if state is State.CLOSING:
            self.sender.close(self.connection, FIRST)
        elif state is State.ENDING:
            self.sender.end(self.connection, 1000, "", FIRST)
        elif state is State.CLOSED:
            self.sender.drop(self.connection, "a test")
        self.assertIs(self.connection.state, state)
        self.drain()

    def test_all(self) -> None:
        violation = pywebsock.ProtocolError("bad", pywebsock.CloseCode.PROTOCOL_ERROR)
        told_1002 = pywebsock.serialize_close(1002, "bad")
        told_1009 = pywebsock.serialize_close(1009, "out of memory")
        o, c, e, x = State.OPEN, State.CLOSING, State.ENDING, State.CLOSED
        for act, arguments, ends in (
            (self.sender.close, (SECOND,), ((o, c, SECOND, None), (c, c, b"", None), (e, e, b"", 1000))),
            (self.sender.end, (4000, "", SECOND), ((o, e, SECOND, 4000), (c, e, b"", 4000), (e, e, b"", 1000))),
            (self.sender.peer_has_ended, (), ((o, x, b"", 1006), (c, x, b"", 1006), (e, x, b"", 1000))),
            (self.sender.fail, (violation,), ((o, e, told_1002, 1002), (c, e, b"", 1002), (e, e, b"", 1000))),
            (self.sender.fail, (MemoryError(),), ((o, e, told_1009, 1009), (c, e, b"", 1009), (e, e, b"", 1000))),
            (self.sender.fail, (OSError("reset"),), ((o, x, b"", 1006), (c, x, b"", 1006), (e, x, b"", 1000))),
            (self.sender.drop, ("late",), ((o, x, b"", 1006), (c, x, b"", 1006), (e, x, b"", 1000))),
            (self.sender.flush, (), ((o, o, b"", None), (c, c, b"", None), (e, e, b"", 1000))),
        ):
            for before, after, told, code in (*ends, (x, x, b"", 1006)):
                with self.subTest(act=act.__name__, arguments=arguments, before=before):
                    self.reach(before)
                    getattr(self.sender, act.__name__)(self.connection, *arguments)
                    self.assertIs(self.connection.state, after)
                    self.assertEqual(self.drain(), told)
                    self.assertEqual([heard[0] for heard in self.heard()], [code] if code else [])
                    self.assertEqual(self.connection.client in self.server.clients, not code)
                    self.assertEqual(self.room.size, int(after is not x))
                    self.assertEqual(self.connection.socket.fileno() < 0, after is x)

    def test_an_error_of_the_program(self) -> None:
        with self.assertLogs("pywebsock", "ERROR"):
            self.sender.fail(self.connection, LookupError("where?"))
        self.assertEqual(self.drain(), pywebsock.serialize_close(1011, "internal error"))
        self.assertEqual(self.heard(), [(1011, "internal error")])

    def test_an_error_while_it_fails(self) -> None:
        """A connection ends even if its Close cannot be sent."""
        self.connection.send = unittest.mock.Mock(side_effect=BrokenPipeError("gone"))
        self.sender.fail(self.connection, MemoryError())
        self.assertIs(self.connection.state, State.CLOSED)
        self.assertEqual([heard[0] for heard in self.heard()], [1009])
        self.assertEqual(self.room.size, 0)

    def test_end_after_queued_data(self) -> None:
        """The server's side ends after the last byte, and the socket is closed when the peer has ended, too."""
        for peer_first in (False, True):
            with self.subTest(peer_first=peer_first):
                self.begin()
                self.fill()
                self.sender.end(self.connection, 1000, "", FIRST)
                if peer_first:
                    self.sender.peer_has_ended(self.connection)
                self.assertEqual((self.connection.state, self.connection.is_shut), (State.ENDING, False))
                self.assertTrue(self.drain().endswith(FIRST))
                self.assertEqual(self.connection.is_shut, not peer_first or self.connection.state is State.CLOSED)
                if not peer_first:
                    self.assertIs(self.connection.state, State.ENDING)
                    self.sender.peer_has_ended(self.connection)
                self.assertIs(self.connection.state, State.CLOSED)

    def test_end_of_tls_that_must_wait(self) -> None:
        """If the socket does not accept the end of TLS, the server sends it when the socket accepts data again."""
        self.connection.tls = unittest.mock.Mock()
        self.connection.tls.end_tls.side_effect = [BlockingIOError, None]
        self.sender.end(self.connection, 1000, "", FIRST)
        self.assertEqual((self.connection.is_shut, self.connection.interest), (False, selectors.EVENT_WRITE))
        self.sender.flush(self.connection)
        self.assertEqual((self.connection.is_shut, self.connection.interest), (True, selectors.EVENT_READ))

    def test_reset(self) -> None:
        """A dropped client is reset, unless the kernel has accepted its last data."""
        for state, waits, reset in (
            (State.OPEN, True, True),
            (State.CLOSING, False, False),
            (State.CLOSING, True, True),
            (State.ENDING, False, False),
        ):
            with self.subTest(state=state, waits=waits):
                self.reach(State.OPEN)
                if waits:
                    self.fill()
                if state is State.CLOSING:
                    self.sender.close(self.connection, FIRST)
                elif state is State.ENDING:
                    self.sender.end(self.connection, 1000, "", FIRST)
                self.sender.drop(self.connection, "late")
                self.assertEqual(self.was_reset(), reset)
                self.assertEqual(self.server.status()["dropped"], int(state is State.OPEN))

    @unittest.skipUnless(sys.platform == "linux", "elsewhere the system does not tell what it has")
    def test_close_in_the_kernel(self) -> None:
        """If the kernel has accepted the Close, the client is not reset: its peer may still read."""
        pieces = 0
        while not self.connection.size:
            self.sender.write(self.connection, bytes(200))
            pieces += 1
        self.join()  # another one, whose socket accepts as much
        for _ in range(pieces - 5):
            self.sender.write(self.connection, bytes(200))
        self.sender.close(self.connection, FIRST)
        self.assertEqual(self.connection.size, 0)
        self.sender.drop(self.connection, "late")
        self.assertTrue(self.drain().endswith(FIRST))

    def test_a_dropped_one_reaches_no_hook(self) -> None:
        self.sender.drop(self.connection, "late")
        self.assertTrue(self.connection.client._is_closing)
        self.assertEqual(self.heard(), [(1006, "late")])


class Selector(SenderTestCase):
    """The events for which the selector waits, by the state of a connection."""

    def check(self, reads: bool, writes: bool) -> None:
        """Check the events for which the selector waits."""
        self.sender.watch(self.connection)
        events = selectors.EVENT_READ * reads | selectors.EVENT_WRITE * writes
        self.assertEqual(self.connection.interest, events)
        known = self.sender.selector.get_map()
        fileno = self.connection.socket.fileno()
        self.assertEqual(known[fileno].events if fileno in known else 0, events)

    def test_open(self) -> None:
        self.check(reads=True, writes=False)
        self.fill()
        self.check(reads=True, writes=True)
        self.connection.paused = True
        self.check(reads=False, writes=True)
        self.drain()
        self.check(reads=False, writes=False)
        self.connection.paused = False
        self.connection.tls, self.connection.is_blocked = unittest.mock.Mock(), True  # TLS must send first
        self.check(reads=False, writes=True)
        self.sender.flush(self.connection)
        self.check(reads=True, writes=False)

    def test_closing(self) -> None:
        self.sender.close(self.connection, FIRST)
        self.check(reads=True, writes=False)

    def test_ending(self) -> None:
        self.fill()
        self.sender.end(self.connection, 1000, "", FIRST)
        self.check(reads=False, writes=True)
        self.drain()
        self.check(reads=True, writes=False)

    def test_ending_while_paused(self) -> None:
        """The loop waits for the peer's end, even if reading is paused."""
        self.connection.paused = True
        self.sender.end(self.connection, 1000, "", FIRST)
        self.check(reads=True, writes=False)

    def test_about_to_end(self) -> None:
        """A connection that ends in a later round is not read."""
        self.server._loop.receiver.endings.add(self.connection, self.sender.end, 1000, "")
        self.assertEqual(self.connection.interest, 0)

    def test_closed(self) -> None:
        self.sender.drop(self.connection, "late")
        self.assertEqual(self.connection.interest, 0)
        self.assertEqual([key for key in self.sender.selector.get_map().values() if key.data], [])


class Backlog(SenderTestCase):
    """A client that is too far behind is dropped; for a client that was quick until now, senders wait."""

    def fall_behind(self, size: int) -> None:
        """Queue this number of bytes for a client that is not quick."""
        self.fill()
        self.connection.keep(bytes(size - self.connection.size), 0, self.sender.now)
        self.sender.now += QUICK_TIME
        self.assertEqual(self.connection.size, size)

    def test_up_to_the_limit(self) -> None:
        self.fall_behind(LIMIT - 1)
        self.sender.keep(self.connection, b"x", 0)
        self.assertIs(self.connection.state, State.OPEN)
        self.sender.keep(self.connection, b"x", 0)
        self.assertIs(self.connection.state, State.CLOSED)
        self.assertEqual(self.heard(), [(1006, f"it was {LIMIT} bytes behind")])
        self.assertTrue(self.was_reset())
        self.assertEqual((self.sender.slow, self.connection.size), (set(), 0))

    def test_one_long_message(self) -> None:
        """A message longer than the limit goes to a client with an empty queue."""
        self.sender.now += 1
        self.sender.keep(self.connection, bytes(2 * LIMIT), 100)
        self.assertIs(self.connection.state, State.OPEN)
        self.assertEqual(self.connection.moved, self.sender.now)
        self.assertEqual(len(self.drain()), 2 * LIMIT - 100)

    def test_a_long_message_after_a_short_one(self) -> None:
        """A client is dropped for the bytes that wait when a message comes, not for the length of this message."""
        self.fall_behind(LIMIT // 2)
        self.sender.keep(self.connection, bytes(LIMIT), 0)
        self.assertIs(self.connection.state, State.OPEN)
        self.sender.keep(self.connection, b"x", 0)
        self.assertIs(self.connection.state, State.CLOSED)
        self.assertEqual(self.heard(), [(1006, f"it was {LIMIT // 2 + LIMIT} bytes behind")])

    def is_held(self) -> bool:
        """Check the clients that are behind; return whether senders must wait."""
        self.sender.gate.look(self.sender.slow, self.sender.now)
        return self.server._queue.held

    def test_a_quick_one(self) -> None:
        self.sender.keep(self.connection, bytes(LIMIT), 0)
        self.sender.keep(self.connection, bytes(LIMIT), 0)
        self.assertIs(self.connection.state, State.OPEN)
        self.assertTrue(self.is_held())
        self.sender.now += QUICK_TIME
        self.assertFalse(self.is_held())
        self.sender.keep(self.connection, b"x", 0)
        self.assertIs(self.connection.state, State.CLOSED)

    def test_senders_that_wait(self) -> None:
        """A client whose message must wait is resumed when senders may go on, and not before."""
        gate, queue, now = self.sender.gate, self.server._queue, self.sender.now
        queue.hold(True)
        self.assertFalse(gate.lets_through(self.connection, now))
        self.assertEqual((gate.wait_time(now), gate.to_resume(now)), (pywebsock.HOLD_TIME, []))
        queue.hold(False)
        self.assertEqual((gate.to_resume(now), gate.wait_time(now)), ([self.connection], math.inf))
        self.assertTrue(gate.lets_through(self.connection, now))

    def test_far_behind(self) -> None:
        """Above half of the limit, senders wait."""
        self.sender.keep(self.connection, bytes(LIMIT // 2), 0)
        self.assertFalse(self.is_held())
        self.sender.keep(self.connection, b"x", 0)
        self.assertTrue(self.is_held())

    def test_a_closing_one(self) -> None:
        """The Close is queued even above the limit."""
        self.fall_behind(LIMIT)
        self.sender.close(self.connection, FIRST)
        self.assertIs(self.connection.state, State.CLOSING)
        self.assertTrue(self.drain().endswith(FIRST))

    def test_messages_while_others_wait(self) -> None:
        """A message is queued after the waiting ones; a closing client gets no more messages."""
        sends = self.room._sends[0]
        client = self.connection.client
        self.assertEqual(sends[client], self.connection.send)
        self.fill()
        self.assertIs(sends[client], pywebsock.send_nothing)
        self.assertEqual((self.sender.slow, self.server.status()["slow"]), ({self.connection}, 1))
        self.drain()
        self.assertEqual((sends[client], self.sender.slow), (self.connection.send, set()))
        self.fill()
        self.sender.close(self.connection, FIRST)
        self.assertIs(sends[client], pywebsock.discard)
        self.drain()
        self.assertIs(sends[client], pywebsock.discard)


class Pongs(SenderTestCase):
    """Pings are answered; if the Pongs must wait, only the newest is sent (RFC 6455 5.5.3)."""

    def test_at_once(self) -> None:
        self.sender.pong(self.connection, [b"1", b"2"])
        self.assertEqual(self.drain(), b"12")

    def test_the_newest(self) -> None:
        self.fill()
        size = self.connection.size
        for number in range(1000):
            self.sender.pong(self.connection, [b"old", b"new %d" % number])
        self.assertEqual(self.connection.size, size)
        received = self.drain()
        self.assertTrue(received.endswith(b"\0new 999"))
        self.sender.pong(self.connection, [b"next"])
        self.assertEqual(self.drain(), b"next")

    def test_none_after_a_close(self) -> None:
        """No frame follows a Close (5.5.1)."""
        for ends in (False, True):
            self.begin()
            self.fill()
            self.sender.pong(self.connection, [b"before"])
            if ends:
                self.sender.end(self.connection, 1000, "", FIRST)
            else:
                self.sender.close(self.connection, FIRST)
            self.sender.pong(self.connection, [b"after"])
            self.assertTrue(self.drain().endswith(b"\0" + FIRST))


PING_FRAME = pywebsock.serialize_frame(PING, b"")


class Deadlines(SenderTestCase):
    """The deadlines of a connection without progress, in seconds of the loop's clock."""

    def fill(self) -> None:
        """Fill the socket, and wait until no data is on its way."""
        super().fill()

        def is_still() -> bool:
            acked = pywebsock.bytes_in_kernel(self.connection.socket)[1]
            time.sleep(0.05)  # an acknowledgement may come 40 ms late
            return acked == pywebsock.bytes_in_kernel(self.connection.socket)[1]

        eventually(is_still)

    def look(self, later: float) -> None:
        """Check the deadlines of the connection, and return the next time to check."""
        self.sender.now += later
        self.server._loop.deadlines._look_at(self.connection)

    def check_end(self, after: float, reason: str) -> None:
        """Check that the client stays until a time, and is dropped with this reason after it."""
        self.look(after - 0.1)
        self.assertIsNot(self.connection.state, State.CLOSED)
        self.look(0.2)
        self.assertIs(self.connection.state, State.CLOSED)
        self.assertIn(reason, str(self.heard()[-1][1]))

    def test_nothing_moves(self) -> None:
        self.begin(send_timeout=7.0, ping_interval=0.0)
        self.fill()
        self.look(0)
        self.check_end(7.0, "it took nothing for 7 s")

    def test_it_moves(self) -> None:
        self.begin(send_timeout=7.0, ping_interval=0.0)
        self.fill()
        self.connection.keep(bytes(5 * LIMIT), 0, self.sender.now)
        for _ in range(5):
            self.look(6.0)
            self.far.recv(1 << 20)
            eventually(self.moves)
        self.assertIs(self.connection.state, State.OPEN)

    def moves(self) -> bool:
        """Return whether the socket accepts more data."""
        size = self.connection.size
        self.sender.flush(self.connection)
        return self.connection.size < size

    def test_no_data_to_send(self) -> None:
        self.begin(send_timeout=7.0, ping_interval=0.0)
        for _ in range(5):
            self.look(6.0)
        self.assertIs(self.connection.state, State.OPEN)
        self.fill()
        self.look(6.9)  # from the time at which the data began to wait
        self.assertIs(self.connection.state, State.OPEN)

    def test_ping_and_silence(self) -> None:
        self.begin(ping_interval=20.0, ping_timeout=5.0)
        self.look(19.9)
        self.assertEqual(self.drain(), b"")
        self.look(0.2)
        self.assertEqual(self.drain(), PING_FRAME)
        self.look(1.0)
        self.assertEqual(self.drain(), b"")
        self.check_end(4.0, "it was silent for")

    def test_ping_and_answer(self) -> None:
        self.begin(ping_interval=20.0, ping_timeout=5.0)
        for _ in range(3):
            self.look(20.1)
            self.assertEqual(self.drain(), PING_FRAME)
            self.connection.heard = self.sender.now + 4.0
            self.look(4.0)
            self.assertEqual(self.drain(), b"")
        self.assertIs(self.connection.state, State.OPEN)

    @unittest.skipUnless(sys.platform == "linux", "elsewhere the system does not tell what it has")
    def test_a_ping_in_the_kernel(self) -> None:
        """The time for the Pong starts when the peer has received all data before the Ping."""
        self.begin(ping_interval=1.0, ping_timeout=1.0)
        self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LIMIT)
        self.far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sender.write(self.connection, bytes(LIMIT // 8))
        self.assertEqual(self.connection.size, 0)  # the kernel has all
        self.far.settimeout(0)
        self.look(1.5)
        self.assertLess(self.connection.pong_deadline, math.inf)
        self.assertGreater(self.connection.ping_end, self.connection.acked)
        for _ in range(200):
            acked = self.connection.acked
            with contextlib.suppress(BlockingIOError):
                self.far.recv(20_000)
            eventually(lambda before=acked: pywebsock.bytes_in_kernel(self.connection.socket)[1] > before)  # type: ignore[misc]
            self.look(0.9)
            self.assertIs(self.connection.state, State.OPEN)
            if not self.connection.ping_end:
                break
        self.look(0.9)
        self.assertIs(self.connection.state, State.OPEN)
        self.look(0.9)
        self.assertIs(self.connection.state, State.CLOSED)

    def test_no_ping_after_queued_data(self) -> None:
        """While data is queued, there is no Ping, and no deadline for a Pong."""
        self.begin(ping_interval=1.0, ping_timeout=1.0, send_timeout=30.0)
        self.fill()
        size = self.connection.size
        for _ in range(20):
            self.look(1.0)
        self.assertEqual((self.connection.state, self.connection.size), (State.OPEN, size))

    def test_paused_reading(self) -> None:
        """A client that is not read is not dropped for missing Pongs, if its kernel has the Pings."""
        self.begin(ping_interval=1.0, ping_timeout=1.0)
        self.connection.paused = True
        for _ in range(20):
            self.look(1.0)
            eventually(lambda: not pywebsock.bytes_in_kernel(self.connection.socket)[0])
        self.assertIs(self.connection.state, State.OPEN)

    def test_paused_reading_elsewhere(self) -> None:
        """The same where the system does not tell what the peer has taken."""
        self.begin(ping_interval=1.0, ping_timeout=1.0)
        self.connection.paused = True
        with unittest.mock.patch.object(pywebsock, "bytes_in_kernel", lambda _: (0, 0)):
            for _ in range(20):
                self.look(1.0)
        self.assertIs(self.connection.state, State.OPEN)

    def test_a_few_at_once(self) -> None:
        """A round checks a few connections, the next rounds check the others; then there is a pause."""
        for _ in range(2):
            self.join()
        deadlines, look = self.server._loop.deadlines, unittest.mock.Mock()
        with (
            unittest.mock.patch.object(pywebsock, "LOOKS_AT_ONCE", 1),
            unittest.mock.patch.object(deadlines, "_look_at", look),
        ):
            for _ in range(3):
                self.assertLessEqual(deadlines.next_look, self.sender.now)
                deadlines.look()
        self.assertEqual({call.args[0] for call in look.mock_calls}, self.room.connections)
        self.assertEqual(deadlines.next_look, self.sender.now + deadlines.interval)

    def test_a_process_that_was_stopped(self) -> None:
        """The clock goes on by one interval at most, and the loop reads before it checks deadlines."""
        loop, before = self.server._loop, self.sender.now
        interval = loop.deadlines.interval
        for passed, now in ((1000.0, before + interval), (interval / 2, before + 1.5 * interval)):
            loop._before = time.monotonic() - passed
            loop._advance_clock()
            self.assertAlmostEqual(self.sender.now, now, delta=0.4 * interval)
            self.assertEqual(loop.deadlines.next_look, before + 2 * interval)

    def test_closing(self) -> None:
        self.begin(close_timeout=3.0, send_timeout=1.0, ping_interval=0.5)
        self.look(2.0)
        self.sender.close(self.connection, FIRST)
        self.drain()
        self.look(0)
        self.check_end(3.0, "it did not end the connection in time")

    def test_closing_a_stuck_client(self) -> None:
        """A stuck client gets the whole close timeout."""
        self.begin(close_timeout=3.0, send_timeout=30.0)
        self.fill()
        self.look(0)
        self.sender.now += 2.5
        self.sender.close(self.connection, FIRST)
        self.check_end(3.0, "it did not end the connection in time")

    def test_ending_a_stuck_client(self) -> None:
        self.begin(close_timeout=3.0, send_timeout=30.0)
        self.fill()
        self.look(0)
        self.sender.now += 2.5
        self.sender.end(self.connection, 1000, "bye", FIRST)
        self.check_end(3.0, "bye")

    def test_ending(self) -> None:
        """on_close has got the reason before."""
        self.begin(close_timeout=3.0)
        self.look(2.0)
        self.sender.end(self.connection, 1000, "bye", FIRST)
        self.drain()
        self.look(0)
        self.check_end(3.0, "bye")
        self.assertEqual(self.heard(), [(1000, "bye")])

    def test_old_bytes(self) -> None:
        """A closing client keeps queued data alive: at most as much as any other client."""
        self.begin(close_timeout=60.0)
        self.fill()
        self.sender.close(self.connection, FIRST)
        self.room.bytes += LIMIT
        self.look(0)
        self.assertIs(self.connection.state, State.CLOSING)
        self.room.bytes += 1
        self.look(0)
        self.assertIs(self.connection.state, State.CLOSED)

    def test_old_bytes_in_the_kernel(self) -> None:
        self.begin(close_timeout=60.0)
        self.sender.close(self.connection, FIRST)
        self.room.bytes += 2 * LIMIT
        self.look(0)
        self.assertIs(self.connection.state, State.CLOSING)


class LoopSteps(SenderTestCase):
    """The loop handles messages, one step at a time."""

    def test_messages_then_close(self) -> None:
        """The answer to a Close comes after all earlier messages; later messages are ignored."""
        self.doCleanups()
        self.use(pywebsock.BroadcastServer(("127.0.0.1", 0)))
        self.far.sendall(masked_frame(TEXT, b"1") + masked_frame(PING, b"?") + masked_frame(TEXT, b"2"))
        self.far.sendall(masked_frame(CLOSE, b"\x03\xe8") + masked_frame(TEXT, b"never"))
        eventually(lambda: self.step() is State.ENDING)
        received = self.drain()
        frames = [(TEXT, b"1"), (TEXT, b"2"), (PONG, b"?"), (CLOSE, b"\x03\xe8")]
        self.assertEqual(received, b"".join(pywebsock.serialize_frame(*frame) for frame in frames))

    def step(self) -> State:
        """Run one round of the loop for this connection."""
        self.server._loop.receiver.read(self.connection)
        self.server._loop._carry_out()
        self.server._loop.receiver.endings.carry_out()
        return self.connection.state

    def test_many_that_end(self) -> None:
        """A round ends connections for ROUND_TIME, at least one; the next rounds end the others."""
        endings, ended = self.server._loop.receiver.endings, list[pywebsock.Connection]()

        def end(connection: pywebsock.Connection) -> None:
            ended.append(connection)
            time.sleep(0.002)

        connections = [self.connection, *(make_connection(self.server, Pipe()) for _ in range(2))]
        for connection in connections * 2:
            endings.add(connection, end)
        with unittest.mock.patch.object(pywebsock, "ROUND_TIME", 0.001):
            for number in (1, 2, 3):
                endings.carry_out()
                self.assertEqual(ended, connections[:number])
        self.assertFalse(endings.waiting)

    def test_a_verdict_stays(self) -> None:
        """After a verdict, an event of the socket in the same round changes nothing."""
        lobby, handler = self.server._loop.lobby, unittest.mock.Mock(verdict="")
        lobby.selector = unittest.mock.Mock()
        lobby.wait(handler, selectors.EVENT_READ)
        lobby.go_on(handler, "given up")
        lobby.go_on(handler)
        self.assertEqual((handler.verdict, handler.go_on.call_count), ("given up", 1))

    def test_requests_after_the_end(self) -> None:
        """After the end of the loop, a handler ends its connection itself."""
        self.begin(close_timeout=0.0)
        self.server.server_close()
        for data, expected in (
            (b"GET", b""),
            (request(), b"HTTP/1.1 503 "),
            (request(target="/nothing", Upgrade=None, Sec_WebSocket_Key=None), b"HTTP/1.1 404 "),
        ):
            with self.subTest(data=data[:20]):
                near, far = tcp_pair()
                self.addCleanup(far.close)
                far.sendall(data)
                pywebsock.WebSocketHandler(near, ("192.0.2.1", 5000), self.server)
                response = far.makefile("rb").read()
                self.assertEqual(response[: len(expected)], expected)
                self.assertEqual(bool(response), bool(expected))
                eventually(lambda: not self.room.pending)

"""Hooks that close a client, hooks that raise exceptions, and a MemoryError in each system call.

Light tests, for the basic run, and the same in a busy room: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import threading
import typing

import pywebsock
from tests.tools import load, stress, support

REJECTED = 100
LARGE = load.frame(bytes(5_000_000))  # more than a socket accepts at once


class Gate(support.Recorder):
    """Closes clients of /rejected, and clients that send "bad"."""

    def on_open(self, client: pywebsock.WebSocketHandler) -> None:
        if client.target == "/rejected":
            client.close(1008, "not you")
        super().on_open(client)

    def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
        if message == "bad":
            client.close(1008, "not that")
        if client.target != "/talker":
            self._tell("message", message)
        self.broadcast(message)


class ClosedTest(support.ServerTestCase):
    """After `client.close()` in a hook, no more messages of that client reach a hook."""

    def check(self, server: Gate, first: bytes, expected: list[tuple[str, str]]) -> None:
        """Connect clients that send all these messages with their handshakes."""
        clients = [self.connect(server, handshake=False) for _ in range(REJECTED)]
        for client in clients:
            client.send_raw(first)
        support.eventually(lambda: len([what for what in server.heard if what[0] == "open"]) == REJECTED)
        for client in clients:
            client.frame(8, b"\x03\xf0")
        support.eventually(lambda: len([what for what in server.heard if what[0] == "close"]) == REJECTED)
        heard = collections.Counter(what for what in server.heard if what[0] == "message")
        self.assertEqual(heard, collections.Counter(expected * REJECTED))

    def talk(self, server: Gate) -> None:
        """Keep the loop busy with clients that send a message when the last has come back."""
        listeners = load.Load(server.server_address[1])
        talkers = [load.Sender(peer, i, 4000, at_once=8) for i, peer in enumerate(listeners.join(20, target="/talker"))]
        server.heard.clear()
        ended = threading.Event()

        def go_on() -> None:
            while not ended.is_set():
                for talker in talkers:
                    talker.go_on()
                listeners.step()

        thread = threading.Thread(target=go_on)
        thread.start()
        self.addCleanup(listeners.__exit__)
        self.addCleanup(thread.join, support.DEADLINE)
        self.addCleanup(ended.set)

    TEXTS = b"".join([support.masked_frame(1, text) for text in (b"good", b"bad", b"never", b"never")])

    def test_in_on_message(self) -> None:
        self.check(self.serve(Gate), support.request() + self.TEXTS, [("message", "good"), ("message", "bad")])

    def test_in_on_open(self) -> None:
        self.check(self.serve(Gate), support.request(target="/rejected") + self.TEXTS, [])

    @stress.heavy
    def test_in_on_open_of_a_busy_room(self) -> None:
        server = self.serve(Gate)
        self.talk(server)
        self.check(server, support.request(target="/rejected") + self.TEXTS, [])


class Failing(support.Recorder):
    """A server whose hooks raise the exception `error`, for clients whose target is the name of the hook."""

    error: BaseException = SystemExit(3)

    def _fail(self, client: pywebsock.WebSocketHandler, where: str) -> None:
        if client.target == f"/{where}":
            raise self.error

    def admit(self, client: pywebsock.WebSocketHandler) -> None:
        self._fail(client, "admit")

    def on_open(self, client: pywebsock.WebSocketHandler) -> None:
        super().on_open(client)
        self._fail(client, "on_open")

    def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
        self._fail(client, "on_message")
        super().on_message(client, message)

    def on_close(self, client: pywebsock.WebSocketHandler, code: int, reason: str) -> None:
        super().on_close(client, code, reason)
        self._fail(client, "on_close")


ERRORS: typing.Sequence[BaseException] = (
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    BaseException("anything"),
    StopIteration(),
    MemoryError(),
    RecursionError(),
    TimeoutError(),
    ConnectionResetError(),
    pywebsock.ProtocolError("raised by the program", pywebsock.CloseCode.POLICY_VIOLATION),
)


class RaisingTest(support.ServerTestCase):
    """An exception in a hook ends only that client, with on_close; it leaves the room before its socket is closed."""

    def check(self, error: BaseException, where: str) -> None:
        server = self.serve(Failing, error=error)
        witness = self.connect(server)
        with self.assertLogs("pywebsock"):
            with self.connect(server, target=f"/{where}") as client:
                client.send("hello")
                if where == "on_close":
                    client.close(1000)
                    client.read()
                code, _ = client.read_close()
            support.eventually(lambda: [what for what in server.heard if what[0] == "close"])
        told = [what for what in server.heard if what[0] == "close"]
        self.assertEqual(
            [what[1] for what in told], [code], "on_close is called once, with the code that the client gets"
        )
        self.assertIn(code, (1000,) if where == "on_close" else (1008, 1009, 1011))
        witness.send("still here")
        texts = [witness.read()]
        while texts[-1] != "still here":
            texts.append(witness.read())
        support.eventually(lambda: len(server.clients) == 1, "the client is still in the room")

    def check_all(self, where: str) -> None:
        """Check each exception in a hook."""
        for error in ERRORS:
            with self.subTest(repr(error)):
                self.check(error, where)

    def test_on_open(self) -> None:
        self.check_all("on_open")

    def test_on_message(self) -> None:
        self.check_all("on_message")

    def test_on_close(self) -> None:
        self.check_all("on_close")

    def test_admit(self) -> None:
        for error in ERRORS:
            with self.subTest(repr(error)):
                server = self.serve(Failing, error=error)
                with self.assertLogs("pywebsock"):
                    status, _, _ = support.exchange(server.server_address[1], support.request(target="/admit"))
                self.assertEqual(status, 500)
                self.assertEqual(server.heard, [])


# With SIGUSR1, each of these calls raises MemoryError a few times.
SHORTAGE = """
import selectors, signal, socket, threading
def failing(owner, name):
    act, left = getattr(owner, name), [0]
    def once(*arguments):
        if left[0]:
            left[0] -= 1
            raise MemoryError(name)
        return act(*arguments)
    setattr(owner, name, once)
    return left
class Selector(selectors.DefaultSelector):
    pass
class Alarm(socket.socket):
    def recv(self, size):
        return super().recv(size)
pair = socket.socketpair
socket.socketpair = lambda: [Alarm(fileno=end.detach()) for end in pair()]
{places}
selectors.DefaultSelector = Selector
def strike(number, frame):
    for left in places:
        left[0] = {times}
signal.signal(signal.SIGUSR1, strike)
"""

HOOK = "pywebsock.Program.on_message = lambda self, client, message: self.broadcast(message)\n"


@stress.heavy
class ShortageTest(stress.StressTestCase):
    """The server survives a MemoryError in each call."""

    def check(self, *places: str, times: int = 3, code: str = "") -> None:
        failing = [f"failing({place.rpartition('.')[0]}, {place.rpartition('.')[2]!r})" for place in places]
        code += SHORTAGE.format(places=f"places = [{', '.join(failing)}]", times=times)
        server = self.serve(code=code, failing=True)
        support.Client(server.port).__exit__()  # it has started
        os.kill(server.pid, signal.SIGUSR1)
        for _ in range(3 * times + 3):  # some clients are lost
            with contextlib.suppress(EOFError, ConnectionError), support.Client(server.port, small=True) as lost:
                lost.send_raw(LARGE)  # the clients do not read all data at once
                lost.read_frame()
        with support.Client(server.port) as client, support.Client(server.port, small=True) as other:
            other.send_raw(LARGE)
            self.assertEqual(client.read(), bytes(5_000_000))
            self.assertEqual(other.read(), bytes(5_000_000))
            server.send_signal(signal.SIGTERM)
            self.assertEqual(client.read_frame().payload, b"\x03\xe9")
        self.assertEqual(server.wait(), 0, server.log())
        self.assertNotIn("Exception in thread", server.log())
        self.assertNotIn("Unhandled exception", server.log())

    def test_select(self) -> None:
        self.check("Selector.select")

    def test_select_of_the_accepting_thread(self) -> None:
        self.check("selectors.PollSelector.select")

    def test_alarm(self) -> None:
        """The socket that wakes the loop."""
        self.check("Alarm.recv")

    def test_recv(self) -> None:
        self.check("socket.socket.recv")

    def test_send(self) -> None:
        self.check("socket.socket.send")

    def test_selector(self) -> None:
        self.check("Selector.register", "Selector.modify")

    def test_accept(self) -> None:
        self.check("socket.socket.accept")

    def test_start_of_a_worker(self) -> None:
        """A thread that runs hooks and writes the log."""
        self.check("threading.Thread.start", code=HOOK)

    def test_close(self) -> None:
        self.check("socket.socket.shutdown", "socket.socket.close", "socket.socket.setsockopt")

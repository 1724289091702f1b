"""What the tests share that try to break the server: a server in a process of its own, many clients in this one.

Tests that take minutes run only with PYWEBSOCK_TESTS=everything; each prints the figures that it measured. Where the
size of a test is a question of patience, an environment variable sets it: PYWEBSOCK_PUSH (MB), PYWEBSOCK_STRESS and
PYWEBSOCK_SOAK (seconds), PYWEBSOCK_SIGNALS.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import functools
import re
import shutil
import signal
import socket
import ssl
import struct
import sys
import tempfile
import time
import typing
import unittest

from tests.tools import faults, load, support
from tests.tools.witness import URGENT, Listeners, Witness

CLOSE_TIMEOUT = 5.0  # seconds: of the server
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset
QUIET = ("--no-compression", "--ping", "0")  # nothing in a stream but numbered messages
TROUBLE = re.compile("Traceback|unexpected error|an error|operation failed|Warning|Exception ignored")
heavy = unittest.skipUnless(support.EVERYTHING, "takes minutes: PYWEBSOCK_TESTS=everything")


@functools.cache
def certificate() -> tuple[str, ssl.SSLContext]:
    """One for localhost, for all tests: its file, which is also that of its key, and a context for clients."""
    folder = tempfile.mkdtemp(prefix="pywebsock-")
    atexit.register(shutil.rmtree, folder)
    return support.certificate(folder)


def quantiles(delays: typing.Sequence[float]) -> str:
    """The middle, the tail and the worst, for people."""
    ordered = sorted(delays)
    middle, tail = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"{len(ordered)} echoes, p50 {middle * 1e3:.1f} ms, p99 {tail * 1e3:.1f} ms, max {ordered[-1] * 1e3:.1f} ms"


# ---- the attackers' crowds ----


class Crowd:
    """Many sockets, plain and waiting, for things that all do at once: as cheap as can be for the attacker."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.sockets: list[socket.socket] = []

    def connect(self, number: int, source: str = "127.0.0.1") -> None:
        """So many connections that have said nothing."""
        for _ in range(number):
            one = socket.socket()
            self.sockets.append(one)
            one.settimeout(3 * support.DEADLINE)
            if source != "127.0.0.1":
                one.bind((source, 0))
            one.connect(("127.0.0.1", self._port))

    def join(self, number: int, at_once: int = 200, **fields: typing.Any) -> None:
        """So many clients in the room."""
        asked = support.request(**fields)
        for start in range(0, number, at_once):
            before = len(self.sockets)
            self.connect(min(at_once, number - start))
            for one in self.sockets[before:]:
                one.sendall(asked)
            for one in self.sockets[before:]:
                answer = one.recv(100, socket.MSG_PEEK)  # the rest stays where it is
                if not answer.startswith(b"HTTP/1.1 101 "):
                    raise load.LoadError(f"did not get in: {answer!r}")

    def send(self, data: bytes) -> None:
        """All send the same."""
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.send(data)

    def reset(self) -> None:
        """All end with a reset."""
        self.sockets = [one for one in self.sockets if one.fileno() >= 0]
        for one in self.sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for one in self.sockets:
            one.close()
        self.sockets.clear()

    def ends(self) -> collections.Counter[bytes]:
        """How each one's connection ended: the last bytes of the stream."""
        return collections.Counter(map(last_bytes, self.sockets))


def arrived(one: socket.socket) -> bytes:
    """All that has come."""
    data = bytearray()
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while piece := one.recv(1 << 20):
            data += piece
    return bytes(data)


def last_bytes(one: socket.socket) -> bytes:
    """The last four bytes from the server, whose Close is answered; or what ended it without one. It is closed then."""
    last, data, answered = b"", b"more", False
    try:
        while data:
            data = one.recv(1 << 20)
            last = (last + data)[-4:]
            if last == load.GOING_AWAY and not answered:
                one.send(load.frame(load.GOING_AWAY[2:], 8))
                answered = True
    except OSError as error:
        return last if answered else type(error).__name__.encode()
    finally:
        one.close()
    return last


# ---- the server ----


def descriptors() -> int:
    """How many this process may have; as many as it may be given."""
    import resource  # not on Windows

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most if most != resource.RLIM_INFINITY else 1 << 20


def processor(pid: int, seconds: float) -> float:
    """The part of one processor that a process uses."""
    before, start = load.cpu(pid), time.monotonic()
    time.sleep(seconds)
    return (load.cpu(pid) - before) / (time.monotonic() - start)


class Gauge:
    """What a server had before an attack, to compare with."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.threads, self.files = load.threads(pid), load.files(pid)
        self.memory, self.cpu, self.start = load.memory(pid), load.cpu(pid), time.monotonic()

    @property
    def growth(self) -> float:
        """MB more than at the start, at most."""
        return load.peak(self.pid) - self.memory

    def is_back(self) -> bool:
        """Whether threads and descriptors are where they were."""
        return load.threads(self.pid) <= self.threads and load.files(self.pid) <= self.files

    def wait_until_idle(self, deadline: float, seconds: float = 0.5) -> None:
        """Threads, descriptors and processor must be back where they were; for how long to watch the last."""
        try:
            support.eventually(self.is_back, deadline=deadline)
        except AssertionError:
            now = f"{load.threads(self.pid)} threads and {load.files(self.pid)} descriptors"
            message = f"{now} after {deadline:g} s, {self.threads} and {self.files} before"
            raise AssertionError(message) from None
        used = processor(self.pid, seconds)
        if used > 0.3:
            raise AssertionError(f"{100 * used:.0f} % of a processor is used when nobody does anything")


class WatchedServer(Gauge):
    """A server in a process of its own and its witness."""

    def __init__(self, server: support.Process, tls: str = "") -> None:
        self.server, self.port = server, server.port
        self.witness = Witness(server.port, tls)
        support.eventually(lambda: self.witness.figures().echoes, "the witness hears nothing")
        super().__init__(server.pid)

    def wait_until_idle(self, deadline: float, seconds: float = 0.5) -> None:
        """Who connects last is served last: only then the server has met all who came, and what it uses is its own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=deadline) as last:
            last.shutdown(socket.SHUT_WR)
            last.recv(100)  # nothing, or that the room is full
        super().wait_until_idle(deadline, seconds)

    def log(self) -> str:
        """What the server has logged so far."""
        return self.server.log()


class StressTestCase(unittest.TestCase):
    """Tests of a server in a process of its own, with crowds and attackers in this one."""

    def serve_watched(self, *arguments: str, tls: bool = False, code: str = "", **how: typing.Any) -> WatchedServer:
        """A server with its default settings and these arguments, and its witness; `code` is run before it starts."""
        server = self.serve(*arguments, tls=tls, code=URGENT + code, **how)
        watched = WatchedServer(server, certificate()[0] if tls else "")
        self.addCleanup(watched.witness.end)
        return watched

    def serve(
        self,
        *arguments: str,
        tls: bool = False,
        code: str = "",
        python: typing.Sequence[str] = (),
        failing: bool = False,
        **how: typing.Any,
    ) -> support.Process:
        """A server without a witness. Unless it is `failing`, it must end well and have nothing to complain about."""
        secure = ("--cert", certificate()[0]) if tls else ()
        changed = faults.changed(code) if code else ()
        server = support.Process(*arguments, *secure, python=[*python, *changed], **how)
        self.addCleanup(server.kill if failing else functools.partial(self._end, server))
        return server

    def _end(self, server: support.Process) -> None:
        status, log = server.stop(), server.log()
        self.assertEqual((status, TROUBLE.findall(log)), (0, []), log[-5000:])

    def crowd(self, server: support.Process | WatchedServer) -> Crowd:
        """A crowd of it, which is reset in the end."""
        descriptors()
        crowd = Crowd(server.port)
        self.addCleanup(crowd.reset)
        return crowd

    def clients(self, server: support.Process | WatchedServer) -> load.Load:
        """Clients of it that go on in this thread, over TLS where they are told to."""
        secure = "wss:" in (server.server if isinstance(server, WatchedServer) else server).first_line
        clients = load.Load(server.port, certificate()[1] if secure else None)
        self.addCleanup(clients.__exit__)
        return clients

    def check_health(self, watched: WatchedServer, what: str, worst: float = 0.5, growth: float = 500.0) -> None:
        """The figures of an attack that goes on or has just ended: the worst echo in seconds, memory in MB."""
        seen = watched.witness.figures()
        spent, took = load.cpu(watched.pid) - watched.cpu, time.monotonic() - watched.start
        self.report(
            f"{what}: worst echo {seen.worst:.3f} s of {seen.echoes} (itself late {seen.late:.3f} s), "
            f"memory +{watched.growth:.0f} MB, {spent:.1f} s of CPU in {took:.1f} s"
        )
        self.assertEqual(seen.end, "", "the witness was cut off")
        self.assertLess(seen.worst, worst + seen.late, f"{what}: seconds of an honest client's worst echo")
        self.assertLess(watched.growth, growth, f"{what}: MB more than before")

    def check_recovery(
        self, watched: WatchedServer, what: str, worst: float = 0.5, growth: float = 500.0, within: float = 30
    ) -> None:
        """The attack is over: all must be as before, so many seconds later, and have been well meanwhile. It stops."""
        try:
            watched.wait_until_idle(within)
        finally:
            self.check_health(watched, what, worst, growth)
        self.stop(watched)

    def stop(self, watched: WatchedServer, listeners: Listeners | None = None, timeout: float = CLOSE_TIMEOUT) -> None:
        """SIGTERM ends it with 0 within the close timeout, and the witness and the listeners get 1001."""
        start = time.monotonic()
        watched.server.send_signal(signal.SIGTERM)
        status = watched.server.wait(timeout + 2)
        took = time.monotonic() - start
        support.eventually(lambda: watched.witness.figures().end, "the witness has no end")
        end = watched.witness.figures().end
        ends = listeners.ends() if listeners else collections.Counter()
        self.report(f"stopped within {took:.1f} s with {status}, the witness got {end}, listeners {dict(ends)}")
        self.assertEqual((status, end), (0, "1001"), watched.log()[-3000:])
        self.assertLessEqual(set(ends), {"1001"})
        self.assertEqual(TROUBLE.findall(watched.log()), [], watched.log()[-5000:])

    def chat(self, clients: load.Load, number: int = 2, **how: typing.Any) -> list[load.Sender]:
        """Clients that send small messages, each the next when the last has come back: what others notice."""
        peers = clients.join(number, **how)
        return [load.Sender(peer, 1000 + i, 64, at_once=1) for i, peer in enumerate(peers)]

    def pace(self, clients: load.Load, number: int, size: int, pace: float, **how: typing.Any) -> list[load.Sender]:
        """Clients that send so many messages a second each, whatever happens."""
        return [load.Sender(peer, i, size, pace=pace) for i, peer in enumerate(clients.join(number, **how))]

    def settle(self, clients: load.Load, senders: typing.Sequence[load.Sender], deadline: float = 30) -> None:
        """Stop sending and wait until all have got everything, in one order."""
        for sender in senders:
            sender.stop()
        total = sum(sender.count for sender in senders)
        clients.run(lambda: all(sender.answered for sender in senders), deadline)
        clients.run(lambda: all(sender.stream.messages == total for sender in senders), deadline)
        self.assertEqual(len({sender.stream.digest for sender in senders}), 1, "not the same order for all")
        self.assertEqual([sender.peer.ended for sender in senders if sender.peer.ended], [])

    def number(self, server: support.Process) -> int:
        """Of clients in the room."""
        tls = certificate()[1] if "wss:" in server.first_line else None
        body = support.exchange(server.port, b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n", tls=tls)[2]
        return int(body.partition(b'"clients": ')[2].partition(b",")[0])

    def report(self, text: str) -> None:
        """Print a figure."""
        if support.EVERYTHING:
            print(f"    {self.id().rpartition('tests.stress.')[2]}: {text}", file=sys.stderr, flush=True)


def go_on(senders: typing.Iterable[load.Sender]) -> typing.Callable[[], None]:
    """What to do meanwhile: let them send what is due."""

    def send() -> None:
        for sender in senders:
            sender.go_on()

    return send

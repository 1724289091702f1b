"""Shared by the stress tests: a server in its own process, and many clients in this one.

Tests that take minutes run only with PYWEBSOCK_TESTS=everything; each prints its figures. Environment variables make
some tests longer: PYWEBSOCK_PUSH (MB), PYWEBSOCK_STRESS and PYWEBSOCK_SOAK (seconds), PYWEBSOCK_SIGNALS.
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

CLOSE_TIMEOUT = 5.0  # seconds; the default of the server
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset
QUIET = ("--no-compression", "--ping", "0")  # no frames but numbered messages
TROUBLE = re.compile("Traceback|unexpected error|an error|operation failed|Warning|Exception ignored")
heavy = unittest.skipUnless(support.EVERYTHING, "takes minutes: PYWEBSOCK_TESTS=everything")


@functools.cache
def certificate() -> tuple[str, ssl.SSLContext]:
    """Return a certificate for localhost: a file with its key, and a context for clients."""
    folder = tempfile.mkdtemp(prefix="pywebsock-")
    atexit.register(shutil.rmtree, folder)
    return support.certificate(folder)


def quantiles(delays: typing.Sequence[float]) -> str:
    """Return a line with the median, the 99th percentile and the maximum of delays (seconds)."""
    ordered = sorted(delays)
    middle, tail = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"{len(ordered)} echoes, p50 {middle * 1e3:.1f} ms, p99 {tail * 1e3:.1f} ms, max {ordered[-1] * 1e3:.1f} ms"


# ---- many clients of an attacker ----


class Crowd:
    """Many blocking sockets without TLS that all do the same. They cost an attacker little."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.sockets: list[socket.socket] = []

    def connect(self, number: int, source: str = "127.0.0.1") -> None:
        """Open connections that send nothing."""
        for _ in range(number):
            one = socket.socket()
            self.sockets.append(one)
            one.settimeout(3 * support.DEADLINE)
            if source != "127.0.0.1":
                one.bind((source, 0))
            one.connect(("127.0.0.1", self._port))

    def join(self, number: int, at_once: int = 200, **fields: typing.Any) -> None:
        """Connect clients and wait until they are in the room."""
        asked = support.request(**fields)
        for start in range(0, number, at_once):
            before = len(self.sockets)
            self.connect(min(at_once, number - start))
            for one in self.sockets[before:]:
                one.sendall(asked)
            for one in self.sockets[before:]:
                answer = one.recv(100, socket.MSG_PEEK)  # the rest stays in the socket
                if not answer.startswith(b"HTTP/1.1 101 "):
                    raise load.LoadError(f"did not get in: {answer!r}")

    def send(self, data: bytes) -> None:
        """Send the same bytes on all connections."""
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.send(data)

    def receive(self, expected: bytes) -> None:
        """Wait until these bytes have arrived on all connections."""
        for one in self.sockets:
            data = b""
            while expected not in data:
                more = one.recv(1 << 20)
                if not more:
                    raise load.LoadError(f"the connection ended without {expected!r}")
                data += more

    def reset(self) -> None:
        """Close all connections with a reset."""
        self.sockets = [one for one in self.sockets if one.fileno() >= 0]
        for one in self.sockets:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for one in self.sockets:
            one.close()
        self.sockets.clear()

    def ends(self) -> collections.Counter[bytes]:
        """Count how the connections ended: by the last bytes of each stream."""
        return collections.Counter(map(last_bytes, self.sockets))


def arrived(one: socket.socket) -> bytes:
    """Return all data that has arrived."""
    data = bytearray()
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while piece := one.recv(1 << 20):
            data += piece
    return bytes(data)


def last_bytes(one: socket.socket) -> bytes:
    """Read to the end, answer a Close, and close the socket; return the last four bytes, or the name of the error."""
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
    """Raise the limit of file descriptors of this process as far as possible, and return it."""
    import resource  # not on Windows

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most if most != resource.RLIM_INFINITY else 1 << 20


def processor(pid: int, seconds: float) -> float:
    """Return the part of one processor that a process uses, measured for this time."""
    before, start = load.cpu(pid), time.monotonic()
    time.sleep(seconds)
    return (load.cpu(pid) - before) / (time.monotonic() - start)


class Gauge:
    """The threads, file descriptors, memory and CPU time of a server before an attack."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.threads, self.files = load.threads(pid), load.files(pid)
        self.memory, self.cpu, self.start = load.memory(pid), load.cpu(pid), time.monotonic()

    @property
    def growth(self) -> float:
        """Peak memory above that at the start (MB)."""
        return load.peak(self.pid) - self.memory

    def is_back(self) -> bool:
        """Return whether there are no more threads and descriptors than at the start."""
        return load.threads(self.pid) <= self.threads and load.files(self.pid) <= self.files

    def wait_until_idle(self, deadline: float, seconds: float = 0.5) -> None:
        """Wait for the threads and descriptors of the start; then until the CPU is idle for `seconds`."""
        try:
            support.eventually(self.is_back, deadline=deadline)
        except AssertionError:
            now = f"{load.threads(self.pid)} threads and {load.files(self.pid)} descriptors"
            message = f"{now} after {deadline:g} s, {self.threads} and {self.files} before"
            raise AssertionError(message) from None
        end = time.monotonic() + deadline
        while (used := processor(self.pid, seconds)) > 0.3:  # it may still compress what nobody waits for
            if time.monotonic() > end:
                raise AssertionError(f"{100 * used:.0f} % of a processor is used by an idle server")


class WatchedServer(Gauge):
    """A server in its own process, with a witness: a client that measures the delay of its own messages."""

    def __init__(self, server: support.Process, tls: str = "") -> None:
        self.server, self.port = server, server.port
        self.witness = Witness(server.port, tls)
        support.eventually(lambda: self.witness.figures().echoes, "the witness gets nothing")
        super().__init__(server.pid)

    def wait_until_idle(self, deadline: float, seconds: float = 0.5) -> None:
        """Connect once more first: when this connection is served, the server has accepted all earlier ones."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=deadline) as last:
            last.shutdown(socket.SHUT_WR)
            last.recv(100)  # the end, or a 503
        super().wait_until_idle(deadline, seconds)

    def log(self) -> str:
        """Return the log of the server."""
        return self.server.log()


class StressTestCase(unittest.TestCase):
    """Tests of a server in its own process; clients and attackers are in this one."""

    def serve_watched(self, *arguments: str, tls: bool = False, code: str = "", **how: typing.Any) -> WatchedServer:
        """Start a server with these arguments, and a witness; `code` runs before the server starts."""
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
        """Start a server without a witness. Unless it is `failing`, it must exit with 0 and log no error."""
        secure = ("--cert", certificate()[0]) if tls else ()
        changed = faults.changed(code) if code else ()
        server = support.Process(*arguments, *secure, python=[*python, *changed], **how)
        self.addCleanup(server.kill if failing else functools.partial(self._end, server))
        return server

    def _end(self, server: support.Process) -> None:
        status, log = server.stop(), server.log()
        self.assertEqual((status, TROUBLE.findall(log)), (0, []), log[-5000:])

    def crowd(self, server: support.Process | WatchedServer) -> Crowd:
        """Return a crowd of clients, which is reset after the test."""
        descriptors()
        crowd = Crowd(server.port)
        self.addCleanup(crowd.reset)
        return crowd

    def clients(self, server: support.Process | WatchedServer) -> load.Load:
        """Return clients that run in this thread, with TLS if the server has it."""
        secure = "wss:" in (server.server if isinstance(server, WatchedServer) else server).first_line
        clients = load.Load(server.port, certificate()[1] if secure else None)
        self.addCleanup(clients.__exit__)
        return clients

    def check_health(self, watched: WatchedServer, what: str, worst: float = 0.5, growth: float = 500.0) -> None:
        """Check an attack that goes on or has ended: the slowest echo (seconds), and memory (MB)."""
        seen = watched.witness.figures()
        spent, took = load.cpu(watched.pid) - watched.cpu, time.monotonic() - watched.start
        self.report(
            f"{what}: worst echo {seen.worst:.3f} s of {seen.echoes} (itself late {seen.late:.3f} s), "
            f"memory +{watched.growth:.0f} MB, {spent:.1f} s of CPU in {took:.1f} s"
        )
        self.assertEqual(seen.end, "", "the witness was disconnected")
        self.assertLess(seen.worst, worst + seen.late, f"{what}: seconds of the slowest echo of the witness")
        self.assertLess(watched.growth, growth, f"{what}: MB above the start")

    def check_recovery(
        self, watched: WatchedServer, what: str, worst: float = 0.5, growth: float = 500.0, within: float = 30
    ) -> None:
        """After an attack, wait until the server is idle, check its health during the attack, and stop it."""
        try:
            watched.wait_until_idle(within)
        finally:
            self.check_health(watched, what, worst, growth)
        self.stop(watched)

    def stop(self, watched: WatchedServer, listeners: Listeners | None = None, timeout: float = CLOSE_TIMEOUT) -> None:
        """Send SIGTERM: the server must exit with 0 within the close timeout; witness and listeners get 1001."""
        start = time.monotonic()
        watched.server.send_signal(signal.SIGTERM)
        status = watched.server.wait(timeout + 2)
        took = time.monotonic() - start
        support.eventually(lambda: watched.witness.figures().end, "the witness is still connected")
        end = watched.witness.figures().end
        ends = listeners.ends() if listeners else collections.Counter()
        self.report(f"stopped after {took:.1f} s with {status}; the witness got {end}, the listeners {dict(ends)}")
        self.assertEqual((status, end), (0, "1001"), watched.log()[-3000:])
        self.assertLessEqual(set(ends), {"1001"})
        self.assertEqual(TROUBLE.findall(watched.log()), [], watched.log()[-5000:])

    def chat(self, clients: load.Load, number: int = 2, **how: typing.Any) -> list[load.Sender]:
        """Connect clients that send small messages, each the next when the last has come back."""
        peers = clients.join(number, **how)
        return [load.Sender(peer, 1000 + i, 64, at_once=1) for i, peer in enumerate(peers)]

    def pace(self, clients: load.Load, number: int, size: int, pace: float, **how: typing.Any) -> list[load.Sender]:
        """Connect clients that each send this number of messages a second."""
        return [load.Sender(peer, i, size, pace=pace) for i, peer in enumerate(clients.join(number, **how))]

    def settle(self, clients: load.Load, senders: typing.Sequence[load.Sender], deadline: float = 30) -> None:
        """Stop sending, and wait until all clients have got all messages in one order."""
        for sender in senders:
            sender.stop()
        total = sum(sender.count for sender in senders)
        clients.run(lambda: all(sender.answered for sender in senders), deadline)
        clients.run(lambda: all(sender.stream.messages == total for sender in senders), deadline)
        self.assertEqual(len({sender.stream.digest for sender in senders}), 1, "clients got different orders")
        self.assertEqual([sender.peer.ended for sender in senders if sender.peer.ended], [])

    def number(self, server: support.Process) -> int:
        """Return the number of clients in the room."""
        tls = certificate()[1] if "wss:" in server.first_line else None
        body = support.exchange(server.port, b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n", tls=tls)[2]
        return int(body.partition(b'"clients": ')[2].partition(b",")[0])

    def report(self, text: str) -> None:
        """Print a line with figures."""
        if support.EVERYTHING:
            print(f"    {self.id().rpartition('tests.stress.')[2]}: {text}", file=sys.stderr, flush=True)


def go_on(senders: typing.Iterable[load.Sender]) -> typing.Callable[[], None]:
    """Return a function that sends the messages that are due, for `Load.run`."""

    def send() -> None:
        for sender in senders:
            sender.go_on()

    return send

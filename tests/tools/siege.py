"""What the tests of a siege share: a witness, crowds that attack, and the figures of the server meanwhile.

`python -m tests.tools.siege PORT [CERTIFICATE]` is the witness: an honest client in a process of its own, since what
the attackers do in theirs must not look like a delay of the server.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import typing
import unittest

from tests.tools import faults, load, support
from tests.tools.stress import GOING_AWAY, TROUBLE, certificate

ASKED = support.EVERYTHING or os.environ.get("PYWEBSOCK_TESTS") == "siege"
INTERVAL = 0.05  # seconds between two messages of a witness
CLOSE_TIMEOUT = 5.0  # seconds: of the server
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a reset

STRICT = os.environ.get("PYWEBSOCK_TESTS") == "siege"  # on a quiet machine; others may be twice as slow, or ten times
heavy = unittest.skipUnless(ASKED, "takes minutes: PYWEBSOCK_TESTS=siege")


# ---- the witness: in its own process ----


class Echoes:
    """The witness's connection: what it sends, when that comes back, and how it ends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tag = os.urandom(8)
        self._pending: collections.deque[float] = collections.deque()  # when what is not back yet was sent
        self._buffer, self._out = bytearray(), bytearray()
        self._skip = 0  # bytes of somebody's long message that are still to come
        self._worst = 0.0  # seconds
        self.count = 0  # of echoes
        self.late = 0.0  # seconds that this process itself was late, at worst
        self.end = ""  # the code of the server's Close, or what ended the connection without one
        self.over = False  # the connection has ended

    def send(self) -> None:
        """Send a message."""
        self._pending.append(time.monotonic())
        self._write(support.masked_frame(2, self._tag))

    def _write(self, data: bytes) -> None:
        self._out += data
        try:
            del self._out[: self._socket.send(self._out)]  # the rest goes with the next one
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            pass
        except OSError as error:
            self.end = self.end or type(error).__name__

    def receive(self) -> None:
        """Take what has come."""
        try:
            data = self._socket.recv(1 << 20)
        except (ssl.SSLWantReadError, BlockingIOError):
            return
        except OSError as error:
            self.over, self.end = True, self.end or type(error).__name__
            return
        if not data:
            self.over, self.end = True, self.end or "end"
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._buffer += memoryview(data)[skipped:]
        while self._take_frame():
            pass

    def _take_frame(self) -> bool:
        """Take one frame out of the buffer, or the beginning of a long one; whether that was possible."""
        if len(self._buffer) < 10 and (len(self._buffer) < 2 or len(self._buffer) < 2 + self._buffer[1]):
            return False
        opcode, length, start = self._buffer[0] & 15, self._buffer[1], 2
        if length >= 126:
            start = 4 if length == 126 else 10
            length = int.from_bytes(self._buffer[2:start], "big")
        if length < 126 and len(self._buffer) < start + length:
            return False
        payload = bytes(self._buffer[start : start + min(length, 125)])
        self._skip = max(0, start + length - len(self._buffer))
        del self._buffer[: start + length]
        self._handle(opcode, payload)
        return True

    def _handle(self, opcode: int, payload: bytes) -> None:
        if opcode == 2 and payload == self._tag:
            self._worst = max(self._worst, time.monotonic() - self._pending.popleft())
            self.count += 1
        elif opcode == 9:
            self._write(support.masked_frame(10, payload))
        elif opcode == 8:
            self.end = str(int.from_bytes(payload[:2], "big"))
            self._write(support.masked_frame(8, payload))

    def report(self) -> dict[str, typing.Any]:
        """The figures since the last report; what is not back yet counts as well."""
        waiting = time.monotonic() - self._pending[0] if self._pending and not self.end else 0.0
        figures = {"worst": max(self._worst, waiting), "late": self.late, "echoes": self.count, "end": self.end}
        self._worst, self.late, self.count = 0.0, 0.0, 0
        return figures


def main(argv: typing.Sequence[str]) -> int:
    """The witness: for each line on standard input it writes one line with its figures."""
    if argv[0] == "listen":
        return listen(int(argv[1]), int(argv[2]))
    if argv[0] == "push":
        return push(int(argv[1]), int(argv[2]), float(argv[3]))
    with contextlib.suppress(OSError):
        os.nice(-15)  # it must not wait for a processor; only root may say so
    context = ssl.create_default_context(cafile=argv[1]) if argv[1:] else None
    echoes = Echoes(support.Client(int(argv[0]), tls=context, Origin=None).socket)
    connection = echoes._socket
    connection.setblocking(False)
    print("open", flush=True)
    due = time.monotonic()
    while True:
        if echoes.over:
            connection.close()
        sources: list[typing.Any] = [sys.stdin] if echoes.over else [sys.stdin, connection]
        pending = isinstance(connection, ssl.SSLSocket) and not echoes.over and connection.pending()
        ready = select.select(sources, [], [], 0 if pending else max(0.0, due - time.monotonic()))[0]
        if sys.stdin in ready:
            if not sys.stdin.readline():
                return 0
            print(json.dumps(echoes.report()), flush=True)
        if connection in ready or pending:
            echoes.receive()
        if time.monotonic() >= due:
            echoes.late = max(echoes.late, time.monotonic() - due)
            due = max(due + INTERVAL, time.monotonic())
            if not echoes.end:
                echoes.send()


class Figures(typing.NamedTuple):
    """What a witness saw."""

    worst: float  # seconds from sending to getting, at worst
    late: float  # seconds that it was late itself
    echoes: int  # how many
    end: str  # code of the Close, if there was one


class Witness:
    """An honest client in a process of its own, which sends a message every 50 ms and keeps the worst echo."""

    def __init__(self, port: int, certificate: str = "") -> None:
        command = [sys.executable, "-m", "tests.tools.siege", str(port), *([certificate] if certificate else [])]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=support.ROOT, stdin=pipe, stdout=pipe, text=True)
        if self._line() != "open\n":
            raise AssertionError("the witness did not get in")

    def _line(self) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], 2 * support.DEADLINE)[0]:
            raise AssertionError("the witness says nothing")
        return self._process.stdout.readline()

    def figures(self) -> Figures:
        """What it saw since this was asked last."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Figures(**json.loads(self._line()))

    def end(self) -> None:
        """Let it go."""
        if self._process.poll() is None:
            self._process.communicate(timeout=support.DEADLINE)


class Pusher:
    """A client in a process of its own that sends messages at a pace, in bytes a second, and reads all that comes."""

    def __init__(self, port: int, size: int, pace: float) -> None:
        command = [sys.executable, "-m", "tests.tools.siege", "push", str(port), str(size), str(pace)]
        self._process = subprocess.Popen(
            command, cwd=support.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self._process.stdout.readline()

    def rate(self) -> float:
        """MB a second that it has sent since this was asked last."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.communicate()


def push(port: int, size: int, pace: float) -> int:
    """The pusher, in its own process: for each line on standard input it writes one line with its rate."""
    connection = support.Client(port, Origin=None).socket
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    connection.setblocking(False)
    frame, buffer = memoryview(load.frame(bytes(size))), bytearray(1 << 20)
    print("open", flush=True)
    sent, asked, since, position = 0, time.monotonic(), time.monotonic(), 0
    total = 0
    while True:
        due = total < pace * (time.monotonic() - since)
        ready = select.select([sys.stdin, connection], [connection] if due else [], [], 0.001)
        if sys.stdin in ready[0]:
            if not sys.stdin.readline():
                return 0
            print(sent / 1e6 / (time.monotonic() - asked), flush=True)
            sent, asked = 0, time.monotonic()
        if connection in ready[0] and not connection.recv_into(buffer):
            return 0
        if ready[1]:
            count = connection.send(frame[position:])
            position, sent, total = (position + count) % len(frame), sent + count, total + count


class Listeners:
    """Honest clients in a process of its own: they read all that comes and answer the Close."""

    def __init__(self, port: int, number: int) -> None:
        command = [sys.executable, "-m", "tests.tools.siege", "listen", str(port), str(number)]
        self._process = subprocess.Popen(command, cwd=support.ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self._process.stdout.readline()

    def ends(self) -> collections.Counter[str]:
        """How each one's connection ended: the codes of the Close frames, or what else."""
        return collections.Counter(json.loads(self._process.communicate(timeout=2 * support.DEADLINE)[0]))

    def kill(self) -> None:
        """End them."""
        self._process.kill()
        self._process.communicate()


def listen(port: int, number: int) -> int:
    """The listeners, in their own process: when all have ended they write one line that says how."""
    clients = load.Load(port)
    ends = dict.fromkeys(clients.join(number), "nothing")
    last = dict.fromkeys(ends, b"")

    def take(peer: load.Peer, data: bytes) -> None:
        last[peer] = (last[peer] + data[-4:])[-4:]
        if last[peer] == GOING_AWAY:
            ends[peer] = "1001"
            peer.send(load.frame(GOING_AWAY[2:], 8))

    for peer in ends:
        peer.take = functools.partial(take, peer)
    print("open", flush=True)
    clients.run(lambda: not clients.peers, 60)
    print(json.dumps([peer.ended if end == "nothing" else end for peer, end in ends.items()]))
    return 0


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


def last_bytes(one: socket.socket) -> bytes:
    """The last four bytes from the server, whose Close is answered; or what ended it without one. It is closed then."""
    last, data, answered = b"", b"more", False
    try:
        while data:
            data = one.recv(1 << 20)
            last = (last + data)[-4:]
            if last == GOING_AWAY and not answered:
                one.send(load.frame(GOING_AWAY[2:], 8))
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

    def relax(self, deadline: float, seconds: float = 0.5) -> None:
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


class Siege(Gauge):
    """A server in a process of its own and its witness."""

    def __init__(self, server: support.Process, tls: str = "") -> None:
        self.server, self.port = server, server.port
        self.witness = Witness(server.port, tls)
        support.eventually(lambda: self.witness.figures().echoes, "the witness hears nothing")
        super().__init__(server.pid)

    def relax(self, deadline: float, seconds: float = 0.5) -> None:
        """Who connects last is served last: only then the server has met all who came, and what it uses is its own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=deadline) as last:
            last.shutdown(socket.SHUT_WR)
            last.recv(100)  # nothing, or that the room is full
        super().relax(deadline, seconds)

    def log(self) -> str:
        """What the server has logged so far."""
        return self.server.log()


class SiegeTestCase(unittest.TestCase):
    """Tests of a server under attack."""

    def besiege(self, *arguments: str, tls: bool = False, code: str = "", **how: typing.Any) -> Siege:
        """A server with its default settings and these arguments, and its witness; `code` is run before it starts."""
        server = self.serve(*arguments, tls=tls, code=code, **how)
        siege = Siege(server, certificate()[0] if tls else "")
        self.addCleanup(siege.witness.end)
        return siege

    def serve(self, *arguments: str, tls: bool = False, code: str = "", **how: typing.Any) -> support.Process:
        """The same without a witness."""
        if code:
            how["python"] = faults.changed(code)
        server = support.Process(*arguments, *(("--cert", certificate()[0]) if tls else ()), **how)
        self.addCleanup(self._kill, server)
        return server

    def _kill(self, server: support.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGKILL)
        server.wait()

    def crowd(self, siege: Siege) -> Crowd:
        """A crowd of it, which is reset in the end."""
        crowd = Crowd(siege.port)
        self.addCleanup(crowd.reset)
        return crowd

    def clients(self, siege: Siege) -> load.Load:
        """Clients of it that go on in this thread, over TLS where they are told to."""
        clients = load.Load(siege.port, certificate()[1] if siege.server.first_line.count("wss:") else None)
        self.addCleanup(clients.__exit__)
        return clients

    def watch(self, siege: Siege, what: str, worst: float = 0.5, growth: float = 500.0) -> None:
        """The figures of an attack that goes on or has just ended: the worst echo in seconds, memory in MB."""
        seen = siege.witness.figures()
        spent, took = load.cpu(siege.pid) - siege.cpu, time.monotonic() - siege.start
        self.report(
            f"{what}: worst echo {seen.worst:.3f} s of {seen.echoes} (itself late {seen.late:.3f} s), "
            f"memory +{siege.growth:.0f} MB, {spent:.1f} s of CPU in {took:.1f} s"
        )
        self.assertEqual(seen.end, "", "the witness was cut off")
        limit = worst if STRICT else 4 * worst  # before the siege was withstood it took ten times as long, or for ever
        self.assertLess(seen.worst, limit, f"{what}: seconds of an honest client's worst echo")
        self.assertLess(siege.growth, growth, f"{what}: MB more than before")

    def withstand(self, siege: Siege, what: str, worst: float = 0.5, growth: float = 500.0, within: float = 30) -> None:
        """The attack is over: all must be as before, so many seconds later, and have been well meanwhile. It stops."""
        try:
            siege.relax(within)
        finally:
            self.watch(siege, what, worst, growth)
        self.stop(siege)

    def stop(self, siege: Siege, listeners: Listeners | None = None, timeout: float = CLOSE_TIMEOUT) -> None:
        """SIGTERM ends it with 0 within the close timeout, and the witness and the listeners get 1001."""
        start = time.monotonic()
        siege.server.send_signal(signal.SIGTERM)
        status = siege.server.wait(timeout + 2)
        took = time.monotonic() - start
        support.eventually(lambda: siege.witness.figures().end, "the witness has no end")
        end = siege.witness.figures().end
        ends = listeners.ends() if listeners else collections.Counter()
        self.report(f"stopped within {took:.1f} s with {status}, the witness got {end}, listeners {dict(ends)}")
        self.assertEqual((status, end), (0, "1001"), siege.log()[-3000:])
        self.assertLessEqual(set(ends), {"1001"})
        self.assertEqual(TROUBLE.findall(siege.log()), [], siege.log()[-5000:])

    def report(self, text: str) -> None:
        """Print a figure."""
        if ASKED:
            print(f"    {self.id().rpartition('tests.stress.')[2]}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

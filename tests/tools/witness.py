"""Clients in their own processes, so that work of the test does not look like a delay of the server.

`python -m tests.tools.witness PORT [CERTIFICATE]` is the witness, a well-behaved client that sends a message every
50 ms and measures the time until it comes back.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import select
import socket
import ssl
import subprocess
import sys
import time
import typing

from tests.tools import load, support

INTERVAL = 0.05  # seconds between two messages of a witness

# Real-time scheduling for server and witness, so that a busy machine does not change the figures. It needs root.
URGENT = """import contextlib, os
with contextlib.suppress(OSError, AttributeError):
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
"""


class Echoes:
    """The witness's connection: sends messages, measures the delay of each, and keeps the close code."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._tag = os.urandom(8)
        self._pending: collections.deque[float] = collections.deque()  # when messages were sent that have not come back
        self._buffer, self._out = bytearray(), bytearray()
        self._skip = 0  # bytes of another client's long message that are still to come
        self._worst = 0.0  # seconds of the slowest echo
        self.count = 0  # of echoes
        self.late = 0.0  # longest delay of this process itself (seconds)
        self.end = ""  # the code of the server's Close, or the error that ended the connection
        self.over = False  # the connection has ended

    def send(self) -> None:
        """Send a message."""
        self._pending.append(time.monotonic())
        self._write(support.masked_frame(2, self._tag))

    def _write(self, data: bytes) -> None:
        self._out += data
        try:
            del self._out[: self._socket.send(self._out)]  # the rest is sent with the next message
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            pass
        except OSError as error:
            self.end = self.end or type(error).__name__

    def receive(self) -> None:
        """Read and handle the available data."""
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
        """Take one frame out of the buffer, or the beginning of a long one; return False if there is none."""
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
        """Return the figures since the last report; a message that has not come back counts, too."""
        waiting = time.monotonic() - self._pending[0] if self._pending and not self.end else 0.0
        figures = {"worst": max(self._worst, waiting), "late": self.late, "echoes": self.count, "end": self.end}
        self._worst, self.late, self.count = 0.0, 0.0, 0
        return figures


def main(argv: typing.Sequence[str]) -> int:
    """Run the witness: for each line of standard input, print one line with the figures."""
    if argv[0] == "listen":
        return listen(int(argv[1]), int(argv[2]))
    if argv[0] == "push":
        return push(int(argv[1]), int(argv[2]), float(argv[3]))
    exec(URGENT)
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
    """The figures of a witness."""

    worst: float  # seconds of the slowest echo
    late: float  # longest delay of the witness itself (seconds)
    echoes: int  # number of echoes
    end: str  # code of the Close, if there was one


class Witness:
    """A client in its own process, which sends a message every 50 ms and keeps the slowest echo."""

    def __init__(self, port: int, certificate: str = "") -> None:
        command = [sys.executable, "-m", "tests.tools.witness", str(port), *([certificate] if certificate else [])]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=support.ROOT, stdin=pipe, stdout=pipe, text=True)
        if self._line() != "open\n":
            raise AssertionError("the witness was refused")

    def _line(self) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], 2 * support.DEADLINE)[0]:
            raise AssertionError("the witness does not answer")
        return self._process.stdout.readline()

    def figures(self) -> Figures:
        """Return the figures since the last call."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Figures(**json.loads(self._line()))

    def end(self) -> None:
        """Let it go."""
        if self._process.poll() is None:
            self._process.communicate(timeout=support.DEADLINE)


class Pusher:
    """A client in its own process that sends messages at a rate (bytes a second) and reads all data."""

    def __init__(self, port: int, size: int, pace: float) -> None:
        command = [sys.executable, "-m", "tests.tools.witness", "push", str(port), str(size), str(pace)]
        self._process = subprocess.Popen(
            command, cwd=support.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self._process.stdout.readline()

    def rate(self) -> float:
        """Return the rate of sending since the last call (MB a second)."""
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
    """Run the pusher: for each line of standard input, print one line with the rate."""
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
    """Clients in their own process, which read all data and answer the Close."""

    def __init__(self, port: int, number: int) -> None:
        command = [sys.executable, "-m", "tests.tools.witness", "listen", str(port), str(number)]
        self._process = subprocess.Popen(command, cwd=support.ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self._process.stdout.readline()

    def ends(self) -> collections.Counter[str]:
        """Count how the connections ended: by the code of the Close frame, or the error."""
        return collections.Counter(json.loads(self._process.communicate(timeout=2 * support.DEADLINE)[0]))

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def listen(port: int, number: int) -> int:
    """Run the listeners: when all have ended, print one line with their ends."""
    clients = load.Load(port)
    ends = dict.fromkeys(clients.join(number), "nothing")
    last = dict.fromkeys(ends, b"")

    def take(peer: load.Peer, data: bytes) -> None:
        last[peer] = (last[peer] + data[-4:])[-4:]
        if last[peer] == load.GOING_AWAY:
            ends[peer] = "1001"
            peer.send(load.frame(load.GOING_AWAY[2:], 8))

    for peer in ends:
        peer.take = functools.partial(take, peer)
    print("open", flush=True)
    clients.run(lambda: not clients.peers, 60)
    print(json.dumps([peer.ended if end == "nothing" else end for peer, end in ends.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Attackers in their own processes, for the stress tests.

`python -m tests.tools.attack` is a crowd of clients that all send the same bytes again and again. The first line of
standard input is a `Plan` in JSON. The crowd prints `open` when all clients have joined, and one line of figures for
each further line of standard input. It goes on until it is killed.
"""

from __future__ import annotations

import collections
import contextlib
import json
import select
import selectors
import socket
import ssl
import subprocess
import sys
import time
import typing

from tests.tools import support

TICK = 0.005  # seconds between two rounds of sending
AT_ONCE = 1 << 18  # bytes sent by one client in a tick, without a rate
BATCH = 16 * 1024  # bytes of a stream that are encrypted at once


class Plan(typing.NamedTuple):
    """The behaviour of a crowd."""

    port: int
    number: int  # of clients
    piece: str  # bytes in hexadecimal, sent again and again
    first: str = ""  # bytes in hexadecimal, sent once at the beginning
    pace: float = 0.0  # bytes a second that each client sends, 0 for no limit
    burst: float = 0.0  # seconds between bursts, each of which has the bytes of that time
    fields: typing.Mapping[str, str] = {}  # header fields of its requests
    record: int = 0  # bytes of a TLS record, 0 without TLS
    reading: bool = True  # False for clients that do not read
    request: str = ""  # bytes in hexadecimal, sent instead of an opening handshake; no response is awaited


class Attacker:
    """One client of a crowd."""

    def __init__(self, plan: Plan, piece: bytes) -> None:
        self._plan, self._piece = plan, piece
        self.socket = socket.create_connection(("127.0.0.1", plan.port), support.DEADLINE)
        self._sent = 0  # bytes of plaintext
        self._out = b""  # bytes that the socket has not accepted
        self.code = ""  # the close code or the error, after the end
        self._tls: ssl.SSLObject | None = None
        if plan.record:
            self._shake_hands()
        self._put(bytes.fromhex(plan.request) or support.request(**plan.fields))
        self._flush()

    def _shake_hands(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._in, self._made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._made)
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.socket.sendall(self._made.read())
                self._in.write(self.socket.recv(65536))
        self.socket.sendall(self._made.read())

    def wait(self) -> None:
        """Wait for the status 101."""
        answer = b"HTTP/1.1 101 \r\n" if self._plan.request else b""
        while b"\r\n" not in answer:
            data = self.socket.recv(100)
            if not data:
                raise AssertionError(f"did not get in: {answer!r}")
            answer += self._decrypt(data)
        if not answer.startswith(b"HTTP/1.1 101 "):
            raise AssertionError(f"did not get in: {answer!r}")
        self.socket.setblocking(False)
        self._put(bytes.fromhex(self._plan.first))
        self._since = time.monotonic()

    def _decrypt(self, data: bytes) -> bytes:
        if not self._tls:
            return data
        self._in.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            return self._tls.read(1 << 20)
        return b""

    def _put(self, plain: bytes) -> None:
        if self._tls:
            for start in range(0, len(plain), self._plan.record):
                self._tls.write(plain[start : start + self._plan.record])
            plain = self._made.read()
        self._out += plain

    def _flush(self) -> None:
        self._out = self._out[self.socket.send(self._out) :] if self._out else b""

    def go_on(self) -> None:
        """Send the bytes that are due."""
        plan, passed = self._plan, time.monotonic() - self._since
        if plan.burst:
            passed -= passed % plan.burst
        due = int(plan.pace * passed) - self._sent if plan.pace else AT_ONCE
        if plan.record:
            due = min(due, BATCH)
        try:
            self._flush()
            if due > 0 and not self._out and self._piece:
                start = self._sent % len(self._piece)
                part = self._piece[start : start + min(due, AT_ONCE)]
                self._sent += len(part)
                self._put(part)
                self._flush()
        except BlockingIOError:
            pass
        except OSError as error:
            self.code = self.code or type(error).__name__

    def read(self) -> None:
        """Read the available data, and keep the code of a Close."""
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            data, self.code = b"", self.code or type(error).__name__
        if (not self._plan.record and data[:2] in (b"\x88\x02",)) or data[:1] == b"\x88":
            self.code = str(int.from_bytes(data[2:4], "big"))
        if not data:
            self.code = self.code or "end"

    @property
    def sent(self) -> int:
        """Number of bytes that were sent."""
        return self._sent


def join(plan: Plan, piece: bytes) -> list[Attacker]:
    """Return the crowd when all clients are in the room."""
    crowd: list[Attacker] = []
    for start in range(0, plan.number, 200):
        some = [Attacker(plan, piece) for _ in range(start, min(start + 200, plan.number))]
        for attacker in some:
            attacker.wait()
        crowd += some
    return crowd


def main() -> int:
    """Run the crowd."""
    plan = Plan(**json.loads(sys.stdin.readline()))
    piece = bytes.fromhex(plan.piece)
    piece *= max(1, 2 * AT_ONCE // max(1, len(piece))) if len(piece) < AT_ONCE else 1
    crowd = join(plan, piece)
    selector = selectors.DefaultSelector()
    for attacker in crowd if plan.reading else ():
        selector.register(attacker.socket, selectors.EVENT_READ, attacker)
    selector.register(sys.stdin, selectors.EVENT_READ)
    print("open", flush=True)
    due = time.monotonic()
    while True:
        for key, _ in selector.select(max(0.0, due - time.monotonic())):
            if not key.data:
                if not sys.stdin.readline():
                    return 0
                ends = collections.Counter(attacker.code for attacker in crowd if attacker.code)
                print(json.dumps({"sent": sum(attacker.sent for attacker in crowd), "ends": ends}), flush=True)
            else:
                key.data.read()
                if key.data.code:
                    selector.unregister(key.data.socket)
                    key.data.socket.close()
        if time.monotonic() >= due:
            for attacker in crowd:
                if not attacker.code:
                    attacker.go_on()
            due = time.monotonic() + TICK


class Attack:
    """A crowd in its own process."""

    def __init__(self, port: int, number: int, piece: bytes, first: bytes = b"", **how: typing.Any) -> None:
        plan = Plan(port, number, piece.hex(), first.hex(), **how)
        command = [sys.executable, "-m", "tests.tools.attack"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=support.ROOT, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdin
        self._process.stdin.write(json.dumps(plan._asdict()) + "\n")
        self._process.stdin.flush()
        if self._line(6 * support.DEADLINE) != "open\n":
            raise AssertionError("the attackers were refused")

    def _line(self, deadline: float) -> str:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], deadline)[0]:
            raise AssertionError("the attackers do not answer")
        return self._process.stdout.readline()

    def figures(self) -> tuple[float, dict[str, int]]:
        """Return the number of MB that the attackers have sent, and a count of the ends of their connections."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        figures = json.loads(self._line(support.DEADLINE))
        return figures["sent"] / 1e6, figures["ends"]

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    sys.exit(main())

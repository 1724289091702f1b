"""Many clients in one thread, and figures of a process from /proc, for the stress tests.

`python -m tests.tools.load HOST PORT` is one client in its own process, which a test can pause or cut off. It prints
`open`, then answers Pings until the connection ends.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import pathlib
import selectors
import socket
import ssl
import struct
import sys
import time
import typing

from tests.tools import support

HEAD = struct.Struct("!dII")  # the beginning of each message: time of sending, sender, number
GOING_AWAY = b"\x88\x02\x03\xe9"  # Close 1001
PIECE = 1 << 18  # bytes asked of a socket at once


class LoadError(AssertionError):
    """A client received other data than it should."""


def frame(payload: bytes, opcode: int = 2) -> bytes:
    """Return a frame from a client, masked with zeros, which costs no time."""
    return support.masked_frame(opcode, b"", length=len(payload), key=bytes(4)) + payload


def numbered(sender: int, number: int, size: int) -> bytes:
    """Return the frame of a numbered binary message of `size` bytes with the time of sending."""
    return frame(HEAD.pack(time.monotonic(), sender, number) + bytes(size - HEAD.size))


class Stream:
    """Checks the numbered messages that one client gets, all of one size: no gaps, and the delay of each."""

    def __init__(self, size: int) -> None:
        head = 2 if size < 126 else 4 if size < 1 << 16 else 10
        self.length = head + size  # of a frame
        self._layout = struct.Struct(f"!{head}x{HEAD.format[1:]}{size - HEAD.size}x")
        self._rest = b""
        self.next: dict[int, int] = {}  # the next number of each sender
        self.close = b""  # their Close frame
        self.messages = 0
        self.digest = 0  # of the order of messages
        self.worst = 0.0  # seconds from sending to receiving
        self.watched = -1  # a sender whose delays are kept
        self.delays: list[float] = []

    def take(self, data: bytes) -> None:
        """Check the next bytes of the server."""
        now, data = time.monotonic(), self._rest + data if self._rest else data
        whole = len(data) - len(data) % self.length
        self._rest = data[whole:]
        for sent, sender, number in self._layout.iter_unpack(memoryview(data)[:whole]):
            if self.next.get(sender, number) != number:
                raise LoadError(f"{number} of sender {sender} came instead of {self.next[sender]}")
            self.next[sender] = number + 1
            self.digest = hash((self.digest, sender, number))
            self.worst = max(self.worst, now - sent)
            if sender == self.watched:
                self.delays.append(now - sent)
        self.messages += whole // self.length
        if self._rest[:1] == b"\x88":
            self.close = self._rest


class Peer:
    """One client of a Load, from connecting to its end. It never blocks."""

    def __init__(self, load: Load, port: int, tls: ssl.SSLContext | None, small: bool) -> None:
        self.socket: socket.socket = socket.socket()
        if small:  # a receive buffer that is soon full
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.setblocking(False)
        self._load = load
        self._tls = tls
        self._shaking = False  # of TLS
        self._out: collections.deque[bytes] = collections.deque()
        self._sent = 0  # bytes of the first one that are sent
        self._events = 0  # events for which the selector waits
        self._connected = False
        self.open = False  # after the 101
        self.ended = ""  # the reason, after the end
        self.reading = True  # False for a stuck client
        self.pace = 0.0  # bytes a second to read, 0 for no limit
        self.since = time.monotonic()
        self.received = 0  # bytes after the 101
        self.head = b""  # the response, complete if the status is not 101
        self.take: typing.Callable[[bytes], None] = self._forget
        error = self.socket.connect_ex(("127.0.0.1", port))
        if error not in (0, errno.EINPROGRESS):
            self.end(errno.errorcode[error])
        else:
            self._wait_for(selectors.EVENT_WRITE)

    def _forget(self, data: bytes) -> None:
        pass

    @property
    def status(self) -> int:
        """Status of the response, or 0 before it."""
        return int(self.head[9:12] or 0)

    @property
    def unsent(self) -> int:
        """Number of pieces that wait to be sent."""
        return len(self._out)

    def send(self, data: bytes) -> None:
        """Send bytes as they are, when the socket accepts them."""
        self._out.append(data)
        if len(self._out) == 1 and self._connected and not self.ended:
            self._write()

    def stop_reading(self) -> None:
        """Stop reading."""
        self.reading = False
        self.choose_events()

    def read_at(self, pace: float) -> None:
        """Limit reading to this number of bytes a second; 0 for no limit."""
        self.pace, self.received, self.since = pace, 0, time.monotonic()
        self.choose_events()

    def read_on(self) -> None:
        """Start to read again, without a limit."""
        self.reading = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.choose_events()

    def reset(self) -> None:
        """Close the connection with a reset."""
        if not self.ended:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.end("reset")

    def end(self, how: str) -> None:
        """Close the socket."""
        if not self.ended:
            self.ended = how
            self._wait_for(0)
            self.socket.close()
            self._load.peers.discard(self)

    def _wait_for(self, events: int) -> None:
        if events != self._events:
            if not events:
                self._load.selector.unregister(self.socket)
            elif self._events:
                self._load.selector.modify(self.socket, events, self)
            else:
                self._load.selector.register(self.socket, events, self)
            self._events = events

    def choose_events(self) -> None:
        """Set the events for which the selector waits."""
        if not self.ended:
            reading = selectors.EVENT_READ if self.reading and self._may_read() else 0
            self._wait_for(reading | (selectors.EVENT_WRITE if self._out else 0))

    def _may_read(self) -> bool:
        return not self.pace or self.received < self.pace * (time.monotonic() - self.since)

    def ready(self, events: int) -> None:
        """Read and send as far as the socket is ready."""
        try:
            if self._tls:
                self._wait_for(0)  # wrapping creates another socket
                error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    return self.end(errno.errorcode[error])
                self.socket = self._tls.wrap_socket(
                    self.socket, server_hostname="localhost", do_handshake_on_connect=False
                )
                self._tls, self._shaking = None, True
            if self._shaking:
                self._shake_hands()
            if not self._shaking:
                self._connected = True
                if events & selectors.EVENT_WRITE:
                    self._write()
                if not self.ended and events & selectors.EVENT_READ:
                    self._read()
                self.choose_events()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            self.choose_events()
        except OSError as error:
            self.end(type(error).__name__)
        return None

    def _shake_hands(self) -> None:
        assert isinstance(self.socket, ssl.SSLSocket)
        try:
            self.socket.do_handshake()
            self._shaking = False
        except ssl.SSLWantReadError:
            self._wait_for(selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            self._wait_for(selectors.EVENT_WRITE)

    def _write(self) -> None:
        try:
            while self._out:
                piece = memoryview(self._out[0])[self._sent : self._sent + PIECE]
                self._sent += self.socket.send(piece)
                if self._sent == len(self._out[0]):
                    self._out.popleft()
                    self._sent = 0
        except (ssl.SSLWantWriteError, BlockingIOError):
            pass
        except OSError as error:
            self.end(type(error).__name__)
        self.choose_events()

    def _read(self) -> None:
        size = min(PIECE, int(self.pace) // 10 or PIECE)
        data = self.socket.recv(size)
        while isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
            data += self.socket.recv(size)
        if not data:
            return self.end("end")
        if not self.open:
            self.head += data
            head, line, data = self.head.partition(b"\r\n\r\n")
            if not line or not head.startswith(b"HTTP/1.1 101 "):
                return None
            self.head, self.open, self.since = head, True, time.monotonic()
        self.received += len(data)
        if data:
            self.take(data)
        return None


class Load:
    """Many clients in one thread."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.selector = selectors.DefaultSelector()
        self.port = port
        self.tls = tls
        self.peers: set[Peer] = set()  # clients that have not ended

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in tuple(self.peers):
            peer.reset()
        self.selector.close()

    def start(self, *, tls: bool = False, small: bool = False, raw: bytes | None = None, **fields: typing.Any) -> Peer:
        """Start to connect a client; `raw` is sent in place of a handshake."""
        peer = Peer(self, self.port, self.tls if tls else None, small)
        first = support.request(**fields) if raw is None else raw
        if first:
            peer.send(first)
        if not peer.ended:
            self.peers.add(peer)
        return peer

    def join(self, number: int, **how: typing.Any) -> list[Peer]:
        """Connect clients and wait until they are in the room."""
        peers = [self.start(**how) for _ in range(number)]
        self.run(lambda: all(peer.open or peer.ended for peer in peers))
        refused = [peer.ended + repr(peer.head) for peer in peers if not peer.open]
        if refused:
            raise LoadError(f"{len(refused)} of {number} did not get in: {refused[0]}")
        return peers

    def run(
        self,
        until: typing.Callable[[], object],
        deadline: float = support.DEADLINE,
        meanwhile: typing.Callable[[], object] = lambda: None,
    ) -> None:
        """Run all clients until a condition holds; call `meanwhile` in each round."""
        end = time.monotonic() + deadline
        while not until():
            if time.monotonic() > end:
                raise LoadError(f"not within {deadline} s")
            self.step()
            meanwhile()

    def step(self) -> None:
        """Run one round of all clients."""
        for key, events in self.selector.select(0.005):
            if not key.data.ended:
                key.data.ready(events)
        for peer in self.peers:
            if peer.pace:
                peer.choose_events()

    def run_for(self, seconds: float, meanwhile: typing.Callable[[], object] = lambda: None) -> None:
        """Run all clients for this time."""
        end = time.monotonic() + seconds
        self.run(lambda: time.monotonic() > end, seconds + support.DEADLINE, meanwhile)


class Sender:
    """A client that sends numbered messages, at a rate, or a number at once and the next when a message is back."""

    def __init__(self, peer: Peer, number: int, size: int, *, pace: float = 0.0, at_once: int = 0) -> None:
        self.peer = peer
        self.number = number
        self.size = size
        self.count = 0  # of messages sent
        self.stream = Stream(size)
        self.stream.watched = number
        self._pace = pace  # messages a second
        self._at_once = at_once
        self._since = time.monotonic()
        peer.take = self.take

    def take(self, data: bytes) -> None:
        """Handle data from the server."""
        self.stream.take(data)
        if self._at_once:
            self.go_on()

    def go_on(self) -> None:
        """Send the messages that are due."""
        if self._at_once:
            due = len(self.stream.delays) + self._at_once
        else:
            due = int(self._pace * (time.monotonic() - self._since))
        if self.count < due:
            numbers, self.count = range(self.count, due), due
            self.peer.send(b"".join([numbered(self.number, number, self.size) for number in numbers]))

    def stop(self) -> None:
        """Stop sending."""
        self._at_once, self._pace = 0, 0.0

    @property
    def answered(self) -> bool:
        """True if all messages have come back."""
        return len(self.stream.delays) == self.count


# ---- what the kernel says ----


def memory(pid: int) -> float:
    """Return the resident memory of a process (MB)."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak(pid: int) -> float:
    """Return the peak resident memory of a process (MB)."""
    return int(pathlib.Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def cpu(pid: int) -> float:
    """Return the CPU time of a process (seconds)."""
    if support.IS_WINDOWS:
        return windows_cpu(pid)
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def windows_cpu(pid: int) -> float:
    """Return the CPU time of a process on Windows (seconds)."""
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 (mypy)
    process = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    times = [ctypes.c_uint64() for _ in range(4)]  # creation, exit, kernel, user; in 100 ns
    found = kernel.GetProcessTimes(process, *map(ctypes.byref, times))
    kernel.CloseHandle(process)
    if not found:
        raise OSError(f"no process {pid}")
    return (times[2].value + times[3].value) / 1e7


def threads(pid: int) -> int:
    """Return the number of threads of a process."""
    return len(os.listdir(f"/proc/{pid}/task"))


def files(pid: int) -> int:
    """Return the number of open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def main(argv: typing.Sequence[str]) -> int:
    """Run one client, which only receives and answers Pings."""
    with socket.create_connection((argv[0], int(argv[1]))) as connection:
        connection.sendall(support.request(Host=argv[0]))
        data = connection.recv(65536)
        print("open", flush=True)
        with contextlib.suppress(ConnectionError):  # the process was paused, and the client dropped
            while data:
                if data.endswith(b"\x89\0"):
                    connection.sendall(support.masked_frame(10))
                data = connection.recv(65536)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

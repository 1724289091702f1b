"""The clients of the benchmark, many in one process: `python -m tests.tools.benchmark_load SETTINGS`, which are JSON.

It must not be slower than what it measures. All clients of a broadcast server get the same bytes, so each byte is
looked at in Python once, where a client gets it first; what the others get is compared with it, which is one memcmp.
Where a client gets something else, it is looked at on its own, and `order` tells of it. A message's delay is taken at
one client, another for each message in turn.

With the process that has started it, it speaks in lines: says `ready` when all are connected, hears `go`, says
`sent N` at the end, hears `total N`, how many messages all such processes have sent, says what it has found, in JSON,
and stays connected until its standard input ends.
"""

from __future__ import annotations

import array
import bisect
import collections
import json
import os
import random
import select
import signal
import socket
import struct
import sys
import time
import typing
import zlib

PIECE = 1 << 16  # bytes asked of a socket at once
PATIENCE = 3.0  # seconds without news after which a message is lost
SIZE = 64  # bytes of a message that is not compressed
HEAD = struct.Struct("4s8s15s")  # of a message: its sender, number, and when it was sent, in microseconds; digits all
HEAD_FORMAT = b"%04d%08d%015d"
REQUEST = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{}\r\n"
)
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
KEY = b"\xa5" * 4  # four times the same, so that a table masks quickly; a server cannot know
MASKED = bytes(byte ^ KEY[0] for byte in range(256))
CHANCE = random.Random(7692)


class Plain:
    """Messages of 64 bytes."""

    _rest = b"x" * (SIZE - HEAD.size)
    _layout = struct.Struct(f"2s{HEAD.format}{len(_rest)}s")
    _head = bytes((0x81, 0x80 | SIZE)) + KEY

    def __init__(self) -> None:
        self._start = bytes((0x81, SIZE))

    @classmethod
    def frame(cls, sender: int, number: int, now: int) -> bytes:
        """What a client sends."""
        return cls._head + (HEAD_FORMAT % (sender, number, now) + cls._rest).translate(MASKED)

    def cut(self, data: bytes) -> typing.Iterator[tuple[int, bytes, bytes, bytes]]:
        """The frames of a server at the start of `data`: length, sender, number, time."""
        length, whole = self._layout.size, len(data) - len(data) % self._layout.size
        for start, sender, number, sent, rest in self._layout.iter_unpack(memoryview(data)[:whole]):
            if start != self._start or rest != self._rest:
                raise ValueError(f"not a message that was sent: {start + sender + number + sent + rest!r}")
            yield length, sender, number, sent


def prices() -> bytes:
    """Most of a message of 2 KB: JSON whose figures are new each time."""
    rows = [{"name": f"item {i}", "price": CHANCE.randrange(9999) / 100, "stock": i % 7 > 0} for i in range(38)]
    return b'", "rows": ' + json.dumps(rows).encode() + b"}"


def deflated(data: bytes) -> bytes:
    """The end of a compressed message (RFC 7692 7.2.1), which refers to nothing before it."""
    packer = zlib.compressobj(wbits=-12)
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Compressed:
    """Messages of 2 KB of JSON, with permessage-deflate: a stored block that is new, and one of many made before."""

    _before = b'{"at": "'
    _stored = len(_before) + HEAD.size
    _first = struct.pack("<BHH", 0, _stored, _stored ^ 0xFFFF) + _before + HEAD_FORMAT  # RFC 1951 3.2.4
    _rests = tuple(prices() for _ in range(64))  # 128 KB, more than any window
    _packed = tuple(map(deflated, _rests))

    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(-15)

    @classmethod
    def frame(cls, sender: int, number: int, now: int) -> bytes:
        """What a client sends."""
        payload = cls._first % (sender, number, now) + cls._packed[(sender + number) % len(cls._packed)]
        return struct.pack("!BBH", 0xC1, 0xFE, len(payload)) + KEY + payload.translate(MASKED)

    def cut(self, data: bytes) -> typing.Iterator[tuple[int, bytes, bytes, bytes]]:
        """The frames of a server at the start of `data`: length, sender, number, time."""
        at = 0
        while len(data) - at >= 4:
            length = data[at + 1]
            start = at + (4 if length == 126 else 2)
            length = int.from_bytes(data[at + 2 : start], "big") if length == 126 else length
            if data[at] not in (0x81, 0xC1) or length > 4096:
                raise ValueError(f"not a message that was sent: {data[at : at + 10]!r}")
            if start + length > len(data):
                return
            payload = data[start : start + length]
            if data[at] == 0xC1:
                payload = self._inflater.decompress(payload + b"\0\0\xff\xff")
            sender, number, sent = HEAD.unpack_from(payload, len(self._before))
            if payload[self._stored :] != self._rests[(int(sender) + int(number)) % len(self._rests)]:
                raise ValueError(f"not a message that was sent: {payload[:50]!r}")
            yield start + length - at, sender, number, sent
            at = start + length


class Stream:
    """What clients get, each byte once: where messages end, and whether each sender's are in order."""

    def __init__(self, shape: type[Plain] | type[Compressed], clients: int, mine: typing.Iterable[int]) -> None:
        self.data = bytearray()
        self.ends = array.array("Q")  # where each message ends
        self.digest = 0  # of the order
        self.gaps = 0  # messages that are not the next of their sender
        mine = tuple(mine)
        # For each client: where those end that it has sent, and those whose delay it tells, with the time of sending.
        self.echoes: dict[int, collections.deque[int]] = {each: collections.deque() for each in mine}
        self.probes: dict[int, collections.deque[tuple[int, bytes]]] = {each: collections.deque() for each in mine}
        self._next: collections.defaultdict[int, int] = collections.defaultdict(int)
        self._shape = shape()
        self._clients = clients

    def extend(self, data: bytes) -> None:
        """Look at the next bytes."""
        self.data += data
        end = self.ends[-1] if self.ends else 0
        count = len(self.ends)
        for length, name, digits, sent in self._shape.cut(bytes(self.data[end:])):
            end += length
            sender, number = int(name), int(digits)
            self.gaps += number != self._next[sender]
            self._next[sender] = number + 1
            self.digest = hash((self.digest, sender, number))
            self.ends.append(end)
            if sender in self.echoes:
                self.echoes[sender].append(end)
            probe = self.probes.get(count % self._clients)
            if probe is not None:
                probe.append((end, sent))
            count += 1


class Client:
    """One client: what it gets is the same as the others', or not."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._number = number
        self._connection = self._connect(load.port)
        self._recv = self._connection.recv
        self.fileno = self._connection.fileno()
        self.position = 0  # in the stream: how much of it has come
        self.sent = 0
        self._follow(load.stream)

    def _connect(self, port: int) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        compressed = self._load.shape is Compressed
        connection.sendall(REQUEST.format(port, OFFER if compressed else "").encode())
        response = b""
        while not response.endswith(b"\r\n\r\n"):
            data = connection.recv(4096)
            if not data:
                break
            response += data
        if not response.startswith(b"HTTP/1.1 101 ") or (b"permessage-deflate" in response) != compressed:
            raise ConnectionError(f"not the answer that was wanted: {response!r}")
        connection.setblocking(False)
        return connection

    def _follow(self, stream: Stream) -> None:
        self.stream = stream
        self._data = stream.data
        self._echoes = stream.echoes[self._number]
        self._probes = stream.probes[self._number]

    @property
    def delivered(self) -> int:
        """Messages that have come."""
        return bisect.bisect_right(self.stream.ends, self.position)

    def read(self) -> None:
        """Take what has come; all but the first lines are for few clients."""
        data = self._recv(PIECE)
        if not self._data.startswith(data, self.position) or not data:
            self._go_beyond(data)
        position = self.position = self.position + len(data)
        if self._probes and self._probes[0][0] <= position:
            now = time.monotonic() * 1e6
            while self._probes and self._probes[0][0] <= position:
                self._load.delays.append(now - int(self._probes.popleft()[1]))
        count = 0
        while self._echoes and self._echoes[0] <= position:
            self._echoes.popleft()
            count += 1
        if count and self._load.sending:
            self.send(count)

    def _go_beyond(self, data: bytes) -> None:
        """These bytes are the first to come, or not what the others have got."""
        if not data:
            raise ConnectionError("the server has closed a connection")
        known = len(self._data) - self.position
        if known > len(data) or not self._data.startswith(data[:known], self.position):
            stream = Stream(self._load.shape, self._load.clients, [self._number])
            stream.extend(bytes(self._data[: self.position]))
            self._follow(stream)  # its own, from the start; what has been seen, has been seen
            while self._echoes and self._echoes[0] <= self.position:
                self._echoes.popleft()
            while self._probes and self._probes[0][0] <= self.position:
                self._probes.popleft()
            known = 0
        self.stream.extend(data[known:])

    def send(self, count: int) -> None:
        """Send so many messages, in one piece."""
        now = int(time.monotonic() * 1e6)
        frame = self._load.shape.frame
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        data = b"".join([frame(self._number, number, now) for number in numbers])
        if self._connection.send(data) != len(data):
            raise ConnectionError("the server reads too slowly")


class Load:
    """The clients of this process: every `step`th of all, from `first` on."""

    def __init__(self, settings: dict[str, typing.Any]) -> None:
        self.port: int = settings["port"]
        self.clients: int = settings["clients"]
        self.shape: type[Plain] | type[Compressed] = Compressed if settings["compressed"] else Plain
        self.sending = False
        self.delays: list[float] = []  # in microseconds
        self._settings = settings
        self._word: list[str] = []  # that has been heard
        self._failures: list[str] = []
        mine = range(settings["first"], self.clients, settings["step"])
        self.stream = Stream(self.shape, self.clients, mine)
        self._all = {number: Client(self, number) for number in mine}
        self._poll: typing.Any = select.epoll() if sys.platform == "linux" else select.poll()
        self._wait = 0.05 if sys.platform == "linux" else 50
        self._ready: dict[int, typing.Callable[[], None]] = {0: self._hear}
        self._poll.register(0, select.POLLIN)
        for client in self._all.values():
            self._ready[client.fileno] = client.read
            self._poll.register(client.fileno, select.POLLIN)

    def _hear(self) -> None:
        line = os.read(0, 4096).decode()
        if not line:
            sys.exit()  # who has started it has ended
        self._word = line.split()

    def _step(self) -> None:
        """Let each go on for whom something has come."""
        for file, _ in self._poll.poll(self._wait):
            try:
                self._ready[file]()
            except (OSError, ValueError, struct.error, zlib.error) as error:
                self._failures.append(str(error))
                self._poll.unregister(file)

    def _run(self, seconds: float) -> dict[str, float]:
        """Go on for so long; deliveries and parts of a processor used."""
        start, before, delivered = time.monotonic(), os.times(), self._delivered()
        while time.monotonic() < start + seconds:
            self._step()
        seconds, after = time.monotonic() - start, os.times()
        own, kernel = after.user - before.user, after.system - before.system
        return {
            "deliveries_per_s": (self._delivered() - delivered) / seconds,
            "own": own / seconds,
            "busy": (own + kernel) / seconds,
        }

    def _delivered(self) -> int:
        return sum(client.delivered for client in self._all.values())

    def _listen(self, word: str) -> list[str]:
        while self._word[:1] != [word]:
            self._step()
        return self._word[1:]

    def _drain(self, total: int) -> None:
        """Wait until all have got everything, or nothing more comes."""
        delivered, end = -1, time.monotonic() + PATIENCE
        last = time.monotonic() + 5 * PATIENCE
        while delivered < total * len(self._all) and time.monotonic() < min(end, last):
            self._step()
            if delivered != self._delivered():
                delivered, end = self._delivered(), time.monotonic() + PATIENCE

    def measure(self) -> None:
        """All of it, in lines."""
        print("ready", flush=True)
        self._listen("go")
        self.sending = True
        every = max(1, self.clients // self._settings["senders"])
        for number, client in self._all.items():
            if not number % every:
                client.send(self._settings["window"])
        self._run(self._settings["warm"])
        self.delays.clear()
        measured = self._run(self._settings["seconds"])
        delays, self.delays, self.sending = sorted(self.delays), [], False
        print("sent", sum(client.sent for client in self._all.values()), flush=True)
        self._drain(int(self._listen("total")[0]))
        streams = {id(client.stream): client.stream for client in self._all.values()}.values()
        result = {
            "bytes_a_message": len(self.stream.data) / max(1, len(self.stream.ends)),
            **measured,
            "delivered": self._delivered(),
            "delays": [delays[len(delays) * i // 1000] for i in range(1000)] if delays else [],
            "orders": sorted({str(stream.digest) for stream in streams if stream.data}),
            "gaps": sum(stream.gaps for stream in streams),
            "failures": self._failures[:3],
        }
        print(json.dumps(result), flush=True)
        self._listen("end")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever has started it ends it
    try:
        Load(json.loads(sys.argv[1])).measure()
    except OSError as error:
        print("error", error)

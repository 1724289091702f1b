"""The clients of the benchmark, many in one process: `python -m tests.tools.benchmark_load SETTINGS` (JSON).

The load must be faster than the server. All clients of a broadcast server get the same bytes, so each byte is parsed
once, for the client that gets it first. The bytes of the other clients are compared with it, by one memcmp. If a
client gets other bytes, they are parsed separately, and `order` reports it. The delay of a message is measured at one
client, which is another one for each message. With TLS, each client gets other bytes, and decrypting costs as much as
encrypting. So most clients that only receive decrypt the first message, and then count the bytes in the records.

It exchanges lines with the parent process. It prints `ready` when all clients are connected, reads `go`, and prints
`sent N` at the end. Then it reads `total N`, the number of messages that all load processes have sent, and prints its
figures in JSON. It stays connected until its standard input ends.
"""

from __future__ import annotations

import array
import bisect
import collections
import contextlib
import json
import os
import random
import select
import signal
import socket
import ssl
import struct
import sys
import time
import typing
import zlib

PIECE = 1 << 16  # bytes read from a socket at once
RECORD = 1 << 14  # bytes in a record of TLS (RFC 8446 5.1)
RECORD_HEAD = 5  # bytes, which are not encrypted
RECORD_REST = 17  # bytes that encryption adds to a record, besides its head (RFC 8446 5.2)
ROOM = 1 << 24  # least number of bytes of a stream that are kept; all of them would fill the memory
PATIENCE = 3.0  # seconds without data after which a message counts as lost
HEAD = struct.Struct("4s8s15s")  # the digits of sender, number and time of sending (microseconds) in a message
HEAD_FORMAT = b"%04d%08d%015d"
REQUEST = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{}\r\n"
)
OFFER = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
KEY = b"\xa5" * 4  # four equal bytes, so that one table masks the message
MASKED = bytes(byte ^ KEY[0] for byte in range(256))
CLOSE = b"\x88\x82" + KEY + b"\x03\xe8".translate(MASKED)
CHANCE = random.Random(7692)

Cut = typing.Iterator[tuple[int, bytes, bytes, bytes]]  # of frames: length, sender, number, time


def head(first: int, length: int, key: bytes = b"") -> bytes:
    """Return the head of a frame (RFC 6455 5.2); with a key, it is masked."""
    mask = 0x80 if key else 0
    if length < 126:
        return bytes((first, mask | length)) + key
    if length < 1 << 16:
        return struct.pack("!BBH", first, mask | 126, length) + key
    return struct.pack("!BBQ", first, mask | 127, length) + key


class Plain:
    """Text messages of one size, without compression."""

    def __init__(self, size: int) -> None:
        self._start = head(0x81, size)
        self._masked_start = head(0x81, size, KEY)
        self._rest = b"x" * (size - HEAD.size)
        self._masked_rest = self._rest.translate(MASKED)
        self._layout = struct.Struct(f"{len(self._start)}s{HEAD.format}")
        self._length = len(self._start) + size

    def frame(self, sender: int, number: int, now: int) -> bytes:
        """Return the frame of a client."""
        masked = (HEAD_FORMAT % (sender, number, now)).translate(MASKED)
        return b"".join((self._masked_start, masked, self._masked_rest))

    def cut(self, data: bytearray, at: int, inflate: typing.Callable[[bytes], bytes]) -> Cut:
        """Return the frames of a server in `data`, from `at` on."""
        length, rest = self._length, self._layout.size
        for here in range(at, len(data) - length + 1, length):
            start, sender, number, sent = self._layout.unpack_from(data, here)
            if start != self._start or not data.startswith(self._rest, here + rest):
                raise ValueError(f"not a message that was sent: {bytes(data[here : here + 100])!r}")
            yield length, sender, number, sent


def prices(size: int) -> bytes:
    """Return the end of a JSON message of this size, whose figures differ from call to call."""
    rows = [{"name": f"item {i}", "price": CHANCE.randrange(9999) / 100, "stock": i % 7 > 0} for i in range(size // 50)]
    text = b'", "rows": ' + json.dumps(rows).encode()
    while len(text) >= size:
        text = text[: text.rindex(b", {")] + b"]"
    return text + b" " * (size - len(text) - 1) + b"}"


def deflated(data: bytes) -> bytes:
    """Return the end of a compressed message (RFC 7692 7.2.1), which refers to no earlier data."""
    packer = zlib.compressobj(wbits=-12)
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Compressed:
    """JSON messages with permessage-deflate: a new stored block, and one of several blocks compressed before."""

    _before = b'{"at": "'
    _stored = len(_before) + HEAD.size
    _first = struct.pack("<BHH", 0, _stored, _stored ^ 0xFFFF) + _before + HEAD_FORMAT  # RFC 1951 3.2.4

    def __init__(self, size: int) -> None:
        number = max(4, (1 << 17) // size)  # at least 128 KB of them, more than any window
        self._rests = [prices(size - self._stored) for _ in range(number)]
        self._packed = [deflated(rest).translate(MASKED) for rest in self._rests]
        self._most = 2 * size

    def frame(self, sender: int, number: int, now: int) -> bytes:
        """Return the frame of a client."""
        first = (self._first % (sender, number, now)).translate(MASKED)
        packed = self._packed[(sender + number) % len(self._packed)]
        return b"".join((head(0xC1, len(first) + len(packed), KEY), first, packed))

    def cut(self, data: bytearray, at: int, inflate: typing.Callable[[bytes], bytes]) -> Cut:
        """Return the frames of a server in `data`, from `at` on."""
        while len(data) - at >= 2:
            length = data[at + 1]
            start = at + {126: 4, 127: 10}.get(length, 2)
            length = int.from_bytes(data[at + 2 : start], "big") if length >= 126 else length
            if data[at] not in (0x81, 0xC1) or length > self._most:
                raise ValueError(f"not a message that was sent: {bytes(data[at : at + 10])!r}")
            if start + length > len(data):
                return
            payload = bytes(data[start : start + length])
            if data[at] == 0xC1:
                payload = inflate(payload + b"\0\0\xff\xff")
            sender, number, sent = HEAD.unpack_from(payload, len(self._before))
            if payload[self._stored :] != self._rests[(int(sender) + int(number)) % len(self._rests)]:
                raise ValueError(f"not a message that was sent: {payload[:50]!r}")
            yield start + length - at, sender, number, sent
            at = start + length


class Stream:
    """The bytes that all clients get: the positions of the ends of messages, and whether each sender's are in order."""

    def __init__(self, load: Load, mine: typing.Iterable[int]) -> None:
        self.data = bytearray()
        self.start = 0  # position of `data` in the whole stream
        self.ends = array.array("Q")  # position of each message's end
        self.digest = 0  # of the order of messages
        self.gaps = 0  # messages that are not the next of their sender
        mine = tuple(mine)
        # By client: the ends of its own messages, and of messages whose delay it measures, with the time of sending.
        self.echoes: dict[int, collections.deque[int]] = {each: collections.deque() for each in mine}
        self.probes: dict[int, collections.deque[tuple[int, bytes]]] = {each: collections.deque() for each in mine}
        self._next: collections.defaultdict[int, int] = collections.defaultdict(int)
        self._load = load
        self._inflate = zlib.decompressobj(-15).decompress

    @property
    def end(self) -> int:
        """Number of bytes in the stream so far."""
        return self.start + len(self.data)

    def extend(self, data: bytes) -> None:
        """Parse the next bytes."""
        self.data += data
        end = self.ends[-1] if self.ends else 0
        count = len(self.ends)
        for length, name, digits, sent in self._load.shape.cut(self.data, end - self.start, self._inflate):
            end += length
            sender, number = int(name), int(digits)
            self.gaps += number != self._next[sender]
            self._next[sender] = number + 1
            self.digest = hash((self.digest, sender, number))
            self.ends.append(end)
            if sender in self.echoes:
                self.echoes[sender].append(end)
            probe = self.probes.get(count % self._load.clients)
            if probe is not None:
                probe.append((end, sent))
            count += 1
        if len(self.data) > ROOM:
            seen = min(end, self._load.seen_by_all())
            del self.data[: seen - self.start]
            self.start = seen


class Wire:
    """A connection, from its opening handshake on. Sending never blocks."""

    def __init__(self, load: Load, read: typing.Callable[[], None]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", load.port), 10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.recv: typing.Callable[[int], bytes] = self.socket.recv
        self.unsent: collections.deque[memoryview] = collections.deque()
        self._load = load
        self._response = b""
        self._file = self.socket.fileno()
        load.ready[self._file] = read
        load.poll.register(self._file, select.POLLIN)
        self.send(load.request)

    def send(self, data: bytes) -> None:
        """Send as much as the socket accepts; `flush` sends the rest."""
        sent = 0 if self.unsent else self.socket.send(data)
        if sent < len(data):
            self.unsent.append(memoryview(data)[sent:])
            self._load.poll.modify(self._file, select.POLLIN | select.POLLOUT)

    def flush(self) -> None:
        """Send more of the rest."""
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                self.unsent[0] = self.unsent[0][self.socket.send(self.unsent[0]) :]
                if not self.unsent[0]:
                    self.unsent.popleft()
            self._load.poll.modify(self._file, select.POLLIN)

    def is_open(self) -> bool:
        """Read the response to the handshake; return whether it is complete."""
        data = self.recv(PIECE)
        self._response += data
        if data and not self._response.endswith(b"\r\n\r\n"):
            return False
        deflates = b"permessage-deflate" in self._response
        if not self._response.startswith(b"HTTP/1.1 101 ") or deflates != self._load.deflate:
            raise ConnectionError(f"not the expected response: {self._response!r}")
        return True

    def close(self) -> None:
        """End it."""
        self._load.poll.unregister(self._file)
        self.socket.close()


class SecureWire(Wire):
    """The same with TLS; recv raises BlockingIOError if there is no complete record."""

    def __init__(self, load: Load, read: typing.Callable[[], None]) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = load.context.wrap_bio(self._in, self._out)
        self._plain = memoryview(b"")  # data that waits for the TLS handshake
        self._at = 0  # position of the next record in the data that comes next
        self._head = b""  # head of that record, if a part has come
        self.ahead = 0  # bytes in a record of which a part has come
        super().__init__(load, read)
        self.recv = self._read

    def send(self, data: bytes) -> None:
        self._plain = self._plain or memoryview(data)  # nothing is sent before the first response
        with contextlib.suppress(ssl.SSLWantReadError):
            while self._plain:
                self._plain = self._plain[self._tls.write(self._plain) :]
        super().send(self._out.read())

    def _read(self, size: int) -> bytes:
        data = self.socket.recv(size)
        if not data:
            return data
        self._look(data)
        self._in.write(data)
        if self._plain:
            self.send(b"")  # the handshake continues
        records = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while self._in.pending:
                records.append(self._tls.read(RECORD))
                if not records[-1]:  # a close_notify; a server that waits for the answer closes then
                    self._tls.unwrap()
        if self._out.pending:
            super().send(self._out.read())
        if not any(records):
            raise BlockingIOError
        return b"".join(records)

    def _look(self, data: bytes) -> int:
        """Return the number of bytes in the records that begin here."""
        data, at, count = self._head + data, self._at, 0
        while at + RECORD_HEAD <= len(data):
            size = int.from_bytes(data[at + 3 : at + RECORD_HEAD], "big")
            at += RECORD_HEAD + size
            self.ahead = size - RECORD_REST
            count += self.ahead
        self._head, self._at = data[at:], max(0, at - len(data))
        if not self._at:
            self.ahead = 0
        return count

    def count(self) -> int:
        """Return the number of bytes in the available data, without decrypting; a record counts from its head on."""
        data = self.socket.recv(PIECE)
        if not data:
            raise ConnectionError("the server has closed a connection")
        return self._look(data)


class Client:
    """One client, whose bytes are compared with the stream."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._number = number
        self._wire = load.wire(load, self.read)
        is_open = False
        while not is_open:
            with contextlib.suppress(BlockingIOError):
                is_open = self._wire.is_open()
        self._wire.socket.setblocking(False)
        self._recv = self._wire.recv
        self._unsent = self._wire.unsent
        self.position = 0  # in the stream
        self.sent = 0
        self._follow(load.stream)
        self._counts = load.may_count(number)
        self._arrivals: collections.deque[tuple[int, float]] = collections.deque()  # positions and times

    def _follow(self, stream: Stream) -> None:
        self.stream = stream
        self._data = stream.data
        self._echoes = stream.echoes[self._number]
        self._probes = stream.probes[self._number]

    @property
    def delivered(self) -> int:
        """Number of messages that have come."""
        return bisect.bisect_right(self.stream.ends, self.position)

    def read(self) -> None:
        """Read the available data. All but the first lines are for few clients."""
        if self._unsent:
            self._wire.flush()
        data = self._recv(PIECE)
        if not self._data.startswith(data, self.position - self.stream.start) or not data:
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
        if self._counts and self.delivered:
            assert isinstance(self._wire, SecureWire)
            self.position += self._wire.ahead
            self._load.ready[self._wire.socket.fileno()] = self._count

    def _count(self) -> None:
        """Count the available data; the ends of messages in it are known when another client has decrypted them."""
        assert isinstance(self._wire, SecureWire)
        self.position += self._wire.count()
        self._arrivals.append((self.position, time.monotonic() * 1e6))
        while self._arrivals and self._arrivals[0][0] <= self.stream.end:
            position, now = self._arrivals.popleft()
            while self._probes and self._probes[0][0] <= position:
                self._load.delays.append(now - int(self._probes.popleft()[1]))

    def _go_beyond(self, data: bytes) -> None:
        """Handle bytes that are new to the stream, or differ from it."""
        if not data:
            raise ConnectionError("the server has closed a connection")
        at, known = self.position - self.stream.start, self.stream.end - self.position
        if known > len(data) or not self._data.startswith(data[:known], at):
            if self.stream.start:
                raise ValueError("the client gets other bytes than the other clients")
            stream = Stream(self._load, [self._number])
            stream.extend(bytes(self._data[: self.position]))
            self._follow(stream)  # its own, from the start; earlier messages were handled
            while self._echoes and self._echoes[0] <= self.position:
                self._echoes.popleft()
            while self._probes and self._probes[0][0] <= self.position:
                self._probes.popleft()
            known = 0
        self.stream.extend(data[known:])

    def send(self, count: int) -> None:
        """Send a number of messages at once."""
        now = int(time.monotonic() * 1e6)
        frame = self._load.shape.frame
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        self._wire.send(b"".join([frame(self._number, number, now) for number in numbers]))


class Visitor:
    """A client that connects, closes after the handshake, and connects again; it counts handshakes."""

    position = 0

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self.stream = load.stream
        self.sent = self.delivered = 0

    def send(self, count: int) -> None:
        """Connect again."""
        self.sent += count
        self._since = time.monotonic()
        self._leaving = False
        self._wire = self._load.wire(self._load, self.read)
        self._wire.socket.setblocking(False)

    def read(self) -> None:
        """Read the available data; the server is the first to close."""
        if not self._leaving:
            self._leaving = self._wire.is_open()
            if self._leaving:
                self._load.delays.append((time.monotonic() - self._since) * 1e6)
                self.delivered += 1
                self._wire.send(CLOSE)
        elif not self._wire.recv(PIECE):
            self._wire.close()
            if self._load.sending:
                self.send(1)


class Load:
    """The clients of this process: every `step`th of all clients, from `first` on."""

    client: type[Client] | type[Visitor] = Client
    goes_on = True  # a client that gets its message back sends the next

    def __init__(self, settings: dict[str, typing.Any]) -> None:
        self.port: int = settings["port"]
        self.clients: int = settings["clients"]
        self.deflate: bool = settings["deflate"]
        self.shape: Plain | Compressed = (Compressed if self.deflate else Plain)(settings["size"])
        self.request = REQUEST.format(self.port, OFFER if self.deflate else "").encode()
        self.wire: type[Wire] = SecureWire if settings["tls"] else Wire
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE  # a known server
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.sending = False
        self.delays: list[float] = []  # in microseconds
        self.poll: typing.Any = select.epoll() if sys.platform == "linux" else select.poll()
        self.ready: dict[int, typing.Callable[[], None]] = {0: self._hear}  # callbacks by file descriptor
        self.poll.register(0, select.POLLIN)
        self._settings = settings
        self._wait = 0.05 if sys.platform == "linux" else 50
        self._word: list[str] = []  # the last line of standard input
        self._failures: list[str] = []
        mine = range(settings["first"], self.clients, settings["step"])
        self.stream = Stream(self, mine)
        self._all = {number: self.client(self, number) for number in mine}

    def _sends(self, number: int) -> bool:
        return not number % max(1, self.clients // self._settings["senders"])

    def may_count(self, number: int) -> bool:
        """Return whether a client can count bytes without decrypting them."""
        return bool(self._settings["tls"] and not self._sends(number) and number != self._settings["first"])

    def due(self, total: int) -> int:
        """Return the number of messages for the clients of this process, if all clients together have sent `total`."""
        return total * len(self._all)

    def seen_by_all(self) -> int:
        """Return the position in the stream that all clients have reached."""
        return min(client.position for client in self._all.values())

    def _hear(self) -> None:
        line = os.read(0, 4096).decode()
        if not line:
            sys.exit()  # the parent process has ended
        self._word = line.split()

    def _step(self) -> None:
        """Handle the clients that are ready."""
        for file, _ in self.poll.poll(self._wait):
            try:
                self.ready[file]()
            except BlockingIOError:
                pass
            except (OSError, ValueError, struct.error, zlib.error) as error:
                self._failures.append(str(error))
                self.poll.unregister(file)

    def _run(self, seconds: float) -> dict[str, float]:
        """Run for this time; return deliveries, and the parts of a processor that were used."""
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
        """Wait until all clients have got all messages, or no more data comes."""
        delivered, end = -1, time.monotonic() + PATIENCE
        last = time.monotonic() + 10 * PATIENCE
        while delivered < self.due(total) and time.monotonic() < min(end, last):
            self._step()
            if delivered != self._delivered():
                delivered, end = self._delivered(), time.monotonic() + PATIENCE

    def measure(self) -> None:
        """Run the exchange of lines with the parent process."""
        print("ready", flush=True)
        self._listen("go")
        self.sending = self.goes_on
        for number, client in self._all.items():
            if self._sends(number):
                client.send(self._settings["window"])
        self._run(self._settings["warm"])
        self.delays.clear()
        measured = self._run(self._settings["seconds"])
        delays, self.delays, self.sending = sorted(self.delays), [], False
        print("sent", sum(client.sent for client in self._all.values()), flush=True)
        total = int(self._listen("total")[0])
        self._drain(total)
        streams = {id(client.stream): client.stream for client in self._all.values()}.values()
        result = {
            "bytes_a_message": self.stream.end / max(1, len(self.stream.ends)),
            **measured,
            "lost": self.due(total) - self._delivered(),
            "delays": [delays[len(delays) * i // 1000] for i in range(1000)] if delays else [],
            "orders": sorted({str(stream.digest) for stream in streams if stream.ends}),
            "gaps": sum(stream.gaps for stream in streams),
            "failures": self._failures[:3],
        }
        print(json.dumps(result), flush=True)
        self._listen("end")


class Idle(Load):
    """Each client gets one message, and no more."""

    goes_on = False


class Visits(Load):
    """Clients that connect and close."""

    client = Visitor

    def due(self, total: int) -> int:
        """Return the number of handshakes that were started."""
        return sum(client.sent for client in self._all.values())


KINDS = {"room": Load, "idle": Idle, "visits": Visits}

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends it
    try:
        given = json.loads(sys.argv[1])
        KINDS[given["kind"]](given).measure()
    except OSError as error:
        print("error", error)

"""Properties that hold for any bytes in any pieces, compared with other implementations.

It needs the packages hypothesis, websockets and wsproto.
"""

from __future__ import annotations

import datetime
import gzip
import itertools
import pathlib
import tempfile
import typing
import unittest
import zlib

import pywebsock
from pywebsock import HandshakeError, Inflater, MessageReader, Opcode, ProtocolError
from tests.protocol.test_framing import parse
from tests.tools import support

try:
    import hypothesis
    import websockets.frames
    import wsproto.connection
    import wsproto.events
    from hypothesis import strategies as st
    from hypothesis.configuration import set_hypothesis_home_dir
    from websockets.extensions.permessage_deflate import PerMessageDeflate
    from websockets.protocol import Protocol, Side, State
    from wsproto.extensions import PerMessageDeflate as WsprotoDeflate
except ImportError as missing:
    support.require(None, f"the package {missing.name}")
    raise

LIMIT = 3000  # bytes of a message
T = typing.TypeVar("T")
Heard = typing.List[typing.Tuple[int, typing.Any]]  # noqa: UP006 (opcode; text, bytes, or code and reason)

set_hypothesis_home_dir(pathlib.Path(tempfile.gettempdir()) / "pywebsock-hypothesis")
given = hypothesis.given
hypothesis.settings.register_profile(
    "pywebsock",
    max_examples=300 if support.EVERYTHING else 40,
    database=None,
    derandomize=True,
    deadline=datetime.timedelta(seconds=5),  # a longer run counts as a hang
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("pywebsock")


class Step(typing.NamedTuple):
    """A message of a client: its fragments, and the control frames between them."""

    opcode: int
    payload: bytes
    cuts: tuple[int, ...]
    compressed: bool
    between: tuple[tuple[int, bytes], ...]
    key: bytes

    def frames(self) -> bytes:
        """The frames."""
        data = self.payload
        if self.compressed:
            compressor = zlib.compressobj(wbits=-15)
            data = (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
        stream, pieces = b"", pieces_of(data, self.cuts)
        for i, piece in enumerate(pieces):
            fin, rsv = i == len(pieces) - 1, 0 if i else 4 * self.compressed
            stream += support.masked_frame(0 if i else self.opcode, piece, fin=fin, rsv=rsv, key=self.key)
            if not fin:
                stream += b"".join(support.masked_frame(*control, key=self.key) for control in self.between)
        return stream

    def heard(self) -> Heard:
        """The expected result of a reader."""
        number = len(pieces_of(self.payload, self.cuts)) - 1
        message = self.payload.decode() if self.opcode == Opcode.TEXT else self.payload
        return [*self.between * number, (self.opcode, message)]


def pieces_of(data: bytes, cuts: typing.Sequence[int]) -> list[bytes]:
    """Cut bytes at random positions; pieces may be empty."""
    ends = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)])]


CUTS = st.lists(st.integers(0, 1 << 16), max_size=8).map(tuple)
KEYS = st.binary(min_size=4, max_size=4)
CONTROLS = st.lists(st.tuples(st.sampled_from((9, 10)), st.binary(max_size=125)), max_size=2).map(tuple)
TEXTS = st.one_of(st.text(max_size=60), st.text("aé€𝄞", max_size=300)).map(str.encode)
DATA = st.one_of(st.binary(max_size=60), st.binary(min_size=1, max_size=5).map(lambda unit: unit * 500))


def steps(compressed: st.SearchStrategy[bool]) -> st.SearchStrategy[list[Step]]:
    """Draw messages that a client may send."""
    text = st.builds(Step, st.just(1), TEXTS, CUTS, compressed, CONTROLS, KEYS)
    binary = st.builds(Step, st.just(2), DATA, CUTS, compressed, CONTROLS, KEYS)
    controls = st.builds(
        Step, st.sampled_from((9, 10)), st.binary(max_size=125), st.just(()), st.just(False), CONTROLS, KEYS
    )
    return st.lists(st.one_of(text, binary, controls), max_size=6)


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """Draw valid data of which some bytes were changed, removed or inserted."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(0, 4))):
        place, length = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data[place : place + length] = draw(st.binary(max_size=3))
    return bytes(data)


STREAMS = steps(st.booleans()).map(lambda all_steps: b"".join(step.frames() for step in all_steps))
FRAMES = st.lists(  # valid or not, one by one
    st.builds(
        lambda first, payload, key, extra: support.masked_frame(
            first & 15, payload, fin=first > 127, rsv=first >> 4 & 7, key=key, length=len(payload) + extra
        ),
        st.sampled_from([0, 1, 2, 8, 9, 10, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A, 0xC1, 0xC2, 0x41, 0x42, 0xB1, 0x83]),
        st.one_of(st.binary(max_size=20), DATA),
        KEYS,
        st.sampled_from([0] * 20 + [1, -1, 100, 1 << 40]),
    ),
    max_size=6,
).map(b"".join)
ANY_STREAM = st.one_of(st.binary(max_size=300), mutated(STREAMS))


def read(pieces: typing.Iterable[bytes], compressed: bool = True) -> tuple[Heard, int | None]:
    """Return the messages up to a Close, and the code of an error."""
    feed = MessageReader(LIMIT, compressed).feed
    heard: Heard = []
    try:
        for opcode, payload in itertools.chain.from_iterable(map(feed, pieces)):
            if opcode == Opcode.CLOSE:
                return [*heard, (8, pywebsock.parse_close(bytes(payload)))], None
            if opcode:
                heard.append((opcode, payload.decode() if opcode == Opcode.TEXT else bytes(payload)))
    except ProtocolError as error:
        return heard, int(error.code)
    return heard, None


def read_with_websockets(stream: bytes, compressed: bool = True) -> tuple[Heard, bool]:
    """Return the same, with the package websockets."""
    protocol = Protocol(Side.SERVER, state=State.OPEN, max_size=LIMIT)
    if compressed:
        protocol.extensions = [PerMessageDeflate(True, True, 15, 15)]
    protocol.receive_data(stream)
    heard: Heard = []
    opcode, payload = 0, b""
    for frame in protocol.events_received():
        assert isinstance(frame, websockets.frames.Frame)
        if frame.opcode == 8:
            close = websockets.frames.Close.parse(frame.data)
            heard.append((8, (int(close.code), close.reason)))
        elif frame.opcode > 8:
            heard.append((int(frame.opcode), bytes(frame.data)))
        else:
            opcode, payload = frame.opcode or opcode, payload + frame.data
            if frame.fin:
                try:
                    heard.append((int(opcode), payload.decode() if opcode == 1 else payload))
                except UnicodeDecodeError:
                    return heard, True
                payload = b""
    return heard, protocol.parser_exc is not None


def read_with_wsproto(stream: bytes) -> Heard:
    """Return the messages in a valid stream, with the package wsproto."""
    extension = WsprotoDeflate(client_no_context_takeover=True, server_no_context_takeover=True)
    extension.accept("permessage-deflate; client_no_context_takeover; server_no_context_takeover")
    connection = wsproto.connection.Connection(wsproto.connection.ConnectionType.SERVER, [extension])
    connection.receive_data(stream)
    heard: Heard = []
    parts: list[typing.Any] = []
    for event in connection.events():
        if isinstance(event, wsproto.events.Message):
            parts.append(event.data)
            if event.message_finished:
                text = isinstance(event, wsproto.events.TextMessage)
                heard.append((1, "".join(parts)) if text else (2, b"".join(parts)))
                parts = []
        elif isinstance(event, wsproto.events.Ping):
            heard.append((9, bytes(event.payload)))
        elif isinstance(event, wsproto.events.Pong):
            heard.append((10, bytes(event.payload)))
    return heard


class Pieces(unittest.TestCase):
    """The result is the same in one piece, byte by byte, and in any pieces."""

    def assert_same(self, read: typing.Callable[[list[bytes]], T], data: bytes, cuts: tuple[int, ...]) -> T:
        """Check that the result is the same in all pieces, and return it."""
        whole = read([data])
        self.assertEqual(read(pieces_of(data, cuts)), whole)
        self.assertEqual(read([data[i : i + 1] for i in range(len(data))]), whole)
        return whole

    @given(st.one_of(ANY_STREAM, FRAMES), CUTS)
    def test_frames(self, stream: bytes, cuts: tuple[int, ...]) -> None:
        """FrameReader."""
        frames, code = self.assert_same(lambda pieces: parse(*pieces), stream, cuts)
        self.assertIn(code, (None, 1002))
        self.assertLessEqual(sum(6 + len(payload) for *_, payload in frames), len(stream))

    @given(st.one_of(ANY_STREAM, FRAMES), CUTS, st.booleans())
    def test_messages(self, stream: bytes, cuts: tuple[int, ...], takeover: bool) -> None:
        """MessageReader, and the context that it keeps, if the stream is valid."""

        def read_all(pieces: list[bytes]) -> tuple[Heard, bytes, int]:
            reader = MessageReader(LIMIT, compressed=True, takeover=takeover)
            heard: Heard = []
            try:
                for opcode, payload in itertools.chain.from_iterable(map(reader.feed, pieces)):
                    if opcode:
                        heard.append((opcode, bytes(payload)))
            except ProtocolError:
                return heard, reader.context, -1
            return heard, reader.context, reader.size

        heard, context, size = self.assert_same(read_all, stream, cuts)
        self.assertLessEqual(size, LIMIT + pywebsock.INFLATER_SIZE)
        self.assertTrue(takeover or not context)
        self.assertTrue(all(len(payload) <= LIMIT for _, payload in heard))

    @given(st.one_of(st.binary(max_size=200), mutated(DATA.map(lambda data: pywebsock.deflate(data, 15)))), CUTS)
    def test_inflated(self, data: bytes, cuts: tuple[int, ...]) -> None:
        """Inflater, and its context."""

        def inflate(pieces: list[bytes]) -> tuple[bytes, bytes] | int:
            inflater, plain = Inflater(), b""
            try:
                for i, piece in enumerate(pieces, 1):
                    plain += b"".join(inflater.inflate(piece, i == len(pieces)))
            except ProtocolError as error:
                return int(error.code)
            return plain, inflater.context

        if data:
            self.assert_same(inflate, data, cuts)

    @given(st.one_of(ANY_STREAM, FRAMES), st.booleans(), CUTS)
    def test_trace(self, stream: bytes, opened: bool, cuts: tuple[int, ...]) -> None:
        """follow(), with a handshake in the same pieces, and with garbage in its place."""

        def lines(pieces: list[bytes]) -> list[str]:
            said: list[str] = []
            trace = pywebsock.follow("X", lambda line, *arguments: said.append(line % arguments))
            next(trace)
            for piece in pieces:
                trace.send(piece)
            return said

        whole = self.assert_same(lines, (support.request() if opened else b"") + stream, cuts)
        self.assertTrue(all(line.isascii() and line.isprintable() for line in whole))


class Messages(unittest.TestCase):
    """MessageReader."""

    @given(steps(st.booleans()), CUTS)
    def test_cut_anywhere(self, sent: list[Step], cuts: tuple[int, ...]) -> None:
        """Valid streams give the same messages in any pieces, and with other implementations."""
        stream = b"".join(step.frames() for step in sent)
        heard = [each for step in sent for each in step.heard()]
        self.assertEqual(read([stream]), (heard, None))
        self.assertEqual(read(pieces_of(stream, cuts)), (heard, None))
        self.assertEqual(read(stream[i : i + 1] for i in range(len(stream))), (heard, None))
        self.assertEqual(read_with_websockets(stream), (heard, False))
        if not any(step.compressed and step.between for step in sent):  # wsproto 1.3 does not read these
            self.assertEqual(read_with_wsproto(stream), heard)

    @given(ANY_STREAM, CUTS, st.booleans())
    def test_any_bytes(self, stream: bytes, cuts: tuple[int, ...], compressed: bool) -> None:
        """Any bytes give messages or a ProtocolError, in bounded memory; the messages are the same in any pieces."""
        results: list[tuple[Heard, int | None]] = []
        ways = ([stream], pieces_of(stream, cuts), [stream[i : i + 1] for i in range(len(stream))])
        peak = support.peak_memory(lambda: results.extend(read(way, compressed) for way in ways))
        self.assertLess(peak, 1 << 20)
        heard, code = results[0]
        self.assertIn(code, (None, 1002, 1007, 1009))
        for _, message in heard:
            self.assertLessEqual(len(message), LIMIT)
        for other, other_code in results[1:]:
            self.assertEqual((other, other_code is None), (heard, code is None))

    @given(
        st.one_of(
            st.binary(max_size=300), mutated(steps(st.just(False)).map(lambda x: b"".join(s.frames() for s in x)))
        )
    )
    def test_any_bytes_and_websockets(self, stream: bytes) -> None:
        """The package websockets agrees on valid data; some errors are found here before the frame is complete."""
        heard, code = read([stream], compressed=False)
        others, failed = read_with_websockets(stream, compressed=False)
        if code is None:
            self.assertEqual((others, failed), (heard, False))
        else:
            self.assertEqual(others[: len(heard)], heard)

    @given(steps(st.booleans()), st.integers(0, LIMIT))
    def test_limit(self, sent: list[Step], limit: int) -> None:
        """A message is refused only because of the limit."""
        stream = b"".join(step.frames() for step in sent)
        reader, sizes = MessageReader(limit, compressed=True), [len(step.payload) for step in sent if step.opcode < 8]
        try:
            list(reader.feed(stream))
            self.assertLessEqual(max(sizes, default=0), limit)
        except ProtocolError as error:
            self.assertEqual(error.code, 1009)
            self.assertGreater(max(sizes), limit)


class Frames(unittest.TestCase):
    """Frames from the server."""

    @given(
        st.lists(st.one_of(st.text(max_size=300), st.binary(max_size=300), DATA), max_size=5), st.sampled_from((0, 15))
    )
    def test_read_by_a_client(self, messages: list[str | bytes], window: int) -> None:
        stream = b"".join(pywebsock.outgoing_message(message).frame(window) for message in messages)
        client = Protocol(Side.CLIENT, state=State.OPEN)
        client.extensions = [PerMessageDeflate(True, True, 15, 15)] if window else []
        client.receive_data(stream + pywebsock.serialize_close(1000, "over"))
        self.assertIsNone(client.parser_exc)
        *frames, _ = client.events_received()
        heard = [frame.data for frame in frames if isinstance(frame, websockets.frames.Frame)]
        self.assertEqual(heard, [m.encode() if isinstance(m, str) else m for m in messages])
        self.assertEqual(client.close_rcvd, websockets.frames.Close(1000, "over"))

    @given(st.sampled_from(tuple(Opcode)), st.one_of(st.binary(max_size=200), DATA))
    def test_frame(self, opcode: Opcode, payload: bytes) -> None:
        payload = payload[:125] if opcode >= 8 else payload
        data = pywebsock.serialize_frame(opcode, payload)
        position = 0

        def read_exact(size: int) -> typing.Generator[None, None, bytes]:
            nonlocal position
            yield
            position += size
            return data[position - size : position]

        parser = websockets.frames.Frame.parse(read_exact, mask=False)
        try:
            while True:
                next(parser)
        except StopIteration as stop:
            frame = stop.value
        self.assertEqual((frame.fin, frame.opcode, bytes(frame.data)), (True, opcode, payload))
        self.assertEqual(position, len(data))

    @given(st.sampled_from(sorted(pywebsock.CODES_ON_THE_WIRE)), st.text(max_size=200))
    def test_close(self, code: int, reason: str) -> None:
        """A parsed reason is the same, or its beginning."""
        frame = pywebsock.serialize_close(code, reason)
        self.assertLessEqual(len(frame), 127)
        got, text = pywebsock.parse_close(frame[2:])
        self.assertEqual(got, code)
        self.assertTrue(reason.startswith(text))
        self.assertTrue(text == reason or len(reason[: len(text) + 1].encode()) > 123)

    @given(st.binary(max_size=3000), KEYS)
    def test_mask(self, payload: bytes, key: bytes) -> None:
        slow = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
        self.assertEqual(pywebsock.apply_mask(payload, key), slow)


class Deflate(unittest.TestCase):
    """permessage-deflate."""

    @given(st.one_of(DATA, st.binary(max_size=2000)), st.integers(9, 15), CUTS)
    def test_round_trip(self, payload: bytes, window: int, cuts: tuple[int, ...]) -> None:
        inflater, plain = Inflater(), b""
        pieces = pieces_of(pywebsock.deflate(payload, window), cuts)
        for i, piece in enumerate(pieces, 1):
            plain += b"".join(inflater.inflate(piece, i == len(pieces)))
        self.assertEqual(plain, payload)

    @given(st.one_of(st.binary(max_size=200), mutated(DATA.map(lambda data: pywebsock.deflate(data, 15)))))
    def test_any_bytes(self, data: bytes) -> None:
        """Any bytes give the same result as zlib, or an error."""
        try:
            plain = b"".join(Inflater().inflate(data, True))
        except ProtocolError as error:
            self.assertEqual(error.code, 1007)
        else:
            raw = zlib.decompressobj(wbits=-15)
            self.assertTrue(plain.startswith(raw.decompress(data + b"\0\0\xff\xff")))

    PARAMETERS = st.sampled_from(
        (
            "server_no_context_takeover",
            "client_no_context_takeover",
            "client_max_window_bits",
            "server_max_window_bits",
            "x",
        )
    )
    VALUES = st.one_of(st.none(), st.integers(7, 16).map(str), st.integers(7, 16).map('"{}"'.format))
    OFFER = st.lists(st.tuples(PARAMETERS, VALUES), max_size=4)

    @given(st.lists(OFFER, max_size=3))
    def test_offers(self, offers: list[list[tuple[str, str | None]]]) -> None:
        """The response is valid for one of the offers, as the package websockets checks it; or there is none."""
        field = ", ".join(
            "; ".join(("permessage-deflate", *(name if value is None else f"{name}={value}" for name, value in offer)))
            for offer in offers
        )
        window, answer = pywebsock.negotiate_deflate(field)
        good = [offer for offer in offers if self.is_good(offer)]
        self.assertEqual(bool(window), bool(good))
        if good:
            asked = {name: value and value.strip('"') for name, value in good[0]}
            self.assertEqual(window, int(asked.get("server_max_window_bits") or 15))
            expected = [name for name in asked if "_no_context_" in name]
            if "server_max_window_bits" in asked:
                expected.append(f"server_max_window_bits={window}")
            extension, *parameters = answer.split("; ")
            self.assertEqual((extension, sorted(parameters)), ("permessage-deflate", sorted(expected)))
        else:
            self.assertEqual(answer, "")

    @staticmethod
    def is_good(offer: list[tuple[str, str | None]]) -> bool:
        """Return whether the offer can be accepted (RFC 7692 7.1); a window of 8 bits cannot."""
        asked = {name: value and value.strip('"') for name, value in offer}
        takeovers = (asked.get("server_no_context_takeover"), asked.get("client_no_context_takeover"))
        return (
            len(asked) == len(offer)
            and "x" not in asked
            and takeovers == (None, None)
            and (asked.get("client_max_window_bits") or "15") in map(str, range(8, 16))
            and asked.get("server_max_window_bits", "15") in [str(bits) for bits in range(9, 16)]
        )


class Handshake(unittest.TestCase):
    """The opening handshake."""

    FIELDS = 'permessage-deflate; client_max_window_bits; server_max_window_bits=10, x; a="b"'
    REQUESTS = st.sampled_from(
        (
            support.request(),
            support.request(Origin="null", Sec_WebSocket_Extensions=FIELDS),
            support.request(Origin="http://127.0.0.1:4545", Host="127.0.0.1:4545", target="http://[::1]/a?b"),
            support.request(version="1.0", method="POST", Connection="keep-alive, Upgrade") + b"rest",
        )
    )

    @given(st.one_of(st.binary(max_size=300), mutated(REQUESTS)), CUTS)
    def test_any_bytes(self, data: bytes, cuts: tuple[int, ...]) -> None:
        """Any bytes give a request or a HandshakeError, the same in any pieces."""
        whole = support.answer_to_request([data])
        self.assertEqual(support.answer_to_request(pieces_of(data, cuts)), whole)
        self.assertEqual(support.answer_to_request(data[i : i + 1] for i in range(len(data))), whole)

    @given(st.one_of(st.text(max_size=100), mutated(st.just(FIELDS.encode())).map(lambda data: data.decode("latin-1"))))
    def test_any_extensions(self, field: str) -> None:
        try:
            window, answer = pywebsock.negotiate_deflate(field)
        except HandshakeError as error:
            self.assertEqual(error.status, 400)
        else:
            self.assertIn(window, (0, *range(9, 16)))
            self.assertEqual(bool(window), answer.startswith("permessage-deflate"))

    @given(st.text(max_size=100), st.text(max_size=50), st.lists(st.text(max_size=50), max_size=3))
    def test_any_values(self, origin: str, value: str, listed: list[str]) -> None:
        """Any values of other header fields, and printable()."""
        request = pywebsock.Request("GET", value, (1, 1), {"host": value, "origin": origin, "sec-websocket-key": value})
        self.assertIsInstance(request.path, str)
        for check in (
            lambda: pywebsock.check_host(request),
            lambda: pywebsock.check_origin(request, listed),
            lambda: pywebsock.check_upgrade(request),
            lambda: pywebsock.compute_accept(value),
        ):
            try:
                check()
            except HandshakeError as error:
                self.assertIn(error.status, (400, 403, 405, 426))
        self.assertTrue(pywebsock.printable(value).isascii())

    @given(st.text(max_size=60), st.sampled_from(["", "ws://", "https://", "https://*."]))
    def test_any_origin(self, text: str, start: str) -> None:
        """The option that the error names is accepted, and allows the page."""
        request = pywebsock.Request("GET", "/", (1, 1), {"host": "localhost", "origin": start + text})
        try:
            pywebsock.check_origin(request, ["https://example.com"])
        except HandshakeError as error:
            hint = str(error).partition("(--origin ")[2].partition(" ")[0]
            if hint:
                pywebsock.check_origin(request, [pywebsock.parse_origin(hint)])
            else:
                self.assertIn("only --origin '*' allows it", str(error))

    @given(st.binary(max_size=300), CUTS, CUTS, st.sampled_from(["", "gzip", "deflate"]))
    def test_any_body(self, body: bytes, chunks: tuple[int, ...], cuts: tuple[int, ...], coding: str) -> None:
        """A body in chunks or compressed is the same; if it is cut off, it is a HandshakeError."""
        coded = zlib.compress(body) if coding == "deflate" else gzip.compress(body) if coding == "gzip" else body
        parts = [part for part in pieces_of(coded, chunks) if part]
        data = b"".join(b"%X;x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nX: y\r\n\r\n"
        headers = {"transfer-encoding": "chunked", "content-encoding": coding}
        request = pywebsock.Request("POST", "/", (1, 1), headers)
        pieces = support.arriving(pieces_of(data, cuts))
        self.assertEqual(b"".join(pywebsock.read_body(request, 1000, pieces, 1000)), body)
        pieces = support.arriving(pieces_of(data[: -1 - sum(cuts) % len(data)], cuts))
        with self.assertRaises(HandshakeError):
            list(pywebsock.read_body(request, 1000, pieces, 1000))


if __name__ == "__main__":
    unittest.main()

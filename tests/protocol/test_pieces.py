"""Each reader gives the same results for bytes in one piece, byte by byte, and in random pieces."""

from __future__ import annotations

import itertools
import random
import typing
import unittest
import zlib

import pywebsock
from tests.protocol.test_framing import parse
from tests.tools.support import ACCEPT, answer_to_request, compress, masked_frame, pieces, request

Reader = typing.Callable[[list[bytes]], object]


def read_frames(data: list[bytes]) -> object:
    """Return the frames of a FrameReader, joined from their pieces: (fin, rsv1, opcode, payload)."""
    return parse(*data)


def read_messages(data: list[bytes], *, compressed: bool = False, takeover: bool = False) -> object:
    """Return the messages of a MessageReader, up to an error, and whether a message is unfinished."""
    reader = pywebsock.MessageReader(1000, compressed, takeover)
    messages: list[object] = []
    try:
        for opcode, payload in itertools.chain.from_iterable(map(reader.feed, data)):
            if opcode:
                messages.append((opcode, bytes(payload)))
    except pywebsock.ProtocolError as error:
        return messages, int(error.code)
    return messages, reader.size > 0


def read_compressed(data: list[bytes]) -> object:
    """The same with compression."""
    return read_messages(data, compressed=True)


def read_with_takeover(data: list[bytes]) -> object:
    """The same with messages that may refer to earlier ones."""
    return read_messages(data, compressed=True, takeover=True)


def inflate(data: list[bytes]) -> object:
    """Return the whole output of an Inflater."""
    inflater, last = pywebsock.Inflater(), len(data) - 1
    try:
        return b"".join(plain for i, piece in enumerate(data) for plain in inflater.inflate(piece, i == last))
    except pywebsock.ProtocolError as error:
        return int(error.code)


def read_request(data: list[bytes]) -> object:
    """Return the accept key of a request and the data after its head, or the status of the error."""
    answer = answer_to_request(data)
    return answer[0] if len(answer) == 2 else (answer[4], answer[1])


def trace(data: list[bytes]) -> object:
    """Return the lines of the trace, each up to the opcode."""
    said: list[str] = []
    following = pywebsock.follow("X", lambda line, *arguments: said.append((line % arguments).partition(" MASK")[0]))
    next(following)
    for piece in data:
        following.send(piece)
    return said


def together(*messages: bytes) -> list[bytes]:
    """Return compressed messages that refer to earlier ones (RFC 7692 7.2.3.2)."""
    compressor = zlib.compressobj(wbits=-15)
    return [(compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4] for message in messages]


class Pieces(unittest.TestCase):
    """The readers of the pure parts, with valid and invalid input."""

    WORD = "κόσμε €𝄞".encode()
    LONG = bytes(range(200)) * 4  # a length of 16 bits
    PING = masked_frame(9, b"ping")
    BETWEEN = masked_frame(1, WORD[:4], fin=False) + PING + masked_frame(0, WORD[4:])
    STREAM = masked_frame(1, WORD) + pieces(2, LONG[:300], b"", LONG[300:]) + PING
    HEARD = ((1, WORD), (2, LONG), (9, b"ping"))  # in STREAM
    FIRST, SECOND = together(b"Hello" * 30, b"Hello" * 29)
    COMPRESSED = masked_frame(2, FIRST, rsv=4) + BETWEEN + masked_frame(1, SECOND, rsv=4)
    CASES: tuple[tuple[str, Reader, bytes, object], ...] = (
        (
            "frames",
            read_frames,
            BETWEEN + masked_frame(2, LONG),
            (
                [
                    (False, False, 1, WORD[:4]),
                    (True, False, 9, b"ping"),
                    (True, False, 0, WORD[4:]),
                    (True, False, 2, LONG),
                ],
                None,
            ),
        ),
        ("not masked", read_frames, PING + b"\x81\x05Hello", ([(True, False, 9, b"ping")], 1002)),
        (
            "a length in too many bytes",
            read_frames,
            PING + b"\x82\xfe\x00\x05" + PING,
            ([(True, False, 9, b"ping")], 1002),
        ),
        ("messages", read_messages, STREAM + BETWEEN, ([*HEARD, (9, b"ping"), (1, WORD)], False)),
        ("an unfinished message", read_messages, STREAM + BETWEEN[:-1], ([*HEARD, (9, b"ping")], True)),
        ("an unfinished Ping", read_messages, STREAM + PING[:-1], ([*HEARD], False)),
        ("not UTF-8", read_messages, STREAM + masked_frame(1, WORD + b"\xff" + WORD) + PING, ([*HEARD], 1007)),
        ("too long", read_messages, STREAM + pieces(2, LONG, LONG) + PING, ([*HEARD], 1009)),
        ("nothing to continue", read_messages, STREAM + masked_frame(0, b"x") + PING, ([*HEARD], 1002)),
        ("compressed, not agreed on", read_messages, STREAM + COMPRESSED, ([*HEARD], 1002)),
        (
            "compressed",
            read_with_takeover,
            COMPRESSED,
            ([(2, b"Hello" * 30), (9, b"ping"), (1, WORD), (1, b"Hello" * 29)], False),
        ),
        (
            "compressed, without what it refers to",
            read_compressed,
            COMPRESSED + PING,
            ([(2, b"Hello" * 30), (9, b"ping"), (1, WORD)], 1007),
        ),
        (
            "too long when inflated",
            read_compressed,
            PING + masked_frame(2, compress(bytes(1001)), rsv=4),
            ([(9, b"ping")], 1009),
        ),
        ("inflated", inflate, compress(LONG * 200), LONG * 200),
        ("blocks with BFINAL", inflate, bytes.fromhex("f3 48 cd c9 c9 07 00") * 3 + b"\x00", b"Hello" * 3),
        ("a block that is cut", inflate, compress(LONG)[:-9], 1007),
        ("corrupt", inflate, bytes.fromhex("f2 48 cd c9 c9 07 00 00 00 00 ff 06"), 1007),
        ("a request", read_request, request() + b"\r\n\r\nrest", (ACCEPT, b"\r\n\r\nrest")),
        ("empty lines first", read_request, b"\r\n\r\n" + request(), (ACCEPT, b"")),
        ("a request without a key", read_request, request(Sec_WebSocket_Key=None), 400),
        ("another version", read_request, request(Sec_WebSocket_Version="8"), 426),
        ("a request of HTTP/2", read_request, request(version="2.0"), 400),
        (
            "a trace",
            trace,
            b"GET / HTTP/1.1\r\nSec-WebSocket-Key: x\r\n\r\n" + BETWEEN + b"\xb3\x01x",
            [
                "X GET / HTTP/1.1",
                "X Sec-WebSocket-Key: x",
                "X FIN=0 RSV=000 opcode=1 TEXT  ",
                "X FIN=1 RSV=000 opcode=9 PING  ",
                "X FIN=1 RSV=000 opcode=0 CONT  ",
                "X FIN=1 RSV=011 opcode=3 ?     ",
            ],
        ),
        ("a trace of no WebSocket", trace, b"GET / HTTP/1.1\r\n\r\n" + STREAM, ["X GET / HTTP/1.1"]),
    )

    def test_one_piece(self) -> None:
        for what, read, data, expected in self.CASES:
            with self.subTest(what):
                self.assertEqual(read([data]), expected)

    def test_byte_by_byte(self) -> None:
        for what, read, data, expected in self.CASES:
            with self.subTest(what):
                self.assertEqual(read([data[i : i + 1] for i in range(len(data))]), expected)

    def test_random_pieces(self) -> None:
        """Random pieces, some of them empty."""
        rng = random.Random(12)
        for what, read, data, expected in self.CASES:
            for _ in range(20):
                cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(1, 12)))
                with self.subTest(what, cuts=cuts):
                    self.assertEqual(read([data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]), expected)


if __name__ == "__main__":
    unittest.main()

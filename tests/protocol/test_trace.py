"""Trace (RFC 6455 5.2, drawn as it passes): the lines for a handshake and each frame."""

from __future__ import annotations

import random
import unittest

import pywebsock
from tests.tools.support import ACCEPT, compress, growth, masked_frame, peak_memory, request

RESPONSE = pywebsock.serialize_response(101, [("Upgrade", "websocket"), ("Sec-WebSocket-Accept", ACCEPT)])
OPEN = request()
ASKED = pywebsock.Request("GET", "/", (1, 1), {})


class TraceTestCase(unittest.TestCase):
    """The lines of follow()."""

    def lines(self, *pieces: bytes, name: str = "X in ") -> list[str]:
        """Return the lines for these pieces of one direction."""
        said: list[str] = []
        trace = pywebsock.follow(name, lambda line, *arguments: said.append(line % arguments))
        next(trace)
        for piece in pieces:
            trace.send(piece)
        return said

    def frames(self, *pieces: bytes) -> list[str]:
        """Return the lines after an opening handshake, without the name."""
        head = OPEN.count(b"\r\n") - 1
        return [line.removeprefix("X in  ") for line in self.lines(OPEN, *pieces)[head:]]


class Handshakes(TraceTestCase):
    """The opening handshake, line by line."""

    def test_both_sides(self) -> None:
        for name, head in (("X in ", OPEN), ("X out", RESPONSE)):
            expected = [f"{name} {line}" for line in head.decode().split("\r\n")[:-2]]
            self.assertGreater(len(expected), 2)
            self.assertEqual(self.lines(head, name=name), expected)
            self.assertEqual(self.lines(*(head[i : i + 1] for i in range(len(head))), name=name), expected)

    def test_frames_that_come_with_it(self) -> None:
        """Frames in the piece with the end of the head."""
        for head in (OPEN, RESPONSE):
            for cut in (len(head) - 1, len(head), len(head) + 1, len(head) + 6):
                data = head + b"\x81\x05Hello"
                *_, line = self.lines(data[:cut], data[cut:])
                self.assertIn('opcode=1 TEXT   MASK=0 len=5 (7 bits)                     48656c6c "Hello"', line)

    def test_empty_input(self) -> None:
        self.assertEqual(self.lines(), [])
        self.assertEqual(self.lines(b"", b""), [])
        self.assertEqual(self.lines(OPEN[:-1]), [])

    def test_escaped(self) -> None:
        (line,) = self.lines(b"GET /\x1b[2J\xe9 HTTP/1.1\r\n\r\n")
        self.assertEqual(line, r"X in  GET /\x1b[2J\xe9 HTTP/1.1")

    def test_http(self) -> None:
        """Data after the head of an ordinary request or response is not a frame."""
        response = pywebsock.http_response(ASKED, 200, "text/html", b"\x81\x05Hello" * 100)
        refusal = pywebsock.http_response(ASKED, 426, "text/plain", b"\x81\x05Hello", ("Upgrade", "websocket"))
        post = b"POST / HTTP/1.1\r\nContent-Length: 7\r\n\r\n\x81\x05Hello"
        for data in (response, refusal, post):
            with self.subTest(data[:20]):
                lines = self.lines(data, b"\x81\x05Hello")
                self.assertEqual(len(lines), data.partition(b"\r\n\r\n")[0].count(b"\r\n") + 1)

    def test_other_heads(self) -> None:
        """A head after empty lines, a head with line ends that are refused, and the response after a 100."""
        later = pywebsock.serialize_response(100, ()) + pywebsock.http_response(ASKED, 202, "text/plain", b"sent")
        for data, first, last in (
            (b"\r\n\r\n" + OPEN, "GET / HTTP/1.1", "Sec-WebSocket-Version: 13"),
            (b"GET / HTTP/1.1\nHost: a\n\n", r"GET / HTTP/1.1\nHost: a", r"GET / HTTP/1.1\nHost: a"),
            (later, "HTTP/1.1 100 Continue", later.decode().split("\r\n")[-3]),
        ):
            for size in (1, len(data)):
                with self.subTest(first, size=size):
                    lines = self.lines(*[data[i : i + size] for i in range(0, len(data), size)])
                    self.assertEqual((lines[0], lines[-1]), (f"X in  {first}", f"X in  {last}"))

    def test_no_http(self) -> None:
        """Data that is not HTTP is shown, cut to the longest head."""
        (line,) = self.lines(*[b"\x16\x03\x01" * 1000] * 20)
        self.assertTrue(line.startswith(r"X in  \x16\x03\x01\x16"))
        self.assertLess(len(line), 1000)

    def test_memory(self) -> None:
        """The trace keeps no data that it has shown, or that it does not show."""
        piece = b"\x16\x03\x01" * 10_000
        promise = OPEN + b"\x82\xff" + b"\xff" * 8 + b"abcd"
        for start in (piece, b"GET / HTTP/1.1\r\n\r\n", promise):
            with self.subTest(start[:20]):
                self.assertLess(peak_memory(lambda start=start: self.lines(start, *[piece] * 100)), 1 << 18)  # type: ignore[misc]


class Frames(TraceTestCase):
    """Each frame is one line, with its fields in the order of the wire."""

    def test_examples(self) -> None:
        """RFC 6455 5.7, and RFC 7692 7.2.3.1."""
        k256, k64 = bytes(256), bytes(65536)
        for data, expected in (
            (
                "8105 48656c6c6f",
                'FIN=1 RSV=000 opcode=1 TEXT   MASK=0 len=5 (7 bits)                     48656c6c "Hello"',
            ),
            (
                "8185 37fa213d 7f9f4d5158",
                'FIN=1 RSV=000 opcode=1 TEXT   MASK=1 len=5 (7 bits)        key=37fa213d 7f9f4d51 "Hello"',
            ),
            ("0103 48656c", 'FIN=0 RSV=000 opcode=1 TEXT   MASK=0 len=3 (7 bits)                     48656c   "Hel"'),
            ("8002 6c6f", 'FIN=1 RSV=000 opcode=0 CONT   MASK=0 len=2 (7 bits)                     6c6f     "lo"'),
            (
                "8905 48656c6c6f",
                'FIN=1 RSV=000 opcode=9 PING   MASK=0 len=5 (7 bits)                     48656c6c "Hello"',
            ),
            (
                "8a85 37fa213d 7f9f4d5158",
                'FIN=1 RSV=000 opcode=A PONG   MASK=1 len=5 (7 bits)        key=37fa213d 7f9f4d51 "Hello"',
            ),
            (
                "827e0100" + k256.hex(),
                "FIN=1 RSV=000 opcode=2 BINARY MASK=0 len=256 (7+16 bits)                00000000 "
                + '"'
                + r"\x00" * 10
                + '"...',
            ),
            (
                "827f0000000000010000" + k64.hex(),
                "FIN=1 RSV=000 opcode=2 BINARY MASK=0 len=65536 (7+64 bits)              00000000 "
                + '"'
                + r"\x00" * 10
                + '"...',
            ),
            (
                "c107 f248cdc9c90700",
                'FIN=1 RSV=100 opcode=1 TEXT   MASK=0 len=7 (7 bits)                     f248cdc9 inflated "Hello"',
            ),
            ("8100", "FIN=1 RSV=000 opcode=1 TEXT   MASK=0 len=0 (7 bits)"),
            ("8180 00000000", "FIN=1 RSV=000 opcode=1 TEXT   MASK=1 len=0 (7 bits)        key=00000000"),
        ):
            with self.subTest(data[:30]):
                self.assertEqual(self.frames(bytes.fromhex(data)), [expected])

    def test_close(self) -> None:
        for payload, text in (
            (b"", ""),
            (b"\x03\xe8", "1000 NORMAL_CLOSURE"),
            (b"\x03\xe9bye", '1001 GOING_AWAY "bye"'),
            (b"\x0f\xa0own", '4000 ? "own"'),
            (b"\x03\xec", "1004 ?"),
            (b"\x03", "3 ?"),
            (b"\x00\x01", "1 ?"),
        ):
            with self.subTest(payload):
                (line,) = self.frames(masked_frame(8, payload, key=bytes(4)))
                self.assertIn("opcode=8 CLOSE ", line)
                self.assertTrue(line.endswith(f"{payload[:4].hex():8} {text}".rstrip()), line)

    def test_invalid_frames(self) -> None:
        """Invalid frames are shown, and the frames after them, too."""
        for data, text in (
            (b"\xb3\x81abcdA", "FIN=1 RSV=011 opcode=3 ?      MASK=1 len=1 (7 bits)        key=61626364 41"),
            (b"\x09\x81abcdA", "FIN=0 RSV=000 opcode=9 PING "),
            (b"\x82\xfe\x00\x01abcdA", "len=1 (7+16 bits)"),
            (b"\xc1\x81abcd\x9e", " compressed, refers to earlier messages"),  # or invalid deflate data
            (b"\x81\x81\x00\x00\x00\x00\xff", r'"\ufffd"'),
            (b"\x88\xfe\x00\xc8abcd" + b"x" * 200, "len=200 (7+16 bits)"),
        ):
            with self.subTest(data[:20]):
                wrong, good = self.frames(data + b"\x81\x02ok")
                self.assertIn(text, wrong)
                self.assertIn('"ok"', good)

    def test_incomplete_frames(self) -> None:
        """The beginning of an incomplete frame is shown, even of the longest possible frame."""
        (line,) = self.frames(b"\x82\xff" + b"\xff" * 8 + b"abcd" + b"x" * 600, b"y" * 1000, b"\x81\x02no")
        self.assertIn("len=18446744073709551615 (7+64 bits)", line)
        self.assertEqual(self.frames(b"\x82\xfe\x01\x00abcd" + b"x" * 255), [])

    def test_every_split(self) -> None:
        stream = b"".join(
            (
                masked_frame(1, b"Hello"),
                masked_frame(2, bytes(700)),
                masked_frame(1, compress(b"text, " * 500), rsv=4),
                masked_frame(9),
                masked_frame(8, b"\x03\xe8bye"),
            )
        )
        whole = self.frames(stream)
        self.assertEqual(len(whole), 5)
        for size in (1, 2, 3, 7, 100, 521):
            with self.subTest(size=size):
                self.assertEqual(self.frames(*(stream[i : i + size] for i in range(0, len(stream), size))), whole)

    def test_any_bytes(self) -> None:
        """Any bytes give single lines, and no exception."""
        rng = random.Random(11)
        for _ in range(300):
            stream = rng.randbytes(rng.randrange(1500))
            size = rng.randrange(1, 600)
            for line in self.frames(*(stream[i : i + size] for i in range(0, len(stream), size))):
                self.assertTrue(line.isascii() and line.isprintable(), line)
                self.assertLess(len(line), 190)

    def test_in_linear_time(self) -> None:
        """Many frames in one piece."""

        def follow(size: int) -> None:
            self.lines(OPEN, masked_frame(1, b"x") * size)

        self.assertLess(growth(follow, 400), 9)


if __name__ == "__main__":
    unittest.main()

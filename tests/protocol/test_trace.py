"""Trace (RFC 6455 5.2, drawn as it passes): what is logged about a handshake and each frame."""

from __future__ import annotations

import random
import typing
import unittest

import pywebsock
from tests.tools.support import ACCEPT, compress, growth, masked_frame, request

RESPONSE = pywebsock.serialize_response(101, [("Upgrade", "websocket"), ("Sec-WebSocket-Accept", ACCEPT)])
OPEN = request()


class Transport:
    """What a socket does, without one; it takes no more than 1000 bytes at once."""

    def __init__(self, received: typing.Iterable[bytes]) -> None:
        self._received = iter(received)

    def recv(self, size: int) -> bytes:
        """The next piece."""
        return next(self._received)

    def send(self, data: bytes, flags: int) -> int:
        """As a socket's."""
        return min(len(data), 1000)

    def shutdown(self, how: int) -> None:
        """As a socket's."""


class TraceTestCase(unittest.TestCase):
    """Lines of a connection called X."""

    def lines(self, received: typing.Sequence[bytes] = (), sent: typing.Sequence[bytes] = ()) -> list[str]:
        """What is logged when these pieces pass, first those that are received."""
        with self.assertLogs("pywebsock.trace", "INFO") as logged:
            pywebsock.trace_log.info("begin")  # some tests expect nothing
            traced = pywebsock.Traced(Transport(received), "X")
            for piece in received:
                self.assertEqual(traced.recv(1 << 16), piece)
            for piece in sent:
                rest = piece
                while rest:
                    rest = rest[traced.send(rest) :]
        return [record.getMessage() for record in logged.records[1:]]

    def frames(self, *received: bytes) -> list[str]:
        """The same after an opening handshake, without the name and what stands before the payload."""
        head = OPEN.count(b"\r\n") - 1
        return [line.removeprefix("X in  ") for line in self.lines([OPEN, *received])[head:]]


class Handshakes(TraceTestCase):
    """The opening handshake, line by line."""

    def test_both_sides(self) -> None:
        expected = [f"X in  {line}" for line in OPEN.decode().split("\r\n")[:-2]]
        expected += [f"X out {line}" for line in RESPONSE.decode().split("\r\n")[:-2]]
        self.assertEqual(self.lines([OPEN], [RESPONSE]), expected)
        in_bytes = [OPEN[i : i + 1] for i in range(len(OPEN))], [RESPONSE[i : i + 1] for i in range(len(RESPONSE))]
        self.assertEqual(self.lines(*in_bytes), expected)

    def test_nothing_of_nothing(self) -> None:
        self.assertEqual(self.lines([b"", b""], [b""]), [])
        self.assertEqual(self.lines([OPEN[:-1]]), [])

    def test_escaped(self) -> None:
        (line,) = self.lines([b"GET /\x1b[2J\xe9 HTTP/1.1\r\n\r\n"])
        self.assertEqual(line, r"X in  GET /\x1b[2J\xe9 HTTP/1.1")

    def test_http(self) -> None:
        """What follows the head of an ordinary request or response is no frame."""
        response = pywebsock.http_response(200, "text/html", b"\x81\x05Hello" * 100)
        refusal = pywebsock.http_response(426, "text/plain", b"\x81\x05Hello", ("Upgrade", "websocket"))
        post = b"POST / HTTP/1.1\r\nContent-Length: 7\r\n\r\n\x81\x05Hello"
        for answer in (response, refusal):
            lines = self.lines([post, b"\x81\x05Hello"], [answer, b"\x81\x05Hello"])
            self.assertEqual(len(lines), 2 + answer.partition(b"\r\n\r\n")[0].count(b"\r\n") + 1)

    def test_no_http(self) -> None:
        """It is shown, cut, when it is longer than any head; memory is bounded."""
        (line,) = self.lines([b"\x16\x03\x01" * 1000] * 20)
        self.assertTrue(line.startswith(r"X in  \x16\x03\x01\x16"))
        self.assertLess(len(line), 1000)


class Frames(TraceTestCase):
    """Each frame on one line, its fields in their order on the wire."""

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

    def test_what_breaks_the_protocol(self) -> None:
        """It is shown, and what follows it, too."""
        for data, text in (
            (b"\xb3\x81abcdA", "FIN=1 RSV=011 opcode=3 ?      MASK=1 len=1 (7 bits)        key=61626364 41"),
            (b"\x09\x81abcdA", "FIN=0 RSV=000 opcode=9 PING "),
            (b"\x82\xfe\x00\x01abcdA", "len=1 (7+16 bits)"),
            (b"\xc1\x81abcd\x9e", " compressed, refers to earlier messages"),  # or no deflate at all
            (b"\x81\x81\x00\x00\x00\x00\xff", r'"\ufffd"'),
            (b"\x88\xfe\x00\xc8abcd" + b"x" * 200, "len=200 (7+16 bits)"),
        ):
            with self.subTest(data[:20]):
                wrong, good = self.frames(data + b"\x81\x02ok")
                self.assertIn(text, wrong)
                self.assertIn('"ok"', good)

    def test_promises(self) -> None:
        """A frame that does not come whole is shown with its beginning; the longest there can be breaks nothing."""
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
        """Nothing breaks it, and a line is a line."""
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
            traced = pywebsock.Traced(Transport((OPEN, masked_frame(1, b"x") * size)), "X")
            traced.recv(1)
            traced.recv(1)

        self.assertLess(growth(follow, 1000), 9)


if __name__ == "__main__":
    unittest.main()

"""Invalid frames and messages, and the close code for each (RFC 6455 5, 7.4.1, 8.1; RFC 7692 6)."""

from __future__ import annotations

import struct

import pywebsock
from tests.tools.support import (
    BINARY,
    CLOSE,
    CONT,
    DEFLATE,
    PING,
    PONG,
    TEXT,
    Recorder,
    ServerTestCase,
    compress,
    eventually,
    masked_frame,
    pieces,
)

LIMIT = 1000  # bytes of a message, in the tables that follow


BAD_FRAMES = (
    # 5.2: reserved bits and opcodes
    *((1002, f"RSV {rsv:03b} on text", masked_frame(TEXT, b"x", rsv=rsv)) for rsv in range(1, 8)),
    *((1002, f"RSV {rsv:03b} on a Ping", masked_frame(PING, b"x", rsv=rsv)) for rsv in (1, 2, 4)),
    *((1002, f"RSV {rsv:03b} on a Close", masked_frame(CLOSE, rsv=rsv)) for rsv in (1, 2, 4)),
    (1002, "RSV1 on a continuation", masked_frame(TEXT, b"x", fin=False) + masked_frame(CONT, b"x", rsv=4)),
    *((1002, f"opcode {opcode}", masked_frame(opcode, b"x")) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    # 5.1: masking
    (1002, "text not masked", b"\x81\x05Hello"),
    (1002, "empty text not masked", b"\x81\x00"),
    (1002, "Ping not masked", b"\x89\x00"),
    (1002, "Close not masked", b"\x88\x02\x03\xe8"),
    # 5.5: control frames
    *((1002, f"fragmented {opcode}", masked_frame(opcode, fin=False)) for opcode in (CLOSE, PING, PONG)),
    *((1002, f"126 bytes of {opcode}", masked_frame(opcode, bytes(126))) for opcode in (CLOSE, PING, PONG)),
    (1002, "65536 bytes of Ping", masked_frame(PING, length=65536)),
    # 5.4: fragments
    (1002, "nothing to continue", masked_frame(CONT, b"x")),
    (1002, "nothing to continue, not final", masked_frame(CONT, b"x", fin=False)),
    (1002, "nothing to continue, empty", masked_frame(CONT)),
    (1002, "text within text", masked_frame(TEXT, b"x", fin=False) + masked_frame(TEXT, b"x")),
    (1002, "binary within text", masked_frame(TEXT, b"x", fin=False) + masked_frame(BINARY, b"x", fin=False)),
    (1002, "empty text within empty text", masked_frame(TEXT, fin=False) + masked_frame(TEXT)),
    # 5.2: lengths
    (1002, "0 in 16 bits", b"\x82\xfe\x00\x00\0\0\0\0"),
    (1002, "125 in 16 bits", b"\x82\xfe\x00\x7d\0\0\0\0" + bytes(125)),
    (1002, "0 in 64 bits", b"\x82\xff" + bytes(8) + bytes(4)),
    (1002, "125 in 64 bits", b"\x82\xff" + struct.pack("!Q", 125) + bytes(4) + bytes(125)),
    (1002, "65535 in 64 bits", b"\x82\xff" + struct.pack("!Q", 65535) + bytes(4)),
    (1002, "top bit of 64", b"\x82\xff" + struct.pack("!Q", 1 << 63) + bytes(4)),
    (1002, "all bits of 64", b"\x82\xff" + b"\xff" * 8 + bytes(4)),
    # 5.5.1, 7.4: Close
    (1002, "Close of 1 byte", masked_frame(CLOSE, b"\x03")),
    *(
        (1002, f"Close with {code}", masked_frame(CLOSE, struct.pack("!H", code)))
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    ),
    (1007, "reason not UTF-8", masked_frame(CLOSE, b"\x03\xe8\xff")),
    (1007, "reason cut", masked_frame(CLOSE, b"\x03\xe8" + "é".encode()[:1])),
    # 8.1: UTF-8
    (1007, "text not UTF-8", masked_frame(TEXT, b"\xff")),
    (1007, "lone continuation byte", masked_frame(TEXT, b"\x80")),
    (1007, "overlong", masked_frame(TEXT, b"\xc0\x80")),
    (1007, "surrogate", masked_frame(TEXT, b"\xed\xa0\x80")),
    (1007, "beyond Unicode", masked_frame(TEXT, b"\xf4\x90\x80\x80")),
    (1007, "cut at the end", masked_frame(TEXT, b"\xe2\x82")),
    (1007, "cut at the end, in fragments", pieces(TEXT, b"\xe2", b"\x82")),
    (1007, "found before the frame is complete", masked_frame(TEXT, b"\xff", length=100)),
    (1007, "found far into the frame", masked_frame(TEXT, b"x" * 500 + b"\xe0\x80", length=900)),
    (1007, "found before the last fragment", masked_frame(TEXT, b"\xff", fin=False)),
    (1007, "found across fragments", masked_frame(TEXT, b"\xe2", fin=False) + masked_frame(CONT, b"A", fin=False)),
    (1007, "found across, incomplete", masked_frame(TEXT, b"\xf4", fin=False) + masked_frame(CONT, b"\x90", length=9)),
    # 7.4.1: too big by its header, before the payload is sent
    (1009, "one more than the limit", masked_frame(BINARY, length=LIMIT + 1)),
    (1009, "text", masked_frame(TEXT, length=LIMIT + 1)),
    (1009, "65536", masked_frame(BINARY, length=65536)),
    (1009, "the longest there is", masked_frame(BINARY, length=(1 << 63) - 1)),
    (1009, "first fragment", masked_frame(BINARY, length=LIMIT + 1, fin=False)),
    (1009, "with the payload", masked_frame(BINARY, bytes(LIMIT + 1))),
    (1009, "fragments", masked_frame(TEXT, b"x" * 600, fin=False) + masked_frame(CONT, length=401)),
    (1009, "very many fragments", masked_frame(TEXT, b"x", fin=False) + masked_frame(CONT, b"x", fin=False) * LIMIT),
)


def halves(first: bytes, second: bytes) -> bytes:
    """Return a compressed message in two fragments."""
    return masked_frame(BINARY, first, rsv=4, fin=False) + masked_frame(CONT, second)


BAD_DEFLATE = (
    (1002, "RSV1 on a Ping", masked_frame(PING, b"x", rsv=4)),
    (1002, "RSV1 on a continuation", masked_frame(TEXT, b"x", fin=False) + masked_frame(CONT, b"x", rsv=4)),
    (1002, "RSV2", masked_frame(TEXT, compress(b"x"), rsv=6)),
    (1007, "no deflate at all", masked_frame(BINARY, b"\xff" * 20, rsv=4)),
    (1007, "corrupt in the second fragment", halves(compress(b"x" * 99), b"\xff" * 20)),
    (1007, "text not UTF-8", masked_frame(TEXT, compress(b"\xff"), rsv=4)),
    (1009, "inflates beyond the limit", masked_frame(BINARY, compress(bytes(LIMIT + 1)), rsv=4)),
    (1009, "a bomb", masked_frame(BINARY, compress(bytes(900_000)), rsv=4)),
    (1009, "a bomb in fragments", halves(compress(bytes(900_000))[:500], compress(bytes(900_000))[500:])),
)


class BadFrames(ServerTestCase):
    """RFC 6455 7.1.7: the connection fails with the right code, and no other client is affected."""

    def check(self, server: Recorder, code: int, data: bytes, *, slowly: bool = False, **fields: str) -> None:
        """Send a valid message, then invalid data: the client gets a Close with this code, others the valid message."""
        with self.connect(server) as witness, self.connect(server, **fields) as client:
            data = masked_frame(TEXT, b"good") + data
            for part in [data[i : i + 1] for i in range(len(data))] if slowly else [data]:
                client.send_raw(part)
            self.assertEqual(client.read(), "good")
            self.assertEqual(client.read_close()[0], code)
            witness.send("all is well")
            self.assertEqual([witness.read(), witness.read()], ["good", "all is well"])

    def test_bad_frames(self) -> None:
        server = self.serve(max_message=LIMIT)
        for code, what, data in BAD_FRAMES:
            with self.subTest(what, code=code):
                self.check(server, code, data)
        expected = sorted(code for code, _, _ in BAD_FRAMES)

        def told() -> list[int]:
            return sorted(heard[1] for heard in server.heard if heard[0] == "close" and heard[1] != 1006)

        eventually(lambda: told() == expected)

    def test_bad_frames_byte_by_byte(self) -> None:
        server = self.serve(max_message=LIMIT)
        for code, what, data in BAD_FRAMES:
            if len(data) < 200:
                with self.subTest(what, code=code):
                    self.check(server, code, data, slowly=True)

    def test_bad_deflate(self) -> None:
        server = self.serve(max_message=LIMIT)
        for code, what, data in BAD_DEFLATE:
            with self.subTest(what, code=code):
                self.check(server, code, data, Sec_WebSocket_Extensions=DEFLATE)

    def test_reason_of_an_error(self) -> None:
        client = self.connect(self.serve())
        client.send_raw(b"\x81\x05Hello")
        code, reason = client.read_close()
        self.assertEqual(code, 1002)
        self.assertIn("mask", reason)

    def test_close_arrives_before_unread_data(self) -> None:
        """The server reads the rest of the data, since a reset would destroy the Close on its way."""
        client = self.connect(self.serve(max_message=LIMIT))
        client.send_raw(masked_frame(BINARY, length=4_000_000) + bytes(4_000_000))
        self.assertEqual(client.read_close()[0], 1009)

    def test_no_messages_after_a_failure(self) -> None:
        server = self.serve()
        client, other = self.connect(server), self.connect(server)
        client.send_raw(b"\x81\x05Hello" + masked_frame(TEXT, b"after"))
        self.assertEqual(client.read_close()[0], 1002)
        other.send("next")
        self.assertEqual(other.read(), "next")
        self.assertNotIn(("message", "after"), server.heard)


class Vocabulary(ServerTestCase):
    """The tables above agree with the names of the module."""

    def test_codes(self) -> None:
        self.assertEqual(
            {code for code, _, _ in (*BAD_FRAMES, *BAD_DEFLATE)},
            {
                pywebsock.CloseCode.PROTOCOL_ERROR,
                pywebsock.CloseCode.INVALID_FRAME_PAYLOAD_DATA,
                pywebsock.CloseCode.MESSAGE_TOO_BIG,
            },
        )

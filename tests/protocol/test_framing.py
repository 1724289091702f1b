"""Base framing (RFC 6455 5): masking, frames out, frames in, Close payloads."""

from __future__ import annotations

import itertools
import random
import struct
import typing
import unittest

import pywebsock
from pywebsock import CloseCode, FrameReader, Opcode, ProtocolError
from tests.tools.support import brought, masked_frame, peak_memory

# RFC 6455 5.7.
HELLO = bytes((0x81, 0x05, 0x48, 0x65, 0x6C, 0x6C, 0x6F))
MASKED_HELLO = bytes((0x81, 0x85, 0x37, 0xFA, 0x21, 0x3D, 0x7F, 0x9F, 0x4D, 0x51, 0x58))
LENGTHS = (0, 1, 2, 124, 125, 126, 127, 128, 255, 256, 1 << 10, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 1 << 18)
BIG = 1 << 62  # more bytes than any message has

Whole = tuple[bool, bool, int, bytes]  # fin, rsv1, opcode, payload


class Assembly:
    """The frames of a FrameReader, each joined from its pieces."""

    def __init__(self) -> None:
        self.frames: list[Whole] = []
        self.code: int | None = None  # of the error, if there was one
        self._pieces: list[bytes] = []
        self._start = (False, 0)  # rsv1 and opcode of the current frame
        self._promised = 0  # bytes of payload still to come

    def read(self, pieces: typing.Iterable[bytes]) -> None:
        """Read the pieces, up to the first error."""
        feed = FrameReader().feed
        try:
            for fin, rsv1, opcode, payload, left in itertools.chain.from_iterable(map(feed, pieces)):
                self._add(fin, rsv1, opcode, bytes(payload), left)
        except ProtocolError as error:
            self.code = error.code

    def _add(self, fin: bool, rsv1: bool, opcode: int, payload: bytes, left: int) -> None:
        if self._promised:
            assert (rsv1, opcode) == (False, Opcode.CONT), "pieces follow as continuations"
            assert len(payload) + left == self._promised, "what is left is what was left, less what came"
        else:
            self._start = rsv1, opcode
        self._promised = left
        self._pieces.append(payload)
        if left:
            assert not fin, "a frame ends with its last piece"
        else:
            self.frames.append((fin, *self._start, b"".join(self._pieces)))
            self._pieces = []


def parse(*pieces: bytes) -> tuple[list[Whole], int | None]:
    """Return the frames in these pieces, and the code of the error that ends them."""
    assembly = Assembly()
    assembly.read(pieces)
    return assembly.frames, assembly.code


class Vocabulary(unittest.TestCase):
    """Opcode and CloseCode."""

    def test_opcodes(self) -> None:
        names = {0: "CONT", 1: "TEXT", 2: "BINARY", 8: "CLOSE", 9: "PING", 10: "PONG"}
        self.assertEqual({opcode.value: opcode.name for opcode in Opcode}, names)

    def test_codes(self) -> None:
        """7.4.1, and the registry: 1004 is reserved, 1012 to 1014 were added."""
        self.assertEqual({int(code) for code in CloseCode}, set(range(1000, 1016)) - {1004})


class Mask(unittest.TestCase):
    """apply_mask (5.3)."""

    LENGTHS = (*range(70), *range(1015, 1034), 4095, 4096, 4097, 65535, 65536, 65537)
    KEYS = (b"\x37\xfa\x21\x3d", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x00\x01\x80\xff")

    def test_is_xor(self) -> None:
        data = random.Random(1).randbytes(max(self.LENGTHS))
        for key in self.KEYS:
            slow = bytes(byte ^ key[i % 4] for i, byte in enumerate(data))
            for length in self.LENGTHS:
                with self.subTest(key=key, length=length):
                    self.assertEqual(pywebsock.apply_mask(data[:length], key), slow[:length])

    def test_key_offsets(self) -> None:
        """A payload in two pieces, the second with the key rotated to its offset."""
        data, key = random.Random(2).randbytes(3000), b"\x01\x20\x40\x80"
        whole = pywebsock.apply_mask(data, key)
        for cut in (*range(1, 9), 1022, 1023, 1024, 1025, 2000):
            turned = key[cut % 4 :] + key[: cut % 4]
            with self.subTest(cut=cut):
                self.assertEqual(
                    pywebsock.apply_mask(data[:cut], key) + pywebsock.apply_mask(data[cut:], turned), whole
                )

    def test_twice_is_nothing(self) -> None:
        for payload in (b"", b"x", bytes(range(256)), bytes(5000)):
            masked = pywebsock.apply_mask(payload, b"\x12\x34\x56\x78")
            self.assertEqual(pywebsock.apply_mask(masked, b"\x12\x34\x56\x78"), payload)


class FrameOut(unittest.TestCase):
    """serialize_frame (5.2)."""

    def test_examples(self) -> None:
        """RFC 6455 5.7."""
        k256, k64 = bytes(256), bytes(65536)
        for opcode, payload, frame in (
            (Opcode.TEXT, b"Hello", HELLO),
            (Opcode.PING, b"Hello", b"\x89\x05Hello"),
            (Opcode.BINARY, k256, b"\x82\x7e\x01\x00" + k256),
            (Opcode.BINARY, k64, b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + k64),
        ):
            with self.subTest(frame=frame[:10]):
                self.assertEqual(pywebsock.serialize_frame(opcode, payload), frame)

    def test_lengths(self) -> None:
        """Frames are final and unmasked, with the shortest form of the length."""
        for length in LENGTHS:
            with self.subTest(length=length):
                frame = pywebsock.serialize_frame(Opcode.BINARY, b"p" * length)
                self.assertEqual(frame[0], 0x82)
                if length < 126:
                    head = bytes((length,))
                elif length < 1 << 16:
                    head = b"\x7e" + struct.pack("!H", length)
                else:
                    head = b"\x7f" + struct.pack("!Q", length)
                self.assertEqual(frame[1:], head + b"p" * length)

    def test_first_byte(self) -> None:
        for opcode in Opcode:
            with self.subTest(opcode=opcode):
                self.assertEqual(pywebsock.serialize_frame(opcode, b"")[0], 0x80 + opcode)
                self.assertEqual(pywebsock.serialize_frame(opcode, b"", rsv1=True)[0], 0xC0 + opcode)


class FrameIn(unittest.TestCase):
    """FrameReader (5.2)."""

    KEY = b"\x01\x23\x45\x67"

    # Each kind of frame and of length, in changing order.
    FRAMES: tuple[Whole, ...] = (
        (True, False, 1, b"Hello"),
        (False, True, 2, b""),
        (True, False, 9, b"ping" * 5),
        (False, False, 0, b"\x00" * 125),
        (True, False, 10, b""),
        (True, False, 0, bytes(range(126))),
        (True, True, 1, b"y" * 200),
        (True, False, 8, b"\x03\xe8" + b"r" * 123),
    )
    STREAM = b"".join(
        masked_frame(op, data, fin=fin, rsv=4 * rsv1, key=b"\x01\x23\x45\x67") for fin, rsv1, op, data in FRAMES
    )

    # Invalid frames; the first two bytes show the error.
    WRONG = (
        ("RSV2", b"\xa1\x80"),
        ("RSV3", b"\x91\x80"),
        ("all of RSV", b"\xf1\x80"),
        ("not masked", b"\x81\x05Hello"),
        ("not masked, empty", b"\x81\x00"),
        ("a fragmented Ping", b"\x09\x80"),
        ("a fragmented Pong", b"\x0a\x80"),
        ("a fragmented Close", b"\x08\x80"),
        ("a Ping of 126 bytes", b"\x89\xfe\x00\x7e"),
        ("a Close of 2**16 bytes", b"\x88\xff\x00\x00\x00\x00\x00\x01\x00\x00"),
        *((f"opcode {opcode}", bytes((0x80 | opcode, 0x80))) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    )
    WRONG_LENGTHS = (
        *((f"{length} in 16 bits", b"\x82\xfe" + struct.pack("!H", length)) for length in (0, 1, 125)),
        *((f"{length} in 64 bits", b"\x82\xff" + struct.pack("!Q", length)) for length in (0, 125, 126, (1 << 16) - 1)),
        ("2**63", b"\x82\xff" + struct.pack("!Q", 1 << 63)),
        ("2**64 - 1", b"\x82\xff" + struct.pack("!Q", (1 << 64) - 1)),
    )

    def test_examples(self) -> None:
        """RFC 6455 5.7."""
        self.assertEqual(parse(MASKED_HELLO), ([(True, False, 1, b"Hello")], None))
        pong = b"\x8a\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58"
        self.assertEqual(parse(pong), ([(True, False, 10, b"Hello")], None))

    def test_one_piece(self) -> None:
        self.assertEqual(parse(self.STREAM), (list(self.FRAMES), None))

    def test_every_split(self) -> None:
        for cut in range(len(self.STREAM) + 1):
            with self.subTest(cut=cut):
                self.assertEqual(parse(self.STREAM[:cut], self.STREAM[cut:]), (list(self.FRAMES), None))

    def test_pieces_of_every_size(self) -> None:
        """From one byte at a time to all at once."""
        for size in range(1, 140):
            pieces = (self.STREAM[i : i + size] for i in range(0, len(self.STREAM), size))
            with self.subTest(size=size):
                self.assertEqual(parse(*pieces), (list(self.FRAMES), None))

    def test_every_pair_of_splits(self) -> None:
        stream = b"".join(
            masked_frame(op, payload, key=self.KEY) for op, payload in ((1, b"abcde"), (9, b"xyz"), (2, b""))
        )
        frames = [(True, False, 1, b"abcde"), (True, False, 9, b"xyz"), (True, False, 2, b"")]
        for second in range(len(stream) + 1):
            for first in range(second + 1):
                with self.subTest(first=first, second=second):
                    pieces = stream[:first], stream[first:second], stream[second:]
                    self.assertEqual(parse(*pieces), (frames, None))

    def test_lengths(self) -> None:
        for length in LENGTHS:
            payload = random.Random(length).randbytes(length)
            masked = pywebsock.apply_mask(payload, self.KEY)  # `masked_frame` would be slow
            stream = masked_frame(2, b"", length=length, key=self.KEY) + masked + MASKED_HELLO
            frames = [(True, False, 2, payload), (True, False, 1, b"Hello")]
            for cut in (*range(20), length // 2, *range(length, len(stream))):
                with self.subTest(length=length, cut=cut):
                    self.assertEqual(parse(stream[:cut], stream[cut:]), (frames, None))

    def test_does_not_wait_for_a_payload(self) -> None:
        """The available part of a data frame is returned at once, with the number of bytes that are missing."""
        frame = masked_frame(2, b"0123456789", key=self.KEY)
        self.assertEqual(
            brought(FrameReader().feed, frame[:5], frame[5:6], frame[6:9], frame[9:]),
            [[], [(False, False, 2, b"", 10)], [(False, False, 0, b"012", 7)], [(True, False, 0, b"3456789", 0)]],
        )

    def test_waits_for_a_control_frame(self) -> None:
        frame = masked_frame(9, b"x" * 125)
        *before, last = brought(FrameReader().feed, *(frame[i : i + 1] for i in range(len(frame))))
        self.assertEqual(before, [[]] * (len(frame) - 1))
        self.assertEqual(last, [(True, False, 9, b"x" * 125, 0)])

    def test_wrong(self) -> None:
        """Split at each position: the error comes with the header, after all valid frames."""
        for what, start in (*self.WRONG, *self.WRONG_LENGTHS):
            stream = MASKED_HELLO + start + self.KEY
            for cut in range(len(stream)):
                with self.subTest(what, cut=cut):
                    self.assertEqual(
                        parse(stream[:cut], stream[cut:]), ([(True, False, 1, b"Hello")], CloseCode.PROTOCOL_ERROR)
                    )

    def test_wrong_in_two_bytes(self) -> None:
        """The error comes with the two bytes that show it."""
        for what, start in self.WRONG:
            with self.subTest(what):
                self.assertEqual(parse(start[:1], start[1:2]), ([], CloseCode.PROTOCOL_ERROR))

    def test_every_first_two_bytes(self) -> None:
        """All 65,536 values."""
        for first in range(256):
            good = not first & 0x30 and first & 0x0F in (0, 1, 2, 8, 9, 10)
            for second in range(256):
                control = first & 0x08
                fits = not control or (first & 0xC0 == 0x80 and second & 0x7F <= 125)
                expected = None if good and second >= 0x80 and fits else CloseCode.PROTOCOL_ERROR
                code: CloseCode | None = None
                try:
                    for _ in FrameReader().feed(bytes((first, second))):
                        self.fail("no frame has so few bytes")
                except ProtocolError as error:
                    code = error.code
                if code != expected:
                    self.fail(f"{first:#x} {second:#x}")

    def test_lengths_take_no_memory(self) -> None:
        """Only a header, of the longest possible frame."""
        stream = masked_frame(2, b"abc", length=(1 << 63) - 1)
        self.assertEqual(list(FrameReader().feed(stream)), [(False, False, 2, b"abc", (1 << 63) - 4)])

        def read() -> None:
            feed = FrameReader().feed
            for piece in (masked_frame(2, b"", length=BIG), *[bytes(1 << 16)] * 256):
                for _ in feed(piece):
                    pass

        self.assertLess(peak_memory(read), 1 << 20)

    def test_empty_data(self) -> None:
        self.assertEqual(parse(b"", b""), ([], None))
        self.assertEqual(
            parse(MASKED_HELLO[:4], b"", MASKED_HELLO[4:8], b"", MASKED_HELLO[8:], b"")[0], parse(MASKED_HELLO)[0]
        )


class CloseOut(unittest.TestCase):
    """serialize_close (5.5.1)."""

    def test_codes(self) -> None:
        for code in pywebsock.CODES_ON_THE_WIRE:
            self.assertEqual(pywebsock.serialize_close(code, "why"), b"\x88\x05" + struct.pack("!H", code) + b"why")

    def test_no_code(self) -> None:
        self.assertEqual(pywebsock.serialize_close(1005), b"\x88\x00")
        self.assertEqual(pywebsock.serialize_close(1005, "nowhere to put it"), b"\x88\x00")

    def test_long_reasons(self) -> None:
        """Long reasons are cut, but not inside of a character."""
        for character in ("a", "é", "€", "𝄞"):
            for shift in range(5):
                reason = "x" * shift + character * 130
                frame = pywebsock.serialize_close(1000, reason)
                with self.subTest(character=character, shift=shift):
                    self.assertEqual(frame[1], len(frame) - 2)
                    cut = frame[4:].decode()  # which raises an error if a character was cut
                    self.assertTrue(reason.startswith(cut))
                    self.assertLessEqual(len(frame), 127)
                    self.assertGreater(len(frame) + len(character.encode()), 127)

    def test_reasons_that_fit(self) -> None:
        for reason in ("", "a" * 123, "é" * 61, "€" * 41, "𝄞" * 30):
            with self.subTest(reason):
                self.assertEqual(pywebsock.parse_close(pywebsock.serialize_close(1000, reason)[2:]), (1000, reason))


class CloseIn(unittest.TestCase):
    """parse_close (5.5.1, 7.4)."""

    def assert_fails(self, payload: bytes, code: int) -> None:
        """Check that the payload is refused with this code."""
        with self.assertRaises(ProtocolError) as caught:
            pywebsock.parse_close(payload)
        self.assertEqual(caught.exception.code, code)

    def test_every_code(self) -> None:
        """7.4.2, and the registry."""
        good = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
        for code in (*range(5001), 0x7FFF, 0x8000, 0xFFFF):
            payload = struct.pack("!H", code)
            with self.subTest(code=code):
                if code in good:
                    self.assertEqual(pywebsock.parse_close(payload + b"bye"), (code, "bye"))
                else:
                    self.assert_fails(payload, 1002)
                self.assertEqual(code in pywebsock.CODES_ON_THE_WIRE, code in good)

    def test_lengths(self) -> None:
        self.assertEqual(pywebsock.parse_close(b""), (1005, ""))
        self.assertEqual(pywebsock.parse_close(b"\x03\xe8"), (1000, ""))
        self.assertEqual(pywebsock.parse_close(b"\x03\xe8" + b"x" * 123), (1000, "x" * 123))
        for byte in range(256):
            self.assert_fails(bytes((byte,)), 1002)

    def test_reason_is_utf8(self) -> None:
        self.assertEqual(pywebsock.parse_close(b"\x03\xe8" + "κόσμε €𝄞".encode()), (1000, "κόσμε €𝄞"))
        for reason in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", "€".encode()[:2]):
            with self.subTest(reason):
                self.assert_fails(b"\x03\xe8" + reason, 1007)

    def test_a_wrong_code_comes_first(self) -> None:
        self.assert_fails(b"\x00\x00\xff", 1002)


if __name__ == "__main__":
    unittest.main()

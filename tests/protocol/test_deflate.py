"""permessage-deflate (RFC 7692): offers, inflating, deflating."""

from __future__ import annotations

import random
import re
import sys
import unittest
import zlib

import pywebsock
from pywebsock import INFLATE_SIZE, HandshakeError, Inflater, MessageReader, ProtocolError
from tests.tools.support import compress, growth, masked_frame, peak_memory

ANSWER = "permessage-deflate"  # and the offer
TAIL = b"\x00\x00\xff\xff"


def inflate(*pieces: bytes) -> bytes:
    """Inflate a message in these fragments."""
    inflater, plain = Inflater(), b""
    for i, piece in enumerate(pieces, 1):
        plain += b"".join(inflater.inflate(piece, i == len(pieces)))
    return plain


def read(*pieces: bytes, limit: int) -> bytes:
    """Read the same with a MessageReader, which has a limit."""
    last = len(pieces) - 1
    stream = b"".join(
        masked_frame(0 if i else 2, fin=i == last, rsv=0 if i else 4, key=bytes(4), length=len(piece)) + piece
        for i, piece in enumerate(pieces)
    )
    events = MessageReader(limit, compressed=True).feed(stream)
    (message,) = [bytes(payload) for opcode, payload in events if opcode]
    return message


def inflate_with(window: int, payload: bytes) -> bytes:
    """Inflate as a client with a window of this many bits, in pieces, since zlib needs no window for a single piece."""
    inflater, data = zlib.decompressobj(wbits=-window), payload + TAIL
    return b"".join(inflater.decompress(data[i : i + 16]) for i in range(0, len(data), 16))


def bomb(size: int) -> bytes:
    """Return data that inflates to `size` zeros, a thousand times as much."""
    compressor = zlib.compressobj(wbits=-15)
    mebibyte = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return mebibyte * (size >> 20)


class Extensions(unittest.TestCase):
    """parse_extensions: the syntax (RFC 6455 9.1)."""

    def test_well_formed(self) -> None:
        for field, offers in (
            ("a", [("a", [])]),
            ("a,b", [("a", []), ("b", [])]),
            ("a; b", [("a", [("b", "")])]),
            ("a;b=1;c", [("a", [("b", "1"), ("c", "")])]),
            ('a;b="1"', [("a", [("b", "1")])]),
            ('a ; b = "1" \t; c = 2 , d', [("a", [("b", "1"), ("c", "2")]), ("d", [])]),
            ("  a\t", [("a", [])]),
            ("a;b;b", [("a", [("b", ""), ("b", "")])]),
            ("!#$%&'*+-.^_`|~;0=9", [("!#$%&'*+-.^_`|~", [("0", "9")])]),
        ):
            with self.subTest(field):
                self.assertEqual(pywebsock.parse_extensions(field), offers)

    def test_empty_elements(self) -> None:
        """A list may have empty elements, such as when an empty field is joined with another (RFC 9110 5.6.1.2)."""
        for field in ("a,", ",a", ", a", "a ,\t, ", ",,a"):
            with self.subTest(field):
                self.assertEqual(pywebsock.parse_extensions(field), [("a", [])])

    def test_malformed(self) -> None:
        for field in (
            *(";", "a;", ";a", "a; ;b", "a;=1", "=1", "a=1", "a;b=", "a;b=1=2", "a b", "a;b c"),
            *('a;b="', 'a;b=""', 'a;b="1', 'a;b="1\t"'),
            *('a;b="1 2"', 'a;b="1"2', 'a;b=1"2"', 'a;b="1;2"', "a/b", "a;(b)", "a\n", "a\n,b", "\x00", "é"),
            *("a;b=é", "a\x0b", "a\xa0", "a;b=1\x00", '"a"', "a;'b'=\"", "a@b", "a:b", "a?", "[a]", "{a}", "a\\b"),
        ):
            with self.subTest(field):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.parse_extensions(field)
                self.assertEqual(caught.exception.status, 400)

    def test_in_linear_time(self) -> None:
        """Many kinds of fields, of 2 and of 8 KiB."""
        units = (
            " ",
            ";",
            '"',
            ",",
            "a",
            "=",
            "a;",
            "a,",
            "a ",
            "a=",
            'a;b="',
            "a;b=1;",
            "a; b=1, ",
            '\\"',
            "\t",
            "a;b =",
            "é",
        )
        for start in ("", "a", "a;b", "a;b=", 'a;b="'):
            for unit in units:

                def parse(size: int, start: str = start, unit: str = unit) -> None:
                    try:
                        pywebsock.negotiate_deflate(start + unit * (size // len(unit)) + "\x00")
                    except HandshakeError:
                        pass

                with self.subTest(start=start, unit=unit):
                    self.assertLess(growth(parse, 2 << 10), 9)


class Offers(unittest.TestCase):
    """negotiate_deflate (RFC 7692 5, 7.1)."""

    def test_accepted(self) -> None:
        for field, window in (
            ("", 15),
            ("; client_max_window_bits", 15),
            ("; server_no_context_takeover", 15),
            ("; client_no_context_takeover", 15),
            ("; client_no_context_takeover; server_no_context_takeover; client_max_window_bits", 15),
            ("; server_no_context_takeover; client_max_window_bits; client_no_context_takeover", 15),
            *((f"; client_max_window_bits={bits}", 15) for bits in range(8, 16)),
            *((f"; server_max_window_bits={bits}", bits) for bits in range(9, 15)),
            *((f'; server_max_window_bits="{bits}"', bits) for bits in range(9, 15)),
            ('; client_max_window_bits="8";server_max_window_bits="9"', 9),
            (" ;\tserver_max_window_bits = 12 ; client_max_window_bits", 12),
        ):
            with self.subTest(field):
                answer = "; ".join([ANSWER, *re.findall(r"\w+_no_context_takeover", field)])
                if window < 15:
                    answer += f"; server_max_window_bits={window}"
                self.assertEqual(pywebsock.negotiate_deflate(f"permessage-deflate{field}"), (window, answer))

    def test_window_of_15_bits(self) -> None:
        """Accepted, with the same parameter in the answer (7.1.2.1), since some clients require that."""
        for field in ("server_max_window_bits=15", 'client_max_window_bits; server_max_window_bits="15"'):
            with self.subTest(field):
                expected = 15, f"{ANSWER}; server_max_window_bits=15"
                self.assertEqual(pywebsock.negotiate_deflate(f"permessage-deflate; {field}"), expected)

    def test_declined(self) -> None:
        values = (
            "0",
            "1",
            "7",
            "16",
            "17",
            "99",
            "08",
            "09",
            "010",
            "-9",
            "9.0",
            "1e1",
            "ten",
            "+10",
            "0x9",
            "1_0",
            "150",
        )
        for field in (
            *("x-webkit-deflate-frame", "permessage-bzip2", "permessage-deflate2", "PERMESSAGE-DEFLATE", "foo; bar=1"),
            *(f"permessage-deflate; client_max_window_bits={value}" for value in values),
            *(f"permessage-deflate; server_max_window_bits={value}" for value in (*values, "8", '"8"')),
            "permessage-deflate; server_max_window_bits",  # 7.1.2.1: in an offer, it has a value
            "permessage-deflate; server_no_context_takeover=1",
            'permessage-deflate; server_no_context_takeover="true"',
            "permessage-deflate; client_no_context_takeover=0",
            "permessage-deflate; unknown",
            "permessage-deflate; server_max_window_bits=10; mem_level=9",
            "permessage-deflate; Server_Max_Window_Bits=10",
            *(
                f"permessage-deflate; {name}; {name}"
                for name in ("server_no_context_takeover", "client_no_context_takeover", "client_max_window_bits")
            ),
            "permessage-deflate; server_max_window_bits=10; server_max_window_bits=10",
            "permessage-deflate; server_max_window_bits=10; client_max_window_bits; server_max_window_bits=11",
        ):
            with self.subTest(field):
                self.assertEqual(pywebsock.negotiate_deflate(field), (0, ""))

    def test_no_offer(self) -> None:
        self.assertEqual(pywebsock.negotiate_deflate(""), (0, ""))

    def test_fallback(self) -> None:
        """The first acceptable offer is chosen (5.1), also of several header fields."""
        ten = 10, f"{ANSWER}; server_max_window_bits=10"
        for field, expected in (
            ("permessage-deflate, permessage-deflate; server_max_window_bits=10", (15, ANSWER)),
            ("permessage-deflate; server_max_window_bits=10, permessage-deflate", ten),
            ("permessage-deflate; server_max_window_bits=8, permessage-deflate", (15, ANSWER)),
            ("permessage-deflate; unknown=1,permessage-deflate;server_max_window_bits=10", ten),
            ("foo, bar; baz=2, permessage-deflate; server_max_window_bits=10", ten),
            ("permessage-deflate; client_max_window_bits; client_max_window_bits, permessage-deflate", (15, ANSWER)),
        ):
            with self.subTest(field):
                self.assertEqual(pywebsock.negotiate_deflate(field), expected)
                head = "".join(f"Sec-WebSocket-Extensions: {offer}\r\n" for offer in field.split(","))
                request = pywebsock.parse_request(bytearray(), f"GET / HTTP/1.1\r\n{head}\r\n".encode())
                assert request
                self.assertEqual(pywebsock.negotiate_deflate(request.headers["sec-websocket-extensions"]), expected)

    def test_malformed(self) -> None:
        """A malformed element fails the handshake, even beside a valid offer (RFC 6455 9.1)."""
        for field in (
            "permessage-deflate;",
            "permessage-deflate, a=1",
            'permessage-deflate; server_max_window_bits="10',
        ):
            with self.subTest(field):
                with self.assertRaises(HandshakeError) as caught:
                    pywebsock.negotiate_deflate(field)
                self.assertEqual(caught.exception.status, 400)


class Inflating(unittest.TestCase):
    """Inflater (7.2.2)."""

    def assert_fails(self, code: int, *pieces: bytes, limit: int | None = None) -> None:
        """Check that the fragments fail with this code."""
        with self.assertRaises(ProtocolError) as caught:
            inflate(*pieces) if limit is None else read(*pieces, limit=limit)
        self.assertEqual(caught.exception.code, code)

    def test_examples(self) -> None:
        """RFC 7692 7.2.3, split at each position."""
        for what, data in (
            ("7.2.3.1: one block", "f2 48 cd c9 c9 07 00"),
            ("7.2.3.3: a block without compression", "00 05 00 fa ff 48 65 6c 6c 6f 00"),
            ("7.2.3.4: BFINAL", "f3 48 cd c9 c9 07 00 00"),
            ("7.2.3.5: two blocks", "f2 48 05 00 00 00 ff ff ca c9 c9 07 00"),
        ):
            payload = bytes.fromhex(data)
            for cut in range(len(payload) + 1):
                with self.subTest(what, cut=cut):
                    self.assertEqual(inflate(payload[:cut], payload[cut:]), b"Hello")
            with self.subTest(what, cut="everywhere"):
                self.assertEqual(inflate(*(payload[i : i + 1] for i in range(len(payload))), b""), b"Hello")

    def test_shared_window(self) -> None:
        """7.2.3.2 refers to the message before, which client_no_context_takeover forbids."""
        self.assert_fails(1007, bytes.fromhex("f2 00 11 00 00"))
        self.assertEqual(b"".join(Inflater(b"Hello").inflate(bytes.fromhex("f2 00 11 00 00"), True)), b"Hello")

    def test_context(self) -> None:
        """The context is the last 32 KiB of all messages, also if a final block makes zlib start again."""
        inflater, plain = Inflater(b"before"), b"before"
        for part in (b"x" * 9, random.Random(3).randbytes(40_000), b"y" * 100_000, b"y" * 300):
            compressor = zlib.compressobj(wbits=-15, zdict=plain[-32768:])
            final = compressor.compress(part) + compressor.flush()
            plain += b"".join(inflater.inflate(final, False))
            self.assertEqual(inflater.context, plain[-32768:])
        self.assertEqual(len(plain), 6 + 9 + 40_000 + 100_000 + 300)

    def test_empty_fragment(self) -> None:
        """7.2.3.6: one byte for empty data, as the last fragment or the only one."""
        hello = bytes.fromhex("f2 48 cd c9 c9 07 00")
        self.assertEqual(inflate(hello + TAIL, b"\x00"), b"Hello")
        for pieces in ((b"\x00",), (b"\x02\x00",), (b"", b"\x00"), (b"", b"\x00", b"")):
            with self.subTest(pieces):
                self.assertEqual(inflate(*pieces), b"")
                self.assertEqual(read(*pieces, limit=0), b"")

    def test_no_block(self) -> None:
        """An empty payload is not a valid compressed message."""
        for pieces in ((b"",), (b"", b"")):
            self.assert_fails(1007, *pieces)

    def test_every_window(self) -> None:
        data = random.Random(1).randbytes(700) * 100
        for bits in range(9, 16):
            compressor = zlib.compressobj(wbits=-bits)
            payload = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
            with self.subTest(bits=bits):
                self.assertEqual(inflate(payload[:-4]), data)

    def test_strategies_and_levels(self) -> None:
        data = b"compressible, compressible, compressible; " * 50 + random.Random(2).randbytes(500)
        for level in range(10):
            for strategy in range(5):
                compressor = zlib.compressobj(level, wbits=-15, strategy=strategy)
                payload = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
                with self.subTest(level=level, strategy=strategy):
                    self.assertEqual(inflate(payload[:-4]), data)

    def test_final_block(self) -> None:
        """After a final block, an empty block must follow (7.2.3.4)."""
        compressor = zlib.compressobj(wbits=-15)
        final = compressor.compress(b"some text " * 20) + compressor.flush()
        for pieces in ((final + b"\x00",), (final, b"\x00"), (final, b"", b"\x00", b"")):
            with self.subTest(pieces):
                self.assertEqual(inflate(*pieces), b"some text " * 20)
        for pieces in ((final,), (final, b""), (final[:9], final[9:])):
            with self.subTest(pieces):
                self.assert_fails(1007, *pieces)

    def test_blocks_after_a_final_block(self) -> None:
        """7.2.1: blocks with BFINAL may be anywhere."""
        hello = bytes.fromhex("f3 48 cd c9 c9 07 00")
        for stream in (
            hello + hello + b"\x00",
            hello + bytes.fromhex("f2 48 cd c9 c9 07 00"),
            hello + hello + b"\x01\x00\x00\xff\xff\x00",
            bytes.fromhex("f2 48 cd c9 c9 07 00") + TAIL + hello + b"\x00",
        ):
            for cut in range(len(stream) + 1):
                with self.subTest(stream, cut=cut):
                    self.assertEqual(inflate(stream[:cut], stream[cut:]), b"HelloHello")

    def test_limit_after_a_final_block(self) -> None:
        stream = bytes.fromhex("f3 48 cd c9 c9 07 00") * 3 + b"\x00"
        self.assertEqual(read(stream, limit=15), b"HelloHelloHello")
        for limit in range(15):
            self.assert_fails(1009, stream, limit=limit)

    def test_rubbish_after_a_final_block(self) -> None:
        hello = bytes.fromhex("f3 48 cd c9 c9 07 00")
        for rest in (b"\xff" * 3, b"rubbish", b"\x00" * 100, b"\x00\x01"):
            for pieces in ((hello + rest,), (hello, rest), (hello + rest, b""), (hello, *(bytes((b,)) for b in rest))):
                with self.subTest(pieces):
                    self.assert_fails(1007, *pieces)

    def test_too_many_final_blocks(self) -> None:
        """A hundred thousand final blocks are refused."""
        empty = b"\x03\x00"
        self.assertEqual(inflate(empty * 100 + b"\x00"), b"")
        self.assert_fails(1007, empty * 100_000 + b"\x00")
        self.assert_fails(1007, *[empty * 100] * 1000, b"\x00")

    @unittest.skipIf(sys.implementation.name == "pypy", "PyPy's compiler decides the ratio of times")
    def test_final_blocks_in_linear_time(self) -> None:
        """Many final blocks, each of which makes zlib start again, in one piece and in many."""

        def one_piece(size: int) -> None:
            try:
                inflate(b"\x03\x00" * size)
            except ProtocolError:
                pass

        def pieces(size: int) -> None:
            try:
                inflate(*[b"\x03\x00"] * size)
            except ProtocolError:
                pass

        for act in (one_piece, pieces):
            with self.subTest(act.__name__):
                self.assertLess(growth(act, 16_000), 9)

    def test_corrupt(self) -> None:
        for data in ("ff", "07", "06", "00 01 00 00 00 41", "ed fd ff ff ff ff ff ff ff ff"):
            with self.subTest(data):
                self.assert_fails(1007, bytes.fromhex(data))
                self.assert_fails(1007, *(bytes((byte,)) for byte in bytes.fromhex(data)))

    def test_cut_off(self) -> None:
        """A message that ends within a block is an error."""
        payload = pywebsock.deflate(b"one, two, three, four, five, six, seven, eight, nine, ten", 15)
        taken = []
        for end in range(1, len(payload) - 1):
            try:
                taken.append(inflate(payload[:end]))
            except ProtocolError as error:
                self.assertEqual(error.code, 1007)
        self.assertEqual(taken, [])
        for block in ("00 ff 00 00 ff 48 65 6c 6c 6f", "f2 48 cd c9 c9 07 00 ff", "ec"):  # for which it needs much more
            with self.subTest(block):
                self.assert_fails(1007, bytes.fromhex(block))

    def test_limit(self) -> None:
        """The limit is exact, in one piece and in many."""
        for size in (1, 2, 100, 1000, 70_000):
            payload = pywebsock.deflate(b"a" * size, 15)
            for pieces in ((payload,), tuple(bytes((byte,)) for byte in payload)):
                with self.subTest(size=size, pieces=len(pieces)):
                    self.assertEqual(read(*pieces, limit=size), b"a" * size)
                    self.assert_fails(1009, *pieces, limit=size - 1)

    def test_bomb(self) -> None:
        """1 GiB of zeros takes no more memory than the longest message and a few reads."""
        payload = bomb(1 << 30)
        for limit in (1 << 20, 1 << 22):
            stream = masked_frame(2, rsv=4, key=bytes(4), length=len(payload)) + payload

            def explode(limit: int = limit, stream: bytes = stream) -> None:
                with self.assertRaises(ProtocolError) as caught:
                    list(MessageReader(limit, compressed=True).feed(stream))
                self.assertEqual(caught.exception.code, 1009)

            with self.subTest(limit=limit):
                self.assertLess(peak_memory(explode), 4 * len(stream) + 1.4 * limit + (1 << 17))

    def test_pieces_of_bounded_size(self) -> None:
        """Pieces have a maximum size for each fragment, and zlib keeps no data if the last piece is full."""
        for size in (*range(INFLATE_SIZE - 300, INFLATE_SIZE + 301, 7), 3 * INFLATE_SIZE, 10 * INFLATE_SIZE + 1):
            data = random.Random(size).randbytes(3) * size
            for fin in (True, False):
                zipped = compress(data[:size])
                plain = list(Inflater().inflate(zipped if fin else zipped + TAIL, fin))
                with self.subTest(size=size, fin=fin):
                    self.assertLessEqual(max(map(len, plain)), INFLATE_SIZE)
                    self.assertEqual(b"".join(plain), data[:size])

    def test_pieces_in_linear_time(self) -> None:
        """Each step returns the rest of its input, which takes linear time in all."""

        piece = bomb(4 << 20)

        def inflate_much(size: int) -> None:
            inflater = Inflater()
            for _ in range(size):
                for _ in inflater.inflate(piece, False):
                    pass

        self.assertLess(growth(inflate_much, 2), 9)

    def test_bomb_in_pieces(self) -> None:
        """The same in pieces, as from a socket."""
        payload = bomb(1 << 30)
        reader = MessageReader(1 << 20, compressed=True)
        head = b"\xc2\xff" + len(payload).to_bytes(8, "big") + bytes(4)

        def explode() -> None:
            with self.assertRaises(ProtocolError) as caught:
                list(reader.feed(head))
                for i in range(0, len(payload), 1 << 16):
                    list(reader.feed(payload[i : i + (1 << 16)]))
            self.assertEqual(caught.exception.code, 1009)

        self.assertLess(peak_memory(explode), 4 << 20)

    def test_much_of_nothing(self) -> None:
        """Megabytes of empty blocks inflate to no data, and are not kept."""
        inflater, blocks = Inflater(), b"\x00\x00\x00\xff\xff" * 13_000

        def feed() -> None:
            for _ in range(100):
                self.assertEqual(b"".join(inflater.inflate(blocks, False)), b"")

        self.assertLess(peak_memory(feed), 1 << 18)


class Takeover(unittest.TestCase):
    """Messages that refer to earlier ones (7.2.3.2), of clients that did not offer client_no_context_takeover."""

    MESSAGES = (b"Hello", b"Hello", b"", b"x" * 100_000, random.Random(4).randbytes(3000), b"Hello" * 999, b"x" * 9)

    def stream(self, *, whole: bool = True) -> list[bytes]:
        """Return messages of one compressor, each in one frame, or in three with a Ping between them."""
        compressor, frames = zlib.compressobj(wbits=-15), []
        for message in self.MESSAGES:
            data = (compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
            if whole:
                frames.append(masked_frame(2, data, rsv=4))
            else:
                first, middle, last = data[:1], data[1:2], data[2:]
                frames.append(masked_frame(2, first, rsv=4, fin=False) + masked_frame(9))
                frames.append(masked_frame(0, middle, fin=False) + masked_frame(0, last))
        return frames

    def read(self, *, whole: bool, takeover: bool) -> tuple[list[bytes], bytes]:
        """Return the messages of a reader, and its context."""
        reader = MessageReader(1 << 20, compressed=True, takeover=takeover)
        heard = [
            bytes(payload)
            for piece in self.stream(whole=whole)
            for opcode, payload in reader.feed(piece)
            if opcode == 2
        ]
        return heard, reader.context

    def test_messages(self) -> None:
        for whole in (True, False):
            with self.subTest(whole=whole):
                heard, context = self.read(whole=whole, takeover=True)
                self.assertEqual(heard, list(self.MESSAGES))
                self.assertEqual(context, b"".join(self.MESSAGES)[-32768:])

    def test_uncompressed_messages_between(self) -> None:
        """Uncompressed messages are not part of the context (7.2.3.2)."""
        reader = MessageReader(1 << 20, compressed=True, takeover=True)
        plain = masked_frame(2, b"plain")
        heard = [payload for opcode, payload in reader.feed(plain.join(self.stream())) if opcode]
        self.assertEqual(heard[::2], list(self.MESSAGES))
        self.assertEqual(reader.context, b"".join(self.MESSAGES)[-32768:])

    def test_not_agreed_on(self) -> None:
        """A client that offered client_no_context_takeover has no context, and must not refer to one."""
        with self.assertRaises(ProtocolError) as caught:
            self.read(whole=True, takeover=False)
        self.assertEqual(caught.exception.code, 1007)
        reader = MessageReader(1 << 20, compressed=True)
        list(reader.feed(masked_frame(2, compress(b"Hello" * 100), rsv=4)))
        self.assertEqual(reader.context, b"")

    def test_in_linear_time(self) -> None:
        """Many messages, in small pieces."""

        def feed(size: int) -> None:
            reader = MessageReader(1 << 20, compressed=True, takeover=True)
            many = self.stream()[1] * (size // 10)
            compressor = zlib.compressobj(wbits=-15)
            first = (compressor.compress(bytes(40_000)) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
            for _ in reader.feed(masked_frame(2, first, rsv=4) + many):
                pass

        self.assertLess(growth(feed, 4000), 9)


class Deflating(unittest.TestCase):
    """deflate (7.2.1)."""

    # Repeats at distances that only larger windows reach.
    FAR = b"".join(random.Random(3).randbytes(600 << i) * 2 for i in range(6))

    def test_example(self) -> None:
        """RFC 7692 7.2.3.1."""
        self.assertEqual(pywebsock.deflate(b"Hello", 15), bytes.fromhex("f2 48 cd c9 c9 07 00"))

    def test_round_trip(self) -> None:
        for payload in (
            b"",
            b"x",
            b"x" * 100_000,
            bytes(range(256)) * 10,
            random.Random(4).randbytes(100_000),
            self.FAR,
        ):
            for window in range(9, 16):
                with self.subTest(length=len(payload), window=window):
                    self.assertEqual(inflate(pywebsock.deflate(payload, window)), payload)

    def test_every_window(self) -> None:
        """The client inflates with the negotiated window, and no larger one."""
        for window in range(9, 16):
            with self.subTest(window=window):
                self.assertEqual(inflate_with(window, pywebsock.deflate(self.FAR, window)), self.FAR)
        for window in range(9, 15):
            with self.subTest(window=window), self.assertRaises(zlib.error):  # else the test is void
                inflate_with(window, pywebsock.deflate(self.FAR, window + 1))

    def test_by_itself(self) -> None:
        """Messages do not refer to each other."""
        self.assertEqual(pywebsock.deflate(b"Hello" * 9, 15), pywebsock.deflate(b"Hello" * 9, 15))

    def test_tail_is_left_out(self) -> None:
        for size in range(0, 5000, 97):
            payload = pywebsock.deflate(b"text" * size, 12)
            self.assertFalse(payload.endswith(TAIL))
            self.assertEqual(zlib.decompress(payload + TAIL + b"\x03\x00", wbits=-15), b"text" * size)


if __name__ == "__main__":
    unittest.main()

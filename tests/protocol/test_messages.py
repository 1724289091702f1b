"""Messages (RFC 6455 5.4, 5.6, 8.1): fragments, UTF-8, limits, and outgoing messages."""

from __future__ import annotations

import itertools
import random
import typing
import unittest
import zlib

import pywebsock
from pywebsock import MessageReader, Opcode, Outgoing, ProtocolError, WebSocketHandler, outgoing_message
from tests.tools.support import brought, compress, growth, masked_frame, package, peak_memory

TEXT, BINARY, CONT, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
LIMIT = 1 << 16
KEY = bytes(4)  # changes no byte, so that large payloads take no time


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """Return a large frame."""
    return masked_frame(opcode, b"", fin=fin, rsv=rsv, key=KEY, length=len(payload)) + payload


def fragments(opcode: int, *payloads: bytes, rsv: int = 0) -> list[bytes]:
    """Return the frames of a message in fragments."""
    last = len(payloads) - 1
    return [
        masked_frame(CONT if i else opcode, payload, fin=i == last, rsv=0 if i else rsv)
        for i, payload in enumerate(payloads)
    ]


def read(
    *pieces: bytes, limit: int = LIMIT, compressed: bool = False
) -> tuple[list[tuple[int, str | bytes]], int | None]:
    """Return the messages and control frames in these pieces, text as str, and the code of the error that ends them."""
    feed = MessageReader(limit, compressed).feed
    heard: list[tuple[int, str | bytes]] = []
    try:
        for opcode, payload in itertools.chain.from_iterable(map(feed, pieces)):
            if opcode == TEXT:
                heard.append((TEXT, payload.decode()))  # raises an error if the reader has not checked the text
            elif opcode != CONT:
                heard.append((opcode, bytes(payload)))
            else:
                assert payload == b"", "there is nothing to see of a message that is not finished"
    except ProtocolError as error:
        return heard, error.code
    return heard, None


class Kinds(unittest.TestCase):
    """The messages of each opcode (5.6)."""

    def test_kinds(self) -> None:
        """Payloads are bytes: text is checked, but not decoded."""
        for opcode, payload in (
            (TEXT, b"Hello"),
            (TEXT, "κόσμε €𝄞".encode()),
            (TEXT, b""),
            (BINARY, b"\xff\x00"),
            (BINARY, b""),
            (PING, b"\xff"),
            (PONG, b""),
            (CLOSE, b"\x03\xe8"),
        ):
            with self.subTest(opcode=opcode, payload=payload):
                self.assertEqual(list(MessageReader(LIMIT).feed(masked_frame(opcode, payload))), [(opcode, payload)])

    def test_unfinished(self) -> None:
        """The reader yields (CONT, b"") after each piece of a message except the last, and never else."""
        first, middle, last = fragments(TEXT, b"abc", b"", b"de")
        ping = masked_frame(PING, b"p")
        more, message = (CONT, b""), (TEXT, b"abcde")
        for pieces, events in (
            ((first, ping, middle, last), [[more], [(PING, b"p")], [more], [more, message]]),
            ((first + ping + middle + last,), [[more, (PING, b"p"), more, more, message]]),
            ((first[:6], first[6:7], first[7:] + middle[:1]), [[more], [more], [more]]),
            ((ping[:-1], ping[-1:], masked_frame(BINARY)), [[], [(PING, b"p")], [(BINARY, b"")]]),
        ):
            with self.subTest(pieces):
                self.assertEqual(brought(MessageReader(LIMIT).feed, *pieces), events)

    def test_nothing_is_shared(self) -> None:
        """Changing one payload does not change another."""
        for stream in (
            frame(BINARY, b"x" * 1000),
            b"".join(fragments(BINARY, b"x" * 500, b"x" * 500)),
            frame(BINARY, compress(b"x" * 1000), rsv=4),
        ):
            reader = MessageReader(LIMIT, compressed=True, takeover=True)
            for _ in range(2):
                *_, (opcode, payload) = reader.feed(stream)
                self.assertEqual((opcode, payload), (BINARY, b"x" * 1000))
                if isinstance(payload, bytearray):
                    payload[:] = b"changed"
            self.assertNotIn(b"changed", reader.context)

    def test_many_in_one_piece(self) -> None:
        stream = b"".join(masked_frame(TEXT, str(i).encode()) for i in range(1000))
        self.assertEqual(read(stream), ([(TEXT, str(i)) for i in range(1000)], None))


class Fragments(unittest.TestCase):
    """Messages in fragments (5.4)."""

    def test_any_number(self) -> None:
        text = "κόσμε €𝄞 and more"
        payload = text.encode()
        for size in range(1, len(payload) + 1):
            frames = fragments(TEXT, *(payload[i : i + size] for i in range(0, len(payload), size)))
            with self.subTest(size=size):
                self.assertEqual(read(b"".join(frames)), ([(TEXT, text)], None))
                self.assertEqual(read(*frames), ([(TEXT, text)], None))

    def test_empty(self) -> None:
        """Empty fragments: first, last, between others, and only empty ones."""
        for payloads in ((b"", b"ab"), (b"ab", b""), (b"a", b"", b"b"), (b"", b"", b"a", b"", b"", b"b", b"", b"")):
            with self.subTest(payloads):
                self.assertEqual(read(*fragments(TEXT, *payloads)), ([(TEXT, "ab")], None))
        self.assertEqual(read(*fragments(BINARY, b"", b"", b"")), ([(BINARY, b"")], None))
        self.assertEqual(read(*fragments(TEXT, b"", b"")), ([(TEXT, "")], None))

    def test_control_frames_between(self) -> None:
        """Control frames are returned at once, before the message that they interrupt."""
        first, middle, last = fragments(TEXT, "€".encode()[:1], "€".encode()[1:2], "€".encode()[2:])
        ping, pong = masked_frame(PING, b"1"), masked_frame(PONG, b"2")
        heard = [(PING, b"1"), (PONG, b"2"), (PING, b"1"), (TEXT, "€")]
        stream = first + ping + pong + middle + ping + last
        for cut in range(len(stream) + 1):
            with self.subTest(cut=cut):
                self.assertEqual(read(stream[:cut], stream[cut:]), (heard, None))
        close = masked_frame(CLOSE, b"\x03\xe8")
        self.assertEqual(read(first + close), ([(CLOSE, b"\x03\xe8")], None))

    def test_a_message_after_another(self) -> None:
        """No data of a message is left in the next."""
        stream = [
            *fragments(TEXT, b"a", b"b"),
            *fragments(BINARY, b"\xff", b"\xfe"),
            *fragments(TEXT, b"c", b"", b"d"),
            masked_frame(BINARY, b"e"),
        ]
        heard = [(TEXT, "ab"), (BINARY, b"\xff\xfe"), (TEXT, "cd"), (BINARY, b"e")]
        self.assertEqual(read(*stream), (heard, None))
        self.assertEqual(read(b"".join(stream)), (heard, None))

    def test_wrong(self) -> None:
        """Valid messages before an invalid frame are returned, in pieces of any size."""
        good, begun = masked_frame(TEXT, b"good"), masked_frame(TEXT, b"begun", fin=False)
        ping = masked_frame(PING, b"p")
        for what, stream, more in (
            ("nothing to continue", masked_frame(CONT, b"x"), []),
            ("nothing to continue, not final", masked_frame(CONT, b"x", fin=False), []),
            ("a message is over", b"".join(fragments(TEXT, b"a", b"b")) + masked_frame(CONT), [(TEXT, "ab")]),
            ("text within a message", begun + masked_frame(TEXT, b"x"), []),
            ("binary within a message", begun + masked_frame(BINARY, b"x"), []),
            ("text within a message, not final", begun + masked_frame(TEXT, b"x", fin=False), []),
            ("a Ping between", begun + ping + masked_frame(TEXT, b"x"), [(PING, b"p")]),
            ("RSV1", masked_frame(TEXT, b"x", rsv=4), []),
            ("RSV1, not final", masked_frame(TEXT, b"x", rsv=4, fin=False), []),
            ("RSV1 on a continuation", begun + masked_frame(CONT, b"x", rsv=4), []),
            ("RSV1 on a Ping", ping + masked_frame(PING, b"x", rsv=4), [(PING, b"p")]),
            ("RSV1 on a Close", masked_frame(CLOSE, b"\x03\xe8", rsv=4), []),
            ("an opcode that is reserved", ping + masked_frame(3, b"x"), [(PING, b"p")]),
        ):
            whole = good + stream + good
            for size in (1, 2, 3, 7, len(whole)):
                with self.subTest(what, size=size):
                    pieces = (whole[i : i + size] for i in range(0, len(whole), size))
                    self.assertEqual(read(*pieces), ([(TEXT, "good"), *more], 1002))

    def test_wrong_before_its_payload(self) -> None:
        """The header is enough for the error."""
        begun = masked_frame(TEXT, b"begun", fin=False)
        for stream in (
            begun + masked_frame(TEXT, length=9),
            masked_frame(CONT, length=9),
            masked_frame(TEXT, length=9, rsv=4),
        ):
            self.assertEqual(read(stream), ([], 1002))

    def test_many_empty(self) -> None:
        """Ten thousand empty fragments take no memory."""
        piece = masked_frame(CONT, fin=False) * 1000

        def arriving(times: int) -> typing.Iterator[bytes]:
            yield masked_frame(BINARY, b"a", fin=False)
            for _ in range(times):
                yield piece
            yield masked_frame(CONT, b"b")

        def read_all(times: int) -> None:
            feed = MessageReader(LIMIT).feed
            events = itertools.chain.from_iterable(map(feed, arriving(times)))
            self.assertEqual([event for event in events if event[0]], [(BINARY, b"ab")])

        peak = peak_memory(lambda: read_all(2))
        self.assertLess(peak, 1 << 16)
        self.assertLess(peak_memory(lambda: read_all(12)), peak + 1000)

    def test_in_linear_time(self) -> None:
        """A message in many fragments, a frame in many pieces, and many messages in one piece."""

        def many_fragments(size: int) -> None:
            read(b"".join((masked_frame(BINARY, b"x", fin=False), masked_frame(CONT, b"x", fin=False) * size)))

        def many_pieces(size: int) -> None:
            read(masked_frame(BINARY, length=size), *[b"x"] * size)

        def many_messages(size: int) -> None:
            read(masked_frame(BINARY, b"x") * size)

        def many_pieces_of_pings(size: int) -> None:
            stream = masked_frame(PING, b"x" * 125) * (size // 131)
            read(*(stream[i : i + 1] for i in range(len(stream))))

        for act in (many_fragments, many_pieces, many_messages, many_pieces_of_pings):
            with self.subTest(act.__name__):
                self.assertLess(growth(act, 1000), 9)


class Utf8(unittest.TestCase):
    """Text is UTF-8 (8.1), and an error is found with the first byte that makes it invalid."""

    # The ranges of the bytes of a character, by its first byte (RFC 3629 4).
    TAIL = range(0x80, 0xC0)
    CHARACTERS: tuple[tuple[range, ...], ...] = (
        (range(0x80),),
        (range(0xC2, 0xE0), TAIL),
        (range(0xE0, 0xE1), range(0xA0, 0xC0), TAIL),
        (range(0xE1, 0xED), TAIL, TAIL),
        (range(0xED, 0xEE), range(0x80, 0xA0), TAIL),
        (range(0xEE, 0xF0), TAIL, TAIL),
        (range(0xF0, 0xF1), range(0x90, 0xC0), TAIL, TAIL),
        (range(0xF1, 0xF4), TAIL, TAIL, TAIL),
        (range(0xF4, 0xF5), range(0x80, 0x90), TAIL, TAIL),
    )
    BY_FIRST_BYTE: typing.ClassVar = {byte: ranges for ranges in CHARACTERS for byte in ranges[0]}
    # Invalid text, and the number of bytes that are enough to know.
    WRONG = (
        ("a continuation alone", "80", 1),
        ("the last continuation alone", "bf", 1),
        ("two continuations", "c3 a9 a9", 3),
        ("an overlong slash in two bytes", "c0 af", 1),
        ("the longest overlong in two bytes", "c1 bf", 1),
        ("an overlong slash in three bytes", "e0 80 af", 2),
        ("the longest overlong in three bytes", "e0 9f bf", 2),
        ("an overlong slash in four bytes", "f0 80 80 af", 2),
        ("the longest overlong in four bytes", "f0 8f bf bf", 2),
        ("an overlong zero", "c0 80", 1),
        ("the first surrogate", "ed a0 80", 2),
        ("the last surrogate", "ed bf bf", 2),
        ("a pair of surrogates", "ed a0 81 ed b0 80", 2),
        ("U+110000", "f4 90 80 80", 2),
        ("more than that", "f5 80 80 80", 1),
        ("five bytes", "f8 88 80 80 80", 1),
        ("six bytes", "fc 84 80 80 80 80", 1),
        ("FE", "fe", 1),
        ("FF", "ff", 1),
        ("two bytes, cut by ASCII", "c3 41", 2),
        ("three bytes, cut by ASCII", "e2 82 41", 3),
        ("four bytes, cut by ASCII", "f0 9d 84 41", 4),
        ("four bytes, cut by another character", "f0 9d c3 a9", 3),
        ("the example of Autobahn", "ce ba e1 bd b9 cf 83 ce bc ce b5 ed a0 80 65 64 69 74 65 64", 13),
    )

    @classmethod
    def may_be_text(cls, data: bytes) -> bool:
        """Return whether these bytes are valid text, or the beginning of one."""
        position = 0
        while position < len(data):
            ranges = cls.BY_FIRST_BYTE.get(data[position])
            if not ranges or not all(byte in each for byte, each in zip(data[position:], ranges)):
                return False
            position += len(ranges)
        return True

    def ways(self, data: bytes) -> dict[str, list[bytes]]:
        """Yield frames that have the bytes of a text one by one, in several ways."""
        each = [data[i : i + 1] for i in range(len(data))]
        head = masked_frame(TEXT, length=len(data), key=KEY)
        return {
            "pieces of a frame": [head, *each],
            "pieces of a fragment": [
                masked_frame(TEXT, fin=False),
                masked_frame(CONT, length=len(data) + 9, key=KEY),
                *each,
            ],
            "fragments": [masked_frame(TEXT, fin=False), *(masked_frame(CONT, byte, fin=False) for byte in each)],
        }

    def test_wrong(self) -> None:
        for what, text, enough in self.WRONG:
            data = bytes.fromhex(text)
            with self.subTest(what):
                self.assertEqual(read(masked_frame(TEXT, data)), ([], 1007))
                self.assertEqual(read(masked_frame(TEXT, compress(data), rsv=4), compressed=True), ([], 1007))
                self.assertEqual(
                    read(masked_frame(TEXT, b"ok")[:-1], masked_frame(TEXT, b"ok")[-1:], masked_frame(TEXT, data)),
                    ([(TEXT, "ok")], 1007),
                )
            for way, pieces in self.ways(data).items():
                with self.subTest(what, way=way):
                    extra = len(pieces) - len(data)
                    self.assertEqual(read(*pieces[: extra + enough - 1]), ([], None))
                    self.assertEqual(read(*pieces[: extra + enough]), ([], 1007))

    def test_incomplete_at_the_end(self) -> None:
        for character in ("é", "€", "𝄞"):
            data = character.encode()
            for end in range(1, len(data)):
                for pieces in (
                    [masked_frame(TEXT, data[:end])],
                    fragments(TEXT, data[:end], b""),
                    fragments(TEXT, b"", data[:end]),
                ):
                    with self.subTest(character, end=end):
                        self.assertEqual(read(*pieces), ([], 1007))

    def test_good(self) -> None:
        """The first and the last character of each length, and those beside surrogates."""
        for number in (0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0xD7FF, 0xE000, 0xFDD0, 0xFEFF, 0xFFFE, 0x10000, 0x10FFFF):
            for text in (chr(number), f"a{chr(number)}é"):
                data = text.encode()
                with self.subTest(text):
                    self.assertEqual(read(masked_frame(TEXT, data)), ([(TEXT, text)], None))
                    self.assertEqual(read(*self.ways(data)["pieces of a frame"]), ([(TEXT, text)], None))
                    self.assertEqual(read(*self.ways(data)["fragments"], masked_frame(CONT)), ([(TEXT, text)], None))

    def test_as_early_as_possible(self) -> None:
        """Each byte after each valid beginning of a character; the expected result is found by brute force."""
        beginnings = [b""]
        edges = (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF)  # limits of the ranges of a second byte
        for start in (0x41, 0xC2, 0xDF, 0xE0, 0xE1, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4):
            more = [bytes((start,))]
            while more:
                beginnings += more
                longer = [beginning + bytes((edge,)) for beginning in more for edge in edges]
                more = [each for each in longer if len(each) < 4 and self.may_be_text(each)]
                # All other texts of three bytes are as these: complete characters, and other third bytes.
                more = [each for each in more if len(each) < 3 or not each.decode(errors="ignore")]
                more = [each for each in more if len(each) < 3 or each[2] in (0x80, 0xBF)]
        self.assertGreater(len(beginnings), 60)
        wrong = []
        for beginning in beginnings:
            head = masked_frame(TEXT, length=99, key=KEY) + beginning
            for byte in range(256):
                data = beginning + bytes((byte,))
                reader = MessageReader(LIMIT)
                self.assertEqual(list(reader.feed(head)), [(CONT, b"")])
                try:
                    good = list(reader.feed(data[-1:])) == [(CONT, b"")]
                except ProtocolError as error:
                    good = error.code != 1007
                if good != self.may_be_text(data):
                    wrong.append(data)
        self.assertEqual(wrong, [])

    def test_the_oracle(self) -> None:
        """`may_be_text` agrees with Python on every character."""
        for number in (*range(0x900), *range(0x900, 0x110000, 131)):
            if not 0xD800 <= number < 0xE000:
                data = chr(number).encode()
                self.assertTrue(all(self.may_be_text(data[:end]) for end in range(1, len(data) + 1)), data)

    def test_binary_may_be_anything(self) -> None:
        for _, text, _ in self.WRONG:
            data = bytes.fromhex(text)
            self.assertEqual(read(*fragments(BINARY, data, data)), ([(BINARY, data + data)], None))

    def test_nothing_is_left_for_the_next_message(self) -> None:
        heard = [(BINARY, b"\xe2\x82"), (TEXT, "\x7f"), (TEXT, "€")]
        stream = [
            *fragments(BINARY, b"\xe2", b"\x82"),
            *fragments(TEXT, b"", b"\x7f"),
            *fragments(TEXT, b"\xe2\x82", b"\xac"),
        ]
        self.assertEqual(read(*stream), (heard, None))


class Limit(unittest.TestCase):
    """The longest message has `max_message` bytes; a longer one is closed with 1009."""

    def test_exact(self) -> None:
        """The limit is exact: in one frame, in fragments, in pieces, compressed, text and binary."""
        for limit in (0, 1, 125, 126, 1000, 65535, 65536):
            for opcode in (TEXT, BINARY):
                for size in {limit - 1, limit, limit + 1} - {-1}:
                    payload = b"x" * size
                    half, zipped = size // 2, compress(payload)
                    heard: object = ([(opcode, payload.decode() if opcode == TEXT else payload)], None)
                    expected = heard if size <= limit else ([], 1009)
                    whole, small = frame(opcode, payload), frame(opcode, zipped, rsv=4)
                    rest = frame(CONT, payload[half:])
                    for what, pieces in (
                        ("a frame", [whole]),
                        ("pieces", [whole[:9], whole[9:40], whole[40:]]),
                        ("fragments", [frame(opcode, payload[:half], fin=False), rest]),
                        ("empty fragments", [frame(opcode, payload, fin=False), frame(CONT, fin=False), frame(CONT)]),
                        ("compressed", [small]),
                        ("compressed, in pieces", [small[i : i + 1] for i in range(len(small))]),
                    ):
                        with self.subTest(what, limit=limit, opcode=opcode, size=size):
                            self.assertEqual(read(*pieces, limit=limit, compressed=True), expected)

    def test_compressed_data_may_be_longer(self) -> None:
        """The inflated size counts, even if the compressed message is longer."""
        payload = random.Random(8).randbytes(40_000)
        for memory in range(1, 10):  # with less memory, blocks are smaller; the package websockets uses 5
            for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, getattr(zlib, "Z_FIXED", 4)):
                compressor = zlib.compressobj(wbits=-15, memLevel=memory, strategy=strategy)
                zipped = (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
                self.assertGreater(len(zipped), len(payload))
                with self.subTest(memory=memory, strategy=strategy):
                    stream = frame(BINARY, zipped, rsv=4)
                    self.assertEqual(read(stream, limit=len(payload), compressed=True)[1], None)

    def test_before_the_payload(self) -> None:
        """The header of a frame that is too long is enough; no payload is kept."""
        for size in (101, 1000, 1 << 16, 1 << 40, (1 << 63) - 1):
            head = masked_frame(BINARY, length=size)
            with self.subTest(size=size):
                self.assertEqual(read(head, limit=100), ([], 1009))
                begun = masked_frame(TEXT, b"ab", fin=False)
                self.assertEqual(read(begun, masked_frame(CONT, length=99), limit=100), ([], 1009))
                self.assertEqual(read(begun, masked_frame(CONT, length=98), limit=100), ([], None))

    def test_bytes_are_counted(self) -> None:
        """The limit counts bytes, not characters."""
        self.assertEqual(read(masked_frame(TEXT, "€€".encode()), limit=6), ([(TEXT, "€€")], None))
        self.assertEqual(read(masked_frame(TEXT, "€€".encode()), limit=5), ([], 1009))

    def test_each_message_has_its_own(self) -> None:
        stream = [
            *fragments(BINARY, b"x" * 60, b"x" * 40),
            frame(BINARY, b"x" * 100),
            *fragments(BINARY, b"x" * 100, b""),
        ]
        heard, code = read(*stream * 3, limit=100)
        self.assertEqual((len(heard), code), (9, None))

    def test_control_frames_do_not_count(self) -> None:
        first, last = fragments(BINARY, b"x" * 50, b"x" * 50)
        heard, code = read(first, masked_frame(PING, b"p" * 125), last, limit=100)
        self.assertEqual((len(heard), code), (2, None))

    def test_memory(self) -> None:
        """A message that is too long takes no more memory than its pieces."""
        for fin in (True, False):

            def feed(fin: bool = fin) -> None:
                piece = bytes(1 << 16)
                head = masked_frame(BINARY, length=1 << 30, fin=fin)
                self.assertEqual(read(head + piece, *[piece] * 99, limit=1 << 20), ([], 1009))

            self.assertLess(peak_memory(feed), 1 << 20)

    def test_good_before_too_much(self) -> None:
        heard, code = read(
            masked_frame(TEXT, b"a") + masked_frame(PING, b"b") + masked_frame(TEXT, b"c" * 101), limit=100
        )
        self.assertEqual((heard, code), ([(TEXT, "a"), (PING, b"b")], 1009))


class Compressed(unittest.TestCase):
    """Messages with RSV1 (RFC 7692 6)."""

    HELLO = bytes.fromhex("f2 48 cd c9 c9 07 00")

    def test_example(self) -> None:
        """RFC 7692 7.2.3.1: in one frame, and in two."""
        for frames in ([self.HELLO], [self.HELLO[:3], self.HELLO[3:]], [b"", self.HELLO, b""]):
            with self.subTest(frames):
                self.assertEqual(read(*fragments(TEXT, *frames, rsv=4), compressed=True), ([(TEXT, "Hello")], None))

    def test_only_where_agreed(self) -> None:
        self.assertEqual(read(masked_frame(TEXT, self.HELLO, rsv=4)), ([], 1002))

    def test_not_every_message(self) -> None:
        """A message may be uncompressed, and no data goes from one message to the next."""
        zipped, plain = masked_frame(TEXT, self.HELLO, rsv=4), masked_frame(TEXT, b"plain")
        stream = [plain, zipped, zipped, *fragments(TEXT, b"a", b"b"), zipped, plain]
        texts = ["plain", "Hello", "Hello", "ab", "Hello", "plain"]
        for pieces in (stream, [b"".join(stream)]):
            self.assertEqual(read(*pieces, compressed=True), ([(TEXT, text) for text in texts], None))

    def test_control_frames_between(self) -> None:
        first, last = fragments(TEXT, self.HELLO[:3], self.HELLO[3:], rsv=4)
        heard = [(PING, b"p"), (TEXT, "Hello")]
        self.assertEqual(read(first, masked_frame(PING, b"p"), last, compressed=True), (heard, None))

    def test_wrong(self) -> None:
        """RSV1 is for the first fragment of a message (6.1), and not for control frames."""
        first, last = fragments(TEXT, self.HELLO[:3], self.HELLO[3:], rsv=4)
        for what, stream, code in (
            ("RSV1 on a continuation", first + masked_frame(CONT, self.HELLO[3:], rsv=4), 1002),
            ("RSV1 on a Ping", first + masked_frame(PING, rsv=4) + last, 1002),
            ("corrupt", masked_frame(TEXT, b"\xff\xff", rsv=4), 1007),
            ("corrupt, not final", masked_frame(TEXT, b"\xff\xff", rsv=4, fin=False), 1007),
            ("not UTF-8", masked_frame(TEXT, compress(b"a\xff"), rsv=4), 1007),
        ):
            with self.subTest(what):
                self.assertEqual(read(stream, compressed=True), ([], code))

    def test_text_is_checked_early(self) -> None:
        """Before the last fragment."""
        compressor = zlib.compressobj(wbits=-15)
        data = compressor.compress(b"abc\xff") + compressor.flush(zlib.Z_SYNC_FLUSH)
        self.assertEqual(read(masked_frame(TEXT, data, rsv=4, fin=False), compressed=True), ([], 1007))

    def test_random_fragments(self) -> None:
        rng = random.Random(5)
        for _ in range(50):
            payload = b"".join(rng.randbytes(3) * rng.randrange(9) for _ in range(100))
            zipped = compress(payload)
            cuts = [0, *sorted(rng.randrange(len(zipped) + 1) for _ in range(rng.randrange(9))), len(zipped)]
            frames = fragments(BINARY, *(zipped[a:b] for a, b in zip(cuts, cuts[1:])), rsv=4)
            self.assertEqual(read(*frames, compressed=True), ([(BINARY, payload)], None))


class Size(unittest.TestCase):
    """The bytes that a reader keeps of an unfinished message."""

    def kept(self, *pieces: bytes, limit: int = LIMIT) -> list[int]:
        """Return `size` after each piece; it may grow only before an event."""
        reader, sizes = MessageReader(limit, compressed=True), []
        for piece in pieces:
            seen = reader.size
            for _ in reader.feed(piece):
                seen = reader.size
            self.assertLessEqual(reader.size, seen, "the size has grown without an event")
            sizes.append(reader.size)
        return sizes

    def test_whole_messages(self) -> None:
        """Complete messages are not kept."""
        stream = masked_frame(TEXT, b"abc") * 9 + masked_frame(PING, b"p") + masked_frame(BINARY, b"")
        self.assertEqual(self.kept(stream, stream), [0, 0])

    def test_pieces(self) -> None:
        whole = frame(BINARY, b"x" * 100)
        self.assertEqual(self.kept(whole[:3], whole[3:10], whole[10:50], whole[50:], whole), [0, 4, 44, 0, 0])

    def test_fragments(self) -> None:
        """Fragments are counted; control frames between them are not."""
        first, middle, last = fragments(TEXT, b"abc", b"", b"de")
        self.assertEqual(self.kept(first, masked_frame(PING, b"p"), middle, last[:-1], last[-1:]), [3, 3, 3, 4, 0])

    def test_compressed(self) -> None:
        """With what zlib takes, from the first byte of the payload on."""
        window, zipped = pywebsock.INFLATER_SIZE, compress(b"x" * 50_000)
        first, last = fragments(BINARY, zipped[:-5], zipped[-5:], rsv=4)
        header, *after = self.kept(first[:6], first[6:], last, first + last)
        self.assertEqual((header, after[1:]), (0, [0, 0]))
        self.assertGreater(after[0], window + 40_000)
        self.assertEqual(self.kept(masked_frame(TEXT, rsv=4, fin=False)), [0])
        self.assertEqual(self.kept(masked_frame(TEXT, zipped[:1], rsv=4, fin=False)), [window])

    def test_in_steps(self) -> None:
        """The caller may stop at each event; until then, no more memory is used."""
        wanted, zipped = 1 << 20, compress(bytes(16 << 20))
        reader = MessageReader(16 << 20, compressed=True)

        def read_some() -> None:
            size = 0
            for event in reader.feed(frame(BINARY, zipped, rsv=4)):
                self.assertEqual(event, (CONT, b""))
                self.assertLessEqual(reader.size - size, pywebsock.INFLATE_SIZE + pywebsock.INFLATER_SIZE)
                size = reader.size
                if size > wanted:
                    break

        self.assertLess(peak_memory(read_some), 2 * wanted + 4 * len(zipped))
        self.assertGreater(reader.size, wanted)
        self.assertLess(reader.size, wanted + 2 * pywebsock.INFLATE_SIZE)

    def test_goes_on(self) -> None:
        """A caller that stops between any two events, and goes on later, misses no message."""
        first, last = fragments(BINARY, b"a" * 9, b"b" * 9)
        stream = first + masked_frame(PING) + last + frame(BINARY, compress(b"c" * 200_000), rsv=4)
        whole = list(MessageReader(1 << 20, compressed=True).feed(stream))
        self.assertEqual([opcode for opcode, _ in whole if opcode], [PING, BINARY, BINARY])
        for stop in range(len(whole) + 1):
            events = MessageReader(1 << 20, compressed=True).feed(stream)
            self.assertEqual([*itertools.islice(events, stop), *events], whole)

    def test_while_it_waits(self) -> None:
        """The input and the messages are freed: silent clients keep no old messages."""
        large = b"x" * (1 << 20)
        reader = MessageReader(1 << 21, compressed=True)
        tracemalloc = package("tracemalloc")
        for what, pieces in (
            ("binary", (frame(BINARY, large),)),
            ("text", (frame(TEXT, large),)),
            ("pieces", (frame(BINARY, large)[:-9], frame(BINARY, large)[-9:])),
            ("fragments", (frame(TEXT, large[:9], fin=False), frame(CONT, large))),
            ("compressed", (frame(BINARY, compress(large), rsv=4),)),
            ("many", (frame(BINARY, b"x") * 99 + masked_frame(PING, b"p")[:-1], masked_frame(PING, b"p")[-1:])),
        ):
            with self.subTest(what):
                tracemalloc.start()
                for piece in pieces:
                    for _ in reader.feed(piece):
                        pass
                del _
                held = tracemalloc.get_traced_memory()[0]
                tracemalloc.stop()
                self.assertLess(held, 1 << 14)


class Out(unittest.TestCase):
    """outgoing_message and Outgoing: the frames of a message to clients."""

    def test_kinds(self) -> None:
        """All kinds of bytes are binary; the error for another type has its name."""
        for message in (b"ab", bytearray(b"ab"), memoryview(b"xaby")[1:3]):
            self.assertEqual(outgoing_message(typing.cast(bytes, message)).frame(0), b"\x82\x02ab")
        for wrong, name in (({"a": 1}, "dict"), (None, "NoneType"), (7, "int"), (["a"], "list")):
            with self.subTest(name), self.assertRaisesRegex(TypeError, f"^a message must be str or bytes, not {name}$"):
                outgoing_message(typing.cast(str, wrong))
        with self.assertRaises(ValueError):
            outgoing_message("\ud800")

    def test_bytes_are_copied(self) -> None:
        """A bytearray may change after the call."""
        changing = bytearray(b"ab")
        outgoing = outgoing_message(typing.cast(bytes, changing))
        changing[:] = b"xyz"
        self.assertEqual(outgoing.frame(0), b"\x82\x02ab")

    def test_recipients(self) -> None:
        """The recipients are those of the time of the call, each once; None for all clients."""
        self.assertIsNone(outgoing_message("x").to)
        client = WebSocketHandler.__new__(WebSocketHandler)
        some = [client]
        outgoing = outgoing_message("x", some)
        some.clear()
        self.assertEqual(outgoing.to, (client,))
        self.assertEqual(outgoing_message("x", iter([client, client])).to, (client,))
        self.assertEqual(outgoing_message("x", ()).to, ())
        for wrong in ([None], ["a"], [client, 1], "ab", [WebSocketHandler]):
            with (
                self.subTest(wrong),
                self.assertRaisesRegex(TypeError, "^the recipients of a message must be clients$"),
            ):
                outgoing_message("x", typing.cast(typing.Any, wrong))

    def test_fields(self) -> None:
        """The size is that of the payload (bytes)."""
        for message, opcode, payload in (("é", TEXT, b"\xc3\xa9"), ("", TEXT, b""), (b"\xff" * 3, BINARY, b"\xff" * 3)):
            outgoing = outgoing_message(message)
            self.assertEqual((outgoing.opcode, outgoing.payload, outgoing.size), (opcode, payload, len(payload)))

    def test_plain(self) -> None:
        for message, expected in (
            ("é", b"\x81\x02\xc3\xa9"),
            (b"\xff", b"\x82\x01\xff"),
            ("", b"\x81\x00"),
            (b"", b"\x82\x00"),
        ):
            with self.subTest(message):
                self.assertEqual(outgoing_message(message).frame(0), expected)
                self.assertEqual(outgoing_message(message).frame(15), expected)  # short ones are not compressed

    def test_as_received(self) -> None:
        """Payloads of a reader are sent as they are: bytes or a bytearray, text or binary."""
        for opcode in (TEXT, BINARY):
            for payload in (b"x" * 2000, bytearray(b"x" * 2000)):
                for window in (0, 15):
                    outgoing, other = Outgoing(opcode, payload), Outgoing(opcode, bytes(payload))
                    self.assertEqual(outgoing.frame(window), other.frame(window))
                    self.assertIs(type(outgoing.frame(window)), bytes)

    def test_threshold(self) -> None:
        size = pywebsock.DEFLATE_THRESHOLD
        for opcode, length, window, first in (
            (BINARY, size - 1, 15, 0x82),
            (BINARY, size, 15, 0xC2),
            (TEXT, size, 15, 0xC1),
            (TEXT, size, 0, 0x81),
        ):
            with self.subTest(opcode=opcode, length=length, window=window):
                self.assertEqual(Outgoing(opcode, b"x" * length).frame(window)[0], first)

    def test_limit(self) -> None:
        """A long message is not compressed in the loop: the client gets the smallest existing frame for it."""
        short, long = b"x" * (pywebsock.LONG_MESSAGE - 1), b"x" * pywebsock.LONG_MESSAGE
        self.assertEqual(Outgoing(BINARY, short).frame(12, pywebsock.LONG_MESSAGE), Outgoing(BINARY, short).frame(12))
        outgoing = Outgoing(BINARY, long)
        plain = outgoing.frame(15, pywebsock.LONG_MESSAGE)
        self.assertEqual(plain, pywebsock.serialize_frame(BINARY, long))
        made = {window: outgoing.frame(window) for window in (10, 12)}
        for window, expected in (
            (0, plain),
            (9, plain),
            (10, made[10]),
            (11, made[10]),
            (12, made[12]),
            (15, made[12]),
        ):
            with self.subTest(window=window):
                self.assertIs(outgoing.frame(window, pywebsock.LONG_MESSAGE), expected)

    def test_each_window(self) -> None:
        """A message is compressed once for each window in use."""
        payload = b"some text, again and again; " * 5000
        outgoing = Outgoing(BINARY, payload)
        for window in range(9, 16):
            with self.subTest(window=window):
                made = outgoing.frame(window)
                self.assertIs(outgoing.frame(window), made)
                self.assertEqual(
                    made, pywebsock.serialize_frame(Opcode.BINARY, pywebsock.deflate(payload, window), True)
                )
        self.assertEqual(outgoing.frame(0), pywebsock.serialize_frame(Opcode.BINARY, payload))

    def test_incompressible(self) -> None:
        """A message that does not become smaller is sent uncompressed."""
        outgoing = Outgoing(BINARY, random.Random(6).randbytes(5000))
        for window in (0, 9, 15):
            self.assertIs(outgoing.frame(window), outgoing.frame(0))
            self.assertEqual(outgoing.frame(window)[0], 0x82)


if __name__ == "__main__":
    unittest.main()

"""Commands and replies of Redis, without a Redis."""

from __future__ import annotations

import contextlib
import io
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.redis import FakeServer


class Pieces(io.RawIOBase):
    """A connection on which bytes arrive in these pieces, and then its end."""

    def __init__(self, pieces: typing.Iterable[bytes]) -> None:
        self.pieces = iter(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: typing.Any) -> int:
        piece = next(self.pieces, b"")
        buffer[: len(piece)] = piece
        return len(piece)


def read_replies(*pieces: bytes) -> list[typing.Any]:
    """Return the replies in these pieces, up to the end of the connection."""
    file = io.BufferedReader(Pieces(pieces), max(map(len, pieces), default=1))
    replies = []
    with contextlib.suppress(ConnectionError):
        while True:
            try:
                replies.append(pywebsock.parse_reply(file))
            except pywebsock.RedisError as error:
                if str(error) == pywebsock.NOT_REDIS:
                    raise
                replies.append(("error", str(error)))
    return replies


EXAMPLES: list[tuple[bytes, typing.Any]] = [  # of the RESP specification, version 2
    (b"+OK\r\n", b"OK"),
    (b"-Error message\r\n", ("error", "Error message")),
    (b"-ERR unknown command 'asdf'\r\n", ("error", "ERR unknown command 'asdf'")),
    (
        b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
        ("error", "WRONGTYPE Operation against a key holding the wrong kind of value"),
    ),
    (b":0\r\n", 0),
    (b":1000\r\n", 1000),
    (b":+7\r\n", 7),
    (b":-9223372036854775808\r\n", -(2**63)),
    (b"$5\r\nhello\r\n", b"hello"),
    (b"$0\r\n\r\n", b""),
    (b"$-1\r\n", None),
    (b"$4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
    (b"*0\r\n", []),
    (b"*2\r\n$5\r\nhello\r\n$5\r\nworld\r\n", [b"hello", b"world"]),
    (b"*3\r\n:1\r\n:2\r\n:3\r\n", [1, 2, 3]),
    (b"*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n$5\r\nhello\r\n", [1, 2, 3, 4, b"hello"]),
    (b"*-1\r\n", None),
    (b"*2\r\n*3\r\n:1\r\n:2\r\n:3\r\n*2\r\n+Hello\r\n+World\r\n", [[1, 2, 3], [b"Hello", b"World"]]),
    (b"*3\r\n$5\r\nhello\r\n$-1\r\n$5\r\nworld\r\n", [b"hello", None, b"world"]),
]


class CommandTest(unittest.TestCase):
    def test_an_array_of_bulk_strings(self) -> None:
        self.assertEqual(pywebsock.serialize_command("LLEN", "mylist"), b"*2\r\n$4\r\nLLEN\r\n$6\r\nmylist\r\n")

    def test_text_bytes_and_numbers(self) -> None:
        self.assertEqual(
            pywebsock.serialize_command("é", b"\r\n\xff", -12, ""),
            b"*4\r\n$2\r\n\xc3\xa9\r\n$3\r\n\r\n\xff\r\n$3\r\n-12\r\n$0\r\n\r\n",
        )

    def test_a_word_that_was_no_utf8_on_the_command_line(self) -> None:
        self.assertEqual(pywebsock.serialize_command("a\udcff"), b"*1\r\n$2\r\na\xff\r\n")


class ReplyTest(unittest.TestCase):
    def test_examples(self) -> None:
        for data, reply in EXAMPLES:
            self.assertEqual(read_replies(data), [reply], data)

    def test_cut_at_every_byte(self) -> None:
        whole = b"".join([data for data, _ in EXAMPLES])
        replies = [reply for _, reply in EXAMPLES]
        for cut in range(1, len(whole)):
            self.assertEqual(read_replies(whole[:cut], whole[cut:]), replies, cut)
        self.assertEqual(read_replies(*[whole[i : i + 1] for i in range(len(whole))]), replies)

    def test_the_connection_ends_at_every_byte(self) -> None:
        for data, _ in EXAMPLES:
            for end in range(len(data)):
                with self.assertRaises(ConnectionError):
                    pywebsock.parse_reply(io.BufferedReader(Pieces([data[:end]])))

    def test_garbage(self) -> None:
        for data in (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"\x15\x03\x01\x00\x02\x02F",  # TLS
            b"220 smtp.example.com ESMTP\r\n",
            b"\r\n",
            b"\0" * 100,
            b"$five\r\nhello\r\n",
            b"$\r\n",
            b"$ 5\r\nhello\r\n",
            b"$5\r\nhello world\r\n",
            b"$5\r\nhello\n\r",
            b":\r\n",
            b":1.5\r\n",
            b":\xd9\xa1\r\n",
            b"*1\r\nx\r\n",
            b"+" + b"x" * 100_000,
            b"$" + b"1" * 100_000,
            b"$9999999999999999999\r\n",
            b"*9999999999999999999\r\n",
            b"$" + b"9" * 5000 + b"\r\n",
        ):
            with self.subTest(data[:30]), self.assertRaisesRegex(pywebsock.RedisError, "is not Redis"):
                read_replies(data)

    def test_any_change_of_a_byte(self) -> None:
        """Any change gives only replies, RedisError or the end."""
        data = EXAMPLES[-2][0]
        for position in range(len(data)):
            for byte in range(256):
                changed = data[:position] + bytes([byte]) + data[position + 1 :]
                with contextlib.suppress(pywebsock.RedisError):
                    read_replies(changed)

    def test_a_line_without_an_end_takes_no_memory(self) -> None:
        pieces = iter([b"+" + b"x" * 1000] * 1_000_000)
        with self.assertRaises(pywebsock.RedisError):
            pywebsock.parse_reply(io.BufferedReader(Pieces(pieces)))
        self.assertGreater(sum(1 for _ in pieces), 999_900)


class UrlTest(unittest.TestCase):
    def test_good_ones(self) -> None:
        for url, *expected in (
            ("redis://", False, "localhost", 6379, (), 0, "pywebsock"),
            ("redis://example.com", False, "example.com", 6379, (), 0, "pywebsock"),
            ("rediss://example.com:6380/", True, "example.com", 6380, (), 0, "pywebsock"),
            ("redis://[::1]:7/15", False, "::1", 7, (), 15, "pywebsock"),
            ("redis://:secret@h", False, "h", 6379, ("AUTH", "default", "secret"), 0, "pywebsock"),
            ("redis://user:p%40ss%2F%3F%23@h", False, "h", 6379, ("AUTH", "user", "p@ss/?#"), 0, "pywebsock"),
            ("redis://user@h", False, "h", 6379, ("AUTH", "user", ""), 0, "pywebsock"),
            ("redis://h/3?stream=a%20room", False, "h", 6379, (), 3, "a room"),
            ("redis://h?stream=x", False, "h", 6379, (), 0, "x"),
        ):
            each = pywebsock.RedisAddress(url)
            parts = [each.has_tls, each.host, each.port, each.login, each.database, each.stream]
            self.assertEqual(parts, expected, url)

    BAD = (
        "",
        "localhost:6379",
        "http://localhost",
        "unix:///run/redis.sock",
        "redis://h:port",
        "redis://h:65536",
        "redis://h/zero",
        "redis://h/-1",
        "redis://h/1/2",
        "redis://h/\u0661",
        "redis://h?room=x",
        "redis://h?stream",
        "redis://user:12#3@h",  # would connect to a host named user
        "redis://[::1",
    )

    def test_bad_ones(self) -> None:
        for url in self.BAD:
            with self.subTest(url), self.assertRaises(ValueError):
                pywebsock.RedisAddress(url)

    def test_a_bad_one_on_the_command_line(self) -> None:
        for url, why in (
            ("", "a Redis URL is redis://"),  # such as "$REDIS" without a value
            ("http://localhost", "a Redis URL is redis://"),
            ("redis://h:port", "Port could not be cast"),
            ("redis://a..b", "'a..b' is not a host name"),
            ("redis://" + "a" * 64, "'a{64}' is not a host name"),
        ):
            with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as caught:
                pywebsock.main(["--redis", url])
            self.assertEqual(caught.exception.code, 2)
            self.assertRegex(said.getvalue(), f"(?s)^usage: .*\npywebsock: error: {why}")


def make_link() -> tuple[pywebsock.RedisLink, list[str]]:
    """Return a link that has not found a Redis, and a list of its warnings."""
    lines: list[str] = []
    server = FakeServer("redis://127.0.0.1", lambda messages: None, 0)
    server._hooks.log = lambda level, line, *arguments, **_: lines.append(line % arguments)  # type: ignore[method-assign]
    with unittest.mock.patch.object(pywebsock, "RedisConnection", side_effect=OSError("a test")):
        return pywebsock.RedisLink(server), lines


class EntryTest(unittest.TestCase):
    """Entries that a link reads."""

    def accept(self, *entries: tuple[bytes, bytes]) -> tuple[list[tuple[int, bytes]], list[str]]:
        """Return the messages in entries with one field each, and the warnings."""
        link, lines = make_link()
        messages = link._reader._accept([(b"%d-0" % number, field) for number, field in enumerate(entries, 1)])
        self.assertEqual(link._reader.last, b"%d-0" % len(entries))
        return messages, lines

    def test_several_fields(self) -> None:
        link, _ = make_link()
        name = b"0123456789abcdef:17:binary"
        fields = [name, b"\xff", name.replace(b"17:binary", b"18:text"), b"value", b"another", b"\xff"]
        self.assertEqual(
            link._reader._accept([(b"1-0", fields)]),
            [(pywebsock.BINARY, b"\xff"), (pywebsock.TEXT, b"value"), (pywebsock.TEXT, "\ufffd".encode())],
        )

    def test_numbers(self) -> None:
        """A number that was read before is skipped; numbers that are missing are logged."""
        one, two = b"1" * 16, b"2" * 16
        for fields, expected, missed in (
            (((one, 5), (one, 6), (one, 6), (one, 5), (one, 7)), [5, 6, 7], []),
            (((one, 5), (two, 5), (one, 5), (two, 6)), [5, 5, 6], []),
            (((one, 5), (one, 9), (one, 7), (one, 10)), [5, 9, 10], [3]),
            (((one, 1), (two, 3), (two, 5), (one, 12)), [1, 3, 5, 12], [1, 10]),
        ):
            with self.subTest(fields):
                messages, lines = self.accept(*[(b"%b:%d:text" % field, b"%d" % field[1]) for field in fields])
                self.assertEqual([int(payload) for _, payload in messages], expected)
                self.assertEqual(lines, [f"missed {number} messages that Redis no longer has" for number in missed])

    def test_wait_and_go(self) -> None:
        link, _ = make_link()
        for kind, is_held in ((b"wait", True), (b"go", False), (b"wait", True)):
            self.assertEqual(link._reader._accept([(b"1-0", [b"0123456789abcdef:0:" + kind, b""])]), [])
            self.assertEqual(link._reader.hold_until > 0, is_held)


class BatchTest(unittest.TestCase):
    """The messages that a link writes as one entry."""

    def test_batches(self) -> None:
        """About RUN_SIZE bytes, at least one message; none before the history is read, or while a server is behind."""
        for behind, size, number, expected in (
            (True, 10, 3, 0),
            (False, 10, 0, 0),
            (False, 10, 3, 3),
            (False, pywebsock.RUN_SIZE // 2 - pywebsock.LINKED_COST, 5, 2),
            (False, 2 * pywebsock.RUN_SIZE, 2, 1),
        ):
            with self.subTest(behind=behind, size=size, number=number):
                link, _ = make_link()
                self.assertTrue(link._reader.behind)
                link._reader.behind = behind
                for _ in range(number):
                    link.put(bytes(size), pywebsock.Opcode.BINARY)
                redis = unittest.mock.Mock()
                redis.call.return_value = 0
                with unittest.mock.patch.multiple(pywebsock, WAIT_TIME=0.01, BACK_TIME=0.01):
                    link._reader.last = b"1-0"
                    link._write(redis)
                entries = [call.args for call in redis.call.mock_calls if "MAXLEN" in call.args]
                names = [word for words in entries for word in words if isinstance(word, bytes) and b":binary" in word]
                expected_names = [b"%b:%d:binary" % (link._reader.name, i + 1) for i in range(expected)]
                self.assertEqual(names, expected_names)


if __name__ == "__main__":
    unittest.main()

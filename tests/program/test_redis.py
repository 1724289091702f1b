"""Many machines: servers that are one room over a stream in Redis, and what may go wrong between them.

The first half needs nothing; the second starts a redis-server of its own for each class.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.faults import paused
from tests.tools.support import (
    DEADLINE,
    EVERYTHING,
    ROOT,
    Client,
    Process,
    Recorder,
    ServerTestCase,
    eventually,
    exchange,
    free_port,
    require,
)

Message = typing.Union[str, bytes]


# ---- what needs no Redis ----


class Pieces(io.RawIOBase):
    """A connection on which bytes come in these pieces, and then its end."""

    def __init__(self, pieces: typing.Iterable[bytes]) -> None:
        self.pieces = iter(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: typing.Any) -> int:
        piece = next(self.pieces, b"")
        buffer[: len(piece)] = piece
        return len(piece)


def read_replies(*pieces: bytes) -> list[typing.Any]:
    """All replies in bytes that come in these pieces, up to the end of the connection."""
    file = io.BufferedReader(Pieces(pieces), max(map(len, pieces), default=1))
    replies = []
    with contextlib.suppress(ConnectionError):
        while True:
            replies.append(pywebsock.parse_reply(file))
    return [comparable(reply) for reply in replies]


def comparable(reply: typing.Any) -> typing.Any:
    """A reply in which errors are equal where their words are."""
    if isinstance(reply, list):
        return [comparable(item) for item in reply]
    return ("error", str(reply)) if isinstance(reply, pywebsock.RedisError) else reply


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
    (b"*2\r\n*3\r\n:1\r\n:2\r\n:3\r\n*2\r\n+Hello\r\n-World\r\n", [[1, 2, 3], [b"Hello", ("error", "World")]]),
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
            b"*1\r\n" * 100_000,
        ):
            with self.subTest(data[:30]), self.assertRaisesRegex(pywebsock.RedisError, "is not Redis"):
                read_replies(data)

    def test_any_change_of_a_byte(self) -> None:
        """Nothing but replies, RedisError or the end."""
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

    def test_entries(self) -> None:
        reply = [[b"stream", [[b"1-0", [b"name", b"value"]], [b"1-1", [b"a", b"b", b"c", b"d"]]]]]
        self.assertEqual(
            pywebsock.parse_entries(reply), [(b"1-0", b"", 0, b"text", b"value"), (b"1-1", b"", 0, b"text", b"b")]
        )
        name = b"0123456789abcdef:17:binary"
        reply = [[b"stream", [[b"1-0", [name, b"\xff"]], [b"1-1", [b"a", b"\xff"]]]]]
        self.assertEqual(
            pywebsock.parse_entries(reply),
            [(b"1-0", name[:16], 17, b"binary", b"\xff"), (b"1-1", b"", 0, b"text", "\ufffd".encode())],
        )
        self.assertEqual(pywebsock.parse_entries(None), [])
        for entry in (
            *([b"1-0", []], [b"1-0"], [b"1-0", [b"a"]], [b"1", [b"a", b"b"]], [7, [b"a", b"b"]]),
            *([b"1-0", [7, b"b"]], [b"1-0", [b"a", 7]], [b"1-0", [b"a", None]], [b"1-0", [b"a", [b"b"]]], 7),
        ):
            with self.assertRaises(pywebsock.RedisError):
                pywebsock.parse_entries([[b"stream", [entry]]])
        for wrong in (b"OK ready", 7, [1], [[b"x", 7]]):
            with self.assertRaises(pywebsock.RedisError):
                pywebsock.parse_entries(wrong)


class UrlTest(unittest.TestCase):
    def test_good_ones(self) -> None:
        for url, *expected in (
            ("redis://", False, "localhost", 6379, "", "", 0, "pywebsock"),
            ("redis://example.com", False, "example.com", 6379, "", "", 0, "pywebsock"),
            ("rediss://example.com:6380/", True, "example.com", 6380, "", "", 0, "pywebsock"),
            ("redis://[::1]:7/15", False, "::1", 7, "", "", 15, "pywebsock"),
            ("redis://:secret@h", False, "h", 6379, "", "secret", 0, "pywebsock"),
            ("redis://user:p%40ss%2F%3F%23@h", False, "h", 6379, "user", "p@ss/?#", 0, "pywebsock"),
            ("redis://user@h", False, "h", 6379, "user", "", 0, "pywebsock"),
            ("redis://h/3?stream=a%20room", False, "h", 6379, "", "", 3, "a room"),
            ("redis://h?stream=x", False, "h", 6379, "", "", 0, "x"),
        ):
            self.assertEqual(pywebsock.parse_redis_url(url), tuple(expected), url)

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
        "redis://a..b",
        "redis://" + "a" * 64,
        "redis://[::1",
    )

    def test_bad_ones(self) -> None:
        for url in self.BAD:
            with self.subTest(url), self.assertRaises(ValueError):
                pywebsock.parse_redis_url(url)

    def test_a_bad_one_on_the_command_line(self) -> None:
        for url, why in (("http://localhost", "a Redis URL is redis://"), ("redis://h:port", "Port could not be cast")):
            with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as caught:
                pywebsock.main(["--redis", url])
            self.assertEqual(caught.exception.code, 2)
            self.assertRegex(said.getvalue(), f"(?s)^usage: .*\npywebsock: error: argument --redis: {why}")


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """A server that is not expected to start: its exit status and what it said."""
    command = [sys.executable, str(ROOT / "pywebsock.py"), "--port", "0", *arguments]
    done = subprocess.run(
        command, capture_output=True, timeout=DEADLINE, env={**os.environ, **environment}, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def answering(answer: bytes | None) -> typing.Iterator[int]:
    """A TCP server that answers this, or says nothing (None): its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(DEADLINE)
    kept = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                while answer is not None and connection.recv(65536):
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(DEADLINE)
        for connection in kept:
            connection.close()


class NotRedisTest(ServerTestCase):
    def test_other_servers(self) -> None:
        for answer in (
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
            b"+OK POP3 server ready\r\n",
            b":7\r\n",
            b"*2\r\n:1\r\n:2\r\n",
            b"\xff" * 10_000,
        ):
            with self.subTest(answer[:30]), answering(answer) as port:
                self.check_refused(port, "what answers is not Redis$")

    def test_another_server_on_the_command_line(self) -> None:
        server = self.serve()
        port = server.server_address[1]
        self.assertEqual(
            run("--redis", f"redis://127.0.0.1:{port}"),
            (1, f"pywebsock: Redis at 127.0.0.1:{port}: what answers is not Redis\n"),
        )

    def test_a_silent_server(self) -> None:
        with answering(None) as port, unittest.mock.patch.object(pywebsock, "ANSWER_TIME", 0.1):
            self.check_refused(port, "no answer within 0.1 s$")

    def check_refused(self, port: int, why: str) -> None:
        """A server does not start, and says why."""
        with self.assertRaisesRegex(pywebsock.RedisError, f"^Redis at localhost:{port}: {why}"):
            self.serve(redis=f"redis://localhost:{port}")

    def test_what_it_says_is_made_harmless(self) -> None:
        with answering(b"-ERR \x1b[31m\n!\r\n") as port, self.assertRaises(pywebsock.RedisError) as caught:
            self.serve(redis=f"redis://localhost:{port}")
        self.assertTrue(str(caught.exception).isprintable(), str(caught.exception))

    def test_a_name_that_nobody_has(self) -> None:
        with self.assertRaisesRegex(pywebsock.RedisError, "^Redis at nobody.invalid:6379: "):
            self.serve(redis="redis://nobody.invalid")

    def test_nobody_there(self) -> None:
        """The server starts and waits, senders are held back in bounded memory, and it ends in time."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            server = self.serve(redis=f"redis://127.0.0.1:{free_port()}", close_timeout=0.2)
            self.connect(server)
            sent = fill(server.server_address[1], b"\x81\x80\0\0\0\0" * 100_000)  # empty messages: they count, too
            self.assertLess(sent, 5_000_000)
            assert server._link
            self.assertLess(server._link._waiting, pywebsock.QUEUE_SIZE + 100 * 1024 * 1024 // 6)
            start = time.monotonic()
            server.server_close()
            self.assertLess(time.monotonic() - start, 3)
        away = [line for line in logs.output if "Redis is away, senders wait: " in line]
        self.assertEqual(len(away), 1, logs.output)
        self.assertTrue(any(re.search("did not bring back [0-9]+ messages", line) for line in logs.output))


def fill(port: int, data: bytes, most: int = 100_000_000) -> int:
    """Send as much as a server takes: until it has taken nothing for a while. The bytes sent."""
    with Client(port) as client:
        client.socket.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError, socket.timeout):
            while sent < most:
                sent += client.socket.send(data[sent % len(data) :])
        return sent


# ---- what needs a Redis ----


class Redis:
    """A redis-server in a process of its own, on a free port, that keeps what it is told through a crash."""

    def __init__(self, *options: str) -> None:
        program = os.environ.get("REDIS_SERVER", "redis-server" if EVERYTHING else "")  # or valkey-server
        if not program:
            raise unittest.SkipTest("takes half a minute: PYWEBSOCK_TESTS=everything or REDIS_SERVER=redis-server")
        found = shutil.which(program)
        require(found, program)
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        self._command = [str(found), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", self._folder.name]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", *options]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen([*self._command, *options], stdout=subprocess.PIPE)
        self.pid = self._process.pid
        assert self._process.stdout
        said = b""
        for line in self._process.stdout:
            said += line
            if b"eady to accept connections" in line:
                self._drain = threading.Thread(target=self._process.stdout.read, daemon=True)
                self._drain.start()
                return
        self.close()
        if b"TLS support" in said and not EVERYTHING:
            raise unittest.SkipTest(f"{self._command[0]} was built without TLS")
        raise AssertionError(f"{self._command[0]} did not start: {said.decode()}")

    def kill(self) -> None:
        """End it without warning."""
        self._process.kill()
        self._process.wait(DEADLINE)
        if self._process.stdout:
            with contextlib.suppress(AttributeError):
                self._drain.join(DEADLINE)
            self._process.stdout.close()

    def forget(self) -> None:
        """Lose all that it kept, after its end."""
        self._folder.cleanup()
        os.mkdir(self._folder.name)

    def call(self, *words: str | int, database: int = 0) -> typing.Any:
        """The reply to a command."""
        connection = pywebsock.RedisConnection(pywebsock.parse_redis_url(f"{self.url}/{database}"))
        try:
            return connection.call(*words)
        finally:
            connection.socket.close()

    def close(self) -> None:
        """End it and forget all that it kept."""
        self.kill()
        self._folder.cleanup()


class Proxy:
    """Stands between a server and Redis, and cuts the connection that writes, or the one that reads.

    `cuts` has an item for each cut to come: how many bytes are passed on, of what is written
    (from 0) or, for negative numbers, of what comes for the reader (from -1); or None to pass
    it on whole and cut where the answer has come, which is not passed on.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.cuts: list[int | None] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                drop = threading.Event()  # what comes back
                for work in ((near, far, drop, self._pass_on), (far, near, drop, self._pass_back)):
                    self._threads.append(threading.Thread(target=work[3], args=work[:3], daemon=True))
                    self._threads[-1].start()

    def _pass_on(self, near: socket.socket, far: socket.socket, drop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 20):
                if b"XADD" in data and self.cuts and (self.cuts[0] is None or self.cuts[0] >= 0):
                    cut = self.cuts.pop()
                    if cut is not None:
                        far.sendall(data[:cut])
                        break
                    drop.set()
                far.sendall(data)
        self._end(near, far)

    def _pass_back(self, far: socket.socket, near: socket.socket, drop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 20):
                if drop.is_set():
                    break
                if b":text" in data and self.cuts and self.cuts[0] is not None:
                    near.sendall(data[: min(-1 - (self.cuts.pop() or 0), len(data) - 1)])
                    break
                near.sendall(data)
        self._end(near, far)

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End everything."""
        self._end(*self._sockets)
        for thread in self._threads:
            thread.join(DEADLINE)
        for each in self._sockets:
            each.close()


class RedisTestCase(ServerTestCase):
    """Tests with a Redis, which those of a class share; each test has a stream of its own."""

    redis: Redis
    options: tuple[str, ...] = ()

    @classmethod
    def setUpClass(cls) -> None:
        if not issubclass(cls, FaultTest):
            cls.redis = Redis(*cls.options)
            cls.addClassCleanup(cls.redis.close)

    def setUp(self) -> None:
        self._clients: list[Client] = []
        self.stream = self.id().rpartition(".")[2]
        self.url = f"{self.redis.url}?stream={self.stream}"

    def process(self, *arguments: str, url: str = "") -> Process:
        """A server in a process of its own, in the room of this test."""
        process = Process("--redis", url or self.url, *arguments)
        self.addCleanup(process.__exit__)
        return process

    def stop(self, server: Process) -> str:
        """End a server as a user does, after its clients have gone: its log."""
        for client in self._clients:
            client.socket.close()
        self.assertEqual(server.stop(), 0)
        return server.log()

    def client(self, server: Process | Recorder, **how: typing.Any) -> Client:
        """A client of a server wherever it is."""
        client = Client(server.port if isinstance(server, Process) else server.server_address[1], **how)
        self.addCleanup(client.__exit__)
        self._clients.append(client)
        return client

    def in_background(self, call: typing.Callable[..., object], *arguments: typing.Any) -> threading.Thread:
        """A thread that is joined at the latest at the end of the test."""
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE)
        return thread

    def assert_order(self, clients: typing.Sequence[Client], sent: typing.Sequence[typing.Sequence[Message]]) -> None:
        """Each client gets everything in one order, in which nothing is left out, doubled or before what was before."""
        count = sum(map(len, sent))
        first, *others = ([client.read() for _ in range(count)] for client in clients)
        for other in others:
            self.assertEqual(other, first)
        for messages in sent:
            mine = set(messages)
            self.assertEqual([message for message in first if message in mine], list(messages))
        self.assertEqual(len(set(first)), count)


def say(client: Client, messages: typing.Iterable[Message]) -> None:
    """Send messages one after the other."""
    for message in messages:
        client.send(message)


def numbered(who: object, count: int, start: int = 0) -> list[Message]:
    """Messages that can be told from all others."""
    return [f"{who}: {number}" for number in range(start, start + count)]


class RoomTest(RedisTestCase):
    def test_three_servers_are_one_room(self) -> None:
        servers = [self.process() for _ in range(3)]
        clients = [self.client(server) for server in servers for _ in range(2)]
        sent = [numbered(who, 300) for who in range(len(clients))]
        senders = [self.in_background(say, *pair) for pair in zip(clients, sent)]
        self.assert_order(clients, sent)
        for ended in senders:
            ended.join(DEADLINE)
        for server in servers:
            self.assertNotIn("Redis", self.stop(server))

    def test_text_and_binary(self) -> None:
        one, two = self.serve(redis=self.url), self.serve(redis=self.url)
        clients = [self.client(one), self.client(two)]
        messages: list[Message] = ["", b"", "é\0\r\n", b"\xff\r\n", "x" * 70_000, bytes(range(256)) * 8000, "last"]
        self.in_background(say, clients[0], messages)
        for client in clients:
            self.assertEqual([client.read() for _ in messages], messages)

    def test_the_library(self) -> None:
        one, two = self.serve(redis=self.url), self.serve(redis=self.url, compression=False)
        client = self.client(two)
        one.broadcast("to all")
        self.assertEqual(client.read(), "to all")
        post = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        status, _, _ = exchange(one.server_address[1], post)
        self.assertEqual((status, client.read()), (202, ""))
        one.server_close()
        one.server_close()
        self.assertFalse([thread for thread in threading.enumerate() if thread in one._link._threads])  # type: ignore[union-attr]

    def test_other_streams_are_other_rooms(self) -> None:
        ours, theirs = self.serve(redis=self.url), self.serve(redis=self.url + "2")
        one, other = self.client(ours), self.client(theirs)
        say(one, ["ours"])
        self.assertEqual(one.read(), "ours")
        say(other, ["theirs"])
        self.assertEqual(other.read(), "theirs")
        self.assertEqual((self.redis.call("XLEN", self.stream), self.redis.call("XLEN", self.stream + "2")), (1, 1))

    def test_what_others_add_is_text(self) -> None:
        client = self.client(self.serve(redis=self.url))
        for name in ("message", "a:1:text", "0123456789abcdef:" + "9" * 5000 + ":binary"):
            self.redis.call("XADD", self.stream, "*", name, "hello", "more", "fields")
            self.assertEqual(client.read(), "hello")

    def test_history(self) -> None:
        one = self.serve(redis=self.url)
        with self.client(one) as client:
            say(client, numbered("before", 20))
            self.assertEqual([client.read() for _ in range(20)], numbered("before", 20))
        fresh = self.process("--history", "5")
        client = self.client(fresh)
        self.assertEqual([client.read() for _ in range(5)], numbered("before", 5, 15))
        one.broadcast("after")
        self.assertEqual(client.read(), "after")
        newest = self.client(fresh)
        self.assertEqual([newest.read() for _ in range(5)], [*numbered("before", 4, 16), "after"])

    def test_much_history(self) -> None:
        """More than may wait in the queue: nobody is there yet to take it out."""
        one = self.serve(redis=self.url)
        with self.client(one) as client:
            self.in_background(say, client, [f"{number:1000}" for number in range(8000)])
            for _ in range(8000):
                client.read()
        fresh = self.process("--history", "9000")
        client = self.client(fresh)
        self.assertEqual([int(client.read()) for _ in range(8000)], list(range(8000)))

    def test_a_slow_client_holds_up_nobody(self) -> None:
        one, two = self.serve(redis=self.url), self.serve(redis=self.url, max_backlog=2_000_000)
        slow, quick, sender = self.client(two, small=True), self.client(two), self.client(one)
        self.in_background(say, sender, [bytes(10_000)] * 1500)
        for _ in range(1500):
            self.assertEqual((len(quick.read()), len(sender.read())), (10_000, 10_000))
        self.assertLess(len(slow.read_all()), 15_000_000)

    def test_a_flood_from_two_servers(self) -> None:
        """Faster than Redis: the writers are paced by what they read, lest it be trimmed before."""
        servers = [self.process(), self.process()]
        clients = [self.client(server) for server in servers for _ in range(2)]
        sent = [numbered(who, 10_000) for who in range(len(clients))]
        for client, messages in zip(clients, sent):
            data = b"".join([frame_of(message) for message in messages])
            self.in_background(client.send_raw, data)
        self.assert_order(clients, sent)
        for server in servers:
            self.assertNotIn("missed", server.log())

    def test_a_server_slower_than_the_others(self) -> None:
        """It asks them to wait, lest what it has not read be trimmed."""
        with unittest.mock.patch.object(pywebsock, "STREAM_LENGTH", 5000):
            servers = [self.serve(redis=self.url) for _ in range(2)]
            slow = servers[1]._link
            assert slow
            deliver = slow._deliver

            def deliver_slowly(entries: typing.Sequence[typing.Any]) -> int:
                time.sleep(len(entries) / 5000)
                return deliver(entries)

            slow._deliver = deliver_slowly  # type: ignore[method-assign]
            clients = [self.client(server) for server in servers]
            sent = [numbered("quick", 15_000), numbered("slow", 1000)]
            for client, messages in zip(clients, sent):
                self.in_background(client.send_raw, b"".join(map(frame_of, messages)))
            self.assert_order(clients, sent)
            names = [fields[0] for _, fields in self.redis.call("XRANGE", self.stream, "-", "+")]
            self.assertTrue(any(name.endswith(b":wait") for name in names))

    def client_that_waits(self) -> Client:
        """One whose message waits, since another server has asked for it."""
        server = self.serve(redis=self.url)
        client = self.client(server)
        self.redis.call("XADD", self.stream, "*", "0123456789abcdef:0:wait", "")
        eventually(lambda: server._link and server._link._others_behind)
        client.send("hello")
        eventually(lambda: server._link and server._link._outbox)
        return client

    def test_waiting_for_another_server(self) -> None:
        with unittest.mock.patch.multiple(pywebsock, WAIT_TIME=3600, LISTEN_TIME=3600):
            client = self.client_that_waits()
            self.redis.call("XADD", self.stream, "*", "0123456789abcdef:0:go", "")
            self.assertEqual(client.read(), "hello")

    def test_waiting_for_another_server_that_is_gone(self) -> None:
        with unittest.mock.patch.object(pywebsock, "WAIT_TIME", 0.1):
            self.assertEqual(self.client_that_waits().read(), "hello")


def frame_of(message: Message) -> bytes:
    """A short text message as a frame, with the key 0."""
    assert isinstance(message, str)
    return bytes([0x81, 0x80 | len(message), 0, 0, 0, 0]) + message.encode()


class StartTest(RedisTestCase):
    def setUp(self) -> None:
        super().setUp()
        self.at = f"pywebsock: Redis at 127.0.0.1:{self.redis.port}: "

    def test_a_password(self) -> None:
        self.redis.call("CONFIG", "SET", "requirepass", "s3 cr@t")
        try:
            self.check_logins()
        finally:
            with contextlib.suppress(pywebsock.RedisError):
                address = pywebsock.parse_redis_url(self.redis.url)._replace(password="s3 cr@t")
                connection = pywebsock.RedisConnection(address)
                connection.call("CONFIG", "SET", "requirepass", "")
                connection.socket.close()

    def check_logins(self) -> None:
        host = f"127.0.0.1:{self.redis.port}"
        right = f"redis://:s3%20cr%40t@{host}?stream={self.stream}"
        self.check_room(right, right.replace("//:", "//default:"))
        status, said = run("--redis", f"redis://:wrong@{host}")
        self.assertEqual((status, said.count("\n")), (1, 1), said)
        self.assertRegex(said, f"^{self.at}WRONGPASS ")
        status, said = run("--redis", f"redis://{host}")
        self.assertEqual((status, said.count("\n")), (1, 1), said)
        self.assertRegex(said, f"^{self.at}NOAUTH ")

    def test_a_user_who_may_no_more_than_needed(self) -> None:
        rights = ["+xadd", "+xread", "+xrevrange", "+xlen", "+xtrim"]
        self.redis.call("ACL", "SETUSER", "room", "on", ">pass", f"~{self.stream}", *rights)
        url = f"redis://room:pass@127.0.0.1:{self.redis.port}?stream="
        self.check_room(url + self.stream, url + self.stream)
        status, said = run("--redis", url + "another")
        self.assertEqual((status, said.count("\n")), (1, 1), said)
        self.assertRegex(said, f"^{self.at}NOPERM ")

    def test_a_user_without_a_password(self) -> None:
        self.redis.call("ACL", "SETUSER", "guest", "on", "nopass", "~*", "+@all")
        url = f"redis://guest@127.0.0.1:{self.redis.port}?stream={self.stream}"
        self.check_room(url, url)

    def test_a_database(self) -> None:
        url = f"{self.redis.url}/3?stream={self.stream}"
        self.check_room(url, url)
        self.assertEqual(self.redis.call("XLEN", self.stream), 0)
        self.assertEqual(self.redis.call("XLEN", self.stream, database=3), 1)
        status, said = run("--redis", f"{self.redis.url}/999")
        self.assertEqual((status, said), (1, f"{self.at}ERR DB index is out of range\n"))

    def check_room(self, *urls: str) -> None:
        """Two servers are one room."""
        one, two = (self.client(self.serve(redis=url)) for url in urls)
        say(one, ["hello"])
        self.assertEqual((one.read(), two.read()), ("hello", "hello"))

    def test_the_wrong_type_of_key(self) -> None:
        self.redis.call("SET", self.stream, "a string")
        status, said = run("--redis", self.url)
        self.assertEqual((status, said.count("\n")), (1, 1), said)
        self.assertRegex(said, f"^{self.at}WRONGTYPE ")

    def test_it_becomes_the_wrong_type_of_key(self) -> None:
        """Later than the start it is an error to wait for the end of."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            client = self.client(self.serve(redis=self.url))
            self.redis.call("SET", self.stream, "a string")
            say(client, ["hello"])
            eventually(lambda: "Redis is away, senders wait: WRONGTYPE" in str(logs.output))
            self.redis.call("DEL", self.stream)
            self.assertEqual(client.read(), "hello")
            eventually(lambda: "Redis is back" in str(logs.output))
        self.assertEqual(len(logs.output), 2, logs.output)


class SpeedTest(RedisTestCase):
    """Figures, printed, as they depend on the machine."""

    options = ("--appendonly", "no")

    def test_one_message(self) -> None:
        one, two = self.client(self.process()), self.client(self.process())
        times = []
        for number in range(300):
            start = time.perf_counter()
            one.send(str(number))
            self.assertEqual(two.read(), str(number))
            times.append(time.perf_counter() - start)
        middle, most = statistics.median(times) * 1000, sorted(times)[-3] * 1000
        print(f"\n[one message through Redis: median {middle:.2f} ms, 99 % {most:.2f} ms]", end=" ", file=sys.stderr)
        self.assertLess(middle, 200)

    def test_many_messages(self) -> None:
        alone = Process()
        self.addCleanup(alone.__exit__)
        one = self.deliveries_per_second([alone] * 2)
        two = self.deliveries_per_second([self.process(), self.process()])
        figures = f"{one:,.0f} deliveries/s by one server, {two:,.0f} by two through Redis: {two / one:.2f}"
        print(f"\n[2 x 50 clients, all sending: {figures}]", end=" ", file=sys.stderr)
        self.assertGreater(two, one / 50)

    def deliveries_per_second(self, servers: typing.Sequence[Process]) -> float:
        """Of 50 clients of each, which all send 10 messages, read what all have sent, and again."""
        clients = [self.client(server) for server in servers for _ in range(50)]
        data = frame_of("x" * 64) * 10
        start = time.perf_counter()
        for _ in range(10):
            for client in clients:
                client.send_raw(data)
            for client in clients:
                left = len(clients) * 10 * 66
                while left:
                    received = len(client.socket.recv(left))
                    self.assertTrue(received)
                    left -= received
        return len(clients) ** 2 * 100 / (time.perf_counter() - start)


class CertificateTest(RedisTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        require(shutil.which("openssl"), "openssl")
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        for name in ("ours", "theirs"):
            cls.make_certificate(name)
        cls.tls_port = free_port()
        files = ["--tls-cert-file", str(cls.folder / "ours.pem"), "--tls-key-file", str(cls.folder / "ours.key")]
        files += ["--tls-ca-cert-file", str(cls.folder / "ours.pem")]
        cls.options = ("--tls-port", str(cls.tls_port), *files, "--tls-auth-clients", "no")
        super().setUpClass()

    folder: pathlib.Path
    tls_port: int

    @classmethod
    def make_certificate(cls, name: str) -> None:
        """A certificate for localhost that nobody else has signed."""
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(cls.folder / f"{name}.key")]
        subprocess.run([*command, "-out", str(cls.folder / f"{name}.pem")], check=True, capture_output=True)

    def setUp(self) -> None:
        super().setUp()
        self.url = f"rediss://localhost:{self.tls_port}?stream={self.stream}"

    def trust(self, name: str) -> contextlib.AbstractContextManager[object]:
        """Trust this certificate."""
        return unittest.mock.patch.dict(os.environ, SSL_CERT_FILE=str(self.folder / f"{name}.pem"))

    def test_a_trusted_one(self) -> None:
        with self.trust("ours"):
            servers = [self.process(), self.process()]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 200) for who in range(2)]
        for pair in zip(clients, sent):
            self.in_background(say, *pair)
        self.assert_order(clients, sent)
        say(clients[0], [bytes(3_000_000)])
        self.assertEqual(clients[1].read(), bytes(3_000_000))
        for server in servers:
            start = time.monotonic()
            self.assertNotIn("rror", self.stop(server))
            self.assertLess(time.monotonic() - start, 3)

    def test_wrong_ones(self) -> None:
        for url in (self.url, self.url.replace("localhost", "127.0.0.1")):
            name = "theirs" if url == self.url else "ours"  # an issuer that is not trusted, another host
            status, said = run("--redis", url, SSL_CERT_FILE=str(self.folder / f"{name}.pem"))
            self.assertEqual((status, said.count("\n")), (1, 1), said)
            self.assertRegex(said, "^pywebsock: Redis at .*certificate verify failed")


class FaultTest(RedisTestCase):
    """Nothing lost, nothing twice."""

    def setUp(self) -> None:
        self.redis = Redis()  # each test's own, as it comes to harm
        self.addCleanup(self.redis.close)
        super().setUp()

    def test_redis_is_not_there_yet(self) -> None:
        self.redis.kill()
        servers = [self.process("--quiet") for _ in range(2)]
        one, two = map(self.client, servers)
        say(one, ["early"])
        for server in servers:
            eventually(lambda server=server: "Redis is away, senders wait: " in server.log())  # type: ignore[misc]
        self.redis.start()
        self.assertEqual(one.read(), "early")  # its own server writes after it has found its place
        for server in servers:
            eventually(lambda server=server: "Redis is back" in server.log())  # type: ignore[misc]
        sent = [numbered("one", 20)]
        say(one, sent[0])
        self.assertEqual([one.read() for _ in range(20)], sent[0])
        heard = two.read()  # "early" only where its server was there first
        self.assertIn(heard, ("early", "one: 0"))
        for server in servers:
            self.assertEqual(quiet_lines(self.stop(server)), ["away", "back"])

    def test_redis_is_restarted(self) -> None:
        """Three times, in the middle of things, once by kill -9 and once in peace."""
        servers = [self.process("--quiet"), self.process("--quiet")]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 3000) for who in range(2)]
        for pair in zip(clients, sent):
            self.in_background(trickle, *pair)
        for number in range(3):
            length = self.redis.call("XLEN", self.stream)
            eventually(lambda length=length: self.redis.call("XLEN", self.stream) > length + 200)  # type: ignore[misc]
            if number:
                self.redis.kill()
            else:
                with contextlib.suppress(ConnectionError):
                    self.redis.call("SHUTDOWN")
                self.redis.kill()
            for server in servers:
                eventually(lambda: server.log().count("is away") == number + 1, server.log())  # noqa: B023
            self.redis.start()
            for server in servers:
                eventually(lambda: server.log().count("is back") == number + 1, server.log())  # noqa: B023
        self.assert_order(clients, sent)
        for server in servers:
            self.assertEqual(quiet_lines(self.stop(server)), ["away", "back"] * 3)

    def test_idle_servers_notice_once(self) -> None:
        """A writer finds out only when it has something to write; that is no second absence."""
        server = self.process("--quiet")
        client = self.client(server)
        say(client, ["before"])
        self.assertEqual(client.read(), "before")
        self.redis.kill()
        eventually(lambda: "is away" in server.log())
        self.redis.start()
        eventually(lambda: "is back" in server.log())
        say(client, ["after"])
        self.assertEqual(client.read(), "after")
        self.assertEqual(quiet_lines(self.stop(server)), ["away", "back"])

    def test_the_connection_is_cut(self) -> None:
        """At places all over a transaction or the stream, or before the answer: it is tried again, unnoticed."""
        proxy = Proxy(self.redis.port)
        self.addCleanup(proxy.close)
        with self.assertLogs("pywebsock", "WARNING") as logs:
            near = self.serve(redis=f"redis://127.0.0.1:{proxy.port}?stream={self.stream}")
            clients = [self.client(near), self.client(self.serve(redis=self.url))]
            count = 0
            for cut in [None, *range(0, 420, 13), None, *range(-1, -200, -9)]:
                proxy.cuts = [cut]
                messages = numbered("cut", 3, count)
                count += 3
                clients[0].send_raw(b"".join(map(frame_of, messages)))
                for client in clients:
                    self.assertEqual([client.read() for _ in messages], messages, cut)
                self.assertEqual(proxy.cuts, [])
                eventually(lambda: near._link and not near._link._outbox)  # it has recovered from this one
            pywebsock.log.warning("the end")
        self.assertEqual(len(logs.output), 1)
        self.assertGreaterEqual(self.redis.call("XLEN", self.stream), count + 6)  # some are there twice

    def test_a_server_is_killed(self) -> None:
        servers = [self.process(), self.process(), self.process()]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 1000) for who in range(3)]
        senders = [self.in_background(trickle, *pair) for pair in zip(clients[:2], sent)]

        def until_it_is_dead() -> None:
            with contextlib.suppress(OSError):
                trickle(clients[2], sent[2])

        self.in_background(until_it_is_dead)
        for _ in range(300):
            clients[2].read()
        servers[2].send_signal(signal.SIGKILL)
        servers[2].wait()
        for client, sender in zip(clients, senders):
            sender.join(DEADLINE)
            say(client, [f"end of {clients.index(client)}"])
        heard = [read_until(client, {"end of 0", "end of 1"}) for client in clients[:2]]
        self.assertEqual(heard[0], heard[1])
        for messages in sent[:2]:
            self.assertEqual([message for message in heard[0] if message in set(messages)], messages)
        theirs = [message for message in heard[0] if message in set(sent[2])]
        self.assertEqual(theirs, sent[2][: len(theirs)])

    def test_a_server_is_paused(self) -> None:
        servers = [self.process(), self.process(), self.process()]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 1000) for who in range(3)]
        senders = [self.in_background(trickle, *pair) for pair in zip(clients, sent)]
        for _ in range(2):
            length = self.redis.call("XLEN", self.stream)
            with paused(servers[2].pid):
                eventually(lambda length=length: self.redis.call("XLEN", self.stream) > length + 200)  # type: ignore[misc]
        self.assert_order(clients, sent)
        for sender in senders:
            sender.join(DEADLINE)

    def test_redis_is_paused(self) -> None:
        servers = [self.process(), self.process()]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 600) for who in range(2)]
        with paused(self.redis.pid):
            for pair in zip(clients, sent):
                say(*pair)
        self.assert_order(clients, sent)
        for server in servers:
            self.assertNotIn("Redis", self.stop(server))

    def test_redis_hangs(self) -> None:
        """No answer in time is like a lost connection; what was on its way arrives twice."""
        with unittest.mock.patch.multiple(pywebsock, ANSWER_TIME=0.3, LISTEN_TIME=0.1):
            with self.assertLogs("pywebsock", "WARNING") as logs:
                one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
                say(one, ["before"])
                self.assertEqual((one.read(), two.read()), ("before", "before"))
                with paused(self.redis.pid):
                    say(one, numbered("one", 50))
                    say(two, numbered("two", 50))
                    eventually(lambda: str(logs.output).count("no answer within 0.3 s") == 2)
                self.assert_order([one, two], [numbered("one", 50), numbered("two", 50)])
                eventually(lambda: str(logs.output).count("Redis is back") == 2)
            self.assertEqual(len(logs.output), 4)
        self.assertGreater(self.redis.call("XLEN", self.stream), 101)

    def test_the_stream_is_trimmed(self) -> None:
        servers = [self.process("--quiet"), self.process("--quiet")]
        near, far = map(self.client, servers)
        say(near, ["first"])
        self.assertEqual((near.read(), far.read()), ("first", "first"))
        eventually(lambda: b"\r\nblocked_clients:2\r\n" in self.redis.call("INFO", "clients"))
        with paused(servers[1].pid):
            say(near, ["second"])  # which both have asked for
            self.assertEqual(near.read(), "second")
            near.send_raw(b"".join(map(frame_of, numbered("m", 100))))
            self.assertEqual([near.read() for _ in range(100)], numbered("m", 100))
            self.redis.call("XTRIM", self.stream, "MAXLEN", 30)
        self.assertEqual([far.read() for _ in range(31)], ["second", *numbered("m", 30, 70)])
        eventually(lambda: "missed 70 messages" in servers[1].log(), servers[1].log())
        self.assertEqual(servers[0].log(), "")

    def test_redis_forgets_everything(self) -> None:
        with self.assertLogs("pywebsock", "WARNING") as logs:
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            say(one, ["before"])
            self.assertEqual((one.read(), two.read()), ("before", "before"))
            self.redis.kill()
            eventually(lambda: str(logs.output).count("is away") == 2)
            self.redis.forget()
            self.redis.start()
            say(one, ["after"])
            self.assertEqual((one.read(), two.read()), ("after", "after"))

    def test_the_clock_of_redis_went_back(self) -> None:
        """New entries have smaller ids than those that were lost."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            self.redis.call("XADD", self.stream, f"{2**62}-0", "x", "from the future")
            self.assertEqual((one.read(), two.read()), ("from the future",) * 2)
            self.redis.call("DEL", self.stream)
            self.redis.kill()
            eventually(lambda: str(logs.output).count("is away") == 2)
            self.redis.start()
            eventually(lambda: str(logs.output).count("Redis has lost the end of the stream") == 2)
            say(one, ["after"])
            self.assertEqual((one.read(), two.read()), ("after", "after"))

    def test_senders_are_held_back(self) -> None:
        """While Redis is away memory stays bounded, and nothing is lost afterwards."""
        server = self.process("--quiet", "--max-backlog", "100M")
        sender, listener = self.client(server), self.client(server)
        self.redis.kill()
        eventually(lambda: "is away" in server.log())
        before = memory(server.pid)
        payload, count, sent = bytes(20_000), 2000, [0]

        def send() -> None:
            for number in range(count):
                sender.socket.settimeout(None)
                sender.send(number.to_bytes(4, "big") + payload)
                sent[0] = number + 1

        self.in_background(send)
        steady(lambda: sent[0])
        self.assertLess(sent[0], count)
        self.assertLess(memory(server.pid) - before, 40_000_000)
        self.redis.start()
        for number in range(count):
            message = listener.read()
            assert isinstance(message, bytes)
            self.assertEqual(int.from_bytes(message[:4], "big"), number)
        self.assertEqual(sent[0], count)

    def test_sigterm_delivers_what_is_queued(self) -> None:
        servers = [self.process(), self.process()]
        clients = [self.client(server) for server in servers]
        clients[0].send_raw(b"".join(map(frame_of, numbered("m", 2000))))
        self.assertEqual(clients[0].read(), "m: 0")  # all of them came in one or two pieces
        status, _, body = exchange(servers[0].port, b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.assertEqual(status, 200, body)
        servers[0].send_signal(signal.SIGTERM)
        heard = read_until_close(clients[0])
        self.assertEqual(servers[0].wait(), 0)
        self.assertEqual(heard, numbered("m", len(heard), 1))
        self.assertEqual([clients[1].read() for _ in range(len(heard) + 1)], numbered("m", len(heard) + 1))

    def test_sigterm_while_redis_is_away(self) -> None:
        server = self.process("--quiet")
        client = self.client(server)
        self.redis.kill()
        eventually(lambda: "is away" in server.log())
        say(client, numbered("m", 7))
        client.frame(9, b"all read")
        self.assertEqual(client.read_frame().payload, b"all read")
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        self.assertEqual(read_until_close(client), [])
        self.assertEqual(server.wait(), 0)
        self.assertLess(time.monotonic() - start, 5)
        self.assertIn("did not bring back 7 messages", server.log())


def quiet_lines(log: str) -> list[str]:
    """What a server has logged, of which "Redis is away" and "Redis is back" as a word."""
    return [re.sub(".* Redis is (away|back).*", r"\1", line) for line in log.splitlines()]


def trickle(client: Client, messages: typing.Sequence[Message]) -> None:
    """Send messages over a second or so, that faults may fall in between."""
    for number, message in enumerate(messages):
        client.send(message)
        if number % 10 == 0:
            time.sleep(0.01)


def read_until(client: Client, last: set[str]) -> list[Message]:
    """What comes up to the last of these."""
    heard: list[Message] = []
    while last:
        heard.append(client.read())
        last = last - {heard[-1]}
    return heard


def read_until_close(client: Client) -> list[Message]:
    """What comes before the Close frame, which is answered."""
    heard: list[Message] = []
    while (frame := client.read_frame()).opcode != 8:
        heard.append(frame.payload.decode())
    client.close()
    client.socket.close()
    return heard


def steady(figure: typing.Callable[[], float]) -> None:
    """Wait until a figure has not changed for half a second."""
    last, since = figure(), time.monotonic()
    end = since + DEADLINE
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        now = figure()
        if now != last:
            last, since = now, time.monotonic()
        assert time.monotonic() < end, f"it still changes: {last}"


def memory(pid: int) -> int:
    """Bytes that a process holds (Linux)."""
    status = pathlib.Path(f"/proc/{pid}/status")
    require(status.exists(), "/proc")
    match = re.search(r"VmRSS:\s+([0-9]+) kB", status.read_text())
    assert match
    return int(match[1]) * 1024


if __name__ == "__main__":
    unittest.main()

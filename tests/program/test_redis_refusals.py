"""Messages that Redis refuses, limits of the stream, and the server while Redis is away."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import socket
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.faults import paused
from tests.tools.redis import Redis, RedisTestCase, fill, frame_of, memory, numbered, read_until, say
from tests.tools.support import DEADLINE, Client, compress, eventually, exchange, free_port, in_thread, require


class RefusalTest(RedisTestCase):
    """A message that Redis refuses is lost, and no other."""

    shared = False

    def setUp(self) -> None:
        self.redis = Redis("--appendonly", "no")
        self.addCleanup(self.redis.close)
        super().setUp()

    def test_out_of_memory(self) -> None:
        """If the stream fills Redis, it is trimmed, and the room goes on."""
        used = int(re.findall(rb"\r\nused_memory:([0-9]+)", self.redis.call("INFO", "memory"))[0])
        self.redis.call("CONFIG", "SET", "maxmemory", used + 30_000_000)
        servers = [self.process("--quiet", "--max-backlog", "1G") for _ in range(2)]
        one, two = (self.client(server, Sec_WebSocket_Extensions="permessage-deflate") for server in servers)
        payload = compress(bytes(5_000_000))
        for _ in range(10):
            one.frame(2, payload, rsv=4)
        say(one, ["after"])
        for client in (one, two):
            while len(heard := client.read()) == 5_000_000:
                pass
            self.assertEqual(heard, "after")
        self.assertIn("Redis refuses a message, which is lost: OOM", servers[0].log())
        say(two, ["to the end"])
        self.assertEqual(one.read(), "to the end")
        for _ in range(5):  # there is room for some of them
            one.frame(2, payload, rsv=4)
        say(one, ["again"])
        self.assertEqual(two.read(), "to the end")
        self.assertEqual(two.read(), bytes(5_000_000))

    def test_out_of_memory_by_others(self) -> None:
        """If other data fills Redis, messages are lost until it is freed, a few a second, with a line for each."""
        server = self.process("--quiet")
        client = self.client(server)
        self.redis.call("CONFIG", "SET", "maxmemory", 1)
        say(client, numbered("lost", 100))
        eventually(lambda: server.log().count("Redis refuses a message, which is lost: OOM") > 4)
        self.assertIn("Redis is away, senders wait: OOM", server.log())
        self.redis.call("CONFIG", "SET", "maxmemory", 0)
        client.send("heard")
        heard = read_until(client, {"heard"})
        eventually(lambda: "Redis is back" in server.log())
        self.assertEqual(len(heard) + server.log().count("which is lost"), 101)

    def test_too_big(self) -> None:
        """Redis answers a message that is too big, and ends the connection; others with it are written once."""
        self.redis.call("CONFIG", "SET", "proto-max-bulk-len", 1_048_576)
        servers = [self.process("--quiet"), self.process("--quiet")]
        one, two = map(self.client, servers)
        one.send_raw(b"".join(map(frame_of, numbered("before", 20))))
        one.send("x" * 1_048_577)
        one.send_raw(b"".join(map(frame_of, numbered("after", 20))))
        for client in (one, two):
            self.assertEqual([client.read() for _ in range(40)], [*numbered("before", 20), *numbered("after", 20)])
        eventually(lambda: "Redis refuses a message, which is lost: ERR" in servers[0].log())
        self.assertEqual((servers[0].log().count("\n"), servers[1].log()), (1, ""))
        names = self.names()
        self.assertEqual((len(names), len(set(names))), (40, 40), names)  # none twice

    def test_a_state_of_redis_is_waited_for(self) -> None:
        """Redis may accept no commands for a while; messages of that time come later, in order."""
        for refuse, accept, why in (
            (("REPLICAOF", "127.0.0.1", free_port()), ("REPLICAOF", "NO", "ONE"), "READONLY"),
            (
                ("CONFIG", "SET", "min-replicas-to-write", 1),
                ("CONFIG", "SET", "min-replicas-to-write", 0),
                "NOREPLICAS",
            ),
        ):
            with self.subTest(why):
                server = self.process("--quiet")
                client = self.client(server)
                self.redis.call(*refuse)
                say(client, numbered(why, 300))
                eventually(lambda: f"is away, senders wait: {why}" in server.log(), server.log())  # noqa: B023
                self.redis.call(*accept)
                self.assertEqual([client.read() for _ in range(300)], numbered(why, 300))
                eventually(lambda: "is back" in server.log())  # noqa: B023
                self.assertEqual(server.log().count("\n"), 2, server.log())

    def test_refused_in_the_middle(self) -> None:
        """With any replies, no message is out of order or doubled."""
        for answers, lost in (
            (["OOM no"], [1]),  # the longest one
            (["ERR no", "OOM no"], [1, 2]),
            (["OOM no", "READONLY no", "OOM no"], [1, 2]),
            (["READONLY no", "ERR no"], [1]),
            (["READONLY no", "READONLY no"], []),
            (["OOM no"] * 3, [0, 1, 2]),
        ):
            with self.subTest(answers):
                self.check_answers(answers, lost)

    def check_answers(self, answers: typing.Sequence[str], lost: typing.Sequence[int]) -> None:
        """Write three messages at once, and then the rest again, with these replies of Redis."""
        server = self.serve(redis=self.url)
        client, link = self.client(server), server._link
        assert link
        left = list(answers)
        messages = [f"{answers} {text}" for text in ("short", "the longest", "the third")]
        call = pywebsock.RedisConnection.call

        def refusing(self: pywebsock.RedisConnection, *words: typing.Any) -> typing.Any:
            answer = left.pop(0) if left and words[0] == "XADD" and "MAXLEN" in words else ""
            if answer:
                raise pywebsock.RedisError(answer)
            return call(self, *words)

        with link.changed, unittest.mock.patch.object(pywebsock.RedisConnection, "call", refusing):
            for message in messages:
                link.put(message.encode(), pywebsock.Opcode.TEXT)
            link.changed.wait_for(lambda: not link._outbox, DEADLINE)
        self.assertEqual(left, [])
        client.send("end")
        self.assertEqual(read_until(client, {"end"}), [*(m for i, m in enumerate(messages) if i not in lost), "end"])


class BoundsTest(RedisTestCase):
    """The limits of the stream."""

    options = ("--appendonly", "no")

    def test_bytes_in_the_stream(self) -> None:
        """400 KB that inflate to 400 MB, of which Redis keeps no more than the limit."""
        server = self.process("--quiet", "--ping", "0")
        client = self.client(server)
        for message in numbered("small", 300):  # large messages replace them
            client.send(message)
            self.assertEqual(client.read(), message)
        sender = self.client(server, Sec_WebSocket_Extensions="permessage-deflate")
        size, number = 16 * 1024 * 1024, 24
        payload = compress(bytes(size))
        with in_thread(lambda: [sender.read_frame() for _ in range(number)]):
            for _ in range(number):
                sender.frame(2, payload, rsv=4)
                receive(client, size + 10)
        used = int(re.findall(rb"\r\nused_memory_peak:([0-9]+)", self.redis.call("INFO", "memory"))[0])
        self.assertLess(used, 2 * pywebsock.STREAM_SIZE)
        self.assertLess(self.redis.call("XLEN", self.stream), 24)  # nearly all small ones are trimmed
        for message in numbered("small", 500):  # one entry each
            client.send(message)
            self.assertEqual(client.read(), message)
        self.assertGreaterEqual(self.redis.call("XLEN", self.stream), 500)

    def test_history_is_bounded_in_bytes(self) -> None:
        """The history is read from the end, in small pieces, up to half of max_backlog."""
        for number in range(200):
            self.redis.call("XADD", self.stream, "*", "text", f"{number:4}" + "x" * 1_000_000)
        server = self.process("--history", "1000", "--max-backlog", "8M")
        self.assertLess(memory(server.pid), 120_000_000)
        client = self.client(server)
        self.assertEqual([int(client.read()[:4]) for _ in range(4)], [196, 197, 198, 199])

    def test_history_is_read_in_few_steps(self) -> None:
        """Redis may be milliseconds away."""
        for number in range(100):
            self.redis.call("XADD", self.stream, "*", "text", str(number))
        call = pywebsock.RedisConnection.call
        words: list[str | bytes | int] = []

        def noting(self: pywebsock.RedisConnection, *each: str | bytes | int) -> object:
            words.extend(each[:1])
            return call(self, *each)

        with unittest.mock.patch.object(pywebsock.RedisConnection, "call", noting):
            client = self.client(self.serve(redis=self.url, history=90))
        self.assertEqual([client.read() for _ in range(90)], [str(number) for number in range(10, 100)])
        self.assertLess(words.count("XREVRANGE"), 20)

    def test_history_with_other_entries(self) -> None:
        for number in range(50):
            self.redis.call("XADD", self.stream, "*", "text", str(number))
            self.redis.call("XADD", self.stream, "*", "0123456789abcdef:0:wait", "")
        client = self.client(self.serve(redis=self.url, history=20))
        self.assertEqual([client.read() for _ in range(20)], [str(number) for number in range(30, 50)])


def receive(client: Client, size: int) -> None:
    """Return a reply with this number of bytes."""
    while size > 0:
        size -= len(client.socket.recv(min(size, 1 << 20)))


class DeletedTest(RedisTestCase):
    """Streams that are deleted or replaced."""

    def test_an_idle_one(self) -> None:
        with self.assertLogs("pywebsock", "WARNING") as logs:
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            for number in range(3):
                say(one, [f"before {number}"])
                self.assertEqual((one.read(), two.read()), (f"before {number}",) * 2)
                self.redis.call("DEL", self.stream)
            say(one, ["after"])
            self.assertEqual((one.read(), two.read()), ("after", "after"))
            pywebsock.log.warning("the end")
        self.assertNotRegex(str(logs.output), "missed|away")

    def test_one_in_use(self) -> None:
        """The stream is deleted again and again under load: the sender's server has all messages, others go on."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            messages = numbered("one", 200)
            for number, message in enumerate(messages):
                say(one, [message])
                if number % 20 == 0:
                    self.redis.call("DEL", self.stream)
            self.assertEqual([one.read() for _ in messages], messages)
            say(one, ["end"])
            heard = read_until(two, {"end"})[:-1]
            self.assertEqual(heard, [message for message in messages if message in set(heard)])
            pywebsock.log.warning("the end")
        self.assertTrue(len(heard) == len(messages) or "missed" in str(logs.output))

    def test_an_older_state(self) -> None:
        """An older state of the stream: messages that were read before do not come again."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            say(one, numbered("before", 30))
            for client in (one, two):
                self.assertEqual([client.read() for _ in range(30)], numbered("before", 30))
            kept = self.redis.call("DUMP", self.stream)
            say(two, ["newer"])
            self.assertEqual((one.read(), two.read()), ("newer",) * 2)
            self.redis.call("RESTORE", self.stream, 0, kept, "REPLACE")
            say(one, ["after"])
            self.assertEqual((one.read(), two.read()), ("after", "after"))
            pywebsock.log.warning("the end")
        self.assertEqual(len(logs.output), 1)

    def test_another_redis_whose_clock_is_behind(self) -> None:
        """Its new entries have lower ids than those that were read before. Old entries do not come again."""
        with unittest.mock.patch.object(pywebsock, "LISTEN_TIME", 0.1):
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            ahead = int(time.time() * 1000) + 60_000
            self.redis.call("XADD", self.stream, f"{ahead}-0", "text", "ahead")
            self.assertEqual((one.read(), two.read()), ("ahead", "ahead"))
            self.redis.call("DEL", self.stream)
            self.redis.call("XADD", self.stream, "1-0", "text", "old")
            for message in ("after", "later"):
                say(one, [message])
                self.assertEqual((one.read(), two.read()), (message, message))

    def test_another_redis_that_is_empty_at_first(self) -> None:
        """Redis gets its old entries back later. They do not come again."""
        self.redis.call("XADD", self.stream, "1-0", "text", "old")
        with unittest.mock.patch.object(pywebsock, "LISTEN_TIME", 0.1):
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            say(one, ["before"])
            self.assertEqual((one.read(), two.read()), ("before", "before"))
            kept = self.redis.call("DUMP", self.stream)
            self.redis.call("DEL", self.stream)
            for _ in range(5):
                asked = self.calls("xread")
                eventually(lambda: self.calls("xread") != asked)  # noqa: B023
            self.redis.call("RESTORE", self.stream, 0, kept)
            say(one, ["after"])
            self.assertEqual((one.read(), two.read()), ("after", "after"))

    def test_idle_client_stays(self) -> None:
        with (
            unittest.mock.patch.object(pywebsock, "LISTEN_TIME", 0.05),
            self.assertLogs("pywebsock", "WARNING") as logs,
        ):
            one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
            for number in range(5):
                say(one, [str(number)])
                self.assertEqual((one.read(), two.read()), (str(number),) * 2)
                asked = b"calls=0"
                for _ in range(3):
                    before = asked
                    eventually(lambda: self.calls("xread") != before)  # noqa: B023
                    asked = self.calls("xread")
            pywebsock.log.warning("the end")
        self.assertEqual(len(logs.output), 1)

    def test_idle_connections_are_used(self) -> None:
        """A NAT drops a connection that is idle for long."""
        with unittest.mock.patch.object(pywebsock, "WAIT_TIME", 0.1):
            self.serve(redis=self.url)
            for command in ("xlen", "xlen", "xread"):
                before = self.calls(command)
                eventually(lambda: self.calls(command) != before)  # noqa: B023

    def calls(self, command: str) -> bytes:
        """Return the number of calls of a command."""
        found = re.search(b"cmdstat_%b:(calls=[0-9]+)" % command.encode(), self.redis.call("INFO", "commandstats"))
        return found[1] if found else b""


class BroadcastingHandler(logging.Handler):
    """A log handler that broadcasts the log."""

    server: pywebsock.BroadcastServer | None = None
    lines: typing.ClassVar[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Broadcast a line; the logger has locked this handler."""
        self.lines.append(record.getMessage())
        if self.server:
            self.server.broadcast(record.getMessage())


class AwayTest(RedisTestCase):
    """The server while Redis is away."""

    shared = False

    def setUp(self) -> None:
        self.redis = Redis("--appendonly", "no")
        self.addCleanup(self.redis.close)
        super().setUp()

    def test_posts_do_not_wait(self) -> None:
        server = self.process("--quiet")
        self.redis.kill()
        eventually(lambda: "is away" in server.log())
        threads, start = threads_of(server.pid), time.monotonic()
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        posts = [Client(server.port, handshake=False) for _ in range(50)]
        for post in posts:
            self.addCleanup(post.__exit__)
            post.send_raw(head)  # without the body
        for post in posts:
            self.assertRegex(post.read_head(), b"(?s)^HTTP/1.1 503 .*Retry-After: ")
            post.socket.close()
        self.assertLess(time.monotonic() - start, 5)
        eventually(lambda: threads_of(server.pid) <= threads)
        self.redis.start()
        eventually(lambda: "is back" in server.log())
        self.assertEqual(exchange(server.port, head.replace(b"1000000", b"2") + b"hi")[0], 202)

    def test_posts_that_wait_give_up(self) -> None:
        """POSTs that wait for room in the queue when Redis goes away, and POSTs whose messages are in the queue."""
        server = self.process("--quiet")
        with contextlib.suppress(ProcessLookupError), paused(self.redis.pid), Client(server.port) as client:
            client.socket.settimeout(0.5)
            with contextlib.suppress(TimeoutError, socket.timeout):
                while True:
                    client.socket.sendall(frame_of("x" * 100) * 1000)
            head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi"
            with Client(server.port, handshake=False) as post:
                post.send_raw(head)
                self.redis.kill()
                self.assertRegex(post.read_head(), b"^HTTP/1.1 503 ")

    def test_a_log_that_is_broadcast(self) -> None:
        """A log handler waits for room in the queue while it is locked, and the link logs a line."""
        handler = BroadcastingHandler()
        pywebsock.log.addHandler(handler)
        self.addCleanup(pywebsock.log.removeHandler, handler)
        server = handler.server = self.serve(redis=self.url)
        client = self.client(server)
        self.redis.kill()
        eventually(lambda: server._link and server._link.away)
        for _ in range(3):
            self.in_background(fill, server.server_address[1], frame_of("x" * 100) * 100, 120_000)
        eventually(lambda: server._link and server._link._cost > pywebsock.QUEUE_SIZE)
        self.in_background(pywebsock.log.warning, "locks the handler")
        self.redis.start()
        self.in_background(lambda: eventually(lambda: server._link and not server._link.away))
        heard = read_until(client, {"locks the handler", "Redis is back"})
        self.assertIn("x" * 100, heard)
        self.redis.call("CONFIG", "SET", "maxmemory", 1)  # no line about a refused message causes the next one
        client.send("lost")
        eventually(lambda: server._link and server._link.away)
        self.redis.call("CONFIG", "SET", "maxmemory", 0)
        client.send("heard")
        read_until(client, {"heard"})
        self.assertLessEqual(sum("refuses" in line for line in handler.lines), 2)

    def test_no_reader_for_a_moment(self) -> None:
        """If Redis refuses an entry to the other servers, reading goes on."""
        server = self.process("--quiet")
        client = self.client(server)
        self.redis.call("CONFIG", "SET", "maxmemory", 1)
        with paused(server.pid):
            self.redis.call("CONFIG", "SET", "maxmemory", 0)
            for number in range(1000):
                self.redis.call("XADD", self.stream, "*", "x", str(number))
            self.redis.call("CONFIG", "SET", "maxmemory", 1)
        self.assertEqual([client.read() for _ in range(1000)], [str(number) for number in range(1000)])
        self.assertNotIn("away", server.log())


def threads_of(pid: int) -> int:
    """Return the number of threads of a process (Linux)."""
    folder = pathlib.Path(f"/proc/{pid}/task")
    require(folder.exists(), "/proc")
    return len(list(folder.iterdir()))


if __name__ == "__main__":
    unittest.main()

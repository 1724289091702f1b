"""Failures between servers and a Redis. Each test starts its own redis-server, or another server."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.faults import paused
from tests.tools.redis import (
    Proxy,
    Redis,
    RedisTestCase,
    fill,
    frame_of,
    memory,
    numbered,
    quiet_lines,
    read_until,
    read_until_close,
    run,
    say,
    steady,
    trickle,
)
from tests.tools.support import (
    DEADLINE,
    ServerTestCase,
    eventually,
    exchange,
    free_port,
)


@contextlib.contextmanager
def answering(*answers: bytes) -> typing.Iterator[int]:
    """Run a TCP server with these answers, the last one again and again, or without any; yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(DEADLINE)
    kept = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                left = list(answers)
                while left and connection.recv(65536):
                    connection.sendall(left.pop(0) if len(left) > 1 else left[0])

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
                self.check_refused(port, "this server is not Redis$")

    def test_another_server_on_the_command_line(self) -> None:
        server = self.serve()
        port = server.server_address[1]
        self.assertEqual(
            run("--redis", f"redis://127.0.0.1:{port}"),
            (1, f"pywebsock: Redis at 127.0.0.1:{port}: this server is not Redis\n"),
        )

    def test_a_node_of_a_cluster_that_does_not_have_the_stream(self) -> None:
        greeting = b"*2\r\n$6\r\nserver\r\n$5\r\nredis\r\n"
        with answering(greeting, b"-MOVED 12182 10.0.0.7:6380\r\n") as port:
            self.assertEqual(
                run("--redis", f"redis://127.0.0.1:{port}"),
                (1, f"pywebsock: Redis at 127.0.0.1:{port}: MOVED 12182 10.0.0.7:6380\n"),
            )

    def test_a_sentinel(self) -> None:
        with answering(b"*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$4\r\nmode\r\n$8\r\nsentinel\r\n") as port:
            self.check_refused(port, "this is a Sentinel")

    def test_a_silent_server(self) -> None:
        """A silent server may be a paused Redis."""
        with answering() as port, unittest.mock.patch.object(pywebsock, "ANSWER_TIME", 0.1):
            with self.assertLogs("pywebsock", "WARNING") as logs:
                self.serve(redis=f"redis://localhost:{port}")
                eventually(lambda: logs.output)
            self.assertIn("Redis is away, senders wait: timed out", logs.output[0])

    def check_refused(self, port: int, why: str) -> None:
        """Check that a server does not start, and prints this reason."""
        with self.assertRaisesRegex(pywebsock.RedisError, f"^Redis at localhost:{port}: {why}"):
            self.serve(redis=f"redis://localhost:{port}")

    def test_reason_is_escaped(self) -> None:
        with answering(b"-ERR \x1b[31m\n!\r\n") as port, self.assertRaises(pywebsock.RedisError) as caught:
            self.serve(redis=f"redis://localhost:{port}")
        self.assertTrue(str(caught.exception).isprintable(), str(caught.exception))

    def test_unknown_host(self) -> None:
        error = socket.gaierror(socket.EAI_NONAME, "unknown")
        with (
            unittest.mock.patch("socket.getaddrinfo", side_effect=error),
            self.assertRaisesRegex(pywebsock.RedisError, "^Redis at nobody.invalid:6379: .*unknown"),
        ):
            self.serve(redis="redis://nobody.invalid")

    def test_no_name_server_yet(self) -> None:
        """The network of a container may come later than its programs."""
        error = socket.gaierror(socket.EAI_AGAIN, "later")
        with (
            unittest.mock.patch("socket.getaddrinfo", side_effect=error),
            self.assertLogs("pywebsock", "WARNING") as logs,
        ):
            self.serve(redis="redis://redis.example")
            eventually(lambda: logs.output)
        self.assertRegex(logs.output[0], "Redis is away, senders wait: .*later")

    def test_no_redis(self) -> None:
        """Without a Redis, the server starts, senders wait in bounded memory, and it ends in time."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            server = self.serve(redis=f"redis://127.0.0.1:{free_port()}", close_timeout=0.2)
            self.connect(server)
            sent = fill(server.server_address[1], b"\x81\x80\0\0\0\0" * 100_000)  # empty messages count, too
            self.assertLess(sent, 5_000_000)
            assert server._link
            self.assertLess(server._link._cost, 2 * pywebsock.QUEUE_SIZE)
            start = time.monotonic()
            server.server_close()
            self.assertLess(time.monotonic() - start, 3)
        away = [line for line in logs.output if "Redis is away, senders wait: " in line]
        self.assertEqual(len(away), 1, logs.output)
        self.assertTrue(any(re.search("[0-9]+ messages have not come back", line) for line in logs.output))


class FaultTest(RedisTestCase):
    """After each fault, no message is lost or doubled."""

    shared = False  # each test has its own

    def setUp(self) -> None:
        self.redis = Redis()
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
        self.assertEqual(one.read(), "early")  # the client's server writes after it has found its place
        for server in servers:
            eventually(lambda server=server: "Redis is back" in server.log())  # type: ignore[misc]
        sent = [numbered("one", 20)]
        say(one, sent[0])
        self.assertEqual([one.read() for _ in range(20)], sent[0])
        heard = two.read()  # "early" only if the server was the first one
        self.assertIn(heard, ("early", "one: 0"))
        for server in servers:
            self.assertEqual(quiet_lines(self.stop(server)), ["away", "back"])

    def test_redis_is_restarted(self) -> None:
        """Redis is restarted three times under load, by SIGKILL, too, and once while it is idle."""
        servers = [self.process("--quiet"), self.process("--quiet")]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 3000) for who in range(2)]
        for pair in zip(clients, sent):
            self.in_background(trickle, *pair)
        for number in range(3):
            length = len(self.names())
            eventually(lambda length=length: len(self.names()) > length + 200)  # type: ignore[misc]
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
        """An idle writer notices a restart at its next message; that is logged only once."""
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
        """The connection is cut within an entry or the stream, or before the reply; the server tries again."""
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
                say(clients[0], [f"after {cut}"])  # after recovering from this cut
                self.assertEqual([client.read() for client in clients], [f"after {cut}"] * 2)
            pywebsock.log.warning("the end")
        self.assertEqual(len(logs.output), 1)
        self.assertGreaterEqual(len(self.names()), 4 * count // 3)  # some may be in the stream twice

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
            length = len(self.names())
            with paused(servers[2].pid):
                eventually(lambda length=length: len(self.names()) > length + 200)  # type: ignore[misc]
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
        """A missing reply counts as a lost connection; messages on their way may be written twice."""
        with unittest.mock.patch.multiple(pywebsock, ANSWER_TIME=0.3, LISTEN_TIME=0.1):
            with self.assertLogs("pywebsock", "WARNING") as logs:
                one, two = (self.client(self.serve(redis=self.url)) for _ in range(2))
                say(one, ["before"])
                self.assertEqual((one.read(), two.read()), ("before", "before"))
                with paused(self.redis.pid):
                    say(one, numbered("one", 50))
                    say(two, numbered("two", 50))
                    eventually(lambda: str(logs.output).count("senders wait: timed out") == 2)
                self.assert_order([one, two], [numbered("one", 50), numbered("two", 50)])
                eventually(lambda: str(logs.output).count("Redis is back") == 2)
            self.assertEqual(len(logs.output), 4)

    def test_the_stream_is_trimmed(self) -> None:
        servers = [self.process("--quiet"), self.process("--quiet")]
        near, far = map(self.client, servers)
        say(near, ["first"])
        self.assertEqual((near.read(), far.read()), ("first", "first"))
        eventually(lambda: b"\r\nblocked_clients:2\r\n" in self.redis.call("INFO", "clients"))
        with paused(servers[1].pid):
            say(near, ["second"])  # both have asked for it
            self.assertEqual(near.read(), "second")
            for message in numbered("m", 100):  # one entry each
                near.send(message)
                self.assertEqual(near.read(), message)
            self.redis.call("XTRIM", self.stream, "MAXLEN", 30)
        self.assertEqual([far.read() for _ in range(31)], ["second", *numbered("m", 30, 70)])
        eventually(lambda: "missed 70 messages" in servers[1].log(), servers[1].log())
        self.assertEqual(servers[0].log(), "")

    def test_entry_vanishes_before_it_is_read(self) -> None:
        """An entry that vanishes before it is read is written again, as soon as that is certain."""
        call, gate = pywebsock.RedisConnection.call, threading.Event()

        def late(connection: pywebsock.RedisConnection, *words: str | bytes | int) -> object:
            if words[0] == "XREAD":
                gate.wait(DEADLINE)
            reply = call(connection, *words)
            if b"vanishes" in words and not gate.is_set():
                self.redis.call("DEL", self.stream)
                gate.set()
            return reply

        client = self.client(self.serve(redis=self.url))
        say(client, ["before"])
        self.assertEqual(client.read(), "before")
        with (
            unittest.mock.patch.object(pywebsock, "LISTEN_TIME", 0.75 * DEADLINE),
            unittest.mock.patch.object(pywebsock.RedisConnection, "call", late),
        ):
            self.redis.call("XADD", self.stream, "*", "x", "ends the reading that has begun")
            client.read()
            say(client, ["vanishes"])
            self.assertEqual(client.read(), "vanishes")
            self.assertTrue(gate.is_set())

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

    def test_senders_are_held_back(self) -> None:
        """While Redis is away, memory stays bounded, and no message is lost afterwards."""
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

    def test_sigterm_delivers_queued_messages(self) -> None:
        servers = [self.process(), self.process()]
        clients = [self.client(server) for server in servers]
        clients[0].send_raw(b"".join(map(frame_of, numbered("m", 2000))))
        self.assertEqual(clients[0].read(), "m: 0")  # all arrived in one or two pieces
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
        self.assertIn("7 messages have not come back", server.log())


if __name__ == "__main__":
    unittest.main()

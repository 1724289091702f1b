"""Many machines: servers that form one room over a stream in Redis. Each class starts its own redis-server."""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import shutil
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
from tests.tools.redis import (
    Deliver,
    FakeServer,
    Message,
    RedisTestCase,
    frame_of,
    numbered,
    run,
    say,
)
from tests.tools.support import (
    DEADLINE,
    Client,
    Process,
    eventually,
    exchange,
    free_port,
    require,
)


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
        before = set(threading.enumerate())
        one = self.serve(redis=self.url)
        eventually(lambda: sum(thread.name == "pywebsock link" for thread in {*threading.enumerate()} - before) == 2)
        threads = {thread for thread in {*threading.enumerate()} - before if thread.name == "pywebsock link"}
        two = self.serve(redis=self.url, compression=False)
        client = self.client(two)
        one.broadcast("to all")
        self.assertEqual(client.read(), "to all")
        post = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        status, _, _ = exchange(one.server_address[1], post)
        self.assertEqual((status, client.read()), (202, ""))
        one.server_close()
        one.server_close()
        eventually(lambda: not threads.intersection(threading.enumerate()))

    def test_other_streams_are_other_rooms(self) -> None:
        ours, theirs = self.serve(redis=self.url), self.serve(redis=self.url + "2")
        one, other = self.client(ours), self.client(theirs)
        say(one, ["ours"])
        self.assertEqual(one.read(), "ours")
        say(other, ["theirs"])
        self.assertEqual(other.read(), "theirs")
        self.assertEqual((self.redis.call("XLEN", self.stream), self.redis.call("XLEN", self.stream + "2")), (1, 1))

    def test_text_of_others_is_not_markup(self) -> None:
        client = self.client(self.serve(redis=self.url))
        for name in ("message", "a:1:text", "0123456789abcdef:" + "9" * 5000 + ":binary"):
            self.redis.call("XADD", self.stream, "*", name, "hello", "more", "fields")
            self.assertEqual([client.read(), client.read()], ["hello", "fields"])

    def test_entry_written_twice(self) -> None:
        """An entry that is written twice is delivered once, at its first place; each server has its own numbers."""
        client = self.client(self.serve(redis=self.url))
        for name in ("a:1", "a:2", "a:1", "b:1", "a:2", "a:3", "b:1", "a:3", "c:1"):
            server, _, number = name.partition(":")
            self.redis.call("XADD", self.stream, "*", f"{server * 16}:{number}:text", name)
        self.assertEqual([client.read() for _ in range(5)], ["a:1", "a:2", "b:1", "a:3", "c:1"])

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
        """A history longer than the queue, before the loop carries it out."""
        one = self.serve(redis=self.url)
        with self.client(one) as client:
            self.in_background(say, client, [f"{number:1000}" for number in range(8000)])
            for _ in range(8000):
                client.read()
        fresh = self.process("--history", "9000", "--max-backlog", "64M")
        client = self.client(fresh)
        self.assertEqual([int(client.read()) for _ in range(8000)], list(range(8000)))

    def test_a_slow_client_delays_no_other(self) -> None:
        one, two = self.serve(redis=self.url), self.serve(redis=self.url, max_backlog=2_000_000)
        slow, quick, sender = self.client(two, small=True), self.client(two), self.client(one)
        self.in_background(say, sender, [bytes(10_000)] * 1500)
        for _ in range(1500):
            self.assertEqual((len(quick.read()), len(sender.read())), (10_000, 10_000))
        self.assertLess(len(slow.read_all()), 15_000_000)

    def test_a_flood_from_two_servers(self) -> None:
        """A flood faster than Redis: writers wait for their readers, so that no unread entry is trimmed."""
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
        """A slower server asks the others to wait, so that no unread entry is trimmed."""
        with unittest.mock.patch.object(pywebsock, "STREAM_LENGTH", 5000):
            servers = [self.serve(redis=self.url) for _ in range(2)]
            deliver = servers[1]._take_from_link

            def deliver_slowly(messages: list[tuple[int, bytes]]) -> None:
                time.sleep(len(messages) / 5000)
                deliver(messages)

            servers[1]._take_from_link = deliver_slowly  # type: ignore[method-assign, assignment]
            clients = [self.client(server) for server in servers]
            sent = [numbered("quick", 15_000), numbered("slow", 1000)]
            for client, messages in zip(clients, sent):
                self.in_background(client.send_raw, b"".join(map(frame_of, messages)))
            self.assert_order(clients, sent)
            names = [fields[0] for _, fields in self.redis.call("XRANGE", self.stream, "-", "+")]
            self.assertTrue(any(name.endswith(b":wait") for name in names))

    def test_a_server_slower_than_the_others_with_large_messages(self) -> None:
        """The same with a short stream (in bytes)."""
        with unittest.mock.patch.object(pywebsock, "STREAM_SIZE", 24 << 20):
            servers = [self.serve(redis=self.url, max_message=1 << 20, max_backlog=1 << 30) for _ in range(2)]
            deliver = servers[1]._take_from_link

            def deliver_slowly(messages: list[tuple[int, bytes]]) -> None:
                time.sleep(sum(len(payload) for _, payload in messages) / 20e6)
                deliver(messages)

            servers[1]._take_from_link = deliver_slowly  # type: ignore[method-assign, assignment]
            clients = [self.client(server) for server in servers]
            sent = [
                [f"{each!s} {'x' * 50_000}" for each in numbered(*which)] for which in (("quick", 1000), ("slow", 20))
            ]
            for client, messages in zip(clients, sent):
                self.in_background(client.send_raw, b"".join(map(frame_of, messages)))
            self.assert_order(clients, sent)
            self.assertLess(self.redis.call("MEMORY", "USAGE", self.stream, "SAMPLES", 0), 28 << 20)

    def client_that_waits(self) -> Client:
        """Return a client whose message waits, since another server has asked for it."""
        server = self.serve(redis=self.url)
        client = self.client(server)
        self.redis.call("XADD", self.stream, "*", "0123456789abcdef:0:wait", "")
        eventually(lambda: server._link and server._link._reader.hold_until)
        client.send("hello")
        eventually(lambda: server._link and server._link._outbox)
        return client

    def test_waiting_for_another_server(self) -> None:
        with unittest.mock.patch.multiple(pywebsock, WAIT_TIME=3600, LISTEN_TIME=3600):
            client = self.client_that_waits()
            self.redis.call("XADD", self.stream, "*", "0123456789abcdef:0:go", "")
            self.assertEqual(client.read(), "hello")

    def test_waiting_for_a_vanished_server(self) -> None:
        with unittest.mock.patch.object(pywebsock, "WAIT_TIME", 0.1):
            self.assertEqual(self.client_that_waits().read(), "hello")

    def test_waiting_for_another_server_that_never_ends(self) -> None:
        """Senders are slowed down, but not stopped."""
        with unittest.mock.patch.object(pywebsock, "WAIT_TIME", 0.2):
            client = self.client(self.serve(redis=self.url))
            ended = threading.Event()

            def wait() -> None:
                while not ended.wait(0.02):
                    self.redis.call("XADD", self.stream, "*", "0123456789abcdef:0:wait", "")

            waiter = self.in_background(wait)
            self.addCleanup(ended.set)
            eventually(lambda: len(self.names()) > 5)
            messages = numbered("m", 5)
            for message in messages:
                client.send(message)
                self.assertEqual(client.read(), message)
            self.assertTrue(waiter.is_alive())


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
                address = pywebsock.RedisAddress(self.redis.url.replace("redis://", "redis://:s3%20cr%40t@"))
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

    def test_a_user_with_the_least_permissions(self) -> None:
        rights = ["+xadd", "+xread", "+xrevrange", "+xlen", "+xtrim", "+memory"]
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
        """Check that two servers form one room."""
        one, two = (self.client(self.serve(redis=url)) for url in urls)
        say(one, ["hello"])
        self.assertEqual((one.read(), two.read()), ("hello", "hello"))

    def test_the_wrong_type_of_key(self) -> None:
        self.redis.call("SET", self.stream, "a string")
        status, said = run("--redis", self.url)
        self.assertEqual((status, said.count("\n")), (1, 1), said)
        self.assertRegex(said, f"^{self.at}WRONGTYPE ")

    def test_key_of_another_type(self) -> None:
        """After the start, a key of another type is an error that may end, so the server waits."""
        with self.assertLogs("pywebsock", "WARNING") as logs:
            client = self.client(self.serve(redis=self.url))
            self.redis.call("SET", self.stream, "a string")
            say(client, ["hello"])
            eventually(lambda: "Redis is away, senders wait: WRONGTYPE" in str(logs.output))
            self.redis.call("DEL", self.stream)
            self.assertEqual(client.read(), "hello")
            eventually(lambda: "Redis is back" in str(logs.output))
        self.assertEqual(len(logs.output), 2, logs.output)


class LinkTest(RedisTestCase):
    """The link without a server."""

    def link(self, deliver: Deliver, history: int = 0) -> pywebsock.RedisLink:
        """Make a link, which ends with the test."""
        link = pywebsock.RedisLink(FakeServer(self.url, deliver, history))
        self.addCleanup(link.stop)
        return link

    def test_history_comes_from_the_constructor(self) -> None:
        """The constructor delivers the history and finds the place in the stream; start() starts the threads."""
        for text in ("one", "two"):
            self.redis.call("XADD", self.stream, "*", "x", text)
        heard: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

        def deliver(messages: list[tuple[int, bytes]]) -> None:
            for _, payload in messages:
                heard.put((threading.get_ident(), payload))

        before = set(threading.enumerate())
        link = self.link(deliver, 1)
        self.assertEqual((set(threading.enumerate()) - before, heard.qsize()), (set(), 1))
        self.assertEqual(heard.get(), (threading.get_ident(), b"two"))
        self.redis.call("XADD", self.stream, "*", "x", "three")
        link.start()
        thread, payload = heard.get(timeout=DEADLINE)
        self.assertEqual(payload, b"three")
        self.assertNotEqual(thread, threading.get_ident())

    def test_many_links(self) -> None:
        """Entries of links that are behind do not keep them behind."""
        heard: list[list[tuple[int, bytes]]] = [[] for _ in range(40)]
        links = [self.link(each.extend) for each in heard]
        for link in links:
            link.start()
        for number in range(20):
            for link in links:
                link.put(f"{id(link)} {number}".encode(), pywebsock.Opcode.TEXT)
        eventually(lambda: all(len(each) == 20 * len(links) for each in heard))
        self.assertTrue(all(each == heard[0] for each in heard))

    def test_put_never_waits(self) -> None:
        """put() of a full link returns False; later, the link calls when it has room again; no message is lost."""
        gate, heard = threading.Event(), []

        def deliver(messages: list[tuple[int, bytes]]) -> None:
            if messages:
                gate.wait(DEADLINE)
            heard.extend(messages)

        link = self.link(deliver)
        link.start()
        sent = [(pywebsock.Opcode.BINARY, number.to_bytes(2, "big") * 100_000) for number in range(50)]
        self.assertFalse(link.is_full)
        for opcode, payload in sent:
            link.put(payload, opcode)
        self.assertTrue(link.is_full)
        self.assertFalse(link.wait_for_room(0.01))
        gate.set()
        self.assertTrue(link.wait_for_room())
        self.assertFalse(link.is_full)
        link.stop(DEADLINE)
        self.assertEqual(heard, sent)


class SpeedTest(RedisTestCase):
    """Figures, which are only printed, since they depend on the machine."""

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
        """Return the deliveries a second of 50 clients on each server, which send 10 messages, read all, and repeat."""
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
        """Return a self-signed certificate for localhost."""
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


if __name__ == "__main__":
    unittest.main()

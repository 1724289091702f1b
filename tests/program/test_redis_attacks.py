"""Many machines: a Redis whose state, master or data changes under load. No message is lost or doubled."""

from __future__ import annotations

import collections
import contextlib
import re
import signal
import socket
import struct
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.faults import paused, small_buffers
from tests.tools.redis import (
    Message,
    Redis,
    RedisTestCase,
    frame_of,
    numbered,
    read_until,
    read_until_close,
    say,
    steady,
    trickle,
)
from tests.tools.support import DEADLINE, Client, Process, Recorder, eventually, free_port


class Relay:
    """A proxy between servers and a Redis, which can be replaced by another; it passes data on whole or slowly.

    - port: the port of the proxy
    - target: the port of the Redis for new connections
    - piece: number of bytes to pass on at once, each after a delay
    """

    def __init__(self, target: int, piece: int = 1 << 16, delay: float = 0.0) -> None:
        self.target, self.piece, self.delay = target, piece, delay
        self.passed = 0  # bytes from Redis to servers
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self._sockets[0].getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._sockets[0].accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pass, args=pair, daemon=True))
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            while data := source.recv(self.piece):
                if self.delay:
                    time.sleep(self.delay)
                sink.sendall(data)
                self.passed += len(data)
        self._end(source, sink)

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Close all connections."""
        self._end(*self._sockets[1:])

    def close(self) -> None:
        """Close all connections and the listener."""
        self._end(*self._sockets)
        for thread in self._threads:
            thread.join(DEADLINE)
        for each in self._sockets:
            each.close()


class Direct(Recorder):
    """A server without hooks for messages."""

    on_message = pywebsock.BroadcastServer.on_message


class AttackTest(RedisTestCase):
    """Each test has its own Redis."""

    shared = False

    def setUp(self) -> None:
        self.redis = Redis("--appendonly", "no")
        self.addCleanup(self.redis.close)
        super().setUp()

    def load(self, servers: typing.Sequence[Process], count: int = 600) -> tuple[list[Client], list[list[Message]]]:
        """Let a client of each server send for a while."""
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, count) for who in range(len(clients))]
        for pair in zip(clients, sent):
            self.in_background(trickle, *pair)
        return clients, sent

    def check_states(self, refuse: typing.Sequence[str | int], accept: typing.Sequence[str | int]) -> None:
        """Redis refuses commands for a moment, again and again, and then goes on."""
        servers = [self.process("--quiet") for _ in range(2)]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 20_000) for who in range(len(clients))]
        for client, messages in zip(clients, sent):
            self.in_background(client.send_raw, b"".join(map(frame_of, messages)))
        for _ in range(12):
            self.redis.call(*refuse)
            time.sleep(0.02)
            self.redis.call(*accept)
            time.sleep(0.05)
        self.assert_order(clients, sent)
        for server in servers:
            self.assertNotRegex(server.log(), "lost|missed")

    def test_replica_and_master_in_turns(self) -> None:
        self.check_states(("REPLICAOF", "127.0.0.1", free_port()), ("REPLICAOF", "NO", "ONE"))

    def test_too_few_replicas_in_turns(self) -> None:
        option = "min-replicas-to-write"
        self.check_states(("CONFIG", "SET", option, 1), ("CONFIG", "SET", option, 0))

    def test_a_user_that_may_not_trim(self) -> None:
        """Without +xtrim, the stream is bounded, since XADD trims it, too."""
        self.redis.call("ACL", "SETUSER", "room", "on", ">pass", "~*", "+@all", "-xtrim")
        server = self.process("--quiet", url=self.url.replace("redis://", "redis://room:pass@"))
        client = self.client(server)
        for _ in range(30):
            messages = numbered("x", 1000)
            client.send_raw(b"".join(map(frame_of, messages)))
            self.assertEqual([client.read() for _ in messages], messages)
        self.assertLess(self.redis.call("XLEN", self.stream), 15_000)
        self.assertEqual(server.log(), "")

    def test_out_of_memory_for_a_moment(self) -> None:
        """Redis is out of memory because of other data; afterwards, the stream keeps as many entries as before."""
        servers = [self.process("--quiet"), self.process("--quiet")]
        near, far = map(self.client, servers)
        say(near, [*(f"{i}" * 1000 for i in range(100)), "first"])
        for client in (near, far):
            read_until(client, {"first"})
        self.redis.call("CONFIG", "SET", "maxmemory", 1)
        for number in range(20):
            say(near, numbered(f"lost {number}", 10))
            time.sleep(0.05)
        self.redis.call("CONFIG", "SET", "maxmemory", 0)
        say(near, ["heard"])
        for client in (near, far):
            read_until(client, {"heard"})
        with paused(servers[1].pid):
            for number in range(300):
                near.send(f"{number:05}" + "x" * 20_000)
                near.read()
        heard = [str(far.read())[:5] for _ in range(300)]
        self.assertEqual(heard, [f"{number:05}" for number in range(300)])
        self.assertNotIn("missed", servers[1].log())

    def test_deleted_between_two_messages(self) -> None:
        """No message is missed, even if the next entry has the id of the last one, in the same millisecond."""
        servers = [self.process("--quiet"), self.process("--quiet")]
        clients = [self.client(server) for server in servers]
        for number in range(3):
            say(clients[number % 2], [f"before {number}"])
            for client in clients:
                self.assertEqual(client.read(), f"before {number}")
            self.redis.call("DEL", self.stream)
        say(clients[0], ["after"])
        for client in clients:
            self.assertEqual(client.read(), "after")
        for server in servers:
            self.assertNotRegex(server.log(), "missed|away")

    def test_sigterm_under_load(self) -> None:
        """Clients go on sending; the server neither waits for them, nor logs that Redis has lost messages."""
        servers = [self.process("--quiet"), self.process("--quiet")]
        near, far = map(self.client, servers)

        def send() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near.send("x" * 100)
                    time.sleep(0.001)

        self.in_background(send)
        self.in_background(read_until_close, near)
        far.read()
        start = time.monotonic()
        servers[0].send_signal(signal.SIGTERM)
        self.assertEqual(servers[0].wait(), 0)
        print(f"\n[SIGTERM under load: {time.monotonic() - start:.2f} s]", end=" ")
        self.assertNotIn("have not come back", servers[0].log())

    def test_failover_to_a_replica_that_is_behind(self) -> None:
        """All servers go on in one order, without doubled messages; only messages on their way are lost."""
        replica = Redis("--appendonly", "no")
        self.addCleanup(replica.close)
        replica.call("REPLICAOF", "127.0.0.1", self.redis.port)
        eventually(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
        relay = Relay(self.redis.port)
        self.addCleanup(relay.close)
        url = f"redis://127.0.0.1:{relay.port}?stream={self.stream}"
        servers = [self.process("--quiet", url=url) for _ in range(2)]
        clients = [self.client(server) for server in servers]
        say(clients[0], ["first"])
        for client in clients:
            self.assertEqual(client.read(), "first")
        eventually(lambda: replica.call("XLEN", self.stream) >= 1)
        replica.call("REPLICAOF", "NO", "ONE")  # the replica stays behind
        sent = [numbered(who, 300) for who in range(2)]
        for pair in zip(clients, sent):
            say(*pair)
        heard = [[client.read() for _ in range(600)] for client in clients]
        self.assertEqual(*heard)
        self.redis.kill()
        relay.target = replica.port
        relay.cut()
        sent = [numbered(f"after {who}", 300) for who in range(2)]
        for pair in zip(clients, sent):
            self.in_background(trickle, *pair)
        self.assert_order(clients, sent)

    def test_failover_in_the_middle(self) -> None:
        """A failover while all clients send: one order, no doubled messages, and each server has its own messages."""
        replica = Redis("--appendonly", "no")
        self.addCleanup(replica.close)
        replica.call("REPLICAOF", "127.0.0.1", self.redis.port)
        eventually(lambda: b"master_link_status:up" in replica.call("INFO", "replication"))
        relay = Relay(self.redis.port)
        self.addCleanup(relay.close)
        url = f"redis://127.0.0.1:{relay.port}?stream={self.stream}"
        servers = [self.process("--quiet", url=url) for _ in range(3)]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 2000) for who in range(3)]
        senders = [self.in_background(trickle, *pair) for pair in zip(clients, sent)]
        eventually(lambda: len(self.names()) > 1000)
        self.redis.kill()
        replica.call("REPLICAOF", "NO", "ONE")
        relay.target = replica.port
        relay.cut()
        for sender, client in zip(senders, clients):
            sender.join(DEADLINE)
            client.send("end")
        heard = []
        for client in clients:
            mine: list[Message] = []
            while mine.count("end") < 3:
                mine.append(client.read())
            heard.append([message for message in mine if message != "end"])
        lost = [6000 - len(each) for each in heard]
        print(f"\n[failover in the middle: {lost} of 6000 messages lost]", end=" ")
        for each in heard:
            self.assertEqual(len(each), len(set(each)), "twice")
        self.assertEqual(lost, [0, 0, 0])

    def test_byte_by_byte(self) -> None:
        """A slow network does not count as a lost one."""
        relay = Relay(self.redis.port, 1, 0.0005)
        self.addCleanup(relay.close)
        with unittest.mock.patch.object(pywebsock, "ANSWER_TIME", 1.0):
            slow = self.serve(redis=f"redis://127.0.0.1:{relay.port}?stream={self.stream}")
        servers = [slow, self.serve(redis=self.url)]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 20) for who in range(2)]
        for pair in zip(clients, sent):
            self.in_background(say, *pair)
        self.assert_order(clients, sent)

    def test_a_pause_of_all_clients(self) -> None:
        servers = [self.process("--quiet") for _ in range(2)]
        clients, sent = self.load(servers)
        for _ in range(3):
            self.redis.call("CLIENT", "PAUSE", 500, "ALL")
            time.sleep(0.7)
        self.assert_order(clients, sent)
        for server in servers:
            self.assertEqual(server.log(), "")

    def test_connections_are_killed_all_the_time(self) -> None:
        servers = [self.process("--quiet") for _ in range(3)]
        clients, sent = self.load(servers, 1000)
        for _ in range(30):
            self.redis.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(0.03)
        self.assert_order(clients, sent)

    def test_a_password_from_now_on(self) -> None:
        server = self.process("--quiet")
        client = self.client(server)
        say(client, ["before"])
        self.assertEqual(client.read(), "before")
        self.redis.call("CONFIG", "SET", "requirepass", "secret")
        inside = pywebsock.RedisConnection(
            pywebsock.RedisAddress(self.redis.url.replace("redis://", "redis://:secret@"))
        )
        self.addCleanup(inside.close)
        inside.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        say(client, numbered("meanwhile", 100))
        eventually(lambda: "Redis is away, senders wait: NOAUTH" in server.log())
        inside.call("CONFIG", "SET", "requirepass", "")
        self.assertEqual([client.read() for _ in range(100)], numbered("meanwhile", 100))
        eventually(lambda: "Redis is back" in server.log())
        self.assertEqual(server.log().count("\n"), 2)

    def test_eviction(self) -> None:
        """Redis deletes the whole stream when it needs memory: the sender's server has all messages, others go on."""
        used = int(re.findall(rb"\r\nused_memory:([0-9]+)", self.redis.call("INFO", "memory"))[0])
        self.redis.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        self.redis.call("CONFIG", "SET", "maxmemory", used + 20_000_000)
        servers = [self.process("--quiet"), self.process("--quiet")]
        near, far = map(self.client, servers)
        head, count = struct.pack("!BBQ4x", 0x82, 0xFF, 1_000_000), 60
        self.in_background(
            near.send_raw, b"".join([head + number.to_bytes(1_000_000, "big") for number in range(count)])
        )
        heard: list[Message] = []
        self.in_background(lambda: heard.extend(read_until(far, {"after"})))
        self.assertEqual([number_of(near.read()) for _ in range(count)], list(range(count)))
        say(near, ["after"])
        eventually(lambda: heard)
        numbers = [number_of(message) for message in heard[:-1]]
        self.assertEqual(numbers, sorted(set(numbers)))
        self.assertTrue(len(numbers) == count or "missed" in servers[1].log())

    def test_ten_servers(self) -> None:
        servers = [self.process("--quiet") for _ in range(10)]
        clients = [self.client(server) for server in servers]
        sent = [numbered(who, 500) for who in range(10)]
        for client, messages in zip(clients, sent):
            self.in_background(client.send_raw, b"".join(map(frame_of, messages)))
        self.assert_order(clients, sent)
        for server in servers:
            self.assertEqual(server.log(), "")

    def test_many_waiting_senders(self) -> None:
        """A thousand waiting senders use no CPU, and go on afterwards."""
        server = self.serve(Direct, redis=self.url)
        small_buffers(server)
        listener = self.client(server)
        senders = [self.client(server, small=True) for _ in range(1000)]
        expected: collections.Counter[Message] = collections.Counter()
        with paused(self.redis.pid):
            for number, sender in enumerate(senders):
                message = f"{number:04}" * 1000
                expected[message] = 2
                sender.send_raw(frame_of(message) * 2)
            eventually(lambda: len(server._loop.sender.gate._held_back) > 500)
            steady(lambda: len(server._loop.sender.gate._held_back))
            before = time.process_time()
            time.sleep(1)
            self.assertLess(time.process_time() - before, 0.3)
        self.assertEqual(collections.Counter(listener.read() for _ in range(2000)), expected)


def number_of(message: Message) -> int:
    """Return the number in a message."""
    assert isinstance(message, bytes)
    return int.from_bytes(message, "big")


if __name__ == "__main__":
    unittest.main()

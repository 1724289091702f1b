"""Many clients: idle, joining and leaving, all sending at the same time."""

from __future__ import annotations

import itertools
import os
import random
import statistics
import time
import typing

from tests.tools import load, support
from tests.tools.stress import QUIET, StressTestCase, heavy, quantiles


@heavy
class Idle(StressTestCase):
    """Idle clients cost no CPU and little memory."""

    def test_idle_clients_and_a_stuck_one(self) -> None:
        server = self.serve()
        clients = self.clients(server)
        clients.join(500)
        (stuck,) = clients.join(1, small=True)
        (pusher,) = clients.join(1)
        idle = self.measure(server, clients)
        stuck.stop_reading()
        pusher.send(load.frame(bytes(60000)) * 150)
        clients.run(lambda: pusher.received == 150 * 60004, 60)
        waiting = self.measure(server, clients)
        self.report(f"500 idle clients: CPU {idle:.1%}; with a stuck one: {waiting:.1%}")
        self.assertEqual(self.number(server), 502)
        self.assertLess(max(idle, waiting), 0.03)

    def test_many(self) -> None:
        """15,000 clients."""
        server = self.serve("--max-clients", "20000", "--ping", "0")
        crowd = self.crowd(server)
        self.check_memory(server, 15_000, 4.0, crowd.join)
        with support.Client(server.port) as client:
            client.send("hello, all")
            self.assertEqual(client.read(), "hello, all")
        for one in crowd.sockets:
            self.assertIn(b"hello, all", one.recv(1000))

    def test_many_with_tls(self) -> None:
        server = self.serve("--ping", "0", tls=True)
        clients = self.clients(server)
        self.check_memory(
            server, 4000, 32.0, lambda number: [clients.join(100, tls=True) for _ in range(number // 100)]
        )

    def check_memory(
        self, server: support.Process, number: int, most: float, join: typing.Callable[[int], object]
    ) -> None:
        """Check the memory (KB) of each of many clients; they have no threads."""
        join(1000)  # freed memory of these is used again
        support.eventually(lambda: load.threads(server.pid) == 2, "threads of handshakes are left")
        before, start = load.memory(server.pid), time.monotonic()
        join(number - 1000)
        seconds = time.monotonic() - start
        support.eventually(lambda: load.threads(server.pid) == 2, "threads of handshakes are left")
        each = (load.memory(server.pid) - before) * 1000 / (number - 1000)
        self.report(f"{number} idle clients: {each:.1f} KB each, after {seconds:.1f} s")
        self.assertEqual(self.number(server), number)
        self.assertLess(each, most, "KB of an idle client")

    def measure(self, server: support.Process, clients: load.Load) -> float:
        """Return the part of a processor that the server uses."""
        used = load.cpu(server.pid)
        clients.run_for(3)
        return (load.cpu(server.pid) - used) / 3


@heavy
class Churn(StressTestCase):
    """Clients join, leave and are reset while others send."""

    SIZE = 40

    def test_all_clients_get_consecutive_messages(self) -> None:
        server = self.serve(*QUIET)
        clients = self.clients(server)
        senders = self.pace(clients, 3, self.SIZE, 150)
        watcher, everything = self.listen(clients)
        clients.run(lambda: watcher.open)
        crowd: dict[load.Peer, tuple[bytearray, float]] = {}
        kept: list[bytearray] = []
        chance = random.Random(4)

        def come_and_go() -> None:
            now = time.monotonic()
            for sender in senders:
                sender.go_on()
            for peer in [peer for peer, (_, until) in crowd.items() if peer.ended or now > until]:
                kept.append(crowd.pop(peer)[0])
                if not peer.ended:
                    leave(peer, chance)
            for _ in range(min(20, 250 - len(crowd))):
                peer, stream = self.listen(clients)
                crowd[peer] = stream, now + chance.choice((0.0, 0.02, 0.3, 2.0)) * chance.random()

        clients.run_for(15, come_and_go)
        still = [(peer, stream) for peer, (stream, _) in crowd.items() if peer.open and not peer.ended]
        self.settle(clients, senders)
        total = sum(sender.count for sender in senders) * senders[0].stream.length
        clients.run(lambda: len(everything) == total)
        for peer, stream in still:
            clients.run(lambda peer=peer: not peer.ended and everything.endswith(stream))  # type: ignore[misc]  # noqa: B023
        checked = sum(self.check_run(bytes(everything), bytes(stream)) for stream in kept)
        self.report(f"{len(kept)} joined and left, {checked} saw messages, worst delay {senders[0].stream.worst:.3f} s")
        self.assertGreater(checked, 300)
        self.assertGreater(len(kept), 1000)

    def listen(self, clients: load.Load) -> tuple[load.Peer, bytearray]:
        """Connect a client that keeps the received data."""
        peer, stream = clients.start(), bytearray()
        peer.take = stream.extend
        return peer, stream

    def check_run(self, everything: bytes, stream: bytes) -> bool:
        """Check that messages are consecutive; return whether there were any."""
        length = self.SIZE + 2
        if len(stream) < length:
            return False
        stream = stream.partition(b"\x88\x02\x03\xe8")[0] if stream.endswith(b"\x88\x02\x03\xe8") else stream
        start = everything.find(stream[:length])
        self.assertEqual(start % length, 0, "not on the boundary of a message")
        self.assertEqual(everything[start : start + len(stream)], stream, "a gap")
        return True


def leave(peer: load.Peer, chance: random.Random) -> None:
    """Leave in one of several ways."""
    way = chance.randrange(4)
    if way == 0:
        peer.reset()
    elif way == 1:
        peer.end("gone")
    elif way == 2:
        peer.stop_reading()
        peer.send(load.frame(b"half a message")[:7])
        peer.end("within a message")
    else:
        peer.send(load.frame(b"\x03\xe8", 8))


@heavy
class Push(StressTestCase):
    """One sender, as fast as possible."""

    def test_everything_arrives(self) -> None:
        size, megabytes = 65000, int(os.environ.get("PYWEBSOCK_PUSH", "1000"))
        server = self.serve(*QUIET)
        clients = self.clients(server)
        streams = [load.Stream(size) for _ in range(3)]
        for peer, stream in zip(clients.join(3), streams):
            peer.take = stream.take
        (pusher,) = clients.join(1)
        pushed = load.Sender(pusher, 1, size)
        (other,) = clients.join(1)
        chat = load.Sender(other, 2, size, at_once=1)
        before, start, whole = load.memory(server.pid), time.monotonic(), megabytes * 1_000_000 // size

        def push() -> None:
            chat.go_on()
            while pushed.count < whole and pusher.unsent < 4:
                pusher.send(load.numbered(1, pushed.count, size))
                pushed.count += 1

        clients.run(lambda: len(pushed.stream.delays) == whole, 50 + megabytes / 10, push)
        seconds = time.monotonic() - start
        self.settle(clients, [pushed, chat])
        clients.run(lambda: all(stream.messages == pushed.stream.messages for stream in streams))
        self.assertEqual({stream.digest for stream in streams}, {pushed.stream.digest})
        grown = load.peak(server.pid) - before
        self.report(
            f"{megabytes} MB in {seconds:.1f} s ({megabytes / seconds:.0f} MB/s) to 5, memory +{grown:.0f} MB; "
            f"another client: {quantiles(chat.stream.delays)}"
        )
        self.assertLess(grown, 150)
        self.assertGreater(len(chat.stream.delays), 10)


@heavy
class Fairness(StressTestCase):
    """All clients get the same share."""

    def check(self, number: int, seconds: float) -> None:
        """Let all clients send, the next message when the last has come back."""
        server = self.serve(*QUIET)
        clients = self.clients(server)
        senders = [load.Sender(peer, i, 64, at_once=1) for i, peer in enumerate(clients.join(number))]
        for sender in senders:
            sender.go_on()
        clients.run_for(seconds)
        delays = list(itertools.chain.from_iterable(sender.stream.delays for sender in senders))
        counts = [len(sender.stream.delays) for sender in senders]
        self.settle(clients, senders)
        self.report(f"{number} clients: {quantiles(delays)}; {min(counts)} to {max(counts)} echoes a client")
        self.assertLess(max(delays), 10 * statistics.median(delays) + 0.5)
        self.assertGreater(min(counts), max(counts) / 4)

    def test_hundred(self) -> None:
        self.check(100, 6)

    def test_thousand(self) -> None:
        self.check(1000, 8)

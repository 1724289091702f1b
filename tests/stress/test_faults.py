"""Tests that try to break the server: stuck clients, floods, strangers, exhaustion, stopping at a bad moment.

They take minutes and run only with PYWEBSOCK_TESTS=everything; each prints the figures that it measured. Where the size
of a test is a question of patience, an environment variable sets it: PYWEBSOCK_PUSH (MB), PYWEBSOCK_STRESS and
PYWEBSOCK_SOAK (seconds).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import typing
import unittest
import warnings
import zlib

import pywebsock
from tests.tools import load, soak, support

GOING_AWAY = b"\x88\x02\x03\xe9"  # Close 1001
QUIET = ("--no-compression", "--ping", "0")  # nothing in a stream but numbered messages
# The server with something changed before it starts; what follows the program's path are its arguments.
CHANGED = "import sys\nsys.path.insert(0, {root!r})\nimport pywebsock\n{code}\nsys.exit(pywebsock.main(sys.argv[2:]))"
TROUBLE = re.compile("Traceback|unexpected error|an error in|operation failed|Warning|Exception ignored")


@functools.cache
def certificate() -> tuple[str, str, ssl.SSLContext]:
    """A certificate for localhost: its file, the file of its key, and the context of a client that trusts it."""
    folder = tempfile.mkdtemp(prefix="pywebsock-")
    unittest.addModuleCleanup(shutil.rmtree, folder)
    path, context = support.certificate(folder)
    return path, path, context


def quantiles(delays: typing.Sequence[float]) -> str:
    """The middle, the tail and the worst, for people."""
    ordered = sorted(delays)
    middle, tail = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"{len(ordered)} echoes, p50 {middle * 1e3:.1f} ms, p99 {tail * 1e3:.1f} ms, max {ordered[-1] * 1e3:.1f} ms"


@unittest.skipUnless(support.EVERYTHING, "takes minutes: PYWEBSOCK_TESTS=everything")
class FaultTestCase(unittest.TestCase):
    """A server in a process of its own, and many clients in this one."""

    def serve(
        self, *arguments: str, code: str = "pass", python: typing.Sequence[str] = (), **how: typing.Any
    ) -> support.Process:
        """A server that must end well and have nothing to complain about; `code` is run before it starts."""
        changed = ["-c", CHANGED.format(root=str(support.ROOT), code=code)] if code != "pass" else []
        server = support.Process(*arguments, python=[*python, *changed], **how)
        self.addCleanup(self._end, server)
        return server

    def _end(self, server: support.Process) -> None:
        status = server.stop()
        log = server.log()
        self.assertEqual((status, TROUBLE.findall(log)), (0, []), log[-5000:])

    def loaded(self, server: support.Process, tls: ssl.SSLContext | None = None) -> load.Load:
        """Clients of it."""
        clients = load.Load(server.port, tls)
        self.addCleanup(clients.__exit__)
        return clients

    def chat(self, clients: load.Load, number: int = 2, **how: typing.Any) -> list[load.Sender]:
        """Clients that send small messages, each the next when the last has come back: what others notice."""
        peers = clients.join(number, **how)
        return [load.Sender(peer, 1000 + i, 64, at_once=1) for i, peer in enumerate(peers)]

    def pace(self, clients: load.Load, number: int, size: int, pace: float, **how: typing.Any) -> list[load.Sender]:
        """Clients that send so many messages a second each, whatever happens."""
        return [load.Sender(peer, i, size, pace=pace) for i, peer in enumerate(clients.join(number, **how))]

    def settle(self, clients: load.Load, senders: typing.Sequence[load.Sender], deadline: float = 30) -> None:
        """Stop sending and wait until all have got everything, in one order."""
        for sender in senders:
            sender.stop()
        total = sum(sender.count for sender in senders)
        clients.run(lambda: all(sender.answered for sender in senders), deadline)
        clients.run(lambda: all(sender.stream.messages == total for sender in senders), deadline)
        self.assertEqual(len({sender.stream.digest for sender in senders}), 1, "not the same order for all")
        self.assertEqual([sender.peer.ended for sender in senders if sender.peer.ended], [])

    def number(self, server: support.Process) -> int:
        """Of clients in the room."""
        body = support.exchange(server.port, b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")[2]
        return int(body.partition(b'"clients": ')[2].partition(b",")[0])

    def report(self, text: str) -> None:
        """Print a figure."""
        print(f"    {self.id().rpartition('tests.stress.test_faults.')[2]}: {text}", file=sys.stderr, flush=True)


def go_on(senders: typing.Iterable[load.Sender]) -> typing.Callable[[], None]:
    """What to do meanwhile: let them send what is due."""

    def send() -> None:
        for sender in senders:
            sender.go_on()

    return send


class SlowClientTest(FaultTestCase):
    """One that does not read holds up nobody."""

    def check_stuck(
        self, number: int, megabytes: float, seconds: float, *, tls: bool = False, code: str = "pass"
    ) -> None:
        """So much a second to everybody: the stuck are dropped, the others notice nothing."""
        cert, key, context = certificate() if tls else ("", "", None)
        server = self.serve(*QUIET, *(("--cert", cert, "--key", key) if tls else ()), code=code)
        clients = self.loaded(server, context)
        senders = self.pace(clients, 4, 4000, megabytes * 1e6 / 4 / 4000, tls=tls)
        before = load.memory(server.pid)
        stuck = clients.join(number, small=True, tls=tls)
        for peer in stuck:
            peer.stop_reading()
        clients.run_for(seconds, go_on(senders))
        self.settle(clients, senders)
        self.assertEqual(server.log().count("bytes behind"), number, server.log())
        worst = max(sender.stream.worst for sender in senders)
        grown = load.peak(server.pid) - before
        self.report(f"{number} stuck at {megabytes} MB/s: worst delay of others {worst:.3f} s, memory +{grown:.0f} MB")
        self.assertLess(worst, 1.0)
        self.assertLess(grown, 40 + 20 * number if tls else 60)

    def test_one_stuck(self) -> None:
        self.check_stuck(1, 4, 9)

    def test_ten_stuck_and_more_traffic(self) -> None:
        self.check_stuck(10, 20, 5)

    def test_stuck_with_tls(self) -> None:
        self.check_stuck(2, 8, 6, tls=True)

    def test_stuck_where_sockets_know_no_flag(self) -> None:
        """As on Windows, which has no MSG_DONTWAIT."""
        self.check_stuck(2, 20, 4, code="pywebsock.DONT_WAIT = 0")

    def test_slow_reader_loses_nothing_under_its_limit(self) -> None:
        server = self.serve(*QUIET)
        clients = self.loaded(server)
        senders = self.pace(clients, 3, 1000, 500)
        (slow,) = clients.join(1, small=True)
        slow.read_at(100_000)
        stream = load.Stream(1000)
        slow.take = stream.take
        clients.run_for(8, go_on(senders))
        behind = senders[0].stream.messages - stream.messages
        slow.read_at(0)
        self.settle(clients, senders)
        clients.run(lambda: stream.messages == senders[0].stream.messages)
        worst = max(sender.stream.worst for sender in senders)
        self.report(f"{behind / 1000:.1f} MB behind, nothing lost, worst delay of others {worst:.3f} s")
        self.assertEqual(stream.digest, senders[0].stream.digest)
        self.assertGreater(behind, 5000)
        self.assertLess(worst, 0.5)

    def test_stuck_client_that_wakes_up(self) -> None:
        """Very many small messages wait for it: sending them on must not stop the room."""
        server = self.serve(*QUIET, "--max-backlog", "64M")
        clients = self.loaded(server)
        (stuck,) = clients.join(1, small=True)
        (pusher,) = clients.join(1)
        stuck.stop_reading()
        pusher.send(load.frame(bytes(60000)) * 120)  # fills what the kernel holds for it
        clients.run(lambda: pusher.received == 120 * 60004)
        chat = self.chat(clients)
        clients.run_for(8, go_on(chat))
        waiting = chat[0].stream.messages
        before = max(sender.stream.worst for sender in chat)
        for sender in chat:
            sender.stream.worst = 0.0
        start = stuck.received
        stuck.read_on()
        clients.run(lambda: stuck.received >= pusher.received - 100 * 66, 20, go_on(chat))
        worst = max(sender.stream.worst for sender in chat)
        self.settle(clients, chat)
        self.report(
            f"{waiting} messages waited; worst delay of others {before:.3f} s, "
            f"{worst:.3f} s while it took {(stuck.received - start) / 1e6:.0f} MB"
        )
        self.assertGreater(waiting, 20000)
        self.assertLess(worst, 0.3)


class IdleTest(FaultTestCase):
    """Where there is nothing to do, nothing is done."""

    def test_idle_clients_and_a_stuck_one(self) -> None:
        server = self.serve()
        clients = self.loaded(server)
        clients.join(500)
        (stuck,) = clients.join(1, small=True)
        (pusher,) = clients.join(1)
        idle = self.measure(server, clients)
        stuck.stop_reading()
        pusher.send(load.frame(bytes(60000)) * 150)
        clients.run(lambda: pusher.received == 150 * 60004)
        waiting = self.measure(server, clients)
        self.report(f"500 idle clients: CPU {idle:.1%}; with a stuck one: {waiting:.1%}")
        self.assertEqual(self.number(server), 502)
        self.assertLess(max(idle, waiting), 0.03)

    def measure(self, server: support.Process, clients: load.Load) -> float:
        """How much of a core it uses."""
        used = load.cpu(server.pid)
        clients.run_for(3)
        return (load.cpu(server.pid) - used) / 3


class ChurnTest(FaultTestCase):
    """Joining, leaving and being reset while messages flow."""

    SIZE = 40

    def test_everyone_sees_one_unbroken_run(self) -> None:
        server = self.serve(*QUIET)
        clients = self.loaded(server)
        senders = self.pace(clients, 3, self.SIZE, 150)
        watcher, everything = self.watch(clients)
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
                peer, stream = self.watch(clients)
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

    def watch(self, clients: load.Load) -> tuple[load.Peer, bytearray]:
        """A client that keeps what it gets."""
        peer, stream = clients.start(), bytearray()
        peer.take = stream.extend
        return peer, stream

    def check_run(self, everything: bytes, stream: bytes) -> bool:
        """Whether there was a message to check."""
        length = self.SIZE + 2
        if len(stream) < length:
            return False
        stream = stream.partition(b"\x88\x02\x03\xe8")[0] if stream.endswith(b"\x88\x02\x03\xe8") else stream
        start = everything.find(stream[:length])
        self.assertEqual(start % length, 0, "not on the boundary of a message")
        self.assertEqual(everything[start : start + len(stream)], stream, "a gap")
        return True


def leave(peer: load.Peer, chance: random.Random) -> None:
    """In one way of many."""
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


class PushTest(FaultTestCase):
    """One sender as fast as it can."""

    def test_everything_arrives(self) -> None:
        size, megabytes = 65000, int(os.environ.get("PYWEBSOCK_PUSH", "1000"))
        server = self.serve(*QUIET)
        clients = self.loaded(server)
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


class FairnessTest(FaultTestCase):
    """No client is starved by serving the others."""

    def check(self, number: int, seconds: float) -> None:
        """All send flat out, the next message when the last has come back."""
        server = self.serve(*QUIET)
        clients = self.loaded(server)
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


class StrangerTest(FaultTestCase):
    """What comes from the open internet."""

    def attack(
        self,
        seconds: float,
        attack: typing.Callable[[load.Load], typing.Callable[[], object]],
        *arguments: str,
        code: str = "pass",
        memory: float = 40,
        worst: float = 0.5,
    ) -> support.Process:
        """Others chat meanwhile; the log must stay short, the memory bounded, and all be as before in the end."""
        server = self.serve(*arguments, code=code)
        clients = self.loaded(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        before = load.memory(server.pid)
        meanwhile = attack(clients)
        clients.run_for(seconds, lambda: (go_on(chat)(), meanwhile()))
        self.settle(clients, chat)
        delays = [delay for sender in chat for delay in sender.stream.delays]
        lines = server.log().count("\n")
        grown = load.peak(server.pid) - before
        self.report(f"others: {quantiles(delays)}; memory +{grown:.0f} MB, {lines} lines in the log")
        self.assertLessEqual(lines, 100)
        self.assertLess(max(delays), worst)
        self.assertLess(grown, memory)
        for peer in clients.peers - {sender.peer for sender in chat}:
            peer.reset()
        support.eventually(lambda: load.threads(server.pid) == 2 + len(chat), "threads of strangers are left")
        return server

    def test_dribbled_headers(self) -> None:
        """A byte now and then: the deadline is one for all of them."""
        head = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 90
        strangers: list[load.Peer] = []
        sent: dict[load.Peer, int] = {}

        def attack(clients: load.Load) -> typing.Callable[[], object]:
            strangers.extend(clients.start(raw=b"") for _ in range(50))
            return dribble

        def dribble() -> None:
            for peer in strangers:
                done, age = sent.get(peer, 0), time.monotonic() - peer.since
                if not peer.head and done < min(age, 3) * 50:
                    peer.send(head[done : done + 1])
                    sent[peer] = done + 1
                elif peer.head and peer not in answered:
                    answered[peer] = age

        answered: dict[load.Peer, float] = {}
        self.attack(4, attack, code="pywebsock.BroadcastServer.handshake_timeout = 2")
        times = sorted(answered.values())
        self.report(f"408 after {times[0]:.2f} to {times[-1]:.2f} s")
        self.assertEqual([peer.status for peer in strangers], [408] * 50)
        self.assertGreater(times[0], 1.8)
        self.assertLess(times[-1], 3.0)

    def test_endless_headers(self) -> None:
        kinds = (b"GET /" + b"a" * 5000, b"a" * 5000, b"X: y\r\n" * 1000)
        strangers: list[tuple[load.Peer, bytes]] = []

        def attack(clients: load.Load) -> typing.Callable[[], object]:
            return functools.partial(come, clients)

        def come(clients: load.Load) -> None:
            if len(strangers) < 300:
                for kind in kinds:
                    raw = kind if kind is kinds[0] else b"GET / HTTP/1.1\r\n" + kind
                    strangers.append((clients.start(raw=raw), kind))
            for peer, kind in strangers:
                if not peer.ended and peer.unsent < 2 and time.monotonic() - peer.since < 2:
                    peer.send(kind)

        self.attack(3, attack)
        answered = [peer.status for peer, _ in strangers if peer.status]
        self.assertLessEqual(set(answered), {414, 431})
        self.assertEqual(len(answered), len(strangers))

    def test_no_http(self) -> None:
        """Garbage, TLS, silence, port scans and half-open connections."""
        chance = random.Random(5)
        counts = dict.fromkeys(("garbage", "tls", "silent", "scan", "half"), 0)

        def attack(clients: load.Load) -> typing.Callable[[], object]:
            return lambda: come(clients) if len(clients.peers) < 200 else None

        def come(clients: load.Load) -> None:
            kind = chance.choice(list(counts))
            counts[kind] += 1
            if kind == "garbage":
                clients.start(raw=bytes(chance.randrange(256) for _ in range(chance.randrange(1, 3000))))
            elif kind == "tls":
                clients.start(raw=b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
            elif kind == "silent":
                clients.start(raw=b"")
            elif kind == "scan":
                clients.start(raw=b"").reset()
            else:
                peer = clients.start(raw=b"GET")
                with contextlib.suppress(OSError):
                    peer.socket.shutdown(socket.SHUT_WR)

        self.attack(5, attack, code="pywebsock.BroadcastServer.handshake_timeout = 1")
        self.report(", ".join(f"{count} {kind}" for kind, count in counts.items()))

    def flood(self, piece: bytes, first: bytes = b"", *, reading: bool, number: int = 3) -> None:
        """The same frames without end, as fast as it goes."""

        def attack(clients: load.Load) -> typing.Callable[[], object]:
            flooders = clients.join(number)
            for peer in flooders:
                peer.send(first)
                if not reading:
                    peer.stop_reading()

            def flood() -> None:
                for peer in flooders:
                    if not peer.ended and peer.unsent < 3:
                        peer.send(piece)

            return flood

        self.attack(5, attack, worst=1.0)

    def test_pings(self) -> None:
        self.flood(load.frame(b"", 9) * 5000, reading=True)

    def test_pings_from_a_client_that_does_not_read(self) -> None:
        self.flood(load.frame(bytes(125), 9) * 5000, reading=False)

    def test_empty_fragments(self) -> None:
        nothing = support.masked_frame(0, fin=False)
        self.flood(nothing * 5000, support.masked_frame(1, fin=False), reading=True)

    def test_tiny_fragments(self) -> None:
        self.flood(support.masked_frame(0, b"\0", fin=False) * 5000, support.masked_frame(1, fin=False), reading=True)

    def test_flood_in_a_crowd(self) -> None:
        """Three who keep the interpreter busy, where each message goes to three hundred."""
        server = self.serve(*QUIET)
        clients = self.loaded(server)
        clients.join(300)
        chat = self.chat(clients)
        flooders = clients.join(3)
        for peer in flooders:
            peer.send(support.masked_frame(1, fin=False))
        piece = support.masked_frame(0, fin=False) * 5000

        def flood() -> None:
            go_on(chat)()
            for peer in flooders:
                if peer.unsent < 3:
                    peer.send(piece)

        clients.run_for(6, flood)
        delays = [delay for sender in chat for delay in sender.stream.delays]
        self.assertTrue(delays, "no echo at all")
        self.report(f"others: {quantiles(delays)}")
        self.assertLess(statistics.median(delays), 0.25)

    def test_bombs(self) -> None:
        """1 GiB of zeros, compressed to 1 MB."""
        packer = zlib.compressobj(9, wbits=-15)
        bomb = b"".join([packer.compress(bytes(1 << 20)) for _ in range(1024)]) + packer.flush(zlib.Z_SYNC_FLUSH)[:-4]
        bomb = support.masked_frame(2, b"", rsv=4, length=len(bomb), key=bytes(4)) + bomb
        strangers: list[load.Peer] = []

        def attack(clients: load.Load) -> typing.Callable[[], object]:
            return lambda: come(clients) if sum(not peer.ended for peer in strangers) < 5 else None

        def come(clients: load.Load) -> None:
            peer = clients.start(Sec_WebSocket_Extensions="permessage-deflate")
            peer.send(bomb)
            closes[peer] = bytearray()
            peer.take = closes[peer].extend
            strangers.append(peer)

        closes: dict[load.Peer, bytearray] = {}
        self.attack(5, attack, memory=200, worst=1.0)
        ended = [peer for peer in strangers if peer.ended == "end"]
        self.report(f"{len(strangers)} bombs, {len(ended)} ended")
        self.assertTrue(ended)
        self.assertEqual({bytes(closes[peer])[-2:] for peer in ended if closes[peer]} - {b""}, {b"it"})

    def test_storm(self) -> None:
        """2000 connections at once: none is refused."""
        server = self.serve()
        clients = self.loaded(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        start = time.monotonic()
        storm = [clients.start() for _ in range(2000)]
        clients.run(lambda: all(peer.open or peer.ended for peer in storm), 30, go_on(chat))
        seconds = time.monotonic() - start
        self.assertEqual([peer.ended for peer in storm if peer.ended], [])
        for peer in storm:
            peer.reset()
        clients.run_for(0.5, go_on(chat))
        for sender in chat:
            sender.stop()
        clients.run(lambda: all(sender.answered for sender in chat))
        delays = [delay for sender in chat for delay in sender.stream.delays]
        self.report(f"2000 connections in {seconds:.2f} s; others: {quantiles(delays)}")
        self.assertLessEqual(server.log().count("\n"), 100)
        support.eventually(lambda: load.threads(server.pid) == 2 + len(chat), "threads of strangers are left")
        support.eventually(lambda: self.number(server) == len(chat), "strangers are left")


class ExhaustionTest(FaultTestCase):
    """Out of file descriptors, threads, memory: others do not notice, and it passes."""

    def check(self, code: str, line: str, refused: bool) -> None:
        """200 connections, many more than there can be."""
        server = self.serve(*QUIET, code=code)
        clients = self.loaded(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        crowd = [clients.start() for _ in range(200)]
        clients.run_for(2, go_on(chat))
        for sender in chat:
            sender.stop()
        clients.run(lambda: all(sender.answered for sender in chat))
        got_in = sum(peer.open and not peer.ended for peer in crowd)
        used = load.cpu(server.pid)
        clients.run_for(4)
        used = (load.cpu(server.pid) - used) / 4
        delays = [delay for sender in chat for delay in sender.stream.delays]
        lines = server.log().count(line)
        self.report(
            f"{got_in} got in, CPU {used:.1%} while more wait, {lines} lines in the log; others: {quantiles(delays)}"
        )
        self.assertGreater(got_in, 10)
        self.assertLess(got_in, 190)
        self.assertLess(used, 0.05)
        self.assertLessEqual(server.log().count("\n"), 45, server.log())
        self.assertGreaterEqual(lines, 1)
        self.assertLess(max(delays), 0.5)
        self.check_leaving(clients, next(peer for peer in crowd if peer.open))
        for peer in [peer for peer in crowd if peer.open]:
            peer.reset()
        if refused:
            for peer in crowd:
                peer.reset()
            clients.run(lambda: load.threads(server.pid) <= 2 + len(chat))
            crowd = [clients.start() for _ in range(20)]
        clients.run(lambda: sum(peer.open and not peer.ended for peer in crowd) >= 20)

    def check_leaving(self, clients: load.Load, peer: load.Peer) -> None:
        """One of those inside says goodbye, and is answered."""
        stream = bytearray()
        peer.take = stream.extend
        peer.send(load.frame(b"\x03\xe8", 8))
        clients.run(lambda: peer.ended)
        self.assertEqual(bytes(stream), b"\x88\x02\x03\xe8")

    def test_file_descriptors(self) -> None:
        limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
        self.check(limit, "cannot accept", refused=False)

    def test_threads(self) -> None:
        """The limit of threads is one of a user, and does not bind root: the server becomes a user with no others."""
        busy = 0 if os.getuid() == 0 else sum(load.threads(pid) for pid in processes(os.getuid()))
        code = (
            "import os, resource\n"
            "def activate(server, was=pywebsock.BroadcastServer.server_activate):\n"
            "    was(server)\n"
            f"    os.getuid() or os.setuid({20_000 + os.getpid() % 40_000})\n"  # not that of another copy of this test
            f"    resource.setrlimit(resource.RLIMIT_NPROC, ({busy + 60},) * 2)\n"
            "pywebsock.BroadcastServer.server_activate = activate"
        )
        self.check(code, "start new thread", refused=True)

    def test_memory_for_one_message(self) -> None:
        """So little address space is left that long messages find no memory."""
        code = (
            "import resource, re, threading; size = int(open('/proc/self/statm').read().split()[0]) * 4096;"
            "resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)"
        )
        server = self.serve(*QUIET, "--max-message", "256M", code=code)
        clients = self.loaded(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        long = load.frame(bytes(200 << 20))
        for _ in range(3):
            (peer,) = clients.join(1)
            closed = bytearray()
            peer.take = closed.extend
            peer.send(long)
            clients.run(lambda peer=peer: peer.ended, 30, go_on(chat))  # type: ignore[misc]
            self.assertIn(b"\x03\xf1out of memory", closed)
        self.settle(clients, chat)
        delays = [delay for sender in chat for delay in sender.stream.delays]
        lines = server.log().count("\n")
        self.report(f"{lines} lines in the log; others: {quantiles(delays)}")
        self.assertLess(max(delays), 1.0)
        self.assertLessEqual(lines, 6, server.log())
        clients.run(lambda: self.number(server) == len(chat))


def processes(user: int) -> typing.Iterator[int]:
    """The processes of a user."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == user:
                yield int(folder.name)


class KeepaliveTest(FaultTestCase):
    """Who is not there any more is dropped in the stated time."""

    def listener(
        self, server: support.Process, host: str = "127.0.0.1", *, through: str = ""
    ) -> subprocess.Popen[bytes]:
        """A client in a process of its own that answers pings."""
        command = [*through.split(), sys.executable, "-m", "tests.tools.load", host, str(server.port)]
        process = subprocess.Popen(command, cwd=support.ROOT, stdout=subprocess.PIPE)
        self.addCleanup(process.wait, support.DEADLINE)
        self.addCleanup(process.stdout.close)  # type: ignore[union-attr]
        self.addCleanup(process.kill)
        assert process.stdout
        self.assertEqual(process.stdout.readline(), b"open\n")
        return process

    def check_gone(
        self,
        server: support.Process,
        why: str,
        least: float,
        most: float,
        meanwhile: typing.Callable[[], object] = lambda: None,
    ) -> None:
        """The listener must be dropped, not too early and not too late."""
        start = time.monotonic()
        support.eventually(lambda: (meanwhile(), " left: " in server.log())[1], "it is still there", most + 5)
        seconds = time.monotonic() - start
        self.report(f"dropped after {seconds:.2f} s")
        self.assertIn(why, server.log())
        self.assertGreater(seconds, least)
        self.assertLess(seconds, most)

    def stop_in_company(self, server: support.Process, why: str, least: float, most: float, size: int) -> None:
        """A process is stopped while messages flow; the others stay."""
        clients = self.loaded(server)
        senders = self.pace(clients, 2, size, 100)
        process = self.listener(server)
        process.send_signal(signal.SIGSTOP)

        def meanwhile() -> None:
            go_on(senders)()
            clients.step()

        self.check_gone(server, why, least, most, meanwhile)
        self.settle(clients, senders)

    def test_stopped_process_in_a_quiet_room(self) -> None:
        server = self.serve("--ping", "1")
        process = self.listener(server)
        with self.assertRaises(AssertionError):  # as long as it answers, it stays
            support.eventually(server.log, deadline=4)
        process.send_signal(signal.SIGSTOP)
        self.check_gone(server, "it was silent", 0.9, 3.3)

    def test_stopped_process_in_a_busy_room(self) -> None:
        """Its kernel goes on taking messages, so only keepalive can tell."""
        self.stop_in_company(self.serve("--ping", "1"), "it was silent", 0.9, 3.3, 100)

    def test_send_timeout(self) -> None:
        """Its kernel is soon full; without keepalive it is dropped for its backlog that does not move."""
        code = "pywebsock.BroadcastServer.send_timeout = 2"
        server = self.serve("--ping", "0", "--max-backlog", "64M", code=code)
        self.stop_in_company(server, "it took nothing", 2.0, 5.0, 50000)

    def check_vanished(self, *arguments: str, **how: typing.Any) -> support.Process:
        """A peer behind a link that is cut: no FIN, no reset, nothing. In two networks of their own."""
        ip, here, there = shutil.which("ip") or "", f"pywebsock-a{os.getpid()}", f"pywebsock-b{os.getpid()}"
        for name in (here, there):
            if not ip or subprocess.run([ip, "netns", "add", name], capture_output=True, check=False).returncode:
                self.skipTest("network namespaces are not permitted here")
            self.addCleanup(subprocess.run, [ip, "netns", "delete", name], check=True)
        for command in (
            f"-n {here} link add name va type veth peer name vb netns {there}",
            f"-n {here} addr add 10.0.0.1/30 dev va",
            f"-n {here} link set va up",
            f"-n {there} addr add 10.0.0.2/30 dev vb",
            f"-n {there} link set vb up",
        ):
            subprocess.run([ip, *command.split()], check=True, timeout=support.DEADLINE)
        enter = f"import ctypes, os; assert not ctypes.CDLL(None).setns(os.open('/run/netns/{here}', os.O_RDONLY), 0)"
        server = self.serve("--ping", "1", "--host", "0.0.0.0", *arguments, code=enter, **how)
        self.listener(server, "10.0.0.1", through=f"{ip} netns exec {there}")
        subprocess.run([ip, "-n", there, "link", "set", "vb", "down"], check=True, timeout=support.DEADLINE)
        return server

    def test_vanished_peer(self) -> None:
        self.check_gone(self.check_vanished(), "it was silent", 0.9, 3.3)

    def test_vanished_peer_in_a_busy_room(self) -> None:
        """What was sent to it waits for ever; keepalive does not wait behind it."""
        server = self.check_vanished("--stdin", stdin=subprocess.PIPE)
        assert server.stdin
        lines = server.stdin.fileno()
        self.check_gone(server, "it was silent", 0.9, 3.3, lambda: os.write(lines, b"hello" * 20 + b"\n"))


class LimitTest(FaultTestCase):
    """--rate, --max-clients and --history under load."""

    def test_rate(self) -> None:
        server = self.serve(*QUIET, "--rate", "50")
        clients = self.loaded(server)
        senders = [load.Sender(peer, i, 64) for i, peer in enumerate(clients.join(10))]
        start = time.monotonic()
        for sender in senders:
            sender.count = 250
            sender.peer.send(b"".join([load.numbered(sender.number, number, 64) for number in range(250)]))
        self.settle(clients, senders)
        seconds = time.monotonic() - start
        self.report(f"250 messages of 10 clients at 50 a second: {seconds:.2f} s")
        self.assertGreater(seconds, 3.8)  # a second's worth may come at once
        self.assertLess(seconds, 5.5)

    def test_rate_and_gone(self) -> None:
        """Who has left with much unsaid keeps nothing."""
        server = self.serve(*QUIET, "--rate", "20")
        clients = self.loaded(server)
        (sender,) = self.pace(clients, 1, 64, 10)
        before = load.threads(server.pid), load.files(server.pid)
        (gone,) = clients.join(1)
        gone.send(b"".join([load.numbered(9, number, 64) for number in range(800)]))
        clients.run(lambda: sender.stream.next.get(9) or sender.stream.messages > 2, meanwhile=sender.go_on)
        start = time.monotonic()
        gone.reset()
        clients.run(lambda: (load.threads(server.pid), load.files(server.pid)) == before, 5, sender.go_on)
        self.report(f"thread and descriptor free after {time.monotonic() - start:.2f} s")

    def test_max_clients(self) -> None:
        server = self.serve(*QUIET, "--max-clients", "50")
        clients = self.loaded(server)
        chat = self.chat(clients)
        for _ in range(3):
            crowd = [clients.start() for _ in range(200)]
            clients.run(lambda: all(peer.open or peer.ended for peer in crowd), meanwhile=go_on(chat))  # noqa: B023
            inside = [peer for peer in crowd if peer.open]
            self.assertEqual(len(inside), 48)
            self.assertEqual({peer.status for peer in crowd if not peer.open}, {503})
            for peer in inside:
                peer.reset()
            clients.run(lambda: self.number(server) == 2, meanwhile=go_on(chat))
        self.settle(clients, chat)
        self.report(f"48 of 200 got in, three times; {server.log().count(chr(10))} lines in the log")
        self.assertLessEqual(server.log().count("\n"), 80)

    def test_history(self) -> None:
        """Each new client gets the last hundred messages first, then all that follow."""
        server = self.serve(*QUIET, "--history", "100")
        clients = self.loaded(server)
        senders = self.pace(clients, 3, 40, 300)
        clients.run_for(0.5, go_on(senders))
        joiners: list[tuple[load.Peer, load.Stream]] = []

        def join() -> None:
            go_on(senders)()
            if len(joiners) < 300:
                peer, stream = clients.start(), load.Stream(40)
                peer.take = stream.take
                joiners.append((peer, stream))

        clients.run_for(3, join)
        self.settle(clients, senders)
        clients.run(lambda: all(stream.next == senders[0].stream.next for _, stream in joiners))
        fewest = min(stream.messages for _, stream in joiners)
        self.report(f"{len(joiners)} joined, the last of them got {fewest} messages")
        self.assertGreaterEqual(fewest, 100)


class SecureTest(FaultTestCase):
    """wss://."""

    def test_both_directions_at_once(self) -> None:
        """Each client's TLS is read in its own thread and written in any."""
        cert, key, context = certificate()
        seconds = float(os.environ.get("PYWEBSOCK_STRESS", "12"))
        server = self.serve(*QUIET, "--cert", cert, "--key", key)
        for version, size in ((ssl.TLSVersion.TLSv1_2, 5000), (ssl.TLSVersion.TLSv1_3, 100), (None, 30000)):
            if version:
                context.minimum_version = context.maximum_version = version
            clients = self.loaded(server, context)
            peers = clients.join(12, tls=True)
            senders = [load.Sender(peer, i, size, at_once=8) for i, peer in enumerate(peers)]
            for sender in senders:
                sender.go_on()
            clients.run_for(seconds / 3)
            self.settle(clients, senders)
            delays = list(itertools.chain.from_iterable(sender.stream.delays for sender in senders))
            rate = sum(sender.stream.messages for sender in senders) * size / seconds * 3 / 1e6
            self.report(f"{version or 'any version'}, {size} bytes: {rate:.0f} MB/s delivered; {quantiles(delays)}")
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
            for peer in peers:
                peer.reset()

    def test_broken_records(self) -> None:
        """One whose TLS breaks is lost, and nobody misses a message on its account."""
        cert, key, context = certificate()
        server = self.serve(*QUIET, "--cert", cert, "--key", key)
        clients = self.loaded(server, context)
        senders = self.pace(clients, 3, 200, 700, tls=True)
        broken: list[load.Peer] = []

        def breaking() -> None:
            go_on(senders)()
            for peer in broken:
                if peer.open and not peer.ended:
                    os.write(peer.socket.fileno(), b"\x17\x03\x03\x00\x40" + random.randbytes(64))
                    peer.pace = 0.1  # it sees what comes of it later
                    peer.end("broken")
            if sum(not peer.ended for peer in broken) < 3:
                broken.append(clients.start(tls=True))

        clients.run_for(5, breaking)
        self.settle(clients, senders)
        self.report(f"{len(broken)} broken; worst delay of others {max(s.stream.worst for s in senders):.3f} s")
        self.assertGreater(len(broken), 50)

    def test_strangers(self) -> None:
        """Plain HTTP, garbage and silence where TLS is spoken; old versions are refused."""
        cert, key, context = certificate()
        code = "pywebsock.BroadcastServer.handshake_timeout = 1"
        server = self.serve("--cert", cert, "--key", key, code=code)
        clients = self.loaded(server, context)
        chat = self.chat(clients, tls=True)
        raw = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", random.randbytes(500))
        strangers = [clients.start(raw=raw[i % 4]) for i in range(100)]
        clients.run(lambda: all(peer.ended for peer in strangers), 8, go_on(chat))
        self.settle(clients, chat)
        self.report(f"others: {quantiles([delay for sender in chat for delay in sender.stream.delays])}")
        old = ssl.create_default_context(cafile=cert)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of an old version: that is the point
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            support.Client(server.port, tls=old)
        status, _, body = support.exchange(
            server.port, support.request(Upgrade=None, Sec_WebSocket_Key=None), tls=context
        )
        self.assertEqual((status, b"</html>" in body), (200, True))
        self.assertLessEqual(server.log().count("\n"), 45)


class StopTest(FaultTestCase):
    """Stopping at the worst moment."""

    def check(self, number: int, *, stuck: int, tls: bool = False) -> None:
        """Under full load, with stuck clients and some that are just joining."""
        cert, key, context = certificate() if tls else ("", "", None)
        server = self.serve(*QUIET, "--max-backlog", "1G", *(("--cert", cert, "--key", key) if tls else ()))
        clients = self.loaded(server, context)
        senders = [load.Sender(peer, i, 2000, at_once=8) for i, peer in enumerate(clients.join(20, tls=tls))]
        for sender in senders:
            sender.go_on()
        joining: list[tuple[load.Peer, load.Stream]] = []

        def join() -> None:
            """Also answer a Close."""
            waiting = sum(not peer.open for peer, _ in joining if not peer.ended)
            for _ in range(0 if len(joining) > 3000 else 10 - waiting):
                peer, stream = clients.start(tls=tls), load.Stream(2000)
                peer.take = stream.take
                joining.append((peer, stream))
            for peer, stream in [(sender.peer, sender.stream) for sender in senders] + joining:
                if stream.close and not answered.get(peer):
                    answered[peer] = True
                    peer.send(load.frame(b"\x03\xe9", 8))
            for peer, stream in joining[:-40]:
                if not answered.get(peer) and stream.messages > 20:
                    peer.reset()

        answered: dict[load.Peer, bool] = {}
        clients.run_for(1.2, join)
        for peer in clients.join(stuck, small=True, tls=tls):
            peer.stop_reading()
        clients.run_for(0.3, join)
        server.send_signal(number)
        start = time.monotonic()
        clients.run(lambda: all(sender.peer.ended for sender in senders), 8, join)
        everybody = time.monotonic() - start
        clients.run(lambda: all(peer.ended for peer, _ in joining), 8)
        status = server.wait()
        seconds = time.monotonic() - start
        self.report(f"{len(joining)} joined; the last Close after {everybody:.2f} s, the end after {seconds:.2f} s")
        self.assertEqual(status, 0, server.log())
        self.assertLess(seconds, 6.5 if stuck else 3)
        self.assertGreater(seconds, 4.5 if stuck else 0)  # it was stuck indeed
        self.assertEqual({sender.stream.close for sender in senders}, {GOING_AWAY})
        self.assertEqual(len({sender.stream.digest for sender in senders}), 1, "not all got all that was queued")
        missed = [
            peer for peer, stream in joining if peer.open and peer.ended != "reset" and stream.close != GOING_AWAY
        ]
        self.assertEqual([(peer.ended, peer.received) for peer in missed], [])
        again = self.serve("--port", str(server.port))  # at once
        self.assertEqual(again.port, server.port)

    def test_term(self) -> None:
        self.check(signal.SIGTERM, stuck=0)

    def test_interrupt_with_stuck_clients(self) -> None:
        self.check(signal.SIGINT, stuck=3)

    def test_term_with_tls(self) -> None:
        self.check(signal.SIGTERM, stuck=1, tls=True)

    def test_second_interrupt(self) -> None:
        """Does not wait for anybody."""
        server = support.Process(*QUIET)
        clients = self.loaded(server)
        clients.join(20)
        server.send_signal(signal.SIGINT)
        support.eventually(lambda: "stopping" in server.log(), "it does not say that it stops")
        start = time.monotonic()
        server.send_signal(signal.SIGINT)
        status = server.wait()
        seconds = time.monotonic() - start
        self.report(f"the end after {seconds:.2f} s, status {status}")
        self.assertNotIn("Traceback", server.log())
        self.assertLess(seconds, 1)

    def test_at_once_after_the_start(self) -> None:
        for _ in range(20):
            server = support.Process()
            server.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(), 0, server.log())


class SoakTest(FaultTestCase):
    """Everything at once; the long form is `python -m tests.tools.soak 600`."""

    def test_soak(self) -> None:
        cert, key, context = certificate()
        seconds = float(os.environ.get("PYWEBSOCK_SOAK", "30"))
        with soak.plain_memory():
            servers = self.serve("--ping", "2"), self.serve("--cert", cert, "--key", key)
        self.report(soak.soak(*servers, context, seconds))

    def test_sanity(self) -> None:
        """The same with python -X dev -W error: nothing is left open, no exception gets lost."""
        cert, key, context = certificate()
        dev = ("-X", "dev", "-W", "error")
        with soak.plain_memory():
            servers = self.serve(python=dev), self.serve("--cert", cert, "--key", key, python=dev)
        self.report(soak.soak(*servers, context, 8))

    def test_nothing_is_left_in_this_process(self) -> None:
        before = load.threads(os.getpid()), load.files(os.getpid())
        for _ in range(3):
            with support.running(pywebsock.BroadcastServer) as server, load.Load(server.server_address[1]) as clients:
                senders = [load.Sender(peer, i, 64, at_once=1) for i, peer in enumerate(clients.join(30))]
                clients.run_for(0.5, go_on(senders))
        support.eventually(lambda: (load.threads(os.getpid()), load.files(os.getpid())) == before)

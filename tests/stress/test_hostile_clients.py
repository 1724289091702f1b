"""Hostile clients on the open internet: slow requests, floods, compression bombs, bytes that are not HTTP."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import statistics
import time
import typing
import zlib

from tests.tools import load, support
from tests.tools.stress import QUIET, StressTestCase, go_on, heavy, quantiles


@heavy
class HostileClients(StressTestCase):
    """Hostile clients do not delay the others."""

    def attack(
        self,
        seconds: float,
        attack: typing.Callable[[load.Load], typing.Callable[[], object]],
        *arguments: str,
        code: str = "",
        memory: float = 40,
        worst: float = 0.5,
    ) -> support.Process:
        """Run an attack beside a chat: the log stays short, memory bounded, and threads and descriptors are freed."""
        server = self.serve(*arguments, code=code)
        clients = self.clients(server)
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
        support.eventually(lambda: load.threads(server.pid) == 2, "threads of attackers are left")
        return server

    def test_dribbled_headers(self) -> None:
        """Requests that come byte by byte: one deadline holds for the whole head."""
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
        """Send the same frames again and again, as fast as possible."""

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
        """Three clients keep the server busy in a room of three hundred."""
        server = self.serve(*QUIET)
        clients = self.clients(server)
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
        codes = {bytes(closes[peer]).rpartition(b"\x03\xf1")[1] for peer in ended if closes[peer]}
        self.assertEqual(codes, {b"\x03\xf1"}, "1009")

    def test_storm(self) -> None:
        """Of 2000 connections at once, none is refused."""
        server = self.serve()
        clients = self.clients(server)
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
        support.eventually(lambda: load.threads(server.pid) == 2, "threads of attackers are left")
        support.eventually(lambda: self.number(server) == len(chat), "connections of attackers are left")

"""SIGTERM and Ctrl-C under load."""

from __future__ import annotations

import collections
import functools
import os
import random
import signal
import time

from tests.tools import load, support
from tests.tools.stress import QUIET, TROUBLE, StressTestCase, heavy


@heavy
class Stopping(StressTestCase):
    """Stopping under load."""

    def check(self, number: int, *, stuck: int, tls: bool = False) -> None:
        """Stop the server under full load, with stuck clients and clients that are joining."""
        server = self.serve(*QUIET, "--max-backlog", "1G", tls=tls)
        clients = self.clients(server)
        senders = [load.Sender(peer, i, 2000, at_once=8) for i, peer in enumerate(clients.join(20, tls=tls))]
        for sender in senders:
            sender.go_on()
        joining: list[tuple[load.Peer, load.Stream]] = []

        def join() -> None:
            """Join, and answer a Close."""
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
        self.assertGreater(seconds, 4.5 if stuck else 0)  # the client was stuck
        self.assertEqual({sender.stream.close for sender in senders}, {load.GOING_AWAY})
        self.assertEqual(len({sender.stream.digest for sender in senders}), 1, "some queued messages are lost")
        missed = [
            peer for peer, stream in joining if peer.open and peer.ended != "reset" and stream.close != load.GOING_AWAY
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
        """The second Ctrl-C stops the server at once, without waiting for clients."""
        server = support.Process(*QUIET)
        clients = self.clients(server)
        clients.join(20)
        server.send_signal(signal.SIGINT)
        support.eventually(lambda: "stopping" in server.log(), "the log does not say that it stops")
        start = time.monotonic()
        server.send_signal(signal.SIGINT)
        status = server.wait()
        seconds = time.monotonic() - start
        self.report(f"the end after {seconds:.2f} s, status {status}")
        self.assertNotIn("Traceback", server.log())
        self.assertLess(seconds, 1)

    def test_at_random_moments(self) -> None:
        """Ctrl-C and SIGTERM while clients join and send: clients in the room get 1001, and the server ends soon."""
        chance = random.Random(8)
        number = int(os.environ.get("PYWEBSOCK_SIGNALS", "100"))
        worst = 0.0
        counts: collections.Counter[str] = collections.Counter()
        for _ in range(number):
            signal_number = chance.choice((signal.SIGINT, signal.SIGTERM))
            worst = max(worst, self.stop_at(signal_number, chance.random() * 0.1, counts))
        self.report(f"{number} signals: the last end after {worst:.2f} s; {dict(counts)}")
        self.assertGreater(counts["1001"], number)

    def stop_at(self, number: int, moment: float, counts: collections.Counter[str]) -> float:
        """Send a signal some seconds after the first client has joined; return the time until the end."""
        server = support.Process("--ping", "0")
        self.addCleanup(server.kill)
        clients = self.clients(server)
        ends: dict[load.Peer, bytes] = {}

        def take(peer: load.Peer, data: bytes) -> None:
            ends[peer] = (ends[peer] + data)[-4:]
            if ends[peer] == load.GOING_AWAY:
                peer.send(load.frame(b"\x03\xe9", 8))

        def join() -> None:
            for peer in [peer for peer in clients.peers if peer.open]:
                if not peer.unsent and not ends[peer]:
                    peer.send(load.frame(b"hello"))
            if len(ends) < 30:
                peer = clients.start()
                ends[peer], peer.take = b"", functools.partial(take, peer)

        clients.run_for(moment, join)
        server.send_signal(number)
        start = time.monotonic()
        clients.run(lambda: not clients.peers)
        self.assertEqual((server.wait(), TROUBLE.findall(server.log())), (0, []), server.log())
        inside = [peer for peer in ends if peer.open]
        self.assertEqual([(peer.ended, ends[peer]) for peer in inside if ends[peer] != load.GOING_AWAY], [])
        counts["1001"] += len(inside)
        counts["not in yet"] += len(ends) - len(inside)
        clients.selector.close()
        return time.monotonic() - start

    def test_at_once_after_the_start(self) -> None:
        for _ in range(20):
            server = support.Process()
            server.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(), 0, server.log())

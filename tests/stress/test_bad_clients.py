"""What else strangers do: they all ask, knock, shout, leave half, and read nothing, and somebody honest is in between.

Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import os
import random
import socket
import time
import typing

from tests.tools import load, stress, support

DEFLATE = "permessage-deflate"


@stress.heavy
class CrowdedTest(stress.StressTestCase):
    """More than fit."""

    def test_join_past_the_silent(self) -> None:
        """All places are taken by connections that say nothing: one of them goes for who comes."""
        watched = self.serve_watched("--max-clients", "100")
        crowd = self.crowd(watched)
        crowd.connect(500)
        time.sleep(1.5)  # those that had time to say something
        start = time.monotonic()
        with support.Client(watched.port) as client:
            client.send("hello")
            while client.read() != "hello":
                pass
        took = time.monotonic() - start
        self.report(f"joined after {took:.2f} s")
        crowd.reset()
        self.check_recovery(watched, "500 silent connections where 210 fit")
        self.assertLess(took, 5)

    def test_as_many_as_there_are_descriptors(self) -> None:
        """Connections that say nothing, from as many addresses as it takes."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        number = min(20_000, stress.descriptors() - 500)
        for i in range(0, number, 5000):
            crowd.connect(min(5000, number - i), f"127.0.0.{i // 5000 + 2}")
        self.check_health(watched, f"{number} connected", 1.0)
        time.sleep(3)
        crowd.reset()
        self.check_recovery(watched, f"{number} that said nothing", 1.0, within=90)

    def test_coming_and_going(self) -> None:
        """Thousands join, leave in every way, and are stuck, all at once."""
        watched = self.serve_watched()
        clients, chance = self.clients(watched), random.Random(1)
        peers: list[load.Peer] = []
        count = [0, 0]

        def go_on() -> None:
            for _ in range(40):
                if len(clients.peers) < 5000:
                    peer = clients.start(small=chance.random() < 0.3)
                    if chance.random() < 0.3:
                        peer.stop_reading()
                    peers.append(peer)
                    count[0] += 1
            for _ in range(20 if len(peers) > 1000 else 0):
                peer = peers.pop(chance.randrange(len(peers)))
                if not peer.ended:
                    count[1] += 1
                    chance.choice((peer.reset, peer.stop_reading, self.say_goodbye(peer), self.say_nonsense(peer)))()

        clients.run_for(6, go_on)
        self.check_health(watched, f"{count[0]} came, {count[1]} went or got stuck", 1.0)
        clients.__exit__()
        self.check_recovery(watched, "thousands came and went", 1.0, within=60)

    def say_goodbye(self, peer: load.Peer) -> typing.Callable[[], None]:
        """A way to leave."""
        return lambda: peer.send(load.frame(b"\x03\xe8", 8))

    def say_nonsense(self, peer: load.Peer) -> typing.Callable[[], None]:
        """Another one."""
        return lambda: peer.send(b"\xff\xff")


@stress.heavy
class BusyTest(stress.StressTestCase):
    """What keeps the interpreter busy."""

    def test_tiny_fragments_in_a_crowd(self) -> None:
        """Nobody may have the loop for long."""
        watched = self.serve_watched()
        crowd, clients = self.crowd(watched), self.clients(watched)
        crowd.join(1000)
        peers = clients.join(10)
        for peer in peers:
            peer.send(support.masked_frame(2, fin=False))
        self.flood(watched, clients, peers, support.masked_frame(0, fin=False) * 40_000)
        crowd.reset()
        self.check_recovery(watched, "ten who send empty fragments, in a room of a thousand")

    def test_pings_in_a_crowd(self) -> None:
        watched = self.serve_watched()
        crowd, clients = self.crowd(watched), self.clients(watched)
        crowd.join(1000)
        self.flood(watched, clients, clients.join(10), support.masked_frame(9) * 40_000)
        crowd.reset()
        self.check_recovery(watched, "ten who ping, in a room of a thousand")

    def test_pings_of_those_who_do_not_read(self) -> None:
        watched = self.serve_watched()
        clients = self.clients(watched)
        peers = clients.join(10, small=True)
        for peer in peers:
            peer.stop_reading()
        self.flood(watched, clients, peers, support.masked_frame(9, b"x" * 125) * 2000)
        self.check_recovery(watched, "ten who ping and do not read")

    def flood(
        self, watched: stress.WatchedServer, clients: load.Load, peers: typing.Sequence[load.Peer], data: bytes
    ) -> None:
        """As much as they can send, for three seconds."""
        watched.witness.figures()

        def go_on() -> None:
            for peer in peers:
                if not peer.unsent and not peer.ended:
                    peer.send(data)

        clients.run_for(3, go_on)
        self.assertEqual([peer.ended for peer in peers if peer.ended], [])
        clients.__exit__()

    def test_bombs(self) -> None:
        """Messages of 16 KB that are 16 MB, complete."""
        watched = self.serve_watched()
        clients = self.clients(watched)
        payload = support.compress(bytes(16_000_000))
        bomb = support.masked_frame(2, rsv=4, length=len(payload), key=bytes(4)) + payload
        for _ in range(3):
            for peer in clients.join(20, Sec_WebSocket_Extensions=DEFLATE):
                peer.send(bomb)
            clients.run_for(2)
            for peer in tuple(clients.peers):
                peer.reset()
        self.check_recovery(watched, "three times 20 bombs", 1.0, 700)  # of which 300 are what malloc keeps

    def test_every_window(self) -> None:
        """Large messages that do not compress, for each window of permessage-deflate."""
        watched = self.serve_watched()
        clients = self.clients(watched)
        for window in range(9, 16):
            clients.join(1, Sec_WebSocket_Extensions=f"{DEFLATE}; server_max_window_bits={window}")
        message = load.frame(os.urandom(1 << 20) * 15)
        for peer in clients.join(2):
            peer.send(message * 2)
        clients.run_for(5)
        clients.__exit__()
        self.check_recovery(watched, "four messages of 15 MiB for seven windows", 1.0)


@stress.heavy
class HalfTest(stress.StressTestCase):
    """Those who do not do their part."""

    def test_half_closed(self) -> None:
        """They end their sides right after the handshake and stay."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.join(1000)
        for one in crowd.sockets:
            one.shutdown(socket.SHUT_WR)
        self.check_recovery(watched, "1,000 half-closed clients", within=stress.CLOSE_TIMEOUT + 3)

    def test_answers_that_nobody_reads(self) -> None:
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(1000)
        crowd.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        self.check_recovery(watched, "1,000 pages that nobody reads", within=stress.CLOSE_TIMEOUT + 3)

    def test_pipelined(self) -> None:
        """A handshake, a Close, and 20 handshakes behind it."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(500)
        crowd.send(support.request() + support.masked_frame(8, b"\x03\xe8") + support.request() * 20)
        self.check_recovery(watched, "500 that pipeline handshakes", within=stress.CLOSE_TIMEOUT + 3)

    def test_dribbled_bodies(self) -> None:
        """POSTs that send a byte now and then have their time, and no more."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(300)
        crowd.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(12):
            crowd.send(b"x")
            time.sleep(1)
        self.check_recovery(watched, "300 POSTs of a byte a second", within=stress.CLOSE_TIMEOUT + 3)

    def test_resets_in_each_phase(self) -> None:
        """A reset after each number of bytes of a handshake and a message."""
        watched = self.serve_watched()
        whole = support.request() + support.masked_frame(1, b"hello") + support.masked_frame(8, b"\x03\xe8")
        for _ in range(3):
            crowd = self.crowd(watched)
            crowd.connect(len(whole))
            for i, one in enumerate(crowd.sockets):
                one.send(whole[: i + 1])
            crowd.reset()
        self.check_recovery(watched, f"{3 * len(whole)} resets")

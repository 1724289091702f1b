"""Clients that misbehave in large numbers: silent, stuck, half-closed, flooding. A witness must not notice them.

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
class FullTest(stress.StressTestCase):
    """More connections than the server accepts."""

    def test_join_a_full_server(self) -> None:
        """If all places are taken by silent connections, one of them is ended for a new client."""
        watched = self.serve_watched("--max-clients", "100")
        crowd = self.crowd(watched)
        crowd.connect(500)
        time.sleep(1.5)  # a pending handshake is ended if it is older than a second
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
        """Silent connections, from several addresses, use up the file descriptors."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        number = min(20_000, stress.descriptors() - 500)
        for i in range(0, number, 5000):
            crowd.connect(min(5000, number - i), f"127.0.0.{i // 5000 + 2}")
        self.check_health(watched, f"{number} connected", 1.0)
        time.sleep(3)
        crowd.reset()
        self.check_recovery(watched, f"{number} silent connections", 1.0, within=90)

    def test_coming_and_going(self) -> None:
        """Thousands of clients join, leave in many ways, and stop reading, at the same time."""
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
                    chance.choice((peer.reset, peer.stop_reading, self.close(peer), self.send_garbage(peer)))()

        clients.run_for(6, go_on)
        self.check_health(watched, f"{count[0]} joined, {count[1]} left or got stuck", 1.0)
        clients.__exit__()
        self.check_recovery(watched, "thousands joined and left", 1.0, within=60)

    def close(self, peer: load.Peer) -> typing.Callable[[], None]:
        """Return a function that sends a Close."""
        return lambda: peer.send(load.frame(b"\x03\xe8", 8))

    def send_garbage(self, peer: load.Peer) -> typing.Callable[[], None]:
        """Return a function that sends an invalid frame."""
        return lambda: peer.send(b"\xff\xff")


@stress.heavy
class BusyTest(stress.StressTestCase):
    """Data that costs the server much time."""

    def test_tiny_fragments_in_a_crowd(self) -> None:
        """No client keeps the loop busy for long."""
        watched = self.serve_watched()
        crowd, clients = self.crowd(watched), self.clients(watched)
        crowd.join(1000)
        peers = clients.join(10)
        for peer in peers:
            peer.send(support.masked_frame(2, fin=False))
        self.flood(watched, clients, peers, support.masked_frame(0, fin=False) * 40_000)
        crowd.reset()
        self.check_recovery(watched, "ten clients that send empty fragments, in a room of a thousand")

    def test_pings_in_a_crowd(self) -> None:
        watched = self.serve_watched()
        crowd, clients = self.crowd(watched), self.clients(watched)
        crowd.join(1000)
        self.flood(watched, clients, clients.join(10), support.masked_frame(9) * 40_000)
        crowd.reset()
        self.check_recovery(watched, "ten clients that send Pings, in a room of a thousand")

    def test_pings_without_reading(self) -> None:
        watched = self.serve_watched()
        clients = self.clients(watched)
        peers = clients.join(10, small=True)
        for peer in peers:
            peer.stop_reading()
        self.flood(watched, clients, peers, support.masked_frame(9, b"x" * 125) * 2000)
        self.check_recovery(watched, "ten clients that send Pings and do not read")

    def flood(
        self, watched: stress.WatchedServer, clients: load.Load, peers: typing.Sequence[load.Peer], data: bytes
    ) -> None:
        """Let clients send as much as they can for three seconds."""
        watched.witness.figures()

        def go_on() -> None:
            for peer in peers:
                if not peer.unsent and not peer.ended:
                    peer.send(data)

        clients.run_for(3, go_on)
        self.assertEqual([peer.ended for peer in peers if peer.ended], [])
        clients.__exit__()

    def test_bombs(self) -> None:
        """Complete messages of 16 KB that inflate to 16 MB."""
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
        self.check_recovery(watched, "three times 20 bombs", 1.0, 700)  # malloc keeps 300

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
class IncompleteTest(stress.StressTestCase):
    """Clients that do not finish an exchange."""

    def test_half_closed(self) -> None:
        """Clients that half-close the connection after the handshake."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.join(1000)
        for one in crowd.sockets:
            one.shutdown(socket.SHUT_WR)
        self.check_recovery(watched, "1,000 half-closed clients", within=stress.CLOSE_TIMEOUT + 3)

    def test_responses_without_reading(self) -> None:
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(1000)
        crowd.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        self.check_recovery(watched, "1,000 responses without reading", within=stress.CLOSE_TIMEOUT + 3)

    def test_pipelined(self) -> None:
        """A handshake, a Close, and 20 more handshakes at once."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(500)
        crowd.send(support.request() + support.masked_frame(8, b"\x03\xe8") + support.request() * 20)
        self.check_recovery(watched, "500 that pipeline handshakes", within=stress.CLOSE_TIMEOUT + 3)

    def test_dribbled_bodies(self) -> None:
        """Slow POSTs are ended at the timeout."""
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

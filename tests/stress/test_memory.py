"""Memory that clients can use: unfinished messages and bodies, backlogs, histories; and the delays for others.

Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import functools
import os
import time

from tests.tools import load, stress, support, witness

BOMB = 16 * 1024 * 1024 - 1  # bytes of an unfinished message
HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16777216\r\n\r\n"
# A network accepts less at once than the loopback interface.
SHORT_BUFFERS = """
import socket
bind = pywebsock.BroadcastServer.server_bind
def server_bind(self):
    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    bind(self)
pywebsock.BroadcastServer.server_bind = server_bind
"""


@functools.cache
def fragment() -> bytes:
    """Return a compressed fragment, not the last one, of 16 KB that inflates to 16 MB."""
    payload = support.compress(bytes(BOMB))
    return support.masked_frame(2, fin=False, rsv=4, length=len(payload), key=bytes(4)) + payload


@stress.heavy
class UnfinishedTest(stress.StressTestCase):
    """Messages and bodies that do not end."""

    def hold(self, watched: stress.WatchedServer, clients: load.Load, what: str, number: int) -> None:
        """After the attackers have sent all their data, another client can join, and the server recovers."""
        clients.run_for(3)
        held = len(clients.peers)
        support.Client(watched.port).__exit__()  # another client can join
        clients.__exit__()
        self.check_recovery(watched, f"{what}: {held} of {number} were still there", 2.0)  # a hundred clients flood

    def test_compressed_fragments(self) -> None:
        watched = self.serve_watched()
        clients = self.clients(watched)
        for peer in clients.join(150, Sec_WebSocket_Extensions="permessage-deflate"):
            peer.send(fragment())
        self.hold(watched, clients, "150 compressed fragments of 16 KB", 150)

    def test_compressed_fragments_in_single_bytes(self) -> None:
        """One byte at a time: each shows that the client is alive."""
        watched = self.serve_watched()
        clients = self.clients(watched)
        peers = clients.join(150, Sec_WebSocket_Extensions="permessage-deflate")
        whole = fragment()
        for peer in peers:
            peer.send(whole[:-100])
        for i in range(-100, -60):
            clients.run_for(0.05)
            for peer in tuple(clients.peers):
                peer.send(whole[i : i + 1])
        self.hold(watched, clients, "150 compressed fragments that go on", 150)

    def test_frames(self) -> None:
        """Without compression, the attacker sends as many bytes as the server keeps."""
        watched = self.serve_watched()
        clients = self.clients(watched)
        whole = support.masked_frame(2, length=BOMB + 1, key=bytes(4)) + bytes(BOMB)
        for peer in clients.join(100):
            peer.send(whole)
        clients.run_for(10)  # clients above the budget are not read
        self.hold(watched, clients, "100 frames without their last byte", 100)

    def test_posts(self) -> None:
        watched = self.serve_watched("--max-clients", "10")
        clients = self.clients(watched)
        whole = HEAD + bytes(BOMB)
        for _ in range(200):
            clients.start(raw=whole)
        clients.run(lambda: not any(peer.unsent for peer in clients.peers), 60)
        self.hold(watched, clients, "200 POSTs without their last byte", 200)


@stress.heavy
class StuckTest(stress.StressTestCase):
    """Clients that do not read."""

    def test_tls(self) -> None:
        """Data for clients with TLS waits as plaintext, which all clients share."""
        watched = self.serve_watched(tls=True)
        clients = self.clients(watched)
        for peer in clients.join(100, tls=True, small=True):
            peer.stop_reading()
        sender = clients.join(1, tls=True, Sec_WebSocket_Extensions="permessage-deflate")[0]
        payload = support.compress(bytes(BOMB))
        sender.send(support.masked_frame(2, rsv=4, length=len(payload), key=bytes(4)) + payload)
        clients.run_for(3)
        clients.__exit__()
        self.check_recovery(watched, "16 MiB for 100 that do not read, over TLS")

    def test_history(self) -> None:
        """Ten clients a second join and do not read the history."""
        watched = self.serve_watched("--history", "1000")
        clients = self.clients(watched)
        sender = clients.join(1)[0]
        for _ in range(1000):
            sender.send(load.frame(os.urandom(16_000)))
        clients.run(lambda: sender.received > 15_900_000)
        watched.witness.figures()
        for _ in range(80):
            clients.start(small=True).stop_reading()
            clients.run_for(0.1)
        clients.__exit__()
        self.check_recovery(watched, "80 new clients that do not read 16 MB of history")

    def test_history_of_short_messages(self) -> None:
        """Three hundred thousand lines, and ten clients that join at the same time."""
        watched = self.serve_watched("--history", "300000")
        clients = self.clients(watched)
        sender = clients.join(1)[0]
        for _ in range(30):
            sender.send(b"".join(support.masked_frame(1, b"line %d" % number) for number in range(10_000)))
            expected = sender.received + 100_000
            clients.run(lambda expected=expected: sender.received > expected)  # type: ignore[misc]
        watched.witness.figures()
        for _ in range(10):
            clients.start()
        clients.run_for(2)
        clients.__exit__()
        self.check_recovery(watched, "300,000 short messages of history for 10 joiners")

    def push(self, watched: stress.WatchedServer, size: int, pace: float) -> witness.Pusher:
        """Start a client that sends this number of bytes a second."""
        pusher = witness.Pusher(watched.port, size, pace)
        self.addCleanup(pusher.end)
        return pusher

    def test_reconnecting_in_a_fast_room(self) -> None:
        """Clients that do not read, are dropped, and connect again at once."""
        watched = self.serve_watched("--no-compression")
        pusher, clients = self.push(watched, 256 * 1024, 200e6), self.clients(watched)
        clients.run_for(1)
        self.check_health(watched, "200 MB/s")
        pusher.rate()
        for _ in range(20):
            clients.join(1, small=True)[0].stop_reading()
            clients.run_for(0.2)
        rate = pusher.rate()
        clients.__exit__()
        pusher.end()
        self.check_recovery(watched, f"{rate:.0f} of 200 MB/s, and clients that do not read connect again and again")
        self.assertGreater(rate, 150, "MB a second, of 200")

    def test_slow_reader_with_a_short_backlog(self) -> None:
        """A client counts as quick for any value of --max-backlog."""
        watched = self.serve_watched("--no-compression", "--max-backlog", "64K", code=SHORT_BUFFERS)
        pusher, clients = self.push(watched, 4096, 1e6), self.clients(watched)
        clients.run_for(0.5)
        clients.join(1, small=True)[0].read_at(150_000)
        pusher.rate()
        clients.run_for(3)
        rate = pusher.rate()
        self.check_health(watched, f"{rate:.1f} of 1 MB/s beside a reader of 0.15 MB/s")
        self.assertGreater(rate, 0.8, "MB a second, of 1")
        pusher.end()
        self.stop(watched)

    def test_joins_and_closes_beside_a_quick_reader(self) -> None:
        """A quick reader that is behind delays senders, but not handshakes or closes."""
        watched = self.serve_watched("--no-compression")
        pusher, clients = self.push(watched, 64 * 1024, 1e9), self.clients(watched)
        clients.join(1)[0].read_at(20e6)
        clients.run_for(1)
        spent = []
        for _ in range(10):
            start = time.monotonic()
            peer = clients.join(1)[0]
            spent.append(time.monotonic() - start)
            start = time.monotonic()
            peer.send(load.frame(b"", 8))
            clients.run(functools.partial(getattr, peer, "ended"), 30)
            spent.append(time.monotonic() - start)
        self.report(f"worst join {max(spent[::2]):.3f} s, close {max(spent[1::2]):.3f} s")
        self.assertLess(max(spent), 0.5)
        self.check_health(watched, "beside a quick reader", worst=1.5, growth=150)  # the witness waits, too
        pusher.end()
        self.stop(watched)

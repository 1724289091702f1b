"""SIGTERM during an attack: exit status 0, and 1001 for all clients that read, within the close timeout.

Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import typing

from tests.tools import load, stress, support, witness

HONEST = 20  # clients that listen
CLOSE_TIMEOUT = 1.0


@stress.heavy
class StopTest(stress.StressTestCase):
    """Each test starts an attack, lets it go on, and stops the server."""

    def begin(self, *arguments: str, code: str = "") -> None:
        """Start a server with a witness and idle listeners; prepare the attackers."""
        code += f"pywebsock.BroadcastServer.close_timeout = {CLOSE_TIMEOUT}\n"  # without it, this takes minutes
        self.watched = self.serve_watched(*arguments, code=code)
        self.honest = witness.Listeners(self.watched.port, HONEST)
        self.addCleanup(self.honest.kill)
        self.crowd_of_attackers = self.crowd(self.watched)
        self.attackers = self.clients(self.watched)

    def end(self, act: typing.Callable[[], object] = lambda: None, seconds: float = 1.0) -> None:
        """Stop the server, while another thread calls `act` again and again, before the signal and after it."""
        ended = threading.Event()

        def go_on() -> None:
            while not ended.is_set():
                with contextlib.suppress(OSError):
                    act()
                self.attackers.step()

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            time.sleep(seconds)
            self.stop(self.watched, self.honest, timeout=CLOSE_TIMEOUT)
        finally:
            ended.set()
            thread.join(support.DEADLINE)

    def test_resets(self) -> None:
        self.begin()
        self.crowd_of_attackers.join(2000)
        self.crowd_of_attackers.reset()
        self.end(seconds=0)

    def test_closes(self) -> None:
        """Clients that send a Close, and do not end their connections."""
        self.begin()
        self.crowd_of_attackers.join(2000)
        self.crowd_of_attackers.send(support.masked_frame(8, b"\x03\xe8"))
        self.end(seconds=0)

    def test_silence(self) -> None:
        self.begin()
        self.crowd_of_attackers.connect(2000)
        self.end()

    def test_joining(self) -> None:
        """Clients that join all the time."""
        self.begin()
        self.end(lambda: self.attackers.start() if len(self.attackers.peers) < 500 else self.leave(100))

    def leave(self, number: int) -> None:
        """End some of the attackers, each in one of several ways."""
        for i, peer in enumerate(tuple(self.attackers.peers)[:number]):
            if i % 2:
                peer.reset()
            else:
                peer.end("left")

    def test_unfinished_messages(self) -> None:
        self.begin()
        frame = support.masked_frame(2, length=16 * 1024 * 1024, key=bytes(4)) + bytes(1_000_000)
        for peer in self.attackers.join(100):
            peer.send(frame)
        self.end()

    def test_unfinished_posts(self) -> None:
        self.begin()
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
        for _ in range(200):
            self.attackers.start(raw=head + bytes(100_000))
        self.end()

    def test_dribbled_posts(self) -> None:
        """POSTs that come byte by byte, after the signal, too."""
        self.begin()
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n\r\n"
        for _ in range(200):
            self.attackers.start(raw=head)
        self.end(self.dribble)

    def dribble(self) -> None:
        """Send a byte on each connection."""
        time.sleep(0.02)
        for peer in tuple(self.attackers.peers):
            peer.send(b"x")

    def test_dribbled_requests(self) -> None:
        self.begin()
        for _ in range(200):
            self.attackers.start(raw=b"GET / HTTP/1.1\r\nX: ")
        self.end(self.dribble)

    def test_stuck(self) -> None:
        """Clients that do not read, in a fast room."""
        self.begin("--no-compression")
        pusher = witness.Pusher(self.watched.port, 65536, 20e6)
        self.addCleanup(pusher.end)
        for peer in self.attackers.join(20, small=True):
            peer.stop_reading()
        self.end(seconds=0.5)

    def test_tiny_frames(self) -> None:
        self.begin()
        peers = self.attackers.join(10)
        for peer in peers:
            peer.send(support.masked_frame(2, fin=False))
        self.end(lambda: self.flood(peers, support.masked_frame(0, fin=False) * 20_000))

    def flood(self, peers: typing.Sequence[load.Peer], data: bytes) -> None:
        """Send as much as the sockets accept."""
        for peer in peers:
            if not peer.ended and not peer.unsent:
                peer.send(data)

    def test_pings_and_no_reading(self) -> None:
        self.begin()
        peers = self.attackers.join(10, small=True)
        for peer in peers:
            peer.stop_reading()
        self.end(lambda: self.flood(peers, support.masked_frame(9, b"x" * 125) * 2000))

    def test_flood_after_the_close(self) -> None:
        """Clients that do not answer the Close, but send as much as they can."""
        self.begin()
        closed: list[load.Peer] = []

        def take(peer: load.Peer, data: bytes) -> None:
            if data.endswith(load.GOING_AWAY):
                closed.append(peer)

        for peer in self.attackers.join(5):
            peer.take = functools.partial(take, peer)
        self.end(lambda: self.flood(closed, load.frame(bytes(60_000)) * 10))
        self.assertEqual(len(closed), 5)

    def test_half_closed(self) -> None:
        """Clients that half-close the connection after the handshake."""
        self.begin()
        for peer in self.attackers.join(200):
            peer.socket.shutdown(1)
        self.end(seconds=0.1)

    def test_history(self) -> None:
        self.begin("--history", "100")
        sender = self.attackers.join(1)[0]
        for _ in range(100):
            sender.send(load.frame(os.urandom(80_000)))
        self.attackers.run(lambda: sender.received > 7_900_000)
        self.end(lambda: self.attackers.start(small=True).stop_reading() if len(self.attackers.peers) < 300 else None)

    def test_stuck_hooks(self) -> None:
        """Hooks that never return, and a hook that floods the room."""
        code = """
import threading
class Server(pywebsock.BroadcastServer):
    def on_message(self, client, message):
        if message == "sleep":
            threading.Event().wait()
        while message == "flood":
            self.broadcast("x" * 10000)
        self.broadcast(message)
    def on_close(self, client, code, reason):
        if client.target == "/close":
            threading.Event().wait()
for owner in list(vars(pywebsock).values()):
    if isinstance(owner, type) and issubclass(owner, pywebsock.BroadcastServer) and owner is not Server:
        owner.on_message, owner.on_close = Server.on_message, Server.on_close
"""
        self.begin("--no-compression", code=code)
        for peer in self.attackers.join(20):
            peer.send(load.frame(b"sleep", 1))
        for peer in self.attackers.join(20, target="/close"):
            peer.send(support.masked_frame(8))
        self.end()

    def test_flooding_hook(self) -> None:
        """A hook that sends forever to clients that do not read."""
        code = """
def on_message(self, client, message):
    while message == "flood":
        self.broadcast("x" * 10000)
    self.broadcast(message)
pywebsock.BroadcastServer.on_message = on_message
"""
        self.begin("--no-compression", code=code)
        self.attackers.join(1)[0].send(load.frame(b"flood", 1))
        self.end(seconds=0)

"""--rate, --max-clients and --history under load."""

from __future__ import annotations

import time

from tests.tools import load
from tests.tools.stress import QUIET, StressTestCase, go_on, heavy


@heavy
class Limits(StressTestCase):
    """--rate, --max-clients and --history under load."""

    def test_rate(self) -> None:
        server = self.serve(*QUIET, "--rate", "50")
        clients = self.clients(server)
        senders = [load.Sender(peer, i, 64) for i, peer in enumerate(clients.join(10))]
        start = time.monotonic()
        for sender in senders:
            sender.count = 250
            sender.peer.send(b"".join([load.numbered(sender.number, number, 64) for number in range(250)]))
        self.settle(clients, senders)
        seconds = time.monotonic() - start
        self.report(f"250 messages of 10 clients at 50 a second: {seconds:.2f} s")
        self.assertGreater(seconds, 3.8)  # a burst of one second is allowed
        self.assertLess(seconds, 5.5)

    def test_rate_and_gone(self) -> None:
        """A client that has left with unread messages keeps no file descriptor."""
        server = self.serve(*QUIET, "--rate", "20")
        clients = self.clients(server)
        (sender,) = self.pace(clients, 1, 64, 10)
        before = load.files(server.pid)
        (gone,) = clients.join(1)
        gone.send(b"".join([load.numbered(9, number, 64) for number in range(800)]))
        clients.run(lambda: sender.stream.next.get(9) or sender.stream.messages > 2, meanwhile=sender.go_on)
        start = time.monotonic()
        gone.reset()
        clients.run(lambda: load.files(server.pid) == before, 5, sender.go_on)
        self.report(f"descriptor free after {time.monotonic() - start:.2f} s")

    def test_max_clients(self) -> None:
        server = self.serve(*QUIET, "--max-clients", "50")
        clients = self.clients(server)
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
        """Each new client gets the last hundred messages first, then all later ones."""
        server = self.serve(*QUIET, "--history", "100")
        clients = self.clients(server)
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

"""Clients that do not read, or read slowly, while others send much."""

from __future__ import annotations

from tests.tools import load
from tests.tools.stress import QUIET, StressTestCase, go_on, heavy


@heavy
class SlowClients(StressTestCase):
    """A client that does not read delays no other."""

    def check_stuck(self, number: int, megabytes: float, seconds: float, *, tls: bool = False, code: str = "") -> None:
        """Send at a rate to all clients: stuck clients are dropped, the others are not delayed."""
        server = self.serve(*QUIET, tls=tls, code=code)
        clients = self.clients(server)
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

    def test_stuck_where_sends_are_cut(self) -> None:
        """Partial sends, as on Windows, where a socket accepts any number of bytes at once."""
        self.check_stuck(2, 20, 4, code="pywebsock.IS_WINDOWS = True")

    def test_slow_reader_loses_nothing_under_its_limit(self) -> None:
        server = self.serve(*QUIET)
        clients = self.clients(server)
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
        """A great number of small messages waits for a client: sending them later must not stop the room."""
        server = self.serve(*QUIET, "--max-backlog", "64M")
        clients = self.clients(server)
        (stuck,) = clients.join(1, small=True)
        (pusher,) = clients.join(1)
        stuck.stop_reading()
        pusher.send(load.frame(bytes(60000)) * 120)  # fills the kernel's buffer
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

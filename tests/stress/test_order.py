"""Many clients send as much as they can: no message is lost, and all clients get one order."""

from __future__ import annotations

import os

from tests.tools import load
from tests.tools.stress import QUIET, StressTestCase, heavy


@heavy
class Order(StressTestCase):
    """One order for all clients."""

    def test_many_senders(self) -> None:
        """One message at a time, many at a time, and messages that no socket accepts at once."""
        seconds = float(os.environ.get("PYWEBSOCK_STRESS", "12"))
        server = self.serve(*QUIET)
        for number, at_once, size in ((100, 1, 64), (30, 32, 64), (10, 8, 30_000)):
            clients = self.clients(server)
            joined = enumerate(clients.join(number))
            senders = [load.Sender(peer, i, size, at_once=at_once) for i, peer in joined]
            for sender in senders:
                sender.go_on()
            clients.run_for(seconds / 3)
            self.settle(clients, senders)
            total = sum(sender.count for sender in senders)
            self.report(f"{number} clients, {at_once} at once, {size} bytes: {total * number} messages in one order")
            self.assertGreater(total, number * at_once)  # each has sent more when its first came back
            clients.__exit__()

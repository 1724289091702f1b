"""Mixed traffic leaves no memory, thread or file descriptor behind."""

from __future__ import annotations

import os

import pywebsock
from tests.tools import load, soak, support
from tests.tools.stress import StressTestCase, certificate, go_on, heavy


@heavy
class Soak(StressTestCase):
    """All kinds of traffic at once; for a longer run, `python -m tests.tools.soak 600`."""

    def test_soak(self) -> None:
        cert, context = certificate()
        seconds = float(os.environ.get("PYWEBSOCK_SOAK", "30"))
        servers = self.serve("--ping", "2", code=soak.TRIM), self.serve("--cert", cert, code=soak.TRIM)
        self.report(soak.soak(*servers, context, seconds))

    def test_sanity(self) -> None:
        """The same with python -X dev -W error: no file stays open, no exception is lost."""
        cert, context = certificate()
        dev = ("-X", "dev", "-W", "error")
        servers = self.serve(python=dev, code=soak.TRIM), self.serve("--cert", cert, python=dev, code=soak.TRIM)
        self.report(soak.soak(*servers, context, 8))

    def test_nothing_is_left_in_this_process(self) -> None:
        before = load.threads(os.getpid()), load.files(os.getpid())
        for _ in range(3):
            with support.running(pywebsock.BroadcastServer) as server, load.Load(server.server_address[1]) as clients:
                senders = [load.Sender(peer, i, 64, at_once=1) for i, peer in enumerate(clients.join(30))]
                clients.run_for(0.5, go_on(senders))
        support.eventually(lambda: (load.threads(os.getpid()), load.files(os.getpid())) == before)

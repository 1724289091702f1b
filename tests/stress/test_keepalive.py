"""Peers that have gone without a word: stopped processes, cut networks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import typing

from tests.tools import faults, support
from tests.tools.stress import StressTestCase, go_on, heavy


@heavy
class Keepalive(StressTestCase):
    """Who is not there any more is dropped in the stated time."""

    def listener(
        self, server: support.Process, host: str = "127.0.0.1", *, through: typing.Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """A client in a process of its own that answers pings."""
        command = [*through, sys.executable, "-m", "tests.tools.load", host, str(server.port)]
        process = subprocess.Popen(command, cwd=support.ROOT, stdout=subprocess.PIPE)
        self.addCleanup(process.wait, support.DEADLINE)
        self.addCleanup(process.stdout.close)  # type: ignore[union-attr]
        self.addCleanup(process.kill)
        assert process.stdout
        self.assertEqual(process.stdout.readline(), b"open\n")
        return process

    def check_gone(
        self,
        server: support.Process,
        why: str,
        least: float,
        most: float,
        meanwhile: typing.Callable[[], object] = lambda: None,
    ) -> None:
        """The listener must be dropped, not too early and not too late."""
        start = time.monotonic()
        support.eventually(lambda: (meanwhile(), " left: " in server.log())[1], "it is still there", most + 5)
        seconds = time.monotonic() - start
        self.report(f"dropped after {seconds:.2f} s")
        self.assertIn(why, server.log())
        self.assertGreater(seconds, least)
        self.assertLess(seconds, most)

    def stop_in_company(self, server: support.Process, why: str, least: float, most: float, size: int) -> None:
        """A process is stopped while messages flow; the others stay."""
        clients = self.clients(server)
        senders = self.pace(clients, 2, size, 100)
        process = self.listener(server)

        def meanwhile() -> None:
            go_on(senders)()
            clients.step()

        with faults.paused(process.pid):
            self.check_gone(server, why, least, most, meanwhile)
        self.settle(clients, senders)

    def test_stopped_process_in_a_quiet_room(self) -> None:
        server = self.serve("--ping", "1")
        process = self.listener(server)
        with self.assertRaises(AssertionError):  # as long as it answers, it stays
            support.eventually(server.log, deadline=4)
        with faults.paused(process.pid):
            self.check_gone(server, "it was silent", 0.9, 3.3)

    def test_stopped_process_in_a_busy_room(self) -> None:
        """Its kernel goes on taking messages, so only keepalive can tell."""
        self.stop_in_company(self.serve("--ping", "1"), "it was silent", 0.9, 3.3, 100)

    def test_send_timeout(self) -> None:
        """Its kernel is soon full; without keepalive it is dropped for its backlog that does not move."""
        code = "pywebsock.BroadcastServer.send_timeout = 2"
        server = self.serve("--ping", "0", "--max-backlog", "64M", code=code)
        self.stop_in_company(server, "it took nothing", 2.0, 5.0, 50000)

    def check_vanished(self, *arguments: str, **how: typing.Any) -> support.Process:
        """A peer behind a link that is cut."""
        cable = faults.Cable()
        self.addCleanup(cable.__exit__)
        server = self.serve("--ping", "1", "--host", "0.0.0.0", *arguments, code=cable.near, **how)
        self.listener(server, cable.address, through=cable.far)
        cable.cut()
        return server

    def test_vanished_peer(self) -> None:
        self.check_gone(self.check_vanished(), "it was silent", 0.9, 3.3)

    def test_vanished_peer_in_a_busy_room(self) -> None:
        """What was sent to it waits for ever; keepalive does not wait behind it."""
        server = self.check_vanished("--stdin", stdin=subprocess.PIPE)
        assert server.stdin
        lines = server.stdin.fileno()
        self.check_gone(server, "it was silent", 0.9, 3.3, lambda: os.write(lines, b"hello" * 20 + b"\n"))

"""Peers that vanish without closing: paused processes, cut networks."""

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
    """A vanished client is dropped within the documented time."""

    def listener(
        self, server: support.Process, host: str = "127.0.0.1", *, through: typing.Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a client in its own process, which answers Pings."""
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
        """Check that the listener is dropped, not too early and not too late."""
        start = time.monotonic()
        support.eventually(
            lambda: (meanwhile(), " left: " in server.log())[1], "the client is still in the room", most + 5
        )
        seconds = time.monotonic() - start
        self.report(f"dropped after {seconds:.2f} s")
        self.assertIn(why, server.log())
        self.assertGreater(seconds, least)
        self.assertLess(seconds, most)

    def pause_beside_others(self, server: support.Process, why: str, least: float, most: float, size: int) -> None:
        """Pause a process while messages are sent; the other clients stay."""
        clients = self.clients(server)
        senders = self.pace(clients, 2, size, 100)
        process = self.listener(server)

        def meanwhile() -> None:
            go_on(senders)()
            clients.step()

        with faults.paused(process.pid):
            self.check_gone(server, why, least, most, meanwhile)
        self.settle(clients, senders)

    def test_paused_process_in_a_quiet_room(self) -> None:
        server = self.serve("--ping", "1")
        process = self.listener(server)
        with self.assertRaises(AssertionError):  # while it answers, it stays
            support.eventually(server.log, deadline=4)
        with faults.paused(process.pid):
            self.check_gone(server, "it was silent", 0.9, 3.3)

    def test_paused_process_in_a_busy_room(self) -> None:
        """The kernel of the paused process still accepts messages, so only keepalive finds it."""
        self.pause_beside_others(self.serve("--ping", "1"), "it was silent", 0.9, 3.3, 100)

    def test_send_timeout(self) -> None:
        """Its kernel's buffer is soon full; without keepalive, it is dropped since its backlog makes no progress."""
        code = "pywebsock.BroadcastServer.send_timeout = 2"
        server = self.serve("--ping", "0", "--max-backlog", "64M", code=code)
        self.pause_beside_others(server, "it took nothing", 2.0, 5.0, 50000)

    def check_vanished(self, *arguments: str, **how: typing.Any) -> support.Process:
        """Check a peer behind a link that is cut."""
        cable = faults.Cable()
        self.addCleanup(cable.__exit__)
        server = self.serve("--ping", "1", "--host", "0.0.0.0", *arguments, code=cable.near, **how)
        self.listener(server, cable.address, through=cable.far)
        cable.cut()
        return server

    def test_vanished_peer(self) -> None:
        self.check_gone(self.check_vanished(), "it was silent", 0.9, 3.3)

    def test_vanished_peer_in_a_busy_room(self) -> None:
        """Data for the peer waits forever, but keepalive does not wait for that data."""
        server = self.check_vanished("--stdin", stdin=subprocess.PIPE)
        assert server.stdin
        lines = server.stdin.fileno()
        self.check_gone(server, "it was silent", 0.9, 3.3, lambda: os.write(lines, b"hello" * 20 + b"\n"))

"""Out of file descriptors, threads, memory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import typing

from tests.tools import faults, load
from tests.tools.stress import QUIET, StressTestCase, go_on, quantiles


class Exhaustion(StressTestCase):
    """Out of file descriptors, threads, memory: others do not notice, and it passes."""

    def check(self, code: str, line: str, refused: bool) -> None:
        """200 connections, many more than there can be."""
        server = self.serve(*QUIET, code=code)
        clients = self.loaded(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        crowd = [clients.start() for _ in range(200)]
        clients.run_for(2, go_on(chat))
        for sender in chat:
            sender.stop()
        clients.run(lambda: all(sender.answered for sender in chat))
        got_in = sum(peer.open and not peer.ended for peer in crowd)
        used = load.cpu(server.pid)
        clients.run_for(4)
        used = (load.cpu(server.pid) - used) / 4
        delays = [delay for sender in chat for delay in sender.stream.delays]
        lines = server.log().count(line)
        self.report(
            f"{got_in} got in, CPU {used:.1%} while more wait, {lines} lines in the log; others: {quantiles(delays)}"
        )
        self.assertGreater(got_in, 10)
        self.assertLess(got_in, 190)
        self.assertLess(used, 0.05)
        self.assertLessEqual(server.log().count("\n"), 45, server.log())
        self.assertGreaterEqual(lines, 1)
        self.assertLess(max(delays), 0.5)
        self.check_leaving(clients, next(peer for peer in crowd if peer.open))
        for peer in [peer for peer in crowd if peer.open]:
            peer.reset()
        if refused:
            for peer in crowd:
                peer.reset()
            clients.run(lambda: load.threads(server.pid) <= 2 + len(chat))
            crowd = [clients.start() for _ in range(20)]
        clients.run(lambda: sum(peer.open and not peer.ended for peer in crowd) >= 20)

    def check_leaving(self, clients: load.Load, peer: load.Peer) -> None:
        """One of those inside says goodbye, and is answered."""
        stream = bytearray()
        peer.take = stream.extend
        peer.send(load.frame(b"\x03\xe8", 8))
        clients.run(lambda: peer.ended)
        self.assertEqual(bytes(stream), b"\x88\x02\x03\xe8")

    def test_file_descriptors(self) -> None:
        self.check(faults.few_files(64), "cannot accept", refused=False)

    def test_threads(self) -> None:
        """The limit of threads is one of a user, and does not bind root: the server becomes a user with no others."""
        busy = 0 if os.getuid() == 0 else sum(load.threads(pid) for pid in processes(os.getuid()))
        code = (
            "import os, resource\n"
            "def activate(server, was=pywebsock.BroadcastServer.server_activate):\n"
            "    was(server)\n"
            f"    os.getuid() or os.setuid({20_000 + os.getpid() % 40_000})\n"  # not that of another copy of this test
            f"    resource.setrlimit(resource.RLIMIT_NPROC, ({busy + 60},) * 2)\n"
            "pywebsock.BroadcastServer.server_activate = activate"
        )
        self.check(code, "start new thread", refused=True)

    def test_memory_for_one_message(self) -> None:
        """So little address space is left that long messages find no memory."""
        code = (
            "import resource, re, threading; size = int(open('/proc/self/statm').read().split()[0]) * 4096;"
            "resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)"
        )
        server = self.serve(*QUIET, "--max-message", "256M", code=code)
        clients = self.loaded(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        long = load.frame(bytes(200 << 20))
        for _ in range(3):
            (peer,) = clients.join(1)
            closed = bytearray()
            peer.take = closed.extend
            peer.send(long)
            clients.run(lambda peer=peer: peer.ended, 30, go_on(chat))  # type: ignore[misc]
            self.assertIn(b"\x03\xf1out of memory", closed)
        self.settle(clients, chat)
        delays = [delay for sender in chat for delay in sender.stream.delays]
        lines = server.log().count("\n")
        self.report(f"{lines} lines in the log; others: {quantiles(delays)}")
        self.assertLess(max(delays), 1.0)
        self.assertLessEqual(lines, 6, server.log())
        clients.run(lambda: self.number(server) == len(chat))


def processes(user: int) -> typing.Iterator[int]:
    """The processes of a user."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == user:
                yield int(folder.name)

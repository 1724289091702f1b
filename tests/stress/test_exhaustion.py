"""Out of file descriptors, threads, memory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import typing

from tests.tools import faults, load, support
from tests.tools.stress import QUIET, StressTestCase, go_on, heavy, quantiles


@heavy
class Exhaustion(StressTestCase):
    """Without file descriptors, threads or memory, other clients are not affected, and the server recovers."""

    def check(self, code: str, line: str) -> None:
        """Connect 200 clients, many more than the limit."""
        server = self.serve(*QUIET, code=code)
        clients = self.clients(server)
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
        clients.run(lambda: sum(peer.open and not peer.ended for peer in crowd) >= 20)

    def check_leaving(self, clients: load.Load, peer: load.Peer) -> None:
        """Close one of the clients in the room, which gets an answer."""
        stream = bytearray()
        peer.take = stream.extend
        peer.send(load.frame(b"\x03\xe8", 8))
        clients.run(lambda: peer.ended)
        self.assertEqual(bytes(stream), b"\x88\x02\x03\xe8")

    def test_file_descriptors(self) -> None:
        self.check(faults.few_files(64), "cannot accept")

    def test_threads(self) -> None:
        """Silent connections need no thread: with a limit of ten threads, all later clients join.

        The limit of threads is per user, and does not hold for root: the server runs as another user.
        """
        busy = 0 if os.getuid() == 0 else sum(load.threads(pid) for pid in processes(os.getuid()))
        code = (
            "import os, resource\n"
            "def activate(server, was=pywebsock.BroadcastServer.server_activate):\n"
            "    was(server)\n"
            f"    os.getuid() or os.setuid({20_000 + os.getpid() % 40_000})\n"  # for each run another one
            f"    resource.setrlimit(resource.RLIMIT_NPROC, ({busy + 10},) * 2)\n"
            "pywebsock.BroadcastServer.server_activate = activate"
        )
        server = self.serve(*QUIET, code=code + "\npywebsock.BroadcastServer.handshake_timeout = 3")
        clients = self.clients(server)
        chat = self.chat(clients)
        clients.run_for(0.2, go_on(chat))
        silent = [clients.start(raw=b"") for _ in range(200)]
        clients.run_for(2, go_on(chat))
        most = load.threads(server.pid)
        late = [clients.start() for _ in range(20)]
        clients.run(lambda: all(peer.ended for peer in silent), 15, go_on(chat))
        late += [clients.start() for _ in range(20)]
        clients.run(lambda: all(peer.open or peer.ended for peer in late), 15, go_on(chat))
        self.settle(clients, chat)
        delays = [delay for sender in chat for delay in sender.stream.delays]
        got_in = sum(peer.open for peer in late)
        lines = server.log().count("start new thread")
        self.report(f"{most} threads, {got_in} of 40 got in later, {lines} lines; others: {quantiles(delays)}")
        self.assertLess(most, 10)
        self.assertEqual((got_in, lines), (40, 0))
        self.assertLessEqual(server.log().count("\n"), 65, server.log())
        self.assertLess(max(delays), 0.5)

    def test_memory_for_one_message(self) -> None:
        """With a small address space, there is no memory for long messages."""
        code = (
            "import resource, re, threading; size = int(open('/proc/self/statm').read().split()[0]) * 4096;"
            "resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)"
        )
        watched = self.serve_watched(*QUIET, "--max-message", "256M", code=code)
        clients = self.clients(watched)
        long = load.frame(bytes(200 << 20))
        for _ in range(3):
            (peer,) = clients.join(1)
            closed = bytearray()
            peer.take = closed.extend
            peer.send(long)
            clients.run(lambda peer=peer: peer.ended, 30)  # type: ignore[misc]
            self.assertIn(b"\x03\xf1out of memory", closed)
        self.check_health(watched, "three messages without memory")
        self.assertLessEqual(watched.log().count("\n"), 6, watched.log())
        support.eventually(lambda: self.number(watched.server) == 1)


def processes(user: int) -> typing.Iterator[int]:
    """Return the number of processes of a user."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == user:
                yield int(folder.name)

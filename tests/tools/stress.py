"""What the tests share that try to break the server: a server in a process of its own, many clients in this one.

They take minutes and run only with PYWEBSOCK_TESTS=everything; each prints the figures that it measured. Where the size
of a test is a question of patience, an environment variable sets it: PYWEBSOCK_PUSH (MB), PYWEBSOCK_STRESS and
PYWEBSOCK_SOAK (seconds).
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import ssl
import sys
import tempfile
import typing
import unittest

from tests.tools import faults, load, support

GOING_AWAY = b"\x88\x02\x03\xe9"  # Close 1001
QUIET = ("--no-compression", "--ping", "0")  # nothing in a stream but numbered messages
TROUBLE = re.compile("Traceback|unexpected error|an error in|operation failed|Warning|Exception ignored")


@functools.cache
def certificate() -> tuple[str, ssl.SSLContext]:
    """One for localhost, for all tests: its file, which is also that of its key, and a context for clients."""
    folder = tempfile.mkdtemp(prefix="pywebsock-")
    atexit.register(shutil.rmtree, folder)
    return support.certificate(folder)


def quantiles(delays: typing.Sequence[float]) -> str:
    """The middle, the tail and the worst, for people."""
    ordered = sorted(delays)
    middle, tail = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"{len(ordered)} echoes, p50 {middle * 1e3:.1f} ms, p99 {tail * 1e3:.1f} ms, max {ordered[-1] * 1e3:.1f} ms"


@unittest.skipUnless(support.EVERYTHING, "what takes minutes")
class StressTestCase(unittest.TestCase):
    """A server in a process of its own, and many clients in this one."""

    def serve(
        self, *arguments: str, code: str = "", python: typing.Sequence[str] = (), **how: typing.Any
    ) -> support.Process:
        """A server that must end well and have nothing to complain about; `code` is run before it starts."""
        changed = faults.changed(code) if code else []
        server = support.Process(*arguments, python=[*python, *changed], **how)
        self.addCleanup(self._end, server)
        return server

    def _end(self, server: support.Process) -> None:
        status = server.stop()
        log = server.log()
        self.assertEqual((status, TROUBLE.findall(log)), (0, []), log[-5000:])

    def loaded(self, server: support.Process, tls: ssl.SSLContext | None = None) -> load.Load:
        """Clients of it."""
        clients = load.Load(server.port, tls)
        self.addCleanup(clients.__exit__)
        return clients

    def chat(self, clients: load.Load, number: int = 2, **how: typing.Any) -> list[load.Sender]:
        """Clients that send small messages, each the next when the last has come back: what others notice."""
        peers = clients.join(number, **how)
        return [load.Sender(peer, 1000 + i, 64, at_once=1) for i, peer in enumerate(peers)]

    def pace(self, clients: load.Load, number: int, size: int, pace: float, **how: typing.Any) -> list[load.Sender]:
        """Clients that send so many messages a second each, whatever happens."""
        return [load.Sender(peer, i, size, pace=pace) for i, peer in enumerate(clients.join(number, **how))]

    def settle(self, clients: load.Load, senders: typing.Sequence[load.Sender], deadline: float = 30) -> None:
        """Stop sending and wait until all have got everything, in one order."""
        for sender in senders:
            sender.stop()
        total = sum(sender.count for sender in senders)
        clients.run(lambda: all(sender.answered for sender in senders), deadline)
        clients.run(lambda: all(sender.stream.messages == total for sender in senders), deadline)
        self.assertEqual(len({sender.stream.digest for sender in senders}), 1, "not the same order for all")
        self.assertEqual([sender.peer.ended for sender in senders if sender.peer.ended], [])

    def number(self, server: support.Process) -> int:
        """Of clients in the room."""
        body = support.exchange(server.port, b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")[2]
        return int(body.partition(b'"clients": ')[2].partition(b",")[0])

    def report(self, text: str) -> None:
        """Print a figure."""
        print(f"    {self.id().rpartition('tests.stress.')[2]}: {text}", file=sys.stderr, flush=True)


def go_on(senders: typing.Iterable[load.Sender]) -> typing.Callable[[], None]:
    """What to do meanwhile: let them send what is due."""

    def send() -> None:
        for sender in senders:
            sender.go_on()

    return send

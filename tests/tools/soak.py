"""Mixed traffic for a long time: `python -m tests.tools.soak SECONDS`.

Clients join, leave and are reset; they send large and small messages, with and without compression and TLS. At the end,
memory, threads and file descriptors must be as before.
"""

from __future__ import annotations

import random
import signal
import ssl
import sys
import tempfile
import time
import typing
import zlib

from tests.tools import faults, load, support

# For the servers: glibc keeps freed memory between blocks that are in use, which looks like a leak. Let it return this.
TRIM = """
import signal, sys
def trim(*_):
    pywebsock.call_libc("malloc_trim", 0)
    sys.stderr.write("trimmed\\n")
signal.signal(signal.SIGUSR1, trim)
"""


def memory_in_use(server: support.Process) -> float:
    """Return the memory of a server with TRIM (MB), without what its malloc can return."""
    count = server.log().count("trimmed")
    server.send_signal(signal.SIGUSR1)
    support.eventually(lambda: server.log().count("trimmed") > count)
    return load.memory(server.pid)


class Visitor:
    """A client that sends messages of many kinds for a while, then leaves in one of many ways."""

    def __init__(self, clients: load.Load, chance: random.Random, *, tls: bool) -> None:
        self._chance = chance
        self._deflates = chance.random() < 0.5
        extensions = "permessage-deflate" if self._deflates else None
        self.peer = clients.start(tls=tls, small=chance.random() < 0.1, Sec_WebSocket_Extensions=extensions)
        self._until = time.monotonic() + chance.choice((0.1, 1, 5)) * chance.random()
        self._next = 0.0
        if chance.random() < 0.03:
            self.peer.stop_reading()

    def go_on(self) -> None:
        """Send, or leave."""
        now = time.monotonic()
        if now > self._until:
            self._leave()
        elif now > self._next and not self.peer.unsent:
            self._next = now + self._chance.expovariate(10)
            self._send()

    def _send(self) -> None:
        size = self._chance.choice((0, 10, 100, 100, 1000, 5000, 70000, 300000 if self._chance.random() < 0.1 else 10))
        payload = self._chance.choice((b"x", b"ab")) * (size // 2)
        if self._deflates and size > 100:
            packer = zlib.compressobj(wbits=-15)
            payload = (packer.compress(payload) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]
            self.peer.send(support.masked_frame(2, rsv=4, length=len(payload), key=bytes(4)) + payload)
        elif size == 1000:  # in fragments, with a Ping between them
            part = support.masked_frame(0, fin=False, length=len(payload), key=bytes(4)) + payload
            self.peer.send(support.masked_frame(1, fin=False) + part + load.frame(b"?", 9) + part + load.frame(b"", 0))
        else:
            self.peer.send(load.frame(payload, 1))

    def _leave(self) -> None:
        way = self._chance.randrange(6)
        if way == 0:
            self.peer.reset()
        elif way == 1:
            self.peer.end("gone")
        elif way == 2:
            self.peer.send(load.frame(b"not text: \xff", 1))
        elif way == 3:
            self.peer.send(b"\xff" * 10)
        else:
            self.peer.send(load.frame(b"\x03\xe8", 8))
        self._until = time.monotonic() + 8


def mix(clients: typing.Sequence[load.Load], seconds: float, chance: random.Random) -> int:
    """Run visitors for this time, then reset the rest; return the number of visitors."""
    visitors: list[Visitor] = []
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for each in clients:
            for _ in range(min(3, 30 - len(each.peers))):
                visitors.append(Visitor(each, chance, tls=each.tls is not None))
                count += 1
            each.step()
        visitors = [visitor for visitor in visitors if not visitor.peer.ended]
        for visitor in visitors:
            visitor.go_on()
    for each in clients:
        for peer in tuple(each.peers):
            peer.reset()
    return count


def soak(plain: support.Process, secure: support.Process, context: ssl.SSLContext, seconds: float) -> str:
    """Run mixed traffic with two servers that have TRIM, and compare their figures; return a line with them.

    Raises AssertionError.
    """
    chance = random.Random(int(seconds))
    servers = plain, secure
    for server, tls in ((plain, None), (secure, context)):  # now all their threads have started
        with support.Client(server.port, tls=tls) as client:
            client.close()
            client.read_all()
    support.eventually(lambda: all(load.threads(server.pid) <= 2 for server in servers))  # hook threads have ended
    before = [(load.threads(server.pid), load.files(server.pid)) for server in servers]
    with load.Load(plain.port) as first, load.Load(secure.port, context) as second:

        def rest() -> list[float]:
            for server, figures in zip(servers, before):
                support.eventually(
                    lambda server=server, figures=figures: (  # type: ignore[misc]
                        (load.threads(server.pid), load.files(server.pid)) == figures
                    ),
                    f"threads and files are not {figures} again",
                    15,
                )
            return [memory_in_use(server) for server in servers]

        count = mix((first, second), seconds / 4, chance)
        warm = rest()
        count += mix((first, second), seconds * 3 / 4, chance)
        after = rest()
    for early, late in zip(warm, after):
        assert late < early * 1.2 + 10, f"memory has grown from {early:.0f} to {late:.0f} MB"
    memory = ", ".join(f"{early:.0f} then {late:.0f} MB" for early, late in zip(warm, after))
    lines = sum(server.log().count("\n") for server in servers)
    return f"{count} visitors in {seconds:.0f} s; memory {memory}; {lines} lines in the logs"


def main(argv: typing.Sequence[str]) -> int:
    """Run for the number of seconds in the first argument."""
    seconds = float(argv[0]) if argv else 600.0
    with tempfile.TemporaryDirectory() as folder:
        cert, context = support.certificate(folder)
        trim = faults.changed(TRIM)
        plain, secure = support.Process("--ping", "2", python=trim), support.Process("--cert", cert, python=trim)
        with plain, secure:
            print(soak(plain, secure, context, seconds))
        assert "Traceback" not in plain.log() + secure.log(), plain.log() + secure.log()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

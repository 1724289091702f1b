"""TLS under load."""

from __future__ import annotations

import itertools
import os
import random
import ssl
import time
import warnings

from tests.tools import load, support
from tests.tools.stress import QUIET, StressTestCase, certificate, go_on, heavy, quantiles


@heavy
class TLS(StressTestCase):
    """wss://."""

    def test_both_directions_at_once(self) -> None:
        """All clients read and write at the same time, with each version of TLS."""
        _, context = certificate()
        seconds = float(os.environ.get("PYWEBSOCK_STRESS", "12"))
        server = self.serve(*QUIET, tls=True)
        for version, size in ((ssl.TLSVersion.TLSv1_2, 5000), (ssl.TLSVersion.TLSv1_3, 100), (None, 30000)):
            if version:
                context.minimum_version = context.maximum_version = version
            clients = self.clients(server)
            peers = clients.join(12, tls=True)
            senders = [load.Sender(peer, i, size, at_once=8) for i, peer in enumerate(peers)]
            for sender in senders:
                sender.go_on()
            clients.run_for(seconds / 3)
            self.settle(clients, senders)
            delays = list(itertools.chain.from_iterable(sender.stream.delays for sender in senders))
            rate = sum(sender.stream.messages for sender in senders) * size / seconds * 3 / 1e6
            self.report(f"{version or 'any version'}, {size} bytes: {rate:.0f} MB/s delivered; {quantiles(delays)}")
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
            for peer in peers:
                peer.reset()

    def test_broken_records(self) -> None:
        """A client that sends broken records is lost, and no other client misses a message."""
        server = self.serve(*QUIET, tls=True)
        clients = self.clients(server)
        senders = self.pace(clients, 3, 200, 700, tls=True)
        broken: list[load.Peer] = []

        def breaking() -> None:
            go_on(senders)()
            for peer in broken:
                if peer.open and not peer.ended:
                    os.write(peer.socket.fileno(), b"\x17\x03\x03\x00\x40" + random.randbytes(64))
                    peer.pace = 0.1  # it sees the result later
                    peer.end("broken")
            if sum(not peer.ended for peer in broken) < 3:
                broken.append(clients.start(tls=True))

        clients.run_for(5, breaking)
        self.settle(clients, senders)
        self.report(f"{len(broken)} broken; worst delay of others {max(s.stream.worst for s in senders):.3f} s")
        self.assertGreater(len(broken), 50)

    def test_a_long_message_to_many(self) -> None:
        """16 MiB for 300 clients: encrypting 5 GB takes long; meanwhile the server answers others in each round."""
        server = self.serve("--no-compression", tls=True)
        clients = self.clients(server)
        clients.join(300, tls=True)
        sender = support.Client(server.port, tls=certificate()[1])
        self.addCleanup(sender.__exit__)
        sender.send(bytes(16 * 1024 * 1024 - 1))
        clients.run_for(0.5)
        worst = 0.0
        with support.in_thread(clients.run_for, 4.0):
            for _ in range(3):
                start = time.monotonic()
                self.assertEqual(self.number(server), 301)
                worst = max(worst, time.monotonic() - start)
        self.report(f"the status within {worst:.2f} s")
        self.assertLess(worst, 1.0)

    def test_connections_without_tls(self) -> None:
        """Plain HTTP, garbage and silence on a port with TLS; old versions are refused."""
        cert, context = certificate()
        code = "pywebsock.BroadcastServer.handshake_timeout = 1"
        server = self.serve(tls=True, code=code)
        clients = self.clients(server)
        chat = self.chat(clients, tls=True)
        raw = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", random.randbytes(500))
        strangers = [clients.start(raw=raw[i % 4]) for i in range(100)]
        clients.run(lambda: all(peer.ended for peer in strangers), 8, go_on(chat))
        self.settle(clients, chat)
        self.report(f"others: {quantiles([delay for sender in chat for delay in sender.stream.delays])}")
        old = ssl.create_default_context(cafile=cert)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about an old version, which is intended
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises(OSError):
            support.Client(server.port, tls=old)
        status, _, body = support.exchange(
            server.port, support.request(Upgrade=None, Sec_WebSocket_Key=None), tls=context
        )
        self.assertEqual((status, b"</html>" in body), (200, True))
        self.assertLessEqual(server.log().count("\n"), 45)

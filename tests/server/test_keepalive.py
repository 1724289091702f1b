"""Ping, Pong and keepalive (RFC 6455 5.5.2, 5.5.3)."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import unittest

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    PING,
    PONG,
    TEXT,
    Frame,
    ServerTestCase,
    eventually,
    in_thread,
    masked_frame,
)


class Ping(ServerTestCase):
    """RFC 6455 5.5.2: a Ping is answered, and not broadcast."""

    def test_payload_comes_back(self) -> None:
        client = self.connect(self.serve())
        for payload in (b"", b"x", b"\xff\x00", bytes(125)):
            with self.subTest(payload=payload):
                client.frame(PING, payload)
                self.assertEqual(client.read_frame(), Frame(True, False, PONG, payload))

    def test_in_order_with_messages(self) -> None:
        """A Pong comes after the messages that came before its Ping."""
        client = self.connect(self.serve(pywebsock.BroadcastServer))
        client.send_raw(masked_frame(TEXT, b"1") + masked_frame(PING, b"2"))
        frames = [client.read_frame() for _ in range(2)]
        self.assertEqual([(frame.opcode, frame.payload) for frame in frames], [(1, b"1"), (10, b"2")])

    def test_not_broadcast(self) -> None:
        server = self.serve()
        a, b = self.connect(server), self.connect(server)
        a.send_raw(masked_frame(PING, b"ping") + masked_frame(PONG, b"pong") + masked_frame(TEXT, b"text"))
        self.assertEqual(b.read_frame(), Frame(True, False, TEXT, b"text"))


class Pong(ServerTestCase):
    """RFC 6455 5.5.3."""

    def test_unsolicited_is_ignored(self) -> None:
        client = self.connect(self.serve())
        for payload in (b"", b"x", bytes(125)):
            client.frame(PONG, payload)
        client.send("still here")
        self.assertEqual(client.read_frame(), Frame(True, False, TEXT, b"still here"))

    def test_newest_pong_for_a_stuck_client(self) -> None:
        """If Pongs must wait, only the newest is kept, so Pings cannot fill the memory."""
        server = self.serve()
        faults.small_buffers(server)
        reader, sleeper = self.connect(server), self.connect(server, small=True)
        for _ in range(4):
            server.broadcast(bytes(250_000))  # far more than both buffers, so the client has a backlog
        pings = 5000
        sleeper.send_raw(b"".join(masked_frame(PING, b"%d" % i) for i in range(pings)))
        sleeper.send("awake")
        self.assertEqual([reader.read() for _ in range(5)], [bytes(250_000)] * 4 + ["awake"])
        frames = [sleeper.read_frame() for _ in range(6)]
        pongs = [i for i, frame in enumerate(frames) if frame.opcode == PONG]
        self.assertEqual(len(pongs), 1)
        self.assertLess(pongs[0], 5)  # a client that is always behind would get none
        self.assertEqual(frames.pop(pongs[0]).payload, b"%d" % (pings - 1))
        self.assertEqual([len(frame.payload) for frame in frames], [250_000] * 4 + [5])
        sleeper.send("that was all")
        self.assertEqual(sleeper.read_frame(), Frame(True, False, TEXT, b"that was all"))


class Keepalive(ServerTestCase):
    """RFC 6455 5.5.2: a Ping finds clients that have vanished."""

    def test_ping_and_pong(self) -> None:
        server = self.serve(ping_interval=0.05, ping_timeout=60)
        client = self.connect(server)
        for _ in range(5):
            frame = client.read_frame()
            self.assertEqual(frame.opcode, PING)
            client.frame(PONG, frame.payload)
        self.assertEqual(len(server.clients), 1)

    def test_dropped_after_more_silence(self) -> None:
        server = self.serve(ping_interval=0.1, ping_timeout=0.2)
        client = self.connect(server)
        self.assertEqual(client.read_frame().opcode, PING)
        self.assertEqual(client.read_all(), b"")
        eventually(lambda: [heard[:2] for heard in server.heard] == [("open", "/"), ("close", 1006)])
        self.assertEqual(len(server.clients), 0)

    def test_many_leaving_clients_hide_no_drop(self) -> None:
        """The limit of log lines counts leaving and dropped clients separately."""
        limit = pywebsock.FloodFilter()
        pywebsock.log.addFilter(limit)
        self.addCleanup(pywebsock.log.removeFilter, limit)
        server = self.serve(ping_interval=0.1, ping_timeout=0.1)
        with self.assertLogs("pywebsock", "INFO") as logged:
            for _ in range(30):
                self.connect(server).socket.close()
            eventually(lambda: len(logged.records) == limit.MOST_LINES)
            self.connect(server)
            eventually(lambda: len(logged.records) > limit.MOST_LINES)
        self.assertIn("left: 1006 it was silent", logged.output[-1])

    def test_one_ping_is_enough(self) -> None:
        server = self.serve(ping_interval=0.05, ping_timeout=0.25)
        client = self.connect(server)
        self.assertEqual(client.read_all(), b"\x89\x00")

    def test_a_client_that_only_listens_is_pinged(self) -> None:
        """Broadcasts to a client do not show that it is alive."""
        server = self.serve(ping_interval=0.2, ping_timeout=60)
        client = self.connect(server)
        enough = threading.Event()

        def chatter() -> None:
            while not enough.wait(0.01):
                server.broadcast("chatter")

        with in_thread(chatter):
            try:
                while client.read_frame().opcode != PING:
                    pass
            finally:
                enough.set()

    def test_a_stuck_client_is_removed(self) -> None:
        """No Ping can reach a stuck client, but its queue makes no progress."""
        server = self.serve(ping_interval=3600, send_timeout=0.1)
        faults.small_buffers(server)
        self.connect(server, small=True)
        for _ in range(10):
            server.broadcast(bytes(10_000))
        eventually(lambda: not server.clients)

    @unittest.skipUnless(sys.platform == "linux", "elsewhere the system does not tell what the peer has taken")
    def test_reset_while_its_messages_wait(self) -> None:
        """A client that is not read because of its rate gets Pings: its kernel shows whether it is still there."""

        class MuteServer(pywebsock.BroadcastServer):
            """A server that does not broadcast."""

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                pass

        server = self.serve(MuteServer, rate=0.01, ping_interval=0.1, ping_timeout=0.1)
        client = self.connect(server)
        client.send_raw(2 * masked_frame(TEXT, b"text"))
        for _ in range(3):  # its kernel acknowledges them, and it stays
            self.assertEqual(client.read_frame().opcode, PING)
        self.assertEqual(len(server.clients), 1)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
        eventually(lambda: not server.clients)

    def test_none(self) -> None:
        client = self.connect(self.serve(ping_interval=0))
        client.socket.settimeout(0.3)
        with self.assertRaises(socket.timeout):
            client.read_frame()

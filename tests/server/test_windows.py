"""What Windows does not have is not missed."""

from __future__ import annotations

import selectors
import unittest
import unittest.mock

import pywebsock
from tests.tools import faults
from tests.tools.support import (
    CLOSE,
    DEFLATE,
    PING,
    PONG,
    Frame,
    ServerTestCase,
    eventually,
    in_thread,
)


class Windows(ServerTestCase):
    """With select() alone, and sends in slices."""

    def setUp(self) -> None:
        for where, name, value in (
            (pywebsock, "IS_WINDOWS", True),
            (selectors, "DefaultSelector", selectors.SelectSelector),
        ):
            patch = unittest.mock.patch.object(where, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def test_exchange(self) -> None:
        server = self.serve()
        a, b = self.connect(server), self.connect(server, Sec_WebSocket_Extensions=DEFLATE)
        for message in ("Hello", b"\xff", "x" * 70_000, ""):
            for sender in (a, b):
                sender.send(message)
                self.assertEqual([a.read(), b.read()], [message] * 2)
        a.frame(PING, b"?")
        self.assertEqual(a.read_frame(), Frame(True, False, PONG, b"?"))
        a.close(4000)
        self.assertEqual(a.read_close(), (4000, ""))
        b.send_raw(b"\x81\x00")
        self.assertEqual(b.read_close()[0], 1002)

    def test_slow_client(self) -> None:
        server = self.serve()
        faults.small_buffers(server)
        quick, slow = self.connect(server), self.connect(server, small=True)
        messages = [bytes([i]) * 20_000 for i in range(50)]
        for message in messages:
            quick.send(message)
            self.assertEqual(quick.read(), message)
        self.assertEqual([slow.read() for _ in messages], messages)

    def test_stuck_client(self) -> None:
        server = self.serve(max_backlog=100_000)
        faults.small_buffers(server)
        quick = self.connect(server)
        self.connect(server, small=True)
        for _ in range(40):
            quick.send(bytes(10_000))
            self.assertEqual(quick.read(), bytes(10_000))
        eventually(lambda: len(server.clients) == 1)

    def test_the_end(self) -> None:
        server = self.serve()
        client = self.connect(server)
        with in_thread(server.server_close):
            self.assertEqual(client.read_frame(), Frame(True, False, CLOSE, b"\x03\xe9"))
            client.close(1001)
            self.assertEqual(client.read_all(), b"")
            client.socket.close()

"""Messages on the wire, whole and in fragments (RFC 6455 5.4, 5.6)."""

from __future__ import annotations

import pywebsock
from tests.tools.support import (
    BINARY,
    CLOSE,
    CONT,
    PING,
    PONG,
    TEXT,
    Frame,
    ServerTestCase,
    masked_frame,
    pieces,
)


class Messages(ServerTestCase):
    """RFC 6455 5.6: all clients get each message, including the sender."""

    def test_every_size(self) -> None:
        """Each form of the length, at the ends of its range, up to the limit."""
        limit = 70_000
        server = self.serve(max_message=limit)
        sender, reader = self.connect(server), self.connect(server)
        for size in (0, 1, 125, 126, 127, 65535, 65536, limit):
            for message in ("x" * size, b"\xff" * size):
                with self.subTest(size=size, kind=type(message).__name__):
                    sender.send(message)
                    for client in (sender, reader):
                        frame = client.read_frame()
                        expected = (1, message.encode()) if isinstance(message, str) else (2, message)
                        self.assertTrue(frame.fin)
                        self.assertFalse(frame.rsv1)
                        self.assertEqual((frame.opcode, frame.payload), expected)

    def test_every_masking_key(self) -> None:
        client = self.connect(self.serve())
        for key in (bytes(4), b"\xff" * 4, b"\x01\x02\x03\x04", b"\r\n\r\n"):
            for size in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 1026, 1027):
                with self.subTest(key=key, size=size):
                    message = bytes(i % 251 for i in range(size))
                    client.frame(BINARY, message, key=key)
                    self.assertEqual(client.read(), message)

    def test_text(self) -> None:
        client = self.connect(self.serve())
        for text in ("", "κόσμε", "\0", "\r\n", "\U0001f600", "\uffff", "\U0010ffff", "\ufeffx"):
            with self.subTest(text=text):
                client.send(text)
                self.assertEqual(client.read(), text)

    def test_many_in_one_segment(self) -> None:
        client = self.connect(self.serve())
        client.send_raw(b"".join(masked_frame(TEXT, b"%d" % i) for i in range(1000)))
        self.assertEqual([client.read() for _ in range(1000)], [str(i) for i in range(1000)])

    def test_byte_by_byte(self) -> None:
        client = self.connect(self.serve(pywebsock.BroadcastServer))
        for byte in masked_frame(TEXT, b"short") + masked_frame(BINARY, bytes(200)) + masked_frame(PING, b"?"):
            client.send_raw(bytes([byte]))
        self.assertEqual([client.read(), client.read()], ["short", bytes(200)])
        self.assertEqual(client.read_frame(), Frame(True, False, PONG, b"?"))


class Fragments(ServerTestCase):
    """RFC 6455 5.4: a message may arrive in many frames; it is sent in one."""

    CASES = (
        (b"Hello",),
        (b"Hel", b"lo"),
        (b"H", b"e", b"l", b"l", b"o"),
        (b"", b"Hello"),
        (b"Hello", b""),
        (b"", b"", b"Hello", b"", b""),
        (b"", b""),
        (b"\xce", b"\xba\xe1", b"\xbd\xb9", b"\xcf\x83"),  # cuts within characters
        (b"\xf0\x9f", b"", b"\x98\x80"),
        (b"x" * 40_000, b"y" * 40_000),
    )

    def test_fragments_become_one_frame(self) -> None:
        server = self.serve()
        sender, reader = self.connect(server), self.connect(server)
        for opcode in (TEXT, BINARY):
            for fragments in self.CASES:
                with self.subTest(opcode=opcode, fragments=fragments):
                    sender.send_raw(pieces(opcode, *fragments))
                    for client in (sender, reader):
                        self.assertEqual(client.read_frame(), Frame(True, False, opcode, b"".join(fragments)))

    def test_control_frames_between_fragments(self) -> None:
        client = self.connect(self.serve())
        client.frame(TEXT, b"Hel", fin=False)
        for payload in (b"1", b"2"):
            client.frame(PING, payload)
            self.assertEqual(client.read_frame(), Frame(True, False, PONG, payload))
            client.frame(PONG, b"unasked for")
            client.frame(CONT, b"", fin=False)
        client.frame(CONT, b"lo")
        self.assertEqual(client.read(), "Hello")

    def test_close_between_fragments(self) -> None:
        server = self.serve()
        client = self.connect(server)
        client.send_raw(masked_frame(TEXT, b"Hel", fin=False) + masked_frame(CLOSE, b"\x03\xe8"))
        self.assertEqual(client.read_close(), (1000, ""))
        server.wait_for("close", 1000, "")

    def test_fragments_of_several_clients(self) -> None:
        server = self.serve()
        a, b = self.connect(server), self.connect(server)
        a.frame(TEXT, b"a1", fin=False)
        b.frame(BINARY, b"b1", fin=False)
        a.frame(CONT, b"a2")
        self.assertEqual([a.read(), b.read()], ["a1a2", "a1a2"])
        b.frame(CONT, b"b2")
        self.assertEqual([a.read(), b.read()], [b"b1b2", b"b1b2"])

    def test_very_many_tiny_fragments(self) -> None:
        client = self.connect(self.serve(max_message=100_000))
        count = 10_000
        client.frame(TEXT, b"", fin=False)
        client.send_raw(masked_frame(CONT, b"", fin=False) * count)
        client.send_raw(masked_frame(CONT, b"x", fin=False) * count)
        client.frame(CONT)
        self.assertEqual(client.read(), "x" * count)

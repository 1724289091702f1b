"""permessage-deflate over real sockets (RFC 7692)."""

from __future__ import annotations

import random
import zlib

from tests.tools.support import (
    BINARY,
    CONT,
    DEFLATE,
    PING,
    PONG,
    TEXT,
    Frame,
    ServerTestCase,
    eventually,
)


class Compression(ServerTestCase):
    """permessage-deflate on the wire (RFC 7692)."""

    LONG = "all work and no play makes Jack a dull boy " * 100

    BOTH = "; client_no_context_takeover; server_no_context_takeover"
    OFFERS = (
        ("permessage-deflate", ""),
        ("permessage-deflate; client_max_window_bits", ""),
        ("permessage-deflate; client_no_context_takeover", "; client_no_context_takeover"),
        ("permessage-deflate; server_no_context_takeover", "; server_no_context_takeover"),
        (f"permessage-deflate{BOTH}", BOTH),
        ("x-other; a=b, permessage-deflate", ""),
        ("permessage-deflate; server_max_window_bits=12", "; server_max_window_bits=12"),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", ""),
    )
    DECLINED = (
        "permessage-deflate; server_max_window_bits=8",
        "permessage-deflate; server_max_window_bits=16",
        "permessage-deflate; unknown",
        "permessage-deflate; server_no_context_takeover; server_no_context_takeover",
        "x-webkit-deflate-frame",
    )

    def test_negotiation(self) -> None:
        server = self.serve()
        answer = b"permessage-deflate"
        for offer, more in self.OFFERS:
            with self.subTest(offer=offer):
                client = self.connect(server, Sec_WebSocket_Extensions=offer)
                self.assertIn(b"Sec-WebSocket-Extensions: " + answer + more.encode() + b"\r\n", client.response)
        for offer in self.DECLINED:
            with self.subTest(offer=offer):
                client = self.connect(server, Sec_WebSocket_Extensions=offer)
                self.assertNotIn(b"Extensions", client.response)

    def test_only_after_negotiation(self) -> None:
        server = self.serve()
        plain, deflate = self.connect(server), self.connect(server, Sec_WebSocket_Extensions=DEFLATE)
        for message in (self.LONG, self.LONG.encode()):
            opcode = TEXT if isinstance(message, str) else BINARY
            for sender in (plain, deflate):
                sender.send(message)
                self.assertEqual(plain.read_frame(), Frame(True, False, opcode, self.LONG.encode()))
                frame = deflate.read_frame()
                self.assertEqual((frame.fin, frame.rsv1, frame.opcode), (True, True, opcode))
                self.assertLess(len(frame.payload), len(self.LONG) // 10)
                inflated = zlib.decompressobj(-15).decompress(frame.payload + b"\0\0\xff\xff")
                self.assertEqual(inflated, self.LONG.encode())

    def test_short_and_incompressible_messages_go_plain(self) -> None:
        client = self.connect(self.serve(), Sec_WebSocket_Extensions=DEFLATE)
        for message in (b"", b"x", b"x" * 200, random.Random(1).randbytes(5000)):
            client.send(message)
            self.assertEqual(client.read_frame(), Frame(True, False, BINARY, message))

    def test_each_window(self) -> None:
        """A client that limits the window can inflate with it."""
        server = self.serve()
        text = "".join(random.Random(2).choices("abcdef", k=2000)) * 20  # repeats at a distance beyond a small window
        clients = {}
        for bits in range(9, 16):
            offer = f"permessage-deflate; server_max_window_bits={bits}"
            clients[bits] = self.connect(server, Sec_WebSocket_Extensions=offer)
        server.broadcast(text)
        for bits, client in clients.items():
            with self.subTest(bits=bits):
                frame = client.read_frame()
                self.assertTrue(frame.rsv1)
                inflated = zlib.decompressobj(-bits).decompress(frame.payload + b"\0\0\xff\xff")
                self.assertEqual(inflated.decode(), text)

    def test_compressed_by_the_client(self) -> None:
        server = self.serve()
        sender, plain = self.connect(server, Sec_WebSocket_Extensions=DEFLATE), self.connect(server)
        for message in ("", "Hello", self.LONG, "x" * 1_000_000):
            compressor = zlib.compressobj(wbits=-15)
            data = (compressor.compress(message.encode()) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
            for cut in (0, 1, len(data) // 2, len(data)):
                with self.subTest(length=len(message), cut=cut):
                    sender.frame(TEXT, data[:cut], rsv=4, fin=False)
                    sender.frame(PING, b"between")
                    sender.frame(CONT, data[cut:])
                    self.assertEqual(plain.read(), message)
                    self.assertEqual([sender.read_frame().opcode, sender.read()], [PONG, message])
            sender.frame(TEXT, message.encode()[:100_000])  # the client need not compress
            self.assertEqual([plain.read(), sender.read()], [message[:100_000]] * 2)

    def test_takeover_by_the_client(self) -> None:
        """A client that did not offer client_no_context_takeover refers to its earlier messages (RFC 7692 7.1.1.2)."""
        server = self.serve()
        sender, plain = self.connect(server, Sec_WebSocket_Extensions=DEFLATE), self.connect(server)
        compressor = zlib.compressobj(wbits=-15)
        for message in ("Hello", "Hello", "x" * 100_000, self.LONG, "Hello", self.LONG):
            data = (compressor.compress(message.encode()) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]
            sender.frame(TEXT, data, rsv=4)
            self.assertEqual([plain.read(), sender.read()], [message] * 2)
        self.assertEqual(server.status()["contexts"], 32 * 1024)
        sender.close()
        sender.read_close()
        eventually(lambda: server.status()["contexts"] == 0)

    def test_no_takeover(self) -> None:
        """For a client that offered client_no_context_takeover, the server keeps no earlier messages."""
        server = self.serve()
        offer = f"{DEFLATE}; client_no_context_takeover"
        sender = self.connect(server, Sec_WebSocket_Extensions=offer)
        for _ in range(2):
            sender.frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4)  # RFC 7692 7.2.3.1
            self.assertEqual(sender.read(), "Hello")
        self.assertEqual(server.status()["contexts"], 0)
        sender.frame(TEXT, bytes.fromhex("f200110000"), rsv=4)  # 7.2.3.2: refers to the message before
        self.assertEqual(sender.read_close()[0], 1007)

    def test_examples_of_the_rfc(self) -> None:
        """RFC 7692 7.2.3."""
        client = self.connect(self.serve(), Sec_WebSocket_Extensions=DEFLATE)
        for example in (
            b"\xf2\x48\xcd\xc9\xc9\x07\x00",  # 7.2.3.1: one block
            b"\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00",  # 7.2.3.3: no compression
            b"\xf3\x48\xcd\xc9\xc9\x07\x00\x00",  # 7.2.3.4: BFINAL set
            b"\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00",  # 7.2.3.5: two blocks
        ):
            with self.subTest(example=example):
                client.frame(TEXT, example, rsv=4)
                self.assertEqual(client.read(), "Hello")

    def test_none(self) -> None:
        server = self.serve(compression=False)
        client = self.connect(server, Sec_WebSocket_Extensions=DEFLATE)
        self.assertNotIn(b"Extensions", client.response)
        client.send(self.LONG)
        self.assertEqual(client.read_frame(), Frame(True, False, TEXT, self.LONG.encode()))

"""The program of the README's "The idea in sixty lines", with real clients."""

from __future__ import annotations

import base64
import os
import shutil
import threading
import typing
import unittest

from pywebsock import Message
from tests.program import test_interoperation as interoperation
from tests.tools.browser import chromium
from tests.tools.readme import CODE, ProgramTestCase
from tests.tools.support import (
    ACCEPT,
    CONT,
    DEADLINE,
    EVERYTHING,
    PING,
    TEXT,
    Client,
    package,
    pieces,
    require,
)

HEADING = "The idea in sixty lines"
SIZES = 0, 125, 126, 65_535, 65_536, 1_000_000  # the ends of the three forms of a length (RFC 6455 5.2)
MESSAGES: list[Message] = []
for size in SIZES:
    MESSAGES += ["é" * (size // 2) + "x" * (size % 2), bytes(range(251)) * (size // 251) + bytes(size % 251)]
ENCODED = [[interoperation.encode(message)] for message in MESSAGES]  # for tests/tools/interop/converse.mjs


class Bystander:
    """A client that reads in its own thread, since the program waits for each client that does not read."""

    def __init__(self, port: int) -> None:
        self.messages: list[Message] = []
        self._client = Client(port)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while len(self.messages) < len(MESSAGES):
            self.messages.append(self._client.read())

    def join(self) -> list[Message]:
        """Return all messages when they have arrived."""
        self._thread.join(DEADLINE)
        self._client.socket.close()
        return self.messages


@unittest.skipUnless(EVERYTHING or os.name == "posix", "programs are ended with Ctrl-C")
class FirstServer(ProgramTestCase):
    """The program keeps its promises."""

    def same(self, heard: list[Message], sent: list[Message]) -> None:
        """Compare message by message, so that a failure does not print megabytes."""
        for i, message in enumerate(sent):
            self.assertTrue(heard[i : i + 1] == [message], f"message {i}: {heard[i : i + 1]!r:.80}")
        self.assertEqual(len(heard), len(sent))

    def test_length(self) -> None:
        """The program has at most sixty lines that are not empty."""
        lines = [line for line in CODE[HEADING, "python"].splitlines() if line.strip()]
        self.assertLessEqual(len(lines), 60)
        self.assertLessEqual(max(map(len, lines)), 110)

    def test_handshake(self) -> None:
        with self.program(HEADING) as port, Client(port) as client:
            self.assertIn(f"\r\nSec-WebSocket-Accept: {ACCEPT}\r\n".encode(), client.response)

    def test_messages(self) -> None:
        """Messages of each size, text and binary, from three clients in turn, reach all three."""
        with self.program(HEADING) as port:
            clients = [Client(port) for _ in range(3)]
            for number, message in enumerate(MESSAGES):
                clients[number % 3].send(message)
                self.same([client.read() for client in clients], [message] * 3)
            for client in clients:
                client.socket.close()

    def test_fragments(self) -> None:
        """Chromium sends large messages in fragments."""
        with self.program(HEADING) as port, Client(port) as client:
            client.send_raw(pieces(TEXT, b"Hel", b"", b"lo"))
            self.assertEqual(client.read(), "Hello")

    def test_one_order(self) -> None:
        """If several clients send at the same time, all get all messages in the same order."""
        with self.program(HEADING) as port:
            clients = [Client(port) for _ in range(4)]
            for number in range(50):
                for name, client in enumerate(clients):
                    client.send(f"{name} {number}")
            heard = [[client.read() for _ in range(200)] for client in clients]
            self.assertEqual(heard.count(heard[0]), 4)
            for name in range(4):
                self.assertEqual(
                    [each for each in heard[0] if str(each)[0] == str(name)], [f"{name} {i}" for i in range(50)]
                )
            for client in clients:
                client.socket.close()

    def test_leaving(self) -> None:
        """A client that closes, or ends in the middle of a frame, disturbs no other."""
        with self.program(HEADING) as port, Client(port) as witness:
            for end in (b"\x88\x80" + bytes(4), b"\x81", b"\x81\xfe", b"\x81\x85" + bytes(6), b""):
                with Client(port) as client:
                    client.send_raw(end)
                    client.socket.shutdown(1)
                    self.assertEqual(client.read_all(), b"")
                witness.send("still here")
                self.assertEqual(witness.read(), "still here")


@unittest.skipUnless(EVERYTHING or os.name == "posix", "programs are ended with Ctrl-C")
class Faults(ProgramTestCase):
    """The faults that the table under the program lists."""

    def test_control_frame_between_fragments(self) -> None:
        """A Ping between fragments becomes part of the message."""
        with self.program(HEADING) as port, Client(port) as client:
            client.frame(TEXT, b"Hel", fin=False)
            client.frame(PING, b"?")
            client.frame(CONT, b"lo")
            self.assertEqual(client.read(), "Hel?")

    def test_control_frames(self) -> None:
        with self.program(HEADING) as port, Client(port) as client:
            client.frame(PING, b"anybody there?")
            client.send("no Pong came before this")
            self.assertEqual(client.read_frame().opcode, TEXT)

    def test_closing(self) -> None:
        with self.program(HEADING) as port, Client(port) as client:
            client.close(1000)
            self.assertEqual(client.read_all(), b"")

    def test_utf8(self) -> None:
        with self.program(HEADING) as port, Client(port) as client:
            client.frame(TEXT, b"\xff")
            self.assertEqual(client.read_frame().payload, b"\xff")

    def test_checks(self) -> None:
        """The program unmasks an unmasked frame, and loses its place in the stream."""
        with self.program(HEADING) as port, Client(port) as client:
            client.send_raw(b"\x81\x05Hello" + b"\x81\x85" + bytes(4) + b"again")
            self.assertNotEqual(client.read_frame().payload, b"Hello")

    def test_slow_clients(self) -> None:
        """A client that does not read delays all others."""
        with self.program(HEADING) as port, Client(port, small=True) as slow, Client(port) as sender:
            sender.socket.settimeout(0.5)
            with self.assertRaisesRegex(OSError, "timed out"):
                for _ in range(1000):
                    sender.send(bytes(100_000))
                    sender.read()
            slow.socket.close()

    def test_origins(self) -> None:
        with self.program(HEADING) as port, Client(port, Origin="https://evil.example") as page:
            page.send("hello from another page")
            self.assertEqual(page.read(), "hello from another page")


@unittest.skipUnless(EVERYTHING or os.name == "posix", "programs are ended with Ctrl-C")
class RealClients(ProgramTestCase):
    """Clients in use elsewhere: a library each for Python and Node.js, and a browser."""

    def check(self, converse: typing.Callable[[int], list[Message]]) -> None:
        """Let a client send each message and wait for it, while another client only receives."""
        with self.program(HEADING) as port:
            bystander = Bystander(port)
            for heard in (converse(port), bystander.join()):
                FirstServer.same(self, heard, MESSAGES)  # type: ignore[arg-type]

    def test_websockets(self) -> None:
        connect = package("websockets.sync.client").connect

        def converse(port: int) -> list[Message]:
            heard = []
            with connect(f"ws://localhost:{port}/", close_timeout=0.1) as connection:
                for message in MESSAGES:
                    connection.send(message)
                    heard.append(connection.recv(DEADLINE))
            return heard

        self.check(converse)

    def test_ws(self) -> None:
        node = shutil.which("node")
        require(node, "node")
        folder = interoperation.JavaScript().installed("ws").parent

        def converse(port: int) -> list[Message]:
            command = [
                str(node),
                str(interoperation.SCRIPTS / "client.mjs"),
                f"ws://localhost:{port}/",
                "ws",
                str(folder),
            ]
            return self.report(interoperation.converse_in_program(ENCODED, *command))

        self.check(converse)

    def test_chromium(self) -> None:
        with chromium() as browser:

            def converse(port: int) -> list[Message]:
                return self.report(interoperation.converse_in_page(browser, f"ws://localhost:{port}/", ENCODED))

            self.check(converse)

    def report(self, result: typing.Any) -> list[Message]:
        """Return the messages of a run of converse.mjs, which reports an unclean close."""
        self.assertEqual((result.get("error"), result.get("code"), result.get("wasClean")), (None, 1006, False))
        return [echo["text"] if "text" in echo else base64.b64decode(echo["base64"]) for echo in result["echoes"]]


if __name__ == "__main__":
    unittest.main()

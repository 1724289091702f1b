"""BroadcastServer as a library, as the README has it."""

from __future__ import annotations

import socketserver
import threading
import typing

import pywebsock
from pywebsock import BroadcastServer, CloseCode, WebSocketHandler
from tests.tools.support import DEADLINE, Client, ServerTestCase, eventually


class Chat(BroadcastServer):
    """The example of the README."""

    def on_open(self, client: WebSocketHandler) -> None:
        client.send(f"welcome, {client.address}")

    def on_message(self, client: WebSocketHandler, message: pywebsock.Message) -> None:
        self.broadcast(f"{client.address}: {message!s}")

    def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
        self.broadcast(f"{client.address} has left ({code})")


def address(client: Client) -> str:
    """What the server must call this client."""
    host, port = client.socket.getsockname()
    return f"{host}:{port}"


class Example(ServerTestCase):
    """What one does with it first."""

    def test_chat(self) -> None:
        server = self.serve(Chat)
        a, b = self.connect(server), self.connect(server)
        self.assertEqual([a.read(), b.read()], [f"welcome, {address(a)}", f"welcome, {address(b)}"])
        a.send("hi")
        self.assertEqual([a.read(), b.read()], [f"{address(a)}: hi"] * 2)
        b.close()
        self.assertEqual(b.read_close()[0], 1000)
        self.assertEqual(a.read(), f"{address(b)} has left (1000)")

    def test_history(self) -> None:
        server = self.serve(Chat, history=10)
        a = self.connect(server)
        for text in ("one", "two"):
            a.send(text)
        self.assertEqual(a.read(), f"welcome, {address(a)}")
        lines = [a.read(), a.read()]
        self.assertEqual(lines, [f"{address(a)}: one", f"{address(a)}: two"])
        b = self.connect(server)
        self.assertEqual([b.read() for _ in range(3)], [*lines, f"welcome, {address(b)}"])

    def test_context_manager(self) -> None:
        """serve_forever in one thread, shutdown in another; the with statement ends with server_close."""
        with Chat(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            try:
                client = self.connect(server)
                self.assertEqual(client.read(), f"welcome, {address(client)}")
                client.socket.close()
            finally:
                server.shutdown()
                thread.join(DEADLINE)
        self.assertEqual(server.socket.fileno(), -1)
        with self.assertRaises(OSError):
            self.connect(server)

    def test_never_served(self) -> None:
        """A server that was only made is closed without ado."""
        with BroadcastServer(("127.0.0.1", 0)) as server:
            server.broadcast("nobody hears this")

    def test_names(self) -> None:
        """It is what it says: a socketserver, and these names are public."""
        self.assertTrue(issubclass(BroadcastServer, socketserver.ThreadingTCPServer))
        self.assertTrue(issubclass(WebSocketHandler, socketserver.BaseRequestHandler))
        for name in pywebsock.__all__:
            self.assertTrue(hasattr(pywebsock, name), name)
        self.assertRegex(pywebsock.__version__, r"^\d+\.\d+\.\d+$")


class Settings(ServerTestCase):
    """Commented class attributes, which keyword arguments set for one server."""

    def make(self, **settings: typing.Any) -> BroadcastServer:
        """A server that does not listen."""
        server = BroadcastServer(("127.0.0.1", 0), bind_and_activate=False, **settings)
        self.addCleanup(server.server_close)
        return server

    def test_keyword(self) -> None:
        server = self.make(max_message=1, rate=2.5, origins=["*"], history=3)
        self.assertEqual((server.max_message, server.rate, server.origins, server.history), (1, 2.5, ["*"], 3))
        self.assertEqual(BroadcastServer.max_message, 16 * 1024 * 1024)

    def test_unknown(self) -> None:
        for name in ("max_mesage", "broadcast", "on_open", "_queue", "serve_forever", "__class__", "x"):
            with self.subTest(name), self.assertRaises(TypeError):
                self.make(**{name: 1})

    def test_class_attribute(self) -> None:
        class Small(BroadcastServer):
            """Short messages only."""

            max_message = 5

        server = self.serve(Small)
        client = self.connect(server)
        client.send("12345")
        self.assertEqual(client.read(), "12345")
        client.send("123456")
        self.assertEqual(client.read_close()[0], CloseCode.MESSAGE_TOO_BIG)

    def test_setting_of_a_subclass(self) -> None:
        class Greeter(BroadcastServer):
            """Has a setting of its own."""

            greeting = "hello"

            def on_open(self, client: WebSocketHandler) -> None:
                client.send(self.greeting)

        self.assertEqual(self.connect(self.serve(Greeter)).read(), "hello")

    def test_defaults_of_the_design(self) -> None:
        server = self.make()
        self.assertEqual((server.max_clients, server.ping_interval, server.ping_timeout), (10_000, 20, 20))
        self.assertEqual((server.max_backlog, server.history, server.rate), (16 * 1024 * 1024, 0, 0))
        self.assertTrue(server.compression)


class Clients(ServerTestCase):
    """What a hook may know about a client, and do with it."""

    def test_path_headers_address(self) -> None:
        known: list[WebSocketHandler] = []

        class Server(BroadcastServer):
            """Remembers its clients."""

            def on_open(self, client: WebSocketHandler) -> None:
                known.append(client)

        client = self.connect(self.serve(Server), X_Token="caf\xe9", User_Agent="  test ")
        eventually(lambda: known)
        self.assertEqual(known[0].target, "/")
        self.assertEqual(known[0].address, address(client))
        self.assertEqual(known[0].headers["x-token"], "caf\xe9")
        self.assertEqual(known[0].headers["user-agent"], "test")
        self.assertEqual(known[0].headers["host"], "localhost:4545")

    def test_rooms_by_path(self) -> None:
        """A use of path: who has the same one hears each other."""

        class Rooms(BroadcastServer):
            """Sends to those with the same path."""

            def on_message(self, client: WebSocketHandler, message: pywebsock.Message) -> None:
                for other in tuple(self.clients):
                    if other.target == client.target:
                        other.send(message)

        server = self.serve(Rooms)
        a, b, c = (self.connect(server, target=path) for path in ("/red", "/blue", "/red"))
        a.send("red")
        b.send("blue")
        self.assertEqual([a.read(), b.read(), c.read()], ["red", "blue", "red"])

    def test_send_and_close_in_on_open(self) -> None:
        class Doorman(BroadcastServer):
            """Lets in who knows the word."""

            def on_open(self, client: WebSocketHandler) -> None:
                if client.headers.get("authorization") != "Bearer open sesame":
                    client.close(CloseCode.POLICY_VIOLATION, "who are you?")

        server = self.serve(Doorman)
        good = self.connect(server, Authorization="Bearer open sesame")
        bad = self.connect(server)
        frame = bad.read_frame()
        self.assertEqual((frame.opcode, frame.payload), (8, b"\x03\xf0who are you?"))
        bad.send("let me in")
        bad.close(1008)
        self.assertEqual(bad.read_all(), b"")
        good.send("hello")
        self.assertEqual(good.read(), "hello")

    def test_a_handler_of_ones_own(self) -> None:
        """RequestHandlerClass, as everywhere in socketserver."""

        class Handler(WebSocketHandler):
            """Counts."""

            count = 0

        class Counter(BroadcastServer):
            """Answers with the number of the message."""

            def on_message(self, client: WebSocketHandler, message: pywebsock.Message) -> None:
                assert isinstance(client, Handler)
                client.count += 1
                client.send(str(client.count))

        server = Counter(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        self.addCleanup(server.server_close)
        self.addCleanup(thread.join, DEADLINE)
        self.addCleanup(server.shutdown)
        client = self.connect(server)
        for number in ("1", "2"):
            client.send("?")
            self.assertEqual(client.read(), number)

"""BroadcastServer as a library."""

from __future__ import annotations

import itertools
import socketserver
import threading
import types
import typing
import unittest.mock

import pywebsock
from pywebsock import BroadcastServer, CloseCode, HandshakeError, WebSocketHandler
from tests.tools.support import DEADLINE, DEFLATE, Client, ServerTestCase, eventually, in_thread, request


class Chat(BroadcastServer):
    """A chat that names the sender."""

    def on_open(self, client: WebSocketHandler) -> None:
        client.send(f"welcome, {client.address}")

    def on_message(self, client: WebSocketHandler, message: pywebsock.Message) -> None:
        self.broadcast(f"{client.address}: {message!s}")

    def on_close(self, client: WebSocketHandler, code: int, reason: str) -> None:
        self.broadcast(f"{client.address} has left ({code})")


def address(client: Client) -> str:
    """Return the server's name for this client."""
    host, port = client.socket.getsockname()
    return f"{host}:{port}"


class Example(ServerTestCase):
    """The first steps."""

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
        """serve_forever runs in one thread, shutdown in another; the with statement ends with server_close."""
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

    def test_handle_request(self) -> None:
        """As in socketserver, it waits for a connection, or for the timeout of the server."""
        with Chat(("127.0.0.1", 0)) as server, in_thread(server.handle_request) as thread:
            thread.join(0.2)
            self.assertTrue(thread.is_alive())
            client = self.connect(server)
            self.assertEqual(client.read(), f"welcome, {address(client)}")
            client.socket.close()
        with Chat(("127.0.0.1", 0)) as server, unittest.mock.patch.object(server, "handle_timeout") as late:
            server.timeout = 0.01
            server.handle_request()
        late.assert_called_once_with()

    def test_never_served(self) -> None:
        """A server that never served can be closed."""
        with BroadcastServer(("127.0.0.1", 0)) as server:
            server.broadcast("nobody hears this")

    def test_names(self) -> None:
        """The server is a socketserver, and these names are public."""
        self.assertTrue(issubclass(BroadcastServer, socketserver.ThreadingTCPServer))
        self.assertTrue(issubclass(WebSocketHandler, socketserver.BaseRequestHandler))
        for name in pywebsock.__all__:
            self.assertTrue(hasattr(pywebsock, name), name)
        self.assertRegex(pywebsock.__version__, r"^\d+\.\d+\.\d+$")


class Settings(ServerTestCase):
    """Class attributes, which keyword arguments set for one server."""

    def make(self, **settings: typing.Any) -> BroadcastServer:
        """Make a server that does not listen."""
        server = BroadcastServer(("127.0.0.1", 0), bind_and_activate=False, **settings)
        self.addCleanup(server.server_close)
        return server

    def test_keyword(self) -> None:
        server = self.make(max_message=1, rate=2.5, origins=["*"], history=3)
        self.assertEqual((server.max_message, server.rate, server.origins, server.history), (1, 2.5, ["*"], 3))
        self.assertEqual(BroadcastServer.max_message, 16 * 1024 * 1024)

    def test_unknown(self) -> None:
        for name in ("max_mesage", "broadcast", "on_open", "_queue", "serve_forever", "__class__", "clients", "x"):
            with self.subTest(name), self.assertRaises(TypeError):
                self.make(**{name: 1})

    def test_class_attribute(self) -> None:
        class Small(BroadcastServer):
            """A server for short messages."""

            max_message = 5

        server = self.serve(Small)
        client = self.connect(server)
        client.send("12345")
        self.assertEqual(client.read(), "12345")
        client.send("123456")
        self.assertEqual(client.read_close()[0], CloseCode.MESSAGE_TOO_BIG)

    def test_setting_of_a_subclass(self) -> None:
        class Greeter(BroadcastServer):
            """A server with its own setting."""

            greeting = "hello"

            def on_open(self, client: WebSocketHandler) -> None:
                client.send(self.greeting)

        self.assertEqual(self.connect(self.serve(Greeter)).read(), "hello")

    def test_defaults_of_the_design(self) -> None:
        server = self.make()
        self.assertEqual((server.max_clients, server.ping_interval, server.ping_timeout), (10_000, 20, 20))
        self.assertEqual((server.max_backlog, server.history, server.rate), (16 * 1024 * 1024, 0, 0))
        self.assertTrue(server.compression)


class Subclass(ServerTestCase):
    """Names in a subclass do not break the server, whose internal names have an underscore."""

    NAMES = (
        *("join", "leave", "accept", "close", "drop", "forget", "flush", "write", "pong", "deliver", "compress", "run"),
        *("messages", "window", "history_", "queue", "turn", "room", "rooms", "users", "names", "link", "seats", "now"),
        *("slow", "closing", "selector", "lock", "log", "state", "outbox", "transport", "budget", "connections"),
        *("started", "refused", "local", "housekeeper", "alarm", "ring", "ended", "fewer", "most", "strangers", "post"),
        *("send", "receive", "stop", "start", "name", "thread", "put", "get", "wake", "clear", "end", "admit_", "data"),
        *("read", "recv", "path", "path_", "pinged_at", "late", "lost", "pongs", "pace", "deadline", "unheard"),
    )

    def test_attributes(self) -> None:
        """Attributes with common names, in the server and in its handlers."""
        nonsense = dict.fromkeys(self.NAMES, "nonsense")

        class Server(type("Base", (BroadcastServer,), nonsense)):  # type: ignore[misc]
            """A server with another handler class."""

            def __init__(self, address: tuple[str, int], **settings: typing.Any) -> None:
                super().__init__(address, handler_type, **settings)

        handler_names = {name: value for name, value in nonsense.items() if name not in ("send", "close", "data")}
        handler_type = type("Handler", (WebSocketHandler,), handler_names)
        server = self.serve(Server, history=2)
        self.assertEqual(server.join, "nonsense")
        a, b = self.connect(server), self.connect(server)
        a.send("hello")
        self.assertEqual([a.read(), b.read()], ["hello", "hello"])
        a.frame(9, b"ping")
        self.assertEqual(a.read_frame().payload, b"ping")
        self.assertEqual(server.status()["messages"], 1)
        b.close()
        self.assertEqual(b.read_close()[0], 1000)

    def test_methods(self) -> None:
        """Methods with common names, which are never called."""

        class Server(BroadcastServer):
            """A server with methods of these names."""

            def join(self, *_: object) -> None:
                raise AssertionError("not yours")

            leave = accept = close = drop = deliver = flush = write = put = run = wake = settle = perform = queue = join

        server = self.serve(Server)
        client = self.connect(server)
        client.send("hello")
        self.assertEqual(client.read(), "hello")

    def test_threads_that_tools_see(self) -> None:
        """Debuggers and coverage.py see only threads of threading.Thread."""
        traced: list[str] = []

        def trace(frame: types.FrameType, *_: object) -> None:
            if frame.f_code.co_filename == __file__:
                traced.append(frame.f_code.co_name)

        threading.settrace(trace)
        self.addCleanup(threading.settrace, None)
        server = self.serve(Chat)
        with self.connect(server) as client:
            client.read()
            client.send("Hello")
            self.assertEqual(client.read(), f"{address(client)}: Hello")
            client.close()
            self.assertEqual(client.read_close(), (1000, ""))
        eventually(lambda: traced[-1:] == ["on_close"])
        self.assertEqual(traced, ["on_open", "on_message", "on_close"])

    def test_before_the_constructor(self) -> None:
        """No client is served before serve_forever(), so hooks see attributes that are set after super().__init__()."""

        class Late(BroadcastServer):
            """A server that sets an attribute after the constructor of its base class."""

            def __init__(self, *arguments: typing.Any, **settings: typing.Any) -> None:
                super().__init__(*arguments, **settings)
                self.greeting = "welcome"

            def on_open(self, client: WebSocketHandler) -> None:
                client.send(self.greeting)

        self.assertEqual(self.connect(self.serve(Late)).read(), "welcome")


class To(ServerTestCase):
    """broadcast(message, to=clients) sends to some clients, in the one order."""

    def setUp(self) -> None:
        self.server = self.serve(history=10)
        self.clients: list[Client] = []
        self.handlers: list[WebSocketHandler] = []
        for _ in range(3):
            before = self.server.clients
            self.clients.append(self.connect(self.server))
            self.handlers += self.server.clients - before

    def check(self, *expected: list[str]) -> None:
        """Check the messages of each client, up to a message that all get."""
        self.server.broadcast("end")
        for client, messages in zip(self.clients, expected):
            self.assertEqual([client.read() for _ in range(len(messages) + 1)], [*messages, "end"])

    def test_some(self) -> None:
        a, b, c = self.handlers
        self.server.broadcast("a and b", to=[a, b])
        self.server.broadcast("all but a", to=self.server.clients - {a})
        self.server.broadcast("c", to=(each for each in (c,)))
        self.server.broadcast("nobody", to=[])
        self.server.broadcast("a, once", to=[a, a, a])
        self.check(["a and b", "a, once"], ["a and b", "all but a"], ["all but a", "c"])

    def test_not_in_the_history_and_not_counted(self) -> None:
        self.server.broadcast("to some", to=self.server.clients)
        self.server.broadcast("to all")
        newcomer = self.connect(self.server)
        self.assertEqual(newcomer.read(), "to all")
        self.assertEqual(self.server.status()["messages"], 1)

    def test_long_and_compressed(self) -> None:
        """Each client gets the form that it has negotiated."""
        squeezed = self.connect(self.server, Sec_WebSocket_Extensions=DEFLATE)
        text = "compressible " * 1000
        self.server.broadcast(text, to=self.server.clients)
        self.assertTrue(self.clients[0].read_frame().payload == text.encode())
        frame = squeezed.read_frame()
        self.assertTrue(frame.rsv1 and len(frame.payload) < 1000)

    def test_gone(self) -> None:
        """A client that has left gets no message; others are not affected."""
        gone = self.handlers.pop()
        client = self.clients.pop()
        client.close()
        client.read_close()
        eventually(lambda: gone not in self.server.clients)
        self.server.broadcast("x", to=[gone, *self.handlers])
        self.check(["x"], ["x"])

    def test_of_another_server(self) -> None:
        """A client of another server gets no message."""
        other = self.serve()
        client = self.connect(other)
        self.server.broadcast("x", to=other.clients | {self.handlers[0]})
        other.broadcast("end")
        self.assertEqual(client.read(), "end")
        self.check(["x"], [], [])

    def test_no_clients(self) -> None:
        """A recipient that is not a client raises TypeError in the caller, and no message is sent."""
        for to in (1, "abc", [None], ["x"], self.server, [self.server], [self.handlers[0], "x"], object()):
            with self.subTest(to=to), self.assertRaises(TypeError):
                self.server.broadcast("never", to=to)  # type: ignore[arg-type]
        self.check([], [], [])

    def test_one_client_in_the_place_of_a_list(self) -> None:
        """A common mistake."""
        with self.assertRaises(TypeError):
            self.server.broadcast("never", to=self.handlers[0])  # type: ignore[arg-type]

    def test_an_error_while_it_is_gone_through(self) -> None:
        def fails() -> typing.Iterator[WebSocketHandler]:
            yield self.handlers[0]
            raise LookupError

        with self.assertRaises(LookupError):
            self.server.broadcast("never", to=fails())
        self.check([], [], [])

    def test_one_order(self) -> None:
        """Two messages have the same order for all clients that get both, from any threads."""
        rounds, threads = 300, 3

        def say(number: int) -> None:
            for i in range(rounds):
                to = None if i % 2 else self.server.clients - {self.handlers[number]}
                self.server.broadcast(f"{number} {i}", to=to)

        speakers = [threading.Thread(target=say, args=(number,)) for number in range(threads)]
        for speaker in speakers:
            speaker.start()
        heard: list[list[str]] = [[], [], []]
        for number, client in enumerate(self.clients):
            size = rounds * threads - rounds // 2  # all but its own even ones
            heard[number] = [str(client.read()) for _ in range(size)]
        for speaker in speakers:
            speaker.join(DEADLINE)
        for one, other in itertools.combinations(heard, 2):
            common = set(one) & set(other)
            self.assertEqual([each for each in one if each in common], [each for each in other if each in common])


class Clients(ServerTestCase):
    """The attributes and methods of a client."""

    def test_path_headers_address(self) -> None:
        known: list[WebSocketHandler] = []

        class Server(BroadcastServer):
            """A server that keeps a list of its clients."""

            def on_open(self, client: WebSocketHandler) -> None:
                known.append(client)

        client = self.connect(self.serve(Server), X_Token="caf\xe9", User_Agent="  test ")
        eventually(lambda: known)
        self.assertEqual(known[0].target, "/")
        self.assertEqual(known[0].address, address(client))
        self.assertEqual(known[0].headers["x-token"], "caf\xe9")
        self.assertEqual(known[0].headers["user-agent"], "test")
        self.assertEqual(known[0].headers["host"], "localhost:4545")

    def test_address_from_a_field(self) -> None:
        """Data from the network is escaped and cut before it is logged, even if a hook puts it into client.address."""

        class Server(BroadcastServer):
            """A server behind a proxy."""

            def admit(self, client: WebSocketHandler) -> None:
                client.address = client.headers["x-forwarded-for"]
                if "refused" in client.address:
                    raise HandshakeError(401, "no")

        server = self.serve(Server)
        for said, known in (
            ("192.0.2.1", "192.0.2.1"),
            ("[2001:db8::1]:4545", "[2001:db8::1]:4545"),
            ("\x9b2J\xe9\t", r"\x9b2J\xe9"),
            ("refused\x9b2J", r"refused\x9b2J"),
            ("x" * 3000, "x" * 100),
        ):
            with self.subTest(said[:20]), self.assertLogs("pywebsock", "INFO") as logged:
                client = self.connect(server, handshake=False)
                client.send_raw(request(X_Forwarded_For=said))
                client.read_head()
                client.socket.close()
                eventually(lambda: logged.records)
                self.assertEqual(logged.records[0].getMessage().split(" ")[0], known)

    def test_rooms_by_path(self) -> None:
        """Rooms by path: clients with the same path get each other's messages."""

        class Rooms(BroadcastServer):
            """A server that sends to clients with the same path."""

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
        class Admission(BroadcastServer):
            """A server that admits clients with a password."""

            def on_open(self, client: WebSocketHandler) -> None:
                if client.headers.get("authorization") != "Bearer open sesame":
                    client.close(CloseCode.POLICY_VIOLATION, "who are you?")

        server = self.serve(Admission)
        good = self.connect(server, Authorization="Bearer open sesame")
        bad = self.connect(server)
        frame = bad.read_frame()
        self.assertEqual((frame.opcode, frame.payload), (8, b"\x03\xf0who are you?"))
        bad.send("let me in")
        bad.close(1008)
        self.assertEqual(bad.read_all(), b"")
        good.send("hello")
        self.assertEqual(good.read(), "hello")

    def test_another_handler_class(self) -> None:
        """RequestHandlerClass, as in socketserver."""

        class Handler(WebSocketHandler):
            """A handler with a counter."""

            count = 0

        class Counter(BroadcastServer):
            """A server that sends the number of each message."""

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

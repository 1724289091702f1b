"""Hooks, and the methods for any thread."""

from __future__ import annotations

import math
import socket
import threading
import time
import typing
import unittest.mock

import pywebsock
from tests.tools.support import (
    CLOSE,
    DEADLINE,
    TEXT,
    Blocking,
    Frame,
    Recorder,
    ServerTestCase,
    eventually,
    in_thread,
    masked_frame,
    request,
)


class Hooks(ServerTestCase):
    """An exception in a hook is logged with its traceback and closes only that client, with 1011."""

    class Server(Recorder):
        """Raises an exception in the hook that a client's path or message names."""

        def on_open(self, client: pywebsock.WebSocketHandler) -> None:
            if client.target == "/open":
                self.broadcast("good")
                raise LookupError("in on_open")

        def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
            if message == "fail":
                raise LookupError("in on_message")
            super().on_message(client, message)

        def on_close(self, client: pywebsock.WebSocketHandler, code: int, reason: str) -> None:
            super().on_close(client, code, reason)
            if client.target == "/close":
                raise LookupError("in on_close")

    def check(self, data: bytes, code: int, what: str) -> None:
        """Send messages: the client gets this code, the log a traceback, another client only the valid message."""
        server = self.serve(self.Server)
        witness, client = self.connect(server), self.connect(server, handshake=False)
        with self.assertLogs("pywebsock", "ERROR") as logged:
            client.send_raw(data)
            client.read_head()
            self.assertEqual(client.read(), "good")
            self.assertEqual(client.read_close()[0], code)
            eventually(lambda: logged.output)
        self.assertEqual(len(logged.records), 1)
        self.assertIn(f"LookupError: {what}", logged.output[0])
        server.wait_for("close", code, "" if code == 1000 else "internal error")
        witness.send("all is well")
        self.assertEqual(witness.read(), "good")
        self.assertEqual(witness.read_frame(), Frame(True, False, TEXT, b"all is well"))

    def test_on_open(self) -> None:
        self.check(request(target="/open") + masked_frame(TEXT, b"never"), 1011, "in on_open")

    def test_on_message(self) -> None:
        texts = b"".join(masked_frame(TEXT, text) for text in (b"good", b"fail", b"never"))
        self.check(request() + texts, 1011, "in on_message")

    def test_on_close(self) -> None:
        close = masked_frame(CLOSE, b"\x03\xe8")
        self.check(request(target="/close") + masked_frame(TEXT, b"good") + close, 1000, "in on_close")

    def test_a_hook_may_block(self) -> None:
        """A hook may block: only its client waits."""
        go_on = threading.Event()

        class Server(Recorder):
            """A server whose hook blocks for one message."""

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                if message == "wait":
                    go_on.wait(DEADLINE)
                super().on_message(client, message)

        server = self.serve(Server)
        a, b = self.connect(server), self.connect(server)
        a.send_raw(masked_frame(TEXT, b"before") + masked_frame(TEXT, b"wait"))
        for i in range(10):
            b.send(str(i))
        messages = [b.read() for _ in range(10)]
        while messages[-1] != "9":
            messages.append(b.read())
        self.assertNotIn("wait", messages)
        go_on.set()
        while messages[-1] != "wait":
            messages.append(b.read())
        self.assertEqual(sorted(map(str, messages)), [*map(str, range(10)), "before", "wait"])

    def test_new_clients_while_a_hook_blocks(self) -> None:
        """While a hook blocks and the loop sleeps, others connect without delay."""

        class Admitting(Blocking):
            """Blocks for one client in admit, for others in on_message."""

            def admit(self, client: pywebsock.WebSocketHandler) -> None:
                if client.target == "/admit":
                    self.block()

        for target in ("/", "/admit"):
            with self.subTest(target):
                server = self.serve(Admitting)
                server._loop.deadlines.interval = 2 * DEADLINE
                eventually(lambda: server._loop.deadlines.next_look > server._loop.now + DEADLINE)  # noqa: B023
                client = self.connect(server, handshake=False)
                client.send_raw(request(target=target) + masked_frame(TEXT))
                self.assertTrue(server.blocks.wait(DEADLINE))
                eventually(lambda: server._queue._is_asleep and server._loop._patience == math.inf)  # noqa: B023
                self.connect(server)
                self.assertFalse(server.go_on.is_set())

    def test_new_clients_while_a_thread_broadcasts(self) -> None:
        """A hook blocks, and the queue is full nearly always: others connect, and their hooks run."""
        server = self.serve(Blocking)
        stop, data = threading.Event(), bytes(64 * 1024)
        client, *readers = [self.connect(server) for _ in range(8)]

        def broadcast() -> None:
            while not stop.is_set():
                server.broadcast(data)

        def discard() -> None:
            while not stop.is_set():
                for each in (client, *readers):
                    each.socket.recv(1 << 20)

        with in_thread(broadcast), in_thread(discard):
            client.send("block")
            try:
                self.assertTrue(server.blocks.wait(DEADLINE))
                other = self.connect(server, handshake=False)
                other.send_raw(request(target="/other"))
                eventually(lambda: ("open", "/other") in server.heard, deadline=DEADLINE / 6)
                self.assertFalse(server.go_on.is_set())
            finally:
                stop.set()
                server.broadcast(data)  # so that no client waits for more
        server.go_on.set()

    def test_gone_while_a_hook_blocks(self) -> None:
        """A client that has gone keeps nothing of the budget for its unfinished message."""
        for end in (socket.socket.close, lambda connection: connection.shutdown(socket.SHUT_WR)):
            with self.subTest(end):
                server = self.serve(Blocking)
                whole = server._budget.left
                client = self.connect(server)
                client.send("block")
                self.assertTrue(server.blocks.wait(DEADLINE))
                client.send_raw(masked_frame(TEXT, bytes(100_000), fin=False))
                eventually(lambda: server._budget.left < whole)  # noqa: B023
                end(client.socket)
                eventually(lambda: server._budget.left == whole)  # noqa: B023
                self.assertFalse(server.go_on.is_set())

    def test_closed_before_on_open(self) -> None:
        """After close(), on_close is the only hook."""
        server = self.serve()
        join = server._room.join

        def join_and_close(connection: pywebsock.Connection, response: bytes, mark: str) -> None:
            join(connection, response, mark)
            connection.client.close(4000)

        with unittest.mock.patch.object(server._room, "join", join_and_close):
            client = self.connect(server)
        self.assertEqual(client.read_frame().payload, b"\x0f\xa0")
        client.close(4000)
        server.wait_for("close", 4000, "")
        self.assertEqual(server.heard, [("close", 4000, "")])

    def test_send_for_each(self) -> None:
        """An override of broadcast() may call send()."""

        class Personal(Recorder):
            """Names each recipient."""

            def broadcast(self, message: pywebsock.Message, to: typing.Any = None) -> None:
                for client in self.clients:
                    client.send(f"{client.target}: {message!s}")

        server = self.serve(Personal)
        client = self.connect(server, target="/ann")
        client.send("Hello")
        self.assertEqual(client.read(), "/ann: Hello")

    def test_a_close_while_a_hook_blocks(self) -> None:
        """on_close gets the code of the client's Close, even if a message meanwhile finds the connection lost."""
        server = self.serve(Blocking)
        client = self.connect(server)
        client.send("block")
        self.assertTrue(server.blocks.wait(DEADLINE))
        client.close(1001, "bye")
        (connection,) = server._room.connections
        eventually(lambda: connection.paused)
        client.socket.close()
        while connection.send is not pywebsock.discard:
            server.broadcast("is anybody there?")
        server.go_on.set()
        server.wait_for("close", 1001, "bye")

    def test_order_of_hooks(self) -> None:
        server = self.serve()
        client = self.connect(server, handshake=False)
        client.send_raw(request(target="/p?q") + masked_frame(TEXT, b"x") + masked_frame(CLOSE, b"\x0f\xa0bye"))
        client.read_all()
        expected = [("open", "/p?q"), ("message", "x"), ("close", 4000, "bye")]
        server.wait_for(*expected[-1])
        self.assertEqual(server.heard, expected)

    def test_a_hook_may_call_everything(self) -> None:
        class Server(Recorder):
            """A server whose hook sends, broadcasts and closes."""

            def on_open(self, client: pywebsock.WebSocketHandler) -> None:
                client.send("welcome")
                self.broadcast("somebody came")

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                client.send(b"to you")
                self.broadcast("to all")
                client.close(4000, "enough")

            def on_close(self, client: pywebsock.WebSocketHandler, code: int, reason: str) -> None:
                client.send("nobody hears this")
                client.close()
                self.broadcast(f"somebody left: {code}")

        server = self.serve(Server)
        a = self.connect(server)
        self.assertEqual([a.read(), a.read()], ["welcome", "somebody came"])
        b = self.connect(server)
        self.assertEqual([b.read(), b.read()], ["welcome", "somebody came"])
        b.send("x")
        self.assertEqual([b.read(), b.read()], [b"to you", "to all"])
        self.assertEqual(b.read_frame().payload[2:], b"enough")
        b.close(4000)
        self.assertEqual(b.read_all(), b"")
        self.assertEqual([a.read() for _ in range(3)], ["somebody came", "to all", "somebody left: 4000"])

    def test_turns(self) -> None:
        """While one thread runs the hooks, a client with many messages lets others go on; its own stay in order."""
        heard: list[pywebsock.Message] = []

        class Server(pywebsock.BroadcastServer):
            """Takes a millisecond for each message."""

            def on_message(self, client: pywebsock.WebSocketHandler, message: pywebsock.Message) -> None:
                time.sleep(0.001)
                heard.append(message)

        server = self.serve(Server)
        long, short = self.connect(server), self.connect(server)
        with unittest.mock.patch.object(server._hooks, "relieve"):  # as while the queue is full
            frames = [masked_frame(TEXT, b"%d" % i) for i in range(100)]
            long.send_raw(b"".join(frames[:80]))
            eventually(lambda: heard)
            long.send_raw(b"".join(frames[80:]))  # they wait until the first ones are through
            short.send("short")
            eventually(lambda: len(heard) == 101)
        self.assertLess(heard.index("short"), 60)
        heard.remove("short")
        self.assertEqual(heard, [str(i) for i in range(100)])

    def test_end_of_on_open(self) -> None:
        """on_open returns while the loop takes messages of its client: the loop broadcasts the later ones itself."""
        go_on = threading.Event()

        class Server(pywebsock.BroadcastServer):
            """Waits in on_open; its messages are broadcast."""

            def on_open(self, client: pywebsock.WebSocketHandler) -> None:
                go_on.wait(DEADLINE)

        server = self.serve(Server)
        gate = server._loop.sender.gate
        lets_through = gate.lets_through

        def return_meanwhile(connection: pywebsock.Connection, now: float) -> bool:
            if connection.submitted:  # the first message waits for on_open, this is the second one
                go_on.set()
                eventually(lambda: connection.client._inbox and not connection.client._inbox.taken)
            return lets_through(connection, now)

        client = self.connect(server)
        with unittest.mock.patch.object(gate, "lets_through", return_meanwhile):
            client.send_raw(masked_frame(TEXT, b"first") + masked_frame(TEXT, b"second"))
            self.assertEqual([client.read(), client.read()], ["first", "second"])


class AnyThread(ServerTestCase):
    """broadcast, send and close check their arguments in the thread of the caller."""

    def setUp(self) -> None:
        self.server = self.serve()
        self.client = self.connect(self.server)
        (self.handler,) = self.server.clients

    def tearDown(self) -> None:
        """After each refusal, no message was sent, and the server goes on."""
        self.server.broadcast("end")
        self.assertEqual(self.client.read(), "end")

    def test_messages(self) -> None:
        for message in ("text", "", b"bytes", b"", bytearray(b"array"), memoryview(b"view")):
            with self.subTest(message=message):
                expected = message if isinstance(message, str) else bytes(message)
                self.server.broadcast(message)  # type: ignore[arg-type]
                self.handler.send(message)  # type: ignore[arg-type]
                self.assertEqual([self.client.read(), self.client.read()], [expected] * 2)

    def test_message_may_change_after_sending(self) -> None:
        changing = bytearray(b"before")
        with self.server._queue._lock:
            self.server.broadcast(changing)  # type: ignore[arg-type]
            changing[:] = b"after!"
        self.server.broadcast("next")
        self.assertEqual([self.client.read(), self.client.read()], [b"before", "next"])

    def test_type_error(self) -> None:
        for message in (None, 1, ["x"], object()):
            with self.subTest(message=message):
                with self.assertRaises(TypeError):
                    self.server.broadcast(message)  # type: ignore[arg-type]
                with self.assertRaises(TypeError):
                    self.handler.send(message)  # type: ignore[arg-type]

    def test_value_error(self) -> None:
        for code in (-1, 0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65536):
            with self.subTest(code=code), self.assertRaises(ValueError):
                self.handler.close(code)
        lone = "\ud800"  # half of a surrogate pair, which has no UTF-8
        with self.assertRaises(ValueError):
            self.server.broadcast(lone)
        with self.assertRaises(ValueError):
            self.handler.send(lone)

    def test_value_error_for_a_reason(self) -> None:
        with self.assertRaises(ValueError):
            self.handler.close(1000, "\ud800")

    def test_long_reason_is_cut(self) -> None:
        """A Close frame has 125 bytes at most, and never half a character."""
        for reason, expected in (
            ("x" * 200, "x" * 123),
            ("\u20ac" * 100, "\u20ac" * 41),
            ("x\u20ac" * 50, "x\u20ac" * 30 + "x"),
        ):
            client = self.connect(self.server)
            (handler,) = self.server.clients - {self.handler}
            handler.close(4000, reason)
            frame = client.read_frame()
            self.assertEqual(frame.payload[2:].decode(), expected)
            client.close(4000)
            self.assertEqual(client.read_all(), b"")
            eventually(lambda: len(self.server.clients) == 1)

    def test_to_a_client_that_has_gone(self) -> None:
        client = self.connect(self.server)
        (handler,) = self.server.clients - {self.handler}
        client.close()
        client.read_close()
        handler.send("nobody hears this")
        handler.close()

    def test_large_broadcast(self) -> None:
        """max_message is for messages of clients; a larger broadcast passes through the queue."""
        message = bytes(range(256)) * 4 * 1024 * 6  # 6 MiB
        with in_thread(self.server.broadcast, message):
            self.assertEqual(self.client.read(), message)

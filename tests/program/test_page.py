"""The page in Chromium, Firefox and WebKitGTK: one room, without lost or doubled messages."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import pathlib
import random
import re
import socket
import sys
import tempfile
import threading
import unittest

from tests.tools.browser import BROWSERS, ENGINES, PageTestCase, Tab, in_each_engine
from tests.tools.faults import paused
from tests.tools.screenshot import take
from tests.tools.support import ROOT, Client, Process, free_port

CHAT = """
import re, sys
sys.path.insert(0, {root!r})
from pywebsock import BroadcastServer, main
class Chat(BroadcastServer):
    def on_open(self, client):
        client.send("welcome")
    def on_message(self, client, message):
        self.broadcast(f"{{client.address}}: {{message}}")
with Chat(("127.0.0.1", 0), history=50) as server:
    print(f"listening on http://localhost:{{server.server_address[1]}}/", flush=True)
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()
"""

OTHERS = CHAT.replace("self.broadcast(f", "self.broadcast(to=self.clients - {{client}}, message=f").replace(
    'client.send("welcome")', "pass"
)


class NoServer:
    """No server: a port without a listener."""

    def __init__(self) -> None:
        self.port = free_port()


class Unmarked:
    """Another server, without marks: it sends the same messages to each new client, then each message back.

    It refuses other requests, or leaves them without an answer.
    """

    def __init__(self, *history: str, port: int = 0, answers: bool = True) -> None:
        self._history = history
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run)
        self._connections: list[socket.socket] = []

    def __enter__(self) -> Unmarked:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in self._connections:
            connection.close()

    def say(self, text: str) -> None:
        """Send a text to all clients."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(bytes((0x81, len(text))) + text.encode())

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            head = connection.recv(65536)
            key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
            if not key:
                return connection.close() if self._answers else None
            accept = base64.b64encode(hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            connection.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: %s\r\n\r\n" % accept
            )
            for text in self._history:
                connection.sendall(bytes((0x81, len(text))) + text.encode())
            while len(frame := connection.recv(65536)) >= 6:
                mask, payload = frame[2:6], frame[6:]
                if frame[0] == 0x81:
                    text = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)).decode()
                    connection.sendall(bytes((0x81, len(text))) + text.encode())
        return None


def tearDownModule() -> None:
    BROWSERS.close()


class Room(PageTestCase):
    """Tabs from the disk and from the server, and programs."""

    def setUp(self) -> None:
        self.server = self.serve()
        self.tabs = [self.open(url) for url in (self.from_disk(self.server), f"http://localhost:{self.server.port}/")]

    def assert_everywhere(self, *texts: str) -> None:
        """Check that each tab shows exactly these messages in this order."""
        for tab in self.tabs:
            tab.wait_for_messages(len(texts))
            self.assertEqual(tab.messages(), list(texts), tab.url)

    def test_all_tabs_show_each_message(self) -> None:
        texts = ["from the disk, Grüße, 世界", "two\nlines\n  of text"]
        for i, (tab, text) in enumerate(zip(self.tabs, texts)):
            tab.send(text)
            self.assert_everywhere(*texts[: i + 1])
        for tab, text in zip(self.tabs, texts):
            self.assertEqual(tab.messages(".mine"), [text], "its own, and only they, are marked")
            self.assertEqual(tab.outbox(), [])

    def test_the_outbox_does_not_flash(self) -> None:
        """If the echo comes at once, the page does not show that it waits."""
        tab = self.tabs[0]
        tab.run("window.heights = []; new ResizeObserver(() => heights.push(outbox.offsetHeight)).observe(outbox)")
        tab.send("hello")
        self.assert_everywhere("hello")
        self.wait(lambda: tab.run("return heights.length"), "the height of the outbox")
        self.assertEqual(set(tab.run("return heights")), {0})
        tab.run("connection.socket.onmessage = null; submit('lost')")
        self.wait(lambda: tab.run("return outbox.offsetHeight") > 20, "the message that does not come back")

    def test_markup_is_text(self) -> None:
        text = "<img src=x onerror=\"document.title='owned'\"><b>bold</b><script>alert(1)</script> &amp; </li>"
        with Client(self.server.port) as program:
            program.send(text)
            self.assert_everywhere(text)
        for tab in self.tabs:
            self.assertEqual(tab.run("return document.querySelectorAll('#log .text *').length"), 0)
            self.assertNotIn("owned", tab.run("return document.title"))

    def test_programs_are_in_the_room(self) -> None:
        with Client(self.server.port) as program:
            self.tabs[1].send("from a tab")
            self.assertEqual(program.read(), "from a tab")
            program.send("long " * 20_000)
            program.send(bytes(1000))
            for tab in self.tabs:
                tab.wait_for_messages(3)
                _, long, binary = tab.messages()
                self.assertTrue(long.startswith("long long"))
                self.assertEqual(binary, "binary, 1,000 bytes")


class History(PageTestCase):
    """A page finds the messages that it knows in a server's history."""

    def away(self, tab: Tab, server: Process, *messages: str | bytes) -> None:
        """Send messages while a tab has no connection, and connect it again. The last message must be new."""
        tab.run("if (connection.socket) connection.end('moved'); connection.retryAt = Infinity")
        with Client(server.port) as program:
            for message in messages:
                program.send(message)
            while program.read() != messages[-1]:
                pass
        tab.run("connection.open()")
        tab.wait_for_state("connected")

    def test_nothing_is_shown_twice(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.send("mine")
        tab.wait_for_messages(1)
        shown = ["mine"]
        for news in ["a", b"\0\1\2", "end 1"], ["end 2"], ["b", "b", "a", "end 3"]:
            self.away(tab, server, *news)
            shown += [each if isinstance(each, str) else "binary, 3 bytes" for each in news]
            tab.wait_for_messages(len(shown))
            self.assertEqual(tab.messages(), shown)
        self.assertEqual(tab.messages(".mine"), ["mine"])
        self.assertIn("nothing is missing", tab.notes()[-1])

    def test_a_history_that_is_too_short_is_shown_in_full(self) -> None:
        server = self.serve("--history", "2")
        tab = self.open(self.from_disk(server))
        tab.send("mine")
        tab.wait_for_messages(1)
        self.away(tab, server, "a", "b", "end")
        tab.wait_for_messages(3)
        self.assertEqual(tab.messages(), ["mine", "b", "end"])
        self.assertIn("may be missing", tab.notes()[-1])

    def test_messages_that_were_not_confirmed_turn_up_in_it(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.send("first")
        tab.wait_for_messages(1)
        # Messages reach the server, but no echo reaches the page.
        tab.run("connection.socket.onmessage = null; submit('second'); submit('third')")
        with Client(server.port) as program:
            while program.read() != "third":
                pass
        tab.run("connection.end('moved'); connection.retryAt = Infinity")
        self.assertEqual(tab.outbox_states(), ["not confirmed, may have arrived"] * 2)
        tab.run("connection.open()")
        tab.wait_for_messages(3)
        self.assertEqual(tab.messages(), ["first", "second", "third"])
        self.assertEqual(tab.messages(".mine"), ["first", "second", "third"])
        self.assertEqual(tab.outbox(), [])

    def test_an_empty_message_is_a_message(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        self.away(tab, server, "", "", "end")
        tab.wait_for_messages(3)
        self.assertEqual(tab.messages(), ["", "", "end"])

    def test_a_server_that_marks_nothing(self) -> None:
        """Without marks, all messages are shown in order, twice rather than never."""
        with Unmarked("one", "two") as server:
            tab = self.open(self.from_disk(server))
            tab.wait_for_messages(2)
            for count in 4, 6:
                tab.run("connection.end('moved')")
                tab.wait_for_messages(count)
            self.assertEqual(tab.messages(), ["one", "two"] * 3)
            tab.send("mine")
            tab.wait_for_messages(7)
            self.assertEqual(tab.messages(".mine"), ["mine"])

    def test_another_server_takes_the_place_of_one_with_marks(self) -> None:
        """A page that waits for a mark shows the messages in the end, although they keep coming."""
        server = self.serve()
        tab = self.open(self.from_disk(server, self.hasty(STALLED=3000)))
        tab.send("before")
        tab.wait_for_messages(1)
        server.stop()
        with Unmarked(port=server.port) as other:
            tab.wait_for_state("connected")

            def is_shown() -> bool:
                other.say("news")
                return "news" in tab.messages()

            self.wait(is_shown, "the messages of the other server")
            tab.run("connection.end('moved'); connection.open()")
            tab.wait_for_state("connected")
            self.assertIsNone(tab.run("return connection.held"), "the next time, the page does not wait")
            tab.send("mine")
            self.wait(lambda: tab.messages(".mine") == ["before", "mine"], "the own message")

    def test_a_reload_keeps_the_side(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("theirs")
            tab.wait_for_messages(1)
            tab.send("mine")
            tab.wait_for_messages(2)
            tab.reload()
            tab.wait_for_messages(2)
            self.assertEqual(tab.messages(), ["theirs", "mine"])
            self.assertEqual(tab.messages(".mine"), ["mine"])

    def test_typed_offline(self) -> None:
        """The server restarts: all messages that were typed meanwhile are in all tabs, once."""
        server = self.serve("--history", "100")
        tabs = [self.open(self.from_disk(server)), self.open(f"http://localhost:{server.port}/")]
        tabs[0].send("before")
        for tab in tabs:
            tab.wait_for_messages(1)
        self.assertEqual(server.stop(), 0)
        texts = [f"offline in tab {i}" for i in range(2)]
        for tab, text in zip(tabs, texts):
            tab.wait_for_state("offline")
            tab.send(text)
            self.assertEqual(tab.outbox(), [text])
        self.serve("--history", "100", port=server.port)
        for tab, text in zip(tabs, texts):
            tab.wait_for_messages(3)
            self.assertEqual(sorted(tab.messages()), ["before", *texts])
            self.assertIn(text, tab.messages(".mine"))
            self.assertEqual(tab.outbox(), [])


class Outbox(PageTestCase):
    """A typed message is delivered, or still in the outbox."""

    def test_a_dead_connection_is_noticed(self) -> None:
        """The message is kept, the header shows the state, and after the cut the message arrives once."""
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server, self.hasty(PATIENCE=1500)))
        tab.send("before")
        tab.wait_for_messages(1)
        with paused(server.pid):
            tab.send("into the void")
            self.wait(lambda: tab.outbox() == ["into the void"], "the message in the outbox")
            self.wait(lambda: tab.state()[0] != "connected", "the connection given up")
            self.assertEqual(tab.outbox_states(), ["not confirmed, may have arrived"])
        tab.wait_for_messages(2)
        self.wait(lambda: tab.outbox() == [], "the message confirmed")
        self.assertEqual(tab.messages(".mine"), ["before", "into the void"])

    def test_another_network_means_another_connection(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.send("before")
        tab.wait_for_messages(1)
        for event in (
            "dispatchEvent(new Event('online'))",
            "connection.tickedAt -= 600e3; connection.tick()",
        ):  # or the machine was suspended
            tab.run(f"window.old = connection.socket; {event}")
            tab.wait_for_state("connected")
            self.assertTrue(tab.run("return window.old !== connection.socket"))
        tab.send("after")
        tab.wait_for_messages(2)
        self.assertEqual(tab.messages(".mine"), ["before", "after"])

    def test_too_big(self) -> None:
        """A message that is too big is refused with a note; others arrive, and the connection stays."""
        server = self.serve("--max-message", "1000")
        tab = self.open(self.from_disk(server))
        tab.send("before")
        tab.wait_for_messages(1)
        tab.run("submit('x'.repeat(5000)); submit('after')")
        tab.wait_for_messages(2)
        self.assertEqual(tab.messages(), ["before", "after"])
        self.assertEqual(tab.outbox_states(), ["not delivered: a message is longer than 1000 bytes"])
        self.assertFalse(tab.shows("#outbox .again"))
        self.assertTrue(tab.shows("#outbox .save"))

    def test_far_too_big(self) -> None:
        """The server closes before the whole message is sent."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.send("before")
        tab.wait_for_messages(1)
        tab.run("submit(new Uint8Array(40e6), 'waiting', 'film.mp4')")
        self.wait(lambda: tab.outbox_states() == ["not delivered: a message is longer than 16777216 bytes"], "refused")
        self.assertEqual(tab.outbox(), ["film.mp4, 40,000,000 bytes"])
        tab.wait_for_state("connected")

    def test_a_server_that_changes_messages(self) -> None:
        """Messages that a server changes are on the user's side, and count as delivered."""
        program = [sys.executable, "-c", CHAT.format(root=str(ROOT))]
        server = Process(program=program)
        self.addCleanup(server.stop)
        tab = self.open(self.from_disk(server))
        for text in "one", "two":
            tab.send(text)
        tab.wait_for_messages(3)
        self.assertEqual([each.rpartition(" ")[2] for each in tab.messages(".mine")], ["one", "two"])
        tab.send("three")
        tab.wait_for_messages(4)
        for count in 5, 6:  # a welcome each time, not in the history
            tab.run("connection.end('moved')")
            tab.wait_for_messages(count)
        self.assertEqual(len(tab.messages()), 6)
        server.stop()
        tab.wait_for_state("offline")
        self.assertEqual(tab.outbox(), [])

    def test_a_server_that_echoes_nothing(self) -> None:
        """Without echoes, the connection stays; sent messages stay in doubt."""
        server = Process(program=[sys.executable, "-c", OTHERS.format(root=str(ROOT))])
        self.addCleanup(server.stop)
        tab = self.open(self.from_disk(server))
        late = """connection.movedAt -= 300e3; pending.forEach(entry => entry.sentAt -= 300e3);
            connection.tick(); showProgress(); return document.documentElement.dataset.state"""
        for count in range(1, 4):
            tab.run("submit('one')")
            self.wait(lambda: tab.run("return connection.socket.bufferedAmount") == 0, "the message on its way")
            self.assertEqual(tab.run(late), "connected")
            self.assertEqual(tab.outbox_states(), ["not confirmed, may have arrived"] * count)

    def test_the_same_text_again(self) -> None:
        """An echo belongs to the last message, not to an equal lost one, which stays in doubt."""
        tab = self.open(self.from_disk(self.serve()))
        tab.run("connection.socket.onmessage = null; submit('ok'); connection.end('moved'); connection.retryAt = 0")
        self.assertEqual(tab.outbox_states(), ["not confirmed, may have arrived"])
        tab.wait_for_state("connected")
        tab.send("ok")
        tab.wait_for_messages(1)
        self.assertEqual(tab.messages(".mine"), ["ok"])
        self.assertEqual(tab.outbox_states(), ["not confirmed, may have arrived"])

    def test_close_without_an_echo(self) -> None:
        """A server that closes with 1001 has broadcast all messages that it got, so the page sends the others again."""
        server = self.serve("--rate", "1")
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            tab.run("for (const text of ['one', 'two', 'three', 'four', 'five']) submit(text)")
            program.read()
            server.stop()
        tab.wait_for_state("offline")
        self.assertTrue(tab.outbox())
        self.assertEqual(set(tab.outbox_states()), {"waiting to be sent"})
        self.serve(port=server.port)
        tab.wait_for_messages(5)
        self.assertEqual(tab.messages(".mine"), ["one", "two", "three", "four", "five"])

    def test_one_huge_text_does_not_take_the_others_along(self) -> None:
        tab = self.open(self.from_disk(NoServer()), state="offline")
        tab.run("submit('small'); submit('x'.repeat(12e6)); submit('other'); draft.value = 'a draft'")
        # Browsers under a driver do not ask before they leave a page.
        tab.reload()
        tab.wait_for_state("offline")
        self.assertEqual(tab.outbox(), ["small", "other"])
        self.assertEqual(tab.run("return draft.value"), "a draft")

    def test_leaving_asks_first_where_something_would_be_lost(self) -> None:
        tab = self.open(self.from_disk(NoServer()), state="offline")
        asks = "const e = new Event('beforeunload', {cancelable: true}); dispatchEvent(e); return e.defaultPrevented"
        self.assertFalse(tab.run(asks))
        tab.run("submit('small')")
        self.assertFalse(tab.run(asks))
        tab.run("submit(new Uint8Array(5), 'waiting', 'a file')")
        self.assertTrue(tab.run(asks))
        tab.run("discard(pending[1])")


in_each_engine(Room, History, Outbox)


class Engines(PageTestCase):
    """One room with different browsers."""

    def test_typed_offline_in_each(self) -> None:
        """Messages that were typed while the server was away are neither lost nor doubled in any browser."""
        server = self.serve("--history", "100")
        tabs = [self.open(self.from_disk(server), engine) for engine in ENGINES]
        tabs[0].send("before")
        for tab in tabs:
            tab.wait_for_messages(1)
        server.stop()
        for engine, tab in zip(ENGINES, tabs):
            tab.wait_for_state("offline")
            tab.send(f"typed offline in {engine}")
        self.serve("--history", "100", port=server.port)
        expected = sorted(["before", *(f"typed offline in {engine}" for engine in ENGINES)])
        for tab in tabs:
            tab.wait_for_messages(4)
            self.assertEqual(sorted(tab.messages()), expected)
        orders = {tuple(text for text in tab.messages()) for tab in tabs}
        self.assertEqual(len(orders), 1, "the same order for all")

    def test_cut_at_random(self) -> None:
        """After cuts, reloads and pauses of the server, each message is in all browsers, once, in one order."""
        server = self.serve("--history", "200")
        page = self.hasty(PATIENCE=1500)
        tabs = [self.open(self.from_disk(server, page), engine) for engine in ENGINES]
        scripts = {
            "drop": "if (connection.socket) connection.end('moved')",
            "connect": "connection.open()",
            "close": "connection.socket?.close()",
        }
        chance = random.Random(6455)
        sent: list[str] = []
        for number in range(100):
            which = chance.randrange(len(tabs))
            tab = tabs[which]
            action = chance.choices(["send", "drop", "connect", "close", "reload", "pause"], [65, 15, 5, 5, 4, 2])[0]
            if action in scripts:
                tab.run(scripts[action])
            elif action == "reload":
                tab.reload()
            else:
                sent.append(f"{number} from {which}")
                with paused(server.pid) if action == "pause" else contextlib.nullcontext():
                    tab.run("submit(arguments[0])", sent[-1])
                    if action == "pause":
                        tab.wait_for_state("offline")
        for tab in tabs:
            tab.run("connection.open()")
            tab.wait_for_messages(len(sent))
        for which, tab in enumerate(tabs):
            self.assertEqual(tab.outbox(), [])
            self.assertEqual(sorted(tab.messages()), sorted(sent))
            self.assertEqual(tab.messages(".mine"), [text for text in tab.messages() if text.endswith(f"from {which}")])
            self.assertEqual(tab.messages(), tabs[0].messages())


class Screenshot(unittest.TestCase):
    """The picture in the README."""

    def test_it_can_be_taken(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "picture.png")
            take(path)
            self.assertTrue(path.read_bytes().startswith(b"\x89PNG"))


if __name__ == "__main__":
    unittest.main()

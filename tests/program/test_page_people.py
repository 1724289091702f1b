"""The page in use by a few people: long drafts, slow links, files, times, links, names, servers that only send."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import select
import socket
import struct
import threading
import time
import typing
import unittest
import zlib

from tests.program.test_page import Unmarked
from tests.tools.browser import BROWSERS, FILE, PageTestCase, Tab, in_each_engine, only_in, seal
from tests.tools.support import DEADLINE, ROOT, Client, eventually, free_port

ESCAPE = "\ue00c"  # WebDriver 17.4.2


def tearDownModule() -> None:
    BROWSERS.close()


def png(width: int, height: int) -> bytes:
    """Return a black PNG with one bit a pixel, which is small even with many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([compressor.compress(row) for _ in range(height)]) + compressor.flush()
    head = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Files in the page that do not compress, with this number of bytes each.
RANDOM_FILES = """
    const fill = bytes => {
        for (let at = 0; at < bytes.length; at += 65536) crypto.getRandomValues(bytes.subarray(at, at + 65536));
        return bytes;
    };
    sendFiles(arguments[0].map((size, i) => new File([fill(new Uint8Array(size))], `film ${i}.bin`)));
"""


def last_note(tab: Tab) -> str:
    """Return the page's own last line in the log; empty until it is painted."""
    return "".join(tab.notes()[-1:])


class SlowLink:
    """A link to a server with a limited rate (bytes a second) in each direction, for all connections together."""

    def __init__(self, port: int, rate: int) -> None:
        self.rate = rate
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # by default, it holds megabytes
        self.port = self._listener.getsockname()[1]
        self._end = threading.Event()
        self._cut = threading.Event()
        self._next = {"up": 0.0, "down": 0.0}  # time at which the next piece may pass
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> SlowLink:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in list(self._threads):
            thread.join()
        for each in [self._listener, *self._sockets]:
            each.close()

    def cut(self) -> None:
        """Cut the link: no more data passes, and no side sees an end."""
        self._cut.set()

    def _accept(self) -> None:
        while not self._end.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._server), DEADLINE)
                self._sockets += [near, far]
                for source, target, direction in (near, far, "up"), (far, near, "down"):
                    thread = threading.Thread(target=self._pass, args=(source, target, direction))
                    self._threads.append(thread)
                    thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while not self._end.is_set():
                if self._cut.is_set():
                    self._end.wait(0.05)
                    continue
                if not select.select([source], [], [], 0.05)[0] or self._cut.is_set():
                    continue
                data = source.recv(4096)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                self._wait(direction, len(data))
                target.sendall(data)

    def _wait(self, direction: str, size: int) -> None:
        with self._lock:
            start = max(time.monotonic(), self._next[direction])
            self._next[direction] = start + size / self.rate
        self._end.wait(start - time.monotonic())


class Draft(PageTestCase):
    """Writing a draft does not scroll the log."""

    def test_a_draft_of_several_lines_keeps_the_newest_message_in_view(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for number in range(100):
                program.send(f"message {number}")
            tab.wait_for_messages(100)
            below = "return -scroller.scrollTop"
            self.wait(lambda: tab.run(below) < 8, "the bottom")
            for word in "several words that are long enough to wrap around " * 6, "and a few more " * 10:
                tab.find("#draft").send_keys(word)
                self.wait(lambda: tab.run(below) < 8, "the bottom while a draft is long")
            program.send("news")
            tab.wait_for_messages(101)
            self.wait(lambda: tab.run(below) < 8, "the bottom with the new message")
            self.assertFalse(tab.shows("#jump"))
            tab.find("#draft").send_keys("\ue007")
            tab.wait_for_messages(102)
            self.wait(lambda: tab.run(below) < 8, "the bottom with a short draft")

    def test_the_draft_is_as_high_as_its_text(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        height = "return draft.getBoundingClientRect().height"
        one = tab.run(height)
        shift, enter = "\ue008", "\ue007"
        tab.find("#draft").send_keys(f"a{shift}{enter}{shift}b{shift}{enter}{shift}c")
        self.wait(lambda: 2.5 * one < tab.run(height) + one * 0.5 < 4 * one, "three lines")
        self.assertEqual(tab.run("return draft.scrollHeight - draft.clientHeight"), 0)

    def test_typing_with_the_log_focused_goes_to_the_draft(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        tab.run("scroller.focus()")
        tab.find("#scroller").send_keys("hello")
        self.wait(lambda: tab.run("return draft.value") == "hello", "the draft")


class SlowLinks(PageTestCase):
    """A slow connection with progress counts as alive."""

    def test_a_line_behind_a_large_message(self) -> None:
        """At 1 MB/s, 15 MB of another client come before the text."""
        server = self.serve()
        with SlowLink(server.port, 1_000_000) as link:
            tab = self.open(self.from_disk(link))
            with Client(server.port) as program:
                program.send(os.urandom(15_000_000))
                self.assertEqual(len(program.read()), 15_000_000)
                tab.send("hello?")
                tab.wait_for_messages(2)
            self.assertEqual(tab.messages(), ["binary, 15,000,000 bytes", "hello?"])
            self.assertEqual(tab.messages(".mine"), ["hello?"])
            self.assertEqual(tab.notes(), [])

    def test_joining_with_a_long_history(self) -> None:
        """At 150 KB/s, 5 MB take half a minute; again after a moment without a connection."""
        server = self.serve("--history", "50")
        with Client(server.port) as program:
            for number in range(5):
                program.send(f"{number}" + base64.b64encode(os.urandom(750_000)).decode())
            for _ in range(5):
                program.read()
        with SlowLink(server.port, 10_000_000) as link:
            tab = self.open(self.from_disk(link))
            tab.wait_for_messages(5)
            link.rate = 150_000
            tab.run("connection.end('moved')")
            tab.wait_for_state("connected")
            tab.send("hello?")
            self.wait_long(lambda: "hello?" in tab.messages(), "the own line")
            self.assertEqual([text[0] for text in tab.messages()], ["0", "1", "2", "3", "4", "h"])
            self.wait(lambda: "nothing is missing" in last_note(tab), "connected again")
            self.assertEqual(len(tab.notes()), 1)

    def wait_long(self, condition: typing.Callable[[], object], what: str) -> None:
        """Do the same as `wait`, with a longer deadline."""
        eventually(condition, what, 80)

    def test_a_link_without_progress(self) -> None:
        server = self.serve()
        with SlowLink(server.port, 10_000_000) as link:
            tab = self.open(self.from_disk(link, self.hasty(PATIENCE=1500)))
            tab.send("before")
            tab.wait_for_messages(1)
            link.cut()
            tab.send("into the void")
            self.wait(lambda: tab.state()[0] != "connected", "the connection given up")
            self.wait(lambda: "no answer" in last_note(tab), "why it was given up")
            self.assertEqual(tab.outbox(), ["into the void"])


class Uploads(PageTestCase):
    """Files that are being sent."""

    @only_in("Chromium")  # Firefox counts a partly sent message as unsent
    def test_progress(self) -> None:
        server = self.serve()
        with SlowLink(server.port, 1_000_000) as link:
            tab = self.open(self.from_disk(link))
            tab.run(RANDOM_FILES, [10_000_000])
            percentages: set[str] = set()

            def look() -> bool:
                states = tab.outbox_states()
                percentages.update(re.findall(r"\d+ %", " ".join(states)))
                if percentages and states:
                    self.assertFalse(tab.shows("#outbox .remove"), "the file cannot be removed any more")
                return len(percentages) >= 3

            self.wait(look, "progress")
            self.wait(lambda: tab.outbox() == [], "the echo")
            self.wait(lambda: tab.messages(".mine") == ["film 0.bin, 10,000,000 bytes"], "the file in the log")

    def test_a_second_file_can_be_removed_while_the_first_is_sent(self) -> None:
        """No client gets the second file."""
        server = self.serve()
        with SlowLink(server.port, 1_500_000) as link, Client(server.port) as program:
            tab = self.open(self.from_disk(link))
            tab.run(RANDOM_FILES, [9_000_000, 9_000_000])
            self.wait(lambda: len(tab.outbox()) == 2, "both in the outbox")
            tab.click("#outbox li:last-child .remove")
            self.assertEqual(len(tab.outbox()), 1)
            tab.run("submit('after')")
            self.assertEqual(program.read(), "film 0.bin, 9,000,000 bytes")
            program.socket.settimeout(30)
            self.assertEqual(len(program.read()), 9_000_000)
            self.assertEqual(program.read(), "after")
            tab.wait_for_messages(2)
            self.assertEqual(len(tab.messages(".mine")), 2)


class Times(PageTestCase):
    """The page shows only times that it knows."""

    def shown(self, tab: Tab) -> list[str]:
        """Return the time and text of each message and line in the log."""
        return list(tab.run("return Array.from(log.children, li => (li.querySelector('time') ? 'timed: ' : '') +"
                            "(li.querySelector('.text') ?? li).textContent)"))  # fmt: skip

    def test_history_has_no_time(self) -> None:
        server = self.serve("--history", "50")
        with Client(server.port) as program:
            program.send("of before")
            program.read()
            tab = self.open(self.from_disk(server))
            tab.wait_for_messages(1)
            self.assertEqual(self.shown(tab), ["Earlier", "of before"])
            program.send("of now")
            tab.wait_for_messages(2)
            self.assertEqual(self.shown(tab)[-1], "timed: of now")
            tab.run("connection.end('moved'); connection.retryAt = Infinity")
            program.send("meanwhile")
            while program.read() != "meanwhile":
                pass
            tab.run("connection.open()")
            tab.wait_for_messages(3)
            self.assertEqual(self.shown(tab)[-1], "meanwhile")

    def test_known_times_survive_a_reload(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.send("mine")
        tab.wait_for_messages(1)
        time_of = "return document.querySelector('#log time').dateTime"
        before = tab.run(time_of)
        tab.reload()
        tab.wait_for_messages(1)
        self.assertEqual(tab.run(time_of), before)

    def test_a_line_between_days(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.send("today")
        tab.wait_for_messages(1)
        self.assertEqual(tab.run("return document.querySelectorAll('#log .divider').length"), 0)
        tab.run("const D = Date; Date = class extends D { constructor(...a) { if (a.length) super(...a);"
                "else super(D.now() + 86400e3); } };")  # fmt: skip
        tab.send("tomorrow")
        tab.wait_for_messages(2)
        lines = self.shown(tab)
        self.assertEqual(len(lines), 3)
        self.assertRegex(lines[1], r"\d")
        self.assertFalse(lines[1].startswith("timed"))


class Links(PageTestCase):
    """The end of a link, and its text."""

    def test_where_a_link_ends(self) -> None:
        texts = {
            "https://en.wikipedia.org/wiki/WebSocket_(protocol)": "https://en.wikipedia.org/wiki/WebSocket_(protocol)",
            "(see https://a.example/x_(y)).": "https://a.example/x_(y)",
            "(https://a.example/x)": "https://a.example/x",
            "«https://a.example/x»": "https://a.example/x",
            "“https://a.example/x”…": "https://a.example/x",
            "https://a.example/x… and": "https://a.example/x",
            "https://a.example/x、次": "https://a.example/x",
            "https://a.example/x。": "https://a.example/x",
            "https://a.example/?q=[1]&b=2!": "https://a.example/?q=[1]&b=2",
            "https://example.com/grüße": "https://example.com/grüße",
            "https://evil.example/\u202emoc.elgoog.www": "https://evil.example/",
            "https://a.example/" + ")" * 5: "https://a.example/",
        }
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for text in texts:
                program.send(text)
            tab.wait_for_messages(len(texts))
        self.assertEqual(tab.messages(), list(texts))
        links = tab.run("return Array.from(document.querySelectorAll('#log a'), a => a.textContent)")
        self.assertEqual(links, list(texts.values()))

    def test_an_override_does_not_turn_a_link_round(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("\u202ehttps://evil.example/www")
            tab.wait_for_messages(1)
        left = """const text = document.querySelector('#log a').firstChild, range = document.createRange();
            const at = i => { range.setStart(text, i); range.setEnd(text, i + 1);
                return range.getBoundingClientRect().left; };
            return [at(0), at(1), at(10), at(20)]"""
        places = tab.run(left)
        self.assertEqual(places, sorted(places))

    def test_hostile_links_take_no_time(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        for part in ")", "(", "http://", "http://a.b/(", ".", "»":
            text = "http://a.example/" + part * (190_000 // len(part))
            spent = tab.run("const start = performance.now(), p = document.createElement('p');"
                            "fill(p, arguments[0]); return performance.now() - start", text)  # fmt: skip
            self.assertLess(spent, 2000, part)


class Address(PageTestCase):
    """The address of the server in the header."""

    def test_no_secrets(self) -> None:
        server = self.serve()
        page = (ROOT / "pywebsock.html").as_uri()
        tab = self.open(f"{page}?server=ws://localhost:{server.port}/%3Ftoken=sesame")
        shown = "return document.body.innerText + detail.title"
        self.assertNotIn("sesame", tab.run(shown))
        self.assertIn(f"localhost:{server.port}", tab.run("return detail.textContent"))
        server.stop()
        tab.wait_for_state("offline")
        self.assertNotIn("sesame", tab.run(shown))
        tab = self.open(f"{page}?server=ws://ann:sesame@localhost:{server.port}/", state="offline")
        self.wait(lambda: tab.run("return hint.textContent"), "an explanation")
        self.assertNotIn("sesame", tab.run(shown))

    def test_a_long_address_fills_one_line(self) -> None:
        server = self.serve()
        tab = self.open(f"{self.from_disk(server)}/{'long' * 75}")
        self.assertLess(tab.run("return detail.getBoundingClientRect().height"), 40)


class Pictures(PageTestCase):
    """Small files may have many pixels."""

    def test_a_picture_with_too_many_pixels_is_a_file(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send(png(16_000, 16_000))
            program.send(png(4_000, 4_000))
            tab.wait_for_messages(2)
        self.wait(lambda: tab.run("return document.querySelector('#log img') !== null"), "the small picture")
        time.sleep(0.5)
        self.assertEqual(tab.run("return document.querySelectorAll('#log img').length"), 1)
        self.assertEqual(tab.run("return document.querySelector('#log img').naturalWidth"), 4_000)
        self.assertRegex(tab.messages()[0], r"^binary, [\d,]+ bytes")

    def test_its_pixels_are_not_even_decoded(self) -> None:
        """Six such pictures would take 1.5 GB of memory; browsers tell the size before that."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.run("""window.decoded = []; const { decode } = HTMLImageElement.prototype;
            HTMLImageElement.prototype.decode = function () {
                decoded.push(this.naturalWidth);
                return decode.call(this);
            };""")
        with Client(server.port) as program:
            for width in 16_000, 30_000, 5_001, 5_000:
                program.send(png(width, 16_000 if width > 10_000 else 5_000))
            tab.wait_for_messages(4)
        self.wait(lambda: tab.run("return document.querySelector('#log img') !== null"), "the picture")
        self.assertEqual(tab.run("return decoded"), [5_000])


class ReadOnly(PageTestCase):
    """A server whose clients may not send."""

    def test_it_is_known_beforehand(self) -> None:
        server = self.serve("--read-only")
        tab = self.open(self.from_disk(server))
        self.wait(lambda: not tab.shows("#composer"), "no composer")
        self.assertIn("only sends", tab.run("return document.body.innerText"))
        tab.run("sendFiles([new File(['x'], 'a.txt')])")
        self.wait(lambda: tab.outbox_states() == ["not delivered: this server only sends"], "refused")
        self.assertEqual(tab.state()[0], "connected")
        self.assertEqual(tab.notes(), [])

    def test_nothing_is_sent_before_it_is_known(self) -> None:
        """The answer of /status comes later than the connection; a message would end the connection."""
        port = free_port()
        tab = self.open(f"{(ROOT / 'pywebsock.html').as_uri()}?server=ws://localhost:{port}", state="offline")
        tab.send("typed before")
        tab.run("""window.fetched = fetch;
            window.fetch = async (...given) => {
                await new Promise(resolve => setTimeout(resolve, 1500));
                return fetched(...given);
            };""")
        self.serve("--read-only", port=port)
        self.wait(lambda: not tab.shows("#composer"), "no composer")
        self.wait(lambda: tab.outbox_states() == ["not delivered: this server only sends"], "refused by the page")
        self.assertEqual(tab.notes(), [])

    def test_a_server_that_does_not_tell(self) -> None:
        """Messages are sent if /status fails, and if no answer comes."""
        for answers in True, False:
            with self.subTest(answers=answers), Unmarked(answers=answers) as server:
                tab = self.open(self.from_disk(server, self.hasty(PATIENCE=1500)), state="")
                tab.send("hello")
                tab.wait_for_messages(1)
                self.assertEqual(tab.messages(".mine"), ["hello"])

    def test_the_reason_of_a_close_stands_at_the_message(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        tab.run("connection.socket.onmessage = null; submit('x'); connection.end(1008, 'no swearing')")
        self.assertEqual(tab.outbox_states(), ["not delivered: no swearing"])


class Details(PageTestCase):
    """Unusual messages, and details of the page."""

    def test_combining_marks_stay_in_their_bubble(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("Z" + "\u0336\u0303\u0489" * 40)
            tab.wait_for_messages(1)
        self.assertIn(tab.run("return getComputedStyle(document.querySelector('#log .text')).overflowY"),
                      ("hidden", "clip"))  # fmt: skip

    def test_an_empty_message_has_a_height(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("")
            program.send("x")
            tab.wait_for_messages(2)
        heights = tab.run("return Array.from(document.querySelectorAll('#log .text'), p => p.offsetHeight)")
        self.assertEqual(heights[0], heights[1])

    def test_a_transparent_picture_has_a_background(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send(png(50, 50))
            tab.wait_for_messages(1)
        self.wait(lambda: tab.run("return document.querySelector('#log img') !== null"), "the picture")
        style = tab.run("const s = getComputedStyle(document.querySelector('#log img'));"
                        "return s.backgroundImage + s.backgroundColor")  # fmt: skip
        self.assertNotEqual(style, "nonergba(0, 0, 0, 0)")

    def test_a_name_that_was_not_applied_is_not_shown(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        tab.click("#settings summary")
        tab.find("#name").send_keys("Ann" + ESCAPE)
        self.wait(lambda: not tab.shows("#name"), "the settings closed")
        tab.click("#settings summary")
        self.wait(lambda: tab.shows("#name"), "the settings open")
        self.wait(lambda: tab.run("return nameField.value") == "", "the name that is set")

    def test_paste_into_a_setting_is_not_sent(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        tab.click("#settings summary")
        paste = """const clipboardData = new DataTransfer();
            clipboardData.items.add(new File(['x'], 'x.png', { type: 'image/png' }));
            const event = new Event('paste', { bubbles: true, cancelable: true });
            event.clipboardData = clipboardData;
            arguments[0] === 'name' ? nameField.dispatchEvent(event) : draft.dispatchEvent(event);"""
        tab.run(paste, "name")
        tab.run("submit('after')")
        tab.wait_for_messages(1)
        self.assertEqual(tab.messages(), ["after"])
        tab.run(paste, "draft")
        tab.wait_for_messages(2)

    def test_a_server_that_stops_does_not_say_that_it_restarts(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.send("x")
        tab.wait_for_messages(1)
        server.stop()
        self.wait(lambda: "the server has stopped" in last_note(tab), "why it ended")

    def test_stored_nonsense_does_no_harm(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        # A page stores its state when it is left, so the state is changed after that.
        spoil = "addEventListener('pagehide', () => sessionStorage.setItem(storageKey, arguments_0))"
        tail = '{"tail": [{"fingerprint": "string 11 0", "time": "never"}], "texts": [["x", "toString"]]}'
        several = '{"tail": [null], "texts": [null, [5], {}], "draft": {}}'
        for nonsense in "{", "null", "7", '{"texts": 7}', several, tail:
            tab.run(spoil.replace("arguments_0", repr(nonsense)))
            tab.reload()
            tab.wait_for_state("connected")
            tab.send("still works")
            tab.wait_for_messages(1)

    def test_a_connection_that_comes_and_goes_takes_one_line(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.send("x")
        tab.wait_for_messages(1)
        for _ in range(3):
            tab.run("connection.end('moved'); connection.open()")
            tab.wait_for_state("connected")
            self.wait(lambda: "nothing is missing" in last_note(tab), "connected again")
        self.assertEqual(len(tab.notes()), 1)
        shown, notes = len(tab.messages()), len(tab.notes())
        tab.send("y")
        tab.wait_for_messages(shown + 1)
        tab.run("connection.end('moved')")
        self.wait(lambda: len(tab.notes()) == notes + 1, "a line of its own after another message")


class Sides(PageTestCase):
    """A message is shown on the user's side only if that is certain."""

    def test_the_same_word_at_once(self) -> None:
        """Two equal words at the same time are on neither side."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            tab.run("submit('first')")
            tab.wait_for_messages(1)
            tab.run("submit('ok')")
            program.send("ok")
            tab.wait_for_messages(3)
            self.assertEqual(tab.messages(), ["first", "ok", "ok"])
            self.assertEqual(tab.messages(".mine"), ["first"])
            self.assertEqual(tab.outbox(), [])
            self.assertEqual(tab.run("return document.querySelectorAll('#log .unsure').length"), 2)

    def test_equal_words_among_others(self) -> None:
        """If more equal messages come back than were sent, all of them are on neither side; others are not in doubt."""
        tab = self.open(self.from_disk(self.serve()))
        tab.run("""connection.socket.onmessage = null;
            submit('ok'); submit('ok'); submit('long');
            for (const data of ['ok', 'ok', 'ok', 'long', 'ok']) connection.heard({ data });""")
        tab.wait_for_messages(5)
        self.assertEqual(tab.messages(".mine"), ["long"])
        self.assertEqual(tab.messages(".unsure"), ["ok"] * 3)
        self.assertEqual(tab.outbox(), [])

    def test_the_same_word_later_is_another_clients(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        tab.run("""connection.socket.onmessage = null;
            for (const data of ['ok', 'other']) { submit(data); connection.heard({ data }); }
            connection.heard({ data: 'ok' });""")
        tab.wait_for_messages(3)
        self.assertEqual(tab.messages(".mine"), ["ok", "other"])


class Names(PageTestCase):
    """The names of senders."""

    def senders(self, tab: Tab) -> list[str]:
        """Return the names above the messages."""
        return list(tab.run("return Array.from(document.querySelectorAll('#log .sender'), e => e.textContent)"))

    def test_a_name_stands_above_where_the_speaker_changes(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            texts = ["Carol: one", "Carol: two", "Dave: three", "nameless", "Carol: مرحبا", "deploy: done: 3",
                     "I tell you one thing, my friend: go", "https://a.example: b"]  # fmt: skip
            for text in texts:
                program.send(text)
            tab.wait_for_messages(len(texts))
        self.assertEqual(tab.messages(), ["one", "two", "three", "nameless", "مرحبا", "done: 3", texts[6], texts[7]])
        # Without a name above it, the message of a nameless person would look like one of the person before.
        self.assertEqual(self.senders(tab), ["Carol", "Dave", "No name", "Carol", "deploy", "No name"])
        self.assertEqual(tab.run("return document.querySelector('#log .sender').localName"), "bdi")
        tab.run("document.querySelector('#log .sender').textContent = 'علي'")
        start = "return getComputedStyle(document.querySelector('#log .sender')).textAlign"
        self.assertEqual(tab.run(start), "left", "above the bubble, whatever the direction of the name")
        aligned = tab.run("return getComputedStyle(document.querySelectorAll('#log .text')[4]).direction")
        self.assertEqual(aligned, "rtl")

    def test_no_name_where_none_has_one(self) -> None:
        """The name of the tab's own messages, on the other side, does not change that."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.run("name = 'Ann'; submit(signed('hello'))")
        tab.wait_for_messages(1)
        with Client(server.port) as program:
            program.send("one")
            program.send("two")
            tab.wait_for_messages(3)
        self.assertEqual(self.senders(tab), [])

    def test_a_name_cannot_turn_its_neighbours_round(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("\u202eeve: hello")
            tab.wait_for_messages(1)
        self.assertEqual(self.senders(tab), ["eve"])


class Files(PageTestCase):
    """A file has a name and a sender."""

    def test_a_file_keeps_its_name_and_sender(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        other = self.open(self.from_disk(server))
        tab.run("name = 'Ann'")
        with Client(server.port) as program:
            tab.run(f"sendFiles([{FILE}])", base64.b64encode(b"PK\x03\x04").decode(), "report, final.docx")
            self.assertEqual(program.read(), "Ann: report, final.docx, 4 bytes")
            self.assertEqual(program.read(), b"PK\x03\x04")
            one = ["report, final.docx, 4 bytes"]
            self.wait(lambda: tab.messages() == other.messages() == one, "the name and the file are one message")
            for each in tab, other:
                download = """let got; const old = HTMLAnchorElement.prototype.click;
                    HTMLAnchorElement.prototype.click = function () { got = this.download; };
                    const button = document.querySelector('#log button');
                    button.click(); HTMLAnchorElement.prototype.click = old; return [got, button.ariaLabel ??
                    button.getAttribute('aria-label')]"""
                self.assertEqual(each.run(download), ["report, final.docx", "Save report, final.docx"])
        self.assertEqual(len(tab.messages(".mine")), 1)
        self.assertEqual(tab.outbox(), [])
        self.assertEqual(other.run("return document.querySelector('#log .sender').textContent"), "Ann")

    def test_message_between_name_and_file(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for message in "Bob: a.pdf, 5 bytes", "Carol: hello", b"1234", b"%PDF-":
                program.send(message)
            tab.wait_for_messages(3)
            self.wait(lambda: len(tab.messages()) == 3, "the name and the file are one")
        self.assertEqual(tab.messages(), ["hello", "binary, 4 bytes", "a.pdf, 5 bytes"])

    def test_a_name_without_its_file_is_text(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("Bob: a.pdf, 5 bytes")
            tab.wait_for_messages(1)
        self.assertEqual(tab.messages(), ["a.pdf, 5 bytes"])

    def test_a_file_that_claims_another_kind(self) -> None:
        """File names lose characters that hide their extension."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("report\u202efdp.exe, 2 bytes")
            program.send(b"MZ")
            tab.wait_for_messages(1)
            self.wait(lambda: tab.messages() == ["reportfdp.exe, 2 bytes"], "the plain name")

    def test_after_a_reload(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.run(f"sendFiles([{FILE}])", base64.b64encode(b"PK\x03\x04").decode(), "a.docx")
        tab.wait_for_messages(1)
        tab.reload()
        tab.wait_for_messages(1)
        self.wait(lambda: tab.messages() == ["a.docx, 4 bytes"], "one message")
        self.assertEqual(tab.messages(".mine"), ["a.docx, 4 bytes"])


class Conveniences(PageTestCase):
    """Code, emoji, pictures, new messages, printing."""

    def test_code_keeps_its_columns(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for text in "def f():\n\treturn 1", "if x:\n  y()", "two\nlines", "  one", "Ann: for x in y:\n    print(x)":
                program.send(text)
            tab.wait_for_messages(5)
        code = "return Array.from(document.querySelectorAll('#log .text'), e => e.classList.contains('code'))"
        self.assertEqual(tab.run(code), [True, True, False, True, True])
        self.assertEqual(tab.run("return getComputedStyle(document.querySelector('.code')).whiteSpace"), "pre")

    def test_a_lone_emoji_is_large(self) -> None:
        texts = {"👍": True, "👍🏽": True, "👩\u200d👩\u200d👧": True, "🇩🇪": True, "❤️": True, "a": False, "1": False,
                 "👍 ok": False, "": False}  # fmt: skip
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for text in texts:
                program.send(text)
            tab.wait_for_messages(len(texts))
        large = tab.run(
            "return Array.from(document.querySelectorAll('#log .text'), e => e.classList.contains('emoji'))"
        )
        self.assertEqual(dict(zip(texts, large)), texts)

    def test_a_click_shows_a_picture_large(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send(png(2000, 1000))
            tab.wait_for_messages(1)
        self.wait(lambda: tab.run("return document.querySelector('#log img') !== null"), "the picture")
        tab.click("#log .text button")
        width = "return Math.round(document.querySelector('#log .text button').getBoundingClientRect().width)"
        self.wait(
            lambda: tab.run(width) == tab.run("return document.documentElement.clientWidth"), "as wide as the page"
        )
        tab.find("#log .text button").send_keys(ESCAPE)
        self.wait(lambda: tab.run(width) < 600, "as it was")
        self.assertTrue(tab.run("return document.activeElement.closest('#log') !== null"))
        tab.click("#log .text button")
        tab.find("#log .text button").send_keys("\ue004")
        self.wait(lambda: tab.run(width) < 600, "closed where the focus goes elsewhere")

    def test_where_a_file_is_dropped(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        drag = """const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File(['x'], 'a.txt'));
            document.body.dispatchEvent(new DragEvent(arguments[0], { bubbles: true, cancelable: true, dataTransfer }));
            return document.documentElement.classList.contains('dropping')"""
        self.assertTrue(tab.run(drag, "dragover"))
        self.assertFalse(tab.run(drag, "dragleave"))
        self.assertTrue(tab.run(drag, "dragover"))
        self.assertFalse(tab.run(drag, "drop"))
        tab.wait_for_messages(1)

    def test_new_since_you_left(self) -> None:
        """New messages have a line above them, a number in the title, and a sign in the tab's icon."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        hide = """Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true });
            document.dispatchEvent(new Event('visibilitychange'))"""
        lines = """return Array.from(log.querySelectorAll('li:not(.hidden)'),
            li => (li.querySelector('.text') ?? li).textContent)"""
        icon = "return document.querySelector('[rel=icon]').href"
        with Client(server.port) as program:
            program.send("seen")
            tab.wait_for_messages(1)
            plain = tab.run(icon)
            tab.run(hide, True)
            for text in "a", "b":
                program.send(text)
            tab.wait_for_messages(3)
            self.wait(lambda: tab.run("return document.title") == "(2) pywebsock", "the title")
            self.assertNotEqual(tab.run(icon), plain)
            tab.run(hide, False)
            self.wait(lambda: tab.run("return document.title") == "pywebsock", "the title")
            self.assertEqual(tab.run(icon), plain)
            self.assertEqual(tab.run(lines), ["seen", "New since you left", "a", "b"])
            tab.run(hide, True)
            program.send("c")
            tab.wait_for_messages(4)
            self.assertEqual(tab.run(lines), ["seen", "a", "b", "New since you left", "c"])

    @only_in("Chromium")  # only it has an emulated printer
    def test_print(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for number in range(100):
                program.send(f"message {number}")
            tab.wait_for_messages(100)
        tab.command("Emulation.setEmulatedMedia", media="print")
        whole = tab.run("return [scroller.scrollHeight, scroller.clientHeight, document.documentElement.scrollHeight]")
        self.assertEqual(whole[0], whole[1])
        self.assertGreater(whole[2], whole[0] - 50)
        self.assertFalse(tab.shows("#composer"))


class Touch(PageTestCase):
    """Touch, and large text on small screens."""

    @only_in("Chromium")  # only it has an emulated phone
    def test_targets_are_large_enough(self) -> None:
        server = self.serve("--history", "50")
        tab = self.open(self.from_disk(server))
        tab.command("Emulation.setTouchEmulationEnabled", enabled=True)
        tab.command("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=1, mobile=True)
        with Client(server.port) as program:
            program.send("long " * 1000)
            program.send(b"PK\x03\x04")
            tab.wait_for_messages(2)
        tab.run("submit('x', 'unconfirmed'); submit('y', 'refused')")
        tab.click("#settings summary")
        sizes = tab.run("""return Array.from(document.querySelectorAll('button, summary, input, textarea'), e => {
            const { width, height } = e.getBoundingClientRect();
            return [e.id + e.textContent, width, height] }).filter(([, width]) => width)""")
        self.assertGreater(len(sizes), 8)
        for label, width, height in sizes:
            self.assertGreaterEqual((width, height), (44, 44), label)
            self.assertGreaterEqual(height, 44, label)

    @only_in("Chromium")
    def test_the_log_stays_visible(self) -> None:
        """With text of 200 % on 320 pixels, a part of the log is visible."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.command("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=1, mobile=True)
        tab.run("document.documentElement.style.fontSize = '200%'")
        tab.send("x")
        tab.wait_for_messages(1)
        self.assertGreater(tab.run("return scroller.clientHeight"), 80)
        tab.run("draft.value = 'word '.repeat(100); draft.dispatchEvent(new Event('input'))")
        tab.run("submit('x', 'unconfirmed'); submit('y', 'refused')")
        self.assertGreater(tab.run("return scroller.clientHeight"), 80)
        self.assertLessEqual(tab.run("return document.documentElement.scrollWidth"), 320)


in_each_engine(
    Draft, SlowLinks, Uploads, Times, Links, Address, Pictures, ReadOnly,
    Details, Sides, Names, Files, Conveniences, Touch,
)  # fmt: skip


class Policy(unittest.TestCase):
    """The Content-Security-Policy of the page."""

    def test_the_hashes_are_current(self) -> None:
        """`python -m tests.tools.browser` updates the hashes."""
        page = (ROOT / "pywebsock.html").read_text("utf-8")
        self.assertEqual(page, seal(page))
        self.assertNotIn("unsafe-inline", page)
        self.assertIn("require-trusted-types-for 'script'", page)


if __name__ == "__main__":
    unittest.main()

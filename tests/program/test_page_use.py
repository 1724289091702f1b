"""The use of the page in Chromium, Firefox and WebKitGTK: reading, files, links, settings, accessibility."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import threading
import time
import typing
import unittest
import urllib.request
import zlib

from tests.tools.browser import BROWSERS, FILE, START, PageTestCase, Tab, in_each_engine, only_in
from tests.tools.support import ROOT, Client, Process, eventually, free_port, require, scratch

NODE_MODULES = pathlib.Path(os.environ.get("PYWEBSOCK_NODE_MODULES", "node_modules"))
UP, PAGE_UP = "\ue013", "\ue00e"  # WebDriver 17.4.2


def tearDownModule() -> None:
    BROWSERS.close()


def picture(width: int = 60, height: int = 40) -> bytes:
    """Return a PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    rows = b"".join(
        b"\0" + b"".join(bytes((4 * x % 256, 5 * y % 256, 128)) for x in range(width)) for y in range(height)
    )
    head = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@contextlib.contextmanager
def pouring(port: int, rate: int = 100) -> typing.Iterator[None]:
    """Let a program send messages at this rate in the block."""
    end = threading.Event()

    def pour() -> None:
        with Client(port) as program:
            number = 0
            while not end.wait(1 / rate):
                program.send(f"poured {number}")
                program.read()
                number += 1

    thread = threading.Thread(target=pour)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


class Reading(PageTestCase):
    """The log stays where the reader is."""

    def fill(self, tab: Tab, server: Process, count: int) -> None:
        """Send this number of short messages."""
        with Client(server.port) as program:
            for number in range(count):
                program.send(f"old {number}")
            for _ in range(count):
                program.read()
        tab.wait_for_messages(count)

    def below(self, tab: Tab) -> int:
        """Return the distance from the reader's place to the bottom (pixels)."""
        return int(tab.run("return -scroller.scrollTop"))

    def mark(self, tab: Tab) -> None:
        """Remember the first message in view, for `place`."""
        tab.run("""window.marked = Array.from(document.querySelectorAll('#log li')).find(
            li => li.getBoundingClientRect().top > scroller.getBoundingClientRect().top)""")

    def place(self, tab: Tab) -> float:
        """Return the place of that message now (pixels)."""
        return float(tab.run("return marked.getBoundingClientRect().top"))

    def stands(self, tab: Tab) -> bool:
        """Return whether the log is not scrolling."""
        self.mark(tab)
        before = self.place(tab)
        time.sleep(0.2)  # twice the interval of the steps of any engine
        return abs(self.place(tab) - before) < 2

    def keeps_its_place(self, tab: Tab) -> bool:
        """Return whether the log does not move while messages as high as 100 pixels come below it."""
        self.mark(tab)
        before, below = self.place(tab), self.below(tab)
        self.wait(lambda: self.below(tab) > below + 100, "the bottom has gone away")
        return abs(self.place(tab) - before) < 2

    def at_the_top(self) -> tuple[Tab, int]:
        """Return a page with a long log that is scrolled up, and the port of its server."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        self.fill(tab, server, 100)
        tab.run("scroller.scrollTop = -scroller.scrollHeight")
        self.wait(lambda: tab.run("return !isAtBottom()"), "the page has noticed")
        return tab, server.port

    def test_the_button_to_the_newest_message(self) -> None:
        tab, port = self.at_the_top()
        with Client(port) as program:
            self.mark(tab)
            before = self.place(tab)
            program.send("news")
            self.wait(lambda: tab.shows("#jump"), "the button to the newest message")
            self.assertLess(abs(self.place(tab) - before), 2)
            tab.click("#jump")
            self.wait(lambda: not tab.shows("#jump"), "the button has gone")
            self.assertLess(self.below(tab), 8)

    def test_scrolling_up_while_messages_arrive(self) -> None:
        """Three notches of the wheel, or a few keys, are enough."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        self.fill(tab, server, 300)
        middle = tab.run("const r = scroller.getBoundingClientRect(); return [r.x + 200, r.y + 200]")
        x, y = int(middle[0]), int(middle[1])
        notch = {"type": "scroll", "x": x, "y": y, "deltaX": 0, "deltaY": -120, "origin": "viewport"}
        with pouring(server.port):
            for _ in range(3):
                tab.perform([{"type": "wheel", "id": "wheel", "actions": [notch]}])
            self.wait(lambda: tab.run("return !isAtBottom()"), "the wheel has scrolled up")
            self.wait(lambda: self.below(tab) > 100, "the bottom has gone away")
            self.wait(lambda: tab.shows("#jump") and self.stands(tab), "the wheel has come to rest")
            tab.click("#jump")
            self.wait(lambda: tab.run("return isAtBottom()"), "at the bottom again")
            for _ in range(3):
                tab.find("#scroller").send_keys(UP)
            self.wait(lambda: tab.run("return !isAtBottom()"), "the keys have scrolled up")
            self.wait(lambda: self.keeps_its_place(tab), "the log stands, once the keys have come to rest")

    def test_slow_click_while_messages_arrive(self) -> None:
        """The text of the button changes before it is released."""
        tab, port = self.at_the_top()
        with pouring(port):
            self.wait(lambda: tab.shows("#jump"), "the button to the newest message")
            middle = tab.run("const r = jump.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]")
            move = {"type": "pointerMove", "x": int(middle[0]), "y": int(middle[1]), "origin": "viewport"}
            press, hold = {"type": "pointerDown", "button": 0}, {"type": "pause", "duration": 300}
            actions = [move, press, hold, {"type": "pointerUp", "button": 0}]
            tab.perform([{"type": "pointer", "id": "mouse", "actions": actions}])
            self.wait(lambda: tab.run("return isAtBottom()"), "at the bottom again")

    def test_the_bottom_is_followed(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        self.fill(tab, server, 100)
        self.assertLess(self.below(tab), 8)
        with pouring(server.port):
            tab.wait_for_messages(150)
        self.wait(lambda: self.below(tab) < 8, "the bottom")
        self.assertFalse(tab.shows("#jump"))

    def test_the_place_of_reading_stays_when_old_messages_go(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server, self.hasty(KEEP=400)))
        self.fill(tab, server, 400)
        tab.run("scroller.scrollTop -= 600")
        self.wait(lambda: tab.run("return !isAtBottom()"), "the page has noticed")
        self.mark(tab)
        before, text = self.place(tab), tab.run("return marked.textContent")
        with Client(server.port) as program:
            for number in range(250):
                program.send(f"new {number}")
            for _ in range(250):
                program.read()
        self.wait(lambda: tab.messages()[-1] == "new 249", "the last message")
        self.assertGreater(int(tab.messages()[0].split()[1]), 100, "old ones have gone")
        self.assertLess(abs(self.place(tab) - before), 2, text)

    def test_a_long_text_is_shown_and_a_huge_one_saved(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            program.send("long\n" * 2_000)
            tab.wait_for_messages(1)
            self.assertEqual(len(tab.messages()[0]), 10_000)
            self.assertFalse(tab.run("return document.querySelector('#log button') !== null"))
            program.send("x" * 16_000_000)
            tab.wait_for_messages(2)
            self.assertEqual(len(tab.messages()[1]), 10_000)
            button = tab.run("return document.querySelector('#log li:last-child button').textContent")
            self.assertEqual(button, "Save (16,000,000 characters)")


class Sharing(PageTestCase):
    """Files, pictures and links."""

    def setUp(self) -> None:
        self.server = self.serve()
        self.tab = self.open(self.from_disk(self.server))

    def test_a_dropped_picture_is_shown_everywhere(self) -> None:
        other = self.open(f"http://localhost:{self.server.port}/")
        png = base64.b64encode(picture()).decode()
        drop = f"""const dataTransfer = new DataTransfer();
            dataTransfer.items.add({FILE});
            const event = new DragEvent('drop', {{ bubbles: true, cancelable: true, dataTransfer }});
            document.body.dispatchEvent(event);
            return event.defaultPrevented"""
        self.assertTrue(self.tab.run(drop, png, "holiday.png"))
        for tab in (self.tab, other):
            self.wait(functools.partial(tab.run, "return document.querySelector('#log img') !== null"), "the picture")
            size = "const i = document.querySelector('#log img'); return [i.naturalWidth, i.naturalHeight, i.alt]"
            self.assertEqual(tab.run(size), [60, 40, f"holiday.png, {len(picture()):,} bytes"])
        self.assertEqual(self.tab.run("return document.querySelectorAll('#log .mine').length"), 1)
        self.assertEqual(self.tab.outbox(), [])
        self.assertEqual(other.run("return document.querySelectorAll('#log .mine').length"), 0)

    def test_files_arrive_as_they_are(self) -> None:
        """Each file is a text with its name, then a binary message; a file that is no picture is not shown as one."""
        contents = [b"%PDF-1.7 ...", b"\x89PNG\r\n no picture", bytes(range(256)) * 300, b""]
        with Client(self.server.port) as program:
            for number, content in enumerate(contents):
                name = f"file {number}, {len(content):,} bytes"
                self.tab.run(f"sendFiles([{FILE}])", base64.b64encode(content).decode(), f"file {number}")
                self.assertEqual(program.read(), name)
                self.assertEqual(program.read(), content)
        self.tab.wait_for_messages(4)
        expected = ["file 0, 12 bytes", "file 1, 17 bytes", "file 2, 76,800 bytes", "file 3, 0 bytes"]
        self.wait(lambda: self.tab.messages(".mine") == expected, "the files with their names")

    def test_files_wait_for_the_connection_like_text(self) -> None:
        self.server.stop()
        self.tab.wait_for_state("offline")
        self.tab.send("first")
        self.tab.run(f"sendFiles([{FILE}])", base64.b64encode(b"PK\x03\x04").decode(), "some.zip")
        self.wait(lambda: self.tab.outbox() == ["first", "some.zip, 4 bytes"], "both in the outbox")
        self.tab.send("last")
        self.serve(port=self.server.port)
        self.tab.wait_for_messages(3)
        self.assertEqual(self.tab.messages(".mine"), ["first", "some.zip, 4 bytes", "last"])

    def test_links(self) -> None:
        """Only http and https become links; the text around them is not changed."""
        text = "see (https://example.com/a_(b)?x=1&y=2). javascript:alert(1) HTTP://X.org, ftp://x file:///etc http://"
        with Client(self.server.port) as program:
            program.send(text)
            self.tab.wait_for_messages(1)
        self.assertEqual(self.tab.messages(), [text])
        links = self.tab.run(
            "return Array.from(document.querySelectorAll('#log a'), a => [a.textContent, a.rel, a.target])"
        )
        safe = ["noopener noreferrer", "_blank"]
        self.assertEqual(links, [["https://example.com/a_(b)?x=1&y=2", *safe], ["HTTP://X.org", *safe]])

    def test_a_message_tells_its_time_kind_and_size(self) -> None:
        with Client(self.server.port) as program:
            program.send("Grüße")
            program.send(bytes(1000))
            self.tab.wait_for_messages(2)
        titles = self.tab.run("return Array.from(document.querySelectorAll('#log time'), t => t.title)")
        self.assertRegex(titles[0], r"\d:\d\d:\d\d.*, 5 characters$")
        self.assertRegex(titles[1], r"\d:\d\d:\d\d.*, binary, 1,000 bytes$")


class Settings(PageTestCase):
    """A name, and another server."""

    def apply(self, tab: Tab, field: str, text: str) -> None:
        """Type a value into a field of the settings."""
        tab.click("#settings summary")
        tab.run(f"document.querySelector('{field}').value = ''")
        tab.find(field).send_keys(text)
        tab.click("#chosen button")

    def test_a_name(self) -> None:
        tab = self.open(self.from_disk(self.serve()))
        tab.send("before")
        self.apply(tab, "#name", "Ann")
        self.assertFalse(tab.shows("#name"))
        tab.send("hello")
        tab.wait_for_messages(2)
        self.assertEqual(tab.messages(".mine"), ["before", "hello"])
        tab.reload()
        tab.wait_for_state("connected")
        self.assertEqual(tab.run("return name"), "Ann")
        tab.run("localStorage.clear()")

    def test_another_server(self) -> None:
        first, second = self.serve(), self.serve()
        tab = self.open(self.from_disk(first))
        self.apply(tab, "#server", f"localhost:{second.port}")
        address = f"ws://localhost:{second.port}/"
        self.wait(lambda: tab.run("return [document.readyState, detail.textContent]") == ["complete", address], address)
        tab.wait_for_state("connected")
        with Client(second.port) as program:
            tab.send("hello")
            self.assertEqual(program.read(), "hello")


class Explanations(PageTestCase):
    """The page explains why there is no connection."""

    def why(self, url: str) -> str:
        """Return the page's explanation after it has tried to connect."""
        tab = self.open(url, state="offline")
        self.wait(lambda: tab.run("return hint.textContent"), "an explanation")
        self.assertTrue(tab.shows("#hint"))
        self.assertNotIn("Start a server", tab.run("return document.querySelector('#log').textContent"))
        return str(tab.run("return hint.textContent"))

    def test_a_refused_origin(self) -> None:
        """A browser does not say why a WebSocket failed, so the page names both reasons."""
        server = self.serve("--origin", "https://example.com")
        self.assertRegex(self.why(self.from_disk(server)), "Start a server.* its log says why it refuses this page")

    def test_no_answer(self) -> None:
        port = free_port()
        said = self.why(f"{(ROOT / 'pywebsock.html').as_uri()}?server=ws://localhost:{port}")
        self.assertIn(f"No connection to ws://localhost:{port}/. Start a server", said)

    def test_a_misspelt_address(self) -> None:
        for address in "http//localhost", "ws://[local]:4545", "ftp://localhost":
            with self.subTest(address):
                said = self.why(f"{(ROOT / 'pywebsock.html').as_uri()}?server={urllib.request.quote(address)}")  # type: ignore[attr-defined]
                if address == "http//localhost":  # a host called http
                    self.assertIn("No connection to ws://http", said)
                else:
                    self.assertIn("no address like ws://host:port", said)


class Accessibility(PageTestCase):
    """Accessibility: axe-core finds no fault; and checks that axe-core does not have."""

    def setUp(self) -> None:
        script = NODE_MODULES / "axe-core" / "axe.min.js"
        require(script.is_file(), "axe-core")
        self.axe = script.read_text("utf-8")

    def assert_accessible(self, tab: Tab, state: str) -> None:
        """Check that axe-core finds no violation of WCAG 2.2 A and AA, or of its best practices."""
        tab.run(self.axe)
        tab.run("window.found = null; axe.run({ resultTypes: ['violations'] }).then(r => window.found ="
                "r.violations.map(v => v.id + ': ' + v.nodes.map(n => n.html).join(' ')),"
                "error => window.found = [String(error)])")  # fmt: skip
        eventually(lambda: tab.run("return window.found !== null"), "axe-core", 30)
        self.assertEqual(tab.run("return window.found"), [], state)

    def in_states(self, tab: Tab, server: Process) -> None:
        """Check the page empty, in use, with open settings, and offline with a message in the outbox."""
        self.assert_accessible(tab, "empty")
        tab.send("mine, with http://example.com/")
        tab.wait_for_messages(1)
        with Client(server.port) as program:
            program.send("theirs " * 1000)
            program.send(picture())
            tab.wait_for_messages(3)
        self.wait(lambda: tab.run("return document.querySelector('#log img') !== null"), "the picture")
        tab.click("#settings summary")
        self.assert_accessible(tab, "in use")
        server.stop()
        tab.wait_for_state("offline")
        tab.run("submit('lost', 'unconfirmed'); submit('x', 'refused'); submit('waits')")
        self.assert_accessible(tab, "offline")

    def test_axe(self) -> None:
        server = self.serve()
        self.in_states(self.open(self.from_disk(server)), server)

    @only_in("Chromium")  # only it has an emulated dark theme
    def test_axe_in_the_dark(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        self.assertEqual(tab.run("return getComputedStyle(document.body).backgroundColor"), "rgb(27, 27, 24)")
        self.in_states(tab, server)

    def test_screen_reader_reads_the_sender(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.send("mine")
        tab.wait_for_messages(1)
        with Client(server.port) as program:
            program.send("theirs")
            tab.wait_for_messages(2)
        whole = tab.run("return Array.from(document.querySelectorAll('#log li'), li => li.textContent)")
        self.assertTrue(whole[0].startswith("You: mine"), whole)
        self.assertTrue(whole[1].startswith("theirs"), whole)

    def test_the_focus_is_not_lost(self) -> None:
        """The focus moves on from a button that vanishes; on a phone, not to the text field, which opens a keyboard."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        focus = "return document.activeElement.id"
        for coarse, expected in ((False, "draft"), (True, "scroller")):
            tab.run("window.matchMedia = query => ({ matches: arguments[0] && query === '(pointer: coarse)' })".replace(
                "arguments[0]", str(coarse).lower()))  # fmt: skip
            tab.run("submit('x', 'refused'); outbox.querySelector('button:last-child').focus();"
                    "outbox.querySelector('button:last-child').click()")  # fmt: skip
            self.assertEqual(tab.run(focus), expected)

    def test_shapes_survive_forced_colours(self) -> None:
        """In forced colours, there are no backgrounds, but borders, also transparent ones."""
        server = self.serve()
        tab = self.open(self.from_disk(server))
        tab.send("mine")
        tab.wait_for_messages(1)
        for selector in "#log .text", "#composer .filled":
            style = tab.run(f"const s = getComputedStyle(document.querySelector('{selector}'));"
                            "return s.borderTopWidth + s.borderTopStyle + s.borderLeftWidth")  # fmt: skip
            self.assertEqual(style, "1pxsolid1px", selector)


in_each_engine(Reading, Sharing, Settings, Explanations, Accessibility)


class Chrome92:
    """The oldest supported Chromium, from a package of npm, driven by the DevTools protocol."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        packed = NODE_MODULES / "chrome-aws-lambda" / "bin" / "chromium.br"
        node = shutil.which("node")
        require(packed.is_file() and node, "chrome-aws-lambda (Chromium 92)")
        folder = stack.enter_context(scratch())
        binary = os.path.join(folder, "chromium")
        unpack = "const f = require('fs'), z = require('zlib'), [from, to] = process.argv.slice(1);"
        unpack += "f.writeFileSync(to, z.brotliDecompressSync(f.readFileSync(from)), { mode: 0o755 })"
        subprocess.run([str(node), "-e", unpack, str(packed), binary], check=True)
        command = [binary, "--headless", "--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={folder}/profile", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stderr
        stack.callback(process.stderr.close)
        line = next(line for line in process.stderr if b"DevTools listening" in line)
        port = int(re.findall(rb":(\d+)/", line)[0])
        pages: list[typing.Any] = []

        def look() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
                pages[:] = json.load(answer)
            return bool(pages)

        eventually(look, "a page in Chromium 92", START)
        target = pages[0]["webSocketDebuggerUrl"].partition(str(port))[2]
        self._client = stack.enter_context(Client(port, target=target, Host=f"127.0.0.1:{port}"))
        self._id = 0
        self.complaints: list[str] = []

    def command(self, method: str, **parameters: typing.Any) -> typing.Any:
        """Run a command, and return its result; keep the errors of the page."""
        self._id += 1
        self._client.send(json.dumps({"id": self._id, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._client.read())
            if answer.get("id") == self._id:
                return answer["result"]
            if answer["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(answer))

    def run(self, expression: str) -> typing.Any:
        """Return the value of a JavaScript expression."""
        return self.command("Runtime.evaluate", expression=expression)["result"].get("value")


class OldestBrowsers(unittest.TestCase):
    """The oldest supported browsers: Chrome 92, Firefox 90, Safari 15.4."""

    def test_in_chrome_92(self) -> None:
        with contextlib.ExitStack() as stack:
            browser = Chrome92(stack)
            server = stack.enter_context(Process())
            browser.command("Runtime.enable")
            browser.command("Page.navigate", url=f"http://localhost:{server.port}/")
            eventually(lambda: browser.run("document.documentElement.dataset.state") == "connected", "connected", START)
            self.assertIn("Chrome/92.", browser.run("navigator.userAgent"))
            browser.command(
                "Input.insertText", text="half a character: \ud83d".encode("utf-16", "replace").decode("utf-16")
            )
            for kind in "keyDown", "keyUp":
                browser.command(
                    "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13
                )
            eventually(lambda: browser.run("document.querySelectorAll('#log .mine').length") == 1, "its own message")
            browser.run(f"sendFiles([new File([Uint8Array.from({list(picture())})], 'x.png')])")
            eventually(lambda: browser.run("document.querySelectorAll('#log .mine img').length") == 1, "its picture")
            self.assertEqual(browser.run("getComputedStyle(document.body).backgroundColor"), "rgb(253, 252, 250)")
            self.assertEqual(browser.run("document.body.offsetHeight"), browser.run("innerHeight"))
            self.assertEqual(browser.complaints, [])

    def test_nothing_newer_is_used(self) -> None:
        """The page uses no feature that these browsers lack."""
        page = (ROOT / "pywebsock.html").read_text("utf-8")
        newer = (
            r"light-dark\(", r"color-mix\(", r":has\(", r"@container", r"@layer", r"\boklch\(", r"\btext-wrap: pretty",
            r"^\s*(translate|rotate|scale):", r"\brequestSubmit\b", r"\b(to|is)WellFormed\b", r"\bariaLive\b",
            r"\.at\(", r"\bstructuredClone\b", r"\bfindLast", r"\btoSorted\b", r"\bwith\(", r"\bhasOwn\b",
            r"\bgroupBy\b",
            r"\brandomUUID\b", r"getRandomValues\(new Big",
            r"AbortSignal\.(timeout|any)", r"Promise\.(withResolvers|try)", r"\(\?<[=!]", r"/v[,;)]",
            r"<dialog", r"\bpopover\b", r"\binert\b", r"\bstatic \{", r"#\w+ in ", r"\bcheckVisibility\b",
        )  # fmt: skip
        for pattern in newer:
            self.assertIsNone(re.search(pattern, page, re.MULTILINE), pattern)
        for line in page.splitlines():  # with the older unit before it
            if "dvh" in line:
                self.assertRegex(line, r"height: \S*100vh[^;]*; height: \S*100dvh")


if __name__ == "__main__":
    unittest.main()

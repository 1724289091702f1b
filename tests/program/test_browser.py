"""The page in Chromium: two tabs from the disk and two from the server, which are one room."""

from __future__ import annotations

import pathlib
import tempfile
import typing
import unittest

from tests.tools.browser import Tab, chromium
from tests.tools.screenshot import take
from tests.tools.support import ROOT, Client, Process, eventually

RECONNECTION = 30.0  # seconds; attempts are up to 15 seconds apart


class Pages(unittest.TestCase):
    """Four tabs on one server; each test has new ones, and leaves nothing in the browser's log."""

    browser: typing.ClassVar[typing.Any]

    @classmethod
    def setUpClass(cls) -> None:
        manager = chromium()
        cls.browser = manager.__enter__()
        cls.addClassCleanup(manager.__exit__, None, None, None)

    def setUp(self) -> None:
        self.expected = ""  # what may stand in the browser's log
        self.server = Process()
        self.addCleanup(self.stop)  # after the tabs have been closed
        self.port = self.server.port
        from_disk = f"{(ROOT / 'pywebsock.html').as_uri()}?server=ws://localhost:{self.port}"
        from_server = f"http://localhost:{self.port}/"
        self.tabs = [self.open(url) for url in (from_disk, from_disk, from_server, from_server)]
        for tab in self.tabs:
            tab.wait_for_state("connected")

    def stop(self) -> None:
        """End the server that there is now."""
        self.server.stop()

    def open(self, url: str) -> Tab:
        """A new tab, which ends with the test, and must have nothing to complain of."""
        tab = Tab(self.browser, url)
        self.addCleanup(tab.close)
        self.addCleanup(lambda: self.assertEqual(tab.complaints(self.expected), []))
        return tab

    def assert_everywhere(self, *texts: str) -> None:
        """Each tab shows these messages in this order, and nothing else."""
        for tab in self.tabs:
            tab.wait_for_messages(len(texts))
            self.assertEqual(tab.messages(), list(texts), tab.url)

    def test_what_one_sends_all_show(self) -> None:
        texts = ["from the disk: Grüße, 世界", "two\nlines", "from the server", "  spaces  "]
        for i, (tab, text) in enumerate(zip(self.tabs, texts)):
            tab.send(text)
            self.assert_everywhere(*texts[: i + 1])
        for tab, text in zip(self.tabs, texts):
            self.assertEqual(tab.messages(".mine"), [text], "its own, and only they, are marked")
            self.assertEqual(tab.outbox(), [])

    def test_markup_is_text(self) -> None:
        text = "<img src=x onerror=\"document.title='owned'\"><b>bold</b><script>alert(1)</script> &amp; </li>"
        self.tabs[0].send(text)
        with Client(self.port) as program:
            program.send(text)
            self.assert_everywhere(text, text)
        for tab in self.tabs:
            self.assertEqual(tab.run("return document.querySelectorAll('#log .text *').length"), 0)
            self.assertNotIn("owned", tab.run("return document.title"))

    def test_programs_are_in_the_room(self) -> None:
        with Client(self.port) as program:
            self.tabs[3].send("from a tab")
            self.assertEqual(program.read(), "from a tab")
            program.send("long " * 20_000)
            program.send(bytes(1000))
            for tab in self.tabs:
                tab.wait_for_messages(3)
                _, long, binary = tab.messages()
                self.assertTrue(long.startswith("long long"))
                self.assertEqual(binary, "binary, 1,000 bytes")

    def test_the_log_stays_where_the_reader_is(self) -> None:
        tab = self.tabs[0]
        with Client(self.port) as program:
            program.send("\n".join(map(str, range(20))))
            program.send("\n".join(map(str, range(20))))
            tab.wait_for_messages(2)
            tab.run("document.getElementById('scroller').scrollTop = 0")
            eventually(lambda: tab.run("return !following"), "the page has noticed")
            program.send("news")
            eventually(lambda: tab.shows("#jump"), "the button to the newest message")
            self.assertEqual(tab.run("return document.getElementById('scroller').scrollTop"), 0)
            tab.click("#jump")
            eventually(lambda: not tab.shows("#jump"), "the button has gone")

    def test_reconnection(self) -> None:
        """The server goes and comes again on its port: all come back by themselves, with what was typed meanwhile."""
        self.expected = "net::ERR_CONNECTION_REFUSED"
        self.tabs[0].send("before")
        self.assert_everywhere("before")
        self.assertEqual(self.server.stop(), 0)
        for tab in self.tabs:
            tab.wait_for_state("offline")
        texts = [f"offline in tab {i}" for i in range(4)]
        for tab, text in zip(self.tabs, texts):
            tab.send(text)
            self.assertEqual(tab.outbox(), [text])
        # With a history, since the tabs come back one after the other.
        self.server = Process("--port", str(self.port), "--history", "10")
        for tab in self.tabs:
            tab.wait_for_state("connected", RECONNECTION)
        for tab in self.tabs:
            tab.wait_for_messages(5)
            self.assertEqual(sorted(tab.messages()), ["before", *texts])
            self.assertEqual(tab.outbox(), [])


class Screenshot(unittest.TestCase):
    """The picture in the README."""

    def test_it_can_be_taken(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "picture.png")
            take(path)
            self.assertTrue(path.read_bytes().startswith(b"\x89PNG"))


if __name__ == "__main__":
    unittest.main()

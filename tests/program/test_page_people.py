"""The page as a few people use it: long drafts, slow links, files, times, links, names, servers that only send."""

from __future__ import annotations

import base64
import contextlib
import functools
import pathlib
import re
import select
import signal
import socket
import struct
import threading
import time
import typing
import unittest
import zlib

from tests.tools.browser import BROWSERS, FILE, PageTestCase, Tab, in_each_engine, only_in, seal
from tests.tools.support import DEADLINE, ROOT, Client, Process, eventually

RECONNECTION = 40.0  # seconds; attempts are up to 15 seconds apart
ESCAPE = "\ue00c"  # WebDriver 17.4.2


def tearDownModule() -> None:
    BROWSERS.close()


def png(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, which is small however many pixels it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([compressor.compress(row) for _ in range(height)]) + compressor.flush()
    head = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Draft(PageTestCase):
    """Writing does not move what is read."""

    def test_a_draft_of_several_lines_keeps_the_newest_message_in_view(self) -> None:
        server = self.serve()
        tab = self.open(self.from_disk(server))
        with Client(server.port) as program:
            for number in range(100):
                program.send(f"message {number}")
            tab.wait_for_messages(100)
            below = "return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
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


for case in (Draft,):
    in_each_engine(case)
del case, Draft


if __name__ == "__main__":
    unittest.main()

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


class Links(PageTestCase):
    """Where a link ends, and how it reads."""

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


class Pictures(PageTestCase):
    """A few bytes may be many pixels."""

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
        self.assertRegex(tab.messages()[0], r"^png, [\d,]+ bytes")

    def test_the_size_is_read_from_the_first_bytes(self) -> None:
        lossy = b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 300, 200)
        lossless = b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + struct.pack("<I", 299 | 199 << 14)
        extended = b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0\0\0\0\0" + struct.pack("<I", 299)[:3] + struct.pack("<I", 199)[:3]
        jpeg = b"\xff\xd8\xff\xe0\x00\x10" + bytes(14) + b"\xff\xff\xc2\x00\x11\x08" + struct.pack("!HH", 200, 300)
        many = b"\xff\xd8" + b"\xff\xe1\x00\x04\xff\xc0" * 50 + b"\xff\xc0\x00\x11\x08" + struct.pack("!HH", 200, 300)
        avif = b"\0\0\0\x18ftypavif" + bytes(30) + b"\0\0\0\x14ispe\0\0\0\0" + struct.pack("!II", 300, 200)
        tab = self.open(self.from_disk(self.serve()))
        for data in (png(300, 200), b"GIF89a" + struct.pack("<HH", 300, 200), lossy, lossless, extended, jpeg, many,
                     avif):  # fmt: skip
            padded = base64.b64encode(data + bytes(20)).decode()
            found = tab.run("return pixels(Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0)))", padded)
            self.assertEqual(found, 60_000, data[:20])
        for data in b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + bytes(50), b"GIF89a", b"RIFF1234WEBP":
            found = tab.run("return pixels(Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0))) > 0",
                            base64.b64encode(data).decode())  # fmt: skip
            self.assertFalse(found, data)


for case in (Draft, Links, Pictures,):
    in_each_engine(case)
del case, Draft, Links, Pictures


if __name__ == "__main__":
    unittest.main()

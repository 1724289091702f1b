"""Popular programs and libraries for POST."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import subprocess
import typing
import unittest
import urllib.request
import zlib

from tests.tools.browser import chromium
from tests.tools.support import DEADLINE, ROOT, Client, Process, default_server, long, package, require

PIECES = ["deploy ", "done, 世界"]
MESSAGE = "".join(PIECES)


class Posts(unittest.TestCase):
    """The messages of POSTs."""

    server: typing.ClassVar[Process]

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = default_server()

    def setUp(self) -> None:
        self.url = f"http://localhost:{self.server.port}/"
        self.client = Client(self.server.port)
        self.addCleanup(self.client.__exit__)

    def run_program(self, name: str, *arguments: str, data: bytes = b"") -> None:
        """Run a program, which must exit with 0."""
        program = shutil.which(name)
        require(program, name)
        command = [str(program), *arguments]
        done = subprocess.run(command, input=data, capture_output=True, timeout=6 * DEADLINE, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)


class Compressed(Posts):
    """printf hi | gzip | curl --data-binary @- -H 'Content-Encoding: gzip' localhost:4545."""

    def test_curl(self) -> None:
        url = ("--silent", "--fail", "--data-binary", "@-", self.url)
        for coding, data in (("gzip", gzip.compress(MESSAGE.encode())), ("deflate", zlib.compress(MESSAGE.encode()))):
            with self.subTest(coding):
                self.run_program("curl", "--header", f"Content-Encoding: {coding}", *url, data=data)
                self.assertEqual(self.client.read(), MESSAGE)
                chunked = ("--header", "Transfer-Encoding: chunked")
                self.run_program("curl", "--header", f"Content-Encoding: {coding}", *chunked, *url, data=data)
                self.assertEqual(self.client.read(), MESSAGE)

    def test_aiohttp(self) -> None:
        """aiohttp sends compressed data in chunks."""
        aiohttp = package("aiohttp")

        async def post() -> int:
            session = aiohttp.ClientSession()
            async with session, session.post(self.url, data=MESSAGE, compress="gzip") as response:
                return int(response.status)

        self.assertEqual(asyncio.run(post()), 202)
        self.assertEqual(self.client.read(), MESSAGE)


class InChunks(Posts):
    """Bodies whose length is not known at the beginning (RFC 9112 7.1)."""

    def encoded(self) -> typing.Iterator[bytes]:
        """Yield the pieces of the message."""
        for piece in PIECES:
            yield piece.encode()

    def test_urllib(self) -> None:
        request = urllib.request.Request(self.url, self.encoded())
        with urllib.request.urlopen(request, timeout=DEADLINE) as response:
            self.assertEqual(response.status, 202)
        self.assertEqual(self.client.read(), MESSAGE)

    def test_requests(self) -> None:
        response = package("requests").post(self.url, self.encoded(), timeout=DEADLINE)
        self.assertEqual(response.status_code, 202)
        self.assertEqual(self.client.read(), MESSAGE)

    def test_curl(self) -> None:
        chunked = ["--header", "Transfer-Encoding: chunked", "--data-binary", "@-"]
        self.run_program("curl", "--silent", "--fail", *chunked, self.url, data=MESSAGE.encode())
        self.assertEqual(self.client.read(), MESSAGE)
        self.run_program("curl", "--silent", "--fail", *chunked, self.url, data=bytes(100_000))  # expects a 100
        self.assertEqual(self.client.read(), "\0" * 100_000)

    def test_node_http(self) -> None:
        script = """
            const request = require('http').request(process.argv[1], {method: 'POST'}, (response) => {
                process.exit(response.statusCode === 202 ? 0 : 1);
            });
            for (const piece of process.argv.slice(2)) request.write(piece);
            request.end();
        """
        self.run_program("node", "--eval", script, self.url, *PIECES)
        self.assertEqual(self.client.read(), MESSAGE)

    def test_node_fetch(self) -> None:
        script = """
            const body = new ReadableStream({
                start(controller) {
                    for (const piece of process.argv.slice(2)) controller.enqueue(new TextEncoder().encode(piece));
                    controller.close();
                }
            });
            fetch(process.argv[1], {method: 'POST', body, duplex: 'half'})
                .then((response) => process.exit(response.status === 202 ? 0 : 1));
        """
        self.run_program("node", "--eval", script, self.url, *PIECES)
        self.assertEqual(self.client.read(), MESSAGE)

    @long
    def test_java(self) -> None:
        """Java's client also offers HTTP/2 with Upgrade: h2c, and expects a 100."""
        self.run_program("java", str(ROOT / "tests/tools/interop/PostClient.java"), self.url, "from Java")
        self.assertEqual(self.client.read(), "from Java")


class Browser(unittest.TestCase):
    """A page of another origin; the browser lets it send and read only as the server allows (Fetch)."""

    SCRIPT = """
        const [url, kind, credentials, done] = arguments;
        const headers = {'Content-Type': kind, Authorization: 'Bearer x'};
        fetch(url, {method: 'POST', body: 'from a page', headers, credentials})
            .then(response => response.text()).then(done, error => done(String(error)));
    """

    def post(self, driver: typing.Any, server: Process, kind: str, credentials: str) -> str:
        """Return the response that the page can read."""
        return str(driver.execute_async_script(self.SCRIPT, f"http://localhost:{server.port}/", kind, credentials))

    def test_chromium(self) -> None:
        with chromium() as driver:
            self.check(driver)

    def check(self, driver: typing.Any) -> None:
        """It may send each kind, with and without credentials, where its origin is allowed."""
        pages = Process()  # the page has another origin: another port
        self.addCleanup(pages.stop)
        origin = f"http://localhost:{pages.port}"
        allowing, refusing = Process("--origin", origin), Process()
        self.addCleanup(allowing.stop)
        self.addCleanup(refusing.stop)
        client = Client(allowing.port)
        self.addCleanup(client.__exit__)
        driver.get(f"{origin}/status")
        for kind, message in (("application/json", "from a page"), ("application/octet-stream", b"from a page")):
            for credentials in ("omit", "include"):
                with self.subTest(kind, credentials=credentials):
                    self.assertEqual(self.post(driver, allowing, kind, credentials), "sent\n")
                    self.assertEqual(client.read(), message)
        self.assertIn("TypeError", self.post(driver, refusing, "application/json", "include"))


if __name__ == "__main__":
    unittest.main()

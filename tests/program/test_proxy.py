"""Behind nginx, with the configuration that README.md shows."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import typing
import unittest

from tests.tools.support import EVERYTHING, ROOT, Client, Process, eventually, exchange, free_port, request, require

CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


@contextlib.contextmanager
def nginx(server_port: int) -> typing.Iterator[int]:
    """nginx in front of a server; its port."""
    located = re.search(r"```nginx\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert located
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/nginx.conf", "w") as file:
            location = located[1].replace("127.0.0.1:4545", f"127.0.0.1:{server_port}")
            file.write(CONFIGURATION.format(folder=folder, port=port, location=location))
        command = ["nginx", "-c", f"{folder}/nginx.conf", "-e", f"{folder}/error.log"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            eventually(lambda: answers(port), "nginx")
            yield port
        finally:
            process.terminate()
            process.wait(10)


def answers(port: int) -> bool:
    """Whether anybody listens."""
    try:
        Client(port, handshake=False).socket.close()
    except OSError:
        return False
    return True


@unittest.skipUnless(EVERYTHING or shutil.which("nginx"), "nginx is missing")
class Nginx(unittest.TestCase):
    """The proxy of README.md."""

    def test_chat(self) -> None:
        """Messages both ways, a Close; no status, no POST; the origin is the name of the site."""
        require(shutil.which("nginx"), "nginx")
        with Process("--origin", "https://example.com") as server, nginx(server.port) as port:
            head = "Host: example.com\r\nOrigin: https://example.com\r\nConnection: close\r\n"
            ways: typing.Any = {"target": "/chat/", "Host": "example.com", "Origin": "https://example.com"}
            with Client(port, **ways) as one, Client(port, **ways) as other:
                for message in ("hello", "é" * 40_000, bytes(70_000), "x" * 1_000_000):
                    one.send(message)
                    self.assertEqual((one.read(), other.read()), (message, message))
                for hidden in ("GET /chat/status", "GET /chat/", "POST /chat/"):
                    asked = f"{hidden} HTTP/1.1\r\n{head}Content-Length: 2\r\n\r\nhi"
                    self.assertEqual(exchange(port, asked.encode())[0], 404)
                one.send("end")
                self.assertEqual((one.read(), other.read()), ("end", "end"))
                one.close()
                self.assertEqual(one.read_close()[0], 1000)
            stranger = request(**{**ways, "Origin": "https://evil.example"})
            with Client(port, handshake=False) as refused:
                refused.send_raw(stranger)
                self.assertIn(b" 403 ", refused.read_head())

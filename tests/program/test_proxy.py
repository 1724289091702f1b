"""Behind the proxies of README.md, with the configuration that it shows."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
import subprocess
import tempfile
import typing
import unittest

from tests.tools.readme import CODE, rows, section
from tests.tools.support import DEADLINE, Client, Process, eventually, exchange, free_port, long, request, require

NGINX = """
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
        {block}
    }}
}}
"""
APACHE = """
ServerName localhost
ServerRoot {folder}
DefaultRuntimeDir {folder}
PidFile {folder}/pid
ErrorLog {folder}/error.log
User nobody
Group nogroup
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_http_module {modules}/mod_proxy_http.so
Listen 127.0.0.1:{port}
{spans[0]}
{spans[1]}
"""
HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 50s
    timeout server 50s
frontend site
    bind 127.0.0.1:{port}
    {spans[0]}
    {spans[1]}
    default_backend room
backend room
    server one 127.0.0.1:4545
"""
VARNISH = """
vcl 4.1;
backend default {{ .host = "127.0.0.1"; .port = "4545"; }}
sub vcl_recv {{ {spans[0]} }}
sub vcl_pipe {{ {spans[2]} }}
"""
LIGHTTPD = """
server.modules = ("mod_proxy")
server.document-root = "{folder}"
server.bind = "127.0.0.1"
server.port = {port}
{spans[0]}
{spans[1]}
"""
CADDY = """
{{
    admin off
    auto_https off
}}
http://:{port} {{
    bind 127.0.0.1
    {lines}
}}
"""


def configuration(proxy: str) -> list[str]:
    """The code in the second column of the table of proxies."""
    (cell,) = (row[1] for row in rows(section("Deployment")) if row[0].startswith(proxy))
    return re.findall(r"`(.*?)`", cell)


class Proxy(unittest.TestCase):
    """A proxy in front of a server that allows the origin of a site."""

    target = "/chat/"
    hidden = False  # True if page, status and POST are internal

    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        """Write the configuration and return the command; the test is skipped if the proxy is missing."""
        raise unittest.SkipTest("not a proxy")

    def write(self, folder: pathlib.Path, text: str, server_port: int, **fields: typing.Any) -> str:
        """Write a configuration file and return its name."""
        file = folder / "configuration"
        text = text.format(folder=folder, **fields)
        file.write_text(re.sub(r"\b4545\b", str(server_port), text), encoding="utf-8")
        folder.chmod(0o755)  # a proxy that is started as root reads it as another user
        return str(file)

    def program(self, name: str) -> pathlib.Path:
        """The path of a program."""
        path = shutil.which(name)
        require(path, name)
        return pathlib.Path(str(path)).resolve()

    @contextlib.contextmanager
    def proxy(self, server_port: int) -> typing.Iterator[int]:
        """Run the proxy and yield its port."""
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            command = self.start(pathlib.Path(folder), server_port, port)
            said = pathlib.Path(folder, "said")
            with open(said, "wb") as output:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                eventually(lambda: process.poll() is not None or answers(port), command[0])
                self.assertIsNone(process.poll(), said.read_text(errors="replace"))
                yield port
            finally:
                process.terminate()
                process.wait(DEADLINE)

    def test_chat(self) -> None:
        """Messages of all sizes pass, and a Close; the origin must be the site's."""
        with Process("--origin", "https://example.com") as server, self.proxy(server.port) as port:
            site: typing.Any = {"target": self.target, "Host": "example.com", "Origin": "https://example.com"}
            site["Upgrade"] = "WebSocket"  # its case does not matter
            with Client(port, **site) as one, Client(port, **site) as other:
                for message in ("hello", "é" * 40_000, bytes(70_000), "x" * 1_000_000):
                    one.send(message)
                    self.assertEqual((one.read(), other.read()), (message, message))
                if self.hidden:
                    self.check_hidden(port)
                one.send("end")
                self.assertEqual((one.read(), other.read()), ("end", "end"))
                one.close()
                self.assertEqual(one.read_close()[0], 1000)
            with Client(port, handshake=False) as refused:
                refused.send_raw(request(**{**site, "Origin": "https://evil.example"}))
                self.assertIn(b" 403 ", refused.read_head())

    def check_hidden(self, port: int) -> None:
        """Page, status and POST are refused, also with an Upgrade field without the option of Connection."""
        head = "Host: example.com\r\nOrigin: https://example.com\r\nConnection: close\r\n"
        for line in (f"GET {self.target}status", f"GET {self.target}", f"POST {self.target}"):
            for field in ("X: y", "Upgrade: websocket"):
                text = f"{line} HTTP/1.1\r\n{head}{field}\r\nContent-Length: 2\r\n\r\nhi"
                self.assertIn(exchange(port, text.encode())[0], (400, 403, 404, 405), (line, field))


def answers(port: int) -> bool:
    """Return whether a port of this machine accepts connections."""
    try:
        Client(port, handshake=False).socket.close()
    except OSError:
        return False
    return True


class Nginx(Proxy):
    hidden = True

    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        file = self.write(folder, NGINX, server_port, port=port, block=CODE["Deployment", "nginx"])
        return [str(self.program("nginx")), "-c", file, "-e", f"{folder}/error.log"]


@long
class Apache(Proxy):
    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        program = self.program("apache2")
        modules = program.parents[1] / "lib" / "apache2" / "modules"
        file = self.write(folder, APACHE, server_port, port=port, modules=modules, spans=configuration("Apache"))
        return [str(program), "-X", "-f", file]


@long
class HAProxy(Proxy):
    hidden = True

    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        file = self.write(folder, HAPROXY, server_port, port=port, spans=configuration("HAProxy"))
        return [str(self.program("haproxy")), "-db", "-f", file]


@long
class Varnish(Proxy):
    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        program = self.program("varnishd")
        require(shutil.which("gcc"), "gcc")
        file = self.write(folder, VARNISH, server_port, spans=configuration("Varnish"))
        return [str(program), "-F", "-n", f"{folder}/varnish", "-a", f"127.0.0.1:{port}", "-f", file]


@long
class Lighttpd(Proxy):
    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        program = self.program("lighttpd")
        file = self.write(folder, LIGHTTPD, server_port, port=port, spans=configuration("lighttpd"))
        return [str(program), "-D", "-m", str(program.parents[1] / "lib" / "lighttpd"), "-f", file]


class Caddy(Proxy):
    target = "/"
    hidden = True

    def start(self, folder: pathlib.Path, server_port: int, port: int) -> list[str]:
        file = self.write(folder, CADDY, server_port, port=port, lines="\n".join(configuration("Caddy")))
        run = [str(self.program("caddy")), "run", "--adapter", "caddyfile", "--config", file]
        return ["env", f"XDG_CONFIG_HOME={folder}", *run]  # or it keeps its configuration for the next start


del Proxy  # the common base has no test of its own

if __name__ == "__main__":
    unittest.main()

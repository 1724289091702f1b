"""The wheel: build it, install it into an empty environment, and use it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
import venv
import zipapp
import zipfile

import pywebsock
from tests.tools.support import IS_WINE, ROOT, Client, Process, exchange, package, request

PATIENCE = 120.0  # seconds for pip

PROGRAM = """
from pywebsock import BroadcastServer, CloseCode, HandshakeError, Message, WebSocketHandler


class Chat(BroadcastServer):
    max_message = 1000

    def admit(self, client: WebSocketHandler) -> None:
        if client.headers.get("x-name", "") + client.method + client.target != "":
            raise HandshakeError(401, "why", ("WWW-Authenticate", "Bearer"))
        raise HandshakeError(401, b"why")  # type: ignore[arg-type]

    def on_message(self, client: WebSocketHandler, message: Message) -> None:
        text: str = message  # type: ignore[assignment]
        self.broadcast(text, to=self.clients - {client})
        self.broadcast({"a": 1})  # type: ignore[arg-type]
        client.send(client.address + 1)  # type: ignore[operator]
        client.close(CloseCode.GOING_AWAY, 1)  # type: ignore[arg-type]

    def on_close(self, client: WebSocketHandler, code: int) -> None:  # type: ignore[override]
        print(self.status()["clients"])


Chat(("localhost", 4545), history="10")  # type: ignore[arg-type]
Chat(("localhost", 4545), rate=1, tls_context="x")  # type: ignore[arg-type]
with Chat(("localhost", 4545), history=10, origins=["*"], redis=None) as server:
    server.serve_forever()
server.nothing()  # type: ignore[attr-defined]
"""


def pip(python: str, *arguments: str) -> None:
    """Run pip, without a package registry."""
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, timeout=PATIENCE)


class Wheel(unittest.TestCase):
    """`pip install pywebsock`, and the installed command."""

    def setUp(self) -> None:
        package("pip")
        package("hatchling")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder.name, str(ROOT))
        (self.wheel,) = self.folder.glob("*.whl")

    def test_contents(self) -> None:
        with zipfile.ZipFile(self.wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
            (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        self.assertEqual(names, {"pywebsock.py", "pywebsock.html", "pywebsock-stubs/__init__.pyi"})
        self.assertIn(f"\nVersion: {pywebsock.__version__}\n", metadata)
        self.assertNotIn("\nRequires-Dist:", metadata)

    def installed(self) -> pathlib.Path:
        """Return the folder of programs of an environment that has only the wheel."""
        home = self.folder / "environment"
        venv.create(home, with_pip=True)
        programs = home / ("Scripts" if os.name == "nt" else "bin")
        pip(str(programs / "python"), "install", "--no-index", str(self.wheel))
        return programs

    def test_types(self) -> None:
        """mypy --strict finds the types; an unused `type: ignore` is an error."""
        package("mypy")
        program = self.folder / "program.py"
        program.write_text(PROGRAM)
        how = ("--strict", "--config-file=", "--python-executable", str(self.installed() / "python"))
        command = [sys.executable, "-m", "mypy", *how, str(program)]
        checked = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        self.assertEqual((checked.stdout + checked.stderr).strip(), "Success: no issues found in 1 source file")

    def test_source_distribution(self) -> None:
        """A wheel that is built from the source distribution is the same."""
        backend = "from hatchling.build import build_sdist; import sys; build_sdist(sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", backend, str(self.folder)],
            cwd=ROOT,
            check=True,
            timeout=PATIENCE,
            capture_output=True,
        )
        (source,) = self.folder.glob("*.tar.gz")
        again = self.folder / "again"
        pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(again), str(source))
        self.assertEqual((again / self.wheel.name).read_bytes(), self.wheel.read_bytes())

    def test_command(self) -> None:
        programs = self.installed()
        with Process(program=[str(programs / "pywebsock")]) as server:
            status, fields, page = exchange(server.port, request(Upgrade=None, Connection=None, Sec_WebSocket_Key=None))
            self.assertEqual((status, fields["content-type"]), (200, "text/html; charset=utf-8"))
            self.assertEqual(page, (ROOT / "pywebsock.html").read_bytes())
            with Client(server.port) as client:
                client.send("Grüße")
                self.assertEqual(client.read(), "Grüße")
                client.close()
                self.assertEqual(client.read_close(), (1000, ""))
            if not IS_WINE:  # under Wine, it is killed
                self.assertEqual(server.stop(), 0)


class Places(unittest.TestCase):
    """Ways to start the program; each finds the page."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.copy = self.folder / "copy"
        self.copy.mkdir()
        for name in ("pywebsock.py", "pywebsock.html"):
            shutil.copy(ROOT / name, self.copy)

    def check(self, *program: str | pathlib.Path) -> None:
        """Check that the program starts and finds the page."""
        with Process(program=[str(part) for part in program]) as server:
            status, _, body = exchange(server.port, b"GET / HTTP/1.0\r\n\r\n")
            self.assertEqual((status, body), (200, (ROOT / "pywebsock.html").read_bytes()))

    def link(self, target: pathlib.Path) -> pathlib.Path:
        """Make a link in another folder."""
        if IS_WINE:
            self.skipTest("Wine makes links, but does not follow them")
        link = self.folder / "pywebsock"
        try:
            link.symlink_to(target)
        except OSError as error:  # Windows
            self.skipTest(str(error))
        return link

    def test_link(self) -> None:
        """A link in a folder of $PATH: ln -s /opt/pywebsock/pywebsock.py /usr/local/bin/pywebsock."""
        self.check(sys.executable, self.link(self.copy / "pywebsock.py"))

    def test_module(self) -> None:
        """python -m pywebsock."""
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=str(self.copy)):
            self.check(sys.executable, "-m", "pywebsock")

    def test_zip(self) -> None:
        """python -m zipapp FOLDER -m pywebsock:main."""
        archive = self.folder / "pywebsock.pyz"
        zipapp.create_archive(self.copy, archive, main="pywebsock:main")
        self.check(sys.executable, archive)

    def test_link_to_a_zip(self) -> None:
        """A link to the zip file."""
        archive = self.folder / "pywebsock.pyz"
        zipapp.create_archive(self.copy, archive, main="pywebsock:main")
        self.check(sys.executable, self.link(archive))


if __name__ == "__main__":
    unittest.main()

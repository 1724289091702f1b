"""The wheel: built, installed into an environment that has nothing else, and used."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
import venv
import zipfile

import pywebsock
from tests.tools.support import ROOT, Client, Process, exchange, package, request

PATIENCE = 120.0  # seconds for pip


def pip(python: str, *arguments: str) -> None:
    """Run pip, which must not ask any registry."""
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, timeout=PATIENCE)


class Wheel(unittest.TestCase):
    """`pip install pywebsock`, and the command that it brings."""

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
        self.assertEqual(names, {"pywebsock.py", "pywebsock.html"})
        self.assertIn(f"\nVersion: {pywebsock.__version__}\n", metadata)
        self.assertNotIn("\nRequires-Dist:", metadata)

    def test_command(self) -> None:
        home = self.folder / "environment"
        venv.create(home, with_pip=True)
        programs = home / ("Scripts" if os.name == "nt" else "bin")
        pip(str(programs / "python"), "install", "--no-index", str(self.wheel))
        with Process(program=[str(programs / "pywebsock")]) as server:
            status, fields, page = exchange(server.port, request(Upgrade=None, Connection=None, Sec_WebSocket_Key=None))
            self.assertEqual((status, fields["content-type"]), (200, "text/html; charset=utf-8"))
            self.assertEqual(page, (ROOT / "pywebsock.html").read_bytes())
            with Client(server.port) as client:
                client.send("Grüße")
                self.assertEqual(client.read(), "Grüße")
                client.close()
                self.assertEqual(client.read_close(), (1000, ""))
            self.assertEqual(server.stop(), 0)


if __name__ == "__main__":
    unittest.main()

"""README.md for the tests: its text, the code in it, and programs of it that run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import typing

from tests.tools.support import DEADLINE, ROOT, Client, ServerTestCase, eventually, free_port

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = {
    (HEADING.findall(TEXT, 0, match.start())[-1], match[1]): match[2] for match in BLOCK.finditer(TEXT)
}  # by heading and language


def section(heading: str) -> str:
    """The text under a heading of the second level."""
    return TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The cells of the rows of a table, without its head."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*", text, re.MULTILINE)]
    return rows[2:]


class ProgramTestCase(ServerTestCase):
    """Tests of the programs in the README that are complete: each in a process, with a free port in place of 4545."""

    output: str  # of the program, after its end
    folder: pathlib.Path  # in which it ran

    @contextlib.contextmanager
    def program(self, heading: str, number: int = signal.SIGINT) -> typing.Iterator[int]:
        """Run the program under a heading and yield its port; then end it with a signal and check its status."""
        port = free_port()
        text = CODE[heading, "python"].replace("4545", str(port))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        process = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.signal(2, signal.default_int_handler)\n" + text],
            cwd=folder.name,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            eventually(lambda: process.poll() is not None or listens(port), heading)
            yield port
            process.send_signal(number)
            self.output, errors = process.communicate(timeout=DEADLINE)
            self.assertEqual((process.returncode, re.sub(".* refused: 403, .*\n", "", errors)), (0, ""))
        finally:
            process.kill()
            process.communicate()


def listens(port: int) -> bool:
    """Whether a connection to a port of this machine is accepted."""
    with contextlib.suppress(OSError):
        Client(port, handshake=False).socket.close()
        return True
    return False

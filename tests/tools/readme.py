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

INTERRUPTIBLE = "import signal; signal.signal(2, signal.default_int_handler)\n"  # also where a shell ignores it


def section(heading: str) -> str:
    """The text under a heading, up to the next one."""
    return re.split(r"^##+ ", TEXT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def sentences(text: str) -> list[str]:
    """The sentences of a text in Markdown: without code, each cell of a table and each item of a list by itself."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?: {4}.*|\|[-|]+\||!\[.*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "CODE", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(?:#+|-) ", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\|.*", lambda row: row[0].replace("|", "\n\n") + "\n", text, flags=re.MULTILINE)
    paragraphs = [" ".join(paragraph.replace("**", "").split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [each for paragraph in paragraphs for each in re.split(r"(?<=[.?!:]) ", paragraph) if each]


class ProgramTestCase(ServerTestCase):
    """Tests of the programs in the README that are complete: each in a process, with a free port in place of 4545."""

    folder: pathlib.Path  # in which it ran

    @contextlib.contextmanager
    def program(self, heading: str, number: int = signal.SIGINT, prelude: str = "") -> typing.Iterator[int]:
        """Run the program under a heading and yield its port; then end it with a signal and check its status."""
        port = free_port()
        text = prelude + CODE[heading, "python"].replace("4545", str(port))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE + text],
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
            output, errors = process.communicate(timeout=DEADLINE)
            self.assertEqual((process.returncode, output, re.sub(".* refused: 403, .*\n", "", errors)), (0, "", ""))
        finally:
            process.kill()
            process.communicate()


def listens(port: int) -> bool:
    """Return whether a port of this machine accepts connections."""
    with contextlib.suppress(OSError):
        Client(port, handshake=False).socket.close()
        return True
    return False

"""README.md says what is so: its table of parts, its options, its example."""

from __future__ import annotations

import pathlib
import re
import sys
import unittest

import pywebsock
from tests.tools.support import ROOT, Client, running

README = ROOT / "README.md"
SOURCE = pathlib.Path(pywebsock.__file__)
BANNER = re.compile(r"^# =+\n# (?P<title>[^\n]+)\n(?P<more>(?:#[^\n]*\n)*?)# =+\n", re.MULTILINE)


def table_of_parts() -> str:
    """The table "read it beside the RFC", from the banners of the module."""
    text = SOURCE.read_text()
    banners = [(text.count("\n", 0, match.start()) + 1, match["title"]) for match in BANNER.finditer(text)]
    ends = [line - 1 for line, _ in banners[1:]] + [text.count("\n")]
    rows = [f"| docstring: the frame, the engine, threads and locks | RFC 6455 5.2 | 1-{banners[0][0] - 1} |"]
    for (line, title), end in zip(banners, ends):
        name, _, section = title.rstrip(")").partition(" (")
        rows.append(f"| {name} | {section} | {line}-{end} |")
    return "\n".join(rows)


def rewritten(readme: str) -> str:
    """The README with that table as it should be."""
    return re.sub("<!-- parts -->.*<!-- /parts -->", lambda _: inside(table_of_parts()), readme, flags=re.DOTALL)


def inside(table: str) -> str:
    """The table with what marks its place. It has to follow its head without a gap."""
    return f"<!-- parts -->\n\n| part of pywebsock.py | section | lines |\n|---|---|---|\n{table}\n\n<!-- /parts -->"


class Readme(unittest.TestCase):
    """What a reader may rely on."""

    text = README.read_text()

    def test_parts(self) -> None:
        """`python -m tests.program.test_readme` writes it anew."""
        self.assertEqual(self.text, rewritten(self.text))

    def test_options(self) -> None:
        """Every option is in the table, and none that is not there."""
        described = set(re.findall(r"`(--[a-z-]+)", self.text.partition("## Options")[2].partition("## Scope")[0]))
        options = set(re.findall(r"(?<!\S)(--[a-z-]+)", pywebsock.argument_parser().format_help()))
        self.assertEqual(described, options - {"--help", "--version"})

    def test_library_example(self) -> None:
        """It runs as it stands."""
        example = re.search(r"```python\n(.*?)\nwith ", self.text, re.DOTALL)
        assert example
        names: dict[str, type[pywebsock.BroadcastServer]] = {}
        exec(example[1], names)
        with running(names["Chat"], history=10) as server, Client(server.server_address[1]) as client:
            (handler,) = server.clients
            self.assertEqual(client.read(), f"welcome, {handler.address}")
            client.send("hello")
            self.assertEqual(client.read(), f"{handler.address}: hello")
            client.close()

    def test_files(self) -> None:
        """What it links to is there."""
        for target in re.findall(r"\]\(([^)#:]+)\)", self.text):
            self.assertTrue((ROOT / target).exists(), target)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
    sys.exit(0)

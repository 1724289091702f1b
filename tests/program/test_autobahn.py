"""The Autobahn test suite, without the long messages of the compression cases; see tests/tools/autobahn.py."""

from __future__ import annotations

import pathlib
import tempfile
import typing
import unittest

from tests.tools import autobahn
from tests.tools.support import Process, require

GROUPS = {  # the suite's groups of cases, and the number of cases
    "framing": (["1.*", "2.*", "3.*", "4.*", "5.*"], 16 + 11 + 7 + 10 + 20),
    "UTF-8": (["6.*"], 145),
    "closing": (["7.*"], 37),
    "sizes and fragments": (["9.*", "10.*"], 54 + 1),
    "compression": ([f"{group}.{kind}.{size}" for group, kinds in ((12, 5), (13, 7))
                     for kind in range(1, kinds + 1) for size in range(1, 6)], 60),
}  # fmt: skip


class Autobahn(unittest.TestCase):
    """A server in its own process, with default settings."""

    folder: typing.ClassVar[pathlib.Path]
    server: typing.ClassVar[Process]

    @classmethod
    def setUpClass(cls) -> None:
        require(autobahn.find(), "$PYWEBSOCK_WSTEST, the Autobahn test suite,")
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        cls.server = Process("--quiet")
        cls.addClassCleanup(cls.server.stop)

    def check(self, group: str) -> autobahn.Results:
        """Check that all cases of a group run, and that the server is correct in each, also in closing."""
        folder = self.folder / group
        folder.mkdir()
        cases, count = GROUPS[group]
        results = autobahn.run(str(autobahn.find()), self.server.port, cases, folder, 300.0)
        self.assertEqual(results.bad(), [])
        self.assertEqual(len(results.selected), count)
        self.assertEqual(self.server.log(), "")
        return results

    def test_framing(self) -> None:
        self.check("framing")

    def test_utf8(self) -> None:
        self.check("UTF-8")

    def test_closing(self) -> None:
        self.check("closing")

    def test_sizes_and_fragments(self) -> None:
        self.check("sizes and fragments")

    def test_compression(self) -> None:
        results = self.check("compression")
        # The suite accepts a server that never compresses. 12.1.3 has messages of 256 bytes, 12.1.5 of 4096.
        for case, compressed in (("12.1.3", False), ("12.1.5", True), ("13.7.5", True)):
            traffic = results.details(case)["trafficStats"]
            self.assertEqual(traffic["incomingCompressionRatio"] < 0.5, compressed, case)
            self.assertLess(traffic["outgoingCompressionRatio"], 0.6, case)


if __name__ == "__main__":
    unittest.main()

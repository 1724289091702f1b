"""The examples in the docstrings of the module are correct."""

from __future__ import annotations

import doctest
import sys
import unittest

import pywebsock


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """Add each docstring with examples as a test; the loader calls this."""
    if sys.flags.optimize < 2:  # without -OO
        tests.addTests(doctest.DocTestSuite(pywebsock))
    return tests


@unittest.skipIf(sys.flags.optimize > 1, "there are no docstrings")
class Examples(unittest.TestCase):
    """The examples of the pure parts."""

    def test_each_pure_part_has_some(self) -> None:
        """The docstrings have the examples of the RFCs."""
        finder = doctest.DocTestFinder(exclude_empty=True)
        found = {test.name.partition(".")[2]: test for test in finder.find(pywebsock) if test.examples}
        for name, shown in (
            ("apply_mask", "7f 9f 4d 51 58"),
            ("serialize_frame", "81 05 48 65 6c 6c 6f"),  # RFC 6455 5.7
            ("FrameReader", "81 85 37 fa 21 3d 7f 9f 4d 51 58"),
            ("parse_close", "03 e9"),
            ("negotiate_deflate", "server_max_window_bits=10"),
            ("deflate", "f2 48 cd c9 c9 07 00"),  # RFC 7692 7.2.3.1
            ("Inflater", "f2 48 cd c9 c9 07 00"),
            ("MessageReader", "TEXT b'Hello'"),
            ("Outgoing", "5004"),
            ("compute_accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),  # RFC 6455 1.3
        ):
            with self.subTest(name):
                self.assertIn(name, found)
                self.assertIn(shown, "".join(each.source + each.want for each in found[name].examples))


if __name__ == "__main__":
    unittest.main()

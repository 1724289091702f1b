"""The benchmark works; how fast anything is, it does not say here."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import typing
import unittest

from tests.tools.support import DEADLINE, EVERYTHING, ROOT, require


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A small run, of this server alone."""
    command = [sys.executable, "-m", "tests.tools.benchmark", "--rounds", "1", "--seconds", "0.1"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, encoding="utf-8", timeout=6 * DEADLINE, check=False, cwd=ROOT
    )


@unittest.skipUnless(EVERYTHING, "takes ten seconds: PYWEBSOCK_TESTS=everything")
class Benchmark(unittest.TestCase):
    """`python -m tests.tools.benchmark`."""

    def setUp(self) -> None:
        require(hasattr(select, "poll"), "select.poll")

    def check(self, *arguments: str, server: str = "pywebsock") -> typing.Any:
        """Nothing may be lost, and the order must be one."""
        run = benchmark("--json", "--servers", server, *arguments)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        result = json.loads(run.stdout)
        (scenario,) = result["scenarios"].values()
        found = scenario[server]
        self.assertNotIn("error", found)
        self.assertEqual((found["lost"], found["order"], found["failures"]), (0, "same", []))
        self.assertGreater(found["deliveries_per_s"], 0)
        self.assertGreaterEqual(found["p99_ms"], found["p50_ms"])
        return result

    def test_all_send(self) -> None:
        result = self.check("--scenarios", "burst100")
        self.assertIn("pywebsock", result["conditions"]["servers"])

    def test_bare_loop(self) -> None:
        require(sys.platform == "linux" and shutil.which("cc"), "a C compiler on Linux")
        self.check("--scenarios", "burst100", server="(bare loop)")
        self.check("--scenarios", "pair", "--compressed", server="(bare loop)")

    def test_compressed(self) -> None:
        self.check("--scenarios", "pair", "--compressed")

    def test_table(self) -> None:
        run = benchmark("--scenarios", "pair", "--servers", "pywebsock")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertRegex(run.stdout, r"(?m)^pywebsock +(>= )?[\d,]+ ")

    def test_usage(self) -> None:
        self.assertEqual(benchmark("--scenarios", "all").returncode, 2)
        self.assertEqual(benchmark("--seconds", "60").returncode, 2)

"""The benchmark works. Its figures are not checked."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import types
import typing
import unittest
import zlib

from tests.tools import benchmark_load
from tests.tools.benchmark import GROUPS, SCENARIOS, VISITS, parse
from tests.tools.support import DEADLINE, EVERYTHING, ROOT, require


class Options(unittest.TestCase):
    """The names of scenarios."""

    def names(self, *arguments: str) -> list[str]:
        return list(parse(arguments).scenarios)

    def test_default_is_quick(self) -> None:
        self.assertEqual(self.names(), ["pair", "fan100", "chat100", "burst100"])

    def test_names_and_groups(self) -> None:
        self.assertEqual(self.names("--scenarios", "m1,deflate"), ["m1", "deflate-k1", "deflate-k64"])
        self.assertEqual(self.names("--scenarios", "all"), list(SCENARIOS))
        self.assertFalse(set(GROUPS) & set(SCENARIOS))

    def test_titles(self) -> None:
        self.assertEqual(SCENARIOS["k64"].title, "20 clients, 2 sending 64 KiB, 2 in flight for each sender")
        self.assertIn("5 sending 200,000 bytes,", SCENARIOS["k200"].title)
        self.assertTrue(SCENARIOS["tls-connect"].title.endswith(", TLS"))

    def test_compressed(self) -> None:
        (scenario,) = parse(["--scenarios", "pair", "--compressed"]).scenarios.values()
        self.assertEqual((scenario.size, scenario.deflate), (2048, True))


class Messages(unittest.TestCase):
    """The messages of the load."""

    def test_json(self) -> None:
        for size in (1024, 2048, 65536):
            frame = benchmark_load.Compressed(size).frame(7, 8, 9)
            start = 4 + len(benchmark_load.KEY)
            payload = frame[start:].translate(benchmark_load.MASKED)
            message = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
            self.assertEqual(len(message), size)
            self.assertEqual(json.loads(message)["at"], "000700000008000000000000009")

    def test_large_are_forgotten(self) -> None:
        """Data that all clients have got is not kept."""
        size, count = 1_000_000, 50
        load = types.SimpleNamespace(shape=benchmark_load.Plain(size), clients=1)
        stream = benchmark_load.Stream(typing.cast(typing.Any, load), [0])
        load.seen_by_all = lambda: stream.end - 70_000
        frame = load.shape.frame(0, 0, 5)
        for number in range(count):
            frame = benchmark_load.head(0x81, size) + load.shape.frame(0, number, 5)[14:].translate(
                benchmark_load.MASKED
            )
            for i in range(0, len(frame), 300_000):
                stream.extend(frame[i : i + 300_000])
        self.assertEqual((len(stream.ends), stream.gaps, stream.end), (count, 0, count * len(frame)))
        self.assertLess(len(stream.data), 2 * benchmark_load.ROOM)
        with self.assertRaises(ValueError):
            stream.extend(frame[:100] + b"y" * size)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a small benchmark of this server alone."""
    command = [sys.executable, "-m", "tests.tools.benchmark", "--rounds", "1", "--seconds", "0.1"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, encoding="utf-8", timeout=6 * DEADLINE, check=False, cwd=ROOT
    )


@unittest.skipUnless(EVERYTHING, "takes a minute: PYWEBSOCK_TESTS=everything")
class Benchmark(unittest.TestCase):
    """`python -m tests.tools.benchmark`."""

    def setUp(self) -> None:
        require(hasattr(select, "poll"), "select.poll")

    def check(self, *arguments: str, server: str = "pywebsock") -> typing.Any:
        """Check that no message is lost, and that there is one order."""
        run = benchmark("--json", "--servers", server, *arguments)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        result = json.loads(run.stdout)
        for name, scenario in result["scenarios"].items():
            found = scenario[server]
            self.assertNotIn("error", found)
            self.assertEqual((found["lost"], found["order"], found["failures"]), (0, "same", []))
            self.assertGreaterEqual(found["p99_ms"], found["p50_ms"])
            if SCENARIOS[name].kind != VISITS:  # on a busy machine, messages may arrive after the measurement
                self.assertGreater(found["bytes_a_message"], 0)
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

    def test_large(self) -> None:
        result = self.check("--scenarios", "k200,m4", "--seconds", "0.5")
        for name, found in result["scenarios"].items():
            self.assertGreater(found["pywebsock"]["bytes_a_message"], SCENARIOS[name].size)
            self.assertIn("mb_per_s", found["pywebsock"])

    def test_deflate(self) -> None:
        result = self.check("--scenarios", "deflate-k64", "--seconds", "0.5")
        self.assertLess(result["scenarios"]["deflate-k64"]["pywebsock"]["bytes_a_message"], 20_000)

    def test_tls(self) -> None:
        require(shutil.which("openssl"), "the openssl command")
        self.check("--scenarios", "tls", "--seconds", "0.5")

    def test_connect(self) -> None:
        require(shutil.which("openssl"), "the openssl command")
        self.check("--scenarios", "connect,tls-connect", "--seconds", "0.5")

    def test_idle(self) -> None:
        result = self.check("--scenarios", "idle,deflate-idle")
        require(sys.platform == "linux", "the memory of a process")
        self.assertGreater(result["scenarios"]["idle"]["pywebsock"]["kib_a_client_busy"], 0)

    def test_others(self) -> None:
        """The other servers support their scenarios."""
        require(shutil.which("openssl"), "the openssl command")
        run = benchmark("--json", "--scenarios", "tls-connect,deflate-k1")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        for scenario in json.loads(run.stdout)["scenarios"].values():
            for name, found in scenario.items():
                with self.subTest(name):
                    self.assertEqual((found.get("error"), found.get("failures"), found.get("lost")), (None, [], 0))

    def test_table(self) -> None:
        run = benchmark("--scenarios", "pair", "--servers", "pywebsock")
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertRegex(run.stdout, r"(?m)^pywebsock +(>= )?[\d,]+ ")

    def test_usage(self) -> None:
        self.assertEqual(benchmark("--scenarios", "most").returncode, 2)
        self.assertEqual(benchmark("--seconds", "60").returncode, 2)

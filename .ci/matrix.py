"""The long tests: with other Pythons, browsers, Redis, other clients and servers, and the stress tests.

.ci/run calls it with a folder for its installations, which has a venv with the packages for development. Packages of
Debian stay installed. Steps that measure no time run side by side. The last line is `N passed, N failed`, and the exit
status is 0 if no test failed. When it is interrupted, it ends all its processes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEBIAN = (
    *("apache2-bin", "caddy", "chromium", "chromium-driver", "curl", "debootstrap", "default-jdk-headless"),
    *("firefox-esr", "fonts-inter", "fonts-noto-color-emoji", "gcc", "haproxy", "iproute2", "libmojolicious-perl"),
    *("libnetty-java", "libwebsockets-dev", "lighttpd", "nginx", "openssl", "redis-server", "systemd", "varnish"),
    *("webkit2gtk-driver", "xvfb"),
)
NODE = ("ws", "@oven/bun-linux-x64", "@deno/linux-x64-glibc", "axe-core", "chrome-aws-lambda@10.1.0")
UNITTEST = ("-m", "unittest")
NEWER = ("python3.14", "python3.15", "pypy3")  # Debian's next release has them
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST = 2400.0  # seconds that a step may take
TIDY_UP = 5.0  # seconds from SIGTERM to SIGKILL

# Exits with 0 in another CPython that is new enough.
OTHER = """import platform, sys
sys.exit(sys.version_info < (3, 9) or platform.python_implementation() != "CPython" or sys.version == sys.argv[1])"""


def say(text: str) -> None:
    """Print text at once."""
    print(text, end="", flush=True)


class Step:
    """A command, its output, and the numbers of its tests that pass and fail."""

    def __init__(self, name: str, *command: object, strict: bool = False, more: dict[str, str] | None = None) -> None:
        self.name = name
        self.command = [str(part) for part in command]
        self.passed = self.failed = 0
        self.seconds = 0.0
        self._strict = strict  # a skipped test fails
        self._environment = {**os.environ, **(more or {})}
        self._said: list[str] = []

    def start(self) -> None:
        """Start the command; it ends by itself, or with `end`."""
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children are ended with it
        )

    def follow(self, *, alone: bool) -> None:
        """Show the output at once, or at the end if other steps run; then count the tests."""
        head = f"\n==== {self.name}: {' '.join(self.command)}\n"
        say(head if alone else "")
        watch = threading.Timer(LONGEST, self.end)
        watch.start()
        assert self._process.stdout
        while data := os.read(self._process.stdout.fileno(), 1 << 16):
            self._said.append(data.decode(errors="replace"))
            say(self._said[-1] if alone else "")
        watch.cancel()
        status = self._process.wait()
        self._count(status)
        self.seconds = time.monotonic() - self._start
        tail = f"---- {self.name}: {self.passed} passed, {self.failed} failed, {self.seconds:.0f} s, status {status}\n"
        say(tail if alone else head + "".join(self._said) + tail)

    def _count(self, status: int) -> None:
        """Count the tests, or the step itself if it has none."""
        text = "".join(self._said)
        ran = re.findall(r"^Ran (\d+) tests? in ", text, re.MULTILINE)
        ends = ", ".join(re.findall(r"^(?:OK|FAILED) \((.*)\)$", text, re.MULTILINE))  # failures=1, skipped=2
        counts = {name: int(count) for name, count in re.findall(r"(\w[\w ]*)=(\d+)", ends)}
        bad = sum(counts.get(name, 0) for name in ("failures", "errors", "unexpected successes"))
        skipped = counts.get("skipped", 0)
        self.passed = max(0, sum(map(int, ran)) - bad - skipped) if ran else int(status == 0)
        self.failed = max(bad + self._strict * skipped, int(status != 0 or not self.passed))

    def end(self) -> None:
        """End its processes, if it runs."""
        if self._process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(TIDY_UP)


class Run:
    """All steps, and the running ones."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._steps: list[Step] = []  # steps that have started
        self._lock = threading.Lock()  # held while a step starts

    def __enter__(self) -> Run:
        for number in SIGNALS:
            signal.signal(number, self._interrupt)
        return self

    def _interrupt(self, number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # no second signal interrupts the end
        self._lock.acquire()  # no other step starts
        for step in self._steps:
            step.end()

    def alone(self, step: Step) -> None:
        """Run a step, and show at once what it prints."""
        self._follow([step], alone=True)

    def side_by_side(self, *steps: Step) -> None:
        """Run two of these at the same time until all have ended. They begin in this order."""
        left = list(steps)
        threads = [threading.Thread(target=self._follow, args=(left,), daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _follow(self, left: list[Step], *, alone: bool = False) -> None:
        while True:
            with self._lock:
                if not left:
                    return
                step = left.pop(0)
                say(f"\n==== {time.monotonic() - self._start:.0f} s: {step.name} begins\n")
                step.start()
                self._steps.append(step)
            step.follow(alone=alone)

    def report(self) -> int:
        """Print the times and the sums; return the exit status."""
        say("\n")
        for step in self._steps:
            say(f"{step.seconds:6.0f} s {step.passed:5} passed {step.failed:3} failed  {step.name}\n")
        passed, failed = sum(step.passed for step in self._steps), sum(step.failed for step in self._steps)
        say(f"{time.monotonic() - self._start:6.0f} s in all\n{passed} passed, {failed} failed\n")
        return int(failed > 0)


def other_pythons() -> list[Step]:
    """Return steps that run `python -m unittest` with each other CPython of pyenv, from 3.9 on."""
    if not shutil.which("pyenv"):
        return []
    root = subprocess.run(["pyenv", "root"], check=True, capture_output=True, text=True).stdout.strip()
    pythons = sorted(pathlib.Path(root).glob("versions/*/bin/python"))
    good = [each for each in pythons if subprocess.run([each, "-c", OTHER, sys.version], check=False).returncode == 0]
    return [Step(each.parts[-3], each, *UNITTEST) for each in good]


def newer_pythons(root: str) -> tuple[list[Step], list[Step]]:
    """Return steps with Pythons of another system: `python -m unittest`, and the stress test of the order.

    Warnings are errors, also in the processes of the tests. The checkout is mounted at /mnt of that system; the mounts
    end with the process.
    """
    mount = 'mount --bind . "$0/mnt" && mount -t proc proc "$0/proc"'
    inside = ("unshare", "--mount", "bash", "-c", f'{mount} && exec chroot "$0" env -C /mnt "$@"', root)
    error = {"PYTHONWARNINGS": "error"}
    minute = {**error, "PYWEBSOCK_TESTS": "everything", "PYWEBSOCK_STRESS": "60"}  # seconds
    tests, stress = [], []
    for name in NEWER:
        command = (*inside, f"/usr/bin/{name}", "-W", "error", *UNITTEST)
        tests.append(Step(name, *command, more=error))
        stress.append(Step(f"{name} in order", *command, "tests.stress.test_order", strict=True, more=minute))
    return tests, stress


def shell(name: str, *commands: str, **more: str) -> Step:
    """Return a step that runs commands, up to the first that fails."""
    return Step(name, "bash", "-c", " && ".join(commands), more=more)


def debian() -> Step:
    """Return a step that installs missing packages. In runlevel 1, no service starts: the tests start their own."""
    query = ["dpkg-query", "-Wf", "${Package} ${db:Status-Status}\n", *DEBIAN]
    there = subprocess.run(query, check=False, capture_output=True, text=True).stdout.splitlines()
    missing = [package for package in DEBIAN if f"{package} installed" not in there]
    install = f"apt-get install -qq -y --no-install-recommends {' '.join(missing)} >/dev/null"
    commands = ("apt-get update -qq", install) if missing else ("true",)
    return shell("debian", *commands, RUNLEVEL="1", DEBIAN_FRONTEND="noninteractive")


def run_all(run: Run, folder: str) -> None:
    """Every step there is."""
    npm = ("npm", "install", "--prefix", f"{folder}/node", "--silent", "--no-audit", "--no-fund")
    run.side_by_side(debian(), Step("node", *npm, *NODE))

    root = f"{folder}/root"
    pythons = f"debootstrap --variant=minbase --include=openssl,{','.join(NEWER)} testing {root} >/dev/null"
    newer, in_order = newer_pythons(root)
    tests = all_tests(folder)
    stress = tests.pop("stress")
    run.side_by_side(
        shell("pythons", f"unshare --mount {pythons}"),  # its mounts end with its process
        Step("autobahn", ".ci/autobahn.sh", f"{folder}/autobahn"),
        *tests.values(),
        Step("windows", ".ci/windows.sh", f"{folder}/windows"),
        *other_pythons(),
        *newer,
        *in_order,
    )
    run.alone(stress)


def all_tests(folder: str) -> dict[str, Step]:
    """The tests with all that is installed now, by name, those that take longest first."""
    everything = {
        "PYWEBSOCK_TESTS": "everything",
        "PYWEBSOCK_NODE_MODULES": f"{folder}/node/node_modules",
        "PYWEBSOCK_WSTEST": f"{folder}/autobahn/wst/bin/wstest",
    }
    modules: dict[str, list[str]] = {"pages": [], "program": []}
    for path in sorted(ROOT.glob("tests/*/test_*.py")):
        name = "pages" if path.stem.startswith("test_page") else path.parent.name
        modules.setdefault(name, []).append(f"tests.{path.parent.name}.{path.stem}")
    command = (sys.executable, *UNITTEST)
    steps = {name: Step(name, *command, *modules[name], strict=True, more=everything) for name in modules}
    # Redis is Debian's in these tests; once more on Valkey, whose build from PyPI has no TLS.
    redis = [name for name in modules["program"] if "test_redis" in name]
    server = next(pathlib.Path(folder).glob("venv/**/valkey-server"), "valkey-server")
    return {**steps, "valkey": Step("valkey", *command, *redis, more={"REDIS_SERVER": str(server)})}


def main(folder: str) -> int:
    """Run all steps, and return the exit status."""
    with Run() as run:
        say(f"Python {platform.python_version()}, {os.cpu_count()} processors\n")
        run_all(run, folder)
        return run.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

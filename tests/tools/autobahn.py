"""The Autobahn test suite for WebSocket servers: `python -m tests.tools.autobahn [CASE ...]`.

It runs the given cases, such as `6.*` or `12.1.5`, or all 517 (12 minutes), against a server with default settings.
The exit status is 0 if every case has run and is OK or INFORMATIONAL. `.ci/autobahn.sh FOLDER` installs the suite,
which needs Python 2.7; $PYWEBSOCK_WSTEST is the path of the program, FOLDER/wst/bin/wstest.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import typing

from tests.tools.support import Process

GOOD = ("OK", "INFORMATIONAL")


def find() -> str | None:
    """Return the path of wstest."""
    path = os.environ.get("PYWEBSOCK_WSTEST", "")
    return path if os.access(path, os.X_OK) and not os.path.isdir(path) else None


class Results:
    """The results of a run of the suite."""

    def __init__(self, selected: typing.Sequence[str], index: dict[str, typing.Any], folder: pathlib.Path) -> None:
        self.selected = selected
        self._index = index  # behaviour of the server by case, in general and in closing
        self._folder = folder
        self.missing = [case for case in selected if case not in index]

    def details(self, case: str) -> dict[str, typing.Any]:
        """Return the report of one case."""
        details: dict[str, typing.Any] = json.loads((self._folder / self._index[case]["reportfile"]).read_text())
        return details

    def bad(self) -> list[str]:
        """Return a line for each case that did not run or is not OK."""
        lines = [f"{case}: did not run" for case in self.missing]
        for case, result in self._index.items():
            if result["behavior"] not in GOOD or result["behaviorClose"] not in GOOD:
                lines.append(f"{case}: {result['behavior']}, closing {result['behaviorClose']}; " + self._why(case))
        return lines

    def _why(self, case: str) -> str:
        details = self.details(case)
        return f"{details['result']} {details['resultClose']}"

    def __str__(self) -> str:
        behaviors = collections.Counter(result["behavior"] for result in self._index.values())
        counts = ", ".join(f"{count} {behavior}" for behavior, count in sorted(behaviors.items()))
        return f"{len(self._index)} of {len(self.selected)} cases ran: {counts}"


def run(wstest: str, port: int, cases: typing.Sequence[str], folder: pathlib.Path, deadline: float) -> Results:
    """Run cases against a server; write the reports to a folder. Raises AssertionError if the suite itself fails."""
    specification = {
        "outdir": str(folder),
        "servers": [{"agent": "pywebsock", "url": f"ws://127.0.0.1:{port}"}],
        "cases": list(cases),
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    (folder / "specification.json").write_text(json.dumps(specification))
    log = folder / "wstest.log"
    command = [wstest, "-m", "fuzzingclient", "-s", str(folder / "specification.json")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        ended = wait(process, log, deadline)
    text = log.read_text(errors="replace")
    found = re.search(r"^Cases = (\[.*\])$", text, re.MULTILINE)
    selected = re.findall("'([0-9.]+)'", found[1]) if found else []
    index = folder / "index.json"
    if not (ended and selected and index.exists()):
        raise AssertionError(f"the suite did not run to its end; its log ends with\n{text[-2000:]}")
    return Results(selected, json.loads(index.read_text())["pywebsock"], folder)


def wait(process: subprocess.Popen[bytes], log: pathlib.Path, deadline: float) -> bool:
    """Return whether the suite has ended within the deadline; if no case is selected, it never ends by itself."""
    end = time.monotonic() + deadline
    try:
        while process.poll() is None:
            with log.open("rb") as file:
                idle = b"will run 0 test cases" in file.read(4096)
            if idle or time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its own process group
            process.wait()


def main(cases: typing.Sequence[str]) -> int:
    """Run cases, print those that fail, and return the exit status."""
    wstest = find()
    if not wstest:
        print("PYWEBSOCK_WSTEST does not name the program wstest", file=sys.stderr)
        return 2
    folder = pathlib.Path(tempfile.mkdtemp(prefix="autobahn-"))
    try:
        with Process("--quiet") as server:
            results = run(wstest, server.port, cases or ["*"], folder, 3600.0)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 2
    for line in results.bad():
        print(line)
    print(f"{results}; the reports are in {folder}")
    return 1 if results.bad() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The speed of this server and of others, on your machine: `python -m tests.tools.benchmark`.

It starts this server and the other servers that it finds (packages of this Python: websockets, picows, aiohttp,
websocket-server; node with ws, in $NODE_PATH or $PYWEBSOCK_NODE_MODULES; bun), one after the other, in rounds, so
that a change of the machine's speed affects all. Each server broadcasts messages to all clients, including the
sender. A sender has a fixed number of messages in flight, and sends the next when a message has come back. Figures
are medians of the rounds; ratios are taken within each round.

Without arguments, it is quick. `--scenarios` takes names and groups: more clients, large messages, TLS, compression,
handshakes, idle clients. Servers that do not support a scenario are left out. All messages are text. TLS is version
1.3, with a new certificate of the openssl command. Clients offer compression as browsers do.

The load (tests/tools/benchmark_load.py) runs in its own processes, on other processors than the server if the system
allows it. The columns `server` and `load` show whether the load was the limit: they are the parts of their processors
that server and load used. If the load used 90 % or more and the server did not, the figure has a `>=`. `its code` is
the part that the load's Python code used, without the kernel: a faster load could save no more. `(bare loop)`, if there
is a C compiler, is a loop of recv(2) and send(2): if one client sends at a time, no server can be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import typing
import unittest

import pywebsock
from tests.tools import load, support
from tests.tools.peers import JOINING, OURS, Server, ending, in_c, on_javascript, on_python, pinned, serving

DEADLINE = 60.0  # seconds of a run besides the measurement
BUSY = 0.9  # part of a processor from which the load counts as the limit
BAR = 8  # characters
MANY = 50  # clients; with fewer, memory is not measurable

Round = dict[str, typing.Any]  # figures of one server in one scenario


class Kind(typing.NamedTuple):
    """A kind of measurement."""

    heading: str
    figure: str  # name of its figure in a Round
    load: str  # name of the load
    title: str  # of a scenario
    most_first: bool = True


ROOM = "{clients} clients, {senders} sending {amount}, {window} in flight for each sender"
SMALL = Kind("deliveries/s", "deliveries_per_s", "room", ROOM)
LARGE = Kind("MB/s", "mb_per_s", "room", ROOM)
VISITS = Kind("handshakes/s", "deliveries_per_s", "visits", "{clients} clients come, go and come again")
IDLE = Kind("KiB after", "kib_a_client_busy", "idle", "{clients} clients that get one message of {amount}", False)


class Scenario(typing.NamedTuple):
    """Numbers of clients, senders and bytes."""

    clients: int
    senders: int
    window: int  # messages in flight, for each sender
    size: int = 64  # bytes of a message
    kind: Kind = SMALL
    tls: bool = False
    deflate: bool = False  # JSON with permessage-deflate

    @property
    def title(self) -> str:
        """A line that describes the scenario."""
        units = ((1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))
        unit, name = next(unit for unit in units if not self.size % unit[0])
        amount = f"{self.size // unit:,} {name}{' of JSON' if self.deflate else ''}"
        more = ", TLS" * self.tls + ", permessage-deflate" * self.deflate
        return self.kind.title.format(**self._asdict(), amount=amount) + more


KIB, MIB = 1 << 10, 1 << 20
GROUPS = {
    "quick": {
        "pair": Scenario(2, 1, 1),
        "fan100": Scenario(100, 1, 1),
        "chat100": Scenario(100, 100, 1),
        "burst100": Scenario(100, 100, 16),
    },
    "more": {
        "duo10": Scenario(10, 10, 1),
        "stream100": Scenario(100, 1, 64),
        "fan1000": Scenario(1000, 1, 1),
        "chat1000": Scenario(1000, 1000, 1),
    },
    "large": {
        "k64": Scenario(20, 2, 2, 64 * KIB, LARGE),
        "k200": Scenario(50, 5, 2, 200_000, LARGE),
        "m1": Scenario(10, 1, 2, MIB, LARGE),
        "m4": Scenario(5, 1, 2, 4 * MIB, LARGE),
        "fan-k64": Scenario(20, 1, 4, 64 * KIB, LARGE),
        "fan-m1": Scenario(20, 1, 2, MIB, LARGE),
    },
    "tls": {
        "tls-chat100": Scenario(100, 100, 1, tls=True),
        "tls-fan100": Scenario(100, 1, 1, tls=True),
        "tls-k64": Scenario(20, 2, 2, 64 * KIB, LARGE, tls=True),
        "tls-m1": Scenario(20, 1, 2, MIB, LARGE, tls=True),
    },
    "deflate": {
        "deflate-k1": Scenario(100, 1, 2, KIB, deflate=True),
        "deflate-k64": Scenario(100, 1, 2, 64 * KIB, LARGE, deflate=True),
    },
    "clients": {
        "connect": Scenario(50, 50, 1, kind=VISITS),
        "tls-connect": Scenario(50, 50, 1, kind=VISITS, tls=True),
        "idle": Scenario(500, 1, 1, kind=IDLE),
        "tls-idle": Scenario(500, 1, 1, kind=IDLE, tls=True),
        "deflate-idle": Scenario(500, 1, 1, 2 * KIB, IDLE, deflate=True),
    },
}
SCENARIOS = {name: scenario for group in GROUPS.values() for name, scenario in group.items()}


# ---- what it depends on ----


def processor() -> str:
    """Return the name of the processor, or ""."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()


def cores() -> tuple[list[int], list[int]]:
    """Return the processors of the server and of the load; empty if the system cannot pin processes."""
    usable = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    return (usable[:1], usable[1:4]) if len(usable) > 1 else ([], [])


def conditions(options: argparse.Namespace, servers: typing.Sequence[Server]) -> dict[str, typing.Any]:
    """Return a line about machine and versions."""
    server, loads = cores()
    apart = f"the server on processor {server[0]}, the load on {', '.join(map(str, loads))}" if server else "not pinned"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
    runs = len(servers) * len(options.scenarios) * options.rounds
    minutes = runs * (options.seconds + warming(options.seconds) + 1) / 60
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": f"{os.cpu_count()} of {processor()}; {apart}",
        "others": f"{busy:.1f} processes wanted to run before" if busy >= 0 else "unknown",
        "servers": {server.name: server.version for server in servers},
        "rounds": f"{options.rounds} of {options.seconds:g} s, about {minutes:.0f} minutes in all",
    }


# ---- one run ----


def warming(seconds: float) -> float:
    """Return the time to run before a measurement of this length (seconds)."""
    return min(1.0, seconds / 2)


def resident(pid: int) -> float:
    """Return the resident memory of a process (KiB), or 0 if the system does not tell."""
    with contextlib.suppress(OSError):
        return load.memory(pid) * 1e6 / 1024
    return 0.0


def spent(pid: int) -> float:
    """Return the CPU time of a process (seconds), or 0 if the system does not tell."""
    with contextlib.suppress(OSError):
        return load.cpu(pid)
    return 0.0


class Loads:
    """The processes of the load, which read and print lines."""

    def __init__(self, stack: contextlib.ExitStack, settings: dict[str, typing.Any], deadline: float) -> None:
        where = cores()[1]
        number = min(max(len(where), 1), settings["clients"])
        self._processes = []
        for first in range(number):
            arguments = json.dumps({**settings, "first": first, "step": number})
            command = [sys.executable, "-m", "tests.tools.benchmark_load", arguments]
            with pinned(where[first : first + 1]):
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=support.ROOT
                )
            stack.enter_context(ending(process, deadline))
            self._processes.append(process)

    def say(self, line: str) -> None:
        """Send a line to all processes."""
        for process in self._processes:
            assert process.stdin
            print(line, file=process.stdin, flush=True)

    def hear(self) -> list[str]:
        """Read a line from each process."""
        lines = [process.stdout.readline() for process in self._processes if process.stdout]
        for line in lines:
            if not line or line.startswith("error"):
                raise RuntimeError(f"the load has ended early: {line.strip()}")
        return lines


def measure(server: Server, scenario: Scenario, options: argparse.Namespace) -> Round:
    """Measure one run of a server."""
    settings = {**scenario._asdict(), "kind": scenario.kind.load, "seconds": options.seconds}
    settings["warm"] = warming(options.seconds)
    deadline = DEADLINE + 2 * options.seconds
    with contextlib.ExitStack() as stack:
        certificate = options.certificate if scenario.tls else ""
        pid, port = stack.enter_context(serving(server, cores()[0], deadline, scenario.deflate, certificate))
        memory = [resident(pid)]
        loads = Loads(stack, {**settings, "port": port}, deadline)
        loads.hear()  # ready
        time.sleep(JOINING)
        memory.append(resident(pid))
        start, used = time.monotonic(), spent(pid)
        loads.say("go")
        total = sum(int(line.split()[1]) for line in loads.hear())
        server_busy = (spent(pid) - used) / (time.monotonic() - start)
        loads.say(f"total {total}")
        found = [json.loads(line) for line in loads.hear()]
        memory.append(resident(pid))
        loads.say("end")
    idle, busy = ((each - memory[0]) / scenario.clients for each in memory[1:])
    own = {"kib_a_client": idle, "kib_a_client_busy": busy, "server": server_busy}
    return {**figures(found, scenario.size), **own}


def figures(found: list[dict[str, typing.Any]], size: int) -> Round:
    """Combine the figures of the processes of the load."""
    delays = sorted(delay for each in found for delay in each["delays"])
    orders = {order for each in found for order in each["orders"]}
    rate = sum(each["deliveries_per_s"] for each in found)
    return {
        "deliveries_per_s": rate,
        "mb_per_s": rate * size / 1e6,
        "p50_ms": delays[len(delays) // 2] / 1000 if delays else 0.0,
        "p99_ms": delays[len(delays) * 99 // 100] / 1000 if delays else 0.0,
        "lost": sum(each["lost"] for each in found),
        "bytes_a_message": statistics.median(each["bytes_a_message"] for each in found),
        "order": "same" if len(orders) <= 1 and not any(each["gaps"] for each in found) else "differs",
        "load": max(each["busy"] for each in found),
        "load_code": max(each["own"] for each in found),
        "failures": [failure for each in found for failure in each["failures"]],
    }


# ---- all runs, and what they show ----


def run_rounds(
    servers: typing.Sequence[Server], scenario: Scenario, options: argparse.Namespace, say: typing.Callable[[str], None]
) -> dict[str, list[Round]]:
    """Run the rounds of one scenario; return them by server. A round that fails is {"error": ...}."""
    rounds: dict[str, list[Round]] = {server.name: [] for server in servers}
    for number in range(options.rounds):
        for server in servers:
            say(f"round {number + 1} of {options.rounds}: {server.name}")
            try:
                rounds[server.name].append(measure(server, scenario, options))
            except (OSError, RuntimeError, ValueError) as error:
                rounds[server.name].append({"error": str(error)})
    return rounds


def summary(rounds: list[Round], ours: list[Round], figure: str) -> Round:
    """Return the medians of a server's rounds, and the median ratio of this server's figure to its figure."""
    good = [each for each in rounds if "error" not in each]
    if not good:
        return {"error": rounds[0]["error"]}
    names = (
        "deliveries_per_s",
        "mb_per_s",
        "p50_ms",
        "p99_ms",
        "kib_a_client",
        "kib_a_client_busy",
        "server",
        "load",
        "load_code",
        "bytes_a_message",
    )
    medians: Round = {name: round(statistics.median(each[name] for each in good), 3) for name in names}
    pairs = [(own.get(figure), each.get(figure)) for own, each in zip(ours, rounds)]
    ratios = [own / each for own, each in pairs if own and each]
    medians["ours_to_this"] = round(statistics.median(ratios), 3) if ratios else None
    medians["lost"] = sum(each["lost"] for each in good)
    medians["order"] = "same" if all(each["order"] == "same" for each in good) else "differs"
    medians["failures"] = [each["error"] for each in rounds if "error" in each]
    medians["failures"] += [failure for each in good for failure in each["failures"]]
    medians["rounds"] = rounds
    return medians


def bar(part: float) -> str:
    """Return a bar of at most BAR characters."""
    eighths = round(part * BAR * 8)
    drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    try:
        drawn.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        drawn = "#" * round(part * BAR)
    return f"{drawn:{BAR}}"


WIDTHS = {  # of the columns; negative if aligned to the left
    "": -16,
    "figure": 13,  # the heading of the scenario's kind
    " ": -BAR,
    "ours/this": 9,
    "p50 ms": 7,
    "p99 ms": 7,
    "KiB/client": 10,
    "bytes": 9,
    "lost": 4,
    "order": -7,
    "server": 6,
    "load": 4,
    "its code": 8,
}


def line(cells: typing.Iterable[object]) -> str:
    """Return a line of a table."""
    return " ".join(f"{cell!s:{'<' if width < 0 else '>'}{abs(width)}}" for cell, width in zip(cells, WIDTHS.values()))


def shown(number: float) -> str:
    """Return a figure as a short text."""
    return f"{number:,.{0 if number >= 100 else 1}f}"


def row(server: str, each: Round, most: float, scenario: Scenario) -> str:
    """Return the line of a server."""
    limited = each["load"] >= BUSY > each["server"]
    figure = each[scenario.kind.figure]
    return line(
        (
            server,
            (">= " if limited else "") + shown(figure),
            bar(max(0.0, figure) / most if most else 0.0),
            "" if server == OURS or not each["ours_to_this"] else f"{each['ours_to_this']:.2f}",
            *(f"{each[name]:.2f}" if each[name] else "" for name in ("p50_ms", "p99_ms")),
            shown(each["kib_a_client"]) if scenario.clients >= MANY and scenario.kind != VISITS else "",
            f"{each['bytes_a_message']:,.0f}" if each["bytes_a_message"] else "",
            each["lost"],
            each["order"],
            *(f"{each[name]:.0%}" for name in ("server", "load", "load_code")),
        )
    )


def show(name: str, scenario: Scenario, found: dict[str, Round]) -> None:
    """Print the table of a scenario, the best server first."""
    print(f"\n{name}: {scenario.title}")
    print(line(scenario.kind.heading if name == "figure" else name for name in WIDTHS))
    good = {server: each for server, each in found.items() if "error" not in each}
    figure, most_first = scenario.kind.figure, scenario.kind.most_first
    most = max((each[figure] for each in good.values()), default=0.0)
    for server, each in sorted(good.items(), key=lambda item: float(item[1][figure]), reverse=most_first):
        print(row(server, each, most, scenario))
    for server, each in found.items():
        for failure in [each["error"]] if "error" in each else sorted(set(each["failures"])):
            print(line((server, failure)))


EXPLANATION = """
deliveries/s: messages that clients have got, all together. MB/s: the same in bytes, before compression. handshakes/s:
of clients that leave when they have joined, and join again. KiB after: by which the server has grown for each client
when all have got a message; the least is the best. ours/this: this server's figure divided by that one's. p50, p99:
from sending to getting, or from connecting to having joined. KiB/client: by which the server grew when the clients had
joined, before messages. bytes: of a message when it gets to a client. lost, order: whether each client got every
message, and all in one order. server, load: parts of a processor that they used; its code: the load's own, without the
kernel. With >= the load was the limit: the server does at least this."""


def parse(argv: typing.Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.benchmark", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    groups = "; ".join(f"{group} ({', '.join(scenarios)})" for group, scenarios in GROUPS.items())
    add("--scenarios", default="quick", help=f"such as m1,tls; names and groups of {groups}; or all (%(default)s)")
    add("--servers", default="", help=f"such as {OURS},bun; all that are found without this")
    add("--rounds", type=int, default=3, choices=range(1, 100), metavar="N", help="rounds (%(default)s)")
    add("--seconds", type=float, default=2.0, help="that each run measures, up to 10 (%(default)s)")
    add("--compressed", action="store_true", help="2 KiB of JSON with permessage-deflate, instead of other messages")
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    known = {"all": SCENARIOS, **GROUPS, **{name: {name: scenario} for name, scenario in SCENARIOS.items()}}
    names = options.scenarios.split(",")
    if not set(names) <= set(known):
        parser.error(f"the scenarios are {groups}; or all")
    options.scenarios = {name: scenario for each in names for name, scenario in known[each].items()}
    if options.compressed:
        changes = {"size": 2 * KIB, "deflate": True}
        options.scenarios = {name: each._replace(**changes) for name, each in options.scenarios.items()}
    if not 0 < options.seconds <= 10:  # the load does not answer Pings, which come after 20 seconds
        parser.error("--seconds must be up to 10")
    return options


def main(argv: typing.Sequence[str] | None = None) -> int:
    """Measure, print the tables, and return the exit status."""
    options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the exception ends all child processes
    pywebsock.raise_file_limit()  # of all child processes
    with tempfile.TemporaryDirectory() as folder:
        servers = [*on_python(), *on_javascript(), *in_c(folder)]
        servers = [each for each in servers if not options.servers or each.name in options.servers.split(",")]
        if not servers:
            sys.exit("there is no such server")
        options.certificate = ""
        if any(scenario.tls for scenario in options.scenarios.values()):
            try:
                options.certificate = support.certificate(folder)[0]
            except unittest.SkipTest as missing:
                sys.exit(str(missing))
        measure_all(servers, options)
    return 0


def measure_all(servers: typing.Sequence[Server], options: argparse.Namespace) -> None:
    """Measure the servers in the scenarios that they support, and print the tables."""
    titles = {name: scenario.title for name, scenario in options.scenarios.items()}
    result: dict[str, typing.Any] = {"conditions": conditions(options, servers), "titles": titles, "scenarios": {}}
    if not options.json:
        for name, value in result["conditions"].items():
            print(
                f"{name:11}",
                value if isinstance(value, str) else "; ".join(" ".join(item).strip() for item in value.items()),
            )
    for name, scenario in options.scenarios.items():

        def say(what: str, name: str = name) -> None:
            if sys.stderr.isatty():
                print(f"\r\033[K{name}, {what}" if what else "\r\033[K", end="", file=sys.stderr, flush=True)

        able = [each for each in servers if each.can(scenario.deflate, scenario.tls)]
        rounds = run_rounds(able, scenario, options, say)
        say("")
        figure, ours = scenario.kind.figure, rounds.get(OURS, [])
        result["scenarios"][name] = {server: summary(each, ours, figure) for server, each in rounds.items()}
        if not options.json:
            show(name, scenario, result["scenarios"][name])
            sys.stdout.flush()
    print(json.dumps(result, indent=2) if options.json else EXPLANATION)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

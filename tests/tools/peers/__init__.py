"""Broadcast servers of a few lines each, for the benchmark, and functions that find and start them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing

import pywebsock
from tests.tools import support

HERE = pathlib.Path(__file__).resolve().parent
OURS = "pywebsock"
BARE = "(bare loop)"
JOINING = 0.2  # seconds; some servers add a client only after its handshake


class Server(typing.NamedTuple):
    """A server to measure."""

    name: str
    version: str
    command: typing.Sequence[str]  # with {port} in place of the port
    deflating: typing.Sequence[str] | None = ("deflate",)  # arguments for compression; None if it is not supported
    secure: typing.Sequence[str] | None = ("{certificate}",)

    def can(self, deflate: bool, tls: bool) -> bool:
        """Return whether the server supports compression and TLS, if they are required."""
        return (self.deflating is not None or not deflate) and (self.secure is not None or not tls)


def on_python() -> typing.Iterator[Server]:
    """Return this server and the servers that use packages of this Python."""
    script = str(HERE / "servers.py")
    ours = [sys.executable, str(support.ROOT / "pywebsock.py"), "--port", "{port}", "--quiet"]
    yield Server(OURS, pywebsock.__version__, ours, (), ("--cert", "{certificate}"))
    for package in ("websockets", "picows", "aiohttp", "websocket-server"):
        module = package.replace("-", "_")
        if importlib.util.find_spec(module):
            version = importlib.metadata.version(package)
            if package == "picows" and importlib.util.find_spec("uvloop"):
                version += ", uvloop " + importlib.metadata.version("uvloop")
            server = Server(package, version, [sys.executable, script, module, "{port}"])
            server = server._replace(deflating=None) if package in ("picows", "websocket-server") else server
            yield server._replace(secure=None) if package == "websocket-server" else server


def on_javascript() -> typing.Iterator[Server]:
    """Return the servers in JavaScript."""
    names = [os.environ.get("PYWEBSOCK_NODE_MODULES", ""), *os.environ.get("NODE_PATH", "").split(os.pathsep)]
    folders = [pathlib.Path(name) for name in names if name]
    node = shutil.which("node")
    packages = [folder for folder in folders if (folder / "ws" / "package.json").exists()]
    if node and packages:
        version = json.loads((packages[0] / "ws" / "package.json").read_text())["version"]
        command = [node, str(HERE / "node.mjs"), str(packages[0]), "{port}"]
        yield Server("ws", f"{version}, node {said_by(node)}", command)
    buns = [str(path) for folder in folders for path in folder.glob("@oven/bun-*/bin/bun")]
    bun = shutil.which("bun") or (buns or [""])[0]
    if bun:
        yield Server("bun", said_by(bun), [bun, str(HERE / "bun.mjs"), "{port}"])


def in_c(folder: str) -> typing.Iterator[Server]:
    """Return a loop of recv(2) and send(2), if there is a compiler; the program is written to this folder."""
    compiler = shutil.which("cc")
    if compiler and sys.platform == "linux":
        program = os.path.join(folder, "loop")
        command = [compiler, "-O3", "-o", program, str(HERE / "loop.c")]
        subprocess.run(command, timeout=support.DEADLINE, check=True)
        yield Server(BARE, "", [program, "{port}"], secure=None)


def said_by(program: str) -> str:
    """Return the version that a program prints."""
    output = subprocess.run(
        [program, "--version"], capture_output=True, text=True, timeout=support.DEADLINE, check=True
    )
    return output.stdout.strip().lstrip("v")


@contextlib.contextmanager
def pinned(where: typing.Sequence[int]) -> typing.Iterator[None]:
    """Run the processes that are started in the block on these processors."""
    if sys.platform != "linux" or not where:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, where)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def ending(process: subprocess.Popen[typing.Any], deadline: float) -> typing.Iterator[None]:
    """Terminate a process at the end of the block; kill it after the deadline."""
    watchdog = threading.Timer(deadline, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def serving(
    server: Server, where: typing.Sequence[int], deadline: float, deflate: bool, certificate: str
) -> typing.Iterator[tuple[int, int]]:
    """Run a server, with TLS if there is a certificate; yield its process id and port when it accepts connections."""
    port = support.free_port()
    command = [*server.command]
    if deflate:
        command += server.deflating or ()
    if certificate:
        command += server.secure or ()
    command = [part.replace("{port}", str(port)).replace("{certificate}", certificate) for part in command]
    with tempfile.TemporaryFile() as log:
        with pinned(where):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        with ending(process, deadline):
            end = time.monotonic() + support.DEADLINE
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{server.name} did not start: {log.read()[-500:].decode(errors='replace')}")
                time.sleep(0.02)
            time.sleep(JOINING)
            yield process.pid, port

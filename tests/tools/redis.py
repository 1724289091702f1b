"""A Redis for tests, servers that share a stream in it, and a proxy between them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.support import (
    COMPILED,
    DEADLINE,
    EVERYTHING,
    ROOT,
    TEXT,
    Client,
    Process,
    Recorder,
    ServerTestCase,
    free_port,
    masked_frame,
    require,
)

Message = typing.Union[str, bytes]


class Redis:
    """A redis-server in its own process, on a free port, which keeps its data through a crash."""

    def __init__(self, *options: str) -> None:
        program = os.environ.get("REDIS_SERVER", "redis-server" if EVERYTHING else "")  # or valkey-server
        if not program:
            raise unittest.SkipTest("takes half a minute: PYWEBSOCK_TESTS=everything or REDIS_SERVER=redis-server")
        found = shutil.which(program)
        require(found, program)
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        self._command = [str(found), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", self._folder.name]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", *options]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self, *options: str) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen([*self._command, *options], stdout=subprocess.PIPE)
        self.pid = self._process.pid
        assert self._process.stdout
        said = b""
        for line in self._process.stdout:
            said += line
            if b"eady to accept connections" in line:
                self._drain = threading.Thread(target=self._process.stdout.read, daemon=True)
                self._drain.start()
                return
        self.close()
        if b"TLS support" in said and not EVERYTHING:
            raise unittest.SkipTest(f"{self._command[0]} was built without TLS")
        raise AssertionError(f"{self._command[0]} did not start: {said.decode()}")

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait(DEADLINE)
        if self._process.stdout:
            with contextlib.suppress(AttributeError):
                self._drain.join(DEADLINE)
            self._process.stdout.close()

    def forget(self) -> None:
        """Delete its data, after its end."""
        self._folder.cleanup()
        os.mkdir(self._folder.name)

    def call(self, *words: str | int, database: int = 0) -> typing.Any:
        """Send a command and return the reply."""
        connection = pywebsock.RedisConnection(pywebsock.RedisAddress(f"{self.url}/{database}"))
        try:
            return connection.call(*words)
        finally:
            connection.close()

    def close(self) -> None:
        """Kill it and delete its data."""
        self.kill()
        self._folder.cleanup()


Deliver = typing.Callable[["list[tuple[int, bytes]]"], object]


class FakeServer(pywebsock.BroadcastServer):
    """The part of a server that a link uses."""

    def __init__(self, url: str, deliver: Deliver, history: int) -> None:
        self.redis, self.history = url, history
        self._hooks = pywebsock.Hooks()
        self._deliver = deliver

    def _take_from_link(self, messages: typing.Any) -> None:
        self._deliver(messages)


class Proxy:
    """A proxy between a server and Redis that cuts the connection that writes, or the one that reads.

    `cuts` has an item for each cut: the number of bytes to pass on before it. A number from 0 counts
    written bytes; a negative one, from -1, counts bytes for the reader. None cuts when the reply comes.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.cuts: list[int | None] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                drop = threading.Event()  # the direction back
                for work in ((near, far, drop, self._pass_on), (far, near, drop, self._pass_back)):
                    self._threads.append(threading.Thread(target=work[3], args=work[:3], daemon=True))
                    self._threads[-1].start()

    def _pass_on(self, near: socket.socket, far: socket.socket, drop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 20):
                if b"XADD" in data and self.cuts and (self.cuts[0] is None or self.cuts[0] >= 0):
                    cut = self.cuts.pop()
                    if cut is not None:
                        far.sendall(data[:cut])
                        break
                    drop.set()
                far.sendall(data)
        self._end(near, far)

    def _pass_back(self, far: socket.socket, near: socket.socket, drop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(1 << 20):
                if drop.is_set():
                    break
                if b":text" in data and self.cuts and self.cuts[0] is not None:
                    near.sendall(data[: min(-1 - (self.cuts.pop() or 0), len(data) - 1)])
                    break
                near.sendall(data)
        self._end(near, far)

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close all connections."""
        self._end(*self._sockets)
        for thread in self._threads:
            thread.join(DEADLINE)
        for each in self._sockets:
            each.close()


class RedisTestCase(ServerTestCase):
    """Tests with a Redis for each class of tests, and a stream for each test."""

    redis: Redis
    shared = True  # shared by the tests of a class
    options: tuple[str, ...] = ()

    @classmethod
    def setUpClass(cls) -> None:
        if cls.shared:
            cls.redis = Redis(*cls.options)
            cls.addClassCleanup(cls.redis.close)

    def setUp(self) -> None:
        self._clients: list[Client] = []
        self.stream = self.id().rpartition(".")[2]
        self.url = f"{self.redis.url}?stream={self.stream}"

    def process(self, *arguments: str, url: str = "") -> Process:
        """Start a server in its own process, in the room of this test."""
        process = Process("--redis", url or self.url, *arguments)
        self.addCleanup(process.__exit__)
        return process

    def stop(self, server: Process) -> str:
        """Close the clients of a server, stop it with SIGTERM, and return its log."""
        for client in self._clients:
            client.socket.close()
        self.assertEqual(server.stop(), 0)
        return server.log()

    def client(self, server: Process | Recorder, **how: typing.Any) -> Client:
        """Connect a client to a server."""
        client = Client(server.port if isinstance(server, Process) else server.server_address[1], **how)
        self.addCleanup(client.__exit__)
        self._clients.append(client)
        return client

    def names(self) -> list[bytes]:
        """Return all messages in the stream, in its order."""
        return [name for _, fields in self.redis.call("XRANGE", self.stream, "-", "+") for name in fields[::2]]

    def in_background(self, call: typing.Callable[..., object], *arguments: typing.Any) -> threading.Thread:
        """Call a function in another thread, which is joined at the end of the test."""
        thread = threading.Thread(target=call, args=arguments, daemon=True)
        thread.start()
        self.addCleanup(thread.join, DEADLINE)
        return thread

    def assert_order(self, clients: typing.Sequence[Client], sent: typing.Sequence[typing.Sequence[Message]]) -> None:
        """Check that all clients get all messages in one order: none missing, doubled, or before an earlier one."""
        count = sum(map(len, sent))
        first, *others = ([client.read() for _ in range(count)] for client in clients)
        for other in others:
            self.assertEqual(other, first)
        for messages in sent:
            mine = set(messages)
            self.assertEqual([message for message in first if message in mine], list(messages))
        self.assertEqual(len(set(first)), count)


def fill(port: int, data: bytes, most: int = 100_000_000) -> int:
    """Send until a server has read nothing for a while; return the number of bytes that were sent."""
    with Client(port) as client:
        client.socket.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError, socket.timeout):
            while sent < most:
                sent += client.socket.send(data[sent % len(data) :])
        return sent


def say(client: Client, messages: typing.Iterable[Message]) -> None:
    """Send messages one after the other."""
    for message in messages:
        client.send(message)


def numbered(who: object, count: int, start: int = 0) -> list[Message]:
    """Return distinct messages."""
    return [f"{who}: {number}" for number in range(start, start + count)]


def frame_of(message: Message) -> bytes:
    """Return a text message as a frame."""
    assert isinstance(message, str)
    return masked_frame(TEXT, message.encode())


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run a server that should not start; return its exit status and its output."""
    command = [sys.executable, *COMPILED, "--port", "0", *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=DEADLINE, env=variables, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def quiet_lines(log: str) -> list[str]:
    """Return the lines of a server's log, with "away" for "Redis is away" and "back" for "Redis is back"."""
    return [re.sub(".* Redis is (away|back).*", r"\1", line) for line in log.splitlines()]


def trickle(client: Client, messages: typing.Sequence[Message]) -> None:
    """Send messages over a second, so that faults come between them."""
    for number, message in enumerate(messages):
        client.send(message)
        if number % 10 == 0:
            time.sleep(0.01)


def read_until(client: Client, last: set[str]) -> list[Message]:
    """Read messages up to the last of these."""
    heard: list[Message] = []
    while last:
        heard.append(client.read())
        last = last - {heard[-1]}
    return heard


def read_until_close(client: Client) -> list[Message]:
    """Read messages up to the Close frame, which is answered."""
    heard: list[Message] = []
    while (frame := client.read_frame()).opcode != 8:
        heard.append(frame.payload.decode())
    client.close()
    client.socket.close()
    return heard


def steady(figure: typing.Callable[[], float]) -> None:
    """Wait until a figure has not changed for half a second."""
    last, since = figure(), time.monotonic()
    end = since + DEADLINE
    while time.monotonic() - since < 0.5:
        time.sleep(0.02)
        now = figure()
        if now != last:
            last, since = now, time.monotonic()
        assert time.monotonic() < end, f"it still changes: {last}"


def memory(pid: int) -> int:
    """Return the resident memory of a process (bytes, Linux)."""
    status = pathlib.Path(f"/proc/{pid}/status")
    require(status.exists(), "/proc")
    match = re.search(r"VmRSS:\s+([0-9]+) kB", status.read_text())
    assert match
    return int(match[1]) * 1024

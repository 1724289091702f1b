"""A process without free file descriptors or threads, and many connections at once."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import threading
import time
import unittest
import unittest.mock

import pywebsock
from tests.tools import faults, load
from tests.tools.support import (
    DEADLINE,
    IS_WINDOWS,
    PING,
    PONG,
    ROOT,
    Client,
    Frame,
    Process,
    ServerTestCase,
    eventually,
    in_thread,
    request,
    require,
)


class Exhaustion(ServerTestCase):
    """If the process has no free file descriptors or threads, other clients are not affected."""

    @unittest.skipIf(IS_WINDOWS, "Windows has no limit of descriptors")
    def test_file_descriptors(self) -> None:
        """New connections wait, without a busy loop and with few log lines; they are served when others have left."""
        require(pathlib.Path("/proc/self/stat").exists(), "/proc")
        with Process(python=faults.changed(faults.few_files(60))) as process:
            clients = [Client(process.port)]
            for client in clients:
                self.addCleanup(client.__exit__)
            for _ in range(80):
                clients.append(Client(process.port, handshake=False))
                self.addCleanup(clients[-1].__exit__)
                clients[-1].send_raw(request())
            eventually(lambda: "cannot accept" in process.log())
            before = load.cpu(process.pid)
            start = time.monotonic()
            while time.monotonic() - start < 0.5:  # the clients in the room are not affected
                clients[0].send("still here")
                self.assertEqual(clients[0].read(), "still here")
                time.sleep(0.05)
            self.assertLess(load.cpu(process.pid) - before, 0.3)
            self.assertLess(process.log().count("cannot accept"), 10)
            for client in clients[:60]:
                client.socket.close()
            for client in clients[60:]:
                self.assertTrue(client.read_head().startswith(b"HTTP/1.1 101 "))
            clients[-1].frame(PING, b"?")
            self.assertEqual(clients[-1].read_frame(), Frame(True, False, PONG, b"?"))
            for client in clients:
                client.socket.close()
        self.assertNotIn("Traceback", process.log())

    def test_threads(self) -> None:
        """If no thread can be started, a handshake that calls a hook waits for a new thread or a free one."""

        class Admitting(pywebsock.BroadcastServer):
            def admit(self, client: pywebsock.WebSocketHandler) -> None:
                pass

        with unittest.mock.patch.object(pywebsock, "IDLE_TIME", 0.05):
            server = self.serve(Admitting)
            witness = self.connect(server)
            eventually(lambda: all(thread.name != "pywebsock hooks" for thread in threading.enumerate()))
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            waiting = self.connect(server, handshake=False)
            waiting.send_raw(request())
            eventually(lambda: server._hooks.is_waiting)
            witness.send("all is well")
            self.assertEqual(witness.read(), "all is well")
        self.assertTrue(waiting.read_head().startswith(b"HTTP/1.1 101 "))

    def test_no_thread_for_the_loop(self) -> None:
        """serve_forever() raises an exception, and the server can be closed."""
        with pywebsock.BroadcastServer(("127.0.0.1", 0)) as server:
            failure = RuntimeError("can't start new thread")
            with unittest.mock.patch.object(threading.Thread, "start", side_effect=failure):
                self.assertRaises(RuntimeError, server.serve_forever)
        self.assertLess(server.fileno(), 0)


# Settings of the process that a server might change.
HOST = r"""
import logging, socket, sys, threading
import pywebsock
def settings():
    logger = logging.getLogger("pywebsock")
    return sys.getswitchinterval(), threading.stack_size(), logger.filters, logging.root.handlers
sys.setswitchinterval(0.0005)
socket.setdefaulttimeout(3.0)
before = settings()
server = pywebsock.BroadcastServer(("127.0.0.1", 0))
thread = threading.Thread(target=server.serve_forever, args=(0.01,))
thread.start()
clients = [socket.create_connection(server.server_address) for _ in range(100)]
for client in clients:
    client.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 200")
assert settings() == before, settings()
for client in clients:
    client.close()
server.shutdown()
server.server_close()
assert settings() == before, settings()
print(socket.getdefaulttimeout())
"""


@unittest.skipIf(IS_WINDOWS, "Windows has no limit of descriptors")
class FileLimit(unittest.TestCase):
    """The limit of open files is raised as far as the system allows."""

    def test_raised(self) -> None:
        for limit, hard, accepted, expected in (
            (256, 4096, 4096, 4096),
            (256, 1 << 62, 10_240, 10_240),  # macOS
            (20_000, 1 << 62, 20_000, 20_000),
            (256, 300, 0, 256),
        ):
            with self.subTest(limit=limit, hard=hard):
                self.check([limit, hard], accepted, expected)

    def check(self, limits: list[int], accepted: int, expected: int) -> None:
        """Simulate a system with these limits, which accepts a new limit up to a number."""
        hard = limits[1]

        def change(_: int, new: tuple[int, int]) -> None:
            """Replace setrlimit()."""
            if new[0] > min(accepted, hard):
                raise ValueError("current limit exceeds maximum limit")
            limits[:] = new

        in_place = unittest.mock.patch
        with in_place("resource.getrlimit", lambda _: tuple(limits)), in_place("resource.setrlimit", change):
            self.assertEqual(pywebsock.raise_file_limit(), expected)
        self.assertEqual(limits, [expected, hard])


class Host(ServerTestCase):
    """A server changes no setting of its process."""

    def test_settings_of_the_process(self) -> None:
        ended = subprocess.run(
            [sys.executable, "-c", HOST], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
        self.assertEqual((ended.stdout, ended.stderr), ("3.0\n", ""))


# As prefork servers do: children serve the socket of a server, and the parent closes its copy.
FORKS = r"""
import os, signal, sys, pywebsock
server = pywebsock.BroadcastServer(("127.0.0.1", 0))
children = []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # here, since a child may begin late
for _ in range(3):
    child = os.fork()
    if not child:
        try:
            server.serve_forever(0.01)
        finally:
            server.server_close()
    children.append(child)
print(server.server_address[1], flush=True)
sys.stdin.read()
for child in children:
    os.kill(child, signal.SIGTERM)
print([os.waitpid(child, 0)[1] for child in children], flush=True)
server.server_close()
"""


class Fork(ServerTestCase):
    """Threads start with serve_forever(), not with the constructor, so a program can fork in between."""

    def test_children_that_serve(self) -> None:
        require(getattr(os, "fork", None), "os.fork")
        command = [sys.executable, "-c", FORKS]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as parent:
            assert parent.stdout and parent.stdin and parent.stderr
            port = int(parent.stdout.readline())
            clients = [Client(port) for _ in range(20)]
            for number, client in enumerate(clients):
                client.send(f"from {number}")
                while client.read() != f"from {number}":  # other clients of the same child join first
                    pass
            for client in clients:
                client.socket.close()
            parent.stdin.close()
            self.assertEqual(parent.stdout.read(), "[0, 0, 0]\n")
            self.assertEqual(parent.stderr.read(), "")
            parent.wait(DEADLINE)


class Storm(ServerTestCase):
    """Hundreds of connections can wait for accept() (by default of socketserver, five)."""

    def test_many_at_once(self) -> None:
        server = pywebsock.BroadcastServer(("127.0.0.1", 0))
        self.addCleanup(server.server_close)
        clients = [self.connect(server, handshake=False) for _ in range(200)]  # no thread accepts yet
        for client in clients:
            client.send_raw(request())
        with in_thread(server.serve_forever, 0.02):
            self.addCleanup(server.shutdown)
            for client in clients:
                self.assertTrue(client.read_head().startswith(b"HTTP/1.1 101 "))
            server.broadcast("all here?")
            self.assertEqual([client.read() for client in clients], ["all here?"] * 200)
            for client in clients:
                client.socket.close()
            server.shutdown()

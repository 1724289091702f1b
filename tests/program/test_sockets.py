"""Listening on Unix sockets, and on sockets that systemd hands over."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import typing
import unittest
import unittest.mock

import pywebsock
from tests.program.test_command_line import call, run
from tests.tools.support import (
    COMPILED,
    DEADLINE,
    ROOT,
    Client,
    Process,
    Recorder,
    ServerTestCase,
    certificate,
    eventually,
    exchange,
    running,
)


@unittest.skipUnless(hasattr(socket, "AF_UNIX"), "Unix sockets")
class UnixSocketTestCase(ServerTestCase):
    """Tests with a folder for sockets."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = os.path.join(self.folder, "room.sock")

    def client(self, **how: typing.Any) -> Client:
        """Connect a client to the Unix socket."""
        client = Client(self.path, **how)
        self.addCleanup(client.__exit__)
        return client


class Server(UnixSocketTestCase):
    """BroadcastServer(("unix:PATH", 0))."""

    @contextlib.contextmanager
    def running(self, **settings: typing.Any) -> typing.Iterator[Recorder]:
        """Run a server on the path."""
        with running(address=(f"unix:{self.path}", 0), **settings) as server:
            yield server

    def test_room(self) -> None:
        with self.running() as server, self.assertLogs("pywebsock", "DEBUG") as logged:
            first, second = self.client(), self.client()
            first.send("Hello")
            self.assertEqual([first.read(), second.read()], ["Hello"] * 2)
            self.assertEqual({client.address for client in server.clients}, {"unix"})
            self.assertEqual(exchange(self.path, b"GET / HTTP/1.0\r\n\r\n")[0], 200)
            first.close()
            self.assertEqual(first.read_close(), (1000, ""))
            server.wait_for("close", 1000, "")
            first.socket.close()
            second.socket.close()
        self.assertIn("unix left: 1000", [record.getMessage() for record in logged.records])
        self.assertFalse(os.path.exists(self.path))

    def test_a_client_with_a_path_of_its_own(self) -> None:
        with self.running() as server, socket.socket(socket.AF_UNIX) as client:
            client.bind(os.path.join(self.folder, "client.sock"))
            client.settimeout(DEADLINE)
            client.connect(self.path)
            client.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
            self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 202 "))
            eventually(lambda: server.status()["messages"] == 1)

    def test_tls(self) -> None:
        path, context = certificate(self.folder)
        with self.running(tls_context=pywebsock.load_certificate(path, None)):
            client = self.client(tls=context)
            client.send("Hello")
            self.assertEqual(client.read(), "Hello")
            client.socket.close()

    def test_existing_files(self) -> None:
        """A socket without a server is replaced; another file, or the socket of a running server, is not."""
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(self.path)
            killed.listen()
        with self.running():
            with self.assertRaises(OSError), self.running():
                pass
            self.client().socket.close()
        file = pathlib.Path(self.path)
        file.write_text("precious")
        with self.assertRaises(OSError), self.running():
            pass
        self.assertEqual(file.read_text(), "precious")

    def test_path_that_cannot_be_removed(self) -> None:
        with self.running():
            os.rename(self.folder, f"{self.folder}-moved")
            pathlib.Path(self.folder).write_text("no folder", encoding="utf-8")
        os.remove(self.folder)
        os.rename(f"{self.folder}-moved", self.folder)

    def test_path_of_another_server(self) -> None:
        with contextlib.ExitStack() as stack:
            with self.running():
                os.remove(self.path)
                stack.enter_context(self.running())
            self.client().socket.close()


class CommandLine(UnixSocketTestCase):
    """--host unix:PATH."""

    def test_unix(self) -> None:
        with Process("--host", f"unix:{self.path}") as process:
            self.assertEqual(process.first_line, f"pywebsock: listening on unix:{self.path}\n")
            client = self.client()
            client.send("Hello")
            self.assertEqual(client.read(), "Hello")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(client.read_frame().payload, b"\x03\xe9")  # 1001
            client.socket.close()
        self.assertFalse(os.path.exists(self.path))

    def test_path_is_escaped(self) -> None:
        """Standard output may be unable to encode the path."""
        self.path = os.path.join(self.folder, "\xe9\t.sock")
        with running(address=(f"unix:{self.path}", 0)) as server:
            line = f"pywebsock: listening on unix:{self.folder}/\\xe9\\t.sock"
            self.assertEqual(pywebsock.locations(server, ""), line)

    def test_wrong(self) -> None:
        for how, host, status, words in (
            (run, f"unix:{self.folder}/no/room.sock", 1, "No such file or directory"),
            (call, f"unix:{self.folder}", 1, "Address already in use"),
            (call, f"unix:/{'x' * 200}", 1, "path too long"),
            (call, "unix:", 2, "needs a path"),
        ):
            with self.subTest(host):
                ended, output, errors = how("--host", host)
                self.assertEqual((ended, output), (status, ""))
                self.assertIn(words, errors.splitlines()[-1])


# Runs the program with a socket as descriptor 3, as systemd does.
START = """if 1:
    import os, sys
    os.dup2(int(sys.argv[1]), 3)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Systemd(UnixSocketTestCase):
    """LISTEN_FDS and NOTIFY_SOCKET."""

    def listener(self, family: int, address: typing.Any) -> socket.socket:
        """Return a listening socket, which a child inherits."""
        listener = socket.socket(family)
        self.addCleanup(listener.close)
        listener.bind(address)
        listener.listen()
        listener.set_inheritable(True)
        return listener

    @contextlib.contextmanager
    def started(self, listener: socket.socket, *arguments: str, **environment: str) -> typing.Iterator[typing.Any]:
        """Run the program with this socket, and end it with SIGTERM."""
        program = [sys.executable, "-c", START, str(listener.fileno()), *COMPILED, *arguments]
        process = subprocess.Popen(
            program,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, **environment},
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=DEADLINE)
            self.assertEqual(process.returncode, 0, errors)

    def test_tcp(self) -> None:
        """Two servers, one after the other: a connection between them waits, and is not refused."""
        listener = self.listener(socket.AF_INET, ("127.0.0.1", 0))
        port = listener.getsockname()[1]
        waiting = None
        for _ in range(2):
            with self.started(listener, "--port", "1") as process:
                line = process.stdout.readline().decode()
                self.assertEqual(line, f"pywebsock: listening on http://localhost:{port}/ (ws://localhost:{port}/)\n")
                if waiting:
                    waiting.send_raw(b"GET / HTTP/1.0\r\n\r\n")
                    self.assertTrue(waiting.read_all().startswith(b"HTTP/1.1 200 "))
                    waiting.socket.close()
                with Client(port) as client:
                    client.send("Hello")
                    self.assertEqual(client.read(), "Hello")
            waiting = Client(port, handshake=False)
            self.addCleanup(waiting.__exit__)

    def test_unix(self) -> None:
        """The program does not remove the path."""
        listener = self.listener(socket.AF_UNIX, self.path)
        with self.started(listener) as process:
            self.assertEqual(process.stdout.readline().decode(), f"pywebsock: listening on unix:{self.path}\n")
            client = self.client()
            client.send("Hello")
            self.assertEqual(client.read(), "Hello")
            client.socket.close()
        self.assertTrue(os.path.exists(self.path))

    def test_of_another_process(self) -> None:
        """LISTEN_PID is the process for which the sockets are."""
        with unittest.mock.patch.dict(os.environ, LISTEN_PID="1", LISTEN_FDS="1"), Process() as process:
            self.assertEqual(exchange(process.port, b"GET / HTTP/1.0\r\n\r\n")[0], 200)

    def test_two_sockets(self) -> None:
        with unittest.mock.patch.dict(os.environ, LISTEN_PID=str(os.getpid()), LISTEN_FDS="2"):
            status, output, errors = call("--port", "0")
        self.assertEqual((status, output), (1, ""))
        self.assertEqual(errors, "pywebsock: systemd passes 2 sockets: the unit must have one ListenStream\n")

    def test_notify(self) -> None:
        names = [os.path.join(self.folder, "notify")]
        if sys.platform == "linux":
            names.append(f"@pywebsock-{os.getpid()}")
        for name in names:
            with self.subTest(name), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.settimeout(DEADLINE)
                manager.bind(name.replace("@", "\0"))
                with unittest.mock.patch.dict(os.environ, NOTIFY_SOCKET=name), Process() as process:
                    self.assertEqual(manager.recv(100), b"READY=1")
                    self.assertEqual(exchange(process.port, b"GET / HTTP/1.0\r\n\r\n")[0], 200)
                    process.send_signal(signal.SIGTERM)
                    self.assertEqual(manager.recv(100), b"STOPPING=1")

    def test_no_notification(self) -> None:
        with (
            unittest.mock.patch.dict(os.environ, NOTIFY_SOCKET=os.path.join(self.folder, "gone")),
            Process() as process,
        ):
            eventually(lambda: exchange(process.port, b"GET / HTTP/1.0\r\n\r\n")[0] == 200)


if __name__ == "__main__":
    unittest.main()

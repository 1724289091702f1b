"""Where the process has no more file descriptors or threads, and where many connect at once."""

from __future__ import annotations

import pathlib
import socket
import subprocess
import sys
import time
import unittest
import unittest.mock

import pywebsock
from tests.tools import faults, load
from tests.tools.support import (
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
    """Where the process has no more file descriptors or threads, others are not disturbed."""

    def test_place_that_is_free_before_the_wait(self) -> None:
        """One has gone between the look and the wait: nobody waits for another one."""
        connections = pywebsock.Connections(0)
        self.addCleanup(connections.adapt_switch_interval)  # as it was, when none is left
        for _ in range(connections.most):
            connections.add(socket.socket(), 0.0)
        self.assertTrue(connections.are_too_many)
        for each in list(connections.handlers):
            connections.remove(each)
            each.close()
            with self.assertLogs("pywebsock", "WARNING"):
                self.assertTrue(connections.wait_for_fewer(connections.most, "too many connections"))

    def test_file_descriptors(self) -> None:
        """New connections wait, with no busy loop and few lines in the log; they are served when others have gone."""
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
            while time.monotonic() - start < 1.2:  # those who are in do not notice
                clients[0].send("still here")
                self.assertEqual(clients[0].read(), "still here")
                time.sleep(0.05)
            self.assertLess(load.cpu(process.pid) - before, 0.6)
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
        """A connection that cannot have its thread is refused."""
        server = self.serve()
        witness = self.connect(server)
        error = RuntimeError("can't start new thread")
        with self.assertLogs("pywebsock", "WARNING") as logged:
            with unittest.mock.patch.object(pywebsock, "start_new_thread", side_effect=error):
                refused = self.connect(server, handshake=False)
                self.assertEqual(refused.read_all(), b"")
                eventually(lambda: logged.records)
            self.assertEqual([record.exc_info for record in logged.records], [None])
        self.connect(server)
        witness.send("all is well")
        self.assertEqual(witness.read(), "all is well")


class Crowd(ServerTestCase):
    """Thousands of threads."""

    def test_switch_interval(self) -> None:
        """It grows with the crowd; a program that goes on without the server has the one that it had."""
        before = sys.getswitchinterval()
        server = self.serve(close_timeout=0.1)
        for _ in range(160):
            self.connect(server)
        self.assertGreater(sys.getswitchinterval(), before)
        self.serve().server_close()  # another, that has never seen another interval
        server.server_close()
        self.assertEqual(sys.getswitchinterval(), before)

    def test_places_to_wait(self) -> None:
        """In one that thousands share, each wake-up would look at all of them."""
        places = "import ctypes; print(ctypes.CDLL(None).prctl(78, 2, 0, 0, 0))"  # PR_FUTEX_HASH_GET_SLOTS
        if sys.platform != "linux" or int(subprocess.check_output([sys.executable, "-c", places])) < 0:
            self.skipTest("Linux before 6.16, or another system")
        serve = f"import pywebsock; pywebsock.BroadcastServer(('127.0.0.1', 0)); {places}"
        self.assertEqual(int(subprocess.check_output([sys.executable, "-c", serve], cwd=ROOT)), 4096)


class Storm(ServerTestCase):
    """By default socketserver lets five connections wait for accept; here a storm of them is let in."""

    def test_many_at_once(self) -> None:
        server = pywebsock.BroadcastServer(("127.0.0.1", 0))
        self.addCleanup(server.server_close)
        clients = [self.connect(server, handshake=False) for _ in range(200)]  # nobody accepts yet
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

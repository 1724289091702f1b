"""Paused processes, clocks that are set, and repeated signals, under load.

Light tests, for the basic run, and heavy ones: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import unittest

from tests.tools import faults, load, stress, support
from tests.tools.stress import TROUBLE

# SIGUSR1 sets the wall clock, or the monotonic clock as after the suspension of a machine.
CLOCK = """
import signal, time
offset = [0.0]
for name, factor in (("time", 1), ("time_ns", 10**9), *{more}):
    real = getattr(time, name)
    setattr(time, name, lambda real=real, factor=factor: real() + type(real())(offset[0] * factor))
signal.signal(signal.SIGUSR1, lambda number, frame: offset.__setitem__(0, {seconds}))
"""


@unittest.skipUnless(hasattr(signal, "SIGSTOP"), "there is no SIGSTOP")
class PauseTest(stress.StressTestCase):
    """A pause of the process does not count as silence of its clients: a client that answers the next Ping stays."""

    def check(self, ping: float, pause: float, number: int, times: int = 1) -> None:
        server = self.serve("--ping", str(ping))
        clients = [support.Client(server.port) for _ in range(number)]
        for client in clients:
            self.addCleanup(client.__exit__)
        silent = clients.pop()
        for _ in range(times):
            with faults.paused(server.pid):
                time.sleep(pause)
            for client in clients:  # each client waits for its Ping
                self.assertEqual(client.read_frame().opcode, support.PING)
                client.frame(support.PONG)
        with self.assertRaises((EOFError, ConnectionError)):  # only the silent client's own silence counts
            while silent.read_frame().opcode == support.PING:
                pass
        clients[0].send("all here")
        for client in clients:
            frame = client.read_frame()
            while frame.opcode == support.PING:
                client.frame(support.PONG)
                frame = client.read_frame()
            self.assertEqual(frame.payload, b"all here")
        support.eventually(lambda: "it was silent" in server.log(), "a line in the log")
        for client in clients:  # the server would wait for their ends
            client.socket.close()
        self.assertEqual(server.stop(), 0)

    def test_longer_than_both_timeouts(self) -> None:
        self.check(0.2, 0.6, 4)

    @stress.heavy
    def test_again_and_again(self) -> None:
        """Repeated pauses, with hundreds of clients."""
        self.check(0.5, 1.5, 200, times=3)

    @stress.heavy
    def test_while_data_flows(self) -> None:
        """Paused again and again in the middle of its work: no client is dropped, no message lost."""
        server = self.serve("--ping", "0.5", "--no-compression")
        clients = load.Load(server.port)
        self.addCleanup(clients.__exit__)
        senders = [load.Sender(peer, i, 3000, at_once=4) for i, peer in enumerate(clients.join(20))]

        def go_on() -> None:
            for sender in senders:
                sender.go_on()

        for i in range(30):
            clients.run_for(0.01 + 0.003 * i, go_on)
            with faults.paused(server.pid):
                clients.run_for(0.02 if i % 10 else 1.5, go_on)
        for sender in senders:
            sender.stop()
        total = sum(sender.count for sender in senders)
        clients.run(lambda: all(sender.stream.messages == total for sender in senders), 30)
        self.assertEqual([sender.peer.ended for sender in senders if sender.peer.ended], [])
        self.assertEqual((server.stop(), TROUBLE.findall(server.log())), (0, []))


@stress.heavy
class ClockTest(stress.StressTestCase):
    """No timer depends on the wall clock."""

    def serve_with_clock(self, seconds: float, *arguments: str, code: str = "") -> support.Process:
        """Start a server whose wall clock SIGUSR1 sets by a number of seconds."""
        return self.serve(*arguments, code=CLOCK.format(seconds=seconds, more=()) + code)

    def check(self, seconds: float) -> None:
        """Check that keepalive, log and status go on."""
        server = self.serve_with_clock(seconds, "--ping", "0.2", code="pywebsock.FloodFilter.LINES_TIME = 0.2\n")
        with support.Client(server.port) as silent, support.Client(server.port) as client:
            for _ in range(25):  # more lines than the limit
                support.exchange(server.port, b"nonsense\r\n\r\n")
            os.kill(server.pid, signal.SIGUSR1)
            time.sleep(0.3)
            for _ in range(2):
                support.exchange(server.port, b"GET /afterwards HTTP/1.1\r\nHost: localhost\r\n\r\n")
            support.eventually(lambda: "there are / and /status" in server.log(), "the log says no more")
            _, _, body = support.exchange(server.port, b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n")
            self.assertLess(abs(json.loads(body)["uptime"] - 1), 5)
            self.assertEqual(client.read_frame().opcode, support.PING)
            client.frame(support.PONG)
            client.send("still here")
            while client.read_frame().payload != b"still here":
                client.frame(support.PONG)
            with self.assertRaises((EOFError, ConnectionError)):
                while silent.read_frame():
                    pass
        self.assertEqual(server.stop(), 0)

    def test_set_back(self) -> None:
        self.check(-1e6)

    def test_set_forward(self) -> None:
        self.check(1e6)

    def test_rate(self) -> None:
        """The clock is set back for a day; a client that may send ten messages a second still may."""
        server = self.serve_with_clock(-86400, "--rate", "50")
        with support.Client(server.port) as client:
            client.send("before")
            client.read()
            os.kill(server.pid, signal.SIGUSR1)
            start = time.monotonic()
            for i in range(60):
                client.send(f"{i}")
            self.assertEqual([client.read() for _ in range(60)], [f"{i}" for i in range(60)])
            self.assertLess(time.monotonic() - start, 2)
        self.assertEqual(server.stop(), 0)

    def test_monotonic_clock_forward(self) -> None:
        """If the monotonic clock counts a suspension, it is a pause as any other."""
        more = (("monotonic", 1),)
        server = self.serve("--ping", "0.5", code=CLOCK.format(seconds=3600, more=more))
        with support.Client(server.port) as idle:
            self.assertEqual(idle.read_frame().opcode, support.PING)
            os.kill(server.pid, signal.SIGUSR1)
            time.sleep(0.3)  # longer than the interval of deadlines, shorter than the time for a Pong
            for _ in range(2):
                idle.frame(support.PONG)
                self.assertEqual(idle.read_frame().opcode, support.PING)
            self.assertNotIn("left", server.log())
        self.assertEqual(server.stop(), 0)


@stress.heavy
class SignalTest(stress.StressTestCase):
    """SIGTERM and SIGHUP, once or many times, to a busy server: all clients get 1001, and the exit status is 0."""

    def check(self, *numbers: int, pause: float = 0.0) -> None:
        server = self.serve("--no-compression")
        crowd, clients = stress.Crowd(server.port), load.Load(server.port)
        self.addCleanup(crowd.reset)
        self.addCleanup(clients.__exit__)
        crowd.join(300)
        senders = [load.Sender(peer, i, 500, at_once=1) for i, peer in enumerate(clients.join(5))]

        def go_on() -> None:
            end = time.monotonic() + support.DEADLINE
            while clients.peers and time.monotonic() < end:
                for sender in senders:
                    if not sender.stream.close:
                        sender.go_on()
                    elif not sender.peer.unsent:
                        sender.peer.send(load.frame(b"\x03\xe9", 8))
                clients.step()

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            time.sleep(0.3)
            start = time.monotonic()
            for number in numbers:
                server.send_signal(number)
                time.sleep(pause)
            ends = crowd.ends()
            status = server.wait(stress.CLOSE_TIMEOUT + 2)
        finally:
            thread.join()
        self.report(f"{len(numbers)} signals: {status} after {time.monotonic() - start:.1f} s, {dict(ends)}")
        self.assertEqual(status, 0, server.log()[-3000:])
        self.assertEqual(dict(ends), {load.GOING_AWAY: 300})
        self.assertEqual({sender.stream.close for sender in senders}, {load.GOING_AWAY})
        self.assertEqual(TROUBLE.findall(server.log()), [], server.log()[-3000:])

    def test_term_twice(self) -> None:
        self.check(signal.SIGTERM, signal.SIGTERM)

    def test_term_many_times(self) -> None:
        self.check(*[signal.SIGTERM] * 50, pause=0.002)

    def test_hup(self) -> None:
        self.check(signal.SIGHUP, signal.SIGHUP, pause=0.002)

    def test_hup_and_term(self) -> None:
        self.check(signal.SIGHUP, signal.SIGTERM, signal.SIGHUP)

    def test_second_interrupt(self) -> None:
        """The server stops at once, even if clients have not answered the Close."""
        watched = self.serve_watched(failing=True)
        crowd = self.crowd(watched)
        crowd.join(300)
        watched.server.send_signal(signal.SIGINT)
        support.eventually(lambda: watched.witness.figures().end == "1001")
        start = time.monotonic()
        watched.server.send_signal(signal.SIGINT)
        self.assertEqual(watched.server.wait(1), 130)
        self.report(f"the end {time.monotonic() - start:.2f} s after the second")
        self.assertNotIn("Traceback", watched.log())

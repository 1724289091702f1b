"""Attacks with a few connections, which must not delay or close well-behaved clients.

A witness in its own process measures each attack. Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
import typing
import unittest

from tests.tools import attack, faults, load, stress, support

SECONDS = 4.0  # seconds of an attack
TIMES = 4  # attempts, if the machine is busy
DEFLATE: dict[str, typing.Any] = {"Sec_WebSocket_Extensions": "permessage-deflate"}
# Clients that open a WebSocket and leave, a hundred at a time.
VISITS = """if 1:
    import contextlib, socket, sys
    from tests.tools import support
    while True:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(support.Client(int(sys.argv[1]), handshake=False)) for _ in range(100)]
            for client in clients:
                client.send_raw(support.request())
                client.socket.shutdown(socket.SHUT_WR)
"""

# A program that sends each message to all clients but one, each time another one.
ALL_BUT_ONE = """if 1:
    import itertools
    count = itertools.count()
    def on_message(self, client, message):
        clients = list(self.clients)
        if len(clients) > 1000:
            del clients[next(count) % len(clients)]
        self.broadcast(message, clients)
    pywebsock.Program.on_message = on_message
"""


def hex_text(size: int) -> bytes:
    """Return text that compresses to half of its size."""
    return random.Random(size).getrandbits(4 * size).to_bytes(size // 2, "big").hex().encode()


def window(bits: int) -> dict[str, typing.Any]:
    """Return the header field of a client that asks for this window."""
    return {"Sec_WebSocket_Extensions": f"permessage-deflate; server_max_window_bits={bits}"}


class AttackTestCase(stress.StressTestCase):
    """Tests of a server under attack."""

    def start(
        self, watched: stress.WatchedServer, number: int, piece: bytes, first: bytes = b"", **how: typing.Any
    ) -> attack.Attack:
        """Start a crowd of attackers, which is killed after the test."""
        crowd = attack.Attack(watched.port, number, piece, first, **how)
        self.addCleanup(crowd.end)
        watched.witness.figures()  # from now on
        return crowd

    def stand(self, watched: stress.WatchedServer, what: str, worst: float, growth: float = 150) -> None:
        """Let an attack go on, and check the slowest echo of the witness and memory; repeat if the machine is busy."""
        for _ in range(TIMES):
            watched.witness.figures()
            time.sleep(SECONDS)
            seen = watched.witness.figures()
            if seen.worst < worst or seen.end:
                break
        self.report(
            f"{what}: worst echo {seen.worst:.3f} s of {seen.echoes} (itself late {seen.late:.3f} s), "
            f"memory +{watched.growth:.0f} MB"
        )
        self.assertEqual(seen.end, "", "the witness was disconnected")
        self.assertLess(seen.worst, worst, f"{what}: seconds of the slowest echo of the witness")
        self.assertLess(watched.growth, growth, f"{what}: MB above the start")


@stress.heavy
class FloodTest(AttackTestCase):
    """Floods of small frames."""

    def flood(
        self, number: int, piece: bytes, worst: float, first: bytes = b"", *, tls: bool = False, **how: typing.Any
    ) -> None:
        """Let a crowd send the same bytes again and again."""
        watched = self.serve_watched(tls=tls)
        crowd = self.start(watched, number, piece, first, **how)
        self.stand(watched, f"{number} clients", worst)
        self.report("{:.0f} MB sent, ended: {}".format(*crowd.figures()))

    def test_pings(self) -> None:
        self.flood(200, load.frame(b"", 9), 0.1, pace=5e6)

    def test_pings_without_reading(self) -> None:
        self.flood(200, load.frame(bytes(125), 9), 0.1, pace=5e6, reading=False)

    def test_pings_between_messages(self) -> None:
        """Pongs do not keep messages from being sent together."""
        self.flood(50, load.frame(bytes(125), 9) + load.frame(b"x", 1), 0.2, pace=1e5)

    def test_pongs_and_empty_fragments(self) -> None:
        piece = support.masked_frame(0, fin=False) + support.masked_frame(10)
        self.flood(300, piece, 0.5, support.masked_frame(1, fin=False))

    def test_bursts_of_pongs(self) -> None:
        self.flood(100, support.masked_frame(10), 0.5, pace=5e6, burst=0.5)

    def test_posts_in_tiny_chunks(self) -> None:
        """A body takes turns with others, even if all of its data has arrived."""
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.flood(30, b"1\r\nx\r\n", 0.5, request=head.hex())

    def test_short_visits(self) -> None:
        """As many opening handshakes as there can be, by clients that leave at once."""
        watched = self.serve_watched()
        for _ in range(2):
            visitors = subprocess.Popen([sys.executable, "-c", VISITS, str(watched.port)], cwd=support.ROOT)
            self.addCleanup(visitors.wait)
            self.addCleanup(visitors.kill)
        self.stand(watched, "short visits", 0.2)

    def test_tls_records_of_one_byte(self) -> None:
        self.flood(50, load.frame(b"", 9), 0.1, tls=True, record=1)

    def test_tls_records_of_a_hundred_bytes(self) -> None:
        self.flood(50, load.frame(bytes(94), 10), 0.1, tls=True, record=100)


@stress.heavy
class UnfinishedTest(AttackTestCase):
    """The budget for unfinished messages, which attackers share with other clients."""

    def hold(self, watched: stress.WatchedServer, piece: bytes, **how: typing.Any) -> attack.Attack:
        """Let eight clients use up the budget, and then send `piece` again and again."""
        payload = support.compress(bytes(16 * 1024 * 1024 - 1))
        first = support.masked_frame(2, fin=False, rsv=4, length=len(payload), key=bytes(4)) + payload
        return self.start(watched, 8, piece, first, fields=DEFLATE, **how)

    def honest(self, watched: stress.WatchedServer, number: int) -> list[float]:
        """Send compressed texts, one after the other; return the delay of each (seconds)."""
        client = support.Client(watched.port, **DEFLATE)
        self.addCleanup(client.__exit__)
        delays = []
        for i in range(number):
            start, text = time.monotonic(), f"{i}" * 2000
            client.frame(1, support.compress(text.encode()), rsv=4)
            while client.read() != text:
                pass
            delays.append(time.monotonic() - start)
            time.sleep(0.02)
        return delays

    def test_eight_clients_hold_it(self) -> None:
        watched = self.serve_watched()
        crowd = self.hold(watched, load.frame(b"", 9), pace=10.0)
        delays = self.honest(watched, 100)
        self.report(f"compressed texts came back within {max(delays):.3f} s, ended: {crowd.figures()[1]}")
        self.stand(watched, "8 clients hold the budget", 0.1, 300)
        self.assertLess(max(delays), 5)

    def test_eight_clients_hold_it_and_send_pings(self) -> None:
        """Pings do not count as progress of a message."""
        watched = self.serve_watched()
        crowd = self.hold(watched, load.frame(b"", 9), pace=400e3)
        uploads = Uploads(watched.port, 8, 5_000_000, 5e6)
        delays = self.honest(watched, 100)
        arrived = uploads.wait(20)
        self.report(f"{arrived} of 8 arrived, texts within {max(delays):.3f} s, ended: {crowd.figures()[1]}")
        self.assertEqual(arrived, 8, uploads.ends)
        self.assertLess(max(delays), 5)

    def test_uploads_beside_attackers(self) -> None:
        """Clients whose uploads exceed the budget together are slowed down, not closed."""
        watched = self.serve_watched()
        uploads = Uploads(watched.port, 40, 5_000_000, 1e6)
        arrived = uploads.wait(40)
        self.report(f"{arrived} of 40 arrived, {uploads.ends}")
        self.assertEqual(arrived, 40, uploads.ends)
        self.stand(watched, "40 uploads of 5 MB", 0.1, 600)


class Uploads:
    """Clients that each send one long message at a rate (bytes a second), and read all data."""

    def __init__(self, port: int, number: int, size: int, pace: float) -> None:
        self.arrived = 0
        self.ends: list[str] = []
        self._lock = threading.Lock()
        self._tag = bytes(size)
        self._clients = [support.Client(port, **DEFLATE) for _ in range(number)]
        self._threads = [threading.Thread(target=self._send, args=(one, pace), daemon=True) for one in self._clients]
        for thread in self._threads:
            thread.start()

    def _send(self, client: support.Client, pace: float) -> None:
        one, size = client.socket, len(self._tag)
        frame = memoryview(load.frame(self._tag))
        start, sent = time.monotonic(), 0
        threading.Thread(target=self._read, args=(client,), daemon=True).start()
        try:
            while sent < len(frame):
                sent += one.send(frame[sent : sent + 65536])
                time.sleep(max(0.0, start + sent / pace - time.monotonic()))
        except OSError as error:
            with self._lock:
                self.ends.append(f"{type(error).__name__} after {sent} of {size}")

    def _read(self, client: support.Client) -> None:
        try:
            while True:
                frame = client.read_frame()
                if frame.opcode == 8:
                    with self._lock:
                        self.ends.append(str(frame.payload))
                    return
                if client is self._clients[0] and frame.opcode == 2 and len(frame.payload) > 1000:
                    with self._lock:
                        self.arrived += 1
        except (EOFError, OSError):
            pass

    def wait(self, seconds: float) -> int:
        """Return the number of clients whose message has come back."""
        end = time.monotonic() + seconds
        while self.arrived < len(self._clients) and time.monotonic() < end and not self.ends:
            time.sleep(0.05)
        for client in self._clients:
            client.__exit__()
        return self.arrived


@stress.heavy
class CompressionTest(AttackTestCase):
    """Clients that ask for many windows, for each of which the server compresses messages."""

    def join_with_windows(self, watched: stress.WatchedServer, times: int) -> float:
        """Join with each window; return the time of the slowest handshake (seconds)."""
        slowest = 0.0
        for _ in range(times):
            for bits in range(9, 15):
                start = time.monotonic()
                client = support.Client(watched.port, **window(bits))
                self.addCleanup(client.__exit__)
                slowest = max(slowest, time.monotonic() - start)
        return slowest

    def test_new_windows_while_much_is_sent(self) -> None:
        watched = self.serve_watched()
        attacker = Background(watched.port, load.frame(hex_text(15_000_000), 1), 1e9, DEFLATE)
        self.addCleanup(attacker.end)
        watched.witness.figures()
        slowest = self.join_with_windows(watched, 1)
        self.stand(watched, f"15 MB and six windows, in within {slowest:.2f} s", 0.1, 800)

    def test_medium_messages_for_all_windows(self) -> None:
        """Messages a little shorter than those that other threads compress."""
        watched = self.serve_watched()
        self.join_with_windows(watched, 1)
        attacker = Background(watched.port, load.frame(hex_text(64_000), 1), 20e6, DEFLATE)
        self.addCleanup(attacker.end)
        self.stand(watched, "64 KB, again and again, for seven windows", 0.1, 300)

    def test_history_for_new_windows(self) -> None:
        watched = self.serve_watched("--history", "1")
        attacker = Background(watched.port, load.frame(hex_text(7_000_000), 1), 7e6, DEFLATE)
        self.addCleanup(attacker.end)
        time.sleep(1)
        before = load.cpu(watched.pid)
        watched.witness.figures()
        slowest = self.join_with_windows(watched, 17)
        self.report(f"102 joins: in within {slowest:.2f} s, {load.cpu(watched.pid) - before:.1f} s of CPU")
        self.assertLess(slowest, 2)
        self.stand(watched, "7 MB of history for 102 joins", 0.1, 800)

    def test_history_of_medium_messages(self) -> None:
        """The loop does not compress the messages that arrive while a history is compressed."""
        watched = self.serve_watched("--history", "1000")
        attacker = Background(watched.port, load.frame(hex_text(64_000), 1), 10e6, DEFLATE)
        self.addCleanup(attacker.end)
        worst = []
        for bits in range(9, 15):
            time.sleep(1)
            watched.witness.figures()
            with support.Client(watched.port, **window(bits)) as client:
                client.read_frame()
            worst.append(watched.witness.figures().worst)
        self.report(f"worst echoes while one joins {', '.join(f'{echo:.3f}' for echo in worst)} s")
        self.assertLess(sorted(worst)[len(worst) // 2], 0.1)

    def test_messages_wait_for_compression(self) -> None:
        """Complete messages that wait to be compressed count as unfinished ones."""
        watched = self.serve_watched()
        crowd = self.start(watched, 60, load.frame(hex_text(16_000_000), 1), pace=8e6, fields=DEFLATE)
        self.stand(watched, "60 clients send 16 MB of text", 0.3, 700)
        self.report(f"ended: {crowd.figures()[1]}")

    def test_bombs_wait_for_compression(self) -> None:
        """Inflated messages that wait to be compressed count, too."""
        watched = self.serve_watched()
        payload = support.compress(bytes(16_000_000))
        bomb = support.masked_frame(2, rsv=4, length=len(payload), key=bytes(4)) + payload
        self.start(watched, 200, bomb, pace=len(bomb) / 2, fields=DEFLATE, reading=False)
        self.stand(watched, "200 clients send 16 MB of nothing", 0.3, 1000)


class Background:
    """A client in a thread that sends the same bytes again and again, at a rate (bytes a second), and reads."""

    def __init__(self, port: int, piece: bytes, pace: float, fields: dict[str, typing.Any]) -> None:
        self._client = support.Client(port, **fields)
        self._piece, self._pace = memoryview(piece), pace
        self._client.socket.settimeout(60)
        for act in self._send, self._read:
            threading.Thread(target=act, daemon=True).start()

    def _send(self) -> None:
        start, sent = time.monotonic(), 0
        try:
            while True:
                position = sent % len(self._piece)
                sent += self._client.socket.send(self._piece[position : position + 65536])
                time.sleep(max(0.0, start + sent / self._pace - time.monotonic()))
        except OSError:
            pass  # it was ended

    def _read(self) -> None:
        try:
            while self._client.socket.recv(1 << 20):
                pass
        except OSError:
            pass  # it was ended

    def end(self) -> None:
        """Close the connection with a reset."""
        self._client.socket.shutdown(2)
        self._client.socket.close()


@stress.heavy
class MemoryTest(AttackTestCase):
    """Memory of the process after all clients have left, or while all are idle."""

    def test_arenas(self) -> None:
        """On a machine with 32 cores, malloc would use 256 arenas."""
        code = "import os, sys\nif 'MALLOC_ARENA_MAX' not in os.environ:\n"
        code += "    os.environ['MALLOC_ARENA_MAX'] = '256'; os.execv(sys.executable, sys.orig_argv)"
        support.require(hasattr(sys, "orig_argv"), "sys.orig_argv")  # Python 3.10 or later
        watched = self.serve_watched(code=code)
        for _ in range(2):
            crowd = self.start(watched, 100, b"", load.frame(bytes(200_000)), reading=True)
            posts = [threading.Thread(target=self.post, args=(watched.port,)) for _ in range(60)]
            for post in posts:
                post.start()
            for post in posts:
                post.join()
            time.sleep(1)
            crowd.end()
        support.eventually(lambda: watched.witness.figures().worst < 0.3, deadline=30)
        watched.witness.figures()
        support.eventually(lambda: load.memory(watched.pid) - watched.memory < 40, "the memory is returned", 30)
        kept, worst = load.memory(watched.pid) - watched.memory, watched.witness.figures().worst
        self.report(f"{kept:.0f} MB are kept when all have left, {watched.growth:.0f} MB at most; echo {worst:.3f} s")

    def post(self, port: int) -> None:
        """Send a POST of 4 MB."""
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n"
        with contextlib.suppress(OSError):
            support.exchange(port, head + bytes(4_000_000))

    def idle(self, *, tls: bool) -> None:
        """Check the memory of each of four hundred idle clients that have sent and received a large message."""
        code = "pywebsock.Program.on_message = lambda self, client, message: client.send(message)"
        server = self.serve("--no-compression", tls=tls, code=code)
        context = stress.certificate()[1] if tls else None
        message = load.frame(bytes(200_000))
        clients = [support.Client(server.port, tls=context) for _ in range(400)]
        before = 0.0
        for client in clients:
            client.send_raw(message)
            self.assertEqual(len(client.read()), 200_000)
            before = before or load.memory(server.pid)  # memory that malloc keeps does not count
        kept = (load.memory(server.pid) - before) * 1000 / len(clients)
        self.report(f"{kept:.0f} KB more for an idle client")
        self.assertLess(kept, 8 + 32 * tls)
        for client in clients:
            client.__exit__()

    def test_idle_clients(self) -> None:
        self.idle(tls=False)

    def test_idle_tls_clients(self) -> None:
        self.idle(tls=True)


@stress.heavy
class ProgramTest(AttackTestCase):
    """Servers whose hooks send much."""

    def test_recipients(self) -> None:
        """Each message has other recipients, as with "all but the sender"; a client sends more than can go out."""
        watched = self.serve_watched(code=ALL_BUT_ONE)
        crowd = self.start(watched, 2000, b"")
        pings = support.Client(watched.port)
        self.addCleanup(pings.__exit__)
        sender = Background(watched.port, load.frame(b"x"), 7 * 4000, {})
        self.addCleanup(sender.end)
        self.ping(pings)  # now the queue is full
        watched.witness.figures()
        worst = min(self.ping(pings) for _ in range(TIMES))
        self.report(f"a Pong within {worst:.3f} s, {crowd.figures()[1]}")
        self.assertLess(worst, 0.3)  # at most 2,000 sends before it is read, and 2,000 after
        self.stand(watched, "all but one", 0.5, 60)

    def ping(self, client: support.Client) -> float:
        """Send twenty Pings; return the longest time until a Pong (seconds)."""
        worst = 0.0
        for i in range(20):
            payload, start = b"%d" % i, time.monotonic()
            client.frame(9, payload)
            while (frame := client.read_frame()).opcode != 10 or frame.payload != payload:
                pass
            worst = max(worst, time.monotonic() - start)
            time.sleep(0.02)
        return worst

    def test_slow_reader_before_a_close(self) -> None:
        """A hook sends 8 MB and closes; the client reads 400 KB/s and gets all of it."""
        code = "def on_open(self, client): client.send(bytes(8_000_000)); client.close(4000)\n"
        code += "pywebsock.Program.on_open = on_open"
        server = self.serve(code=code)
        client = support.Client(server.port, small=True)
        self.addCleanup(client.__exit__)
        got, end, start = 0, b"", time.monotonic()
        while data := client.socket.recv(40_000):
            got, end = got + len(data), (end + data)[-4:]
            time.sleep(max(0.0, start + got / 400e3 - time.monotonic()))
            if end == b"\x88\x02\x0f\xa0":
                client.close(4000)
        self.report(f"{got} bytes within {time.monotonic() - start:.1f} s, the last are {end!r}")
        self.assertEqual((got > 7_990_000, end), (True, b"\x88\x02\x0f\xa0"))

    def test_steady_slow_reader(self) -> None:
        """A client is alive while it reads from the kernel's buffer, even if the server's queue is empty."""
        server = self.serve("--ping", "1", code="pywebsock.BroadcastServer.send_timeout = 3")
        reader, sender = support.Client(server.port, small=True), support.Client(server.port)
        self.addCleanup(reader.__exit__)
        self.addCleanup(sender.__exit__)
        sender.frame(2, bytes(1_000_000))
        got, start = 0, time.monotonic()
        while got < 1_000_000:
            data = reader.socket.recv(10_000)
            self.assertTrue(data, f"ended after {got} bytes, {time.monotonic() - start:.1f} s")
            got += len(data)
            time.sleep(max(0.0, start + got / 80e3 - time.monotonic()))
        self.report(f"{got} bytes within {time.monotonic() - start:.1f} s")

    def test_sender_that_does_not_read(self) -> None:
        """A client that does not read is dropped, even if it sends much."""
        server = self.serve(code="pywebsock.BroadcastServer.send_timeout = 2")
        stuck, sender = support.Client(server.port, small=True), support.Client(server.port)
        self.addCleanup(sender.__exit__)
        sender.frame(2, bytes(200_000))
        start = time.monotonic()
        try:
            while time.monotonic() < start + 20:
                stuck.frame(9, b"I am here")
                time.sleep(0.1)
            self.fail("it was not dropped")
        except OSError:
            self.report(f"dropped after {time.monotonic() - start:.1f} s")

    def test_full_standard_error(self) -> None:
        """The log may go to a full pipe. Long lines, too: a pipe may accept a part of a line."""
        code = """
def on_message(self, client, message): raise ValueError("x" * 20000)
pywebsock.Program.on_message = on_message
"""
        command = [sys.executable, *faults.changed(code), "--port", "0", "--verbose"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as server:
            self.addCleanup(server.kill)
            assert server.stdout
            port = int(server.stdout.readline().split("localhost:")[1].split("/")[0])
            for _ in range(30):
                client = support.Client(port)
                client.frame(1, b"x")
                self.assertEqual(client.read_close()[0], 1011)
                client.__exit__()
            support.eventually(lambda: load.files(server.pid) < 20, "descriptors are left")
            start = time.monotonic()
            server.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(20), 0)
            self.report(f"SIGTERM ended it within {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    unittest.main()

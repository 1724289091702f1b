"""What a stranger with a few connections can do to a room, and what must not happen to honest clients with bad luck.

Beside each attack there is an honest witness in a process of its own. Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import random
import threading
import time
import typing
import unittest

from tests.tools import attack, load, stress, support

SECONDS = 4.0  # that an attack goes on
TIMES = 4  # at most, where the machine has other things to do
DEFLATE = {"Sec_WebSocket_Extensions": "permessage-deflate"}


def hex_text(size: int) -> bytes:
    """Text that compresses badly: to half of its size."""
    return random.Random(size).getrandbits(4 * size).to_bytes(size // 2, "big").hex().encode()


def window(bits: int) -> dict[str, str]:
    """The header field of a client that asks for this window."""
    return {"Sec_WebSocket_Extensions": f"permessage-deflate; server_max_window_bits={bits}"}


class AttackTestCase(stress.StressTestCase):
    """Tests of a server that strangers attack."""

    def attack(
        self, besieged: stress.Siege, number: int, piece: bytes, first: bytes = b"", **how: typing.Any
    ) -> attack.Attack:
        """A crowd of attackers, which is ended in the end."""
        crowd = attack.Attack(besieged.port, number, piece, first, **how)
        self.addCleanup(crowd.end)
        besieged.witness.figures()  # from now on
        return crowd

    def stand(self, besieged: stress.Siege, what: str, worst: float, growth: float = 60) -> None:
        """Let an attack go on; what the witness sees meanwhile is the result, at best of some times: others work, too."""
        for _ in range(TIMES):
            besieged.witness.figures()
            time.sleep(SECONDS)
            seen = besieged.witness.figures()
            if seen.worst < worst or seen.end:
                break
        self.report(
            f"{what}: worst echo {seen.worst:.3f} s of {seen.echoes} (itself late {seen.late:.3f} s), "
            f"memory +{besieged.growth:.0f} MB"
        )
        self.assertEqual(seen.end, "", "the witness was cut off")
        self.assertLess(seen.worst, worst, f"{what}: seconds of an honest client's worst echo")
        self.assertLess(besieged.growth, growth, f"{what}: MB more than before")


@stress.heavy
class FloodTest(AttackTestCase):
    """Frames that cost a stranger little, as many as a connection takes."""

    def flood(
        self, number: int, piece: bytes, worst: float, first: bytes = b"", *, tls: bool = False, **how: typing.Any
    ) -> None:
        """A crowd sends the same bytes again and again."""
        besieged = self.besiege(tls=tls)
        crowd = self.attack(besieged, number, piece, first, **how)
        self.stand(besieged, f"{number} clients", worst)
        self.report("{:.0f} MB sent, ended: {}".format(*crowd.figures()))

    def test_pings(self) -> None:
        self.flood(200, load.frame(b"", 9), 0.1, pace=5e6)

    def test_pings_that_nobody_reads_the_answers_of(self) -> None:
        self.flood(200, load.frame(bytes(125), 9), 0.1, pace=5e6, reading=False)

    def test_pings_between_messages(self) -> None:
        """Were the Pongs sent between the messages, none of these would go out with the next one."""
        self.flood(50, load.frame(bytes(125), 9) + load.frame(b"x", 1), 0.2, pace=1e5)

    def test_pongs_and_empty_fragments(self) -> None:
        piece = support.masked_frame(0, fin=False) + support.masked_frame(10)
        self.flood(300, piece, 0.5, support.masked_frame(1, fin=False))

    def test_bursts_of_pongs(self) -> None:
        self.flood(100, support.masked_frame(10), 0.5, pace=5e6, burst=0.5)

    def test_tls_records_of_one_byte(self) -> None:
        self.flood(50, load.frame(b"", 9), 0.1, tls=True, record=1)

    def test_tls_records_of_a_hundred_bytes(self) -> None:
        self.flood(50, load.frame(bytes(94), 10), 0.1, tls=True, record=100)


@stress.heavy
class UnfinishedTest(AttackTestCase):
    """The budget for unfinished messages, which strangers and honest clients share."""

    def hold(self, besieged: stress.Siege, piece: bytes, **how: typing.Any) -> attack.Attack:
        """Eight clients take it whole, and go on with this."""
        payload = support.compress(bytes(16 * 1024 * 1024 - 1))
        first = support.masked_frame(2, fin=False, rsv=4, length=len(payload), key=bytes(4)) + payload
        return self.attack(besieged, 8, piece, first, fields=DEFLATE, **how)

    def honest(self, besieged: stress.Siege, number: int) -> list[float]:
        """An honest client sends compressed texts, one after the other; seconds until each is back."""
        client = support.Client(besieged.port, **DEFLATE)
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
        besieged = self.besiege()
        crowd = self.hold(besieged, load.frame(b"", 9), pace=10.0)
        delays = self.honest(besieged, 100)
        self.report(f"compressed texts came back within {max(delays):.3f} s, ended: {crowd.figures()[1]}")
        self.stand(besieged, "8 clients hold the budget", 0.1, 300)
        self.assertLess(max(delays), 5)

    def test_eight_clients_hold_it_and_send_pings(self) -> None:
        """Pings are no progress of a message."""
        besieged = self.besiege()
        crowd = self.hold(besieged, load.frame(b"", 9), pace=400e3)
        uploads = Uploads(besieged.port, 8, 5_000_000, 5e6)
        delays = self.honest(besieged, 100)
        arrived = uploads.wait(20)
        self.report(f"{arrived} of 8 arrived, texts within {max(delays):.3f} s, ended: {crowd.figures()[1]}")
        self.assertEqual(arrived, 8, uploads.ends)
        self.assertLess(max(delays), 5)

    def test_honest_uploads(self) -> None:
        """They have more to send than the budget lets through at once: they are slowed down, not closed."""
        besieged = self.besiege()
        uploads = Uploads(besieged.port, 40, 5_000_000, 1e6)
        arrived = uploads.wait(40)
        self.report(f"{arrived} of 40 arrived, {uploads.ends}")
        self.assertEqual(arrived, 40, uploads.ends)
        self.stand(besieged, "40 uploads of 5 MB", 0.1, 600)


class Uploads:
    """Honest clients that each send one message at a pace, in bytes a second, and read what comes."""

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
        """Of how many the messages have come back."""
        end = time.monotonic() + seconds
        while self.arrived < len(self._clients) and time.monotonic() < end and not self.ends:
            time.sleep(0.05)
        for client in self._clients:
            client.__exit__()
        return self.arrived


if __name__ == "__main__":
    unittest.main()

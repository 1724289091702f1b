"""What a stranger with a few connections can do to a room, and what must not happen to honest clients with bad luck.

Beside each attack there is an honest witness in a process of its own. Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import random
import time
import typing
import unittest

from tests.tools import attack, load, stress, support

SECONDS = 5.0  # that an attack goes on
DEFLATE = {"Sec_WebSocket_Extensions": "permessage-deflate"}
NOISE = random.Random(24).randbytes if hasattr(random.Random, "randbytes") else None


def hex_text(size: int) -> bytes:
    """Text that compresses badly: to half of its size."""
    return random.Random(size).getrandbits(4 * size).to_bytes(size // 2, "big").hex().encode()


def window(bits: int) -> dict[str, str]:
    """The header field of a client that asks for this window."""
    return {"Sec_WebSocket_Extensions": f"permessage-deflate; server_max_window_bits={bits}"}


class AttackTestCase(stress.StressTestCase):
    """Tests of a server that strangers attack."""

    def start(
        self, besieged: stress.Siege, number: int, piece: bytes, first: bytes = b"", **how: typing.Any
    ) -> attack.Attack:
        """A crowd of attackers, which is ended in the end."""
        crowd = attack.Attack(besieged.port, number, piece, first, **how)
        self.addCleanup(crowd.end)
        besieged.witness.figures()  # from now on
        return crowd

    def stand(self, besieged: stress.Siege, crowd: attack.Attack, what: str, worst: float, growth: float = 60) -> None:
        """Let the attack go on for a while; what the witness sees meanwhile is the result."""
        time.sleep(SECONDS)
        sent, ends = crowd.figures()
        self.watch(besieged, f"{what}, {sent / SECONDS:.0f} MB/s, ended {ends}", worst, growth)


@stress.heavy
class FloodTest(AttackTestCase):
    """Frames that cost a stranger little, as many as a connection takes."""

    def test_pings(self) -> None:
        besieged = self.besiege()
        crowd = self.start(besieged, 200, load.frame(b"", 9), pace=5e6)
        self.stand(besieged, crowd, "200 clients send Pings", 0.1)

    def test_pings_that_nobody_reads_the_answers_of(self) -> None:
        besieged = self.besiege()
        crowd = self.start(besieged, 200, load.frame(bytes(125), 9), pace=5e6, reading=False)
        self.stand(besieged, crowd, "200 clients send Pings and read nothing", 0.1)

    def test_pings_between_messages(self) -> None:
        """Each message makes the Pongs before it leave at once."""
        besieged = self.besiege()
        piece = load.frame(bytes(125), 9) + load.frame(b"x", 1)
        crowd = self.start(besieged, 50, piece, pace=1e5)
        self.stand(besieged, crowd, "50 clients send Pings and messages", 0.1)

    def test_pongs_and_empty_fragments(self) -> None:
        besieged = self.besiege()
        piece = support.masked_frame(0, fin=False) + support.masked_frame(10)
        crowd = self.start(besieged, 300, piece, support.masked_frame(1, fin=False))
        self.stand(besieged, crowd, "300 clients send Pongs and empty fragments", 0.5)

    def test_bursts_of_pongs(self) -> None:
        besieged = self.besiege()
        crowd = self.start(besieged, 100, support.masked_frame(10), pace=5e6, burst=0.5)
        self.stand(besieged, crowd, "100 clients send Pongs in bursts", 0.5)

    def test_tls_records_of_one_byte(self) -> None:
        besieged = self.besiege(tls=True)
        crowd = self.start(besieged, 50, load.frame(b"", 9), record=1)
        self.stand(besieged, crowd, "50 clients send records of one byte", 0.1)

    def test_tls_records_of_a_hundred_bytes(self) -> None:
        besieged = self.besiege(tls=True)
        crowd = self.start(besieged, 50, load.frame(bytes(94), 10), record=100)
        self.stand(besieged, crowd, "50 clients send records of 100 bytes", 0.1)


if __name__ == "__main__":
    unittest.main()

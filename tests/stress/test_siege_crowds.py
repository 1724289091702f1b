"""Thousands at once: whoever else is in the room must not notice when they come, leave, are cut off or say nothing.

Heavy: PYWEBSOCK_TESTS=siege, or everything.
"""

from __future__ import annotations

import time

from tests.tools import siege, stress, support


@siege.heavy
class CrowdTest(siege.SiegeTestCase):
    """All clients of a crowd do the same thing at the same moment."""

    def enter(self, number: int, worst: float) -> tuple[siege.Siege, siege.Crowd]:
        """A server with so many idle clients."""
        besieged = self.besiege()
        crowd = self.crowd(besieged)
        crowd.join(number)
        self.watch(besieged, f"{number} joined", worst)
        return besieged, crowd

    def test_resets(self) -> None:
        """A proxy restarts."""
        besieged, crowd = self.enter(5000, 0.5)
        crowd.reset()
        self.withstand(besieged, "5,000 resets", 0.5, within=90)

    def test_closes(self) -> None:
        """Everybody says goodbye."""
        besieged, crowd = self.enter(5000, 0.5)
        crowd.send(support.masked_frame(8, b"\x03\xe9"))
        ends = crowd.ends()
        self.assertEqual(dict(ends), {stress.GOING_AWAY: 5000})
        crowd.reset()
        self.withstand(besieged, "5,000 Close frames", 0.5, within=90)

    def test_pings(self) -> None:
        """Those who came together are silent together: all are pinged, and all answer."""
        besieged = self.besiege("--ping", "4")
        crowd = self.crowd(besieged)
        crowd.join(5000)
        self.watch(besieged, "5,000 joined")
        for _ in range(3):
            time.sleep(4)  # they are pinged, or will be in a moment
            crowd.send(support.masked_frame(10, b""))
        self.watch(besieged, "5,000 Pings and Pongs")
        self.assertNotIn(" left: ", besieged.log())
        crowd.reset()
        self.withstand(besieged, "their resets", 0.5, within=90)

    def test_resets_of_a_full_room(self) -> None:
        """Nearly as many as --max-clients allows."""
        besieged, crowd = self.enter(9900, 1.0)
        crowd.reset()
        self.withstand(besieged, "9,900 resets", 1.0, within=90)

    def test_silence(self) -> None:
        """Connections that say nothing, whose ten seconds end together."""
        besieged = self.besiege()
        crowd = self.crowd(besieged)
        crowd.connect(5000)
        self.watch(besieged, "5,000 connected")
        time.sleep(8)  # of the ten that they have
        self.assertEqual(dict(crowd.ends()), {b"ong\n": 5000}, "the request took too long")
        crowd.reset()
        self.withstand(besieged, "5,000 that said nothing", 0.5, within=90)

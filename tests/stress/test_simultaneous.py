"""Thousands at once: whoever else is in the room must not notice when they come, leave, are cut off or say nothing.

Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import time

from tests.tools import load, stress, support

JOINING = 0.5  # seconds that an echo may take while thousands shake hands


@stress.heavy
class CrowdTest(stress.StressTestCase):
    """All clients of a crowd do the same thing at the same moment."""

    def enter(self, number: int, *arguments: str) -> tuple[stress.WatchedServer, stress.Crowd, float]:
        """A server with so many idle clients, and how long others may wait when all of these do something.

        A tenth of a second. In so large a room each message of the witness itself takes a while, and it meets the one
        before it; where that is more than a tenth, as on a slow machine, it may be twice as much as without an attack.
        """
        watched = self.serve_watched(*arguments)
        crowd = self.crowd(watched)
        crowd.join(number)
        self.check_health(watched, f"{number} joined", JOINING)
        time.sleep(1)
        quiet = watched.witness.figures()
        self.report(f"worst echo {quiet.worst:.3f} s among {number} that do nothing")
        return watched, crowd, max(0.1, 2 * quiet.worst)

    def test_resets(self) -> None:
        """A proxy restarts."""
        watched, crowd, worst = self.enter(5000)
        crowd.reset()
        self.check_recovery(watched, "5,000 resets", worst, within=90)

    def test_closes(self) -> None:
        """Everybody says goodbye."""
        watched, crowd, worst = self.enter(5000)
        crowd.send(support.masked_frame(8, b"\x03\xe9"))
        ends = crowd.ends()
        self.assertEqual(dict(ends), {load.GOING_AWAY: 5000})
        crowd.reset()
        self.check_recovery(watched, "5,000 Close frames", worst, within=90)

    def test_pings(self) -> None:
        """Those who came together are silent together: all are pinged, and all answer."""
        watched, crowd, worst = self.enter(5000, "--ping", "8")
        crowd.send(support.masked_frame(10, b""))  # now they are silent together
        for _ in range(2):
            time.sleep(9)  # they are pinged
            crowd.send(support.masked_frame(10, b""))
        self.check_health(watched, "5,000 Pings and Pongs", worst)
        self.assertNotIn(" left: ", watched.log())
        pinged = [b"\x89\0" in stress.arrived(one) for one in crowd.sockets[:50]]
        self.assertEqual(pinged, [True] * 50)
        crowd.reset()
        self.check_recovery(watched, "their resets", worst, within=90)

    def test_waking_up(self) -> None:
        """All say something, and are answered."""
        watched, crowd, worst = self.enter(5000)
        crowd.send(support.masked_frame(9, b"awake"))
        self.check_health(watched, "5,000 wake up", worst)
        crowd.reset()
        self.check_recovery(watched, "their resets", worst, within=90)

    def test_resets_of_a_full_room(self) -> None:
        """Nearly as many as --max-clients allows."""
        watched, crowd, worst = self.enter(9900)
        crowd.reset()
        self.check_recovery(watched, "9,900 resets", 2 * worst, within=90)

    def test_silence(self) -> None:
        """Requests that do not end, whose ten seconds end together."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(5000)
        crowd.send(b"GET / HTTP/1.1\r\n")
        self.check_health(watched, "5,000 connected")
        time.sleep(8)  # of the ten that they have
        self.assertEqual(dict(crowd.ends()), {b"ong\n": 5000}, "the request took too long")
        crowd.reset()
        self.check_recovery(watched, "5,000 that said half a request", 0.5, within=90)

    def test_ends_of_half_requests(self) -> None:
        """Their connections are reset together, long before their time is up."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(5000)
        crowd.send(b"GET / HTTP/1.1\r\n")
        self.check_health(watched, "5,000 connected")
        crowd.reset()
        self.check_recovery(watched, "5,000 resets in the middle of a request", 0.5, within=90)

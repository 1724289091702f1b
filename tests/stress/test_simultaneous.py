"""Thousands of clients do the same at the same moment: join, leave, are reset, are silent. A witness must not notice.

Heavy: PYWEBSOCK_TESTS=everything.
"""

from __future__ import annotations

import time

from tests.tools import load, stress, support

JOINING = 0.5  # seconds that an echo may take during thousands of handshakes


@stress.heavy
class CrowdTest(stress.StressTestCase):
    """All clients of a crowd do the same at the same moment."""

    def enter(self, number: int, *arguments: str) -> tuple[stress.WatchedServer, stress.Crowd, float]:
        """Start a server with many idle clients; also return how long an echo may take when they all do something.

        That is a tenth of a second, or four times the slowest echo among idle clients, if that is more. An echo among
        idle clients takes one send for each client; if they all wake up, there is one more read and send for each.
        """
        watched = self.serve_watched(*arguments)
        crowd = self.crowd(watched)
        crowd.join(number)
        self.check_health(watched, f"{number} joined", JOINING)
        time.sleep(2)
        quiet = watched.witness.figures()
        self.report(f"worst echo {quiet.worst:.3f} s among {number} that do nothing")
        return watched, crowd, max(0.1, 4 * quiet.worst)

    def test_resets(self) -> None:
        """A proxy restarts."""
        watched, crowd, worst = self.enter(5000)
        crowd.reset()
        self.check_recovery(watched, "5,000 resets", worst, within=90)

    def test_closes(self) -> None:
        """All clients send a Close."""
        watched, crowd, worst = self.enter(5000)
        crowd.send(support.masked_frame(8, b"\x03\xe9"))
        ends = crowd.ends()
        self.assertEqual(dict(ends), {load.GOING_AWAY: 5000})
        crowd.reset()
        self.check_recovery(watched, "5,000 Close frames", worst, within=90)

    def test_pings(self) -> None:
        """All clients are silent at the same time, get a Ping, and answer it."""
        watched, crowd, worst = self.enter(5000, "--ping", "8")
        crowd.send(support.masked_frame(10, b""))  # now all are silent
        for _ in range(2):
            time.sleep(14)  # all get a Ping: after 8 s of silence, and some seconds for 5,000 checks in a busy room
            crowd.send(support.masked_frame(10, b""))
        self.check_health(watched, "5,000 Pings and Pongs", worst)
        self.assertNotIn(" left: ", watched.log())
        pinged = [b"\x89\0" in stress.arrived(one) for one in crowd.sockets[:50]]
        self.assertEqual(pinged, [True] * 50)
        crowd.reset()
        self.check_recovery(watched, "resets at the end", worst, within=90)

    def test_waking_up(self) -> None:
        """All clients send a Ping, and get a Pong."""
        watched, crowd, worst = self.enter(5000)
        crowd.send(support.masked_frame(9, b"awake"))
        crowd.receive(b"\x8a\x05awake")
        self.check_health(watched, "5,000 wake up", worst)
        crowd.reset()
        self.check_recovery(watched, "resets at the end", worst, within=90)

    def test_resets_of_a_full_room(self) -> None:
        """Nearly as many as --max-clients allows."""
        watched, crowd, worst = self.enter(9900)
        crowd.reset()
        self.check_recovery(watched, "9,900 resets", 2 * worst, within=90)

    def test_silence(self) -> None:
        """Requests that do not end, and reach the timeout at the same time."""
        watched = self.serve_watched(code="pywebsock.BroadcastServer.handshake_timeout = 5.0\n")
        crowd = self.crowd(watched)
        crowd.connect(5000)
        crowd.send(b"GET / HTTP/1.1\r\n")
        self.check_health(watched, "5,000 connected")
        time.sleep(3)  # of five
        self.assertEqual(dict(crowd.ends()), {b"ong\n": 5000}, "the request took too long")
        crowd.reset()
        self.check_recovery(watched, "5,000 incomplete requests", 0.5, within=90)

    def test_ends_of_half_requests(self) -> None:
        """Incomplete requests whose connections are reset at the same time, long before the timeout."""
        watched = self.serve_watched()
        crowd = self.crowd(watched)
        crowd.connect(5000)
        crowd.send(b"GET / HTTP/1.1\r\n")
        self.check_health(watched, "5,000 connected")
        crowd.reset()
        self.check_recovery(watched, "5,000 resets in the middle of a request", 0.5, within=90)

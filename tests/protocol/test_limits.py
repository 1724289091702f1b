"""Limits: messages a second (Pace, PostPace), and bytes that all connections share (Budget)."""

from __future__ import annotations

import contextlib
import unittest

from pywebsock import Budget, Pace, PostPace
from tests.tools.support import in_thread


class TokenBucket(unittest.TestCase):
    """Pace: a number of messages a second, with a burst of one second."""

    def take_all(self, pace: Pace, rate: float, now: float) -> int:
        """Take messages until the next must wait; return their number."""
        number = 0
        while not pace.wait_time(rate, now):
            pace.take(rate, now)
            number += 1
        return number

    def test_burst_and_pause(self) -> None:
        """The burst, and the delay of the next message."""
        for rate, burst, pause in (
            (0.25, 1, 4.0),
            (0.5, 1, 2.0),
            (1.0, 1, 1.0),
            (2.0, 2, 0.5),
            (2.5, 2, 0.2),
            (8.0, 8, 0.125),
            (1024.0, 1024, 1 / 1024),
        ):
            with self.subTest(rate=rate):
                pace = Pace()
                self.assertEqual(self.take_all(pace, rate, 1000.0), burst)
                self.assertAlmostEqual(pace.wait_time(rate, 1000.0), pause)
                self.assertAlmostEqual(pace.wait_time(rate, 1000.0 + pause / 2), pause / 2)

    def test_even_pace(self) -> None:
        """After the burst, one message in each period."""
        pace, rate, now = Pace(), 8.0, 1000.0
        self.take_all(pace, rate, now)
        for _ in range(100):
            now += 1 / rate
            self.assertEqual(self.take_all(pace, rate, now), 1)

    def test_silence(self) -> None:
        """A long silence allows no more than one burst."""
        pace, now = Pace(), 1000.0
        for silence, number in ((0.0, 8), (0.5, 4), (1.0, 8), (3600.0, 8), (0.25, 2)):
            now += silence
            self.assertEqual(self.take_all(pace, 8.0, now), number)

    def test_waiting_counts_nothing(self) -> None:
        pace = Pace()
        self.take_all(pace, 8.0, 1000.0)
        waits = {pace.wait_time(8.0, 1000.0) for _ in range(100)}
        self.assertEqual(waits, {0.125})


class Posts(unittest.TestCase):
    """PostPace: the messages a second of all POSTs together."""

    def test_refused_ones_count_nothing(self) -> None:
        pace = PostPace(20.0)
        for _ in range(500):
            pace.wait(0.0)
        self.assertTrue(pace.wait(1.0))  # it takes a twentieth of a second


class SharedBytes(unittest.TestCase):
    """Budget."""

    def test_up_to_its_size(self) -> None:
        """A refused reservation counts nothing."""
        budget = Budget(100)
        for size, fits in ((60, True), (41, False), (40, True), (1, False), (0, True)):
            self.assertEqual(budget.take(size), fits, size)
        budget.give_back(60)
        for size, fits in ((61, False), (60, True), (1, False)):
            self.assertEqual(budget.take(size), fits, size)

    def test_spare(self) -> None:
        """Bytes that this reservation must leave to others."""
        budget = Budget(100)
        for size, spare, fits in ((60, 41, False), (60, 40, True), (1, 40, False), (40, 0, True)):
            self.assertEqual(budget.take(size, spare), fits, (size, spare))

    def test_exceeded(self) -> None:
        """Forced reservations are released first."""
        budget = Budget(100)
        self.assertTrue(budget.take(150, force=True))
        for back, size, fits in (
            (0, 1, False),
            (50, 1, False),
            (10, 11, False),
            (0, 10, True),
            (100, 100, True),
            (0, 1, False),
        ):
            budget.give_back(back)
            self.assertEqual(budget.take(size), fits, (back, size))

    def test_many_threads(self) -> None:
        """All released bytes are available again."""
        budget = Budget(10)

        def take() -> None:
            for _ in range(2000):
                if budget.take(3):
                    budget.give_back(3)

        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(in_thread(take))
        self.assertEqual([budget.take(10), budget.take(1)], [True, False])


if __name__ == "__main__":
    unittest.main()

"""The turn: who waits for it, or leaves something to it that can wait. No server, no sockets."""

from __future__ import annotations

import time
import unittest
import unittest.mock

import pywebsock
from tests.tools.support import DEADLINE, in_thread
from tests.tools.turn import Successor, TurnTestCase, eager_switches


class Space(TurnTestCase):
    """Senders wait while too much is queued, or while deliver() asks for it."""

    def test_the_queue_is_full(self) -> None:
        """And has space again when half of it is gone: not at each message."""
        self.hand_over_after(-1)
        half = pywebsock.QUEUE_SIZE // 2
        for _ in range(3):
            self.turn.put(lambda: None, half)
        self.assertFalse(self.turn.has_space)
        self.assertFalse(self.turn.wait_for_space(0.01))
        self.turn.run()
        self.assertFalse(self.turn.has_space)
        self.take_over()
        self.assertFalse(self.turn.has_space)  # more than half of it, by what a message costs
        self.take_over()
        self.assertTrue(self.turn.has_space)
        self.assertTrue(self.turn.wait_for_space(DEADLINE))

    def test_the_successor_does_not_wait(self) -> None:
        """Without it, nobody would make space: what it says in a log may be broadcast."""
        self.take_over()
        self.turn.put("a", pywebsock.QUEUE_SIZE)
        self.assertFalse(self.turn.has_space)
        self.assertTrue(self.turn.wait_for_space(0))

    def test_who_waits_goes_on(self) -> None:
        self.turn.put("a", pywebsock.QUEUE_SIZE)
        with in_thread(self.turn.wait_for_space) as sender:
            sender.join(0.05)
            self.assertTrue(sender.is_alive())
            self.turn.run()

    def test_empty_messages_count(self) -> None:
        """Each takes memory, too."""
        for _ in range(pywebsock.QUEUE_SIZE // pywebsock.MESSAGE_COST + 1):
            self.turn.put("")
        self.assertFalse(self.turn.has_space)

    def test_a_client_is_behind(self) -> None:
        """The successor is called once, and says when they may go on."""
        self.should_wait = True
        self.say("a")
        self.say("b", lambda: None)
        self.assertEqual((self.turn.held, self.turn.has_space, self.wakes), (True, False, 1))
        self.turn.take_over(lambda: True)
        self.assertEqual((self.turn.held, self.turn.has_space), (True, False))
        self.take_over()
        self.assertEqual((self.turn.held, self.turn.has_space), (False, True))


class Soon(TurnTestCase):
    """What a hook says may wait for more to come, for a moment."""

    def test_more_comes(self) -> None:
        for message in "abc":
            self.turn.put(message)
            self.turn.soon()
        self.assertEqual((self.delivered, self.wakes), ([], 1))
        self.turn.run()
        self.assertEqual(self.delivered, [["a", "b", "c"]])

    def test_nobody_else_sees_to_it(self) -> None:
        self.turn.put("a")
        self.turn.soon()
        self.assertTrue(self.turn.look())
        self.assertEqual(self.delivered, [["a"]])

    def test_the_successor_sleeps_again(self) -> None:
        """When there was nothing for a while; the next soon() wakes it."""
        self.assertFalse(self.turn.look())
        self.turn.soon()
        self.assertEqual(self.looks(), pywebsock.MOMENTS)
        self.assertEqual(self.wakes, 1)
        self.turn.soon()
        self.assertEqual(self.wakes, 2)

    def test_a_while_begins_anew_when_something_came(self) -> None:
        self.turn.soon()
        for _ in range(pywebsock.MOMENTS // 2):
            self.turn.look()
        self.turn.put("a")
        self.assertEqual(self.looks(), pywebsock.MOMENTS + 1)

    def looks(self) -> int:
        """Be a successor that looks until it may sleep; how often."""
        looks = 1
        while self.turn.look() and looks < 10 * pywebsock.MOMENTS:
            looks += 1
        return looks

    def test_soon_at_the_successors_last_look(self) -> None:
        """It is seen by that look, or it wakes the successor."""

        class Late(pywebsock.Turn):
            """Somebody speaks while the last look is being counted."""

            @property
            def _looks(self) -> int:
                return int(self.__dict__["looks"])

            @_looks.setter
            def _looks(self, value: int) -> None:
                if value == 0:
                    self.put("late")
                    self.soon()
                self.__dict__["looks"] = value

        self.turn.__class__ = Late
        self.turn.__dict__["looks"] = 1
        self.turn.look()
        self.assertEqual(self.delivered, [["late"]])

    def test_soon_while_the_successor_is_about_to_sleep(self) -> None:
        """Ten thousand times: whatever is put is seen, by the look, or by the one that a wake-up brings."""
        one = unittest.mock.patch.object(pywebsock, "MOMENTS", 1)  # it is always about to sleep
        with one, Successor(self, pause=0.0), eager_switches():
            for number in range(10_000):
                self.turn.put(str(number))
                self.turn.soon()
                if number % 10 == 0:
                    self.wait_for(str(number))
            self.wait_for("9999")

    def wait_for(self, message: str) -> None:
        """Wait until it has been delivered."""
        end = time.monotonic() + DEADLINE
        while not self.delivered or self.delivered[-1][-1] != message:
            self.assertLess(time.monotonic(), end, f"{message} is left behind")
            time.sleep(0)

"""The turn: who carries out what was put, and that nothing is left behind. No server, no sockets."""

from __future__ import annotations

import logging
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.support import DEADLINE, in_thread
from tests.tools.turn import LateLock, Successor, TurnTestCase, eager_switches


class Order(TurnTestCase):
    """Operations are carried out one at a time, in the order in which they were put."""

    def test_messages_in_a_row_go_together(self) -> None:
        self.say("a", "b", lambda: self.delivered.append(["-"]), "c", "d")
        self.assertEqual(self.delivered, [["a", "b"], ["-"], ["c", "d"]])

    def test_many_bytes_are_not_one_run(self) -> None:
        """The first client of a long run would get everything before the last one gets anything."""
        for message in "abcde":
            self.turn.put(message, pywebsock.RUN_SIZE // 2)
        self.turn.run()
        self.assertEqual(self.delivered, [["a", "b"], ["c", "d"], ["e"]])

    def test_put_alone_does_nothing(self) -> None:
        self.turn.put("a")
        self.assertEqual(self.delivered, [])
        self.turn.run()
        self.assertEqual(self.delivered, [["a"]])

    def test_what_an_operation_puts_comes_later(self) -> None:
        """A log that is itself broadcast: the holder puts, runs, and does not wait for itself."""

        def speak() -> None:
            self.say("later")
            self.assertTrue(self.turn.wait_for_space(DEADLINE))
            self.delivered.append(["now"])

        with unittest.mock.patch.object(pywebsock, "QUEUE_SIZE", 0):  # there is no space at all
            self.say(speak, "next")
        self.assertEqual(self.delivered, [["now"], ["next", "later"]])

    def test_one_at_a_time(self) -> None:
        """Threads that put and run at the same time: one order for all, each thread's own within it."""
        inside = threading.Lock()
        done: list[tuple[int, int]] = []

        def work(name: int) -> None:
            def operation(number: int) -> None:
                self.assertTrue(inside.acquire(blocking=False), "two at a time")
                done.append((name, number))
                inside.release()

            for number in range(2000):
                self.say(lambda number=number: operation(number))

        with Successor(self), eager_switches():
            threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(DEADLINE)
        for name in range(4):
            self.assertEqual([number for who, number in done if who == name], list(range(2000)))


class HandOver(TurnTestCase):
    """Whoever holds the turn carries out what others put, but not for ever."""

    def setUp(self) -> None:
        super().setUp()
        self.begun, self.go_on = threading.Event(), threading.Event()

    def hold(self) -> None:
        """An operation that takes as long as the test wants."""
        self.begun.set()
        self.assertTrue(self.go_on.wait(DEADLINE))

    def held(self) -> typing.ContextManager[threading.Thread]:
        """Another thread has the turn, and keeps it until `go_on`."""
        context = in_thread(self.say, self.hold)
        self.addCleanup(self.go_on.set)
        return context

    def test_nobody_waits_for_a_slow_holder(self) -> None:
        with self.held():
            self.assertTrue(self.begun.wait(DEADLINE))
            self.say("a")  # returns
            self.assertEqual(self.delivered, [])
            self.go_on.set()
        self.assertEqual(self.delivered, [["a"]])

    def test_who_waits_gets_it_next(self) -> None:
        """A flood of tiny messages: its thread waits for the turn, and does its share of the work."""
        with unittest.mock.patch.object(pywebsock, "TURN_TIME", DEADLINE), self.held():
            self.assertTrue(self.begun.wait(DEADLINE))
            with in_thread(self.turn.run, True) as other:
                self.turn.put("a")
                other.join(0.05)
                self.assertTrue(other.is_alive())
                self.go_on.set()
        self.assertEqual(self.delivered, [["a"]])

    def test_the_holder_waits_for_itself_only_a_moment(self) -> None:
        """The garbage collector, in the middle of an operation, finds a client that closes itself."""
        with in_thread(self.say, lambda: self.turn.run(wait=True), "a"):
            pass
        self.assertEqual(self.delivered, [["a"]])

    def test_crowded(self) -> None:
        """So much is queued that whoever puts more should wait."""
        for _ in range(pywebsock.CROWD):
            self.turn.put(lambda: None)
        self.assertFalse(self.turn.is_crowded)
        self.turn.put(lambda: None)
        self.assertTrue(self.turn.is_crowded)
        self.turn.run()
        self.assertFalse(self.turn.is_crowded)

    def test_promised_to_the_successor(self) -> None:
        """After its time the holder stops; nobody but the successor goes on."""
        self.hand_over_after(-1)
        self.say(lambda: None, "a")
        self.assertEqual((self.turn.promised, self.wakes, self.delivered), (True, 1, []))
        self.say("b")
        self.assertEqual(self.delivered, [])
        self.take_over()
        self.assertEqual((self.turn.promised, self.delivered), (False, [["a", "b"]]))

    def test_the_successor_does_its_own_work_first(self) -> None:
        self.turn.put("a")
        self.turn.take_over(lambda: self.deliver(["work"]))
        self.assertEqual(self.delivered, [["work"], ["a"]])

    def test_the_successor_waits_for_the_holder(self) -> None:
        with self.held():
            self.assertTrue(self.begun.wait(DEADLINE))
            with in_thread(self.take_over) as successor:
                successor.join(0.05)
                self.assertTrue(successor.is_alive())
                self.assertTrue(self.turn.promised)  # nobody else takes the turn before it
                self.say("a")
                self.go_on.set()
        self.assertEqual(self.delivered, [["a"]])

    def test_work_without_end(self) -> None:
        """Even where others never stop putting, a holder gets back to its own client, and the successor to its work."""

        self.hand_over_after(0.001)
        end = time.monotonic() + 2

        def again() -> None:
            if time.monotonic() < end:
                self.turn.put(again)

        self.say(again)
        for _ in range(3):
            self.assertTrue(self.turn.promised)
            self.take_over()
        self.assertLess(time.monotonic(), end)
        self.assertEqual(self.wakes, 4)


class LastLook(TurnTestCase):
    """What is put after the holder's last look, and before it has released the lock, is not left behind."""

    def setUp(self) -> None:
        super().setUp()
        self.turn._lock = self.lock = LateLock()  # type: ignore[assignment]
        self.lock.at_release = self.another

    def another(self) -> None:
        """Another thread puts something: it cannot have the lock, so it goes its way."""
        thread = threading.Thread(target=self.say, args=("late",))
        thread.start()
        thread.join(DEADLINE)
        self.assertFalse(thread.is_alive())
        self.assertNotIn(["late"], self.delivered)

    def test_of_a_run(self) -> None:
        self.say("a")
        self.assertEqual(self.delivered, [["a"], ["late"]])

    def test_of_a_run_that_waits(self) -> None:
        self.turn.put("a")
        self.turn.run(wait=True)
        self.assertEqual(self.delivered, [["a"], ["late"]])

    def test_of_the_successor(self) -> None:
        self.take_over()
        self.assertEqual(self.delivered, [["late"]])

    def test_of_one_that_fails(self) -> None:
        """Whatever an operation raises."""

        def fail() -> None:
            raise KeyboardInterrupt

        self.turn.put(fail)
        self.turn.put("a")
        with self.assertRaises(KeyboardInterrupt):
            self.turn.run()
        self.assertTrue(self.turn.promised)
        self.take_over()
        self.assertEqual(self.delivered, [["a", "late"]])


class Retired(TurnTestCase):
    """In the end there is no successor."""

    def test_nothing_is_promised(self) -> None:
        self.hand_over_after(-1)
        self.turn.retire()
        self.say(lambda: None, lambda: None, "a")
        self.assertEqual((self.turn.promised, self.wakes, self.delivered), (False, 0, [["a"]]))

    def test_what_was_promised_is_carried_out(self) -> None:
        self.hand_over_after(-1)
        self.say(lambda: None, lambda: None, "a")
        self.assertEqual((self.turn.promised, self.delivered), (True, []))
        self.turn.retire()
        self.assertEqual((self.turn.promised, self.delivered), (False, [["a"]]))

    def test_senders_wait_no_more(self) -> None:
        self.should_wait = True
        self.say("a")
        self.assertFalse(self.turn.has_space)
        self.turn.retire()
        self.assertTrue(self.turn.has_space)
        self.say("b")
        self.assertTrue(self.turn.has_space)


class Errors(TurnTestCase):
    """An operation that raises anything: what follows is not to blame, and the turn is free."""

    def check(self, error: BaseException, *, delivering: bool = False) -> None:
        """Raise it in an operation, or in delivering a message; all else is carried out, and all is as before."""

        def fail(*_: object) -> bool:
            raise error

        good = self.turn._deliver
        if delivering:
            self.turn._deliver = fail
            self.turn.put("lost", pywebsock.QUEUE_SIZE)
        else:
            self.turn.put(fail, pywebsock.QUEUE_SIZE)
        self.turn.put(lambda: setattr(self.turn, "_deliver", good))
        self.turn.put("a")
        self.assertFalse(self.turn.has_space)
        try:
            self.turn.run()
        except BaseException as raised:
            if isinstance(error, Exception):
                raise
            self.assertIs(raised, error)
            self.assertTrue(self.turn.promised)
            self.take_over()
        else:
            self.assertIsInstance(error, Exception)
        self.assertEqual(self.delivered, [["a"]])
        self.assertEqual((self.turn._size, self.turn._holder, self.turn._lock.locked()), (0, 0, False))
        self.assertTrue(self.turn.has_space)
        self.say("b")
        self.assertEqual(self.delivered, [["a"], ["b"]])

    def test_exception(self) -> None:
        """Is logged, with its traceback."""
        for error in (LookupError("a mistake"), MemoryError("a mistake")):
            for delivering in (False, True):
                with self.subTest(error=error, delivering=delivering), self.assertLogs("pywebsock", "ERROR") as logged:
                    self.setUp()
                    self.check(error, delivering=delivering)
                self.assertEqual(len(logged.records), 1)
                self.assertIn("Traceback", logged.output[0])
                self.assertIn(f"{type(error).__name__}: a mistake", logged.output[0])

    def test_is_logged_when_the_turn_is_free(self) -> None:
        """Whoever reads the log may broadcast it, and wait until there is space."""
        free: list[bool] = []

        class Reader(logging.Handler):
            """Looks when the record comes."""

            def emit(self, record: logging.LogRecord) -> None:
                free.append(not lock.locked())

        lock, reader = self.turn._lock, Reader()
        pywebsock.log.addHandler(reader)
        self.addCleanup(pywebsock.log.removeHandler, reader)
        self.say(self.fail, "a")
        self.turn.put(self.fail)
        self.take_over()
        self.assertEqual((free, self.delivered), ([True, True], [["a"]]))

    def test_what_no_operation_should_raise(self) -> None:
        """Ctrl-C may strike the main thread in the turn."""
        for error in (KeyboardInterrupt(), SystemExit(1), GeneratorExit()):
            for delivering in (False, True):
                with self.subTest(error=error, delivering=delivering):
                    self.setUp()
                    self.check(error, delivering=delivering)

    def test_in_the_successors_own_work(self) -> None:
        """The queue is carried out, and the turn is free."""

        def fail() -> bool:
            raise LookupError

        self.turn.put("a")
        with self.assertRaises(LookupError):
            self.turn.take_over(fail)
        self.assertEqual((self.delivered, self.turn._lock.locked(), self.turn.promised), ([["a"]], False, False))
        self.assertEqual(self.turn._holder, 0)


class NothingIsLeftBehind(TurnTestCase):
    """Ten thousand times, with threads that switch as often as they can."""

    TIMES = 10_000

    def check(self, threads: int, *, wait: bool = False) -> None:
        """All put and run at the same moment; when all have come back, all must be done, or promised."""
        start, end = threading.Barrier(threads + 1, timeout=DEADLINE), threading.Barrier(threads + 1, timeout=DEADLINE)
        self.done = 0

        def count() -> None:
            self.done += 1

        def work() -> None:
            for _ in range(self.TIMES // threads):
                start.wait()
                self.turn.put(count)
                self.turn.run(wait)
                end.wait()

        with eager_switches():
            workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for number in range(1, self.TIMES // threads + 1):
                start.wait()
                end.wait()
                for _ in range(threads):
                    if self.turn.promised:
                        self.take_over()
                self.assertEqual(self.done, number * threads)
        self.assertEqual(self.turn._size, 0)

    def test_two_threads(self) -> None:
        self.check(2)

    def test_two_threads_that_wait(self) -> None:
        self.check(2, wait=True)

    def test_many_threads_that_hand_over(self) -> None:
        self.hand_over_after(-1)
        self.check(8)

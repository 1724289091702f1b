"""The threads that run hooks: one order for each client, one thread while no hook blocks. There is no server."""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import random
import threading
import time
import typing
import unittest
import unittest.mock

import pywebsock
from tests.tools.support import DEADLINE, IS_WINE, eventually, in_thread


class HooksTestCase(unittest.TestCase):
    """The test does the work of the loop, which starts a thread in place of a blocked one."""

    def setUp(self) -> None:
        self.hooks = pywebsock.Hooks()
        self.go_on = threading.Event()  # ends all calls that block
        self.addCleanup(self.stop)

    def stop(self) -> None:
        """End all threads."""
        self.go_on.set()
        self.wait()
        self.hooks.stop()
        eventually(lambda: not self.workers())

    def workers(self) -> list[threading.Thread]:
        """Return the hook threads."""
        return [thread for thread in threading.enumerate() if thread.name == "pywebsock hooks"]

    def wait(self, number: int = 0) -> None:
        """Relieve workers, as the loop does, until at most this number of inboxes is busy."""

        def done() -> bool:
            self.hooks.relieve()
            return self.hooks.busy <= number

        eventually(done)

    def relieve_until(self, condition: typing.Callable[[], object]) -> None:
        """Relieve workers until a condition holds."""

        def holds() -> object:
            self.hooks.relieve()
            return condition()

        eventually(holds)

    def block(self) -> pywebsock.Inbox:
        """Return an inbox whose call has started, and blocks until `go_on`."""
        begun, inbox = threading.Event(), pywebsock.Inbox()

        def call() -> None:
            begun.set()
            self.go_on.wait(2 * DEADLINE)

        self.hooks.submit(inbox, call)
        self.relieve_until(begun.is_set)
        return inbox


class Order(HooksTestCase):
    """The calls of one inbox run one at a time, in the order of submission."""

    def test_many_inboxes(self) -> None:
        """Several threads submit, and some calls block."""
        inboxes = [pywebsock.Inbox() for _ in range(20)]
        ran: dict[int, list[int]] = collections.defaultdict(list)
        running: set[int] = set()
        together: list[int] = []

        def call(which: int, number: int) -> None:
            if which in running:
                together.append(which)
            running.add(which)
            ran[which].append(number)
            if number % 50 == which:
                time.sleep(0.002)
            running.discard(which)

        def submit(which: int) -> None:
            for number in range(200):
                self.hooks.submit(inboxes[which], lambda number=number: call(which, number))  # type: ignore[misc]

        with contextlib.ExitStack() as stack:
            for which in range(20):
                stack.enter_context(in_thread(submit, which))
        self.wait()
        self.assertEqual(ran, {which: list(range(200)) for which in range(20)})
        self.assertEqual(together, [])

    def test_after_a_call_that_blocks(self) -> None:
        """The next call of an inbox waits for a blocked one, even if there are free workers."""
        ran: list[str] = []
        inbox = self.block()
        self.hooks.submit(inbox, lambda: ran.append("next"))
        self.hooks.submit(pywebsock.Inbox(), lambda: ran.append("another"))
        self.relieve_until(lambda: ran)
        self.wait(1)
        self.assertEqual(ran, ["another"])
        self.go_on.set()
        self.wait()
        self.assertEqual(ran, ["another", "next"])

    def test_a_call_submits(self) -> None:
        """A call that a call submits to its own inbox runs after those that wait already."""
        ran: list[int] = []
        inbox = self.block()
        self.hooks.submit(inbox, lambda: self.hooks.submit(inbox, lambda: ran.append(2)))
        self.hooks.submit(inbox, lambda: ran.append(1))
        self.go_on.set()
        self.wait()
        self.assertEqual(ran, [1, 2])

    def test_turns(self) -> None:
        """An inbox with many calls lets others go on after some time."""
        heard: list[str] = []
        long, short = pywebsock.Inbox(), pywebsock.Inbox()

        def call() -> None:
            time.sleep(0.001)
            heard.append("long")

        with self.hooks.lock:
            for _ in range(20):
                self.hooks.submit(long, call)
            self.hooks.submit(short, lambda: heard.append("short"))
        eventually(lambda: len(heard) == 21)  # nobody relieves the worker
        self.assertLess(heard.index("short"), 15)

    def test_pending_connections(self) -> None:
        """Calls of pending connections and of clients take turns: thousands of the former delay no client."""
        ran: list[str] = []
        with unittest.mock.patch.object(pywebsock, "STUCK_TIME", DEADLINE):  # there is one worker
            self.block()
            for name, is_pending in [("pending", True)] * 3 + [("client", False)] * 2:
                self.hooks.submit(pywebsock.Inbox(is_pending), functools.partial(ran.append, name))
            self.assertTrue(self.hooks.is_waiting)
            self.go_on.set()
            self.wait()
        self.assertIn(
            ran,
            (
                ["client", "pending", "client", "pending", "pending"],
                ["pending", "client", "pending", "client", "pending"],
            ),
        )

    def test_handshakes_of_tls(self) -> None:
        """Calls of pending connections may have more workers, calls of clients may not."""
        for is_pending in (True, False):
            hooks, begun = pywebsock.Hooks(most_workers=2), list[int]()
            self.addCleanup(hooks.stop)
            go_on = threading.Event()

            def block(begun: list[int] = begun, go_on: threading.Event = go_on) -> None:
                begun.append(1)
                go_on.wait(DEADLINE)

            for _ in range(3):
                hooks.submit(pywebsock.Inbox(is_pending), block)
            eventually(lambda begun=begun, most=1 + is_pending: len(begun) == most)  # type: ignore[misc]
            self.assertEqual(hooks._active, 1 + is_pending)
            go_on.set()
            hooks.wait(0, time.monotonic() + DEADLINE)
            self.assertEqual(len(begun), 3)

    def test_any_exception(self) -> None:
        """An exception in a call ends neither the worker nor the calls after it."""
        ran: list[int] = []
        inbox = pywebsock.Inbox()

        def call(number: int) -> None:
            ran.append(number)
            raise (SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, LookupError)[number % 5]

        for number in range(50):
            self.hooks.submit(inbox, lambda number=number: call(number))  # type: ignore[misc]
        self.wait()
        self.assertEqual(ran, list(range(50)))
        self.assertLessEqual(len(self.workers()), 1)


class Workers(HooksTestCase):
    """The number of threads."""

    def test_one_while_no_call_blocks(self) -> None:
        """One thread runs all calls, also after a pause; a thread that is starting counts."""
        for _ in range(50):
            self.hooks = pywebsock.Hooks()
            threads: set[int] = set()
            for _ in range(5):
                for _ in range(20):
                    self.hooks.submit(pywebsock.Inbox(), lambda threads=threads: threads.add(threading.get_ident()))  # type: ignore[misc]
                self.hooks.wait(0, time.monotonic() + DEADLINE)
            self.assertEqual(len(threads), 1)
            self.hooks.stop()

    def test_a_thread_between_two_calls(self) -> None:
        """A thread that has ended its work, and ends late, gets the next call."""
        late, go_on, ran = threading.Event(), threading.Event(), list[int]()
        wait_for_wake_up = self.hooks._wait_for_wake_up

        def wait_late() -> bool:
            late.set()
            go_on.wait(DEADLINE)
            return wait_for_wake_up()

        with unittest.mock.patch.object(self.hooks, "_wait_for_wake_up", wait_late):
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(1))
            self.assertTrue(late.wait(DEADLINE))
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(2))
            self.assertEqual(len(self.workers()), 1)
            go_on.set()
            eventually(lambda: ran == [1, 2])

    def test_none_without_work(self) -> None:
        self.assertEqual(self.workers(), [])
        with unittest.mock.patch.object(pywebsock, "IDLE_TIME", 0.01):
            self.hooks.submit(pywebsock.Inbox(), lambda: None)
            eventually(lambda: not self.hooks.busy and not self.workers())
            ran: list[int] = []
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(1))
            eventually(lambda: ran)

    def test_woken_at_its_timeout(self) -> None:
        """A worker that is woken at the moment of its timeout does the work."""
        chance = random.Random(1)
        ran: list[int] = []
        with unittest.mock.patch.object(pywebsock, "IDLE_TIME", 0.0005):
            for number in range(1000):
                self.hooks.submit(pywebsock.Inbox(), lambda number=number: ran.append(number))  # type: ignore[misc]
                end = time.monotonic() + chance.uniform(0, 0.001)
                while time.monotonic() < end:
                    pass
            eventually(lambda: len(ran) == 1000 and not self.hooks.busy)  # without relief
        self.assertEqual(self.hooks._coming, 0)

    def test_relief(self) -> None:
        """The loop replaces a blocked worker, but not if its call is new."""
        ran: list[int] = []
        with unittest.mock.patch.object(pywebsock, "STUCK_TIME", DEADLINE):
            self.block()
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(1))
            self.assertTrue(self.hooks.is_waiting)
            for _ in range(10):
                self.hooks.relieve()
            self.assertEqual((ran, len(self.workers())), ([], 1))
        self.relieve_until(lambda: ran)
        eventually(lambda: not self.hooks.is_waiting)
        self.assertEqual(len(self.workers()), 2)

    def test_blocked_worker_goes_on(self) -> None:
        """A worker counts again after its call has blocked; then no other is needed."""
        self.block()
        self.relieve_until(lambda: self.hooks._stuck)
        self.go_on.set()
        self.wait()
        eventually(lambda: not self.hooks._running)
        self.assertEqual((self.hooks._stuck, self.hooks._active), (set(), 0))
        threads: set[int] = set()
        for _ in range(100):
            self.hooks.submit(pywebsock.Inbox(), lambda: threads.add(threading.get_ident()))
        self.hooks.wait(0, time.monotonic() + DEADLINE)
        self.assertEqual(len(threads), 1)

    def test_after_a_blocked_call(self) -> None:
        """A worker whose call has blocked counts again before the next call of the same inbox."""
        begun, held, inbox, stuck = threading.Event(), threading.Event(), pywebsock.Inbox(), []
        self.hooks.submit(inbox, lambda: held.wait(DEADLINE))
        self.hooks.submit(inbox, lambda: begun.set() or self.go_on.wait(DEADLINE))  # type: ignore[func-returns-value]
        self.hooks.submit(inbox, lambda: stuck.append(len(self.hooks._stuck)))
        held.set()
        self.relieve_until(lambda: begun.is_set() and self.hooks._stuck)
        self.go_on.set()
        eventually(lambda: stuck)  # without relief
        self.assertEqual(stuck, [0])

    def test_threads_that_wait_for_the_loop(self) -> None:
        """A call that waits for the loop is not stuck."""
        threads: list[int] = []

        def wait() -> None:
            threads.append(threading.get_ident())
            self.go_on.wait(DEADLINE)

        self.hooks.submit(pywebsock.Inbox(), wait)
        eventually(lambda: threads)
        time.sleep(2 * pywebsock.STUCK_TIME)
        self.hooks.relieve(set(threads))
        self.assertEqual(self.hooks._stuck, set())
        self.hooks.relieve()
        self.assertEqual(self.hooks._stuck, set(threads))

    def test_many_that_block(self) -> None:
        """Many calls block at once, and one more runs; then all of their threads end."""
        number = 100 if IS_WINE else 300  # threads; Wine needs long for each
        begun: list[int] = []

        def block() -> None:
            begun.append(1)
            self.go_on.wait(2 * DEADLINE)

        before = threading.stack_size(256 * 1024)
        try:
            for _ in range(number):
                self.hooks.submit(pywebsock.Inbox(), block)
            self.relieve_until(lambda: len(begun) == number)
            ran: list[int] = []
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(1))
            self.relieve_until(lambda: ran)
        finally:
            threading.stack_size(before)
        self.go_on.set()
        self.wait()
        self.hooks.stop()
        eventually(lambda: not self.workers())

    def test_no_more_threads(self) -> None:
        """If no thread can be started, the calls wait until that is possible."""
        ran: list[int] = []
        with unittest.mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(1))
            self.hooks.relieve()
        self.assertEqual((ran, self.hooks.is_waiting, self.hooks._coming), ([], True, 0))
        self.relieve_until(lambda: ran)

    def test_relief_of_many(self) -> None:
        """The more calls block, the more workers start at once."""
        begun: list[int] = []

        def block() -> None:
            begun.append(1)
            self.go_on.wait(2 * DEADLINE)

        for _ in range(15):
            self.hooks.submit(pywebsock.Inbox(), block)
        for number in (1, 3, 7, 15):
            eventually(lambda most=number: len(begun) == most)  # type: ignore[misc]
            for worker in self.hooks._running:  # all have begun a second ago
                self.hooks._running[worker] -= 1
            self.hooks.relieve()

    def test_wait_has_an_end(self) -> None:
        """Waiting for all inboxes except one ends at the deadline."""
        for _ in range(2):
            self.block()
        start = time.monotonic()
        self.hooks.wait(2, start + DEADLINE)
        self.hooks.wait(1, start + 0.05)
        self.assertLess(time.monotonic() - start, DEADLINE / 2)
        self.assertEqual(self.hooks.busy, 2)

    def test_stop(self) -> None:
        """Workers end: idle ones at once, busy ones after their call."""
        inbox = self.block()
        ran: list[int] = []
        with unittest.mock.patch.object(pywebsock, "IDLE_TIME", 2 * DEADLINE):
            self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(1))
            self.relieve_until(lambda: ran)
            self.wait(1)
            eventually(lambda: self.hooks._idle)
        self.hooks.stop()
        eventually(lambda: len(self.workers()) == 1)
        self.hooks.submit(inbox, lambda: ran.append(2))
        self.hooks.submit(pywebsock.Inbox(), lambda: ran.append(3))
        self.go_on.set()
        eventually(lambda: not self.workers() and not self.hooks.busy)
        self.assertEqual(sorted(ran), [1, 2, 3])


class Journal(HooksTestCase):
    """A worker writes log lines in order; if too many wait, the newest are dropped."""

    def test_order(self) -> None:
        log = logging.getLogger("pywebsock")
        with self.assertLogs(log, "INFO") as logged:
            for number in range(100):
                self.hooks.log(logging.INFO, "line %d", number)
                self.hooks.log(logging.DEBUG, "none")
            self.wait()
        self.assertEqual([record.getMessage() for record in logged.records], [f"line {i}" for i in range(100)])
        self.assertNotIn(threading.get_ident(), {record.thread for record in logged.records})

    def test_too_many(self) -> None:
        held = threading.Event()
        self.hooks.submit(self.hooks._journal, lambda: held.wait(DEADLINE))
        eventually(lambda: not self.hooks._journal.calls)  # it runs
        limit = unittest.mock.patch.object(pywebsock, "MAX_JOURNAL", 200)
        with limit, self.assertLogs("pywebsock", "INFO") as logged:
            for number in range(300):
                self.hooks.log(logging.INFO, "line %d", number)
            held.set()
            self.wait()
        self.assertEqual([record.getMessage() for record in logged.records], [f"line {i}" for i in range(200)])


if __name__ == "__main__":
    unittest.main()

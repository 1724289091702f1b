"""What the tests of the turn share: one that writes down what it carries out, a successor, a lock that is late."""

from __future__ import annotations

import contextlib
import sys
import threading
import typing
import unittest

import pywebsock
from tests.tools.support import DEADLINE


class TurnTestCase(unittest.TestCase):
    """A turn that writes down what it carries out; who succeeds in it is up to the test."""

    def setUp(self) -> None:
        self.delivered: list[list[str]] = []
        self.wakes = 0
        self.should_wait = False  # what deliver() says
        self.turn = pywebsock.Turn(self.deliver, self.wake)
        self.hand_over_after(DEADLINE)

    def deliver(self, messages: list[str]) -> bool:
        """Messages, carried out."""
        self.delivered.append(messages)
        return self.should_wait

    def wake(self) -> None:
        """The successor is called."""
        self.wakes += 1

    def say(self, *operations: typing.Any) -> None:
        """Put some operations, and see to it that they are carried out."""
        for operation in operations:
            self.turn.put(operation)
        self.turn.run()

    def hand_over_after(self, seconds: float) -> None:
        """Let each holder hand over after so many seconds; after one operation where that is less than none."""
        carry_out = pywebsock.Turn._carry_out
        self.turn._carry_out = lambda _=0.0: carry_out(self.turn, seconds)  # type: ignore[method-assign, assignment]

    def take_over(self) -> None:
        """Be the successor, without any work of its own, once."""
        self.turn.take_over(lambda: False)


class LateLock:
    """A lock with something that is done just before its first release."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.at_release: typing.Callable[[], None] | None = None
        self.acquire, self.locked = self._lock.acquire, self._lock.locked

    def release(self) -> None:
        """The holder's last look is behind it."""
        act, self.at_release = self.at_release, None
        if act:
            act()
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Successor:
    """A thread that does what the housekeeper does with the turn, and nothing else."""

    def __init__(self, test: TurnTestCase, pause: float = 0.001) -> None:
        self._turn, self._pause = test.turn, pause
        self._woken, self._ended = threading.Event(), False
        self._turn._wake = self._woken.set
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self._ended:
            self._woken.wait(self._pause if self._turn.look() else DEADLINE)
            self._woken.clear()
            if self._turn.promised or self._turn.held:
                self._turn.take_over(lambda: False)

    def __enter__(self) -> Successor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._woken.set()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        self._turn.retire()


@contextlib.contextmanager
def eager_switches() -> typing.Iterator[None]:
    """Threads switch after a microsecond, and not after five thousand."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)

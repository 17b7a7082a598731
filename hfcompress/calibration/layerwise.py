"""Forwards that stop in the middle, so that a model can be changed layer by layer with each layer run once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class _Unwind(BaseException):
    """Raised where a run has stopped, to leave it."""


class Paused:
    """A run in a thread of its own that stops wherever it calls `pause`, and goes on when told to `step`.

    One thread at a time runs, this or the caller's, so nothing needs a lock and the order of everything is fixed. Generators
    would do the same, but a hook deep inside a forward can't yield.
    """

    def __init__(self, run: Callable[[Callable[[Any], None]], None]) -> None:
        self._run = run
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._said: Any = None
        self._error: BaseException | None = None
        self._is_leaving = False
        self.is_done = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def step(self) -> Any:
        """Go on to the next pause, and tell what it says; None when the run is over. What the run raises is raised here."""
        if self.is_done:
            return None
        self._said = None
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._said

    def leave(self) -> None:
        """Unwind a run that nobody needs any more."""
        self._is_leaving = True
        while not self.is_done:
            self._go.release()
            self._stopped.acquire()
        self._thread.join()

    def _pause(self, said: Any) -> None:
        self._said = said
        self._stopped.release()
        self._go.acquire()
        if self._is_leaving:
            raise _Unwind

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._is_leaving:
                self._run(self._pause)
        except _Unwind:
            pass
        except BaseException as error:
            self._error = error
        self.is_done = True
        self._stopped.release()

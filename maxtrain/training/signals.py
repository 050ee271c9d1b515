"""SIGTERM and SIGINT. Imports the standard library alone, so that they are obeyed before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from maxtrain.parallel.peers import leave

STOPPED, SECOND_SIGNAL = 75, 130
"""Exit codes: a signal stopped the run, and the same command resumes it; a second signal ended it at once."""


class StopSignal:
    """Whether SIGTERM or SIGINT has asked this process to stop, and which.

    A command (`leaves`) has nothing to save before its first step and leaves at once until then, as it does at a second signal.
    Python's handlers are too late for that: they wait until the main thread comes back from C++, where a compilation takes
    minutes, and an exception that they raise there is swallowed. So the interpreter also writes the number into a pipe that
    a thread reads. In a library the first signal is remembered, and the second one finds the handlers of before.
    """

    def __init__(self, leaves: bool = False) -> None:
        self.name: str | None = None
        """The signal's name, None before it."""
        self.leaves = leaves
        self.stepping = False
        """Whether a step has been dispatched."""
        self.farewell: Callable[[], None] = lambda: None
        """Called before this process leaves at once."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if self._before or threading.current_thread() is not threading.main_thread():
            return self
        if self.leaves:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.leaves:  # a command obeys to its end
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if not self.leaves:
            signal.signal(number, self._before[number])

    def _watch(self, reader: int) -> None:
        count = 0
        while True:
            number = os.read(reader, 1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            count, name = count + 1, signal.Signals(number).name
            self.name = self.name or name
            if count > 1:
                leave(SECOND_SIGNAL, f"ended by {name}, a second signal; the same command goes on from the last complete checkpoint")
            if not self.stepping:
                self.farewell()
                leave(STOPPED, f"stopped by {name} before the first step: nothing is lost, the same command starts again")

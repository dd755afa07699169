"""Signals that wait until work that must be whole is whole."""

from __future__ import annotations

import signal
import threading
from typing import Any


class DeferredSignals:
    """Hold back Ctrl-C and SIGTERM until the batch under way is whole; ``act`` then does what they asked for.

    A second Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def act(self) -> None:
        """Do what was held back, if anything was; the run it interrupted never goes on."""
        if not self.asked:
            return
        if self.asked != signal.SIGINT:
            signal.raise_signal(self.asked)
        raise KeyboardInterrupt

"""Ctrl-C and a request to terminate: the current layer or step is finished first, the second time nothing is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """Work ended where a signal asked it to.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stop:
    """Whether somebody has asked to stop; whoever works calls :meth:`check` where the work can be left.

    Args:
        notice: Called at the first request, with what to tell.
    """

    def __init__(self, notice: Callable[[str], None] | None = None) -> None:
        self._notice = notice
        self._asked: int | None = None

    def check(self) -> None:
        """Stop here if that was asked.

        Raises:
            Stopped: It was.
        """
        if self._asked is not None:
            raise Stopped(self._asked)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the process's signals meanwhile; not outside the main thread, nor those that it ignores."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, self._take)
        try:
            yield
        finally:
            for taken, handler in before.items():
                signal.signal(taken, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if self._asked is not None:
            raise Stopped(number)
        self._asked = number
        if self._notice is not None:
            self._notice("Stopping after the current layer or step; once more stops at once.")

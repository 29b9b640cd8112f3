"""Breaking into a test: an exception raised in the main thread from another one, whatever the main thread does.

It takes a real-time signal of its own, as SIGALRM is pytest-timeout's and the lower ones are a test's to use. A signal
ends a blocked system call or wait of the main thread, and its handler's exception goes on from there.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = ["Interrupter"]

SIGNAL: Final = signal.SIGRTMIN + 11


class Interrupter:
    """Raises exceptions in the main thread, in windows that the main thread opens."""

    def __init__(self) -> None:
        """Do nothing yet: the signal is taken when the first window opens."""
        self._depth = 0
        self._pending: BaseException | None = None
        self._unless: Callable[[], bool] = lambda: False
        self._previous: Any = None
        self._installed = False

    @contextmanager
    def window(self) -> Iterator[None]:
        """Let `interrupt` break into what runs inside; it does nothing in a thread that is not the main one."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if not self._installed:
            self._previous = signal.signal(SIGNAL, self._handle)
            self._installed = True
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._pending = None

    def interrupt(self, error: BaseException, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Raise `error` in the main thread, soon; returns False when no window is open.

        Args:
            error: what to raise.
            unless: asked in the main thread just before: True lets it pass.
        """
        if not self._depth or threading.current_thread() is threading.main_thread():
            return False
        self._unless = unless
        self._pending = error
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)
        return True

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        __tracebackhide__ = True
        error, self._pending = self._pending, None
        if error is not None and self._depth and not self._unless():  # a signal that comes late finds nothing to raise
            raise error

    def close(self) -> None:
        """Give the signal back."""
        if self._installed:
            signal.signal(SIGNAL, signal.SIG_IGN if self._previous is None else self._previous)
            self._installed = False

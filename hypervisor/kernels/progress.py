"""Telling whoever waits how far a download or a build is.

Makers of kernels report to a Progress; which kind it is depends on where the words go: nowhere, a terminal, a log.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BarProgress", "LineProgress", "Progress", "for_stream"]

LINE_SECONDS: Final = 10.0
"""How often a step that takes long says so again in a log."""


class Progress:
    """Takes reports and says nothing: what a library call gets when it asks for no other."""

    def begin(self, what: str, *, total: int | None = None, unit: str = "") -> None:
        """Start a step, ending the one before; `total` is its length in `unit` ("bytes", "objects"), if known."""

    def reach(self, done: int) -> None:
        """Say that `done` of the step's total is behind us."""

    def say(self, text: str) -> None:
        """Tell a fact that stays readable after the step."""

    def end(self) -> None:
        """End the last step and leave the terminal as it was."""


class LineProgress(Progress):
    """Plain lines, for a stream that is not a terminal: each step, and where it is every ten seconds."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Write to `stream`; `clock` returns seconds."""
        self._stream = stream
        self._clock = clock
        self._what = ""
        self._total: int | None = None
        self._unit = ""
        self._said_at = 0.0

    def begin(self, what: str, *, total: int | None = None, unit: str = "") -> None:
        """Write the step's name."""
        self._what, self._total, self._unit = what, total, unit
        self._said_at = self._clock()
        self.say(what)

    def reach(self, done: int) -> None:
        """Write how far the step is, if nothing was written for ten seconds."""
        if self._clock() - self._said_at < LINE_SECONDS:
            return
        self._said_at = self._clock()
        share = f"{min(100, done * 100 // self._total)}%" if self._total else f"{done} {self._unit}"
        self.say(f"{self._what}: {share}")

    def say(self, text: str) -> None:
        """Write one line."""
        self._stream.write(f"{text}\n")
        self._stream.flush()


class BarProgress(Progress):
    """A bar on a terminal, drawn by rich."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`; nothing is drawn before the first step."""
        self._stream = stream
        self._bar: Any = None
        self._task: Any = None

    def _open(self) -> Any:
        from rich.console import Console  # noqa: PLC0415 - only a terminal that waits pays for rich
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415 - the same

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"))
        bar = Progress(*columns, TimeElapsedColumn(), console=Console(file=self._stream), transient=True)
        bar.start()
        return bar

    def begin(self, what: str, *, total: int | None = None, unit: str = "") -> None:
        """Draw a new bar in place of the last one; it runs to and fro while the length is not known."""
        if self._bar is None:
            self._bar = self._open()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._unit = unit
        self._task = self._bar.add_task(what, total=total, share="")

    def reach(self, done: int) -> None:
        """Move the bar."""
        share = f"{done / 1e6:.0f} MB" if self._unit == "bytes" else f"{done} {self._unit}"
        self._bar.update(self._task, completed=done, share=share)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            self._stream.write(f"{text}\n")
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


def for_stream(stream: TextIO) -> Progress:
    """Return a bar when `stream` is a terminal, else lines."""
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)

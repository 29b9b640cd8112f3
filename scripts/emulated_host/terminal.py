"""The user's terminal: raw while the command inside has one of its own, and always restored."""

from __future__ import annotations

import os
import sys
import termios
import tty

STDIN, STDOUT, STDERR = 0, 1, 2


class Terminal:
    """Terminal on stdin and stdout, if there is one there and this program is in its foreground.

    Attributes:
        present: whether there is.
    """

    def __init__(self) -> None:
        """Look, and change nothing."""
        self.present = os.isatty(STDIN) and os.isatty(STDOUT) and os.tcgetpgrp(STDIN) == os.getpgrp()
        self._saved: list[object] | None = None

    def size(self) -> tuple[int, int]:
        """Return its rows and columns, 24 and 80 where it does not know them."""
        columns, rows = os.get_terminal_size(STDOUT)
        return rows or 24, columns or 80

    def raw(self) -> None:
        """Pass every key and every byte through, Ctrl-C too."""
        if self.present and self._saved is None:
            self._saved = termios.tcgetattr(STDIN)
            tty.setraw(STDIN, termios.TCSADRAIN)

    def restore(self) -> None:
        """Put it back to how it was; do nothing when it was never raw."""
        if self._saved is not None:
            sys.stdout.flush()
            termios.tcsetattr(STDIN, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type] # as tcgetattr gave it
            self._saved = None

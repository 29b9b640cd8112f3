"""Single keys from a terminal, and the terminal as it was afterwards."""

from __future__ import annotations

import os
import termios
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["ESCAPE_SECONDS", "KeyReader", "Keyboard"]

ESC: Final = b"\x1b"
ESCAPE_SECONDS: Final = 0.05
"""An escape byte that nothing follows for so long is the key Esc."""
LONGEST: Final = 16
SEQUENCES: Final = {
    b"A": "up",
    b"B": "down",
    b"H": "home",
    b"F": "end",
    b"5~": "page up",
    b"6~": "page down",
    b"1~": "home",
    b"4~": "end",
}
NAMED: Final = {b"\r": "enter", b"\n": "enter", b"\x03": "interrupt", b"\x04": "end of file"}


class KeyReader:
    """Takes bytes of a terminal apart into keys: letters, and "up", "down", "enter", "esc" and so on."""

    def __init__(self) -> None:
        """Begin without any."""
        self._left = b""

    @property
    def is_waiting(self) -> bool:
        """Whether what has come so far may be the begin of a sequence; call `flush` when nothing comes any more."""
        return bool(self._left)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that are complete. Sequences that are not known are nothing."""
        data = self._left + data
        self._left = b""
        keys = []
        while data:
            if data[:1] != ESC:
                keys.append(NAMED.get(data[:1]) or data[:1].decode("ascii", "replace"))
                data = data[1:]
                continue
            end = _end_of_sequence(data)
            if end == 0:
                self._left = data[:LONGEST]
                break
            key = "esc" if end == 1 else SEQUENCES.get(data[2:end])
            if key:
                keys.append(key)
            data = data[end:]
        return keys

    def flush(self) -> list[str]:
        """Return what is there as it is: an escape byte alone is the key Esc."""
        left, self._left = self._left, b""
        return ["esc"] if left == ESC else []


def _end_of_sequence(data: bytes) -> int:
    """Return how long the sequence is that begins with ESC; 1: it is the key; 0: that is not known yet."""
    if len(data) == 1:
        return 0
    if data[1:2] == b"O":
        return 3 if len(data) > 2 else 0
    if data[1:2] != b"[":
        return 1
    for at in range(2, len(data)):
        if 0x40 <= data[at] <= 0x7E:
            return at + 1
        if at >= LONGEST:
            return at
    return 0


class Keyboard:
    """A terminal that gives single keys without showing them; a context manager that puts it back as it was."""

    def __init__(self, fd: int) -> None:
        """Remember how the terminal behind `fd` is."""
        self.fd = fd
        self._saved = termios.tcgetattr(fd)

    def enter(self) -> None:
        """Take single keys. Ctrl-C and Ctrl-Z stay signals."""
        mode = termios.tcgetattr(self.fd)
        mode[3] &= ~(termios.ECHO | termios.ICANON)
        mode[6][termios.VMIN] = 1
        mode[6][termios.VTIME] = 0
        termios.tcsetattr(self.fd, termios.TCSADRAIN, mode)

    def leave(self) -> None:
        """Put it back."""
        try:
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self._saved)
        except termios.error:
            pass  # the terminal is gone

    def read(self) -> bytes:
        """Return what has been typed; nothing when the terminal is gone."""
        try:
            return os.read(self.fd, 1024)
        except OSError:
            return b""

    def __enter__(self) -> Self:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

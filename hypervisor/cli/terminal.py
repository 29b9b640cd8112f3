"""The user's terminal while it is the guest's console: raw, and restored whatever happens."""

from __future__ import annotations

import os
import signal
import termios
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INHERITED: Final = 256
ESCAPE: Final = 0x01
"""Ctrl-A, as in QEMU and kvmtool."""
HELP: Final = (
    b"\r\n"
    b"Ctrl-A x       end the guest at once\r\n"
    b"Ctrl-A p       press its power button\r\n"
    b"Ctrl-A r       show the registers of its vCPUs\r\n"
    b"Ctrl-A Ctrl-A  send Ctrl-A\r\n"
    b"Ctrl-A h       this help\r\n"
)


class RawTerminal:
    """Puts a terminal into raw mode; a small child process restores it should this one be killed.

    Output processing stays on, so that lines of hv's own and those of a kernel look right alike.
    """

    def __init__(self, fd: int) -> None:
        """Remember the state of the terminal behind `fd`. Forks: make it before the machine and any thread."""
        self._fd = fd
        self._saved = termios.tcgetattr(fd)
        self._pipe = -1
        self._start_guardian()

    def enter(self) -> None:
        """Switch to raw mode."""
        raw = termios.tcgetattr(self._fd)
        raw[0] &= ~(termios.BRKINT | termios.ICRNL | termios.INPCK | termios.ISTRIP | termios.IXON)
        raw[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[6][termios.VMIN] = 1
        raw[6][termios.VTIME] = 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)

    def _start_guardian(self) -> None:
        """Fork the process that restores the terminal when this one is gone: it waits for a pipe's end of file."""
        read_end, self._pipe = os.pipe()
        child = os.fork()
        if child:
            os.close(read_end)
            os.waitpid(child, 0)
            return
        try:
            if os.fork():  # the guardian is nobody's child, so that nobody has to wait for it
                os._exit(0)
            for number in (
                signal.SIGINT,
                signal.SIGTERM,
                signal.SIGHUP,
                signal.SIGQUIT,
                signal.SIGTTOU,
                signal.SIGTSTP,
            ):
                signal.signal(number, signal.SIG_IGN)
            terminal = os.dup(self._fd)
            keep = {terminal, read_end}
            for fd in range(MAX_INHERITED):  # whoever reads our output must not wait for this process
                if fd not in keep:
                    with suppress(OSError):
                        os.close(fd)
            if not os.read(read_end, 1):  # no word from the parent: it was killed
                termios.tcsetattr(terminal, termios.TCSANOW, self._saved)
        finally:
            os._exit(0)

    def restore(self) -> None:
        """Put the terminal back as it was. May be called again."""
        if self._pipe < 0:
            return
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
        try:
            os.write(self._pipe, b".")
        except BrokenPipeError:
            pass  # the guardian is gone already; its work is done
        os.close(self._pipe)
        self._pipe = -1


class EscapeFilter:
    """Takes Ctrl-A commands out of what is typed."""

    def __init__(self, commands: dict[int, Callable[[], None]]) -> None:
        """Call `commands[byte]` when that byte follows Ctrl-A."""
        self._commands = commands
        self._escaped = False

    def __call__(self, data: bytes) -> bytes:
        """Return what of `data` is meant for the guest."""
        out = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    out.append(byte)
                continue
            self._escaped = False
            if byte == ESCAPE:
                out.append(byte)
            elif (command := self._commands.get(byte)) is not None:
                command()
        return bytes(out)

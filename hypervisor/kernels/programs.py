"""Running the host's programs, with errors that name the program and what it said."""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from hypervisor.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

__all__ = ["capture", "follow", "missing", "watch"]

KEPT_LINES: Final = 40
"""Lines of a program's output that are kept to explain its failure."""


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}  # their messages are read here


def missing(programs: Iterable[str]) -> list[str]:
    """Return those of `programs` that are not on PATH."""
    return [program for program in programs if shutil.which(program) is None]


def _telling_line(output: str) -> str:
    """Return the line of `output` that says most: the first that is marked as an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = next((line for line in lines if "error:" in line.lower() or line.startswith("E:")), None)
    return telling or (lines or ["it said nothing"])[-1]


def _failure(argv: Sequence[str], status: int, output: str, hint: str | None) -> HostError:
    return HostError(f"{argv[0]} failed with status {status}: {_telling_line(output)}", hint=hint)


def _start(argv: Sequence[str], cwd: Path | None, *, merged: bool) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed") from error


def capture(argv: Sequence[str], *, cwd: Path | None = None, hint: str | None = None) -> str:
    """Run a program to its end and return what it wrote to its standard output.

    Raises:
        HostError: if it is not there or fails; the message carries the telling line of its standard error.
    """
    with _start(argv, cwd, merged=False) as process:
        output, errors = process.communicate()
    if process.returncode:
        raise _failure(argv, process.returncode, errors, hint)
    return output


def watch(argv: Sequence[str], look: Callable[[], None], *, cwd: Path | None = None, hint: str | None = None) -> None:
    """Run a program, calling `look` five times a second until it ends.

    Raises:
        HostError: as `capture` does.
    """
    with _start(argv, cwd, merged=True) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    look()
        except BaseException:
            process.kill()
            raise
    look()
    if process.returncode:
        raise _failure(argv, process.returncode, output, hint)


def follow(
    argv: Sequence[str], hear: Callable[[str], None], *, cwd: Path | None = None, hint: str | None = None
) -> None:
    """Run a program, calling `hear` with each line that it writes to either stream.

    Raises:
        HostError: as `capture` does.
    """
    tail: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
    with _start(argv, cwd, merged=True) as process:
        try:
            for line in process.stdout or ():
                tail.append(line)
                hear(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _failure(argv, process.returncode, "".join(tail), hint)

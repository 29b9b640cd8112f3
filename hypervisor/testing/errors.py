"""What can go wrong between a host and the agent in its guest."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Final

from hypervisor.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AgentError", "CommandError", "CommandTimeout", "GuestRefusal", "OutputLimit", "shown", "tail"]

TAIL: Final = 2000
"""Characters of a command's last output that a message shows."""
COMMAND: Final = 200
"""Characters of a command that a message shows."""


def shown(args: str | Sequence[str]) -> str:
    """Return a command for messages, not too long of it."""
    text = args if isinstance(args, str) else shlex.join(args)
    return text if len(text) <= COMMAND else f"{text[:COMMAND]}..."


def tail(output: str | bytes) -> str:
    """Return the end of an output for messages."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    text = text.rstrip()
    return text if len(text) <= TAIL else f"...{text[-TAIL:]}"


def _said(stdout: str | bytes, stderr: str | bytes) -> str:
    words = [f"\n--- {name}\n{tail(data)}" for name, data in (("stdout", stdout), ("stderr", stderr)) if data]
    return "".join(words) or "; it wrote nothing"


class AgentError(VmmError):
    """The agent cannot be reached, has gone, or does not keep to the protocol."""

    status = 4


class _OutputError(AgentError):
    """A command went wrong; what it wrote before is here.

    Attributes:
        args_run: the command, as it was given.
        stdout, stderr: what it had written.
    """

    def __init__(self, what: str, args: str | Sequence[str], stdout: str | bytes, stderr: str | bytes) -> None:
        super().__init__(f"{shown(args)}: {what}{_said(stdout, stderr)}")
        self.args_run = args
        self.stdout = stdout
        self.stderr = stderr


class CommandError(_OutputError):
    """A command of the guest ended with another status than 0.

    Attributes:
        returncode: its status; -N: signal N ended it.
    """

    def __init__(
        self, args: str | Sequence[str], returncode: int, stdout: str | bytes = "", stderr: str | bytes = ""
    ) -> None:
        """Say how the command ended."""
        how = f"signal {-returncode} ended it" if returncode < 0 else f"status {returncode}"
        super().__init__(how, args, stdout, stderr)
        self.returncode = returncode


class CommandTimeout(_OutputError, TimeoutError):
    """A command of the guest was killed, with its process group, because its time was over.

    Attributes:
        timeout: the seconds that it had.
    """

    def __init__(
        self, args: str | Sequence[str], timeout: float, stdout: str | bytes = "", stderr: str | bytes = ""
    ) -> None:
        """Say what was running."""
        super().__init__(f"not done after {timeout:g} s, killed", args, stdout, stderr)
        self.timeout = timeout


class OutputLimit(_OutputError):
    """A command of the guest was killed because it wrote more than the host wanted to keep."""

    def __init__(
        self, args: str | Sequence[str], limit: int, stdout: str | bytes = "", stderr: str | bytes = ""
    ) -> None:
        """Say what the limit was."""
        super().__init__(f"more than limit={limit} bytes of output, killed", args, stdout, stderr)
        self.limit = limit


class GuestRefusal(AgentError):
    """The guest's kernel refused something: a program that is not there, a file that cannot be written.

    Attributes:
        errno: why.
    """

    def __init__(self, what: str, errno: int) -> None:
        """Say what was refused."""
        super().__init__(f"{what}: {os.strerror(errno)}")
        self.errno = errno

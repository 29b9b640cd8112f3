"""What can go wrong, one family for each culprit. The exit status of `hv` follows from the family.

An error says what its layer knows and never repeats its cause: the top prints the chain.
"""

from __future__ import annotations

from errno import errorcode
from os import strerror

__all__ = [
    "ConfigError",
    "DamagedSnapshotError",
    "HostError",
    "ImageError",
    "KvmError",
    "SaveError",
    "SnapshotError",
    "VmmError",
]


class VmmError(Exception):
    """Base of every error that this package raises on purpose.

    Attributes:
        hint: what the user can do about it, or None.
    """

    status = 5

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Say what is wrong; `hint` says what to do."""
        super().__init__(message)
        self.hint = hint


class ConfigError(VmmError):
    """The user asked for something that cannot be: an option, a value, a combination."""

    status = 2


class ImageError(ConfigError):
    """A kernel, initrd or module file is not what a boot loader can use. The message names the file or its kind."""


class SnapshotError(VmmError):
    """A snapshot cannot be made, read or used. The message names the file and what is wrong with it.

    It may quote what is in the file: that stays one line, and reaches no terminal as it is.
    """

    status = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Say what is wrong; `hint` says what to do."""
        super().__init__("".join(one if one.isprintable() else ascii(one)[1:-1] for one in message), hint=hint)


class DamagedSnapshotError(SnapshotError):
    """A snapshot is not what was saved: cut short, altered, or one that nobody would write.

    Attributes:
        file: path of the file.
        chunk: number of the memory chunk, or None.
        gpa: guest-physical address of the chunk's first byte, or None.
    """

    def __init__(
        self, file: str, what: str, *, chunk: int | None = None, gpa: int | None = None, hint: str | None = None
    ) -> None:
        """Say of `file`, and of a chunk in it, what is wrong."""
        place = "" if chunk is None else f": chunk {chunk}" + ("" if gpa is None else f" (guest memory at {gpa:#x})")
        super().__init__(f"{file}{place}: {what}", hint=hint or "restore it from a copy, or save it again")
        self.file = file
        self.chunk = chunk
        self.gpa = gpa


class SaveError(SnapshotError):
    """The host did not take a snapshot: its disk is full, or its directory not ours."""

    status = 3


class HostError(VmmError):
    """The host lacks something that this machine needs."""

    status = 3


class KvmError(HostError):
    """The host kernel refused an ioctl.

    Attributes:
        ioctl: its name, such as "KVM_CREATE_VM".
        errno: the positive errno value.
    """

    def __init__(self, ioctl: str, errno: int, *, hint: str | None = None) -> None:
        """Name the ioctl and what the kernel answered."""
        super().__init__(f"{ioctl}: {strerror(errno)} ({errorcode.get(errno, errno)})", hint=hint)
        self.ioctl = ioctl
        self.errno = errno

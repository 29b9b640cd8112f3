"""Whether a file is still the one that a snapshot was made with.

What is compared: size, time of the last change, and a hash of samples of the content; `strict`, also the inode number.

It catches every write through the file system, which moves the time (in steps of a few milliseconds: a write in the
same step as the look before it is not seen), a file of another size, and, where a time was set back, another content
that differs in one of the samples. It cannot catch a change of the same size between the samples whose time was set
back, nor one that a mapping of the file has made and that was not written back yet. A block device has no time:
there the samples are all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any, Final

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_identity", "identify"]

SAMPLE: Final = 4096
SAMPLES: Final = 64
"""So many, evenly spread, with the first and the last bytes among them; a file of 256 KiB is read wholly."""
SECOND: Final = 10**9


def identify(path: str, *, strict: bool = False) -> dict[str, Any]:
    """Describe a file by plain values.

    Args:
        path: of the file or block device.
        strict: it has to be this very file later, not a copy.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        is_file = stat.S_ISREG(status.st_mode)
        found: dict[str, Any] = {"size": size, "samples": _samples(fd, size)}
        found["mtime_ns"] = status.st_mtime_ns if is_file else None
        found["inode"] = status.st_ino if strict and is_file else None
    finally:
        os.close(fd)
    return found


def _samples(fd: int, size: int) -> str:
    """Hash samples of the content."""
    last = max(size - SAMPLE, 0)
    digest = hashlib.sha256()
    for start in sorted({last * number // (SAMPLES - 1) for number in range(SAMPLES)}):
        digest.update(os.pread(fd, SAMPLE, start))
    return digest.hexdigest()


def check_identity(path: str, wanted: Mapping[str, Any], what: str) -> None:
    """Check that a file is what `identify` has described.

    Args:
        path: where it is now.
        wanted: the description.
        what: what it is, for messages.

    Raises:
        BackendError: it is not there, or another one now.
        KeyError: the description is malformed.
    """
    try:
        found = identify(path, strict=wanted["inode"] is not None)
    except OSError as error:
        raise BackendError(
            f"{what} {path}: {error.strerror}", hint="the snapshot needs it where it was, unchanged"
        ) from error
    changes = {
        "size": f"it had {wanted['size']} bytes and has {found['size']}",
        "inode": "another file has its place",
        "mtime_ns": "it was written to",
        "samples": "its content differs",
    }
    for key, why in changes.items():
        if found[key] != wanted[key] and not (key == "mtime_ns" and _is_same_time(wanted[key], found[key])):
            raise BackendError(
                f"{what} {path} has changed since the snapshot: {why}",
                hint="a snapshot needs its disks as they were; make a new one",
            )


def _is_same_time(wanted: int | None, found: int | None) -> bool:
    """Whether a time is another one in whole seconds, as some archives keep it."""
    return wanted is not None and found is not None and found % SECOND == 0 and found == wanted - wanted % SECOND

"""Image locking, so that two machines never write one image.

The bytes are those that QEMU (block/file-posix.c) locks, so that the two respect each other: a shared lock on byte
100 + P for each permission P that is used, and on byte 200 + P for each that others may not use; then it is looked
whether anybody holds the opposite.
"""

from __future__ import annotations

import errno
import fcntl
import os
from struct import pack, unpack
from typing import Final

from devices.backends.errors import BackendError

__all__ = ["lock_file"]

USES: Final = 100
DENIES: Final = 200
READ: Final = 0  # BLK_PERM_CONSISTENT_READ
WRITE: Final = 1
RESIZE: Final = 3
F_OFD_GETLK: Final = 36  # <fcntl.h>; the module has no names for them
F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi"
"""struct flock: l_type, l_whence, l_start, l_len, l_pid."""


def lock_file(fd: int, path: str, *, readonly: bool) -> None:
    """Lock an open image for as long as it is open.

    Args:
        fd: the image; for writing it must be open for writing.
        path: for messages.
        readonly: share it with other readers; otherwise nobody else may write it, though others may read.

    Raises:
        BackendError: somebody else uses it in a way that does not go together.
    """
    uses = (READ,) if readonly else (READ, WRITE, RESIZE)
    denies = (WRITE, RESIZE)
    for byte in (*(USES + one for one in uses), *(DENIES + one for one in denies)):
        try:
            fcntl.fcntl(fd, F_OFD_SETLK, pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP}:
                return  # a file system without locks: nobody can hold one
            raise _in_use(fd, path) from error
    for byte in (*(DENIES + one for one in uses), *(USES + one for one in denies)):
        request = pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        if unpack(_FLOCK, fcntl.fcntl(fd, F_OFD_GETLK, request))[0] != fcntl.F_UNLCK:
            raise _in_use(fd, path)


def _in_use(fd: int, path: str) -> BackendError:
    """Return what to tell the user: open file descriptions have no owner, so who it is cannot be told."""
    status = os.fstat(fd)
    return BackendError(
        f"disk image {path} is in use by another machine or tool",
        hint=f"end that one (`fuser {path}` may name it), or take overlay=memory on a copy; inode {status.st_ino}",
    )

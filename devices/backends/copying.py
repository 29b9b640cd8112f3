"""Copies of image files: shared blocks where the file system has them, holes stay holes."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from devices.backends.image import Image

__all__ = ["copy_content", "copy_file"]

FICLONE: Final = 0x40049409
"""<linux/fs.h>: share another file's blocks."""
CANNOT_CLONE: Final = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}
CHUNK: Final = 1 << 20
BLOCK: Final = 4096
"""What is looked at at once for being zero."""


def copy_file(source: int, target: int) -> None:
    """Copy all of a file, given by a descriptor that can be read, into an empty one; raises OSError."""
    import fcntl

    size = os.lseek(source, 0, os.SEEK_END)
    if stat.S_ISREG(os.fstat(source).st_mode):
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as error:
            if error.errno not in CANNOT_CLONE:
                raise
        else:
            return
    os.ftruncate(target, size)
    for start, end in _data(source, size):
        _copy_range(source, target, start, end)


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part of a file that is no hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole is left
            if error.errno != errno.EINVAL:
                raise
            start, end = end, size  # a block device
        yield start, min(end, size)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy part of a file in the kernel, or by hand where that cannot be done."""
    while start < end:
        try:
            done = os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            if error.errno not in CANNOT_CLONE:
                raise
            done = 0
        if not done:
            break
        start += done
    while start < end:
        data = os.pread(source, min(CHUNK, end - start), start)
        if not data:
            raise OSError(errno.EIO, "the file became shorter")
        _write_sparse(target, start, memoryview(data))
        start += len(data)


def _write_sparse(fd: int, offset: int, data: memoryview) -> None:
    """Write what is not zero, in runs of blocks."""
    zero = bytes(BLOCK)
    start = 0
    for at in range(0, len(data) + BLOCK, BLOCK):
        block = data[at : at + BLOCK]
        if len(block) and block != zero[: len(block)]:
            continue
        while start < min(at, len(data)):
            start += os.pwrite(fd, data[start:at], offset + start)
        start = at + BLOCK


def copy_content(image: Image, target: int) -> None:
    """Copy a disk's content, as its guest sees it, into an empty file; raises OSError."""
    os.ftruncate(target, image.size)
    buffer = memoryview(bytearray(min(CHUNK, image.size)))
    for offset in range(0, image.size, CHUNK):
        part = buffer[: min(CHUNK, image.size - offset)]
        image.readv(offset, [part])
        _write_sparse(target, offset, part)

"""A raw image: a file or block device whose bytes are the disk's."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError
from devices.backends.image import refusal
from devices.backends.locks import lock_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["RawImage"]

SECTOR: Final = 512
IOV_MAX: Final = 1024
DIRECT_ALIGNMENT: Final = 4096
"""Enough for O_DIRECT everywhere."""
BOUNCE_BYTES: Final = 1 << 20
"""What is copied at once for O_DIRECT: a guest decides how long a request is, not how much memory that takes."""
ZEROES: Final = memoryview(bytes(1 << 20))

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
FALLOC_FL_ZERO_RANGE: Final = 16
BLKDISCARD: Final = 0x1277
BLKZEROOUT: Final = 0x127F
CANNOT: Final = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY}


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Call fallocate(2), which `os` has without its modes."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if libc.fallocate(fd, mode, offset, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class RawImage:
    """A raw file or block device. See `devices.backends.image.Image`.

    Attributes:
        path: of the file, absolute.
        cache: how it was opened; see `devices.backends.image.open_image`.
    """

    block_size = SECTOR
    cluster_size = 4096

    def __init__(self, path: str, *, readonly: bool = False, cache: str = "writeback", any_size: bool = False) -> None:
        """Open and lock it; raises BackendError when it cannot be used.

        Args:
            path: of the file or block device.
            readonly: only read it.
            cache: see `devices.backends.image.open_image`.
            any_size: take a file whose size is no multiple of 512: it is no disk, but holds one.
        """
        self.readonly = readonly
        self.path = os.path.abspath(path)
        self.cache = cache
        self._any_size = any_size
        self._direct = cache == "none"
        self._failed: OSError | None = None
        self._flush_lock = threading.Lock()
        self._direct_write_lock = threading.Lock()
        flags = (
            (os.O_RDONLY if readonly else os.O_RDWR)
            | os.O_CLOEXEC
            | os.O_NONBLOCK
            | (os.O_DIRECT if self._direct else 0)
        )
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            if error.errno == errno.EINVAL and self._direct:
                raise BackendError(
                    f"disk image {path}: its file system has no direct I/O", hint="cache=writeback does without"
                ) from error
            raise refusal(path, error) from error
        try:
            self._is_block_device, self.size = self._measure(path)
            lock_file(self._fd, path, readonly=readonly)
        except BaseException:
            self.close()
            raise

    def _measure(self, path: str) -> tuple[bool, int]:
        """Return whether it is a block device, and its size."""
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise BackendError(f"disk image {path} is no file and no block device")
        end = os.lseek(self._fd, 0, os.SEEK_END)
        if end == 0:
            raise BackendError(f"disk image {path} is empty", hint=f"`truncate -s 1G {path}` gives it a size")
        if end % SECTOR and not self._any_size:
            raise BackendError(
                f"disk image {path} has {end} bytes, no multiple of {SECTOR}",
                hint=f"`truncate -s %{SECTOR} {path}` rounds it up; or is it packed, or of another format?",
            )
        return stat.S_ISBLK(mode), end

    @property
    def plain_fd(self) -> int | None:
        """The file, unless every access has to be aligned."""
        return None if self._direct else self._fd

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._fd

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""
        return self._fd >= 0

    def current_size(self) -> int:
        """Return how long the file is now, in bytes."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`."""
        data = bytearray(size)
        self.readv(offset, [memoryview(data)])
        return bytes(data)

    def write_at(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset`."""
        self.writev(offset, [memoryview(data)])

    # --- data ---------------------------------------------------------------------------------------------------------

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        if self._direct and not _is_aligned(offset, buffers):
            self._bounce(offset, buffers, write=False)
            return
        self._move(os.preadv, offset, list(buffers))

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`."""
        if self._direct:
            with self._direct_write_lock:  # a neighbour may be between reading a block and writing it back
                if _is_aligned(offset, buffers):
                    self._move(os.pwritev, offset, list(buffers))
                else:
                    self._bounce(offset, buffers, write=True)
            return
        self._move(os.pwritev, offset, list(buffers))

    def _move(self, call: Callable[[int, list[memoryview], int], int], offset: int, buffers: list[memoryview]) -> None:
        """Repeat `call` until all buffers are done."""
        while buffers:
            done = call(self._fd, buffers[:IOV_MAX], offset)
            if done == 0:
                raise OSError(errno.EIO, "the image ended: has it been made smaller?")
            offset += done
            while buffers and done >= len(buffers[0]):
                done -= len(buffers[0])
                buffers.pop(0)
            if done:
                buffers[0] = buffers[0][done:]

    def _bounce(self, offset: int, buffers: Sequence[memoryview], *, write: bool) -> None:
        """Move data by aligned copies, for O_DIRECT, of at most BOUNCE_BYTES each."""
        for at, pieces in _cut(offset, buffers):
            self._bounce_once(at, pieces, write=write)

    def _bounce_once(self, offset: int, buffers: Sequence[memoryview], *, write: bool) -> None:
        """Move data by one aligned copy: whole blocks around it are read, changed, written."""
        size = sum(map(len, buffers))
        first = offset & -DIRECT_ALIGNMENT
        last = min((offset + size + DIRECT_ALIGNMENT - 1) & -DIRECT_ALIGNMENT, self.size)
        with mmap.mmap(-1, last - first) as area, memoryview(area) as copy:
            if not write or (first, last) != (offset, offset + size):
                self._move(os.preadv, first, [copy])
            at = offset - first
            for buffer in buffers:
                if write:
                    copy[at : at + len(buffer)] = buffer
                else:
                    buffer[:] = copy[at : at + len(buffer)]
                at += len(buffer)
            if write:
                self._move(os.pwritev, first, [copy])

    def flush(self) -> None:
        """Call fdatasync. Once it has failed it fails for good: the kernel may have dropped what it could not write."""
        if self.cache == "unsafe":
            return
        with self._flush_lock:
            if self._failed is not None:
                raise OSError(self._failed.errno, self._failed.strerror)
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                self._failed = error
                raise

    # --- holes --------------------------------------------------------------------------------------------------------

    def discard(self, offset: int, size: int) -> None:
        """Punch a hole where the host can; where it cannot the bytes stay."""
        self._punch(offset, size)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes zero: by a hole if `unmap`, by the file system, or by writing."""
        if unmap and not self._is_block_device and self._punch(offset, size):
            return
        try:
            if self._is_block_device:
                self._ioctl_range(BLKZEROOUT, offset, size)
            else:
                _fallocate(self._fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            for at in range(offset, offset + size, len(ZEROES)):
                self.writev(at, [ZEROES[: min(len(ZEROES), offset + size - at)]])

    def _punch(self, offset: int, size: int) -> bool:
        """Give the room of some bytes back; return whether the host could."""
        try:
            if self._is_block_device:
                self._ioctl_range(BLKDISCARD, offset, size)
            else:
                _fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            return False
        return True

    def _ioctl_range(self, request: int, offset: int, size: int) -> None:
        from fcntl import ioctl
        from struct import pack

        ioctl(self._fd, request, pack("=QQ", offset, size))

    def close(self) -> None:
        """Close the file, and give up the lock with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _cut(offset: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """Cut a transfer at multiples of BOUNCE_BYTES of the disk: offset and buffers of each part."""
    start = offset
    pieces: list[memoryview] = []
    for buffer in buffers:
        done = 0
        while done < len(buffer):
            piece = buffer[done : done + BOUNCE_BYTES - offset % BOUNCE_BYTES]
            pieces.append(piece)
            done += len(piece)
            offset += len(piece)
            if offset % BOUNCE_BYTES == 0:
                yield start, pieces
                start, pieces = offset, []
    if pieces:
        yield start, pieces


def _is_aligned(offset: int, buffers: Sequence[memoryview]) -> bool:
    """Whether O_DIRECT surely takes a transfer as it is."""
    if offset % DIRECT_ALIGNMENT or any(len(buffer) % DIRECT_ALIGNMENT for buffer in buffers):
        return False
    import ctypes

    return all(
        ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % DIRECT_ALIGNMENT == 0
        for buffer in buffers
        if not buffer.readonly
    ) and not any(buffer.readonly for buffer in buffers)

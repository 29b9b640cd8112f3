"""Disk images: what a disk stands on, and how to open one."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Final, Protocol

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Image", "is_qcow2", "open_image"]

QCOW2_MAGIC: Final = b"QFI\xfb"


class Image(Protocol):
    """The bytes of a disk. Every method may be called from several threads at once.

    Attributes:
        size: of the disk, in bytes.
        readonly: whether it can only be read.
        block_size: logical block size, in bytes.
        cluster_size: what is best read, written and discarded at once, in bytes.
        plain_fd: a file whose bytes are the disk's at the same offsets, so that others may read and write it; or None.
    """

    @property
    def size(self) -> int: ...  # noqa: D102 - see Attributes
    @property
    def readonly(self) -> bool: ...  # noqa: D102
    @property
    def block_size(self) -> int: ...  # noqa: D102
    @property
    def cluster_size(self) -> int: ...  # noqa: D102
    @property
    def plain_fd(self) -> int | None: ...  # noqa: D102

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on; raises OSError when they cannot be."""

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`; raises OSError when they cannot be."""

    def flush(self) -> None:
        """Return when everything written before is durable; raises OSError when that cannot be said."""

    def discard(self, offset: int, size: int) -> None:
        """Forget `size` bytes; what is read there afterwards is undefined, here zeroes or what was there."""

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes read as zeroes; with `unmap` their room may be given back."""

    def close(self) -> None:
        """Close every file; harmless when done already."""


def is_qcow2(path: str) -> bool:
    """Tell by its content whether a file is a qcow2 image; raises BackendError when it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer must not hold us
        try:
            if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                return os.read(fd, len(QCOW2_MAGIC)) == QCOW2_MAGIC
        finally:
            os.close(fd)
    except OSError as error:
        raise refusal(path, error) from error
    return False


def refusal(path: str, error: OSError) -> BackendError:
    """Return what to tell the user about an image that cannot be opened."""
    hints = {
        errno.ENOENT: "`qemu-img create` or `truncate -s SIZE FILE` makes one",
        errno.EACCES: "chmod or chgrp it, or open it with readonly",
        errno.EPERM: "chmod or chgrp it, or open it with readonly",
        errno.EROFS: "open it with readonly, or with overlay=memory",
        errno.EISDIR: "name an image file or a block device",
    }
    return BackendError(f"disk image {path}: {error.strerror}", hint=hints.get(error.errno or 0, ""))


def open_image(
    path: str,
    *,
    form: str | None = None,
    readonly: bool = False,
    overlay: str | None = None,
    cache: str = "writeback",
) -> Image:
    """Open a disk image, told apart by its content, and lock it.

    A guest may write a qcow2 header to its raw image, and such a header can name any file of the host. So an image that
    was only told by its content must be whole by itself: one that names another file is refused. That suffices, and a
    guest may write to its first sector what it likes: a forged header that names nothing makes, at the next start, a
    disk out of the image's own bytes. It may be a larger disk, whose file grows: with `form` "raw" it never does.

    Args:
        path: a raw or qcow2 file, or a block device.
        form: "raw" or "qcow2"; None tells by the content, and what names another file is refused.
        readonly: refuse writes; others may read the file too.
        overlay: where writes go instead of `path`: "memory", or a qcow2 file that is made if need be; None: to `path`.
        cache: "writeback", "none" (past the host's page cache) or "unsafe" (flushes do nothing).

    Raises:
        BackendError: it is missing, damaged, in use, or may not be opened.
    """
    path = os.fspath(path)
    trusted = form is not None
    form = form or ("qcow2" if is_qcow2(path) else "raw")
    if overlay is None:
        return _open(path, form, readonly=readonly, cache=cache, trusted=trusted)
    if overlay == "memory":
        from devices.backends.memory_overlay import MemoryOverlay

        return MemoryOverlay(_open(path, form, readonly=True, cache=cache, trusted=trusted))
    from devices.backends.qcow2 import create_overlay, open_qcow2

    if not os.path.exists(overlay):
        create_overlay(overlay, os.path.abspath(path), form, trusted=trusted)
    return open_qcow2(overlay, readonly=False, cache=cache, wanted_backing=path)


def _open(path: str, form: str, *, readonly: bool, cache: str, trusted: bool) -> Image:
    if form == "qcow2":
        from devices.backends.qcow2 import open_qcow2

        return open_qcow2(path, readonly=readonly, cache=cache, trusted=trusted)
    from devices.backends.raw import RawImage

    return RawImage(path, readonly=readonly, cache=cache)

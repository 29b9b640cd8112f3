"""A disk that is somebody else's still: a device is built on it, and the image is put in its place when it is ours."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PendingImage"]


class PendingImage:
    """An image whose every request fails. See `devices.backends.image.Image`."""

    plain_fd = None

    def __init__(self, *, size: int, readonly: bool, block_size: int, cluster_size: int) -> None:
        """Be as large as the image that will be in its place, and all that a guest has been told of it."""
        self.size = size
        self.readonly = readonly
        self.block_size = block_size
        self.cluster_size = cluster_size

    @staticmethod
    def _fail() -> NoReturn:
        raise OSError(errno.EIO, "the disk is not here yet")

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:  # noqa: ARG002 - the protocol's
        """Fail."""
        self._fail()

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:  # noqa: ARG002
        """Fail."""
        self._fail()

    def flush(self) -> None:
        """Fail."""
        self._fail()

    def discard(self, offset: int, size: int) -> None:  # noqa: ARG002
        """Fail."""
        self._fail()

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:  # noqa: ARG002
        """Fail."""
        self._fail()

    def close(self) -> None:
        """Do nothing."""

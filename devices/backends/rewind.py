"""A disk that can go back: at a checkpoint a layer of memory is laid over its image, and a rewind drops that layer.

A rewind costs what was written since, whatever the size of the disk. The image below is only read while there is a
checkpoint: when the machine ends it is, on the host too, what it was at the checkpoint. So what the guest flushes after
a checkpoint is as durable as the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, cast

from devices.backends.image import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.backends.memory_overlay import MemoryOverlay

__all__ = ["DEFAULT_LIMIT", "CheckpointImage", "RewindableImage", "rewindable"]

DEFAULT_LIMIT: Final = 1 << 30
"""Bytes that may be written between two rewinds, in clusters of 64 KiB."""


class RewindableImage(Image, Protocol):
    """An image that can go back. Nothing may use it while one of these methods runs."""

    def checkpoint(self, *, limit: int = DEFAULT_LIMIT) -> None:
        """Remember the content as it is now."""

    def rewind(self) -> None:
        """Make the content what it was at the checkpoint; raises ValueError without one."""

    def commit(self) -> None:
        """Give the checkpoint up and keep the content; raises OSError when the image below does not take it."""


class CheckpointImage:
    """An image with at most one checkpoint. See `devices.backends.image.Image` and `RewindableImage`.

    Without a checkpoint its methods are those of the image below. With one there is no `plain_fd`: whoever has a short
    cut to the file must ask again, before the guest goes on, each time that a checkpoint is taken or given up.

    Attributes:
        below: the image that is closed in the end.
        overlay: what was written since the checkpoint; None without one.
    """

    def __init__(self, below: Image) -> None:
        """Stand on `below`."""
        self.below = below
        self.overlay: MemoryOverlay | None = None
        self.size = below.size
        self.readonly = below.readonly
        self.block_size = below.block_size
        self.cluster_size = below.cluster_size
        self._top: Image = below

    @property
    def plain_fd(self) -> int | None:
        """The file, as long as there is no checkpoint."""
        return self.below.plain_fd if self.overlay is None else None

    def checkpoint(self, *, limit: int = DEFAULT_LIMIT) -> None:
        """Remember the content as it is now; an older checkpoint is given up, as `commit` does.

        Args:
            limit: most bytes that may be written until the next rewind, in whole clusters of 64 KiB; what would need
                more fails with ENOSPC, which is an I/O error to the guest.
        """
        self.commit()
        if not self.readonly:  # what cannot be written never has to go back
            from devices.backends.memory_overlay import MemoryOverlay

            self.overlay = MemoryOverlay(self.below, limit=limit)
            self._top = self.overlay

    def rewind(self) -> None:
        """Drop what was written since the checkpoint; raises ValueError without one."""
        if self.overlay is not None:
            self.overlay.forget()
        elif not self.readonly:
            raise ValueError("there is no checkpoint to go back to")

    def commit(self) -> None:
        """Bring what was written to the image below and go on there; harmless without a checkpoint."""
        if self.overlay is None:
            return
        for offset, content in self.overlay.changes():
            self.below.writev(offset, [content])
        self._top = self.below
        self.overlay = None

    def readv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all of `buffers` from byte `offset` on."""
        self._top.readv(offset, buffers)

    def writev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write all of `buffers` at byte `offset`."""
        self._top.writev(offset, buffers)

    def flush(self) -> None:
        """Make what was written durable; behind a checkpoint that is as durable as the machine."""
        self._top.flush()

    def discard(self, offset: int, size: int) -> None:
        """Forget `size` bytes."""
        self._top.discard(offset, size)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make `size` bytes zero."""
        self._top.write_zeroes(offset, size, unmap)

    def close(self) -> None:
        """Forget what was written since the checkpoint, and close the image below."""
        self._top.close()


def rewindable(image: Image) -> RewindableImage:
    """Return `image` if it can go back, else a CheckpointImage over it."""
    return cast("RewindableImage", image) if hasattr(image, "checkpoint") else CheckpointImage(image)

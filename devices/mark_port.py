"""A port by which a guest marks the phases of its run, as firmware tells its progress at port 0x80 of a PC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.ports import OPEN_BUS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MarkPort"]


class MarkPort:
    """One byte-wide port; every write is a mark, a read finds nobody."""

    def __init__(self, on_mark: Callable[[int], object]) -> None:
        """Call `on_mark` with each byte that is written."""
        self._on_mark = on_mark

    def register_name(self, offset: int, *, write: bool) -> str:
        """Name the only register."""
        del offset, write
        return "MARK"

    def read(self, offset: int, size: int) -> int:
        """Return an open bus."""
        del offset, size
        return OPEN_BUS

    def write(self, offset: int, size: int, value: int) -> None:
        """Make a mark."""
        del offset, size
        self._on_mark(value & 0xFF)

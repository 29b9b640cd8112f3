"""What tells two snapshots apart: values of the state by their path, and pages of memory by range and kernel symbol."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from devices.ports import GuestFault
from hypervisor.profile.reading import BANNER, IMAGE_ALIGNMENT, KERNEL_MAP, image_shift, search
from hypervisor.snapshot.manifest import CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from hypervisor.memory import GuestMemory
    from hypervisor.snapshot.manifest import Range
    from hypervisor.snapshot.saved import Snapshot
    from hypervisor.symbols import Symbols

__all__ = ["Change", "PageRange", "SavedMemory", "changed_pages", "changes", "kernel_symbols", "name_ranges"]

PAGE: Final = 4096
MASK: Final = (1 << 64) - 1
MOST_NAMES: Final = 1000
MOST_DEPTH: Final = 100
PAIRS: Final = frozenset({"msrs", "xcrs"})
"""Lists of [number, value]: compared by number, and shown in hexadecimal."""


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = _Absent()


class Change(NamedTuple):
    """A value that differs: its path in the state, and what it is in each; `ABSENT` where it is not there."""

    path: str
    before: object
    after: object


class PageRange(NamedTuple):
    """Pages that differ and follow each other: guest-physical address, how many, names of what the kernel has there."""

    gpa: int
    pages: int
    symbols: tuple[str, ...] = ()


# --- state ------------------------------------------------------------------------------------------------------------


def changes(before: object, after: object, path: str = "") -> Iterator[Change]:
    """Yield the values that differ, in the order of the first; lists of another length are compared as far as they go.

    Bytes are single values.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            inner = f"{path}.{key}" if path else key
            one, other = before.get(key, ABSENT), after.get(key, ABSENT)
            if key in PAIRS and _are_pairs(one) and _are_pairs(other):
                one = {f"{number:#x}": value for number, value in one}
                other = {f"{number:#x}": value for number, value in other}
            yield from changes(one, other, inner)
    elif isinstance(before, list) and isinstance(after, list):
        for at in range(max(len(before), len(after))):
            one = before[at] if at < len(before) else ABSENT
            other = after[at] if at < len(after) else ABSENT
            yield from changes(one, other, f"{path}[{at}]")
    elif type(before) is not type(after) or before != after:
        yield Change(path, before, after)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], int) for pair in value
    )


# --- memory -----------------------------------------------------------------------------------------------------------


class SavedMemory:
    """The RAM of a snapshot, to be read as `hypervisor.memory.GuestMemory` is. A context manager.

    Attributes:
        size: in bytes.
        ranges: where it is.
    """

    def __init__(self, snapshot: Snapshot, *, verify: bool = True) -> None:
        """Map it; raises as `Snapshot.map_memory` does."""
        fd, offset, self.size = snapshot.map_memory(verify=verify)
        try:
            self._map = mmap.mmap(fd, self.size, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=offset)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self.ranges: tuple[Range, ...] = snapshot.manifest.memory.ranges

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._view.release()
        self._map.close()

    def view(self, gpa: int, size: int) -> memoryview:
        """Return `size` bytes at `gpa`, without a copy; raises GuestFault outside RAM."""
        for one in self.ranges:
            if size >= 0 and one.gpa <= gpa and gpa + size <= one.gpa + one.size:
                start = one.offset + gpa - one.gpa
                return self._view[start : start + size]
        raise GuestFault(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """Copy `size` bytes at `gpa`; raises GuestFault outside RAM."""
        with self.view(gpa, size) as view:
            return view.tobytes()


def changed_pages(before: Snapshot, after: Snapshot, memories: tuple[SavedMemory, SavedMemory]) -> list[PageRange]:
    """Return the pages that differ, as ranges; what only one of them has is left out.

    Chunks are told apart by their hashes, pages of those that differ by their bytes.
    """
    one, other = before.memory.index, after.memory.index
    same_layout = before.manifest.memory.ranges == after.manifest.memory.ranges
    found: list[int] = []
    for place in before.manifest.memory.ranges:
        for gpa in range(place.gpa, place.gpa + place.size, CHUNK):
            chunk = (place.offset + gpa - place.gpa) // CHUNK
            is_aligned = not (place.offset + gpa - place.gpa) % CHUNK
            if same_layout and is_aligned and one.hash_of(chunk) == other.hash_of(chunk):
                continue
            found += _pages(memories, gpa, min(CHUNK, place.gpa + place.size - gpa))
    return _as_ranges(found)


def _pages(memories: tuple[SavedMemory, SavedMemory], gpa: int, size: int) -> Iterator[int]:
    for page in range(gpa, gpa + size, PAGE):
        try:
            if memories[0].read(page, PAGE) != memories[1].read(page, PAGE):
                yield page
        except GuestFault:
            return


def _as_ranges(pages: Sequence[int]) -> list[PageRange]:
    ranges: list[PageRange] = []
    for page in pages:
        if ranges and ranges[-1].gpa + ranges[-1].pages * PAGE == page:
            ranges[-1] = ranges[-1]._replace(pages=ranges[-1].pages + 1)
        else:
            ranges.append(PageRange(page, 1))
    return ranges


# --- names ------------------------------------------------------------------------------------------------------------


def kernel_symbols(memory: GuestMemory, symbols: Symbols | None = None) -> tuple[Symbols, int] | None:
    """Return the symbols of the Linux kernel in a memory, and the distance from their addresses to physical ones.

    Args:
        memory: the guest's, or a `SavedMemory`.
        symbols: those of its file, wherever it runs: placed by the kernel's banner. None finds the kernel's own
            (kallsyms).

    Returns:
        The symbols and what to subtract (modulo 2^64) from an address of theirs; None where no kernel is found.
    """
    if symbols is None:
        from hypervisor.profile import kallsyms

        found = kallsyms.find(memory)
        shift = None if found is None else image_shift(memory, found)
        return None if found is None or shift is None else (found, KERNEL_MAP - shift & MASK)
    banner = symbols.address_of("linux_banner")
    if banner is not None:
        for at in search(memory, BANNER):
            if not (at - banner) % IMAGE_ALIGNMENT:
                return symbols, banner - at & MASK
    return None


def name_ranges(ranges: Sequence[PageRange], found: tuple[Symbols, int]) -> list[PageRange]:
    """Return the ranges with the names of the kernel's functions and objects that lie in them, at most 1000 each.

    Only what lies between _text (or the first name) and _end is the kernel's image; other memory has no names.
    """
    symbols, distance = found
    table = [(start, name) for start, _, name in symbols.entries() if start >= KERNEL_MAP]
    starts = [start for start, _ in table]
    if not starts:
        return list(ranges)
    first = symbols.address_of("_text") or starts[0]
    end = symbols.address_of("_end") or starts[-1] + 1
    named = []
    for one in ranges:
        low = one.gpa + distance & MASK
        high = min(low + one.pages * PAGE, end)
        low = max(low, first)
        if low >= high or low < KERNEL_MAP:
            named.append(one)
            continue
        at = bisect_left(starts, low)
        names = [name for _, name in table[at : at + MOST_NAMES][: bisect_left(starts, high) - at]]
        before = symbols.label(low)
        if before is not None and before not in names[:1]:
            names.insert(0, before)  # what begins before the range and reaches into it
        named.append(one._replace(symbols=tuple(names)))
    return named

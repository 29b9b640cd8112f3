"""A running Linux kernel's own symbol table, found in its memory: kallsyms.

The tables are written by scripts/kallsyms.c, one after the other in .rodata, each aligned to 8 bytes. What they hold
has been the same for years (kernel/kallsyms.c reads it); their order has not:

    before 6.2          addresses or offsets, base; number; names; markers; token table, token index
    6.1.y, 6.2, 6.3     the same, with the names' alphabetical order before the token table
    6.4 and later       number; names; markers; token table, token index; addresses or offsets, base; order
    later still         no base: each offset counts from its own place

A name is a length and so many bytes, each standing for a token. Tokens 0x30 to 0x39 are the digits themselves, as every
kernel has digits in its names: ten bytes of text with a zero after each, which is what is searched for. All else
follows from there and is checked against each other, so that garbage ends the search instead of being believed.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_left
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.profile.reading import KERNEL_MAP, image_shift, read, search
from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypervisor.memory import GuestMemory

__all__ = ["find"]

DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
FIRST_DIGIT: Final = 0x30
TOKENS: Final = 256
INDEX_SIZE: Final = 2 * TOKENS
TOKEN_TEXT: Final = re.compile(rb"[!-~]*")
"""Names end in reports and on terminals: a kernel whose names hold anything else is none."""

BLOCK: Final = 256
"""One marker for so many names."""
MAX_SYMBOLS: Final = 1 << 20
MAX_NAME: Final = 514
"""Bytes of a compressed name with its length: KSYM_NAME_LEN is 512."""
MAX_TABLES: Final = 1 << 25
"""Bytes of all tables together; distributions' kernels have 4 MiB."""
MAX_HITS: Final = 4096
MAX_CANDIDATES: Final = 8
MAX_MARKERS: Final = 128
MAX_EXPANDED: Final = 4 * MAX_SYMBOLS
"""Bounds on what a guest can make this do: places that look like digits, token tables that look whole, markers that may
belong to one of them, and names that are decompressed in all."""


class _Tokens(NamedTuple):
    """A token table: where it and what follows its index lie, and its texts."""

    start: int
    end: int
    texts: list[str]


class _Names(NamedTuple):
    """Names with nm's letter before each, and the offset of their number from the start of the tables' bytes."""

    number_at: int
    names: list[str]


class _Budget:
    """How many names may still be decompressed."""

    def __init__(self) -> None:
        self.left = MAX_EXPANDED

    def take(self, number: int) -> bool:
        """Take so many, if there are."""
        self.left -= number
        return self.left >= 0


def find(memory: GuestMemory) -> Symbols | None:
    """Find the symbols of the Linux kernel that runs in this memory, at the addresses where it runs.

    Args:
        memory: the guest's RAM; the guest may run meanwhile.

    Returns:
        The symbols, or None where there is no kernel with CONFIG_KALLSYMS.
    """
    spare, budget = None, _Budget()
    for tokens in _token_tables(memory):
        symbols = _decode(memory, tokens, budget)
        if symbols is None:
            continue
        shift = image_shift(memory, symbols)
        if shift is not None and symbols.label(tokens.start - shift + KERNEL_MAP) is not None:
            return symbols
        # a copy that the kernel's decompressor left, or a kernel that cannot tell
        spare = spare or symbols
    return spare


def _token_tables(memory: GuestMemory) -> Iterator[_Tokens]:
    """Yield what looks like a token table, with an index that agrees."""
    candidates = 0
    for hits, digits in enumerate(search(memory, DIGITS)):
        tokens = _tokens_at(memory, digits)
        if tokens is not None:
            yield tokens
            candidates += 1
        if hits >= MAX_HITS or candidates >= MAX_CANDIDATES:
            return


def _tokens_at(memory: GuestMemory, digits: int) -> _Tokens | None:
    """Return the token table that has its token "0" here, or None."""
    window = _read_up_to(memory, digits, 1 << 14)
    rest = window.split(b"\0", TOKENS - FIRST_DIGIT)
    if len(rest) <= TOKENS - FIRST_DIGIT:
        return None
    end = _aligned(digits + len(window) - len(rest[-1]))
    packed = read(memory, end, INDEX_SIZE)
    if packed is None:
        return None
    index = struct.unpack(f"<{TOKENS}H", packed)
    start = digits - index[FIRST_DIGIT]
    table = read(memory, start, end - start)
    if index[0] or start % 8 or table is None:
        return None
    texts = table.split(b"\0", TOKENS)
    place = 0
    for text, expected in zip(texts[:TOKENS], index, strict=False):
        if place != expected or not TOKEN_TEXT.fullmatch(text):
            return None
        place += len(text) + 1
    if len(texts) != TOKENS + 1 or texts[-1].strip(b"\0"):
        return None
    return _Tokens(start, end + INDEX_SIZE, [text.decode("ascii") for text in texts[:TOKENS]])


def _decode(memory: GuestMemory, tokens: _Tokens, budget: _Budget) -> Symbols | None:
    """Read the tables around a token table, in whichever order they are."""
    before = _read_before(memory, tokens.start, MAX_TABLES)
    for markers_at, count in islice(_marker_tables(before), MAX_MARKERS):
        found = _names(before, markers_at, count, tokens.texts, budget)
        if found is None:
            continue
        number = len(found.names)
        after = _read_up_to(memory, tokens.end, 8 * number + 16)
        addresses = _addresses_before(before, found.number_at, number) or _addresses_after(after, number)
        if addresses is not None:
            return _symbols(addresses, found.names)
        offsets = _place_offsets(after, number)
        if offsets is not None:
            return _placed_symbols(memory, tokens.end, offsets, found.names)
    return None


def _symbols(addresses: Sequence[int], names: list[str]) -> Symbols:
    return Symbols((address, 0, name[1:]) for address, name in zip(addresses, names, strict=True))


# --- names ------------------------------------------------------------------------------------------------------------


def _marker_tables(before: bytes) -> Iterator[tuple[int, int]]:
    """Yield (offset, number of markers) of what may be the markers before a token table."""
    words = memoryview(before).cast("I")
    for end in (len(words), len(words) - 1):  # an odd number of markers has a word of padding behind it
        at = end - 1
        while at > 0 and words[at] > words[at - 1] and end - at <= MAX_SYMBOLS // BLOCK:
            at -= 1
        if at >= 2 and not words[at] and not at % 2:
            yield 4 * at, end - at
    # the alphabetical order, 3 bytes a name, lies between
    for size in range(2, min(len(words), 3 * MAX_SYMBOLS // 4), 2):
        count = (4 * size // 3 + BLOCK - 1) // BLOCK
        at = len(words) - size - (count + 1 & ~1)
        if at < 2:
            return
        if not words[at] and (count == 1 or 0 < words[at + 1] <= BLOCK * MAX_NAME):
            markers = words[at : at + count].tolist()
            if markers == sorted(markers):
                yield 4 * at, count


def _names(before: bytes, markers_at: int, count: int, texts: list[str], budget: _Budget) -> _Names | None:
    """Return the names that end where the markers begin, None where none fit their markers."""
    markers = memoryview(before)[markers_at : markers_at + 4 * count].cast("I")
    quads = memoryview(before)[:markers_at].cast("Q")
    latest = len(quads) - markers[-1] // 8
    for at in range(latest, max(latest - BLOCK * MAX_NAME // 8, 1) - 1, -1):
        number = quads[at - 1] if at <= len(quads) else 0
        if BLOCK * (count - 1) < number <= BLOCK * count:
            blob = before[8 * at : markers_at]
            # before 6.1 a length was one byte, later ones of 128 and more are two (ULEB128)
            for wide in (True, False):
                names = _expand(blob, number, markers, texts, wide=wide) if budget.take(number) else None
                if names is not None:
                    return _Names(8 * (at - 1), names)
    return None


def _expand(blob: bytes, number: int, markers: Sequence[int], texts: list[str], *, wide: bool) -> list[str] | None:
    """Decompress all names, None unless they agree with the markers and fill the space but for its padding."""
    token, join = texts.__getitem__, "".join
    names: list[str] = []
    at = 0
    try:
        if blob[markers[-1]] == 0:  # the cheapest sign of a wrong guess
            return None
        for position in range(number):
            if not position % BLOCK and markers[position // BLOCK] != at:
                return None
            size = blob[at]
            at += 1
            if wide and size & 0x80:
                size = size & 0x7F | blob[at] << 7
                at += 1
            names.append(join(map(token, blob[at : at + size])))
            at += size
            if len(names[-1]) < 2:
                return None
    except IndexError:
        return None
    return names if 0 <= len(blob) - at < 8 and not blob[at:].strip(b"\0") else None


# --- addresses --------------------------------------------------------------------------------------------------------


def _addresses_before(before: bytes, number_at: int, number: int) -> list[int] | None:
    """Return the addresses that end where the number of symbols begins (before 6.4)."""
    offsets_at = number_at - 8 - _aligned(4 * number)
    if offsets_at >= 0:
        addresses = _from_offsets(before[offsets_at : offsets_at + 4 * number], before[number_at - 8 : number_at])
        if addresses is not None:
            return addresses
    return _checked(array("Q", before[max(number_at - 8 * number, 0) : number_at]).tolist(), number)


def _addresses_after(after: bytes, number: int) -> list[int] | None:
    """Return the addresses that begin where the token index ends (6.4 and later)."""
    base_at = _aligned(4 * number)
    addresses = _from_offsets(after[: 4 * number], after[base_at : base_at + 8])
    if addresses is not None:
        return addresses
    return _checked(array("Q", after[: min(8 * number, len(after) & ~7)]).tolist(), number)


def _from_offsets(offsets: bytes, base: bytes) -> list[int] | None:
    """Return addresses from offsets and the base that the kernel has relocated, None where they are none.

    Where per-CPU symbols are absolute, their offsets are what they are, and the others are negative: base - 1 - offset
    (CONFIG_KALLSYMS_ABSOLUTE_PERCPU). Else all are unsigned.
    """
    start = int.from_bytes(base, "little")
    if len(base) < 8 or start < KERNEL_MAP or len(offsets) % 4:
        return None
    signed = array("i", offsets)
    if min(signed) < 0:
        addresses = [offset if offset >= 0 else start - 1 - offset for offset in signed]
    else:
        addresses = [start + offset for offset in signed]
    return _checked(addresses, len(signed))


def _checked(addresses: list[int], number: int) -> list[int] | None:
    """Return addresses that are sorted, as the kernel looks them up by bisection, and end in the kernel's image."""
    if len(addresses) != number or not KERNEL_MAP <= addresses[-1] < 1 << 64:
        return None
    if addresses != sorted(addresses):
        return None
    offsets = bisect_left(addresses, KERNEL_MAP)  # of per-CPU symbols, which are no addresses
    return None if offsets and addresses[offsets - 1] >> 32 else addresses


def _place_offsets(after: bytes, number: int) -> list[int] | None:
    """Return distances from the first offset, where each offset counts from its own place."""
    signed = array("i", after[: 4 * number])
    distances = [4 * at + offset for at, offset in enumerate(signed)]
    return distances if len(distances) == number and distances == sorted(distances) and distances[0] < 0 else None


def _placed_symbols(memory: GuestMemory, place: int, distances: list[int], names: list[str]) -> Symbols | None:
    """Return symbols from distances to the physical address of the first of them; phys_base tells the virtual one."""
    try:
        at = place + distances[[name[1:] for name in names].index("phys_base")]
    except ValueError:
        return None
    shift = read(memory, at, 8)
    if shift is None:
        return None
    start = place - int.from_bytes(shift, "little") + KERNEL_MAP & (1 << 64) - 1
    addresses = _checked([start + distance for distance in distances], len(distances))
    return None if addresses is None or addresses[0] < KERNEL_MAP else _symbols(addresses, names)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _aligned(size: int) -> int:
    return size + 7 & ~7


def _read_up_to(memory: GuestMemory, start: int, size: int) -> bytes:
    """Read `size` bytes or those up to the end of the RAM that `start` lies in."""
    for place in memory.ranges:
        if place.gpa <= start < place.gpa + place.size:
            return read(memory, start, min(size, place.gpa + place.size - start)) or b""
    return b""


def _read_before(memory: GuestMemory, end: int, size: int) -> bytes:
    """Read the `size` bytes before `end`, or those from the start of the RAM that it lies in."""
    for place in memory.ranges:
        if place.gpa < end <= place.gpa + place.size:
            start = max(end - size, place.gpa)
            return read(memory, start, end - start) or b""
    return b""

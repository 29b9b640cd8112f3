"""A kernel's kallsyms tables as scripts/kallsyms writes them, in each of its orders; small, and for tests only."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.memory import GuestMemory

__all__ = ["LAYOUTS", "Kernel", "Layout", "put_kernel"]

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
MIB = 1 << 20


class Layout(NamedTuple):
    """Where the parts of the tables lie.

    Attributes:
        addresses: "relative" to a base, "percpu" the same with absolute per-CPU symbols, "absolute", or "place".
        after: whether addresses and base come after the token index instead of first.
        order: where the alphabetical order is: nowhere, "before" the token table or "last".
        wide: whether lengths of 128 and more take two bytes.
    """

    addresses: str
    after: bool
    order: str | None
    wide: bool


LAYOUTS = {
    "5.10, absolute addresses": Layout("absolute", after=False, order=None, wide=False),
    "5.10, one CPU": Layout("relative", after=False, order=None, wide=False),
    "5.10": Layout("percpu", after=False, order=None, wide=False),
    "6.1": Layout("percpu", after=False, order=None, wide=True),
    "6.1.192 and 6.2": Layout("percpu", after=False, order="before", wide=True),
    "6.4": Layout("percpu", after=True, order="last", wide=True),
    "6.4, absolute addresses": Layout("absolute", after=True, order="last", wide=True),
    "6.15": Layout("relative", after=True, order="last", wide=True),
    "offsets from their own place": Layout("place", after=True, order="last", wide=True),
}


class Kernel(NamedTuple):
    """What was put where.

    Attributes:
        entries: (address where it runs, letter and name), sorted by address.
        tables: guest-physical address of the first byte of the tables.
        size: of the tables, in bytes.
        shift: the value of phys_base.
    """

    entries: list[tuple[int, str]]
    tables: int
    size: int
    shift: int


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def tokens_for(names: Sequence[str]) -> list[str]:
    """Return 256 tokens: the characters themselves, and in free places whatever two characters are often together."""
    used = {ord(character) for name in names for character in name} | set(range(0x30, 0x3A))
    pairs: dict[str, int] = {}
    for name in names:
        for at in range(len(name) - 1):
            pairs[name[at : at + 2]] = pairs.get(name[at : at + 2], 0) + 1
    best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    free = (code for code in range(255, -1, -1) if code not in used)
    tokens = [chr(code) if code in used else "" for code in range(256)]
    for code, pair in zip(free, best, strict=False):
        tokens[code] = pair
    return tokens


def compress(name: str, tokens: Sequence[str]) -> bytes:
    """Return the name in tokens, longest first."""
    codes = {token: code for code, token in enumerate(tokens) if token}
    packed, at = bytearray(), 0
    while at < len(name):
        size = 2 if name[at : at + 2] in codes and at + 1 < len(name) else 1
        packed.append(codes[name[at : at + size]])
        at += size
    return bytes(packed)


def tables(layout: Layout, entries: Sequence[tuple[int, str]], place: int) -> bytes:
    """Return the tables for sorted entries.

    Args:
        layout: their order.
        entries: (address where the guest runs, letter and name).
        place: the virtual address where the tables will lie.
    """
    names = [name for _, name in entries]
    tokens = tokens_for(names)
    packed, markers = bytearray(), []
    for index, name in enumerate(names):
        if not index % 256:
            markers.append(len(packed))
        code = compress(name, tokens)
        if layout.wide and len(code) > 127:
            packed += bytes([len(code) & 0x7F | 0x80, len(code) >> 7])
        else:
            packed.append(len(code))
        packed += code
    order = b"".join(
        index.to_bytes(3, "big") for index in sorted(range(len(names)), key=lambda at: (names[at][1:], at))
    )
    texts = [token.encode() + b"\0" for token in tokens]
    index = [sum(map(len, texts[:at])) for at in range(256)]
    middle = [struct.pack("<I", len(names)), bytes(packed), struct.pack(f"<{len(markers)}I", *markers)]
    if layout.order == "before":
        middle.append(order)
    middle += [b"".join(texts), struct.pack("<256H", *index)]
    middle_bytes = b"".join(map(_pad, middle))
    last = [order] if layout.order == "last" else []
    where = place + len(middle_bytes) if layout.after else place
    parts = list(map(_pad, addresses(layout.addresses, [address for address, _ in entries], where)))
    return b"".join([middle_bytes, *parts, *map(_pad, last)] if layout.after else [*parts, middle_bytes])


def addresses(kind: str, values: Sequence[int], place: int) -> list[bytes]:
    """Return the table of addresses and its base, if it has one."""
    if kind == "absolute":
        return [struct.pack(f"<{len(values)}Q", *values)]
    if kind == "place":
        return [struct.pack(f"<{len(values)}i", *(value - place - 4 * at for at, value in enumerate(values)))]
    base = min(value for value in values if value >= START_KERNEL_MAP)
    if kind == "relative":
        return [struct.pack(f"<{len(values)}I", *(value - base for value in values)), struct.pack("<Q", base)]
    offsets = [value if value < START_KERNEL_MAP else base - 1 - value for value in values]
    return [struct.pack(f"<{len(values)}i", *offsets), struct.pack("<Q", base)]


def put_kernel(
    memory: GuestMemory,
    layout: Layout,
    names: Sequence[tuple[int, str]],
    *,
    physical: int = 16 * MIB,
    virtual: int = START_KERNEL_MAP + 16 * MIB,
    rodata: int = 2 * MIB,
    data_symbols: bool = True,
) -> Kernel:
    """Put a kernel's tables and its phys_base into memory.

    Args:
        memory: the guest's RAM.
        layout: which tables.
        names: (offset from the image's start, or a per-CPU offset for the letter "A"; letter and name).
        physical: where the image lies.
        virtual: where it runs.
        rodata: offset of the tables in the image.
        data_symbols: whether there are names for data (CONFIG_KALLSYMS_ALL).
    """
    percpu = layout.addresses in {"percpu", "absolute"}
    entries = [(value, name) for value, name in names if name[0] == "A" and percpu]
    entries += [(virtual + value, name) for value, name in names if name[0] != "A"]
    shift = physical - (virtual - START_KERNEL_MAP)
    data = rodata - 64
    if data_symbols:
        entries += [(virtual + data, "Dphys_base"), (virtual + rodata, "Dthe_tables"), (virtual + 8 * rodata, "B_end")]
    entries.sort(key=lambda entry: entry[0])
    written = tables(layout, entries, virtual + rodata)
    memory.write(physical + data, struct.pack("<q", shift))
    memory.write(physical + rodata, written)
    return Kernel(entries, physical + rodata, len(written), shift & (1 << 64) - 1)

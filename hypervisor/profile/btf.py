"""Where the members of a kernel's structures lie, from its own type information: BTF.

Documentation/bpf/btf.rst, "Type and String Encoding": a header, a table of types of which each has a head of 12 bytes
and what its kind adds, and a table of strings. Types refer to each other by number, from 1 on.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor.symbols import Symbols

    Reader = Callable[[int, int], bytes | None]

__all__ = ["Btf", "find"]

MAGIC: Final = 0xEB9F
HEADER: Final = struct.Struct("<HBBIIIII")  # magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
HEAD: Final = struct.Struct("<III")  # name_off, info, size or type
MEMBER: Final = struct.Struct("<III")  # name_off, type, offset
MAX_SIZE: Final = 1 << 25
MAX_DEPTH: Final = 16
"""Typedefs and qualifiers of each other; the kernel has fewer than 8."""

ARRAY, STRUCT, UNION, TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG = 3, 4, 5, 8, 9, 10, 11, 18
ALIASES: Final = (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG)
EXTRA: Final = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12)} | {
    17: (4, 0),
    19: (0, 12),
}
"""Kind -> bytes behind its head: so many, and so many for each of its vlen."""
MAX_KIND: Final = 19
KIND_FLAG: Final = 1 << 31
"""Of a structure: a member's offset has the size of a bit field in its top 8 bits."""


class Btf:
    """Type information that was parsed as far as finding structures needs."""

    def __init__(self, types: bytes, strings: bytes) -> None:
        """Index the types; those from the first broken one on are left out."""
        self._types = types
        self._strings = strings
        self._places = array("I", [0])  # by number; 0 is void
        self._structures: dict[int, int] = {}
        at = 0
        while at + HEAD.size <= len(types):
            name, info, _ = HEAD.unpack_from(types, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            if not 0 < kind <= MAX_KIND:
                break
            if kind in (STRUCT, UNION) and name:
                self._structures.setdefault(name, len(self._places))
            self._places.append(at)
            fixed, each = EXTRA.get(kind, (0, 0))
            at += HEAD.size + fixed + each * count
        self._named: dict[str, int] | None = None

    @classmethod
    def parse(cls, data: bytes) -> Btf | None:
        """Read BTF as it is between __start_BTF and __stop_BTF; None when it is none."""
        if len(data) < HEADER.size:
            return None
        magic, version, _, length, types, types_size, strings, strings_size = HEADER.unpack_from(data)
        if magic != MAGIC or version != 1 or length < HEADER.size:
            return None
        types, strings = types + length, strings + length
        if types + types_size > len(data) or strings + strings_size > len(data):
            return None
        return cls(data[types : types + types_size], data[strings : strings + strings_size])

    def offset(self, structure: str, path: str) -> int | None:
        """Return the offset in bytes of a member, as of "tasks.next" in "task_struct".

        A step of the path may be an element of an array: "mem[0].base".

        Returns:
            The offset; None when there is no such member, or it is a bit field that begins within a byte.
        """
        number, total = self._structure(structure), 0
        for step in path.split("."):
            name, _, index = step.partition("[")
            found = None if number is None else self._member(number, name)
            if found is None:
                return None
            number, bits = found
            total += bits
            if index:
                number, size = self._element(number)
                if size is None:
                    return None
                total += 8 * size * int(index.rstrip("]"))
        return None if total % 8 else total // 8

    def size(self, structure: str) -> int | None:
        """Return the size of a structure in bytes."""
        number = self._structure(structure)
        return None if number is None else self._head(number)[2]

    def _structure(self, name: str) -> int | None:
        if self._named is None:
            self._named = {self._string(at): number for at, number in self._structures.items()}
        return self._named.get(name)

    def _string(self, at: int) -> str:
        end = self._strings.find(b"\0", at)
        return self._strings[at:end].decode("ascii", "replace") if end >= 0 else ""

    def _head(self, number: int) -> tuple[int, int, int]:
        """Return kind, info and size-or-type of a type; kind 0 where there is none."""
        if not 0 < number < len(self._places):
            return 0, 0, 0
        _, info, last = HEAD.unpack_from(self._types, self._places[number])
        return info >> 24 & 0x1F, info, last

    def _resolve(self, number: int) -> int:
        """Return what a typedef or a qualifier stands for."""
        for _ in range(MAX_DEPTH):
            kind, _, target = self._head(number)
            if kind not in ALIASES:
                break
            number = target
        return number

    def _members(self, number: int) -> Iterator[tuple[str, int, int]]:
        """Yield (name, type, offset in bits); a name is empty for what is anonymous."""
        kind, info, _ = self._head(number)
        if kind not in (STRUCT, UNION):
            return
        at = self._places[number] + HEAD.size
        end = min(at + MEMBER.size * (info & 0xFFFF), len(self._types) - MEMBER.size + 1)
        for place in range(at, end, MEMBER.size):
            name, member, offset = MEMBER.unpack_from(self._types, place)
            yield self._string(name) if name else "", member, offset & 0xFF_FFFF if info & KIND_FLAG else offset

    def _member(self, number: int, wanted: str) -> tuple[int, int] | None:
        """Return type and offset in bits of a member; those of anonymous ones count as the structure's own."""
        open_ones, seen = [(self._resolve(number), 0)], {0}  # each is looked into once: they may hold each other
        while open_ones:
            number, base = open_ones.pop()
            if number in seen:
                continue
            seen.add(number)
            for name, member, offset in self._members(number):
                if name == wanted:
                    return member, base + offset
                if not name:
                    open_ones.append((self._resolve(member), base + offset))
        return None

    def _element(self, number: int) -> tuple[int, int | None]:
        """Return type and size in bytes of an array's elements, if these are structures."""
        number = self._resolve(number)
        if self._head(number)[0] != ARRAY:
            return 0, None
        at = self._places[number] + HEAD.size
        if at + 4 > len(self._types):
            return 0, None
        element = self._resolve(int.from_bytes(self._types[at : at + 4], "little"))
        kind, _, size = self._head(element)
        return element, size if kind in (STRUCT, UNION) else None


def find(symbols: Symbols, read_kernel: Reader) -> Btf | None:
    """Return the type information of a running kernel, None when it has none (CONFIG_DEBUG_INFO_BTF).

    Args:
        symbols: the kernel's, at the addresses where it runs.
        read_kernel: copies (address, size) out of its virtual memory.
    """
    start, stop = symbols.address_of("__start_BTF"), symbols.address_of("__stop_BTF")
    if start is None or stop is None or not 0 < stop - start <= MAX_SIZE:
        return None
    data = read_kernel(start, stop - start)
    return None if data is None else Btf.parse(data)

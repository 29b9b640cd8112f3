"""Names for guest addresses, from an ELF's symbol table or a kernel's System.map."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

from hypervisor.errors import ImageError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

__all__ = ["Buffer", "Symbols"]

Buffer = bytes | bytearray | memoryview

ELF_MAGIC: Final = b"\x7fELF"
MAP_LINE: Final = rb"^([0-9a-fA-F]{8,16}) ([A-Za-z?]) (\S+)"
"""A line of System.map or /proc/kallsyms: address, nm's letter for the kind, name."""

HIGHER_HALF: Final = 1 << 63
MASK: Final = (1 << 64) - 1

PAGE_FAULT_HANDLERS: Final = (
    ("asm_exc_page_fault", 0),
    ("page_fault", 0),
    ("early_idt_handler_array", 14 * 9),
    ("early_idt_handler_array", 14 * 13),
)

# ELF symbol types, section types and section numbers (System V ABI, chapter 4).
NOTYPE: Final = 0
OBJECT: Final = 1
FUNC: Final = 2
SHT_SYMTAB: Final = 2
SHN_UNDEF: Final = 0
SHN_ABS: Final = 0xFFF1


class Symbols:
    """A sorted table of names; a look-up costs one bisection.

    Attributes:
        offset: bytes by which the guest runs above the addresses in the file, as KASLR moves a kernel.
    """

    __slots__ = ("_aliases", "_names", "_sizes", "_starts", "offset")

    def __init__(self, entries: Iterable[tuple[int, int, str]], *, offset: int = 0) -> None:
        """Sort (address, size, name) entries; a size of 0 reaches to the next name.

        Of several names at one address the one with a size wins, then the one without a leading underscore, then the
        shortest; the others are only good for `address_of`. Where some addresses lie in the higher half, those below
        are no addresses but per-CPU offsets, and are left out.
        """
        best: dict[int, tuple[bool, bool, int, str, int]] = {}
        aliases: dict[str, int] = {}
        for address, size, name in entries:
            rank = (not size, name.startswith("_"), len(name), name, size)
            other = best.get(address)
            if other is None or rank < other:
                best[address] = rank
                rank = other or rank
            if other is not None:
                aliases.setdefault(rank[3], address)
        starts = sorted(best)
        if starts and starts[-1] >= HIGHER_HALF:
            starts = starts[bisect_left(starts, HIGHER_HALF) :]
            aliases = {name: address for name, address in aliases.items() if address >= HIGHER_HALF}
        self.offset = offset
        self._aliases = aliases
        self._starts = array("Q", starts)
        self._sizes = array("Q", [best[start][4] for start in starts])
        self._names = [best[start][3] for start in starts]

    def __len__(self) -> int:
        return len(self._names)

    @classmethod
    def of_sorted(cls, starts: array[int], sizes: array[int], names: list[str]) -> Symbols:
        """Take a table that is sorted already, as another's `entries` are: one name an address, arrays of "Q"."""
        symbols = cls(())
        symbols._starts, symbols._sizes, symbols._names = starts, sizes, names
        return symbols

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, offset: int = 0) -> Symbols:
        """Read the symbols of an ELF file or of a System.map, told apart by content.

        Args:
            path: the file.
            offset: KASLR offset in bytes: where the guest runs less where the file says.

        Raises:
            ImageError: when the file cannot be read, is neither, or has no symbols.
        """
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error
        return cls.parse(data, name=str(path), offset=offset)

    @classmethod
    def parse(cls, data: Buffer, *, name: str, offset: int = 0) -> Symbols:
        """Read the symbols of an ELF file or of a System.map in memory.

        Args:
            data: the whole file.
            name: what to call it in an error.
            offset: as for `load`.

        Raises:
            ImageError: when it is neither, or has no symbols.
        """
        is_elf = bytes(data[:4]) == ELF_MAGIC
        symbols = cls(_from_elf(name, data) if is_elf else _from_map(data), offset=offset)
        if not len(symbols):
            raise ImageError(
                f"{name}: no symbols in it",
                hint="use an ELF that was not stripped, or the System.map of the same build",
            )
        return symbols

    def find(self, address: int) -> str | None:
        """Return "name+0x12/0x40" for the guest address, or None between and beyond all names.

        The second number is the size in bytes, and is left out where it is not known (the last name of a map).
        """
        found = self._at(address)
        if found is None:
            return None
        index, distance, size = found
        return f"{self._names[index]}+{distance:#x}/{size:#x}" if size else self._names[index]

    def _at(self, address: int) -> tuple[int, int, int] | None:
        """Return the index of what holds the address, the distance from its start, and its size or 0."""
        wanted = address - self.offset & MASK
        index = bisect_right(self._starts, wanted) - 1
        if index < 0:
            return None
        start, size = self._starts[index], self._sizes[index]
        if not size and index + 1 < len(self._starts):
            size = self._starts[index + 1] - start
        distance = wanted - start
        return (index, distance, size) if distance < (size or 1) else None

    def label(self, address: int) -> str | None:
        """Return the name alone of what holds the guest address, None where `find` has none."""
        found = self._at(address)
        return None if found is None else self._names[found[0]]

    def entries(self) -> Iterator[tuple[int, int, str]]:
        """Yield (address in the file, size or 0, name), in the order of addresses, one name an address."""
        return zip(self._starts, self._sizes, self._names, strict=True)

    def address_of(self, name: str) -> int | None:
        """Return where the guest has the symbol of this exact name, None when there is none; looks at all of them."""
        try:
            start = self._starts[self._names.index(name)]
        except ValueError:
            if name not in self._aliases:
                return None
            start = self._aliases[name]
        return start + self.offset & MASK

    def kaslr_offset(self, page_fault_handler: int) -> int | None:
        """Return the offset that puts a Linux kernel's page fault handler where the guest's IDT has it.

        Linux moves by multiples of 2 MiB and by less than 1 GiB (CONFIG_PHYSICAL_ALIGN, KERNEL_IMAGE_SIZE). Early
        during boot the handler is entry 14 of an array of stubs of 9 bytes, or 13 with an ENDBR
        (EARLY_IDT_HANDLER_SIZE).

        Args:
            page_fault_handler: the address in gate 14.

        Returns:
            The offset in bytes, or None when no handler of this table fits.
        """
        for name, within in PAGE_FAULT_HANDLERS:
            place = self.address_of(name)
            if place is not None:
                moved = page_fault_handler - (place - self.offset + within & MASK)
                if 0 <= moved < 1 << 30 and not moved % (1 << 21):
                    return moved
        return None


def _from_map(data: Buffer) -> Iterator[tuple[int, int, str]]:
    """Yield the symbols of a System.map; undefined, weak-undefined and absolute ones have no place."""
    import re  # noqa: PLC0415 - only a guest that died needs it

    for match in re.finditer(MAP_LINE, data, re.MULTILINE):
        address, kind, name = match.groups()
        if kind not in (b"U", b"w", b"A", b"a"):
            yield int(address, 16), 0, name.decode("utf-8", "replace")


def _from_elf(name: str, data: Buffer) -> Iterator[tuple[int, int, str]]:
    """Yield functions, objects and assembly labels of an ELF's symbol table.

    Read by hand (System V ABI, chapter 4): three structures are all it takes, a general ELF library needs an object
    for each of a kernel's 150 000 symbols, and here a broken table
    has one way to fail: an offset beyond the file.
    """
    wide = bytes(data[4:5]) == b"\2"  # EI_CLASS: 2 is ELFCLASS64
    order = ">" if bytes(data[5:6]) == b"\2" else "<"  # EI_DATA: 2 is ELFDATA2MSB
    try:
        table, names = _symbol_table(data, order, wide=wide)
    except (struct.error, OverflowError) as error:
        raise ImageError(f"{name}: its ELF section table is broken") from error
    layout = struct.Struct(order + ("IBBHQQ" if wide else "IIIBBH"))
    for fields in layout.iter_unpack(table[: len(table) // layout.size * layout.size]):
        at, info, _, index, value, size = fields if wide else (fields[0], *fields[3:], *fields[1:3])
        if info & 0xF in (NOTYPE, OBJECT, FUNC) and index not in (SHN_UNDEF, SHN_ABS):
            text = names[at : max(names.find(b"\0", at), at)].decode("utf-8", "replace")
            if text and not text.startswith(("$", ".L", "__pfx_")):
                yield value, size, text


def _symbol_table(data: Buffer, order: str, *, wide: bool) -> tuple[bytes, bytes]:
    """Return the contents of the first SHT_SYMTAB section and of its string table; both empty when there is none."""
    place, word = (0x28, "Q") if wide else (0x20, "I")
    (headers,) = struct.unpack_from(order + word, data, place)  # e_shoff
    entry_size, count = struct.unpack_from(order + "HH", data, 0x3A if wide else 0x2E)  # e_shentsize, e_shnum
    # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link
    section = struct.Struct(order + ("IIQQQQI" if wide else "IIIIIII"))
    for index in range(count):
        _, kind, _, _, start, size, link = section.unpack_from(data, headers + index * entry_size)
        if kind == SHT_SYMTAB:
            _, _, _, _, names, names_size, _ = section.unpack_from(data, headers + link * entry_size)
            return bytes(data[start : start + size]), bytes(data[names : names + names_size])
    return b"", b""

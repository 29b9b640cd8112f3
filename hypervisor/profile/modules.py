"""Names in a running kernel's modules: its list of modules, read in its memory.

Each struct module (include/linux/module.h) has its own symbol table, in the form of an ELF's; the kernel's type
information (BTF) tells where its members are. The list may change while it is walked: what does not fit is left out.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor.profile.btf import Btf

    Reader = Callable[[int, int], bytes | None]

__all__ = ["find"]

MAX_MODULES: Final = 1024
MAX_SYMBOLS: Final = 1 << 16
"""Of one module."""
MAX_ALL_SYMBOLS: Final = 1 << 18
MAX_STRINGS: Final = 1 << 21
MAX_NAME: Final = 512
NAME_SIZE: Final = 56
"""MODULE_NAME_LEN of a 64-bit kernel."""
MAX_TEXT: Final = 1 << 28
PAGE: Final = 4096
SYMBOL: Final = struct.Struct("<IBBHQQ")  # Elf64_Sym
FUNC: Final = 2

# the text of a module: since 6.4 the first of its memories (enum mod_mem_type), before it a part of its layout
TEXT: Final = (("mem[0].base", "mem[0].size"), ("core_layout.base", "core_layout.text_size"))


class _Offsets(NamedTuple):
    """Of the members of struct module and struct mod_kallsyms, in bytes."""

    list: int
    name: int
    base: int
    size: int
    kallsyms: int
    symtab: int
    num_symtab: int
    strtab: int


def find(symbols: Symbols, read_kernel: Reader, types: Btf) -> Symbols:
    """Return the symbols of all modules as "function [module]".

    Args:
        symbols: the kernel's, at the addresses where it runs.
        read_kernel: copies (address, size) out of its virtual memory, through its page tables.
        types: its type information.
    """
    head, offsets = symbols.address_of("modules"), _offsets(types)
    if head is None or offsets is None:
        return Symbols(())
    entries: list[tuple[int, int, str]] = []
    for module in _walk(read_kernel, head, offsets.list):
        entries += _symbols_of(read_kernel, module, offsets)
        if len(entries) > MAX_ALL_SYMBOLS:
            break
    return Symbols(entries)


def _offsets(types: Btf) -> _Offsets | None:
    for text in TEXT:
        paths = [("module", member) for member in ("list.next", "name", *text, "kallsyms")]
        paths += [("mod_kallsyms", member) for member in ("symtab", "num_symtab", "strtab")]
        found = [place for path in paths if (place := types.offset(*path)) is not None]
        if len(found) == len(paths):
            return _Offsets(*found)
    return None


def _walk(read: Reader, head: int, link: int) -> Iterator[int]:
    """Yield the addresses of the modules, until the list comes back to its head."""
    at, seen = head, {head}
    while len(seen) <= MAX_MODULES:
        at = _word(read, at)
        if at in seen or not at:
            return
        seen.add(at)
        yield at - link


def _symbols_of(read: Reader, module: int, offsets: _Offsets) -> list[tuple[int, int, str]]:
    """Return a module's text as a symbol of the module's name, and its functions."""
    name = _text(read(module + offsets.name, NAME_SIZE) or b"")
    base, size = _word(read, module + offsets.base), _word(read, module + offsets.size, 4)
    if not name or not base or not 0 < size <= MAX_TEXT:
        return []
    whole = [(base, size, f"[{name}]")]
    table = _word(read, module + offsets.kallsyms)
    count = _word(read, table + offsets.num_symtab, 4) if table else 0
    if not 0 < count <= MAX_SYMBOLS:
        return whole
    packed = read(_word(read, table + offsets.symtab), count * SYMBOL.size)
    entries = [entry for entry in SYMBOL.iter_unpack(packed or b"") if base <= entry[4] < base + size]
    strings = _strings(read, _word(read, table + offsets.strtab), max((entry[0] for entry in entries), default=0))
    found: dict[int, str] = {}
    for at, kind, _, _, value, _ in entries:
        text = _text(strings[at : at + MAX_NAME])
        if text and kind & 0xF == FUNC:
            found.setdefault(value, f"{text} [{name}]")
    # what lies between functions is padding, of the one before it
    places = sorted({base, *found})
    ends = [*places[1:], base + size]
    return [(at, end - at, found.get(at, f"[{name}]")) for at, end in zip(places, ends, strict=True)]


def _strings(read: Reader, start: int, last: int) -> bytes:
    """Return a string table whose last name begins at `last`: its end is known only by what is mapped."""
    if last > MAX_STRINGS:
        return b""
    end = start + last + MAX_NAME
    return read(start, end - start) or read(start, (start + last | PAGE - 1) + 1 - start) or b""


def _word(read: Reader, address: int, size: int = 8) -> int:
    """Return a little-endian number, 0 where there is none."""
    return int.from_bytes(read(address, size) or b"", "little")


def _text(data: bytes) -> str:
    """Return a name of printable characters, an empty one where it is none: it ends in reports and on terminals."""
    text = data.split(b"\0", 1)[0]
    return text.decode("ascii") if all(0x20 < byte < 0x7F for byte in text) else ""

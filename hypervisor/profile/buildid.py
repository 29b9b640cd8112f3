"""Whether a file of symbols is of the kernel that runs: by its build id, its version, or its addresses.

A build id is a note (System V ABI, chapter 5, "Note Section") of type NT_GNU_BUILD_ID with the owner "GNU", written by
the linker into each image. A System.map has none; there the names must lie as far from each other as the kernel's do.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from hypervisor.errors import ImageError
from hypervisor.profile.reading import BANNER, image_reader
from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from hypervisor.memory import GuestMemory

__all__ = ["banner", "moved_by", "of_elf", "of_kernel", "of_notes", "same_kernel"]

ELF_MAGIC: Final = b"\x7fELF"
NT_GNU_BUILD_ID: Final = 3
PT_NOTE: Final = 4
SHT_NOTE: Final = 7
MAX_NOTES: Final = 1 << 16
MAX_BANNER: Final = 512

# the boot protocol's header (Documentation/arch/x86/boot.rst)
BOOT_MAGIC_AT, BOOT_MAGIC, VERSION_AT = 0x202, b"HdrS", 0x20E

LANDMARKS: Final = 64
"""Names compared between two tables, spread over all of one; a fifth of them must be in the other to say anything."""
KASLR_UNIT: Final = 1 << 21
MASK: Final = (1 << 64) - 1


def of_notes(notes: bytes) -> bytes | None:
    """Return the GNU build id among ELF notes, None when there is none."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        at = name_at + (name_size + 3 & ~3)
        if kind == NT_GNU_BUILD_ID and notes[name_at : name_at + name_size] == b"GNU\0":
            found = notes[at : at + size]
            return found if len(found) == size and 0 < size <= 64 else None
        at += size + 3 & ~3
    return None


def of_elf(data: bytes) -> bytes | None:
    """Return the GNU build id of a 64-bit ELF file, from its segments or else its sections; None when it has none."""
    if data[:4] != ELF_MAGIC or data[4:6] != b"\2\1":
        return None
    try:
        segments, sections = struct.unpack_from("<QQ", data, 0x20)
        segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", data, 0x36)
        places = []
        for index in range(segment_count):
            kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", data, segments + index * segment_size)
            places += [(offset, size)] if kind == PT_NOTE else []
        for index in range(section_count):
            _, kind, _, _, offset, size = struct.unpack_from("<IIQQQQ", data, sections + index * section_size)
            places += [(offset, size)] if kind == SHT_NOTE else []
    except (struct.error, OverflowError):
        return None
    for offset, size in places:
        found = of_notes(data[offset : offset + min(size, MAX_NOTES)])
        if found is not None:
            return found
    return None


def of_kernel(memory: GuestMemory, symbols: Symbols) -> bytes | None:
    """Return the build id of the kernel that runs, from its .notes; None where they are not found.

    Args:
        memory: the guest's RAM.
        symbols: the kernel's, at the addresses where it runs, with those of its data.
    """
    start, stop = symbols.address_of("__start_notes"), symbols.address_of("__stop_notes")
    read = image_reader(memory, symbols)
    if read is None or start is None or stop is None or not 0 < stop - start <= MAX_NOTES:
        return None
    return of_notes(read(start, stop - start) or b"")


def banner(memory: GuestMemory, symbols: Symbols) -> bytes | None:
    """Return the text of /proc/version of the kernel that runs, None where it is not found."""
    start, read = symbols.address_of("linux_banner"), image_reader(memory, symbols)
    data = None if start is None or read is None else read(start, MAX_BANNER)
    if data is None or not data.startswith(BANNER):
        return None
    return data.split(b"\0", 1)[0].rstrip(b"\n")


def moved_by(file: Symbols, kernel: Symbols) -> int | None:
    """Return how far the kernel runs above the addresses of a file of symbols, if both are of the same build.

    Args:
        file: from a System.map or an ELF; its own offset is not looked at.
        kernel: found in memory.

    Returns:
        The offset for `file`, a multiple of 2 MiB; None when the names that both have do not lie alike.
    """
    entries = [entry for entry in kernel.entries() if entry[2] not in ("_end", "_etext")]
    landmarks = entries[:: max(len(entries) // LANDMARKS, 1)]
    known = {name: address for address, _, name in file.entries()}
    distances = [address + kernel.offset - known[name] & MASK for address, _, name in landmarks if name in known]
    if len(distances) < max(len(landmarks) // 5, 1):
        return None
    usual = max(set(distances), key=distances.count)
    # a static name that several files share may be another one of them
    return usual if not usual % KASLR_UNIT and distances.count(usual) >= 0.9 * len(distances) else None


def same_kernel(data: bytes, memory: GuestMemory, symbols: Symbols) -> bool | None:
    """Tell whether a file is of the kernel that runs.

    Args:
        data: the file: an ELF (vmlinux, or its debug file), a System.map, or a bzImage.
        memory: the guest's RAM; the guest may run meanwhile.
        symbols: what `kallsyms.find` found there.

    Returns:
        True or False, and None where there is nothing to compare.
    """
    if data[BOOT_MAGIC_AT : BOOT_MAGIC_AT + 4] == BOOT_MAGIC:
        return _same_version(data, banner(memory, symbols))
    try:
        file = Symbols.parse(data, name="the symbols")
    except ImageError:
        file = None
    moved = None if file is None else moved_by(file, symbols)
    theirs = of_elf(data)
    if theirs is not None:
        ours = of_kernel(memory, symbols)
        if ours is None and file is not None and moved is not None:
            # a kernel without names for its data: the file knows where they are
            file.offset = moved
            ours = of_kernel(memory, file)
        if ours is not None:
            return ours == theirs
    return None if file is None else moved is not None


def _same_version(image: bytes, running: bytes | None) -> bool | None:
    """Compare a bzImage's "release (user@host) version" with a banner, which has the compiler before its version."""
    at = int.from_bytes(image[VERSION_AT : VERSION_AT + 2], "little")
    text = image[at + 0x200 : at + 0x200 + MAX_BANNER].split(b"\0", 1)[0]
    if not at or running is None or b") " not in text:
        return None
    head, tail = text.split(b") ", 1)
    return running.startswith(BANNER + head + b") ") and running.endswith(tail)

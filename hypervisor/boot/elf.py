"""ELF kernels: reading the file, and booting it by the 64-bit entry or by PVH.

An ELF kernel may offer several entries. With protocol "auto" the choice is: multiboot where a multiboot header is
found; else the 64-bit entry of a 64-bit file, because that is the one entry which every x86-64 vmlinux has; PVH for a
32-bit file, and for a 64-bit one whose e_entry is of no use (it is no physical address inside the file, or it is the
PVH entry itself). "linux64" and "pvh" take that entry or refuse.

Structures are those of the System V ABI (gABI, chapters 4 and 5). A Linux vmlinux has its physical entry in e_entry
and its physical addresses in p_paddr.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.boot.image import BootPlan
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.boot.bzimage import SetupHeader
    from hypervisor.boot.image import BootRequest
    from hypervisor.boot.linux64 import Linux64
    from hypervisor.boot.pvh import Pvh

__all__ = ["MAGIC", "Elf", "Program", "parse", "parts", "physical_entry", "plan"]

MAGIC: Final = b"\x7fELF"

CLASS: Final = 4
DATA: Final = 5
TYPE: Final = 16
CLASS_32: Final = 1
CLASS_64: Final = 2
LITTLE_ENDIAN: Final = 1
EXECUTABLES: Final = (2, 3)
"""ET_EXEC and ET_DYN."""
MACHINES: Final = (3, 62)
"""EM_386 and EM_X86_64."""
PT_LOAD: Final = 1
PT_INTERP: Final = 3
PT_NOTE: Final = 4

XEN_PHYS32_ENTRY: Final = 18
"""XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry (Xen's public header elfnote.h)."""
XEN_GUEST_OS: Final = 6
"""XEN_ELFNOTE_GUEST_OS."""
GNU_ABI_TAG: Final = 1
"""NT_GNU_ABI_TAG, which the C library puts into programs and no kernel has."""

_HEADER_32: Final = struct.Struct("<HHIIIIIHHH")
_HEADER_64: Final = struct.Struct("<HHIQQQIHHH")
_PROGRAM_32: Final = struct.Struct("<IIIIIIII")
_PROGRAM_64: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")

_DAMAGED = "copy or download the file again"
_WHAT_BOOTS = "an ELF kernel is an x86-64 vmlinux, or has a PVH note or a multiboot header"


class Program(NamedTuple):
    """One program header: what part of the file goes where. Sizes and offsets in bytes."""

    number: int
    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Elf(NamedTuple):
    """What a loader needs of an ELF file.

    Attributes:
        bits: 32 or 64.
        entry: e_entry.
        loads: the PT_LOAD headers with a size, in file order.
        pvh: the PVH entry, or None.
        linux: whether a note says that this is a Linux kernel.
    """

    bits: int
    entry: int
    loads: tuple[Program, ...]
    pvh: int | None
    linux: bool

    @property
    def end(self) -> int:
        """Where the highest segment ends."""
        return max(program.paddr + program.memsz for program in self.loads)


def parse(data: memoryview, name: str) -> Elf:
    """Read an ELF file that begins with MAGIC.

    Raises:
        ImageError: if it is no x86 executable, is truncated, or is a program rather than a kernel.
    """
    bits = _check_kind(data, name)
    header = _HEADER_64 if bits == 64 else _HEADER_32
    try:
        _, _, _, entry, table, _, _, _, size, count = header.unpack_from(data, TYPE)
        programs = tuple(_programs(data, bits, table, size, count))
    except struct.error as error:
        raise ImageError(f"{name} is a truncated ELF file: its headers are cut short", hint=_DAMAGED) from error
    for program in programs:
        _check_program(program, bits, name, len(data))
    if any(program.type == PT_INTERP for program in programs):
        raise ImageError(f"{name} is a program for Linux user space, not a kernel", hint=_WHAT_BOOTS)
    loads = tuple(program for program in programs if program.type == PT_LOAD and program.memsz)
    if not loads:
        raise ImageError(f"{name}: the ELF file has nothing to load", hint=_WHAT_BOOTS)
    pvh = None
    linux = False
    for program in programs:
        if program.type != PT_NOTE:
            continue
        for owner, kind, value in _notes(data[program.offset : program.offset + program.filesz], program.align):
            if owner == b"GNU" and kind == GNU_ABI_TAG:
                raise ImageError(f"{name} is a program for Linux user space, not a kernel", hint=_WHAT_BOOTS)
            if owner == b"Xen" and kind == XEN_PHYS32_ENTRY and len(value) >= 4:
                pvh = struct.unpack_from("<I", value)[0]
            linux = (
                linux or owner == b"Linux" or (owner == b"Xen" and kind == XEN_GUEST_OS and bytes(value) == b"linux\0")
            )
    return Elf(bits, entry, loads, pvh, linux)


def _check_kind(data: memoryview, name: str) -> int:
    """Return 32 or 64; raise ImageError for an ELF file that no x86 CPU boots."""
    if len(data) < TYPE + 4:
        raise ImageError(f"{name} is a truncated ELF file: {len(data)} bytes", hint=_DAMAGED)
    kind, machine = struct.unpack_from("<HH", data, TYPE)
    bits = {CLASS_32: 32, CLASS_64: 64}.get(data[CLASS])
    if bits is not None and data[DATA] == LITTLE_ENDIAN and machine in MACHINES and kind in EXECUTABLES:
        return bits
    from hypervisor.boot.sniff import describe  # noqa: PLC0415 - names files for messages only

    if machine in MACHINES and bits is not None and data[DATA] == LITTLE_ENDIAN:
        raise ImageError(f"{name} is {describe(data)}, not an executable", hint=_WHAT_BOOTS)
    raise ImageError(f"{name} is {describe(data)}, not for x86", hint="use a kernel built for x86-64")


def _programs(data: memoryview, bits: int, table: int, size: int, count: int) -> Iterator[Program]:
    layout = _PROGRAM_64 if bits == 64 else _PROGRAM_32
    if count and size < layout.size:
        raise struct.error("program headers are too short")
    for index in range(count):
        position = table + index * size
        if position + layout.size > len(data):
            raise struct.error("program headers lie outside the file")
        if bits == 64:
            kind, _, offset, vaddr, paddr, filesz, memsz, align = layout.unpack_from(data, position)
        else:
            kind, offset, vaddr, paddr, filesz, memsz, _, align = layout.unpack_from(data, position)
        yield Program(index, kind, offset, vaddr, paddr, filesz, memsz, align)


def _check_program(program: Program, bits: int, name: str, length: int) -> None:
    """Raise ImageError for a header that this loader uses and that contradicts itself or the file."""
    if program.type not in (PT_LOAD, PT_NOTE):
        return
    # A segment without bytes in the file may name any offset.
    if program.filesz and program.offset + program.filesz > length:
        raise ImageError(
            f"{name} is a truncated ELF file: segment {program.number} ends at byte {program.offset + program.filesz}, "
            f"the file at {length}",
            hint=_DAMAGED,
        )
    if program.type == PT_LOAD and program.filesz > program.memsz:
        raise ImageError(f"{name}: ELF segment {program.number} is larger in the file than in memory", hint=_DAMAGED)
    if program.type == PT_LOAD and program.paddr + program.memsz > 1 << bits:
        raise ImageError(
            f"{name}: ELF segment {program.number} at {program.paddr:#x} wraps around the end of the address space",
            hint="link it below 3 GiB",
        )


def _notes(data: memoryview, align: int) -> Iterator[tuple[bytes, int, memoryview]]:
    """Yield owner, type and value of the notes in a PT_NOTE segment, as far as they are whole."""
    step = 8 if align == 8 else 4
    position = 0
    while position + _NOTE.size <= len(data):
        namesz, valuesz, kind = _NOTE.unpack_from(data, position)
        name = position + _NOTE.size
        value = -(-(name + namesz) // step) * step
        if value + valuesz > len(data):
            return
        # The longest owner that matters here is short; a long one is not worth a copy.
        yield bytes(data[name : name + min(namesz, 16)]).rstrip(b"\0"), kind, data[value : value + valuesz]
        position = -(-(value + valuesz) // step) * step


def parts(elf: Elf, data: memoryview) -> Iterator[tuple[str, int, memoryview, int]]:
    """Yield label, physical address, bytes and size in memory of every PT_LOAD segment."""
    for program in elf.loads:
        part = data[program.offset : program.offset + program.filesz]
        yield f"ELF segment {program.number}", program.paddr, part, program.memsz


def physical_entry(elf: Elf) -> int | None:
    """Return e_entry as a physical address, or None when it points into no segment.

    It is taken as physical where a segment is loaded there, else as virtual and translated.
    """
    for program in elf.loads:
        if program.paddr <= elf.entry < program.paddr + program.memsz:
            return elf.entry
    for program in elf.loads:
        if program.vaddr <= elf.entry < program.vaddr + program.memsz:
            return elf.entry - program.vaddr + program.paddr
    return None


def _in_segment(elf: Elf, address: int) -> bool:
    return any(program.paddr <= address < program.paddr + program.memsz for program in elf.loads)


def _choose(elf: Elf, request: BootRequest) -> str:
    """Return "linux64" or "pvh" for this file and this request; raise ImageError when it cannot be."""
    if request.protocol == "pvh":
        if elf.pvh is None:
            raise ImageError(f"{request.name} has no PVH entry (no XEN_ELFNOTE_PHYS32_ENTRY)", hint=_WHAT_BOOTS)
        return "pvh"
    if request.protocol == "linux64":
        if elf.bits != 64:
            raise ImageError(f"{request.name} is a 32-bit ELF file: it has no 64-bit entry", hint=_WHAT_BOOTS)
        return "linux64"
    if elf.bits == 64 and (elf.pvh is None or (_in_segment(elf, elf.entry) and elf.entry != elf.pvh)):
        return "linux64"
    if elf.pvh is None:
        raise ImageError(
            f"{request.name} is a 32-bit ELF file without a multiboot header or PVH note", hint=_WHAT_BOOTS
        )
    return "pvh"


def plan(
    data: memoryview, request: BootRequest, *, header: SetupHeader | None = None, title: str | None = None
) -> BootPlan:
    """Place an ELF kernel for its 64-bit or PVH entry.

    Args:
        data: the file.
        request: what to boot.
        header: the setup header of the bzImage that it was unpacked from, if it was.
        title: what to call it, by default by its class.

    Raises:
        ImageError: if the file cannot be booted.
        ConfigError: if the options do not fit it, or RAM is too small.
    """
    if bytes(data[:4]) != MAGIC:
        raise ImageError(f"{request.name}: what the bzImage unpacks to is no ELF file", hint="--decompress guest")
    elf = parse(data, request.name)
    protocol = _choose(elf, request)
    if request.modules:
        raise ConfigError(f"{request.name} has no multiboot header; only such a kernel takes modules")
    end = elf.end
    boot: Linux64 | Pvh
    if protocol == "pvh":
        from hypervisor.boot import pvh  # noqa: PLC0415 - one of the two is ever needed

        boot = pvh.Pvh(request, end)
        entry = elf.pvh
        if entry is not None and not _in_segment(elf, entry):
            entry = None
    else:
        from hypervisor.boot import linux64  # noqa: PLC0415 - one of the two is ever needed

        boot = linux64.Linux64(request, end, header)
        entry = physical_entry(elf)
    if entry is None:
        raise ImageError(f"{request.name}: the entry of the ELF file is in none of its segments", hint=_DAMAGED)
    for label, gpa, part, size in parts(elf, data):
        boot.placement.put(label, gpa, part, size)
    state = boot.finish(entry)
    kind = f"{title or f'ELF{elf.bits} kernel'}, {'PVH' if protocol == 'pvh' else '64-bit'} entry"
    return BootPlan(
        boot.placement.segments,
        state,
        kind,
        is_linux=elf.linux or header is not None,
        release=header.release or None if header else None,
        symbols=data,
    )

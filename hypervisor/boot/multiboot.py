"""Multiboot 1 kernels (Multiboot Specification 0.6.96): the header, the information structure, modules.

The kernel is an ELF file, or any file whose header has the address fields (flags bit 16). Section numbers below are
those of the specification. Modules are placed page-aligned right above the kernel, in order; `--initrd` comes first
among them. The command line is passed exactly as given: the kernel's path is not put before it (3.3).
"""

from __future__ import annotations

from struct import pack, unpack_from
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor import layout
from hypervisor.boot import elf, entry
from hypervisor.boot.e820 import memory_map
from hypervisor.boot.image import BootPlan, Module, Placement, encode, page_up
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot.image import BootRequest

__all__ = ["Header", "find_header", "plan"]

MAGIC: Final = 0x1BADB002
BOOTLOADER_MAGIC: Final = 0x2BADB002
SEARCH: Final = 8192
"""The header lies within the first 8192 bytes (3.1)."""

ALIGN_MODULES: Final = 1 << 0
MEMORY_INFO: Final = 1 << 1
VIDEO_MODE: Final = 1 << 2
ADDRESS_FIELDS: Final = 1 << 16
REQUIREMENTS: Final = 0xFFFF
"""Bits 0 to 15: what a loader must fulfil or refuse (3.1.2)."""

INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODULES: Final = 1 << 3
INFO_MMAP: Final = 1 << 6
INFO_LOADER_NAME: Final = 1 << 9
INFO_SIZE: Final = 0x80
"""Room for the structure, whose last field ends at 116 (3.3)."""
INFO_MAX: Final = layout.COMMAND_LINE - layout.MULTIBOOT_INFO
LOADER_NAME: Final = b"hv"

_DAMAGED = "correct the multiboot header"


class Header(NamedTuple):
    """A multiboot header: where it was found in the file, its flags, and its address fields, 0 when absent (3.1)."""

    offset: int
    flags: int
    header_addr: int = 0
    load_addr: int = 0
    load_end_addr: int = 0
    bss_end_addr: int = 0
    entry_addr: int = 0


class _Kernel(NamedTuple):
    """A kernel to place: what to call it, its entry, the end of its last part, its parts as `elf.parts` gives them."""

    kind: str
    entry: int
    end: int
    parts: tuple[tuple[str, int, memoryview, int], ...]


def find_header(data: memoryview) -> Header | None:
    """Return the first header in the file: 32-bit aligned, magic number and checksum right; None if there is none."""
    head = bytes(data[:SEARCH])
    magic = pack("<I", MAGIC)
    offset = head.find(magic)
    while offset >= 0:
        if not offset % 4 and offset + 12 <= len(head):
            flags, checksum = unpack_from("<II", head, offset + 4)
            if not (MAGIC + flags + checksum) & 0xFFFF_FFFF:
                if not flags & ADDRESS_FIELDS:
                    return Header(offset, flags)
                if offset + 32 <= len(head):
                    return Header(offset, flags, *unpack_from("<5I", head, offset + 12))
        offset = head.find(magic, offset + 1)
    return None


def plan(data: memoryview, request: BootRequest, header: Header) -> BootPlan:
    """Place a multiboot kernel and its modules.

    Args:
        data: the file.
        request: what to boot.
        header: what find_header found in it.

    Raises:
        ImageError: if the file cannot be loaded, or requires what this loader does not have.
        ConfigError: if RAM is too small or the strings are too long.
    """
    unmet = header.flags & REQUIREMENTS & ~(ALIGN_MODULES | MEMORY_INFO)
    if unmet:
        what = "a video mode" if unmet == VIDEO_MODE else f"multiboot features {unmet:#x}"
        raise ImageError(
            f"{request.name} requires {what}, which this machine does not have",
            hint="clear the bit in the flags of its multiboot header",
        )
    modules = _modules(request)
    later = sum(page_up(len(module.data)) for module in modules)
    placement = Placement(request.name, request.ram_bytes, later)
    kernel = _by_header(data, request.name, header) if header.flags & ADDRESS_FIELDS else _by_elf(data, request.name)
    placement.require("the kernel", kernel.end)
    entry.put_gdt(placement, long_mode=False)
    info = bytearray(_info_size(request, modules))
    placement.put("the multiboot information", layout.MULTIBOOT_INFO, info)
    for label, gpa, part, size in kernel.parts:
        placement.put(label, gpa, part, size)
    places = [placement.put_next(f"the module {module.name}", module.data) for module in modules]
    _fill_info(info, request, modules, places)
    state = entry.protected32(kernel.entry, eax=BOOTLOADER_MAGIC, ebx=layout.MULTIBOOT_INFO)
    symbols = None if header.flags & ADDRESS_FIELDS else data
    return BootPlan(placement.segments, state, kernel.kind, is_linux=False, release=None, symbols=symbols)


def _modules(request: BootRequest) -> tuple[Module, ...]:
    modules = request.modules
    if request.initrd is not None:
        name = request.initrd_name
        modules = (Module(name, request.initrd, encode(name, "the initrd's name")), *modules)
    for module in modules:
        if not module.data:
            raise ImageError(f"{module.name} is an empty file", hint="a module has at least one byte")
    return modules


def _by_elf(data: memoryview, name: str) -> _Kernel:
    """Read an ELF file."""
    if bytes(data[:4]) != elf.MAGIC:
        raise ImageError(f"{name} has a multiboot header without address fields and is no ELF file", hint=_DAMAGED)
    image = elf.parse(data, name)
    eip = elf.physical_entry(image)
    if eip is None:
        raise ImageError(f"{name}: the entry of the ELF file is in none of its segments", hint="link it again")
    return _Kernel(f"multiboot ELF{image.bits} kernel", eip, image.end, tuple(elf.parts(image, data)))


def _by_header(data: memoryview, name: str, header: Header) -> _Kernel:
    """Read a file by the address fields of its header (3.1.3)."""
    start = header.offset - (header.header_addr - header.load_addr)
    if header.load_addr > header.header_addr or start < 0:
        raise ImageError(f"{name}: load_addr {header.load_addr:#x} does not fit header_addr", hint=_DAMAGED)
    size = len(data) - start
    if header.load_end_addr:
        size = header.load_end_addr - header.load_addr
        if size <= 0:
            raise ImageError(f"{name}: load_end_addr {header.load_end_addr:#x} is below load_addr", hint=_DAMAGED)
        if start + size > len(data):
            raise ImageError(
                f"{name} is a truncated multiboot kernel: {start + size} bytes by its header, {len(data)} in the file",
                hint="copy or download the file again",
            )
    end = header.load_addr + size
    if header.bss_end_addr:
        if header.bss_end_addr < end:
            raise ImageError(f"{name}: bss_end_addr {header.bss_end_addr:#x} is below the data's end", hint=_DAMAGED)
        end = header.bss_end_addr
    if not header.load_addr <= header.entry_addr < end:
        raise ImageError(f"{name}: entry_addr {header.entry_addr:#x} is outside the kernel", hint=_DAMAGED)
    part = ("the kernel", header.load_addr, data[start : start + size], end - header.load_addr)
    return _Kernel("multiboot kernel", header.entry_addr, end, (part,))


def _info_size(request: BootRequest, modules: tuple[Module, ...]) -> int:
    """Return the bytes of the information structure with its lists and strings."""
    strings = [LOADER_NAME, request.command_line, *(module.string for module in modules)]
    size = INFO_SIZE + 16 * len(modules) + 24 * len(memory_map(request.ram_bytes)) + sum(len(s) + 1 for s in strings)
    if size > INFO_MAX:
        raise ConfigError(
            f"the command line and the modules' strings take {size} bytes, {INFO_MAX} are allowed",
            hint="shorten --append or pass fewer modules",
        )
    return size


def _fill_info(info: bytearray, request: BootRequest, modules: tuple[Module, ...], places: list[int]) -> None:
    """Write the information structure (3.3), then module list, memory map and strings behind it."""
    base = layout.MULTIBOOT_INFO
    ranges = b"".join(pack("<IQQI", 20, *item) for item in memory_map(request.ram_bytes))
    module_list = INFO_SIZE
    mmap = module_list + 16 * len(modules)
    position = mmap + len(ranges)
    info[mmap:position] = ranges

    def put_string(text: bytes) -> int:
        nonlocal position
        start = position
        info[start : start + len(text)] = text
        position += len(text) + 1
        return base + start

    for index, (module, gpa) in enumerate(zip(modules, places, strict=True)):
        record = pack("<IIII", gpa, gpa + len(module.data), put_string(module.string), 0)
        info[module_list + 16 * index : module_list + 16 * index + 16] = record
    low = min(request.ram_bytes, layout.EBDA)
    high = max(min(request.ram_bytes, layout.RAM_LOW_END) - layout.HIGH_MEMORY, 0)
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MMAP | INFO_LOADER_NAME
    info[0:12] = pack("<III", flags, low // layout.KIB, high // layout.KIB)
    info[16:28] = pack("<III", put_string(request.command_line), len(modules), base + module_list)
    info[44:52] = pack("<II", len(ranges), base + mmap)
    info[64:68] = pack("<I", put_string(LOADER_NAME))

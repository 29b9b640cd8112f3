"""Guest memory for whoever looks for something in it: searched by bytes, and read at the kernel's own addresses.

Nothing here raises on what the guest has in its memory, and no answer is more than a guess until it is checked: the
guest may be writing there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from devices.ports import GuestFault
from hypervisor import paging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor.memory import GuestMemory
    from hypervisor.symbols import Symbols

    Reader = Callable[[int, int], bytes | None]

__all__ = ["KERNEL_MAP", "direct_map", "image_reader", "image_shift", "kernel_reader", "read", "search"]

KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
"""Where Linux maps its image: physical address 0, plus phys_base (Documentation/arch/x86/x86_64/mm.rst)."""
DIRECT_MAP: Final = 0xFFFF_8880_0000_0000
"""Where Linux maps all memory with 4 page table levels, unless page_offset_base says otherwise (mm.rst)."""
DIRECT_MAP_SIZE: Final = 1 << 46
MASK: Final = (1 << 64) - 1
IMAGE_ALIGNMENT: Final = 1 << 21
"""The smallest CONFIG_PHYSICAL_ALIGN of a 64-bit kernel: it is moved by multiples of that."""
BANNER: Final = b"Linux version "
CHUNK: Final = 1 << 22

# control registers of a kernel in 64-bit mode, as hypervisor.paging takes them
CR0, CR4, EFER = paging.CR0_PG, paging.CR4_PAE, paging.EFER_LMA


def read(memory: GuestMemory, address: int, size: int) -> bytes | None:
    """Copy out of guest-physical memory; None unless all of it is RAM."""
    try:
        return memory.read(address, size)
    except GuestFault:
        return None


def search(memory: GuestMemory, wanted: bytes) -> Iterator[int]:
    """Yield the guest-physical addresses where RAM holds these bytes, from low to high, without overlaps."""
    # a regular expression: bytes.find takes four times as long over zeros, of which guests have many
    pattern = re.compile(re.escape(wanted), re.DOTALL)
    for place in memory.ranges:
        for at in range(0, place.size, CHUNK):
            size = min(CHUNK + len(wanted) - 1, place.size - at)
            with memory.view(place.gpa + at, size) as view:
                found = [match.start() for match in pattern.finditer(view)]
            yield from (place.gpa + at + offset for offset in found)


def image_shift(memory: GuestMemory, symbols: Symbols) -> int | None:
    """Return how far above KERNEL_MAP's physical 0 the kernel lies in memory: its phys_base, modulo 2^64.

    The variable phys_base tells it, and is found where it agrees with its own place. A kernel whose symbols do not have
    it is found by its banner.

    Args:
        memory: the guest's RAM.
        symbols: the kernel's, at the addresses where it runs.
    """
    variable = symbols.address_of("phys_base")
    if variable is not None and variable >= KERNEL_MAP:
        start = variable - KERNEL_MAP
        for place in memory.ranges:
            first = (start - place.gpa) % IMAGE_ALIGNMENT
            for at in range(place.gpa + first, place.gpa + place.size - 7, IMAGE_ALIGNMENT):
                shift = at - start & MASK
                if shift and read(memory, at, 8) == shift.to_bytes(8, "little"):
                    return shift
        # last, because zero is everywhere
        return 0 if read(memory, start, 8) == bytes(8) else None
    banner = symbols.address_of("linux_banner")
    if banner is not None and banner >= KERNEL_MAP:
        start = banner - KERNEL_MAP
        for at in search(memory, BANNER):
            if not (at - start) % IMAGE_ALIGNMENT:
                return at - start & MASK
    return None


def image_reader(memory: GuestMemory, symbols: Symbols) -> Reader | None:
    """Return a function that copies (address, size) out of the kernel's image and its direct map, without page tables.

    Returns:
        The function, or None where the image is not found.
    """
    shift = image_shift(memory, symbols)
    if shift is None:
        return None

    def read_image(address: int, size: int) -> bytes | None:
        if address >= KERNEL_MAP:
            return read(memory, address - KERNEL_MAP + shift & MASK, size)
        return read(memory, address - direct, size) if 0 <= address - direct < DIRECT_MAP_SIZE else None

    direct = DIRECT_MAP
    direct = direct_map(symbols, read_image)
    return read_image


def direct_map(symbols: Symbols, read_kernel: Reader) -> int:
    """Return where the kernel maps physical address 0: CONFIG_RANDOMIZE_MEMORY moves it.

    Args:
        symbols: the kernel's, at the addresses where it runs.
        read_kernel: copies (address, size) out of its image.
    """
    base = symbols.address_of("page_offset_base")
    value = None if base is None or base < KERNEL_MAP else read_kernel(base, 8)
    return DIRECT_MAP if value is None else int.from_bytes(value, "little") or DIRECT_MAP


def kernel_reader(memory: GuestMemory, symbols: Symbols, cr3: int | None = None) -> Reader | None:
    """Return a function that copies (address, size) out of the kernel's virtual memory.

    Args:
        memory: the guest's RAM.
        symbols: the kernel's, at the addresses where it runs.
        cr3: any vCPU's CR3 in the guest kernel, of 4 or 5 levels. With None, or one whose tables do not map the
            kernel's image where it is, the kernel's own first tables serve, and without these image and direct map.

    Returns:
        The function, or None where the kernel is not found.
    """
    plain = image_reader(memory, symbols)
    probe = symbols.address_of("init_task") or symbols.address_of("_text")
    own = symbols.address_of("init_top_pgt")
    shift = None if own is None else image_shift(memory, symbols)
    # with page table isolation the user's half lies one page above the kernel's
    tables = [] if cr3 is None else [cr3 & paging.FRAME, cr3 & paging.FRAME & ~paging.PAGE]
    if own is not None and shift is not None:
        tables.append(own - KERNEL_MAP + shift & MASK)
    for table in tables if probe is not None else ():
        for levels in (0, paging.CR4_LA57):
            walker = paging.reader(memory.read, cr0=CR0, cr3=table, cr4=CR4 | levels, efer=EFER)
            sample = walker(probe or 0, 8)
            if sample is not None and (plain is None or sample == plain(probe or 0, 8)):
                return walker
    return plain

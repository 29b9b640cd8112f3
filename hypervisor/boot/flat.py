"""Flat binaries: bytes without a header, loaded and entered at a fixed place. `--flat` names the mode.

| bits | loaded at | entered | stack grows down from |
|---|---|---|---|
| 16 | 0x7C00, as a boot sector | real mode, CS:IP = 0:0x7C00, all segments 0, no BIOS | 0x7C00 |
| 32 | 0x100000 | protected mode, flat segments (0x10 code, 0x18 data), paging off | 0x8FF0 |
| 64 | 0x100000 | long mode, the first 4 GiB mapped one to one by 2 MiB pages | 0x8FF0 |

In every mode EBX/RBX is the size in bytes of the RAM that starts at 0 (at most 3 GiB). With 32 and 64 bits ESI/RSI is
the address of the command line, a zero-terminated string. All other general registers are 0, interrupts are off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypervisor import layout
from hypervisor.boot import entry
from hypervisor.boot.image import BootPlan, Placement
from hypervisor.boot.linux64 import put_command_line
from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from hypervisor.boot.image import BootRequest, Buffer

__all__ = ["plan"]

BOOT_SECTOR: Final = 0x7C00
"""Where a PC's BIOS loads a boot sector ("Memory Layout" in the kernel's boot.rst shows it)."""


def plan(data: Buffer, request: BootRequest, bits: int) -> BootPlan:
    """Place a flat binary.

    Args:
        data: the binary.
        request: what to boot.
        bits: 16, 32 or 64.

    Raises:
        ConfigError: for an initrd, modules, a command line in 16-bit mode, or too little RAM.
    """
    if request.initrd is not None or request.modules:
        raise ConfigError(f"{request.name}: a flat binary takes no initrd and no modules")
    placement = Placement(request.name, request.ram_bytes)
    load = BOOT_SECTOR if bits == 16 else layout.HIGH_MEMORY
    placement.require("the flat binary", load + len(data))
    if bits == 16:
        if request.command_line:
            raise ConfigError(f"{request.name}: a 16-bit flat binary takes no command line")
        state = entry.real16(load, sp=load, ebx=placement.ram_end)
    else:
        entry.put_gdt(placement, long_mode=bits == 64)
        put_command_line(placement, request, layout.COMMAND_LINE_MAX)
        if bits == 64:
            entry.put_page_tables(placement)
            state = entry.long64(load, rbx=placement.ram_end, rsi=layout.COMMAND_LINE)
        else:
            state = entry.protected32(load, ebx=placement.ram_end, esi=layout.COMMAND_LINE)
    placement.put("the flat binary", load, data)
    return BootPlan(placement.segments, state, f"flat {bits}-bit binary", is_linux=False, release=None, symbols=None)

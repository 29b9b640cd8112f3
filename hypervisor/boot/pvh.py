"""The PVH entry: 32-bit protected mode with struct hvm_start_info.

The state at entry is that of the x86/HVM direct boot ABI (docs/misc/pvh.pandoc in the Xen sources). The structures are
those of Xen's public header arch-x86/hvm/start_info.h, version 1.
"""

from __future__ import annotations

from struct import pack, pack_into
from typing import TYPE_CHECKING, Final

from hypervisor import layout
from hypervisor.boot import entry
from hypervisor.boot.e820 import memory_map
from hypervisor.boot.linux64 import INITRD_MAX, begin, put_command_line, put_initrd
from hypervisor.boot.zeropage import ELF_COMMAND_LINE_LIMIT

if TYPE_CHECKING:
    from hypervisor.boot.image import BootRequest

__all__ = ["Pvh"]

MAGIC: Final = 0x336E_C578
MODULE_LIST: Final = 0x100
MEMORY_MAP: Final = 0x200
SIZE: Final = 0x1000


class Pvh:
    """A kernel being placed for its PVH entry. Use: make one, put the kernel into `placement`, then `finish`."""

    def __init__(self, request: BootRequest, end: int) -> None:
        """Put the GDT, the start info and the command line for a kernel that will reach to `end`."""
        self._request = request
        self.placement = begin(request, end)
        entry.put_gdt(self.placement, long_mode=False)
        self._info = bytearray(SIZE)
        self.placement.put("the PVH start info", layout.PVH_START_INFO, self._info)
        put_command_line(self.placement, request, ELF_COMMAND_LINE_LIMIT)

    def finish(self, eip: int) -> entry.EntryState:
        """Put the initial RAM disk as the first module, complete the start info, return the state to enter in."""
        gpa, size = put_initrd(self.placement, self._request, INITRD_MAX)
        here = layout.PVH_START_INFO
        ranges = memory_map(self._request.ram_bytes)
        pack_into(
            "<IIIIQQQQII",
            self._info,
            0,
            MAGIC,
            1,
            0,
            int(bool(size)),
            here + MODULE_LIST if size else 0,
            layout.COMMAND_LINE,
            self._request.rsdp or 0,
            here + MEMORY_MAP,
            len(ranges),
            0,
        )
        if size:
            pack_into("<QQQQ", self._info, MODULE_LIST, gpa, size, 0, 0)
        table = b"".join(pack("<QQII", *item, 0) for item in ranges)
        self._info[MEMORY_MAP : MEMORY_MAP + len(table)] = table
        return entry.protected32(eip, ebx=here)

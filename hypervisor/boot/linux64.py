"""What every Linux guest gets in low memory: its command line, its initial RAM disk, and the tables of its entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypervisor import layout
from hypervisor.boot import entry, zeropage
from hypervisor.boot.image import PAGE, Placement, page_up
from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from hypervisor.boot.bzimage import SetupHeader
    from hypervisor.boot.image import BootRequest

__all__ = ["INITRD_MAX", "Linux64", "begin", "put_command_line", "put_initrd"]

INITRD_MAX: Final = 0x7FFF_FFFF
"""The highest address of an initial RAM disk where no setup header names one: what 64-bit bzImages name."""


def begin(request: BootRequest, end: int) -> Placement:
    """Start placing a kernel that will reach to `end`, after a check of the initial RAM disk.

    Raises:
        ImageError: if the initial RAM disk is none, or is cut short; if no machine has RAM up to `end`.
        ConfigError: if this machine has not.
    """
    later = 0
    if request.initrd is not None:
        from hypervisor.boot import initrd  # noqa: PLC0415 - only a run that has one pays for it

        initrd.check(request.initrd, request.initrd_name, limit=request.ram_bytes)
        later = page_up(len(request.initrd))
    placement = Placement(request.name, request.ram_bytes, later)
    placement.require("the kernel", end)
    return placement


def put_command_line(placement: Placement, request: BootRequest, limit: int) -> None:
    """Put the command line, terminated, at its address in the layout.

    Raises:
        ConfigError: if it is longer than `limit` bytes or than the room for it.
    """
    limit = min(limit, layout.COMMAND_LINE_MAX - 1)
    if len(request.command_line) > limit:
        raise ConfigError(
            f"the kernel command line has {len(request.command_line)} bytes; {request.name} takes at most {limit}",
            hint="shorten --append",
        )
    placement.put("the command line", layout.COMMAND_LINE, request.command_line + b"\0")


def put_initrd(placement: Placement, request: BootRequest, highest: int) -> tuple[int, int]:
    """Put the initial RAM disk as high as it may be, `highest` being its last allowed byte; return address and size."""
    if request.initrd is None:
        return 0, 0
    gpa = placement.put_high(f"the initrd {request.initrd_name}", request.initrd, highest + 1)
    return gpa, len(request.initrd)


class Linux64:
    """A kernel being placed for the 64-bit entry of the Linux boot protocol.

    Use: make one, put the kernel into `placement`, then `finish`.
    """

    def __init__(self, request: BootRequest, end: int, header: SetupHeader | None = None) -> None:
        """Put the tables of the entry, the zero page and the command line.

        Args:
            request: what to boot.
            end: up to where the kernel will need RAM.
            header: the setup header of the bzImage that the kernel comes from, or None for a bare ELF file.
        """
        self._request = request
        self.placement = begin(request, end)
        entry.put_gdt(self.placement, long_mode=True)
        entry.put_page_tables(self.placement)
        stack = layout.ZERO_PAGE + PAGE
        self.placement.reserve("the boot stack", stack, layout.PAGE_TABLES - stack)
        raw = None if header is None else header.raw
        self._page = zeropage.fresh(request.ram_bytes, rsdp=request.rsdp, header=raw)
        self.placement.put("the zero page", layout.ZERO_PAGE, self._page)
        limit = zeropage.ELF_COMMAND_LINE_LIMIT if header is None else header.command_line_limit
        put_command_line(self.placement, request, limit)
        self._initrd_highest = INITRD_MAX if header is None else header.initrd_highest

    def finish(self, rip: int, load: int | None = None) -> entry.EntryState:
        """Put the initial RAM disk, complete the zero page and return the state to enter `rip` in.

        Args:
            rip: address of the 64-bit entry.
            load: where a bzImage's protected-mode code is loaded; None where it is not loaded as such.
        """
        if load is not None:
            zeropage.set_load_address(self._page, load)
        zeropage.set_initrd(self._page, *put_initrd(self.placement, self._request, self._initrd_highest))
        return entry.long64(rip, rsi=layout.ZERO_PAGE)

"""PCI configuration mechanism #1 (ports 0xCF8 to 0xCFF) with one root bus, and the reset register among its ports.

The bus has a host bridge and whatever `add` puts there. A function knows its configuration space only; where its BARs
decode is between it and the machine.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import pack
from typing import TYPE_CHECKING, Final, Protocol

from devices.ports import OPEN_BUS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HostBridge", "PciConfigPorts", "PciFunction", "Reg", "ResetControl"]


class Reg(IntEnum):
    """Offsets from port 0xCF8."""

    CONFIG_ADDRESS = 0  # RW, only by 32-bit accesses; smaller ones go elsewhere
    RESET_CONTROL = 1  # RW, 8 bits (RST_CNT of Intel's ICH)
    CONFIG_DATA = 4  # RW, 8, 16 or 32 bits at 4..7: the bytes of the register addressed


class ResetControl(IntFlag):
    """RST_CNT (Intel ICH10 data sheet, 13.7.5)."""

    SYS_RST = 1 << 1  # what kind of reset: 0 only the processors (INIT), 1 the whole system
    RST_CPU = 1 << 2  # going from 0 to 1 starts it
    FULL_RST = 1 << 3  # with a cycle of the power


class PciFunction(Protocol):
    """The configuration space of one function of one device."""

    def config_read(self, register: int, size: int) -> int:
        """Return `size` bytes (1, 2 or 4, all of one dword) from `register` (0..255) on, little-endian."""

    def config_write(self, register: int, size: int, value: int) -> None:
        """Accept `size` bytes at `register`; read-only ones stay as they are."""


_CONFIG_ADDRESS: Final = int(Reg.CONFIG_ADDRESS)
_RESET_CONTROL: Final = int(Reg.RESET_CONTROL)
_CONFIG_DATA: Final = int(Reg.CONFIG_DATA)
_ENABLE: Final = 1 << 31
_ADDRESS_BITS: Final = 0x80FF_FFFC
"""Enable, bus, device, function, dword; the rest of CONFIG_ADDRESS is reserved and reads as zero."""
_RST_BITS: Final = int(ResetControl.SYS_RST | ResetControl.RST_CPU | ResetControl.FULL_RST)
_RST_CPU: Final = int(ResetControl.RST_CPU)


class HostBridge:
    """Function 00:00.0, by which an operating system believes that there is a PCI bus. Nothing in it can be written.

    The identifiers are those that Cloud Hypervisor and crosvm use: Intel's, of no real part, so that no driver applies
    the corrections that a real chipset needs.
    """

    _HEADER: Final = pack("<HHHHBBBB", 0x8086, 0x0D57, 0, 0, 0, 0x00, 0x00, 0x06).ljust(0x100, b"\0")
    """Vendor, device, command, status, revision, then class 0x060000: bridge, host. Header type 0, no BARs."""

    def config_read(self, register: int, size: int) -> int:
        """Return `size` bytes from `register` on."""
        return int.from_bytes(self._HEADER[register : register + size], "little")

    def config_write(self, register: int, size: int, value: int) -> None:
        """Ignore the write."""


class PciConfigPorts:
    """CONFIG_ADDRESS, CONFIG_DATA and RST_CNT, with the functions of bus 0 behind them."""

    def __init__(self, *, on_reset: Callable[[], None]) -> None:
        """Make a bus with a host bridge; `on_reset` is called when the guest resets the machine.

        A reset of the processors alone calls it too: no firmware is there that could take over from it.
        """
        self._on_reset = on_reset
        self._address = 0
        self._reset_control = 0
        self._functions: dict[int, PciFunction] = {}  # by bus, device, function as CONFIG_ADDRESS has them
        self.add(0, 0, HostBridge())

    def add(self, device: int, function: int, target: PciFunction) -> None:
        """Put `target` at a place on bus 0.

        Function 0 of a device that has others sets bit 7 of its header type, or nobody looks for them.

        Raises:
            ValueError: there is no such place (devices 0..31, functions 0..7), or it is taken.
        """
        place = device << 3 | function
        if not (0 <= device < 32 and 0 <= function < 8) or place in self._functions:
            raise ValueError(f"PCI function 00:{device:02x}.{function:x} is taken or no place on the bus")
        self._functions[place] = target

    def read(self, offset: int, size: int) -> int:
        """Return the register at `offset`; a function that is not there reads as all ones."""
        if offset >= _CONFIG_DATA:
            address = self._address
            target = self._functions.get(address >> 8 & 0xFFFF) if address & _ENABLE else None
            return OPEN_BUS if target is None else target.config_read(address & 0xFC | offset & 3, size)
        if offset == _CONFIG_ADDRESS and size == 4:
            return self._address
        if offset == _RESET_CONTROL and size == 1:
            return self._reset_control
        return OPEN_BUS

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the register at `offset`; may reset the machine."""
        if offset >= _CONFIG_DATA:
            address = self._address
            target = self._functions.get(address >> 8 & 0xFFFF) if address & _ENABLE else None
            if target is not None:
                target.config_write(address & 0xFC | offset & 3, size, value)
        elif offset == _CONFIG_ADDRESS and size == 4:
            self._address = value & _ADDRESS_BITS
        elif offset == _RESET_CONTROL and size == 1:
            starts = value & ~self._reset_control & _RST_CPU
            self._reset_control = value & _RST_BITS
            if starts:
                self._on_reset()

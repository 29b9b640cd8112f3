"""PCI: one root bus, its configuration space by ports (mechanism #1, 0xCF8 to 0xCFF) and in memory (ECAM), its window.

PciBus knows the functions; PciConfigPorts, PciEcam and PciMemoryWindow are the devices of the machine through which a
guest reaches them, and what happens behind all is one thing: the machine gives them one lock. PciFunction is the base
of what sits on the bus: a type 0 header whose BARs decode where the guest puts them (PCI Local Bus 3.0, chapter 6).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import pack
from typing import TYPE_CHECKING, Any, Final, Protocol

from devices.ports import OPEN_BUS, register_of
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "Command",
    "ConfigSpace",
    "Header",
    "HostBridge",
    "PciBus",
    "PciConfigPorts",
    "PciEcam",
    "PciFunction",
    "PciMemoryWindow",
    "Reg",
    "ResetControl",
]


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


class Header(IntEnum):
    """Registers of a type 0 header by the names of PCI 3.0, 6.1; those without a remark are zero here."""

    VENDOR_ID = 0x00  # RO, 16 bits
    DEVICE_ID = 0x02  # RO, 16 bits
    COMMAND = 0x04  # RW, 16 bits
    STATUS = 0x06  # RO here, 16 bits
    REVISION_ID = 0x08  # RO, 8 bits
    CLASS_CODE = 0x09  # RO, 24 bits
    CACHE_LINE_SIZE = 0x0C
    LATENCY_TIMER = 0x0D
    HEADER_TYPE = 0x0E  # RO, 8 bits; bit 7: there are more functions
    BIST = 0x0F
    BAR0 = 0x10  # RW, this one and the next five, 32 bits
    BAR1 = 0x14
    BAR2 = 0x18
    BAR3 = 0x1C
    BAR4 = 0x20
    BAR5 = 0x24
    CARDBUS_CIS_POINTER = 0x28
    SUBSYSTEM_VENDOR_ID = 0x2C  # RO, 16 bits
    SUBSYSTEM_ID = 0x2E  # RO, 16 bits
    EXPANSION_ROM = 0x30
    CAPABILITIES_POINTER = 0x34  # RO, 8 bits: offset of the first one
    INTERRUPT_LINE = 0x3C  # RW, 8 bits: a note for drivers
    INTERRUPT_PIN = 0x3D  # RO, 8 bits: 1 is INTA
    MIN_GNT = 0x3E
    MAX_LAT = 0x3F


class Command(IntFlag):
    """Bits of the command register that can be set here (PCI 3.0, 6.2.2); the others are wired to 0."""

    MEMORY = 1 << 1  # the memory BARs decode
    BUS_MASTER = 1 << 2  # kept, and nothing depends on it
    INTX_DISABLE = 1 << 10  # the pin stays silent


class ConfigSpace(Protocol):
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

_COMMAND: Final = int(Header.COMMAND)
_STATUS: Final = int(Header.STATUS)
_BAR0: Final = int(Header.BAR0)
_BARS_END: Final = _BAR0 + 4 * 6
_MEMORY: Final = int(Command.MEMORY)
_INTX_DISABLE: Final = int(Command.INTX_DISABLE)
_COMMAND_BITS: Final = int(Command.MEMORY | Command.BUS_MASTER | Command.INTX_DISABLE)
_INTERRUPT_STATUS: Final = 1 << 3
_CAPABILITIES_LIST: Final = 1 << 4
"""Bits of the status register (PCI 3.0, 6.2.3)."""
_BAR_WIDE: Final = 0b100
_BAR_TYPE_BITS: Final = 0xF
_SPACE: Final = 0x100
_FIRST_CAPABILITY: Final = 0x40
_EXTENDED_SPACE: Final = 0x1000


class HostBridge:
    """Function 00:00.0, by which an operating system believes that there is a PCI bus. Nothing in it can be written.

    The identifiers are those that Cloud Hypervisor and crosvm use: Intel's, of no real part, so that no driver applies
    the corrections that a real chipset needs.
    """

    name: Final = "host-bridge"
    _HEADER: Final = pack("<HHHHBBBB", 0x8086, 0x0D57, 0, 0, 0, 0x00, 0x00, 0x06).ljust(_SPACE, b"\0")
    """Vendor, device, command, status, revision, then class 0x060000: bridge, host. Header type 0, no BARs."""

    def config_read(self, register: int, size: int) -> int:
        """Return `size` bytes from `register` on."""
        return int.from_bytes(self._HEADER[register : register + size], "little")

    def config_write(self, register: int, size: int, value: int) -> None:
        """Ignore the write."""


class PciFunction:
    """A function with a type 0 header. Its kind derives from it and answers `bar_read` and `bar_write`.

    Attributes:
        on_decode: called as (bar, base) when a BAR begins to decode at `base`, and as (bar, None) when that ends; a BAR
            that moves does both. A BAR that shares addresses with one that takes precedence is not told of.
        name: for reports; one that has none is called by its place on the bus, such as "00:02.0".
    """

    def __init__(  # noqa: PLR0913 - the header's numbers, each by its name
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem_vendor: int = 0,
        subsystem: int = 0,
        has_pin: bool = False,
    ) -> None:
        """Make a function without BARs and capabilities.

        Args:
            vendor: identifier, 16 bits.
            device: identifier, 16 bits.
            class_code: base class, subclass, interface: 24 bits.
            revision: 8 bits.
            subsystem_vendor: identifier, 16 bits.
            subsystem: identifier, 16 bits.
            has_pin: whether it can interrupt by INTA.
        """
        self.on_decode: Callable[[int, int | None], None] = lambda _bar, _base: None
        self.name = ""
        self._space = bytearray(_SPACE)
        self._writable = bytearray(_SPACE)
        self._bars: dict[int, tuple[int, int]] = {}  # index: size of what it decodes, size of the register
        self._bus: PciBus | None = None
        self._next_link = int(Header.CAPABILITIES_POINTER)
        self._next_capability = _FIRST_CAPABILITY
        for register, size, value, writable in (
            (Header.VENDOR_ID, 2, vendor, 0),
            (Header.DEVICE_ID, 2, device, 0),
            (Header.COMMAND, 2, 0, _COMMAND_BITS),
            (Header.REVISION_ID, 1, revision, 0),
            (Header.CLASS_CODE, 3, class_code, 0),
            (Header.SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor, 0),
            (Header.SUBSYSTEM_ID, 2, subsystem, 0),
            (Header.INTERRUPT_LINE, 1, 0xFF, 0xFF),
            (Header.INTERRUPT_PIN, 1, int(has_pin), 0),
        ):
            self._define(int(register), value.to_bytes(size, "little"), writable.to_bytes(size, "little"))

    # --- for the machine ----------------------------------------------------------------------------------------------

    def place_bars(self, allocate: Callable[[int], int]) -> None:
        """Give every BAR its first base, as firmware would: `allocate(size)` returns one on a multiple of the size.

        Decoding stays off until the guest turns it on.
        """
        for bar, (size, width) in self._bars.items():
            where = _BAR0 + 4 * bar
            self.poke(where, width, allocate(size) | self.peek(where, 1) & _BAR_TYPE_BITS)

    def set_interrupt_line(self, number: int) -> None:
        """Note to which interrupt INTA goes, as firmware would."""
        self.poke(int(Header.INTERRUPT_LINE), 1, number)

    def set_multifunction(self) -> None:
        """Say that the device has more functions than this one, function 0."""
        self.poke(int(Header.HEADER_TYPE), 1, 0x80)

    def connect(self, bus: PciBus) -> None:
        """Learn on which bus the function is; by PciBus.add."""
        self._bus = bus

    def decoded(self) -> list[tuple[int, int, int]]:
        """Return what the guest asks to be decoded: (bar, base, size) of each."""
        if not self.peek(_COMMAND, 2) & _MEMORY:
            return []
        return [
            (bar, self.peek(_BAR0 + 4 * bar, width) & ~_BAR_TYPE_BITS, size)
            for bar, (size, width) in self._bars.items()
        ]

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the configuration space: command, BARs, capabilities. A kind of function adds what else it has."""
        return {"config_space": bytes(self._space)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says. The BARs decode when the bus is told to look: `PciBus.update`, once for all.

        Raises:
            KeyError, TypeError, ValueError: it is no state of such a function.
        """
        saved = Saved(state)
        space = saved.octets("config_space", _SPACE, least=_SPACE)
        saved.end()
        theirs, ours, writable = (int.from_bytes(one, "little") for one in (space, self._space, self._writable))
        if wrong := (theirs ^ ours) & ~writable:
            raise ValueError(f"another function's configuration space, from {(wrong & -wrong).bit_length() // 8:#x} on")
        self._space[:] = space

    # --- for the kind of function -------------------------------------------------------------------------------------

    def add_bar(self, bar: int, size: int, *, wide: bool = False) -> None:
        """Have BAR `bar` decode `size` bytes of memory, not prefetchable; a wide one takes 64 bits, `bar + 1` too.

        Raises:
            ValueError: the BAR is taken or does not exist, or the size is no power of two from 16 to 2 GiB.
        """
        width = 8 if wide else 4
        where = _BAR0 + 4 * bar
        if size & (size - 1) or not 16 <= size <= 1 << 31:
            raise ValueError(f"a BAR of {size} bytes")
        if bar < 0 or where + width > _BARS_END or any(self._writable[where : where + width]):
            raise ValueError(f"BAR {bar} is taken or does not exist")
        self._bars[bar] = size, width
        mask = (1 << 8 * width) - size
        self._define(where, (_BAR_WIDE if wide else 0).to_bytes(width, "little"), mask.to_bytes(width, "little"))

    def add_capability(self, identifier: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability (PCI 3.0, 6.7) and return its offset.

        Args:
            identifier: its kind.
            body: what follows identifier and link.
            writable: bits of the body that the guest may change; none where it is shorter.

        Raises:
            ValueError: the configuration space is full.
        """
        where = self._next_capability
        if where + 2 + len(body) > _SPACE:
            raise ValueError("no room for another capability")
        self._define(where, bytes((identifier, 0)) + body, b"\0\0" + writable.ljust(len(body), b"\0"))
        self._space[self._next_link] = where
        self._space[_STATUS] |= _CAPABILITIES_LIST
        self._next_link = where + 1
        self._next_capability = where + 2 + len(body) + 3 & ~3
        return where

    def _define(self, register: int, value: bytes, writable: bytes) -> None:
        self._space[register : register + len(value)] = value
        self._writable[register : register + len(writable)] = writable

    def peek(self, register: int, size: int) -> int:
        """Return what is stored at `register`."""
        return int.from_bytes(self._space[register : register + size], "little")

    def poke(self, register: int, size: int, value: int) -> None:
        """Store at `register`, read-only bits too."""
        self._space[register : register + size] = value.to_bytes(size, "little")

    @property
    def intx_is_disabled(self) -> bool:
        """Whether the guest has silenced the pin."""
        return bool(self.peek(_COMMAND, 2) & _INTX_DISABLE)

    @property
    def interrupt_is_pending(self) -> bool:
        """What the status register says of the pin, silenced or not (Interrupt Status; PCI 3.0, 6.2.3)."""
        return False

    def bar_read(self, bar: int, offset: int, size: int) -> int:  # noqa: ARG002 - for those that derive
        """Return `size` bytes (1, 2, 4 or 8) at an offset of what a BAR decodes."""
        return OPEN_BUS

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Accept `size` bytes at an offset of what a BAR decodes."""

    def bar_register_name(self, bar: int, offset: int, *, write: bool) -> str:  # noqa: ARG002 - for those that derive
        """Return what the register at an offset of what a BAR decodes is called: see `NamedRegisters`."""
        return f"BAR{bar}+{offset:#x}"

    # --- for the guest ------------------------------------------------------------------------------------------------

    def config_read(self, register: int, size: int) -> int:
        """Return `size` bytes from `register` on."""
        value = self.peek(register, size)
        if register <= _STATUS < register + size and self.interrupt_is_pending:
            value |= _INTERRUPT_STATUS << 8 * (_STATUS - register)
        return value

    def config_write(self, register: int, size: int, value: int) -> None:
        """Change the writable bits among `size` bytes at `register`."""
        space, writable = self._space, self._writable
        for where in range(register, min(register + size, _SPACE)):
            bits = writable[where]
            space[where] = space[where] & ~bits | value & bits
            value >>= 8
        if _COMMAND <= register < _BARS_END and self._bus is not None:
            self._bus.update()


class PciBus:
    """Bus 0: the host bridge and whatever `add` puts beside it, and where their BARs decode now.

    A BAR decodes while it lies wholly in the bus's memory. Where several do, that of the lowest function wins, and in
    one function the lowest BAR.
    """

    def __init__(self, memory: range = range(0)) -> None:
        """Make a bus whose functions' memory BARs may decode at the guest-physical addresses `memory`."""
        self.memory = memory
        self._places: dict[int, ConfigSpace] = {}  # by bus, device, function as CONFIG_ADDRESS has them
        self._functions: list[PciFunction] = []  # those with BARs, lowest first
        self._decoding: list[tuple[int, int, PciFunction, int]] = []  # base, end, function, BAR
        self._told: dict[tuple[PciFunction, int], int] = {}  # what on_decode was told
        self.add(0, 0, HostBridge())

    def add(self, device: int, function: int, target: ConfigSpace) -> None:
        """Put `target` at a place on the bus.

        Function 0 of a device that has others says so (`set_multifunction`), or nobody looks for them.

        Raises:
            ValueError: there is no such place (devices 0..31, functions 0..7), or it is taken.
        """
        place = device << 3 | function
        if not (0 <= device < 32 and 0 <= function < 8) or place in self._places:
            raise ValueError(f"PCI function 00:{device:02x}.{function:x} is taken or no place on the bus")
        self._places[place] = target
        if isinstance(target, PciFunction):
            target.name = target.name or f"00:{device:02x}.{function:x}"
            target.connect(self)
            self._functions = [one for _, one in sorted(self._places.items()) if isinstance(one, PciFunction)]
            self.update()

    def function(self, place: int) -> ConfigSpace | None:
        """Return what sits at bus << 8 | device << 3 | function; None: nothing."""
        return self._places.get(place)

    def update(self) -> None:
        """Find out who decodes what, and tell the functions for which it changed: first ends, then beginnings."""
        decoding: list[tuple[int, int, PciFunction, int]] = []
        told: dict[tuple[PciFunction, int], int] = {}
        for function in self._functions:
            for bar, base, size in function.decoded():
                end = base + size
                if base < self.memory.start or end > self.memory.stop:
                    continue
                if all(end <= other[0] or other[1] <= base for other in decoding):
                    told[function, bar] = base
                decoding.append((base, end, function, bar))
        before, self._told, self._decoding = self._told, told, decoding
        for (function, bar), base in before.items():
            if told.get((function, bar)) != base:
                function.on_decode(bar, None)
        for (function, bar), base in told.items():
            if before.get((function, bar)) != base:
                function.on_decode(bar, base)

    def read(self, address: int, size: int) -> int:
        """Return the answer of the BAR that decodes `address`; open bus where none does, and across one's end."""
        for base, end, function, bar in self._decoding:
            if base <= address < end:
                return function.bar_read(bar, address - base, size) if address + size <= end else OPEN_BUS
        return OPEN_BUS

    def write(self, address: int, size: int, value: int) -> None:
        """Hand a write to the BAR that decodes `address`."""
        for base, end, function, bar in self._decoding:
            if base <= address < end:
                if address + size <= end:
                    function.bar_write(bar, address - base, size, value)
                return

    def inner(self, address: int) -> tuple[str, BarRegisters, int] | None:
        """Return the function whose BAR decodes `address` now, the BAR's registers, and the offset in it."""
        for base, end, function, bar in self._decoding:
            if base <= address < end:
                return function.name, BarRegisters(function, bar), address - base
        return None


class BarRegisters:
    """The registers of one BAR; fits `devices.ports.NamedRegisters`."""

    def __init__(self, function: PciFunction, bar: int) -> None:
        """Name what `function` has in BAR `bar`."""
        self._function = function
        self._bar = bar

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return the function's name of a register."""
        return self._function.bar_register_name(self._bar, offset, write=write)


class PciMemoryWindow:
    """The bus's memory as a device of the machine; it belongs at `bus.memory`."""

    def __init__(self, bus: PciBus) -> None:
        """Lead to `bus`."""
        self._bus = bus
        self._base = bus.memory.start

    def read(self, offset: int, size: int) -> int:
        """Return what the BAR that decodes there answers."""
        return self._bus.read(self._base + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Hand a write to the BAR that decodes there."""
        self._bus.write(self._base + offset, size, value)

    def inner(self, offset: int) -> tuple[str, BarRegisters, int] | None:
        """Return the function whose BAR decodes there now, the BAR's registers, and the offset in it."""
        return self._bus.inner(self._base + offset)


class PciEcam:
    """The configuration space of a bus's functions in memory, 4 KiB each (PCI Express 4.0, 7.2.2).

    No function here has extended capabilities: from 0x100 on all is zero, which says so (7.6.1), and nothing can be
    written. An access across a dword need not be supported (7.2.2) and is not.
    """

    def __init__(self, bus: PciBus) -> None:
        """Lead to `bus`."""
        self._bus = bus

    def read(self, offset: int, size: int) -> int:
        """Return what is at a register of a function; one that is not there reads as all ones."""
        place, register = divmod(offset, _EXTENDED_SPACE)
        target = self._bus.function(place)
        if target is None or (register & 3) + size > 4:
            return OPEN_BUS
        return target.config_read(register, size) if register < _SPACE else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Hand a write to a register of a function."""
        place, register = divmod(offset, _EXTENDED_SPACE)
        target = self._bus.function(place)
        if target is not None and register < _SPACE and (register & 3) + size <= 4:
            target.config_write(register, size, value)

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return the header's name of a register, whosever it is, or its offset: "config.COMMAND", "config+0x40"."""
        register = offset % _EXTENDED_SPACE
        name = register_of(Header, register, write=write, width=4 if register < _FIRST_CAPABILITY else 1)
        return f"config{name}" if name.startswith("+") else f"config.{name}"

    def inner(self, offset: int) -> tuple[str, PciEcam, int] | None:
        """Return the function that is there, and the register."""
        place, register = divmod(offset, _EXTENDED_SPACE)
        target = self._bus.function(place)
        if target is None:
            return None
        return getattr(target, "name", f"00:{place >> 3:02x}.{place & 7:x}"), self, register


class PciConfigPorts:
    """CONFIG_ADDRESS, CONFIG_DATA and RST_CNT, with the functions of a bus behind them."""

    def __init__(self, bus: PciBus | None = None, *, on_reset: Callable[[], None]) -> None:
        """Lead to `bus`, by default one with a host bridge and no memory.

        Args:
            bus: bus 0.
            on_reset: called when the guest resets the machine. A reset of the processors alone calls it too: no
                firmware is there that could take over from it.
        """
        self.bus = PciBus() if bus is None else bus
        self._on_reset = on_reset
        self._address = 0
        self._reset_control = 0

    def read(self, offset: int, size: int) -> int:
        """Return the register at `offset`; a function that is not there reads as all ones."""
        if offset >= _CONFIG_DATA:
            address = self._address
            target = self.bus.function(address >> 8 & 0xFFFF) if address & _ENABLE else None
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
            target = self.bus.function(address >> 8 & 0xFFFF) if address & _ENABLE else None
            if target is not None:
                target.config_write(address & 0xFC | offset & 3, size, value)
        elif offset == _CONFIG_ADDRESS and size == 4:
            self._address = value & _ADDRESS_BITS
        elif offset == _RESET_CONTROL and size == 1:
            starts = value & ~self._reset_control & _RST_CPU
            self._reset_control = value & _RST_BITS
            if starts:
                self._on_reset()

    @staticmethod
    def register_name(offset: int, *, write: bool) -> str:
        """Return the name of the register at `offset`: that of the ports, not of what CONFIG_ADDRESS chose."""
        return register_of(Reg, offset if offset == _RESET_CONTROL else offset & ~3, write=write)

    def state(self) -> dict[str, Any]:
        """Return the ports' own registers; what is behind them are other devices."""
        return {"CONFIG_ADDRESS": self._address, "RST_CNT": self._reset_control}

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in a state; see `devices.ports.Stateful`."""
        saved = Saved(state)
        address, reset_control = saved.bits("CONFIG_ADDRESS", _ADDRESS_BITS), saved.bits("RST_CNT", _RST_BITS)
        saved.end()
        self._address, self._reset_control = address, reset_control

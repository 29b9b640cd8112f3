"""MSI-X (PCI Local Bus 3.0, 6.8.2): a function's capability, its vector table, and its pending bits.

Whatever interrupts has one RoutedSignal for good. The guest maps it to a vector; from the vector's entry, the masks,
the enable bit, and the pin's bit in the command register follows where the signal goes now.
"""

from __future__ import annotations

from enum import IntFlag
from struct import pack, unpack
from typing import TYPE_CHECKING, Any, Final

from devices.ports import OPEN_BUS
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.pci import PciFunction
    from devices.ports import RoutedSignal

__all__ = ["MAX_VECTORS", "NO_VECTOR", "Control", "Msix"]

NO_VECTOR: Final = 0xFFFF
"""What an event is mapped to that interrupts nobody (VIRTIO_MSI_NO_VECTOR; Virtio 1.2, 4.1.5.1.2)."""
MAX_VECTORS: Final = 0x800
"""The largest table."""


class Control(IntFlag):
    """Bits of Message Control (6.8.2.3); the low 11 are the table's size less one, read-only."""

    FUNCTION_MASK = 1 << 14  # RW: every vector is masked
    ENABLE = 1 << 15  # RW: messages instead of the pin


_CAPABILITY: Final = 0x11
_ENABLE: Final = int(Control.ENABLE)
_FUNCTION_MASK: Final = int(Control.FUNCTION_MASK)
_ENTRY: Final = 16
"""Bytes of a table entry: address, upper address, data, vector control (6.8.2.6 to 6.8.2.9)."""
_ENTRY_BITS: Final = (0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF_FFFF, 1)
_WRITABLE: Final = pack("<4I", *_ENTRY_BITS)
_MASKED: Final = 1

_HOLD: Final = (-1, 0)
_LINE: Final = (-1, 1)
"""Where a signal goes that goes to no (address, data)."""


class Msix:
    """The MSI-X of one function. All of it is called with the function's lock held.

    Attributes:
        vectors: how many entries the table has.
        is_enabled: whether messages take the place of the pin.
    """

    def __init__(  # noqa: PLR0913 - what the capability says, each by its name
        self,
        function: PciFunction,
        signals: Sequence[RoutedSignal],
        *,
        vectors: int,
        bar: int,
        table: int,
        pending: int,
    ) -> None:
        """Add the capability to `function`.

        Args:
            function: whose interrupts these are.
            signals: what interrupts; known by index from here on.
            vectors: entries of the table.
            bar: the BAR where table and pending bits are.
            table: offset of the table in it, a multiple of 8.
            pending: offset of the pending bits in it, a multiple of 8.

        Raises:
            ValueError: no such number of vectors, or an offset that is no multiple of 8.
        """
        if not 1 <= vectors <= MAX_VECTORS or table % 8 or pending % 8:
            raise ValueError(f"MSI-X with {vectors} vectors, its table at {table:#x}, pending bits at {pending:#x}")
        self.vectors = vectors
        self.is_enabled = False
        self._function = function
        self._signals = signals
        self._control = 2 + function.add_capability(
            _CAPABILITY,
            pack("<HII", vectors - 1, table | bar, pending | bar),
            writable=pack("<H", _ENABLE | _FUNCTION_MASK),
        )
        self._table = [0, 0, 0, _MASKED] * vectors
        self._is_masked = False
        self._pin_is_off = False
        self._is_live = False
        self._vectors = [NO_VECTOR] * len(signals)
        self._targets = [_HOLD] * len(signals)

    # --- what the function tells --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let signals out by the pin too, where MSI-X is off; until here the pin is not taken into use."""
        if not self._is_live:
            self._is_live = True
            self._route_all()

    def reset(self) -> None:
        """Unmap every signal and let none out until `start`: the function's driver has reset it."""
        self._is_live = False
        self._vectors = [NO_VECTOR] * len(self._signals)
        self._route_all()

    def update(self) -> None:
        """Look at Message Control and the command register again: the guest may have written them."""
        if self._read_switches():
            self._route_all()

    def _read_switches(self) -> bool:
        """Take notice of Message Control and the command register; return whether something has changed."""
        control = self._function.peek(self._control, 2)
        before = self.is_enabled, self._is_masked, self._pin_is_off
        after = bool(control & _ENABLE), bool(control & _FUNCTION_MASK), self._function.intx_is_disabled
        self.is_enabled, self._is_masked, self._pin_is_off = after
        return before != after

    def vector(self, signal: int) -> int:
        """Return the vector of a signal, NO_VECTOR if it has none."""
        return self._vectors[signal]

    def map(self, signal: int, vector: int) -> None:
        """Give a signal a vector; one that the table does not have means NO_VECTOR."""
        self._vectors[signal] = vector if vector < self.vectors else NO_VECTOR
        self._route(signal)

    def any_pending(self) -> bool:
        """Whether any signal is being held back."""
        return any(signal.is_pending for signal in self._signals)

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the table, what is mapped to which vector, and what is being held back; Message Control is not in it.

        It is part of the function's configuration space.
        """
        return {
            "table": pack(f"<{len(self._table)}I", *self._table),
            "vectors": list(self._vectors),
            "is_live": self._is_live,
            "pending": [signal.is_pending for signal in self._signals],
        }

    def parse(self, state: Mapping[str, Any]) -> tuple[list[int], list[int], bool, list[bool]]:
        """Return a state's parts for `put`; raises KeyError, TypeError or ValueError when it is none."""
        size, count = _ENTRY * self.vectors, len(self._signals)
        saved = Saved(state)
        table = saved.octets("table", size, least=size)
        vectors = saved.numbers("vectors", count, NO_VECTOR, least=count)
        is_live, pending = saved.flag("is_live"), saved.flags("pending", count)
        saved.end()
        if int.from_bytes(table, "little") & ~int.from_bytes(_WRITABLE * self.vectors, "little"):
            raise ValueError("the vector table has bits set that cannot be")
        if any(vector != NO_VECTOR and vector >= self.vectors for vector in vectors):
            raise ValueError(f"vectors {vectors} of {self.vectors}")
        return list(unpack(f"<{4 * self.vectors}I", table)), vectors, is_live, pending

    def put(self, parts: tuple[list[int], list[int], bool, list[bool]]) -> None:
        """Become what `parse` found, with the switches that are in the configuration space by now.

        What was being held back is forgotten first: a signal that is connected would deliver it.
        """
        self._table, self._vectors, self._is_live, pending = parts
        self._read_switches()
        for signal in self._signals:
            signal.forget()
        self._route_all()
        for signal, is_pending in zip(self._signals, pending, strict=True):
            if is_pending:
                signal.fire()

    # --- the guest's accesses -----------------------------------------------------------------------------------------

    def read_table(self, offset: int, size: int) -> int:
        """Return a dword or a qword of the table; other accesses are open bus, what is behind its end zero."""
        if size not in (4, 8) or offset % size:
            return OPEN_BUS
        first = offset // 4
        low, high = (*self._table[first : first + 2], 0, 0)[:2]
        return low | high << 32 if size == 8 else low

    def write_table(self, offset: int, size: int, value: int) -> None:
        """Change a dword or a qword of the table; other accesses are ignored."""
        if size not in (4, 8) or offset % size or offset >= _ENTRY * self.vectors:
            return
        first = offset // 4
        for index in range(first, first + size // 4):
            self._table[index] = value & _ENTRY_BITS[index % 4]
            value >>= 32
        entry = offset // _ENTRY
        for signal, vector in enumerate(self._vectors):
            if vector == entry:
                self._route(signal)

    def read_pending(self, offset: int, size: int) -> int:
        """Return a dword or a qword of the pending bits; other accesses are open bus. They cannot be written."""
        if size not in (4, 8) or offset % size:
            return OPEN_BUS
        bits = 0
        for signal, vector in zip(self._signals, self._vectors, strict=True):
            position = vector - 8 * offset
            if vector != NO_VECTOR and 0 <= position < 8 * size and signal.is_pending:
                bits |= 1 << position
        return bits

    # --- where signals go ---------------------------------------------------------------------------------------------

    def _route_all(self) -> None:
        for signal in range(len(self._signals)):
            self._route(signal)

    def _target(self, signal: int) -> tuple[int, int]:
        if not self.is_enabled:
            return _LINE if self._is_live and not self._pin_is_off else _HOLD
        vector = self._vectors[signal]
        if vector == NO_VECTOR or self._is_masked:
            return _HOLD
        address, upper, data, control = self._table[4 * vector : 4 * vector + 4]
        return _HOLD if control & _MASKED else (upper << 32 | address, data)

    def _route(self, signal: int) -> None:
        """Send a signal where it belongs now; nothing is done where it goes there already (each is a system call)."""
        target = self._target(signal)
        if target == self._targets[signal]:
            return
        self._targets[signal] = target
        if target == _HOLD:
            self._signals[signal].hold()
        elif target == _LINE:
            self._signals[signal].to_line()
        else:
            self._signals[signal].to_message(*target)

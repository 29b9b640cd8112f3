"""The contracts between a device model and whatever machine it sits in.

A device model has no thread, no file descriptor, no address and no clock of its own: all of them are handed in.
So every model in this package runs, and is tested, without KVM. Classes fit these protocols structurally; nothing
needs to inherit from them.

Locking: the machine never calls one device from two threads at once. It holds the lock of the device's claim on the
bus around `read` and `write`, and around whatever it delivers from outside (received bytes, an alarm that fired).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import IntEnum

__all__ = [
    "OPEN_BUS",
    "Alarm",
    "ByteSink",
    "Device",
    "DiskShortCut",
    "FastPath",
    "GuestFault",
    "GuestRam",
    "IrqLine",
    "NamedRegisters",
    "Nested",
    "NoFastPath",
    "RoutedSignal",
    "Signal",
    "Stateful",
    "TapShortCut",
    "inner_of",
    "name_in",
    "register_of",
]

OPEN_BUS = 0xFFFF_FFFF_FFFF_FFFF
"""What an address that nobody decodes reads as; the bus cuts it to the access's size."""


class GuestFault(Exception):
    """The guest handed a device an address range that is not RAM.

    Attributes:
        gpa: first guest-physical address of the range, in bytes.
        size: length of the range, in bytes.
    """

    def __init__(self, gpa: int, size: int) -> None:
        """Remember the range that was refused."""
        super().__init__(f"{size} bytes at {gpa:#x} are not guest RAM")
        self.gpa = gpa
        self.size = size


class Device(Protocol):
    """Anything that answers reads and writes at offsets of its own range."""

    def read(self, offset: int, size: int) -> int:
        """Return a little-endian value; the bus keeps its low `size` bytes (1, 2, 4 or 8)."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Accept a little-endian value of `size` bytes (1, 2, 4 or 8)."""


@runtime_checkable
class Stateful(Protocol):
    """A device whose whole state can be taken away, and put into another one or back into itself.

    Whoever asks holds the lock of the device's claim, and nothing else goes on: no vCPU runs, no timer fires, nothing
    comes from the host. What the device is made of (its wiring, its size, what it stands on) is not state: it is the
    same on both sides. Neither method sends anything to the host.
    """

    def state(self) -> dict[str, Any]:
        """Return the state: a copy, of plain values only (dict by str, list, int, str, bool, bytes, None).

        Fields have the names that the specification gives the registers. A moment is told by how far away it is, in
        ns, never by a clock of this host. An event that is due by now may be noted, and its line driven, as any access
        of the guest would.
        """

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in exactly this state, whether new or in use: `state` would return it again.

        That goes for what follows from it, too: armed alarms, published short cuts, the level of the interrupt line,
        which is driven whatever it was. The state of the interrupt controllers is set afterwards, so a level may
        change on the way and nobody takes that for an interrupt.

        Raises:
            KeyError, TypeError, ValueError: a field is missing, unknown, of another kind or out of range. The device
                is as it was.
        """


@runtime_checkable
class NamedRegisters(Protocol):
    """A device that can name its registers, for reports: nobody asks while the guest waits."""

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return what the data sheet calls the register that a read, or a write, at `offset` is of.

        An offset inside a wider register gives that register. What an index or a mode bit changes goes by its name
        after a reset. Where there is no register: the offset, as "+0x1f". Changes nothing, and needs no lock.
        """


@runtime_checkable
class Nested(Protocol):
    """A window in which other devices sit."""

    def inner(self, offset: int) -> tuple[str, NamedRegisters, int] | None:
        """Return who is at `offset` now: its name, what names its registers, and the offset there; None: nobody.

        Changes nothing, and needs no lock.
        """


def inner_of(device: object, offset: int) -> tuple[str, NamedRegisters, int] | None:
    """Return who is at `offset` of `device` if it is a window; one of yours may have something else of that name."""
    return device.inner(offset) if isinstance(device, Nested) and callable(device.inner) else None


def name_in(device: object, offset: int, *, write: bool) -> str:
    """Return the name of a register of `device`, which may be of any kind; the offset where it has no names."""
    return device.register_name(offset, write=write) if isinstance(device, NamedRegisters) else f"+{offset:#x}"


def register_of(registers: type[IntEnum], offset: int, *, write: bool, width: int = 1) -> str:
    """Return the name of a register by the enum that declares it, the offset itself where none is.

    Args:
        registers: offsets by name. Where two share one, a read finds the first and a write reaches the last.
        offset: of the access.
        write: what kind it is.
        width: in bytes, how far the widest register reaches; each ends where the next begins.
    """
    for where in range(offset, offset - width, -1):
        names = [name for name, start in registers.__members__.items() if start == where]
        if names:
            return names[-1 if write else 0]
    return f"+{offset:#x}"


class IrqLine(Protocol):
    """One interrupt input of the machine's interrupt controllers."""

    def set(self, level: bool) -> None:
        """Drive the line high (True) or low (False); driving it to its present level does nothing."""


class GuestRam(Protocol):
    """Guest-physical memory as a device that does DMA sees it."""

    def read(self, gpa: int, size: int) -> bytes:
        """Copy `size` bytes out; raises GuestFault when any of them is not RAM."""

    def write(self, gpa: int, data: bytes) -> None:
        """Copy `data` in; raises GuestFault when any byte of the range is not RAM."""

    def view(self, gpa: int, size: int) -> memoryview:
        """Return `size` bytes as they are, writable and without a copy; raises GuestFault when any is not RAM."""

    @property
    def is_tracked(self) -> bool:
        """Whether somebody wants to know what is written."""

    def written(self, gpa: int, size: int) -> None:
        """Say, while it is tracked, that `size` bytes at `gpa` were written through a view, after they were."""


class Signal(Protocol):
    """An interrupt that is a message, not a level: sent, and forgotten (MSI-X, or an edge)."""

    def fire(self) -> None:
        """Send it. From any thread; two that come before the guest takes the first may count as one."""

    def fileno(self) -> int:
        """Return an eventfd that sends it when it is written to; -1 where there is none."""


class RoutedSignal(Signal, Protocol):
    """A signal whose way to the guest a PCI function decides. Held back at first."""

    def to_message(self, address: int, data: int) -> None:
        """Deliver it as this MSI from now on; what was held back is delivered now."""

    def to_line(self) -> None:
        """Deliver it by the function's interrupt pin from now on; what was held back is delivered now."""

    def hold(self) -> None:
        """Hold back what is fired from now on (a masked vector)."""

    def forget(self) -> None:
        """Drop what is being held back."""

    @property
    def is_pending(self) -> bool:
        """Whether something is being held back."""


class DiskShortCut(NamedTuple):
    """What a data path may do for a disk by itself: plain reads and writes that need no decision.

    A data path takes chains of VIRTIO_BLK_T_IN and T_OUT (Virtio 1.2, 5.2.6) that are laid out in the common way, and
    leaves every other one to the model. It never completes a write before the file has taken it.
    """

    fd: int
    """Reads and writes at byte 512 * sector are the disk's."""
    sectors: int
    """The disk's capacity, in units of 512 bytes."""
    readonly: bool


class TapShortCut(NamedTuple):
    """What a data path may do for a network interface by itself: move frames between its queues and a TAP."""

    fd: int
    """One read or write is one frame, with the header before it."""
    header_size: int
    """Length of the header that the guest's buffers and the TAP both have: struct virtio_net_hdr (5.1.6)."""
    mergeable: bool
    """Whether a received frame may span several chains (VIRTIO_NET_F_MRG_RXBUF)."""


class ByteSink(Protocol):
    """Where a character device's output goes. Never blocks; bounds what it keeps."""

    def write(self, data: bytes) -> None:
        """Take `data`, in order."""


class Alarm(Protocol):
    """A one-shot timer that belongs to one device; the machine calls the device back when it fires."""

    def set(self, deadline_ns: int | None) -> None:
        """Fire once when the device's clock reaches `deadline_ns`; None disarms. The last call counts."""


class FastPath(Protocol):
    """Short cuts that a device may publish to the run loop, to be answered without coming back to Python.

    A short cut may only stand while it changes nothing that the model would have changed: a read without side
    effects, a write that only appends a byte to the output. The model takes it back before that stops being true.
    """

    def publish(self, offset: int, value: int | None) -> None:
        """Answer one-byte reads of `offset` with `value`; None sends them to the device again."""

    def divert(self, offset: int, to_sink: bool) -> None:
        """Append one-byte writes to `offset` to the device's ByteSink instead of calling the device."""


class NoFastPath:
    """A FastPath that takes no short cut: what tests and unaccelerated devices use."""

    def publish(self, offset: int, value: int | None) -> None:
        """Do nothing."""

    def divert(self, offset: int, to_sink: bool) -> None:
        """Do nothing."""

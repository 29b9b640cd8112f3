"""The contracts between a device model and whatever machine it sits in.

A device model has no thread, no file descriptor, no address and no clock of its own: all of them are handed in.
So every model in this package runs, and is tested, without KVM. Classes fit these protocols structurally; nothing
needs to inherit from them.

Locking: the machine never calls one device from two threads at once. It holds the lock of the device's claim on the
bus around `read` and `write`, and around whatever it delivers from outside (received bytes, an alarm that fired).
"""

from __future__ import annotations

from typing import Protocol

__all__ = [
    "OPEN_BUS",
    "Alarm",
    "ByteSink",
    "Device",
    "FastPath",
    "GuestFault",
    "GuestRam",
    "IrqLine",
    "NoFastPath",
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

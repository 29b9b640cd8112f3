"""The Bochs debug console, port 0xE9: bytes out, and a read that tells a guest it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from devices.ports import NoFastPath

if TYPE_CHECKING:
    from devices.ports import ByteSink, FastPath

__all__ = ["DebugConsole"]

_READBACK: Final = 0xE9  # Bochs with port_e9_hack, and QEMU's isa-debugcon by default


class DebugConsole:
    """One write-only port without state: everything about it may always take the FastPath."""

    def __init__(self, sink: ByteSink, *, fast: FastPath | None = None) -> None:
        """Open the port.

        Args:
            sink: where the bytes go, in order.
            fast: the run loop's short cuts for this device's one offset; what they divert must reach the same sink.
        """
        self._sink = sink
        fast = NoFastPath() if fast is None else fast
        fast.publish(0, _READBACK)
        fast.divert(0, to_sink=True)

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the Device protocol's signature
        """Return 0xE9; the further bytes of a wider access are ports that nobody decodes."""
        return _READBACK | (1 << 8 * size) - 1 & ~0xFF

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return what the one port is to a read and to a write."""
        if offset:
            return f"+{offset:#x}"
        return "DATA" if write else "READBACK"

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - the Device protocol's signature
        """Take the low byte; the further bytes of a wider access go to ports that nobody decodes."""
        self._sink.write(bytes((value & 0xFF,)))

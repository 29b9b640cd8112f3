"""The ISA debug-exit port: a guest of tests says with one write that it is done, and how it went."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DebugExit"]


class DebugExit:
    """Every write, at any offset and of any size, reports its value. Reads give 0, as QEMU's isa-debug-exit does."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        """Take `on_exit`, called with the value as the guest wrote it, an unsigned number of the access's size."""
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the Device protocol's signature
        """Return 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - the Device protocol's signature
        """Report `value`, cut to `size` bytes."""
        self._on_exit(value & ((1 << 8 * size) - 1))

    def register_name(self, offset: int, *, write: bool) -> str:  # noqa: ARG002 - the protocol's signature
        """Return the name of the port, which is the same at every offset."""
        return "EXIT"

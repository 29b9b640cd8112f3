"""The machine's generation identifier: 16 random bytes that change when the machine is another one than before.

A machine that is restored from a snapshot twice is two machines, with the same state of every random number generator.
The guest finds the identifier in its memory, as an ACPI device says, and is told of a new one (Microsoft, "Virtual
Machine Generation ID", August 2012): Linux then reseeds its generator.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from devices.ports import GuestRam, IrqLine

__all__ = ["SIZE", "VmGenId"]

SIZE: Final = 16


class VmGenId:
    """The identifier's place in guest memory, and the interrupt that tells of a new one; all state is the guest's."""

    def __init__(self, *, ram: GuestRam, gpa: int, irq: IrqLine) -> None:
        """Keep the identifier at `gpa`, a multiple of 8; `irq` is an edge."""
        self._ram = ram
        self._gpa = gpa
        self._irq = irq

    @property
    def identifier(self) -> bytes:
        """What the guest reads."""
        return self._ram.read(self._gpa, SIZE)

    def renew(self, identifier: bytes | None = None) -> bytes:
        """Give the machine a new identifier, a random one unless it is named, and tell the guest; return it.

        After a restore, when the interrupt controllers have their state: it would forget the edge.
        """
        new = os.urandom(SIZE) if identifier is None else identifier
        if len(new) != SIZE:
            raise ValueError(f"an identifier of {len(new)} bytes, not {SIZE}")
        self._ram.write(self._gpa, new)
        self._irq.set(True)
        self._irq.set(False)
        return new

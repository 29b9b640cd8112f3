"""Address to device: one bus for ports, one for memory."""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from devices.ports import inner_of, name_in
from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from devices.ports import Device

MASKS: Final = {size: (1 << 8 * size) - 1 for size in range(9)}
"""All ones of a size in bytes: what open bus reads as."""
DIRECT_LIMIT: Final = 4096
"""A claim of at most this many addresses is looked up by each address in a dict, a larger one by bisection."""


class Claim:
    """A device's stretch of a bus.

    Attributes:
        base, end: first address, and the one after the last.
        device: who answers.
        name: for messages and profiles, such as "uart0".
        lock: held while the device is called; whoever calls it from elsewhere holds it too.
    """

    __slots__ = ("base", "device", "end", "lock", "name", "read", "write")

    def __init__(self, base: int, size: int, device: Device, name: str, lock: threading.Lock) -> None:
        """Describe the claim; the device sees offsets from `base`."""
        self.base = base
        self.end = base + size
        self.device = device
        self.name = name
        self.lock = lock
        self.read = device.read
        self.write = device.write


class Bus:
    """Claims that may not overlap; frozen before the first vCPU runs, so that look-ups take no lock."""

    def __init__(self, name: str, limit: int) -> None:
        """Make an empty bus called `name` (for messages) with addresses 0..limit-1."""
        self._name = name
        self._limit = limit
        self._claims: list[Claim] = []
        self._bases: list[int] = []
        self._direct: dict[int, Claim] = {}
        self._frozen = False

    def claim(self, base: int, size: int, device: Device, name: str, *, lock: threading.Lock | None = None) -> Claim:
        """Give `device` the addresses base..base+size-1.

        Args:
            base: first address.
            size: how many addresses, at least one.
            device: answers at offsets from `base`.
            name: what to call it.
            lock: the lock of a claim that the same device has already; by default a new one.

        Raises:
            ConfigError: the range overlaps another, leaves the bus, or the machine runs already.
        """
        end = base + size
        if self._frozen:
            raise ConfigError(f"{name}: the machine has started; devices are claimed before that")
        if size < 1 or base < 0 or end > self._limit:
            raise ConfigError(f"{name}: {base:#x}..{end - 1:#x} is not a range of the {self._name} bus")
        index = bisect_right(self._bases, base)
        for other in self._claims[max(index - 1, 0) : index + 1]:
            if base < other.end and other.base < end:
                raise ConfigError(
                    f"{name} at {base:#x}..{end - 1:#x} overlaps {other.name} at {other.base:#x}..{other.end - 1:#x}"
                    f" on the {self._name} bus"
                )
        claim = Claim(base, size, device, name, lock or threading.Lock())
        self._claims.insert(index, claim)
        self._bases.insert(index, base)
        return claim

    def freeze(self) -> list[Claim]:
        """Take no more claims; return all of them, by address."""
        self._frozen = True
        for claim in self._claims:
            if claim.end - claim.base <= DIRECT_LIMIT:
                self._direct.update(dict.fromkeys(range(claim.base, claim.end), claim))
        return self._claims

    def find(self, address: int) -> Claim | None:
        """Return the claim that holds `address`, None where nobody does."""
        claim = self._direct.get(address)
        if claim is None:
            index = bisect_right(self._bases, address) - 1
            if index >= 0 and address < self._claims[index].end:
                claim = self._claims[index]
        return claim

    def name_of(self, address: int, *, write: bool) -> tuple[str, str] | None:
        """Return the names of the device and of the register at `address`; None where nobody has claimed it.

        For reports, after the fact: it says who is there now. A device that has no names gives its offset, as "+0x1f".

        Args:
            address: where the access was.
            write: what kind it was: a read and a write of one address may be of two registers.
        """
        claim = self.find(address)
        if claim is None:
            return None
        offset = address - claim.base
        name, device, offset = inner_of(claim.device, offset) or (claim.name, claim.device, offset)
        return name, name_in(device, offset, write=write)

    def read(self, address: int, size: int) -> int:
        """Return the device's answer to a read of `size` bytes; what is not wholly claimed reads as all ones."""
        claim = self._direct.get(address) or self.find(address)
        if claim is None or address + size > claim.end:
            return MASKS[size]
        with claim.lock:
            return claim.read(address - claim.base, size) & MASKS[size]

    def write(self, address: int, size: int, value: int) -> None:
        """Hand a write of `size` bytes to its device; what is not wholly claimed is dropped."""
        claim = self._direct.get(address) or self.find(address)
        if claim is None or address + size > claim.end:
            return
        with claim.lock:
            claim.write(address - claim.base, size, value)

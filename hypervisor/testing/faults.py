"""Disks of a running guest that fail, and the power that goes."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any, Final, cast

from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from devices.backends.fault import Hit
    from devices.backends.faults import FaultyImage
    from devices.backends.image import Image
    from devices.virtio.block import Block
    from hypervisor.testing.guest import GuestMachine

__all__ = ["GuestDisk", "cut_power"]

DISKS: Final = "abcdefghijklmnopqrstuvwxyz"


class GuestDisk:
    """A disk of a guest, to be broken. Faults end with the test.

    Attributes:
        guest: whose.
        name: the machine's name for it, such as "blk0".
        device: the guest's name for it, such as "/dev/vda".
    """

    def __init__(self, guest: GuestMachine, disk: str | int) -> None:
        """Find a disk by its name or number.

        Raises:
            ConfigError: there is no such disk.
        """
        name = f"blk{disk}" if isinstance(disk, int) else disk
        disks = [one for one in guest.machine.devices if one.startswith("blk")]
        if name not in disks:
            raise ConfigError(f"the guest has no disk {disk!r}", hint=f"it has: {', '.join(disks) or 'none'}")
        self.guest = guest
        self.name = name
        self.device = f"/dev/vd{DISKS[disks.index(name)]}"

    @property
    def image(self) -> FaultyImage:
        """What the guest's requests go to, which fails when asked to."""
        self.guest.broken[self.name] = self
        return self.guest.machine.images[self.name]

    def _still(self, change: Any) -> None:
        """Change the disk while nothing is on its way to it: its short cut is looked for anew afterwards."""
        self.guest.machine.stand_still(change)

    def fault(self, kind: str, **how: Any) -> None:
        """Arm a fault: read-error, write-error, flush-error, torn-write, dropped-write, lying-flush or slow.

        Args:
            kind: what goes wrong; see `devices.backends.faults.Fault`, as for all that follows.
            how: `where`, `count`, `after`, `chance`, `seconds` and so on.
        """
        image = self.image
        self._still(lambda: image.fault(kind, **how))

    def hold_writes(self) -> None:
        """Keep what is written in the disk's own cache until it is flushed: a power cut can lose it."""
        self._still(self.image.hold_writes)

    def clear(self) -> None:
        """Make the disk a good one again."""
        self._still(self.image.clear)

    def repair(self) -> None:
        """Do as `clear`, of a machine that has ended as well, and forget what met a fault."""
        image = self.image
        if self.guest.machine.outcome is None:
            self._still(image.clear)
        else:
            image.clear()
        image.hits.clear()

    @property
    def hits(self) -> list[Hit]:
        """The requests that met a fault."""
        return list(self.image.hits)


def cut_power(guest: GuestMachine, *, keep: str, seed: int, folder: str) -> list[str]:
    """End the guest where it is, and return its disks as they are then: images in `folder`.

    Of a disk that holds writes back, `keep` says what is left of them (`FaultyImage.power_cut`). Another one has
    everything that it has answered for.
    """
    machine = guest.machine
    images: list[str] = []

    def take() -> None:
        for index, name in enumerate(one for one in machine.devices if one.startswith("blk")):
            block = cast("Block", machine.devices[name])
            if block.image.readonly:
                images.append("")
                continue
            content = _left(block.image, keep, seed)
            descriptor, path = tempfile.mkstemp(prefix=f"cut-{index}-", suffix=".img", dir=folder)
            with os.fdopen(descriptor, "wb") as file:
                _write_sparse(file, content)
            images.append(path)

    machine.stand_still(take)
    machine.kill()
    return images


def _left(image: Image, keep: str, seed: int) -> bytes | bytearray:
    """Return what a disk holds when its power goes."""
    from devices.backends.faults import FaultyImage  # noqa: PLC0415 - of the tests that break disks

    if isinstance(image, FaultyImage):
        if image.holds_writes:
            return image.after_cut(keep=keep, seed=seed)
        image = image.below  # no fault shall meet the look at it
    whole = bytearray(image.size)
    image.readv(0, [memoryview(whole)])
    return whole


def _write_sparse(file: Any, content: bytes | bytearray) -> None:
    """Write with holes where there are zeroes."""
    view = memoryview(content)
    step = 1 << 16
    zero = bytes(step)
    for at in range(0, len(view), step):
        part = view[at : at + step]
        if part != zero[: len(part)]:
            file.seek(at)
            file.write(part)
    file.truncate(len(view))

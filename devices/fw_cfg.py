"""QEMU's firmware configuration device: a selector port and a data port (0x510, 0x511).

Follows docs/specs/fw_cfg of QEMU, without the DMA interface. Test suites for bare machines (kvm-unit-tests) ask it for
the number of CPUs and the size of RAM; Linux shows its files in /sys/firmware/qemu_fw_cfg.
"""

from __future__ import annotations

from enum import IntEnum
from struct import pack
from typing import TYPE_CHECKING, Any, Final

from devices.ports import OPEN_BUS, register_of
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MAX_FILES", "MAX_NAME", "FwCfg", "Key", "Reg"]

MAX_FILES: Final = 0x4000 - 0x20
"""Generic items have 14-bit keys."""
MAX_NAME: Final = 55
"""Bytes of ASCII in a file's name, without its final NUL."""


class Reg(IntEnum):
    """Offsets from port 0x510."""

    SELECTOR = 0  # WO, 16 bits
    DATA = 1  # RO, 8 bits


class Key(IntEnum):
    """Items by selector value."""

    SIGNATURE = 0x00  # "QEMU"
    ID = 0x01  # 32 bits: bit 0 the traditional interface, bit 1 DMA
    RAM_SIZE = 0x03  # 64 bits, bytes
    NB_CPUS = 0x05  # 16 bits
    MAX_CPUS = 0x0F  # 16 bits
    FILE_DIR = 0x19  # count and 64-byte entries, big-endian
    FILE_FIRST = 0x20


_SELECTOR: Final = int(Reg.SELECTOR)
_DATA: Final = int(Reg.DATA)
_WRITE_CHANNEL: Final = 0x4000
"""Selects the same item for writing, which this interface no longer does."""


class FwCfg:
    """Items to read, each a string of bytes that goes on with zeros for ever."""

    def __init__(self, *, cpus: int, ram_bytes: int, files: Mapping[str, bytes]) -> None:
        """Hold the items.

        Args:
            cpus: how many there are; no more can be added.
            ram_bytes: size of RAM in bytes.
            files: contents by name, such as "opt/org.example/config"; keys are given in this order.

        Raises:
            ValueError: a name is not ASCII, empty or longer than MAX_NAME, or there are more than MAX_FILES.
        """
        if len(files) > MAX_FILES:
            raise ValueError(f"{len(files)} fw_cfg files; there are keys for {MAX_FILES}")
        directory = pack(">I", len(files))
        self._items = {
            int(Key.SIGNATURE): b"QEMU",
            int(Key.ID): pack("<I", 1),
            int(Key.RAM_SIZE): pack("<Q", ram_bytes),
            int(Key.NB_CPUS): pack("<H", cpus),
            int(Key.MAX_CPUS): pack("<H", cpus),
        }
        for key, (name, content) in enumerate(files.items(), Key.FILE_FIRST):
            if not name.isascii() or not 0 < len(name) <= MAX_NAME:
                raise ValueError(f"fw_cfg file name {name!r}: 1 to {MAX_NAME} ASCII characters")
            directory += pack(">IHH56s", len(content), key, 0, name.encode("ascii"))
            self._items[key] = bytes(content)
        self._items[int(Key.FILE_DIR)] = directory
        self._select(int(Key.SIGNATURE))

    def _select(self, key: int) -> None:
        self._key = key
        self._item = self._items.get(key, b"")
        self._position = 0

    def read(self, offset: int, size: int) -> int:
        """Return the selected item's next byte (offset 1), zero past its end; the selector cannot be read."""
        if offset != _DATA or size != 1:
            return OPEN_BUS
        position = self._position
        if position >= len(self._item):
            return 0
        self._position = position + 1
        return self._item[position]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item from its start (16 bits at offset 0); an unknown key reads as zeros. Data is read-only."""
        if offset == _SELECTOR and size == 2:
            self._select(value & ~_WRITE_CHANNEL)

    @staticmethod
    def register_name(offset: int, *, write: bool) -> str:
        """Return the name of the port at `offset`."""
        return register_of(Reg, offset, write=write)

    def state(self) -> dict[str, Any]:
        """Return which item is selected, and how much of it has been read; the items are not state."""
        return {"selector": self._key, "position": self._position}

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in a state; see `devices.ports.Stateful`."""
        saved = Saved(state)
        key = saved.bits("selector", 0xFFFF & ~_WRITE_CHANNEL)
        position = saved.number("position", len(self._items.get(key, b"")))
        saved.end()
        self._select(key)
        self._position = position

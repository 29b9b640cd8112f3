"""Virtio over MMIO (Virtio 1.2, section 4.2), version 2: registers up to 0xff, the configuration space behind them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from devices.ports import OPEN_BUS
from devices.virtio.transport import VirtioTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.ports import Signal
    from devices.virtio.device import Runner, VirtioDevice

__all__ = ["QUEUE_NOTIFY", "SIZE", "Reg", "VirtioMmio"]


class Reg(IntEnum):
    """Register offsets (4.2.2); all are 32 bits wide."""

    MAGIC_VALUE = 0x000  # RO
    VERSION = 0x004  # RO
    DEVICE_ID = 0x008  # RO
    VENDOR_ID = 0x00C  # RO
    DEVICE_FEATURES = 0x010  # RO, the 32 bits that DEVICE_FEATURES_SEL means
    DEVICE_FEATURES_SEL = 0x014  # WO
    DRIVER_FEATURES = 0x020  # WO
    DRIVER_FEATURES_SEL = 0x024  # WO
    QUEUE_SEL = 0x030  # WO
    QUEUE_NUM_MAX = 0x034  # RO
    QUEUE_NUM = 0x038  # WO
    QUEUE_READY = 0x044  # RW
    QUEUE_NOTIFY = 0x050  # WO
    INTERRUPT_STATUS = 0x060  # RO
    INTERRUPT_ACK = 0x064  # WO
    STATUS = 0x070  # RW
    QUEUE_DESC_LOW = 0x080  # WO
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    SHM_LEN_LOW = 0x0B0  # RO: all ones, there is no shared memory
    SHM_LEN_HIGH = 0x0B4
    SHM_BASE_LOW = 0x0B8
    SHM_BASE_HIGH = 0x0BC
    CONFIG_GENERATION = 0x0FC  # RO


SIZE: Final = 0x200
"""Bytes that one device takes."""
QUEUE_NOTIFY: Final = int(Reg.QUEUE_NOTIFY)
_CONFIG: Final = 0x100
_MAGIC: Final = int.from_bytes(b"virt", "little")
_VERSION: Final = 2
_VENDOR: Final = int.from_bytes(b"TRAP", "little")
_LOW: Final = 0xFFFF_FFFF
_HIGH: Final = _LOW << 32
_NO_SHARED_MEMORY: Final = 0xFFFF_FFFF


class VirtioMmio(VirtioTransport):
    """One device's registers; fits `devices.ports.Device`."""

    def __init__(self, device: VirtioDevice, runner: Runner, signal: Signal) -> None:
        """Show `device`; every interrupt is `signal`, an edge at the device's line."""
        super().__init__(device, runner, [signal] * len(device.queues), signal)
        self._readers: Mapping[int, Callable[[], int]] = {
            Reg.MAGIC_VALUE: lambda: _MAGIC,
            Reg.VERSION: lambda: _VERSION,
            Reg.DEVICE_ID: lambda: self.device.device_id,
            Reg.VENDOR_ID: lambda: _VENDOR,
            Reg.DEVICE_FEATURES: lambda: self.device_features,
            Reg.QUEUE_NUM_MAX: lambda: 0 if self.queue is None else self.queue.max_size,
            Reg.QUEUE_READY: lambda: int(self.queue is not None and self.queue.is_enabled),
            Reg.INTERRUPT_STATUS: self.peek_isr,
            Reg.STATUS: lambda: self.status,
            Reg.SHM_LEN_LOW: lambda: _NO_SHARED_MEMORY,
            Reg.SHM_LEN_HIGH: lambda: _NO_SHARED_MEMORY,
            Reg.SHM_BASE_LOW: lambda: _NO_SHARED_MEMORY,
            Reg.SHM_BASE_HIGH: lambda: _NO_SHARED_MEMORY,
            Reg.CONFIG_GENERATION: self.read_generation,
        }
        self._writers: Mapping[int, Callable[[int], object]] = {
            Reg.DEVICE_FEATURES_SEL: lambda value: setattr(self, "device_select", value),
            Reg.DRIVER_FEATURES: self.write_driver_features,
            Reg.DRIVER_FEATURES_SEL: lambda value: setattr(self, "driver_select", value),
            Reg.QUEUE_SEL: lambda value: setattr(self, "queue_select", value),
            Reg.QUEUE_NUM: self.set_queue_size,
            Reg.QUEUE_READY: self._write_ready,
            Reg.QUEUE_NOTIFY: self.kick,
            Reg.INTERRUPT_ACK: self.take_isr,
            Reg.STATUS: lambda value: self.write_status(value & 0xFF),
            Reg.QUEUE_DESC_LOW: lambda value: self.set_queue_address("descriptors", value, _LOW),
            Reg.QUEUE_DESC_HIGH: lambda value: self.set_queue_address("descriptors", value << 32, _HIGH),
            Reg.QUEUE_DRIVER_LOW: lambda value: self.set_queue_address("available", value, _LOW),
            Reg.QUEUE_DRIVER_HIGH: lambda value: self.set_queue_address("available", value << 32, _HIGH),
            Reg.QUEUE_DEVICE_LOW: lambda value: self.set_queue_address("used", value, _LOW),
            Reg.QUEUE_DEVICE_HIGH: lambda value: self.set_queue_address("used", value << 32, _HIGH),
        }

    def _write_ready(self, value: int) -> None:
        """Take the selected queue into use, or out of it."""
        if value & 1:
            self.enable_queue()
        else:
            self.disable_queue()

    def read(self, offset: int, size: int) -> int:
        """Return a register (4 bytes wide only) or bytes of the configuration space (1, 2 or 4: 4.2.2.2)."""
        if offset >= _CONFIG:
            return self.read_config(offset - _CONFIG, size)
        reader = self._readers.get(offset) if size == 4 else None
        return OPEN_BUS if reader is None else reader()

    def write(self, offset: int, size: int, value: int) -> None:
        """Set a register (4 bytes wide only) or bytes of the configuration space."""
        if offset >= _CONFIG:
            self.write_config(offset - _CONFIG, size, value)
            return
        writer = self._writers.get(offset) if size == 4 else None
        if writer is not None:
            writer(value)

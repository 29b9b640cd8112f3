"""Virtio over MMIO (Virtio 1.2, section 4.2), version 2: registers up to 0xff, the configuration space behind them."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final

from devices.ports import OPEN_BUS, register_of
from devices.virtio.transport import VirtioTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.ports import Signal
    from devices.virtio.device import Runner, VirtioDevice

__all__ = ["QUEUE_NOTIFY", "SIZE", "Reg", "VirtioMmio"]


class Reg(IntEnum):
    """Register offsets by the names of 4.2.2; all are 32 bits wide."""

    MagicValue = 0x000  # RO
    Version = 0x004  # RO
    DeviceID = 0x008  # RO
    VendorID = 0x00C  # RO
    DeviceFeatures = 0x010  # RO, the 32 bits that DeviceFeaturesSel means
    DeviceFeaturesSel = 0x014  # WO
    DriverFeatures = 0x020  # WO
    DriverFeaturesSel = 0x024  # WO
    QueueSel = 0x030  # WO
    QueueNumMax = 0x034  # RO
    QueueNum = 0x038  # WO
    QueueReady = 0x044  # RW
    QueueNotify = 0x050  # WO
    InterruptStatus = 0x060  # RO
    InterruptACK = 0x064  # WO
    Status = 0x070  # RW
    QueueDescLow = 0x080  # WO
    QueueDescHigh = 0x084
    QueueDriverLow = 0x090
    QueueDriverHigh = 0x094
    QueueDeviceLow = 0x0A0
    QueueDeviceHigh = 0x0A4
    SHMSel = 0x0AC  # WO: nothing to select
    SHMLenLow = 0x0B0  # RO: all ones, there is no shared memory
    SHMLenHigh = 0x0B4
    SHMBaseLow = 0x0B8
    SHMBaseHigh = 0x0BC
    QueueReset = 0x0C0  # RW with a feature that is not offered
    ConfigGeneration = 0x0FC  # RO


SIZE: Final = 0x200
"""Bytes that one device takes."""
QUEUE_NOTIFY: Final = int(Reg.QueueNotify)
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
            Reg.MagicValue: lambda: _MAGIC,
            Reg.Version: lambda: _VERSION,
            Reg.DeviceID: lambda: self.device.device_id,
            Reg.VendorID: lambda: _VENDOR,
            Reg.DeviceFeatures: lambda: self.device_features,
            Reg.QueueNumMax: lambda: 0 if self.queue is None else self.queue.max_size,
            Reg.QueueReady: lambda: int(self.queue is not None and self.queue.is_enabled),
            Reg.InterruptStatus: self.peek_isr,
            Reg.Status: lambda: self.status,
            Reg.SHMLenLow: lambda: _NO_SHARED_MEMORY,
            Reg.SHMLenHigh: lambda: _NO_SHARED_MEMORY,
            Reg.SHMBaseLow: lambda: _NO_SHARED_MEMORY,
            Reg.SHMBaseHigh: lambda: _NO_SHARED_MEMORY,
            Reg.ConfigGeneration: self.read_generation,
        }
        self._writers: Mapping[int, Callable[[int], object]] = {
            Reg.DeviceFeaturesSel: lambda value: setattr(self, "device_select", value),
            Reg.DriverFeatures: self.write_driver_features,
            Reg.DriverFeaturesSel: lambda value: setattr(self, "driver_select", value),
            Reg.QueueSel: lambda value: setattr(self, "queue_select", value),
            Reg.QueueNum: self.set_queue_size,
            Reg.QueueReady: self._write_ready,
            Reg.QueueNotify: self.kick,
            Reg.InterruptACK: self.take_isr,
            Reg.Status: lambda value: self.write_status(value & 0xFF),
            Reg.QueueDescLow: lambda value: self.set_queue_address("descriptors", value, _LOW),
            Reg.QueueDescHigh: lambda value: self.set_queue_address("descriptors", value << 32, _HIGH),
            Reg.QueueDriverLow: lambda value: self.set_queue_address("available", value, _LOW),
            Reg.QueueDriverHigh: lambda value: self.set_queue_address("available", value << 32, _HIGH),
            Reg.QueueDeviceLow: lambda value: self.set_queue_address("used", value, _LOW),
            Reg.QueueDeviceHigh: lambda value: self.set_queue_address("used", value << 32, _HIGH),
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

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return the name of a register as 4.2.2 has it, "Config+0x8" in the configuration space."""
        if offset >= _CONFIG:
            return f"Config+{offset - _CONFIG:#x}"
        return register_of(Reg, offset, write=write, width=4)

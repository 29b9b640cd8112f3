"""What registers are called in reports. Names and offsets are restated from data sheets and specifications."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest
from fakes import FakeAlarm, FakeClock, FakeIrq, FakeSink
from test_virtio_mmio import Device as MmioDevice
from test_virtio_pci import Guest as PciGuest
from virtio_driver import FakeRam, FakeSignal, InlineRunner

import devices
from devices.acpi_pm import AcpiPm
from devices.debug_console import DebugConsole
from devices.debug_exit import DebugExit
from devices.fw_cfg import FwCfg
from devices.i8042 import I8042
from devices.pci import PciConfigPorts
from devices.ports import NamedRegisters
from devices.rtc_mc146818 import RtcMc146818
from devices.uart16550 import Uart16550
from devices.virtio.mmio import VirtioMmio


def nothing(*_args):
    """Be a callback that nobody minds."""


def make_mmio():
    runner = InlineRunner()
    runner.device = MmioDevice(FakeRam())
    return VirtioMmio(runner.device, runner, FakeSignal())


def make_rtc():
    return RtcMc146818(irq=FakeIrq(), alarm=FakeAlarm(), now_ns=FakeClock(), wall_seconds=lambda: 0.0)


def make_acpi():
    return AcpiPm(irq=FakeIrq(), alarm=FakeAlarm(), now_ns=FakeClock(), on_power_off=nothing)


# by model: how it is made, how many addresses it is claimed at, and of each register: offset, width in bytes, name to
# a read, name to a write
MODELS = {
    "uart": (  # PC16550D, table II, DLAB=0
        lambda: Uart16550(irq=FakeIrq(), sink=FakeSink()),
        8,
        [
            (0, 1, "RBR", "THR"),
            (1, 1, "IER", "IER"),
            (2, 1, "IIR", "FCR"),
            (3, 1, "LCR", "LCR"),
            (4, 1, "MCR", "MCR"),
            (5, 1, "LSR", "LSR"),
            (6, 1, "MSR", "MSR"),
            (7, 1, "SCR", "SCR"),
        ],
    ),
    "i8042": (lambda: I8042(nothing), 5, [(0, 1, "DATA", "DATA"), (4, 1, "STATUS", "COMMAND")]),
    "rtc": (make_rtc, 2, [(0, 1, "INDEX", "INDEX"), (1, 1, "DATA", "DATA")]),
    "acpi": (  # ACPI 6.4, 4.8.3
        make_acpi,
        12,
        [
            (0, 2, "PM1_STS", "PM1_STS"),
            (2, 2, "PM1_EN", "PM1_EN"),
            (4, 2, "PM1_CNT", "PM1_CNT"),
            (8, 4, "PM_TMR", "PM_TMR"),
        ],
    ),
    "fw_cfg": (
        lambda: FwCfg(cpus=1, ram_bytes=0, files={}),
        2,
        [(0, 1, "SELECTOR", "SELECTOR"), (1, 1, "DATA", "DATA")],  # the second byte of the selector is the data port
    ),
    "pci": (  # PCI 3.0, 3.2.2.3.2; ICH10, 13.7.5
        lambda: PciConfigPorts(on_reset=nothing),
        8,
        [
            (0, 1, "CONFIG_ADDRESS", "CONFIG_ADDRESS"),
            (1, 1, "RESET_CONTROL", "RESET_CONTROL"),
            (2, 2, "CONFIG_ADDRESS", "CONFIG_ADDRESS"),
            (4, 4, "CONFIG_DATA", "CONFIG_DATA"),
        ],
    ),
    "debug-exit": (lambda: DebugExit(nothing), 4, [(0, 4, "EXIT", "EXIT")]),
    "debug-console": (lambda: DebugConsole(FakeSink()), 1, [(0, 1, "READBACK", "DATA")]),
    "virtio-mmio": (  # Virtio 1.2, 4.2.2
        make_mmio,
        0x200,
        [
            (offset, 4, name, name)
            for offset, name in {
                0x000: "MagicValue",
                0x004: "Version",
                0x008: "DeviceID",
                0x00C: "VendorID",
                0x010: "DeviceFeatures",
                0x014: "DeviceFeaturesSel",
                0x020: "DriverFeatures",
                0x024: "DriverFeaturesSel",
                0x030: "QueueSel",
                0x034: "QueueNumMax",
                0x038: "QueueNum",
                0x044: "QueueReady",
                0x050: "QueueNotify",
                0x060: "InterruptStatus",
                0x064: "InterruptACK",
                0x070: "Status",
                0x080: "QueueDescLow",
                0x084: "QueueDescHigh",
                0x090: "QueueDriverLow",
                0x094: "QueueDriverHigh",
                0x0A0: "QueueDeviceLow",
                0x0A4: "QueueDeviceHigh",
                0x0AC: "SHMSel",
                0x0B0: "SHMLenLow",
                0x0B4: "SHMLenHigh",
                0x0B8: "SHMBaseLow",
                0x0BC: "SHMBaseHigh",
                0x0C0: "QueueReset",
                0x0FC: "ConfigGeneration",
            }.items()
        ]
        + [(offset, 1, f"Config+{offset - 0x100:#x}", f"Config+{offset - 0x100:#x}") for offset in range(0x100, 0x200)],
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_offset_has_the_specifications_name(model):
    """Each byte of a register has its name; what is no register is its offset."""
    make, size, registers = MODELS[model]
    device = make()
    assert isinstance(device, NamedRegisters)
    names = {start + i: (read, write) for start, width, read, write in registers for i in range(width)}
    for offset in range(size):
        found = device.register_name(offset, write=False), device.register_name(offset, write=True)
        assert found == names.get(offset, (f"+{offset:#x}",) * 2), hex(offset)


COMMON = {  # Virtio 1.2, 4.1.4.3: offset and width
    "device_feature_select": (0, 4),
    "device_feature": (4, 4),
    "driver_feature_select": (8, 4),
    "driver_feature": (12, 4),
    "config_msix_vector": (16, 2),
    "num_queues": (18, 2),
    "device_status": (20, 1),
    "config_generation": (21, 1),
    "queue_select": (22, 2),
    "queue_size": (24, 2),
    "queue_msix_vector": (26, 2),
    "queue_enable": (28, 2),
    "queue_notify_off": (30, 2),
    "queue_desc": (32, 8),
    "queue_driver": (40, 8),
    "queue_device": (48, 8),
}


def test_virtio_pci():
    """4.1.4: each structure where its capability says that it is, as long as that says; the table and bits of MSI-X."""
    guest = PciGuest(queues=3, config=bytes(12))
    expected = dict.fromkeys(range(guest.bar_size), "")
    for kind, name in ((2, "QueueNotify"), (3, "ISR"), (4, "device-config")):
        _, start, length = guest.structures[kind]
        expected |= dict.fromkeys(range(start, start + length), name)
    common, length = guest.structures[1][1:]
    assert length == 56
    for name, (start, width) in COMMON.items():
        expected |= dict.fromkeys(range(common + start, common + start + width), name)
    table, bits = guest.config(guest.msix + 4, 4), guest.config(guest.msix + 8, 4)
    expected |= dict.fromkeys(range(table, table + 16 * 4), "msix-table")
    expected |= dict.fromkeys(range(bits, bits + 8), "msix-pba")
    for offset, name in expected.items():
        for write in (False, True):
            assert guest.function.bar_register_name(0, offset, write=write) == (name or f"+{offset:#x}"), hex(offset)


def test_no_model_is_left_out():
    """Whatever sits on a bus of the machine names its registers, or says who is in it."""
    found = {
        one
        for module in pkgutil.walk_packages(devices.__path__, "devices.")
        for _, one in inspect.getmembers(import_module(module.name), inspect.isclass)
        if one.__module__ == module.name and not getattr(one, "_is_protocol", False) and is_on_a_bus(one)
    }
    assert {type(make()) for make, *_ in MODELS.values()} < found
    assert [one for one in found if not (hasattr(one, "register_name") or hasattr(one, "inner"))] == []


def is_on_a_bus(one):
    accesses = [getattr(one, name, None) for name in ("read", "write")]
    return all(access and [*inspect.signature(access).parameters][1:3] == ["offset", "size"] for access in accesses)

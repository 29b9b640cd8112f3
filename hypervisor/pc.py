"""The PC around the vCPUs: which device models there are, at which ports, on which interrupts.

With `machine` this is the only room that knows device models. Every address is from `layout`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, TypeVar

from devices.debug_console import DebugConsole
from devices.debug_exit import DebugExit
from devices.ports import inner_of, name_in
from hypervisor import layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.acpi_pm import AcpiPm
    from devices.fw_cfg import FwCfg
    from devices.i8042 import I8042
    from devices.pci import PciConfigPorts, PciEcam
    from devices.ports import Device, IrqLine, NamedRegisters
    from devices.rtc_mc146818 import RtcMc146818
    from devices.uart16550 import Uart16550
    from hypervisor.bus import Bus, Claim
    from hypervisor.console import Console
    from hypervisor.eventloop import EventLoop, LoopAlarm
    from hypervisor.kvm import ByteRing, Vm
    from hypervisor.memory import GuestMemory
    from hypervisor.virtio import VirtioBoard

UART_LSR = 5

D = TypeVar("D", bound="Device")


class PortFastPath:
    """The short cuts of one device in the run loop's port table; fits `devices.ports.FastPath`."""

    def __init__(self, vm: Vm, base: int, ring: int) -> None:
        """Publish for ports from `base` on; diverted writes go to ring number `ring`."""
        self._vm = vm
        self._base = base
        self._ring = ring

    def publish(self, offset: int, value: int | None) -> None:
        """Answer one-byte reads of the port with `value`; None sends them to the device again."""
        self._vm.publish_port(self._base + offset, value)

    def divert(self, offset: int, to_sink: bool) -> None:
        """Append one-byte writes to the port to the ring instead of calling the device."""
        self._vm.divert_port(self._base + offset, self._ring if to_sink else None)


class ConsoleSink:
    """A device's ByteSink that is a console."""

    def __init__(self, console: Console) -> None:
        """Write to `console`."""
        self.write = console.write_from_guest


class NoIrq:
    """The interrupt line of a machine without interrupt controllers."""

    def set(self, level: bool) -> None:
        """Lead nowhere."""


class LazyDevice(Generic[D]):
    """A device that is made, and its module imported, when it is first touched: most guests never touch most of a PC.

    Its claim's lock is held whenever it is made or used, so it is made once.
    """

    def __init__(self, make: Callable[[], D], offset: int = 0) -> None:
        """Call `make` for the device; this claim's first address is the device's `offset`."""
        self._make = make
        self._offset = offset
        self._device: D | None = None
        self.claim: Claim | None = None
        """The claim that shall call the device itself once it is made; None keeps this object in between."""

    @property
    def is_made(self) -> bool:
        """Whether the guest has touched it."""
        return self._device is not None

    @property
    def device(self) -> D:
        """The device itself."""
        if self._device is None:
            self._device = self._make()
            if self.claim is not None:
                self.claim.read = self._device.read
                self.claim.write = self._device.write
        return self._device

    def read(self, offset: int, size: int) -> int:
        """Read the device."""
        return self.device.read(self._offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the device."""
        self.device.write(self._offset + offset, size, value)

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return the device's name of a register; its offset, as long as the device is not made.

        Asking does not make it: a UART would publish its LSR, a timer begin to count, and the guest could tell. No
        access has come to it yet, so nobody who reports one asks.
        """
        return name_in(self._device, self._offset + offset, write=write)

    def inner(self, offset: int) -> tuple[str, NamedRegisters, int] | None:
        """Return who is at `offset` if the device is a window, and made."""
        return inner_of(self._device, self._offset + offset)


class Pc:
    """The devices of one machine, claimed on its buses."""

    def __init__(  # noqa: PLR0913 - what a board is wired to
        self,
        *,
        vm: Vm,
        ports: Bus,
        memory_bus: Bus,
        loop: EventLoop,
        irq: Callable[[int], IrqLine],
        console: Console,
        console_ring: ByteRing,
        debug_console: Console,
        debug_ring: ByteRing,
        cpus: int,
        memory: GuestMemory,
        on_exit: Callable[[int], None],
        on_reset: Callable[[], None],
        on_power_off: Callable[[], None],
        is_polled: Callable[[int], bool],
        virtio: VirtioBoard | None = None,
    ) -> None:
        """Make and wire every device.

        The `on_` callables end the run, `is_polled` says who spins on a port, `virtio` has the PCI bus if there is more
        on it than the host bridge.
        """
        self._vm = vm
        self._ports = ports
        self._loop = loop
        self._add_uart(irq(layout.IRQ_COM1), console, vm.connect_ring(console_ring), is_polled)
        debug_fast = PortFastPath(vm, layout.DEBUG_CONSOLE, vm.connect_ring(debug_ring))
        ports.claim(layout.DEBUG_CONSOLE, 1, DebugConsole(ConsoleSink(debug_console), fast=debug_fast), "debugcon")
        ports.claim(layout.DEBUG_EXIT, 4, DebugExit(on_exit), "debug-exit")
        self._add_i8042(irq(layout.IRQ_KEYBOARD), on_reset)
        self._add_rtc(irq(layout.IRQ_RTC), memory)
        self._add_acpi(irq(layout.IRQ_SCI), on_power_off)
        self._add_fw_cfg(cpus, memory)
        self._add_pci(memory_bus, on_reset, virtio)

    def _add_uart(self, irq: IrqLine, console: Console, ring: int, is_polled: Callable[[int], bool]) -> None:
        def make() -> Uart16550:
            from devices.events import EventLog
            from devices.uart16550 import Uart16550

            fast = PortFastPath(self._vm, layout.COM1, ring)
            uart = Uart16550(irq=irq, sink=ConsoleSink(console), fast=fast, log=EventLog(device="uart0"))
            uart.on_room = lambda: console.transfer(uart.receive)
            return uart

        uart = LazyDevice(make)
        claim = uart.claim = self._ports.claim(layout.COM1, 8, uart, "uart0")

        def deliver() -> None:
            with claim.lock:
                console.transfer(uart.device.receive)

        console.deliver = deliver
        console.ready = lambda: uart.is_made and (uart.device.listening or is_polled(layout.COM1 + UART_LSR))

    def _alarm(self, claim: Claim, fire: Callable[[], None]) -> LoopAlarm:
        """Make an alarm that calls `fire` under the claim's lock."""

        def locked() -> None:
            with claim.lock:
                fire()

        return self._loop.alarm(locked)

    def _add_i8042(self, irq: IrqLine, on_reset: Callable[[], None]) -> None:
        def make() -> I8042:
            from devices.i8042 import I8042

            return I8042(on_reset, irq=irq)

        data = LazyDevice(make)
        # one device at two ports: the second view shares the first one's device and lock
        command = LazyDevice(lambda: data.device, offset=layout.I8042_COMMAND - layout.I8042_DATA)
        claim = self._ports.claim(layout.I8042_DATA, 1, data, "i8042")
        self._ports.claim(layout.I8042_COMMAND, 1, command, "i8042", lock=claim.lock)

    def _add_rtc(self, irq: IrqLine, memory: GuestMemory) -> None:
        def make() -> RtcMc146818:
            from devices.rtc_mc146818 import RtcMc146818

            return RtcMc146818(
                irq=irq,
                alarm=self._alarm(claim, lambda: rtc.device.on_alarm()),
                now_ns=time.monotonic_ns,
                wall_seconds=time.time,
                ram_below_4g=memory.ranges[0].size,
                ram_above_4g=sum(ram.size for ram in memory.ranges[1:]),
            )

        rtc = LazyDevice(make)
        claim = self._ports.claim(layout.RTC, 2, rtc, "rtc")

    def _add_acpi(self, irq: IrqLine, on_power_off: Callable[[], None]) -> None:
        def make() -> AcpiPm:
            from devices.acpi_pm import AcpiPm

            return AcpiPm(
                irq=irq,
                alarm=self._alarm(self._pm_claim, lambda: self._pm.device.on_alarm()),
                now_ns=time.monotonic_ns,
                on_power_off=on_power_off,
            )

        self._pm = LazyDevice(make)
        self._pm_claim = self._pm.claim = self._ports.claim(layout.PM1_EVENT, 12, self._pm, "acpi-pm")

    def _add_fw_cfg(self, cpus: int, memory: GuestMemory) -> None:
        def make() -> FwCfg:
            from devices.fw_cfg import FwCfg

            return FwCfg(cpus=cpus, ram_bytes=memory.size, files={})

        self._ports.claim(layout.FW_CFG, 2, LazyDevice(make), "fw_cfg")

    def _add_pci(self, memory_bus: Bus, on_reset: Callable[[], None], virtio: VirtioBoard | None) -> None:
        def make() -> PciConfigPorts:
            from devices.pci import PciConfigPorts

            return PciConfigPorts(None if virtio is None else virtio.pci, on_reset=on_reset)

        def make_ecam() -> PciEcam:
            from devices.pci import PciEcam

            return PciEcam(pci.device.bus)

        pci = LazyDevice(make)
        lock = None if virtio is None else virtio.pci_lock
        claim = self._ports.claim(layout.PCI_CONFIG, 8, pci, "pci", lock=lock)
        memory_bus.claim(layout.PCI_ECAM, layout.PCI_ECAM_SIZE, LazyDevice(make_ecam), "pci-ecam", lock=claim.lock)

    def press_power_button(self) -> bool:
        """Ask the guest to power off; return whether it has enabled the button's event."""
        with self._pm_claim.lock:
            return self._pm.device.press_power_button()

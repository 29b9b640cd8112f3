"""The PC around the vCPUs: which device models there are, at which ports, on which interrupts.

With `machine` this is the only room that knows device models. Every address is from `layout`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from devices.debug_console import DebugConsole
from devices.debug_exit import DebugExit
from devices.ports import Device, Stateful, inner_of, name_in
from hypervisor import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.acpi_pm import AcpiPm
    from devices.fw_cfg import FwCfg
    from devices.i8042 import I8042
    from devices.pci import PciBus, PciConfigPorts, PciEcam
    from devices.ports import NamedRegisters
    from devices.rtc_mc146818 import RtcMc146818
    from devices.uart16550 import Uart16550
    from devices.vmgenid import VmGenId
    from hypervisor.bus import Bus, Claim
    from hypervisor.console import Console
    from hypervisor.eventloop import EventLoop, LoopAlarm
    from hypervisor.kvm import ByteRing, Vm
    from hypervisor.kvm.handles import IrqInput
    from hypervisor.memory import GuestMemory
    from hypervisor.virtio import VirtioBoard

UART_THR = 0
UART_LSR = 5


class StatefulDevice(Device, Stateful, Protocol):
    """A device that can be saved."""


class TimedDevice(Device, Protocol):
    """A device that has an alarm."""

    def on_alarm(self) -> None:
        """Do what is due."""


D = TypeVar("D", bound=Device)
S = TypeVar("S", bound=StatefulDevice)
T = TypeVar("T", bound=TimedDevice)


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

    def forget(self) -> None:
        """Have no level to forget."""


class LazyDevice(Generic[D]):
    """A device that is made, and its module imported, when it is first touched: most guests never touch most of a PC.

    Its claim's lock is held whenever it is made or used, so it is made once.

    Attributes:
        claim: the claim that shall call the device itself once it is made; None keeps this object in between.
        on_unmade: called when the device has gone, to take back what it did to what it is wired to.
        views: others that lead to the same device, and lose it with this one.
    """

    def __init__(self, make: Callable[[], D], names: Callable[[], object], offset: int = 0) -> None:
        """Wait for the guest.

        Args:
            make: makes the device.
            names: returns what has the names of its registers whether it is made or not (`devices.ports`), without a
                trace on the machine: the guest may be in its first access, or a reset have taken the device away.
            offset: this claim's first address is the device's `offset`.
        """
        self._make = make
        self._names = names
        self._offset = offset
        self._device: D | None = None
        self.claim: Claim | None = None
        self.on_unmade: Callable[[], None] = lambda: None
        self.views: list[LazyDevice[Any]] = []

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

    def unmake(self) -> None:
        """Be as if nobody had ever touched the device: the next access makes a new one."""
        if self._device is None:
            return
        self._device = None
        if self.claim is not None:
            self.claim.read = self.read
            self.claim.write = self.write
        for view in self.views:
            view.unmake()
        self.on_unmade()

    def state(self: LazyDevice[S]) -> dict[str, Any] | None:
        """Return the device's state; None as long as it is not made."""
        return None if self._device is None else self._device.state()

    def load(self: LazyDevice[S], state: Mapping[str, Any] | None) -> None:
        """Be in a state: with None there is no device."""
        if state is None:
            self.unmake()
            return
        was_made = self.is_made
        try:
            self.device.load(state)
        except BaseException:
            if not was_made:
                self.unmake()
            raise

    def read(self, offset: int, size: int) -> int:
        """Read the device."""
        return self.device.read(self._offset + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the device."""
        self.device.write(self._offset + offset, size, value)

    def register_name(self, offset: int, *, write: bool) -> str:
        """Return the device's name of a register. Asking does not make the device: the guest could tell."""
        return name_in(self._names(), self._offset + offset, write=write)

    def inner(self, offset: int) -> tuple[str, NamedRegisters, int] | None:
        """Return who is at `offset` if the device is a window."""
        return inner_of(self._names(), self._offset + offset)


class Part(NamedTuple):
    """What has a state: the claim whose lock guards it, who holds it, and the interrupt line that it drives."""

    claim: Claim
    lazy: LazyDevice[Any]
    irq: IrqInput | NoIrq


class Pc:
    """The devices of one machine, claimed on its buses."""

    def __init__(  # noqa: PLR0913 - what a board is wired to
        self,
        *,
        vm: Vm,
        ports: Bus,
        memory_bus: Bus,
        loop: EventLoop,
        irq: Callable[[int], IrqInput | NoIrq],
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
        self._parts: dict[str, Part] = {}
        self._consoles = {"console": console, "debug-console": debug_console}
        self._irq = irq
        self._memory = memory
        self._add_uart(irq(layout.IRQ_COM1), console, vm.connect_ring(console_ring), is_polled)
        debug_fast = PortFastPath(vm, layout.DEBUG_CONSOLE, vm.connect_ring(debug_ring))
        ports.claim(layout.DEBUG_CONSOLE, 1, DebugConsole(ConsoleSink(debug_console), fast=debug_fast), "debugcon")
        ports.claim(layout.DEBUG_EXIT, 4, DebugExit(on_exit), "debug-exit")
        self._add_i8042(irq(layout.IRQ_KEYBOARD), on_reset)
        self._add_rtc(irq(layout.IRQ_RTC), memory)
        self._add_acpi(irq(layout.IRQ_SCI), on_power_off)
        self._add_fw_cfg(cpus, memory)
        self._add_pci(memory_bus, on_reset, virtio)

    def _add_uart(self, irq: IrqInput | NoIrq, console: Console, ring: int, is_polled: Callable[[int], bool]) -> None:
        fast = PortFastPath(self._vm, layout.COM1, ring)

        def kind() -> type[Uart16550]:
            from devices.uart16550 import Uart16550

            return Uart16550

        def make() -> Uart16550:
            from devices.events import EventLog

            uart = kind()(irq=irq, sink=ConsoleSink(console), fast=fast, log=EventLog(device="uart0"))
            uart.on_room = lambda: console.transfer(uart.receive)
            return uart

        def take_back() -> None:
            fast.publish(UART_LSR, None)
            fast.divert(UART_THR, to_sink=False)

        uart = LazyDevice(make, kind)
        claim = uart.claim = self._ports.claim(layout.COM1, 8, uart, "uart0")
        uart.on_unmade = take_back
        self._add_part(claim, uart, irq)

        def deliver() -> None:
            with claim.lock:
                console.transfer(uart.device.receive)

        console.deliver = deliver
        console.ready = lambda: uart.is_made and (uart.device.listening or is_polled(layout.COM1 + UART_LSR))

    def _add_part(self, claim: Claim, lazy: LazyDevice[S], irq: IrqInput | NoIrq | None = None) -> None:
        """Count `lazy` among what is saved, under the claim's name."""
        self._parts[claim.name] = Part(claim, lazy, NoIrq() if irq is None else irq)

    def _alarm(self, claim: Claim, timed: LazyDevice[T]) -> LoopAlarm:
        """Return the alarm of a device, which is called under the claim's lock, if it is still there."""

        def fire() -> None:
            with claim.lock:
                if timed.is_made:
                    timed.device.on_alarm()

        alarm = self._loop.alarm(fire)
        timed.on_unmade = lambda: alarm.set(None)
        return alarm

    def _add_i8042(self, irq: IrqInput | NoIrq, on_reset: Callable[[], None]) -> None:
        def kind() -> type[I8042]:
            from devices.i8042 import I8042

            return I8042

        data = LazyDevice(lambda: kind()(on_reset, irq=irq), kind)
        # one device at two ports: the second view shares the first one's device and lock
        command = LazyDevice(lambda: data.device, kind, offset=layout.I8042_COMMAND - layout.I8042_DATA)
        data.views.append(command)
        claim = self._ports.claim(layout.I8042_DATA, 1, data, "i8042")
        self._ports.claim(layout.I8042_COMMAND, 1, command, "i8042", lock=claim.lock)
        self._add_part(claim, data, irq)

    def _add_rtc(self, irq: IrqInput | NoIrq, memory: GuestMemory) -> None:
        def kind() -> type[RtcMc146818]:
            from devices.rtc_mc146818 import RtcMc146818

            return RtcMc146818

        def make() -> RtcMc146818:
            return kind()(
                irq=irq,
                alarm=alarm,
                now_ns=time.monotonic_ns,
                wall_seconds=time.time,
                ram_below_4g=memory.ranges[0].size,
                ram_above_4g=sum(ram.size for ram in memory.ranges[1:]),
            )

        rtc = LazyDevice(make, kind)
        claim = self._ports.claim(layout.RTC, 2, rtc, "rtc")
        alarm = self._alarm(claim, rtc)
        self._add_part(claim, rtc, irq)

    def _add_acpi(self, irq: IrqInput | NoIrq, on_power_off: Callable[[], None]) -> None:
        def kind() -> type[AcpiPm]:
            from devices.acpi_pm import AcpiPm

            return AcpiPm

        def make() -> AcpiPm:
            return kind()(
                irq=irq,
                alarm=alarm,
                now_ns=time.monotonic_ns,
                on_power_off=on_power_off,
            )

        self._pm = LazyDevice(make, kind)
        self._pm_claim = self._pm.claim = self._ports.claim(layout.PM1_EVENT, 12, self._pm, "acpi-pm")
        alarm = self._alarm(self._pm_claim, self._pm)
        self._add_part(self._pm_claim, self._pm, irq)

    def _add_fw_cfg(self, cpus: int, memory: GuestMemory) -> None:
        def kind() -> type[FwCfg]:
            from devices.fw_cfg import FwCfg

            return FwCfg

        fw_cfg = LazyDevice(lambda: kind()(cpus=cpus, ram_bytes=memory.size, files={}), kind)
        self._add_part(self._ports.claim(layout.FW_CFG, 2, fw_cfg, "fw_cfg"), fw_cfg)

    def _add_pci(self, memory_bus: Bus, on_reset: Callable[[], None], virtio: VirtioBoard | None) -> None:
        def kind() -> type[PciConfigPorts]:
            from devices.pci import PciConfigPorts

            return PciConfigPorts

        def ecam_of(bus: PciBus | None) -> PciEcam:
            from devices.pci import PciBus, PciEcam

            return PciEcam(PciBus() if bus is None else bus)

        bus = None if virtio is None else virtio.pci
        pci = LazyDevice(lambda: kind()(bus, on_reset=on_reset), kind)
        ecam = LazyDevice(lambda: ecam_of(pci.device.bus), lambda: ecam_of(bus))
        pci.views.append(ecam)
        lock = None if virtio is None else virtio.pci_lock
        claim = self._ports.claim(layout.PCI_CONFIG, 8, pci, "pci", lock=lock)
        memory_bus.claim(layout.PCI_ECAM, layout.PCI_ECAM_SIZE, ecam, "pci-ecam", lock=claim.lock)
        self._add_part(claim, pci)

    def press_power_button(self) -> bool:
        """Ask the guest to power off; return whether it has enabled the button's event."""
        with self._pm_claim.lock:
            return self._pm.device.press_power_button()

    # --- saved and loaded ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state of every device and console by name, None of a device that the guest has not touched.

        No vCPU runs, and this is the loop's thread. What the guest has printed goes to the host first. The functions
        on the PCI bus are not among them.
        """
        states: dict[str, Any] = {}
        for name, part in self._parts.items():
            with part.claim.lock:
                states[name] = part.lazy.state()
        return states | {name: console.state() for name, console in self._consoles.items()}

    def load(self, states: Mapping[str, Any]) -> None:
        """Put every device and console into the state that `state` returned, here or in another machine.

        No vCPU runs, and this is the loop's thread, if it runs. The interrupt controllers' state is loaded later.

        Raises:
            KeyError, TypeError, ValueError: a state is not one of this machine. Devices before it have been loaded.
        """
        wrong = states.keys() ^ (self._parts.keys() | self._consoles.keys())
        if wrong:
            raise ValueError(f"devices that the state has and the machine has not, or the reverse: {sorted(wrong)}")
        for name, part in self._parts.items():
            with part.claim.lock:
                part.irq.forget()
                part.lazy.load(states[name])
                if not part.lazy.is_made:
                    part.irq.set(False)
        for name, console in self._consoles.items():
            console.load(states[name])

    @property
    def vmgenid(self) -> VmGenId:
        """The machine's generation identifier, of which the ACPI tables tell."""
        from devices.vmgenid import VmGenId

        return VmGenId(ram=self._memory, gpa=layout.VMGENID, irq=self._irq(layout.IRQ_EVENT))

"""The composition root: builds a machine from its description, wires it, freezes it, runs it."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, TypeVar

from hypervisor import cpuid, layout
from hypervisor.boot.acpi import build_tables
from hypervisor.boot.mptable import build_mptable
from hypervisor.bus import Bus
from hypervisor.clock import Clock
from hypervisor.console import Console
from hypervisor.errors import ConfigError, HostError
from hypervisor.eventloop import EventLoop
from hypervisor.host import is_software_kvm
from hypervisor.images import plan_boot
from hypervisor.kvm import ByteRing, Kvm
from hypervisor.kvm.handles import host_address
from hypervisor.memory import GuestMemory
from hypervisor.moments import Moments
from hypervisor.observed import Observed
from hypervisor.outcome import Outcome, Stop
from hypervisor.pc import NoIrq, Pc
from hypervisor.reset import apply_entry, reset_vcpu
from hypervisor.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from devices.backends.faults import FaultyImage
    from devices.virtio.balloon import Balloon
    from devices.virtio.device import VirtioDevice
    from hypervisor.config import MachineConfig
    from hypervisor.control import Control
    from hypervisor.kvm.handles import IrqInput
    from hypervisor.profile.live import LiveExits
    from hypervisor.profile.recording import Recording
    from hypervisor.requests import Requests
    from hypervisor.snapshot.origin import Origin

T = TypeVar("T")

STOP_SECONDS: Final = 10.0
AFTER_PANIC: Final = {Stop.RESET, Stop.POWER_OFF, Stop.HALTED, Stop.TRIPLE_FAULT}
"""What a kernel may do after it has panicked, and is not to be blamed on anything else."""


class Machine(Moments, Observed):
    """A virtual machine: built by its constructor, running from `start` until its outcome.

    Devices may be added to `bus_pio` and `bus_mmio` before `start`. A context manager: leaving it ends the guest and
    gives everything back. Methods may be called from any thread.

    Attributes:
        config: what it was built from.
        memory: guest RAM.
        vcpus: the vCPUs, by index.
        console: the first serial port.
        debug_console: what the guest writes to port 0xe9.
        bus_pio, bus_mmio: who answers which port and address.
        devices: the virtio devices' models by name, such as "blk0"; `balloon` is the memory balloon, if there is one.
        boot_plan: what was loaded where.
        on_start: called by `start` before anything moves; what it raises, `start` raises.
        profile_trouble: what is wrong with the profile that was recorded; empty when nothing is, or none was.
    """

    def __init__(self, config: MachineConfig, *, origin: Origin | None = None) -> None:
        """Build the machine: one that boots a kernel, or one that shall go on from `origin`, see `load`.

        Raises:
            ConfigError: the description cannot be met (ImageError: because of a file).
            HostError: the host lacks something (KvmError: the kernel refused an ioctl).
        """
        self.config = config
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._outcome: Outcome | None = None
        self._started = False
        self._is_paused = self._is_closed = False
        self._still = threading.RLock()  # who pauses, and who goes on
        self._clock: Clock | None = None
        self._live: LiveExits | None = None
        self._recording: Recording | None = None
        self._control: Control | None = None
        self._served: Requests | None = None
        self.profile_trouble = ""
        self._software_kvm = is_software_kvm()
        cpuid.parse(config.cpu)  # the user's mistakes before the host's
        self.boot_plan, self._symbols = plan_boot(config) if origin is None else origin.plan()
        self._origin = origin
        self._is_copy = self._is_held = False
        self._since = (None, None)
        self.on_start: Callable[[], None] = lambda: None
        with ExitStack() as stack:
            self.memory = GuestMemory(config.ram_mib * layout.MIB, None if origin is None else origin.content)
            stack.callback(self.memory.close)
            kvm = stack.enter_context(Kvm())
            self._kvm = kvm
            self._refuse_linux_on_software_kvm()
            self._vm = kvm.create_vm()
            stack.callback(self._vm.close)
            self.bus_pio = Bus("port", 1 << 16)
            self.bus_mmio = Bus("memory", 1 << 52)
            self.loop = EventLoop(on_fault=lambda error: self._end(Outcome.fault(error)))
            stack.callback(self.loop.close)
            self._build_vm(kvm)
            self._build_devices(stack)
            if origin is None:
                self._load()
            self._stack = stack.pop_all()

    # --- building -----------------------------------------------------------------------------------------------------

    def _refuse_linux_on_software_kvm(self) -> None:
        if self.boot_plan.is_linux and not self.config.force and self._software_kvm:
            raise HostError(
                "this host's KVM is a software one (kvm_pvm): it cannot run a Linux kernel",
                hint="scripts/boot-linux boots one in the emulated host, scripts/emulated-host runs any command there;"
                " --force tries it here all the same",
            )

    def _build_vm(self, kvm: Kvm) -> None:
        config, vm = self.config, self._vm
        if config.cpus > (most := kvm.max_vcpus()):
            raise ConfigError(f"cpus is {config.cpus}", hint=f"this host's KVM allows {most} vCPUs")
        vm.set_intel_pages(layout.TSS, layout.IDENTITY_MAP)
        base = host_address(self.memory.buffer) + self.memory.offset
        for slot, ram in enumerate(self.memory.ranges):
            vm.set_memory(slot, ram.gpa, ram.size, base + ram.offset)
        if config.irqchip == "kernel":  # after the memory: KVM would wait for an RCU grace period the other way round
            vm.create_irqchip()
            vm.create_pit()
        tables = None if self._origin is not None else self._cpuid_tables(kvm)
        self.vcpus: list[Vcpu] = []
        for index in range(config.cpus):
            handle = vm.create_vcpu(index)
            if tables is not None:  # else `load` sets everything
                handle.set_cpuid(tables[index])
                reset_vcpu(handle, has_lapic=config.irqchip == "kernel")
            self.vcpus.append(Vcpu(handle, self.bus_pio, self.bus_mmio, self._end))
        if self.boot_plan.entry is not None:
            apply_entry(self.vcpus[0].handle, self.boot_plan.entry)

    def _cpuid_tables(self, kvm: Kvm) -> list[list[cpuid.Entry]]:
        """Return what the CPUID instruction answers on each vCPU."""
        config = self.config
        has_lapic = config.irqchip == "kernel"
        supported = kvm.supported_cpuid()
        return [
            cpuid.build(
                supported,
                vcpu=index,
                cpus=config.cpus,
                spec=config.cpu if has_lapic else f"{config.cpu},-x2apic",
                software_kvm=self._software_kvm,
                tsc_deadline=has_lapic,
            )
            for index in range(config.cpus)
        ]

    def _build_devices(self, stack: ExitStack) -> None:
        rings = []
        for _ in range(2):
            rings.append(ByteRing())
            stack.callback(rings[-1].close)
        self.console = Console(rings[0], self.loop)
        self.debug_console = Console(rings[1], self.loop)
        self.console.on_panic = lambda words: self._end(Outcome(Stop.PANIC, message=f"kernel panic: {words}"))
        self._virtio = None
        if self.config.virtio_count:
            from hypervisor.virtio import VirtioBoard  # noqa: PLC0415 - most small guests have none

            self._virtio = VirtioBoard(
                config=self.config,
                vm=self._vm,
                loop=self.loop,
                memory=self.memory,
                on_fault=lambda error: self._end(Outcome.fault(error)),
                open_disk=None if self._origin is None else self._origin.open_disk,
            )
            stack.callback(self._virtio.close)
            self._virtio.claim(self.bus_mmio)
        has_irqs = self.config.irqchip == "kernel"

        def irq(gsi: int) -> IrqInput | NoIrq:
            return self._vm.irq_input(gsi) if has_irqs else NoIrq()

        self._pc = Pc(
            vm=self._vm,
            ports=self.bus_pio,
            memory_bus=self.bus_mmio,
            loop=self.loop,
            irq=irq,
            console=self.console,
            console_ring=rings[0],
            debug_console=self.debug_console,
            debug_ring=rings[1],
            cpus=self.config.cpus,
            memory=self.memory,
            on_exit=self._guest_exit,
            on_reset=lambda: self._end(Outcome(Stop.RESET)),
            on_power_off=lambda: self._end(Outcome(Stop.POWER_OFF)),
            is_polled=lambda port: any(vcpu.is_polling(port) for vcpu in self.vcpus),
            virtio=self._virtio,
        )

    def _load(self) -> None:
        memory = self.memory
        cpus = self.config.cpus
        if memory.size >= layout.HIGH_MEMORY:
            tables = build_tables(
                cpus=cpus,
                s5_sleep_type=layout.S5_SLEEP_TYPE,
                i8042=False,
                pci_devices=self.config.virtio_count if self.config.virtio == "pci" else 0,
                virtio_mmio=self.config.virtio_mmio_places,
            )
            memory.write(layout.ACPI_TABLES, tables)
            memory.write(layout.VMGENID, os.urandom(16))
            for gpa, table in build_mptable(cpus=cpus):
                memory.write(gpa, table)
        for segment in self.boot_plan.segments:
            memory.write(segment.gpa, segment.data)

    # --- running ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the vCPUs; returns at once."""
        self.on_start()
        with self._lock:
            if self._started:
                raise ConfigError("the machine has been started already")
            self._started = True
        for claim in self.bus_pio.freeze():
            self._vm.claim_ports(claim.base, claim.end - claim.base)
        self._vm.claim_windows([(claim.base, claim.end) for claim in self.bus_mmio.freeze()])
        self._clock = Clock(self.vcpus[0].handle.tsc_khz())
        if self._recording is not None:
            self._recording.begin(self._exits())
        if self._origin is not None and self._virtio is not None:
            self.loop.start()
            self.loop.run(self._virtio.resume)
        if self._is_copy:
            self._become_another()
        with self._still:  # `end_wholly` waits for all of them or none
            for vcpu in self.vcpus:
                vcpu.start()
            self.loop.start()  # last: it takes as long as all that a vCPU needs to its first instruction

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end of the run and return how it came.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: the machine still runs.
            Exception: whatever a device model or the VMM itself failed with, as it was raised.
        """
        if not self._started:
            raise ConfigError("the machine has not been started")
        if not self._done.wait(timeout):
            raise TimeoutError(f"the machine still runs after {timeout:g} s")
        outcome = self._settle()
        if outcome.reason is Stop.FAULT and outcome.error is not None:
            raise outcome.error
        return outcome

    def run(self, timeout: float | None = None) -> Outcome:
        """Start the machine and wait for its end: `start`, then `wait`."""
        self.start()
        return self.wait(timeout)

    def stop(self, timeout: float = STOP_SECONDS) -> Outcome:
        """Ask the guest to power off, as its power button would; end it when it has not after `timeout` seconds."""
        self.press_power_button()
        try:
            return self.wait(timeout)
        except TimeoutError:
            return self.kill()

    def press_power_button(self) -> bool:
        """Ask the guest to power off, and return whether it listens (what it does is its own business)."""
        return self._pc.press_power_button()

    def kill(self, outcome: Outcome | None = None) -> Outcome:
        """End the guest where it is; `outcome` says why, by default Stop.KILLED with status 137."""
        self._end(outcome or Outcome(Stop.KILLED, status=137))
        return self._settle()

    def end(self, outcome: Outcome) -> None:
        """Make `outcome` the machine's end unless it has one; returns at once. For devices and signal handlers."""
        self._end(outcome)

    def end_wholly(self, outcome: Outcome) -> None:
        """Do as `end`, and return when neither a vCPU nor a thread of a device touches memory any more."""
        self._end(outcome)
        with self._still:
            for vcpu in self.vcpus:
                vcpu.join()
            if self._virtio is not None:
                self._virtio.stop()

    def pause(self) -> None:
        """Stop all vCPUs between two instructions; returns when they stand still."""
        with self._still:
            self._is_paused = True
            for vcpu in self.vcpus:
                vcpu.request_pause()
            for vcpu in self.vcpus:
                vcpu.wait_parked()

    def resume(self) -> None:
        """Let the vCPUs go on after `pause`."""
        with self._still:
            self._is_paused = False
            for vcpu in self.vcpus:
                vcpu.resume()

    @property
    def is_paused(self) -> bool:
        """Whether `pause` was called last, and not `resume`."""
        return self._is_paused

    @property
    def devices(self) -> dict[str, VirtioDevice]:
        """The virtio devices' models, by name."""
        return {} if self._virtio is None else self._virtio.devices

    @property
    def images(self) -> dict[str, FaultyImage]:
        """The disks' images by the names of their devices; they fail in the ways that one tells them to."""
        return {} if self._virtio is None else self._virtio.images

    @property
    def balloon(self) -> Balloon | None:
        """The memory balloon."""
        return None if self._virtio is None else self._virtio.balloon

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended, None while it goes on."""
        return self._outcome if self._done.is_set() else None

    def at_close(self, callback: Callable[[], object]) -> None:
        """Have `callback` called by `close`, at its end."""
        self._stack.callback(callback)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """End the guest if it runs and give back memory, descriptors and threads."""
        self._is_closed = True
        self.forget_changes()
        if self._started:
            self.kill()
        if self._recording is not None:
            self._recording.close()
        self._answer_last()
        with self._still:
            for vcpu in self.vcpus:
                vcpu.join()
            if self._virtio is not None:
                self._virtio.stop()
        self.loop.close()
        if self._control is not None:
            self._control.close()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- ending -------------------------------------------------------------------------------------------------------

    def _guest_exit(self, value: int) -> None:
        status = (value << 1 | 1 if self.config.debug_exit == "qemu" else value) & 0xFF
        self._end(Outcome(Stop.GUEST_EXIT, status=status, message=f"the guest ended the run with status {status}"))

    def _end(self, outcome: Outcome) -> None:
        with self._lock:
            if self._outcome is None:
                self._outcome = outcome
        for vcpu in self.vcpus:
            vcpu.request_end()
        self._done.set()

    def _finish_recording(self, outcome: Outcome) -> None:
        with self._lock:
            recording, self._recording = self._recording, None
        if recording is not None:
            self.profile_trouble = recording.finish(outcome.reason.name)

    def _settle(self) -> Outcome:
        """Let the vCPUs come to rest, then complete the outcome."""
        outcome = self._outcome
        if outcome is None:
            raise ConfigError("the machine has no outcome yet")
        for vcpu in self.vcpus:
            vcpu.join()
        if self._clock is not None:
            self._clock.stop()
        self.console.end()
        self.debug_console.end()
        self._finish_recording(outcome)
        with self._lock:
            if outcome.reason in AFTER_PANIC and self.console.panic is not None:
                self._outcome = outcome = Outcome(Stop.PANIC, message=f"kernel panic: {self.console.panic}")
            if outcome.death is not None and not outcome.detail:
                from hypervisor.postmortem import explain  # noqa: PLC0415 - only a death needs a disassembler

                explain(outcome, self.memory, self.boot_plan, self._symbols, software_kvm=self._software_kvm)
        return outcome

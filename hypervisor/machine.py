"""The composition root: builds a machine from its description, wires it, freezes it, runs it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, TypeVar

from hypervisor import cpuid, layout
from hypervisor.boot.acpi import build_tables
from hypervisor.boot.mptable import build_mptable
from hypervisor.bus import Bus
from hypervisor.clock import Clock
from hypervisor.console import Console
from hypervisor.errors import ConfigError, HostError, SnapshotError
from hypervisor.eventloop import EventLoop
from hypervisor.host import is_software_kvm
from hypervisor.images import plan_boot
from hypervisor.kvm import ByteRing, Kvm
from hypervisor.kvm.handles import host_address
from hypervisor.memory import GuestMemory
from hypervisor.outcome import Outcome, Stop
from hypervisor.pc import NoIrq, Pc
from hypervisor.reset import apply_entry, reset_vcpu
from hypervisor.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from devices.backends.faults import FaultyImage
    from devices.virtio.balloon import Balloon
    from devices.virtio.device import VirtioDevice
    from hypervisor.config import MachineConfig
    from hypervisor.control import Control
    from hypervisor.kvm.dirty import Dirty
    from hypervisor.kvm.handles import IrqInput, Vm
    from hypervisor.profile.exits import Exits
    from hypervisor.profile.live import LiveExits
    from hypervisor.profile.model import Profile
    from hypervisor.profile.recording import Recording
    from hypervisor.requests import Requests
    from hypervisor.snapshot.checkpoint import Checkpoint
    from hypervisor.snapshot.origin import Origin
    from hypervisor.snapshot.store import Snapshot

T = TypeVar("T")

STOP_SECONDS: Final = 10.0
MOST_EVERY: Final = (1 << 32) - 1
GIVEN_AWAY: Final = {Stop.MIGRATED, Stop.SUSPENDED}
AFTER_PANIC: Final = {Stop.RESET, Stop.POWER_OFF, Stop.HALTED, Stop.TRIPLE_FAULT}
"""What a kernel may do after it has panicked, and is not to be blamed on anything else."""


class Machine:
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
        self._is_copy = False
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
        self.loop.start()
        if self._origin is not None and self._virtio is not None:
            self.loop.run(self._virtio.resume)
        if self._is_copy:
            self._become_another()
        for vcpu in self.vcpus:
            vcpu.start()

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

    # --- its state ----------------------------------------------------------------------------------------------------

    def stand_still(self, function: Callable[[], T]) -> T:
        """Return what `function` does while nothing moves: no vCPU, no queue of a device, no timer, no input.

        It runs in the event loop's thread. A machine that was paused before stays so.

        Raises:
            SnapshotError: the machine has ended.
        """
        with self._still:
            was_paused = self._is_paused
            if self._started:
                self.pause()
            try:
                if self._outcome is not None:
                    raise SnapshotError("the machine has ended", hint=f"{self._outcome.message}")
                return self.loop.run(lambda: self._without_devices(function))
            finally:
                if not was_paused and self._started:
                    self.resume()

    def _without_devices(self, function: Callable[[], T], *, resume: bool = False) -> T:
        self.console.pump()
        self.debug_console.pump()
        if self._virtio is None or not self._started:
            return function()
        self._virtio.quiesce()
        try:
            return function()
        finally:
            if resume or self._outcome is None:  # what was given away must not touch its disks any more
                self._virtio.resume()

    def go_back(self, function: Callable[[], T], *, revive: bool = True) -> T:
        """Do as `stand_still`, for a `function` that puts the machine where it was; one that has ended lives again.

        Args:
            function: what to do.
            revive: False: one that has ended stays so.

        Raises:
            SnapshotError: the machine was closed, or failed by a fault of the VMM.
        """
        with self._still:
            if self._outcome is None:
                return self.stand_still(function)
            if self.is_closed or self._outcome.reason is Stop.FAULT:
                raise SnapshotError("the machine cannot go back: it has failed or was closed")
            self._settle()
            result = self.loop.run(lambda: self._without_devices(function, resume=revive))
            if revive:
                self._revive()
            return result

    def _revive(self) -> None:
        """Go on after an end; the state is that of a time before."""
        with self._lock:
            self._outcome = None
            self._done.clear()
        self._clock = Clock(self.vcpus[0].handle.tsc_khz())
        self._live = None
        for vcpu in self.vcpus:
            vcpu.revive(paused=self._is_paused)

    def checkpoint(self) -> Checkpoint:
        """Take this moment, to bring the machine back to it in place with `Checkpoint.reset`, as often as one likes.

        From here on KVM logs which pages change, and writes to disks are kept in memory. A machine has one checkpoint
        at a time.

        Raises:
            SnapshotError: the machine has ended, or has one already.
            HostError: the host does not give the memory for it: as much as the guest uses.
        """
        from hypervisor.snapshot.checkpoint import Checkpoint  # noqa: PLC0415 - for those who want one

        if self.memory.is_tracked:
            raise SnapshotError("the machine has a checkpoint, or is being moved", hint="close the checkpoint first")
        return Checkpoint(self)

    def capture(self) -> dict[str, Any]:
        """Return all of its state but RAM and disks, as plain values; for a `function` of `stand_still`."""
        from hypervisor.kvm.state import save, to_plain  # noqa: PLC0415 - for those who save

        return {
            "booted": self._booted(),
            "kvm": to_plain(save(self._vm, self.msr_indices())),
            **self.device_states(),
        }

    @property
    def vm(self) -> Vm:
        """The handle of its VM."""
        return self._vm

    def msr_indices(self) -> list[int]:
        """Return the MSRs that make up a vCPU's state on this host."""
        return self._kvm.msr_indices()

    def device_states(self) -> dict[str, Any]:
        """Return the state of all device models, as plain values; for a `function` of `stand_still`."""
        return {"devices": self._pc.state(), "virtio": {} if self._virtio is None else self._virtio.state()}

    def load_devices(self, state: Mapping[str, Any]) -> None:
        """Put all device models into a state of `device_states`; raises KeyError, TypeError or ValueError."""
        self._pc.load(state["devices"])
        if self._virtio is not None:
            self._virtio.load(state["virtio"])

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        compress: bool = False,
        suspend: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Save the machine to a directory, a snapshot; the guest stands still meanwhile.

        Args:
            path: of the directory; a snapshot that is there already is replaced, as a whole.
            base: another snapshot of it: only what has changed since is saved, and the other is needed to restore.
            compress: the memory.
            suspend: end the machine then, and do not copy its disks: it goes on with them as they are.
            progress: called now and then with bytes of memory done, and all of them.

        Raises:
            SnapshotError: there is something else at `path`, `base` is none of this machine, or it has ended.
            HostError: the host does not take it (SaveError); what was at `path` is as it was.
        """
        from hypervisor.snapshot.machines import save  # noqa: PLC0415 - for those who save

        save(self, path, base=base, compress=compress, suspend=suspend, progress=progress)

    @classmethod
    def restore(
        cls,
        snapshot: str | os.PathLike[str] | Snapshot,
        *,
        clone: bool = False,
        verify: bool = True,
        advance: bool = False,
        **changes: Any,
    ) -> Self:
        """Return a machine that goes on from a snapshot when it is started. Memory is read as the guest touches it.

        Args:
            snapshot: its directory, or one that is open.
            clone: make a machine that can run beside others from the same snapshot: network addresses, the vsock
                device's address and the generation identifier are new, sockets and files of ports and captures get
                names of their own, and what it writes to disks is kept in memory.
            verify: compare memory and disks with their hashes first.
            advance: let the guest's clocks be where they would be had it run all the while.
            changes: values of its description that are others now, such as paths; the same devices must be there.

        Raises:
            SnapshotError: it is damaged, of another version, not of such a machine, or does not run on this host.
            ConfigError, HostError: as the constructor.
        """
        from hypervisor.snapshot.machines import apart, origin_of  # noqa: PLC0415 - for those who restore
        from hypervisor.snapshot.store import Snapshot  # noqa: PLC0415 - the same

        with ExitStack() as stack:
            if not isinstance(snapshot, Snapshot):
                snapshot = stack.enter_context(Snapshot.open(snapshot))
            config = snapshot.config
            config = config.replace(**(apart(config) if clone else {}) | changes)
            origin = origin_of(snapshot, clone=clone, verify=verify)
            try:
                machine = cls(config, origin=origin)
            finally:
                if origin.content is not None:
                    os.close(origin.content.fd)
            try:
                machine.load(snapshot.state, advance=advance)
            except BaseException:
                machine.close()
                raise
        machine._is_copy = clone
        return machine

    def save_disks(self, folder: str, *, mode: str) -> dict[str, Any]:
        """Save every disk, see `VirtioBoard.save_disks`; for a `function` of `stand_still`."""
        return {} if self._virtio is None else self._virtio.save_disks(folder, mode=mode)

    def _become_another(self) -> None:
        """Tell the guest that it is a copy: new network addresses, vsock address and generation identifier.

        What its programs made of the old ones, such as a machine id, is theirs to make anew.
        """
        if self._virtio is not None:
            self._virtio.renew_addresses()
        self._pc.vmgenid.renew()

    def describe(self) -> dict[str, Any]:
        """Return what another process needs to build a machine that can take this one's state, as plain values."""
        from hypervisor.kvm.vcpu_state import read_cpuid  # noqa: PLC0415 - for those who move a machine

        boot = self.vcpus[0]
        table = boot.call(lambda: read_cpuid(boot.handle.fileno()))
        return {"config": self.config.to_plain(), "cpuid": [list(row) for row in table], "booted": self._booted()}

    def log_changes(self) -> Dirty:
        """Begin to log which pages of RAM change, whoever writes them; until it is closed."""
        from hypervisor.kvm.dirty import Dirty  # noqa: PLC0415 - for those who move a machine

        return Dirty(self._vm, self.memory.marks)

    def _booted(self) -> dict[str, Any]:
        plan = self.boot_plan
        symbols = self._symbols
        if symbols is None and plan.symbols is not None and isinstance(self.config.kernel, str | os.PathLike):
            symbols = os.path.abspath(self.config.kernel)
        return {"kind": plan.kind, "is_linux": plan.is_linux, "release": plan.release, "symbols": symbols}

    def load(self, state: Mapping[str, Any], *, advance: bool = False) -> None:
        """Put the machine into a state that `capture` returned, here or elsewhere; its RAM is there already.

        For a machine made from an Origin before `start`, or a `function` of `stand_still`.

        Args:
            state: of a machine with the same description.
            advance: let the guest's clocks be where they would be had it run all the while.

        Raises:
            SnapshotError: the state is not one of such a machine.
            HostError: this host lacks something that the guest uses.
        """
        from hypervisor.kvm.state import from_plain, load  # noqa: PLC0415 - for those who load

        try:
            self.load_devices(state)
            load(self._vm, from_plain(state["kvm"]), advance=advance)  # last: the lines that the devices drive are set
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise SnapshotError(f"the state is not one of this machine: {type(error).__name__}: {error}") from error

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

    # --- what its exits were ------------------------------------------------------------------------------------------

    @property
    def exits(self) -> Exits:
        """All exits up to now, as a value to query: `machine.exits.pio("uart0").count`.

        It may be asked from the start on, also after `close`.
        """
        return self._exits().exits()

    def _exits(self) -> LiveExits:
        from hypervisor.profile.live import LiveExits  # noqa: PLC0415 - for those who look

        with self._lock:
            if self._clock is None:
                raise ConfigError("the machine has not been started", hint="its exits are counted from then on")
            if self._live is None:
                self._live = LiveExits(self.vcpus, self.bus_pio, self.bus_mmio, self._clock)
            return self._live

    def profile(self) -> Profile:
        """Return where the time went up to now, as reports read it: all that `exits` has, and each vCPU's times."""
        from hypervisor.profile.live import profile_of  # noqa: PLC0415 - for those who look

        return profile_of(self._exits(), self._vm, self._facts())

    def mark(self, name: str) -> bool:
        """Give this moment a name, for `exits.between`; returns False when there are too many marks already."""
        return self._exits().mark(name)

    def mark_by_port(self, port: int) -> None:
        """Let the guest make marks by writing bytes to a port, each called by its decimal value; before `start`."""
        from devices.mark_port import MarkPort  # noqa: PLC0415 - for those who ask

        self.bus_pio.claim(port, 1, MarkPort(lambda value: self.mark(str(value))), "marks")

    def mark_by_text(self, pattern: str) -> None:
        """Make a mark whenever a line of the console matches a regular expression; before `start`.

        It is called what the first group matched, or the whole match without groups.

        Raises:
            ConfigError: it is no regular expression.
        """
        from hypervisor.profile.live import TextMarks  # noqa: PLC0415 - for those who ask

        self.console.listeners.append(TextMarks(pattern, self.mark).take)

    def record(self, path: str, *, every: int = 1, trace: bool = True, kernel: bool = True) -> None:
        """Write a profile to a file while the machine runs; `hypervisor.profile.file.load` reads it. Before `start`.

        Args:
            path: of the file.
            every: sample the place (RIP, CR3) of one exit in so many; 0: of none. It is the instruction that left the
                guest, but after a write that KVM has done already the one behind it: always of memory, of ports on a
                software KVM.
            trace: False: write counts and histograms only, not every single exit.
            kernel: False: do not have the exits counted that KVM handles itself. Where the host allows that (root,
                tracefs) it costs each exit of the guest, those too, two calls of a small program in the host's kernel.

        Raises:
            ConfigError: `every` is out of range, the machine has been started, or is recorded already.
            HostError: the file cannot be made.
        """
        if not 0 <= every <= MOST_EVERY:
            raise ConfigError(f"every is {every}", hint=f"it is 0 to {MOST_EVERY}")
        if self._started or self._recording is not None:
            raise ConfigError("a profile is recorded from the machine's start on, into one file")
        from hypervisor.profile.recording import Recording  # noqa: PLC0415 - for those who ask

        self._recording = Recording(
            path,
            vcpus=self.vcpus,
            vm=self._vm,
            memory=self.memory,
            symbols=self._symbols,
            is_linux=self.boot_plan.is_linux,
            loop=self.loop,
            facts=self._facts(),
            every=every,
            trace=trace,
            kernel=kernel,
        )

    def _facts(self) -> dict[str, object]:
        return {"kernel": self.boot_plan.kind, "cpus": self.config.cpus, "ram_mib": self.config.ram_mib}

    def publish(self, name: str) -> None:
        """Let this user's `hv top`, and `hypervisor.profile.live_client`, find the machine by a name. Before `start`.

        Raises:
            ConfigError: a living machine has this name, or it is none.
            HostError: the host does not let us.
        """
        from hypervisor.control import Control  # noqa: PLC0415 - for those who ask

        kernel = self.config.kernel
        facts = {
            "name": name,
            "pid": os.getpid(),
            "id": f"{os.getpid()}-{time.time_ns()}",
            "kernel": "" if isinstance(kernel, bytes) else os.path.basename(os.fspath(kernel)),
            "cpus": self.config.cpus,
            "ram_mib": self.config.ram_mib,
        }

        def answer(kind: str) -> dict[str, Any]:
            from hypervisor.profile.forms import form  # noqa: PLC0415 - for those who look
            from hypervisor.profile.live import profile_of  # noqa: PLC0415 - the same

            live = self._exits()  # this is the loop's thread, for which a vCPU may be waiting: it waits for none
            return form(kind, live, facts, lambda: profile_of(live, self._vm, self._facts(), wait=False))

        if self._control is not None:
            raise ConfigError(f"the machine is known as {self._control.name!r} already")
        self._control = Control(self.loop, name, answer, self._requests)

    def _requests(self, request: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
        """Have another process's request done."""
        from hypervisor.requests import Requests  # noqa: PLC0415 - for those who ask

        with self._lock:
            if self._served is None:
                self._served = Requests(self)
        self._served.begin(request, reply)

    def _answer_last(self) -> None:
        """Let whoever had the machine moved or suspended get an answer: when all of it has gone."""
        if self._served is not None and self._outcome is not None and self._outcome.reason in GIVEN_AWAY:
            self._served.finish()
            self.loop.run(lambda: None)  # the answer was on its way to the loop

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

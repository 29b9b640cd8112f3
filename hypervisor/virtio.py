"""The virtio devices of a machine: made from their descriptions, put on a transport, served.

With `pc` and `machine` the only room that knows device models. A device is a backend (files of the host), a model, a
runner (who serves its queues) and a transport (how the guest finds it); here they meet.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, cast

from devices.backends.errors import BackendError
from devices.events import EventLog
from devices.saved import Saved
from devices.virtio.queue import FIRED
from hypervisor import layout
from hypervisor.errors import ConfigError
from hypervisor.interrupts import Interrupts, NoSignal, Signal
from hypervisor.kvm import host_address
from hypervisor.runner import LoopRunner, ThreadRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.backends.faults import FaultyImage
    from devices.backends.image import Image
    from devices.pci import PciBus
    from devices.virtio.balloon import Balloon
    from devices.virtio.device import VirtioDevice
    from devices.virtio.mmio import VirtioMmio
    from devices.virtio.net import Net
    from devices.virtio.pci import VirtioPci
    from devices.virtio.queue import Queue
    from devices.virtio.vsock import Vsock
    from hypervisor.bus import Bus
    from hypervisor.config import MachineConfig
    from hypervisor.eventloop import EventLoop, LoopAlarm
    from hypervisor.kvm import Vm
    from hypervisor.memory import GuestMemory
    from hypervisor.options import BalloonConfig, DiskConfig, NetConfig, PortConfig, RngConfig, VsockConfig
    from hypervisor.runner import DataPath

MAX_QUEUES: Final = 4
"""A disk has a queue for each vCPU, up to this many: each is a thread."""


def saved_disk(saved: Mapping[str, Any], folder: str, *, is_copy: bool) -> Image:
    """Open a disk that was saved; raises BackendError, and as `devices.backends.layers.open_saved`.

    Args:
        saved: what `VirtioBoard.save_disks` returned of it.
        folder: of the snapshot.
        is_copy: the machine may not be the only one: writes are kept in memory. So they are of a disk that was copied,
            since the copy is the snapshot's.
    """
    from devices.backends.layers import open_saved

    return open_saved(saved, folder, private=is_copy or saved["layer"]["file"] is not None)


class LockedLoop:
    """The event loop as a device's backends see it: every callback is made with the device's lock held."""

    def __init__(self, loop: EventLoop, lock: threading.Lock) -> None:
        """Make callbacks in `loop`."""
        self._loop = loop
        self._lock = lock
        self.unwatch = loop.unwatch
        self.unwatch_writable = loop.unwatch_writable

    def _locked(self, callback: Callable[[], None]) -> Callable[[], None]:
        def locked() -> None:
            with self._lock:
                callback()

        return locked

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable."""
        self._loop.watch(fd, self._locked(callback))

    def watch_writable(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` can be written to."""
        self._loop.watch_writable(fd, self._locked(callback))

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, soon."""
        self._loop.call_soon(self._locked(callback))

    def alarm(self, callback: Callable[[], None]) -> LoopAlarm:
        """Make a timer that calls `callback`."""
        return self._loop.alarm(self._locked(callback))


def _open_disk(name: str, disk: DiskConfig) -> Image:
    from devices.backends.image import open_image

    del name
    return open_image(disk.path, form=disk.format, readonly=disk.readonly, overlay=disk.overlay, cache=disk.cache)


class VirtioBoard:
    """All virtio devices of one machine.

    Attributes:
        devices: the models, by name: blk0, net0, rng0 and so on, in the order in which the guest finds them.
        images: of the disks, by the same names.
        balloon: the memory balloon, if there is one.
        pci: the bus that has them, unless they are on virtio-mmio.
        pci_lock: PCI's configuration, its BARs, and the devices behind them that the event loop serves share this lock.
    """

    def __init__(  # noqa: PLR0913 - what a board is wired to
        self,
        *,
        config: MachineConfig,
        vm: Vm,
        loop: EventLoop,
        memory: GuestMemory,
        on_fault: Callable[[BaseException], None],
        open_disk: Callable[[str, DiskConfig], Image] | None = None,
    ) -> None:
        """Open every backend and make every device; nothing is claimed yet.

        A disk is what `open_disk` returns, given its name and description, by default what the description says.

        Raises:
            ConfigError: a backend cannot be used as asked.
        """
        self._config = config
        self._vm = vm
        self._loop = loop
        self._memory = memory
        self._on_fault = on_fault
        self._open_disk = open_disk or _open_disk
        self._interrupts = Interrupts(vm, loop) if config.irqchip == "kernel" else None
        self._closers: list[Callable[[], None]] = []
        self._runners: list[LoopRunner | ThreadRunner] = []
        self.pci: PciBus | None = None
        self.pci_lock = threading.Lock()
        self._ranges = [
            (ram.gpa, ram.size, host_address(memory.buffer) + memory.offset + ram.offset) for ram in memory.ranges
        ]
        self.devices: dict[str, VirtioDevice] = {}
        self.images: dict[str, FaultyImage] = {}
        self.balloon: Balloon | None = None
        self._made: list[tuple[VirtioDevice, LoopRunner | ThreadRunner, threading.Lock]] = []
        self._shown: dict[str, VirtioMmio | VirtioPci] = {}
        self._signals: list[tuple[Queue, Signal]] = []
        self._lines: list[tuple[VirtioPci, Signal]] = []
        try:
            self._make_devices()
        except BackendError as error:
            self.close()
            raise ConfigError(str(error), hint=error.hint or None) from error.__cause__
        except BaseException:
            self.close()
            raise

    # --- devices ------------------------------------------------------------------------------------------------------

    def _make_devices(self) -> None:
        config = self._config
        for index, disk in enumerate(config.disks):
            self._add_disk(f"blk{index}", disk)
        for index, net in enumerate(config.nets):
            self._add_net(f"net{index}", net)
        if config.rng is not None:
            self._add_rng(config.rng)
        if config.ports:
            self._add_console(config.ports)
        if config.vsock is not None:
            self._add_vsock(config.vsock)
        if config.balloon is not None:
            self._add_balloon(config.balloon)

    def _lock(self) -> threading.Lock:
        return self.pci_lock if self._config.virtio == "pci" else threading.Lock()

    def _own(self, device: VirtioDevice, runner: LoopRunner | ThreadRunner, lock: threading.Lock) -> None:
        self.devices[device.name] = device
        self._runners.append(runner)
        self._made.append((device, runner, lock))

    def _serve_in_loop(self, device: VirtioDevice, lock: threading.Lock) -> None:
        self._own(device, LoopRunner(device, self._loop, lock), lock)

    def _make_path(self, device: VirtioDevice, group: Sequence[int], kick_fds: Sequence[int]) -> DataPath | None:
        """Make the data path of queues that share a thread, where the model allows a short cut."""
        from devices.ports import DiskShortCut

        short = device.short_cut()
        if short is None:
            return None
        from hypervisor.kvm.dataplane import DiskPath, TapPath

        queues = [device.queues[index] for index in group]
        if isinstance(short, DiskShortCut):
            return DiskPath(self._ranges, queues[0], short, kick_fds[0], marks=self._memory.marks)
        marks = self._memory.marks
        return TapPath(self._ranges, queues[0], queues[1], short, kick_fds[0], kick_fds[1], marks=marks)

    def _add_disk(self, name: str, disk: DiskConfig) -> None:
        from devices.backends.faults import faulty
        from devices.virtio.block import Block

        image = self.images[name] = faulty(self._open_disk(name, disk))
        self._closers.append(image.close)
        limits = None
        if disk.iops is not None or disk.bandwidth is not None:
            from devices.backends.limits import Limits

            limits = Limits(iops=disk.iops, bandwidth=disk.bandwidth, clock=time.monotonic)
        queues = min(self._config.cpus, MAX_QUEUES)
        lock = self._lock()
        device = Block(
            name,
            self._memory,
            image,
            queues=queues,
            serial=disk.serial,
            limits=limits,
            log=EventLog(device=name),
        )
        runner = ThreadRunner(device, self._make_path, [[index] for index in range(queues)], self._on_fault)
        device.wait = runner.wait
        self._own(device, runner, lock)

    def _add_net(self, name: str, net: NetConfig) -> None:
        from devices.backends.net import open_backend
        from devices.virtio.net import Net, parse_mac, random_mac

        log = EventLog(device=name)
        backend = open_backend(net.kind, net.name, forwards=net.forwards(), pcap=net.pcap, log=log)
        self._closers.append(backend.close)
        mac = random_mac() if net.mac is None else parse_mac(net.mac)
        device = Net(name, self._memory, backend, mac=mac, log=log)
        lock = self._lock()
        if backend.plain_fd is not None:
            self._own(device, ThreadRunner(device, self._make_path, [[0, 1]], self._on_fault), lock)
            return
        locked = LockedLoop(self._loop, lock)

        def watch(wanted: bool) -> None:
            if backend.fileno() < 0:
                return  # it leads nowhere
            if wanted:
                locked.watch(backend.fileno(), device.host_ready)
            else:
                locked.unwatch(backend.fileno())

        if backend.fileno() >= 0:  # a cable that leads nowhere brings nothing
            device.on_watch = watch
        self._serve_in_loop(device, lock)

    def _add_rng(self, rng: RngConfig) -> None:
        from devices.virtio.rng import Rng

        lock = self._lock()
        alarm = LockedLoop(self._loop, lock).alarm(lambda: device.resume())
        device = Rng(
            "rng0",
            self._memory,
            bandwidth=rng.bandwidth,
            alarm=alarm,
            now_ns=time.monotonic_ns,
            log=EventLog(device="rng0"),
        )
        self._serve_in_loop(device, lock)

    def _add_console(self, ports: Sequence[PortConfig]) -> None:
        from devices.backends.ports_host import FilePort, InnerPort, SocketPort
        from devices.virtio.console import Console

        lock = self._lock()
        locked = LockedLoop(self._loop, lock)
        hosts: list[FilePort | InnerPort | SocketPort] = []
        for port in sorted(ports, key=lambda port: port.name != ""):  # the console is port 0
            if port.socket is not None:
                hosts.append(SocketPort(port.name, port.socket, locked))
            elif port.file is not None:
                hosts.append(FilePort(port.name, port.file))
            else:
                hosts.append(InnerPort(port.name, locked))
            self._closers.append(hosts[-1].close)
        self._serve_in_loop(Console("console0", self._memory, hosts, log=EventLog(device="console0")), lock)

    def _add_vsock(self, vsock: VsockConfig) -> None:
        from devices.backends.vsock_host import VsockHost
        from devices.virtio.vsock import Vsock

        lock = self._lock()
        host = VsockHost(vsock.path, LockedLoop(self._loop, lock))
        self._closers.append(host.close)
        device = Vsock("vsock0", self._memory, cid=vsock.cid, connect=host.connect, log=EventLog(device="vsock0"))
        host.open = device.open
        self._closers.append(device.reset)
        self._serve_in_loop(device, lock)

    def _add_balloon(self, balloon: BalloonConfig) -> None:
        from devices.virtio.balloon import Balloon

        device = Balloon(
            "balloon0",
            self._memory,
            reclaim=self._memory.reclaim,
            reporting=balloon.reporting,
            log=EventLog(device="balloon0"),
        )
        device.set_target(balloon.mib)
        self.balloon = device
        self._serve_in_loop(device, self._lock())

    # --- transports ---------------------------------------------------------------------------------------------------

    def claim(self, memory: Bus) -> None:
        """Put every device where the guest finds it."""
        if self._config.virtio == "mmio":
            self._claim_mmio(memory)
        else:
            self._claim_pci(memory)

    def _claim_mmio(self, memory: Bus) -> None:
        from devices.virtio.mmio import QUEUE_NOTIFY, VirtioMmio

        places = layout.virtio_mmio_places(len(self._made))
        for (device, runner, lock), (base, gsi) in zip(self._made, places, strict=True):
            signal = NoSignal() if self._interrupts is None else self._interrupts.edge(gsi)
            transport = self._shown[device.name] = VirtioMmio(device, runner, signal)
            if isinstance(signal, Signal):
                self._signals += [(queue, signal) for queue in device.queues]
            memory.claim(base, layout.VIRTIO_MMIO_STRIDE, transport, transport.name, lock=lock)
            for index, fd in enumerate(runner.kick_fds):
                self._vm.connect_doorbell(fd, base + QUEUE_NOTIFY, value=index)

    def _claim_pci(self, memory: Bus) -> None:
        from devices.pci import PciBus, PciMemoryWindow

        window = range(layout.PCI_WINDOW, layout.PCI_WINDOW + layout.PCI_WINDOW_SIZE)
        self.pci = PciBus(window)
        memory.claim(window.start, len(window), PciMemoryWindow(self.pci), "pci-memory", lock=self.pci_lock)
        free = window.start

        def allocate(size: int) -> int:
            nonlocal free
            base = -(-free // size) * size
            free = base + size
            return base

        for number, (device, runner, _) in enumerate(self._made, 1):
            function = self._pci_function(device, runner, layout.PCI_GSIS[number % len(layout.PCI_GSIS)])
            self.pci.add(number, 0, function)
            function.place_bars(allocate)

    def _pci_function(self, device: VirtioDevice, runner: LoopRunner | ThreadRunner, gsi: int) -> VirtioPci:
        """Make the PCI function of a device, whose pin leads to `gsi`."""
        from devices.virtio.pci import VirtioPci

        interrupts = self._interrupts
        if interrupts is None:
            nobody = NoSignal()
            function = VirtioPci(device, runner, [nobody] * len(device.queues), nobody)
        else:
            pin = interrupts.pin()
            signals = [interrupts.routed(gsi, pin) for _ in (*device.queues, None)]
            self._signals += zip(device.queues, signals, strict=False)
            function = VirtioPci(device, runner, signals[:-1], signals[-1])
            pin.is_asserted = lambda: function.line_is_asserted
            pin.raise_again = signals[-1].fire
            self._lines.append((function, signals[-1]))
        function.set_interrupt_line(gsi)
        self._shown[device.name] = function
        bells: dict[int, int] = {}  # address by queue, while its BAR decodes

        def on_decode(bar: int, base: int | None) -> None:
            for index, fd in enumerate(runner.kick_fds):
                where, offset = function.notify_address(index)
                if where != bar:
                    continue
                if index in bells:
                    self._vm.connect_doorbell(fd, bells.pop(index), connect=False)
                if base is not None:
                    self._vm.connect_doorbell(fd, base + offset)
                    bells[index] = base + offset

        function.on_decode = on_decode
        return function

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        """Let the devices come to rest: nothing is in flight, and what they fired is in the interrupt controllers.

        To be called in the event loop's thread, with every vCPU parked. What follows is `state`, `load`, KVM's state
        and memory in the order that the machine needs, and then `resume`.
        """
        for _, runner, lock in self._made:
            with lock:
                runner.pause()
        for queue, signal in self._signals:
            if queue.cursor[FIRED]:  # by a data path
                queue.cursor[FIRED] = 0
                signal.was_fired = True
        if self._interrupts is not None:
            self._interrupts.settle()

    def resume(self) -> None:
        """Let the devices go on after `quiesce`, in the event loop's thread, before any vCPU does.

        Every queue is served once, so no kick that came before is missed. An interrupt line that a device holds is
        raised again: settling may have lowered it, and a restored one has not been raised here.
        """
        for device, runner, lock in self._made:
            with lock:
                if device.is_active:
                    runner.start()
                else:
                    runner.stop()
        for function, signal in self._lines:
            if signal.is_on_line and function.line_is_asserted:
                signal.fire()

    def state(self) -> dict[str, Any]:
        """Return the state of every device, by its name, as plain values; between `quiesce` and `resume`."""
        return {name: shown.state() for name, shown in self._shown.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put every device into the state that `state` says; between `quiesce` and `resume`, memory being there.

        The devices may be new, or have run. KVM is told only of what is not as it was.

        Raises:
            KeyError, TypeError, ValueError: it is no state of these devices; they are of no more use.
        """
        if state.keys() != self._shown.keys():
            raise ValueError(f"a state of {', '.join(state)} for {', '.join(self._shown)}")
        interrupts, saved = self._interrupts, Saved(state)
        with nullcontext() if interrupts is None else interrupts.collected():
            for name, shown in self._shown.items():
                shown.load(saved.part(name))
        if self.pci is not None:
            self.pci.update()

    def save_disks(self, folder: str, *, mode: str) -> dict[str, Any]:
        """Save every disk beside a snapshot, and return what `saved_disk` opens them by; while no queue is served.

        Args:
            folder: for the files.
            mode: "copy", or "reference": the disk's own file is what the machine goes on with.

        Raises:
            ConfigError: one cannot be saved.
            OSError: the host does not take it.
        """
        from devices.backends.layers import save_layers

        try:
            return {name: save_layers(image, folder, f"disk-{name}", mode=mode) for name, image in self.images.items()}
        except BackendError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise ConfigError(str(error), hint=error.hint or None) from error

    def renew_addresses(self) -> None:
        """Give a copy's devices addresses of their own; after `resume`, while no vCPU runs."""
        from devices.virtio.net import Net, random_mac
        from devices.virtio.vsock import Vsock

        for name, device in self.devices.items():
            if isinstance(device, Net):
                self.set_mac(name, random_mac())
            elif isinstance(device, Vsock) and self._config.vsock is not None:
                self.set_cid(self._config.vsock.cid)

    def set_mac(self, name: str, mac: bytes) -> None:
        """Give a copy's network interface an address of its own; after `resume`, while no vCPU runs."""
        net = cast("Net", self.devices[name])
        with self._lock_of(name):
            net.set_mac(mac)

    def set_cid(self, cid: int) -> None:
        """Give a copy's socket device an address of its own; after `resume`, while no vCPU runs."""
        vsock = cast("Vsock", self.devices["vsock0"])
        with self._lock_of("vsock0"):
            vsock.set_cid(cid)

    def _lock_of(self, name: str) -> threading.Lock:
        return next(lock for device, _, lock in self._made if device.name == name)

    # --- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Serve no queue any more; the vCPUs have ended, what is in flight is completed."""
        for runner in self._runners:
            runner.stop()

    def close(self) -> None:
        """Give back every file; the event loop has ended and nothing is being served."""
        self.stop()
        while self._closers:
            self._closers.pop()()
        for runner in self._runners:
            runner.close()
        self._runners.clear()
        if self._interrupts is not None:
            self._interrupts.close()
            self._interrupts = None

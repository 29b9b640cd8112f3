"""The half of a machine that has moments: it stands still, is saved and restored, goes back, and is moved elsewhere."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, cast

from hypervisor.clock import Clock
from hypervisor.errors import SnapshotError
from hypervisor.memory import PAGE
from hypervisor.outcome import Outcome, Stop

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping
    from typing import Self

    from hypervisor.boot import BootPlan
    from hypervisor.config import MachineConfig
    from hypervisor.console import Console
    from hypervisor.eventloop import EventLoop
    from hypervisor.kvm import Kvm, Vm
    from hypervisor.kvm.dirty import Dirty
    from hypervisor.machine import Machine
    from hypervisor.memory import GuestMemory
    from hypervisor.pc import Pc
    from hypervisor.profile.live import LiveExits
    from hypervisor.snapshot.checkpoint import Checkpoint
    from hypervisor.snapshot.origin import Origin
    from hypervisor.snapshot.store import Snapshot
    from hypervisor.vcpu import Vcpu
    from hypervisor.virtio import VirtioBoard

__all__ = ["Moments"]

T = TypeVar("T")


class Moments:
    """What `Machine` is made of beside its own life; its constructor makes the parts that are named here."""

    config: MachineConfig
    memory: GuestMemory
    vcpus: list[Vcpu]
    console: Console
    debug_console: Console
    loop: EventLoop
    boot_plan: BootPlan
    _clock: Clock | None
    _done: threading.Event
    _is_copy: bool
    _is_held: bool
    _is_paused: bool
    _kvm: Kvm
    _live: LiveExits | None
    _lock: threading.Lock
    _outcome: Outcome | None
    _pc: Pc
    _since: tuple[str | None, Dirty | None]
    _started: bool
    _still: threading.RLock
    _symbols: str | None
    _virtio: VirtioBoard | None
    _vm: Vm

    if TYPE_CHECKING:

        def __init__(self, config: MachineConfig, *, origin: Origin | None = None) -> None:
            """Be a machine."""

        @property
        def is_closed(self) -> bool:
            """Whether `close` was called."""

        def close(self) -> None:
            """End the guest."""

        def pause(self) -> None:
            """Stop all vCPUs."""

        def resume(self) -> None:
            """Let them go on."""

        def _settle(self) -> Outcome:
            """Let the vCPUs come to rest."""

    def stand_still(self, function: Callable[[], T]) -> T:
        """Return what `function` does while nothing moves: no vCPU, no queue of a device, no timer, no input.

        It runs in the event loop's thread. A machine that was paused before stays so, and one that it called `hold` of.

        Raises:
            SnapshotError: the machine has ended.
        """
        with self._still:
            was_paused = self._is_paused
            self._is_held = False
            if self._started:
                self.pause()
            try:
                if self._outcome is not None:
                    raise SnapshotError("the machine has ended", hint=f"{self._outcome.message}")
                return self.loop.run(lambda: self._without_devices(function))
            finally:
                if not (was_paused or self._is_held) and self._started:
                    self.resume()

    def hold(self) -> None:
        """Be paused from here on; for a `function` of `stand_still`."""
        self._is_held = True

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
            if self.is_closed or (revive and self._outcome.reason is Stop.FAULT):
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

        self.forget_changes()
        if self.memory.is_tracked:
            raise SnapshotError("the machine has a checkpoint, or is being moved", hint="close the checkpoint first")
        return Checkpoint(cast("Machine", self))

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

    def save(  # noqa: PLR0913 - what the user may say
        self,
        path: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        compress: bool = False,
        suspend: bool = False,
        track: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Save the machine to a directory, a snapshot; the guest stands still meanwhile.

        Args:
            path: of the directory; a snapshot that is there already is replaced, as a whole.
            base: another snapshot of it: only what has changed since is saved, and the other is needed to restore.
            compress: the memory.
            suspend: end the machine then, and do not copy its disks: it goes on with them as they are.
            track: have logged which pages change from here on, whoever writes them: the next save whose base this one
                is looks at those only. Without it all of memory is compared, by hash.
            progress: called now and then with bytes of memory done, and all of them.

        Raises:
            SnapshotError: there is something else at `path`, `base` is none of this machine, or it has ended.
            HostError: the host does not take it (SaveError); what was at `path` is as it was.
        """
        from hypervisor.snapshot.machines import save  # noqa: PLC0415 - for those who save

        save(cast("Machine", self), path, base=base, compress=compress, suspend=suspend, track=track, progress=progress)

    @classmethod
    def restore(
        cls,
        snapshot: str | os.PathLike[str] | Snapshot,
        *,
        clone: bool = False,
        verify: bool = True,
        advance: bool = False,
        lazy: bool = False,
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
            lazy: do not wait until memory that is compressed, or a change to another snapshot's, has been put together:
                the guest begins at once, and another process unpacks what it touches, and the rest meanwhile. Such
                memory is verified as it is unpacked; the machine ends with Stop.LOST where it is damaged. Machines
                share none of it. Memory that is mapped as it is needs none of this.
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
            unpacking = None
            if lazy and snapshot.is_packed:
                from hypervisor.snapshot.lazy import Unpacking  # noqa: PLC0415 - for those who do not wait

                unpacking = stack.enter_context(Unpacking(snapshot, verify=verify))
            origin = origin_of(snapshot, clone=clone, verify=verify, memory=unpacking is None)
            try:
                machine = cls(config, origin=origin)
            finally:
                if origin.content is not None:
                    os.close(origin.content.fd)
            try:
                if unpacking is not None:
                    unpacking.serve(cast("Machine", machine))
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

        self.forget_changes()
        return Dirty(self._vm, self.memory.marks)

    def changes_since(self, snapshot: str | None) -> bytes | None:
        """Return which pages have changed since a snapshot was saved, a bit a page; None when nobody has logged that.

        For a `function` of `stand_still`. They are told once: the log is over.
        """
        since, dirty = self._since
        if dirty is None:
            return None
        pages = self.memory.size // PAGE
        changed = dirty.collect().bitmap.tobytes()[: -(-pages // 8)] if since == snapshot else None
        self.forget_changes()
        return changed

    def track_from(self, snapshot: str) -> None:
        """Have changes logged from the snapshot on that is being saved; for a `function` of `stand_still`."""
        dirty = self.log_changes()
        dirty.collect()
        self._since = (snapshot, dirty)

    def forget_changes(self) -> None:
        """Log no more for the next save."""
        dirty = self._since[1]
        if dirty is not None:
            dirty.close()
            self._since = (None, None)

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

"""Setting a running machine back to a moment of its own, in place: only what has changed since is touched."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.kvm.dirty import Dirty, copy_back, copy_base
from hypervisor.kvm.prepared import prepare
from hypervisor.kvm.state import save

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypervisor.kvm.dirty import Marks
    from hypervisor.kvm.handles import Vm

__all__ = ["Devices", "Rewind"]


def _nothing() -> None:
    """Be the part of a machine without devices."""


class Devices(NamedTuple):
    """What is to be done with a machine's devices.

    Attributes:
        quiesce: stops what serves them; called first, at every reset.
        load: puts each into its state at the moment; called when memory is back, before the KVM state.
        resume: lets them go on; called last.
    """

    quiesce: Callable[[], None] = _nothing
    load: Callable[[], None] = _nothing
    resume: Callable[[], None] = _nothing


NO_DEVICES: Final = Devices()


class Rewind:
    """A moment of a machine, and the way back to it. Made and used while the machine stands still.

    That is: every vCPU is out of the guest and settled, and nothing but the caller drives devices. From its making
    until `close` every write to guest memory is logged, by KVM and by us.

    Attributes:
        pages: pages of RAM that were not all zeroes at that moment.
        resets: how many times it was gone back to.
    """

    def __init__(
        self,
        vm: Vm,
        marks: Marks,
        msr_indices: Sequence[int],
        *,
        base: Any = None,
        devices: Devices = NO_DEVICES,
    ) -> None:
        """Take the moment: copy RAM, read the KVM state and make it ready to be set.

        Args:
            vm: the VM.
            marks: those of its memory (`GuestMemory.marks`).
            msr_indices: what `Kvm.msr_indices` returned.
            base: a buffer with what RAM holds now, which nobody changes: such as the private mapping of the file that
                it was restored from. None: a copy is made.
            devices: what to do with them.

        Raises:
            ValueError: an access of the guest is half done.
            KvmError, HostError: when the host refuses.
        """
        self._marks = marks
        self._devices = devices
        self._prepared = prepare(vm, save(vm, msr_indices))
        self._dirty = Dirty(vm, marks)
        self.resets = 0
        try:
            self._own = mmap.mmap(-1, marks.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if base is None else None
            self._base = self._own if base is None else base
            self.pages = copy_base(marks, self._own) if base is None else marks.size // mmap.PAGESIZE
            self._dirty.collect()  # what saving wrote, or what was dirty before
        except BaseException:
            self._dirty.close()
            raise

    def reset(self) -> int:
        """Go back, and return how many pages were copied. The vCPUs are as they were, still standing.

        Raises:
            ValueError: an access of the guest is half done.
            KvmError: the kernel refuses; the machine is of no more use.
        """
        self._devices.quiesce()
        copied = copy_back(self._marks, self._base, self._dirty.collect())
        self._devices.load()
        self._prepared.apply()
        self.resets += 1
        self._devices.resume()
        return copied

    def close(self) -> None:
        """Log no more, and give the copy back; the machine stays as it is. May be called twice."""
        self._dirty.close()
        self._base = None
        if self._own is not None:
            own, self._own = self._own, None
            own.close()

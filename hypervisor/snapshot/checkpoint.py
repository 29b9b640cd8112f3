"""A moment of a running machine, and the way back to it as often as one likes: `Machine.checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypervisor.snapshot.rewind import Devices, Rewind

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from hypervisor.machine import Machine

__all__ = ["Checkpoint"]


class Checkpoint:
    """Where a machine was; `reset` brings it back there, in place: the same VM, and only the pages that have changed.

    What the guest writes to its disks from then on is kept in memory, and dropped at a reset; `close` keeps it. A
    context manager.

    Attributes:
        resets: how often the machine went back.
    """

    def __init__(self, machine: Machine) -> None:
        """Take the moment; see `Machine.checkpoint`."""
        self._machine = machine
        self._rewind: Rewind
        machine.stand_still(self._take)

    def _take(self) -> None:
        machine = self._machine
        self._state: dict[str, Any] = machine.device_states()
        self._rewind = Rewind(
            machine.vm,
            machine.memory.marks,
            machine.msr_indices(),
            devices=Devices(load=lambda: machine.load_devices(self._state)),
        )
        for image in machine.images.values():  # after what the host may refuse
            image.checkpoint()

    @property
    def resets(self) -> int:
        """How often the machine went back."""
        return self._rewind.resets

    def reset(self) -> int:
        """Bring the machine back, and return how many pages of memory had changed.

        A machine whose guest has ended since, in whatever way, lives again. What was printed or typed after the moment
        is forgotten.

        Raises:
            SnapshotError: the machine was closed, or failed by a fault of the VMM.
        """
        return self._machine.go_back(self._reset)

    def _reset(self) -> int:
        for image in self._machine.images.values():
            image.rewind()
        return self._rewind.reset()

    def close(self) -> None:
        """Give the moment up; the machine goes on as it is, and its disks keep what was written."""
        if not self._machine.is_closed:
            self._machine.go_back(self._forget, revive=False)
        self._rewind.close()

    def _forget(self) -> None:
        self._rewind.close()
        for image in self._machine.images.values():
            image.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

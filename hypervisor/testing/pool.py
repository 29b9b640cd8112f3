"""Machines that are ready before a test asks for them: booted once, then put back to that moment for each test.

The first test that wants a guest boots it and takes a checkpoint; later ones are given the same machine, reset in
place. Under pytest-xdist the first worker that needs a guest saves its moment to a folder that all of them share, and
the others restore clones from there; each then resets its own. A machine that died, or that cannot be put back, is
closed, and another one takes its place: restored if there is a snapshot, which is made when a process boots a guest for
the second time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hypervisor.errors import VmmError
from hypervisor.testing.boot import agent_of, config_of, wait_ready
from hypervisor.testing.guest import GuestMachine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor import Machine
    from hypervisor.snapshot.checkpoint import Checkpoint
    from hypervisor.testing.interrupt import Interrupter
    from hypervisor.testing.spec import GuestSpec
    from hypervisor.testing.watch import Watcher

__all__ = ["Pool"]

MOST_IDLE: Final = 4
"""Machines that wait for their next test; the one that has waited longest goes when there are more."""
RESYNC_SECONDS: Final = 30.0


class _Place:
    """A machine of the pool, and the moment that it goes back to."""

    def __init__(self, key: str, machine: Machine, checkpoint: Checkpoint) -> None:
        self.key = key
        self.machine = machine
        self.checkpoint = checkpoint


class Pool:
    """The machines of one process.

    Attributes:
        folder: of whatever has to be kept while tests run.
        boots, restores, resets: how often a guest was made ready in each of the three ways.
    """

    def __init__(self, folder: str, interrupter: Interrupter, watcher: Watcher, *, is_shared: bool) -> None:
        """Keep what has to be kept in `folder`, which other processes use too if `is_shared`."""
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self.folder = folder
        self._interrupter = interrupter
        self._watcher = watcher
        self._is_shared = is_shared
        self._idle: list[_Place] = []
        self._busy: dict[int, _Place] = {}
        self._booted: set[str] = set()
        self.boots = self.restores = self.resets = 0

    # --- giving out ---------------------------------------------------------------------------------------------------

    def acquire(self, spec: GuestSpec, name: str, on_made: Callable[[GuestMachine], None]) -> GuestMachine:
        """Return a guest that is ready.

        Args:
            spec: what is asked for.
            name: what reports call it.
            on_made: is told of it before it is ready, because its boot may fail, and releases it in the end.
        """
        started = time.monotonic()
        guest = self._reset(spec, name, on_made) or self._make(spec, name, on_made)
        guest.restart, guest.folder = self._restart, self.folder
        guest.begin(anew=id(guest) not in self._busy)
        guest.start_seconds = time.monotonic() - started
        return guest

    def _attend(self, guest: GuestMachine, on_made: Callable[[GuestMachine], None]) -> None:
        on_made(guest)
        self._watcher.add(guest, guest.look)

    def _reset(self, spec: GuestSpec, name: str, on_made: Callable[[GuestMachine], None]) -> GuestMachine | None:
        """Return a machine that waits, put back to its moment; None when there is none."""
        key = spec.key()
        for place in [one for one in self._idle if one.key == key and not spec.fresh]:
            self._idle.remove(place)
            try:
                place.checkpoint.reset()
                guest = GuestMachine(spec, place.machine, agent_of(spec, place.machine), name=name)
                place.machine.resume()
                self._wake(guest)
            except (VmmError, OSError):
                place.machine.close()
                continue
            self._busy[id(guest)] = place
            self._attend(guest, on_made)
            self.resets += 1
            return guest
        return None

    def _wake(self, guest: GuestMachine) -> None:
        """Speak to a guest that has been put back, and tell it the time."""
        if guest.has_agent:
            guest.agent.resync(timeout=RESYNC_SECONDS)
            guest.agent.refresh(entropy=os.urandom(32), timeout=RESYNC_SECONDS)

    def _make(self, spec: GuestSpec, name: str, on_made: Callable[[GuestMachine], None]) -> GuestMachine:
        """Restore a guest from the shared snapshot, or boot one."""
        if spec.fresh or not spec.has_moment:
            return self._boot(spec, name, on_made)
        path = os.path.join(self.folder, f"snapshot-{spec.key()}")
        with self._locked(path):
            if not os.path.exists(path):
                guest = self._boot(spec, name, on_made)
                # a process of its own saves what it has to boot for the second time
                if self._is_shared or spec.key() in self._booted:
                    self._save(guest, path)
                self._booted.add(spec.key())
                return self._placed(guest)
        return self._placed(self._restore(spec, name, on_made, path) or self._boot(spec, name, on_made))

    @contextmanager
    def _locked(self, path: str) -> Iterator[None]:
        """Hold the lock of a snapshot, so that it is made once."""
        with open(f"{path}.lock", "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _save(self, guest: GuestMachine, path: str) -> None:
        try:
            guest.machine.save(path)
        except (VmmError, OSError) as error:
            warnings.warn(f"the guest could not be saved for other workers: {error}", stacklevel=2)

    def _restore(
        self, spec: GuestSpec, name: str, on_made: Callable[[GuestMachine], None], path: str
    ) -> GuestMachine | None:
        from hypervisor import Machine  # noqa: PLC0415 - a test session without guests loads no machine

        try:
            machine = self._built(lambda: Machine.restore(path, clone=True, verify=False))
        except (VmmError, OSError) as error:
            warnings.warn(f"the guest could not be restored, and is booted: {error}", stacklevel=2)
            return None
        guest = GuestMachine(spec, machine, agent_of(spec, machine), name=name)
        self._attend(guest, on_made)
        machine.start()
        with self._interrupter.window():
            self._wake(guest)
        self.restores += 1
        return guest

    def _built(self, build: Callable[[], Machine]) -> Machine:
        """Return a machine; those that wait make room if they have what it needs: a port of a network, an image."""
        try:
            return build()
        except VmmError:
            if not self._idle:
                raise
            self._close_idle()
            return build()

    def _boot(self, spec: GuestSpec, name: str, on_made: Callable[[GuestMachine], None]) -> GuestMachine:
        """Start a guest and wait until it is ready."""
        from hypervisor import Machine  # noqa: PLC0415 - as above

        machine = self._built(lambda: Machine(config_of(spec, self.folder)))
        guest = GuestMachine(spec, machine, agent_of(spec, machine), name=name)
        self._attend(guest, on_made)
        machine.start()
        with self._interrupter.window():
            wait_ready(guest)
        self.boots += 1
        return guest

    def _placed(self, guest: GuestMachine) -> GuestMachine:
        """Take the checkpoint that later tests go back to."""
        try:
            checkpoint = guest.machine.checkpoint()
        except (VmmError, OSError) as error:
            warnings.warn(f"the guest cannot be put back between tests, and is booted for each: {error}", stacklevel=2)
        else:
            self._busy[id(guest)] = _Place(guest.spec.key(), guest.machine, checkpoint)
        return guest

    def _restart(self, guest: GuestMachine, images: list[str]) -> None:
        """Boot a guest again on these images of its disks, "" for one as it was; its machine is the pool's no more."""
        from hypervisor import Machine  # noqa: PLC0415 - as above

        self._busy.pop(id(guest), None)
        self._watcher.remove(guest)
        old = guest.config.disks
        guest.machine.close()
        disks = [
            disk._replace(path=image, format="raw", overlay=None) if image else disk
            for disk, image in zip(old, images, strict=True)
        ]
        config = guest.config.replace(disks=disks)
        machine = self._built(lambda: Machine(config))
        guest.replace(machine, agent_of(guest.spec, machine))
        machine.start()
        self._watcher.add(guest, guest.look)
        with self._interrupter.window():
            wait_ready(guest)
        guest.begin(anew=True)

    # --- taking back --------------------------------------------------------------------------------------------------

    def release(self, guest: GuestMachine) -> None:
        """Take a guest back, dead or alive; one that has been booted for this test alone is closed."""
        self._watcher.remove(guest)
        place = self._busy.pop(id(guest), None)
        machine = guest.machine
        if place is None or place.machine is not machine:
            machine.close()
            return
        try:
            for disk in guest.broken.values():
                disk.repair()
            machine.pause()
            guest.unwatch()
        except (VmmError, OSError):
            machine.close()
            return
        self._idle.append(place)
        while len(self._idle) > MOST_IDLE:
            self._idle.pop(0).machine.close()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().machine.close()

    def close(self) -> None:
        """Close every machine that waits."""
        self._close_idle()
        if not self._is_shared:
            shutil.rmtree(self.folder, ignore_errors=True)

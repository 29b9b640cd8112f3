"""Whole machines into snapshots and out of them: `Machine.save` and `Machine.restore`."""

from __future__ import annotations

import os
import secrets
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from hypervisor.errors import HostError, SnapshotError
from hypervisor.memory import PAGE, Content
from hypervisor.outcome import Outcome, Stop
from hypervisor.snapshot.origin import Origin
from hypervisor.virtio import saved_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.backends.image import Image
    from hypervisor.config import MachineConfig
    from hypervisor.machine import Machine
    from hypervisor.options import DiskConfig
    from hypervisor.snapshot.store import Snapshot, Writer

__all__ = ["apart", "origin_of", "save"]


def save(  # noqa: PLR0913 - what the user may say
    machine: Machine,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    compress: bool = False,
    suspend: bool = False,
    track: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Save a machine; see `Machine.save`."""
    from hypervisor.snapshot import fit
    from hypervisor.snapshot.store import Snapshot, Writer

    host = fit.this_host()
    with (
        nullcontext() if base is None else Snapshot.open(base) as below,
        Writer(path, base=below, compress=compress, progress=progress) as writer,
    ):

        def commit(state: dict[str, Any]) -> None:
            writer.commit(state, config=machine.config.to_plain(), host=fit.facts(host, state))

        def still() -> dict[str, Any]:
            state = machine.capture()
            state["disks"] = _save_disks(machine, writer, mode="reference" if suspend else "copy")
            memory = machine.memory
            changed = machine.changes_since(None if below is None else below.id)
            writer.write_memory(memory.pages(0, memory.size // PAGE), memory.ranges, changed)
            if track and not suspend:
                machine.track_from(writer.id)
            if suspend:
                commit(state)
                machine.end(Outcome(Stop.SUSPENDED, message=f"the machine was saved to {os.fspath(path)}"))
            return state

        state = machine.stand_still(still)
        if not suspend:
            commit(state)


def _save_disks(machine: Machine, writer: Writer, *, mode: str) -> dict[str, Any]:
    try:
        saved = machine.save_disks(writer.folder, mode=mode)
    except OSError as error:
        raise writer.refused(error) from error
    for one in saved.values():
        if one["layer"]["file"] is not None:
            writer.add_file(one["layer"]["file"])
    return saved


# --- out of them ------------------------------------------------------------------------------------------------------


def origin_of(snapshot: Snapshot, *, clone: bool, verify: bool, memory: bool = True) -> Origin:
    """Return what a machine goes on from that was saved.

    Args:
        snapshot: an open one; it may be closed once the machine is built.
        clone: the machine is one of many.
        verify: compare memory and disks with their hashes first.
        memory: False: its RAM is to be filled by other means.

    Raises:
        SnapshotError: it is damaged, or does not run here.
    """
    from hypervisor.snapshot import fit

    if not snapshot.is_fit:
        problems = fit.problems(snapshot)
        if problems:
            raise SnapshotError(f"{snapshot.path} does not run here: {'; '.join(one.text for one in problems)}")
        snapshot.is_fit = True
    if verify:
        snapshot.verify(memory=False)
    state = snapshot.state
    content = None
    if memory:
        try:
            fd, offset, _ = snapshot.map_memory(verify=verify)
        except OSError as error:
            raise HostError(f"cannot map the memory of {snapshot.path}: {error.strerror}") from error
        content = Content(fd, offset)
    disks: Mapping[str, Any] = state.get("disks", {})

    def open_disk(name: str, disk: DiskConfig) -> Image:
        del disk
        try:
            return saved_disk(disks[name], snapshot.path, is_copy=clone)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise SnapshotError(f"{snapshot.path} has a disk {name} that cannot be read: {error}") from error

    booted = state.get("booted")
    return Origin(booted if isinstance(booted, dict) else {}, content, open_disk)


def apart(config: MachineConfig) -> dict[str, Any]:
    """Return changes to a description with which a copy of the machine can run beside the first one.

    Every file or socket that only one of them can have gets a name of its own, and the vsock device another address.
    """
    from hypervisor.options import MAX_CID

    end = f".{secrets.token_hex(4)}"
    changes: dict[str, Any] = {}
    if config.vsock is not None:
        changes["vsock"] = config.vsock._replace(cid=3 + secrets.randbelow(MAX_CID - 2), path=config.vsock.path + end)
    changes["ports"] = [
        one._replace(**{key: getattr(one, key) + end for key in ("socket", "file") if getattr(one, key) is not None})
        for one in config.ports
    ]
    changes["nets"] = [one if one.pcap is None else one._replace(pcap=one.pcap + end) for one in config.nets]
    return changes

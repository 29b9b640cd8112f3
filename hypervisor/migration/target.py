"""The end of a migration that gets the machine: it builds one, fills it, and starts it when the source has let go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from hypervisor import cpuid
from hypervisor.config import MachineConfig
from hypervisor.errors import HostError, SnapshotError, VmmError
from hypervisor.kvm.dirty import PAGE
from hypervisor.kvm.pager import Pager, open_userfaultfd
from hypervisor.machine import Machine
from hypervisor.migration.disks import TargetDisks
from hypervisor.migration.wire import SECONDS, VERSION, Kind, MigrationError
from hypervisor.outcome import Outcome, Stop
from hypervisor.snapshot.fit import this_host
from hypervisor.snapshot.origin import Origin

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from hypervisor.migration.wire import Frame, Wire

__all__ = ["receive"]

MOST_RUNS: Final = 1 << 16


def receive(
    wire: Wire,
    *,
    changes: Mapping[str, Any] | None = None,
    disks: Sequence[str] = (),
    accept: Callable[[float], Wire] | None = None,
) -> Machine:
    """Take a machine from the source at the other end of `wire`, and return it, ready to be started.

    The source has it still, its guest standing, until `Machine.start` takes it over; `close` leaves it to the source.

    Args:
        wire: the connection; it is closed when all is over.
        changes: values of its MachineConfig that are others here, such as paths.
        disks: where disks go that are sent along, in order: files that are not there yet. One that is not named goes to
            the working directory, as "disk-blk0.raw" and so on. They are removed if the machine does not come.
        accept: takes another connection of the source in so many seconds: `Listener.accept`; None: refuse post-copy.

    With post-copy the machine runs before all of its memory is here. If the source is lost then, so is the guest: the
    machine ends with Stop.LOST, or, where somebody waits for a page who cannot be told to stop, the process with the
    same status and message.

    Raises:
        MigrationError: it did not come; the source has it still, or has ended.
        VmmError: it cannot run here, which the source has been told.
    """
    try:
        hello = wire.receive()
        machine, kept = _build(hello, dict(changes or {}), disks)
        try:
            pager = _meet(wire, machine, hello.form.get("pager"), accept)
            paused = _fill(wire, machine, kept, pager)
            wire.send(Kind.LOADED)
        except BaseException:
            machine.close()
            raise
    except EOFError as error:
        wire.close()
        raise MigrationError("the source hung up before it let go of the machine") from error
    except OSError as error:
        wire.close()
        raise MigrationError(f"the connection broke before the source let go: {error.strerror or error}") from error
    except BaseException as error:
        if isinstance(error, VmmError):
            _refuse(wire, error)
        wire.close()
        raise
    machine.at_close(wire.close)
    machine.on_start = lambda: _take_over(wire, machine, kept, pager, paused=paused)
    return machine


def _meet(wire: Wire, machine: Machine, token: object, accept: Callable[[float], Wire] | None) -> Pager | None:
    """Say that the machine is built, and with post-copy take the source's second connection."""
    if token is None:
        wire.send(Kind.READY)
        return None
    if accept is None:
        raise MigrationError("this end takes no machine by post-copy")
    userfaultfd = open_userfaultfd()  # first of all: without it nothing is moved
    try:
        wire.send(Kind.READY)
        connection = _detach(accept(SECONDS), token)
    except BaseException:
        os.close(userfaultfd)
        raise
    pager = Pager(userfaultfd, connection, machine.memory.marks, seconds=SECONDS)
    machine.at_close(pager.close)
    return pager


def _detach(wire: Wire, token: object) -> socket.socket:
    """Return the socket of a connection that the same source has made; raises MigrationError if another has."""
    try:
        frame = wire.receive()
        if frame.kind is not Kind.PAGER or frame.size or frame.form.get("token") != token:
            raise MigrationError("somebody else has connected in the source's place")
        return wire.detach()
    finally:
        wire.close()


def _take_over(wire: Wire, machine: Machine, disks: TargetDisks, pager: Pager | None, *, paused: bool) -> None:
    """Wait until the source lets go, and say that the machine is ours: nobody starts it after this but us.

    The disks come first: if one cannot be had, the source takes everything back.
    """
    try:
        frame = wire.receive()
        if frame.kind is not Kind.GO:
            raise MigrationError(f"the source says {frame.kind.name} where GO is due: {frame.form.get('why', '')}")
        try:
            disks.take_over(frame.form.get("disks"), machine.images)
        except VmmError as error:
            disks.close()
            _refuse(wire, error)
            raise
        if pager is not None and not pager.take_over():
            raise MigrationError("the source was lost before it let go of the machine")
        wire.send(Kind.MINE)
        disks.keep()
    except (EOFError, OSError) as error:
        raise MigrationError("the source hung up before it let go of the machine") from error
    finally:
        wire.close()
    if paused:
        machine.pause()


def _refuse(wire: Wire, error: VmmError) -> None:
    """Tell the source why not."""
    try:
        wire.send(Kind.REFUSED, {"why": str(error)})
    except OSError:
        pass  # it is gone


def _build(frame: Frame, changes: dict[str, Any], files: Sequence[str]) -> tuple[Machine, TargetDisks]:
    form = frame.form
    if frame.kind is not Kind.HELLO or frame.size:
        raise MigrationError("the other end is no source of a migration")
    if form.get("version") != VERSION:
        raise MigrationError(f"the source speaks version {form.get('version')} of the protocol, this end {VERSION}")
    try:
        config = MachineConfig(**form["config"]).replace(**changes)
        table = [cpuid.Entry(*row) for row in form["cpuid"]]
        origin = Origin(dict(form["booted"]))
    except (KeyError, TypeError, ValueError) as error:
        raise MigrationError(f"the source does not describe a machine: {error}") from error
    lacks = cpuid.lacks(table, this_host().cpuid)
    if lacks:
        names = ", ".join(name for lack in lacks for name in lack.names)
        raise HostError(f"this host's processor lacks what the guest was given: {names}")
    disks = _take_disks(form, config, files, changed="disks" in changes)
    try:
        machine = Machine(config.replace(disks=disks.configs), origin=origin._replace(open_disk=disks.open))
    except BaseException:
        disks.close()
        raise
    machine.at_close(disks.close)
    return machine, disks


def _take_disks(form: dict[str, Any], config: MachineConfig, files: Sequence[str], *, changed: bool) -> TargetDisks:
    try:
        return TargetDisks(form["disks"], config, files, changed=changed)
    except (KeyError, TypeError, ValueError) as error:
        raise MigrationError(f"the source does not describe its disks: {error}") from error


def _fetch(machine: Machine, pager: Pager | None, runs: object) -> None:
    """Begin to fetch pages that are missing still; before anything touches them."""
    if not runs:
        return
    if pager is None:
        raise MigrationError("the source keeps pages back without having said so")

    def lost(left: int) -> None:
        message = f"the source is gone, and {left} pages of the guest's memory with it: the guest is lost"
        machine.end_wholly(Outcome(Stop.LOST, message=message))

    pager.begin(_checked_runs(runs, machine.memory.size // PAGE), lost)


def _fill(wire: Wire, machine: Machine, disks: TargetDisks, pager: Pager | None) -> bool:
    """Take memory, disks and state; return whether the machine was paused."""
    while True:
        frame = wire.receive()
        if frame.kind is Kind.PAGES:
            _take_pages(wire, machine, frame)
        elif frame.kind is Kind.DISK:
            disks.take(wire, frame)
        elif frame.kind is Kind.STATE and not frame.size:
            _fetch(machine, pager, frame.form.get("missing"))
            try:
                machine.load(frame.form["state"])
            except KeyError as error:
                raise SnapshotError(f"the source sent a state without {error}") from error
            disks.complete()
            return frame.form.get("paused") is True
        elif frame.kind is Kind.REFUSED:
            raise MigrationError(f"the source gave up: {frame.form.get('why')}")
        else:
            raise MigrationError(f"the source says {frame.kind.name} where pages are due")


def _take_pages(wire: Wire, machine: Machine, frame: Frame) -> None:
    runs = _checked_runs(frame.form.get("runs"), machine.memory.size // PAGE)
    total = sum(count for _, count in runs)
    if total * PAGE != frame.size or len(runs) > MOST_RUNS:
        raise MigrationError(f"the source sent {frame.size} bytes as {total} pages")
    for first, count in runs:
        wire.read_into(machine.memory.pages(first, count))


def _checked_runs(runs: Any, pages: int) -> list[tuple[int, int]]:
    """Return runs of pages, first and number, that all lie in RAM; raises MigrationError for others."""
    if not isinstance(runs, list):
        raise MigrationError("the source sent pages without saying where they belong")
    for run in runs:
        if not (isinstance(run, list) and len(run) == 2 and all(type(one) is int and one >= 0 for one in run)):
            raise MigrationError(f"the source sent pages for {run!r}")
        if sum(run) > pages:
            raise MigrationError(f"the source sent page {sum(run) - 1} of {pages}")
    return [(first, count) for first, count in runs]

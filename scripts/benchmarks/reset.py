"""Setting a running machine back to a checkpoint, beside a C program that does the same ioctls and copies."""

from __future__ import annotations

import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import compiled, output_of
from hypervisor import Machine, MachineConfig, kernels
from hypervisor.kvm import Kvm
from hypervisor.snapshot.rewind import Devices, Rewind

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.tools import Settings

GUEST: Final = "reset-bench"
RAM_MIB: Final = 128
PAGES: Final = 100
CHECKPOINT: Final = 0x5658
"""The guest's port: a checkpoint may be taken; and the one behind it: so many pages have been written."""
REACH: Final = 1 / 0.8
C_PROGRAM: Final = "minimal C program"
TIMEOUT: Final = 120.0


class Resets(NamedTuple):
    """What a reset took in a round, in microseconds: medians of the whole and of its parts.

    Medians, because on a busy machine some are interrupted for longer than they take.
    """

    whole: float
    guest: float
    pages: float
    state: float


class Points:
    """The guest's two ports. At the second one the machine is set back, by the vCPU's own thread or by another one."""

    def __init__(self, machine: Machine, *, apart: bool) -> None:
        """Serve `machine`; `apart`: leave the resets to `reset_from_here`."""
        self._machine = machine
        self._vcpu = machine.vcpus[0]
        self._apart = apart
        self._is_there = threading.Semaphore(0)
        self._left = 0
        self._since = 0
        self.rewind: Rewind | None = None
        self.spent: list[list[int]] = [[], [], []]  # ns: the guest, with the way out and in again; pages; KVM's state
        self.trouble = ""

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the Device protocol's signature
        """Answer 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - the same
        """Take the guest's word that it has come so far."""
        if offset == 0:
            if self.rewind is None:
                self._vcpu.post(self._take)
        elif value != 1:
            self.trouble = f"the guest was not set back: {value}"
            self._machine.kill()
        elif self._apart:
            self._vcpu.request_pause()
            self._is_there.release()
        else:
            self._vcpu.post(self._back)

    def _take(self) -> None:
        with Kvm() as kvm:
            msrs = kvm.msr_indices()
        hooks = Devices(self._arrive, lambda: self._note(1), lambda: self._note(2))
        vm = self._machine._vm  # noqa: SLF001 - to be what a machine is
        self.rewind = Rewind(vm, self._machine.memory.marks, msrs, devices=hooks)

    def _arrive(self) -> None:
        if self._since:
            self._note(0)
        self._since = time.perf_counter_ns()

    def _note(self, part: int) -> None:
        now = time.perf_counter_ns()
        self.spent[part].append(now - self._since)
        self._since = now

    def _reset(self) -> None:
        copied = self.rewind.reset() if self.rewind is not None else 0
        if copied < PAGES:
            self.trouble = f"{copied} pages were copied back"

    def begin(self, resets: int) -> None:
        """Say how many resets are to come; the first one warms up."""
        self._left = resets + 1

    def _back(self) -> None:
        self._reset()
        self._count()

    def _count(self) -> None:
        self._left -= 1
        if not self._left:
            self._machine.kill() if self._apart else self._vcpu.request_end()
            self._is_there.release()

    def wait(self) -> None:
        """Wait for the last reset; with `apart` do all of them."""
        while self._left:
            if not self._is_there.acquire(timeout=TIMEOUT) or self.trouble:
                raise CannotRunError(self.trouble or "the guest does not come on")
            if self._apart:
                self._machine.pause()
                self._back()
                self._machine.resume()


def ours(resets: int, *, apart: bool) -> Resets:
    """Run the guest under hv."""
    with Machine(MachineConfig(GUEST, ram_mib=RAM_MIB)) as machine:
        points = Points(machine, apart=apart)
        machine.bus_pio.claim(CHECKPOINT, 2, points, "points")
        points.begin(resets)
        machine.start()
        points.wait()
        if points.trouble:
            raise CannotRunError(points.trouble)
        if points.rewind is not None:
            points.rewind.close()
    guest, pages, state = points.spent
    rows = list(zip(guest, pages[1:], state[1:], strict=True))  # the first reset warms up, and has no way before it
    return Resets(*(median(part) / 1e3 for part in ([sum(row) for row in rows], *zip(*rows, strict=True))))


def theirs(program: Path, guest: Path, resets: int) -> Resets:
    """Run the guest under the C program."""
    words = [program, guest, str(RAM_MIB), hex(CHECKPOINT), hex(CHECKPOINT + 1), str(resets)]
    copied, *parts = map(int, output_of(words).split())
    if copied < PAGES * resets:
        raise CannotRunError(f"the C program copied {copied} pages in {resets} resets")
    return Resets(*(ns / 1e3 for ns in parts))


def measure(settings: Settings, name: str) -> list[Row]:
    """Set machines back, by both sides in turn in every round."""
    program = compiled("minimal_reset.c")
    guest = kernels.ensure(GUEST)
    resets = settings.pick(300, 100)
    here, apart, c = [], [], []
    for _ in range(settings.pick(30, 3)):
        c.append(theirs(program, guest, resets))
        here.append(ours(resets, apart=False))
        apart.append(ours(resets, apart=True))

    def row(what: str, runs: list[Resets], part: str, reach: float | None = None) -> Row:
        samples = [Sample("us", [getattr(run, part) for run in side]) for side in (runs, c)]
        return Row(name, what, *samples, C_PROGRAM, reach, "min")

    return [
        row(f"{RAM_MIB} MiB, {PAGES} changed pages: to the same point again", here, "whole", REACH),
        row("of it: the guest, out and in again", here, "guest"),
        row("of it: log and copying", here, "pages"),
        row("of it: KVM's state", here, "state"),
        row("asked for by another thread: pause, reset, resume", apart, "whole"),
    ]

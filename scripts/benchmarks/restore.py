"""Going on from a snapshot: to the first instruction, beside a C program; and what a hundred copies take."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from benchmarks.reset import C_PROGRAM, CHECKPOINT, GUEST, RAM_MIB
from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import compiled, output_of
from hypervisor import Machine, MachineConfig, kernels
from hypervisor.snapshot.store import Snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.tools import Settings

RESTORE_REACH: Final = 2.0
CLONES: Final = 100
CLONE_RAM_MIB: Final = 256
CLONE_REACH_MIB: Final = 12
PACKED_RAM_MIB: Final = 1024
FREE_MIB: Final = 64
"""Where nothing of the guest's is."""
PAGE: Final = 4096
TIMEOUT: Final = 60.0


class Arrival:
    """The guest's port: when it is written to the guest has run."""

    def __init__(self) -> None:
        """Wait for the guest."""
        self.at = 0
        self.is_there = threading.Event()

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the Device protocol's signature
        """Answer 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - the same
        """Note the moment."""
        if not self.at:
            self.at = time.perf_counter_ns()
            self.is_there.set()


def saved(path: Path, ram_mib: int, *, packed: bool = False) -> None:
    """Save the guest behind its first write to the port; packed: with something in all of its memory, compressed."""
    arrival = Arrival()
    with Machine(MachineConfig(GUEST, ram_mib=ram_mib)) as machine:
        machine.bus_pio.claim(CHECKPOINT, 1, arrival, "point")
        machine.start()
        if not arrival.is_there.wait(TIMEOUT):
            raise CannotRunError("the guest does not come on")
        machine.pause()
        if packed:
            for first in range(FREE_MIB << 20, ram_mib << 20, PAGE):
                machine.memory.write(first, first.to_bytes(8, "little") + bytes(range(256)) * 8)
        machine.save(path, compress=packed)


def ours(snapshot: Snapshot | Path, *, lazy: bool = False) -> float:
    """Restore a machine and return the microseconds until its guest has run."""
    arrival = Arrival()
    began = time.perf_counter_ns()
    with Machine.restore(snapshot, verify=False, lazy=lazy) as machine:
        machine.bus_pio.claim(CHECKPOINT, 2, arrival, "point")
        machine.start()
        if not arrival.is_there.wait(TIMEOUT):
            raise CannotRunError("the restored guest does not come on")
    return (arrival.at - began) / 1e3


def theirs(program: Path, guest: Path, rounds: int, memory: Path) -> list[float]:
    """Have the C program map the memory and set the state, again and again."""
    words = [program, guest, str(RAM_MIB), hex(CHECKPOINT), hex(CHECKPOINT + 1), str(rounds), memory]
    return [int(ns) / 1e3 for ns in output_of(words).split()]


def measure(settings: Settings, name: str) -> list[Row]:
    """Restore in turn with the C program."""
    if name == "clones":
        return [clones(settings, name)]
    program, guest = compiled("minimal_reset.c"), kernels.ensure(GUEST)
    path = settings.scratch / "restored"
    saved(path, RAM_MIB)
    here: list[float] = []
    c: list[float] = []
    with Snapshot.open(path) as snapshot:
        for _ in range(settings.pick(30, 3)):
            c += theirs(program, guest, 3, settings.scratch / "memory")
            here += [ours(snapshot) for _ in range(3)]
    what = f"{RAM_MIB} MiB, verified before: from the snapshot to the guest's first access"
    return [
        Row(name, what, Sample("us", here), Sample("us", c), C_PROGRAM, RESTORE_REACH, "min"),
        compressed(settings, name),
    ]


def compressed(settings: Settings, name: str) -> Row:
    """Restore a large compressed machine lazily, in turn with unpacking it first."""
    path = settings.scratch / "compressed"
    saved(path, PACKED_RAM_MIB, packed=True)
    lazily: list[float] = []
    first: list[float] = []
    for _ in range(settings.pick(5, 1)):
        lazily.append(ours(path, lazy=True) / 1e3)
        first.append(ours(path) / 1e3)
    what = f"{PACKED_RAM_MIB} MiB, compressed: to the guest's first access, lazily"
    return Row(name, what, Sample("ms", lazily), Sample("ms", first), "unpacked first")


def clones(settings: Settings, name: str) -> Row:
    """Let many machines go on from one snapshot at once, and say what each of them takes."""
    path = settings.scratch / "cloned"
    saved(path, CLONE_RAM_MIB)
    count = settings.pick(CLONES, 10)
    machines: list[Machine] = []
    try:
        with Snapshot.open(path) as snapshot:
            before = _unshared()
            for number in range(count):
                machine = Machine.restore(snapshot, clone=True, verify=number == 0)
                machines.append(machine)
                arrival = Arrival()
                machine.bus_pio.claim(CHECKPOINT, 2, arrival, "point")
                machine.start()
                if not arrival.is_there.wait(TIMEOUT):
                    raise CannotRunError("a clone's guest does not come on")
                machine.pause()
            taken = (_unshared() - before) / count / (1 << 20)
    finally:
        for machine in machines:
            machine.close()
    what = f"each of {count} clones of one {CLONE_RAM_MIB} MiB snapshot, what it wrote included"
    return Row(name, what, Sample("MiB", [taken]), reach=CLONE_REACH_MIB)


def _unshared() -> int:
    """Return the bytes of memory that are this process's alone (proc(5), smaps_rollup)."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        rows = dict(line.split(":", 1) for line in file if ":" in line)
    return sum(int(rows[key].split()[0]) << 10 for key in ("Private_Clean", "Private_Dirty", "Swap"))

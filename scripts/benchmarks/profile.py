"""What recording costs a guest that does nothing but exit, how large its profile is, and how long a report takes."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Final

from benchmarks import guests
from benchmarks.exits import Marks, claim_handler
from benchmarks.linux_boot import COMMAND_LINE, RAM_MIB, TIMEOUT_S, initramfs
from benchmarks.profile_file import write_profile
from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import HERE, ROOT, environment, output_of
from hypervisor import Machine, MachineConfig, kernels
from hypervisor.profile.file import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.tools import Settings

TARGET_COUNTS: Final = 1.05
TARGET_TRACE: Final = 1.25
TARGET_BOOT: Final = 1.05
INSIDE: Final = "scripts/benchmarks/in_host_profile.py"
TARGET_BYTES: Final = 25.0
"""A record has 24 bytes; the rest is what all exits of a run share."""
TARGET_SECONDS: Final = 10.0
TARGET_MIB: Final = 500.0
MODES: Final = ("off", "counts", "places", "trace")
"""Nothing recorded; what is always on; counts with the place of every exit; every exit in a file."""


def claim_nothing(machine: Machine) -> None:
    """Leave the tested port to the run loop in C, which drops what is written there."""
    del machine


CASES: Final[tuple[tuple[str, Callable[[Machine], None]], ...]] = (
    ("OUT answered in C", claim_nothing),
    ("OUT to a Python handler", claim_handler),
)


def loop_us(guest: bytes, exits: int, mode: str, prepare: Callable[[Machine], None], path: str) -> float:
    """Run the guest and return microseconds an exit; "trace" leaves its profile in `path`."""
    marks = Marks()
    with Machine(MachineConfig(kernel=guest, flat=32, ram_mib=2, debug_exit="raw")) as machine:
        machine.bus_pio.claim(guests.MARK, 1, marks, "marks")
        prepare(machine)
        for vcpu in machine.vcpus:
            vcpu.handle.set_recording(mode != "off")
            vcpu.handle.sample_places(mode == "places")
        if mode == "trace":
            machine.record(path)
        outcome = machine.run(timeout=120)
    if outcome.status != 0 or len(marks.at) != 2:
        raise CannotRunError(f"{mode}: hv ended with {outcome!r}")
    return (marks.at[1] - marks.at[0]) / exits / 1e3


def measure_costs(settings: Settings, name: str) -> list[Row]:
    """Run both loops in every mode, all of them in turn in every round."""
    exits = 20_000
    rounds = settings.pick(60, 3)
    guest = guests.loop(guests.OUT, guests.PORT, exits)
    path = str(settings.scratch / "loop.hvprof")
    times = {(what, mode): Sample("us", []) for what, _ in CASES for mode in MODES}
    for turn in range(rounds):
        for what, prepare in CASES:
            for step in range(len(MODES)):
                mode = MODES[(turn + step) % len(MODES)]
                times[what, mode].values.append(loop_us(guest, exits, mode, prepare, path))
    return [
        Row(name, f"{what}: {label}", times[what, mode], times[what, "off"], "nothing recorded", reach, "min")
        for what, _ in CASES
        for mode, label, reach in (
            ("counts", "counts and histograms", TARGET_COUNTS),
            ("places", "and the place of every exit", None),
            ("trace", "and every exit in a file", TARGET_TRACE),
        )
    ]


def measure_files(settings: Settings, name: str) -> list[Row]:
    """Trace a loop that fills the ring between guest and file several times over, and look at what was written."""
    exits = settings.pick(400_000, 100_000)
    guest = guests.loop(guests.OUT, guests.PORT, exits)
    path = str(settings.scratch / "file.hvprof")
    dropped, size = Sample("", []), Sample("B", [])
    for _ in range(settings.pick(5, 1)):
        loop_us(guest, exits, "trace", claim_nothing, path)
        size.values.append(os.path.getsize(path) / exits)
        dropped.values.append(lost(path, exits))
    return [
        Row(name, "exits of a flood that its trace lacks", dropped, reach=0),
        Row(name, "a profile's size, an exit", size, reach=TARGET_BYTES),
    ]


def lost(path: str, exits: int) -> int:
    """Return how many exits the trace in a profile lacks.

    Raises:
        CannotRunError: fewer were even counted than there were.
    """
    profile = load(path)
    counted = profile.exits.layer("user").count
    if counted < exits:
        raise CannotRunError(f"only {counted} of {exits} exits were counted")
    return counted - sum(len(chunk.row) for chunk in profile.trace())


def measure_reading(settings: Settings, name: str) -> list[Row]:
    """Read profiles of ten million exits in processes of their own."""
    exits = settings.pick(10_000_000, 1_000_000)
    rows = []
    for what, whole in (("", True), (" of a killed run", False)):
        path = settings.scratch / "large.hvprof"
        write_profile(path, exits, whole=whole)
        seconds, mib = Sample("s", []), Sample("MiB", [])
        for _ in range(settings.pick(3, 1)):
            taken, peak = reading(path, exits)
            seconds.values.append(taken)
            mib.values.append(peak)
        path.unlink()
        label = f"reading {exits / 1e6:g} M exits{what}"
        rows += [
            Row(name, f"{label}: time", seconds, reach=TARGET_SECONDS, by="min"),
            Row(name, f"{label}: memory", mib, reach=TARGET_MIB),
        ]
    return rows


def reading(path: Path, exits: int) -> tuple[float, float]:
    """Read a profile; return seconds from the process's start to its end, and MiB at its peak, the file's included."""
    words = [sys.executable, str(HERE / "read_profile.py"), str(ROOT), str(path), str(exits)]
    started = time.perf_counter()
    pid = os.posix_spawn(words[0], words, environment())
    _, status, usage = os.wait4(pid, 0)
    taken = time.perf_counter() - started
    if status:
        raise CannotRunError(f"reading {path.name} ended with {os.waitstatus_to_exitcode(status)}")
    return taken, usage.ru_maxrss / 1024


def measure_boot(settings: Settings, name: str) -> list[Row]:
    """Boot Debian in one emulated host, with a profile of every exit and without one, in turn."""
    kernels.ensure("debian")
    archive = settings.scratch / "init.cpio"
    archive.write_bytes(initramfs())
    kernel = kernels.vmlinux("debian")
    words = [kernel, archive, COMMAND_LINE, str(RAM_MIB), str(settings.pick(6, 1))]
    settings.say("bench: booting the emulated host; then two boots of Debian in it for every round")
    host = [ROOT / "scripts" / "emulated-host", f"--with={kernel}", f"--with={archive}", "--", "python3", INSIDE]
    printed = output_of([*host, *words], timeout=TIMEOUT_S)
    try:
        times = json.loads(printed)
    except ValueError as error:
        raise CannotRunError(f"the emulated host printed {printed!r}") from error
    profiled, plain, endings = (
        Sample("s", [us / 1e6 for us in times[side]]) for side in ("profiled", "plain", "endings")
    )
    what = f"Debian's kernel, quiet, entry to /init, {times['exits']} exits in a file"
    return [
        Row(name, what, profiled, plain, "without --profile", TARGET_BOOT),
        Row(name, "and then: names from its memory, the file's end", endings),
    ]


def measure(settings: Settings, name: str) -> list[Row]:
    """Run the benchmark called `name`."""
    if name == "profile-boot":
        return measure_boot(settings, name)
    return measure_costs(settings, name) + measure_files(settings, name) + measure_reading(settings, name)

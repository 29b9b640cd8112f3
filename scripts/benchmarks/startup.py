"""A guest that exits at once: the whole process, start to end, beside QEMU with the same multiboot guest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import hv, whole_run_ms
from hypervisor import kernels

if TYPE_CHECKING:
    from benchmarks.tools import Settings

TARGET: Final = 1.0
RAM_MIB: Final = "128"
QBOOT: Final = Path("/usr/share/qemu/qboot.rom")
DEBUG_EXIT_STATUS: Final = 1
"""What isa-debug-exit makes of a zero, (0 << 1) | 1, in hv as in QEMU."""


def qemu(kernel: Path, machine: str, *more: str) -> list[str]:
    """Return the command that runs the guest under QEMU's leanest settings for this machine type."""
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise CannotRunError("there is no QEMU: install qemu-system-x86")
    accelerated = ["-M", machine, "-accel", "kvm", "-m", RAM_MIB, "-nodefaults", "-no-user-config", "-display", "none"]
    ending = ["-no-reboot", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    return [program, *accelerated, *ending, *more, "-kernel", str(kernel)]


def measure(settings: Settings, name: str) -> list[Row]:
    """Run hv and QEMU in turn."""
    kernel = kernels.ensure("exit")
    commands = {"hv": [str(hv()), "run", str(kernel), "--ram", RAM_MIB], "QEMU microvm": qemu(kernel, "microvm")}
    if QBOOT.exists():  # `pc` with its own firmware takes seconds on a software KVM
        commands["QEMU pc, qboot"] = qemu(kernel, "pc", "-bios", str(QBOOT))
    samples = {what: Sample("ms", []) for what in commands}
    rounds = settings.pick(30, 5)
    for turn in range(rounds + 1):
        for what, command in commands.items():
            taken = whole_run_ms(command, DEBUG_EXIT_STATUS)
            if turn:  # the first round fills caches, for all of them
                samples[what].values.append(taken)
    ours = samples.pop("hv")
    return [Row(name, "hv run exit, whole process", ours, theirs, what, TARGET) for what, theirs in samples.items()]

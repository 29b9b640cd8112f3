"""What hv takes and what it leaves: its own memory, and descriptors, threads and mappings after many machines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import HERE, ROOT, environment, hv, output_of
from hypervisor import kernels

if TYPE_CHECKING:
    from benchmarks.tools import Settings

TARGET_MIB: Final = 40
RAM_MIB: Final = 128
MACHINES: Final = 16
SETTLE_S: Final = 1.0
"""By then the guest has long halted and hv waits for it."""


def own_pss_kib(pid: int) -> float:
    """Return the proportional set size of a process in KiB, less the mapping that is the guest's RAM."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    whole = float(rollup.partition("\nPss:")[2].split()[0])
    ram, is_ram, found = 0.0, False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word == "Size:":
            # The kernel may have joined a small neighbour to it; nothing else of hv is nearly as large.
            is_ram = RAM_MIB << 10 <= int(rest.split()[0]) < (RAM_MIB + 16) << 10
            found += is_ram
        elif word == "Pss:" and is_ram:
            ram += float(rest.split()[0])
    if found != 1:
        raise CannotRunError(f"{found} mappings of hv could be the guest's RAM")
    return whole - ram


def measure_memory(settings: Settings, name: str) -> list[Row]:
    """Run a guest that halts for ever and look at hv meanwhile."""
    command: list[str | Path] = [hv(), "run", kernels.ensure("halt"), "--ram", str(RAM_MIB)]
    sample = Sample("MiB", [])
    for _ in range(settings.pick(3, 1)):
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment()
        ) as process:
            time.sleep(SETTLE_S)
            if process.poll() is not None:
                raise CannotRunError(f"hv ended with {process.returncode} instead of running")
            try:
                sample.values.append(own_pss_kib(process.pid) / 1024)
            finally:
                process.kill()
    return [Row(name, f"PSS less guest RAM, 1 vCPU, {RAM_MIB} MiB", sample, reach=TARGET_MIB)]


def measure_machines(name: str) -> list[Row]:
    """Run the machines in a process of their own and count what is left of them."""
    command: list[str | Path] = [sys.executable, HERE / "sixteen.py", ROOT, kernels.ensure("exit"), str(MACHINES)]
    left: dict[str, float] = json.loads(output_of(command))
    return [
        Row(name, f"{what} left by {MACHINES} machines in one process", Sample("", [count]), reach=0)
        for what, count in left.items()
    ]


def measure(settings: Settings, name: str) -> list[Row]:
    """Run the benchmark called `name`."""
    return measure_memory(settings, name) if name == "memory" else measure_machines(name)

"""A virtio disk driven from ring 3, the same guest under hv and under QEMU's microvm: time and exits."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Final

from benchmarks.startup import DEBUG_EXIT_STATUS, qemu
from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import hv
from hypervisor import Machine, MachineConfig, kernels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.tools import Settings

DISK_MIB: Final = 256
RESULT: Final = re.compile(r"requests (\d+) ticks (\d+) kicks (\d+)")
PATTERNS: Final = (
    # what, requests, depth, size, write, random, reach: ours over theirs in time
    ("4 KiB random read, depth 1", 4000, 1, 4096, 0, 1, 1 / 0.8),
    ("4 KiB random read, depth 32", 20000, 32, 4096, 0, 1, 1 / 0.8),
    ("128 KiB sequential read, depth 4", 2000, 4, 1 << 17, 0, 0, 1.0),
    ("128 KiB sequential write, depth 4", 2000, 4, 1 << 17, 1, 0, 1.0),
    ("1 MiB sequential read, depth 4", 400, 4, 1 << 20, 0, 0, 1.0),
    ("1 MiB sequential write, depth 4", 400, 4, 1 << 20, 1, 0, 1.0),
)


def _mhz() -> float:
    """Return the TSC's frequency, as the kernel shows it on machines whose TSC is constant."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        found = re.search(r"cpu MHz\s*:\s*([\d.]+)", file.read())
    if found is None:
        raise CannotRunError("/proc/cpuinfo does not tell the TSC's frequency")
    return float(found[1])


def _run(command: Sequence[str | Path], mhz: float) -> float:
    """Run the guest and return microseconds a request."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL)
    found = RESULT.search(done.stdout)
    if done.returncode != DEBUG_EXIT_STATUS or found is None:
        raise CannotRunError(
            f"{os.path.basename(command[0])} ended with status {done.returncode}: {done.stderr.strip()}"
        )
    return int(found[2]) / mhz / int(found[1])


def _commands(kernel: Path, disk: Path, words: str) -> dict[str, list[str]]:
    ours = [str(hv()), "run", str(kernel), "--ram", "128", "--virtio", "mmio", "--disk", str(disk), "--append", words]
    drive = ["-drive", f"id=d,file={disk},format=raw,if=none", "-device", "virtio-blk-device,drive=d"]
    more = ["-serial", "stdio", "-global", "virtio-mmio.force-legacy=false", *drive, "-append", words]
    theirs = qemu(kernel, "microvm,auto-kernel-cmdline=off", *more)
    return {"hv": ours, "QEMU microvm": theirs}


def _exits(settings: Settings, name: str, kernel: Path, disk: Path) -> Row:
    """Count exits to user space for 1000 requests more."""
    ours, theirs = [], []
    for requests in (1000, 2000):
        words = f"{requests} 32 4096 0 1"
        config = MachineConfig(str(kernel), ram_mib=128, virtio="mmio", disks=[str(disk)], append=words)
        with Machine(config) as machine:
            machine.run(timeout=60)
            ours.append(sum(machine.vcpus[0].handle.exit_counts.values()))
        trace = settings.scratch / "trace"
        command = _commands(kernel, disk, words)["QEMU microvm"]
        _run([*command, "-trace", f"kvm_run_exit,file={trace}"], 1.0)
        theirs.append(trace.read_text().count("kvm_run_exit"))
        trace.unlink()
    most = theirs[1] - theirs[0]
    what = f"exits to user space per 1000 requests, depth 32 (QEMU microvm: {most})"
    return Row(name, what, Sample("", [ours[1] - ours[0]]), None, "", most)


def measure(settings: Settings, name: str) -> list[Row]:
    """Run each pattern in alternating rounds."""
    kernel = kernels.ensure("virtio-blk-bench")
    mhz = _mhz()
    disk = settings.scratch / "disk"
    with open(disk, "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(DISK_MIB))
    rows = [_exits(settings, name, kernel, disk)]
    for what, count, depth, size, write, random, reach in PATTERNS:
        requests = settings.pick(count, count // 10)
        commands = _commands(kernel, disk, f"{requests} {depth} {size} {write} {random}")
        times = {who: Sample("us", []) for who in commands}
        for _ in range(settings.pick(9, 2)):
            for who, command in commands.items():
                times[who].values.append(_run(command, mhz))
        ours = times.pop("hv")
        rows += [Row(name, what, ours, theirs, against, reach) for against, theirs in times.items()]
    return rows

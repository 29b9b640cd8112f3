"""A virtio disk driven from ring 3, the same guest under hv and its peers: time, exits, processor time."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING, Final

from benchmarks.peers import PAIRS, Device, Held, Peers, mhz
from benchmarks.startup import DEBUG_EXIT_STATUS, RAM_MIB
from benchmarks.table import CannotRunError, Row, Sample
from hypervisor import Machine, MachineConfig, kernels

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.tools import Settings

GUEST: Final = "virtio-blk-bench"
DISK_MIB: Final = 256
GIB: Final = 1 << 30
RESULT: Final = re.compile(r"^requests (\d+) ticks (\d+) kicks (\d+)$", re.MULTILINE)
PATTERNS: Final = (
    # what, requests, depth, size, write, random, reach: ours over theirs in time
    ("4 KiB random read, depth 1", 4000, 1, 4096, 0, 1, 1 / 0.8),
    ("4 KiB random read, depth 32", 20000, 32, 4096, 0, 1, 1 / 0.8),
    ("128 KiB sequential read, depth 4", 2000, 4, 1 << 17, 0, 0, 1.0),
    ("128 KiB sequential write, depth 4", 2000, 4, 1 << 17, 1, 0, 1.0),
    ("1 MiB sequential read, depth 4", 400, 4, 1 << 20, 0, 0, 1.0),
    ("1 MiB sequential write, depth 4", 400, 4, 1 << 20, 1, 0, 1.0),
)
SHARES: Final = (("128 KiB", 1 << 17), ("1 MiB", 1 << 20))
SHARE_REACH: Final = 1.2


def _device(disk: Path) -> Device:
    drive = ["-drive", f"id=d,file={disk},format=raw,if=none"]
    return Device(
        ["--disk", str(disk)], drive, "virtio-blk-device,drive=d", "virtio-blk-pci,drive=d", ["-d", str(disk)]
    )


def _exits(settings: Settings, name: str, peers: Peers, disk: Path) -> list[Row]:
    """Count exits to user space for 10000 requests more."""
    rows = []
    trace = settings.scratch / "trace"
    for _, against, virtio in PAIRS[:2]:
        ours, theirs = [], []
        for requests in (1000, 11000):
            words = f"{requests} 32 4096 0 1"
            config = MachineConfig(GUEST, ram_mib=int(RAM_MIB), virtio=virtio, disks=[str(disk)], append=words)
            with Machine(config) as machine:
                machine.run(timeout=60)
                ours.append(sum(machine.vcpus[0].handle.exit_counts.values()))
            command = [*peers.commands(words)[against], "-trace", f"kvm_run_exit,file={trace}"]
            done = subprocess.run(command, capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
            if done.returncode != DEBUG_EXIT_STATUS:
                raise CannotRunError(f"{against} ended with status {done.returncode}: {done.stderr.decode().strip()}")
            theirs.append(trace.read_text().count("kvm_run_exit"))
            trace.unlink()
        mine, most = (max(0, round((counts[1] - counts[0]) / 10)) for counts in (ours, theirs))
        what = f"exits to user space per 1000 requests, depth 32, {virtio} ({against}: {most})"
        rows.append(Row(name, what, Sample("", [mine]), None, "", most))
    return rows


def _time_us(scratch: Path, command: list[str], megahertz: float) -> float:
    """Run the guest and return microseconds a request."""
    with Held(command, scratch) as run:
        found = run.measure(RESULT)
    return int(found[2]) / megahertz / int(found[1])


def _share_ms(scratch: Path, command: list[str], moved: int) -> float:
    """Run the guest and return the milliseconds of a processor that the VMM took for each GiB that was moved.

    The vCPU's thread is left out, on both sides: the guest polls, and takes all the time that there is.
    """
    with Held(command, scratch) as run:
        vcpu = run.vcpu()
        before = run.thread_ns()
        run.measure(RESULT)
        after = run.thread_ns()
    return sum(ns - before.get(thread, 0) for thread, ns in after.items() if thread != vcpu) / 1e6 / (moved / GIB)


def measure(settings: Settings, name: str) -> list[Row]:
    """Run each pattern in alternating rounds."""
    megahertz = mhz()
    scratch, disk = settings.scratch, settings.scratch / "disk"
    with open(disk, "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(DISK_MIB))
    peers = Peers(settings, kernels.ensure(GUEST), _device(disk))
    rows = _exits(settings, name, peers, disk)
    rounds = settings.pick(9, 2)
    for what, count, depth, size, write, random, reach in PATTERNS:
        words = f"{settings.pick(count, count // 10)} {depth} {size} {write} {random} 1"
        rows += peers.compare(
            name, what, reach, words, rounds, "us", lambda command: _time_us(scratch, command, megahertz)
        )
    for what, size in SHARES:
        moved = settings.pick(4, 1) * GIB
        rows += peers.compare(
            name,
            f"VMM processor time per GiB, {what} sequential read",
            SHARE_REACH,
            f"{moved // size} 4 {size} 0 0 1",
            rounds,
            "ms",
            lambda command, moved=moved: _share_ms(scratch, command, moved),  # type: ignore[misc]
        )
    return rows

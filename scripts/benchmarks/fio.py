"""fio on a virtio disk of a guest with Debian's kernel, beside fio on a loop device over the same file, without a VMM.

Both run in the emulated host, in alternating rounds. `python3 -m benchmarks.fio KERNEL INITRD ROUNDS SECONDS` is what
runs there: it prints JSON, for each side and job a list, one entry a round, of microseconds a request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import ROOT, output_of
from hypervisor import Machine, MachineConfig, kernels

if TYPE_CHECKING:
    from benchmarks.tools import Settings

DISK_MIB: Final = 256
RAM_MIB: Final = 512
TIMEOUT_S: Final = 1800
JOB_S: Final = 240
"""A job in the guest takes far less, on the slowest machine that was seen."""
PROMPT: Final = r"/ # (\x1b\[6n)?\Z"
COMMAND_LINE: Final = "console=ttyS0 quiet panic=-1 cryptomgr.notests root=/dev/vda rw init=/bin/busybox -- sh"
TERSE_ERROR: Final = 4
TERSE_READ: Final = 5
TERSE_WRITE: Final = 46
TERSE_RUNTIME: Final = 3
"""Fields of a line of `fio --minimal`, from 0: each way begins with KiB done; three further are its milliseconds (fio's
HOWTO, "Terse output", version 3)."""


class Job(NamedTuple):
    """What fio is told to do."""

    name: str
    rw: str
    kib: int
    depth: int
    direct: int

    def command(self, device: str, engine: str, seconds: int) -> str:
        """Return the command, which prints one line."""
        return (
            f"fio --minimal --name=job --filename={device} --rw={self.rw} --bs={self.kib}k --iodepth={self.depth}"
            f" --direct={self.direct} --ioengine={engine} --runtime={seconds} --randseed=7"
        )

    def us(self, line: str) -> float:
        """Return microseconds a request from what fio printed."""
        fields = line.strip().split(";")
        if len(fields) <= TERSE_WRITE + TERSE_RUNTIME or fields[TERSE_ERROR] != "0":
            sys.exit(f"fio printed {line!r}")
        at = TERSE_WRITE if self.rw == "write" else TERSE_READ
        return int(fields[at + TERSE_RUNTIME]) * 1000 / (int(fields[at]) / self.kib)


JOBS: Final = (
    Job("4 KiB random read, depth 1, direct", "randread", 4, 1, 1),
    Job("4 KiB random read, depth 32, direct", "randread", 4, 32, 1),
    Job("4 KiB random read, buffered", "randread", 4, 1, 0),  # it is done one by one whatever the depth
    Job("128 KiB sequential read, depth 4, direct", "read", 128, 4, 1),
    Job("128 KiB sequential read, buffered", "read", 128, 1, 0),
    Job("128 KiB sequential write, depth 4, direct", "write", 128, 4, 1),
)
"""Direct is past the page cache of the kernel that fio runs on. The file itself is in the host's memory either way."""


def inside(kernel: str, initrd: str, rounds: int, seconds: int) -> dict[str, list[list[float]]]:
    """Measure, inside the emulated host."""
    disk = "/dev/shm/disk"  # noqa: S108 - a host of our own
    with open(disk, "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(DISK_MIB))
    subprocess.run(["modprobe", "loop"], check=True)
    loop = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["losetup", loop, disk], check=True)
    listed = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=True).stdout
    engine = "libaio" if "libaio" in listed else "psync"
    root = next(word[5:] for word in Path("/proc/cmdline").read_text().split() if word.startswith("root="))
    disks = [f"{root},overlay=memory", f"{disk},format=raw"]
    times: dict[str, list[list[float]]] = {"ours": [[] for _ in JOBS], "theirs": [[] for _ in JOBS]}
    config = MachineConfig(kernel, initrd=initrd, append=COMMAND_LINE, disks=disks, ram_mib=RAM_MIB, decompress="host")
    with Machine(config) as machine:
        machine.start()
        console = machine.console
        console.expect(PROMPT, timeout=JOB_S)
        for _ in range(rounds):
            for number, job in enumerate(JOBS):
                # the marks are written so that the echo of the command line does not match them
                console.write(f"echo BE''GIN; {job.command('/dev/vdb', engine, seconds)} 2>&1; echo EN''D\n")
                said = console.expect(rb"(?s)BEGIN\r\n(.*?)END\r\n", timeout=JOB_S)
                times["ours"][number].append(job.us(said[1].decode()))
                words = job.command(loop, engine, seconds).split()
                plain = subprocess.run(words, capture_output=True, text=True, check=True, timeout=JOB_S).stdout
                times["theirs"][number].append(job.us(plain))
    return times


def measure(settings: Settings, name: str) -> list[Row]:
    """Run it all inside one emulated host."""
    kernels.ensure("debian")
    files = [kernels.path("debian"), kernels.default_initramfs("debian")]
    options = [*(f"--with={file}" for file in files), "--env=PYTHONPATH=/checkout:/checkout/scripts"]
    numbers = [str(settings.pick(3, 1)), str(settings.pick(3, 1))]
    words = ["--", "python3", "-m", "benchmarks.fio", *files, *numbers]
    settings.say("bench: booting the emulated host, and a guest in it; then fio in both, in turn")
    printed = output_of([ROOT / "scripts" / "emulated-host", *options, *words], timeout=TIMEOUT_S)
    try:
        times = json.loads(printed)
    except ValueError as error:
        raise CannotRunError(f"the emulated host printed {printed!r}") from error
    rows = zip(JOBS, times["ours"], times["theirs"], strict=True)
    return [Row(name, job.name, Sample("us", ours), Sample("us", theirs), "loop device") for job, ours, theirs in rows]


if __name__ == "__main__":
    print(json.dumps(inside(*sys.argv[1:3], *map(int, sys.argv[3:]))))

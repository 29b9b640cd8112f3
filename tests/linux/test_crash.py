"""The file system that survives: ext4 on a disk whose power goes at random moments.

One guest writes transactions and says which are done. At random moments the host takes down what the disk might hold if
the power went, and what the guest had said by then. Each of these disks is then repaired from its journal alone, must
be clean, and must hold every transaction that was said to be done, whole.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from linux_shell import BOOT_SECONDS, QUIET
from memory_image import MemoryImage

from devices.backends.faults import FaultyImage
from hypervisor import Machine, MachineConfig, initramfs

pytestmark = pytest.mark.hardware

MIB = 1 << 20
SIZE = 8 * MIB
LINES = 30
KEPT = 12
"""Transactions that are there at one time; the guest removes the older ones."""
CHECKED = 6
"""Of those that are done, so many are looked for: the guest may be ahead of what has come out of its console."""
SCRIPT = f"""#!/bin/sh
mount -t ext4 -o data=$(sed 's/.*fsmode=\\([a-z]*\\).*/\\1/' /proc/cmdline) /dev/vda /mnt || echo cannot mount
n=$(ls /mnt | sed -n 's/^t\\([0-9]*\\)$/\\1/p' | sort -n | tail -n 1)
n=${{n:-0}}
echo MOUNTED
while true; do
    n=$((n + 1))
    {{ i=0; while [ $i -lt {LINES} ]; do echo "transaction $n line $i of this file"; i=$((i + 1)); done; }} |
        dd of=/mnt/new conv=fsync 2>/dev/null
    mv /mnt/new /mnt/t$n
    sync
    echo "DONE $n."
    rm -f /mnt/t$((n - {KEPT}))
done
"""


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    """The guest's initramfs, and an empty file system."""
    folder = tmp_path_factory.mktemp("crash")
    (folder / "script").write_text(SCRIPT)
    initramfs.build(folder / "initramfs", kernel="tiny", init=folder / "script")
    with open(folder / "empty", "wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "1024", "-J", "size=1", folder / "empty"], check=True)
    return folder


def what_is_wrong(image, done, folder):
    """Repair a disk from its journal and return what is wrong with it then; None when nothing is."""
    path = folder / "after"
    path.write_bytes(image)
    # -p replays the journal and mends only what needs no decision; 1 says that it did something
    repaired = subprocess.run(["e2fsck", "-p", path], capture_output=True, check=False)
    if repaired.returncode > 1:
        return f"e2fsck -p: {repaired.stdout.decode()[-300:]}"
    clean = subprocess.run(["e2fsck", "-fn", path], capture_output=True, check=False)
    if clean.returncode:
        return f"e2fsck -fn: {clean.stdout.decode()[-300:]}"
    wanted = range(max(done - CHECKED + 1, 1), done + 1)
    commands = "".join(f"cat t{number}\n" for number in wanted)
    found = subprocess.run(
        ["debugfs", "-f", "/dev/stdin", path], input=commands.encode(), capture_output=True, check=False
    )
    text = found.stdout.decode()
    for number in wanted:
        for line in range(LINES):
            if f"transaction {number} line {line} of this file\n" not in text:
                return f"transaction {number} of {done} is not whole"
    return None


def cuts(guest, monkeypatch, *, mode, count, lies):
    """Run the guest and yield (disk, transactions done) at random moments."""
    disk = FaultyImage(MemoryImage((guest / "empty").read_bytes()), volatile=True)
    if lies:
        disk.fault("lying-flush")
    monkeypatch.setattr("devices.backends.image.open_image", lambda path, **_: disk)
    rng = random.Random(7)
    config = MachineConfig(
        "tiny",
        ram_mib=64,
        disks=["faulty"],
        initrd=guest / "initramfs",
        append=f"{QUIET} fsmode={mode}",
        decompress="host",
    )
    with Machine(config) as machine:
        seen = []
        machine.console.listeners.append(seen.append)
        machine.start()
        machine.console.expect("MOUNTED", timeout=BOOT_SECONDS)
        taken = done = 0
        deadline = time.monotonic() + BOOT_SECONDS
        while taken < count or (done <= KEPT and time.monotonic() < deadline):
            time.sleep(rng.random() * 0.05)
            done = max((int(number) for number in re.findall(rb"DONE (\d+)\.", b"".join(seen))), default=0)
            yield disk.after_cut(seed=rng.getrandbits(64)), done
            taken += 1
        assert done > KEPT, "the guest did not get far enough to show anything"
        assert machine.outcome is None


@pytest.mark.parametrize("mode", ["journal", "ordered"])
def test_ext4_survives_every_power_cut(guest, monkeypatch, tmp_path, mode):
    for image, done in cuts(guest, monkeypatch, mode=mode, count=100, lies=False):
        assert what_is_wrong(image, done, tmp_path) is None


def test_a_disk_whose_flush_lies_is_caught(guest, monkeypatch, tmp_path):
    """The same test can fail: without true flushes transactions are lost or the file system is damaged."""
    assert any(what_is_wrong(*cut, tmp_path) for cut in cuts(guest, monkeypatch, mode="ordered", count=40, lies=True))


def test_a_killed_vmm_loses_nothing(guest, tmp_path):
    """SIGKILL at random moments, the disk goes on from where it was: the guest's own recovery, again and again."""
    disk = tmp_path / "disk"
    disk.write_bytes((guest / "empty").read_bytes())
    rng = random.Random(3)
    last = 0
    for number in range(6):
        wanted = b"DONE" if number % 2 else b"MOUNTED"  # what it has done at least
        command = [sys.executable, "-m", "hypervisor", "run", "tiny", "--ram", "64", "--decompress", "host"]
        command += ["--initrd", guest / "initramfs", "--disk", disk, "--append", f"{QUIET} fsmode=ordered"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0) as process:
            seen = b""
            while wanted not in seen:
                chunk = os.read(process.stdout.fileno(), 4096)
                assert chunk, seen
                seen += chunk
            end = time.monotonic() + rng.random() * 2
            os.set_blocking(process.stdout.fileno(), False)
            while time.monotonic() < end:
                seen += process.stdout.read() or b""
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        done = [int(number) for number in re.findall(rb"DONE (\d+)\.", seen)]
        last = max([last, *done])
        assert what_is_wrong(disk.read_bytes(), last, tmp_path) is None
    assert last > 0

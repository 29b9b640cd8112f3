"""A file system's crash consistency: the power goes at any moment, and what was synchronised is there afterwards.

A guest replaces files on an ext4, again and again, and names each one when fsync has said that it is on the disk. The
disk keeps what it has not been told to flush in a cache of its own, as disks do. Of that a power cut leaves all, some
or nothing, in any mixture. What a cut would leave can be had while the guest goes on: many cuts are judged here, by the
host's e2fsck and debugfs, and some by the guest itself, which boots again on what is left.
"""

import os
import random
import re
import shutil
import subprocess
import threading
import time

import pytest

from hypervisor.testing import AgentError
from hypervisor.testing.disks import make_disk

SIZE = 16 << 20
FILES = 30
CUTS = 12
RESTARTS = 2
PATIENCE = 200
"""Seconds, for hosts that are slow; a test that passes needs few of them."""

WORKLOAD = f"""
number=0
while true; do
    number=$((number + 1))
    name=/mnt/file-$((number % {FILES}))
    yes "file $number" | head -c $((number * 7919 % 20000 + 16)) >/mnt/new
    sync /mnt/new          # fsync: the content
    mv /mnt/new $name
    sync /mnt              # fsync: the name
    echo $number
done
"""

pytestmark = pytest.mark.guest(setup="mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")


def content(number):
    """What the guest writes to the file that it writes as the `number`th."""
    size = number * 7919 % 20000 + 16
    line = f"file {number}\n".encode()
    return (line * (size // len(line) + 1))[:size]


@pytest.fixture(scope="session")
def ext4(tmp_path_factory):
    """A new file system. What guests write to it goes to memory, and is gone after each test."""
    return make_disk(tmp_path_factory.mktemp("disks") / "ext4.img", SIZE)


@pytest.fixture(autouse=True)
def disk(request, ext4):
    request.applymarker(pytest.mark.guest(disks=[ext4]))


class Workload:
    """The guest's program, and which file it last said to be on the disk."""

    def __init__(self, machine):
        self.done = 0
        self._output = machine.popen(WORKLOAD).stdout
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        try:
            for line in self._output:
                self.done = int(line)
        except AgentError:
            pass  # the power went, or the test is over

    def go_on(self, count):
        """Wait until some more files are on the disk."""
        wanted = self.done + count
        deadline = time.monotonic() + PATIENCE
        while self.done < wanted:
            assert time.monotonic() < deadline, f"{self.done} of {wanted} files after {PATIENCE} s"
            time.sleep(0.01)


def what_is_wrong(folder, done):
    """Return what is wrong with the files in `folder`, where those up to the `done`th were said to be on the disk."""
    wrong = []
    for place in range(FILES):
        promised = max(done - (done - place) % FILES, 0)  # the last one with this name; 0: there was none
        path = os.path.join(folder, f"file-{place}")
        if not os.path.exists(path):
            wrong += [f"file {promised} is lost"] if promised else []
            continue
        with open(path, "rb") as file:
            found = file.read()
        first = re.match(rb"file (\d+)\n", found)
        number = int(first[1]) if first else 0
        if found != content(number) or number % FILES != place:
            wrong.append(f"file-{place} holds what was never written: {len(found)} bytes, {found[:20]!r}")
        elif number < promised:
            wrong.append(f"file {promised} is lost, there is {number} in its place")
    return wrong


def program(name):
    """Return the path of a program of e2fsprogs: a user's PATH may lack its folder."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert found, f"{name} is not installed: apt-get install e2fsprogs"
    return found


def judge(image, done, folder):
    """Replay a disk's journal, check the file system and its files; return what is wrong."""
    folder.mkdir()
    path = folder / "disk.img"
    path.write_bytes(image)
    subprocess.run([program("e2fsck"), "-E", "journal_only", "-p", path], check=False, capture_output=True)
    checked = subprocess.run([program("e2fsck"), "-f", "-n", path], check=False, capture_output=True, text=True)
    if checked.returncode:
        return [f"e2fsck finds errors: {checked.stdout}"]
    (folder / "files").mkdir()
    copy = f'rdump / "{folder}/files"'
    subprocess.run([program("debugfs"), "-R", copy, path], check=True, capture_output=True)
    return what_is_wrong(folder / "files", done)


def test_what_was_synchronised_survives_any_power_cut(machine, guest_disk, tmp_path):
    rng = random.Random(7)
    guest_disk.hold_writes()
    work = Workload(machine)
    for cut in range(CUTS):
        work.go_on(rng.randint(1, 4))
        time.sleep(rng.random() * 0.1)  # anywhere in the next file
        done = work.done
        image = guest_disk.image.after_cut(keep="random", seed=rng.getrandbits(32))
        assert judge(image, done, tmp_path / str(cut)) == []


def test_the_guest_goes_on_after_power_cuts(machine, guest_disk, tmp_path):
    """The guest's own kernel replays the journal; each round starts from what the one before has left."""
    for seed in range(RESTARTS):
        guest_disk.hold_writes()
        work = Workload(machine)
        work.go_on(FILES // 2)
        done = work.done
        machine.power_cut(keep="random", seed=seed)
        assert re.search(r"EXT4-fs \(vda\): recovery complete", machine.dmesg())
        machine.copy_out("/mnt", tmp_path / str(seed))
        assert what_is_wrong(tmp_path / str(seed), done) == []
        machine.run("rm /mnt/*; sync", check=True)  # numbers begin anew


def test_a_flush_that_lies_is_caught(machine, guest_disk, tmp_path):
    """The same judgement can fail: this disk says "flushed" and has not."""
    guest_disk.fault("lying-flush")
    work = Workload(machine)
    work.go_on(5)
    done = work.done
    wrong = judge(guest_disk.image.after_cut(keep="flushed"), done, tmp_path / "cut")
    promised = range(max(done - FILES, 0) + 1, done + 1)  # later ones may have taken the names of the first
    assert wrong == [f"file {number} is lost" for number in sorted(promised, key=lambda one: one % FILES)]
    assert {hit.kind for hit in guest_disk.hits} == {"lying-flush"}

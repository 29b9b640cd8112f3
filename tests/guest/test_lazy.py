"""Machines that run before their memory is unpacked: from compressed snapshots, and from changes to others."""

import subprocess
import sys
import time

import pytest
from test_checkpoints import config, stopped
from test_snapshots import GUESTS, alone

from hypervisor import Machine
from hypervisor.snapshot import lazy
from hypervisor.snapshot.store import Snapshot

pytestmark = pytest.mark.kvm

TIMEOUT = 120
DIRTIER = {"kernel": "dirtier", "ram_mib": 96, "append": "0 5 2000000 24"}
"""Writes to 24 MiB until something is typed, and checks every page then."""
CHUNK = 65536


def saved(settings, folder):
    """Save a guest compressed, and as a change to that; return what it had printed."""
    with stopped(settings) as machine:
        save_both(machine, folder)
        return machine.console.output


def save_both(machine, folder):
    machine.save(folder / "zstd", compress=True)
    machine.save(folder / "change", base=folder / "zstd")


@pytest.mark.parametrize("kind", ["zstd", "change"])
@pytest.mark.parametrize("name", GUESTS)
def test_it_goes_on_as_if_nothing_had_been(name, kind, tmp_path):
    expected = alone(GUESTS[name])
    first = saved(GUESTS[name], tmp_path)
    for how in ({}, {"clone": True, "verify": False}):
        with Machine.restore(tmp_path / kind, lazy=True, **how) as machine:
            assert (machine.run(TIMEOUT).status, first + machine.console.output) == expected, how


@pytest.fixture
def dirtied(tmp_path):
    """A folder with snapshots of a guest that has written to most of its pages."""
    with Machine(config(DIRTIER)) as machine:
        machine.start()
        deadline = time.monotonic() + TIMEOUT
        while sum(map(any, first_words(machine.memory.read(64 << 20, 24 << 20)))) < 24 << 7:  # half of them
            assert time.monotonic() < deadline
            time.sleep(0.2)
        machine.pause()
        save_both(machine, tmp_path)
    return tmp_path


def first_words(data):
    """The first words of its pages."""
    return (data[at : at + 8] for at in range(0, len(data), 4096))


def test_every_page_is_what_it_was(dirtied):
    with Machine.restore(dirtied / "zstd", lazy=True) as machine:
        machine.start()
        machine.console.write("end")
        assert machine.wait(TIMEOUT).status == 0


def test_saved_while_it_is_unpacked_it_is_the_same(dirtied):
    with Machine.restore(dirtied / "zstd", lazy=True) as machine:
        machine.save(dirtied / "again")
    with Snapshot.open(dirtied / "zstd") as one, Snapshot.open(dirtied / "again") as other:
        hashes = [[snapshot.memory.index.hash_of(chunk) for chunk in range(96 * 16)] for snapshot in (one, other)]
    assert hashes[0] == hashes[1]


def test_it_goes_back_as_others_do(dirtied):
    with Machine.restore(dirtied / "change", lazy=True) as machine, machine.checkpoint() as checkpoint:
        machine.start()
        for _ in range(3):
            machine.console.write("end")
            assert machine.wait(TIMEOUT).status == 0
            checkpoint.reset()


def test_what_is_mapped_as_it_is_needs_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy, "Unpacking", None)
    with Machine(config(GUESTS["checksum"])) as machine:
        machine.save(tmp_path / "raw")
    with Machine.restore(tmp_path / "raw", lazy=True) as machine:
        assert machine.run(TIMEOUT).status == 0


def test_a_machine_that_is_closed_leaves_no_process(dirtied, monkeypatch):
    made = []
    start = lazy.Unpacking._end
    monkeypatch.setattr(lazy.Unpacking, "_end", lambda self: (made.append(self._process), start(self)))
    with Machine.restore(dirtied / "zstd", lazy=True):
        pass
    monkeypatch.setattr(lazy.Unpacking, "serve", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Machine.restore(dirtied / "zstd", lazy=True)
    assert len(made) == 2
    assert all(process.returncode is not None for process in made)


# --- what goes wrong --------------------------------------------------------------------------------------------------

PROGRAM = """
import os, subprocess, sys
from hypervisor import Machine
from hypervisor.errors import VmmError
from hypervisor.snapshot import lazy
popen = subprocess.Popen
def start(*words, **how):
    {before}
    process = popen(*words, **how)
    {after}
    return process
lazy.subprocess.Popen = start
try:
    with Machine.restore(sys.argv[1], lazy=True) as machine:
        machine.start()
        machine.console.write("end")
        outcome = machine.wait(120)
        print(outcome.reason.name, outcome.message)
        sys.exit(outcome.status)
except VmmError as error:
    print("LOST", error)
    sys.exit(error.status)
"""


def ends_lost(path, before="pass", after="pass"):
    """Run a machine that is lost; return what it says. Whoever waits for a page may not be told in words of Python."""
    program = PROGRAM.format(before=before, after=after)
    run = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    assert run.returncode == 3, run
    assert "Traceback" not in run.stderr
    if run.stdout:
        assert run.stdout.startswith("LOST")
        assert "cannot be unpacked" in run.stdout or "has ended" in run.stdout
    else:
        assert "the guest is lost" in run.stderr
    return run.stderr


def test_a_damaged_chunk_is_named_and_the_guest_is_lost(dirtied):
    with Snapshot.open(dirtied / "zstd") as snapshot:
        chunk = next(n for n, one in enumerate(snapshot.memory.index) if one.kind == 1 and n >= 80 * 16)
        offset = snapshot.memory.index.offsets("zstd")[chunk]
    with (dirtied / "zstd" / "memory").open("r+b") as file:
        file.seek(offset + 9)
        byte = file.read(1)[0]
        file.seek(offset + 9)
        file.write(bytes([byte ^ 1]))
    for kind in ("zstd", "change"):
        said = ends_lost(dirtied / kind)
        assert f"{dirtied}/zstd/memory" in said
        assert hex(chunk * CHUNK) in said


def test_a_process_that_is_killed_takes_the_guest_with_it(dirtied):
    ends_lost(dirtied / "zstd", after="process.kill()")


def test_a_snapshot_that_is_replaced_meanwhile_is_not_mixed_up(dirtied):
    """The process opens it by its name."""
    (dirtied / "other").mkdir()
    saved(GUESTS["checksum"], dirtied / "other")
    path = dirtied / "zstd"
    before = f"os.rename('{path}', '{path}.old'); os.rename('{dirtied}/other/zstd', '{path}')"
    assert "another snapshot" in ends_lost(path, before=before)

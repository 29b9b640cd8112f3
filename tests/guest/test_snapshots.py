"""Machines saved to snapshots and restored, here and in another process: their guests must not be able to tell."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from test_checkpoints import ENDLESS, config, stopped
from test_checkpoints import GUESTS as SMALL_GUESTS
from test_journal import FOREVER, SIZE, last_of

from hypervisor import Machine, SnapshotError, VmmError
from hypervisor.host import is_software_kvm
from hypervisor.outcome import Stop
from hypervisor.snapshot.store import Snapshot, Writer

pytestmark = pytest.mark.kvm

TIMEOUT = 120
IS_SOFTWARE = is_software_kvm()
ALTERED = 60 if IS_SOFTWARE else 12
"""Values of a state that are replaced, for each kind of nonsense; an emulated host takes its time for each."""
ATTEMPTS = 20
GUESTS = SMALL_GUESTS | {"above 4 GiB": {"kernel": "checksum", "ram_mib": 3200}}


def alone(settings):
    with Machine(config(settings)) as machine:
        outcome = machine.run(TIMEOUT)
        return outcome.status, machine.console.output


def saved_at(settings, path, seconds, *, prepare=lambda: None, **how):
    """Save a guest after a while; return what it had printed by then."""
    with stopped(settings, seconds, prepare=prepare) as machine:
        machine.save(path, **how)
        return machine.console.output


def rest(path, **how):
    with Machine.restore(path, **how) as machine:
        outcome = machine.run(TIMEOUT)
        return outcome.status, machine.console.output


@pytest.mark.parametrize("name", GUESTS)
def test_a_restored_guest_goes_on_as_if_nothing_had_been(name, tmp_path):
    expected = alone(GUESTS[name])
    first = saved_at(GUESTS[name], tmp_path / "s", 0.01)
    for how in ({}, {"clone": True}, {"verify": False}):
        status, output = rest(tmp_path / "s", **how)
        assert (status, first + output) == expected, how


def test_the_saved_machine_itself_goes_on(tmp_path):
    with Machine(config(ENDLESS)) as machine:
        machine.start()
        time.sleep(0.01)
        machine.save(tmp_path / "s")
        machine.console.write("end")
        assert machine.wait(TIMEOUT).status == 0


def test_saved_restored_and_saved_again_at_random_moments(tmp_path):
    """A chain of machines, each restored from the one before, full and differential, raw and compressed."""
    chance = random.Random(5)
    expected = alone(GUESTS["checksum"])
    saves = 0
    for run in range(ATTEMPTS):
        if run >= (4 if IS_SOFTWARE else 2) and saves > run:
            break  # else it has ended early: this host is busy
        output, last, number = b"", None, 0
        while True:
            with Machine(config(GUESTS["checksum"])) if last is None else Machine.restore(last) as machine:
                machine.start()
                time.sleep(chance.random() * 0.03)
                machine.pause()
                if machine.outcome is not None or number == 8:
                    machine.resume()
                    status = machine.wait(TIMEOUT).status
                    output += machine.console.output
                    break
                number += 1
                path = tmp_path / f"{run}-{number}"
                base = last if chance.random() < 0.5 else None
                machine.save(path, base=base, compress=chance.random() < 0.5)
                output += machine.console.output
                last = path
        assert (status, output) == expected
        saves += number
    assert saves > run


@pytest.mark.parametrize("virtio", [{}, {"nets": ["none"], "rng": True}])
def test_changes_that_were_logged_are_all_that_there_are(tmp_path, virtio):
    """Saves that look at logged pages only, against all of memory at the same moments."""
    settings = journal(disk_of(tmp_path / "disk", "raw")) | {"append": str(FOREVER)}
    with Machine(config(settings | virtio)) as machine:
        seen = []
        capture = machine.capture

        def capture_too():
            seen.append(machine.memory.read(0, machine.memory.size))
            return capture()

        machine.capture = capture_too
        machine.pause()
        machine.start()
        machine.save(tmp_path / "0", track=True)
        for number in range(1, 6):
            machine.resume()
            time.sleep(0.01)
            machine.pause()
            machine.save(tmp_path / f"{number}", base=tmp_path / f"{number - 1}", track=True)
            assert machine.memory.is_tracked
            assert memory_of(tmp_path / f"{number}") == seen[-1]
        machine.save(tmp_path / "other", base=tmp_path / "0")  # the log is of another one: all is compared
        assert not machine.memory.is_tracked
        assert memory_of(tmp_path / "other") == seen[-1]


def memory_of(path):
    with Snapshot.open(path) as snapshot:
        fd, _, size = snapshot.map_memory()
    with open(fd, "rb") as file:
        return os.pread(file.fileno(), size, 0)


def without_clocks(value):
    """Leave out of a state what moves on by itself."""
    moving = {"clock", "tsc_offset", "lapic", "pit", "msrs", "age_ns", "elapsed_ns", "remaining_ns"}
    if isinstance(value, dict):
        return {key: without_clocks(one) for key, one in value.items() if key not in moving}
    if isinstance(value, list):
        return [without_clocks(one) for one in value]
    return value


def test_a_snapshot_of_a_restored_machine_is_the_same_but_for_clocks(tmp_path):
    saved_at(GUESTS["four"], tmp_path / "one", 0.01)
    with Machine.restore(tmp_path / "one") as machine:
        machine.save(tmp_path / "two")
    with Snapshot.open(tmp_path / "one") as one, Snapshot.open(tmp_path / "two") as two:
        assert without_clocks(one.state["kvm"]) == without_clocks(two.state["kvm"])
        assert (one.state["booted"], one.machine) == (two.state["booted"], two.machine)
        assert one.memory.index.data == two.memory.index.data


PROGRAM = """
import sys
from hypervisor import Machine
with Machine.restore(sys.argv[1]) as machine:
    status = machine.run(120).status
    sys.stdout.buffer.write(machine.console.output)
sys.exit(status)
"""


def test_suspended_here_and_resumed_in_another_process(tmp_path):
    expected = alone(GUESTS["deadline"])
    with stopped(GUESTS["deadline"]) as machine:
        machine.save(tmp_path / "s", suspend=True)
        outcome = machine.wait(TIMEOUT)
        assert (outcome.reason, outcome.status) == (Stop.SUSPENDED, 0)
        first = machine.console.output
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "s"], capture_output=True, check=False, timeout=TIMEOUT
    )
    assert (run.returncode, first + run.stdout) == expected, run.stderr


def test_many_clones_run_at_once(tmp_path):
    expected = alone(GUESTS["checksum"])
    first = saved_at(GUESTS["checksum"], tmp_path / "s", 0.01)
    with Snapshot.open(tmp_path / "s") as snapshot:
        machines = [Machine.restore(snapshot, clone=True, verify=number == 0) for number in range(8)]
    for machine in machines:
        machine.start()
    identities = {machine._pc.vmgenid.identifier for machine in machines}
    assert len(identities) == len(machines)
    for machine in machines:
        assert (machine.wait(TIMEOUT).status, first + machine.console.output) == expected
        machine.close()


# --- disks and networks -----------------------------------------------------------------------------------------------

TRANSACTIONS = 30 if IS_SOFTWARE else 10


def journal(path, kind=""):
    """A guest that keeps a journal on its disk, and says of each transaction that it is done."""
    settings = {"kernel": "virtio-journal", "virtio": "mmio", "append": str(TRANSACTIONS)}
    return settings | {"disks": [f"{path}{kind}"]}


def disk_of(path, form):
    path.write_bytes(bytes(SIZE))
    if form == "qcow2":
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", path, f"{path}.qcow2"], check=True)
        return f"{path}.qcow2"
    return str(path)


@pytest.mark.parametrize("how", ["raw", "qcow2", "raw,overlay=memory", "raw,iops=400"])
def test_a_guest_with_a_disk_goes_on_as_often_as_one_wants(tmp_path, how):
    """Writes of one do not reach another, nor the snapshot; what was in flight at the save is done once."""
    form, _, kind = how.partition(",")
    path = disk_of(tmp_path / "disk", form)
    settings = journal(path, kind and f",{kind}")
    first = saved_at(settings, tmp_path / "s", 0.03, prepare=lambda: disk_of(tmp_path / "disk", form))
    before = digest(tmp_path / "s")
    for _ in range(2):
        status, output = rest(tmp_path / "s", clone=True)
        assert status == 0
        assert first + output == b"REDONE 0 NEXT 1\n" + b"".join(b"DONE %d\n" % n for n in range(1, TRANSACTIONS + 1))
    assert digest(tmp_path / "s") == before


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_suspended_machine_goes_on_with_its_own_disk(tmp_path):
    path = disk_of(tmp_path / "disk", "raw")
    first = saved_at(
        journal(path), tmp_path / "s", 0.03, prepare=lambda: disk_of(tmp_path / "disk", "raw"), suspend=True
    )
    status, output = rest(tmp_path / "s")
    assert (status, (first + output).splitlines()[-1]) == (0, b"DONE %d" % TRANSACTIONS)
    assert last_of((tmp_path / "disk").read_bytes()) == TRANSACTIONS
    with pytest.raises(VmmError, match="disk"):  # it has changed since
        Machine.restore(tmp_path / "s")


def test_a_chain_of_machines_with_disk_network_and_timers(tmp_path):
    """Suspended and resumed at random moments, with requests in flight; nothing is lost and nothing done twice."""
    chance = random.Random(7)
    for attempt in range(ATTEMPTS):
        moves, output = chain(tmp_path, f"{attempt}-", chance)
        assert output == b"REDONE 0 NEXT 1\n" + b"".join(b"DONE %d\n" % n for n in range(1, TRANSACTIONS + 1))
        if moves > 3:
            return
    raise AssertionError("it had always ended before it was moved as often")


def chain(folder, name, chance):
    """Run a guest on a new disk to its end, in one machine after the other; return how often, and its words."""
    settings = journal(disk_of(folder / "disk", "raw")) | {"nets": ["none"], "rng": True}
    output, last = b"", None
    for number in range(100):
        with Machine(config(settings)) if last is None else Machine.restore(last) as machine:
            machine.start()
            time.sleep(chance.random() * 0.02)
            machine.pause()
            if machine.outcome is None:
                last = folder / f"{name}{number}"
                machine.save(last, suspend=True, compress=chance.random() < 0.5)
            output += machine.console.output
            machine.resume()
            if machine.wait(TIMEOUT).reason is not Stop.SUSPENDED:
                break
    return number, output


@pytest.mark.parametrize("damage", ["gone", "altered", "base"])
def test_a_disk_that_is_not_what_it_was(tmp_path, damage):
    path = disk_of(tmp_path / "disk", "raw")
    saved_at(journal(path, ",overlay=memory" if damage == "base" else ""), tmp_path / "s", 0.03)
    layer = next(tmp_path.glob("s/disk-*"), None)
    if damage == "base":
        (tmp_path / "disk").write_bytes(bytes(SIZE + 512))
    elif damage == "gone":
        layer.unlink()
    else:
        data = bytearray(layer.read_bytes())
        data[1000] ^= 1
        layer.write_bytes(data)
    with pytest.raises(VmmError) as caught:
        Machine.restore(tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert str(path if damage == "base" else layer) in str(caught.value)


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_machine_that_has_ended_cannot_be_saved(tmp_path):
    with Machine(config({"kernel": "hello32"})) as machine:
        machine.run(TIMEOUT)
        with pytest.raises(SnapshotError, match="has ended"):
            machine.save(tmp_path / "s")
    assert not os.listdir(tmp_path)


def test_a_guest_that_the_host_has_not_the_cpu_for(tmp_path):
    saved_at(GUESTS["checksum"], tmp_path / "s", 0.01)
    state = altered(tmp_path / "s")
    for row in state["kvm"]["vcpus"][0]["cpuid"]:
        if row[:2] == [7, 0]:
            row[4] |= 1 << 14  # EBX, MPX: no host has it any more
    rewrite(tmp_path / "s", state)
    with pytest.raises(SnapshotError, match="mpx"):
        Machine.restore(tmp_path / "s")


def altered(path):
    with Snapshot.open(path) as snapshot:
        return snapshot.state


def rewrite(path, state):
    """Save the snapshot again with another state, all its hashes right: what an enemy could write."""
    with Snapshot.open(path) as snapshot:
        fd, _, size = snapshot.map_memory()
        ranges = snapshot.manifest.memory.ranges
        machine, host = snapshot.machine, snapshot.host
    with open(fd, "rb") as file, Writer(path) as writer:
        writer.write_memory(memoryview(os.pread(file.fileno(), size, 0)), ranges)
        writer.commit(state, config=machine, host=host)


def places(value, path=()):
    """Yield the path of every value in a state."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from places(one, (*path, key))
    elif isinstance(value, list):
        for number, one in enumerate(value[:3]):
            yield from places(one, (*path, number))
    if path:
        yield path


def put(state, path, value):
    for key in path[:-1]:
        state = state[key]
    if value is None and isinstance(state, dict):
        del state[path[-1]]
    else:
        state[path[-1]] = value


@pytest.mark.parametrize("value", [None, -1, 1 << 70, "text", b"\xff" * 7, []])
def test_a_state_that_nobody_saved_is_refused_or_runs_but_never_crashes(tmp_path, value):
    """Every value of the state replaced, with hashes that fit: an error of this package, or a guest of some kind."""
    saved_at(GUESTS["checksum"], tmp_path / "s", 0.005)
    chance = random.Random(repr(value))
    paths = list(places(altered(tmp_path / "s")))
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    refused = 0
    for path in chance.sample(paths, ALTERED):
        state = altered(tmp_path / "s")
        put(state, path, value)
        rewrite(tmp_path / "t", state)
        try:
            with Machine.restore(tmp_path / "t", verify=False) as machine:
                machine.start()
                time.sleep(0.002)
        except VmmError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{path} = {value!r}") from error
    assert refused, "nothing was ever refused"


def test_the_manifest_is_read_by_any_json_reader(tmp_path):
    saved_at(GUESTS["checksum"], tmp_path / "s", 0.01)
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert manifest["machine"]["ram_mib"] == 8
    assert manifest["state"]["kvm"]["vcpus"][0]["registers"]["rip"]

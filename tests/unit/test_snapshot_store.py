"""Snapshots on disk: what is read is what was written, alone and as a chain of changes."""

import json
import mmap
import os
import random
import stat
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import CHUNK, MACHINE, PAGE, STATE, content, ram, save

from hypervisor.config import MachineConfig
from hypervisor.errors import DamagedSnapshotError, SnapshotError
from hypervisor.memory import Content, GuestMemory, RamRange
from hypervisor.snapshot import plain
from hypervisor.snapshot.store import Snapshot, Writer


def test_everything_comes_back(tmp_path):
    memory = ram(5, pages=3, dense=(0, 2, 5))
    layers = {"disk-0": b"layer" * 1000, "disk-1": b""}
    name = save(tmp_path / "s", memory, layers=layers, host={"vendor": "AuthenticAMD"})
    with Snapshot.open(tmp_path / "s") as snapshot:
        snapshot.verify()
        assert snapshot.id == name
        assert len(name) == 32
        assert snapshot.state == STATE
        assert snapshot.machine == MACHINE
        assert snapshot.host == {"vendor": "AuthenticAMD"}
        assert snapshot.config.kernel == "hello"
        assert {layer.name: (tmp_path / "s" / layer.name).read_bytes() for layer in snapshot.layers()} == layers
        assert [layer.size for layer in snapshot.layers()] == [5000, 0]
        assert snapshot.parent is None
    assert content(tmp_path / "s") == memory


def test_the_manifest_is_json_for_others_and_bytes_are_base64(tmp_path):
    save(tmp_path / "s")
    value = json.loads((tmp_path / "s" / "manifest.json").read_bytes())
    assert value["format"] == "trapvisor-snapshot"
    assert value["version"] == 1
    assert value["state"]["devices"]["uart0"]["fifo"] == {"$base64": "AP8="}
    assert value["memory"]["ranges"] == [{"gpa": 0, "size": 4 * CHUNK, "offset": 0}]
    assert list(value)[-1] == "digest"


def test_zeros_are_holes_and_only_the_owner_may_look(tmp_path):
    save(tmp_path / "s", ram(64, dense=(7,)))
    info = (tmp_path / "s" / "memory").stat()
    assert info.st_size == 64 * CHUNK
    assert info.st_blocks * 512 <= 2 * CHUNK
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700
    for file in (tmp_path / "s").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_plain_one_is_mapped_as_it_lies_on_the_disk(tmp_path):
    save(tmp_path / "s")
    with Snapshot.open(tmp_path / "s") as snapshot:
        fd, offset, size = snapshot.map_memory()
        assert (offset, size) == (0, 4 * CHUNK)
        assert os.path.samestat(os.fstat(fd), (tmp_path / "s" / "memory").stat())
        os.close(fd)


def test_others_are_put_together_once_and_nobody_writes_to_them(tmp_path):
    memory = ram(3, dense=(0, 2))
    save(tmp_path / "s", memory, compress=True)
    with Snapshot.open(tmp_path / "s") as snapshot:
        (fd, _, size), (second, _, _) = snapshot.map_memory(), snapshot.map_memory()
    assert os.path.samestat(os.fstat(fd), os.fstat(second))
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE) as private:
        private[0:1] = b"x"
        assert private[1:] == memory[1:]
    assert os.pread(second, 1, 0) == memory[:1]
    os.close(fd)
    os.close(second)


def test_a_guest_goes_on_from_it_in_two_ranges(tmp_path):
    """The memory of a machine with RAM on both sides of its hole, mapped as the machine maps it."""
    memory = ram(4, dense=(1, 3))
    ranges = [RamRange(0, 2 * CHUNK, 0), RamRange(1 << 32, 2 * CHUNK, 2 * CHUNK)]
    with Writer(tmp_path / "s") as writer:
        writer.write_memory(memoryview(memory), ranges)
        writer.commit({})
    with Snapshot.open(tmp_path / "s") as snapshot:
        fd, offset, size = snapshot.map_memory()
        assert snapshot.memory.gpa_of(3) == (1 << 32) + CHUNK
    guest = GuestMemory(size, Content(fd, offset))
    assert guest.read(CHUNK, CHUNK) == memory[CHUNK : 2 * CHUNK]
    guest.write(CHUNK, b"changed")
    guest.close()
    os.close(fd)
    assert content(tmp_path / "s") == memory


@pytest.mark.parametrize("compress", [False, True])
def test_progress_is_told(tmp_path, compress):
    told = []
    save(tmp_path / "s", ram(200), compress=compress, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (200 * CHUNK, 200 * CHUNK)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) > 1
    told.clear()
    with Snapshot.open(tmp_path / "s") as snapshot:
        snapshot.verify(progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]


# --- changes to another ---------------------------------------------------------------------------------------------


def bitmap(pages, size):
    bits = bytearray(-(-size // PAGE // 8))
    for page in pages:
        bits[page // 8] |= 1 << page % 8
    return bytes(bits)


def test_a_change_holds_what_changed_and_reads_as_the_whole(tmp_path):
    before = ram(6, dense=(0, 1, 2, 3))
    save(tmp_path / "base", before)
    after = bytearray(before)
    after[2 * CHUNK + 5] ^= 1
    after[3 * CHUNK : 4 * CHUNK] = bytes(CHUNK)
    after[5 * CHUNK] = 7
    with Snapshot.open(tmp_path / "base") as base:
        save(tmp_path / "by-hash", after, base=base)
        changed = bitmap([2 * 16, 3 * 16 + 1, 5 * 16, 4 * 16], len(after))
        save(tmp_path / "by-bitmap", after, base=base, changed=changed, compress=True)
    for name in ("by-hash", "by-bitmap"):
        with Snapshot.open(tmp_path / name) as snapshot:
            memory = snapshot.manifest.memory
            assert (memory.data, memory.base, memory.zero) == (2, 2, 2)
            assert [one.id for one in snapshot.chain()] == [snapshot.id, snapshot.parent.id]
            snapshot.verify()
        assert content(tmp_path / name) == after


def test_what_the_bitmap_leaves_out_is_not_even_read(tmp_path):
    """So a page that changed and is not in the bitmap is the parent's: the bitmap is the caller's word."""
    before = ram(2, dense=(0, 1))
    save(tmp_path / "base", before)
    after = bytearray(before)
    after[0] ^= 1
    after[CHUNK] ^= 1
    with Snapshot.open(tmp_path / "base") as base:
        save(tmp_path / "s", after, base=base, changed=bitmap([31], len(after)))
    assert content(tmp_path / "s") == before[:CHUNK] + after[CHUNK:]


def test_a_chain_of_changes(tmp_path):
    memory = ram(8, dense=range(6))
    save(tmp_path / "0", memory)
    for number in range(1, 6):
        memory[number * CHUNK + number] ^= 0xFF
        with Snapshot.open(tmp_path / f"{number - 1}") as base:
            save(tmp_path / f"{number}", memory, base=base, compress=number % 2 == 0)
    assert content(tmp_path / "5") == memory
    with Snapshot.open(tmp_path / "5") as snapshot:
        assert len(snapshot.chain()) == 6
        assert [one.manifest.memory.data for one in snapshot.chain()] == [1, 1, 1, 1, 1, 6]


def test_a_chain_may_be_moved_together(tmp_path):
    (tmp_path / "here").mkdir()
    save(tmp_path / "here" / "base")
    with Snapshot.open(tmp_path / "here" / "base") as base:
        save(tmp_path / "here" / "s", base=base)
    os.rename(tmp_path / "here", tmp_path / "there")
    assert content(tmp_path / "there" / "s") == ram()


@pytest.fixture
def pair(tmp_path):
    """A base and a change to it."""
    save(tmp_path / "base")
    with Snapshot.open(tmp_path / "base") as base:
        save(tmp_path / "s", base=base)
    return tmp_path


def test_a_missing_parent_is_one_line(pair):
    os.rename(pair / "base", pair / "moved")
    with Snapshot.open(pair / "s") as snapshot:
        for use in (snapshot.verify, snapshot.map_memory, snapshot.chain):
            with pytest.raises(SnapshotError, match="needs its parent") as caught:
                use()
            assert "id" in caught.value.hint


def test_another_parent_is_refused(pair):
    save(pair / "base", ram(seed=2))
    with Snapshot.open(pair / "s") as snapshot, pytest.raises(SnapshotError, match="another snapshot"):
        snapshot.map_memory()


def test_an_altered_parent_is_found_by_its_child(pair):
    with open(pair / "base" / "memory", "r+b") as file:
        file.seek(CHUNK)
        file.write(b"altered")
    with Snapshot.open(pair / "s") as snapshot, pytest.raises(DamagedSnapshotError, match="chunk 1 ") as caught:
        snapshot.map_memory()
    assert caught.value.file == str(pair / "base" / "memory")
    assert caught.value.gpa == CHUNK


def test_a_change_cannot_replace_what_it_is_based_on(pair):
    with Snapshot.open(pair / "s") as base:
        for name in ("s", "base", "./base"):
            with pytest.raises(SnapshotError, match="change to itself"):
                Writer(pair / name, base=base)
        with pytest.raises(SnapshotError, match="other RAM"):
            save(pair / "new", ram(5), base=base)
        with pytest.raises(ValueError, match="one bit for each page"):
            save(pair / "new", ram(), base=base, changed=b"\xff")
    assert sorted(os.listdir(pair)) == ["base", "s"]


# --- properties -------------------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.tuples(st.integers(0, 67), st.sampled_from([b"\0", b"a", b"random"]), st.integers(0, PAGE - 1)), max_size=12
)


MODES = st.tuples(st.booleans(), st.booleans(), st.booleans())  # compressed both, by bitmap


def painted(pieces, size, memory=None):
    memory = bytearray(size) if memory is None else bytearray(memory)
    for page, what, within in pieces:
        at = page * PAGE
        if at < size:
            filler = random.Random(at + within).randbytes(PAGE) if what == b"random" else what * PAGE
            memory[at + within : at + PAGE] = filler[within:]
    return memory


@settings(max_examples=60)
@given(first=PIECES, second=PIECES, pages=st.integers(1, 68), modes=MODES)
def test_what_is_read_is_what_was_written(tmp_path, first, second, pages, modes):
    size = pages * PAGE
    before = painted(first, size)
    save(tmp_path / "base", before, compress=modes[0])
    assert content(tmp_path / "base") == before
    after = painted(second, size, before)
    changed = None
    if modes[2]:
        changed = bitmap([page for page, _, _ in second if page < pages], size)
    with Snapshot.open(tmp_path / "base") as base:
        save(tmp_path / "s", after, base=base, changed=changed, compress=modes[1])
    assert content(tmp_path / "s") == after
    assert content(tmp_path / "s", verify=False) == after


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner, max_size=4)
    ),
)


@given(value=st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), VALUES, max_size=4))
def test_a_state_of_plain_values_comes_back(tmp_path, value):
    save(tmp_path / "s", bytearray(PAGE), state=value)
    with Snapshot.open(tmp_path / "s") as snapshot:
        assert snapshot.state == value


@pytest.mark.parametrize("value", [{"a": [1.5]}, {"a": {1: 2}}, {"a": object()}, {"a": {3}}])
def test_what_is_not_plain_is_refused_and_nothing_is_left(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\.a"):
        save(tmp_path / "s", state=value)
    assert os.listdir(tmp_path) == []


def test_a_key_with_a_meaning_of_its_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\$base64"):
        save(tmp_path / "s", state={"$base64": "AA=="})
    with pytest.raises(ValueError, match="unknown kind"):
        plain.unpack({"$other": "AA=="})


def test_a_path_that_is_no_text_comes_back(tmp_path):
    name = os.fsdecode(b"/tmp/\xff.img")
    save(tmp_path / "s", config={"kernel": "hello", "disks": [{"path": name}]})
    with Snapshot.open(tmp_path / "s") as snapshot:
        assert snapshot.config.disks[0].path == name


def test_every_kind_of_machine_comes_back(tmp_path):
    config = MachineConfig(
        "hello",
        modules=("a b",),
        cpus=2,
        disks=["a.img,overlay=memory", "b.img,iops=5"],
        nets=["user,forward=2222:22,forward=80:80", "tap=tap0,mac=02:00:00:00:00:01"],
        ports=["a,socket=/tmp/a"],
        rng=True,
        vsock="3,path=/tmp/v",
        balloon="64",
    )
    save(tmp_path / "s", config=config.to_plain())
    with Snapshot.open(tmp_path / "s") as snapshot:
        assert repr(snapshot.config) == repr(config)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../x", ".hidden", "memory", "manifest.json", "memory.index", "x\n"]
)
def test_names_of_layers(tmp_path, name):
    with Writer(tmp_path / "s") as writer, pytest.raises(ValueError, match="no name for a layer"):
        writer.add_file(name)
    with Writer(tmp_path / "s") as writer:
        writer.add_file("disk-0")
        with pytest.raises(ValueError, match="taken"):
            writer.add_file("disk-0")


def test_a_run_without_snapshots_does_not_pay_for_them():
    costly = ("msgspec", "xxhash", "zstandard", "hypervisor.snapshot", "hypervisor.cli.snapshot")
    script = (
        "import sys; from hypervisor.cli import main; main(['run', '/dev/null/none']); "
        f"print([name for name in {costly!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n"

"""Saving when the host fails or the process dies: the old snapshot or the new one, whole, and nothing half."""

import ctypes
import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from snapshots import CHUNK, content, ram, save

from hypervisor import errors
from hypervisor.errors import SaveError, SnapshotError
from hypervisor.memory import RamRange
from hypervisor.snapshot import directory
from hypervisor.snapshot.store import Snapshot, Writer

KILLS = 60
SAVER = """
import sys
sys.path[:0] = {path!r}
from snapshots import ram, save
print("ready", flush=True)
seed = {seed}
while True:
    save({target!r}, ram(24, seed=seed, dense=(1, 5, 9, 20)), state={{"seed": seed}}, layers={{"disk-0": b"x" * 70000}},
         compress=bool(seed % 2))
    print("saved", flush=True)
    seed += 1
"""


def whole_range(memory):
    return RamRange(0, len(memory), 0)


def leftovers(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_killed_at_any_moment_the_old_or_the_new_is_whole(tmp_path, first):
    """SIGKILL at random moments of endless saves; the first ones have nothing to replace."""
    target = tmp_path / "s"
    moments = random.Random(7)
    seen = set()
    cut_short = 0
    start = time.monotonic()
    save(target, ram(24, seed=-1, dense=(1, 5, 9, 20)), state={"seed": -1}, layers={"disk-0": b"x" * 70000})
    took = time.monotonic() - start
    for number in range(KILLS // 2):
        if first and target.exists():
            directory.remove_tree(target)
        script = SAVER.format(path=[p for p in sys.path if p], seed=1000 * number, target=str(target))
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            for _ in range(1 + number % 3):
                process.stdout.readline()
            time.sleep(moments.random() * took)
            process.send_signal(signal.SIGKILL)
        if target.exists():
            with Snapshot.open(target) as snapshot:
                snapshot.verify()
                seed = snapshot.state["seed"]
            assert content(target) == ram(24, seed=seed, dense=(1, 5, 9, 20))
            seen.add(seed)
        else:
            assert first
        cut_short += bool(leftovers(tmp_path))
    assert seen - {-1}
    assert cut_short  # else no save was ever interrupted, and this proves nothing
    save(target, ram())
    assert leftovers(tmp_path) == []
    assert content(target) == ram()


def test_killed_between_any_two_system_calls(tmp_path):
    """A process that ends itself before its n-th call that changes a directory or syncs, for every n."""
    target = tmp_path / "s"
    save(target, ram(seed=1))
    script = f"""
import os, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
from snapshots import ram, save
from hypervisor.snapshot import directory, store
left = int(sys.argv[1])
def counted(module, name):
    call = getattr(module, name)
    def wrapper(*arguments, **keywords):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*arguments, **keywords)
    setattr(module, name, wrapper)
for name in ("fsync", "rename", "mkdir", "ftruncate", "pwrite", "unlink", "rmdir"):
    counted(os, name)
counted(directory, "_rename")
save({str(target)!r}, ram(seed=2))
"""
    outcomes = []
    for number in range(200):
        result = subprocess.run([sys.executable, "-c", script, str(number)], check=False, capture_output=True)
        assert result.returncode in (0, 9), result.stderr
        now = content(target)
        assert now in (ram(seed=1), ram(seed=2))
        outcomes.append(now == ram(seed=2))
        if result.returncode == 0:
            break
        if outcomes[-1]:
            save(target, ram(seed=1))
    assert result.returncode == 0
    assert outcomes[0] is False
    assert len(outcomes) > 8
    assert leftovers(tmp_path) == []


def test_an_exception_leaves_nothing(tmp_path):
    save(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "s")
    assert os.listdir(tmp_path) == ["s"]
    assert content(tmp_path / "s") == ram()


def _interrupted(path):
    with Writer(path) as writer:
        writer.add_file("disk-0")
        raise KeyboardInterrupt


def test_a_layer_that_was_never_written_is_an_error(tmp_path):
    with Writer(tmp_path / "s") as writer:
        memory = ram()
        writer.write_memory(memoryview(memory), [whole_range(memory)])
        writer.add_file("disk-0")
        with pytest.raises(SaveError):
            writer.commit({})
    assert os.listdir(tmp_path) == []


# --- others who save --------------------------------------------------------------------------------------------------


def test_a_save_that_goes_on_is_nobodys_leftover(tmp_path):
    memory = ram(seed=3)
    with Writer(tmp_path / "s") as slow:
        slow.write_memory(memoryview(memory), [whole_range(memory)])
        save(tmp_path / "s", ram(seed=4))
        assert len(leftovers(tmp_path)) == 1
        assert content(tmp_path / "s") == ram(seed=4)
        slow.commit({})
    assert content(tmp_path / "s") == memory
    assert leftovers(tmp_path) == []


def test_only_leftovers_of_the_same_name_are_removed(tmp_path):
    names = [
        ".other.0123456789abcdef.part",
        ".s.0123456789abcdef.parts",
        ".s.x.part",
        ".s.s.0123456789abcdef.part",
        "s.part",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".s.0123456789abcdef.part").mkdir()
    (tmp_path / ".s.0123456789abcdef.part" / "memory").write_bytes(b"x")
    (tmp_path / "target").mkdir()
    (tmp_path / ".s.00000000000000ff.part").symlink_to("target")
    save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "s", "target", ".s.00000000000000ff.part"])


def test_a_reader_keeps_what_it_has_opened(tmp_path):
    save(tmp_path / "s", ram(seed=1))
    with Snapshot.open(tmp_path / "s") as snapshot:
        save(tmp_path / "s", ram(seed=2))
        fd, _, size = snapshot.map_memory()
        assert os.pread(fd, size, 0) == ram(seed=1)
        os.close(fd)
    assert content(tmp_path / "s") == ram(seed=2)


# --- file systems without an exchange ---------------------------------------------------------------------------------


@pytest.fixture
def without_exchange(monkeypatch):
    """A file system that refuses renameat2's flags, as NFS does."""

    def rename(source, target, flags):
        if flags == 2:
            raise OSError(errno.EINVAL, "Invalid argument", target)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", target)
        os.rename(source, target)

    monkeypatch.setattr(directory, "_rename", rename)


@pytest.mark.usefixtures("without_exchange")
def test_without_an_exchange_the_old_one_is_moved_aside(tmp_path):
    save(tmp_path / "s", ram(seed=1))
    save(tmp_path / "s", ram(seed=2))
    assert os.listdir(tmp_path) == ["s"]
    assert content(tmp_path / "s") == ram(seed=2)


@pytest.mark.usefixtures("without_exchange")
def test_without_an_exchange_a_kill_leaves_the_old_one_aside_and_the_next_save_brings_it_back(tmp_path, monkeypatch):
    save(tmp_path / "s", ram(seed=1))
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(directory.os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "s", ram(seed=2))
    (aside,) = leftovers(tmp_path)
    assert aside.endswith(".old")
    with pytest.raises(SnapshotError) as caught:
        Snapshot.open(tmp_path / "s")
    assert aside in caught.value.hint
    with Writer(tmp_path / "s"):
        assert content(tmp_path / "s") == ram(seed=1)
    assert os.listdir(tmp_path) == ["s"]


def test_a_kernel_or_library_without_renameat2(tmp_path, monkeypatch):
    class Old:
        def __init__(self, *arguments, **keywords):
            pass

    monkeypatch.setattr(ctypes, "CDLL", Old)
    save(tmp_path / "s", ram(seed=1))
    save(tmp_path / "s", ram(seed=2))
    assert content(tmp_path / "s") == ram(seed=2)
    assert os.listdir(tmp_path) == ["s"]


# --- places -----------------------------------------------------------------------------------------------------------


def test_places_that_are_taken(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("mine")
    (tmp_path / "dangling").symlink_to("file")
    for name, word in (
        ("file", "is a file"),
        ("dangling", "is a file"),
        ("folder", "no snapshot"),
        ("file/x", "is a file"),
        ("nowhere/x", "nowhere"),
        ("x" * 300, "cannot save"),
    ):
        with pytest.raises(SnapshotError, match=word):
            save(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "folder") == ["precious"]
    assert leftovers(tmp_path) == []


def test_what_comes_there_meanwhile_is_not_replaced(tmp_path):
    memory = ram()
    with Writer(tmp_path / "s") as writer:
        writer.write_memory(memoryview(memory), [whole_range(memory)])
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "precious").write_text("mine")
        with pytest.raises(SnapshotError, match="no snapshot"):
            writer.commit({})
    assert (tmp_path / "s" / "precious").read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_an_empty_directory_and_a_link_to_a_snapshot_are_good_places(tmp_path):
    (tmp_path / "s").mkdir()
    save(tmp_path / "s", ram(seed=1))
    (tmp_path / "link").symlink_to("s")
    save(tmp_path / "link", ram(seed=2))
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "s") == ram(seed=2)


# --- a host that refuses ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A file system of one MiB, which is mounted for the test (this needs root)."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def told(error):
    """One line with its cause, as hv prints it, and what to do."""
    assert isinstance(error, SaveError)
    assert error.status == 3
    return f"{error}: {error.__cause__.strerror}", error.hint


@pytest.mark.parametrize("compress", [False, True])
def test_a_full_disk_while_memory_is_written(small, compress):
    save(small / "s", ram(2, seed=1))
    with pytest.raises(SaveError) as caught:
        save(small / "s", ram(40, dense=range(40)), compress=compress)
    line, hint = told(caught.value)
    assert line == f"cannot save {small / 's'}: No space left on device"
    assert "free some space" in hint
    assert content(small / "s") == ram(2, seed=1)
    assert os.listdir(small) == ["s"]


def test_a_full_disk_while_the_manifest_is_written(small):
    save(small / "s", ram(2, seed=1))
    with pytest.raises(SaveError):
        save(small / "s", ram(2, seed=2), state={"large": random.Random(1).randbytes(1 << 20)})
    assert content(small / "s") == ram(2, seed=1)
    assert os.listdir(small) == ["s"]


def test_a_full_disk_from_a_layer(small):
    """The layer is the caller's own write; the caller's error removes the rest."""
    save(small / "s", ram(2, seed=1))
    with pytest.raises(OSError, match="No space left"):
        save(small / "s", ram(2, seed=2), layers={"disk-0": bytes(2 << 20)})
    assert content(small / "s") == ram(2, seed=1)
    assert os.listdir(small) == ["s"]


def test_a_full_disk_on_a_real_file_system(tmp_path):
    """ext4 on a loop device, which tells of a full disk as late as it can."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no loop devices: {mounted.stderr.strip()}")
    try:
        save(folder / "s", ram(4, seed=1))
        with pytest.raises(SaveError, match="cannot save"):
            save(folder / "s", ram(100, dense=range(100)))
        assert content(folder / "s") == ram(4, seed=1)
        assert leftovers(folder) == []
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_tells_only_when_it_is_synced(tmp_path, monkeypatch, code):
    save(tmp_path / "s", ram(seed=1))
    real = os.fsync
    for failing in range(6):  # the layer, three files, the directory, and the one around it after the rename
        calls = []

        def fsync(fd, calls=calls, failing=failing):
            calls.append(fd)
            if len(calls) > failing:
                raise OSError(code, os.strerror(code))
            real(fd)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                save(tmp_path / "s", ram(seed=2), layers={"disk-0": b"x"})
            except SaveError as error:
                caught = error
        assert os.strerror(code) in told(caught)[0]
        assert leftovers(tmp_path) == []
        assert content(tmp_path / "s") == ram(seed=1)


def test_a_folder_that_is_not_ours(tmp_path):
    """As an unprivileged user, since root may write anywhere."""
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    folder = tmp_path / "theirs"
    folder.mkdir()
    save(folder / "s", ram(seed=1))
    os.chmod(folder, 0o755)  # noqa: S103 - they may look
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.geteuid() and parent.as_posix().startswith("/tmp/"):  # noqa: S108 - pytest's own
            os.chmod(parent, 0o755)  # noqa: S103 - the same
    child = os.fork()
    if not child:  # the interpreter has all modules that this needs: nothing is read from the checkout
        status = 1
        try:
            os.setuid(65534)
            try:
                save(folder / "new")
            except errors.SaveError as error:
                status = 0 if error.hint == "save into a directory of yours" else 2
            try:
                Snapshot.open(folder / "s")
            except errors.SnapshotError as error:
                status |= 0 if "Permission denied" in str(error.__cause__) else 4
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(folder) == ["s"]


def test_a_lock_that_somebody_holds_is_respected_until_they_are_gone(tmp_path):
    (tmp_path / ".s.0123456789abcdef.part").mkdir()
    fd = os.open(tmp_path / ".s.0123456789abcdef.part", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    save(tmp_path / "s", bytearray(CHUNK))
    assert leftovers(tmp_path) == [".s.0123456789abcdef.part"]
    os.close(fd)
    save(tmp_path / "s", bytearray(CHUNK))
    assert leftovers(tmp_path) == []

"""Disks saved for snapshots and opened again; qemu-img says what the files hold."""

import copy
import json
import os
import random
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.backends import copying
from devices.backends.errors import BackendError
from devices.backends.faults import FaultyImage
from devices.backends.identity import check_identity, identify
from devices.backends.image import open_image
from devices.backends.layers import open_saved, save_layers
from devices.backends.rewind import CheckpointImage

KIB = 1 << 10
MIB = 1 << 20
SIZE = 3 * MIB + 512


def qemu_img(*words):
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def as_raw(path, folder):
    raw = folder / "as-raw"
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


def contents(image):
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


def write(image, offset, data):
    image.writev(offset, [memoryview(data)])


def mix(image):
    """Writes, holes and zeroes, in some clusters."""
    write(image, 10 * KIB, b"first" * 1024)
    write(image, MIB - 512, b"x" * 200 * KIB)
    image.write_zeroes(2 * MIB, 128 * KIB, unmap=True)
    write(image, SIZE - 512, b"e" * 512)


KINDS = [
    "raw",
    "direct",
    "unsafe",
    "qcow2",
    "small clusters",
    "overlay",
    "overlay of overlay",
    "memory",
    "memory of qcow2",
]


def make(folder, kind):
    """An image of some kind with something in it."""
    data = random.Random(4).randbytes(MIB) + bytes(SIZE - MIB)
    base = folder / "base"
    base.write_bytes(data)
    if kind in {"raw", "direct", "unsafe", "memory", "overlay"}:
        how = {"direct": {"cache": "none"}, "unsafe": {"cache": "unsafe"}, "memory": {"overlay": "memory"}}.get(
            kind, {}
        )
        if kind == "overlay":
            how = {"overlay": str(folder / "over")}
        return open_image(str(base), **how)
    if kind == "overlay of overlay":
        qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", folder / "middle")
        subprocess.run(["qemu-io", "-c", "write -P 7 1M 70k", folder / "middle"], check=True, capture_output=True)
        qemu_img("create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", folder / "top")
        return open_image(str(folder / "top"), form="qcow2")
    cluster = "512" if kind == "small clusters" else "64k"
    qemu_img("convert", "-O", "qcow2", "-o", f"cluster_size={cluster}", base, folder / "image")
    return open_image(str(folder / "image"), overlay="memory" if kind == "memory of qcow2" else None)


def saved(image, folder, **how):
    folder.mkdir()
    return json.loads(json.dumps(save_layers(image, str(folder), "blk0", **how)))  # plain values


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_opened_is_what_was_saved(tmp_path, kind, private):
    image = make(tmp_path, kind)
    mix(image)
    wanted = contents(image)
    snapshot = tmp_path / "snapshot"
    description = saved(image, snapshot)
    assert contents(image) == wanted
    write(image, 0, b"later" * 1024)  # the machine goes on
    image.flush()
    image.close()
    file = description["layer"]["file"]
    assert os.listdir(snapshot) == [file]
    moved = tmp_path / "moved"
    snapshot.rename(moved)
    again = open_saved(description, str(moved), private=private)
    assert contents(again) == wanted
    write(again, 512, b"n" * 1024)
    changed = wanted[:512] + b"n" * 1024 + wanted[1536:]
    assert contents(again) == changed
    second = saved(again, tmp_path / "second")
    again.close()
    third = open_saved(second, str(tmp_path / "second"), private=True)
    assert contents(third) == changed
    third.close()


@pytest.mark.parametrize("kind", ["raw", "qcow2", "small clusters", "overlay", "memory", "memory of qcow2"])
def test_qemu_reads_what_was_saved(tmp_path, kind):
    image = make(tmp_path, kind)
    mix(image)
    wanted = contents(image)
    description = saved(image, tmp_path / "snapshot")
    image.close()
    path = tmp_path / "snapshot" / description["layer"]["file"]
    if description["layer"]["format"] == "qcow2":
        check = subprocess.run(["qemu-img", "check", path], check=False, capture_output=True, text=True)
        assert check.returncode == 0, check.stdout + check.stderr  # no leaks either
        assert as_raw(path, tmp_path) == wanted
    else:
        assert path.read_bytes() == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_clones_share_a_layer_and_see_nothing_of_each_other(tmp_path, kind):
    image = make(tmp_path, kind)
    mix(image)
    wanted = contents(image)
    description = saved(image, tmp_path / "snapshot")
    image.close()
    clones = [open_saved(description, str(tmp_path / "snapshot"), private=True) for _ in range(5)]
    for number, clone in enumerate(clones):
        write(clone, 4096 * number, bytes([number]) * 4096)
    for number, clone in enumerate(clones):
        assert contents(clone) == wanted[: 4096 * number] + bytes([number]) * 4096 + wanted[4096 * (number + 1) :]
        clone.close()


def test_a_layer_is_used_up_by_whoever_goes_on_with_it(tmp_path):
    image = make(tmp_path, "raw")
    description = saved(image, tmp_path / "snapshot")
    image.close()
    folder = str(tmp_path / "snapshot")
    clone = open_saved(description, folder, private=True)
    with pytest.raises(BackendError, match="in use"):
        open_saved(description, folder, private=False)
    clone.close()
    only = open_saved(description, folder, private=False)
    with pytest.raises(BackendError, match="in use"):
        open_saved(description, folder, private=True)
    write(only, 0, b"changed!" * 64)
    only.close()
    with pytest.raises(BackendError, match="changed since the snapshot: it was written to"):
        open_saved(description, folder, private=True)


# --- readonly, and by reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [True, False])
def test_a_disk_that_is_read_only_stays_where_it_is(tmp_path, private):
    (tmp_path / "base").write_bytes(b"b" * MIB)
    image = open_image(str(tmp_path / "base"), readonly=True)
    description = saved(image, tmp_path / "snapshot")
    image.close()
    assert os.listdir(tmp_path / "snapshot") == []
    again = open_saved(description, str(tmp_path / "snapshot"), private=private)
    assert again.readonly
    assert contents(again) == b"b" * MIB
    again.close()


@pytest.mark.parametrize("kind", ["raw", "qcow2", "small clusters", "overlay"])
def test_by_reference_one_goes_on_with_the_very_file(tmp_path, kind):
    image = make(tmp_path, kind)
    mix(image)
    image.discard(MIB, 64 * KIB)
    wanted = contents(image)
    description = saved(image, tmp_path / "snapshot", mode="reference")
    image.close()  # which leaves the file as it is
    assert os.listdir(tmp_path / "snapshot") == []
    again = open_saved(description, str(tmp_path / "snapshot"), private=False)
    assert contents(again) == wanted
    write(again, 0, b"n" * 512)
    again.close()
    with pytest.raises(BackendError, match="has changed since the snapshot"):
        open_saved(description, str(tmp_path / "snapshot"), private=False)


def test_by_reference_a_copy_is_another_file(tmp_path):
    image = make(tmp_path, "raw")
    description = saved(image, tmp_path / "snapshot", mode="reference")
    image.close()
    subprocess.run(["cp", "-p", tmp_path / "base", tmp_path / "copy"], check=True)
    (tmp_path / "copy").rename(tmp_path / "base")
    with pytest.raises(BackendError, match="another file has its place"):
        open_saved(description, str(tmp_path), private=True)


# --- what lies below --------------------------------------------------------------------------------------------------


def replace(path):
    path.write_bytes(b"z" * path.stat().st_size)


def keep_time(path):
    status = path.stat()
    replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


HARMS = {
    "gone": (lambda path: path.unlink(), "No such file"),
    "longer": (lambda path: os.truncate(path, SIZE + 512), "it had .* bytes and has"),
    "written to": (replace, "it was written to"),
    "touched": (lambda path: os.utime(path), "it was written to"),
    "set back": (keep_time, "its content differs"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("kind", ["memory", "overlay", "overlay of overlay"])
def test_a_base_that_is_not_what_it_was(tmp_path, kind, harm):
    image = make(tmp_path, kind)
    mix(image)
    description = saved(image, tmp_path / "snapshot")
    image.close()
    hurt, message = HARMS[harm]
    hurt(tmp_path / "base")
    with pytest.raises(BackendError, match=rf"base image {tmp_path}/base.*{message}|disk image .*{message}") as caught:
        open_saved(description, str(tmp_path / "snapshot"), private=True)
    assert "\n" not in str(caught.value)


def test_a_time_in_whole_seconds_is_the_same_time(tmp_path):
    """As some archives keep it."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    wanted = identify(str(path))
    os.utime(path, ns=(0, 1_700_000_000_000_000_000))
    check_identity(str(path), wanted, "file")
    for other in (1_700_000_001_000_000_000, 1_700_000_000_123_000_000):
        os.utime(path, ns=(0, other))
        with pytest.raises(BackendError, match="written to"):
            check_identity(str(path), wanted, "file")


@pytest.mark.parametrize("at", [0, 100_000, 262_143])
def test_a_small_file_is_looked_at_wholly(tmp_path, at):
    path = tmp_path / "file"
    data = bytearray(random.Random(1).randbytes(256 * KIB))
    path.write_bytes(data)
    wanted, status = identify(str(path)), path.stat()
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BackendError, match="content differs"):
        check_identity(str(path), wanted, "file")


# --- images over images -----------------------------------------------------------------------------------------------


def test_what_the_guest_sees_is_what_is_saved(tmp_path):
    """A checkpoint, and a disk's own cache, are no part of a snapshot: it holds the content as it is."""
    image = FaultyImage(CheckpointImage(make(tmp_path, "raw")), volatile=True)
    image.checkpoint()
    mix(image)
    wanted = contents(image)
    for number, step in enumerate((lambda: None, image.clear, image.commit)):
        step()
        folder = tmp_path / str(number)
        description = saved(image, folder)
        assert (folder / "blk0.raw").read_bytes() == wanted
        again = open_saved(description, str(folder), private=True)
        assert contents(again) == wanted
        again.close()
    image.close()


def test_images_that_are_not_in_the_way_are_looked_through(tmp_path):
    image = FaultyImage(CheckpointImage(make(tmp_path, "qcow2")))
    image.checkpoint()
    assert saved(image, tmp_path / "snapshot")["layer"]["format"] == "qcow2"
    image.close()


# --- malformed descriptions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("layer"),
        lambda d: d.pop("size"),
        lambda d: d["layer"].pop("identity"),
        lambda d: d["layer"].pop("backing"),
        lambda d: d["layer"]["identity"].pop("samples"),
        lambda d: d["layer"]["identity"].pop("inode"),
        lambda d: d.update(layer=None),
        lambda d: d.update(cache="fast"),
        lambda d: d.update(size="big"),
        lambda d: d.update(memory=1),
        lambda d: d["layer"].update(file="../base"),
        lambda d: d["layer"].update(file=".."),
        lambda d: d["layer"].update(file=7),
        lambda d: d["layer"].update(file=None, path=None),
        lambda d: d["layer"].update(file=None, path="a\0b"),
        lambda d: d["layer"].update(format="vmdk"),
        lambda d: d["layer"].update(backing=7),
        lambda d: d["layer"].update(identity=7),
    ],
)
def test_a_description_that_is_malformed(tmp_path, change):
    image = make(tmp_path, "raw")
    description = saved(image, tmp_path / "snapshot")
    image.close()
    broken = copy.deepcopy(description)
    change(broken)
    with pytest.raises((KeyError, TypeError, ValueError)):
        open_saved(broken, str(tmp_path / "snapshot"), private=True)
    open_saved(description, str(tmp_path / "snapshot"), private=False).close()  # and nothing is left locked


def test_a_disk_of_another_size_than_described(tmp_path):
    image = make(tmp_path, "raw")
    description = saved(image, tmp_path / "snapshot")
    image.close()
    with pytest.raises(BackendError, match="not of 512"):
        open_saved({**description, "size": 512}, str(tmp_path / "snapshot"), private=True)
    open_saved(description, str(tmp_path / "snapshot"), private=False).close()


def test_a_name_that_is_taken_and_a_mode_that_is_none(tmp_path):
    image = make(tmp_path, "raw")
    saved(image, tmp_path / "snapshot")
    with pytest.raises(BackendError, match="blk0 cannot be saved: File exists"):
        save_layers(image, str(tmp_path / "snapshot"), "blk0")
    with pytest.raises(ValueError, match="mode"):
        save_layers(image, str(tmp_path / "snapshot"), "blk1", mode="move")
    image.close()


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kernel", "by hand"])
@settings(max_examples=25)
@given(size=st.integers(1, 600), parts=st.lists(st.tuples(st.integers(0, 599), st.integers(1, 200)), max_size=5))
def test_a_copy_is_equal_and_has_its_holes(tmp_path, way, size, parts):
    source, target = tmp_path / "source", tmp_path / "target"
    with open(source, "wb") as file:
        for start, length in parts:
            file.seek(start * KIB)
            file.write(b"d" * length * KIB)
        file.truncate(size * KIB + 512)
    with pytest.MonkeyPatch.context() as patch, open(source, "rb") as old, open(target, "w+b") as new:
        patch.setattr(copying, "FICLONE", 0)
        if way == "by hand":
            patch.setattr("os.copy_file_range", lambda *_: 0)
        copying.copy_file(old.fileno(), new.fileno())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks + 16


def test_a_sparse_disk_stays_sparse(tmp_path):
    path = tmp_path / "base"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * 4096)
    image = open_image(str(path))
    description = saved(image, tmp_path / "snapshot")
    image.close()
    assert (tmp_path / "snapshot" / "blk0.raw").stat().st_blocks <= 64
    open_saved(description, str(tmp_path / "snapshot"), private=True).close()

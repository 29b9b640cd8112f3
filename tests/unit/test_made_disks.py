"""Disks that are made for tests, looked at by each file system's own tools."""

import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from hypervisor.errors import ConfigError, HostError
from hypervisor.testing import disks
from hypervisor.testing.disks import host_folder_image, make_disk

MIB = 1 << 20
SIZES = {"ext4": 16 * MIB, "ext2": 16 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "vfat": 16 * MIB}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    return tmp_path / "cache" / "trapvisor"


@pytest.fixture
def folder(tmp_path):
    """A folder with files, folders, modes and a link."""
    root = tmp_path / "folder"
    (root / "sub" / "empty").mkdir(parents=True)
    (root / "big").write_bytes(bytes(range(256)) * 1000)
    (root / "sub" / "tool").write_text("#!/bin/sh\n")
    (root / "sub" / "tool").chmod(0o755)
    (root / ".hidden").write_text("h")
    return root


def say(*words):
    result = subprocess.run([str(word) for word in words], check=False, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def ext_cat(path, name):
    return say("debugfs", "-R", f"cat {name}", path)


def btrfs_cat(path, name):
    out = path.with_suffix(".out")
    out.mkdir()
    say("btrfs", "restore", path, out)
    return (out / name).read_bytes()


def xfs_db(path, *commands):
    """Return the numbers that xfs_db prints, by their names."""
    shown = say("xfs_db", "-r", *(word for command in commands for word in ("-c", command)), path).decode()
    return {name: int(value) for name, value in re.findall(r"(\w+)(?: = | )(\d+)", shown)}


def xfs_cat(path, name):
    """Read a file that lies in one piece: its block number is that of an allocation group, and one inside it."""
    file = xfs_db(path, f"path /{name}", "print core.size", "bmap")
    disk = xfs_db(path, "sb 0", "print agblklog agblocks blocksize")
    group, block = divmod(file["startblock"], 1 << disk["agblklog"])
    start = (group * disk["agblocks"] + block) * disk["blocksize"]
    return path.read_bytes()[start : start + file["size"]]


LOOK = {
    "ext4": (("e2fsck", "-fn"), ext_cat),
    "ext2": (("e2fsck", "-fn"), ext_cat),
    "xfs": (("xfs_repair", "-n"), xfs_cat),
    "btrfs": (("btrfs", "check"), btrfs_cat),
    "vfat": (("fsck.vfat", "-n"), lambda path, name: say("mcopy", "-i", path, f"::/{name}", "-")),
}


@pytest.mark.parametrize("fs", SIZES)
def test_a_file_system_with_a_folder_in_it(tmp_path, folder, fs):
    path = tmp_path / "disk"
    assert make_disk(path, SIZES[fs], fs, folder=folder) == str(path)
    assert path.stat().st_size == SIZES[fs]
    check, cat = LOOK[fs]
    say(*check, path)
    assert cat(path, "big") == bytes(range(256)) * 1000
    assert sorted(os.listdir(tmp_path)) == sorted({"disk", "folder"} | ({"disk.out"} if fs == "btrfs" else set()))


@pytest.mark.parametrize("fs", SIZES)
def test_an_empty_file_system(tmp_path, fs):
    path = tmp_path / "disk"
    make_disk(path, SIZES[fs], fs)
    say(*LOOK[fs][0], path)


def test_links_and_modes_on_ext4(tmp_path, folder):
    (folder / "link").symlink_to("sub/tool")
    path = tmp_path / "disk"
    make_disk(path, 16 * MIB, folder=folder)
    assert b"Mode:  0755" in say("debugfs", "-R", "stat sub/tool", path)
    assert b'Fast link dest: "sub/tool"' in say("debugfs", "-R", "stat link", path)
    assert b"User:     0   Group:     0" in say("debugfs", "-R", "stat /", path)


def test_no_file_system_is_a_hole(tmp_path):
    make_disk(tmp_path / "disk", 1 << 40, None)
    status = (tmp_path / "disk").stat()
    assert (status.st_size, status.st_blocks) == (1 << 40, 0)


@pytest.mark.parametrize(
    ("size", "how", "message"),
    [
        (0, {}, "a disk of 0 bytes"),
        (1000, {}, "a disk of 1000 bytes"),
        (-512, {}, "a disk of -512 bytes"),
        (MIB, {"fs": "ntfs"}, "'ntfs' is not known"),
        (MIB, {"fs": None, "folder": "/"}, "needs a file system"),
        (MIB, {"folder": "/nowhere"}, "no folder"),
    ],
)
def test_what_makes_no_sense(tmp_path, size, how, message):
    with pytest.raises(ConfigError, match=message):
        make_disk(tmp_path / "disk", size, **how)
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_there_stays(tmp_path):
    path = tmp_path / "disk"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="there already"):
        make_disk(path, MIB)
    assert path.read_text() == "mine"


def test_a_folder_that_does_not_fit(tmp_path, folder):
    (folder / "huge").write_bytes(bytes(range(256)) * 40_000)
    with pytest.raises(HostError, match="mke2fs failed") as caught:
        make_disk(tmp_path / "disk", 4 * MIB, folder=folder)
    assert "too few" in caught.value.hint
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("fs", "program", "package"),
    [
        ("ext4", "mke2fs", "e2fsprogs"),
        ("ext2", "mke2fs", "e2fsprogs"),
        ("xfs", "mkfs.xfs", "xfsprogs"),
        ("btrfs", "mkfs.btrfs", "btrfs-progs"),
        ("vfat", "mkfs.vfat", "dosfstools"),
    ],
)
def test_a_tool_that_is_missing(tmp_path, monkeypatch, fs, program, package):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(disks, "SBIN", ())
    with pytest.raises(HostError, match=f"{program} is not installed") as caught:
        make_disk(tmp_path / "disk", SIZES[fs], fs)
    assert caught.value.hint == f"apt-get install {package}"
    assert os.listdir(tmp_path) == []


def test_names_that_a_new_xfs_cannot_have(tmp_path, folder):
    (folder / "a b").write_text("x")
    with pytest.raises(ConfigError, match="no names with blanks"):
        make_disk(tmp_path / "disk", SIZES["xfs"], "xfs", folder=folder)


# --- a folder of the host ---------------------------------------------------------------------------------------------


def test_a_folder_as_an_image(folder):
    path = host_folder_image(folder)
    say("e2fsck", "-fn", path)
    assert ext_cat(path, "big") == bytes(range(256)) * 1000
    assert ext_cat(path, ".hidden") == b"h"
    features = say("dumpe2fs", "-h", path)
    assert b"has_journal" not in features


def test_the_same_content_is_the_same_image(folder, tmp_path, monkeypatch):
    path = host_folder_image(folder)
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr("hypervisor.kernels.programs.capture", lambda *_, **__: pytest.fail("made again"))
    assert host_folder_image(str(folder)) == path
    assert host_folder_image(tmp_path / "copy") == path


CHANGES = {
    "content": lambda root: (root / "big").write_bytes(b"x" * 256_000),
    "name": lambda root: (root / "big").rename(root / "bigger"),
    "mode": lambda root: (root / "sub" / "tool").chmod(0o700),
    "new folder": lambda root: (root / "new").mkdir(),
    "gone": lambda root: (root / ".hidden").unlink(),
    "link": lambda root: (root / "link").symlink_to("big"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_content_is_another_image(folder, change):
    before = host_folder_image(folder)
    CHANGES[change](folder)
    assert host_folder_image(folder) != before


@pytest.mark.parametrize("count", [0, 1, 3000])
def test_there_is_room_for_any_folder(tmp_path, count):
    """Many small files, long names, nothing at all."""
    root = tmp_path / "root"
    root.mkdir()
    for number in range(count):
        (root / f"{number:0200d}").write_bytes(b"x" * (number % 3))
    path = host_folder_image(root)
    say("e2fsck", "-fn", path)
    if count:
        assert ext_cat(path, f"{1 if count > 1 else 0:0200d}") == b"x" * (1 if count > 1 else 0)


def test_a_large_file_fits(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "large").write_bytes(os.urandom(MIB) * 40)
    assert ext_cat(host_folder_image(root), "large") == (root / "large").read_bytes()


def test_what_is_no_folder_and_what_cannot_be_read(folder, tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        host_folder_image(folder / "big")
    with pytest.raises(ConfigError, match="no folder"):
        host_folder_image(tmp_path / "nowhere")


def test_a_folder_that_changes_while_it_is_copied(folder, monkeypatch):
    make = disks._make

    def meanwhile(*how):
        make(*how)
        (folder / "big").write_text("other")

    monkeypatch.setattr(disks, "_make", meanwhile)
    with pytest.raises(ConfigError, match="changes while"):
        host_folder_image(folder)


def test_an_image_that_nobody_wants_any_more_goes(folder, own_cache):
    old = host_folder_image(folder)
    (folder / "big").write_text("new")
    kept = host_folder_image(folder)
    place = own_cache / "folders" / Path(old).parent.parent.name
    os.utime(place / "lock", (0, time.time() - 8 * 24 * 3600))
    (folder / "big").write_text("newest")
    newest = host_folder_image(folder)
    assert not os.path.exists(old)
    assert os.path.exists(kept)
    assert stat.S_IMODE(os.stat(newest).st_mode) & 0o444 == 0o444

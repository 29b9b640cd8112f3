"""Disks for tests: new file systems in image files, and a folder of the host as a disk that a guest can read.

The host's own tools make them, in files, so that nobody needs to be root.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels import cache, programs
from hypervisor.kernels.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FILE_SYSTEMS", "host_folder_image", "make_disk"]

PACKAGES: Final = {
    "mke2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
}
"""The programs, each with its Debian package."""
SBIN: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where they are, though a user's PATH may not say so."""
SECTOR: Final = 512
BLOCK: Final = 4096
INODE: Final = 256
"""Bytes of an inode of ext4."""
SPARE: Final = 2 << 20
"""Bytes of an ext4 that hold neither files nor inodes, with some to spare."""
GROUP: Final = "folders"
"""The cache's group of folder images."""
WEEK: Final = 7 * 24 * 3600
"""Seconds after which a folder's image that nobody asked for is removed."""


def _program(name: str) -> str:
    """Return the path of a program of PACKAGES; raises HostError when it is not there."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *SBIN))
    found = shutil.which(name, path=path)
    if found is None:
        raise HostError(f"{name} is not installed on this host", hint=f"apt-get install {PACKAGES[name]}")
    return found


def _ext(kind: str) -> Callable[[str, str | None], list[list[str]]]:
    def commands(path: str, folder: str | None) -> list[list[str]]:
        # all is written now: a guest's kernel would do it later, beside what the test does
        how = ["-q", "-F", "-t", kind, "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"]
        return [[_program("mke2fs"), *how, *(("-d", folder) if folder else ()), path]]

    return commands


def _xfs(path: str, folder: str | None) -> list[list[str]]:
    command = [_program("mkfs.xfs"), "-q", "-f"]
    if folder is not None:
        prototype = f"{path}.prototype"
        with open(prototype, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write("\n".join(["/dev/null", "0 0", *_prototype("", folder, 0)]) + "\n")
        command += ["-p", prototype]
    return [[*command, path]]


def _prototype(name: str, path: str, depth: int) -> Iterator[str]:
    """Yield what mkfs.xfs(8) is told about a file or folder by "-p": name, kind and mode, owner, and what is in it."""
    status = os.lstat(path)
    mode = f"{'u' if status.st_mode & stat.S_ISUID else '-'}{'g' if status.st_mode & stat.S_ISGID else '-'}"
    mode += f"{status.st_mode & 0o777:03o} 0 0"
    lead = f"{' ' * depth}{name} ".lstrip() if name else ""
    if any(letter.isspace() for letter in name):
        raise ConfigError(f"{path!r} cannot go into a new XFS: mkfs.xfs takes no names with blanks", hint="fs='ext4'")
    if stat.S_ISDIR(status.st_mode):
        yield f"{lead}d{mode}"
        for child in sorted(os.listdir(path)):
            yield from _prototype(child, os.path.join(path, child), depth + 1)
        yield "$"
    elif stat.S_ISREG(status.st_mode):
        yield f"{lead}-{mode} {os.path.abspath(path)}"
    elif stat.S_ISLNK(status.st_mode):
        yield f"{lead}l{mode} {os.readlink(path)}"
    else:
        raise ConfigError(f"{path!r} is neither a file, a folder nor a symbolic link")


def _btrfs(path: str, folder: str | None) -> list[list[str]]:
    return [[_program("mkfs.btrfs"), "-q", "-f", *(("--rootdir", folder) if folder else ()), path]]


def _vfat(path: str, folder: str | None) -> list[list[str]]:
    made = [[_program("mkfs.vfat"), path]]
    children = sorted(os.path.join(folder, child) for child in os.listdir(folder)) if folder else []
    if children:
        made.append([_program("mcopy"), "-s", "-Q", "-i", path, *children, "::/"])
    return made


FILE_SYSTEMS: Final[dict[str, Callable[[str, str | None], list[list[str]]]]] = {
    "ext4": _ext("ext4"),
    "ext2": _ext("ext2"),
    "xfs": _xfs,
    "btrfs": _btrfs,
    "vfat": _vfat,
}
"""For each file system the commands that make it, given the file's path and a folder to fill it with."""


def make_disk(
    path: str | os.PathLike[str],
    size: int,
    fs: str | None = "ext4",
    folder: str | os.PathLike[str] | None = None,
) -> str:
    """Make a raw disk image with a new file system, sparse; it appears when it is whole.

    Args:
        path: of the new file, which may not exist.
        size: in bytes, a multiple of 512.
        fs: one of FILE_SYSTEMS; None leaves the disk empty.
        folder: a folder of the host whose content is copied into it; on vfat without owners and links.

    Returns:
        The path.

    Raises:
        ConfigError: the arguments make no sense.
        HostError: a tool is not installed, naming its package, or fails: there may be too little room.
    """
    path = os.fspath(path)
    if size <= 0 or size % SECTOR:
        raise ConfigError(f"a disk of {size} bytes", hint=f"it is a multiple of {SECTOR}")
    if fs is not None and fs not in FILE_SYSTEMS:
        raise ConfigError(f"file system {fs!r} is not known", hint=f"it is one of: {', '.join(FILE_SYSTEMS)}")
    if fs is None and folder is not None:
        raise ConfigError("a folder needs a file system to be copied into")
    if folder is not None and not os.path.isdir(folder):
        raise ConfigError(f"{os.fspath(folder)} is no folder")
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already", hint="name a new file")
    commands = (lambda made: FILE_SYSTEMS[fs](made, None if folder is None else os.fspath(folder))) if fs else None
    _make(path, size, commands)
    return path


def _make(path: str, size: int, commands: Callable[[str], list[list[str]]] | None) -> None:
    """Run commands on a sparse file beside `path`, and call it `path` when they have succeeded."""
    work = f"{path}.{os.getpid()}.tmp"
    os.mkdir(work)
    try:
        made = os.path.join(work, "disk")
        with open(made, "xb") as file:
            file.truncate(size)
        for command in () if commands is None else commands(made):
            programs.capture(command, hint=f"are {size} bytes too few?")
        os.link(made, path)  # unlike a rename it never takes another file's place
    finally:
        shutil.rmtree(work, ignore_errors=True)


# --- a folder of the host ---------------------------------------------------------------------------------------------


class _Survey(NamedTuple):
    """What is in a folder: a hash of all of it, how many files, and how many bytes they take on an ext4."""

    digest: str
    files: int
    room: int


def _survey(folder: str) -> _Survey:
    """Read a folder; raises ConfigError when something in it cannot be read."""
    digest = hashlib.sha256()
    files = room = 0
    try:
        for name, path, status in _walk(folder, ""):
            files += 1
            kind = stat.S_IFMT(status.st_mode)
            content = b""
            if stat.S_ISREG(kind):
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
                room += status.st_size + BLOCK + status.st_size // 256
            elif stat.S_ISLNK(kind):
                content = os.fsencode(os.readlink(path))
                room += BLOCK
            elif stat.S_ISDIR(kind):
                room += 2 * BLOCK + 2 * sum(len(os.fsencode(child)) + 12 for child in os.listdir(path))
            said = (os.fsencode(name), b"%o" % status.st_mode, content)
            digest.update(b"".join(b"%d:%b," % (len(one), one) for one in said))
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    return _Survey(digest.hexdigest(), files, room)


def _walk(path: str, name: str) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yield the name inside, path and status of a folder and everything in it, sorted; links are not followed."""
    status = os.lstat(path) if name else os.stat(path)
    yield name, path, status
    if stat.S_ISDIR(status.st_mode):
        for child in sorted(os.listdir(path)):
            yield from _walk(os.path.join(path, child), f"{name}/{child}")


def host_folder_image(folder: str | os.PathLike[str]) -> str:
    """Return a disk image with a copy of a host's folder, for a disk with `readonly`.

    It is an ext4 without a journal, which the guest kernels `tiny` and `debian` both have built in: `mount -t ext4 -o
    ro /dev/vda /mnt`. Images are kept in the cache by what is in the folder (names, modes, contents, links): the same
    content costs reading it. One that was not asked for in a week is removed.

    Raises:
        ConfigError: it is no folder, cannot be read, or changes while it is copied.
        HostError: mke2fs is not installed or fails.
    """
    folder = os.path.abspath(folder)
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} is no folder")
    survey = _survey(folder)
    slot = cache.Slot(GROUP, survey.digest[:32])
    with cache.refusals("a folder's image", slot.folder):
        path = _cached(slot)
        if path is None:
            with slot.locked(Progress()):
                path = _cached(slot) or _build(slot, folder, survey)
            _prune(slot)
        os.utime(slot.folder / "lock")
    return str(path)


def _cached(slot: cache.Slot) -> Path | None:
    """Return a folder's image that is there and whole."""
    manifest = slot.current()
    return None if manifest is None or manifest.damage(deep=False) else manifest.role("image")


def _build(slot: cache.Slot, folder: str, survey: _Survey) -> Path:
    """Make the image; the cache's place is locked."""
    with slot.workspace() as work:
        (work / "made").mkdir()
        size = survey.room + 2 * INODE * survey.files + SPARE
        size = -(-(size + size // 16) // BLOCK) * BLOCK
        how = ["-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0", "-N", str(survey.files + 64)]
        how += ["-O", "^has_journal,^resize_inode", "-E", "root_owner=0:0,lazy_itable_init=0", "-d", folder]
        mke2fs = _program("mke2fs")
        _make(str(work / "made" / "disk.ext4"), size, lambda made: [[mke2fs, *how, made]])
        if _survey(folder).digest != survey.digest:
            raise ConfigError(f"{folder} changes while it is copied")
        manifest = slot.publish(
            work / "made", version="ext4", fingerprint=survey.digest, roles={"image": "disk.ext4"}, notes=[folder]
        )
    return manifest.folder / "disk.ext4"


def _prune(slot: cache.Slot) -> None:
    """Remove the images that nobody has asked for in a week; a machine that has one open keeps it."""
    for other in slot.folder.parent.iterdir():
        lock = other / "lock"
        with contextlib.suppress(OSError):
            if other != slot.folder and lock.stat().st_mtime < time.time() - WEEK:
                with lock.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other)

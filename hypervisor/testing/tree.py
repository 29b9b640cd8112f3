"""Folders with all that is in them, as the agent sends and takes them (agent/PROTOCOL.md, "Trees").

What comes from a guest names one entry of one folder at a time, never a path: a name with a slash, or one of the two
with dots, is refused, and nothing is opened through a symbolic link. So nothing lands outside of where it was asked to.
"""

from __future__ import annotations

import os
import stat
from struct import Struct
from typing import TYPE_CHECKING, Final, Protocol

from hypervisor.testing.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TreeError", "pack", "unpack"]

RECORD: Final = Struct("<BBHI")
LENGTH: Final = Struct("<I")
FOLDER: Final = 1
FILE: Final = 2
LINK: Final = 3
END: Final = 4
CHUNK: Final = 60 << 10
DEPTH: Final = 128
MOST_NAME: Final = 255
MOST_TARGET: Final = 4095
MODE: Final = 0o7777
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_ENTER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class TreeError(AgentError):
    """A tree that cannot be: of the guest's making, or one that a copy cannot hold."""


class Source(Protocol):
    """Where the bytes of a tree come from."""

    def read(self, size: int, /) -> bytes:
        """Return `size` bytes, fewer only at the end."""


# --- out -------------------------------------------------------------------------------------------------------------


def pack(path: str) -> Iterator[bytes]:
    """Yield the tree at `path`, in pieces of some 60 KiB at most.

    Raises:
        TreeError: something in it is neither file, folder nor symbolic link.
        OSError: something cannot be read.
    """
    yield from _pack(path, b"", os.stat(path), 0)


def _pack(path: str, name: bytes, status: os.stat_result, depth: int) -> Iterator[bytes]:
    mode = status.st_mode
    if depth > DEPTH:
        raise TreeError(f"{path}: folders are {depth} deep; at most {DEPTH} can be copied")
    if stat.S_ISLNK(mode):
        target = os.fsencode(os.readlink(path))
        yield RECORD.pack(LINK, 0, len(name), 0o777) + name + LENGTH.pack(len(target)) + target
    elif stat.S_ISREG(mode):
        yield RECORD.pack(FILE, 0, len(name), mode & MODE) + name
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                yield LENGTH.pack(len(chunk)) + chunk
        yield LENGTH.pack(0)
    elif stat.S_ISDIR(mode):
        yield RECORD.pack(FOLDER, 0, len(name), mode & MODE) + name
        for child in sorted(os.listdir(path)):
            inside = os.path.join(path, child)
            yield from _pack(inside, os.fsencode(child), os.lstat(inside), depth + 1)
        yield RECORD.pack(END, 0, 0, 0)
    else:
        raise TreeError(f"{path} is neither a file, a folder nor a symbolic link")


# --- in --------------------------------------------------------------------------------------------------------------


class _Unpacker:
    """Takes a tree apart; `room` bytes may still be written."""

    def __init__(self, source: Source, limit: int) -> None:
        self._source = source
        self._limit = limit
        self._room = limit

    def _read(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise TreeError("the guest's copy ends in the middle")
        return data

    def _spend(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise TreeError(f"the guest's copy has more than limit={self._limit} bytes")

    def record(self) -> tuple[int, str, int]:
        """Return kind, name and mode of what comes next."""
        kind, _, length, mode = RECORD.unpack(self._read(RECORD.size))
        if length > MOST_NAME:
            raise TreeError(f"a name of {length} bytes in the guest's copy")
        self._spend(RECORD.size + length)  # entries cost, too: there is no end of empty ones otherwise
        name = self._read(length)
        if b"/" in name or b"\0" in name or name in {b".", b".."}:
            raise TreeError(f"the guest's copy has a file called {name!r}")
        return kind, os.fsdecode(name), mode & MODE

    def place(self, kind: int, mode: int, folder: int | None, name: str, depth: int) -> None:
        """Make what a record announced, as `name` of a folder; without a folder `name` is a path."""
        if kind == FILE:
            self._file(mode, folder, name)
        elif kind == LINK:
            self._link(folder, name)
        elif kind == FOLDER:
            self._folder(mode, folder, name, depth)
        else:
            raise TreeError(f"the guest's copy has an entry of kind {kind}")

    def _file(self, mode: int, folder: int | None, name: str) -> None:
        _make_room(folder, name, stat.S_ISREG)
        fd = os.open(name, _NEW, 0o600, dir_fd=folder)
        try:
            while size := LENGTH.unpack(self._read(LENGTH.size))[0]:
                self._spend(size)
                while size:
                    data = self._read(min(size, CHUNK))
                    size -= len(data)
                    view = memoryview(data)
                    while view:
                        view = view[os.write(fd, view) :]
            os.fchmod(fd, mode)
        finally:
            os.close(fd)

    def _link(self, folder: int | None, name: str) -> None:
        (size,) = LENGTH.unpack(self._read(LENGTH.size))
        if not 0 < size <= MOST_TARGET:
            raise TreeError(f"a symbolic link of {size} bytes in the guest's copy")
        self._spend(size)
        target = self._read(size)
        if b"\0" in target:
            raise TreeError("a symbolic link with a NUL in the guest's copy")
        _make_room(folder, name, lambda _: False)
        os.symlink(target, os.fsencode(name), dir_fd=folder)

    def _folder(self, mode: int, folder: int | None, name: str, depth: int) -> None:
        if depth >= DEPTH:
            raise TreeError(f"folders are more than {DEPTH} deep in the guest's copy")
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
        except FileExistsError:
            pass  # what is in it stays; if it is no folder, the next line says so
        fd = os.open(name, _ENTER if depth else _ENTER & ~os.O_NOFOLLOW, dir_fd=folder)
        try:
            while True:
                kind, child, child_mode = self.record()
                if kind == END:
                    break
                if not child:
                    raise TreeError("the guest's copy has an entry without a name")
                self.place(kind, child_mode, fd, child, depth + 1)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)


def _make_room(folder: int | None, name: str, may_stay: object) -> None:
    """Remove what is called `name`, unless it is of the kind that is written over."""
    try:
        mode = os.lstat(name, dir_fd=folder).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise TreeError(f"{name} is a folder here, and none in the guest")
    if not (callable(may_stay) and may_stay(mode)):
        os.unlink(name, dir_fd=folder)


def unpack(source: Source, path: str, *, limit: int) -> None:
    """Make the tree that `source` brings at `path`. What is there already is written over, or stays beside it.

    Args:
        source: a tree from a guest, which is not trusted.
        path: what its root becomes.
        limit: most bytes that may be written, names included.

    Raises:
        TreeError: it is no tree, or larger than that. What came before is there.
        OSError: something cannot be written.
    """
    unpacker = _Unpacker(source, limit)
    kind, name, mode = unpacker.record()
    if name:
        raise TreeError("the guest's copy does not begin with its root")
    unpacker.place(kind, mode, None, path, 0)

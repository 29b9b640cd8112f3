"""The manifest of a snapshot: one JSON object that says all of it but memory and disks, and ends in its own hash.

The last member, `digest`, is the xxh3-128 of every byte before it, so that one flipped bit is found, wherever it is.
It is there for accidents: whoever can write the file can write a digest that fits.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Final, NoReturn

import msgspec
import xxhash
from msgspec import Meta

from hypervisor.errors import DamagedSnapshotError, SnapshotError
from hypervisor.snapshot import plain

__all__ = ["CHUNK", "FORMAT", "MANIFEST", "VERSION", "LayerEntry", "Manifest", "MemoryEntry", "Parent", "Range"]

FORMAT: Final = "trapvisor-snapshot"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
CHUNK: Final = 1 << 16
"""Bytes of memory that have a hash: where xxh3 is at its quickest, and small enough that little is saved twice."""
MOST_BYTES: Final = 1 << 28
"""A manifest has a few 10 kB, and more only with a kernel that was given as bytes."""
MOST_RAM: Final = 1 << 40
PAGE: Final = 4096
TAIL: Final = re.compile(rb',"digest":"([0-9a-f]{32})"\}\n')
TAIL_SIZE: Final = 46

Size = Annotated[int, Meta(ge=0, le=1 << 62)]
Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
"""An xxh3-128, or 128 random bits, in hexadecimal."""
Address = Annotated[int, Meta(ge=0, le=(1 << 52) - PAGE, multiple_of=PAGE)]
Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=200)]


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of guest-physical RAM, and where it lies in the memory file: all in bytes."""

    gpa: Address
    size: Annotated[int, Meta(ge=PAGE, le=MOST_RAM, multiple_of=PAGE)]
    offset: Address


class MemoryEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory file.

    Attributes:
        size: bytes of RAM.
        chunk: bytes of a chunk.
        codec: "raw": a chunk lies where it lies in RAM; "zstd": those that are there follow each other, one frame each.
        ranges: where the RAM is.
        index: hash of the index file.
        stored: bytes of the memory file.
        zero, data, base: chunks of zeros, chunks that are here, and those that are the parent's.
    """

    size: Annotated[int, Meta(ge=PAGE, le=MOST_RAM, multiple_of=PAGE)]
    chunk: Size
    codec: Annotated[str, Meta(pattern=r"\A(raw|zstd)\Z")]
    ranges: Annotated[tuple[Range, ...], Meta(min_length=1, max_length=64)]
    index: Hash
    stored: Size
    zero: Size
    data: Size
    base: Size


class LayerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the memory, such as a disk's overlay: its name, bytes and hash."""

    name: Name
    size: Size
    hash: Hash


class Parent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The snapshot that a differential one needs: its id, the digest of its manifest, and where it was.

    The path is relative to the directory that the snapshot itself lies in.
    """

    id: Hash
    digest: Hash
    path: str | dict[str, str]

    def place(self) -> str:
        """Return the path; raises ValueError where it is none, or absolute."""
        path = plain.unpack(self.path)
        if not isinstance(path, str) or not path or "\0" in path or os.path.isabs(path):
            raise ValueError("the parent has no relative path")
        return path


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a snapshot says of itself; `machine`, `host` and `state` as `plain.pack` makes them."""

    format: str
    version: int
    hv: str
    id: Hash
    saved: str
    saved_ns: Size
    page_size: Size
    parent: Parent | None
    memory: MemoryEntry
    layers: Annotated[tuple[LayerEntry, ...], Meta(max_length=4096)]
    host: dict[str, Any]
    machine: dict[str, Any]
    state: dict[str, Any]


class _Head(msgspec.Struct):
    """What every version begins with."""

    format: str
    version: int
    hv: str = "?"


def encode(manifest: Manifest) -> tuple[bytes, str]:
    """Return the file's bytes, and the digest in them."""
    body = msgspec.json.encode(manifest)[:-1]
    digest = xxhash.xxh3_128_hexdigest(body)
    return body + f',"digest":"{digest}"}}\n'.encode(), digest


def decode(data: bytes, path: str) -> tuple[Manifest, str]:
    """Read a manifest, and return it with its digest.

    Args:
        data: the file.
        path: its name, for errors.

    Raises:
        SnapshotError: it is of another version.
        DamagedSnapshotError: it is not what was written, or what nobody would write.
    """
    if not data:
        raise DamagedSnapshotError(path, "is empty")
    tail = TAIL.fullmatch(data[-TAIL_SIZE:])
    body = data[:-TAIL_SIZE]
    digest = tail[1].decode() if tail else ""
    if not tail or xxhash.xxh3_128_hexdigest(body) != digest:
        _refuse_other_version(data, path)
        raise DamagedSnapshotError(path, "is cut short or altered: its digest does not fit")
    try:
        _refuse_other_version(body + b"}", path)
        manifest = msgspec.json.decode(body + b"}", type=Manifest)
        _check(manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _refuse(path, error)
    return manifest, digest


def read(directory: int, path: str) -> tuple[Manifest, str]:
    """Read the manifest in a directory that is open; raises as `decode` does, OSError when it cannot be read."""
    name = os.path.join(path, MANIFEST)
    fd = os.open(MANIFEST, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > MOST_BYTES:
            raise DamagedSnapshotError(name, f"has {size} bytes, and a manifest at most {MOST_BYTES}")
        return decode(file.read(MOST_BYTES), name)


def values(packed: dict[str, Any], path: str, what: str) -> Any:
    """Return a member that holds plain values, unpacked; raises DamagedSnapshotError."""
    try:
        return plain.unpack(packed)
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedSnapshotError(os.path.join(path, MANIFEST), f"{what}: {error}") from error


def _refuse_other_version(data: bytes, path: str) -> None:
    """Raise SnapshotError where the file is readable, and of another version or kind."""
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    if head.format != FORMAT:
        raise SnapshotError(f"{path} is no manifest of a snapshot", hint="`hv snapshot save` writes one")
    if head.version != VERSION:
        age = "newer" if head.version > VERSION else "older"
        raise SnapshotError(
            f"{path} is of version {head.version}, {age} than {VERSION}, which this hv reads",
            hint=f"use the hv that wrote it ({head.hv[:40]!r})",
        )


def _refuse(path: str, error: Exception) -> NoReturn:
    text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
    hint = None
    if "unknown field" in text:
        hint = "a newer hv wrote it: read it with that one"
    raise DamagedSnapshotError(path, text, hint=hint) from None


def _check(manifest: Manifest) -> None:
    """Raise ValueError on what no type can refuse."""
    memory = manifest.memory
    if memory.chunk != CHUNK:
        raise ValueError(f"memory chunks of {memory.chunk} bytes, not {CHUNK}")
    place = end = 0
    for one in memory.ranges:
        if one.offset != place or one.gpa < end:
            raise ValueError(f"memory ranges overlap or leave gaps at {one.gpa:#x}")
        place, end = place + one.size, one.gpa + one.size
    if place != memory.size:
        raise ValueError(f"memory ranges of {place} bytes in all, and {memory.size} bytes of memory")
    if memory.zero + memory.data + memory.base != -(-memory.size // CHUNK):
        raise ValueError("the chunks of memory do not add up")
    if memory.codec == "raw" and memory.stored != memory.size:
        raise ValueError(f"{memory.stored} bytes of memory file for {memory.size} bytes of memory")
    if memory.base and manifest.parent is None:
        raise ValueError("memory of a parent, but no parent")
    if manifest.parent is not None:
        manifest.parent.place()
    names = [layer.name for layer in manifest.layers]
    if len(set(names)) < len(names) or not RESERVED.isdisjoint(names):
        raise ValueError("layers have the names of other files")


RESERVED: Final = frozenset({MANIFEST, "memory", "memory.index"})

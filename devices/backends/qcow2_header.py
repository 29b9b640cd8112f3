"""The header of a qcow2 file, and how to make one (QEMU, docs/interop/qcow2)."""

from __future__ import annotations

import os
from struct import Struct
from typing import Final, NamedTuple

from devices.backends.errors import BackendError

__all__ = ["Header", "check_stands_alone", "create", "parse", "set_backing"]

MAGIC: Final = 0x514649FB
_V2: Final = Struct(">IIQIIQIIQQIIQ")
_V3: Final = Struct(">QQQII")
V2_SIZE: Final = _V2.size
V3_SIZE: Final = V2_SIZE + _V3.size

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
COMPRESSION: Final = 1 << 3
DATA_FILE: Final = 1 << 2
INCOMPATIBLE: Final = {
    2: "an external data file",
    4: "extended L2 entries",
}
FEATURES_AT: Final = 72
"""Offset of the incompatible features, version 3."""
BACKING_SIZE_AT: Final = 16
AUTOCLEAR_AT: Final = 88
REFCOUNT_TABLE_AT: Final = 48
BACKING_FORMAT: Final = 0xE2792ACA
"""Header extension with the backing file's format."""
MAX_SIZE: Final = 1 << 55
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_NAME: Final = 1023
MAX_SHOWN_NAME: Final = 100
"""Characters of a name in a message."""
SECTOR: Final = 512


class Header(NamedTuple):
    """What a header says; offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    refcount_order: int
    snapshots: int
    incompatible: int
    autoclear: int
    compression: int
    backing: str | None
    backing_format: str | None


def _refuse(path: str, what: str, hint: str = "") -> BackendError:
    return BackendError(f"disk image {path}: {what}", hint=hint or f"`qemu-img check {path}` may tell more")


def parse(path: str, data: bytes, file_size: int) -> Header:
    """Read a header.

    Args:
        path: for messages.
        data: the file's beginning, 64 KiB or less.
        file_size: how long the file is.

    Raises:
        BackendError: it is damaged, or asks for what is not supported.
    """
    if len(data) < V2_SIZE:
        raise _refuse(path, f"a qcow2 header that ends after {len(data)} bytes")
    (magic, version, name_at, name_size, bits, size, crypt, l1_size, l1_at, table_at, table_clusters, snapshots, _) = (
        _V2.unpack_from(data)
    )
    if magic != MAGIC or version not in {2, 3}:
        raise _refuse(path, f"no qcow2 image of version 2 or 3 (version {version})")
    incompatible = autoclear = compression = 0
    order, length = 4, V2_SIZE
    if version == 3:
        if len(data) < V3_SIZE:
            raise _refuse(path, f"a qcow2 header that ends after {len(data)} bytes")
        incompatible, _, autoclear, order, length = _V3.unpack_from(data, V2_SIZE)
        if length < V3_SIZE or length > len(data) or length % 8:
            raise _refuse(path, f"a qcow2 header of {length} bytes")
        compression = data[V3_SIZE] if length > V3_SIZE else 0
    _check_features(path, crypt, incompatible, compression)
    if not 9 <= bits <= 21 or order > 6:
        raise _refuse(path, f"clusters of 2^{bits} bytes with refcounts of 2^{order} bits")
    cluster = 1 << bits
    _check_tables(path, cluster, size, (l1_at, l1_size), (table_at, table_clusters), file_size)
    backing = _backing_name(path, data[:cluster], name_at, name_size)
    return Header(
        *(version, bits, size, l1_size, l1_at, table_at, table_clusters, order, snapshots, incompatible, autoclear),
        *(compression, backing, _backing_format(data, length)),
    )


def check_stands_alone(path: str, data: bytes) -> None:
    """Refuse a header that names another file: nobody but the file itself said that it is a qcow2 image.

    Args:
        path: for messages.
        data: the file's beginning; what is damaged in it is for `parse` to say.

    Raises:
        BackendError: there is a backing file or an external data file.
    """
    if len(data) < V2_SIZE:
        return
    _, version, name_at, name_size, *_ = _V2.unpack_from(data)
    if name_at:
        name = ascii(os.fsdecode(data[name_at : name_at + min(name_size, MAX_NAME)]))
        what = f"another file, {name if len(name) <= MAX_SHOWN_NAME else name[:MAX_SHOWN_NAME] + '...'}"
    elif version >= 3 and len(data) >= V3_SIZE and _V3.unpack_from(data, V2_SIZE)[0] & DATA_FILE:
        what = "an external data file"
    else:
        return
    raise BackendError(
        f"disk image {path} looks like a qcow2 image that names {what}",
        hint="a guest can write such a header: say format=qcow2 if you trust it, format=raw if it is a raw image",
    )


def _check_tables(  # noqa: PLR0913, PLR0917 - a header's fields
    path: str, cluster: int, size: int, l1: tuple[int, int], table: tuple[int, int], file_size: int
) -> None:
    """Check the disk's size, and that the L1 table (offset, entries) and refcount table (offset, clusters) fit."""
    if not 0 < size <= MAX_SIZE or size % SECTOR:
        raise _refuse(path, f"a disk of {size} bytes")
    if l1[1] * 8 > MAX_L1_BYTES or l1[1] < -(-size // (cluster * cluster // 8)):
        raise _refuse(path, f"an L1 table of {l1[1]} entries for a disk of {size} bytes")
    if not 0 < table[1] * cluster <= MAX_REFCOUNT_TABLE_BYTES:
        raise _refuse(path, f"a refcount table of {table[1]} clusters")
    for what, at, room in (("L1", l1[0], l1[1] * 8), ("refcount", table[0], table[1] * cluster)):
        if at % cluster or at < cluster or at + room > file_size:
            raise _refuse(path, f"its {what} table, {room} bytes at {at:#x}, is not in the file")


def _check_features(path: str, crypt: int, incompatible: int, compression: int) -> None:
    if crypt:
        raise _refuse(path, "it is encrypted, which is not supported", "`qemu-img convert` makes a plain copy")
    for bit, what in INCOMPATIBLE.items():
        if incompatible >> bit & 1:
            raise _refuse(path, f"it has {what}, which is not supported", "`qemu-img convert` makes a plain copy")
    if incompatible >> 5:
        raise _refuse(path, f"it needs features that are not known ({incompatible:#x})")
    if compression > 1:
        raise _refuse(path, f"compression type {compression} is not known")


def _backing_name(path: str, data: bytes, at: int, size: int) -> str | None:
    if not at:
        return None
    if not 0 < size <= MAX_NAME or at + size > len(data):
        raise _refuse(path, "the name of its backing file is not in the header")
    return os.fsdecode(data[at : at + size])


def set_backing(path: str, backing: str) -> None:
    """Name another place for an image's backing file; raises BackendError if its first cluster has no room for that.

    The name is the last thing in the first cluster ("Header"), so that it may become longer.
    """
    name = os.fsencode(backing)
    with open(path, "r+b") as file:
        _, _, at, _, bits, *_ = _V2.unpack(file.read(V2_SIZE))
        if not at or len(name) > MAX_NAME or at + len(name) > 1 << bits:
            raise _refuse(path, f"its header has no room for the name {backing}")
        file.seek(at)
        file.write(name)
        file.seek(BACKING_SIZE_AT)
        file.write(len(name).to_bytes(4, "big"))


def _backing_format(data: bytes, at: int) -> str | None:
    """Look through the header extensions."""
    while at + 8 <= len(data):
        kind = int.from_bytes(data[at : at + 4], "big")
        size = int.from_bytes(data[at + 4 : at + 8], "big")
        if kind == 0 or at + 8 + size > len(data):
            break
        if kind == BACKING_FORMAT:
            return data[at + 8 : at + 8 + size].decode("ascii", "replace")
        at += 8 + (size + 7 & ~7)
    return None


def create(
    path: str, size: int, *, cluster_bits: int = 16, backing: str | None = None, backing_format: str | None = None
) -> None:
    """Make an empty image of version 3; it appears when it is whole.

    Args:
        path: of the new file, which may not exist.
        size: of the disk in bytes, a multiple of 512.
        cluster_bits: 9 to 21.
        backing: the file that unwritten parts are read from; a relative path is relative to the new file's folder.
        backing_format: "raw" or "qcow2".

    Raises:
        OSError: it cannot be made.
    """
    cluster = 1 << cluster_bits
    l1_size = max(-(-size // (cluster * cluster // 8)), 1)
    l1_clusters = -(-l1_size * 8 // cluster)
    used = 3 + l1_clusters  # header, refcount table, one refcount block, L1
    if used > cluster // 2:
        raise BackendError(f"{path}: clusters of {cluster} bytes are too small for {size} bytes")
    name = os.fsencode(backing) if backing is not None else b""
    extensions = b""
    if backing_format is not None:
        text = backing_format.encode("ascii")
        extensions = (
            BACKING_FORMAT.to_bytes(4, "big") + len(text).to_bytes(4, "big") + text.ljust(-(-len(text) // 8) * 8, b"\0")
        )
    extensions += bytes(8)
    name_at = V3_SIZE + 8 + len(extensions)
    header = _V2.pack(
        *(MAGIC, 3, name_at if name else 0, len(name), cluster_bits, size, 0, l1_size),
        *(3 * cluster, cluster, 1, 0, 0),
    )
    header += _V3.pack(0, 0, 0, 4, V3_SIZE + 8) + bytes(8) + extensions + name
    if len(header) > cluster:
        raise BackendError(f"{path}: the backing file's name does not fit into a cluster of {cluster} bytes")
    table = (2 * cluster).to_bytes(8, "big")
    block = (1).to_bytes(2, "big") * used
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "xb") as file:
        try:
            for number, part in enumerate((header, table, block)):
                file.seek(number * cluster)
                file.write(part)
            file.truncate(used * cluster)
            file.flush()
            os.fsync(file.fileno())
            os.link(temporary, path)  # unlike a rename it never takes another file's place
        finally:
            os.unlink(temporary)

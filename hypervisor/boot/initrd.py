"""Checking an initial RAM disk before a guest boots for seconds only to panic over it.

Linux takes a chain of cpio archives ("newc", described by buffer-format.rst in the kernel's documentation), each plain
or compressed, with zero bytes between them; or an image of an old file system for root=/dev/ram0. Here the chain is
followed to its end as far as that is cheap:

* cpio: every header is visited, and every entry must be whole (the end mark TRAILER!!! is optional to Linux);
* zstd and lz4: from block to block, by their lengths, without decompressing;
* xz: the file must end in a stream footer with a right CRC32; bzip2: in its end-of-stream mark;
* gzip has no mark. Its last four bytes are the length of the content, and a cpio archive is padded to a multiple of
  512: if they are no such length, or the file is small, it is decompressed to see (one truncated file in 512 that is
  larger than FULL_CHECK is not noticed);
* lzma and LZO are believed.

Where the cheap sign is missing the stream is decompressed, so that a sound file is never refused.
"""

from __future__ import annotations

import struct
from binascii import crc32
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hypervisor.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check"]

FULL_CHECK: Final = 1 << 20
"""A gzip file up to this many bytes is always decompressed: some ten milliseconds."""
CHUNK: Final = 1 << 20
LZMA_MEMORY: Final = 512 << 20
"""Bound on the dictionary of an xz file; the kernel's is at most 128 MiB."""

CPIO_HEADER: Final = 110
CPIO_MAGICS: Final = (b"070701", b"070702")
CPIO_FILESIZE: Final = 6
CPIO_NAMESIZE: Final = 11
"""Index of the fields c_filesize and c_namesize among the 13 after the magic number, 8 hex digits each."""

BZIP2_END: Final = 0x1772_4538_5090
"""The 48 bits before the checksum that ends a bzip2 stream; they stand at any bit."""
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"
SECTOR: Final = 512

_WHAT = "an initrd is a cpio archive (newc), plain or packed with gzip, xz, zstd, lz4 -l, bzip2, lzma or lzop"
_DAMAGED = "build or copy the file again"

# Images that the kernel's RAM disk driver mounts (init/do_mounts_rd.c); offset and magic number.
_FILE_SYSTEMS: Final = (
    (0x438, b"\x53\xef"),
    (0, b"hsqs"),
    (0, b"-rom1fs-"),
    (0, b"\x45\x3d\xcd\x28"),
    (0x410, b"\x7f\x13"),
    (0x410, b"\x8f\x13"),
)


class _TruncatedError(Exception):
    """The archive ends too early."""


class _DamagedError(Exception):
    """The archive contradicts itself."""


def check(data: memoryview, name: str, *, limit: int) -> None:
    """Check that a file can be an initial RAM disk and is whole.

    Args:
        data: the file.
        name: its path, for messages.
        limit: bytes of content after which a check by decompressing is content; more than RAM would not fit anyway.

    Raises:
        ImageError: if it is empty, truncated or damaged, or no kind of file that Linux takes.
    """
    if not data:
        raise ImageError(f"the initrd {name} is an empty file", hint=_WHAT)
    if any(bytes(data[offset : offset + len(magic)]) == magic for offset, magic in _FILE_SYSTEMS):
        return
    try:
        _follow(data, name, limit)
    except _TruncatedError as error:
        raise ImageError(f"the initrd {name} is truncated: {error}", hint=_DAMAGED) from None
    except _DamagedError as error:
        raise ImageError(f"the initrd {name} is damaged: {error}", hint=_DAMAGED) from error.__cause__


def _follow(data: memoryview, name: str, limit: int) -> None:
    """Walk the chain of archives from the file's start to its end."""
    position = _skip_zeros(data, 0)
    if position == len(data):
        raise ImageError(f"the initrd {name} is {len(data)} zero bytes", hint=_WHAT)
    known = False
    while position < len(data):
        head = bytes(data[position : position + 6])
        walk = _walker(head)
        if head in CPIO_MAGICS:
            position = _cpio_entry(data, position)
        elif walk is not None:
            end = walk(data, position, limit)
            if end is None:
                return
            position = end
        elif CPIO_MAGICS[0].startswith(head):
            raise _TruncatedError(f"the cpio entry at byte {position} is cut short")
        elif known:
            return  # What follows a whole archive is the kernel's business.
        else:
            _refuse(data, name)
        known = True
        position = _skip_zeros(data, position)


def _refuse(data: memoryview, name: str) -> NoReturn:
    from hypervisor.boot.sniff import describe  # noqa: PLC0415 - names files for messages only

    kind = describe(data)
    if kind == "an lz4 file":
        raise ImageError(f"the initrd {name} is an lz4 file of the format that Linux does not read", hint="use lz4 -l")
    if kind == "a cpio archive":
        raise ImageError(f"the initrd {name} is a cpio archive of an old format", hint="use cpio -H newc")
    raise ImageError(f"the initrd {name} is {kind}", hint=_WHAT)


def _walker(head: bytes) -> Callable[[memoryview, int, int], int | None] | None:
    """Return what finds the end of an archive that begins so, or None for an unknown beginning."""
    for magic, walk in _COMPRESSIONS:
        if head.startswith(magic):
            return walk
    return None


def _skip_zeros(data: memoryview, position: int) -> int:
    """Return where the next byte that is not zero is, or the end."""
    while position < len(data):
        chunk = bytes(data[position : position + 4096])
        rest = chunk.lstrip(b"\0")
        if rest:
            return position + len(chunk) - len(rest)
        position += len(chunk)
    return position


def _cpio_entry(data: memoryview, position: int) -> int:
    """Return where the entry at `position` ends."""
    header = bytes(data[position : position + CPIO_HEADER])
    if len(header) < CPIO_HEADER:
        raise _TruncatedError(f"the cpio entry at byte {position} is cut short")
    try:
        fields = struct.unpack(">13I", bytes.fromhex(header[6:].decode("ascii")))
    except (ValueError, struct.error):
        raise _DamagedError(f"the cpio entry at byte {position} has no header") from None
    end = position + CPIO_HEADER + fields[CPIO_NAMESIZE]
    size = fields[CPIO_FILESIZE]
    if size:
        end = (end + 3 & -4) + size
    if end > len(data):
        raise _TruncatedError(f"the cpio entry at byte {position} is cut short")
    aligned: int = end + 3 & -4
    return min(aligned, len(data))


def _zstd(data: memoryview, position: int, _limit: int) -> int:
    """Return the end of a zstd frame (zstd_compression_format.md, "Zstandard frames" and "Blocks")."""
    if position + 5 > len(data):
        raise _TruncatedError("its zstd frame is cut short")
    descriptor = data[position + 4]
    single = descriptor >> 5 & 1
    content_size = (single, 2, 4, 8)[descriptor >> 6]
    position += 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + content_size
    last = False
    while not last:
        header = int.from_bytes(data[position : position + 3], "little")
        kind = header >> 1 & 3
        if position + 3 > len(data):
            raise _TruncatedError("its zstd frame is cut short")
        if kind == 3:
            raise _DamagedError(f"the zstd block at byte {position} has no known type")
        last = bool(header & 1)
        position += 3 + (1 if kind == 1 else header >> 3)
    position += 4 * (descriptor >> 2 & 1)
    if position > len(data):
        raise _TruncatedError("its zstd frame is cut short")
    return position


def _lz4(data: memoryview, position: int, _limit: int) -> int:
    """Return the end of an lz4 legacy frame: blocks with their length before them, up to the end of the file."""
    position += 4
    while position + 4 <= len(data):
        if bytes(data[position : position + 4]) == LZ4_LEGACY_MAGIC:
            return position
        (length,) = struct.unpack_from("<I", data, position)
        if not length:
            return position
        position += 4 + length
    if position > len(data) or any(data[position:]):
        raise _TruncatedError("its last lz4 block is cut short")
    return position


def _xz(data: memoryview, position: int, limit: int) -> int | None:
    """Accept a file that ends in a stream footer (xz-file-format.txt, 2.1.2); else find the stream's end."""
    end = len(data)
    while end > position and not data[end - 1]:
        end -= 1
    footer = bytes(data[max(end - 12, position) : end])
    if footer.endswith(b"YZ") and len(footer) == 12 and crc32(footer[4:10]) == struct.unpack_from("<I", footer)[0]:
        return None
    import lzma  # noqa: PLC0415 - only for a file that looks truncated

    return _stream_end(
        lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY), data, position, limit, lzma.LZMAError
    )


def _bzip2(data: memoryview, position: int, limit: int) -> int | None:
    """Accept a file that ends in an end-of-stream mark and a checksum; else find the stream's end."""
    # Mark and checksum are 80 bits; up to seven bits of padding make eleven bytes.
    tail = int.from_bytes(data[max(len(data) - 11, position) :], "big")
    if any(tail >> (32 + shift) & 0xFFFF_FFFF_FFFF == BZIP2_END for shift in range(8)):
        return None
    import bz2  # noqa: PLC0415 - only for a file that looks truncated

    return _stream_end(bz2.BZ2Decompressor(), data, position, limit, OSError)


def _gzip(data: memoryview, position: int, limit: int) -> int | None:
    """Accept a large file whose last four bytes may be a cpio archive's length; else find the stream's end."""
    (length,) = struct.unpack_from("<I", data, len(data) - 4) if len(data) - position >= 18 else (0,)
    if len(data) - position > FULL_CHECK and length and not length % SECTOR:
        return None
    import zlib  # noqa: PLC0415 - only for a small file or one that looks truncated

    engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    total = 0
    pending: bytes | memoryview = b""
    while not engine.eof and total <= limit:
        if not pending:
            if position == len(data):
                raise _TruncatedError("its gzip stream has no end")
            pending = data[position : position + CHUNK]
            position += len(pending)
        try:
            total += len(engine.decompress(pending, CHUNK))
        except zlib.error as error:
            raise _DamagedError("its gzip stream does not unpack") from error
        pending = engine.unconsumed_tail
    return position - len(engine.unused_data) if engine.eof else None


def _stream_end(engine: Any, data: memoryview, position: int, limit: int, damage: type[Exception]) -> int | None:
    """Decompress with `engine` (of bz2 or lzma) to find where its stream ends; None when `limit` came first."""
    total = 0
    while not engine.eof and total <= limit:
        chunk: bytes | memoryview = b""
        if engine.needs_input:
            if position == len(data):
                raise _TruncatedError("its compressed stream has no end")
            chunk = data[position : position + CHUNK]
            position += len(chunk)
        try:
            total += len(engine.decompress(chunk, CHUNK))
        except damage as error:
            raise _DamagedError("its compressed stream does not unpack") from error
    return position - len(engine.unused_data) if engine.eof else None


def _believe(_data: memoryview, _position: int, _limit: int) -> None:
    """Accept what cannot be checked."""


_COMPRESSIONS: Final[tuple[tuple[bytes, Callable[[memoryview, int, int], int | None]], ...]] = (
    (b"\x1f\x8b", _gzip),
    (b"\xfd7zXZ\0", _xz),
    (ZSTD_MAGIC, _zstd),
    (LZ4_LEGACY_MAGIC, _lz4),
    (b"BZh", _bzip2),
    (b"\x5d\0\0", _believe),
    (b"\x89LZO\0\r", _believe),
)

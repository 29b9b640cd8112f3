"""The compressed kernel inside a bzImage, undone on the host.

The kernel's build appends the length of the output to every format but gzip, which has it in its trailer
(`size_append` in scripts/Makefile.lib), so each payload ends with four bytes that say how much comes out of it. They
are the bound of every decompressor here.
"""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final

from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["unpack"]

LENGTH: Final = 4
"""Bytes of the output's length at the end of a payload."""
SHORTEST: Final = 9
"""Less than any packed kernel has, and enough for a magic number and the length."""
LZ4_LEGACY_BLOCK: Final = 8 << 20
"""Most that one block of lz4's legacy format unpacks to (lz4_Frame_format.md, "Legacy frame")."""
LZMA_MEMORY: Final = 512 << 20
"""Bound on the dictionary of an xz or lzma payload; kernels use 32 to 128 MiB."""
ZSTD_WINDOW: Final = 128 << 20
"""The window of `zstd -22`, which kernels are packed with."""

_GUEST = "--decompress guest lets the kernel unpack itself"
_DAMAGED = "copy or download the file again"


class _DamagedError(Exception):
    """The payload does not unpack: the text says why, or the cause does."""


def _gzip(payload: memoryview, size: int) -> bytes:
    import zlib  # noqa: PLC0415 - each format's library only when it is met

    engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        out = engine.decompress(payload, size + 1)
    except zlib.error as error:
        raise _DamagedError from error
    return _whole(out, engine.eof)


def _bzip2(payload: memoryview, size: int) -> bytes:
    import bz2  # noqa: PLC0415 - each format's library only when it is met

    engine = bz2.BZ2Decompressor()
    try:
        out = engine.decompress(payload[:-LENGTH], size + 1)
    except OSError as error:
        raise _DamagedError from error
    return _whole(out, engine.eof)


def _lzma(payload: memoryview, size: int) -> bytes:
    import lzma  # noqa: PLC0415 - each format's library only when it is met

    engine = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=LZMA_MEMORY)
    try:
        out = engine.decompress(payload[:-LENGTH], size + 1)
    except lzma.LZMAError as error:
        raise _DamagedError from error
    return _whole(out, engine.eof)


def _whole(out: bytes, eof: bool) -> bytes:
    """Return what came out, if the engine saw the stream's end and so its checksum."""
    if not eof:
        raise _DamagedError("its stream does not end where it should")
    return out


def _lz4(payload: memoryview, size: int) -> bytearray:
    from lz4.block import LZ4BlockError, decompress  # noqa: PLC0415 - each format's library only when it is met

    out = bytearray(size)
    done = 0
    position = 4
    end = len(payload) - LENGTH
    while position < end:
        if position + 4 > end:
            raise _DamagedError("the last block has no length")
        (length,) = unpack_from("<I", payload, position)
        position += 4
        if length > end - position:
            raise _DamagedError("a block reaches past the end")
        room = min(size - done, LZ4_LEGACY_BLOCK)
        try:
            block = decompress(payload[position : position + length], uncompressed_size=room)
        except (LZ4BlockError, ValueError) as error:
            raise _DamagedError from error
        out[done : done + len(block)] = block
        done += len(block)
        position += length
    if done < size:
        raise _DamagedError(f"{done} bytes come out of it, not {size}")
    return out


def _zstd(payload: memoryview, size: int) -> bytes:
    import zstandard  # noqa: PLC0415 - each format's library only when it is met

    frame = payload[:-LENGTH]
    try:
        # A frame that names its size makes the library allocate that much.
        announced = zstandard.frame_content_size(frame)
        if announced not in (-1, size):
            raise _DamagedError(f"its frame announces {announced} bytes, not {size}")
        out: bytes = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompress(frame, max_output_size=size)
    except zstandard.ZstdError as error:
        raise _DamagedError from error
    return out


_FORMATS: Final[tuple[tuple[bytes, str, Callable[[memoryview, int], bytes | bytearray]], ...]] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _bzip2),
    (b"\xfd7zXZ\0", "xz", _lzma),
    (b"\x5d\x00\x00", "lzma", _lzma),
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


def unpack(payload: memoryview, name: str, *, limit: int) -> memoryview:
    """Decompress a bzImage's payload.

    Args:
        payload: from its magic number to the four bytes of its length.
        name: the kernel's path, for messages.
        limit: the most bytes that may come out.

    Returns:
        The kernel, which is to be an ELF file.

    Raises:
        ImageError: if the format is unknown or is LZO, or the payload is damaged or larger than `limit`.
        ConfigError: if the Python package for this format is missing.
    """
    head = bytes(payload[:SHORTEST])
    if head.startswith(b"\x7fELF"):
        return payload
    if head.startswith(b"\x89LZO"):
        raise ImageError(f"{name}: the kernel is packed with LZO, which the host cannot undo", hint=_GUEST)
    found = next(((label, undo) for magic, label, undo in _FORMATS if head.startswith(magic)), None)
    if found is None or len(payload) < SHORTEST:
        raise ImageError(f"{name}: the kernel is packed in a way that is not known here", hint=_GUEST)
    label, undo = found
    (size,) = unpack_from("<I", payload, len(payload) - LENGTH)
    if not 0 < size <= limit:
        message = f"{name}: the {label} payload announces {size} bytes; its header allows {limit}"
        raise ImageError(message, hint=_DAMAGED)
    try:
        out = undo(payload, size)
    except _DamagedError as error:
        raise ImageError(f"{name}: the {label} payload is damaged", hint=_DAMAGED) from error.__cause__ or error
    except ImportError as error:
        raise ConfigError(f"{name}: no Python package for {label} on this host", hint=_GUEST) from error
    if len(out) != size:
        message = f"{name}: the {label} payload does not unpack to the {size} bytes that it announces"
        raise ImageError(message, hint=_DAMAGED)
    return memoryview(out)

"""Unpacking a compressed cluster (QEMU, docs/interop/qcow2, "Compressed Clusters Descriptor")."""

from __future__ import annotations

from typing import Final

__all__ = ["unpack"]

MAX_WINDOW: Final = 8 << 20
"""What a zstd frame may ask for; QEMU's ask for 2 MiB at most."""


def unpack(data: bytes, size: int, *, zstd: bool) -> bytes:
    """Unpack `size` bytes, and never more, whatever the data says; raises ValueError when that cannot be done."""
    try:
        if zstd:
            import zstandard

            out = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(data).read(size)
        else:
            import zlib

            out = zlib.decompressobj(-15).decompress(data, size)
    except Exception as error:  # each library has its own
        raise ValueError(str(error)) from error
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes")
    return out

"""The payload of a bzImage: what is damaged, too large, or not to be undone here."""

from __future__ import annotations

import struct
import sys

import pytest
from images import COMPRESSORS, MIB, kernel_payload

from hypervisor.boot import decompress
from hypervisor.errors import ConfigError, ImageError

KERNEL = b"\x7fELF" + b"kernel text and data, " * 20000
LIMIT = MIB


def unpack(payload: bytes, limit: int = LIMIT) -> bytes:
    return bytes(decompress.unpack(memoryview(payload), "vmlinuz", limit=limit))


@pytest.mark.parametrize("form", COMPRESSORS)
def test_round_trip(form):
    assert unpack(kernel_payload(form, KERNEL)) == KERNEL


@pytest.mark.parametrize("form", COMPRESSORS)
def test_bound(form):
    """The length may be as large as the limit, and not one byte larger."""
    payload = kernel_payload(form, KERNEL)
    assert len(unpack(payload, len(KERNEL))) == len(KERNEL)
    with pytest.raises(ImageError, match=f"the {form} payload announces {len(KERNEL)} bytes; its header allows"):
        unpack(payload, len(KERNEL) - 1)


@pytest.mark.parametrize("form", COMPRESSORS)
@pytest.mark.parametrize("difference", [-1, 1, -len(KERNEL) + 1])
def test_a_length_that_is_not_true(form, difference):
    """Neither more nor less may come out than the last four bytes say: a bomb stops there."""
    payload = kernel_payload(form, KERNEL, len(KERNEL) + difference)
    with pytest.raises(ImageError, match=f"the {form} payload (is damaged|does not unpack)"):
        unpack(payload)


@pytest.mark.parametrize("form", COMPRESSORS)
def test_nothing_announced(form):
    with pytest.raises(ImageError, match="announces 0 bytes"):
        unpack(kernel_payload(form, KERNEL, 0))


@pytest.mark.parametrize("form", COMPRESSORS)
def test_every_truncation_is_found(form):
    packed = kernel_payload(form, KERNEL[:400])
    size = struct.pack("<I", 400)
    for length in range(len(packed) - 4):
        with pytest.raises(ImageError):
            unpack(packed[:length] + (size if form != "gzip" else b""))


@pytest.mark.parametrize("form", COMPRESSORS)
def test_damage_in_the_middle(form):
    payload = bytearray(kernel_payload(form, KERNEL))
    for position in range(12, 40):
        payload[position] ^= 0xFF
    with pytest.raises(ImageError, match=r"payload (is damaged|does not unpack)"):
        unpack(bytes(payload))


def test_zstd_frame_that_announces_another_size():
    """The library allocates what a frame announces, so that must be what the payload announces."""
    descriptor = 3 << 6  # eight bytes of Frame_Content_Size, a window descriptor, no checksum
    for announced in (1 << 50, len(KERNEL) + 1, 1):
        frame = b"\x28\xb5\x2f\xfd" + bytes([descriptor, 0x50]) + struct.pack("<Q", announced) + b"\x01\0\0"
        with pytest.raises(ImageError, match="the zstd payload is damaged") as caught:
            unpack(frame + struct.pack("<I", len(KERNEL)))
        assert f"its frame announces {announced} bytes" in str(caught.value.__cause__)


def test_many_lz4_blocks():
    """Legacy lz4 has blocks of 8 MiB."""
    kernel = b"\x7fELF" + bytes(20 * MIB)
    assert unpack(kernel_payload("lz4", kernel), 32 * MIB) == kernel


def test_uncompressed():
    assert unpack(b"\x7fELF and the rest") == b"\x7fELF and the rest"


def test_lzo_is_for_the_guest():
    with pytest.raises(ImageError, match="packed with LZO, which the host cannot undo") as caught:
        unpack(b"\x89LZO\0\r\n\x1a\n" + bytes(100))
    assert "--decompress guest" in str(caught.value.hint)


@pytest.mark.parametrize("payload", [b"", b"x", b"\x1f\x8b", b"random bytes that are nothing"])
def test_unknown(payload):
    with pytest.raises(ImageError, match="packed in a way that is not known here"):
        unpack(payload)


@pytest.mark.parametrize(("form", "module"), [("lz4", "lz4.block"), ("zstd", "zstandard")])
def test_missing_package(form, module, monkeypatch):
    payload = kernel_payload(form, KERNEL)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"no Python package for {form}"):
        unpack(payload)


def test_the_cause_is_in_the_chain_and_not_in_the_text():
    payload = bytearray(kernel_payload("gzip", KERNEL))
    payload[10] = 0xFF
    with pytest.raises(ImageError) as caught:
        unpack(bytes(payload))
    assert "invalid" in str(caught.value.__cause__)
    assert "invalid" not in str(caught.value)

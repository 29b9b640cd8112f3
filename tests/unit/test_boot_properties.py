"""Any bytes and any options give a sound plan or one of the two errors, and nothing else."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

from bootplan import check_any
from hypothesis import example, given
from hypothesis import strategies as st
from images import (
    BZIMAGE_FIELDS,
    COMPRESSORS,
    MIB,
    Load,
    bzimage,
    cpio,
    elf,
    kernel_payload,
    multiboot_header,
    note,
    patch,
    pvh_note,
)

from hypervisor.boot import initrd
from hypervisor.errors import ImageError

KERNEL = elf([Load(16 * MIB, b"\x90" * 300, 4096), Load(17 * MIB, b"data")], notes=pvh_note(16 * MIB + 8))
SEEDS = [
    bzimage(b"payload"),
    bzimage(kernel_payload("gzip", KERNEL)),
    bzimage(kernel_payload("lz4", KERNEL)),
    KERNEL,
    elf([Load(MIB, b"x" * 64)], bits=32, front=multiboot_header(3), notes=note(b"GNU", 3, b"id")),
    multiboot_header(addresses=(MIB, MIB, 0, 0, MIB + 40)) + b"\xf4" * 60,
]
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "ram_bytes": st.one_of(st.integers(1, 64).map(lambda mib: mib * MIB), st.integers(1, 5 << 30)),
    "decompress": st.sampled_from(["guest", "host"]),
    "protocol": st.sampled_from(["auto", "auto", "linux64", "pvh"]),
    "flat_bits": st.sampled_from([None, None, None, None, 16, 32, 64]),
    "command_line": st.sampled_from(["", "quiet", "x" * 3000, "x" * 70000]),
    "initrd": st.sampled_from([None, None, cpio({"init": b"x"}), b"", b"no initrd"]),
    "modules": st.sampled_from([(), (), (("m", b"data", "string"),), (("m", b"", ""),)]),
    "rsdp": st.sampled_from([None, 0xE0000]),
}
NUMBERS = [0, 1, 0x1000, MIB, 16 * MIB, 0xBFFF_F000, 0xC000_0000, 0xFFFF_FFFF, (1 << 64) - 1, (1 << 64) - 4096]


@given(st.binary(max_size=2000), st.fixed_dictionaries(OPTIONS))
def test_any_bytes(image, options):
    check_any(image, options)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a sound image with some bytes changed, a number written somewhere, its end cut or more appended."""
    image = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        width = draw(st.sampled_from([1, 2, 4, 8]))
        position = draw(st.integers(0, min(len(image), 0x300) - width))
        value = draw(st.one_of(st.sampled_from(NUMBERS), st.integers(0, (1 << 64) - 1)))
        image[position : position + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    if draw(st.booleans()):
        del image[draw(st.integers(0, len(image))) :]
    return bytes(image)


@given(damaged(), st.fixed_dictionaries(OPTIONS))
def test_damaged_images(image, options):
    check_any(image, options)


@given(
    st.dictionaries(st.sampled_from(sorted(BZIMAGE_FIELDS)), st.one_of(st.sampled_from(NUMBERS), st.integers(0, 300))),
    st.fixed_dictionaries(OPTIONS),
)
@example({"kernel_alignment": 1 << 31, "pref_address": 3 << 30, "init_size": 0}, {"ram_bytes": 4 << 30})
@example({"pref_address": (1 << 64) - 4096, "relocatable_kernel": 0}, {"ram_bytes": 4 << 30})
def test_setup_headers(fields, options):
    bent = {name: value & ((1 << 8 * struct.calcsize(BZIMAGE_FIELDS[name][1])) - 1) for name, value in fields.items()}
    bent |= {name: struct.pack("<I", value) for name, value in bent.items() if name == "magic"}
    check_any(patch(bzimage(kernel_payload("zstd", KERNEL)), **bent), options)


@given(
    st.lists(
        st.builds(
            lambda paddr, data, more: Load(paddr, data, len(data) + more),
            st.one_of(st.sampled_from(NUMBERS[:-2]), st.integers(0, 70 * MIB)),
            st.binary(max_size=40),
            st.one_of(st.integers(0, 10000), st.sampled_from(NUMBERS[:-3])),
        ),
        max_size=4,
    ),
    st.integers(0, 70 * MIB),
    st.sampled_from([b"", multiboot_header(), pvh_note(MIB)]),
    st.fixed_dictionaries(OPTIONS),
)
def test_elf_segments(loads, entry, front, options):
    check_any(elf(loads, entry=entry, front=front), options)
    if loads:
        check_any(elf(loads, front=front, notes=pvh_note(loads[0].paddr & 0xFFFF_FFFF)), options)


@given(
    st.lists(st.one_of(st.sampled_from(NUMBERS[:8]), st.integers(0, 2 * MIB)), min_size=5, max_size=5),
    st.integers(0, 60),
    st.fixed_dictionaries(OPTIONS),
)
def test_multiboot_addresses(addresses, before, options):
    check_any(bytes(before * 4) + multiboot_header(addresses=tuple(addresses)) + b"\xf4" * 60, options)


ARCHIVES = [
    cpio({"init": b"x" * 20}, block=4),
    *(pack(cpio({"a": b"y" * 9})) for pack in COMPRESSORS.values()),
    bytes(8),
]


@st.composite
def archive(draw: st.DrawFn) -> bytes:
    """Return a chain of sound archives with some bytes changed and its end cut."""
    whole = bytearray(b"".join(draw(st.lists(st.sampled_from(ARCHIVES), min_size=1, max_size=4))))
    for _ in range(draw(st.integers(0, 3))):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole[: draw(st.integers(0, len(whole)))])


@given(st.one_of(st.binary(max_size=300), archive()))
def test_initrds(data):
    """Checked or refused, whatever the bytes."""
    with suppress(ImageError):
        initrd.check(memoryview(data), "rd", limit=MIB)

"""The parts that every loader shares: what is taken, the memory map, the options."""

from __future__ import annotations

import mmap
from itertools import pairwise

import pytest
from bootplan import GIB, check_plan
from hypothesis import given
from hypothesis import strategies as st
from images import MIB, bzimage

from hypervisor import boot
from hypervisor.boot.e820 import memory_map
from hypervisor.boot.image import Placement
from hypervisor.errors import ConfigError, ImageError


def test_overlap_names_both_ranges():
    placement = Placement("k", 64 * MIB)
    placement.put("first", 2 * MIB, b"", 4096)
    with pytest.raises(ImageError, match=r"k: second \(0x200fff-0x201000\) overlaps first \(0x200000-0x201000\)"):
        placement.put("second", 2 * MIB + 4095, b"x")
    placement.put("behind", 2 * MIB + 4096, b"x")
    placement.put("before", 2 * MIB - 1, b"x")
    assert [segment.label for segment in placement.segments] == ["before", "first", "behind"]


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 40)), max_size=30))
def test_no_two_ranges_ever_overlap(ranges):
    """Against the plain definition of overlap."""
    placement = Placement("k", 64 * MIB)
    taken: list[tuple[int, int]] = []
    for start, size in ranges:
        gpa = 2 * MIB + start
        clash = size and any(gpa < other + length and other < gpa + size for other, length in taken)
        if clash:
            with pytest.raises(ImageError, match="overlaps"):
                placement.put("x", gpa, b"", size)
        else:
            placement.put("x", gpa, b"", size)
            taken += [(gpa, size)] if size else []
    assert [(segment.gpa, segment.size) for segment in placement.segments] == sorted(taken)


@given(
    taken=st.lists(st.integers(1, 15), unique=True),
    size=st.integers(1, 5 * MIB),
    below=st.integers(MIB, 20 * MIB),
)
def test_highest_place(taken, size, below):
    """put_high finds the highest page-aligned gap; against a search of every page."""
    ram = 16 * MIB
    placement = Placement("k", ram)
    for at in taken:
        placement.put("x", at * MIB, b"", 0x1800)
    spans = [(at * MIB, at * MIB + 0x1800) for at in taken]
    pages = range((min(below, ram) - size) // 4096 * 4096, MIB - 1, -4096)
    best = next((gpa for gpa in pages if not any(gpa < end and start < gpa + size for start, end in spans)), None)
    data = memoryview(bytes(size))
    if best is None:
        with pytest.raises(ConfigError):
            placement.put_high("initrd", data, below)
    else:
        assert placement.put_high("initrd", data, below) == best


@given(st.integers(1, 16 * GIB))
def test_memory_map(ram):
    """E820: in order, apart, not empty; all RAM outside the legacy area is there exactly once."""
    ranges = memory_map(ram)
    assert all(size > 0 for _, size, _ in ranges)
    assert all(a.base + a.size <= b.base for a, b in pairwise(ranges))
    assert {kind for _, _, kind in ranges} <= {1, 2}
    usable = sum(size for _, size, kind in ranges if kind == 1)
    low = min(ram, 3 * GIB)
    assert usable == ram - max(0, min(low, MIB) - 0x9FC00)
    hole = [(base, size, kind) for base, size, kind in ranges if base < 4 * GIB and base + size > 3 * GIB]
    assert hole == [(0xF000_0000, MIB, 2)], "only PCI's configuration space, reserved"


def test_segments_are_views_of_a_mapped_file(tmp_path):
    """A kernel is not copied on its way to guest RAM."""
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(b"payload"))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = memoryview(mapped)
        plan = boot.plan(view, name="k", ram_bytes=64 * MIB)
        kernel = next(segment for segment in plan.segments if segment.label == "the kernel")
        assert isinstance(kernel.data, memoryview)
        assert kernel.data.obj is mapped
        kernel.data.release()
        del plan, kernel
        view.release()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_will_do(kind):
    check_plan(boot.plan(kind(bzimage()), name="k", ram_bytes=64 * MIB), 64 * MIB)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decompress": "both"}, "--decompress both is unknown"),
        ({"protocol": "efi"}, "--protocol efi is unknown"),
        ({"flat_bits": 0}, "--flat 0 is unknown"),
    ],
)
def test_unknown_options(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        boot.plan(bzimage(), name="k", ram_bytes=64 * MIB, **options)
    assert str(caught.value.hint).startswith("one of ")


def test_ram_is_named_as_it_is():
    with pytest.raises(ConfigError, match=r"needs at least 17 MiB of RAM, this machine has 0\.0625 MiB"):
        boot.plan(bzimage(), name="k", ram_bytes=64 << 10)

"""Flat binaries: what hypervisor.boot.flat's table promises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bootplan import GIB, check_plan, number, read, string
from images import MIB, bzimage, elf

from hypervisor import boot
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot import BootPlan

CODE = b"\xb0\x42\xe6\xf4\xf4"


def plan(bits: int, image: bytes = CODE, *, ram: int = 4 * MIB, **options: object) -> BootPlan:
    result = boot.plan(image, ram_bytes=ram, name="flat.bin", flat_bits=bits, **options)
    check_plan(result, ram)
    return result


def test_16_bits_is_a_boot_sector():
    result = plan(16, ram=64 << 10)
    state = result.entry
    assert (state.mode, state.rip, state.rsp, state.rbx) == ("real16", 0x7C00, 0x7C00, 64 << 10)
    for register in (state.cs, state.ds, state.es, state.ss):
        assert (register.base, register.selector, register.limit) == (0, 0, 0xFFFF)
    assert (state.idt.base, state.idt.limit) == (0, 0x3FF)
    assert [(segment.gpa, bytes(segment.data)) for segment in result.segments] == [(0x7C00, CODE)]
    assert result.kind == "flat 16-bit binary"


def test_16_bits_fills_conventional_memory_and_no_more():
    plan(16, bytes(0x9FC00 - 0x7C00))
    with pytest.raises(ImageError, match="overlaps the MP floating pointer"):
        plan(16, bytes(0x9FC00 - 0x7C00 + 1))


def test_32_bits():
    result = plan(32, command_line="hello", ram=5 * GIB)
    state = result.entry
    assert (state.mode, state.rip, state.rsp, state.rbx) == ("protected32", MIB, 0x8FF0, 3 * GIB)
    assert string(result, state.rsi) == b"hello"
    assert (state.cs.selector, state.ds.selector) == (0x10, 0x18)
    assert number(result, state.gdt.base + 0x10, "<Q") == 0x00CF_9B00_0000_FFFF
    assert read(result, MIB, 5) == CODE


def test_64_bits():
    result = plan(64)
    state = result.entry
    assert (state.mode, state.rip, state.rsp, state.rbx) == ("long64", MIB, 0x8FF0, 4 * MIB)
    assert string(result, state.rsi) == b""
    assert number(result, state.gdt.base + 0x10, "<Q") == 0x00AF_9B00_0000_FFFF
    assert number(result, state.cr3, "<Q") & 1
    assert read(result, MIB, 5) == CODE


@pytest.mark.parametrize("image", [elf([]), bzimage(), b"\x1f\x8b", b"#!/bin/sh"])
def test_flat_is_not_sniffed(image):
    assert read(plan(32, image), MIB, len(image)) == image


def test_refuses():
    with pytest.raises(ImageError, match=r"flat\.bin is an empty file"):
        plan(64, b"")
    with pytest.raises(ConfigError, match="takes no initrd and no modules"):
        plan(64, initrd=b"x")
    with pytest.raises(ConfigError, match="takes no initrd and no modules"):
        plan(32, modules=[("m", b"x", "")])
    with pytest.raises(ConfigError, match="a 16-bit flat binary takes no command line"):
        plan(16, command_line="x")
    with pytest.raises(ConfigError, match="needs at least 2 MiB of RAM, this machine has 1 MiB"):
        plan(32, ram=MIB)
    with pytest.raises(ConfigError, match="--flat 8 is unknown") as caught:
        plan(8)
    assert caught.value.hint == "one of 16, 32, 64"

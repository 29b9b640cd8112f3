"""The debug console and the debug-exit port, as a guest uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import FakeFastPath, FakeSink

from devices.debug_console import DebugConsole
from devices.debug_exit import DebugExit

if TYPE_CHECKING:
    from devices.ports import Device


def test_debug_console_passes_bytes_on_in_order() -> None:
    sink = FakeSink()
    console: Device = DebugConsole(sink)
    for byte in b"one\n\0\xff":
        console.write(0, 1, byte)
    assert sink.data == b"one\n\0\xff"


def test_debug_console_tells_that_it_is_there() -> None:
    """Bochs's port_e9_hack and QEMU's isa-debugcon both read as the port's own number."""
    assert DebugConsole(FakeSink()).read(0, 1) == 0xE9


@pytest.mark.parametrize(("size", "expected"), [(2, 0xFFE9), (4, 0xFFFF_FFE9)])
def test_a_wide_access_reaches_one_port_of_the_debug_console(size: int, expected: int) -> None:
    sink = FakeSink()
    console = DebugConsole(sink)
    assert console.read(0, size) == expected
    console.write(0, size, 0x4443_4241 & ((1 << 8 * size) - 1))
    assert sink.data == b"A"


def test_debug_console_never_needs_to_be_asked() -> None:
    fast = FakeFastPath()
    console = DebugConsole(FakeSink(), fast=fast)
    assert fast.diverted == {0}
    assert fast.published == {0: 0xE9}
    calls = len(fast.calls)
    console.write(0, 1, 0x41)
    assert console.read(0, 1) == 0xE9
    assert len(fast.calls) == calls


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("size", "value", "reported"),
    [
        (1, 0x00, 0x00),
        (1, 0xFF, 0xFF),
        (1, 0x1FF, 0xFF),
        (2, 0x1234, 0x1234),
        (2, 0xF_FFFF, 0xFFFF),
        (4, 0xDEAD_BEEF, 0xDEAD_BEEF),
        (4, -1, 0xFFFF_FFFF),
    ],
)
def test_debug_exit_reports_what_was_written(offset: int, size: int, value: int, reported: int) -> None:
    codes: list[int] = []
    DebugExit(codes.append).write(offset, size, value)
    assert codes == [reported]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_debug_exit_reads_as_zero_and_does_not_exit(size: int) -> None:
    codes: list[int] = []
    device: Device = DebugExit(codes.append)
    assert device.read(0, size) == 0
    assert codes == []


def test_debug_exit_reports_every_write() -> None:
    """The machine decides what the first one means; the model hides none."""
    codes: list[int] = []
    device = DebugExit(codes.append)
    device.write(0, 1, 3)
    device.write(0, 1, 4)
    assert codes == [3, 4]

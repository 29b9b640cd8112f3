"""Machine code for the exit benchmarks: flat 32-bit guests, the same bytes for hv and for the C loop."""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MARK: Final = 0x5658
"""Writes to this port bracket what is timed."""
PORT: Final = 0x5659
"""The port of the device under test where it is not a UART's."""
END: Final = 0xF4
COM1: Final = 0x3F8
FCR: Final = COM1 + 2
PLAIN_UART: Final = 0x2F8
"""A UART without short cuts in the run loop: COM2's ports, which hv leaves free."""
LSR: Final = 5

OUT: Final = b"\xee"  # out dx, al
IN: Final = b"\xec"  # in al, dx
REP_OUTS: Final = b"\xf3\x6e"  # rep outsb


def _load(register: bytes, value: int) -> bytes:
    """Return `mov register, value`."""
    return register + pack("<I", value)


def _edx(value: int) -> bytes:
    return _load(b"\xba", value)


def _ecx(value: int) -> bytes:
    return _load(b"\xb9", value)


def _framed(body: bytes, before: Sequence[tuple[int, int]]) -> bytes:
    """Return a guest that writes (port, value) pairs, marks, runs `body`, marks again and ends with value 0."""
    setup = b"".join(_edx(port) + b"\xb0" + bytes([value]) + OUT for port, value in before)
    mark = _edx(MARK) + OUT
    return setup + mark + body + mark + b"\x31\xc0\xe6" + bytes([END]) + b"\xf4"  # xor eax, eax; out END, al; hlt


def loop(instruction: bytes, port: int, count: int, before: Sequence[tuple[int, int]] = ()) -> bytes:
    """Return a guest that does one port instruction `count` times: `1: instruction; loop 1b`."""
    again = b"\xe2" + bytes([(-2 - len(instruction)) & 0xFF])
    return _framed(_edx(port) + _ecx(count) + instruction + again, before)


def string(port: int, count: int, before: Sequence[tuple[int, int]] = ()) -> bytes:
    """Return a guest that writes `count` bytes from 0x100000 on to the port by one `rep outsb`."""
    return _framed(b"\xfc" + _edx(port) + _load(b"\xbe", 0x100000) + _ecx(count) + REP_OUTS, before)

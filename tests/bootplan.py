"""Looking at a boot plan as the guest will: RAM after loading, and what holds for every plan."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hypervisor import boot
from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from hypervisor.boot import BootPlan

GIB = 1 << 30


def read(plan: BootPlan, gpa: int, size: int) -> bytes:
    """Return guest RAM after loading; what no segment covers is zero, as fresh RAM is."""
    out = bytearray(size)
    for segment in plan.segments:
        start = max(gpa, segment.gpa)
        end = min(gpa + size, segment.gpa + len(segment.data))
        if start < end:
            out[start - gpa : end - gpa] = segment.data[start - segment.gpa : end - segment.gpa]
    return bytes(out)


def number(plan: BootPlan, gpa: int, form: str = "<I") -> int:
    """Return one number from guest RAM, by default a 32-bit one."""
    return struct.unpack(form, read(plan, gpa, struct.calcsize(form)))[0]


def string(plan: BootPlan, gpa: int) -> bytes:
    """Return the zero-terminated string at an address."""
    return read(plan, gpa, 0x10000).split(b"\0")[0]


def segment_at(plan: BootPlan, gpa: int) -> tuple[int, int]:
    """Return bytes of data and size of the segment that begins at an address."""
    return next((len(segment.data), segment.size) for segment in plan.segments if segment.gpa == gpa)


def check_plan(plan: BootPlan, ram_bytes: int) -> None:
    """Assert what holds for every plan: segments in order, apart, inside RAM; the entry in RAM and in its mode."""
    low = min(ram_bytes, 3 * GIB)
    for segment in plan.segments:
        assert segment.gpa >= 0
        assert segment.gpa + segment.size <= low, segment.label
        assert len(segment.data) <= segment.size, segment.label
        assert segment.size, segment.label
    for before, after in pairwise(plan.segments):
        assert before.gpa + before.size <= after.gpa, (before.label, after.label)
    for base, end in ((0x9FC00, 0xA0000), (0xE0000, 0xFF000)):
        assert not any(s.gpa < end and base < s.gpa + s.size for s in plan.segments), "tables of the machine"
    state = plan.entry
    assert any(s.gpa <= state.rip < s.gpa + s.size for s in plan.segments), "entry outside what is loaded"
    assert state.rflags == 2
    paging, protected = state.cr0 >> 31, state.cr0 & 1
    expected = {"long64": (1, 1, 0x500), "protected32": (0, 1, 0), "real16": (0, 0, 0)}[state.mode]
    assert (paging, protected, state.efer) == expected
    assert (state.cs.l, state.cs.db) == {"long64": (1, 0), "protected32": (0, 1), "real16": (0, 0)}[state.mode]
    assert plan.kind


def check_any(image: bytes, options: dict[str, Any]) -> None:
    """Assert that any bytes and any options give a sound plan, or an error of one line, and nothing else."""
    try:
        plan = boot.plan(image, name="k", **options)
    except ConfigError as error:  # and so ImageError
        text = str(error)
    else:
        check_plan(plan, options["ram_bytes"])
        text = plan.kind
    assert text
    assert "\n" not in text

"""What a profile file looks like; `recording` writes it, `file` reads it.

Eight bytes of magic, then chunks: a kind of four letters, a vCPU, a length (16 bytes in all, little-endian), then as
many bytes.
Chunks only ever get appended, so a file that was cut short holds all that was written before.

    HEAD  JSON: version, facts of the run, the TSC at its start and its frequency, names of exit reasons
    ROWS  per vCPU: what row numbers in its trace mean (struct hv_row_key)
    SPAC  per vCPU: the CR3 values that space numbers in its trace mean
    TRAC  per vCPU: single exits (struct hv_trace_record, 24 bytes each)
    NAME  JSON: [kind of access, address, device, register]; a later one about the same address wins
    MARK  JSON: name and nanoseconds since the start, and what had been counted then (as SUMM, base64)
    SUMM  per vCPU: all rows with their counts and histograms up to then (zlib); the last one counts
    SYMS  the guest's symbols and processes; see `names`
    KVMS  JSON: KVM's own counters
    KERN  JSON: exits as the host's kernel counted them; see `pack_row`
    TAIL  JSON: how long it ran, how it ended, what the trace lacks: the file is whole
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from hypervisor.profile.exits import ExitRow
from hypervisor.profile.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CHUNK", "COARSE", "MAGIC", "ROW_KEY", "VERSION", "pack_row", "unpack_row"]

MAGIC: Final = b"hvprof\r\n"
"""A transfer that changes line ends is noticed at once."""
VERSION: Final = 1
CHUNK: Final = Struct("<4sIQ")
"""kind, vcpu, size."""
ROW_KEY: Final = Struct("<QIBBBx")
"""address, number, reason, kind, size."""
COARSE: Final = 0x8000
"""Bit of a trace record's row: its handler time is in units of 1024 ticks."""


def pack_row(row: ExitRow) -> dict[str, Any]:
    """Return a row of the kernel's layer as JSON has it: times are nanoseconds."""
    times = {
        name: [list(time.buckets.items()), time.total_ticks, time.max_ticks]
        for name, time in (("handler", row.handler), ("guest", row.guest))
    }
    return {"reason": row.reason, "vcpu": row.vcpu, "count": row.count} | times


def unpack_row(packed: Mapping[str, Any]) -> ExitRow:
    """Return what `pack_row` packed."""

    def time(name: str) -> Histogram:
        buckets, total, largest = packed[name]
        return Histogram({int(bucket): int(count) for bucket, count in buckets}, int(total), int(largest))

    count = int(packed["count"])
    reason = str(packed["reason"])
    nothing = (None, None, None, None, None)
    return ExitRow("kernel", reason, *nothing, packed["vcpu"], count, count, time("handler"), time("guest"), {})

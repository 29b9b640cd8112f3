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
    SYMS  the guest's symbols; see `names`
    PROC  JSON: [CR3, pid, command] of the guest's processes
    KVMS  JSON: KVM's own counters
    KERN  JSON: exits that KVM handled, as the host's kernel counted them
    TAIL  JSON: how long it ran, how it ended, what the trace lacks: the file is whole
"""

from __future__ import annotations

from struct import Struct
from typing import Final

__all__ = ["CHUNK", "MAGIC", "ROW_KEY", "VERSION"]

MAGIC: Final = b"hvprof\r\n"
"""A transfer that changes line ends is noticed at once."""
VERSION: Final = 1
CHUNK: Final = Struct("<4sIQ")
"""kind, vcpu, size."""
ROW_KEY: Final = Struct("<QIBBBx")
"""address, number, reason, kind, size."""
COARSE: Final = 0x8000
"""Bit of a trace record's row: its handler time is in units of 1024 ticks."""

"""Profile files that tests make byte by byte, in the layout of hypervisor/profile/fileformat.py, restated here."""

import json
import struct
import zlib

from hypervisor.profile.histogram import Histogram

MAGIC = b"hvprof\r\n"
IO, MMIO, HLT = 2, 6, 5  # KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_HLT
PIO_IN, PIO_OUT, EXIT = 1, 2, 5  # kinds of access, as runloop.h numbers them
REASONS = {"2": "io", "5": "hlt", "6": "mmio"}
START = 1_000_000
ROW_BYTES = 8 + 8 + 8 + 8 + 2 * 8 * (2 + 640)


def chunk(kind, data, vcpu=0):
    return struct.pack("<4sIQ", kind, vcpu, len(data)) + data


def head(**changes):
    facts = {"version": 1, "info": {"kernel": "flat", "cpus": 1, "ram_mib": 2}, "tick": START, "khz": 1_000_000}
    return chunk(b"HEAD", json.dumps(facts | {"reasons": REASONS, "every": 1, "trace": True} | changes).encode())


def tail(**changes):
    facts = {"wall_ns": 1_000_000, "tick": START + 2_000_000, "outcome": "HALTED", "dropped": [0]}
    return chunk(b"TAIL", json.dumps(facts | changes).encode())


def row_keys(keys, vcpu=0, first=0):
    """Return the chunk that says what rows are: (address, reason, kind, size) each."""
    packed = [
        struct.pack("<QIBBBx", address, number, reason, kind, size)
        for number, (address, reason, kind, size) in enumerate(keys, first)
    ]
    return chunk(b"ROWS", b"".join(packed), vcpu)


def record(tick, row, handler, rip=0, space=0):
    """Return a traced exit; a handler time that does not fit is written in units of 1024 ticks."""
    if handler >= 1 << 32:
        row, handler = row | 0x8000, handler >> 10
    return struct.pack("<QQIHH", START + tick, rip, handler, row, space)


def trace(records, vcpu=0):
    return chunk(b"TRAC", b"".join(records), vcpu)


def spaces(values, vcpu=0):
    return chunk(b"SPAC", struct.pack(f"<{len(values)}Q", *values), vcpu)


def counted(rows):
    """Return rows as C keeps them, unpacked; of each its key, its guest and its handler times in ticks."""
    return b"".join(
        struct.pack("<QBBB5xQQ", address, reason, kind, size, len(handler), len(handler))
        + _histogram(guest)
        + _histogram(handler)
        for (address, reason, kind, size), guest, handler in rows
    )


def summary(rows, vcpu=0):
    return chunk(b"SUMM", zlib.compress(counted(rows)), vcpu)


def _histogram(values):
    made = Histogram.of(values)
    words = [made.buckets.get(bucket, 0) for bucket in range(640)]
    return struct.pack("<642Q", made.total_ticks, made.max_ticks, *words)

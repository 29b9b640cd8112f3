"""KVM's own counters, from the file that KVM_GET_STATS_FD gives (KVM API section 4.133)."""

from __future__ import annotations

import os
import struct
from errno import EINVAL, ENOTTY
from typing import Final, NamedTuple

from hypervisor.errors import HostError, KvmError
from hypervisor.kvm._kvm import lib
from hypervisor.kvm.ioctls import control_value

__all__ = ["Stat", "Stats", "StatsFile"]

HEADER: Final = struct.Struct("=6I")
"""flags, name_size, num_desc, id_offset, desc_offset, data_offset."""
DESCRIPTOR: Final = struct.Struct("=IhHII")
"""flags, exponent, size, offset, bucket_size; `name_size` bytes of name follow."""
KINDS: Final = ("cumulative", "instant", "peak", "linear", "log")
UNITS: Final = ("", "bytes", "seconds", "cycles", "boolean")
BASES: Final = (10, 2)
LARGEST: Final = 1 << 20
"""Bytes of descriptors or data that are believed; KVM has a few KiB of each."""


class Stat(NamedTuple):
    """What the file says of one counter.

    Attributes:
        name: KVM's name, such as "halt_wait_ns".
        kind: "cumulative", "instant", "peak"; "linear" or "log" for a histogram; "" for one yet unheard of.
        unit: "bytes", "seconds", "cycles", "boolean" or "" for plain numbers; of a histogram that of its buckets.
        base, exponent: the value counts in units of base ** exponent: nanoseconds are seconds, 10 and -9.
        offset: where its value is in the data, in bytes.
        size: how many 64-bit numbers it has: 1, or a histogram's buckets.
        bucket_size: how wide a bucket of a linear histogram is.
    """

    name: str
    kind: str
    unit: str
    base: int
    exponent: int
    offset: int
    size: int
    bucket_size: int

    def bounds(self, bucket: int) -> tuple[int, int | None]:
        """Return the range [low, high) of a histogram's bucket; the last one has no end."""
        if self.kind == "linear":
            low, high = bucket * self.bucket_size, (bucket + 1) * self.bucket_size
        else:
            low, high = (1 << bucket) >> 1, 1 << bucket
        return low, high if bucket < self.size - 1 else None


class StatsFile:
    """An open statistics file. May be read from any thread, also while vCPUs run.

    Attributes:
        id: KVM's name for what is counted, such as "kvm-4711/vcpu-0".
        stats: what is counted.
    """

    def __init__(self, fd: int) -> None:
        """Take over the descriptor; raises HostError when the file is not as documented."""
        self._fd = fd
        try:
            self._parse()
            self._numbers()
        except BaseException:
            self.close()
            raise

    def _parse(self) -> None:
        """Read the blocks that never change."""
        _, name_size, count, id_at, stats_at, self._data_at = HEADER.unpack(self._read(HEADER.size, 0))
        self.id = _text(self._read(name_size, id_at))
        step = DESCRIPTOR.size + name_size
        table = self._read(step * count, stats_at)
        self.stats = tuple(_stat(table, i * step, step) for i in range(count))
        if any(stat.offset % 8 for stat in self.stats):
            raise HostError("KVM's statistics are not 64-bit numbers side by side")
        self._places = [(stat.name, stat.offset // 8, stat.size) for stat in self.stats]
        self._data = struct.Struct(f"={max((at + size for _, at, size in self._places), default=0)}Q")

    def _read(self, size: int, offset: int) -> bytes:
        data = os.pread(self._fd, size, offset) if size <= LARGEST else b""
        if len(data) != size:
            raise HostError(f"KVM's statistics end at {offset + len(data)}, not at {offset + size}")
        return data

    def _numbers(self) -> tuple[int, ...]:
        """Read all data, with one system call."""
        return self._data.unpack(self._read(self._data.size, self._data_at))

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def values(self) -> dict[str, int]:
        """Return all counters by name, as KVM counts them; of a histogram the number of its samples."""
        numbers = self._numbers()
        return {name: numbers[at] if size == 1 else sum(numbers[at : at + size]) for name, at, size in self._places}

    def histograms(self) -> dict[str, list[tuple[int, int | None, int]]]:
        """Return every histogram's buckets that are not empty: low, high (excluded; None: no end), samples."""
        numbers = self._numbers()
        return {
            stat.name: [(*stat.bounds(i), numbers[at + i]) for i in range(size) if numbers[at + i]]
            for stat, (_, at, size) in zip(self.stats, self._places, strict=True)
            if stat.kind in {"linear", "log"}
        }


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("ascii", "replace")


def _stat(data: bytes, at: int, step: int) -> Stat:
    flags, exponent, size, offset, bucket_size = DESCRIPTOR.unpack_from(data, at)
    name = _text(data[at + DESCRIPTOR.size : at + step])
    kind, unit, base = flags & 15, flags >> 4 & 15, flags >> 8 & 15
    return Stat(
        *(name, KINDS[kind] if kind < len(KINDS) else "", UNITS[unit] if unit < len(UNITS) else ""),
        *(BASES[base] if base < len(BASES) else 0, exponent, offset, size, bucket_size),
    )


class Stats:
    """The statistics of a VM or a vCPU, opened when they are first asked for."""

    def __init__(self, fd: int) -> None:
        """Read of what `fd` stands for; the descriptor stays the caller's."""
        self._of = fd
        self._file: StatsFile | None = None
        self.is_open = False

    def open(self) -> StatsFile | None:
        """Return the file; None where this kernel has none (it came with Linux 5.14).

        KVM lets only one thread at a time into a vCPU's ioctls and KVM_RUN is one, so the first call for a vCPU waits
        while it runs.
        """
        if not self.is_open:
            try:
                self._file = StatsFile(control_value(self._of, lib.KVM_GET_STATS_FD))
            except KvmError as error:
                if error.errno not in {ENOTTY, EINVAL}:
                    raise
            self.is_open = True
        return self._file

    def close(self) -> None:
        """Close the file; it is not opened again."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.is_open = True

"""Writes large profiles of runs that never were: as many exits as one likes, with the variety of a Linux guest's."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hypervisor.kvm.recorder import row_size
from hypervisor.kvm.vcpu import PIO_IN, PIO_OUT, reason_names
from hypervisor.profile.fileformat import CHUNK, MAGIC, ROW_KEY, VERSION
from hypervisor.profile.histogram import BUCKETS
from hypervisor.profile.trace import RECORD, _buckets

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

VCPUS: Final = 4
ROWS: Final = 60
PLACES: Final = 3000
SPACES: Final = 40
BATCH: Final = 1 << 15
"""Records of a chunk: half of a vCPU's ring, at which the writer is woken."""
KERNEL: Final = 0xFFFF_FFFF_8100_0000
USER: Final = 0x5555_0000_0000
IN_KERNEL: Final = 0.8
"""The share of places."""
IO: Final = 2
KHZ: Final = 2_500_000


def write_profile(path: Path, exits: int, *, whole: bool = True) -> None:
    """Write a profile of so many exits; one that is not `whole` ends as if its run had been killed."""
    random = np.random.default_rng(1)
    start = 1 << 40
    offsets = random.integers(0, 1 << 23, PLACES).astype(np.uint64)
    places = np.where(random.random(PLACES) < IN_KERNEL, np.uint64(KERNEL), np.uint64(USER)) + offsets
    now = [start] * VCPUS
    words = np.zeros((VCPUS, ROWS, row_size() // 8), np.uint64)
    with path.open("wb") as file:
        file.write(MAGIC)
        _put_json(file, "HEAD", _head(start))
        for vcpu in range(VCPUS):
            keys = [(0x1000 + number, number, IO, PIO_IN if number % 2 else PIO_OUT, 1) for number in range(ROWS)]
            _put(file, "ROWS", b"".join(ROW_KEY.pack(*key) for key in keys), vcpu)
            _put(file, "SPAC", np.arange(1, SPACES + 1, dtype="<u8") << 12, vcpu)
            words[vcpu, :, 0] = [address for address, *_ in keys]
            words[vcpu, :, 1] = [reason | kind << 8 | size << 16 for _, _, reason, kind, size in keys]
        for done in range(0, exits, BATCH):
            vcpu = done // BATCH % VCPUS
            records, guest = _records(random, min(BATCH, exits - done), now[vcpu], places)
            now[vcpu] = int(records["tick"][-1]) + int(records["handler"][-1])
            _put(file, "TRAC", records, vcpu)
            _count(words[vcpu], records, guest)
        if whole:
            for vcpu in range(VCPUS):
                _put(file, "SUMM", zlib.compress(words[vcpu].tobytes(), 1), vcpu)
            end = max(now)
            tail = {"wall_ns": (end - start) * 1_000_000 // KHZ, "tick": end, "outcome": "POWER_OFF"}
            _put_json(file, "TAIL", tail | {"dropped": [0] * VCPUS})


def _head(start: int) -> dict[str, Any]:
    return {
        "version": VERSION,
        "info": {"kernel": "none", "cpus": VCPUS, "ram_mib": 0},
        "tick": start,
        "khz": KHZ,
        "reasons": reason_names(),
        "every": 1,
        "trace": True,
    }


def _put(file: BinaryIO, kind: str, data: bytes | NDArray[Any], vcpu: int = 0) -> None:
    packed = data if isinstance(data, bytes) else data.tobytes()
    file.write(CHUNK.pack(kind.encode("ascii"), vcpu, len(packed)) + packed)


def _put_json(file: BinaryIO, kind: str, value: object) -> None:
    _put(file, kind, json.dumps(value).encode())


def _records(
    random: np.random.Generator, count: int, now: int, places: NDArray[np.uint64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return exits from `now` on, and the time in the guest before each."""
    guest = random.integers(2000, 20_000, count)
    handler = random.lognormal(9, 1.5, count).astype(np.int64) + 1
    records = np.zeros(count, RECORD)
    records["tick"] = now + np.cumsum(guest) + np.cumsum(handler) - handler
    records["handler"] = handler
    records["row"] = (random.random(count) ** 3 * ROWS).astype(np.int64)
    records["rip"] = places[(random.random(count) ** 3 * PLACES).astype(np.int64)]
    records["space"] = random.integers(1, SPACES + 1, count)
    return records, guest


def _count(words: NDArray[np.uint64], records: NDArray[Any], guest: NDArray[np.int64]) -> None:
    """Add exits to a vCPU's rows, which are laid out as struct hv_row is."""
    row = records["row"].astype(np.int64)
    exits = np.bincount(row, minlength=ROWS).astype(np.uint64)
    words[:, 2] += exits
    words[:, 3] += exits
    for at, ticks in ((4, guest), (4 + 2 + BUCKETS, records["handler"].astype(np.int64))):
        words[:, at] += np.bincount(row, ticks, ROWS).astype(np.uint64)
        largest = np.zeros(ROWS, np.uint64)
        np.maximum.at(largest, row, ticks.astype(np.uint64))
        words[:, at + 1] = np.maximum(words[:, at + 1], largest)
        found = np.bincount(row * BUCKETS + _buckets(ticks), minlength=ROWS * BUCKETS)
        words[:, at + 2 : at + 2 + BUCKETS] += found.reshape(ROWS, BUCKETS).astype(np.uint64)

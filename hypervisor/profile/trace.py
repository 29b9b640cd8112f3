"""Reads the single exits of a profile file, in passes over arrays: millions of them take seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from hypervisor.kvm.recorder import RawRow
from hypervisor.profile.fileformat import COARSE
from hypervisor.profile.histogram import BUCKETS
from hypervisor.profile.model import TraceChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from mmap import mmap

    from numpy.typing import NDArray

__all__ = ["RowKey", "Trace"]

RECORD: Final = np.dtype([("tick", "<u8"), ("rip", "<u8"), ("handler", "<u4"), ("row", "<u2"), ("space", "<u2")])
MOST_PLACES: Final = 1 << 17
"""Different places that are told apart: a guest decides how many there are."""
KERNEL_HALF: Final = np.uint64(1 << 63)
SPACE_SHIFT: Final = np.uint64(48)
"""User addresses are below 2^47: above them there is room for the number of their address space."""
MOST_TICKS: Final = (1 << 63) - 1
TOO_MANY: Final = "[one place too many]"


class RowKey(NamedTuple):
    """What a row number of a vCPU's trace means; see struct hv_row."""

    address: int
    reason: int
    kind: int
    size: int

    def as_row(self) -> RawRow:
        """Return a row of this kind without exits."""
        return RawRow(self.address, self.reason, self.kind, self.size, 0, 0, _NOTHING, _NOTHING)


_NOTHING: Final = (0, 0, memoryview(b"").cast("Q"))


class Trace:
    """All single exits of a file.

    Attributes:
        places: names of sampled places, filled by `sample`.
        last_tick: of the last exit that was handled.
    """

    def __init__(
        self,
        data: bytes | mmap,
        chunks: Sequence[tuple[int, int, int]],
        *,
        keys: Mapping[int, Sequence[RowKey]],
        spaces: Mapping[int, NDArray[np.uint64]],
        start_tick: int,
    ) -> None:
        """Read `chunks` (vcpu, offset and size) of `data`, whose rows and spaces mean this."""
        self._data = data
        self._chunks = [(vcpu, at, size // RECORD.itemsize) for vcpu, at, size in chunks if size >= RECORD.itemsize]
        self._keys = keys
        self._spaces = spaces
        self._start = start_tick
        self._named: dict[tuple[int | None, int], int] = {}
        self._numbers: dict[str, int] = {}
        self._tables: dict[int, _Places] = {}
        self._too_many = -1
        self.places: list[str] = []
        self._bases: dict[int, int] = {}
        base = 0
        for vcpu, rows in sorted(keys.items()):
            self._bases[vcpu] = base
            base += len(rows)
        self._rows = base

    def _records(self) -> Iterator[tuple[int, NDArray[Any], NDArray[np.int64]]]:
        """Iterate over vCPU, records and row numbers; what refers to no row is left out, and no chunk is empty."""
        for vcpu, at, count in self._chunks:
            records = np.frombuffer(self._data, RECORD, count, at)
            row = (records["row"] & (COARSE - 1)).astype(np.int64)
            known = row < len(self._keys.get(vcpu, ()))
            if known.all():
                yield vcpu, records, row
            elif known.any():
                yield vcpu, records[known], row[known]

    @property
    def last_tick(self) -> int:
        """When the last exit was handled, in ticks."""
        ends = [self._start]
        ends += [_end_of(records) for _, records, _ in self._records()]
        return max(ends)

    # --- counts -------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[int, list[RawRow]]:
        """Count the exits by row: what a run that was killed did not write down itself."""
        sums = {vcpu: _Sums(len(rows)) for vcpu, rows in self._keys.items()}
        left_at = dict.fromkeys(self._keys, min(self._start, MOST_TICKS))
        for vcpu, records, row in self._records():
            tick, handler = records["tick"].astype(np.int64), _handler(records)
            entered = np.empty_like(tick)
            entered[0] = left_at[vcpu]
            np.add(tick[:-1], handler[:-1], out=entered[1:])
            left_at[vcpu] = min(_end_of(records), MOST_TICKS)
            sums[vcpu].add(row, np.maximum(tick - entered, 0), handler)
        return {vcpu: sums[vcpu].rows(rows) for vcpu, rows in self._keys.items()}

    # --- places -------------------------------------------------------------------------------------------------------

    def sample(self, name: Callable[[int, int], str]) -> dict[tuple[int, int], dict[str, int]]:
        """Return how often each place was sampled, by vCPU and row number.

        Args:
            name: gives a place its name from RIP and CR3; several addresses may have the same one.
        """
        tallies: dict[int, _Tally] = {}
        for vcpu, records, row in self._records():
            sampled = records["rip"] != 0
            if not sampled.any():
                continue
            keys = self._place_keys(records[sampled])
            table = self._tables.setdefault(vcpu, _Places())
            places = table.numbers(keys, -1)
            unknown = places < 0
            if unknown.any():
                self._name_places(vcpu, np.unique(keys[unknown]), name)
                places = table.numbers(keys, self._too_many)
            tallies.setdefault(vcpu, _Tally()).add(row[sampled] << 32 | places)
        found: dict[tuple[int, int], dict[str, int]] = {}
        for vcpu, tally in tallies.items():
            pairs, counts = tally.sums()
            for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
                found.setdefault((vcpu, pair >> 32), {})[self.places[pair & 0xFFFFFFFF]] = count
        return found

    def _name_places(self, vcpu: int, keys: NDArray[np.uint64], name: Callable[[int, int], str]) -> None:
        """Give places their names, as long as there are not too many."""
        kept, numbers = [], []
        for key in keys.tolist():
            whose = None if key >> 63 else vcpu  # the numbers of address spaces are a vCPU's own
            number = self._named.get((whose, key))
            if number is None:
                if len(self._named) >= MOST_PLACES:
                    self._too_many = self._number_of(TOO_MANY)
                    continue
                number = self._named[whose, key] = self._number_of(name(*self._split(vcpu, key)))
            kept.append(key)
            numbers.append(number)
        self._tables[vcpu].add(np.array(kept, np.uint64), np.array(numbers, np.int64))

    def _number_of(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self.places))
        if number == len(self.places):
            self.places.append(text)
        return number

    @staticmethod
    def _place_keys(records: NDArray[Any]) -> NDArray[np.uint64]:
        """Return one number a place: an address, and for one of user mode whose it is."""
        rip = records["rip"]
        user = rip < KERNEL_HALF
        space = records["space"].astype(np.uint64) << SPACE_SHIFT
        mixed: NDArray[np.uint64] = np.where(user, rip | space, rip)
        return mixed

    def _split(self, vcpu: int, key: int) -> tuple[int, int]:
        """Return RIP and CR3 (0: unknown) of a place's number."""
        if key >> 63:
            return key, 0
        number = key >> int(SPACE_SHIFT)
        spaces = self._spaces.get(vcpu, ())
        cr3 = int(spaces[number - 1]) if 0 < number <= len(spaces) else 0
        return key & (1 << int(SPACE_SHIFT)) - 1, cr3

    # --- single exits -------------------------------------------------------------------------------------------------

    def chunks(self, ns_per_tick: float) -> Iterator[TraceChunk]:
        """Iterate over the exits; rows are numbered through all vCPUs, `sample` has been called."""
        start = np.uint64(self._start)
        for vcpu, records, row in self._records():
            sampled = records["rip"] != 0
            place = np.full(len(records), -1, np.int64)
            if vcpu in self._tables and sampled.any():
                place[sampled] = self._tables[vcpu].numbers(self._place_keys(records[sampled]), self._too_many)
            yield TraceChunk(
                vcpu,
                (records["tick"] - start).astype(np.float64) * np.float64(ns_per_tick),
                _handler(records).astype(np.float64) * np.float64(ns_per_tick),
                row + self._bases[vcpu],
                place,
            )


def _end_of(records: NDArray[Any]) -> int:
    """Return the tick at which the last of these exits was handled."""
    return int(records["tick"][-1]) + int(_handler(records[-1:])[0])


def _handler(records: NDArray[Any]) -> NDArray[np.int64]:
    """Return handler times in ticks."""
    ticks = records["handler"].astype(np.int64)
    return np.where(records["row"] >= COARSE, ticks << 10, ticks)


def _buckets(ticks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bucket of each time: hypervisor.profile.histogram.bucket_of, for arrays."""
    power = np.frexp(ticks.astype(np.float64))[1].astype(np.int64) - 1
    power = np.maximum(power, 4)
    wide = (power - 3) * 16 + (ticks >> (power - 4) & 15)
    return np.minimum(np.where(ticks < 16, ticks, wide), BUCKETS - 1)


def _order(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return how to sort: stably, since numpy's quick way orders wrongly on processors that QEMU's TCG emulates."""
    return np.argsort(values, kind="stable")


class _Places:
    """The numbers of one vCPU's places, found for whole arrays."""

    def __init__(self) -> None:
        self._keys: NDArray[np.uint64] = np.zeros(1, np.uint64)  # no place is 0, and something is always there
        self._found: NDArray[np.int64] = np.zeros(1, np.int64)

    def add(self, keys: NDArray[np.uint64], numbers: NDArray[np.int64]) -> None:
        """Take the numbers of more."""
        order = _order(merged := np.concatenate((self._keys, keys)))
        self._keys, self._found = merged[order], np.concatenate((self._found, numbers))[order]

    def numbers(self, keys: NDArray[np.uint64], otherwise: int) -> NDArray[np.int64]:
        """Return the number of each; `otherwise` of those that have none."""
        at = np.searchsorted(self._keys, keys, side="right") - 1
        return np.where(self._keys[at] == keys, self._found[at], otherwise)


class _Tally:
    """Counts numbers."""

    LARGE: Final = 1 << 20

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._length = 0

    def add(self, numbers: NDArray[np.int64]) -> None:
        """Count these."""
        unique, counts = np.unique(numbers, return_counts=True)
        self._parts.append((unique, counts))
        self._length += len(unique)
        if self._length > self.LARGE:
            self._parts = [self.sums()]
            self._length = len(self._parts[0][0]) // 2  # so that a large sum is not made over and over

    def sums(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers, each once, and how often they were counted."""
        numbers, counts = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = _order(numbers)
        numbers, counts = numbers[order], counts[order]
        first = np.flatnonzero(np.diff(numbers, prepend=-1))  # of each number; none is negative
        return numbers[first], np.add.reduceat(counts, first)


class _Sums:
    """Counts and histograms of one vCPU's rows."""

    def __init__(self, rows: int) -> None:
        self._size = rows
        self._buckets = [np.zeros(rows * BUCKETS, np.int64) for _ in range(2)]
        self._totals = [np.zeros(rows, np.float64) for _ in range(2)]
        self._largest = [np.zeros(rows, np.int64) for _ in range(2)]

    def add(self, row: NDArray[np.int64], guest: NDArray[np.int64], handler: NDArray[np.int64]) -> None:
        """Count exits."""
        for which, ticks in enumerate((guest, handler)):
            at = row * BUCKETS + _buckets(ticks)
            self._buckets[which] += np.bincount(at, minlength=self._size * BUCKETS)
            self._totals[which] += np.bincount(row, ticks, minlength=self._size)
            np.maximum.at(self._largest[which], row, ticks)

    def rows(self, keys: Sequence[RowKey]) -> list[RawRow]:
        """Return them in the form in which C keeps them."""
        found = []
        for number, key in enumerate(keys):
            words = [bucket[number * BUCKETS : (number + 1) * BUCKETS] for bucket in self._buckets]
            histograms = [
                (int(self._totals[which][number]), int(self._largest[which][number]), words[which].data)
                for which in range(2)
            ]
            count = int(words[0].sum())
            found.append(
                RawRow(key.address, key.reason, key.kind, key.size, count, count, histograms[0], histograms[1])
            )
        return found

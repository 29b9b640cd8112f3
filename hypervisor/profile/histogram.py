"""Log-linear histograms of times, as `kvm/recorder.h` keeps them in TSC ticks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["BUCKETS", "Histogram", "bounds", "bucket_of"]

BUCKETS: Final = 640
_SUB_BITS: Final = 4
_SUB: Final = 1 << _SUB_BITS
"""Buckets to a power of two: each is at most 1/16 of its lower bound wide."""


def bucket_of(ticks: int) -> int:
    """Return the number of the bucket that a time in ticks falls into."""
    if ticks < _SUB:
        return ticks
    power = ticks.bit_length() - 1
    return min((power - 3) * _SUB + (ticks >> (power - _SUB_BITS) & (_SUB - 1)), BUCKETS - 1)


def bounds(bucket: int) -> tuple[int, int]:
    """Return the smallest and the largest time in ticks that fall into a bucket (the last takes longer ones, too)."""
    if bucket < _SUB:
        return bucket, bucket
    shift = bucket // _SUB - 1
    low = (_SUB + bucket % _SUB) << shift
    return low, low + (1 << shift) - 1


class Histogram:
    """Times, counted. Immutable.

    A percentile is off by at most half a bucket, which is 1/32 of its value, but for times of 2^43 ticks and more
    (about an hour), which are all in the last bucket. Total, mean and maximum are exact.

    Attributes:
        buckets: how many times fell into each bucket that is not empty, by ascending bucket.
        total_ticks, max_ticks: the sum and the largest of all of them, in ticks.
        ns_per_tick: nanoseconds of a tick.
    """

    __slots__ = ("buckets", "max_ticks", "ns_per_tick", "total_ticks")

    def __init__(
        self, buckets: Mapping[int, int] | None = None, total: int = 0, largest: int = 0, *, ns_per_tick: float = 1.0
    ) -> None:
        """Take what was counted."""
        self.buckets = dict(sorted((buckets or {}).items()))
        self.total_ticks = total
        self.max_ticks = largest
        self.ns_per_tick = ns_per_tick

    @classmethod
    def of(cls, values: Iterable[int], *, ns_per_tick: float = 1.0) -> Histogram:
        """Count times in ticks."""
        buckets: dict[int, int] = {}
        total = largest = 0
        for value in values:
            bucket = bucket_of(value)
            buckets[bucket] = buckets.get(bucket, 0) + 1
            total += value
            largest = max(largest, value)
        return cls(buckets, total, largest, ns_per_tick=ns_per_tick)

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """Return the histogram of all times of `parts`; where their ticks differ it has those of the first."""
        buckets: dict[int, int] = {}
        total = largest = 0
        scale: float | None = None
        for some in parts:
            if not some.buckets:
                continue
            scale = some.ns_per_tick if scale is None else scale
            part = some.rescaled(scale)
            for bucket, count in part.buckets.items():
                buckets[bucket] = buckets.get(bucket, 0) + count
            total += part.total_ticks
            largest = max(largest, part.max_ticks)
        return cls(buckets, total, largest, ns_per_tick=1.0 if scale is None else scale)

    def rescaled(self, ns_per_tick: float) -> Histogram:
        """Return the same times in other ticks; percentiles lose up to another half of a bucket."""
        if ns_per_tick == self.ns_per_tick:
            return self
        factor = self.ns_per_tick / ns_per_tick
        buckets: dict[int, int] = {}
        for bucket, count in self.buckets.items():
            moved = bucket_of(round(sum(bounds(bucket)) / 2 * factor))
            buckets[moved] = buckets.get(moved, 0) + count
        total, largest = round(self.total_ticks * factor), round(self.max_ticks * factor)
        return Histogram(buckets, total, largest, ns_per_tick=ns_per_tick)

    def since(self, earlier: Histogram) -> Histogram:
        """Return what was added after `earlier`. Its maximum is known to a bucket only, unless it is the whole's."""
        buckets = {
            bucket: count - earlier.buckets.get(bucket, 0)
            for bucket, count in self.buckets.items()
            if count > earlier.buckets.get(bucket, 0)
        }
        last = max(buckets, default=0)
        largest = self.max_ticks if last == BUCKETS - 1 else bounds(last)[1]
        return Histogram(
            buckets,
            max(self.total_ticks - earlier.total_ticks, 0),
            min(largest, self.max_ticks),
            ns_per_tick=self.ns_per_tick,
        )

    @property
    def count(self) -> int:
        """How many times there are."""
        return sum(self.buckets.values())

    @property
    def total(self) -> float:
        """Their sum, in nanoseconds."""
        return self.total_ticks * self.ns_per_tick

    @property
    def mean(self) -> float:
        """Their mean, in nanoseconds; 0 when there are none."""
        count = self.count
        return self.total / count if count else 0.0

    @property
    def max(self) -> float:
        """The largest, in nanoseconds."""
        return self.max_ticks * self.ns_per_tick

    def percentile(self, percent: float) -> float:
        """Return the time, in nanoseconds, that `percent` of all times do not exceed; 0 when there are none."""
        wanted = self.count * percent / 100
        seen = 0
        for bucket, count in self.buckets.items():
            seen += count
            if seen >= wanted:
                low, high = bounds(bucket)
                if bucket == BUCKETS - 1:
                    high = max(high, self.max_ticks)
                return min((low + high) / 2, self.max_ticks) * self.ns_per_tick
        return 0.0

    @property
    def p50(self) -> float:
        """The median, in nanoseconds."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """The 90th percentile, in nanoseconds."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """The 99th percentile, in nanoseconds."""
        return self.percentile(99)

    def as_json(self) -> dict[str, int]:
        """Return total, percentiles and maximum, in whole nanoseconds."""
        names = ("total", "p50", "p90", "p99", "max")
        return {name: round(getattr(self, name)) for name in names}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (self.buckets, self.total_ticks, self.max_ticks) == (other.buckets, other.total_ticks, other.max_ticks)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Histogram of {self.count}: p50 {self.p50:.0f} ns, p99 {self.p99:.0f} ns, max {self.max:.0f} ns>"

"""Histograms: C's, Python's and numpy's buckets are the same ones, and percentiles are as exact as promised."""

import math

import numpy as np
import pytest
from hypervisor.kvm._kvm import lib
from hypothesis import example, given
from hypothesis import strategies as st

from hypervisor.profile.histogram import Histogram, bounds, bucket_of
from hypervisor.profile.trace import _buckets

LAST = 639
TICKS = st.integers(0, 63).flatmap(lambda bits: st.integers(0, (2 << bits) - 1))
FINITE = st.integers(0, 42).flatmap(lambda bits: st.integers(0, (2 << bits) - 1)).filter(lambda t: bucket_of(t) < LAST)


@given(TICKS)
@example(15)
@example(16)
@example((1 << 43) - 1)
@example(1 << 43)
@example((1 << 64) - 1)
def test_c_and_python_agree_on_the_bucket_of_any_64_bit_time(ticks):
    assert lib.hv_bucket(ticks) == bucket_of(ticks) <= LAST


@given(st.lists(TICKS.filter(lambda t: t < 1 << 63), min_size=1, max_size=50))
@example([(1 << 54) - 1, (1 << 63) - 1, (1 << 43) - 1, 1 << 43])
def test_arrays_agree_too(ticks):
    assert _buckets(np.array(ticks, np.int64)).tolist() == [bucket_of(t) for t in ticks]


@given(TICKS)
def test_a_time_lies_within_its_bucket(ticks):
    low, high = bounds(bucket_of(ticks))
    assert low <= ticks
    assert ticks <= high or bucket_of(ticks) == LAST


def test_buckets_follow_one_another_and_are_a_sixteenth_wide():
    for bucket in range(LAST):
        low, high = bounds(bucket)
        assert bounds(bucket + 1)[0] == high + 1
        assert bucket_of(low) == bucket_of(high) == bucket
        assert high - low < max(low / 16, 1)


def exact(values, percent):
    """The smallest value that `percent` of all do not exceed: nearest rank."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100) - 1, 0)]


@given(st.lists(FINITE, min_size=1, max_size=200), st.sampled_from([0, 1, 10, 50, 90, 99, 99.9, 100]))
def test_a_percentile_is_within_half_a_bucket(values, percent):
    found = Histogram.of(values).percentile(percent)
    true = exact(values, percent)
    assert abs(found - true) <= max(true / 32, 0.5)


@given(st.lists(TICKS, min_size=1, max_size=100))
def test_sums_maxima_and_counts_are_exact(values):
    made = Histogram.of(values, ns_per_tick=1.0)
    assert (made.count, made.total_ticks, made.max_ticks) == (len(values), sum(values), max(values))
    assert made.total == float(sum(values))
    assert made.mean == float(sum(values)) / len(values)


def test_a_percentile_never_exceeds_the_maximum_nor_an_hour_its_length():
    assert Histogram.of([992, 993]).p99 == 993  # of a bucket from 992 to 1023
    day = 86_400 * 3_000_000_000
    assert day / 2 <= Histogram.of([day]).p50 <= day


def test_nothing_has_no_times():
    nothing = Histogram()
    assert (nothing.count, nothing.p50, nothing.p99, nothing.mean, nothing.max) == (0, 0, 0, 0, 0)
    assert nothing.as_json() == {"total": 0, "p50": 0, "p90": 0, "p99": 0, "max": 0}
    assert Histogram.merged([]) == nothing


@given(st.lists(st.lists(TICKS, max_size=30), max_size=5))
def test_merged_is_the_histogram_of_all(parts):
    assert Histogram.merged(map(Histogram.of, parts)) == Histogram.of([t for part in parts for t in part])


def test_merged_parts_keep_their_nanoseconds():
    fast, slow = Histogram.of([1000] * 10, ns_per_tick=0.5), Histogram.of([1000] * 10, ns_per_tick=2.0)
    assert Histogram.merged([fast, Histogram()]).total == fast.total == 5000
    assert Histogram.merged([Histogram(), fast]).total == 5000
    both = Histogram.merged([fast, slow])
    assert (both.count, both.total, both.max) == (20, 25_000, 2000)
    assert both.p50 == pytest.approx(500, rel=1 / 16)
    assert both.p90 == pytest.approx(2000, rel=1 / 16)


@given(st.lists(TICKS, max_size=60), st.lists(TICKS, max_size=60))
def test_since_is_what_was_added(before, added):
    whole, new = Histogram.of(before + added), Histogram.of(added)
    later = whole.since(Histogram.of(before))
    assert later.buckets == new.buckets
    assert later.total_ticks == new.total_ticks
    if added:
        assert max(added) <= later.max_ticks <= whole.max_ticks
        assert bucket_of(later.max_ticks) == bucket_of(max(added))
    else:
        assert later.max_ticks == 0


def test_histograms_compare_by_what_they_counted():
    assert Histogram.of([1, 2]) == Histogram.of([2, 1])
    assert Histogram.of([1, 2]) != Histogram.of([1, 3])
    assert Histogram.of([1]) != [1]
    with pytest.raises(TypeError):
        hash(Histogram())
    assert repr(Histogram.of([7], ns_per_tick=2.0)) == "<Histogram of 1: p50 14 ns, p99 14 ns, max 14 ns>"

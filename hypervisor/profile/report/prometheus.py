"""A profile as Prometheus' exposition text, to be collected from a file or pushed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from hypervisor.profile.histogram import bounds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from hypervisor.profile.exits import ExitRow
    from hypervisor.profile.histogram import Histogram
    from hypervisor.profile.model import Profile

__all__ = ["BOUNDS_NS", "ProfileCollector", "render"]

BOUNDS_NS: Final = tuple(1 << power for power in range(8, 31))
"""Upper bounds of the handler times' buckets: 256 ns to 1.07 s."""
LABELS: Final = ("layer", "reason", "device", "register", "direction", "vcpu")


def render(profile: Profile) -> bytes:
    """Return the text, UTF-8: counts and histograms for each kind of exit, times for each vCPU, KVM's own counters.

    Label values that are no text are escaped; a device that nobody is has an empty label.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(ProfileCollector(profile))
    return bytes(generate_latest(registry))


class ProfileCollector:
    """What the library asks for a profile's metrics."""

    def __init__(self, profile: Profile) -> None:
        """Collect from `profile`."""
        self._profile = profile

    def describe(self) -> list[Metric]:
        """Return nothing: the registry need not collect to know the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from _exits(self._profile)
        yield from _times(self._profile)
        yield from _kvm(self._profile)


def _label(text: Any) -> str:
    """Return a label's value: anything, as what UTF-8 can hold."""
    return "" if text is None else str(text).encode("utf-8", "backslashreplace").decode()


def _labels(row: ExitRow) -> tuple[str, ...]:
    return tuple(_label(getattr(row, name)) for name in LABELS)


def _exits(profile: Profile) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily

    together: dict[tuple[str, ...], list[ExitRow]] = {}
    for row in profile.exits:  # addresses and sizes are no labels: rows that differ by those alone are one
        together.setdefault(_labels(row), []).append(row)
    counts = CounterMetricFamily("hv_exits", "Exits, by who counted them and what they were.", labels=LABELS)
    times = HistogramMetricFamily("hv_exit_handler_seconds", "Time from an exit to the next entry.", labels=LABELS)
    for labels, rows in together.items():
        counts.add_metric(labels, sum(row.count for row in rows))
        histograms = [row.handler for row in rows]
        times.add_metric(labels, cumulative(histograms), sum(one.total for one in histograms) / 1e9)
    yield counts
    yield times


def cumulative(histograms: list[Histogram]) -> list[tuple[str, float]]:
    """Return pairs of bound in seconds and how many times are no longer; the last bound is +Inf.

    A bucket counts as a whole, where its upper end lies.
    """
    counts = [0] * (len(BOUNDS_NS) + 1)
    for histogram in histograms:
        for bucket, count in histogram.buckets.items():
            end = min(bounds(bucket)[1], histogram.max_ticks) * histogram.ns_per_tick
            place = next((i for i, bound in enumerate(BOUNDS_NS) if end <= bound), len(BOUNDS_NS))
            counts[place] += count
    names = [repr(bound / 1e9) for bound in BOUNDS_NS] + ["+Inf"]
    seen = 0
    pairs: list[tuple[str, float]] = []
    for name, count in zip(names, counts, strict=True):
        seen += count
        pairs.append((name, seen))
    return pairs


def _times(profile: Profile) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily("hv_wall_seconds", "How long the machine ran.", value=profile.wall_ns / 1e9)
    guest = CounterMetricFamily("hv_guest_seconds", "Time in KVM_RUN, without known halts.", labels=["vcpu"])
    handler = CounterMetricFamily("hv_handler_seconds", "Time in hv, from exits to entries.", labels=["vcpu"])
    halted = CounterMetricFamily("hv_halted_seconds", "Time halted, as KVM counts it.", labels=["vcpu"])
    for vcpu in profile.vcpus:
        labels = [str(vcpu.index)]
        guest.add_metric(labels, vcpu.guest_ns / 1e9)
        handler.add_metric(labels, vcpu.handler_ns / 1e9)
        if vcpu.halted_ns is not None:
            halted.add_metric(labels, vcpu.halted_ns / 1e9)
    yield guest
    yield handler
    if halted.samples:
        yield halted


def _kvm(profile: Profile) -> Iterator[Metric]:
    """Yield KVM's counters, untyped: some of them are levels. The VM's own have an empty vCPU."""
    from prometheus_client.metrics_core import UntypedMetricFamily

    families: dict[str, UntypedMetricFamily] = {}
    for owner, values in profile.kvm.items():
        for counter, value in values.items():
            name = "hv_kvm_" + re.sub(r"[^a-zA-Z0-9_]", "_", counter)
            if name not in families:
                families[name] = UntypedMetricFamily(name, "A counter of the host's KVM.", labels=["vcpu"])
            families[name].add_metric([_label(owner.removeprefix("vcpu") if owner != "vm" else "")], value)
    yield from families.values()

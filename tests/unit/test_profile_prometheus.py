"""The exposition text, read back by the client library's parser."""

import math

import pytest
from profiles import sample
from prometheus_client.parser import text_string_to_metric_families

from hypervisor.profile.exits import ExitRow, Exits
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile
from hypervisor.profile.report import prometheus


def read(profile):
    families = text_string_to_metric_families(prometheus.render(profile).decode())
    return {family.name: family for family in families}


def value(family, name, **labels):
    found = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
    assert len(found) == 1
    return found[0]


def test_counts_have_their_labels():
    family = read(sample())["hv_exits"]
    assert family.type == "counter"
    assert set(family.samples[0].labels) == {"layer", "reason", "device", "register", "direction", "vcpu"}
    assert value(family, "hv_exits_total", device="uart0", register="LSR", direction="in", vcpu="0", reason="io") == 400
    assert value(family, "hv_exits_total", layer="kernel", reason="npf", device="", vcpu="") == 700
    assert sum(sample.value for sample in family.samples) == 981 + 700


def test_histograms_are_cumulative_and_complete():
    family = read(sample())["hv_exit_handler_seconds"]
    assert family.type == "histogram"
    labels = {"device": "uart0", "register": "THR", "vcpu": "0"}
    mine = [s for s in family.samples if labels.items() <= s.labels.items()]
    buckets = [(float(s.labels["le"]), s.value) for s in mine if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (math.inf, 390)
    assert value(family, "hv_exit_handler_seconds_count", **labels) == 390
    row = next(row for row in sample().exits.vcpu(0) if row.register == "THR")
    assert value(family, "hv_exit_handler_seconds_sum", **labels) == pytest.approx(row.handler.total / 1e9)


@pytest.mark.parametrize("ticks", [0, 1, 255, 256, 257, 4096, 100_000, 1 << 30, (1 << 30) + 1, 1 << 40])
def test_a_time_is_in_every_bucket_that_reaches_it(ticks):
    """Bounds are powers of two nanoseconds, 2**8 to 2**30. A bucket of ours counts where its upper end is."""
    pairs = prometheus.cumulative([Histogram.of([ticks])])
    for bound, count in pairs:
        assert count == (ticks <= round(float(bound) * 1e9) if bound != "+Inf" else 1)


def test_times_of_vcpus_and_kvms_counters():
    families = read(sample())
    assert value(families["hv_guest_seconds"], "hv_guest_seconds_total", vcpu="0") == 0.006
    assert value(families["hv_handler_seconds"], "hv_handler_seconds_total", vcpu="1") == 0.0002
    assert [s.labels for s in families["hv_halted_seconds"].samples] == [{"vcpu": "0"}]
    assert value(families["hv_kvm_io_exits"], "hv_kvm_io_exits", vcpu="0") == 913
    assert value(families["hv_kvm_remote_tlb_flush"], "hv_kvm_remote_tlb_flush", vcpu="") == 7
    assert value(families["hv_wall_seconds"], "hv_wall_seconds") == 0.01


def test_rows_that_differ_by_address_alone_are_one():
    rows = [
        ExitRow(*("user", "io", None, None, port, "in", 1, 0, 2, 2), Histogram.of([5, 6]), Histogram(), {})
        for port in range(50)
    ]
    family = read(Profile(info={}, wall_ns=1, vcpus=[], exits=Exits(rows)))["hv_exits"]
    assert [sample.value for sample in family.samples] == [100]


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "\0", "\udcff", "{x=1}", "\N{SNOWMAN}", "a\\nb"])
def test_labels_may_be_anything(name):
    row = ExitRow(*("user", "io", name, "r", 1, "in", 1, 0, 1, 1), Histogram.of([5]), Histogram(), {})
    profile = Profile(info={}, wall_ns=1, vcpus=[], exits=Exits([row]), kvm={"vm": {name: 3}})
    family = read(profile)["hv_exits"]
    assert family.samples[0].labels["device"] == name.encode("utf-8", "backslashreplace").decode()

"""What happened between two looks at a machine."""

import pytest

from hypervisor.profile.histogram import bucket_of
from hypervisor.profile.rates import History, exit_rates, machine_rates

SECOND = 1_000_000_000
UART = {"reason": "io", "device": "uart0", "register": "LSR", "address": 0x3FD, "direction": "in", "size": 1}
HLT = {"reason": "hlt", "device": None, "register": None, "address": None, "direction": None, "size": None}


def vcpu(index, *, exits=0, guest=0, handler=0, halted=None):
    return {"index": index, "exits": exits, "guest_ns": guest, "handler_ns": handler, "halted_ns": halted}


def answer(uptime, *vcpus, exits=()):
    facts = {"name": "web", "pid": 7, "kernel": "debian", "cpus": len(vcpus), "ram_mib": 256}
    return {"version": 1, **facts, "uptime_ns": uptime, "vcpus": list(vcpus), "ns_per_tick": 0.5, "exits": list(exits)}


def row(kind, times):
    buckets = {}
    for time in times:
        buckets[bucket_of(time)] = buckets.get(bucket_of(time), 0) + 1
    return {
        **kind,
        "count": len(times),
        "total": sum(times),
        "max": max(times),
        "buckets": [list(pair) for pair in sorted(buckets.items())],
    }


def test_rates_are_of_the_time_between_by_the_machines_own_clock():
    before = answer(5 * SECOND, vcpu(0, exits=100, handler=SECOND), vcpu(1, exits=10))
    after = answer(7 * SECOND, vcpu(0, exits=700, handler=2 * SECOND), vcpu(1, exits=210))
    rates = machine_rates(before, after)
    assert (rates.exits, rates.exits_per_s, rates.interval_ns) == (910, 400.0, 2 * SECOND)
    assert (rates.vmm_percent, rates.guest_percent, rates.halted_percent) == (25.0, 75.0, None)


def test_a_guest_that_never_exits_is_in_the_guest_all_the_time():
    rates = machine_rates(answer(SECOND, vcpu(0)), answer(2 * SECOND, vcpu(0)))
    assert (rates.exits_per_s, rates.guest_percent, rates.vmm_percent) == (0.0, 100.0, 0.0)


def test_halts_are_told_apart_where_all_vcpus_know_them():
    before = answer(SECOND, vcpu(0, halted=0), vcpu(1, halted=SECOND // 2))
    after = answer(2 * SECOND, vcpu(0, halted=SECOND, handler=0), vcpu(1, halted=SECOND, handler=SECOND // 4))
    rates = machine_rates(before, after)
    assert (rates.halted_percent, rates.vmm_percent, rates.guest_percent) == (75.0, 12.5, 12.5)
    one = answer(2 * SECOND, vcpu(0, halted=SECOND), vcpu(1, halted=None))
    assert machine_rates(before, one).halted_percent is None


def test_shares_stay_within_a_hundred_when_a_long_handler_ends_or_a_long_halt():
    before = answer(10 * SECOND, vcpu(0, halted=0))
    after = answer(11 * SECOND, vcpu(0, handler=3 * SECOND, halted=9 * SECOND))
    rates = machine_rates(before, after)
    assert (rates.vmm_percent, rates.halted_percent, rates.guest_percent) == (100.0, 0.0, 0.0)


def test_without_an_earlier_look_rates_are_since_the_start():
    rates = machine_rates(None, answer(4 * SECOND, vcpu(0, exits=100, handler=SECOND)))
    assert (rates.exits_per_s, rates.vmm_percent) == (25.0, 25.0)


def test_percentiles_are_of_what_was_added():
    before = answer(SECOND, exits=[row(UART, [100_000] * 1000)])
    after = answer(2 * SECOND, exits=[row(UART, [100_000] * 1000 + [2000] * 99 + [40_000])])
    (rate,) = exit_rates(before, after)
    assert (rate.count, rate.per_s) == (1100, 100.0)
    assert rate.p50_ns == pytest.approx(1000, rel=1 / 32)
    assert rate.p99_ns == pytest.approx(1000, rel=1 / 32)
    assert exit_rates(None, after)[0].p50_ns == pytest.approx(50_000, rel=1 / 32)


def test_shares_are_of_the_handlers_time_and_most_come_first():
    before = answer(SECOND, exits=[row(HLT, [10]), row(UART, [10])])
    after = answer(2 * SECOND, exits=[row(HLT, [10, 3000]), row(UART, [10] + [100] * 10)])
    rates = exit_rates(before, after)
    assert [(rate.reason, rate.per_s, round(rate.vmm_percent)) for rate in rates] == [
        ("io", 10.0, 25),
        ("hlt", 1.0, 75),
    ]


def test_what_did_not_happen_lately_has_no_percentiles():
    same = answer(SECOND, exits=[row(UART, [10])])
    (rate,) = exit_rates(same, same | {"uptime_ns": 2 * SECOND})
    assert (rate.per_s, rate.p50_ns, rate.p99_ns, rate.vmm_percent) == (0.0, None, None, 0.0)


def test_history_is_the_last_minutes_and_weighs_by_time():
    history = History()
    assert history.columns(3) == [None, None, None]
    history.add(0, 1, 9999.0)
    history.add(100, 110, 10.0)
    history.add(110, 120, 40.0)
    assert history.columns(6) == [None, None, None, None, 10.0, 40.0]
    assert history.columns(3) == [None, None, 25.0]
    history.add(120, 130, 0.0)
    assert history.columns(6) == [None, None, None, 10.0, 40.0, 0.0]


def test_history_forgets():
    history = History()
    for second in range(1000):
        history.add(second, second + 1, 1.0)
    assert len(history._samples) <= 62

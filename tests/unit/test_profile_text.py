"""Tables for people: what they hold, and what they do with hostile names and narrow terminals."""

import random
import re

import pytest
from profiles import sample

from hypervisor.profile.exits import ExitRow, Exits
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile, VcpuTimes
from hypervisor.profile.report import text, units
from hypervisor.profile.report.groups import by_symbol, groups


def profile_of(*rows, **more):
    return Profile(
        **{"info": {}, "wall_ns": 1_000_000, "vcpus": [VcpuTimes(0, 1, 1, 1, 1)], "exits": Exits(rows)} | more
    )


def row(name="uart0", register="LSR", symbols=None, times=(10, 20, 30), **more):
    facts = {"layer": "user", "reason": "io", "device": name, "register": register, "address": 0x3FD}
    facts |= {"direction": "in", "size": 1, "vcpu": 0, "count": len(times), "operations": len(times)}
    facts |= {"handler": Histogram.of(times), "guest": Histogram(), "symbols": symbols or {}}
    return ExitRow(**facts | more)


def cells(report, title, name):
    """Return the figures of a line of a table."""
    table = report.split(f"\n{title}")[1].split("\n\n")[0]
    line = next(line for line in table.splitlines() if line.startswith(f"  {name} "))
    return re.split(r"\s{2,}", line.removeprefix(f"  {name}").strip())


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (0, "0"),
        (0.25, "0.25 ns"),
        (1, "1.00 ns"),
        (999.4, "999 ns"),
        (999.6, "1.00 us"),
        (1950, "1.95 us"),
        (9996, "10.0 us"),
        (99_960, "100 us"),
        (12_345_678, "12.3 ms"),
        (3.6e12, "3600 s"),
        (-1950, "-1.95 us"),
    ],
)
def test_times_have_three_digits_and_a_unit(ns, shown):
    assert units.time(ns) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999_999, "999999"), (1_000_000, "1.00M"), (12.66, "12.7"), (-3, "-3"), (2.5e9, "2.50G")],
)
def test_counts_are_exact_to_six_digits(value, shown):
    assert units.count(value) == shown


@pytest.mark.parametrize(
    ("number", "ns", "shown"),
    [
        (0, 0, "0"),
        (5, 0, "0"),
        (0, 1e9, "0"),
        (981, 1e7, "98100"),
        (30, 301e9, "0.1"),
        (1, 1e12, "<0.01"),
        (99.6, 1e9, "100"),
    ],
)
def test_rates_below_a_hundred_have_two_digits(number, ns, shown):
    assert units.rate(number, ns) == shown


def test_a_line_has_count_rate_share_percentiles_and_total():
    times = [1000] * 98 + [3000, 50_000]
    report = text.render(profile_of(row(times=times)))
    found = cells(report, "Exits by device (user: counted by hv)", "uart0")
    # wall is 1 ms of one vCPU; a bucket is at most 1/16 wide, so its middle may be off by 1/32
    assert found[:3] == ["100", "100000", "15.1%"]
    assert [float(cell.split()[0]) for cell in found[3:5]] == pytest.approx([1, 1], rel=1 / 32)
    assert float(found[5].split()[0]) == pytest.approx(3, rel=1 / 32)
    assert found[6:] == ["50.0 us", "151 us"]


def test_every_table_says_who_counted():
    report = text.render(sample())
    titles = [line for line in report.splitlines() if line.startswith(("Exits", "KVM"))]
    assert len(titles) == 7
    assert all("(user: counted by hv)" in line or "(kernel: counted by KVM" in line for line in titles)
    assert cells(report, "Exits by reason (kernel: counted by KVM)", "npf")[0] == "700"
    assert cells(report, "Exits by reason (user: counted by hv)", "io")[0] == "953"


def test_the_summary_has_facts_times_marks_and_notes():
    report = text.render(sample())
    for words in (
        "Profile of debian <6.1> (hv 0.1.0, 2026-01-01 00:00:00 UTC)\n",
        "10.0 ms wall, 2 vCPUs, 256 MiB, 981 exits to hv, 98100 exits/s\n",
        "60.0%  30.0%    10.0%    92900",
        "unknown     5200",
        "2.00 ms  kernel",
        "note: in-kernel exits are not joined in",
    ):
        assert words in report


def test_a_bar_is_as_long_as_its_parts():
    vcpus = [VcpuTimes(0, 1, 500_000, 250_000, 250_000), VcpuTimes(1, 1, 0, 0, 1_000_000)]
    report = text.render(profile_of(row(), vcpus=vcpus), blocks=False)
    bars = [line.split()[1] for line in report.splitlines() if re.match(r"vcpu\d ", line)]
    assert bars == ["#" * 15 + "=" * 7 + "-" * 8, "=" * 30]


def test_kvm_counters_leave_zeros_out():
    report = text.render(profile_of(row(), kvm={"vm": {"a": 0, "b": 3}, "vcpu0": {"a": 0}, "vcpu1": {"b": 4}}))
    table = report.split("KVM's own counters")[1].splitlines()
    assert [line.split() for line in table[1:3]] == [["vm", "vcpu0", "vcpu1"], ["b", "3", "-", "4"]]
    assert "KVM's own" not in text.render(profile_of(row(), kvm={"vm": {"a": 0}}))


def test_kvm_counters_of_many_vcpus_are_added_up_instead_of_cut():
    kvm = {"vm": {"b": 3}} | {f"vcpu{index}": {"exits": 123_456_789} for index in range(64)}
    table = text.render(profile_of(row(), kvm=kvm)).split("KVM's own counters")[1]
    assert str(64 * 123_456_789) in table
    assert "all vCPUs" in table


@pytest.mark.parametrize("width", [1, 80, 100, 132, 500])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_cut(width):
    names = ["x" * 300, "short", "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 100]
    rows = [row(name=name, symbols={name: 1}, times=[987_654_321] * 3, address=i) for i, name in enumerate(names)]
    report = text.render(profile_of(*rows, wall_ns=10**9), width=width)
    lines = report.splitlines()
    from rich.cells import cell_len  # noqa: PLC0415 - only here

    assert max(map(cell_len, lines)) <= min(max(width, 80), 132)
    figures = [line for line in lines if "short" in line]
    assert len(figures) == 3
    assert all(line.endswith(("988 ms 2.96 s", "988 ms  2.96 s")) for line in figures)


def test_top_bounds_the_lines_and_says_how_many_are_left_out():
    rows = [row(name=f"dev{i}", address=i, times=[i + 1]) for i in range(25)]
    report = text.render(profile_of(*rows), top=3)
    table = report.split("Exits by device")[1].split("\n\n")[0]
    assert [line.split()[0] for line in table.splitlines()[2:5]] == ["dev24", "dev23", "dev22"]
    assert "and 22 lines more; --top 25 shows all" in table


def test_names_reach_no_terminal_as_commands():
    hostile = "\x1b[2J\x07\r\nroot\udcff[bold red]x[/]"
    report = text.render(profile_of(row(symbols={hostile: 3}), info={"kernel": hostile}, notes=[hostile]))
    assert "\x1b" not in report
    assert "\x07" not in report
    assert "[bold red]x[/]" in report
    report.encode()


def test_symbols_share_a_row_by_their_samples():
    rows = [row(symbols={"a": 3, "b": 1}, times=[100] * 400), row(symbols={"a": 1}, times=[1000] * 10, address=1)]
    found = {line.name: line for line in by_symbol(rows)}
    assert (found["a"].exits, found["a"].samples, round(found["a"].handler.total)) == (310, 4, 40_000)
    assert (found["b"].exits, found["b"].samples, round(found["b"].handler.total)) == (100, 1, 10_000)
    assert found["a"].handler.p50 == pytest.approx(100, rel=1 / 32)
    assert found["a"].handler.p99 == pytest.approx(1000, rel=1 / 32)


def test_groups_keep_layers_apart_and_sort_by_time():
    profile = sample()
    for by in ("reason", "device", "register", "symbol", "vcpu"):
        lines = groups(profile.exits, by)
        assert [line.handler.total for line in lines] == sorted((line.handler.total for line in lines), reverse=True)
    total = {line.layer: line.exits for line in groups(profile.exits, "all")}
    assert total == {"user": 981, "kernel": 700}
    assert sum(line.exits for line in groups(profile.exits, "vcpu")) == 981


def test_an_empty_profile_is_no_fault():
    empty = Profile(info={}, wall_ns=0, vcpus=[], exits=Exits([]))
    assert "0 exits" in text.render(empty)
    assert text.render(profile_of(row(times=[0, 0]), wall_ns=0))


def test_colour_only_where_it_is_asked_for():
    assert "\x1b" not in text.render(sample())
    assert "\x1b[" in text.render(sample(), colour=True)


def test_without_blocks_it_is_ascii():
    rng = random.Random(1)
    rows = [row(name="n" * rng.randrange(1, 90), address=i) for i in range(20)]
    assert text.render(profile_of(*rows, marks=[("m", 1)]), blocks=False, top=50).isascii()

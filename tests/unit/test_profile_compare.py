"""What changed between runs: figures, chance, and the text."""

import itertools
import json
import random
from math import inf
from statistics import fmean

import pytest
from profiles import sample

from hypervisor.profile.compare import compare, least_p, permutation_p, relative
from hypervisor.profile.exits import ExitRow, Exits
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile
from hypervisor.profile.report import difftext


def profile_of(*, wall_ns=1_000_000, ns_per_tick=1.0, **devices):
    """A run whose devices have these handler times, in ticks."""
    rows = [
        ExitRow(
            *("user", "io", name, "REG", 1, "in", 1, 0, len(times), len(times)),
            *(Histogram.of(times, ns_per_tick=ns_per_tick), Histogram(), {f"use_{name}": 1}),
        )
        for name, times in devices.items()
    ]
    return Profile(info={}, wall_ns=wall_ns, vcpus=[], exits=Exits(rows))


def change(comparison, by, name):
    (found,) = [change for change in comparison.by(by) if change.name == name]
    return found


def test_figures_and_their_order():
    found = compare([profile_of(a=[8] * 10, b=[15])], [profile_of(a=[8] * 20, b=[5], c=[2])])
    a = change(found, "device", "a")
    assert a.before == (10, 10_000, 8, 8, 80)
    assert a.after == (20, 20_000, 8, 8, 160)
    assert a.delta == 80
    assert [line.name for line in found.by("device")] == ["a", "b", "c"]
    c = change(found, "register", "io c REG in")
    assert (c.before.exits, c.before.total, c.after.exits) == (0, 0, 1)
    assert change(found, "all", "all exits").delta == 80 - 10 + 2
    assert change(found, "symbol", "use_b").delta == -10
    assert change(found, "reason", "io").after.exits == 22


def test_means_count_a_run_in_which_it_did_not_happen():
    found = compare([profile_of(a=[8, 8]), profile_of()], [profile_of(a=[8]), profile_of(a=[8] * 3)])
    a = change(found, "device", "a")
    assert (a.before.exits, a.before.total, a.before.p50) == (1, 8, 8)
    assert (a.after.exits, a.after.total) == (2, 16)


def test_runs_with_other_clocks_are_compared_in_nanoseconds():
    found = compare([profile_of(a=[8] * 4)], [profile_of(a=[16] * 4, ns_per_tick=0.5)])
    assert change(found, "device", "a").delta == 0


def test_layers_are_kept_apart():
    found = compare([sample()], [sample(kernel_layer=False)])
    npf = change(found, "reason", "npf")
    assert (npf.layer, npf.after.exits) == ("kernel", 0)


def plain_permutation(before, after):
    """The definition, slowly: all ways to divide the values."""
    values = [*before, *after]
    seen = fmean(after) - fmean(before)
    differ = more = ways = 0
    for chosen in itertools.combinations(range(len(values)), len(after)):
        one = [values[i] for i in chosen]
        other = [values[i] for i in range(len(values)) if i not in chosen]
        difference = fmean(one) - fmean(other)
        differ += abs(difference) >= abs(seen) - 1e-9
        more += difference >= seen - 1e-9
        ways += 1
    return differ / ways, more / ways


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (2, 2), (3, 3), (3, 5), (5, 4)])
def test_p_is_that_of_the_definition(sizes):
    rng = random.Random(5)
    for _ in range(20):
        before, after = ([rng.choice([1, 2, 5.5, 7, 100.1]) for _ in range(size)] for size in sizes)
        assert permutation_p(before, after) == pytest.approx(plain_permutation(before, after))


@pytest.mark.parametrize(
    ("sizes", "least"), [((3, 3), (0.1, 0.05)), ((4, 4), (2 / 70, 1 / 70)), ((1, 3), (0.25, 0.25))]
)
def test_the_least_p_is_what_the_clearest_difference_has(sizes, least):
    before, after = (range(base, base + size) for base, size in zip((0, 1000), sizes, strict=True))
    assert permutation_p(before, after) == pytest.approx(least)
    assert least_p(*sizes) == pytest.approx(least)


def test_equal_runs_are_no_difference():
    assert permutation_p([5.1] * 3, [5.1] * 3) == (1.0, 1.0)


def test_many_runs_are_drawn_and_never_impossible():
    before, after = [float(i) for i in range(12)], [float(i) + 100 for i in range(12)]
    differ, more = permutation_p(before, after)
    assert differ == more == least_p(12, 12)[0] > 0
    assert permutation_p(before, after) == (differ, more)
    rng = random.Random(1)
    noise = [[rng.random() for _ in range(12)] for _ in range(2)]
    assert permutation_p(*noise)[0] > 0.01


def test_chance_alone_is_rarely_significant():
    """Of runs of the same thing no more than alpha come out as grown."""
    rng = random.Random(7)
    wrong = sum(
        permutation_p([rng.random() for _ in range(4)], [rng.random() for _ in range(4)])[1] <= 0.05 for _ in range(600)
    )
    assert 0 < wrong / 600 < 0.08


def test_growth_is_told_from_chance():
    before = [sample(seed=seed) for seed in range(4)]
    slower = compare(before, [sample(seed=seed, slower=1.5) for seed in range(10, 14)])
    names = {line.name for line in slower.grown(20, floor=1)}
    assert {"uart0", "pci", "io uart0 LSR in", "io", "all exits"} <= names
    assert not slower.grown(80, floor=1)
    assert "npf" not in {line.name for line in slower.grown(0)}
    same = compare(before, [sample(seed=seed) for seed in range(20, 24)])
    assert not same.grown(20, floor=1)
    faster = compare(before, [sample(seed=seed, slower=0.5) for seed in range(10, 14)])
    assert not faster.grown(5, floor=1)


def test_growth_that_may_be_chance_does_not_count():
    before = [profile_of(a=[100]), profile_of(a=[100]), profile_of(a=[300])]
    after = [profile_of(a=[100]), profile_of(a=[110]), profile_of(a=[900])]
    found = compare(before, after)
    assert change(found, "device", "a").delta > 0
    assert not found.grown(10)
    assert found.grown(10, alpha=0.5)


def test_single_runs_have_no_p_and_everything_counts():
    found = compare([profile_of(a=[100], b=[100])], [profile_of(a=[112], b=[100])])
    assert found.least_p is None
    assert {line.p_total for line in found.changes} == {None}
    assert {line.name for line in found.grown(10) if line.by == "device"} == {"a"}
    assert not found.grown(13)


def test_more_exits_are_growth_even_when_they_take_no_longer():
    found = compare([profile_of(a=[100] * 10)], [profile_of(a=[50] * 20)])
    assert "a" in {line.name for line in found.grown(10)}


def test_of_what_kvm_counted_only_exits_count():
    """A halted vCPU sleeps in KVM's handler: more sleep is no growth, more exits are."""

    def halting(count, ticks):
        times = Histogram.of([ticks] * count)
        row = ExitRow("kernel", "hlt", None, None, None, None, None, 0, count, count, times, Histogram(), {})
        return Profile(info={}, wall_ns=1000, vcpus=[], exits=Exits([row]))

    assert not compare([halting(10, 100)], [halting(10, 10_000)]).grown(10, floor=1)
    assert compare([halting(10, 100)], [halting(20, 10)]).grown(10, floor=1)


def test_what_takes_next_to_nothing_does_not_count():
    found = compare([profile_of(a=[10_000], b=[10])], [profile_of(a=[10_000], b=[20])])
    assert {line.name for line in found.grown(10) if line.by == "device"} == {"b"}
    assert not found.grown(10, floor=1)


@pytest.mark.parametrize(("old", "new", "part"), [(0, 0, 0), (10, 15, 0.5), (10, 0, -1), (0, 1, inf)])
def test_relative(old, new, part):
    assert relative(old, new) == part


def test_json_has_absolute_and_relative_changes():
    data = json.loads(
        json.dumps(compare([profile_of(a=[8] * 10)], [profile_of(a=[8] * 15, b=[1])]).as_json(), allow_nan=False)
    )
    a = next(line for line in data["changes"] if (line["by"], line["name"]) == ("device", "a"))
    assert a["change"]["exits"] == {"absolute": 5, "relative": 0.5}
    assert a["change"]["total"] == {"absolute": 40, "relative": 0.5}
    b = next(line for line in data["changes"] if (line["by"], line["name"]) == ("device", "b"))
    assert b["change"]["exits"] == {"absolute": 1, "relative": None}
    assert data["runs"] == {"before": 1, "after": 1}
    assert data["least_p"] is None


def test_text_says_what_one_run_each_cannot_tell():
    report = difftext.render(compare([profile_of(a=[8] * 10)], [profile_of(a=[8] * 20, b=[4])]))
    assert report.startswith("one run each: no significance")
    assert "  a: handler time +80.0 ns, exits +10" in report
    block = report.split("Exits by device")[1].splitlines()[3:6]
    assert [line.split() for line in block] == [
        ["before", "10", "10000", "8.00", "ns", "8.00", "ns", "80.0", "ns"],
        ["after", "20", "20000", "8.00", "ns", "8.00", "ns", "160", "ns"],
        ["change", "+100.0%", "+100.0%", "same", "same", "+100.0%"],
    ]
    assert "new" in report


def test_text_says_which_p_can_be_had():
    report = difftext.render(
        compare([sample(seed=i) for i in range(3)], [sample(seed=i, slower=2) for i in range(4, 7)])
    )
    assert "0.1 for a difference, 0.05 for a growth" in report
    assert "pci: handler time +" in report
    assert "(p 0.1)" in report
    assert "(kernel: counted by KVM)" in report


def test_text_of_many_lines_is_cut_and_says_so():
    report = difftext.render(compare([sample()], [sample(slower=2)]), top=1)
    assert "and 3 more, which changed less; --top 4 shows all" in report
    assert len(difftext.render(compare([sample()], [sample(slower=2)]), top=99)) > len(report)


def test_colour_marks_what_is_significant():
    runs = [[sample(seed=i + base, slower=slower) for i in range(4)] for base, slower in ((0, 1), (10, 2))]
    assert "\x1b[31m" in difftext.render(compare(*runs), colour=True)
    assert "\x1b" not in difftext.render(compare(*runs))

"""Exits as a value, console lines as marks, and the clock that both stand on."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor import ConfigError, clock
from hypervisor.clock import Clock
from hypervisor.profile.exits import ExitRow, Exits, Mark
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.live import TextMarks


def row(reason="io", device="uart0", register="LSR", address=0x3FD, direction="in", **changes):
    times = changes.pop("times", [100] * changes.get("count", 1))
    facts = {"layer": "user", "size": 1, "vcpu": 0, "count": 1, "operations": len(times), "symbols": {}}
    facts |= {"handler": Histogram.of(times, ns_per_tick=0.5), "guest": Histogram.of(times, ns_per_tick=0.5)} | changes
    return ExitRow(reason=reason, device=device, register=register, address=address, direction=direction, **facts)


UNCLAIMED = {"device": None, "register": None}
NO_ACCESS = {"device": None, "register": None, "address": None, "direction": None, "size": None}
ROWS = (
    row(count=5, symbols={"poll": 3, "wait": 2}),
    row(count=2, vcpu=1, symbols={"poll": 2}),
    row(register="THR", address=0x3F8, direction="out", count=7),
    row(**UNCLAIMED, address=0x80, direction="out", count=4),
    row(**UNCLAIMED, address=None, direction="out", size=None, count=3),
    row("mmio", "virtio-blk0", "common.queue_enable", 0xE0000000, "out", size=2, count=1),
    row("hlt", **NO_ACCESS, count=9),
    row("npf", **NO_ACCESS, layer="kernel", vcpu=None, count=11, handler=Histogram.of([8] * 11), guest=Histogram()),
)
ALL = Exits(ROWS)


@pytest.mark.parametrize(
    ("some", "count"),
    [
        (ALL, 42),
        (ALL.pio(), 21),
        (ALL.pio("uart0"), 14),
        (ALL.pio("uart0", "LSR"), 7),
        (ALL.pio("uart0", "LSR", "out"), 0),
        (ALL.pio(register="THR"), 7),
        (ALL.pio(direction="in"), 7),
        (ALL.pio(0x80), 4),
        (ALL.pio(0xE0000000), 0),
        (ALL.pio("virtio-blk0"), 0),
        (ALL.mmio(), 1),
        (ALL.mmio("virtio-blk0", direction="out"), 1),
        (ALL.mmio(0xE0000000), 1),
        (ALL.reason("hlt"), 9),
        (ALL.reason("npf"), 0),
        (ALL.reason("npf", layer="kernel"), 11),
        (ALL.layer("user"), 31),
        (ALL.device("uart0"), 14),
        (ALL.vcpu(1), 2),
        (ALL.pio("uart0").vcpu(1), 2),
        (ALL.where(lambda one: one.count > 6), 27),
        (ALL.device("nobody"), 0),
    ],
)
def test_filters(some, count):
    assert some.count == count
    assert sum(one.count for one in some) == count
    assert len(some) == len(some.rows)


def test_sums():
    uart = ALL.pio("uart0", "LSR")
    assert uart.operations == 7
    assert uart.latency.count == 7
    assert uart.latency.total == 7 * 100 * 0.5
    assert uart.symbols == {"poll": 5, "wait": 2}
    assert list(uart.symbols) == ["poll", "wait"]
    assert ALL.guest.total == 31 * 100 * 0.5  # the kernel's layer has other ticks, and here no times
    assert ALL.latency.total == 31 * 100 * 0.5 + 88


def test_merged_adds_vcpus_up_most_exits_first():
    merged = ALL.merged()
    assert [one.count for one in merged] == [11, 9, 7, 7, 4, 3, 1]
    lsr = merged.pio("uart0", "LSR").rows[0]
    assert (lsr.vcpu, lsr.count, lsr.handler.count, lsr.symbols) == (None, 7, 7, {"poll": 5, "wait": 2})
    assert merged.pio("uart0", "THR").rows[0].vcpu == 0
    assert merged.merged().count == ALL.count


def test_top_and_repr():
    assert [one.count for one in ALL.top(3)] == [11, 9, 7]
    assert repr(ALL.layer("user")) == "<Exits: 31 : 9 hlt, 7 io uart0 LSR in, 7 io uart0 THR out>"
    assert repr(Exits([])) == "<Exits: 0>"
    assert [one.name for one in ROWS[3:6]] == [
        "io 0x80 out",
        "io elsewhere out",
        "mmio virtio-blk0 common.queue_enable out",
    ]


def test_as_json_has_what_was_counted():
    facts = ROWS[0].as_json()
    assert (facts["reason"], facts["device"], facts["register"], facts["address"]) == ("io", "uart0", "LSR", 0x3FD)
    assert (facts["count"], facts["operations"], facts["handler_ns"]["max"]) == (5, 5, 50)
    assert facts["symbols"] == [{"name": "poll", "count": 3}, {"name": "wait", "count": 2}]


# --- marks ------------------------------------------------------------------------------------------------------------


def at(*counts):
    """Return the rows when so many exits of three kinds had come."""
    kinds = (row, lambda **facts: row(vcpu=1, **facts), lambda **facts: row("hlt", **NO_ACCESS, **facts))
    return [make(count=count) for make, count in zip(kinds, counts, strict=True) if count]


def phases():
    marks = [("a", (1, 0, 0)), ("b", (3, 2, 0)), ("a", (3, 2, 5)), ("c", (4, 4, 5))]
    return Exits(
        at(10, 4, 6), marks=[Mark(name, 1000 * n, lambda c=counts: at(*c)) for n, (name, counts) in enumerate(marks)]
    )


@pytest.mark.parametrize(
    ("first", "last", "lsr0", "lsr1", "halts"),
    [
        (None, None, 10, 4, 6),
        (None, "a", 1, 0, 0),
        ("a", "b", 2, 2, 0),
        ("a", "a", 2, 2, 5),
        ("b", "a", 0, 0, 5),
        ("b", "c", 1, 2, 5),
        ("c", None, 6, 0, 1),
        ("a", None, 9, 4, 6),
    ],
)
def test_between_marks(first, last, lsr0, lsr1, halts):
    phase = phases().between(first, last)
    assert phase.pio().vcpu(0).count == lsr0
    assert phase.pio().vcpu(1).count == lsr1
    assert phase.reason("hlt").count == halts
    assert phase.latency.count == phase.count == lsr0 + lsr1 + halts
    assert phase.latency.total == phase.count * 50


def test_filters_and_phases_go_in_any_order():
    assert phases().pio().vcpu(1).between("a", "b").count == phases().between("a", "b").pio().vcpu(1).count == 2
    assert phases().reason("hlt").between("b", "a").count == 5


def test_what_came_after_an_older_value_with_the_marks_made_since():
    earlier = Exits(at(3, 2, 0), marks=phases()._marks[:2])
    later = phases().since(earlier)
    assert (later.pio().vcpu(0).count, later.pio().vcpu(1).count, later.reason("hlt").count) == (7, 2, 6)
    assert later.marks == ("a", "c")
    assert later.between("a", "c").count == 1 + 2
    assert later.between(None, "a").reason("hlt").count == 5
    assert later.latency.total == later.count * 50
    assert phases().since(phases()).count == 0


def test_marks_that_are_not_there():
    with pytest.raises(KeyError, match=r"no mark 'z'; there are: a, b, c"):
        phases().between("z")
    with pytest.raises(KeyError, match=r"no mark 'b' after the first; there are: a, b, c"):
        phases().between("c", "b")
    with pytest.raises(KeyError, match="there are: none"):
        ALL.between("a")
    assert phases().marks == ("a", "b", "a", "c")


# --- marks by text ----------------------------------------------------------------------------------------------------


def marks_of(pattern, pieces):
    names = []
    marks = TextMarks(pattern, names.append)
    for piece in pieces:
        marks.take(piece)
    return names


BOOT = b"Booting\r\nRun /init as init process\r\nRun twice Run\r\nshell # "


@given(st.lists(st.integers(0, len(BOOT)), max_size=8))
def test_marks_do_not_depend_on_how_output_arrives(cuts):
    edges = sorted({0, len(BOOT), *cuts})
    pieces = [BOOT[a:b] for a, b in pairwise(edges)]
    assert marks_of(r"Run (\S+)", pieces) == ["/init", "twice"]
    assert marks_of("Run", pieces) == ["Run", "Run"]
    assert marks_of(r"Run .*", pieces) == ["Run /init as init process", "Run twice Run"]
    assert marks_of(r"process$", pieces) == ["process"]


def test_a_prompt_is_marked_before_its_line_ends():
    assert marks_of("shell # ", [BOOT]) == ["shell # "]
    assert marks_of(r"\w+ #", [BOOT]) == ["shell #"]


def test_a_line_without_end_is_looked_at_once_and_takes_no_memory():
    names = []
    marks = TextMarks("needle", names.append)
    for _ in range(1000):
        marks.take(b"x" * 1000)
        assert len(marks._line) <= 5096
    marks.take(b"needle\nneedle\n")
    assert names == ["needle"]


def test_bytes_that_are_no_text_have_a_name_all_the_same():
    assert marks_of(r"a(.+)b", [b"a\xff\xc3\xa9b\n"]) == ["\\xff\u00e9"]


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{99999999999999999999}", "(?P<", "\\"])
def test_what_is_no_pattern_is_the_users_mistake(pattern):
    with pytest.raises(ConfigError, match=re.escape(repr(pattern))):
        TextMarks(pattern, bool)


# --- the clock --------------------------------------------------------------------------------------------------------


def test_the_clock_believes_kvm_first_then_measures_and_stops(monkeypatch):
    now = {"ns": 5_000, "tick": 100}
    monkeypatch.setattr(clock.time, "monotonic_ns", lambda: now["ns"])
    monkeypatch.setattr(clock, "tick", lambda: now["tick"])
    made = Clock(2_000_000)
    now |= {"ns": 15_000, "tick": 30_100}
    assert (made.now_ns(), made.ns_per_tick) == (10_000, 0.5)
    now |= {"ns": 1_000_005_000, "tick": 4_000_000_100}
    assert (made.now_ns(), made.ns_per_tick) == (1_000_000_000, 0.25)
    made.stop()
    now |= {"ns": 9_000_005_000, "tick": 4_000_000_200}
    assert (made.now_ns(), made.ns_per_tick) == (1_000_000_000, 0.25)


def test_a_clock_without_kvms_word_measures_from_the_first_moment(monkeypatch):
    now = {"ns": 0, "tick": 100}
    monkeypatch.setattr(clock.time, "monotonic_ns", lambda: now["ns"])
    monkeypatch.setattr(clock, "tick", lambda: now["tick"])
    made = Clock(0)
    assert made.ns_per_tick == 1.0
    now |= {"ns": 100, "tick": 300}
    assert made.ns_per_tick == 0.5

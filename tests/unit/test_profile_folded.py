"""Folded stacks and JSON, read back as other tools read them."""

import json

import pytest
from profiles import sample

from hypervisor.profile.exits import ExitRow, Exits
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile
from hypervisor.profile.report import folded, jsonform


def read(report):
    """Read as flame graph tools do: frames parted by ';', then a space and an integer."""
    stacks = {}
    for line in report.splitlines():
        frames, _, value = line.rpartition(" ")
        assert frames not in stacks
        stacks[tuple(frames.split(";"))] = int(value)
    return stacks


def test_stacks_add_up_to_the_exits():
    profile = sample()
    stacks = read(folded.render(profile, weight="count"))
    assert sum(stacks.values()) == 981
    assert sum(value for frames, value in stacks.items() if frames[:4] == ("vcpu0", "io", "uart0", "LSR")) == 400
    assert read(folded.render(profile, weight="count", layer="kernel")) == {("npf",): 700}
    assert stacks["vcpu0", "io", "open bus 0x2f9", "autoconfig"] == 3
    assert ("vcpu0", "hlt", "native_safe_halt") in stacks


def test_time_is_the_default_weight_and_adds_up():
    profile = sample()
    stacks = read(folded.render(profile))
    total = sum(row.handler.total for row in profile.exits.layer("user"))
    assert sum(stacks.values()) == pytest.approx(total, abs=len(profile.exits))


def test_what_sums_of_rounded_parts_would_lose_is_kept():
    row = ExitRow(
        *("user", "io", "d", "r", 1, "in", 1, 0, 100, 100),
        Histogram.of([1] * 100),
        Histogram(),
        dict.fromkeys("abc", 1),
    )
    profile = Profile(info={}, wall_ns=1, vcpus=[], exits=Exits([row]))
    assert sorted(read(folded.render(profile, weight="count")).values()) == [33, 33, 34]


@pytest.mark.parametrize("name", ["a;b", "a\nb", "a\r\n;;b", "", " ", "x 1", "\udcff", "\x1b[2J"])
def test_no_name_breaks_the_format(name):
    row = ExitRow(
        *("user", "io", f"uart{name}", name, 1, "in", 1, 0, 7, 7), Histogram.of([5] * 7), Histogram(), {name: 7}
    )
    report = folded.render(Profile(info={}, wall_ns=1, vcpus=[], exits=Exits([row])), weight="count")
    report.encode()
    ((frames, value),) = read(report).items()
    assert value == 7
    assert 4 <= len(frames) <= 5
    assert all(frames)


def test_json_is_the_profile():
    profile = sample()
    assert json.loads(jsonform.render(profile)) == json.loads(json.dumps(profile.as_json()))

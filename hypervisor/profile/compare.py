"""What changed between two runs, or between two sets of runs of the same thing."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import comb, inf
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.profile.report.groups import USER, groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hypervisor.profile.model import Profile
    from hypervisor.profile.report.groups import Group

__all__ = ["ALPHA", "BY", "Change", "Comparison", "Figures", "compare", "least_p", "permutation_p"]

BY: Final = ("reason", "device", "register", "symbol")
ALPHA: Final = 0.05
MOST_EXACT: Final = 20_000
"""Ways to divide the runs that are all tried (8 runs and 8); of more than these, as many are drawn."""
SEED: Final = 1


class Figures(NamedTuple):
    """One line of one set of runs: means over the runs.

    Attributes:
        exits: how many.
        rate: how many a second.
        p50, p99: of the handler times, in nanoseconds; of the runs in which it happened.
        total: handler time, in nanoseconds.
    """

    exits: float
    rate: float
    p50: float
    p99: float
    total: float


class Change(NamedTuple):
    """What became of exits that have a name in common.

    Attributes:
        by: what they have in common: "reason", "device", "register", "symbol"; "all" for the sum.
        layer: who counted them: "user" (hv) or "kernel" (KVM).
        name: the name.
        before, after: means over the runs of each set.
        p_total, p_exits: how likely the runs, divided by chance, differ as much in handler time and in exits, one way
            or the other; None with one run each.
        p_more_total, p_more_exits: how likely they have, divided by chance, grown as much.
    """

    by: str
    layer: str
    name: str
    before: Figures
    after: Figures
    p_total: float | None
    p_exits: float | None
    p_more_total: float | None
    p_more_exits: float | None

    @property
    def delta(self) -> float:
        """How much handler time came to it, in nanoseconds."""
        return self.after.total - self.before.total

    @property
    def size(self) -> float:
        """What it is now, as far as a growth of it matters: handler time; of what KVM counted, exits."""
        return self.after.total if self.layer == USER else self.after.exits

    def grown(self, percent: float, *, alpha: float = ALPHA) -> bool:
        """Say whether exits or their handler time grew by more than this, and not by chance where that can be told.

        Of what KVM counted only the exits count: its times have a halted vCPU's sleep in them.
        """
        pairs = [(self.before.exits, self.after.exits, self.p_more_exits)]
        if self.layer == USER:
            pairs.append((self.before.total, self.after.total, self.p_more_total))
        return any(relative(old, new) > percent / 100 and (p is None or p <= alpha) for old, new, p in pairs)

    def as_json(self) -> dict[str, Any]:
        """Return it as the comparison's JSON has it."""
        changes = {}
        for name, old, new in zip(Figures._fields, self.before, self.after, strict=True):
            part = relative(old, new)
            changes[name] = {"absolute": new - old, "relative": None if part == inf else part}
        return {
            **{name: getattr(self, name) for name in ("by", "layer", "name")},
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "change": changes,
            **{name: getattr(self, name) for name in ("p_total", "p_exits", "p_more_total", "p_more_exits")},
        }


class Comparison(NamedTuple):
    """All changes.

    Attributes:
        runs: how many runs there are before and after.
        wall: how long they took, in nanoseconds: means.
        changes: by name, those first that changed most in handler time.
        least_p: the least that p of a difference can be with so many runs; None with one run each.
        least_p_more: the same for p of a growth.
    """

    runs: tuple[int, int]
    wall: tuple[float, float]
    changes: list[Change]
    least_p: float | None
    least_p_more: float | None

    def by(self, name: str) -> list[Change]:
        """Return one table's changes."""
        return [change for change in self.changes if change.by == name]

    def grown(self, percent: float, *, floor: float = 0.0, alpha: float = ALPHA) -> list[Change]:
        """Return what grew by more than `percent`.

        What takes less than `floor` percent of all handler time (in KVM: of all exits) does not count.
        """
        everything = {change.layer: change.size for change in self.by("all")}
        return [
            change
            for change in self.changes
            if change.size >= everything[change.layer] * floor / 100 and change.grown(percent, alpha=alpha)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the stable form that programs read; times are in nanoseconds."""
        return {
            "version": 1,
            "runs": {"before": self.runs[0], "after": self.runs[1]},
            "wall_ns": {"before": self.wall[0], "after": self.wall[1]},
            "least_p": self.least_p,
            "least_p_more": self.least_p_more,
            "changes": [change.as_json() for change in self.changes],
        }


def relative(old: float, new: float) -> float:
    """Return how much came to `old`, as a part of it; infinite if there was nothing."""
    if new == old:
        return 0.0
    return (new - old) / old if old else inf


def compare(before: Sequence[Profile], after: Sequence[Profile]) -> Comparison:
    """Compare two sets of runs.

    Whether a difference could be chance is told by a permutation test on the runs' own values (their exits, their
    handler times): of all ways to divide the runs into two sets of these sizes, in how many do the means differ as
    much? It supposes only that runs do not depend on each other. Each line is tested by itself.
    """
    many = len(before) + len(after) > 2
    changes = []
    for by in ("all", *BY):
        tables = [_table(profile, by) for profile in (*before, *after)]
        for layer, name in dict.fromkeys(key for table in tables for key in table):
            lines = [table.get((layer, name)) for table in tables]
            tests: list[float | None] = [None] * 4
            if many:
                totals = [line.handler.total if line else 0.0 for line in lines]
                counts = [float(line.exits) if line else 0.0 for line in lines]
                (p_total, more_total), (p_exits, more_exits) = (
                    permutation_p(values[: len(before)], values[len(before) :]) for values in (totals, counts)
                )
                tests = [p_total, p_exits, more_total, more_exits]
            old = _figures(lines[: len(before)], before)
            new = _figures(lines[len(before) :], after)
            changes.append(Change(by, layer, name, old, new, *tests))
    changes.sort(key=lambda change: -abs(change.delta))
    wall = (fmean(profile.wall_ns for profile in before), fmean(profile.wall_ns for profile in after))
    least = least_p(len(before), len(after)) if many else (None, None)
    return Comparison((len(before), len(after)), wall, changes, *least)


def _table(profile: Profile, by: str) -> dict[tuple[str, str], Group]:
    return {(line.layer, line.name): line for line in groups(profile.exits, by)}


def _figures(lines: Sequence[Group | None], runs: Sequence[Profile]) -> Figures:
    """Return a line's means over the runs of one set; a run in which it did not happen counts as none."""
    there = [line for line in lines if line]
    if not there:
        return Figures(0.0, 0.0, 0.0, 0.0, 0.0)
    pairs = zip(lines, runs, strict=True)
    return Figures(
        exits=sum(line.exits for line in there) / len(runs),
        rate=sum(line.exits * 1e9 / run.wall_ns for line, run in pairs if line and run.wall_ns) / len(runs),
        p50=fmean(line.handler.p50 for line in there),
        p99=fmean(line.handler.p99 for line in there),
        total=sum(line.handler.total for line in there) / len(runs),
    )


def least_p(before: int, after: int) -> tuple[float, float]:
    """Return the least that p can be with so many runs: of a difference one way or the other, and of a growth."""
    ways = comb(before + after, before)
    if ways > MOST_EXACT:
        return 1 / (MOST_EXACT + 1), 1 / (MOST_EXACT + 1)
    return (2 if before == after else 1) / ways, 1 / ways


def permutation_p(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return how likely it is that the means differ as much as they do, and that `after` is as much larger, by chance.

    Exact for up to MOST_EXACT ways to divide the values; of more, that many are drawn, the same ones every time.
    """
    import numpy as np  # noqa: PLC0415 - single runs do without

    values = np.array([*before, *after])
    ways = _ways(len(values), len(after))
    sums = values[ways].sum(axis=1)
    expected = values.mean() * len(after)
    seen = sum(after) - expected
    slack = 1e-9 * max(float(np.abs(values).sum()), 1.0)  # sums of the same values in another order are the same
    differ = int((np.abs(sums - expected) >= abs(seen) - slack).sum())
    more = int((sums - expected >= seen - slack).sum())
    drawn = len(ways) < comb(len(values), len(after))  # what was seen is one more way, and none is impossible
    return (differ + drawn) / (len(ways) + drawn), (more + drawn) / (len(ways) + drawn)


@cache
def _ways(number: int, size: int) -> NDArray[np.int64]:
    """Return ways to choose `size` of `number` values, a row of indices each."""
    import numpy as np  # noqa: PLC0415 - as above

    if comb(number, size) <= MOST_EXACT:
        return np.array(list(combinations(range(number), size)), np.int64)
    rng = np.random.default_rng(SEED)
    return np.array([rng.permutation(number)[:size] for _ in range(MOST_EXACT)], np.int64)

"""A comparison of runs as text."""

from __future__ import annotations

import io
from math import inf
from typing import TYPE_CHECKING, Final

from hypervisor.profile.compare import ALPHA, BY, relative
from hypervisor.profile.report import units
from hypervisor.profile.report.groups import KERNEL, LAYERS, USER
from hypervisor.profile.report.text import TABLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.text import Text

    from hypervisor.profile.compare import Change, Comparison, Figures

__all__ = ["render"]

HEAD: Final = ("exits", "exits/s", "p50", "p99", "total")


def render(comparison: Comparison, *, top: int = 5, width: int = 100, colour: bool = False) -> str:
    """Return what changed, most handler time first, `top` lines of each kind.

    Growth that is not chance (p of 5% at most) is marked by an asterisk, and on a terminal by a colour.
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        emoji=False,
        _environ={},
    )
    for line in _lines(comparison, top):
        console.print(line, soft_wrap=True)
    return out.getvalue()


def _lines(comparison: Comparison, top: int) -> Iterator[Text]:
    from rich.text import Text

    yield Text(significance(comparison))
    wall = " -> ".join(units.time(ns) for ns in comparison.wall)
    yield Text(f"wall time: {wall} ({part(*comparison.wall)})")
    for by in ("all", *BY):
        for layer in (USER, KERNEL):
            changes = [change for change in comparison.by(by) if change.layer == layer]
            if not changes:
                continue
            yield Text()
            title = "All exits" if by == "all" else f"Exits {TABLES[by]}"
            yield Text(f"{title} ({LAYERS[layer]})", style="bold")
            yield from _table(changes[:top])
            if len(changes) > top:
                yield Text(f"  and {len(changes) - top} more, which changed less; --top {len(changes)} shows all")


def significance(comparison: Comparison) -> str:
    """Say what the number of runs allows to tell."""
    before, after = comparison.runs
    if comparison.least_p is None or comparison.least_p_more is None:
        return "one run each: no significance; give more runs by --before and --after to tell change from chance"
    return (
        f"{before} and {after} runs: means, and p by a permutation test of each line for itself; * is p <= {ALPHA:g}\n"
        f"the least p that so many can have: {comparison.least_p:.2g} for a difference, "
        f"{comparison.least_p_more:.2g} for a growth (--fail-over)"
    )


def _table(changes: list[Change]) -> Iterator[Text]:
    from rich.text import Text

    yield Text(f"    {'':6} " + " ".join(f"{title:>9}" for title in HEAD), style="dim")
    for change in changes:
        exits = _signed(round(change.after.exits - change.before.exits, 1), units.count)
        yield Text(
            f"  {units.plain(change.name)}: handler time {_signed(change.delta, units.time)}{_p(change.p_total)}, "
            f"exits {exits}{_p(change.p_exits)}",
            style=_style(change),
        )
        yield Text(f"    before {_cells(change.before)}")
        yield Text(f"    after  {_cells(change.after)}")
        parts = (f"{part(old, new):>9}" for old, new in zip(change.before, change.after, strict=True))
        yield Text(f"    change {' '.join(parts)}")


def _style(change: Change) -> str:
    if change.p_total is None or change.p_total > ALPHA:
        return ""
    return "red" if change.delta > 0 else "green"


def _cells(figures: Figures) -> str:
    exits, rate, p50, p99, total = figures
    cells = (units.count(round(exits, 1)), units.rate(rate, 1e9), *map(units.time, (p50, p99, total)))
    return " ".join(f"{cell:>9}" for cell in cells)


def _signed(value: float, form: Callable[[float], str]) -> str:
    return f"{'+' if value > 0 else ''}{form(value)}" if value else "unchanged"


def _p(p: float | None) -> str:
    return "" if p is None else f" (p {p:.2g}{'*' if p <= ALPHA else ''})"


def part(old: float, new: float) -> str:
    """Return a relative change: "+12.3%", "new" and "gone"."""
    change = relative(old, new)
    if change == inf:
        return "new"
    return "gone" if new == 0 and old else f"{100 * change:+.1f}%" if change else "same"

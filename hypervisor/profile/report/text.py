"""A profile as tables on a terminal or in a file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

from hypervisor.profile.report import units
from hypervisor.profile.report.groups import KERNEL, KERNEL_TIMES, LAYERS, USER, groups

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, RenderableType
    from rich.table import Table

    from hypervisor.profile.model import Profile, VcpuTimes
    from hypervisor.profile.report.groups import Group

__all__ = ["NARROWEST", "print_report", "render"]

TABLES: Final = {
    "reason": "by reason",
    "device": "by device",
    "register": "by register",
    "symbol": "by guest symbol",
    "vcpu": "by vCPU",
}
COLUMNS: Final = ("exits", "exits/s", "share", "p50", "p90", "p99", "max", "total")
NARROWEST: Final = 80
WIDEST: Final = 132
BAR: Final = 30


def render(profile: Profile, *, top: int = 10, width: int = 100, colour: bool = False, blocks: bool = True) -> str:
    """Return the report.

    Args:
        profile: what to tell.
        top: how many lines a table has at most.
        width: columns to fit into; at least 80 are used.
        colour: with terminal colours.
        blocks: bars are of block characters; else plain ASCII, as all else but names is.
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out,
        width=min(max(width, NARROWEST), WIDEST),
        force_terminal=colour,
        color_system="standard" if colour else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
        _environ={},
    )
    print_report(console, profile, top=top, blocks=blocks)
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


def print_report(console: Console, profile: Profile, *, top: int = 10, blocks: bool = True) -> None:
    """Print the report on a console of rich's."""
    for part in _summary(profile, blocks=blocks):
        console.print(part, soft_wrap=False)
    for by, title in TABLES.items():
        lines = groups(profile.exits, by)
        for layer in (USER, KERNEL):
            mine = [line for line in lines if line.layer == layer]
            if mine:
                console.print()
                console.print(f"Exits {title} ({LAYERS[layer]})", style="bold")
                console.print(_table(profile, mine, top, console.width, blocks=blocks))
                if layer == KERNEL:
                    console.print(f"  {KERNEL_TIMES}", style="dim")
                if by == "symbol":
                    samples = sum(line.samples for line in mine)
                    console.print(f"  estimated from {units.count(samples)} sampled exits", style="dim")
    if any(value for values in profile.kvm.values() for value in values.values()):
        console.print()
        console.print("KVM's own counters (kernel: counted by KVM; zeros are left out)", style="bold")
        console.print(_counters(profile, console.width))


def _summary(profile: Profile, *, blocks: bool) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text(_title(profile), style="bold")
    exits = sum(vcpu.exits for vcpu in profile.vcpus)
    ram = f", {profile.info['ram_mib']} MiB" if "ram_mib" in profile.info else ""
    yield Text(
        f"{units.time(profile.wall_ns)} wall, {_of(len(profile.vcpus), 'vCPU')}{units.plain(ram)}, "
        f"{units.count(exits)} exits to hv, {units.rate(exits, profile.wall_ns)} exits/s"
    )
    yield Text()
    yield _vcpu_times(profile, blocks=blocks)
    if profile.marks:
        yield Text()
        yield Text("Marks", style="bold")
        yield _marks(profile)
    for note in profile.notes:
        yield Text(f"note: {units.plain(note)}", style="yellow")


def _title(profile: Profile) -> str:
    """Return what was run, when, by which hv, and how it ended."""
    known = {key: units.plain(str(value)) for key, value in profile.info.items() if value is not None}
    made = [f"hv {known['hv']}"] if "hv" in known else []
    if "created" in known:
        made.append(known["created"].replace("T", " ").replace("+00:00", " UTC"))
    title = f"Profile of {known['kernel']}" if "kernel" in known else "Profile"
    title += f" ({', '.join(made)})" if made else ""
    return title + (f": {known['outcome']}" if "outcome" in known else "")


def _of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _grid(*right: bool) -> Table:
    from rich.table import Table

    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for is_right in right:
        grid.add_column(justify="right" if is_right else "left", no_wrap=True, overflow="ellipsis")
    return grid


def _marks(profile: Profile) -> Table:
    from rich.text import Text

    grid = _grid(True, False)
    for name, at_ns in profile.marks:
        grid.add_row("  " + units.time(at_ns), Text(units.plain(name)))
    return grid


def _vcpu_times(profile: Profile, *, blocks: bool) -> Table:
    """Make a line for each vCPU: where its time went, as a bar and in figures."""
    grid = _grid(False, False, True, True, True, True)
    grid.add_row("", _legend(blocks=blocks), "guest", "hv", "halted", "exits/s")
    for vcpu in profile.vcpus:
        whole = max(profile.wall_ns, vcpu.guest_ns + vcpu.handler_ns + (vcpu.halted_ns or 0))
        grid.add_row(
            f"vcpu{vcpu.index}",
            _bar(vcpu, whole, blocks=blocks),
            units.percent(vcpu.guest_ns, whole),
            units.percent(vcpu.handler_ns, whole),
            "unknown" if vcpu.halted_ns is None else units.percent(vcpu.halted_ns, whole),
            units.rate(vcpu.exits, profile.wall_ns),
        )
    return grid


_SIGNS: Final = {True: "█▓░·", False: "#=-."}
_STYLES: Final = ("green", "red", "blue", "dim")


def _legend(*, blocks: bool) -> RenderableType:
    from rich.text import Text

    legend = Text()
    for sign, style, word in zip(_SIGNS[blocks], _STYLES, ("guest", "hv", "halted"), strict=False):
        legend.append(sign, style=style).append(f" {word}  ")
    return legend


def _bar(vcpu: VcpuTimes, whole: float, *, blocks: bool) -> RenderableType:
    """Draw guest, handlers, halted, and the rest: rounded so that the whole has the bar's length."""
    from rich.text import Text

    bar = Text()
    done = 0.0
    drawn = 0
    parts = (vcpu.guest_ns, vcpu.handler_ns, vcpu.halted_ns or 0, whole)
    for part, sign, style in zip(parts, _SIGNS[blocks], _STYLES, strict=True):
        done += part
        end = min(round(BAR * done / whole), BAR) if whole else BAR
        bar.append(sign * (end - drawn), style=style)
        drawn = end
    return bar


def _table(profile: Profile, lines: Sequence[Group], top: int, width: int, *, blocks: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    shown, rest = lines[:top], lines[top:]
    available = profile.wall_ns * max(len(profile.vcpus), 1)
    gap = 2 if width > NARROWEST else 1
    table = Table(box=None, padding=(0, 0, 0, gap), pad_edge=False, header_style="dim")
    figures = [_figures(line, profile.wall_ns, available) for line in shown]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *figures, strict=True)]
    room = max(width - sum(widths) - gap * len(widths) - 1, 1)
    names = [Text(f"  {units.plain(line.name)}") for line in shown]
    needed = max(name.cell_len for name in names)
    table.add_column("", no_wrap=True, overflow="ellipsis" if blocks else "crop", width=min(needed, room))
    for title, needed in zip(COLUMNS, widths, strict=True):
        table.add_column(title, justify="right", no_wrap=True, min_width=needed)
    for name, cells in zip(names, figures, strict=True):
        table.add_row(name, *cells)
    if rest:
        table.caption = f"  and {_of(len(rest), 'line')} more; --top {len(lines)} shows all"
        table.caption_justify = "left"
    return table


def _figures(line: Group, wall_ns: float, available_ns: float) -> list[str]:
    """Return a line's cells, in the order of COLUMNS."""
    handler = line.handler
    times = (handler.p50, handler.p90, handler.p99, handler.max, handler.total)
    share = units.percent(handler.total, available_ns)
    return [units.count(line.exits), units.rate(line.exits, wall_ns), share, *map(units.time, times)]


def _counters(profile: Profile, width: int) -> Table:
    """Make a column for the VM and for each vCPU; where those are too many for the width, for all vCPUs together."""
    columns = profile.kvm
    if 34 + 12 * len(columns) > width:
        together: dict[str, dict[str, int]] = {}
        for owner, values in profile.kvm.items():
            column = together.setdefault("all vCPUs" if owner.startswith("vcpu") else owner, {})
            for name, value in values.items():
                column[name] = column.get(name, 0) + value
        columns = together
    from rich.text import Text

    names = {name for values in columns.values() for name, value in values.items() if value}
    grid = _grid(False, *[True] * len(columns))
    grid.add_row("", *map(units.plain, columns))
    for name in sorted(names):
        cells = (values.get(name, 0) for values in columns.values())
        grid.add_row(Text(f"  {units.plain(name)}"), *(str(value) if value else "-" for value in cells))
    return grid

"""What `hv top` shows: its state in, lines out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from hypervisor.cli.columns import Column, fit, line, sparkline, title
from hypervisor.profile.rates import History
from hypervisor.profile.report import units

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hypervisor.profile.rates import ExitRate, MachineRates

__all__ = ["EXITS", "MACHINES", "MachineState", "Table", "View", "draw", "exit_cells", "machine_cells", "sorted_rows"]

MACHINES: Final = (
    Column("name", "MACHINE", 11, 48, 0, is_right=False, sort_name="name", is_number=False),
    Column("kernel", "KERNEL", 6, 24, 9, is_right=False, sort_name="kernel", is_number=False),
    Column("pid", "PID", 7, 7, 5, sort_name="pid", is_number=False),
    Column("uptime", "UPTIME", 7, 9, 4, sort_name="uptime"),
    Column("cpus", "CPUS", 4, 4, 8, sort_name="vCPUs"),
    Column("per_s", "EXITS/S", 8, 8, 1, sort_name="exits/s"),
    Column("guest", "GUEST", 5, 5, 3, sort_name="guest"),
    Column("vmm", "VMM", 4, 4, 2, sort_name="VMM"),
    Column("halted", "HALT", 4, 4, 6, sort_name="halted"),
    Column("spark", "LAST MINUTE", 11, 60, 7, is_right=False),
)
EXITS: Final = (
    Column("reason", "REASON", 6, 16, 1, is_right=False, sort_name="reason", is_number=False),
    Column("device", "DEVICE", 10, 20, 0, is_right=False, sort_name="device", is_number=False),
    Column("register", "REGISTER", 8, 28, 2, is_right=False, sort_name="register", is_number=False),
    Column("direction", "DIR", 5, 5, 6, is_right=False, sort_name="direction", is_number=False),
    Column("per_s", "EXITS/S", 7, 7, 0, sort_name="exits/s"),
    Column("p50", "P50", 7, 7, 5, sort_name="p50"),
    Column("p99", "P99", 7, 7, 4, sort_name="p99"),
    Column("share", "% VMM", 5, 5, 3, sort_name="share of VMM time"),
    Column("count", "TOTAL", 7, 7, 8, sort_name="total"),
    Column("spark", "MINUTE", 6, 60, 7, is_right=False),
)
HELP: Final = """\
 up, down, page up, page down   select a row
 Enter   the selected machine's exits        Esc   back to all machines
 s       sort by the next column             r     the other way round
 ?       this help                           q     quit

 EXITS/S   exits to hv a second, in the last interval
 VMM       of the vCPUs' time, how much they were in hv's handlers
 HALT      how much they were halted, as KVM counts it; - where it does not
 GUEST     the rest: in the guest, and in KVM for it (and halted, where
           that is not known)
 DIR       in: the guest reads; out: it writes; bytes of an access
 P50, P99  times from an exit to the next entry, in the last interval
 % VMM     of the time in hv's handlers, how much was for these exits
 LAST MINUTE, MINUTE   exits a second; each line to its own largest"""
SLOW: Final = 50.0
BUSY: Final = 20.0


@dataclass(slots=True)
class MachineState:
    """What is known of a machine.

    Attributes:
        rates: lately; None until there were two answers.
        exits: the same by kind of exit, as far as that was asked for.
        history, exit_histories: of the last minute; those of exits by `ExitRate.key`.
        trouble: why there is nothing new, in a word or two; empty when there is.
    """

    rates: MachineRates | None = None
    exits: list[ExitRate] | None = None
    history: History = field(default_factory=History)
    exit_histories: dict[tuple[Any, ...], History] = field(default_factory=dict)
    trouble: str = ""


@dataclass(slots=True)
class Table:
    """How a table is looked at: what it is sorted by, and which row is selected (None: the first one)."""

    sort: str = "per_s"
    is_reversed: bool = False
    selected: Any = None


@dataclass(slots=True)
class View:
    """What is looked at.

    Attributes:
        machine: whose exits; None: all machines.
        machines, exits: the two tables.
        shows_help: whether help covers them.
        interval: seconds.
        clock: the time of day.
        ascii_only: whether the terminal knows nothing else.
    """

    machine: str | None = None
    machines: Table = field(default_factory=Table)
    exits: Table = field(default_factory=Table)
    shows_help: bool = False
    interval: float = 1.0
    clock: str = ""
    ascii_only: bool = False

    @property
    def table(self) -> tuple[Table, Sequence[Column]]:
        """The table that is looked at, and its columns."""
        return (self.machines, MACHINES) if self.machine is None else (self.exits, EXITS)


# --- cells ------------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """Return a share in at most four cells."""
    if value is None:
        return "-"
    if value >= 9.95 or value == 0:
        return f"{value:.0f}%"
    return f"{value:.1f}%" if value >= 0.05 else "<.1%"


def uptime(ns: int) -> str:
    """Return a time such as 0:07, 12:00, 1:02:03 or 3d04h."""
    minutes, seconds = divmod(ns // 1_000_000_000, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rate(value: float) -> str:
    """Return a number of times a second."""
    return units.count(round(value, 1) if value < 100 else round(value))


def machine_cells(name: str, state: MachineState) -> dict[str, str]:
    """Return what the table of machines says of one."""
    rates = state.rates
    if rates is None:
        return {"name": name, "kernel": "", "per_s": state.trouble or "..."}
    cells = {
        "name": name,
        "kernel": units.plain(rates.kernel) or "-",
        "pid": str(rates.pid),
        "uptime": uptime(rates.uptime_ns),
        "cpus": str(rates.cpus),
    }
    if state.trouble:
        return cells | {"per_s": state.trouble}
    return cells | {
        "per_s": rate(rates.exits_per_s),
        "guest": percent(rates.guest_percent),
        "vmm": percent(rates.vmm_percent),
        "halted": percent(rates.halted_percent),
    }


def exit_cells(one: ExitRate) -> dict[str, str]:
    """Return what the table of exits says of one kind."""
    where = units.plain(one.device or "")
    if not where and one.direction is not None:
        where = "elsewhere" if one.address is None else f"{one.address:#x}"  # open bus
    return {
        "reason": units.plain(one.reason),
        "device": where,
        "register": units.plain(one.register or ""),
        "direction": " ".join(str(word) for word in (one.direction, one.size) if word),
        "per_s": rate(one.per_s),
        "p50": "-" if one.p50_ns is None else units.time(one.p50_ns),
        "p99": "-" if one.p99_ns is None else units.time(one.p99_ns),
        "share": percent(one.vmm_percent),
        "count": units.count(one.count),
    }


_MACHINE_KEYS: Final = {
    "uptime": "uptime_ns",
    "per_s": "exits_per_s",
    "guest": "guest_percent",
    "vmm": "vmm_percent",
    "halted": "halted_percent",
}
_EXIT_KEYS: Final = {"p50": "p50_ns", "p99": "p99_ns", "share": "vmm_percent"}


def sorted_rows(rows: Sequence[Any], table: Table, columns: Sequence[Column], value_of: Any) -> list[Any]:
    """Return rows as a table wants them: numbers most first, texts by the alphabet; what is not known comes last."""
    column = next(one for one in columns if one.name == table.sort)
    known = [row for row in rows if value_of(row, table.sort) is not None]
    unknown = [row for row in rows if value_of(row, table.sort) is None]
    known.sort(key=lambda row: value_of(row, table.sort), reverse=column.is_number != table.is_reversed)
    return known + unknown


def _machine_value(row: tuple[str, MachineState], name: str) -> Any:
    if name == "name":
        return row[0]
    return getattr(row[1].rates, _MACHINE_KEYS.get(name, name), None)


def _exit_value(row: ExitRate, name: str) -> Any:
    return getattr(row, _EXIT_KEYS.get(name, name))


# --- lines ------------------------------------------------------------------------------------------------------------


def _plain_line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="crop")


def _ends(left: str, right: str, width: int, style: str) -> Text:
    """Return a line of two texts; the right one gives way."""
    room = width - len(left) - len(right)
    return _plain_line((left + " " * room + right if room > 0 else left).ljust(width), style)


def _window(count: int, selected: int, room: int) -> range:
    """Return which rows to show so that the selected one is among them."""
    first = min(max(selected - room // 2, 0), max(count - room, 0))
    return range(first, min(first + room, count))


def _table(
    view: View,
    rows: Sequence[tuple[Any, Mapping[str, str], Mapping[str, str], History]],
    width: int,
    height: int,
) -> list[Text]:
    """Return titles and rows: each has its key, its cells, their styles and a history."""
    table, columns = view.table
    layout = fit(columns, [cells for _, cells, _, _ in rows], max(width - 2, 1))
    lines = [title(layout, table.sort)]
    keys = [key for key, _, _, _ in rows]
    selected = keys.index(table.selected) if table.selected in keys else 0
    for at in _window(len(rows), selected, max(height - 1, 1)):
        _, cells, styles, history = rows[at]
        spark = next((size for column, size in layout if column.name == "spark"), 0)
        if spark:
            cells = {**cells, "spark": sparkline(history.columns(spark), ascii_only=view.ascii_only)}
        lines.append(line(layout, cells, styles={"spark": "cyan"} | dict(styles), is_selected=at == selected))
    return lines


def _share_style(value: float | None) -> str:
    return "" if value is None or value < BUSY else "yellow" if value < SLOW else "red"


def machine_rows(view: View, states: Mapping[str, MachineState]) -> list[tuple[str, MachineState]]:
    """Return the machines as they are shown."""
    return sorted_rows(list(states.items()), view.machines, MACHINES, _machine_value)


def exit_rows(view: View, state: MachineState) -> list[ExitRate]:
    """Return a machine's exits as they are shown."""
    return sorted_rows(state.exits or [], view.exits, EXITS, _exit_value)


def _draw_machines(view: View, states: Mapping[str, MachineState], width: int, height: int) -> list[Text]:
    total = sum(state.rates.exits_per_s for state in states.values() if state.rates is not None)
    how_many = f"{len(states)} machine{'' if len(states) == 1 else 's'}"
    head = _ends(f" hv top   {how_many}   {rate(total)} exits/s", f"{view.clock} ", width, "bold reverse")
    if not states:
        return [head, _plain_line(""), _plain_line("  No machine runs."), _plain_line("  `hv run KERNEL` starts one.")]
    rows = []
    for name, state in machine_rows(view, states):
        vmm = state.rates.vmm_percent if state.rates is not None else None
        styles = {"vmm": _share_style(vmm), "kernel": "dim"} | ({"per_s": "red"} if state.trouble else {})
        rows.append((name, machine_cells(name, state), styles, state.history))
    return [head, *_table(view, rows, width, height - 1)]


def _draw_exits(view: View, name: str, state: MachineState, width: int, height: int) -> list[Text]:
    rates = state.rates
    if rates is None:
        words = state.trouble or "..."
        return [_ends(f" {name}   {words}", f"{view.clock} ", width, "bold reverse")]
    vcpus = f"{rates.cpus} vCPU{'' if rates.cpus == 1 else 's'}"
    facts = f" {name}   {units.plain(rates.kernel) or '-'}, {vcpus}, pid {rates.pid}, up {uptime(rates.uptime_ns)}"
    head = _ends(
        facts, f"{state.trouble or view.clock} ", width, "bold reverse red" if state.trouble else "bold reverse"
    )
    shares = f"guest {percent(rates.guest_percent)}  VMM {percent(rates.vmm_percent)}"
    if rates.halted_percent is not None:
        shares += f"  halted {percent(rates.halted_percent)}"
    words = f"  {rate(rates.exits_per_s)} exits/s  {shares}  "
    second = _plain_line(words)
    room = width - len(words)
    if room >= 8:
        second.append(sparkline(state.history.columns(min(room, 60)), ascii_only=view.ascii_only), style="cyan")
    rows = []
    for one in exit_rows(view, state):
        styles = {"share": _share_style(one.vmm_percent)}
        if not one.per_s:
            styles = dict.fromkeys((column.name for column in EXITS), "dim")
        history = state.exit_histories.get(one.key) or History()
        rows.append((one.key, exit_cells(one), styles, history))
    if not rows:
        return [head, second, _plain_line(""), _plain_line("  ..." if state.exits is None else "  No exit yet.")]
    return [head, second, *_table(view, rows, width, height - 2)]


def _foot(view: View, width: int) -> Text:
    if view.shows_help:
        return _ends(" any key goes back  q quit", "", width, "reverse")
    table, columns = view.table
    column = next(one for one in columns if one.name == table.sort)
    arrow = ("v^" if view.ascii_only else "▼▲")[column.is_number == table.is_reversed]
    where = "Enter exits" if view.machine is None else "Esc back"
    left = f" s sort: {column.sort_name} {arrow}  r reverse  {where}  ? help  q quit"
    return _ends(left, f"every {view.interval:g} s ", width, "reverse")


def draw(view: View, states: Mapping[str, MachineState], width: int, height: int) -> list[Text]:
    """Return the lines of a screen of this size, `height` of them."""
    if view.shows_help:
        lines = [_ends(" hv top: keys and columns", "", width, "bold reverse"), _plain_line("")]
        lines += [_plain_line(words) for words in HELP.splitlines()]
    elif view.machine is None:
        lines = _draw_machines(view, states, width, height - 1)
    else:
        gone = MachineState(trouble="has ended")
        lines = _draw_exits(view, view.machine, states.get(view.machine, gone), width, height - 1)
    lines = lines[: max(height - 1, 1)]
    lines += [_plain_line("") for _ in range(height - 1 - len(lines))]
    lines = [*lines, _foot(view, width)][-height:]
    for one in lines:
        one.truncate(width)
    return lines

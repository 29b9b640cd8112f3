"""Tables of lines that fit a terminal's width: what matters least is left out first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Column", "fit", "line", "sparkline", "title"]

GAP: Final = 1
BLOCKS: Final = "▁▂▃▄▅▆▇█"
ASCII: Final = "_.-:=+*#"
CUT: Final = "~"


class Column(NamedTuple):
    """A column.

    Attributes:
        name: what rows call it.
        title: its title.
        least: cells that it takes at least.
        most: cells that it takes at most, if its cells need them.
        rank: the columns of the highest are left out first.
        is_right: whether it is set to the right.
        sort_name: what it sorts by, in words; empty: it does not.
        is_number: whether most comes first.
    """

    name: str
    title: str
    least: int
    most: int
    rank: int
    is_right: bool = True
    sort_name: str = ""
    is_number: bool = True


def fit(columns: Sequence[Column], rows: Sequence[Mapping[str, str]], width: int) -> list[tuple[Column, int]]:
    """Return the columns that find room in `width` cells, each with its own width.

    Room that is left goes to the columns from left to right, as far as their cells need it; a column without cells of
    its own (a sparkline) takes the rest.
    """
    shown = sorted(range(len(columns)), key=lambda at: columns[at].rank)
    while len(shown) > 1 and sum(columns[at].least + GAP for at in shown) - GAP > width:
        shown.pop()
    widths = {at: columns[at].least for at in sorted(shown)}
    spare = width - sum(widths.values()) - GAP * (len(widths) - 1)
    for at, least in widths.items():
        column = columns[at]
        needed = max((cell_len(row.get(column.name, "")) for row in rows), default=0)
        if any(column.name in row for row in rows):
            more = min(max(min(needed, column.most) - least, 0), max(spare, 0))
        else:
            more = min(column.most - least, max(spare, 0))
        widths[at] = least + more
        spare -= more
    if spare < 0:
        widths[shown[0]] = max(width, 1)
    return [(columns[at], widths[at]) for at in widths]


def _cell(text: str, width: int, *, is_right: bool) -> str:
    """Return a text in exactly `width` cells; one that is cut says so."""
    size = cell_len(text)
    if size > width:
        return set_cell_size(text, max(width - 1, 0)) + CUT
    return " " * (width - size) + text if is_right else text + " " * (width - size)


def title(layout: Sequence[tuple[Column, int]], sort: str) -> Text:
    """Return the titles; the one that the rows are sorted by stands out."""
    text = Text("  ", no_wrap=True, style="bold")
    for number, (column, width) in enumerate(layout):
        words = _cell(column.title, width, is_right=column.is_right)
        text.append(" " * GAP if number else "")
        text.append(words, style="underline" if column.name == sort else "")
    return text


def line(
    layout: Sequence[tuple[Column, int]], row: Mapping[str, str], *, styles: Mapping[str, str], is_selected: bool
) -> Text:
    """Return one row; a cell that is missing is blank."""
    text = Text("> " if is_selected else "  ", no_wrap=True)
    for number, (column, width) in enumerate(layout):
        text.append(" " * GAP if number else "")
        text.append(_cell(row.get(column.name, ""), width, is_right=column.is_right), style=styles.get(column.name, ""))
    if is_selected:
        text.stylize("reverse")
    return text


def sparkline(values: Sequence[float | None], *, ascii_only: bool = False) -> str:
    """Return a character for each value, the largest one full; None is blank."""
    levels = ASCII if ascii_only else BLOCKS
    top = max((value for value in values if value is not None), default=0.0)

    def level(value: float | None) -> str:
        if value is None:
            return " "
        if top <= 0 or value <= 0:
            return levels[0]
        return levels[min(int(value / top * (len(levels) - 1) + 0.5), len(levels) - 1)]

    return "".join(map(level, values))

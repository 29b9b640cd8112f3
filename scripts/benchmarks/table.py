"""Rows of the table: samples, ratios, verdicts, and how they are printed."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

HEAD = ("benchmark", "what", "ours", "against", "theirs", "ratio", "reach", "")


class CannotRunError(Exception):
    """A benchmark could not be run; the message says what is missing or what failed."""


class Sample(NamedTuple):
    """What was measured, one value a round, all in `unit`."""

    unit: str
    values: list[float]

    def pick(self, by: str) -> float:
        """Return the "min" or the "median"."""
        return min(self.values) if by == "min" else median(self.values)

    def show(self) -> str:
        """Return minimum and median for people: "4.97 / 5.12 us"; one number where every round gave the same."""
        low, middle = min(self.values), median(self.values)
        digits = 0 if low >= 100 or low == int(low) else 1 if low >= 10 else 2
        if low == max(self.values):
            return f"{low:.{digits}f} {self.unit}".rstrip()
        return f"{low:.{digits}f} / {middle:.{digits}f} {self.unit}"


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: the benchmark that it belongs to, as --only takes it.
        what: what was measured.
        ours: how hv did.
        theirs: how the baseline did; None where there is none: then `reach` is in the unit of `ours`.
        against: what the baseline is.
        reach: at most this ratio, or this value without a baseline; None for a line that only informs.
        by: what is compared, "min" or "median". The rounds of both sides alternate. Of an exit's cost the minimum
            counts, because a busy machine only adds to it; of a whole run the median, because waiting is part of it.
    """

    name: str
    what: str
    ours: Sample
    theirs: Sample | None = None
    against: str = ""
    reach: float | None = None
    by: str = "median"

    @property
    def ratio(self) -> float | None:
        """Return ours over theirs, by `by`; None without a baseline."""
        return None if self.theirs is None else self.ours.pick(self.by) / self.theirs.pick(self.by)

    @property
    def met(self) -> bool | None:
        """Tell whether the target was reached; None where there is no target."""
        if self.reach is None:
            return None
        ratio = self.ratio
        return (self.ours.pick(self.by) if ratio is None else ratio) <= self.reach

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values: also each round, and the ratio by minimum and by median."""
        facts: dict[str, Any] = {"benchmark": self.name, "what": self.what, "unit": self.ours.unit}
        facts |= {"ours": self.ours.values, "against": self.against or None, "by": self.by}
        facts |= {"reach": self.reach, "met": self.met, "ratio": self.ratio}
        if self.theirs is not None:
            facts["theirs"] = self.theirs.values
            facts |= {f"ratio_by_{by}": self._replace(by=by).ratio for by in ("min", "median")}
        return facts

    def cells(self) -> tuple[str, ...]:
        """Return the line's cells as text."""
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} ({self.by})"
        unit = "" if self.theirs is not None else f" {self.ours.unit}".rstrip()
        reach = "" if self.reach is None else f"<= {self.reach:g}{unit}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        theirs = "" if self.theirs is None else self.theirs.show()
        return (self.name, self.what, self.ours.show(), self.against, theirs, ratio, reach, verdict)


def as_text(rows: Sequence[Row]) -> str:
    """Lay the rows out as a table."""
    lines = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths).rstrip())
    return "\n".join(text)


def as_json(rows: Sequence[Row], failures: dict[str, str]) -> str:
    """Return the rows, and what could not run, as JSON."""
    return json.dumps({"rows": [row.as_json() for row in rows], "could_not_run": failures}, indent=1)

"""A profile as folded stacks, a line each: what flame graph tools read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypervisor.profile.report.groups import USER, where
from hypervisor.profile.report.units import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hypervisor.profile.exits import ExitRow
    from hypervisor.profile.model import Profile

__all__ = ["WEIGHTS", "render", "stacks"]

WEIGHTS: Final = ("ns", "count")


def render(profile: Profile, *, weight: str = "ns", layer: str = USER) -> str:
    """Return lines `vcpu0;io;uart0;LSR;serial8250_console_putchar 1234`, sorted.

    Frames are parted by ';', the weight is the integer behind the last space. Where places were sampled, a row is
    divided among them in proportion.

    Args:
        profile: what to tell.
        weight: "ns" for handler time, "count" for exits.
        layer: whose exits: "user" or "kernel". They are not to be added up: an exit to hv is one that KVM counted, too.
    """
    total: dict[str, int] = {}
    for frames, value in stacks(profile.exits.layer(layer), weight=weight):
        line = ";".join(map(_frame, frames))
        total[line] = total.get(line, 0) + value
    return "".join(f"{line} {value}\n" for line, value in sorted(total.items()) if value)


def _frame(name: str) -> str:
    return plain(name).replace(";", ":") or "?"


def stacks(rows: Iterable[ExitRow], *, weight: str) -> Iterator[tuple[list[str], int]]:
    """Yield frames, outermost first, and their weight; the weights add up to those of the rows."""
    for row in rows:
        frames = [row.reason] if row.vcpu is None else [f"vcpu{row.vcpu}", row.reason]
        frames.extend(name for name in (where(row), row.register if row.device else None) if name)
        value = round(row.handler.total) if weight == "ns" else row.count
        samples = sum(row.symbols.values())
        if not samples:
            yield frames, value
        given = seen = 0
        for name, part in row.symbols.items():
            seen += part
            until = value * seen // samples  # what is given away by now, so that nothing is lost by rounding
            yield [*frames, name], until - given
            given = until

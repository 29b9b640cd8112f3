"""A profile's rows, added up by what a reader asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.profile.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypervisor.profile.exits import ExitRow

__all__ = ["BY", "KERNEL", "KERNEL_TIMES", "LAYERS", "USER", "Group", "by_symbol", "groups", "share_of", "where"]

USER: Final = "user"
KERNEL: Final = "kernel"
LAYERS: Final = {USER: "user: counted by hv", KERNEL: "kernel: counted by KVM"}
KERNEL_TIMES: Final = "KVM counts exits that it passes on to hv, too; a halted vCPU's sleep is in the times"
_FINE: Final = 1 << 10
"""A part of a histogram's count is kept in this fraction of one."""


class Group(NamedTuple):
    """Exits that have a name in common.

    Attributes:
        layer: who counted them.
        name: what they have in common.
        exits: how many.
        handler: their handler times; of a part of a row (a symbol's) the shape is right and the counts are scaled.
        samples: by how many sampled places a symbol is known; 0 for all else.
    """

    layer: str
    name: str
    exits: int
    handler: Histogram
    samples: int = 0


def where(row: ExitRow) -> str | None:
    """Return who answers a row's accesses: a device, or the address where none does; None for other exits."""
    if row.direction is None:
        return None
    if row.device:
        return row.device
    return "elsewhere" if row.address is None else f"open bus {row.address:#x}"


def _register(row: ExitRow) -> str | None:
    return None if row.direction is None else row.name


def _vcpu(row: ExitRow) -> str | None:
    return None if row.vcpu is None else f"vcpu{row.vcpu}"


BY: Final[dict[str, Callable[[ExitRow], str | None]]] = {
    "reason": lambda row: row.reason,
    "device": where,
    "register": _register,
    "vcpu": _vcpu,
    "all": lambda _row: "all exits",
}
"""The name that a row has in each table; None where it has no place in it."""


def groups(rows: Iterable[ExitRow], by: str) -> list[Group]:
    """Add rows up by "reason", "device", "register", "symbol", "vcpu" or "all"; most handler time first."""
    if by == "symbol":
        return by_symbol(rows)
    name_of = BY[by]
    found: dict[tuple[str, str], list[ExitRow]] = {}
    for row in rows:
        name = name_of(row)
        if name is not None and row.count:
            found.setdefault((row.layer, name), []).append(row)
    lines = [
        Group(layer, name, sum(row.count for row in same), Histogram.merged(row.handler for row in same))
        for (layer, name), same in found.items()
    ]
    return _sorted(lines)


def _sorted(lines: list[Group]) -> list[Group]:
    return sorted(lines, key=lambda line: (-line.handler.total, -line.exits, line.name))


def share_of(histogram: Histogram, part: int, whole: int) -> Histogram:
    """Return what `part` of `whole` exits took if they were as all of them; bucket counts are in units of 1/1024."""
    return Histogram(
        {bucket: count * part * _FINE // whole for bucket, count in histogram.buckets.items()},
        histogram.total_ticks * part // whole,
        histogram.max_ticks,
        ns_per_tick=histogram.ns_per_tick,
    )


def by_symbol(rows: Iterable[ExitRow]) -> list[Group]:
    """Give each row's exits to the places that were sampled in it, in proportion: an estimate."""
    parts: dict[tuple[str, str], list[Histogram]] = {}
    counts: dict[tuple[str, str], float] = {}
    samples: dict[tuple[str, str], int] = {}
    for row in rows:
        whole = sum(row.symbols.values())
        for name, part in row.symbols.items():
            key = row.layer, name
            parts.setdefault(key, []).append(share_of(row.handler, part, whole))
            counts[key] = counts.get(key, 0.0) + row.count * part / whole
            samples[key] = samples.get(key, 0) + part
    return _sorted(
        [
            Group(layer, name, round(counts[layer, name]), Histogram.merged(same), samples[layer, name])
            for (layer, name), same in parts.items()
        ]
    )

"""What a running machine tells those who ask at its socket: few bytes and little time, for it runs meanwhile."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from hypervisor.profile.live import counted
from hypervisor.profile.model import VcpuTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hypervisor.kvm.recorder import RawRow
    from hypervisor.profile.live import LiveExits
    from hypervisor.profile.model import Profile

__all__ = ["FORM_VERSION", "form"]

FORM_VERSION: Final = 1


def form(kind: str, live: LiveExits, facts: Mapping[str, Any], profile: Callable[[], Profile]) -> dict[str, Any]:
    """Return what is asked for, for JSON. Times are counted up from the machine's start, in nanoseconds.

    "summary": `facts` (name, pid, id, kernel, cpus, ram_mib; no other machine has the same id), "uptime_ns", and
    "vcpus" as in a profile. "exits": the same and "exits", all vCPUs' together, each with its handler times as "total"
    and "max" in ticks and "buckets", pairs of number and count (see `hypervisor.profile.histogram`); "ns_per_tick" is
    for them. "profile": `facts`, "uptime_ns" and `Profile.as_json`.
    """
    if kind == "profile":
        whole = profile()
        return whole.as_json() | dict(facts) | {"uptime_ns": whole.wall_ns}
    vcpus = live.raw_rows()
    uptime = live.clock.now_ns()  # after the counts: no vCPU has been busy for longer than that
    scale = live.clock.ns_per_tick
    head = {"version": FORM_VERSION, **facts, "uptime_ns": uptime}
    head["vcpus"] = [asdict(_times(live, index, rows, scale)) for index, rows in enumerate(vcpus)]
    if kind == "exits":
        head |= {"ns_per_tick": scale, "exits": _exits(live, vcpus)}
    return head


def _times(live: LiveExits, index: int, rows: list[RawRow], ns_per_tick: float) -> VcpuTimes:
    """Return what `hypervisor.profile.live.times_of` does, without a histogram."""
    run = round(sum(row.guest[0] for row in rows) * ns_per_tick)
    handler = round(sum(row.handler[0] for row in rows) * ns_per_tick)
    halted = live.halted_ns(index, run)
    return VcpuTimes(index, sum(row.exits for row in rows), max(run - (halted or 0), 0), halted, handler)


def _exits(live: LiveExits, vcpus: list[list[RawRow]]) -> list[dict[str, Any]]:
    """Return a row for each kind of exit, with a name."""
    kinds: dict[tuple[int, int, int, int], list[RawRow]] = {}
    for rows in vcpus:
        for row in rows:
            kinds.setdefault((row.reason, row.kind, row.address, row.size), []).append(row)
    found = []
    for (reason, kind, address, size), rows in kinds.items():
        known = live.has_name(kind, address)
        device, register = live.name(kind, address) if known else (None, None)
        direction = live.direction(kind)
        buckets: dict[int, int] = {}
        for row in rows:
            for bucket, count in counted(row.handler[2]).items():
                buckets[bucket] = buckets.get(bucket, 0) + count
        found.append(
            {
                "reason": live.reasons.get(reason, str(reason)),
                "device": device,
                "register": register,
                "address": address if known else None,
                "direction": direction,
                "size": (size or None) if direction else None,
                "count": sum(row.exits for row in rows),
                "total": sum(row.handler[0] for row in rows),
                "max": max(row.handler[1] for row in rows),
                "buckets": sorted(buckets.items()),
            }
        )
    return found

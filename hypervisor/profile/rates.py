"""What happened between two looks at a running machine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hypervisor.profile.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ExitRate", "History", "MachineRates", "exit_rates", "machine_rates"]

NS: Final = 1_000_000_000
PLACES: Final = 3
KEY: Final = ("reason", "device", "register", "address", "direction", "size")


@dataclass(frozen=True, slots=True)
class MachineRates:
    """A machine, and what it did lately.

    Attributes:
        name, pid, kernel, cpus, ram_mib: what it is.
        uptime_ns: since its start.
        interval_ns: what the following are about.
        exits: exits to hv since its start.
        exits_per_s: lately.
        vmm_percent: of its vCPUs' time, in hv's handlers.
        halted_percent: halted, as KVM counts it; None where it does not say.
        guest_percent: all the rest: in the guest, and in KVM for it.
    """

    name: str
    pid: int
    kernel: str
    cpus: int
    ram_mib: int
    uptime_ns: int
    interval_ns: int
    exits: int
    exits_per_s: float
    guest_percent: float
    vmm_percent: float
    halted_percent: float | None

    def as_json(self) -> dict[str, Any]:
        """Return what `hv top --once --json` prints."""
        return {name: _rounded(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class ExitRate:
    """One kind of exit, and what there was of it lately.

    Attributes:
        reason, device, register, address, direction, size: as in `hypervisor.profile.exits.ExitRow`.
        count: since the machine's start.
        per_s: lately.
        p50_ns, p99_ns: of the handler times lately; None when there were none.
        vmm_percent: of the time that hv's handlers took lately.
    """

    reason: str
    device: str | None
    register: str | None
    address: int | None
    direction: str | None
    size: int | None
    count: int
    per_s: float
    p50_ns: float | None
    p99_ns: float | None
    vmm_percent: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return tuple(getattr(self, name) for name in KEY)

    def as_json(self) -> dict[str, Any]:
        """Return what `hv top MACHINE --once --json` prints."""
        return {name: _rounded(getattr(self, name)) for name in self.__slots__}


def _rounded(value: Any) -> Any:
    return round(value, PLACES) if isinstance(value, float) else value


def machine_rates(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> MachineRates:
    """Return what happened between two answers (see `hypervisor.profile.forms`); None stands for the start."""
    uptime = after["uptime_ns"]
    interval = max(uptime - (before["uptime_ns"] if before else 0), 1)
    old = {vcpu["index"]: vcpu for vcpu in before["vcpus"]} if before else {}

    def sum_of(name: str) -> int:
        return sum(vcpu[name] - (old[vcpu["index"]][name] if vcpu["index"] in old else 0) for vcpu in after["vcpus"])

    whole = interval * max(len(after["vcpus"]), 1)
    vmm = min(max(100 * sum_of("handler_ns") / whole, 0.0), 100.0)
    halted = None
    if all(vcpu["halted_ns"] is not None for vcpu in (*after["vcpus"], *old.values())):
        halted = min(max(100 * sum_of("halted_ns") / whole, 0.0), 100 - vmm)
    return MachineRates(
        name=str(after["name"]),
        pid=after["pid"],
        kernel=str(after["kernel"]),
        cpus=after["cpus"],
        ram_mib=after["ram_mib"],
        uptime_ns=uptime,
        interval_ns=interval,
        exits=sum(vcpu["exits"] for vcpu in after["vcpus"]),
        exits_per_s=sum_of("exits") * NS / interval,
        guest_percent=100 - vmm - (halted or 0),
        vmm_percent=vmm,
        halted_percent=halted,
    )


def exit_rates(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[ExitRate]:
    """Return what happened between two answers, by kind of exit, most first; None stands for the start."""
    interval = max(after["uptime_ns"] - (before["uptime_ns"] if before else 0), 1)
    scale = after["ns_per_tick"]
    old = {_key(row): row for row in before["exits"]} if before else {}
    lately = [(row, _times(row, scale).since(_times(old.get(_key(row)), scale))) for row in after["exits"]]
    whole = sum(times.total_ticks for _, times in lately)
    rates = [
        ExitRate(
            **{name: row[name] for name in KEY},
            count=row["count"],
            per_s=(row["count"] - old.get(_key(row), _NONE)["count"]) * NS / interval,
            p50_ns=times.p50 if times.count else None,
            p99_ns=times.p99 if times.count else None,
            vmm_percent=100 * times.total_ticks / whole if whole else 0.0,
        )
        for row, times in lately
    ]
    return sorted(rates, key=lambda rate: (-rate.per_s, -rate.count))


_NONE: Final = {"count": 0}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _times(row: Mapping[str, Any] | None, ns_per_tick: float) -> Histogram:
    if row is None:
        return Histogram(ns_per_tick=ns_per_tick)
    return Histogram(dict(row["buckets"]), row["total"], row["max"], ns_per_tick=ns_per_tick)


class History:
    """A rate over the last minute."""

    SECONDS: Final = 60.0

    def __init__(self) -> None:
        """Begin with nothing known."""
        self._samples: deque[tuple[float, float, float]] = deque()

    def add(self, start: float, end: float, rate: float) -> None:
        """Note the rate between two times, in seconds."""
        self._samples.append((start, end, rate))
        while self._samples[0][1] < end - self.SECONDS:
            self._samples.popleft()

    def columns(self, count: int) -> list[float | None]:
        """Return the means of the last minute's `count` equal parts, the newest last; None where nothing is known."""
        if not self._samples:
            return [None] * count
        end = self._samples[-1][1]
        step = self.SECONDS / count
        columns: list[float | None] = []
        for number in range(count):
            low = end - (count - number) * step
            parts = [
                (min(stop, low + step) - max(start, low), rate)
                for start, stop, rate in self._samples
                if stop > low and start < low + step
            ]
            known = sum(part for part, _ in parts)
            columns.append(sum(part * rate for part, rate in parts) / known if known > 0 else None)
        return columns

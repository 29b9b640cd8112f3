"""A profile: what a run's exits were, as reports read it, whether it comes from a file or from a running machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from hypervisor.profile.exits import ExitRow, Exits

__all__ = ["JSON_VERSION", "Profile", "TraceChunk", "VcpuTimes"]

JSON_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class VcpuTimes:
    """Where one vCPU's time went, in nanoseconds.

    Attributes:
        index: its number.
        exits: exits to user space.
        guest_ns: in KVM_RUN: the guest, and what KVM does for it; without halts where those are known.
        halted_ns: halted or waiting for an interrupt, as KVM counts it; None where it does not say.
        handler_ns: in this VMM, from exits to entries.
    """

    index: int
    exits: int
    guest_ns: int
    halted_ns: int | None
    handler_ns: int


class TraceChunk(NamedTuple):
    """Exits of one vCPU in the order in which they happened: arrays of one length.

    Attributes:
        vcpu: its number.
        at_ns: nanoseconds from the machine's start to the exit (float64).
        handler_ns: nanoseconds from the exit to the next entry (float64).
        row: indices into `Profile.trace_rows` (int64).
        place: indices into `Profile.places` (int64); -1 where the place was not sampled.
    """

    vcpu: int
    at_ns: NDArray[np.float64]
    handler_ns: NDArray[np.float64]
    row: NDArray[np.int64]
    place: NDArray[np.int64]


class Profile:
    """One run.

    Attributes:
        info: facts of the run, as far as known: "kernel", "cpus", "ram_mib", "hv", "created" (ISO 8601), "outcome".
        wall_ns: how long it ran, in nanoseconds.
        vcpus: where each vCPU's time went.
        exits: all of them, a row for each vCPU and kind; marks are in it.
        kvm: KVM's own counters by "vm", "vcpu0" and so on: name to value.
        marks: (name, nanoseconds since the start), in order.
        notes: what a reader must know: what is missing, and why.
        trace_rows: what the rows of the trace's chunks mean.
        places: names of sampled places ("native_safe_halt").
        has_trace: whether single exits were recorded.
    """

    def __init__(  # noqa: PLR0913 - a run's facts, each by its name
        self,
        *,
        info: Mapping[str, Any],
        wall_ns: int,
        vcpus: Sequence[VcpuTimes],
        exits: Exits,
        kvm: Mapping[str, Mapping[str, int]] | None = None,
        marks: Sequence[tuple[str, int]] = (),
        notes: Sequence[str] = (),
        trace: Callable[[], Iterator[TraceChunk]] | None = None,
        trace_rows: Sequence[ExitRow] = (),
        places: Sequence[str] = (),
    ) -> None:
        """Take the facts; `trace` makes a new iterator over the single exits, when called."""
        self.info = dict(info)
        self.wall_ns = wall_ns
        self.vcpus = tuple(vcpus)
        self.exits = exits
        self.kvm = {name: dict(values) for name, values in (kvm or {}).items()}
        self.marks = tuple(marks)
        self.notes = tuple(notes)
        self.trace_rows = tuple(trace_rows)
        self.places = tuple(places)
        self._trace = trace

    @property
    def has_trace(self) -> bool:
        """Whether there is a trace of single exits."""
        return self._trace is not None

    def trace(self) -> Iterator[TraceChunk]:
        """Iterate over the single exits, chunk by chunk; each vCPU's are in order."""
        return iter(()) if self._trace is None else self._trace()

    def as_json(self) -> dict[str, Any]:
        """Return the stable form that programs read; exits are added up over vCPUs, most first."""
        return {
            "version": JSON_VERSION,
            "info": self.info,
            "wall_ns": self.wall_ns,
            "kvm": self.kvm,
            "vcpus": [asdict(vcpu) for vcpu in self.vcpus],
            "marks": [{"name": name, "at_ns": at_ns} for name, at_ns in self.marks],
            "notes": list(self.notes),
            "exits": [row.as_json() for row in self.exits.merged()],
        }

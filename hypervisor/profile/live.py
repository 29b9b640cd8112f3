"""A running machine's exits as a value: what C has counted, with names from the machine's devices."""

from __future__ import annotations

import os
import re
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hypervisor.errors import ConfigError
from hypervisor.kvm.recorder import ELSEWHERE, raw_rows
from hypervisor.kvm.vcpu import MMIO_READ, MMIO_WRITE, PIO_IN, PIO_OUT, reason_names
from hypervisor.profile.exits import ExitRow, Exits, Mark
from hypervisor.profile.halts import halted_ns
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile, VcpuTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hypervisor.bus import Bus
    from hypervisor.clock import Clock
    from hypervisor.kvm import Vm
    from hypervisor.kvm.recorder import RawRow
    from hypervisor.vcpu import Vcpu

__all__ = ["LiveExits", "TextMarks", "counted", "profile_of", "row_of", "rows_of", "times_of"]

PORTS: Final = {PIO_IN, PIO_OUT}
DIRECTIONS: Final = {PIO_IN: "in", MMIO_READ: "in", PIO_OUT: "out", MMIO_WRITE: "out"}
MOST_MARKS: Final = 1024
MOST_MARK_BYTES: Final = 16 << 20
"""What marks may take, packed: a guest decides how many there are."""


def counted(words: memoryview) -> dict[int, int]:
    """Return the buckets of a histogram that are not empty; few of them are, and all next to each other."""
    data = bytes(words)
    low = (len(data) - len(data.lstrip(b"\0"))) // 8
    high = (len(data.rstrip(b"\0")) + 7) // 8
    return {bucket: count for bucket, count in enumerate(words[low:high].tolist(), low) if count}


def histogram_of(raw: tuple[int, int, memoryview], ns_per_tick: float) -> Histogram:
    """Return a histogram that C keeps as a value."""
    total, largest, words = raw
    return Histogram(counted(words), total, largest, ns_per_tick=ns_per_tick)


def rows_of(
    data: bytes,
    *,
    vcpu: int,
    ns_per_tick: float,
    reasons: Mapping[int, str],
    name: Callable[[int, int], tuple[str | None, str | None]],
) -> list[ExitRow]:
    """Turn what `Vcpu.recorded_rows` returned into rows.

    Args:
        data: the rows.
        vcpu: whose.
        ns_per_tick: nanoseconds of a tick.
        reasons: names of exit reasons by number.
        name: gives device and register (None: nobody's) for a kind of access (as in runloop.h) and an address.
    """
    return [
        row_of(raw, vcpu=vcpu, ns_per_tick=ns_per_tick, reasons=reasons, name=name)
        for raw in raw_rows(data)
        if raw.exits
    ]


def row_of(
    raw: RawRow,
    *,
    vcpu: int,
    ns_per_tick: float,
    reasons: Mapping[int, str],
    name: Callable[[int, int], tuple[str | None, str | None]],
) -> ExitRow:
    """Turn a row of C's into one with names; the arguments are those of `rows_of`."""
    direction = DIRECTIONS.get(raw.kind)
    known = direction is not None and raw.address != ELSEWHERE
    device, register = name(raw.kind, raw.address) if known else (None, None)
    return ExitRow(
        layer="user",
        reason=reasons.get(raw.reason, str(raw.reason)),
        device=device,
        register=register,
        address=raw.address if known else None,
        direction=direction,
        size=(raw.size or None) if direction else None,
        vcpu=vcpu,
        count=raw.exits,
        operations=raw.operations,
        handler=histogram_of(raw.handler, ns_per_tick),
        guest=histogram_of(raw.guest, ns_per_tick),
        symbols={},
    )


class LiveExits:
    """What `Machine.exits` is made from, and the marks.

    Attributes:
        clock: since the machine's start.
        on_mark: called with a mark's name, its nanoseconds since the start, and each vCPU's rows (zlib).
        reasons: names of exit reasons by number.
    """

    def __init__(self, vcpus: Sequence[Vcpu], ports: Bus, memory: Bus, clock: Clock) -> None:
        """Watch these vCPUs, whose accesses go to these buses."""
        self._vcpus = vcpus
        self._buses = (memory, ports)
        self.reasons = reason_names()
        self._marks: list[tuple[str, int, list[bytes]]] = []
        self._mark_bytes = 0
        self.on_mark: Callable[[str, int, Sequence[bytes]], None] = lambda _name, _at_ns, _packed: None
        self.clock = clock

    def name(self, kind: int, address: int) -> tuple[str | None, str | None]:
        """Return the device and the register at an address, as they are now; (None, None) for open bus."""
        found = self._buses[kind in PORTS].name_of(address, write=DIRECTIONS[kind] == "out")
        return found or (None, None)

    def has_name(self, kind: int, address: int) -> bool:
        """Whether exits of this kind are accesses to an address of their own."""
        return kind in DIRECTIONS and address != ELSEWHERE

    def direction(self, kind: int) -> str | None:
        """Return "in" or "out" for a kind of access, None for exits that are none."""
        return DIRECTIONS.get(kind)

    def halted_ns(self, vcpu: int, run_ns: int) -> int | None:
        """Return how long a vCPU has been halted, from its time in KVM_RUN; None where that is not known, or not yet.

        Waits for nobody.
        """
        one = self._vcpus[vcpu]
        return halted_ns(one.stats(), run_ns) if one.open_stats() else None

    def raw_rows(self) -> list[list[RawRow]]:
        """Return each vCPU's rows as C keeps them."""
        return [[row for row in raw_rows(vcpu.handle.recorded_rows()) if row.exits] for vcpu in self._vcpus]

    def rows_in(self, data: bytes) -> list[RawRow]:
        """Take apart what `Vcpu.recorded_rows` returned."""
        return raw_rows(data)

    def _rows(self, snapshot: Sequence[bytes]) -> list[ExitRow]:
        scale = self.clock.ns_per_tick
        return [
            row
            for index, data in enumerate(snapshot)
            for row in rows_of(data, vcpu=index, ns_per_tick=scale, reasons=self.reasons, name=self.name)
        ]

    def exits(self) -> Exits:
        """Return all exits up to now."""

        def load(packed: list[bytes]) -> list[ExitRow]:
            return self._rows([zlib.decompress(data) for data in packed])

        marks = [Mark(name, at_ns, partial(load, packed)) for name, at_ns, packed in self._marks]
        return Exits(self._rows([vcpu.handle.recorded_rows() for vcpu in self._vcpus]), marks=marks)

    @property
    def vcpus(self) -> int:
        """How many vCPUs there are."""
        return len(self._vcpus)

    def counters(self, vm: Vm, *, wait: bool = True) -> dict[str, dict[str, int]]:
        """Return KVM's own counters, by "vm", "vcpu0" and so on; without those that this kernel does not have.

        The first time each vCPU has to leave the guest for them; with wait=False that is not waited for, and those
        that are not there yet are left out.
        """
        vcpus = [vcpu for vcpu in self._vcpus if vcpu.open_stats() or wait]
        found = {"vm": vm.stats()} | {f"vcpu{vcpu.index}": vcpu.stats() for vcpu in vcpus}
        return {name: values for name, values in found.items() if values}

    @property
    def marks(self) -> list[tuple[str, int]]:
        """Name and nanoseconds since the start of every mark."""
        return [(name, at_ns) for name, at_ns, _ in self._marks]

    def mark(self, name: str) -> bool:
        """Give this moment a name; returns False when there are too many marks already, and none is made."""
        if len(self._marks) >= MOST_MARKS or self._mark_bytes >= MOST_MARK_BYTES:
            return False
        packed = [zlib.compress(vcpu.handle.recorded_rows(), 1) for vcpu in self._vcpus]
        self._mark_bytes += sum(map(len, packed))
        at_ns = self.clock.now_ns()
        self._marks.append((name, at_ns, packed))
        self.on_mark(name, at_ns, packed)
        return True


def times_of(vcpu: int, rows: Sequence[ExitRow], stats: Mapping[str, int]) -> VcpuTimes:
    """Return where a vCPU's time went, from its rows and KVM's own counters of it ({} where there are none)."""
    some = Exits(rows)
    run_ns = round(some.guest.total)
    halted = halted_ns(stats, run_ns)
    return VcpuTimes(
        index=vcpu,
        exits=some.count,
        guest_ns=max(run_ns - (halted or 0), 0),
        halted_ns=halted,
        handler_ns=round(some.latency.total),
    )


def profile_of(live: LiveExits, vm: Vm, facts: Mapping[str, Any], *, wait: bool = True) -> Profile:
    """Return a running machine's profile up to now; `facts` are for `Profile.info`, `wait` is for `counters`."""
    exits = live.exits()
    kvm = live.counters(vm, wait=wait)
    return Profile(
        info=facts,
        wall_ns=live.clock.now_ns(),
        vcpus=[times_of(vcpu, exits.vcpu(vcpu).rows, kvm.get(f"vcpu{vcpu}", {})) for vcpu in range(live.vcpus)],
        exits=exits,
        kvm=kvm,
        marks=live.marks,
    )


class TextMarks:
    """Makes a mark whenever the console prints what a regular expression finds in a line."""

    LONGEST = 4096
    """Bytes of a line that are looked at."""

    def __init__(self, pattern: str, mark: Callable[[str], bool]) -> None:
        """Look for `pattern`; the mark is called what its first group matched, or all of it without groups.

        Raises:
            ConfigError: it is no regular expression.
        """
        try:
            self._pattern = re.compile(os.fsencode(pattern))
        except (re.error, OverflowError, RecursionError, UnicodeError) as error:
            raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None
        self._is_literal = not set(pattern) & set(r".^$*+?{}[]\|()")
        self._mark = mark
        self._line = b""
        self._done = False  # with the line that has begun

    def take(self, data: bytes) -> None:
        """Look at output of the console; a line is marked once, as soon as what comes next cannot change the match.

        A match that goes to the end of what there is waits for the next byte, unless the pattern is mere text.
        """
        *lines, rest = (self._line + data).split(b"\n")
        for line in lines:
            if not self._done:
                self._look(line.rstrip(b"\r"), whole=True)
            self._done = False
        if not self._done:
            self._done = self._look(rest, whole=False) or len(rest) > self.LONGEST
        self._line = b"" if self._done else rest

    def _look(self, line: bytes, *, whole: bool) -> bool:
        line = line[: self.LONGEST]
        found = self._pattern.search(line)
        if found is None or not (whole or self._is_literal or found.end() < len(line)):
            return False
        name = found[1] if found.re.groups and found[1] is not None else found[0]
        self._mark(name.decode(errors="backslashreplace"))
        return True

"""Exits as a value: rows to filter, add up and assert on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from hypervisor.profile.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

__all__ = ["ExitRow", "Exits", "Mark"]


@dataclass(frozen=True, slots=True, eq=False)
class ExitRow:
    """All exits of one kind.

    Attributes:
        layer: who counted them: "user" (this VMM) or "kernel" (the host's KVM).
        reason: such as "io", "mmio", "hlt"; in the kernel's layer KVM's own names.
        device, register: who answers, as the models name it ("uart0", "LSR"); None where nobody does (open bus), and
            for exits that are no accesses.
        address: port or guest-physical address; None for exits that are no accesses, and for those to more addresses
            than are told apart.
        direction: "in" (the guest reads) or "out"; None for exits that are no accesses.
        size: bytes of an access, None for other exits.
        vcpu: which vCPU; None where several are added up.
        count: exits.
        operations: accesses: more than exits where the guest uses string instructions.
        handler: time from the exit to the next entry.
        guest: time in KVM_RUN before the exit; of a halted vCPU that is the time it waited, too.
        symbols: of the exits whose place was sampled, how many by name of the place.
    """

    layer: str
    reason: str
    device: str | None
    register: str | None
    address: int | None
    direction: str | None
    size: int | None
    vcpu: int | None
    count: int
    operations: int
    handler: Histogram
    guest: Histogram
    symbols: Mapping[str, int]

    @property
    def key(self) -> tuple[str, str, str | None, str | None, int | None, str | None, int | None]:
        """What tells it from other rows but for the vCPU."""
        return self.layer, self.reason, self.device, self.register, self.address, self.direction, self.size

    @property
    def name(self) -> str:
        """The row in a few words, such as "io uart0 LSR in"."""
        where = [self.device, self.register] if self.device else []
        if not self.device and self.address is not None:
            where = [f"{self.address:#x}"]
        elif not self.device and self.direction is not None:
            where = ["elsewhere"]
        return " ".join(word for word in (self.reason, *where, self.direction) if word)

    def as_json(self) -> dict[str, Any]:
        """Return the row as the profile's JSON has it."""
        symbols = sorted(self.symbols.items(), key=lambda item: (-item[1], item[0]))
        return {
            "layer": self.layer,
            "reason": self.reason,
            "device": self.device,
            "register": self.register,
            "address": self.address,
            "direction": self.direction,
            "size": self.size,
            "count": self.count,
            "operations": self.operations,
            "handler_ns": self.handler.as_json(),
            "guest_ns": self.guest.as_json(),
            "symbols": [{"name": name, "count": count} for name, count in symbols],
        }


class Mark(NamedTuple):
    """A moment of the run that has a name.

    Attributes:
        name: its name.
        at_ns: nanoseconds since the machine started.
        rows: what had been counted by then, loaded when it is called.
    """

    name: str
    at_ns: int
    rows: Callable[[], Sequence[ExitRow]]


class Exits:
    """Some of a machine's exits. Immutable; filters return new values.

    Attributes:
        rows: one for each vCPU and kind of exit.
    """

    def __init__(self, rows: Iterable[ExitRow], *, marks: Sequence[Mark] = ()) -> None:
        """Hold `rows`; `marks` are what `between` looks for, in order."""
        self.rows = tuple(rows)
        self._marks = tuple(marks)

    def __iter__(self) -> Iterator[ExitRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of rows; `count` is that of exits."""
        return len(self.rows)

    def __repr__(self) -> str:
        top = ", ".join(f"{row.count} {row.name}" for row in self.merged().top(3))
        return f"<Exits: {self.count}{' : ' if top else ''}{top}>"

    # --- filters ------------------------------------------------------------------------------------------------------

    def where(self, test: Callable[[ExitRow], bool]) -> Exits:
        """Return the rows for which `test` is true; marks stay."""

        def some(mark: Mark) -> Mark:
            return mark._replace(rows=lambda: [row for row in mark.rows() if test(row)])

        return Exits(filter(test, self.rows), marks=[some(mark) for mark in self._marks])

    def _accesses(self, reason: str, device: str | int | None, register: str | None, direction: str | None) -> Exits:
        def test(row: ExitRow) -> bool:
            if row.layer != "user" or row.reason != reason:
                return False
            wanted = row.address if isinstance(device, int) else row.device
            return (
                (device is None or wanted == device)
                and (register is None or row.register == register)
                and (direction is None or row.direction == direction)
            )

        return self.where(test)

    def pio(self, device: str | int | None = None, register: str | None = None, direction: str | None = None) -> Exits:
        """Return port accesses: of a device by name, or of a port by number; then of one register, "in" or "out"."""
        return self._accesses("io", device, register, direction)

    def mmio(self, device: str | int | None = None, register: str | None = None, direction: str | None = None) -> Exits:
        """Return accesses to memory that is no RAM: of a device by name, or of an address."""
        return self._accesses("mmio", device, register, direction)

    def reason(self, reason: str, *, layer: str = "user") -> Exits:
        """Return exits for a reason: "io", "mmio", "hlt" ..., or one of KVM's own with layer="kernel"."""
        return self.where(lambda row: row.layer == layer and row.reason == reason)

    def device(self, name: str) -> Exits:
        """Return accesses to a device."""
        return self.where(lambda row: row.device == name)

    def vcpu(self, index: int) -> Exits:
        """Return exits of one vCPU."""
        return self.where(lambda row: row.vcpu == index)

    def layer(self, name: str) -> Exits:
        """Return what one layer has counted: "user" or "kernel"."""
        return self.where(lambda row: row.layer == name)

    def between(self, first: str | None = None, last: str | None = None) -> Exits:
        """Return the exits of a phase: from one mark to the next one called `last`.

        Args:
            first: the name of the mark it begins at; None: the machine's start.
            last: the name of the mark it ends at; None: now.

        Raises:
            KeyError: there is no such mark, or none after the first.
        """
        begin, after = self._find(first, 0)
        end, _ = self._find(last, after)
        return Exits(_difference(end.rows() if end else self.rows, begin.rows() if begin else ()))

    def since(self, earlier: Exits) -> Exits:
        """Return what came after `earlier`, an older value of the same machine's exits, with the marks made since."""
        rows = earlier.rows

        def later(mark: Mark) -> Mark:
            return mark._replace(rows=lambda: _difference(mark.rows(), rows))

        marks = [later(mark) for mark in self._marks[len(earlier.marks) :]]
        return Exits(_difference(self.rows, rows), marks=marks)

    def _find(self, name: str | None, start: int) -> tuple[Mark | None, int]:
        if name is None:
            return None, start
        for index in range(start, len(self._marks)):
            if self._marks[index].name == name:
                return self._marks[index], index + 1
        known = ", ".join(dict.fromkeys(mark.name for mark in self._marks)) or "none"
        raise KeyError(f"no mark {name!r}{' after the first' if start else ''}; there are: {known}")

    @property
    def marks(self) -> tuple[str, ...]:
        """The names of the marks, in order."""
        return tuple(mark.name for mark in self._marks)

    # --- sums ---------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many exits."""
        return sum(row.count for row in self.rows)

    @property
    def operations(self) -> int:
        """How many accesses; a string instruction's elements count each."""
        return sum(row.operations for row in self.rows)

    @property
    def latency(self) -> Histogram:
        """Handler times of all of them: from exit to entry."""
        return Histogram.merged(row.handler for row in self.rows)

    @property
    def guest(self) -> Histogram:
        """Times in KVM_RUN before each."""
        return Histogram.merged(row.guest for row in self.rows)

    @property
    def symbols(self) -> dict[str, int]:
        """Sampled places of all of them, most first."""
        total: dict[str, int] = {}
        for row in self.rows:
            for name, count in row.symbols.items():
                total[name] = total.get(name, 0) + count
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    def top(self, count: int = 10) -> list[ExitRow]:
        """Return the rows with most exits, most first."""
        return sorted(self.rows, key=lambda row: -row.count)[:count]

    def merged(self) -> Exits:
        """Add the vCPUs up: a row for each kind of exit, most exits first."""
        groups: dict[tuple[Any, ...], list[ExitRow]] = {}
        for row in self.rows:
            groups.setdefault(row.key, []).append(row)
        rows = []
        for same in groups.values():
            some = Exits(same)
            rows.append(
                replace(
                    same[0],
                    vcpu=None if len(same) > 1 else same[0].vcpu,
                    count=some.count,
                    operations=some.operations,
                    handler=some.latency,
                    guest=some.guest,
                    symbols=some.symbols,
                )
            )
        rows.sort(key=lambda row: -row.count)
        return Exits(rows)


def _difference(rows: Iterable[ExitRow], earlier: Iterable[ExitRow]) -> list[ExitRow]:
    """Return rows of a machine without what older ones of the same machine have counted already."""
    before = {(row.key, row.vcpu): row for row in earlier}
    found = []
    for row in rows:
        old = before.get((row.key, row.vcpu))
        if old is None:
            found.append(row)
        elif row.count > old.count:
            found.append(
                replace(
                    row,
                    count=row.count - old.count,
                    operations=row.operations - old.operations,
                    handler=row.handler.since(old.handler),
                    guest=row.guest.since(old.guest),
                    symbols={
                        name: count - old.symbols.get(name, 0)
                        for name, count in row.symbols.items()
                        if count > old.symbols.get(name, 0)
                    },
                )
            )
    return found

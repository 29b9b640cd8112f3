"""What an exit costs: to a Python port handler, to the UART's registers, to the console; each beside the C loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks import guests
from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import compiled, output_of
from devices.uart16550 import Uart16550
from hypervisor import Machine, MachineConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.tools import Settings

TARGET_HANDLER: Final = 1.45
TARGET_LSR: Final = 2.0
TARGET_CONSOLE: Final = 1.1
C_LOOP: Final = "minimal C loop"


class Handler:
    """The smallest port handler: what a user writes in Python."""

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the Device protocol's signature
        """Answer a constant."""
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the value and do nothing."""


class Marks:
    """Notes when the guest says that the timed part begins and ends."""

    def __init__(self) -> None:
        """Have seen no mark."""
        self.at: list[int] = []

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the Device protocol's signature
        """Answer 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - the Device protocol's signature
        """Note the time."""
        self.at.append(time.perf_counter_ns())


class NoLine:
    """An interrupt line that leads nowhere."""

    def set(self, level: bool) -> None:
        """Do nothing."""


class NoSink:
    """Takes a UART's output and drops it."""

    def write(self, data: bytes) -> None:
        """Drop it."""


def claim_handler(machine: Machine) -> None:
    """Put the handler at the tested port."""
    machine.bus_pio.claim(guests.PORT, 1, Handler(), "handler")


def claim_plain_uart(machine: Machine) -> None:
    """Add a UART that is given no short cuts, so that every access reaches the model."""
    machine.bus_pio.claim(guests.PLAIN_UART, 8, Uart16550(irq=NoLine(), sink=NoSink()), "plain-uart")


class Case(NamedTuple):
    """One guest, run by both sides.

    Attributes:
        name, what, reach: as in the row.
        guest: makes the guest's bytes for a number of exits.
        prepare: adds devices to the machine.
        console: whether as many bytes as there are exits must have reached the console, their way included in the time.
    """

    name: str
    what: str
    reach: float | None
    guest: Callable[[int], bytes]
    prepare: Callable[[Machine], None] = lambda _: None
    console: bool = False


FIFO_ON: Final = ((guests.FCR, 1),)
CASES: Final = (
    Case(
        "pio",
        "OUT to a Python port handler",
        TARGET_HANDLER,
        lambda n: guests.loop(guests.OUT, guests.PORT, n),
        claim_handler,
    ),
    Case(
        "pio",
        "IN from a Python port handler",
        TARGET_HANDLER,
        lambda n: guests.loop(guests.IN, guests.PORT, n),
        claim_handler,
    ),
    Case(
        "lsr",
        "IN from the UART's LSR, by the model in Python",
        TARGET_LSR,
        lambda n: guests.loop(guests.IN, guests.PLAIN_UART + guests.LSR, n),
        claim_plain_uart,
    ),
    Case(
        "lsr",
        "IN from the UART's LSR, as shipped (short cut)",
        None,
        lambda n: guests.loop(guests.IN, guests.COM1 + guests.LSR, n),
    ),
    Case(
        "console",
        "a byte to the console, OUT each",
        TARGET_CONSOLE,
        lambda n: guests.loop(guests.OUT, guests.COM1, n, FIFO_ON),
        console=True,
    ),
    Case(
        "console",
        "a byte to the console, REP OUTS",
        TARGET_CONSOLE,
        lambda n: guests.string(guests.COM1, n, FIFO_ON),
        console=True,
    ),
)


def ours_us(case: Case, guest: bytes, exits: int) -> float:
    """Run the guest under hv; return microseconds an exit, or a byte."""
    marks = Marks()
    arrived = [0, 0]  # bytes at the console, and when the last of them came

    def listen(data: bytes) -> None:
        arrived[:] = arrived[0] + len(data), time.perf_counter_ns()

    with Machine(MachineConfig(kernel=guest, flat=32, ram_mib=2, debug_exit="raw")) as machine:
        machine.bus_pio.claim(guests.MARK, 1, marks, "marks")
        case.prepare(machine)
        machine.console.listeners.append(listen)
        outcome = machine.run(timeout=120)
    if outcome.status != 0 or len(marks.at) != 2:
        raise CannotRunError(f"{case.what}: hv ended with {outcome!r}")
    if case.console and arrived[0] != exits:
        raise CannotRunError(f"{case.what}: {arrived[0]} of {exits} bytes reached the console")
    end = max(marks.at[1], arrived[1]) if case.console else marks.at[1]
    return (end - marks.at[0]) / exits / 1e3


def theirs_us(loop: Path, guest: Path, exits: int) -> float:
    """Run the guest under the C loop, with KVM's interrupt controllers as hv has them; return microseconds an exit."""
    taken, counted = map(int, output_of([loop, guest, hex(guests.MARK), hex(guests.END), "1"]).split())
    if not 0 < counted <= exits:  # one REP OUTS may be fewer exits than bytes
        raise CannotRunError(f"the C loop counted {counted} exits, not {exits}")
    return taken / exits / 1e3


def measure(settings: Settings, name: str) -> list[Row]:
    """Run the cases called `name`, all of them and the C loop in turn in every round."""
    loop = compiled("minimal_loop.c")
    exits = settings.pick(50_000, 10_000)
    rounds = settings.pick(20, 3)
    runs = []
    for index, case in enumerate(case for case in CASES if case.name == name):
        guest = case.guest(exits)
        path = settings.scratch / f"{name}-{index}.bin"
        path.write_bytes(guest)
        runs.append((case, guest, path, Sample("us", []), Sample("us", [])))
    for _ in range(rounds):
        for case, guest, path, ours, theirs in runs:
            theirs.values.append(theirs_us(loop, path, exits))
            ours.values.append(ours_us(case, guest, exits))
    return [Row(name, case.what, ours, theirs, C_LOOP, case.reach, "min") for case, _, _, ours, theirs in runs]

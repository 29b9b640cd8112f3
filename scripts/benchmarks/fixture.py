"""The `machine` fixture between two tests, beside a fresh boot: Debian's kernel in the emulated host."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import ROOT, output_of
from hypervisor import kernels

if TYPE_CHECKING:
    from benchmarks.tools import Settings

KERNEL: Final = "debian"
REACH: Final = 1 / 20
TIMEOUT_S: Final = 1800
INSIDE: Final = "scripts/benchmarks/in_host_fixture.py"


def measure(settings: Settings, name: str) -> list[Row]:
    """Run tests with the fixture in the emulated host; each waits until the guest's agent answers."""
    kernels.ensure(KERNEL)
    folder = kernels.path(KERNEL).parents[2]
    resets, boots = settings.pick(30, 5), settings.pick(4, 1)
    settings.say("bench: booting the emulated host; then tests with a guest in it")
    printed = output_of(
        [
            ROOT / "scripts" / "emulated-host",
            f"--with={folder}",
            "--",
            "python3",
            INSIDE,
            KERNEL,
            str(resets),
            str(boots),
        ],
        timeout=TIMEOUT_S,
    )
    try:
        times = json.loads(printed)
    except ValueError as error:
        raise CannotRunError(f"the emulated host printed {printed!r}") from error
    what = "reset and agent ready, between two tests (emulated host)"
    return [Row(name, what, Sample("s", times["resets"]), Sample("s", times["boots"]), "a fresh boot", REACH)]

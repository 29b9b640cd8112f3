"""A running machine moved to another process on this host while its guest writes to its memory at a steady pace."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import environment, hv, output_of
from hypervisor import Machine, MachineConfig, kernels
from hypervisor.errors import ConfigError, HostError
from hypervisor.profile.live_client import request

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.tools import Settings

GUEST: Final = "dirtier"
RAM_MIB: Final = 512
WRITTEN_MIB: Final = 384
"""Of it, at random."""
PAGES_PER_SLICE: Final = 64
SLICE_MS: Final = 5
"""Together 50 MiB a second."""
WARM_S: Final = 3.0
"""Until the guest is moved: it has written to a third of its memory by then."""
RUN_S: Final = 12.0
REACH_MS: Final = 100
TIMEOUT: Final = 120.0


def wait_for(name: str) -> None:
    """Return when the machine runs; raises CannotRunError."""
    until = time.monotonic() + TIMEOUT
    while True:
        try:
            request(name, {"do": "progress"})
        except (ConfigError, HostError) as error:
            if time.monotonic() > until:
                raise CannotRunError(f"the guest does not come up: {error}") from error
            time.sleep(0.05)
        else:
            return


def moved(program: Path, guest: Path, arguments: str, socket: Path) -> dict[str, Any]:
    """Run the guest in one process, have it moved to another, and wait for its end; return what was measured."""
    name = f"bench-{os.getpid()}"
    words = [program, "run", guest, "--ram", str(RAM_MIB), "--append", arguments, "--debug-exit", "raw", "--name", name]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": environment()}
    with (
        subprocess.Popen([program, "migrate", "receive", f"unix:{socket}"], **quiet) as target,
        subprocess.Popen(words, **quiet) as source,
    ):
        try:
            wait_for(name)
            time.sleep(WARM_S)
            result: dict[str, Any] = json.loads(
                output_of([program, "migrate", "send", name, f"unix:{socket}", "--json"], timeout=TIMEOUT)
            )
            result["check"] = target.wait(TIMEOUT)
            result["left"] = source.wait(TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotRunError(str(error)) from error
        finally:
            target.kill()
            source.kill()
    if result["left"]:
        raise CannotRunError(f"the source ended with {result['left']}")
    return result


def measure(settings: Settings, name: str) -> list[Row]:
    """Move the guest, once a round."""
    program, guest = hv(), kernels.ensure(GUEST)
    with Machine(MachineConfig(GUEST, ram_mib=128)) as machine:
        khz = machine.vcpus[0].handle.tsc_khz()
    slices = int(RUN_S * 1e3 / SLICE_MS)
    arguments = f"{slices} {PAGES_PER_SLICE} {khz * SLICE_MS} {WRITTEN_MIB}"
    runs = [
        moved(program, guest, arguments, settings.scratch / f"socket{number}") for number in range(settings.pick(5, 1))
    ]

    def sample(unit: str, key: str, scale: float = 1) -> Sample:
        return Sample(unit, [run[key] * scale for run in runs])

    what = f"{RAM_MIB} MiB, 50 MiB/s written"
    return [
        Row(name, f"{what}: the guest stood still", sample("ms", "downtime", 1e3), reach=REACH_MS),
        Row(name, "of it: from beginning to end", sample("s", "seconds")),
        Row(name, "of it: rounds", sample("", "rounds")),
        Row(name, "of it: sent", sample("MB", "sent", 1e-6)),
        Row(name, "of it: the guest's own check of its memory, at its end", sample("", "check"), reach=0),
    ]

"""Boots a Linux kernel under hv with a profile of every exit and without one, in turn. Runs inside the emulated host.

Arguments: VMLINUX INITRD COMMAND-LINE RAM-MIB ROUNDS. Prints JSON: for each side a list, one entry a round, of
microseconds from the guest's start to its end; of those with a profile, how long it took then to look for names in the
guest's memory and to complete the file; how many exits the last profile has.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from hypervisor import Machine, MachineConfig
from hypervisor.profile.file import load


def boot_us(config: MachineConfig, profile: str | None = None) -> tuple[float, float]:
    """Boot the guest; return how long it ran, and how long its end took."""
    with Machine(config) as machine:
        if profile is not None:
            machine.record(profile)
        started = time.monotonic_ns()
        outcome = machine.run()
        whole = (time.monotonic_ns() - started) / 1000
        if outcome.status != 0 or machine.profile_trouble:
            sys.exit(f"hv ended with {outcome!r} {machine.profile_trouble}")
        ran = machine.profile().wall_ns / 1000
    return ran, whole - ran


def main() -> None:
    """Alternate between the two; the first round, which fills caches, does not count."""
    kernel, initrd, command_line, ram_mib, rounds = sys.argv[1:]
    config = MachineConfig(
        kernel, initrd=initrd, append=command_line, ram_mib=int(ram_mib), protocol="linux64", debug_exit="raw"
    )
    profiled, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "boot.hvprof")
        for turn in range(int(rounds) + 1):
            if turn % 2:
                profiled.append(boot_us(config, path))
            plain.append(boot_us(config))
            if not turn % 2:
                profiled.append(boot_us(config, path))
        profile = load(path)
        exits = profile.exits.layer("user").count
        if sum(len(chunk.row) for chunk in profile.trace()) != exits or "outcome" not in profile.info:
            sys.exit(f"the profile is not whole: {profile.notes}")
    (with_profile, endings), (without, _) = (list(zip(*runs[1:], strict=True)) for runs in (profiled, plain))
    print(json.dumps({"profiled": with_profile, "plain": without, "endings": endings, "exits": exits}))


if __name__ == "__main__":
    main()

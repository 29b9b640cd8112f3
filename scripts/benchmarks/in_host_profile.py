"""Boots a Linux kernel under hv with a profile of every exit and without one, in turn. Runs inside the emulated host.

Arguments: VMLINUX INITRD COMMAND-LINE RAM-MIB ROUNDS. Prints JSON: for each side a list, one entry a round, of
microseconds as in_host.py has them, and how many exits the last profile has.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from in_host import ours_us

from hypervisor.profile.file import load


def main() -> None:
    """Alternate between the two; the first round, which fills caches, does not count."""
    kernel, initrd, command_line, ram_mib, rounds = sys.argv[1:]
    profiled, plain = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "boot.hvprof")
        for turn in range(int(rounds) + 1):
            if turn % 2:
                profiled.append(ours_us(kernel, initrd, command_line, int(ram_mib), path))
            plain.append(ours_us(kernel, initrd, command_line, int(ram_mib)))
            if not turn % 2:
                profiled.append(ours_us(kernel, initrd, command_line, int(ram_mib), path))
        profile = load(path)
        exits = profile.exits.layer("user").count
        if sum(len(chunk.row) for chunk in profile.trace()) != exits or "outcome" not in profile.info:
            sys.exit(f"the profile is not whole: {profile.notes}")
    print(json.dumps({"profiled": profiled[1:], "plain": plain[1:], "exits": exits}))


if __name__ == "__main__":
    main()

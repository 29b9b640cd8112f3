"""Boots a Linux kernel under the minimal C VMM and under hv, in turn. Runs inside the emulated host.

Arguments: MINIMAL-VMM VMLINUX INITRD COMMAND-LINE RAM-MIB ACPI-TABLES ROUNDS. Prints JSON: for each side a list, one
entry a round, of microseconds from the guest's first instruction to the write by /init that ends the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from hypervisor import Machine, MachineConfig


def theirs_us(command: list[str]) -> int:
    """Boot under the C VMM, which times itself."""
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def ours_us(kernel: str, initrd: str, command_line: str, ram_mib: int, profile: str | None = None) -> int:
    """Boot under hv, by the same entry; `profile` is a file to record every exit in."""
    config = MachineConfig(
        kernel, initrd=initrd, append=command_line, ram_mib=ram_mib, protocol="linux64", debug_exit="raw"
    )
    with Machine(config) as machine:
        if profile is not None:
            machine.record(profile)
        started = time.monotonic_ns()
        outcome = machine.run()
        taken = time.monotonic_ns() - started
        if outcome.status != 0:
            sys.exit(f"hv ended with {outcome!r}\n{outcome.detail}\n{machine.console.output.decode(errors='replace')}")
    return taken // 1000


def main() -> None:
    """Alternate between the two; the first round, which fills caches, does not count."""
    *command, rounds = sys.argv[1:]
    _, kernel, initrd, command_line, ram_mib, _ = command
    ours, theirs = [], []
    for turn in range(int(rounds) + 1):
        if turn % 2:
            ours.append(ours_us(kernel, initrd, command_line, int(ram_mib)))
        theirs.append(theirs_us(command))
        if not turn % 2:
            ours.append(ours_us(kernel, initrd, command_line, int(ram_mib)))
    print(json.dumps({"ours": ours[1:], "theirs": theirs[1:]}))


if __name__ == "__main__":
    main()

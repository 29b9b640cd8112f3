"""Starts and ends machines one after another and prints, as JSON, what they left behind.

Arguments: the folder of the hypervisor package, a kernel that exits at once, how many machines.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

WARM_UP = 6
"""Machines before the first count: they import modules, and fill the C library's pools of stacks and heaps."""


def counts() -> dict[str, int]:
    """Return how many file descriptors, threads and memory mappings this process has."""
    gc.collect()
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    return {
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": mappings,
    }


def main() -> None:
    """Count, run the machines, count again."""
    root, kernel, machines = sys.argv[1:]
    sys.path.insert(0, root)
    from hypervisor import Machine, MachineConfig  # noqa: PLC0415 - the path is known only now

    def run() -> None:
        with Machine(MachineConfig(kernel, ram_mib=16)) as machine:
            machine.run(timeout=60)

    for _ in range(WARM_UP):
        run()
    before = counts()
    for _ in range(int(machines)):
        run()
    after = counts()
    print(json.dumps({what: after[what] - before[what] for what in before}))


if __name__ == "__main__":
    main()

"""Options, and which benchmark is run when."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.table import CannotRunError, as_json, as_text
from benchmarks.tools import Settings
from hypervisor.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.table import Row

BENCHMARKS: Final = {
    "pio": ("exits", "a port access answered by a Python handler"),
    "lsr": ("exits", "a read of the UART's line status"),
    "console": ("exits", "a byte to the console through the UART"),
    "start": ("startup", "the whole run of a guest that exits at once, beside QEMU"),
    "linux": ("linux_boot", "Debian's kernel to /init in the emulated host (minutes)"),
    "disk": ("disk", "a virtio disk driven from ring 3, beside QEMU, and kvmtool if `lkvm` is on the PATH"),
    "net": ("net", "a virtio network driven from ring 3, on a TAP (root only), beside the same"),
    "fio": ("fio", "fio on a guest's disk in the emulated host, beside a loop device there (minutes)"),
    "profile": ("profile", "what recording exits costs, and what reading ten million of them does"),
    "profile-boot": ("profile", "Debian's kernel to /init in the emulated host, with every exit in a file (minutes)"),
    "reset": ("reset", "a running machine set back to a checkpoint"),
    "restore": ("restore", "a machine that goes on from a snapshot, to its first access"),
    "clones": ("restore", "a hundred machines at once from one snapshot: the memory that each takes"),
    "migration": ("migration", "a running machine moved to another process"),
    "fixture": ("fixture", "the pytest fixture between two tests, in the emulated host, beside a boot (minutes)"),
    "memory": ("resources", "the VMM's own memory while a guest runs"),
    "machines": ("resources", "16 machines, one after another in one process: what is left"),
}
"""Each benchmark with the module that has it, and what it is."""

DESCRIPTION: Final = """\
Measure hv and, in alternating rounds of the same run, what it is compared with; print ratios and whether they reach
the project's targets. Numbers are "minimum / median" of the rounds. Best on an otherwise idle machine."""
EPILOG: Final = "benchmarks:\n" + "\n".join(f"  {name:12} {what}" for name, (_, what) in BENCHMARKS.items())
EPILOG_STATUS: Final = "\n\nexit status: 0, also when targets are missed; 1 a benchmark could not be run; 2 wrong usage"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=DESCRIPTION,
        epilog=EPILOG + EPILOG_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--only", action="append", choices=list(BENCHMARKS), metavar="NAME", help="run this; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="few short rounds: shows that all works, says little else")
    parser.add_argument("--json", action="store_true", help="print JSON, every round's value in it")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the benchmarks and return the exit status."""
    options = _parser().parse_args(argv)
    rows: list[Row] = []
    failures: dict[str, str] = {}
    say = partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="hv-bench-") as scratch:
        settings = Settings(options.quick, Path(scratch), say)
        for name in options.only or BENCHMARKS:
            say(f"bench: {name}: {BENCHMARKS[name][1]}")
            try:
                rows += import_module(f"benchmarks.{BENCHMARKS[name][0]}").measure(settings, name)
            except (CannotRunError, VmmError, OSError) as error:
                failures[name] = str(error)
                say(f"bench: {name} could not be run: {error}")
    print(as_json(rows, failures) if options.json else as_text(rows))
    return 1 if failures else 0

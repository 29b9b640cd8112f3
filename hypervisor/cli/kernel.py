"""`hv kernel`: the guest kernels that have a name."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

    from hypervisor.kernels import Listing

SUMMARY: Final = "list, get and find guest kernels"
DESCRIPTION: Final = """\
Guest kernels that `hv run` takes by name: the distribution's stock kernel, a small Linux built from its source package,
and small guests in assembly. They are kept in ${XDG_CACHE_HOME:-~/.cache}/trapvisor and checked by hash."""
EPILOG: Final = """\
examples:
  hv kernel list
  hv kernel get debian tiny
  hv kernel path debian --elf
  make -C $(hv kernel headers debian) M=$PWD modules
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv kernel`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("list", help="show all kernels and which of them are here").add_argument
    add("--json", action="store_true", help="as a JSON array")
    getter = actions.add_parser("get", help="fetch or build kernels that are not here, and check those that are")
    add = getter.add_argument
    add("names", nargs="*", metavar="NAME", help="kernels to get")
    add("--all", action="store_true", help="all of them")
    add("--update", action="store_true", help="look for newer versions of those that are here")
    add = actions.add_parser("path", help="print the path of a kernel's image").add_argument
    add("name", metavar="NAME")
    add("--elf", action="store_true", help="of its ELF file (vmlinux) instead")
    add("--json", action="store_true", help="all that is known of it, as a JSON object")
    headers = actions.add_parser("headers", help="print the folder for `make -C` that builds modules for a kernel")
    headers.add_argument("name", metavar="NAME")
    headers.add_argument("--check", action="store_true", help="hash every file of it first")


def run(options: argparse.Namespace) -> int:
    """Do one of list, get, path, headers."""
    action = {"list": _list, "get": _get, "path": _path, "headers": _headers}[options.action]
    action(options)
    return 0


def _list(options: argparse.Namespace) -> None:
    from hypervisor import kernels

    lines = kernels.listing()
    if options.json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        print(_table(lines))


def _table(lines: list[Listing]) -> str:
    rows = [("NAME", "KIND", "STATE", "SIZE", "VERSION", "SUMMARY")]
    for line in lines:
        size = _size(line.size) if line.size else "-"
        rows.append((line.name, line.kind, line.state, size, line.version or "-", line.summary))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1_000_000 else f"{size / 1e3:.1f} kB"


def _get(options: argparse.Namespace) -> None:
    from hypervisor import kernels
    from hypervisor.errors import ConfigError
    from hypervisor.kernels import progress

    names = kernels.names() if options.all else options.names
    if not names:
        raise ConfigError("no kernel is named", hint="hv kernel get NAME...; --all gets all of them")
    for name in names:
        kernels.check_name(name)  # a wrong one among them shall not cost the time of the others
    reporter = progress.for_stream(sys.stderr)
    try:
        for name in names:
            kernel = kernels.get(name, update=options.update, progress=reporter)
            if kernel.is_linux:
                kernels.default_initramfs(name)  # now, so that a run needs no tools and no writable cache
            reporter.end()
            print(f"{name} {kernel.version}: {kernel.image}")
            for note in kernel.notes:
                reporter.say(f"  {note}")
    finally:
        reporter.end()


def _path(options: argparse.Namespace) -> None:
    from hypervisor import kernels

    if options.json:
        facts = kernels.kernel(options.name)._asdict()
        print(json.dumps(facts, indent=2, default=str))
    else:
        print(kernels.vmlinux(options.name) if options.elf else kernels.path(options.name))


def _headers(options: argparse.Namespace) -> None:
    from hypervisor.kernels import headers, progress

    reporter = progress.for_stream(sys.stderr)
    try:
        folder = headers.ensure(options.name, check=options.check, progress=reporter)
    finally:
        reporter.end()
    print(folder)

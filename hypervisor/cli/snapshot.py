"""`hv snapshot`: what a saved machine is, whether it is whole and runs here, and what tells two of them apart."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hypervisor.snapshot.compare import Change, PageRange
    from hypervisor.snapshot.fit import Problem
    from hypervisor.snapshot.store import Snapshot

SUMMARY: Final = "save running machines, go on from saved ones, and look at them"
DESCRIPTION: Final = """\
A snapshot is a directory with everything that a machine was at one moment: manifest.json, which jq reads, its memory,
and the layers of its disks. Everything in it has a hash.

  hv snapshot save MACHINE NAME   save a running machine, while it goes on or to suspend it
  hv snapshot restore NAME  run a machine that goes on from there, once or many times
  hv snapshot info NAME     what it is, from when, and what it takes on the disk
  hv snapshot check NAME    whether it is whole, and what this host lacks for it
  hv snapshot diff A B      registers, devices and pages of memory that differ"""
EPILOG: Final = """\
examples:
  hv snapshot save web booted
  hv snapshot restore booted --clone
  hv snapshot info booted
  hv snapshot check booted --no-memory
  hv snapshot diff booted later --symbols vmlinux
  jq '.state.kvm.vcpus[0].registers' booted/manifest.json
"""
CHECK_EPILOG: Final = """\
exit status: 0 it is whole and runs here; 1 not; 2 bad usage, or no snapshot that this hv reads
"""
JSON_VERSION: Final = 1
NOT_FINE: Final = 1
TOP: Final = 20
NAMES: Final = 3
MOST_HEX: Final = 32


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv snapshot`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, epilog: str | None = None) -> Callable[..., Any]:
        form = parser.formatter_class
        return actions.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=form
        ).add_argument

    from hypervisor.cli import saving

    form = parser.formatter_class
    save = "save a running machine to a snapshot"
    saving.configure_save(
        actions.add_parser("save", help=save, description=save, epilog=saving.SAVE_EPILOG, formatter_class=form)
    )
    back = "run a machine that goes on from a snapshot"
    saving.configure_restore(
        actions.add_parser("restore", help=back, description=back, epilog=saving.RESTORE_EPILOG, formatter_class=form)
    )
    add = action("info", "say what a snapshot is")
    add("name", metavar="NAME", help="the snapshot's directory")
    add("--json", action="store_true", help="as a JSON object")
    add = action("check", "verify a snapshot, and say what this host lacks for it", CHECK_EPILOG)
    add("name", metavar="NAME", help="the snapshot's directory")
    add("--json", action="store_true", help="as a JSON object")
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="verify the memory, too, some GB a second (default)",
    )
    add = action("diff", "say what differs between two snapshots: registers, devices, pages of memory")
    add("before", metavar="A", help="a snapshot's directory")
    add("after", metavar="B", help="another's")
    add("--json", action="store_true", help="as a JSON object, with all pages")
    add(
        "--symbols",
        metavar="FILE",
        help="System.map or ELF of the guest's kernel; else its own table in memory is used",
    )
    add("--top", type=int, metavar="N", default=TOP, help=f"ranges of pages that are listed (default {TOP})")


def run(options: argparse.Namespace) -> int:
    """Do one of save, restore, info, check, diff."""
    from hypervisor.cli.saving import restore, save

    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "save": save,
        "restore": restore,
        "info": _info,
        "check": _check,
        "diff": _diff,
    }
    return actions[options.action](options)


def _clean(text: object) -> str:
    """Return what a terminal can show of a text that comes from a file."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _size(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} bytes"


# --- info -------------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from hypervisor.snapshot.store import Snapshot

    with Snapshot.open(options.name) as snapshot:
        facts = _facts(snapshot)
    if options.json:
        print(json.dumps({"version": JSON_VERSION} | facts, indent=2))
    else:
        print("\n".join(map(_clean, _info_lines(facts))))
    return 0


def _on_disk(path: str) -> int:
    """Return the bytes that a file takes: holes take none."""
    return os.stat(path).st_blocks * 512


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    from hypervisor.errors import SnapshotError
    from hypervisor.snapshot.fit import words

    manifest, memory = snapshot.manifest, snapshot.manifest.memory
    missing = None
    chain = [snapshot]
    try:
        chain = snapshot.chain()
    except SnapshotError as error:
        missing = words(error)
    layers = [one._asdict() | {"on_disk": _on_disk(one.path)} for one in snapshot.layers()]
    place = _on_disk(os.path.join(snapshot.path, "memory"))
    whole = sum(entry.stat().st_blocks * 512 for entry in os.scandir(snapshot.path) if entry.is_file())
    return {
        "path": snapshot.path,
        "id": snapshot.id,
        "format": manifest.version,
        "hv": manifest.hv,
        "saved": manifest.saved,
        "machine": _shown(snapshot.machine),
        "host": _shown(snapshot.host),
        "memory": {
            "size": memory.size,
            "codec": memory.codec,
            "chunk": memory.chunk,
            "zero": memory.zero,
            "data": memory.data,
            "base": memory.base,
            "stored": memory.stored,
            "on_disk": place,
        },
        "layers": layers,
        "parents": [{"path": one.path, "id": one.id, "saved": one.manifest.saved} for one in chain[1:]],
        "parent_missing": missing,
        "on_disk": whole,
    }


def _shown(value: Any) -> Any:
    """Return plain values as JSON has them; bytes only by their number."""
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else value


def _devices(machine: dict[str, Any]) -> Iterator[str]:
    """Yield the devices of a description in words; it is a file's, and may be anything."""
    for many, one, key in (("disks", "disk", "path"), ("nets", "net", "kind"), ("ports", "port", "name")):
        rows = machine.get(many)
        for row in rows if isinstance(rows, list) else ():
            yield f"{one} {row.get(key) or '(console)'}" if isinstance(row, dict) else one
    yield from (name for name in ("rng", "vsock", "balloon") if machine.get(name) is not None)


def _info_lines(facts: dict[str, Any]) -> Iterator[str]:
    machine, memory, host = facts["machine"], facts["memory"], facts["host"]
    yield f"{facts['path']}: a machine saved at {facts['saved']} by hv {facts['hv']} (format {facts['format']})"
    yield f"  id        {facts['id']}"
    cpus = machine.get("cpus", "unknown")
    yield f"  machine   {machine.get('kernel') or 'no kernel is named'}, {cpus} vCPUs, {_size(memory['size'])} of RAM"
    yield f"  devices   {', '.join(_devices(machine)) or 'no virtio devices'}"
    if host:
        yield f"  host      {host.get('vendor', 'unknown')}, Linux {host.get('kernel', 'unknown')}"
    codec = "" if memory["codec"] == "raw" else f" in {memory['codec']}"
    kinds = f"{memory['data']} here{codec}, {memory['zero']} of zeros"
    if facts["parents"] or facts["parent_missing"]:
        kinds += f", {memory['base']} the parent's"
    yield f"  memory    chunks of {_size(memory['chunk'])}: {kinds}; {_size(memory['on_disk'])} on disk"
    for layer in facts["layers"]:
        yield f"  layer     {layer['name']}, {_size(layer['size'])}; {_size(layer['on_disk'])} on disk"
    for one in facts["parents"]:
        yield f"  parent    {one['path']}, saved at {one['saved']}, id {one['id']}"
    if facts["parent_missing"]:
        yield f"  parent    {facts['parent_missing']}"
    yield f"  in all    {_size(facts['on_disk'])} on disk"


# --- check ------------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    from hypervisor.errors import DamagedSnapshotError, SnapshotError
    from hypervisor.snapshot import fit
    from hypervisor.snapshot.store import Snapshot

    problems: list[Problem] = []
    snapshot_id = None
    try:
        with Snapshot.open(options.name) as snapshot:
            snapshot_id = snapshot.id
            problems += fit.problems(snapshot)
            if not any(problem.kind == "parent" for problem in problems):
                snapshot.verify(memory=options.memory)
            else:
                snapshot.verify_layers()
                if options.memory:
                    snapshot.memory.verify()
    except SnapshotError as error:
        if not isinstance(error, DamagedSnapshotError):
            raise
        facts = {"file": error.file, "chunk": error.chunk, "gpa": error.gpa}
        problems.insert(0, fit.Problem("damage", fit.words(error), facts))
    if options.json:
        print(json.dumps(_check_json(options, snapshot_id, problems), indent=2))
    else:
        for problem in problems:
            print(_clean(f"{problem.kind}: {problem.text}"))
        if not problems:
            part = "" if options.memory else ", but for its memory, which was not read"
            print(_clean(f"{options.name} is whole{part}, and runs on this host"))
    return NOT_FINE if problems else 0


def _check_json(options: argparse.Namespace, snapshot_id: str | None, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "version": JSON_VERSION,
        "path": options.name,
        "id": snapshot_id,
        "ok": not problems,
        "memory_verified": options.memory,
        "problems": [{"kind": one.kind, "text": one.text} | one.facts for one in problems],
    }


# --- diff -------------------------------------------------------------------------------------------------------------


def _diff(options: argparse.Namespace) -> int:
    from hypervisor.errors import ConfigError
    from hypervisor.snapshot import compare
    from hypervisor.snapshot.store import Snapshot

    if options.top < 0:
        raise ConfigError(f"--top {options.top}", hint="it is a number of ranges")
    symbols = _symbols(options.symbols)
    with (
        Snapshot.open(options.before) as before,
        Snapshot.open(options.after) as after,
        compare.SavedMemory(before) as one,
        compare.SavedMemory(after) as other,
    ):
        found = [
            *compare.changes(before.machine, after.machine, "machine"),
            *compare.changes(before.state, after.state),
        ]
        ranges = compare.changed_pages(before, after, (one, other))
        memory: Any = other
        names = compare.kernel_symbols(memory, symbols) if ranges else None
        if names is not None:
            ranges = compare.name_ranges(ranges, names)
        elif ranges and symbols is not None:
            print(f"hv: {_clean(options.symbols)}: no kernel with these symbols is in memory", file=sys.stderr)
        sizes = one.size, other.size
    if options.json:
        print(json.dumps(_diff_json(options, found, ranges, sizes), indent=2))
    else:
        print("\n".join(map(_clean, _diff_lines(found, ranges, sizes, options.top))))
    return 0


def _symbols(path: str | None) -> Any:
    if path is None:
        return None
    from hypervisor.symbols import Symbols

    return Symbols.load(path)


def _diff_json(
    options: argparse.Namespace, found: Sequence[Change], ranges: Sequence[PageRange], sizes: tuple[int, int]
) -> dict[str, Any]:
    return {
        "version": JSON_VERSION,
        "before": options.before,
        "after": options.after,
        "state": [
            {"path": one.path, "before": _json_value(one.before), "after": _json_value(one.after)} for one in found
        ],
        "ram_bytes": list(sizes),
        "changed_pages": sum(one.pages for one in ranges),
        "ranges": [one._asdict() for one in ranges],
    }


def _json_value(value: object) -> Any:
    from hypervisor.snapshot.compare import ABSENT

    if value is ABSENT:
        return None
    return value.hex() if isinstance(value, bytes) else _hexed(value)


def _hexed(value: Any) -> Any:
    """Return plain values as JSON has them, bytes in hexadecimal."""
    if isinstance(value, dict):
        return {key: _hexed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hexed(item) for item in value]
    return value.hex() if isinstance(value, bytes) else value


def _diff_lines(
    found: Sequence[Change], ranges: Sequence[PageRange], sizes: tuple[int, int], top: int
) -> Iterator[str]:
    if not found and not ranges and sizes[0] == sizes[1]:
        yield "no difference"
        return
    for change in found:
        yield f"{change.path}: {_change_text(change.before, change.after)}"
    if sizes[0] != sizes[1]:
        yield f"RAM: {_size(sizes[0])} -> {_size(sizes[1])}"
    pages = sum(one.pages for one in ranges)
    yield f"memory: {pages} pages differ, in {len(ranges)} ranges"
    for one in sorted(ranges, key=lambda item: -item.pages)[:top]:
        names = ", ".join(one.symbols[:NAMES])
        more = f" and {len(one.symbols) - NAMES} more" if len(one.symbols) > NAMES else ""
        yield f"  {one.gpa:#12x}  {one.pages:6} {'page ' if one.pages == 1 else 'pages'}  {names}{more}".rstrip()
    if len(ranges) > top:
        yield f"  and {len(ranges) - top} ranges more (--top)"


def _change_text(before: object, after: object) -> str:
    if isinstance(before, bytes) and isinstance(after, bytes):
        length = min(len(before), len(after))
        places = [at for at in range(length) if before[at] != after[at]]
        if len(before) != len(after):
            return f"{len(before)} bytes -> {len(after)} bytes"
        start = places[0]
        end = min(places[-1] + 1, start + MOST_HEX)
        return (
            f"{len(places)} of {length} bytes, from {start:#x} on:"
            f" {before[start:end].hex(' ')} -> {after[start:end].hex(' ')}"
        )
    return f"{_word(before)} -> {_word(after)}"


def _word(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        text = repr(_shown(value))
        return text if len(text) <= 200 else f"{text[:200]}..."
    return f"{value:#x}"

"""Coverage-guided fuzzing of what reads snapshots, one target each (needs atheris, the `fuzz` extra).

    python tests/fuzz/fuzz_snapshot.py TARGET [libFuzzer options]      e.g. manifest -runs=20000
    python tests/fuzz/fuzz_snapshot.py list

The property is that of the unit tests: whatever the bytes, what was saved or an error of one line. The digests are made
to fit, or nothing behind them would ever be reached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import atheris
import xxhash
import zstandard

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["hypervisor.snapshot"]):
    from snapshots import MANIFEST, ram, save, sealed

    from hypervisor.errors import DamagedSnapshotError, SnapshotError
    from hypervisor.snapshot import manifest
    from hypervisor.snapshot.manifest import MemoryEntry, Range
    from hypervisor.snapshot.memoryfile import Index, MemoryFile, write_memory
    from hypervisor.snapshot.whole import put_together

if TYPE_CHECKING:
    from collections.abc import Callable

CHILD = "--child"
PAGE = 4096


def written() -> bytes:
    """Return a sound manifest."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "s"), ram(1), layers={"disk-0": b"layer"}, state={"a": [b"bytes", {"b": None}]})
        return Path(folder, "s", MANIFEST).read_bytes()


TEXT = written()


def read(text: bytes) -> None:
    """Read a manifest; whatever is wrong is an error of one line."""
    one_line = True
    try:
        found, _ = manifest.decode(text, "m")
        for what in ("state", "machine", "host"):
            manifest.values(getattr(found, what), "m", what)
        assert 0 < found.memory.size == sum(place.size for place in found.memory.ranges)
        assert all("/" not in layer.name and layer.name.strip(".") for layer in found.layers)
        assert found.parent is None or not found.parent.place().startswith("/")
    except SnapshotError as error:
        one_line = "\n" not in str(error)
    assert one_line


def fuzz_manifest(data: bytes) -> None:
    """Any manifest: with a digest that fits, and as it is."""
    read(sealed(data))
    read(data)


def fuzz_member(data: bytes) -> None:
    """A member of a sound manifest, chosen by the first bytes, is any JSON."""
    value = json.loads(TEXT)
    del value["digest"]
    place = value
    for byte in data[:3]:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = keys[byte % len(keys)]
        if byte < 128 and isinstance(place[key], dict | list) and place[key]:
            place = place[key]
        else:
            break
    else:
        key = next(iter(place)) if isinstance(place, dict) else 0
    place[key] = "MARK"
    read(sealed(json.dumps(value, separators=(",", ":")).encode()[:-1].replace(b'"MARK"', data[3:])))


MEMORY = ram(2, pages=1, dense=(0, 2))


def saved(*, compress: bool) -> tuple[int, MemoryEntry, bytes]:
    """Return a memory file with what the manifest says of it and its index."""
    fd = os.memfd_create("memory")
    ranges = [Range(0, len(MEMORY), 0)]
    return fd, *write_memory(fd, memoryview(MEMORY), ranges, compress=compress)


FILES = [saved(compress=False), saved(compress=True)]


def read_memory(fd: int, entry: MemoryEntry, index: bytes) -> None:
    """Verify memory and put it together; it is of its size, or something is wrong with it."""
    table = Index(index, entry.size)
    try:
        table.check(entry)
    except ValueError:
        return
    try:
        memory = MemoryFile(fd, "memory", entry, table)
        memory.verify()
        whole = put_together([memory], verify=True)
    except DamagedSnapshotError:
        return
    with open(whole, "rb") as file:
        assert len(file.read()) == entry.size


def fuzz_index(data: bytes) -> None:
    """Any records, raw and compressed."""
    for fd, entry, index in FILES:
        mask = data[: len(index)].ljust(len(index), b"\0")
        read_memory(fd, entry, bytes(a ^ b for a, b in zip(index, mask, strict=True)))


def fuzz_frame(data: bytes) -> None:
    """Any bytes in place of a compressed chunk, with hashes that fit."""
    entry = MemoryEntry(PAGE, 1 << 16, "zstd", (Range(0, PAGE, 0),), "0" * 32, len(data), 0, 1, 0)
    os.ftruncate(SCRATCH, 0)
    os.pwrite(SCRATCH, data, 0)
    content = xxhash.xxh3_128_digest(b"text " * 819 + b".")
    record = content + xxhash.xxh3_64_digest(data) + len(data).to_bytes(4, "little") + bytes([1, 0, 0, 0])
    read_memory(SCRATCH, entry, record)


SCRATCH = os.memfd_create("frame")
SEEDS: dict[str, list[bytes]] = {
    "manifest": [TEXT[:-46], TEXT, b'{"format":"trapvisor-snapshot","version":2'],
    "member": [b"\x80..-1", b"\x05\x81.[]", b"\x06\x82.{}", b'\x0b\x80.{"$base64":"AA=="}', b"\x05\x07\x00{}"],
    "index": [bytes(96), bytes([0] * 28 + [1]), bytes([0] * 24 + [1])],
    "frame": [zstandard.ZstdCompressor().compress(b"text " * 819 + b"."), zstandard.ZstdCompressor().compress(b"x")],
}
TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": fuzz_manifest,
    "member": fuzz_member,
    "index": fuzz_index,
    "frame": fuzz_frame,
}


def main(arguments: list[str]) -> int:
    """Write the seeds and run one target in a process of its own, as libFuzzer ends its process without a clean-up."""
    name = arguments[1] if len(arguments) > 1 else ""
    if name == CHILD:
        atheris.Setup([arguments[0], *arguments[3:]], TARGETS[arguments[2]])
        atheris.Fuzz()
    if name not in TARGETS:
        print("\n".join(TARGETS))
        return 0 if name == "list" else 2
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(SEEDS[name]):
            Path(folder, f"seed{index}").write_bytes(seed)
        # libFuzzer adds what it finds to the first folder named, so the seeds come last.
        return subprocess.run([sys.executable, __file__, CHILD, *arguments[1:], folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""Coverage-guided fuzzing of the boot loaders, one target each (needs atheris, the `fuzz` extra).

    python tests/fuzz/fuzz_boot.py TARGET [libFuzzer options]      e.g. elf -runs=20000
    python tests/fuzz/fuzz_boot.py list

The property is that of the unit tests: whatever the bytes, a sound plan or an error of one line. A corpus folder may
be given among the options; the seeds below are tried first in every run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["hypervisor.boot"]):
    from bootplan import check_any
    from images import COMPRESSORS, MIB, Load, cpio, kernel_payload, multiboot_header, pvh_note
    from images import bzimage as write_bzimage
    from images import elf as write_elf

    from hypervisor.boot import bzimage, decompress, elf, flat, initrd, linux64, multiboot, pvh, sniff
    from hypervisor.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable

RAM = 64 * MIB
KERNEL = write_elf([Load(16 * MIB, b"\x90" * 40, 4096), Load(17 * MIB, b"data")], notes=pvh_note(16 * MIB + 8))
LOADED_TOGETHER = (bzimage, elf, flat, linux64, multiboot, pvh, sniff)
"""Imported above, where they are instrumented, although boot.plan imports them itself when it needs them."""


def fuzz_bzimage(data: bytes) -> None:
    """Any setup header, kernel left to the guest and unpacked here."""
    for who in ("guest", "host"):
        check_any(data, {"ram_bytes": RAM, "decompress": who, "initrd": INITRD, "command_line": "quiet"})


def fuzz_elf(data: bytes) -> None:
    """Any ELF header, every protocol."""
    for protocol in ("auto", "linux64", "pvh"):
        check_any(b"\x7fELF" + data, {"ram_bytes": RAM, "protocol": protocol, "initrd": INITRD})


def fuzz_multiboot(data: bytes) -> None:
    """Any multiboot header, in an ELF file and not, with modules."""
    modules = [("first", b"module", "arguments"), ("second", bytes(5000), "")]
    check_any(data, {"ram_bytes": RAM, "modules": modules, "command_line": "a b"})


def fuzz_decompress(data: bytes) -> None:
    """Any payload; what comes out never exceeds the limit."""
    with suppress(ImageError):
        out = decompress.unpack(memoryview(data), "k", limit=MIB)
        assert len(out) <= MIB or data.startswith(b"\x7fELF")


def fuzz_initrd(data: bytes) -> None:
    """Any initial RAM disk."""
    with suppress(ImageError):
        initrd.check(memoryview(data), "rd", limit=MIB)


INITRD = cpio({"init": b"#!/bin/sh\n"}, block=4)
ARCHIVES = [INITRD, *(pack(INITRD) for pack in COMPRESSORS.values())]
MULTIBOOT = [
    write_elf([Load(MIB, b"\xf4" * 64, 4096)], bits=32, front=multiboot_header(3)),
    multiboot_header(addresses=(MIB, MIB, 0, 0, MIB + 40)) + b"\xf4" * 60,
]
CHILD = "--child"
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "bzimage": (fuzz_bzimage, [write_bzimage(kernel_payload(form, KERNEL), sectors=1) for form in ("gzip", "lz4")]),
    "elf": (fuzz_elf, [KERNEL[4:], write_elf([Load(MIB, b"x")], bits=32, notes=pvh_note(MIB, 32))[4:]]),
    "multiboot": (fuzz_multiboot, MULTIBOOT),
    "decompress": (fuzz_decompress, [kernel_payload(form, KERNEL) for form in COMPRESSORS]),
    "initrd": (fuzz_initrd, [*ARCHIVES, b"".join(ARCHIVES)]),
}


def main(arguments: list[str]) -> int:
    """Write the seeds and run one target in a process of its own, as libFuzzer ends its process without a clean-up."""
    name = arguments[1] if len(arguments) > 1 else ""
    if name == CHILD:
        atheris.Setup([arguments[0], *arguments[3:]], TARGETS[arguments[2]][0])
        atheris.Fuzz()
    if name not in TARGETS:
        print("\n".join(TARGETS))
        return 0 if name == "list" else 2
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(TARGETS[name][1]):
            Path(folder, f"seed{index}").write_bytes(seed)
        # libFuzzer adds what it finds to the first folder named, so the seeds come last.
        return subprocess.run([sys.executable, __file__, CHILD, *arguments[1:], folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""Debian's kernel to /init in the emulated host, beside a minimal C VMM; both by the 64-bit entry."""

from __future__ import annotations

import json
from struct import pack
from typing import TYPE_CHECKING, Final

from benchmarks.guests import END
from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import ROOT, compiled, output_of
from devices.acpi_pm import S5_SLEEP_TYPE
from hypervisor import kernels
from hypervisor.boot.acpi import build_tables
from hypervisor.cpio import CpioWriter

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.tools import Settings

TARGET: Final = 1.15
COMMAND_LINE: Final = "console=ttyS0 quiet cryptomgr.notests panic=-1"
"""Without its self-tests of ciphers the kernel boots in half the time, which makes the VMM's share the larger."""
RAM_MIB: Final = 512
TIMEOUT_S: Final = 1800
INSIDE: Final = "scripts/benchmarks/in_host.py"

# mov eax, 172 (iopl); mov edi, 3; syscall; xor eax, eax; mov edx, END; out dx, al; jmp .
INIT_CODE: Final = b"\xb8\xac\x00\x00\x00\xbf\x03\x00\x00\x00\x0f\x05\x31\xc0\xba" + pack("<I", END) + b"\xee\xeb\xfe"
LOAD: Final = 0x400000


def init_program() -> bytes:
    """Return the whole user space: a static ELF program that ends the run through the debug-exit port."""
    start = 64 + 56
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    size = start + len(INIT_CODE)
    return header + pack("<IIQQQQQQ", 1, 5, 0, LOAD, LOAD, size, size, 0x1000) + INIT_CODE


def initramfs() -> bytes:
    """Return an archive with that program as /init, and the console that the kernel opens for it."""
    parts: list[bytes] = []
    archive = CpioWriter(lambda data: parts.append(bytes(data)))
    archive.folder("dev")
    archive.character_device("dev/console", 5, 1, 0o600)
    archive.file("init", init_program(), 0o755)
    archive.finish()
    return b"".join(parts)


def measure(settings: Settings, name: str) -> list[Row]:
    """Run both inside one emulated host, alternately."""
    program = compiled("minimal_vmm.c", "-static")
    kernels.ensure("debian")
    kernel = kernels.vmlinux("debian")
    archive = settings.scratch / "init.cpio"
    archive.write_bytes(initramfs())
    tables = settings.scratch / "acpi.bin"
    tables.write_bytes(build_tables(cpus=1, s5_sleep_type=S5_SLEEP_TYPE))
    files = [f"--with={source}" for source in (program, kernel, archive, tables)]
    rounds = str(settings.pick(6, 1))
    boot: list[str | Path] = [program, kernel, archive, COMMAND_LINE, str(RAM_MIB), tables]
    settings.say("bench: booting the emulated host; then two boots of Debian in it for every round")
    printed = output_of(
        [ROOT / "scripts" / "emulated-host", *files, "--", "python3", INSIDE, *boot, rounds], timeout=TIMEOUT_S
    )
    try:
        times = json.loads(printed)
    except ValueError as error:
        raise CannotRunError(f"the emulated host printed {printed!r}") from error
    ours, theirs = (Sample("s", [us / 1e6 for us in times[side]]) for side in ("ours", "theirs"))
    return [Row(name, "Debian's kernel, quiet, entry to /init", ours, theirs, "minimal C VMM", TARGET)]

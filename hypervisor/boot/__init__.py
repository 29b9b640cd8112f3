"""Boot loaders: bytes of a kernel in, a plan of what to put into RAM and how to start the CPU out.

No KVM and no machine here. `plan` tells the kinds of kernel apart by their content, never by their name:

* a Linux bzImage, by its 64-bit entry (`bzimage`), unpacked by the guest or on the host (`decompress`);
* an ELF kernel by the 64-bit entry of Linux or by PVH (`elf`, `pvh`);
* a multiboot 1 kernel, ELF or not (`multiboot`);
* and, where the user says so, a flat binary (`flat`).

Each loader is imported when a kernel of its kind is met.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.boot.image import BootPlan, BootRequest, Module, Segment, encode
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.boot.image import Buffer

__all__ = ["BootPlan", "Segment", "describe", "plan"]


def describe(data: Buffer) -> str:
    """Name a file's kind by its content, with an article, for messages: "a gzip file"."""
    from hypervisor.boot import sniff  # noqa: PLC0415 - only failures need it

    return sniff.describe(data)


def plan(  # noqa: PLR0913 - one keyword for each thing that the user may say
    kernel: Buffer,
    *,
    name: str,
    ram_bytes: int,
    initrd: Buffer | None = None,
    initrd_name: str = "initrd",
    modules: Sequence[tuple[str, Buffer, str]] = (),
    command_line: str = "",
    flat_bits: int | None = None,
    decompress: str = "guest",
    protocol: str = "auto",
    rsdp: int | None = None,
) -> BootPlan:
    """Plan how to boot a kernel.

    Args:
        kernel: the file's bytes; a memoryview of a mapped file is best, as segments are slices of it.
        name: the file's path, for messages.
        ram_bytes: RAM of the machine in all.
        initrd: the initial RAM disk; a multiboot kernel gets it as its first module.
        initrd_name: its path, for messages.
        modules: of a multiboot kernel: path, bytes, and the string that goes with it (by default the path).
        command_line: for the kernel; encoded as UTF-8.
        flat_bits: 16, 32 or 64 takes the file as a flat binary, whatever it is; None looks what it is.
        decompress: who unpacks a bzImage: "guest" or "host".
        protocol: how to enter an ELF kernel that has several entries: "auto" (see `elf`), "linux64", "pvh".
        rsdp: guest-physical address of the ACPI RSDP, None without ACPI.

    Raises:
        ImageError: if a file cannot be used; it names the file and what is wrong with it.
        ConfigError: if the options do not fit each other or the kernel, or RAM is too small.
    """
    for option, value, allowed in (
        ("--decompress", decompress, ("guest", "host")),
        ("--protocol", protocol, ("auto", "linux64", "pvh")),
        ("--flat", flat_bits, (None, 16, 32, 64)),
    ):
        if value not in allowed:
            choices = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise ConfigError(f"{option} {value} is unknown", hint=f"one of {choices}")
    data = memoryview(kernel).cast("B")
    if not data:
        raise ImageError(f"{name} is an empty file", hint="was the build or the download interrupted?")
    request = BootRequest(
        name=name,
        ram_bytes=ram_bytes,
        command_line=encode(command_line, "the kernel command line"),
        initrd=None if initrd is None else memoryview(initrd).cast("B"),
        initrd_name=initrd_name,
        modules=tuple(
            Module(path, memoryview(content).cast("B"), encode(string or path, f"the string of module {path}"))
            for path, content, string in modules
        ),
        protocol=protocol,
        rsdp=rsdp,
    )
    if flat_bits is not None:
        from hypervisor.boot import flat  # noqa: PLC0415 - one loader is ever needed

        return flat.plan(data, request, flat_bits)
    return _by_content(data, request, decompress)


def _by_content(data: memoryview, request: BootRequest, decompress: str) -> BootPlan:
    """Hand the kernel to the loader of its kind."""
    elf_file = bytes(data[:4]) == b"\x7fELF"
    # "MZ" or a jump: a bzImage begins with either. Only one of the loaders is imported.
    if not elf_file and bytes(data[0x202:0x206]) == b"HdrS":
        from hypervisor.boot import bzimage  # noqa: PLC0415 - one loader is ever needed

        if bzimage.is_bzimage(data):
            return bzimage.plan(data, request, decompress=decompress)
    if request.protocol == "auto" or not elf_file:
        from hypervisor.boot import multiboot  # noqa: PLC0415 - one loader is ever needed

        header = multiboot.find_header(data)
        if header is not None:
            if request.protocol != "auto":
                raise ConfigError(f"{request.name} is a multiboot kernel; it has no {request.protocol} entry")
            return multiboot.plan(data, request, header)
    if elf_file:
        from hypervisor.boot import elf  # noqa: PLC0415 - one loader is ever needed

        return elf.plan(data, request)
    from hypervisor.boot import sniff  # noqa: PLC0415 - only failures need it

    raise ImageError(f"{request.name} is {sniff.describe(data)}, no kernel", hint=sniff.advice(data))

"""Linux bzImage by the 64-bit entry of its boot protocol, 2.12 and later.

Fields, offsets and rules are those of "Details of Header Fields" and "64-bit Boot Protocol" in the kernel's
Documentation/arch/x86/boot.rst.

The protected-mode part is loaded at the address that the kernel prefers, so that it can unpack itself in place. With
`decompress="host"` the payload is unpacked here instead, and the ELF file in it is booted with a zero page made from
the same setup header: the guest skips its slowest step, and with it KASLR.
"""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor import layout
from hypervisor.boot.image import BootPlan, Placement, page_up
from hypervisor.boot.linux64 import Linux64
from hypervisor.boot.zeropage import HEADER, HEADER_END
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot.image import BootRequest

__all__ = ["SetupHeader", "is_bzimage", "parse", "plan", "unpack"]

SETUP_SECTS: Final = 0x1F1
SYSSIZE: Final = 0x1F4
BOOT_FLAG: Final = 0x1FE
JUMP: Final = 0x200
MAGIC: Final = 0x202
VERSION: Final = 0x206
KERNEL_VERSION: Final = 0x20E
LOADFLAGS: Final = 0x211
INITRD_ADDR_MAX: Final = 0x22C
KERNEL_ALIGNMENT: Final = 0x230
"""relocatable_kernel, one byte, follows it."""
XLOADFLAGS: Final = 0x236
CMDLINE_SIZE: Final = 0x238
PAYLOAD_OFFSET: Final = 0x248
"""payload_length follows it."""
PREF_ADDRESS: Final = 0x258
"""init_size follows it."""
SHORTEST: Final = 0x268
"""Where the header of protocol 2.12 ends, after handover_offset."""

SECTOR: Final = 512
OLD_SETUP_SECTS: Final = 4
"""What a setup_sects of zero means."""
PARAGRAPH: Final = 16
"""The unit of syssize."""
LOADED_HIGH: Final = 0x01
XLF_KERNEL_64: Final = 0x0001
PROTOCOL_2_12: Final = 0x020C
ENTRY_64: Final = 0x200
"""The 64-bit entry, from the start of the protected-mode part."""
RELEASE_MAX: Final = 256

_REBUILD = "boot its ELF file (vmlinux), or a 64-bit kernel from Linux 3.8 or later"
_DAMAGED = "copy or download the file again"


class SetupHeader(NamedTuple):
    """What this loader reads of a setup header.

    Attributes:
        release: first word of the kernel's version string, or "" when there is none.
        code: offset in the file of the protected-mode part.
        code_size: its bytes.
        command_line_limit: bytes of the longest command line, terminator not counted.
        initrd_highest: last address that the initial RAM disk may occupy.
        alignment: what the load address is a multiple of.
        relocatable: whether it runs where it is loaded rather than at pref_address.
        pref_address: where it likes to run.
        init_size: bytes that it needs from there before it reads the memory map.
        payload: offset in the file of the compressed kernel, 0 when not told.
        payload_size: its bytes.
        raw: the header from offset 0x1F1 of the file.
    """

    release: str
    code: int
    code_size: int
    command_line_limit: int
    initrd_highest: int
    alignment: int
    relocatable: bool
    pref_address: int
    init_size: int
    payload: int
    payload_size: int
    raw: bytes


def is_bzimage(data: memoryview) -> bool:
    """Tell whether the file has the boot flag and magic number of a Linux setup header."""
    return (
        len(data) >= VERSION + 2
        and bytes(data[BOOT_FLAG : BOOT_FLAG + 2]) == b"\x55\xaa"
        and bytes(data[MAGIC : MAGIC + 4]) == b"HdrS"
    )


def _check_protocol(data: memoryview, name: str) -> None:
    """Raise ImageError for a kernel without the 64-bit entry."""
    (version,) = unpack_from("<H", data, VERSION)
    if version < PROTOCOL_2_12:
        what = f"a Linux kernel of boot protocol {version >> 8}.{version & 0xFF:02}"
        raise ImageError(f"{name} is {what}; the 64-bit entry came with 2.12", hint=_REBUILD)
    end = JUMP + 2 + data[JUMP + 1]
    if len(data) < max(end, SHORTEST):
        raise ImageError(f"{name} is a truncated bzImage: only {len(data)} bytes", hint=_DAMAGED)
    if end < SHORTEST:
        raise ImageError(f"{name}: the setup header ends at {end:#x}, protocol 2.12 needs it to {SHORTEST:#x}")
    (flags,) = unpack_from("<H", data, XLOADFLAGS)
    if not flags & XLF_KERNEL_64:
        raise ImageError(f"{name} is a 32-bit Linux kernel: it has no 64-bit entry", hint="use an x86-64 kernel")
    if not data[LOADFLAGS] & LOADED_HIGH:
        raise ImageError(f"{name} is a zImage, which loads below 1 MiB", hint="use a bzImage")


def parse(data: memoryview, name: str) -> SetupHeader:
    """Read and check the setup header of a file that `is_bzimage` accepts.

    Raises:
        ImageError: for an old protocol, a kernel without the 64-bit entry, a truncated file, or fields that
            contradict each other.
    """
    _check_protocol(data, name)
    code = ((data[SETUP_SECTS] or OLD_SETUP_SECTS) + 1) * SECTOR
    (paragraphs,) = unpack_from("<I", data, SYSSIZE)
    code_size = paragraphs * PARAGRAPH
    if len(data) < code + code_size:
        raise ImageError(
            f"{name} is a truncated bzImage: {code + code_size} bytes by its header, {len(data)} in the file",
            hint=_DAMAGED,
        )
    offset, length = unpack_from("<II", data, PAYLOAD_OFFSET)
    alignment, relocatable = unpack_from("<IB", data, KERNEL_ALIGNMENT)
    pref_address, init_size = unpack_from("<QI", data, PREF_ADDRESS)
    if code_size <= ENTRY_64:
        raise ImageError(f"{name}: the bzImage ends before its 64-bit entry", hint=_DAMAGED)
    if offset + length > code_size:
        raise ImageError(f"{name}: the payload of the bzImage lies outside it", hint=_DAMAGED)
    if alignment < PARAGRAPH or alignment & (alignment - 1):
        raise ImageError(f"{name}: kernel_alignment {alignment:#x} is no power of two from 16", hint=_DAMAGED)
    if pref_address < layout.HIGH_MEMORY:
        raise ImageError(f"{name}: pref_address {pref_address:#x} is below 1 MiB", hint=_DAMAGED)
    return SetupHeader(
        release=_release(data, code),
        code=code,
        code_size=code_size,
        command_line_limit=unpack_from("<I", data, CMDLINE_SIZE)[0],
        initrd_highest=unpack_from("<I", data, INITRD_ADDR_MAX)[0],
        alignment=alignment,
        relocatable=bool(relocatable),
        pref_address=pref_address,
        init_size=init_size,
        payload=code + offset if offset else 0,
        payload_size=length,
        raw=bytes(data[HEADER : min(JUMP + 2 + data[JUMP + 1], HEADER_END)]),
    )


def _release(data: memoryview, code: int) -> str:
    """Return the first word of the version string, as `uname -r` prints it; "" when there is none."""
    (pointer,) = unpack_from("<H", data, KERNEL_VERSION)
    start = pointer + JUMP
    if not pointer or start >= code:
        return ""
    text = bytes(data[start : min(start + RELEASE_MAX, code)]).split(b"\0")[0]
    word = text.split(b" ")[0].decode("ascii", "replace")
    return word if word.isprintable() else ""


def plan(data: memoryview, request: BootRequest, *, decompress: str) -> BootPlan:
    """Place a bzImage.

    Args:
        data: the file.
        request: what to boot.
        decompress: "guest" lets the kernel unpack itself, "host" unpacks it here.

    Raises:
        ImageError: if the file cannot be used.
        ConfigError: if the options do not fit the file, or RAM is too small.
    """
    if request.modules:
        raise ConfigError(f"{request.name} is a bzImage; only a multiboot kernel takes modules", hint="use --initrd")
    header = parse(data, request.name)
    title = f"bzImage {header.release}".rstrip()
    if decompress == "host":
        from hypervisor.boot import elf  # noqa: PLC0415 - a guest that unpacks itself needs neither

        kernel = unpack(data, header, request)
        return elf.plan(kernel, request, header=header, title=f"{title} unpacked on the host")
    if request.protocol == "pvh":
        raise ConfigError(
            f"{request.name} is a bzImage: its PVH entry is in the compressed kernel", hint="add --decompress host"
        )
    load = layout.HIGH_MEMORY
    run = header.pref_address
    if header.relocatable:
        load = run = -(-header.pref_address // header.alignment) * header.alignment
    # From load to the end of what it needs while it unpacks itself; a kernel that moves itself needs both ranges.
    end = max(load + header.code_size, run + header.init_size)
    boot = Linux64(request, end, header)
    boot.placement.put("the kernel", load, data[header.code : header.code + header.code_size], end - load)
    state = boot.finish(load + ENTRY_64, load)
    kind = f"{title}, 64-bit entry"
    release = header.release or None
    return BootPlan(boot.placement.segments, state, kind, is_linux=True, release=release, symbols=None)


def unpack(data: memoryview, header: SetupHeader, request: BootRequest) -> memoryview:
    """Decompress the kernel out of a bzImage; return the ELF file.

    The output is bounded by the header's init_size, and that by the machine's RAM.

    Raises:
        ImageError: if the compression is one that this host cannot undo, or the payload is damaged.
        ConfigError: if the machine has too little RAM for the kernel.
    """
    from hypervisor.boot import decompress  # noqa: PLC0415 - see its caller

    need = header.pref_address + header.init_size
    later = 0 if request.initrd is None else page_up(len(request.initrd))
    Placement(request.name, request.ram_bytes, later).require("the kernel", need)
    if not header.payload:
        raise ImageError(f"{request.name}: the bzImage does not say where its payload is", hint="--decompress guest")
    payload = data[header.payload : header.payload + header.payload_size]
    return decompress.unpack(payload, request.name, limit=header.init_size)

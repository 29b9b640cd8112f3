"""Naming what a file is, for the message when it is not what was wanted. Only failures import this."""

from __future__ import annotations

from struct import unpack_from
from typing import TYPE_CHECKING, Final

from hypervisor.boot.bzimage import is_bzimage

if TYPE_CHECKING:
    from hypervisor.boot.image import Buffer

__all__ = ["advice", "describe"]

UNPACK: Final = "decompress it first"
DISK: Final = "a kernel is a file inside it; copy that out"
OTHER_MACHINE: Final = "use a kernel built for x86-64"
WHAT_BOOTS: Final = (
    "a kernel is a Linux bzImage, an x86-64 vmlinux, a PVH or multiboot 1 kernel, "
    "or any binary with --flat 16, 32 or 64"
)

# Offset in the file, bytes to find there, what the file is, what to do; the first match counts.
_SIGNATURES: Final = (
    (0, b"\x1f\x8b", "a gzip file", UNPACK),
    (0, b"\xfd7zXZ\0", "an xz file", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", UNPACK),
    (0, b"\x02\x21\x4c\x18", "an lz4 file (legacy format)", UNPACK),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", UNPACK),
    (0, b"BZh", "a bzip2 file", UNPACK),
    (0, b"\x89LZO\0", "an lzop file", UNPACK),
    (0, b"PK\x03\x04", "a zip file", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-zip file", "unpack it first"),
    (0, b"07070", "a cpio archive", "it is an initrd, perhaps: --initrd"),
    (257, b"ustar", "a tar archive", "unpack it first"),
    (0, b"!<arch>\ndebian-binary", "a Debian package", "unpack it with dpkg -x"),
    (0, b"!<arch>\n", "an ar archive", WHAT_BOOTS),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "unpack it first"),
    (0, b"QFI\xfb", "a qcow2 disk image", DISK),
    (0, b"KDMV", "a VMDK disk image", DISK),
    (0, b"vhdxfile", "a VHDX disk image", DISK),
    (0, b"conectix", "a VHD disk image", DISK),
    (0x40, b"\x7f\x10\xda\xbe", "a VirtualBox disk image", DISK),
    (0x8001, b"CD001", "an ISO 9660 image", DISK),
    (0, b"hsqs", "a squashfs image", DISK),
    (0, b"XFSB", "an XFS file system image", DISK),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system image", DISK),
    (0x10040, b"_BHRfS_M", "a btrfs file system image", DISK),
    (0x38, b"ARM\x64", "an arm64 Linux Image", OTHER_MACHINE),
    (0x38, b"RSC\x05", "a RISC-V Linux Image", OTHER_MACHINE),
    (0x24, b"\x18\x28\x6f\x01", "a 32-bit ARM Linux zImage", OTHER_MACHINE),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage", "take the kernel out of it with dumpimage"),
    (0, b"\xd0\x0d\xfe\xed", "a flattened device tree or FIT image", WHAT_BOOTS),
    (0, b"ANDROID!", "an Android boot image", "take the kernel out of it"),
    (0, b"\xfe\xed\xfa\xce", "a Mach-O file", OTHER_MACHINE),
    (0, b"\xfe\xed\xfa\xcf", "a Mach-O file", OTHER_MACHINE),
    (0, b"\xce\xfa\xed\xfe", "a Mach-O file", OTHER_MACHINE),
    (0, b"\xcf\xfa\xed\xfe", "a Mach-O file", OTHER_MACHINE),
    (0, b"\xca\xfe\xba\xbe", "a universal Mach-O or Java class file", OTHER_MACHINE),
    (0, b"\0asm", "a WebAssembly module", WHAT_BOOTS),
    (0, b"#!", "a script", WHAT_BOOTS),
)

_PE_MACHINES: Final = {0x14C: "i386", 0x8664: "x86-64", 0x1C4: "ARM", 0xAA64: "AArch64", 0x5064: "RISC-V"}

_ELF_MACHINES: Final = {
    2: "SPARC",
    3: "i386",
    4: "m68k",
    8: "MIPS",
    15: "PA-RISC",
    20: "PowerPC",
    21: "PowerPC64",
    22: "S/390",
    40: "ARM",
    42: "SuperH",
    43: "SPARC V9",
    50: "IA-64",
    62: "x86-64",
    83: "AVR",
    183: "AArch64",
    243: "RISC-V",
    247: "BPF",
    258: "LoongArch",
}
_ELF_TYPES: Final = {1: "relocatable object", 2: "executable", 3: "shared object", 4: "core dump"}

TEXT_SAMPLE: Final = 512
HEADER_SEEN: Final = 0x208
"""From this many bytes on a bzImage can be told by its setup header from other files that begin with "MZ"."""


def describe(data: Buffer) -> str:
    """Name a file's kind by its content, with an article: "a gzip file", "a 64-bit ELF executable for AArch64"."""
    return _identify(memoryview(data).cast("B"))[0]


def advice(data: Buffer) -> str:
    """Say what to do about a file that was given as a kernel and is none."""
    return _identify(memoryview(data).cast("B"))[1]


def _identify(data: memoryview) -> tuple[str, str]:
    if not data:
        return "an empty file", "was the build or the download interrupted?"
    if bytes(data[:4]) == b"\x7fELF":
        return _elf(data), WHAT_BOOTS
    if is_bzimage(data):
        (version,) = unpack_from("<H", data, 0x206)
        return f"a Linux kernel of boot protocol {version >> 8}.{version & 0xFF:02}", WHAT_BOOTS
    for offset, magic, name, hint in _SIGNATURES:
        if bytes(data[offset : offset + len(magic)]) == magic:
            return name, hint
    return _without_signature(data)


def _without_signature(data: memoryview) -> tuple[str, str]:
    if bytes(data[:2]) == b"MZ":
        return _pe(data), "an EFI program needs firmware, which this machine does not have"
    if bytes(data[0x1FE:0x200]) == b"\x55\xaa":
        return "a boot sector or a disk image", "for a boot sector use --flat 16"
    head = bytes(data[:8192])
    if b"\xd6\x50\x52\xe8" in head:
        return "a multiboot 2 kernel", "build it for multiboot 1"
    if not any(bytes(data[start : start + 65536]).strip(b"\0") for start in range(0, len(data), 65536)):
        return f"{len(data)} zero bytes", "was the copy or the download interrupted?"
    if all(byte in b"\t\n\r\f\x1b" or byte >= 0x20 for byte in head[:TEXT_SAMPLE]) and _is_utf8(head[:TEXT_SAMPLE]):
        return "a text file", WHAT_BOOTS
    return "an unknown kind of file", WHAT_BOOTS


def _is_utf8(sample: bytes) -> bool:
    # The sample may end inside a character: up to three bytes of it are forgiven.
    for cut in range(4):
        try:
            sample[: len(sample) - cut].decode()
        except UnicodeDecodeError:
            continue
        return len(sample) > cut
    return False


def _elf(data: memoryview) -> str:
    if len(data) < 20:
        return "a truncated ELF file"
    bits = {1: "32-bit ", 2: "64-bit "}.get(data[4], "")
    order = "big-endian " if data[5] == 2 else ""
    kind, machine = unpack_from(">HH" if data[5] == 2 else "<HH", data, 16)
    what = _ELF_TYPES.get(kind, "file")
    return f"a {bits}{order}ELF {what} for {_ELF_MACHINES.get(machine, f'machine {machine}')}"


def _pe(data: memoryview) -> str:
    if len(data) < HEADER_SEEN:
        return f"the first {len(data)} bytes of a Linux bzImage, or a DOS or PE program"
    (offset,) = unpack_from("<I", data, 0x3C)
    if bytes(data[offset : offset + 4]) == b"PE\0\0" and offset + 6 <= len(data):
        (machine,) = unpack_from("<H", data, offset + 4)
        return f"a PE file (Windows or EFI program) for {_PE_MACHINES.get(machine, f'machine {machine:#x}')}"
    return "a DOS or PE program"

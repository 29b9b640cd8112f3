"""The CPU states that guests are entered in, as plain numbers, and the tables in RAM that belong to them.

Numbers and bits are those of the AMD64 Architecture Programmer's Manual, volume 2: control registers in section 3.1,
segment descriptors in 4.7 and 4.8.
"""

# Annotations are not postponed here: typing compiles each one of a NamedTuple that is, at every start.

from struct import pack
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor import layout

if TYPE_CHECKING:
    from hypervisor.boot.image import Placement

__all__ = [
    "EntryState",
    "SegmentRegister",
    "TableRegister",
    "long64",
    "protected32",
    "put_gdt",
    "put_page_tables",
    "real16",
]

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
"""Always one on any CPU of this century."""
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10

CODE_SELECTOR: Final = 0x10
"""__BOOT_CS of the Linux boot protocol."""
DATA_SELECTOR: Final = 0x18
"""__BOOT_DS of the Linux boot protocol."""

CODE: Final = 0xB
"""Descriptor type: code, execute/read, accessed."""
DATA: Final = 0x3
"""Descriptor type: data, read/write, accessed."""
TSS_BUSY: Final = 0xB
"""System descriptor type: busy 32-bit TSS, and busy 64-bit TSS in long mode."""
LDT: Final = 0x2

FLAT_LIMIT: Final = 0xFFFF_FFFF
REAL_LIMIT: Final = 0xFFFF

PTE_PRESENT_WRITABLE: Final = 0x3
PTE_LARGE: Final = 1 << 7
LARGE_PAGE: Final = 1 << 21
ENTRIES: Final = 512


class SegmentRegister(NamedTuple):
    """A segment register with its hidden part; fields are named as those of KVM's `struct kvm_segment`."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - the name that the manual and KVM give the bit
    g: int
    avl: int
    unusable: int


class TableRegister(NamedTuple):
    """GDTR or IDTR: linear address and limit in bytes."""

    base: int
    limit: int


class EntryState(NamedTuple):
    """Registers of the first CPU at its first instruction. What is not named here is as after a reset.

    Attributes:
        mode: "long64", "protected32" or "real16".
    """

    mode: str
    rip: int
    rsp: int
    rflags: int
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rbp: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    cs: SegmentRegister
    ds: SegmentRegister
    es: SegmentRegister
    fs: SegmentRegister
    gs: SegmentRegister
    ss: SegmentRegister
    tr: SegmentRegister
    ldt: SegmentRegister
    gdt: TableRegister
    idt: TableRegister


RFLAGS: Final = 0x2
"""Bit 1 is always one; interrupts, single-step and virtual-8086 mode off."""

_CODE64: Final = SegmentRegister(0, FLAT_LIMIT, CODE_SELECTOR, CODE, 1, 0, 0, 1, 1, 1, 0, 0)
_CODE32: Final = SegmentRegister(0, FLAT_LIMIT, CODE_SELECTOR, CODE, 1, 0, 1, 1, 0, 1, 0, 0)
_DATA32: Final = SegmentRegister(0, FLAT_LIMIT, DATA_SELECTOR, DATA, 1, 0, 1, 1, 0, 1, 0, 0)
_CODE16: Final = SegmentRegister(0, REAL_LIMIT, 0, CODE, 1, 0, 0, 1, 0, 0, 0, 0)
_DATA16: Final = SegmentRegister(0, REAL_LIMIT, 0, DATA, 1, 0, 0, 1, 0, 0, 0, 0)
# VM entry checks TR even when no task state is ever used: it must be a busy TSS.
_TASK: Final = SegmentRegister(0, 0x67, 0, TSS_BUSY, 1, 0, 0, 0, 0, 0, 0, 0)
_NO_LDT: Final = SegmentRegister(0, 0, 0, LDT, 0, 0, 0, 0, 0, 0, 0, 1)

_GDT: Final = TableRegister(layout.BOOT_GDT, 31)
_NO_IDT: Final = TableRegister(layout.BOOT_IDT, 0)
"""Limit 0: an exception before the guest has its own IDT is a triple fault, which the machine explains."""


def _descriptor(register: SegmentRegister) -> int:
    """Encode a flat 4 GiB segment as the eight bytes of a descriptor table entry."""
    access = register.type | register.s << 4 | register.dpl << 5 | register.present << 7
    flags = register.l << 1 | register.db << 2 | register.g << 3
    return 0xFFFF | access << 40 | 0xF << 48 | flags << 52


def put_gdt(placement: "Placement", *, long_mode: bool) -> None:
    """Put a GDT with flat code at selector 0x10 and flat data at 0x18, as the Linux boot protocol wants them."""
    code = _CODE64 if long_mode else _CODE32
    placement.put("the boot GDT", layout.BOOT_GDT, pack("<4Q", 0, 0, _descriptor(code), _descriptor(_DATA32)))


def put_page_tables(placement: "Placement") -> None:
    """Put page tables that map the first 4 GiB one to one by 2 MiB pages: PML4, PDPT, four page directories."""
    pml4 = layout.PAGE_TABLES
    pdpt = pml4 + 0x1000
    directories = range(pdpt + 0x1000, pdpt + 0x5000, 0x1000)
    tables = b"".join(
        (
            pack("<Q", pdpt | PTE_PRESENT_WRITABLE).ljust(0x1000, b"\0"),
            pack("<4Q", *(table | PTE_PRESENT_WRITABLE for table in directories)).ljust(0x1000, b"\0"),
            pack(
                f"<{4 * ENTRIES}Q",
                *range(PTE_PRESENT_WRITABLE | PTE_LARGE, 4 * ENTRIES * LARGE_PAGE, LARGE_PAGE),
            ),
        )
    )
    placement.put("the boot page tables", pml4, tables)


def long64(rip: int, *, rsi: int = 0, rbx: int = 0) -> EntryState:
    """Return 64-bit mode with the tables of `put_gdt` and `put_page_tables`, interrupts off.

    This is what "64-bit Boot Protocol" in the kernel's Documentation/arch/x86/boot.rst asks for, with the zero page
    in `rsi`.
    """
    return EntryState(
        mode="long64",
        rip=rip,
        rsp=layout.BOOT_STACK,
        rflags=RFLAGS,
        rax=0,
        rbx=rbx,
        rcx=0,
        rdx=0,
        rsi=rsi,
        rdi=0,
        rbp=0,
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=layout.PAGE_TABLES,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
        cs=_CODE64,
        ds=_DATA32,
        es=_DATA32,
        fs=_DATA32,
        gs=_DATA32,
        ss=_DATA32,
        tr=_TASK,
        ldt=_NO_LDT,
        gdt=_GDT,
        idt=_NO_IDT,
    )


def protected32(rip: int, *, eax: int = 0, ebx: int = 0, esi: int = 0) -> EntryState:
    """Return 32-bit protected mode, flat segments, paging and interrupts off, CR4 zero, TR a busy TSS of 0x67.

    It satisfies "Machine state" of Multiboot 0.6.96 (3.2) and the x86/HVM direct boot ABI (PVH).
    """
    return long64(rip, rsi=esi, rbx=ebx)._replace(
        mode="protected32", rax=eax, cr0=CR0_PE | CR0_ET, cr3=0, cr4=0, efer=0, cs=_CODE32
    )


def real16(ip: int, *, sp: int, ebx: int = 0) -> EntryState:
    """Return real mode with every segment at 0, interrupts off and the interrupt vector table at 0."""
    return long64(ip, rbx=ebx)._replace(
        mode="real16",
        rsp=sp,
        cr0=CR0_ET,
        cr3=0,
        cr4=0,
        efer=0,
        cs=_CODE16,
        ds=_DATA16,
        es=_DATA16,
        fs=_DATA16,
        gs=_DATA16,
        ss=_DATA16,
        gdt=TableRegister(0, 0),
        idt=TableRegister(0, 0x3FF),
    )

"""Brings a vCPU into its reset state, and the boot processor into the state that its kernel expects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hypervisor.kvm.vcpu import Segment

if TYPE_CHECKING:
    from hypervisor.boot.entry import EntryState
    from hypervisor.kvm import Vcpu

MSR_MTRR_DEF_TYPE: Final = 0x2FF
MTRR_ENABLED_WRITE_BACK: Final = 1 << 11 | 6
"""All of memory is write-back, as firmware would leave it (SDM volume 3, 12.11.2.1)."""
MSR_MISC_ENABLE: Final = 0x1A0
FAST_STRINGS: Final = 1
RESET_MSRS: Final = (
    *((msr, 0) for msr in (0x174, 0x175, 0x176)),  # SYSENTER_CS, _ESP, _EIP
    *((msr, 0) for msr in (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084)),  # STAR, LSTAR, CSTAR, SFMASK
    (0xC000_0102, 0),  # KERNEL_GS_BASE
    (0x10, 0),  # TSC
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    (MSR_MISC_ENABLE, FAST_STRINGS),
)

LAPIC_LVT_LINT0: Final = 0x350
LAPIC_LVT_LINT1: Final = 0x360
DELIVER_EXTINT: Final = 0x700
DELIVER_NMI: Final = 0x400


def reset_vcpu(vcpu: Vcpu, *, has_lapic: bool) -> None:
    """Set MSRs, FPU and LAPIC as firmware hands them over; KVM has reset everything else.

    LINT0 takes the 8259's interrupts and LINT1 is NMI, as MP 1.4, section 3.6.2.1 (virtual wire mode) has it.
    """
    for entry in RESET_MSRS:
        vcpu.set_msrs((entry,))  # one by one: an MSR that this host's KVM lacks is left as it is
    vcpu.set_fpu_reset()
    if has_lapic and vcpu.index == 0:
        page = vcpu.lapic()
        page[LAPIC_LVT_LINT0 : LAPIC_LVT_LINT0 + 4] = DELIVER_EXTINT.to_bytes(4, "little")
        page[LAPIC_LVT_LINT1 : LAPIC_LVT_LINT1 + 4] = DELIVER_NMI.to_bytes(4, "little")
        vcpu.set_lapic(page)


def apply_entry(vcpu: Vcpu, entry: EntryState) -> None:
    """Put the boot processor at its kernel's first instruction."""
    special: dict[str, int | Segment] = {
        name: Segment(**getattr(entry, name)._asdict()) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
    }
    special |= {name: getattr(entry, name) for name in ("cr0", "cr3", "cr4", "efer")}
    for name in ("gdt", "idt"):
        table = getattr(entry, name)
        special |= {f"{name}_base": table.base, f"{name}_limit": table.limit}
    vcpu.set_special_registers(special)
    names = ("rip", "rsp", "rflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
    vcpu.set_registers({name: getattr(entry, name) for name in names})

"""The whole state of one vCPU, out of KVM and into it again, as plain values.

Sources: Linux Documentation/virt/kvm/api.rst for the ioctls, devices/vcpu.rst (group KVM_VCPU_TSC_CTRL) for the TSC;
Intel SDM volume 4 for MSR numbers.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.cpuid import Entry
from hypervisor.errors import HostError, KvmError
from hypervisor.kvm._kvm import ffi, lib
from hypervisor.kvm.ioctls import control, control_value, refusal
from hypervisor.kvm.vcpu import Segment, fill_special, special_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hypervisor.kvm.handles import Vm
    from hypervisor.kvm.vcpu import Vcpu

__all__ = [
    "Refusal",
    "Step",
    "VcpuState",
    "check_settled",
    "load_frame",
    "load_vcpu",
    "refused_msr",
    "save_vcpu",
    "tell_paused",
    "vcpu_steps",
]

MSR_TSC: Final = 0x10
MSR_TSC_DEADLINE: Final = 0x6E0
MSR_MCG_CAP: Final = 0x179
MTRR_MSRS: Final = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
"""IA32_MTRR_: variable ranges, fixed ranges, default type. KVM's list leaves them out."""
MSR_MC0_CTL: Final = 0x400
MSRS_PER_BANK: Final = 4
MAX_CPUID_ENTRIES: Final = 256
EFER_SVME: Final = 1 << 12
NESTED_FORMAT: Final = slice(2, 4)
"""Where struct kvm_nested_state says whose it is."""
FPU_LEGACY_SIZE: Final = 512
"""The part of an XSAVE area that every CPU has (SDM volume 1, 13.4.1)."""


class VcpuState(NamedTuple):
    """A vCPU between two instructions. Bytes are the kernel's own structures, which never change their meaning.

    Attributes:
        index: number of the vCPU, also its APIC id.
        mp_state: KVM_MP_STATE_: runs, halted, waits for INIT or SIPI.
        registers: general registers, rip, rflags.
        special: segment, control and table registers, as `Vcpu.special_registers` gives them; with the PAE pointers as
            pdptr0 to pdptr3 where they are loaded.
        xsave: x87, SSE, AVX and later state: struct kvm_xsave, or struct kvm_fpu from a host without XSAVE.
        xcrs: extended control registers by number.
        debug: db0 to db3, dr6, dr7.
        lapic: register page; b"" without a LAPIC in the kernel.
        cpuid: the table that the guest has.
        msrs: MSRs by index.
        unreadable: MSRs that should be among them, but that KVM does not read.
        events: exceptions, interrupts, NMIs and SMIs on their way: struct kvm_vcpu_events.
        nested: of a guest that is a hypervisor itself: struct kvm_nested_state; b"" where KVM has none.
        tsc_khz: frequency of the guest's TSC; 0: KVM does not tell.
        tsc_offset: guest's TSC less the host's, modulo 2^64; None: KVM does not tell.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a state
    mp_state: int
    registers: dict[str, int]
    special: dict[str, int | Segment]
    xsave: bytes
    xcrs: dict[int, int]
    debug: dict[str, int]
    lapic: bytes
    cpuid: list[Entry]
    msrs: dict[int, int]
    unreadable: list[int]
    events: bytes
    nested: bytes
    tsc_khz: int
    tsc_offset: int | None


class Refusal(NamedTuple):
    """An MSR that this host's KVM did not take: its value stays `present` (None: it cannot be read either)."""

    vcpu: int
    msr: int
    wanted: int
    present: int | None


# --- out ----------------------------------------------------------------------------------------------------------


def save_vcpu(vm: Vm, vcpu: Vcpu, msr_indices: Sequence[int]) -> VcpuState:
    """Read everything; no vCPU of the VM is running, and `vcpu.is_settled`.

    Args:
        vm: the VM that it belongs to.
        vcpu: the vCPU.
        msr_indices: what `Kvm.msr_indices` returned; MTRRs and machine check banks are added to them.

    Raises:
        ValueError: an access of the guest is half done.
        KvmError: when the kernel refuses.
    """
    check_settled(vcpu)
    fd = vcpu.fileno()
    # First, because it acts on an INIT or SIPI that has arrived, which changes all the rest.
    mp_state = _get(fd, "struct kvm_mp_state *", lib.KVM_GET_MP_STATE).mp_state
    lapic = bytes(vcpu.lapic()) if vm.has_irqchip else b""  # it may update MSRs, so it comes before them
    msrs, unreadable = _read_msrs(fd, _all_msrs(fd, msr_indices))
    return VcpuState(
        index=vcpu.index,
        mp_state=mp_state,
        registers=vcpu.registers(),
        special=_special(vm, vcpu),
        xsave=_xsave(vm, fd),
        xcrs=_xcrs(vm, fd),
        debug=_debug(fd),
        lapic=lapic,
        cpuid=read_cpuid(fd),
        msrs=msrs,
        unreadable=unreadable,
        nested=_nested(vm, fd),
        tsc_khz=vcpu.tsc_khz(),
        tsc_offset=_tsc_offset(fd),
        # Last: reading it may deliver an exception's payload or take up an NMI.
        events=bytes(ffi.buffer(_get(fd, "struct kvm_vcpu_events *", lib.KVM_GET_VCPU_EVENTS))),
    )


def _get(fd: int, kind: str, request: int) -> Any:
    """Return a structure that `request` fills."""
    value = ffi.new(kind)
    control(fd, request, value)
    return value


def _special(vm: Vm, vcpu: Vcpu) -> dict[str, int | Segment]:
    if not vm.check_extension(lib.KVM_CAP_SREGS2):
        return vcpu.special_registers()
    sregs = _get(vcpu.fileno(), "struct kvm_sregs2 *", lib.KVM_GET_SREGS2)
    values = special_values(sregs)
    if sregs.flags:  # KVM_SREGS2_FLAGS_PDPTRS_VALID, the only one: PAE paging is on
        values |= {f"pdptr{i}": sregs.pdptrs[i] for i in range(4)}
    return values


def _xsave_size(vm: Vm) -> int:
    """Return how many bytes KVM_GET_XSAVE2 and KVM_SET_XSAVE touch; 0: there is no XSAVE."""
    if not vm.check_extension(lib.KVM_CAP_XSAVE):
        return 0
    return max(vm.check_extension(lib.KVM_CAP_XSAVE2), int(ffi.sizeof("struct kvm_xsave")))


def _xsave(vm: Vm, fd: int) -> bytes:
    size = _xsave_size(vm)
    area = ffi.new("char[]", size or ffi.sizeof("struct kvm_fpu"))
    if not size:
        request = lib.KVM_GET_FPU
    else:
        request = lib.KVM_GET_XSAVE2 if vm.check_extension(lib.KVM_CAP_XSAVE2) else lib.KVM_GET_XSAVE
    control(fd, request, area)
    return bytes(ffi.buffer(area))


def _xcrs(vm: Vm, fd: int) -> dict[int, int]:
    if not vm.check_extension(lib.KVM_CAP_XCRS):
        return {}
    xcrs = _get(fd, "struct kvm_xcrs *", lib.KVM_GET_XCRS)
    return {row.xcr: row.value for row in xcrs.xcrs[0 : xcrs.nr_xcrs]}


def _debug(fd: int) -> dict[str, int]:
    regs = _get(fd, "struct kvm_debugregs *", lib.KVM_GET_DEBUGREGS)
    return {f"db{i}": regs.db[i] for i in range(4)} | {"dr6": regs.dr6, "dr7": regs.dr7}


def read_cpuid(fd: int) -> list[Entry]:
    """Return the CPUID table that the guest of the vCPU with this descriptor has."""
    table = ffi.new("struct kvm_cpuid2 *", {"entries": MAX_CPUID_ENTRIES})
    table.nent = MAX_CPUID_ENTRIES
    control(fd, lib.KVM_GET_CPUID2, table)
    return [Entry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[0 : table.nent]]


def _nested(vm: Vm, fd: int) -> bytes:
    most = vm.check_extension(lib.KVM_CAP_NESTED_STATE)
    if not most:
        return b""
    area = ffi.new("char[]", most)
    state = ffi.cast("struct kvm_nested_state *", area)
    state.size = most
    control(fd, lib.KVM_GET_NESTED_STATE, area)
    return bytes(ffi.buffer(area, state.size))


def _has_no_svm(state: VcpuState) -> bool:
    """Whether the vCPU is an AMD one without EFER.SVME: then it has no nested state, and KVM takes none but its own.

    What KVM reads there need not be what it takes back (arch/x86/kvm/svm/nested.c: flags have to be GIF alone).
    """
    form = int.from_bytes(state.nested[NESTED_FORMAT], "little")
    efer = state.special["efer"]
    return form == lib.KVM_STATE_NESTED_FORMAT_SVM and isinstance(efer, int) and not efer & EFER_SVME


def _tsc_attribute(offset: Any) -> Any:
    attribute = ffi.new("struct kvm_device_attr *")
    attribute.group, attribute.attr = lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET
    attribute.addr = int(ffi.cast("uintptr_t", offset))
    return attribute


def _tsc_offset(fd: int) -> int | None:
    offset = ffi.new("uint64_t *")
    try:
        control(fd, lib.KVM_GET_DEVICE_ATTR, _tsc_attribute(offset))
    except KvmError:
        return None  # a kernel before 5.16
    return int(offset[0])


def _all_msrs(fd: int, listed: Sequence[int]) -> list[int]:
    banks = _read_msrs(fd, (MSR_MCG_CAP,))[0].get(MSR_MCG_CAP, 0) & 0xFF
    controls = range(MSR_MC0_CTL, MSR_MC0_CTL + MSRS_PER_BANK * banks, MSRS_PER_BANK)
    return list(dict.fromkeys((*listed, *MTRR_MSRS, *controls)))


def _read_msrs(fd: int, indices: Sequence[int]) -> tuple[dict[int, int], list[int]]:
    """Return the values of MSRs, and those that cannot be read: KVM_GET_MSRS stops at each such."""
    values: dict[int, int] = {}
    unreadable = []
    rest = list(indices)
    while rest:
        table = ffi.new("struct kvm_msrs *", {"entries": [(index,) for index in rest]})
        table.nmsrs = len(rest)
        done = control(fd, lib.KVM_GET_MSRS, table)
        values |= {entry.index: entry.data for entry in table.entries[0:done]}
        unreadable += rest[done : done + 1]
        rest = rest[done + 1 :]
    return values, unreadable


# --- in -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One ioctl that sets a part of a vCPU's state.

    Attributes:
        request: its number.
        argument: its structure; of KVM_SET_MSRS the (index, value) pairs, of KVM_SET_DEVICE_ATTR the TSC's offset.
    """

    request: int
    argument: Any


def load_vcpu(vm: Vm, vcpu: Vcpu, state: VcpuState, *, tsc: int, tsc_offset: int | None) -> list[Refusal]:
    """Put a vCPU that does not run into a saved state; the guest's memory is in place already.

    Args:
        vm: the VM that it belongs to.
        vcpu: the vCPU.
        state: what `save_vcpu` returned, here or elsewhere.
        tsc: what the guest's TSC is to be now.
        tsc_offset: what its offset is to be, instead of `tsc`; None: there is none to be had.

    Returns:
        The MSRs that kept another value.

    Raises:
        ValueError: an access of the guest is half done.
        HostError: this host lacks an extended state that the guest uses.
        KvmError: when the kernel refuses.
    """
    check_settled(vcpu)
    fd = vcpu.fileno()
    refused = []
    load_frame(vcpu, state)
    for request, argument in vcpu_steps(vm, vcpu, state, tsc=tsc, tsc_offset=tsc_offset):
        if request == lib.KVM_SET_MSRS:
            refused += _write_msrs(vcpu, argument)
        elif request == lib.KVM_SET_DEVICE_ATTR:
            offset = ffi.new("uint64_t *", argument)
            control(fd, request, _tsc_attribute(offset))
        elif request != lib.KVM_SET_NESTED_STATE or argument != _nested(vm, fd):
            control(fd, request, ffi.from_buffer(argument) if isinstance(argument, bytes) else argument)
    return refused


def check_settled(vcpu: Vcpu) -> None:
    """Raise ValueError when an access of the guest is half done."""
    if not vcpu.is_settled:
        raise ValueError(f"vCPU {vcpu.index} is in the middle of an access: settle it first")


def load_frame(vcpu: Vcpu, state: VcpuState) -> None:
    """Set what decides how everything else is taken, and what no guest can change: CPUID and the TSC's frequency."""
    fd = vcpu.fileno()
    if read_cpuid(fd) != state.cpuid:  # a vCPU that has run takes no other, and older kernels not even the same again
        vcpu.set_cpuid(state.cpuid)
    if state.tsc_khz not in (0, vcpu.tsc_khz()):
        _set_tsc_khz(fd, state.tsc_khz)


def vcpu_steps(vm: Vm, vcpu: Vcpu, state: VcpuState, *, tsc: int, tsc_offset: int | None) -> Iterator[Step]:
    """Yield what sets the rest of a state, in order; arguments as for `load_vcpu`.

    The order is what KVM asks for. CPUID comes first: it decides what every other call takes. Special registers come
    before the LAPIC, whose mode is in apic_base, and the LAPIC before the TSC deadline, which is dropped without a word
    while the timer is in another mode; the TSC comes before both, the deadline being counted in it. The general
    registers come before the events: setting them forgets a pending exception. The rest follows from none of these.
    """
    yield _special_step(vm, vcpu, state.special)
    if state.xcrs:
        yield _xcrs_step(vm, state.xcrs)
    if tsc_offset is not None:
        yield Step(lib.KVM_SET_DEVICE_ATTR, tsc_offset)
    late = (MSR_TSC, MSR_TSC_DEADLINE)
    first = [] if tsc_offset is not None else [(MSR_TSC, tsc)]
    yield Step(lib.KVM_SET_MSRS, [*first, *(pair for pair in state.msrs.items() if pair[0] not in late)])
    yield _xsave_step(vm, state.xsave)
    if state.nested and not _has_no_svm(state):
        yield Step(lib.KVM_SET_NESTED_STATE, state.nested)
    if state.lapic:
        lapic = ffi.new("struct kvm_lapic_state *")
        ffi.buffer(lapic.regs)[:] = state.lapic
        yield Step(lib.KVM_SET_LAPIC, lapic)
    if MSR_TSC_DEADLINE in state.msrs:
        yield Step(lib.KVM_SET_MSRS, [(MSR_TSC_DEADLINE, state.msrs[MSR_TSC_DEADLINE])])
    debug = ffi.new("struct kvm_debugregs *", {"db": [state.debug[f"db{i}"] for i in range(4)]})
    debug.dr6, debug.dr7 = state.debug["dr6"], state.debug["dr7"]
    yield Step(lib.KVM_SET_DEBUGREGS, debug)
    yield Step(lib.KVM_SET_REGS, ffi.new("struct kvm_regs *", state.registers))
    yield Step(lib.KVM_SET_MP_STATE, ffi.new("struct kvm_mp_state *", {"mp_state": state.mp_state}))
    yield _events_step(state.events)


def _set_tsc_khz(fd: int, khz: int) -> None:
    try:
        control_value(fd, lib.KVM_SET_TSC_KHZ, khz)
    except KvmError as error:
        raise HostError(
            f"this host's KVM cannot give the guest its TSC of {khz} kHz",
            hint="go on with it on a host with that frequency, or with TSC scaling",
        ) from error


def _special_step(vm: Vm, vcpu: Vcpu, values: dict[str, int | Segment]) -> Step:
    pointers = [values[name] for name in (f"pdptr{i}" for i in range(4)) if name in values]
    common = {name: value for name, value in values.items() if not name.startswith("pdptr")}
    if not vm.check_extension(lib.KVM_CAP_SREGS2):  # KVM loads the PAE pointers from memory
        sregs = _get(vcpu.fileno(), "struct kvm_sregs *", lib.KVM_GET_SREGS)
        fill_special(sregs, common)
        return Step(lib.KVM_SET_SREGS, sregs)
    sregs = ffi.new("struct kvm_sregs2 *")
    fill_special(sregs, common)
    if pointers:
        sregs.pdptrs = pointers
        sregs.flags = 1  # KVM_SREGS2_FLAGS_PDPTRS_VALID
    return Step(lib.KVM_SET_SREGS2, sregs)


def _xcrs_step(vm: Vm, values: dict[int, int]) -> Step:
    if not vm.check_extension(lib.KVM_CAP_XCRS) or len(values) > lib.KVM_MAX_XCRS:
        raise HostError("this host's KVM has no extended control registers (XCR0), and the guest uses them")
    xcrs = ffi.new("struct kvm_xcrs *")
    xcrs.nr_xcrs = len(values)
    for row, (number, value) in zip(xcrs.xcrs[0 : len(values)], values.items(), strict=True):
        row.xcr, row.value = number, value
    return Step(lib.KVM_SET_XCRS, xcrs)


def _xsave_step(vm: Vm, saved: bytes) -> Step:
    size = _xsave_size(vm)
    has_xsave = len(saved) != ffi.sizeof("struct kvm_fpu")
    if has_xsave != bool(size) or any(saved[size or len(saved) :]):
        raise HostError("this host's KVM cannot hold the guest's FPU and vector state (XSAVE)")
    if not size:
        return Step(lib.KVM_SET_FPU, saved)
    area = ffi.new("char[]", size)
    ffi.buffer(area)[0 : min(size, len(saved))] = saved[:size]
    return Step(lib.KVM_SET_XSAVE, area)


def _events_step(saved: bytes) -> Step:
    events = ffi.new("struct kvm_vcpu_events *")
    if len(saved) != ffi.sizeof("struct kvm_vcpu_events"):
        raise ValueError(f"{len(saved)} bytes are no struct kvm_vcpu_events")
    ffi.buffer(events)[:] = saved
    return Step(lib.KVM_SET_VCPU_EVENTS, events)


def _write_msrs(vcpu: Vcpu, values: Iterable[tuple[int, int]]) -> list[Refusal]:
    """Set MSRs in order, going on behind each that KVM refuses; return those that differ from what is there."""
    rest = list(values)
    refused = []
    while rest:
        done = vcpu.set_msrs(rest)
        if done < len(rest):
            refused += refused_msr(vcpu, *rest[done])
        rest = rest[done + 1 :]
    return refused


def refused_msr(vcpu: Vcpu, msr: int, wanted: int) -> list[Refusal]:
    """Return what it means that KVM refused an MSR: nothing where it has this value already."""
    present = _read_msrs(vcpu.fileno(), (msr,))[0].get(msr)
    return [] if present == wanted else [Refusal(vcpu.index, msr, wanted, present)]


def tell_paused(vcpu: Vcpu) -> None:
    """Say that the vCPU stood still, so that the guest's watchdogs forgive the gap (KVM_KVMCLOCK_CTRL)."""
    result = lib.hv_ioctl_value(vcpu.fileno(), lib.KVM_KVMCLOCK_CTRL, 0)
    if result not in {0, -errno.EINVAL}:  # a guest without kvmclock need not know
        raise refusal(lib.KVM_KVMCLOCK_CTRL, -result)

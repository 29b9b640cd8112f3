"""The vCPU handle: state in and out, and `enter`, which runs the guest."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.errors import HostError, KvmError
from hypervisor.kvm._kvm import ffi, lib
from hypervisor.kvm.ioctls import control, control_value
from hypervisor.kvm.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# What `enter` returns: see runloop.h. Plain ints: this is the exit path.
PIO_IN: Final[int] = lib.HV_PIO_IN
PIO_OUT: Final[int] = lib.HV_PIO_OUT
MMIO_READ: Final[int] = lib.HV_MMIO_READ
MMIO_WRITE: Final[int] = lib.HV_MMIO_WRITE
EXIT: Final[int] = lib.HV_EXIT
INTERRUPTED: Final[int] = lib.HV_INTERRUPTED
FAILED: Final[int] = lib.HV_FAILED

ACCESSES: Final = (PIO_IN, PIO_OUT, MMIO_READ, MMIO_WRITE)
PENDING: Final = (lib.KVM_EXIT_IO, lib.KVM_EXIT_MMIO)
"""Exits that KVM completes at the next KVM_RUN."""

EXIT_UNKNOWN: Final[int] = lib.KVM_EXIT_UNKNOWN
EXIT_HLT: Final[int] = lib.KVM_EXIT_HLT
EXIT_INTR: Final[int] = lib.KVM_EXIT_INTR
EXIT_SHUTDOWN: Final[int] = lib.KVM_EXIT_SHUTDOWN
EXIT_FAIL_ENTRY: Final[int] = lib.KVM_EXIT_FAIL_ENTRY
EXIT_INTERNAL_ERROR: Final[int] = lib.KVM_EXIT_INTERNAL_ERROR
EXIT_SYSTEM_EVENT: Final[int] = lib.KVM_EXIT_SYSTEM_EVENT
SYSTEM_EVENT_SHUTDOWN: Final[int] = lib.KVM_SYSTEM_EVENT_SHUTDOWN
SYSTEM_EVENT_RESET: Final[int] = lib.KVM_SYSTEM_EVENT_RESET

GENERAL_REGISTERS: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
SEGMENT_REGISTERS: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
CONTROL_REGISTERS: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


def reason_names() -> dict[int, str]:
    """Return the short name of every KVM_EXIT_ reason, such as "io"."""
    prefix = "KVM_EXIT_"
    return {getattr(lib, name): name.removeprefix(prefix).lower() for name in dir(lib) if name.startswith(prefix)}


def exit_name(reason: int) -> str:
    """Return the name of a KVM_EXIT_ reason; of an unknown one its number."""
    names = {getattr(lib, name): name for name in dir(lib) if name.startswith("KVM_EXIT_")}
    return names.get(reason, str(reason))


class Segment(NamedTuple):
    """A segment register with its hidden part: base and limit in bytes, type and flags as in the descriptor."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the descriptor bit's name
    g: int = 0
    avl: int = 0
    unusable: int = 0


def special_values(sregs: Any) -> dict[str, int | Segment]:
    """Return the fields of a kvm_sregs or kvm_sregs2 by name, as `Vcpu.special_registers` does."""
    values: dict[str, int | Segment] = {name: getattr(sregs, name) for name in CONTROL_REGISTERS}
    for name in SEGMENT_REGISTERS:
        segment = getattr(sregs, name)
        values[name] = Segment(*(getattr(segment, field) for field in Segment._fields))
    for name in ("gdt", "idt"):
        values[name + "_base"] = getattr(sregs, name).base
        values[name + "_limit"] = getattr(sregs, name).limit
    return values


def fill_special(sregs: Any, values: Mapping[str, int | Segment]) -> None:
    """Set the named fields of a kvm_sregs or kvm_sregs2."""
    for name, value in values.items():
        if isinstance(value, Segment):
            target = getattr(sregs, name)
            for field, number in zip(Segment._fields, value, strict=True):
                setattr(target, field, number)
        elif name.startswith(("gdt_", "idt_")):
            setattr(getattr(sregs, name[:3]), name[4:], value)
        else:
            setattr(sregs, name, value)


class ExitRecord(NamedTuple):
    """One of the last exits: TSC tick, exit reason, access kind, size in bytes, address or port, repetitions."""

    tick: int
    reason: int
    kind: int
    size: int
    address: int
    value: int


class Vcpu:
    """A vCPU. All but `kick` and the counters belong to the thread that runs it, or to any while none does.

    Attributes:
        enter: run the guest until Python is needed. Takes the answer to the read that the last call returned (else
            anything); returns a number as laid out in runloop.h. Releases the GIL.
    """

    def __init__(self, index: int, fd: int, run_size: int, bus: Any) -> None:
        """Take over the vCPU's file descriptor and map its kvm_run."""
        os.set_inheritable(fd, False)
        self.index = index
        self._fd = fd
        self._c = lib.hv_vcpu_new(fd, run_size, bus)
        if self._c == ffi.NULL:
            os.close(fd)
            raise HostError(f"cannot map the run area of vCPU {index}")
        self._last_rows = b""
        self._bus = bus  # the C side points to it
        self._stats = Stats(fd)
        self.enter: Callable[[int], int] = partial(lib.hv_vcpu_run, self._c)

    def close(self) -> None:
        """Unmap kvm_run and close the vCPU; its thread must have ended."""
        self._stats.close()
        if self._fd >= 0:
            del self.enter
            self._last_rows = self.recorded_rows()
            closed, self._c = self._c, ffi.NULL
            lib.hv_vcpu_free(closed)
            os.close(self._fd)
            self._fd = -1

    # --- running ----------------------------------------------------------------------------------------------------

    def attach_thread(self) -> None:
        """Make the calling thread the one that `kick` reaches; blocks every other signal in it."""
        lib.hv_thread_enter(self._c)

    def detach_thread(self) -> None:
        """Say that the calling thread runs this vCPU no more."""
        lib.hv_thread_leave(self._c)

    def kick(self) -> None:
        """Make `enter` return INTERRUPTED, now or at its next call. Never lost, from any thread."""
        if self._c != ffi.NULL:
            lib.hv_vcpu_kick(self._c)

    def fileno(self) -> int:
        """Return the file descriptor, for `hypervisor.kvm.vcpu_state`."""
        return self._fd

    @property
    def is_settled(self) -> bool:
        """Whether the guest is between two instructions: no access of its is half done (see `settle`)."""
        return self._c.reason not in PENDING

    def settle(self, wanted: int, answer: Callable[[int], int]) -> int:
        """Finish the access that `enter` returned, without running the guest any further.

        KVM completes an instruction only at the next KVM_RUN: until then RIP still points to it, the value of a read is
        not in its register, and the rest of a string instruction waits in the run loop.

        Args:
            wanted: what `enter` returned last; 0 if that was a write which has been done, or nothing.
            answer: does what an access asks for, given a number as `enter` returns it, and returns a read's value.
                Called for each access that is left of the instruction.

        Returns:
            INTERRUPTED; FAILED or EXIT, as `enter` does, when KVM cannot complete the instruction.
        """
        reply = 0
        while True:
            if wanted & 0xFF in ACCESSES:
                reply = answer(wanted)
            self.kick()  # KVM_RUN completes what is pending, then sees immediate_exit and returns
            wanted = self.enter(reply)
            if wanted & 0xFF not in ACCESSES:
                return wanted

    @property
    def mmio_address(self) -> int:
        """Guest-physical address of the memory access that `enter` returned."""
        address: int = self._c.address
        return address

    @property
    def mmio_value(self) -> int:
        """Little-endian value of the memory write that `enter` returned."""
        value: int = self._c.value
        return value

    @property
    def exit_words(self) -> list[int]:
        """Facts of the EXIT that `enter` returned: for an internal error suberror, count, data; else see runloop.c."""
        return list(self._c.exit_words)

    # --- counters -----------------------------------------------------------------------------------------------------

    @property
    def exit_counts(self) -> dict[int, int]:
        """Exits so far by KVM_EXIT_ reason, but for those that a kick of ours caused."""
        recorder = self._c.recorder
        counts: dict[int, int] = {}
        for row in recorder.row[0 : recorder.row_count]:
            counts[row.reason] = counts.get(row.reason, 0) + row.count
        counts.pop(EXIT_INTR, None)
        return counts

    @property
    def ticks(self) -> tuple[int, int]:
        """TSC ticks spent in the guest (KVM included) and in answering exits."""
        return self._c.recorder.guest_ticks, self._c.recorder.handler_ticks

    @property
    def recorder(self) -> Any:
        """The recorder in C, for `hypervisor.kvm.recorder`."""
        return ffi.addressof(self._c, "recorder")

    def recorded_rows(self) -> bytes:
        """Copy what is recorded of exits, also once it is closed; `hypervisor.kvm.recorder.raw_rows` takes it apart."""
        if self._c == ffi.NULL:
            return self._last_rows
        recorder = self._c.recorder
        return bytes(ffi.buffer(recorder.row, recorder.row_count * ffi.sizeof("struct hv_row")))

    def sample_places(self, every: int) -> None:
        """Have RIP and CR3 recorded at one exit in `every` (KVM_CAP_SYNC_REGS); 0: at none. Before it runs."""
        self._c.recorder.every = every

    def set_recording(self, enabled: bool) -> None:
        """Switch counts and histograms off, to measure what they cost, and on again. Before it runs."""
        self._c.recorder.enabled = enabled

    @property
    def recent_exits(self) -> list[ExitRecord]:
        """The last exits (at most 64), oldest first."""
        count = self._c.recorder.recent_count
        kept = min(count, lib.HV_RECENT)
        rows = (self._c.recorder.recent[i % lib.HV_RECENT] for i in range(count - kept, count))
        return [ExitRecord(r.tick, r.reason, r.kind, r.size, r.address, r.operations) for r in rows]

    def tsc_khz(self) -> int:
        """Return the frequency of the vCPU's TSC in kHz; 0 where KVM does not tell (KVM_GET_TSC_KHZ)."""
        try:
            return control_value(self._fd, lib.KVM_GET_TSC_KHZ)
        except KvmError:
            return 0

    @property
    def has_open_stats(self) -> bool:
        """Whether `stats` may be called from any thread."""
        return self._stats.is_open

    def stats(self) -> dict[str, int]:
        """Return KVM's own counters of the vCPU, by its names; {} where the kernel has none, and after `close`.

        Of a histogram it is the number of samples. The first call belongs to the vCPU's thread, or comes before it
        runs; later ones are for any thread.
        """
        file = self._stats.open()
        return {} if file is None else file.values()

    def stat_histograms(self) -> dict[str, list[tuple[int, int | None, int]]]:
        """Return KVM's histograms of the vCPU, as `StatsFile.histograms` does; to be called as `stats`."""
        file = self._stats.open()
        return {} if file is None else file.histograms()

    # --- state --------------------------------------------------------------------------------------------------------

    def registers(self) -> dict[str, int]:
        """Return the general registers, RIP and RFLAGS."""
        regs = ffi.new("struct kvm_regs *")
        control(self._fd, lib.KVM_GET_REGS, regs)
        return {name: getattr(regs, name) for name in GENERAL_REGISTERS}

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Set the general registers; those that are not named become zero."""
        regs = ffi.new("struct kvm_regs *", dict(values))
        control(self._fd, lib.KVM_SET_REGS, regs)

    def special_registers(self) -> dict[str, int | Segment]:
        """Return segment, control and table registers; gdt and idt as gdt_base, gdt_limit, idt_base, idt_limit."""
        sregs = ffi.new("struct kvm_sregs *")
        control(self._fd, lib.KVM_GET_SREGS, sregs)
        return special_values(sregs)

    def set_special_registers(self, values: Mapping[str, int | Segment]) -> None:
        """Change the named special registers, the rest stays; names as `special_registers` gives them."""
        sregs = ffi.new("struct kvm_sregs *")
        control(self._fd, lib.KVM_GET_SREGS, sregs)
        fill_special(sregs, values)
        control(self._fd, lib.KVM_SET_SREGS, sregs)

    def set_fpu_reset(self) -> None:
        """Put the x87 and SSE control words in their reset state (SDM volume 3, table 10-1: FNINIT's and 1F80H)."""
        fpu = ffi.new("struct kvm_fpu *")
        fpu.fcw = 0x37F
        fpu.mxcsr = 0x1F80
        control(self._fd, lib.KVM_SET_FPU, fpu)

    def set_cpuid(self, entries: Sequence[tuple[int, int, int, int, int, int, int]]) -> None:
        """Give the vCPU its CPUID table: rows of function, index, flags, eax, ebx, ecx, edx."""
        table = ffi.new("struct kvm_cpuid2 *", {"nent": len(entries), "entries": [tuple(row) for row in entries]})
        control(self._fd, lib.KVM_SET_CPUID2, table)

    def set_msrs(self, values: Sequence[tuple[int, int]]) -> int:
        """Set MSRs in order and return how many the kernel took before the first that it refused."""
        return control(self._fd, lib.KVM_SET_MSRS, self.msr_table(values))

    @staticmethod
    def msr_table(values: Sequence[tuple[int, int]]) -> Any:
        """Return the struct kvm_msrs with these (index, value) pairs."""
        return ffi.new("struct kvm_msrs *", {"nmsrs": len(values), "entries": list(values)})

    def lapic(self) -> bytearray:
        """Return the local APIC's register page (1 KiB)."""
        state = ffi.new("struct kvm_lapic_state *")
        control(self._fd, lib.KVM_GET_LAPIC, state)
        return bytearray(ffi.buffer(state.regs))

    def set_lapic(self, page: bytes | bytearray) -> None:
        """Set the local APIC's register page (1 KiB)."""
        state = ffi.new("struct kvm_lapic_state *")
        ffi.buffer(state.regs)[:] = bytes(page)
        control(self._fd, lib.KVM_SET_LAPIC, state)

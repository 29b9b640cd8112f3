"""Why a guest died: one line for the user, and a page for whoever debugs it.

Everything here works from plain data that the vCPU left behind (exit reason, registers, a way to read memory), and
believes none of it: a guest may have left anything in its registers and page tables.

Exit reasons and their data are those of struct kvm_run (<linux/kvm.h>; KVM API, "The kvm_run structure").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor import paging
from hypervisor.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hypervisor.boot.image import BootPlan
    from hypervisor.memory import GuestMemory
    from hypervisor.outcome import Outcome
    from hypervisor.symbols import Symbols

    Reader = Callable[[int, int], bytes | None]

__all__ = ["Report", "describe", "explain"]

EXIT_SHUTDOWN: Final = 8
EXIT_FAIL_ENTRY: Final = 9
EXIT_INTERNAL_ERROR: Final = 17
EXIT_NAMES: Final = {
    0: "unknown hardware exit",
    1: "exception",
    3: "hypercall",
    4: "debug",
    12: "TPR access",
    16: "NMI",
    24: "system event",
    26: "IOAPIC EOI",
    27: "Hyper-V",
    29: "RDMSR",
    30: "WRMSR",
    31: "dirty ring full",
    32: "AP reset hold",
    33: "bus lock",
    34: "Xen",
    37: "VM exit notification",
}

SUBERROR_EMULATION: Final = 1
SUBERRORS: Final = {
    1: "KVM could not emulate an instruction",
    2: "two exceptions at once (KVM_INTERNAL_ERROR_SIMUL_EX)",
    3: "an exit came while an event was delivered (KVM_INTERNAL_ERROR_DELIVERY_EV)",
    4: "the hardware gave an exit that KVM does not know (KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON)",
}
FLAG_INSTRUCTION_BYTES: Final = 1

# hardware_entry_failure_reason: on VT-x the exit reason with bit 31 set (SDM volume 3, VM-Entry Failures During or
# After Loading Guest State) or the VM-instruction error number; on AMD-V the exit code, of which -1 is VMEXIT_INVALID.
VMX_ENTRY_FAILED: Final = 1 << 31
VMX_ENTRY_FAILURES: Final = {33: "invalid guest state", 34: "an MSR that cannot be loaded", 41: "a machine check"}
VMX_INSTRUCTION_ERRORS: Final = {
    4: "VMLAUNCH with a VMCS that is not clear",
    5: "VMRESUME with a VMCS that was not launched",
    7: "invalid control fields",
    8: "invalid host state",
    26: "events blocked by MOV SS",
}
SVM_INVALID: Final = (0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)


def _names(text: str) -> Mapping[int, str]:
    """Read "NAME:BIT NAME:BIT ..."."""
    return {int(bit): name for name, bit in (pair.split(":") for pair in text.split())}


CR0_BITS: Final = _names("PE:0 MP:1 EM:2 TS:3 ET:4 NE:5 WP:16 AM:18 NW:29 CD:30 PG:31")
CR4_BITS: Final = _names(
    "VME:0 PVI:1 TSD:2 DE:3 PSE:4 PAE:5 MCE:6 PGE:7 PCE:8 OSFXSR:9 OSXMMEXCPT:10 UMIP:11 LA57:12 VMXE:13 SMXE:14 "
    "FSGSBASE:16 PCIDE:17 OSXSAVE:18 SMEP:20 SMAP:21 PKE:22 CET:23 PKS:24"
)
EFER_BITS: Final = _names("SCE:0 LME:8 LMA:10 NXE:11 SVME:12 LMSLE:13 FFXSR:14 TCE:15 AIBRSE:21")
RFLAGS_BITS: Final = _names(
    "CF:0 PF:2 AF:4 ZF:6 SF:7 TF:8 IF:9 DF:10 OF:11 NT:14 RF:16 VM:17 AC:18 VIF:19 VIP:20 ID:21"
)
GENERAL: Final = (
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "rbp", "rsp"),
    ("r8", "r9", "r10", "r11"),
    ("r12", "r13", "r14", "r15"),
)
SEGMENTS: Final = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")

RESET_RIP, RESET_SELECTOR, RESET_BASE = 0xFFF0, 0xF000, 0xFFFF_0000
KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
"""Where Linux maps its image: physical address 0 (Documentation/arch/x86/x86_64/mm.rst)."""

EMULATED_HOST: Final = "run it in the emulated host (scripts/emulated-host -- hv run ...), or where AMD-V or VT-x is"
CODE_BEFORE, CODE_AFTER, INSTRUCTIONS = 16, 48, 5
STACK_WORDS: Final = 16
RECENT_EXITS: Final = 12
ACCESSES: Final = {1: "in from port", 2: "out to port", 3: "read from", 4: "write to"}


class Report(NamedTuple):
    """The end of a guest: one line, a page, and what to do about it (None when there is nothing)."""

    message: str
    detail: str
    hint: str | None


class _Scene:
    """The vCPU's last state, with whatever is derived from it more than once."""

    def __init__(
        self, registers: Mapping[str, int], special: Mapping[str, Any], read_virtual: Reader, symbols: Symbols | None
    ) -> None:
        """Find mode and place; a register that is missing counts as zero."""
        self.registers = registers
        self.special = special
        self.read = read_virtual
        self.symbols = symbols
        self.known = bool(registers and special)
        self.long = bool(self.control("efer") & paging.EFER_LMA)
        cs = special.get("cs")
        self.bits = 16
        if cs is not None and cs.db:
            self.bits = 32
        if cs is not None and self.long and cs.l:
            self.bits = 64
        self.rip = registers.get("rip", 0)
        self.place = self.rip if self.bits == 64 else (self.rip + getattr(cs, "base", 0)) & 0xFFFF_FFFF
        self.was_reset = (
            cs is not None
            and (self.rip, cs.selector, cs.base) == (RESET_RIP, RESET_SELECTOR, RESET_BASE)
            and not self.control("cr0") & 1
        )

    def control(self, name: str) -> int:
        """Return a special register that is a plain number."""
        value = self.special.get(name, 0)
        return value if isinstance(value, int) else 0

    def name(self, address: int) -> str | None:
        """Name an address; early Linux code runs at physical addresses, and is found at its later ones."""
        if self.symbols is None:
            return None
        found = self.symbols.find(address)
        return found or (self.symbols.find(address + KERNEL_MAP) if address < 1 << 30 else None)

    def where(self) -> str:
        """Say where the vCPU stopped."""
        if not self.known:
            return "at an unknown place"
        name = self.name(self.place)
        text = f"{self.place:#x}"
        if self.bits != 64 and self.place != self.rip:
            text = f"{self.special['cs'].selector:04x}:{self.rip:04x}"
        return f"at {text}" + (f" ({name})" if name else "")

    def code(self) -> tuple[bytes, bytes]:
        """Return readable bytes before and from the place of death, at most CODE_BEFORE and CODE_AFTER of them."""
        if not self.known:
            return b"", b""
        within = self.place % paging.PAGE
        before = self.read(self.place - CODE_BEFORE, CODE_BEFORE) if self.place >= CODE_BEFORE else None
        if before is None and within < CODE_BEFORE:
            before = self.read(self.place - within, within)
        return before or b"", self.read_up_to(self.place, CODE_AFTER)

    def read_up_to(self, address: int, size: int) -> bytes:
        """Read `size` bytes, or those up to the end of the page, or none."""
        data = self.read(address, size)
        if data is None:
            data = self.read(address, min(size, paging.PAGE - address % paging.PAGE))
        return data or b""


def explain(
    outcome: Outcome, memory: GuestMemory, plan: BootPlan, symbols_path: str | None = None, *, software_kvm: bool
) -> Report:
    """Complete an outcome whose `death` the vCPU took down: write its message and detail.

    Args:
        outcome: the end of a run; `death` holds vcpu, reason, words, registers, special and recent.
        memory: the guest's RAM.
        plan: what was booted; an ELF has its own names.
        symbols_path: a System.map or ELF with names; None takes those of `plan`.
        software_kvm: whether the host's KVM is a software one.
    """
    death = outcome.death or {}
    special = death.get("special", {})
    controls = {name: special.get(name, 0) for name in ("cr0", "cr3", "cr4", "efer")}
    read = paging.reader(memory.read, **controls)
    symbols, note = _symbols(plan, symbols_path, special, read)
    report = describe(
        death.get("reason", 0),
        death.get("words", ()),
        death.get("registers", {}),
        special,
        read,
        symbols=symbols,
        software_kvm=software_kvm,
    )
    extra = [f"on vCPU {death.get('vcpu', 0)}; booted: {plan.kind}{note}", *_recent_lines(death.get("recent", ()))]
    outcome.message = report.message
    outcome.detail = "\n".join([report.detail, *extra, *([f"what to do: {report.hint}"] if report.hint else [])])
    return report


def describe(  # noqa: PLR0913 - each is one thing that the vCPU left behind
    reason: int,
    words: Sequence[int],
    registers: Mapping[str, int],
    special: Mapping[str, Any],
    read_virtual: Reader,
    *,
    symbols: Symbols | None = None,
    software_kvm: bool = False,
) -> Report:
    """Say why a guest died.

    Args:
        reason: the KVM_EXIT_ number.
        words: its data: suberror, count and data of an internal error; reason and CPU of a failed entry.
        registers: rax to r15, rip and rflags; empty when they could not be read.
        special: control registers, gdt_ and idt_ base and limit as numbers; segment registers as objects with selector,
            base, limit, dpl, db and l; empty when they could not be read.
        read_virtual: copies (address, size) out of the guest's virtual memory, None where that is not possible.
        symbols: names for addresses.
        software_kvm: whether the host's KVM is a software one.
    """
    scene = _Scene(registers, special, read_virtual, symbols)
    if reason == EXIT_SHUTDOWN:
        message, notes, hint = _triple_fault(scene)
    elif reason == EXIT_INTERNAL_ERROR:
        message, notes, hint = _internal_error(scene, words, software_kvm=software_kvm)
    elif reason == EXIT_FAIL_ENTRY:
        message, notes, hint = _failed_entry(scene, words)
    else:
        name = EXIT_NAMES.get(reason, "not one that this program knows")
        data = f", hardware reason {words[0]:#x}" if reason == 0 and words else ""
        message = f"the guest stopped with KVM exit reason {reason} ({name}{data}) {scene.where()}"
        notes, hint = [], None
    if not scene.known:
        detail = [*notes, "its registers could not be read"]
    elif reason == EXIT_SHUTDOWN and scene.was_reset:
        detail = notes
    else:
        detail = [*notes, *_state_lines(scene)]
    return Report(message, "\n".join(detail), hint)


def _triple_fault(scene: _Scene) -> tuple[str, list[str], str | None]:
    if scene.was_reset:
        message = "triple fault; where is not known, because KVM on AMD resets the vCPU at once"
        return (
            message,
            ["the registers below are those of a CPU after reset, not of the fault"],
            ("the guest's last words on its console are the best trace; earlyprintk helps a Linux kernel to have some"),
        )
    if not scene.known:
        return f"triple fault {scene.where()}", [], None
    notes = []
    if not scene.control("idt_limit"):
        notes.append("the IDT is empty: no exception could be handled (kernels reset a machine this way, too)")
    fault = scene.control("cr2")
    if fault and scene.control("cr0") & paging.CR0_PG and scene.read(fault, 1) is None:
        name = scene.name(fault)
        notes.append(f"the last page fault was at {fault:#x}{f' ({name})' if name else ''}, which is not mapped")
    return f"triple fault {scene.where()}{_instruction_clause(scene)}", notes, None


def _internal_error(scene: _Scene, words: Sequence[int], *, software_kvm: bool) -> tuple[str, list[str], str | None]:
    suberror = words[0] if words else 0
    data = words[2 : 2 + min(words[1], 16)] if len(words) > 1 else ()
    notes = [f"KVM internal error, suberror {suberror}; data: {' '.join(f'{word:#x}' for word in data) or 'none'}"]
    if suberror != SUBERROR_EMULATION:
        cause = SUBERRORS.get(suberror, f"suberror {suberror}")
        return f"KVM internal error {scene.where()}: {cause}", notes, "sudo dmesg | grep -i kvm may say more"
    given = _given_bytes(data)
    if given:
        notes.append(f"instruction bytes from KVM: {given.hex(' ')}")
    code = given or scene.code()[1]
    text = _decode(scene, code, 1)[0][1] if code else None
    if text is None:
        message = f"KVM could not fetch an instruction {scene.where()}"
        return message, notes, "the guest jumped to where there is no memory"
    if software_kvm:
        message = f"this host's software KVM cannot run the instruction '{text}' {scene.where()}"
        return message, notes, EMULATED_HOST
    return (
        f"KVM cannot emulate the instruction '{text}' {scene.where()}",
        notes,
        "KVM emulates what touches a device's memory and, on old CPUs, real mode; another instruction may do there",
    )


def _given_bytes(data: Sequence[int]) -> bytes:
    """Return the instruction that came with an emulation failure: flags, then size and 15 bytes in two words."""
    if len(data) < 3 or not data[0] & FLAG_INSTRUCTION_BYTES:
        return b""
    packed = b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in data[1:3])
    return packed[1 : 1 + min(packed[0], 15)]


def _failed_entry(scene: _Scene, words: Sequence[int]) -> tuple[str, list[str], str | None]:
    code = words[0] if words else 0
    if code in SVM_INVALID:
        cause, known = "AMD-V: VMRUN found the guest's state or the controls invalid (VMEXIT_INVALID)", True
    elif code & VMX_ENTRY_FAILED:
        cause = f"VT-x: {VMX_ENTRY_FAILURES.get(code & 0xFFFF, f'exit reason {code & 0xFFFF}')}"
        known = code & 0xFFFF == 33
    else:
        cause, known = f"VT-x: {VMX_INSTRUCTION_ERRORS.get(code, f'VM-instruction error {code}')}", False
    found = list(_inconsistencies(scene)) if known and scene.known else []
    hint = None
    if known and not found and not scene.control("cr0") & 1:
        hint = "a VT-x without 'unrestricted guest' (before 2010) enters no real mode that has odd segments"
    return f"KVM could not enter the guest {scene.where()}: {cause} ({code:#x})", found, hint


def _inconsistencies(scene: _Scene) -> Iterator[str]:
    """Name what no CPU enters: checks of SDM volume 3, Checks on the Guest State Area, and APM volume 2, VMRUN."""
    cr0, cr4, efer = scene.control("cr0"), scene.control("cr4"), scene.control("efer")
    rflags = scene.registers.get("rflags", 2)
    cs, tr = scene.special.get("cs"), scene.special.get("tr")
    checks = (
        (cr0 & paging.CR0_PG and not cr0 & 1, "CR0.PG is set without CR0.PE"),
        (cr0 & 1 << 29 and not cr0 & 1 << 30, "CR0.NW is set without CR0.CD"),
        (cr0 >> 32, "CR0 has bits above 31"),
        (scene.long and not cr4 & paging.CR4_PAE, "EFER.LMA is set without CR4.PAE"),
        (scene.long and not cr0 & paging.CR0_PG, "EFER.LMA is set without CR0.PG"),
        (not efer & 1 << 8 and scene.long, "EFER.LMA is set without EFER.LME"),
        (scene.long and cs is not None and cs.l and cs.db, "CS has both L and D set"),
        (not rflags & 2, "RFLAGS bit 1 is clear"),
        (rflags & 1 << 17 and scene.long, "RFLAGS.VM is set in long mode"),
        (scene.bits != 64 and scene.rip >> 32, "RIP has bits above 31 outside 64-bit code"),
        (scene.bits == 64 and not paging.is_canonical(scene.rip, cr4), "RIP is not canonical"),
        (tr is not None and tr.type not in (3, 11), "TR is no busy TSS"),
    )
    for wrong, text in checks:
        if wrong:
            yield f"inconsistent state: {text}"


def _instruction_clause(scene: _Scene) -> str:
    if scene.bits == 64 and not paging.is_canonical(scene.place, scene.control("cr4")):
        return ": RIP is not canonical"
    code = scene.code()[1]
    return f": {_decode(scene, code, 1)[0][1]}" if code else ": no readable memory there"


def _decode(scene: _Scene, code: bytes, count: int) -> list[tuple[int, str]]:
    """Disassemble at most `count` instructions; what is none is "(bad)". Without iced-x86 the bytes must do."""
    try:
        from iced_x86 import Decoder, Formatter, FormatterSyntax  # noqa: PLC0415 - 70 ms, and only a death needs it
    except ImportError:
        return [(scene.rip, f"bytes {code[:15].hex(' ')}")]  # the longest instruction has 15

    formatter = Formatter(FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.uppercase_hex = False
    formatter.space_after_operand_separator = True
    lines = []
    for instruction in Decoder(scene.bits, code, ip=scene.rip & (1 << 64) - 1):
        if instruction.is_invalid:
            lines.append((instruction.ip, "(bad)"))
            break
        target = scene.name(instruction.near_branch_target) if instruction.near_branch_target else None
        lines.append((instruction.ip, formatter.format(instruction) + (f" ({target})" if target else "")))
        if len(lines) == count:
            break
    return lines


# --- the page ---------------------------------------------------------------------------------------------------------


def _state_lines(scene: _Scene) -> Iterator[str]:
    cr0, cr4 = scene.control("cr0"), scene.control("cr4")
    ss = scene.special.get("ss")
    level = getattr(ss, "dpl", 0)
    tables = "off"
    if cr0 & paging.CR0_PG:
        tables = "32-bit" if not cr4 & paging.CR4_PAE else "PAE"
        if scene.long:
            tables = "5-level" if cr4 & paging.CR4_LA57 else "4-level"
    yield f"{scene.bits}-bit code at privilege level {level}, paging {tables}, {scene.where().removeprefix('at ')}"
    yield f"RIP {scene.rip:016x}  RFLAGS {_flags(scene.registers.get('rflags', 0), RFLAGS_BITS)}"
    for row in GENERAL:
        yield "  ".join(f"{name.upper():3} {scene.registers.get(name, 0):016x}" for name in row)
    yield f"CR0 {_flags(cr0, CR0_BITS)}"
    yield f"CR2 {scene.control('cr2'):#x}  CR3 {scene.control('cr3'):#x}  CR8 {scene.control('cr8'):#x}"
    yield f"CR4 {_flags(cr4, CR4_BITS)}"
    yield f"EFER {_flags(scene.control('efer'), EFER_BITS)}"
    for name in SEGMENTS:
        segment = scene.special.get(name)
        if segment is not None:
            size = "64-bit" if segment.l else "32-bit" if segment.db else "16-bit"
            yield (
                f"{name.upper():3} {segment.selector:04x}  base {segment.base:#x}  limit {segment.limit:#x}  "
                f"dpl {segment.dpl}  {size}"
            )
    for name in ("gdt", "idt"):
        yield f"{name.upper()} base {scene.control(name + '_base'):#x}  limit {scene.control(name + '_limit'):#x}"
    yield from _code_lines(scene)
    yield from _stack_lines(scene, ss)


def _flags(value: int, names: Mapping[int, str]) -> str:
    return f"{value:#x} [{' '.join(name for bit, name in names.items() if value >> bit & 1)}]"


def _code_lines(scene: _Scene) -> Iterator[str]:
    before, after = scene.code()
    if not after:
        yield f"code: nothing readable at {scene.place:#x}"
        return
    marked = [*(f"{byte:02x}" for byte in before), f"<{after[0]:02x}>", *(f"{byte:02x}" for byte in after[1:])]
    yield f"code: {' '.join(marked)}"
    for number, (address, text) in enumerate(_decode(scene, after, INSTRUCTIONS)):
        yield f"  {'->' if not number else '  '} {address:#x}: {text}"


def _stack_lines(scene: _Scene, ss: Any) -> Iterator[str]:
    top, size = scene.registers.get("rsp", 0), scene.bits // 8
    if scene.bits != 64:
        top = ((top & (0xFFFF_FFFF if ss is None or ss.db else 0xFFFF)) + getattr(ss, "base", 0)) & 0xFFFF_FFFF
    data = scene.read_up_to(top, STACK_WORDS * size)
    words = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data) - size + 1, size)]
    if not words:
        yield f"stack: nothing readable at {top:#x}"
        return
    yield f"stack at {top:#x}:"
    for at in range(0, len(words), 4):
        yield f"  {top + at * size:#x}: {' '.join(f'{word:0{2 * size}x}' for word in words[at : at + 4])}"
    for word in words:
        name = scene.name(word)
        if name:
            yield f"  on the stack: {word:#x} ({name})"


def _recent_lines(recent: Sequence[Any]) -> Iterator[str]:
    """Yield the last exits, oldest first, like ones counted together; values are the guest's and stay out."""
    groups: list[tuple[str, int]] = []
    for record in recent:
        access = ACCESSES.get(record.kind)
        text = f"{access} {record.address:#x}, {record.size} bytes" if access else f"exit reason {record.reason}"
        if groups and groups[-1][0] == text:
            groups[-1] = (text, groups[-1][1] + 1)
        else:
            groups.append((text, 1))
    if groups:
        yield "last exits, oldest first:"
        for text, count in groups[-RECENT_EXITS:]:
            yield f"  {text}{f' ({count} times)' if count > 1 else ''}"


def _symbols(plan: BootPlan, path: str | None, special: Mapping[str, Any], read: Reader) -> tuple[Symbols | None, str]:
    """Find names for the guest and how far KASLR has moved it; returns a note on them, too.

    KASLR's offset shows in the IDT: gate 14 holds the page fault handler, its bits 15 to 0, selector, attributes, its
    bits 31 to 16 and 63 to 32 (SDM volume 3, 64-Bit Mode IDT).
    """
    from hypervisor.symbols import Symbols  # noqa: PLC0415 - only a death needs them

    try:
        if path is not None:
            symbols = Symbols.load(path)
        elif plan.symbols is not None:
            symbols = Symbols.parse(plan.symbols, name="the kernel")
        else:
            return None, ""
    except ImageError as error:
        return None, f"; no names: {error}"
    note = f"; names from {path or 'the kernel image'}"
    gate = read(special.get("idt_base", 0) + 14 * 16, 16) if special.get("idt_limit", 0) >= 15 * 16 - 1 else None
    offset = symbols.kaslr_offset(int.from_bytes(gate[0:2] + gate[6:12], "little")) if gate else None
    if offset is None:
        return symbols, note + (" as if without KASLR" if plan.is_linux else "")
    symbols.offset = offset
    return symbols, note + (f", moved by {offset:#x}" if offset else "")

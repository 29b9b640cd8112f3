"""Why a guest died: from made-up last moments, true ones and impossible ones."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from hypervisor.postmortem import Report, describe
from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Callable

SHUTDOWN, FAIL_ENTRY, INTERNAL_ERROR = 8, 9, 17  # KVM_EXIT_ numbers of <linux/kvm.h>
PE, PG, PAE, LA57, LME, LMA = 1, 1 << 31, 1 << 5, 1 << 12, 1 << 8, 1 << 10
KERNEL = 0xFFFF_FFFF_8100_0000


class Segment(NamedTuple):
    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF_FFFF
    type: int = 11
    dpl: int = 0
    db: int = 0
    l: int = 0  # noqa: E741 - the descriptor bit's name


NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", *(f"r{n}" for n in range(8, 16)), "rip", "rflags")


def registers(**values: int) -> dict[str, int]:
    return dict.fromkeys(NAMES, 0) | {"rflags": 2} | values


def special(**values: Any) -> dict[str, Any]:
    """64-bit code with a full IDT, unless `values` say otherwise."""
    state = dict.fromkeys(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "gdt_base", "gdt_limit", "idt_base"), 0)
    state |= {"cr0": PG | PE, "cr4": PAE, "efer": LME | LMA, "idt_limit": 0xFFF}
    segments = {name: Segment() for name in ("ss", "ds", "es", "fs", "gs", "tr", "ldt")}
    return state | segments | {"cs": Segment(selector=0x10, l=1)} | values


def real_mode(**values: Any) -> dict[str, Any]:
    return special(cr0=0x10, cr4=0, efer=0, cs=Segment(0xF000, 0xF0000, 0xFFFF)) | values


class Memory:
    """Virtual memory made of a few stretches."""

    def __init__(self, **stretches: bytes) -> None:
        self.stretches = {int(address, 16): data for address, data in stretches.items()}

    def read(self, address: int, size: int) -> bytes | None:
        for base, data in self.stretches.items():
            if base <= address and address + size <= base + len(data):
                return data[address - base : address - base + size]
        return None


def memory(at: int, data: bytes) -> Callable[[int, int], bytes | None]:
    return Memory(**{hex(at): data}).read


def nothing(_address: int, _size: int) -> None:
    return None


SYMBOLS = Symbols([(KERNEL, 0x100, "start_kernel"), (KERNEL + 0x100, 0x40, "panic"), (KERNEL + 0x1000, 8, "data")])


def one_line(report: Report) -> str:
    assert "\n" not in report.message
    assert len(report.message) < 300
    assert not any(not line.strip() for line in report.detail.splitlines()), "no empty lines in a detail"
    return report.message


# --- triple faults ----------------------------------------------------------------------------------------------------


def test_a_triple_fault_names_place_symbol_and_instruction() -> None:
    code = bytes(16) + bytes.fromhex("0f01 1d00000000 0f0b") + b"\x90" * 60  # lidt [rip]; ud2; nop...
    report = describe(
        SHUTDOWN,
        [],
        registers(rip=KERNEL + 0x12, rsp=KERNEL + 0x10),
        special(),
        memory(KERNEL + 2, code),
        symbols=SYMBOLS,
    )
    assert one_line(report) == (
        "triple fault at 0xffffffff81000012 (start_kernel+0x12/0x100): lidt [rel 0xffffffff81000019]"
    )
    assert "00 00 <0f> 01 1d" in report.detail
    assert "  -> 0xffffffff81000012: lidt" in report.detail
    assert "     0xffffffff81000019: ud2" in report.detail
    assert report.hint is None


def test_a_triple_fault_without_an_idt_says_so() -> None:
    detail = describe(SHUTDOWN, [], registers(rip=KERNEL), special(idt_limit=0), nothing).detail
    assert "the IDT is empty" in detail
    assert "the IDT is empty" not in describe(SHUTDOWN, [], registers(rip=KERNEL), special(), nothing).detail


def test_a_triple_fault_names_the_page_that_was_not_mapped() -> None:
    read = memory(KERNEL, b"\x90" * 64)
    detail = describe(SHUTDOWN, [], registers(rip=KERNEL), special(cr2=0xDEAD000), read).detail
    assert "the last page fault was at 0xdead000, which is not mapped" in detail
    assert "not mapped" not in describe(SHUTDOWN, [], registers(rip=KERNEL), special(cr2=KERNEL), read).detail
    named = describe(SHUTDOWN, [], registers(rip=KERNEL), special(cr2=KERNEL + 0x1004), read, symbols=SYMBOLS).detail
    assert "0xffffffff81001004 (data+0x4/0x8), which" in named


def test_a_vcpu_that_kvm_has_reset_is_not_taken_for_the_fault() -> None:
    """KVM on AMD gives the vCPU an INIT when the guest shuts down: CS F000 at 0xFFFF0000, IP FFF0, CR0.PE clear."""
    state = real_mode(cr0=0x6000_0010, cs=Segment(0xF000, 0xFFFF_0000, 0xFFFF), idt_limit=0)
    report = describe(SHUTDOWN, [], registers(rip=0xFFF0), state, nothing)
    assert "resets the vCPU" in one_line(report)
    assert "0xfff" not in report.message
    assert "not of the fault" in report.detail
    assert "RAX" not in report.detail
    assert "IDT" not in report.detail
    assert report.hint is not None
    assert "console" in report.hint
    in_rom = real_mode(cs=Segment(0xF000, 0xF0000, 0xFFFF))
    assert "resets" not in describe(SHUTDOWN, [], registers(rip=0xFFF0), in_rom, nothing).message
    assert "RAX" in describe(FAIL_ENTRY, [7, 0], registers(rip=0xFFF0), state, nothing).detail


def test_registers_that_could_not_be_read() -> None:
    for known in ({}, registers(rip=5)):
        report = describe(SHUTDOWN, [], known, {}, memory(0, b"\x90" * 4096))
        assert one_line(report) == "triple fault at an unknown place"
        assert report.detail == "its registers could not be read"
    assert "an unknown place" in describe(INTERNAL_ERROR, [1, 0], {}, {}, memory(0, b"\x90" * 64)).message


# --- internal errors --------------------------------------------------------------------------------------------------


def emulation_failure(code: bytes, flags: int = 1) -> list[int]:
    """In struct kvm_run, emulation_failure: suberror, ndata, then flags, insn_size and insn_bytes[15]."""
    return [1, 3, flags, *struct.unpack("<QQ", bytes([len(code)]) + code.ljust(15, b"\0"))]


def test_an_instruction_that_a_software_kvm_cannot_run() -> None:
    words = emulation_failure(bytes.fromhex("480fc70f"))
    report = describe(
        INTERNAL_ERROR,
        words,
        registers(rip=KERNEL + 0x112),
        special(),
        nothing,
        symbols=SYMBOLS,
        software_kvm=True,
    )
    assert one_line(report) == (
        "this host's software KVM cannot run the instruction 'cmpxchg16b [rdi]' at 0xffffffff81000112 (panic+0x12/0x40)"
    )
    assert report.hint is not None
    assert "scripts/emulated-host" in report.hint
    assert "instruction bytes from KVM: 48 0f c7 0f" in report.detail
    assert "suberror 1" in report.detail


def test_the_same_on_hardware_blames_no_host() -> None:
    report = describe(INTERNAL_ERROR, emulation_failure(b"\xd9\x00"), registers(rip=KERNEL), special(), nothing)
    assert one_line(report) == "KVM cannot emulate the instruction 'fld dword [rax]' at 0xffffffff81000000"
    assert "emulated-host" not in (report.hint or "")


def test_bytes_come_from_memory_where_kvm_gave_none() -> None:
    read = memory(KERNEL, b"\x0f\x01\xf9" + b"\x90" * 60)
    for words in (emulation_failure(b"\x90", flags=0), [1, 0], [1, 1, 1], emulation_failure(b"")):
        report = describe(INTERNAL_ERROR, words, registers(rip=KERNEL), special(), read, software_kvm=True)
        assert "'rdtscp'" in report.message


def test_an_instruction_size_beyond_the_field_is_cut() -> None:
    words = [1, 3, 1, 0x90_9090_9090_90FF, (1 << 64) - 1]
    report = describe(INTERNAL_ERROR, words, registers(rip=KERNEL), special(), nothing)
    assert "'nop'" in one_line(report)


def test_an_instruction_that_is_none() -> None:
    report = describe(INTERNAL_ERROR, emulation_failure(b"\xff\xff"), registers(), special(), nothing)
    assert "'(bad)'" in one_line(report)


def test_no_bytes_at_all_is_a_jump_to_nowhere() -> None:
    report = describe(INTERNAL_ERROR, [1, 0], registers(rip=0xD00_0000), special(), nothing)
    assert one_line(report) == "KVM could not fetch an instruction at 0xd000000"
    assert "no memory" in (report.hint or "")


@pytest.mark.parametrize(
    ("suberror", "words"),
    [(2, "two exceptions"), (3, "while an event was delivered"), (4, "that KVM does not know"), (77, "suberror 77")],
)
def test_other_internal_errors(suberror: int, words: str) -> None:
    report = describe(INTERNAL_ERROR, [suberror, 2, 0xAB, 0xCD, 0xEF], registers(rip=KERNEL), special(), nothing)
    assert words in one_line(report)
    assert "data: 0xab 0xcd\n" in report.detail, "as many words as the count says"
    assert "dmesg" in (report.hint or "")


def test_an_internal_error_without_data() -> None:
    assert one_line(describe(INTERNAL_ERROR, [], registers(), special(), nothing))
    assert "data: none" in describe(INTERNAL_ERROR, [3, 1 << 32], registers(), special(), nothing).detail


# --- failed entries and unknown exits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0x8000_0021, "VT-x: invalid guest state (0x80000021)"),
        (0x8000_0022, "VT-x: an MSR that cannot be loaded"),
        (0x8000_0029, "VT-x: a machine check"),
        (0x8000_0063, "VT-x: exit reason 99"),
        (7, "VT-x: invalid control fields"),
        (8, "VT-x: invalid host state"),
        (99, "VT-x: VM-instruction error 99"),
        (0xFFFF_FFFF, "AMD-V: VMRUN found the guest's state"),
        ((1 << 64) - 1, "VMEXIT_INVALID"),
    ],
)
def test_failed_entries(code: int, words: str) -> None:
    message = one_line(describe(FAIL_ENTRY, [code, 0], registers(rip=KERNEL), special(), nothing))
    assert message.startswith("KVM could not enter the guest at 0xffffffff81000000: ")
    assert words in message


@pytest.mark.parametrize(
    ("state", "values", "words"),
    [
        (special(cr0=PG), {}, "CR0.PG is set without CR0.PE"),
        (special(cr0=PG | PE | 1 << 29), {}, "CR0.NW is set without CR0.CD"),
        (special(cr0=PG | PE | 1 << 40), {}, "bits above 31"),
        (special(cr4=0), {}, "EFER.LMA is set without CR4.PAE"),
        (special(cr0=PE), {}, "EFER.LMA is set without CR0.PG"),
        (special(efer=LMA), {}, "without EFER.LME"),
        (special(cs=Segment(l=1, db=1)), {}, "both L and D"),
        (special(), {"rflags": 0}, "RFLAGS bit 1"),
        (special(), {"rflags": 2 | 1 << 17}, "RFLAGS.VM is set in long mode"),
        (real_mode(), {"rip": 1 << 32}, "RIP has bits above 31"),
        (special(), {"rip": 1 << 63}, "RIP is not canonical"),
        (special(tr=Segment(type=9)), {}, "TR is no busy TSS"),
    ],
)
def test_an_invalid_state_is_looked_through(state: dict[str, Any], values: dict[str, int], words: str) -> None:
    for code in (0x8000_0021, 0xFFFF_FFFF):
        detail = describe(FAIL_ENTRY, [code, 0], registers(**values), state, nothing).detail
        assert f"inconsistent state: {words}" in detail or (words in detail and "inconsistent state" in detail)
        assert detail.count("inconsistent state") == 1
    assert "inconsistent" not in describe(FAIL_ENTRY, [7, 0], registers(**values), state, nothing).detail


def test_a_sound_state_in_real_mode_points_to_old_vt_x() -> None:
    report = describe(FAIL_ENTRY, [0x8000_0021, 0], registers(rip=0xFFF0), real_mode(), nothing)
    assert "unrestricted guest" in (report.hint or "")
    assert describe(FAIL_ENTRY, [0x8000_0021, 0], registers(rip=KERNEL), special(), nothing).hint is None
    assert "inconsistent" not in describe(FAIL_ENTRY, [0x8000_0021], registers(rip=KERNEL), special(), nothing).detail


@pytest.mark.parametrize(
    ("reason", "data", "words"),
    [
        (0, [0x400], "reason 0 (unknown hardware exit, hardware reason 0x400)"),
        (29, [], "reason 29 (RDMSR)"),
        (63, [], "reason 63 (not one that this program knows)"),
    ],
)
def test_unknown_exits(reason: int, data: list[int], words: str) -> None:
    message = one_line(describe(reason, data, registers(rip=KERNEL), special(), nothing, symbols=SYMBOLS))
    assert words in message
    assert "(start_kernel+0x0/0x100)" in message


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_register_is_on_the_page() -> None:
    values = {name: 0xA0 + number for number, name in enumerate(NAMES)}
    state = special(
        cr0=0x8005_0033,
        cr2=0x123,
        cr3=0x456000,
        cr4=0x20 | 1 << 12,
        cr8=7,
        efer=0xD01,
        gdt_base=0x5000,
        gdt_limit=0x7F,
        idt_base=0x6000,
        ss=Segment(0x2B, dpl=3),
    )
    detail = describe(SHUTDOWN, [], values | {"rflags": 0x10246}, state, nothing).detail
    for number, name in enumerate(NAMES[:-1]):
        assert f"{name.upper():3} {0xA0 + number:016x}" in detail
    assert "RFLAGS 0x10246 [PF ZF IF RF]" in detail
    assert "CR0 0x80050033 [PE MP ET NE WP AM PG]" in detail
    assert "CR2 0x123  CR3 0x456000  CR8 0x7" in detail
    assert "CR4 0x1020 [PAE LA57]" in detail
    assert "EFER 0xd01 [SCE LME LMA NXE]" in detail
    assert "64-bit code at privilege level 3, paging 5-level" in detail
    assert "SS  002b  base 0x0  limit 0xffffffff  dpl 3  16-bit" in detail
    assert "GDT base 0x5000  limit 0x7f" in detail
    assert "IDT base 0x6000  limit 0xfff" in detail


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (real_mode(), "16-bit code at privilege level 0, paging off"),
        (special(efer=0, cr0=PE, cs=Segment(db=1)), "32-bit code at privilege level 0, paging off"),
        (special(efer=0, cr4=0, cs=Segment(db=1)), "32-bit code at privilege level 0, paging 32-bit"),
        (special(efer=0, cs=Segment(db=1)), "32-bit code at privilege level 0, paging PAE"),
        (special(cs=Segment(db=1)), "32-bit code at privilege level 0, paging 4-level"),
        (special(cs=Segment()), "16-bit code at privilege level 0, paging 4-level"),
        (special(efer=LME, cs=Segment(l=1)), "16-bit code"),
    ],
)
def test_the_mode_decides_how_code_is_read(state: dict[str, Any], words: str) -> None:
    assert words in describe(SHUTDOWN, [], registers(), state, nothing).detail


def test_real_mode_addresses_have_segments() -> None:
    read = memory(0xF1230, b"\xea\x34\x12\x00\xf0" + b"\x90" * 60)
    report = describe(SHUTDOWN, [], registers(rip=0x1230), real_mode(), read)
    assert one_line(report) == "triple fault at f000:1230: jmp 0xf000:0x1234"
    assert "-> 0x1230: jmp" in report.detail


def test_the_same_bytes_differ_by_mode() -> None:
    read = memory(0x1000, b"\x48\xb8" + bytes(range(1, 9)) + b"\x90" * 60)
    wide = describe(SHUTDOWN, [], registers(rip=0x1000), special(), read).message
    narrow = describe(SHUTDOWN, [], registers(rip=0x1000), special(cs=Segment(db=1)), read).message
    assert wide.endswith("mov rax, 0x807060504030201")
    assert narrow.endswith("dec eax")


def test_calls_are_named() -> None:
    read = memory(KERNEL + 0x20, bytes.fromhex("e8db000000") + b"\x90" * 60)
    detail = describe(SHUTDOWN, [], registers(rip=KERNEL + 0x20), special(), read, symbols=SYMBOLS).detail
    assert "call 0xffffffff81000100 (panic+0x0/0x40)" in detail


def test_early_linux_code_is_named_at_its_physical_address() -> None:
    report = describe(SHUTDOWN, [], registers(rip=0x100_0010), special(), nothing, symbols=SYMBOLS)
    assert "at 0x1000010 (start_kernel+0x10/0x100)" in report.message


def test_code_at_the_edge_of_what_is_mapped() -> None:
    page = KERNEL + 0x1000
    read = memory(page - 3, b"\x90\x0f\x0b")
    detail = describe(SHUTDOWN, [], registers(rip=page - 2), special(), read).detail
    assert "code: <0f> 0b" in detail
    read = memory(page, b"\xcc\x0f\x0b" + bytes(100))
    assert "code: cc <0f> 0b" in describe(SHUTDOWN, [], registers(rip=page + 1), special(), read).detail


def test_the_stack_is_shown_with_names() -> None:
    stack = struct.pack("<18Q", KERNEL + 0x104, *range(17))
    read = memory(0xFFFF_C900_0000_0FC0, stack[:64])
    detail = describe(
        SHUTDOWN, [], registers(rip=KERNEL, rsp=0xFFFF_C900_0000_0FC0), special(), read, symbols=SYMBOLS
    ).detail
    assert "stack at 0xffffc90000000fc0:" in detail
    assert "  0xffffc90000000fc0: ffffffff81000104 0000000000000000 0000000000000001 0000000000000002" in detail
    assert "  0xffffc90000000fe0: 0000000000000003" in detail
    assert "on the stack: 0xffffffff81000104 (panic+0x4/0x40)" in detail
    assert "stack: nothing readable" in describe(SHUTDOWN, [], registers(), special(), nothing).detail


@pytest.mark.parametrize(("db", "top", "word"), [(1, 0x2_0010, "22221111 "), (0, 0x1_0010, "22221111 ")])
def test_a_segmented_stack(db: int, top: int, word: str) -> None:
    """SS.base is added, and without D/B the offset has 16 bits."""
    state = special(efer=0, cr0=PE, cs=Segment(db=1), ss=Segment(0x18, 0x1_0000, db=db))
    read = memory(top, bytes.fromhex("1111222233334444") + bytes(200))
    detail = describe(SHUTDOWN, [], registers(rsp=0x1_0010), state, read).detail
    assert f"{top:#x}: {word}" in detail


# --- guests that left nonsense ----------------------------------------------------------------------------------------


def test_a_rip_that_is_not_canonical() -> None:
    report = describe(SHUTDOWN, [], registers(rip=0x8000_0000_0000_0000), special(), nothing)
    assert one_line(report) == "triple fault at 0x8000000000000000: RIP is not canonical"
    assert "nothing readable at 0x8000000000000000" in report.detail


def test_a_rip_without_memory() -> None:
    assert one_line(describe(SHUTDOWN, [], registers(rip=KERNEL), special(), nothing)).endswith(
        ": no readable memory there"
    )

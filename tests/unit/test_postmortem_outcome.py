"""From a vCPU's raw last moment to an outcome with its message and page: names, KASLR, exits, and any nonsense."""

from __future__ import annotations

import struct
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.ports import GuestFault
from hypervisor.outcome import Outcome, Stop
from hypervisor.postmortem import describe, explain

if TYPE_CHECKING:
    from pathlib import Path

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


PLAN: Any = SimpleNamespace(kind="flat 64-bit binary", is_linux=False, release=None, symbols=None)


def emulation_failure(code: bytes, flags: int = 1) -> list[int]:
    """In struct kvm_run, emulation_failure: suberror, ndata, then flags, insn_size and insn_bytes[15]."""
    return [1, 3, flags, *struct.unpack("<QQ", bytes([len(code)]) + code.ljust(15, b"\0"))]


def record(kind: int, address: int, reason: int = 2, count: int = 1) -> SimpleNamespace:
    return SimpleNamespace(tick=1, reason=reason, kind=kind, size=1, address=address, value=count)


def death(**facts: Any) -> Outcome:
    facts = {
        "vcpu": 2,
        "reason": SHUTDOWN,
        "words": [0] * 18,
        "registers": registers(rip=0x1000),
        "special": special(efer=0, cr0=PE, cs=Segment(0x10, db=1)),
        "recent": [],
    } | facts
    return Outcome(Stop.TRIPLE_FAULT, death=facts)


class FlatRam:
    def __init__(self, size: int = 0x10000) -> None:
        self.data = bytearray(size)

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or gpa + size > len(self.data):
            raise GuestFault(gpa, size)
        return bytes(self.data[gpa : gpa + size])


def test_an_outcome_gets_its_message_and_detail() -> None:
    ram = FlatRam()
    ram.data[0x1000:0x1002] = b"\x0f\x0b"
    outcome = death(
        recent=[record(2, 0x3F8), record(2, 0x3F8), record(1, 0x3FD), record(3, 0xFEE0_0000, 6), record(5, 0, 8)]
    )
    report = explain(outcome, ram, PLAN, software_kvm=False)  # type: ignore[arg-type]
    assert outcome.message == report.message == "triple fault at 0x1000: ud2"
    lines = outcome.detail.splitlines()
    assert "on vCPU 2; booted: flat 64-bit binary" in lines
    at = lines.index("last exits, oldest first:")
    assert lines[at + 1 :] == [
        "  out to port 0x3f8, 1 bytes (2 times)",
        "  in from port 0x3fd, 1 bytes",
        "  read from 0xfee00000, 1 bytes",
        "  exit reason 8",
    ]


def test_what_to_do_is_the_last_line() -> None:
    outcome = death(reason=INTERNAL_ERROR, words=emulation_failure(b"\x0f\x01\xf9"))
    explain(outcome, FlatRam(), PLAN, software_kvm=True)  # type: ignore[arg-type]
    assert outcome.detail.splitlines()[-1].startswith("what to do: run it in the emulated host")


def test_a_death_without_facts() -> None:
    outcome = Outcome(Stop.INTERNAL_ERROR, death={})
    explain(outcome, FlatRam(), PLAN, software_kvm=False)  # type: ignore[arg-type]
    assert outcome.message
    assert "could not be read" in outcome.detail


def gate(handler: int) -> bytes:
    return struct.pack("<HHHHII", handler & 0xFFFF, 0x10, 0x8E00, handler >> 16 & 0xFFFF, handler >> 32, 0)


LINUX = PLAN.__class__(kind="bzImage 6.1.0, 64-bit entry", is_linux=True, release="6.1.0", symbols=None)


def linux_death(ram: FlatRam, rip: int, handler: int | None) -> Outcome:
    """Map 0xffffffff80000000 plus the first 2 MiB to physical 0 by one large page, and put an IDT there."""
    for table, index, entry in ((0x1000, 511, 0x2003), (0x2000, 510, 0x3003), (0x3000, 0, 0x83)):
        ram.data[table + 8 * index : table + 8 * index + 8] = struct.pack("<Q", entry)
    if handler is not None:
        ram.data[0x4000 + 14 * 16 : 0x4000 + 15 * 16] = gate(handler)
    state = special(cr3=0x1000, idt_base=0xFFFF_FFFF_8000_4000, idt_limit=0xFFF if handler is not None else 0)
    return death(registers=registers(rip=rip), special=state)


def system_map(path: Path, *extra: str) -> str:
    lines = ["ffffffff81000000 T _stext", "ffffffff81000100 T start_kernel", "ffffffff81000200 T rest_init", *extra]
    path.write_text("\n".join([*lines, "ffffffff82000000 B _end"]) + "\n")
    return str(path)


def test_kaslr_is_seen_in_the_idt(tmp_path: Path) -> None:
    path = system_map(tmp_path / "map", "ffffffff81c00b40 T asm_exc_page_fault")
    ram = FlatRam()
    outcome = linux_death(ram, 0xFFFF_FFFF_9B00_0112, 0xFFFF_FFFF_9BC0_0B40)
    explain(outcome, ram, LINUX, path, software_kvm=False)  # type: ignore[arg-type]
    assert "(start_kernel+0x12/0x100)" in outcome.message
    assert f"names from {path}, moved by 0x1a000000" in outcome.detail


@pytest.mark.parametrize("size", [9, 13])
def test_kaslr_is_seen_in_the_early_idt(tmp_path: Path, size: int) -> None:
    path = system_map(tmp_path / "map", "ffffffff81d00000 T early_idt_handler_array")
    ram = FlatRam()
    outcome = linux_death(ram, 0xFFFF_FFFF_8120_0112, 0xFFFF_FFFF_81F0_0000 + 14 * size)
    explain(outcome, ram, LINUX, path, software_kvm=False)  # type: ignore[arg-type]
    assert "(start_kernel+0x12/0x100)" in outcome.message


@pytest.mark.parametrize("handler", [None, 0, 0xFFFF_FFFF_9BC0_0B41, 0xFFFF_FFFF_8000_0000])
def test_without_a_sign_of_kaslr_names_are_taken_as_they_are(tmp_path: Path, handler: int | None) -> None:
    path = system_map(tmp_path / "map", "ffffffff81c00b40 T asm_exc_page_fault")
    ram = FlatRam()
    outcome = linux_death(ram, 0xFFFF_FFFF_8100_0112, handler)
    explain(outcome, ram, LINUX, path, software_kvm=False)  # type: ignore[arg-type]
    assert "(start_kernel+0x12/0x100)" in outcome.message
    assert "as if without KASLR" in outcome.detail


def test_a_file_of_names_that_is_none_costs_only_the_names(tmp_path: Path) -> None:
    outcome = death()
    explain(outcome, FlatRam(), PLAN, str(tmp_path / "absent"), software_kvm=False)  # type: ignore[arg-type]
    assert outcome.message.startswith("triple fault at 0x1000")
    assert "no names: " in outcome.detail
    stripped = PLAN.__class__(kind="ELF", is_linux=False, release=None, symbols=b"\x7fELF" + bytes(60))
    outcome = death()
    explain(outcome, FlatRam(), stripped, software_kvm=False)  # type: ignore[arg-type]
    assert "the kernel: no symbols in it" in outcome.detail


WORD = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, KERNEL, (1 << 64) - 1, 1 << 63, 0xFFF0]))
SEGMENTS = st.builds(
    Segment,
    selector=st.integers(0, 0xFFFF),
    base=WORD,
    limit=st.integers(0, (1 << 32) - 1),
    type=st.integers(0, 15),
    dpl=st.integers(0, 3),
    db=st.integers(0, 1),
    l=st.integers(0, 1),
)
STATES = st.fixed_dictionaries(
    dict.fromkeys(("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "gdt_base", "idt_base"), WORD)
    | {name: st.integers(0, 0xFFFF) for name in ("gdt_limit", "idt_limit")}
    | dict.fromkeys(("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt"), SEGMENTS)
)


class Ram:
    """Guest-physical memory that repeats a pattern up to 1 MiB: page tables full of whatever the pattern says."""

    def __init__(self, pattern: bytes) -> None:
        self.pattern = pattern * (1 + 8192 // len(pattern))

    def read(self, gpa: int, size: int) -> bytes:
        if gpa < 0 or gpa + size > 1 << 20:
            raise GuestFault(gpa, size)
        return self.pattern[gpa % 4096 : gpa % 4096 + size]


@given(
    st.sampled_from([0, SHUTDOWN, FAIL_ENTRY, INTERNAL_ERROR, 63]),
    st.lists(WORD, max_size=18),
    st.fixed_dictionaries(dict.fromkeys(NAMES, WORD)),
    STATES,
    st.binary(min_size=1, max_size=4096),
)
def test_no_last_moment_is_too_strange(
    reason: int, words: list[int], values: dict[str, int], state: dict[str, Any], pattern: bytes
) -> None:
    outcome = Outcome(
        Stop.TRIPLE_FAULT, death={"vcpu": 1, "reason": reason, "words": words, "registers": values, "special": state}
    )
    report = explain(outcome, Ram(pattern), PLAN, software_kvm=bool(pattern[0] & 1))  # type: ignore[arg-type]
    assert report.message
    assert "\n" not in report.message
    assert len(outcome.detail) < 20_000


def test_a_death_is_explained_without_the_disassembler(monkeypatch):
    monkeypatch.setitem(sys.modules, "iced_x86", None)  # as if it were not installed
    segment = SimpleNamespace(base=0, limit=0xFFFF_FFFF, selector=16, l=0, db=1, dpl=0, type=11)
    special = {"cr0": 0x11, "cr3": 0, "cr4": 0, "efer": 0, "cs": segment, "ss": segment, "idt_limit": 0}
    report = describe(8, [0] * 18, {"rip": 0x1000}, special, lambda _address, size: (b"\x0f\x0b" * size)[:size])
    assert "0x1000" in report.message
    assert "bytes 0f 0b" in report.message

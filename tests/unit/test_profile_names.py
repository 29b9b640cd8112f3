"""Names for addresses of a guest: where they come from, what wins, and what survives in a file."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kallsyms_writer import LAYOUTS, put_kernel
from linux_memory import MIB, TEXT, VARIABLES, LinuxMemory

from hypervisor.memory import GuestMemory
from hypervisor.profile.names import GuestNames
from hypervisor.profile.processes import Process
from hypervisor.symbols import Symbols

FUNCTIONS = {f"function_{at}": 0x4000 + 0x30 * at for at in range(100)}
BTF_END = VARIABLES["__start_BTF"] + len(LinuxMemory.types(("core_layout",)))


@pytest.fixture
def memory():
    memory = GuestMemory(20 * MIB)
    yield memory
    memory.close()


@pytest.fixture
def linux(memory):
    """A kernel with tables of its own, two processes and a module."""
    linux = LinuxMemory(memory)
    linux.task(1, "init", 0x40_0000)
    linux.task(94, "sh", 0x40_2000)
    linux.evdev = linux.module("evdev", [(0, "evdev_read")])
    names = [(at, f"D{name}") for name, at in VARIABLES.items() if name != "phys_base"]
    names += [(at, f"t{name}") for name, at in FUNCTIONS.items()]
    names += [(BTF_END, "D__stop_BTF"), (0, "T_text"), (0x2F_0000, "T_etext")]
    put_kernel(memory, LAYOUTS["6.1.192 and 6.2"], names, physical=8 * MIB, virtual=TEXT, rodata=3 * MIB)
    return linux


def system_map(extra: int = 0) -> bytes:
    names = FUNCTIONS | {"_text": 0, "only_in_the_file": 0x4000 + 0x30 * 100} | VARIABLES | {"__stop_BTF": BTF_END}
    return b"".join(b"%016x T %s\n" % (TEXT - 64 * MIB + at * (1 + extra), name.encode()) for name, at in names.items())


def test_names_of_a_linux_guest(memory, linux):
    names = GuestNames.of_guest(memory)
    assert names.name(TEXT + 0x4031) == "function_1"
    assert names.name(linux.evdev + 5) == "evdev_read [evdev]"
    assert names.name(0xFFFF_FFFF_C100_0000) == "[module]"
    assert names.name(0xFFFF_9C00_0000_1000) == "0xffff9c0000001000"
    assert names.name(0x40_1234, 0x40_2000) == "[user] sh/94"
    assert names.name(0x40_1234, 0x40_3005, pages=True) == "sh/94 user 0x401000"
    assert names.name(0x40_1234, 1 << 63 | 0x40_8123) == "[user cr3=0x408000]"
    assert names.name(0x40_1234, 0x40_2000, kernel_mode=True) == "0x401234"
    assert names.name(0x40_1234) == "0x401234"
    assert "own table" in names.notes[0]


def test_a_file_of_the_same_kernel_wins(memory, linux):
    names = GuestNames.of_guest(memory, file=system_map(), file_name="System.map")
    assert names.name(TEXT + 0x4000 + 0x30 * 100) == "only_in_the_file"
    assert names.name(TEXT + 0x4031) == "function_1"
    assert names.notes == ["names from System.map, moved by 0x4000000"]
    assert names.name(0x40_1234, 0x40_2000) == "[user] sh/94"


@pytest.mark.parametrize("file", [system_map(1), b"ffffffff81000000 T other\n"])
def test_a_file_of_another_kernel_is_noticed(memory, linux, file):
    names = GuestNames.of_guest(memory, file=file, file_name="System.map")
    assert names.name(TEXT + 0x4031) == "function_1"
    assert "System.map is of another kernel" in names.notes[0]


def test_a_file_without_symbols_is_said_to_be_one(memory, linux):
    names = GuestNames.of_guest(memory, file=b"hello", file_name="what")
    assert "what: no symbols in it" in names.notes[0]
    assert names.name(TEXT + 0x4031) == "function_1"


def test_a_guest_without_tables_has_the_names_of_its_file(memory):
    file = b"0000000000100000 T start\n0000000000100010 T loop\n0000000000100020 T end\n"
    names = GuestNames.of_guest(memory, file=file, file_name="guest.elf")
    assert (names.name(0x10_0012, 0x1000), names.name(0x20_0000)) == ("loop", "0x200000")
    assert names.notes == ["names from guest.elf"]
    nothing = GuestNames.of_guest(memory)
    assert (nothing.kernel, nothing.notes, nothing.name(0xFFFF_FFFF_C000_0000)) == (None, [], "0xffffffffc0000000")


def test_the_page_fault_handler_moves_a_file_where_there_are_no_tables(memory):
    file = b"ffffffff81000000 T _text\nffffffff81000800 T asm_exc_page_fault\nffffffff81000900 T after\n"
    names = GuestNames.of_guest(memory, file=file, page_fault_handler=TEXT + 0x800)
    assert names.name(TEXT + 0x801) == "asm_exc_page_fault"
    assert names.notes == ["names from the symbols, moved by 0x4000000"]


def test_what_is_learned_later_is_added(memory, linux):
    names = GuestNames.of_guest(memory)
    assert names.name(0x40_1000, 0x40_6000) == "[user cr3=0x406000]"
    linux.task(95, "late", 0x40_6000)
    late = linux.module("late", [(0, "late_init")])
    assert names.name(late) == "[module]"
    names.learn(memory)
    assert names.name(0x40_1000, 0x40_6000) == "[user] late/95"
    assert names.name(late) == "late_init [late]"
    assert names.name(linux.evdev) == "evdev_read [evdev]"


def test_bytes_give_the_same_names_without_the_guest(memory, linux):
    names = GuestNames.of_guest(memory, file=system_map(), file_name="System.map")
    again = GuestNames.from_bytes(names.to_bytes())
    places = [*range(TEXT, TEXT + 0x6000, 0x21), linux.evdev, 0xFFFF_FFFF_C100_0000, 0x40_0000, 0x10]
    for place in places:
        assert again.name(place, 0x40_2000) == names.name(place, 0x40_2000)
    assert (again.processes, again.notes) == (names.processes, names.notes)
    assert GuestNames.from_bytes(GuestNames().to_bytes()).kernel is None


@given(
    st.lists(st.tuples(st.integers(0, (1 << 62) - 1), st.integers(0, 1 << 40), st.text(max_size=8)), max_size=30),
    st.dictionaries(
        st.integers(0, 1 << 52), st.builds(Process, st.integers(0, 1 << 32), st.text(max_size=16)), max_size=5
    ),
    st.integers(0, 1 << 40),
)
def test_any_table_survives(entries, table, offset):
    names = GuestNames(Symbols(entries, offset=offset) if entries else None, None, table, ["a note"])
    again = GuestNames.from_bytes(names.to_bytes())
    assert again.processes == table
    for address, size, _ in entries:
        for place in (address + offset, address + offset + size):
            expected = names.name(place, 0x1000)
            if "\n" not in expected and expected.isprintable():
                assert again.name(place, 0x1000) == expected


def test_an_offset_may_carry_names_over_the_end():
    symbols = Symbols([(0xFFFF_FFFF_8000_0000, 16, "first"), (0xFFFF_FFFF_FF60_0000, 16, "last")], offset=0x100_0000)
    again = GuestNames.from_bytes(GuestNames(symbols).to_bytes())
    assert (again.name(0xFFFF_FFFF_8100_0008), again.name(0x60_0008)) == ("first", "last")


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_damaged_bytes_are_a_value_error(seed, places):
    dice = random.Random(seed)
    plain = bytearray(
        zstandard.decompress(GuestNames(Symbols([(1, 2, "a"), (9, 0, "b")]), None, {1: Process(2, "c")}).to_bytes())
    )
    for _ in range(places):
        plain[dice.randrange(len(plain))] = dice.randrange(256)
    for data in (
        zstandard.compress(bytes(plain)),
        bytes(plain),
        zstandard.compress(bytes(plain))[: dice.randrange(60)],
    ):
        try:
            GuestNames.from_bytes(data).name(5, 0x1000)
        except ValueError:
            pass


def test_bytes_that_unpack_to_too_much_are_refused():
    with pytest.raises(ValueError, match="larger"):
        GuestNames.from_bytes(zstandard.compress(bytes((1 << 28) + 1)))
    with pytest.raises(ValueError, match="damaged"):
        GuestNames.from_bytes(b"")

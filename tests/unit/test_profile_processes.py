"""Processes and modules out of a pretended kernel's memory: whole, moved, torn, and hostile."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linux_memory import COMM, DIRECT_MAP, MIB, MM, PGD, TASKS, TGID, LinuxMemory

from hypervisor.memory import GuestMemory
from hypervisor.profile import btf, modules, taskscan
from hypervisor.profile.processes import Process, of_address_space, processes
from hypervisor.profile.reading import kernel_reader

SIZE = 16 * MIB
CR3 = 0x88_0000
"""Where the pretended kernel has its page tables."""


@pytest.fixture
def memory():
    memory = GuestMemory(SIZE)
    yield memory
    memory.close()


@pytest.fixture
def linux(memory):
    linux = LinuxMemory(memory)
    linux.task(1, "init", 0x40_0000)
    linux.task(2, "kthreadd", None)
    linux.task(94, "sh", 0x40_2000)
    return linux


EXPECTED = {0x40_0000: Process(1, "init"), 0x40_2000: Process(94, "sh")}


@pytest.mark.parametrize("cr3", [None, CR3, CR3 | 0x1005, CR3 | 1 << 63, 0x50_0000, 1 << 50])
def test_processes_are_listed_by_their_page_directory(memory, linux, cr3):
    """Through the tables of CR3 with any PCID, of the user's half beside it, or without any."""
    assert processes(memory, linux.symbols(), cr3) == EXPECTED
    assert processes(memory, linux.symbols(without=("init_top_pgt",)), cr3) == EXPECTED


def test_page_tables_alone_will_do(memory, linux):
    """No phys_base and no banner: where the image lies is known only to the page tables."""
    symbols = linux.symbols(without=("phys_base", "linux_banner"))
    assert processes(memory, symbols, CR3) == EXPECTED
    assert processes(memory, symbols, CR3 | 0x1805) == EXPECTED
    assert processes(memory, symbols, None) == {}


@pytest.mark.parametrize("missing", [("init_task",), ("__start_BTF", "init_top_pgt"), ("__stop_BTF", "init_top_pgt")])
def test_a_kernel_that_does_not_tell_has_no_processes(memory, linux, missing):
    assert processes(memory, linux.symbols(without=missing), CR3) == {}


def test_members_are_those_that_the_type_information_names(memory, linux):
    """The list holds thread groups, so pid and tgid are the same in a kernel; here they differ to tell them apart."""
    memory.write(linux.places[3] + TGID, struct.pack("<I", 4321))
    assert processes(memory, linux.symbols())[0x40_2000].pid == 4321


# --- without type information -----------------------------------------------------------------------------------------

NO_TYPES = ("__start_BTF", "__stop_BTF")


@pytest.mark.parametrize("cr3", [None, CR3])
def test_members_are_found_by_what_they_hold(memory, linux, cr3):
    symbols = linux.symbols(without=NO_TYPES)
    read = kernel_reader(memory, symbols, cr3)
    found = taskscan.scan(read, linux.addresses["init_task"], linux.addresses["init_top_pgt"])
    assert found == (TASKS, TGID - 4, COMM, MM, PGD)
    assert processes(memory, symbols, cr3) == EXPECTED


@pytest.mark.parametrize(
    ("task", "at", "data"),
    [
        (0, COMM, b"other"),
        (2, COMM, b"other"),
        (1, TASKS + 8, bytes(8)),
        (2, TASKS + 8, bytes(8)),
        (1, TGID, b"\2"),
        (0, 0x30, struct.pack("<II", 0, 0)),  # a second pair of 0, 1 and 2
        (2, MM, b"\1"),
        (1, MM + 8, bytes(8)),
        (1, 0x800 + PGD, bytes(8)),
        (1, 0x800 + PGD, b"\1"),
    ],
)
def test_what_cannot_be_told_is_not_guessed(memory, linux, task, at, data):
    if at == 0x30:
        for number in (1, 2):
            memory.write(linux.places[number] + at, struct.pack("<II", number, number))
    memory.write(linux.places[task] + at, data)
    assert processes(memory, linux.symbols(without=NO_TYPES)) == {}


def test_what_lies_behind_a_small_task_is_not_taken_for_a_part_of_it(memory, linux):
    """Of an unknown size more is read than it has; its name comes after all that is wanted."""
    memory.write(linux.places[1] + 0x300, struct.pack("<QQ", DIRECT_MAP + 0x5000, DIRECT_MAP + 0x5000))
    for number in range(3):
        memory.write(linux.places[number] + 0x310, struct.pack("<II", number, number))
    assert processes(memory, linux.symbols(without=NO_TYPES)) == EXPECTED


# --- damage -----------------------------------------------------------------------------------------------------------


def test_the_kernel_may_move_its_direct_map_or_not(memory, linux):
    linux.write("page_offset_base", struct.pack("<Q", 0))
    memory.write(linux.physical(linux.addresses["init_task"]) + TASKS, struct.pack("<Q", 0xFFFF_8880_0020_2000 + TASKS))
    for place in linux.places[1:]:
        for member in (TASKS, MM):
            value = int.from_bytes(memory.read(place + member, 8), "little")
            if DIRECT_MAP <= value < DIRECT_MAP + SIZE:
                memory.write(place + member, struct.pack("<Q", value - DIRECT_MAP + 0xFFFF_8880_0000_0000))
        if memory.read(place + MM, 8) != bytes(8):
            pgd = int.from_bytes(memory.read(place + 0x838, 8), "little")
            memory.write(place + 0x838, struct.pack("<Q", pgd - DIRECT_MAP + 0xFFFF_8880_0000_0000))
    assert processes(memory, linux.symbols(without=("init_top_pgt",))) == EXPECTED


def test_after_vfork_the_older_process_has_the_address_space(memory, linux):
    linux.task(95, "sh-child", 0x40_2000)
    assert processes(memory, linux.symbols()) == EXPECTED


@pytest.mark.parametrize("link", [0, 1, DIRECT_MAP + SIZE + TASKS, 0xFFFF_FFFF_FFFF_FFFF, 1 << 63])
def test_a_list_that_leads_nowhere_gives_what_was_found(memory, linux, link):
    memory.write(linux.places[2] + TASKS, struct.pack("<Q", link))
    assert processes(memory, linux.symbols()) == {0x40_0000: Process(1, "init")}


def test_a_list_that_loops_ends(memory, linux):
    memory.write(linux.places[3] + TASKS, struct.pack("<Q", DIRECT_MAP + linux.places[2] + TASKS))
    assert processes(memory, linux.symbols()) == EXPECTED


def test_a_name_is_printable(memory, linux):
    memory.write(linux.places[3] + COMM, b"a b\x1b[2J\xff\n\0xxxxx")
    assert processes(memory, linux.symbols())[0x40_2000].comm == "a b?[2J??"


def test_an_address_space_is_found_by_either_half_and_any_pcid():
    table = dict(EXPECTED)
    for cr3 in (0x40_2000, 0x40_2005, 0x40_3805, 0x40_3000 | 1 << 63):
        assert of_address_space(table, cr3) == Process(94, "sh")
    assert of_address_space(table, 0x40_4000) is None
    table[0x40_5000] = Process(3, "odd")
    assert of_address_space(table, 0x40_3000) is None, "without page table isolation a neighbour is someone else"
    assert of_address_space(table, 0x40_5000) == Process(3, "odd")


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_any_damage_gives_a_dictionary(seed, places):
    dice = random.Random(seed)
    memory = GuestMemory(SIZE)
    try:
        linux = LinuxMemory(memory)
        for pid in range(1, 6):
            linux.task(pid, f"p{pid}", 0x40_0000 + 0x2000 * pid)
        linux.module("one", [(0, "a"), (0x40, "b")])
        spots = [
            *linux.places,
            *(linux.physical(linux.addresses[name]) for name in linux.addresses),
            6 * MIB,
            CR3,
        ]
        for _ in range(places):
            memory.write(dice.choice(spots) + dice.randrange(0x400), dice.randbytes(8))
        symbols = linux.symbols()
        assert isinstance(processes(memory, symbols, CR3), dict)
        assert isinstance(processes(memory, linux.symbols(without=NO_TYPES), CR3), dict)
        read = kernel_reader(memory, symbols, CR3)
        types = btf.find(symbols, read) if read else None
        if types is not None:
            modules.find(symbols, read, types)
    finally:
        memory.close()


# --- modules ----------------------------------------------------------------------------------------------------------


def names_of(memory, linux):
    symbols = linux.symbols()
    read = kernel_reader(memory, symbols, linux.cr3)
    types = btf.find(symbols, read)
    return modules.find(symbols, read, types)


@pytest.mark.parametrize("members", [("core_layout",), ("mem",)])
def test_functions_of_modules_have_the_module_beside_them(memory, members):
    """Before 6.4 the text is in core_layout, since then in mem[MOD_TEXT]."""
    linux = LinuxMemory(memory, text_members=members)
    evdev = linux.module("evdev", [(0x20, "evdev_read"), (0x100, "evdev_poll")])
    other = linux.module("other", [(0, "init")])
    found = names_of(memory, linux)
    assert [found.label(evdev + at) for at in (0, 0x1F, 0x20, 0xFF, 0x7FF, 0x800)] == [
        "[evdev]",
        "[evdev]",
        "evdev_read [evdev]",
        "evdev_read [evdev]",
        "evdev_poll [evdev]",
        None,
    ]
    assert found.label(other + 0x7FF) == "init [other]"
    assert found.label(other + 0x3000) is None


def test_a_module_without_a_table_is_known_by_its_name(memory, linux):
    base = linux.module("bare", [])
    memory.write(6 * MIB + 0x1200, bytes(8))
    assert names_of(memory, linux).label(base + 0x123) == "[bare]"


def test_a_list_of_modules_that_loops_ends(memory, linux):
    first = linux.module("one", [(0, "a")])
    linux.module("two", [(0, "b")])
    memory.write(6 * MIB + 0x4000 + 0x1000 + 8, struct.pack("<Q", linux.module_heads[1]))
    found = names_of(memory, linux)
    assert found.label(first) == "a [one]"
    assert len(found) == 2


@pytest.mark.parametrize("number", [0, 0xFFFF_FFFF, 1 << 20])
def test_a_module_with_too_many_symbols_is_known_by_its_name(memory, linux, number):
    base = linux.module("odd", [(0, "a")])
    memory.write(6 * MIB + 0x2008, struct.pack("<I", number))
    assert names_of(memory, linux).label(base) == "[odd]"


def test_names_that_are_no_text_are_left_out(memory, linux):
    base = linux.module("good", [(0, "a\x1b[2J"), (0x10, "b")])
    linux.module("ba\x07d", [(0, "c")])
    found = names_of(memory, linux)
    assert (found.label(base), found.label(base + 0x10), len(found)) == ("[good]", "b [good]", 2)

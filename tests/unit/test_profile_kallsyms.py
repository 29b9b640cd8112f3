"""A kernel's symbols out of its memory: every order of the tables, moved by KASLR, damaged, and made up."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kallsyms_writer import LAYOUTS, MIB, put_kernel

from hypervisor.memory import GuestMemory
from hypervisor.profile import kallsyms
from hypervisor.profile.reading import image_shift, search
from hypervisor.symbols import Symbols

NAMES = [(0, "A__per_cpu_start"), (0x1000, "Acurrent_task"), (0, "T_text"), (0, "T_stext"), (0x40, "tnative_safe_halt")]
SIZE = 20 * MIB
VIRTUAL = 0xFFFF_FFFF_8100_0000


def many(count: int, seed: int = 1) -> list[tuple[int, str]]:
    dice = random.Random(seed)
    names = [
        (0x100 + 16 * at, f"t{dice.choice(('do', 'sys', 'tcp_v4'))}_{dice.randbytes(3).hex()}_{at}")
        for at in range(count)
    ]
    names += [(0x80, "T" + "long_" * 99 + "name"), (0x90, "T" + "0123456789" * 30)]  # more than 127 bytes compressed
    return NAMES + names


@pytest.fixture
def memory():
    memory = GuestMemory(SIZE)
    yield memory
    memory.close()


def expected(kernel):
    return Symbols((address, 0, name[1:]) for address, name in kernel.entries)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("count", [0, 3, 251, 252, 1000])
def test_every_order_of_the_tables_is_read(memory, layout, count):
    names = many(count) if layout.wide else [entry for entry in many(count) if len(entry[1]) < 100]
    kernel = put_kernel(memory, layout, names)
    found = kallsyms.find(memory)
    assert found is not None
    assert list(found.entries()) == list(expected(kernel).entries())
    assert found.address_of("_stext") == found.address_of("_text") == VIRTUAL
    assert found.label(VIRTUAL + 0x41) == "native_safe_halt"


def test_a_length_of_one_byte_may_have_its_top_bit(memory):
    """Before 6.1 a length is a byte, whatever is in it."""
    dice = random.Random(7)
    name = "t" + "".join(dice.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=200))
    kernel = put_kernel(memory, LAYOUTS["5.10"], [*(many(300)[: len(NAMES) + 300]), (0x90, name)])
    found = kallsyms.find(memory)
    assert found is not None
    assert list(found.entries()) == list(expected(kernel).entries())


def test_zeroes_are_no_sign_of_a_kernel_that_was_not_moved(memory):
    symbols = Symbols([(0xFFFF_FFFF_8040_0100, 0, "phys_base")])
    assert image_shift(memory, symbols) == 0
    memory.write(10 * MIB + 0x100, (6 * MIB).to_bytes(8, "little"))
    assert image_shift(memory, symbols) == 6 * MIB
    memory.write(4 * MIB + 0x100, b"\1")
    memory.write(10 * MIB + 0x100, bytes(8))
    assert image_shift(memory, symbols) is None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_kernel_that_kaslr_moved_is_found_where_it_runs(memory, layout):
    kernel = put_kernel(
        memory, layout, many(300, 2) if layout.wide else NAMES, physical=8 * MIB, virtual=VIRTUAL + 512 * MIB
    )
    found = kallsyms.find(memory)
    assert found is not None
    assert found.address_of("native_safe_halt") == VIRTUAL + 512 * MIB + 0x40
    assert image_shift(memory, found) == kernel.shift


@pytest.mark.parametrize("where", [2 * MIB, 16 * MIB])
def test_the_copy_that_runs_wins_over_one_that_does_not(memory, where):
    """The decompressor may leave a kernel that was not relocated, before or behind the one that runs."""
    layout = LAYOUTS["6.1.192 and 6.2"]
    kernel = put_kernel(memory, layout, NAMES, physical=where)
    stale = memory.read(kernel.tables, kernel.size)
    memory.write(where, bytes(4 * MIB))
    put_kernel(memory, layout, NAMES, physical=8 * MIB, virtual=VIRTUAL + 64 * MIB)
    memory.write(where, stale)
    found = kallsyms.find(memory)
    assert found is not None
    assert found.address_of("native_safe_halt") == VIRTUAL + 64 * MIB + 0x40


def test_a_kernel_without_data_symbols_is_found_too(memory):
    """Without CONFIG_KALLSYMS_ALL there is no phys_base."""
    put_kernel(memory, LAYOUTS["6.1.192 and 6.2"], many(20), data_symbols=False)
    found = kallsyms.find(memory)
    assert found is not None
    assert image_shift(memory, found) is None
    assert found.address_of("native_safe_halt") == VIRTUAL + 0x40


def test_the_banner_tells_where_a_kernel_without_phys_base_lies(memory):
    symbols = Symbols([(VIRTUAL + 0x1230, 0, "linux_banner")])
    memory.write(10 * MIB, b"Linux version 1")
    assert image_shift(memory, symbols) is None
    memory.write(12 * MIB + 0x1230, b"Linux version 6")
    assert image_shift(memory, symbols) == -4 * MIB & (1 << 64) - 1


def test_memory_without_a_kernel_has_no_symbols(memory):
    assert kallsyms.find(memory) is None
    memory.write(0, random.Random(3).randbytes(4 * MIB))
    assert kallsyms.find(memory) is None


def counted(monkeypatch, name):
    """Return a list that grows with each call of a function."""
    calls, function = [], getattr(kallsyms, name)

    def call(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(kallsyms, name, call)
    return calls


def test_memory_full_of_digits_is_not_all_looked_at(memory, monkeypatch):
    calls = counted(monkeypatch, "_tokens_at")
    memory.write(0, b"".join(b"%d\0" % digit for digit in range(10)) * (SIZE // 20))
    assert kallsyms.find(memory) is None
    assert 1000 < len(calls) < 5000


def test_of_many_kernels_a_few_are_looked_at(memory, monkeypatch):
    """None of them can be told to run: they have no names for data."""
    calls = counted(monkeypatch, "_decode")
    for at in range(16):
        put_kernel(memory, LAYOUTS["6.4"], NAMES, physical=at * MIB, virtual=VIRTUAL + at * 2 * MIB, data_symbols=False)
    found = kallsyms.find(memory)
    assert found is not None
    assert found.address_of("_text") == VIRTUAL, "the first"
    assert len(calls) == 8


def test_only_so_many_names_are_decompressed(memory, monkeypatch):
    """A guest may make every guess look right until its end."""
    kernel = put_kernel(memory, LAYOUTS["5.10"], [entry for entry in many(300) if len(entry[1]) < 100])
    number = len(kernel.entries)
    at = memory.read(kernel.tables, kernel.size).find(number.to_bytes(8, "little"))
    monkeypatch.setattr(kallsyms, "MAX_EXPANDED", 10 * number)
    for before in range(8, 8 * 200, 8):
        memory.write(kernel.tables + at - before, number.to_bytes(8, "little"))
    memory.write(kernel.tables + at + 8, b"\xff")
    calls = counted(monkeypatch, "_expand")
    assert kallsyms.find(memory) is None
    assert 2 < len(calls) <= 10


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_half_a_table_is_none(memory, layout):
    kernel = put_kernel(memory, layout, [entry for entry in many(600) if len(entry[1]) < 100])
    whole = memory.read(kernel.tables, kernel.size)
    parts = [range(kernel.size // 3), range(kernel.size // 3, 2 * kernel.size // 3)]
    for part in parts:
        memory.write(kernel.tables, whole)
        memory.write(kernel.tables + part.start, b"\xa5" * len(part))
        assert kallsyms.find(memory) is None
    memory.write(kernel.tables, whole)
    assert kallsyms.find(memory) is not None


@settings(max_examples=30)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2**32), st.integers(0, 400), st.data())
def test_any_names_survive_the_round_trip(layout, seed, count, data):
    dice = random.Random(seed)
    text = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.$", min_size=1, max_size=40)
    names = [
        (dice.randrange(2**21 - 64), f"{dice.choice('tTdDbBrR')}{name}")
        for name in data.draw(st.lists(text, max_size=40))
    ]
    names += [(dice.randrange(2**21 - 64), f"t{dice.randbytes(8).hex()}") for _ in range(count)]
    memory = GuestMemory(SIZE)
    try:
        kernel = put_kernel(memory, LAYOUTS[layout], names)
        found = kallsyms.find(memory)
        assert found is not None
        assert list(found.entries()) == list(expected(kernel).entries())
    finally:
        memory.close()


@settings(max_examples=80)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2**32), st.integers(1, 8))
def test_any_damage_gives_symbols_or_none(layout, seed, places):
    dice = random.Random(seed)
    memory = GuestMemory(SIZE)
    try:
        kernel = put_kernel(memory, LAYOUTS[layout], [entry for entry in many(300) if len(entry[1]) < 100])
        for _ in range(places):
            at = kernel.tables + dice.randrange(kernel.size)
            memory.write(
                at,
                dice.choice([b"\xff" * 8, bytes(8), dice.randbytes(dice.randrange(1, 64)), struct.pack("<Q", 1 << 63)]),
            )
        found = kallsyms.find(memory)
        assert found is None or len(found) <= len(kernel.entries)
    finally:
        memory.close()


def test_a_table_at_either_end_of_memory_harms_nothing(memory):
    kernel = put_kernel(memory, LAYOUTS["6.4"], NAMES)
    whole = memory.read(kernel.tables, kernel.size)
    memory.write(kernel.tables, bytes(kernel.size))
    for cut in range(0, kernel.size, 499):
        memory.write(SIZE - cut, whole[:cut])
        assert kallsyms.find(memory) is None
        memory.write(SIZE - cut, bytes(cut))
        memory.write(0, whole[cut:])
        if cut:
            assert kallsyms.find(memory) is None
        memory.write(0, bytes(kernel.size))


def test_search_finds_what_lies_across_a_chunk(memory):
    memory.write(4 * MIB - 3, b"needle")
    memory.write(SIZE - 6, b"needle")
    assert list(search(memory, b"needle")) == [4 * MIB - 3, SIZE - 6]

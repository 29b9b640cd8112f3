"""Whether a file is of the kernel that runs: by build id, by version, by distances."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from linux_memory import BANNER, BUILD_ID, MIB, TEXT, LinuxMemory

from hypervisor.memory import GuestMemory
from hypervisor.profile import buildid
from hypervisor.symbols import Symbols

FILE_TEXT = TEXT - 64 * MIB


@pytest.fixture
def memory():
    memory = GuestMemory(16 * MIB)
    yield memory
    memory.close()


@pytest.fixture
def linux(memory):
    linux = LinuxMemory(memory)
    linux.addresses |= {f"function_{at}": TEXT + 0x4000 + 0x30 * at + at % 7 for at in range(300)}
    return linux


def note(owner: bytes, kind: int, data: bytes) -> bytes:
    head = struct.pack("<III", len(owner), len(data), kind)
    return head + owner + bytes(-len(owner) % 4) + data + bytes(-len(data) % 4)


def elf(notes: bytes, *, section: bool = False, symbols: dict[str, int] | None = None) -> bytes:
    """Return an ELF64 with notes in a segment or a section, and a symbol table (System V ABI, chapters 4 and 5)."""
    names, table = b"\0", bytes(24)
    for name, value in (symbols or {}).items():
        table += struct.pack("<IBBHQQ", len(names), 2, 0, 1, value, 0)
        names += name.encode() + b"\0"
    parts, places, at = [notes, table, names], [], 64 + 56
    for part in parts:
        places.append((at, len(part)))
        at += len(part)
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, at, 0, 64, 56, 0 if section else 1, 64, 4, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, places[0][0], 0, 0, places[0][1], places[0][1], 4)
    sections = bytes(64)
    for kind, (start, size), link in ((7 if section else 1, places[0], 0), (2, places[1], 3), (3, places[2], 0)):
        sections += struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, start, size, link, 0, 4, 24)
    return header + segment + b"".join(parts) + sections


NOTES = note(b"Xen\0", 3, b"12345678") + note(b"Linux\0", 0x101, b"x") + note(b"GNU\0", 3, BUILD_ID)


def test_the_build_id_is_the_gnu_note_of_its_type():
    assert buildid.of_notes(NOTES) == BUILD_ID
    assert buildid.of_notes(note(b"GNU\0", 1, b"abcd")) is None
    assert buildid.of_notes(NOTES[:-1]) is None
    assert buildid.of_notes(note(b"GNU\0", 3, b"")) is None


@pytest.mark.parametrize("section", [False, True])
def test_an_elf_has_it_in_a_segment_or_a_section(section):
    assert buildid.of_elf(elf(NOTES, section=section)) == BUILD_ID
    assert buildid.of_elf(elf(b"", section=section)) is None


@given(st.binary(max_size=200), st.integers(0, 600))
def test_any_damage_gives_an_id_or_none(patch, at):
    data = elf(NOTES)
    data = data[:at] + patch + data[at + len(patch) :]
    for damaged in (data, data[:at], patch):
        found = buildid.of_elf(damaged)
        assert found is None or 0 < len(found) <= 64
        buildid.of_notes(damaged)


def test_a_running_kernel_has_build_id_and_banner(memory, linux):
    assert buildid.of_kernel(memory, linux.symbols()) == BUILD_ID
    assert buildid.banner(memory, linux.symbols()) == BANNER
    assert buildid.of_kernel(memory, linux.symbols(without=("__stop_notes",))) is None
    memory.write(linux.physical(linux.addresses["linux_banner"]), b"Other")
    assert buildid.banner(memory, linux.symbols()) is None


def system_map(linux, *, moved: int = 0, without: int = 0) -> bytes:
    entries = list(linux.addresses.items())[without:]
    return b"".join(b"%016x T %s\n" % (address - 64 * MIB + moved, name.encode()) for name, address in entries)


def test_a_system_map_is_known_by_its_distances(memory, linux):
    assert buildid.same_kernel(system_map(linux), memory, linux.symbols()) is True
    assert buildid.moved_by(Symbols.parse(system_map(linux), name="map"), linux.symbols()) == 64 * MIB
    assert buildid.moved_by(Symbols.parse(system_map(linux, moved=64), name="map"), linux.symbols()) is None
    other = b"".join(
        b"%016x T %s\n" % (FILE_TEXT + 0x40 * at, name.encode()) for at, name in enumerate(linux.addresses)
    )
    assert buildid.same_kernel(other, memory, linux.symbols()) is False
    assert buildid.same_kernel(b"ffffffff81000000 T unrelated\n", memory, linux.symbols()) is False


def test_some_static_names_may_be_others_of_the_same_name(memory, linux):
    text = system_map(linux)
    for at in range(0, 300, 60):
        address = linux.addresses[f"function_{at}"] - 64 * MIB
        text = text.replace(
            b"%016x T function_%d\n" % (address, at), b"%016x T function_%d\n" % (address + 0x999000, at)
        )
    assert buildid.moved_by(Symbols.parse(text, name="map"), linux.symbols()) == 64 * MIB


def test_an_elf_is_known_by_its_build_id(memory, linux):
    symbols = {name: address - 64 * MIB for name, address in linux.addresses.items()}
    other = note(b"GNU\0", 3, bytes(20))
    for names in (symbols, None):
        assert buildid.same_kernel(elf(NOTES, symbols=names), memory, linux.symbols()) is True
        assert buildid.same_kernel(elf(other, symbols=names), memory, linux.symbols()) is False
    # without names for data in the running kernel, the file's own tell where its notes are
    bare = Symbols((address, 0, name) for name, address in linux.addresses.items() if name.startswith("function"))
    assert buildid.same_kernel(elf(NOTES, symbols=symbols), memory, bare) is True
    assert buildid.same_kernel(elf(other, symbols=symbols), memory, bare) is False
    assert buildid.same_kernel(elf(NOTES), memory, bare) is None


def bzimage(version: bytes) -> bytes:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = struct.pack("<H", 0x300)
    image[0x500 : 0x500 + len(version)] = version
    return bytes(image)


def test_a_bzimage_is_known_by_its_version(memory, linux):
    symbols = linux.symbols()
    assert buildid.same_kernel(bzimage(b"6.1.0-test (who@where) #1 SMP yesterday\0"), memory, symbols) is True
    assert buildid.same_kernel(bzimage(b"6.1.0-test (who@where) #2 SMP today\0"), memory, symbols) is False
    assert buildid.same_kernel(bzimage(b"6.1.0 (who@where) #1 SMP yesterday\0"), memory, symbols) is False
    assert buildid.same_kernel(bzimage(b""), memory, symbols) is None
    assert buildid.same_kernel(bzimage(b"6.1.0-test (who@where) #1\0"), memory, Symbols(())) is None


def test_a_file_that_is_neither_says_nothing(memory, linux):
    assert buildid.same_kernel(b"", memory, linux.symbols()) is None
    assert buildid.same_kernel(b"\x7fELF", memory, linux.symbols()) is None

"""Names for addresses: maps, ELF symbol tables of both classes, and files that are neither."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import ImageError
from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from pathlib import Path

MAP = b"""\
0000000000000000 D __per_cpu_start
0000000000001000 A cpu_debug_store
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000040 t verify_cpu
ffffffff81000100 T start_kernel
ffffffff81000180 D _edata
                 U never_here
                 w __weak_ref
garbage
"""


def make_elf(symbols: list[tuple[int, int, int, int, str]], *, wide: bool = True, order: str = "<") -> bytes:
    """Build an ELF with a symbol table of (value, size, type, section, name); gABI chapter 4, written out by hand."""
    names, entries = b"\0", b"\0" * (24 if wide else 16)
    for value, size, kind, section, name in symbols:
        at = len(names)
        names += name.encode() + b"\0"
        if wide:
            entries += struct.pack(order + "IBBHQQ", at, kind, 0, section, value, size)
        else:
            entries += struct.pack(order + "IIIBBH", at, value, size, kind, 0, section)
    header_size = 64 if wide else 52
    at_entries, at_names = header_size, header_size + len(entries)
    at_sections = at_names + len(names)
    word = "Q" if wide else "I"

    def section_header(kind: int, start: int, size: int, link: int) -> bytes:
        return struct.pack(f"{order}II4{word}II2{word}", 0, kind, 0, 0, start, size, link, 0, 0, 0)

    sections = section_header(0, 0, 0, 0)
    sections += section_header(2, at_entries, len(entries), 2)
    sections += section_header(3, at_names, len(names), 0)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    header = ident + struct.pack(
        f"{order}HHI3{word}I6H", 2, 62, 1, 0, 0, at_sections, 0, header_size, 0, 0, len(sections) // 3, 3, 0
    )
    assert len(header) == header_size
    return header + entries + names + sections


def load(tmp_path: Path, data: bytes, offset: int = 0) -> Symbols:
    path = tmp_path / "symbols"
    path.write_bytes(data)
    return Symbols.load(path, offset=offset)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFFFFFFF81000000, "startup_64+0x0/0x40"),
        (0xFFFFFFFF8100003F, "startup_64+0x3f/0x40"),
        (0xFFFFFFFF81000040, "verify_cpu+0x0/0xc0"),
        (0xFFFFFFFF81000112, "start_kernel+0x12/0x80"),
        (0xFFFFFFFF81000180, "_edata"),
        (0xFFFFFFFF81000181, None),
        (0xFFFFFFFF80FFFFFF, None),
        (0, None),
        (0x10, None),
        ((1 << 64) - 1, None),
    ],
)
def test_a_map_names_the_nearest_symbol_below(tmp_path: Path, address: int, name: str | None) -> None:
    """Sizes come from the next name; of equal addresses the plain name wins; per-CPU offsets are no addresses."""
    assert load(tmp_path, MAP).find(address) == name


def test_kallsyms_with_modules_is_a_map_too(tmp_path: Path) -> None:
    data = b"ffffffffc0000000 t nvme_probe\t[nvme]\nffffffffc0000010 t nvme_remove\t[nvme]\n"
    assert load(tmp_path, data).find(0xFFFFFFFFC0000004) == "nvme_probe+0x4/0x10"


def test_kaslr_moves_every_name(tmp_path: Path) -> None:
    symbols = load(tmp_path, MAP, offset=0x1A00_0000)
    assert symbols.find(0xFFFFFFFF9B000112) == "start_kernel+0x12/0x80"
    assert symbols.find(0xFFFFFFFF81000112) is None
    assert symbols.find(5) is None, "an address below the offset wraps to a place where nothing is"


FUNC, OBJECT, NOTYPE, SECTION, FILE = 2, 1, 0, 3, 4


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_elf_names_functions_objects_and_labels(tmp_path: Path, order: str, *, wide: bool) -> None:
    data = make_elf(
        [
            (0x100000, 0x20, FUNC, 1, "main"),
            (0x100040, 0, NOTYPE, 1, "loop"),
            (0x100050, 8, OBJECT, 2, "counter"),
            (0x100020, 0, SECTION, 1, "section"),
            (0x100030, 0, FILE, 0xFFF1, "main.c"),
            (0x100031, 4, NOTYPE, 0xFFF1, "CONSTANT"),
            (0x100032, 4, FUNC, 0, "undefined"),
            (0x100033, 0, NOTYPE, 1, ".Llocal"),
            (0x100034, 0, FUNC, 1, "__pfx_main"),
            (0x100035, 0, NOTYPE, 1, ""),
        ],
        wide=wide,
        order=order,
    )
    symbols = load(tmp_path, data)
    assert len(symbols) == 3
    assert symbols.find(0x10001F) == "main+0x1f/0x20"
    assert symbols.find(0x100020) is None, "the padding behind a function with a size is nobody's"
    assert symbols.find(0x100041) == "loop+0x1/0x10", "a label reaches to the next name"
    assert symbols.find(0x100057) == "counter+0x7/0x8"


def test_a_sized_name_beats_a_label_at_the_same_place(tmp_path: Path) -> None:
    data = make_elf([(0x1000, 0, NOTYPE, 1, "a"), (0x1000, 0x10, FUNC, 1, "function"), (0x1000, 0x10, FUNC, 1, "_f")])
    assert load(tmp_path, data).find(0x1000) == "function+0x0/0x10"


def test_a_broken_section_table_is_an_image_error(tmp_path: Path) -> None:
    data = make_elf([(0x1000, 4, FUNC, 1, "f")])
    for cut in (5, 40, 60, 63):
        with pytest.raises(ImageError, match="section table is broken"):
            load(tmp_path, data[:cut])
    for shoff in (1 << 63, (1 << 64) - 1, len(data) - 1):
        with pytest.raises(ImageError, match="section table is broken"):
            load(tmp_path, data[:0x28] + struct.pack("<Q", shoff) + data[0x30:])


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 4096, b"hello\n", make_elf([]), b"ffffffff81000000\n", b"                 U x\n"]
)
def test_a_file_without_symbols_is_an_image_error_with_a_hint(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ImageError, match="no symbols") as caught:
        load(tmp_path, data)
    assert "System.map" in (caught.value.hint or "")


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_an_image_in_memory_will_do(buffer: type[bytes]) -> None:
    for data in (MAP, make_elf([(0x1000, 0, FUNC, 1, "f"), (0x1010, 4, FUNC, 1, "g")])):
        assert len(Symbols.parse(buffer(data), name="image")) >= 2
    with pytest.raises(ImageError, match="image: no symbols"):
        Symbols.parse(buffer(b"\x7fELF" + bytes(60)), name="image")


def test_a_file_that_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        Symbols.load(tmp_path / "absent")
    with pytest.raises(ImageError, match="Is a directory"):
        Symbols.load(tmp_path)


def test_names_that_share_an_address_are_all_found_by_name() -> None:
    symbols = Symbols.parse(MAP, name="map", offset=0x200000)
    assert {symbols.address_of(name) for name in ("_stext", "_text", "startup_64")} == {0xFFFF_FFFF_8120_0000}
    assert symbols.address_of("__per_cpu_start") is None, "a per-CPU offset is no address"


def test_a_label_is_the_name_alone() -> None:
    symbols = Symbols.parse(MAP, name="map", offset=0x200000)
    assert symbols.label(0xFFFF_FFFF_8120_0041) == "verify_cpu"
    assert symbols.label(0xFFFF_FFFF_8120_0180) == "_edata"
    assert symbols.label(0xFFFF_FFFF_8120_0181) is None
    assert symbols.label(0xFFFF_FFFF_8100_0041) is None


def test_entries_are_those_of_the_file() -> None:
    symbols = Symbols([(0x20, 0, "b"), (0x10, 4, "a"), (0x20, 0, "longer")], offset=0x1000)
    assert list(symbols.entries()) == [(0x10, 4, "a"), (0x20, 0, "b")]


@given(st.binary(max_size=300), st.integers(0, 400), st.binary(max_size=16))
def test_any_damage_gives_names_or_an_image_error(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, at: int, patch: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    data = make_elf([(0x1000, 4, FUNC, 1, "f")])
    path.write_bytes(data[:at] + patch + data[at + len(patch) :] + tail)
    try:
        symbols = Symbols.load(path)
    except ImageError:
        return
    assert symbols.find(0x1002) is None or isinstance(symbols.find(0x1002), str)


@given(
    st.lists(st.tuples(st.integers(0, (1 << 63) - 1), st.integers(0, 64)), max_size=30), st.integers(0, (1 << 63) - 1)
)
def test_find_agrees_with_looking_at_every_symbol(entries: list[tuple[int, int]], address: int) -> None:
    unique = dict(entries)
    symbols = Symbols((start, size, f"s{start}") for start, size in unique.items())
    for wanted in [address, *unique, *(start + 1 for start in unique)]:
        below = [start for start in unique if start <= wanted]
        if not below:
            assert symbols.find(wanted) is None
            continue
        start = max(below)
        later = [other for other in unique if other > start]
        size = unique[start] or (min(later) - start if later else 0)
        if size:
            expected = f"s{start}+{wanted - start:#x}/{size:#x}" if wanted < start + size else None
        else:
            expected = f"s{start}" if wanted == start else None
        assert symbols.find(wanted) == expected

"""Offsets of members out of type information, whole and damaged."""

from __future__ import annotations

import random
import struct

import pytest
from btf_writer import CONST, ENUM, ENUM64, FUNC_PROTO, STRUCT, TYPEDEF, UNION, BtfWriter
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.profile import btf
from hypervisor.profile.btf import Btf
from hypervisor.symbols import Symbols


def writer() -> BtfWriter:
    out = BtfWriter()
    word = out.int("unsigned long", 8)
    out.add(ENUM, "color", 4, struct.pack("<IiIi", 0, 1, 0, 2), 2)
    out.add(ENUM64, "wide", 8, struct.pack("<III", 0, 1, 2), 1)
    out.add(FUNC_PROTO, "", word, struct.pack("<IIII", 0, word, 0, word), 2)
    inner = out.structure("inner", 16, [("next", word, 0), ("prev", word, 8)])
    anonymous = out.structure("", 16, [("left", word, 0), ("right", word, 8)], UNION)
    qualified = out.add(CONST, "", out.add(TYPEDEF, "inner_t", inner))
    many = out.array(qualified, 4)
    out.structure("outer", 128, [("head", word, 0), ("", anonymous, 8), ("list", qualified, 24), ("many", many, 40)])
    # with the kind flag an offset is in the low 24 bits, below the size of a bit field
    bits = struct.pack("<III", out._string("flag"), word, 1 << 24 | 65)
    bits += struct.pack("<III", out._string("whole"), word, 0 << 24 | 128)
    bits += struct.pack("<III", out._string("start"), word, 3 << 24 | 64)
    out.add(STRUCT, "flags", 24, bits, 3, 1)
    return out


@pytest.mark.parametrize(
    ("structure", "path", "offset"),
    [
        ("outer", "head", 0),
        ("outer", "list", 24),
        ("outer", "list.prev", 32),
        ("outer", "right", 16),
        ("outer", "many", 40),
        ("outer", "many[2].prev", 80),
        ("inner", "prev", 8),
        ("flags", "whole", 16),
        ("flags", "flag", None),
        ("flags", "start", 8),
        ("outer", "absent", None),
        ("outer", "head.next", None),
        ("outer", "head[1]", None),
        ("absent", "head", None),
    ],
)
def test_members_lie_where_the_types_say(structure, path, offset):
    types = Btf.parse(writer().data())
    assert types is not None
    assert types.offset(structure, path) == offset


def test_a_structure_has_a_size():
    types = Btf.parse(writer().data())
    assert types is not None
    assert (types.size("outer"), types.size("absent")) == (128, None)


def test_anonymous_structures_that_hold_each_other_end():
    out = BtfWriter()
    out.structure("", 8, [("", 2, 0)] * 1000)
    out.structure("loop", 8, [("", 1, 0), ("", 2, 0)] * 1000)
    out.add(TYPEDEF, "t", 3)
    out.structure("alias", 8, [("a", 3, 0)])
    types = Btf.parse(out.data())
    assert types is not None
    assert types.offset("loop", "x") is None
    assert types.offset("alias", "a.b") is None


@pytest.mark.parametrize(
    "data", [b"", bytes(24), b"\x9f\xeb", writer().data()[:100], b"\x9f\xeb\x02" + writer().data()[3:]]
)
def test_what_is_no_type_information_is_none(data):
    assert Btf.parse(data) is None


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_any_damage_gives_an_offset_or_none(seed, places):
    dice, data = random.Random(seed), bytearray(writer().data())
    for _ in range(places):
        data[dice.randrange(len(data))] = dice.randrange(256)
    types = Btf.parse(bytes(data))
    if types is not None:
        for path in ("head", "list.prev", "many[3].next", "right", "flag"):
            found = types.offset("outer", path)
            assert found is None or found >= 0
        types.size("outer")


def test_type_information_is_found_by_its_symbols():
    data = writer().data()
    memory = {0xFFFF_FFFF_8200_0000: data}

    def read(address, size):
        return memory[address][:size] if address in memory else None

    symbols = [(0xFFFF_FFFF_8200_0000, 0, "__start_BTF"), (0xFFFF_FFFF_8200_0000 + len(data), 0, "__stop_BTF")]
    found = btf.find(Symbols(symbols), read)
    assert found is not None
    assert found.offset("inner", "prev") == 8
    assert btf.find(Symbols(symbols[:1]), read) is None
    assert btf.find(Symbols(symbols, offset=0x200000), read) is None

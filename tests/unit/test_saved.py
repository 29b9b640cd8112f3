"""How a saved state is read: whatever it is, what comes out is of the kind and the range that was asked for."""

from __future__ import annotations

import pytest

from devices.saved import Saved


def test_what_is_there_is_taken():
    state = {"n": 7, "r": 0x81, "f": True, "b": b"ab", "l": [1, 2], "o": None}
    saved = Saved(state)
    assert (saved.number("n", 7), saved.bits("r", 0x83, always=0x80), saved.flag("f")) == (7, 0x81, True)
    assert (saved.octets("b", 2, least=2), saved.numbers("l", 2, 2), saved.optional("o")) == (b"ab", [1, 2], False)
    saved.end()
    assert state["n"] == 7, "the state stays as it is"


def test_an_optional_field_with_a_value_is_still_to_be_taken():
    saved = Saved({"o": 3})
    assert saved.optional("o")
    with pytest.raises(ValueError, match="'o'"):
        saved.end()
    assert saved.number("o", 3) == 3
    saved.end()


@pytest.mark.parametrize(
    ("value", "error"), [(8, ValueError), (-3, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError)]
)
def test_a_number_out_of_range(value, error):
    with pytest.raises(error, match="n is"):
        Saved({"n": value}).number("n", 7, least=-2)


@pytest.mark.parametrize("value", [0x80, 0x02, 0x103])
def test_a_register_that_cannot_be(value):
    with pytest.raises(ValueError, match="r is"):
        Saved({"r": value}).bits("r", 0x83, always=0x02 if value == 0x80 else 0x01)


@pytest.mark.parametrize("value", [b"", b"abc"])
def test_too_few_and_too_many_bytes(value):
    with pytest.raises(ValueError, match="not 1 to 2"):
        Saved({"b": value}).octets("b", 2, least=1)


@pytest.mark.parametrize(("value", "where"), [([0, 3], r"l\[1\]"), ([0, 0, 0], "3 entries"), ([-1], r"l\[0\]")])
def test_a_list_out_of_range(value, where):
    with pytest.raises(ValueError, match=where):
        Saved({"l": value}).numbers("l", 2, 2)


def test_a_list_of_something_else():
    with pytest.raises(TypeError, match=r"l\[1\] is of type bool"):
        Saved({"l": [0, False]}).numbers("l", 2, 2)


def test_what_is_missing_too_much_or_no_mapping():
    with pytest.raises(KeyError, match="gone"):
        Saved({}).flag("gone")
    with pytest.raises(KeyError, match="gone"):
        Saved({}).number("gone", 1)
    with pytest.raises(ValueError, match="'more', 'and more'"):
        Saved({"more": 1, "and more": 2}).end()
    with pytest.raises(TypeError, match="list"):
        Saved([])

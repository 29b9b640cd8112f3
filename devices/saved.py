"""A device's saved state, read with suspicion: it may come from a file that somebody has written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Saved"]


class Saved:
    """The fields of one state. Whoever loads it takes all of them, says `end`, and only then changes anything.

    Every method raises KeyError for a field that is missing, TypeError for one of another kind and ValueError for one
    out of its range.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        """Read `state`, which stays as it is."""
        if not isinstance(state, Mapping):
            raise TypeError(f"a device's state is a mapping, not {type(state).__name__}")
        self._left = dict(state)

    def number(self, name: str, most: int, *, least: int = 0) -> int:
        """Take an integer from `least` to `most`."""
        value = self._take(name, int)
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}, not {least} to {most}")
        return int(value)

    def bits(self, name: str, mask: int, *, always: int = 0) -> int:
        """Take a register that has no bits but those of `mask`, and all those of `always`."""
        value = self.number(name, mask)
        if value & ~mask or ~value & always:
            raise ValueError(f"{name} is {value:#x}, which the register cannot be")
        return value

    def flag(self, name: str) -> bool:
        """Take a truth value."""
        return bool(self._take(name, bool))

    def octets(self, name: str, most: int, *, least: int = 0) -> bytes:
        """Take `least` to `most` bytes."""
        value = self._take(name, bytes)
        if not least <= len(value) <= most:
            raise ValueError(f"{name} has {len(value)} bytes, not {least} to {most}")
        return bytes(value)

    def items(self, name: str, length: int, *, least: int = 0) -> list[Any]:
        """Take a list of `least` to `length` entries of any kind."""
        values = self._take(name, list)
        if not least <= len(values) <= length:
            raise ValueError(f"{name} has {len(values)} entries, not {least} to {length}")
        return list(values)

    def part(self, name: str) -> dict[str, Any]:
        """Take the state of something that is part of the device."""
        return dict(self._take(name, dict))

    def flags(self, name: str, length: int) -> list[bool]:
        """Take a list of exactly `length` truth values."""
        values = self.items(name, length, least=length)
        if any(type(value) is not bool for value in values):
            raise TypeError(f"{name} has entries that are no truth values")
        return values

    def numbers(self, name: str, length: int, most: int, *, least: int = 0) -> list[int]:
        """Take a list of `least` to `length` integers from 0 to `most`."""
        values = self.items(name, length, least=least)
        entries = Saved({f"{name}[{index}]": value for index, value in enumerate(values)})
        return [entries.number(f"{name}[{index}]", most) for index in range(len(values))]

    def optional(self, name: str) -> bool:
        """Tell whether a field has a value; one that is None is taken by this."""
        if name in self._left and self._left[name] is None:
            del self._left[name]
            return False
        return True

    def end(self) -> None:
        """Say that nothing else is wanted; raises ValueError when there is more."""
        if self._left:
            raise ValueError(f"a state has what nobody knows: {', '.join(map(repr, self._left))}")

    def _take(self, name: str, kind: type) -> Any:
        value = self._left.pop(name)
        if type(value) is not kind:  # a truth value is no number
            raise TypeError(f"{name} is of type {type(value).__name__}, not {kind.__name__}")
        return value

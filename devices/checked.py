"""Values out of a saved state, judged before they are used: what a device cannot have said is refused.

Each raises KeyError when there is no such value, TypeError when it is of another type, ValueError when it is out of
range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["flag", "flags", "integer", "integers", "items", "octets", "part"]


def _of(kind: type, value: object, what: str) -> None:
    if type(value) is not kind:
        raise TypeError(f"{what} is a {type(value).__name__}, not {kind.__name__}")


def _in_range(value: object, most: int, what: str) -> int:
    if type(value) is not int:
        raise TypeError(f"{what} is a {type(value).__name__}, not int")
    if not 0 <= value <= most:
        raise ValueError(f"{what} is {value:#x}, and {most:#x} is the most")
    return value


def integer(state: Mapping[str, Any], key: str, most: int) -> int:
    """Return an integer from 0 to `most`."""
    return _in_range(state[key], most, key)


def flag(state: Mapping[str, Any], key: str) -> bool:
    """Return a boolean."""
    value = state[key]
    _of(bool, value, key)
    return bool(value)


def octets(state: Mapping[str, Any], key: str, most: int, *, least: int = 0) -> bytes:
    """Return `least` to `most` bytes."""
    value = state[key]
    _of(bytes, value, key)
    if not least <= len(value) <= most:
        raise ValueError(f"{key} has {len(value)} bytes")
    return bytes(value)


def part(state: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the state of something that is part of the device."""
    value = state[key]
    _of(dict, value, key)
    return dict(value)


def items(state: Mapping[str, Any], key: str, most: int, *, least: int = 0) -> list[Any]:
    """Return a list of `least` to `most` items of any kind."""
    value = state[key]
    _of(list, value, key)
    if not least <= len(value) <= most:
        raise ValueError(f"{key} has {len(value)} items")
    return list(value)


def integers(state: Mapping[str, Any], key: str, count: int, most: int) -> list[int]:
    """Return `count` integers from 0 to `most`."""
    return [_in_range(value, most, key) for value in items(state, key, count, least=count)]


def flags(state: Mapping[str, Any], key: str, count: int) -> list[bool]:
    """Return `count` booleans."""
    values = items(state, key, count, least=count)
    for value in values:
        _of(bool, value, key)
    return values

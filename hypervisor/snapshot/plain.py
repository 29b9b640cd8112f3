"""Plain values as JSON can carry them, and back: JSON has neither bytes nor file names that are no text.

Bytes become {"$base64": "..."} and a file name that is no text {"$path": "..."} (the base64 of its bytes), so that the
JSON stays readable for other programs. A dict of the state must not have such a key itself.
"""

from __future__ import annotations

import binascii
import os
from typing import Any, Final

__all__ = ["pack", "unpack"]

BYTES: Final = "$base64"
PATH: Final = "$path"


def pack(value: Any, where: str = "state") -> Any:
    """Return the value as JSON can carry it; bytes are left for the encoder, which makes base64 of them.

    Args:
        value: dicts keyed by str, lists, tuples (which come back as lists), int, str, bool, bytes and None.
        where: its name in errors.

    Raises:
        TypeError: something else is in it; it says where.
        ValueError: a key begins with "$", or is no text.
    """
    if isinstance(value, dict):
        return {_key(key, where): pack(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, bytes | bytearray | memoryview):
        return {BYTES: bytes(value)}
    if isinstance(value, str):
        return value if value.isascii() else _text(value)
    if value is None or type(value) in {int, bool}:
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which a snapshot does not carry")


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}, which is no text")
    key.encode()
    if key.startswith("$"):
        raise ValueError(f"{where} has the key {key!r}: those beginning with $ have a meaning of their own")
    return key


def _text(value: str) -> str | dict[str, bytes]:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {PATH: value.encode("utf-8", "surrogateescape")}
    return value


def unpack(value: Any) -> Any:
    """Return what `pack` was given; raises ValueError or TypeError on what it cannot have returned."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        if isinstance(value, float):
            raise TypeError("a number with a fraction")
        return value
    if any(key.startswith("$") for key in value):
        if len(value) != 1:
            raise ValueError("a key with $ beside others")
        ((key, text),) = value.items()
        data = binascii.a2b_base64(text, strict_mode=True)
        if key == BYTES:
            return data
        if key == PATH:
            return os.fsdecode(data)
        raise ValueError(f"an unknown kind of value: {key!r}")
    return {key: unpack(item) for key, item in value.items()}

"""Kernel configurations: fragments, and what became of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["differences", "parse"]

LINE: Final = re.compile(r"^(?:(CONFIG_\w+)=(.*)|# (CONFIG_\w+) is not set)$", re.MULTILINE)


def parse(text: str) -> dict[str, str]:
    """Return option to value; "n" for one that is not set. The last line about an option counts."""
    return {match[1] or match[3]: match[2] if match[1] else "n" for match in LINE.finditer(text)}


def differences(wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """Return the wanted settings that are otherwise in `got`, as "CONFIG_X=y" or "CONFIG_X=n", sorted.

    An option that `got` does not mention is "n": its dependencies are not met, or this kernel does not have it.
    """
    return sorted(f"{name}={value}" for name, value in wanted.items() if got.get(name, "n") != value)

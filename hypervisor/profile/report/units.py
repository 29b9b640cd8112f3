"""Figures and names as people read them."""

from __future__ import annotations

from typing import Final

__all__ = ["count", "percent", "plain", "rate", "time"]

_TIMES: Final = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns"))
_COUNTS: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_EXACT: Final = 999_999


def _three_digits(value: float) -> str:
    """Return a value below 1000 with three digits that matter."""
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def time(ns: float) -> str:
    """Return a time in its unit, such as "1.95 us"; "0" for none."""
    if not ns:
        return "0"
    size = abs(ns)
    sign = "-" if ns < 0 else ""
    for scale, unit in _TIMES:
        if size >= scale * 0.9995:
            return (
                f"{sign}{size / scale:.0f} {unit}"
                if size >= scale * 999.5
                else f"{sign}{_three_digits(size / scale)} {unit}"
            )
    return f"{sign}{size:.2g} ns"


def count(value: float) -> str:
    """Return a count: exact to six digits, with a unit above and for fractions."""
    if float(value).is_integer() and abs(value) <= _EXACT:
        return f"{int(value)}"
    size = abs(value)
    sign = "-" if value < 0 else ""
    for scale, unit in _COUNTS:
        if size >= scale * 0.9995:
            return f"{sign}{_three_digits(size / scale)}{unit}"
    return f"{sign}{_three_digits(size)}"


def rate(number: float, ns: float) -> str:
    """Return how many a second `number` in `ns` nanoseconds are."""
    value = number * 1e9 / ns if ns else 0.0
    if value >= 99.5 or not value:
        return count(round(value))
    return f"{value:.2g}" if value >= 0.01 else "<0.01"


def percent(part: float, whole: float) -> str:
    """Return what share `part` is of `whole`: "12.3%", "<0.1%" for what is little but not nothing."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    return f"{share:.1f}%" if share >= 0.1 else "<0.1%"


def plain(text: str) -> str:
    """Return a name without what a terminal could take for a command, or an encoder could not write."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )

"""A profile as one HTML file: no link leaves it, no request is made, so it can be kept, mailed and opened anywhere.

What the page shows is added up here, in one pass over the single exits, so that its size depends on the number of kinds
of exits and not on the number of exits.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from importlib.resources import files
from math import log2
from typing import TYPE_CHECKING, Any, Final

from hypervisor.profile.histogram import bounds
from hypervisor.profile.report.groups import KERNEL_TIMES, USER, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.profile.exits import ExitRow
    from hypervisor.profile.histogram import Histogram
    from hypervisor.profile.model import Profile

__all__ = ["BINS", "render"]

BINS: Final = 3000
"""Points of time that the timeline tells apart."""
HEAT_BINS: Final = 400
HEAT_STEPS: Final = 6
"""Latencies that the heat map tells apart in each power of two."""
HEAT_LOW, HEAT_HIGH = 5, 34
"""Its powers of two: from 32 ns to 17 s; what lies outside counts at the edge."""
SERIES: Final = 7
"""Devices that have a colour of their own; the others share one."""
MOST_SYMBOLS: Final = 16
MOST_ROWS: Final = 1000
MOST_MARKS: Final = 500
MOST_TEXT: Final = 200
PIECE: Final = 1 << 16
"""Exits that are counted at once."""
SCRIPTS: Final = ("page.js", "timeline.js", "heat.js", "flame.js", "table.js")


def render(profile: Profile) -> str:
    """Return the page."""
    source = files("hypervisor.profile.report")
    style = source.joinpath("page.css").read_text()
    script = "\n".join(source.joinpath(name).read_text() for name in SCRIPTS)
    page = source.joinpath("page.html").read_text()
    title = f"hv profile: {profile.info['kernel']}" if profile.info.get("kernel") else "hv profile"
    parts = {
        "title": _text(title),
        "style-hash": _hash(style),
        "script-hash": _hash(script),
        "style": style,
        "kernel-times": _text(KERNEL_TIMES),
        "data": embedded(_data(profile)),
        "script": script,
    }
    for name, value in parts.items():
        before, found, after = page.partition(f"{{{{{name}}}}}")
        if not found:
            raise ValueError(f"the page has no place for its {name}")
        page = before + value + after
    return page


def _hash(source: str) -> str:
    """Return the word of a Content-Security-Policy that allows this very source."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _text(text: str) -> str:
    from html import escape

    return escape(text.encode("utf-8", "backslashreplace").decode())


def embedded(data: Any) -> str:
    """Return JSON that cannot end the element it stands in, whatever the guest's names are."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII, so that lone surrogates do no harm
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _short(text: str) -> str:
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "\u2026"


def _data(profile: Profile) -> dict[str, Any]:
    """Return what the page's scripts read."""
    names: dict[str, int] = {}
    series = _series(profile)
    return {
        "info": {name: _short(str(value)) for name, value in profile.info.items() if value is not None},
        "wall": profile.wall_ns,
        "vcpus": [asdict(vcpu) for vcpu in profile.vcpus],
        "marks": [[_short(name), at_ns] for name, at_ns in profile.marks[:MOST_MARKS]],
        "notes": [_short(note) for note in profile.notes],
        "series": list(series),
        "total": _rows(profile.exits.merged().rows, 3, names),
        "rows": _rows(profile.exits.rows, MOST_SYMBOLS, names),
        "left_out": max(len(profile.exits.merged()) - MOST_ROWS, 0),
        "symbols": list(names),
        "kvm": profile.kvm,
        "trace": _trace(profile, series) if profile.has_trace else None,
    }


def _what(row: ExitRow) -> str:
    """Return what colour a row has: its device's; its reason's where it is no access."""
    return where(row) or row.reason


def _series(profile: Profile) -> dict[str, int]:
    """Number those with most exits, which have a colour each; all others are the last."""
    counts: dict[str, int] = {}
    for row in profile.exits:
        if row.layer == USER:
            counts[_what(row)] = counts.get(_what(row), 0) + row.count
    first = sorted(counts, key=lambda name: -counts[name])[:SERIES]
    names = first if len(counts) <= SERIES else [*first, "others"]
    return {name: number for number, name in enumerate(names)}


def _rows(rows: Sequence[ExitRow], most_symbols: int, names: dict[str, int]) -> list[dict[str, Any]]:
    """Return rows in short, those that took most time; `names` numbers the symbols."""
    return [
        {
            "layer": row.layer,
            "name": _short(row.name),
            "reason": row.reason,
            "where": where(row),
            "what": _what(row),
            "register": row.register if row.device else None,
            "direction": row.direction,
            "address": None if row.address is None else f"{row.address:#x}",
            "size": row.size,
            "vcpu": row.vcpu,
            "count": row.count,
            "operations": row.operations,
            **row.handler.as_json(),
            "times": _times(row.handler),
            "samples": sum(row.symbols.values()),
            "symbols": [
                [names.setdefault(_short(name), len(names)), count]
                for name, count in sorted(row.symbols.items(), key=lambda item: (-item[1], item[0]))[:most_symbols]
            ],
        }
        for row in sorted(rows, key=lambda row: -row.handler.total)[:MOST_ROWS]
    ]


def _times(histogram: Histogram) -> list[int]:
    """Return pairs, flat: a quarter of a power of two (of nanoseconds), and how many times fell into it."""
    counts: dict[int, int] = {}
    for bucket, count in histogram.buckets.items():
        low, high = bounds(bucket)
        middle = min((low + high) / 2, histogram.max_ticks) * histogram.ns_per_tick
        step = int(4 * log2(max(middle, 1)))
        counts[step] = counts.get(step, 0) + count
    return [number for pair in sorted(counts.items()) for number in pair]


def _trace(profile: Profile, series: dict[str, int]) -> dict[str, Any] | None:
    """Count the single exits by time and device, and by time and latency; None if there are none."""
    import numpy as np

    others = len(series) - 1
    series_of = np.array([series.get(_what(row), others) for row in profile.trace_rows] or [0])
    steps = (HEAT_HIGH - HEAT_LOW) * HEAT_STEPS
    devices = np.zeros(BINS * len(series), np.int64)
    heat = np.zeros(HEAT_BINS * steps, np.int64)
    for chunk in profile.trace():
        for start in range(0, len(chunk.at_ns), PIECE):
            some = slice(start, start + PIECE)
            part = chunk.at_ns[some] / max(profile.wall_ns, 1)
            time = np.clip(part * BINS, 0, BINS - 1).astype(np.int64)
            devices += np.bincount(time * len(series) + series_of[chunk.row[some]], minlength=len(devices))
            step = (np.log2(np.maximum(chunk.handler_ns[some], 1)) - HEAT_LOW) * HEAT_STEPS
            step = np.clip(step, 0, steps - 1).astype(np.int64)
            time = np.clip(part * HEAT_BINS, 0, HEAT_BINS - 1).astype(np.int64)
            heat += np.bincount(time * steps + step, minlength=len(heat))
    cells = np.flatnonzero(heat)
    if not len(cells) or not profile.wall_ns:
        return None
    return {
        "bins": BINS,
        "counts": devices.reshape(BINS, len(series)).T.tolist(),
        "heat_bins": HEAT_BINS,
        "heat_low": HEAT_LOW,
        "heat_per_power": HEAT_STEPS,
        "heat_steps": steps,
        "heat": np.stack((cells, heat[cells]), axis=1).reshape(-1).tolist(),
    }

"""Reads profile files, whole ones and those that were cut short."""

from __future__ import annotations

import base64
import json
import mmap
import struct
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from hypervisor.errors import ImageError
from hypervisor.kvm.recorder import MOST_ROWS, raw_rows, row_size
from hypervisor.profile.exits import Exits, Mark
from hypervisor.profile.fileformat import CHUNK, MAGIC, ROW_KEY, VERSION, unpack_row
from hypervisor.profile.live import row_of, times_of
from hypervisor.profile.model import Profile
from hypervisor.profile.names import GuestNames
from hypervisor.profile.trace import MOST_TICKS, RowKey, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hypervisor.kvm.recorder import RawRow
    from hypervisor.profile.exits import ExitRow

__all__ = ["load"]

DAMAGE: Final = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading values that nobody would write leads to."""


def load(path: str) -> Profile:
    """Read a profile file.

    What is missing because the run was killed, or the file cut, is told in `Profile.notes`.

    Raises:
        ImageError: it cannot be read, is no profile, or of another version.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if file.seek(0, 2) else b""
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise ImageError(f"{path} is empty", hint="the run ended before its profile began, or its disk was full")
    if data[: len(MAGIC)] != MAGIC:
        raise ImageError(f"{path} is no profile", hint="`hv run ... --profile FILE` writes one")
    with _damage_told(path):
        return _Reader(path, data).profile()


@contextmanager
def _damage_told(path: str) -> Iterator[None]:
    """Tell the user, of what cannot be read in the file, that the file is damaged."""
    try:
        yield
    except (*DAMAGE, struct.error, zlib.error) as error:
        raise ImageError(
            f"{path} is damaged: {error!r}", hint="its run wrote it otherwise, or it was changed"
        ) from error


def _unpacked(data: bytes) -> bytes:
    """Return packed rows, of which there cannot be more than a vCPU has."""
    unpacker = zlib.decompressobj()
    rows = unpacker.decompress(data, MOST_ROWS * row_size() + 1)
    if not unpacker.eof:
        raise ValueError("rows are cut short, or too many")
    return rows


class _Reader:
    """Puts a profile together from a file's chunks."""

    def __init__(self, path: str, data: bytes | mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._chunks: dict[str, list[tuple[int, int, int]]] = {}
        self._notes: list[str] = []
        self._find_chunks()
        heads = self._json("HEAD")
        if not heads:
            raise ImageError(f"{path} holds nothing", hint="the run ended before its profile began")
        self._head = heads[0]
        if self._head["version"] != VERSION:
            raise ImageError(
                f"{path} is a profile of version {self._head['version']}, not {VERSION}",
                hint="read it with the hv that wrote it",
            )
        if not 0 <= self._head["tick"] <= MOST_TICKS:
            raise ValueError("the start is no time")
        self._tail: dict[str, Any] = next(reversed(self._json("TAIL")), {})
        if not self._tail:
            self._notes.append("the run did not end in order: its last moments are not in the file")
        self._reasons = {int(number): name for number, name in self._head["reasons"].items()}
        self._names = {
            (kind, address): (device, register)
            for rows in self._json("NAME")
            for kind, address, device, register in rows
        }
        self._keys = self._read_keys()
        self._trace = self._read_trace()
        self._ns_per_tick = self._scale()

    def _find_chunks(self) -> None:
        data, at = self._data, len(MAGIC)
        while at < len(data):
            if at + CHUNK.size > len(data):
                self._notes.append(f"{self._path} is cut short; what it holds is used")
                return
            kind, vcpu, size = CHUNK.unpack_from(data, at)
            at += CHUNK.size
            if not (kind.isalpha() and kind.isupper()):
                self._notes.append(f"{self._path} is damaged at byte {at - CHUNK.size}; what comes before is used")
                return
            if at + size > len(data):
                self._notes.append(f"{self._path} is cut short; what it holds is used")
                size = len(data) - at if kind == b"TRAC" else 0
                if not size:
                    return
            self._chunks.setdefault(kind.decode("ascii"), []).append((vcpu, at, size))
            at += size

    def _bytes(self, kind: str) -> Iterator[tuple[int, bytes]]:
        for vcpu, at, size in self._chunks.get(kind, ()):
            yield vcpu, self._data[at : at + size]

    def _json(self, kind: str) -> list[Any]:
        return [json.loads(data) for _, data in self._bytes(kind)]

    def _scale(self) -> float:
        """Return nanoseconds of a tick: what the run measured, else what KVM said."""
        if self._tail and self._tail["tick"] > self._head["tick"]:
            return float(self._tail["wall_ns"] / (self._tail["tick"] - self._head["tick"]))
        if self._head["khz"]:
            return 1e6 / float(self._head["khz"])
        self._notes.append("the frequency of the TSC is not known: nanoseconds are ticks")
        return 1.0

    # --- the trace ----------------------------------------------------------------------------------------------------

    def _read_keys(self) -> dict[int, list[RowKey]]:
        """Return, by vCPU, what the rows of its trace are."""
        keys: dict[int, list[RowKey]] = {}
        for vcpu, data in self._bytes("ROWS"):
            mine = keys.setdefault(vcpu, [])
            for address, number, reason, kind, size in ROW_KEY.iter_unpack(data):
                if number != len(mine):
                    raise ValueError("a row is missing")
                mine.append(RowKey(address, reason, kind, size))
        return keys

    def _read_trace(self) -> Trace | None:
        if "TRAC" not in self._chunks:
            return None
        spaces: dict[int, bytes] = {}
        for vcpu, data in self._bytes("SPAC"):
            spaces[vcpu] = spaces.get(vcpu, b"") + data
        return Trace(
            self._data,
            self._chunks["TRAC"],
            keys=self._keys,
            spaces={vcpu: np.frombuffer(data, "<u8") for vcpu, data in spaces.items()},
            start_tick=self._head["tick"],
        )

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _row(self, raw: RawRow, vcpu: int) -> ExitRow:
        def name(kind: int, address: int) -> tuple[str | None, str | None]:
            return self._names.get((kind, address), (None, None))

        return row_of(raw, vcpu=vcpu, ns_per_tick=self._ns_per_tick, reasons=self._reasons, name=name)

    def _raw_rows(self) -> dict[int, list[RawRow]]:
        """Return what was counted, by vCPU."""
        counted = {vcpu: raw_rows(_unpacked(data)) for vcpu, data in dict(self._bytes("SUMM")).items()}
        if self._trace is not None and not self._tail:  # it goes further than the counts, unless much of it was dropped
            for vcpu, traced in self._trace.counts().items():
                if sum(row.exits for row in traced) > sum(row.exits for row in counted.get(vcpu, ())):
                    counted[vcpu] = traced
        return counted

    def _rows(self) -> dict[int, list[ExitRow]]:
        sampled = {} if self._trace is None else self._trace.sample(self._namer())
        symbols = {
            (vcpu, self._keys[vcpu][number]): names for (vcpu, number), names in sampled.items()
        }  # the rows of counts and of the trace have the same keys
        rows: dict[int, list[ExitRow]] = {}
        for vcpu, raws in self._raw_rows().items():
            rows[vcpu] = [
                replace(
                    self._row(raw, vcpu),
                    symbols=symbols.get((vcpu, RowKey(raw.address, raw.reason, raw.kind, raw.size)), {}),
                )
                for raw in raws
                if raw.exits
            ]
        return rows

    def _namer(self) -> Callable[[int, int], str]:
        """Return what gives a place its name, from RIP and CR3."""
        packed = dict(self._bytes("SYMS"))
        names = GuestNames.from_bytes(packed[0]) if packed else GuestNames()
        self._notes += names.notes
        if not packed and self._head["every"]:
            self._notes.append("places have no names: the run ended before the guest's symbols were looked for")
        return names.name

    def _marks(self) -> list[Mark]:
        def load_rows(packed: Sequence[str]) -> list[ExitRow]:
            with _damage_told(self._path):
                return [
                    self._row(raw, vcpu)
                    for vcpu, text in enumerate(packed)
                    for raw in raw_rows(_unpacked(base64.b64decode(text)))
                    if raw.exits
                ]

        return [
            Mark(str(mark["name"]), int(mark["at_ns"]), partial(load_rows, mark["rows"])) for mark in self._json("MARK")
        ]

    # --- everything ---------------------------------------------------------------------------------------------------

    def profile(self) -> Profile:
        """Return the profile."""
        exits = self._rows()
        trace = self._trace
        wall_ns = int(self._tail.get("wall_ns", 0))
        if not wall_ns and trace is not None:
            wall_ns = round((trace.last_tick - self._head["tick"]) * self._ns_per_tick)
        if dropped := sum(self._tail.get("dropped", ())):
            self._notes.append(
                f"{dropped} single exits are not in the trace: the disk did not keep up; counts are exact"
            )
        self._notes += self._tail.get("notes", ())
        marks = self._marks()
        kvm: dict[str, dict[str, int]] = next(reversed(self._json("KVMS")), {})
        kernel = [unpack_row(row) for rows in self._json("KERN")[-1:] for row in rows]
        return Profile(
            info=self._head["info"] | ({"outcome": self._tail["outcome"]} if self._tail else {}),
            wall_ns=wall_ns,
            vcpus=[times_of(vcpu, some, kvm.get(f"vcpu{vcpu}", {})) for vcpu, some in sorted(exits.items())],
            exits=Exits([row for some in (*exits.values(), kernel) for row in some], marks=marks),
            kvm=kvm,
            marks=[(mark.name, mark.at_ns) for mark in marks],
            notes=self._notes,
            trace=None if trace is None else partial(trace.chunks, self._ns_per_tick),
            trace_rows=[self._row(key.as_row(), vcpu) for vcpu, keys in sorted(self._keys.items()) for key in keys],
            places=[] if trace is None else trace.places,
        )

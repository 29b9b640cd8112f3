"""What C has recorded of a vCPU's exits, and the files that traces go to; see recorder.h and tracefile.h."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.errors import HostError
from hypervisor.kvm._kvm import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.kvm.vcpu import Vcpu

__all__ = ["ELSEWHERE", "MOST_ROWS", "RawRow", "TraceFile", "raw_rows", "row_size", "tick"]

ELSEWHERE: Final[int] = lib.HV_ELSEWHERE
"""The address of a row for all addresses that found no row of their own."""
MOST_ROWS: Final[int] = lib.HV_ROWS
"""Rows of a vCPU."""
_BUCKETS: Final[int] = lib.HV_BUCKETS
_WORDS: Final[int] = ffi.sizeof("struct hv_row") // 8


def _word(field: str) -> int:
    return int(ffi.offsetof("struct hv_row", field)) // 8


_KEY: Final = _word("reason")
_COUNT: Final = _word("count")
_OPERATIONS: Final = _word("operations")
_GUEST: Final = _word("guest")
_HANDLER: Final = _word("handler")


class RawRow(NamedTuple):
    """A row as C keeps it; times in ticks.

    Attributes:
        address: port or guest-physical address, ELSEWHERE, or 0.
        reason, kind, size: KVM_EXIT_ number, kind of access as in runloop.h, bytes.
        exits, operations: counts.
        guest, handler: sum, maximum and buckets (64-bit words) of each histogram.
    """

    address: int
    reason: int
    kind: int
    size: int
    exits: int
    operations: int
    guest: tuple[int, int, memoryview]
    handler: tuple[int, int, memoryview]


def tick() -> int:
    """Return the TSC."""
    now: int = lib.hv_tick()
    return now


def row_size() -> int:
    """Return the length of a row in `Vcpu.recorded_rows`, in bytes."""
    return _WORDS * 8


def raw_rows(data: bytes) -> list[RawRow]:
    """Take apart what `Vcpu.recorded_rows` returned."""
    words = memoryview(data).cast("Q")
    rows = []
    for start in range(0, len(words) - _WORDS + 1, _WORDS):
        row = words[start : start + _WORDS]
        key = row[_KEY]
        rows.append(
            RawRow(
                row[0],
                key & 0xFF,
                key >> 8 & 0xFF,
                key >> 16 & 0xFF,
                row[_COUNT],
                row[_OPERATIONS],
                _histogram(row, _GUEST),
                _histogram(row, _HANDLER),
            )
        )
    return rows


def _histogram(row: memoryview, at: int) -> tuple[int, int, memoryview]:
    return row[at], row[at + 1], row[at + 2 : at + 2 + _BUCKETS]


class TraceFile:
    """A profile file that is being written: chunks from Python, and traces of vCPUs from a thread without the GIL."""

    def __init__(self, path: str, magic: bytes) -> None:
        """Make the file, or empty it, and begin it with `magic`; raises HostError when that cannot be done."""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise HostError(f"cannot write {path}") from error
        try:
            os.write(self._fd, magic)
        except OSError as error:
            os.close(self._fd)
            raise HostError(f"cannot write {path}") from error
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._c: Any = lib.hv_trace_file_new(self._fd, self._stop_fd, self._event_fd)
        self._thread: threading.Thread | None = None
        self._error = 0
        self._lock = threading.Lock()  # whoever makes a mark may come after the end

    def start(self, vcpus: Sequence[Vcpu]) -> None:
        """Trace these vCPUs, which do not run yet."""
        for vcpu in vcpus:
            if lib.hv_trace_file_add(self._c, vcpu.recorder):
                raise HostError("no memory for a trace")
        self._thread = threading.Thread(target=lib.hv_trace_file_run, args=(self._c,), name="hv-trace", daemon=True)
        self._thread.start()

    def write(self, kind: str, data: bytes, vcpu: int = 0) -> None:
        """Append a chunk; after an error (see `error`), and when it is closed, nothing is written any more."""
        with self._lock:
            if self._c != ffi.NULL:
                lib.hv_trace_file_write(self._c, kind.encode("ascii"), vcpu, data, len(data))

    @property
    def error(self) -> int:
        """The errno of the write that ended the file; 0 while all is well."""
        with self._lock:
            number: int = self._c.error if self._c != ffi.NULL else self._error
        return number

    def stop(self) -> list[int]:
        """Write what the vCPUs, which have ended, left behind; return how many exits of each the trace lacks."""
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            self._thread = None
        return [lib.hv_trace_dropped(self._c.recorder[index]) for index in range(self._c.recorders)]

    def close(self) -> None:
        """Close the file; the vCPUs have ended."""
        with self._lock:
            if self._c == ffi.NULL:
                return
            self.stop()
            self._error = self._c.error
            lib.hv_trace_file_free(self._c)
            self._c = ffi.NULL
            for fd in (self._fd, self._stop_fd, self._event_fd):
                os.close(fd)

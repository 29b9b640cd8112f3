"""Which pages of guest RAM have changed: KVM's dirty log, and marks for what this process writes (see dirty.h)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.errors import HostError
from hypervisor.kvm._kvm import ffi, lib
from hypervisor.kvm.ioctls import refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.kvm.handles import Vm

__all__ = ["PAGE", "Changed", "Dirty", "Marks", "copy_back", "copy_base"]

PAGE: Final = 4096
WORD: Final = 64
RUNS: Final = 1024


class Marks:
    """The pages that this process has written, one bit each; off at first.

    Attributes:
        base: where RAM begins in this process.
        size: of the RAM in bytes.
        is_on: whether somebody wants to know.
        cdata: the same for the data paths in C.
    """

    def __init__(self, base: int, size: int) -> None:
        """Be ready for `size` bytes of RAM, a multiple of the page size, at address `base`."""
        self.base = base
        self.size = size
        self.is_on = False
        self.cdata = ffi.gc(lib.hv_marks_new(base, size // PAGE), lib.hv_marks_free)

    def switch(self, on: bool) -> None:
        """Begin to take marks, from none on, or end it; raises HostError when the host cannot."""
        if not on:
            self.is_on = False  # before nobody takes them
        result = lib.hv_marks_switch(self.cdata, on)
        if result < 0:
            raise HostError(f"this host cannot watch memory for changes: {os.strerror(-result)}")
        self.is_on = on

    def mark(self, offset: int, size: int) -> None:
        """Say that `size` bytes, `offset` behind the beginning of RAM, have been written just now."""
        lib.hv_mark_pages(self.cdata, self.base + offset, size)


class Changed(NamedTuple):
    """Pages that were written since the last time.

    Attributes:
        bitmap: a bit a page of RAM, in 64-bit words of the host, the first page in bit 0; it is used again.
        pages: how many they are.
    """

    bitmap: memoryview
    pages: int

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first page, length) of every stretch of them, in order."""
        at = ffi.new("uint64_t *")
        rows = ffi.new("uint64_t[]", 2 * RUNS)
        while found := lib.hv_runs(ffi.from_buffer("uint64_t[]", self.bitmap), WORD * len(self.bitmap), at, rows, RUNS):
            flat = iter(rows[0 : 2 * found])
            yield from zip(flat, flat, strict=True)


class Dirty:
    """Both kinds of changes of one VM's RAM. From its making until `close` they are logged.

    `collect` is for one thread at a time; vCPUs and devices may go on meanwhile. A page that it returns may be read
    from then on: what is written to it later is in the next one.
    """

    def __init__(self, vm: Vm, marks: Marks, *, by_hand: bool = False) -> None:
        """Begin to log.

        Args:
            vm: the VM, all of whose memory slots are parts of one RAM.
            marks: that RAM's.
            by_hand: as for `Vm.log_dirty`: for who looks at a large memory a few times only.

        Raises:
            ValueError: somebody else follows it already, to whom changes would be lost.
            KvmError, HostError: when the host refuses.
        """
        if marks.is_on:
            raise ValueError("the changes of this RAM are being followed already")
        self._vm = vm
        self._marks = marks
        slots = []
        for slot, (host, size) in vm.slots.items():
            first, rest = divmod(host - marks.base, PAGE * WORD)
            if rest or not 0 <= host - marks.base <= marks.size - size:
                raise ValueError(
                    f"memory slot {slot} is not a part of RAM, or not on a multiple of {PAGE * WORD} bytes"
                )
            slots.append((slot, first * WORD, size // PAGE))
        self._slots = ffi.new("struct hv_log_slot[]", slots)
        self._bits = ffi.new("uint64_t[]", -(-marks.size // (PAGE * WORD)))
        self._bitmap = memoryview(ffi.buffer(self._bits)).cast("Q").toreadonly()
        marks.switch(True)
        try:
            self._by_hand = vm.log_dirty(True, by_hand=by_hand)
        except BaseException:
            marks.switch(False)
            raise

    def collect(self) -> Changed:
        """Return the pages that were written since the last time, or since the beginning, and start anew.

        The first time it may be all of them where the log is cleared by hand (KVM_DIRTY_LOG_INITIALLY_SET).
        """
        count = lib.hv_collect(
            self._marks.cdata, self._vm.fileno(), self._slots, len(self._slots), self._by_hand, self._bits
        )
        if count < 0:
            raise refusal(lib.KVM_GET_DIRTY_LOG, -count)
        return Changed(self._bitmap, count)

    def close(self) -> None:
        """Log no more. May be called twice, and after the VM was closed."""
        if self._marks.is_on:
            self._marks.switch(False)
            self._vm.log_dirty(False)


def copy_back(marks: Marks, base: Any, changed: Changed) -> int:
    """Copy the changed pages from `base`, a buffer as long as RAM, to RAM; return how many. Releases the GIL."""
    ram = ffi.cast("void *", marks.base)
    bits = ffi.from_buffer("uint64_t[]", changed.bitmap)
    copied: int = lib.hv_copy_back(ram, ffi.from_buffer(base), bits, marks.size // PAGE)
    return copied


def copy_base(marks: Marks, base: Any) -> int:
    """Copy RAM to `base`, a buffer of zeroes as long; return how many pages are not zero. Releases the GIL."""
    into = ffi.from_buffer(base, require_writable=True)
    copied: int = lib.hv_copy_base(into, ffi.cast("void *", marks.base), marks.size // PAGE)
    return copied

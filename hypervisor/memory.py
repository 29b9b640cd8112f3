"""Guest RAM: the only place that slices it."""

from __future__ import annotations

import mmap
from typing import NamedTuple

from devices.ports import GuestFault
from hypervisor.errors import HostError
from hypervisor.kvm.dirty import Marks
from hypervisor.kvm.handles import host_address, map_zeroes
from hypervisor.layout import RAM_HIGH_BASE, RAM_LOW_END

PAGE = 4096
HUGE_PAGE = 1 << 21
MAP_NORESERVE = 0x4000


class RamRange(NamedTuple):
    """A stretch of guest-physical RAM and where it lies in the one host mapping: all in bytes."""

    gpa: int
    size: int
    offset: int


class Content(NamedTuple):
    """Where the RAM of a saved machine is: in a file that nobody changes any more, from `offset` on."""

    fd: int
    offset: int


class GuestMemory:
    """The machine's RAM, one private mapping, in one range below 3 GiB and one from 4 GiB on.

    Attributes:
        size: of the RAM in bytes.
        offset: where in `buffer` it begins.
        marks: which pages this process has written, once somebody wants to know; `is_tracked` says whether.

    Host pages are allotted as the guest touches them, as transparent huge pages where the host has them. Of a saved
    machine a page is read when it is first touched, and copied when it is first written to; until then all machines
    that go on from the same file share it.
    """

    def __init__(self, ram_bytes: int, content: Content | None = None) -> None:
        """Map `ram_bytes` (a multiple of the page size) of `content` or zeroes; HostError when the host refuses."""
        self.size = ram_bytes
        self._is_file = content is not None
        # KVM maps a huge page only where guest and host addresses agree below its size
        try:
            if content is None:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
                self._map = mmap.mmap(-1, ram_bytes + HUGE_PAGE, flags=flags)
            else:
                flags = mmap.MAP_PRIVATE | MAP_NORESERVE
                self._map = mmap.mmap(content.fd, ram_bytes, flags=flags, offset=content.offset)
        except OSError as error:
            mib = ram_bytes >> 20
            raise HostError(
                f"this host gives no {mib} MiB of memory: {error.strerror}", hint="use less --ram"
            ) from error
        self.offset = 0
        if content is None:
            self._use_huge_pages()
        self._view = memoryview(self._map)[self.offset : self.offset + ram_bytes]
        self.marks = Marks(host_address(self._map) + self.offset, ram_bytes)
        self._low = min(ram_bytes, RAM_LOW_END)
        self._high_end = RAM_HIGH_BASE + ram_bytes - self._low

    def _use_huge_pages(self) -> None:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without transparent huge pages: small ones do
        self.offset = -host_address(self._map) % HUGE_PAGE

    @property
    def buffer(self) -> mmap.mmap:
        """The host mapping, for the memory slots."""
        return self._map

    @property
    def ranges(self) -> tuple[RamRange, ...]:
        """Where the RAM is."""
        low = RamRange(0, self._low, 0)
        if self.size == self._low:
            return (low,)
        return (low, RamRange(RAM_HIGH_BASE, self.size - self._low, self._low))

    def _offset(self, gpa: int, size: int) -> int:
        if size >= 0:
            if gpa >= 0 and gpa + size <= self._low:
                return gpa
            if gpa >= RAM_HIGH_BASE and gpa + size <= self._high_end:
                return gpa - RAM_HIGH_BASE + self._low
        raise GuestFault(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """Copy `size` bytes out of guest memory.

        Args:
            gpa: guest-physical address, in bytes.
            size: bytes to copy; zero is allowed.

        Raises:
            GuestFault: if any byte of the range lies outside RAM.
        """
        offset = self._offset(gpa, size)
        return self._view[offset : offset + size].tobytes()

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into guest memory at `gpa`; raises GuestFault if any byte would fall outside RAM."""
        size = len(data)
        offset = self._offset(gpa, size)
        self._view[offset : offset + size] = data
        if self.marks.is_on:
            self.marks.mark(offset, size)

    @property
    def is_tracked(self) -> bool:
        """Whether it is being noted what is written: then whoever wrote through a view says so to `written`."""
        return self.marks.is_on

    def written(self, gpa: int, size: int) -> None:
        """Say that `size` bytes at `gpa`, all of them RAM, have been written, or will be before the guest can know."""
        self.marks.mark(self._offset(gpa, size), size)

    def view(self, gpa: int, size: int) -> memoryview:
        """Return `size` bytes at `gpa` as they are, writable and without a copy; raises GuestFault as `read` does.

        The mapping lives until the last view of it is released.
        """
        offset = self._offset(gpa, size)
        return self._view[offset : offset + size]

    def pages(self, first: int, count: int) -> memoryview:
        """Return `count` pages of RAM from page `first` on, writable, counted without the hole: see RamRange.offset."""
        return self._view[first * PAGE : (first + count) * PAGE]

    def reclaim(self, gpa: int, size: int) -> None:
        """Give pages back to the host; the guest reads zeroes there until it writes again.

        Args:
            gpa: guest-physical address, a multiple of the page size.
            size: in bytes, a multiple of the page size.

        Raises:
            GuestFault: if any byte of the range lies outside RAM.
        """
        offset = self._offset(gpa, size)
        if self._is_file:  # to drop a page of a file's mapping brings the file's bytes back
            map_zeroes(host_address(self._map) + offset, size)
        else:
            self._map.madvise(mmap.MADV_DONTNEED, self.offset + offset, size)
        if self.marks.is_on:
            self.marks.mark(offset, size)

    def close(self) -> None:
        """Unmap, once the VM is closed; with views outstanding the last of them does it."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still held; the mapping goes with it

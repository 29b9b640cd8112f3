"""Names for what a guest does: kernel functions, modules, processes; as a value that a file can carry.

What is known comes from a file of symbols that the user named, from the running kernel's own tables, and from its list
of tasks. A profile keeps it as bytes, so that it is read later, elsewhere, without the guest.
"""

from __future__ import annotations

import json
import struct
from array import array
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final

from hypervisor.errors import ImageError
from hypervisor.profile import btf, buildid, kallsyms, modules, processes
from hypervisor.profile.processes import Process
from hypervisor.profile.reading import kernel_reader
from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hypervisor.memory import GuestMemory

__all__ = ["GuestNames"]

HIGHER_HALF: Final = 1 << 63
MODULES: Final = range(0xFFFF_FFFF_A000_0000, 0xFFFF_FFFF_FF00_0000)
"""Where modules and JIT-compiled BPF lie, with and without KASLR (Documentation/arch/x86/x86_64/mm.rst)."""
PAGE: Final = 4096
MASK: Final = (1 << 64) - 1

HEADER: Final = struct.Struct("<II")  # number of symbols, bytes of their names; one for each of two tables
MAX_UNPACKED: Final = 1 << 28
"""Bytes: a hundred times what a distribution's kernel takes."""


class GuestNames:
    """Names for addresses of one guest, each in one address space.

    Attributes:
        kernel: symbols of the kernel, or of whatever else the guest runs; None where there are none.
        modules: symbols of the kernel's modules, with the module's name.
        processes: whose each page-global directory is, by its physical address.
        notes: lines for the user on where the names are from, and what is wrong with a file of symbols.
    """

    def __init__(
        self,
        kernel: Symbols | None = None,
        modules: Symbols | None = None,
        processes: dict[int, Process] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        """Take what is known; see the attributes."""
        self.kernel = kernel
        self.modules = Symbols(()) if modules is None else modules
        self.processes = {} if processes is None else processes
        self.notes = list(notes)
        self._known: dict[int, str] = {}

    @classmethod
    def of_guest(  # noqa: PLR0913 - what may be known of a guest, each by its name
        cls,
        memory: GuestMemory,
        *,
        is_linux: bool = True,
        cr3: int | None = None,
        file: bytes | None = None,
        file_name: str = "the symbols",
        page_fault_handler: int | None = None,
    ) -> GuestNames:
        """Look for everything in a guest's memory; it may run meanwhile.

        Args:
            memory: the guest's RAM.
            is_linux: whether to look for a Linux kernel's own tables, which takes a second for some GiB of RAM.
            cr3: any vCPU's CR3; None does for Linux.
            file: a System.map, an ELF with symbols, or None. One of another kernel than the one that runs is not used,
                and `notes` say so.
            file_name: what to call it in `notes`.
            page_fault_handler: the address in gate 14 of the guest's IDT, which tells KASLR's offset for a file when
                the guest has no tables of its own.
        """
        found = kallsyms.find(memory) if is_linux else None
        kernel, notes = _kernel(memory, found, file, file_name, page_fault_handler)
        names = cls(kernel, notes=notes)
        if is_linux:
            names.learn(memory, cr3)
        return names

    def learn(self, memory: GuestMemory, cr3: int | None = None) -> None:
        """Look again for processes and modules, and add what is new: they come and go.

        Args:
            memory: the guest's RAM.
            cr3: as for `of_guest`.
        """
        symbols = self.kernel
        if symbols is None:
            return
        self.processes.update(processes.processes(memory, symbols, cr3))
        read = kernel_reader(memory, symbols, cr3)
        types = None if read is None else btf.find(symbols, read)
        if read is not None and types is not None:
            found = modules.find(symbols, read, types)
            known = {address: (size, name) for address, size, name in self.modules.entries()}
            known.update((address, (size, name)) for address, size, name in found.entries())
            self.modules = Symbols((address, size, name) for address, (size, name) in known.items())
        self._known.clear()

    def name(self, rip: int, cr3: int = 0, *, pages: bool = False, kernel_mode: bool = False) -> str:
        """Name what runs at an address.

        Args:
            rip: a linear address.
            cr3: control register 3 at that time, with whatever PCID it has.
            pages: whether to tell a process's pages from each other.
            kernel_mode: whether it is known to run at privilege level 0: then an address without a name is nobody's,
                however low it is.

        Returns:
            The name of a function, without an offset: "native_safe_halt", "evdev_read [evdev]"; "[module]" where one
            may be; "[user] sh/94", or "sh/94 user 0x401000" for one of its pages; "[user cr3=0x29ee000]" for a process
            that is not known; "0x..." for what nobody knows.
        """
        rip &= MASK
        found = self._known.get(rip)  # a profile asks for the same places again and again
        if found is None:
            found = self._known[rip] = self._code(rip)
            if len(self._known) > 1 << 16:
                self._known.clear()
        if found:
            return found
        if rip >= HIGHER_HALF or kernel_mode or not cr3:
            return f"{rip:#x}"
        process = processes.of_address_space(self.processes, cr3)
        if process is None:
            return f"[user cr3={cr3 & ~(PAGE - 1) & ~(1 << 63):#x}]"
        owner = f"{process.comm}/{process.pid}"
        return f"{owner} user {rip & ~(PAGE - 1):#x}" if pages else f"[user] {owner}"

    def _code(self, rip: int) -> str:
        """Return the name of a function, or an empty one."""
        found = self.kernel.label(rip) if self.kernel is not None else None
        found = found or self.modules.label(rip)
        if found is None and rip in MODULES and self.kernel is not None:
            return "[module]"
        return found or ""

    def to_bytes(self) -> bytes:
        """Pack everything for a file; `from_bytes` reads it. The caller's format says of which version it is."""
        import zstandard  # noqa: PLC0415 - only a profile that is kept needs it

        facts = {
            "processes": [[directory, *process] for directory, process in self.processes.items()],
            "notes": self.notes,
        }
        tables = [_packed(table) for table in (self.kernel or Symbols(()), self.modules)]
        return zstandard.compress(b"".join([*tables, json.dumps(facts).encode()]))

    @classmethod
    def from_bytes(cls, data: bytes) -> GuestNames:
        """Read what `to_bytes` wrote.

        Raises:
            ValueError: it is nothing of the kind.
        """
        import zstandard  # noqa: PLC0415 - as above

        try:
            if not 0 < zstandard.frame_content_size(data) <= MAX_UNPACKED:
                raise ValueError("the names are larger than any guest's")
            plain = zstandard.decompress(data)
            kernel, at = _unpacked(plain, 0)
            found, at = _unpacked(plain, at)
            facts = json.loads(plain[at:])
            table = {int(place): Process(int(pid), str(comm)) for place, pid, comm in facts["processes"]}
            return cls(kernel if len(kernel) else None, found, table, map(str, facts["notes"]))
        except (zstandard.ZstdError, struct.error, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError("the names are damaged") from error


def _kernel(
    memory: GuestMemory, found: Symbols | None, file: bytes | None, file_name: str, page_fault_handler: int | None
) -> tuple[Symbols | None, list[str]]:
    """Choose between a file's symbols and the kernel's own, and say which."""
    own = [] if found is None else [f"names from the kernel's own table: {len(found)} symbols"]
    if file is None:
        return found, own
    try:
        symbols = Symbols.parse(file, name=file_name)
    except ImageError as error:
        return found, [f"no names from a file: {error}", *own]
    if found is None:
        moved = None if page_fault_handler is None else symbols.kaslr_offset(page_fault_handler)
        symbols.offset = moved or 0
        return symbols, [f"names from {file_name}{f', moved by {moved:#x}' if moved else ''}"]
    moved = buildid.moved_by(symbols, found)
    if buildid.same_kernel(file, memory, found) is False or moved is None:
        return found, [f"{file_name} is of another kernel than the one that runs, and was not used", *own]
    symbols.offset = moved
    return symbols, [f"names from {file_name}{f', moved by {moved:#x}' if moved else ''}"]


def _packed(table: Symbols) -> bytes:
    """Return a table as its sizes, the distances between its addresses, and its names."""
    # sorted again: an offset may carry the last ones over the end of all addresses
    entries = sorted((address + table.offset & MASK, size, name) for address, size, name in table.entries())
    starts = [address for address, _, _ in entries]
    distances = array("Q", [*starts[:1], *(after - before for before, after in pairwise(starts))])
    sizes = array("Q", [size for _, size, _ in entries])
    names = "\n".join(name.replace("\n", "?") for _, _, name in entries).encode("utf-8", "replace")
    return HEADER.pack(len(entries), len(names)) + distances.tobytes() + sizes.tobytes() + names


def _unpacked(data: bytes, at: int) -> tuple[Symbols, int]:
    """Return a table, and where it ends."""
    number, names_size = HEADER.unpack_from(data, at)
    at += HEADER.size
    names_at = at + 16 * number
    end = names_at + names_size
    if end > len(data):
        raise ValueError("the names are cut short")
    starts = array("Q", accumulate(array("Q", data[at : at + 8 * number])))
    sizes = array("Q", data[at + 8 * number : names_at])
    names = data[names_at:end].decode("utf-8").split("\n") if number else []
    if len(names) != number:
        raise ValueError("the names do not fit their addresses")
    return Symbols.of_sorted(starts, sizes, names), end

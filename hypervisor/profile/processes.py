"""Which process an address space belongs to: the kernel's list of tasks, read in its memory.

struct task_struct is laid out differently in each build; the kernel's own type information (BTF) tells where its
members are, or else what they hold does. The list is walked while the guest may change it: a link that leads nowhere
ends the walk, and what was found so far is the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.paging import FRAME, PAGE
from hypervisor.profile import btf, taskscan
from hypervisor.profile.reading import direct_map, kernel_reader
from hypervisor.profile.taskscan import Offsets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hypervisor.memory import GuestMemory
    from hypervisor.symbols import Symbols

    Reader = Callable[[int, int], bytes | None]

__all__ = ["Process", "of_address_space", "processes"]

MAX_TASKS: Final = 65536
COMM_SIZE: Final = 16
"""TASK_COMM_LEN."""
HIGHER_HALF: Final = 1 << 63


class Process(NamedTuple):
    """A user process: its number, and the name of its main thread."""

    pid: int
    comm: str


def processes(memory: GuestMemory, symbols: Symbols, cr3: int | None = None) -> dict[int, Process]:
    """List the processes that have an address space of their own.

    Args:
        memory: the guest's RAM; the guest may run meanwhile.
        symbols: the kernel's, at the addresses where it runs; init_task is needed, and the bounds
            of BTF or init_top_pgt.
        cr3: any vCPU's CR3 in the guest kernel; None reads the kernel's image and direct map without its tables.

    Returns:
        The physical address of each page-global directory, and whose it is; empty where the kernel does not tell.
    """
    read, first = kernel_reader(memory, symbols, cr3), symbols.address_of("init_task")
    offsets = None if read is None or first is None else _offsets(read, symbols, first)
    if read is None or first is None or offsets is None:
        return {}
    return _walk(read, first, offsets, direct_map(symbols, read))


def _offsets(read: Reader, symbols: Symbols, first: int) -> Offsets | None:
    """Return where the members are, by the kernel's type information or else by what they hold."""
    types = btf.find(symbols, read)
    if types is None:
        directory = symbols.address_of("init_top_pgt")
        return None if directory is None else taskscan.scan(read, first, directory)
    paths = (("task_struct", "tasks.next"), ("task_struct", "tgid"), ("task_struct", "comm"), ("task_struct", "mm"))
    found = [types.offset(*path) for path in (*paths, ("mm_struct", "pgd"))]
    places = [place for place in found if place is not None]
    return Offsets(*places) if len(places) == len(found) else None


def of_address_space(table: Mapping[int, Process], cr3: int) -> Process | None:
    """Return whose address space CR3 selects, None where it is nobody's.

    With page table isolation each process has two directories, the user's one page above the kernel's, and so none of
    the kernel's has an odd page number; without it any page may be one.
    """
    directory = cr3 & FRAME
    found = table.get(directory)
    if found is None and directory & PAGE and not any(place & PAGE for place in table):
        return table.get(directory - PAGE)
    return found


def _walk(read: Reader, first: int, offsets: Offsets, direct: int) -> dict[int, Process]:
    """Follow the list of tasks from init_task until it comes back, leads nowhere, or is too long.

    The list has one task for each thread group, its leader.
    """
    table: dict[int, Process] = {}
    start = min(offsets.tasks, offsets.pid, offsets.comm, offsets.mm)
    size = max(offsets.tasks, offsets.pid, offsets.comm, offsets.mm) + COMM_SIZE - start
    seen: set[int] = set()
    task = first
    while task not in seen and len(seen) < MAX_TASKS:
        seen.add(task)
        data = read(task + start, size)
        if data is None:
            break
        mm = _word(data, offsets.mm - start)
        pgd = read(mm + offsets.pgd, 8) if mm >= HIGHER_HALF else None  # kernel threads have none
        if pgd is not None:
            directory = int.from_bytes(pgd, "little") - direct & FRAME
            pid = int.from_bytes(data[offsets.pid - start : offsets.pid - start + 4], "little")
            comm = _text(data[offsets.comm - start : offsets.comm - start + COMM_SIZE])
            table.setdefault(directory, Process(pid, comm))  # after vfork two have it: the older one
        link = _word(data, offsets.tasks - start)
        if link < HIGHER_HALF:
            break
        task = link - offsets.tasks
    return table


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _text(data: bytes) -> str:
    """Return a name of printable characters: it ends in reports and on terminals."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in data.split(b"\0", 1)[0])

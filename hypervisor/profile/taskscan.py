"""Where the members of a task lie, in a kernel that has no type information: found by what they must hold.

The kernel's first three tasks are always the same: init_task (swapper, number 0), the init process (1, which has an
address space) and kthreadd (2, which has none). What each member holds in these three tells it from all others; what
cannot be told is not guessed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Reader = Callable[[int, int], bytes | None]

__all__ = ["Offsets", "scan"]

TASK_SIZE: Final = 6144
"""Bytes that are looked at for a task's name; all else that is wanted lies before it, in every kernel so far."""
MM_SIZE: Final = 512
SWAPPER: Final = b"swapper"
KTHREADD: Final = b"kthreadd\0"
HIGHER_HALF: Final = 1 << 63
PAGE: Final = 4096
LAST_ENTRY: Final = 8 * 511
"""Of a page-global directory: it maps the kernel's image, and is the same in all of them."""


class Offsets(NamedTuple):
    """Of the members of task_struct, and of pgd in mm_struct, in bytes."""

    tasks: int
    pid: int
    comm: int
    mm: int
    pgd: int


class _Task(NamedTuple):
    """A task's memory, whole and as numbers."""

    address: int
    data: bytes
    words: Sequence[int]


def scan(read_kernel: Reader, first: int, directory: int) -> Offsets | None:
    """Find the offsets of a running kernel.

    Args:
        read_kernel: copies (address, size) out of its virtual memory.
        first: the address of init_task.
        directory: the address of init_top_pgt.

    Returns:
        The offsets, None unless each of them is the only one that fits.
    """
    swapper = _task(read_kernel, first)
    comm = swapper.data.find(SWAPPER) if swapper is not None else -1
    if swapper is None or comm < 0:
        return None
    for tasks in range(0, comm - 8, 8):
        init = _task(read_kernel, _next(swapper, tasks))
        kthreadd = None if init is None else _task(read_kernel, _next(init, tasks))
        if init is None or kthreadd is None or not kthreadd.data.startswith(KTHREADD, comm):
            continue
        # prev leads back where next came from
        if init.words[tasks // 8 + 1] != first + tasks or kthreadd.words[tasks // 8 + 1] != init.address + tasks:
            continue
        pid, mm = _pid(comm, swapper, init, kthreadd), _mm(comm, swapper, init, kthreadd)
        pgd = None if mm is None else _pgd(read_kernel, init.words[mm // 8], directory)
        if pid is not None and mm is not None and pgd is not None:
            return Offsets(tasks, pid, comm, mm, pgd)
    return None


def _task(read: Reader, address: int) -> _Task | None:
    data = read(address, TASK_SIZE) if address >= HIGHER_HALF else None
    return None if data is None else _Task(address, data, struct.unpack(f"<{TASK_SIZE // 8}Q", data))


def _next(task: _Task, tasks: int) -> int:
    """Return the task that a list at this offset leads to; a list that leads to itself leads nowhere."""
    link = task.words[tasks // 8]
    return link - tasks if link != task.address + tasks else 0


def _pid(end: int, *tasks: _Task) -> int | None:
    """Return the offset of the first of two numbers, pid and tgid, that are 0, 1 and 2."""
    wanted = [struct.pack("<II", number, number) for number in range(len(tasks))]
    found = [
        at
        for at in range(0, end - 8, 4)
        if all(task.data.startswith(pair, at) for task, pair in zip(tasks, wanted, strict=True))
    ]
    return found[0] if len(found) == 1 else None


def _mm(end: int, swapper: _Task, init: _Task, kthreadd: _Task) -> int | None:
    """Return the offset of mm, which active_mm follows: the same in a process, none in a kernel thread."""
    found = [
        8 * at
        for at in range(end // 8 - 1)
        if init.words[at] == init.words[at + 1]
        and init.words[at] >= HIGHER_HALF
        and not swapper.words[at]
        and not kthreadd.words[at]
    ]
    return found[0] if len(found) == 1 else None


def _pgd(read: Reader, mm: int, directory: int) -> int | None:
    """Return the offset of the pointer to a page that maps the kernel as its own directory does."""
    data, own = read(mm, MM_SIZE), read(directory + LAST_ENTRY, 8)
    if data is None or own is None or own == bytes(8):
        return None
    found = [
        8 * at
        for at, word in enumerate(struct.unpack(f"<{MM_SIZE // 8}Q", data))
        if word >= HIGHER_HALF and not word % PAGE and read(word + LAST_ENTRY, 8) == own
    ]
    return found[0] if len(found) == 1 else None

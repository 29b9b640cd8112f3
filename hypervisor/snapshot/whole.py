"""The RAM of a snapshot that cannot be mapped as it lies on the disk: put together once, in anonymous memory."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from hypervisor.snapshot.manifest import CHUNK
from hypervisor.snapshot.memoryfile import BASE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.snapshot.memoryfile import MemoryFile

__all__ = ["check_parents", "put_together"]

SEALS: Final = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, _SHRINK, _GROW and _WRITE (<linux/fcntl.h>): nobody changes it any more."""


def check_parents(chain: Sequence[MemoryFile]) -> None:
    """See that every chunk that is a parent's is there what the child says; raises DamagedSnapshotError."""
    for child, parent in pairwise(chain):
        for chunk, record in enumerate(child.index):
            if record.kind == BASE and parent.index.hash_of(chunk) != record.hash:
                raise child.damaged(chunk, f"is not what the parent {parent.path} has")


def put_together(chain: Sequence[MemoryFile], *, verify: bool) -> int:
    """Return a sealed memfd with the RAM of the first of the chain."""
    check_parents(chain)
    size = chain[0].entry.size
    with ExitStack() as stack:
        fd = os.memfd_create("snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size)
        wanted = bytearray(record.kind == BASE for record in chain[0].index)
        with mmap.mmap(fd, size) as target, memoryview(target) as view:
            _fill_from(chain[0], view, None, verify=verify)
            for one in chain[1:]:
                _fill_from(one, view, wanted, verify=verify)
                for chunk, record in enumerate(one.index):
                    wanted[chunk] &= record.kind == BASE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        stack.pop_all()
        return fd
    raise AssertionError  # for the type checker


def _fill_from(memory: MemoryFile, view: memoryview, wanted: bytearray | None, *, verify: bool) -> None:
    """Copy the chunks that `memory` has, and of which those after it said that they are the parent's."""
    for first, end in memory.runs():
        chunk = first
        while chunk < end:
            last = chunk
            if wanted is None:
                last = end
            else:
                while last < end and wanted[last]:
                    last += 1
            if last > chunk:
                with view[chunk * CHUNK : min(last * CHUNK, len(view))] as part:
                    memory.read_run(chunk, last, part, verify=verify)
            chunk = max(last, chunk + 1)

"""RAM of a snapshot, page by page, out of whatever chunks it is in: for a guest that runs before all is unpacked.

`python -m hypervisor.snapshot.unpacking FD SNAPSHOT ID VERIFY` sends it over a connected socket to a
`hypervisor.kvm.pager.Pager`. That is a process of its own, as whoever waits for a page may hold the GIL.
"""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING

from hypervisor.errors import SnapshotError, VmmError
from hypervisor.pageserver import PageServer
from hypervisor.snapshot.manifest import CHUNK
from hypervisor.snapshot.memoryfile import BASE, DATA, PAGE, ZERO
from hypervisor.snapshot.saved import Snapshot
from hypervisor.snapshot.whole import check_parents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypervisor.snapshot.memoryfile import MemoryFile

__all__ = ["PackedPages", "runs_of"]

KEPT = 64
"""Chunks that stay unpacked: pages are asked for one by one."""


def runs_of(memory: MemoryFile) -> list[tuple[int, int]]:
    """Return the pages that are not just zeroes: first page and length of each run."""
    pages = memory.entry.size // PAGE
    runs: list[tuple[int, int]] = []
    for chunk, record in enumerate(memory.index):
        if record.kind == ZERO:
            continue
        first = chunk * (CHUNK // PAGE)
        count = min(CHUNK // PAGE, pages - first)
        if runs and sum(runs[-1]) == first:
            first, count = runs[-1][0], runs[-1][1] + count
            runs.pop()
        runs.append((first, count))
    return runs


class PackedPages:
    """Unpacks chunks as their pages are wanted.

    Attributes:
        size: of RAM in bytes.
    """

    def __init__(self, chain: Sequence[MemoryFile], *, verify: bool) -> None:
        """Take the memory of a snapshot, its parent's and so on; raises DamagedSnapshotError if they do not fit."""
        check_parents(chain)
        self.size = chain[0].entry.size
        self._chain = chain
        self._verify = verify
        self._unpacked: dict[int, memoryview] = {}

    def pages(self, first: int, count: int) -> memoryview:
        """Return the bytes of `count` pages from page `first` on.

        Raises:
            DamagedSnapshotError: they are not what was saved.
        """
        at, end = first * PAGE, (first + count) * PAGE
        parts = [self._chunk(chunk) for chunk in range(at // CHUNK, -(-end // CHUNK))]
        whole = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        start = at // CHUNK * CHUNK
        return whole[at - start : end - start]

    def _chunk(self, chunk: int) -> memoryview:
        if chunk not in self._unpacked:
            memory = next(one for one in self._chain if one.index[chunk].kind != BASE)
            data = memoryview(bytearray(memory.index.length(chunk)))
            if memory.index[chunk].kind == DATA:
                memory.read_run(chunk, chunk + 1, data, verify=self._verify)
            if len(self._unpacked) == KEPT:
                del self._unpacked[next(iter(self._unpacked))]
            self._unpacked[chunk] = data
        return self._unpacked[chunk]


def main(words: Sequence[str]) -> int:
    """Send the RAM of a snapshot to who asks for it; return the exit status."""
    fd, path, wanted, verify = words
    connection = socket.socket(fileno=int(fd))
    try:
        with Snapshot.open(path) as snapshot:
            if snapshot.id != wanted:
                raise SnapshotError(f"{path} is another snapshot now")
            pages = PackedPages([one.memory for one in snapshot.chain()], verify=verify == "verify")
            PageServer(pages, connection, runs_of(snapshot.memory), None).serve()
    except ConnectionError:
        pass  # the machine has ended
    except VmmError as error:
        sys.stderr.write(f"hv: {error}\n")  # before the connection ends: the machine may end this process then
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

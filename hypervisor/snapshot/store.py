"""A snapshot on disk: a directory with a manifest, the memory with its index, and layers of disks.

with Writer("before", compress=True) as writer:
    entry = writer.write_memory(view, memory.ranges)     # the guest stands still until here
    copy_overlay_to(writer.add_file("disk-0"))
    writer.commit(state, config=config.to_plain(), host=facts)

with Snapshot.open("before") as snapshot:
    fd, offset, size = snapshot.map_memory()
"""

from __future__ import annotations

import os
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from hypervisor.errors import SaveError, SnapshotError
from hypervisor.snapshot import manifest, plain
from hypervisor.snapshot.directory import Staging, fsync
from hypervisor.snapshot.manifest import MANIFEST, RESERVED, LayerEntry, Manifest, MemoryEntry, Parent, Range
from hypervisor.snapshot.memoryfile import INDEX, MEMORY, write_all, write_memory
from hypervisor.snapshot.saved import OLD, Layer, Snapshot, hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from hypervisor.memory import RamRange
    from hypervisor.snapshot.memoryfile import Progress

__all__ = ["Layer", "Snapshot", "Writer"]

NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
MODE: Final = 0o600
PAGE: Final = 4096
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class Writer:
    """A snapshot that is being saved. Nothing is seen of it, and nothing is lost, before `commit`.

    A context manager: left without `commit` it removes what there is.

    Attributes:
        path: where it is to be.
        id: 128 random bits, in hexadecimal.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        base: Snapshot | None = None,
        compress: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Begin.

        Args:
            path: the snapshot's directory; another snapshot there is replaced by `commit`.
            base: a snapshot that stays where it is: only what differs from it is saved. It must be open until `commit`.
            compress: memory by zstd.
            progress: told (bytes done, bytes in all) of memory now and then.

        Raises:
            SnapshotError: there is something else, or no directory for it; or it would replace what it is based on.
            SaveError: the host refuses.
        """
        self.path = os.fspath(path)
        self.id = secrets.token_hex(16)
        self._base = base
        self._compress = compress
        self._progress = progress
        self._memory: MemoryEntry | None = None
        self._layers: list[str] = []
        if base is not None:
            for one in base.chain():
                if os.path.realpath(one.path) == os.path.realpath(self.path):
                    raise SnapshotError(
                        f"cannot save {self.path} as a change to itself", hint="name another place, or save all of it"
                    )
        self._staging = Staging(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what has not been committed."""
        self._staging.close()

    @property
    def folder(self) -> str:
        """Where the files of `add_file` are, until `commit`."""
        return self._staging.path

    def refused(self, error: OSError) -> SaveError:
        """Return the error for what the host did not take."""
        return self._staging.refused(error)

    def _create(self, name: str) -> int:
        return os.open(os.path.join(self._staging.path, name), NEW, MODE)

    def write_memory(
        self, view: memoryview, ranges: Sequence[RamRange | Range], changed: bytes | None = None
    ) -> MemoryEntry:
        """Write RAM. It is not on the disk for sure before `commit`, but the guest may go on afterwards.

        Args:
            view: all RAM, as it lies in `GuestMemory`; nobody writes to it meanwhile.
            ranges: `GuestMemory.ranges`.
            changed: with a base: one bit a page of 4 KiB, the lowest first, in the order of `view`; set if the page may
                have changed since, by the guest or by devices. None compares the hashes of all of it.

        Raises:
            SaveError: the host does not take it.
            SnapshotError: RAM is not that of the base.
            ValueError: `changed` has another number of bits than RAM has pages, or there is no base.
        """
        rows = tuple(Range(one.gpa, one.size, one.offset) for one in ranges)
        size = len(view)
        base = None
        if changed is not None and (self._base is None or len(changed) != -(-size // PAGE // 8)):
            raise ValueError("a bitmap of changed pages needs a base, and one bit for each page")
        if self._base is not None:
            if self._base.memory.entry.ranges != rows:
                raise SnapshotError(
                    f"cannot save {self.path} as a change to {self._base.path}: it has other RAM",
                    hint="save all of it, without a base",
                )
            base = self._base.memory.index
        try:
            fd = self._create(MEMORY)
            with open(fd, "rb"):
                entry, index = write_memory(
                    fd, view, rows, base=base, changed=changed, compress=self._compress, progress=self._progress
                )
            fd = self._create(INDEX)
            with open(fd, "rb"):
                write_all(fd, index, 0)
        except OSError as error:
            raise self._staging.refused(error) from error
        self._memory = entry
        return entry

    def add_file(self, name: str) -> str:
        """Return the path of a file to be written, such as a disk's layer; it is complete when `commit` is called.

        Args:
            name: letters, digits, ".", "_" and "-", the first a letter or digit; unique in the snapshot.
        """
        if not NAME.fullmatch(name) or name in RESERVED or name in self._layers:
            raise ValueError(f"{name!r} is no name for a layer, or taken")
        self._layers.append(name)
        return os.path.join(self._staging.path, name)

    def commit(
        self,
        state: Mapping[str, Any],
        *,
        config: Mapping[str, Any] | None = None,
        host: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the manifest, wait for the disk, and put the snapshot in its place; return its id.

        Args:
            state: plain values: dicts keyed by str, lists, int, str, bool, bytes, None.
            config: what `MachineConfig.to_plain` returned.
            host: facts of the host, as `hypervisor.snapshot.fit.facts` returns them.

        Raises:
            SaveError: the host does not take it; what was there before is as it was.
            SnapshotError: something else is there by now.
            TypeError, ValueError: `state` has something that a snapshot does not carry.
        """
        if self._memory is None:
            raise ValueError("there is no memory yet")
        packed = {
            "host": plain.pack(dict(host or {}), "host"),
            "machine": plain.pack(dict(config or {}), "machine"),
            "state": plain.pack(dict(state)),
        }
        try:
            layers = tuple(self._layer(name) for name in self._layers)
            self._write_manifest(self._memory, layers, packed)
            for name in (MEMORY, INDEX, MANIFEST):
                self._sync(name)
            self._staging.commit()
        except OSError as error:
            raise self._staging.refused(error) from error
        return self.id

    def _write_manifest(self, memory: MemoryEntry, layers: tuple[LayerEntry, ...], packed: dict[str, Any]) -> None:
        from hypervisor import __version__

        now = time.time_ns()
        parent = None
        if self._base is not None:
            folder = os.path.dirname(os.path.realpath(self.path))
            path = os.path.relpath(os.path.realpath(self._base.path), folder)
            parent = Parent(self._base.id, self._base.digest, plain.pack(path))
        text, _ = manifest.encode(
            Manifest(
                format=manifest.FORMAT,
                version=manifest.VERSION,
                hv=__version__,
                id=self.id,
                saved=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now // 10**9)),
                saved_ns=now,
                page_size=os.sysconf("SC_PAGE_SIZE"),
                parent=parent,
                memory=memory,
                layers=layers,
                **packed,
            )
        )
        if len(text) > manifest.MOST_BYTES:
            raise SnapshotError(f"cannot save {self.path}: its state has {len(text)} bytes")
        with open(self._create(MANIFEST), "wb") as file:
            file.write(text)

    def _layer(self, name: str) -> LayerEntry:
        fd = os.open(os.path.join(self._staging.path, name), OLD)
        with open(fd, "rb"):
            fsync(fd)
            return LayerEntry(name, *hash_file(fd))

    def _sync(self, name: str) -> None:
        fd = os.open(os.path.join(self._staging.path, name), OLD)
        try:
            fsync(fd)
        finally:
            os.close(fd)

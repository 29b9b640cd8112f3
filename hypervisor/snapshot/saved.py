"""A saved snapshot, open for reading."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import xxhash

from hypervisor.errors import ConfigError, DamagedSnapshotError, SnapshotError
from hypervisor.snapshot import manifest
from hypervisor.snapshot.manifest import CHUNK, MANIFEST, Manifest
from hypervisor.snapshot.memoryfile import INDEX, MEMORY, RECORD, Index, MemoryFile
from hypervisor.snapshot.whole import check_parents, put_together

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from hypervisor.config import MachineConfig
    from hypervisor.snapshot.memoryfile import Progress

__all__ = ["OLD", "Layer", "Snapshot", "hash_file"]

OLD: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
BLOCK: Final = 1 << 22
MOST_PARENTS: Final = 256


class Layer(NamedTuple):
    """A file beside the memory, such as a disk's overlay."""

    name: str
    path: str
    size: int
    hash: str


class Snapshot:
    """A snapshot on disk that is open for reading. A context manager; made by `open`.

    Attributes:
        path: its directory.
        manifest: all that it says of itself, as it is stored.
        digest: the manifest's hash.
        memory: its memory file; chunks may be the parents'.
        is_fit: whether somebody has found that it runs on this host.
    """

    def __init__(self, path: str, read: tuple[Manifest, str], memory: MemoryFile, stack: ExitStack) -> None:
        """Take over what `open` has read."""
        self.path = path
        self.manifest, self.digest = read
        self.memory = memory
        self._stack = stack
        self._parent: Snapshot | None = None
        self._state: dict[str, Any] | None = None
        self._config: MachineConfig | None = None
        self._whole = -1
        self.is_fit = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Open a snapshot: its manifest and index are verified, memory and layers are there and of the right size.

        Raises:
            SnapshotError: it is none, or of another version.
            DamagedSnapshotError: it is not what was saved.
        """
        shown = os.fspath(path)
        with ExitStack() as stack:
            try:
                folder = os.open(shown, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise SnapshotError(f"cannot open the snapshot {shown}", hint=_advice(shown)) from error
            stack.callback(os.close, folder)
            try:
                read = manifest.read(folder, shown)
            except FileNotFoundError:
                raise SnapshotError(f"{shown} is no snapshot: it has no {MANIFEST}") from None
            except OSError as error:
                raise SnapshotError(f"cannot open the snapshot {shown}") from error
            for layer in read[0].layers:
                fd = _open_part(stack, folder, shown, layer.name)
                _check_size(os.path.join(shown, layer.name), os.fstat(fd).st_size, layer.size)
            memory = _open_memory(stack, folder, shown, read[0])
            return cls(shown, read, memory, stack.pop_all())
        raise AssertionError  # for the type checker: a stack may swallow what is raised in it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what `map_memory` gave stays."""
        self._stack.close()

    @property
    def id(self) -> str:
        """128 random bits, in hexadecimal: another save, another id."""
        return self.manifest.id

    @property
    def state(self) -> dict[str, Any]:
        """What `Writer.commit` was given."""
        if self._state is None:
            self._state = manifest.values(self.manifest.state, self.path, "state")
        return self._state

    @property
    def machine(self) -> dict[str, Any]:
        """The machine's description, as plain values; {} when none was given."""
        machine: dict[str, Any] = manifest.values(self.manifest.machine, self.path, "machine")
        return machine

    @property
    def host(self) -> dict[str, Any]:
        """Facts of the host that it was saved on."""
        host: dict[str, Any] = manifest.values(self.manifest.host, self.path, "host")
        return host

    @property
    def config(self) -> MachineConfig:
        """The machine's description; raises SnapshotError where this hv cannot make it."""
        if self._config is not None:
            return self._config
        from hypervisor.config import MachineConfig

        try:
            machine = self.machine
            self._config = MachineConfig(**machine | {"modules": tuple(machine.get("modules", ()))})
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise SnapshotError(f"{self.path} has a machine that this hv does not know: {error}") from None
        return self._config

    @property
    def parent(self) -> Snapshot | None:
        """The snapshot that this one is a change to, opened; None: it stands alone.

        Raises:
            SnapshotError: it is not there, or not the one that it was.
        """
        entry = self.manifest.parent
        if entry is None or self._parent is not None:
            return self._parent
        place = os.path.join(os.path.dirname(os.path.realpath(self.path)), entry.place())
        path = os.path.normpath(place)
        hint = f"bring back the snapshot with the id {entry.id}"
        try:
            parent = Snapshot.open(path)
        except DamagedSnapshotError:
            raise
        except SnapshotError as error:
            raise SnapshotError(f"{self.path} needs its parent", hint=hint) from error
        self._stack.callback(parent.close)
        if (parent.id, parent.digest) != (entry.id, entry.digest):
            what = "altered" if parent.id == entry.id else "another snapshot, saved later"
            raise SnapshotError(f"{self.path} needs its parent, and {path} is {what}", hint=hint)
        if parent.manifest.memory.ranges != self.manifest.memory.ranges:
            raise DamagedSnapshotError(self.path, f"has other RAM than its parent {path}")
        self._parent = parent
        return parent

    def chain(self) -> list[Snapshot]:
        """Return this one, its parent, the parent's parent and so on; raises as `parent` does."""
        chain = [self]
        while (parent := chain[-1].parent) is not None:
            if parent.id in {one.id for one in chain} or len(chain) > MOST_PARENTS:
                raise DamagedSnapshotError(self.path, "has a chain of parents that does not end")
            chain.append(parent)
        return chain

    def layers(self) -> list[Layer]:
        """Return the files beside the memory."""
        return [
            Layer(entry.name, os.path.join(self.path, entry.name), entry.size, entry.hash)
            for entry in self.manifest.layers
        ]

    def verify(self, *, memory: bool = True, progress: Progress | None = None) -> None:
        """Compare everything with its hash, parents as well.

        Args:
            memory: the memory files, too; without it only indexes and layers.
            progress: told (chunks done, chunks in all) of each memory file.

        Raises:
            DamagedSnapshotError: something is not what was saved: the first that was found.
            SnapshotError: a parent is missing.
        """
        chain = self.chain()
        for one in chain:
            one.verify_layers()
        check_parents([one.memory for one in chain])
        if memory:
            for one in chain:
                one.memory.verify(progress)

    def verify_layers(self) -> None:
        """Compare the layers with their hashes; raises DamagedSnapshotError."""
        for layer in self.layers():
            try:
                fd = os.open(layer.path, OLD)
                with open(fd, "rb"):
                    size, digest = hash_file(fd)
            except OSError as error:
                raise DamagedSnapshotError(layer.path, "cannot be read") from error
            _check_size(layer.path, size, layer.size)
            if digest != layer.hash:
                raise DamagedSnapshotError(layer.path, "is altered: its hash does not fit")

    @property
    def is_packed(self) -> bool:
        """Whether its memory file cannot be mapped as it is: it is compressed, or has chunks of its parent's."""
        entry = self.manifest.memory
        return entry.codec != "raw" or bool(entry.base)

    def map_memory(self, *, verify: bool = True) -> tuple[int, int, int]:
        """Return (fd, offset, size) of a file that holds RAM, to be mapped privately; the caller closes the fd.

        A raw memory file without a parent is used as it is, and shares the page cache with all others that do: nobody
        must write to it meanwhile. Else RAM is put together once, in anonymous memory (a sealed memfd): it needs no
        room on a disk and no right to write there, leaves nothing behind, and the machines of one process share it.

        Args:
            verify: compare with the hashes; else only what has to be unpacked is.

        Raises:
            DamagedSnapshotError, SnapshotError: as `verify`.
            OSError: the host has no memory for it.
        """
        entry = self.manifest.memory
        if not self.is_packed:
            if verify:
                self.memory.verify()
            return os.dup(self.memory.fd), 0, entry.size
        if self._whole < 0:
            self._whole = put_together([one.memory for one in self.chain()], verify=verify)
            self._stack.callback(os.close, self._whole)
        return os.dup(self._whole), 0, entry.size


def hash_file(fd: int) -> tuple[int, str]:
    """Return the bytes of a file and their hash."""
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(BLOCK))
    size = 0
    while done := os.preadv(fd, [buffer], size):
        state.update(buffer[:done])
        size += done
    return size, state.hexdigest()


def _advice(path: str) -> str | None:
    """Return what to do about a snapshot that is not there."""
    from hypervisor.snapshot.directory import leftovers

    try:
        aside = next((one for one in leftovers(path) if one.endswith(".old")), None)
    except OSError:
        return None
    return None if aside is None else f"a save was killed and left the one before in {aside}: rename it"


def _open_part(stack: ExitStack, folder: int, path: str, name: str) -> int:
    """Open a file of the snapshot; raises DamagedSnapshotError unless it is one."""
    file = os.path.join(path, name)
    try:
        fd = os.open(name, OLD, dir_fd=folder)
    except FileNotFoundError:
        raise DamagedSnapshotError(file, "is missing") from None
    except OSError as error:
        raise SnapshotError(f"cannot read {file}") from error
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise DamagedSnapshotError(file, "is no file")
    return fd


def _check_size(file: str, size: int, wanted: int) -> None:
    if size != wanted:
        what = "is cut short" if size < wanted else "has grown"
        raise DamagedSnapshotError(file, f"{what}: {size} bytes of {wanted}")


def _open_memory(stack: ExitStack, folder: int, path: str, read: Manifest) -> MemoryFile:
    """Open memory and index, and verify the index."""
    entry, file = read.memory, os.path.join(path, INDEX)
    fd = _open_part(stack, folder, path, INDEX)
    wanted = -(-entry.size // CHUNK) * RECORD.size
    _check_size(file, os.fstat(fd).st_size, wanted)
    data = os.pread(fd, wanted, 0)
    if xxhash.xxh3_128_hexdigest(data) != entry.index:
        raise DamagedSnapshotError(file, "is altered: its hash does not fit")
    index = Index(data, entry.size)
    try:
        index.check(entry)
    except ValueError as error:
        raise DamagedSnapshotError(file, str(error)) from error
    return MemoryFile(_open_part(stack, folder, path, MEMORY), os.path.join(path, MEMORY), entry, index)

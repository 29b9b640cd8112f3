"""Disks in a migration: who has them when, and what of their content goes along.

Shared: both ends reach the same image. The source has it, and its lock, until it lets go of the machine; the target
opens it after that word (GO) and before its own (MINE). So the target has no disk that the source may still need, and
whatever the target dies of, the source opens the disk again: there is one owner at every moment.

Copied: the target makes a file of its own, which is sent while the guest goes on writing to the source's.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from devices.backends.errors import BackendError
from devices.backends.identity import identify
from devices.backends.image import open_image
from devices.backends.memory_overlay import MemoryOverlay
from devices.backends.pending import PendingImage
from devices.backends.raw import RawImage
from devices.backends.tracked import MOST, TrackedImage, runs_of
from hypervisor.errors import ConfigError, HostError, SnapshotError
from hypervisor.migration.wire import MigrationError
from hypervisor.options import DiskConfig
from hypervisor.outcome import Outcome, Stop

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from devices.backends.faults import FaultyImage
    from devices.backends.image import Image
    from hypervisor.config import MachineConfig
    from hypervisor.machine import Machine
    from hypervisor.migration.wire import Frame, Wire

__all__ = ["SourceDisks", "TargetDisks"]

SECTOR: Final = 512
MOST_BYTES: Final = 1 << 50
"""Of a disk: what a source may have this end make room for."""
AGAIN_SECONDS: Final = 5.0
"""How long a target that has just died may still hold a lock."""
ZEROES: Final = bytes(MOST)
Part = tuple[str, int, memoryview]
"""A disk's name, an offset and what is there."""


def _open(disk: DiskConfig) -> Image:
    return open_image(disk.path, form=disk.format, readonly=disk.readonly, overlay=disk.overlay, cache=disk.cache)


def _open_as(disk: DiskConfig, size: int) -> Image:
    """Open a disk that has to be of `size` bytes; raises BackendError."""
    image = _open(disk)
    if image.size != size:
        image.close()
        raise BackendError(f"disk image {disk.path} is a disk of {image.size} bytes, not of {size}")
    return image


def _file_of(disk: DiskConfig) -> str:
    """Return the file that is written to, or of a disk that is not written to the one that is read."""
    return disk.path if disk.overlay in {None, "memory"} else str(disk.overlay)


def _is_only_read(disk: DiskConfig) -> bool:
    """Whether both ends may have its file open at once."""
    return disk.readonly or disk.overlay == "memory"


def _bottom(image: Any) -> Any:
    """Return the image below those that lie over others for a while."""
    while hasattr(image, "below"):
        image = image.below
    return image


class SourceDisks:
    """The disks of a machine that moves away."""

    def __init__(self, machine: Machine, *, copied: bool) -> None:
        """Look at them; raises ConfigError when one cannot be moved in this way."""
        self._machine = machine
        self._copied = copied
        self._images = machine.images
        self._disks = {
            f"blk{index}": disk._replace(
                path=os.path.abspath(disk.path),
                overlay=disk.overlay if disk.overlay in {None, "memory"} else os.path.abspath(str(disk.overlay)),
            )
            for index, disk in enumerate(machine.config.disks)
        }
        self._tracked: dict[str, TrackedImage] = {}
        self._first: dict[str, list[tuple[int, int]]] = {}
        for name in self._disks:
            self._check(name)

    def _check(self, name: str) -> None:
        if not self._images[name].is_transparent:
            raise ConfigError(f"{name} has a fault armed, or holds writes back", hint="`clear` it first")
        bottom = _bottom(self._images[name])
        bottom = bottom.base if isinstance(bottom, MemoryOverlay) else bottom
        if not self._copied and getattr(bottom, "path", None) != _file_of(self._disks[name]):
            raise ConfigError(
                f"{name} is not the file that the machine's description names, so the target cannot open it",
                hint="have it copied: `hv migrate send --copy-disks`, migrate(..., copy_disks=True)",
            )

    def describe(self) -> dict[str, Any]:
        """Return what the target needs to know of them."""
        keys = ("size", "readonly", "block_size", "cluster_size")
        images = {name: {key: getattr(image, key) for key in keys} for name, image in self._images.items()}
        return {"copied": self._copied, "images": images, "paths": [disk._asdict() for disk in self._disks.values()]}

    # --- content ------------------------------------------------------------------------------------------------------

    def track(self) -> None:
        """Begin to note what changes of the disks whose content goes along: copied ones, and overlays in memory."""
        names = [name for name, disk in self._disks.items() if self._copied or disk.overlay == "memory"]
        if names:
            self._machine.stand_still(lambda: self._track(names))

    def _track(self, names: Sequence[str]) -> None:
        for name in names:
            image, bottom = self._images[name], _bottom(self._images[name])
            if self._copied:
                self._first[name] = list(runs_of([0], image.size, image.size))
            else:
                step = bottom.cluster_size
                self._first[name] = list(runs_of([offset for offset, _ in bottom.changes()], step, image.size))
            image.below = self._tracked[name] = TrackedImage(image.below)

    def untrack(self) -> None:
        """Note no more: the guest goes on here, with its short cuts."""
        if self._tracked:
            try:
                self._machine.stand_still(self._untrack)
            except SnapshotError:
                pass  # the guest has ended

    def _untrack(self) -> None:
        for name, tracked in self._tracked.items():
            if self._images[name].below is tracked:
                self._images[name].below = tracked.below
        self._tracked.clear()

    @property
    def changed(self) -> int:
        """Bytes that have changed since they were sent."""
        return sum(tracked.changed for tracked in self._tracked.values())

    def contents(self) -> Iterator[Part]:
        """Yield everything for the first time; of a copied disk what is not zero, since the target's file is new."""
        for name, runs in self._first.items():
            for offset, size in (part for run in runs for part in _cut(*run)):
                data = self._read(name, offset, size)
                if not self._copied or data != ZEROES[: len(data)]:
                    yield name, offset, data

    def changes(self) -> Iterator[Part]:
        """Yield what has changed since it was sent."""
        for name, tracked in self._tracked.items():
            for offset, size in tracked.collect():
                yield name, offset, self._read(name, offset, size)

    def _read(self, name: str, offset: int, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        try:
            self._tracked[name].readv(offset, [data])
        except OSError as error:
            raise MigrationError(f"{name} cannot be read: {error.strerror}; the guest goes on here") from error
        return data

    # --- who has them -------------------------------------------------------------------------------------------------

    def _shared(self) -> list[str]:
        """Return the disks that only one end may have open."""
        return [] if self._copied else [name for name, disk in self._disks.items() if not _is_only_read(disk)]

    def flush(self) -> None:
        """Make the shared ones durable, so that `release` need not wait long; raises MigrationError."""
        for name in self._shared():
            try:
                self._images[name].flush()
            except OSError as error:
                raise MigrationError(f"{name} cannot be flushed: {error.strerror}; the guest goes on here") from error

    def release(self) -> dict[str, Any]:
        """Flush and close the shared ones, nothing being served, and return what the target knows the files by."""
        for name in self._shared():
            self._check(name)
        self.flush()
        for name in self._shared():
            self._images[name].below.close()
        return {} if self._copied else {name: _samples(_file_of(disk)) for name, disk in self._disks.items()}

    def take_back(self, *, is_certain: bool) -> None:
        """Open them again; raises MigrationError, and the machine has ended then.

        Args:
            is_certain: whether it is that the target did not take the guest.
        """
        until = time.monotonic() + AGAIN_SECONDS
        for name in self._shared():
            while True:
                try:
                    self._images[name].below.close()  # where `release` did not come to it
                    self._images[name].below = _open(self._disks[name])
                    break
                except BackendError as error:
                    if time.monotonic() >= until:
                        why = "the target did not take the guest" if is_certain else "the target's word is missing"
                        message = f"{why}, but {name} cannot be opened again: {error}"
                        self._machine.end(Outcome(Stop.KILLED, status=HostError.status, message=message))
                        hint = "the guest has ended here"
                        raise MigrationError(message, hint=hint, is_certain=is_certain) from error
                time.sleep(0.02)


def _cut(offset: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(offset, offset + size, MOST):
        yield at, min(MOST, offset + size - at)


def _samples(path: str) -> list[Any]:
    """Return what two ends compare to see that they reach the same file."""
    found = identify(path)
    return [found["size"], found["samples"]]


# --- the other end ----------------------------------------------------------------------------------------------------


class TargetDisks:
    """The disks of a machine that comes.

    Attributes:
        configs: their descriptions here.
    """

    def __init__(self, form: Mapping[str, Any], config: MachineConfig, files: Sequence[str], *, changed: bool) -> None:
        """Make room for copied ones, and see that shared ones are there.

        Args:
            form: what `SourceDisks.describe` returned.
            config: of the machine.
            files: where copied disks go, in order; those that are not named go to the working directory.
            changed: the user has described the disks: these descriptions count, not the source's.

        Raises:
            KeyError, TypeError, ValueError: it describes no disks.
            ConfigError: a file cannot be made, or is not there.
        """
        self._copied = form["copied"] is True
        images = [_facts(form["images"][f"blk{index}"]) for index in range(len(config.disks))]
        disks = list(config.disks) if changed else [DiskConfig(**one) for one in form["paths"]]
        if len(disks) != len(images):
            raise ValueError("there are not as many disks as descriptions")
        if files and (not self._copied or len(files) > len(disks)):
            many = f"copies {len(disks)}" if self._copied else "copies no disk"
            raise ConfigError(f"{len(files)} files for disks are named, and the source {many}")
        self._made: list[str] = []
        self._filling: dict[str, Image] = {}
        self._images: dict[str, Image] = {}
        try:
            self.configs = [
                self._add(f"blk{index}", disk, images[index], files[index] if index < len(files) else None)
                for index, disk in enumerate(disks)
            ]
        except BackendError as error:
            self.close()
            raise ConfigError(str(error), hint=error.hint or None) from error.__cause__
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, disk: DiskConfig, facts: dict[str, Any], file: str | None) -> DiskConfig:
        if self._copied:
            path = os.path.abspath(file or f"disk-{name}.raw")
            self._make(path, facts["size"])
            self._filling[name] = RawImage(path)
            disk = disk._replace(path=path, format="raw", overlay=None)
        elif not os.access(_file_of(disk), os.R_OK if _is_only_read(disk) else os.R_OK | os.W_OK):
            raise BackendError(
                f"{name}'s file {_file_of(disk)} is not here, or may not be opened",
                hint="a disk that both ends do not reach is sent along with `hv migrate send --copy-disks`",
            )
        if self._copied or not _is_only_read(disk):
            self._images[name] = PendingImage(**facts)
        else:
            self._images[name] = _open_as(disk, facts["size"])
            if not disk.readonly:
                self._filling[name] = self._images[name]
        return disk

    def _make(self, path: str, size: int) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            self._made.append(path)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(
                f"cannot make {path} for a disk: {error.strerror}", hint="--disk names another"
            ) from error

    def open(self, name: str, disk: DiskConfig) -> Image:
        """Return a disk for a device to be built on."""
        del disk
        return self._images[name]

    def take(self, wire: Wire, frame: Frame) -> None:
        """Take a part of a disk, or flush one; raises MigrationError for what is none, HostError without room."""
        image = self._filling.get(str(frame.form.get("disk")))
        offset = frame.form.get("offset")
        if image is None or (offset is not None and type(offset) is not int) or frame.size > MOST:
            raise MigrationError("the source sent a part of a disk that it did not announce")
        try:
            if offset is None:
                image.flush()
                return
        except OSError as error:
            raise HostError(f"a disk cannot be flushed: {error.strerror}") from error
        if not 0 <= offset <= image.size - frame.size or offset % SECTOR:
            raise MigrationError("the source sent a part that lies outside the disk")
        data = memoryview(bytearray(frame.size))
        wire.read_into(data)
        try:
            image.writev(offset, [data])
        except OSError as error:
            raise HostError(f"a disk cannot be written: {error.strerror}") from error

    def complete(self) -> None:
        """Flush what was copied; raises HostError."""
        if not self._copied:
            return
        try:
            for path, image in zip(self._made, self._filling.values(), strict=True):
                image.flush()
                folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise HostError(f"a disk cannot be flushed: {error.strerror}") from error

    def take_over(self, known: object, images: Mapping[str, FaultyImage]) -> None:
        """Open every disk, the source having let go, and put it where requests go; raises HostError.

        Args:
            known: what the source knows its files by.
            images: the machine's.
        """
        if self._copied:
            for image in self._filling.values():
                image.close()
        for disk, (name, image) in zip(self.configs, self._images.items(), strict=True):
            file = _file_of(disk)
            try:
                if not self._copied and (not isinstance(known, dict) or known.get(name) != _samples(file)):
                    raise HostError(f"{name}'s file {file} here is not the source's")
                if isinstance(image, PendingImage):
                    images[name].below = self._images[name] = _open_as(disk, image.size)
            except (BackendError, OSError) as error:
                raise HostError(f"{name} cannot be opened: {error}") from error

    def keep(self) -> None:
        """Leave the files where they are: the machine is here."""
        self._made.clear()

    def close(self) -> None:
        """Close all disks, and remove the files of a machine that did not come."""
        for image in (*self._filling.values(), *self._images.values()):
            image.close()
        while self._made:
            try:
                os.unlink(self._made.pop())
            except OSError:
                pass  # somebody tidied up


def _facts(form: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the source says of a disk; raises ValueError when it is none."""
    size, readonly, block, cluster = (form[key] for key in ("size", "readonly", "block_size", "cluster_size"))
    if not all(type(one) is int for one in (size, block, cluster)) or type(readonly) is not bool:
        raise TypeError("a disk's sizes are no numbers")
    if not SECTOR <= size <= MOST_BYTES or size % SECTOR or block not in {512, 4096} or not block <= cluster <= 1 << 21:
        raise ValueError("a disk's sizes are none")
    return {"size": size, "readonly": readonly, "block_size": block, "cluster_size": cluster}

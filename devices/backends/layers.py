"""Disks in snapshots: saved as one layer each, beside a plain description, and opened again from these.

What is saved is the topmost layer: a raw or qcow2 file that is written to is copied, what an overlay in memory holds
becomes a qcow2 overlay. What is only read (a readonly disk, an overlay's base) stays where it is, and the description
knows it again (`devices.backends.identity`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from devices.backends.copying import copy_content, copy_file
from devices.backends.errors import BackendError
from devices.backends.faults import FaultyImage
from devices.backends.identity import check_identity, identify
from devices.backends.memory_overlay import MemoryOverlay
from devices.backends.qcow2 import Qcow2Image, open_qcow2
from devices.backends.qcow2_header import create, set_backing
from devices.backends.raw import RawImage
from devices.backends.rewind import CheckpointImage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.backends.image import Image

__all__ = ["open_saved", "save_layers"]

FORMATS: Final = ("raw", "qcow2")
CACHES: Final = ("writeback", "none", "unsafe")
MODES: Final = ("copy", "reference")
MAX_DEPTH: Final = 64
"""Layers under layers, as in `devices.backends.qcow2`."""


def save_layers(image: Image, folder: str, name: str, *, mode: str = "copy") -> dict[str, Any]:
    """Save a disk; nothing may use it meanwhile.

    Args:
        image: what `open_image` or `open_saved` returned, or one of the images that lie over such.
        folder: where the file goes, if there is one.
        name: what its name begins with, such as "blk0"; no file of that name may be there.
        mode: "copy", or "reference": a file that is written to is not copied but only described, to go on with that
            very file when it has not changed by then. Whoever goes on writing to it has no snapshot any more.

    Returns:
        A description of plain values, for `open_saved`.

    Raises:
        BackendError: it cannot be saved.
        OSError: the image cannot be flushed.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    image = _bare(image)
    image.flush()
    if isinstance(image, Qcow2Image) and not image.readonly:
        image.settle()
    try:
        return _describe(image, os.path.join(folder, name), copied=mode == "copy")
    except OSError as error:
        raise BackendError(f"disk {name} cannot be saved: {error.strerror}") from error


def _bare(image: Image) -> Image:
    """Return what a guest's requests go to when no fault, cache or checkpoint is in their way."""
    while isinstance(image, FaultyImage | CheckpointImage):
        if isinstance(image, FaultyImage) and not image.is_transparent:
            break
        if isinstance(image, CheckpointImage) and image.overlay is not None and image.overlay.written:
            break
        image = image.below
    return image


def _describe(image: Image, path: str, *, copied: bool) -> dict[str, Any]:
    cache, memory = "writeback", False
    if isinstance(image, MemoryOverlay) and isinstance(image.base, RawImage | Qcow2Image):
        memory, cache = True, image.base.cache
        layer = _save_changes(image, image.base, f"{path}.qcow2") if image.written else _reference(image.base)
    elif isinstance(image, RawImage | Qcow2Image):
        cache = image.cache
        if image.readonly:
            layer = _reference(image)
        elif copied:
            form = "qcow2" if isinstance(image, Qcow2Image) else "raw"
            layer = _copied(f"{path}.{form}", form, lambda fd: _copy_open(image, fd, f"{path}.{form}"))
            layer["backing"] = _backing(image)
        else:
            layer = _reference(image, strict=True)
    else:
        layer = _copied(f"{path}.raw", "raw", lambda fd: copy_content(image, fd))
    return {"size": image.size, "readonly": image.readonly, "cache": cache, "memory": memory, "layer": layer}


def _reference(image: Image, *, strict: bool = False) -> dict[str, Any]:
    """Describe a file, and those below it, that stay where they are."""
    if not isinstance(image, RawImage | Qcow2Image):
        raise BackendError("a disk image stands on something that is no file, and cannot be referred to")
    form = "qcow2" if isinstance(image, Qcow2Image) else "raw"
    identity = identify(image.path, strict=strict)
    return {"format": form, "file": None, "path": image.path, "identity": identity, "backing": _backing(image)}


def _backing(image: Image) -> dict[str, Any] | None:
    backing = image.backing if isinstance(image, Qcow2Image) else None
    return None if backing is None else _reference(backing)


def _copied(path: str, form: str, fill: Callable[[int], None]) -> dict[str, Any]:
    """Make a layer's file of its own; returns its description without backing."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fill(fd)
        os.fdatasync(fd)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    file = os.path.basename(path)
    return {"format": form, "file": file, "path": None, "identity": identify(path), "backing": None}


def _copy_open(image: RawImage | Qcow2Image, target: int, path: str) -> None:
    """Copy an image's own file, which may be open past the page cache, into `target`, which is at `path`."""
    again = os.open(f"/proc/self/fd/{image.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        copy_file(again, target)
    finally:
        os.close(again)
    if isinstance(image, Qcow2Image) and image.backing_path is not None:
        set_backing(path, os.path.abspath(image.backing_path))  # the copy lies elsewhere


def _save_changes(overlay: MemoryOverlay, base: RawImage | Qcow2Image, path: str) -> dict[str, Any]:
    """Write an overlay in memory as a qcow2 overlay over the same base."""
    below = _reference(base)
    create(path, overlay.size, backing=base.path, backing_format=below["format"])
    try:
        image = open_qcow2(path, readonly=False, cache="writeback")
        try:
            zero = bytes(overlay.cluster_size)
            for offset, content in overlay.changes():
                if content == zero[: len(content)]:
                    image.write_zeroes(offset, len(content), unmap=True)
                else:
                    image.writev(offset, [content])
            image.settle()
        finally:
            image.close()
        identity = identify(path)
    except BaseException:
        os.unlink(path)
        raise
    file = os.path.basename(path)
    return {"format": "qcow2", "file": file, "path": None, "identity": identity, "backing": below}


# --- opening ----------------------------------------------------------------------------------------------------------


def open_saved(description: Mapping[str, Any], folder: str, *, private: bool) -> Image:
    """Open a disk that `save_layers` has saved, and lock it as `open_image` does.

    Args:
        description: what that returned.
        folder: where the saved file is now.
        private: whether the layer is shared: it is only read, writes go to memory, and any number of machines may do
            so. Otherwise the machine goes on with the layer itself; the snapshot is used up by that, and says so when
            it is opened again.

    Raises:
        BackendError: a file is missing, in use, or not what it was.
        KeyError, TypeError, ValueError: the description is malformed.
    """
    size, cache, layer = description["size"], description["cache"], description["layer"]
    readonly, memory = description["readonly"], description["memory"]
    if cache not in CACHES or not isinstance(size, int) or {type(readonly), type(memory)} != {bool}:
        raise ValueError("a disk's description is malformed")
    path = _checked(layer, folder)
    shared = readonly or private or memory
    if private:
        cache = "writeback"  # clones share what the host's page cache holds of the layer
    image: Image
    if layer["format"] == "qcow2":
        image = open_qcow2(path, readonly=shared, cache=cache)
    else:
        image = RawImage(path, readonly=shared, cache=cache)
    if image.size != size:
        image.close()
        raise BackendError(f"disk image {path} is a disk of {image.size} bytes, not of {size}")
    return MemoryOverlay(image) if shared and not readonly else image


def _checked(layer: Mapping[str, Any], folder: str, what: str = "disk image", depth: int = 0) -> str:
    """Return the path of a layer; raises unless it, and what lies below it, are what they were."""
    file, path = layer["file"], layer["path"]
    if layer["format"] not in FORMATS or depth >= MAX_DEPTH:
        raise ValueError(f"a disk's layer is of format {layer['format']!r}, or too deep")
    if file is not None:
        if os.path.basename(file) != file or file in {"", ".", ".."}:
            raise ValueError(f"a disk's layer is said to be in {file!r}, which is no file's name")
        path = os.path.join(folder, file)
    if not isinstance(path, str) or "\0" in path:
        raise ValueError(f"a disk's layer is said to be at {path!r}")
    check_identity(path, layer["identity"], what)
    if layer["backing"] is not None:
        _checked(layer["backing"], folder, "base image", depth + 1)
    return path

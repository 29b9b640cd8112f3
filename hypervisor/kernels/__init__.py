"""Guest kernels that have a name: the distribution's stock kernel, a tiny Linux, small guests in assembly.

They are fetched or built once into the cache folder (`cache`), checked by hash, and found there by name. Nothing here
is imported by a run that names a file.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels.assemble import AssemblyGuest, guests
from hypervisor.kernels.cache import Manifest, Slot, refusals
from hypervisor.kernels.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.kernels.recipe import Recipe

__all__ = [
    "Kernel",
    "Listing",
    "check_name",
    "default_initramfs",
    "ensure",
    "find",
    "get",
    "kernel",
    "listing",
    "names",
    "path",
    "vmlinux",
]

GROUP: Final = "kernels"
LINUX: Final = {"debian": "StockKernel", "tiny": "TinyKernel"}
"""The Linux kernels, each with the class in the module of its name. Only the one that is asked for is imported."""


class Kernel(NamedTuple):
    """A guest kernel that is in the cache.

    Attributes:
        name: what users call it.
        kind: "package", "built" or "assembly".
        summary: one line.
        version: of the package, or of the assembly guest's sources.
        image: the file to boot: a bzImage, an ELF file or a flat binary.
        vmlinux: the same kernel as an ELF file, with symbols where it has any; None where there is none.
        system_map: its System.map, or None: distributions keep the real one in another package.
        config: its .config, or None.
        modules: the folder that `uname -r` names, with its modules, or None.
        command_line: its command line when the user gives none.
        flat: 16, 32 or 64 when `image` is a flat binary for that mode.
        notes: where it came from and what was left out.
    """

    name: str
    kind: str
    summary: str
    version: str
    image: Path
    vmlinux: Path | None
    system_map: Path | None
    config: Path | None
    modules: Path | None
    command_line: str
    flat: int | None
    notes: list[str]

    @property
    def is_linux(self) -> bool:
        """Whether it takes an initramfs."""
        return self.kind != "assembly"


class Listing(NamedTuple):
    """One line of the catalogue. `state` is "present", "to get", "outdated" or "damaged"; `size` is in bytes."""

    name: str
    kind: str
    version: str
    state: str
    size: int
    summary: str
    image: str | None


def names() -> list[str]:
    """Return the names of all guest kernels, Linux first."""
    return [*LINUX, *guests()]


def _recipe(name: str) -> Recipe:
    if name in LINUX:
        found: Recipe = getattr(import_module(f"hypervisor.kernels.{name}"), LINUX[name])()
        return found
    if name in guests():
        return AssemblyGuest(name)
    from difflib import get_close_matches  # noqa: PLC0415 - only for a name that is wrong

    near = get_close_matches(name, names(), n=3)
    hint = f"is it {' or '.join(near)}?" if near else "`hv kernel list` shows those that there are"
    raise ConfigError(f"there is no guest kernel {name!r}", hint=hint)


def check_name(name: str) -> None:
    """Raise ConfigError, with the names that are near, if no kernel has this name."""
    _recipe(name)


def _state(recipe: Recipe, manifest: Manifest | None, *, deep: bool = False) -> str:
    if manifest is None:
        return "to get"
    if manifest.fingerprint != recipe.fingerprint():
        return "outdated"
    return "damaged" if manifest.damage(deep=deep) else "present"


def listing() -> list[Listing]:
    """Return the whole catalogue with the state of each kernel; files are not hashed."""
    lines = []
    for name in names():
        recipe = _recipe(name)
        manifest = Slot(GROUP, name).current()
        state = _state(recipe, manifest)
        image = manifest.role("image") if manifest else None
        version, size = (manifest.version, manifest.size) if manifest else ("", 0)
        lines.append(Listing(name, recipe.kind, version, state, size, recipe.summary, str(image) if image else None))
    return lines


def _kernel(recipe: Recipe, manifest: Manifest) -> Kernel:
    image = manifest.role("image")
    assert image is not None, "every recipe names an image"  # noqa: S101 - a fault of ours if it does not
    return Kernel(
        name=recipe.name,
        kind=recipe.kind,
        summary=recipe.summary,
        version=manifest.version,
        image=image,
        vmlinux=manifest.role("vmlinux"),
        system_map=manifest.role("system_map"),
        config=manifest.role("config"),
        modules=manifest.role("modules"),
        command_line=recipe.command_line,
        flat=recipe.flat,
        notes=manifest.notes,
    )


def kernel(name: str) -> Kernel:
    """Return the kernel of this name.

    An assembly guest is built on the way if it is not in the cache or its source has changed.

    Raises:
        ConfigError: if there is no such kernel, or it is not in the cache, or damaged there.
        HostError: if an assembly guest cannot be built.
    """
    recipe = _recipe(name)
    manifest = Slot(GROUP, name).current()
    state = _state(recipe, manifest)
    if manifest is not None and (state == "present" or (state == "outdated" and recipe.kind != "assembly")):
        return _kernel(recipe, manifest)
    if recipe.kind == "assembly":
        return get(name)
    if manifest is None:
        raise ConfigError(f"the guest kernel {name} is not in the cache", hint=f"hv kernel get {name}")
    raise ConfigError(
        f"the guest kernel {name} is damaged in the cache: {manifest.damage(deep=False)[0]} in {manifest.folder}",
        hint=f"hv kernel get {name}",
    )


def find(name: str) -> Kernel | None:
    """Return the kernel of this name as `kernel` does, or None if no kernel has that name."""
    return kernel(name) if name in names() else None


def path(name: str) -> Path:
    """Return the image to boot of the kernel of this name; raises as `kernel` does."""
    return kernel(name).image


def vmlinux(name: str) -> Path:
    """Return the ELF file of the kernel of this name.

    Raises:
        ConfigError: if it has none, or as `kernel` does.
    """
    found = kernel(name)
    if found.vmlinux is None:
        raise ConfigError(f"the guest kernel {name} has no ELF file", hint="; ".join(found.notes) or None)
    return found.vmlinux


def ensure(name: str, *, progress: Progress | None = None) -> Path:
    """Return the image to boot of the kernel of this name, getting or building it first if need be.

    Raises:
        ConfigError: if there is no such kernel.
        HostError: if it cannot be had on this host.
    """
    recipe = _recipe(name)
    manifest = Slot(GROUP, name).current()
    if manifest is not None and _state(recipe, manifest) == "present":
        return _kernel(recipe, manifest).image
    return get(name, progress=progress).image


def get(name: str, *, update: bool = False, progress: Progress | None = None) -> Kernel:
    """Check the kernel of this name by the hash of every file; get or build it if it is not whole and up to date.

    Args:
        name: of a kernel in the catalogue.
        update: look whether the distribution has a newer version, and get that.
        progress: who is told; nobody by default.

    Raises:
        ConfigError: if there is no such kernel.
        HostError: if it cannot be had on this host.
    """
    recipe = _recipe(name)
    slot = Slot(GROUP, name)
    progress = progress or Progress()
    with refusals(f"the guest kernel {name}", slot.folder), slot.locked(progress):
        manifest = slot.current()
        state = _state(recipe, manifest, deep=True)
        with slot.workspace() as work:
            if manifest is not None and state == "present":
                if not update or manifest.version == recipe.latest(work, progress):
                    return _kernel(recipe, manifest)
            elif manifest is not None and state == "damaged":
                progress.say(
                    f"{name}: {', '.join(manifest.damage(deep=True)[:3])} is damaged in the cache; getting it anew"
                )
            return _kernel(recipe, _make(recipe, slot, work, progress))


def _make(recipe: Recipe, slot: Slot, work: Path, progress: Progress) -> Manifest:
    disk = os.statvfs(work)
    free = disk.f_bavail * disk.f_frsize
    if free < recipe.room:
        raise HostError(
            f"{recipe.name} takes {recipe.room // 1_000_000} MB while it is made; {work} has {free // 1_000_000} MB",
            hint="free some, or set XDG_CACHE_HOME to a folder on a larger file system",
        )
    fingerprint = recipe.fingerprint()
    folder, scratch = work / "made", work / "scratch"
    folder.mkdir()
    scratch.mkdir()
    product = recipe.make(folder, scratch, progress)
    progress.begin(f"checking {recipe.name}")
    return slot.publish(
        folder, version=product.version, fingerprint=fingerprint, roles=product.roles, notes=product.notes
    )


def default_initramfs(name: str) -> Path:
    """Return an initramfs for the kernel of this name that gives a shell on the console, making it if need be.

    It loads the virtio drivers and the power button's where the machine has such devices. Leaving the shell powers the
    machine off.

    Raises:
        ConfigError: as `kernel` does, or if the kernel takes none.
        HostError: if it cannot be made.
    """
    from hypervisor import initramfs  # noqa: PLC0415 - only a run of Linux without an initrd makes one

    return initramfs.default(kernel(name))

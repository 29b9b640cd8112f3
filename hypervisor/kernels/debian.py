"""The distribution's stock kernel for virtual machines, fetched as a package and unpacked, never installed."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

from hypervisor.errors import ConfigError, HostError, ImageError
from hypervisor.kernels.packages import Apt
from hypervisor.kernels.recipe import Product

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.kernels.progress import Progress

__all__ = ["StockKernel"]

CANDIDATES: Final = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm", "linux-image-amd64")
"""Packages that depend on the newest kernel: Debian's for the cloud, Ubuntu's for guests, Debian's for everything."""
LAYOUT: Final = "1"
"""Changes when the folder is laid out in another way, so that older ones are made anew."""
STUB_BYTES: Final = 4096
"""A System.map smaller than this only says in which other package the real one is."""


class StockKernel:
    """`debian`: the kernel of the distribution that this host runs."""

    name: Final = "debian"
    kind: Final = "package"
    summary: Final = "the distribution's stock cloud or virtual kernel, with its modules"
    # The kernel's own tests of its ciphers are most of its boot where code runs slowly.
    command_line: Final = "console=ttyS0 panic=-1 cryptomgr.notests"
    flat: Final = None
    room: Final = 400_000_000

    def fingerprint(self) -> str:
        """Return the version of the folder's layout: nothing else of it lies here."""
        return LAYOUT

    def latest(self, scratch: Path, progress: Progress) -> str:
        """Return the package version that the distribution has now."""
        apt = Apt(scratch / "apt", progress)
        return apt.version(_packages(apt)[0])

    def make(self, folder: Path, scratch: Path, progress: Progress) -> Product:
        """Fetch the packages and take vmlinuz, its ELF, System.map, config and modules out of them."""
        apt = Apt(scratch / "apt", progress)
        tree = scratch / "tree"
        apt.unpack(lambda: _packages(apt), scratch / "archives", tree)
        image = _packages(apt)[0]
        version = apt.version(image)
        vmlinuz = next(tree.glob("boot/vmlinuz-*"), None)
        if vmlinuz is None:
            raise HostError(f"package {image} holds no boot/vmlinuz")
        release = vmlinuz.name.removeprefix("vmlinuz-")
        vmlinuz.rename(folder / "vmlinuz")
        (folder / "vmlinuz").chmod(0o644)
        roles = {"image": "vmlinuz"}
        _keep(tree / "boot" / f"config-{release}", folder / "config", "config", roles)
        system_map = tree / "boot" / f"System.map-{release}"
        if system_map.is_file() and system_map.stat().st_size >= STUB_BYTES:
            _keep(system_map, folder / "System.map", "system_map", roles)
        modules = next(tree.glob(f"**/lib/modules/{release}"), None)
        if modules is not None:
            (folder / "modules").mkdir()
            shutil.move(modules, folder / "modules" / release)
            roles["modules"] = f"modules/{release}"
        progress.begin("taking the ELF file out of vmlinuz")
        notes = [f"packages {image} {version}"]
        try:
            _extract_elf(folder / "vmlinuz", folder / "vmlinux")
            roles["vmlinux"] = "vmlinux"
        except ConfigError as error:  # an ImageError too; or this Python has no library for the format
            notes.append(f"no vmlinux: {error}")
        return Product(version, roles, notes)


def _packages(apt: Apt) -> list[str]:
    """Return the package that holds the kernel, behind the one that only depends on it, and those it is made up with.

    Ubuntu keeps modules, System.map and config in a package of their own.
    """
    umbrella = apt.find(*CANDIDATES)
    image = next(iter(apt.depends(umbrella, "linux-image-")), umbrella)
    return [image, *apt.depends(image, "linux-modules-")]


def _keep(source: Path, target: Path, role: str, roles: dict[str, str]) -> None:
    if source.is_file():
        source.rename(target)
        target.chmod(0o644)
        roles[role] = target.name


def _extract_elf(vmlinuz: Path, vmlinux: Path) -> None:
    """Write the ELF file that is compressed inside a bzImage."""
    from hypervisor.boot import bzimage, decompress  # noqa: PLC0415 - only when a kernel is fetched

    data = memoryview(vmlinuz.read_bytes())
    if not bzimage.is_bzimage(data):
        raise ImageError("vmlinuz is no bzImage")
    header = bzimage.parse(data, vmlinuz.name)
    payload = data[header.payload : header.payload + header.payload_size]
    vmlinux.write_bytes(decompress.unpack(payload, vmlinuz.name, limit=header.init_size))

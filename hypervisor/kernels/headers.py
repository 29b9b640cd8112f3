"""What modules for a named guest kernel are built against: its headers, fetched as packages and never installed.

`make -C $(hv kernel headers debian) M=$PWD modules` builds the modules of a folder for the guest kernel `debian`,
whatever kernel this host runs. The packages are of exactly the version of the kernel in the cache, so that what is
built can be loaded there. They lie in the cache as they would in the file system, absolute paths made relative.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from typing import TYPE_CHECKING, Final

from hypervisor import kernels
from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels import programs
from hypervisor.kernels.cache import Manifest, Slot, refusals
from hypervisor.kernels.packages import Apt
from hypervisor.kernels.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ensure"]

GROUP: Final = "headers"
LAYOUT: Final = "1"
"""Changes when the folder is laid out in another way, so that older ones are made anew."""
PARTS: Final = ("linux-headers-", "linux-kbuild-")
"""How the packages begin that the headers of one kernel depend on: headers that it shares with others, and programs."""
ARCHITECTURES: Final = ("x86", "um")
"""Of all that Linux runs on; x86 shares some with user-mode Linux."""
ABSOLUTE_INCLUDE: Final = re.compile(r"^include /usr/src/", re.MULTILINE)
RELATIVE_INCLUDE: Final = "include $(dir $(abspath $(lastword $(MAKEFILE_LIST))))../"
COMPILER: Final = re.compile(r"\bgcc-(\d+)\b")
"""How a package names the compiler that its kernel was built with."""


def ensure(name: str, *, check: bool = False, progress: Progress | None = None) -> Path:
    """Return the folder for `make -C` that builds modules for the guest kernel of this name, getting it if need be.

    Args:
        name: of a kernel that is a package of the distribution.
        check: hash every file first; otherwise only those that every build reads are looked at.
        progress: who is told; nobody by default.

    Raises:
        ConfigError: there is no such kernel, it is not in the cache, or it has no headers.
        HostError: the packages cannot be had: there is no network, or the archive has another version by now.
    """
    kernel = kernels.kernel(name)
    if kernel.kind != "package" or kernel.modules is None:
        raise ConfigError(
            f"the guest kernel {name} has no headers to build modules against",
            hint="the kernel debian has: hv kernel headers debian",
        )
    slot = Slot(GROUP, name)
    if re.search(r"[\s:]", str(slot.folder)):
        raise ConfigError(
            f"a kernel's Makefile takes no path with blanks or colons: {slot.folder}",
            hint="set XDG_CACHE_HOME to another folder",
        )
    wanted = hashlib.sha256(f"{LAYOUT} {kernel.version}".encode()).hexdigest()
    progress = progress or Progress()
    manifest = _whole(slot, wanted, deep=check)
    if manifest is None:
        with refusals(f"the headers of {name}", slot.folder), slot.locked(progress):
            manifest = _whole(slot, wanted, deep=check) or _make(slot, kernel, wanted, progress)
    _check_compiler(manifest)
    return manifest.folder / manifest.roles["build"]


def _whole(slot: Slot, fingerprint: str, *, deep: bool) -> Manifest | None:
    """Return what is in the cache if it is of the right version and not damaged."""
    manifest = slot.current()
    if manifest is None or manifest.fingerprint != fingerprint or manifest.damage(deep=deep):
        return None
    return manifest


def _make(slot: Slot, kernel: kernels.Kernel, fingerprint: str, progress: Progress) -> Manifest:
    """Fetch the packages and lay them out; the slot is locked."""
    assert kernel.modules is not None  # noqa: S101 - seen above
    release = kernel.modules.name
    with slot.workspace() as work:
        apt, tree = Apt(work / "apt", progress), work / "tree"
        apt.unpack(lambda: _packages(apt, kernel, release), work / "archives", tree)
        build = tree / "usr" / "src" / f"linux-headers-{release}"
        if not (build / "Makefile").exists():
            raise HostError(f"package linux-headers-{release} holds no usr/src/linux-headers-{release}/Makefile")
        made = work / "made"
        made.mkdir()
        (tree / "usr").rename(made / "usr")
        build = made / build.relative_to(tree)
        shutil.rmtree(made / "usr" / "share", ignore_errors=True)
        _leave_out_foreign(made)
        _make_relative(build)
        progress.begin(f"checking the headers of {kernel.name}")
        roles = {"build": str(build.relative_to(made))}
        for role, inside in {"makefile": "Makefile", "config": ".config", "symvers": "Module.symvers"}.items():
            if (build / inside).is_file():
                roles[role] = f"{roles['build']}/{inside}"
        return slot.publish(
            made, version=kernel.version, fingerprint=fingerprint, roles=roles, notes=[f"linux-headers-{release}"]
        )


def _packages(apt: Apt, kernel: kernels.Kernel, release: str) -> list[str]:
    """Return the packages that hold what modules for a release are built against.

    Raises:
        HostError: the archive does not have them in the kernel's own version.
    """
    package = f"linux-headers-{release}"
    hint = f"hv kernel get {kernel.name} --update gets the kernel that the archive has now"
    try:
        apt.find(package)
    except HostError as error:
        raise HostError(f"the package archive has no {package}, which the guest kernel needs", hint=hint) from error
    version = apt.version(package)
    if version != kernel.version:
        raise HostError(
            f"the guest kernel {kernel.name} is of version {kernel.version}, and {package} is there in {version} only",
            hint=hint,
        )
    found = [package]
    for one in found:
        found += [part for prefix in PARTS for part in apt.depends(one, prefix) if part not in found]
    return found


def _leave_out_foreign(made: Path) -> None:
    """Remove what is for other architectures: a quarter."""
    for folder in made.glob("usr/src/*/arch/*"):
        if folder.name not in ARCHITECTURES and folder.is_dir():
            shutil.rmtree(folder)


def _make_relative(build: Path) -> None:
    """Let the Makefile find the shared one from wherever it lies."""
    makefile = build / "Makefile"
    if not makefile.is_symlink():
        makefile.write_text(ABSOLUTE_INCLUDE.sub(RELATIVE_INCLUDE, makefile.read_text()))


def _check_compiler(manifest: Manifest) -> None:
    """Refuse to let a build start for which a program is missing.

    Raises:
        HostError: naming the program and its package.
    """
    variables = manifest.folder / manifest.roles["build"] / ".kernelvariables"
    named = COMPILER.search(variables.read_text()) if variables.is_file() else None
    compiler = named[0] if named else "gcc"
    absent = programs.missing([compiler, "make"])
    if absent:
        raise HostError(
            f"building modules for the guest kernel needs {' and '.join(absent)}, not found on this host",
            hint=f"apt-get install {' '.join(absent)}",
        )

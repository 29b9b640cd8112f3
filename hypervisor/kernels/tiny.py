"""A small kernel, built from the distribution's kernel source package and the project's configuration fragments."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from hypervisor.errors import HostError
from hypervisor.kernels import kconfig, programs
from hypervisor.kernels.packages import Apt
from hypervisor.kernels.recipe import Product, sources

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.kernels.progress import Progress

__all__ = ["TinyKernel"]

NEEDED: Final = "tiny.config"
TRIMMED: Final = "tiny-trim.config"
BUILD: Final = "1"
"""Changes when the kernel is built in another way from the same source and fragments."""

TOOLS: Final = {
    "gcc": "gcc",
    "ld": "binutils",
    "make": "make",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "lz4": "lz4",
    "tar": "tar",
    "xz": "xz-utils",
    "bzip2": "bzip2",
    "cmp": "diffutils",
}
"""Programs that the build runs, each with its Debian package."""
LIBELF: Final = "libelf-dev"

OBJECTS: Final = 1680
"""Steps that make prints for Linux 6.1 with the fragments: what the progress is measured by."""
STEP: Final = re.compile(r"^  [A-Z]")
"""How make announces a step: "  CC      init/main.o"."""

FOREIGN: Final = ("arch/[!x]*/*.[chS]", "arch/xtensa/*.[chS]", "arch/[!x]*/*.dts*", "arch/[!x]*/configs/*")
UNUSED: Final = ("Documentation/*/*", "tools/perf/*", "tools/testing/*")
UNUSED_CODE: Final = (
    *("drivers/clk", "drivers/gpu", "drivers/hwmon", "drivers/iio", "drivers/infiniband", "drivers/media"),
    *("drivers/misc", "drivers/mtd", "drivers/net/ethernet", "drivers/net/wireless", "drivers/pinctrl"),
    *("drivers/scsi", "drivers/staging", "drivers/usb", "drivers/video", "samples", "sound"),
)
"""Two thirds of the source, none of it built. Their Kconfig files and Makefiles stay: the configuration reads them."""


def _exclusions() -> list[str]:
    patterns = [*FOREIGN, *UNUSED, *(f"{folder}/*.[ch]" for folder in UNUSED_CODE)]
    return [f"--exclude=linux-source-*/{pattern}" for pattern in patterns]


class TinyKernel:
    """`tiny`: serial console, virtio, ext4, network, ACPI, SMP, and little else."""

    name: Final = "tiny"
    kind: Final = "built"
    summary: Final = "a small Linux built from the distribution's source: serial, virtio, ext4, net, ACPI, SMP"
    command_line: Final = "console=ttyS0 panic=-1"
    flat: Final = None
    room: Final = 1_500_000_000

    def fingerprint(self) -> str:
        """Return a hash of the fragments and the way of building."""
        digest = hashlib.sha256(BUILD.encode())
        for name in (NEEDED, TRIMMED):
            digest.update((sources() / name).read_bytes())
        return digest.hexdigest()

    def latest(self, scratch: Path, progress: Progress) -> str:
        """Return the version of the source package that the distribution has now."""
        apt = Apt(scratch / "apt", progress)
        return apt.version(_source_package(apt))

    def make(self, folder: Path, scratch: Path, progress: Progress) -> Product:
        """Fetch the source, configure and build it; keep bzImage, vmlinux, System.map, .config and modules."""
        check_tools()
        apt = Apt(scratch / "apt", progress)
        tree = scratch / "linux"
        archives = apt.fetch(lambda: [_source_package(apt)], scratch / "archives")
        package = _source_package(apt)
        version = apt.version(package)
        progress.begin(f"unpacking {package}")
        _unpack_source(archives[0], tree)
        archives[0].unlink()
        progress.begin("configuring the kernel")
        notes = [f"package {package} {version}", *configure(tree)]
        _compile(tree, progress)
        return Product(version, _collect(tree, folder), notes)


def check_tools() -> None:
    """Refuse to start a build that cannot end well.

    Raises:
        HostError: naming everything that is missing, with the packages that have it.
    """
    absent = programs.missing(TOOLS)
    packages = [TOOLS[program] for program in absent]
    if "gcc" not in absent and not _has_libelf():
        absent.append("gelf.h")
        packages.append(LIBELF)
    if absent:
        raise HostError(
            f"building the tiny kernel needs {', '.join(absent)}, not found on this host",
            hint=f"apt-get install {' '.join(packages)}",
        )


def _has_libelf() -> bool:
    """Tell whether a program can be built with libelf, which the kernel's objtool needs."""
    argv = ["gcc", "-E", "-x", "c", "-o", os.devnull, "-"]
    return not subprocess.run(argv, input=b"#include <gelf.h>\n", capture_output=True, check=False).returncode


def _source_package(apt: Apt) -> str:
    """Return the source package that `linux-source` stands for."""
    umbrella = apt.find("linux-source")
    return next(iter(apt.depends(umbrella, "linux-source-")), umbrella)


def _unpack_source(archive: Path, tree: Path) -> None:
    """Unpack what is needed of the tarball inside a linux-source package."""
    inner = tree.with_name("package")
    programs.capture(["dpkg-deb", "-x", str(archive), str(inner)])
    tarball = next((path for path in inner.glob("usr/src/**/linux-source-*.tar.*") if path.is_file()), None)
    if tarball is None:
        raise HostError(f"{archive.name} holds no source tarball")
    tree.mkdir()
    argv = ["tar", "-x", "-f", str(tarball), "-C", str(tree), "--strip-components=1", "--no-same-owner"]
    programs.capture([*argv, *_exclusions()])
    shutil.rmtree(inner)


def configure(tree: Path) -> list[str]:
    """Make the configuration of the kernel source in `tree`; return what it did not take of the trims.

    Raises:
        HostError: if an option that guests need did not survive, naming it.
    """
    needed_text, trimmed_text = ((sources() / name).read_text() for name in (NEEDED, TRIMMED))
    needed, trimmed = kconfig.parse(needed_text), kconfig.parse(trimmed_text)
    config = tree / ".config"
    programs.capture([*_make(), "-s", "tinyconfig"], cwd=tree)
    # What is said last counts, also between the options of one choice.
    config.write_text(f"{config.read_text()}\n{trimmed_text}\n{needed_text}")
    programs.capture([*_make(), "-s", "olddefconfig"], cwd=tree)
    got = kconfig.parse(config.read_text())
    lost = kconfig.differences(needed, got)
    if lost:
        raise HostError(
            f"this kernel source does not take {', '.join(lost)}",
            hint=f"{NEEDED} in {sources()} asks for them; the source may be a version that names them otherwise",
        )
    return [f"not taken: {setting}" for setting in kconfig.differences(trimmed, got)]


def _make() -> list[str]:
    """Return the start of a make command; the same source and compiler give the same kernel."""
    return ["make", "KBUILD_BUILD_TIMESTAMP=1970-01-01", "KBUILD_BUILD_USER=hv", "KBUILD_BUILD_HOST=hv"]


def _compile(tree: Path, progress: Progress) -> None:
    progress.begin("building the kernel", total=OBJECTS, unit="objects")
    done = 0

    def hear(line: str) -> None:
        nonlocal done
        if STEP.match(line):
            done += 1
            progress.reach(min(done, OBJECTS))

    jobs = len(os.sched_getaffinity(0))
    programs.follow([*_make(), f"-j{jobs}", "bzImage", "vmlinux", "modules"], hear, cwd=tree)


def _collect(tree: Path, folder: Path) -> dict[str, str]:
    """Move what is kept of a built tree into `folder`; return the roles."""
    kept = {
        "image": ("arch/x86/boot/bzImage", "bzImage"),
        "vmlinux": ("vmlinux", "vmlinux"),
        "system_map": ("System.map", "System.map"),
        "config": (".config", "config"),
    }
    for built, name in kept.values():
        (tree / built).rename(folder / name)
    release = (tree / "include/config/kernel.release").read_text().strip()
    modules = folder / "modules" / release
    for module in tree.rglob("*.ko"):
        target = modules / "kernel" / module.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        module.rename(target)
    (tree / "modules.builtin").rename(modules / "modules.builtin")
    return {role: name for role, (_, name) in kept.items()} | {"modules": f"modules/{release}"}

"""The agent's program, and how it gets into a guest.

The program is freestanding C, compiled together with the binding to KVM: an installed package needs no compiler.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hypervisor.cpio import CpioWriter
from hypervisor.errors import ConfigError, HostError
from hypervisor.options import PortConfig
from hypervisor.testing import build
from hypervisor.testing.protocol import PORT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["RDINIT", "initramfs", "port", "program"]

HOME: Final = ".trapvisor"
RDINIT: Final = f"rdinit=/{HOME}/agent"
"""Goes onto the command line of the guest's kernel: the agent is its first process, starts itself, and makes way."""
MODULES: Final = ("virtio_pci", "virtio_mmio", "virtio_console")
MOST_MODULES: Final = 64
BOUNDARY: Final = 512
"""An archive that follows another one begins at a multiple of this many bytes."""


def port() -> PortConfig:
    """Return the console port that the agent speaks on, for MachineConfig(ports=...)."""
    return PortConfig(PORT_NAME, inner=True)


def program() -> Path:
    """Return the path of the agent's program: what was compiled with this package, else in the cache, else made now.

    Raises:
        HostError: it is nowhere and cannot be compiled.
    """
    name = build.name()
    beside = build.SOURCES / name
    if beside.is_file():
        return beside
    from hypervisor.kernels.cache import Slot, refusals  # noqa: PLC0415 - rarely so
    from hypervisor.kernels.progress import Progress  # noqa: PLC0415 - the same

    slot = Slot("initramfs", "agent")
    manifest = slot.current()
    if manifest is None or manifest.fingerprint != name or manifest.damage(deep=False):
        with refusals("the guest's agent", slot.folder), slot.locked(Progress()), slot.workspace() as work:
            made = work / "made"
            made.mkdir()
            _compile(made / "agent")
            manifest = slot.publish(made, version=name, fingerprint=name, roles={"image": "agent"}, notes=[])
    return manifest.folder / "agent"


def _compile(target: Path) -> None:
    from hypervisor.kernels import programs  # noqa: PLC0415 - see above

    if programs.missing(["gcc"]):
        raise HostError("gcc is not on this host; it compiles the guest's agent", hint="apt-get install gcc")
    programs.capture(build.argv(target), hint="it needs gcc, binutils and linux-libc-dev")


def initramfs(
    out: str | os.PathLike[str],
    *,
    kernel: str | None = None,
    base: str | os.PathLike[str] | None = None,
    init: str = "/init",
    modules: Iterable[str] = (),
) -> Path:
    """Write an initramfs with the agent in it, and return its path. The guest's command line takes RDINIT beside it.

    The agent's archive follows the one that it is made from, whatever that is compressed with. What is in there finds
    itself as without the agent, but for a folder /.trapvisor, and starts as it would.

    Args:
        out: the file to write.
        kernel: a guest kernel of `hv kernel list`; with `base`, the modules that its port needs are loaded first.
        base: the user's own initramfs; by default the one that the kernel's name stands for.
        init: the program in it that is to be the first process.
        modules: names of more modules of `kernel` to load first.

    Raises:
        ConfigError: neither kernel nor base is given, or a file cannot be used.
        HostError: the agent cannot be compiled, or no default initramfs made.
    """
    from hypervisor import kernels  # noqa: PLC0415 - for those who name one

    if base is None:
        if kernel is None:
            raise ConfigError("neither a kernel nor an initramfs is named", hint="kernel='debian', or base='root.cpio'")
        source, wanted = kernels.default_initramfs(kernel), list(modules)
    else:
        source, wanted = Path(base), [*MODULES, *modules]
    found = _modules(kernel, wanted) if kernel is not None else []
    if len(found) > MOST_MODULES:
        raise ConfigError(f"{len(found)} modules; the agent loads {MOST_MODULES} at most")
    try:
        with open(source, "rb") as file, open(out, "wb") as target:
            while chunk := file.read(1 << 20):
                target.write(chunk)
            target.write(bytes(-target.tell() % BOUNDARY))
            _write_agent(CpioWriter(target.write), init, found)
    except OSError as error:
        raise ConfigError(f"cannot make {os.fspath(out)}: {error.filename}: {error.strerror}") from error
    return Path(out)


def _modules(kernel: str, names: list[str]) -> list[bytes]:
    """Return modules of a kernel, with what they depend on, in the order to load them in; it may have them built in."""
    from hypervisor import kernels  # noqa: PLC0415 - see above
    from hypervisor.kernels.modules import ModuleTree, unpack  # noqa: PLC0415 - the same

    folder = kernels.kernel(kernel).modules
    if folder is None:
        return []
    tree = ModuleTree(folder)
    return [unpack(path) for path in tree.order([name for name in names if tree.has(name)])]


def _write_agent(archive: CpioWriter, init: str, modules: list[bytes]) -> None:
    archive.folder(HOME, 0o700)
    for folder in ("modules", "proc", "sys"):
        archive.folder(f"{HOME}/{folder}", 0o700)
    archive.file(f"{HOME}/agent", program().read_bytes(), 0o700)
    archive.symlink(f"{HOME}/init", init)
    for index, module in enumerate(modules):
        archive.file(f"{HOME}/modules/{index:02}.ko", module, 0o600)
    archive.finish()

"""From what the user named to bytes: kernel, initrd and modules, from files or from the catalogue of guest kernels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from hypervisor import boot, layout
from hypervisor.errors import ImageError

if TYPE_CHECKING:
    from hypervisor.boot import BootPlan
    from hypervisor.config import MachineConfig

MAX_IMAGE: Final = 1 << 31
"""Files above 2 GiB are refused: boot protocols give sizes in 32 bits."""


def read_image(path: str, what: str) -> bytes:
    """Read a kernel, initrd or module file; `what` names its role in errors.

    Raises:
        ImageError: it is not there, is no file, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_IMAGE:
                raise ImageError(f"{what} {path} has {size >> 20} MiB; at most {MAX_IMAGE >> 20} can be loaded")
            return file.read()
    except IsADirectoryError as error:
        raise ImageError(f"{what} {path} is a directory", hint="name the image file in it") from error
    except OSError as error:
        raise ImageError(f"cannot read {what} {path}: {error.strerror}") from error


def is_name(kernel: str) -> bool:
    """Tell whether this can be a name from the catalogue: it has no slash, and no file here is called so."""
    return "/" not in kernel and not os.path.isfile(kernel)


def plan_boot(config: MachineConfig) -> tuple[BootPlan, str | None]:
    """Read what `config` names and plan how to boot it.

    Returns:
        The plan, and the path of a file with the kernel's symbols when one is at hand.

    Raises:
        ConfigError: see `hypervisor.boot.plan`; ImageError for a file that cannot be used.
    """
    append, initrd, flat, symbols = config.append, config.initrd, config.flat, config.symbols
    initrd = None if initrd is None else os.fspath(initrd)
    if isinstance(config.kernel, bytes):
        kernel, name = config.kernel, "the kernel image"
    else:
        name = os.fspath(config.kernel)
        if is_name(name):
            from hypervisor import kernels  # noqa: PLC0415 - only a run by name looks into the catalogue

            if (found := kernels.find(name)) is not None:
                name = str(found.image)
                append = found.command_line if append is None else append
                flat = flat or found.flat
                # a distribution's kernel has no symbols in its ELF file
                source = found.system_map or (None if found.is_linux else found.vmlinux)
                symbols = symbols or (str(source) if source else None)
                if initrd is None and found.is_linux:
                    initrd = str(kernels.default_initramfs(found.name))
        kernel = read_image(name, "kernel")
    modules = []
    for module in config.modules:
        path = module.partition(" ")[0]
        modules.append((path, read_image(path, "module"), module))
    append = append or ""
    if "acpi=off" in append.split():  # then the command line is the only way to learn of virtio-mmio devices
        for base, gsi in config.virtio_mmio_places:
            append += f" virtio_mmio.device={layout.VIRTIO_MMIO_STRIDE}@{base:#x}:{gsi}"
    plan = boot.plan(
        kernel,
        name=name,
        initrd=None if initrd is None else read_image(initrd, "initrd"),
        initrd_name=initrd or "",
        modules=modules,
        command_line=append,
        ram_bytes=config.ram_mib << 20,
        flat_bits=flat,
        decompress=config.decompress,
        protocol=config.protocol,
        rsdp=layout.ACPI_TABLES,
    )
    return plan, os.fspath(symbols) if symbols else _symbols_beside(name, plan.release)


def _symbols_beside(kernel: str, release: str | None) -> str | None:
    """Find the System.map that distributions install beside their kernel."""
    if release is None:
        return None
    path = os.path.join(os.path.dirname(kernel), f"System.map-{release}")
    return path if os.path.isfile(path) else None

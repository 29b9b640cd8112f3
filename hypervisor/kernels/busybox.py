"""A static busybox, the whole user space of an initramfs: the host's own, or the distribution's package, unpacked."""

from __future__ import annotations

import shutil
from pathlib import Path
from struct import error as StructError  # noqa: N812 - it is a class, and `error` is what handlers call theirs
from struct import unpack_from
from typing import TYPE_CHECKING, Final

from hypervisor.errors import HostError
from hypervisor.kernels import programs
from hypervisor.kernels.cache import Slot, refusals
from hypervisor.kernels.packages import Apt
from hypervisor.kernels.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["applets", "ensure", "is_static"]

PACKAGE: Final = "busybox-static"
HOSTS_OWN: Final = ("/bin/busybox", "/usr/bin/busybox", "/bin/busybox.static", "/usr/lib/initcpio/busybox")
FINGERPRINT: Final = "1"
EM_X86_64: Final = 62
PT_INTERP: Final = 3


def is_static(program: Path) -> bool:
    """Tell whether a file is an x86-64 ELF program that needs no other file: it asks for no interpreter (PT_INTERP)."""
    try:
        data = program.read_bytes()
        machine = unpack_from("<H", data, 0x12)[0]
        (table,) = unpack_from("<Q", data, 0x20)
        size, count = unpack_from("<HH", data, 0x36)
        types = [unpack_from("<I", data, table + index * size)[0] for index in range(count)]
    except (OSError, StructError):
        return False
    return data[:5] == b"\x7fELF\x02" and machine == EM_X86_64 and PT_INTERP not in types


def ensure(*, progress: Progress | None = None, own: Iterable[str] = HOSTS_OWN) -> Path:
    """Return the path of a static busybox, fetching the package into the cache if the host has none of its own.

    Raises:
        HostError: if there is none and it cannot be fetched.
    """
    for candidate in own:
        if is_static(Path(candidate)):
            return Path(candidate)
    slot = Slot("tools", "busybox")
    manifest = slot.current()
    if manifest is None or manifest.fingerprint != FINGERPRINT or manifest.damage(deep=True):
        progress = progress or Progress()
        with refusals("busybox", slot.folder), slot.locked(progress), slot.workspace() as work:
            apt = Apt(work / "apt", progress)
            apt.unpack(lambda: [apt.find(PACKAGE)], work / "archives", work / "tree")
            found = next((path for path in (work / "tree").glob("**/bin/busybox") if is_static(path)), None)
            if found is None:
                raise HostError(f"package {PACKAGE} holds no static busybox")
            made = work / "made"
            made.mkdir()
            shutil.move(found, made / "busybox")
            version = apt.version(PACKAGE)
            manifest = slot.publish(
                made, version=version, fingerprint=FINGERPRINT, roles={"image": "busybox"}, notes=[]
            )
    return manifest.folder / "busybox"


def applets(busybox: Path) -> list[str]:
    """Return the paths, without a leading slash, that a busybox wants to be found at."""
    return programs.capture([str(busybox), "--list-full"]).split()

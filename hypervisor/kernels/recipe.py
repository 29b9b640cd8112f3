"""What every way of making a guest kernel has in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from hypervisor.kernels.progress import Progress

__all__ = ["Product", "Recipe", "sources"]

PACKAGE: Final = Path(__file__).resolve().parent.parent


def sources() -> Path:
    """Return the folder of guest sources and kernel fragments: in an installed package, else in the checkout."""
    installed = PACKAGE / "guest_kernels"
    return installed if installed.is_dir() else PACKAGE.parent / "guest-kernels"


class Product(NamedTuple):
    """What a recipe made in the folder that it was given.

    Attributes:
        version: of the software inside, for people.
        roles: paths inside the folder: "image" always; "vmlinux", "system_map", "config" and "modules"
            where there are any.
        notes: what there is to say about it.
    """

    version: str
    roles: dict[str, str]
    notes: list[str]


class Recipe(Protocol):
    """A way of making one guest kernel."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def kind(self) -> str:
        """Where it comes from: "package", "built" or "assembly"."""

    @property
    def summary(self) -> str:
        """One line."""

    @property
    def command_line(self) -> str:
        """The kernel's command line when the user gives none."""

    @property
    def flat(self) -> int | None:
        """16, 32 or 64 when the image is a flat binary for that mode."""

    @property
    def room(self) -> int:
        """Bytes of disk that making it takes at most, about."""

    def fingerprint(self) -> str:
        """Return a hash of what lies here (sources, options, the way it is made); needs no network."""

    def make(self, folder: Path, scratch: Path, progress: Progress) -> Product:
        """Make it in the empty `folder`, with the empty `scratch` for what is not kept.

        Raises:
            HostError: the host lacks a program, a package or the network.
            ConfigError: a source has a fault.
        """

    def latest(self, scratch: Path, progress: Progress) -> str:
        """Return the version that `make` would make now; may use the network."""

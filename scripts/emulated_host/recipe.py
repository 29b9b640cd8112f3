"""What the root image is made of, and where the result is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tomllib
from pathlib import Path
from typing import Final, NamedTuple

from emulated_host.errors import HostCannotError

VERSION: Final = 1
"""Raise this when the way an image is built changes, so that old ones are no longer taken."""

PACKAGES: Final = (
    *("python3", "busybox-static", "kmod", "ncurses-base", "libstdc++6"),
    *("e2fsprogs", "fio", "iperf3", "iproute2", "passt", "qemu-utils", "rng-tools5"),
)
"""Brought with whatever they depend on. kmod loads compressed modules too, wheels may link to libstdc++. The second row
is what the tests of disks and networks use, in the emulated host and, from the same disk, in its guests."""

KERNELS: Final = ("linux-image-cloud-amd64", "linux-image-virtual")
"""Kernel packages, the first that the distribution has is taken: Debian's, Ubuntu's."""

NOT_INSIDE: Final = frozenset({"build", "import-linter", "mypy", "ruff", "pytest-cov", "coverage"})
"""Development requirements that look at the sources only, or that count lines: nothing for an emulated host."""

INSIDE: Final = Path(__file__).parent / "inside"
"""What runs in the emulated host."""


class Recipe(NamedTuple):
    """Everything that decides what is in a root image."""

    distribution: str
    """ID and VERSION_ID of os-release, such as "debian 12"; the emulated host is the same distribution."""
    requirements: tuple[str, ...]
    """Python requirements, as pip takes them."""

    def key(self) -> str:
        """Return 16 hexadecimal digits that change with whatever decides the image's content."""
        parts = [VERSION, PACKAGES, KERNELS, *self, (INSIDE / "init").read_text()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def recipe_for(checkout: Path) -> Recipe:
    """Derive the recipe from this machine's distribution and the checkout's pyproject.toml.

    Raises:
        HostCannotError: this is no x86-64 Debian or relative.
    """
    return Recipe(_distribution(), tuple(python_requirements(checkout / "pyproject.toml")))


def _distribution() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    if not family & {"debian", "ubuntu"} or platform.machine() != "x86_64":
        name = release.get("PRETTY_NAME", platform.system())
        raise HostCannotError(
            f"needs an x86-64 Debian or Ubuntu to take its packages from; this is {name} on {platform.machine()}"
        )
    return f"{release['ID']} {release.get('VERSION_ID', 'rolling')}"


def python_requirements(pyproject: Path) -> list[str]:
    """Return what the package and its tests import: its dependencies and the development ones but NOT_INSIDE."""
    project = tomllib.loads(pyproject.read_text())["project"]
    wanted = [*project.get("dependencies", ())]
    wanted += project.get("optional-dependencies", {}).get("dev", ())
    return sorted(one for one in wanted if re.split(r"[^A-Za-z0-9._-]", one, maxsplit=1)[0].lower() not in NOT_INSIDE)


def user_cache() -> Path:
    """Return the folder of the user's caches: XDG_CACHE_HOME, or ~/.cache (XDG Base Directory Specification)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification tells to ignore a relative path.
    return Path(given) if given.startswith("/") else Path.home() / ".cache"


def cache_folder() -> Path:
    """Return the folder that holds the images, made if need be.

    Raises:
        HostCannotError: it cannot be made or written.
    """
    folder = user_cache() / "trapvisor" / "emulated-host"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostCannotError(
            f"cannot make {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder of yours"
        ) from None
    return folder

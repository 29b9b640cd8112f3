"""Fetching packages with the distribution's own client, without root and without touching the system's state.

apt resolves the dependencies for an empty system, so the set does not depend on what is installed here. The system's
package lists are used as they are; when they are missing or too old, a private copy is fetched and used instead.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from emulated_host.errors import HostCannotError, call, find_tool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

KERNEL_PART: Final = re.compile(r"linux-(image|modules)-\d")
"""The concrete kernel packages behind a metapackage: Debian has one, Ubuntu keeps the modules apart."""


class Apt:
    """apt on an imaginary empty system."""

    def __init__(self, state: Path) -> None:
        """Keep apt's state in the folder `state`, which is made."""
        (state / "cache" / "archives" / "partial").mkdir(parents=True)
        (state / "status").write_text("")
        self._state = state
        self._options = [
            f"-oDir::State::status={state}/status",
            f"-oDir::State::extended_states={state}/extended_states",
            f"-oDir::Cache={state}/cache",
            "-oDebug::NoLocking=1",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Retries=3",
        ]

    def update(self) -> None:
        """Fetch fresh package lists into the private state and use those from now on."""
        lists = self._state / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        self._options.append(f"-oDir::State::lists={lists}")
        call([find_tool("apt-get"), "-q", *self._options, "update"])

    def kernel_packages(self, candidates: Sequence[str]) -> list[str]:
        """Return the concrete packages of the first kernel metapackage that the distribution has.

        Raises:
            HostCannotError: it has none of them.
        """
        for candidate in candidates:
            found: list[str] = []
            waiting = self._depends(candidate)
            while waiting:
                name = waiting.pop()
                if KERNEL_PART.match(name) and name not in found:
                    found.append(name)
                    waiting += self._depends(name)
            if found:
                return sorted(found)
        raise HostCannotError(f"apt knows none of the kernel packages {', '.join(candidates)}")

    def _depends(self, package: str) -> list[str]:
        try:
            listing = call([find_tool("apt-cache"), *self._options, "depends", "--important", package])
        except HostCannotError:
            return []  # apt-cache fails on a name that it does not know
        return re.findall(r"^\s*\|?(?:Pre)?Depends: (\S+)$", listing, re.MULTILINE)

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """Download these packages and all that they depend on; return the .deb files."""
        archives = self._state / "cache" / "archives"
        options = ["-q", "-y", "--no-install-recommends", "--download-only"]
        call([find_tool("apt-get"), *self._options, *options, "install", *packages])
        return sorted(archives.glob("*.deb"))

    def fetch_alone(self, packages: Sequence[str], into: Path) -> list[Path]:
        """Download these packages without their dependencies into the folder `into`; return the .deb files."""
        into.mkdir()
        # `download` writes to the current folder, and to no other.
        script = 'cd "$1" && shift && exec "$@"'
        call(
            [
                "/bin/sh",
                "-c",
                script,
                "sh",
                str(into),
                find_tool("apt-get"),
                *self._options,
                "-q",
                "download",
                *packages,
            ]
        )
        return sorted(into.glob("*.deb"))


def fetch_all(state: Path, packages: Sequence[str], kernels: Sequence[str]) -> list[Path]:
    """Download the packages with their dependencies, and a kernel without them; return the .deb files.

    Raises:
        HostCannotError: the packages cannot be had, with fresh lists neither.
    """
    apt = Apt(state)
    try:
        return apt.fetch(packages) + apt.fetch_alone(apt.kernel_packages(kernels), state / "kernel")
    except HostCannotError:
        # Most often the lists are missing (a fresh container) or older than the archive.
        apt.update()
    return apt.fetch(packages) + apt.fetch_alone(apt.kernel_packages(kernels), state / "kernel-retried")

"""Fetching packages with apt, as any user, without installing them.

The system's package lists are used as they are. Where they are missing, or so old that the mirror no longer has what
they name, a private copy of the lists is fetched into the cache folder: that takes no rights, and the system's own
stay as they were. apt checks every package against the signed lists.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from hypervisor.errors import HostError
from hypervisor.kernels import programs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypervisor.kernels.progress import Progress

__all__ = ["Apt"]

NETWORK_HINT: Final = "is the network there? `apt-get update` as root shows what apt makes of its sources"
OPTIONS: Final = (
    "APT::Sandbox::User=root",  # as root, apt would switch to a user who cannot write in our folder
    "Debug::NoLocking=1",
    "Acquire::Retries=3",
    "Dir::Cache::pkgcache=pkgcache.bin",  # containers switch it off, and then every call reads all lists anew
    "Dir::Cache::srcpkgcache=srcpkgcache.bin",
)


class Apt:
    """The distribution's packages, as apt sees them."""

    def __init__(self, private: Path, progress: Progress) -> None:
        """Use the system's package lists; `private` is the folder for lists of our own, should they be needed.

        Raises:
            HostError: if this host has no apt.
        """
        absent = programs.missing(["apt-get", "apt-cache", "dpkg-deb"])
        if absent:
            raise HostError(
                f"{absent[0]} is not on this host: packages are fetched with the client of Debian and Ubuntu",
                hint="on another distribution give `hv run` the path of a kernel file, not a name",
            )
        self._private = private
        self._progress = progress
        (private / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        self._options = [f"-o{option}" for option in (*OPTIONS, f"Dir::Cache={private}/cache")]
        self._refreshed = False
        self._stanzas: dict[str, str] = {}

    def _refresh(self) -> None:
        """Fetch package lists of our own and use them from now on."""
        (self._private / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        self._options.append(f"-oDir::State::Lists={self._private}/lists")
        self._refreshed = True
        self._stanzas.clear()
        self._progress.begin("fetching the package lists")
        argv = ["apt-get", *self._options, "-q", "-o", "APT::Update::Error-Mode=any", "update"]
        programs.watch(argv, lambda: None, hint=NETWORK_HINT)

    def _stanza(self, package: str) -> str:
        """Return the record of the version of a package that would be fetched, or nothing."""
        if package not in self._stanzas:
            try:
                shown = programs.capture(["apt-cache", *self._options, "show", "--no-all-versions", package])
            except HostError:  # its answer to an unknown name
                shown = ""
            self._stanzas[package] = shown
        return self._stanzas[package]

    def find(self, *packages: str) -> str:
        """Return the first of `packages` that this distribution has.

        Raises:
            HostError: if it has none of them.
        """
        while True:
            for package in packages:
                if self._stanza(package):
                    return package
            if self._refreshed:
                raise HostError(f"this distribution has no package {' or '.join(packages)}", hint=NETWORK_HINT)
            self._refresh()

    def _field(self, package: str, field: str) -> str:
        found = re.search(rf"^{field}: (.*)$", self._stanza(package), re.MULTILINE)
        return found[1] if found else ""

    def version(self, package: str) -> str:
        """Return the version that would be fetched, or an empty string."""
        return self._field(package, "Version")

    def depends(self, package: str, prefix: str) -> list[str]:
        """Return the packages whose names start with `prefix` that `package` depends on, the first of alternatives."""
        first = [alternatives.split("|")[0].split() for alternatives in self._field(package, "Depends").split(",")]
        return [words[0] for words in first if words and words[0].startswith(prefix)]

    def _total(self, packages: list[str]) -> int:
        """Return the bytes that fetching `packages` takes."""
        listing = programs.capture(["apt-get", *self._options, "-q", "download", "--print-uris", *packages])
        return sum(int(size) for size in re.findall(r"^'\S+' \S+ (\d+)", listing, re.MULTILINE))

    def _download(self, packages: list[str], folder: Path) -> None:
        total = self._total(packages)
        self._progress.begin(f"fetching {', '.join(packages)}", total=total, unit="bytes")

        def look() -> None:
            self._progress.reach(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))

        argv = ["apt-get", *self._options, "-q", "download", *packages]
        programs.watch(argv, look, cwd=folder, hint=NETWORK_HINT)

    def fetch(self, choose: Callable[[], list[str]], folder: Path) -> list[Path]:
        """Fetch packages into the new `folder`; return their archives.

        Args:
            choose: names them; called again when the lists turn out to be old, as newer ones may name others.
            folder: where to.

        Raises:
            HostError: if one cannot be had.
        """
        folder.mkdir()
        try:
            self._download(choose(), folder)
        except HostError:
            if self._refreshed:
                raise
            self._refresh()
            for partial in folder.iterdir():
                partial.unlink()
            self._download(choose(), folder)
        return sorted(folder.glob("*.deb"))

    def unpack(self, choose: Callable[[], list[str]], folder: Path, into: Path) -> None:
        """Fetch packages as `fetch` does, and unpack their files under `into`."""
        for archive in self.fetch(choose, folder):
            self._progress.begin(f"unpacking {archive.name.partition('_')[0]}")
            programs.capture(["dpkg-deb", "-x", str(archive), str(into)])
            archive.unlink()

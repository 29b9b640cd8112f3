"""What this program says when it cannot go on, and how it calls other programs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

DEBIAN_PACKAGE: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "bochs-bin": "bochs",
    "xorriso": "xorriso",
    "objcopy": "binutils",
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}
"""The Debian package that brings each program used here."""


class UsageError(Exception):
    """The command line asks for something that cannot be. Status 2."""


class HostCannotError(Exception):
    """This machine cannot do it, or the emulated host failed. Status 3.

    Attributes:
        log: the last lines of what the failed program or the emulated kernel said; may be empty.
    """

    def __init__(self, message: str, log: str = "") -> None:
        """Say in one line what is wrong and what to do."""
        super().__init__(message)
        self.log = log


def say(text: str) -> None:
    """Print one line on stderr."""
    print(f"emulated-host: {text}", file=sys.stderr, flush=True)


def find_tool(name: str) -> str:
    """Return the path of a program, also from the sbin folders that a user's PATH may lack.

    Raises:
        HostCannotError: it is not installed; the message names the Debian package.
    """
    path = os.environ.get("PATH", os.defpath)
    found = shutil.which(name, path=f"{path}:/usr/sbin:/sbin")
    if found is None:
        package = DEBIAN_PACKAGE[name]
        raise HostCannotError(f"{name} is missing: install Debian's package {package} (apt-get install {package})")
    return found


def call(argv: Sequence[str | Path], *, env: dict[str, str] | None = None, tail: int = 15) -> str:
    """Run a program without input and return what it printed on stdout.

    Raises:
        HostCannotError: it failed; `log` holds the last `tail` lines of its stderr and stdout.
    """
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=env)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").splitlines()
        name = os.path.basename(argv[0])
        raise HostCannotError(f"{name} failed with status {done.returncode}", "\n".join(said[-tail:]))
    return done.stdout.decode(errors="replace")

"""A root file system for Linux guests: the disk that the emulated host itself has as its root.

It has Python, busybox, e2fsprogs, fio, iperf3, iproute2, rng-tools. Guests take it with an overlay: nothing is written.
"""

import os
import socket
from pathlib import Path

SHELL = "init=/bin/busybox -- sh"
"""End of a command line whose root file system is this one: a shell on the console."""


def root_disk():
    """Return the path of the disk: in the emulated host its own, elsewhere the newest image in the cache."""
    if socket.gethostname() == "emulated":
        words = Path("/proc/cmdline").read_text().split()
        return next(word.removeprefix("root=") for word in words if word.startswith("root="))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trapvisor" / "emulated-host"
    images = sorted(cache.glob("*/root.ext4"), key=lambda image: image.parent.stat().st_mtime)
    assert images, "no root disk: scripts/emulated-host --build-only makes one"
    return str(images[-1])

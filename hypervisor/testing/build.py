"""Compiles the guest's agent, freestanding C. Only the standard library is needed: setup.py runs this file.

The program's name has a hash of what it is made from, so that one of other sources is never taken for it.
"""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Final

__all__ = ["SOURCES", "argv", "beside", "name"]

SOURCES: Final = Path(__file__).resolve().parent / "agent"
OPTIONS: Final = (
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-ffreestanding", "-nostdlib", "-static"),
    *("-fno-pic", "-no-pie", "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    *("-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s"),
)


def name() -> str:
    """Return what the program of these sources is called."""
    digest = sha256(" ".join(OPTIONS).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.read_bytes())
    return f"agent-{digest.hexdigest()[:16]}"


def argv(target: Path) -> list[str]:
    """Return the compiler's command line that makes `target`."""
    return ["gcc", *OPTIONS, "-o", str(target), *(str(path) for path in sorted(SOURCES.glob("*.c")))]


def beside(folder: Path) -> None:
    """Compile it into `folder`, in place of earlier ones, unless it is there."""
    target = folder / name()
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(argv(target), check=True)
    for old in folder.glob("agent-*"):
        if old != target:
            old.unlink()

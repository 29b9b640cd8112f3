"""The second disk, made anew at every run: the checkout, the agent, and what `--with` names.

Its folders lie over the root disk's, so a file's place on it is its place inside.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Final

from emulated_host.errors import HostCannotError, UsageError
from emulated_host.ext4 import make_image
from emulated_host.recipe import INSIDE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from emulated_host.image import Image

CHECKOUT: Final = "checkout"
"""Where the checkout is inside, relative to the root."""

NOT_BROUGHT: Final = (
    *(".git", ".venv", "venv", ".tox", ".nox", "node_modules", "*.egg-info", ".coverage*", ".hypothesis"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".import_linter_cache"),
)
"""Names that stay outside, wherever in the checkout they are."""

NOT_BROUGHT_ON_TOP: Final = ("build", "dist")
"""Names that stay outside when they are in the checkout's top folder."""

HV: Final = '#!/bin/sh\nexec /usr/bin/python3 -m hypervisor "$@"\n'


def parse_with(text: str) -> tuple[Path, str]:
    """Split `SRC` or `SRC=DST` into what to bring and its absolute place inside.

    Raises:
        UsageError: there is no such file, or the place is not an absolute path.
    """
    source, separator, place = text.partition("=")
    if Path(text).exists() or not separator:
        source, place = text, str(Path(text).absolute())
    if not Path(source).exists():
        raise UsageError(f"--with {text}: there is no {source}")
    place = os.path.normpath(place)
    if not place.startswith("/") or place == "/":
        raise UsageError(f"--with {text}: the place inside must be an absolute path below /")
    return Path(source), place


def make_payload(image: Image, checkout: Path, extra: Sequence[tuple[Path, str]], work: Path) -> Path:
    """Lay out the second disk's content below the folder `work`, make the disk there and return its path.

    Args:
        image: the root image; its Python compiles the sources.
        checkout: the project.
        extra: pairs of what to bring and where it goes inside.
        work: an empty folder of this run's own, best on the cache's file system.

    Raises:
        HostCannotError: a file cannot be read, or the disk cannot be made.
    """
    layout = lay_out(image, checkout, extra, work)
    disk = work / "payload.ext4"
    make_image(layout, disk)
    shutil.rmtree(layout)
    return disk


def lay_out(
    image: Image, checkout: Path, extra: Sequence[tuple[Path, str]], work: Path, *, timeless: bool = False
) -> Path:
    """Lay out what every run brings in a folder below `work` and return that.

    Args:
        image: the root image; its Python compiles the sources.
        checkout: the project.
        extra: pairs of what to bring and where it goes inside.
        work: an empty folder of this run's own.
        timeless: compile so that the sources' times do not matter, for a file system that does not keep them.

    Raises:
        HostCannotError: a file cannot be read.
    """
    layout = work / "payload"
    version = image.facts["python"]
    try:
        _bring_checkout(checkout, layout / CHECKOUT, f"cpython-{version.replace('.', '')}")
        for source, place in extra:
            _bring(source, layout / place[1:])
        hv = layout / "usr/local/bin/hv"
        hv.parent.mkdir(parents=True, exist_ok=True)
        hv.write_text(HV)
        hv.chmod(0o755)
        agent = layout / "usr/lib/emulated-host"
        agent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSIDE / "agent.py", agent)
    except OSError as error:
        raise HostCannotError(f"cannot bring {error.filename}: {error.strerror}") from None
    _compile(image, layout, ("-f", "--invalidation-mode", "unchecked-hash") if timeless else ())
    return layout


def _bring_checkout(checkout: Path, target: Path, tag: str) -> None:
    """Copy the checkout without what is made from it; compiled Python files come when they are of the right version."""
    for path, folders, files in os.walk(checkout):
        here = Path(path)
        on_top = NOT_BROUGHT_ON_TOP if here == checkout else ()
        folders[:] = list(_brought(folders, on_top))
        there = target / here.relative_to(checkout)
        there.mkdir(parents=True)
        for name in _brought(files, on_top):
            if not name.endswith(".pyc") or name.endswith(f".{tag}.pyc"):
                _bring_file(here / name, there / name, link=False)
        for name in [name for name in folders if (here / name).is_symlink()]:
            _bring_file(here / name, there / name, link=False)
            folders.remove(name)


def _brought(names: Sequence[str], more: Sequence[str]) -> Iterator[str]:
    return (name for name in names if not any(fnmatch(name, pattern) for pattern in (*NOT_BROUGHT, *more)))


def _bring(source: Path, target: Path) -> None:
    """Bring a file, or a folder with all in it. A link named by the user means what it points to."""
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        _bring_file(source, target, link=True)
        return
    for path, folders, files in os.walk(source):
        there = target / Path(path).relative_to(source)
        there.mkdir(exist_ok=True)
        links = [name for name in folders if Path(path, name).is_symlink()]
        for name in files + links:
            _bring_file(Path(path, name), there / name, link=True)


def _bring_file(source: Path, target: Path, *, link: bool) -> None:
    """Bring one file, replacing what is there.

    Args:
        source: a link comes as the link that it is; sockets, pipes and devices mean nothing inside.
        target: its place in the layout.
        link: try a hard link first: nothing ever writes to it. It is quick, but changes the source's ctime, which
            git compares: not for the checkout.
    """
    status = source.lstat()
    target.unlink(missing_ok=True)
    if stat.S_ISLNK(status.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISREG(status.st_mode) and not (link and _hard_link(source, target)):
        shutil.copy2(source, target)


def _hard_link(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or not ours to link
        return False
    return True


def _compile(image: Image, layout: Path, options: Sequence[str]) -> None:
    """Compile the packages and the agent. Sources that do not compile are the command's affair, not ours."""
    python, environment = image.native_python()
    checkout = layout / CHECKOUT
    sources = [folder for folder in checkout.iterdir() if folder.is_dir() and (folder / "__init__.py").is_file()]
    agent = layout / "usr/lib/emulated-host/agent.py"
    common = [*python, "-m", "compileall", "-q", *options, "-s", str(layout), "-p", "/"]
    for argv in ([*common, *map(str, sources)], [*common, "-b", str(agent)]):
        subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if not agent.with_suffix(".pyc").is_file():
        raise HostCannotError(f"the image's Python does not run here; remove {image.folder} to have it built anew")

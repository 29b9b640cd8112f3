"""The cache folder: what was fetched or built once, published whole or not at all, and checked by hash.

`${XDG_CACHE_HOME:-~/.cache}/trapvisor/GROUP/NAME/` holds one folder for each version and a link, `current`, to the one
in use. A version is made in a work folder beside it, renamed, and then the link is replaced: whoever reads sees the
old one or the new one. One process at a time makes a thing; the others wait for its lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.kernels.progress import Progress

__all__ = ["Manifest", "Slot", "refusals", "root"]

SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
CURRENT: Final = "current"
WORK_PREFIX: Final = ".work-"


def root() -> Path:
    """Return the project's cache folder, which may not exist yet.

    A relative XDG_CACHE_HOME is ignored (XDG Base Directory Specification: all paths must be absolute).

    Raises:
        HostError: if there is neither XDG_CACHE_HOME nor a home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given.startswith("/"):
        return Path(given) / "trapvisor"
    try:
        return Path.home() / ".cache" / "trapvisor"
    except RuntimeError as error:
        raise HostError("there is no home folder to keep a cache in", hint="set XDG_CACHE_HOME") from error


@contextlib.contextmanager
def refusals(what: str, folder: Path) -> Iterator[None]:
    """Turn what the file system refuses while `what` is made in `folder` into a HostError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HostError(
                f"{what} cannot be written in {folder}: {error.strerror}", hint="free some, or set XDG_CACHE_HOME"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise HostError(
                f"{what} cannot be written in {folder}: {error.strerror}",
                hint="set XDG_CACHE_HOME to a folder of yours",
            ) from error
        raise


class FileRecord(NamedTuple):
    """What a file was when it was published. Times in whole seconds, as archives keep them."""

    sha256: str
    size: int
    mtime: int


class Manifest(NamedTuple):
    """What one published folder holds.

    Attributes:
        folder: the folder itself.
        version: of the software inside, for people.
        fingerprint: of the recipe it was made by; another recipe makes it out of date.
        roles: paths inside the folder by what they are for: "image", "vmlinux", "system_map", "config", "modules".
        notes: what there is to say about this build.
        files: every file, by its path inside the folder.
    """

    folder: Path
    version: str
    fingerprint: str
    roles: dict[str, str]
    notes: list[str]
    files: dict[str, FileRecord]

    def role(self, name: str) -> Path | None:
        """Return the path that has this role, or None."""
        inside = self.roles.get(name)
        return None if inside is None else self.folder / inside

    @property
    def size(self) -> int:
        """All files together, in bytes."""
        return sum(record.size for record in self.files.values())

    def damage(self, *, deep: bool) -> list[str]:
        """Return the files that are not what was published, sorted.

        Args:
            deep: hash every file; otherwise only the files with a role are looked at, and hashed only where the time
                differs (copying a cache changes times, not contents).
        """
        wanted = self.files if deep else [inside for inside in self.roles.values() if inside in self.files]
        return sorted(inside for inside in wanted if not self._intact(inside, deep=deep))

    def _intact(self, inside: str, *, deep: bool) -> bool:
        record = self.files[inside]
        path = self.folder / inside
        try:
            found = path.stat()
            if found.st_size != record.size:
                return False
            return (not deep and int(found.st_mtime) == record.mtime) or _sha256(path) == record.sha256
        except OSError:
            return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_files(folder: Path) -> dict[str, FileRecord]:
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found = path.stat()
            records[str(path.relative_to(folder))] = FileRecord(_sha256(path), found.st_size, int(found.st_mtime))
    return records


class Slot:
    """The place of one named thing in the cache."""

    def __init__(self, group: str, name: str) -> None:
        """Take the place of `name` among its `group` ("kernels", "tools"); nothing is created."""
        self.name = name
        self.folder = root() / group / name

    def current(self) -> Manifest | None:
        """Return what is published, or None when nothing is, or nothing that can be read."""
        try:
            folder = self.folder / (self.folder / CURRENT).readlink()
            found: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
            if found["schema"] != SCHEMA:
                return None
            files = {inside: FileRecord(*record) for inside, record in found["files"].items()}
            return Manifest(
                folder, found["version"], found["fingerprint"], dict(found["roles"]), list(found["notes"]), files
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @contextlib.contextmanager
    def locked(self, progress: Progress) -> Iterator[None]:
        """Hold the right to change this place; wait while another process has it. The kernel frees it on any death."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.begin(f"{self.name}: another process is getting it; waiting")
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """Yield an empty folder on the cache's file system, gone afterwards. To be called under the lock."""
        from shutil import rmtree  # noqa: PLC0415 - what is in the cache already is found without it

        for stale in self.folder.glob(f"{WORK_PREFIX}*"):  # of a process that was killed: its lock is ours now
            rmtree(stale, ignore_errors=True)
        work = self.folder / f"{WORK_PREFIX}{os.getpid()}"
        work.mkdir()
        try:
            yield work
        finally:
            rmtree(work, ignore_errors=True)

    def publish(
        self, made: Path, *, version: str, fingerprint: str, roles: dict[str, str], notes: list[str]
    ) -> Manifest:
        """Make folder `made`, which is inside a workspace, the current one, and remove those before it."""
        files = _record_files(made)
        manifest = {
            "schema": SCHEMA,
            "name": self.name,
            "version": version,
            "fingerprint": fingerprint,
            "roles": roles,
            "notes": notes,
            "files": files,
        }
        from shutil import rmtree  # noqa: PLC0415 - see above

        (made / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
        made.chmod(0o755)
        key = self._free_key(version, fingerprint)
        made.rename(self.folder / key)
        link = made.with_name("link")
        link.symlink_to(key)
        link.replace(self.folder / CURRENT)
        for other in self.folder.iterdir():
            if other.name not in (CURRENT, key, made.parent.name) and other.is_dir():
                rmtree(other, ignore_errors=True)
        return Manifest(self.folder / key, version, fingerprint, roles, notes, files)

    def _free_key(self, version: str, fingerprint: str) -> str:
        """Return a folder name for a version made by a recipe; a damaged one of the same name may be there still."""
        short = fingerprint[:12]
        key = (short if fingerprint.startswith(version) else f"{version}-{short}").replace("/", "_")
        candidates = (key, *(f"{key}.{count}" for count in range(1, 1000)))
        return next(name for name in candidates if not (self.folder / name).exists())

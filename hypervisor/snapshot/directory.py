"""A directory that appears, or takes another's place, as a whole: whenever the process ends, one of the two is there.

It is filled under the name `.NAME.<16 hex digits>.part` beside the place where it is to be, and locked (flock) for as
long as its process lives, so that what a killed save has left can be told from one that goes on, and is removed by the
next. An old snapshot of the same name is exchanged for it in one step (renameat2, RENAME_EXCHANGE: ext4, XFS, btrfs,
tmpfs, overlayfs and others). On a file system without that step the old one is moved to `.NAME.<digits>.old` first: a
process that is killed between the two renames leaves it there, whole, and the next save brings it back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING, Final

from hypervisor.errors import SaveError, SnapshotError
from hypervisor.snapshot.manifest import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Staging", "fsync", "leftovers", "remove_tree"]

AT_FDCWD: Final = -100
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
WITHOUT: Final = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
"""What renameat2 answers where the kernel, the C library or the file system does not know the flag."""
MODE: Final = 0o700
"""A snapshot has the guest's secrets in it."""
TRIES: Final = 100


class Staging:
    """A directory that is being filled.

    Attributes:
        target: where it is to be.
        path: where it is now.
    """

    def __init__(self, target: str) -> None:
        """Make it beside `target`, and remove what killed saves to there have left.

        Raises:
            SnapshotError: `target` is something else than a snapshot, or in no directory.
            SaveError: the host refuses.
        """
        self.target = os.path.realpath(target)
        self._shown = target
        _check_target(self.target, target)
        try:
            _clean(self.target)
            self._fd, self.path = _make(self.target)
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error: OSError) -> SaveError:
        """Return the error for what the host did not take."""
        hints = {
            errno.ENOSPC: "free some space, or save to another file system; what was there before is as it was",
            errno.EDQUOT: "free some of your quota, or save elsewhere; what was there before is as it was",
            errno.EACCES: "save into a directory of yours",
            errno.EPERM: "save into a directory of yours",
            errno.EROFS: "save to another file system",
            errno.ENAMETOOLONG: "a shorter name does",
        }
        return SaveError(f"cannot save {self._shown}", hint=hints.get(error.errno or 0))

    def commit(self) -> None:
        """Put it in its place, for good: its files have been written and synced.

        Raises OSError or SnapshotError; then what was there before is there again.
        """
        fsync(self._fd)
        old = None
        try:
            _rename(self.path, self.target, RENAME_NOREPLACE)
        except FileExistsError:
            _check_target(self.target, self._shown)
            old = self._exchange()
        try:
            _fsync_path(os.path.dirname(self.target))
        except OSError:
            self._take_back(old)
            raise
        self.path = self.target
        if old is not None:
            remove_tree(old)

    def _exchange(self) -> str:
        """Change places with what is there; return where that is now."""
        try:
            _rename(self.path, self.target, RENAME_EXCHANGE)
        except OSError as error:
            if error.errno not in WITHOUT:
                raise
            return self._move_aside()
        return self.path

    def _move_aside(self) -> str:
        old = self.path.removesuffix(".part") + ".old"
        lock = os.open(self.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # so that nobody brings it back meanwhile
            os.rename(self.target, old)
            try:
                os.rename(self.path, self.target)
            except OSError:
                os.rename(old, self.target)
                raise
        finally:
            os.close(lock)
        return old

    def _take_back(self, old: str | None) -> None:
        """Undo the renames: the disk did not take them."""
        if old == self.path:
            _rename(self.path, self.target, RENAME_EXCHANGE)
            return
        os.rename(self.target, self.path)
        if old is not None:
            os.rename(old, self.target)

    def close(self) -> None:
        """Give the lock back; remove the directory unless it has been committed."""
        if self._fd >= 0:
            if self.path != self.target:
                remove_tree(self.path)
            os.close(self._fd)
            self._fd = -1


def _check_target(target: str, shown: str) -> None:
    """Refuse a place that is taken by something else than a snapshot."""
    parent = os.path.dirname(target)
    try:
        is_folder = stat.S_ISDIR(os.stat(parent).st_mode)
    except OSError as error:
        raise SnapshotError(
            f"cannot save {shown} in {parent}", hint="name a place in a directory that exists"
        ) from error
    if not is_folder:
        raise SnapshotError(f"cannot save {shown}: {parent} is a file", hint="name a place in a directory")
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise SnapshotError(f"cannot save {shown}: it is a file", hint="a snapshot is a directory: name another place")
    try:
        is_ours = os.path.lexists(os.path.join(target, MANIFEST)) or not os.listdir(target)
    except OSError as error:
        raise SaveError(f"cannot save {shown}", hint="save into a directory of yours") from error
    if not is_ours:
        raise SnapshotError(
            f"cannot save {shown}: it is a directory, and no snapshot", hint="name another place; nothing was changed"
        )


def _make(target: str) -> tuple[int, str]:
    """Make a locked directory beside `target`; return its file descriptor and its path."""
    folder, name = os.path.split(target)
    for _ in range(TRIES):
        path = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.part")
        os.mkdir(path, MODE)
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd, path
        except (BlockingIOError, FileNotFoundError):
            pass  # somebody who cleans up was quicker than the lock
        except BaseException:
            if fd >= 0:
                os.close(fd)
            os.rmdir(path)
            raise
        if fd >= 0:
            os.close(fd)
    raise FileExistsError(errno.EEXIST, "somebody removes what is made", target)


def leftovers(target: str) -> Iterator[str]:
    """Yield what saves to `target` have left beside it, or are about to fill."""
    folder, name = os.path.split(os.path.realpath(target))
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.(part|old)")
    with os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                yield entry.path


def _clean(target: str) -> None:
    """Remove what killed saves have left, and bring back an old snapshot whose successor never came."""
    for path in list(leftovers(target)):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone, or not ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.endswith(".old") and not os.path.lexists(target):
                os.rename(path, target)
            elif os.path.samestat(os.fstat(fd), os.stat(path)):
                remove_tree(path)
        except OSError:
            pass  # a save that goes on, or gone
        finally:
            os.close(fd)


def remove_tree(path: str) -> None:
    """Remove a directory with its files; what cannot be removed stays for the next save."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def fsync(fd: int) -> None:
    """Wait until a file is on its disk; raises OSError, but for a file system that knows no such thing."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise


def _fsync_path(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd)
    finally:
        os.close(fd)


def _rename(source: str, target: str, flags: int) -> None:
    """Rename by renameat2; without RENAME_NOREPLACE there, a plain rename, which replaces an empty directory only."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    try:
        call = library.renameat2
    except AttributeError:  # a C library older than glibc 2.28
        number = errno.ENOSYS
    else:
        failed = call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags)
        number = ctypes.get_errno() if failed else 0
    if number in WITHOUT and flags == RENAME_NOREPLACE:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target)
    elif number:
        raise OSError(number, os.strerror(number), target)

"""Writing the archives that Linux unpacks its first root file system from.

The format is "newc" as the kernel's "initramfs buffer format" document has it
(Documentation/driver-api/early-userspace/buffer-format.rst): a header of 110 ASCII characters, the name, the data, both
padded to four bytes. The same entries give the same bytes: all times are 0, everything belongs to root, inode numbers
count up.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["CpioWriter"]

MAGIC: Final = b"070701"
TRAILER: Final = "TRAILER!!!"
MAX_SIZE: Final = 0xFFFF_FFFF
"""The field of a file's size has eight hexadecimal digits."""


class CpioWriter:
    """A newc archive in the making. A folder must be added before what is in it: the kernel makes no parents."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        """Hand the archive's bytes to `write`, in order."""
        self._write = write
        self._inode = 0

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder; `name` is a path without a leading slash."""
        self._header(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file.

        Raises:
            ValueError: if it has 4 GiB or more, which the format cannot hold.
        """
        self.stream(name, len(data), (data,), mode)

    def stream(self, name: str, size: int, chunks: Iterable[bytes], mode: int = 0o644) -> None:
        """Add a regular file of `size` bytes that come in `chunks`.

        Raises:
            ValueError: if it has 4 GiB or more, or the chunks are not `size` bytes; the archive is spoilt then.
        """
        self._header(name, stat.S_IFREG | mode, _checked(name, size))
        seen = 0
        for chunk in chunks:
            seen += len(chunk)
            if seen > size:
                break
            self._write(chunk)
        if seen != size:
            raise ValueError(f"{name} changed its size while it was read")
        self._write(bytes(-size % 4))

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link to `target`."""
        data = target.encode("utf-8", "surrogateescape")
        self._header(name, stat.S_IFLNK | 0o777, len(data))
        self._write(data + bytes(-len(data) % 4))

    def character_device(self, name: str, major: int, minor: int, mode: int) -> None:
        """Add the node of a character device."""
        self._header(name, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> None:
        """Write the end of the archive."""
        self._inode = -1
        self._header(TRAILER, 0)

    def _header(self, name: str, mode: int, size: int = 0, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        path = name.encode("utf-8", "surrogateescape") + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        # c_ino c_mode c_uid c_gid c_nlink c_mtime c_filesize c_maj c_min c_rmaj c_rmin c_namesize c_chksum
        fields = (self._inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(path), 0)
        header = MAGIC + b"".join(b"%08X" % field for field in fields) + path
        self._write(header + bytes(-len(header) % 4))


def _checked(name: str, size: int) -> int:
    if size > MAX_SIZE:
        raise ValueError(f"{name} has {size} bytes; a cpio archive holds files of less than 4 GiB")
    return size

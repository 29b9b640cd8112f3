"""A link: a switch that joins machines, of one process or of several, without a process of its own.

Every member binds a datagram socket in the link's folder, one datagram is one frame. A member sends a frame straight to
the member that has its destination's address, as it learned it from frames, and to all of them where it knows none. So
no member depends on another one: what a killed one leaves behind is removed by whoever finds nobody there, and one that
does not read loses its own frames only.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Link"]

BUFFER: Final = 1 << 20
"""Bytes of frames that wait in one member's socket."""
MAX_ADDRESSES: Final = 4096
"""Stations that a member remembers; when there are more it begins anew."""
NAME_MAX: Final = 32
PATH_MAX: Final = 107
"""Bytes that a unix socket's path may have."""
ETHERNET: Final = 14


def folder_of(name: str) -> str:
    """Return the folder of a link, made if need be, that only this user can use; raises BackendError."""
    if (
        not name
        or len(name) > NAME_MAX
        or not all(letter.isalnum() or letter in "-_." for letter in name)
        or name[0] == "."
    ):
        raise BackendError(f"{name!r} is no name of a link", hint=f"1 to {NAME_MAX} letters, digits, '-', '_' and '.'")
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/trapvisor-{os.getuid()}"  # noqa: S108 - its owner is checked
    path = os.path.join(base, "trapvisor-links", name)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        for folder in (os.path.dirname(path), path):
            status = os.lstat(folder)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise BackendError(f"{folder} is not a folder of yours alone", hint=f"`rm -r {folder}`")
    except OSError as error:
        raise BackendError(f"link {name}: {path}: {error.strerror}") from error
    return path


class Link:
    """A member of a link. See `devices.backends.net.NetBackend`."""

    header_size = 0
    offered = 0
    plain_fd = None

    def __init__(self, name: str) -> None:
        """Join the link called `name`; raises BackendError when that cannot be done."""
        self._folder = folder_of(name)
        self._own = f"{os.getpid()}-{os.urandom(4).hex()}"
        self._addresses: dict[bytes, str] = {}
        path = os.path.join(self._folder, self._own)
        if len(os.fsencode(path)) > PATH_MAX:
            raise BackendError(
                f"link {name}: {path} is longer than {PATH_MAX} bytes", hint="set XDG_RUNTIME_DIR to a shorter folder"
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            self._socket.bind(path)
        except OSError as error:
            self._socket.close()
            raise BackendError(f"link {name}: {path}: {error.strerror}") from error

    def fileno(self) -> int:
        """Return the socket."""
        return self._socket.fileno()

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Send one frame to whom it is for."""
        frame = b"".join(buffers)
        if len(frame) < ETHERNET:
            return False
        member = self._addresses.get(frame[:6])
        if member is not None:
            return self._send_to(member, frame)
        sent = False
        for name in os.listdir(self._folder):
            if name != self._own:
                sent |= self._send_to(name, frame)
        return sent

    def _send_to(self, member: str, frame: bytes) -> bool:
        path = os.path.join(self._folder, member)
        try:
            self._socket.sendto(frame, path)
        except (ConnectionRefusedError, FileNotFoundError):
            self._forget(member, path)
            return False
        except OSError:  # its buffer is full: the frame is lost, as on a busy switch
            return False
        return True

    def _forget(self, member: str, path: str) -> None:
        """Remove what a member that is gone has left."""
        self._addresses = {address: other for address, other in self._addresses.items() if other != member}
        try:
            os.unlink(path)
        except OSError:
            pass  # somebody else has done it

    def receive(self, buffer: memoryview) -> int | None:
        """Take the next frame, and learn who has its source's address."""
        try:
            size, source = self._socket.recvfrom_into(buffer)
        except BlockingIOError:
            return None
        if size < ETHERNET:
            return self.receive(buffer)
        address = bytes(buffer[6:12])
        if source and not address[0] & 1:
            if len(self._addresses) >= MAX_ADDRESSES:
                self._addresses.clear()
            self._addresses[address] = os.path.basename(source)
        return size

    def set_offloads(self, features: int) -> None:
        """Do nothing: there are none."""

    def close(self) -> None:
        """Leave the link."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            try:
                os.unlink(os.path.join(self._folder, self._own))
                os.rmdir(self._folder)
            except OSError:
                pass  # others are still there

"""The connection between the two ends of a migration: frames, addresses, TLS.

A frame is a header (`HEADER`: kind, length of its form, length of its data), a form (MessagePack) and data. The other
end is not trusted: lengths are bounded before anything is allotted, and pages go only where RAM is.
"""

from __future__ import annotations

import os
import socket
import ssl
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.errors import ConfigError, VmmError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Frame", "Kind", "Listener", "MigrationError", "Tls", "Wire", "connect"]

VERSION: Final = 1
MAGIC: Final = b"HVM1"
HEADER: Final = Struct("<4sIQQ")
"""Magic, kind, length of the form, length of the data."""
MOST_FORM: Final = 64 << 20
"""Bytes of a form: a machine's state with 255 vCPUs is below 8 MiB."""
MOST_DATA: Final = 64 << 20
SECONDS: Final = 20.0
"""An end that does not send or take anything for so long is gone."""


class MigrationError(VmmError):
    """A migration failed. The message says at which end, and who has the machine.

    Attributes:
        is_certain: False: the source let go, and cannot know whether the target took over; or the guest is lost.
    """

    status = 3

    def __init__(self, message: str, *, hint: str | None = None, is_certain: bool = True) -> None:
        """Say what is wrong."""
        super().__init__(message, hint=hint)
        self.is_certain = is_certain


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1
    """Source: version, the machine's description, what the host must have."""
    READY = 2
    """Target: the machine is built."""
    REFUSED = 3
    """Either: why not; the last frame."""
    PAGES = 4
    """Source: runs of pages (first, count), and their content."""
    DISK = 5
    """Source: name and offset; the data of a disk."""
    STATE = 6
    """Source: what `Machine.capture` returned; with post-copy, the pages that are still to come."""
    LOADED = 7
    """Target: everything is in place."""
    GO = 8
    """Source: the machine is yours."""
    MINE = 9
    """Target: its first instruction comes after this frame."""
    PAGER = 10
    """Source, post-copy: the first word of its second connection, over which pages come one by one (kvm/pager.h)."""


class Frame(NamedTuple):
    """A frame, its data still to be read."""

    kind: Kind
    form: dict[str, Any]
    size: int


class Tls(NamedTuple):
    """Certificates for a connection over TCP: both ends show one, signed by the same authority.

    Attributes:
        authority: file of the authority's certificate.
        certificate, key: files of this end's own.
    """

    authority: str
    certificate: str
    key: str

    def context(self, *, is_server: bool) -> ssl.SSLContext:
        """Return what a connection needs; raises ConfigError when a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        for path in self:
            if not os.path.isfile(path):
                raise ConfigError(f"there is no file {path}", hint="--tls AUTHORITY,CERTIFICATE,KEY: three PEM files")
        try:
            context.load_verify_locations(self.authority)
            context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"TLS: {error.strerror or error}", hint=f"the files are {', '.join(self)}") from error
        return context


class Wire:
    """One end of a connection. Not for several threads at once, but one may send while another receives.

    Attributes:
        family: AF_UNIX or AF_INET.
        sent: bytes, so far.
    """

    def __init__(self, connection: socket.socket, *, seconds: float = SECONDS) -> None:
        """Take over a connected socket; an end that is silent for `seconds` while it is waited for is gone."""
        self._socket = connection
        self._socket.settimeout(seconds)
        self.family = connection.family
        self.sent = 0

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the socket."""
        return self._socket.fileno()

    def detach(self) -> socket.socket:
        """Return the socket for words of another kind; the wire is of no more use."""
        seconds = self._socket.gettimeout()
        connection = socket.socket(self.family, socket.SOCK_STREAM, fileno=self._socket.detach())
        connection.settimeout(seconds)
        return connection

    def send(self, kind: Kind, form: dict[str, Any] | None = None, data: Sequence[memoryview] = ()) -> None:
        """Send a frame, its data in pieces; raises OSError."""
        import msgspec  # noqa: PLC0415 - for those who migrate

        encoded = msgspec.msgpack.encode(form or {})
        size = sum(map(len, data))
        self._socket.sendall(HEADER.pack(MAGIC, kind, len(encoded), size) + encoded)
        for piece in data:
            self._socket.sendall(piece)
        self.sent += HEADER.size + len(encoded) + size

    def receive(self) -> Frame:
        """Return the next frame; `read_into` takes its data.

        Raises:
            EOFError: the other end has hung up between two frames.
            MigrationError: what came is no frame.
            OSError: the connection broke.
        """
        import msgspec  # noqa: PLC0415 - as above

        header = bytearray(HEADER.size)
        if not self._fill(memoryview(header), may_end=True):
            raise EOFError
        magic, number, length, size = HEADER.unpack(header)
        if magic != MAGIC or number not in Kind._value2member_map_ or length > MOST_FORM or size > MOST_DATA:
            raise MigrationError("the other end does not speak this protocol")
        encoded = bytearray(length)
        self._fill(memoryview(encoded))
        try:
            form = msgspec.msgpack.decode(encoded, type=dict[str, Any])
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            raise MigrationError(f"the other end sent what is no message: {error}") from error
        return Frame(Kind(number), form, size)

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with data of the frame that came last; raises OSError, EOFError."""
        self._fill(view)

    def _fill(self, view: memoryview, *, may_end: bool = False) -> bool:
        done = 0
        while done < len(view):
            got = self._socket.recv_into(view[done:])
            if not got:
                if may_end and not done:
                    return False
                raise ConnectionResetError("the other end hung up in the middle of a frame")
            done += got
        return True


# --- addresses ----------------------------------------------------------------------------------------------------


def _parse(address: str) -> tuple[int, Any]:
    """Return the socket family and address of "unix:PATH" or "tcp:HOST:PORT"."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and port.isdecimal() and int(port) <= 0xFFFF:
        return socket.AF_INET, (host.strip("[]") or "127.0.0.1", int(port))
    raise ConfigError(f"{address!r} is no address", hint="it is unix:PATH or tcp:HOST:PORT")


def connect(address: str, *, tls: Tls | None = None, seconds: float = SECONDS) -> Wire:
    """Connect to a target that listens at `address`.

    Raises:
        ConfigError: the address, or a file for TLS, is none.
        MigrationError: nobody listens there, or it is not who it should be.
    """
    family, where = _parse(address)
    context = None if tls is None else tls.context(is_server=False)
    try:
        if family == socket.AF_UNIX:
            connection = socket.socket(family)
            connection.settimeout(seconds)
            try:
                connection.connect(where)
            except OSError:
                connection.close()
                raise
        else:
            connection = socket.create_connection(where, seconds)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                connection = context.wrap_socket(connection, server_hostname=where[0])
    except OSError as error:
        hint = f"`hv migrate receive {address}` listens there"
        raise MigrationError(f"cannot connect to {address}: {error.strerror or error}", hint=hint) from error
    return Wire(connection, seconds=seconds)


class Listener:
    """Where a target waits for one source.

    Attributes:
        address: as it was given, with the port that was taken if that was 0.
    """

    def __init__(self, address: str, *, tls: Tls | None = None) -> None:
        """Listen; raises ConfigError when the address cannot be used."""
        family, where = _parse(address)
        self._context = None if tls is None else tls.context(is_server=True)
        self._path = where if family == socket.AF_UNIX else None
        try:
            if family == socket.AF_UNIX:
                self._socket = socket.socket(family)
                try:
                    self._socket.bind(where)
                    os.chmod(where, 0o600)
                    self._socket.listen(1)
                except OSError:
                    self._socket.close()
                    raise
                self.address = address
            else:
                self._socket = socket.create_server(where, backlog=1)
                self.address = f"tcp:{where[0]}:{self._socket.getsockname()[1]}"
        except OSError as error:
            raise ConfigError(f"cannot listen at {address}: {error.strerror}") from error

    def accept(self, timeout: float | None = None) -> Wire:
        """Wait for a source; raises TimeoutError, or MigrationError for one that is not who it should be."""
        self._socket.settimeout(timeout)
        connection, _ = self._socket.accept()
        if self._path is None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                connection.settimeout(SECONDS)
                try:
                    connection = self._context.wrap_socket(connection, server_side=True)
                except OSError as error:
                    raise MigrationError(f"the source is not who it should be: {error}") from error
        return Wire(connection)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        if self._path is not None:
            try:
                os.unlink(self._path)
            except OSError:
                pass  # somebody tidied up

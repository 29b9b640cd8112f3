"""Networking without root, through Debian's passt: it speaks Ethernet to us and uses plain sockets of the host.

Frames go over a stream socket, each behind its length, 32 bits big-endian. The guest gets the host's own address and
routes by DHCP; the host is reached at the address of the gateway.

The passt of Debian 12 (2023-03-09) resets a connection that the guest has opened and on which the other side sends
nothing for some 16 seconds, in the middle of a long upload too. Later ones do not.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
from errno import EACCES, EADDRINUSE, EPIPE
from struct import pack, unpack_from
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Passt"]

MAX_FRAME: Final = 65535 + 14 + 4
READ: Final = 1 << 17
START_SECONDS: Final = 0.5
"""How long a passt that cannot work may take to say so."""
HINTS: Final = {
    "No routable interface": "the host needs an interface with an address and a default route",
    "Failed to bind": "a forwarded port of the host is in use, or below 1024 and not yours",
    "ports": "a forwarded port of the host is in use, or below 1024 and not yours",
}


def refuse_taken_ports(forwards: Sequence[tuple[int, int, str]]) -> None:
    """Raise BackendError for a port of the host that is not free: passt goes on without it and says nothing."""
    for port, _, protocol in forwards:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                _bind(family, port, protocol)
            except OSError as error:
                if error.errno == EADDRINUSE:
                    hint = f"forward another one, or end who has it: `ss -lnp 'sport = {port}'`"
                    raise BackendError(f"port {port}/{protocol} of the host is in use", hint=hint) from None
                if error.errno == EACCES:
                    hint = "forward one from 1024 on"
                    raise BackendError(f"port {port}/{protocol} of the host is not yours", hint=hint) from None
                # what is left is a family that this host does not have


def _bind(family: socket.AddressFamily, port: int, protocol: str) -> None:
    """Bind the port for a moment; raises OSError when that cannot be done."""
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol == "tcp":  # a connection that lingers is no listener
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))


class Passt:
    """A user network. See `devices.backends.net.NetBackend`."""

    header_size = 0
    offered = 0
    plain_fd = None

    def __init__(self, forwards: Sequence[tuple[int, int, str]] = ()) -> None:
        """Start passt with ports of the host that lead to the guest; raises BackendError when that cannot be done."""
        program = shutil.which("passt")
        if program is None:
            raise BackendError("there is no passt", hint="`sudo apt-get install passt` brings it")
        refuse_taken_ports(forwards)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unsent = b""
        self._received = bytearray()
        self._is_gone = False
        words = [program, "--foreground", "--quiet", "--stderr", "--fd", str(theirs.fileno())]
        for option, protocol in (("--tcp-ports", "tcp"), ("--udp-ports", "udp")):
            ports = ",".join(f"{host}:{guest}" for host, guest, kind in forwards if kind == protocol)
            words += [option, ports or "none"]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C on our terminal is the guest's
                )
            self._check_start()
        except OSError as error:
            self._socket.close()
            raise BackendError(f"{program}: {error.strerror}") from error
        self._socket.setblocking(False)

    def _check_start(self) -> None:
        """Give it a moment to say what it lacks."""
        pipe = self._process.stderr
        if pipe is None:
            return
        fd = pipe.fileno()
        os.set_blocking(fd, False)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        poll.poll(int(START_SECONDS * 1000))
        try:
            self._process.wait(0.05)
        except subprocess.TimeoutExpired:
            return
        said = os.read(fd, 4096).decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"status {self._process.returncode}"
        hint = next((hint for words, hint in HINTS.items() if any(words in line for line in said)), "")
        self.close()
        raise BackendError(f"passt ended: {why}", hint=hint)

    def fileno(self) -> int:
        """Return the socket."""
        return self._socket.fileno()

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Send one frame; it is dropped while passt does not read."""
        if self._is_gone or not self._flush():
            return False
        frame = b"".join(buffers)
        self._unsent = pack(">I", len(frame)) + frame
        before = len(self._unsent)
        self._flush()
        if len(self._unsent) == before:  # not a byte was taken: it can still be dropped whole
            self._unsent = b""
            return False
        return True

    def _flush(self) -> bool:
        """Send what is left of a frame; return whether nothing is."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._is_gone = True
        return not self._unsent

    def receive(self, buffer: memoryview) -> int | None:
        """Take the next frame; raises OSError when passt is gone."""
        while True:
            if len(self._received) >= 4:
                (size,) = unpack_from(">I", self._received)
                if not 0 < size <= MAX_FRAME:
                    raise ConnectionError(EPIPE, f"passt sent a frame of {size} bytes")
                if len(self._received) >= 4 + size:
                    buffer[:size] = self._received[4 : 4 + size]
                    del self._received[: 4 + size]
                    return int(size)
            try:
                data = self._socket.recv(READ)
            except BlockingIOError:
                return None
            if not data:
                raise ConnectionError(EPIPE, "passt has ended")
            self._received += data

    def set_offloads(self, features: int) -> None:
        """Do nothing: there are none."""

    def close(self) -> None:
        """End passt."""
        self._socket.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

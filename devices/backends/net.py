"""What a network interface stands on: frames in, frames out; and how to open one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from devices.events import EventLog

__all__ = ["MAX_FRAME", "NetBackend", "Nowhere", "open_backend"]

MAX_FRAME: Final = 65535 + 14 + 4
"""Bytes of the longest frame: an IP packet of the largest size in Ethernet with a VLAN tag."""


class NetBackend(Protocol):
    """A network.

    Attributes:
        header_size: bytes of struct virtio_net_hdr before every frame: 12, or 0 where there is none.
        offered: VIRTIO_NET_F_ bits that it makes possible.
        plain_fd: a file of which one read or write is one frame, so that others may move frames; or None.
    """

    @property
    def header_size(self) -> int: ...  # noqa: D102 - see Attributes
    @property
    def offered(self) -> int: ...  # noqa: D102
    @property
    def plain_fd(self) -> int | None: ...  # noqa: D102

    def fileno(self) -> int:
        """Return what becomes readable when `receive` may have a frame; -1 when that never happens."""

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Send one frame; False when it was dropped. Never blocks."""

    def receive(self, buffer: memoryview) -> int | None:
        """Put the next frame into `buffer` and return its length; None: there is none. OSError: the network is gone."""

    def set_offloads(self, features: int) -> None:
        """Take notice of the features that the driver chose."""

    def close(self) -> None:
        """Close every file; harmless when done already."""


class Nowhere:
    """A network whose cable leads nowhere."""

    header_size = 0
    offered = 0
    plain_fd = None

    def fileno(self) -> int:
        """Return no descriptor."""
        return -1

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Drop the frame."""
        del buffers
        return False

    def receive(self, buffer: memoryview) -> int | None:
        """Receive nothing."""
        del buffer
        return None

    def set_offloads(self, features: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_backend(
    kind: str, name: str = "", *, forwards: Sequence[tuple[int, int, str]] = (), pcap: str | None = None, log: EventLog
) -> NetBackend:
    """Open a network.

    Args:
        kind: "tap", "user", "link", "switch" or "none".
        name: the TAP's or the link's; of a switch NETWORK/PORT.
        forwards: with "user", ports of the host that lead to the guest: host port, guest port, "tcp" or "udp".
        pcap: file to capture every frame in.
        log: for what goes wrong later.

    Raises:
        BackendError: it cannot be used.
    """
    backend: NetBackend
    if kind == "tap":
        from devices.backends.tap import Tap

        backend = Tap(name)
    elif kind == "user":
        from devices.backends.passt import Passt

        backend = Passt(forwards)
    elif kind == "link":
        from devices.backends.link import Link

        backend = Link(name)
    elif kind == "switch":
        from devices.backends.switch import open_port

        backend = open_port(name)
    elif kind == "none":
        backend = Nowhere()
    else:
        raise BackendError(f"there is no network of kind {kind!r}")
    if pcap is None:
        return backend
    from devices.backends.pcap import Capture

    try:
        return Capture(backend, pcap, log=log)
    except BaseException:
        backend.close()
        raise

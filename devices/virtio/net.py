"""The network device (Virtio 1.2, section 5.1): one receive and one transmit queue over a network of the host."""

from __future__ import annotations

import os
from enum import IntFlag
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from devices.ports import TapShortCut
from devices.saved import Saved
from devices.virtio.device import VirtioDevice
from devices.virtio.queue import BrokenQueueError, Chain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.backends.net import NetBackend
    from devices.events import EventLog
    from devices.ports import GuestRam
    from devices.virtio.queue import Queue

__all__ = ["Feature", "Net", "parse_mac", "random_mac"]


class Feature(IntFlag):
    """Feature bits of the device itself (5.1.3); the offloads are the backend's."""

    MTU = 1 << 3
    MAC = 1 << 5
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16


RX: Final = 0
TX: Final = 1
HEADER_SIZE: Final = 12
"""struct virtio_net_hdr with num_buffers, which VERSION_1 always has (5.1.6)."""
NUM_BUFFERS: Final = 10
"""Its offset in the header."""
LINK_UP: Final = 1
MAX_FRAME: Final = 65535 + 14 + 4
MAX_CHAINS: Final = 64
"""Chains that one received frame may span: buffers as short as 1 KiB hold the longest frame."""
_CONFIG: Final = Struct("<6sHHH")
"""mac, status, max_virtqueue_pairs, mtu (5.1.4)."""
_MERGEABLE: Final = int(Feature.MRG_RXBUF)


def parse_mac(text: str) -> bytes:
    """Return the six bytes of a station's address such as "52:54:00:12:34:56"; raises ValueError for any other text."""
    parts = text.replace("-", ":").split(":")
    try:
        mac = bytes(int(part, 16) for part in parts if 0 < len(part) <= 2)
    except ValueError:
        mac = b""
    if len(mac) != 6 or len(parts) != 6:
        raise ValueError(f"mac is {text!r}, no MAC address")
    if mac[0] & 1:
        raise ValueError(f"mac is {text!r}, a multicast address")
    if not any(mac):
        raise ValueError(f"mac is {text!r}, nobody's address")
    return mac


def random_mac() -> bytes:
    """Return a random address that is locally administered and a single station's."""
    mac = bytearray(os.urandom(6))
    mac[0] = mac[0] & ~1 | 2
    return bytes(mac)


class Net(VirtioDevice):
    """A network interface.

    Attributes:
        on_watch: called with True when `host_ready` shall be called whenever the backend is readable, and with False
            when not: while the guest has no buffers frames stay in the host.
        sent, received: frames moved so far by the model; `dropped` are those that found no room, or no taker.
    """

    device_id = 1

    def __init__(
        self, name: str, ram: GuestRam, backend: NetBackend, *, mac: bytes, queue_size: int = 256, log: EventLog
    ) -> None:
        """Make an interface with address `mac` (6 bytes) on `backend`."""
        features = int(Feature.MAC | Feature.MRG_RXBUF | Feature.STATUS) | backend.offered
        super().__init__(name, ram, queue_sizes=[queue_size, queue_size], features=features, in_order=True, log=log)
        self.backend = backend
        self.mac = mac
        self.on_watch: Callable[[bool], None] = lambda _wanted: None
        self._is_watched = False
        self._link = LINK_UP
        self._scratch = memoryview(bytearray(HEADER_SIZE + MAX_FRAME))
        self._waiting = 0  # bytes of a frame in it that found no buffers yet
        self.sent = self.received = self.dropped = 0

    # --- for the transport --------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return the configuration space."""
        return _CONFIG.pack(self.mac, self._link, 1, 1500)

    def activate(self, features: int) -> None:
        """Begin: the host may send what this driver understands."""
        self._set_offloads(features)
        super().activate(features)

    def _set_offloads(self, features: int) -> None:
        try:
            self.backend.set_offloads(features)
        except OSError as error:  # segments without checksums (against 5.1.3.1), or the interface is gone
            self.log.once("net.offloads", error.errno, why=error.strerror)

    def reset(self) -> None:
        """Forget the driver; what the host has sent stays in the host."""
        super().reset()
        self._waiting = 0
        self._watch(False)

    def short_cut(self) -> TapShortCut | None:
        """Let a data path move the frames of a TAP."""
        fd = self.backend.plain_fd
        if fd is None:
            return None
        return TapShortCut(fd, self.backend.header_size, bool(self.features & _MERGEABLE))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the device's state: its address, and a frame for which there are too few buffers.

        Frames that wait in the host are the host's, and so is what the link is like.
        """
        return super().state() | {"mac": self.mac, "frame": bytes(self._scratch[: self._waiting])}

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; raises KeyError, TypeError or ValueError when it is no state of an interface."""
        saved = Saved(state)
        mac, frame = saved.octets("mac", 6, least=6), saved.octets("frame", len(self._scratch))
        before = self.features if self.is_active else None
        self.load_rest(saved)
        self.mac = mac
        self._waiting = len(frame)
        self._scratch[: self._waiting] = frame
        if not self.is_active:
            self._watch(False)
        elif self.features != before:
            self._set_offloads(self.features)

    def set_mac(self, mac: bytes) -> None:
        """Have another address (6 bytes), as a copy of a machine needs; its driver is told that something changed."""
        self.mac = mac
        if self.is_active:
            self.transport.config_changed()

    # --- to the host --------------------------------------------------------------------------------------------------

    def handle_queue(self, queue: Queue, most: int | None) -> None:
        """Send frames; new buffers for received ones make us look at the host again."""
        if queue.index == TX:
            super().handle_queue(queue, most)
        else:
            queue.ignore_kicks()
            self._fill(queue)

    def handle(self, queue: Queue, chain: Chain) -> int:
        """Send one frame."""
        del queue
        size = chain.readable_size
        if size < HEADER_SIZE or chain.writable:
            raise BrokenQueueError(f"a frame of {size} bytes with its header")
        skip = HEADER_SIZE - self.backend.header_size
        frame = chain.slice(chain.readable, skip, size - skip) if skip else chain.readable
        if HEADER_SIZE < size <= HEADER_SIZE + MAX_FRAME and self.backend.send(frame):
            self.sent += 1
        else:
            self.dropped += 1
        return 0

    # --- to the guest -------------------------------------------------------------------------------------------------

    def host_ready(self) -> None:
        """Take frames: the backend is readable."""
        queue = self.queues[RX]
        if self.is_active and queue.is_enabled:
            try:
                self._fill(queue)
            except BrokenQueueError as error:
                self.fail(queue, error)

    def _fill(self, queue: Queue) -> None:
        """Move frames until there are none, or no buffers, or others want their turn."""
        try:
            for _ in range(queue.size):
                if not self._waiting and not self._receive():
                    self._watch(self._link == LINK_UP)
                    return
                while (short := self._deliver(queue)) is not None:
                    if not queue.expect_kicks(beyond=short):
                        self._watch(False)
                        return
            self.runner.kick(queue.index)
        finally:
            queue.notify_driver()

    def _receive(self) -> bool:
        """Take a frame from the host into the scratch buffer; return whether there was one."""
        header = self.backend.header_size
        try:
            size = self.backend.receive(self._scratch[HEADER_SIZE - header :])
        except OSError as error:
            self.log.once("net.gone", why=error.strerror)
            self._link = 0
            self.transport.config_changed()
            return False
        if size is None:
            return False
        if header == 0:
            self._scratch[:HEADER_SIZE] = bytes(HEADER_SIZE)
        self._waiting = HEADER_SIZE - header + size
        return True

    def _deliver(self, queue: Queue) -> int | None:
        """Put the waiting frame into buffers; or take none and return how many there were, too few, else None."""
        size = self._waiting
        most = MAX_CHAINS if self.features & _MERGEABLE else 1
        chains: list[Chain] = []
        room = 0
        while room < size and len(chains) < most:
            chain = queue.pop()
            if chain is None:
                queue.unpop(len(chains))
                return len(chains)
            chains.append(chain)
            room += chain.writable_size
        self._waiting = 0
        if room < size:  # as many chains as there may be do not hold it
            self.dropped += 1
            queue.push_many([(chain, 0) for chain in chains])
            return None
        self._scratch[NUM_BUFFERS:HEADER_SIZE] = len(chains).to_bytes(2, "little")
        done = []
        offset = 0
        for chain in chains:
            written = chain.scatter(self._scratch[offset : min(size, offset + chain.writable_size)])
            done.append((chain, written))
            offset += written
        queue.push_many(done)
        self.received += 1
        return None

    def _watch(self, wanted: bool) -> None:
        if wanted != self._is_watched:
            self._is_watched = wanted
            self.on_watch(wanted)

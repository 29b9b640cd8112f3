"""The block device (Virtio 1.2, section 5.2) over an image of `devices.backends.image`."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import TYPE_CHECKING, Final

from devices.ports import DiskShortCut
from devices.virtio.device import UnservedError, VirtioDevice
from devices.virtio.queue import BrokenQueueError, Chain

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.backends.image import Image
    from devices.backends.limits import Limits
    from devices.events import EventLog
    from devices.ports import GuestRam
    from devices.virtio.queue import Queue

__all__ = ["Block", "Feature", "Request", "Status"]


class Feature(IntFlag):
    """Feature bits (5.2.3)."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14


class Request(IntEnum):
    """Request types (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(IntEnum):
    """The status byte at the end of a request (5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


SECTOR: Final = 512
ID_BYTES: Final = 20
MAX_SEGMENTS: Final = 32
"""Of a discard or write-zeroes request."""
MAX_ZEROED_SECTORS: Final = 1 << 22
"""Of one segment of these: 2 GiB, so that a request ends in a bounded time."""

_HEADER: Final = Struct("<IIQ")
"""type, reserved, sector."""
_SEGMENT: Final = Struct("<QII")
"""sector, num_sectors, flags."""
_UNMAP: Final = 1 << 0
_CONFIG: Final = Struct("<QII4xIBBHIBBHIIIIIB3x")
_OK: Final = int(Status.OK)
_IOERR: Final = int(Status.IOERR)
_UNSUPP: Final = int(Status.UNSUPP)
_FLUSH: Final = int(Feature.FLUSH)


class Block(VirtioDevice):
    """A disk. Its queues may be served by several threads at once; the image takes care of itself.

    Attributes:
        wait: sleeps so many seconds for the limits; returns False when the device is being stopped.
    """

    device_id = 2

    def __init__(
        self,
        name: str,
        ram: GuestRam,
        image: Image,
        *,
        queues: int = 1,
        queue_size: int = 256,
        serial: str = "",
        limits: Limits | None = None,
        log: EventLog,
    ) -> None:
        """Make a disk of `image`.

        Args:
            name: such as "blk0".
            ram: guest memory.
            image: where the bytes are.
            queues: how many request queues.
            queue_size: the largest size of each.
            serial: what GET_ID tells, at most 20 ASCII characters.
            limits: holds requests back, or None.
            log: for what the guest does wrong and the host cannot.
        """
        features = Feature.SEG_MAX | Feature.BLK_SIZE | Feature.FLUSH | Feature.TOPOLOGY
        features |= Feature.RO if image.readonly else Feature.DISCARD | Feature.WRITE_ZEROES
        if queues > 1:
            features |= Feature.MQ
        super().__init__(name, ram, queue_sizes=[queue_size] * queues, features=int(features), log=log)
        self.image = image
        self.wait: Callable[[float], bool] = lambda _seconds: True
        self._limits = limits
        self._sectors = image.size // SECTOR
        self._serial = serial.encode("ascii").ljust(ID_BYTES, b"\0")
        self._config = self._describe(queues, queue_size)
        self._answers: dict[int, Callable[[Chain, int, int], int]] = {
            Request.IN: self._read,
            Request.OUT: self._write,
            Request.FLUSH: self._flush,
            Request.GET_ID: self._get_id,
            Request.DISCARD: self._discard,
            Request.WRITE_ZEROES: self._write_zeroes,
        }

    def _describe(self, queues: int, queue_size: int) -> bytes:
        """Lay out struct virtio_blk_config (5.2.4)."""
        block = self.image.block_size
        cluster = max(self.image.cluster_size, block)
        return _CONFIG.pack(
            self._sectors,
            0,  # size_max: not offered
            max(queue_size - 2, 1),  # seg_max: what a queue has room for beside header and status
            block,
            max((cluster // block).bit_length() - 1, 0) if cluster <= 4096 else 3,
            0,  # alignment_offset
            1,  # min_io_size
            cluster // block,
            1,  # writeback: what it is without CONFIG_WCE
            0,
            queues,
            MAX_ZEROED_SECTORS,
            MAX_SEGMENTS,
            cluster // SECTOR,
            MAX_ZEROED_SECTORS,
            MAX_SEGMENTS,
            1,  # write_zeroes_may_unmap
        )

    def config(self) -> bytes:
        """Return the configuration space."""
        return self._config

    @property
    def _writes_through(self) -> bool:
        """Whether a write must be stable when it completes: the driver cannot flush (5.2.6.2)."""
        return not self.features & _FLUSH

    def short_cut(self) -> DiskShortCut | None:
        """Let a data path read and write a plain file, unless something has to be decided for each request."""
        fd = self.image.plain_fd
        if fd is None or self._limits is not None or self._writes_through:
            return None
        return DiskShortCut(fd, self._sectors, self.image.readonly)

    def handle(self, queue: Queue, chain: Chain) -> int:
        """Answer a request; its pieces may be cut anywhere (2.7.4)."""
        del queue
        header = chain.gather(_HEADER.size)
        room = chain.writable_size
        if len(header) < _HEADER.size or room < 1:
            raise BrokenQueueError(f"a request of {len(header)} bytes with room for {room}")
        kind, _, sector = _HEADER.unpack(header)
        answer = self._answers.get(kind)
        written = room - 1
        if answer is None:
            status = _UNSUPP
        else:
            try:
                status = answer(chain, sector, room - 1)
            except OSError as error:
                self.log.once("disk.error", error.errno, request=kind, sector=sector, why=error.strerror)
                status = _IOERR
        chain.scatter(bytes([status]), room - 1)
        return written + 1

    # --- requests: chain, sector and the bytes of answer before the status, to status ---------------------------------

    def _check(self, sector: int, size: int) -> bool:
        """Whether a transfer is of whole sectors that there are."""
        return size % SECTOR == 0 and size > 0 and sector + size // SECTOR <= self._sectors

    def _hold_back(self, size: int) -> None:
        """Wait until the limits allow a request; UnservedError when the device is being stopped."""
        if self._limits is None:
            return
        seconds = self._limits.take(size)
        if seconds > 0 and not self.wait(seconds):
            self._limits.give_back(size)
            raise UnservedError

    def _read(self, chain: Chain, sector: int, size: int) -> int:
        if not self._check(sector, size):
            return _IOERR
        self._hold_back(size)
        self.image.readv(sector * SECTOR, chain.slice(chain.writable, 0, size))
        return _OK

    def _write(self, chain: Chain, sector: int, size: int) -> int:
        del size
        size = chain.readable_size - _HEADER.size
        if self.image.readonly or not self._check(sector, size):
            return _IOERR
        self._hold_back(size)
        self.image.writev(sector * SECTOR, chain.slice(chain.readable, _HEADER.size, size))
        if self._writes_through:
            self.image.flush()
        return _OK

    def _flush(self, chain: Chain, sector: int, size: int) -> int:
        del chain, sector, size
        self._hold_back(0)
        if not self.image.readonly:
            self.image.flush()
        return _OK

    def _get_id(self, chain: Chain, sector: int, size: int) -> int:
        del sector
        if size < ID_BYTES:
            return _IOERR
        chain.scatter(self._serial)
        return _OK

    def _segments(self, chain: Chain) -> list[tuple[int, int, int]] | None:
        """Return (sector, sectors, flags) of each segment of a discard or write-zeroes; None when they are wrong."""
        size = chain.readable_size - _HEADER.size
        if size <= 0 or size % _SEGMENT.size or size > MAX_SEGMENTS * _SEGMENT.size:
            return None
        segments = list(_SEGMENT.iter_unpack(chain.gather(size, _HEADER.size)))
        for sector, sectors, _ in segments:
            if sectors > MAX_ZEROED_SECTORS or sector + sectors > self._sectors:
                return None
        return segments

    def _discard(self, chain: Chain, sector: int, size: int) -> int:
        del sector, size
        segments = self._segments(chain)
        if self.image.readonly or segments is None:
            return _IOERR
        if any(flags for _, _, flags in segments):
            return _UNSUPP
        self._hold_back(0)
        for first, sectors, _ in segments:
            if sectors:
                self.image.discard(first * SECTOR, sectors * SECTOR)
        if self._writes_through:
            self.image.flush()
        return _OK

    def _write_zeroes(self, chain: Chain, sector: int, size: int) -> int:
        del sector, size
        segments = self._segments(chain)
        if self.image.readonly or segments is None:
            return _IOERR
        if any(flags & ~_UNMAP for _, _, flags in segments):
            return _UNSUPP
        self._hold_back(SECTOR * sum(sectors for _, sectors, _ in segments))
        for first, sectors, flags in segments:
            if sectors:
                self.image.write_zeroes(first * SECTOR, sectors * SECTOR, bool(flags & _UNMAP))
        if self._writes_through:
            self.image.flush()
        return _OK

"""Split virtqueues, the device's side (Virtio 1.2, section 2.7). The only Python that knows how a ring is laid out.

A chain that breaks a rule is told apart from a chain that is finished: `pop` raises BrokenQueueError, and whoever
catches it stops using the queue until the driver resets it.

The guest writes to the rings while this code reads them: every field is read once, into a local, before it is judged.
x86 keeps loads in order and stores in order; the one place that needs a store before a later load is in
`expect_kicks` and `notify_driver`, where taking a lock (a locked instruction) is the fence.
"""

from __future__ import annotations

import threading
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from devices.ports import GuestFault
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Mapping

    from devices.ports import GuestRam, Signal

__all__ = ["EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "MAX_SIZE", "BrokenQueueError", "Chain", "Queue"]

INDIRECT_DESC: Final = 1 << 28
"""VIRTIO_F_INDIRECT_DESC (chapter 6)."""
EVENT_IDX: Final = 1 << 29
"""VIRTIO_F_EVENT_IDX."""
IN_ORDER: Final = 1 << 35
"""VIRTIO_F_IN_ORDER. Each buffer of a batch has its entry all the same: one for all (2.7.9) could not say lengths."""

MAX_SIZE: Final = 1 << 15
"""The largest queue size that the ring's 16-bit indices allow (2.7)."""
MAX_CHAIN_BYTES: Final = (1 << 32) - 1
"""No chain is longer in total: 2.7.5.2 allows one byte more, but the used ring could not say that it was filled."""

_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1
_NO_NOTIFY: Final = 1
_DESCRIPTOR: Final = Struct("<QIHH")
"""addr, len, flags, next (2.7.5)."""
_USED: Final = Struct("<II")
"""id, len (2.7.8)."""

NEXT_AVAILABLE: Final = 0
NEXT_USED: Final = 1
SIGNALLED: Final = 2
FIRED: Final = 3
"""Not a counter: a data path sets it to 1 before it fires the signal behind Python's back; a reset leaves it alone."""
CURSORS: Final = 4
"""Items of `Queue.cursor`, and how many there are."""
_WORD: Final = 0xFFFF_FFFF
_MASK64: Final = (1 << 64) - 1


class BrokenQueueError(Exception):
    """The driver broke a rule of the ring: nothing more can be taken from this queue until it is reset."""


class Chain:
    """A buffer that the driver made available: what the device reads first, then what it writes (2.7.4).

    Attributes:
        head: the descriptor that stands for it in the used ring.
        readable: the driver's data, pieces of guest memory in order; none is empty.
        writable: where the device's answer goes, pieces of guest memory in order; none is empty.
        places: guest-physical address of every piece, the readable ones first.
    """

    __slots__ = ("head", "places", "readable", "writable")

    def __init__(self, head: int) -> None:
        """Describe an empty chain."""
        self.head = head
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.places: list[int] = []

    @property
    def readable_size(self) -> int:
        """Length of what may be read, in bytes."""
        return sum(map(len, self.readable))

    @property
    def writable_size(self) -> int:
        """Length of what may be written, in bytes."""
        return sum(map(len, self.writable))

    def gather(self, size: int, offset: int = 0) -> bytes:
        """Copy up to `size` bytes of the driver's data from `offset` on; fewer where it ends before."""
        return b"".join(self.slice(self.readable, offset, size))

    def scatter(self, data: bytes | memoryview, offset: int = 0) -> int:
        """Write `data` to the driver's buffers from `offset` on; return how many bytes found room."""
        done = 0
        for piece in self.slice(self.writable, offset, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)
        return done

    @staticmethod
    def slice(pieces: list[memoryview], offset: int, size: int) -> list[memoryview]:
        """Return the parts of `pieces` that hold bytes offset..offset+size-1 of all of them together."""
        parts = []
        for piece in pieces:
            if size <= 0:
                break
            length = len(piece)
            if offset >= length:
                offset -= length
                continue
            part = piece[offset : offset + size]
            parts.append(part)
            size -= len(part)
            offset = 0
        return parts


class Queue:
    """One virtqueue.

    The transport sets `size` and the three addresses while the queue is disabled, then enables it; the device model
    pops chains and pushes them back.

    Attributes:
        index: its number in the device.
        max_size: the largest queue size the driver may choose.
        size: the queue size: a power of two.
        descriptors, available, used: guest-physical addresses of the descriptor table, the driver area and the
            device area.
        signal: the interrupt that tells the driver of used buffers; the transport sets it.
        isr: its first byte is set before every interrupt: the transport's "queue" bit of the ISR status.
        cursor: the queue's own counters, 16 bits each: NEXT_AVAILABLE, NEXT_USED, SIGNALLED; and FIRED. A data path in
            another language may work on the same queue by sharing this buffer, one of the two at a time.
    """

    def __init__(self, ram: GuestRam, index: int, max_size: int) -> None:
        """Make queue `index`, whose size is at most `max_size` (a power of two up to MAX_SIZE), disabled."""
        self._ram = ram
        self.index = index
        self.max_size = max_size
        self.signal: Signal = _Nobody()
        self.isr = memoryview(bytearray(1))
        self.cursor = memoryview(bytearray(2 * CURSORS)).cast("H")
        self._fence = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Return to the state after power-on: disabled, without addresses."""
        self.size = self.max_size
        self.descriptors = 0
        self.available = 0
        self.used = 0
        self.features = 0
        self.is_enabled = False
        self._table = self._available = self._used = memoryview(b"")
        for item in (NEXT_AVAILABLE, NEXT_USED, SIGNALLED):
            self.cursor[item] = 0

    def enable(self, features: int) -> None:
        """Take the queue into use.

        Args:
            features: what was negotiated; INDIRECT_DESC and EVENT_IDX matter here.

        Raises:
            BrokenQueueError: size or an address is against 2.7 (power of two; 16, 2 and 4 bytes alignment; RAM).
        """
        size = self.size
        if not 0 < size <= self.max_size or size & (size - 1):
            raise BrokenQueueError(f"queue size {size} is no power of two up to {self.max_size}")
        for what, address, alignment in (
            ("descriptor table", self.descriptors, 16),
            ("available ring", self.available, 2),
            ("used ring", self.used, 4),
        ):
            if address % alignment:
                raise BrokenQueueError(f"the {what} at {address:#x} is not on a multiple of {alignment}")
        try:
            self._table = self._ram.view(self.descriptors, 16 * size)
            self._available = self._ram.view(self.available, 6 + 2 * size).cast("H")
            self._used = self._ram.view(self.used, 6 + 8 * size)
        except GuestFault as fault:
            raise BrokenQueueError(f"a ring is not in RAM: {fault}") from fault
        self._used_flags = self._used[:4].cast("H")
        self._avail_event = self._used[4 + 8 * size :].cast("H")
        self._mask = size - 1
        self.features = features
        self.is_enabled = True

    def state(self) -> dict[str, Any]:
        """Return what the queue is and how far both sides have come; nobody serves it meanwhile."""
        return {
            "size": self.size,
            "descriptors": self.descriptors,
            "available": self.available,
            "used": self.used,
            "features": self.features,
            "is_enabled": self.is_enabled,
            "next_available": self.cursor[NEXT_AVAILABLE],
            "next_used": self.cursor[NEXT_USED],
            "signalled": self.cursor[SIGNALLED],
        }

    @property
    def held(self) -> int:
        """How many chains have been taken and not been given back."""
        return (self.cursor[NEXT_AVAILABLE] - self.cursor[NEXT_USED]) & 0xFFFF

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; the rings are in RAM already. Raises ValueError where no ring can be."""
        saved = Saved(state)
        size = saved.number("size", _WORD)  # a driver may write any number before it enables the queue
        addresses = [saved.number(area, _MASK64) for area in ("descriptors", "available", "used")]
        features = saved.number("features", _MASK64)
        is_enabled = saved.flag("is_enabled")
        cursors = [saved.number(name, 0xFFFF) for name in ("next_available", "next_used", "signalled")]
        saved.end()
        self.reset()
        self.size = size
        self.descriptors, self.available, self.used = addresses
        if is_enabled:
            try:
                self.enable(features)
            except BrokenQueueError as error:
                self.reset()
                raise ValueError(f"queue {self.index}: {error}") from error
        for item, value in enumerate(cursors):
            self.cursor[item] = value

    # --- the driver's buffers -----------------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """Take the next available chain; None when there is no more for now.

        Raises:
            BrokenQueueError: the ring or the chain is malformed. Nothing is consumed.
        """
        cursor = self.cursor
        position = cursor[NEXT_AVAILABLE]
        ahead = (self._available[1] - position) & 0xFFFF
        if not ahead:
            return None
        if ahead > self.size:
            raise BrokenQueueError(f"available idx is {ahead} ahead of a queue of {self.size}")
        chain = self.chain(self._available[2 + (position & self._mask)])
        cursor[NEXT_AVAILABLE] = (position + 1) & 0xFFFF
        return chain

    def unpop(self, count: int = 1) -> None:
        """Give the `count` chains that were popped last back: the next `pop` returns the first of them again."""
        self.cursor[NEXT_AVAILABLE] = (self.cursor[NEXT_AVAILABLE] - count) & 0xFFFF

    def chain(self, head: int) -> Chain:
        """Walk the chain from descriptor `head` (2.7.5); raises BrokenQueueError when it is malformed."""
        chain = Chain(head)
        table = self._table
        size = limit = self.size
        index = head
        steps = total = 0
        while True:
            steps += 1
            if index >= size or steps > limit:  # a chain visits each descriptor at most once
                raise BrokenQueueError(f"the chain from {head} has a loop, or leads to descriptor {index} of {size}")
            gpa, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & _INDIRECT:
                if table is not self._table or flags & _NEXT or not self.features & INDIRECT_DESC:
                    raise BrokenQueueError(f"descriptor {index} may not be indirect (2.7.5.3.1)")
                table, size = self._indirect_table(gpa, length)
                limit = steps + size
                index = 0
                continue
            if length:
                total += length
                self._add_piece(chain, gpa, length, flags & _WRITE)
            if not flags & _NEXT:
                if total > MAX_CHAIN_BYTES:
                    raise BrokenQueueError(f"the chain from {head} is {total} bytes long (2.7.5.2)")
                if self._ram.is_tracked:  # a model that finds fault with it half-way does not give it back
                    self._mark(chain)
                return chain
            index = following

    def _add_piece(self, chain: Chain, gpa: int, length: int, writable: int) -> None:
        """Add what a descriptor points to."""
        try:
            piece = self._ram.view(gpa, length)
        except GuestFault as fault:
            raise BrokenQueueError(f"the chain from {chain.head}: {fault}") from fault
        if writable:
            chain.writable.append(piece)
        elif chain.writable:
            raise BrokenQueueError(f"the chain from {chain.head} is readable behind a writable part (2.7.4.2)")
        else:
            chain.readable.append(piece)
        chain.places.append(gpa)

    def _indirect_table(self, gpa: int, length: int) -> tuple[memoryview, int]:
        """Return an indirect table and how many descriptors it has (2.7.5.3)."""
        entries, rest = divmod(length, 16)
        if rest or not 0 < entries <= self.max_size:
            raise BrokenQueueError(f"an indirect table of {length} bytes for a queue of {self.max_size}")
        try:
            return self._ram.view(gpa, length), entries
        except GuestFault as fault:
            raise BrokenQueueError(f"an indirect table: {fault}") from fault

    # --- giving them back ---------------------------------------------------------------------------------------------

    def push(self, chain: Chain, written: int) -> None:
        """Hand a chain back (2.7.8.2); `written` is how many bytes of its writable part were filled from the start."""
        self.push_many([(chain, written)])

    def push_many(self, done: list[tuple[Chain, int]]) -> None:
        """Hand chains back, with the bytes written to each, so that the driver sees all of them at once."""
        cursor = self.cursor
        position = cursor[NEXT_USED]
        for chain, written in done:
            _USED.pack_into(self._used, 4 + 8 * (position & self._mask), chain.head, written)
            position = (position + 1) & 0xFFFF
        if self._ram.is_tracked:
            for chain, _ in done:
                self._mark(chain)
            self._ram.written(self.used, 6 + 8 * self.size)
        cursor[NEXT_USED] = position
        self._used_flags[1] = position
        if self._ram.is_tracked:
            self._ram.written(self.used, 4)

    def _mark(self, chain: Chain) -> None:
        """Say that all of a chain's writable part has been written."""
        for gpa, piece in zip(chain.places[len(chain.readable) :], chain.writable, strict=True):
            self._ram.written(gpa, len(piece))

    def notify_driver(self) -> None:
        """Interrupt the driver if it wants to know of what was pushed since the last call (2.7.7)."""
        cursor = self.cursor
        new, old = cursor[NEXT_USED], cursor[SIGNALLED]
        if new == old:
            return
        cursor[SIGNALLED] = new
        with self._fence:  # the used idx is stored before used_event is loaded
            pass
        if self.features & EVENT_IDX:
            event = self._available[2 + self.size]
            if (new - event - 1) & 0xFFFF >= (new - old) & 0xFFFF:
                return
        elif self._available[0] & _NO_INTERRUPT:
            return
        self.isr[0] = 1
        self.signal.fire()

    # --- the driver's kicks -------------------------------------------------------------------------------------------

    def ignore_kicks(self) -> None:
        """Tell the driver that it need not kick: the device looks by itself (2.7.10)."""
        if not self.features & EVENT_IDX:
            self._used_flags[0] = _NO_NOTIFY
            if self._ram.is_tracked:
                self._ram.written(self.used, 4)

    def expect_kicks(self, beyond: int = 0) -> bool:
        """Ask the driver to kick for the next chain; return whether one has come in the meantime.

        Args:
            beyond: chains that are available but do not suffice: the kick is to come for one behind them.
        """
        awaited = (self.cursor[NEXT_AVAILABLE] + beyond) & 0xFFFF
        if self.features & EVENT_IDX:
            self._avail_event[0] = awaited
        else:
            self._used_flags[0] = 0
        if self._ram.is_tracked:
            self._ram.written(self.used, 6 + 8 * self.size)
        with self._fence:  # what the driver reads is stored before its idx is loaded
            pass
        return self._available[1] != awaited


class _Nobody:
    """The signal of a queue that no transport has taken yet."""

    def fire(self) -> None:
        """Interrupt nobody."""

    def fileno(self) -> int:
        """Return no descriptor."""
        return -1

"""The socket device (Virtio 1.2, section 5.10): streams between programs in the guest and on the host.

Nothing is buffered without a bound: what the host does not take fills the connection's buffer, whose room is the credit
that the guest has; what the guest does not take stays in the host's socket.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from devices.saved import Saved
from devices.virtio.device import VirtioDevice
from devices.virtio.queue import BrokenQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.events import EventLog
    from devices.ports import GuestRam
    from devices.virtio.queue import Chain, Queue

__all__ = ["HOST_CID", "Op", "Stream", "Vsock"]


class Op(IntEnum):
    """Operations (5.10.6)."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


RX: Final = 0
TX: Final = 1
EVENT: Final = 2
QUEUE_SIZES: Final = (128, 128, 16)
HOST_CID: Final = 2
STREAM: Final = 1
NO_RECEIVE: Final = 1
"""SHUTDOWN: the sender will receive no more."""
NO_SEND: Final = 2
"""SHUTDOWN: the sender will send no more."""
BUFFER: Final = 1 << 16
"""Bytes on their way to the host that one connection may have here: buf_alloc."""
MAX_CONNECTIONS: Final = 1024
MAX_REPLIES: Final = 256
"""Packets that wait for receive buffers; while there are more the guest's own packets have to wait."""
MAX_PAYLOAD: Final = 1 << 16
FIRST_HOST_PORT: Final = 1 << 30
_WORD: Final = 0xFFFF_FFFF
_HEADER: Final = Struct("<QQIIIHHIII")
HEADER_SIZE: Final = 44
_TRANSPORT_RESET: Final = bytes(4)
"""struct virtio_vsock_event with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7)."""
_MASK64: Final = (1 << 64) - 1


class Header(NamedTuple):
    """struct virtio_vsock_hdr (5.10.6)."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


class Stream(Protocol):
    """The host's end of a connection.

    Attributes:
        on_readable: set by the device: called when `receive` may have something.
        on_writable: set by the device: called when `send` takes more again.
    """

    on_readable: Callable[[], None]
    on_writable: Callable[[], None]

    def accepted(self, host_port: int) -> None:
        """Learn that the guest has accepted a connection that the host asked for."""

    def receive(self, most: int) -> bytes | None:
        """Return up to `most` bytes; b"" at the end; None when there is nothing for now."""

    def send(self, data: bytes) -> int:
        """Take bytes; fewer when there is no room for now. OSError: nobody is there any more."""

    def watch(self, wanted: bool) -> None:
        """Call `on_readable` whenever there is something, or do not."""

    def is_closed_by_peer(self) -> bool:
        """Whether the peer has closed its end for both directions."""

    def end_output(self) -> None:
        """Tell the peer that no more will come."""

    def close(self) -> None:
        """Close it."""


class Connection:
    """One connection, and the credit both ways (5.10.6.3)."""

    __slots__ = ("buffer", "guest_port", "guest_shut", "host_port", "host_shut", "is_open", "is_waiting", "peer_buffer",
                 "peer_forwarded", "received", "sent", "stream", "told")  # fmt: skip

    def __init__(self, stream: Stream, host_port: int, guest_port: int) -> None:
        """Start between two ports."""
        self.stream = stream
        self.host_port = host_port
        self.guest_port = guest_port
        self.is_open = False
        self.is_waiting = False  # for a turn in the device's list of those that have something for the guest
        self.buffer = bytearray()
        self.received = 0  # bytes from the guest that the host has taken: fwd_cnt
        self.told = 0  # the fwd_cnt that the guest knows
        self.sent = 0  # bytes to the guest
        self.peer_buffer = 0
        self.peer_forwarded = 0
        self.guest_shut = 0
        self.host_shut = 0

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        return max(self.peer_buffer - ((self.sent - self.peer_forwarded) & _WORD), 0)


class Vsock(VirtioDevice):
    """A socket device."""

    device_id = 19

    def __init__(
        self, name: str, ram: GuestRam, *, cid: int, connect: Callable[[int], Stream | None], log: EventLog
    ) -> None:
        """Make the device of a guest.

        Args:
            name: such as "vsock0".
            ram: guest memory.
            cid: the guest's address.
            connect: given a port that the guest wants on the host, connects to it; None: nobody listens.
            log: for what the guest does wrong.
        """
        super().__init__(name, ram, queue_sizes=QUEUE_SIZES, in_order=True, log=log)
        self.cid = cid
        self._connect = connect
        self._connections: dict[tuple[int, int], Connection] = {}  # by host port and guest port
        self._replies: deque[bytes] = deque()
        self._ready: deque[Connection] = deque()
        self._next_port = FIRST_HOST_PORT
        self._lost: list[list[int]] = []  # connections that a restored guest believes in: its cid, and the two ports
        self._reset_is_due = False  # whether the driver has to be told that its connections are gone

    # --- for the host -------------------------------------------------------------------------------------------------

    def open(self, stream: Stream, guest_port: int) -> bool:
        """Connect the host's `stream` to a port of the guest; False when that is out of the question."""
        if not self.is_active or len(self._connections) >= MAX_CONNECTIONS or len(self._replies) >= MAX_REPLIES:
            return False
        while (self._next_port, guest_port) in self._connections:
            self._next_port += 1
        connection = self._add(stream, self._next_port, guest_port)
        self._next_port = FIRST_HOST_PORT + (self._next_port + 1 - FIRST_HOST_PORT) % FIRST_HOST_PORT
        self._reply(connection, Op.REQUEST)
        self.serve(RX)
        return True

    def _add(self, stream: Stream, host_port: int, guest_port: int) -> Connection:
        connection = Connection(stream, host_port, guest_port)
        self._connections[host_port, guest_port] = connection
        stream.on_readable = lambda: self._stream_readable(connection)
        stream.on_writable = lambda: self._stream_writable(connection)
        return connection

    def _stream_readable(self, connection: Connection) -> None:
        connection.stream.watch(False)
        self._make_ready(connection)
        self.serve(RX)

    def _stream_writable(self, connection: Connection) -> None:
        self._forward(connection)
        self.serve(RX)

    # --- for the transport --------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return guest_cid (5.10.4)."""
        return self.cid.to_bytes(8, "little")

    def reset(self) -> None:
        """Forget the driver and close every connection."""
        super().reset()
        for connection in list(self._connections.values()):
            connection.stream.close()
        self._connections.clear()
        self._replies.clear()
        self._ready.clear()
        self._lost.clear()
        self._reset_is_due = False

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the device's state; of connections only which there are: no host's end outlives its machine."""
        return super().state() | {
            "guest_cid": self.cid,
            "connections": [[self.cid, *ports] for ports in self._connections] + [list(one) for one in self._lost],
            "replies": list(self._replies),
            "next_port": self._next_port,
            "reset_is_due": self._reset_is_due,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; raises KeyError, TypeError or ValueError when it is no state of a socket device.

        Every connection is closed, here and, as soon as the device is served, in the guest: it gets an RST for each,
        and the event that its connections are gone.
        """
        saved = Saved(state)
        cid = saved.number("guest_cid", _MASK64)
        rows = saved.items("connections", 2 * MAX_CONNECTIONS)
        lost = [Saved({"connection": row}).numbers("connection", 3, _MASK64, least=3) for row in rows]
        if any(port > _WORD for row in lost for port in row[1:]):
            raise ValueError(f"connections {lost}")
        replies = saved.items("replies", MAX_REPLIES + 3 * MAX_CONNECTIONS)
        if any(type(reply) is not bytes or len(reply) != HEADER_SIZE for reply in replies):
            raise ValueError("a reply that is no header")
        next_port = saved.number("next_port", _WORD)
        is_due = saved.flag("reset_is_due")
        self.load_rest(saved)
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._ready.clear()
        self._replies = deque(replies)
        self.cid, self._next_port, self._lost, self._reset_is_due = cid, next_port, lost, is_due

    def set_cid(self, cid: int) -> None:
        """Have another address, as a copy of a machine needs: the driver is told to ask for it (5.10.6.7)."""
        if cid == self.cid:
            return
        self.cid = cid
        if self.is_active:
            self._reset_is_due = True
            self.transport.config_changed()
            self.runner.kick(EVENT)

    def _admit_losses(self) -> None:
        """Reset what the guest believes to be connected; of the replies to it only resets are still true."""
        if not self._lost:
            return
        self._replies = deque(reply for reply in self._replies if _HEADER.unpack(reply)[6] == Op.RST)
        for cid, host_port, guest_port in self._lost:
            header = _HEADER.pack(HOST_CID, cid, host_port, guest_port, 0, STREAM, Op.RST, 0, 0, 0)
            self._replies.append(header)
        self._lost = []
        self._reset_is_due = True

    def _give_event(self, queue: Queue) -> None:
        """Tell the driver that its connections are gone, if that is due and it has a buffer for it."""
        while self._reset_is_due:
            chain = queue.pop()
            if chain is not None:
                self._reset_is_due = False
                queue.push(chain, chain.scatter(_TRANSPORT_RESET))
                queue.notify_driver()
            elif not queue.expect_kicks():
                return

    # --- from the guest -----------------------------------------------------------------------------------------------

    def handle_queue(self, queue: Queue, most: int | None) -> None:
        """Take the guest's packets, and give it those that it has buffers for."""
        del most
        self._admit_losses()
        if queue.index == TX:
            self._take_packets(queue)
        elif queue.index == EVENT:
            self._give_event(queue)
        rx = self.queues[RX]
        if queue.index in {RX, TX} and rx.is_enabled:
            had_to_wait = len(self._replies) >= MAX_REPLIES
            self._give_packets(rx)
            if had_to_wait and len(self._replies) < MAX_REPLIES:
                self.runner.kick(TX)

    def _take_packets(self, queue: Queue) -> None:
        queue.ignore_kicks()
        try:
            for _ in range(queue.size):
                if len(self._replies) >= MAX_REPLIES:
                    return
                chain = queue.pop()
                if chain is None:
                    if queue.expect_kicks():
                        continue
                    return
                self._take_packet(chain)
                queue.push(chain, 0)
            self.runner.kick(TX)
        finally:
            queue.notify_driver()

    def _take_packet(self, chain: Chain) -> None:
        data = chain.gather(HEADER_SIZE)
        if len(data) < HEADER_SIZE:
            raise BrokenQueueError(f"a packet of {len(data)} bytes")
        packet = Header._make(_HEADER.unpack(data))
        if packet.len > MAX_PAYLOAD or packet.len > chain.readable_size - HEADER_SIZE:
            self.log.once("vsock.length", len=packet.len, room=chain.readable_size - HEADER_SIZE)
            return
        if packet.src_cid != self.cid or packet.dst_cid != HOST_CID:
            self.log.once("vsock.address", src_cid=packet.src_cid, dst_cid=packet.dst_cid)
            return  # 5.10.6.4.1: nobody is known by that address, so nobody answers
        connection = self._connections.get((packet.dst_port, packet.src_port))
        if packet.type != STREAM or packet.op not in _OPS:
            self._refuse(packet, connection)
        elif connection is None:
            self._accept(packet)
        else:
            connection.peer_buffer = packet.buf_alloc
            connection.peer_forwarded = packet.fwd_cnt
            self._take(connection, packet, chain)

    def _accept(self, packet: Header) -> None:
        """Connect to the host, or refuse whatever it is."""
        if packet.op != Op.REQUEST:
            self._refuse(packet, None)
            return
        full = len(self._connections) >= MAX_CONNECTIONS
        stream = None if full else self._connect(packet.dst_port)
        if stream is None:
            self._refuse(packet, None)
            return
        connection = self._add(stream, packet.dst_port, packet.src_port)
        connection.peer_buffer = packet.buf_alloc
        connection.peer_forwarded = packet.fwd_cnt
        connection.is_open = True
        self._reply(connection, Op.RESPONSE)
        stream.watch(True)

    def _refuse(self, packet: Header, connection: Connection | None) -> None:
        """Answer RST (5.10.6.4.1), but never to an RST."""
        if connection is not None:
            self._drop(connection)
        if packet.op != Op.RST:
            self._replies.append(
                _HEADER.pack(HOST_CID, self.cid, packet.dst_port, packet.src_port, 0, packet.type, Op.RST, 0, 0, 0)
            )

    def _take(self, connection: Connection, packet: Header, chain: Chain) -> None:
        """Take a packet of a connection."""
        if packet.op == Op.RST:
            self._drop(connection)
        elif packet.op == Op.RESPONSE and not connection.is_open:
            connection.is_open = True
            connection.stream.accepted(connection.host_port)
            connection.stream.watch(True)
        elif not connection.is_open or packet.op in {Op.REQUEST, Op.RESPONSE}:
            self._refuse(packet, connection)
        elif packet.op == Op.RW:
            if len(connection.buffer) + packet.len > BUFFER:
                self._refuse(packet, connection)  # more than its credit
                return
            connection.buffer += chain.gather(packet.len, HEADER_SIZE)
            self._forward(connection)
        elif packet.op == Op.SHUTDOWN:
            connection.guest_shut |= packet.flags & (NO_RECEIVE | NO_SEND)
            self._forward(connection)
        elif packet.op == Op.CREDIT_REQUEST:
            self._reply(connection, Op.CREDIT_UPDATE)
        if connection.is_open and connection.credit and not connection.is_waiting:
            connection.stream.watch(not (connection.host_shut | connection.guest_shut & NO_RECEIVE))

    def _forward(self, connection: Connection) -> None:
        """Give the host what the guest has sent, and the end of it."""
        if (connection.host_port, connection.guest_port) not in self._connections:
            return
        try:
            while connection.buffer:
                taken = connection.stream.send(bytes(connection.buffer))
                if not taken:
                    break
                del connection.buffer[:taken]
                connection.received = (connection.received + taken) & _WORD
        except OSError:
            self._reply(connection, Op.RST)
            self._drop(connection)
            return
        if (connection.received - connection.told) & _WORD >= BUFFER // 2:
            self._reply(connection, Op.CREDIT_UPDATE)
        if connection.buffer:
            return
        if connection.guest_shut == NO_RECEIVE | NO_SEND:
            self._reply(connection, Op.RST)  # 5.10.6.5: the answer to a whole shutdown, once all is delivered
            self._drop(connection)
        elif connection.guest_shut & NO_SEND:
            connection.stream.end_output()

    def _drop(self, connection: Connection) -> None:
        self._connections.pop((connection.host_port, connection.guest_port), None)
        connection.is_open = False
        connection.stream.close()

    # --- to the guest -------------------------------------------------------------------------------------------------

    def _reply(self, connection: Connection, op: Op, flags: int = 0) -> None:
        self._replies.append(self._header(connection, op, 0, flags))

    def _header(self, connection: Connection, op: int, size: int, flags: int = 0) -> bytes:
        connection.told = connection.received
        return _HEADER.pack(
            *(HOST_CID, self.cid, connection.host_port, connection.guest_port, size, STREAM, op, flags),
            *(BUFFER, connection.received),
        )

    def _make_ready(self, connection: Connection) -> None:
        if not connection.is_waiting:
            connection.is_waiting = True
            self._ready.append(connection)

    def _give_packets(self, queue: Queue) -> None:
        """Fill receive buffers with replies, then with data, a packet a connection in turn."""
        queue.ignore_kicks()
        try:
            for _ in range(queue.size):
                if not self._replies and not self._ready:
                    queue.expect_kicks()
                    return
                chain = queue.pop()
                if chain is None:
                    if queue.expect_kicks():
                        continue
                    return
                if chain.writable_size < HEADER_SIZE:
                    raise BrokenQueueError(f"a receive buffer of {chain.writable_size} bytes")
                packet = self._replies.popleft() if self._replies else self._next_data(chain)
                if packet is None:
                    queue.unpop()
                else:
                    queue.push(chain, chain.scatter(packet))
            self.runner.kick(RX)
        finally:
            queue.notify_driver()

    def _next_data(self, chain: Chain) -> bytes | None:
        """Return a packet of the connection whose turn it is; None when it has nothing to say."""
        connection = self._ready.popleft()
        connection.is_waiting = False
        room = min(chain.writable_size - HEADER_SIZE, connection.credit, MAX_PAYLOAD)
        if not connection.is_open or room <= 0 or connection.host_shut:
            return None  # it comes again with the guest's next word on its credit
        data = connection.stream.receive(room)
        if data is None:
            connection.stream.watch(True)
            return None
        if not data:
            connection.host_shut = NO_RECEIVE | NO_SEND if connection.stream.is_closed_by_peer() else NO_SEND
            return self._header(connection, Op.SHUTDOWN, 0, connection.host_shut)
        connection.sent = (connection.sent + len(data)) & _WORD
        self._make_ready(connection)
        return self._header(connection, Op.RW, len(data)) + data


_OPS: Final = frozenset(int(op) for op in Op)

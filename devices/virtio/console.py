"""The console device (Virtio 1.2, section 5.3) with several ports: a console, and channels that have names.

A port's host end is handed in. What it does not take stays in the guest's queue, so a host that reads slowly stalls the
guest and costs no memory.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, Protocol

from devices.saved import Saved
from devices.virtio.device import VirtioDevice
from devices.virtio.queue import MAX_CHAIN_BYTES, BrokenQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.events import EventLog
    from devices.ports import GuestRam
    from devices.virtio.queue import Chain, Queue

__all__ = ["Console", "Event", "Feature", "PortHost"]


class Feature(IntFlag):
    """Feature bits (5.3.3)."""

    SIZE = 1 << 0
    MULTIPORT = 1 << 1


class Event(IntEnum):
    """Control messages (5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


class PortHost(Protocol):
    """The host's end of a port.

    Attributes:
        name: what the guest finds the port by; "" is the console, which is port 0.
        is_open: whether anybody is there.
        held: input that the guest has had no room for. It is the machine's: a snapshot has it, and sets it.
        on_input: set by the device: takes bytes for the guest and returns how many found room.
        on_room: set by the device: called when the end takes output again.
        on_open: set by the device: called when `is_open` has changed.
    """

    name: str
    is_open: bool
    held: bytes
    on_input: Callable[[bytes], int]
    on_room: Callable[[], None]
    on_open: Callable[[], None]

    def send(self, data: memoryview) -> int:
        """Take output; return how many bytes were taken, less than all when there is no room for now."""

    def more(self) -> None:
        """Offer input again: the guest has room."""


QUEUE_SIZE: Final = 128
CONTROL_RX: Final = 2
CONTROL_TX: Final = 3
MAX_PORTS: Final = 31
MOST_MESSAGES: Final = 4 * MAX_PORTS + 32
"""Control messages that wait for the driver's buffers; a driver that takes none loses the rest."""
_CONFIG: Final = Struct("<HHII")
_CONTROL: Final = Struct("<IHH")
_RESIZE: Final = Struct("<HH")
_MULTIPORT: Final = int(Feature.MULTIPORT)
_MOST_HELD: Final = 1 << 16
_LONGEST_MESSAGE: Final = 1 << 12


class Console(VirtioDevice):
    """A console with ports."""

    device_id = 3

    def __init__(
        self,
        name: str,
        ram: GuestRam,
        ports: Sequence[PortHost],
        *,
        columns: int = 80,
        rows: int = 25,
        log: EventLog,
    ) -> None:
        """Make a console whose port N leads to `ports[N]`; ValueError when there are too many."""
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ValueError(f"{len(ports)} ports; 1 to {MAX_PORTS} can be")
        count = 2 * (len(ports) + 1)
        features = Feature.SIZE | Feature.MULTIPORT
        super().__init__(name, ram, queue_sizes=[QUEUE_SIZE] * count, features=int(features), in_order=True, log=log)
        self.ports = tuple(ports)
        self._columns = columns
        self._rows = rows
        self._messages: list[bytes] = []
        self._guest_open = [False] * len(ports)
        self._sent = [0] * len(ports)  # bytes of the chain at the head of each transmit queue that the host has taken
        self._told: list[bool | None] = [None] * len(ports)  # whether the host's end is open, as the guest was told
        for number, port in enumerate(ports):
            port.on_input = lambda data, number=number: self.receive(number, data)  # type: ignore[misc]
            port.on_room = lambda number=number: self.serve(self._tx(number))  # type: ignore[misc]
            port.on_open = lambda number=number: self._host_opened(number)  # type: ignore[misc]

    @staticmethod
    def _rx(port: int) -> int:
        """Number of a port's receive queue (5.3.2)."""
        return 0 if port == 0 else 2 * port + 2

    @classmethod
    def _tx(cls, port: int) -> int:
        return cls._rx(port) + 1

    # --- for the host -------------------------------------------------------------------------------------------------

    def receive(self, port: int, data: bytes) -> int:
        """Give input to the guest; return how many bytes found room in its buffers."""
        queue = self.queues[self._rx(port)]
        if not self.is_active or not queue.is_enabled:
            return 0
        done = 0
        try:
            for _ in range(queue.size):
                if done == len(data):
                    break
                chain = queue.pop()
                if chain is None:
                    if queue.expect_kicks():
                        continue
                    break
                written = chain.scatter(memoryview(data)[done:])
                done += written
                queue.push(chain, written)
            else:
                self.runner.kick(queue.index)  # others have their turn, then the host may offer the rest
        except BrokenQueueError as error:
            self.fail(queue, error)
        queue.notify_driver()
        return done

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the console's new size."""
        self._columns, self._rows = columns, rows
        if self.is_active and self.features & _MULTIPORT:
            self._tell(0, Event.RESIZE, 0, _RESIZE.pack(columns, rows))
        self.transport.config_changed()

    def _host_opened(self, port: int) -> None:
        """Tell the guest that the host's end has been opened or closed."""
        if self.is_active and self.features & _MULTIPORT:
            self._told[port] = self.ports[port].is_open
            self._tell(port, Event.PORT_OPEN, int(self.ports[port].is_open))
        self.serve(self._tx(port))

    def guest_has_open(self, port: int) -> bool:
        """Whether the guest's end of a port is open."""
        return self._guest_open[port]

    # --- for the transport --------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return the configuration space (5.3.4)."""
        return _CONFIG.pack(self._columns, self._rows, len(self.ports), 0)

    def reset(self) -> None:
        """Forget the driver."""
        super().reset()
        self._messages.clear()
        self._guest_open = [False] * len(self.ports)
        self._sent = [0] * len(self.ports)
        self._told = [None] * len(self.ports)

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the device's state, with what its host's ends hold for the guest."""
        return super().state() | {
            "cols": self._columns,
            "rows": self._rows,
            "messages": list(self._messages),
            "guest_open": list(self._guest_open),
            "host_open": [-1 if told is None else int(told) for told in self._told],
            "sent": list(self._sent),
            "held": [port.held for port in self.ports],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; raises KeyError, TypeError or ValueError when it is no state of such a console.

        Whether anybody is at the host's ends is as it is, and the guest is told when it is served.
        """
        count = len(self.ports)
        saved = Saved(state)
        columns, rows = saved.number("cols", 0xFFFF), saved.number("rows", 0xFFFF)
        messages = saved.items("messages", MOST_MESSAGES)
        guest_open = saved.flags("guest_open", count)
        told = saved.items("host_open", count, least=count)
        sent = saved.numbers("sent", count, MAX_CHAIN_BYTES, least=count)
        held = saved.items("held", count, least=count)
        if any(type(one) is not int or not -1 <= one <= 1 for one in told):
            raise ValueError(f"host_open is {told}")
        for data, most in (*((one, _LONGEST_MESSAGE) for one in messages), *((one, _MOST_HELD) for one in held)):
            if type(data) is not bytes or len(data) > most:
                raise ValueError("a message, or what is held of a port")
        self.load_rest(saved)
        self._columns, self._rows, self._messages = columns, rows, messages
        self._guest_open, self._sent = guest_open, sent
        self._told = [None if one < 0 else bool(one) for one in told]
        for port, data in zip(self.ports, held, strict=True):
            port.held = data

    def _tell_of_hosts(self) -> None:
        """Tell the guest of host's ends that are not as it knows them: it was restored, and nobody has moved there."""
        for number, (port, told) in enumerate(zip(self.ports, self._told, strict=True)):
            if told is not None and told != port.is_open:
                self._host_opened(number)

    # --- queues that go -----------------------------------------------------------------------------------------------

    def disable(self, queue: Queue) -> None:
        """Forget how much of a transmit queue's first chain has been sent."""
        super().disable(queue)
        if queue.index % 2 and queue.index != CONTROL_TX:
            self._sent[max(queue.index // 2 - 1, 0)] = 0

    # --- for the runner -----------------------------------------------------------------------------------------------

    def handle_queue(self, queue: Queue, most: int | None) -> None:
        """Move output, or what waits for the buffers that have come."""
        if queue.index == CONTROL_TX:
            super().handle_queue(queue, most)
        elif queue.index == CONTROL_RX:
            self._tell_of_hosts()
            self._flush_messages()
        else:
            port = max(queue.index // 2 - 1, 0)
            if queue.index % 2:
                self._transmit(queue, port)
            else:
                queue.ignore_kicks()
                if not queue.expect_kicks() and queue.is_enabled:
                    return
                self.ports[port].more()

    def _transmit(self, queue: Queue, port: int) -> None:
        """Hand output to the host until it takes no more; where nobody is it is lost, as on a serial line."""
        host = self.ports[port]
        try:
            for _ in range(queue.size):
                chain = queue.pop()
                if chain is None:
                    if queue.expect_kicks():
                        continue
                    return
                if host.is_open and not self._send(host, port, chain):
                    queue.unpop()
                    return
                self._sent[port] = 0
                queue.push(chain, 0)
            self.runner.kick(queue.index)
        finally:
            queue.notify_driver()

    def _send(self, host: PortHost, port: int, chain: Chain) -> bool:
        """Send the rest of a chain; return whether all of it is gone."""
        for piece in chain.slice(chain.readable, self._sent[port], chain.readable_size):
            taken = host.send(piece)
            self._sent[port] += taken
            if taken < len(piece):
                return False
        return True

    # --- control ------------------------------------------------------------------------------------------------------

    def handle(self, queue: Queue, chain: Chain) -> int:
        """Take a control message of the driver's."""
        del queue
        data = chain.gather(_CONTROL.size)
        if len(data) < _CONTROL.size:
            raise BrokenQueueError(f"a control message of {len(data)} bytes")
        port, event, value = _CONTROL.unpack(data)
        if event == Event.DEVICE_READY:
            for number in range(len(self.ports)) if value == 1 else ():
                self._tell(number, Event.DEVICE_ADD)
        elif port >= len(self.ports):
            self.log.once("console.no_such_port", port=port, message=event)
        elif event == Event.PORT_READY and value == 1:
            self._introduce(port)
        elif event == Event.PORT_OPEN:
            self._guest_open[port] = value == 1
        return 0

    def _introduce(self, port: int) -> None:
        """Tell the driver what a port is."""
        name = self.ports[port].name
        if name:
            self._tell(port, Event.PORT_NAME, 1, name.encode())
        else:
            self._tell(port, Event.CONSOLE_PORT, 1)
            self._tell(port, Event.RESIZE, 0, _RESIZE.pack(self._columns, self._rows))
        self._told[port] = self.ports[port].is_open
        if self.ports[port].is_open:
            self._tell(port, Event.PORT_OPEN, 1)

    def _tell(self, port: int, event: Event, value: int = 0, more: bytes = b"") -> None:
        if len(self._messages) < MOST_MESSAGES:
            self._messages.append(_CONTROL.pack(port, event, value) + more)
        else:
            self.log.once("console.messages_lost")
        queue = self.queues[CONTROL_RX]
        try:
            self._flush_messages()
        except BrokenQueueError as error:
            self.fail(queue, error)

    def _flush_messages(self) -> None:
        """Send the control messages that the driver has buffers for."""
        queue = self.queues[CONTROL_RX]
        if not queue.is_enabled:
            return
        while self._messages:
            chain = queue.pop()
            if chain is None:
                if queue.expect_kicks():
                    continue
                break
            message = self._messages.pop(0)
            queue.push(chain, chain.scatter(message))
        queue.notify_driver()

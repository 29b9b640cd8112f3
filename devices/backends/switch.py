"""A switch between machines of one process, which can be told to do what networks do: lose, delay, reorder, part.

It has no thread. Whoever sends a frame puts it into the queues of the ports that it is for, each with the time from
which it is there; a port's file becomes readable at that time. A queue is bounded: what finds it full is dropped.

No offload is offered: every frame has its checksums and the size that a wire would carry, so that a fault does to it
what a wire would. A bit that is flipped in a frame without its checksum would reach the guest's programs.
"""

from __future__ import annotations

import hashlib
import time
from heapq import heappop, heappush
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from devices.backends.errors import BackendError
from devices.backends.net_faults import Copy, Corrupt, Delay, Drop, Duplicate, Partition, Reorder, Which
from devices.backends.timerfd import TimerFd
from devices.events import EventLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self, TypeAlias

    from devices.backends.net_faults import Fault

    Ports: TypeAlias = str | Iterable[str] | None

__all__ = ["Network", "PortCounters", "SwitchPort", "open_port"]

ETHERNET: Final = 14
MAX_ADDRESSES: Final = 4096
"""Stations that a network remembers; when there are more it begins anew."""
QUEUE_BYTES: Final = 4 << 20
"""Bytes of frames that wait for one port."""
NAME_MAX: Final = 32

_networks: Final[WeakValueDictionary[str, Network]] = WeakValueDictionary()
_numbers: Final = count(1)


def _check_name(what: str, name: str) -> None:
    if not 0 < len(name) <= NAME_MAX or not all(letter.isalnum() or letter in "-_." for letter in name):
        raise ValueError(f"{name!r} is no name of a {what}: 1 to {NAME_MAX} letters, digits, '-', '_' and '.'")


def open_port(name: str) -> SwitchPort:
    """Attach to NETWORK/PORT; raises BackendError when that cannot be done."""
    network, _, port = name.partition("/")
    found = _networks.get(network)
    if found is None:
        hint = "`hypervisor.Network` makes one; machines of several processes are joined by link=NAME"
        raise BackendError(f"there is no network {network!r} in this process", hint=hint)
    return found.attach(port)


class PortCounters:
    """Frames `sent` by a port's machine, `received` by it, and `overruns`, which found its queue full."""

    __slots__ = ("overruns", "received", "sent")

    def __init__(self) -> None:
        """Start at zero."""
        self.sent = self.received = self.overruns = 0

    def __repr__(self) -> str:
        return f"<sent {self.sent}, received {self.received}, overruns {self.overruns}>"


class _Waiting:
    """A frame in a queue, and the time from which it is there; None: it has been taken out of its turn."""

    __slots__ = ("at_ns", "frame")

    def __init__(self, frame: bytes, at_ns: int) -> None:
        self.frame: bytes | None = frame
        self.at_ns = at_ns


class SwitchPort:
    """A port that a machine, or a test, is attached to. See `devices.backends.net.NetBackend`."""

    header_size = 0
    offered = 0
    plain_fd = None

    def __init__(self, network: Network, name: str, counters: PortCounters) -> None:
        """Be a port of `network`, which makes it."""
        self.name = name
        self.counters = counters
        self._network = network
        self._timer = TimerFd()
        self._set_ns: int | None = None
        self._queue: list[tuple[int, int, _Waiting]] = []  # a heap
        self._bytes = 0

    def fileno(self) -> int:
        """Return a file that is readable while a frame is there."""
        return self._timer.fileno()

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Give a frame to the network; False when it is too short to be one, or this port is closed."""
        frame = b"".join(buffers)
        return len(frame) >= ETHERNET and self._network.forward(self, frame)

    def receive(self, buffer: memoryview) -> int | None:
        """Take the next frame that is there."""
        frame = self._network.take(self)
        if frame is None:
            return None
        buffer[: len(frame)] = frame
        return len(frame)

    def set_offloads(self, features: int) -> None:
        """Do nothing: there are none."""

    def close(self) -> None:
        """Leave the network; what waits is lost."""
        self._network.detach(self)

    # --- for the network, which holds its lock ------------------------------------------------------------------------

    def put(self, frame: bytes, at_ns: int, number: int) -> _Waiting | None:
        """Queue a frame; return what waits, or None when the queue is full."""
        if len(self._queue) >= self._network.queue_frames or self._bytes + len(frame) > QUEUE_BYTES:
            self.counters.overruns += 1
            return None
        waiting = _Waiting(frame, at_ns)
        self._bytes += len(frame)
        heappush(self._queue, (at_ns, number, waiting))
        if self._set_ns is None or at_ns < self._set_ns:
            self._set(at_ns)
        return waiting

    def pop(self, now_ns: int) -> bytes | None:
        """Take the next frame that is there; when there is none, be readable when there will be one."""
        while self._queue:
            at_ns, _, waiting = self._queue[0]
            if waiting.frame is not None and at_ns > now_ns:
                self._set(at_ns)
                return None
            heappop(self._queue)
            frame = self.withdraw(waiting)
            if frame is not None:
                return frame
        self._set(None)
        return None

    def withdraw(self, waiting: _Waiting) -> bytes | None:
        """Take a frame out of its turn, and return it; None when it has been taken already."""
        frame, waiting.frame = waiting.frame, None
        if frame is not None:
            self._bytes -= len(frame)
        return frame

    def forget(self) -> None:
        """Lose every frame that waits."""
        for _, _, waiting in self._queue:
            waiting.frame = None
        self._queue.clear()
        self._bytes = 0
        self._set(None)

    def shut(self) -> None:
        """Close the file."""
        self.forget()
        self._timer.close()

    def _set(self, at_ns: int | None) -> None:
        if at_ns != self._set_ns:
            self._timer.set(at_ns)
            self._set_ns = at_ns


class Network:
    """A learning switch. Methods may be called from any thread; its lock is the last that anybody takes.

    Faults meet each frame in the order in which they were made, once for every port that it goes to. They end one by
    one (`Fault.end`, or as context managers) or all at once (`heal`).

    Attributes:
        name: by which configurations name it, in this process.
        queue_frames: how many frames may wait for one port.
        counters: by port.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        seed: object = 0,
        queue_frames: int = 1024,
        pcap: str | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Make a network without ports.

        Args:
            name: None takes one that is free.
            seed: what the faults' random numbers are made from.
            queue_frames: how many frames may wait for one port.
            pcap: file to capture every frame in that arrives.
            now_ns: the monotonic clock.

        Raises:
            ValueError: there is a network of that name, or it is no name.
            BackendError: the file cannot be made.
        """
        self.name = f"network{next(_numbers)}" if name is None else name
        _check_name("network", self.name)
        if self.name in _networks:
            raise ValueError(f"there is a network {self.name!r} already")
        self.queue_frames = queue_frames
        self.counters: dict[str, PortCounters] = {}
        self._seed = seed
        self._now_ns = now_ns
        self._lock = Lock()
        self._ports: dict[str, SwitchPort] = {}
        self._addresses: dict[bytes, SwitchPort] = {}
        self._faults: tuple[Fault, ...] = ()
        self._faults_made = count()
        self._frames = count()
        self._late: dict[tuple[str, str], _Waiting] = {}
        self._capture = None
        if pcap is not None:
            from devices.backends.pcap import PcapFile

            self._capture = PcapFile(pcap, log=EventLog(network=self.name))
        _networks[self.name] = self

    # --- ports --------------------------------------------------------------------------------------------------------

    def port(self, name: str | None = None, *, mac: str | None = None, pcap: str | None = None) -> str:
        """Return what `MachineConfig(nets=[...])` takes for a machine at this port.

        Args:
            name: of the port; None takes one that is free.
            mac: the guest's address; None makes one of the names, the same in every run.
            pcap: file to capture the frames of this port in, as the guest sends and gets them.
        """
        if name is None:
            name = next(free for number in count(1) if (free := f"port{number}") not in self.counters)
        self._counters_of(name)
        if mac is None:
            digest = hashlib.sha256(f"{self.name}/{name}".encode()).digest()
            mac = ":".join(f"{byte:02x}" for byte in (0x52, *digest[:5]))  # a single station's, locally administered
        text = f"switch={self.name}/{name},mac={mac}"
        return text if pcap is None else f"{text},pcap={pcap.replace(',', ',,')}"

    def attach(self, name: str) -> SwitchPort:
        """Attach to a port; a machine does so by itself. Raises BackendError when somebody else is there."""
        try:
            counters = self._counters_of(name)
        except ValueError as error:
            raise BackendError(str(error)) from None
        with self._lock:
            if name in self._ports:
                raise BackendError(f"port {name} of network {self.name} is taken", hint="each machine needs its own")
            port = self._ports[name] = SwitchPort(self, name, counters)
            return port

    def _counters_of(self, name: str) -> PortCounters:
        _check_name("port", name)
        return self.counters.setdefault(name, PortCounters())

    def detach(self, port: SwitchPort) -> None:
        """Close a port and forget the stations behind it; harmless when done already."""
        with self._lock:
            if self._ports.get(port.name) is port:
                del self._ports[port.name]
                self._addresses = {address: one for address, one in self._addresses.items() if one is not port}
                port.shut()

    # --- frames -------------------------------------------------------------------------------------------------------

    def forward(self, source: SwitchPort, frame: bytes) -> bool:
        """Bring a frame to the ports that it is for; False when its own port is closed."""
        with self._lock:
            if self._ports.get(source.name) is not source:
                return False
            source.counters.sent += 1
            known = self._addresses.get(frame[:6])
            address = frame[6:12]
            if not address[0] & 1:
                if len(self._addresses) >= MAX_ADDRESSES:
                    self._addresses.clear()
                self._addresses[address] = source
            targets = self._ports.values() if known is None else (known,)
            for target in targets:
                if target is not source:
                    self._carry((source.name, target.name), target, frame)
            return True

    def _carry(self, pair: tuple[str, str], target: SwitchPort, frame: bytes) -> None:
        """Let every fault meet a frame for one port, and queue what is left of it."""
        copies = [Copy(frame)]
        for fault in self._faults:
            copies = [new for copy in copies for new in fault.apply(pair, copy)]
        now_ns = self._now_ns()
        for copy in copies:
            held = self._late.pop(pair, None)
            if held is not None and held.frame is None:  # nothing came behind it in time
                held = None
            late_ns = copy.late_ns if held is None else 0
            waiting = target.put(copy.frame, now_ns + copy.delay_ns + late_ns, next(self._frames))
            if held is not None:
                self._release(target, held, now_ns + copy.delay_ns)
            elif waiting is not None and late_ns:
                self._late[pair] = waiting

    def _release(self, target: SwitchPort, held: _Waiting, at_ns: int) -> None:
        """Let a frame that was held back arrive behind the one that arrives at `at_ns`, unless it does so earlier."""
        if held.at_ns > at_ns:
            frame = target.withdraw(held)
            if frame is not None:
                target.put(frame, at_ns, next(self._frames))

    def take(self, port: SwitchPort) -> bytes | None:
        """Take the next frame that is there for a port."""
        with self._lock:
            if self._ports.get(port.name) is not port:
                return None
            frame = port.pop(self._now_ns())
            if frame is not None:
                port.counters.received += 1
                if self._capture is not None:
                    self._capture.record(frame)
            return frame

    def flush(self) -> None:
        """Lose every frame that is under way."""
        with self._lock:
            for port in self._ports.values():
                port.forget()

    # --- faults -------------------------------------------------------------------------------------------------------

    def drop(self, probability: float, *, seed: object = None, src: Ports = None, dst: Ports = None) -> Fault:
        """Lose frames.

        Args:
            probability: of each one to be met, from 0 to 1.
            seed: of the random numbers; None makes one of the network's seed and the number of the fault.
            src: ports that they come from; None: any.
            dst: ports that they go to; None: any.

        Raises:
            ValueError: a value that cannot be, or a port that is not there.
        """
        return self._add(Drop(self._which(probability, seed, src, dst)))

    def duplicate(self, probability: float, *, seed: object = None, src: Ports = None, dst: Ports = None) -> Fault:
        """Let frames arrive twice; see `drop`."""
        return self._add(Duplicate(self._which(probability, seed, src, dst)))

    def corrupt(self, probability: float, *, seed: object = None, src: Ports = None, dst: Ports = None) -> Fault:
        """Flip one bit of frames, behind the Ethernet header; see `drop`."""
        return self._add(Corrupt(self._which(probability, seed, src, dst)))

    def reorder(
        self,
        probability: float,
        *,
        within: float = 0.1,
        seed: object = None,
        src: Ports = None,
        dst: Ports = None,
    ) -> Fault:
        """Hold frames back until the next one of their pair has passed, `within` seconds at most; see `drop`."""
        return self._add(Reorder(within, self._which(probability, seed, src, dst)))

    def delay(  # noqa: PLR0913 - all of it by name
        self,
        seconds: float,
        *,
        jitter: float = 0.0,
        probability: float = 1.0,
        seed: object = None,
        src: Ports = None,
        dst: Ports = None,
    ) -> Fault:
        """Hold frames back for `seconds`, and at random up to `jitter` more, in their order; see `drop`."""
        return self._add(Delay(seconds, jitter, self._now_ns, self._which(probability, seed, src, dst)))

    def partition(self, *groups: Iterable[str]) -> Fault:
        """Let no frame pass between groups of ports; a port in none of them reaches everybody."""
        parts = [self._names(group) or frozenset() for group in groups]
        return self._add(Partition(parts))

    def heal(self) -> None:
        """End every fault; frames that are held back arrive at their time."""
        with self._lock:
            self._faults = ()

    def _names(self, ports: Ports) -> frozenset[str] | None:
        if ports is None:
            return None
        names = frozenset([ports] if isinstance(ports, str) else ports)
        for name in names - self.counters.keys():
            raise ValueError(f"there is no port {name!r}; there are: {', '.join(sorted(self.counters))}")
        return names

    def _which(self, probability: float, seed: object, src: Ports, dst: Ports) -> Which:
        number = next(self._faults_made)
        seed = f"{self._seed}/{number}" if seed is None else seed
        return Which(probability, seed, self._names(src), self._names(dst))

    def _add(self, fault: Fault) -> Fault:
        def end() -> None:
            with self._lock:
                self._faults = tuple(one for one in self._faults if one is not fault)

        fault.on_end = end
        with self._lock:
            self._faults += (fault,)
        return fault

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the name and the capture back; machines that are still attached reach nobody."""
        with self._lock:
            self._faults = (Drop(Which()),)
            if self._capture is not None:
                self._capture.close()
                self._capture = None
        if _networks.get(self.name) is self:
            del _networks[self.name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

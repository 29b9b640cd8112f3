"""The driver's half of a virtio device, written from the specification; its constants are restated, not imported."""

from collections import deque
from itertools import pairwise
from struct import pack, unpack_from

from devices.ports import GuestFault
from devices.virtio.transport import VirtioTransport

# Virtio 1.2, 2.1, 2.7 and chapter 6
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
NEXT, WRITE, INDIRECT = 1, 2, 4
F_INDIRECT, F_EVENT_IDX, F_VERSION_1, F_IN_ORDER = 1 << 28, 1 << 29, 1 << 32, 1 << 35
PAGE = 4096
LOW = 1 << 20
HIGH_BASE = 1 << 32
HIGH = 1 << 16


class FakeRam:
    """RAM from 0 to 1 MiB and from 4 GiB on; nothing in between.

    Somebody follows its changes and is as quick as can be: what a device says that it has written is copied at once,
    and not again. So `check` finds what was written later, or without a word.
    """

    is_tracked = True

    def __init__(self):
        self.low, self.high = bytearray(LOW), bytearray(HIGH)
        self.low_copy, self.high_copy = bytearray(LOW), bytearray(HIGH)

    def view(self, gpa, size):
        if size >= 0 and gpa >= 0 and gpa + size <= LOW:
            return memoryview(self.low)[gpa : gpa + size]
        if size >= 0 and gpa >= HIGH_BASE and gpa + size <= HIGH_BASE + HIGH:
            return memoryview(self.high)[gpa - HIGH_BASE : gpa - HIGH_BASE + size]
        raise GuestFault(gpa, size)

    def read(self, gpa, size):
        return bytes(self.view(gpa, size))

    def write(self, gpa, data):
        self.view(gpa, len(data))[:] = data
        self.written(gpa, len(data))

    def written(self, gpa, size):
        copy, offset = (self.low_copy, gpa) if gpa < LOW else (self.high_copy, gpa - HIGH_BASE)
        copy[offset : offset + size] = self.view(gpa, size)

    def check(self):
        assert self.low_copy == self.low, "a device has written to memory without a word"
        assert self.high_copy == self.high, "a device has written to memory without a word"


class FakeSignal:
    """Counts how often it was fired."""

    is_pending = False

    def __init__(self):
        self.count = 0

    def fire(self):
        self.count += 1

    def fileno(self):
        return -1


class InlineRunner:
    """Serves a queue when it is kicked; kicks that come while it serves wait for `settle`."""

    def __init__(self):
        self.device = None
        self.running = self.busy = False
        self.waiting = []
        self.served = 0

    def start(self):
        self.running = True
        for queue in self.device.queues:
            self.kick(queue.index)

    def stop(self):
        self.running = False
        self.waiting.clear()

    def kick(self, index):
        if self.running:
            self.waiting.append(index)
            self.settle()

    def settle(self, most=100):
        """Serve what waits, at most so often: a device that always wants to be called again is caught."""
        if self.busy:
            return
        self.busy = True
        try:
            while self.waiting and most:
                most -= 1
                self.served += 1
                self.device.serve(self.waiting.pop(0))
            assert most or not self.waiting, "the device wants to be served for ever"
            for queue in self.device.queues:
                queue._ram.check()
        finally:
            self.busy = False


class DriverQueue:
    """The driver's half of one queue, rings at `base`."""

    def __init__(self, ram, queue, base, size, features):
        self.ram, self.size, self.features = ram, size, features
        self.queue = queue
        self.table, self.available = base, base + 16 * size
        self.used = (self.available + 6 + 2 * size + 3) & ~3
        self.end = (self.used + 6 + 8 * size + 15) & ~15
        self.free = list(range(size))
        self.chains = {}
        self.order = deque()  # heads that were offered and not seen used
        self.idx = self.seen = 0

    # --- descriptors --------------------------------------------------------------------------------------------------

    def write_descriptor(self, index, gpa, length, flags=0, following=0, *, table=None):
        self.ram.write(
            (self.table if table is None else table) + 16 * index, pack("<QIHH", gpa, length, flags, following)
        )

    def chain(self, pieces, *, indirect_at=None, direct=0):
        """Describe (gpa, length, writable) pieces and return the head; a table has all but the first `direct`."""
        if indirect_at is None:
            direct = len(pieces)
        nested = len(pieces) - direct
        taken = [self.free.pop(0) for _ in range(direct + bool(nested))]
        for position, (gpa, length, writable) in enumerate(pieces):
            last = position == len(pieces) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            if position < direct:
                self.write_descriptor(taken[position], gpa, length, flags, 0 if last else taken[position + 1])
            else:
                index = position - direct
                self.write_descriptor(index, gpa, length, flags, 0 if last else index + 1, table=indirect_at)
        if nested:
            self.write_descriptor(taken[direct], indirect_at, 16 * nested, INDIRECT)
        if self.features & F_IN_ORDER:  # what the driver owes in turn (2.7.5.2): descriptors in ring order
            assert all(b == (a + 1) % self.size for a, b in pairwise(taken))
        self.chains[taken[0]] = taken
        return taken[0]

    def offer(self, head):
        """Put a head into the available ring (2.7.13.2) without showing it."""
        self.ram.write(self.available + 4 + 2 * (self.idx % self.size), pack("<H", head))
        self.order.append(head)
        self.idx = (self.idx + 1) & 0xFFFF

    def publish(self, idx=None):
        """Show what was offered; return whether the device wants a kick (2.7.10.1)."""
        old = unpack_from("<H", self.ram.read(self.available + 2, 2))[0]
        new = self.idx if idx is None else idx
        self.ram.write(self.available + 2, pack("<H", new))
        if self.features & F_EVENT_IDX:
            event = unpack_from("<H", self.ram.read(self.used + 4 + 8 * self.size, 2))[0]
            return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not unpack_from("<H", self.ram.read(self.used, 2))[0] & 1

    def want_interrupt(self, *, wanted=True, at=None):
        """Ask to be told of the next used buffer, or of none (2.7.7.1)."""
        if self.features & F_EVENT_IDX:
            event = (self.seen if wanted else self.seen - 1) if at is None else at
            self.ram.write(self.available + 4 + 2 * self.size, pack("<H", event & 0xFFFF))
        else:
            self.ram.write(self.available, pack("<H", 0 if wanted else 1))

    def collect(self):
        """Return the used buffers that were not seen yet: (head, bytes written)."""
        idx = unpack_from("<H", self.ram.read(self.used + 2, 2))[0]
        done = []
        while self.seen != idx:
            head, written = unpack_from("<II", self.ram.read(self.used + 4 + 8 * (self.seen % self.size), 8))
            if self.features & F_IN_ORDER:
                assert head == self.order.popleft(), "used out of order, against VIRTIO_F_IN_ORDER"
            self.free += self.chains.pop(head, [])
            done.append((head, written))
            self.seen = (self.seen + 1) & 0xFFFF
        return done


class Driver:
    """A driver that has found a device behind a VirtioTransport; its rings lie from `base` on."""

    base = PAGE

    def __init__(self, device, ram, *, features=None, size=None, start=True):
        self.device, self.ram = device, ram
        self.runner = InlineRunner()
        self.runner.device = device
        self.signals = [FakeSignal() for _ in device.queues]
        self.config_signal = FakeSignal()
        self.transport = VirtioTransport(device, self.runner, self.signals, self.config_signal)
        self.wanted = device.offered if features is None else features | F_VERSION_1
        self.size = size
        self.queues = []
        if start:
            self.start()

    def start(self):
        """Initialise the device (3.1.1)."""
        transport = self.transport
        transport.write_status(0)
        assert transport.status == 0
        transport.write_status(ACKNOWLEDGE)
        transport.write_status(ACKNOWLEDGE | DRIVER)
        for half in (0, 1):
            transport.driver_select = half
            transport.write_driver_features(self.wanted >> 32 * half & 0xFFFFFFFF)
        transport.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert transport.status & FEATURES_OK
        self.queues = []
        base = self.base
        for index, queue in enumerate(self.device.queues):
            size = self.size or min(queue.max_size, 16)
            ours = DriverQueue(self.ram, queue, base, size, self.wanted)
            self.ram.write(base, bytes(ours.end - base))
            base = ours.end
            transport.queue_select = index
            transport.set_queue_size(size)
            for area, address in (("descriptors", ours.table), ("available", ours.available), ("used", ours.used)):
                transport.set_queue_address(area, address, 0xFFFF_FFFF_FFFF_FFFF)
            transport.enable_queue()
            self.queues.append(ours)
        self.memory = self.first = (base + PAGE) & -PAGE
        transport.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def buffer(self, data_or_size):
        """Return the address of new memory that holds `data`, or of so many zeroes."""
        data = bytes(data_or_size)
        if self.memory + len(data) + 13 > LOW:
            self.memory = self.first  # what was there has been used long ago
        gpa = self.memory
        self.memory += max(len(data), 1) + 13  # not aligned to anything
        self.ram.write(gpa, data)
        return gpa

    def send(self, queue, readable=b"", writable=0, *, cuts=(), indirect=False):
        """Offer one chain, kick if wanted, and return (head, where the writable part is).

        `cuts` are lengths after which the readable bytes, then the writable ones, are cut into further descriptors.
        """
        ours = self.queues[queue]
        source, target = self.buffer(readable), self.buffer(writable)
        pieces = [
            *self._cut(source, len(readable), cuts, writable=False),
            *self._cut(target, writable, cuts, writable=True),
        ]
        at = None
        if indirect:
            self.memory = (self.memory + 15) & -16
            at = self.buffer(16 * len(pieces))
        head = ours.chain(pieces, indirect_at=at)
        ours.offer(head)
        if ours.publish():
            self.runner.kick(queue)
        return head, target

    @staticmethod
    def _cut(gpa, size, cuts, *, writable):
        pieces = []
        for cut in (*cuts, size):
            length = min(cut, size)
            if length:
                pieces.append((gpa, length, writable))
            gpa += length
            size -= length
        return pieces

    def ask(self, queue, readable=b"", writable=0, **how):
        """Send one chain and return what the device wrote to it."""
        head, target = self.send(queue, readable, writable, **how)
        done = dict(self.queues[queue].collect())
        assert head in done, "the chain did not come back"
        return self.ram.read(target, done[head])

"""Devices of every kind with a driver and a host that do random things: what one sees is a log that can be compared.

A world is cut in two at any moment: `freeze` takes the device's state, memory, what the driver knows and what the host
has; `thaw` goes on from there in another world.
"""

import copy
from collections import deque
from random import Random
from struct import pack

from fakes import FakeAlarm, FakeClock
from virtio_driver import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT, HIGH_BASE, Driver, DriverQueue, FakeRam

from devices.events import EventLog
from devices.virtio.balloon import Balloon
from devices.virtio.block import Block
from devices.virtio.console import Console
from devices.virtio.net import Net
from devices.virtio.rng import Rng

MAC = bytes.fromhex("525400123456")


class World:
    """One device, its driver and its host.

    Attributes:
        log: whatever the driver and the host could see, in order.
        host: plain values: what the host has.
    """

    queues = (0,)
    more_features = 0

    def __init__(self, seed):
        self.seed = seed
        chance = Random(f"{seed} features")
        self.ram = FakeRam()
        self.host = {}
        self.device = self.make()
        self.log = []
        offered = self.device.offered
        wanted = sum(bit for bit in (F_INDIRECT, F_EVENT_IDX, F_IN_ORDER) if bit & offered and chance.random() < 0.5)
        self.driver = Driver(
            self.device,
            self.ram,
            features=wanted | self.more_features & offered,
            size=chance.choice([2, 4, 8]),
            start=False,
        )

    def make(self):
        raise NotImplementedError

    # --- what happens -------------------------------------------------------------------------------------------------

    def run(self, first, end):
        """Make the steps of these numbers: the same in every world of this seed."""
        for number in range(first, end):
            self.step(Random(f"{self.seed} {number}"))
        return self

    def step(self, chance):
        driver, transport = self.driver, self.driver.transport
        kind = chance.random()
        if not driver.queues or kind < 0.03:
            driver.start()
        elif kind < 0.05:
            self.break_a_rule(chance)
        elif kind < 0.10:
            self.set_up_anew(chance)
        elif kind < 0.25:
            self.happen(chance)
        elif kind < 0.30:
            self.log.append(("isr", transport.take_isr()))
        elif kind < 0.35:
            self.log.append(("config", transport.read_config(0, 8), transport.read_generation()))
        elif kind < 0.45:
            ours = chance.choice(driver.queues)
            ours.want_interrupt(wanted=chance.random() < 0.7)
        elif kind < 0.55:
            self.collect()
        else:
            self.request(chance)
        self.look()

    def set_up_anew(self, chance):
        """Reset the device and leave it half set up; the next steps find that, or begin anew."""
        transport = self.driver.transport
        transport.write_status(chance.choice([0, 1, 3, 0x83]))
        transport.device_select, transport.driver_select = chance.choice([0, 1, 7]), chance.choice([0, 1, 9])
        transport.queue_select = chance.choice([0, 1, 500])
        if chance.random() < 0.5:
            transport.write_driver_features(chance.getrandbits(32))
            transport.set_queue_size(chance.getrandbits(16))
            transport.set_queue_address("used", chance.getrandbits(64), chance.choice([0xFFFF_FFFF, (1 << 64) - 1]))
        if transport.status == 0:
            self.driver.queues = []

    def break_a_rule(self, chance):
        ours = self.driver.queues[chance.choice(self.queues)]
        self.ram.write(ours.available + 2, pack("<H", ours.idx + 5000 & 0xFFFF))
        self.driver.transport.kick(ours.queue.index)
        self.ram.write(ours.available + 2, pack("<H", ours.idx))

    def send(self, queue, readable, writable, chance):
        """Offer a chain if there is room for it."""
        ours = self.driver.queues[queue]
        indirect = bool(ours.features & F_INDIRECT) and chance.random() < 0.4
        cuts = [chance.randrange(1, 40) for _ in range(chance.randrange(2))]
        needed = 1 if indirect else 2 * (1 + len(cuts))
        if len(ours.free) >= needed:
            self.driver.send(queue, readable, writable, cuts=cuts, indirect=indirect)

    def collect(self):
        for number, ours in enumerate(self.driver.queues):
            self.log.append(("used", number, ours.collect()))

    def look(self):
        """Note what can be seen without changing anything."""
        transport = self.driver.transport
        self.log.append(
            (
                transport.status,
                transport.peek_isr(),
                transport.device_features,
                transport.driver_features,
                transport.queue_select,
                [signal.count - before for signal, before in zip(self.signals(), self.counted(), strict=True)],
                [(q.size, q.descriptors, q.available, q.used, q.is_enabled) for q in self.device.queues],
                self.device.config(),
            )
        )

    def signals(self):
        return [*self.driver.signals, self.driver.config_signal]

    def counted(self):
        self.before = getattr(self, "before", [0] * len(self.signals()))
        return self.before

    def request(self, chance):
        """The driver asks for something."""

    def happen(self, chance):
        """The host does something."""

    # --- cutting ------------------------------------------------------------------------------------------------------

    def freeze(self):
        self.driver.runner.stop()
        driver = self.driver
        known = [
            (q.table, q.size, q.features, list(q.free), dict(q.chains), deque(q.order), q.idx, q.seen)
            for q in driver.queues
        ]
        frozen = {
            "state": driver.transport.state(),
            "ram": (bytes(self.ram.low), bytes(self.ram.high)),
            "known": copy.deepcopy(known),
            "places": (getattr(driver, "memory", 0), getattr(driver, "first", 0)),
            "host": copy.deepcopy(self.host),
        }
        if self.device.is_active:
            driver.runner.start()
        self.before = [signal.count for signal in self.signals()]
        self.log.clear()
        return frozen

    def thaw(self, frozen):
        """Go on from there, whatever this world has been doing."""
        driver = self.driver
        driver.runner.stop()
        low, high = frozen["ram"]
        self.ram.write(0, low)
        self.ram.write(HIGH_BASE, high)
        self.host.clear()
        self.host.update(copy.deepcopy(frozen["host"]))
        before = [signal.count for signal in self.signals()]
        driver.transport.load(frozen["state"])
        assert [signal.count for signal in self.signals()] == before, "loading interrupts nobody"
        driver.queues = []
        for index, (table, size, features, *known) in enumerate(copy.deepcopy(frozen["known"])):
            ours = DriverQueue(self.ram, self.device.queues[index], table, size, features)
            ours.free, ours.chains, ours.order, ours.idx, ours.seen = known
            driver.queues.append(ours)
        driver.memory, driver.first = frozen["places"]
        self.log.clear()
        self.before = [signal.count for signal in self.signals()]
        if self.device.is_active:
            driver.runner.start()
        return self

    def seen(self):
        """Everything that there is to see in the end."""
        return self.log, bytes(self.ram.low), bytes(self.ram.high), self.host


class Disk(World):
    """A disk of sixteen sectors with two queues."""

    queues = (0, 1)
    more_features = 1 << 9

    def make(self):
        self.host["data"] = bytearray(16 * 512)
        return Block("blk0", self.ram, Image(self.host), queues=2, queue_size=8, log=EventLog())

    def request(self, chance):
        sector = chance.randrange(18)
        if chance.random() < 0.5:
            self.send(chance.choice(self.queues), pack("<IIQ", 0, 0, sector), 513, chance)
        else:
            data = chance.randbytes(512)
            self.send(chance.choice(self.queues), pack("<IIQ", 1, 0, sector) + data, 1, chance)


class Image:
    readonly, block_size, cluster_size, size, plain_fd = False, 512, 512, 16 * 512, None

    def __init__(self, host):
        self.host = host

    def readv(self, offset, pieces):
        for piece in pieces:
            piece[:] = self.host["data"][offset : offset + len(piece)]
            offset += len(piece)

    def writev(self, offset, pieces):
        for piece in pieces:
            self.host["data"][offset : offset + len(piece)] = piece
            offset += len(piece)

    def flush(self):
        pass


class Interface(World):
    """A network interface."""

    queues = (0, 1)
    more_features = 1 << 15 | 1 << 5

    def make(self):
        self.host.update(frames=[], sent=[])
        self.wire = Wire(self.host)
        device = Net("net0", self.ram, self.wire, mac=MAC, queue_size=8, log=EventLog())
        device.on_watch = lambda wanted: setattr(self.wire, "is_watched", wanted)
        return device

    def request(self, chance):
        if chance.random() < 0.5:
            self.send(0, b"", chance.choice([60, 200, 700]), chance)
        else:
            self.send(1, bytes(12) + chance.randbytes(chance.randrange(1, 200)), 0, chance)

    def happen(self, chance):
        if chance.random() < 0.1:
            self.device.set_mac(chance.randbytes(6))
        self.host["frames"].append(chance.randbytes(chance.randrange(14, 400)))
        if self.wire.is_watched:
            self.device.host_ready()
            self.driver.runner.settle()

    def look(self):
        super().look()
        self.log.append(self.wire.offloads if self.device.is_active else None)


class Wire:
    header_size, offered, plain_fd = 0, 0, None

    def __init__(self, host):
        self.host = host
        self.offloads, self.is_watched = 0, False

    def fileno(self):
        return -1

    def send(self, buffers):
        self.host["sent"].append(b"".join(buffers))
        return True

    def receive(self, buffer):
        if not self.host["frames"]:
            return None
        frame = self.host["frames"].pop(0)
        buffer[: len(frame)] = frame
        return len(frame)

    def set_offloads(self, features):
        self.offloads = features


class Entropy(World):
    """An entropy source with a limit; its clock and its bytes are the host's, and another host's clock is elsewhere."""

    def make(self):
        self.host.update(drawn=0)
        self.clock, self.alarm = FakeClock(Random(self.seed).randrange(1 << 40)), FakeAlarm()

        def source(size):
            self.host["drawn"] += 1
            return bytes((self.host["drawn"] + index) & 0xFF for index in range(size))

        limit = {"bandwidth": 1000, "alarm": self.alarm, "now_ns": self.clock}
        return Rng("rng0", self.ram, source=source, **limit, log=EventLog())

    def request(self, chance):
        self.send(0, b"", chance.randrange(1, 300), chance)

    def happen(self, chance):
        self.clock.advance(chance.randrange(400_000_000))
        if self.alarm.expire(self.clock.now_ns):
            self.device.resume()
            self.driver.runner.settle()

    def look(self):
        super().look()
        deadline = self.alarm.deadline_ns
        self.log.append(("alarm", None if deadline is None else max(deadline - self.clock.now_ns, 0)))


class Ports(World):
    """A console with two more ports, whose ends take what they have room for."""

    queues = (0, 1, 2, 3, 4, 5)
    more_features = 3

    def make(self):
        self.host["ends"] = [{"got": b"", "room": 100, "open": True} for _ in range(3)]
        self.ends = [End(self.host, number, name) for number, name in enumerate(["", "agent", "log"])]
        return Console("console0", self.ram, self.ends, log=EventLog())

    def request(self, chance):
        port = chance.randrange(3)
        rx = (0, 4, 6)[port]
        kind = chance.random()
        if kind < 0.3:
            self.send(rx, b"", chance.randrange(1, 60), chance)
        elif kind < 0.6:
            self.send(rx + 1, chance.randbytes(chance.randrange(1, 90)), 0, chance)
        elif kind < 0.8:
            self.send(2, b"", 32, chance)
        else:
            event, value = chance.choice([(0, 1), (3, 1), (6, 1), (6, 0)])
            self.send(3, pack("<IHH", port, event, value), 0, chance)

    def happen(self, chance):
        end = chance.choice(self.ends)
        kind = chance.random()
        if kind < 0.4:
            end.mine["room"] += 60
            end.on_room()
        elif kind < 0.7:
            end.held += chance.randbytes(chance.randrange(1, 50))
            end.more()
        elif kind < 0.9:
            end.mine["open"] = not end.is_open
            end.on_open()
        else:
            self.device.resize(chance.randrange(200), chance.randrange(100))
        self.driver.runner.settle()

    def look(self):
        super().look()
        self.log.append([self.device.guest_has_open(port) for port in range(3)])
        self.log.append([end.held for end in self.ends])


class End:
    def __init__(self, host, number, name):
        self.host, self.number, self.name = host, number, name
        self.held = b""

    @property
    def mine(self):
        return self.host["ends"][self.number]

    @property
    def is_open(self):
        return self.mine["open"]

    def send(self, data):
        taken = min(len(data), self.mine["room"])
        self.mine["got"] += bytes(data[:taken])
        self.mine["room"] -= taken
        return taken

    def more(self):
        if self.held:
            self.held = self.held[self.on_input(self.held) :]


class Memory(World):
    """A balloon."""

    queues = (0, 1, 2)
    more_features = 0b100111

    def make(self):
        return Balloon("balloon0", self.ram, reclaim=self.reclaim, log=EventLog())

    def reclaim(self, gpa, size):
        self.ram.write(gpa, bytes(size))

    def request(self, chance):
        kind = chance.random()
        if kind < 0.3:
            self.send(0, pack("<2I", *(0xC0 + chance.randrange(32) for _ in range(2))), 0, chance)
        elif kind < 0.6:
            self.send(1, pack("<I", 0xC0), 0, chance)
        elif kind < 0.8 and self.device._held is None:
            self.send(2, pack("<HQ", chance.randrange(10), chance.getrandbits(40)), 0, chance)
        else:
            self.driver.transport.write_config(4, 4, chance.getrandbits(12))

    def happen(self, chance):
        if chance.random() < 0.5:
            self.device.set_target(chance.randrange(9))
        else:
            self.device.ask_for_statistics()

    def look(self):
        super().look()
        self.log.append(dict(self.device.statistics))


WORLDS = {kind.__name__: kind for kind in (Disk, Interface, Entropy, Ports, Memory)}

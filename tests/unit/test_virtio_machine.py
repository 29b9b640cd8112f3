"""Any legal driver against a queue: every chain answered once, in order, in full, and nobody sleeps for ever.

The driver and the device take turns at any point, and also where it hurts: while the device falls asleep, before and
after it has asked for a kick, and before and after it has looked whether an interrupt is wanted (2.7.7, 2.7.10).
"""

import itertools
from collections import deque
from struct import pack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_virtqueue import Echo
from virtio_driver import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT, HIGH_BASE, NEEDS_RESET, Driver, FakeRam

ROOM = 64
"""Bytes of every chain's own memory, each way."""


class Patient:
    """A runner that notes kicks; the test decides when they are served."""

    def __init__(self):
        self.device = None
        self.running = False
        self.kicked = False

    def start(self):
        self.running = self.kicked = True

    def stop(self):
        self.running = self.kicked = False

    def kick(self, index):
        self.kicked = self.running


class StoreBuffer:
    """What x86 may do with the device's stores to the used ring: the driver sees them at the fence, not before.

    It stands for `Queue._fence` as well: the driver acts when the device gets there, and when it has passed.
    """

    def __init__(self, queue, moment):
        self.queue, self.moment = queue, moment
        self.stores = deque()

    def wrap(self):
        """Catch the stores to a ring that has been taken into use."""
        self.stores.clear()
        self.queue._used_flags = Delayed(self.queue._used_flags, self.stores)
        self.queue._avail_event = Delayed(self.queue._avail_event, self.stores)

    def drain(self):
        while self.stores:
            words, item, value = self.stores.popleft()
            words[item] = value

    def __enter__(self):
        self.moment()
        self.drain()

    def __exit__(self, *_):
        self.moment()


class Delayed:
    """Words whose stores wait in a buffer."""

    def __init__(self, words, stores):
        self.words, self.stores = words, stores

    def __setitem__(self, item, value):
        self.stores.append((self.words, item, value))


class LegalDriver(RuleBasedStateMachine):
    """One queue of an echo device and its driver."""

    @initialize(
        features=st.sampled_from([0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX]).flatmap(
            lambda features: st.sampled_from([features, features | F_IN_ORDER])
        ),
        size=st.sampled_from([1, 2, 4, 8, 32]),
        origin=st.sampled_from([0, 0, 65500, 65535]),
    )
    def begin(self, features, size, origin):
        self.ram = FakeRam()
        self.driver = Driver(
            Echo(self.ram, size=32, in_order=True), self.ram, features=features, size=size, start=False
        )
        runner = Patient()
        self.driver.runner = self.driver.transport._runner = self.driver.device.runner = runner
        queue = self.driver.device.queues[0]
        self.buffer = queue._fence = StoreBuffer(queue, self.moment)
        for name in ("expect_kicks", "notify_driver"):
            setattr(queue, name, self.with_a_moment_before(getattr(queue, name)))
        self.features, self.size = features, size
        self.plans = deque()
        self.come_up(origin)

    def come_up(self, origin):
        """Initialise the device; both sides begin to count at `origin`, as if the queue had been used for long."""
        self.driver.start()
        self.buffer.wrap()
        self.ours = ours = self.driver.queues[0]
        for item in range(3):
            self.driver.device.queues[0].cursor[item] = origin
        ours.idx = ours.seen = origin
        self.ram.write(ours.available + 2, pack("<H", origin))
        self.ram.write(ours.used + 2, pack("<H", origin))
        if self.features & F_EVENT_IDX:
            self.ram.write(ours.used + 4 + 8 * self.size, pack("<H", origin))
        self.hidden = deque()  # offered, not shown
        self.shown = deque()  # (head, text, length, pieces of the answer)
        self.sleeping = False
        self.interrupts = self.driver.signals[0].count
        self.plans.clear()

    # --- what the driver does -----------------------------------------------------------------------------------------

    def moment(self):
        """The device is between two accesses: the driver, on another CPU, does what it has planned."""
        if self.plans:
            self.plans.popleft()()

    def with_a_moment_before(self, method):
        def call(*arguments):
            self.moment()
            return method(*arguments)

        return call

    def offer(self, text, length, cuts, direct, nested):
        ours = self.ours
        pieces = []
        place = 0x10000 + 2 * ROOM * ours.free[0]
        base = HIGH_BASE + place - 0x10000 if direct % 2 else place
        self.ram.write(base, text)
        self.ram.write(base + ROOM, bytes(length))
        pieces += self.driver._cut(base, len(text), cuts, writable=False)
        pieces += self.driver._cut(base + ROOM, length, cuts[::-1], writable=True)
        nested = nested and bool(self.features & F_INDIRECT)
        direct = min(direct, len(pieces) - 1, len(ours.free) - 1) if nested else len(pieces)
        if len(pieces) > self.size or direct + nested > len(ours.free):
            return
        head = ours.chain(pieces, indirect_at=0x40000 + 1024 * ours.free[0] if nested else None, direct=direct)
        ours.offer(head)
        self.hidden.append((head, text, length, base + ROOM))

    def show(self):
        self.shown += self.hidden
        self.hidden.clear()
        if self.ours.publish():
            self.driver.transport.kick(0)

    def take(self):
        for head, written in self.ours.collect():
            expected, text, length, answer = self.shown.popleft()
            assert head == expected
            assert written == min(len(text), length)
            assert self.ram.read(answer, length) == text[:written] + bytes(length - written)

    def fall_asleep(self):
        """Ask for an interrupt, look once more, and sleep if there is nothing (2.7.14, as drivers do)."""
        self.ours.want_interrupt()
        self.interrupts = self.driver.signals[0].count
        self.sleeping = not self.ours_has_used()

    def ours_has_used(self):
        return int.from_bytes(self.ram.read(self.ours.used + 2, 2), "little") != self.ours.seen

    def wake(self):
        self.sleeping = False
        self.ours.want_interrupt(wanted=False)
        self.take()

    # --- rules --------------------------------------------------------------------------------------------------------

    chains = (
        st.binary(max_size=ROOM),
        st.integers(0, ROOM),
        st.lists(st.integers(1, 9), max_size=4),
        st.integers(0, 6),
        st.booleans(),
    )

    @precondition(lambda self: self.ours.free)
    @rule(chain=st.tuples(*chains))
    def add(self, chain):
        if chain[0] or chain[1]:
            self.offer(*chain)

    @rule(batch=st.lists(st.tuples(*chains), min_size=1, max_size=6), at_once=st.booleans())
    def send(self, batch, at_once):
        for chain in batch:
            if self.ours.free:
                self.add(chain)
            if not at_once:
                self.show()
        self.show()

    @rule(batch=st.lists(st.tuples(*chains), min_size=1, max_size=6))
    def ask(self, batch):
        self.send(batch, at_once=True)
        self.serve()
        self.take()

    @rule()
    def publish(self):
        self.show()

    @rule(
        shown=st.lists(st.tuples(*chains), max_size=3),
        later=st.lists(st.tuples(*chains), max_size=2),
        plan=st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["show", "sleep"])), min_size=1, max_size=2),
    )
    def race(self, shown, later, plan):
        """Show more chains, or fall asleep, while the device is at work."""
        self.send(shown, at_once=True)
        for chain in later:
            if self.ours.free:
                self.add(chain)
        self.driver.transport.kick(0)
        if not self.sleeping:
            self.ours.want_interrupt(wanted=False)
        for moments, act in plan:
            self.plans += [lambda: None] * moments
            self.plans.append(self.show if act == "show" else self.fall_asleep)
        self.serve()
        while self.plans:
            self.moment()

    @rule()
    def collect(self):
        self.take()

    @precondition(lambda self: not self.sleeping)
    @rule()
    def sleep(self):
        self.fall_asleep()

    @precondition(lambda self: self.sleeping and self.driver.signals[0].count > self.interrupts)
    @rule()
    def interrupt(self):
        self.wake()

    @precondition(lambda self: not self.sleeping)
    @rule()
    def poll(self):
        self.ours.want_interrupt(wanted=False)

    @rule()
    def kick_for_nothing(self):
        self.driver.transport.kick(0)

    @rule(times=st.integers(1, 3))
    def serve(self, times=1):
        for _ in range(times):
            if self.driver.runner.kicked:
                self.driver.runner.kicked = False
                self.driver.device.serve(0)
                self.buffer.drain()

    @precondition(lambda self: self.driver.runner.kicked)
    @rule(most=st.integers(1, 2))
    def serve_a_few(self, most):
        """As for a data path that leaves single chains to the model: the kick is not over by that."""
        self.driver.device.serve(0, most=most)
        self.buffer.drain()

    @rule(origin=st.sampled_from([0, 65535]))
    def reset(self, origin):
        self.driver.transport.write_status(0)
        used = self.ram.read(self.ours.used, 4)
        self.driver.runner.kick(0)
        self.driver.device.serve(0)
        assert self.ram.read(self.ours.used, 4) == used
        self.come_up(origin)

    # --- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def it_is_legal(self):
        assert not self.driver.transport.status & NEEDS_RESET

    @invariant()
    def a_chain_waits_only_while_a_kick_is_due(self):
        used = int.from_bytes(self.ram.read(self.ours.used + 2, 2), "little")
        unanswered = len(self.shown) - ((used - self.ours.seen) & 0xFFFF)
        assert unanswered >= 0
        assert unanswered == 0 or self.driver.runner.kicked

    @invariant()
    def a_driver_sleeps_only_while_nothing_is_used_or_an_interrupt_is_due(self):
        if self.sleeping and self.ours_has_used():
            assert self.driver.signals[0].count > self.interrupts

    def teardown(self):
        if not hasattr(self, "ours"):
            return
        self.show()
        for _ in range(4):
            self.serve(3)
        self.take()
        assert not self.shown


TestLegalDriver = LegalDriver.TestCase
TestLegalDriver.settings = settings(max_examples=150, stateful_step_count=50)


CHAIN = b"abc", 3, [], 0, True
ACTS = [*itertools.product(range(7), ["show", "sleep"])]


@pytest.mark.parametrize("features", [F_INDIRECT, F_INDIRECT | F_EVENT_IDX])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_interleaving_of_one_batch(features, size):
    """What the machine above finds by luck: with a full queue and with room, one or two acts at any moments."""
    for plan in [*zip(ACTS), *itertools.product(ACTS, ACTS[:6])]:
        for before in (0, 1):
            machine = LegalDriver()
            machine.begin(features, size, 0)
            machine.ask([CHAIN] * before)
            machine.race([CHAIN] * 2, [CHAIN], list(plan))
            machine.a_driver_sleeps_only_while_nothing_is_used_or_an_interrupt_is_due()
            machine.take()
            machine.send([CHAIN], at_once=True)
            machine.a_chain_waits_only_while_a_kick_is_due()
            machine.teardown()

"""What a device must and must not do with its rings, clause by clause (Virtio 1.2, 2.6 to 2.8)."""

from struct import pack, unpack_from

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_virtio_hostile import MODELS, Log
from test_virtqueue import Echo
from virtio_driver import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT, LOW, NEEDS_RESET, PAGE, Driver, DriverQueue, FakeRam

F_RING_PACKED, F_NOTIFICATION_DATA, F_RING_RESET = 1 << 34, 1 << 38, 1 << 40
ALL = [0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX]


@pytest.fixture
def ram():
    return FakeRam()


def word(ram, gpa):
    return unpack_from("<H", ram.read(gpa, 2))[0]


def changes(before, ram):
    """Return the addresses of low memory that are not what they were."""
    pages = [page for page in range(0, LOW, PAGE) if before[page : page + PAGE] != ram.low[page : page + PAGE]]
    return {gpa for page in pages for gpa in range(page, page + PAGE) if before[gpa] != ram.low[gpa]}


# --- 2.6 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_2_6_1_2_8_2_9_what_is_not_offered_so_that_nothing_of_it_is_owed(ram, name):
    """Queue reset, packed rings, and data in a kick."""
    offered = MODELS[name].make(ram, Log()).offered
    assert not offered & (F_RING_RESET | F_RING_PACKED | F_NOTIFICATION_DATA)


def test_2_6_1_1_1_a_queue_that_was_reset_has_its_default_state(ram):
    driver = Driver(Echo(ram), ram, size=4)
    for _ in range(3):
        driver.ask(0, b"abc", 3)
    queue = driver.device.queues[0]
    queue.reset()
    assert (queue.size, queue.is_enabled, queue.features) == (16, False, 0)
    assert (queue.descriptors, queue.available, queue.used) == (0, 0, 0)
    assert list(queue.cursor) == [0] * len(queue.cursor)


def test_2_6_1_1_1_a_queue_that_was_reset_is_not_looked_at(ram):
    driver = Driver(Echo(ram), ram)
    ours, before = driver.queues[0], driver.signals[0].count
    driver.device.queues[0].reset()
    ours.offer(ours.chain([(0x9000, 1, False), (0xA000, 1, True)]))
    ours.publish()
    driver.runner.kick(0)
    assert ours.collect() == []
    assert driver.device.handled == 0
    assert driver.signals[0].count == before


def test_2_6_1_2_1_a_queue_enabled_again_is_as_the_driver_now_says(ram):
    """Another size, other rings, and both sides count from zero."""
    driver = Driver(Echo(ram), ram, size=4)
    for _ in range(3):
        driver.ask(0, b"abc", 3)
    driver.transport.queue_select = 0
    driver.transport.disable_queue()
    before = ram.read(driver.queues[0].table, driver.queues[0].end - driver.queues[0].table)
    ours = DriverQueue(ram, driver.device.queues[0], 0xC0000, 16, driver.wanted)
    driver.transport.set_queue_size(16)
    for area, address in (("descriptors", ours.table), ("available", ours.available), ("used", ours.used)):
        driver.transport.set_queue_address(area, address, (1 << 64) - 1)
    driver.transport.enable_queue()
    old, driver.queues[0] = driver.queues[0], ours
    for _ in range(20):
        assert driver.ask(0, b"again", 5) == b"again"
    assert ram.read(old.table, old.end - old.table) == before


# --- 2.7.4 and 2.7.5 --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    size=st.integers(1, 24),
    cuts=st.lists(st.integers(0, 6), max_size=5),
    direct=st.integers(0, 12),
    features=st.sampled_from(ALL),
)
def test_2_7_4_1_no_arrangement_of_descriptors_is_assumed(size, cuts, direct, features):
    ram = FakeRam()
    driver = Driver(Echo(ram), ram, features=features)
    ours = driver.queues[0]
    source, target = driver.buffer(bytes(range(1, size + 1))), driver.buffer(size)
    pieces = [*driver._cut(source, size, cuts, writable=False), *driver._cut(target, size, cuts[::-1], writable=True)]
    nested = features & F_INDIRECT and direct < len(pieces)
    head = ours.chain(pieces, indirect_at=0x8000 if nested else None, direct=direct)
    ours.offer(head)
    ours.publish()
    driver.runner.kick(0)
    assert ours.collect() == [(head, size)]
    assert ram.read(target, size) == bytes(range(1, size + 1))


@pytest.mark.parametrize("indirect_at", [None, 0x8000])
@pytest.mark.parametrize("features", [F_INDIRECT, F_INDIRECT | F_EVENT_IDX])
def test_2_7_5_1_nothing_but_writable_buffers_and_the_used_ring_is_written(ram, features, indirect_at):
    """No readable buffer, no descriptor, no available ring, and no byte behind what was asked for."""
    driver = Driver(Echo(ram), ram, features=features)
    ours = driver.queues[0]
    ram.write(0x9000, b"\xaa" * 64)
    ram.write(0xA000, b"\x55" * 64)
    head = ours.chain([(0x9010, 20, False), (0xA010, 5, True), (0xA020, 30, True)], indirect_at=indirect_at)
    ours.offer(head)
    ours.publish()
    before = bytes(ram.low)
    driver.runner.kick(0)
    assert ours.collect() == [(head, 20)]
    allowed = {*range(0xA010, 0xA015), *range(0xA020, 0xA02F), *range(ours.used, ours.end)}
    assert changes(before, ram) <= allowed
    assert {0xA010, 0xA014, 0xA020, 0xA02E} <= changes(before, ram)


LEGAL = {
    "block": [
        (0, pack("<IIQ", 0, 0, 1), 513),
        (1, pack("<IIQ", 1, 0, 2) + bytes(512), 1),
        (0, pack("<IIQ", 8, 0, 0), 21),
    ],
    "net": [(0, b"", 80), (0, b"", 80), (0, b"", 80), (1, bytes(72), 0)],
    "rng": [(0, b"", 100), (0, b"", 1)],
    "balloon": [(0, pack("<I", 3), 0), (1, pack("<I", 3), 0), (2, pack("<HQ", 4, 5), 0), (4, b"", 8192)],
    "console": [(3, pack("<IHH", 0, 0, 1), 0), *[(2, b"", 40)] * 4, (0, b"", 64), (1, b"output", 0), (4, b"", 1)],
    "vsock": [(1, pack("<QQIIIHHIII", 3, 2, 9, 9, 0, 1, 1, 0, 99, 0), 0), *[(0, b"", 90)] * 4],
}
"""Of each model, buffers as its driver gives them: queue, what is readable, how much is writable."""


@pytest.mark.parametrize("cuts", [(), (16, 5, 7)])
@pytest.mark.parametrize("name", LEGAL)
def test_2_7_5_1_and_2_7_8_2_no_model_writes_anything_else_or_says_that_it_wrote_more(ram, name, cuts):
    """Whoever makes it work: a kick, or the host."""
    model = MODELS[name]
    device = model.make(ram, Log())
    driver = Driver(device, ram)
    allowed, room, used = set(), {}, []
    for ours in driver.queues:
        allowed.update(range(ours.used, ours.end))

    def guarded(act):
        def guarding(*arguments):
            before = bytes(ram.low)
            act(*arguments)
            assert changes(before, ram) <= allowed

        return guarding

    device.serve, provoke = guarded(device.serve), guarded(model.provoke)
    for number, (queue, readable, writable) in enumerate(LEGAL[name]):
        source, target = driver.buffer(readable), driver.buffer(writable)
        ours = driver.queues[queue]
        pieces = [
            *driver._cut(source, len(readable), cuts, writable=False),
            *driver._cut(target, writable, cuts, writable=True),
        ]
        head = ours.chain(pieces, indirect_at=0xE0000 + 256 * number)
        room[queue, head] = writable
        allowed.update(range(target, target + writable))
        ours.offer(head)
        ours.publish()
        driver.runner.kick(queue)
        provoke(device)
    for ours in driver.queues:
        for head, written in ours.collect():
            assert written <= room[ours.queue.index, head]
            used.append(written)
    assert not driver.transport.status & NEEDS_RESET
    assert len(used) >= len(LEGAL[name]) - 3
    assert any(used) or name == "balloon"


@pytest.mark.parametrize("entries", [1, 8, 16])
def test_2_7_5_3_an_indirect_table_may_be_as_long_as_the_queue(ram, entries):
    driver = Driver(Echo(ram), ram)
    ours = driver.queues[0]
    pieces = [(driver.buffer(b"x"), 1, False) for _ in range(entries - 1)]
    ours.offer(ours.chain([*pieces, (driver.buffer(20), 20, True)], indirect_at=0x8000))
    ours.publish()
    driver.runner.kick(0)
    assert ours.collect() == [(0, entries - 1)]


@pytest.mark.parametrize(("last", "is_refused"), [((1 << 20) - 1, False), (1 << 20, True)])
def test_2_7_5_2_a_chain_of_4_gib_is_refused(ram, last, is_refused):
    """Each piece is the same megabyte; the total is what counts, and what is less fits the used ring's length."""

    class Filled(Echo):
        def handle(self, queue, chain):
            return chain.writable_size

    driver = Driver(Filled(ram, size=4096), ram, size=4096)
    ours = driver.queues[0]
    ours.offer(ours.chain([(0, 1 << 20, True)] * 4095 + [(0, last, True)], indirect_at=0xA0000))
    ours.publish()
    driver.runner.kick(0)
    assert bool(driver.transport.status & NEEDS_RESET) == is_refused
    assert ours.collect() == ([] if is_refused else [(0, (1 << 32) - 1)])


# --- 2.7.7 ------------------------------------------------------------------------------------------------------------


def pushes(driver, count):
    """Have the device answer `count` chains in one batch."""
    ours = driver.queues[0]
    for _ in range(count):
        ours.offer(ours.chain([(driver.buffer(b"x"), 1, False), (driver.buffer(1), 1, True)]))
    ours.publish()
    driver.runner.kick(0)
    assert len(ours.collect()) == count


@settings(max_examples=60)
@given(start=st.sampled_from([0, 7, 65533, 65535]), count=st.integers(1, 8), offset=st.integers(-3, 10))
def test_2_7_7_2_used_event_is_met_by_any_entry_of_a_batch(start, count, offset):
    """Whether idx, as it was before one of the entries was written, is equal to used_event: across the wrap, too."""
    ram = FakeRam()
    driver = Driver(Echo(ram), ram, features=F_EVENT_IDX)
    ours = driver.queues[0]
    for item in range(3):
        driver.device.queues[0].cursor[item] = start
    ours.idx = ours.seen = start
    ram.write(ours.available + 2, pack("<H", start))
    ram.write(ours.used + 2, pack("<H", start))
    event = (start + offset) & 0xFFFF
    ours.want_interrupt(at=event)
    pushes(driver, count)
    assert driver.signals[0].count == (event in [(start + position) & 0xFFFF for position in range(count)])


@pytest.mark.parametrize("event", [0, 1, 15, 65535])
def test_2_7_7_2_used_event_is_ignored_where_it_was_not_negotiated(ram, event):
    driver = Driver(Echo(ram), ram, features=0)
    ours = driver.queues[0]
    ram.write(ours.available + 4 + 2 * ours.size, pack("<H", event))
    pushes(driver, 1)
    assert driver.signals[0].count == 1
    ours.want_interrupt(wanted=False)
    pushes(driver, 1)
    assert driver.signals[0].count == 1


@pytest.mark.parametrize("flags", [2, 0xFFFE])
def test_2_7_7_2_only_the_lowest_bit_of_the_flags_means_anything(ram, flags):
    driver = Driver(Echo(ram), ram, features=0)
    ram.write(driver.queues[0].available, pack("<H", flags))
    pushes(driver, 1)
    assert driver.signals[0].count == 1


# --- 2.7.8 ------------------------------------------------------------------------------------------------------------


def test_2_7_8_2_entry_and_buffer_are_complete_when_idx_shows_them(ram):
    driver = Driver(Echo(ram), ram)
    queue, ours = driver.device.queues[0], driver.queues[0]
    target = 0xA000
    seen = []

    class Watched:
        """The used ring's flags and idx."""

        def __init__(self, words):
            self.words = words

        def __setitem__(self, item, value):
            if item == 1:
                at = ours.used + 4 + 8 * (word(ram, ours.used + 2) % ours.size)
                seen.append((unpack_from("<II", ram.read(at, 8)), ram.read(target, 3)))
            self.words[item] = value

    queue._used_flags = Watched(queue._used_flags)
    head = ours.chain([(driver.buffer(b"abc"), 3, False), (target, 3, True)])
    ours.offer(head)
    ours.publish()
    driver.runner.kick(0)
    assert seen == [((head, 3), b"abc")]


# --- 2.7.9 ------------------------------------------------------------------------------------------------------------


def test_2_7_9_who_promises_to_use_buffers_in_order(ram):
    """The driver of the other tests checks the promise wherever it is made. Disks do not make it."""
    assert not Echo(ram).offered & F_IN_ORDER
    assert Echo(ram, in_order=True).offered & F_IN_ORDER
    made = {name for name, model in MODELS.items() if model.make(ram, Log()).offered & F_IN_ORDER}
    assert made == set(MODELS) - {"block"}


@pytest.mark.parametrize("features", [F_IN_ORDER, F_IN_ORDER | F_EVENT_IDX | F_INDIRECT])
def test_2_7_9_every_buffer_of_a_batch_has_its_own_entry(ram, features):
    driver = Driver(Echo(ram, in_order=True), ram, features=features)
    ours = driver.queues[0]
    for _ in range(3):
        heads = [ours.chain([(driver.buffer(b"x"), 1, False), (driver.buffer(1), 1, True)]) for _ in range(8)]
        for head in heads:
            ours.offer(head)
        ours.publish()
        driver.runner.kick(0)
        assert ours.collect() == [(head, 1) for head in heads]


# --- 2.7.10 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_2_7_10_2_used_flags(ram, features):
    """0 or 1; always 0 where avail_event says it."""
    during = []

    class Spying(Echo):
        def handle(self, queue, chain):
            during.append(word(ram, driver.queues[0].used))
            return super().handle(queue, chain)

    driver = Driver(Spying(ram), ram, features=features)
    for _ in range(3):
        driver.ask(0, b"a", 1)
        assert word(ram, driver.queues[0].used) == 0
    assert during == [0 if features else 1] * 3


def test_2_7_10_2_avail_event_is_where_the_next_kick_is_wanted(ram):
    driver = Driver(Echo(ram), ram)
    ours = driver.queues[0]
    for done in range(20):
        assert word(ram, ours.used + 4 + 8 * ours.size) == done
        driver.ask(0, b"a", 1)


@pytest.mark.parametrize("features", ALL)
def test_2_7_10_2_spurious_kicks_do_nothing(ram, features):
    driver = Driver(Echo(ram), ram, features=features)
    driver.ask(0, b"a", 1)
    before, interrupts = bytes(ram.low), driver.signals[0].count
    for _ in range(100):
        driver.runner.kick(0)
    assert changes(before, ram) == set()
    assert driver.signals[0].count == interrupts
    assert driver.ask(0, b"b", 1) == b"b"


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_a_chain_that_comes_while_the_device_falls_asleep_is_not_lost(ram, features):
    """Shown after the device found nothing and before it asked for a kick: the driver need not kick, nor does it."""
    driver = Driver(Echo(ram), ram, features=features)
    queue, ours = driver.device.queues[0], driver.queues[0]
    head = ours.chain([(driver.buffer(b"z"), 1, False), (driver.buffer(1), 1, True)])
    ours.offer(head)
    ask_for_kicks = queue.expect_kicks
    late = [True]

    def expect_kicks(beyond=0):
        if late:
            late.clear()
            ours.publish()
        return ask_for_kicks(beyond)

    queue.expect_kicks = expect_kicks
    driver.runner.kick(0)
    assert ours.collect() == [(head, 1)]

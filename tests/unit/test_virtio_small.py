"""Entropy and balloon, in the driver's words (Virtio 1.2, 5.4 and 5.5)."""

from struct import pack

import pytest
from fakes import FakeAlarm, FakeClock
from virtio_driver import LOW, NEEDS_RESET, Driver, FakeRam

from devices.events import EventLog
from devices.ports import GuestFault
from devices.virtio.balloon import Balloon
from devices.virtio.rng import Rng

PAGE = 4096
INFLATE, DEFLATE, STATISTICS, REPORTING = 0, 1, 2, 3


@pytest.fixture
def ram():
    return FakeRam()


# --- entropy ----------------------------------------------------------------------------------------------------------


def test_a_buffer_is_filled(ram):
    asked = []
    rng = Rng("rng0", ram, source=lambda size: asked.append(size) or b"r" * size, log=EventLog())
    driver = Driver(rng, ram)
    assert driver.ask(0, b"", 100, cuts=(30,)) == b"r" * 100
    assert asked == [100]


def test_a_huge_buffer_is_filled_in_part(ram):
    asked = []
    rng = Rng("rng0", ram, source=lambda size: asked.append(size) or bytes(size), log=EventLog())
    driver = Driver(rng, ram)
    ours = driver.queues[0]
    head = ours.chain([(0x10000, LOW - 0x10000, True)] * 8)
    ours.offer(head)
    ours.publish()
    driver.runner.kick(0)
    assert asked == [65536]
    assert ours.collect() == [(head, 65536)]


def test_a_limit_is_kept_and_no_request_is_forgotten(ram):
    clock, alarm = FakeClock(), FakeAlarm()
    rng = Rng("rng0", ram, bandwidth=1000, alarm=alarm, now_ns=clock, log=EventLog())
    driver = Driver(rng, ram)
    for _ in range(3):
        driver.send(0, b"", 100)
    done = len(driver.queues[0].collect())
    assert done == 1
    for _ in range(2):
        driver.runner.kick(0)
        assert driver.queues[0].collect() == []
        clock.advance(100_000_000)
        assert alarm.expire(clock())
        rng.resume()
        assert len(driver.queues[0].collect()) == 1
    clock.advance(100_000_000)
    if alarm.expire(clock()):
        rng.resume()
    driver.send(0, b"", 100)  # the driver has to be asked to kick again
    assert len(driver.queues[0].collect()) == 1


# --- balloon ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reclaimed():
    return []


@pytest.fixture
def balloon(ram, reclaimed):
    def reclaim(gpa, size):
        if gpa + size > LOW:
            raise GuestFault(gpa, size)
        reclaimed.append((gpa, size))

    return Driver(Balloon("balloon0", ram, reclaim=reclaim, log=EventLog()), ram)


def test_pages_are_given_back_in_runs(balloon, reclaimed):
    balloon.send(INFLATE, pack("<5I", 7, 3, 4, 5, 4), 0)
    assert reclaimed == [(3 * PAGE, 3 * PAGE), (7 * PAGE, PAGE)]
    assert balloon.device.reclaimed == 4 * PAGE
    balloon.send(DEFLATE, pack("<I", 3), 0)
    assert len(reclaimed) == 2


def test_what_is_no_ram_is_ignored(balloon, reclaimed):
    for _ in range(3):
        balloon.send(INFLATE, pack("<3I", 0xFFFFFFFF, LOW // PAGE, 1), 0)
        balloon.send(INFLATE, b"\1\0\0", 0)
    assert set(reclaimed) == {(PAGE, PAGE)}
    assert not balloon.transport.status & NEEDS_RESET


def test_the_target_and_the_actual_size(balloon):
    device = balloon.device
    device.set_target(8)
    assert balloon.config_signal.count == 1
    assert device.config() == pack("<II", 8 * 256, 0)
    balloon.transport.write_config(4, 4, 2048)
    assert device.actual_mib == 8
    balloon.transport.write_config(0, 4, 1)  # read-only
    assert device.target_mib == 8
    device.set_target(-5)
    assert device.target_mib == 0


def test_reports_are_rounded_inwards(balloon, reclaimed):
    ours = balloon.queues[REPORTING]
    head = ours.chain([(0x10100, 3 * PAGE, True), (0x20000, PAGE, True), (0x30001, 100, True)])
    ours.offer(head)
    ours.publish()
    balloon.runner.kick(REPORTING)
    assert ours.collect() == [(head, 0)]
    assert reclaimed == [(0x11000, 2 * PAGE), (0x20000, PAGE)]


def test_statistics_are_kept_until_they_are_wanted_anew(balloon):
    head, _ = balloon.send(STATISTICS, pack("<HQHQHQ", 4, 1000, 5, 2000, 99, 1), 0)
    assert balloon.queues[STATISTICS].collect() == []
    assert balloon.device.statistics == {"free": 1000, "total": 2000}
    balloon.device.ask_for_statistics()
    assert balloon.queues[STATISTICS].collect() == [(head, 0)]
    balloon.send(STATISTICS, pack("<HQ", 4, 5)[:9], 0)
    balloon.send(STATISTICS, b"", 1)  # a second one breaks the rule
    assert balloon.transport.status & NEEDS_RESET


def test_a_reset_empties_the_balloon(balloon):
    balloon.transport.write_config(4, 4, 2048)
    balloon.start()
    assert balloon.device.actual_mib == 0

"""PM1 registers, power button and PM timer, as an ACPI system uses them (ACPI 6.4, 4.8)."""

from __future__ import annotations

import pytest
from fakes import FakeAlarm, FakeClock, FakeIrq
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from devices.acpi_pm import AcpiPm

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
TMR, GBL, PWRBTN, SLPBTN, RTC, WAK = 1 << 0, 1 << 5, 1 << 8, 1 << 9, 1 << 10, 1 << 15
SCI_EN, BM_RLD, GBL_RLS, SLP_EN = 1 << 0, 1 << 1, 1 << 2, 1 << 13
SECOND = 1_000_000_000
HALF_RANGE_NS = (1 << 31) * SECOND // 3_579_545 + 1  # until bit 31 toggles: ten minutes


class Bench:
    """The device and what it is wired to; its alarm fires as time passes."""

    def __init__(self, now_ns: int = 987_654_321) -> None:
        self.clock = FakeClock(now_ns)
        self.irq = FakeIrq()
        self.alarm = FakeAlarm()
        self.power_offs = 0
        self.pm = AcpiPm(irq=self.irq, alarm=self.alarm, now_ns=self.clock, on_power_off=self.power_off)

    def power_off(self) -> None:
        self.power_offs += 1

    def get(self, offset: int, size: int = 2) -> int:
        return self.pm.read(offset, size) & (1 << 8 * size) - 1

    def put(self, offset: int, value: int, size: int = 2) -> None:
        self.pm.write(offset, size, value)

    def run(self, ns: int) -> None:
        end = self.clock.now_ns + ns
        while self.alarm.deadline_ns is not None and self.alarm.deadline_ns <= end:
            self.clock.now_ns = self.alarm.deadline_ns
            assert self.alarm.expire(self.clock.now_ns)
            self.pm.on_alarm()
        self.clock.now_ns = end


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- PM1 events ----------------------------------------------------------------------------------------------------


def test_power_button_raises_the_sci_and_is_acknowledged(bench):
    """4.8.2.2.1.1: PWRBTN_STS with PWRBTN_EN raises the SCI; writing one clears the status."""
    bench.put(ENABLE, PWRBTN)
    assert bench.pm.press_power_button()
    assert bench.irq.level
    assert bench.get(STATUS) == PWRBTN
    bench.put(STATUS, PWRBTN)
    assert bench.get(STATUS) == 0
    assert not bench.irq.level


def test_power_button_without_enable_only_sets_status(bench):
    assert not bench.pm.press_power_button()
    assert bench.get(STATUS) == PWRBTN
    assert not bench.irq.level
    bench.put(ENABLE, PWRBTN)
    assert bench.irq.level
    bench.put(ENABLE, 0)
    assert not bench.irq.level
    assert bench.get(STATUS) == PWRBTN


def test_status_is_cleared_by_ones_only(bench):
    """4.8.3.1.1."""
    bench.pm.press_power_button()
    bench.put(STATUS, 0)
    bench.put(STATUS, TMR | WAK | SLPBTN)
    assert bench.get(STATUS) == PWRBTN


@pytest.mark.parametrize(("value", "kept"), [(0xFFFF, TMR | GBL | PWRBTN | RTC), (GBL, GBL), (RTC | SLPBTN, RTC)])
def test_enable_keeps_the_events_that_exist(bench, value, kept):
    """4.8.3.1.2: no fixed sleep button; a driver reads back what it enabled."""
    bench.put(ENABLE, value)
    assert bench.get(ENABLE) == kept


def test_byte_accesses(bench):
    """4.8.3.1: registers are read and written by bytes as well."""
    bench.put(ENABLE + 1, PWRBTN >> 8, size=1)
    bench.put(ENABLE, GBL, size=1)
    assert bench.get(ENABLE) == PWRBTN | GBL
    bench.pm.press_power_button()
    assert bench.get(STATUS + 1, size=1) == 1
    bench.put(STATUS, 0xFF, size=1)
    assert bench.get(STATUS) == PWRBTN
    bench.put(STATUS + 1, 0xFF, size=1)
    assert bench.get(STATUS) == 0


def test_the_event_block_in_one_access(bench):
    bench.pm.press_power_button()
    bench.put(STATUS, PWRBTN << 16, size=4)
    assert bench.get(STATUS, size=4) == PWRBTN << 16 | PWRBTN
    assert bench.irq.level


# --- PM1 control ---------------------------------------------------------------------------------------------------


def test_sci_en_is_always_set(bench):
    """4.8.3.2.1 on a platform that is always in ACPI mode."""
    assert bench.get(CONTROL) == SCI_EN
    bench.put(CONTROL, 0)
    assert bench.get(CONTROL) == SCI_EN


def test_control_keeps_sleep_type_and_hides_write_only_bits(bench):
    bench.put(CONTROL, BM_RLD | GBL_RLS | 3 << 10 | 0xC3F8)
    assert bench.get(CONTROL) == SCI_EN | BM_RLD | 3 << 10
    assert bench.power_offs == 0


def test_soft_off_as_linux_does_it(bench):
    """SLP_TYP alone first, then with SLP_EN."""
    bench.put(CONTROL, SCI_EN | 5 << 10)
    assert bench.power_offs == 0
    bench.put(CONTROL, SCI_EN | 5 << 10 | SLP_EN)
    assert bench.power_offs == 1
    assert bench.get(CONTROL) == SCI_EN | 5 << 10


def test_soft_off_by_the_high_byte(bench):
    bench.put(CONTROL + 1, (5 << 10 | SLP_EN) >> 8, size=1)
    assert bench.power_offs == 1


def test_the_low_byte_does_not_sleep(bench):
    bench.put(CONTROL, 5 << 10)
    bench.put(CONTROL, 0xFF, size=1)
    assert bench.power_offs == 0
    assert bench.get(CONTROL) == SCI_EN | BM_RLD | 5 << 10


def test_another_sleep_type_is_reported_once(bench):
    with capture_logs() as events:
        for _ in range(3):
            bench.put(CONTROL, 1 << 10 | SLP_EN)
    assert bench.power_offs == 0
    assert [(event["event"], event["sleep_type"]) for event in events] == [("acpi.sleep_type_unknown", 1)]


@pytest.mark.parametrize(("offset", "size"), [(6, 1), (6, 2), (7, 1)])
def test_the_gap_is_nobodys(bench, offset, size):
    bench.put(offset, 0, size=size)
    assert bench.get(offset, size=size) == (1 << 8 * size) - 1


def test_control_read_as_a_dword_has_the_gap_above_it(bench):
    assert bench.get(CONTROL, size=4) == 0xFFFF0000 | SCI_EN


# --- PM timer ------------------------------------------------------------------------------------------------------


def test_timer_counts_at_its_rate(bench):
    """4.8.3.3: 3.579545 MHz."""
    start = bench.get(TIMER, 4)
    bench.run(SECOND)
    assert bench.get(TIMER, 4) - start == 3_579_545
    bench.run(86400 * SECOND)
    assert bench.get(TIMER, 4) - start & 0xFFFF_FFFF == 3_579_545 * 86401 & 0xFFFF_FFFF


@given(steps=st.lists(st.integers(0, 1000 * SECOND), min_size=1, max_size=20), start=st.integers(0, 1 << 62))
def test_timer_never_steps_back_but_wraps(steps, start):
    """Differences modulo 2**32 add up to the time that passed, to within one tick, however often it wraps."""
    bench = Bench(start)
    last = bench.get(TIMER, 4)
    total = 0
    for step in steps:
        bench.run(step)
        now = bench.get(TIMER, 4)
        delta = now - last & 0xFFFF_FFFF
        assert abs(delta - step * 3_579_545 // SECOND) <= 1  # 1000 s are less than a turn
        total += delta
        last = now
    assert total == sum(steps) * 3_579_545 // SECOND


def test_timer_by_bytes_and_read_only(bench):
    bench.run(7 * SECOND)
    whole = bench.get(TIMER, 4)
    bench.put(TIMER, 0, size=4)
    assert sum(bench.get(TIMER + i, 1) << 8 * i for i in range(4)) == whole
    assert bench.get(TIMER + 2, 2) == whole >> 16


def test_timer_status_follows_the_top_bit(bench):
    """4.8.2.1: TMR_STS whenever bit 31 changes, either way, though nobody enabled or watched it."""
    bench.run(HALF_RANGE_NS - 2 * SECOND)
    assert bench.get(STATUS) == 0
    bench.run(2 * SECOND)
    assert bench.get(STATUS) == TMR
    assert bench.get(TIMER, 4) >> 31 == 1
    bench.put(STATUS, TMR)
    assert bench.get(STATUS) == 0
    bench.run(HALF_RANGE_NS)
    assert bench.get(STATUS) == TMR
    assert bench.get(TIMER, 4) >> 31 == 0
    assert bench.alarm.sets == []


def test_timer_event_raises_the_sci(bench):
    start = bench.clock.now_ns
    bench.put(ENABLE, TMR)
    assert bench.alarm.deadline_ns == start + HALF_RANGE_NS
    bench.run(HALF_RANGE_NS - 1)
    assert not bench.irq.level
    bench.run(1)
    assert bench.irq.level
    assert bench.alarm.deadline_ns is None
    bench.put(STATUS, TMR)
    assert not bench.irq.level
    bench.run(HALF_RANGE_NS)
    assert bench.irq.level


def test_disabling_the_timer_event_disarms(bench):
    bench.put(ENABLE, TMR)
    bench.put(ENABLE, 0)
    assert bench.alarm.deadline_ns is None
    bench.run(2 * HALF_RANGE_NS)
    assert not bench.irq.level


def test_an_alarm_that_fires_early_does_no_harm(bench):
    bench.put(ENABLE, TMR)
    bench.pm.on_alarm()
    assert not bench.irq.level
    assert bench.alarm.deadline_ns is not None

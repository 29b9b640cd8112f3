"""The states of what keeps time: the real-time clock and ACPI's fixed hardware."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from fakes import FakeAlarm, FakeClock, FakeIrq
from state_walks import check_mutations, check_refusals, check_walk

from devices.acpi_pm import AcpiPm
from devices.rtc_mc146818 import RtcMc146818

SECOND = 1_000_000_000
MS = 1_000_000
HALF_RANGE_NS = (1 << 31) * SECOND // 3_579_545 + 1
UTC_NS = int(datetime(2024, 2, 28, 23, 59, 30, tzinfo=UTC).timestamp()) * SECOND


class Bench:
    """A device with a clock that fires its alarm."""

    def __init__(self, now_ns: int) -> None:
        self.clock = FakeClock(now_ns)
        self.began_ns = now_ns
        self.alarm = FakeAlarm()
        self.irq = FakeIrq()
        self.events = []
        self.device = self.make()

    def make(self):
        raise NotImplementedError

    def utc(self) -> float:
        return (UTC_NS + self.clock.now_ns - self.began_ns) / 1e9

    def do(self, operation):
        name, *arguments = operation
        return getattr(self, name)(*arguments)

    def read(self, offset, size):
        return self.device.read(offset, size)

    def write(self, offset, size, value):
        self.device.write(offset, size, value)

    def run(self, ns):
        end = self.clock.now_ns + ns
        while self.alarm.deadline_ns is not None and self.alarm.deadline_ns <= end:
            self.clock.now_ns = max(self.clock.now_ns, self.alarm.deadline_ns)
            assert self.alarm.expire(self.clock.now_ns)
            self.device.on_alarm()
        self.clock.now_ns = end

    def seen(self):
        deadline = self.alarm.deadline_ns
        return self.irq.level, self.irq.history, self.events, None if deadline is None else deadline - self.clock()

    def forget(self):
        self.irq.history.clear()
        self.events.clear()

    def meet(self, other):
        """Have the same UTC now; the clock that never steps is each host's own."""
        self.began_ns = self.clock.now_ns - (other.clock.now_ns - other.began_ns)

    def spoil(self, chance):
        self.irq.level = chance.random() < 0.5
        self.alarm.deadline_ns = chance.choice((None, 0, 1 << 60))


# --- ACPI ----------------------------------------------------------------------------------------------------------

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
TMR, GBL, PWRBTN, RTC = 1 << 0, 1 << 5, 1 << 8, 1 << 10
SCI_EN, BM_RLD, SLP_EN = 1 << 0, 1 << 1, 1 << 13


class Pm(Bench):
    def make(self):
        return AcpiPm(
            irq=self.irq, alarm=self.alarm, now_ns=self.clock, on_power_off=lambda: self.events.append("power off")
        )

    def press(self):
        return self.device.press_power_button()


def pm_operation(chance):
    kind = chance.random()
    if kind < 0.3:
        return "read", chance.choice((STATUS, ENABLE, CONTROL, TIMER)), chance.choice((1, 2, 4))
    if kind < 0.7:
        offset = chance.choice((STATUS, ENABLE, CONTROL))
        return "write", offset, 2, chance.choice((0, TMR, TMR | PWRBTN, GBL | RTC, BM_RLD, 5 << 10, 0xFFFF))
    if kind < 0.8:
        return ("press",)
    return "run", chance.choice((0, 1, SECOND, HALF_RANGE_NS // 2, HALF_RANGE_NS, 3 * HALF_RANGE_NS))


@pytest.mark.parametrize("seed", range(100))
def test_saved_power_management_goes_on_alike(seed):
    check_walk(Pm, pm_operation, seed)


def test_the_pm_timer_goes_on_from_where_it_was():
    pm, later = Pm(123), Pm(1 << 55)
    pm.run(7 * SECOND)
    state = pm.device.state()
    assert state == {"PM1_STS": 0, "PM1_EN": 0, "PM1_CNT": SCI_EN, "PM_TMR_ns": 7 * SECOND}
    later.run(99 * SECOND)
    later.device.load(state)
    assert later.device.read(TIMER, 4) == 7 * 3_579_545
    later.run(SECOND)
    assert later.device.read(TIMER, 4) == 8 * 3_579_545


def test_the_timer_event_comes_when_it_would_have_come():
    pm, later = Pm(5), Pm(1 << 50)
    pm.device.write(ENABLE, 2, TMR)
    pm.run(HALF_RANGE_NS - SECOND)
    later.device.load(pm.device.state())
    later.run(SECOND - 1000)
    assert not later.irq.level
    later.run(1000)
    assert later.irq.level


def test_a_pressed_button_is_saved():
    pm, later = Pm(0), Pm(0)
    pm.device.write(ENABLE, 2, PWRBTN)
    pm.press()
    later.device.load(pm.device.state())
    assert later.irq.level
    later.device.write(STATUS, 2, PWRBTN)
    assert not later.irq.level


def test_a_changed_state_of_power_management_is_refused_or_does_no_harm():
    assert sum(check_mutations(Pm, pm_operation, seed) for seed in range(40)) > 50


def test_what_is_no_state_of_power_management_is_refused():
    pm = Pm(0)
    pm.device.write(ENABLE, 2, TMR | PWRBTN)
    word = (-1, 1 << 16)
    check_refusals(
        pm,
        {
            "PM1_STS": (1 << 1, *word),
            "PM1_EN": (1 << 9, *word),
            "PM1_CNT": (0, 1 << 10, SCI_EN | SLP_EN, SCI_EN | 1 << 2, *word),
            "PM_TMR_ns": (-1, 1 << 63),
        },
    )


# --- the real-time clock -------------------------------------------------------------------------------------------

SEC, SEC_ALARM, MIN, MIN_ALARM, HOUR, HOUR_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = 10, 11, 12, 13
CENTURY = 0x32
SET, PIE, AIE, UIE, SQWE, DM, H24, DSE = (1 << bit for bit in range(7, -1, -1))
PF, AF, UF = 0x40, 0x20, 0x10
DIVIDER_32K, DIVIDER_RESET = 0x20, 0x60
ANY = 0xC0


class Rtc(Bench):
    def make(self):
        return RtcMc146818(irq=self.irq, alarm=self.alarm, now_ns=self.clock, wall_seconds=self.utc)

    def get(self, index):
        self.device.write(0, 1, index)
        return self.device.read(1, 1)

    def put(self, index, value):
        self.device.write(0, 1, index)
        self.device.write(1, 1, value)


def rtc_operation(chance):
    kind = chance.random()
    if kind < 0.25:
        return "get", chance.choice((SEC, MIN, HOUR, WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY, 0x40))
    if kind < 0.3:
        return "read", chance.randrange(2), chance.choice((1, 2))
    if kind < 0.45:
        return (
            "put",
            B,
            chance.choice((0, H24, DM)) | chance.choice((0, PIE, AIE, UIE, PIE | AIE | UIE, SET, SET | UIE)),
        )
    if kind < 0.55:
        return "put", A, chance.choice((DIVIDER_32K, DIVIDER_32K, DIVIDER_RESET, 0x70)) | chance.randrange(16)
    if kind < 0.75:
        index = chance.choice((*range(10), CENTURY, 0x0E, 0x7F))
        return "put", index, chance.choice((0, 1, 0x12, 0x23, 0x59, 0x92, ANY, 0xFF))
    return "run", chance.choice((0, 1, MS, 300 * MS, SECOND, 61 * SECOND, 3600 * SECOND, 86_400 * SECOND))


@pytest.mark.parametrize("seed", range(200))
def test_a_saved_clock_goes_on_alike(seed):
    check_walk(Rtc, rtc_operation, seed)


def test_what_is_in_a_clock_s_state():
    rtc = Rtc(77)
    rtc.put(A, DIVIDER_32K | 15)
    rtc.put(SEC, 0x40)
    rtc.put(0x55, 0xA5)
    rtc.run(SECOND * 5 // 2)
    rtc.put(0, 0)
    state = rtc.device.state()
    ram = state.pop("RAM")
    assert (len(ram), ram[SEC], ram[MIN], ram[DAY], ram[0x55]) == (128, 0x00, 0x59, 0x28, 0xA5)
    assert state == {"index": 0, "A": 0x2F, "B": H24, "C": PF | UF, "divider_ns": 0, "time_s": -32, "period": 1}


def test_a_clock_that_the_guest_has_not_set_shows_the_host_s_time():
    """A week in a file: the clock has gone on, as that of a computer that was off."""
    rtc, later = Rtc(77), Rtc(1 << 40)
    state = rtc.device.state()
    later.run(7 * 86_400 * SECOND + 40 * SECOND)
    later.device.load(state)
    assert [later.get(index) for index in (MONTH, DAY, HOUR, MIN, SEC)] == [0x03, 0x07, 0x00, 0x00, 0x10]


def test_a_clock_that_the_guest_has_set_keeps_its_distance():
    rtc, later = Rtc(77), Rtc(1 << 40)
    rtc.put(HOUR, 0x05)
    rtc.put(DAY, 0x01)
    rtc.put(MONTH, 0x11)
    state = rtc.device.state()
    later.run(3600 * SECOND)
    later.device.load(state)
    assert [later.get(index) for index in (MONTH, DAY, HOUR, MIN, SEC)] == [0x11, 0x01, 0x06, 0x59, 0x30]


def alarm_at_ten_past_midnight():
    rtc = Rtc(77)
    for register, value in ((HOUR_ALARM, 0x00), (MIN_ALARM, 0x10), (SEC_ALARM, 0x00), (B, AIE | H24)):
        rtc.put(register, value)
    return rtc.device.state()


def test_an_alarm_that_was_passed_meanwhile_is_due_at_once():
    later = Rtc(1 << 40)
    later.run(3600 * SECOND)
    later.device.load(alarm_at_ten_past_midnight())
    assert not later.irq.level, "a load interrupts nobody"
    later.run(0)
    assert later.irq.level
    assert later.get(C) == 0x80 | AF | UF | PF


def test_an_alarm_that_is_still_to_come_is_armed():
    later = Rtc(1 << 40)
    later.run(60 * SECOND)
    later.device.load(alarm_at_ten_past_midnight())
    later.run(9 * 60 * SECOND + 29 * SECOND)
    assert not later.irq.level
    later.run(SECOND)
    assert later.irq.level


def test_the_phase_of_the_periodic_interrupt_is_kept():
    """Half a second a period, and a divider chain that was released by the guest."""
    rtc, later = Rtc(77), Rtc(1 << 40)
    rtc.put(A, DIVIDER_RESET)
    rtc.run(333 * MS)
    rtc.put(A, DIVIDER_32K | 15)
    rtc.put(B, PIE | H24)
    rtc.run(200 * MS)
    later.meet(rtc)
    later.device.load(rtc.device.state())
    later.run(299 * MS)
    assert not later.irq.level
    later.run(2 * MS)
    assert later.irq.level


def test_a_changed_clock_is_refused_or_does_no_harm():
    assert sum(check_mutations(Rtc, rtc_operation, seed) for seed in range(40)) > 50


def test_what_is_no_state_of_a_clock_is_refused():
    rtc = Rtc(0)
    rtc.put(B, PIE | H24)
    rtc.run(400 * MS)
    byte = (-1, 256)
    check_refusals(
        rtc,
        {
            "index": (128, -1),
            "A": (0x80, *byte),
            "B": byte,
            "C": (0x80, 0x01, *byte),
            "RAM": (b"", bytes(127), bytes(129)),
            "divider_ns": (1 << 64, -1 << 64),
            "time_s": (1 << 41, -1 << 41),
            "period": (-1, 32_769),
        },
    )


@pytest.mark.parametrize("time_s", [-1 << 40, 1 << 40])
@pytest.mark.parametrize("divider_ns", [-1 << 63, 1 << 63])
@pytest.mark.parametrize("ram", [bytes(128), b"\xff" * 128])
def test_the_farthest_clock_that_is_taken_runs(time_s, divider_ns, ram):
    rtc = Rtc(0)
    rtc.put(A, DIVIDER_32K | 3)
    state = rtc.device.state() | {"time_s": time_s, "divider_ns": divider_ns, "RAM": ram, "B": PIE | AIE | UIE}
    rtc.device.load(state)
    for _ in range(3):
        rtc.run(SECOND // 8192)
        rtc.get(C)
        rtc.get(SEC)
    rtc.device.load(rtc.device.state())

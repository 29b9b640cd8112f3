"""The MC146818A as a driver sees it. Registers and bits are restated from its data sheet."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from fakes import FakeAlarm, FakeClock, FakeIrq
from hypothesis import given
from hypothesis import strategies as st

from devices.rtc_mc146818 import RtcMc146818

SECOND = 1_000_000_000
MS = 1_000_000
US = 1_000
SEC, SEC_ALARM, MIN, MIN_ALARM, HOUR, HOUR_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D = 10, 11, 12, 13
CENTURY = 0x32
UIP = 0x80
SET, PIE, AIE, UIE, SQWE, DM, H24, DSE = (1 << bit for bit in range(7, -1, -1))
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
VRT = 0x80
DIVIDER_32K, DIVIDER_RESET = 0x20, 0x60
OFF = 0  # rate: no periodic interrupt
ANY = 0xC0
EPOCH = datetime(2024, 2, 28, 23, 59, 30, tzinfo=UTC)


class Bench:
    """A clock chip, its clock and its alarm; the alarm fires as time passes."""

    def __init__(self, start: datetime = EPOCH, **ram: int) -> None:
        self.clock = FakeClock(123_456_789)
        self.alarm = FakeAlarm()
        self.irq = FakeIrq()
        self.fired = 0
        self.wall_ns = int(start.timestamp()) * SECOND - self.clock.now_ns  # host's UTC less its monotonic clock
        self.rtc = RtcMc146818(
            irq=self.irq,
            alarm=self.alarm,
            now_ns=self.clock,
            wall_seconds=lambda: (self.wall_ns + self.clock()) / 1e9,
            **ram,
        )

    def get(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def put(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def run(self, ns: int) -> None:
        end = self.clock.now_ns + ns
        while self.alarm.deadline_ns is not None and self.alarm.deadline_ns <= end:
            self.clock.now_ns = max(self.clock.now_ns, self.alarm.deadline_ns)
            assert self.alarm.expire(self.clock.now_ns)
            self.fired += 1
            self.rtc.on_alarm()
        self.clock.now_ns = end

    def run_to_irq(self, limit: int) -> int:
        """Let time pass until the interrupt rises; return how long that took, in ns."""
        start = self.clock.now_ns
        while not self.irq.level:
            assert self.alarm.deadline_ns is not None
            assert self.alarm.deadline_ns - start <= limit
            self.run(self.alarm.deadline_ns - self.clock.now_ns)
        return self.clock.now_ns - start

    def time(self) -> tuple[int, ...]:
        return tuple(self.get(index) for index in (CENTURY, YEAR, MONTH, DAY, HOUR, MIN, SEC))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def encode(value: int, mode: int) -> int:
    return value if mode & DM else int(str(value), 16)


def registers(when: datetime, mode: int) -> dict[int, int]:
    """The ten bytes and the century for `when` under register B `mode`."""
    hour = encode(when.hour, mode)
    if not mode & H24:
        hour = encode((when.hour - 1) % 12 + 1, mode) | (0x80 if when.hour >= 12 else 0)
    century, year = divmod(when.year, 100)
    return {
        SEC: encode(when.second, mode),
        MIN: encode(when.minute, mode),
        HOUR: hour,
        WEEKDAY: when.isoweekday() % 7 + 1,
        DAY: encode(when.day, mode),
        MONTH: encode(when.month, mode),
        YEAR: encode(year, mode),
        CENTURY: encode(century, mode),
    }


def held(bench: Bench) -> dict[int, int]:
    return {index: bench.get(index) for index in (SEC, MIN, HOUR, WEEKDAY, DAY, MONTH, YEAR, CENTURY)}


modes = st.sampled_from([0, DM, H24, DM | H24])
moments = st.datetimes(datetime(1970, 1, 1), datetime(2105, 12, 31), timezones=st.just(UTC)).map(  # noqa: DTZ001
    lambda moment: moment.replace(microsecond=0)
)


# --- time ----------------------------------------------------------------------------------------------------------


def test_starts_with_the_hosts_time_in_bcd(bench):
    assert bench.get(B) == H24
    assert bench.time() == (0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x30)
    assert bench.get(WEEKDAY) == 4  # a Wednesday; Sunday is 1


def test_counts_over_midnight_into_a_leap_day(bench):
    bench.run(31 * SECOND)
    assert bench.time() == (0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x01)
    bench.run(86400 * SECOND)
    assert bench.time() == (0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x01)


def test_counts_into_the_next_century():
    bench = Bench(datetime(2099, 12, 31, 23, 59, 59, tzinfo=UTC))
    bench.run(SECOND)
    assert bench.time() == (0x21, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)


@given(start=moments, mode=modes, seconds=st.integers(0, 10**9))
def test_what_is_set_is_read_back_later(start, mode, seconds):
    """Register B: SET holds updates while the program writes the time; DM and 24/12 say how."""
    bench = Bench()
    bench.run(700 * MS)
    bench.put(B, mode | SET)
    for index, value in registers(start, mode).items():
        bench.put(index, value)
    bench.run(5 * SECOND)
    assert held(bench) == registers(start, mode)  # SET: nothing moves
    bench.put(B, mode)
    bench.run(100 * MS)  # the divider chain was never stopped: its second ends 300 ms after SET is cleared
    assert held(bench) == registers(start, mode)
    bench.run(200 * MS + seconds * SECOND)
    assert held(bench) == registers(start + timedelta(seconds=seconds + 1), mode)


@given(start=moments, before=modes, after=modes)
def test_another_format_keeps_the_time(start, before, after):
    """Not under SET: the guest may change DM and 24/12 and read on."""
    bench = Bench(start)
    bench.put(B, before)
    assert held(bench) == registers(start, before)
    bench.put(B, after)
    assert held(bench) == registers(start, after)


def test_format_under_set_leaves_the_bytes_alone(bench):
    bench.put(B, SET | DM | H24)
    assert bench.get(MIN) == 0x59
    bench.put(MIN, 59)
    bench.put(B, SET | H24)
    assert bench.get(MIN) == 59
    bench.put(B, DM | H24)  # in the format that the bytes have from now on
    assert bench.get(MIN) == 59


@pytest.mark.parametrize(
    ("hour", "byte"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)], ids=str
)
def test_twelve_hour_mode(hour, byte):
    """12 AM is midnight; bit 7 is PM."""
    bench = Bench(EPOCH.replace(hour=hour))
    bench.put(B, 0)
    assert bench.get(HOUR) == byte


def test_setting_without_set_takes_effect_at_once(bench):
    """Bytes written one by one stay as they are until the next update, however odd the date between them."""
    bench.run(31 * SECOND)
    bench.put(MIN, 0x59)  # not one later, though the last minute has ended unobserved
    bench.put(DAY, 0x31)
    bench.put(MONTH, 0x02)  # 31 February for now
    assert bench.get(DAY) == 0x31
    bench.put(DAY, 0x05)
    bench.run(SECOND)
    assert bench.time() == (0x20, 0x24, 0x02, 0x05, 0x00, 0x59, 0x02)


def test_the_guests_clock_follows_the_hosts_at_its_distance(bench):
    """The host's clock is corrected by ten seconds: the guest's, set an hour back, goes with it."""
    bench.put(HOUR, 0x22)
    bench.run(SECOND)
    bench.wall_ns += 10 * SECOND
    assert bench.time()[-3:] == (0x22, 0x59, 0x41)
    bench.wall_ns -= 20 * SECOND
    assert bench.time()[-3:] == (0x22, 0x59, 0x21)


@given(bytes_=st.binary(min_size=11, max_size=11), mode=modes, seconds=st.integers(-(10**6), 10**9))
def test_no_byte_is_too_odd(bytes_, mode, seconds):
    """Whatever the guest writes as a time, the chip counts on and every register stays a byte."""
    bench = Bench()
    for index, value in zip((*range(10), CENTURY), bytes_, strict=True):
        bench.put(index, value)
    bench.put(B, mode)
    bench.wall_ns += seconds * SECOND
    assert all(0 <= bench.get(index) <= 0xFF for index in range(128))


# --- registers -----------------------------------------------------------------------------------------------------


def test_reset_values(bench):
    assert bench.get(A) == 0x26
    assert bench.get(D) == VRT
    assert not bench.irq.level
    assert bench.alarm.sets == []


def test_index_port_masks_nmi_and_cannot_be_read(bench):
    bench.rtc.write(0, 1, 0x80 | D)
    assert bench.rtc.read(1, 1) == VRT
    assert bench.rtc.read(0, 1) & 0xFF == 0xFF


def test_a_word_is_two_byte_cycles(bench):
    """`out 0x70, ax` selects and writes."""
    bench.rtc.write(0, 2, 0x5A_40)
    assert bench.get(0x40) == 0x5A
    assert bench.rtc.read(0, 2) == 0x5AFF


def test_cmos_ram_keeps_what_is_written(bench):
    free = [index for index in range(0x0E, 0x80) if index != CENTURY]
    for index in free:
        bench.put(index, index ^ 0xA5)
    bench.run(100 * SECOND)
    assert [bench.get(index) for index in free] == [index ^ 0xA5 for index in free]


def test_c_and_d_cannot_be_written(bench):
    bench.put(C, 0xFF)
    bench.put(D, 0x00)
    assert bench.get(C) == 0
    assert bench.get(D) == VRT


def test_uip_in_a_is_read_only_and_the_rest_is_kept(bench):
    bench.put(A, 0xAF)
    assert bench.get(A) == 0x2F


@pytest.mark.parametrize(
    ("at", "rises"),
    [(0, False), (997 * MS, False), (SECOND - 2_229 * US, False), (SECOND - 2_227 * US, True), (SECOND - US, True)],
)
def test_update_in_progress(bench, at, rises):
    """Table 6: UIP rises 244 us before the update, which takes 1984 us; then the new second is there."""
    bench.run(at)
    assert bool(bench.get(A) & UIP) is rises
    bench.run(SECOND - at + US)
    assert not bench.get(A) & UIP
    assert bench.get(SEC) == 0x31


def test_set_and_a_held_divider_clear_uip(bench):
    bench.run(SECOND - MS)
    bench.put(B, SET | H24)
    assert not bench.get(A) & UIP
    bench.put(B, H24)
    assert bench.get(A) & UIP
    bench.put(A, DIVIDER_RESET)
    assert not bench.get(A) & UIP


@pytest.mark.parametrize("hold", [0x60, 0x70])
def test_divider_reset_stops_time_and_releases_half_a_second_on(bench, hold):
    """Register A, DV: the first update comes half a second after the reset is taken away."""
    bench.run(900 * MS)
    bench.put(A, hold)
    bench.run(10 * SECOND)
    assert bench.get(SEC) == 0x30
    bench.put(SEC, 0x07)
    bench.put(A, DIVIDER_32K)
    bench.run(499 * MS)
    assert bench.get(SEC) == 0x07
    bench.run(2 * MS)
    assert bench.get(SEC) == 0x08


def test_linux_sets_the_time_so(bench):
    """SET, divider reset, the bytes, then both back: half a second later the next second begins."""
    control, rate = bench.get(B), bench.get(A)
    bench.put(B, control | SET)
    bench.put(A, rate | 0x70)
    for index, value in registers(datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC), H24).items():
        bench.put(index, value)
    bench.put(B, control)
    bench.run(3 * SECOND)
    bench.put(A, rate)
    bench.run(499 * MS)
    assert bench.time() == (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    bench.run(2 * MS)
    assert bench.time() == (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)


def test_ram_size_bytes():
    """QEMU's convention: conventional, above 1 MiB, above 16 MiB (low and high byte), above 4 GiB (three bytes)."""
    bench = Bench(ram_below_4g=3 << 30, ram_above_4g=(5 << 30) + (64 << 10))
    read = lambda *indices: [bench.get(index) for index in indices]  # noqa: E731
    assert read(0x15, 0x16) == [0x80, 0x02]  # 640 KiB
    assert read(0x17, 0x18) == read(0x30, 0x31) == [0xFF, 0xFF]
    assert read(0x34, 0x35) == [0x00, 0xBF]  # (3 GiB - 16 MiB) / 64 KiB
    assert read(0x5B, 0x5C, 0x5D) == [0x01, 0x40, 0x01]


def test_ram_size_bytes_of_a_small_machine():
    bench = Bench(ram_below_4g=8 << 20)
    assert [bench.get(index) for index in (0x17, 0x18)] == [0x00, 0x1C]  # 7 MiB
    assert [bench.get(index) for index in (0x34, 0x35, 0x5B)] == [0, 0, 0]
    tiny = Bench(ram_below_4g=512 << 10)
    assert [tiny.get(index) for index in (0x15, 0x16, 0x17, 0x18)] == [0x00, 0x02, 0, 0]


# --- interrupts ----------------------------------------------------------------------------------------------------


def test_update_ended(bench):
    """Register C: UF at the end of every update; reading C clears it and drops the interrupt."""
    bench.get(C)
    bench.put(B, UIE | H24)
    assert bench.run_to_irq(SECOND + US) == pytest.approx(SECOND, abs=US)
    assert bench.get(SEC) == 0x31
    bench.rtc.write(0, 1, C)
    assert bench.rtc.read(1, 1) & ~PF == IRQF | UF  # PF: the default rate has set it, nobody enabled it
    assert not bench.irq.level
    assert bench.run_to_irq(SECOND + US) == pytest.approx(SECOND, abs=2 * US)


def test_flags_are_set_without_being_enabled(bench):
    """Register C: flags regardless of enable bits; IRQF and the pin only with them."""
    bench.put(A, DIVIDER_32K | OFF)
    bench.get(C)
    bench.run(SECOND)
    assert bench.get(C) == UF
    bench.run(SECOND)
    assert not bench.irq.level
    bench.put(B, UIE | H24)
    assert bench.irq.level
    assert bench.get(C) == IRQF | UF
    assert bench.get(C) == 0
    assert bench.alarm.deadline_ns is not None


def test_disabling_drops_the_interrupt_and_keeps_the_flag(bench):
    bench.put(A, DIVIDER_32K | OFF)
    bench.put(B, UIE | H24)
    bench.run(SECOND)
    assert bench.irq.level
    bench.put(B, H24)
    assert not bench.irq.level
    assert bench.get(C) == UF


def test_set_going_high_clears_uie(bench):
    bench.put(B, UIE | H24)
    bench.put(B, SET | UIE | H24)
    assert bench.get(B) == SET | H24
    bench.put(B, SET | UIE | H24)  # it has gone high already
    assert bench.get(B) == SET | UIE | H24
    bench.get(C)
    bench.run(5 * SECOND)
    assert not bench.irq.level  # no updates under SET, so none ends


def test_nothing_is_armed_while_nothing_is_enabled(bench):
    for _ in range(100):
        bench.run(SECOND // 10)
        bench.get(SEC)
        bench.get(C)
    assert bench.alarm.sets == []


# register A, RS -> Hz with a 32.768 kHz crystal
RATES = {1: 256, 2: 128} | {code: 32768 >> code - 1 for code in range(3, 16)}


@pytest.mark.parametrize(("code", "hertz"), RATES.items())
def test_periodic_rates(bench, code, hertz):
    bench.put(A, DIVIDER_32K | code)
    bench.get(C)
    bench.put(B, PIE | H24)
    rises = 0
    end = bench.clock.now_ns + SECOND
    while bench.alarm.deadline_ns is not None and bench.alarm.deadline_ns <= end + US:
        bench.run(bench.alarm.deadline_ns - bench.clock.now_ns)
        if bench.irq.level:
            rises += 1
            assert bench.get(C) & ~UF == IRQF | PF
    assert rises == hertz


def test_rate_zero_is_none(bench):
    bench.put(A, DIVIDER_32K | OFF)
    bench.get(C)
    bench.put(B, PIE | H24)
    bench.run(10 * SECOND)
    assert not bench.irq.level
    assert not bench.get(C) & PF
    assert bench.alarm.sets == []


def test_a_guest_that_never_reads_c_costs_one_timer(bench):
    """8192 Hz, all enabled, C never read: the line is up and nothing is armed until C is read."""
    bench.put(A, DIVIDER_32K | 3)
    bench.get(C)
    bench.put(B, PIE | UIE | AIE | H24)
    bench.run(60 * SECOND)
    assert bench.irq.level
    assert bench.fired <= 3  # the clock in nanoseconds may round a wake-up to just before the edge
    assert bench.alarm.deadline_ns is None
    assert bench.get(C) & (IRQF | PF | UF) == IRQF | PF | UF
    assert bench.alarm.deadline_ns is not None


def test_periodic_goes_on_under_set(bench):
    """SET inhibits updates, not the divider chain."""
    bench.put(B, SET | PIE | H24)
    bench.get(C)
    assert bench.run_to_irq(2 * MS) <= MS + US


def test_a_held_divider_has_no_events(bench):
    bench.put(B, PIE | UIE | AIE | H24)
    bench.get(C)
    bench.put(A, DIVIDER_RESET | 3)
    bench.get(C)
    assert bench.alarm.deadline_ns is None
    bench.run(10 * SECOND)
    assert bench.get(C) == 0


def test_reading_the_time_raises_what_is_due(bench):
    """The host's clock leaps: a guest that reads the new second has its interrupt too."""
    bench.put(A, DIVIDER_32K | OFF)
    bench.put(B, UIE | H24)
    bench.get(C)
    bench.wall_ns += 3600 * SECOND
    bench.get(SEC)
    assert bench.irq.level


def test_an_alarm_that_fires_early_does_no_harm(bench):
    bench.put(A, DIVIDER_32K | OFF)
    bench.get(C)
    bench.put(B, UIE | H24)
    bench.rtc.on_alarm()
    assert not bench.irq.level
    bench.run(SECOND + US)
    assert bench.irq.level


def test_enabling_and_disabling_arms_and_disarms(bench):
    bench.get(C)
    bench.put(B, UIE | H24)
    assert bench.alarm.deadline_ns is not None
    bench.put(B, H24)
    assert bench.alarm.deadline_ns is None


# --- alarm ---------------------------------------------------------------------------------------------------------


def set_alarm(bench: Bench, hour: int, minute: int, second: int) -> None:
    for index, value in ((HOUR_ALARM, hour), (MIN_ALARM, minute), (SEC_ALARM, second)):
        bench.put(index, value)


@pytest.mark.parametrize(
    ("alarm", "after"),
    [
        ((0x23, 0x59, 0x31), 1),
        ((0x00, 0x00, 0x00), 30),
        ((0x23, 0x59, 0x30), 86400),  # that second has begun
        ((ANY, ANY, ANY), 1),
        ((ANY, ANY, 0x15), 45),
        ((ANY, 0x00, 0xFF), 30),
        ((0x01, ANY, ANY), 3630),
        ((0x01, ANY, 0x05), 3635),
        ((0x01, 0x20, ANY), 4830),
    ],
)
def test_alarm_with_dont_care_codes(bench, alarm, after):
    """Bytes from 0xC0 to 0xFF match always: once an hour, a minute, a second."""
    bench.put(A, DIVIDER_32K | OFF)
    bench.get(C)
    set_alarm(bench, *alarm)
    bench.put(B, AIE | H24)
    assert bench.run_to_irq(86401 * SECOND) == pytest.approx(after * SECOND, abs=US)
    assert bench.get(C) == IRQF | AF | UF
    assert not bench.irq.level


@pytest.mark.parametrize(
    "alarm",
    [
        *((0x24, ANY, ANY), (0x0A, ANY, ANY), (0x80, ANY, ANY)),
        *((ANY, 0x60, ANY), (ANY, 0x1F, ANY)),
        *((ANY, ANY, 0x60), (ANY, ANY, 0x0A), (0x12, ANY, 0xA0)),
    ],
)
def test_an_alarm_byte_that_no_time_has_never_matches(bench, alarm):
    bench.put(A, DIVIDER_32K | OFF)
    bench.get(C)
    set_alarm(bench, *alarm)
    bench.put(B, AIE | H24)
    assert bench.alarm.deadline_ns is None
    bench.run(2 * 86400 * SECOND)
    assert bench.get(C) == UF


def test_twelve_hour_alarm():
    bench = Bench(datetime(2024, 5, 5, 11, 59, 58, tzinfo=UTC))
    bench.put(B, 0)
    set_alarm(bench, 0x92, 0x00, 0x00)  # 12 PM
    bench.get(C)
    bench.put(B, AIE)
    assert bench.run_to_irq(3 * SECOND) == pytest.approx(2 * SECOND, abs=US)


def test_setting_the_time_moves_the_alarm(bench):
    set_alarm(bench, 0x12, 0x00, 0x00)
    bench.put(B, AIE | H24)
    bench.get(C)
    bench.put(B, SET | AIE | H24)
    for index, value in ((HOUR, 0x11), (MIN, 0x59), (SEC, 0x50)):
        bench.put(index, value)
    bench.put(B, AIE | H24)
    assert bench.run_to_irq(11 * SECOND) == pytest.approx(10 * SECOND, abs=US)


def test_moving_the_alarm_re_arms(bench):
    set_alarm(bench, 0x12, 0x00, 0x00)
    bench.get(C)
    bench.put(B, AIE | H24)
    bench.put(HOUR_ALARM, 0x00)
    assert bench.run_to_irq(31 * SECOND) == pytest.approx(30 * SECOND, abs=US)


@given(
    mode=modes,
    start=st.integers(0, 86399),
    alarm=st.tuples(*[st.one_of(st.integers(0, 0xFF), st.just(ANY))] * 3),
    step=st.integers(1, 90),
    steps=st.integers(1, 60),
)
def test_alarm_flag_is_set_when_the_bytes_match(mode, start, alarm, step, steps):
    """AF after a stretch exactly if in one of its seconds each alarm byte equals its time byte or is 11xxxxxx."""
    begin = datetime(2024, 7, 1, tzinfo=UTC) + timedelta(seconds=start)
    bench = Bench(begin)
    bench.put(B, mode)
    set_alarm(bench, *alarm)
    bench.get(C)
    for i in range(steps):
        bench.run(step * SECOND)
        moments_between = (begin + timedelta(seconds=i * step + s) for s in range(1, step + 1))
        expected = any(
            all(a >= ANY or a == byte for a, byte in zip(alarm, (now[HOUR], now[MIN], now[SEC]), strict=True))
            for now in (registers(moment, mode) for moment in moments_between)
        )
        assert bool(bench.get(C) & AF) is expected

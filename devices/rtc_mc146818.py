"""MC146818A real-time clock with its CMOS RAM, as a PC wires it: an index port and a data port (0x70, 0x71), IRQ 8.

The time registers hold what the chip's RAM would hold; nothing runs while nobody looks. Every access first counts the
seconds and the periods of the divider chain that have gone by since the last one, and the alarm that the machine lends
is armed only for an interrupt that is enabled and not asserted already. So a guest that asks for 8192 interrupts a
second and never reads register C costs one timer.

Clause names are those of the MC146818A data sheet.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from time import gmtime
from typing import TYPE_CHECKING, Any, Final

from devices.ports import OPEN_BUS, register_of
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.ports import Alarm, IrqLine

__all__ = ["Port", "RegA", "RegB", "RegC", "RegD", "Register", "RtcMc146818"]


class Port(IntEnum):
    """Offsets from port 0x70."""

    INDEX = 0  # WO
    DATA = 1  # RW: the register that INDEX selects


class Register(IntEnum):
    """What the index port selects. All but A to D are bytes of RAM; 0x0E and up is free but for CENTURY."""

    SECONDS = 0x00
    SECONDS_ALARM = 0x01
    MINUTES = 0x02
    MINUTES_ALARM = 0x03
    HOURS = 0x04  # bit 7 is PM in 12-hour mode
    HOURS_ALARM = 0x05
    WEEKDAY = 0x06  # 1 is Sunday
    DAY = 0x07
    MONTH = 0x08
    YEAR = 0x09  # within the century
    A = 0x0A  # RW but for UIP
    B = 0x0B  # RW
    C = 0x0C  # RO; a read clears it
    D = 0x0D  # RO
    CENTURY = 0x32  # a convention of PCs; the FADT names it to the guest


class RegA(IntFlag):
    """Register A."""

    UIP = 1 << 7  # update in progress, RO
    DV = 7 << 4  # divider: 010 counts a 32.768 kHz crystal, 11x holds the divider chain in reset
    RS = 15 << 0  # rate of the periodic interrupt


class RegB(IntFlag):
    """Register B."""

    SET = 1 << 7  # the program is setting the time: no updates
    PIE = 1 << 6
    AIE = 1 << 5
    UIE = 1 << 4
    SQWE = 1 << 3  # square wave: no pin, kept as a bit
    DM = 1 << 2  # binary, else BCD
    H24 = 1 << 1  # 24-hour, else 12-hour
    DSE = 1 << 0  # daylight saving: kept as a bit


class RegC(IntFlag):
    """Register C: each flag is at the place of its enable bit in register B."""

    IRQF = 1 << 7
    PF = 1 << 6
    AF = 1 << 5
    UF = 1 << 4


class RegD(IntFlag):
    """Register D."""

    VRT = 1 << 7  # valid RAM and time: the battery is good


_INDEX: Final = int(Port.INDEX)
_DATA: Final = int(Port.DATA)
_NS: Final = 1_000_000_000
_CRYSTAL_HZ: Final = 32_768
_UIP_NS: Final = 244_000 + 1_984_000
"""UIP rises 244 us before an update cycle, which takes 1984 us with this crystal (table 6)."""
_RELEASE_NS: Final = _NS // 2
"""The first update comes half a second after the divider chain leaves reset (register A, DV)."""
_ANY: Final = 0xC0
"""Alarm bytes from here on match every value."""
_DAYS_BEFORE: Final = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
_DAYS_TO_1970: Final = 719_162  # from 1 January of year 1
_FARTHEST_S: Final = 1 << 40
_FARTHEST_NS: Final = 1 << 63
"""How far a saved clock may be from the host's: more than any that a guest can set, and no trouble to count with."""
_KIB: Final = 1 << 10
_MIB: Final = 1 << 20

_UIP: Final = int(RegA.UIP)
_SET: Final = int(RegB.SET)
_PIE: Final = int(RegB.PIE)
_AIE: Final = int(RegB.AIE)
_UIE: Final = int(RegB.UIE)
_DM: Final = int(RegB.DM)
_H24: Final = int(RegB.H24)
_PF: Final = int(RegC.PF)
_AF: Final = int(RegC.AF)
_UF: Final = int(RegC.UF)
_IRQF: Final = int(RegC.IRQF)
_CAUSES: Final = _PF | _AF | _UF
_REGISTERS: Final = (("index", 0x7F), ("A", 0xFF & ~_UIP), ("B", 0xFF), ("C", _CAUSES))
"""What a saved state has of each, as bits."""
_TIME: Final = frozenset(
    int(register)
    for register in (
        Register.SECONDS,
        Register.MINUTES,
        Register.HOURS,
        Register.WEEKDAY,
        Register.DAY,
        Register.MONTH,
        Register.YEAR,
        Register.CENTURY,
    )
)
_SECONDS_ALARM: Final = int(Register.SECONDS_ALARM)
_MINUTES_ALARM: Final = int(Register.MINUTES_ALARM)
_HOURS_ALARM: Final = int(Register.HOURS_ALARM)
_ALARM: Final = frozenset((_SECONDS_ALARM, _MINUTES_ALARM, _HOURS_ALARM))


class RtcMc146818:
    """The clock. It keeps UTC and follows the host's clock until the guest sets it; from then on at that distance."""

    def __init__(  # noqa: PLR0913 - what the chip is soldered to
        self,
        *,
        irq: IrqLine,
        alarm: Alarm,
        now_ns: Callable[[], int],
        wall_seconds: Callable[[], float],
        ram_below_4g: int = 0,
        ram_above_4g: int = 0,
    ) -> None:
        """Start with the host's time, BCD, 24 hours, no interrupt enabled.

        Args:
            irq: IRQ 8.
            alarm: a timer on the clock `now_ns`; the machine calls `on_alarm` when it fires.
            now_ns: a clock that never steps, in nanoseconds.
            wall_seconds: UTC, in seconds since 1970.
            ram_below_4g: bytes of RAM below 4 GiB, for the CMOS bytes by which firmware learns it.
            ram_above_4g: bytes of RAM from 4 GiB up.
        """
        self._irq = irq
        self._alarm = alarm
        self._now_ns = now_ns
        self._wall_seconds = wall_seconds
        self._cmos = bytearray(0x80)
        self._index = 0
        self._a = 0x26  # 32.768 kHz, 1024 Hz: what a PC's firmware leaves
        self._b = _H24
        self._c = 0
        self._phase_ns = 0  # divider chain less host clock
        self._armed = False
        self._readers: Mapping[int, Callable[[], int]] = {
            Register.A: self._read_a,
            Register.B: lambda: self._b,
            Register.C: self._read_c,
            Register.D: lambda: int(RegD.VRT),
        }
        self._writers: Mapping[int, Callable[[int], None]] = {
            Register.A: self._write_a,
            Register.B: self._write_b,
            Register.C: lambda _value: None,
            Register.D: lambda _value: None,
        }
        ns = self._divider_ns()
        self._second = ns // _NS  # as of the last _catch_up
        self._period = self._periods(ns)
        self._store_time(self._second)
        self._store_ram_size(ram_below_4g, ram_above_4g)

    def read(self, offset: int, size: int) -> int:
        """Return the selected byte at offset 1; the index port cannot be read back."""
        if size != 1:  # the bus controller makes byte cycles of a wider access
            return sum((self.read(offset + i, 1) & 0xFF) << 8 * i for i in range(size))
        if offset != _DATA:
            return OPEN_BUS
        index = self._index
        reader = self._readers.get(index)
        if reader is not None:
            return reader()
        if index in _TIME:
            self._catch_up()
            if self._b & _CAUSES:
                self._update_irq()
        return self._cmos[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select a byte (offset 0; bit 7 masks NMI on a PC and is ignored) or set the selected one (offset 1)."""
        if size != 1:
            for i in range(size):
                self.write(offset + i, 1, value >> 8 * i & 0xFF)
        elif offset == _INDEX:
            self._index = value & 0x7F
        else:
            self._write_data(self._index, value)

    @staticmethod
    def register_name(offset: int, *, write: bool) -> str:
        """Return the name of the port at `offset`: which register was selected when, nobody knows afterwards."""
        return register_of(Port, offset, write=write)

    def on_alarm(self) -> None:
        """Raise what is due: the machine calls this when the alarm fires. Calling it too early does no harm."""
        self._armed = False
        self._catch_up()
        self._update_irq()

    # --- saved and loaded --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the registers, and how far the clock is from the host's.

        `divider_ns` is the divider chain less the host's UTC, `time_s` the time registers less the divider's seconds,
        `period` how many of the periodic interrupt's periods have gone by in this second, if the chain runs.
        """
        self._catch_up()
        self._update_irq()
        period = self._period - self._periods(self._second * _NS) if self._divider_runs() else 0
        return {
            "index": self._index,
            "A": self._a,
            "B": self._b,
            "C": self._c,
            "RAM": bytes(self._cmos),
            "divider_ns": self._phase_ns,
            "time_s": self._load_time() - self._second,
            "period": period,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in a state; see `devices.ports.Stateful`.

        The clock goes on at its distance from the host's: what has fallen due meanwhile is due now, as it is for a
        computer that was off while its battery kept the clock running.
        """
        saved = Saved(state)
        index, a, b, c = (saved.bits(name, mask) for name, mask in _REGISTERS)
        cmos = saved.octets("RAM", len(self._cmos), least=len(self._cmos))
        phase_ns = saved.number("divider_ns", _FARTHEST_NS, least=-_FARTHEST_NS)
        time_s = saved.number("time_s", _FARTHEST_S, least=-_FARTHEST_S)
        period = saved.number("period", _CRYSTAL_HZ)
        saved.end()
        self._index, self._a, self._b, self._c = index, a, b, c
        self._cmos[:] = cmos
        self._phase_ns = phase_ns
        self._second = self._load_time() - time_s
        self._period = self._periods(self._second * _NS) + period
        self._armed = True  # whether or not: the alarm is set or disarmed now
        self._update_irq()

    # --- registers ---------------------------------------------------------------------------------------------------

    def _write_data(self, index: int, value: int) -> None:
        writer = self._writers.get(index)
        if writer is not None:
            writer(value)
        elif index in _TIME or index in _ALARM:
            self._catch_up()
            self._cmos[index] = value
            self._update_irq()  # the alarm's next match has moved
        else:
            self._cmos[index] = value

    def _read_a(self) -> int:
        updating = self._divider_runs() and not self._b & _SET and self._divider_ns() % _NS >= _NS - _UIP_NS
        return self._a | _UIP if updating else self._a

    def _write_a(self, value: int) -> None:
        self._catch_up()
        held = not self._divider_runs()
        self._a = value & ~_UIP
        if held and self._divider_runs():
            self._phase_ns += _RELEASE_NS - self._divider_ns()
            self._second = 0
        self._period = self._periods(self._divider_ns())
        self._update_irq()

    def _write_b(self, value: int) -> None:
        self._catch_up()
        rises = value & ~self._b
        if rises & _SET:
            value &= ~_UIE  # "UIE is cleared by SET going high"
        counting = not (value | self._b) & _SET
        if counting and (value ^ self._b) & (_DM | _H24):
            # The data sheet wants the time set again after this. Keeping it needs no such care from the guest.
            seconds = self._load_time()
            self._b = value
            self._store_time(seconds)
        self._b = value
        self._update_irq()

    def _read_c(self) -> int:
        self._catch_up()
        flags = self._c
        if flags & self._b & _CAUSES:
            flags |= _IRQF
        self._c = 0
        self._update_irq()
        return flags

    # --- the divider chain -------------------------------------------------------------------------------------------

    def _divider_runs(self) -> bool:
        return self._a & 0x60 != 0x60

    def _divider_ns(self) -> int:
        return int(self._wall_seconds() * _NS) + self._phase_ns

    def _period_shift(self) -> int:
        """Crystal cycles in a period of the periodic interrupt, as a power of two; -1 for none (register A, RS)."""
        rate = self._a & 0x0F
        return rate + 6 if rate in {1, 2} else rate - 1

    def _periods(self, ns: int) -> int:
        shift = self._period_shift()
        return 0 if shift < 0 else ns * _CRYSTAL_HZ // _NS >> shift

    def _catch_up(self) -> None:
        """Bring the time and the flags up to now. The flags are set whether or not their interrupt is enabled."""
        if not self._divider_runs():
            return
        ns = self._divider_ns()
        elapsed = ns // _NS - self._second
        if elapsed:
            self._second += elapsed
            if not self._b & _SET:
                self._count(elapsed)
        periods = self._periods(ns)
        if periods != self._period:
            self._period = periods
            self._c |= _PF

    def _count(self, elapsed: int) -> None:
        """Do `elapsed` update cycles at once; the host's clock may have stepped back, then it is negative."""
        before = self._load_time()
        after = before + elapsed
        self._store_time(after)
        self._c |= _UF
        match = self._next_match(before)
        if match is not None and match <= after:
            self._c |= _AF

    def _update_irq(self) -> None:
        level = bool(self._b & self._c & _CAUSES)
        self._irq.set(level)
        deadline = None if level else self._next_event_ns()  # while it is asserted nothing can change it
        if deadline is not None or self._armed:
            self._armed = deadline is not None
            self._alarm.set(deadline)

    def _next_event_ns(self) -> int | None:
        """When, on the clock `now_ns`, the next enabled interrupt falls due."""
        enabled = self._b & _CAUSES
        if not enabled or not self._divider_runs():
            return None
        due = []
        shift = self._period_shift()
        if enabled & _PIE and shift >= 0:
            due.append(-(-((self._period + 1 << shift) * _NS) // _CRYSTAL_HZ))
        if not self._b & _SET:
            if enabled & _UIE:
                due.append((self._second + 1) * _NS)
            if enabled & _AIE:
                time = self._load_time()
                match = self._next_match(time)
                if match is not None:
                    due.append((self._second + match - time) * _NS)
        if not due:
            return None
        return self._now_ns() + min(due) - self._divider_ns()

    # --- time and alarm bytes ----------------------------------------------------------------------------------------

    def _encode(self, value: int) -> int:
        return value if self._b & _DM else value // 10 << 4 | value % 10

    def _decode(self, byte: int) -> int:
        return byte if self._b & _DM else (byte >> 4) * 10 + (byte & 0x0F)

    def _encode_hour(self, hour: int) -> int:
        if self._b & _H24:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, byte: int) -> int:
        if self._b & _H24:
            return self._decode(byte)
        return self._decode(byte & 0x7F) % 12 + (12 if byte & 0x80 else 0)

    def _store_time(self, seconds: int) -> None:
        """Set the time registers to `seconds` since 1970."""
        time = gmtime(seconds)
        cmos = self._cmos
        cmos[Register.SECONDS] = self._encode(time.tm_sec)
        cmos[Register.MINUTES] = self._encode(time.tm_min)
        cmos[Register.HOURS] = self._encode_hour(time.tm_hour)
        cmos[Register.WEEKDAY] = self._encode((time.tm_wday + 1) % 7 + 1)
        cmos[Register.DAY] = self._encode(time.tm_mday)
        cmos[Register.MONTH] = self._encode(time.tm_mon)
        cmos[Register.YEAR] = self._encode(time.tm_year % 100)
        cmos[Register.CENTURY] = self._encode(time.tm_year // 100 % 100)

    def _load_time(self) -> int:
        """Return the time registers as seconds since 1970; a byte out of its range carries into the next unit."""
        cmos = self._cmos
        year = self._decode(cmos[Register.CENTURY]) * 100 + self._decode(cmos[Register.YEAR])
        carry, month = divmod(self._decode(cmos[Register.MONTH]) - 1, 12)
        year += carry
        past = year - 1
        days = past * 365 + past // 4 - past // 100 + past // 400 - _DAYS_TO_1970
        days += _DAYS_BEFORE[month] + self._decode(cmos[Register.DAY]) - 1
        if month > 1 and year % 4 == 0 and (year % 100 != 0 or year % 400 == 0):
            days += 1
        hours = days * 24 + self._decode_hour(cmos[Register.HOURS])
        minutes = hours * 60 + self._decode(cmos[Register.MINUTES])
        return minutes * 60 + self._decode(cmos[Register.SECONDS])

    def _next_match(self, after: int) -> int | None:
        """Return the first second later than `after` at which the alarm goes off, None if it never will.

        The chip compares bytes: an alarm byte that no time register ever holds never matches.
        """
        cmos = self._cmos
        second, minute, hour = cmos[_SECONDS_ALARM], cmos[_MINUTES_ALARM], cmos[_HOURS_ALARM]
        time = after + 1
        if second < _ANY:
            wanted = self._decode(second)
            if wanted > 59 or self._encode(wanted) != second:
                return None
            time += (wanted - time) % 60
        if minute < _ANY:
            wanted = self._decode(minute)
            if wanted > 59 or self._encode(wanted) != minute:
                return None
            time = _forward(time, (wanted - time // 60) % 60, 60, first=second >= _ANY)
        if hour < _ANY:
            wanted = self._decode_hour(hour)
            if wanted > 23 or self._encode_hour(wanted) != hour:
                return None
            skip = (wanted - time // 3600) % 24
            if skip and minute >= _ANY:
                time -= time // 60 % 60 * 60
            time = _forward(time, skip, 3600, first=second >= _ANY)
        return time

    def _store_ram_size(self, below_4g: int, above_4g: int) -> None:
        """Set the CMOS bytes for the size of RAM to what QEMU's PCs have there."""
        for low, size, unit, width in (
            (0x15, min(below_4g, 640 * _KIB), _KIB, 2),  # conventional memory
            (0x17, below_4g - _MIB, _KIB, 2),  # above 1 MiB, as far as KiB in 16 bits go
            (0x30, below_4g - _MIB, _KIB, 2),
            (0x34, below_4g - 16 * _MIB, 64 * _KIB, 2),  # above 16 MiB
            (0x5B, above_4g, 64 * _KIB, 3),  # above 4 GiB
        ):
            units = min(max(size, 0) // unit, (1 << 8 * width) - 1)
            self._cmos[low : low + width] = units.to_bytes(width, "little")


def _forward(time: int, units: int, unit: int, *, first: bool) -> int:
    """Go `units` units of `unit` seconds on; `first`: to the first second of a minute, unless it stays where it is."""
    if units and first:
        time -= time % 60
    return time + units * unit

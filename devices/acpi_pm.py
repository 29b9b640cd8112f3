"""ACPI fixed hardware: PM1 event and control registers, the power button and the PM timer, in one stretch of ports.

The platform has no system management mode and is never in legacy mode: SCI_EN reads as one, always (ACPI 6.4,
4.8.3.2.1; the FADT says so with SMI_CMD zero, 5.2.9).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Final

from devices.events import EventLog
from devices.ports import OPEN_BUS, register_of
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.ports import Alarm, IrqLine

__all__ = ["PM_TIMER_HZ", "S5_SLEEP_TYPE", "AcpiPm", "Pm1Control", "Pm1Event", "Reg"]

S5_SLEEP_TYPE: Final = 5
"""SLP_TYP for soft-off. The platform chooses it; the DSDT's \\_S5 object tells it to the guest."""
PM_TIMER_HZ: Final = 3_579_545


class Reg(IntEnum):
    """Offsets from the first port; 6 and 7 are nobody's."""

    PM1_STS = 0  # 16 bits, write one to clear (ACPI 6.4, 4.8.3.1.1)
    PM1_EN = 2  # 16 bits, RW (4.8.3.1.2)
    PM1_CNT = 4  # 16 bits, RW (4.8.3.2.1)
    PM_TMR = 8  # 32 bits, RO (4.8.3.3)


class Pm1Event(IntFlag):
    """Bits of PM1_STS and PM1_EN that this platform has. The sleep button is not among them: see the FADT."""

    TMR = 1 << 0  # the timer's top bit has toggled
    GBL = 1 << 5  # the firmware released the global lock: never, but a guest enables it
    PWRBTN = 1 << 8
    RTC = 1 << 10  # never raised, the FADT says so; but Linux complains when it cannot enable it


class Pm1Control(IntFlag):
    """Bits of PM1_CNT."""

    SCI_EN = 1 << 0  # RO here
    BM_RLD = 1 << 1
    GBL_RLS = 1 << 2  # WO
    SLP_TYP = 7 << 10
    SLP_EN = 1 << 13  # WO: enter the state that SLP_TYP names


_NS: Final = 1_000_000_000
_TIMER: Final = int(Reg.PM_TMR)
_TMR: Final = int(Pm1Event.TMR)
_PWRBTN: Final = int(Pm1Event.PWRBTN)
_EVENTS: Final = int(Pm1Event.TMR | Pm1Event.GBL | Pm1Event.PWRBTN | Pm1Event.RTC)
_SCI_EN: Final = int(Pm1Control.SCI_EN)
_KEPT: Final = int(Pm1Control.BM_RLD | Pm1Control.SLP_TYP)
_SLP_EN: Final = int(Pm1Control.SLP_EN)
_REGISTERS_END: Final = 6
_GAP: Final = 0xFFFF << 48
_OLDEST_NS: Final = (1 << 63) - 1


class AcpiPm:
    """The PM1a register blocks and a 32-bit PM timer, twelve ports in all."""

    def __init__(
        self, *, irq: IrqLine, alarm: Alarm, now_ns: Callable[[], int], on_power_off: Callable[[], None]
    ) -> None:
        """Start with no event enabled and the timer at zero.

        Args:
            irq: the SCI, a level.
            alarm: a timer on the clock `now_ns`; the machine calls `on_alarm` when it fires.
            now_ns: a clock that never steps, in nanoseconds.
            on_power_off: called when the guest enters S5.
        """
        self._irq = irq
        self._alarm = alarm
        self._now_ns = now_ns
        self._on_power_off = on_power_off
        self._log = EventLog(device="acpi-pm")
        self._epoch_ns = now_ns()
        self._status = 0
        self._enable = 0
        self._control = _SCI_EN
        self._toggles = 0  # of the timer's top bit, as of the last _catch_up
        self._armed = False

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the bus cuts the answer to its size
        """Return the registers from `offset` on; the timer also by bytes, though it is meant to be read whole."""
        if offset >= _TIMER:
            return _ticks(self._now_ns() - self._epoch_ns) >> 8 * (offset - _TIMER)
        if offset >= _REGISTERS_END:
            return OPEN_BUS
        self._catch_up()
        return (_GAP | self._control << 32 | self._enable << 16 | self._status) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Set those bytes of PM1 status, enable and control that the access covers; the timer takes no writes."""
        if offset >= _REGISTERS_END:
            return
        self._catch_up()
        written = value << 8 * offset
        covered = (1 << 8 * size) - 1 << 8 * offset
        self._status &= ~written
        self._enable = _merge(self._enable, written >> 16, covered >> 16) & _EVENTS
        self._control = _merge(self._control, written >> 32, covered >> 32) & _KEPT | _SCI_EN
        self._update_irq()
        if written & _SLP_EN << 32:
            self._sleep(self._control >> 10 & 7)

    @staticmethod
    def register_name(offset: int, *, write: bool) -> str:
        """Return the specification's name of a register."""
        return register_of(Reg, offset, write=write, width=4 if offset >= _TIMER else 2)

    def press_power_button(self) -> bool:
        """Set PWRBTN_STS; return whether the guest has enabled the event, so that anybody takes notice."""
        self._status |= _PWRBTN
        self._update_irq()
        return bool(self._enable & _PWRBTN)

    def on_alarm(self) -> None:
        """Raise the timer's event if it is due: the machine calls this when the alarm fires."""
        self._armed = False
        self._catch_up()
        self._update_irq()

    def state(self) -> dict[str, Any]:
        """Return the registers by their names; the timer as the ns that it has counted."""
        counted_ns = self._catch_up()
        self._update_irq()
        return {
            "PM1_STS": self._status,
            "PM1_EN": self._enable,
            "PM1_CNT": self._control,
            "PM_TMR_ns": counted_ns,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in a state, in which the timer goes on from where it was; see `devices.ports.Stateful`."""
        saved = Saved(state)
        status, enable = saved.bits("PM1_STS", _EVENTS), saved.bits("PM1_EN", _EVENTS)
        control = saved.bits("PM1_CNT", _KEPT | _SCI_EN, always=_SCI_EN)
        counted_ns = saved.number("PM_TMR_ns", _OLDEST_NS)
        saved.end()
        self._status, self._enable, self._control = status, enable, control
        self._epoch_ns = self._now_ns() - counted_ns
        self._toggles = _ticks(counted_ns) >> 31
        self._armed = True  # whether or not: the alarm is set or disarmed now
        self._update_irq()

    def _sleep(self, sleep_type: int) -> None:
        if sleep_type == S5_SLEEP_TYPE:
            self._on_power_off()
        else:
            self._log.once("acpi.sleep_type_unknown", sleep_type, sleep_type=sleep_type)

    def _catch_up(self) -> int:
        """Set TMR_STS if bit 31 has toggled since the last time anybody looked (4.8.2.1); return the timer, in ns."""
        counted_ns = self._now_ns() - self._epoch_ns
        toggles = _ticks(counted_ns) >> 31
        if toggles != self._toggles:
            self._toggles = toggles
            self._status |= _TMR
        return counted_ns

    def _update_irq(self) -> None:
        self._irq.set(bool(self._status & self._enable))
        wanted = bool(self._enable & ~self._status & _TMR)
        if wanted:
            self._alarm.set(self._epoch_ns - (-(self._toggles + 1 << 31) * _NS // PM_TIMER_HZ))
        elif self._armed:
            self._alarm.set(None)
        self._armed = wanted


def _ticks(ns: int) -> int:
    return ns * PM_TIMER_HZ // _NS


def _merge(old: int, new: int, mask: int) -> int:
    return old & ~mask | new & mask

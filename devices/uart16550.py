"""The PC16550D UART (National Semiconductor's data sheet of June 1995; section numbers below are its own).

What this model decides where the data sheet leaves room or real time would be needed:

* Transmission takes no time. A byte written to THR is in the sink before the write returns, so LSR always says THRE
  and TEMT, and an enabled THRE interrupt comes back at once after each write.
* The line never corrupts a byte: no parity or framing error, whatever format or divisor the guest programmed. Break
  Control (LCR bit 6) is kept and has no effect, for nobody at the other end could see it.
* The character timeout (8.11) expires at once. Bytes come from the host in one batch as large as the FIFO has room
  for, so after a batch there is nothing to wait for; a guest that gets fewer bytes than its trigger level would wait
  for ever. Reading a byte still clears the interrupt, and so the line falls before it rises for the rest: a driver
  that takes one byte an interrupt depends on that edge.
* The modem at the other end always reports CTS, DSR and DCD, and no ring.
* OUT2 gates the interrupt, as a PC wires the chip; so does loopback, which holds that pin inactive (8.8). Bochs does
  the same, QEMU and bhyve drive the line ungated. Linux sets OUT2 to have interrupts, but tests the THRE interrupt by
  reading IIR before that: ungated, its handler on another CPU could read IIR first and spoil the test.
* Reading an empty receiver gives 0.

The THRE interrupt is reset by reading IIR or by writing THR (8.6, Table IV). A driver that answers it by writing THR
alone needs the line to fall and rise with each write, or an edge-triggered interrupt controller sees one interrupt
only. A driver that read IIR first has acknowledged it already, and the bytes it writes next, up to a FIFO full,
belong to one interrupt: the first of them raises it, the others change nothing. These others, and all that is written
with the interrupt disabled, may take the FastPath.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Final

from devices.events import EventLog
from devices.ports import NoFastPath, register_of
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.ports import ByteSink, FastPath, IrqLine

__all__ = [
    "FifoControl",
    "InterruptEnable",
    "InterruptId",
    "LineStatus",
    "ModemControl",
    "ModemStatus",
    "Reg",
    "Uart16550",
]


class Reg(IntEnum):
    """Offsets from the port's base (Table II), by their names with DLAB=0."""

    RBR = 0  # RO receiver buffer; RW divisor latch, low byte, with DLAB=1
    THR = 0  # WO transmitter holding
    IER = 1  # RW; divisor latch, high byte, with DLAB=1
    IIR = 2  # RO
    FCR = 2  # WO
    LCR = 3  # RW
    MCR = 4  # RW
    LSR = 5  # RO; "intended for read operations only" (8.4)
    MSR = 6  # RO
    SCR = 7  # RW


class InterruptEnable(IntFlag):
    """IER bits (8.7)."""

    RDA = 1 << 0  # received data available, and the character timeout in FIFO mode
    THRE = 1 << 1  # transmitter holding register empty
    LINE = 1 << 2  # receiver line status
    MODEM = 1 << 3  # modem status


class InterruptId(IntEnum):
    """IIR bits 3 to 0, the highest priority first (8.6, Table IV)."""

    LINE = 0x6
    RDA = 0x4
    TIMEOUT = 0xC
    THRE = 0x2
    MODEM = 0x0
    NONE = 0x1


class FifoControl(IntFlag):
    """FCR bits (8.5). Bit 3 steers pins that nothing is wired to; bits 7 and 6 are the trigger level."""

    ENABLE = 1 << 0
    RESET_RX = 1 << 1
    RESET_TX = 1 << 2


class ModemControl(IntFlag):
    """MCR bits (8.8)."""

    DTR = 1 << 0
    RTS = 1 << 1
    OUT1 = 1 << 2
    OUT2 = 1 << 3
    LOOP = 1 << 4


class LineStatus(IntFlag):
    """LSR bits (8.4)."""

    DR = 1 << 0  # data ready
    OE = 1 << 1  # overrun error; this one and the next three: cleared by reading LSR
    PE = 1 << 2  # parity error
    FE = 1 << 3  # framing error
    BI = 1 << 4  # break interrupt
    THRE = 1 << 5  # transmitter holding register empty
    TEMT = 1 << 6  # transmitter empty
    FIFO_ERROR = 1 << 7  # an error in the FIFO; always 0 in 16450 mode


class ModemStatus(IntFlag):
    """MSR bits (8.9). Bits 3 to 0: cleared by reading MSR."""

    DCTS = 1 << 0
    DDSR = 1 << 1
    TERI = 1 << 2  # the trailing edge of RI only
    DDCD = 1 << 3
    CTS = 1 << 4
    DSR = 1 << 5
    RI = 1 << 6
    DCD = 1 << 7


# Plain ints: an operation on an enum costs 40 times as much as one on these, and a guest polls LSR for every byte.
_NO_INTERRUPT: Final = int(InterruptId.NONE)
_ID_LINE: Final = int(InterruptId.LINE)
_ID_RDA: Final = int(InterruptId.RDA)
_ID_TIMEOUT: Final = int(InterruptId.TIMEOUT)
_ID_THRE: Final = int(InterruptId.THRE)
_ID_MODEM: Final = int(InterruptId.MODEM)
_IER_RDA: Final = int(InterruptEnable.RDA)
_IER_THRE: Final = int(InterruptEnable.THRE)
_IER_LINE: Final = int(InterruptEnable.LINE)
_IER_MODEM: Final = int(InterruptEnable.MODEM)
_DR: Final = int(LineStatus.DR)
_OE: Final = int(LineStatus.OE)
_BI: Final = int(LineStatus.BI)
_FIFO_ERROR: Final = int(LineStatus.FIFO_ERROR)
_TX_IDLE: Final = int(LineStatus.THRE | LineStatus.TEMT)
_DTR: Final = int(ModemControl.DTR)
_RTS: Final = int(ModemControl.RTS)
_OUT1: Final = int(ModemControl.OUT1)
_OUT2: Final = int(ModemControl.OUT2)
_LOOP: Final = int(ModemControl.LOOP)
_GATE: Final = _OUT2 | _LOOP
_FCR_ENABLE: Final = int(FifoControl.ENABLE)
_FCR_RESET_RX: Final = int(FifoControl.RESET_RX)
_TERI: Final = int(ModemStatus.TERI)
_RI: Final = int(ModemStatus.RI)
_LINE_UP: Final = int(ModemStatus.CTS | ModemStatus.DSR | ModemStatus.DCD)
_LSR: Final = int(Reg.LSR)
_THR: Final = int(Reg.THR)

_REGISTERS: Final = 8
_FLOATING: Final = 0xFF  # what a byte lane reads as that no register drives
_DLAB: Final = 0x80  # LCR bit 7 (8.1)
_DELTAS: Final = 0x0F  # MSR bits that a read clears
_FIFO_DEPTH: Final = 16
_TRIGGERS: Final = (1, 4, 8, 14)  # by FCR bits 7 and 6 (8.5)
_FIFOS_ENABLED: Final = 0xC0  # IIR bits 7 and 6 (8.6)
_BREAK: Final = 0x100  # a received zero with its break flag: the error bits that the FIFO keeps beside each byte
_DIVISOR: Final = 12  # 9600 baud, as firmware leaves it; drivers divide by what they find here

# The THRE interrupt's state while IER enables it.
_QUIET: Final = 0  # reset by reading IIR
_RAISED: Final = 1  # pending since the guest enabled it; each write to THR resets it and raises it anew
_MERGED: Final = 2  # pending since the first write after an acknowledgement; further writes add to the same interrupt


class Uart16550:
    """One serial port, eight byte-wide registers.

    Attributes:
        on_room: called when `receive` refused bytes and the guest has drained the receiver since, with the device's
            lock held; it may call `receive` from within. None: nobody is told.
    """

    def __init__(
        self, *, irq: IrqLine, sink: ByteSink, fast: FastPath | None = None, log: EventLog | None = None
    ) -> None:
        """Power up.

        Args:
            irq: the port's interrupt line.
            sink: where transmitted bytes go, in order.
            fast: the run loop's short cuts for this device's offsets; what they divert must reach the same sink.
            log: where the guest's mistakes are noted, each once.
        """
        self.on_room: Callable[[], None] | None = None
        self._irq = irq
        self._sink = sink
        self._fast: FastPath = NoFastPath() if fast is None else fast
        self._log = EventLog(device="uart") if log is None else log
        self._level: bool | None = False
        self._published: int | None = None
        self._diverted: bool | None = False
        self._refused = False
        self._scratch = 0
        self._divisor_low = _DIVISOR & 0xFF
        self._divisor_high = _DIVISOR >> 8
        self._build_tables()
        self.reset()

    def _build_tables(self) -> None:
        """Lay out the registers as Table II does: what each offset reads and writes, with DLAB=0 and with DLAB=1."""
        self._reads = (
            self._read_rbr,
            lambda: self._ier,
            self._read_iir,
            lambda: self._lcr,
            lambda: self._mcr,
            self._read_lsr,
            self._read_msr,
            lambda: self._scratch,
        )
        self._writes = (
            self._write_thr,
            self._write_ier,
            self._write_fcr,
            self._write_lcr,
            self._write_mcr,
            self._write_lsr,
            self._write_msr,
            self._write_scratch,
        )
        self._latch_reads = (lambda: self._divisor_low, lambda: self._divisor_high, *self._reads[2:])
        self._latch_writes = (self._write_divisor_low, self._write_divisor_high, *self._writes[2:])

    def reset(self) -> None:
        """Do what the Master Reset pin does (Table I); the scratchpad and the divisor keep their values."""
        self._ier = 0
        self._lcr = 0
        self._mcr = 0
        self._msr = _LINE_UP
        self._errors = 0
        self._thre = _QUIET
        self._rx: list[int] = []
        self._hidden_breaks = 0
        self._expired = True
        self._set_mode(0)
        self._active_reads: tuple[Callable[[], int], ...] = self._reads
        self._active_writes: tuple[Callable[[int], None], ...] = self._writes
        self._changed()

    # --- the bus's side --------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return the register at `offset`; a wider access reads the registers that follow, as an ISA bridge does."""
        if size == 1:
            return self._active_reads[offset & 7]()
        value = 0
        for lane in range(size):
            register = offset + lane
            byte = self._active_reads[register]() if register < _REGISTERS else _FLOATING
            value |= byte << 8 * lane
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the register at `offset`; a wider access writes the registers that follow, as an ISA bridge does."""
        if size == 1:
            self._active_writes[offset & 7](value)
            return
        for lane in range(min(size, _REGISTERS - offset)):
            self._active_writes[offset + lane](value >> 8 * lane & 0xFF)

    @staticmethod
    def register_name(offset: int, *, write: bool) -> str:
        """Return the data sheet's name of a register, with DLAB=0."""
        return register_of(Reg, offset, write=write)

    # --- saved and loaded ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the registers by their names.

        LSR has only the errors that a read clears, FCR what its writes have come to. RBR is what was received and not
        read, 0x100 a break whose error has not shown. THRE is that interrupt's state, `refused`: `on_room` is due.
        """
        return {
            "IER": self._ier,
            "FCR": _FCR_ENABLE | _TRIGGERS.index(self._trigger) << 6 if self._fifos else 0,
            "LCR": self._lcr,
            "MCR": self._mcr,
            "LSR": self._errors,
            "MSR": self._msr,
            "SCR": self._scratch,
            "DLL": self._divisor_low,
            "DLM": self._divisor_high,
            "RBR": list(self._rx),
            "THRE": self._thre,
            "refused": self._refused,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in a state; see `devices.ports.Stateful`."""
        saved = Saved(state)
        fcr = saved.bits("FCR", 0xC0 | _FCR_ENABLE)
        registers = [saved.number(name, 0xFF) for name in ("LCR", "MSR", "SCR", "DLL", "DLM")]
        ier, mcr, errors = saved.bits("IER", 0x0F), saved.bits("MCR", 0x1F), saved.bits("LSR", _OE | _BI)
        received = saved.numbers("RBR", _FIFO_DEPTH if fcr else 1, _BREAK)
        thre, refused = saved.number("THRE", _MERGED), saved.flag("refused")
        saved.end()
        if received[:1] == [_BREAK] or (fcr and not fcr & _FCR_ENABLE):
            raise ValueError("a break at the top of the FIFO has shown; a trigger level needs the FIFOs")
        self._set_lcr(registers[0])
        self._msr, self._scratch, self._divisor_low, self._divisor_high = registers[1:]
        self._ier, self._mcr, self._errors = ier, mcr, errors
        self._set_mode(fcr)
        self._rx, self._hidden_breaks = received, received.count(_BREAK)
        self._thre, self._refused = thre, refused
        self._published, self._diverted, self._level = -1, None, None  # whatever they are: tell them
        self._bring_up_to_date()

    # --- the line's side -------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> int:
        """Take bytes from the line, as many as there is room for: none in loopback, which disconnects it (8.8).

        Returns:
            How many bytes were taken. Offer the rest again after `on_room`.
        """
        room = 0 if self._mcr & _LOOP else self._depth - len(self._rx)
        taken = data[:room]
        if len(taken) < len(data):
            self._refused = True
        if taken:
            self._rx.extend(taken)
            self._changed()
        return len(taken)

    @property
    def listening(self) -> bool:
        """Whether the guest has asked for interrupts on received data: a driver that is open has."""
        return bool(self._ier & _IER_RDA)

    def send_break(self) -> None:
        """Hold the line at a break for one character: a zero byte with the BI error (8.4 bit 4)."""
        if not self._mcr & _LOOP:
            self._push(_BREAK)
            self._changed()

    # --- what follows from the state -------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Bring everything that follows from the registers up to date, then whoever waits for room."""
        self._bring_up_to_date()
        if self._refused and not self._rx and not self._mcr & _LOOP:
            self._refused = False
            if self.on_room is not None:
                self.on_room()

    def _bring_up_to_date(self) -> None:
        """Bring LSR, the short cuts and the interrupt line up to date, in this order.

        The short cuts come before the interrupt: its handler must not find the LSR of before.
        """
        lsr = _TX_IDLE | self._errors
        if self._rx:
            lsr |= _DR
        if self._fifos and (self._hidden_breaks or self._errors & _BI):
            lsr |= _FIFO_ERROR
        self._lsr = lsr
        self._publish()
        self._update_irq()

    def _publish(self) -> None:
        """Offer the short cuts that change nothing: LSR without errors to clear, THR without an interrupt to move."""
        lsr = None if self._errors else self._lsr
        if lsr != self._published:
            self._published = lsr
            self._fast.publish(_LSR, lsr)
        divert = not (self._lcr & _DLAB or self._mcr & _LOOP) and (not self._ier & _IER_THRE or self._thre == _MERGED)
        if divert != self._diverted:
            self._diverted = divert
            self._fast.divert(_THR, divert)

    def _update_irq(self) -> None:
        """Drive the line: high while an enabled cause is pending and OUT2 connects it."""
        level = self._mcr & _GATE == _OUT2 and self._cause() != _NO_INTERRUPT
        if level != self._level:
            self._level = level
            self._irq.set(level)

    def _cause(self) -> int:
        """Return the pending enabled interrupt of highest priority, as IIR encodes it (Table IV)."""
        ier = self._ier
        if ier & _IER_LINE and self._errors:
            return _ID_LINE
        if ier & _IER_RDA and self._rx:
            if len(self._rx) >= self._trigger:
                return _ID_RDA
            if self._expired:
                return _ID_TIMEOUT
        if ier & _IER_THRE and self._thre != _QUIET:
            return _ID_THRE
        if ier & _IER_MODEM and self._msr & _DELTAS:
            return _ID_MODEM
        return _NO_INTERRUPT

    # --- the receiver ----------------------------------------------------------------------------------------------

    def _push(self, entry: int) -> None:
        """Shift in one character; a full FIFO loses it, a full 16450 loses the one before (8.4 bit 1)."""
        if len(self._rx) >= self._depth:
            self._errors |= _OE
            if self._fifos:
                return
            self._rx.clear()
        self._rx.append(entry)
        self._hidden_breaks += entry == _BREAK
        self._reveal()

    def _reveal(self) -> None:
        """Show the error of the character at the top of the FIFO (8.4 bit 4)."""
        if self._rx and self._rx[0] == _BREAK:
            self._rx[0] = 0
            self._hidden_breaks -= 1
            self._errors |= _BI

    def _clear_rx(self) -> None:
        """Drop what was received, with the errors that belong to it; an overrun belongs to no character."""
        self._rx.clear()
        self._hidden_breaks = 0
        self._errors &= _OE

    def _set_mode(self, fcr: int) -> None:
        enabled = fcr & _FCR_ENABLE
        self._fifos = _FIFOS_ENABLED if enabled else 0
        self._depth = _FIFO_DEPTH if enabled else 1
        self._trigger = _TRIGGERS[fcr >> 6] if enabled else 1

    # --- reads -----------------------------------------------------------------------------------------------------

    def _read_rbr(self) -> int:
        if not self._rx:
            return 0
        value = self._rx.pop(0)
        self._reveal()
        # The read cleared the timeout (8.11 C), which expires again at once: let the line fall in between.
        self._expired = False
        self._update_irq()
        self._expired = True
        self._changed()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == _ID_THRE:
            self._thre = _QUIET
            self._changed()
        return cause | self._fifos

    def _read_lsr(self) -> int:
        lsr = self._lsr
        if self._errors:
            self._errors = 0
            self._changed()
        return lsr

    def _read_msr(self) -> int:
        msr = self._msr
        if msr & _DELTAS:
            self._msr = msr & ~_DELTAS
            self._changed()
        return msr

    # --- writes ----------------------------------------------------------------------------------------------------

    def _write_thr(self, value: int) -> None:
        looped = self._mcr & _LOOP
        if looped:
            self._push(value)
        else:
            self._sink.write(bytes((value,)))
        if self._ier & _IER_THRE and self._thre != _MERGED:
            if self._thre == _RAISED:
                # Writing THR resets the interrupt and the empty THR raises it again: let the line fall in between.
                self._thre = _QUIET
                self._update_irq()
                self._thre = _RAISED
            else:
                self._thre = _MERGED
            self._changed()
        elif looped:
            self._changed()

    def _write_ier(self, value: int) -> None:
        if value & ~self._ier & _IER_THRE:
            self._thre = _RAISED  # THR is empty, always
        self._ier = value & 0x0F
        self._changed()

    def _write_fcr(self, value: int) -> None:
        """Set the mode; the other bits count only together with the enable bit, and a change clears (8.5 bit 0)."""
        if value & _FCR_ENABLE:
            if value & _FCR_RESET_RX or not self._fifos:
                self._clear_rx()
        elif self._fifos:
            self._clear_rx()
        self._set_mode(value)
        self._changed()

    def _write_lcr(self, value: int) -> None:
        self._set_lcr(value)
        self._changed()

    def _set_lcr(self, value: int) -> None:
        self._lcr = value
        latch = value & _DLAB
        self._active_reads = self._latch_reads if latch else self._reads
        self._active_writes = self._latch_writes if latch else self._writes

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F
        if value & _LOOP:
            # Loopback wires RTS to CTS, DTR to DSR, OUT1 to RI and OUT2 to DCD (8.9 bits 4 to 7).
            looped = (value & _RTS) << 3 | (value & _DTR) << 5 | (value & (_OUT1 | _OUT2)) << 4
            self._set_modem_inputs(looped)
        else:
            self._set_modem_inputs(_LINE_UP)
        self._changed()

    def _set_modem_inputs(self, inputs: int) -> None:
        """Change MSR bits 7 to 4 and note in bits 3 to 0 what changed; of RI, only its end (8.9)."""
        before = self._msr
        deltas = (before ^ inputs) >> 4 & ~_TERI
        if before & ~inputs & _RI:
            deltas |= _TERI
        self._msr = inputs | (before | deltas) & _DELTAS

    def _write_lsr(self, _value: int) -> None:
        self._log.once("uart.read_only_register", "lsr", register="lsr")

    def _write_msr(self, _value: int) -> None:
        self._log.once("uart.read_only_register", "msr", register="msr")

    def _write_scratch(self, value: int) -> None:
        self._scratch = value

    def _write_divisor_low(self, value: int) -> None:
        self._divisor_low = value

    def _write_divisor_high(self, value: int) -> None:
        self._divisor_high = value

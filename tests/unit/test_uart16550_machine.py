"""The UART against a second, plainer model of the data sheet, under any traffic; and with its short cuts taken.

Three ports see the same traffic: `Reference` below, a UART without short cuts, and a UART whose short cuts a run loop
takes. They must read the same, print the same and drive the same interrupt line.
"""

from __future__ import annotations

from fakes import FakeFastPath
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from structlog.testing import capture_logs
from uart_port import BI, DLAB, DR, FIFO_ERROR, IDLE, IER, IIR, LCR, LOOP, LSR, MCR, MSR, OE, OUT2, RBR, SCR, THR, Port

BREAK = "break"


class Reference:
    """The data sheet retold: facts in, everything else worked out anew at each question.

    Attributes:
        fifo: received characters, BREAK for a break whose error has not shown yet.
        errors: LSR bits 1 to 4 that have shown and have not been read.
        thr_emptied: THR has become empty since the interrupt was last reset.
        host: bytes that wait for the line.
    """

    def __init__(self) -> None:
        self.ier = self.lcr = self.mcr = self.scratch = self.errors = self.deltas = 0
        self.divisor = [12, 0]
        self.modem = 0xB0
        self.fifo_mode = False
        self.trigger = 1
        self.fifo: list[int | str] = []
        self.thr_emptied = False
        self.host: list[int] = []
        self.host_was_refused = False
        self.sent = bytearray()

    def pending(self) -> list[int]:
        """Return the IIR codes of all enabled causes, the highest priority first (Table IV)."""
        enabled = [bool(self.ier & 1 << bit) for bit in range(4)]
        waiting = len(self.fifo)
        causes = [
            (0x6, enabled[2] and self.errors != 0),
            (0x4, enabled[0] and waiting >= self.trigger),
            (0xC, enabled[0] and 0 < waiting < self.trigger),
            (0x2, enabled[1] and self.thr_emptied),
            (0x0, enabled[3] and self.deltas != 0),
        ]
        return [code for code, active in causes if active]

    def line(self) -> bool:
        return bool(self.pending()) and bool(self.mcr & OUT2) and not self.mcr & LOOP

    def lsr(self) -> int:
        value = IDLE | self.errors
        if self.fifo:
            value |= DR
        if self.fifo_mode and (BREAK in self.fifo or self.errors & BI):
            value |= FIFO_ERROR
        return value

    def settle(self) -> None:
        """Show the error at the top of the FIFO, and let the host fill an empty one."""
        if self.fifo and self.fifo[0] == BREAK:
            self.fifo[0] = 0
            self.errors |= BI
        if self.host_was_refused and not self.fifo and not self.mcr & LOOP:
            self.host_was_refused = False
            self.take_from_host()

    def take_from_host(self) -> None:
        room = 0 if self.mcr & LOOP else (16 if self.fifo_mode else 1) - len(self.fifo)
        self.fifo += self.host[:room]
        del self.host[:room]
        self.host_was_refused |= bool(self.host)

    def character(self, entry: int | str) -> None:
        if len(self.fifo) == (16 if self.fifo_mode else 1):
            self.errors |= OE
            if self.fifo_mode:
                return
            self.fifo = []
        self.fifo.append(entry)

    def clear(self) -> None:
        self.fifo = []
        self.errors &= OE

    def read(self, register: int) -> int:
        if self.lcr & DLAB and register < 2:
            return self.divisor[register]
        if register == RBR:
            entry = self.fifo.pop(0) if self.fifo else 0
            assert isinstance(entry, int)
            return entry
        if register == IIR:
            code = [*self.pending(), 0x1][0]
            if code == 0x2:
                self.thr_emptied = False
            return code | (0xC0 if self.fifo_mode else 0)
        if register == LSR:
            value, self.errors = self.lsr(), 0
            return value
        if register == MSR:
            value, self.deltas = self.modem | self.deltas, 0
            return value
        return {IER: self.ier, LCR: self.lcr, MCR: self.mcr, SCR: self.scratch}[register]

    def write(self, register: int, value: int) -> None:
        if self.lcr & DLAB and register < 2:
            self.divisor[register] = value
        elif register == THR:
            if self.mcr & LOOP:
                self.character(value)
            else:
                self.sent.append(value)
            self.thr_emptied = bool(self.ier & 2)
        elif register == IER:
            # Enabling the interrupt raises it, for THR is empty; as long as it is disabled nothing is remembered.
            self.thr_emptied = bool(value & 2) and (self.thr_emptied or not self.ier & 2)
            self.ier = value & 0x0F
        elif register == IIR:
            self.write_fcr(value)
        elif register == LCR:
            self.lcr = value
        elif register == MCR:
            self.write_mcr(value)
        elif register == SCR:
            self.scratch = value

    def write_fcr(self, value: int) -> None:
        if bool(value & 1) != self.fifo_mode or value & 3 == 3:
            self.clear()
        self.fifo_mode = bool(value & 1)
        self.trigger = {0: 1, 1: 4, 2: 8, 3: 14}[value >> 6] if self.fifo_mode else 1

    def write_mcr(self, value: int) -> None:
        self.mcr = value & 0x1F
        dtr, rts, out1, out2, loop = (bool(value & 1 << bit) for bit in range(5))
        cts, dsr, ring, carrier = (rts, dtr, out1, out2) if loop else (True, True, False, True)
        before, self.modem = self.modem, cts << 4 | dsr << 5 | ring << 6 | carrier << 7
        for bit in range(4):
            was, now = before >> 4 + bit & 1, self.modem >> 4 + bit & 1
            if was != now and not (bit == 2 and now):
                self.deltas |= 1 << bit

    def reset(self) -> None:
        scratch, divisor, host, sent = self.scratch, self.divisor, self.host, self.sent
        refused = self.host_was_refused
        self.__init__()  # type: ignore[misc] # a power-up, but for what Table I does not list
        self.scratch, self.divisor, self.host, self.sent = scratch, divisor, host, sent
        self.host_was_refused = refused


class RunLoopPort(Port):
    """A port whose guest runs on a run loop that takes every short cut it is offered."""

    def __init__(self) -> None:
        self.fast = FakeFastPath()
        super().__init__(fast=self.fast)

    def inb(self, register: int) -> int:
        shadow = self.fast.published.get(register)
        return super().inb(register) if shadow is None else shadow

    def outb(self, register: int, value: int) -> None:
        if register in self.fast.diverted:
            self.sink.write(bytes([value]))
        else:
            super().outb(register, value)


class Host:
    """The host's side of a port's line: keeps what the port has no room for."""

    def __init__(self, port: Port) -> None:
        self.waiting = bytearray()
        self.port = port
        port.uart.on_room = self.feed

    def feed(self) -> None:
        del self.waiting[: self.port.uart.receive(bytes(self.waiting))]


BYTES = st.integers(0, 0xFF)
FCR_VALUES = st.sampled_from([0x00, 0x01, 0x03, 0x07, 0x41, 0x81, 0xC1, 0xC3, 0xC0])
MCR_VALUES = st.sampled_from([0x08, 0x08, 0x08, 0x0B, 0x00, 0x10, 0x1F, 0x1A, 0x14])


class Traffic(RuleBasedStateMachine):
    """Any order of register accesses, received bytes, breaks and resets."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = Reference()
        self.plain = Port()
        self.quick = RunLoopPort()
        self.ports: list[Port] = [self.plain, self.quick]
        self.hosts = [Host(port) for port in self.ports]

    @initialize(fcr=FCR_VALUES, mcr=MCR_VALUES, ier=st.integers(0, 0x0F))
    def set_up(self, fcr: int, mcr: int, ier: int) -> None:
        for register, value in [(IIR, fcr), (MCR, mcr), (IER, ier)]:
            self.write(register, value)

    @rule(register=st.sampled_from([RBR, RBR, IIR, IIR, LSR, MSR, IER, LCR, MCR, SCR]))
    def read(self, register: int) -> None:
        expected = self.reference.read(register)
        self.reference.settle()
        assert [port.inb(register) for port in self.ports] == [expected] * 2

    @rule(register=st.integers(0, 7), value=BYTES)
    def write(self, register: int, value: int) -> None:
        self.reference.write(register, value)
        self.reference.settle()
        with capture_logs():
            for port in self.ports:
                port.outb(register, value)

    @rule(value=st.integers(0, 0x0F))
    def enable_interrupts(self, value: int) -> None:
        self.write(LCR, 0x03)
        self.write(IER, value)

    @rule(value=FCR_VALUES)
    def set_fifos(self, value: int) -> None:
        self.write(IIR, value)

    @rule(value=MCR_VALUES)
    def set_modem(self, value: int) -> None:
        self.write(MCR, value)

    @rule(data=st.binary(min_size=1, max_size=20))
    def print_in_a_burst(self, data: bytes) -> None:
        for byte in data:
            self.write(THR, byte)

    @rule()
    def handle_interrupts(self) -> None:
        """Do what Linux's handler does: ask IIR until nothing is pending."""
        self.write(LCR, 0x03)
        for _ in range(10_000):
            if not self.reference.pending():
                break
            cause = self.reference.pending()[0]
            self.read(IIR)
            if cause in {0x4, 0xC}:
                self.read(RBR)
            elif cause == 0x6:
                self.read(LSR)
            elif cause == 0x0:
                self.read(MSR)
            self.check_line()
        assert not self.reference.pending()

    @rule(offset=st.integers(0, 7), size=st.sampled_from([2, 4]))
    def read_wide(self, offset: int, size: int) -> None:
        expected = 0
        for lane in range(size):
            byte = 0xFF
            if offset + lane < 8:
                byte = self.reference.read(offset + lane)
                self.reference.settle()
            expected |= byte << 8 * lane
        assert [port.uart.read(offset, size) for port in self.ports] == [expected] * 2

    @rule(offset=st.integers(0, 7), data=st.binary(min_size=4, max_size=4), size=st.sampled_from([2, 4]))
    def write_wide(self, offset: int, data: bytes, size: int) -> None:
        for lane in range(min(size, 8 - offset)):
            self.reference.write(offset + lane, data[lane])
            self.reference.settle()
        with capture_logs():
            for port in self.ports:
                port.uart.write(offset, size, int.from_bytes(data[:size], "little"))

    @rule(data=st.binary(min_size=1, max_size=40))
    def type_at_the_console(self, data: bytes) -> None:
        self.reference.host += data
        self.reference.take_from_host()
        for host in self.hosts:
            host.waiting += data
            host.feed()

    @rule()
    def break_the_line(self) -> None:
        if not self.reference.mcr & LOOP:
            self.reference.character(BREAK)
        self.reference.settle()
        for port in self.ports:
            port.uart.send_break()

    @rule(now=st.sampled_from([False] * 7 + [True]))
    def reset(self, *, now: bool) -> None:
        if not now:
            return
        self.reference.reset()
        self.reference.settle()
        for port in self.ports:
            port.uart.reset()

    @invariant()
    def check_line(self) -> None:
        """The line is up exactly while an enabled cause is pending and OUT2 connects it."""
        assert [port.irq.level for port in self.ports] == [self.reference.line()] * 2

    @invariant()
    def a_short_cut_changes_no_edge(self) -> None:
        assert self.quick.irq.history == self.plain.irq.history

    @invariant()
    def no_byte_is_lost_or_out_of_order(self) -> None:
        assert [port.sink.data for port in self.ports] == [self.reference.sent] * 2
        assert [host.waiting for host in self.hosts] == [bytearray(self.reference.host)] * 2

    @invariant()
    def only_what_has_no_side_effect_is_published(self) -> None:
        lsr = None if self.reference.errors else self.reference.lsr()
        assert self.quick.fast.published.get(LSR) == lsr
        assert not self.quick.fast.published.keys() - {LSR}

    @invariant()
    def thr_is_diverted_whenever_no_interrupt_is_in_use(self) -> None:
        """Printing without the THRE interrupt, as a console does, must never need the model."""
        direct = not self.reference.lcr & DLAB and not self.reference.mcr & LOOP
        if not direct:
            assert self.quick.fast.diverted == set()
        elif not self.reference.ier & 2:
            assert self.quick.fast.diverted == {THR}


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=80, stateful_step_count=50)

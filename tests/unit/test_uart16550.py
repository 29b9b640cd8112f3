"""The UART's registers, transmitter and modem lines, by the sections of the PC16550D data sheet (June 1995)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import FakeIrq, FakeSink
from structlog.testing import capture_logs
from uart_port import (
    CTS,
    DCD,
    DCTS,
    DDCD,
    DDSR,
    DLAB,
    DLL,
    DLM,
    DR,
    DSR,
    DTR,
    EDSSI,
    ELSI,
    ERBFI,
    ETBEI,
    FCR,
    FIFO_ERROR,
    FIFOS,
    IDLE,
    IER,
    IIR,
    LCR,
    LOOP,
    LSR,
    MCR,
    MODEM,
    MSR,
    NONE,
    OE,
    OUT1,
    OUT2,
    RBR,
    RDA,
    RI,
    RTS,
    SCR,
    TERI,
    THR,
    THRE_ID,
    Port,
)

from devices.uart16550 import Uart16550

if TYPE_CHECKING:
    from devices.ports import Device


@pytest.fixture
def port() -> Port:
    """A port whose interrupt is connected, in 16450 mode."""
    port = Port()
    port.outb(MCR, OUT2)
    return port


@pytest.fixture
def fifo(port: Port) -> Port:
    """The same in FIFO mode with the trigger level at one byte."""
    port.outb(FCR, 0x01)
    return port


# --- reset (Table I) --------------------------------------------------------------------------------------------------


def check_reset_state(port: Port) -> None:
    assert [port.inb(register) for register in (IER, IIR, LCR, MCR, LSR)] == [0x00, 0x01, 0x00, 0x00, 0x60]
    assert port.inb(MSR) & 0x0F == 0
    assert not port.line()


def test_it_is_a_device() -> None:
    device: Device = Uart16550(irq=FakeIrq(), sink=FakeSink())
    assert device.read(LSR, 1) == IDLE


def test_registers_after_power_on() -> None:
    check_reset_state(Port())


def test_master_reset() -> None:
    """Table I, and what it does not list: the scratchpad and the divisor."""
    port = Port()
    for register, value in [(SCR, 0x5A), (LCR, 0x83), (DLL, 0x01), (DLM, 0x02), (LCR, 0x03), (FCR, 0xC1), (IER, 0x0F)]:
        port.outb(register, value)
    port.outb(MCR, LOOP | RTS)
    for value in range(20):
        port.outb(THR, value)
    port.outb(MCR, OUT2)
    assert port.line()
    port.outb(LCR, 0x83)
    port.uart.reset()
    check_reset_state(port)
    assert port.read_all() == b""
    assert port.inb(SCR) == 0x5A
    port.outb(LCR, DLAB)
    assert (port.inb(DLL), port.inb(DLM)) == (0x01, 0x02)


def test_modem_reports_a_terminal_that_is_there(port: Port) -> None:
    assert port.inb(MSR) == CTS | DSR | DCD


def test_divisor_is_never_zero_by_itself(port: Port) -> None:
    """A kernel told only "console on this port" divides by the divisor that firmware left."""
    port.outb(LCR, DLAB)
    assert port.inb(DLL) | port.inb(DLM) << 8 == 12


# --- registers that keep what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0x00, 0x55, 0xAA, 0xFF])
def test_scratchpad(port: Port, value: int) -> None:
    """8.10."""
    port.outb(SCR, value)
    assert port.inb(SCR) == value


@pytest.mark.parametrize(("register", "mask"), [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F)])
def test_writable_bits(port: Port, register: int, mask: int) -> None:
    """8.7 bits 4 to 7 and 8.8 bits 5 to 7 are always zero; LCR is all there (8.1)."""
    port.outb(register, 0xFF)
    assert port.inb(register) == mask


def test_divisor_latch_access(port: Port) -> None:
    """8.1 bit 7: with DLAB, offsets 0 and 1 are the divisor and nothing is sent, received or enabled."""
    port.outb(IER, ERBFI)
    port.uart.receive(b"x")
    port.outb(LCR, DLAB | 0x03)
    port.outb(DLL, 0x34)
    port.outb(DLM, 0x12)
    assert (port.inb(DLL), port.inb(DLM)) == (0x34, 0x12)
    assert port.sink.data == b""
    port.outb(LCR, 0x03)
    assert port.inb(IER) == ERBFI
    assert port.inb(RBR) == ord("x")


@pytest.mark.parametrize("register", [LSR, MSR])
def test_status_registers_cannot_be_written(port: Port, register: int) -> None:
    """8.4, note: "intended for read operations only". It is noted, once."""
    before = port.inb(register)
    with capture_logs() as events:
        for value in (0xFF, 0x00, 0x9F):
            port.outb(register, value)
    assert port.inb(register) == before
    name = "lsr" if register == LSR else "msr"
    assert [(event["event"], event["register"]) for event in events] == [("uart.read_only_register", name)]


# --- transmission -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_out_at_once_and_in_order(port: Port) -> None:
    for byte in b"hello\0\xff":
        port.outb(THR, byte)
        assert port.inb(LSR) == IDLE
    assert port.sink.data == b"hello\0\xff"


def test_line_format_and_break_control_do_not_touch_the_bytes(port: Port) -> None:
    """Nobody at the other end could tell: five-bit words, parity, break."""
    port.outb(LCR, 0x7C)
    port.outb(THR, 0xFF)
    assert port.sink.data == b"\xff"


def test_a_thousand_bytes_keep_their_order_in_fifo_mode(fifo: Port) -> None:
    data = bytes(value * 7 & 0xFF for value in range(1000))
    for byte in data:
        fifo.outb(THR, byte)
    assert fifo.sink.data == data


# --- the THRE interrupt -----------------------------------------------------------------------------------------------


def test_enabling_thre_on_an_idle_transmitter_interrupts(port: Port) -> None:
    port.outb(IER, ETBEI)
    assert port.line()
    assert port.cause() == THRE_ID


def test_enabling_thre_beside_others_interrupts_too(port: Port) -> None:
    port.outb(IER, ERBFI | ELSI)
    assert port.cause() == NONE
    port.outb(IER, ERBFI | ELSI | ETBEI)
    assert port.line()
    assert port.cause() == THRE_ID


def test_reading_iir_resets_thre(port: Port) -> None:
    """Table IV."""
    port.outb(IER, ETBEI)
    assert port.cause() == THRE_ID
    assert not port.line()
    assert port.cause() == NONE


def test_thre_comes_back_when_it_is_enabled_again(port: Port) -> None:
    """Linux takes a UART that does not do this for a broken one."""
    for _ in range(2):
        port.outb(IER, ETBEI)
        assert port.cause() == THRE_ID
        port.outb(IER, 0)
        assert port.cause() == NONE


def test_writing_ier_again_is_no_new_cause(port: Port) -> None:
    port.outb(IER, ETBEI)
    assert port.cause() == THRE_ID
    port.outb(IER, ETBEI | ERBFI)
    assert port.cause() == NONE


def test_thre_comes_back_after_each_burst(fifo: Port) -> None:
    """8.11, XMIT A: reset by reading IIR or by writing; 1 to 16 bytes may be written for one interrupt."""
    fifo.outb(IER, ETBEI)
    for burst in range(1, 4):
        assert fifo.irq.edges == burst
        assert fifo.cause() == THRE_ID
        assert not fifo.line()
        for byte in b"sixteen bytes it":
            fifo.outb(THR, byte)
        assert fifo.line()
    assert fifo.sink.data == b"sixteen bytes it" * 3


def test_a_driver_that_answers_thre_by_writing_alone_gets_an_edge_for_each_byte(port: Port) -> None:
    """Table IV: writing THR resets the interrupt too, and an edge-triggered controller must see it come back."""
    port.outb(IER, ETBEI)
    for count in range(1, 5):
        assert port.line()
        assert port.irq.edges == count
        port.outb(THR, 0x40 + count)


def test_iir_read_for_a_higher_cause_does_not_reset_thre(port: Port) -> None:
    """Table IV: "if source of interrupt"."""
    port.outb(IER, ETBEI | ERBFI)
    port.uart.receive(b"x")
    assert port.cause() == RDA
    assert port.inb(RBR) == ord("x")
    assert port.line()
    assert port.cause() == THRE_ID


def test_disabling_thre_takes_it_back(port: Port) -> None:
    port.outb(IER, ETBEI)
    port.outb(IER, 0)
    assert not port.line()
    port.outb(THR, 0x41)
    assert not port.line()
    assert port.cause() == NONE


# --- FCR --------------------------------------------------------------------------------------------------------------


def test_iir_tells_the_mode(port: Port) -> None:
    """8.6 bits 6 and 7; bits 4 and 5 are always 0."""
    assert port.inb(IIR) == NONE
    port.outb(FCR, 0xF9)
    assert port.inb(IIR) == FIFOS | NONE
    port.outb(FCR, 0x00)
    assert port.inb(IIR) == NONE


@pytest.mark.parametrize(("before", "after"), [(0x00, 0x01), (0x01, 0x00), (0x01, 0xC0)])
def test_a_change_of_mode_clears_the_receiver(port: Port, before: int, after: int) -> None:
    """8.5 bit 0."""
    port.outb(FCR, before)
    port.uart.receive(b"x")
    port.outb(FCR, after)
    assert port.inb(LSR) == IDLE


@pytest.mark.parametrize(("before", "after"), [(0x00, 0x00), (0x00, 0x06), (0x01, 0x01), (0x01, 0xC5)])
def test_no_change_of_mode_keeps_the_receiver(port: Port, before: int, after: int) -> None:
    """8.5: bit 2 resets the transmitter's FIFO only; without bit 0 nothing is programmed."""
    port.outb(FCR, before)
    port.uart.receive(b"x")
    port.outb(FCR, after)
    assert port.read_all() == b"x"


def test_receiver_reset(fifo: Port) -> None:
    """8.5 bit 1: the bytes go, with the errors that belong to them; an overrun is the receiver's own."""
    fifo.outb(IER, ERBFI)
    fifo.uart.send_break()
    fifo.uart.receive(bytes(15))
    fifo.uart.send_break()
    fifo.outb(FCR, 0x03)
    assert not fifo.line()
    assert fifo.inb(LSR) == IDLE | OE
    assert fifo.inb(LSR) == IDLE
    fifo.uart.receive(b"y")
    fifo.uart.send_break()
    assert fifo.inb(LSR) == IDLE | DR | FIFO_ERROR
    fifo.outb(FCR, 0x03)
    assert fifo.inb(LSR) == IDLE


# --- modem and loopback -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(0, 0), (DTR, DSR), (RTS, CTS), (OUT1, RI), (OUT2, DCD), (0x0F, 0xF0), (RTS | OUT2, 0x90)]
)
def test_loopback_wires_outputs_to_inputs(port: Port, outputs: int, inputs: int) -> None:
    """8.9 bits 4 to 7. The last pair is Linux's test for a UART."""
    port.outb(MCR, LOOP | outputs)
    assert port.inb(MSR) & 0xF0 == inputs
    port.outb(MCR, outputs)
    assert port.inb(MSR) & 0xF0 == CTS | DSR | DCD


@pytest.mark.parametrize(
    ("first", "second", "delta"),
    [
        (0, RTS, DCTS),
        (RTS, 0, DCTS),
        (0, DTR, DDSR),
        (DTR, 0, DDSR),
        (0, OUT2, DDCD),
        (OUT2, 0, DDCD),
        (0, OUT1, 0),
        (OUT1, 0, TERI),
        (0x0F, 0x00, 0x0F),
    ],
)
def test_modem_deltas(port: Port, first: int, second: int, delta: int) -> None:
    """8.9 bits 0 to 3: any change, but of RI its end only; cleared by reading."""
    port.outb(MCR, LOOP | first)
    port.inb(MSR)
    port.outb(MCR, LOOP | second)
    assert port.inb(MSR) & 0x0F == delta
    assert port.inb(MSR) & 0x0F == 0


def test_modem_deltas_add_up_until_they_are_read(port: Port) -> None:
    port.outb(MCR, LOOP)
    port.inb(MSR)
    for outputs in (RTS, RTS | DTR):
        port.outb(MCR, LOOP | outputs)
    assert port.inb(MSR) == CTS | DSR | DCTS | DDSR


def test_modem_interrupt(port: Port) -> None:
    """8.9 note and Table IV: reset by reading MSR, the lowest priority."""
    port.outb(MCR, LOOP | RTS)
    port.inb(MSR)
    port.outb(MCR, OUT2)
    port.outb(IER, EDSSI | ETBEI)
    assert port.cause() == THRE_ID
    assert port.line()
    assert port.cause() == MODEM
    assert port.inb(MSR) & 0x0F == DDSR | DDCD
    assert not port.line()
    assert port.cause() == NONE


def test_loopback_receives_what_is_sent(fifo: Port) -> None:
    """8.8 bit 4: nothing leaves, nothing else comes in."""
    fifo.outb(MCR, LOOP)
    for byte in b"abc":
        fifo.outb(THR, byte)
    assert fifo.uart.receive(b"from outside") == 0
    fifo.uart.send_break()
    assert fifo.sink.data == b""
    assert fifo.read_all() == b"abc"
    assert fifo.inb(LSR) == IDLE


def test_loopback_shows_how_deep_the_fifo_is(fifo: Port) -> None:
    """Linux's size_fifo: 256 bytes sent in loopback, 16 come back, the rest is an overrun."""
    fifo.outb(FCR, 0x07)
    fifo.outb(MCR, LOOP)
    for value in range(256):
        fifo.outb(THR, value)
    assert fifo.inb(LSR) & OE
    assert fifo.read_all() == bytes(range(16))


def test_loopback_overrun_in_16450_mode_keeps_the_last(port: Port) -> None:
    """8.4 bit 1."""
    port.outb(MCR, LOOP)
    port.outb(THR, 1)
    assert not port.inb(LSR) & OE
    port.outb(THR, 2)
    assert port.inb(LSR) & OE
    assert port.inb(RBR) == 2


def test_what_waited_out_loopback_comes_when_the_line_is_back(fifo: Port) -> None:
    calls: list[None] = []
    fifo.uart.on_room = lambda: calls.append(None)
    fifo.outb(MCR, LOOP)
    assert fifo.uart.receive(b"x") == 0
    fifo.outb(THR, 0x41)
    fifo.inb(RBR)
    assert calls == []
    fifo.outb(MCR, OUT2)
    assert len(calls) == 1


def test_loopback_interrupts_show_in_iir(fifo: Port) -> None:
    """8.8 bit 4: "the receiver and transmitter interrupts are fully operational"."""
    fifo.outb(MCR, LOOP | OUT2)
    fifo.outb(IER, ERBFI | ETBEI)
    fifo.outb(THR, 0x41)
    assert fifo.cause() == RDA
    fifo.inb(RBR)
    assert fifo.cause() == THRE_ID


@pytest.mark.parametrize(("outputs", "level"), [(0, False), (0x07, False), (OUT2, True), (OUT2 | LOOP, False)])
def test_out2_connects_the_interrupt(port: Port, outputs: int, level: bool) -> None:
    """As a PC is wired; loopback forces the pin inactive (8.8 bit 4). IIR shows the cause all the same."""
    port.outb(MCR, outputs)
    port.inb(MSR)
    port.outb(IER, ETBEI)
    assert port.line() is level
    assert port.cause() == THRE_ID


# --- access widths ----------------------------------------------------------------------------------------------------


def test_a_wide_access_is_several_narrow_ones(port: Port) -> None:
    port.uart.write(SCR - 1, 2, 0x5AFF)
    assert port.inb(SCR) == 0x5A
    port.uart.write(THR, 4, 0x03_01_0F_41)
    assert port.sink.data == b"A"
    assert port.inb(IER) == 0x0F
    assert port.uart.read(LCR, 2) == OUT2 << 8 | 0x03
    assert port.uart.read(MCR, 4) == 0x5A << 24 | (CTS | DSR | DCD) << 16 | IDLE << 8 | OUT2


def test_a_wide_write_takes_the_bank_it_switches_to(port: Port) -> None:
    """One byte after the other, from the low one: LCR is written before what lies above it, after what lies below."""
    port.outb(LCR, DLAB)
    port.uart.write(DLL, 4, 0x03_00_12_34)
    port.uart.write(THR, 1, 0x41)
    assert port.sink.data == b"A"
    port.outb(LCR, DLAB)
    assert port.uart.read(DLL, 2) == 0x1234


def test_a_wide_access_ends_with_the_last_register(port: Port) -> None:
    port.uart.write(SCR, 4, 0x4141_4142)
    assert port.uart.read(SCR, 4) == 0xFFFF_FF42
    assert port.sink.data == b""


def test_only_three_address_lines_are_decoded(port: Port) -> None:
    port.outb(8 + SCR, 0x77)
    assert port.inb(8 + SCR) == port.inb(SCR) == 0x77

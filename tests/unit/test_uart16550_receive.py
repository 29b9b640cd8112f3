"""The UART's receiver, by the sections of the PC16550D data sheet (June 1995), and whole drivers of it."""

from __future__ import annotations

import pytest
from fakes import FakeSink
from uart_port import (
    BI,
    DR,
    ELSI,
    ERBFI,
    ETBEI,
    FCR,
    FIFO_ERROR,
    IDLE,
    IER,
    IIR,
    LCR,
    LINE,
    LOOP,
    LSR,
    MCR,
    MSR,
    NONE,
    OE,
    OUT2,
    RBR,
    RDA,
    RTS,
    THR,
    THRE_ID,
    TIMEOUT,
    EdgeTriggered,
    Port,
)

from devices.uart16550 import Uart16550


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


# --- reception --------------------------------------------------------------------------------------------------------


def test_receive_in_16450_mode_holds_one_byte(port: Port) -> None:
    assert port.uart.receive(b"abc") == 1
    assert port.inb(LSR) == IDLE | DR
    assert port.inb(RBR) == ord("a")
    assert port.inb(LSR) == IDLE


def test_receive_in_fifo_mode_holds_sixteen(fifo: Port) -> None:
    assert fifo.uart.receive(bytes(range(20))) == 16
    assert fifo.uart.receive(b"more") == 0
    assert fifo.inb(RBR) == 0
    assert fifo.uart.receive(b"more") == 1
    assert fifo.read_all() == bytes(range(1, 16)) + b"m"


def test_nothing_received_is_nothing(fifo: Port) -> None:
    assert fifo.uart.receive(b"") == 0
    assert fifo.inb(LSR) == IDLE
    assert fifo.inb(RBR) == 0
    assert fifo.inb(LSR) == IDLE


def test_refusal_is_no_overrun(fifo: Port) -> None:
    """The host keeps what does not fit: a line with flow control loses nothing."""
    fifo.uart.receive(bytes(100))
    assert not fifo.inb(LSR) & OE


def test_room_is_announced_once_the_guest_has_drained_it(fifo: Port) -> None:
    waiting = bytearray(range(40))
    calls: list[int] = []

    def on_room() -> None:
        calls.append(len(waiting))
        del waiting[: fifo.uart.receive(bytes(waiting))]

    fifo.uart.on_room = on_room
    on_room()
    assert fifo.read_all() == bytes(range(40))
    assert calls == [40, 24, 8]


def test_nobody_is_called_for_room_that_nobody_asked_for(fifo: Port) -> None:
    calls: list[None] = []
    fifo.uart.on_room = lambda: calls.append(None)
    fifo.uart.receive(b"fits")
    fifo.read_all()
    assert calls == []


def test_room_without_a_listener(fifo: Port) -> None:
    fifo.uart.receive(bytes(17))
    fifo.read_all()
    assert fifo.uart.receive(b"x") == 1


@pytest.mark.parametrize("free", [lambda port: port.outb(FCR, 0x03), lambda port: port.uart.reset()])
def test_a_cleared_receiver_has_room_too(fifo: Port, free: object) -> None:
    calls: list[None] = []
    fifo.uart.on_room = lambda: calls.append(None)
    fifo.uart.receive(bytes(17))
    assert callable(free)
    free(fifo)
    assert len(calls) == 1


# --- the receiver's interrupts ----------------------------------------------------------------------------------------


def test_rda_in_16450_mode(port: Port) -> None:
    """Table IV: reset by reading RBR."""
    port.outb(IER, ERBFI)
    port.uart.receive(b"x")
    assert port.line()
    assert port.cause() == RDA
    port.inb(RBR)
    assert not port.line()
    assert port.cause() == NONE


def test_rda_stays_until_the_last_byte_is_read(fifo: Port) -> None:
    """8.11, RCVR A with the trigger level at one byte."""
    fifo.outb(IER, ERBFI)
    fifo.uart.receive(b"ab")
    assert fifo.line()
    assert [fifo.inb(RBR) for _ in "ab"] == [*b"ab"]
    assert not fifo.line()
    assert fifo.irq.edges == 1


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_levels(port: Port, bits: int, level: int) -> None:
    """8.5 bits 6 and 7; below the level there is only the timeout."""
    port.outb(FCR, bits | 0x01)
    port.outb(IER, ERBFI)
    for count in range(1, 17):
        port.uart.receive(b"x")
        assert port.cause() == (RDA if count >= level else TIMEOUT)
    for count in range(15, 0, -1):
        port.inb(RBR)
        assert port.cause() == (RDA if count >= level else TIMEOUT)
    port.inb(RBR)
    assert port.cause() == NONE


def test_a_trigger_level_counts_only_with_the_enable_bit(port: Port) -> None:
    """8.5 bit 0: it "must be a 1 when other FCR bits are written to or they will not be programmed"."""
    port.outb(FCR, 0xC0)
    port.outb(IER, ERBFI)
    port.uart.receive(b"x")
    assert port.inb(IIR) == RDA


def test_falling_below_the_trigger_level_shows_as_an_edge(port: Port) -> None:
    """8.11, RCVR A: reset below the level; the timeout for the rest is an interrupt of its own."""
    port.outb(FCR, 0x41)
    port.outb(IER, ERBFI)
    port.uart.receive(b"12345")
    assert port.irq.edges == 1
    port.inb(RBR)
    assert port.irq.edges == 1
    port.inb(RBR)
    assert port.irq.edges == 2
    assert port.line()


def test_each_read_resets_the_timeout(port: Port) -> None:
    """8.11 C: a driver that takes one byte an interrupt gets one for each."""
    port.outb(FCR, 0xC1)
    port.outb(IER, ERBFI)
    port.uart.receive(b"abc")
    for count, byte in enumerate(b"abc", start=1):
        assert port.line()
        assert port.irq.edges == count
        assert port.cause() == TIMEOUT
        assert port.inb(RBR) == byte
    assert not port.line()


def test_polled_mode_has_no_receiver_interrupt(fifo: Port) -> None:
    """8.12."""
    fifo.uart.receive(b"abc")
    assert fifo.cause() == NONE
    assert fifo.irq.edges == 0
    assert fifo.read_all() == b"abc"


def test_a_driver_that_wants_received_data_is_listening(port: Port) -> None:
    assert not port.uart.listening
    port.outb(IER, ETBEI | ELSI)
    assert not port.uart.listening
    port.outb(IER, ERBFI)
    listening = port.uart.listening
    assert listening


def test_enabling_rda_with_data_waiting_interrupts(fifo: Port) -> None:
    fifo.uart.receive(b"abc")
    fifo.outb(IER, ERBFI)
    assert fifo.line()
    assert fifo.cause() == RDA


# --- line errors ------------------------------------------------------------------------------------------------------


def test_break_in_16450_mode(port: Port) -> None:
    """8.4 bit 4: a zero byte, BI until LSR is read; bit 7 is 0 in this mode."""
    port.outb(IER, ELSI)
    port.uart.send_break()
    assert port.line()
    assert port.cause() == LINE
    assert port.inb(LSR) == IDLE | DR | BI
    assert not port.line()
    assert port.inb(LSR) == IDLE | DR
    assert port.inb(RBR) == 0
    assert port.inb(LSR) == IDLE


def test_break_in_the_fifo_shows_at_the_top(fifo: Port) -> None:
    """8.4 bits 4 and 7: revealed with its character; bit 7 until LSR is read with no further error."""
    fifo.outb(IER, ELSI)
    fifo.uart.receive(b"a")
    fifo.uart.send_break()
    fifo.uart.receive(b"b")
    assert fifo.inb(LSR) == IDLE | DR | FIFO_ERROR
    assert fifo.inb(LSR) == IDLE | DR | FIFO_ERROR
    assert not fifo.line()
    assert fifo.inb(RBR) == ord("a")
    assert fifo.line()
    assert fifo.inb(LSR) == IDLE | DR | BI | FIFO_ERROR
    assert fifo.inb(LSR) == IDLE | DR
    assert fifo.inb(RBR) == 0
    assert fifo.inb(RBR) == ord("b")


def test_bit_seven_stays_while_another_break_waits(fifo: Port) -> None:
    """8.4 bit 7: "if there are no subsequent errors in the FIFO"."""
    fifo.uart.send_break()
    fifo.uart.send_break()
    assert fifo.inb(LSR) == IDLE | DR | BI | FIFO_ERROR
    assert fifo.inb(LSR) == IDLE | DR | FIFO_ERROR
    assert fifo.inb(RBR) == 0
    assert fifo.inb(LSR) == IDLE | DR | BI | FIFO_ERROR
    assert fifo.inb(LSR) == IDLE | DR


def test_break_on_a_full_fifo_is_an_overrun(fifo: Port) -> None:
    """8.4 bit 1: the FIFO keeps its characters, the new one is lost; OE shows at once."""
    fifo.outb(IER, ELSI)
    fifo.uart.receive(bytes(range(16)))
    fifo.uart.send_break()
    assert fifo.cause() == LINE
    assert fifo.inb(LSR) == IDLE | DR | OE
    assert fifo.inb(LSR) == IDLE | DR
    assert fifo.read_all() == bytes(range(16))


def test_break_on_a_full_16450_destroys_the_byte_before(port: Port) -> None:
    """8.4 bit 1."""
    port.uart.receive(b"x")
    port.uart.send_break()
    assert port.inb(LSR) == IDLE | DR | OE | BI
    assert port.inb(RBR) == 0


def test_line_status_outranks_received_data(fifo: Port) -> None:
    """8.11, RCVR C."""
    fifo.outb(IER, ELSI | ERBFI)
    fifo.uart.send_break()
    assert fifo.cause() == LINE
    fifo.inb(LSR)
    assert fifo.line()
    assert fifo.cause() == RDA


# --- drivers ----------------------------------------------------------------------------------------------------------


def test_linux_finds_a_16550a(port: Port) -> None:
    """8250_port.c, autoconfig: IER keeps its bits, loopback answers, IIR says FIFO, and nothing looks like a 16650."""
    port.outb(MCR, 0)
    port.outb(IER, 0x00)
    assert port.inb(IER) & 0x0F == 0x00
    port.outb(IER, 0x0F)
    assert port.inb(IER) & 0x0F == 0x0F
    port.outb(IER, 0x00)
    port.outb(MCR, LOOP | RTS | OUT2)
    assert port.inb(MSR) & 0xF0 == 0x90
    port.outb(MCR, 0)
    port.outb(LCR, 0xBF)
    port.outb(FCR, 0)
    port.outb(LCR, 0)
    port.outb(FCR, 0x01)
    assert port.inb(IIR) >> 6 == 3
    port.outb(LCR, 0x80)
    assert port.inb(IIR) != 0  # an EFR would read 0
    port.outb(LCR, 0xBF)
    assert port.inb(IIR) != 0
    port.outb(LCR, 0)
    port.outb(FCR, 0x21)
    assert port.inb(IIR) >> 5 == 6  # 7 would be a 16750
    port.outb(LCR, 0x80)
    port.outb(FCR, 0x21)
    assert port.inb(IIR) >> 5 == 6
    port.outb(LCR, 0)
    port.outb(IER, 0x40)
    assert port.inb(IER) == 0  # 0x40 would be an XScale
    assert port.irq.edges == 0


@pytest.mark.parametrize("trigger", [1, 4, 8, 14])
@pytest.mark.parametrize("style", ["a byte", "trigger level", "until empty"])
def test_no_receive_driver_style_hangs(trigger: int, style: str) -> None:
    """What a driver may rely on: received data are as many bytes as the trigger level, a timeout is one byte."""
    irq = EdgeTriggered()
    uart = Uart16550(irq=irq, sink=FakeSink())
    uart.write(MCR, 1, OUT2)
    uart.write(FCR, 1, {1: 0x00, 4: 0x40, 8: 0x80, 14: 0xC0}[trigger] | 0x01)
    uart.write(IER, 1, ERBFI)
    waiting = bytearray(range(100))
    got = bytearray()

    def feed() -> None:
        del waiting[: uart.receive(bytes(waiting))]

    uart.on_room = feed
    feed()
    while irq.take():
        if style == "until empty":
            while uart.read(LSR, 1) & DR:
                got.append(uart.read(RBR, 1))
            continue
        cause = uart.read(IIR, 1) & 0x0F
        if cause == TIMEOUT:
            got.append(uart.read(RBR, 1))
        while cause == RDA:
            got += bytes(uart.read(RBR, 1) for _ in range(trigger if style == "trigger level" else 1))
            cause = uart.read(IIR, 1) & 0x0F
    assert got == bytes(range(100))


@pytest.mark.parametrize("fifo_mode", [False, True])
@pytest.mark.parametrize("reads_iir", [False, True])
@pytest.mark.parametrize("burst", [1, 2, 16])
def test_no_transmit_driver_style_hangs(*, fifo_mode: bool, reads_iir: bool, burst: int) -> None:
    irq, sink = EdgeTriggered(), FakeSink()
    uart = Uart16550(irq=irq, sink=sink)
    uart.write(MCR, 1, OUT2)
    uart.write(FCR, 1, int(fifo_mode))
    message = bytearray(b"to be sent by interrupts, whatever the handler reads")
    expected = bytes(message)
    uart.write(IER, 1, ETBEI)
    while irq.take():
        if reads_iir and uart.read(IIR, 1) & 0x0F != THRE_ID:
            continue
        for byte in message[:burst]:
            uart.write(THR, 1, byte)
        del message[:burst]
        if not message:
            uart.write(IER, 1, 0)
    assert sink.data == expected
    assert not irq.level

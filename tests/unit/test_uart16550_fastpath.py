"""What the UART lets the run loop answer without it."""

from __future__ import annotations

import pytest
from fakes import FakeFastPath, FakeIrq, FakeSink
from uart_port import (
    BI,
    DLAB,
    DR,
    EDSSI,
    ELSI,
    ERBFI,
    ETBEI,
    FCR,
    FIFO_ERROR,
    IDLE,
    IER,
    IIR,
    LCR,
    LOOP,
    LSR,
    MCR,
    MSR,
    OUT2,
    RBR,
    RTS,
    SCR,
    THR,
    THRE_ID,
    Port,
)

from devices.uart16550 import Uart16550

# --- short cuts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast() -> FakeFastPath:
    return FakeFastPath()


@pytest.fixture
def quick(fast: FakeFastPath) -> Port:
    port = Port(fast=fast)
    port.outb(MCR, OUT2)
    port.outb(FCR, 0x01)
    return port


def test_an_idle_port_needs_no_model(quick: Port, fast: FakeFastPath) -> None:
    assert fast.published == {LSR: IDLE}
    assert fast.diverted == {THR}
    assert quick.sink.writes == 0


def test_lsr_is_published_as_it_changes(quick: Port, fast: FakeFastPath) -> None:
    quick.uart.receive(b"x")
    assert fast.published == {LSR: IDLE | DR}
    quick.inb(RBR)
    assert fast.published == {LSR: IDLE}


def test_lsr_is_published_before_the_interrupt(fast: FakeFastPath) -> None:
    """The handler may run on another CPU as soon as the line is up."""
    seen: list[int] = []

    class Handler(FakeIrq):
        def set(self, level: bool) -> None:
            super().set(level)
            if level:
                seen.append(fast.published[LSR])

    uart = Uart16550(irq=Handler(), sink=FakeSink(), fast=fast)
    uart.write(MCR, 1, OUT2)
    uart.write(IER, 1, ERBFI)
    uart.receive(b"x")
    assert seen == [IDLE | DR]


def test_lsr_with_an_error_must_be_read_from_the_model(quick: Port, fast: FakeFastPath) -> None:
    quick.uart.send_break()
    assert fast.published == {}
    assert quick.inb(LSR) & BI
    assert fast.published == {LSR: IDLE | DR}


def test_lsr_with_a_hidden_error_may_be_published(quick: Port, fast: FakeFastPath) -> None:
    """Reading it clears nothing yet."""
    quick.uart.receive(b"x")
    quick.uart.send_break()
    assert fast.published == {LSR: IDLE | DR | FIFO_ERROR}


@pytest.mark.parametrize(("register", "value"), [(LCR, DLAB), (MCR, OUT2 | LOOP), (IER, ETBEI)])
def test_thr_goes_through_the_model_when_a_write_means_more(
    quick: Port, fast: FakeFastPath, register: int, value: int
) -> None:
    quick.outb(register, value)
    assert fast.diverted == set()
    quick.outb(register, 0)
    assert fast.diverted == {THR}


def test_other_interrupts_leave_thr_diverted(quick: Port, fast: FakeFastPath) -> None:
    quick.outb(IER, ERBFI | ELSI | EDSSI)
    quick.uart.receive(b"x")
    assert fast.diverted == {THR}


def test_the_rest_of_an_acknowledged_burst_is_diverted(quick: Port, fast: FakeFastPath) -> None:
    quick.outb(IER, ETBEI)
    assert fast.diverted == set()
    assert quick.cause() == THRE_ID
    assert fast.diverted == set()
    quick.outb(THR, 0x41)
    assert fast.diverted == {THR}
    assert quick.cause() == THRE_ID
    assert fast.diverted == set()


def test_short_cuts_are_not_touched_without_a_change(quick: Port, fast: FakeFastPath) -> None:
    """Each call may cost the run loop something; polling and printing must not make any."""
    calls = len(fast.calls)
    for _ in range(10):
        quick.outb(THR, 0x41)
        quick.inb(LSR)
        quick.inb(MSR)
        quick.inb(IIR)
        quick.outb(SCR, 1)
        quick.outb(LCR, 0x03)
        quick.outb(MCR, OUT2 | RTS)
        quick.outb(IER, ERBFI)
    assert len(fast.calls) == calls


def test_reset_restores_the_short_cuts(quick: Port, fast: FakeFastPath) -> None:
    quick.outb(LCR, DLAB)
    quick.uart.receive(b"x")
    quick.uart.send_break()
    quick.uart.reset()
    assert fast.published == {LSR: IDLE}
    assert fast.diverted == {THR}

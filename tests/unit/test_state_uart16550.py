"""The UART's state, saved and loaded."""

from __future__ import annotations

import pytest
from fakes import FakeClock, FakeFastPath
from state_walks import check_mutations, check_refusals, check_walk
from uart_port import (
    BI,
    DLAB,
    DR,
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
    OE,
    OUT2,
    RBR,
    RDA,
    SCR,
    THR,
    THRE_ID,
    Port,
)


class Bench:
    def __init__(self, now_ns: int = 0) -> None:
        self.clock = FakeClock(now_ns)
        self.fast = FakeFastPath()
        self.port = Port(fast=self.fast)
        self.device, self.irq = self.port.uart, self.port.irq
        self.device.on_room = self.on_room
        self.rooms = 0

    def on_room(self) -> None:
        self.rooms += 1
        self.device.receive(b"late")

    def do(self, operation):
        name, *arguments = operation
        return getattr(self.device, name)(*arguments)

    def seen(self):
        sent = bytes(self.port.sink.data)
        return self.irq.level, self.irq.history, sent, self.rooms, self.fast.published, self.fast.diverted

    def forget(self):
        self.irq.history.clear()
        self.port.sink.data.clear()
        self.rooms = 0

    def meet(self, other):
        """There is no time in it."""

    def spoil(self, chance):
        self.irq.level = chance.random() < 0.5
        self.fast.published = {LSR: 0xEE} if chance.random() < 0.5 else {}
        self.fast.diverted = {THR} if chance.random() < 0.5 else set()


LIKELY = {
    IER: (0, ERBFI, ETBEI, ERBFI | ETBEI, 0x0F),
    FCR: (0, 0x01, 0x03, 0x41, 0x81, 0xC1),
    LCR: (0, 0x03, DLAB | 0x03),
    MCR: (0, OUT2, OUT2 | 3, OUT2 | LOOP, LOOP | 0x0F),
}


def operation(chance):
    kind = chance.random()
    if kind < 0.35:
        return "read", chance.randrange(8), chance.choice((1, 1, 1, 2, 4))
    if kind < 0.8:
        register = chance.randrange(8)
        return "write", register, 1, chance.choice(LIKELY.get(register, (0, 0x41))) ^ (chance.random() < 0.1)
    if kind < 0.95:
        return "receive", chance.randbytes(chance.randrange(20))
    return ("send_break",)


@pytest.mark.parametrize("seed", range(150))
def test_a_saved_port_goes_on_alike(seed):
    check_walk(Bench, operation, seed)


def test_what_is_in_a_state():
    bench = Bench()
    port = bench.port
    port.outb(LCR, DLAB)
    port.outb(0, 0x34)
    port.outb(1, 0x12)
    port.outb(LCR, 0x03)
    port.outb(FCR, 0x81)
    port.outb(MCR, OUT2)
    port.outb(IER, ERBFI)
    port.outb(SCR, 0x5A)
    bench.device.receive(b"a")
    bench.device.send_break()
    assert bench.device.receive(b"b" * 16) == 14
    assert bench.device.state() == {
        "IER": 0x01,
        "FCR": 0x81,
        "LCR": 0x03,
        "MCR": 0x08,
        "LSR": 0,
        "MSR": 0xB0,
        "SCR": 0x5A,
        "DLL": 0x34,
        "DLM": 0x12,
        "RBR": [0x61, 0x100] + [0x62] * 14,
        "THRE": 0,
        "refused": True,
    }


def test_a_loaded_port_answers_as_the_saved_one():
    bench = Bench()
    bench.device.load(
        {
            "IER": 0x01,
            "FCR": 0x41,
            "LCR": 0x03,
            "MCR": 0x08,
            "LSR": OE,
            "MSR": 0xB0,
            "SCR": 0x5A,
            "DLL": 1,
            "DLM": 0,
            "RBR": [0x61, 0x100, 0x62, 0x63],
            "THRE": 0,
            "refused": True,
        }
    )
    port = bench.port
    assert port.irq.level
    assert port.inb(IIR) == FIFOS | RDA
    assert bench.fast.published == {}
    assert port.inb(LSR) == IDLE | DR | OE | FIFO_ERROR
    assert port.inb(RBR) == 0x61
    assert port.inb(LSR) == IDLE | DR | BI | FIFO_ERROR
    assert [port.inb(RBR) for _ in range(3)] == [0, 0x62, 0x63]
    assert bench.rooms == 1
    assert port.read_all() == b"late"


@pytest.mark.parametrize(("thre", "cause"), [(0, 0x1), (1, THRE_ID), (2, THRE_ID)])
def test_a_pending_thre_interrupt_is_not_lost(thre, cause):
    bench = Bench()
    bench.device.load(Bench().device.state() | {"IER": ETBEI, "MCR": OUT2, "THRE": thre})
    assert bench.port.irq.level == (thre != 0)
    assert bench.fast.diverted == ({THR} if thre == 2 else set())
    assert bench.port.cause() == cause


def test_a_load_calls_nobody():
    """Room that is told of while a state is loaded would let in the input of the guest before."""
    bench = Bench()
    bench.device.receive(b"xyz")
    bench.device.load(Bench().device.state() | {"refused": True})
    assert bench.rooms == 0


def test_a_changed_state_is_refused_or_does_no_harm():
    assert sum(check_mutations(Bench, operation, seed) for seed in range(40)) > 50


def test_what_is_no_state_is_refused():
    bench = Bench()
    bench.port.outb(FCR, 0x01)
    bench.port.outb(IER, 0x0F)
    bench.device.receive(b"xyz")
    byte = (256, -1)
    check_refusals(
        bench,
        {
            "IER": (0x10, *byte),
            "FCR": (0x40, 0x02, *byte),
            "LCR": byte,
            "MCR": (0x20, *byte),
            "LSR": (0x01, 0x04, 0x08, 0x20, 0x40, 0x80, *byte),
            "MSR": byte,
            "SCR": byte,
            "DLL": byte,
            "DLM": byte,
            "RBR": ([0x101], [-1], [0x100, 1], [0] * 17, [True], ["a"], [None]),
            "THRE": (3, -1),
        },
    )
    state = Bench().device.state()
    with pytest.raises(ValueError, match="RBR has 2 entries"):
        bench.device.load(state | {"RBR": [1, 2]})

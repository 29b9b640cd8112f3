"""A serial port and its driver, for the tests of the UART. The constants restate the data sheet's."""

from __future__ import annotations

from fakes import FakeFastPath, FakeIrq, FakeSink

from devices.uart16550 import Uart16550

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

ERBFI, ETBEI, ELSI, EDSSI = 0x01, 0x02, 0x04, 0x08  # IER
NONE, LINE, RDA, TIMEOUT, THRE_ID, MODEM = 0x1, 0x6, 0x4, 0xC, 0x2, 0x0  # IIR bits 3..0 (Table IV)
FIFOS = 0xC0  # IIR bits 7..6
DR, OE, BI, THRE, TEMT, FIFO_ERROR = 0x01, 0x02, 0x10, 0x20, 0x40, 0x80  # LSR
IDLE = THRE | TEMT
DTR, RTS, OUT1, OUT2, LOOP = 0x01, 0x02, 0x04, 0x08, 0x10  # MCR
DCTS, DDSR, TERI, DDCD, CTS, DSR, RI, DCD = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80  # MSR
DLAB = 0x80  # LCR


class Port:
    """A port and its driver: byte-wide `inb` and `outb` that always reach the model."""

    def __init__(self, *, fast: FakeFastPath | None = None) -> None:
        self.irq = FakeIrq()
        self.sink = FakeSink()
        self.uart = Uart16550(irq=self.irq, sink=self.sink, fast=fast)

    def inb(self, register: int) -> int:
        return self.uart.read(register, 1)

    def outb(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    def line(self) -> bool:
        """Return the level of the interrupt line; a type checker would take an attribute for constant."""
        return self.irq.level

    def cause(self) -> int:
        """Read IIR, with its side effect, and return bits 3..0."""
        return self.inb(IIR) & 0x0F

    def read_all(self) -> bytes:
        """Read what was received as a polling driver does."""
        data = bytearray()
        while self.inb(LSR) & DR:
            data.append(self.inb(RBR))
        return bytes(data)


class EdgeTriggered:
    """An interrupt controller input that latches rising edges, and a CPU that runs the handler for each."""

    def __init__(self) -> None:
        self.level = False
        self.latched = False

    def set(self, level: bool) -> None:
        self.latched |= level and not self.level
        self.level = level

    def take(self) -> bool:
        taken, self.latched = self.latched, False
        return taken

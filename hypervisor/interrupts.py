"""Interrupts that are eventfds: one write, from any thread or from C, and KVM interrupts the guest."""

from __future__ import annotations

import os
import select
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor.eventloop import EventLoop
    from hypervisor.kvm import Vm

FIRST_MESSAGE_GSI: Final = 24
"""GSIs below are the interrupt controllers' pins."""
LAPIC_MESSAGES: Final = 0xFEE
"""Bits 20 and up of an address that is a message to a LAPIC (Intel SDM volume 3, Message Address Register Format)."""


class NoSignal:
    """The signal of a machine without interrupt controllers; fits `devices.ports.RoutedSignal`."""

    is_pending = False

    def fire(self) -> None:
        """Interrupt nobody."""

    def fileno(self) -> int:
        """Return no descriptor."""
        return -1

    def to_message(self, address: int, data: int) -> None:
        """Lead nowhere."""

    def to_line(self) -> None:
        """Lead nowhere."""

    def hold(self) -> None:
        """Hold nothing."""

    def forget(self) -> None:
        """Hold nothing."""


class Signal:
    """An eventfd, and where KVM takes it; fits `devices.ports.RoutedSignal`.

    What is fired while it is held stays in the eventfd, and KVM delivers it when it is connected again: so masking a
    vector needs no bookkeeping here.

    Attributes:
        was_fired: whether it may have been fired since it was settled, held or connected.
    """

    def __init__(self, interrupts: Interrupts, message_gsi: int, line_gsi: int, pin: LevelPin | None) -> None:
        """Make a signal that is held; `pin` makes its line a level that KVM lowers, without one it is an edge."""
        self._interrupts = interrupts
        self._message_gsi = message_gsi
        self._line_gsi = line_gsi
        self._pin = pin
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._connected: int | None = None
        self.was_fired = False

    def fire(self) -> None:
        """Interrupt the guest."""
        self.was_fired = True
        try:
            os.eventfd_write(self._fd, 1)
        except BlockingIOError:
            pass  # 2^64 - 2 times while held: it is pending as it is

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._fd

    @property
    def is_on_line(self) -> bool:
        """Whether it is delivered by the interrupt line now."""
        return self._connected is not None and self._connected == self._line_gsi

    @property
    def is_pending(self) -> bool:
        """Whether something was fired that has not been delivered."""
        if self._connected is not None:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def to_message(self, address: int, data: int) -> None:
        """Deliver it as this MSI; an address that no LAPIC has leads nowhere, so it is held."""
        if address >> 20 != LAPIC_MESSAGES:
            self.hold()
            return
        if self._connected != self._message_gsi:
            self.hold()
        self._interrupts.set_message(self._message_gsi, (address, data))
        if self._connected is None:
            self._connect(self._message_gsi, None)

    def to_line(self) -> None:
        """Deliver it by the interrupt line."""
        if self._connected != self._line_gsi:
            self.hold()
            self._connect(self._line_gsi, self._pin.resample_fd if self._pin is not None else None)

    def hold(self) -> None:
        """Hold back what is fired from now on."""
        if self._connected is not None:
            self._interrupts.vm.disconnect_irqfd(self._fd, self._connected)
            self._connected = None
            self.was_fired = False  # KVM has delivered all of it before it lets go

    def forget(self) -> None:
        """Drop what is being held back."""
        if self._connected is None:
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                pass  # nothing was

    def settle(self) -> None:
        """Return when whatever was fired is in the interrupt controllers; nobody fires it meanwhile.

        KVM may leave the delivery to a worker, and waits for that only when it is told to let go of an eventfd. A line
        is low afterwards when no other signal holds it: see `VirtioBoard.resume`.
        """
        if self.was_fired and (gsi := self._connected) is not None:
            self.hold()
            self._connect(gsi, self._pin.resample_fd if self._pin is not None and gsi == self._line_gsi else None)
        self.was_fired = False

    def _connect(self, gsi: int, resample_fd: int | None) -> None:
        self._interrupts.vm.connect_irqfd(self._fd, gsi, resample_fd)
        self._connected = gsi

    def close(self) -> None:
        """Close the eventfd."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LevelPin:
    """A level-triggered line that several signals of one device share.

    KVM lowers the line at the guest's end of interrupt and says so; when the device's cause is still there then, the
    line is raised again.
    """

    def __init__(self, loop: EventLoop) -> None:
        """Make a pin; `is_asserted` and `raise_again` are set by whoever has the device."""
        self.resample_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.is_asserted: Callable[[], bool] = bool
        self.raise_again: Callable[[], None] = _nothing
        self._loop = loop
        loop.watch(self.resample_fd, self._on_end_of_interrupt)

    def settle(self) -> None:
        """See to an end of interrupt that the loop has not come to yet; in the loop's thread."""
        self._on_end_of_interrupt()

    def _on_end_of_interrupt(self) -> None:
        try:
            os.eventfd_read(self.resample_fd)
        except BlockingIOError:
            return
        if self.is_asserted():
            self.raise_again()

    def close(self) -> None:
        """Close the eventfd; the loop has ended."""
        if self.resample_fd >= 0:
            os.close(self.resample_fd)
            self.resample_fd = -1


class Interrupts:
    """Makes signals and keeps the VM's table of messages."""

    def __init__(self, vm: Vm, loop: EventLoop) -> None:
        """Make signals of `vm`, whose lines' ends of interrupt are seen in `loop`."""
        self.vm = vm
        self._loop = loop
        self._messages: dict[int, tuple[int, int]] = {}
        self._next_gsi = FIRST_MESSAGE_GSI
        self._is_collecting = False
        self._owned: list[Signal | LevelPin] = []

    def edge(self, gsi: int) -> Signal:
        """Return a signal that is an edge at pin `gsi`, at once."""
        signal = self._own(Signal(self, -1, gsi, None))
        signal.to_line()
        return signal

    def pin(self) -> LevelPin:
        """Return what the signals of one device need to share a level-triggered line."""
        pin = LevelPin(self._loop)
        self._owned.append(pin)
        return pin

    def routed(self, line_gsi: int, pin: LevelPin) -> Signal:
        """Return a signal that becomes a message of its own, or the level at `line_gsi`."""
        self._next_gsi += 1
        return self._own(Signal(self, self._next_gsi - 1, line_gsi, pin))

    def _own(self, signal: Signal) -> Signal:
        self._owned.append(signal)
        return signal

    def set_message(self, gsi: int, message: tuple[int, int]) -> None:
        """Make GSI `gsi` this MSI, address and data."""
        if self._messages.get(gsi) != message:
            self._messages[gsi] = message
            if not self._is_collecting:
                self.vm.set_routes(self._messages)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Tell KVM of all messages that change meanwhile at once, in the end: each time it waits for all its readers.

        What is fired meanwhile as a message that has changed may be lost.
        """
        before = dict(self._messages)
        self._is_collecting = True
        try:
            yield
        finally:
            self._is_collecting = False
            if self._messages != before:
                self.vm.set_routes(self._messages)

    def settle(self) -> None:
        """Return when all that was fired is in the interrupt controllers.

        To be called in the loop's thread, while nobody fires.
        """
        for kind in (LevelPin, Signal):  # an end of interrupt may raise a line again
            for one in self._owned:
                if isinstance(one, kind):
                    one.settle()

    def close(self) -> None:
        """Close every eventfd."""
        for one in self._owned:
            one.close()


def _nothing() -> None:
    """Raise no line: nobody has the pin yet."""

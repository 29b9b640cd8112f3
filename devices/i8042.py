"""The PC's keyboard controller (8042) with nothing plugged in: guests probe it, and reset the machine through it.

Commands and bits follow the IBM AT's and PS/2's controller. What is modelled beyond the reset is what lets a driver
find out soon that there is neither a keyboard nor an auxiliary (mouse) port. Linux waits half a second for an answer
that does not come, so every command that has one is answered at once:

* the auxiliary loopback (0xD3) answers without the status bit that marks auxiliary data, and the auxiliary interface
  test (0xA9) reports a fault: Linux then gives the port up;
* the auxiliary port cannot be enabled: its bit in the command byte stays set, which is how other drivers tell;
* a byte sent to the absent keyboard or mouse comes back as the controller reports a transmission that timed out:
  0xFE ("resend") with the time-out bit, and IRQ 1 if the guest enabled it. Linux's keyboard driver then gives up
  after two tries, instead of waiting 200 ms for each byte;
* the command byte says "translate", or Linux tries its mouse drivers on the keyboard port too.

The output buffer holds one byte: an answer overwrites what was not read.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Final

from devices.events import EventLog
from devices.ports import register_of
from devices.saved import Saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.ports import IrqLine

__all__ = ["I8042", "Command", "CommandByte", "Reg", "Status"]


class Reg(IntEnum):
    """Offsets from port 0x60."""

    DATA = 0  # RW output buffer; a write is a command's parameter or a byte for the keyboard
    STATUS = 4  # RO
    COMMAND = 4  # WO


class Status(IntFlag):
    """Status register bits. The input buffer never stays full: commands take no time."""

    OUTPUT_FULL = 1 << 0
    INPUT_FULL = 1 << 1
    SYSTEM = 1 << 2  # the self test passed since power on
    COMMAND = 1 << 3  # the last write was a command
    UNLOCKED = 1 << 4  # the keyboard is not locked by its key
    AUX_DATA = 1 << 5  # the output buffer's byte is the auxiliary device's
    TIMEOUT = 1 << 6
    PARITY = 1 << 7


class CommandByte(IntFlag):
    """Bits of the controller's command byte."""

    KEYBOARD_INTERRUPT = 1 << 0
    AUX_INTERRUPT = 1 << 1
    SYSTEM = 1 << 2  # shows in the status register
    KEYBOARD_DISABLED = 1 << 4
    AUX_DISABLED = 1 << 5
    TRANSLATE = 1 << 6


class Command(IntEnum):
    """Commands, written to the command port. 0xF0 to 0xFF pulse the output port's lines whose bit is 0."""

    READ_COMMAND_BYTE = 0x20
    WRITE_COMMAND_BYTE = 0x60  # with a parameter
    DISABLE_AUX = 0xA7
    ENABLE_AUX = 0xA8
    TEST_AUX = 0xA9
    SELF_TEST = 0xAA
    TEST_KEYBOARD = 0xAB
    DISABLE_KEYBOARD = 0xAD
    ENABLE_KEYBOARD = 0xAE
    READ_INPUT_PORT = 0xC0
    READ_OUTPUT_PORT = 0xD0
    WRITE_OUTPUT_PORT = 0xD1  # with a parameter
    WRITE_KEYBOARD_OUTPUT = 0xD2  # with a parameter
    WRITE_AUX_OUTPUT = 0xD3  # with a parameter
    WRITE_AUX = 0xD4  # with a parameter
    RESET = 0xFE


_DATA: Final = int(Reg.DATA)
_COMMAND: Final = int(Reg.COMMAND)
_OUTPUT_FULL: Final = int(Status.OUTPUT_FULL)
_LAST_WAS_COMMAND: Final = int(Status.COMMAND)
_UNLOCKED: Final = int(Status.UNLOCKED)
_TIMEOUT: Final = int(Status.TIMEOUT)
_KEYBOARD_INTERRUPT: Final = int(CommandByte.KEYBOARD_INTERRUPT)
_SYSTEM: Final = int(CommandByte.SYSTEM)
_KEYBOARD_DISABLED: Final = int(CommandByte.KEYBOARD_DISABLED)
_AUX_DISABLED: Final = int(CommandByte.AUX_DISABLED)

_AFTER_FIRMWARE: Final = int(
    CommandByte.SYSTEM | CommandByte.TRANSLATE | CommandByte.KEYBOARD_DISABLED | CommandByte.AUX_DISABLED
)
_SELF_TEST_PASSED: Final = 0x55
_INTERFACE_GOOD: Final = 0x00
_CLOCK_STUCK_LOW: Final = 0x01
_RESEND: Final = 0xFE
_INPUT_PORT: Final = 0x80  # the keyboard is not inhibited
_OUTPUT_PORT: Final = 0xCF  # nothing pending, A20 open, no reset
_NOT_RESET: Final = 1 << 0  # output port: low resets the processor
_PULSE: Final = 0xF0


class I8042:
    """The controller at ports 0x60 and 0x64, offsets 0 and 4; the offsets between them belong to others."""

    def __init__(
        self, on_reset: Callable[[], None], *, irq: IrqLine | None = None, log: EventLog | None = None
    ) -> None:
        """Power up, as firmware would have left the controller.

        Args:
            on_reset: called when the guest pulls the processor's reset line.
            irq: the keyboard's line, IRQ 1 on a PC; without it guests wait longer for the keyboard.
            log: where the guest's mistakes are noted, each once.
        """
        self._on_reset = on_reset
        self._irq = irq
        self._log = EventLog(device="i8042") if log is None else log
        self._actions: dict[int, Callable[[], None]] = {
            Command.READ_COMMAND_BYTE: lambda: self._answer(self._command_byte),
            Command.DISABLE_AUX: lambda: None,  # it is
            Command.ENABLE_AUX: lambda: None,  # it cannot be
            Command.TEST_AUX: lambda: self._answer(_CLOCK_STUCK_LOW),
            Command.SELF_TEST: self._self_test,
            Command.TEST_KEYBOARD: lambda: self._answer(_INTERFACE_GOOD),
            Command.DISABLE_KEYBOARD: lambda: self._set_command_byte(self._command_byte | _KEYBOARD_DISABLED),
            Command.ENABLE_KEYBOARD: lambda: self._set_command_byte(self._command_byte & ~_KEYBOARD_DISABLED),
            Command.READ_INPUT_PORT: lambda: self._answer(_INPUT_PORT),
            Command.READ_OUTPUT_PORT: lambda: self._answer(self._output_port),
        }
        self._parameters: dict[int, Callable[[int], None]] = {
            Command.WRITE_COMMAND_BYTE: self._set_command_byte,
            Command.WRITE_OUTPUT_PORT: self._set_output_port,
            Command.WRITE_KEYBOARD_OUTPUT: self._answer,
            Command.WRITE_AUX_OUTPUT: self._answer,
            Command.WRITE_AUX: self._time_out,
        }
        self.reset()

    def reset(self) -> None:
        """Return to the state that firmware leaves."""
        self._status = _UNLOCKED
        self._data = 0
        self._command_byte = _AFTER_FIRMWARE
        self._output_port = _OUTPUT_PORT
        self._pending: int | None = None
        self._update_irq()

    def read(self, offset: int, size: int) -> int:
        """Return the output buffer or the status; a wider access finds ports beyond it that nobody decodes."""
        if offset == _DATA:
            value = self._read_data()
        elif offset == _COMMAND:
            value = self._status | self._command_byte & _SYSTEM
        else:
            value = 0xFF
        return value | (1 << 8 * size) - 1 & ~0xFF

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - the Device protocol's signature
        """Take the low byte as a command or data; the rest of a wider access goes to ports that nobody decodes."""
        if offset == _DATA:
            self._write_data(value & 0xFF)
        elif offset == _COMMAND:
            self._write_command(value & 0xFF)

    @staticmethod
    def register_name(offset: int, *, write: bool) -> str:
        """Return the name of the port at `offset`."""
        return register_of(Reg, offset, write=write)

    def state(self) -> dict[str, Any]:
        """Return what the controller holds; `pending` is the command whose parameter has not come, if there is one."""
        return {
            "status": self._status,
            "data": self._data,
            "command_byte": self._command_byte,
            "output_port": self._output_port,
            "pending": self._pending,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Be in a state; see `devices.ports.Stateful`."""
        saved = Saved(state)
        status = saved.bits("status", _OUTPUT_FULL | _LAST_WAS_COMMAND | _UNLOCKED | _TIMEOUT, always=_UNLOCKED)
        data, output_port = saved.number("data", 0xFF), saved.number("output_port", 0xFF)
        command_byte = saved.bits("command_byte", 0xFF, always=_AUX_DISABLED)
        pending = saved.number("pending", 0xFF) if saved.optional("pending") else None
        saved.end()
        if pending is not None and pending not in self._parameters:
            raise ValueError(f"pending is {pending:#x}, a command that takes no parameter")
        self._status, self._data, self._pending = status, data, pending
        self._command_byte, self._output_port = command_byte, output_port
        self._update_irq()

    def _read_data(self) -> int:
        self._status &= ~(_OUTPUT_FULL | _TIMEOUT)
        self._update_irq()
        return self._data

    def _write_command(self, command: int) -> None:
        """Do a command, or wait for its parameter; a command before that gives the parameter up."""
        self._status |= _LAST_WAS_COMMAND
        self._pending = None
        action = self._actions.get(command)
        if action is not None:
            action()
        elif command in self._parameters:
            self._pending = command
        elif command < _PULSE:
            self._log.once("i8042.unknown_command", command, command=command)
        elif not command & _NOT_RESET:
            self._on_reset()

    def _write_data(self, value: int) -> None:
        """Take the parameter that a command waits for, or send a byte to the keyboard that is not there."""
        self._status &= ~_LAST_WAS_COMMAND
        pending, self._pending = self._pending, None
        if pending is None:
            self._time_out(value)
        else:
            self._parameters[pending](value)

    def _answer(self, value: int, error: int = 0) -> None:
        """Put a byte into the output buffer, with the error bit that belongs to it."""
        self._data = value
        self._status = self._status & ~_TIMEOUT | _OUTPUT_FULL | error
        self._update_irq()

    def _time_out(self, _value: int) -> None:
        """Report that nobody acknowledged a byte sent to a device."""
        self._answer(_RESEND, _TIMEOUT)

    def _self_test(self) -> None:
        self._set_command_byte(self._command_byte | _SYSTEM)
        self._answer(_SELF_TEST_PASSED)

    def _set_command_byte(self, value: int) -> None:
        self._command_byte = value | _AUX_DISABLED
        self._update_irq()

    def _set_output_port(self, value: int) -> None:
        """Drive the output port; A20 is open whatever its bit says."""
        self._output_port = value
        if not value & _NOT_RESET:
            self._on_reset()

    def _update_irq(self) -> None:
        """Drive the line: high while the output buffer is full and the guest wants to hear of it."""
        if self._irq is not None:
            self._irq.set(bool(self._status & _OUTPUT_FULL and self._command_byte & _KEYBOARD_INTERRUPT))

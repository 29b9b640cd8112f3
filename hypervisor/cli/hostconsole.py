"""Where `hv run` connects the guest's console: this terminal, a file, a pseudo-terminal, or nothing."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from hypervisor.errors import ConfigError, HostError
from hypervisor.outcome import Outcome, Stop
from hypervisor.output import OutputWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor.cli.terminal import RawTerminal
    from hypervisor.machine import Machine

CHUNK = 4096
SIGPIPE_STATUS = 141
KINDS = "stdio, file=PATH, pty or none"


class HostConsole:
    """The host's side of a machine's console. Made before the machine is, `attach`ed before it starts."""

    def __init__(self, spec: str) -> None:
        """Parse stdio|file=PATH|pty|none and open what it names; raises ConfigError or HostError."""
        self.machine: Machine | None = None
        self._terminal: RawTerminal | None = None
        self._writer: OutputWriter | None = None
        self._owned: list[int] = []
        self._in_fd = -1
        self._out_fd = -1
        self._filter: Callable[[bytes], bytes] | None = None
        self._watched = False
        self._input_over = False
        self.target = "standard output"
        kind, _, path = spec.partition("=")
        if kind == "file" and path:
            self._open_file(path)
        elif spec == "pty":
            self._open_pty()
        elif spec == "stdio":
            self._in_fd, self._out_fd = 0, 1
            self._use_terminal()
        elif spec != "none":
            raise ConfigError(f"console {spec!r}", hint=f"it is one of: {KINDS}")

    def _open_file(self, path: str) -> None:
        self.target = path
        try:
            self._out_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write the console to {path}: {error.strerror}") from error
        self._owned.append(self._out_fd)

    def _open_pty(self) -> None:
        try:
            master, slave = os.openpty()
        except OSError as error:
            raise HostError(f"no pseudo-terminal can be had: {error.strerror}") from error
        self._owned += [master, slave]  # the slave stays open, or reading would fail while nobody is connected
        import tty

        tty.setraw(slave)
        os.set_blocking(master, False)
        self._in_fd = self._out_fd = master
        self.target = os.ttyname(slave)
        print(f"hv: the console is {self.target}", file=sys.stderr, flush=True)

    # --- life ---------------------------------------------------------------------------------------------------------

    def _use_terminal(self) -> None:
        if not os.isatty(0):
            return
        from hypervisor.cli.terminal import HELP, EscapeFilter, RawTerminal

        self._terminal = RawTerminal(0)
        self._filter = EscapeFilter(
            {
                ord("x"): self._end,
                ord("p"): self._press_power_button,
                ord("r"): self._show_registers,
                ord("h"): lambda: self._say(HELP),
                ord("?"): lambda: self._say(HELP),
            }
        )

    def enter_raw_mode(self) -> None:
        """Make the terminal raw if standard input is one."""
        if self._terminal is not None:
            self._terminal.enter()

    def attach(self, machine: Machine) -> None:
        """Connect the machine's consoles."""
        self.machine = machine
        if self._out_fd >= 0:
            self._writer = OutputWriter(self._out_fd, self._output_failed)
            machine.console.listeners.append(self._writer.write)
            machine.debug_console.listeners.append(self._writer.write)
        if self._in_fd >= 0:
            machine.console.on_input_room = self._read_more
            self._read_more()

    def close(self) -> int:
        """Let the output out, restore the terminal; return how many bytes of output were lost."""
        lost = self._writer.close() if self._writer else 0
        self.restore()
        for fd in self._owned:
            os.close(fd)
        self._owned.clear()
        return lost

    def restore(self) -> None:
        """Put the terminal back as it was."""
        if self._terminal is not None:
            self._terminal.restore()

    # --- output -------------------------------------------------------------------------------------------------------

    def _say(self, text: bytes) -> None:
        if self._writer is not None:
            self._writer.write(text)

    def _output_failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            outcome = Outcome(Stop.OUTPUT_LOST, status=SIGPIPE_STATUS, message="", error=error)
        else:
            message = f"cannot write the console to {self.target}: {error.strerror}"
            outcome = Outcome(Stop.OUTPUT_LOST, message=message, error=error)
        if self.machine is not None:
            self.machine.end(outcome)

    # --- input --------------------------------------------------------------------------------------------------------

    def _read_more(self) -> None:
        """Watch the input while there is room for it; a plain file, which cannot be watched, is read at once."""
        machine = self.machine
        if machine is None or self._watched or self._input_over:
            return
        try:
            machine.loop.watch(self._in_fd, self._on_input)
            self._watched = True
        except PermissionError:
            while machine.console.input_room >= CHUNK and not self._input_over:
                self._read_once(machine)
        except OSError:
            self._input_over = True  # a closed standard input: the guest runs without one

    def _on_input(self) -> None:
        machine = self.machine
        if machine is None:
            return
        self._read_once(machine)
        if self._input_over or machine.console.input_room < CHUNK:
            machine.loop.unwatch(self._in_fd)
            self._watched = False

    def _read_once(self, machine: Machine) -> None:
        try:
            data = os.read(self._in_fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._input_over = True
            return
        machine.console.write(self._filter(data) if self._filter else data)

    def _end(self) -> None:
        if self.machine is not None:
            self.machine.end(Outcome(Stop.KILLED, status=0, message=""))

    def _press_power_button(self) -> None:
        if self.machine is not None:
            self.machine.press_power_button()

    def _show_registers(self) -> None:
        if self.machine is None:
            return
        for vcpu in self.machine.vcpus:
            values = vcpu.registers
            rows = [f"{name:>6} {value:#018x}" for name, value in values.items()]
            lines = [" ".join(rows[i : i + 3]) for i in range(0, len(rows), 3)]
            self._say(f"\r\nvCPU {vcpu.index}\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n")

"""One run of a command in the emulated host, seen from outside: input, output, signals, deadlines, status."""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from emulated_host.errors import HostCannotError, say
from emulated_host.streams import Control, Inlet, Outlet, OutletClosedError
from emulated_host.terminal import STDERR, STDIN, STDOUT, Terminal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from emulated_host.machine import Machine

BOOT_SECONDS: Final = 180.0
"""A boot takes five to ten seconds; a machine with other work on it may take several times that."""
GRACE_SECONDS: Final = 10.0
"""How long a command may take to end after SIGTERM or SIGHUP was passed on to it."""
BEAT_SECONDS: Final = 0.5
"""How often the machine is sent a word, for the interrupt's sake.

QEMU 7.2 changes a CPU's pending interrupts in two threads at once when a nested guest is entered or left while a timer
fires: now and then the timer's interrupt is lost, and with it the only thing that would have woken Linux, or taken the
CPU from a guest. It waits in the local APIC, and comes with any other interrupt.
"""
MOST_UNANSWERED: Final = 300
"""So many of these without an answer, and the machine is dead: its agent goes to each CPU before it answers."""
TIMED_OUT: Final = 124
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Command(NamedTuple):
    """What to run inside."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    archive: Path | None = None
    """Where to put the tar archive of /out; None when it is not wanted."""
    timeout: float | None = None
    """Seconds for all of it, the boot included."""
    silence: float | None = None
    """Seconds that it may print nothing."""
    verbose: bool = False
    """Print the kernel log and the times."""


class _Ended(Exception):
    """The run is over, with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Session:
    """Carries a command's input and output until it is over."""

    def __init__(self, machine: Machine, command: Command) -> None:
        """Prepare; `run` does it."""
        self._machine = machine
        self._command = command
        self._terminal = Terminal()
        self._control = Control(machine.ports["control"])
        self._inlet = Inlet(STDIN, machine.ports["stdin"])
        self._outlets = {
            "stdout": Outlet(machine.ports["stdout"], STDOUT),
            "stderr": Outlet(machine.ports["stderr"], STDERR),
        }
        if command.archive is not None:
            archive = os.open(command.archive, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._outlets["files"] = Outlet(machine.ports["files"], archive)
            self._archive: int | None = archive
        else:
            self._archive = None
        self._running = False
        self._next_beat = math.inf
        self._unanswered = 0.0
        self._eof_told = False
        self._result: tuple[int, dict[str, int]] | None = None
        self._signalled = 0
        self._times = [("", time.monotonic())]
        self._deadlines: dict[str, float] = {"boot": time.monotonic() + BOOT_SECONDS}
        if command.timeout is not None:
            self._deadlines["timeout"] = time.monotonic() + command.timeout
        self._alarm, self._alarm_end = socket.socketpair()

    def run(self) -> int:
        """Run the command and return its status: its own, 128 and the signal's number, or 124 for a timeout.

        Raises:
            HostCannotError: the emulated host did not come up, or ended before the command did.
        """
        handlers = {number: signal.signal(number, _wake) for number in (*FORWARDED, signal.SIGWINCH)}
        # A background job that reads its terminal gets EIO, taken for the end of input, instead of being stopped.
        handlers[signal.SIGTTIN] = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
        for end in (self._alarm, self._alarm_end):
            end.setblocking(False)
        signal.set_wakeup_fd(self._alarm_end.fileno(), warn_on_full_buffer=False)
        try:
            while True:
                self._turn()
        except _Ended as end:
            return end.status
        finally:
            self._terminal.restore()
            signal.set_wakeup_fd(-1)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._alarm.close()
            self._alarm_end.close()
            if self._archive is not None:
                os.close(self._archive)
            if self._command.verbose:
                self._print_times()

    def _turn(self) -> None:
        """Wait for something to happen and deal with all that did."""
        poll = select.poll()
        poll.register(self._machine.log, select.POLLIN)
        poll.register(self._alarm, select.POLLIN)
        streams: list[Control | Inlet | Outlet] = [self._control, *self._outlets.values()]
        waiting = {wish: stream for stream in streams if (wish := stream.wants()) is not None}
        if self._running and (wish := self._inlet.wants()) is not None:
            waiting[wish] = self._inlet
        for descriptor, events in waiting:
            poll.register(descriptor, events)
        soonest = min([self._next_beat, *self._deadlines.values()])
        timeout = None if soonest == math.inf else max(0.0, soonest - time.monotonic()) * 1000 + 1
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        self._check_deadlines()
        self._beat()
        if self._alarm.fileno() in ready:
            for number in self._alarm.recv(64):
                self._on_signal(number)
        for (descriptor, _), stream in waiting.items():
            if descriptor in ready:
                self._step(stream)
        if self._machine.log in ready:
            self._on_log()
        self._check_end()

    def _step(self, stream: Control | Inlet | Outlet) -> None:
        if isinstance(stream, Control):
            for words in stream.step():
                self._on_line(words)
            return
        try:
            stream.step()
        except OutletClosedError:
            if stream is self._outlets["stdout"]:
                raise _Ended(128 + signal.SIGPIPE) from None
            if isinstance(stream, Outlet):
                stream.discard()
        if isinstance(stream, Outlet) and self._running:
            self._heard()
        if self._inlet.escaped and self._terminal.present:
            self._terminal.restore()
            say("ended by Ctrl-] Ctrl-] Ctrl-]")
            raise _Ended(128 + signal.SIGINT)
        if self._inlet.finished and not self._eof_told:
            self._control.say("eof", self._inlet.sent)
            self._eof_told = True

    def _on_line(self, words: list[str]) -> None:
        """Answer the agent."""
        if words[0] == "alive":
            self._unanswered = 0.0
            return
        self._times.append((words[0], time.monotonic()))
        if words[0] == "ready":
            self._request()
        elif words[0] == "started":
            del self._deadlines["boot"]
            self._terminal.raw()
            self._running = True
            self._next_beat = time.monotonic()
            self._heard()
        elif words[0] == "ended":
            self._unanswered = -math.inf  # it is busy with the rest, for as long as that takes whoever reads it
        elif words[0] == "exit":
            status, stdout, stderr, files, tar = map(int, words[1:])
            if tar:
                say(f"not all of /out could be brought back: tar ended with status {tar}")
            self._running = False
            self._deadlines.pop("silence", None)
            self._result = status, {"stdout": stdout, "stderr": stderr, "files": files}

    def _request(self) -> None:
        """Tell the agent what to run."""
        command = self._command
        for argument in command.argv:
            self._control.say("arg", os.fsencode(argument))
        for name, value in command.env.items():
            self._control.say("env", os.fsencode(f"{name}={value}"))
        self._control.say("cwd", os.fsencode(command.cwd))
        if self._terminal.present:
            self._control.say("tty", *self._terminal.size())
            if not os.isatty(STDERR):
                self._control.say("split-stderr")
        if command.archive is not None:
            self._control.say("files")
        self._control.say("go")

    def _on_signal(self, number: int) -> None:
        """Pass the first signal on to the command; a second one ends everything, and so does any before it runs."""
        if number == signal.SIGWINCH:
            if self._running and self._terminal.present:
                self._control.say("size", *self._terminal.size())
        elif number in FORWARDED:
            if not self._running or self._signalled:
                raise _Ended(128 + number)
            self._signalled = number
            self._control.say("signal", number)
            if number in (signal.SIGTERM, signal.SIGHUP):
                self._deadlines["grace"] = time.monotonic() + GRACE_SECONDS

    def _beat(self) -> None:
        """Send a word, if it is time to and the last one has gone."""
        if self._next_beat <= time.monotonic():
            if self._unanswered >= MOST_UNANSWERED:
                self._give_up(f"the emulated host has not answered for {MOST_UNANSWERED * BEAT_SECONDS:g} s")
            self._next_beat = time.monotonic() + BEAT_SECONDS
            self._unanswered += 1
            if self._control.has_sent_all:
                self._control.say("beat")

    def _heard(self) -> None:
        """It has said something, and may be silent for as long again."""
        if self._command.silence is not None:
            self._deadlines["silence"] = time.monotonic() + self._command.silence

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        passed = [name for name, deadline in self._deadlines.items() if deadline <= now]
        if "timeout" in passed:
            self._give_up(f"the command did not end within {self._command.timeout:g} s")
        if "silence" in passed:
            self._give_up(f"the command has printed nothing for {self._command.silence:g} s")
        if "grace" in passed:
            raise _Ended(128 + self._signalled)
        if passed:
            raise self._failure(f"the emulated host was not up after {BOOT_SECONDS:g} s")

    def _give_up(self, text: str) -> NoReturn:
        """End with a timeout's status; the kernel's log may tell why it came to that."""
        self._terminal.restore()
        failure = self._failure(text)
        say(str(failure))
        if failure.log:
            print(failure.log, file=sys.stderr, flush=True)
        raise _Ended(TIMED_OUT)

    def _on_log(self) -> None:
        data = self._machine.read_log()
        if self._command.verbose and data:
            newline = "\r\n" if self._terminal.present else "\n"
            sys.stderr.write(data.decode(errors="replace").replace("\r", "").replace("\n", newline))
            sys.stderr.flush()
        if not data and self._result is None:
            raise self._failure("the emulated host ended before the command did")

    def _failure(self, text: str) -> HostCannotError:
        """Return the error that says `text` and shows the end of the log, unless all of it was shown already."""
        log = "" if self._command.verbose else self._machine.log_tail().strip()
        return HostCannotError(f"{text}; the end of its log follows" if log else text, log)

    def _check_end(self) -> None:
        if self._result is None:
            return
        status, totals = self._result
        if all(outlet.drained(totals[name]) for name, outlet in self._outlets.items()):
            if any(outlet.received < totals[name] for name, outlet in self._outlets.items()):
                raise self._failure("the emulated host ended before all output had come")
            raise _Ended(status)

    def _print_times(self) -> None:
        for (_, before), (name, after) in zip(self._times, self._times[1:], strict=False):
            say(f"{name} after {after - before:.1f} s")


def _wake(*_: object) -> None:
    """Handle a signal by letting its number into the wake-up socket."""

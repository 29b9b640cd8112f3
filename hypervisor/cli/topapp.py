"""`hv top` on a terminal: keys and answers in, screens out."""

from __future__ import annotations

import os
import selectors
import signal
import time
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live

from hypervisor.cli.keyboard import ESCAPE_SECONDS, Keyboard, KeyReader
from hypervisor.cli.topscreen import MachineState, View, draw, exit_rows, machine_rows
from hypervisor.profile.live_client import Machines, no_such_machine
from hypervisor.profile.rates import History, exit_rates, machine_rates

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Samples", "TopApp"]

FIRST_SECONDS: Final = 0.3
"""The second look comes soon: there are no rates before it."""
LEAST_NS: Final = 50_000_000
"""Answers that are closer together are the same one."""
PATIENCE_SECONDS: Final = 2.0
GATHER_SECONDS: Final = 0.2
"""A screen is drawn when all have answered, or after this time."""
MOST_HISTORIES: Final = 4096
NS: Final = 1_000_000_000


class Samples:
    """What machines have answered, made into rates.

    Attributes:
        states: by machine.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self.states: dict[str, MachineState] = {}
        self._last: dict[str, dict[str, Any]] = {}
        self._last_exits: dict[str, dict[str, Any]] = {}

    def take(self, name: str, answer: dict[str, Any]) -> None:
        """Take an answer; another machine under the same name begins anew."""
        if "error" in answer:
            self.states.setdefault(name, MachineState()).trouble = "no data"
            return
        last = self._last.get(name)
        if last is not None and last["id"] != answer["id"]:
            self.forget(name)
            last = None
        state = self.states.setdefault(name, MachineState())
        state.trouble = ""
        if last is None:
            self._last[name] = answer
        elif answer["uptime_ns"] - last["uptime_ns"] >= LEAST_NS:
            state.rates = machine_rates(last, answer)
            end = answer["uptime_ns"] / NS
            state.history.add(last["uptime_ns"] / NS, end, state.rates.exits_per_s)
            self._last[name] = answer
        if "exits" in answer:
            self._take_exits(name, state, answer)

    def _take_exits(self, name: str, state: MachineState, answer: dict[str, Any]) -> None:
        last = self._last_exits.get(name)
        if last is None or answer["uptime_ns"] - last["uptime_ns"] >= LEAST_NS:
            self._last_exits[name] = answer
        if last is None or self._last_exits[name] is last:
            return
        state.exits = exit_rates(last, answer)
        start, end = last["uptime_ns"] / NS, answer["uptime_ns"] / NS
        for one in state.exits[:MOST_HISTORIES]:
            state.exit_histories.setdefault(one.key, History()).add(start, end, one.per_s)

    def forget_exits(self, name: str) -> None:
        """Forget what exits there were: what comes next is not their continuation."""
        self._last_exits.pop(name, None)

    def forget(self, name: str) -> None:
        """Forget a machine."""
        for known in (self.states, self._last, self._last_exits):
            known.pop(name, None)


class TopApp:
    """The live screen; `run` shows it until its user has seen enough."""

    HANDLED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH)

    def __init__(self, machine: str | None, interval: float) -> None:
        """Show all machines, or the exits of one; raises ConfigError if there is no such machine."""
        self._console = Console()
        encoding = (self._console.encoding or "").lower()
        self._view = View(machine=machine, interval=interval, ascii_only=not encoding.startswith("utf"))
        self._samples = Samples()
        self._selector = selectors.DefaultSelector()
        self._machines = Machines(self._selector, self._take)
        self._keys = KeyReader()
        self._caught: list[int] = []
        self._status: int | None = None
        self._dirty = True
        self._asked_at: dict[str, float] = {}
        self._machines.look()
        if machine is not None and machine not in self._machines.links:
            raise no_such_machine(machine, list(self._machines.links))

    def run(self) -> int:
        """Show it until the user quits or a signal comes; return the exit status."""
        saved = {number: signal.signal(number, self._note) for number in self.HANDLED}
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        old_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        try:
            self._selector.register(read_end, selectors.EVENT_READ, lambda: os.read(read_end, 512))
            with Keyboard(0) as self._keyboard:
                self._selector.register(0, selectors.EVENT_READ, self._type)
                while self._status is None:
                    self._show()
            return self._status
        finally:
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in saved.items():
                signal.signal(number, handler)
            self._machines.close()
            self._selector.close()
            os.close(read_end)
            os.close(write_end)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._caught.append(number)

    def _show(self) -> None:
        """Have the screen until the end, or until Ctrl-Z; then it is the shell's until that lets us go on."""
        with Live(console=self._console, screen=True, auto_refresh=False, redirect_stdout=False) as live:
            is_suspended = self._turn(live)
        if is_suspended:
            self._keyboard.leave()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._keyboard.enter()
            self._dirty = True

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _turn(self, live: Live) -> bool:
        """Serve keys, answers and the clock; return True for Ctrl-Z, False for the end."""
        looked = time.monotonic()
        self._look(looked)
        next_look = looked + min(FIRST_SECONDS, self._view.interval)
        while True:
            now = time.monotonic()
            if now >= next_look:
                self._look(now)
                looked, next_look = now, max(next_look + self._view.interval, now + self._view.interval / 2)
            is_gathering = self._machines.are_waiting and now < looked + GATHER_SECONDS
            if self._dirty and not is_gathering:
                self._draw(live)
            until = looked + GATHER_SECONDS if is_gathering else next_look
            if self._keys.is_waiting:
                until = min(until, now + ESCAPE_SECONDS)
            events = self._selector.select(max(until - now, 0))
            for key, _ in events:
                key.data()
            if not events and self._keys.is_waiting:
                self._press(self._keys.flush())
            if self._obey_signals():
                return True
            if self._status is not None:
                return False

    def _obey_signals(self) -> bool:
        """Do what signals ask for; return whether the screen is to be left for the shell."""
        caught, self._caught = self._caught, []
        for number in caught:
            if number == signal.SIGTSTP:
                return True
            if number == signal.SIGWINCH:
                self._dirty = True
            elif self._status is None:
                self._status = 128 + number
        return False

    def _look(self, now: float) -> None:
        """Look for machines and ask them."""
        self._machines.look()
        here = self._machines.links
        for name in list(self._samples.states):
            if name not in here and name != self._view.machine:
                self._samples.forget(name)
        for name, link in here.items():
            state = self._samples.states.setdefault(name, MachineState())
            if not link.is_waiting:
                self._asked_at[name] = now
            elif now - self._asked_at[name] > PATIENCE_SECONDS:
                state.trouble = "silent"
        self._machines.ask(lambda name: "exits" if name == self._view.machine else "summary")
        machine = self._view.machine
        if machine is not None and machine not in self._machines.links:
            self._samples.states.setdefault(machine, MachineState()).trouble = "has ended"
        self._dirty = True

    def _take(self, name: str, answer: dict[str, Any]) -> None:
        self._samples.take(name, answer)
        self._dirty = True

    def _draw(self, live: Live) -> None:
        self._dirty = False
        self._view.clock = time.strftime("%H:%M:%S")
        width, height = self._measure()
        live.update(Group(*draw(self._view, self._samples.states, width, height)), refresh=True)

    def _measure(self) -> tuple[int, int]:
        """Return the terminal's columns and lines; rich would believe COLUMNS and LINES, which may be stale."""
        try:
            width, height = os.get_terminal_size(1)
        except OSError:
            width = height = 0
        if width > 0 and height > 0:
            self._console.size = ConsoleDimensions(width, height)
        return self._console.size

    # --- keys ---------------------------------------------------------------------------------------------------------

    def _type(self) -> None:
        data = self._keyboard.read()
        if not data:  # the terminal is gone
            self._status = 0
            self._selector.unregister(0)
        self._press(self._keys.feed(data))

    def _press(self, keys: list[str]) -> None:
        for key in keys:
            self._dirty = True
            if key in {"q", "Q", "end of file"}:
                self._status = 0
            elif key == "interrupt":
                self._status = 130
            elif self._view.shows_help:
                self._view.shows_help = False
            elif key in {"?", "h"}:
                self._view.shows_help = True
            else:
                self._use_table(key)

    def _use_table(self, key: str) -> None:
        view = self._view
        table, columns = view.table
        if key == "s":
            names = [column.name for column in columns if column.sort_name]
            table.sort = names[(names.index(table.sort) + 1) % len(names)]
            table.is_reversed = False
        elif key == "r":
            table.is_reversed = not table.is_reversed
        elif key in {"enter", "esc"}:
            self._change_view(key)
        else:
            self._select(key)

    def _rows(self) -> list[Any]:
        """Return the keys of the rows that are shown, in order."""
        if self._view.machine is None:
            return [name for name, _ in machine_rows(self._view, self._samples.states)]
        state = self._samples.states.get(self._view.machine, MachineState())
        return [one.key for one in exit_rows(self._view, state)]

    def _select(self, key: str) -> None:
        table, _ = self._view.table
        rows = self._rows()
        page = max(self._measure()[1] - 4, 1)
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -page, "page down": page}
        steps |= {"home": -len(rows), "end": len(rows)}
        if rows and key in steps:
            at = rows.index(table.selected) if table.selected in rows else 0
            table.selected = rows[min(max(at + steps[key], 0), len(rows) - 1)]

    def _change_view(self, key: str) -> None:
        view = self._view
        if key == "esc":
            if view.machine is not None:
                view.machines.selected = view.machine
                view.machine = None
        elif view.machine is None and (rows := self._rows()):
            chosen = view.machines.selected if view.machines.selected in rows else rows[0]
            view.machine = chosen
            view.exits.selected = None
            self._samples.forget_exits(chosen)
            self._machines.ask(lambda name: "exits" if name == chosen else None)

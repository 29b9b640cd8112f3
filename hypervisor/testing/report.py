"""What a failing test tells of its guest: sections of the report, and files that are kept."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Final

from hypervisor.kvm.vcpu import exit_name
from hypervisor.testing import stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from hypervisor.kvm.vcpu import ExitRecord
    from hypervisor.profile.exits import ExitRow
    from hypervisor.testing.guest import GuestMachine

__all__ = ["Report", "folder_of"]

CONSOLE_LINES: Final = 25
DMESG_LINES: Final = 25
DMESG_SECONDS: Final = 60.0
"""The guest is asked for some seconds; then its memory is searched, which takes long on an emulated host."""
TOP_EXITS: Final = 10
LAST_EXITS: Final = 12
STACK_LINES: Final = 40
MAX_NAME: Final = 120
NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_.,=+-]+")
ACCESSES: Final = {1: ("io", "in"), 2: ("io", "out"), 3: ("mmio", "in"), 4: ("mmio", "out")}
"""Kinds of access as runloop.h numbers them."""


class Report:
    """One guest of one failed test.

    Attributes:
        sections: title and text of each, for the terminal and for JUnit.
        cause: one line; None where the guest is not to blame.
    """

    def __init__(self, guest: GuestMachine, folder: str, *, keep_snapshot: bool = False) -> None:
        """Ask the guest, its machine and its memory; write what they say to `folder`, too.

        Args:
            guest: not closed yet.
            folder: made if need be.
            keep_snapshot: whether to save the machine there as well.
        """
        self._guest = guest
        self._folder = folder
        self._notes: list[str] = []
        self.sections: list[tuple[str, str]] = []
        self.cause = None if guest.failure is None else str(guest.failure)
        whole = guest.failure is not None
        dmesg = self._try(lambda: _within(DMESG_SECONDS, guest.dmesg), "the kernel's log")  # the guest may still run
        machine = guest.machine
        if machine.outcome is None:
            self._try(guest.pause, "the pause")
        console = self._console()
        exits = self._try(lambda: "\n".join(self._exits()), "the exits")
        calls = self._try(lambda: "\n".join(self._calls()), "the stack") if whole else ""
        death = self._try(self._postmortem, "the registers")
        self._write("console.log", guest.watch.boot_log + bytes(guest.watch.log))
        self._write("dmesg.txt", dmesg)
        self._write("exits.txt", exits)
        self._write("postmortem.txt", "\n\n".join(part for part in (self.cause, death, calls) if part))
        if keep_snapshot:
            self._try(self._save, "the snapshot")
        if whole:
            self._add("stack", calls, STACK_LINES, first=True)
            self._add("machine", death if machine.outcome is not None else "", STACK_LINES, first=True)
        self._add("console", console, CONSOLE_LINES)
        if whole:
            self._add("exits", exits, TOP_EXITS + LAST_EXITS + 3, first=True)
            self._add("dmesg", dmesg, DMESG_LINES)
        self._summarise()

    def _summarise(self) -> None:
        lines = [self.cause or "the guest was alive and well"]
        lines += [f"kept in {self._folder}: {', '.join(sorted(os.listdir(self._folder)))}", *self._notes]
        self.sections.insert(0, (self._title("failure" if self.cause else "files"), "\n".join(lines)))

    def _title(self, what: str) -> str:
        return f"{self._guest.name} {what}" if self._guest.name != "guest" else f"guest {what}"

    def _add(self, what: str, text: str, most: int, *, first: bool = False) -> None:
        """Add a section of the last lines, or of the first ones."""
        lines = text.rstrip().splitlines()
        if not lines:
            return
        left = len(lines) - most
        if left > 0:
            note = f"... {left} lines more in the files"
            lines = [*lines[:most], note] if first else [note, *lines[-most:]]
        self.sections.append((self._title(what), "\n".join(lines)))

    def _try(self, get: Callable[[], str | None], what: str) -> str:
        """Return what `get` does; a guest that failed may have left anything, and one gap shall not cost the rest."""
        try:
            return get() or ""
        except Exception as error:  # noqa: BLE001 - see above
            self._notes.append(f"{what} could not be had: {type(error).__name__}: {error}")
            return ""

    def _write(self, name: str, data: str | bytes) -> None:
        if not data:
            return
        raw = data if isinstance(data, bytes) else data.encode(errors="backslashreplace") + b"\n"
        os.makedirs(self._folder, exist_ok=True)
        with open(os.path.join(self._folder, name), "wb") as file:
            file.write(raw)

    # --- what is told -------------------------------------------------------------------------------------------------

    def _console(self) -> str:
        self._guest.console.pump()
        watch = self._guest.watch
        text = (bytes(watch.log) or watch.boot_log).decode(errors="backslashreplace").replace("\r\n", "\n")
        return "".join(
            one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text
        )

    def _calls(self) -> Iterator[str]:
        machine = self._guest.machine
        names = stack.names_of(machine)
        yield from stack.lines(machine, names)

    def _postmortem(self) -> str:
        outcome = self._guest.machine.outcome
        if outcome is not None:
            return "\n".join(part for part in (f"the machine ended: {outcome.message}", outcome.detail) if part)
        lines = []
        for vcpu in self._guest.vcpus:
            registers = vcpu.registers
            lines.append(f"vCPU {vcpu.index}")
            names = list(registers)
            rows = [names[at : at + 4] for at in range(0, len(names), 4)]
            lines += ["  ".join(f"{name:6} {registers[name]:016x}" for name in row) for row in rows]
        return "\n".join(lines)

    def _exits(self) -> Iterator[str]:
        exits = self._guest.exits.layer("user").merged()
        yield f"{exits.count} exits to hv:"
        counts: Counter[str] = Counter()
        for row in exits:
            counts[row.name] += row.count
        for name, count in counts.most_common(TOP_EXITS):
            yield f"  {count:>9}  {name}"
        names = {(row.reason, row.address, row.direction): row for row in self._guest.machine.exits.layer("user")}
        for vcpu in self._guest.vcpus:
            recent = _runs(vcpu.handle.recent_exits, names)
            if recent:
                yield f"the last exits of vCPU {vcpu.index}, oldest first:"
                yield from recent[-LAST_EXITS:]

    def _save(self) -> str:
        self._guest.machine.save(os.path.join(self._folder, "snapshot"))
        return ""


def _runs(recent: Sequence[ExitRecord], rows: dict[tuple[str, int | None, str | None], ExitRow]) -> list[str]:
    """Return exits by name, like ones that follow each other counted together."""
    names = []
    for record in recent:
        reason, direction = ACCESSES.get(record.kind, ("", ""))
        row = rows.get((reason, record.address, direction))
        if row is not None:
            names.append(row.name)
        else:
            names.append(f"{reason} {record.address:#x} {direction}" if reason else exit_name(record.reason))
    lines = []
    for name, group in groupby(names):
        times = len(list(group))
        lines.append(f"  {name}{f' ({times} times)' if times > 1 else ''}")
    return lines


def _within(seconds: float, get: Callable[[], str]) -> str:
    """Return what `get` does, in a thread of its own: a test that was interrupted may have left any lock taken."""
    results: list[str] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(get())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            failures.append(error)

    thread = threading.Thread(target=run, name="hv-guest-report", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"not there after {seconds:g} s")
    return results[0]


def folder_of(root: str, test: str, guest: str, *, anew: bool = False) -> str:
    """Return the folder for a guest's files, empty.

    Args:
        root: the folder for those of all tests.
        test: the test's node id.
        guest: the guest's name; the only one of a test is called "guest", and its files lie in the test's own folder.
        anew: whether to remove what an earlier run of the test left.
    """
    name = NOT_IN_NAMES.sub("-", test.replace("::", "--").replace("/", "-")).strip("-.")[-MAX_NAME:]
    folder = os.path.join(root, name)
    if anew:
        shutil.rmtree(folder, ignore_errors=True)
    if guest != "guest":
        folder = os.path.join(folder, NOT_IN_NAMES.sub("-", guest))
    os.makedirs(folder, exist_ok=True)
    ignore = os.path.join(root, ".gitignore")
    if not os.path.exists(ignore):
        with open(ignore, "w", encoding="utf-8") as file:
            file.write("# made by pytest's plugin trapvisor\n*\n")
    return folder

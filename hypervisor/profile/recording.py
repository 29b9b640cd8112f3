"""Writes a machine's profile file: `Machine.record` makes one, before the vCPUs run."""

from __future__ import annotations

import base64
import json
import os
import time
import zlib
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from hypervisor import __version__
from hypervisor.kvm.recorder import TraceFile
from hypervisor.profile.fileformat import MAGIC, VERSION, pack_row
from hypervisor.profile.kernelexits import KernelExits
from hypervisor.profile.names import GuestNames

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hypervisor.eventloop import EventLoop
    from hypervisor.kvm import Vm
    from hypervisor.memory import GuestMemory
    from hypervisor.profile.live import LiveExits
    from hypervisor.vcpu import Vcpu

__all__ = ["Recording"]

NS: Final = 1_000_000_000
LONGEST_REST: Final = 60


class Recording:
    """A profile file that grows while the machine runs.

    The trace is written by a thread in C. This class adds what only Python knows: names, marks and, now and then, all
    counts, so that a run that is killed leaves them behind too.
    """

    def __init__(  # noqa: PLR0913 - a recording is of all these
        self,
        path: str,
        *,
        vcpus: Sequence[Vcpu],
        vm: Vm,
        memory: GuestMemory,
        symbols: str | None,
        is_linux: bool,
        loop: EventLoop,
        facts: Mapping[str, Any],
        every: int,
        trace: bool,
        kernel: bool,
    ) -> None:
        """Make the file.

        Args:
            path: of the file.
            vcpus: none of them runs yet.
            vm: the machine's.
            memory: the guest's RAM, in which its kernel's own symbols and processes are looked for at the end.
            symbols: a file of symbols, or None.
            is_linux: whether the guest is a Linux kernel.
            loop: whose thread does the work that returns now and then.
            facts: for `Profile.info`.
            every: sample RIP and CR3 at one exit in so many; 0: at none.
            trace: whether to write down every single exit.
            kernel: whether to have the exits counted that KVM handles itself.

        Raises:
            HostError: the file cannot be made.
        """
        self.path = path
        self._vcpus = vcpus
        self._vm = vm
        self._memory = memory
        self._symbols = symbols
        self._is_linux = is_linux
        self._facts = dict(facts)
        self._every = every if trace else 0
        self._trace = trace
        self._file = TraceFile(path, MAGIC)
        self._kernel, self._notes = _kernel_exits(vcpus) if kernel else (None, [])  # after what may fail
        self._named: set[tuple[int, int]] = set()
        self._rest = 1
        self._alarm = loop.alarm(self._on_alarm)

    def begin(self, exits: LiveExits) -> None:
        """Record from now on: the vCPUs are about to run. `exits` is where counts and names come from."""
        self._exits = exits
        head = {
            "version": VERSION,
            "info": self._facts | {"hv": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds")},
            "tick": exits.clock.start_tick,
            "khz": exits.clock.khz,
            "reasons": exits.reasons,
            "every": self._every,
            "trace": self._trace,
        }
        self._write("HEAD", head)
        for vcpu in self._vcpus:
            vcpu.handle.sample_places(self._every)
        if self._trace:
            self._file.start([vcpu.handle for vcpu in self._vcpus])
        exits.on_mark = self._on_mark
        self._alarm.set(time.monotonic_ns() + NS)

    def _write(self, kind: str, value: object) -> None:
        self._file.write(kind, json.dumps(value, separators=(",", ":")).encode())

    def _on_alarm(self) -> None:
        self.checkpoint()
        self._rest = min(self._rest * 2, LONGEST_REST)
        if not self._file.error:
            self._alarm.set(time.monotonic_ns() + self._rest * NS)

    def checkpoint(self) -> None:
        """Write what has been counted so far, and the names of what is new in it."""
        for index, vcpu in enumerate(self._vcpus):
            rows = vcpu.handle.recorded_rows()
            self._write_names(rows)
            self._file.write("SUMM", zlib.compress(rows, 1), index)

    def _write_names(self, rows: bytes) -> None:
        names = []
        for row in self._exits.rows_in(rows):
            key = row.kind, row.address
            if key not in self._named and self._exits.has_name(*key):
                self._named.add(key)
                names.append([*key, *self._exits.name(*key)])
        if names:
            self._write("NAME", names)

    def _on_mark(self, name: str, at_ns: int, packed: Sequence[bytes]) -> None:
        rows = [base64.b64encode(data).decode("ascii") for data in packed]
        self._write("MARK", {"name": name, "at_ns": at_ns, "rows": rows})

    def finish(self, outcome: str) -> str:
        """Complete the file; the vCPUs have ended. Returns what its user must know, an empty text when all is well."""
        self._alarm.set(None)
        wall_ns = self._exits.clock.now_ns()
        dropped = self._file.stop()
        self.checkpoint()
        self._write("KVMS", self._exits.counters(self._vm))
        if self._kernel is not None:
            self._write("KERN", [pack_row(row) for row in self._kernel.read()])
        if self._every:
            self._file.write("SYMS", self._names().to_bytes())
        tail = {
            "wall_ns": wall_ns,
            "tick": self._exits.clock.start_tick + round(wall_ns / self._exits.clock.ns_per_tick),
        }
        self._write("TAIL", tail | {"outcome": outcome, "dropped": dropped, "notes": self._notes})
        error = self._file.error
        self.close()
        if error:
            return f"the profile {self.path} ends early: {os.strerror(error)}"
        if sum(dropped):
            return f"the profile {self.path} lacks {sum(dropped)} single exits: its disk was slow (counts are exact)"
        return ""

    def _names(self) -> GuestNames:
        """Look for names in the guest's memory and in the file that the user named."""
        file = None
        if self._symbols is not None:
            try:
                with open(self._symbols, "rb") as source:
                    file = source.read()
            except OSError as error:
                self._notes.append(f"no names from {self._symbols}: {error.strerror}")
        return GuestNames.of_guest(
            self._memory, is_linux=self._is_linux, file=file, file_name=self._symbols or "the symbols"
        )

    def close(self) -> None:
        """Close the file; the vCPUs have ended."""
        self._file.close()
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None


def _kernel_exits(vcpus: Sequence[Vcpu]) -> tuple[KernelExits | None, list[str]]:
    """Have KVM's own exits counted where the host allows it; return what counts them, and what is to be said of it."""
    kernel, why_not = KernelExits.open(len(vcpus))
    if kernel is None:
        return None, [f"exits that KVM handled itself are not in it: {why_not}"]
    for vcpu in vcpus:
        vcpu.on_thread = partial(kernel.watch, vcpu.index)
    return kernel, []

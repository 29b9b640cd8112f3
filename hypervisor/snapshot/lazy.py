"""Machines that go on from a snapshot before it is unpacked: a page comes when it is touched, the rest in between."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from hypervisor.errors import HostError
from hypervisor.kvm.pager import Pager, open_userfaultfd
from hypervisor.outcome import Outcome, Stop
from hypervisor.snapshot.unpacking import runs_of

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from hypervisor.machine import Machine
    from hypervisor.snapshot.saved import Snapshot

__all__ = ["Unpacking"]


class Unpacking:
    """A process that unpacks the RAM of one machine. A context manager, which ends it unless `serve` was called."""

    def __init__(self, snapshot: Snapshot, *, verify: bool) -> None:
        """Start it; raises HostError where nobody may have a userfaultfd.

        Args:
            snapshot: whose RAM it is.
            verify: compare each chunk with its hash when it is unpacked.
        """
        self._path = os.path.abspath(snapshot.path)
        self._runs = runs_of(snapshot.memory)
        with ExitStack() as stack:
            self._fd = open_userfaultfd()
            stack.callback(os.close, self._fd)
            self._connection, there = socket.socketpair()
            stack.callback(self._connection.close)
            with there:
                words = [str(there.fileno()), self._path, snapshot.id, "verify" if verify else "trust"]
                command = [sys.executable, "-m", "hypervisor.snapshot.unpacking", *words]
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # find what we have found
                    start_new_session=True,  # Ctrl-C is for the machine
                )
            stack.callback(self._end)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def serve(self, machine: Machine) -> None:
        """Have the machine's RAM fetched from here on, until it is closed; before anything touches it.

        If the snapshot proves damaged then, or the process is killed, the machine ends with Stop.LOST.

        Raises:
            HostError: the host cannot.
        """

        def lost(left: int) -> None:
            message = f"{self._path} cannot be unpacked: {left} pages of the guest's memory are missing, it is lost"
            machine.end_wholly(Outcome(Stop.LOST, message=message))

        self._stack.pop_all()
        machine.at_close(self._end)
        pager = Pager(self._fd, self._connection, machine.memory.marks, seconds=None)
        machine.at_close(pager.close)
        pager.begin(self._runs, lost)
        if not pager.take_over():
            raise HostError(f"the process that was to unpack {self._path} has ended")

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

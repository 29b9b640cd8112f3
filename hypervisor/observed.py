"""The half of a machine that is looked at: its exits, its profile, and those who ask from other processes."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final, cast

from hypervisor.errors import ConfigError
from hypervisor.outcome import Stop

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from hypervisor.boot import BootPlan
    from hypervisor.bus import Bus
    from hypervisor.clock import Clock
    from hypervisor.config import MachineConfig
    from hypervisor.console import Console
    from hypervisor.control import Control
    from hypervisor.eventloop import EventLoop
    from hypervisor.kvm import Vm
    from hypervisor.machine import Machine
    from hypervisor.memory import GuestMemory
    from hypervisor.outcome import Outcome
    from hypervisor.profile.exits import Exits
    from hypervisor.profile.live import LiveExits
    from hypervisor.profile.model import Profile
    from hypervisor.profile.recording import Recording
    from hypervisor.requests import Requests
    from hypervisor.vcpu import Vcpu

__all__ = ["Observed"]

MOST_EVERY: Final = (1 << 32) - 1
GIVEN_AWAY: Final = {Stop.MIGRATED, Stop.SUSPENDED}


class Observed:
    """What `Machine` is made of beside its own life; its constructor makes the parts that are named here."""

    config: MachineConfig
    memory: GuestMemory
    vcpus: list[Vcpu]
    console: Console
    loop: EventLoop
    boot_plan: BootPlan
    bus_pio: Bus
    bus_mmio: Bus
    _clock: Clock | None
    _control: Control | None
    _live: LiveExits | None
    _lock: threading.Lock
    _outcome: Outcome | None
    _recording: Recording | None
    _served: Requests | None
    _started: bool
    _symbols: str | None
    _vm: Vm

    @property
    def exits(self) -> Exits:
        """All exits up to now, as a value to query: `machine.exits.pio("uart0").count`.

        It may be asked from the start on, also after `close`.
        """
        return self._exits().exits()

    def _exits(self) -> LiveExits:
        from hypervisor.profile.live import LiveExits  # noqa: PLC0415 - for those who look

        with self._lock:
            if self._clock is None:
                raise ConfigError("the machine has not been started", hint="its exits are counted from then on")
            if self._live is None:
                self._live = LiveExits(self.vcpus, self.bus_pio, self.bus_mmio, self._clock)
            return self._live

    def profile(self) -> Profile:
        """Return where the time went up to now, as reports read it: all that `exits` has, and each vCPU's times."""
        from hypervisor.profile.live import profile_of  # noqa: PLC0415 - for those who look

        return profile_of(self._exits(), self._vm, self._facts())

    def mark(self, name: str) -> bool:
        """Give this moment a name, for `exits.between`; returns False when there are too many marks already."""
        return self._exits().mark(name)

    def mark_by_port(self, port: int) -> None:
        """Let the guest make marks by writing bytes to a port, each called by its decimal value; before `start`."""
        from devices.mark_port import MarkPort  # noqa: PLC0415 - for those who ask

        self.bus_pio.claim(port, 1, MarkPort(lambda value: self.mark(str(value))), "marks")

    def mark_by_text(self, pattern: str) -> None:
        """Make a mark whenever a line of the console matches a regular expression; before `start`.

        It is called what the first group matched, or the whole match without groups.

        Raises:
            ConfigError: it is no regular expression.
        """
        from hypervisor.profile.live import TextMarks  # noqa: PLC0415 - for those who ask

        self.console.listeners.append(TextMarks(pattern, self.mark).take)

    def record(self, path: str, *, every: int = 1, trace: bool = True, kernel: bool = True) -> None:
        """Write a profile to a file while the machine runs; `hypervisor.profile.file.load` reads it. Before `start`.

        Args:
            path: of the file.
            every: sample the place (RIP, CR3) of one exit in so many; 0: of none. It is the instruction that left the
                guest, but after a write that KVM has done already the one behind it: always of memory, of ports on a
                software KVM.
            trace: False: write counts and histograms only, not every single exit.
            kernel: False: do not have the exits counted that KVM handles itself. Where the host allows that (root,
                tracefs) it costs each exit of the guest, those too, two calls of a small program in the host's kernel.

        Raises:
            ConfigError: `every` is out of range, the machine has been started, or is recorded already.
            HostError: the file cannot be made.
        """
        if not 0 <= every <= MOST_EVERY:
            raise ConfigError(f"every is {every}", hint=f"it is 0 to {MOST_EVERY}")
        if self._started or self._recording is not None:
            raise ConfigError("a profile is recorded from the machine's start on, into one file")
        from hypervisor.profile.recording import Recording  # noqa: PLC0415 - for those who ask

        self._recording = Recording(
            path,
            vcpus=self.vcpus,
            vm=self._vm,
            memory=self.memory,
            symbols=self._symbols,
            is_linux=self.boot_plan.is_linux,
            loop=self.loop,
            facts=self._facts(),
            every=every,
            trace=trace,
            kernel=kernel,
        )

    def _facts(self) -> dict[str, object]:
        return {"kernel": self.boot_plan.kind, "cpus": self.config.cpus, "ram_mib": self.config.ram_mib}

    def publish(self, name: str) -> None:
        """Let this user's `hv top`, and `hypervisor.profile.live_client`, find the machine by a name. Before `start`.

        Raises:
            ConfigError: a living machine has this name, or it is none.
            HostError: the host does not let us.
        """
        from hypervisor.control import Control  # noqa: PLC0415 - for those who ask

        kernel = self.config.kernel
        facts = {
            "name": name,
            "pid": os.getpid(),
            "id": f"{os.getpid()}-{time.time_ns()}",
            "kernel": "" if isinstance(kernel, bytes) else os.path.basename(os.fspath(kernel)),
            "cpus": self.config.cpus,
            "ram_mib": self.config.ram_mib,
        }

        def answer(kind: str) -> dict[str, Any]:
            from hypervisor.profile.forms import form  # noqa: PLC0415 - for those who look
            from hypervisor.profile.live import profile_of  # noqa: PLC0415 - the same

            live = self._exits()  # this is the loop's thread, for which a vCPU may be waiting: it waits for none
            return form(kind, live, facts, lambda: profile_of(live, self._vm, self._facts(), wait=False))

        if self._control is not None:
            raise ConfigError(f"the machine is known as {self._control.name!r} already")
        self._control = Control(self.loop, name, answer, self._requests)

    def _requests(self, request: dict[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
        """Have another process's request done."""
        from hypervisor.requests import Requests  # noqa: PLC0415 - for those who ask

        with self._lock:
            if self._served is None:
                self._served = Requests(cast("Machine", self))
        self._served.begin(request, reply)

    def _answer_last(self) -> None:
        """Let whoever had the machine moved or suspended get an answer: when all of it has gone."""
        if self._served is not None and self._outcome is not None and self._outcome.reason in GIVEN_AWAY:
            self._served.finish()
            self.loop.run(lambda: None)  # the answer was on its way to the loop

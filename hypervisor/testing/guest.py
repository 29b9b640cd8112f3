"""The machine that a test gets: a guest that is ready, with what runs in it at hand."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from hypervisor.errors import ConfigError, VmmError
from hypervisor.testing.failures import GuestEnded, GuestFailed
from hypervisor.testing.watch import Watch

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from hypervisor import Console, Machine, MachineConfig, Outcome
    from hypervisor.memory import GuestMemory
    from hypervisor.profile.exits import Exits
    from hypervisor.testing.client import Agent
    from hypervisor.testing.faults import GuestDisk
    from hypervisor.testing.process import Completed, GuestProcess
    from hypervisor.testing.spec import GuestSpec
    from hypervisor.vcpu import Vcpu

__all__ = ["Death", "GuestMachine"]

RUN_SECONDS: Final = 60.0
DMESG_SECONDS: Final = 5.0
CAUSE_SECONDS: Final = 3.0
"""How long the cause of a broken conversation with the guest is waited for: a panic takes two seconds to print."""


class Death:
    """What `GuestMachine.dies` has seen: the guest's failure."""

    def __init__(self) -> None:
        """Nothing has been seen yet."""
        self.failure: GuestFailed | None = None

    def __str__(self) -> str:
        return "the guest lives" if self.failure is None else str(self.failure)


class GuestMachine:
    """A guest for one test.

    Attributes:
        name: what reports call it.
        spec: what was asked for.
        machine: the machine itself, for all that is not here; another one after `power_cut`.
        failure: what has gone wrong with the guest, None while nothing has.
        address: its address on a `guest_network`, "" without one.
        start_seconds: how long it took until the guest was ready for this test.
    """

    def __init__(self, spec: GuestSpec, machine: Machine, agent: Agent | None, *, name: str = "guest") -> None:
        """Wrap a machine and what speaks with its agent."""
        self.name = name
        self.spec = spec
        self.machine = machine
        self.failure: GuestFailed | None = None
        self.address = ""
        self.start_seconds = 0.0
        self.on_failure: Callable[[GuestMachine, GuestFailed], None] = lambda _guest, _failure: None
        """Called once, on the thread that saw it."""
        self.restart: Callable[[GuestMachine, list[str]], None] = _no_restart
        """Boots the machine again on these images of its disks; set by whoever made it, as is `folder`."""
        self.folder = ""
        self.broken: dict[str, GuestDisk] = {}
        self.is_forgiven = False
        self._agent = agent
        self._paused = 0
        self._earlier: Exits | None = None
        self.watch = self._watch(machine)
        self._wire()

    def _watch(self, machine: Machine) -> Watch:
        spec = self.spec
        return Watch(machine, fail_on=spec.fail_on, hang_seconds=spec.hang_seconds, is_booting=spec.has_moment)

    def _wire(self) -> None:
        agent = self._agent
        if agent is not None:
            self.watch.traffic = lambda: agent.received
            self.watch.beat = lambda: agent.get("/proc/uptime")

    def unwatch(self) -> None:
        """Let go of a machine that goes on without this object."""
        self.watch.close()
        if self._agent is not None:
            self._agent.close()

    @property
    def has_agent(self) -> bool:
        """Whether something can be run in the guest."""
        return self._agent is not None

    def replace(self, machine: Machine, agent: Agent | None) -> None:
        """Go on with another machine, the old one being closed."""
        old = self.watch
        self.machine, self._agent, self._paused, self._earlier = machine, agent, 0, None
        self.watch = self._watch(machine)
        self.watch.boot_log = old.boot_log + bytes(old.log)
        self._wire()

    def begin(self, *, anew: bool) -> None:
        """Begin a test: its console, and its exits unless the machine is `anew` its own, count from here."""
        self._earlier = None if anew else self.machine.exits
        self.watch.begin()

    # --- failing ------------------------------------------------------------------------------------------------------

    def look(self, *, last: bool = False) -> None:
        """See whether the guest has failed; the watcher's thread calls it again and again, a test's end once more."""
        if self.failure is None:
            found = self.watch.look(idle=self._paused > 0, last=last)
            if found is not None:
                self.fail(found)

    def fail(self, failure: GuestFailed) -> None:
        """Make `failure` what is wrong with the guest, unless something is already."""
        if self.failure is None:
            self.failure = failure
            self.on_failure(self, failure)  # first: what waits for the agent in the main thread ends by that
            if self._agent is not None:
                self._agent.abort(str(failure))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Blame the guest, and not the line to it, where the guest is what failed."""
        __tracebackhide__ = True
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except (VmmError, OSError) as error:
            if isinstance(error, GuestFailed) or (isinstance(error, VmmError) and self._lives()):
                raise
            self.wait_for_cause()
            if self.failure is not None:
                raise self.failure from error
            outcome = self.machine.outcome
            if outcome is not None:
                raise GuestEnded(f"the guest is over: {outcome.message}") from error
            raise

    def _lives(self) -> bool:
        return self.failure is None and self.machine.outcome is None and self.machine.console.panic is None

    def wait_for_cause(self) -> None:
        """Wait until it is known what the guest has died of, for some seconds."""
        deadline = time.monotonic() + CAUSE_SECONDS
        while self.failure is None and time.monotonic() < deadline:
            self.look()
            if self.machine.outcome is not None and self.machine.console.panic is None:
                return
            time.sleep(0.02)

    @contextmanager
    def dies(self, kind: str | None = None, *, timeout: float = 30) -> Iterator[Death]:
        """Expect the guest to fail inside, as `pytest.raises` expects an exception; it does not fail the test then.

        Args:
            kind: "panic", "oops", "hang" or "death"; None takes any.
            timeout: seconds to wait for it after the last line inside.

        Raises:
            AssertionError: the guest did not fail, or in another way.
        """
        __tracebackhide__ = True
        death = Death()
        try:
            yield death
            deadline = time.monotonic() + timeout
            while self.failure is None and time.monotonic() < deadline:
                time.sleep(0.02)
        except (GuestFailed, GuestEnded) as error:
            self.wait_for_cause()
            if self.failure is None or (isinstance(error, GuestFailed) and error is not self.failure):
                raise
        death.failure = self.failure
        if self.failure is None:
            raise AssertionError(f"the guest did not die in {timeout:g} s")
        if kind is not None and self.failure.kind != kind:
            raise AssertionError(f"the guest's end is no {kind} but: {self.failure}")
        self.is_forgiven = True

    # --- what runs in the guest ---------------------------------------------------------------------------------------

    @property
    def agent(self) -> Agent:
        """What speaks with the guest's agent.

        Raises:
            ConfigError: the guest has none.
        """
        if self._agent is None:
            raise ConfigError(
                "this guest has no agent, so nothing can be run in it",
                hint="Linux guests have one unless the guest mark says agent=False",
            )
        return self._agent

    def run(self, command: str | Sequence[str], *, timeout: float | None = RUN_SECONDS, **how: Any) -> Completed:
        """Run a command in the guest and wait for it.

        Args:
            command: text for the guest's shell, or a program with its arguments.
            timeout: seconds that it has; then it is killed. None: as long as the guest lives.
            how: as `subprocess.run` takes it: `input`, `env`, `cwd`, `check`, `text`; and what `Agent.run` has more.

        Returns:
            `returncode`, `stdout` and `stderr`, as `subprocess.run` gives them.

        Raises:
            CommandError, CommandTimeout: as `subprocess.run` raises CalledProcessError and TimeoutExpired.
            GuestFailed: the guest failed meanwhile.
            GuestEnded: the guest is over.
        """
        __tracebackhide__ = True
        with self._asking():
            return self.agent.run(command, timeout=timeout, **how)

    def popen(self, command: str | Sequence[str], **how: Any) -> GuestProcess:
        """Start a command in the guest; the result is used as a `subprocess.Popen` is. See `Agent.popen`."""
        __tracebackhide__ = True
        with self._asking():
            return self.agent.popen(command, **how)

    def copy_in(self, path: str | os.PathLike[str], guest_path: str) -> None:
        """Copy a file or folder of the host into the guest; a file goes into a `guest_path` that ends with a slash."""
        __tracebackhide__ = True
        with self._asking():
            self.agent.copy_in(path, guest_path)

    def copy_out(self, guest_path: str, path: str | os.PathLike[str], **how: Any) -> None:
        """Copy a file or folder of the guest to the host."""
        __tracebackhide__ = True
        with self._asking():
            self.agent.copy_out(guest_path, path, **how)

    def put(self, data: str | bytes, guest_path: str, *, mode: int | None = None) -> None:
        """Write a file of the guest; the folders above it are made."""
        __tracebackhide__ = True
        with self._asking():
            self.agent.put(data, guest_path, mode=mode, timeout=RUN_SECONDS)

    def get(self, guest_path: str, **how: Any) -> bytes:
        """Return what a file of the guest holds."""
        __tracebackhide__ = True
        with self._asking():
            return self.agent.get(guest_path, **{"timeout": RUN_SECONDS} | how)

    def dmesg(self) -> str:
        """Return the kernel's log; of a guest that cannot answer, what its memory still has of it."""
        if self._agent is not None and self._lives():
            try:
                return self._agent.dmesg(timeout=DMESG_SECONDS)
            except (VmmError, OSError):
                pass
        from hypervisor.testing.kernellog import read_log  # noqa: PLC0415 - only of a guest that is past answering

        return read_log(self.machine)

    def stack(self) -> str:
        """Return where each vCPU is and the calls that led there, by name, a line each; also of a guest that is dead.

        Raises:
            VmmError: it has no kernel whose symbols are found.
        """
        from hypervisor.testing import stack  # noqa: PLC0415 - most tests pass

        return "\n".join(stack.lines(self.machine, stack.names_of(self.machine)))

    # --- the machine --------------------------------------------------------------------------------------------------

    @property
    def console(self) -> Console:
        """The serial console: `expect`, `write`, `output`."""
        return self.machine.console

    @property
    def debug_console(self) -> Console:
        """What the guest writes to port 0xe9."""
        return self.machine.debug_console

    @property
    def exits(self) -> Exits:
        """All exits since the test began, as a value to query: `machine.exits.pio("uart0").count`."""
        exits = self.machine.exits
        return exits if self._earlier is None else exits.since(self._earlier)

    @property
    def vcpus(self) -> list[Vcpu]:
        """The vCPUs."""
        return self.machine.vcpus

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""
        return self.machine.memory

    @property
    def config(self) -> MachineConfig:
        """What the machine was built from."""
        return self.machine.config

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended, None while it goes on."""
        return self.machine.outcome

    def wait(self, timeout: float | None = RUN_SECONDS) -> Outcome:
        """Wait for the end of the run and return how it came; raises TimeoutError."""
        return self.machine.wait(timeout)

    def stop(self, timeout: float = 10.0) -> Outcome:
        """Ask the guest to power off; end it when it has not after `timeout` seconds."""
        return self.machine.stop(timeout)

    def kill(self) -> Outcome:
        """End the guest where it is."""
        return self.machine.kill()

    def pause(self) -> None:
        """Stop all vCPUs between two instructions; a guest that is paused does not count as hung."""
        self._paused += 1
        self.machine.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self.machine.resume()
        self._paused = max(self._paused - 1, 0)

    def disk(self, disk: str | int = 0) -> GuestDisk:
        """Return a disk by its number, or its name such as "blk0"; it can be made to fail.

        Raises:
            ConfigError: there is no such disk.
        """
        from hypervisor.testing.faults import GuestDisk  # noqa: PLC0415 - of the tests that break disks

        return GuestDisk(self, disk)

    def fault(self, disk: str | int, kind: str, **how: Any) -> None:
        """Arm a fault of a disk: `machine.fault("blk0", "write-error", count=1)`; see `GuestDisk.fault`."""
        self.disk(disk).fault(kind, **how)

    def power_cut(self, *, keep: str = "flushed", seed: int = 0, restart: bool = True) -> None:
        """Take the power away where the guest is.

        A disk that was told to `hold_writes` loses what no flush has covered; others have all that they answered.

        Args:
            keep: what is left of writes that are held back: "flushed": none of them; "random": some, and torn ones.
            seed: of what is left to chance.
            restart: whether to boot the guest again, on the disks as they are now; it returns when that is ready.
        """
        from hypervisor.testing.faults import cut_power  # noqa: PLC0415 - as above

        images = cut_power(self, keep=keep, seed=seed, folder=self.folder)
        self._paused = 0
        if restart:
            self.restart(self, images)

    def __repr__(self) -> str:
        state = self.failure or self.machine.outcome or "runs"
        return f"<GuestMachine {self.name}: {self.spec.title()}: {state}>"


def _no_restart(_guest: GuestMachine, _images: list[str]) -> None:
    raise ConfigError("this guest cannot be booted again")

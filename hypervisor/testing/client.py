"""The host's side of the agent: commands and files in a running guest."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, Final, Self

from hypervisor.errors import ConfigError
from hypervisor.testing import protocol, tree
from hypervisor.testing.errors import AgentError
from hypervisor.testing.process import Completed, GuestProcess
from hypervisor.testing.protocol import Flag, Operation
from hypervisor.testing.session import Session
from hypervisor.testing.transport import MachineLine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from hypervisor.machine import Machine
    from hypervisor.testing.transport import Transport

__all__ = ["Agent"]

CONNECT_SECONDS: Final = 60.0
LIMIT: Final = 256 << 20
"""Bytes that a guest may make the host keep for one call, unless it is told otherwise."""
FILE_LIMIT: Final = 16 << 30
"""Bytes that a guest may make the host write to its disk for one call."""
SHELL: Final = "/bin/sh"
MOST_ENTROPY: Final = 4096
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}\Z")
_INTERFACE: Final = re.compile(r"[^/\s=]{1,15}\Z")
_MACHINE_ID: Final = re.compile(r"[0-9a-f]{32}\Z")
_HOSTNAME: Final = re.compile(r"[0-9A-Za-z._-]{1,64}\Z")


class Agent:
    """The agent in a guest. Methods may be called from several threads; commands run side by side.

    The first call waits for the agent, up to a minute; `ready` waits as long as one likes.
    """

    def __init__(self, line: Transport) -> None:
        """Speak over a line; nothing is sent yet."""
        self._line = line
        self._session = Session(line)

    @classmethod
    def of(cls, machine: Machine, name: str = protocol.PORT_NAME) -> Self:
        """Return the agent of a machine that has the port of `hypervisor.testing.port()`.

        Raises:
            ConfigError: it has none.
        """
        return cls(MachineLine(machine, name))

    def close(self) -> None:
        """Let go of the line. What runs in the guest goes on, unheard."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the conversation ---------------------------------------------------------------------------------------------

    def ready(self, timeout: float | None = CONNECT_SECONDS) -> None:
        """Wait until the agent answers.

        Raises:
            AgentError: it has not after `timeout` seconds, or the machine has ended.
        """
        try:
            self._session.ready(None if timeout is None else time.monotonic() + timeout)
        except TimeoutError:
            hint = "does the guest have virtio_console, and was it booted by the kit's initramfs?"
            raise AgentError(f"the guest's agent has not answered after {timeout:g} s", hint=hint) from None

    def resync(self, *, keep: bool = True, timeout: float | None = CONNECT_SECONDS) -> None:
        """Begin the conversation anew: to be called when the guest has been put back or restored. One round trip.

        Args:
            keep: processes of the guest that this host or another one has started go on, unheard, and find the end of
                their input. False: they and their groups are killed.
            timeout: as `ready`.

        Raises:
            AgentError: as `ready`. Calls of other threads that wait for the guest fail with one, too.
        """
        self._session.greet(keep=keep, why="the guest was put back to another moment, without the command")
        self.ready(timeout)

    def abort(self, why: str) -> None:
        """Have every call that waits for the guest, in whatever thread, fail with an AgentError that says why."""
        self._session.abort(why)

    @property
    def received(self) -> int:
        """Bytes that have come from the guest."""
        return self._session.received

    # --- commands -----------------------------------------------------------------------------------------------------

    def popen(
        self,
        command: str | Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        text: bool = True,
        merge: bool = False,
    ) -> GuestProcess:
        """Start a command in the guest; it has pipes to the host as its standard streams, and a session of its own.

        Args:
            command: text for the guest's shell, or a program with its arguments, looked for in PATH.
            env: variables beside PATH and HOME.
            cwd: folder of the guest.
            text: False: streams of bytes.
            merge: standard error goes where standard output goes.

        Raises:
            AgentError: the agent is not there.
            ValueError: the command cannot be sent.
        """
        return self._start(command, env, cwd, text=text, flags=int(Flag.MERGE) if merge else 0)

    def run(  # noqa: PLR0913 - as subprocess.run
        self,
        command: str | Sequence[str | os.PathLike[str]],
        *,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess.run
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        timeout: float | None = None,
        check: bool = False,
        text: bool = True,
        merge: bool = False,
        limit: int = LIMIT,
    ) -> Completed:
        """Run a command in the guest and return how it ended and what it wrote.

        Args:
            command: text for the guest's shell, or a program with its arguments, looked for in PATH.
            input: what it reads; by default it finds the end of its input at once.
            env: variables beside PATH and HOME.
            cwd: folder of the guest.
            timeout: seconds that it has. Then its process group is killed.
            check: raise CommandError when its status is not 0.
            text: False: outputs are bytes.
            merge: standard error goes where standard output goes.
            limit: most bytes of output.

        Raises:
            CommandError, CommandTimeout, OutputLimit: as said.
            GuestRefusal: the guest cannot start it.
            AgentError: the agent is not there.
        """
        flags = (int(Flag.MERGE) if merge else 0) | (0 if input else int(Flag.NO_INPUT))
        process = self._start(command, env, cwd, text=text, flags=flags)
        stdout, stderr = process.communicate(input, timeout, limit=limit)
        completed = Completed(process.args, process.wait(), stdout, stderr)
        if check:
            completed.check_returncode()
        return completed

    def _start(
        self,
        command: str | Sequence[str | os.PathLike[str]],
        env: Mapping[str, str] | None,
        cwd: str,
        *,
        text: bool,
        flags: int,
    ) -> GuestProcess:
        args = command if isinstance(command, str) else [os.fspath(word) for word in command]
        words = [SHELL, "-c", args] if isinstance(args, str) else args
        variables = {"HOME": "/root", "PATH": _PATH} | dict(env or {})
        for name in variables:
            if not name or "=" in name:
                raise ValueError(f"{name!r} is no name of a variable")
        self.ready()
        running = self._session.start(
            Operation.RUN,
            [os.fsencode(word) for word in words],
            folder=os.fsencode(cwd),
            variables=[os.fsencode(f"{name}={value}") for name, value in variables.items()],
            flags=flags,
        )
        running.input_ended = bool(flags & Flag.NO_INPUT)
        return GuestProcess(self._session, running, args, text=text)

    # --- files --------------------------------------------------------------------------------------------------------

    def _work(self, what: str, operation: Operation, *arguments: str, has_input: bool = False) -> GuestProcess:
        """Start a copy of the agent that works on files; `what` names it in messages."""
        self.ready()
        flags = 0 if has_input else int(Flag.NO_INPUT)
        running = self._session.start(operation, [os.fsencode(word) for word in arguments], flags=flags)
        running.input_ended = not has_input
        return GuestProcess(self._session, running, what, text=False)

    @staticmethod
    def _finish(process: GuestProcess) -> None:
        status = process.wait()
        if status:
            raise AgentError(f"{process.args} ended with status {status}")

    def put(self, data: str | bytes, guest_path: str, *, mode: int | None = None, timeout: float | None = None) -> None:
        """Write a file of the guest; the folders above it are made.

        Args:
            data: what it holds afterwards.
            guest_path: where; a link is followed.
            mode: its permissions; by default those of the file before, or 0644.
            timeout: seconds that it may take.

        Raises:
            GuestRefusal: the guest cannot.
            CommandTimeout, AgentError: as `run`.
        """
        bits = "" if mode is None else f"{mode:o}"
        process = self._work(f"writing {guest_path}", Operation.PUT, guest_path, bits, has_input=True)
        process.communicate(data, timeout)
        self._finish(process)

    def get(self, guest_path: str, *, timeout: float | None = None, limit: int = LIMIT) -> bytes:
        """Return what a file of the guest holds; also one without a size, as in /proc.

        Raises:
            GuestRefusal: the guest cannot read it.
            OutputLimit: it has more than `limit` bytes.
            CommandTimeout, AgentError: as `run`.
        """
        process = self._work(f"reading {guest_path}", Operation.GET, guest_path)
        data, _ = process.communicate(None, timeout, limit=limit)
        self._finish(process)
        return bytes(data)

    def copy_in(self, path: str | os.PathLike[str], guest_path: str) -> None:
        """Copy a file, or a folder with all that is in it, to the guest: permissions, symbolic links, any size.

        `guest_path` is what it becomes; a file goes into a `guest_path` that ends with a slash. The folders above are
        made. What is in a folder there already stays, or is written over.

        Raises:
            TreeError, OSError: something cannot be read here.
            GuestRefusal, AgentError: as `put`.
        """
        path = os.fspath(path)
        if guest_path.endswith("/") and not os.path.isdir(path):
            guest_path += os.path.basename(path)
        with self._work(f"copying to {guest_path}", Operation.UNPACK, guest_path, has_input=True) as process:
            try:
                for piece in tree.pack(path):
                    process.stdin.write(piece)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it ended early: why, is told below
            process.communicate()
            self._finish(process)

    def copy_out(self, guest_path: str, path: str | os.PathLike[str], *, limit: int = FILE_LIMIT) -> None:
        """Copy a file, or a folder with all that is in it, from the guest; as `copy_in`, the other way.

        A guest is not trusted: nothing is written outside of `path`, and no more than `limit` bytes.

        Raises:
            TreeError: the guest's copy makes no sense, or is too large.
            OSError: something cannot be written here.
            GuestRefusal, AgentError: as `get`.
        """
        path = os.fspath(path)
        if path.endswith("/") and self.run(["test", "-d", guest_path]).returncode:
            path += os.path.basename(guest_path.rstrip("/"))
        path = os.path.normpath(path)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with self._work(f"copying {guest_path}", Operation.PACK, guest_path) as process:
            try:
                tree.unpack(process.stdout, path, limit=limit)
                rest = process.stdout.read(1)
            except tree.TreeError:
                if not process.stdout.read(1):
                    self._finish(process)  # the guest's reason, if it has one, says more
                raise
            if rest:
                raise tree.TreeError("the guest's copy goes on after its end")
            self._finish(process)

    # --- the guest itself ---------------------------------------------------------------------------------------------

    def dmesg(self, *, timeout: float | None = None) -> str:
        """Return the kernel's log."""
        process = self._work("reading the kernel's log", Operation.KERNEL_LOG, "log")
        data, _ = process.communicate(None, timeout, limit=LIMIT)
        self._finish(process)
        return str(data.decode(errors="replace"))

    def refresh(  # noqa: PLR0913 - what tells two machines apart
        self,
        *,
        mac: Mapping[str, str] | None = None,
        entropy: bytes | None = None,
        machine_id: str | None = None,
        hostname: str | None = None,
        clock: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Make a guest that was restored differ from others of the same snapshot, and tell it the time. One round trip.

        Args:
            mac: addresses by interface: {"eth0": "52:54:00:00:00:01"}.
            entropy: at most 4096 bytes for the kernel's random number generator, which takes them at once.
            machine_id: for /etc/machine-id, 32 hexadecimal digits.
            hostname: the guest's name.
            clock: set its clock to the host's.
            timeout: seconds that it may take.

        Raises:
            ConfigError: a value cannot be.
            GuestRefusal, CommandTimeout, AgentError: as `put`.
        """
        words = _refreshed(mac or {}, entropy, machine_id, hostname)
        if clock:
            words.append(f"clock={time.time_ns()}")
        if not words:
            return
        process = self._work("refreshing the guest", Operation.REFRESH, *words)
        process.communicate(None, timeout, limit=LIMIT)
        self._finish(process)


_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _refreshed(
    mac: Mapping[str, str], entropy: bytes | None, machine_id: str | None, hostname: str | None
) -> list[str]:
    """Return the words that ask for changes, entropy first."""

    def checked(value: Any, pattern: re.Pattern[str], what: str, hint: str) -> str:
        if not isinstance(value, str) or not pattern.match(value):
            raise ConfigError(f"{what} is {value!r}", hint=hint)
        return value

    words = []
    if entropy is not None:
        if not 0 < len(entropy) <= MOST_ENTROPY:
            raise ConfigError(f"{len(entropy)} bytes of entropy", hint=f"1 to {MOST_ENTROPY} can be given at once")
        words.append(f"entropy={entropy.hex()}")
    for interface, address in mac.items():
        name = checked(interface, _INTERFACE, "the interface", "as in eth0")
        words.append(f"mac={name}={checked(address, _MAC, 'mac', 'six bytes as 52:54:00:12:34:56')}")
    if machine_id is not None:
        words.append(f"machine-id={checked(machine_id, _MACHINE_ID, 'machine_id', '32 hexadecimal digits')}")
    if hostname is not None:
        words.append(f"hostname={checked(hostname, _HOSTNAME, 'hostname', 'letters, digits, dots and dashes')}")
    return words

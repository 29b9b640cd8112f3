"""Processes of the guest, as `subprocess` has those of the host."""

from __future__ import annotations

import io
import signal
import time
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.testing.errors import AgentError, CommandError, CommandTimeout, GuestRefusal, OutputLimit, shown, tail

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from hypervisor.testing.session import Running, Session

__all__ = ["Completed", "GuestProcess"]

GRACE: Final = 5.0
"""Seconds that a killed process has to end, before the host stops listening to it."""
LAST_WORDS: Final = 1 << 20
"""Bytes of each output that are kept of a process which had to be killed."""
KILLED: Final = 1
LEFT: Final = 2
STEPS: Final = {
    0: "the agent cannot start {}",
    1: "the agent cannot enter the guest's root folder for {}",
    2: "there is no such folder to start {} in",
    3: "the guest cannot start {}",
}


class Completed(NamedTuple):
    """A command that has ended; as `subprocess.CompletedProcess`.

    Attributes:
        args: the command, as it was given.
        returncode: its status; -N: signal N ended it.
        stdout, stderr: what it wrote: text, or bytes with text=False.
    """

    args: str | Sequence[str]
    returncode: int
    stdout: Any
    stderr: Any

    def check_returncode(self) -> None:
        """Raise CommandError unless the status is 0."""
        if self.returncode:
            raise CommandError(self.args, self.returncode, self.stdout, self.stderr)


class _Output(io.RawIOBase):
    """One output of a guest's process."""

    def __init__(self, process: GuestProcess, stream: int) -> None:
        super().__init__()
        self._process = process
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._process.read_output(self._stream, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Input(io.RawIOBase):
    """The standard input of a guest's process."""

    def __init__(self, process: GuestProcess) -> None:
        super().__init__()
        self._process = process

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[self._process.write_input(rest) :]
        return size

    def close(self) -> None:
        if not self.closed:
            self._process.end_input()
        super().close()


class GuestProcess:
    """Something that runs in the guest. A context manager: leaving it kills what still runs.

    Attributes:
        args: the command, as it was given.
        stdin, stdout, stderr: file objects, of text or of bytes.
    """

    def __init__(self, session: Session, running: Running, args: str | Sequence[str], *, text: bool) -> None:
        self.args = args
        self._session = session
        self._running = running
        self._text = text
        self._words = bytearray()  # what it said to the error stream, of what `communicate` has gathered
        self.stdin: IO[Any] = self._file(_Input(self))
        self.stdout: IO[Any] = self._file(_Output(self, 1))
        self.stderr: IO[Any] = self._file(_Output(self, 2))

    def _file(self, raw: _Input | _Output) -> IO[Any]:
        if isinstance(raw, _Input):
            return io.TextIOWrapper(raw, "utf-8", write_through=True) if self._text else raw  # type: ignore[type-var, return-value]
        buffered = io.BufferedReader(raw, 64 << 10)
        return io.TextIOWrapper(buffered, "utf-8", errors="replace") if self._text else buffered

    # --- for the file objects -----------------------------------------------------------------------------------------

    def read_output(self, stream: int, most: int) -> bytes:
        """Wait for output and return at most `most` bytes of it; none at its end.

        Raises:
            AgentError: the agent has gone.
        """
        running = self._running
        with self._session.changed:
            self._session.wait_for(
                lambda: running.outputs[stream] or stream in running.ended or running.is_over or running.error, None
            )
            if not running.outputs[stream] and running.error is not None and stream not in running.ended:
                raise running.error
            return self._session.take_output(running, stream, most)

    def write_input(self, data: memoryview) -> int:
        """Wait for room, send some of `data`, return how much; BrokenPipeError when the process has ended."""
        return self._session.write(self._running, data, None)

    def end_input(self) -> None:
        """Close the standard input."""
        self._session.end_input(self._running)

    # --- as subprocess.Popen ------------------------------------------------------------------------------------------

    @property
    def returncode(self) -> int | None:
        """The status, or None while it runs; -N: signal N ended it."""
        return self.poll()

    def poll(self) -> int | None:
        """Return the status, or None while it runs.

        Raises:
            GuestRefusal: it could not be started.
            AgentError: the agent has gone, and the status will not come.
        """
        running = self._running
        if running.refusal is not None:
            raise self._refusal(*running.refusal)
        if running.end is not None:
            how, value = running.end
            if how == LEFT:
                raise AgentError(f"{shown(self.args)}: nobody waited for its end")
            return -value if how >= KILLED else value
        if running.error is not None:
            raise running.error
        return None

    def _refusal(self, step: int, errno: int) -> GuestRefusal:
        what = STEPS.get(step)
        if what is None:  # a copy of the agent at work on a file: it has said on which
            where = tail(bytes(self._words + self._running.outputs[2]))
            what = shown(self.args)
            return GuestRefusal(what if not where or what.endswith(where) else f"{what}: {where}", errno)
        return GuestRefusal(what.format(shown(self.args)), errno)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the status.

        Raises:
            TimeoutError: it still runs after so many seconds. It is not killed.
            GuestRefusal, AgentError: as `poll`.
        """
        running = self._running
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._session.changed:
            try:
                self._session.wait_for(lambda: running.end or running.refusal or running.error, deadline)
            except TimeoutError:
                raise TimeoutError(f"{shown(self.args)}: still runs after {timeout:g} s") from None
        status = self.poll()
        if status is None:
            raise AgentError(f"{shown(self.args)}: it neither runs nor has ended")
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the process and its group."""
        self._session.signal(self._running, number)

    def terminate(self) -> None:
        """Send SIGTERM to the process and its group."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process and its group."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Stop listening to it; it goes on in the guest, and its output is closed."""
        self._session.close(self._running)

    def communicate(
        self,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess
        timeout: float | None = None,
        *,
        limit: int | None = None,
    ) -> tuple[Any, Any]:
        """Send `input`, close it, and return all that is written until the end: stdout, stderr.

        Raises:
            CommandTimeout: it was not done after `timeout` seconds; it was killed, with its process group.
            OutputLimit: it wrote more than `limit` bytes; the same.
            GuestRefusal, AgentError: as `poll`.
        """
        waiting = memoryview(input.encode() if isinstance(input, str) else input or b"")
        gathered = {1: bytearray(), 2: self._words}
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._is_done:
                waiting = self._exchange(waiting, gathered, deadline)
                if limit is not None and sum(map(len, gathered.values())) > limit:
                    self._end_by_force(gathered)
                    raise OutputLimit(self.args, limit, *self._out(gathered))  # noqa: TRY301 - nothing is left to end
            self.poll()
        except TimeoutError:
            self._end_by_force(gathered)
            raise CommandTimeout(self.args, timeout or 0, *self._out(gathered)) from None
        except BaseException:
            self._leave()
            raise
        return self._out(gathered)

    @property
    def _is_done(self) -> bool:
        """Whether nothing more will come, and all that came was taken."""
        running = self._running
        return (running.is_over or running.error is not None) and not any(running.outputs.values())

    def _exchange(self, waiting: memoryview, gathered: dict[int, bytearray], deadline: float | None) -> memoryview:
        """Wait until something can be done, do it, and return what input is left."""
        running, session = self._running, self._session
        with session.changed:
            session.wait_for(
                lambda: (
                    any(running.outputs.values())
                    or (waiting and running.input_room)
                    or not (waiting or running.input_ended)
                    or running.is_over
                    or running.error
                ),
                deadline,
            )
            for stream, data in gathered.items():
                data.extend(session.take_output(running, stream))
            if running.end is not None or running.refusal is not None or running.error is not None:
                waiting = waiting[:0]
            elif waiting:
                waiting = waiting[session.feed(running, waiting) :]
        if not waiting:
            self.end_input()
        return waiting

    def _end_by_force(self, gathered: dict[int, bytearray]) -> None:
        """Kill it and hear its last words; what does not end then is left alone."""
        self.kill()
        deadline = time.monotonic() + GRACE
        try:
            while not self._is_done:
                self._exchange(memoryview(b""), gathered, deadline)
                for data in gathered.values():
                    del data[:-LAST_WORDS]
        except (AgentError, TimeoutError):
            pass
        self.close()

    def _leave(self) -> None:
        """Kill it, if it runs, and listen no more."""
        if not self._running.is_over:
            self.kill()
            self.close()

    def _out(self, gathered: dict[int, bytearray]) -> tuple[Any, Any]:
        if self._text:
            return gathered[1].decode(errors="replace"), gathered[2].decode(errors="replace")
        return bytes(gathered[1]), bytes(gathered[2])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

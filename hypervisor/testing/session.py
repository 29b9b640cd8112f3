"""One conversation with an agent: what runs there, by number, and what has come of it.

Everything that comes is checked here against what was asked for. A guest that breaks a rule ends the conversation, and
with it every command that is on its way; the next HELLO begins another.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from hypervisor.testing import protocol
from hypervisor.testing.errors import AgentError
from hypervisor.testing.protocol import Frame, FrameReader, Operation, ProtocolError, Type, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypervisor.testing.transport import Transport

__all__ = ["Running", "Session"]

WINDOW: Final = 256 << 10
"""Bytes of each output that a guest may send before the host has taken them."""
LOOK: Final = 0.25
"""Seconds between looks whether the machine still runs, while an answer is awaited."""
LEAVING: Final = 5.0
"""Seconds that the agent has to confirm that a process was left alone."""
LAST_ID: Final = 0xFFFF_FFFF


class Running:
    """Something that was started in the guest. Its fields belong to the session's lock.

    Attributes:
        outputs: what has come and was not taken yet, by stream.
        ended: streams that have ended.
        end: how and with which number it ended; None while it runs.
        refusal: step and errno, when it could not be started.
        input_room: bytes of standard input that the agent takes.
        error: why nothing more will come.
        closed: nobody wants to hear more.
    """

    def __init__(self, id_: int, input_room: int) -> None:
        self.id: Final = id_
        self.outputs = {1: bytearray(), 2: bytearray()}
        self.allowed = {1: WINDOW, 2: WINDOW}
        self.taken = {1: 0, 2: 0}
        self.ended: set[int] = set()
        self.end: tuple[int, int] | None = None
        self.refusal: tuple[int, int] | None = None
        self.input_room = input_room
        self.input_ended = False
        self.error: AgentError | None = None
        self.closed = False

    @property
    def is_over(self) -> bool:
        """Whether the agent has told all."""
        return self.refusal is not None or (self.end is not None and len(self.ended) == 2)


class Session:
    """The host's end of the line.

    Attributes:
        changed: notified whenever something has come; its lock is the session's.
        welcome: what the agent says of itself; None while it has not answered.
    """

    def __init__(self, line: Transport) -> None:
        """Speak on `line`; nothing is sent yet."""
        self.received = 0
        self.changed = threading.Condition()
        self.welcome: Welcome | None = None
        self._line = line
        self._reader = FrameReader()
        self._running: dict[int, Running] = {}
        self._last_id = 0
        self._greeted = False
        self._keep = True
        self._error: AgentError | None = None
        line.on_data = self._take
        line.on_end = self._line_ended

    # --- the conversation ---------------------------------------------------------------------------------------------

    def greet(self, *, keep: bool, why: str) -> None:
        """Begin anew: what is on its way fails with `why`, what the line holds is dropped."""
        with self.changed:
            self._fail(AgentError(why))
            self._error = None
            self._keep = keep
            self._line.drop()
            self._hello()

    def _hello(self) -> None:
        """Send a HELLO; only the answer to the last one counts."""
        nonce = os.urandom(protocol.NONCE)
        self.welcome = None
        self._greeted = True
        self._reader.expect(nonce)
        self._line.send(protocol.hello(nonce, keep=self._keep))

    def ready(self, deadline: float | None) -> None:
        """Wait until the agent has answered, greeting it if need be.

        Raises:
            AgentError: it cannot.
            TimeoutError: it has not when time.monotonic() has reached `deadline`.
        """
        with self.changed:
            if self.welcome is not None:
                return
            if not self._greeted:
                self._error = None
                self._hello()
            self.wait_for(lambda: self.welcome is not None or self._error is not None, deadline)
            if self.welcome is None:
                raise self._error or AgentError("the agent does not answer")

    def wait_for(self, condition: Callable[[], object], deadline: float | None) -> None:
        """Wait, with the lock held, until `condition` holds.

        Raises:
            AgentError: the machine has ended, or the line.
            TimeoutError: the deadline, by time.monotonic(), was first.
        """
        while not condition():
            left = LOOK if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not self.changed.wait(min(left, LOOK)) and not condition() and (trouble := self._line.trouble()):
                self._fail(AgentError(trouble))
                if not condition():
                    raise AgentError(trouble)

    def _fail(self, error: AgentError) -> None:
        """End the conversation; who waits learns why."""
        self.welcome = None
        self._greeted = False
        self._error = error
        for running in self._running.values():
            running.error = error
        self._running.clear()
        self.changed.notify_all()

    def abort(self, why: str) -> None:
        """End the conversation from this side: who waits for the guest learns why. The next HELLO begins another."""
        with self.changed:
            self._fail(AgentError(why))

    def _line_ended(self) -> None:
        with self.changed:
            self._fail(AgentError(self._line.trouble() or "the line to the agent has ended"))

    # --- to the agent -------------------------------------------------------------------------------------------------

    def start(
        self,
        operation: Operation,
        arguments: Sequence[bytes],
        *,
        folder: bytes = b"/",
        variables: Sequence[bytes] = (),
        flags: int = 0,
    ) -> Running:
        """Start something in the guest, which must be `ready`.

        Raises:
            AgentError: as many run as the agent can, or it is not there.
            ValueError: the texts cannot be sent.
        """
        with self.changed:
            if self.welcome is None:
                raise self._error or AgentError("the agent has not answered yet")
            most = self.welcome.most_processes
            if len(self._running) >= most and any(running.closed for running in self._running.values()):
                with suppress(TimeoutError):  # some of them are about to end
                    self.wait_for(lambda: len(self._running) < most, time.monotonic() + LEAVING)
            if self.welcome is None:
                raise self._error or AgentError("the agent has gone")
            if len(self._running) >= most:
                raise AgentError(f"{most} commands run in the guest already; the agent takes no more at once")
            id_ = self._last_id % LAST_ID + 1
            while id_ in self._running:
                id_ = id_ % LAST_ID + 1
            self._line.send(
                protocol.start(
                    id_,
                    operation,
                    folder=folder,
                    arguments=arguments,
                    variables=variables,
                    flags=flags,
                    window=WINDOW,
                )
            )
            self._last_id = id_
            running = self._running[id_] = Running(id_, self.welcome.input_window)
            return running

    def signal(self, running: Running, number: int) -> None:
        """Send a signal to the process group, if it is not over."""
        with self.changed:
            if running.id in self._running:
                self._line.send(protocol.word(Type.SIGNAL, running.id, number))

    def write(self, running: Running, data: bytes | memoryview, deadline: float | None) -> int:
        """Send some of `data` to its standard input, when there is room, and return how much.

        Raises:
            BrokenPipeError: it has ended.
        """
        with self.changed:
            self.wait_for(lambda: running.input_room or running.end or running.error or running.is_over, deadline)
            if running.error is not None:
                raise running.error
            if running.end is not None or running.is_over or running.input_ended:
                raise BrokenPipeError("the guest's process reads no more")
            return self.feed(running, data)

    def feed(self, running: Running, data: bytes | memoryview) -> int:
        """Send as much of `data` as there is room for; the lock is held."""
        part = bytes(data[: running.input_room])
        for frame in protocol.data_frames(running.id, part):
            self._line.send(frame)
        running.input_room -= len(part)
        return len(part)

    def end_input(self, running: Running) -> None:
        """Close its standard input."""
        with self.changed:
            if not running.input_ended and running.id in self._running:
                self._line.send(protocol.frame(Type.DATA, running.id))
            running.input_ended = True

    def take_output(self, running: Running, stream: int, most: int | None = None) -> bytes:
        """Take what has come of an output, at most `most` bytes, and let the agent send more; the lock is held."""
        held = running.outputs[stream]
        data = bytes(held[:most])
        del held[:most]
        running.taken[stream] += len(data)
        if running.taken[stream] >= WINDOW // 2 and stream not in running.ended and running.id in self._running:
            running.allowed[stream] += running.taken[stream]
            self._line.send(protocol.word(Type.CREDIT, running.id, running.taken[stream], stream))
            running.taken[stream] = 0
        return data

    def close(self, running: Running) -> None:
        """Hear no more of it; if it runs, it goes on."""
        with self.changed:
            running.closed = True
            running.outputs = {1: bytearray(), 2: bytearray()}
            if running.id in self._running:
                self._line.send(protocol.frame(Type.CLOSE, running.id))

    # --- from the agent -----------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """Take what the line brings; whatever it is, nothing is raised."""
        with self.changed:
            self.received += len(data)
            if not self._greeted:
                return
            try:
                for item in self._reader.feed(data):
                    if isinstance(item, Welcome):
                        self._take_welcome(item)
                    else:
                        self._take_frame(item)
            except AgentError as error:
                self._fail(error)
            self.changed.notify_all()

    def _take_welcome(self, welcome: Welcome) -> None:
        if welcome.nonce == protocol.NOBODY:
            self._hello()  # it has begun after our HELLO, which may be lost
        else:
            self.welcome = welcome

    def _take_frame(self, frame: Frame) -> None:
        running = self._running.get(frame.id)
        if running is None:
            raise ProtocolError(f"the agent speaks of command {frame.id}, which does not run")
        if frame.type == Type.DATA:
            self._take_output(running, frame)
        elif frame.type == Type.CREDIT:
            running.input_room += frame.word()
            if self.welcome is None or running.input_room > self.welcome.input_window or frame.stream:
                raise ProtocolError("the agent wants more input than it has room for")
        elif running.end is not None:
            raise ProtocolError("a command of the guest ended twice")
        elif frame.type == Type.EXIT:
            running.end = frame.pair()
        else:
            running.refusal = frame.pair()
        if running.is_over:
            del self._running[running.id]

    @staticmethod
    def _take_output(running: Running, frame: Frame) -> None:
        stream = frame.stream
        if stream not in running.outputs or stream in running.ended:
            raise ProtocolError(f"the agent sends stream {stream}, which has ended or is none")
        if not frame.payload:
            running.ended.add(stream)
            return
        running.allowed[stream] -= len(frame.payload)
        if running.allowed[stream] < 0:
            raise ProtocolError("the agent sends more output than it was asked for")
        if not running.closed:
            running.outputs[stream] += frame.payload

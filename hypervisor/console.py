"""The guest's serial console as the host sees it: what it printed, what is typed at it, what to wait for."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final

from devices.saved import Saved
from hypervisor.errors import VmmError

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping

    from hypervisor.eventloop import EventLoop
    from hypervisor.kvm import ByteRing

KEPT: Final = 1 << 20
"""Bytes of output that are kept for `output` and `expect`; older ones are dropped."""
MAX_PENDING: Final = 1 << 16
"""Bytes of input that wait for the guest to read them; more are refused."""
REST_NS: Final = 4_000_000
"""After output came, the next look at the ring: a thread that woke for each byte would slow the vCPUs down."""
LOW_WATER: Final = MAX_PENDING // 2
TRANSFER: Final = 64
"""Bytes that are offered to a device at a time; a 16550 takes up to 16."""
SETTLE_NS: Final = 50_000_000
"""How often to look whether the guest listens while input waits; it must twice in a row before it gets any."""
PANIC: Final = b"Kernel panic - not syncing"
PANIC_END: Final = b"---[ end Kernel panic"
PANIC_GRACE_NS: Final = 2_000_000_000
"""How long a panicking kernel may take to print the rest."""
LAST_LINES: Final = 15


class ConsoleTimeout(VmmError, TimeoutError):
    """What was expected did not come in time. The message shows the last lines that did.

    Attributes:
        output: everything that came since the last match.
    """

    status = 4

    def __init__(self, wanted: str, seconds: float | None, output: bytes, *, ended: bool) -> None:
        """Say what was waited for and show the end of `output`."""
        lines = output.decode(errors="backslashreplace").splitlines()[-LAST_LINES:]
        why = "the machine ended" if ended else f"it did not come in {seconds:g} s"
        super().__init__("\n".join([f"waited for {wanted} on the console, but {why}; the last lines:", *lines]))
        self.output = output


class Console:
    """One serial console. Any thread may call it.

    Output comes out of the ring that the run loop fills, is kept (the last MiB), and is handed to every listener.
    """

    def __init__(self, ring: ByteRing, loop: EventLoop) -> None:
        """Read from `ring`, on the thread of `loop`."""
        self._ring = ring
        self._loop = loop
        self._drain_lock = threading.Lock()
        self._changed = threading.Condition()
        self._kept = bytearray()
        self._dropped = 0
        self._matched = 0  # position in the whole output up to which `expect` has matched
        self._ended = False
        self._resting = False
        self._rest = loop.alarm(self._on_rest)
        self._panic_alarm = loop.alarm(self._declare_panic)
        self._panic_seen = False
        self._scan_tail = b""
        self._pending = bytearray()
        self._pending_lock = threading.Lock()
        self.listeners: list[Callable[[bytes], None]] = []
        self.on_panic: Callable[[str], None] | None = None
        self.deliver: Callable[[], None] = lambda: None
        """Calls `transfer` with the device's `receive`, under the device's lock."""
        self.ready: Callable[[], bool] = lambda: True
        """Tells whether the guest listens. What is typed before waits: it would be lost when its driver starts."""
        self._settled = False
        self._retry = loop.alarm(self._feed)
        self.on_input_room: Callable[[], None] | None = None
        """Called on the loop's thread when half of the room for input is free again."""
        loop.watch(ring.fileno(), self._on_output)

    # --- output -------------------------------------------------------------------------------------------------------

    def write_from_guest(self, data: bytes) -> None:
        """Take bytes of the device model: the ByteSink of the UART. Never blocks."""
        while True:
            data = data[self._ring.push(data) :]
            if not data:
                return
            self.pump()

    def pump(self) -> bool:
        """Move what is in the ring to where it is read; return whether there was any."""
        moved = False
        with self._drain_lock:
            while data := self._ring.drain():
                moved = True
                self._take(data)
        return moved

    def _on_output(self) -> None:
        self._ring.clear_event()
        self.pump()
        if not self._resting:
            self._resting = True
            self._rest.set(time.monotonic_ns() + REST_NS)

    def _on_rest(self) -> None:
        if self.pump():
            self._rest.set(time.monotonic_ns() + REST_NS)
        else:
            self._resting = False
            self._ring.arm()

    def _take(self, data: bytes) -> None:
        for listener in self.listeners:
            listener(data)
        with self._changed:
            self._kept += data
            excess = len(self._kept) - KEPT
            if excess > 0:
                del self._kept[:excess]
                self._dropped += excess
            self._changed.notify_all()
        self._scan(data)

    def _scan(self, data: bytes) -> None:
        text = self._scan_tail + data
        if not self._panic_seen and PANIC in text:
            self._panic_seen = True
            self._panic_alarm.set(time.monotonic_ns() + PANIC_GRACE_NS)
        if self._panic_seen and PANIC_END in text:
            self._panic_alarm.set(time.monotonic_ns())
        self._scan_tail = text[-len(PANIC) :]

    @property
    def panic(self) -> str | None:
        """The kernel's own words when it panicked on this console, else None."""
        if not self._panic_seen:
            return None
        import re  # noqa: PLC0415 - a console that only passes bytes on needs none

        found = re.search(rb"Kernel panic - not syncing:? ?([^\r\n]*)", self.output)
        return found[1].decode(errors="backslashreplace") if found else ""

    def _declare_panic(self) -> None:
        if self._panic_seen and self.on_panic is not None:
            self.on_panic(self.panic or "")

    @property
    def output(self) -> bytes:
        """What the guest printed, as far as it is kept: the last MiB."""
        self.pump()
        with self._changed:
            return bytes(self._kept)

    def last_lines(self, count: int = LAST_LINES) -> list[str]:
        """Return the last lines of the output, bytes that are no text escaped."""
        return self.output.decode(errors="backslashreplace").splitlines()[-count:]

    def end(self) -> None:
        """Say that no more output will come."""
        self.pump()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def read(self, timeout: float | None = 0) -> bytes:
        """Return the output since the last `read` or `expect`; wait up to `timeout` seconds (None: ever) for some."""
        self.pump()
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._matched < self._position, timeout)
            fresh = bytes(self._kept[max(self._matched - self._dropped, 0) :])
            self._matched = self._position
            return fresh

    @property
    def _position(self) -> int:
        return self._dropped + len(self._kept)

    def expect(self, pattern: str | bytes, timeout: float | None = 30) -> re.Match[bytes]:
        """Wait until the output after the last match matches a regular expression, and return the match.

        Args:
            pattern: searched for in the bytes of the output; a str is encoded as UTF-8. re.MULTILINE is on.
            timeout: seconds to wait; None waits as long as the machine runs.

        Raises:
            ConsoleTimeout: it did not come; the message shows the last lines.
        """
        import re  # noqa: PLC0415 - as above

        raw = pattern.encode() if isinstance(pattern, str) else pattern
        compiled = re.compile(raw, re.MULTILINE)
        deadline = None if timeout is None else time.monotonic() + timeout
        self.pump()
        with self._changed:
            while True:
                start = max(self._matched - self._dropped, 0)
                found = compiled.search(bytes(self._kept[start:]))
                if found:
                    self._matched = self._dropped + start + found.end()
                    return found
                left = None if deadline is None else deadline - time.monotonic()
                if self._ended or (left is not None and left <= 0):
                    raise ConsoleTimeout(repr(pattern), timeout, bytes(self._kept[start:]), ended=self._ended)
                self._changed.wait(left)

    # --- input --------------------------------------------------------------------------------------------------------

    def write(self, data: str | bytes) -> int:
        """Type at the console; returns how many bytes were taken (the rest had no room: 64 KiB wait at most)."""
        raw = data.encode() if isinstance(data, str) else data
        with self._pending_lock:
            accepted = raw[: MAX_PENDING - len(self._pending)]
            self._pending += accepted
        self._loop.call_soon(self._feed)
        return len(accepted)

    @property
    def input_room(self) -> int:
        """How many bytes `write` would take now."""
        return MAX_PENDING - len(self._pending)

    def _feed(self) -> None:
        """Give waiting input to the device, once it is ready for some; on the loop's thread."""
        if not self._pending:
            return
        ready = self.ready()
        if ready and self._settled:
            self.deliver()
        else:  # a driver that is just opening reads and clears its receiver a few times more
            self._settled = ready
            self._retry.set(time.monotonic_ns() + SETTLE_NS)

    def transfer(self, receive: Callable[[bytes], int]) -> None:
        """Hand waiting input to `receive`, which returns how much it took. The device's lock is held."""
        with self._pending_lock:  # nothing else is ever taken while it is held
            chunk = bytes(self._pending[:TRANSFER])
        taken = receive(chunk) if chunk else 0
        with self._pending_lock:
            before = len(self._pending)
            del self._pending[:taken]
        if self.on_input_room is not None and before > LOW_WATER >= before - taken:
            self._loop.call_soon(self.on_input_room)

    # --- saved and loaded ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the input that the guest has not taken, and whether it has been found to listen.

        What it has printed is the host's: all of it has come out of the ring when this returns.
        """
        self.pump()
        with self._pending_lock:
            return {"input": bytes(self._pending), "settled": self._settled}

    def load(self, state: Mapping[str, Any]) -> None:
        """Be the console of a guest in another state: wait with its input, and forget what was printed before.

        Listeners get all that was printed up to now; `output`, `read` and `expect` begin here. A panic before was that
        of another guest. Input that waited is dropped.

        Raises:
            KeyError, TypeError, ValueError: this is no state of a console.
        """
        saved = Saved(state)
        waiting, settled = saved.octets("input", MAX_PENDING), saved.flag("settled")
        saved.end()
        self.pump()
        with self._changed:
            self._kept.clear()
            self._matched = self._dropped
            self._ended = False
        self._panic_seen, self._scan_tail = False, b""
        self._panic_alarm.set(None)
        with self._pending_lock:
            before = len(self._pending)
            self._pending[:] = waiting
        self._settled = settled
        self._retry.set(None)
        self._loop.call_soon(self._feed)
        if self.on_input_room is not None and before > LOW_WATER >= len(waiting):
            self._loop.call_soon(self.on_input_room)

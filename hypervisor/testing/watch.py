"""Watching guests while tests run: lines of the console that mean trouble, the machine's end, no sign of progress."""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Final

from hypervisor.errors import VmmError
from hypervisor.testing.failures import DEATHS, GuestFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypervisor import Machine

__all__ = ["Watch", "Watcher"]

PERIOD: Final = 0.05
"""Seconds between two looks at a machine: what its death costs a test that waits for it."""
OOPS_GRACE: Final = 1.0
"""Seconds that a kernel has to print the rest of an oops."""
OOPS_END: Final = b"---[ end trace"
MAX_LINE: Final = 4096
MAX_LOG: Final = 4 << 20
"""Bytes of a guest's console that are kept for a report."""
STALL: Final = 1.0
"""Seconds without a look after which it was us, and not the guest, that stood still."""
INTERRUPT_FLAG: Final = 1 << 9
HLT: Final = 0xF4
RESET_RIP: Final = 0xFFF0
"""Where a vCPU is that nobody has started yet."""


class Watch:
    """What is known of one guest.

    Attributes:
        log: the console's output since `begin`.
        boot_log: that from the machine's start to the first `begin`.
    """

    def __init__(self, machine: Machine, *, fail_on: Sequence[str], hang_seconds: float, is_booting: bool) -> None:
        """Watch a machine; `beat` and `traffic` are set when it has an agent.

        Args:
            machine: before its start, or standing still.
            fail_on: regular expressions for lines of its console that are a failure.
            hang_seconds: without a sign of progress; 0: for ever.
            is_booting: whether it boots first: until `begin` such lines are none, as a kernel may warn of its platform.
        """
        self._is_booting = is_booting
        self.machine = machine
        self.hang_seconds = hang_seconds
        self.log = bytearray()
        self.boot_log = b""
        self.traffic: Callable[[], int] | None = None
        """How many bytes the agent has sent."""
        self.beat: Callable[[], object] | None = None
        """Asks the agent for a sign of life; returns when it came."""
        self._beating: threading.Thread | None = None
        self._printed = 0
        self._line = b""
        self._pattern = re.compile(b"|".join(b"(?:%s)" % one.encode() for one in fail_on)) if fail_on else None
        self._trouble: str | None = None
        self._trouble_until = 0.0
        self._looked = self._since = self._sampled = time.monotonic()
        self._signs: object = None
        self._registers: object = None
        machine.console.listeners.append(self._listen)

    def begin(self) -> None:
        """A test begins: forget what was."""
        self.machine.console.pump()
        self._is_booting = False
        if not self.boot_log:
            self.boot_log = bytes(self.log)
        self.log = bytearray()
        self._line = b""
        self._trouble = None
        self._signs = self._registers = None
        self._looked = self._since = time.monotonic()

    def close(self) -> None:
        """Listen no more."""
        if self._listen in self.machine.console.listeners:
            self.machine.console.listeners.remove(self._listen)

    def _listen(self, data: bytes) -> None:
        """Take output of the console, on the event loop's thread."""
        self._printed += len(data)
        if len(self.log) < MAX_LOG:
            self.log += data
        if self._pattern is None or self._is_booting:
            return
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[-MAX_LINE:]
        for line in lines:
            if self._trouble is None and self._pattern.search(line):
                self._trouble_until = time.monotonic() + OOPS_GRACE
                self._trouble = _stripped(line)
            elif self._trouble is not None and OOPS_END in line:
                self._trouble_until = 0.0

    # --- looking ------------------------------------------------------------------------------------------------------

    def look(self, *, idle: bool, last: bool = False) -> GuestFailed | None:
        """Return what is wrong with the guest, None while nothing is.

        Args:
            idle: somebody has stopped the guest on purpose: that it stands still means nothing.
            last: there will be no other look: an oops that is still being printed counts.
        """
        if last:
            self.machine.console.pump()
            self._trouble_until = 0.0
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        if idle or gap > STALL:
            self._since = now
        if self.machine.outcome is not None:
            return self._end()
        if self._trouble is not None and now >= self._trouble_until and self.machine.console.panic is None:
            return GuestFailed("oops", f"the guest's kernel reports: {self._trouble}")
        if self.hang_seconds and not idle:
            return self._look_for_hang(now)
        return None

    def _end(self) -> GuestFailed | None:
        try:
            outcome = self.machine.wait(timeout=5)
        except TimeoutError:
            return None  # its vCPUs are on their way out
        except Exception as error:  # noqa: BLE001 - a device model's own fault
            return GuestFailed("death", f"a device failed: {type(error).__name__}: {error}")
        if outcome.reason.name not in DEATHS:
            return None
        return GuestFailed("panic" if outcome.reason.name == "PANIC" else "death", outcome.message)

    def _look_for_hang(self, now: float) -> GuestFailed | None:
        signs = (self._printed, self.traffic() if self.traffic else self._exits())
        if signs != self._signs:
            self._signs, self._since, self._registers = signs, now, None
            return None
        silent = now - self._since
        if silent < self.hang_seconds / 3:
            return None
        if self.beat is not None:
            self._ask()
        elif now - self._sampled >= self.hang_seconds / 12:
            self._sampled = now
            registers = self._still_registers()
            if registers is None or registers != self._registers:
                self._registers, self._since = registers, now - self.hang_seconds / 3
                return None
        if silent < self.hang_seconds:
            return None
        what = "its agent does not answer" if self.beat is not None else "its registers stand still"
        return GuestFailed("hang", f"the guest hangs: no sign of progress for {silent:.0f} s, and {what}")

    def _exits(self) -> int:
        return sum(sum(vcpu.handle.exit_counts.values()) for vcpu in self.machine.vcpus)

    def _ask(self) -> None:
        """Ask the agent for a sign of life unless it has been asked already."""
        if self._beating is not None and self._beating.is_alive():
            return
        self._beating = threading.Thread(target=self._beat, name="hv-guest-beat", daemon=True)
        self._beating.start()

    def _beat(self) -> None:
        try:
            if self.beat is not None:
                self.beat()
        except Exception:  # noqa: BLE001, S110 - no answer is what the silence tells
            pass

    def _still_registers(self) -> object:
        """Return what the vCPUs' registers are, None when all of them wait for an interrupt, as an idle guest's do."""
        found = []
        for vcpu in self.machine.vcpus:
            try:
                registers = vcpu.registers
            except VmmError:
                return None
            is_idle = registers["rflags"] & INTERRUPT_FLAG and self._byte_before(vcpu.index, registers["rip"]) == HLT
            if not is_idle and registers["rip"] != RESET_RIP:
                found.append(sorted(registers.items()))
        return found or None

    def _byte_before(self, index: int, rip: int) -> int | None:
        from hypervisor.testing.stack import virtual_reader  # noqa: PLC0415 - only a guest that stands still

        data = virtual_reader(self.machine, self.machine.vcpus[index].special_registers)(rip - 1, 1)
        return data[0] if data else None


class Watcher:
    """The thread that looks at every guest of a session."""

    def __init__(self) -> None:
        """Start nothing: the thread comes with the first guest."""
        self._lock = threading.Lock()
        self._looks: dict[int, Callable[[], None]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, token: object, look: Callable[[], None]) -> None:
        """Call `look` again and again until `remove(token)`."""
        with self._lock:
            self._looks[id(token)] = look
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hv-guest-watch", daemon=True)
                self._thread.start()

    def remove(self, token: object) -> None:
        """Look no more."""
        with self._lock:
            self._looks.pop(id(token), None)

    def _run(self) -> None:
        while not self._ended.wait(PERIOD):
            with self._lock:
                looks = list(self._looks.values())
            for look in looks:
                look()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


def _stripped(line: bytes) -> str:
    """Return a line of the kernel's log without its time, bytes that are no text escaped."""
    text = line.decode(errors="backslashreplace").strip()
    return re.sub(r"^(?:<\d+>)?\[ *\d+\.\d+\]\s*(?:\[ *[TC]\d+\]\s*)?", "", text)

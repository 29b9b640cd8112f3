"""The way of an exit: KVM_RUN -> reason -> bus -> device -> back."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from hypervisor.errors import KvmError, VmmError
from hypervisor.kvm.vcpu import (
    EXIT,
    EXIT_FAIL_ENTRY,
    EXIT_HLT,
    EXIT_INTERNAL_ERROR,
    EXIT_SHUTDOWN,
    EXIT_SYSTEM_EVENT,
    INTERRUPTED,
    MMIO_READ,
    MMIO_WRITE,
    PIO_IN,
    PIO_OUT,
    SYSTEM_EVENT_RESET,
    SYSTEM_EVENT_SHUTDOWN,
    Segment,
    exit_name,
)
from hypervisor.outcome import Outcome, Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor import kvm
    from hypervisor.bus import Bus

T = TypeVar("T")

POLL_EXITS = 64
SYSTEM_EVENTS = {SYSTEM_EVENT_SHUTDOWN: Stop.POWER_OFF, SYSTEM_EVENT_RESET: Stop.RESET}


class Vcpu:
    """One virtual CPU and the thread that runs it.

    Attributes:
        on_thread: called on the vCPU's own thread, with its id, before it enters the guest for the first time.
    """

    def __init__(self, handle: kvm.Vcpu, ports: Bus, memory: Bus, end: Callable[[Outcome], None]) -> None:
        """Run the vCPU behind `handle`; accesses go to the two buses, the end of the machine to `end`."""
        self.index = handle.index
        self.handle = handle
        self._ports = ports
        self._memory = memory
        self._end = end
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_opening_stats = False
        self._pausing = False
        self._ending = False
        self._parked = False
        self._thread: threading.Thread | None = None
        self.on_thread: Callable[[int], None] = lambda _tid: None

    # --- control, from any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._main, name=f"hv-vcpu{self.index}", daemon=True)
        self._thread.start()

    def request_pause(self) -> None:
        """Ask the vCPU to leave the guest and wait; `wait_parked` tells when it does."""
        with self._changed:
            self._pausing = True
        self.handle.kick()

    def wait_parked(self) -> None:
        """Wait until the vCPU is out of the guest after `request_pause`."""
        with self._changed:
            self._changed.wait_for(lambda: self._parked or not self._is_running())

    def resume(self) -> None:
        """Go on after `request_pause`."""
        with self._changed:
            self._pausing = False
            self._changed.notify_all()

    def request_end(self) -> None:
        """Ask the thread to end."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self.handle.kick()

    def revive(self, *, paused: bool) -> None:
        """Start the thread again after it has ended; the vCPU has been put into another state."""
        self._ending = False
        self._pausing = paused
        self._jobs.clear()
        if paused:
            self.handle.kick()
        self.start()

    def join(self) -> None:
        """Wait for the thread to end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` between two entries of the guest, on the vCPU's own thread, and return what it does."""
        if not self._is_running() or self._thread is threading.current_thread():
            return function()
        result: list[T] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def job() -> None:
            try:
                result.append(function())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                failure.append(error)
            done.set()

        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
        self.handle.kick()
        while not done.wait(0.1):
            if not self._is_running() and not done.is_set():
                return function()  # the thread ended before it came to this job
        if failure:
            raise failure[0]
        return result[0]

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` between two entries of the guest, soon, on the vCPU's own thread, and wait for nothing.

        Called by a device while it answers an access, it runs as soon as the guest has finished that instruction. What
        it raises ends the machine.
        """
        with self._changed:
            self._jobs.append(function)
            self._changed.notify_all()
        self.handle.kick()

    @property
    def registers(self) -> dict[str, int]:
        """The general registers, rip and rflags; a running vCPU leaves the guest for a moment."""
        return self.call(self.handle.registers)

    @property
    def special_registers(self) -> dict[str, int | Segment]:
        """Segment, control and table registers; a running vCPU leaves the guest for a moment."""
        return self.call(self.handle.special_registers)

    def stats(self) -> dict[str, int]:
        """Return KVM's own counters; a running vCPU leaves the guest for a moment at the first call, not later."""
        return self.handle.stats() if self.handle.has_open_stats else self.call(self.handle.stats)

    def open_stats(self) -> bool:
        """Tell whether `stats` would wait for nobody; if not, have the vCPU see to it soon."""
        if self.handle.has_open_stats or not self._is_running():
            return True
        if not self._is_opening_stats:
            self._is_opening_stats = True
            with self._changed:
                self._jobs.append(self._open_stats)
                self._changed.notify_all()
            self.handle.kick()
        return False

    def _open_stats(self) -> None:
        try:
            self.handle.stats()
        except Exception:  # noqa: BLE001, S110 - to be looked at shall not end a machine: nobody gets to know them
            pass

    def is_polling(self, port: int) -> bool:
        """Tell whether the last exits, as far as they are recorded, were nothing but reads of `port`."""
        recent = self.handle.recent_exits
        return len(recent) >= POLL_EXITS and all(r.address == port and r.kind == PIO_IN for r in recent)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        self.handle.attach_thread()
        try:
            self.on_thread(threading.get_native_id())
            outcome = self._run()
            if outcome is not None:
                self._end(outcome)
        except BaseException as error:  # noqa: BLE001 - our own fault, or a device model's: it ends the machine
            self._end(Outcome.fault(error))
        finally:
            self.handle.detach_thread()
            with self._changed:
                self._changed.notify_all()

    def _run(self) -> Outcome | None:
        """Run the guest until it ends the machine (what is returned) or the machine ends this vCPU (None)."""
        enter = self.handle.enter
        handle = self.handle
        ports = self._ports
        memory = self._memory
        reply = 0
        while True:
            wanted = enter(reply)
            kind = wanted & 0xFF
            if kind == PIO_OUT:
                ports.write(wanted >> 16 & 0xFFFF, wanted >> 8 & 0xFF, wanted >> 32)
            elif kind == PIO_IN:
                reply = ports.read(wanted >> 16 & 0xFFFF, wanted >> 8 & 0xFF)
            elif kind == MMIO_READ:
                reply = memory.read(handle.mmio_address, wanted >> 8)
            elif kind == MMIO_WRITE:
                memory.write(handle.mmio_address, wanted >> 8, handle.mmio_value)
            elif kind == INTERRUPTED:
                if self._attend():
                    return None
            elif kind == EXIT:
                return self._last_exit(wanted >> 8)
            else:
                raise KvmError("KVM_RUN", wanted >> 8)

    def _attend(self) -> bool:
        """See what the kick was for; return whether to end."""
        with self._changed:
            while True:
                while self._jobs:
                    job = self._jobs.popleft()
                    self._changed.release()
                    try:
                        job()
                    finally:
                        self._changed.acquire()
                if self._ending or not self._pausing:
                    self._parked = False
                    return self._ending
                self._parked = True
                self._changed.notify_all()
                self._changed.wait()

    def _last_exit(self, reason: int) -> Outcome:
        words = self.handle.exit_words
        if reason == EXIT_HLT:
            return Outcome(Stop.HALTED)
        if reason == EXIT_SYSTEM_EVENT and words[0] in SYSTEM_EVENTS:
            return Outcome(SYSTEM_EVENTS[words[0]])
        stop = {
            EXIT_SHUTDOWN: Stop.TRIPLE_FAULT,
            EXIT_FAIL_ENTRY: Stop.FAIL_ENTRY,
            EXIT_INTERNAL_ERROR: Stop.INTERNAL_ERROR,
        }.get(reason, Stop.UNKNOWN_EXIT)
        return Outcome(stop, death=self._death(reason, words))

    def _death(self, reason: int, words: list[int]) -> dict[str, Any]:
        """Take down the facts of the vCPU's last moment; what cannot be had is left out."""
        facts: dict[str, Any] = {
            "vcpu": self.index,
            "reason": reason,
            "reason_name": exit_name(reason),
            "words": words,
            "recent": self.handle.recent_exits,
        }
        for name, get in (("registers", self.handle.registers), ("special", self.handle.special_registers)):
            try:
                facts[name] = get()
            except VmmError:
                facts[name] = {}
        return facts

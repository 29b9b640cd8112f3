"""The end of a migration that has the machine: it sends, and lets go at the very last."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor import __version__
from hypervisor.errors import ConfigError, VmmError
from hypervisor.kvm.dirty import PAGE, Dirty
from hypervisor.migration.disks import SourceDisks
from hypervisor.migration.postcopy import PageLine
from hypervisor.migration.wire import SECONDS, VERSION, Kind, MigrationError, connect
from hypervisor.outcome import Outcome, Stop

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator

    from hypervisor.machine import Machine
    from hypervisor.migration.disks import Part
    from hypervisor.migration.wire import Frame, Tls, Wire

__all__ = ["Progress", "Result", "migrate"]

BATCH: Final = 1024
"""Pages of a frame."""
OVERHEAD: Final = 0.03
"""Seconds that the state of vCPUs and devices takes, beside the last pages: measured, with some to spare."""
MOST_ROUNDS: Final = 30


class Progress(NamedTuple):
    """How far a migration is.

    Attributes:
        round: how often memory has been gone through; 0 is the first time.
        left: bytes of memory that are still to be sent in this round.
        sent: bytes so far.
        rate: bytes a second.
    """

    round: int
    left: int
    sent: int
    rate: float


class Result(NamedTuple):
    """How a migration went.

    Attributes:
        seconds: from the connection to the target's taking over; with post-copy, to its having all memory.
        downtime: seconds from the guest's last instruction here to the target's word that it takes over.
        rounds: how often memory was gone through, the last time included.
        sent: bytes.
        late: pages that were sent when the guest ran at the target already: with post-copy.
        asked: how many of these it had to wait for.
    """

    seconds: float
    downtime: float
    rounds: int
    sent: int
    late: int = 0
    asked: int = 0


def migrate(  # noqa: PLR0913 - what the user may say
    machine: Machine,
    address: str,
    *,
    downtime: float = 0.1,
    most_rounds: int = MOST_ROUNDS,
    copy_disks: bool = False,
    postcopy: bool = False,
    tls: Tls | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: threading.Event | None = None,
    seconds: float = SECONDS,
) -> Result:
    """Move a running machine to the target that listens at `address`. Here it ends with Stop.MIGRATED.

    Its disks are those that the target finds at the same paths: it opens them when they have been closed here.

    Args:
        machine: it runs, or is paused, and goes on so there.
        address: "unix:PATH" or "tcp:HOST:PORT".
        downtime: seconds that the guest may stand still: memory is sent again and again until the rest is that little.
        most_rounds: how often at most.
        postcopy: when memory does not converge, let the guest go on there with pages missing, which follow as it
            touches them. If this end or the connection is lost before they have all arrived, the guest is lost, so
            this process has to stay until then: the function returns then, and `Machine.close` waits for it. Both
            ends must be different processes. Not together with `tls`.
        copy_disks: send the disks' content: the target has no storage in common with this end.
        tls: certificates, for TCP.
        progress: called now and then.
        cancelled: set it to give up; the guest goes on here.
        seconds: a target that is silent for so long is gone.

    Raises:
        ConfigError: the machine cannot be moved.
        MigrationError: it was not moved, and goes on here; or, unless `is_certain`, nobody knows where it is, and it
            stands still here: `Machine.resume` it when it is certain that it does not run there, else `kill` it.
    """
    if downtime <= 0:
        raise ConfigError(f"a downtime of {downtime:g} s", hint="it is a number of seconds above 0")
    if postcopy and tls is not None:
        raise ConfigError("post-copy does not go together with TLS", hint="use a tunnel, or leave out one of them")
    machine.forget_changes()
    if machine.memory.is_tracked:
        raise ConfigError(
            "the machine has a checkpoint, or is being moved already", hint="give the checkpoint up first"
        )
    wire = connect(address, tls=tls, seconds=seconds)
    try:
        disks = SourceDisks(machine, copied=copy_disks)
        pages = PageLine(address, seconds) if postcopy else None
        return _Source(machine, wire, disks, pages, downtime, most_rounds, progress, cancelled).run()
    except EOFError as error:
        raise MigrationError("the target hung up; the guest goes on here") from error
    except OSError as error:
        _last_words(wire)
        raise MigrationError(f"the connection broke; the guest goes on here: {error.strerror or error}") from error
    finally:
        wire.close()


def _last_words(wire: Wire) -> None:
    """Raise why the target hung up while it was being sent something, if it has said so."""
    try:
        frame = wire.receive()
    except (EOFError, OSError, MigrationError):
        return
    if frame.kind is Kind.REFUSED:
        raise MigrationError(f"the target refuses: {frame.form.get('why')}", hint="the guest goes on here")


class _Source:
    def __init__(  # noqa: PLR0913, PLR0917 - as `migrate`
        self,
        machine: Machine,
        wire: Wire,
        disks: SourceDisks,
        pages: PageLine | None,
        downtime: float,
        most_rounds: int,
        progress: Callable[[Progress], None] | None,
        cancelled: threading.Event | None,
    ) -> None:
        self._machine = machine
        self._wire = wire
        self._disks = disks
        self._pages = pages
        self._is_late = False  # the target runs before it has all pages
        self._downtime = downtime
        self._most_rounds = most_rounds
        self._progress = progress
        self._cancelled = cancelled
        self._round = 0
        self._began = time.monotonic()
        self._paging = 1e-9  # seconds that pages have taken
        self._paged = 0

    def run(self) -> Result:
        self._greet()
        dirty = self._machine.log_changes()
        try:
            self._disks.track()
            self._send_parts(self._disks.contents())
            self._converge(dirty)
            result = self._hand_over(dirty)
        except BaseException as error:
            if self._pages is not None and getattr(error, "is_certain", True):
                self._pages.stop()
            raise
        finally:
            dirty.close()
            self._disks.untrack()
        if self._pages is None:
            return result
        server = self._pages.finish()
        if server is None:
            return result
        return result._replace(
            seconds=time.monotonic() - self._began,
            sent=self._wire.sent + server.pages * PAGE,
            late=server.pages,
            asked=server.asked,
        )

    def _greet(self) -> None:
        form = {"version": VERSION, "program": __version__, **self._machine.describe()}
        token = None if self._pages is None else self._pages.token
        self._wire.send(Kind.HELLO, form | {"disks": self._disks.describe(), "pager": token})
        self._expect(Kind.READY)
        if self._pages is not None:
            self._pages.open()

    def _expect(self, kind: Kind) -> Frame:
        frame = self._wire.receive()
        if frame.kind is Kind.REFUSED:
            raise MigrationError(f"the target refuses: {frame.form.get('why')}", hint="the guest goes on here")
        if frame.kind is not kind:
            raise MigrationError(f"the target says {frame.kind.name} where {kind.name} is due; the guest goes on here")
        return frame

    # --- content ------------------------------------------------------------------------------------------------------

    def _converge(self, dirty: Dirty) -> None:
        """Send memory, and what changes of disks, until what changes meanwhile is little enough to stop for."""
        pages = self._machine.memory.size // PAGE
        dirty.collect()  # from here on; everything is sent at first
        self._send_pages(self._used(pages), pages)
        least = pages
        for number in range(1, self._most_rounds + 1):
            self._round = number
            changed = dirty.collect()
            runs = list(changed.runs())
            of_disks = self._disks.changed
            left = changed.pages * PAGE + of_disks
            self._send_parts(self._disks.changes())
            if self._fits(left):
                self._send_pages(runs, changed.pages)  # the stop comes next, and these need not wait for it
                return
            if self._pages is not None and (number == self._most_rounds or changed.pages >= least):
                self._is_late = self._fits(of_disks)  # another round would leave no less; only memory can follow
            self._send_pages(runs, changed.pages)
            if self._is_late:
                return
            least = changed.pages
        raise MigrationError(
            f"the guest changes memory and disks faster than {self._rate / 1e6:.0f} MB/s carry it off: after"
            f" {self._round} rounds {left / 1e6:.1f} MB are left; it goes on here",
            hint=f"allow it more than {self._downtime * 1e3:.0f} ms of standing still",
        )

    def _fits(self, size: int) -> bool:
        """Whether the guest may stand still for as long as so many bytes take."""
        return size / self._rate + OVERHEAD <= self._downtime

    @property
    def _rate(self) -> float:
        """Bytes a second."""
        return max(self._paged / self._paging, 1.0)

    def _used(self, pages: int) -> Iterator[tuple[int, int]]:
        """Yield runs of the pages that are not all zero: the target's are."""
        import numpy as np  # noqa: PLC0415 - for those who migrate

        for first in range(0, pages, BATCH):
            count = min(BATCH, pages - first)
            words = np.frombuffer(self._machine.memory.pages(first, count), dtype=np.uint64).reshape(count, -1)
            flags = np.concatenate(([0], words.any(axis=1).view(np.int8), [0]))
            edges = np.flatnonzero(np.diff(flags)).tolist()
            yield from ((first + start, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True))

    def _send_pages(self, runs: Iterable[tuple[int, int]], total: int) -> None:
        """Send pages, at most BATCH a frame; `total` of them are looked at."""
        memory = self._machine.memory
        batch: list[tuple[int, int]] = []
        size = done = 0
        for first, count in runs:
            start = first
            while start < first + count:
                part = min(first + count - start, BATCH - size)
                batch.append((start, part))
                size += part
                start += part
                if size == BATCH:
                    self._send_batch(batch, memory)
                    done += size
                    batch, size = [], 0
                    self._tell((total - done) * PAGE)
        if batch:
            self._send_batch(batch, memory)
        self._tell(0)

    def _send_parts(self, parts: Iterable[Part]) -> None:
        """Send parts of disks, and have the target make them durable, so that the last time it has little to do."""
        names = set()
        for name, offset, data in parts:
            self._wire.send(Kind.DISK, {"disk": name, "offset": offset}, [data])
            names.add(name)
            self._tell(0)
        for name in names:
            self._wire.send(Kind.DISK, {"disk": name, "offset": None})

    def _send_batch(self, batch: list[tuple[int, int]], memory: Any) -> None:
        began = time.monotonic()
        views = [memory.pages(first, count) for first, count in batch]
        self._wire.send(Kind.PAGES, {"runs": batch}, views)
        self._paging += time.monotonic() - began
        self._paged += sum(map(len, views))

    def _tell(self, left: int) -> None:
        if self._cancelled is not None and self._cancelled.is_set():
            raise MigrationError("the migration was cancelled; the guest goes on here")
        if self._machine.outcome is not None:
            raise MigrationError("the guest has ended while it was being moved")
        if self._progress is not None:
            self._progress(Progress(self._round, left, self._wire.sent, self._rate))

    # --- the last step ------------------------------------------------------------------------------------------------

    def _hand_over(self, dirty: Dirty) -> Result:
        machine = self._machine

        def still() -> float:
            self._send_parts(self._disks.changes())
            changed = dirty.collect()
            missing: list[tuple[int, int]] = []
            if self._pages is not None and self._is_late:
                missing = list(changed.runs())
            if self._pages is not None and missing:
                machine.at_close(self._pages.begin(machine.memory, missing).join)
            else:
                self._send_pages(changed.runs(), changed.pages)
            self._wire.send(Kind.STATE, {"state": machine.capture(), "paused": was_paused, "missing": missing})
            self._expect(Kind.LOADED)
            self._give_away()
            return time.monotonic()

        self._disks.flush()
        self._round += 1
        was_paused = machine.is_paused
        stopped = time.monotonic()
        taken = machine.stand_still(still)
        return Result(taken - self._began, taken - stopped, self._round + 1, self._wire.sent)

    def _give_away(self) -> None:
        """Let go of disks and machine; takes both back unless the target has taken over.

        If nobody knows whether it has, the guest stands still from here on.
        """
        try:
            self._let_go(self._disks.release())
        except (EOFError, OSError, VmmError) as error:
            is_certain = getattr(error, "is_certain", True)
            if not is_certain:
                self._machine.hold()
            self._disks.take_back(is_certain=is_certain)
            raise

    def _let_go(self, disks: dict[str, Any]) -> None:
        """Give the machine away; it ends here if the target says that it has taken over.

        A target that is gone without its word has not begun, if all that it ever sent has been read. That is so when
        the connection has ended in order, and at any end of a unix socket; over TCP a reset may have overtaken it.
        """
        try:
            self._wire.send(Kind.GO, {"disks": disks})
            self._expect(Kind.MINE)
        except EOFError:
            raise
        except OSError as error:
            if isinstance(error, ConnectionError) and self._wire.family == socket.AF_UNIX:
                raise
            raise MigrationError(
                "the target's word is missing: nobody knows whether the guest runs there; it stands still here",
                hint="find out, then `hv migrate settle NAME --here` or `--there`",
                is_certain=False,
            ) from error
        self._machine.end(Outcome(Stop.MIGRATED))

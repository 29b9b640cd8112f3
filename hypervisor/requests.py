"""What other processes of this user may have a published machine do: see `hypervisor.control`.

Each request is answered when it is done. Only one that takes time runs at once; how far it is can be asked
meanwhile, and it can be given up.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from hypervisor.errors import ConfigError, VmmError
from hypervisor.outcome import Outcome, Stop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hypervisor.machine import Machine

__all__ = ["Requests"]

LONG: Final = ("save", "migrate")
SHORT: Final = ("pause", "resume", "settle", "progress", "cancel")


class Requests:
    """Does what is asked of one machine."""

    def __init__(self, machine: Machine) -> None:
        """Serve `machine`."""
        self._machine = machine
        self._lock = threading.Lock()
        self._running = ""
        self._progress: dict[str, Any] = {}
        self._cancelled = threading.Event()
        self._is_undecided = False  # whether the guest runs elsewhere
        self._thread: threading.Thread | None = None

    def begin(self, request: Mapping[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
        """Begin what a request says and have `reply` called with how it went, from any thread. The loop's thread's."""
        what = request["do"]
        if what not in LONG + SHORT:
            reply({"error": f"it does one of: {', '.join(LONG + SHORT)}"})
        elif what == "progress":
            reply({"running": self._running, **self._progress})
        elif what == "cancel":
            self._cancelled.set()
            reply({"cancelled": self._running})
        else:
            with self._lock:
                if self._running:
                    reply({"error": f"{self._running} is still going on"})
                    return
                self._running = what
                self._cancelled.clear()
                self._progress = {}
            self._thread = threading.Thread(
                target=self._do, args=(what, request, reply), name=f"hv-{what}", daemon=True
            )
            self._thread.start()

    def finish(self) -> None:
        """Return when what takes time has been done."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _do(self, what: str, request: Mapping[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
        try:
            answer = getattr(self, f"_{what}")(request)
        except VmmError as error:
            answer = {"error": _chain(error), "hint": error.hint, "status": error.status}
        except Exception as error:  # noqa: BLE001 - a request shall not end a machine
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._running = ""
        reply(answer)

    def _pause(self, request: Mapping[str, Any]) -> dict[str, Any]:
        del request
        self._machine.pause()
        return {"paused": True}

    def _resume(self, request: Mapping[str, Any]) -> dict[str, Any]:
        del request
        self._must_be_decided()
        self._machine.resume()
        return {"paused": False}

    def _must_be_decided(self) -> None:
        if self._is_undecided:
            raise ConfigError(
                "it was handed over, and nobody knows whether it runs there", hint="`hv migrate settle`, once you know"
            )

    def _settle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if not self._is_undecided:
            raise ConfigError("there is nothing to settle: the machine is here")
        is_here = request.get("here")
        if not isinstance(is_here, bool):
            raise ConfigError("settle: where is it?", hint='{"do": "settle", "here": true or false}')
        self._is_undecided = False
        if is_here:
            self._machine.resume()
        else:
            self._machine.end(Outcome(Stop.MIGRATED))
        return {"here": is_here}

    def _save(self, request: Mapping[str, Any]) -> dict[str, Any]:
        path = request.get("path")
        base = request.get("base")
        if not isinstance(path, str) or not isinstance(base, str | None):
            raise ConfigError("save: where to?", hint='{"do": "save", "path": PATH}')

        def tell(done: int, total: int) -> None:
            self._progress = {"done": done, "total": total}

        how = {name: request.get(name) is True for name in ("compress", "suspend", "track")}
        self._machine.save(path, base=base, **how, progress=tell)
        return {"saved": path}

    def _migrate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from hypervisor.migration.source import Progress, migrate  # noqa: PLC0415 - for those who migrate
        from hypervisor.migration.wire import MigrationError, Tls  # noqa: PLC0415 - the same

        address, tls = request.get("to"), request.get("tls")
        if not isinstance(address, str):
            raise ConfigError("migrate: where to?", hint='{"do": "migrate", "to": ADDRESS}')

        self._must_be_decided()

        def tell(progress: Progress) -> None:
            self._progress = progress._asdict()

        try:
            result = migrate(
                self._machine,
                address,
                downtime=float(request.get("downtime", 0.1)),
                copy_disks=request.get("copy_disks") is True,
                postcopy=request.get("postcopy") is True,
                tls=None if tls is None else Tls(*tls),
                progress=tell,
                cancelled=self._cancelled,
            )
        except MigrationError as error:
            self._is_undecided = not error.is_certain and self._machine.outcome is None
            raise
        return result._asdict()


def _chain(error: BaseException) -> str:
    """Return an error's text with its causes'."""
    parts = [str(error)]
    while (cause := error.__cause__) is not None:
        error = cause
        text = getattr(error, "strerror", None) or str(error)  # an OSError's own text repeats its number
        if not any(text in part for part in parts):
            parts.append(text)
    return ": ".join(parts)

"""Event logging that costs nothing until something is logged.

Importing structlog takes longer than starting a small guest, so it is imported with the first event that passes the
level. Event names are dotted and never change; facts are fields; guest bytes are never among them.
"""

from __future__ import annotations

import sys
from typing import Any, Final

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
MAX_ONCE: Final = 64
"""Distinct events that one logger remembers having said once; a guest cannot make it remember more."""


class _Settings:
    level = LEVELS["warning"]
    format = "console"
    configured = False


def set_level(name: str) -> None:
    """Emit events of this level ("debug", "info", "warning", "error") and above, in the whole process."""
    _Settings.level = LEVELS[name]


def set_format(name: str) -> None:
    """Write events as readable lines ("console") or one JSON object a line ("json"), in the whole process."""
    _Settings.format = name
    _Settings.configured = False


def _configure() -> None:
    """Set structlog up for stderr, unless the program that uses this package has done so itself."""
    import structlog  # noqa: PLC0415 - see the module's docstring

    _Settings.configured = True
    if structlog.is_configured():
        return
    renderer: Any = structlog.processors.JSONRenderer()
    if _Settings.format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


class EventLog:
    """A named source of events, such as one device."""

    __slots__ = ("_bound", "_once")

    def __init__(self, **bound: Any) -> None:
        """Bind fields that every event of this source carries, e.g. device="uart0"."""
        self._bound = bound
        self._once: set[tuple[str, object]] = set()

    def _emit(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if LEVELS[level] < _Settings.level and "structlog.testing" not in sys.modules:
            return
        import structlog  # noqa: PLC0415 - a quarter of a second, paid only by a run that logs

        if not _Settings.configured:
            _configure()
        getattr(structlog.get_logger().bind(**self._bound), level)(event, **fields)

    def debug(self, event: str, **fields: Any) -> None:
        """Emit a step that matters to whoever debugs this source."""
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Emit something worth knowing that needs nobody's action."""
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Emit something that is wrong, though the run goes on."""
        self._emit("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Emit something that ends the run."""
        self._emit("error", event, fields)

    def once(self, event: str, key: object = None, **fields: Any) -> None:
        """Emit a warning the first time this event comes with this key.

        For what a guest does wrong: it can do it a million times a second, the log says it once. After MAX_ONCE
        distinct (event, key) pairs nothing more is said.
        """
        if (event, key) in self._once or len(self._once) >= MAX_ONCE:
            return
        self._once.add((event, key))
        self._emit("warning", event, fields)

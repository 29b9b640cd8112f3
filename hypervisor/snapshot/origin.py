"""What a machine goes on from, instead of booting a kernel."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from hypervisor.boot.image import BootPlan
from hypervisor.errors import SnapshotError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from devices.backends.image import Image
    from hypervisor.memory import Content
    from hypervisor.options import DiskConfig

__all__ = ["Origin"]


class Origin(NamedTuple):
    """Where the parts of a machine are that has run before.

    Attributes:
        facts: what was booted: `Machine.capture` has it as "booted".
        content: of its RAM; None: zeroes, to be filled before it goes on.
        open_disk: given a disk's name and description, opens what it was; None: opens what the description says.
    """

    facts: Mapping[str, Any]
    content: Content | None = None
    open_disk: Callable[[str, DiskConfig], Image] | None = None

    def plan(self) -> tuple[BootPlan, str | None]:
        """Return the plan of a machine that has been booted before, and the path of a file with its symbols.

        Raises:
            SnapshotError: the facts are none.
        """
        kind, release, symbols = (self.facts.get(name) for name in ("kind", "release", "symbols"))
        if not isinstance(kind, str) or not isinstance(release, str | None) or not isinstance(symbols, str | None):
            raise SnapshotError("the snapshot does not say what was booted")
        plan = BootPlan(
            segments=(), entry=None, kind=kind, is_linux=bool(self.facts.get("is_linux")), release=release, symbols=None
        )
        return plan, symbols if symbols is not None and os.path.exists(symbols) else None

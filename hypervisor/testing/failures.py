"""What a test is told when its guest is the reason that it fails."""

from __future__ import annotations

from typing import Final

from hypervisor.errors import VmmError

__all__ = ["DEATHS", "GuestEnded", "GuestFailed"]

DEATHS: Final = ("TRIPLE_FAULT", "PANIC", "INTERNAL_ERROR", "FAIL_ENTRY", "UNKNOWN_EXIT", "OUTPUT_LOST", "FAULT")
"""The ends of a machine, by the names of `hypervisor.Stop`, that fail a test by themselves."""


class GuestFailed(VmmError):
    """The guest panicked, printed an oops, hung or died.

    Attributes:
        kind: "panic", "oops", "hang" or "death"; reports sort by it.
    """

    status = 4

    def __init__(self, kind: str, message: str) -> None:
        """Say what happened to the guest."""
        super().__init__(message)
        self.kind = kind


class GuestEnded(VmmError):
    """The guest is over, without a failure of its own, and something is still asked of it."""

    status = 4

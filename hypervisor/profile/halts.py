"""How long a vCPU was halted, from KVM's own counters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["halted_ns"]

BLOCKED: Final = "halt_wait_ns"
"""Its thread slept until an interrupt, or a signal of ours, woke it."""
POLLED: Final = ("halt_poll_success_ns", "halt_poll_fail_ns")
"""Before it sleeps KVM looks for an interrupt for a while: in vain (fail), and then it sleeps, or not."""


def halted_ns(stats: Mapping[str, int], run_ns: int = 0) -> int | None:
    """Return how many nanoseconds a vCPU was halted; None where its counters do not say.

    Sleeping and polling are parts of one halt that never overlap, both within KVM_RUN, so this is a part of the time
    that was measured around KVM_RUN. A halt is counted when it is over. A CPU that waits to be started (INIT, SIPI)
    is not halted in KVM's eyes; one that has never left the guest was never started, and has only waited.

    Args:
        stats: a vCPU's counters, as `Vcpu.stats` returns them.
        run_ns: the time measured around KVM_RUN.
    """
    if BLOCKED not in stats:
        return None
    if stats.get("exits") == 0:
        return run_ns
    return stats[BLOCKED] + sum(stats.get(name, 0) for name in POLLED)

"""How a run ended."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class Stop(Enum):
    """What ended the machine; the value says it in words."""

    POWER_OFF = "the guest powered off"
    RESET = "the guest reset itself"
    HALTED = "the guest halted and nothing can wake it"
    GUEST_EXIT = "the guest ended the run with a code of its own"
    TRIPLE_FAULT = "triple fault"
    PANIC = "kernel panic"
    INTERNAL_ERROR = "KVM internal error"
    FAIL_ENTRY = "KVM could not enter the guest"
    UNKNOWN_EXIT = "unknown KVM exit"
    KILLED = "ended from outside"
    SUSPENDED = "the machine was saved, and ended"
    LOST = "the source was lost, and with it a part of the guest's memory"
    MIGRATED = "the guest goes on in another process"
    OUTPUT_LOST = "the console's output file takes no more"
    FAULT = "a fault of the VMM"


STATUS = {
    Stop.POWER_OFF: 0,
    Stop.RESET: 0,
    Stop.HALTED: 0,
    Stop.MIGRATED: 0,
    Stop.SUSPENDED: 0,
    Stop.TRIPLE_FAULT: 4,
    Stop.PANIC: 4,
    Stop.INTERNAL_ERROR: 4,
    Stop.FAIL_ENTRY: 4,
    Stop.UNKNOWN_EXIT: 4,
    Stop.OUTPUT_LOST: 3,
    Stop.LOST: 3,
    Stop.FAULT: 5,
}


class Outcome:
    """How a machine's run ended.

    Attributes:
        reason: what ended it.
        status: the exit status that `hv run` gives: 0 power-off, reset or halt; the guest's own code; 4 it died; else
            as the README's table says.
        message: one line that says what happened, with the cause and place of a death.
        detail: registers, decoded instructions and the last exits of a death; else empty.
        error: the exception behind Stop.FAULT and Stop.OUTPUT_LOST.
        death: raw facts of a death, as the vCPU took them down.
    """

    def __init__(
        self,
        reason: Stop,
        *,
        status: int | None = None,
        message: str | None = None,
        death: Mapping[str, Any] | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Describe an end; status and message follow from the reason unless they are given."""
        self.reason = reason
        self.status = STATUS.get(reason, 5) if status is None else status
        self.message = reason.value if message is None else message
        self.detail = ""
        self.death = death
        self.error = error

    @classmethod
    def fault(cls, error: BaseException) -> Outcome:
        """Describe an end by an exception: its own family's status, 5 for what nobody foresaw."""
        return cls(
            Stop.FAULT, status=getattr(error, "status", 5), message=f"{type(error).__name__}: {error}", error=error
        )

    def __repr__(self) -> str:
        return f"<Outcome {self.reason.name} status={self.status} {self.message!r}>"

"""What can go wrong with a disk's requests, and when (`devices.backends.faults`)."""

from __future__ import annotations

import errno
import os
import threading
from random import Random
from typing import Final, NamedTuple

from devices.backends.write_cache import FLUSH, READ, WRITE

__all__ = ["KINDS", "Armed", "Fault", "Hit"]

KINDS: Final = {
    "read-error": (READ,),
    "write-error": (WRITE,),
    "flush-error": (FLUSH,),
    "torn-write": (WRITE,),
    "dropped-write": (WRITE,),
    "lying-flush": (FLUSH,),
    "slow": (READ, WRITE, FLUSH),
}
"""The faults, and which requests each may meet. Discards and zeroes count as writes."""


class Hit(NamedTuple):
    """A request that met a fault: of which kind, what it was, and its first sector and how many; a flush has none."""

    kind: str
    request: str
    sector: int
    sectors: int


class Fault(NamedTuple):
    """What is to go wrong.

    Attributes:
        kind: "read-error", "write-error", "flush-error": the request fails with `error`, and nothing is done;
            "torn-write": only the first sectors of it reach the disk; "dropped-write": it succeeds, and nothing is
            written; "lying-flush": it succeeds, and what it covers can still be lost in a power cut; "slow": the
            request takes `seconds` longer, and may meet another fault then.
        where: first sector and number of sectors that a read or write must touch; None: any.
        count: how often it happens; None: until `clear`.
        after: how many requests that it would meet it lets pass first.
        chance: how likely it happens to a request that it meets, 0 to 1.
        seconds: of "slow".
        requests: which of "read", "write", "flush" a "slow" meets; None: all.
        sectors: how many sectors of a "torn-write" reach the disk, never all of them; None: any number.
        error: the errno of an error or a torn write; None: a torn write succeeds.
        seed: of what is left to chance.
    """

    kind: str
    where: tuple[int, int] | None = None
    count: int | None = None  # type: ignore[assignment] # a tuple has a method of that name
    after: int = 0
    chance: float = 1.0
    seconds: float = 0.0
    requests: tuple[str, ...] | None = None
    sectors: int | None = None
    error: int | None = errno.EIO
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError unless it makes sense."""
        meets = KINDS.get(self.kind)
        if meets is None:
            raise ValueError(f"fault {self.kind!r} is none of {', '.join(KINDS)}")
        if self.requests is not None and not (self.requests and set(self.requests) <= set(meets)):
            raise ValueError(f"fault {self.kind!r} meets {', '.join(meets)}, not {self.requests}")
        if self.error is None and self.kind != "torn-write":
            raise ValueError(f"fault {self.kind!r} needs an errno")
        if self.kind == "slow" and not 0 < self.seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"a slow disk takes more than no time, not {self.seconds} seconds")


class Armed:
    """A fault, and how often it has happened."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._requests = fault.requests or KINDS[fault.kind]
        self._left = fault.count
        self._after = fault.after
        self._rng = Random(fault.seed)  # noqa: S311 - to be had again, not to be secret

    def meets(self, request: str, sector: int, count: int) -> bool:
        """Whether it happens to a request; counts it if so."""
        if self._left == 0 or request not in self._requests:
            return False
        if self.fault.where is not None and request != FLUSH:
            first, length = self.fault.where
            if sector >= first + length or first >= sector + count:
                return False
        if self._after > 0:
            self._after -= 1
            return False
        if self.fault.chance < 1 and self._rng.random() >= self.fault.chance:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def hit(self, request: str, sector: int, count: int) -> Hit:
        """Describe a request that it happened to."""
        return Hit(self.fault.kind, request, sector, count)

    def kept_of(self, count: int) -> int:
        """Return how many sectors of a torn write of `count` reach the disk: never all."""
        sectors = self.fault.sectors
        return self._rng.randrange(count) if sectors is None else min(sectors, count - 1)

    def fail(self) -> None:
        """Raise its error, if it has one."""
        error = self.fault.error
        if error is not None:
            raise OSError(error, os.strerror(error))

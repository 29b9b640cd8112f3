"""What a switch may do to frames on their way from one port to another: lose them, hold them back, change them.

A fault decides by random numbers of its own for each pair of ports, made from its seed: the nth frame from one port to
another has the same fate in every run, whatever the others send meanwhile.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

__all__ = ["Copy", "Corrupt", "Delay", "Drop", "Duplicate", "Fault", "Partition", "Reorder", "Which"]

HEADER: Final = 14
"""Bytes of an Ethernet header."""
NS_PER_S: Final = 1_000_000_000


class Copy(NamedTuple):
    """A frame on its way.

    Attributes:
        frame: its bytes.
        delay_ns: how long it takes.
        late_ns: how much longer it waits for the next frame of its pair, unless one waits for this one already.
    """

    frame: bytes
    delay_ns: int = 0
    late_ns: int = 0


class Which(NamedTuple):
    """The frames that a fault meets: those of the ports `src` for the ports `dst`, None meaning any, at random."""

    probability: float = 1.0
    seed: object = 0
    src: frozenset[str] | None = None
    dst: frozenset[str] | None = None


class Fault:
    """What is wrong with a network; as a context manager it ends with the block.

    Attributes:
        hits: frames that it has met.
    """

    def __init__(self, which: Which) -> None:
        """Meet these frames; raises ValueError for a probability that is none."""
        if not 0 <= which.probability <= 1:
            raise ValueError(f"probability is {which.probability}, not from 0 to 1")
        self._which = which
        self._random: dict[tuple[str, str], Random] = {}
        self.hits = 0
        self.on_end: Callable[[], None] = lambda: None

    def apply(self, pair: tuple[str, str], copy: Copy) -> tuple[Copy, ...]:
        """Return what becomes of a frame from one port to another: nothing, it, or several."""
        source, target = pair
        probability, seed, sources, targets = self._which
        if (sources is not None and source not in sources) or (targets is not None and target not in targets):
            return (copy,)
        random = self._random.get(pair)
        if random is None:  # text is the same seed in every process
            random = self._random[pair] = Random(f"{seed}/{source}/{target}")  # noqa: S311 - not for secrets
        if random.random() >= probability:
            return (copy,)
        self.hits += 1
        return self.meet(pair, copy, random)

    def meet(self, pair: tuple[str, str], copy: Copy, random: Random) -> tuple[Copy, ...]:
        """Do to a frame what this fault does."""
        raise NotImplementedError

    def end(self) -> None:
        """Let frames pass from now on; harmless when it has ended."""
        self.on_end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Drop(Fault):
    """Frames are lost."""

    def meet(self, pair: tuple[str, str], copy: Copy, random: Random) -> tuple[Copy, ...]:
        """Lose it."""
        del pair, copy, random
        return ()


class Duplicate(Fault):
    """Frames arrive twice."""

    def meet(self, pair: tuple[str, str], copy: Copy, random: Random) -> tuple[Copy, ...]:
        """Send a second one behind it."""
        del pair, random
        return copy, copy


class Corrupt(Fault):
    """One bit behind the Ethernet header is another one."""

    def meet(self, pair: tuple[str, str], copy: Copy, random: Random) -> tuple[Copy, ...]:
        """Flip a bit; a frame that is all header stays."""
        del pair
        if len(copy.frame) <= HEADER:
            return (copy,)
        frame = bytearray(copy.frame)
        bit = random.randrange(8 * HEADER, 8 * len(frame))
        frame[bit >> 3] ^= 1 << (bit & 7)
        return (copy._replace(frame=bytes(frame)),)


class Delay(Fault):
    """Frames take longer, in their order."""

    def __init__(self, seconds: float, jitter: float, now_ns: Callable[[], int], which: Which) -> None:
        """Hold each back for `seconds` and up to `jitter` more."""
        super().__init__(which)
        if seconds < 0 or jitter < 0:
            raise ValueError(f"a delay of {seconds} s and up to {jitter} s more")
        self._delay_ns = round(seconds * NS_PER_S)
        self._jitter_ns = round(jitter * NS_PER_S)
        self._now_ns = now_ns
        self._last_ns: dict[tuple[str, str], int] = {}

    def meet(self, pair: tuple[str, str], copy: Copy, random: Random) -> tuple[Copy, ...]:
        """Hold it back, at least as long as the one before it."""
        now = self._now_ns()
        at = now + copy.delay_ns + self._delay_ns + (random.randrange(self._jitter_ns + 1) if self._jitter_ns else 0)
        at = self._last_ns[pair] = max(at, self._last_ns.get(pair, at))
        return (copy._replace(delay_ns=at - now),)


class Reorder(Fault):
    """Frames arrive behind the one that was sent after them."""

    def __init__(self, within: float, which: Which) -> None:
        """Hold each back until the next one of its pair has passed, but for `within` seconds at most."""
        super().__init__(which)
        if within < 0:
            raise ValueError(f"held back for {within} s")
        self._within_ns = round(within * NS_PER_S)

    def meet(self, pair: tuple[str, str], copy: Copy, random: Random) -> tuple[Copy, ...]:
        """Hold it back."""
        del pair, random
        return (copy._replace(late_ns=max(copy.late_ns, self._within_ns)),)


class Partition(Fault):
    """No frame passes between groups of ports."""

    def __init__(self, groups: Iterable[Iterable[str]]) -> None:
        """Part the groups; a port that is in none reaches everybody."""
        super().__init__(Which())
        self._group_of: dict[str, int] = {}
        for number, group in enumerate(groups):
            for port in group:
                if self._group_of.setdefault(port, number) != number:
                    raise ValueError(f"port {port!r} is in two groups")

    def apply(self, pair: tuple[str, str], copy: Copy) -> tuple[Copy, ...]:
        """Lose what would pass from one group to another."""
        here, there = (self._group_of.get(port) for port in pair)
        if here is None or there is None or here == there:
            return (copy,)
        self.hits += 1
        return ()

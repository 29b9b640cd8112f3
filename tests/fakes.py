"""Stand-ins for what a machine hands to a device: they record, nothing else. Each fits a protocol of devices.ports."""

from __future__ import annotations

__all__ = ["FakeAlarm", "FakeClock", "FakeFastPath", "FakeIrq", "FakeSink"]


class FakeIrq:
    """An interrupt line.

    Attributes:
        level: what the device drives it to.
        edges: how many times it has risen.
        history: every change of the level, in order.
    """

    def __init__(self) -> None:
        self.level = False
        self.edges = 0
        self.history: list[bool] = []

    def set(self, level: bool) -> None:
        if level == self.level:
            return
        self.level = level
        self.edges += level
        self.history.append(level)


class FakeSink:
    """A byte sink.

    Attributes:
        data: every byte taken, in order.
        writes: how many calls brought them.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.data += data


class FakeFastPath:
    """The run loop's short cuts.

    Attributes:
        published: offset -> the value that one-byte reads get now; an offset that goes to the device is absent.
        diverted: offsets whose one-byte writes go to the sink now.
        calls: every call, in order, as ("publish", offset, value) or ("divert", offset, to_sink).
    """

    def __init__(self) -> None:
        self.published: dict[int, int] = {}
        self.diverted: set[int] = set()
        self.calls: list[tuple[str, int, int | bool | None]] = []

    def publish(self, offset: int, value: int | None) -> None:
        self.calls.append(("publish", offset, value))
        if value is None:
            self.published.pop(offset, None)
        else:
            self.published[offset] = value

    def divert(self, offset: int, to_sink: bool) -> None:
        self.calls.append(("divert", offset, to_sink))
        if to_sink:
            self.diverted.add(offset)
        else:
            self.diverted.discard(offset)


class FakeClock:
    """A clock that only a test moves: call it for the time.

    Attributes:
        now_ns: the time, in nanoseconds.
    """

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, ns: int) -> None:
        """Let `ns` nanoseconds pass."""
        self.now_ns += ns


class FakeAlarm:
    """A one-shot timer.

    Attributes:
        deadline_ns: when it will fire, or None while it is disarmed.
        sets: every deadline it was given, in order.
    """

    def __init__(self) -> None:
        self.deadline_ns: int | None = None
        self.sets: list[int | None] = []

    def set(self, deadline_ns: int | None) -> None:
        self.deadline_ns = deadline_ns
        self.sets.append(deadline_ns)

    def expire(self, now_ns: int) -> bool:
        """Whether it fires at `now_ns`; if it does it is disarmed, and the test calls the device back."""
        if self.deadline_ns is None or now_ns < self.deadline_ns:
            return False
        self.deadline_ns = None
        return True

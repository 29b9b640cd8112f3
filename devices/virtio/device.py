"""What every virtio device model is: features, configuration space, queues, and its life between two resets.

A model derives from VirtioDevice and answers chains in `handle`. A transport (virtio/pci.py, virtio/mmio.py) shows it
to the driver; a runner, the machine's, calls `serve` when the driver kicks. The three meet in `attach`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from devices.saved import Saved
from devices.virtio.queue import EVENT_IDX, IN_ORDER, INDIRECT_DESC, BrokenQueueError, Queue

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.events import EventLog
    from devices.ports import DiskShortCut, GuestRam, TapShortCut
    from devices.virtio.queue import Chain

__all__ = ["VERSION_1", "Runner", "Transport", "UnservedError", "VirtioDevice"]

VERSION_1: Final = 1 << 32
"""VIRTIO_F_VERSION_1 (chapter 6): this is no legacy device."""


_MASK64: Final = (1 << 64) - 1


class UnservedError(Exception):
    """A model was stopped before it began with a chain: the chain stays in the queue."""


class Transport(Protocol):
    """What a device model asks of its transport. Both may be called from any thread."""

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed (2.3)."""

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET and tell the driver (2.1.2)."""


class Runner(Protocol):
    """Calls a device's `serve` when the driver has kicked a queue, one call a queue at a time."""

    def start(self) -> None:
        """Serve from now on: the driver is ready. Every queue is served once at least."""

    def stop(self) -> None:
        """Return when nothing is being served and nothing will be until `start`."""

    def kick(self, index: int) -> None:
        """Serve queue `index` soon, as if the driver had kicked it. From any thread."""


class VirtioDevice:
    """The base of all device models.

    Attributes:
        device_id: the device type (Virtio 1.2, chapter 5).
        name: such as "blk0", for messages and profiles.
        queues: the virtqueues.
        offered: the feature bits that the driver may choose from.
        features: those that it chose; 0 before it has.
        is_active: whether the driver is ready (DRIVER_OK) and the device not broken.
        is_broken: whether the driver broke a rule, so that nothing happens any more until a reset.
    """

    device_id: ClassVar[int]

    def __init__(
        self,
        name: str,
        ram: GuestRam,
        *,
        queue_sizes: Sequence[int],
        features: int = 0,
        in_order: bool = False,
        log: EventLog,
    ) -> None:
        """Make a device.

        Args:
            name: such as "blk0".
            ram: guest memory.
            queue_sizes: the largest size of each queue.
            features: what it offers beside what all offer.
            in_order: whether it promises to use each queue's buffers in the order in which it finds them (2.7.9), so
                that a driver need not look for what came back. A model that may finish a later request first does not.
            log: for what the guest does wrong.
        """
        self.name = name
        self.log = log
        self.queues = tuple(Queue(ram, index, size) for index, size in enumerate(queue_sizes))
        self.offered = features | VERSION_1 | INDIRECT_DESC | EVENT_IDX | (IN_ORDER if in_order else 0)
        self.features = 0
        self.is_active = False
        self.is_broken = False

    def attach(self, transport: Transport, runner: Runner) -> None:
        """Learn who shows the device to the driver and who serves its queues."""
        self.transport = transport
        self.runner = runner

    # --- for the transport --------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Return the device-specific configuration space as it is now (2.5), little-endian."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Accept a write to the configuration space; fields are read-only unless a model says otherwise."""

    def activate(self, features: int) -> None:
        """Begin to work with these features: the driver has set DRIVER_OK. The runner starts after this."""
        self.features = features
        self.is_active = True

    def reset(self) -> None:
        """Return to the state after power-on. The runner has stopped before this."""
        self.features = 0
        self.is_active = self.is_broken = False
        for queue in self.queues:
            queue.reset()

    def disable(self, queue: Queue) -> None:
        """Take a queue out of use (4.2.2.2) and forget what is held of it. The runner has stopped before this."""
        queue.reset()

    # --- for snapshots ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the device's state; the runner has stopped. A model adds what it has beside its queues."""
        return {
            "features": self.features,
            "is_active": self.is_active,
            "is_broken": self.is_broken,
            "queues": [queue.state() for queue in self.queues],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; the runner has stopped, and starts afterwards if the device is active.

        Raises:
            KeyError, TypeError, ValueError: it is no state of such a device.
        """
        self.load_rest(Saved(state))

    def load_rest(self, saved: Saved) -> None:
        """Load what all devices have, and refuse what is left of a state: a model takes its own before."""
        features = saved.number("features", _MASK64)
        is_active, is_broken = saved.flag("is_active"), saved.flag("is_broken")
        queues = saved.items("queues", len(self.queues), least=len(self.queues))
        saved.end()
        if features & ~self.offered or (is_active and is_broken):
            raise ValueError(f"{self.name} with features {features:#x}, active and broken: {is_active} {is_broken}")
        self.is_active = False  # for good, when a queue is refused
        for queue, its_state in zip(self.queues, queues, strict=True):
            queue.load(its_state)
            if is_active and queue.held > queue.size:
                raise ValueError(f"queue {queue.index}: {queue.held} chains are held, and it has {queue.size}")
        self.features, self.is_active, self.is_broken = features, is_active, is_broken

    # --- for the runner -----------------------------------------------------------------------------------------------

    def short_cut(self) -> DiskShortCut | TapShortCut | None:
        """Return what a data path outside Python may do by itself now that the device is active; None: nothing."""
        return None

    def serve(self, index: int, most: int | None = None, head: int | None = None) -> None:
        """Do what there is to do in queue `index`.

        Args:
            index: the queue's number.
            most: do at most so many chains; None: until there is no more for now.
            head: do this chain instead, which a data path has taken and could not do.
        """
        queue = self.queues[index]
        if not self.is_active or not queue.is_enabled:
            return
        try:
            if head is None:
                self.handle_queue(queue, most)
            else:
                chain = queue.chain(head)
                queue.push(chain, self.handle(queue, chain))
                queue.notify_driver()
        except BrokenQueueError as error:
            self.fail(queue, error)

    def handle_queue(self, queue: Queue, most: int | None) -> None:
        """Answer the chains of a queue: `handle` for each, then one interrupt.

        Without a limit by the caller, the runner is asked to come again after as many chains as the queue is long, so
        that others get their turn.

        Raises:
            BrokenQueueError: the driver broke a rule.
        """
        queue.ignore_kicks()
        try:
            left = most or queue.size
            while left and self.is_active:  # another thread may find that the device is broken
                chain = queue.pop()
                if chain is None:
                    if queue.expect_kicks():  # then the next `pop` has one
                        continue
                    return
                left -= 1
                queue.push(chain, self.handle(queue, chain))
            if most is None:
                self.runner.kick(queue.index)
        except UnservedError:
            queue.unpop()
        finally:
            queue.notify_driver()

    def handle(self, queue: Queue, chain: Chain) -> int:
        """Answer one chain and return how many bytes of its writable part were filled.

        Raises:
            BrokenQueueError: the driver broke a rule.
            UnservedError: the device is being stopped; nothing has been done.
        """
        raise NotImplementedError

    def fail(self, queue: Queue, error: BrokenQueueError) -> None:
        """Stop until the driver resets the device: it broke a rule in `queue`."""
        self.is_active = False
        self.is_broken = True
        self.log.once("virtqueue.broken", queue.index, queue=queue.index, why=str(error))
        self.transport.needs_reset()

"""What both transports share: status, feature negotiation and queue set-up as state, without register addresses.

The driver's mistakes are dropped, logged once, and never leave a device half configured (Virtio 1.2, 2.1, 2.2, 3.1).
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, Any, Final

from devices.saved import Saved
from devices.virtio.device import VERSION_1
from devices.virtio.queue import BrokenQueueError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from devices.ports import Signal
    from devices.virtio.device import Runner, VirtioDevice
    from devices.virtio.queue import Queue

__all__ = ["ISR_CONFIG", "ISR_QUEUE", "Status", "VirtioTransport"]


class Status(IntFlag):
    """Bits of the device status field (2.1)."""

    ACKNOWLEDGE = 1 << 0
    DRIVER = 1 << 1
    DRIVER_OK = 1 << 2
    FEATURES_OK = 1 << 3
    DEVICE_NEEDS_RESET = 1 << 6
    FAILED = 1 << 7


DRIVER_OK: Final = int(Status.DRIVER_OK)
FEATURES_OK: Final = int(Status.FEATURES_OK)
NEEDS_RESET: Final = int(Status.DEVICE_NEEDS_RESET)
_DRIVER_BITS: Final = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED)

ISR_QUEUE: Final = 1 << 0
"""A queue has used buffers (4.1.4.5, and 4.2.2 for MMIO)."""
ISR_CONFIG: Final = 1 << 1
"""The configuration, or the status, has changed."""

_WORD: Final = 0xFFFF_FFFF


class VirtioTransport:
    """The state of a transport: fits `devices.virtio.device.Transport`.

    All but `config_changed` and `needs_reset` are called with the device's lock held.

    Attributes:
        device: the device model behind it.
        name: what the machine calls it, such as "virtio-blk0".
        queue_select: the queue that the queue registers mean.
        device_select, driver_select: which 32 feature bits the feature registers mean.
        isr: two bytes, one for ISR_QUEUE and one for ISR_CONFIG. Whoever interrupts sets a byte; `take_isr` clears
            only what it saw set, so that nothing is lost between its reading and its clearing: what is set again in
            between, the driver looks at after it has read.
    """

    def __init__(
        self, device: VirtioDevice, runner: Runner, queue_signals: Sequence[Signal], config_signal: Signal
    ) -> None:
        """Show `device` to a driver, whose queues `runner` serves, one signal a queue and one for the configuration."""
        self.device = device
        self.name = f"virtio-{device.name}"
        self.isr = memoryview(bytearray(2))
        self._runner = runner
        self._config_signal = config_signal
        self._failed = False
        for queue, signal in zip(device.queues, queue_signals, strict=True):
            queue.signal = signal
            queue.isr = self.isr
        device.attach(self, runner)
        self._clear()

    def _clear(self) -> None:
        self._status = 0
        self._failed = False
        self._driver_features = 0
        self._config_read = False
        self._config_is_new = False
        self.config_generation = 0
        self.queue_select = 0
        self.device_select = 0
        self.driver_select = 0
        self.isr[0] = self.isr[1] = 0

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state of the transport and of the device behind it; the runner has stopped."""
        return {
            "device_status": self._status,
            "needs_reset": self._failed,
            "driver_feature": self._driver_features,
            "device_feature_select": self.device_select,
            "driver_feature_select": self.driver_select,
            "queue_select": self.queue_select,
            "config_generation": self.config_generation,
            "config_is_new": self._config_is_new,
            "isr_status": self.peek_isr(),
            "device": self.device.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says; the runner has stopped, and starts afterwards if the device is active.

        Raises:
            KeyError, TypeError, ValueError: it is no state of such a device.
        """
        saved = Saved(state)
        status = saved.bits("device_status", _DRIVER_BITS)
        failed = saved.flag("needs_reset")
        chosen = saved.number("driver_feature", (1 << 64) - 1)
        device_select = saved.number("device_feature_select", _WORD)
        driver_select = saved.number("driver_feature_select", _WORD)
        queue_select = saved.number("queue_select", _WORD)
        generation = saved.number("config_generation", 0xFF)
        is_new = saved.flag("config_is_new")
        isr = saved.number("isr_status", ISR_QUEUE | ISR_CONFIG)
        device = saved.part("device")
        saved.end()
        if device["is_active"] and (failed or not status & DRIVER_OK or device["features"] != chosen):
            raise ValueError(f"{self.name} works with status {status:#x}")
        self.device.load(device)
        self._status, self._failed, self._driver_features = status, failed, chosen
        self.device_select, self.driver_select, self.queue_select = device_select, driver_select, queue_select
        self.config_generation, self._config_is_new = generation, is_new
        self.isr[0], self.isr[1] = int(bool(isr & ISR_QUEUE)), int(bool(isr & ISR_CONFIG))

    # --- status -------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device status field (2.1)."""
        return self._status | (NEEDS_RESET if self._failed else 0)

    def write_status(self, value: int) -> None:
        """Set status bits, or reset the device by a zero. Bits cannot be cleared otherwise (2.1.1)."""
        if value == 0:
            self._runner.stop()
            self.device.reset()
            self._clear()
            return
        new = value & _DRIVER_BITS & ~self._status
        if self._status & ~value:
            self.complain("status.cleared", status=self._status, value=value)
        if new & FEATURES_OK and not self._features_are_acceptable():
            new &= ~FEATURES_OK
        if new & DRIVER_OK and not (self._status | new) & FEATURES_OK:
            self.complain("status.driver_ok_too_early", status=self._status)
            new &= ~DRIVER_OK
        self._status |= new
        if new & DRIVER_OK and not self._failed:
            self.device.activate(self._driver_features)
            self._runner.start()

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET and, if the driver is ready, tell it (2.1.2)."""
        self._failed = True
        if self._status & DRIVER_OK:
            self.isr[1] = 1
            self._config_signal.fire()

    def complain(self, event: str, **fields: object) -> None:
        """Log the driver's mistake, the first time."""
        self.device.log.once(f"virtio.{event}", **fields)

    # --- features -----------------------------------------------------------------------------------------------------

    @property
    def device_features(self) -> int:
        """The 32 offered feature bits that `device_select` means; 0 beyond the 64th."""
        return self.device.offered >> 32 * self.device_select & _WORD if self.device_select < 2 else 0

    @property
    def driver_features(self) -> int:
        """The 32 bits that the driver chose, as `driver_select` means."""
        return self._driver_features >> 32 * self.driver_select & _WORD if self.driver_select < 2 else 0

    def write_driver_features(self, value: int) -> None:
        """Choose 32 feature bits; after FEATURES_OK it is too late (2.2.1)."""
        if self._status & FEATURES_OK:
            self.complain("features.too_late")
        elif self.driver_select < 2:
            shift = 32 * self.driver_select
            self._driver_features = self._driver_features & ~(_WORD << shift) | (value & _WORD) << shift
        elif value:
            self.complain("features.beyond_64")

    def _features_are_acceptable(self) -> bool:
        """Whether the driver chose among what is offered, and no legacy operation (2.2.2, 6.2)."""
        chosen = self._driver_features
        if chosen & ~self.device.offered or not chosen & VERSION_1:
            self.complain("features.refused", chosen=hex(chosen), offered=hex(self.device.offered))
            return False
        return True

    # --- configuration space ------------------------------------------------------------------------------------------

    def read_config(self, offset: int, size: int) -> int:
        """Return `size` bytes of the device-specific configuration space; beyond its end there are zeroes."""
        if self._config_is_new:  # 4.1.4.3.1: a generation ends with the first look at what changed
            self._config_is_new = False
            self.config_generation = (self.config_generation + 1) & 0xFF
        return int.from_bytes(self.device.config()[offset : offset + size], "little")

    def read_generation(self) -> int:
        """Return the configuration generation, 8 bits."""
        if self._config_is_new:
            self._config_is_new = False
            self.config_generation = (self.config_generation + 1) & 0xFF
        return self.config_generation

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Hand a write to the configuration space to the device."""
        self.device.write_config(offset, value.to_bytes(size, "little"))

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""
        self._config_is_new = True
        if self._status & DRIVER_OK:
            self.isr[1] = 1
            self._config_signal.fire()

    def peek_isr(self) -> int:
        """Return the pending interrupt causes."""
        return (ISR_QUEUE if self.isr[0] else 0) | (ISR_CONFIG if self.isr[1] else 0)

    def take_isr(self, causes: int = ISR_QUEUE | ISR_CONFIG) -> int:
        """Return the pending causes among `causes` and clear them; see `isr` for why nothing is lost."""
        taken = self.peek_isr() & causes
        if taken & ISR_QUEUE:
            self.isr[0] = 0
        if taken & ISR_CONFIG:
            self.isr[1] = 0
        return taken

    # --- queues -------------------------------------------------------------------------------------------------------

    @property
    def queue(self) -> Queue | None:
        """The selected queue; None when there is none of that number."""
        queues = self.device.queues
        return queues[self.queue_select] if self.queue_select < len(queues) else None

    def configurable_queue(self) -> Queue | None:
        """The selected queue while the driver may set it up (3.1.1): not once it is enabled."""
        queue = self.queue
        if queue is None or queue.is_enabled:
            self.complain("queue.fixed", queue=self.queue_select)
            return None
        return queue

    def set_queue_size(self, size: int) -> None:
        """Choose the size of the selected queue; what is wrong with it is told when it is enabled."""
        queue = self.configurable_queue()
        if queue is not None:
            queue.size = size

    def set_queue_address(self, area: str, value: int, mask: int) -> None:
        """Set the bits `mask` of an address of the selected queue: "descriptors", "available" or "used"."""
        queue = self.configurable_queue()
        if queue is not None:
            setattr(queue, area, getattr(queue, area) & ~mask | value & mask)

    def enable_queue(self) -> None:
        """Take the selected queue into use; one that cannot be makes the device need a reset."""
        queue = self.configurable_queue()
        if queue is None:
            return
        if not self._status & FEATURES_OK:
            self.complain("queue.too_early", queue=queue.index)
            return
        try:
            queue.enable(self._driver_features)
        except BrokenQueueError as error:
            self.device.fail(queue, error)
            return
        if self.device.is_active:  # one that was disabled comes back
            self._runner.stop()
            self._runner.start()

    def disable_queue(self) -> None:
        """Stop using the selected queue; it can be set up again (4.2.2.2)."""
        queue = self.queue
        if queue is None or not queue.is_enabled:
            return
        self._runner.stop()
        self.device.disable(queue)
        if self.device.is_active:
            self._runner.start()

    def kick(self, index: int) -> None:
        """Serve a queue: a kick that came through a register and not by an eventfd."""
        if self._status & DRIVER_OK and index < len(self.device.queues):
            self._runner.kick(index)

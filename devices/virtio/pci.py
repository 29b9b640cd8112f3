"""The PCI transport (Virtio 1.2, 4.1), non-transitional.

One 32-bit memory BAR holds every structure, a page each: common configuration, device-specific configuration, ISR
status, notifications, and MSI-X's table and pending bits.
"""

from __future__ import annotations

from enum import IntEnum
from struct import pack
from typing import TYPE_CHECKING, Any, Final

from devices.pci import PciFunction
from devices.pci_msix import NO_VECTOR, Msix
from devices.ports import OPEN_BUS, register_of
from devices.saved import Saved
from devices.virtio.transport import DRIVER_OK, VirtioTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from devices.ports import RoutedSignal
    from devices.virtio.device import Runner, VirtioDevice

__all__ = ["BAR", "BAR_SIZE", "MAX_QUEUES", "Common", "VirtioPci"]

BAR: Final = 0
"""The BAR that is used."""
BAR_SIZE: Final = 0x8000
"""How much it decodes, in bytes."""


class Common(IntEnum):
    """Offsets in struct virtio_pci_common_cfg, by the names of 4.1.4.3."""

    device_feature_select = 0  # RW, 32 bits
    device_feature = 4  # RO, 32 bits
    driver_feature_select = 8  # RW, 32 bits
    driver_feature = 12  # RW, 32 bits
    config_msix_vector = 16  # RW, 16 bits
    num_queues = 18  # RO, 16 bits
    device_status = 20  # RW, 8 bits
    config_generation = 21  # RO, 8 bits
    queue_select = 22  # RW, 16 bits
    queue_size = 24  # RW, 16 bits
    queue_msix_vector = 26  # RW, 16 bits
    queue_enable = 28  # RW, 16 bits
    queue_notify_off = 30  # RO, 16 bits
    queue_desc = 32  # RW, 64 bits, also by halves; so are the next two
    queue_driver = 40
    queue_device = 48


_PAGE: Final = 0x1000
_COMMON, _DEVICE, _ISR, _NOTIFY, _TABLE, _PENDING = range(0, 6 * _PAGE, _PAGE)
"""Where the structures are in the BAR."""
_NOTIFY_STEP: Final = 4
"""notify_off_multiplier (4.1.4.4), and room for it: the queue's index times this is where it is kicked."""
MAX_QUEUES: Final = 255
"""As many as the vector table's page has room for, with one vector for the configuration."""

_VENDOR: Final = 0x1AF4
_FIRST_DEVICE: Final = 0x1040
_REVISION: Final = 1
_CLASSES: Final = {
    1: 0x02_00_00,  # net: Ethernet
    2: 0x01_80_00,  # block: mass storage, other
    3: 0x07_80_00,  # console: communication, other
    5: 0x05_80_00,  # balloon: memory, other
    19: 0x07_80_00,  # vsock: communication, other
}
_NO_CLASS: Final = 0xFF_00_00
"""Class of what fits none that is defined: entropy, and whatever comes."""

_VENDOR_CAPABILITY: Final = 0x09
_COMMON_CFG, _NOTIFY_CFG, _ISR_CFG, _DEVICE_CFG, _PCI_CFG = range(1, 6)
"""cfg_type (4.1.4)."""
_COMMON_LENGTH: Final = 56
"""Without queue_notify_data and queue_reset, which go with features that are not offered."""

_WINDOW_BAR, _WINDOW_OFFSET, _WINDOW_LENGTH, _WINDOW_DATA, _WINDOW_END = 4, 8, 12, 16, 20
"""Fields of struct virtio_pci_cfg_cap, by which configuration space reaches into the BAR (4.1.4.9)."""

_LOW: Final = 0xFFFF_FFFF


class VirtioPci(PciFunction):
    """A virtio device on the PCI bus.

    What the guest does comes in under one lock: its configuration space and its BAR have the same.

    Attributes:
        device: the device model.
        transport: status, features and queues.
    """

    def __init__(
        self,
        device: VirtioDevice,
        runner: Runner,
        queue_signals: Sequence[RoutedSignal],
        config_signal: RoutedSignal,
    ) -> None:
        """Show `device` on a PCI bus: a signal and an MSI-X vector for each of its queues, and one for the rest.

        Raises:
            ValueError: the device has more than MAX_QUEUES queues.
        """
        queues = len(device.queues)
        if queues > MAX_QUEUES:
            raise ValueError(f"{device.name}: {queues} queues, and {MAX_QUEUES} is the most")
        identifier = _FIRST_DEVICE + device.device_id
        super().__init__(
            vendor=_VENDOR,
            device=identifier,
            class_code=_CLASSES.get(device.device_id, _NO_CLASS),
            revision=_REVISION,
            subsystem_vendor=_VENDOR,
            subsystem=identifier,
            has_pin=True,
        )
        self.device = device
        self.transport = VirtioTransport(device, runner, queue_signals, config_signal)
        self.name = self.transport.name
        self._config_signal = config_signal
        self._config_event = queues  # its index among the signals of MSI-X
        self._pin_was_in_use = True
        self.add_bar(BAR, BAR_SIZE)
        self._add_structure(_COMMON_CFG, _COMMON, _COMMON_LENGTH)
        self._add_structure(_NOTIFY_CFG, _NOTIFY, _NOTIFY_STEP * max(queues, 1), pack("<I", _NOTIFY_STEP))
        self._add_structure(_ISR_CFG, _ISR, 1)
        if device.config():
            self._add_structure(_DEVICE_CFG, _DEVICE, len(device.config()))
        # bar, offset, length and pci_cfg_data may be written
        window = pack("<xxBxxxII4s", 0xFF, _LOW, _LOW, b"\xff" * 4)
        self._window = self._add_structure(_PCI_CFG, 0, 0, bytes(4), writable=window)
        self._msix = Msix(
            self, (*queue_signals, config_signal), vectors=max(queues + 1, 2), bar=BAR, table=_TABLE, pending=_PENDING
        )
        self._describe_registers()

    def _add_structure(self, kind: int, offset: int, length: int, extra: bytes = b"", writable: bytes = b"") -> int:
        """Add a struct virtio_pci_cap (4.1.4) with `extra` data behind it."""
        body = pack("<BBBxxxII", 16 + len(extra), kind, BAR, offset, length) + extra
        return self.add_capability(_VENDOR_CAPABILITY, body, writable)

    def _describe_registers(self) -> None:
        """Lay struct virtio_pci_common_cfg out: at an offset, the width in bytes and what an access does."""
        transport = self.transport
        self._readers: dict[int, tuple[int, Callable[[], int]]] = {
            Common.device_feature_select: (4, lambda: transport.device_select),
            Common.device_feature: (4, lambda: transport.device_features),
            Common.driver_feature_select: (4, lambda: transport.driver_select),
            Common.driver_feature: (4, lambda: transport.driver_features),
            Common.config_msix_vector: (2, lambda: self._msix.vector(self._config_event)),
            Common.num_queues: (2, lambda: len(self.device.queues)),
            Common.device_status: (1, lambda: transport.status),
            Common.config_generation: (1, transport.read_generation),
            Common.queue_select: (2, lambda: transport.queue_select),
            Common.queue_size: (2, self._read_queue_size),
            Common.queue_msix_vector: (2, self._read_queue_vector),
            Common.queue_enable: (2, lambda: int(transport.queue is not None and transport.queue.is_enabled)),
            Common.queue_notify_off: (2, lambda: transport.queue_select if transport.queue is not None else 0),
        }
        self._writers: dict[int, tuple[int, Callable[[int], None]]] = {
            Common.device_feature_select: (4, lambda value: setattr(transport, "device_select", value)),
            Common.driver_feature_select: (4, lambda value: setattr(transport, "driver_select", value)),
            Common.driver_feature: (4, transport.write_driver_features),
            Common.config_msix_vector: (2, lambda value: self._msix.map(self._config_event, value)),
            Common.device_status: (1, self._write_status),
            Common.queue_select: (2, lambda value: setattr(transport, "queue_select", value)),
            Common.queue_size: (2, transport.set_queue_size),
            Common.queue_msix_vector: (2, self._write_queue_vector),
            Common.queue_enable: (2, self._write_queue_enable),
        }
        for where, area in (
            (Common.queue_desc, "descriptors"),
            (Common.queue_driver, "available"),
            (Common.queue_device, "used"),
        ):
            self._describe_address(where, area, 0)
            self._describe_address(where + 4, area, 32)

    def _describe_address(self, where: int, area: str, shift: int) -> None:
        """Describe one half of an address (4.1.3.2); the address of a queue that does not exist is zero."""
        transport = self.transport
        self._readers[where] = 4, lambda: getattr(transport.queue, area, 0) >> shift & _LOW
        self._writers[where] = 4, lambda value: transport.set_queue_address(area, value << shift, _LOW << shift)

    # --- for the machine ----------------------------------------------------------------------------------------------

    def notify_address(self, index: int) -> tuple[int, int]:
        """Return BAR and offset in it where the driver writes 16 bits to kick queue `index` (4.1.4.4)."""
        return BAR, _NOTIFY + _NOTIFY_STEP * index

    @property
    def line_is_asserted(self) -> bool:
        """Whether the function drives its pin now: asked by the machine after the guest's end of interrupt."""
        return self.interrupt_is_pending and not self.intx_is_disabled

    @property
    def _pin_is_in_use(self) -> bool:
        return not self._msix.is_enabled and not self.intx_is_disabled

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state of the function, its interrupts, its transport, and the device; the runner has stopped."""
        return super().state() | {"msix": self._msix.state(), "transport": self.transport.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Become what `state` says, but for decoding: see PciFunction. The runner starts afterwards.

        Raises:
            KeyError, TypeError, ValueError: it is no state of such a function.
        """
        saved = Saved(state)
        msix = self._msix.parse(saved.part("msix"))
        transport = saved.part("transport")
        super().load({name: value for name, value in state.items() if name not in {"msix", "transport"}})
        self.transport.load(transport)
        self._msix.put(msix)
        self._pin_was_in_use = self._pin_is_in_use

    # --- configuration space ------------------------------------------------------------------------------------------

    @property
    def interrupt_is_pending(self) -> bool:
        """All bits of the ISR status, or-ed; nothing while MSI-X is enabled (4.1.4.5.1)."""
        return not self._msix.is_enabled and self.transport.peek_isr() != 0

    def config_read(self, register: int, size: int) -> int:
        """Return `size` bytes from `register` on; those of pci_cfg_data are read from the BAR."""
        if self._touches_window(register, size):
            target = self._window_target()
            if target is not None:
                offset, length = target
                value = self.bar_read(BAR, offset, length) & (1 << 8 * length) - 1
                self.poke(self._window + _WINDOW_DATA, length, value)
        return super().config_read(register, size)

    def config_write(self, register: int, size: int, value: int) -> None:
        """Change the writable bits among `size` bytes at `register`; pci_cfg_data is written to the BAR."""
        super().config_write(register, size, value)
        if self._touches_window(register, size):
            target = self._window_target()
            if target is not None:
                offset, length = target
                self.bar_write(BAR, offset, length, self.peek(self._window + _WINDOW_DATA, length))
            return
        was_enabled = self._msix.is_enabled
        had_pending = self._msix.any_pending()
        self._msix.update()
        if was_enabled and not self._msix.is_enabled and not had_pending:
            # The causes in it went out as messages. They would hold a line down that nobody comes to release.
            self.transport.take_isr()
        is_in_use = self._pin_is_in_use
        if is_in_use and not self._pin_was_in_use and self.line_is_asserted:
            self._config_signal.fire()
        self._pin_was_in_use = is_in_use

    def _touches_window(self, register: int, size: int) -> bool:
        return register < self._window + _WINDOW_END and self._window + _WINDOW_DATA < register + size

    def _window_target(self) -> tuple[int, int] | None:
        """Where in the BAR pci_cfg_data leads, as (offset, length); None: nowhere, the driver has set it up wrong."""
        offset = self.peek(self._window + _WINDOW_OFFSET, 4)
        length = self.peek(self._window + _WINDOW_LENGTH, 4)
        if self.peek(self._window + _WINDOW_BAR, 1) != BAR or length not in (1, 2, 4):
            return None
        return None if offset % length or offset + length > BAR_SIZE else (offset, length)

    # --- the BAR ------------------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int:  # noqa: ARG002 - there is one BAR
        """Return what the structure at `offset` answers."""
        page, offset = offset & -_PAGE, offset & _PAGE - 1
        if page == _ISR:
            return self.transport.take_isr() if offset == 0 else 0
        if page == _COMMON:
            return self._read_common(offset, size)
        if page == _DEVICE:
            return self.transport.read_config(offset, size)
        if page == _TABLE:
            return self._msix.read_table(offset, size)
        if page == _PENDING:
            return self._msix.read_pending(offset, size)
        return 0 if page == _NOTIFY else OPEN_BUS

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:  # noqa: ARG002 - there is one BAR
        """Hand a write to the structure at `offset`."""
        page, offset = offset & -_PAGE, offset & _PAGE - 1
        if page == _NOTIFY:
            self._write_notify(offset, size)
        elif page == _COMMON:
            self._write_common(offset, size, value)
        elif page == _DEVICE:
            if offset + size <= len(self.device.config()):
                self.transport.write_config(offset, size, value)
        elif page == _TABLE:
            self._msix.write_table(offset, size, value)

    def _write_notify(self, offset: int, size: int) -> None:
        """Serve the queue that this address is of: the kick did not go by an eventfd (4.1.5.2)."""
        if size < 2 or offset % _NOTIFY_STEP:
            self.transport.complain("pci.kick", offset=offset, size=size)
        else:
            self.transport.kick(offset // _NOTIFY_STEP)

    def bar_register_name(self, bar: int, offset: int, *, write: bool) -> str:  # noqa: ARG002 - there is one BAR
        """Return the name of a field of the common configuration, or else of the structure."""
        page, inside = offset & -_PAGE, offset & _PAGE - 1
        if page == _COMMON:
            return register_of(Common, offset, write=write, width=8)
        vectors = self._msix.vectors
        name, length = {
            _DEVICE: ("device-config", len(self.device.config())),
            _ISR: ("ISR", 1),
            _NOTIFY: ("QueueNotify", _NOTIFY_STEP * len(self.device.queues)),
            _TABLE: ("msix-table", 16 * vectors),
            _PENDING: ("msix-pba", 8 * -(-vectors // 64)),
        }.get(page, ("", 0))
        return name if inside < length else f"+{offset:#x}"

    # --- common configuration -----------------------------------------------------------------------------------------

    def _read_common(self, offset: int, size: int) -> int:
        """Return a register; one that is read in another width than its own (4.1.3.1) is zero."""
        if size == 8 and offset in (32, 40, 48):
            return self._read_common(offset, 4) | self._read_common(offset + 4, 4) << 32
        width, reader = self._readers.get(offset, (0, None))
        if reader is None or width != size:
            self.transport.complain("pci.read", offset=offset, size=size)
            return 0
        return reader()

    def _write_common(self, offset: int, size: int, value: int) -> None:
        """Set a register; one that is read-only, or written in another width than its own, stays as it is."""
        if size == 8 and offset in (32, 40, 48):
            self._write_common(offset, 4, value & _LOW)
            self._write_common(offset + 4, 4, value >> 32)
            return
        width, writer = self._writers.get(offset, (0, None))
        if writer is None or width != size:
            self.transport.complain("pci.write", offset=offset, size=size)
        else:
            writer(value)

    def _write_status(self, value: int) -> None:
        self.transport.write_status(value)
        if value == 0:
            self._msix.reset()
        elif self.transport.status & DRIVER_OK:
            self._msix.start()

    def _read_queue_size(self) -> int:
        """Return the size; 0 for a queue that does not exist, or whose size the driver set to no power of two."""
        queue = self.transport.queue
        return 0 if queue is None or queue.size & (queue.size - 1) else queue.size

    def _read_queue_vector(self) -> int:
        queue = self.transport.queue
        return NO_VECTOR if queue is None else self._msix.vector(queue.index)

    def _write_queue_vector(self, value: int) -> None:
        queue = self.transport.queue
        if queue is not None:
            self._msix.map(queue.index, value)

    def _write_queue_enable(self, value: int) -> None:
        if value == 1:
            self.transport.enable_queue()
        else:
            self.transport.complain("queue.enable", queue=self.transport.queue_select, value=value)

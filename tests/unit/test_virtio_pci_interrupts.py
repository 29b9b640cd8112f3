"""Interrupts of a virtio device on PCI: MSI-X vectors, ISR status, INTx (Virtio 1.2, 4.1.4.5, 4.1.5.1.2 to 4.1.5.4)."""

from __future__ import annotations

import pytest
from test_virtio_pci import CONFIG_VECTOR, NEEDS_RESET, NUM_QUEUES, QUEUE_SELECT, QUEUE_VECTOR, STATUS, Guest

COMMAND, PCI_STATUS, INTERRUPT_STATUS, INTX_DISABLE = 4, 6, 1 << 3, 1 << 10
MSIX_ENABLE, NO_VECTOR = 0x8000, 0xFFFF
QUEUE, CONFIG = 1, 2


@pytest.fixture
def guest() -> Guest:
    guest = Guest()
    guest.start()
    return guest


def sent(guest: Guest) -> list[list[object]]:
    return [signal.sent for signal in guest.signals]


def message(vector: int) -> tuple[int, int]:
    return 0xFEE0_0000, 0x40 + vector


# --- MSI-X ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queues", "vectors"), [(0, 2), (1, 2), (3, 4), (255, 256)])
def test_table_size(queues, vectors):
    """4.1.5.1.2.1: at least 2 vectors, reported in Table Size; table and pending bits are in the BAR, apart."""
    guest = Guest(queues=queues)
    assert guest.config(guest.msix + 2, 2) + 1 == vectors
    table, pending = guest.config(guest.msix + 4, 4), guest.config(guest.msix + 8, 4)
    assert table & 7 == pending & 7 == 0
    assert table + 16 * vectors <= pending
    assert pending + 8 * (-(-vectors // 64)) <= guest.bar_size


def test_any_event_maps_to_any_vector(guest):
    """4.1.5.1.2.1: what was mapped reads back, NO_VECTOR when unmapped or when there is no such vector."""
    guest.config(guest.msix + 2, 2, MSIX_ENABLE)
    for vector, shown in ((0, 0), (3, 3), (NO_VECTOR, NO_VECTOR), (1, 1), (4, NO_VECTOR), (2, 2), (0x7FF, NO_VECTOR)):
        guest.common(CONFIG_VECTOR, 2, vector)
        assert guest.common(CONFIG_VECTOR, 2) == shown
        for index in range(3):
            guest.common(QUEUE_SELECT, 2, index)
            guest.common(QUEUE_VECTOR, 2, vector)
            assert guest.common(QUEUE_VECTOR, 2) == shown


def test_messages(guest):
    """4.1.5.3, 4.1.5.4: each event by the vector that it is mapped to."""
    guest.map_vectors()
    guest.interrupt(1)
    guest.function.transport.config_changed()
    assert sent(guest) == [[], [message(1)], [], [message(3)]]
    assert guest.config(PCI_STATUS, 2) & INTERRUPT_STATUS == 0, "the pin has no part in it"
    assert not guest.function.line_is_asserted


def test_no_vector_is_silent(guest):
    """4.1.5.3.1, 4.1.5.4.1: no interrupt for what has NO_VECTOR."""
    guest.map_vectors()
    guest.common(CONFIG_VECTOR, 2, NO_VECTOR)
    guest.common(QUEUE_SELECT, 2, 0)
    guest.common(QUEUE_VECTOR, 2, NO_VECTOR)
    guest.interrupt(0)
    guest.function.transport.config_changed()
    assert sent(guest) == [[], [], [], []]


def test_masked_vector_is_pending_in_the_bar(guest):
    guest.map_vectors()
    table, pending = guest.config(guest.msix + 4, 4), guest.config(guest.msix + 8, 4)
    guest.bar(table + 16 * 2 + 12, 4, 1)
    guest.interrupt(2)
    assert guest.bar(pending, 4) == 1 << 2
    guest.bar(pending, 4, 0)
    assert guest.bar(pending, 4) == 1 << 2
    guest.bar(table + 16 * 2 + 12, 4, 0)
    assert guest.bar(pending, 4) == 0
    assert guest.signals[2].sent == [message(2)]


def test_function_mask(guest):
    guest.map_vectors()
    guest.config(guest.msix + 2, 2, 0xC000)
    guest.interrupt(0)
    assert sent(guest) == [[], [], [], []]
    guest.config(guest.msix + 3, 1, 0x80)
    assert guest.signals[0].sent == [message(0)]


# --- ISR status and INTx ---------------------------------------------------------------------------------------------


def test_isr(guest):
    """4.1.4.5.1: set before the notification, bit 0 a queue, bit 1 the configuration; reset to 0 by a read."""
    assert guest.isr() == 0
    guest.interrupt(0)
    assert guest.signals[0].sent == ["line"]
    assert guest.isr() == QUEUE
    assert guest.isr() == 0
    guest.function.transport.config_changed()
    guest.interrupt(2)
    assert guest.isr() == QUEUE | CONFIG
    assert guest.isr() == 0


def test_interrupt_status_is_the_isr(guest):
    """4.1.4.5.1: the logical or of its bits; the line is down again when it has been read."""
    assert guest.config(PCI_STATUS, 2) & INTERRUPT_STATUS == 0
    guest.interrupt(0)
    assert guest.config(PCI_STATUS, 2) & INTERRUPT_STATUS
    assert guest.function.line_is_asserted
    assert guest.config(PCI_STATUS, 2) & INTERRUPT_STATUS, "looking does not clear it"
    guest.isr()
    assert guest.config(PCI_STATUS, 2) & INTERRUPT_STATUS == 0
    assert not guest.function.line_is_asserted


def test_broken_device_interrupts(guest):
    """2.1.2, 4.1.4.5.1: DEVICE_NEEDS_RESET comes with a configuration change interrupt."""
    guest.function.transport.needs_reset()
    assert guest.common(STATUS, 1) & NEEDS_RESET
    assert guest.signals[-1].sent == ["line"]
    assert guest.isr() == CONFIG


def test_disabled_line_is_silent_until_enabled(guest):
    """PCI 3.0, 6.2.2: INTx disable."""
    guest.config(COMMAND, 2, INTX_DISABLE)
    guest.interrupt(0)
    assert guest.signals[0].sent == []
    assert guest.config(PCI_STATUS, 2) & INTERRUPT_STATUS
    assert not guest.function.line_is_asserted
    guest.config(COMMAND, 2, 0)
    assert guest.signals[0].sent == ["line"]
    assert guest.function.line_is_asserted


def test_enabled_again_a_level_is_asserted_again(guest):
    """A driver that disables INTx in its handler, and looks at the ISR only after it has enabled it again."""
    guest.interrupt(0)
    guest.config(COMMAND, 2, INTX_DISABLE)
    guest.config(COMMAND, 2, 0)
    assert guest.signals[-1].sent == ["line"]
    guest.isr()
    guest.config(COMMAND, 2, INTX_DISABLE)
    guest.config(COMMAND, 2, 0)
    assert guest.signals[-1].sent == ["line"]


def test_a_vector_number_alone_keeps_the_line(guest):
    """4.1.5.1.2: vectors matter while MSI-X is enabled."""
    guest.common(QUEUE_SELECT, 2, 0)
    guest.common(QUEUE_VECTOR, 2, NO_VECTOR)
    guest.interrupt(0)
    assert guest.signals[0].sent == ["line"]


def test_msix_off_leaves_no_line_down(guest):
    """What went out as a message is no cause for the pin afterwards."""
    guest.map_vectors()
    guest.interrupt(0)
    guest.config(guest.msix + 2, 2, 0)
    assert not guest.function.line_is_asserted
    assert all("line" not in signal.sent for signal in guest.signals)
    guest.interrupt(0)
    assert guest.function.line_is_asserted


def test_msix_off_delivers_what_was_held(guest):
    guest.map_vectors()
    guest.config(guest.msix + 2, 2, 0xC000)
    guest.interrupt(0)
    guest.config(guest.msix + 2, 2, 0)
    assert guest.signals[0].sent == ["line"]
    assert guest.isr() == QUEUE


def test_reset_clears_isr_and_lets_nothing_out(guest):
    guest.interrupt(0)
    guest.common(STATUS, 1, 0)
    assert not guest.function.line_is_asserted
    assert guest.isr() == 0
    assert {signal.target for signal in guest.signals} == {"hold"}
    assert guest.common(NUM_QUEUES, 2) == 3
    guest.start()
    assert {signal.target for signal in guest.signals} == {"line"}

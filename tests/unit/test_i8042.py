"""The keyboard controller without a keyboard, as guests probe it and reset through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fakes import FakeIrq
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from devices.i8042 import I8042

if TYPE_CHECKING:
    from devices.ports import Device

DATA, COMMAND = 0, 4  # offsets from port 0x60
# Status bits
OBF, IBF, SYS, A2, UNLOCKED, AUX_DATA, TIMEOUT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
# Command byte bits
KBD_INT, AUX_INT, KBD_DISABLED, AUX_DISABLED, TRANSLATE = 0x01, 0x02, 0x10, 0x20, 0x40


class Driver:
    """The guest's side: sends commands, reads answers, and counts the resets it caused."""

    def __init__(self) -> None:
        self.irq = FakeIrq()
        self.resets = 0
        self.device = I8042(self._on_reset, irq=self.irq)

    def _on_reset(self) -> None:
        self.resets += 1

    def line(self) -> bool:
        """Return the level of the interrupt line; a type checker would take an attribute for constant."""
        return self.irq.level

    @property
    def status(self) -> int:
        return self.device.read(COMMAND, 1)

    def read(self) -> int:
        return self.device.read(DATA, 1)

    def command(self, command: int, *parameters: int) -> None:
        self.device.write(COMMAND, 1, command)
        for parameter in parameters:
            self.device.write(DATA, 1, parameter)

    def ask(self, command: int, *parameters: int) -> int:
        """Send a command and return its answer, which must be there at once."""
        self.command(command, *parameters)
        assert self.status & OBF
        answer = self.read()
        assert not self.status & OBF
        return answer


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_it_is_a_device() -> None:
    device: Device = I8042(lambda: None)
    assert device.read(COMMAND, 1) == UNLOCKED | SYS


def test_at_rest_there_is_nothing_to_flush(driver: Driver) -> None:
    """A status with the output buffer full for ever is what makes Linux say that there is no controller."""
    assert driver.status == UNLOCKED | SYS
    assert driver.read() == 0
    assert not driver.line()


# --- reset ------------------------------------------------------------------------------------------------------------


def test_linux_reboots_by_pulsing_the_reset_line(driver: Driver) -> None:
    """Linux's reboot=k: wait until the input buffer is empty, then command 0xFE."""
    assert not driver.status & IBF
    driver.command(0xFE)
    assert driver.resets == 1


@pytest.mark.parametrize("command", range(0xF0, 0x100))
def test_a_pulse_resets_when_its_bit_zero_is_zero(driver: Driver, command: int) -> None:
    driver.command(command)
    assert driver.resets == (0 if command & 1 else 1)


@pytest.mark.parametrize(("value", "resets"), [(0xFE, 1), (0x00, 1), (0xDF, 0), (0xDD, 0), (0x01, 0)])
def test_output_port_bit_zero_low_resets(driver: Driver, value: int, resets: int) -> None:
    """0xDF and 0xDD are what boot code writes to open and close A20."""
    driver.command(0xD1, value)
    assert driver.resets == resets
    assert driver.ask(0xD0) == value


def test_output_port_starts_out_of_reset_with_a20_open(driver: Driver) -> None:
    assert driver.ask(0xD0) & 0x03 == 0x03


def test_linux_real_mode_a20_sequence_never_blocks(driver: Driver) -> None:
    for port, value in [(COMMAND, 0xD1), (DATA, 0xDF), (COMMAND, 0xFF)]:
        assert not driver.status & (IBF | OBF)
        driver.device.write(port, 1, value)
    assert not driver.status & (IBF | OBF)
    assert driver.resets == 0


# --- what a probe finds -----------------------------------------------------------------------------------------------


def test_self_test_passes(driver: Driver) -> None:
    driver.command(0x60, TRANSLATE)
    assert not driver.status & SYS
    assert driver.ask(0xAA) == 0x55
    assert driver.status & SYS


def test_interface_tests_tell_the_ports_apart(driver: Driver) -> None:
    """0: no error; 1 to 4: a line is stuck. Linux takes 0, 0xFA and 0xFF from the second one for a working port."""
    assert driver.ask(0xAB) == 0
    assert driver.ask(0xA9) in {1, 2, 3, 4}


def test_command_byte_reads_back(driver: Driver) -> None:
    assert driver.ask(0x20) == SYS | TRANSLATE | KBD_DISABLED | AUX_DISABLED
    driver.command(0x60, KBD_INT | AUX_DISABLED)
    assert driver.ask(0x20) == KBD_INT | AUX_DISABLED


def test_keyboard_interface_is_disabled_and_enabled(driver: Driver) -> None:
    driver.command(0xAE)
    assert not driver.ask(0x20) & KBD_DISABLED
    driver.command(0xAD)
    assert driver.ask(0x20) & KBD_DISABLED


def test_the_absent_auxiliary_port_cannot_be_enabled(driver: Driver) -> None:
    driver.command(0xA8)
    assert driver.ask(0x20) & AUX_DISABLED
    driver.command(0x60, 0x00)
    assert driver.ask(0x20) == AUX_DISABLED
    driver.command(0xA7)
    assert driver.ask(0x20) == AUX_DISABLED


def test_the_keyboard_is_not_locked(driver: Driver) -> None:
    """Else Linux warns "Keylock active"; the input port says the same in bit 7."""
    assert driver.status & UNLOCKED
    assert driver.ask(0xC0) & 0x80


def test_status_tells_commands_from_data(driver: Driver) -> None:
    driver.command(0xAE)
    assert driver.status & A2
    driver.device.write(DATA, 1, 0xED)
    assert not driver.status & A2


@pytest.mark.parametrize("byte", [0xF2, 0xED, 0xFF, 0x00])
def test_a_byte_for_the_absent_keyboard_times_out(driver: Driver, byte: int) -> None:
    driver.device.write(DATA, 1, byte)
    assert driver.status & (OBF | TIMEOUT | AUX_DATA) == OBF | TIMEOUT
    assert driver.read() == 0xFE
    assert not driver.status & (OBF | TIMEOUT)


def test_a_byte_for_the_absent_mouse_times_out(driver: Driver) -> None:
    driver.command(0xD4, 0xFF)
    assert driver.status & (OBF | TIMEOUT) == OBF | TIMEOUT
    assert driver.read() == 0xFE


def test_a_time_out_does_not_stain_the_next_answer(driver: Driver) -> None:
    driver.device.write(DATA, 1, 0xF2)
    driver.command(0x20)
    assert driver.status & (OBF | TIMEOUT) == OBF


def test_a_byte_can_be_put_as_if_from_the_keyboard(driver: Driver) -> None:
    assert driver.ask(0xD2, 0x1E) == 0x1E


def test_a_command_gives_up_the_parameter_of_the_one_before(driver: Driver) -> None:
    driver.command(0x60)
    driver.command(0xAE)
    driver.device.write(DATA, 1, 0x00)
    assert driver.read() == 0xFE
    assert driver.ask(0x20) & TRANSLATE


def test_a_parameter_is_taken_once(driver: Driver) -> None:
    driver.command(0xD2, 0x11)
    driver.device.write(DATA, 1, 0x22)
    assert driver.read() == 0xFE


# --- IRQ 1 ------------------------------------------------------------------------------------------------------------


def test_interrupt_follows_the_output_buffer(driver: Driver) -> None:
    driver.command(0x60, TRANSLATE | SYS | KBD_INT)
    assert not driver.line()
    driver.device.write(DATA, 1, 0xF2)
    assert driver.line()
    driver.read()
    assert not driver.line()
    assert driver.irq.edges == 1


def test_no_interrupt_that_nobody_enabled(driver: Driver) -> None:
    driver.device.write(DATA, 1, 0xF2)
    assert driver.status & OBF
    assert driver.irq.edges == 0
    driver.command(0x60, KBD_INT)
    assert driver.line()
    driver.command(0x60, 0)
    assert not driver.line()


# --- Linux's probe, step by step --------------------------------------------------------------------------------------


def test_linux_gives_the_auxiliary_port_up_without_a_wait(driver: Driver) -> None:
    """i8042_check_aux: the loopback's byte must carry the AUX bit; failing that the interface test must pass."""
    driver.command(0xD3, 0x5A)
    assert driver.status & (OBF | AUX_DATA) == OBF  # the driver leaves the byte unread and goes on
    driver.command(0xA9)
    assert driver.status & OBF
    assert driver.read() not in {0x00, 0xFA, 0xFF}
    assert not driver.status & OBF


def test_linux_gives_the_keyboard_up_without_a_wait(driver: Driver) -> None:
    """atkbd_probe over libps2: GETID, then SETLEDS; a NAK is tried twice, silence would be waited for."""
    first = driver.ask(0x20)
    assert driver.ask(0x20) == first  # it reads until two agree
    driver.command(0x60, first | KBD_DISABLED)
    driver.command(0x60, first & ~KBD_DISABLED | KBD_INT)
    for attempt, byte in enumerate([0xF2, 0xF2, 0xED, 0xED], start=1):
        driver.device.write(DATA, 1, byte)
        assert driver.irq.edges == attempt
        assert driver.status & TIMEOUT
        assert driver.read() == 0xFE
        assert not driver.line()


def test_linux_does_not_try_mice_on_the_keyboard_port(driver: Driver) -> None:
    """With the translation off the port counts as one that may hold a mouse."""
    assert driver.ask(0x20) & TRANSLATE


# --- hostile guests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_offsets_of_others_are_open_bus(driver: Driver, offset: int) -> None:
    driver.device.write(offset, 1, 0xFE)
    assert driver.device.read(offset, 1) == 0xFF
    assert driver.resets == 0


@pytest.mark.parametrize(("size", "above"), [(2, 0xFF00), (4, 0xFFFF_FF00)])
def test_a_wide_access_reaches_one_port(driver: Driver, size: int, above: int) -> None:
    assert driver.device.read(COMMAND, size) == above | UNLOCKED | SYS
    driver.device.write(COMMAND, size, 0x1220)
    assert driver.device.read(DATA, size) == above | SYS | TRANSLATE | KBD_DISABLED | AUX_DISABLED


def test_unknown_commands_are_noted_once_and_do_nothing(driver: Driver) -> None:
    with capture_logs() as events:
        for _ in range(3):
            driver.command(0x99)
    assert [(event["event"], event["command"]) for event in events] == [("i8042.unknown_command", 0x99)]
    assert driver.status & OBF == 0
    assert driver.resets == 0


def test_reset_forgets_everything(driver: Driver) -> None:
    driver.command(0x60, KBD_INT)
    driver.device.write(DATA, 1, 0xF2)
    driver.command(0xD1)
    driver.device.reset()
    assert driver.status == UNLOCKED | SYS
    assert not driver.line()
    driver.device.write(DATA, 1, 0x00)
    assert driver.resets == 0
    assert driver.ask(0x20) == SYS | TRANSLATE | KBD_DISABLED | AUX_DISABLED


@given(
    st.lists(st.tuples(st.sampled_from(["in", "out"]), st.integers(0, 7), st.sampled_from([1, 2, 4]), st.integers()))
)
def test_whatever_a_guest_does_the_controller_stays_usable(traffic: list[tuple[str, int, int, int]]) -> None:
    driver = Driver()
    with capture_logs():
        for direction, offset, size, raw in traffic:
            value = raw & ((1 << 8 * size) - 1)
            if direction == "in":
                assert 0 <= driver.device.read(offset, size) < 1 << 8 * size
            else:
                driver.device.write(offset, size, value)
            assert not driver.status & IBF
            full, enabled = driver.status & OBF, driver.device._command_byte & KBD_INT
            assert driver.line() == bool(full and enabled)
    before = driver.resets
    assert driver.ask(0xAA) == 0x55
    driver.command(0xFE)
    assert driver.resets == before + 1

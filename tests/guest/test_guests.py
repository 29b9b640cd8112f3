"""The assembly guests of guest-kernels/, each held to what its summary promises, on whatever KVM there is.

Only what holds on every kind of host is asserted: a software KVM leaves the guest once for each byte of `rep outsb`,
hardware once for the lot; both hand a device the same elements in the same order.
"""

import random
import time
from typing import NamedTuple

import pytest

from hypervisor import Machine, MachineConfig, Outcome, Stop

pytestmark = pytest.mark.kvm

TIMEOUT = 120
"""Seconds: far more than any of these takes, in the emulated host too."""

TEST_PORT = 0x5658
TEST_MMIO = 0xD000_0000
COM1_LSR = 5
ROW = b"abcdefghijklmnopqrstuvwxyz0123456789 the quick brown fox jumps\r\n"


class Recorder:
    """A device that remembers what it was asked, and answers with the alphabet, little-endian, element by element."""

    def __init__(self):
        self.log = []
        self._letters = 0

    def read(self, offset, size):
        letters = bytes(ord("a") + (self._letters + i) % 26 for i in range(size))
        self._letters += size
        value = int.from_bytes(letters, "little")
        self.log.append(("read", offset, size, value))
        return value

    def write(self, offset, size, value):
        self.log.append(("write", offset, size, value))

    @property
    def writes(self):
        return [entry[1:] for entry in self.log if entry[0] == "write"]

    @property
    def reads(self):
        return [entry[1:] for entry in self.log if entry[0] == "read"]


class Memory(Recorder):
    """A device whose registers hold what was written, in a page of bytes."""

    def __init__(self):
        super().__init__()
        self._bytes = bytearray(4096)

    def read(self, offset, size):
        value = int.from_bytes(self._bytes[offset : offset + size], "little")
        self.log.append(("read", offset, size, value))
        return value

    def write(self, offset, size, value):
        super().write(offset, size, value)
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")


class Run(NamedTuple):
    """A finished run and what came out of it; `ports` and `memory` are the devices that sat at the test's addresses."""

    outcome: Outcome
    console: bytes
    marks: bytes
    ports: Recorder
    memory: Memory

    @property
    def status(self):
        return self.outcome.status


def config_of(name, **settings):
    return MachineConfig(kernel=name, **({"ram_mib": 16, "debug_exit": "raw"} | settings))


@pytest.fixture(autouse=True, scope="module", params=["booted", "restored"])
def way(request, tmp_path_factory):
    """Run every guest twice: from its boot to its end, and saved on the way, the rest of it in a restored machine."""
    Way.folder = tmp_path_factory.mktemp("saved") if request.param == "restored" else None
    yield
    Way.folder = None


class Way:
    folder = None
    chance = random.Random(11)
    runs = moved = 0


def run(name, *, port=TEST_PORT, **settings):
    """Run the guest called `name` to its end, with a recorder at four ports and one at a page of MMIO."""
    ports, memory = Recorder(), Memory()

    def claim(machine):
        machine.bus_pio.claim(port, 4, ports, "test-ports")
        machine.bus_mmio.claim(TEST_MMIO, 4096, memory, "test-memory")

    with Machine(config_of(name, **settings)) as machine:
        claim(machine)
        if Way.folder is None or not saved_on_the_way(machine):
            outcome = machine.wait(TIMEOUT) if Way.folder else machine.run(timeout=TIMEOUT)
            return Run(outcome, machine.console.output, machine.debug_console.output, ports, memory)
        first = machine.console.output, machine.debug_console.output
    with Machine.restore(Way.folder / "snapshot") as machine:
        claim(machine)
        outcome = machine.run(timeout=TIMEOUT)
        return Run(outcome, first[0] + machine.console.output, first[1] + machine.debug_console.output, ports, memory)


def saved_on_the_way(machine):
    """Start a machine and save it at a random moment; return whether its guest had not ended by then."""
    Way.runs += 1
    machine.start()
    time.sleep(Way.chance.random() * 0.004)
    machine.pause()
    if machine.outcome is not None:
        return False
    machine.save(Way.folder / "snapshot", suspend=True)
    Way.moved += 1
    return True


# --- saying hello -----------------------------------------------------------------------------------------------------


def test_hello_by_port_io():
    assert run("hello-pio").console == b"hello\n"


def test_hello_by_mmio_reaches_the_device_byte_by_byte():
    writes = [entry for entry in run("hello-mmio").memory.writes if entry[0] == 0]
    assert writes == [(0, 1, byte) for byte in b"hello\n"]


def test_hello_by_mmio_reads_what_the_device_answers():
    class Device(Memory):
        def read(self, offset, size):
            self.log.append(("read", offset, size, 0))
            return 0xC0FFEE00

    device = Device()
    with Machine(config_of("hello-mmio")) as machine:
        machine.bus_mmio.claim(TEST_MMIO, 16, device, "test-memory")
        machine.run(timeout=TIMEOUT)
        assert machine.console.output == b"the device answers 0xc0ffee00\n"
    assert device.log[-2:] == [("read", 4, 4, 0), ("write", 8, 4, 0xC0FFEE00)]


def test_hello_by_mmio_where_nobody_listens():
    with Machine(config_of("hello-mmio")) as machine:
        machine.run(timeout=TIMEOUT)
        assert machine.console.output == b"the device answers 0xffffffff\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hello16", b"hello from real mode\n"),
        ("hello32", b"hello from protected mode\n"),
        ("hello64", b"hello from long mode\n"),
    ],
)
def test_hello_from_a_flat_binary_of_each_mode(name, text):
    assert run(name).console == text


@pytest.mark.parametrize(("protocol", "entry"), [("linux64", b"64-bit boot protocol"), ("pvh", b"PVH")])
def test_an_elf_file_is_entered_by_the_protocol_asked_for(protocol, entry):
    assert run("hello-elf64", protocol=protocol, append="root=none quiet").console == entry + b": root=none quiet\n"


# --- ways to end ------------------------------------------------------------------------------------------------------


def test_exit_at_once():
    assert run("exit").outcome.reason is Stop.GUEST_EXIT


@pytest.mark.parametrize("status", [0, 1, 7, 124, 255])
def test_exit_code_from_the_command_line(status):
    assert run("exit-code", append=f"code {status}").status == status


def test_exit_code_without_a_command_line():
    assert run("exit-code", append="").status == 42


def test_exit_code_as_qemu_gives_it():
    assert run("exit-code", append="3", debug_exit="qemu").status == (3 << 1) | 1


@pytest.mark.parametrize("name", ["reset-i8042", "reset-cf9"])
def test_reset(name):
    outcome = run(name).outcome
    assert (outcome.reason, outcome.status) == (Stop.RESET, 0)


def test_power_off_by_acpi():
    outcome = run("acpi-poweroff").outcome
    assert (outcome.reason, outcome.status) == (Stop.POWER_OFF, 0)


def test_triple_fault():
    outcome = run("triple-fault").outcome
    assert (outcome.reason, outcome.status) == (Stop.TRIPLE_FAULT, 4)


def test_jump_to_where_no_memory_is():
    outcome = run("internal-error").outcome
    assert (outcome.reason, outcome.status) == (Stop.INTERNAL_ERROR, 4)


@pytest.mark.parametrize("name", ["spin", "halt"])
def test_a_guest_that_never_ends_runs_into_the_timeout(name):
    with Machine(config_of(name)) as machine:
        machine.start()
        with pytest.raises(TimeoutError):
            machine.wait(timeout=0.3)


@pytest.mark.parametrize("name", ["spin", "halt", "hammer"])
def test_a_guest_that_never_ends_can_be_killed(name):
    with Machine(config_of(name)) as machine:
        machine.start()
        time.sleep(0.3)
        assert machine.kill().reason is Stop.KILLED


def test_halt_without_interrupt_controllers_ends_the_run():
    outcome = run("halt", irqchip="none").outcome
    assert (outcome.reason, outcome.status) == (Stop.HALTED, 0)


# --- every way out of the guest ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exits():
    return run("exits")


def test_exits_gets_through_every_step(exits):
    assert (exits.status, exits.marks) == (0, b"abcdefghijklmnopqr")


def test_exits_port_io_of_every_width(exits):
    """`a` from the one-byte read, `bc` and `defg` from the wider ones, each written back."""
    a, bc, defg = 0x61, 0x6362, 0x67666564
    assert exits.ports.log[:9] == [
        ("write", 0, 1, 0x11),
        ("write", 0, 2, 0x2222),
        ("write", 0, 4, 0x44444444),
        *(("read", 0, 1, a), ("write", 0, 1, a)),
        *(("read", 0, 2, bc), ("write", 0, 2, bc)),
        *(("read", 0, 4, defg), ("write", 0, 4, defg)),
    ]


def test_exits_string_port_io(exits):
    assert exits.ports.log[9:] == [
        *(("write", 0, 1, byte) for byte in b"string"),
        *(("read", 0, 1, byte) for byte in b"hijk"),
        *(("write", 0, 1, byte) for byte in b"hijk"),
    ]


def test_exits_mmio_of_every_width(exits):
    values = {0x00: (1, 0x11), 0x10: (2, 0x2222), 0x20: (4, 0x44444444), 0x40: (8, 0x8888888888888888)}
    expected = [("write", offset, *value) for offset, value in values.items()]
    for offset, value in values.items():
        expected += [("read", offset, *value), ("write", offset + 0x100, *value)]
    assert exits.memory.log == expected


# --- string I/O -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def string_io():
    return run("string-io")


def test_string_io_forwards_backwards_and_from_fw_cfg(string_io):
    assert string_io.console == b"forwards\nbackwards\nfw_cfg says QEMU\n"


def test_string_io_elements_arrive_in_order_in_both_directions(string_io):
    def there_and_back(letters, size):
        values = [int.from_bytes(letters[i : i + size], "little") for i in range(0, len(letters), size)]
        return [("read", 0, size, value) for value in values] + [("write", 0, size, value) for value in values]

    letters = bytes(ord("a") + i % 26 for i in range(6 + 12 + 24 + 6))
    expected = there_and_back(letters[:6], 1) + there_and_back(letters[6:18], 2) + there_and_back(letters[18:42], 4)
    last = [("read", 0, 1, byte) for byte in letters[42:]]
    expected += last + [("write", *entry[1:]) for entry in reversed(last)]
    assert string_io.ports.log == expected


# --- the UART ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 64, 5000])
@pytest.mark.parametrize("burst", [1, 16])
def test_uart_bytes_arrive_whole_and_in_order(count, burst):
    assert run("uart-bytes", append=f"{count} {burst}").console == (ROW * (count // 64 + 1))[:count]


@pytest.mark.parametrize("count", [1, 64, 4096, 5000])
def test_uart_string_arrives_whole_and_in_order(count):
    assert run("uart-string", append=str(count)).console == (ROW * (count // 64 + 1))[:count]


def test_echo_answers_what_is_typed():
    with Machine(config_of("echo")) as machine:
        machine.start()
        machine.console.expect("q ends", timeout=TIMEOUT)
        for word in ("hello", "a line that is longer than the sixteen bytes of a FIFO"):
            machine.console.write(word)
            machine.console.expect(word, timeout=TIMEOUT)
        machine.console.write("q")
        assert machine.wait(timeout=TIMEOUT).status == 0


def test_lsr_loop_ends():
    assert run("lsr-loop", append="1000").status == 0


# --- loops for benchmarks ---------------------------------------------------------------------------------------------


def test_pio_loop_writes_as_often_as_it_is_told():
    assert len(run("pio-loop", append="700").ports.writes) == 700


def test_pio_loop_writes_one_byte_to_the_second_port():
    assert {entry[:2] for entry in run("pio-loop", append="5").ports.writes} == {(1, 1)}


def test_pio_loop_takes_a_port():
    assert run("pio-loop", append=f"3 {0x6003}", port=0x6000).ports.writes[0][:2] == (3, 1)


def test_mmio_loop_writes_as_often_as_it_is_told():
    writes = run("mmio-loop", append="300").memory.writes
    assert [entry[:2] for entry in writes] == [(0, 4)] * 300


# --- interrupts and processors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timer", "apic-timer"])
def test_a_timer_wakes_a_halted_guest_as_often_as_asked(name):
    assert run(name, append="5").console == b"5 ticks\n"


@pytest.mark.parametrize("name", ["timer", "apic-timer"])
def test_ticks_do_not_come_early(name):
    """Twenty ticks of 10 ms: the last comes 200 ms after the timer is set, and never before."""
    started = time.monotonic()
    run(name, append="20")
    assert time.monotonic() - started > 0.19


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_all_processors_are_announced_and_answer(cpus):
    result = run("smp", cpus=cpus)
    assert result.console == f"{cpus} by fw_cfg, {cpus} in the MP table, {cpus} answered\n".encode()
    assert result.status == cpus


def test_interrupts_between_processors():
    assert run("ipi", cpus=2, append="200").console == b"200 rounds\n"


# --- inside the guest -------------------------------------------------------------------------------------------------


def test_exceptions_are_the_guests_own_affair():
    assert run("exceptions").status == 0


@pytest.fixture(scope="module")
def ring3():
    return run("cpl3", append="1000000")


def test_ring_3_runs_and_comes_back(ring3):
    assert (ring3.status, ring3.console) == (0, b"hello from ring 3\nring 3 is done\n")


def test_ring_3_reaches_the_ports_that_its_bitmap_allows(ring3):
    assert ring3.ports.log == [("read", 0, 1, ord("a")), ("write", 0, 1, ord("a"))]


def test_ring_3_reaches_mmio(ring3):
    assert ring3.memory.log == [("read", 0, 8, 0), ("write", 8, 8, 0)]


@pytest.mark.parametrize("switches", [20, 200])
def test_a_timer_preempts_ring_3(switches):
    assert run("preempt", append=str(switches)).console == b"both threads ran\n"


# --- what the loader hands over ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    module = tmp_path_factory.mktemp("modules") / "first.bin"
    module.write_bytes(bytes(range(1, 101)))
    return run("multiboot-info", append="one two", modules=(f"{module} its own words", str(module)), ram_mib=8), module


def test_multiboot_command_line(info):
    assert b"command line: one two\n" in info[0].console


def test_multiboot_memory_sizes(info):
    """640 KiB of conventional memory, less what the EBDA at its end takes; all that is above 1 MiB."""
    assert f"memory: 639 KiB low, {7 * 1024} KiB high\n".encode() in info[0].console


def test_multiboot_memory_map_has_all_ram_above_1_mib(info):
    assert b"map: 0x0000000000100000 + 0x0000000000700000 type 1\n" in info[0].console


def test_multiboot_modules_arrive_with_their_strings(info):
    result, module = info
    expected = f"module: 100 bytes, sum 5050, string: {module}"
    assert f"{expected} its own words\n{expected}\n".encode() in result.console


# --- bad manners ------------------------------------------------------------------------------------------------------


def test_hammer_comes_to_an_end():
    """Sixteen bytes a round to the UART and the debug console, among all the rest."""
    result = run("hammer", append="20")
    assert (result.status, result.console, result.marks) == (0, b"." * 320, b"." * 320)


@pytest.fixture(scope="module")
def hostile():
    return run("hostile", append="97", port=0x300)


def test_hostile_does_not_break_the_machine(hostile):
    assert (hostile.status, hostile.console[-4:]) == (0, b"\nOK\n")


def test_hostile_gets_through_all_its_parts(hostile):
    assert [mark for mark in hostile.marks if chr(mark) in "pmisoh"] == [*b"pmisoh"]


def test_a_port_access_reaches_a_device_only_if_all_of_it_is_the_devices(hostile):
    """Every width at every port around 0x300..0x303: four single bytes, three words, one double word."""
    inside = [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    assert [entry[:2] for entry in hostile.ports.writes] == inside


def test_a_memory_access_never_leaves_its_device(hostile):
    assert all(offset >= 0 and offset + size <= 4096 for _, offset, size, _ in hostile.memory.log)


def test_hostile_reaches_the_last_byte_of_a_device(hostile):
    assert (4095, 1) in [entry[:2] for entry in hostile.memory.reads]


@pytest.mark.slow
def test_hostile_at_every_port():
    assert run("hostile", append="1").status == 0


def test_guests_were_saved_on_the_way():
    # few guests, or those of a busy host, may all have ended before they were saved; that many may not
    assert Way.moved >= Way.runs // 20, "nearly all had ended by then"

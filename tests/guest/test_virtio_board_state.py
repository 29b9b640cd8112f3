"""All virtio devices of a machine, set up from the host's side as a driver would, and what KVM is told of them."""

import os
import threading
import time

import pytest
from test_virtio_state_guests import FIRST_ENTRY, TIMEOUT, is_requested, on_loop

from hypervisor import Machine, MachineConfig
from hypervisor.kvm.state import from_plain, load, save, to_plain

pytestmark = pytest.mark.kvm

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
COMMAND, BAR0, MEMORY = 0x04, 0x10, 2
SELECT_DRIVER, DRIVER_FEATURE, CONFIG_VECTOR, STATUS, QUEUE_SELECT = 8, 12, 16, 20, 22  # 4.1.4.3
QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 24, 26, 28, 32, 40, 48
IOAPIC_IRR = 16
"""In struct kvm_ioapic_state, behind base (8 bytes), ioregsel and id."""


class Board:
    """A machine that never starts, with a disk, a network, an entropy source and a socket device on PCI.

    Attributes:
        calls: what KVM was told: names of `Vm`'s methods.
    """

    NAMES = ("connect_irqfd", "disconnect_irqfd", "set_routes", "connect_doorbell")

    def __init__(self, folder):
        disk = folder / "disk"
        disk.write_bytes(bytes(1 << 16))
        self.folder = folder
        self.machine = Machine(
            MachineConfig(
                "hello-pio",
                ram_mib=4,
                virtio="pci",
                disks=[f"{disk}"],
                nets=["none"],
                rng=True,
                vsock=f"3,path={folder}/vsock",
            )
        )
        self.board = self.machine._virtio
        self.machine.loop.start()
        self.calls = []
        for name in self.NAMES:
            setattr(self.machine._vm, name, self.counted(name, getattr(self.machine._vm, name)))

    def counted(self, name, method):
        def call(*arguments, **more):
            self.calls.append(name)
            return method(*arguments, **more)

        return call

    def function(self, number):
        return self.board.pci.function(number << 3)

    def start(self, number, *, msix):
        """Set a function up as far as DRIVER_OK."""
        function = self.function(number)
        function.config_write(COMMAND, 2, MEMORY)
        if msix:
            control = next(at for at in capabilities(function) if function.config_read(at, 1) == 0x11) + 2
            function.config_write(control, 2, 0x8000)
            table = function.config_read(control + 2, 4) & ~7
            for vector in range(len(function.device.queues) + 1):
                for at, value in ((0, 0xFEE0_0000), (4, 0), (8, 0x60 + vector), (12, 0)):
                    function.bar_write(0, table + 16 * vector + at, 4, value)
        for status in (0, ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            function.bar_write(0, STATUS, 1, status)
        function.bar_write(0, SELECT_DRIVER, 4, 1)
        function.bar_write(0, DRIVER_FEATURE, 4, 1)
        function.bar_write(0, STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        function.bar_write(0, CONFIG_VECTOR, 2, len(function.device.queues))
        for queue in function.device.queues:
            base = 0x100000 + 0x10000 * number + 0x1000 * queue.index
            function.bar_write(0, QUEUE_SELECT, 2, queue.index)
            function.bar_write(0, QUEUE_SIZE, 2, 16)
            function.bar_write(0, QUEUE_VECTOR, 2, queue.index)
            for register, offset in ((QUEUE_DESC, 0), (QUEUE_DRIVER, 0x400), (QUEUE_DEVICE, 0x800)):
                function.bar_write(0, register, 8, base + offset)
            function.bar_write(0, QUEUE_ENABLE, 2, 1)
        function.bar_write(0, STATUS, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        assert function.device.is_active
        return function

    def start_all(self, *, msix=True):
        for number in range(1, 5):
            self.start(number, msix=msix)
        self.settle()
        return self

    def settle(self):
        for _ in range(3):
            on_loop(self.machine, lambda: None)

    def state(self):
        def take():
            self.board.quiesce()
            state = self.board.state()
            self.board.resume()
            return state

        return on_loop(self.machine, take)

    def load(self, state):
        def put():
            self.board.quiesce()
            self.board.load(state)
            self.board.resume()

        self.settle()
        self.calls.clear()
        on_loop(self.machine, put)
        return self.calls.copy()

    def kvm(self):
        return to_plain(save(self.machine._vm, []))


def capabilities(function):
    at = function.config_read(0x34, 1)
    while at:
        yield at
        at = function.config_read(at + 1, 1)


@pytest.fixture
def new(tmp_path):
    boards = []

    def make():
        folder = tmp_path / str(len(boards))
        folder.mkdir()
        boards.append(Board(folder))
        return boards[-1]

    yield make
    for one in boards:
        one.machine.close()


@pytest.mark.parametrize("msix", [True, False])
def test_going_back_tells_kvm_nothing_that_it_knows(new, msix):
    board = new().start_all(msix=msix)
    state = board.state()
    assert board.load(state) == []
    assert board.state() == state


def test_only_what_was_fired_is_settled(new):
    board = new().start_all()
    state = board.state()
    board.board._signals[0][1].fire()
    assert board.load(state) == ["disconnect_irqfd", "connect_irqfd"]
    assert board.load(state) == []


def test_a_new_machine_tells_kvm_of_everything_once(new):
    """Messages together; a doorbell for each queue; nothing is disconnected that was never connected."""
    state = new().start_all().state()
    board = new()
    board.machine.memory.write(0, new().machine.memory.read(0, 4096))
    calls = board.load(state)
    queues = sum(len(device.queues) for device in board.board.devices.values())
    assert calls.count("set_routes") == 1
    assert calls.count("connect_doorbell") == queues
    assert calls.count("connect_irqfd") == queues + len(board.board.devices)
    assert "disconnect_irqfd" not in calls
    assert board.state() == state
    assert all(device.is_active for device in board.board.devices.values())


def test_devices_that_were_never_touched_go_back_to_that(new):
    board = new()
    state = board.state()
    board.start_all()
    calls = board.load(state)
    assert set(calls) == {"disconnect_irqfd", "connect_doorbell"}
    assert board.state() == state
    assert not any(device.is_active for device in board.board.devices.values())
    kicks = {fd for runner in board.board._runners for fd in runner.kick_fds}
    assert not kicks & set(board.machine.loop._readers), "a kick that nobody takes would keep the loop awake"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hv-blk0")]
    board.start_all()


@pytest.mark.parametrize("change", [lambda s: s.pop("rng0"), lambda s: s.update(rng1=s["rng0"]),
                                    lambda s: s.update(rng0=s["net0"]), lambda s: s.update(rng0=None)])  # fmt: skip
def test_the_state_of_other_devices_is_refused(new, change):
    board = new().start_all()
    state = board.state()
    change(state)
    with pytest.raises((ValueError, TypeError, KeyError)):
        board.load(state)
    assert board.machine.outcome is None


def test_messages_arrive_in_a_new_machine(new):
    """The vectors of the state, through its own routes, in KVM's LAPIC."""
    state = new().start_all().state()
    board = new()
    board.load(state)
    enabled = board.kvm()
    lapic = bytearray(enabled["vcpus"][0]["lapic"])
    lapic[0xF0:0xF2] = (0x1FF).to_bytes(2, "little")
    enabled["vcpus"][0]["lapic"] = bytes(lapic)
    load(board.machine._vm, from_plain(enabled))
    on_loop(board.machine, lambda: board.function(2).device.set_mac(bytes(6)))  # the vector of the configuration
    on_loop(board.machine, board.board.quiesce)
    lapic = board.kvm()["vcpus"][0]["lapic"]
    assert [vector for vector in range(0x60, 0x66) if is_requested(lapic, vector)] == [0x62]
    on_loop(board.machine, board.board.resume)


def is_raised(board, gsi):
    chip = board.kvm()["vm"]["chips"]["ioapic"]
    return bool(int.from_bytes(chip[IOAPIC_IRR : IOAPIC_IRR + 4], "little") >> gsi & 1)


def level_at(board, gsi):
    """Have the IOAPIC's pin take levels, masked: they stay in its IRR."""
    plain = board.kvm()
    chip = bytearray(plain["vm"]["chips"]["ioapic"])
    entry = FIRST_ENTRY + 8 * gsi
    chip[entry : entry + 8] = (1 << 16 | 1 << 15 | 0x70).to_bytes(8, "little")
    plain["vm"]["chips"]["ioapic"] = bytes(chip)
    load(board.machine._vm, from_plain(plain))


def wait_for_line(board, gsi):
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if is_raised(board, gsi):
            return True
        os.sched_yield()
    return False


def test_a_line_that_is_held_is_raised_again_here_and_elsewhere(new):
    board = new().start_all(msix=False)
    gsi = board.function(2).config_read(0x3C, 1)
    level_at(board, gsi)
    assert not is_raised(board, gsi)
    on_loop(board.machine, lambda: board.function(2).device.set_mac(bytes(6)))
    assert wait_for_line(board, gsi)
    on_loop(board.machine, board.board.quiesce)
    on_loop(board.machine, board.board.resume)
    assert wait_for_line(board, gsi)
    state = board.state()
    other = new()
    level_at(other, gsi)
    other.load(state)
    assert wait_for_line(other, gsi)
    assert not is_raised(other, other.function(1).config_read(0x3C, 1))


def test_a_copy_has_addresses_of_its_own(new):
    board = new().start_all()
    other = new()
    other.load(board.state())
    mac = bytes.fromhex("525400aabbcc")
    other.board.set_mac("net0", mac)
    other.board.set_cid(44)
    assert other.function(2).transport.read_config(0, 6) == int.from_bytes(mac, "little")
    assert other.function(4).transport.read_config(0, 8) == 44
    with pytest.raises(KeyError):
        other.board.set_mac("net1", mac)


def test_a_device_that_is_paused_is_not_served(new):
    board = new().start_all()
    served = []
    device = board.function(3).device
    device.serve = served.append
    on_loop(board.machine, board.board.quiesce)
    board.board._runners[2].kick(0)
    assert served == []  # the loop is free only now
    on_loop(board.machine, board.board.resume)
    board.settle()
    assert set(served) == {0}

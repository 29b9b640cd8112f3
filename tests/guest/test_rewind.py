"""Guests whose changes are followed, and that are set back in place: no page is missed, and nobody can tell."""

import mmap
import os
import random
import threading
import time

import carried
import pytest
from bare_vm import RAM, Bare
from carried import machine_of, take
from test_state import ATTEMPTS, GUESTS, THAT_END, alone, assert_same

from devices.backends.qcow2_header import create
from hypervisor import Machine, MachineConfig
from hypervisor.host import is_software_kvm
from hypervisor.kvm import Kvm, host_address
from hypervisor.kvm.dirty import Dirty, Marks
from hypervisor.kvm.prepared import prepare
from hypervisor.kvm.state import load, save
from hypervisor.kvm.vcpu import EXIT, EXIT_HLT
from hypervisor.snapshot.rewind import Devices, Rewind

pytestmark = pytest.mark.kvm

PAGE = 4096
MIB = 1 << 20
TIMEOUT = 120
RESETS = 12


def pages_of(changed):
    found = {page for first, count in changed.runs() for page in range(first, first + count)}
    assert len(found) == changed.pages
    return found


def differing(before, after):
    return {at // PAGE for at in range(0, len(after), PAGE) if before[at : at + PAGE] != after[at : at + PAGE]}


def whole(machine):
    """All of RAM; machines here have less than 3 GiB."""
    return machine.memory.read(0, machine.memory.size)


# --- KVM's log --------------------------------------------------------------------------------------------------------

# mov al, 0x5a; mov [0x3010], al; mov [0x7fff], ax; mov [0x9000], al; hlt: three pages, and the one behind 0x7fff
WRITES = bytes.fromhex("b0 5a a2 10 30 a3 ff 7f a2 00 90 f4")
# mov ax, 0x4000; mov ds, ax; mov [0x2345], al; hlt: the third page of the second slot
WRITES_ABOVE = bytes.fromhex("b8 00 40 8e d8 a2 45 23 f4")
SLOT = 64 * PAGE


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_pages_that_a_guest_writes_and_no_others(by_hand):
    with Kvm() as kvm:
        guest = Bare(kvm, WRITES)
        marks = Marks(host_address(guest.memory), RAM)
        dirty = Dirty(guest.vm, marks, by_hand=by_hand)
        assert pages_of(dirty.collect()) == (set(range(RAM // PAGE)) if dirty._by_hand else set())
        for _ in range(2):
            guest.vcpu.set_registers({"rip": 0, "rflags": 2})
            assert guest.vcpu.enter(0) == EXIT | EXIT_HLT << 8
            marks.mark(0xB000, 1)
            found = pages_of(dirty.collect())
            assert found - {0} == {3, 7, 8, 9, 0xB}, "its code may count, too: KVM has made the page writable"
            assert pages_of(dirty.collect()) == set(), "each page is told once"
        dirty.close()
        guest.vm.close()


@pytest.mark.parametrize("by_hand", [False, True])
def test_slots_in_another_order_than_their_places_in_ram(by_hand):
    with Kvm() as kvm:
        guest = Bare(kvm)
        memory = mmap.mmap(-1, 2 * SLOT)
        memory[SLOT : SLOT + len(WRITES_ABOVE)] = WRITES_ABOVE
        base = host_address(memory)
        guest.vm.set_memory(0, 0, 0, 0)
        guest.vm.set_memory(0, 0, SLOT, base + SLOT)
        guest.vm.set_memory(1, SLOT, SLOT, base)
        marks = Marks(base, 2 * SLOT)
        dirty = Dirty(guest.vm, marks, by_hand=by_hand)
        dirty.collect()
        assert guest.vcpu.enter(0) == EXIT | EXIT_HLT << 8
        marks.mark(SLOT, 1)
        assert pages_of(dirty.collect()) == {2, 64}  # the code is in page 64
        dirty.close()
        guest.vm.close()


# --- devices ----------------------------------------------------------------------------------------------------------

DISKS = {
    "small": ("raw", "100000 8 4096 0 1"),
    "large": ("raw", "2000 4 1048576 0 1"),  # left to io_uring
    "writes": ("raw", "20000 8 4096 1 1"),
    "model": ("qcow2", "20000 8 4096 0 1"),
}


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
@pytest.mark.parametrize("name", DISKS)
def test_all_that_a_guest_and_its_disk_write_is_noted(tmp_path, name, virtio):
    form, words = DISKS[name]
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(32 * MIB))
    if form == "qcow2":
        path.unlink()
        create(str(path), 32 * MIB)
    config = MachineConfig("virtio-blk-bench", ram_mib=64, virtio=virtio, disks=[str(path)], append=words)
    chance = random.Random(name)
    with Machine(config) as machine:
        before = whole(machine)
        dirty = Dirty(machine._vm, machine.memory.marks)
        noted = set()
        machine.start()
        used = machine.devices["blk0"].queues[0].cursor
        end = time.monotonic() + TIMEOUT
        looks = 0
        while looks < 10 and time.monotonic() < end:
            time.sleep(chance.random() * 0.03)
            noted |= pages_of(dirty.collect())
            looks += used[1] > 0
        machine.pause()
        machine._virtio.stop()
        noted |= pages_of(dirty.collect())
        after = whole(machine)
        assert looks == 10, "the disk has done nothing"
        dirty.close()
    assert differing(before, after) <= noted
    assert len(noted) < 64 * MIB // PAGE // 2, "it would be easy to note all of them"


# --- a prepared state -------------------------------------------------------------------------------------------------


def run_on(machine, chance):
    """Let it run for a while; return whether it still can."""
    machine.resume()
    time.sleep(chance.random() * 0.02)
    machine.pause()
    return machine.outcome is None and all(vcpu._parked for vcpu in machine.vcpus)


def stopped(name, chance):
    """Return a machine that stands still at a random moment; where a busy host let it end before, another one."""
    for _attempt in range(ATTEMPTS):
        machine = machine_of(GUESTS[name])
        machine.start()
        time.sleep(0.01 + chance.random() * 0.02)
        machine.pause()
        if machine.outcome is None:
            return machine
        machine.close()
    raise AssertionError(f"it had always ended, {ATTEMPTS} times")


@pytest.mark.parametrize("name", GUESTS)
def test_a_prepared_state_is_the_state_that_is_loaded(name):
    """After the guest has run on for a random time: by `apply`, and by `load` in the same place."""
    chance = random.Random(name)
    compared = 0
    for _ in range(6):
        with stopped(name, chance) as machine:
            vm = machine._vm
            state = save(vm, carried.MSRS)
            prepared = prepare(vm, state)
            plain, ram = carried.to_plain(state), whole(machine)
            while compared % 4 != 3 and run_on(machine, chance):
                began = time.monotonic_ns()
                machine.memory.write(0, ram)
                loaded = load(vm, state)
                by_load = take(machine)[0]
                applied = prepared.apply()
                by_apply = take(machine)[0]
                most = 2e9 + time.monotonic_ns() - began
                assert_same(by_load, plain)
                assert_same(by_apply, plain)
                assert applied == loaded
                clocks = [state["vm"]["clock"]["guest_ns"] for state in (plain, by_load, by_apply)]
                assert all(0 <= clock - clocks[0] < most for clock in clocks), "no time passes for the guest"
                compared += 1
    assert compared


def test_a_prepared_state_keeps_the_clock_and_the_tsc_together():
    """What they differ by stays the same to a microsecond, however late they are set; the PIT's age stays, too."""
    with stopped("periodic", random.Random(1)) as machine:
        vm = machine._vm
        state = save(vm, carried.MSRS)
        prepared = prepare(vm, state)

        def apart():
            saved = save(vm, carried.MSRS)
            clock, vcpu = saved.vm.clock, saved.vcpus[0]
            if is_software_kvm():  # the guest's TSC is the host's, and nothing can hold it
                return 0
            tsc = (clock.host_tsc + vcpu.tsc_offset) % 2**64
            return tsc * 1_000_000 // vcpu.tsc_khz - clock.guest_ns

        before = apart()
        for pause in (0, 0.05, 0.2):
            time.sleep(pause)
            assert prepared.apply().exact_tsc == load(vm, state).exact_tsc
            began = time.monotonic_ns()
            prepared.apply()
            assert abs(apart() - before) < 1000
            age = int.from_bytes(save(vm, carried.MSRS).vm.pit[16:24], "little", signed=True)
            late = 0.05e9 + time.monotonic_ns() - began  # it goes on at once
            assert abs(age - int.from_bytes(state.vm.pit[16:24], "little", signed=True)) < late


def test_a_prepared_state_wants_settled_vcpus():
    with Kvm() as kvm:
        guest = Bare(kvm, bytes.fromhex("ba 58 56 ec f4"))  # mov dx, 0x5658; in al, dx; hlt
        prepared = prepare(guest.vm, save(guest.vm, guest.msrs))
        guest.vcpu.enter(0)
        with pytest.raises(ValueError, match="in the middle of an access"):
            prepared.apply()
        guest.vm.close()


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THAT_END)
def test_set_back_at_random_moments_the_guest_ends_as_ever(name, capsys):
    """Again and again, all of memory and of KVM's state; then it is let go."""
    chance = random.Random(name)
    expected = alone(GUESTS[name])
    resets = 0
    for attempt in range(ATTEMPTS):
        if attempt >= 4 and resets >= 5:
            break
        with stopped(name, chance) as machine:
            ram, plain = whole(machine), carried.to_plain(save(machine._vm, carried.MSRS))
            rewind = Rewind(machine._vm, machine.memory.marks, carried.MSRS)
            while rewind.resets < 10 and run_on(machine, chance):
                copied = rewind.reset()
                again = take(machine)[0]
                assert whole(machine) == ram
                assert copied < 200
                assert_same(again, plain)
            resets += rewind.resets
            if machine.outcome is not None:
                continue
            rewind.close()
            printed = len(machine.console.output)
            machine.resume()
            status = machine.wait(TIMEOUT).status
            assert status == expected[0]
            assert expected[1].endswith(machine.console.output[printed:])
    assert resets >= 5
    with capsys.disabled():
        print(f"\n{name}: {resets} resets ", end="")


class Points:
    """The ports of the guest reset-bench: takes the moment at the first, and goes back to it at the second."""

    def __init__(self, machine, resets):
        self.machine, self.left = machine, resets
        self.rewind = None
        self.values, self.copied, self.wrong = set(), set(), []
        self.done = threading.Event()
        self.order = []

    def read(self, offset, size):
        return 0

    def write(self, offset, size, value):
        if offset:
            self.values.add(value)
            self.machine.vcpus[0].post(self.back)
        elif self.rewind is None:
            self.machine.vcpus[0].post(self.take)

    def take(self):
        self.ram = whole(self.machine)
        note = self.order.append
        self.rewind = Rewind(
            self.machine._vm,
            self.machine.memory.marks,
            carried.MSRS,
            devices=Devices(
                quiesce=lambda: note("quiesce"),
                load=lambda: note("load" if whole(self.machine) == self.ram else "load before memory is back"),
                resume=lambda: note("resume"),
            ),
        )

    def back(self):
        self.machine.memory.write(40 * MIB, b"by the VMM")  # a page that the guest does not touch
        self.copied.add(self.rewind.reset())
        if whole(self.machine) != self.ram:
            self.wrong.append(self.rewind.resets)
        self.left -= 1
        if not self.left:
            self.done.set()
            self.machine.vcpus[0].request_pause()


def test_a_device_sets_its_guest_back_from_the_vcpus_own_thread():
    with Machine(MachineConfig("reset-bench", ram_mib=48)) as machine:
        points = Points(machine, resets=RESETS)
        machine.bus_pio.claim(0x5658, 2, points, "points")
        machine.start()
        assert points.done.wait(TIMEOUT)
        machine.vcpus[0].wait_parked()
        assert points.values == {1}, "each time it began anew"
        assert points.wrong == []
        assert all(101 <= copied <= 110 for copied in points.copied)
        assert points.order == ["quiesce", "load", "resume"] * RESETS
        points.rewind.close()
        points.rewind.close()
        assert not machine.memory.is_tracked


def test_a_base_that_is_there_already(tmp_path):
    """Such as the file that the machine was restored from."""
    with stopped("periodic", random.Random(5)) as machine:
        path = tmp_path / "ram"
        path.write_bytes(whole(machine))
        with path.open("rb") as file:
            base = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rewind = Rewind(machine._vm, machine.memory.marks, carried.MSRS, base=base)
        machine.resume()
        time.sleep(0.01)
        machine.pause()
        rewind.reset()
        assert whole(machine) == path.read_bytes()
        rewind.close()
        base.close()

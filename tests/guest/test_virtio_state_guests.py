"""Guests whose virtio devices are stopped, saved, loaded and let go at random moments, on any KVM: they do not notice.

With each other's state as well: a new machine goes on where another was, and a machine goes back to where it was.
"""

import os
import random
import statistics
import threading
import time
from itertools import pairwise

import carried
import pytest
from test_journal import PLACE_COUNT, PLACES, SIZE, last_of, sectors, state_after

from hypervisor import Machine, MachineConfig, Stop, layout
from hypervisor.kvm.state import from_plain, load

pytestmark = pytest.mark.kvm

TIMEOUT = 200
ATTEMPTS = 20
"""Of guests that end by themselves: on a busy host one may be over before it was disturbed."""


def on_loop(machine, function):
    """Call `function` in the event loop's thread and return what it returns."""
    result, failure, done = [], [], threading.Event()

    def call():
        try:
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller
            failure.append(error)
        done.set()

    machine.loop.call_soon(call)
    assert done.wait(TIMEOUT)
    if failure:
        raise failure[0]
    return result[0]


def ports(machine):
    """Return PCI's ports, which are made when a guest touches them."""
    return machine.bus_pio.find(layout.PCI_CONFIG).device.device


def take(machine):
    """Return everything of a machine that stands still, as plain values; its devices rest until `board.resume`."""
    board = machine._virtio
    board.quiesce()
    plain, ram = carried.take(machine)
    return {"board": board.state(), "kvm": plain, "ram": ram, "ports": ports(machine).state()}


def put(machine, taken):
    """Set it, in a machine whose devices are at rest."""
    machine.memory.write(0, taken["ram"])
    ports(machine).load(taken["ports"])
    machine._virtio.load(taken["board"])
    load(machine._vm, from_plain(taken["kvm"]))


def in_place(machine):
    """Stop a running machine, save it, load it, and let it go on."""

    def whole():
        taken = take(machine)
        put(machine, taken)
        again = machine._virtio.state()
        machine._virtio.resume()
        return taken["board"] == again

    machine.pause()
    is_same = machine.outcome is not None or on_loop(machine, whole)
    machine.resume()
    return is_same


def disturb(machine, chance, longest, most):
    """Do that at random moments until the guest has ended, or `most` times; return how often."""
    for count in range(most):
        time.sleep(chance.random() * longest)
        if machine.outcome is not None:
            return count
        assert in_place(machine)
    return most


# --- in place ---------------------------------------------------------------------------------------------------------


def journal(path, count):
    return MachineConfig(
        "virtio-journal", ram_mib=4, debug_exit="raw", virtio="mmio", disks=[str(path)], append=str(count)
    )


@pytest.mark.parametrize("kind", ["", ",iops=400", ",overlay=memory"])
def test_a_journal_is_kept_in_place(tmp_path, kind):
    """Every transaction in order, by the data path, by the model, and by one that waits for a limit."""
    path = tmp_path / "disk"
    count, chance = 25, random.Random(1)
    for _attempt in range(ATTEMPTS):
        path.write_bytes(bytes(SIZE))
        with Machine(journal(f"{path}{kind}", count)) as machine:
            machine.start()
            moves = disturb(machine, chance, 0.02, 40)
            outcome = machine.wait(TIMEOUT)
            assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
            said = machine.console.output.decode()
        if moves >= 2:
            break
    assert moves >= 2
    assert said == "REDONE 0 NEXT 1\n" + "".join(f"DONE {number}\n" for number in range(1, count + 1))
    if "overlay" not in kind:
        assert last_of(path.read_bytes()) == count
        assert sectors(path.read_bytes(), PLACES, PLACE_COUNT) == state_after(count)


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_a_busy_disk_in_place(tmp_path, virtio):
    """Thirty-two requests at a time from ring 3, at full speed."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    config = MachineConfig(
        "virtio-blk-bench", ram_mib=64, debug_exit="raw", virtio=virtio, disks=[str(path)], append="60000 32 4096 0 1 0"
    )
    chance = random.Random(2)
    for _attempt in range(ATTEMPTS):
        with Machine(config) as machine:
            machine.start()
            moves = disturb(machine, chance, 0.02, 8)
            outcome = machine.wait(TIMEOUT)
            assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
            assert "requests 60000 ticks" in machine.console.output.decode()
        if moves:
            break
    assert moves


@pytest.mark.parametrize(("asks", "answers"), [("pci", "mmio"), ("mmio", "pci")])
def test_a_conversation_in_place(tmp_path, monkeypatch, asks, answers):
    """Two machines on a link, both disturbed; the one that asks checks every byte."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    chance = random.Random(3)

    def machine_on(virtio, role, mac):
        return Machine(
            MachineConfig(
                "virtio-net", ram_mib=4, debug_exit="raw", virtio=virtio, nets=[f"link=lab,mac={mac}"],
                append=f"400 {role}",
            )
        )  # fmt: skip

    for _attempt in range(ATTEMPTS):
        moves = 0
        with machine_on(answers, 1, "52:54:00:0a:bc:0d") as second, machine_on(asks, 0, "52:54:00:12:34:56") as first:
            second.start()
            first.start()
            while moves < 40 and first.outcome is None:
                moves += disturb(chance.choice([first, second]), chance, 0.01, 1)
            for machine in (first, second):
                outcome = machine.wait(TIMEOUT)
                assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
        if moves >= 2:
            break
    assert moves >= 2


# --- elsewhere, and back ----------------------------------------------------------------------------------------------


def test_a_journal_is_kept_by_one_machine_after_the_other(tmp_path):
    path, count, chance = tmp_path / "disk", 20, random.Random(4)
    for _attempt in range(ATTEMPTS):
        moves, said = moved_about(path, count, chance)
        assert said.decode() == "REDONE 0 NEXT 1\n" + "".join(f"DONE {number}\n" for number in range(1, count + 1))
        assert sectors(path.read_bytes(), PLACES, PLACE_COUNT) == state_after(count)
        if moves >= 2:
            break
    assert moves >= 2, "it was hardly ever stopped"


def moved_about(path, count, chance):
    """Run a guest on a new disk to its end, in one machine after the other; return how often, and its words."""
    path.write_bytes(bytes(SIZE))
    moves, said, taken = 0, b"", None
    while True:
        with Machine(journal(path, count)) as machine:
            if taken is not None:
                put(machine, taken)
                machine._virtio.resume()
            machine.start()
            taken = None
            if moves < 12 and carried.stop_at_random(machine, chance, 0.1):
                taken = on_loop(machine, lambda machine=machine: take(machine))
                moves += 1
            else:
                machine.resume()
                outcome = machine.wait(TIMEOUT)
        said += machine.console.output
        if taken is None:
            break
    assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
    return moves, said


def test_a_machine_goes_back_again_and_again(tmp_path):
    """With its disk; what it did since is as if it had never been."""
    path, chance = tmp_path / "disk", random.Random(5)
    for _attempt in range(ATTEMPTS):
        backs = taken_back(path, chance)
        if backs >= 3:
            break
    assert backs >= 3


def taken_back(path, chance):
    """Run a guest on a new disk to its end, and back on the way until it has ended; return how often it went back."""
    path.write_bytes(bytes(SIZE))
    with Machine(journal(path, 20)) as machine:
        machine.start()
        while b"DONE 3\n" not in machine.console.output:
            time.sleep(0.002)
        machine.pause()
        taken = on_loop(machine, lambda: take(machine))
        disk = path.read_bytes()

        def back():
            machine._virtio.quiesce()
            with path.open("r+b") as file:
                file.write(disk)
            put(machine, taken)
            machine._virtio.resume()

        on_loop(machine, machine._virtio.resume)
        backs = 0
        for _ in range(25 if machine.outcome is None else 0):
            machine.resume()
            time.sleep(chance.random() * 0.02)
            machine.pause()
            if machine.outcome is not None:
                break
            on_loop(machine, back)
            backs += 1
        machine.resume()
        outcome = machine.wait(TIMEOUT)
        assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
    assert sectors(path.read_bytes(), PLACES, PLACE_COUNT) == state_after(20)
    return backs


# --- interrupts -------------------------------------------------------------------------------------------------------

VECTOR, PIN_VECTOR = 0x61, 0x62
FIRED = 3
"""In a queue's cursor."""
SVR, IRR = 0xF0, 0x200
FIRST_ENTRY = 24
"""struct kvm_ioapic_state: base, ioregsel, id, irr, padding, then the redirection table."""


def is_requested(lapic, vector):
    """Whether a vector's bit is set in the IRR (Intel SDM volume 3, 11.8.4)."""
    return bool(lapic[IRR + vector // 32 * 16 + vector % 32 // 8] >> vector % 8 & 1)


@pytest.mark.parametrize("way", ["message", "edge", "data path"])
def test_what_was_fired_is_in_the_lapic_when_all_is_quiet(tmp_path, way):
    """Whatever worker KVM has left it to: fired at the very last moment, hundreds of times, it is never missing."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with Machine(journal(path, 1)) as machine:
        board, vm = machine._virtio, machine._vm
        machine.loop.start()
        on_loop(machine, board.quiesce)
        plain, _ = carried.take(machine)
        on_loop(machine, board.resume)
        lapic = bytearray(plain["vcpus"][0]["lapic"])
        lapic[SVR : SVR + 2] = (0x1FF).to_bytes(2, "little")
        plain["vcpus"][0]["lapic"] = bytes(lapic)
        gsi = layout.virtio_mmio_places(1)[0][1]
        chip = bytearray(plain["vm"]["chips"]["ioapic"])
        chip[FIRST_ENTRY + 8 * gsi : FIRST_ENTRY + 8 * gsi + 8] = PIN_VECTOR.to_bytes(8, "little")
        plain["vm"]["chips"]["ioapic"] = bytes(chip)
        if way == "message":
            signal = board._interrupts.routed(20, board._interrupts.pin())
            signal.to_message(0xFEE0_0000, VECTOR)
            vector = VECTOR
        else:
            signal, vector = board._signals[0][1], PIN_VECTOR
        for _ in range(300):
            load(vm, from_plain(plain))

            def fire():
                if way == "data path":  # as C fires it
                    board._signals[0][0].cursor[FIRED] = 1
                    os.eventfd_write(signal.fileno(), 1)
                else:
                    signal.fire()
                board.quiesce()
                state, _ = carried.take(machine)
                board.resume()
                return state["vcpus"][0]["lapic"]

            assert is_requested(on_loop(machine, fire), vector)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_what_it_costs(tmp_path, monkeypatch, capsys, virtio):
    """Printed, not asserted: a disk that works, beside a network and an entropy source that nobody has begun to use."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    config = MachineConfig(
        "virtio-blk-bench", ram_mib=64, debug_exit="raw", virtio=virtio, append="4000000 1 512 0 1 0", rng=True,
        disks=[str(path)], nets=["link=lab"],
    )  # fmt: skip
    with Machine(config) as machine:
        machine.start()
        board = machine._virtio
        times = []

        def cycle():
            moments = [time.perf_counter()]
            board.quiesce()
            moments.append(time.perf_counter())
            state = board.state()
            moments.append(time.perf_counter())
            board.load(state)
            moments.append(time.perf_counter())
            board.resume()
            moments.append(time.perf_counter())
            times.append([1e6 * (b - a) for a, b in pairwise(moments)])

        time.sleep(0.1)
        for _ in range(60):
            time.sleep(0.002)
            machine.pause()
            on_loop(machine, cycle)
            machine.resume()
    with capsys.disabled():
        quiesce, state, loading, resume = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"\n{virtio}: quiesce {quiesce:.0f} us, state {state:.0f}, load {loading:.0f}, resume {resume:.0f} ", end=""
        )

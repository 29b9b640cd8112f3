"""Machines whose KVM state and memory are carried into others: the guest must not be able to tell."""

import pickle
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import carried
import pytest
from carried import carry, machine_of, put, take

from hypervisor.host import is_software_kvm
from hypervisor.kvm.state import from_plain

pytestmark = pytest.mark.kvm

SECONDS = 15
"""How long each guest is carried about, again and again."""
ATTEMPTS = 50
ENOUGH = 150
"""Moves after which it is let go earlier."""

RUNNABLE, UNINITIALIZED, INIT_RECEIVED, HALTED = range(4)  # KVM_MP_STATE_, KVM API 4.38
TSC, TSC_DEADLINE = 0x10, 0x6E0
HV_VP_RUNTIME, HV_TIME_REF_COUNT = 0x4000_0010, 0x4000_0020  # clocks in the Hyper-V TLFS; KVM lists them
TIMER_CURRENT, IRR, LVT_TIMER, PPR = 0x390, 0x200, 0x320, 0xA0  # SDM volume 3, table 11-1
REDIRECTION = 24  # struct kvm_ioapic_state: where its table begins
PINS_OF_PIT = (0, 2)
CHIPS_OF_PIT = [
    ("pic_master", slice(0, 1), 1),  # struct kvm_pic_state: last_irr, irr
    ("pic_master", slice(1, 2), 1),
    ("ioapic", slice(16, 20), sum(1 << pin for pin in PINS_OF_PIT)),  # struct kvm_ioapic_state: irr
]
"""Where the PIT's interrupt stands when it has come up: chip, place of a number, its bits there."""

PERIODIC = {"kernel": "checksum"}
DEADLINE = {"kernel": "checksum", "append": "3000000 1"}
WORK = "20000" if is_software_kvm() else "30000000"
SPINS = "30000" if is_software_kvm() else "30000000"
"""Rounds of nothing that take a tenth of a second or more."""
GUESTS = {
    "periodic": PERIODIC,
    "deadline": DEADLINE,
    "threads": {"kernel": "preempt"},
    "pit": {"kernel": "timer"},
    "four": {"kernel": "late-ap", "cpus": 4, "append": WORK},
    "ipi": {"kernel": "ipi", "cpus": 2},
}
THAT_END = [name for name in GUESTS if name != "ipi" or is_software_kvm()]
"""An emulated AMD-V loses wake-ups, and "ipi" has no timer that would end a sleep: there it may never end, disturbed or
not."""


def alone(settings):
    with machine_of(settings) as machine:
        status = machine.run(carried.TIMEOUT).status
    return status, machine.console.output


@pytest.mark.parametrize("name", THAT_END)
def test_carried_at_random_moments(name, capsys):
    expected = alone(GUESTS[name])
    assert expected[0] == 0
    moves = runs = 0
    end = time.monotonic() + SECONDS
    while moves < ENOUGH and time.monotonic() < end:
        status, output, moved = carry(GUESTS[name], seed=f"{name} {runs}", longest=0.02, most=20)
        assert (status, output) == expected, f"seed {runs}"
        moves += moved
        runs += 1
    assert moves >= runs // 4, "it was hardly ever stopped"
    with capsys.disabled():
        print(f"\n{name}: {moves} moves in {runs} runs ", end="")


@pytest.mark.parametrize("name", ["periodic", "deadline", "four"])
def test_carried_into_another_process(name, tmp_path):
    expected = alone(GUESTS[name])
    machine, *taken = stopped(GUESTS[name], lambda plain: plain["vcpus"][0]["registers"]["rip"] >= 0x100000)
    machine.close()
    path = tmp_path / "taken"
    path.write_bytes(pickle.dumps((GUESTS[name], *taken)))
    run = subprocess.run(
        [sys.executable, str(Path(carried.__file__)), str(path)],
        capture_output=True,
        check=False,
        timeout=2 * carried.TIMEOUT,
    )
    assert (run.returncode, run.stdout) == expected, run.stderr


def stopped(settings, wanted):
    """Return a machine that stands still at a moment of which `wanted`, given its plain state, says yes.

    On a busy host a guest may be over before it has been looked at: then another one is.
    """
    for _attempt in range(ATTEMPTS):
        machine = machine_of(settings)
        machine.start()
        while True:
            time.sleep(0.001)
            machine.pause()
            if machine.outcome is not None:
                break
            plain, ram = take(machine)
            if wanted(plain):
                return machine, plain, ram
            machine.resume()
        machine.close()
    raise AssertionError(f"there was no such moment in {ATTEMPTS} runs")


def goes_on(settings, wanted):
    """Carry a guest away at such a moment, and check that it ends as an undisturbed one does."""
    machine, plain, ram = stopped(settings, wanted)
    machine.close()
    with machine_of(settings) as other:
        put(other, plain, ram)
        status = other.run(carried.TIMEOUT).status
    assert (status, machine.console.output + other.console.output) == alone(settings)


def register(page, offset):
    return int.from_bytes(page[offset : offset + 4], "little")


def test_a_halted_processor_with_an_armed_timer():
    goes_on({"kernel": "apic-timer"}, lambda plain: plain["vcpus"][0]["mp_state"] == HALTED)


def test_a_halted_processor_with_an_armed_deadline():
    def is_halted(plain):
        vcpu = plain["vcpus"][0]
        return vcpu["mp_state"] == HALTED and dict(vcpu["msrs"])[TSC_DEADLINE]

    goes_on(DEADLINE, is_halted)


def test_a_pending_interrupt():
    """The guest has interrupts off, and vector 0x31 waits in the LAPIC."""

    def waits(plain):
        return register(plain["vcpus"][0]["lapic"], IRR + 0x10 * (0x31 // 32)) >> (0x31 % 32) & 1

    goes_on({"kernel": "checksum", "append": f"1000 0 {SPINS}"}, waits)


def test_a_processor_that_waits_for_its_start_up_ipi():
    goes_on(GUESTS["four"], lambda plain: [vcpu["mp_state"] for vcpu in plain["vcpus"]][3] == INIT_RECEIVED)


def test_processors_that_nobody_has_called_yet():
    with machine_of(GUESTS["four"]) as machine:
        plain, ram = take(machine)
    assert [vcpu["mp_state"] for vcpu in plain["vcpus"]] == [RUNNABLE] + 3 * [UNINITIALIZED]
    with machine_of(GUESTS["four"]) as other:
        put(other, plain, ram)
        status = other.run(carried.TIMEOUT).status
    assert (status, other.console.output) == alone(GUESTS["four"])


# --- a state is what was set ------------------------------------------------------------------------------------------


def without_clocks(plain):
    """Leave out what moves on by itself, each by its name.

    And the processor priority: KVM brings it up to date late, and it follows from the TPR and the ISR.
    """
    vm = plain["vm"] | {"clock": None, "pit": None}
    vcpus = []
    for vcpu in plain["vcpus"]:
        page = bytearray(vcpu["lapic"])
        for register in (TIMER_CURRENT, PPR):
            page[register : register + 4] = bytes(4)
        moving = {TSC, HV_VP_RUNTIME, HV_TIME_REF_COUNT}
        msrs = [pair for pair in vcpu["msrs"] if pair[0] not in moving]
        vcpus.append(vcpu | {"lapic": bytes(page), "msrs": msrs, "tsc_offset": None})
    return {"vm": vm, "vcpus": vcpus}


def bits_of(data, place, mask):
    """The little-endian number at `place` of `data`, as far as `mask` has it."""
    return int.from_bytes(data[place], "little") & mask


def without(data, place, mask):
    """The same bytes without the bits of `mask` in the little-endian number at `place`."""
    number = int.from_bytes(data[place], "little") & ~mask
    return data[: place.start] + number.to_bytes(place.stop - place.start, "little") + data[place.stop :]


def before_timers(again, plain):
    """Take the timers' interrupts that have come up since `plain` out of `again`: a slow host lets them fire meanwhile.

    Those that had come up before stay, so that one that was lost is seen.
    """
    chips, earlier = again["vm"]["chips"], plain["vm"]["chips"]
    for name, place, mask in CHIPS_OF_PIT:
        chips = chips | {name: without(chips[name], place, mask & ~bits_of(earlier[name], place, mask))}
    by_pit = {chips["ioapic"][REDIRECTION + 8 * pin] for pin in PINS_OF_PIT}
    vcpus = []
    for vcpu, before in zip(again["vcpus"], plain["vcpus"], strict=True):
        vectors = by_pit | {vcpu["lapic"][LVT_TIMER]}
        lapic = vcpu["lapic"]
        for vector in vectors:
            place = slice(IRR + vector // 32 * 16, IRR + vector // 32 * 16 + 4)
            bit = 1 << vector % 32
            lapic = without(lapic, place, bit & ~bits_of(before["lapic"], place, bit))
        armed = dict(before["msrs"]).get(TSC_DEADLINE)
        msrs = [[index, armed if index == TSC_DEADLINE and not value else value] for index, value in vcpu["msrs"]]
        vcpus.append(vcpu | {"lapic": lapic, "msrs": msrs})
    return {"vm": again["vm"] | {"chips": chips}, "vcpus": vcpus}


def assert_same(again, plain):
    """One state is the other, but for clocks and for what timers have done since."""
    assert without_clocks(before_timers(again, plain)) == without_clocks(plain)


@pytest.mark.parametrize("name", GUESTS)
def test_saved_loaded_and_saved_again(name):
    machine, plain, ram = stopped(GUESTS[name], lambda plain: plain["vcpus"][0]["registers"]["rip"] >= 0x100000)
    machine.close()
    with machine_of(GUESTS[name]) as other:
        began = time.monotonic_ns()
        loaded = put(other, plain, ram)
        again, _ = take(other)
        spent = time.monotonic_ns() - began
    assert_same(again, plain)
    assert loaded.refused == []
    first, second = plain["vm"]["clock"]["guest_ns"], again["vm"]["clock"]["guest_ns"]
    assert first < second < first + spent + 2e9, "no time passed for the guest, but for the loading itself"
    # the PIT's mode and count, channel 0, stay: struct kvm_pit_channel_state begins with the count
    assert again["vm"]["pit"][:4] == plain["vm"]["pit"][:4]


def test_plain_values_are_plain_and_whole():
    def check(value):
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            value = list(value.values())
        if type(value) is list:
            for item in value:
                check(item)
        else:
            assert type(value) in (int, bytes, type(None)), type(value)

    machine, plain, _ = stopped(PERIODIC, lambda _plain: True)
    machine.close()
    check(plain)
    assert carried.to_plain(from_plain(plain)) == plain


# --- time -------------------------------------------------------------------------------------------------------------


def test_time_stands_still_or_goes_on():
    machine, plain, ram = stopped(DEADLINE, lambda _plain: True)
    machine.close()
    time.sleep(0.5)
    passed, spent = {}, {}
    for advance in (False, True):
        with machine_of(DEADLINE) as other:
            began = time.monotonic()
            put(other, plain, ram, advance=advance)
            again, _ = take(other)
            spent[advance] = time.monotonic() - began
            clock = again["vm"]["clock"]["guest_ns"] - plain["vm"]["clock"]["guest_ns"]
            tsc = dict(again["vcpus"][0]["msrs"])[TSC] - dict(plain["vcpus"][0]["msrs"])[TSC]
            passed[advance] = clock / 1e9, tsc / (1000 * plain["vcpus"][0]["tsc_khz"])
    most = spent[False] + 0.4  # all but what lay between: that it was loaded, and saved again, took its time
    assert 0 < passed[False][0] < most
    assert passed[True][0] >= 0.5
    if not is_software_kvm():  # where the guest's TSC is the host's, nothing can hold it
        assert 0 < passed[False][1] < most
        assert passed[True][1] >= 0.5


def test_what_saving_and_loading_cost(capsys):
    """Printed, not asserted."""
    rounds = 30
    for name in ("periodic", "four"):
        machine, plain, ram = stopped(GUESTS[name], lambda _plain: True)
        saves, loads = [], []
        try:
            for _ in range(rounds):
                before = time.perf_counter()
                carried.save(machine._vm, carried.MSRS)
                saves.append(time.perf_counter() - before)
            state = from_plain(plain)
            machine.memory.write(0, ram)
            for _ in range(rounds):
                before = time.perf_counter()
                carried.load(machine._vm, state)
                loads.append(time.perf_counter() - before)
        finally:
            machine.close()
        with capsys.disabled():
            print(f"\n{name}: save {median(saves) * 1e6:.0f} us, load {median(loads) * 1e6:.0f} us ", end="")

"""KVM's own counters, while guests do what is known."""

import time

import pytest
from guest_code import loads, outs

from hypervisor import Machine, MachineConfig, Stop
from hypervisor.host import Kind, quick_kind
from hypervisor.profile.halts import halted_ns

pytestmark = pytest.mark.kvm

SPIN = bytes.fromhex("faebfd")  # cli; l: jmp l
HALT = bytes.fromhex("faf4ebfc")  # cli; l: hlt; jmp l
TICK_NS = 1_000_000_000 / 100  # of the guest `timer`: it sets the PIT to 100 Hz
EXIT_IO, EXIT_MMIO = 2, 6
ATTEMPTS = 20


def test_port_accesses(machine_of):
    """A hardware KVM counts `io_exits`, those that it answers itself as well; the software one only the exits."""
    machine = machine_of(outs(100))
    vcpu = machine.vcpus[0]
    before = vcpu.stats()
    assert before["exits"] == 0
    machine.run(timeout=120)
    after = vcpu.stats()
    assert vcpu.handle.exit_counts == {EXIT_IO: 101}
    assert after["exits"] >= 101
    if quick_kind() is not Kind.SOFTWARE:
        assert after["io_exits"] == 101


def test_memory_accesses(machine_of):
    machine = machine_of(loads(50), flat=32)
    machine.run(timeout=120)
    vcpu = machine.vcpus[0]
    assert vcpu.handle.exit_counts == {EXIT_MMIO: 50, EXIT_IO: 1}
    assert vcpu.stats()["mmio_exits"] == 50


def test_the_vms_counters(machine_of):
    """After a run the guest's page is mapped: in what size is the host's choice."""
    machine = machine_of(outs(1))
    before = machine._vm.stats()
    machine.run(timeout=120)
    after = machine._vm.stats()
    assert before.keys() == after.keys()
    assert sum(after.values()) > sum(before.values())


def test_halts_are_told_from_the_guests_time():
    """`timer` sleeps from tick to tick."""
    for _attempt in range(ATTEMPTS):
        with Machine(MachineConfig("timer", append="20")) as machine:
            start = time.perf_counter_ns()
            machine.run(timeout=120)
            wall = time.perf_counter_ns() - start
            stats = machine.vcpus[0].stats()
            halted = halted_ns(stats)
            histograms = machine.vcpus[0].handle.stat_histograms()
        assert halted < wall
        assert sum(samples for _, _, samples in histograms["halt_wait_hist"]) == stats["halt_wait_hist"]
        if stats["halt_exits"] >= 20 and halted > 10 * TICK_NS:
            break  # else ticks that came while it was not let run follow one another without a sleep
    assert stats["halt_exits"] >= 20
    assert halted > 10 * TICK_NS


def test_a_guest_that_never_halts_was_never_halted(machine_of):
    machine = machine_of(outs(100))
    machine.run(timeout=120)
    assert halted_ns(machine.vcpus[0].stats()) == 0


@pytest.mark.parametrize("code", [SPIN, HALT])
def test_a_running_vcpu_can_be_read(machine_of, monkeypatch, code):
    """The first time it leaves the guest for that; then KVM is not disturbed at all."""
    machine = machine_of(code)
    vcpu = machine.vcpus[0]
    machine.start()
    assert not vcpu.handle.has_open_stats
    first = vcpu.stats()
    assert vcpu.handle.has_open_stats
    monkeypatch.setattr(vcpu, "call", lambda _function: pytest.fail("it left the guest again"))
    for _ in range(100):
        assert vcpu.stats()["exits"] >= first["exits"]
    assert machine.kill().reason is Stop.KILLED


def test_a_closed_vcpu_has_no_counters(machine_of):
    machine = machine_of(outs(1))
    machine.run(timeout=120)
    assert machine.vcpus[0].stats()
    machine.close()
    assert machine.vcpus[0].handle.stats() == {}
    assert machine._vm.stats() == {}


def test_a_cpu_that_nobody_starts_ran_no_guest(machine_of):
    """Its thread sits in KVM_RUN all the time; that is no guest's."""
    for seconds in (0.2, 2, 20, 60):  # until both threads have been there, on a busy host too
        machine = machine_of(SPIN, cpus=2)
        machine.start()
        time.sleep(seconds)
        machine.kill()
        boot, other = machine.profile().vcpus
        assert other.guest_ns == 0
        assert boot.halted_ns == 0
        if min(boot.guest_ns, other.halted_ns) > 100_000_000:
            break
    assert boot.guest_ns > 100_000_000
    assert other.halted_ns > 100_000_000

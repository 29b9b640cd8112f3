"""KVM's own exits, counted by its tracepoints, against its own counters and against what guests are known to do.

A software KVM has no tracepoints: there the one test that can run is that this is said. `scripts/test` runs the others
in the emulated host.
"""

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial

import pytest
from guest_code import loads, outs
from waiting import until

from hypervisor.errors import HostError
from hypervisor.host import Kind, quick_kind
from hypervisor.profile import bpf
from hypervisor.profile.exits import Exits
from hypervisor.profile.halts import halted_ns
from hypervisor.profile.kernelexits import KernelExits

pytestmark = pytest.mark.kvm

TRACEFS = "/sys/kernel/tracing"
PORT_IO, CPUID, HALT, NO_MEMORY = (
    {"io", "IO_INSTRUCTION"},
    {"cpuid", "CPUID"},
    {"hlt", "HLT"},
    {"npf", "EPT_MISCONFIG"},
)
PROG_GET_NEXT_ID = 11


@pytest.fixture
def traced():
    """Make sure of tracefs on a hardware KVM."""
    if quick_kind() is Kind.SOFTWARE:
        pytest.skip("a software KVM has no tracepoints; scripts/test runs this in the emulated host")
    mounted = os.path.isdir(f"{TRACEFS}/events")
    if not mounted:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACEFS], check=True)
    yield
    if not mounted:
        subprocess.run(["umount", TRACEFS], check=True)


@pytest.fixture
def watched(traced, machine_of):
    """Return a maker of machines whose kernel exits are counted, with what counts them."""
    counters = []

    def make(code, **settings):
        machine = machine_of(code, **settings)
        kernel, why_not = KernelExits.open(len(machine.vcpus))
        assert kernel is not None, why_not
        counters.append(kernel)
        for vcpu in machine.vcpus:
            vcpu.on_thread = partial(kernel.watch, vcpu.index)
        return machine, kernel

    yield make
    for kernel in counters:
        kernel.close()


def run(machine, status=0):
    """Run the machine; return how long that took, in nanoseconds."""
    start = time.perf_counter_ns()
    assert machine.run(timeout=120).status == status
    return time.perf_counter_ns() - start


def count(rows, names):
    return sum(row.count for row in rows if row.reason in names)


def assert_complete(machine, rows):
    """Every exit that KVM itself counts is in a row; all but the last one of each vCPU are over."""
    for vcpu in machine.vcpus:
        mine = [row for row in rows if row.vcpu == vcpu.index]
        assert sum(row.count for row in mine) == vcpu.stats()["exits"]
        assert [row.guest.count for row in mine] == [row.count for row in mine]
        assert sum(row.count - row.handler.count for row in mine) <= 1


def test_why_there_are_none_on_a_software_kvm():
    if quick_kind() is Kind.SOFTWARE:
        kernel, why_not = KernelExits.open(1)
        assert kernel is None
        assert why_not in {
            "this host's KVM has no tracepoints",
            "it needs root",
            f"tracefs is not mounted (mount -t tracefs tracefs {TRACEFS})",
        }


def test_a_profile_that_cannot_be_written_leaves_no_programs(machine_of, monkeypatch):
    monkeypatch.setattr(KernelExits, "open", lambda _vcpus: pytest.fail("opened, and nobody would close it"))
    with pytest.raises(HostError):
        machine_of(outs(1)).record("/no/such/folder/run.hvprof")


def test_what_kvm_answers_alone_is_seen(watched):
    # mov cx,200; l: push cx; xor eax,eax; cpuid; pop cx; loop l; then 31 port accesses
    machine, kernel = watched(bytes.fromhex("b9c800 51 6631c0 0fa2 59 e2f7".replace(" ", "")) + outs(30))
    wall = run(machine)
    rows = kernel.read()
    assert count(rows, CPUID) == 200
    assert count(rows, PORT_IO) == 31
    assert sum(machine.vcpus[0].handle.exit_counts.values()) == 31
    assert_complete(machine, rows)
    assert {row.layer for row in rows} == {"kernel"}
    assert all(not set(row.reason) <= set("0123456789abcdefx") for row in rows)  # each has a name
    assert 0 < sum(row.handler.total + row.guest.total for row in rows) <= wall


def test_memory_that_is_none(watched):
    machine, kernel = watched(loads(50), flat=32)
    run(machine)
    rows = kernel.read()
    assert count(rows, NO_MEMORY | {"EPT_VIOLATION"}) >= 50
    assert_complete(machine, rows)


def test_halts_and_how_long_they_were(watched):
    """A halt's time is in the kernel's exit that began it, and what KVM calls halted is a part of that."""
    for _attempt in range(20):
        machine, kernel = watched("timer", flat=None, append="20")
        run(machine)
        rows = kernel.read()
        stats = machine.vcpus[0].stats()
        halts = [row for row in rows if row.reason in HALT]
        assert count(halts, HALT) == stats["halt_exits"] > 0
        assert 0 < halted_ns(stats) <= sum(row.handler.total for row in halts)
        assert_complete(machine, rows)
        if stats["halt_exits"] >= 20:
            break  # else ticks that came while it was not let run followed one another without a halt
    assert stats["halt_exits"] >= 20


def test_each_vcpu_has_its_own_rows(watched):
    machine, kernel = watched("smp", flat=None, cpus=2, ram_mib=16)
    run(machine, status=2)  # the number of its CPUs
    rows = kernel.read()
    assert {row.vcpu for row in rows} == {0, 1}
    assert_complete(machine, rows)


def test_another_machine_is_not_counted(watched, machine_of):
    machine, kernel = watched(outs(10))
    run(machine)
    before = {row.key: row.count for row in kernel.read()}
    run(machine_of(outs(50)))
    assert {row.key: row.count for row in kernel.read()} == before


def test_it_can_be_read_while_the_guest_runs(watched):
    class Done:
        answer = 0

        def read(self, offset, size):
            return self.answer

        write = None

    # l: in al,0x99; test al,al; jz l; mov al,0; out 0xf4,al; hlt
    machine, kernel = watched(bytes.fromhex("e499 84c0 74fa b000 e6f4 f4".replace(" ", "")))
    done = Done()
    machine.bus_pio.claim(0x99, 1, done, "done")
    machine.start()
    seen = [0]
    deadline = time.monotonic() + 120
    while len(set(seen)) < 20 and time.monotonic() < deadline:
        seen.append(Exits(kernel.read()).count)
        time.sleep(0.02)
    done.answer = 1
    assert machine.wait(timeout=120).status == 0
    assert seen == sorted(seen)
    assert len(set(seen)) == 20
    assert_complete(machine, kernel.read())


def programs():
    """Return the numbers of all BPF programs that the kernel holds."""
    found, last = set(), 0
    while True:
        attributes = ctypes.create_string_buffer(struct.pack("=III", last, 0, 0))
        libc = ctypes.CDLL(None)
        if libc.syscall(bpf.SYS_BPF, PROG_GET_NEXT_ID, attributes, 12) < 0:
            return found
        last = struct.unpack_from("=III", attributes)[1]
        found.add(last)


def traces():
    """Return what a tracer leaves behind when it does not clean up."""
    found = {}
    for name in ("synthetic_events", "dynamic_events", "set_event", "set_event_pid", "kprobe_events"):
        with open(f"{TRACEFS}/{name}") as file:
            found[name] = file.read()
    for event in ("kvm_entry", "kvm_exit"):
        for name in ("enable", "filter", "trigger"):
            with open(f"{TRACEFS}/events/kvm/{event}/{name}") as file:
                found[event, name] = file.read()
    found["instances"] = os.listdir(f"{TRACEFS}/instances")
    return found


def test_nothing_is_left_when_it_is_closed(traced):
    for _ in range(2):  # what is imported and allocated once
        KernelExits.open(2)[0].close()
    before = traces(), programs(), sorted(os.listdir("/proc/self/fd"))
    with KernelExits.open(2)[0] as kernel:
        ours = programs() - before[1]  # those that others have closed may go any moment
        assert len(ours) == 2
        assert traces() == before[0]
        with open("/proc/self/maps") as maps:
            assert "bpf-map" in maps.read()
    assert kernel.read() == []
    until(lambda: not ours & programs())
    assert (traces(), sorted(os.listdir("/proc/self/fd"))) == (before[0], before[2])
    with open("/proc/self/maps") as maps:
        assert "bpf-map" not in maps.read()


def test_nothing_is_left_of_a_process_that_was_killed(traced):
    before = traces(), programs()
    code = (
        "from hypervisor.profile.kernelexits import KernelExits; import time\n"
        "kernel, why = KernelExits.open(2); print(kernel is not None, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "True\n"
        ours = programs() - before[1]
        assert len(ours) == 2
        child.send_signal(signal.SIGKILL)
    until(lambda: not ours & programs())
    assert traces() == before[0]


def test_a_machine_that_fails_leaves_its_counts(watched):
    """An exception of a device ends the machine; what was counted is there all the same."""

    class Broken:
        def read(self, offset, size):
            raise RuntimeError("a bug in a device")

        write = None

    machine, kernel = watched(bytes.fromhex("ba5856ecf4"))  # mov dx,0x5658; in al,dx; hlt
    machine.bus_pio.claim(0x5658, 1, Broken(), "broken")
    with pytest.raises(RuntimeError, match="a bug in a device"):
        machine.run(timeout=120)
    assert count(kernel.read(), PORT_IO) == 1


def test_a_user_without_rights_is_told(traced):
    code = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "from hypervisor.profile.kernelexits import KernelExits\n"
        "print(KernelExits.open(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(None, 'it needs root')\n"

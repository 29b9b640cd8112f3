"""The machine's life, with guests of a few bytes at 0000:7c00 in real mode."""

import gc
import os
import threading
import time
from functools import partial

import pytest
from guest_code import EXIT_WITH

from hypervisor import ConfigError, Stop
from hypervisor.host import quick_kind
from hypervisor.kvm import Kvm

pytestmark = pytest.mark.kvm

TIMEOUT = 120
"""Seconds: far more than any of these takes, on a busy host too."""
SPIN = bytes.fromhex("fa ebfd")  # cli; l: jmp l (to the cli)
COUNT = bytes.fromhex("66 31 c0 66 40 66 a3 00 05 eb f8")  # xor eax,eax; l: inc eax; mov [0x500],eax; jmp l


class Probe:
    """A device that answers with what it is told and remembers what it was asked."""

    def __init__(self, answer=0):
        self.answer = answer
        self.reads = []
        self.writes = []

    def read(self, offset, size):
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset, size, value):
        self.writes.append((offset, size, value))


@pytest.mark.parametrize(
    ("how", "value", "status"), [("raw", 7, 7), ("raw", 0, 0), ("qemu", 7, 15), ("qemu", 0, 1), ("qemu", 255, 255)]
)
def test_the_guests_own_status(machine_of, how, value, status):
    outcome = machine_of(EXIT_WITH[value], debug_exit=how).run(timeout=TIMEOUT)
    assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, status)


def test_what_is_where_has_a_name(machine_of):
    """What the guest has touched has names, a device of the user's has its offset; none is made for it."""
    # mov dx,0x3fa; in al,dx; mov al,0; out 0xf4,al
    machine = machine_of(bytes.fromhex("bafa03 ec b000 e6f4"))
    machine.bus_pio.claim(0x5658, 4, Probe(), "dice")
    machine.run(timeout=TIMEOUT)
    names = {port: machine.bus_pio.name_of(port, write=True) for port in (0x3FA, 0xF4, 0x5659, 0x71, 0x80)}
    assert names == {
        0x3FA: ("uart0", "FCR"),
        0xF4: ("debug-exit", "EXIT"),
        0x5659: ("dice", "+0x1"),
        0x71: ("rtc", "DATA"),
        0x80: None,
    }


def test_string_output_and_open_bus(machine_of):
    # mov dx,0x3f8; mov si,text; mov cx,5; cld; rep outsb; in al,0x80; out dx,al; mov al,0; out 0xf4,al; hlt
    code = (
        bytes.fromhex("baf803 be167c b90500 fc f36e e480 ee b000 e6f4 f4".replace(" ", "")).ljust(0x16, b"\x90")
        + b"hello"
    )
    machine = machine_of(code)
    assert machine.run(timeout=TIMEOUT).status == 0
    assert machine.console.output == b"hello\xff"


def test_a_python_device_on_a_port(machine_of):
    device = Probe(answer=0x1234_5678_9ABC_DEF0)
    # mov dx,0x5658; in eax,dx; mov [0x500],eax; in ax,dx; in al,dx; mov ax,0xbeef; out dx,ax; out 0xf4
    code = bytes.fromhex("ba5856 66ed 66a30005 ed ec b8efbe ef b000 e6f4 f4".replace(" ", ""))
    machine = machine_of(code)
    machine.bus_pio.claim(0x5658, 4, device, "probe")
    machine.run(timeout=TIMEOUT)
    assert device.reads == [(0, 4), (0, 2), (0, 1)]
    assert device.writes == [(0, 2, 0xBEEF)]
    assert machine.memory.read(0x500, 4) == bytes.fromhex("f0debc9a")


def test_string_input_takes_one_answer_for_each_element(machine_of):
    class Counter(Probe):
        def read(self, offset, size):
            super().read(offset, size)
            return len(self.reads)

    device = Counter()
    # mov dx,0x5658; mov di,0x500; mov cx,5; cld; rep insb; out 0xf4
    code = bytes.fromhex("ba5856 bf0005 b90500 fc f36c b000 e6f4 f4".replace(" ", ""))
    machine = machine_of(code)
    machine.bus_pio.claim(0x5658, 1, device, "counter")
    machine.run(timeout=TIMEOUT)
    assert machine.memory.read(0x500, 6) == bytes([1, 2, 3, 4, 5, 0])


def test_a_python_device_in_memory(machine_of):
    device = Probe(answer=0x42)
    # segment 0xffff:0x10 would be RAM; use the hole at 0x200000 from flat 32-bit code instead
    # mov eax,[0xd0000004]; mov [0xd0000008],eax; mov byte [0xd0000001],7; mov al,0; out 0xf4,al; hlt
    code = bytes.fromhex("a1040000d0 a3080000d0 c605010000d007 b000 e6f4 f4".replace(" ", ""))
    machine = machine_of(code, flat=32)
    machine.bus_mmio.claim(0xD000_0000, 0x1000, device, "probe")
    assert machine.run(timeout=TIMEOUT).status == 0
    assert device.reads == [(4, 4)]
    assert device.writes == [(8, 4, 0x42), (1, 1, 7)]


def test_unclaimed_memory_reads_as_all_ones(machine_of):
    # mov eax,[0xd0000000]; mov [0x500],eax; mov [0xd0000000],eax; out 0xf4
    code = bytes.fromhex("a1000000d0 a300050000 a3000000d0 b000 e6f4 f4".replace(" ", ""))
    machine = machine_of(code, flat=32)
    assert machine.run(timeout=TIMEOUT).status == 0
    assert machine.memory.read(0x500, 4) == b"\xff\xff\xff\xff"


def test_pci_configuration_in_memory_and_by_ports_is_one(machine_of):
    """Without a virtio device too: the host bridge's identifiers, both ways, and nobody at the last function."""
    # mov eax,[0xf0000000]; mov [0x500],eax; mov eax,[0xf00ff000]; mov [0x504],eax
    code = "a1000000f0 a300050000 a100f00ff0 a304050000"
    # mov eax,0x80000000; mov edx,0xcf8; out dx,eax; mov dl,0xfc; in eax,dx; mov [0x508],eax; out 0xf4
    code += "b800000080 baf80c0000 ef b2fc ed a308050000 b000 e6f4 f4"
    machine = machine_of(bytes.fromhex(code.replace(" ", "")), flat=32)
    assert machine.run(timeout=TIMEOUT).status == 0
    assert machine.memory.read(0x500, 12) == bytes.fromhex("8680570d ffffffff 8680570d")


def test_halt_without_interrupt_controllers_is_an_end(machine_of):
    outcome = machine_of(b"\xf4", irqchip="none").run(timeout=TIMEOUT)
    assert (outcome.reason, outcome.status) == (Stop.HALTED, 0)


def test_a_triple_fault_is_explained(machine_of):
    # lidt [zero]; ud2: an exception without an interrupt table, in protected mode
    code = bytes.fromhex("0f011d10001000 0f0b f4".replace(" ", "")).ljust(0x40, b"\0")
    outcome = machine_of(code, flat=32).run(timeout=TIMEOUT)
    assert (outcome.reason, outcome.status) == (Stop.TRIPLE_FAULT, 4)
    assert "triple fault" in outcome.message
    assert "\n" not in outcome.message
    assert "RIP" in outcome.detail.upper() or "CPU after reset" in outcome.detail  # AMD-V throws the state away


def test_a_timeout_leaves_the_machine_running(machine_of):
    machine = machine_of(SPIN)
    machine.start()
    with pytest.raises(TimeoutError):
        machine.wait(timeout=0.1)
    assert machine.outcome is None
    assert machine.kill().reason is Stop.KILLED
    assert machine.wait().reason is Stop.KILLED


def test_pause_holds_the_guest_still_and_resume_lets_it_go_on(machine_of):
    machine = machine_of(COUNT)
    machine.start()
    time.sleep(0.05)
    machine.pause()
    first = machine.memory.read(0x500, 4)
    time.sleep(0.05)
    assert machine.memory.read(0x500, 4) == first
    assert machine.vcpus[0].registers["rax"] in range(
        int.from_bytes(first, "little"), int.from_bytes(first, "little") + 2
    )
    machine.resume()
    deadline = time.monotonic() + TIMEOUT
    while machine.memory.read(0x500, 4) == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert machine.memory.read(0x500, 4) != first


def test_a_thousand_kicks_are_none_lost(machine_of):
    machine = machine_of(COUNT)
    machine.start()
    rounds = 1000 if quick_kind().value == "software" else 100
    for _ in range(rounds):
        assert machine.vcpus[0].registers["rip"] in range(0x7C00, 0x7C10)


def test_registers_before_and_after_the_run(machine_of):
    machine = machine_of(EXIT_WITH[5])
    assert machine.vcpus[0].registers["rip"] == 0x7C00
    machine.run(timeout=TIMEOUT)
    assert machine.vcpus[0].registers["rax"] & 0xFF == 5


def test_a_device_that_fails_ends_the_machine_loudly(machine_of):
    class Broken(Probe):
        def write(self, offset, size, value):
            raise RuntimeError("a bug in a device")

    machine = machine_of(bytes.fromhex("ba5856eef4"))
    machine.bus_pio.claim(0x5658, 1, Broken(), "broken")
    with pytest.raises(RuntimeError, match="a bug in a device"):
        machine.run(timeout=TIMEOUT)
    assert machine.outcome.status == 5


def test_claims_come_before_the_start(machine_of):
    machine = machine_of(SPIN)
    machine.start()
    with pytest.raises(ConfigError, match="has started"):
        machine.bus_pio.claim(0x5658, 1, Probe(), "late")
    with pytest.raises(ConfigError, match="started already"):
        machine.start()


def test_more_vcpus_than_kvm_allows_is_refused(machine_of, monkeypatch):
    monkeypatch.setattr(Kvm, "max_vcpus", lambda _self: 2)
    with pytest.raises(ConfigError, match="cpus is 3") as caught:
        machine_of(SPIN, cpus=3)
    assert "2 vCPUs" in caught.value.hint


def test_machines_live_side_by_side_in_several_threads(machine_of):
    outcomes = {}

    def one(code):
        outcomes[code] = machine_of(EXIT_WITH[code]).run(timeout=TIMEOUT).status

    threads = [threading.Thread(target=one, args=(code,)) for code in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {code: code for code in range(1, 7)}


def holdings():
    gc.collect()
    with open("/proc/self/maps") as maps:
        mappings = len(maps.readlines())
    return len(os.listdir("/proc/self/fd")), threading.active_count(), mappings


def test_sixteen_machines_leave_nothing_behind(machine_of):
    def cycle():
        machine = machine_of(EXIT_WITH[0])
        machine.run(timeout=TIMEOUT)
        machine.close()

    for _ in range(3):  # allocator arenas and lazy imports settle
        cycle()
    for _attempt in range(5):  # threads that meet for the first time may need an arena and stacks; a leak comes again
        before = holdings()
        for _ in range(16):
            cycle()
        after = holdings()
        assert after[:2] == before[:2]
        if after[2] <= before[2] + 1:
            break
    assert after[2] <= before[2] + 1  # the allocator may grow by one arena


def test_a_machine_that_was_never_started_closes(machine_of):
    machine_of(SPIN).close()


def test_exits_are_counted(machine_of):
    machine = machine_of(bytes.fromhex("b90a00 ba8000 ee e2fd b000 e6f4 f4".replace(" ", "")))
    machine.run(timeout=TIMEOUT)
    handle = machine.vcpus[0].handle
    assert sum(handle.exit_counts.values()) == 11
    assert [record.address for record in handle.recent_exits] == [0x80] * 10 + [0xF4]
    guest, vmm = handle.ticks
    assert guest > 0
    assert vmm > 0


def test_the_console_takes_input(machine_of):
    # l: mov dx,0x3fd; in al,dx; test al,1; jz l; mov dx,0x3f8; in al,dx; out dx,al; cmp al,'q'; jne l; out 0xf4
    code = bytes.fromhex("bafd03 ec a801 74f8 baf803 ec ee 3c71 75ef b000 e6f4 f4".replace(" ", ""))
    machine = machine_of(code)
    machine.start()
    machine.console.write("hello, world\nq")
    assert machine.wait(timeout=TIMEOUT).status == 0
    assert machine.console.output == b"hello, world\nq"


def test_each_vcpus_thread_says_who_it_is_before_it_runs(machine_of):
    machine = machine_of(EXIT_WITH[0], cpus=2)
    seen = {}

    def note(index, tid):
        seen[index] = (tid, threading.get_native_id(), machine.vcpus[index].handle.exit_counts)

    for vcpu in machine.vcpus:
        vcpu.on_thread = partial(note, vcpu.index)
    machine.run(timeout=TIMEOUT)
    assert seen.keys() == {0, 1}
    assert all(tid == its_own != threading.get_native_id() and not exits for tid, its_own, exits in seen.values())


def test_a_vcpus_thread_that_cannot_begin_ends_the_machine_loudly(machine_of):
    def fail(_tid):
        raise RuntimeError("no place for it")

    machine = machine_of(EXIT_WITH[0])
    machine.vcpus[0].on_thread = fail
    with pytest.raises(RuntimeError, match="no place for it"):
        machine.run(timeout=TIMEOUT)
    assert machine.vcpus[0].handle.exit_counts == {}


def test_reset_and_power_off(machine_of):
    def end_of(code):
        return machine_of(bytes.fromhex(code.replace(" ", ""))).run(timeout=TIMEOUT).reason

    assert end_of("b0fe e664 f4") is Stop.RESET
    assert end_of("baf90c b006 ee f4") is Stop.RESET
    assert end_of("ba0406 b80034 ef f4") is Stop.POWER_OFF  # mov dx,0x604; mov ax,0x2000|(5<<10); out dx,ax


def test_ram_above_four_gib_is_there(machine_of):
    machine = machine_of(EXIT_WITH[0], ram_mib=5 * 1024)
    machine.memory.write(5 << 30, b"high")
    assert machine.run(timeout=TIMEOUT).status == 0
    assert machine.memory.read(5 << 30, 4) == b"high"

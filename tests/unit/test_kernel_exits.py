"""The programs that count KVM's own exits, run here by an interpreter of BPF, and what they are made from."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.profile import kernelexits
from hypervisor.profile.bpf import FP, Code, Reg
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.kernelexits import KernelExits, read_format

FORMAT = """name: kvm_exit
ID: 1473
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned int exit_reason;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned long guest_rip;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u32 isa;\toffset:24;\tsize:4;\tsigned:0;

print fmt: "reason %s%s rip 0x%lx", (REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, \
{ 0, "EXCEPTION_NMI" }, { 12, "HLT" }) : __print_symbolic(REC->exit_reason, \
{ 0x040 + 14, "PF excp" }, { 0x078, "hlt" }, { -1, "invalid" }), \
(REC->isa == 1 && REC->exit_reason & ~0xffff) ? __print_flags(REC->exit_reason & ~0xffff, " ", \
{ 0x80000000, "FAILED" }) : "", REC->guest_rip
"""
ENTRY_FORMAT = """name: kvm_entry
ID: 1482
format:
\tfield:unsigned int vcpu_id;\toffset:8;\tsize:4;\tsigned:0;

print fmt: "vcpu %u", REC->vcpu_id
"""
VT_X, AMD_V = 1, 2
M64 = (1 << 64) - 1


class FakeMap:
    """A table of the kernel's, as programs see it: its values have addresses."""

    def __init__(self, kernel, fd, key_size, value_size, *, is_array=False):
        self.fd, self.key_size, self.value_size, self.is_array = fd, key_size, value_size, is_array
        self.kernel, self.places = kernel, {}
        kernel.maps[fd] = self

    def place(self, key, *, make=False):
        if key not in self.places and (make or self.is_array):
            self.places[key] = self.kernel.allocate(self.value_size)
        return self.places.get(key, 0)

    def update(self, key, value):
        self.kernel.write(self.place(key, make=True), value)


class FakeKernel:
    """Runs a program as the BPF instruction set specification says, on memory that faults outside of what is there."""

    def __init__(self):
        self.now = 0
        self.tid = 100
        self.maps = {}
        self._regions = {}
        self._next = 1 << 20

    def allocate(self, size):
        base = self._next
        self._regions[base] = bytearray(size)
        self._next += size + 4096 & ~7
        return base

    def _find(self, address, size):
        for base, data in self._regions.items():
            if base <= address and address + size <= base + len(data):
                return data, address - base
        raise AssertionError(f"{size} bytes at {address:#x} are not the program's")

    def read(self, address, size):
        data, at = self._find(address, size)
        return bytes(data[at : at + size])

    def write(self, address, value):
        data, at = self._find(address, len(value))
        data[at : at + len(value)] = value

    def help(self, number, r):
        table = self.maps.get(r[1])
        if number == 5:  # ktime_get_ns
            return self.now
        if number == 120:  # get_ns_current_pid_tgid
            space = os.stat("/proc/self/ns/pid")
            assert (r[1], r[2], r[4]) == (os.major(space.st_dev) << 20 | os.minor(space.st_dev), space.st_ino, 8)
            self.write(r[3], struct.pack("=II", self.tid, 99))
            return 0
        key = self.read(r[2], table.key_size)
        if number == 1:  # map_lookup_elem
            return table.place(key)
        assert number == 2  # map_update_elem
        table.update(key, self.read(r[3], table.value_size))
        return 0

    def run(self, code, event):
        context, stack = self.allocate(len(event)), self.allocate(512)
        self.write(context, event)
        r = [0, context, *[0] * 8, stack + 512]
        at = 0
        for _ in range(10_000):
            opcode, registers, offset, value = struct.unpack_from("<BBhi", code, at * 8)
            target, source, at = registers & 15, registers >> 4, at + 1
            kind, mode = opcode & 7, opcode & 0xE0
            operand = r[source] if opcode & 8 else value & M64
            size = {0x00: 4, 0x18: 8}.get(opcode & 0x18)
            if opcode == 0x18:  # a 64-bit number
                r[target] = value & 0xFFFF_FFFF | struct.unpack_from("<I", code, at * 8 + 4)[0] << 32
                at += 1
            elif kind == 7:
                r[target] = arithmetic(opcode & 0xF0, r[target], operand) & M64
            elif kind == 1 and mode == 0x60:
                r[target] = int.from_bytes(self.read(r[source] + offset & M64, size), "little")
            elif kind in {2, 3} and mode == 0x60:
                number = r[source] if kind == 3 else value
                self.write(r[target] + offset & M64, (number & (1 << 8 * size) - 1).to_bytes(size, "little"))
            elif opcode == 0x95:  # exit
                return r[0]
            elif opcode == 0x85:  # call
                r[0] = self.help(value, r)
                r[1:6] = [0xDEAD_0000] * 5
            else:
                assert kind == 5, hex(opcode)
                at += offset * holds(opcode & 0xF0, r[target], operand)
        raise AssertionError("the program does not end")


def arithmetic(operation, left, right):
    return {
        0x00: lambda: left + right,
        0x10: lambda: left - right,
        0x20: lambda: left * right,
        0x50: lambda: left & right,
        0x60: lambda: left << (right & 63),
        0x70: lambda: left >> (right & 63),
        0xB0: lambda: right,
    }[operation]()


def holds(operation, left, right):
    return {
        0x00: lambda: True,
        0x10: lambda: left == right,
        0x20: lambda: left > right,
        0x30: lambda: left >= right,
        0x50: lambda: left != right,
        0xA0: lambda: left < right,
        0xB0: lambda: left <= right,
    }[operation]()


class Host:
    """A kernel with both programs and a machine's threads: vCPU n is thread 100 + n."""

    def __init__(self, vcpus=1):
        self.kernel = kernel = FakeKernel()
        self.threads = FakeMap(kernel, 3, 4, kernelexits.THREAD.size)
        numbers = FakeMap(kernel, 4, 16, 4)
        self.rows = FakeMap(kernel, 5, 4, kernelexits.ROW_SIZE, is_array=True)
        fields = read_format(FORMAT).fields
        self.programs = {
            "entry": kernelexits.entry_program(self.threads, self.rows),
            "exit": kernelexits.exit_program(self.threads, numbers, self.rows, fields),
        }
        for vcpu in range(vcpus):
            KernelExits.watch(self.as_counted(vcpus), vcpu, 100 + vcpu)
        self.vcpus = vcpus

    def as_counted(self, vcpus):
        """What `read` works on: the tables of names and one buffer of all rows."""
        counted = object.__new__(KernelExits)
        counted._vcpus, counted._threads, counted._tables = vcpus, self.threads, read_format(FORMAT).tables
        keys = [struct.pack("=I", number) for number in range(vcpus * kernelexits.ROWS)]
        counted._rows_map = b"".join(
            self.kernel.read(place, kernelexits.ROW_SIZE) if place else bytes(kernelexits.ROW_SIZE)
            for place in (self.rows.places.get(key) for key in keys)
        )
        return counted

    def happens(self, what, now, reason=0x78, *, isa=AMD_V, vcpu=0):
        self.kernel.now, self.kernel.tid = now, 100 + vcpu
        event = struct.pack("=8xI12xI4x", reason, isa)
        assert self.kernel.run(self.programs[what], event) == 0  # the event goes nowhere else

    def read(self):
        return {(row.vcpu, row.reason): row for row in KernelExits.read(self.as_counted(self.vcpus))}


def test_format_of_an_event():
    number, fields, (vtx, amdv) = read_format(FORMAT)
    assert number == 1473
    assert fields["exit_reason"] == (8, 4)
    assert fields["isa"] == (24, 4)
    assert fields["common_pid"] == (4, 4)
    assert (vtx.mask, vtx.names) == (0xFFFF, {0: "EXCEPTION_NMI", 12: "HLT"})
    assert (amdv.mask, amdv.names) == (0xFFFF_FFFF, {0x4E: "PF excp", 0x78: "hlt", 0xFFFF_FFFF: "invalid"})
    with pytest.raises(ValueError, match="no event's format"):
        read_format("nothing")


def test_an_instruction_of_each_kind():
    """BPF instruction set specification: opcode, registers, offset, number, little-endian."""
    code = Code()
    code.jump("end", "==", Reg(3), 7)
    code.do("mov", Reg(1), Reg(6))
    code.do("add", FP, -8)
    code.load(4, Reg(2), Reg(1), 24)
    code.store(8, FP, -16, Reg(2))
    code.clear(Reg(7), 8)
    code.number(Reg(4), 0x1_0000_0002)
    code.call("ktime_get_ns")
    code.label("end")
    code.leave()
    assert [line.hex() for line in struct.unpack("8s" * 11, code.assemble())] == [
        "1503080007000000",  # if r3 == 7 goto +8
        "bf61000000000000",  # r1 = r6
        "070a0000f8ffffff",  # r10 += -8
        "6112180000000000",  # r2 = *(u32 *)(r1 + 24)
        "7b2af0ff00000000",  # *(u64 *)(r10 - 16) = r2
        "7a07080000000000",  # *(u64 *)(r7 + 8) = 0
        "1804000002000000",  # r4 = 0x100000002, in two
        "0000000001000000",
        "8500000005000000",  # call 5
        "b700000000000000",  # r0 = 0
        "9500000000000000",  # exit
    ]


def test_an_exit_and_its_two_times():
    host = Host()
    host.happens("entry", 1000)
    host.happens("exit", 1300)
    host.happens("entry", 1307)
    row = host.read()[0, "hlt"]
    assert (row.layer, row.count, row.operations) == ("kernel", 1, 1)
    assert (row.guest.count, row.guest.total) == (1, 300)
    assert (row.handler.count, row.handler.total) == (1, 7)


def test_what_is_not_over_has_no_time_yet():
    host = Host()
    host.happens("exit", 500)  # its entry was before we looked
    row = host.read()[0, "hlt"]
    assert (row.count, row.guest.count, row.handler.count) == (1, 0, 0)
    host.happens("entry", 600)
    host.happens("exit", 640)
    row = host.read()[0, "hlt"]
    assert (row.count, row.guest.total, row.handler.total) == (2, 40, 100)


def test_an_entry_that_came_to_nothing_counts_once():
    host = Host()
    host.happens("entry", 100)
    host.happens("exit", 200)
    host.happens("entry", 300)
    host.happens("entry", 400)
    host.happens("exit", 450)
    row = host.read()[0, "hlt"]
    assert (row.guest.total, row.handler.total) == (100 + 50, 100)


def test_reasons_and_vcpus_are_told_apart():
    host = Host(vcpus=2)
    for vcpu, isa, reason in ((0, AMD_V, 0x78), (1, AMD_V, 0x4E), (1, VT_X, 12), (1, VT_X, 0x8000_0000), (0, AMD_V, 5)):
        host.happens("exit", 10, reason, isa=isa, vcpu=vcpu)
    assert set(host.read()) == {(0, "hlt"), (1, "PF excp"), (1, "HLT"), (1, "EXCEPTION_NMI"), (0, "0x5")}


def test_another_thread_is_not_counted():
    host = Host(vcpus=1)
    host.happens("exit", 10, vcpu=1)
    host.happens("entry", 20, vcpu=1)
    assert host.read() == {}


def test_more_reasons_than_rows_share_the_last_one(monkeypatch):
    monkeypatch.setattr(kernelexits, "ROWS", 3)
    host = Host(vcpus=2)
    for vcpu in (1, 0):
        for reason in (0x78, 0x4E, 5, 6, 0x78, 6):
            host.happens("exit", 10, reason, vcpu=vcpu)
    counts = {key: row.count for key, row in host.read().items()}
    assert counts == {(v, name): n for v in (0, 1) for name, n in (("hlt", 2), ("PF excp", 1), ("other", 3))}


@given(st.lists(st.integers(0, 1 << 50) | st.integers(0, 300), min_size=1, max_size=4))
def test_times_fall_into_the_buckets_of_the_user_layer(times):
    """As `Histogram.of` counts them, whatever they are."""
    host, now = Host(), 1
    for time in times:
        host.happens("exit", now)
        host.happens("entry", now := now + time)
    assert host.read()[0, "hlt"].handler == Histogram.of(times)


def tracefs(tmp_path, **formats):
    for name, text in formats.items():
        folder = tmp_path / "events" / "kvm" / name
        folder.mkdir(parents=True)
        (folder / "format").write_text(text)
    (tmp_path / "events").mkdir(exist_ok=True)
    return str(tmp_path)


def test_where_tracefs_is(tmp_path, monkeypatch):
    root = tracefs(tmp_path, kvm_exit=FORMAT, kvm_entry=ENTRY_FORMAT)
    monkeypatch.setattr(kernelexits, "TRACEFS", (str(tmp_path / "nothing"), root))
    events, why_not = kernelexits.find_events()
    assert why_not == ""
    assert {name: event.id for name, event in events.items()} == {"kvm_exit": 1473, "kvm_entry": 1482}


@pytest.mark.parametrize(
    ("formats", "why_not"),
    [
        ({}, "this host's KVM has no tracepoints"),
        ({"kvm_exit": FORMAT}, "this host's KVM has no tracepoints"),
        ({"kvm_exit": ENTRY_FORMAT, "kvm_entry": ENTRY_FORMAT}, "this kernel's kvm_exit tracepoint is another one"),
        (
            {"kvm_exit": FORMAT.replace("offset:8;\tsize:4", "offset:8;\tsize:2"), "kvm_entry": ENTRY_FORMAT},
            "this kernel's kvm_exit tracepoint is another one",
        ),
        ({"kvm_exit": "x", "kvm_entry": ENTRY_FORMAT}, "this kernel's kvm_exit tracepoint is another one"),
    ],
)
def test_why_there_are_no_kernel_exits(tmp_path, monkeypatch, formats, why_not):
    monkeypatch.setattr(kernelexits, "TRACEFS", (tracefs(tmp_path, **formats),))
    assert KernelExits.open(1) == (None, why_not)


def test_without_tracefs_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(kernelexits, "TRACEFS", (str(tmp_path),))
    assert KernelExits.open(1) == (None, f"tracefs is not mounted (mount -t tracefs tracefs {tmp_path})")


@pytest.mark.parametrize(
    ("number", "uid", "why_not"),
    [
        (1, 1000, "it needs root"),
        (13, 1000, "it needs root"),
        (1, 0, "this kernel refuses BPF programs on KVM's tracepoints: Operation not permitted"),
        (38, 1000, "this kernel refuses BPF programs on KVM's tracepoints: Function not implemented"),
    ],
)
def test_what_the_kernel_refuses(tmp_path, monkeypatch, number, uid, why_not):
    def refuse(*_arguments):
        raise OSError(number, os.strerror(number))

    root = tracefs(tmp_path, kvm_exit=FORMAT, kvm_entry=ENTRY_FORMAT)
    monkeypatch.setattr(kernelexits, "TRACEFS", (root,))
    monkeypatch.setattr(kernelexits, "Map", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert KernelExits.open(1) == (None, why_not)


def test_a_folder_that_only_root_may_enter(monkeypatch):
    def refuse(path):
        raise PermissionError(13, os.strerror(13), path)

    monkeypatch.setattr(os, "stat", refuse)
    assert KernelExits.open(1) == (None, "it needs root")

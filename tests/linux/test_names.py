"""Names for addresses of a Linux guest, against what the guest says itself."""

import re
import socket
import time
import zlib

import pytest
from linux_shell import COMMAND_SECONDS, QUIET

from hypervisor import kernels
from hypervisor.profile import buildid, kallsyms, modules
from hypervisor.profile.btf import find as find_types
from hypervisor.profile.names import GuestNames
from hypervisor.profile.reading import kernel_reader
from hypervisor.symbols import Symbols

pytestmark = pytest.mark.hardware

LOOP = "while :; do :; done"


def sent_by(shell, path, command):
    """Return what a command prints, through a port of the virtio console: the serial one is slow."""
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(COMMAND_SECONDS)
    end.connect(str(path))
    shell.run(f"({command} | gzip -c > /dev/$(grep -l agent /sys/class/virtio-ports/*/name | cut -d/ -f5)) & true")
    unpack, data = zlib.decompressobj(31), b""
    while not unpack.eof:
        chunk = end.recv(65536)
        assert chunk
        data += unpack.decompress(chunk)
    end.close()
    return data.decode()


def split(text):
    """Return the kernel's (address, size, name) and the functions of its modules, as /proc/kallsyms has them."""
    kernel, functions = [], set()
    for line in text.splitlines():
        address, kind, name, *module = line.split()
        if not module:
            kernel.append((int(address, 16), 0, name))
        elif kind in "tT" and module[0] != "[bpf]":
            functions.add((int(address, 16), f"{name} {module[0]}"))
    return kernel, functions


def in_user_mode(machine, names, name):
    """Return RIP and CR3 of a vCPU that was caught in user mode, in the process of this name; others come and go."""
    end = time.monotonic() + COMMAND_SECONDS
    seen = set()
    while time.monotonic() < end:
        for vcpu in machine.vcpus:
            special, rip = vcpu.special_registers, vcpu.registers["rip"]
            if special["cs"].selector & 3 == 3 and rip < 1 << 47:
                found = names.name(rip, special["cr3"])
                if found == name:
                    return rip, special["cr3"]
                seen.add(found)
        time.sleep(0.05)
    raise AssertionError(f"no vCPU was seen in {name}, but in {seen}")


@pytest.mark.parametrize("isolation", ["pti=on", "pti=off"])
def test_a_stock_kernel_that_kaslr_moved(boot, tmp_path, isolation):
    """With page table isolation, CR3 in user mode is not the one in the kernel's list."""
    ports = [f"socket={tmp_path}/hvc", f"agent,socket={tmp_path}/agent"]
    shell = boot(decompress="guest", ram_mib=256, ports=ports, append=f"{QUIET} {isolation}")
    memory = shell.machine.memory
    shell.run("echo 0 > /proc/sys/kernel/kptr_restrict")
    kernel, functions = split(sent_by(shell, tmp_path / "agent", "cat /proc/kallsyms"))
    assert len(kernel) > 50000

    found = kallsyms.find(memory)
    expected = Symbols(kernel)
    assert list(found.entries()) == list(expected.entries())
    for name in ("_text", "_stext", "init_task", "phys_base"):
        assert found.address_of(name) == expected.address_of(name)

    cr3 = shell.machine.vcpus[0].special_registers["cr3"]
    for value in (cr3, None):
        read = kernel_reader(memory, found, value)
        named = modules.find(found, read, find_types(found, read))
        names = {(address, name) for address, _, name in named.entries() if not name.startswith("[")}
        assert functions
        assert names <= functions
        assert {address for address, _ in names} == {address for address, _ in functions}

    notes = bytes.fromhex(shell.run("od -An -v -tx1 /sys/kernel/notes"))
    assert buildid.of_kernel(memory, found) == buildid.of_notes(notes)
    assert buildid.banner(memory, found).decode() == shell.run("cat /proc/version")
    image = kernels.kernel("debian").image.read_bytes()
    assert buildid.same_kernel(image, memory, found) is True
    assert buildid.same_kernel(kernels.kernel("tiny").image.read_bytes(), memory, found) is False

    pid = int(shell.run(f"({LOOP}) & echo $!"))
    names = GuestNames.of_guest(memory, cr3=cr3)
    listed = {process.pid: process.comm for process in names.processes.values()}
    assert {1, pid} <= set(listed)
    assert all(comm == shell.run(f"cat /proc/{number}/comm") for number, comm in listed.items())
    rip, user_cr3 = in_user_mode(shell.machine, names, f"[user] {listed[pid]}/{pid}")
    again = GuestNames.from_bytes(names.to_bytes())
    assert again.name(rip, user_cr3) == f"[user] {listed[pid]}/{pid}"
    assert again.name(found.address_of("start_kernel") + 1) == "start_kernel"


def test_a_tiny_kernel_against_its_system_map(boot):
    shell = boot("tiny")
    memory, kernel = shell.machine.memory, kernels.kernel("tiny")
    found = kallsyms.find(memory)
    own = {(int(line.split()[0], 16), line.split()[2]) for line in kernel.system_map.read_text().splitlines()}
    assert len(found) > 10000
    assert {(address, name) for address, _, name in found.entries()} <= own
    names = GuestNames.of_guest(memory, file=kernel.system_map.read_bytes(), file_name="System.map")
    assert names.notes == ["names from System.map"]
    end = time.monotonic() + COMMAND_SECONDS  # until the shell sleeps
    while not re.fullmatch(r"[a-z_]\w+(\.\w+)*", idle := names.name(shell.machine.vcpus[0].registers["rip"])):
        assert time.monotonic() < end, idle
        time.sleep(0.05)
    pid = int(shell.run(f"({LOOP}) & echo $!"))
    names.learn(memory)  # it has no type information
    listed = {process.pid: process.comm for process in names.processes.values()}
    assert {1, pid} <= set(listed)
    assert all(comm == shell.run(f"cat /proc/{number}/comm") for number, comm in listed.items())
    in_user_mode(shell.machine, names, f"[user] {listed[pid]}/{pid}")
    assert buildid.same_kernel(kernel.vmlinux.read_bytes(), memory, found) is True

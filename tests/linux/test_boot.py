"""Unmodified Linux kernels, from each boot protocol to a shell and back."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from linux_shell import BOOT_SECONDS, COMMAND_SECONDS, QUIET

from hypervisor import Stop, kernels

pytestmark = pytest.mark.hardware


def memory_mib(shell):
    """MemTotal as `free` has it, in MiB."""
    return int(shell.run("free -m | awk '/^Mem/ {print $2}'"))


def power_off(shell):
    shell.machine.console.write("poweroff -f\n")
    return shell.machine.wait(timeout=COMMAND_SECONDS)


def test_debian_from_its_bzimage(boot):
    """Unpacked by the guest itself, 1 vCPU, 128 MiB."""
    shell = boot(decompress="guest", ram_mib=128)
    assert "64-bit entry" in shell.machine.boot_plan.kind
    assert shell.run("nproc") == "1"
    assert 60 <= memory_mib(shell) <= 128
    assert shell.run("uname -r") == kernels.kernel("debian").modules.name
    assert "ttyS0" in shell.run("cat /proc/consoles")
    outcome = power_off(shell)
    assert (outcome.reason, outcome.status) == (Stop.POWER_OFF, 0)


def test_debian_unpacked_on_the_host_with_four_vcpus(boot):
    shell = boot(decompress="host", cpus=4)
    assert shell.run("nproc") == "4"
    assert shell.run("grep -c ^processor /proc/cpuinfo") == "4"
    assert shell.run("grep 'core id' /proc/cpuinfo | sort -u | wc -l") == "4"
    assert shell.run("for i in 0 1 2 3; do taskset $((1 << i)) sh -c 'echo ran' ; done") == "ran\nran\nran\nran"
    shell.machine.console.write("echo c > /proc/sysrq-trigger\n")
    outcome = shell.machine.wait(timeout=COMMAND_SECONDS)
    assert (outcome.reason, outcome.status) == (Stop.PANIC, 4)
    assert "sysrq triggered crash" in outcome.message


def test_debian_elf_by_the_64_bit_entry_with_4_gib(boot):
    shell = boot(
        str(kernels.vmlinux("debian")), protocol="linux64", ram_mib=4096, initrd=kernels.default_initramfs("debian")
    )
    assert "64-bit entry" in shell.machine.boot_plan.kind
    assert 3800 <= memory_mib(shell) <= 4096
    ram = shell.run("cat /proc/iomem | grep 'System RAM'")
    assert "100000000-13fffffff" in ram  # the part above the hole, from 4 GiB to 5
    assert power_off(shell).status == 0


def test_debian_elf_by_pvh_with_four_vcpus(boot):
    shell = boot(
        str(kernels.vmlinux("debian")), protocol="pvh", cpus=4, ram_mib=128, initrd=kernels.default_initramfs("debian")
    )
    assert "PVH" in shell.machine.boot_plan.kind
    assert shell.run("nproc") == "4"
    assert power_off(shell).status == 0


@pytest.mark.parametrize("cpus", [1, 4])
def test_tiny(boot, cpus):
    shell = boot("tiny", cpus=cpus, ram_mib=64)
    assert shell.run("nproc") == str(cpus)
    assert power_off(shell).reason is Stop.POWER_OFF


def test_the_platform_as_linux_sees_it(boot):
    """Clock, timer, tables, UART, PCI, RTC: what the kernel found, in one boot."""
    shell = boot(append="console=ttyS0 panic=-1 cryptomgr.notests loglevel=4")
    log = shell.run("dmesg", timeout=240)
    assert "kvm-clock: Using msrs" in log
    assert "Hypervisor detected: KVM" in log
    assert "is a 16550A" in log
    assert "PCI: Using configuration type 1" in log
    assert "rtc_cmos" in log
    assert "ACPI: Interpreter enabled" in log
    for word in (
        "ACPI Error",
        "ACPI BIOS Error",
        "ACPI Warning",
        "MP-BIOS bug",
        "[Firmware Bug]",
        "spurious",
    ):
        assert word not in log, word
    # QEMU's TCG lets the guest's XSETBV pass KVM by, so the sizes of CPUID leaf 0xd do not follow it there
    assert [line for line in re.findall("WARNING: .*", log) if "fpu__init_system_xstate" not in line] == []
    seconds = int(shell.run("date +%s"))
    assert abs(seconds - time.time()) < 60
    assert shell.run("cat /sys/class/rtc/rtc0/name").startswith("rtc_cmos")
    assert shell.run("hwclock -r >/dev/null && echo read") == "read"
    # input longer than every buffer on its way, byte for byte
    shell.machine.console.write("stty raw -echo; echo READ''Y; head -c 6000 | md5sum; stty sane\n")
    shell.machine.console.expect("READY", timeout=COMMAND_SECONDS)
    data = os.urandom(3000).hex().encode()
    shell.machine.console.write(data)
    assert shell.machine.console.expect("([0-9a-f]{32}) ", timeout=240)[1].decode() == hashlib.md5(data).hexdigest()  # noqa: S324
    # the power button reaches the guest, which acts on it
    assert shell.machine.press_power_button()
    assert shell.machine.wait(timeout=COMMAND_SECONDS).reason is Stop.POWER_OFF


@pytest.mark.parametrize("ecam", [True, False])
def test_pci_by_ecam_and_without(boot, ecam):
    """Linux believes the MCFG and sees 4 KiB of the host bridge through it; the same function is there as by ports."""
    without = "" if ecam else " pci=nommconf"
    shell = boot(append=f"console=ttyS0 panic=-1 cryptomgr.notests loglevel=4 iomem=relaxed{without}", rng=True)
    log = shell.run("dmesg | grep -i -e MMCONFIG -e ECAM -e 'PCI: Using'", timeout=240)
    assert "PCI: Using configuration type 1" in log
    assert "MMCONFIG at [mem 0xf0000000-0xf00fffff]" in log or not ecam, log
    assert shell.run("grep -ci -e 'PCI MMCONFIG 0000' -e 'PCI ECAM 0000' /proc/iomem") == str(int(ecam))
    assert shell.run(
        "cat /sys/bus/pci/devices/0000:00:01.0/vendor /sys/bus/pci/devices/0000:00:01.0/device"
    ).split() == [
        "0x1af4",
        "0x1044",
    ]
    size = shell.run("wc -c </sys/bus/pci/devices/0000:00:00.0/config")
    assert size == ("4096" if ecam else "256")
    if ecam:
        assert shell.run("tail -c 3840 /sys/bus/pci/devices/0000:00:00.0/config | tr -d '\\0' | wc -c") == "0"
    assert shell.run("busybox devmem 0xf0008000 32") == "0x10441AF4"
    assert shell.run("busybox devmem 0xf0010000 32") == "0xFFFFFFFF"


def test_a_kernel_without_a_root_panics_and_does_not_hang(boot, tmp_path):
    empty = tmp_path / "empty.cpio"
    header = b"070701" + b"%08X" * 13 % (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0)
    empty.write_bytes(header + b"TRAILER!!!\0".ljust(14, b"\0"))
    from hypervisor import Machine, MachineConfig  # noqa: PLC0415 - the one test without a shell

    with Machine(MachineConfig("tiny", initrd=empty, append="console=ttyS0 panic=0", ram_mib=64)) as machine:
        outcome = machine.run(timeout=BOOT_SECONDS)
    assert (outcome.reason, outcome.status) == (Stop.PANIC, 4)
    assert "Unable to mount root fs" in outcome.message or "No working init" in outcome.message


def test_hv_run_answers_a_script_on_standard_input():
    """The command itself: stdin as a pipe, its end, and the status."""
    result = subprocess.run(
        [sys.executable, "-m", "hypervisor", "run", "tiny", "--ram", "64", "--append", QUIET],
        input=b"echo a''nswer $((6 * 7))\npoweroff -f\n",
        capture_output=True,
        timeout=BOOT_SECONDS,
        check=False,
    )
    assert b"answer 42" in result.stdout
    assert (result.returncode, result.stderr) == (0, b"")


def test_sigterm_presses_the_power_button():
    process = subprocess.Popen(
        [sys.executable, "-m", "hypervisor", "run", "tiny", "--ram", "64", "--append", QUIET],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    seen = b""
    while b"/ # " not in seen:
        byte = os.read(process.stdout.fileno(), 4096)
        assert byte, seen
        seen += byte
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=COMMAND_SECONDS)
    assert (process.returncode, errors) == (0, b"")

"""The generation identifier under stock kernels: Debian's has no driver for it, the tiny one reseeds its generator."""

import re
import time

import pytest
from linux_shell import COMMAND_SECONDS

pytestmark = pytest.mark.hardware

IDENTIFIER = 0xEF028


def interrupts(shell, name):
    """Return how many interrupts of this name there were, on all CPUs."""
    found = re.search(rf"^ *\d+: +((?:\d+ +)+).*\b{name}$", shell.run("cat /proc/interrupts"), re.MULTILINE)
    assert found, name
    return sum(map(int, found[1].split()))


def in_the_guest(shell):
    """Return the identifier as the guest reads it in its memory."""
    words = shell.run(
        f"busybox dd if=/dev/mem bs=1 skip={IDENTIFIER} count=16 2>/dev/null | busybox hexdump -ve '1/1 \"%02x\"'"
    )
    return bytes.fromhex(words)


def eventually(shell, name, count):
    """Wait until so many interrupts have come; return how many there are."""
    deadline = time.monotonic() + COMMAND_SECONDS
    while interrupts(shell, name) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return interrupts(shell, name)


def test_debian_finds_it_and_hears_of_a_new_one(boot):
    """One interrupt for each new identifier, none besides, and none of the system control interrupt."""
    shell = boot("debian")
    identifier = shell.machine._pc.vmgenid
    assert shell.run("cat /sys/bus/acpi/devices/TRAP0001:00/path") == r"\_SB_.VGEN"
    assert "VMGENCTR" in shell.run("cat /sys/bus/acpi/devices/TRAP0001:00/modalias")
    assert in_the_guest(shell) == identifier.identifier != bytes(16)
    assert interrupts(shell, "ACPI:Ged") == 0
    control = interrupts(shell, "acpi")
    for count in (1, 2, 3):
        new = identifier.renew()
        assert eventually(shell, "ACPI:Ged", count) == count
        assert in_the_guest(shell) == new
    assert interrupts(shell, "acpi") == control
    assert "reserved" in shell.run("busybox grep 'e0000-' /proc/iomem").lower()


def test_the_tiny_kernel_reseeds_its_generator(boot):
    shell = boot("tiny", rng=True)
    shell.run("until dmesg | grep -q 'crng init done'; do sleep 1; done")
    said = "random: crng reseeded due to virtual machine fork"
    assert said not in shell.run("dmesg")
    shell.machine._pc.vmgenid.renew()
    assert shell.run(f"until dmesg | grep -q '{said}'; do usleep 100000; done; dmesg | grep -c '{said}'") == "1"
    shell.machine._pc.vmgenid.renew(shell.machine._pc.vmgenid.identifier)  # the same one again is no news
    assert eventually(shell, "ACPI:Ged", 2) == 2
    assert shell.run(f"dmesg | grep -c '{said}'") == "1"

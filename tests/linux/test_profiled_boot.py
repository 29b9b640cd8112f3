"""Debian's boot profiled: what it did is named, to the kernel's function, wherever KASLR has put it."""

import json
import subprocess
import sys

import pytest
from linux_shell import COMMAND_SECONDS, QUIET

from hypervisor import Stop
from hypervisor.profile.file import load

pytestmark = pytest.mark.hardware

LINKED_TEXT = 0xFFFF_FFFF_8100_0000
"""Where a kernel without KASLR has its code (arch/x86/include/asm/page_64_types.h)."""


def test_debians_boot_has_no_unknown_among_its_ten_most_frequent_exits(boot, tmp_path):
    path = tmp_path / "boot.hvprof"

    def record(machine):
        machine.record(str(path))
        machine.mark_by_text("(BEGIN)")

    # the kernel's messages are what a boot exits for; the unpacker in the guest is what moves the kernel
    shell = boot(prepare=record, append=QUIET.replace("quiet ", ""), decompress="guest")
    text = int(shell.run("grep ' _text$' /proc/kallsyms").split()[0], 16)
    machine = shell.machine
    machine.console.write("poweroff -f\n")
    assert machine.wait(timeout=COMMAND_SECONDS).reason is Stop.POWER_OFF
    assert machine.profile_trouble == ""
    profile = load(str(path))
    assert text != LINKED_TEXT, "KASLR did not move the kernel: nothing is shown"
    top = profile.exits.layer("user").merged().top(10)
    for row in top:
        assert None not in (row.device, row.register), row.name
        assert row.symbols, row.name
        assert not any(name.startswith(("0x", "[")) for name in row.symbols), (row.name, row.symbols)
    console = profile.exits.pio("uart0", "THR")
    assert "io_serial_out" in console.symbols  # drivers/tty/serial/8250
    assert profile.exits.count == machine.exits.count + profile.exits.layer("kernel").count
    single = sum(len(chunk.row) for chunk in profile.trace())
    assert single == profile.exits.layer("user").count
    assert profile.exits.between("BEGIN").count < profile.exits.count
    report = subprocess.run(
        [sys.executable, "-m", "hypervisor", "profile", "report", path, "--format", "json"],
        check=True,
        capture_output=True,
    )
    assert json.loads(report.stdout)["exits"][0]["count"] == profile.exits.merged().top(1)[0].count


def test_kvm_counts_the_same_exits(boot, tmp_path):
    """Each exit to user space is one that KVM told of, too; it has those that it handled itself besides."""
    path = tmp_path / "boot.hvprof"
    shell = boot("tiny", prepare=lambda machine: machine.record(str(path)), ram_mib=64)
    machine = shell.machine
    machine.kill()
    profile = load(str(path))
    ours = profile.exits.reason("io").count
    theirs = profile.kvm["vcpu0"]
    assert 0 < ours <= theirs["io_exits"] <= theirs["exits"]
    kernel = profile.exits.layer("kernel")
    if kernel.rows:  # where tracepoints can be had
        assert kernel.reason("io", layer="kernel").count == theirs["io_exits"]
    else:
        assert any("KVM handled" in note for note in profile.notes)

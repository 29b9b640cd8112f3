"""The pytest plugin with Linux guests: each test here runs a pytest of its own."""

import re
from pathlib import Path

import pytest

from hypervisor.cli.test import _plugin

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.hardware

ROOT = Path(__file__).resolve().parents[2]
INI = "[pytest]\nguest_boot_timeout = 300\nguest_hang_seconds = 120\n"
"""An emulated host is some twenty times slower than those that the defaults are for."""


@pytest.fixture
def run(pytester, monkeypatch):
    """Return a function that runs pytest on a test file's text and returns what it said."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini(INI)

    def start(text, *arguments):
        pytester.makepyfile(test_it=text)
        return pytester.runpytest_subprocess("-p", _plugin(), "-p", "no:cacheprovider", *arguments, timeout=1500)

    return start


def readme_example():
    """The example of the README's section on pytest."""
    section = (ROOT / "README.md").read_text().partition("\n## Test with pytest\n")[2].partition("\n## ")[0]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_the_readmes_example(run, pytester):
    (pytester.path / "src").mkdir()
    (pytester.path / "src" / "numbers").write_text("1 2 3\n")
    example = readme_example()
    result = run(example, "-v", "--durations=0")
    print(result.stdout.str())
    result.assert_outcomes(passed=example.count("\ndef test_"))


def test_what_a_dying_kernel_leaves(run, pytester):
    result = run(
        """
import time
import pytest

pytestmark = pytest.mark.guest(kernel="debian", ram_mib=128, cpus=2)

def test_panics_while_a_command_is_waited_for(machine):
    machine.run("echo the last words > /dev/kmsg; echo c > /proc/sysrq-trigger", timeout=None)

def test_panics_while_python_sleeps(machine):
    machine.popen("sleep 1; echo c > /proc/sysrq-trigger")
    time.sleep(600)
"""
    )
    print(result.stdout.str())
    result.assert_outcomes(failed=2)
    said = result.stdout.str()
    assert said.count("GuestFailed: kernel panic: sysrq triggered crash") >= 2
    assert re.search(r"guest stack -+\n(.*\n)*?.*sysrq_handle_crash\+0x", said)
    (folder,) = (pytester.path / ".guest-artifacts").glob("*--test_panics_while_a_command_is_waited_for")
    log = (folder / "dmesg.txt").read_text()
    assert "Linux version" in log
    assert "Kernel panic - not syncing: sysrq triggered crash" in log
    assert "the last words" in log


def test_hangs_oopses_and_power_cuts_one_after_the_other(run):
    """One boot for all but what comes after the power cut."""
    result = run(
        """
import time
import pytest
from hypervisor.testing import CommandError, CommandTimeout
from hypervisor.testing.plugin import SESSION

pytestmark = pytest.mark.guest(kernel="tiny", ram_mib=96)

@pytest.mark.guest(hang_seconds=12)
def test_hangs(machine):
    machine.run("kill -STOP $PPID", timeout=None)  # its parent is the agent

def test_oopses(machine):
    machine.run("echo 'BUG: of a driver' > /dev/console")
    time.sleep(600)

def test_goes_on(machine):
    with pytest.raises(CommandTimeout):
        machine.run("sleep 600", timeout=1)
    with pytest.raises(CommandError, match="status 7"):
        machine.run("exit 7", check=True)
    with machine.popen("cat") as process:
        assert process.communicate("through a pipe")[0] == "through a pipe"
    assert abs(int(machine.run("date +%s").stdout) - time.time()) < 60

def test_counts(machine, request):
    pool = request.config.stash[SESSION].pool
    assert (pool.boots, pool.restores, pool.resets) == (1, 0, 3)

def test_loses_what_was_not_flushed(machine, guest_disk):
    guest_disk.hold_writes()
    write = f"dd of={guest_disk.device} bs=512 count=1 conv=sync"
    machine.run(f"printf kept | {write} oflag=direct; sync {guest_disk.device}", check=True)
    machine.run(f"printf lost | {write} seek=8 oflag=direct", check=True)
    read = f"for at in 0 8; do dd if={guest_disk.device} bs=512 skip=$at count=1 iflag=direct | head -c 4; done"
    assert machine.run(read).stdout == "keptlost"
    machine.power_cut()
    assert machine.run(read).stdout == "kept" + 4 * chr(0)
""",
        "-v",
        "--durations=0",
    )
    print(result.stdout.str())
    result.assert_outcomes(passed=3, failed=2)
    said = result.stdout.str()
    assert "GuestFailed: the guest hangs: no sign of progress for " in said
    assert "GuestFailed: the guest's kernel reports: BUG: of a driver" in said


def test_networks_go_back_with_their_guests_and_the_one_that_dies_is_told_by_name(run, pytester):
    result = run(
        """
import pytest
from hypervisor.testing.plugin import SESSION

pytestmark = pytest.mark.guest(kernel="tiny", ram_mib=96)

@pytest.mark.parametrize("number", range(2))
def test_pings(guest_network, number, request):
    a, b = guest_network.machine("a"), guest_network.machine("b")
    assert a.run(f"ping -c 1 -W 60 {b.address}").returncode == 0
    guest_network.drop(1.0, src="a")
    assert a.run(f"ping -c 1 -W 1 {b.address}").returncode != 0
    pool = request.config.stash[SESSION].pool
    assert (pool.boots, pool.resets) == (2, 2 * number)

def test_one_panics(guest_network):
    a, b = guest_network.machine("a"), guest_network.machine("b")
    b.popen("sleep 1; echo c > /proc/sysrq-trigger")
    a.run("sleep 600", timeout=None)
""",
        "-v",
    )
    print(result.stdout.str())
    result.assert_outcomes(passed=2, failed=1)
    said = result.stdout.str()
    assert "GuestFailed: kernel panic: sysrq triggered crash" in said
    assert re.search(r"-+ a files -+\nthe guest was alive and well", said)
    assert re.search(r"-+ b failure -+\nkernel panic: sysrq triggered crash", said)
    (folder,) = (pytester.path / ".guest-artifacts").glob("*--test_one_panics")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]

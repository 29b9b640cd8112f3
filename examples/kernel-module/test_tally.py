"""A kernel module of one's own: what its ioctls promise, and that a crash in it is found and explained.

`make` builds it for the guest kernel, whatever kernel this host runs. It is loaded once, after the boot: every test
starts from that moment, with a sum of nothing.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GUEST = HERE / "guest"
TALLY = "/host/use_tally"

pytestmark = [
    pytest.mark.usefixtures("built"),
    pytest.mark.guest(kernel="debian", cpus=2, share=GUEST, setup="insmod /host/tally.ko"),
]


@pytest.fixture(scope="session")
def built():
    """The module and its program, in `guest`."""
    if shutil.which("make") and shutil.which("gcc"):
        folder = os.open(HERE, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)  # several workers of pytest-xdist build it once
        subprocess.run(["make", "-s", "-C", HERE, f"HV={sys.executable} -m hypervisor"], check=True)
        os.close(folder)
    elif not (GUEST / "tally.ko").exists():
        pytest.fail(f"there is no compiler here: run `make -C {HERE}` elsewhere first")


def use(machine, *words):
    """Run `use_tally` in the guest; return its status and what it printed."""
    done = machine.run([TALLY, *words])
    return done.returncode, done.stdout.strip()


def test_the_sum_starts_at_nothing(machine):
    assert use(machine, "read") == (0, "0")


def test_what_is_added_is_there(machine):
    assert use(machine, "add", "40") == (0, "40")
    assert use(machine, "add", "-50") == (0, "-10")
    assert use(machine, "read") == (0, "-10")


def test_each_test_finds_the_module_as_it_was(machine):
    """The tests above have added to the sum."""
    assert use(machine, "read") == (0, "0")


def test_nothing_is_lost_between_two_cpus(machine):
    processes = [machine.popen([TALLY, "add", "1", "20000"]) for _ in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    assert use(machine, "read") == (0, "40000")


def test_a_sum_that_does_not_fit_is_refused_and_changes_nothing(machine):
    most = str(2**63 - 1)
    assert use(machine, "add", most) == (0, most)
    assert use(machine, "add", "1") == (1, "EOVERFLOW")
    assert use(machine, "read") == (0, most)


@pytest.mark.parametrize(("what", "error"), [("unknown", "ENOTTY"), ("bad-pointer", "EFAULT")])
def test_what_cannot_be_done_is_refused(machine, what, error):
    assert use(machine, what) == (1, error)
    assert use(machine, "read") == (0, "0")


def test_the_module_can_be_unloaded_and_loaded_again(machine):
    use(machine, "add", "7")
    machine.run("rmmod tally", check=True)
    assert use(machine, "read") == (1, "ENOENT")
    machine.run("insmod /host/tally.ko", check=True)
    assert use(machine, "read") == (0, "0")


# --- the fault in it. Without `dies` each of these would fail, with the same story in its report ----------------------


def test_an_oops_is_found(machine):
    """The kernel kills the process and goes on: only its log tells."""
    with machine.dies("oops") as death:
        use(machine, "crash")
    assert "NULL pointer dereference, address: 0000000000000000" in str(death)
    log = machine.dmesg()
    assert re.search(r"RIP: \S*tally_crash\+0x\S+ \[tally\]", log)
    assert re.search(r"Call Trace:(.*\n)+?.* tally_ioctl\+0x\S+ \[tally\]", log)


def test_a_panic_is_explained(machine):
    """A kernel that ends at its first oops: the stack is read from the dead guest's memory."""
    machine.put("1", "/proc/sys/kernel/panic_on_oops")
    with machine.dies():
        use(machine, "crash")
    assert machine.wait().message == "kernel panic: Fatal exception"
    calls = machine.stack()
    assert re.search(r"panic\+0x(.*\n)+.*tally_crash \[tally\]\+0x(.*\n)+.*tally_ioctl \[tally\]\+0x", calls)

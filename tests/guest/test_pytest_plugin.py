"""The pytest plugin, with small guests: each test here runs a pytest of its own."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from hypervisor.cli.test import _plugin
from hypervisor.host import Kind, quick_kind

SECONDS = 300
"""Of a whole run: on a busy machine Python alone takes some to start."""
ROOT = Path(__file__).resolve().parents[2]
pytest_plugins = ["pytester"]

CAUSE = "triple fault; where is not known" if quick_kind() is Kind.AMD_V else r"triple fault at 0x\w+ \(_start\+.*ud2"
"""Of the guest triple-fault; KVM on AMD resets the vCPU at once."""
ECHO = r'@pytest.mark.guest(kernel="echo", ram_mib=2, ready="q ends\\n")'


@pytest.fixture
def run(pytester, monkeypatch):
    """Return a function that runs pytest on a test file's text and returns what it said."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # only those that a test names
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(text, *arguments, **files):
        pytester.makepyfile(test_it=f"import time\nimport pytest\n{text}", **files)
        return pytester.runpytest_subprocess("-p", _plugin(), "-p", "no:cacheprovider", *arguments, timeout=SECONDS)

    return start


def kept(pytester, test):
    """The text of the files that were kept of a test."""
    folder = pytester.path / ".guest-artifacts" / f"test_it.py--{test}"
    return {file.name: file.read_text() for file in folder.iterdir()}


# --- what a test gets -------------------------------------------------------------------------------------------------


def test_a_guest_is_there_and_its_machine_at_hand(run):
    result = run(
        """
@pytest.mark.guest(kernel="hello-pio", ram_mib=2, cpus=2)
def test_hello(machine):
    machine.console.expect("hello", timeout=120)
    assert machine.wait(120).status == 1
    assert machine.exits.pio("uart0", "THR").count == len("hello\\n")
    assert len(machine.vcpus) == 2
    assert machine.config.ram_mib == 2
"""
    )
    result.assert_outcomes(passed=1)


def test_marks_of_module_class_and_test_are_one_description_the_closest_first(run):
    result = run(
        """
pytestmark = pytest.mark.guest(kernel="halt", ram_mib=2, debug_exit="raw")

@pytest.mark.guest(ram_mib=3)
class TestClass:
    @pytest.mark.guest(cpus=2)
    def test_both(self, machine):
        assert (machine.spec.kernel, machine.config.ram_mib, machine.config.cpus) == ("halt", 3, 2)
        assert machine.config.debug_exit == "raw"

def test_module(machine):
    assert (machine.config.ram_mib, machine.config.cpus) == (2, 1)

@pytest.mark.guest("exit")
def test_the_kernel_may_come_first(machine):
    assert machine.spec.kernel == "exit"
"""
    )
    result.assert_outcomes(passed=3)


def test_kernels_are_parameters(run):
    result = run(
        """
@pytest.mark.guest(ram_mib=2)
@pytest.mark.parametrize("guest_kernel", ["exit", "halt", "echo"])
def test_each(machine, guest_kernel):
    assert machine.spec.kernel == guest_kernel
    print("kernel:", machine.spec.kernel)
""",
        "-s",
    )
    result.assert_outcomes(passed=3)
    assert re.findall(r"kernel: (\S+)", result.stdout.str()) == ["exit", "halt", "echo"]


def test_the_kernel_comes_from_the_mark_the_option_or_the_ini_file_in_this_order(run, pytester):
    text = """
@pytest.mark.guest(ram_mib=2)
def test_default(guest_kernel):
    print("default:", guest_kernel)

@pytest.mark.guest(kernel="echo", ram_mib=2)
def test_mark(guest_kernel):
    print("mark:", guest_kernel)
"""
    assert re.findall(r"(?:default|mark): \S+", run(text, "-s").stdout.str()) == ["default: debian", "mark: echo"]
    pytester.makeini("[pytest]\nguest_kernel = halt\n")
    assert "default: halt" in run(text, "-s").stdout.str()
    assert "default: exit" in run(text, "-s", "--guest-kernel", "exit").stdout.str()


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ('kernel="halt", rams=3', "no key 'rams'"),
        ('kernel="halt", ram_mib=0', "ram_mib is 0"),
        ('kernel="halt", cpus="two"', "cpus is 'two'"),
        ('kernel="halt", fail_on="("', "no regular expression"),
        ('kernel="halt", share="/nowhere/at/all"', "it is a folder of this host"),
        ('kernel="/nowhere/kernel", agent=False', "cannot read kernel /nowhere/kernel"),
    ],
)
def test_a_mark_that_makes_no_sense_is_the_tests_error(run, mark, complaint):
    result = run(f"@pytest.mark.guest({mark})\ndef test_it(machine):\n    pass\n")
    result.assert_outcomes(errors=1)
    assert complaint in result.stdout.str()


# --- guests that fail -------------------------------------------------------------------------------------------------


def test_a_triple_fault_fails_the_test_at_once_with_its_cause(run, pytester):
    """A test that waited for its own sleep would outlast SECONDS."""
    result = run(
        """
@pytest.mark.guest(kernel="triple-fault", ram_mib=2)
def test_dies(machine):
    time.sleep(1000)
"""
    )
    result.assert_outcomes(failed=1)
    said = result.stdout.str()
    assert re.search(f"E +hypervisor.testing.failures.GuestFailed: {CAUSE}", said)
    place = "0xfff0" if quick_kind() is Kind.AMD_V else r"0x\w+: _start\+"
    assert re.search(rf"-+ guest stack -+\nvCPU 0 at {place}", said)
    assert "-- guest machine --" in said
    assert "1  shutdown" in said
    files = kept(pytester, "test_dies")
    assert "triple fault" in files["postmortem.txt"]
    assert "shutdown" in files["exits.txt"]
    assert (pytester.path / ".guest-artifacts" / ".gitignore").read_text().endswith("\n*\n")


def test_a_guest_without_progress_fails_the_test(run):
    result = run(
        """
@pytest.mark.guest(kernel="spin", ram_mib=2, hang_seconds=1.5)
def test_spins(machine):
    time.sleep(1000)

@pytest.mark.guest(kernel="halt", ram_mib=2, hang_seconds=1.5)
def test_halts_without_interrupts(machine):
    machine.console.expect("never", timeout=1000)

@pytest.mark.guest(kernel="echo", ram_mib=2, hang_seconds=1.5, ready="q ends")
def test_idle_is_not_hung(machine):
    time.sleep(4)

@pytest.mark.guest(kernel="spin", ram_mib=2, hang_seconds=1.5)
def test_paused_is_not_hung(machine):
    machine.pause()
    time.sleep(4)

@pytest.mark.guest(kernel="spin", ram_mib=2, hang_seconds=0)
def test_nobody_looks(machine):
    time.sleep(4)
"""
    )
    result.assert_outcomes(failed=2, passed=3)
    said = result.stdout.str()
    assert said.count("no sign of progress for ") >= 2
    assert "GuestFailed: the guest hangs" in said


def test_a_line_of_the_console_fails_the_test_wherever_it_is(run, pytester):
    result = run(
        f"""
{ECHO}
def test_python(machine):
    machine.console.write("[   12.345678] BUG: unable to handle page fault\\nand more\\n")
    time.sleep(1000)

{ECHO}
def test_caught(machine):
    machine.console.write("BUG: again\\n")
    try:
        time.sleep(1000)
    except Exception:
        pass

{ECHO}
def test_at_its_end(machine):
    machine.console.write("Oops: at last\\n")
    machine.console.expect("at last", timeout=120)

{ECHO[:-1]}, fail_on="strange")
def test_own_patterns(machine):
    machine.console.write("BUG: is allowed\\n")
    machine.console.expect("allowed", timeout=120)
    time.sleep(2)

{ECHO[:-1]}, fail_on=["strange"])
def test_own_pattern_seen(machine):
    machine.console.write("how strange\\n")
    time.sleep(1000)
"""
    )
    result.assert_outcomes(failed=4, passed=1)
    said = result.stdout.str()
    assert "GuestFailed: the guest's kernel reports: BUG: unable to handle page fault" in said
    assert re.search(r"-+ guest console -+\n\[   12.345678\] BUG: unable to handle page fault\nand more", said)
    assert "and more" in kept(pytester, "test_python")["console.log"]
    assert "q ends" in kept(pytester, "test_python")["console.log"]  # from the boot on
    assert "reports: how strange" in said


def test_a_failure_that_is_expected_is_none(run):
    result = run(
        """
pytestmark = pytest.mark.guest(kernel="triple-fault", ram_mib=2)

def test_dies(machine):
    with machine.dies("death", timeout=120) as death:
        time.sleep(1000)
    assert "triple fault" in str(death)

def test_dies_by_waiting(machine):
    with machine.dies(timeout=120):
        pass

def test_of_something_else(machine):
    with machine.dies("panic"):
        time.sleep(1000)

@pytest.mark.guest(kernel="echo")
def test_lives(machine):
    with machine.dies(timeout=0.5):
        pass
"""
    )
    result.assert_outcomes(passed=2, failed=2)
    said = result.stdout.str()
    assert "the guest's end is no panic but: triple fault" in said
    assert "the guest did not die in 0.5 s" in said


def test_a_boot_that_fails_is_told_with_the_guests_console(run):
    result = run(
        """
@pytest.mark.guest(kernel="hello-pio", ram_mib=2, ready="never")
def test_over(machine):
    pass

@pytest.mark.guest(kernel="echo", ram_mib=2, ready="never", boot_timeout=1)
def test_late(machine):
    pass
"""
    )
    result.assert_outcomes(errors=2)
    said = result.stdout.str()
    assert "the guest hello-pio ram_mib=2 did not boot: it is over: the guest ended the run with status 1" in said
    assert "the guest echo ram_mib=2 did not boot: waited for 'never' on the console" in said
    assert re.search(r"-+ guest console -+\nhello", said)


def test_what_fails_by_itself_shows_the_guests_console(run, pytester):
    result = run(
        f"""
{ECHO}
def test_assertion(machine):
    machine.console.write("some words")
    machine.console.expect("words", timeout=120)
    assert machine.config.ram_mib == 3
"""
    )
    result.assert_outcomes(failed=1)
    said = result.stdout.str()
    assert re.search(r"-+ guest files -+\nthe guest was alive and well", said)
    assert re.search(r"-+ guest console -+\nsome words", said)
    assert "guest stack" not in said
    assert "uart0" in kept(pytester, "test_assertion")["exits.txt"]


def test_junit_has_the_report_and_where_the_files_are(run, pytester):
    run(
        """
@pytest.mark.guest(kernel="triple-fault", ram_mib=2)
def test_dies(machine):
    time.sleep(1000)
""",
        "--junitxml=report.xml",
        "--guest-artifacts=kept",
    )
    case = ET.parse(pytester.path / "report.xml").getroot().find(".//testcase")  # noqa: S314 - pytest wrote it
    properties = {one.get("name"): one.get("value") for one in case.iter("property")}
    assert re.match(CAUSE, properties["guest_cause"])
    assert properties["guest_files"] == str(pytester.path / "kept" / "test_it.py--test_dies")
    failure = case.find("failure")
    assert failure.get("message").startswith("hypervisor.testing.failures.GuestFailed: triple fault")
    for title in ("guest failure", "guest stack", "guest machine", "guest exits"):
        assert f" {title} " in failure.text


# --- a guest for each test --------------------------------------------------------------------------------------------

COUNTS = """
from hypervisor.testing.plugin import SESSION

def pytest_unconfigure(config):
    session = config.stash.get(SESSION, None)
    if session is not None:
        pool = session.pool
        with open("counts", "a") as file:
            file.write(f"{pool.boots} {pool.restores} {pool.resets}\\n")
"""


def counts(pytester):
    """Boots, restores and resets of each process."""
    return [tuple(map(int, line.split())) for line in (pytester.path / "counts").read_text().splitlines()]


def test_a_guest_is_booted_once_and_put_back_for_each_test(run, pytester):
    result = run(
        f"""
pytestmark = pytest.mark.guest(ram_mib=2)
seen = []

{ECHO}
@pytest.mark.parametrize("number", range(4))
def test_echo(machine, number):
    seen.append(machine.machine)
    assert machine.console.read() == b""  # what others typed is forgotten
    assert machine.memory.read(0x180000, 4) == bytes(4)
    machine.memory.write(0x180000, b"mark")
    machine.console.write(f"word {{number}}")
    machine.console.expect(f"word {{number}}", timeout=120)
    assert machine.exits.pio("uart0", "THR").count == 6

{ECHO}
def test_ends(machine):
    machine.console.write("q")
    assert machine.wait(120).status == 1

{ECHO}
def test_after_its_end(machine):
    machine.console.write("alive")
    machine.console.expect("alive", timeout=120)
    assert len({{id(one) for one in seen}}) == 1 and machine.machine is seen[0]

{ECHO[:-1]}, cpus=2)
def test_another(machine):
    assert len(machine.vcpus) == 2

{ECHO[:-1]}, fresh=True)
def test_fresh(machine):
    assert machine.machine is not seen[0]
    assert machine.exits.pio("uart0", "THR").count > 6
""",
        conftest=COUNTS,
    )
    result.assert_outcomes(passed=8)
    assert counts(pytester) == [(3, 0, 5)]


def test_a_guest_that_failed_is_put_back_too(run, pytester):
    result = run(
        f"""
{ECHO}
def test_fails(machine):
    machine.console.write("BUG: here\\n")
    time.sleep(1000)

{ECHO}
def test_next(machine):
    machine.console.write("well")
    machine.console.expect("well", timeout=120)

{ECHO}
def test_closed_by_the_test(machine):
    machine.machine.close()

{ECHO}
def test_next_but_one(machine):
    machine.console.write("well")
    machine.console.expect("well", timeout=120)
""",
        conftest=COUNTS,
    )
    result.assert_outcomes(passed=3, failed=1)
    assert counts(pytester) == [(2, 0, 2)]


def test_a_machine_that_waits_makes_room_for_one_that_needs_what_it_has(run, pytester):
    (pytester.path / "disk.img").write_bytes(bytes(1 << 20))
    result = run(
        f"""
{ECHO[:-1]}, disks="disk.img,inplace")
def test_has_the_image(machine):
    machine.console.write("one")
    machine.console.expect("one", timeout=120)

{ECHO[:-1]}, disks="disk.img,inplace", cpus=2)
def test_needs_it_too(machine):
    machine.console.write("two")
    machine.console.expect("two", timeout=120)
""",
        conftest=COUNTS,
    )
    result.assert_outcomes(passed=2)
    assert counts(pytester) == [(2, 0, 0)]


def test_workers_of_pytest_xdist_share_one_boot(run, pytester):
    pytest.importorskip("xdist")
    result = run(
        f"""
{ECHO}
@pytest.mark.parametrize("number", range(6))
def test_echo(machine, number):
    machine.console.write(f"word {{number}}")
    machine.console.expect(f"word {{number}}", timeout=120)
    time.sleep(0.5)

{ECHO}
def test_dies(machine):
    machine.console.write("BUG: in a worker\\n")
    time.sleep(1000)
""",
        "-p",
        "xdist",
        "-n",
        "2",
        "--junitxml=report.xml",
        conftest=COUNTS,
    )
    result.assert_outcomes(passed=6, failed=1)
    said = result.stdout.str()
    assert "GuestFailed: the guest's kernel reports: BUG: in a worker" in said
    assert "guest console" in said
    assert "guest_cause" in (pytester.path / "report.xml").read_text()
    boots, restores, resets = map(sum, zip(*counts(pytester), strict=True))
    assert (boots, restores, resets) == (1, 1, 5)


# --- with other plugins, and without guests ---------------------------------------------------------------------------


def test_pytest_timeout_ends_a_test_that_waits_and_the_guest_is_told_of(run):
    pytest.importorskip("pytest_timeout")
    result = run(
        f"""
@pytest.fixture
def spoken(machine):
    machine.console.write("the last words")
    machine.console.expect("words", timeout=120)

{ECHO}
@pytest.mark.timeout(3, func_only=True)
def test_waits(machine, spoken):
    machine.console.expect("never", timeout=1000)
""",
        "-p",
        "pytest_timeout",
    )
    result.assert_outcomes(failed=1)
    said = result.stdout.str()
    assert "Timeout" in said
    assert re.search(r"-+ guest console -+\nthe last words", said)


def test_a_suite_with_a_machine_of_its_own_keeps_it(run):
    result = run(
        """
@pytest.fixture
def machine():
    return "mine"

def test_mine(machine):
    assert machine == "mine"
"""
    )
    result.assert_outcomes(passed=1)


def test_a_run_without_guests_imports_nothing(run):
    result = run(
        "def test_nothing():\n    pass\n",
        conftest="""
import sys
def pytest_unconfigure():
    print("loaded:", *sorted(name for name in sys.modules if name.partition(".")[0] in ("hypervisor", "devices")))
""",
    )
    result.assert_outcomes(passed=1)
    assert "loaded: hypervisor hypervisor.testing hypervisor.testing.plugin" in result.stdout.lines

"""What the pytest plugin is made of, without guests: descriptions, the interruption of a test, names of folders."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hypervisor import ConfigError, HostError, host_remedies
from hypervisor.cli import main
from hypervisor.cli import test as cli_test
from hypervisor.host import Kind
from hypervisor.testing.interrupt import Interrupter
from hypervisor.testing.report import folder_of
from hypervisor.testing.spec import FAIL_ON, merge
from hypervisor.testing.stack import _calls, _follows_call
from hypervisor.testing.watch import _stripped

DEFAULTS = {"boot_timeout": "60", "hang_seconds": "30", "fail_on": FAIL_ON}


# --- descriptions -----------------------------------------------------------------------------------------------------


def spec(*marks, kernel="halt"):
    return merge(marks, kernel, DEFAULTS)


def test_the_mark_closest_to_the_test_wins_value_by_value():
    found = spec({"ram_mib": 3}, {"ram_mib": 4, "cpus": 2, "hang_seconds": 5})
    assert dict(found.settings) == {"ram_mib": 3, "cpus": 2}
    assert (found.hang_seconds, found.boot_timeout, found.fail_on) == (5.0, 60.0, FAIL_ON)


def test_equal_descriptions_share_a_machine_and_others_do_not(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    base = {"ram_mib": 3, "disks": [str(image)]}
    key = spec(base).key()
    assert spec(dict(reversed(base.items()))).key() == key
    assert spec(base | {"hang_seconds": 1, "fail_on": "x", "boot_timeout": 1}).key() == key  # of no machine's making
    for other in ({"ram_mib": 4}, {"cpus": 2}, {"setup": "true"}, {"append": "quiet"}, {"ready": "x"}):
        assert spec(base | other).key() != key
    assert spec(base, kernel="exit").key() != key
    image.write_bytes(bytes(8192))
    assert spec(base).key() != key


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("a.img", "a.img,overlay=memory"),
        ("a.img,serial=x", "a.img,serial=x,overlay=memory"),
        ("a.img,readonly", "a.img,readonly"),
        ("a.img,overlay=b.qcow2", "a.img,overlay=b.qcow2"),
        ("a.img,inplace", "a.img"),
        ("readonly,,inplace.img", "readonly,,inplace.img,overlay=memory"),
    ],
)
def test_a_guest_writes_to_memory_unless_the_disk_says_otherwise(given, taken):
    assert dict(spec({"disks": given}).settings)["disks"] == (taken,)


def test_a_linux_with_a_name_prints_its_warnings(monkeypatch):
    monkeypatch.setattr("hypervisor.kernels.find", lambda _: SimpleNamespace(command_line="console=ttyS0"))
    words = spec(kernel="tiny").config().append.split()
    assert words.index("loglevel=5") > words.index("quiet")
    assert "console=ttyS0" in words
    assert spec({"append": "mine"}, kernel="tiny").config().append == "mine"


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ({}, "/ # "),  # the prompt of the initramfs that hv makes
        ({"ready": "login:"}, "login:"),
        ({"append": "quiet"}, None),  # its console may be anywhere
        ({"initrd": "/some/initramfs"}, None),
        ({"agent": False}, None),
    ],
)
def test_when_a_linux_is_ready(mark, text):
    assert spec(mark, kernel="tiny").ready_text == text
    assert spec(mark, kernel="tiny").has_moment is (mark.get("agent") is not False)


def test_what_a_kernel_is_shows_in_its_file(tmp_path):
    bzimage = tmp_path / "bzImage"
    bzimage.write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    vmlinux = tmp_path / "vmlinux"
    vmlinux.write_bytes(b"\x7fELF" + bytes(1 << 22) + b"Linux version 6.1")
    other = tmp_path / "other"
    other.write_bytes(b"\x7fELF" + bytes(100))
    assert [spec(kernel=str(path)).is_linux for path in (bzimage, vmlinux, other)] == [True, True, False]
    assert not spec({"agent": False}, kernel=str(bzimage)).is_linux


def test_a_shared_folder_is_there_and_goes_to_an_absolute_path(tmp_path):
    assert spec({"share": tmp_path}).share == ((str(tmp_path), "/host"),)
    assert spec({"share": {str(tmp_path): "/src"}}).share == ((str(tmp_path), "/src"),)
    with pytest.raises(ConfigError, match="goes to 'src'"):
        spec({"share": {str(tmp_path): "src"}})


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupter():
    made = Interrupter()
    yield made
    made.close()


def soon(function):
    thread = threading.Timer(0.2, function)
    thread.start()
    return thread


def loop():
    while True:
        pass


def wait_on_a_condition():
    condition = threading.Condition()
    with condition:
        condition.wait(60)


def interrupt_soon(interrupter):
    """Interrupt the main thread, once its window is open."""

    def interrupt():
        end = time.monotonic() + 60
        while not interrupter.interrupt(KeyError("here")) and time.monotonic() < end:
            time.sleep(0.01)

    soon(interrupt)


@pytest.mark.parametrize("wait", [lambda: time.sleep(60), lambda: threading.Event().wait(60), wait_on_a_condition])
def test_an_interruption_ends_what_the_main_thread_waits_for(interrupter, wait):
    interrupt_soon(interrupter)
    with pytest.raises(KeyError, match="here"), interrupter.window():
        wait()


def test_an_interruption_ends_a_loop(interrupter):
    interrupt_soon(interrupter)
    with pytest.raises(KeyError, match="here"), interrupter.window():
        loop()


def test_nothing_is_interrupted_outside_of_the_window(interrupter):
    with interrupter.window():
        pass
    assert interrupter.interrupt(KeyError()) is False
    thread = soon(lambda: interrupter.interrupt(KeyError()))
    thread.join()
    time.sleep(0.1)


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_tests_folder_is_named_by_it_and_cleared_once(tmp_path):
    folder = folder_of(str(tmp_path), "tests/a_test.py::TestX::test_y[a/b c-\x00]", "guest")
    assert folder == str(tmp_path / "tests-a_test.py--TestX--test_y-a-b-c")
    (tmp_path / "tests-a_test.py--TestX--test_y-a-b-c" / "old").touch()
    second = folder_of(str(tmp_path), "tests/a_test.py::TestX::test_y[a/b c-\x00]", "b")
    assert second == folder + "/b"
    assert (tmp_path / "tests-a_test.py--TestX--test_y-a-b-c" / "old").exists()
    folder_of(str(tmp_path), "tests/a_test.py::TestX::test_y[a/b c-\x00]", "guest", anew=True)
    assert not (tmp_path / "tests-a_test.py--TestX--test_y-a-b-c" / "old").exists()


@pytest.mark.parametrize("test", ["../../etc", "/etc/x", "x" * 5000, "::", ".."])
def test_no_test_has_a_folder_elsewhere(tmp_path, test):
    root = tmp_path / "root"
    assert folder_of(str(root), test, "..").startswith(f"{root}/")
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"[    1.234567] BUG: x\r", "BUG: x"),
        (b"<4>[  12.000000][  T123] WARNING: y", "WARNING: y"),
        (b"BUG: \xff", "BUG: \\xff"),
    ],
)
def test_a_kernels_line_is_told_without_its_time(line, text):
    assert _stripped(line) == text


@pytest.mark.parametrize(
    ("code", "is_call"),
    [
        ("00 00 e8 11 22 33 44", True),  # call rel32
        ("00 00 00 00 00 ff d0", True),  # call rax
        ("00 00 00 00 41 ff d3", True),  # call r11
        ("00 00 00 00 ff 50 10", True),  # call [rax + 0x10]
        ("00 ff 15 11 22 33 44", True),  # call [rip + ...]
        ("ff 14 25 11 22 33 44", True),  # call [disp32]
        ("00 00 00 00 00 ff e0", False),  # jmp rax
        ("90 90 90 90 90 90 90", False),
    ],
)
def test_a_return_address_follows_a_call(code, is_call):
    data = bytes.fromhex(code)
    assert _follows_call(lambda address, size: data if (address, size) == (0x1000 - 7, 7) else None, 0x1000) is is_call


TEXT, STACK_TOP = 0xFFFF_FFFF_8100_0000, 0xFFFF_C900_0000_3000
FUNCTIONS = {TEXT: "panic+0x10/0x20", TEXT + 1: "asm_exc_page_fault+0x22/0x30", TEXT + 2: "faulty+0x5/0x9"}


def calls_on(words):
    """Walk a stack with these words at its top, in a kernel all of whose code follows calls."""
    held = {STACK_TOP + 8 * index: word for index, word in enumerate(words)}

    def read(address, size):
        code = b"\0\0\xe8\1\2\3\4"  # call rel32
        return code if size == 7 else held.get(address, 0).to_bytes(8, "little")

    names = SimpleNamespace(
        kernel=SimpleNamespace(find=FUNCTIONS.get), modules=SimpleNamespace(find=lambda address: None)
    )
    return [name for _, name in _calls(read, STACK_TOP, names)]


@pytest.mark.parametrize(
    ("ip", "told"), [(TEXT + 2, ["faulty+0x5/0x9, where the exception came"]), (0x40_1000, []), (TEXT + 9, [])]
)
def test_where_an_exception_came_is_in_its_frame(ip, told):
    """What x86-64's struct pt_regs holds: r15 to r12, bp, bx, r11 to r8, ax, cx, dx, si, di, orig_ax, and then ip."""
    frame = [0] * 16 + [ip]
    names = calls_on([TEXT, 0x1234, TEXT + 1, *frame])
    assert names[:2] == ["panic+0x10/0x20", "asm_exc_page_fault+0x22/0x30"]
    assert names[2 : 2 + len(told)] == told
    assert len([name for name in names if "where the exception came" in name]) == len(told)


# --- hv test ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def become(monkeypatch):
    """Have `hv test` say what it would become."""
    became = []

    def execv(program, arguments):
        became.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(cli_test.os, "execv", execv)
    monkeypatch.setattr(cli_test, "_get_kernel", lambda kernel: None)
    return became


def test_hv_test_is_pytest_with_a_kernel(become, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["test", "tiny", "--force", "--artifacts", "kept", "--boot-timeout", "5", "--", "-x", "--", "-k", "a"])
    (command,) = become
    assert command[1:3] == ["-m", "pytest"]
    assert command[command.index("--guest-kernel") + 1] == "tiny"
    assert command[command.index("--guest-artifacts") + 1] == str(tmp_path / "kept")
    assert command[command.index("--guest-boot-timeout") + 1] == "5.0"
    assert command[-4:] == ["-x", "--", "-k", "a"]


def test_hv_test_takes_a_file_from_wherever_pytest_runs(become, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bzImage").touch()
    with pytest.raises(SystemExit):
        main(["test", "bzImage", "--force"])
    assert become[0][become[0].index("--guest-kernel") + 1] == str(tmp_path / "bzImage")


def test_hv_test_refuses_linux_on_a_software_kvm_and_says_where_it_runs(become, monkeypatch, capsys):
    monkeypatch.setattr(cli_test, "quick_kind", lambda: Kind.SOFTWARE)
    assert main(["test", "tiny"]) == HostError.status
    said = capsys.readouterr().err
    assert "no Linux kernel gets through" in said
    assert "--emulated" in said
    assert not become


def test_hv_test_says_how_kvm_becomes_usable(become, monkeypatch, capsys):
    remedy = SimpleNamespace(problem="/dev/kvm belongs to group kvm", action="sudo usermod -aG kvm $USER")
    report = SimpleNamespace(can_run_guest=False, problem="/dev/kvm is not permitted", sentence="", remedies=[remedy])
    monkeypatch.setattr(cli_test, "quick_kind", lambda: Kind.NONE)
    monkeypatch.setattr("hypervisor.host_report.inspect", lambda: report)
    assert main(["test", "tiny"]) == HostError.status
    said = capsys.readouterr().err
    assert "no guest can run on this host: /dev/kvm is not permitted" in said
    assert "sudo usermod -aG kvm $USER" in said
    assert not become


def test_hv_test_refuses_a_kernel_that_is_none_first(become, monkeypatch, capsys):
    monkeypatch.setattr(cli_test, "quick_kind", lambda: Kind.NONE)
    assert main(["test", "nosuch"]) == ConfigError.status
    assert "nosuch" in capsys.readouterr().err


def test_hv_test_in_the_emulated_host_brings_the_folder_and_the_kernels(become, monkeypatch, tmp_path):
    (tmp_path / "cache" / "trapvisor" / "kernels").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    project = tmp_path / "my project"
    project.mkdir()
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit):
        main(["test", "tiny", "--emulated", "--artifacts", "kept", "--", "-k", "a b"])
    (command,) = become
    assert command[0].endswith("/scripts/emulated-host")
    assert command[command.index("--out") + 1] == "kept"
    brought = [command[at + 1] for at, word in enumerate(command) if word == "--with"]
    assert brought == [str(tmp_path / "cache" / "trapvisor" / "kernels"), str(project)]
    assert command[-3:-1] == ["sh", "-c"]
    assert command[-1].startswith(f"cd '{project}' && ")
    assert command[-1].endswith("test --artifacts /out tiny -- -p no:cacheprovider -k 'a b'")


def test_the_workflow_for_github_opens_kvm_as_the_advice_for_runners_does():
    page = (Path(__file__).resolve().parents[2] / "docs" / "ci-github.md").read_text()
    rule = 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"'
    assert rule in page
    assert rule in (Path(host_remedies.__file__)).read_text()
    assert "/etc/udev/rules.d/99-kvm4all.rules" in page

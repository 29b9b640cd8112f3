"""`hv run` with small guests: statuses, signals, the terminal, consoles that block, fill up or go away."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import images
import pytest
from guest_code import EXIT_WITH
from waiting import until

from hypervisor.errors import VmmError
from hypervisor.host import Kind, quick_kind
from hypervisor.profile.live_client import ask

pytestmark = pytest.mark.kvm

SPIN = bytes.fromhex("fa ebfd")
# l: mov dx,0x3f8; mov al,'x'; out dx,al; jmp l
FLOOD = bytes.fromhex("baf803 b078 ee ebfd".replace(" ", ""))
# cld; mov dx,0x3f8; l: mov cx,0x1000; xor si,si; rep outsb; jmp l: on hardware one exit for a page of bytes
STRING_FLOOD = bytes.fromhex("fc baf803 b90010 31f6 f36e ebf7".replace(" ", ""))
# mov dx,0x3f8; mov al,'o'; out dx,al; mov al,'k'; out dx,al; l: jmp l
SAY_OK = bytes.fromhex("baf803 b06f ee b06b ee ebfe".replace(" ", ""))
# l: mov dx,0x3fd; in al,dx; test al,1; jz l; mov dx,0x3f8; in al,dx; out dx,al; cmp al,'q'; jne l; out 0xf4,0
ECHO = bytes.fromhex("bafd03 ec a801 74f8 baf803 ec ee 3c71 75ef b000 e6f4 f4".replace(" ", ""))
SECONDS = 120


@pytest.fixture
def image(tmp_path):
    def write(code):
        path = tmp_path / "guest.bin"
        path.write_bytes(code)
        return str(path)

    return write


def command(path, *arguments):
    return [
        sys.executable,
        "-m",
        "hypervisor",
        "run",
        path,
        "--flat",
        "16",
        "--ram",
        "2",
        "--debug-exit",
        "raw",
        *arguments,
    ]


def run(path, *arguments, **keywords):
    keywords = {"capture_output": True, "timeout": SECONDS, "stdin": subprocess.DEVNULL} | keywords
    return subprocess.run(command(path, *arguments), check=False, **keywords)


def start(path, *arguments, **keywords):
    keywords = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords
    return subprocess.Popen(command(path, *arguments), **keywords)


def until_ok(process):
    assert os.read(process.stdout.fileno(), 2)[:1] == b"o"


@pytest.mark.parametrize("code", [0, 1, 77, 255])
def test_the_guests_status_is_the_commands(image, code):
    result = run(image(EXIT_WITH[code]))
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")


def test_a_timeout_is_124(image):
    result = run(image(SPIN), "--timeout", "0.3")
    assert result.returncode == 124
    assert result.stderr.decode().strip() == "hv: timeout: the guest still ran after 0.3 s"


def test_a_triple_fault_is_4_and_explained(tmp_path):
    path = tmp_path / "guest.bin"
    path.write_bytes(bytes.fromhex("0f011d10001000 0f0b f4".replace(" ", "")).ljust(0x40, b"\0"))
    result = run(str(path), "--flat", "32")
    assert result.returncode == 4
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("hv: triple fault")
    assert "ud2" in result.stderr.decode() or "reset" in result.stderr.decode()  # AMD-V resets the vCPU's state


def test_linux_is_refused_where_the_kvm_is_a_software_one(tmp_path):
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(images.bzimage(images.kernel_payload("gzip", b"kernel" * 100)))
    result = subprocess.run(
        [sys.executable, "-m", "hypervisor", "run", str(kernel), "--timeout", "5"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    if quick_kind() is Kind.SOFTWARE:
        assert result.returncode == 3
        lines = result.stderr.decode().splitlines()
        assert "software" in lines[0]
        assert "scripts/emulated-host" in lines[1]
    else:
        assert result.returncode in {4, 124}  # it ran, whatever became of it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_the_run_with_128_and_its_number(image, number):
    process = start(image(SAY_OK))
    until_ok(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert errors.decode().strip() == f"hv: ended by {number.name}"


def test_the_first_sigterm_asks_and_the_second_ends(image):
    process = start(image(SAY_OK))
    until_ok(process)
    process.send_signal(signal.SIGTERM)
    line = process.stderr.readline().decode()
    assert "does not listen to its power button" in line
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM


def test_standard_input_reaches_the_guest(image):
    result = run(image(ECHO), stdin=None, input=b"hello\nq")
    assert (result.returncode, result.stdout) == (0, b"hello\nq")


def test_a_plain_file_as_standard_input(image, tmp_path):
    (tmp_path / "typed").write_bytes(b"x" * 5000 + b"q")
    with (tmp_path / "typed").open("rb") as file:
        result = run(image(ECHO), stdin=file)
    assert (result.returncode, len(result.stdout)) == (0, 5001)


def test_closed_standard_streams(image):
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command(image(EXIT_WITH[9]))]
    assert subprocess.run(closed, check=False, timeout=SECONDS).returncode == 9


def test_the_console_in_a_file(image, tmp_path):
    log = tmp_path / "console.log"
    code = SAY_OK[:-2] + EXIT_WITH[0]
    result = run(image(code), "--console", f"file={log}")
    assert (result.returncode, result.stdout, log.read_bytes()) == (0, b"", b"ok")


def test_a_full_disk_ends_the_run_and_says_so(image):
    result = run(image(FLOOD), "--console", "file=/dev/full")
    assert result.returncode == 3
    assert result.stderr.decode().strip() == "hv: cannot write the console to /dev/full: No space left on device"


def test_memory_that_the_host_does_not_give_is_3(image):
    limited = ["sh", "-c", 'ulimit -v 600000; exec "$@"', "sh", *command(image(SPIN), "--ram", "4096")]
    result = subprocess.run(limited, capture_output=True, check=False, timeout=SECONDS)
    assert result.returncode == 3
    assert result.stderr.decode().startswith("hv: this host gives no 4096 MiB of memory: Cannot allocate memory")


def test_too_few_file_descriptors_is_3(image):
    limited = ["sh", "-c", 'ulimit -n 7; exec "$@"', "sh", *command(image(SPIN))]
    result = subprocess.run(limited, capture_output=True, check=False, timeout=SECONDS)
    assert result.returncode == 3
    assert "Too many open files" in result.stderr.decode()


def test_a_reader_that_goes_away_ends_the_run_quietly(image):
    process = start(image(FLOOD))
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=SECONDS) == 141
    assert errors == b""
    process.stderr.close()


def rss_kib(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])


def bytes_in(pipe):
    return struct.unpack("i", fcntl.ioctl(pipe.fileno(), termios.FIONREAD, bytes(4)))[0]


def has_exits(name):
    try:
        return ask(name, "summary", timeout=SECONDS)["vcpus"][0]["exits"]
    except VmmError:
        return 0  # it is still on its way


def test_a_blocked_standard_output_blocks_no_vcpu_and_is_bounded(image):
    """Nobody reads the pipe; the guest floods it and counts on: it must go on running, in bounded memory."""
    process = start(image(STRING_FLOOD), pipesize=4096)
    until(lambda: bytes_in(process.stdout))
    time.sleep(2)
    first = rss_kib(process.pid)
    time.sleep(3)
    assert rss_kib(process.pid) - first < 4096
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=SECONDS) == 128 + signal.SIGINT  # the vCPU answers, though the writer is stuck
    assert b"bytes of console output were lost" in process.stderr.read()
    process.stdout.close()
    process.stderr.close()


@pytest.mark.slow
def test_a_guest_that_hammers_for_a_minute_leaves_memory_and_log_bounded(tmp_path, monkeypatch):
    """Ports, memory-mapped I/O and the UART, as fast as it can, with every event logged."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    errors = tmp_path / "errors"
    name = ["--name", "hammer"]
    with errors.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "hypervisor", "run", "hammer", "--ram", "16", "--log-level", "debug", *name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
        until(lambda: has_exits("hammer"))
        time.sleep(10)  # late imports, the console's last MiB and the allocator have settled
        first = rss_kib(process.pid)
        time.sleep(50)
        grown = rss_kib(process.pid) - first
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=SECONDS)
    assert status == 128 + signal.SIGINT
    assert grown < 3072  # the two consoles keep a MiB each, which takes a while to come
    assert errors.stat().st_size < 16384


def test_no_console(image):
    result = run(image(SAY_OK[:-2] + EXIT_WITH[3]), "--console", "none")
    assert (result.returncode, result.stdout) == (3, b"")


def test_the_console_on_a_pseudo_terminal(image):
    process = start(image(ECHO), "--console", "pty")
    line = process.stderr.readline().decode()
    path = re.fullmatch(r"hv: the console is (/dev/pts/\d+)\n", line)[1]
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    os.write(fd, b"hiq")
    seen = b""
    while len(seen) < 3:
        seen += os.read(fd, 3)
    os.close(fd)
    assert seen == b"hiq"
    assert process.wait(timeout=SECONDS) == 0
    process.stdout.close()
    process.stderr.close()


def test_a_configuration_file(image, tmp_path):
    config = tmp_path / "machine.toml"
    config.write_text(f'kernel = "{image(EXIT_WITH[5])}"\nflat = 16\nram_mib = 2\nconsole = "none"\ntimeout = 100\n')
    arguments = [sys.executable, "-m", "hypervisor", "run", "--config", str(config)]
    assert subprocess.run(arguments, check=False, timeout=SECONDS).returncode == 11
    assert subprocess.run([*arguments, "--debug-exit", "raw"], check=False, timeout=SECONDS).returncode == 5


class Terminal:
    """A terminal with hv on it."""

    def __init__(self, path, *arguments):
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            command(path, *arguments), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        self.seen = b""

    def until(self, text):
        deadline = time.monotonic() + SECONDS
        while text not in self.seen:
            readable, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
            assert readable, self.seen
            self.seen += os.read(self.master, 4096)

    def until_raw(self):
        deadline = time.monotonic() + SECONDS
        while not self.is_raw():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def type(self, keys):
        os.write(self.master, keys)

    def is_raw(self):
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal():
    opened = []

    def make(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def test_the_escape_keys(terminal, image):
    screen = terminal(image(SAY_OK))
    screen.until(b"ok")
    assert screen.is_raw()
    screen.type(b"\x01h")
    screen.until(b"Ctrl-A x")
    screen.type(b"\x01r")
    screen.until(b"rip")
    screen.type(b"\x01x")
    assert screen.process.wait(timeout=SECONDS) == 0
    assert termios.tcgetattr(screen.slave) == screen.before


def test_ctrl_c_and_ctrl_a_reach_the_guest(terminal, image):
    screen = terminal(image(ECHO))
    screen.until_raw()
    screen.type(b"a\x03\x01\x01q")
    assert screen.process.wait(timeout=SECONDS) == 0
    screen.until(b"a\x03\x01q")


def test_a_killed_hv_leaves_a_sane_terminal_and_no_guest(terminal, image):
    screen = terminal(image(SAY_OK))
    screen.until(b"ok")
    assert screen.is_raw()
    screen.process.kill()
    screen.process.wait()
    deadline = time.monotonic() + SECONDS
    while termios.tcgetattr(screen.slave) != screen.before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert termios.tcgetattr(screen.slave) == screen.before

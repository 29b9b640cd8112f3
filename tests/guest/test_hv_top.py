"""`hv top` on real machines: `hv run` with small guests, and a terminal of tmux."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

from hypervisor.control import folder_of_machines
from hypervisor.errors import ConfigError
from hypervisor.profile.live_client import ask as _ask
from hypervisor.profile.metrics import MetricsServer

pytestmark = pytest.mark.kvm

SPIN = bytes.fromhex("fa ebfd")
# mov al,0x0d; out 0x70,al; l: in al,0x71; jmp l
READ_RTC = bytes.fromhex("b00d e670 e471 ebfc".replace(" ", ""))
# mov cx,1000; l: in al,0x71; loop l; s: jmp s
READ_RTC_1000_TIMES = bytes.fromhex("b9e803 e471 e2fc ebfe".replace(" ", ""))
# l: in al,0x99; jmp l
READ_0X99 = bytes.fromhex("e499 ebfc".replace(" ", ""))
SECONDS = 120
ask = partial(_ask, timeout=SECONDS)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """Return a folder for sockets that no other test's machines are in."""
    folder = tempfile.mkdtemp(prefix="hvt")
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "33")  # as a shell may have exported them before its window was resized
    monkeypatch.setenv("LINES", "7")
    yield folder
    shutil.rmtree(folder)


def hv(*arguments):
    return [sys.executable, "-m", "hypervisor", *arguments]


def top(*arguments):
    return subprocess.run(
        hv("top", *arguments), check=False, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL
    )


def answers(name):
    try:
        return ask(name, "summary")
    except ConfigError:
        return None


@pytest.fixture
def run(tmp_path):
    """Return a starter of `hv run` with some code; returns when the machine answers. They end with the test."""
    processes = []

    def start(code, name, *arguments):
        image = tmp_path / f"{name}.bin"
        image.write_bytes(code)
        options = ["--flat", "16", "--ram", "2", "--console", "none", "--name", name]
        command = hv("run", str(image), *options, *arguments)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        until(lambda: process.poll() is not None or answers(name))
        assert process.poll() is None, process.stderr.read()
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


class Terminal:
    """A terminal of tmux in which a shell command runs."""

    def __init__(self, server, command, width, height):
        self._tmux = ["tmux", "-S", server, "-f", "/dev/null"]
        self("new-session", "-d", "-x", str(width), "-y", str(height), command)

    def __call__(self, *arguments):
        result = subprocess.run([*self._tmux, *arguments], check=True, capture_output=True, text=True, timeout=SECONDS)
        return result.stdout

    def lines(self):
        return self("capture-pane", "-p").splitlines()

    def screen(self):
        return "\n".join(self.lines())

    def press(self, *keys):
        self("send-keys", *keys)

    def resize(self, width, height):
        self("resize-window", "-x", str(width), "-y", str(height))

    def shows(self, pattern):
        """Wait until the screen shows what a regular expression finds, and return its match."""
        return until(lambda: re.search(pattern, self.screen(), re.MULTILINE), what=self.screen)

    def selected(self):
        return next((line.split()[1] for line in self.lines() if line.startswith(">")), None)


@pytest.fixture
def terminal(runtime):
    """Return a maker of terminals that run `hv top`, then say its status and whether they echo."""
    if shutil.which("tmux") is None:
        pytest.skip("there is no tmux (scripts/setup dev installs it)")
    servers = []

    def open_terminal(*arguments, width=80, height=24, program=None):
        server = os.path.join(runtime, f"tmux{len(servers)}")
        servers.append(server)
        words = " ".join(program or hv("top", *arguments))
        ending = "echo status $?; stty -a | tr ' ;' '\\n\\n' | grep -x -e -*echo -e -*icanon | xargs; exec sleep 600"
        return Terminal(server, f"echo before; {words}; {ending}", width, height)

    yield open_terminal
    for server in servers:
        subprocess.run(["tmux", "-S", server, "kill-server"], check=False, capture_output=True)


RESTORED = r"\Abefore\nstatus {}\nicanon echo$"


def test_a_terminal_shows_machines_and_their_exits(run, terminal):
    run(SPIN, "spinner")
    run(READ_RTC, "reader")
    screen = terminal()
    screen.shows(r"^> reader .* [1-9]\d+ .*%")
    screen.shows(r"^  spinner .* 0 +100% +0%")
    assert screen.shows(r"hv top   (\d) machines")[1] == "2"
    assert screen.lines()[1].split()[-2:] == ["LAST", "MINUTE"]
    screen.press("Down")
    until(lambda: screen.selected() == "spinner", what=screen.screen)
    screen.press("Up", "Enter")
    screen.shows(r"\A reader   reader.bin, 1 vCPU, pid \d+, up \d")
    screen.shows(r"^> io +rtc +DATA +in 1 +[1-9][\d.k]* +[\d.]+ [num]+s +[\d.]+ [num]*s +\d+%")
    screen.press("Escape")
    screen.shows(r"hv top   2 machines")
    screen.press("q")
    screen.shows(RESTORED.format(0))


def test_keys_sort_reverse_and_explain(run, terminal):
    run(SPIN, "aaa")
    run(READ_RTC, "zzz")
    screen = terminal("--interval", "0.5")
    screen.shows(r"^> zzz .*\n  aaa")
    screen.shows(r"sort: exits/s ▼ ")
    screen.press("r")
    screen.shows(r"sort: exits/s ▲ ")
    screen.shows(r"^> aaa .*\n  zzz")
    screen.press("s")
    screen.shows(r"sort: guest ▼ ")
    screen.press("?")
    screen.shows(r"exits to hv a second")
    screen.press("x")
    screen.shows(r"sort: guest ▼ .*every 0.5 s")
    screen.press("q")
    screen.shows(RESTORED.format(0))


def test_a_larger_terminal_has_all_columns_and_a_smaller_one_stays_whole(run, terminal):
    run(READ_RTC, "reader")
    screen = terminal("reader", width=120, height=40)
    screen.shows(r"REASON +DEVICE +REGISTER +DIR +EXITS/S +P50 +P99 +% VMM +TOTAL +MINUTE")
    screen.shows(r"^> io .* [█▇]$")
    for width, height in ((40, 10), (20, 5), (80, 24)):
        screen.resize(width, height)
        until(
            lambda: (lines := screen.lines()) and len(lines) == height and lines[-1][:7] == " s sort",  # noqa: B023
            what=screen.screen,
        )
        assert all(len(line) <= width for line in screen.lines())
    screen.press("q")
    screen.shows(RESTORED.format(0))


def test_machines_that_end_leave_and_come(run, terminal):
    process = run(READ_RTC, "reader")
    screen = terminal("reader", "--interval", "0.3")
    screen.shows(r"rtc +DATA")
    process.kill()
    process.wait()
    screen.shows(r"\A reader .*has ended$")
    screen.shows(r"rtc +DATA")
    screen.press("Escape")
    screen.shows(r"No machine runs\.\n +`hv run KERNEL` starts one")
    run(SPIN, "spinner")
    screen.shows(r"^> spinner .* 0 ")
    screen.press("q")
    screen.shows(RESTORED.format(0))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_it_with_the_terminal_restored(terminal, number, status):
    screen = terminal()
    screen.shows(r"No machine runs")
    if number == signal.SIGINT:
        screen.press("C-c")
    else:
        os.kill(int(child_of(screen)), number)
    screen.shows(RESTORED.format(status))


def child_of(screen):
    shell = screen("display-message", "-p", "#{pane_pid}").strip()
    return Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0]


def test_a_fault_leaves_the_terminal_restored(terminal, tmp_path):
    faulty = tmp_path / "faulty.py"
    faulty.write_text(
        "import hypervisor.cli.topapp as app\n"
        "from hypervisor.cli import main\n"
        "calls = []\n"
        "def draw(*arguments, real=app.draw):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 1:\n"
        "        raise ZeroDivisionError\n"
        "    return real(*arguments)\n"
        "app.draw = draw\n"
        "raise SystemExit(main(['top']))\n"
    )
    screen = terminal(program=[sys.executable, str(faulty)], width=200, height=50)
    screen.shows(r"ZeroDivisionError\n(.*\n)*status 5\nicanon echo$")


def test_ctrl_z_gives_the_terminal_to_the_shell_until_it_goes_on(terminal):
    screen = terminal()
    screen.shows(r"No machine runs")
    child = child_of(screen)
    screen.press("C-z")
    until(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T", what=screen.screen)
    screen.shows(r"\Abefore$")
    assert "hv top" not in screen.screen()
    os.kill(int(child), signal.SIGCONT)
    screen.shows(r"No machine runs")
    screen.press("q")
    screen.shows(RESTORED.format(0))


def test_a_machine_that_does_not_answer_is_said_so_and_keys_still_work(run, terminal):
    process = run(READ_RTC, "reader")
    screen = terminal("--interval", "0.3")
    screen.shows(r"^> reader .* [1-9]\d+ ")
    process.send_signal(signal.SIGSTOP)
    screen.shows(r"^> reader .* silent")
    screen.press("?")
    screen.shows(r"exits to hv a second")
    screen.press("q")
    screen.shows(RESTORED.format(0))
    process.send_signal(signal.SIGCONT)


# --- once -------------------------------------------------------------------------------------------------------------


def test_once_prints_a_sample_as_json_and_as_a_table(run):
    pid = run(READ_RTC, "reader").pid
    run(SPIN, "spinner")

    def sample():
        """One in which both have run: a busy host may let one wait for all of it."""
        result = top("--once", "--json", "--interval", "0.5")
        assert (result.returncode, result.stderr) == (0, "")
        form = json.loads(result.stdout)
        assert form["version"] == 1
        taken = form["machines"]
        is_fair = len(taken) == 2 and taken[0]["exits_per_s"] > 0 and taken[1]["guest_percent"] > 95
        return is_fair and taken

    reader, spinner = until(sample)
    assert (reader["name"], reader["pid"], reader["kernel"], reader["cpus"]) == ("reader", pid, "reader.bin", 1)
    assert reader["interval_ns"] >= 400_000_000
    assert reader["guest_percent"] + reader["vmm_percent"] + (reader["halted_percent"] or 0) == pytest.approx(100)
    assert spinner["name"] == "spinner"
    assert spinner["exits_per_s"] < 10  # a kick, perhaps
    until(lambda: first_words(top("--once", "--interval", "0.3")) == ["MACHINE", "reader", "spinner"])


def first_words(result):
    return [line.split()[0] for line in result.stdout.splitlines()]


def test_once_with_a_machine_prints_its_exits(run):
    run(READ_RTC, "reader")

    def sample():
        """One in which it has run nearly all the time, as a busy host may not let it."""
        result = top("reader", "--once", "--json")
        if result.returncode:
            return None
        (machine,) = json.loads(result.stdout)["machines"]
        kinds = machine["exits_by_kind"]
        is_usual = kinds and kinds[0]["vmm_percent"] > 90 and kinds[0]["per_s"] > 0.99 * machine["exits_per_s"]
        return is_usual and (machine, kinds[0])

    machine, first = until(sample)
    assert [first[name] for name in ("reason", "device", "register", "address", "direction", "size")] == [
        *("io", "rtc", "DATA", 0x71, "in", 1)
    ]
    assert first["per_s"] == pytest.approx(machine["exits_per_s"], rel=0.01)
    assert 0 < first["p50_ns"] <= first["p99_ns"]
    title, line = until(lambda: len(lines := top("reader", "--once").stdout.splitlines()) > 1 and lines[:2])
    assert title.split()[:4] == ["REASON", "DEVICE", "REGISTER", "DIR"]
    assert line.split()[:4] == ["io", "rtc", "DATA", "in"]


def test_a_name_that_no_machine_has_is_one_line_with_those_that_run(run):
    result = top("nobody", "--once")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "hv: no machine is called 'nobody'\n    none runs; `hv run KERNEL` starts one\n"
    run(SPIN, "b")
    run(SPIN, "a")
    assert "these run: a, b\n" in top("nobody", "--once").stderr


def test_without_machines_it_says_how_to_start_one():
    assert top("--once").stdout == "No machine runs. `hv run KERNEL` starts one.\n"
    assert json.loads(top("--once", "--json").stdout) == {"version": 1, "machines": []}


@pytest.mark.parametrize(
    "arguments", [["--json"], [], ["--interval", "0"], ["--interval", "nan", "--once"], ["--interval", "1e9", "--once"]]
)
def test_bad_usage_is_status_2(arguments):
    result = top(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 2


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_of_a_living_machine_is_taken_that_of_a_dead_one_is_not(run, tmp_path):
    process = run(SPIN, "web")
    command = hv("run", str(tmp_path / "web.bin"), "--flat", "16", "--ram", "2", "--name", "web")
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 2
    assert result.stderr.startswith(f"hv: the machine's name 'web' is taken by process {process.pid}\n")
    process.kill()
    process.wait()
    assert os.path.exists(os.path.join(folder_of_machines(), "web"))
    assert run(SPIN, "web").pid == ask("web", "summary")["pid"]


def test_a_run_without_a_name_has_one_and_leaves_nothing_behind(tmp_path):
    image = tmp_path / "guest kernel.bin"
    image.write_bytes(SPIN)
    command = hv("run", str(image), "--flat", "16", "--ram", "2", "--console", "none")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    name = f"guest_kernel.bin-{process.pid}"
    assert until(lambda: answers(name))["kernel"] == "guest kernel.bin"
    process.send_signal(signal.SIGINT)
    process.wait(SECONDS)
    assert os.listdir(folder_of_machines()) == [".lock"]


def test_a_run_works_where_there_can_be_no_socket(runtime, tmp_path):
    image = tmp_path / "exit.bin"
    image.write_bytes(bytes.fromhex("b007e6f4f4"))  # mov al,7; out 0xf4,al; hlt
    Path(runtime, "trapvisor").write_text("in the way")
    command = hv("run", str(image), "--flat", "16", "--ram", "2", "--debug-exit", "raw")
    result = subprocess.run(command, check=False, capture_output=True, timeout=SECONDS)
    assert (result.returncode, result.stdout, result.stderr) == (7, b"", b"")
    named = subprocess.run([*command, "--name", "web"], check=False, capture_output=True, timeout=SECONDS)
    assert named.returncode == 3
    assert b"not a folder of yours alone" in named.stderr


# --- from Python ------------------------------------------------------------------------------------------------------


def test_a_machine_is_published_only_when_it_is_asked_for(machine_of, runtime):
    machine = machine_of(READ_RTC_1000_TIMES)
    assert os.listdir(runtime) == []
    machine.publish("web")
    with pytest.raises(ConfigError, match="known as 'web' already"):
        machine.publish("other")
    machine.start()
    until(lambda: machine.exits.pio("rtc").latency.count == 1000)  # a time is noted behind its handler
    answer = ask("web", "exits")
    (row,) = (row for row in answer["exits"] if row["device"] == "rtc")
    mine = machine.exits.pio("rtc")
    assert (row["count"], sum(count for _, count in row["buckets"])) == (1000, 1000)
    assert dict(row["buckets"]) == mine.latency.buckets
    assert (row["total"], row["max"]) == (mine.latency.total_ticks, mine.latency.max_ticks)
    profile = ask("web", "profile")
    assert (profile["name"], profile["pid"], profile["version"]) == ("web", os.getpid(), 1)
    (same,) = (one for one in profile["exits"] if one["device"] == "rtc")
    assert (same["register"], same["count"]) == ("DATA", 1000)
    machine.close()
    assert os.listdir(folder_of_machines()) == [".lock"]


class Stuck:
    """A device whose third read takes until it is let go."""

    def __init__(self):
        self.reads = 0
        self.go_on = threading.Event()

    def read(self, offset, size):
        self.reads += 1
        if self.reads == 3:
            self.go_on.wait(4 * SECONDS)
        return 0

    def write(self, offset, size, value):
        pass


def test_a_machine_answers_while_its_vcpu_is_stuck_in_a_device(machine_of):
    """The loop waits for no vCPU: what only that can say is left out."""
    machine = machine_of(READ_0X99)
    device = Stuck()
    machine.bus_pio.claim(0x99, 1, device, "stuck")
    machine.publish("web")
    machine.start()
    until(lambda: device.reads == 3)
    try:
        for kind in ("summary", "exits", "profile"):
            assert ask("web", kind)["vcpus"][0]["halted_ns"] is None
        (row,) = (row for row in ask("web", "exits")["exits"] if row["device"] == "stuck")
        assert row["count"] == 3
    finally:
        device.go_on.set()
    until(lambda: ask("web", "summary")["vcpus"][0]["halted_ns"] is not None)


def test_a_paused_machine_answers(machine_of):
    machine = machine_of(READ_RTC)
    machine.publish("web")
    machine.start()
    machine.pause()
    for kind in ("summary", "exits", "profile"):
        assert ask("web", kind)["name"] == "web"
    machine.resume()


def test_clients_that_mean_harm_do_not_stop_the_guest(machine_of):
    machine = machine_of(READ_RTC)
    machine.publish("web")
    machine.start()
    path = os.path.join(folder_of_machines(), "web")
    clients = []
    for _ in range(40):
        client = socket.socket(socket.AF_UNIX)
        clients.append(client)
        client.setblocking(False)
        until(lambda: client.connect_ex(path) == 0)  # noqa: B023
        try:
            client.send(b'{"get": "exits"}\n' * 200 if len(clients) % 2 else b"x" * 5000)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            pass
    before = machine.exits.count
    until(lambda: machine.exits.count > before + 1000)
    assert ask("web", "summary")["name"] == "web"
    for client in clients:
        client.close()


# --- metrics ----------------------------------------------------------------------------------------------------------


def scrape(url):
    with DIRECT.open(url, timeout=SECONDS) as answer:
        text = answer.read().decode()
    return {
        (one.name, one.labels.get("device"), one.labels.get("register")): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.labels.get("layer", "user") == "user"
    }


def test_a_running_machines_counters_grow(run):
    process = run(READ_RTC, "reader", "--profile-metrics", "0")
    url = re.fullmatch(r"hv: metrics are at (http://127\.0\.0\.1:\d+/metrics)\n", process.stderr.readline())[1]
    name = ("hv_exits_total", "rtc", "DATA")
    first = scrape(url)
    until(lambda: scrape(url)[name] > first[name])
    assert scrape(url)["hv_wall_seconds", None, None] > first["hv_wall_seconds", None, None]


def test_metrics_agree_with_what_the_machine_says(machine_of, tmp_path):
    machine = machine_of(READ_RTC_1000_TIMES)
    server = MetricsServer(machine.profile, f"unix={tmp_path}/m")
    machine.start()
    server.start()
    until(lambda: machine.exits.pio("rtc").latency.count == 1000)  # a time is noted behind its handler
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/m")
        client.send(b"GET /metrics HTTP/1.0\r\n\r\n")
        data = b"".join(iter(lambda: client.recv(65536), b""))
    server.close()
    families = {one.name: one for one in text_string_to_metric_families(data.partition(b"\r\n\r\n")[2].decode())}
    (count,) = (one.value for one in families["hv_exits"].samples if one.labels["device"] == "rtc")
    assert count == 1000
    times = {
        one.name: one.value for one in families["hv_exit_handler_seconds"].samples if one.labels["device"] == "rtc"
    }
    assert times["hv_exit_handler_seconds_count"] == 1000
    assert times["hv_exit_handler_seconds_sum"] == pytest.approx(machine.exits.pio("rtc").latency.total / 1e9, rel=0.01)


def test_a_port_in_use_ends_the_run_before_it_begins(tmp_path):
    image = tmp_path / "spin.bin"
    image.write_bytes(SPIN)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = hv("run", str(image), "--flat", "16", "--ram", "2", "--profile-metrics", str(port))
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 3
    assert result.stderr.startswith(f"hv: cannot listen at port {port} of 127.0.0.1: Address already in use\n    `ss ")
    assert os.listdir(folder_of_machines()) == [".lock"]

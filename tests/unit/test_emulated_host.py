"""The emulated host without the emulation: the agent runs natively in QEMU's place. One test boots the real one.

Run as a program, this file is that native host: `test_emulated_host.py JSON`, with its own stdin, stdout and stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROGRAM = SCRIPTS / "emulated-host"
AGENT = SCRIPTS / "emulated_host" / "inside" / "agent.py"
sys.path.insert(0, str(SCRIPTS))

from emulated_host import apt, cli, ext4, image, machine, payload, recipe, session  # noqa: E402 - needs the path above
from emulated_host.errors import HostCannotError, UsageError, find_tool  # noqa: E402 - the same

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def native_host(options: dict[str, Any]) -> int:
    """Do what the program does once its image is ready, with the agent in QEMU's place."""
    cli._open_standard_streams()
    session.MOST_UNANSWERED = options.get("unanswered", session.MOST_UNANSWERED)  # type: ignore[misc] # a test's

    def argv(ports: Mapping[str, int]) -> list[str]:
        if "broken" in options:
            return ["sh", "-c", options["broken"]]
        return [sys.executable, str(AGENT), options.get("out", "/"), *(f"{k}={v}" for k, v in ports.items())]

    command = session.Command(
        options["argv"],
        {"PATH": os.environ["PATH"], **options.get("env", {})},
        options.get("cwd", "/"),
        Path(options["archive"]) if "archive" in options else None,
        options.get("timeout"),
        options.get("silence"),
    )
    try:
        with machine.Machine(argv) as running:
            return session.Session(running, command).run()
    except HostCannotError as error:
        print(error, error.log, sep="\n", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(native_host(json.loads(sys.argv[1])))

import pytest  # noqa: E402 - the native host does without


def driver(argv: Sequence[str], **options: Any) -> list[str]:
    return [sys.executable, __file__, json.dumps({"argv": list(argv), **options})]


def run(argv: Sequence[str], stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(driver(argv, **options), input=stdin, capture_output=True, check=False, timeout=120)


def shell(script: str, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    return run(["sh", "-c", script], stdin, **options)


# --- a command's life --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 128 + 15), ("kill -KILL $$", 128 + 9)],
)
def test_status_is_the_commands(script, status):
    assert shell(script).returncode == status


def test_a_command_that_is_not_there(tmp_path):
    done = run(["no-such-command"])
    assert (done.returncode, done.stdout) == (127, b"")
    assert done.stderr == b"emulated-host: no-such-command: No such file or directory\n"
    done = run([str(tmp_path)])
    assert done.returncode == 126
    assert b"Permission denied" in done.stderr
    assert run(["true"], cwd=str(tmp_path / "missing")).returncode == 127


def test_stdout_and_stderr_are_kept_apart():
    done = shell("echo out; echo err >&2; echo more")
    assert (done.stdout, done.stderr) == (b"out\nmore\n", b"err\n")


def test_large_input_and_output_arrive_whole():
    data = os.urandom(3_000_000)
    done = shell("cat", data)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_end_of_input_is_passed_on():
    assert shell("cat; echo ended", b"").stdout == b"ended\n"
    assert shell("read a; read b || echo $a-$b", b"one\ntwo").stdout == b"one-two\n"


def test_a_closed_stdin_is_an_empty_one():
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *driver(["wc", "-c"])], capture_output=True, check=True)
    assert done.stdout.strip() == b"0"


def test_a_command_need_not_read_its_input():
    assert shell("echo ignoring", b"x" * 2_000_000).stdout == b"ignoring\n"
    assert shell("exec <&-; sleep 0.2; echo closed", b"x" * 2_000_000).stdout == b"closed\n"


def test_arguments_environment_and_folder_are_exact(tmp_path):
    odd = "a b'\"$\n\udcff"
    folder = tmp_path / "with space"
    folder.mkdir()
    script = "import os, sys; print(ascii([sys.argv[1:], os.environ['ODD'], os.getcwd()]))"
    done = run([sys.executable, "-c", script, odd, ""], env={"ODD": odd}, cwd=str(folder))
    assert done.stdout.decode().strip() == ascii([[odd, ""], odd, str(folder)])


def test_the_command_gets_default_signals():
    """A Python parent ignores SIGPIPE; its children should not (signal(7))."""
    done = shell("grep SigIgn /proc/self/status")
    assert int(done.stdout.split()[1], 16) & (1 << 12) == 0


def test_output_ends_with_the_command_and_not_with_its_children():
    before = time.monotonic()
    done = shell("sleep 100 & echo main; exit 4")
    assert (done.returncode, done.stdout) == (4, b"main\n")
    assert time.monotonic() - before < 90


def test_a_reader_that_goes_away_ends_it():
    process = subprocess.Popen(driver(["yes"]), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_a_slow_reader_loses_nothing():
    argv = driver(["sh", "-c", "head -c 2000000 /dev/zero; echo end"])
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.5)
        assert process.stdout.read() == bytes(2_000_000) + b"end\n"
        assert process.wait(timeout=60) == 0


def test_timeout():
    done = run(["sleep", "20"], timeout=1.5)
    assert done.returncode == 124
    assert b"did not end within 1.5 s" in done.stderr


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_command_that_falls_silent_is_given_up(stream):
    for pause in (0.5, 4):  # the second is for a machine that is so busy that the command falls silent by itself
        speaks = f"for i in one two three four five six; do sleep {pause}; echo $i {stream}; done"
        whole = shell(speaks, silence=4 * pause)
        done = shell(f"{speaks}; sleep 60", silence=4 * pause)
        if whole.returncode == 0 and b"six" in (done.stdout or done.stderr):
            break
    assert whole.returncode == 0
    assert done.returncode == 124
    assert f"has printed nothing for {4 * pause:g} s".encode() in done.stderr
    assert b"six" in (done.stdout or done.stderr)


def test_a_host_that_does_not_answer_is_given_up():
    done = shell("kill -STOP $PPID; sleep 60", unanswered=20)
    assert done.returncode == 124
    assert b"the emulated host has not answered for 10 s" in done.stderr


def test_a_host_is_not_dead_whose_rest_nobody_reads():
    """20 beats are 10 s; the command has ended long before, and everything on the way from it is full."""
    command = driver(["timeout", "1", "cat", "/dev/zero"], unanswered=20)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        time.sleep(13)
        assert process.stdout is not None
        assert len(process.stdout.read()) > 0
    assert process.returncode == 124  # what timeout(1) says


# --- signals -----------------------------------------------------------------------------------------------------


@contextmanager
def started(script: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a running driver whose command has said `up`; end it whatever happens."""
    with subprocess.Popen(driver(["sh", "-c", script]), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


def test_the_first_signal_goes_to_the_command():
    with started("trap 'echo term; exit 9' TERM; echo up; while :; do sleep 0.1; done") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 9
        assert process.stdout is not None
        assert process.stdout.read() == b"term\n"


def test_the_second_signal_ends_all():
    hears = (
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
        "print('up', flush=True)\nwhile True: signal.pause()"
    )
    with started(f"exec {shlex.quote(sys.executable)} -c {shlex.quote(hears)}") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"heard\n"  # two at once would be one
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigkill_leaves_no_machine_behind():
    with started("echo up; exec sleep 100") as process:
        [emulator] = children(process.pid)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    status = Path(f"/proc/{emulator}/status")
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- a machine that fails ------------------------------------------------------------------------------------------


def test_a_machine_that_dies_shows_its_last_words():
    done = run(["true"], broken="echo Kernel panic; exit 0")
    assert done.returncode == 3
    assert done.stderr == b"the emulated host ended before the command did; the end of its log follows\nKernel panic\n"
    silent = run(["true"], broken="exit 1")
    assert silent.stderr.strip() == b"the emulated host ended before the command did"


def test_a_boot_that_hangs_is_given_up(monkeypatch):
    for seconds in (0.3, 20):  # the second is for a shell that is late
        monkeypatch.setattr(session, "BOOT_SECONDS", seconds)
        with (
            machine.Machine(lambda _: ["sh", "-c", "echo stuck; exec sleep 100"]) as running,
            pytest.raises(HostCannotError, match=f"not up after {seconds} s") as caught,
        ):
            session.Session(running, session.Command(["true"], {}, "/")).run()
        if caught.value.log:
            break
    assert caught.value.log == "stuck"


# --- what comes back ----------------------------------------------------------------------------------------------


def test_files_come_back(tmp_path):
    out, archive, target = tmp_path / "out", tmp_path / "out.tar", tmp_path / "target"
    out.mkdir()
    data = os.urandom(500_000)
    done = shell("cat > big; mkdir d; echo x > d/f; exit 5", data, cwd=str(out), out=str(out), archive=str(archive))
    assert done.returncode == 5
    cli._bring_back(archive, target)
    assert (target / "big").read_bytes() == data
    assert (target / "d/f").read_text() == "x\n"


def test_nothing_comes_back_from_a_command_that_was_ended(tmp_path):
    archive, target = tmp_path / "out.tar", tmp_path / "target"
    shell("sleep 20", timeout=1, out=str(tmp_path), archive=str(archive))
    cli._bring_back(archive, target)
    assert not target.exists()


# --- a terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[Any]:
    """Yield a function that starts the native host at the end of a terminal of 33 rows and 99 columns."""
    pexpect = pytest.importorskip("pexpect")
    opened = []

    def open_terminal(script: str, **options: Any) -> Any:
        program, *arguments = driver(["sh", "-c", script], **options)
        child = pexpect.spawn(program, arguments, timeout=60, encoding="utf-8", dimensions=(33, 99))
        opened.append(child)
        return child

    yield open_terminal
    for child in opened:
        child.close(force=True)


def test_a_terminal_outside_is_a_terminal_inside(terminal):
    child = terminal('tty; stty size </dev/tty; read line; echo "<$line>"; stty size; exit 6')
    child.expect("/dev/pts/")
    child.expect("33 99")
    child.setwinsize(44, 88)
    child.sendline("typed")
    child.expect("<typed>\r\n")
    child.wait()
    assert child.exitstatus == 6


def test_a_resized_terminal_is_told(terminal):
    child = terminal("trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.1; done")
    child.expect("up")
    child.setwinsize(44, 88)
    child.expect("44 88")


def test_control_c_goes_inside(terminal):
    pexpect = pytest.importorskip("pexpect")
    child = terminal("trap 'echo caught; exit 11' INT; echo up; while :; do sleep 0.1; done")
    child.expect("up")
    for _ in range(5):  # a shell may miss one just as it starts a command
        child.sendcontrol("c")
        if child.expect(["caught", pexpect.TIMEOUT], timeout=5) == 0:
            break
    child.wait()
    assert child.exitstatus == 11


def test_three_escapes_end_it(terminal):
    pexpect = pytest.importorskip("pexpect")
    child = terminal("stty raw; echo up; sleep 300")
    child.expect("up")
    child.send("\x1d\x1d")
    time.sleep(0.3)
    assert child.isalive()
    child.send("x\x1d\x1d")
    time.sleep(0.3)
    assert child.isalive()
    child.send("\x1d")
    for _ in range(10):  # the three have to come within a second: together they do
        if child.expect(["ended by Ctrl-]", pexpect.TIMEOUT], timeout=5) == 0:
            break
        child.send("\x1d\x1d\x1d")
    child.wait()
    assert child.exitstatus == 128 + signal.SIGINT


@pytest.mark.parametrize("ending", ["exit 0", "kill -KILL $PPID", "sleep 20"])
def test_the_terminal_is_restored(ending):
    """After the command's end, the machine's death, and a timeout."""
    pexpect = pytest.importorskip("pexpect")
    host = [*driver(["sh", "-c", f"sleep 0.2; {ending}"], timeout=4)]
    script = 'before=$(stty -g); "$@"; test "$before" = "$(stty -g)" && echo same'
    child = pexpect.spawn("sh", ["-c", script, "sh", *host], timeout=60, encoding="utf-8")
    child.expect("same\r\n")
    child.close()


def test_stderr_stays_apart_when_it_is_no_terminal(tmp_path):
    pexpect = pytest.importorskip("pexpect")
    errors = tmp_path / "errors"
    host = driver(["sh", "-c", "test -t 1 && echo out; echo err >&2"])
    child = pexpect.spawn("sh", ["-c", f'"$@" 2>{errors}', "sh", *host], timeout=60, encoding="utf-8")
    child.expect("out\r\n")
    child.expect(pexpect.EOF)
    assert "err" not in child.before
    assert errors.read_text() == "err\n"


# --- QEMU's command line --------------------------------------------------------------------------------------------


def fake_image(folder: Path, disk: str) -> image.Image:
    folder.mkdir()
    (folder / "facts.json").write_text(json.dumps({"kernel": "6.1.0", "disk": disk, "python": "3.11"}))
    return image.Image(folder)


@pytest.mark.parametrize(
    ("disk", "root", "second"), [("nvme", "/dev/nvme0n1", "/dev/vda"), ("virtio-blk", "/dev/vda", "/dev/nvme0n1")]
)
def test_the_root_is_on_the_controller_that_the_kernel_has_built_in(tmp_path, monkeypatch, disk, root, second):
    monkeypatch.setattr(machine, "find_tool", lambda name: name)
    made = fake_image(tmp_path / "a,b", disk)
    ports = {name: 40 + number for number, name in enumerate(("control", "stdin", "stdout", "stderr", "files"))}
    argv = machine.command_line(made, Path("/p"), machine.Size(2048, 3), ports, verbose=False)
    drives = [word for word in argv if word.startswith("id=")]
    assert [drive.split(",")[0] for drive in drives] == ["id=root", "id=payload"]
    assert all("readonly=on" in drive for drive in drives)
    assert f"file={tmp_path}/a,,b/root.ext4" in drives[0]
    controllers = [word for word in argv if word.endswith(("drive=root", "drive=payload"))]
    kinds = {"nvme": ["nvme", "virtio-blk-pci"], "virtio-blk": ["virtio-blk-pci", "nvme"]}
    assert [controller.split(",")[0] for controller in controllers] == kinds[disk]
    append = argv[argv.index("-append") + 1].split()
    assert {f"root={root}", f"payload={second}", "quiet"} <= set(append)
    assert "socket,id=stdout,fd=42" in argv
    assert argv[argv.index("-m") + 1] == "2048"
    assert argv[argv.index("-smp") + 1] == "3"


# --- the payload ---------------------------------------------------------------------------------------------------


def test_with_option(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("x")
    (tmp_path / "g=h").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert payload.parse_with(str(tmp_path / "f")) == (tmp_path / "f", str(tmp_path / "f"))
    assert payload.parse_with("f") == (Path("f"), str(tmp_path / "f"))
    assert payload.parse_with("f=/opt/x/../y") == (Path("f"), "/opt/y")
    assert payload.parse_with("g=h")[1] == str(tmp_path / "g=h")
    for wrong in ("missing", "missing=/x", "f=relative", "f=/"):
        with pytest.raises(UsageError):
            payload.parse_with(wrong)


def test_the_checkout_comes_without_what_is_made_from_it(tmp_path):
    checkout, target = tmp_path / "checkout", tmp_path / "target"
    kept = ["a.py", "hypervisor/kvm/_kvm.abi3.so", "hypervisor/build/x", "p/__pycache__/m.cpython-311.pyc"]
    left = [".git/config", ".venv/bin/python", "build/lib/x", "p/__pycache__/m.cpython-313.pyc", "p/.mypy_cache/x"]
    for name in kept + left:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    (checkout / "link").symlink_to("p")
    os.mkfifo(checkout / "fifo")
    payload._bring_checkout(checkout, target, "cpython-311")
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()) == sorted(kept)
    assert (target / "link").readlink() == Path("p")
    assert (target / "a.py").stat().st_mtime == (checkout / "a.py").stat().st_mtime
    assert (checkout / "a.py").stat().st_nlink == 1


def test_a_folder_is_brought_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub/deeper").mkdir(parents=True)
    (source / "sub/f").write_text("new")
    (source / "dir-link").symlink_to("sub")
    (tmp_path / "named").symlink_to("source")
    (target / "sub").mkdir(parents=True)
    (target / "sub/f").write_text("old")
    payload._bring(tmp_path / "named", target)
    assert (target / "sub/f").read_text() == "new"
    assert (target / "sub/deeper").is_dir()
    assert (target / "dir-link").is_symlink()


def test_a_disk_image_holds_the_folder(tmp_path):
    folder, disk = tmp_path / "folder", tmp_path / "disk"
    for number in range(300):
        (folder / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (folder / f"d{number % 7}/{number}").write_bytes(bytes([number % 256]) * (number * 97))
    ext4.make_image(folder, disk)
    debugfs = str(Path(find_tool("mke2fs")).with_name("debugfs"))
    read = subprocess.run([debugfs, "-R", "cat /d5/299", str(disk)], capture_output=True, check=True)
    assert read.stdout == bytes([299 % 256]) * (299 * 97)


# --- the recipe and the cache --------------------------------------------------------------------------------------


def test_requirements_come_from_the_project(tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nname = "x"\ndependencies = ["cffi>=1.16"]\n'
        '[project.optional-dependencies]\nfuzz = ["atheris"]\n'
        'dev = ["pytest>=8", "ruff>=0.6", "mypy", "coverage[toml]>=7"]\n'
    )
    assert recipe.python_requirements(project) == ["cffi>=1.16", "pytest>=8"]


def test_the_key_follows_the_recipe():
    first = recipe.Recipe("debian 12", ("cffi",))
    assert first.key() == recipe.Recipe("debian 12", ("cffi",)).key()
    assert len({first.key(), recipe.Recipe("debian 13", ("cffi",)).key(), recipe.Recipe("debian 12", ()).key()}) == 3


@pytest.mark.parametrize(
    ("release", "arch", "fits"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, "x86_64", True),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "x86_64", True),
        ({"ID": "fedora", "PRETTY_NAME": "Fedora 40"}, "x86_64", False),
        ({"ID": "debian"}, "aarch64", False),
    ],
)
def test_only_debian_and_its_relatives(monkeypatch, release, arch, fits):
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    monkeypatch.setattr("platform.machine", lambda: arch)
    if fits:
        assert recipe._distribution().startswith(release["ID"])
        return
    with pytest.raises(HostCannotError, match="needs an x86-64 Debian or Ubuntu"):
        recipe._distribution()


def test_the_cache_is_where_xdg_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recipe.cache_folder() == tmp_path / "trapvisor/emulated-host"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert recipe.user_cache() == tmp_path / "home/.cache"


def test_a_kernel_is_resolved_to_its_concrete_packages(tmp_path, monkeypatch):
    depends = {
        "linux-image-virtual": "linux-image-virtual\n  Depends: linux-image-6.8.0-45-generic\n  Depends: <virtual>\n",
        "linux-image-6.8.0-45-generic": "  Depends: kmod\n |Depends: linux-modules-6.8.0-45-generic\n",
        "linux-modules-6.8.0-45-generic": "",
    }

    def call(argv: Sequence[Any], **_: Any) -> str:
        if argv[-1] not in depends:
            raise HostCannotError("apt-cache failed")
        return depends[argv[-1]]

    monkeypatch.setattr(apt, "call", call)
    client = apt.Apt(tmp_path / "state")
    expected = ["linux-image-6.8.0-45-generic", "linux-modules-6.8.0-45-generic"]
    assert client.kernel_packages(["linux-image-cloud-amd64", "linux-image-virtual"]) == expected
    with pytest.raises(HostCannotError, match="knows none"):
        client.kernel_packages(["linux-image-cloud-amd64"])


def test_folders_of_killed_runs_are_removed_and_living_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    long_ago = time.time() - 3600
    with cli._work_folder() as living:
        killed = living.with_name("killed")
        young = living.with_name("young")
        for folder in (killed, young):
            folder.mkdir()
            (folder / "payload.ext4").write_text("x")
        os.utime(living, (long_ago, long_ago))
        os.utime(killed, (long_ago, long_ago))
        with cli._work_folder():
            assert (living.exists(), killed.exists(), young.exists()) == (True, False, True)
    assert not living.exists()


def test_an_image_is_built_once_for_all_and_never_half(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = recipe.Recipe("debian 12", ())
    built = []

    def fail(*_: object) -> list[Path]:
        raise HostCannotError("no network")

    monkeypatch.setattr(image, "fetch_all", fail)
    with pytest.raises(HostCannotError, match="no network"):
        image.ready_image(wanted, tmp_path)
    assert [path.name for path in recipe.cache_folder().iterdir()] == [f"{wanted.key()}.lock"]

    def build(_recipe: object, _checkout: object, made: image.Image) -> None:
        built.append(made.folder)
        made.folder.mkdir()

    monkeypatch.setattr(image, "_build", build)
    assert image.ready_image(wanted, tmp_path).folder == image.ready_image(wanted, tmp_path).folder
    assert len(built) == 1


# --- the command line ----------------------------------------------------------------------------------------------


def program(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which command?"),
        (["--memory", "5", "true"], "512 MiB at least"),
        (["--cpus", "0", "true"], "one at least"),
        (["--timeout", "0", "true"], "more than 0"),
        (["--silence", "-1", "true"], "more than 0"),
        (["--with", "/no/such/file", "true"], "there is no /no/such/file"),
        (["--out", "/dev/null", "true"], "not a folder"),
        (["--env", "=x", "true"], "name is missing"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_status_2_in_one_line(arguments, words):
    done = program(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("missing", "package"), [("qemu-system-x86_64", "qemu-system-x86"), ("mke2fs", "e2fsprogs"), ("apt-get", "apt")]
)
def test_a_missing_tool_is_named_with_its_package(monkeypatch, missing, package):
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == missing else f"/usr/bin/{name}")
    with pytest.raises(HostCannotError, match=rf"^{missing} is missing: install Debian's package {package} "):
        find_tool(missing)


def test_a_cache_that_cannot_be_made_is_status_3():
    done = program("true", XDG_CACHE_HOME="/proc/nowhere")
    assert done.returncode == 3
    assert "set XDG_CACHE_HOME" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_teaches():
    done = program("--help")
    assert done.returncode == 0
    for word in ("examples:", "exit status:", "--with", "--out", "124", "Ctrl-]", "/checkout"):
        assert word in done.stdout


def test_environment_options(monkeypatch):
    monkeypatch.setenv("PASSED", "outside")
    made = cli._environment(["A=b=c", "PASSED", "NOT_SET_ANYWHERE"])
    assert (made["A"], made["PASSED"]) == ("b=c", "outside")
    assert "NOT_SET_ANYWHERE" not in made
    assert made["PYTHONPATH"] == "/checkout"


# --- the real one --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_kvm_in_the_emulated_host(tmp_path):
    """KVM_GET_API_VERSION (0xAE00) is 12 (the KVM API, section 4.1), on the real kvm_amd."""
    script = (
        "import fcntl, os, pathlib, sys, structlog, hypervisor, devices\n"
        "print(fcntl.ioctl(os.open('/dev/kvm', os.O_RDWR), 0xAE00), os.path.exists('/sys/module/kvm_amd'))\n"
        "pathlib.Path('/out/result').write_text(sys.stdin.read().upper())\n"
        "pathlib.Path('/checkout/written').write_text('x')\n"
        "sys.exit(33)\n"
    )
    done = subprocess.run(
        [PROGRAM, "--timeout", "300", "--out", tmp_path, "--", "python3", "-c", script],
        input="typed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (33, "12 True\n"), done.stderr
    assert (tmp_path / "result").read_text() == "TYPED"
    assert not (SCRIPTS.parent / "written").exists()

"""`hv run --profile`: what it is told wrongly, disks that are full, and runs that are killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from hypervisor.profile.file import load

pytestmark = pytest.mark.kvm

SECONDS = 120
# mov dx,0x5000; l: mov cx,8; m: out dx,al; inc dx; loop m; sub dx,8; jmp l: eight ports in turn, for ever (16-bit)
IN_TURN = bytes.fromhex("ba0050 b90800 ee 42 e2fc 83ea08 ebf4".replace(" ", ""))
# the same 8 * 4096 times, then status 7
MANY = bytes.fromhex("ba0050 be0010 b90800 ee 42 e2fc 83ea08 4e 75f3 b007 e6f4 f4".replace(" ", ""))


@pytest.fixture
def image(tmp_path):
    def write(code):
        path = tmp_path / "guest.bin"
        path.write_bytes(code)
        return str(path)

    return write


def command(path, *arguments):
    options = ["--flat", "16", "--ram", "2", "--debug-exit", "raw"]
    return [sys.executable, "-m", "hypervisor", "run", path, *options, *arguments]


def run(words):
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)


def ports_of(profile):
    """Return the offset of the port of each traced exit to one of the eight, in order."""
    ports = []
    for chunk in profile.trace():
        addresses = [profile.trace_rows[row].address for row in chunk.row.tolist()]
        ports += [address - 0x5000 for address in addresses if address is not None and 0x5000 <= address < 0x5008]
    return ports


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--profile", "p,every=x"], 2, "every=x"),
        (["--profile", "p,every=-1"], 2, "every=-1"),
        (["--profile", "p,every=4294967296"], 2, "4294967296"),
        (["--profile", "p,every"], 2, "every"),
        (["--profile", "p,trace=maybe"], 2, "trace=maybe"),
        (["--profile", "p,nothing=1"], 2, "nothing=1"),
        (["--profile", ",every=1"], 2, "names no file"),
        (["--profile", ""], 2, "names no file"),
        (["--profile", "."], 3, "cannot write ."),
        (["--profile", "missing/p"], 3, "cannot write missing/p"),
        (["--profile", "/dev/full"], 3, "No space left"),
        (["--mark-port", "0x3f8"], 2, "uart0"),
        (["--mark-port", "0xf4"], 2, "debug-exit"),
        (["--mark-port", "65536"], 2, "0x10000"),
        (["--mark-port", "-1"], 2, "-0x1"),
        (["--mark-text", "("], 2, "no regular expression"),
        (["--mark-text", "[a-"], 2, "no regular expression"),
    ],
)
def test_what_is_told_wrongly(image, tmp_path, monkeypatch, *, arguments, status, words):
    guest = image(MANY)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    result = run(command(guest, *arguments))
    assert result.returncode == status
    first, *hints = result.stderr.splitlines()
    assert first.startswith("hv: ")
    assert words in first
    assert len(hints) <= 1
    assert all(hint.startswith("    ") for hint in hints)


@pytest.mark.parametrize("port", ["abc", "", "0x", "1.5"])
def test_a_mark_port_that_is_no_number(image, port):
    result = run(command(image(MANY), "--mark-port", port))
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[-1] == f"hv run: error: argument --mark-port: {port!r} is no number such as 0x5658"
    )


def test_a_whole_run(image, tmp_path):
    path = str(tmp_path / "p")
    result = run(command(image(MANY), "--profile", f"{path},every=100", "--mark-port", "0x5000"))
    assert (result.returncode, result.stderr) == (7, "")
    profile = load(path)
    assert not any("end" in note or "lacks" in note for note in profile.notes)
    assert profile.exits.pio(direction="out").count == 8 * 4096 + 1
    assert profile.exits.pio("marks").count == 4096
    assert ports_of(profile) == [*range(8)] * 4096


def test_a_file_that_may_not_grow_ends_and_the_guest_goes_on(image, tmp_path):
    path = str(tmp_path / "p")
    words = command(image(MANY), "--profile", path)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))"
    script = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    result = run([sys.executable, "-c", script, *words])
    assert result.returncode == 7
    assert result.stderr == f"hv: the profile {path} ends early: File too large\n"
    assert os.path.getsize(path) <= 100 << 10
    profile = load(path)
    assert "the run did not end in order: its last moments are not in the file" in profile.notes
    ports = ports_of(profile)
    assert ports == ([*range(8)] * 4096)[: len(ports)]
    assert profile.exits.count >= len(ports)


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_ends_the_profile_and_the_guest_goes_on(image, tmp_path):
    disk, kept = tmp_path / "disk", str(tmp_path / "kept")
    disk.mkdir()
    words = command(image(MANY), "--profile", str(disk / "p"))
    script = 'mount -t tmpfs -o size=256k none "$0" && { "$@"; status=$?; cp "$0/p" "$KEPT"; exit $status; }'
    result = run(["env", f"KEPT={kept}", "unshare", "-m", "sh", "-c", script, str(disk), *words])
    assert result.returncode == 7, result.stderr
    assert result.stderr == f"hv: the profile {disk / 'p'} ends early: No space left on device\n"
    profile = load(kept)
    assert "the run did not end in order: its last moments are not in the file" in profile.notes
    ports = ports_of(profile)
    assert 0 < len(ports) < 8 * 4096
    assert ports == ([*range(8)] * 4096)[: len(ports)]


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_is_killed_leaves_a_beginning(image, tmp_path, seed):
    """SIGKILL at any time: what is in the file is true, complete up to some moment, and says that it ends there."""
    path = tmp_path / "p"
    process = subprocess.Popen(command(image(IN_TURN), "--profile", str(path)), stdin=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not (path.exists() and path.stat().st_size > 8) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.8))
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=SECONDS) == -signal.SIGKILL
    profile = load(str(path))
    assert "the run did not end in order: its last moments are not in the file" in profile.notes
    ports = ports_of(profile)
    assert ports == [number % 8 for number in range(len(ports))]
    exits = profile.exits.pio()
    assert exits.count >= len(ports)
    assert sum(exits.symbols.values()) == len(ports)
    counts = [exits.pio(0x5000 + number).count for number in range(8)]
    if exits.count == len(ports):
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[7] <= 1


def test_what_kvm_handles_can_be_left_out(image, tmp_path):
    """Then nothing is said of it either."""
    profile = tmp_path / "profile"
    assert run(command(image(MANY), "--profile", f"{profile},kernel=off")).returncode == 7
    found = load(str(profile))
    assert not found.exits.layer("kernel").rows
    assert not any("KVM" in note for note in found.notes)

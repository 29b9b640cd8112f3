"""`hv snapshot save` and `restore`: running machines into snapshots and out of them, by the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.kvm

TIMEOUT = 120
GUEST = ["dirtier", "--ram", "96", "--append", "0 5 2000000 24", "--debug-exit", "raw"]
"""It runs until something is typed."""


@pytest.fixture(autouse=True)
def own_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def hv(*arguments, status=0):
    run = subprocess.run(
        [sys.executable, "-m", "hypervisor", *map(str, arguments)],
        input="end",
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout if status == 0 else run.stderr


@pytest.fixture
def running():
    """Return a function that starts `hv` in the background; what runs at the end is killed."""
    processes = []

    def start(*arguments, name):
        command = [sys.executable, "-m", "hypervisor", *arguments, "--name", name]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        until = time.monotonic() + TIMEOUT
        while not any(one["name"] == name for one in json.loads(hv("top", "--once", "--json"))["machines"]):
            assert time.monotonic() < until
            assert processes[-1].poll() is None
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_saved_while_it_runs_and_restored_as_often_as_one_likes(running, tmp_path):
    process = running("run", *GUEST, name="web")
    hv("snapshot", "save", "web", "booted", "--track")
    hv("snapshot", "save", "web", "later", "--base", "booted", "--zstd")
    assert process.poll() is None, "the machine goes on"
    info = json.loads(hv("snapshot", "info", "later", "--json"))
    assert info["machine"]["ram_mib"] == 96
    assert "is whole" in hv("snapshot", "check", "later")
    assert "pages differ" in hv("snapshot", "diff", "booted", "later")
    process.communicate(b"end", timeout=TIMEOUT)
    assert process.returncode == 0
    for name in ("booted", "later"):
        hv("snapshot", "restore", name)
        hv("snapshot", "restore", name, "--clone", "--no-verify", "--advance")


def test_suspended_and_resumed(running):
    process = running("run", *GUEST, name="web")
    hv("snapshot", "save", "web", "tonight", "--suspend")
    assert process.wait(TIMEOUT) == 0
    resumed = running("snapshot", "restore", "tonight", name="again")
    hv("snapshot", "save", "again", "tomorrow", "--suspend")
    assert resumed.wait(TIMEOUT) == 0
    hv("snapshot", "restore", "tomorrow")


def test_what_cannot_be_saved(running, tmp_path):
    assert "no machine is called 'nobody'" in hv("snapshot", "save", "nobody", "s", status=2)
    running("run", "spin", name="web")
    (tmp_path / "file").write_text("precious")
    assert "file" in hv("snapshot", "save", "web", "file", status=3)
    assert (tmp_path / "file").read_text() == "precious"
    assert "nowhere" in hv("snapshot", "save", "web", "nowhere/s", status=3)
    assert "base" in hv("snapshot", "save", "web", "s", "--base", "base", status=3)
    assert sorted(os.listdir(tmp_path)) == ["file", "trapvisor"]


def test_what_cannot_be_restored(running, tmp_path):
    process = running("run", *GUEST, name="web")
    hv("snapshot", "save", "web", "s", "--suspend")
    process.wait(TIMEOUT)
    assert "none" in hv("snapshot", "restore", "none", status=2)
    assert "no manifest.json" in hv("snapshot", "restore", ".", status=2)
    assert "console" in hv("snapshot", "restore", "s", "--console", "nonsense", status=2)
    assert "net" in hv("snapshot", "restore", "s", "--net", "none", status=2), "a device that it never had"
    memory = bytearray((tmp_path / "s" / "memory").read_bytes())
    memory[70 << 20] ^= 1
    (tmp_path / "s" / "memory").write_bytes(memory)
    error = hv("snapshot", "restore", "s", status=2)
    assert "memory" in error
    assert "0x4600000" in error or "guest" in error, "where"


def test_ctrl_c_ends_a_restored_machine_as_one_that_was_booted(running):
    process = running("run", "spin", name="web")
    hv("snapshot", "save", "web", "s", "--suspend")
    process.wait(TIMEOUT)
    resumed = running("snapshot", "restore", "s", name="again")
    resumed.send_signal(signal.SIGINT)
    assert resumed.wait(TIMEOUT) == 128 + signal.SIGINT

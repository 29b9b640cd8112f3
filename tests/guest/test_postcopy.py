"""Machines that run at the target before all of their memory is there. The target is a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from struct import pack

import pytest
from test_journal import FOREVER, content, done_in, journal, last_of, new_disk, what_is_wrong
from test_migration import migrate
from waiting import until

from hypervisor import Machine, MachineConfig
from hypervisor.errors import ConfigError, VmmError
from hypervisor.migration.wire import Kind, MigrationError, Tls, connect
from hypervisor.outcome import Stop
from hypervisor.pageserver import PageServer
from hypervisor.profile.live_client import request

pytestmark = pytest.mark.kvm

TIMEOUT = 120
MOVE = {"postcopy": True, "most_rounds": 1, "downtime": 0.030001}
"""What does not converge."""
ASKED = 5
PROGRAM = """
import json, sys
from hypervisor.migration.target import receive
from hypervisor.migration.wire import Listener
listener = Listener(sys.argv[1])
print("ready", flush=True)
with receive(listener.accept(120), accept=listener.accept) as machine:
    listener.close()
    machine.start()
    print("mine", flush=True)
    machine.console.write(b"end")
    outcome = machine.wait(120)
    words = {"reason": outcome.reason.name, "status": outcome.status, "message": outcome.message}
    print(json.dumps(words | {"said": machine.console.output.decode()}), flush=True)
"""


@contextmanager
def target(address, program=PROGRAM):
    with subprocess.Popen(
        [sys.executable, "-c", program, address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process
        finally:
            process.kill()
            print("the target:", *process.communicate())  # for who reads why a test failed


def dirtier(pages=400):
    """Write to `pages` pages every millisecond or so, until something is typed."""
    return MachineConfig("dirtier", ram_mib=96, debug_exit="raw", append=f"0 {pages} 2000000 24")


def end_of(process):
    assert process.stdout.readline() == b"mine\n"
    return json.loads(process.stdout.readline())


def everything_follows(monkeypatch, machine):
    """Have all of memory change just before the stop, however little a busy host lets the guest do.

    What is not asked for goes only when ASKED pages were.
    """
    fits = iter([False, True])  # memory does not fit into the downtime, disks do
    monkeypatch.setattr("hypervisor.migration.source._Source._fits", lambda *_: next(fits))
    stand_still = machine.stand_still

    def late(function):
        if machine.memory.is_tracked:
            machine.memory.written(0, machine.memory.size)
        return stand_still(function)

    monkeypatch.setattr(machine, "stand_still", late)
    batch = PageServer._batch
    monkeypatch.setattr(PageServer, "_batch", lambda self, most: batch(self, most) if self.asked >= ASKED else ())


@pytest.mark.parametrize("everything", [False, True])
def test_a_guest_that_does_not_converge_loses_nothing(tmp_path, monkeypatch, everything):
    address = f"unix:{tmp_path}/socket"
    with target(address) as process, Machine(dirtier()) as machine:
        if everything:
            everything_follows(monkeypatch, machine)
        machine.start()
        time.sleep(0.2)
        result = migrate(machine, address, **MOVE)
        assert machine.wait(TIMEOUT).reason is Stop.MIGRATED
        there = end_of(process)
    assert (there["reason"], there["status"]) == ("GUEST_EXIT", 0)
    assert result.rounds <= 3
    if everything:
        assert result.late == machine.memory.size // 4096
        assert result.asked >= ASKED


def test_a_guest_that_ends_before_all_is_there_is_not_lost(tmp_path, monkeypatch):
    """What it has not asked for is of no more use."""
    address = f"unix:{tmp_path}/socket"
    with target(address) as process, Machine(dirtier()) as machine:
        everything_follows(monkeypatch, machine)
        send, sent = PageServer._send, []
        monkeypatch.setattr(PageServer, "_batch", lambda *_: (0, 1) if not sent else ())
        monkeypatch.setattr(PageServer, "_send", lambda self, *run: (sent.append(run), send(self, *run)))
        machine.start()
        result = migrate(machine, address, **MOVE)
        there = end_of(process)
    assert (there["reason"], there["status"]) == ("GUEST_EXIT", 0)
    assert len(sent) < result.late


def test_one_that_converges_needs_no_second_half(tmp_path):
    address = f"unix:{tmp_path}/socket"
    with target(address) as process, Machine(dirtier(pages=1)) as machine:
        machine.start()
        result = migrate(machine, address, postcopy=True, downtime=30)
        there = end_of(process)
    assert there["status"] == 0
    assert result.late == 0


def test_a_disk_works_while_pages_are_missing(tmp_path, monkeypatch):
    """Rings, headers and data lie in pages that are not there: its threads and the kernel wait for them."""
    disk = new_disk(tmp_path, "raw")
    address = f"unix:{tmp_path}/socket"
    with target(address) as process:
        with journal(str(disk), FOREVER) as machine:
            everything_follows(monkeypatch, machine)
            machine.start()
            while done_in(machine.console.output) < 5:
                machine.console.read(timeout=1)
            result = migrate(machine, address, **MOVE)
            said = machine.console.output
        assert process.stdout.readline() == b"mine\n"
        until(lambda: last_of(disk.read_bytes()) > done_in(said))
    assert result.late == machine.memory.size // 4096
    image = content(tmp_path / "copy", disk.read_bytes())
    assert what_is_wrong(image, done_in(said) + 1) is None


# --- what goes wrong --------------------------------------------------------------------------------------------------


def goes_on(machine):
    """The guest is still here, and ends as it should."""
    machine.console.write(b"end")
    assert machine.wait(TIMEOUT).status == 0


SOURCE = """
import sys, time
from hypervisor import Machine, MachineConfig
from hypervisor import pageserver
from hypervisor.migration.source import _Source, migrate
fits = iter([False, True])
_Source._fits = lambda *_: next(fits)
left = int(sys.argv[2])
send = pageserver.PageServer._send
def slow(self, first, count):
    global left
    if not left:
        time.sleep(100)
    left -= 1
    send(self, first, count)
pageserver.PageServer._send = slow
with Machine(MachineConfig("dirtier", ram_mib=224, debug_exit="raw", append="0 2000 2000000 150")) as machine:
    stand_still = machine.stand_still
    def late(function):
        machine.memory.written(0, machine.memory.size)  # all of it changes
        return stand_still(function)
    machine.stand_still = late
    machine.start()
    time.sleep(0.3)
    migrate(machine, sys.argv[1], postcopy=True, most_rounds=1, downtime=0.030001)
"""
"""It stops sending after so many runs of pages."""


@pytest.mark.parametrize("sent", [0, 3, 10])
def test_a_source_that_is_lost_on_the_way_takes_the_guest_with_it(tmp_path, sent):
    """The target ends, whoever waits for a page there, with status 3 and in words; the guest runs on nothing wrong."""
    address = f"unix:{tmp_path}/socket"
    with target(address) as process, subprocess.Popen([sys.executable, "-c", SOURCE, address, str(sent)]) as source:
        assert process.stdout.readline() == b"mine\n"
        time.sleep(0.1)
        source.kill()
        said, complaint = process.communicate(timeout=TIMEOUT)
    if said:
        there = json.loads(said)
        assert (there["reason"], there["status"]) == ("LOST", 3)
        message = there["message"]
    else:  # somebody could not be told
        assert process.returncode == 3
        message = complaint.decode()
    assert "the source is gone" in message
    assert "the guest is lost" in message


def wait_until_it_waits(pid):
    """Until the main thread sleeps outside of any system call: in a page fault."""
    until(lambda: Path(f"/proc/{pid}/syscall").read_text().startswith("-1 "))


def test_a_thread_that_waits_for_a_page_is_not_told_but_the_process_ends(tmp_path):
    """It holds the GIL, so nothing in Python can be done any more. It must not go on with zeroes."""
    address = f"unix:{tmp_path}/socket"
    touch = "for page in reversed(range(64 << 8, 200 << 8)): machine.memory.read(page << 12, 1)\n    "
    program = PROGRAM.replace("outcome = machine", touch + 'print("read", flush=True)\n    outcome = machine')
    with target(address, program) as process, subprocess.Popen([sys.executable, "-c", SOURCE, address, "3"]) as source:
        assert process.stdout.readline() == b"mine\n"
        wait_until_it_waits(process.pid)
        source.kill()
        said, complaint = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (3, b"")
    assert b"the guest is lost" in complaint


def test_a_target_that_is_lost_on_the_way_takes_the_guest_with_it(tmp_path, monkeypatch):
    """Here nothing may go on: it ran there already."""
    address = f"unix:{tmp_path}/socket"
    program = PROGRAM.replace('print("mine", flush=True)', "import os; os.kill(os.getpid(), 9)")
    with target(address, program), Machine(dirtier()) as machine:
        everything_follows(monkeypatch, machine)
        monkeypatch.setattr(PageServer, "_batch", lambda *_: ())  # never all of it
        machine.start()
        with pytest.raises(MigrationError, match="the guest is lost") as caught:
            migrate(machine, address, **MOVE)
        assert not caught.value.is_certain
        assert machine.wait(TIMEOUT).reason is Stop.MIGRATED


@pytest.mark.parametrize("when", ["Machine.load", "Pager.take_over"])
def test_a_target_that_fails_before_it_is_let_go_leaves_the_guest_here(tmp_path, when):
    address = f"unix:{tmp_path}/socket"
    imports = "import os\nfrom hypervisor.kvm.pager import Pager\nfrom hypervisor.machine import Machine\n"
    patch = f"{imports}{when} = lambda *_: os.kill(os.getpid(), 9)\n"
    with target(address, patch + PROGRAM), Machine(dirtier()) as machine:
        machine.start()
        time.sleep(0.1)
        with pytest.raises(MigrationError) as caught:
            migrate(machine, address, **MOVE)
        assert caught.value.is_certain
        goes_on(machine)


def test_a_host_without_userfaultfd_says_so_before_anything_is_moved(tmp_path):
    address = f"unix:{tmp_path}/socket"
    refuse = "import hypervisor.kvm.pager as pager\npager.lib = type('Lib', (), {'hv_uffd_open': lambda _: -1})()\n"
    with target(address, refuse + PROGRAM), Machine(dirtier(pages=1)) as machine:
        machine.start()
        with pytest.raises(MigrationError, match=r"userfaultfd.*Operation not permitted"):
            migrate(machine, address, postcopy=True)
        goes_on(machine)


def test_not_over_tls(tmp_path):
    with Machine(dirtier()) as machine, pytest.raises(ConfigError, match="TLS"):
        migrate(machine, f"unix:{tmp_path}/socket", postcopy=True, tls=Tls("a", "b", "c"))


# --- the whole way: hv's own processes --------------------------------------------------------------------------------


def hv(*words, **how):
    return subprocess.Popen([sys.executable, "-m", "hypervisor", *map(str, words)], **how)


def test_hv_migrate_with_everything(tmp_path):
    """A guest that is too fast, and its disk, to another process: who asked is told when all of it is there."""
    disk, copy, name = new_disk(tmp_path, "raw"), tmp_path / "copy", f"test-{os.getpid()}"
    quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = ["run", "dirtier", "--ram", 96, "--append", "0 400 2000000 24", "--debug-exit", "raw", "--name", name]
    with (
        hv("migrate", "receive", f"unix:{tmp_path}/socket", "--disk", copy, **quiet) as there,
        hv(*run, "--disk", disk, **quiet) as here,
    ):
        try:
            wait_until_known(name)
            wait_until_listening(f"{tmp_path}/socket")
            send = ["migrate", "send", name, f"unix:{tmp_path}/socket", "--postcopy", "--copy-disks", "--json"]
            with hv(*send, "--downtime", "30.001", **quiet) as sender:
                said, complaint = sender.communicate(timeout=TIMEOUT)
            assert sender.returncode == 0, complaint
            assert json.loads(said)["rounds"] >= 2
            assert here.wait(TIMEOUT) == 0, here.stderr.read()
            there.stdin.write(b"end")
            there.stdin.flush()
            assert there.wait(TIMEOUT) == 0, there.stderr.read()
        finally:
            here.kill()
            there.kill()
    assert copy.read_bytes() == disk.read_bytes()


def wait_until_listening(path):
    listens = re.compile(rf" 00010000 .* {re.escape(path)}$", re.MULTILINE)  # __SO_ACCEPTCON
    until(lambda: listens.search(Path("/proc/net/unix").read_text()))


def wait_until_known(name):
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return request(name, {"do": "progress"})
        except VmmError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# --- an enemy at the other end ----------------------------------------------------------------------------------------


class Enemy:
    """A source that has got as far as its second connection."""

    def __init__(self, address, word="right"):
        with Machine(MachineConfig("checksum", ram_mib=8)) as machine:
            disks = {"copied": False, "images": {}, "paths": []}
            form = {"version": 1, "program": "x", "disks": disks, "pager": "right", **machine.describe()}
        self.wire = connect(address)
        self.wire.send(Kind.HELLO, form)
        assert self.wire.receive().kind is Kind.READY
        second = connect(address)
        second.send(Kind.PAGER, {"token": word})
        self.pages = second.detach()

    def hears(self, kind):
        return self.wire.receive().kind is kind

    def close(self):
        self.wire.close()
        self.pages.close()


def complaint_of(process):
    _, complaint = process.communicate(timeout=TIMEOUT)
    return complaint.decode().splitlines()[-1]


def test_a_second_connection_from_somebody_else_is_refused(tmp_path):
    with target(f"unix:{tmp_path}/socket") as process:
        enemy = Enemy(f"unix:{tmp_path}/socket", word="wrong")
        assert enemy.hears(Kind.REFUSED)
        enemy.close()
        assert "MigrationError" in complaint_of(process)


@pytest.mark.parametrize("missing", [[[0, 1 << 40]], [[2048, 1]], [[-1, 1]], [["0", 1]], "x", [[0]], {"a": 1}])
def test_missing_pages_that_belong_nowhere_are_refused(tmp_path, missing):
    with target(f"unix:{tmp_path}/socket") as process:
        enemy = Enemy(f"unix:{tmp_path}/socket")
        enemy.wire.send(Kind.STATE, {"state": {}, "paused": False, "missing": missing})
        assert enemy.hears(Kind.REFUSED)
        enemy.close()
        assert "MigrationError" in complaint_of(process)


@pytest.mark.parametrize("run", [(0, 0), (0, 65), (2048, 1), (1 << 63, 1), (5, 1), (2047, 2), (0, 1 << 63)])
def test_pages_that_were_not_missing_are_not_taken(tmp_path, run):
    """The target has not begun: it gives up, and says so."""
    with target(f"unix:{tmp_path}/socket") as process:
        enemy = Enemy(f"unix:{tmp_path}/socket")
        enemy.wire.send(Kind.STATE, {"state": {}, "paused": False, "missing": [[0, 1], [64, 1]]})
        enemy.pages.sendall(pack("<QQ", *run) + bytes(4096))
        with suppress(ConnectionResetError):
            assert enemy.pages.recv(8) == b""
        assert enemy.hears(Kind.REFUSED)
        enemy.close()
        assert "SnapshotError" in complaint_of(process)

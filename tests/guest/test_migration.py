"""Machines that move to another process while their guests run; and what goes wrong on the way."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from hypervisor import Machine, MachineConfig
from hypervisor.errors import ConfigError, HostError
from hypervisor.host import is_software_kvm
from hypervisor.migration.source import OVERHEAD, _Source
from hypervisor.migration.source import migrate as _migrate
from hypervisor.migration.target import receive
from hypervisor.migration.wire import Kind, Listener, MigrationError, connect
from hypervisor.outcome import Stop
from hypervisor.profile.live_client import request

pytestmark = pytest.mark.kvm

TIMEOUT = 120
DOWNTIME = 10
"""Seconds for who shall move, however slowly a busy host does it."""
IS_SOFTWARE = is_software_kvm()
DIRTIER = {"kernel": "dirtier", "ram_mib": 96}
"""Writes to 24 MiB in steps of a millisecond or so until something is typed, and checks every page then."""


migrate = partial(_migrate, seconds=TIMEOUT)
"""A target on a busy host may be silent for a while, and is not gone."""


def impatient(monkeypatch, seconds):
    """Have sources wait only so long for the last word, which does not come; those before it may take their time."""
    let_go = _Source._let_go

    def soon(self, disks):
        self._wire._socket.settimeout(seconds)
        let_go(self, disks)

    monkeypatch.setattr(_Source, "_let_go", soon)


def config(settings):
    return MachineConfig(**({"ram_mib": 8, "debug_exit": "raw"} | settings))


def dirtier(pages=5):
    return DIRTIER | {"append": f"0 {pages} 2000000 24"}


TARGETS = []


class Target:
    """A target in this process: takes one machine and runs it to its end."""

    def __init__(self, path):
        self.listener = Listener(f"unix:{path}")
        TARGETS.append(self)
        self.outcome = self.error = None
        self.output = b""
        self.thread = threading.Thread(target=self._main)
        self.thread.start()

    def _main(self):
        try:
            with receive(self.listener.accept(TIMEOUT)) as machine:
                machine.console.write(b"end")
                self.outcome = machine.run(TIMEOUT)
                self.output = machine.console.output
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def end(self):
        self.thread.join(TIMEOUT)
        self.listener.close()
        return self


@pytest.fixture(autouse=True)
def no_target_stays():
    yield
    while TARGETS:
        TARGETS.pop().end()


WORK = {
    "checksum": ({"kernel": "checksum"}, 20_000_000 if IS_SOFTWARE else 200_000_000),
    "four": ({"kernel": "late-ap", "cpus": 4}, 20_000 if IS_SOFTWARE else 300_000_000),
    "pit": ({"kernel": "timer"}, 10 if IS_SOFTWARE else 300),
}


@pytest.mark.parametrize("name", WORK)
def test_a_moved_guest_goes_on_as_if_nothing_had_been(tmp_path, name):
    """On a busy host it may be over before it has moved: then one that has more to do is."""
    settings, number = WORK[name]
    for attempt, factor in enumerate([1, 4] + [16] * 8):
        settings = settings | {"append": str(number * factor)}
        target = Target(tmp_path / f"socket{attempt}")
        with Machine(config(settings)) as machine:
            machine.pause()
            machine.start()
            time.sleep(0.01)
            machine.resume()
            try:
                result = migrate(machine, target.listener.address)
            except MigrationError:
                assert machine.wait(TIMEOUT).status == 0
                continue
            assert machine.wait(TIMEOUT).reason is Stop.MIGRATED
            first = machine.console.output
        break
    else:
        pytest.fail("it was always over before it had moved")
    assert target.end().error is None
    with Machine(config(settings)) as machine:
        status, whole = machine.run(TIMEOUT).status, machine.console.output
    assert (target.outcome.status, first + target.output) == (status, whole)
    assert result.sent > 4096
    assert 0 < result.downtime <= result.seconds


def test_a_guest_that_writes_all_the_while_loses_nothing(tmp_path):
    target = Target(tmp_path / "socket")
    with Machine(config(dirtier())) as machine:
        machine.start()
        time.sleep(0.2)
        result = migrate(machine, f"unix:{tmp_path}/socket", downtime=DOWNTIME)
        assert machine.outcome.reason is Stop.MIGRATED
    target.end()
    assert target.error is None
    assert (target.outcome.reason, target.outcome.status) == (Stop.GUEST_EXIT, 0)
    assert result.rounds >= 2


def test_a_paused_machine_arrives_paused(tmp_path):
    listener = Listener(f"unix:{tmp_path}/socket")
    arrived = []
    thread = threading.Thread(target=lambda: arrived.append(receive(listener.accept(TIMEOUT))))
    thread.start()
    with Machine(config(dirtier())) as machine:
        machine.start()
        machine.pause()
        mover = threading.Thread(target=lambda: migrate(machine, listener.address))
        mover.start()
        thread.join(TIMEOUT)
        with arrived[0] as there:
            there.start()
            mover.join(TIMEOUT)
            assert there.is_paused
            before = there.vcpus[0].registers
            time.sleep(0.02)
            assert there.vcpus[0].registers == before
            there.resume()
            there.console.write(b"end")
            assert there.wait(TIMEOUT).status == 0
    listener.close()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def goes_on(machine):
    """The guest is still here, and ends as it should."""
    assert not machine.memory.is_tracked
    machine.console.write(b"end")
    assert machine.wait(TIMEOUT).status == 0


def test_nobody_listens(tmp_path):
    with Machine(config(dirtier())) as machine:
        machine.start()
        with pytest.raises(MigrationError, match="cannot connect"):
            migrate(machine, f"unix:{tmp_path}/socket")
        goes_on(machine)


@pytest.mark.parametrize("address", ["", "unix:", "tcp:host", "tcp:host:99999", "carrier-pigeon:x"])
def test_what_is_no_address(address):
    with Machine(config(dirtier())) as machine, pytest.raises(ConfigError, match="is no address"):
        migrate(machine, address)


def test_a_target_that_is_no_target(tmp_path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{tmp_path}/socket")
    server.listen()

    def talk():
        with server.accept()[0] as connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\nno such thing here")

    thread = threading.Thread(target=talk)
    thread.start()
    with Machine(config(dirtier())) as machine:
        machine.start()
        with pytest.raises(MigrationError, match=r"does not speak this protocol|broke"):
            migrate(machine, f"unix:{tmp_path}/socket")
        thread.join()
        goes_on(machine)
    server.close()


def test_given_up_by_the_user(tmp_path):
    target = Target(tmp_path / "socket")
    given_up = threading.Event()
    with Machine(config(dirtier())) as machine:
        machine.start()
        with pytest.raises(MigrationError, match="cancelled"):
            migrate(machine, f"unix:{tmp_path}/socket", progress=lambda _: given_up.set(), cancelled=given_up)
        goes_on(machine)
    assert isinstance(target.end().error, MigrationError)


def test_a_guest_that_is_too_quick_for_the_downtime(tmp_path):
    target = Target(tmp_path / "socket")
    with Machine(config(dirtier(pages=400))) as machine:
        machine.start()
        time.sleep(0.05)
        with pytest.raises(MigrationError, match="faster than") as caught:
            migrate(machine, f"unix:{tmp_path}/socket", downtime=OVERHEAD / 2, most_rounds=3)
        assert "standing still" in caught.value.hint
        machine.kill()
    assert isinstance(target.end().error, MigrationError)


def test_a_machine_that_ends_on_the_way(tmp_path):
    target = Target(tmp_path / "socket")
    with Machine(config(dirtier())) as machine:
        machine.start()
        with pytest.raises(MigrationError, match=r"ended|hung up") as caught:
            migrate(machine, f"unix:{tmp_path}/socket", progress=lambda _: machine.kill())
        assert caught.value.is_certain
    assert target.end().error is not None


@pytest.mark.parametrize("last", [Kind.HELLO, Kind.PAGES, Kind.STATE])
def test_a_target_that_dies_before_it_is_let_go_has_nothing(tmp_path, last):
    listener = Listener(f"unix:{tmp_path}/socket")

    def die():
        wire = listener.accept(TIMEOUT)
        while True:
            frame = wire.receive()
            if frame.kind is last:
                break
            if frame.kind is Kind.HELLO:
                wire.send(Kind.READY)
            wire.read_into(memoryview(bytearray(frame.size)))
        wire.close()

    thread = threading.Thread(target=die)
    thread.start()
    with Machine(config(dirtier())) as machine:
        machine.start()
        with pytest.raises(MigrationError) as caught:
            migrate(machine, listener.address)
        assert caught.value.is_certain
        goes_on(machine)
    thread.join()
    listener.close()


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_target_that_is_gone_when_it_was_let_go(tmp_path, monkeypatch, transport, silent):
    """An end in order is certain. Silence is not: the guest stands still, as it must not run twice, until one knows."""
    listener = Listener(f"unix:{tmp_path}/socket" if transport == "unix" else "tcp:127.0.0.1:0")
    hold = threading.Event()
    if silent:
        impatient(monkeypatch, 4)
    thread = threading.Thread(target=vanish, args=(listener, hold.wait if silent else lambda: None))
    thread.start()
    with Machine(config(dirtier())) as machine:
        machine.start()
        with pytest.raises(MigrationError) as caught:
            migrate(machine, listener.address, downtime=DOWNTIME)
        assert caught.value.is_certain is not silent
        if silent:
            before = stands_still(machine)
            time.sleep(0.05)
            assert stands_still(machine) == before
            machine.resume()
        goes_on(machine)
        hold.set()
    thread.join()
    listener.close()


def vanish(listener, before):
    """Take a machine up to the word that it is let go, and hang up when `before` returns."""
    wire = listener.accept(TIMEOUT)
    while (frame := wire.receive()).kind is not Kind.GO:
        if frame.kind is Kind.HELLO:
            wire.send(Kind.READY)
        elif frame.kind is Kind.STATE:
            wire.send(Kind.LOADED)
        wire.read_into(memoryview(bytearray(frame.size)))
    before()
    wire.close()


def stands_still(machine):
    assert machine.is_paused
    assert machine.outcome is None
    return machine.vcpus[0].registers


@pytest.mark.parametrize("where", ["here", "there"])
def test_whoever_knows_where_it_is_says_so(tmp_path, monkeypatch, where):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("hypervisor.migration.source.migrate", migrate)
    impatient(monkeypatch, 1)
    listener, hold = Listener("tcp:127.0.0.1:0"), threading.Event()
    thread = threading.Thread(target=vanish, args=(listener, hold.wait))
    thread.start()

    def hv(*words):
        command = [sys.executable, "-m", "hypervisor", "migrate", *words]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        return run.returncode, run.stderr

    with Machine(config(dirtier())) as machine:
        machine.publish("web")
        machine.start()
        assert hv("settle", "web", "--here")[0] == 3, "it is here"
        status, said = hv("send", "web", listener.address, "--downtime", str(1000 * DOWNTIME))
        assert status == 3
        assert "nobody knows" in said
        assert "hv migrate settle" in said
        before = stands_still(machine)
        for what in ({"do": "resume"}, {"do": "migrate", "to": listener.address}, {"do": "settle"}):
            with pytest.raises(HostError):
                request("web", what)
        assert stands_still(machine) == before
        assert hv("settle", "web", f"--{where}") == (0, "")
        if where == "here":
            assert hv("settle", "web", "--there")[0] == 3, "it is settled"
            goes_on(machine)
        else:
            assert (machine.wait(TIMEOUT).reason, machine.outcome.status) == (Stop.MIGRATED, 0)
        hold.set()
    thread.join()
    listener.close()


PROGRAM = """
import sys
from hypervisor.migration.target import receive
from hypervisor.migration.wire import Listener
listener = Listener(sys.argv[1])
print("ready", flush=True)
with receive(listener.accept(120)) as machine:
    machine.start()
    print("mine", flush=True)
    machine.console.write(b"end")
    print("status", machine.wait(120).status, flush=True)
"""


def attempt(machine, address):
    """Move a machine; return whether it moved, which must be certain."""
    try:
        migrate(machine, address)
    except MigrationError as error:
        if not error.is_certain:
            raise
        return False
    return True


def test_a_target_killed_at_a_random_moment_leaves_exactly_one_owner(tmp_path):
    """Again and again: either it has said that it has the guest, or the guest goes on here."""
    chance = random.Random(3)
    here = there = 0
    for number in range(12 if IS_SOFTWARE else 6):
        address = f"unix:{tmp_path}/socket{number}"
        with subprocess.Popen([sys.executable, "-c", PROGRAM, address], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            killer = threading.Timer(chance.random() * 0.25, process.send_signal, [signal.SIGKILL])
            with Machine(config(dirtier())) as machine:
                machine.start()
                killer.start()
                moved = attempt(machine, address)
                if not moved:
                    assert b"mine" not in process.stdout.read()
                    goes_on(machine)
                    here += 1
                else:
                    assert machine.wait(TIMEOUT).reason is Stop.MIGRATED
                    there += 1
            killer.cancel()
            process.kill()
    assert here, "it never died early enough"
    print(f"{here} stayed, {there} moved")


# --- an enemy at the other end ----------------------------------------------------------------------------------------


def hello(**changes):
    with Machine(config(dirtier())) as machine:
        disks = {"copied": False, "images": {}, "paths": []}
        return {"version": 1, "program": "x", "disks": disks, **machine.describe()} | changes


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"config": {}},
        {"config": {"kernel": "x", "ram_mib": -1}},
        {"config": {"kernel": "x", "bogus": 1}},
        {"config": 7},
        {"cpuid": [[1]]},
        {"cpuid": None},
        {"booted": {}},
        {"disks": None},
        {"disks": {}},
        {"disks": {"copied": False, "images": {}, "paths": [{"path": "x"}]}},
    ],
)
def test_a_greeting_that_describes_no_machine_is_refused(tmp_path, changes):
    target = Target(tmp_path / "socket")
    wire = connect(f"unix:{tmp_path}/socket")
    wire.send(Kind.HELLO, hello(**changes))
    assert wire.receive().kind is Kind.REFUSED
    wire.close()
    target.end()
    assert getattr(target.error, "status", None) is not None


@pytest.mark.parametrize(
    ("runs", "size"),
    [
        ([[0, 1]], 8192),
        ([[0, 1 << 40]], 4096),
        ([[24576, 1]], 4096),
        ([[-1, 1]], 4096),
        ([[0]], 4096),
        ("x", 4096),
        ([["0", 1]], 4096),
        ([[0, 1.5]], 4096),
    ],
)
def test_pages_that_belong_nowhere_are_refused(tmp_path, runs, size):
    target = Target(tmp_path / "socket")
    wire = connect(f"unix:{tmp_path}/socket")
    wire.send(Kind.HELLO, hello())
    assert wire.receive().kind is Kind.READY
    wire.send(Kind.PAGES, {"runs": runs}, [memoryview(bytes(size))])
    assert wire.receive().kind is Kind.REFUSED
    wire.close()
    target.end()
    assert isinstance(target.error, MigrationError)


def test_noise_is_refused(tmp_path):
    for seed in range(20):
        target = Target(tmp_path / f"socket{seed}")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{tmp_path}/socket{seed}")
            connection.sendall(random.Random(seed).randbytes(200))
        target.end()
        assert isinstance(target.error, MigrationError)
    assert os.listdir(tmp_path) == []

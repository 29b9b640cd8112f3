"""A small guest that drives a virtio network from ring 3: on a TAP, and two machines on a link or a switch."""

import socket
import subprocess
import threading
import time

import pytest

from hypervisor import Machine, MachineConfig, Network, Stop

pytestmark = pytest.mark.kvm

IP = "/usr/bin/ip"
TAP = "hvguest0"
MAC = "52:54:00:12:34:56"
ADDRESS = bytes.fromhex("525400123456")
EVERYBODY = b"\xff" * 6
HOST = bytes.fromhex("020000000001")
ETHERTYPE = bytes.fromhex("88b5")  # IEEE 802: local experimental
TIMEOUT = 120
COUNT = 8
SIZES = [46, 226, 406, 586, 766, 946, 1126, 1306]


def inverted(data):
    return bytes(byte ^ 0xFF for byte in data)


def payload(number, size):
    """What the guest asks: byte i of frame n is i + n + 1."""
    return bytes((offset + number + 1) & 0xFF for offset in range(size))


@pytest.fixture
def wire():
    """The host's side of a TAP: a socket that sees and sends frames of the guest's EtherType."""
    subprocess.run([IP, "tuntap", "add", "dev", TAP, "mode", "tap"], check=True)
    try:
        subprocess.run([IP, "link", "set", TAP, "up"], check=True)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, int.from_bytes(ETHERTYPE)) as wire:
            wire.bind((TAP, int.from_bytes(ETHERTYPE)))
            wire.settimeout(TIMEOUT)
            yield wire
    finally:
        subprocess.run([IP, "link", "delete", TAP], check=True)


def machine_on(net, role, virtio, count=COUNT, mac=MAC):
    """Make a machine whose guest asks (role 0) or answers (1)."""
    return Machine(
        MachineConfig(
            "virtio-net",
            ram_mib=4,
            debug_exit="raw",
            virtio=virtio,
            nets=[f"{net},mac={mac}"],
            append=f"{count} {role}",
        )
    )


def run(machine, failures, mac):
    """Run the machine; for a thread of its own."""
    said = []
    machine.console.listeners.append(said.append)
    outcome = machine.run(timeout=TIMEOUT)
    if (outcome.reason, outcome.status) != (Stop.GUEST_EXIT, 0) or b"".join(said).decode() != f"mac:{mac}\n":
        failures.append((outcome, said))


def finish(threads, failures):
    for thread in threads:
        thread.join(2 * TIMEOUT)
        assert not thread.is_alive()
    assert failures == []


def started(machine, failures, mac=MAC):
    thread = threading.Thread(target=run, args=(machine, failures, mac))
    thread.start()
    return thread


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_a_guest_asks_over_a_tap(wire, virtio):
    """Every frame arrives as the guest made it, and the guest checks every answer."""
    failures = []
    with machine_on(f"tap={TAP}", 0, virtio) as machine:
        thread = started(machine, failures)
        for number, size in enumerate(SIZES):
            assert wire.recv(2048) == EVERYBODY + ADDRESS + ETHERTYPE + payload(number, size)
            wire.send(ADDRESS + HOST + ETHERTYPE + inverted(payload(number, size)))
        finish([thread], failures)


@pytest.mark.parametrize(("change", "status"), [("a byte", 4), ("the length", 3)])
def test_the_guest_notices_a_wrong_answer(wire, change, status):
    with machine_on(f"tap={TAP}", 0, "pci") as machine:
        machine.start()
        data = bytearray(inverted(wire.recv(2048)[14:]))
        if change == "a byte":
            data[-1] ^= 1
        else:
            data.append(0)
        wire.send(ADDRESS + HOST + ETHERTYPE + data)
        assert machine.wait(timeout=TIMEOUT).status == status


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_a_guest_answers_over_a_tap(wire, virtio):
    """Frames of other protocols on the wire are let pass; what is asked for comes back, to who asked."""
    failures = []
    with machine_on(f"tap={TAP}", 1, virtio) as machine:
        thread = started(machine, failures)
        for number, size in enumerate(SIZES):
            data = payload(3 * number, size)
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as other:
                other.bind((TAP, 0))
                other.send(ADDRESS + HOST + b"\x88\xb6" + data)
            wire.send(ADDRESS + HOST + ETHERTYPE + data)
            assert wire.recv(2048) == HOST + ADDRESS + ETHERTYPE + inverted(data)
        finish([thread], failures)


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_a_network_that_leads_nowhere_takes_frames(virtio):
    config = MachineConfig(
        "virtio-net-bench", ram_mib=32, debug_exit="raw", virtio=virtio, nets=["none"], append="50 4 64 0 0"
    )
    with Machine(config) as machine:
        outcome = machine.run(timeout=TIMEOUT)
        assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), outcome
        assert machine.devices["net0"].dropped == 50


@pytest.mark.parametrize(("asks", "answers"), [("pci", "mmio"), ("mmio", "pci")])
def test_two_machines_on_a_link(tmp_path, monkeypatch, asks, answers):
    """In one process, on different transports, without root: the one that asks checks every byte."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    failures, other = [], "52:54:00:0a:bc:0d"
    with (
        machine_on("link=lab", 1, answers, 100, other) as second,
        machine_on("link=lab", 0, asks, 100) as first,
    ):
        finish([started(second, failures, other), started(first, failures)], failures)


@pytest.mark.parametrize(("asks", "answers"), [("pci", "mmio"), ("mmio", "pci")])
def test_two_machines_on_a_switch(asks, answers):
    """Every frame is counted, and held back as long as it shall be."""
    failures, other = [], "52:54:00:0a:bc:0d"
    with (
        Network() as network,
        machine_on(f"switch={network.name}/two", 1, answers, COUNT, other) as second,
        machine_on(f"switch={network.name}/one", 0, asks) as first,
        network.delay(0.02),
    ):
        begin = time.monotonic()
        finish([started(second, failures, other), started(first, failures)], failures)
        assert time.monotonic() - begin >= COUNT * 2 * 0.02
        one, two = network.counters["one"], network.counters["two"]
        assert (one.sent, one.received, two.sent, two.received) == (COUNT,) * 4


@pytest.mark.parametrize(("fault", "status"), [("corrupt", 4), ("drop", None)])
def test_the_guest_notices_what_the_switch_does(fault, status):
    """One bit of an answer is another one, or there is no answer."""
    with (
        Network(seed=1) as network,
        machine_on(f"switch={network.name}/two", 1, "pci") as second,
        machine_on(f"switch={network.name}/one", 0, "pci") as first,
        getattr(network, fault)(1, src="two") as made,
    ):
        second.start()
        first.start()
        if status is None:
            deadline = time.monotonic() + TIMEOUT
            while not made.hits:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(TimeoutError):
                first.wait(timeout=1)
        else:
            assert first.wait(timeout=TIMEOUT).status == status
        assert made.hits == 1
        assert network.counters["one"].sent == 1

"""Two stock kernels on a switch of this process that is parted, healed and made to lose frames."""

import re

import pytest
from linux_shell import QUIET, Shell

from hypervisor import Machine, MachineConfig, Network

pytestmark = pytest.mark.hardware


@pytest.fixture
def network():
    with Network(seed=1) as network:
        yield network


@pytest.fixture
def shells(network):
    """Two tiny guests that boot side by side, each with an address."""
    machines = [
        Machine(MachineConfig("tiny", append=QUIET, decompress="host", nets=[network.port(name)], ram_mib=128))
        for name in ("one", "two")
    ]
    try:
        for machine in machines:
            machine.start()
        shells = [Shell(machine) for machine in machines]
        for number, shell in enumerate(shells, 1):
            shell.run(f"ip addr add 10.7.0.{number}/24 dev eth0; ip link set eth0 up")
        yield shells
    finally:
        for machine in machines:
            machine.close()


def pings(shell, target, count=3, seconds=1):
    """Return how many of so many pings were answered; `seconds` is how long the last answer may take."""
    said = shell.run(f"ping -c {count} -i 0.2 -W {seconds} {target}")
    return int(re.search(r"(\d+) packets received", said)[1])


def is_reached(shell, target):
    """Whether all pings are answered; a busy host has half a minute for the last."""
    return pings(shell, target, seconds=30) == 3


def test_two_guests_on_a_switch(network, shells):
    one, two = shells
    assert is_reached(one, "10.7.0.2")

    network.partition(["one"], ["two"])
    assert pings(one, "10.7.0.2") == 0
    assert pings(two, "10.7.0.1") == 0
    network.heal()
    assert is_reached(one, "10.7.0.2")

    size = 1 << 18
    two.run(f"mkdir /tmp/w; head -c {size} /dev/urandom > /tmp/w/f; httpd -h /tmp/w")
    expected = two.run("md5sum < /tmp/w/f").split()[0]
    faults = (
        network.drop(0.03),
        network.duplicate(0.05),
        network.corrupt(0.03),
        network.reorder(0.1, within=0.01),
        network.delay(0.001, jitter=0.002),
    )
    got = one.run("wget -q -O /tmp/got http://10.7.0.2/f; wc -c < /tmp/got; md5sum < /tmp/got").split()
    assert got[:2] == [str(size), expected]
    assert all(fault.hits for fault in faults)
    network.heal()

    assert network.counters["one"].overruns == network.counters["two"].overruns == 0

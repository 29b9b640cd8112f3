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


def pings(shell, target, count=3):
    """Return how many of so many pings were answered."""
    said = shell.run(f"ping -c {count} -i 0.2 -W 1 {target}")
    return int(re.search(r"(\d+) packets received", said)[1])


def test_two_guests_on_a_switch(network, shells):
    one, two = shells
    assert pings(one, "10.7.0.2") == 3

    network.partition(["one"], ["two"])
    assert pings(one, "10.7.0.2") == 0
    assert pings(two, "10.7.0.1") == 0
    network.heal()
    assert pings(one, "10.7.0.2") == 3

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
    got = one.run("wget -q -O /tmp/got http://10.7.0.2/f; wc -c < /tmp/got; md5sum < /tmp/got", timeout=60).split()
    assert got[:2] == [str(size), expected]
    assert all(fault.hits for fault in faults)
    network.heal()

    assert network.counters["one"].overruns == network.counters["two"].overruns == 0

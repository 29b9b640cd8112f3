"""A service on several guests whose network falls apart: what clients see meanwhile, and that all is well afterwards.

`counter.sh` is the service: two nodes count for themselves and tell each other. Each test finds both started and at
nothing: the guests boot once, and are put back to that moment.
"""

import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE = 240
"""Seconds that nodes have to agree. A host that is fast needs one or two."""
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}

pytestmark = pytest.mark.guest(ram_mib=96)


class Node:
    """A guest with the service, and a client beside it."""

    def __init__(self, network, name):
        (peer,) = (address for other, address in ADDRESSES.items() if other != name)
        start = [
            "ip link set lo up",
            f"setsid sh /host/counter.sh {name} {peer} >/dev/null 2>&1 </dev/null &",
            "until wget -q -O - http://127.0.0.1/cgi-bin/value; do usleep 100000; done",
        ]
        self.guest = network.machine(name, share=HERE, setup=start)
        self.address = self.guest.address

    def ask(self, what, node=None, *, patience=50):
        """Be a client beside this node: return what `node`, by default this one, answers; None when it does not."""
        address = "127.0.0.1" if node is None else node.address
        done = self.guest.run(["timeout", str(patience), "wget", "-q", "-O", "-", f"http://{address}/cgi-bin/{what}"])
        return int(done.stdout) if done.returncode == 0 else None

    def add(self, times):
        for _ in range(times):
            assert self.ask("add") is not None


@pytest.fixture
def nodes(guest_network):
    return [Node(guest_network, name) for name in ADDRESSES]


def agree(nodes, value):
    """Wait until all nodes have this value."""
    deadline = time.monotonic() + PATIENCE
    while (seen := [node.ask("value") for node in nodes]) != [value] * len(nodes):
        assert time.monotonic() < deadline, f"the nodes say {seen}, and not {value}"
        time.sleep(0.1)


def test_nodes_tell_each_other(nodes):
    a, b = nodes
    a.add(3)
    b.add(2)
    agree(nodes, 5)
    assert a.ask("value", b) == 5


def test_both_sides_of_a_partition_go_on_and_agree_when_it_heals(nodes, guest_network):
    a, b = nodes
    a.add(1)
    agree(nodes, 1)
    with guest_network.partition(["a"], ["b"]):
        a.add(3)
        b.add(2)
        assert a.ask("add", b, patience=2) is None  # who asks the other side gets no answer,
        assert (a.ask("value"), b.ask("value")) == (4, 3)  # who asks this one an old one
        time.sleep(1)
        assert (a.ask("value"), b.ask("value")) == (4, 3)
    agree(nodes, 6)


def test_nothing_is_lost_or_counted_twice_on_a_bad_network(nodes, guest_network):
    a, b = nodes
    with guest_network.drop(0.2), guest_network.duplicate(0.2), guest_network.reorder(0.2):
        a.add(3)
        b.add(4)
        agree(nodes, 7)
    agree(nodes, 7)


def test_news_take_as_long_as_the_network(nodes, guest_network):
    a, b = nodes
    b.add(1)
    with guest_network.delay(0.3):
        begun = time.monotonic()
        assert a.ask("value", b, patience=60) == 1
        assert time.monotonic() - begun >= 4 * 0.3  # a handshake and a request, each there and back
        agree(nodes, 1)

"""A switch between machines of one process, and what it does to frames when it is told to."""

import gc
import select
import threading
import time
from struct import unpack_from

import pytest
from fakes import FakeClock
from hypothesis import given
from hypothesis import strategies as st
from virtio_driver import Driver, FakeRam

from devices.backends.errors import BackendError
from devices.backends.net import open_backend
from devices.backends.switch import Network
from devices.events import EventLog
from devices.virtio.net import Net
from hypervisor import ConfigError
from hypervisor.options import NetConfig, parse

MS = 1_000_000
EVERYBODY = b"\xff" * 6
MAC = {name: bytes([2, 0, 0, 0, 0, number]) for number, name in enumerate("abc", 1)}


class Lab:
    """A network with ports a, b and c, on a clock that stands still."""

    def __init__(self, **settings):
        self.clock = FakeClock(1_000_000_000)
        self.network = Network(now_ns=self.clock, **settings)
        self.ports = {}
        for name in "abc":
            self.network.port(name)
            self.ports[name] = self.network.attach(name)

    def send(self, source, target, text=b"hello"):
        destination = EVERYBODY if target is None else MAC[target]
        return self.ports[source].send([memoryview(destination), memoryview(MAC[source] + b"\x88\xb5" + text)])

    def get(self, name):
        """Return the payloads that are there."""
        buffer, found = memoryview(bytearray(70000)), []
        while (size := self.ports[name].receive(buffer)) is not None:
            found.append(bytes(buffer[14:size]))
        return found

    def learn(self):
        for name in "abc":
            self.send(name, None)
        for name in "abc":
            self.get(name)

    def wait(self, ms):
        self.clock.now_ns += ms * MS

    def close(self):
        for port in self.ports.values():
            port.close()
        self.network.close()


@pytest.fixture
def lab():
    lab = Lab()
    yield lab
    lab.close()


def numbers(count):
    return [bytes([number]) for number in range(count)]


def readable(port, seconds=0.0):
    return select.select([port.fileno()], [], [], seconds)[0] != []


# --- a switch -------------------------------------------------------------------------------------------------------


def test_an_unknown_station_is_reached_by_all_and_a_known_one_alone(lab):
    assert lab.send("a", "b")
    assert [lab.get(name) for name in "abc"] == [[], [b"hello"], [b"hello"]]
    lab.send("b", "a")
    assert [lab.get(name) for name in "abc"] == [[b"hello"], [], []]
    lab.send("a", "b")
    assert [lab.get(name) for name in "abc"] == [[], [b"hello"], []]
    lab.send("a", None)
    assert [lab.get(name) for name in "abc"] == [[], [b"hello"], [b"hello"]]


def test_a_station_that_moves_is_found_and_nothing_comes_back(lab):
    lab.learn()
    lab.ports["c"].send([memoryview(EVERYBODY + MAC["b"] + b"\x88\xb5moved")])
    for name in "abc":
        lab.get(name)
    lab.send("a", "b")
    assert [lab.get(name) for name in "abc"] == [[], [], [b"hello"]]
    lab.send("c", "b")  # it is behind the port that the frame comes from
    assert [lab.get(name) for name in "abc"] == [[], [], []]


def test_no_frame_is_shorter_than_its_header_and_the_longest_one_passes(lab):
    assert not lab.ports["a"].send([memoryview(b"x" * 13)])
    assert lab.send("a", "b", bytes(65535))
    assert lab.get("b") == [bytes(65535)]
    assert lab.network.counters["a"].sent == 1


def test_no_offload_is_offered(lab):
    """A fault has to meet what a wire would carry: whole frames, each with its checksums."""
    port = lab.ports["a"]
    assert (port.offered, port.header_size, port.plain_fd) == (0, 0, None)


def test_a_guest_that_floods_fills_no_memory():
    lab = Lab(queue_frames=10)
    lab.learn()
    for text in numbers(100):
        assert lab.send("a", "b", text)
    assert lab.get("b") == numbers(10)
    assert lab.network.counters["b"].overruns == 90
    lab.send("a", "b")
    assert lab.get("b") == [b"hello"]
    lab.close()


def test_a_flood_of_long_frames_is_bounded_by_bytes(lab):
    lab.learn()
    for _ in range(200):
        lab.send("a", "b", bytes(65000))
    assert len(lab.get("b")) == (4 << 20) // 65014
    lab.send("a", "b")
    assert lab.get("b") == [b"hello"]


def test_held_back_frames_are_bounded_too():
    lab = Lab(queue_frames=10)
    lab.learn()
    lab.network.delay(3600)
    lab.network.reorder(0.5, within=3600)
    for text in numbers(100):
        lab.send("a", "b", text)
    assert len(lab.ports["b"]._queue) == 10
    lab.close()


def test_a_guest_with_many_addresses_fills_no_memory(lab):
    for number in range(10_000):
        lab.ports["a"].send([memoryview(MAC["b"] + b"\2" + number.to_bytes(5) + b"\x88\xb5")])
    assert len(lab.network._addresses) <= 4096
    lab.ports["a"].send([memoryview(MAC["b"] + b"\3" + bytes(5) + b"\x88\xb5")])
    assert b"\3" + bytes(5) not in lab.network._addresses  # nobody is reached by a group's address alone


def test_who_leaves_is_forgotten_and_may_come_back(lab):
    lab.learn()
    lab.send("a", "b")
    lab.ports["b"].close()
    assert lab.ports["b"].fileno() == -1
    assert not lab.send("b", "a")
    assert lab.get("b") == []
    lab.ports["b"].close()
    assert lab.send("a", "b")  # floods again
    assert lab.get("c") == [b"hello"]
    lab.ports["b"] = lab.network.attach("b")
    assert lab.get("b") == []
    lab.send("a", "b")
    assert lab.get("b") == [b"hello"]


def test_a_frame_held_back_for_who_left_does_not_reach_who_comes(lab):
    lab.learn()
    lab.network.reorder(1, within=1, dst="b")
    lab.send("a", "b", b"old")
    lab.ports["b"].close()
    lab.ports["b"] = lab.network.attach("b")
    lab.network.heal()
    lab.send("a", "b", b"new")
    lab.wait(2000)
    assert lab.get("b") == [b"new"]
    assert lab.ports["b"]._bytes == 0


def test_flush_loses_what_is_under_way(lab):
    lab.learn()
    lab.network.delay(1, dst="b")
    lab.send("a", "b")
    lab.send("a", "c")
    lab.network.flush()
    lab.wait(5000)
    assert [lab.get(name) for name in "abc"] == [[], [], []]


# --- its files ------------------------------------------------------------------------------------------------------


def test_a_port_is_readable_while_a_frame_is_there(lab):
    port = lab.ports["b"]
    assert not readable(port)
    lab.send("a", "b", b"1")
    lab.send("a", "b", b"2")
    assert readable(port)
    assert port.receive(memoryview(bytearray(100))) == 15
    assert readable(port)
    assert lab.get("b") == [b"2"]
    assert not readable(port)


def test_a_port_becomes_readable_when_a_delay_is_over():
    """On the real clock."""
    with Network() as network:
        one, two = (network.attach(name) for name in ("one", "two"))
        buffer = memoryview(bytearray(100))
        for seconds in (0.05, 15):
            began = time.monotonic()
            with network.delay(seconds):
                one.send([memoryview(EVERYBODY + MAC["a"] + b"\x88\xb5")])
            early = two.receive(buffer), readable(two)
            if time.monotonic() < began + seconds:
                break
            network.flush()  # this thread was too late to see it
            while two.receive(buffer) is not None:
                pass
        assert early == (None, False)
        assert readable(two, 60)
        assert two.receive(buffer) == 14
        assert two.receive(buffer) is None
        assert not readable(two)
        one.close()
        two.close()


def test_a_port_wakes_for_the_frame_that_is_there_first():
    """On the real clock, a far one being sent before a near one, and one that is there at once."""
    with Network() as network:
        one, two = (network.attach(name) for name in ("one", "two"))
        buffer, frame = memoryview(bytearray(100)), [memoryview(EVERYBODY + MAC["a"] + b"\x88\xb5")]
        for near in (0.1, 15):
            began = time.monotonic()
            for seconds in (3600, near, 0):
                with network.delay(seconds):
                    one.send(frame)
            early = readable(two), two.receive(buffer), two.receive(buffer), readable(two)
            if time.monotonic() < began + near:
                break
            network.flush()  # this thread was too late to see it
            while two.receive(buffer) is not None:
                pass
        assert early == (True, 14, None, False)
        assert readable(two, 60)
        assert two.receive(buffer) == 14
        assert two.receive(buffer) is None
        assert not readable(two)
        one.close()
        two.close()


def test_many_threads_send_and_none_is_lost():
    with Network(queue_frames=10_000) as network:
        ports = [network.attach(f"p{number}") for number in range(4)]

        def send(port, number):
            for _ in range(500):
                port.send([memoryview(EVERYBODY + bytes([2, 0, 0, 0, 0, number]) + b"\x88\xb5")])

        threads = [threading.Thread(target=send, args=(port, number)) for number, port in enumerate(ports[:3])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        buffer, count = memoryview(bytearray(100)), 0
        while readable(ports[3]):
            count += ports[3].receive(buffer) is not None
        assert count == 1500
        for port in ports:
            port.close()


# --- faults ---------------------------------------------------------------------------------------------------------


def test_drop_is_the_same_in_every_run_and_for_each_pair_by_itself():
    def survivors(noise, seed=7):
        lab = Lab(seed=seed)
        lab.learn()
        lab.network.drop(0.3)
        for text in numbers(200):
            lab.send("a", "b", text)
            if noise:
                lab.send("c", "b", b"noise")
                lab.send("b", "a", b"noise")
        found = [text for text in lab.get("b") if text != b"noise"]
        lab.close()
        return found

    first = survivors(noise=False)
    assert survivors(noise=False) == survivors(noise=True) == first
    assert survivors(noise=False, seed=8) != first
    assert 110 < len(first) < 170


@pytest.mark.parametrize(("probability", "left"), [(0, 5), (1, 0)])
def test_never_and_always(lab, probability, left):
    lab.learn()
    fault = lab.network.drop(probability)
    for text in numbers(5):
        lab.send("a", "b", text)
    assert len(lab.get("b")) == left
    assert fault.hits == 5 - left


def test_a_fault_meets_the_frames_of_its_ports_only(lab):
    lab.learn()
    lab.network.drop(1, src="a", dst=["b"])
    for source, target in ("ab", "ac", "ba", "cb"):
        lab.send(source, target, f"{source}{target}".encode())
    assert [lab.get(name) for name in "abc"] == [[b"ba"], [b"cb"], [b"ac"]]


def test_a_fault_ends_by_itself_with_its_block_or_with_all(lab):
    lab.learn()

    def passes():
        lab.send("a", "b")
        return lab.get("b") == [b"hello"]

    with lab.network.drop(1):
        assert not passes()
    assert passes()
    fault, other = lab.network.drop(1), lab.network.drop(1)
    fault.end()
    fault.end()
    assert not passes()
    lab.network.heal()
    other.end()
    assert passes()
    assert (fault.hits, other.hits) == (0, 1)


def test_duplicates_follow_their_frame(lab):
    lab.learn()
    fault = lab.network.duplicate(1)
    lab.send("a", "b", b"1")
    lab.send("a", "b", b"2")
    assert lab.get("b") == [b"1", b"1", b"2", b"2"]
    assert fault.hits == 2


def test_corrupt_flips_one_bit_behind_the_header(lab):
    lab.learn()
    lab.network.corrupt(1)
    buffer, changed = memoryview(bytearray(100)), set()
    for _ in range(400):
        lab.send("a", "b", bytes(4))
        assert lab.ports["b"].receive(buffer) == 18
        assert buffer[:14] == MAC["b"] + MAC["a"] + b"\x88\xb5"
        value = int.from_bytes(buffer[14:18])
        assert value.bit_count() == 1
        changed.add(value)
    assert len(changed) == 32
    lab.send("a", "b", b"")
    assert lab.get("b") == [b""]


def test_delay_and_its_end(lab):
    lab.learn()
    with lab.network.delay(0.1, dst="b"):
        lab.send("a", "b", b"1")
        lab.wait(60)
        lab.send("a", "b", b"2")
        lab.send("b", "a", b"back")
        assert lab.get("a") == [b"back"]
        lab.wait(39)
        assert lab.get("b") == []
        lab.wait(1)
        assert lab.get("b") == [b"1"]
    assert lab.get("b") == []  # what is held back arrives at its time
    lab.wait(60)
    assert lab.get("b") == [b"2"]


def test_delays_add_up(lab):
    lab.learn()
    lab.network.delay(0.1)
    lab.network.delay(0.05)
    lab.send("a", "b")
    lab.wait(149)
    assert lab.get("b") == []
    lab.wait(1)
    assert lab.get("b") == [b"hello"]


def test_jitter_spreads_and_keeps_the_order(lab):
    lab.learn()
    lab.network.delay(0.01, jitter=0.05)
    arrived = {}
    for text in numbers(50):
        lab.send("a", "b", text)
        sent = lab.clock.now_ns
        for _ in range(3):
            lab.wait(1)
            arrived |= dict.fromkeys(lab.get("b"), lab.clock.now_ns)
        assert lab.clock.now_ns > sent
    lab.wait(60)
    arrived |= dict.fromkeys(lab.get("b"), lab.clock.now_ns)
    assert list(arrived) == numbers(50)
    assert len(set(arrived.values())) > 10


def test_reorder_swaps_neighbours(lab):
    lab.learn()
    lab.network.reorder(1, within=0.1)
    for text in numbers(5):
        lab.send("a", "b", text)
    assert lab.get("b") == [b"\1", b"\0", b"\3", b"\2"]
    lab.wait(99)
    assert lab.get("b") == []
    lab.wait(1)  # nothing came behind the last one: it is there all the same
    assert lab.get("b") == [b"\4"]


def test_a_held_back_frame_that_arrived_by_itself_waits_for_nobody(lab):
    lab.learn()
    lab.network.reorder(1, within=0.1)
    lab.send("a", "b", b"1")
    lab.wait(100)
    assert lab.get("b") == [b"1"]
    lab.send("a", "b", b"2")
    assert lab.get("b") == []
    lab.send("a", "b", b"3")
    assert lab.get("b") == [b"3", b"2"]


def test_a_held_back_frame_is_not_held_longer_by_a_slow_one(lab):
    lab.learn()
    with lab.network.reorder(1, within=0.1):
        lab.send("a", "b", b"1")
    with lab.network.delay(1):
        lab.send("a", "b", b"2")
    lab.wait(100)
    assert lab.get("b") == [b"1"]
    lab.wait(900)
    assert lab.get("b") == [b"2"]


def test_partition_and_heal(lab):
    lab.learn()
    cut = lab.network.partition(["a"], ["b", "c"])
    for source, target in ("ab", "ba", "ac", "bc", "cb"):
        lab.send(source, target, f"{source}{target}".encode())
    assert [lab.get(name) for name in "abc"] == [[], [b"cb"], [b"bc"]]
    lab.send("a", None)
    assert [lab.get(name) for name in "abc"] == [[], [], []]
    assert cut.hits == 5
    lab.network.heal()
    lab.send("a", "b")
    assert lab.get("b") == [b"hello"]


def test_who_is_in_no_group_reaches_everybody(lab):
    lab.learn()
    lab.network.partition("a", "b")
    for source, target in ("ab", "ac", "ca", "bc"):
        lab.send(source, target, f"{source}{target}".encode())
    assert [lab.get(name) for name in "abc"] == [[b"ca"], [], [b"ac", b"bc"]]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (lambda network: network.drop(1.1), "probability is 1.1"),
        (lambda network: network.corrupt(-0.1), "probability is -0.1"),
        (lambda network: network.drop(1, src="d"), "no port 'd'; there are: a, b, c"),
        (lambda network: network.partition(["a"], ["x"]), "no port 'x'"),
        (lambda network: network.partition(["a", "b"], ["b"]), "'b' is in two groups"),
        (lambda network: network.delay(-1), "a delay of -1 s"),
        (lambda network: network.delay(1, jitter=-1), "up to -1 s more"),
        (lambda network: network.reorder(1, within=-1), "back for -1 s"),
    ],
)
def test_faults_that_cannot_be(lab, fault, why):
    with pytest.raises(ValueError, match=why):
        fault(lab.network)
    assert lab.network._faults == ()


FAULTS = {
    "drop": lambda network: network.drop(0.3),
    "duplicate": lambda network: network.duplicate(0.3),
    "reorder": lambda network: network.reorder(0.4, within=0.02),
    "delay": lambda network: network.delay(0.01, jitter=0.03),
    "corrupt": lambda network: network.corrupt(0.3),
}


@given(
    faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=4),
    steps=st.lists(st.tuples(st.sampled_from(["ab", "ba", "cb"]), st.integers(0, 40)), max_size=60),
    seed=st.integers(0, 3),
)
def test_any_mix_of_faults_is_reproducible_and_loses_only_what_is_dropped(faults, steps, seed):
    def run():
        lab = Lab(seed=seed)
        lab.learn()
        made = [FAULTS[name](lab.network) for name in faults]
        got = []
        for number, (pair, pause) in enumerate(steps):
            lab.send(*pair, number.to_bytes(2))
            lab.wait(pause)
            got += [(name, text) for name in "abc" for text in lab.get(name)]
        lab.wait(10_000)
        got += [(name, text) for name in "abc" for text in lab.get(name)]
        assert all(port._bytes == 0 and not port._queue for port in lab.ports.values())
        hits = {name: sum(one.hits for one, kind in zip(made, faults, strict=True) if kind == name) for name in FAULTS}
        lab.close()
        return got, hits

    got, hits = run()
    assert len(got) == len(steps) - hits["drop"] + hits["duplicate"]
    if not hits["drop"] + hits["duplicate"] + hits["corrupt"]:
        assert sorted(text for _, text in got) == [number.to_bytes(2) for number in range(len(steps))]
    assert run() == (got, hits)


# --- captures, counters, names --------------------------------------------------------------------------------------


def test_the_capture_has_what_arrived(tmp_path):
    lab = Lab(pcap=str(tmp_path / "c"))
    lab.learn()
    lab.network.drop(1, dst="b")
    lab.send("a", "b", b"lost")
    lab.send("a", "c", b"there")
    lab.get("c")
    lab.close()
    data, at, texts = (tmp_path / "c").read_bytes(), 24, []
    assert unpack_from("<I", data)[0] == 0xA1B23C4D
    while at < len(data):
        size = unpack_from("<I", data, at + 8)[0]
        texts.append(data[at + 16 + 14 : at + 16 + size])
        at += 16 + size
    assert texts == [b"hello"] * 6 + [b"there"]


def test_counters(lab):
    lab.learn()
    lab.send("a", "b")
    lab.get("b")
    counters = lab.network.counters
    assert [(counters[name].sent, counters[name].received, counters[name].overruns) for name in "abc"] == [
        (2, 2, 0),
        (1, 3, 0),
        (1, 2, 0),
    ]


def test_a_configuration_names_its_port():
    with Network("lab") as network:
        net = parse(NetConfig, network.port("db", pcap="a,b.pcap"), "--net")
        assert (net.kind, net.name, net.pcap) == ("switch", "lab/db", "a,b.pcap")
        first = parse(NetConfig, network.port(), "--net")
        assert (first.name, first.mac != net.mac) == ("lab/port1", True)
        assert int(first.mac[:2], 16) & 3 == 2  # a single station's, locally administered
        assert parse(NetConfig, network.port(mac="52:54:00:00:00:01"), "--net") == NetConfig(
            "switch", "lab/port2", mac="52:54:00:00:00:01"
        )
        port = open_backend(net.kind, net.name, log=EventLog())
        with pytest.raises(BackendError, match="port db of network lab is taken"):
            open_backend(net.kind, net.name, log=EventLog())
        port.close()
        open_backend(net.kind, net.name, log=EventLog()).close()
    with Network("lab") as again:
        assert parse(NetConfig, again.port("db"), "--net").mac == net.mac


def test_names_that_cannot_be():
    with Network("lab") as network:
        with pytest.raises(ValueError, match="a network 'lab' already"):
            Network("lab")
        for name in ("", "a/b", "a,b", "x" * 33):
            with pytest.raises(ValueError, match="no name of a network"):
                Network(name)
            with pytest.raises(ValueError, match="no name of a port"):
                network.port(name)
        with pytest.raises(BackendError, match="no name of a port"):
            open_backend("switch", "lab", log=EventLog())
    with pytest.raises(BackendError, match="no network 'lab' in this process") as caught:
        open_backend("switch", "lab/a", log=EventLog())
    assert "link=NAME" in caught.value.hint
    with pytest.raises(ConfigError, match="switch needs a name"):
        parse(NetConfig, "switch", "--net")


def test_a_network_that_nobody_has_gives_its_name_back():
    Network("lab")
    gc.collect()
    Network("lab").close()


def test_who_is_left_on_a_closed_network_reaches_nobody(lab):
    lab.learn()
    lab.network.close()
    assert lab.send("a", "b")
    assert lab.get("b") == []


# --- with network devices -------------------------------------------------------------------------------------------


def test_two_devices_talk_and_are_told_of_no_offloads():
    with Network() as network:
        drivers = []
        for name in "ab":
            ram = FakeRam()
            net = parse(NetConfig, network.port(name), "--net")
            backend = open_backend(net.kind, net.name, log=EventLog())
            driver = Driver(Net(f"net-{name}", ram, backend, mac=MAC[name], log=EventLog()), ram)
            drivers.append((driver, ram, backend))
            assert driver.device.offered & 0b11111111111 & ~(1 << 3 | 1 << 5) == 0  # 5.1.3: CSUM to GUEST_ECN
        (one, _, end), (two, ram, other) = drivers
        ((_, target),) = [two.send(0, b"", 2000)]
        one.send(1, bytes(12) + MAC["b"] + MAC["a"] + b"\x88\xb5question", 0)
        assert readable(other)
        two.device.host_ready()
        assert ram.read(target, 12 + 14 + 8) == bytes(10) + b"\1\0" + MAC["b"] + MAC["a"] + b"\x88\xb5question"
        assert not readable(other)
        assert (network.counters["a"].sent, network.counters["b"].received) == (1, 1)
        end.close()
        other.close()

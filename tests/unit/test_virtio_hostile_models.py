"""What a hostile driver can do to one model: see test_virtio_hostile.py for what it can do to all of them."""

import errno
from struct import pack

import pytest
from test_virtio_hostile import MAC, WRITE, Attack, Log, Talker, net_works
from test_virtio_net import Network
from virtio_driver import DRIVER_OK, Driver, DriverQueue, FakeRam

from devices.virtio.net import Net


def test_a_driver_that_refills_while_the_host_talks_without_end():
    """A stream with 4 GiB of credit: others on the event loop have to have their turn before it is used up."""
    attack = Attack("vsock")
    attack.device._connect = lambda port: Talker()
    attack.driver.send(1, pack("<QQIIIHHIII", 3, 2, 7, 80, 0, 1, 1, 0, 0xFFFF_FFFF, 0))
    (connection,) = attack.device._connections.values()
    with attack.refilled(0, [(0x9000, 45, WRITE)]):
        connection.stream.on_readable()
    attack.check_mended()


def again(attack, queue):
    """Take a queue out of use and set it up anew in the same place; return the driver's half of it."""
    driver = attack.driver
    old = driver.queues[queue]
    driver.transport.queue_select = queue
    driver.transport.disable_queue()
    attack.ram.write(old.table, bytes(old.end - old.table))
    ours = DriverQueue(attack.ram, old.queue, old.table, old.size, old.features)
    driver.transport.set_queue_size(ours.size)
    for area, address in (("descriptors", ours.table), ("available", ours.available), ("used", ours.used)):
        driver.transport.set_queue_address(area, address, (1 << 64) - 1)
    driver.transport.enable_queue()
    driver.queues[queue] = ours
    return ours


def test_2_6_1_1_a_buffer_that_was_held_is_forgotten_with_its_queue():
    """The balloon keeps a buffer of statistics: it is not given back to a queue that never had it."""
    attack = Attack("balloon")
    attack.driver.send(2, pack("<HQ", 4, 1000))
    ours = again(attack, 2)
    attack.device.ask_for_statistics()
    assert ours.collect() == []
    head, _ = attack.driver.send(2, pack("<HQ", 4, 2000))
    attack.device.ask_for_statistics()
    assert ours.collect() == [(head, 0)]
    assert not attack.is_broken


def test_2_6_1_1_output_that_was_half_sent_is_forgotten_with_its_queue():
    attack = Attack("console")
    host = attack.device.ports[0]
    host.room = 2
    attack.driver.send(1, b"hello")
    host.room = 100
    again(attack, 1)
    attack.driver.send(1, b"world")
    assert host.got == b"heworld"


def test_2_5_a_size_that_changes_before_the_driver_is_ready_shows_in_the_generation():
    attack = Attack("console")
    transport = attack.driver.transport
    transport.write_status(0)
    first = transport.read_generation()
    transport.read_config(0, 2)
    attack.device.resize(200, 100)
    assert transport.read_config(2, 2) == 100
    assert transport.read_generation() != first


@pytest.mark.parametrize("features", [1 << 7, 1 << 8, 1 << 9, 1 << 7 | 1 << 8])
def test_5_1_3_1_offloads_without_checksums(features):
    """A TAP refuses them (EINVAL); it is the guest that asked wrongly, so nothing is raised."""

    class Tap(Network):
        offered = Network.offered | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9

        def set_offloads(self, features):
            if features & (7 << 7) and not features & 2:
                raise OSError(errno.EINVAL, "Invalid argument")

    ram, log = FakeRam(), Log()
    driver = Driver(Net("net0", ram, Tap(), mac=MAC, log=log), ram, features=features)
    assert net_works(driver)


def test_a_network_that_is_gone_when_the_driver_starts_again():
    class Gone(Network):
        def set_offloads(self, features):
            if self.gone:
                raise OSError(errno.EBADFD, "File descriptor in bad state")

    ram, log = FakeRam(), Log()
    network = Gone()
    driver = Driver(Net("net0", ram, network, mac=MAC, log=log), ram)
    network.gone = True
    driver.start()
    assert driver.transport.status & DRIVER_OK
    assert len(log.lines) == len(set(log.lines)) <= 2

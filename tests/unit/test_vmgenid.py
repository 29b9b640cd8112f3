"""The generation identifier: 16 bytes in guest memory and an edge for each new one."""

import pytest
from fakes import FakeIrq
from virtio_driver import FakeRam

from devices.vmgenid import VmGenId

GPA = 0x1028


@pytest.fixture
def ram():
    return FakeRam()


@pytest.fixture
def irq():
    return FakeIrq()


@pytest.fixture
def device(ram, irq):
    return VmGenId(ram=ram, gpa=GPA, irq=irq)


def test_a_new_identifier_is_in_memory_before_the_guest_is_told(device, ram):
    class Looking(FakeIrq):
        def set(self, level):
            super().set(level)
            seen.append(ram.read(GPA, 16))

    seen = []
    device._irq = irq = Looking()
    new = device.renew()
    assert seen == [new, new]
    assert irq.history == [True, False]
    assert device.identifier == new


def test_every_identifier_is_another_one(device, irq):
    assert len({device.renew() for _ in range(100)}) == 100
    assert irq.edges == 100


def test_its_neighbours_in_memory_stay(device, ram):
    ram.write(GPA - 8, b"\xaa" * 32)
    device.renew(bytes(range(16)))
    assert ram.read(GPA - 8, 32) == b"\xaa" * 8 + bytes(range(16)) + b"\xaa" * 8


@pytest.mark.parametrize("size", [0, 15, 17])
def test_an_identifier_of_another_size_is_refused(device, irq, ram, size):
    with pytest.raises(ValueError, match=f"{size} bytes, not 16"):
        device.renew(bytes(size))
    assert irq.edges == 0
    assert ram.read(GPA, 16) == bytes(16)

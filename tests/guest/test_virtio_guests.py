"""Small guests that drive virtio devices, on any KVM: doorbells are eventfds, and the data paths do the work."""

import os
import threading

import pytest

from devices.backends.image import open_image
from devices.backends.qcow2_header import create
from hypervisor import Machine, MachineConfig, Stop, layout

pytestmark = pytest.mark.kvm

SECTOR = 512
SIZE = 64 * SECTOR
PATTERN = bytes((offset + 1) & 0xFF for offset in range(SECTOR))


def drive(disk, virtio="mmio", **settings):
    """Run the driver against a disk, and return the machine's outcome and what it said."""
    config = MachineConfig("virtio-blk", ram_mib=4, debug_exit="raw", virtio=virtio, disks=[disk], **settings)
    with Machine(config) as machine:
        said = []
        machine.console.listeners.append(said.append)
        outcome = machine.run(timeout=120)
        exits = machine.vcpus[0].handle.exit_counts
    return outcome, b"".join(said).decode(), exits


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
@pytest.mark.parametrize("kind", ["raw", "raw-limited", "qcow2", "overlay-file", "overlay-memory"])
def test_a_disk_of_each_kind(tmp_path, kind, virtio):
    """The same driver, the same answers: by the data path in C for a plain file, by the model for the others."""
    path, overlay = tmp_path / "disk", tmp_path / "overlay"
    if kind == "qcow2":
        create(str(path), SIZE)
    else:
        path.write_bytes(bytes(SIZE))
    more = {"overlay-file": f",overlay={overlay}", "overlay-memory": ",overlay=memory", "raw-limited": ",iops=1000"}
    outcome, said, _ = drive(f"{path},serial=S-{kind}{more.get(kind, '')}", virtio)
    assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0)
    assert said == f"sectors: 64\nserial: S-{kind}\n"
    what, form = (overlay, "qcow2") if kind == "overlay-file" else (path, None)
    image = open_image(str(what), form=form, readonly=True)
    data = bytearray(SIZE)
    image.readv(0, [memoryview(data)])
    image.close()
    expected = bytearray(SIZE)
    if kind != "overlay-memory":
        expected[5 * SECTOR : 6 * SECTOR] = PATTERN
    assert data == expected


def test_a_device_has_one_name_on_both_transports(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with Machine(MachineConfig("virtio-blk", ram_mib=4, virtio="mmio", disks=[str(path)])) as machine:
        assert machine.bus_mmio.name_of(layout.VIRTIO_MMIO + 0x50, write=True) == ("virtio-blk0", "QueueNotify")
    with Machine(MachineConfig("virtio-blk", ram_mib=4, virtio="pci", disks=[str(path)])) as machine:
        function = machine._virtio.pci.function(1 << 3)
        function.config_write(0x04, 2, 1 << 1)  # its memory decodes
        bar = function.config_read(0x10, 4) & ~0xF
        assert machine.bus_mmio.name_of(bar, write=True) == ("virtio-blk0", "device_feature_select")


# Memory exits that setting the device up takes: probing (a look at every place of virtio-mmio before PCI), the status
# with a reset that is waited for, features, the queue, the capacity.
SET_UP = {"mmio": 3 + 7 + 6 + 9 + 1, "pci": 24 + 7 + 6 + 10 + 1}


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_a_kick_is_no_exit_to_user_space(tmp_path, virtio):
    """Four requests, and every memory exit is accounted for by setting the device up."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    outcome, _, exits = drive(str(path), virtio)
    assert outcome.status == 0
    assert exits[6] == SET_UP[virtio]


def test_a_disk_that_is_read_only_fails_the_write(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    outcome, _, _ = drive(f"{path},readonly")
    assert outcome.status == 3
    assert path.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("virtio", ["mmio", "pci"])
def test_no_disk(virtio):
    with Machine(MachineConfig("virtio-blk", ram_mib=4, debug_exit="raw", virtio=virtio, rng=True)) as machine:
        assert machine.run(timeout=120).status == 1


def test_machines_give_back_what_their_devices_took(tmp_path, process_files):
    """Descriptors and threads, over many machines in one process."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    drive(str(path))
    before = process_files()
    for virtio in ("mmio", "pci") * 3:
        drive(str(path), virtio)
    assert process_files() == before


@pytest.fixture
def process_files():
    return lambda: (len(os.listdir("/proc/self/fd")), threading.active_count())

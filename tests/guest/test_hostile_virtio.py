"""A guest that breaks every rule of a virtio device: each mistake has its one answer, and after a reset all is well."""

import os
import threading
import time

import pytest
from structlog.testing import capture_logs

from devices.backends.image import open_image
from devices.backends.qcow2_header import create
from hypervisor import Machine, MachineConfig, Stop

pytestmark = pytest.mark.kvm

SECTOR = 512
SIZE = 4096 * SECTOR
GOOD = b"GOOD".ljust(SECTOR, b"\0")
PATIENCE = 200
"""Seconds until a guest that does nothing is given up; a slow host needs many of them."""

NEEDS_RESET, ANSWERED = "needs reset", "answered"
RINGS = ("QUEUE_DESC", "QUEUE_DRIVER", "QUEUE_DEVICE")
PLACES = (
    "at an odd address",
    "across the end of RAM",
    "behind the end of RAM",
    "in the hole",
    "above 4 GiB",
    "and size wrap",
)
OF_EVERY_DEVICE = (
    # 2.7: sizes are powers of two up to QueueNumMax, rings are aligned and in memory
    {f"queue size {size}": NEEDS_RESET for size in (0, 3, 512, 32768, 65536, 4294967295)}
    | {f"{ring} {place}": NEEDS_RESET for ring in RINGS for place in PLACES}
    | {"QUEUE_DESC on 8 bytes": NEEDS_RESET, "QUEUE_DEVICE on 2 bytes": NEEDS_RESET}
    # 2.7.5, 2.7.6: the ring and its chains
    | {f"available index {ahead} ahead": NEEDS_RESET for ahead in (65, 32768, 65535)}
    | dict.fromkeys(["head 64", "head 65535", "next 64", "next 65535"], NEEDS_RESET)
    | dict.fromkeys(["a loop of one", "a loop of two", "a loop at the end"], NEEDS_RESET)
    # 2.7.5.3: indirect tables
    | {
        "an indirect table": ANSWERED,
        "indirect within indirect": NEEDS_RESET,
        "indirect and next": NEEDS_RESET,
        "an indirect table of 63 bytes": NEEDS_RESET,
        "an indirect table of 0 bytes": NEEDS_RESET,
        "an indirect table of 4112 bytes": NEEDS_RESET,
        "an indirect table across the end of RAM": NEEDS_RESET,
        "an indirect table in the hole": NEEDS_RESET,
        "next behind the indirect table": NEEDS_RESET,
        "a loop in an indirect table": NEEDS_RESET,
    }
    # what a descriptor points to
    | {
        "address and length wrap": NEEDS_RESET,
        "data across the end of RAM": NEEDS_RESET,
        "data behind the end of RAM": NEEDS_RESET,
        "data in the hole": NEEDS_RESET,
        "data above 4 GiB": NEEDS_RESET,
        "data of 4294967295 bytes": NEEDS_RESET,
        "header in the hole": NEEDS_RESET,
        "status in the hole": NEEDS_RESET,
    }
    # 2.1.1, 2.2.1, 3.1.1, 4.2.2: the registers
    | {
        "status bits cleared": "ignored",
        "the device's status bit set": "ignored",
        "features that are not offered": "refused",
        "no VERSION_1": "refused",
        "features after FEATURES_OK": "ignored",
        "a queue before FEATURES_OK": "ignored",
        "DRIVER_OK before FEATURES_OK": "ignored",
        "a kick before DRIVER_OK": "ignored",
        "queue registers after DRIVER_OK": "ignored",
        "a queue that does not exist": "ignored",
        "kicks of queues that do not exist": "ignored",
        "accesses of wrong widths": "ignored",
        "resets with requests on their way": "silence",
        "a queue disabled with requests on their way": "silence",
    }
)
OF_DISKS = (
    {"an indirect table": "status 0"}
    # 2.7.4.2 and 5.2.6: what a request is made of; without a header or a byte for the status none can be answered
    | {
        "readable behind writable": NEEDS_RESET,
        "a read with a status that cannot be written": NEEDS_RESET,
        "a write without a status": NEEDS_RESET,
        "a read without a status": "status 1",
        "a header and nothing else": NEEDS_RESET,
        "a status and nothing else": NEEDS_RESET,
        "nothing but empty descriptors": NEEDS_RESET,
        "a header of 8 bytes": NEEDS_RESET,
        "a header in two pieces": "status 0",
        "an empty header": NEEDS_RESET,
        "no data": "status 1",
        "an empty status": "status 1",
    }
    # 5.2.6: VIRTIO_BLK_S_IOERR is 1, VIRTIO_BLK_S_UNSUPP is 2
    | {
        "a request of type 99": "status 2",
        "the sector behind the last": "status 1",
        "sectors across the last": "status 1",
        "sector 2^55": "status 1",
        "sector 2^64 - 1": "status 1",
        "511 bytes": "status 1",
        "a write of what can be written": "status 1",
        "a read to what can be read": "status 1",
        "a write behind the last sector": "status 1",
        "19 bytes for the serial number": "status 1",
        "a flush with data": "status 0",
        "a discard of half a segment": "status 1",
        "a discard across the last sector": "status 1",
        "a discard with unknown flags": "status 2",
    }
)
TOLD = [
    "virtio.features.refused",
    "virtio.features.too_late",
    "virtio.queue.fixed",
    "virtio.queue.too_early",
    "virtio.status.cleared",
    "virtio.status.driver_ok_too_early",
    "virtqueue.broken",
]
"""What the log says of all this, each once."""


DISK, RNG, NETWORK = 2, 4, 1
"""Device types (chapter 5)."""
DEVICES = {"raw": DISK, "limited": DISK, "qcow2": DISK, "rng": RNG, "network": NETWORK}


@pytest.fixture(params=DEVICES)
def kind(request):
    """A disk served by the data path in C, by the model with requests held back, by the model on another image.

    The others are served by the event loop.
    """
    return request.param


def hostile(kind, how, folder):
    """Return a machine with a device of this kind, whose guest does `how`."""
    device = {"rng": {"rng": {}}, "network": {"nets": ["none"]}}.get(kind)
    if device is None:
        path = folder / "disk"
        if kind == "qcow2":
            create(str(path), SIZE)
        else:
            path.write_bytes(bytes(SIZE))
        image = open_image(str(path))
        image.writev(SECTOR, [memoryview(GOOD)])
        image.flush()
        image.close()
        device = {"disks": [f"{path},iops=2000" if kind == "limited" else str(path)]}
    settings = {"ram_mib": 4, "debug_exit": "raw", "virtio": "mmio", "append": f"{how} {DEVICES[kind]}"}
    return Machine(MachineConfig("virtio-hostile", **settings, **device))


def check_answers(kind, folder):
    """Let the guest make every mistake, and look at all that comes of it."""
    with capture_logs() as events, hostile(kind, 0, folder) as machine:
        outcome = machine.run(timeout=PATIENCE)
        said = machine.console.output.decode().splitlines()
    assert (outcome.reason, outcome.status) == (Stop.GUEST_EXIT, 0), said[-1]
    is_disk = DEVICES[kind] == DISK
    expected = OF_EVERY_DEVICE | (OF_DISKS if is_disk else {})
    assert dict(line.removesuffix(", then good").split(": ") for line in said) == expected
    assert len(said) == len(expected)
    assert all(line.endswith(", then good") for line in said)
    assert sorted(event["event"] for event in events) == TOLD
    if is_disk:
        image = open_image(str(folder / "disk"), readonly=True)
        data = bytearray(SIZE)
        image.readv(0, [memoryview(data)])
        image.close()
        assert data == bytes(SECTOR) + GOOD + bytes(SIZE - 2 * SECTOR)


def test_every_mistake_has_its_answer(kind, tmp_path):
    check_answers(kind, tmp_path)


def test_and_while_reads_wait_for_the_disk(tmp_path):
    """The host forgets what it has read at once: at every reset reads are on their way, and none of them comes late."""
    done = threading.Event()

    def forget():
        while not done.wait(0.0003):
            if (tmp_path / "disk").exists():
                fd = os.open(tmp_path / "disk", os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        check_answers("raw", tmp_path)
    finally:
        done.set()
        thread.join()


def busy_seconds(seconds):
    """Return the processor time that this process takes in some seconds."""
    before = time.process_time()
    time.sleep(seconds)
    return time.process_time() - before


def test_a_broken_device_costs_nothing(kind, tmp_path):
    """The guest sleeps with its queue broken: so does the VMM, and it can be stopped."""
    with hostile(kind, 1, tmp_path) as machine:
        machine.start()
        machine.console.expect("BROKEN\n", timeout=PATIENCE)
        assert [device.is_broken for device in machine.devices.values()] == [True]
        # a host that takes the processor away may count that as ours: one quiet second is enough
        assert any(busy_seconds(1) < 0.2 for _attempt in range(20))
        assert machine.outcome is None
        assert machine.stop(timeout=0.1).reason is Stop.KILLED


@pytest.mark.parametrize("how", [2, 3])
def test_a_guest_that_never_gives_up(kind, how, tmp_path):
    """It kicks a broken queue for ever, or breaks it for ever: it can be stopped, and fills neither log nor memory."""
    with capture_logs() as events, hostile(kind, how, tmp_path) as machine:
        machine.start()
        machine.console.expect("BROKEN\n", timeout=PATIENCE)
        files = len(os.listdir("/proc/self/fd"))
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert len(os.listdir("/proc/self/fd")) <= files + 2  # a data path's, while it lives
            time.sleep(0.05)
        assert machine.outcome is None
        assert machine.stop(timeout=0.1).reason is Stop.KILLED
    assert [event["event"] for event in events] == ["virtqueue.broken"]

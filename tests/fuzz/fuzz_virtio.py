"""Coverage-guided fuzzing of virtio devices, qcow2 images and PCI functions (needs atheris, the `fuzz` extra).

    python tests/fuzz/fuzz_virtio.py TARGET [libFuzzer options]      e.g. block -runs=20000
    python tests/fuzz/fuzz_virtio.py list

The property: whatever a guest writes into its memory and to the device's registers, or a user's file holds, nothing is
raised but the errors that are meant, the work is bounded, and the device works again after a reset.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, Any

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

with atheris.instrument_imports(include=["devices"]):
    from memory_image import MemoryImage
    from test_virtio_vsock import End
    from virtio_driver import LOW, NEEDS_RESET, Driver, FakeRam, FakeSignal

    from devices.backends.errors import BackendError
    from devices.backends.net import Nowhere
    from devices.backends.qcow2 import Qcow2Image
    from devices.backends.qcow2_header import create
    from devices.events import EventLog
    from devices.pci import PciBus, PciConfigPorts, PciMemoryWindow
    from devices.ports import GuestFault
    from devices.virtio.balloon import Balloon
    from devices.virtio.block import Block
    from devices.virtio.console import Console
    from devices.virtio.mmio import VirtioMmio
    from devices.virtio.net import Net
    from devices.virtio.pci import VirtioPci
    from devices.virtio.rng import Rng
    from devices.virtio.vsock import Vsock

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.virtio.device import VirtioDevice

QUIET = EventLog()
AREA = 0x8000
"""Where a fuzzed chain's bytes lie, and what its descriptors mostly point to."""


class Port:
    """The host's end of a console port."""

    name, is_open = "p", True

    def send(self, data: memoryview) -> int:
        return len(data)

    def more(self) -> None:
        pass


def reclaim(gpa: int, size: int) -> None:
    if gpa + size > LOW:
        raise GuestFault(gpa, size)


MODELS: dict[str, Callable[[FakeRam], VirtioDevice]] = {
    "block": lambda ram: Block("b", ram, MemoryImage(bytes(1 << 16)), log=QUIET),
    "net": lambda ram: Net("n", ram, Nowhere(), mac=bytes(6), log=QUIET),
    "rng": lambda ram: Rng("r", ram, source=bytes, log=QUIET),
    "balloon": lambda ram: Balloon("m", ram, reclaim=reclaim, log=QUIET),
    "console": lambda ram: Console("c", ram, [Port(), Port()], log=QUIET),
    "vsock": lambda ram: Vsock("v", ram, cid=3, connect=lambda port: End() if port % 2 else None, log=QUIET),
}


def fuzz_model(name: str) -> Callable[[bytes], None]:
    """Any chains with any content in any queue of a model: mostly well-formed, so that its parser is reached."""

    def run(data: bytes) -> None:
        source = atheris.FuzzedDataProvider(data)
        ram = FakeRam()
        driver = Driver(MODELS[name](ram), ram)
        for _ in range(source.ConsumeIntInRange(1, 8)):
            queue = source.ConsumeIntInRange(0, len(driver.queues) - 1)
            ours = driver.queues[queue]
            content = source.ConsumeBytes(source.ConsumeIntInRange(0, 80))
            ram.write(AREA, content)
            pieces = []
            for _ in range(source.ConsumeIntInRange(1, 4)):
                odd = source.ConsumeIntInRange(0, 15) == 0
                gpa = source.ConsumeInt(8) & (1 << 64) - 1 if odd else AREA + source.ConsumeIntInRange(0, 64)
                length = source.ConsumeInt(4) & 0xFFFFFFFF if odd else source.ConsumeIntInRange(0, 96)
                pieces.append((gpa, length, source.ConsumeBool()))
            pieces.sort(key=lambda piece: piece[2])
            if len(ours.free) < len(pieces):
                break
            ours.offer(ours.chain(pieces))
            ours.publish()
            driver.runner.kick(queue)
            ours.collect()
        driver.start()
        assert not driver.transport.status & NEEDS_RESET

    return run


def fuzz_queue(data: bytes) -> None:
    """Any bytes as rings and descriptors."""
    ram = FakeRam()
    driver = Driver(MODELS["rng"](ram), ram)
    ram.write(0x1000, data[:0x400])
    driver.runner.kick(0)
    assert driver.runner.served < 200
    driver.start()
    assert len(driver.ask(0, b"", 5)) == 5


def fuzz_registers(data: bytes) -> None:
    """Any accesses to any device's registers, on PCI through configuration space and BAR, and on MMIO."""
    source = atheris.FuzzedDataProvider(data)
    ram = FakeRam()
    device = MODELS[source.PickValueInList(sorted(MODELS))](ram)
    driver = Driver(device, ram, start=False)
    window = range(0xE0000000, 0xE0100000)
    target: Any
    if source.ConsumeBool():
        bus = PciBus(window)
        function = VirtioPci(device, driver.runner, [FakeRouted() for _ in device.queues], FakeRouted())
        driver.transport = function.transport
        bus.add(1, 0, function)
        function.place_bars(lambda _: window.start)
        ports, memory = PciConfigPorts(bus, on_reset=lambda: None), PciMemoryWindow(bus)
        ports.write(0, 4, 0x80000804)
        ports.write(4, 2, 2)
        target = [ports, memory]
        limits = [8, 0x8000]
    else:
        driver.transport = VirtioMmio(device, driver.runner, FakeSignal())
        target, limits = [driver.transport], [0x200]
    if source.ConsumeBool():
        driver.start()
    while source.remaining_bytes() > 4:
        which = source.ConsumeIntInRange(0, len(target) - 1)
        size = 1 << source.ConsumeIntInRange(0, 3)
        offset = source.ConsumeIntInRange(0, limits[which] - 1) & -size
        if which == 0 and len(target) == 2 and size == 8:
            continue
        if source.ConsumeBool():
            target[which].read(offset, size)
        else:
            target[which].write(offset, size, source.ConsumeInt(size) & (1 << 8 * size) - 1)
    assert driver.runner.served < 100000
    driver.start()
    assert driver.transport.status == 0xF


class FakeRouted(FakeSignal):
    """A signal that goes nowhere."""

    def to_message(self, address: int, data: int) -> None:
        pass

    def to_line(self) -> None:
        pass

    def hold(self) -> None:
        pass


def fuzz_qcow2(data: bytes) -> None:
    """Any changes to an image: opened, read and written in full, errors only of the kinds that are meant."""
    source = atheris.FuzzedDataProvider(data)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = os.path.join(folder, "i")
        create(path, 1 << 16, cluster_bits=9)
        with open(path, "r+b") as file:
            file.seek(512 * 20)
            file.truncate()
            for _ in range(source.ConsumeIntInRange(1, 12)):
                file.seek(source.ConsumeIntInRange(0, 4200))
                file.write(source.ConsumeBytes(source.ConsumeIntInRange(1, 16)))
        size = os.path.getsize(path)
        for readonly in (True, False):
            with contextlib.suppress(BackendError, OSError):
                image = Qcow2Image(path, readonly=readonly, cache="unsafe", above=())
                buffer = memoryview(bytearray(512))
                for offset in range(0, min(image.size, 1 << 16), 512):
                    with contextlib.suppress(OSError):
                        image.readv(offset, [buffer])
                        if not readonly and offset % 1024 == 0:
                            image.writev(offset, [buffer])
                image.close()
        assert os.path.getsize(path) < size + (1 << 22)


CHILD = "--child"
SEED = [bytes(64), bytes(range(256)), pack("<QIHH", 0x9000, 5, 2, 0) * 4]
TARGETS: dict[str, Callable[[bytes], None]] = {
    "queue": fuzz_queue,
    "registers": fuzz_registers,
    "qcow2": fuzz_qcow2,
    **{name: fuzz_model(name) for name in MODELS},
}


def main(arguments: list[str]) -> int:
    """Write the seeds and run one target in a process of its own, as libFuzzer ends its process without a clean-up."""
    name = arguments[1] if len(arguments) > 1 else ""
    if name == CHILD:
        atheris.Setup([arguments[0], *arguments[3:]], TARGETS[arguments[2]])
        atheris.Fuzz()
    if name not in TARGETS:
        print("\n".join(TARGETS))
        return 0 if name == "list" else 2
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(SEED):
            Path(folder, f"seed{index}").write_bytes(seed)
        return subprocess.run([sys.executable, __file__, CHILD, *arguments[1:], folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv))

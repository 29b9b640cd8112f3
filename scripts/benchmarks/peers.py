"""A virtio guest under hv and under its peers: how each is called, and how its run is watched."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import subprocess
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from benchmarks import kvmtool
from benchmarks.startup import QBOOT, RAM_MIB, qemu
from benchmarks.table import CannotRunError, Row, Sample
from benchmarks.tools import environment, hv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from benchmarks.tools import Settings

HV_MMIO: Final = "hv, mmio"
HV_PCI: Final = "hv, pci"
PAIRS: Final = (
    # ours, theirs, the transport
    (HV_MMIO, "QEMU microvm", "mmio"),
    (HV_PCI, "QEMU pc", "pci"),
    (HV_PCI, "kvmtool", "pci"),
)
"""Who is compared with whom: each on the same transport."""
TIMEOUT_S: Final = 60
READY: Final = re.compile(r"^ready$", re.MULTILINE)
LOOK_S: Final = 0.1
"""For so long a guest that only waits is watched, to see which thread is the vCPU."""


class Device(NamedTuple):
    """What the guest drives, in the words of each program.

    Attributes:
        ours: options of `hv run`.
        qemu: options of QEMU, but for the device itself.
        mmio, pci: QEMU's device on either transport.
        kvmtool: options of kvmtool.
    """

    ours: Sequence[str]
    qemu: Sequence[str]
    mmio: str
    pci: str
    kvmtool: Sequence[str]


def mhz() -> float:
    """Return the TSC's frequency, as the kernel shows it on machines whose TSC is constant."""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        found = re.search(r"cpu MHz\s*:\s*([\d.]+)", file.read())
    if found is None:
        raise CannotRunError("/proc/cpuinfo does not tell the TSC's frequency")
    return float(found[1])


class Peers:
    """Makes the commands that run one guest with one device."""

    def __init__(self, settings: Settings, kernel: Path, device: Device) -> None:
        """Run the multiboot guest `kernel`."""
        self._settings = settings
        self._kernel = kernel
        self._device = device
        self._hv = hv()
        self._lkvm = shutil.which("lkvm")
        if self._lkvm is None:
            settings.say("bench: there is no lkvm on the PATH: no rows for kvmtool")

    def commands(self, words: str) -> dict[str, list[str]]:
        """Return the command of every program that is here, by who it is, for a command line of the guest."""
        device = self._device
        told = ["-append", words]
        ours = [str(self._hv), "run", str(self._kernel), "--ram", RAM_MIB, *device.ours, "--append", words]
        serial = ["-serial", "stdio", *device.qemu]
        microvm = ["-global", "virtio-mmio.force-legacy=false", *serial, "-device", device.mmio, *told]
        pc = [*(["-bios", str(QBOOT)] if QBOOT.exists() else []), *serial, "-device", device.pci, *told]
        commands = {
            HV_MMIO: [*ours, "--virtio", "mmio"],
            "QEMU microvm": qemu(self._kernel, "microvm,auto-kernel-cmdline=off", *microvm),
            HV_PCI: [*ours, "--virtio", "pci"],
            "QEMU pc": qemu(self._kernel, "pc", *pc),
        }
        if self._lkvm is not None:
            image = self._settings.scratch / f"kvmtool-{words.replace(' ', '-')}"
            image.write_bytes(kvmtool.flat(self._kernel.read_bytes(), words))
            machine = ["run", "-k", str(image), "-m", RAM_MIB, "-c", "1", "--console", "serial", "--nodefaults"]
            commands["kvmtool"] = [self._lkvm, *machine, *device.kvmtool]
        return commands

    def compare(  # noqa: PLR0913, PLR0917 - a row's columns
        self,
        name: str,
        what: str,
        reach: float | None,
        words: str,
        rounds: int,
        unit: str,
        measure: Callable[[list[str]], float],
        without: str = "",
    ) -> list[Row]:
        """Measure every program's command, but for one, in alternating rounds; return a row for each pair."""
        commands = {who: command for who, command in self.commands(words).items() if who != without}
        samples = {who: Sample(unit, []) for who in commands}
        for _ in range(rounds):
            for who, command in list(commands.items()):
                try:
                    samples[who].values.append(measure(command))
                except CannotRunError as error:
                    if who != "kvmtool":
                        raise
                    # It is not part of any distribution, and wants a CPU with AMD-V or VT-x.
                    self._settings.say(f"bench: no rows for kvmtool: {error}")
                    self._lkvm = None
                    del commands[who], samples[who]
        return [
            Row(name, f"{what}, {virtio}", samples[ours], samples[theirs], theirs, reach)
            for ours, theirs, virtio in PAIRS
            if theirs in samples
        ]


class Held:
    """One run of a guest that bench.inc holds before and after what it measures. A context, whose end is the run's."""

    def __init__(self, command: Sequence[str | Path], scratch: Path) -> None:
        """Start the run, and wait until the guest is ready."""
        self._name = os.path.basename(command[0])
        self._errors = open(scratch / "errors", "w+")  # noqa: SIM115 - closed at the end of the context
        self._said = ""
        ours, theirs = os.openpty()  # kvmtool reads from nothing but a terminal
        tty.setraw(theirs)
        self._terminal = ours
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=self._errors, env=environment() | {"HOME": str(scratch)}
        )
        os.close(theirs)
        try:
            self._wait_for(READY)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        """Return the run."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the VMM, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
        os.close(self._terminal)

    def _wait_for(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Wait until what the guest has printed matches."""
        end = time.monotonic() + TIMEOUT_S
        while (found := pattern.search(self._said)) is None:
            left = end - time.monotonic()
            if left < 0 or self._process.poll() is not None:
                self._errors.seek(0)
                what = f"said nothing for {TIMEOUT_S} s" if left < 0 else f"ended with {self._process.returncode}"
                raise CannotRunError(f"{self._name} {what}: {self._errors.read().strip()[-500:]}")
            if select.select([self._terminal], [], [], min(left, 0.2))[0]:
                with contextlib.suppress(OSError):  # it has just ended
                    self._said += os.read(self._terminal, 4096).decode("latin-1").replace("\r", "")
        return found

    def measure(self, result: re.Pattern[str]) -> re.Match[str]:
        """Let the guest go on, and return its result."""
        os.write(self._terminal, b"\n")
        return self._wait_for(result)

    def thread_ns(self) -> dict[str, int]:
        """Return how long each thread of the VMM has run, in nanoseconds of a processor, by its number."""
        times = {}
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            try:
                times[task.name] = int((task / "schedstat").read_text().split()[0])
            except FileNotFoundError:  # it has just ended
                continue
        return times

    def vcpu(self) -> str:
        """Return the number of the vCPU's thread: the guest polls the console, and all others sleep."""
        before = self.thread_ns()
        time.sleep(LOOK_S)
        ran = {thread: ns - before.get(thread, 0) for thread, ns in self.thread_ns().items()}
        return max(ran, key=lambda thread: ran[thread])

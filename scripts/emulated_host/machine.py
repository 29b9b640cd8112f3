"""The QEMU process, and the sockets that stand for the emulated host's ports."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from emulated_host.errors import HostCannotError, find_tool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from emulated_host.image import Image

PORTS: Final = ("control", "stdin", "stdout", "stderr", "files")
"""The agent's virtio-serial ports, by name; inside/agent.py says what goes over each."""

APPEND: Final = (
    *("console=ttyS0", "panic=-1", "rootfstype=ext4", "ro", "rootwait", "init=/sbin/emulated-host-init"),
    # Self-tests of the crypto code take half of an emulated boot; mitigations slow what is slow enough. QEMU's CPUs
    # share one TSC, but the kernel's test of that fails on a busy machine, and KVM's clock in guests needs it.
    *("cryptomgr.notests", "mitigations=off", "no_timer_check", "tsc=reliable", "random.trust_cpu=on", "net.ifnames=0"),
    # A nested guest dies of a triple fault when a page is moved on which an interrupt is being delivered: TCG does not
    # get over the nested page fault. So nothing here moves pages that are in use.
    *("transparent_hugepage=never", "sysctl.vm.compaction_proactiveness=0"),
)

PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal that a process gets when its parent dies."""

LOG_BYTES: Final = 1 << 16
"""How much of the kernel log is kept for the case of a failure."""


class Size(NamedTuple):
    """What the emulated host has."""

    memory_mib: int = 4096
    cpus: int = 2


def command_line(image: Image, payload: Path, size: Size, ports: Mapping[str, int], *, verbose: bool) -> list[str]:
    """Return QEMU's argv.

    Args:
        image: the root image, opened read-only.
        payload: the second disk, opened read-only.
        size: memory and CPUs.
        ports: a connected socket's descriptor for each of PORTS.
        verbose: let the kernel say all it has to say.
    """
    argv = [find_tool("qemu-system-x86_64"), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]
    argv += ["-m", str(size.memory_mib), "-smp", str(size.cpus), "-serial", "stdio"]
    # One disk on each kind of controller: two of a kind would be named in the order in which they happen to answer.
    nvme_first = image.facts["disk"] == "nvme"
    for name, path, on_nvme in (("root", image.disk, nvme_first), ("payload", payload, not nvme_first)):
        # A comma in a path is doubled (QEMU's option syntax).
        file = str(path).replace(",", ",,")
        argv += ["-drive", f"id={name},if=none,format=raw,readonly=on,file={file}"]
        argv += ["-device", f"nvme,serial={name},drive={name}" if on_nvme else f"virtio-blk-pci,drive={name}"]
    root, second = ("/dev/nvme0n1", "/dev/vda") if nvme_first else ("/dev/vda", "/dev/nvme0n1")
    argv += ["-device", f"virtio-serial-pci,max_ports={len(PORTS) + 1}"]
    for number, name in enumerate(PORTS, 1):
        argv += ["-chardev", f"socket,id={name},fd={ports[name]}"]
        argv += ["-device", f"virtserialport,nr={number},chardev={name},name={name}"]
    append = [*APPEND, f"root={root}", f"payload={second}", *(() if verbose else ("quiet",))]
    return [*argv, "-kernel", str(image.kernel), "-append", " ".join(append)]


class Machine:
    """A running emulated host. Use it as a context manager: nothing of it is left afterwards.

    Attributes:
        ports: our end of each port, by name; non-blocking.
        log: a descriptor to read the kernel log (and QEMU's own complaints) from.
    """

    def __init__(self, build_argv: Callable[[Mapping[str, int]], list[str]]) -> None:
        """Start QEMU with the argv that `build_argv` makes of the ports' descriptors.

        Raises:
            HostCannotError: QEMU is missing.
        """
        pairs = {name: socket.socketpair() for name in PORTS}
        self.ports = {name: pair[0] for name, pair in pairs.items()}
        theirs = {name: pair[1].fileno() for name, pair in pairs.items()}
        self._tail = b""
        libc = ctypes.CDLL(None)
        parent = os.getpid()

        def die_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)  # it died before prctl

        try:
            self._process = subprocess.Popen(
                build_argv(theirs),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=tuple(theirs.values()),
                start_new_session=True,  # Ctrl-C at the terminal is not for QEMU
                preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads here
            )
        finally:
            for _, end in pairs.values():
                end.close()
        if self._process.stdout is None:
            raise HostCannotError("QEMU started without an output pipe")
        self.log = self._process.stdout.fileno()
        for end in self.ports.values():
            end.setblocking(False)

    def read_log(self) -> bytes:
        """Return what the log has now, keeping the end of it for `log_tail`; nothing means that QEMU ended."""
        data = os.read(self.log, LOG_BYTES)
        self._tail = (self._tail + data)[-LOG_BYTES:]
        return data

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines that were read from the log."""
        return "\n".join(self._tail.decode(errors="replace").replace("\r", "").splitlines()[-lines:])

    def __enter__(self) -> Self:
        """Return the running machine."""
        return self

    def __exit__(self, *_: object) -> None:
        """End QEMU. Its disks are read-only and its memory is nobody's: there is nothing to shut down in order."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        for end in self.ports.values():
            end.close()

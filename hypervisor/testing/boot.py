"""From a description to a machine that has been started, and what speaks with its agent."""

from __future__ import annotations

import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

from hypervisor.errors import VmmError
from hypervisor.testing.failures import GuestFailed

if TYPE_CHECKING:
    from hypervisor import Machine, MachineConfig
    from hypervisor.testing.client import Agent
    from hypervisor.testing.guest import GuestMachine
    from hypervisor.testing.spec import GuestSpec

__all__ = ["agent_of", "config_of", "mount_shares", "wait_ready"]


def config_of(spec: GuestSpec, folder: str, **changes: Any) -> MachineConfig:
    """Return the machine's description, with the agent's initramfs and port, and the shared folders' disks.

    Args:
        spec: what is asked for.
        folder: where what has to be made is put.
        changes: settings of MachineConfig that win.
    """
    plain = spec.config(**changes)
    if spec.share:
        plain = plain.replace(disks=[*plain.disks, *(_share_disk(host) for host, _ in spec.share)])
    if not spec.is_linux:
        return plain
    from hypervisor import testing  # noqa: PLC0415 - bare guests need none of it

    archive = os.path.join(folder, f"initramfs-{spec.key()}.cpio")
    if not os.path.exists(archive):
        with tempfile.TemporaryDirectory(dir=folder) as work:  # whole when it is there: others may look for it
            made = os.path.join(work, "made")
            _make_initramfs(spec.kernel, plain.initrd, work, made)
            os.replace(made, archive)
    return plain.replace(
        initrd=archive, append=f"{plain.append} {testing.RDINIT}", ports=[*plain.ports, testing.port()]
    )


def _make_initramfs(kernel: str, base: str | os.PathLike[str] | None, work: str, out: str) -> None:
    """Put the agent into the user's initramfs, into that of a kernel that has a name, or into one with busybox."""
    from hypervisor import initramfs, kernels, testing  # noqa: PLC0415 - as above

    name = kernel if kernel in kernels.names() else None
    if base is None and name is None:
        base = initramfs.build(os.path.join(work, "busybox"))
    testing.initramfs(out, kernel=name, base=base)


def _share_disk(host: str) -> str:
    """Return the disk that holds a copy of a folder of the host."""
    from hypervisor.testing.disks import host_folder_image  # noqa: PLC0415 - few guests share one

    return f"{host_folder_image(host).replace(',', ',,')},format=raw,readonly"


def agent_of(spec: GuestSpec, machine: Machine) -> Agent | None:
    """Return what speaks with the machine's agent, None for a guest without one."""
    if not spec.is_linux:
        return None
    from hypervisor.testing import Agent  # noqa: PLC0415 - as above

    return Agent.of(machine)


def wait_ready(guest: GuestMachine) -> None:
    """Wait until a guest that was just started is ready for a test.

    Raises:
        GuestFailed: it failed before, or was not ready in time.
    """
    spec = guest.spec
    deadline = time.monotonic() + spec.boot_timeout
    try:
        if guest.has_agent:
            guest.agent.ready(spec.boot_timeout)
        if spec.ready_text is not None:  # the agent is there before the guest's own /init has done its work
            guest.console.expect(spec.ready_text, max(deadline - time.monotonic(), 0))
        if guest.has_agent:
            mount_shares(guest)
            for command in spec.setup:
                guest.agent.run(command, check=True, timeout=spec.boot_timeout)
    except VmmError as error:
        if isinstance(error, GuestFailed):
            raise
        guest.wait_for_cause()
        if guest.failure is not None:
            raise guest.failure from error
        outcome = guest.machine.outcome
        why = str(error) if outcome is None else f"it is over: {outcome.message}"
        failure = GuestFailed("hang" if outcome is None else "death", f"the guest {spec.title()} did not boot: {why}")
        guest.fail(failure)
        raise failure from error


def mount_shares(guest: GuestMachine) -> None:
    """Mount the copies of the host's folders where the spec wants them."""
    own = len(guest.spec.config().disks)
    for number, (_, place) in enumerate(guest.spec.share, own):
        device = f"/dev/vd{chr(ord('a') + number)}"
        guest.agent.run(["mkdir", "-p", place], check=True, timeout=30)
        guest.agent.run(["mount", "-t", "ext4", "-o", "ro", device, place], check=True, timeout=30)

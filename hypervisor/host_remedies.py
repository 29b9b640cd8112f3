"""What to do about a host that cannot run guests, or not all of them."""

from __future__ import annotations

import grp
import os
import pwd
from errno import EBUSY, EINVAL, ENODEV, ENOENT, ENOMEM, ENOTTY, ENXIO, EPERM
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.host import SOFTWARE_MODULE, VENDOR_FLAGS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hypervisor.host_proof import Proof
    from hypervisor.host_report import Capability, Facts, Part

__all__ = ["Remedy", "for_capabilities", "for_device", "for_parts", "for_proof", "for_software"]

EMULATED_HOST: Final = "scripts/emulated-host -- hv run ..."
FIRMWARE: Final = "switch on SVM (AMD) or VT-x (Intel) in the firmware's set-up"
RIVALS: Final = {"vboxdrv": "VirtualBox", "vmmon": "VMware"}
"""Modules of hypervisors that may hold the CPU's virtualization for themselves."""


class Remedy(NamedTuple):
    """Something that is wrong, and what to do about it."""

    problem: str
    action: str


def for_device(path: str, error: OSError, facts: Facts) -> Iterator[Remedy]:
    """Say what to do when the KVM device cannot be opened."""
    if error.errno in (ENOENT, ENODEV, ENXIO):
        yield from _absence_remedies(path, facts)
    elif isinstance(error, PermissionError):
        yield from _permission_remedies(path, error, facts)
    elif error.errno == EBUSY:
        yield _busy(facts)
    elif error.errno == ENOTTY:
        yield Remedy(
            f"{path} is not a device", "remove it and load the module again: sudo modprobe kvm_amd or kvm_intel"
        )
    else:
        yield Remedy(f"{path}: {error.strerror}", "see what the kernel says: sudo dmesg | grep -i kvm")


def _absence_remedies(path: str, facts: Facts) -> Iterator[Remedy]:
    able = [module for module, flag in VENDOR_FLAGS.items() if flag in facts.flags]
    loaded = [module for module in (*able, SOFTWARE_MODULE) if module in facts.modules]
    if not facts.x86:
        yield Remedy("this is no x86-64 host", "guests run where the CPU is x86-64")
    elif facts.container and (able or facts.registered):
        yield Remedy(f"{path} is not in this container", "start the container with --device /dev/kvm")
    elif facts.registered:
        yield Remedy(f"KVM is there, but {path} is missing", f"make it: sudo mknod {path} c 10 232")
    elif loaded:
        yield Remedy(
            f"{loaded[0]} is in the kernel but did not start", f"{FIRMWARE}; the reason: sudo dmesg | grep -i kvm"
        )
    elif able:
        yield Remedy(
            f"the module {able[0]} is not loaded",
            f"load it: sudo modprobe {able[0]}; if that says 'Operation not supported', {FIRMWARE}",
        )
    elif "hypervisor" in facts.flags:
        yield Remedy(
            "this virtual machine has no nested virtualization",
            "on the machine below, load its module with nested=1 (sudo modprobe kvm_intel nested=1, or kvm_amd) and "
            "give this one its CPU (-cpu host); in a cloud, take an instance type with nested virtualization",
        )
    else:
        yield Remedy("the CPU shows neither vmx nor svm", f"{FIRMWARE}, or take another CPU")
    yield Remedy("meanwhile guests can run without KVM", f"use the emulated host: {EMULATED_HOST}")


def _permission_remedies(path: str, error: OSError, facts: Facts) -> Iterator[Remedy]:
    if error.errno == EPERM:
        action = "start the container with --device /dev/kvm" if facts.container else "see what confines this process"
        yield Remedy(f"{path} is there, but this process may open no such device", action)
        return
    status = Path(path).stat()
    number = status.st_gid
    try:
        group = grp.getgrgid(number)
    except KeyError:
        group = None
    if number == 0 or status.st_mode & 0o060 != 0o060:
        yield Remedy(
            f"{path} is not open to a group of users",
            f"sudo chown root:kvm {path} && sudo chmod 660 {path} && sudo usermod -aG kvm $USER, then log in again",
        )
    elif number in os.getgroups():
        yield Remedy(f"{path} is refused to its own group", f"see its access list: getfacl {path}")
    elif group is None:
        yield Remedy(
            f"{path} belongs to group {number}, which has no name here",
            f"start the container with --group-add {number}" if facts.container else f"sudo groupadd -g {number} kvm",
        )
    elif _user() in group.gr_mem:
        yield Remedy(
            f"this user joined group {group.gr_name} after logging in", f"log in again, or: newgrp {group.gr_name}"
        )
    else:
        yield Remedy(
            f"{path} belongs to group {group.gr_name}, and this user is not in it",
            f"sudo usermod -aG {group.gr_name} $USER, then log in again",
        )
    yield Remedy(
        "on a hosted CI runner there is no logging in again",
        """give everyone access: echo 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' | """
        "sudo tee /etc/udev/rules.d/99-kvm4all.rules && sudo udevadm control --reload-rules && "
        "sudo udevadm trigger --name-match=kvm",
    )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


def _busy(facts: Facts) -> Remedy:
    rival = next((name for module, name in RIVALS.items() if module in facts.modules), None)
    return Remedy(
        f"{rival or 'another hypervisor'} holds the CPU's virtualization",
        f"end its virtual machines{', or unload its modules' if rival else ''}, then try again",
    )


def for_proof(proof: Proof, facts: Facts) -> Iterator[Remedy]:
    """Say what to do when KVM is there and a guest does not run."""
    if proof.ran:
        return
    if proof.errno == EBUSY:
        yield _busy(facts)
    elif proof.errno == ENOMEM:
        yield Remedy("the host has no memory left for a VM", "end something, or raise the limits (ulimit -a, cgroup)")
    elif proof.errno == EINVAL and "hypervisor" in facts.flags:
        yield Remedy("nested virtualization does not work here", "update the hypervisor below, or take another host")
    else:
        yield Remedy(f"no guest runs: {proof.detail}", "see what the kernel says: sudo dmesg | grep -i kvm")


def for_capabilities(capabilities: Iterable[Capability]) -> Iterator[Remedy]:
    """Say what to do about capabilities that KVM does not have."""
    lists: dict[bool, list[str]] = {True: [], False: []}
    for cap in capabilities:
        if not cap.value:
            lists[cap.required].append(f"KVM_CAP_{cap.name} ({cap.purpose})")
    if lists[True]:
        yield Remedy(f"required and missing: {', '.join(lists[True])}", "run a newer kernel on the host")
    if lists[False]:
        yield Remedy(f"missing: {', '.join(lists[False])}", "none is needed; a newer kernel or CPU may have it")


def for_parts(parts: Iterable[Part]) -> Iterator[Remedy]:
    """Say what to do about a part that nothing works without."""
    if any(part.required and not part.found for part in parts):
        yield Remedy("the KVM bindings are not built", "install a C compiler, then this package again: pip install .")


def for_software() -> Remedy:
    """Say what to do about a KVM that runs guest kernels in its instruction emulator."""
    return Remedy("a Linux kernel does not get through on a software KVM", f"use the emulated host: {EMULATED_HOST}")

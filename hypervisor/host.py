"""What kind of host this is, told quickly: `hv run` asks at every start, so this module imports next to nothing.

The whole examination that `hv check` prints is in host_report.
"""

from __future__ import annotations

import os
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container

__all__ = ["Kind", "first_cpu", "is_software_kvm", "kind_by", "quick_kind", "read_text"]

VENDOR_FLAGS: Final = {"kvm_amd": "svm", "kvm_intel": "vmx"}
"""The modules that use a CPU's virtualization, and the flag in /proc/cpuinfo that they need."""
SOFTWARE_MODULE: Final = "kvm_pvm"


class Kind(Enum):
    """What runs guests here; the values are for programs."""

    AMD_V = "amd-v"
    VT_X = "vt-x"
    SOFTWARE = "software"
    NONE = "none"


MODULE_KINDS: Final = {"kvm_amd": Kind.AMD_V, "kvm_intel": Kind.VT_X, SOFTWARE_MODULE: Kind.SOFTWARE}


def quick_kind(kvm_path: str = "/dev/kvm", *, proc: str = "/proc", sys: str = "/sys") -> Kind:
    """Tell the kind of host in a few system calls, by presence alone: KVM itself is not opened.

    /proc/cpuinfo is read only where the modules do not settle the question.
    """
    if not os.path.exists(kvm_path):
        return Kind.NONE
    modules = [name for name in MODULE_KINDS if os.path.isdir(f"{sys}/module/{name}")]
    return kind_by(modules, () if len(modules) == 1 else first_cpu(proc)[0])


@cache
def is_software_kvm() -> bool:
    """Return whether this host's /dev/kvm is a software one, which cannot run a Linux kernel."""
    return quick_kind() is Kind.SOFTWARE


def kind_by(modules: Container[str], flags: Container[str]) -> Kind:
    """Judge a host with a KVM device by its kernel modules and CPU flags.

    One of these modules at most is at work, but a built-in one shows in /sys/module also where the CPU has no use for
    it: then the flags decide. Where a flag is there and no module is seen at all, KVM is taken for built in.
    """
    seen = [name for name in MODULE_KINDS if name in modules]
    if len(seen) == 1:
        return MODULE_KINDS[seen[0]]
    for module, flag in VENDOR_FLAGS.items():
        if flag in flags and (module in modules or SOFTWARE_MODULE not in modules):
            return MODULE_KINDS[module]
    return Kind.SOFTWARE


def first_cpu(proc: str = "/proc") -> tuple[frozenset[str], str]:
    """Return the flags and the model name of the first CPU in /proc/cpuinfo, empty where there is none."""
    fields = {}
    for line in read_text(f"{proc}/cpuinfo").partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return frozenset(fields.get("flags", "").split()), fields.get("model name", "")


def read_text(path: str) -> str:
    """Return the first 64 KiB of a file of the kernel's as text, empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16)
    except OSError:
        return ""

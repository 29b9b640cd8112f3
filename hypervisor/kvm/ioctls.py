"""One place where an errno becomes a KvmError."""

from __future__ import annotations

from typing import Any, Final

from hypervisor.errors import KvmError
from hypervisor.kvm._kvm import ffi, lib

OTHERS: Final = {
    "KVM_CHECK_EXTENSION",
    "KVM_CLEAR_DIRTY_LOG",
    "KVM_ENABLE_CAP",
    "KVM_IOEVENTFD",
    "KVM_IRQFD",
    "KVM_IRQ_LINE",
    "KVM_KVMCLOCK_CTRL",
}


def refusal(request: int, errno: int) -> KvmError:
    """Return the error for an ioctl that the kernel refused."""
    names = (name for name in dir(lib) if name.startswith(("KVM_GET_", "KVM_SET_", "KVM_CREATE_")) or name in OTHERS)
    return KvmError(next((name for name in names if getattr(lib, name) == request), hex(request)), errno)


def control(fd: int, request: int, argument: Any = ffi.NULL) -> int:
    """Do an ioctl that takes a pointer; return its result, raise KvmError when the kernel refuses."""
    result: int = lib.hv_ioctl(fd, request, argument)
    if result < 0:
        raise refusal(request, -result)
    return result


def control_value(fd: int, request: int, value: int = 0) -> int:
    """Do an ioctl that takes a plain number; return its result, raise KvmError when the kernel refuses."""
    result: int = lib.hv_ioctl_value(fd, request, value)
    if result < 0:
        raise refusal(request, -result)
    return result

"""The proof that a guest can run on this host: one of three instructions, run and looked at.

Only the standard library is used, so that it works where the bindings could not be built. KVM's numbers are those of
<linux/kvm.h>.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import ExitStack
from ctypes import addressof, c_char
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, mmap
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Proof", "prove"]

KVM_CREATE_VM: Final = 0xAE01
KVM_GET_VCPU_MMAP_SIZE: Final = 0xAE04
KVM_CREATE_VCPU: Final = 0xAE41
KVM_SET_USER_MEMORY_REGION: Final = 0x4020AE46
KVM_SET_TSS_ADDR: Final = 0xAE47
KVM_RUN: Final = 0xAE80

PROOF_SECONDS: Final = 20.0
"""Generous: in an emulated, busy host the guest takes more than a second."""
RESET_PAGE: Final = 0xFFFF_F000
"""The page that a CPU starts in: CS base 0xFFFF0000, IP 0xFFF0 (SDM volume 3, First Instruction Executed)."""
RESET_OFFSET: Final = 0xFF0
TSS_PAGES: Final = 0x1_0000
CODE: Final = b"\xb0\x2a\xe6\x80\xf4"  # mov al, 42; out 0x80, al; hlt
EXIT_IO: Final = 2
EXIT_HLT: Final = 5
EXIT_REASON: Final = struct.Struct("<8xI")  # struct kvm_run, up to exit_reason
EXIT_PORT: Final = struct.Struct("<32xBBHIQ")  # direction, size, port, count, data_offset
EXPECTED: Final = (1, 1, 0x80, 1)


class Proof(NamedTuple):
    """Whether a guest of three instructions ran, how it went, and the errno of the ioctl that failed, if one did."""

    ran: bool
    detail: str
    errno: int = 0


def prove(kvm: int, seconds: float = PROOF_SECONDS) -> Proof:
    """Run `mov al, 42; out 0x80, al; hlt` as a guest and look at its exits.

    A vCPU starts at the reset vector in real mode, so one page there is all the guest needs. It runs in a thread of
    its own: where nested virtualization is broken, KVM_RUN may never return.

    Args:
        kvm: descriptor of the KVM device; a copy of it is used.
        seconds: how long to wait.
    """
    results: list[Proof] = []
    copy = os.dup(kvm)
    started = monotonic()
    thread = Thread(target=lambda: results.append(_run_guest(copy)), name="hv-proof", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        return Proof(ran=False, detail=f"a guest of three instructions did not end within {seconds:g} s")
    proof = results[0]
    took = (monotonic() - started) * 1000
    return proof._replace(detail=f"{proof.detail}, in {took:.1f} ms") if proof.ran else proof


def _run_guest(kvm: int) -> Proof:
    """Do the work of `prove`, and close `kvm`."""
    step = "KVM_CREATE_VM"
    with ExitStack() as stack:
        stack.callback(os.close, kvm)
        try:
            vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
            stack.callback(os.close, vm)
            step = "KVM_SET_TSS_ADDR"
            fcntl.ioctl(vm, KVM_SET_TSS_ADDR, TSS_PAGES)
            step = "KVM_SET_USER_MEMORY_REGION"
            memory = mmap(-1, 4096, flags=MAP_PRIVATE | MAP_ANONYMOUS)
            memory[RESET_OFFSET : RESET_OFFSET + len(CODE)] = CODE
            address = addressof(c_char.from_buffer(memory))
            fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", 0, 0, RESET_PAGE, 4096, address))
            step = "KVM_CREATE_VCPU"
            vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
            stack.callback(os.close, vcpu)
            run = mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), flags=MAP_SHARED)
            step = "KVM_RUN"
            return _check_exits(run, lambda: _enter(vcpu))
        except OSError as error:
            return Proof(ran=False, detail=f"{step}: {error.strerror}", errno=error.errno or 0)


def _enter(vcpu: int) -> None:
    """Run the guest up to its next exit; a signal for this process is none."""
    while True:
        try:
            fcntl.ioctl(vcpu, KVM_RUN, 0)
        except InterruptedError:
            continue
        return


def _check_exits(run: mmap, enter: Callable[[], None]) -> Proof:
    """Enter the guest twice: it must write 42 to port 0x80, then halt."""
    enter()
    (reason,) = EXIT_REASON.unpack_from(run)
    *access, offset = EXIT_PORT.unpack_from(run)
    if (reason, tuple(access)) != (EXIT_IO, EXPECTED) or run[offset] != 42:
        return Proof(ran=False, detail=f"the guest's port write came as exit reason {reason}")
    enter()
    (reason,) = EXIT_REASON.unpack_from(run)
    if reason != EXIT_HLT:
        return Proof(ran=False, detail=f"the guest's hlt came as exit reason {reason}")
    return Proof(ran=True, detail="it wrote to a port and halted")

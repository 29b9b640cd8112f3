"""The proof that a guest runs: on the real device, on what is none, and against exits that are not the right ones."""

from __future__ import annotations

import errno
import os
import struct
import threading

import pytest

from hypervisor import host_proof
from hypervisor.host_proof import Proof, prove


@pytest.mark.kvm
def test_a_guest_runs_here_and_leaves_nothing_behind() -> None:
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        prove(fd)
        before = sorted(os.listdir("/proc/self/fd"))
        proof = prove(fd)
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(fd)
    assert proof.ran, proof.detail
    assert proof.detail.startswith("it wrote to a port and halted, in ")
    assert not [thread for thread in threading.enumerate() if thread.name == "hv-proof"]


def test_the_proof_names_the_ioctl_that_failed() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        proof = prove(fd)
    finally:
        os.close(fd)
    assert not proof.ran
    assert proof.detail.startswith("KVM_CREATE_VM: ")
    assert proof.errno == errno.ENOTTY


def test_a_guest_that_never_stops_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def hang(kvm: int) -> Proof:
        release.wait(60)
        os.close(kvm)
        return Proof(ran=True, detail="too late")

    monkeypatch.setattr(host_proof, "_run_guest", hang)
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        proof = prove(fd, seconds=0.01)
    finally:
        release.set()
        os.close(fd)
    assert not proof.ran
    assert "0.01 s" in proof.detail


def exits(*reasons: bytes) -> Proof:
    """Play a vCPU's exits to the proof: each is what struct kvm_run holds after one KVM_RUN."""
    run = bytearray(4096)
    left = list(reasons)

    def enter() -> None:
        run[:] = left.pop(0).ljust(4096, b"\0")

    return host_proof._check_exits(run, enter)  # type: ignore[arg-type]


def port_exit(value: int = 42, port: int = 0x80, direction: int = 1) -> bytes:
    """KVM_EXIT_IO is 2; the union is at 32: direction, size, port, count, data_offset."""
    words = struct.pack("<8xI20xBBHIQ", 2, direction, 1, port, 1, 1024)
    return words.ljust(1024, b"\0") + bytes([value])


HLT = struct.pack("<8xI", 5)
SHUTDOWN = struct.pack("<8xI", 8)


def test_the_proof_believes_only_the_right_exits() -> None:
    assert exits(port_exit(), HLT).ran
    assert not exits(port_exit(value=41), HLT).ran
    assert not exits(port_exit(port=0x81), HLT).ran
    assert not exits(port_exit(direction=0), HLT).ran
    assert exits(SHUTDOWN).detail == "the guest's port write came as exit reason 8"
    assert exits(port_exit(), SHUTDOWN).detail == "the guest's hlt came as exit reason 8"

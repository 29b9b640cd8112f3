"""The whole KVM state of a machine, as plain values: interrupt controllers, timers, clock, and every vCPU.

`save` and `load` want a VM that stands still: no vCPU runs, each is settled (`Vcpu.settle`), and nobody drives an
interrupt line. Memory is not part of it: it is read after `save` has nothing more to complete, and written before
`load`. Sources: Linux Documentation/virt/kvm/api.rst, and devices/vcpu.rst for how the TSCs follow the clock.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from hypervisor.cpuid import Entry
from hypervisor.kvm._kvm import ffi, lib
from hypervisor.kvm.ioctls import control
from hypervisor.kvm.vcpu import Segment
from hypervisor.kvm.vcpu_state import MSR_TSC, Refusal, VcpuState, load_vcpu, save_vcpu, tell_paused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hypervisor.kvm.handles import Vm

__all__ = ["ClockState", "Loaded", "MachineState", "VmState", "from_plain", "load", "save", "to_plain"]

MASK64: Final = (1 << 64) - 1
CHIPS: Final = {
    "pic_master": (lib.KVM_IRQCHIP_PIC_MASTER, "struct kvm_pic_state"),
    "pic_slave": (lib.KVM_IRQCHIP_PIC_SLAVE, "struct kvm_pic_state"),
    "ioapic": (lib.KVM_IRQCHIP_IOAPIC, "struct kvm_ioapic_state"),
}
CHIP_AT: Final = 8
"""Where the controller's registers lie in struct kvm_irqchip: behind two 32-bit numbers, in a union."""
PIT_CHANNELS: Final = 3


class ClockState(NamedTuple):
    """The guest's kvmclock and the moment at which it was read.

    Attributes:
        guest_ns: nanoseconds that the guest has lived.
        realtime_ns: the host's CLOCK_REALTIME at that moment.
        host_tsc: the host's TSC at that moment; 0: KVM does not tell, because it is not a good clock there.
    """

    guest_ns: int
    realtime_ns: int
    host_tsc: int


class VmState(NamedTuple):
    """What the kernel keeps for the machine as a whole.

    Attributes:
        clock: the guest's clock.
        chips: pic_master, pic_slave, ioapic: struct kvm_pic_state or kvm_ioapic_state; {} without them.
        pit: struct kvm_pit_state2, but that count_load_time is the channel's age in nanoseconds; b"" without one.
    """

    clock: ClockState
    chips: dict[str, bytes]
    pit: bytes


class MachineState(NamedTuple):
    """Everything in the kernel that makes up a machine, but for its memory, memory slots, routes and eventfds."""

    vm: VmState
    vcpus: list[VcpuState]


class Loaded(NamedTuple):
    """How `load` went.

    Attributes:
        refused: MSRs that kept another value.
        exact_tsc: the TSCs go on together with the clock, to the tick; else each was set by itself.
    """

    refused: list[Refusal]
    exact_tsc: bool


# --- out ----------------------------------------------------------------------------------------------------------


def save(vm: Vm, msr_indices: Sequence[int]) -> MachineState:
    """Read everything of a machine that stands still.

    Args:
        vm: its handle.
        msr_indices: what `Kvm.msr_indices` returned.

    Raises:
        ValueError: an access of the guest is half done.
        KvmError: when the kernel refuses.
    """
    vcpus = [save_vcpu(vm, vcpu, msr_indices) for vcpu in vm.vcpus]
    chips = {name: _read_chip(vm, *chip) for name, chip in CHIPS.items()} if vm.has_irqchip else {}
    return MachineState(VmState(_read_clock(vm), chips, _read_pit(vm) if vm.has_pit else b""), vcpus)


def _read_clock(vm: Vm) -> ClockState:
    data = ffi.new("struct kvm_clock_data *")
    control(vm.fileno(), lib.KVM_GET_CLOCK, data)
    host_tsc = data.host_tsc if data.flags & lib.KVM_CLOCK_HOST_TSC else 0
    return ClockState(data.clock, data.realtime or time.time_ns(), host_tsc)


def _read_chip(vm: Vm, number: int, kind: str) -> bytes:
    chip = ffi.new("struct kvm_irqchip *")
    chip.chip_id = number
    control(vm.fileno(), lib.KVM_GET_IRQCHIP, chip)
    return bytes(ffi.buffer(chip)[CHIP_AT : CHIP_AT + ffi.sizeof(kind)])


def _read_pit(vm: Vm) -> bytes:
    pit = ffi.new("struct kvm_pit_state2 *")
    control(vm.fileno(), lib.KVM_GET_PIT2, pit)
    _change_epoch(pit, time.monotonic_ns())
    return bytes(ffi.buffer(pit))


def _change_epoch(pit: Any, now: int) -> None:
    """Turn the moments at which counters were loaded (host's CLOCK_MONOTONIC) into ages at `now`, or back."""
    for channel in pit.channels[0:PIT_CHANNELS]:
        channel.count_load_time = now - channel.count_load_time


# --- in -----------------------------------------------------------------------------------------------------------


def load(vm: Vm, state: MachineState, *, advance: bool = False) -> Loaded:
    """Put a VM that stands still into a saved state; its memory and its vCPUs are there, of the same number.

    Args:
        vm: its handle.
        state: what `save` returned, here or elsewhere.
        advance: let the guest's clock and TSCs be where they would be had the guest run all the while; else no time
            has passed for it.

    Raises:
        ValueError: the state is of another number of vCPUs or has other interrupt controllers; or an access is half
            done.
        HostError: this host lacks something that the guest uses.
        KvmError: when the kernel refuses.
    """
    check_same_machine(vm, state)
    saved = state.vm.clock
    elapsed = max(0, time.time_ns() - saved.realtime_ns) if advance else 0
    # The clock first: the TSCs follow it, and the deadline timers of the LAPICs follow the TSCs.
    control(vm.fileno(), lib.KVM_SET_CLOCK, ffi.new("struct kvm_clock_data *", {"clock": saved.guest_ns + elapsed}))
    now = _read_clock(vm)
    refused = []
    exact = []
    for vcpu, vcpu_state in zip(vm.vcpus, state.vcpus, strict=True):
        khz = vcpu_state.tsc_khz
        offset = _new_tsc_offset(vcpu_state, saved, now) if khz and khz == vcpu.tsc_khz() else None
        tsc = (vcpu_state.msrs.get(MSR_TSC, 0) + elapsed * khz // 1_000_000) & MASK64
        refused += load_vcpu(vm, vcpu, vcpu_state, tsc=tsc, tsc_offset=offset)
        exact.append(offset is not None)
    # The controllers last: one that has an interrupt to deliver hands it to LAPICs that are in place.
    for name, registers in state.vm.chips.items():
        control(vm.fileno(), lib.KVM_SET_IRQCHIP, chip_argument(*CHIPS[name], registers))
    if state.vm.pit:
        pit = pit_argument(state.vm.pit)
        _change_epoch(pit, time.monotonic_ns())
        control(vm.fileno(), lib.KVM_SET_PIT2, pit)
    for vcpu in vm.vcpus:
        tell_paused(vcpu)
    return Loaded(refused, all(exact))


def _new_tsc_offset(state: VcpuState, then: ClockState, now: ClockState) -> int | None:
    """Return the offset with which the TSC has moved on as far as the clock; None where KVM does not tell enough."""
    if state.tsc_offset is None or not then.host_tsc or not now.host_tsc:
        return None
    passed = (now.guest_ns - then.guest_ns) * state.tsc_khz // 1_000_000
    return (state.tsc_offset + then.host_tsc + passed - now.host_tsc) & MASK64


def check_same_machine(vm: Vm, state: MachineState) -> None:
    """Raise ValueError when the state is of another number of vCPUs or has other interrupt controllers."""
    if [vcpu.index for vcpu in vm.vcpus] != [vcpu.index for vcpu in state.vcpus]:
        raise ValueError(f"a state of {len(state.vcpus)} vCPUs for a machine of {len(vm.vcpus)}")
    if (bool(state.vm.chips), bool(state.vm.pit)) != (vm.has_irqchip, vm.has_pit):
        raise ValueError("the state has other interrupt controllers or timers than the machine")


def chip_argument(number: int, kind: str, registers: bytes) -> Any:
    """Return the struct kvm_irqchip that sets a controller."""
    if len(registers) != ffi.sizeof(kind):
        raise ValueError(f"{len(registers)} bytes are no {kind}")
    chip = ffi.new("struct kvm_irqchip *")
    chip.chip_id = number
    ffi.buffer(chip)[CHIP_AT : CHIP_AT + len(registers)] = registers
    return chip


def pit_argument(saved: bytes) -> Any:
    """Return the struct kvm_pit_state2 that sets the timers, still with ages in the place of moments."""
    pit = ffi.new("struct kvm_pit_state2 *")
    if len(saved) != ffi.sizeof("struct kvm_pit_state2"):
        raise ValueError(f"{len(saved)} bytes are no struct kvm_pit_state2")
    ffi.buffer(pit)[:] = saved
    return pit


# --- as what a file can carry -------------------------------------------------------------------------------------


def to_plain(state: MachineState) -> dict[str, Any]:
    """Return the state as dicts, lists, ints, bytes and None, keyed by strings."""
    vcpus = [
        vcpu._asdict()
        | {
            "special": {k: list(v) if isinstance(v, Segment) else v for k, v in vcpu.special.items()},
            "cpuid": [list(entry) for entry in vcpu.cpuid],
            "xcrs": [list(pair) for pair in vcpu.xcrs.items()],
            "msrs": [list(pair) for pair in vcpu.msrs.items()],
        }
        for vcpu in state.vcpus
    ]
    return {"vm": state.vm._asdict() | {"clock": state.vm.clock._asdict()}, "vcpus": vcpus}


def from_plain(plain: Mapping[str, Any]) -> MachineState:
    """Return what `to_plain` was given; raises TypeError, ValueError or KeyError on what it cannot have returned."""
    vcpus = [
        VcpuState(
            **dict(vcpu)
            | {
                "special": {k: Segment(*v) if isinstance(v, list) else v for k, v in vcpu["special"].items()},
                "cpuid": [Entry(*row) for row in vcpu["cpuid"]],
                "xcrs": dict(vcpu["xcrs"]),
                "msrs": dict(vcpu["msrs"]),
            }
        )
        for vcpu in plain["vcpus"]
    ]
    vm = cast("Mapping[str, Any]", plain["vm"])
    return MachineState(VmState(**dict(vm) | {"clock": ClockState(**vm["clock"])}), vcpus)

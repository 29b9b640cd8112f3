"""A machine's KVM state, ready to be set again and again: every ioctl with its argument, done by one call into C.

What `state.load` works out for each load is worked out once here; what depends on the moment (clock, TSC offsets, the
moments at which the PIT's counters were loaded) is worked out in C, in `apply`. See replay.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from hypervisor.kvm._kvm import ffi, lib
from hypervisor.kvm.ioctls import refusal
from hypervisor.kvm.state import CHIPS, Loaded, check_same_machine, chip_argument, pit_argument
from hypervisor.kvm.vcpu_state import MSR_TSC, Refusal, check_settled, load_frame, refused_msr, vcpu_steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.kvm.handles import Vm
    from hypervisor.kvm.state import MachineState
    from hypervisor.kvm.vcpu import Vcpu
    from hypervisor.kvm.vcpu_state import VcpuState

__all__ = ["Prepared", "prepare"]

KINDS: Final = {lib.KVM_SET_MSRS: lib.HV_STEP_MSRS, lib.KVM_SET_NESTED_STATE: lib.HV_STEP_NESTED}


def prepare(vm: Vm, state: MachineState) -> Prepared:
    """Make a state ready for this VM, which stands still; sets CPUID and the TSC's frequency where they are others.

    Raises:
        ValueError, HostError, KvmError: as `state.load`.
    """
    return Prepared(vm, state)


class Prepared:
    """A state that `apply` sets as `state.load` does, without letting time pass for the guest."""

    def __init__(self, vm: Vm, state: MachineState) -> None:
        """See `prepare`."""
        check_same_machine(vm, state)
        self._vm = vm
        self._state = state
        for vcpu, vcpu_state in zip(vm.vcpus, state.vcpus, strict=True):
            check_settled(vcpu)
            load_frame(vcpu, vcpu_state)
        self._replay = ffi.new("struct hv_replay *")
        self._keep: list[Any] = []  # what the steps point to
        rows = [*self._begin()]
        for vcpu, vcpu_state in zip(vm.vcpus, state.vcpus, strict=True):
            rows += self._vcpu(vcpu, vcpu_state)
        rows += self._end()
        self._steps = ffi.new("struct hv_step[]", rows)

    def apply(self) -> Loaded:
        """Set it. No vCPU runs, each is settled, and memory is in place already. Releases the GIL.

        Raises:
            ValueError: an access of the guest is half done.
            KvmError: when the kernel refuses.
        """
        for vcpu in self._vm.vcpus:
            if not vcpu.is_settled:
                check_settled(vcpu)
        replay = self._replay
        result = lib.hv_replay(self._steps, len(self._steps), replay)
        if result < 0:
            raise refusal(self._steps[replay.step].request, -result)
        return Loaded(self._refused() if replay.refusals else [], bool(replay.exact))

    def _refused(self) -> list[Refusal]:
        by_fd = {vcpu.fileno(): vcpu for vcpu in self._vm.vcpus}
        refused = []
        for row in self._replay.refused[0 : self._replay.refusals]:
            step = self._steps[row.step]
            entry = ffi.cast("struct kvm_msrs *", step.argument).entries[row.entry]
            refused += refused_msr(by_fd[step.fd], entry.index, entry.data)
        return refused

    # --- what is done ---------------------------------------------------------------------------------------------

    def _step(self, fd: int, request: int, argument: Any, kind: int = lib.HV_STEP_PLAIN, **more: Any) -> dict[str, Any]:
        if isinstance(argument, bytes):
            argument = ffi.from_buffer(argument)
        self._keep += [argument, *more.values()]
        step = {"fd": fd, "kind": kind, "request": request, "argument": ffi.cast("void *", argument), **more}
        if "spare" in step:
            step["spare"] = ffi.cast("void *", step["spare"])
        return step

    def _begin(self) -> Iterator[dict[str, Any]]:
        clock = ffi.new("struct kvm_clock_data *", {"clock": self._state.vm.clock.guest_ns})
        yield self._step(self._vm.fileno(), lib.KVM_SET_CLOCK, clock, lib.HV_STEP_CLOCK)

    def _vcpu(self, vcpu: Vcpu, state: VcpuState) -> Iterator[dict[str, Any]]:
        fd = vcpu.fileno()
        for request, argument in vcpu_steps(self._vm, vcpu, state, tsc=0, tsc_offset=0):
            if request == lib.KVM_SET_DEVICE_ATTR:
                yield self._tsc(vcpu, state)
            elif request == lib.KVM_SET_MSRS:
                yield self._step(fd, request, vcpu.msr_table(argument), KINDS[request])
            elif request == lib.KVM_SET_NESTED_STATE:
                size = self._vm.check_extension(lib.KVM_CAP_NESTED_STATE)
                yield self._step(fd, request, argument, KINDS[request], spare=ffi.new("char[]", size), size=size)
            else:
                yield self._step(fd, request, argument)

    def _tsc(self, vcpu: Vcpu, state: VcpuState) -> dict[str, Any]:
        """Return the step that sets the TSC: by its offset where KVM tells enough, as `state.load` does."""
        then = self._state.vm.clock
        has_offset = state.tsc_offset is not None and then.host_tsc and state.tsc_khz == vcpu.tsc_khz()
        return self._step(
            vcpu.fileno(),
            lib.KVM_SET_DEVICE_ATTR,
            ffi.NULL,
            lib.HV_STEP_TSC,
            sum=((state.tsc_offset or 0) + then.host_tsc) & (1 << 64) - 1,
            guest_ns=then.guest_ns,
            khz=state.tsc_khz if has_offset else 0,
            spare=vcpu.msr_table([(MSR_TSC, state.msrs.get(MSR_TSC, 0))]),
        )

    def _end(self) -> Iterator[dict[str, Any]]:
        fd = self._vm.fileno()
        for name, registers in self._state.vm.chips.items():
            yield self._step(fd, lib.KVM_SET_IRQCHIP, chip_argument(*CHIPS[name], registers))
        if self._state.vm.pit:
            yield self._step(fd, lib.KVM_SET_PIT2, pit_argument(self._state.vm.pit), lib.HV_STEP_PIT)
        for vcpu in self._vm.vcpus:
            yield self._step(vcpu.fileno(), lib.KVM_KVMCLOCK_CTRL, ffi.NULL, lib.HV_STEP_VALUE)

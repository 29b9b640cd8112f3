"""The order in which a vCPU's state is set, and what happens when KVM refuses, with a kernel made of lists."""

from types import SimpleNamespace

import pytest
from hypervisor.kvm._kvm import ffi, lib

from hypervisor.errors import HostError, KvmError
from hypervisor.kvm import state as machine_state
from hypervisor.kvm import vcpu_state
from hypervisor.kvm.state import ClockState, MachineState, VmState, load
from hypervisor.kvm.vcpu_state import Refusal, VcpuState, _has_no_svm, load_vcpu, save_vcpu, tell_paused

EINVAL, ENXIO = 22, 6
TSC, TSC_DEADLINE, EFER = 0x10, 0x6E0, 0xC000_0080


class FakeVcpu:
    """Takes down what it is told; MSRs in `refuses` are not taken, those in `present` can be read."""

    index = 3
    is_settled = True

    def __init__(self):
        self.calls = []
        self.refuses = set()
        self.present = {}
        self.msrs = []

    def fileno(self):
        return 7

    def tsc_khz(self):
        return 2_000_000

    def set_cpuid(self, table):
        self.calls.append("CPUID")

    def set_msrs(self, values):
        for done, (msr, value) in enumerate(values):
            if msr in self.refuses:
                return done
            self.msrs.append((msr, value))
            self.calls.append(f"MSR {msr:#x}")
        return len(values)


class FakeVm:
    has_irqchip = has_pit = False

    def __init__(self, *capabilities):
        self.capabilities = {lib.KVM_CAP_XSAVE: 1, lib.KVM_CAP_XSAVE2: 4096, lib.KVM_CAP_XCRS: 1} | dict(capabilities)
        self.vcpus = []

    def fileno(self):
        return 6

    def check_extension(self, capability):
        return self.capabilities.get(capability, 0)


@pytest.fixture
def vcpu(monkeypatch):
    """Return a vCPU whose ioctls are taken down in its `calls`; what is read is zero."""
    vcpu = FakeVcpu()

    def control(fd, request, argument=None):
        name = next(n for n in dir(lib) if n.startswith(("KVM_GET_", "KVM_SET_")) and getattr(lib, n) == request)
        if name == "KVM_GET_CPUID2":
            argument.nent = 0
        if name == "KVM_GET_MSRS":
            msr = argument.entries[0].index
            if msr not in vcpu.present:
                return 0
            argument.entries[0].data = vcpu.present[msr]
            return 1
        if name.startswith("KVM_SET_"):
            vcpu.calls.append(name.removeprefix("KVM_SET_"))
        return 0

    monkeypatch.setattr(vcpu_state, "control", control)
    return vcpu


def state(**changes):
    fields = {
        "index": 3,
        "mp_state": 0,
        "registers": {},
        "special": {},
        "xsave": bytes(4096),
        "xcrs": {0: 1},
        "debug": dict.fromkeys(("db0", "db1", "db2", "db3", "dr6", "dr7"), 0),
        "lapic": bytes(1024),
        "cpuid": [(1, 0, 0, 0, 0, 0, 0)],
        "msrs": {TSC_DEADLINE: 5, TSC: 4, 0x277: 3, 0x174: 2},
        "unreadable": [],
        "events": bytes(ffi.sizeof("struct kvm_vcpu_events")),
        "nested": b"",
        "tsc_khz": 2_000_000,
        "tsc_offset": None,
    }
    return VcpuState(**(fields | changes))


def test_each_part_comes_after_what_it_depends_on(vcpu):
    """What each ioctl does with the state that another one set is the reason beside it."""
    load_vcpu(FakeVm(), vcpu, state(), tsc=4, tsc_offset=None)
    at = vcpu.calls.index
    assert at("CPUID") == 0
    assert at("SREGS") < at("LAPIC"), "the LAPIC's mode is in apic_base"
    assert at("LAPIC") < at("MSR 0x6e0"), "a deadline is dropped while the timer is in another mode"
    assert at("MSR 0x10") < at("MSR 0x6e0"), "a deadline is counted in the TSC"
    assert at("XCRS") < at("XSAVE")
    assert at("REGS") < at("VCPU_EVENTS"), "setting registers forgets a pending exception"
    assert at("SREGS") < at("MP_STATE")
    assert len(vcpu.calls) == len(set(vcpu.calls)), "nothing is set twice"


def test_an_offset_takes_the_place_of_the_tsc(vcpu):
    load_vcpu(FakeVm(), vcpu, state(), tsc=4, tsc_offset=9)
    at = vcpu.calls.index
    assert "MSR 0x10" not in vcpu.calls
    assert at("DEVICE_ATTR") < at("MSR 0x6e0")


def test_what_is_behind_a_refused_msr_is_set_all_the_same(vcpu):
    vcpu.refuses = {0x277, TSC_DEADLINE}
    vcpu.present = {0x277: 8}
    refused = load_vcpu(FakeVm(), vcpu, state(), tsc=40, tsc_offset=None)
    assert vcpu.msrs == [(TSC, 40), (0x174, 2)]
    assert refused == [Refusal(3, 0x277, wanted=3, present=8), Refusal(3, TSC_DEADLINE, wanted=5, present=None)]


def test_an_msr_that_has_its_value_already_is_no_loss(vcpu):
    vcpu.refuses = {0x277}
    vcpu.present = {0x277: 3}
    assert load_vcpu(FakeVm(), vcpu, state(), tsc=4, tsc_offset=None) == []


def test_a_frequency_that_the_host_cannot_give(vcpu, monkeypatch):
    def control_value(fd, request, value=0):
        raise KvmError("KVM_SET_TSC_KHZ", EINVAL)

    monkeypatch.setattr(vcpu_state, "control_value", control_value)
    with pytest.raises(HostError, match="TSC of 3000000 kHz") as caught:
        load_vcpu(FakeVm(), vcpu, state(tsc_khz=3_000_000), tsc=4, tsc_offset=None)
    assert "TSC scaling" in caught.value.hint


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (bytes(8191) + b"\1", {lib.KVM_CAP_XSAVE2: 4096}),  # a component that this host has no room for
        (bytes(4096), {lib.KVM_CAP_XSAVE: 0}),
        (bytes(416), {}),  # struct kvm_fpu, on a host with XSAVE
    ],
)
def test_vector_state_that_the_host_cannot_hold(vcpu, saved, here):
    with pytest.raises(HostError, match="XSAVE"):
        load_vcpu(FakeVm(*here.items()), vcpu, state(xsave=saved), tsc=4, tsc_offset=None)


def test_a_longer_area_without_anything_in_it_fits(vcpu):
    load_vcpu(FakeVm(), vcpu, state(xsave=bytes(8192)), tsc=4, tsc_offset=None)
    assert "XSAVE" in vcpu.calls


def test_extended_control_registers_that_the_host_has_not(vcpu):
    with pytest.raises(HostError, match="XCR0"):
        load_vcpu(FakeVm((lib.KVM_CAP_XCRS, 0)), vcpu, state(), tsc=4, tsc_offset=None)


def test_in_the_middle_of_an_access_nothing_is_read_or_set(vcpu):
    vcpu.is_settled = False
    with pytest.raises(ValueError, match="vCPU 3 is in the middle of an access"):
        load_vcpu(FakeVm(), vcpu, state(), tsc=4, tsc_offset=None)
    with pytest.raises(ValueError, match="vCPU 3 is in the middle of an access"):
        save_vcpu(FakeVm(), vcpu, [])
    assert vcpu.calls == []


def test_a_guest_without_kvmclock_needs_not_be_told(monkeypatch):
    def refuse(errno):
        lib = SimpleNamespace(KVM_KVMCLOCK_CTRL=vcpu_state.lib.KVM_KVMCLOCK_CTRL, hv_ioctl_value=lambda *_: -errno)
        monkeypatch.setattr(vcpu_state, "lib", lib)

    refuse(EINVAL)
    tell_paused(FakeVcpu())
    refuse(ENXIO)
    with pytest.raises(KvmError):
        tell_paused(FakeVcpu())


# --- the machine as a whole -------------------------------------------------------------------------------------------


def test_the_tsc_moves_on_as_far_as_the_clock():
    """Linux virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET: 1 s at 2 GHz here, while the host's TSC is another one."""
    then = ClockState(guest_ns=5_000_000_000, realtime_ns=0, host_tsc=1_000_000)
    now = ClockState(guest_ns=6_000_000_000, realtime_ns=0, host_tsc=70_000)
    offset = machine_state._new_tsc_offset(state(tsc_offset=-500 % 2**64), then, now)
    guest_then, guest_now = 1_000_000 - 500, (70_000 + offset) % 2**64
    assert guest_now - guest_then == 2_000_000_000
    assert machine_state._new_tsc_offset(state(tsc_offset=None), then, now) is None
    assert machine_state._new_tsc_offset(state(tsc_offset=0), then, now._replace(host_tsc=0)) is None
    assert machine_state._new_tsc_offset(state(tsc_offset=0), then._replace(host_tsc=0), now) is None


def test_a_state_of_another_machine():
    vm = FakeVm()
    clock = ClockState(0, 0, 0)
    with pytest.raises(ValueError, match="a state of 1 vCPUs for a machine of 0"):
        load(vm, MachineState(VmState(clock, {}, b""), [state()]))
    with pytest.raises(ValueError, match="other interrupt controllers"):
        load(vm, MachineState(VmState(clock, {"ioapic": bytes(216)}, b""), []))
    with pytest.raises(ValueError, match="other interrupt controllers or timers"):
        load(vm, MachineState(VmState(clock, {}, bytes(112)), []))


@pytest.mark.parametrize(
    ("form", "efer", "left_out"),
    [(1, 0x500, True), (1, 0x1500, False), (0, 0x500, False)],  # KVM_STATE_NESTED_FORMAT_VMX is 0, _SVM 1
)
def test_the_nested_state_of_a_guest_that_is_no_hypervisor_is_left_out(form, efer, left_out):
    nested = (0).to_bytes(2, "little") + form.to_bytes(2, "little") + (128).to_bytes(4, "little") + bytes(120)
    state = SimpleNamespace(nested=nested, special={"efer": efer})
    assert _has_no_svm(state) is left_out

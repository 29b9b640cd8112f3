"""What KVM handles say when there is no KVM behind the path."""

import pytest

from hypervisor.errors import HostError, KvmError
from hypervisor.kvm import Kvm
from hypervisor.kvm.ioctls import refusal


def test_a_device_that_is_not_there():
    with pytest.raises(HostError, match="cannot open /no/kvm: No such file") as caught:
        Kvm("/no/kvm")
    assert "hv check" in caught.value.hint
    assert caught.value.status == 3


def test_a_file_that_is_no_kvm_device():
    with pytest.raises(HostError, match="/dev/null is not a KVM device"):
        Kvm("/dev/null")


def test_a_refusal_names_ioctl_and_errno():
    error = refusal(0xAE01, 12)  # KVM_CREATE_VM, ENOMEM
    assert isinstance(error, KvmError)
    assert (error.ioctl, error.errno) == ("KVM_CREATE_VM", 12)
    assert str(error) == "KVM_CREATE_VM: Cannot allocate memory (ENOMEM)"
    assert refusal(0x1234, 1).ioctl == "0x1234"

"""KVM as three handles: `Kvm` (the system), `Vm` (a machine) and `Vcpu`. The only importer of the compiled module.

Every refusal of the kernel is a `KvmError` that names the ioctl. Handles are closed in the order vCPUs, VM, system;
each is a context manager. See the KVM API document of the Linux kernel for what each ioctl does.
"""

from hypervisor.kvm.handles import Kvm, Vm, host_address
from hypervisor.kvm.ring import ByteRing
from hypervisor.kvm.vcpu import Vcpu

__all__ = ["ByteRing", "Kvm", "Vcpu", "Vm", "host_address"]

"""A VM of 64 KiB and one vCPU in real mode without interrupt controllers, driven access by access."""

import mmap
from contextlib import contextmanager

from hypervisor.kvm import Kvm, host_address
from hypervisor.kvm.state import from_plain, load, save, to_plain
from hypervisor.kvm.vcpu import EXIT, EXIT_HLT, INTERRUPTED, MMIO_READ, PIO_IN

RAM = 1 << 16
PORT = 0x5658
WINDOW = (0xA0000, 0xA1000)


class Bare:
    """The VM; `log` has every access of the guest, as its device saw it."""

    def __init__(self, kvm, code=b"", *, log=()):
        self.msrs = kvm.msr_indices()
        self.memory = mmap.mmap(-1, RAM)
        self.memory[0 : len(code)] = code
        self.log = list(log)
        self.vm = kvm.create_vm()
        self.vm.set_intel_pages(0xFFFB_D000, 0xFFFB_C000)
        self.vm.set_memory(0, 0, RAM, host_address(self.memory))
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_cpuid(kvm.supported_cpuid())
        self.vm.claim_ports(PORT, 1)
        self.vm.claim_windows([WINDOW])
        self.vcpu.set_special_registers({"cs": self.vcpu.special_registers()["cs"]._replace(base=0, selector=0)})
        self.vcpu.set_registers({"rip": 0, "rflags": 2, "rsp": 0x8000})

    def answer(self, wanted):
        """Serve one access: reads get the number of accesses so far, times eleven."""
        kind, size = wanted & 0xFF, wanted >> 8 & 0xFF
        if kind in (PIO_IN, MMIO_READ):
            value = len(self.log) * 0x0B0B_0B0B_0B0B_0B0B & (1 << 8 * size) - 1
        else:
            value = wanted >> 32 if wanted >> 16 & 0xFFFF == PORT else self.vcpu.mmio_value
        self.log.append((kind, size, value))
        return value

    def advance(self, accesses=1 << 30):
        """Serve that many accesses and return the next thing wanted, not served."""
        wanted = self.vcpu.enter(0)
        while len(self.log) < accesses and wanted & 0xFF not in (EXIT, INTERRUPTED):
            wanted = self.vcpu.enter(self.answer(wanted))
        return wanted

    def take(self):
        return to_plain(save(self.vm, self.msrs)), self.memory[:], self.log

    def put(self, plain, ram, log):
        self.memory[:] = ram
        self.log = list(log)
        return load(self.vm, from_plain(plain))

    def ends_with(self):
        """Run to the hlt and return all that can be seen of the run."""
        wanted = self.advance()
        assert wanted == EXIT | EXIT_HLT << 8, hex(wanted)
        return self.log, self.vcpu.registers(), self.memory[:]


@contextmanager
def bare(code=b""):
    with Kvm() as kvm:
        made = Bare(kvm, code)
    try:
        yield made
    finally:
        made.vm.close()


def finish(taken):
    """Go on with what was taken, in a VM of its own; for another process as well."""
    with bare() as vm:
        vm.put(*taken)
        return vm.ends_with()

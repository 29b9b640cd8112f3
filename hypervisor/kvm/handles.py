"""The system handle (/dev/kvm) and the VM handle."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any, Final

from hypervisor.cpuid import Entry
from hypervisor.errors import HostError, KvmError
from hypervisor.kvm._kvm import ffi, lib
from hypervisor.kvm.ioctls import control, control_value, refusal
from hypervisor.kvm.stats import Stats
from hypervisor.kvm.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from hypervisor.kvm.ring import ByteRing

MAX_CPUID_ENTRIES: Final = 256
MAX_MSRS: Final = 1024
MAX_WINDOWS: Final = 256
MAX_RINGS: Final = lib.HV_RINGS
IOAPIC_PINS: Final = 24
PIT_PIN: Final = 2


class Kvm:
    """The system handle: what this host's KVM can do, and the maker of VMs."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open the device; raises HostError with a remedy when that fails, KvmError on an unknown API."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = "`hv check` says what is missing and how to get it"
            raise HostError(f"cannot open {path}: {error.strerror}", hint=hint) from error
        try:
            version = control_value(self._fd, lib.KVM_GET_API_VERSION)
        except KvmError as error:
            self.close()
            raise HostError(f"{path} is not a KVM device", hint="`hv check` tells what it should be") from error
        if version != lib.KVM_API_VERSION:
            self.close()
            raise HostError(f"{path} speaks KVM API {version}, not {lib.KVM_API_VERSION}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the device; VMs that it made live on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def check_extension(self, capability: int) -> int:
        """Return what KVM_CHECK_EXTENSION says of a KVM_CAP_ number: 0 means absent."""
        return control_value(self._fd, lib.KVM_CHECK_EXTENSION, capability)

    def max_vcpus(self) -> int:
        """Return how many vCPUs one VM may have here."""
        return self.check_extension(lib.KVM_CAP_MAX_VCPUS)

    def supported_cpuid(self) -> list[Entry]:
        """Return the CPUID table that this host can give a guest (KVM_GET_SUPPORTED_CPUID)."""
        table = ffi.new("struct kvm_cpuid2 *", {"entries": MAX_CPUID_ENTRIES})
        table.nent = MAX_CPUID_ENTRIES
        control(self._fd, lib.KVM_GET_SUPPORTED_CPUID, table)
        return [Entry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[0 : table.nent]]

    def msr_indices(self) -> list[int]:
        """Return the MSRs that KVM says make up a vCPU's state (KVM_GET_MSR_INDEX_LIST); MTRRs are not among them."""
        table = ffi.new("struct kvm_msr_list *", {"indices": MAX_MSRS})
        table.nmsrs = MAX_MSRS
        control(self._fd, lib.KVM_GET_MSR_INDEX_LIST, table)
        return list(table.indices[0 : table.nmsrs])

    def create_vm(self) -> Vm:
        """Make an empty VM."""
        fd = control_value(self._fd, lib.KVM_CREATE_VM, 0)
        return Vm(fd, control_value(self._fd, lib.KVM_GET_VCPU_MMAP_SIZE))


class Vm:
    """A VM handle: its memory slots, interrupt controllers and vCPUs, and the table that the run loop decodes by.

    Attributes:
        vcpus: in the order in which they were made.
        has_irqchip: the kernel has PIC, IOAPIC and LAPICs.
        has_pit: the kernel has the 8254.
    """

    def __init__(self, fd: int, run_size: int) -> None:
        """Take over the VM's file descriptor."""
        os.set_inheritable(fd, False)
        self._fd = fd
        self._run_size = run_size
        self._bus = ffi.gc(lib.hv_bus_new(), lib.hv_bus_free)
        self._rings: list[ByteRing] = []
        self._stats = Stats(fd)
        self.vcpus: list[Vcpu] = []
        self._regions: dict[int, tuple[int, int, int]] = {}
        self.has_irqchip = False
        self.has_pit = False

    def fileno(self) -> int:
        """Return the file descriptor, for `hypervisor.kvm.state`."""
        return self._fd

    def check_extension(self, capability: int) -> int:
        """Return what KVM_CHECK_EXTENSION says of a KVM_CAP_ number for this VM: 0 means absent."""
        return control_value(self._fd, lib.KVM_CHECK_EXTENSION, capability)

    def close(self) -> None:
        """Close the vCPUs, then the VM. Guest memory may be unmapped afterwards."""
        for vcpu in self.vcpus:
            vcpu.close()
        self._stats.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def stats(self) -> dict[str, int]:
        """Return KVM's own counters of the VM, by its names; {} where the kernel has none, and after `close`."""
        file = self._stats.open()
        return {} if file is None else file.values()

    # --- memory and interrupts ------------------------------------------------------------------------------------

    def set_memory(self, slot: int, gpa: int, size: int, host_address: int) -> None:
        """Map `size` bytes of this process at `host_address` to guest-physical `gpa` (multiples of the page size)."""
        self._set_region(slot, gpa, size, host_address, 0)
        self._regions[slot] = gpa, size, host_address

    def _set_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int) -> None:
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = flags
        region.guest_phys_addr = gpa
        region.memory_size = size
        region.userspace_addr = host_address
        control(self._fd, lib.KVM_SET_USER_MEMORY_REGION, region)

    @property
    def slots(self) -> dict[int, tuple[int, int]]:
        """Memory slots by number: (address in this process, size in bytes) each."""
        return {slot: (host, size) for slot, (_, size, host) in self._regions.items()}

    def log_dirty(self, on: bool, *, by_hand: bool = False) -> bool:
        """Have KVM log which pages of every memory slot are written, or end that. vCPUs may run.

        Args:
            on: whether to log.
            by_hand: have the log cleared by an ioctl of its own (KVM_CLEAR_DIRTY_LOG), all of it set at first. That
                spares switching on a walk over all of memory, and costs each collection a call.

        Returns:
            Whether the log is to be cleared by hand: False where the host's KVM cannot do that.
        """
        if self._fd < 0:
            return False
        wanted = lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | lib.KVM_DIRTY_LOG_INITIALLY_SET
        can = self.check_extension(lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        by_hand = on and by_hand and bool(can & lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        if can:
            how = ffi.new("struct kvm_enable_cap *", {"cap": lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2})
            how.args[0] = can & wanted if by_hand else 0
            control(self._fd, lib.KVM_ENABLE_CAP, how)
        for slot, region in self._regions.items():
            self._set_region(slot, *region, lib.KVM_MEM_LOG_DIRTY_PAGES if on else 0)
        return by_hand

    def set_intel_pages(self, tss: int, identity_map: int) -> None:
        """Give KVM the guest pages that VT-x needs to run real mode; elsewhere they are ignored."""
        control_value(self._fd, lib.KVM_SET_TSS_ADDR, tss)
        control(self._fd, lib.KVM_SET_IDENTITY_MAP_ADDR, ffi.new("uint64_t *", identity_map))

    def create_irqchip(self) -> None:
        """Make the in-kernel PIC, IOAPIC and (with each vCPU) LAPIC; to be called before the first vCPU is made."""
        control_value(self._fd, lib.KVM_CREATE_IRQCHIP)
        self.has_irqchip = True

    def create_pit(self) -> None:
        """Make the in-kernel 8254, with port 0x61."""
        pit = ffi.new("struct kvm_pit_config *")
        pit.flags = lib.KVM_PIT_SPEAKER_DUMMY
        control(self._fd, lib.KVM_CREATE_PIT2, pit)
        self.has_pit = True

    def irq_input(self, gsi: int) -> IrqInput:
        """Return input `gsi` of the in-kernel interrupt controllers."""
        return IrqInput(self._fd, gsi)

    def connect_irqfd(self, event_fd: int, gsi: int, resample_fd: int | None = None) -> None:
        """Interrupt by GSI `gsi` whenever `event_fd` is written to (KVM_IRQFD); at once if it has been already.

        Args:
            event_fd: an eventfd.
            gsi: an edge, or a message (see `set_routes`); a level with `resample_fd`.
            resample_fd: an eventfd that KVM writes to when it has lowered the level: at the guest's end of interrupt.
        """
        request = ffi.new("struct kvm_irqfd *")
        request.fd, request.gsi = event_fd, gsi
        if resample_fd is not None:
            request.flags = lib.KVM_IRQFD_FLAG_RESAMPLE
            request.resamplefd = resample_fd
        control(self._fd, lib.KVM_IRQFD, request)

    def disconnect_irqfd(self, event_fd: int, gsi: int) -> None:
        """Undo `connect_irqfd`; what is written to `event_fd` from now on stays in it."""
        request = ffi.new("struct kvm_irqfd *")
        request.fd, request.gsi, request.flags = event_fd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN
        control(self._fd, lib.KVM_IRQFD, request)

    def set_routes(self, messages: Mapping[int, tuple[int, int]]) -> None:
        """Say what each GSI is: those below 24 lead to the interrupt controllers, the others are messages.

        Args:
            messages: GSI (24 or more) to MSI address and data.

        ISA IRQ 0, the PIT, is wired to the IOAPIC's pin 2 as PCs have it; pin 0 is nobody's.
        """
        routes = []
        for pin in range(IOAPIC_PINS):
            if pin < 16:
                chip = lib.KVM_IRQCHIP_PIC_SLAVE if pin >= 8 else lib.KVM_IRQCHIP_PIC_MASTER
                routes.append((pin, lib.KVM_IRQ_ROUTING_IRQCHIP, chip, pin % 8, 0, 0))
            if pin != PIT_PIN:
                routes.append((pin, lib.KVM_IRQ_ROUTING_IRQCHIP, lib.KVM_IRQCHIP_IOAPIC, pin or PIT_PIN, 0, 0))
        for gsi, (address, data) in messages.items():
            routes.append((gsi, lib.KVM_IRQ_ROUTING_MSI, 0, 0, address, data))
        result = lib.hv_set_routes(self._fd, ffi.new("struct hv_route[]", routes), len(routes))
        if result < 0:
            raise refusal(lib.KVM_SET_GSI_ROUTING, -result)

    def connect_doorbell(self, event_fd: int, address: int, *, value: int | None = None, connect: bool = True) -> None:
        """Write to `event_fd` instead of leaving the guest when it writes to guest-physical `address` (KVM_IOEVENTFD).

        Args:
            event_fd: an eventfd.
            address: of the doorbell.
            value: only 4-byte writes of this value; None takes writes of every value and size.
            connect: False undoes it.
        """
        request = ffi.new("struct kvm_ioeventfd *")
        request.addr, request.fd = address, event_fd
        if value is not None:
            request.len, request.datamatch, request.flags = 4, value, lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        if not connect:
            request.flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        control(self._fd, lib.KVM_IOEVENTFD, request)

    # --- vCPUs ----------------------------------------------------------------------------------------------------

    def create_vcpu(self, index: int) -> Vcpu:
        """Make vCPU `index`, which is also its APIC id; vCPU 0 is the boot processor."""
        vcpu = Vcpu(index, control_value(self._fd, lib.KVM_CREATE_VCPU, index), self._run_size, self._bus)
        self.vcpus.append(vcpu)
        return vcpu

    # --- what the run loop answers, and what comes to Python ---------------------------------------------------------

    def claim_ports(self, base: int, size: int) -> None:
        """Send accesses to these ports to Python; all others are open bus."""
        for table in (self._bus.pio_in, self._bus.pio_out):
            for port in range(base, base + size):
                table[port] = table[port] or lib.HV_PYTHON  # a device may have published a short cut already

    def claim_windows(self, windows: Sequence[tuple[int, int]]) -> None:
        """Send accesses to these (base, end) address ranges, sorted, to Python; all others are open bus."""
        for index, (base, end) in enumerate(windows):
            self._bus.window[index].base = base
            self._bus.window[index].end = end
        self._bus.windows = len(windows)

    def connect_ring(self, ring: ByteRing) -> int:
        """Let ports divert to `ring`; return its number for `divert_port`."""
        index = len(self._rings)
        if index >= MAX_RINGS:
            raise ValueError(f"more than {MAX_RINGS} rings")
        self._rings.append(ring)  # keeps it alive as long as the table points to it
        lib.hv_bus_set_ring(self._bus, index, ring.cdata)
        return index

    def publish_port(self, port: int, value: int | None) -> None:
        """Answer one-byte reads of a claimed port with `value` in the run loop; None sends them to Python again."""
        lib.hv_bus_publish(self._bus, port, -1 if value is None else value)

    def divert_port(self, port: int, ring: int | None) -> None:
        """Append one-byte writes to a claimed port to ring number `ring`; None sends them to Python again."""
        lib.hv_bus_divert(self._bus, port, lib.HV_PYTHON if ring is None else lib.HV_RING0 + ring)


class IrqInput:
    """One input (GSI) of the in-kernel interrupt controllers; fits `devices.ports.IrqLine`."""

    def __init__(self, fd: int, gsi: int) -> None:
        """Drive input `gsi` of the VM behind `fd`; the level is low at first."""
        self._fd = fd
        self._irq = ffi.new("struct kvm_irq_level *")
        self._irq.irq = gsi
        self._level: bool | None = False

    def forget(self) -> None:
        """Have the next `set` drive the input whatever its level was.

        For a device whose state is loaded: the level then is the state's, and KVM holds the same of this input, which
        no state of the interrupt controllers has in it (struct kvm_kernel_irqchip's irq_states). What an edge on the
        way has set in them is gone as soon as their own state is loaded.
        """
        self._level = None

    def set(self, level: bool) -> None:
        """Drive the input high or low (KVM_IRQ_LINE); its present level again does nothing."""
        if level is not self._level:
            self._level = level
            self._irq.level = level
            control(self._fd, lib.KVM_IRQ_LINE, self._irq)


def host_address(value: Any) -> int:
    """Return the address of the buffer `value` (an mmap) in this process."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(value)))


def map_zeroes(address: int, size: int) -> None:
    """Put fresh pages of zeroes, which take no room yet, where a private mapping is; raises OSError."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE | lib.MAP_FIXED
    if lib.mmap(ffi.cast("void *", address), size, protection, flags, -1, 0) == ffi.cast("void *", -1):
        raise OSError(ffi.errno, os.strerror(ffi.errno))

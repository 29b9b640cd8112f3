"""The examination of a host: what it is, what KVM offers, whether a guest runs, and what to do about what is missing.

Only the standard library is used, so that `hv check` can explain a host where nothing else works. KVM's numbers are
those of <linux/kvm.h>; what they mean is in the KVM API document of the Linux kernel.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
from errno import ENOTTY, errorcode
from fcntl import ioctl
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, NamedTuple

from hypervisor import host_remedies
from hypervisor.host import MODULE_KINDS, Kind, first_cpu, kind_by, read_text
from hypervisor.host_proof import Proof, prove
from hypervisor.host_remedies import Remedy

__all__ = ["Access", "Capability", "Facts", "HostReport", "Part", "gather", "inspect"]

KVM_GET_API_VERSION: Final = 0xAE00
KVM_CHECK_EXTENSION: Final = 0xAE03
API_VERSION: Final = 12


class Capability(NamedTuple):
    """One KVM capability: KVM_CAP_`name`, its number, whether it is required, and what it is wanted for.

    `value` is what KVM_CHECK_EXTENSION answered: 0 is no, a positive number yes or a count, None was not asked.
    """

    name: str
    number: int
    required: bool
    purpose: str
    value: int | None = None


class Part(NamedTuple):
    """A program or Python package that this VMM uses; `found` is its place or version, None when it is missing."""

    name: str
    purpose: str
    found: str | None
    required: bool = False


class HostReport(NamedTuple):
    """Everything that `inspect` found.

    Attributes:
        kind: what runs guests here.
        sentence: the same in words, with what the host itself runs on.
        surroundings: the virtual machine or emulator that the host is in, such as "QEMU's TCG"; None on bare metal.
        problem: why /dev/kvm is not usable; None when it is.
        api_version: KVM_GET_API_VERSION's answer, None when it could not be asked.
        module: the kernel module behind the device, None when it is not known.
        capabilities: each with its value.
        proof: what came of running a guest.
        parts: programs and Python packages that this VMM uses.
        remedies: what to do, the most urgent first.
    """

    kind: Kind
    sentence: str
    surroundings: str | None
    problem: str | None
    api_version: int | None
    module: str | None
    capabilities: tuple[Capability, ...]
    proof: Proof
    parts: tuple[Part, ...]
    remedies: tuple[Remedy, ...]

    @property
    def can_run_guest(self) -> bool:
        """Whether a guest ran here, every required capability is there, and the bindings are built."""
        complete = all(cap.value or not cap.required for cap in self.capabilities)
        return self.proof.ran and complete and all(part.found or not part.required for part in self.parts)

    @property
    def can_run_linux(self) -> bool:
        """Whether a Linux kernel can be expected to run here."""
        return self.can_run_guest and self.kind in (Kind.AMD_V, Kind.VT_X)


WANTED: Final = (
    Capability("USER_MEMORY", 3, True, "guest memory"),
    Capability("IRQCHIP", 0, True, "interrupt controllers in the kernel"),
    Capability("PIT2", 33, True, "the PIT in the kernel"),
    Capability("EXT_CPUID", 7, True, "CPUID tables"),
    Capability("SET_TSS_ADDR", 4, True, "real mode on VT-x"),
    Capability("MP_STATE", 14, True, "starting further CPUs"),
    Capability("IMMEDIATE_EXIT", 136, True, "stopping a vCPU without losing the request"),
    Capability("SET_IDENTITY_MAP_ADDR", 37, False, "real mode on older VT-x"),
    Capability("IRQ_ROUTING", 25, False, "message-signalled interrupts"),
    Capability("SIGNAL_MSI", 77, False, "message-signalled interrupts without a route"),
    Capability("IRQFD", 32, False, "interrupts without an ioctl"),
    Capability("IRQFD_RESAMPLE", 82, False, "level-triggered irqfd"),
    Capability("IOEVENTFD", 36, False, "notifications that do not stop the vCPU"),
    Capability("COALESCED_MMIO", 15, False, "batched MMIO writes"),
    Capability("COALESCED_PIO", 162, False, "batched port writes"),
    Capability("SPLIT_IRQCHIP", 121, False, "only the LAPICs in the kernel"),
    Capability("X2APIC_API", 129, False, "more than 255 CPUs"),
    Capability("TSC_DEADLINE_TIMER", 72, False, "the LAPIC's TSC deadline mode"),
    Capability("NR_VCPUS", 9, False, "recommended number of vCPUs"),
    Capability("MAX_VCPUS", 66, False, "greatest number of vCPUs"),
    Capability("NR_MEMSLOTS", 10, False, "stretches of guest memory"),
    Capability("SYNC_REGS", 74, False, "registers without an ioctl"),
    Capability("INTERNAL_ERROR_DATA", 40, False, "why a guest died"),
    Capability("SET_GUEST_DEBUG", 23, False, "breakpoints and single steps"),
    Capability("BINARY_STATS_FD", 203, False, "KVM's own counters"),
    Capability("VCPU_EVENTS", 41, False, "saving pending events"),
    Capability("DEBUGREGS", 50, False, "saving debug registers"),
    Capability("XSAVE", 55, False, "saving vector registers"),
    Capability("XCRS", 56, False, "saving XCR0"),
    Capability("XSAVE2", 208, False, "saving vector registers beyond 4 KiB"),
    Capability("PIT_STATE2", 35, False, "saving the PIT"),
    Capability("ADJUST_CLOCK", 39, False, "saving the guest's clock"),
    Capability("GET_TSC_KHZ", 61, False, "the frequency of the TSC"),
    Capability("TSC_CONTROL", 60, False, "another TSC frequency"),
    Capability("READONLY_MEM", 81, False, "ROM"),
    Capability("MANUAL_DIRTY_LOG_PROTECT2", 168, False, "the dirty log at less cost"),
    Capability("DIRTY_LOG_RING", 192, False, "dirty pages as a ring"),
    Capability("SYNC_MMU", 16, False, "giving guest memory back to the host"),
    Capability("DISABLE_QUIRKS2", 213, False, "switching off KVM's oddities"),
)


class Facts(NamedTuple):
    """What the kernel says of the host.

    Attributes:
        flags: the first CPU's, as in /proc/cpuinfo.
        model: its name.
        x86: whether this is an x86-64 kernel.
        modules: names in /sys/module.
        dmi: vendor, product and BIOS vendor.
        container: whether this process is in a container.
        registered: whether KVM has registered its device, wherever the node may be.
    """

    flags: frozenset[str]
    model: str
    x86: bool
    modules: frozenset[str]
    dmi: str
    container: bool
    registered: bool


PACKAGES: Final = (
    ("structlog", "events on stderr"),
    ("iced-x86", "the instruction that a guest died of"),
    ("rich", "progress bars"),
    ("lz4", "kernels packed with lz4"),
    ("zstandard", "kernels packed with zstd"),
)
PROGRAMS: Final = (
    ("cc", "building the KVM bindings"),
    ("qemu-system-x86_64", "the emulated host"),
    ("mke2fs", "the emulated host's disk"),
    ("dpkg-deb", "`hv kernel get debian`"),
    ("as", "the small assembly guests"),
)
CONTAINER_MARKS: Final = (".dockerenv", "run/.containerenv", "run/secrets/kubernetes.io")
CONTAINER_CGROUPS: Final = ("docker", "kubepods", "/lxc", "containerd", "libpod")
PRODUCTS: Final = {
    "QEMU": "a QEMU virtual machine",
    "VMware": "a VMware virtual machine",
    "VirtualBox": "a VirtualBox virtual machine",
    "Microsoft": "a Hyper-V or Azure virtual machine",
    "Google": "a Google Compute Engine virtual machine",
    "Amazon": "an Amazon EC2 virtual machine",
    "Xen": "a Xen guest",
}
EMULATORS: Final = ("QEMU's TCG", "the Bochs emulator")


def gather(proc: str = "/proc", sys: str = "/sys", root: str = "/") -> Facts:
    """Collect what the kernel says; what cannot be read counts as absent."""
    flags, model = first_cpu(proc)
    dmi = [read_text(f"{sys}/class/dmi/id/{name}").strip() for name in ("sys_vendor", "product_name", "bios_vendor")]
    try:
        modules = frozenset(entry.name for entry in Path(sys, "module").iterdir())
    except OSError:
        modules = frozenset()
    cgroup = read_text(f"{proc}/1/cgroup")
    return Facts(
        flags,
        model,
        x86=os.uname().machine == "x86_64",
        modules=modules,
        dmi=" ".join(part for part in dmi if part),
        container=any((Path(root) / mark).exists() for mark in CONTAINER_MARKS)
        or any(word in cgroup for word in CONTAINER_CGROUPS),
        registered=any(line.split()[1:] == ["kvm"] for line in read_text(f"{proc}/misc").splitlines()),
    )


def surroundings_of(facts: Facts) -> str | None:
    """Name what the host itself runs in: an emulator, a hypervisor, or nothing (None)."""
    if facts.model.startswith("QEMU TCG CPU"):
        return "QEMU's TCG"
    if "hypervisor" not in facts.flags:
        return "the Bochs emulator" if "Bochs" in facts.dmi else None
    return next((name for word, name in PRODUCTS.items() if word in facts.dmi), "a virtual machine")


def find_parts() -> tuple[Part, ...]:
    """Look for the programs and packages that this VMM uses; none of them is imported or run."""
    bindings = next((Path(__file__).parent / "kvm").glob("_kvm*.so"), None)
    parts = [
        Part("python", "everything", platform.python_version(), required=True),
        Part("bindings", "KVM from Python", bindings.name if bindings else None, required=True),
    ]
    for name, purpose in PACKAGES:
        try:
            parts.append(Part(name, purpose, version(name)))
        except PackageNotFoundError:
            parts.append(Part(name, purpose, None))
    parts += [Part(name, purpose, shutil.which(name)) for name, purpose in PROGRAMS]
    return tuple(parts)


def inspect(
    kvm_path: str = "/dev/kvm",
    *,
    proc: str = "/proc",
    sys: str = "/sys",
    root: str = "/",
    access: Access | None = None,
) -> HostReport:
    """Look at the host and run a guest of three instructions on it.

    Args:
        kvm_path: the KVM device.
        proc: where procfs is.
        sys: where sysfs is.
        root: where the marks of a container are looked for.
        access: how to reach the device; by default the real way.
    """
    access = access or Access()
    facts = gather(proc, sys, root)
    api: int | None = None
    capabilities: tuple[Capability, ...] = WANTED
    proof = Proof(ran=False, detail="not tried: there is no usable KVM device")
    remedies: list[Remedy] = []
    try:
        fd = _open(kvm_path, access)
    except OSError as error:
        problem: str | None = f"{kvm_path}: {error.strerror}"
        remedies += host_remedies.for_device(kvm_path, error, facts)
    else:
        try:
            api, problem = _ask_version(kvm_path, fd, access)
            if problem is None:
                values = (access.ioctl(fd, KVM_CHECK_EXTENSION, cap.number) for cap in WANTED)
                capabilities = tuple(cap._replace(value=value) for cap, value in zip(WANTED, values, strict=True))
                proof = access.prove(fd)
                remedies += host_remedies.for_proof(proof, facts)
                remedies += host_remedies.for_capabilities(capabilities)
            else:
                remedies.append(Remedy(problem, "use the device of Linux's own KVM on a current kernel"))
        finally:
            os.close(fd)
    kind = Kind.NONE if problem else kind_by(facts.modules, facts.flags)
    parts = find_parts()
    remedies += host_remedies.for_parts(parts)
    if kind is Kind.SOFTWARE:
        remedies.append(host_remedies.for_software())
    surroundings = surroundings_of(facts)
    return HostReport(
        kind=kind,
        sentence=_sentence(kind, surroundings, problem),
        surroundings=surroundings,
        problem=problem,
        api_version=api,
        module=next(
            (name for name, its_kind in MODULE_KINDS.items() if its_kind is kind and name in facts.modules), None
        ),
        capabilities=capabilities,
        proof=proof,
        parts=parts,
        remedies=tuple(remedies),
    )


class Access:
    """The way to the KVM device: what a test replaces."""

    def open(self, path: str) -> int:
        """Open the device for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        """Ask the device."""
        return ioctl(fd, request, argument)

    def prove(self, fd: int) -> Proof:
        """Run a guest on it."""
        return prove(fd)


def _open(path: str, access: Access) -> int:
    """Open the device; what is no character device is refused unopened, as opening a FIFO would wait for ever."""
    if not stat.S_ISCHR(Path(path).stat().st_mode):
        raise OSError(ENOTTY, "not a device", path)
    return access.open(path)


def _ask_version(path: str, fd: int, access: Access) -> tuple[int | None, str | None]:
    """Return the API version, and what is wrong with the device when it is not KVM's."""
    try:
        api = access.ioctl(fd, KVM_GET_API_VERSION, 0)
    except OSError as error:
        return None, f"{path}: not a KVM device ({errorcode.get(error.errno or 0, 'error')})"
    if api != API_VERSION:
        return api, f"{path}: KVM API version {api}, and {API_VERSION} is the only one in use"
    return api, None


def _sentence(kind: Kind, surroundings: str | None, problem: str | None) -> str:
    within = f", inside {surroundings}" if surroundings else ""
    if kind is Kind.NONE:
        return f"no usable KVM{within}: {problem}"
    if kind is Kind.SOFTWARE:
        return f"software KVM: guest kernel code is emulated, guest user code runs natively{within}"
    name = "AMD-V" if kind is Kind.AMD_V else "VT-x"
    if surroundings in EMULATORS:
        return f"hardware {name}, emulated in turn by {surroundings}: faithful, and slow"
    return f"hardware {name}{', nested' if surroundings else ''}{within}"

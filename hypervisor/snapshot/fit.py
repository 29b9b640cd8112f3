"""Whether a snapshot can go on here, told before there is a VM: what its guest was given, and this host lacks."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor import cpuid
from hypervisor.errors import HostError, SnapshotError
from hypervisor.host import is_software_kvm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from hypervisor.kvm import Kvm
    from hypervisor.snapshot.saved import Snapshot

__all__ = ["Host", "Problem", "facts", "kvm_state", "needed_capabilities", "problems", "this_host", "words"]

PAGE: Final = 4096
KVM: Final = "kvm"
"""The member of the state that `hypervisor.kvm.state.to_plain` made."""

# KVM_CAP_ numbers of <linux/kvm.h>, with what of a state needs them
CAPABILITIES: Final = {
    "IRQCHIP": 0,
    "PIT2": 33,
    "PIT_STATE2": 35,
    "ADJUST_CLOCK": 39,
    "VCPU_EVENTS": 41,
    "DEBUGREGS": 50,
    "XSAVE": 55,
    "XCRS": 56,
    "MP_STATE": 14,
    "NESTED_STATE": 157,
    "SREGS2": 200,
    "XSAVE2": 208,
}
LEGACY_XSAVE: Final = 4096
"""Bytes of struct kvm_xsave: a larger area needs KVM_CAP_XSAVE2, whose value is its size."""
FPU: Final = 416
"""Bytes of struct kvm_fpu, from a host without XSAVE."""
MTRRS: Final = frozenset((*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF))
"""IA32_MTRR_ (SDM volume 4): KVM has them, its list of MSRs has not."""
MACHINE_CHECK: Final = range(0x400, 0x480)
"""The banks' MSRs, of which the list has none either."""


class Problem(NamedTuple):
    """Why a snapshot does not run here.

    Attributes:
        kind: for programs: cpuid, msr, capability, vcpus, memory, page-size, vendor, disk, parent, damage, kvm, state.
        text: for people.
        facts: of its kind, such as function, subleaf, register and names.
    """

    kind: str
    text: str
    facts: dict[str, Any]


class Host(NamedTuple):
    """What a host offers.

    Attributes:
        cpuid: KVM_GET_SUPPORTED_CPUID, and what a vCPU is given beyond that.
        msrs: KVM_GET_MSR_INDEX_LIST.
        capabilities: KVM_CHECK_EXTENSION's answers by name.
        max_vcpus: of one VM.
        page_size: in bytes.
        available: bytes of memory and swap that programs can have.
    """

    cpuid: Sequence[cpuid.Entry]
    msrs: Sequence[int]
    capabilities: Mapping[str, int]
    max_vcpus: int
    page_size: int
    available: int


def this_host() -> Host:
    """Ask this host, once but for its memory; raises HostError without a usable KVM."""
    return _lasting()._replace(available=_available())


@cache
def _lasting() -> Host:
    """Return what does not change while a process lives."""
    from hypervisor.kvm import Kvm

    with Kvm() as kvm:
        return Host(
            cpuid=_offered(kvm),
            msrs=kvm.msr_indices(),
            capabilities={name: kvm.check_extension(number) for name, number in CAPABILITIES.items()},
            max_vcpus=kvm.max_vcpus(),
            page_size=os.sysconf("SC_PAGE_SIZE"),
            available=0,
        )


def _offered(kvm: Kvm) -> list[cpuid.Entry]:
    """Return the CPUID table that a vCPU can have here: a software KVM adds what its host's CPU has for ring 3."""
    from hypervisor.kvm.vcpu_state import read_cpuid

    table: list[cpuid.Entry] = kvm.supported_cpuid()
    if is_software_kvm():
        vm = kvm.create_vm()
        try:
            vcpu = vm.create_vcpu(0)
            vcpu.set_cpuid(table)
            table = read_cpuid(vcpu.fileno())
        finally:
            vm.close()
    return table


def words(error: BaseException) -> str:
    """Return an error and its causes on one line."""
    parts = []
    link: BaseException | None = error
    while link is not None:
        parts.append(getattr(link, "strerror", None) or str(link))
        link = link.__cause__
    return ": ".join(parts)


def _available(path: str = "/proc/meminfo") -> int:
    """Return what MemAvailable and SwapFree say (Linux Documentation/filesystems/proc.rst: in kB)."""
    with open(path, encoding="ascii") as file:
        rows = dict(line.split(":", 1) for line in file)
    return sum(int(rows.get(name, "0 kB").split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024


def facts(host: Host, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest says of the host that a state was saved on, for `Writer.commit`."""
    return {
        "vendor": vendor(host.cpuid),
        "kernel": os.uname().release,
        "page_size": host.page_size,
        "capabilities": {name: host.capabilities[name] for name in needed_capabilities(state)},
    }


def vendor(table: Sequence[cpuid.Entry]) -> str:
    """Return the vendor string of leaf 0 of a CPUID table; "" without one."""
    for row in table:
        if (row.function, row.index) == (0, 0):
            return b"".join(part.to_bytes(4, "little") for part in (row.ebx, row.edx, row.ecx)).decode("latin-1")
    return ""


def kvm_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a state that is KVM's; raises KeyError or TypeError where it has none."""
    part = state[KVM]
    if not isinstance(part, dict) or not isinstance(part["vcpus"], list):
        raise TypeError("no KVM state")
    return part


def needed_capabilities(state: Mapping[str, Any]) -> dict[str, int]:
    """Return the capabilities that a state needs, with the least value of each; raises as `kvm_state` does."""
    kvm = kvm_state(state)
    needed = {"MP_STATE": 1, "VCPU_EVENTS": 1, "DEBUGREGS": 1, "ADJUST_CLOCK": 1}
    if kvm["vm"]["chips"]:
        needed["IRQCHIP"] = 1
    if kvm["vm"]["pit"]:
        needed |= {"PIT2": 1, "PIT_STATE2": 1}
    for vcpu in kvm["vcpus"]:
        if vcpu["xcrs"]:
            needed["XCRS"] = 1
        if len(vcpu["xsave"]) != FPU:
            needed["XSAVE"] = 1
        used = len(vcpu["xsave"].rstrip(b"\0"))
        if used > LEGACY_XSAVE:
            needed["XSAVE2"] = max(needed.get("XSAVE2", 0), used)
        if "pdptr0" in vcpu["special"]:
            needed["SREGS2"] = 1
        if vcpu["nested"]:
            needed["NESTED_STATE"] = 1
    return needed


def problems(snapshot: Snapshot, host: Host | None = None) -> list[Problem]:
    """Return why a snapshot would not run on a host: by default this one. Its bytes are `Snapshot.verify`'s business.

    Raises:
        DamagedSnapshotError: its state cannot be read.
    """
    found = list(_of_files(snapshot))
    if host is None:
        try:
            host = this_host()
        except HostError as error:
            return [*found, Problem("kvm", f"no machine runs here: {words(error)}", {})]
    found += _of_machine(snapshot, host)
    try:
        kvm = kvm_state(snapshot.state)
        found += _of_state(snapshot, kvm, host)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        found.append(Problem("state", f"its state is none that this hv knows ({error!r})", {}))
    return found


def _of_files(snapshot: Snapshot) -> Iterator[Problem]:
    """Yield what is missing of the files outside of the snapshot."""
    try:
        snapshot.chain()
    except SnapshotError as error:
        yield Problem("parent", words(error), {})
    for disk in snapshot.machine.get("disks") or ():
        path = disk.get("path") if isinstance(disk, dict) else None
        if isinstance(path, str) and not os.path.exists(path):
            yield Problem("disk", f"the disk image {path} is not there", {"path": path})


def _of_machine(snapshot: Snapshot, host: Host) -> Iterator[Problem]:
    memory = snapshot.manifest.memory
    if snapshot.manifest.page_size != host.page_size:
        text = f"it was saved with pages of {snapshot.manifest.page_size} bytes, and this host has {host.page_size}"
        yield Problem("page-size", text, {"saved": snapshot.manifest.page_size, "host": host.page_size})
    needed = (memory.data + memory.base) * memory.chunk
    if needed > host.available:
        text = f"its guest has {needed >> 20} MiB of memory in use, and {host.available >> 20} MiB are free here"
        yield Problem("memory", text, {"needed": needed, "available": host.available})


def _of_state(snapshot: Snapshot, kvm: Mapping[str, Any], host: Host) -> Iterator[Problem]:
    vcpus = kvm["vcpus"]
    if len(vcpus) > host.max_vcpus:
        text = f"it has {len(vcpus)} vCPUs, and this host's KVM allows {host.max_vcpus}"
        yield Problem("vcpus", text, {"needed": len(vcpus), "most": host.max_vcpus})
    for name, least in needed_capabilities(snapshot.state).items():
        have = host.capabilities.get(name, 0)
        if have < least:
            size = f" of {least} bytes" if least > 1 else ""
            text = f"this host's KVM has no KVM_CAP_{name}{size}"
            yield Problem("capability", text, {"name": name, "needed": least, "value": have})
    tables = [[cpuid.Entry(*row) for row in vcpu["cpuid"]] for vcpu in vcpus]
    given, here = vendor(tables[0]), vendor(host.cpuid)
    if given != here:
        text = f"its guest has a CPU of {given or 'no vendor'}, and this host one of {here or 'no vendor'}"
        yield Problem("vendor", text, {"saved": given, "host": here})
    yield from _of_cpuid(tables, host)
    yield from _of_msrs(vcpus, host)


def _of_cpuid(tables: Sequence[Sequence[cpuid.Entry]], host: Host) -> Iterator[Problem]:
    seen = set()
    for table in tables:
        for lack in cpuid.lacks(table, host.cpuid):
            if lack not in seen:
                seen.add(lack)
                place = f"CPUID leaf {lack.function:#x}" + (f" subleaf {lack.subleaf}" if lack.subleaf else "")
                text = f"this host lacks {', '.join(lack.names)} ({place} {lack.register.upper()})"
                yield Problem("cpuid", text, lack._asdict() | {"names": list(lack.names)})


def _of_msrs(vcpus: Sequence[Mapping[str, Any]], host: Host) -> Iterator[Problem]:
    """Yield the MSRs with a value that this host's KVM does not keep; those of zero are as good as absent."""
    known = MTRRS.union(host.msrs, MACHINE_CHECK)
    missing = sorted({msr for vcpu in vcpus for msr, value in vcpu["msrs"] if value and msr not in known})
    if missing:
        names = ", ".join(f"{msr:#x}" for msr in missing)
        yield Problem("msr", f"this host's KVM does not keep the MSRs {names}", {"msrs": missing})

"""What the CPUID instruction answers in the guest: from what KVM supports to each vCPU's own table.

The machine is one package of N cores with one thread each. APIC ids are the vCPU numbers, in xAPIC and x2APIC alike.

Sources: Intel SDM volume 2A, CPUID (leaves 1, 4, 0xB, 0x1F); AMD CPUID Specification 25481 and AMD's processor
programming references (leaves 0x8000_0001, _0008, _001D, _001E); Linux Documentation/virt/kvm/x86/cpuid.rst (leaf
0x4000_0001).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hypervisor import cpu_features

__all__ = ["Entry", "Lack", "build", "lacks", "parse"]

SIGNIFICANT_INDEX: Final = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: ECX selects among the entries of this leaf."""

HYPERCALL_FEATURES: Final = 1 << 7 | 1 << 11 | 1 << 13
"""KVM_FEATURE_PV_UNHALT, PV_SEND_IPI and PV_SCHED_YIELD: the features of leaf 0x4000_0001 that make hypercalls."""

AMD: Final = ("AuthenticAMD", "HygonGenuine")
AMD_MIRRORED: Final = 0x0183_F3FF
"""Bits of leaf 1 EDX that leaf 0x8000_0001 EDX repeats on AMD: 0 to 9, 12 to 17, 23 and 24."""

TOPOLOGY_LEAVES: Final = frozenset({0xB, 0x1F, 0x8000_0026})
LAST_PRIVATE_CACHE: Final = 2
"""Caches up to this level belong to one core; those above are shared by the package."""


class Entry(NamedTuple):
    """One row of a CPUID table: struct kvm_cpuid_entry2, with `index` the ECX it answers to."""

    function: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a row; KVM's name is worth more
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


FEATURE_WORDS: Final = {
    (1, 0): ("ecx", "edx"),
    (7, 0): ("ebx", "ecx", "edx"),
    (7, 1): ("eax", "ebx", "ecx", "edx"),
    (7, 2): ("edx",),
    (0xD, 0): ("eax", "edx"),
    (0xD, 1): ("eax", "ecx", "edx"),
    (0x4000_0001, 0): ("eax",),
    (0x8000_0001, 0): ("ecx", "edx"),
    (0x8000_0007, 0): ("edx",),
    (0x8000_0008, 0): ("ebx",),
    (0x8000_000A, 0): ("edx",),
    (0x8000_0021, 0): ("eax",),
}
"""Where a set bit is a feature that software may use (SDM volume 2A; AMD 25481; Linux kvm/x86/cpuid.rst)."""
NOT_THE_HOSTS: Final = {
    (1, 0, "ecx"): 1 << 31 | 1 << 27 | 1 << 24,  # hypervisor; OSXSAVE follows CR4; TSC deadline, see `build`
    (1, 0, "edx"): 1 << 28,  # HTT: this machine's topology
    (7, 0, "ecx"): 1 << 4,  # OSPKE follows CR4
    (0x8000_0001, 0, "ecx"): 1 << 1,  # CmpLegacy: topology
}
"""Bits among them that say something of the machine or of the moment, and not of the host."""


class Lack(NamedTuple):
    """Features that a guest was given and a host does not offer: bits of one register of one leaf, and their names."""

    function: int
    subleaf: int
    register: str
    mask: int
    names: tuple[str, ...]


class _Table(dict[tuple[int, int], Entry]):
    """The rows by (function, index)."""

    def change(self, function: int, index: int = 0, **registers: int) -> None:
        """Set registers of a row; a row that is not there stays away."""
        row = self.get((function, index))
        if row is not None:
            self[function, index] = row._replace(**registers)

    def rows(self, function: int) -> list[Entry]:
        """Return every subleaf of a leaf."""
        return [row for row in self.values() if row.function == function]

    def vendor(self) -> str:
        """Return the vendor string of leaf 0, such as "GenuineIntel"."""
        leaf = self.get((0, 0))
        if leaf is None:
            return ""
        return b"".join(part.to_bytes(4, "little") for part in (leaf.ebx, leaf.edx, leaf.ecx)).decode("latin-1")


def parse(spec: str) -> tuple[cpu_features.Change, ...]:
    """Read a `--cpu` value: `host`, then any number of `,+feature` and `,-feature`; the last word on a bit counts.

    Raises:
        ConfigError: on a model other than `host`, a change without a sign, an unknown feature.
    """
    model, *changes = spec.split(",")
    if model.strip().lower() != "host":
        raise ConfigError(
            f"--cpu {spec}: there is no CPU model {model.strip()!r}",
            hint="the model is host, as in --cpu host,-avx512f,+x2apic",
        )
    return tuple(_parse_change(spec, change.strip()) for change in changes)


def _parse_change(spec: str, written: str) -> cpu_features.Change:
    from hypervisor import cpu_features  # noqa: PLC0415 - three hundred names that a plain `host` never needs

    sign, name = written[:1], written[1:].strip()
    if sign not in ("+", "-") or not name:
        raise ConfigError(
            f"--cpu {spec}: {written!r} is not a change", hint="write +feature or -feature, separated by commas"
        )
    if cpu_features.find(name) is None:
        similar = cpu_features.near(name)
        raise ConfigError(
            f"--cpu {spec}: no CPU feature is called {name!r}",
            hint=f"did you mean {' or '.join(similar)}?" if similar else "names are those in /proc/cpuinfo",
        )
    return cpu_features.Change(cpu_features.canonical(name), sign == "+", written)


def build(  # noqa: PLR0913 - keyword-only; each is one fact of the host or of the machine
    supported: Sequence[Entry],
    *,
    vcpu: int,
    cpus: int,
    spec: str = "host",
    software_kvm: bool = False,
    tsc_deadline: bool = True,
) -> list[Entry]:
    """Make the table of one vCPU for KVM_SET_CPUID2.

    Args:
        supported: what KVM_GET_SUPPORTED_CPUID returned.
        vcpu: number of this vCPU, from 0; it is also the APIC id.
        cpus: vCPUs of the machine.
        spec: the value of `--cpu`.
        software_kvm: the host's KVM is a software one, whose guests can make no hypercall.
        tsc_deadline: KVM_CAP_TSC_DEADLINE_TIMER is there and the LAPIC is in the kernel. Older kernels never report
            the bit, newer ones always do, so it is this argument that counts (KVM API, "Known KVM API problems").

    Raises:
        ConfigError: as `parse` does, and when `spec` asks for a feature that KVM does not offer.
        ValueError: when `vcpu` is not one of `cpus`.
    """
    if not 0 <= vcpu < cpus:
        raise ValueError(f"vCPU {vcpu} of {cpus}")
    table = _Table({(row.function, row.index): row for row in supported if row.function not in TOPOLOGY_LEAVES})
    amd = table.vendor() in AMD
    _set_identity(table, vcpu, cpus, tsc_deadline=tsc_deadline)
    _set_caches(table, cpus)
    _set_extended_topology(table, supported, vcpu, cpus)
    if amd:
        _set_amd_topology(table, vcpu, cpus)
    if software_kvm:
        for row in table.rows(0x4000_0001):
            table.change(0x4000_0001, eax=row.eax & ~HYPERCALL_FEATURES)
    _apply(table, supported, parse(spec), amd=amd)
    return [table[key] for key in sorted(table)]


def lacks(table: Iterable[Entry], supported: Iterable[Entry]) -> list[Lack]:
    """Return what a guest that was given `table` may be using and a host that offers `supported` does not have.

    A bit without a name among the features of Linux is called by its number, as "bit 7".
    """
    offered = {(row.function, row.index): row for row in supported}
    found = []
    for row in table:
        key = row.function, row.index
        for register in FEATURE_WORDS.get(key, ()):
            have = getattr(offered[key], register) if key in offered else 0
            mask = getattr(row, register) & ~have & ~NOT_THE_HOSTS.get((*key, register), 0)
            if mask:
                found.append(Lack(*key, register, mask, _names(key, register, mask)))
    return found


def _names(key: tuple[int, int], register: str, mask: int) -> tuple[str, ...]:
    from hypervisor import cpu_features  # noqa: PLC0415 - only a host that lacks something needs them

    known: dict[int, str] = {}
    for name, places in cpu_features.table().items():
        for place in places:
            if (place.function, place.subleaf, place.register) == (*key, register):
                known.setdefault(place.bit, name)
    return tuple(known.get(bit, f"bit {bit}") for bit in range(32) if mask >> bit & 1)


def _id_bits(cpus: int) -> int:
    """Return how many low bits of an APIC id tell the cores of the package apart."""
    return (cpus - 1).bit_length()


def _set_identity(table: _Table, vcpu: int, cpus: int, *, tsc_deadline: bool) -> None:
    """Fill leaf 1: this CPU's id, how many there are, and the bits that depend on the machine and not on KVM."""
    leaf = table.get((1, 0))
    if leaf is None:
        return
    hypervisor, deadline, htt, clflush = 1 << 31, 1 << 24, 1 << 28, 1 << 19
    ebx = leaf.ebx & 0xFFFF | min(cpus, 255) << 16 | (vcpu & 0xFF) << 24
    if leaf.edx & clflush and not ebx & 0xFF00:
        ebx |= 8 << 8  # a line of 64 bytes, in quadwords
    ecx = (leaf.ecx | hypervisor) & ~deadline
    table.change(
        1,
        ebx=ebx,
        ecx=ecx | deadline if tsc_deadline else ecx,
        edx=leaf.edx | htt if cpus > 1 else leaf.edx & ~htt,
    )


def _set_caches(table: _Table, cpus: int) -> None:
    """Say who shares each cache, in Intel's leaf 4 and AMD's 0x8000_001D; sizes stay the host's."""
    package_ids = (1 << _id_bits(cpus)) - 1
    for row in table.rows(4):
        if row.eax & 0x1F:
            sharing = package_ids if row.eax >> 5 & 7 > LAST_PRIVATE_CACHE else 0
            eax = row.eax & 0x3FFF | min(sharing, 0xFFF) << 14 | min(package_ids, 0x3F) << 26
            table.change(4, row.index, eax=eax)
    for row in table.rows(0x8000_001D):
        if row.eax & 0x1F:
            sharing = cpus - 1 if row.eax >> 5 & 7 > LAST_PRIVATE_CACHE else 0
            table.change(0x8000_001D, row.index, eax=row.eax & ~0x03FF_C000 | min(sharing, 0xFFF) << 14)


def _set_extended_topology(table: _Table, supported: Iterable[Entry], vcpu: int, cpus: int) -> None:
    """Write leaves 0xB and 0x1F: an SMT level of one thread, a core level of all of them, an end.

    The host's own subleaves are gone by now: older kernels report the host's topology there. Leaf 0x8000_0026 has
    levels that this machine lacks, and is left out: a leaf of zeros sends the guest to leaf 0xB.
    """
    basic = table.get((0, 0))
    offered = {row.function for row in supported}
    for leaf in (0xB, 0x1F):
        if leaf in offered or (leaf == 0xB and basic is not None and basic.eax >= leaf):
            smt, core = 1 << 8, 2 << 8
            table[leaf, 0] = Entry(leaf, 0, SIGNIFICANT_INDEX, 0, 1, smt, vcpu)
            table[leaf, 1] = Entry(leaf, 1, SIGNIFICANT_INDEX, _id_bits(cpus), cpus, core | 1, vcpu)
            table[leaf, 2] = Entry(leaf, 2, SIGNIFICANT_INDEX, 0, 0, 2, vcpu)


def _set_amd_topology(table: _Table, vcpu: int, cpus: int) -> None:
    """Fill what AMD CPUs say of cores: CmpLegacy, 0x8000_0008 ECX (NC, ApicIdSize) and 0x8000_001E."""
    extended = table.get((0x8000_0001, 0))
    if extended is not None:
        cmp_legacy = 1 << 1
        ecx = extended.ecx | cmp_legacy if cpus > 1 else extended.ecx & ~cmp_legacy
        table.change(0x8000_0001, ecx=ecx)
    sizes = table.get((0x8000_0008, 0))
    if sizes is not None:
        table.change(0x8000_0008, ecx=sizes.ecx & ~0xF0FF | min(cpus - 1, 0xFF) | _id_bits(cpus) << 12)
    # One thread a core, one node a package: core id, node id and both counts less one.
    table.change(0x8000_001E, eax=vcpu, ebx=vcpu & 0xFF, ecx=0, edx=0)


def _apply(table: _Table, supported: Iterable[Entry], changes: Iterable[cpu_features.Change], *, amd: bool) -> None:
    """Switch single features on and off."""
    offered = {(row.function, row.index): row for row in supported}
    for change in changes:
        from hypervisor import cpu_features  # noqa: PLC0415 - a plain `host` has no changes

        possible = False
        for bit in cpu_features.table()[change.feature]:
            key, mask = (bit.function, bit.subleaf), 1 << bit.bit
            if change.enable:
                rows = (source[key] for source in (offered, table) if key in source)
                if any(getattr(row, bit.register) & mask for row in rows):
                    possible = True
                    _switch(table, bit, enable=True)
            else:
                _switch(table, bit, enable=False)
                if amd and key == (1, 0) and bit.register == "edx" and mask & AMD_MIRRORED:
                    _switch(table, bit._replace(function=0x8000_0001), enable=False)
        if change.enable and not possible:
            raise ConfigError(
                f"--cpu {change.written}: this host's KVM does not offer {change.feature!r}",
                hint="`hv check` says what kind of host this is; leave the feature out to go on",
            )


def _switch(table: _Table, bit: cpu_features.Bit, *, enable: bool) -> None:
    row = table.get((bit.function, bit.subleaf))
    if row is not None:
        value, mask = getattr(row, bit.register), 1 << bit.bit
        table.change(bit.function, bit.subleaf, **{bit.register: value | mask if enable else value & ~mask})

"""The CPUID tables of vCPUs: identity, topology, KVM's leaf, and `--cpu` changes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor import cpu_features
from hypervisor.cpuid import Entry, Lack, build, lacks, parse
from hypervisor.errors import ConfigError

# What KVM_GET_SUPPORTED_CPUID said on an EPYC host (function, index, flags, eax, ebx, ecx, edx), without its leaves of
# zeros and with a brand string.
AMD = [
    Entry(*row)
    for row in (
        (0x00000000, 0, 0, 0x0000001C, 0x68747541, 0x444D4163, 0x69746E65),
        (0x00000001, 0, 0, 0x00A10F11, 0x01020800, 0x81202000, 0x078BFBFF),
        (0x00000004, 0, 1, 0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000006, 0, 0, 0x00000004, 0x00000000, 0x00000000, 0x00000000),
        (0x00000007, 0, 1, 0x00000001, 0x01800002, 0x00000104, 0x20000000),
        (0x00000007, 1, 1, 0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x0000000B, 0, 1, 0x00000000, 0x00000000, 0x00000000, 0x00000001),
        (0x0000000D, 0, 1, 0x000000E7, 0x00000980, 0x00000980, 0x00000000),
        (0x0000000D, 1, 1, 0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x80000000, 0, 0, 0x80000021, 0x68747541, 0x444D4163, 0x69746E65),
        (0x80000001, 0, 0, 0x00A10F11, 0x40000000, 0x00400393, 0x23D3FBFF),
        (0x80000002, 0, 0, 0x20444D41, 0x43595045, 0x00000000, 0x00000000),
        (0x80000005, 0, 0, 0xFF48FF40, 0xFF48FF40, 0x20080140, 0x20080140),
        (0x80000007, 0, 0, 0x00000000, 0x00000000, 0x00000000, 0x00000100),
        (0x80000008, 0, 0, 0x00003030, 0x50020005, 0x00007001, 0x00000000),
        (0x8000001D, 0, 1, 0x00000121, 0x01C0003F, 0x0000003F, 0x00000000),
        (0x8000001D, 1, 1, 0x00000122, 0x01C0003F, 0x0000003F, 0x00000000),
        (0x8000001D, 2, 1, 0x00000143, 0x01C0003F, 0x000007FF, 0x00000002),
        (0x8000001D, 3, 1, 0x00004163, 0x03C0003F, 0x00007FFF, 0x00000001),
        (0x8000001D, 4, 1, 0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x8000001E, 0, 0, 0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x80000021, 0, 0, 0x00000204, 0x00000000, 0x00000006, 0x00000000),
        (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x0000004D),
        (0x40000001, 0, 0, 0x01007EFB, 0x00000000, 0x00000000, 0x00000000),
    )
]

# A Skylake as an older kernel reports it: the host's own topology (8 threads, package 1) is still in leaves 4 and 0xB.
INTEL = [
    Entry(*row)
    for row in (
        (0x00000000, 0, 0, 0x00000016, 0x756E6547, 0x6C65746E, 0x49656E69),
        (0x00000001, 0, 0, 0x000506E3, 0x05100800, 0xF6FA3203, 0x1F8BFBFF),
        (0x00000004, 0, 1, 0x1C004121, 0x01C0003F, 0x0000003F, 0x00000000),
        (0x00000004, 1, 1, 0x1C004122, 0x01C0003F, 0x0000003F, 0x00000000),
        (0x00000004, 2, 1, 0x1C004143, 0x00C0003F, 0x000003FF, 0x00000000),
        (0x00000004, 3, 1, 0x1C03C163, 0x03C0003F, 0x00001FFF, 0x00000006),
        (0x00000004, 4, 1, 0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000007, 0, 1, 0x00000000, 0x009C4FBB, 0x00000004, 0xAC000400),
        (0x0000000B, 0, 1, 0x00000001, 0x00000002, 0x00000100, 0x00000015),
        (0x0000000B, 1, 1, 0x00000004, 0x00000008, 0x00000201, 0x00000015),
        (0x0000000D, 1, 1, 0x0000000F, 0x00000000, 0x00000000, 0x00000000),
        (0x00000015, 0, 0, 0x00000002, 0x00000104, 0x016E3600, 0x00000000),
        (0x00000016, 0, 0, 0x00000D48, 0x00000FA0, 0x00000064, 0x00000000),
        (0x80000000, 0, 0, 0x80000008, 0x00000000, 0x00000000, 0x00000000),
        (0x80000001, 0, 0, 0x00000000, 0x00000000, 0x00000121, 0x2C100800),
        (0x80000008, 0, 0, 0x00003027, 0x00000000, 0x00000000, 0x00000000),
        (0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x0000004D),
        (0x40000001, 0, 0, 0x01007EFB, 0x00000000, 0x00000000, 0x00000000),
    )
]

HOSTS = pytest.mark.parametrize("supported", [AMD, INTEL], ids=["amd", "intel"])
COUNTS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 48, 63, 64)


def rows(table: list[Entry]) -> dict[tuple[int, int], Entry]:
    by_leaf = {(row.function, row.index): row for row in table}
    assert len(by_leaf) == len(table), "a leaf appears twice"
    return by_leaf


def machine(supported: list[Entry], cpus: int, spec: str = "host") -> list[dict[tuple[int, int], Entry]]:
    return [rows(build(supported, vcpu=vcpu, cpus=cpus, spec=spec)) for vcpu in range(cpus)]


@HOSTS
@pytest.mark.parametrize("cpus", COUNTS)
def test_apic_ids_are_the_vcpu_numbers_wherever_they_are_written(supported: list[Entry], cpus: int) -> None:
    tables = machine(supported, cpus)
    assert [table[1, 0].ebx >> 24 for table in tables] == list(range(cpus))
    assert [table[0xB, 0].edx for table in tables] == list(range(cpus))
    assert [table[0xB, 1].edx for table in tables] == list(range(cpus))
    if supported is AMD:
        assert [table[0x8000001E, 0].eax for table in tables] == list(range(cpus))
        assert [table[0x8000001E, 0].ebx for table in tables] == list(range(cpus))  # one thread a core: bits 15:8 are 0


@HOSTS
@pytest.mark.parametrize("cpus", COUNTS)
def test_leaf_b_says_one_package_of_single_threaded_cores(supported: list[Entry], cpus: int) -> None:
    """SDM volume 2A, leaf 0xB: EAX[4:0] bits to shift, EBX[15:0] threads, ECX[7:0] level, ECX[15:8] 1 SMT, 2 core."""
    for table in machine(supported, cpus):
        smt, core, end = table[0xB, 0], table[0xB, 1], table[0xB, 2]
        assert (smt.eax, smt.ebx, smt.ecx) == (0, 1, 0x100)
        assert (core.ebx, core.ecx) == (cpus, 0x201)
        assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
        assert all(row.flags == 1 for row in (smt, core, end))
        shift = core.eax
        assert core.edx >> shift == 0, "every CPU is in package 0"
        assert (1 << shift) >= cpus > (1 << shift) >> 1, "no more id bits than needed"


@HOSTS
@pytest.mark.parametrize("cpus", COUNTS)
def test_leaf_1_counts_the_cpus_and_says_htt_only_for_several(supported: list[Entry], cpus: int) -> None:
    for table in machine(supported, cpus):
        leaf = table[1, 0]
        assert leaf.ebx >> 16 & 0xFF == cpus
        assert leaf.ebx >> 8 & 0xFF == 8, "a cache line of 64 bytes"
        assert leaf.edx >> 28 & 1 == (cpus > 1)
        assert leaf.ecx >> 31 == 1, "a hypervisor is there"
        assert leaf.eax == next(row.eax for row in supported if row.function == 1)


def test_a_missing_line_size_is_filled_in() -> None:
    """EBX[15:8] is valid wherever CLFSH (EDX[19]) is set, so it must not be 0 there."""
    supported = [row._replace(ebx=0) if row.function == 1 else row for row in AMD]
    assert rows(build(supported, vcpu=0, cpus=1))[1, 0].ebx >> 8 & 0xFF == 8
    without = [row._replace(ebx=0, edx=row.edx & ~(1 << 19)) if row.function == 1 else row for row in AMD]
    assert rows(build(without, vcpu=0, cpus=1))[1, 0].ebx >> 8 & 0xFF == 0


@pytest.mark.parametrize("cpus", COUNTS)
def test_intel_caches_are_private_up_to_level_two_and_shared_above(cpus: int) -> None:
    """SDM leaf 4: EAX[25:14] ids sharing less one, EAX[31:26] core ids of the package less one, both powers of two."""
    ids = 1
    while ids < cpus:
        ids *= 2
    for table in machine(INTEL, cpus):
        for index, sharing in ((0, 1), (1, 1), (2, 1), (3, ids)):
            row, host = table[4, index], rows(INTEL)[4, index]
            assert (row.eax >> 14 & 0xFFF) + 1 == sharing
            assert (row.eax >> 26) + 1 == ids
            assert row.eax & 0x3FFF == host.eax & 0x3FFF, "kind and level stay"
            assert row[4:] == host[4:], "sizes stay"
        assert table[4, 4].eax == 0, "the list still ends"


@pytest.mark.parametrize("cpus", COUNTS)
def test_amd_caches_and_core_counts(cpus: int) -> None:
    for table in machine(AMD, cpus):
        for index, sharing in ((0, 1), (1, 1), (2, 1), (3, cpus)):
            assert (table[0x8000001D, index].eax >> 14 & 0xFFF) + 1 == sharing
            assert table[0x8000001D, index].eax & 0x3FFF == rows(AMD)[0x8000001D, index].eax & 0x3FFF
        sizes = table[0x80000008, 0]
        assert (sizes.ecx & 0xFF) + 1 == cpus
        assert sizes.ecx >> 12 & 0xF == table[0xB, 1].eax, "ApicIdSize agrees with leaf 0xB"
        assert (sizes.eax, sizes.ebx) == (0x3030, 0x50020005)
        assert table[0x80000001, 0].ecx >> 1 & 1 == (cpus > 1), "CmpLegacy"
        assert table[0x8000001E, 0].ecx == 0, "node 0 of one"
        assert table[4, 0].eax == 0, "leaf 4 is Intel's"


def test_intel_tables_get_nothing_of_amd() -> None:
    table = machine(INTEL, 4)[3]
    assert table[0x80000008, 0].ecx == 0
    assert table[0x80000001, 0] == rows(INTEL)[0x80000001, 0]
    assert not [key for key in table if key[0] in (0x8000001D, 0x8000001E)]


def test_the_hosts_topology_does_not_leak() -> None:
    """Older kernels report the host's x2APIC id (0x15 here) and levels; leaf 0x80000026 is one more place for them."""
    supported = [*INTEL, Entry(0xB, 2, 1, 7, 9, 0x302, 0x15), Entry(0x80000026, 0, 1, 1, 2, 0x100, 0x15)]
    table = rows(build(supported, vcpu=1, cpus=2))
    assert table[0xB, 2] == Entry(0xB, 2, 1, 0, 0, 2, 1)
    assert not [key for key in table if key[0] == 0x80000026]


def test_leaf_1f_says_what_leaf_b_says_and_only_where_the_host_has_it() -> None:
    assert (0x1F, 0) not in machine(INTEL, 2)[0]
    table = rows(build([*INTEL, Entry(0x1F, 0, 1, 0, 0, 0, 0)], vcpu=5, cpus=6))
    for level in range(3):
        assert table[0x1F, level][1:] == table[0xB, level][1:]


def test_leaf_b_is_added_where_leaf_0_promises_it_and_only_there() -> None:
    without = [row for row in AMD if row.function != 0xB]
    assert rows(build(without, vcpu=0, cpus=2))[0xB, 1].ebx == 2
    old = [row._replace(eax=0xA) if row.function == 0 else row for row in without]
    assert not [key for key in rows(build(old, vcpu=0, cpus=2)) if key[0] == 0xB]


def test_apic_ids_fill_eight_bits() -> None:
    assert rows(build(AMD, vcpu=200, cpus=201))[1, 0].ebx >> 24 == 200


def test_more_cpus_than_eight_bits_count() -> None:
    table = rows(build(AMD, vcpu=299, cpus=300))
    assert table[1, 0].ebx >> 16 == (299 & 0xFF) << 8 | 255
    assert table[0xB, 1] == Entry(0xB, 1, 1, 9, 300, 0x201, 299)
    assert table[0x80000008, 0].ecx == 0x90FF


@HOSTS
def test_what_the_machine_does_not_decide_stays(supported: list[Entry]) -> None:
    table, host = machine(supported, 4)[2], rows(supported)
    mine = {1, 4, 0xB, 0x80000001, 0x80000008, 0x8000001D, 0x8000001E}
    for key, row in host.items():
        if key[0] not in mine:
            assert table[key] == row, "brand, clocks, XSAVE, KVM's leaf: as KVM gave them"


def test_rows_come_sorted_and_the_input_is_not_touched() -> None:
    before = list(AMD)
    table = build(AMD, vcpu=0, cpus=2, spec="host,-nx")
    assert before == AMD
    assert [(row.function, row.index) for row in table] == sorted((row.function, row.index) for row in table)


def test_a_software_kvm_offers_no_feature_that_makes_hypercalls() -> None:
    """cpuid.rst: 7 PV_UNHALT, 11 PV_SEND_IPI, 13 PV_SCHED_YIELD."""
    hard = rows(build(AMD, vcpu=0, cpus=1))[0x40000001, 0].eax
    soft = rows(build(AMD, vcpu=0, cpus=1, software_kvm=True))[0x40000001, 0].eax
    assert hard == 0x01007EFB
    assert soft == hard & ~(1 << 7 | 1 << 11 | 1 << 13)
    assert soft & 0b1001 == 0b1001, "both clocks stay"


@pytest.mark.parametrize("reported", [0, 1 << 24])
def test_the_deadline_timer_is_what_the_machine_says(reported: int) -> None:
    supported = [row._replace(ecx=row.ecx & ~(1 << 24) | reported) if row.function == 1 else row for row in AMD]
    assert rows(build(supported, vcpu=0, cpus=1))[1, 0].ecx >> 24 & 1 == 1
    assert rows(build(supported, vcpu=0, cpus=1, tsc_deadline=False))[1, 0].ecx >> 24 & 1 == 0


@pytest.mark.parametrize(("vcpu", "cpus"), [(-1, 1), (1, 1), (0, 0)])
def test_a_vcpu_that_is_not_there_is_our_own_mistake(vcpu: int, cpus: int) -> None:
    with pytest.raises(ValueError, match="vCPU"):
        build(AMD, vcpu=vcpu, cpus=cpus)


def test_an_empty_or_bare_table_survives() -> None:
    assert build([], vcpu=0, cpus=1) == []
    assert [row.function for row in build([Entry(0x80000008, 0, 0, 1, 2, 3, 4)], vcpu=0, cpus=1)] == [0x80000008]


# --- --cpu ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function", "index", "register", "bit"),
    [
        # SDM volume 2A, CPUID; AMD CPUID Specification; written out again on purpose
        ("fpu", 0x1, 0, "edx", 0),
        ("apic", 0x1, 0, "edx", 9),
        ("clflush", 0x1, 0, "edx", 19),
        ("sse2", 0x1, 0, "edx", 26),
        ("ht", 0x1, 0, "edx", 28),
        ("pni", 0x1, 0, "ecx", 0),
        ("vmx", 0x1, 0, "ecx", 5),
        ("fma", 0x1, 0, "ecx", 12),
        ("cx16", 0x1, 0, "ecx", 13),
        ("pcid", 0x1, 0, "ecx", 17),
        ("x2apic", 0x1, 0, "ecx", 21),
        ("tsc_deadline_timer", 0x1, 0, "ecx", 24),
        ("xsave", 0x1, 0, "ecx", 26),
        ("avx", 0x1, 0, "ecx", 28),
        ("rdrand", 0x1, 0, "ecx", 30),
        ("arat", 0x6, 0, "eax", 2),
        ("fsgsbase", 0x7, 0, "ebx", 0),
        ("avx2", 0x7, 0, "ebx", 5),
        ("invpcid", 0x7, 0, "ebx", 10),
        ("avx512f", 0x7, 0, "ebx", 16),
        ("smap", 0x7, 0, "ebx", 20),
        ("sha_ni", 0x7, 0, "ebx", 29),
        ("umip", 0x7, 0, "ecx", 2),
        ("la57", 0x7, 0, "ecx", 16),
        ("rdpid", 0x7, 0, "ecx", 22),
        ("fsrm", 0x7, 0, "edx", 4),
        ("ibt", 0x7, 0, "edx", 20),
        ("arch_capabilities", 0x7, 0, "edx", 29),
        ("avx512_bf16", 0x7, 1, "eax", 5),
        ("lam", 0x7, 1, "eax", 26),
        ("xsaves", 0xD, 1, "eax", 3),
        ("syscall", 0x80000001, 0, "edx", 11),
        ("nx", 0x80000001, 0, "edx", 20),
        ("pdpe1gb", 0x80000001, 0, "edx", 26),
        ("lm", 0x80000001, 0, "edx", 29),
        ("svm", 0x80000001, 0, "ecx", 2),
        ("topoext", 0x80000001, 0, "ecx", 22),
        ("invtsc", 0x80000007, 0, "edx", 8),
        ("clzero", 0x80000008, 0, "ebx", 0),
        ("virt_ssbd", 0x80000008, 0, "ebx", 25),
        ("npt", 0x8000000A, 0, "edx", 0),
        ("sev_snp", 0x8000001F, 0, "eax", 4),
        ("autoibrs", 0x80000021, 0, "eax", 8),
        ("kvm_steal_time", 0x40000001, 0, "eax", 5),
        ("kvmclock_stable_bit", 0x40000001, 0, "eax", 24),
    ],
)
def test_the_feature_table_against_the_manuals(name: str, function: int, index: int, register: str, bit: int) -> None:
    assert cpu_features.find(name) == ((function, index, register, bit),)


def test_the_feature_table_is_sound() -> None:
    bits = [bit for found in cpu_features.table().values() for bit in found]
    assert len(cpu_features.table()) > 200
    assert len(set(bits)) == len(bits), "one bit has one name"
    assert all(0 <= bit.bit < 32 for bit in bits)
    assert all(cpu_features.find(alias) for alias in cpu_features.ALIASES)
    assert not set(cpu_features.ALIASES) & set(cpu_features.table()), "an alias never hides a name"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("sse4.2", "sse4_2"),
        ("SSE4-1", "sse4_1"),
        ("tsc-deadline", "tsc_deadline_timer"),
        ("sse3", "pni"),
        ("lzcnt", "abm"),
        ("nonstop_tsc", "invtsc"),
        ("kvm-pv-eoi", "kvm_pv_eoi"),
        ("avx512vbmi2", "avx512_vbmi2"),
    ],
)
def test_other_spellings(written: str, name: str) -> None:
    assert [change.feature for change in parse(f"host,-{written}")] == [name]


def test_changes_apply_in_order_and_the_last_counts() -> None:
    off = rows(build(AMD, vcpu=0, cpus=1, spec="host,-cx16"))[1, 0].ecx
    on = rows(build(AMD, vcpu=0, cpus=1, spec="host,-cx16,+cx16"))[1, 0].ecx
    assert off >> 13 & 1 == 0
    assert on >> 13 & 1 == 1
    assert off | 1 << 13 == on


def test_only_the_named_bit_changes() -> None:
    plain, changed = machine(INTEL, 1)[0], machine(INTEL, 1, spec="host,-smap")[0]
    assert plain[7, 0].ebx ^ changed[7, 0].ebx == 1 << 20
    assert {key for key in plain if plain[key] != changed[key]} == {(7, 0)}


def test_the_machines_own_bits_can_be_switched_off() -> None:
    table = machine(AMD, 2, spec="host,-hypervisor,-tsc-deadline,-x2apic")[0]
    assert table[1, 0].ecx & (1 << 31 | 1 << 24 | 1 << 21) == 0


def test_amd_repeats_a_removed_bit_where_it_is_mirrored() -> None:
    table = machine(AMD, 1, spec="host,-apic,-sep,-sse")[0]
    assert table[1, 0].edx & (1 << 9 | 1 << 11 | 1 << 25) == 0
    assert table[0x80000001, 0].edx == 0x23D3FBFF & ~(1 << 9), "bit 11 there is SYSCALL, bit 25 FFXSR"
    assert machine(INTEL, 1, spec="host,-apic")[0][0x80000001, 0].edx == 0x2C100800


def test_kvmclock_is_one_feature_with_two_bits() -> None:
    assert machine(AMD, 1, spec="host,-kvmclock")[0][0x40000001, 0].eax == 0x01007EFB & ~0b1001


def test_a_supported_feature_may_be_asked_for() -> None:
    assert machine(AMD, 1, spec="host,+sse2,+nx,+topoext")[0] == machine(AMD, 1)[0]


def test_a_bit_of_the_machines_own_may_be_asked_for_where_it_applies() -> None:
    assert machine(AMD, 2, spec="host,+ht")[0] == machine(AMD, 2)[0]
    with pytest.raises(ConfigError, match="does not offer 'ht'"):
        build(AMD, vcpu=0, cpus=1, spec="host,+ht")


def test_a_feature_that_kvm_does_not_offer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\+avx512f: this host's KVM does not offer 'avx512f'") as caught:
        build(AMD, vcpu=0, cpus=1, spec="host,+avx512f")
    assert caught.value.hint
    assert caught.value.status == 2


def test_an_unknown_feature_is_refused_with_near_names() -> None:
    with pytest.raises(ConfigError, match="no CPU feature is called 'avx512g'") as caught:
        parse("host,+avx512g")
    assert "avx512f" in (caught.value.hint or "")
    with pytest.raises(ConfigError) as caught:
        parse("host,-qqqqqq")
    assert "/proc/cpuinfo" in (caught.value.hint or "")


@pytest.mark.parametrize("spec", ["", "qemu64", "Host64,+avx", "+avx", ",host"])
def test_an_unknown_model_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="no CPU model"):
        parse(spec)


@pytest.mark.parametrize("spec", ["host,", "host,,+nx", "host,avx2", "host,+", "host,-", "host,avx2=off"])
def test_a_change_needs_a_sign_and_a_name(spec: str) -> None:
    with pytest.raises(ConfigError, match="is not a change"):
        parse(spec)


def test_spaces_and_case_of_the_model_do_not_matter() -> None:
    assert parse(" HOST , +NX ") == (("nx", True, "+NX"),)
    assert parse("host") == ()


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(ConfigError):
        assert all(cpu_features.find(change.feature) for change in parse(f"host,{text}"))


@given(st.integers(1, 300), st.data())
def test_any_machine_has_consistent_ids(cpus: int, data: st.DataObject) -> None:
    vcpu = data.draw(st.integers(0, cpus - 1))
    table = rows(build(data.draw(st.sampled_from([AMD, INTEL])), vcpu=vcpu, cpus=cpus))
    assert table[0xB, 1].edx == vcpu
    assert vcpu >> table[0xB, 1].eax == 0
    assert all(0 <= value < 1 << 32 for row in table.values() for value in row)


# --- what a host lacks ------------------------------------------------------------------------------------------------


def changed(table, function, **registers):
    return [row._replace(**registers) if (row.function, row.index) == (function, 0) else row for row in table]


def test_a_guest_lacks_nothing_on_the_host_that_made_it():
    for vcpu in range(4):
        assert lacks(build(AMD, vcpu=vcpu, cpus=4), AMD) == []


def test_a_missing_feature_has_its_leaf_its_bit_and_its_name():
    """AVX is bit 28 of ECX in leaf 1 (SDM volume 2A, CPUID); bit 16 there is reserved."""
    ecx = 0x81202000
    guest = changed(AMD, 1, ecx=ecx | 1 << 28 | 1 << 16)
    assert lacks(guest, changed(AMD, 1, ecx=ecx)) == [Lack(1, 0, "ecx", 1 << 28 | 1 << 16, ("bit 16", "avx"))]


def test_a_whole_leaf_may_be_missing():
    """FSGSBASE is bit 0, BMI1 bit 3 of EBX in leaf 7 (SDM volume 2A, CPUID)."""
    host = [row for row in AMD if row.function != 7]
    found = {(lack.register, lack.mask) for lack in lacks(changed(AMD, 7, ebx=0b1001, ecx=0, edx=0), host)}
    assert found == {("ebx", 0b1001)}


def test_what_follows_the_machine_or_the_moment_is_nobodys_lack():
    """Leaf 1: OSXSAVE (ECX 27), TSC deadline (24), hypervisor (31), HTT (EDX 28); leaf 7: OSPKE (ECX 4)."""
    guest = changed(AMD, 1, ecx=0x81202000 | 1 << 27 | 1 << 24 | 1 << 31, edx=0x078BFBFF | 1 << 28)
    guest = changed(guest, 7, ecx=0x104 | 1 << 4)
    assert lacks(guest, changed(AMD, 1, ecx=0x01202000)) == []

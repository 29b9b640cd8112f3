"""The names of CPU features and the CPUID bits behind them.

Names are those of /proc/cpuinfo (Linux, arch/x86/include/asm/cpufeatures.h); a bit that Linux does not show there has
its name from the same header in lower case. The bit numbers agree with that header, with the Intel SDM (volume 2A,
CPUID) and with AMD's CPUID Specification. Only `--cpu` with a list of changes needs this module, so nothing imports it
at start.
"""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

__all__ = ["ALIASES", "WORDS", "Bit", "Change", "canonical", "find", "near", "table"]


class Bit(NamedTuple):
    """One bit of one CPUID output register."""

    function: int
    subleaf: int
    register: str
    bit: int


class Change(NamedTuple):
    """One `+feature` or `-feature`; `feature` is the name in this program's table, `written` the user's."""

    feature: str
    enable: bool
    written: str


# One row a register: leaf, subleaf, register, then the names of bits 0 to 31 ("." is a bit without a name). OSXSAVE and
# OSPKE have none on purpose: they mirror CR4, so KVM computes them.
WORDS: Final = (
    (
        (0x1, 0, "edx"),
        (
            "fpu vme de pse tsc msr pae mce cx8 apic . sep mtrr pge mca cmov "
            "pat pse36 pn clflush . dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
        ),
    ),
    (
        (0x1, 0, "ecx"),
        (
            "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm "
            ". pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave . avx f16c rdrand hypervisor"
        ),
    ),
    ((0x6, 0, "eax"), "dtherm ida arat . pln . pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req"),
    (
        (0x7, 0, "ebx"),
        (
            "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx "
            "rdt_a avx512f avx512dq rdseed adx smap avx512ifma . clflushopt "
            "clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"
        ),
    ),
    (
        (0x7, 0, "ecx"),
        (
            ". avx512vbmi umip pku . waitpkg avx512_vbmi2 shstk "
            "gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq . "
            "la57 . . . . . rdpid . bus_lock_detect cldemote . movdiri movdir64b enqcmd sgx_lc pks"
        ),
    ),
    (
        (0x7, 0, "edx"),
        (
            ". . avx512_4vnniw avx512_4fmaps fsrm . . . "
            "avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort . tsx_force_abort serialize hybrid_cpu "
            "tsxldtrk . pconfig arch_lbr ibt . amx_bf16 avx512_fp16 "
            "amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd"
        ),
    ),
    (
        (0x7, 1, "eax"),
        (
            ". . . . avx_vnni avx512_bf16 . cmpccxadd arch_perfmon_ext . fzrm fsrs fsrc . . . "
            ". fred lkgs wrmsrns . amx_fp16 . avx_ifma . . lam"
        ),
    ),
    ((0x7, 1, "edx"), ". . . . avx_vnni_int8 avx_ne_convert . . amx_complex . . . . . prefetchiti"),
    ((0xD, 1, "eax"), "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        (0x80000001, 0, "edx"),
        ". . . . . . . . . . . syscall . . . . . . . mp nx . mmxext . . fxsr_opt pdpe1gb rdtscp . lm 3dnowext 3dnow",
    ),
    (
        (0x80000001, 0, "ecx"),
        (
            "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse "
            "3dnowprefetch osvw ibs xop skinit wdt . lwp "
            "fma4 tce . nodeid_msr . tbm topoext perfctr_core "
            "perfctr_nb . bpext ptsc perfctr_llc mwaitx"
        ),
    ),
    ((0x80000007, 0, "ebx"), "overflow_recov succor . smca"),
    ((0x80000007, 0, "edx"), ". . . . . . . . invtsc"),
    (
        (0x80000008, 0, "ebx"),
        (
            "clzero irperf xsaveerptr . rdpru . . . . wbnoinvd . . amd_ibpb . amd_ibrs "
            "amd_stibp . amd_stibp_always_on . . . . . amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd "
            "btc_no amd_ibpb_ret brs"
        ),
    ),
    (
        (0x8000000A, 0, "edx"),
        (
            "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists "
            ". . pausefilter . pfthreshold avic . v_vmsave_vmload vgif . x2avic . v_spec_ctrl . . . "
            ". vnmi . . svme_addr_chk"
        ),
    ),
    ((0x8000001F, 0, "eax"), "sme sev vm_page_flush sev_es sev_snp . . . . v_tsc_aux sme_coherent . . . debug_swap"),
    (
        (0x80000021, 0, "eax"),
        (
            "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc . . verw_clear null_sel_clr_base . autoibrs "
            "no_smm_ctl_msr . . . . . . . . . . . . . . . . . sbpb "
            "ibpb_brtype srso_no srso_user_kernel_no srso_bp_spec_reduce"
        ),
    ),
    # KVM's own leaf (Documentation/virt/kvm/x86/cpuid.rst), under the names that QEMU made common. The old and the new
    # kvmclock are one feature to a user.
    (
        (0x40000001, 0, "eax"),
        (
            "kvmclock kvm_nopiodelay kvm_mmu kvmclock kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt "
            ". kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi "
            "kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id "
            "kvm_hc_map_gpa_range kvm_migration_control . . . . . . kvmclock_stable_bit"
        ),
    ),
)

ALIASES: Final = {
    "sse3": "pni",
    "pclmuldq": "pclmulqdq",
    "ds": "dts",
    "htt": "ht",
    "clfsh": "clflush",
    "psn": "pn",
    "tsc_deadline": "tsc_deadline_timer",
    "xd": "nx",
    "i64": "lm",
    "ffxsr": "fxsr_opt",
    "cr8legacy": "cr8_legacy",
    "lzcnt": "abm",
    "sgxlc": "sgx_lc",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "tsx_ldtrk": "tsxldtrk",
    "core_capability": "core_capabilities",
    "nonstop_tsc": "invtsc",
    "constant_tsc": "invtsc",
    "ibpb": "amd_ibpb",
    "ibrs": "amd_ibrs",
    "stibp": "intel_stibp",
    "ssbd": "spec_ctrl_ssbd",
    "stibp_always_on": "amd_stibp_always_on",
    "amd_no_ssb": "amd_ssb_no",
    "pause_filter": "pausefilter",
    "lfence_always_serializing": "lfence_rdtsc",
    "auto_ibrs": "autoibrs",
}
"""Other names of the same bits: the manuals', QEMU's, and flags that Linux computes from them."""


@cache
def table() -> dict[str, tuple[Bit, ...]]:
    """Return every canonical name with its bits (more than one where one feature has several)."""
    features: dict[str, tuple[Bit, ...]] = {}
    for place, names in WORDS:
        for bit, name in enumerate(names.split()):
            if name != ".":
                features[name] = (*features.get(name, ()), Bit(*place, bit))
    return features


def canonical(name: str) -> str:
    """Bring a name to this table's spelling: sse4.2, SSE4-2 and sse4_2 are one; other names are looked up."""
    spelled = name.lower().replace("-", "_").replace(".", "_")
    return ALIASES.get(spelled, spelled)


def find(name: str) -> tuple[Bit, ...] | None:
    """Return the bits of the feature that `name` means in any spelling, or None when there is no such feature."""
    return table().get(canonical(name))


def near(name: str) -> list[str]:
    """Return at most three names that look like `name`, the most similar first."""
    from difflib import get_close_matches  # noqa: PLC0415 - only an error needs it

    spelled = name.lower().replace("-", "_").replace(".", "_")
    return get_close_matches(spelled, [*table(), *ALIASES], n=3, cutoff=0.6)

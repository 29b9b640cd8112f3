"""What kind of host this is, on made-up hosts of every kind and on the real one."""

from __future__ import annotations

import errno
import grp
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor import host_remedies, host_report
from hypervisor.host import Kind, is_software_kvm, quick_kind
from hypervisor.host_proof import Proof
from hypervisor.host_report import Access, Part, inspect

if TYPE_CHECKING:
    from collections.abc import Callable

GET_API_VERSION, CHECK_EXTENSION = 0xAE00, 0xAE03
BUILT = (Part("bindings", "KVM from Python", "_kvm.so", required=True),)


class Host:
    """A made-up host: trees for /proc and /sys, a KVM device (/dev/null stands for it) and what KVM answers."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.kvm = "/dev/null"
        self.api = 12
        self.missing: set[int] = set()
        self.proof = Proof(ran=True, detail="it halted")
        self.open_error: OSError | None = None
        (base / "sys/module").mkdir(parents=True)
        self.write("proc/1/cgroup", "0::/\n")
        self.write("proc/misc", "200 tun\n")

    def write(self, path: str, text: str) -> None:
        (self.base / path).parent.mkdir(parents=True, exist_ok=True)
        (self.base / path).write_text(text)

    def cpu(self, *flags: str, model: str = "Some CPU") -> Host:
        words = " ".join(("fpu", "lm", *flags))
        block = f"processor\t: {{}}\nmodel name\t: {model}\nflags\t\t: {words}\nbugs\t\t: spectre_v1\n\n"
        self.write("proc/cpuinfo", "".join(block.format(number) for number in range(4)))
        return self

    def modules(self, *names: str) -> Host:
        for name in names:
            (self.base / "sys/module" / name).mkdir()
        return self

    def dmi(self, vendor: str, product: str = "") -> Host:
        self.write("sys/class/dmi/id/sys_vendor", vendor + "\n")
        self.write("sys/class/dmi/id/product_name", product + "\n")
        return self

    def registered(self) -> Host:
        self.write("proc/misc", "200 tun\n232 kvm\n")
        return self

    def absent(self) -> Host:
        self.kvm = str(self.base / "dev/kvm")
        return self

    def access(self) -> Access:
        host = self

        class Fake(Access):
            def open(self, path: str) -> int:
                if host.open_error is not None:
                    raise host.open_error
                return os.open(path, os.O_RDWR)

            def ioctl(self, fd: int, request: int, argument: int) -> int:
                assert os.fstat(fd)
                if request == GET_API_VERSION:
                    return host.api
                assert request == CHECK_EXTENSION
                return 0 if argument in host.missing else 1

            def prove(self, fd: int) -> Proof:
                assert os.fstat(fd)
                return host.proof

        return Fake()

    def inspect(self) -> host_report.HostReport:
        return inspect(
            self.kvm,
            proc=str(self.base / "proc"),
            sys=str(self.base / "sys"),
            root=str(self.base),
            access=self.access(),
        )

    def quick(self) -> Kind:
        return quick_kind(self.kvm, proc=str(self.base / "proc"), sys=str(self.base / "sys"))

    def remedies(self) -> str:
        return "\n".join(f"{remedy.problem} => {remedy.action}" for remedy in self.inspect().remedies)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(host_report, "find_parts", lambda: BUILT)
    return Host(tmp_path)


# --- kinds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "modules", "kind"),
    [
        (["svm"], ["kvm", "kvm_amd"], Kind.AMD_V),
        (["vmx"], ["kvm", "kvm_intel"], Kind.VT_X),
        (["hypervisor"], ["kvm", "kvm_pvm"], Kind.SOFTWARE),
        (["svm"], ["kvm"], Kind.AMD_V),  # all of it built in without a parameter
        (["vmx"], [], Kind.VT_X),
        ([], [], Kind.SOFTWARE),  # a KVM that works without the CPU's help is a software one, whatever its name
        ([], ["kvm_pvm", "kvm_amd", "kvm_intel"], Kind.SOFTWARE),  # built in, and useless on this CPU
        (["svm"], ["kvm_pvm", "kvm_amd"], Kind.AMD_V),
        (["svm"], ["kvm_pvm", "kvm_intel"], Kind.SOFTWARE),
        (["vmx"], ["kvm_pvm", "kvm_intel", "kvm_amd"], Kind.VT_X),
        (["svm"], ["kvm_pvm"], Kind.SOFTWARE),
    ],
)
def test_the_kind_follows_from_modules_and_flags(host: Host, flags: list[str], modules: list[str], kind: Kind) -> None:
    host.cpu(*flags).modules(*modules)
    assert host.quick() is kind
    assert host.inspect().kind is kind


def test_no_device_is_no_kvm_whatever_the_cpu(host: Host) -> None:
    host.cpu("svm").modules("kvm_amd").absent()
    report = host.inspect()
    assert host.quick() is Kind.NONE
    assert report.kind is Kind.NONE
    assert report.problem is not None
    assert "No such file" in report.problem
    assert not report.can_run_guest
    assert not report.can_run_linux
    assert not report.proof.ran
    assert all(cap.value is None for cap in report.capabilities)


def test_a_hardware_host_runs_everything(host: Host) -> None:
    report = host.cpu("svm").modules("kvm_amd").inspect()
    assert report.can_run_guest
    assert report.can_run_linux
    assert (report.module, report.api_version, report.problem) == ("kvm_amd", 12, None)
    assert report.sentence == "hardware AMD-V"
    assert report.remedies == ()


def test_looking_leaves_no_descriptor_behind(host: Host) -> None:
    host.cpu("svm").modules("kvm_amd")
    before = len(os.listdir("/proc/self/fd"))
    for api in (12, 11):
        host.api = api
        host.inspect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_software_host_runs_small_guests_and_points_to_the_emulated_host(host: Host) -> None:
    report = host.cpu("hypervisor").modules("kvm_pvm").inspect()
    assert report.can_run_guest
    assert not report.can_run_linux
    assert report.module == "kvm_pvm"
    assert "software KVM" in report.sentence
    assert "scripts/emulated-host" in report.remedies[-1].action


def test_the_kind_is_quick_without_reading_cpuinfo(host: Host) -> None:
    host.modules("kvm_amd")  # there is no cpuinfo at all
    assert host.quick() is Kind.AMD_V
    assert host.inspect().kind is Kind.AMD_V


def test_a_host_without_proc_and_sys_is_judged_without_a_crash(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert quick_kind("/dev/null", proc=nowhere, sys=nowhere) is Kind.SOFTWARE
    assert inspect(nowhere, proc=nowhere, sys=nowhere, root=nowhere).kind is Kind.NONE


@pytest.mark.parametrize(
    ("flags", "model", "vendor", "words"),
    [
        (["svm"], "AMD EPYC", "Dell Inc.", "hardware AMD-V"),
        (
            ["svm", "hypervisor"],
            "QEMU TCG CPU version 2.5+",
            "QEMU",
            "hardware AMD-V, emulated in turn by QEMU's TCG: faithful, and slow",
        ),
        (
            ["vmx"],
            "Intel(R) Core(TM) i7-4770",
            "Bochs",
            "hardware VT-x, emulated in turn by the Bochs emulator: faithful, and slow",
        ),
        (["svm", "hypervisor"], "AMD EPYC", "QEMU", "hardware AMD-V, nested, inside a QEMU virtual machine"),
        (
            ["vmx", "hypervisor"],
            "Intel(R) Xeon(R)",
            "Google",
            "hardware VT-x, nested, inside a Google Compute Engine virtual machine",
        ),
        (["vmx", "hypervisor"], "Intel(R) Xeon(R)", "", "hardware VT-x, nested, inside a virtual machine"),
        (
            ["svm", "hypervisor"],
            "AMD EPYC",
            "Microsoft Corporation",
            "hardware AMD-V, nested, inside a Hyper-V or Azure virtual machine",
        ),
    ],
)
def test_the_sentence_says_what_the_host_is_in(
    host: Host, flags: list[str], model: str, vendor: str, words: str
) -> None:
    host.cpu(*flags, model=model).modules("kvm_amd" if "svm" in flags else "kvm_intel").dmi(vendor)
    assert host.inspect().sentence == words


# --- remedies ---------------------------------------------------------------------------------------------------------


def test_absent_and_the_module_not_loaded(host: Host) -> None:
    assert "sudo modprobe kvm_intel" in host.cpu("vmx").absent().remedies()


def test_absent_and_the_module_did_not_start(host: Host) -> None:
    text = host.cpu("svm").modules("kvm_amd").absent().remedies()
    assert "firmware" in text
    assert "modprobe" not in text


def test_absent_on_a_cpu_without_virtualization(host: Host) -> None:
    text = host.cpu().absent().remedies()
    assert "neither vmx nor svm" in text
    assert "firmware" in text


def test_absent_in_a_virtual_machine_without_nesting(host: Host) -> None:
    text = host.cpu("hypervisor").absent().remedies()
    assert "nested=1" in text
    assert "-cpu host" in text


@pytest.mark.parametrize("mark", [".dockerenv", "run/.containerenv", "cgroup"])
def test_absent_in_a_container(host: Host, mark: str) -> None:
    if mark == "cgroup":
        host.write("proc/1/cgroup", "12:pids:/kubepods/burstable/pod1\n")
    else:
        host.write(mark, "")
    assert "--device /dev/kvm" in host.cpu("svm").modules("kvm_amd").registered().absent().remedies()


def test_absent_in_a_container_of_a_software_kvm(host: Host) -> None:
    host.write(".dockerenv", "")
    assert "--device /dev/kvm" in host.cpu("hypervisor").modules("kvm_pvm").registered().absent().remedies()


def test_absent_though_kvm_is_registered(host: Host) -> None:
    assert "mknod" in host.cpu("svm").modules("kvm_amd").registered().absent().remedies()


def test_absent_on_another_architecture(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    assert "no x86-64 host" in host.absent().remedies()


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENXIO])
def test_a_node_without_a_driver_is_as_good_as_absent(host: Host, number: int) -> None:
    host.cpu("svm").open_error = OSError(number, os.strerror(number))
    assert "sudo modprobe kvm_amd" in host.remedies()


def test_every_absence_names_the_emulated_host(host: Host) -> None:
    assert "scripts/emulated-host" in host.cpu().absent().remedies()


def permission(number: int = errno.EACCES) -> PermissionError:
    return PermissionError(number, os.strerror(number))


def remedies_for(path: Path, error: OSError, *, container: bool = False) -> str:
    facts = host_report.Facts(
        frozenset(), "", x86=True, modules=frozenset(), dmi="", container=container, registered=True
    )
    return "\n".join(" => ".join(remedy) for remedy in host_remedies.for_device(str(path), error, facts))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a file that looks like a device of group 4242, mode and membership as asked."""

    def make(mode: int = 0o660, gid: int = 4242, *, name: str | None = "kvm", mine: bool = False) -> Path:
        path = tmp_path / "kvm"
        path.write_text("")
        status = os.stat_result((0o020000 | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0))
        monkeypatch.setattr(Path, "stat", lambda _self: status)
        monkeypatch.setattr(os, "getgroups", lambda: [gid] if mine else [1, 2])
        monkeypatch.setattr(host_remedies, "_user", lambda: "sue")

        def look_up(number: int) -> Any:
            if name is None or number != gid:
                raise KeyError(number)
            return SimpleNamespace(gr_name=name, gr_mem=["joe", "ann"])

        monkeypatch.setattr(grp, "getgrgid", look_up)
        return path

    return make


def test_permission_of_a_group_that_the_user_is_not_in(node: Callable[..., Path]) -> None:
    text = remedies_for(node(name="virt"), permission())
    assert "sudo usermod -aG virt $USER" in text
    assert 'KERNEL=="kvm", GROUP="kvm", MODE="0666", OPTIONS+="static_node=kvm"' in text


def test_permission_of_a_group_joined_after_logging_in(
    node: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = node()
    monkeypatch.setattr(host_remedies, "_user", lambda: "ann")
    text = remedies_for(path, permission())
    assert "newgrp kvm" in text
    assert "usermod" not in text


@pytest.mark.parametrize("options", [{"gid": 0}, {"mode": 0o600}])
def test_permission_for_root_alone(node: Callable[..., Path], options: dict[str, int]) -> None:
    assert "chown root:kvm" in remedies_for(node(**options), permission())


def test_permission_of_a_nameless_group(node: Callable[..., Path]) -> None:
    path = node(name=None)
    assert "groupadd -g 4242 kvm" in remedies_for(path, permission())
    assert "--group-add 4242" in remedies_for(path, permission(), container=True)


def test_permission_refused_to_a_member(node: Callable[..., Path]) -> None:
    assert "getfacl" in remedies_for(node(mine=True), permission())


def test_permission_refused_by_a_device_cgroup(node: Callable[..., Path]) -> None:
    assert "--device /dev/kvm" in remedies_for(node(), permission(errno.EPERM), container=True)
    assert "confines" in remedies_for(node(), permission(errno.EPERM))


def test_permission_makes_the_kind_none(host: Host) -> None:
    host.cpu("svm").modules("kvm_amd").open_error = permission()
    report = host.inspect()
    assert report.kind is Kind.NONE
    assert "Permission denied" in report.sentence


@pytest.mark.parametrize(("module", "rival"), [("vboxdrv", "VirtualBox"), ("vmmon", "VMware"), (None, "another")])
def test_a_busy_cpu_names_the_rival(host: Host, module: str | None, rival: str) -> None:
    host.cpu("vmx").modules("kvm_intel", *([module] if module else []))
    host.proof = Proof(ran=False, detail="KVM_CREATE_VM: Device or resource busy", errno=errno.EBUSY)
    report = host.inspect()
    assert not report.can_run_guest
    assert not report.can_run_linux
    assert rival in report.remedies[0].problem
    host.open_error = OSError(errno.EBUSY, "busy")
    assert rival in host.inspect().remedies[0].problem


@pytest.mark.parametrize(
    ("number", "flags", "words"),
    [
        (errno.ENOMEM, [], "memory"),
        (errno.EINVAL, ["hypervisor"], "nested"),
        (errno.EINVAL, [], "dmesg"),
        (0, [], "dmesg"),
    ],
)
def test_a_guest_that_does_not_run_has_a_remedy(host: Host, number: int, flags: list[str], words: str) -> None:
    host.cpu("svm", *flags).modules("kvm_amd").proof = Proof(ran=False, detail="KVM_RUN: no", errno=number)
    assert words in host.remedies()


def test_a_required_capability_that_is_missing(host: Host) -> None:
    host.cpu("svm").modules("kvm_amd").missing = {0, 60}  # IRQCHIP and TSC_CONTROL
    report = host.inspect()
    assert not report.can_run_guest
    assert "KVM_CAP_IRQCHIP" in report.remedies[0].problem
    assert "newer kernel" in report.remedies[0].action
    assert "KVM_CAP_TSC_CONTROL" in report.remedies[1].problem


def test_a_wanted_capability_that_is_missing_stops_nothing(host: Host) -> None:
    host.cpu("svm").modules("kvm_amd").missing = {60}
    assert host.inspect().can_run_linux


def test_bindings_that_are_not_built(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_report, "find_parts", lambda: (BUILT[0]._replace(found=None),))
    host.cpu("svm").modules("kvm_amd")
    assert not host.inspect().can_run_guest
    assert "bindings are not built" in host.remedies()


def test_another_api_version_is_refused(host: Host) -> None:
    host.cpu("svm").api = 11
    report = host.inspect()
    assert report.kind is Kind.NONE
    assert report.api_version == 11
    assert "API version 11" in host.remedies()


# --- the real device, and what is none ------------------------------------------------------------------------------


def test_things_that_are_no_kvm_device(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "file").write_text("")
    for path in (fifo, tmp_path / "file", tmp_path):
        report = inspect(str(path))
        assert report.kind is Kind.NONE
        assert "not a device" in (report.problem or "")
    report = inspect("/dev/null")
    assert report.problem == "/dev/null: not a KVM device (ENOTTY)"
    assert report.remedies[0].problem == report.problem


def test_capability_numbers_are_those_of_the_header() -> None:
    numbers = {cap.name: cap.number for cap in host_report.WANTED}
    assert (
        numbers
        | {
            "IRQCHIP": 0,
            "USER_MEMORY": 3,
            "SET_TSS_ADDR": 4,
            "EXT_CPUID": 7,
            "NR_VCPUS": 9,
            "MP_STATE": 14,
            "COALESCED_MMIO": 15,
            "IRQFD": 32,
            "PIT2": 33,
            "IOEVENTFD": 36,
            "ADJUST_CLOCK": 39,
            "VCPU_EVENTS": 41,
            "XSAVE": 55,
            "XCRS": 56,
            "TSC_CONTROL": 60,
            "MAX_VCPUS": 66,
            "SYNC_REGS": 74,
            "SIGNAL_MSI": 77,
            "X2APIC_API": 129,
            "IMMEDIATE_EXIT": 136,
            "COALESCED_PIO": 162,
            "DIRTY_LOG_RING": 192,
            "BINARY_STATS_FD": 203,
        }
        == numbers
    )
    assert len(numbers) == len(host_report.WANTED)
    header = Path("/usr/include/linux/kvm.h")
    if header.exists():
        defined = dict(re.findall(r"#define KVM_CAP_(\w+)\s+(\d+)", header.read_text()))
        assert {name: str(number) for name, number in numbers.items()}.items() <= defined.items()


@pytest.mark.kvm
def test_the_real_host_is_consistent() -> None:
    report = inspect()
    assert report.kind is quick_kind()
    assert is_software_kvm() == (report.kind is Kind.SOFTWARE)
    assert report.api_version == 12
    assert report.proof.ran


def test_the_parts_of_this_installation_are_found() -> None:
    parts = {part.name: part for part in host_report.find_parts()}
    assert parts["python"].found
    assert parts["iced-x86"].found
    assert [name for name, part in parts.items() if part.required] == ["python", "bindings"]

"""`hv check`: the table, the JSON and the exit status, from reports made up by hand."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hypervisor import host_report
from hypervisor.cli import check
from hypervisor.host import Kind
from hypervisor.host_proof import Proof
from hypervisor.host_remedies import Remedy
from hypervisor.host_report import Capability, HostReport, Part

if TYPE_CHECKING:
    import pytest

RAN = Proof(ran=True, detail="it halted")
HARDWARE = HostReport(
    kind=Kind.AMD_V,
    sentence="hardware AMD-V",
    surroundings=None,
    problem=None,
    api_version=12,
    module="kvm_amd",
    capabilities=(
        Capability("IRQCHIP", 0, required=True, purpose="interrupt controllers", value=1),
        Capability("TSC_CONTROL", 60, required=False, purpose="another TSC frequency", value=0),
    ),
    proof=RAN,
    parts=(
        Part("bindings", "KVM from Python", "_kvm.so", required=True),
        Part("qemu-system-x86_64", "the emulated host", None),
    ),
    remedies=(Remedy("missing: KVM_CAP_TSC_CONTROL", "a newer CPU may have it"),),
)
SOFTWARE = HARDWARE._replace(kind=Kind.SOFTWARE, sentence="software KVM", module="kvm_pvm")
NONE = HARDWARE._replace(
    kind=Kind.NONE,
    sentence="no usable KVM",
    problem="/dev/kvm: No such file or directory",
    api_version=None,
    module=None,
    capabilities=tuple(cap._replace(value=None) for cap in HARDWARE.capabilities),
    proof=Proof(ran=False, detail="not tried"),
    remedies=(Remedy("the module kvm_amd is not loaded", "load it: sudo modprobe kvm_amd"),),
)


def run_check(monkeypatch: pytest.MonkeyPatch, report: HostReport, *arguments: str) -> int:
    monkeypatch.setattr(host_report, "inspect", lambda: report)
    parser = argparse.ArgumentParser()
    check.configure(parser)
    return check.run(parser.parse_args(arguments))


def test_check_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(monkeypatch, HARDWARE) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "This host: hardware AMD-V."
    assert "  ✓ KVM device  KVM API version 12, kvm_amd" in lines
    assert any(line.startswith("  ✓ IRQCHIP ") and line.endswith("(required)") for line in lines)
    assert any(line.startswith("  - TSC_CONTROL ") for line in lines)
    assert "  - qemu-system-x86_64  the emulated host (missing)" in lines
    assert "  ✓ Linux        here" in lines
    assert any("KVM_CAP_TSC_CONTROL" in line for line in lines)


def test_check_says_that_no_guest_can_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(monkeypatch, NONE) == 3
    text = capsys.readouterr().out
    assert "✗ KVM device" in text
    assert "✗ Linux        in the emulated host" in text
    assert "sudo modprobe kvm_amd" in text
    assert "KVM's capabilities" not in text


def test_check_says_that_a_software_kvm_runs_no_linux(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_check(monkeypatch, SOFTWARE) == 0
    text = capsys.readouterr().out
    assert "✓ small guests here" in text
    assert "✗ Linux        in the emulated host" in text


def test_check_as_json_has_its_stable_keys(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(monkeypatch, SOFTWARE, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["kind"]) == (1, "software")
    assert (found["can_run_guest"], found["can_run_linux"]) == (True, False)
    assert found["kvm"] == {
        "usable": True,
        "problem": None,
        "api_version": 12,
        "module": "kvm_pvm",
        "guest_ran": True,
        "guest_detail": "it halted",
    }
    assert {"name", "number", "required", "purpose", "value"} == set(found["capabilities"][0])
    assert {"problem", "action"} == set(found["remedies"][0])
    assert {kind.value for kind in Kind} == {"amd-v", "vt-x", "software", "none"}


def test_check_as_json_where_nothing_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(monkeypatch, NONE, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "none"
    assert not found["kvm"]["usable"]
    assert found["capabilities"][0]["value"] is None


def test_marks_fit_the_terminal() -> None:
    plain = check.Marks(encoding="ascii")
    assert (plain.of(1), plain.of(0), plain.of(0, required=False)) == ("+", "x", "-")
    assert check.Marks(encoding=None).yes == "+"
    assert check.Marks(encoding="no-such-encoding").yes == "+"
    assert check.Marks(colour=True).no == "\x1b[31m✗\x1b[0m"

"""`hv check`: what this host can run, what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from hypervisor.host import Kind

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from hypervisor.host_report import HostReport

SUMMARY: Final = "say what this host can run, and what is missing"
DESCRIPTION: Final = """\
Looks at /dev/kvm, asks it for every capability that this program uses, runs a guest of three instructions on it, and
says what to do about whatever is missing.
"""
EPILOG: Final = "exit status: 0 a guest can run, 3 it cannot"

JSON_VERSION: Final = 1
STATUS_CANNOT: Final = 3
RUNS: Final = {
    Kind.AMD_V: ("small guests", "Linux"),
    Kind.VT_X: ("small guests", "Linux"),
    Kind.SOFTWARE: ("small guests",),
    Kind.NONE: (),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hv check`."""
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Examine the host and print the findings; returns 0 when a guest can run, else 3."""
    from hypervisor.host_report import inspect

    report = inspect()
    if options.json:
        print(json.dumps(to_json(report), indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for line in to_lines(report, Marks(colour=colour, encoding=sys.stdout.encoding)):
            print(line)
    return 0 if report.can_run_guest else STATUS_CANNOT


def to_json(report: HostReport) -> dict[str, Any]:
    """Return the findings in their stable form: keys are added to it, never changed or taken away."""
    return {
        "version": JSON_VERSION,
        "kind": report.kind.value,
        "sentence": report.sentence,
        "inside": report.surroundings,
        "can_run_guest": report.can_run_guest,
        "can_run_linux": report.can_run_linux,
        "kvm": {
            "usable": report.problem is None,
            "problem": report.problem,
            "api_version": report.api_version,
            "module": report.module,
            "guest_ran": report.proof.ran,
            "guest_detail": report.proof.detail,
        },
        "capabilities": [cap._asdict() for cap in report.capabilities],
        "parts": [part._asdict() for part in report.parts],
        "remedies": [remedy._asdict() for remedy in report.remedies],
    }


class Marks:
    """The signs before each line, in what the terminal can show."""

    def __init__(self, *, colour: bool = False, encoding: str | None = "utf-8") -> None:
        """Choose signs: ticks and crosses where `encoding` has them, colours where `colour` says so."""
        signs = ("✓", "✗", "-")
        try:
            "".join(signs).encode(encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            signs = ("+", "x", "-")
        paint = ("\x1b[32m{}\x1b[0m", "\x1b[31m{}\x1b[0m", "\x1b[33m{}\x1b[0m") if colour else ("{}", "{}", "{}")
        self.yes, self.no, self.lacking = (form.format(sign) for form, sign in zip(paint, signs, strict=True))

    def of(self, good: object, *, required: bool = True) -> str:
        """Return the sign for something that is there, missing, or missing and not needed."""
        return self.yes if good else self.no if required else self.lacking


def to_lines(report: HostReport, marks: Marks) -> Iterator[str]:
    """Yield the findings as a table for people."""
    yield f"This host: {report.sentence}."
    yield ""
    device = report.problem or f"KVM API version {report.api_version}" + (f", {report.module}" if report.module else "")
    yield f"  {marks.of(report.problem is None)} KVM device  {device}"
    yield f"  {marks.of(report.proof.ran)} a guest     {report.proof.detail}"
    yield ""
    yield "What runs here"
    possible = RUNS[report.kind] if report.can_run_guest else ()
    for what in ("small guests", "Linux"):
        how = "here" if what in possible else "in the emulated host (scripts/emulated-host), on any x86-64 Linux"
        yield f"  {marks.of(what in possible)} {what:12} {how}"
    if report.problem is None:
        yield ""
        yield "KVM's capabilities"
        width = max(len(cap.name) for cap in report.capabilities)
        for cap in report.capabilities:
            sign = marks.of(cap.value, required=cap.required)
            yield f"  {sign} {cap.name:{width}} {cap.value:>8}  {cap.purpose}{' (required)' if cap.required else ''}"
    yield ""
    yield "Programs and packages"
    width = max(len(part.name) for part in report.parts)
    for part in report.parts:
        found = f": {part.found}" if part.found else " (missing)"
        yield f"  {marks.of(part.found, required=part.required)} {part.name:{width}}  {part.purpose}{found}"
    if report.remedies:
        yield ""
        yield "What to do"
        for number, remedy in enumerate(report.remedies, 1):
            yield f"  {number}. {remedy.problem}:"
            yield f"     {remedy.action}"

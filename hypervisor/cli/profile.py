"""`hv profile`: what a profile says, and what changed between profiles."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, BinaryIO, Final

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from hypervisor.profile.compare import Comparison
    from hypervisor.profile.model import Profile

SUMMARY: Final = "report on a profile, compare profiles"
DESCRIPTION: Final = """\
A profile is what `hv run --profile FILE` writes: each exit of the guest to hv, by reason, device and register, and how
long it took until the guest went on; where KVM allows it, what KVM itself handled.

  hv profile report FILE        where the time went: tables, or another format for another tool
  hv profile diff BEFORE AFTER  what changed, most handler time first"""
EPILOG: Final = """\
examples:
  hv run debian --profile run.hvprof
  hv profile report run.hvprof
  hv profile report run.hvprof --format html --output run.html
  hv profile diff before.hvprof after.hvprof
"""
REPORT_DESCRIPTION: Final = """\
Report on a profile. Every figure says who counted it: hv itself (user layer) or the host's KVM (kernel layer). Share is
handler time as a part of all vCPUs' time; p50, p90, p99 and max are of the time from an exit to the next entry. The
layers are not to be added up: KVM counts the exits that it passes on to hv, too, and in its times a halted vCPU sleeps.

formats:
  text        tables for people (default)
  json        the same for programs; its keys stay
  html        one page: timeline, heat map, flame graph, table; needs no network and no other file
  folded      stacks, for any flame graph tool
  perfetto    single exits on a time axis, for ui.perfetto.dev (binary)
  prometheus  counters and histograms in the text exposition format"""
REPORT_EPILOG: Final = """\
examples:
  hv profile report run.hvprof --top 30 | less
  hv profile report run.hvprof --format html --output run.html
  hv profile report run.hvprof --format folded --weight count | flamegraph.pl > run.svg
  hv profile report run.hvprof --format perfetto --output run.pftrace
"""
DIFF_DESCRIPTION: Final = """\
Say what changed between two runs, or two sets of runs of the same thing: exits, exits a second, p50, p99 and total of
the handler times, by reason, device, register and guest symbol.

One run each shows a difference, but not whether it is more than chance. With more runs each line has a p from a
permutation test: how likely such a difference would be if nothing had changed. 3 and 3 runs can show a growth
(p 0.05), 4 and 4 any difference (p 0.03). Of what KVM counted --fail-over takes exits only, not times."""
DIFF_EPILOG: Final = """\
examples:
  hv profile diff before.hvprof after.hvprof
  hv profile diff --before b1 b2 b3 b4 --after a1 a2 a3 a4 --top 20
  hv profile diff --before b1 b2 b3 --after a1 a2 a3 --fail-over 10     for CI: status 1 if anything got 10% worse

exit status: 0; 1 if something grew by more than --fail-over; 2 bad usage or a file that is no profile
"""
FORMATS: Final = ("text", "json", "html", "folded", "perfetto", "prometheus")
WEIGHTS: Final = ("ns", "count")
LAYERS: Final = ("user", "kernel")
GREW: Final = 1
TOP, DIFF_TOP, FLOOR, ALPHA = 10, 5, 1.0, 0.05
WIDTH: Final = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv profile`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, summary: str, description: str, epilog: str) -> Callable[..., Any]:
        form = parser.formatter_class
        return actions.add_parser(
            name, help=summary, description=description, epilog=epilog, formatter_class=form
        ).add_argument

    add = action("report", "tell what a profile says", REPORT_DESCRIPTION, REPORT_EPILOG)
    add("file", metavar="FILE", help="a profile")
    add("--format", metavar="FORMAT", default="text", help=f"{', '.join(FORMATS)} (default text)")
    add("--output", metavar="FILE", help="write there and not to standard output; it appears when it is whole")
    add("--top", type=int, metavar="N", default=TOP, help=f"lines of a table of text (default {TOP})")
    add("--weight", metavar="WHAT", default="ns", help="of folded stacks: ns (handler time, default) or count (exits)")
    add(
        "--layer",
        metavar="WHOSE",
        default="user",
        help="of folded stacks: user (hv's exits, default) or kernel (KVM's)",
    )
    add = action("diff", "tell what changed between profiles", DIFF_DESCRIPTION, DIFF_EPILOG)
    add("files", nargs="*", metavar="FILE", help="the profile before, and the one after")
    add("--before", nargs="+", metavar="FILE", help="profiles of several runs before")
    add("--after", nargs="+", metavar="FILE", help="and of several after")
    add("--format", metavar="FORMAT", default="text", help="text (default) or json")
    add("--top", type=int, metavar="N", default=DIFF_TOP, help=f"lines of a table of text (default {DIFF_TOP})")
    add(
        "--fail-over",
        type=float,
        metavar="PERCENT",
        help="status 1 if exits or handler time of anything grew by more; with several runs: and not by chance",
    )
    add(
        "--floor",
        type=float,
        metavar="PERCENT",
        default=FLOOR,
        help=f"--fail-over passes over what takes less of all handler time, in KVM of all exits (default {FLOOR:g})",
    )
    add("--alpha", type=float, metavar="P", default=ALPHA, help=f"--fail-over's largest p (default {ALPHA:g})")


def run(options: argparse.Namespace) -> int:
    """Do one of report, diff."""
    if options.top < 1:
        from hypervisor.errors import ConfigError

        raise ConfigError(f"--top {options.top}", hint="it is a number of lines, at least 1")
    return _report(options) if options.action == "report" else _diff(options)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        from hypervisor.errors import ConfigError

        raise ConfigError(f"{option} {value}", hint=f"it is one of {', '.join(known)}")


# --- report -----------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    from hypervisor.profile.file import load

    _one_of("--format", options.format, FORMATS)
    _one_of("--weight", options.weight, WEIGHTS)
    _one_of("--layer", options.layer, LAYERS)
    if options.format == "perfetto" and options.output is None and sys.stdout.isatty():
        from hypervisor.errors import ConfigError

        raise ConfigError("a Perfetto trace is no text for a terminal", hint="name a file: --output run.pftrace")
    profile = load(options.file)
    if options.output is None:
        sys.stdout.flush()
        _write(profile, options, sys.stdout.buffer, sys.stdout)
        sys.stdout.buffer.flush()
    else:
        _write_file(options.output, lambda file: _write(profile, options, file))
    return 0


def _write(profile: Profile, options: argparse.Namespace, file: BinaryIO, terminal: Any = None) -> None:
    """Write the report in its format; `terminal` is the text stream that `file` belongs to, if any."""
    from importlib import import_module

    names = {"json": "jsonform"}
    module = import_module(f"hypervisor.profile.report.{names.get(options.format, options.format)}")
    if options.format == "perfetto":
        module.write(profile, file)
        return
    arguments: dict[str, Any] = {}
    if options.format == "text":
        arguments = {"top": options.top, **_style(terminal), "blocks": _has_blocks(terminal)}
    elif options.format == "folded":
        arguments = {"weight": options.weight, "layer": options.layer}
    file.write(_encoded(module.render(profile, **arguments), terminal if options.format == "text" else None))


def _encoded(text: str | bytes, terminal: Any) -> bytes:
    """Return text as a terminal takes it; without one as UTF-8, where what is no text is escaped."""
    if isinstance(text, bytes):
        return text
    return text.encode(getattr(terminal, "encoding", None) or "utf-8", "backslashreplace")


def _style(terminal: Any) -> dict[str, Any]:
    """Return width and colour: the terminal's own, or what fits a file."""
    if terminal is None or not terminal.isatty():
        return {"width": WIDTH, "colour": False}
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        columns = WIDTH
    return {"width": columns or WIDTH, "colour": not os.environ.get("NO_COLOR")}


def _has_blocks(terminal: Any) -> bool:
    try:
        "█▓░·…".encode(getattr(terminal, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _write_file(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Write a file that appears when it is whole; a device or a pipe is written as it is."""
    from hypervisor.errors import ConfigError

    whole = not os.path.exists(path) or os.path.isfile(path)
    target = f"{path}.{os.getpid()}.part" if whole else path
    try:
        with open(target, "wb") as file:
            write(file)
        if whole:
            os.replace(target, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if whole and os.path.exists(target):
            os.unlink(target)


# --- diff -------------------------------------------------------------------------------------------------------------


def _runs(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the files before and after."""
    from hypervisor.errors import ConfigError

    if options.files and (options.before or options.after):
        raise ConfigError("files both with and without --before and --after", hint="two files, or both options")
    if options.before and options.after:
        return options.before, options.after
    if len(options.files) != 2:
        raise ConfigError(
            "a diff needs a profile before and one after", hint="hv profile diff A B, or --before A... --after B..."
        )
    return options.files[:1], options.files[1:]


def _diff(options: argparse.Namespace) -> int:
    from hypervisor.profile.compare import compare
    from hypervisor.profile.file import load

    _one_of("--format", options.format, ("text", "json"))
    before, after = _runs(options)
    _check_limits(options, len(before), len(after))
    comparison = compare([load(path) for path in before], [load(path) for path in after])
    if options.format == "json":
        import json

        print(json.dumps(comparison.as_json(), indent=2))
    else:
        from hypervisor.profile.report import difftext

        text = difftext.render(comparison, top=options.top, **_style(sys.stdout))
        sys.stdout.write(_encoded(text, sys.stdout).decode(sys.stdout.encoding))
    return 0 if options.fail_over is None else _verdict(options, comparison)


def _check_limits(options: argparse.Namespace, before: int, after: int) -> None:
    """Refuse limits that make no sense, above all a test that can never fail."""
    from hypervisor.errors import ConfigError
    from hypervisor.profile.compare import least_p

    for name, value, most in (("--fail-over", options.fail_over or 0, 1e9), ("--floor", options.floor, 100)):
        if not 0 <= value <= most:
            raise ConfigError(f"{name} {value:g}", hint="it is in percent, 0 or more")
    if not 0 < options.alpha <= 1:
        raise ConfigError(f"--alpha {options.alpha:g}", hint="it is a probability: above 0, at most 1")
    least = least_p(before, after)[1]
    if options.fail_over is not None and before + after > 2 and least > options.alpha:
        raise ConfigError(
            f"--fail-over with {before} and {after} runs can never fail: their least p is {least:.2g}",
            hint=f"more runs (3 and 3 can reach 0.05), or a larger --alpha than {options.alpha:g}",
        )


def _verdict(options: argparse.Namespace, comparison: Comparison) -> int:
    from hypervisor.profile.compare import relative
    from hypervisor.profile.report.difftext import part
    from hypervisor.profile.report.units import plain

    grown = comparison.grown(options.fail_over, floor=options.floor, alpha=options.alpha)
    for change in grown:
        names = ("total", "exits") if change.layer == "user" else ("exits",)
        pairs = {name: (getattr(change.before, name), getattr(change.after, name)) for name in names}
        name, pair = max(pairs.items(), key=lambda item: relative(*item[1]))
        what, p = ("handler time", change.p_more_total) if name == "total" else ("exits", change.p_more_exits)
        chance = "" if p is None else f", p {p:.2g}"
        print(f"hv: {plain(change.name)} ({change.by}): {what} {part(*pair)}{chance}", file=sys.stderr)
    return GREW if grown else 0

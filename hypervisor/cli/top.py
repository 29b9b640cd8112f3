"""`hv top`: the machines that run, live."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import argparse

SUMMARY: Final = "watch running machines: exits a second, and where the time goes"
DESCRIPTION: Final = """\
Watch this user's running machines, as `top` does processes: exits to hv a second, and how the vCPUs' time is divided
between guest, hv's handlers and halts. With MACHINE, or Enter on a row: its exits by reason, device and register, how
often each comes and how long its handlers take.

A machine's name is that of `hv run --name`, by default its kernel's name and its process's number. From Python,
`machine.publish("NAME")` makes a machine appear here."""
EPILOG: Final = """\
keys:
  up, down  select a row        Enter  its exits        Esc  back        q  quit
  s         sort by the next column (the foot says which)                r  the other way round
  ?         what the columns mean

examples:
  hv top
  hv top debian-1234 --interval 0.5
  hv top --once --json | jq '.machines[] | {name, exits_per_s}'

exit status: 0; 2 no machine has this name; 3 a machine does not answer; 128+N signal N
"""
JSON_VERSION: Final = 1
LEAST_INTERVAL, MOST_INTERVAL = 0.2, 3600.0
AGAIN_SECONDS: Final = 0.1
ROWS: Final = 30
WIDTH: Final = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv top`."""
    add = parser.add_argument
    add("machine", nargs="?", metavar="MACHINE", help="a machine's name: show its exits")
    add("--interval", type=float, metavar="SECONDS", default=1.0, help="how often to look (default 1)")
    add("--once", action="store_true", help="look twice, an interval apart, print what happened between, and end")
    add("--json", action="store_true", help="with --once: as JSON, whose keys stay")


def run(options: argparse.Namespace) -> int:
    """Show machines until the user quits, or once."""
    from hypervisor.errors import ConfigError

    if not LEAST_INTERVAL <= options.interval <= MOST_INTERVAL:
        hint = f"it is a number of seconds from {LEAST_INTERVAL:g} to {MOST_INTERVAL:g}"
        raise ConfigError(f"--interval {options.interval:g}", hint=hint)
    if options.json and not options.once:
        raise ConfigError("--json prints one sample", hint="add --once")
    if options.once:
        return _once(options)
    if not (os.isatty(0) and os.isatty(1)) or os.environ.get("TERM", "dumb") == "dumb":
        raise ConfigError("hv top needs a terminal", hint="--once prints one sample, --once --json for programs")
    from hypervisor.cli.topapp import TopApp

    return TopApp(options.machine, options.interval).run()


def _once(options: argparse.Namespace) -> int:
    samples = _sample(options.machine, options.interval)
    if options.json:
        import json

        print(json.dumps(_as_json(options.machine, samples), indent=2))
    elif not samples:
        print("No machine runs. `hv run KERNEL` starts one.")
    else:
        _print_table(options.machine, samples)
    return 0


def _sample(machine: str | None, interval: float) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Ask the machines twice; of all of them those that end meanwhile, or are silent, are left out."""
    from hypervisor.control import folder_of_machines, machine_names
    from hypervisor.errors import VmmError
    from hypervisor.profile.live_client import ask

    names = [machine] if machine is not None else machine_names(folder_of_machines())
    kind = "summary" if machine is None else "exits"

    def look(name: str, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return a machine's answer; one that is not `earlier` once more, which it may give for a while."""
        try:
            while True:
                answer = ask(name, kind)
                if earlier is None or answer["uptime_ns"] != earlier["uptime_ns"]:
                    return answer
                time.sleep(AGAIN_SECONDS)
        except VmmError:
            if machine is not None:
                raise
            return None

    zeroth = {name: answer for name in names if (answer := look(name, None)) is not None}  # has KVM's counters opened
    first = {name: answer for name, before in zeroth.items() if (answer := look(name, before)) is not None}
    if first:
        time.sleep(interval)
    return {name: (before, after) for name, before in first.items() if (after := look(name, before)) is not None}


def _as_json(machine: str | None, samples: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    from hypervisor.profile.rates import exit_rates, machine_rates

    machines = []
    for before, after in samples.values():
        one = machine_rates(before, after).as_json()
        if machine is not None:
            one["exits_by_kind"] = [rate.as_json() for rate in exit_rates(before, after)]
        machines.append(one)
    return {"version": JSON_VERSION, "machines": machines}


def _print_table(machine: str | None, samples: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    from hypervisor.cli.columns import fit, line, title
    from hypervisor.cli.topscreen import EXITS, MACHINES, MachineState, exit_cells, machine_cells
    from hypervisor.profile.rates import exit_rates, machine_rates

    if machine is None:
        columns = MACHINES
        rows = [
            machine_cells(name, MachineState(rates=machine_rates(before, after)))
            for name, (before, after) in samples.items()
        ]
    else:
        columns = EXITS
        rows = [exit_cells(rate) for rate in exit_rates(*samples[machine])[:ROWS]]
    width = os.get_terminal_size(1).columns if os.isatty(1) else WIDTH
    layout = fit([column for column in columns if column.name != "spark"], rows, width)
    print(title(layout, "").plain[2:].rstrip())
    for row in rows:
        print(line(layout, row, styles={}, is_selected=False).plain[2:].rstrip())
    sys.stdout.flush()

"""`hv snapshot save` and `hv snapshot restore`: a running machine into a snapshot, and a machine out of one."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from hypervisor.errors import ConfigError, HostError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

__all__ = ["configure_restore", "configure_save", "restore", "save", "wait_for"]

POLL_SECONDS: Final = 0.2
LONG_SECONDS: Final = 1e6
SAVE_EPILOG: Final = """\
examples:
  hv snapshot save web booted                the machine goes on
  hv snapshot save web tonight --suspend     it ends here; `hv snapshot restore tonight` goes on with its disks
  hv snapshot save web later --base booted   only what has changed since `booted`, which has to stay where it is

exit status: 0 saved; 2 bad usage, or no such machine; 3 the host did not take it, and what was there is as it was
"""
RESTORE_EPILOG: Final = """\
examples:
  hv snapshot restore booted                 to this terminal
  hv snapshot restore booted --clone         as one of many: new network addresses and generation identifier
  hv snapshot restore packed --lazy          begins at once, however large it is, and is unpacked as it is touched
  hv snapshot restore booted --clone --net user,forward=2223:22

A disk that was copied into the snapshot stays as it is there: what the guest writes is kept in memory, and gone at the
end. A suspended machine goes on with its own disks, once, unless it is a --clone.

exit status: as of `hv run`
"""


def configure_save(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv snapshot save`."""
    add = parser.add_argument
    add("machine", metavar="MACHINE", help="name of a running machine; `hv top` lists them")
    add("path", metavar="NAME", help="the snapshot's directory; one that is there is replaced")
    add("--base", metavar="SNAPSHOT", help="save only what differs from this one")
    add("--track", action="store_true", help="log what changes from here on: the next save on this --base is quicker")
    add("--zstd", action="store_true", help="compress the memory")
    add("--suspend", action="store_true", help="end the machine then, and do not copy its disks")


def configure_restore(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv snapshot restore`."""
    add = parser.add_argument
    add("path", metavar="NAME", help="the snapshot's directory")
    add("--clone", action="store_true", help="be one of many that go on from it")
    add("--no-verify", dest="verify", action="store_false", help="do not compare memory and disks with their hashes")
    add("--lazy", action="store_true", help="begin before a compressed or differential snapshot is put together")
    add("--advance", action="store_true", help="let the guest's clocks go on as if it had run all the while")
    add("--net", dest="nets", action="append", metavar="KIND[,...]", help="networks instead of those it had, in order")
    add("--port", dest="ports", action="append", metavar="[NAME],WHERE", help="console ports instead of those it had")
    add("--vsock", metavar="CID,path=SOCKET", help="the vsock device's socket, and its address")
    add("--name", metavar="NAME", help="what `hv top` calls the machine")
    add("--console", metavar="WHERE", default="stdio", help="as of `hv run` (default stdio)")
    add("--profile", metavar="FILE[,...]", help="as of `hv run`")
    add("--timeout", type=float, metavar="SECONDS", help="end the guest after this time, with status 124")


def save(options: argparse.Namespace) -> int:
    """Have a running machine save itself."""
    what = {
        "do": "save",
        "path": os.path.abspath(options.path),
        "base": None if options.base is None else os.path.abspath(options.base),
        "compress": options.zstd,
        "suspend": options.suspend,
        "track": options.track,
    }

    def show(told: dict[str, Any]) -> str:
        return f"saving: {told['done'] >> 20} of {told['total'] >> 20} MiB" if "done" in told else "saving"

    wait_for(options.machine, what, show)
    return 0


def wait_for(machine: str, what: dict[str, Any], show: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Have a running machine do something, show on a terminal how far it is, and return its answer.

    Ctrl-C has it give up.

    Raises:
        ConfigError: no machine has the name.
        HostError: it could not do it.
    """
    from hypervisor.profile.live_client import request

    answers: list[dict[str, Any]] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(request(machine, what, timeout=LONG_SECONDS))
        except BaseException as error:  # noqa: BLE001 - it belongs to the main thread
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        _watch(machine, thread, show)
    except KeyboardInterrupt:
        request(machine, {"do": "cancel"})
        thread.join()
    if failures:
        raise failures[0]
    return answers[0]


def _watch(machine: str, thread: threading.Thread, show: Callable[[dict[str, Any]], str]) -> None:
    from hypervisor.profile.live_client import request

    is_terminal = sys.stderr.isatty()
    shown = False
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if is_terminal and thread.is_alive():
            try:
                line = show(request(machine, {"do": "progress"}))
            except (ConfigError, HostError):
                continue
            print(f"\r{line:70}", end="", file=sys.stderr, flush=True)
            shown = True
    if shown:
        print(f"\r{'':70}\r", end="", file=sys.stderr, flush=True)


def restore(options: argparse.Namespace) -> int:
    """Run a machine that goes on from a snapshot, to its end."""
    from hypervisor.cli.run import default_settings, serve
    from hypervisor.machine import Machine

    given = {name: getattr(options, name) for name in ("console", "name", "profile", "timeout")}
    changes = {
        name: getattr(options, name) for name in ("nets", "ports", "vsock") if getattr(options, name) is not None
    }
    how = {"clone": options.clone, "verify": options.verify, "advance": options.advance, "lazy": options.lazy}
    return serve(lambda: Machine.restore(options.path, **how, **changes), default_settings() | given)

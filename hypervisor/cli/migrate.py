"""`hv migrate`: a running machine moves to another process, here or on another host."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

from hypervisor.cli.run import default_settings, serve
from hypervisor.errors import ConfigError, HostError

if TYPE_CHECKING:
    import argparse

    from hypervisor.machine import Machine
    from hypervisor.migration.wire import Tls

SUMMARY: Final = "move a running machine to another process or host"
DESCRIPTION: Final = """\
Move a running machine to another process, on this host or another, while its guest runs. The target waits with `hv
migrate receive`; `hv migrate send` has the machine go there. Memory is sent while the guest changes it; it stands still
only for the rest. Whatever goes wrong before the target has everything, the guest goes on where it is."""
EPILOG: Final = """\
examples:
  hv migrate receive unix:/tmp/move             in one terminal, which becomes the machine's console
  hv migrate send web unix:/tmp/move            in another; `hv top` lists the names of machines
  hv migrate receive tcp:0.0.0.0:4444 --disk root.img        for `hv migrate send --copy-disks`
  hv migrate receive tcp:0.0.0.0:4444 --tls ca.pem,target.pem,target.key
  hv migrate send web tcp:host2:4444 --tls ca.pem,source.pem,source.key --downtime 50

Disks: the target opens the same paths, on this host or on storage that both hosts have, once the source has let go
of them. With --copy-disks their content is sent, while the guest goes on; the target makes raw files of it, in the
order of its --disk options, or disk-blk0.raw and so on where it was started.

A guest that changes memory faster than the connection carries it off does not move, unless with --postcopy: then it
goes on there, and what it touches is fetched. Until all is there it needs both processes and the connection between
them: if one is lost, so is the guest, and the target says so. Not with --tls.

TLS: both ends show a certificate that the same authority has signed; without --tls anybody who reaches the port can
send a machine, or take one.

If the target falls silent in the very last step, nobody knows whether the guest runs there. It stands still here then,
and nothing is lost: look at the target, and say what you have found.

  hv migrate settle web --here                  it does not run there: it goes on here
  hv migrate settle web --there                 it does: it ends here

exit status of send: 0 it moved; 2 bad usage; 3 it did not, and goes on here, or stands still: the message says so. Of
receive: as of `hv run`. Of settle: 0; 2 no such machine; 3 there was nothing to settle.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv migrate`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    sender = actions.add_parser("send", help="have a running machine move to where a target waits")
    add = sender.add_argument
    add("machine", metavar="MACHINE", help="its name; `hv top` lists them")
    add("to", metavar="ADDRESS", help="unix:PATH or tcp:HOST:PORT")
    add("--downtime", type=float, default=100, metavar="MS", help="how long the guest may stand still (default 100)")
    add("--postcopy", action="store_true", help="if memory changes too fast, let it follow when the guest runs there")
    add("--copy-disks", action="store_true", help="send the disks' content too: the target has no storage in common")
    add("--tls", metavar="CA,CERT,KEY", help="PEM files, for TCP")
    add("--json", action="store_true", help="print the result as a JSON object")
    settler = actions.add_parser("settle", help="say where a machine runs when a target fell silent in the last step")
    add = settler.add_argument
    add("machine", metavar="MACHINE", help="its name here")
    where = settler.add_mutually_exclusive_group(required=True)
    where.add_argument("--here", action="store_true", help="it does not run at the target: let it go on here")
    where.add_argument("--there", dest="here", action="store_false", help="it runs at the target: end it here")
    receiver = actions.add_parser("receive", help="wait for a machine and run it here")
    add = receiver.add_argument
    add("at", metavar="ADDRESS", help="unix:PATH or tcp:HOST:PORT; port 0 takes one that is free and says which")
    add("--tls", metavar="CA,CERT,KEY", help="PEM files, for TCP")
    add("--disk", dest="disks", action="append", default=[], metavar="FILE", help="where a disk goes that is sent too")
    add("--name", metavar="NAME", help="what `hv top` calls the machine here")
    add("--console", metavar="WHERE", default="stdio", help="as of `hv run` (default stdio)")
    add("--wait", type=float, metavar="SECONDS", help="how long to wait for a source (default: for ever)")
    add("--timeout", type=float, metavar="SECONDS", help="end the guest after this time, with status 124")


def run(options: argparse.Namespace) -> int:
    """Send or receive a machine, or say where it is."""
    return {"send": _send, "receive": _receive, "settle": _settle}[options.action](options)


def _tls(text: str | None) -> Tls | None:
    from hypervisor.migration.wire import Tls

    if text is None:
        return None
    files = text.split(",")
    if len(files) != len(Tls._fields):
        raise ConfigError(f"--tls {text!r}", hint="it is AUTHORITY,CERTIFICATE,KEY: three PEM files")
    return Tls(*files)


def _send(options: argparse.Namespace) -> int:
    import json
    import os

    from hypervisor.cli.saving import wait_for

    tls = _tls(options.tls)
    what: dict[str, Any] = {
        "do": "migrate",
        "to": _absolute(options.to),
        "downtime": options.downtime / 1e3,
        "copy_disks": options.copy_disks,
        "postcopy": options.postcopy,
    }
    if tls is not None:
        what["tls"] = [os.path.abspath(path) for path in tls]

    def show(told: dict[str, Any]) -> str:
        if "round" not in told:
            return "connecting"
        return f"round {told['round']}: {told['left'] / 1e6:.0f} MB left, {told['rate'] / 1e6:.0f} MB/s"

    result = wait_for(options.machine, what, show)
    if options.json:
        print(json.dumps(result))
    else:
        late = f"; {result['late']} pages followed, {result['asked']} of them waited for" if result["late"] else ""
        print(
            f"moved in {result['seconds']:.2f} s: {result['sent'] / 1e6:.0f} MB in {result['rounds']} rounds;"
            f" it stood still for {result['downtime'] * 1e3:.0f} ms{late}"
        )
    return 0


def _settle(options: argparse.Namespace) -> int:
    from hypervisor.profile.live_client import request

    request(options.machine, {"do": "settle", "here": options.here})
    return 0


def _absolute(address: str) -> str:
    """Return an address that means the same in another process's working directory."""
    import os

    scheme, _, path = address.partition(":")
    return f"unix:{os.path.abspath(path)}" if scheme == "unix" and path else address


def _receive(options: argparse.Namespace) -> int:
    from hypervisor.migration.target import receive
    from hypervisor.migration.wire import Listener

    settings = default_settings() | {"console": options.console, "name": options.name, "timeout": options.timeout}
    listener = Listener(options.at, tls=_tls(options.tls))
    if listener.address != options.at:
        print(f"hv: waiting at {listener.address}", file=sys.stderr, flush=True)

    def make() -> Machine:
        until = None if options.wait is None else time.monotonic() + options.wait
        try:
            wire = listener.accept(None if until is None else max(until - time.monotonic(), 0.001))
            return receive(wire, disks=options.disks, accept=listener.accept)
        except TimeoutError:
            raise HostError(f"no source came in {options.wait:g} s") from None
        finally:
            listener.close()

    return serve(make, settings)

"""The command line: options, help, exit statuses."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from emulated_host import bochs
from emulated_host.errors import HostCannotError, UsageError, call, find_tool, say
from emulated_host.image import ready_image
from emulated_host.machine import Machine, Size, command_line
from emulated_host.payload import CHECKOUT, lay_out, make_payload, parse_with
from emulated_host.recipe import cache_folder, recipe_for, user_cache
from emulated_host.session import Command, Session

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout that this program belongs to."""

USAGE_STATUS: Final = 2
HOST_STATUS: Final = 3
DEFAULT_SIZE: Final = Size()
MIN_MEMORY_MIB: Final = 512
"""Kernel, Python and the overlay need about this much."""

DESCRIPTION: Final = """\
Run COMMAND on an emulated host with real hardware virtualization: the distribution's own kernel with its own
kvm_amd, under QEMU, which emulates AMD-V in software. It works on any x86-64 Debian or Ubuntu machine, as root or
not, in a container, without any /dev/kvm. It is about twenty times slower than the machine it runs on.

COMMAND runs as root in /checkout, a writable copy of this checkout; what it changes is lost unless it is put in
/out (see --out). `hv`, `python3` with the project's requirements, and busybox's tools are there. Its output and
exit status are yours; so is its input, a terminal too. No network leaves the emulated host.
"""

EPILOG: Final = """\
examples:
  scripts/emulated-host hv check
  scripts/emulated-host -- python3 -m pytest -q -p no:cacheprovider tests/guest
  scripts/emulated-host --memory 6144 --with ~/.cache/trapvisor/kernels -- hv run debian --ram 4096
  scripts/emulated-host --out results -- sh -c 'hv check --json > /out/check.json'
  scripts/emulated-host --vt-x -- hv check
  scripts/emulated-host --shell

in a terminal:
  Keys go inside, Ctrl-C too. Ctrl-] three times within a second ends the emulated host.

Intel:
  With --vt-x the host is an Intel CPU with VT-x, under Bochs, and has the distribution's kvm_intel: one CPU, 1 GiB,
  no input, the checkout, Python with what hv needs, busybox, and what --with brings. It is five times slower
  still, but boots in a quarter of a minute. COMMAND is over when all its processes have closed their output.
  It needs Debian's bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso (scripts/setup vtx).
  --memory, --cpus, --silence, --out and --shell do not go with it.

exit status:
  COMMAND's own; 126, 127 it cannot be run, is not there; 128+N signal N ended it, or this program
  2    wrong usage
  3    this machine lacks something (the message names the Debian package), or the emulated host failed
  124  --timeout or --silence passed

cache:
  The root image is built once, in about a minute, and kept in $XDG_CACHE_HOME/trapvisor/emulated-host
  (~/.cache/... by default), about 500 MB, until the project's requirements change. It may be removed at any time.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emulated-host",
        usage="scripts/emulated-host [options] [--] COMMAND...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--memory",
        type=int,
        metavar="MIB",
        help="memory in MiB (default 4096; a guest's comes out of it)",
    )
    add("--cpus", type=int, metavar="N", help="CPUs (default 2)")
    add("--vt-x", dest="vt_x", action="store_true", help="emulate an Intel host, with Bochs; see below")
    add("--timeout", type=float, metavar="SECONDS", help="end it after so long, boot included, with status 124")
    add("--silence", type=float, metavar="SECONDS",
        help="end it once COMMAND has printed nothing for so long, with status 124")  # fmt: skip
    add("--with", dest="extra", action="append", default=[], metavar="SRC[=DST]",
        help="bring a file or folder, to the same path inside or to DST (repeatable)")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="set or pass a variable (repeatable)")
    add("--out", type=Path, metavar="DIR", help="bring the content of /out back to DIR when COMMAND is over")
    add("--shell", action="store_true", help="an interactive shell inside; after COMMAND, if there is one")
    add("--build-only", action="store_true", help="build the root image if it is not there yet, and run nothing")
    add("--rebuild", action="store_true", help="build the root image anew, with today's packages")
    add("--verbose", action="store_true", help="show the emulated kernel's log and how long each step took")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit status."""
    _open_standard_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except UsageError as error:
        say(str(error))
        return USAGE_STATUS
    except HostCannotError as error:
        say(str(error))
        if error.log:
            print(error.log, file=sys.stderr)
        return HOST_STATUS
    except OSError as error:  # a full disk, mostly
        say(f"{error.filename or 'this run'}: {error.strerror}")
        return HOST_STATUS
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _open_standard_streams() -> None:
    """Give closed standard streams /dev/null, lest a socket of ours gets their number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    """Unwind, so that children and temporary files go."""
    sys.exit(128 + number)


def _run(options: argparse.Namespace) -> int:
    words: list[str] = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.shell:
        words = ["sh", "-c", '"$@"; exec sh -i', "sh", *words] if words else ["sh", "-i"]
    if not words and not options.build_only:
        raise UsageError("which command? `scripts/emulated-host --help` has examples")
    _check(options)
    extra = [parse_with(text) for text in options.extra]
    environment = _environment(options.env)
    if options.vt_x:
        return _run_on_vt_x(options, words, extra, environment)
    find_tool("qemu-system-x86_64")
    find_tool("mke2fs")
    image = ready_image(recipe_for(ROOT), ROOT, rebuild=options.rebuild)
    if options.build_only:
        return 0
    with _work_folder() as work:
        payload = make_payload(image, ROOT, extra, work)
        archive = work / "out.tar" if options.out is not None else None
        size = Size(options.memory, options.cpus)
        command = Command(
            words, environment, f"/{CHECKOUT}", archive, options.timeout, options.silence, verbose=options.verbose
        )
        with Machine(partial(command_line, image, payload, size, verbose=options.verbose)) as machine:
            status = Session(machine, command).run()
        if archive is not None:
            _bring_back(archive, options.out)
    return status


def _check(options: argparse.Namespace) -> None:
    """Fill in what was not given, and refuse what cannot be."""
    if options.vt_x:
        _refuse_with_vt_x(options)
    options.memory = DEFAULT_SIZE.memory_mib if options.memory is None else options.memory
    options.cpus = DEFAULT_SIZE.cpus if options.cpus is None else options.cpus
    if options.memory < MIN_MEMORY_MIB:
        raise UsageError(f"--memory {options.memory}: it needs {MIN_MEMORY_MIB} MiB at least")
    if options.cpus < 1:
        raise UsageError(f"--cpus {options.cpus}: it needs one at least")
    for name in ("timeout", "silence"):
        seconds = getattr(options, name)
        if seconds is not None and seconds <= 0:
            raise UsageError(f"--{name} {seconds:g}: it must be more than 0 seconds")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: not a folder")


def _refuse_with_vt_x(options: argparse.Namespace) -> None:
    """Refuse the options that the emulated VT-x host does not have."""
    for name in ("memory", "cpus", "silence", "out", "shell"):
        if getattr(options, name) not in (None, False):
            raise UsageError(f"--{name} does not go with --vt-x")


def _run_on_vt_x(
    options: argparse.Namespace, words: list[str], extra: list[tuple[Path, str]], environment: dict[str, str]
) -> int:
    bochs.check_installed()
    image = ready_image(recipe_for(ROOT), ROOT, rebuild=options.rebuild)
    bochs.base_archive(image)
    if options.build_only:
        return 0
    with _work_folder() as work:
        layout = lay_out(image, ROOT, extra, work, timeless=True)
        secret = bochs.new_secret()
        iso = bochs.make_iso(image, layout, bochs.script_for(words, environment, f"/{CHECKOUT}"), secret, work)
        return bochs.run(iso, secret, work, options.timeout, verbose=options.verbose)


def _environment(given: Sequence[str]) -> dict[str, str]:
    """Return the command's environment."""
    environment = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": f"/{CHECKOUT}",
        "TERM": os.environ.get("TERM", "dumb"),
        "USER": "root",
        "XDG_CACHE_HOME": str(user_cache()),
    }
    for text in given:
        name, separator, value = text.partition("=")
        if not name:
            raise UsageError(f"--env {text}: a name is missing")
        if separator:
            environment[name] = value
        elif name in os.environ:
            environment[name] = os.environ[name]
    return environment


@contextmanager
def _work_folder() -> Iterator[Path]:
    """Make a folder of this run's own, locked; remove it, and those that killed runs left behind."""
    runs = cache_folder() / "runs"
    runs.mkdir(exist_ok=True)
    for folder in runs.iterdir():
        _remove_stale(folder)
    work = Path(tempfile.mkdtemp(dir=runs))
    lock = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _remove_stale(folder: Path) -> None:
    """Remove a run's folder unless its run lives, or is so young that it may not hold its lock yet."""
    try:
        if time.time() - folder.stat().st_mtime < 60:
            return
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # its run has just removed it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # it lives
    finally:
        os.close(lock)


def _bring_back(archive: Path, target: Path) -> None:
    """Unpack what came from /out. GNU tar lets no name and no link lead out of the target."""
    if archive.stat().st_size:  # nothing came when the command was ended from outside
        target.mkdir(parents=True, exist_ok=True)
        call([find_tool("tar"), "-x", "--no-same-owner", "-C", target, "-f", archive])

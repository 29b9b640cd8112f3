"""The `hv` command: argv to a verb, errors to a line on stderr and an exit status."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hypervisor.errors import HostError, VmmError

if TYPE_CHECKING:
    import argparse

VERBS: Final = ("run", "test", "check", "kernel", "initramfs", "profile", "snapshot", "migrate", "top")
FAULT: Final = 5
DESCRIPTION: Final = "A virtual machine monitor on KVM: runs unmodified kernels, answers their exits in Python."
EPILOG: Final = """\
examples:
  hv check                      what this host can run, and what is missing
  hv kernel get debian          fetch the distribution's stock kernel
  hv run debian                 boot it to a shell on this terminal (Ctrl-A x ends)
  hv run vmlinux --initrd root.cpio --append "console=ttyS0 quiet" --cpus 4 --ram 1024

exit status of `hv run`: 0 power-off or reset, 2 bad usage or image, 3 the host cannot, 4 the guest died, 5 a fault of
hv, 124 timeout, 128+N signal N, else the guest's own.
"""


def print_error(error: BaseException) -> None:
    """Print an error with its chain of causes on one line, and its hint on the next."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        text = str(link) or type(link).__name__
        known = getattr(link, "strerror", None) or text  # an OSError's own text repeats number and path
        if not any(known in part for part in parts):
            parts.append(known if parts else text)
        link = link.__cause__
    print(f"hv: {': '.join(parts)}", file=sys.stderr)
    hint = getattr(error, "hint", None)
    if hint:
        print(f"    {hint}", file=sys.stderr)


def command() -> NoReturn:
    """Be the process `hv`: run `main` and end.

    A whole run of a small guest takes as long as starting Python twice. So the garbage collector, which imports only
    keep busy, waits until there is a guest, and the interpreter is not taken apart at the end: what matters is closed
    and flushed by then.
    """
    gc.disable()
    try:
        status = main()
    except SystemExit as end:  # argparse ends so, its message printed
        status = end.code if isinstance(end.code, int) else FAULT
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


def _open_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed, or the next file opened, such as /dev/kvm, takes its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one


def _terminal_width() -> int:
    """Return how wide help may be, in columns."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size(1).columns
    except (OSError, ValueError):
        columns = 0
    return (columns or 80) - 2


def _load(verb: str) -> Any:
    """Import the module of a verb."""
    try:
        return import_module(f"hypervisor.cli.{verb}")
    except ModuleNotFoundError as error:
        if error.name != "hypervisor.kvm._kvm":
            raise
        print_error(HostError("the binding to KVM has not been built", hint="scripts/setup builds it"))
        raise SystemExit(HostError.status) from None


def _obey(options: argparse.Namespace) -> int:
    """Do what the verb does, and turn what goes wrong into a line on stderr and an exit status."""
    try:
        status: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except VmmError as error:
        print_error(error)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader of our output is gone: nothing is left to say
        return 141
    except OSError as error:  # the host's: out of file descriptors, of memory, of threads
        print_error(error)
        return HostError.status
    except Exception:  # noqa: BLE001 - whatever it is, it is ours, and a status of its own tells scripts so
        import traceback

        traceback.print_exc()
        print("hv: this is a fault of hv's own, or of a device that was added to it", file=sys.stderr)
        return FAULT
    return status


def main(argv: list[str] | None = None) -> int:
    """Run `hv` with these arguments (by default the process's own) and return its exit status."""
    _open_standard_streams()
    arguments = sys.argv[1:] if argv is None else argv
    import argparse

    # argparse makes a formatter for every argument; without a width each would ask shutil, which takes 4 ms to import
    width = _terminal_width()

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, width=width)

    # only the verb that is asked for is imported; all of them are for --help and for a wrong word
    wanted = [arguments[0]] if arguments and arguments[0] in VERBS else list(VERBS)
    parser = argparse.ArgumentParser(prog="hv", description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--version", action="store_true", help="print the version and end")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", prog="hv")
    for verb in wanted:
        module = _load(verb)
        sub = verbs.add_parser(
            verb,
            help=module.SUMMARY,
            description=getattr(module, "DESCRIPTION", module.SUMMARY),
            epilog=getattr(module, "EPILOG", None),
            formatter_class=formatter,
        )
        module.configure(sub)
        sub.set_defaults(run=module.run)
    # argparse would take what follows "--" for more of the verb's own words
    end = arguments.index("--") if arguments[:1] == ["test"] and "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    options.rest = arguments[end + 1 :]
    if options.version:
        from hypervisor import __version__

        print(f"hv {__version__}")
        return 0
    if options.verb is None:
        parser.print_help()
        return 2
    return _obey(options)

"""`hv test`: pytest with guests of one kernel, where this host can run them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from hypervisor.errors import ConfigError, HostError
from hypervisor.host import Kind, quick_kind

if TYPE_CHECKING:
    import argparse

SUMMARY: Final = "run pytest, its guests with this kernel"
DESCRIPTION: Final = """\
Run pytest with KERNEL as the kernel of every test that names none: a file, or a name of `hv kernel list`. What follows
-- is pytest's own. First it is seen to that this host can run the guests."""
EPILOG: Final = """\
usage with pytest's own options: hv test KERNEL [options] -- PYTEST-ARGS

examples:
  hv test debian
  hv test ./arch/x86/boot/bzImage -- -x -k network tests/guests
  hv test tiny -- -n 4 --junitxml=report.xml
  hv test --emulated debian -- tests/guests      on a host without KVM, or with a software one

A test takes a guest by the fixture `machine`:
  def test_release(machine):
      assert machine.run("uname -r").stdout.startswith("6.")

exit status: pytest's own (0 all passed, 1 some failed, 2 interrupted, 3 internal error, 4 usage, 5 no tests); and
3 when this host cannot run the guests.
"""
NO_LINUX: Final = "this host's KVM is a software one (kvm_pvm): no Linux kernel gets through, and tests need one"
ELSEWHERE: Final = (
    "run them in the emulated host: hv test --emulated KERNEL -- PYTEST-ARGS; or where the CPU has AMD-V or VT-x"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv test`."""
    add = parser.add_argument
    add("kernel", metavar="KERNEL", help="kernel image, or the name of a kernel of `hv kernel list`")
    add("--artifacts", metavar="DIR", help="where a failed test's files go (default .guest-artifacts)")
    add("--boot-timeout", type=float, metavar="SECONDS", help="how long a guest may take until it is ready")
    add(
        "--emulated", action="store_true", help="run in the emulated host (scripts/emulated-host), some 20 times slower"
    )
    add("--force", action="store_true", help="do not look at the host first")


def run(options: argparse.Namespace) -> int:
    """Become pytest; returns only when it cannot.

    Raises:
        ConfigError: there is no such kernel, or no pytest.
        HostError: the guests cannot run here.
    """
    from importlib.util import find_spec

    if options.emulated:
        _become(_emulated(options))
    if find_spec("pytest") is None:
        raise ConfigError("pytest is not installed here", hint=f"{sys.executable} -m pip install pytest")
    if not os.path.isfile(options.kernel):
        from hypervisor import kernels

        kernels.check_name(options.kernel)  # the user's mistakes before the host's
    if not options.force:
        check_host(options.kernel)
    _get_kernel(options.kernel)
    _become([sys.executable, *pytest_command(options)])


def pytest_command(options: argparse.Namespace) -> list[str]:
    """Return the arguments of Python that run pytest."""
    kernel = os.path.abspath(options.kernel) if os.path.isfile(options.kernel) else options.kernel
    command = ["-m", "pytest", "-p", _plugin(), "--guest-kernel", kernel]
    if options.artifacts is not None:
        command += ["--guest-artifacts", os.path.abspath(options.artifacts)]
    if options.boot_timeout is not None:
        command += ["--guest-boot-timeout", str(options.boot_timeout)]
    return [*command, *options.rest]


def _plugin() -> str:
    """Return what pytest knows the plugin by: as a package, or from a checkout that is not installed."""
    from importlib.metadata import entry_points

    return "trapvisor" if entry_points(group="pytest11", name="trapvisor") else "hypervisor.testing.plugin"


def check_host(kernel: str) -> None:
    """Raise HostError, saying what to do, unless this host can run guests with this kernel."""
    kind = quick_kind()
    if kind is Kind.SOFTWARE:
        from hypervisor.testing.spec import GuestSpec

        if GuestSpec(kernel).is_linux:
            raise HostError(NO_LINUX, hint=ELSEWHERE)
    if kind is not Kind.NONE and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    from hypervisor.host_report import inspect

    report = inspect()
    if report.can_run_guest:
        return
    remedies = [f"{remedy.problem}: {remedy.action}" for remedy in report.remedies]
    raise HostError(
        f"no guest can run on this host: {report.problem or report.sentence}",
        hint="\n    ".join([*remedies, ELSEWHERE]),
    )


def _get_kernel(kernel: str) -> None:
    """Fetch or build a kernel of the catalogue before pytest's own output begins."""
    if os.path.isfile(kernel):
        return
    from hypervisor import kernels
    from hypervisor.kernels.progress import for_stream

    kernels.ensure(kernel, progress=for_stream(sys.stderr))


def _emulated(options: argparse.Namespace) -> list[str]:
    """Return the command that runs these tests in the emulated host, with this folder and the kernels brought in."""
    import shlex
    from pathlib import Path

    from hypervisor.kernels import cache

    checkout = Path(__file__).resolve().parents[2]
    program = checkout / "scripts" / "emulated-host"
    if not program.is_file():
        raise HostError(
            "the emulated host comes with the project's checkout, and this is an installed package",
            hint="run scripts/emulated-host of a checkout",
        )
    _get_kernel(options.kernel)
    here = Path.cwd()
    command = [str(program), "--env", f"XDG_CACHE_HOME={cache.root().parent}"]
    command += ["--out", options.artifacts or ".guest-artifacts"]
    for folder in ("kernels", "initramfs", "folders"):
        if (cache.root() / folder).is_dir():
            command += ["--with", str(cache.root() / folder)]
    kernel = options.kernel
    if os.path.isfile(kernel):
        kernel = os.path.abspath(kernel)
        command += ["--with", kernel]
    where = "/checkout" if here == checkout else str(here)
    if here.is_relative_to(checkout):
        where = str(Path("/checkout") / here.relative_to(checkout))
    else:
        command += ["--with", str(here)]
    inside = ["python3", "-m", "hypervisor", "test", "--artifacts", "/out"]
    if options.boot_timeout is not None:
        inside += ["--boot-timeout", str(options.boot_timeout)]
    inside += [kernel, "--", "-p", "no:cacheprovider", *options.rest]
    script = f"cd {shlex.quote(where)} && PYTHONPATH=/checkout exec {shlex.join(inside)}"
    return [*command, "--", "sh", "-c", script]


def _become(command: list[str]) -> NoReturn:
    """Be another program from here on: its output, its signals, its exit status."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted

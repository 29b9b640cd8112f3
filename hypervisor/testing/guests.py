"""What the plugin keeps while pytest runs, once a test has asked for a guest."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any, Final

import pytest

from hypervisor.errors import ConfigError
from hypervisor.testing.failures import GuestFailed
from hypervisor.testing.interrupt import Interrupter
from hypervisor.testing.pool import Pool
from hypervisor.testing.report import Report, folder_of
from hypervisor.testing.spec import FAIL_ON, GuestSpec, merge
from hypervisor.testing.watch import Watcher

if TYPE_CHECKING:
    from hypervisor.testing.guest import GuestMachine
    from hypervisor.testing.network import GuestNetwork

__all__ = ["GuestSession", "GuestsOfTest", "kernel_for"]

SITE: Final = "site-packages"
SCRATCH_MIB: Final = 64
"""The disk that a test gets which asks for `guest_disk` and names none."""


def setting(config: pytest.Config, name: str) -> str:
    """Return an option of the command line, or else of the ini file; "" when neither has it."""
    value = config.getoption(name, default=None)
    return str(config.getini(name) if value is None else value)


def kernel_for(item: pytest.Item) -> str:
    """Return the kernel that a test's marks, the command line or the ini file name."""
    for mark in item.iter_markers("guest"):
        kernel = mark.kwargs.get("kernel", mark.args[0] if mark.args else None)
        if kernel is not None:
            return str(os.fspath(kernel))
    return setting(item.config, "guest_kernel") or "debian"


class GuestsOfTest:
    """The guests of one test.

    Attributes:
        guests: in the order in which they were asked for.
        is_reported: whether their report has been written.
    """

    def __init__(self) -> None:
        """Have none yet."""
        self.guests: list[GuestMachine] = []
        self.is_reported = False

    @staticmethod
    def trim(error: Exception, root: str) -> None:
        """Take the frames below the test's own from a guest's failure: where in a wait it came says nothing."""
        own = trace = error.__traceback__ if isinstance(error, GuestFailed) else None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith(root) and SITE not in trace.tb_frame.f_code.co_filename:
                own = trace
            trace = trace.tb_next
        if own is not None:
            own.tb_next = None

    def check(self, *, last: bool = False) -> None:
        """Raise what is wrong with a guest, unless the test has expected it."""
        __tracebackhide__ = True
        for guest in self.guests:
            if last:
                guest.look(last=True)
            if guest.failure is not None and not guest.is_forgiven:
                raise guest.failure


class GuestSession:
    """Guests for the tests of one process.

    Attributes:
        interrupter: breaks into tests.
        pool: the machines.
    """

    def __init__(self, config: pytest.Config) -> None:
        """Read the options; nothing is booted yet."""
        self._config = config
        shared = getattr(config, "workerinput", {}).get("guest_folder")
        self.interrupter = Interrupter()
        self._watcher = Watcher()
        folder = shared or tempfile.mkdtemp(prefix="hv-guests-")
        self.pool = Pool(folder, self.interrupter, self._watcher, is_shared=shared is not None)
        self._network: Any = None

    # --- guests -------------------------------------------------------------------------------------------------------

    def spec(self, item: pytest.Item, kernel: str, **more: Any) -> GuestSpec:
        """Return the guest that a test's marks describe; `more` wins over them.

        Raises:
            pytest.UsageError: the marks are wrong.
        """
        marks = [mark.kwargs for mark in item.iter_markers("guest")]
        wants_disk = "guest_disk" in getattr(item, "fixturenames", ())
        if wants_disk and not any(mark.get("disks") for mark in (more, *marks)):
            more["disks"] = [self._scratch()]
        try:
            return merge([more, *marks], kernel, self._defaults())
        except (ConfigError, ValueError, TypeError) as error:
            hint = getattr(error, "hint", None)
            raise pytest.UsageError(f"{item.nodeid}: {error}" + (f" ({hint})" if hint else "")) from error

    def _defaults(self) -> dict[str, Any]:
        patterns = [line for line in self._config.getini("guest_fail_on") if line]
        return {
            "boot_timeout": setting(self._config, "guest_boot_timeout"),
            "hang_seconds": setting(self._config, "guest_hang_seconds"),
            "fail_on": tuple(patterns) or FAIL_ON,
        }

    def _scratch(self) -> str:
        path = os.path.join(self.pool.folder, f"scratch-{SCRATCH_MIB}.img")
        with open(path, "ab") as file:
            file.truncate(SCRATCH_MIB << 20)
        return path

    def acquire(self, guests: GuestsOfTest, spec: GuestSpec, name: str = "guest") -> GuestMachine:
        """Return a guest that is ready."""
        __tracebackhide__ = True

        def made(guest: GuestMachine) -> None:
            guest.on_failure = self._failed
            guests.guests.append(guest)

        try:
            return self.pool.acquire(spec, name, made)
        except GuestFailed as error:  # how it was booted says nothing
            raise error.with_traceback(None) from None

    def _failed(self, guest: GuestMachine, failure: GuestFailed) -> None:
        """Tell the test, whatever it does just now; on the watcher's thread."""
        self.interrupter.interrupt(failure, unless=lambda: guest.is_forgiven)

    def release(self, guests: GuestsOfTest) -> None:
        """Take the guests of a test back."""
        while guests.guests:
            self.pool.release(guests.guests.pop())

    @property
    def network(self) -> Any:
        """The network of this process, on which guests meet."""
        if self._network is None:
            from hypervisor import Network  # noqa: PLC0415 - few tests have one

            self._network = Network("guests")
        return self._network

    def make_network(self, item: pytest.Item, guests: GuestsOfTest, kernel: str) -> GuestNetwork:
        """Return the network for one test, without faults."""
        from hypervisor.testing.network import GuestNetwork  # noqa: PLC0415 - as above

        def start(name: str, settings: dict[str, Any]) -> GuestMachine:
            wanted = settings.pop("kernel", kernel)
            return self.acquire(guests, self.spec(item, os.fspath(wanted), **settings), name)

        return GuestNetwork(self.network, start)

    # --- reports ------------------------------------------------------------------------------------------------------

    def report(self, item: pytest.Item, report: pytest.TestReport, guests: GuestsOfTest) -> None:
        """Add what is known of its guests to the report of a test that failed, and keep their files."""
        guests.is_reported = True
        root = setting(self._config, "guest_artifacts")
        root = os.path.join(str(self._config.rootpath), root)
        keep = bool(self._config.getoption("guest_keep_snapshot"))
        for number, guest in enumerate(guests.guests):
            folder = folder_of(root, item.nodeid, guest.name, anew=number == 0)
            told = Report(guest, folder, keep_snapshot=keep)
            for title, text in told.sections:
                self._add(report, title, text)
            properties = [("guest_files", folder)] + ([("guest_cause", told.cause)] if told.cause else [])
            item.user_properties += properties
            report.user_properties += properties

    @staticmethod
    def _add(report: pytest.TestReport, title: str, text: str) -> None:
        """Put a section behind the traceback, where JUnit's file has it, too."""
        add = getattr(report.longrepr, "addsection", None)
        if add is not None:
            add(title, text)
        else:
            report.sections.append((title, text))

    def close(self) -> None:
        """End everything."""
        self._watcher.close()
        self.pool.close()
        self.interrupter.close()

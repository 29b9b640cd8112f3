"""The pytest plugin: fixtures for guests, and reports that say what became of them.

pytest loads it in every run where this package is installed. So it imports nothing until a test asks for a guest, and
does nothing for tests that do not.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from hypervisor.testing.faults import GuestDisk
    from hypervisor.testing.guest import GuestMachine
    from hypervisor.testing.guests import GuestSession, GuestsOfTest
    from hypervisor.testing.network import GuestNetwork

MARK: Final = """\
guest(kernel=, cpus=, ram_mib=, disks=, initrd=, append=, nets=, share=, setup=, agent=, ready=, fresh=, \
boot_timeout=, hang_seconds=, fail_on=): the machine that the test gets; whatever else MachineConfig takes goes, too"""
SESSION: Final = pytest.StashKey["GuestSession"]()
GUESTS: Final = pytest.StashKey["GuestsOfTest"]()
SHARED: Final = pytest.StashKey[str]()
BOOT_SECONDS: Final = "60"
HANG_SECONDS: Final = "30"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options and their ini keys."""
    group = parser.getgroup("guest", "guests (trapvisor)")
    add = group.addoption
    add("--guest-kernel", metavar="KERNEL", help="kernel of tests that name none: a file, or a name")
    add("--guest-artifacts", metavar="DIR", help="where a failed test's files go (default .guest-artifacts)")
    add("--guest-boot-timeout", metavar="SECONDS", type=float, help="how long a guest may take until it is ready")
    add("--guest-hang-seconds", metavar="SECONDS", type=float, help="without a sign of progress it hangs; 0: never")
    add("--guest-keep-snapshot", action="store_true", help="save the machine of a failed test beside its files")
    ini = parser.addini
    ini("guest_kernel", "kernel of tests that name none (default debian)", default="")
    ini("guest_artifacts", "folder for what is kept of failed tests, from rootdir", default=".guest-artifacts")
    ini("guest_boot_timeout", "seconds until a guest must be ready", default=BOOT_SECONDS)
    ini("guest_hang_seconds", "seconds without progress after which a guest hangs; 0: never", default=HANG_SECONDS)
    ini("guest_fail_on", "regular expressions for lines of a console that fail a test", type="linelist", default=[])


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line("markers", MARK)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist the folder that all of them share; whoever first needs it makes it."""
    stash = node.config.stash
    if SHARED not in stash:
        import tempfile
        import uuid

        stash[SHARED] = os.path.join(tempfile.gettempdir(), f"hv-guests-{uuid.uuid4().hex}")
    node.workerinput["guest_folder"] = stash[SHARED]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give everything back."""
    session = config.stash.get(SESSION, None)
    if session is not None:
        session.close()
    shared = config.stash.get(SHARED, None)
    if shared is not None and os.path.isdir(shared):
        import shutil

        shutil.rmtree(shared, ignore_errors=True)


def _session(config: pytest.Config) -> GuestSession:
    found = config.stash.get(SESSION, None)
    if found is None:
        from hypervisor.testing.guests import GuestSession

        found = config.stash[SESSION] = GuestSession(config)
    return found


def _guests(request: pytest.FixtureRequest) -> GuestsOfTest:
    """Return the guests of this test, to be given back when it is over."""
    stash: pytest.Stash = request.node.stash
    found = stash.get(GUESTS, None)
    if found is None:
        from hypervisor.testing.guests import GuestsOfTest

        found = stash[GUESTS] = GuestsOfTest()
    session = _session(request.config)
    request.addfinalizer(lambda: session.release(found))
    return found


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def guest_kernel(request: pytest.FixtureRequest) -> str:
    """The kernel of this test's guests; parametrize it to run a test with several."""
    from hypervisor.testing.guests import kernel_for

    return kernel_for(request.node)


@pytest.fixture
def machine(request: pytest.FixtureRequest, guest_kernel: str) -> GuestMachine:
    """A guest that is ready, as the test's `guest` marks describe it, in the state in which every test finds it."""
    guests = _guests(request)
    session = _session(request.config)
    return session.acquire(guests, session.spec(request.node, os.fspath(guest_kernel)))


@pytest.fixture
def guest_disk(machine: GuestMachine) -> GuestDisk:
    """The first disk of `machine`, to be broken; an empty one of 64 MiB unless the `guest` mark names disks."""
    from hypervisor.testing.faults import GuestDisk

    return GuestDisk(machine, 0)


@pytest.fixture
def guest_network(request: pytest.FixtureRequest, guest_kernel: str) -> Iterator[GuestNetwork]:
    """A network for this test: `guest_network.machine()` starts a guest; `drop`, `delay`, `partition` break it."""
    guests = _guests(request)
    network = _session(request.config).make_network(request.node, guests, os.fspath(guest_kernel))
    yield network
    network.heal()


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail the test as soon as one of its guests does."""
    __tracebackhide__ = True
    guests = item.stash.get(GUESTS, None)
    if guests is None:
        return (yield)
    guests.check()
    try:
        with _session(item.config).interrupter.window():
            result = yield
    except Exception as error:
        guests.trim(error, str(item.config.rootpath))
        raise
    guests.check(last=True)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell of the guests of a test that failed."""
    report = yield
    guests = item.stash.get(GUESTS, None)
    if guests is not None and report.failed and not guests.is_reported:
        _session(item.config).report(item, report, guests)
    return report

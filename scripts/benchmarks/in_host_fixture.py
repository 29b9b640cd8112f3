"""Times the `machine` fixture of the pytest plugin. Runs inside the emulated host.

Arguments: KERNEL RESETS BOOTS. Prints JSON: "resets" and "boots", the seconds of each fixture's setup, from its begin
until the guest's agent answers; and "first", that of the one boot that the resets go back to.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.parametrize("number", range({resets} + 1))
def test_reset(machine, number):
    assert machine.run("true").returncode == 0

@pytest.mark.guest(fresh=True)
@pytest.mark.parametrize("number", range({boots}))
def test_boot(machine, number):
    assert machine.run("true").returncode == 0
"""


class Times:
    """Keeps how long each setup took."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self.setups: dict[str, list[float]] = {"test_reset": [], "test_boot": []}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a report."""
        if report.when == "setup":
            self.setups[report.nodeid.rpartition("::")[2].partition("[")[0]].append(report.duration)
        if report.failed:
            self.failed.append(f"{report.nodeid}: {report.longreprtext}")


def main() -> None:
    """Run the tests."""
    kernel, resets, boots = sys.argv[1:]
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "test_times.py")
        path.write_text(TESTS.format(resets=resets, boots=boots))
        # the emulated host has the checkout, and no package that brings its plugin
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "hypervisor.testing.plugin",
            f"--guest-kernel={kernel}",
            f"--rootdir={folder}",
            str(path),
        ]
        stdout, sys.stdout = sys.stdout, sys.stderr
        pytest.main(options, plugins=[times])
        sys.stdout = stdout
    if times.failed:
        sys.exit("\n".join(times.failed))
    first, *others = times.setups["test_reset"]
    print(json.dumps({"first": first, "resets": others, "boots": times.setups["test_boot"]}))


if __name__ == "__main__":
    main()

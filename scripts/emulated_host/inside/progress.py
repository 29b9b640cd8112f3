"""A pytest plugin: says on stderr how far the tests are, and leaves out those that a file names.

A line for each test that begins, passes or fails: `@@ WORD NODEID`. What pytest says of them goes to stdout.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PREFIX = "@@ "
_stderr = os.dup(2)  # as it is before pytest captures it


def _say(word: str, nodeid: str) -> None:
    os.write(_stderr, f"{PREFIX}{word} {nodeid}\n".encode())


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--without", metavar="FILE", help="leave out the tests whose ids are lines of FILE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has passed already."""
    path = config.getoption("without")
    if path:
        out = set(Path(path).read_text(encoding="utf-8").splitlines())
        items[:] = [item for item in items if item.nodeid not in out]


class _Progress:
    def __init__(self) -> None:
        self._failed = False

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._failed = False
        _say("begins", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        _say("failed" if self._failed else "passed", nodeid)


def pytest_configure(config: pytest.Config) -> None:
    """Look on."""
    config.pluginmanager.register(_Progress())

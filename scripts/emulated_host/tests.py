"""Tests in the emulated host: run again, in a new host, are those that failed and those that had no say."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROGRAM: Final = Path(__file__).resolve().parents[1] / "emulated-host"
PLUGIN: Final = "scripts.emulated_host.inside.progress"
PREFIX: Final = "@@ "
"""What the plugin's lines begin with."""
LEFT_OUT: Final = "/tests-that-passed"
"""Where the plugin finds what to leave out."""
MOST_FAILURES: Final = 8
HOSTS: Final = 4
SECONDS_A_TEST: Final = 600
"""A test that takes longer stands still: pytest-timeout ends pytest, with the stacks of all threads."""
SILENCE: Final = SECONDS_A_TEST + 120
"""A host that says nothing for so long is dead."""
NO_TESTS_COLLECTED: Final = 5

DESCRIPTION: Final = f"""\
Run pytest in the emulated host. Tests that fail are run once more, in a new host, and have to pass there; so are
those that had not run when the host died or stood still, or when a test stood still for {SECONDS_A_TEST} seconds.

QEMU's TCG is no exact AMD-V: it forgets a guest's interrupt shadow at each VMRUN, may go on with kernel code that
has been patched since, and a nested guest may die of a page that the host moves. So one test in hundreds fails there
that is sound on hardware. A fault of the project's fails twice. More than {MOST_FAILURES} failures are not run again.
"""
EPILOG: Final = """\
examples:
  scripts/emulated-tests tests/guest
  scripts/emulated-tests --memory 6144 --with ~/.cache/trapvisor/kernels -- -x tests/guest/test_state.py
  scripts/emulated-tests --command "hv test tiny --" examples

exit status:
  0  every test has passed, or was skipped
  1  a test failed twice, too many failed, or the hosts died again and again
  2  wrong usage
"""


class Progress:
    """What is known of the tests.

    Attributes:
        passed: the ids of those that passed or were skipped, in the order in which they ran.
        failed: how often each failed; one that ran when its host or pytest ended has failed, too.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self.passed: list[str] = []
        self.failed: dict[str, int] = {}
        self._running = ""

    def take(self, line: str) -> None:
        """Note what the plugin said, without its prefix."""
        word, _, nodeid = line.partition(" ")
        self._running = nodeid if word == "begins" else ""
        if word == "passed":
            self.passed.append(nodeid)
        elif word == "failed":
            self._fail(nodeid)

    def end(self) -> str:
        """Note that pytest is over; return the id of the test that it or its host ended in, if it was in one."""
        running, self._running = self._running, ""
        if running:
            self._fail(running)
        return running

    def _fail(self, nodeid: str) -> None:
        self.failed[nodeid] = self.failed.get(nodeid, 0) + 1


def follow(stream: Iterable[str], progress: Progress) -> None:
    """Read stderr until it ends: the plugin's lines go to `progress`, the others to our own."""
    for line in stream:
        if line.startswith(PREFIX):
            progress.take(line.removeprefix(PREFIX).removesuffix("\n"))
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def run_once(options: argparse.Namespace, progress: Progress) -> int:
    """Run in one host all that has not passed yet; return the status of pytest or of the host."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as passed:
        passed.writelines(f"{nodeid}\n" for nodeid in progress.passed)
        passed.flush()
        extra = [f"--with={path}" for path in (*options.extra, f"{passed.name}={LEFT_OUT}")]
        host = [str(PROGRAM), f"--silence={SILENCE}", f"--memory={options.memory}", f"--cpus={options.cpus}", *extra]
        ours = ["-p", PLUGIN, f"--without={LEFT_OUT}", f"--timeout={SECONDS_A_TEST}", "--timeout-method=thread"]
        command = [*host, "--", *options.command.split(), *ours, *options.arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
            follow(process.stderr or (), progress)
        return process.returncode


def verdict(status: int, before: int, progress: Progress, host: int) -> str | None:
    """Return why no further host is started, "" for success; None: one is.

    Args:
        status: the last host's.
        before: how many tests had passed when it was started.
        progress: what is known now.
        host: its number, from 1.
    """
    twice = [nodeid for nodeid, times in progress.failed.items() if times > 1]
    if status == 0 or (status == NO_TESTS_COLLECTED and before):
        return ""
    if twice:
        return f"failed in two hosts: {' '.join(twice)}"
    if len(progress.failed) > MOST_FAILURES:
        return f"{len(progress.failed)} tests failed, which are too many to be the emulation's fault"
    if host == 1 and not progress.passed and not progress.failed:
        return f"no test has run: status {status}"
    return f"{HOSTS} hosts were not enough" if host == HOSTS else None


def main(argv: Sequence[str]) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="emulated-tests",
        usage="scripts/emulated-tests [options] [--] PYTEST-ARGUMENTS...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--memory", type=int, default=4096, metavar="MIB", help="the host's memory (default 4096)")
    add("--cpus", type=int, default=2, metavar="N", help="its CPUs (default 2)")
    add("--with", dest="extra", action="append", default=[], metavar="SRC[=DST]",
        help="bring a file or folder, as emulated-host does (repeatable)")  # fmt: skip
    add("--command", default="python3 -m pytest", metavar="WORDS", help="what to run in pytest's place")
    add("arguments", nargs=argparse.REMAINDER, metavar="PYTEST-ARGUMENTS", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.arguments = options.arguments[options.arguments[:1] == ["--"] :]
    if not options.arguments:
        parser.error("which tests? `scripts/emulated-tests --help` has examples")
    progress, start = Progress(), time.monotonic()
    for host in range(1, HOSTS + 1):
        before = len(progress.passed)
        status = run_once(options, progress)
        ended_in = progress.end()
        if ended_in:
            _say(f"status {status}, in the middle of {ended_in}")
        why = verdict(status, before, progress, host)
        if why:
            _say(why)
            return 1
        if why == "":
            break
        _say(f"after {time.monotonic() - start:.0f} s: a new host runs what has not passed yet")
    for nodeid in progress.failed:
        _say(f"failed once, passed in a new host: {nodeid}")
    return 0


def _say(text: str) -> None:
    print(f"emulated-tests: {text}", file=sys.stderr, flush=True)

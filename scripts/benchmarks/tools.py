"""What the benchmarks share: settings, scratch files, the C baselines, processes that are timed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.table import CannotRunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
FLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra")


class Settings(NamedTuple):
    """How to measure.

    Attributes:
        quick: fewer and shorter rounds, to see that everything works.
        scratch: a folder for this run's files.
        say: where progress goes.
    """

    quick: bool
    scratch: Path
    say: Callable[[str], None]

    def pick(self, full: int, quick: int) -> int:
        """Return the number for this kind of run."""
        return quick if self.quick else full


def cache() -> Path:
    """Return the folder that is kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "trapvisor" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compiled(source: str, *options: str) -> Path:
    """Compile `source`, a C file beside this one, unless that has been done; return the program."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotRunError("there is no C compiler: install gcc")
    text = (HERE / source).read_bytes()
    key = hashlib.sha256(repr((FLAGS, options)).encode() + text).hexdigest()[:16]
    program = cache() / f"{Path(source).stem}-{key}"
    if not program.exists():
        fresh = program.with_name(f"{program.name}.{os.getpid()}")
        done = subprocess.run(
            [compiler, *FLAGS, *options, "-o", fresh, HERE / source], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CannotRunError(f"{source} does not compile:\n{done.stderr}")
        fresh.rename(program)
    return program


def output_of(command: Sequence[str | Path], *, timeout: float = 120) -> str:
    """Run a command and return what it printed; raises CannotRunError with its complaint when it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotRunError(str(error)) from error
    if done.returncode:
        raise CannotRunError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return this process's environment without what slows Python down and an installed `hv` would not have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def whole_run_ms(command: Sequence[str | Path], expected: int) -> float:
    """Run a command that prints nothing of interest; return milliseconds from its start to its end.

    Raises:
        CannotRunError: its exit status is not `expected`.
    """
    null = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
    actions = [null, (os.POSIX_SPAWN_DUP2, 0, 1), (os.POSIX_SPAWN_DUP2, 0, 2)]
    words = [os.fspath(word) for word in command]
    env = environment()
    started = time.perf_counter_ns()
    pid = os.posix_spawn(words[0], words, env, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    taken = time.perf_counter_ns() - started
    if (code := os.waitstatus_to_exitcode(status)) != expected:
        raise CannotRunError(f"{' '.join(words)}: exit status {code}, not {expected}")
    return taken / 1e6


def hv() -> Path:
    """Return an `hv` console script as an installed user has it: in an environment without the developer's tools.

    Several of those run code of their own at every start of Python. So this is an environment that only points to the
    checkout and to the packages of the one that this program runs in.
    """
    source = Path(sys.executable).with_name("hv")
    if not source.exists():
        raise CannotRunError(f"there is no {source}: run scripts/setup")
    folder = cache() / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (folder / packages / "trapvisor.pth").write_text(f"{ROOT}\n{Path(sys.prefix) / packages}\n")
    script = folder / "bin" / "hv"
    _, _, text = source.read_text().partition("\n")
    script.write_text(f"#!{folder}/bin/python\n{text}")
    script.chmod(0o755)
    return script

"""The emulated VT-x host without Bochs: its configuration, the marks in its output, its end, what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from emulated_host import bochs, cli  # noqa: E402 - needs the path above
from emulated_host.errors import HostCannotError  # noqa: E402 - the same

if TYPE_CHECKING:
    from collections.abc import Iterator

START = b"\x1ecafe start\n"


def end(status: int) -> bytes:
    return b"\x1ecafe end %d\n" % status


def parts(*pieces: bytes) -> tuple[bytes, list[bochs.Mark]]:
    """Return all bytes and all marks that come out of a splitter, whatever the pieces."""
    splitter = bochs.Splitter("cafe")
    out = [part for piece in pieces for part in splitter.feed(piece)]
    text = b"".join(part for part in out if not isinstance(part, bochs.Mark))
    return text, [part for part in out if isinstance(part, bochs.Mark)]


def test_bochsrc_has_an_intel_cpu_with_ept_and_two_serial_ports() -> None:
    lines = bochs.bochsrc(Path("/w/a.iso"), Path("/w/log"), ["/proc/self/fd/7", "/proc/self/fd/9"]).splitlines()
    assert "cpu: model=corei7_haswell_4770, count=1, ips=50000000, reset_on_triple_fault=0" in lines
    assert 'ata0-master: type=cdrom, path="/w/a.iso", status=inserted' in lines
    assert 'log: "/w/log"' in lines
    assert lines[-2:] == [
        "com1: enabled=1, mode=file, dev=/proc/self/fd/7",
        "com2: enabled=1, mode=file, dev=/proc/self/fd/9",
    ]


def test_marks_are_cut_out_wherever_reads_end() -> None:
    whole = b"log\n" + START + b"hello\n" + end(37)
    for size in range(1, len(whole) + 1):
        text, marks = parts(*(whole[at : at + size] for at in range(0, len(whole), size)))
        assert text == b"log\nhello\n"
        assert marks == [("start", 0), ("end", 37)]


def test_output_comes_at_once_unless_it_may_begin_a_mark() -> None:
    splitter = bochs.Splitter("cafe")
    assert list(splitter.feed(b"no newline")) == [b"no newline"]
    assert list(splitter.feed(b"a\x1eca")) == [b"a"]
    assert list(splitter.feed(b"b")) == [b"\x1ecab"]


def test_another_secret_is_output() -> None:
    text, marks = parts(b"\x1ebeef end 0\n")
    assert (text, marks) == (b"\x1ebeef end 0\n", [])


def test_the_command_reaches_a_shell_unharmed(tmp_path: Path) -> None:
    words = ["printf", "%s|", "a b", "it's", "$HOME", "*"]
    script = bochs.script_for([*words[:2], *words[2:]], {"NAME": "x y'z"}, str(tmp_path))
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert done.stdout == b"a b|it's|$HOME|*|"
    shown = bochs.script_for(["sh", "-c", 'echo "$NAME"; pwd'], {"NAME": "x y'z"}, str(tmp_path))
    assert (
        subprocess.run(["sh", "-c", shown], capture_output=True, check=True).stdout.decode() == f"x y'z\n{tmp_path}\n"
    )


@contextmanager
def followed(said: bytes, errors: bytes = b"") -> Iterator[tuple[int, int, int, int]]:
    """Give descriptors as Bochs would fill them; the last is the writing end of the first."""
    pairs = [os.pipe() for _ in range(3)]
    os.write(pairs[0][1], said)
    os.write(pairs[1][1], errors)
    try:
        yield pairs[0][0], pairs[1][0], pairs[2][0], pairs[0][1]
    finally:
        for pair in pairs:
            for descriptor in pair:
                os.close(descriptor)


def test_output_and_status_come_through(capfd: pytest.CaptureFixture[str]) -> None:
    with followed(b"a log\n" + START + b"hello\n" + end(33), b"oops\n") as (output, errors, screen, _):
        assert bochs.Run("cafe", None, verbose=False).follow(output, errors, screen) == 33
    assert capfd.readouterr() == ("hello\n", "oops\n")


def test_a_timeout_gives_124(capfd: pytest.CaptureFixture[str]) -> None:
    with followed(START + b"slow") as (output, errors, screen, _):
        assert bochs.Run("cafe", 0.05, verbose=False).follow(output, errors, screen) == 124
    assert capfd.readouterr() == ("slow", "emulated-host: the command did not end within 0.05 s\n")


@pytest.mark.parametrize(
    ("said", "why"), [(b"x\nKernel panic - not syncing\n", "panicked"), (START + START, "started anew")]
)
def test_a_host_that_panics_is_told(said: bytes, why: str) -> None:
    with followed(said) as (output, errors, screen, _), pytest.raises(HostCannotError, match=why):
        bochs.Run("cafe", 60, verbose=False).follow(output, errors, screen)


def test_a_guest_may_speak_of_a_panic(capfd: pytest.CaptureFixture[str]) -> None:
    with followed(START + b"Kernel panic\n" + end(4)) as (output, errors, screen, _):
        assert bochs.Run("cafe", 60, verbose=False).follow(output, errors, screen) == 4
    assert capfd.readouterr().out == "Kernel panic\n"


def test_missing_packages_are_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bochs, "FILES", ("/nowhere/isolinux.bin",))
    monkeypatch.setattr(bochs, "PROGRAMS", ())
    assert cli.main(["--vt-x", "true"]) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for package in ["bochs", "bochs-term", "bochsbios", "vgabios", "isolinux", "syslinux-common", "xorriso"]:
        assert package in said.split()


@pytest.mark.parametrize("option", [["--memory", "2048"], ["--cpus", "2"], ["--out", "x"], ["--shell"]])
def test_options_without_meaning_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--vt-x", *option, "true"]) == 2
    assert capsys.readouterr().err == f"emulated-host: {option[0]} does not go with --vt-x\n"


def test_a_host_that_ends_is_told_with_what_was_on_its_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "bochs-bin"
    stand_in.write_text("#!/bin/sh\necho a bad configuration\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(HostCannotError, match="ended before the command did") as caught:
        bochs.run(tmp_path / "none.iso", "cafe", tmp_path, None, verbose=False)
    assert "a bad configuration" in caught.value.log


def test_the_serial_ports_are_read_from_a_real_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "bochs-bin"
    stand_in.write_text(
        "#!/bin/sh\nset -- $(sed -n 's/^com.*dev=//p' \"$3\")\n"
        "printf 'log\\n\\036cafe start\\nhi\\n' >$1; echo oops >$2; printf '\\036cafe end 9\\n' >$1; exec sleep 100\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert bochs.run(tmp_path / "none.iso", "cafe", tmp_path, 30, verbose=False) == 9


def test_output_that_nobody_reads_ends_the_run(tmp_path: Path) -> None:
    stand_in = tmp_path / "bochs-bin"
    stand_in.write_text(
        "#!/bin/sh\nset -- $(sed -n 's/^com.*dev=//p' \"$3\")\n"
        "printf '\\036cafe start\\n' >$1; while echo more >$1; do :; done; exec sleep 100\n"
    )
    stand_in.chmod(0o755)
    program = (
        "import sys; from pathlib import Path; from emulated_host import bochs\n"
        f"work = Path({str(tmp_path)!r}); sys.exit(bochs.run(work, 'cafe', work, 30, verbose=False))"
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(SCRIPTS)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"more\n"
        running.stdout.close()
        assert running.wait(60) == 128 + 13  # as a shell has it for SIGPIPE

"""`hv profile`: its formats, its files, its errors, its status."""

import json
import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest
from profiles import sample

from hypervisor import cli
from hypervisor.errors import ImageError

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"one": {}, "two": {"slower": 2.0}} | {
    f"{name}{number}": {"seed": seed + number, "slower": slower}
    for name, seed, slower in (("b", 0, 1.0), ("a", 10, 2.0), ("c", 20, 1.0))
    for number in range(1, 5)
}


@pytest.fixture(autouse=True)
def loader(monkeypatch):
    """Profiles by name, in place of files."""

    def load(path):
        if path not in RUNS:
            raise ImageError(f"{path} is no profile", hint="hv run --profile makes one")
        return sample(**RUNS[path])

    module = types.ModuleType("hypervisor.profile.file")
    module.load = load
    monkeypatch.setitem(sys.modules, "hypervisor.profile.file", module)


@pytest.fixture
def hv(capfdbinary):
    """Run `hv profile`; returns status, standard output and standard error."""

    def run(*arguments):
        status = cli.main(["profile", *map(str, arguments)])
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return run


def refused(result, *words):
    status, out, err = result
    assert (status, out) == (2, b"")
    lines = err.splitlines()
    assert lines[0].startswith("hv: ")
    assert len(lines) <= 2
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("form", "start"),
    [
        ("text", "Profile of debian"),
        ("json", '{\n  "version": 1'),
        ("html", "<!doctype html>"),
        ("folded", "vcpu0;hlt;"),
        ("prometheus", "# HELP hv_exits_total"),
        ("perfetto", "\n"),
    ],
)
def test_every_format_on_standard_output_and_in_a_file(hv, tmp_path, form, start):
    status, out, err = hv("report", "one", "--format", form)
    assert (status, err) == (0, "")
    assert out.decode(errors="replace").startswith(start)
    path = tmp_path / "out"
    assert hv("report", "one", "--format", form, "--output", path) == (0, b"", "")
    assert path.read_bytes() == out
    assert os.listdir(tmp_path) == ["out"]


def test_options_of_formats(hv):
    assert b"and 3 lines more" in hv("report", "one", "--top", 1)[1]
    assert b"more; --top" not in hv("report", "one", "--top", 99)[1]
    folded = ("report", "one", "--format", "folded", "--weight", "count")
    assert b"vcpu0;io;open bus 0x2f9;autoconfig 3\n" in hv(*folded)[1]
    assert hv(*folded, "--layer", "kernel")[1] == b"npf 700\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nothing"], ["nothing is no profile", "hv run --profile"]),
        (["report", "one", "--format", "pdf"], ["--format pdf", "text, json, html"]),
        (["report", "one", "--format", "folded", "--weight", "bytes"], ["--weight bytes", "ns, count"]),
        (["report", "one", "--format", "folded", "--layer", "kvm"], ["--layer kvm", "user, kernel"]),
        (["report", "one", "--top", "0"], ["--top 0"]),
        (["report", "one", "--output", "/nowhere/x"], ["cannot write /nowhere/x", "No such file"]),
        (["report", "one", "--output", "/"], ["cannot write /", "directory"]),
        (["diff", "one"], ["one after", "--before"]),
        (["diff", "one", "two", "b1"], ["a profile before and one after"]),
        (["diff", "--before", "one"], ["a profile before and one after"]),
        (["diff", "one", "two", "--before", "b1", "--after", "a1"], ["both"]),
        (["diff", "one", "nothing"], ["nothing is no profile"]),
        (["diff", "one", "two", "--format", "html"], ["--format html", "text, json"]),
        (["diff", "one", "two", "--fail-over", "-1"], ["--fail-over -1"]),
        (["diff", "one", "two", "--fail-over", "nan"], ["--fail-over nan"]),
        (["diff", "one", "two", "--floor", "101"], ["--floor 101"]),
        (["diff", "one", "two", "--alpha", "0"], ["--alpha 0"]),
        (["diff", "--before", "b1", "b2", "--after", "a1", "a2", "--fail-over", "5"], ["can never fail", "0.17"]),
    ],
)
def test_bad_usage_is_one_clear_line(hv, arguments, words):
    refused(hv(*arguments), *words)


def test_a_failed_write_leaves_the_old_file(hv, tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    refused(hv("report", "one", "--output", path), "No space left")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_device_is_written_as_it_is(hv):
    assert hv("report", "one", "--output", "/dev/null") == (0, b"", "")
    assert os.path.exists("/dev/null")
    assert not os.path.isfile("/dev/null")


def test_a_binary_format_refuses_a_terminal(monkeypatch, capfd):
    main, side = pty.openpty()
    with open(side, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert cli.main(["profile", "report", "one", "--format", "perfetto"]) == 2
        assert "--output" in capfd.readouterr().err
    os.close(main)


def test_a_terminal_gets_its_width_and_colours(monkeypatch):
    from hypervisor.cli import profile  # noqa: PLC0415 - the command imports it when it is asked for

    main, side = pty.openpty()
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with open(side, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert profile._style(terminal) == {"width": 90, "colour": True}
        monkeypatch.setenv("NO_COLOR", "1")
        assert profile._style(terminal)["colour"] is False
    os.close(main)


def test_diff_of_single_runs(hv):
    status, out, err = hv("diff", "one", "two")
    assert (status, err) == (0, "")
    assert out.startswith(b"one run each: no significance")
    data = json.loads(hv("diff", "one", "two", "--format", "json")[1])
    uart = next(line for line in data["changes"] if (line["by"], line["name"]) == ("device", "uart0"))
    assert uart["change"]["total"]["relative"] == pytest.approx(1, rel=0.01)


def test_fail_over_of_single_runs_is_anything_that_grew(hv):
    status, _, err = hv("diff", "one", "two", "--fail-over", 50)
    assert status == 1
    assert "hv: uart0 (device): handler time +100.0%" in err
    assert hv("diff", "one", "two", "--fail-over", 150)[0] == 0
    assert hv("diff", "two", "one", "--fail-over", 0)[0] == 0
    assert hv("diff", "one", "one", "--fail-over", 0)[0] == 0


def test_fail_over_of_several_runs_needs_significance(hv):
    three = [f"{name}{number}" for name in "b" for number in (1, 2, 3)]
    status, out, err = hv("diff", "--before", *three, "--after", "a1", "a2", "a3", "--fail-over", 20)
    assert status == 1
    assert "p 0.05" in err
    assert out.startswith(b"3 and 3 runs")
    assert hv("diff", "--before", *three, "--after", "c1", "c2", "c3", "--fail-over", 20)[0] == 0
    with_larger_alpha = ("--before", "b1", "b2", "--after", "a1", "a2", "--fail-over", 5, "--alpha", 0.2)
    assert hv("diff", *with_larger_alpha)[0] == 1


@pytest.mark.parametrize("verb", [["--help"], ["report", "--help"], ["diff", "--help"]])
def test_help_teaches(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["profile", *verb])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert out.isascii()


def test_running_a_guest_does_not_pay_for_it():
    costly = ("rich", "numpy", "prometheus_client", "hypervisor.cli.profile", "hypervisor.profile.report.text")
    script = (
        "import sys; from hypervisor.cli import main; main(['run', '/dev/null/none']); "
        f"print([name for name in {costly!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_output_is_what_the_locale_can_hold(encoding):
    script = f"""
import sys, types
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
from profiles import sample
profile = sample()
profile.info["kernel"] = chr(0x2603)
module = types.ModuleType("hypervisor.profile.file")
module.load = lambda path: profile
sys.modules["hypervisor.profile.file"] = module
from hypervisor.cli import main
sys.exit(main(["profile", "report", "x"]) or main(["profile", "diff", "x", "x"]))
"""
    env = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode(encoding).isascii() == (encoding == "ascii")

"""What `hv` does about a fault of its own."""

import subprocess
import sys

from hypervisor import cli
from hypervisor.cli import check
from hypervisor.errors import HostError


def test_a_fault_of_ours_is_5_with_its_traceback(monkeypatch, capsys):
    def fail(_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(check, "run", fail)
    assert cli.main(["check"]) == 5
    errors = capsys.readouterr().err
    assert "RuntimeError: a bug" in errors
    assert errors.splitlines()[-1].startswith("hv: this is a fault of hv's own")


def test_an_error_of_the_host_is_3(monkeypatch, capsys):
    def fail(_options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(check, "run", fail)
    assert cli.main(["check"]) == 3
    assert "Too many open files" in capsys.readouterr().err


def test_a_binding_that_was_never_built_is_named():
    script = (
        "import sys; sys.modules['hypervisor.kvm._kvm'] = None; from hypervisor.cli import main; main(['run', 'x'])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert result.stderr.splitlines() == ["hv: the binding to KVM has not been built", "    scripts/setup builds it"]


def test_a_cause_adds_what_is_new(capsys):
    """An OSError's own text has a number and the path again."""
    error = HostError("cannot write out.hvprof")
    error.__cause__ = OSError(2, "No such file or directory", "out.hvprof")
    cli.print_error(error)
    assert capsys.readouterr().err == "hv: cannot write out.hvprof: No such file or directory\n"

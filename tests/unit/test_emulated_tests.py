"""Which tests are run again in a new emulated host; a shell script on this machine stands for the host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from emulated_host import tests  # noqa: E402 - needs the path above

HOST = """\
import os, sys
options, command = sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]
brought = dict(reversed(one.removeprefix("--with=").split("=")) for one in options if one.startswith("--with="))
with open(os.environ["HOSTS"], "a") as file:
    file.write("host\\n")
os.execvp(command[0], [word.replace(tests, path) for word in command for tests, path in brought.items()])
"""

SUITE = """\
import os, pathlib, time

def first(what):
    '''Whether this is the first time.'''
    path = pathlib.Path(what)
    if path.exists():
        return False
    path.touch()
    return True

def ran(name):
    with open("ran", "a") as file:
        file.write(name + "\\n")

def test_a():
    ran("a")
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Return a function that runs a suite: status, what ran in which order, how many hosts, what was said."""
    host = tmp_path / "host"
    host.write_text(f"#!{sys.executable}\n{HOST}")
    host.chmod(0o755)
    monkeypatch.setattr(tests, "PROGRAM", host)
    monkeypatch.setenv("HOSTS", str(tmp_path / "hosts"))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider -p pytest_timeout"

    def run(more, *arguments):
        (tmp_path / "test_suite.py").write_text(SUITE + more)
        status = tests.main(["--command", command, *(arguments or ["test_suite.py"])])
        ran = (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []
        return status, ran, len((tmp_path / "hosts").read_text().split()), capfd.readouterr()

    return run


def test_all_pass(run):
    status, ran, hosts, said = run("")
    assert (status, ran, hosts) == (0, ["a"], 1)
    assert "1 passed" in said.out
    assert "@@" not in said.out + said.err


def test_a_failure_has_to_pass_in_a_new_host(run):
    status, ran, hosts, said = run("def test_b():\n    ran('b')\n    assert not first('b')\n")
    assert (status, ran, hosts) == (0, ["a", "b", "b"], 2)
    assert "failed once, passed in a new host: test_suite.py::test_b" in said.err


def test_a_failure_that_stays(run):
    status, ran, hosts, said = run("def test_b():\n    ran('b')\n    assert 0\ndef test_b_c():\n    ran('c')\n")
    assert (status, ran, hosts) == (1, ["a", "b", "c", "b"], 2)
    assert "failed in two hosts: test_suite.py::test_b\n" in said.err


def test_a_fixture_that_fails_is_its_tests_failure(run):
    status, ran, hosts, _ = run("""
import pytest
@pytest.fixture
def late():
    yield
    assert not first('late')
def test_b(late):
    ran('b')
""")
    assert (status, ran, hosts) == (0, ["a", "b", "b"], 2)


def test_the_rest_runs_when_the_host_has_died(run):
    more = "def test_b():\n    ran('b')\n    first('b') and os._exit(3)\ndef test_c():\n    ran('c')\n"
    status, ran, hosts, said = run(more)
    assert (status, ran, hosts) == (0, ["a", "b", "b", "c"], 2)
    assert "status 3, in the middle of test_suite.py::test_b" in said.err


def test_a_test_that_stands_still(run, monkeypatch, tmp_path):
    for seconds in (1, 20):  # the second is for a machine on which the others take as long
        monkeypatch.setattr(tests, "SECONDS_A_TEST", seconds)
        for name in ("ran", "hosts", "b"):
            (tmp_path / name).unlink(missing_ok=True)
        status, ran, hosts, said = run("def test_b():\n    ran('b')\n    first('b') and time.sleep(60)\n")
        if (status, ran, hosts) == (0, ["a", "b", "b"], 2):
            break
    assert (status, ran, hosts) == (0, ["a", "b", "b"], 2)
    assert "time.sleep(60)" in said.out + said.err, "the stacks are told"


def test_many_failures_are_not_run_again(run):
    more = "import pytest\n@pytest.mark.parametrize('n', range(9))\ndef test_b(n):\n    assert 0\n"
    status, _, hosts, said = run(more)
    assert (status, hosts) == (1, 1)
    assert "9 tests failed" in said.err


def test_hosts_that_die_again_and_again(run):
    more = "".join(f"def test_{n}():\n    first('{n}') and os._exit(3)\n" for n in range(6))
    status, _, hosts, said = run(more)
    assert (status, hosts) == (1, tests.HOSTS)
    assert "hosts were not enough" in said.err


def test_a_host_that_dies_after_the_last_test(run):
    more = "import atexit\natexit.register(lambda: first('end') and os._exit(3))\n"
    assert run(more)[:3] == (0, ["a"], 2)


def test_a_suite_that_cannot_be_collected(run):
    status, ran, hosts, said = run("import no_such_module\n")
    assert (status, ran, hosts) == (1, [], 1)
    assert "no test has run: status 2" in said.err


def test_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        tests.main([])
    assert ended.value.code == 2
    assert "which tests?" in capsys.readouterr().err
    done = subprocess.run([SCRIPTS / "emulated-tests", "--help"], capture_output=True, text=True, check=True)
    assert "exit status:" in done.stdout
    assert os.access(SCRIPTS / "emulated-tests", os.X_OK)

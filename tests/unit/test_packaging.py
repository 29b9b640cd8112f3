"""The wheel: what it holds, and that it works without the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from hypervisor.testing import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel with what is installed, in a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in files.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "tree"]
    result = subprocess.run(command, capture_output=True, check=False, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_packages_binding_and_guests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hypervisor", "devices"}
    assert {"hypervisor/py.typed", "devices/py.typed", "hypervisor/kvm/_kvm.abi3.so"} <= names
    for source in (ROOT / "guest-kernels").iterdir():
        if source.is_file():
            assert f"hypervisor/guest_kernels/{source.name}" in names
    for part in ("page.html", "page.css", "page.js", "timeline.js", "heat.js", "flame.js", "table.js"):
        assert f"hypervisor/profile/report/{part}" in names
    assert f"hypervisor/testing/agent/{build.name()}" in names
    for module in [*(ROOT / "hypervisor").rglob("*.py"), *(ROOT / "devices").rglob("*.py")]:
        assert module.relative_to(ROOT).as_posix() in names


def test_an_installed_wheel_needs_no_checkout(wheel, tmp_path):
    """The command, the library and an assembly guest, from the wheel alone."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    requirements = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "requirements.pth").write_text(f"{requirements}\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"XDG_CACHE_HOME": str(tmp_path)}
    script = "import hypervisor as h; print(h.__file__); from hypervisor import kernels; print(kernels.path('exit'))"
    result = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    where, image = result.stdout.splitlines()
    assert where.startswith(str(site))
    assert Path(image).read_bytes().startswith(b"\x7fELF")
    command = [python, "-m", "hypervisor", "kernel", "list"]
    result = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "hello-pio" in result.stdout


def test_no_other_distribution_claims_the_names():
    owners = {
        distribution.metadata["Name"]
        for distribution in distributions()
        for file in distribution.files or []
        if file.parts[0] in {"hypervisor", "devices"}
    }
    assert owners <= {"trapvisor"}

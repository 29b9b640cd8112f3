"""Only what pyproject.toml cannot say: the compiled binding to KVM, and the program of the test kit for guests."""

from pathlib import Path
from runpy import run_path

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildExtAndAgent(build_ext):
    """Compiles the guest's agent where the binding goes."""

    def run(self) -> None:
        """Compile both."""
        super().run()
        root = Path() if self.inplace else Path(self.build_lib)
        run_path("hypervisor/testing/build.py")["beside"](root / "hypervisor/testing/agent")


setup(cffi_modules=["hypervisor/kvm/build.py:ffibuilder"], cmdclass={"build_ext": BuildExtAndAgent})

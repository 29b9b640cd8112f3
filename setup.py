"""Only what pyproject.toml cannot say: the compiled binding to KVM."""

from setuptools import setup

setup(cffi_modules=["hypervisor/kvm/build.py:ffibuilder"])

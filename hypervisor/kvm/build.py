"""Builds `hypervisor.kvm._kvm`: <linux/kvm.h> and the run loop, in cffi's API mode.

The C compiler reads the system's header, so no structure layout or ioctl number is copied anywhere. The module uses
CPython's limited API: one build serves every later Python.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
PACKAGE = Path("hypervisor", "kvm")

ffibuilder = FFI()
ffibuilder.cdef((HERE / "kvm.cdef").read_text())
ffibuilder.set_source(
    "hypervisor.kvm._kvm",
    '#include "runloop.h"\n',
    sources=[str(PACKAGE / "runloop.c")],
    depends=[str(PACKAGE / "runloop.h"), str(PACKAGE / "kvm.cdef")],
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-std=gnu11"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent.parent), verbose=True)

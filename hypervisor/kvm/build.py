"""Builds `hypervisor.kvm._kvm`: <linux/kvm.h>, the run loop and the data paths, in cffi's API mode.

The C compiler reads the system's header, so no structure layout or ioctl number is copied anywhere. The module uses
CPython's limited API: one build serves every later Python.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
PACKAGE = Path("hypervisor", "kvm")
PARTS = ("recorder", "kvm", "dirty", "dataplane", "replay", "pager")
HEADERS = ("runloop", "tracefile", "dataplane", "replay", "pager")
SOURCES = ("runloop", "recorder", "tracefile", "vring", "uring", "diskpath", "tappath", "dirty", "replay", "pager")

ffibuilder = FFI()
for part in PARTS:
    ffibuilder.cdef((HERE / f"{part}.cdef").read_text())
ffibuilder.set_source(
    "hypervisor.kvm._kvm",
    "#include <sys/mman.h>\n" + "".join(f'#include "{name}.h"\n' for name in HEADERS),
    sources=[str(PACKAGE / f"{name}.c") for name in SOURCES],
    depends=[str(PACKAGE / f"{name}.h") for name in (*HEADERS, "recorder", "uring", "dirty")]
    + [str(PACKAGE / f"{name}.cdef") for name in PARTS],
    include_dirs=[str(HERE)],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-std=gnu11"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parent.parent), verbose=True)

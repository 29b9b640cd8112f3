"""`hv initramfs`: an archive for a Linux guest's first root file system."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

SUMMARY: Final = "make a busybox initramfs"
DESCRIPTION: Final = """\
Make an initramfs with a static busybox in it. Its /init mounts /proc, /sys and /dev, loads the modules that are named,
runs SCRIPT or else a shell on the console, and powers the guest off when that ends."""
EPILOG: Final = """\
examples:
  hv initramfs root.cpio
  hv initramfs root.cpio --module virtio_net --module virtio_pci --init test.sh
  hv initramfs root.cpio --add ./tool=/bin/ --add ./data=/srv/data
  hv run debian --initrd root.cpio
"""
DEFAULT_KERNEL: Final = "debian"
FORMATS: Final = ("none", "gzip", "lz4", "zstd", "xz")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv initramfs`."""
    add = parser.add_argument
    add("out", metavar="OUT", help="file to write; it appears when it is whole")
    add("--kernel", metavar="NAME", help=f"guest kernel whose modules are meant (default {DEFAULT_KERNEL})")
    add("--init", metavar="SCRIPT", help="run this in place of a shell")
    add("--module", metavar="NAME", action="append", default=[], help="load this module first; repeatable, in order")
    add("--add", metavar="SRC=DST", action="append", default=[], help="add a file or a folder; repeatable")
    add(
        "--compress",
        metavar="FORMAT",
        default="none",
        help=f"{', '.join(FORMATS)} (default none: the guest is quickest with what it need not unpack)",
    )


def run(options: argparse.Namespace) -> int:
    """Make the archive; print nothing when all is well."""
    from hypervisor import initramfs
    from hypervisor.errors import ConfigError
    from hypervisor.kernels import progress

    added = []
    for pair in options.add:
        source, equals, target = pair.rpartition("=")
        if not (source and equals and target):
            raise ConfigError(f"--add {pair}: it is SRC=DST", hint="as in --add ./tool=/bin/tool")
        added.append((source, target))
    reporter = progress.for_stream(sys.stderr)
    try:
        initramfs.build(
            options.out,
            kernel=options.kernel or (DEFAULT_KERNEL if options.module else None),
            init=options.init,
            modules=options.module,
            add=added,
            compress=options.compress,
            progress=reporter,
        )
    finally:
        reporter.end()
    return 0

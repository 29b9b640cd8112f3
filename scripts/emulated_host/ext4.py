"""Making a disk image from a folder, without root and without mounting anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from emulated_host.errors import call, find_tool

BLOCK: Final = 4096
INODE: Final = 256


def make_image(folder: Path, image: Path) -> None:
    """Write the content of `folder` to a sparse raw ext4 file, with no room to spare: it is only ever read.

    Raises:
        HostCannotError: mke2fs is missing or fails.
    """
    blocks, inodes = _measure(folder)
    inodes += 64
    # Bitmaps, group descriptors, extent blocks of fragmented files: 3 % and 4 MiB cover them with much left.
    total = int((blocks + inodes * INODE / BLOCK) * 1.03) + (4 << 20) // BLOCK
    features = "^has_journal,^resize_inode,^metadata_csum"
    options = ["-q", "-F", "-t", "ext4", "-b", BLOCK, "-I", INODE, "-N", inodes, "-m", 0, "-O", features]
    call([find_tool("mke2fs"), *map(str, options), "-d", str(folder), str(image), str(total)])


def _measure(folder: Path) -> tuple[int, int]:
    """Return the blocks and inodes that the content of `folder` takes."""
    blocks = inodes = 0
    for path, directories, files in os.walk(folder):
        inodes += 1 + len(files)
        # A directory entry takes 8 bytes and its name, padded; blocks are not filled to the brim.
        blocks += 1 + sum(12 + len(os.fsencode(name)) for name in directories + files) * 3 // 2 // BLOCK
        for name in files:
            blocks += -(-os.lstat(Path(path, name)).st_size // BLOCK)
    return blocks, inodes

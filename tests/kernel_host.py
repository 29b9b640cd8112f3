"""A pretended host for the tests of guest kernels: stand-ins for its programs, writers of packages and modules.

Nothing of it needs the network or root.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

APT_CACHE = r"""#!/bin/sh
# show PACKAGE, from the lists that the options name, or else the system's
lists=$HOST/lists
for word; do case $word in -oDir::State::Lists=*) lists=${word#*Lists=} ;; esac; package=$word; done
echo "apt-cache $package" >> "$HOST/log"
cat "$lists/$package" 2>/dev/null || { echo "E: No packages found" >&2; exit 100; }
"""

APT_GET = r"""#!/bin/sh
# download [--print-uris] PACKAGE..., and update, which copies the mirror's lists
lists=$HOST/lists packages= verb= uris=
for word; do
    case $word in
        -oDir::State::Lists=*) lists=${word#*Lists=} ;;
        --print-uris) uris=yes ;;
        -*) ;;
        download|update) verb=$word ;;
        *=*) ;;
        *) packages="$packages $word" ;;
    esac
done
echo "apt-get $verb$packages" >> "$HOST/log"
if [ $verb = update ]; then
    [ -d "$HOST/mirror-lists" ] || { echo "E: Failed to fetch http://mirror/  Could not resolve" >&2; exit 100; }
    cp "$HOST"/mirror-lists/* "$lists/"
    exit 0
fi
for package in $packages; do
    [ -f "$lists/$package" ] || { echo "E: Unable to locate package $package" >&2; exit 100; }
    [ $uris ] && { echo "'http://mirror/$package.deb' $package.deb 1000 SHA256:00"; continue; }
    [ -f "$HOST/mirror/$package.deb" ] || { echo "E: Failed to fetch $package.deb  404  Not Found" >&2; exit 100; }
    cp "$HOST/mirror/$package.deb" "${package}_1_amd64.deb"
done
"""

DPKG_DEB = """#!/bin/sh
mkdir -p "$3" && exec tar -x -f "$2" -C "$3"
"""

MAKE = r"""#!/bin/sh
# tinyconfig, olddefconfig (which does not know what $HOST/unknown says), and the build
for word; do target=$word; done
echo "make $target" >> "$HOST/log"
case $target in
    tinyconfig)
        printf 'CONFIG_A_DEFAULT=y\n# CONFIG_SMP is not set\n' > .config ;;
    olddefconfig)
        touch "$HOST/unknown"; grep -v -F -f "$HOST/unknown" .config > new; mv new .config ;;
    modules)
        [ -f "$HOST/broken" ] && { echo "init/main.c:1: error: expected ;"; echo "make: *** [main.o] Error 1"; exit 2; }
        for object in one two three; do echo "  CC      $object.o"; done
        mkdir -p arch/x86/boot include/config drivers/net
        echo image > arch/x86/boot/bzImage
        echo elf > vmlinux
        echo map > System.map
        echo 6.1.9-tiny > include/config/kernel.release
        echo module > drivers/net/dummy.ko
        echo kernel/fs/ext4/ext4.ko > modules.builtin ;;
esac
"""

REAL_TOOLS = ("sh", "cat", "cp", "mkdir", "tar", "xz", "mv", "grep", "touch", "gzip")


class KernelHost:
    """A folder that stands for a host.

    Attributes:
        folder: where its state is: "lists" and "mirror" for apt, "log" of what was called.
        path: the value for PATH.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bin = folder / "bin"
        for name in ("bin", "lists", "mirror"):
            (folder / name).mkdir(parents=True)
        for tool in REAL_TOOLS:
            self.link(tool)
        for name, text in {"apt-cache": APT_CACHE, "apt-get": APT_GET, "dpkg-deb": DPKG_DEB}.items():
            self.tool(name, text)
        self.path = str(self._bin)

    def link(self, tool: str) -> None:
        """Give the host a program of the real one."""
        found = shutil.which(tool)
        assert found, f"the tests need {tool}"
        (self._bin / tool).symlink_to(found)

    def tool(self, name: str, script: str = "#!/bin/sh\n") -> None:
        """Give the host a program of its own."""
        path = self._bin / name
        path.unlink(missing_ok=True)
        path.write_text(script)
        path.chmod(0o755)

    def drop(self, name: str) -> None:
        """Take a program away."""
        (self._bin / name).unlink()

    def build_tools(self) -> None:
        """Give the host what a kernel is built with."""
        self.tool("make", MAKE)
        for name in ("gcc", "ld", "flex", "bison", "bc", "lz4", "bzip2", "cmp"):
            self.tool(name)

    def package(
        self, name: str, version: str, files: dict[str, bytes], depends: str = "", lists: str = "lists"
    ) -> None:
        """Put a package into the lists and, unless it has no files, on the mirror."""
        (self.folder / lists).mkdir(exist_ok=True)
        stanza = f"Package: {name}\nVersion: {version}\n" + (f"Depends: {depends}\n" if depends else "")
        (self.folder / lists / name).write_text(stanza)
        if files:
            tree = self.folder / "packing"
            for inside, data in files.items():
                (tree / inside).parent.mkdir(parents=True, exist_ok=True)
                (tree / inside).write_bytes(data)
            archive = self.folder / "mirror" / f"{name}.deb"
            subprocess.run(["tar", "-c", "-f", archive, "-C", tree, "."], check=True)
            shutil.rmtree(tree)

    def calls(self) -> list[str]:
        """Return what was called, in order."""
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []


def module(depends: str = "", softdep: str | None = None) -> bytes:
    """Return a kernel module with nothing in it but a .modinfo section (ELF64: System V ABI, chapter 4)."""
    info = b"license=GPL\0" + f"depends={depends}\0".encode()
    if softdep is not None:
        info += f"softdep={softdep}\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(info) + len(names), 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, 64, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return header + info + names + sections

"""The small guests in assembly: one source file each, built by the host's as and ld in a fraction of a second.

A source begins with comments that say what it is:

    # summary: one line for `hv kernel list`
    # build: multiboot
    # append: the default command line (may be left out)

| build | assembled | linked | image |
|---|---|---|---|
| multiboot (if not said) | `as --32` | guest.ld | ELF32 with a multiboot header |
| elf64 | `as --64` | guest64.ld | ELF64 |
| flat16 | `as --32` | at 0x7C00 | flat binary |
| flat32 | `as --32` | at 0x100000 | flat binary |
| flat64 | `as --64` | at 0x100000 | flat binary |

A linker script with the guest's own name, NAME.ld, goes before these. Sources include others with `.include`.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels.recipe import Product, sources

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.kernels.progress import Progress

__all__ = ["AssemblyGuest", "guests"]

METADATA: Final = re.compile(r"^# (summary|build|append): *(.*?) *$", re.MULTILINE)
BUILD: Final = b"1"
"""Changes when the same sources are assembled in another way."""


class Build(NamedTuple):
    """How one kind of guest is made: word size, linker arguments, and the mode of a flat binary."""

    bits: int
    link: tuple[str, ...]
    script: str | None = None
    flat: int | None = None


BUILDS: Final = {
    "multiboot": Build(32, (), script="guest.ld"),
    "elf64": Build(64, (), script="guest64.ld"),
    "flat16": Build(32, ("-N", "-Ttext=0x7c00"), flat=16),
    "flat32": Build(32, ("-N", "-Ttext=0x100000"), flat=32),
    "flat64": Build(64, ("-N", "-Ttext=0x100000"), flat=64),
}
EMULATIONS: Final = {32: "elf_i386", 64: "elf_x86_64"}


def guests() -> list[str]:
    """Return the names of the guests whose sources are here, sorted."""
    return sorted(path.stem for path in sources().glob("*.S"))


class AssemblyGuest:
    """A guest made of NAME.S."""

    kind: Final = "assembly"
    room: Final = 1_000_000

    def __init__(self, name: str) -> None:
        """Read what the source says of itself.

        Raises:
            ConfigError: if it names a kind of build that there is none of.
        """
        self.name: Final = name
        self._source = sources() / f"{name}.S"
        head = self._source.read_text().split("\n\n", 1)[0]
        said = {match[1]: match[2] for match in METADATA.finditer(head)}
        self.summary: Final = said.get("summary", "")
        self.command_line: Final = said.get("append", "")
        build = said.get("build", "multiboot")
        if build not in BUILDS:
            raise ConfigError(f"{self._source}: build is {build!r}", hint=f"it is one of {', '.join(BUILDS)}")
        self._build = BUILDS[build]
        self.flat: Final = self._build.flat

    def _script(self) -> Path | None:
        own = self._source.with_suffix(".ld")
        if own.is_file():
            return own
        return None if self._build.script is None else self._source.with_name(self._build.script)

    def fingerprint(self) -> str:
        """Return a hash of the source, of everything it may include, and of the linker script."""
        digest = hashlib.sha256(BUILD)
        script = self._script()
        for path in (self._source, *sorted(sources().glob("*.inc")), *([script] if script else [])):
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode())
            digest.update(data)
        return digest.hexdigest()

    def latest(self, scratch: Path, progress: Progress) -> str:  # noqa: ARG002 - a recipe's signature
        """Return the fingerprint's beginning: sources are their own version."""
        return self.fingerprint()[:12]

    def make(self, folder: Path, scratch: Path, progress: Progress) -> Product:
        """Assemble and link it: NAME.elf, and NAME.bin as well for a flat binary."""
        from hypervisor.kernels import programs  # noqa: PLC0415 - a guest that is in the cache is found without it

        absent = programs.missing(["as", "ld", "objcopy"])
        if absent:
            raise HostError(
                f"{absent[0]} is not on this host; it makes the assembly guests", hint="apt-get install binutils"
            )
        progress.begin(f"assembling {self.name}")
        build, script = self._build, self._script()
        item, elf = scratch / "guest.o", folder / f"{self.name}.elf"
        where = ["-I", str(self._source.parent)]
        programs.capture(["as", f"--{build.bits}", "--fatal-warnings", *where, "-o", str(item), str(self._source)])
        link = ["-T", str(script)] if script else [*build.link, "-e", "_start"]
        options = ["-m", EMULATIONS[build.bits], "-z", "noexecstack", "--build-id=none"]
        programs.capture(["ld", *options, *link, "-o", str(elf), str(item)])
        roles = {"image": elf.name, "vmlinux": elf.name}
        if build.flat:
            roles["image"] = f"{self.name}.bin"
            programs.capture(["objcopy", "-O", "binary", str(elf), str(folder / roles["image"])])
        return Product(self.latest(scratch, progress), roles, [])

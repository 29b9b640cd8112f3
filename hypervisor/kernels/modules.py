"""A kernel's modules: finding one by name, what it depends on, and the order to load them in.

Packages are unpacked here without their install scripts, so there is no modules.dep; each module names what it depends
on in its `.modinfo` section, and that is where modules.dep comes from too.
"""

from __future__ import annotations

from pathlib import Path
from struct import error as StructError  # noqa: N812 - it is a class, and `error` is what handlers call theirs
from struct import unpack_from
from typing import TYPE_CHECKING, Final

from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["ModuleTree", "canonical", "read_modinfo", "unpack"]

ELF64: Final = b"\x7fELF\x02"
DAMAGED: Final = "`hv kernel get NAME` checks every file and gets the kernel anew if one is damaged"


def canonical(name: str) -> str:
    """Return a module's name as the kernel writes it: no suffix, underscores for dashes."""
    return name.partition(".ko")[0].replace("-", "_")


def _unpack_xz(data: bytes) -> bytes:
    import lzma  # noqa: PLC0415 - each format's library only when it is met

    try:
        return lzma.decompress(data)
    except lzma.LZMAError as error:
        raise ValueError(str(error)) from error


def _unpack_zstd(data: bytes) -> bytes:
    import zstandard  # noqa: PLC0415 - each format's library only when it is met

    engine = zstandard.ZstdDecompressor().decompressobj()
    try:
        unpacked = engine.decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if not engine.eof:
        raise ValueError("the file is cut off")
    return unpacked


def _unpack_gzip(data: bytes) -> bytes:
    import zlib  # noqa: PLC0415 - each format's library only when it is met

    try:
        return zlib.decompress(data, zlib.MAX_WBITS | 16)
    except zlib.error as error:
        raise ValueError(str(error)) from error


UNPACKERS: Final[dict[str, Callable[[bytes], bytes]]] = {
    ".ko": bytes,
    ".ko.xz": _unpack_xz,
    ".ko.zst": _unpack_zstd,
    ".ko.gz": _unpack_gzip,
}
"""The formats that distributions keep modules in, by file name; depmod knows them by name too."""


def unpack(path: Path) -> bytes:
    """Return a module's ELF file, decompressed if need be.

    Raises:
        ImageError: if it cannot be read or decompressed.
    """
    undo = next(undo for suffix, undo in UNPACKERS.items() if path.name.endswith(suffix))
    try:
        return undo(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: the module cannot be read", hint=DAMAGED) from error


def _section(elf: bytes, wanted: bytes) -> bytes:
    """Return a section of an ELF64 file by its name (System V ABI, chapter 4: header, section headers).

    Raises:
        ValueError: if there is none, or this is no such file.
    """
    if elf[:5] != ELF64:
        raise ValueError("it is no 64-bit ELF file")
    try:
        (table,) = unpack_from("<Q", elf, 0x28)
        size, count, names_index = unpack_from("<HHH", elf, 0x3A)
        headers = [unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
        names = headers[names_index][4]
    except (StructError, IndexError, OverflowError) as error:  # an offset may have 64 bits
        raise ValueError("its section headers are cut off") from error
    for name, _, _, _, offset, length in headers:
        if elf[names + name : names + name + len(wanted) + 1] == wanted + b"\0":
            return elf[offset : offset + length]
    raise ValueError(f"it has no section {wanted.decode()}")


def read_modinfo(elf: bytes, path: Path) -> dict[str, list[str]]:
    """Return the tags of a module's `.modinfo` section, such as "depends" and "softdep", each with its values.

    Raises:
        ImageError: if it is no ELF file with such a section.
    """
    try:
        entries = _section(elf, b".modinfo").decode("utf-8", "replace").split("\0")
    except ValueError as error:
        raise ImageError(f"{path}: not a kernel module", hint=DAMAGED) from error
    tags: dict[str, list[str]] = {}
    for entry in entries:
        tag, _, value = entry.partition("=")
        tags.setdefault(tag, []).append(value)
    return tags


class ModuleTree:
    """The modules of one kernel.

    Attributes:
        folder: the folder whose name is the kernel's release.
    """

    def __init__(self, folder: Path) -> None:
        """Find all modules under `folder`."""
        self.folder = folder
        self._paths = {
            canonical(path.name): path
            for path in sorted(folder.rglob("*.ko*"))
            if path.name.endswith(tuple(UNPACKERS)) and path.is_file()
        }
        builtin = folder / "modules.builtin"
        lines = builtin.read_text().split() if builtin.is_file() else []
        self._builtin = {canonical(Path(line).name) for line in lines}

    def has(self, name: str) -> bool:
        """Tell whether there is a module of this name that can be loaded."""
        return canonical(name) in self._paths

    def order(self, names: Iterable[str]) -> list[Path]:
        """Return `names` and all that they depend on, each once and after what it depends on.

        A module that is built into the kernel is there already and is left out.

        Raises:
            ConfigError: for a name that there is no module of.
            ImageError: if a module is damaged.
        """
        ordered: dict[str, Path] = {}
        for name in names:
            self._visit(canonical(name), ordered, needed_by=None, open_names=())
        return list(ordered.values())

    def _visit(
        self, name: str, ordered: dict[str, Path], *, needed_by: str | None, open_names: tuple[str, ...]
    ) -> None:
        if name in ordered or name in self._builtin or name in open_names:
            return
        path = self._paths.get(name)
        if path is None:
            raise self._unknown(name, needed_by)
        info = read_modinfo(unpack(path), path)
        depends = [word for value in info.get("depends", []) for word in value.split(",") if word]
        # A soft dependency is a wish: other names than modules' (aliases) appear there, and it may be missing.
        wishes = [word for value in info.get("softdep", []) for word in _wanted_before(value) if self.has(word)]
        for other in (*wishes, *depends):
            self._visit(canonical(other), ordered, needed_by=name, open_names=(*open_names, name))
        ordered[name] = path

    def _unknown(self, name: str, needed_by: str | None) -> ConfigError:
        release = self.folder.name
        if needed_by is not None:
            return ConfigError(f"module {needed_by} depends on {name}, which kernel {release} does not have")
        from difflib import get_close_matches  # noqa: PLC0415 - only for a name that is wrong

        near = get_close_matches(name, self._paths, n=3)
        hint = f"is it {' or '.join(near)}?" if near else f"{self.folder} holds those that there are"
        return ConfigError(f"kernel {release} has no module {name}", hint=hint)


def _wanted_before(softdep: str) -> list[str]:
    """Return the names after "pre:" in a softdep tag."""
    before = softdep.partition("post:")[0]
    return before.partition("pre:")[2].split()

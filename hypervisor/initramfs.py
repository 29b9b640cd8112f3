"""Initramfs archives: a static busybox, an /init, the modules and files that the user names.

The /init mounts what programs expect, loads modules, runs the user's script or a shell with job control on the
console, and powers the machine off when that ends. The same inputs give the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NamedTuple, Protocol

from hypervisor.cpio import CpioWriter
from hypervisor.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hypervisor.kernels import Kernel
    from hypervisor.kernels.modules import ModuleTree
    from hypervisor.kernels.progress import Progress

__all__ = ["COMPRESSIONS", "build", "default"]

COMPRESSIONS: Final = ("none", "gzip", "lz4", "zstd", "xz")
"""None is the quickest for a guest: the archive is in memory already, and unpacking it is one copy."""

FOLDERS: Final = ("bin", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin", "usr/sbin")
"""Mount points, and where programs look for their files."""

VIRTIO: Final = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_console", "virtio_balloon"),
    *("vmw_vsock_virtio_transport", "ext4"),
)
POWER_BUTTON: Final = ("button", "evdev")

LISTS: Final = "etc/modules"
"""Folder of the lists that /init reads: a module's name and path on each line, in the order to load them in."""
CHUNK: Final = 1 << 20
LZ4_LEGACY_MAGIC: Final = 0x184C2102
LZ4_LEGACY_BLOCK: Final = 8 << 20
"""The kernel unpacks lz4 in its legacy frame only: this magic, then blocks of 8 MiB with their packed length."""

INIT: Final = r"""#!/bin/sh
# The first process of the guest.
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev || mdev -s
mkdir -p /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run

# Load the modules of a list that are not there yet.
load() {
    [ -f "/etc/modules/$1" ] || return 0
    while read -r name path; do
        [ -d "/sys/module/$name" ] || insmod "$path" || echo "init: cannot load $path"
    done < "/etc/modules/$1"
}

load named
case $(cat /proc/cmdline /sys/bus/pci/devices/*/vendor /sys/bus/acpi/devices/*/hid 2>/dev/null) in
    *virtio_mmio.device=*|*0x1af4*|*LNRO0005*) load virtio ;;
esac
if [ -d /sys/bus/acpi/devices/LNXPWRBN:00 ] || [ -d /sys/bus/acpi/devices/PNP0C0C:00 ]; then
    load power
    # The power button ends the guest.
    [ -e /dev/input/event0 ] && acpid -l /dev/null
fi

# The last value that the command line gives a word.
word() {
    for one in $(cat /proc/cmdline); do
        case $one in "$1"=*) echo "${one#*=}" ;; esac
    done | tail -n 1
}

# Leave for the root file system that the command line names, if it names one.
root=$(word root)
if [ -n "$root" ]; then
    case $(cat /proc/cmdline) in *" rw"|*" rw "*) how=rw ;; *) how=ro ;; esac
    type=$(word rootfstype)
    init=$(word init)
    for try in 1 2 3 4 5 6 7 8 9 10; do
        case $root in UUID=*|LABEL=*) device=$(findfs "$root" 2>/dev/null) ;; *) device=$root ;; esac
        [ -b "$device" ] && break
        sleep 1
    done
    mkdir -p /newroot
    if mount -o $how ${type:+-t $type} "$device" /newroot; then
        for one in proc sys dev run; do
            mkdir -p /newroot/$one 2>/dev/null
            [ -d /newroot/$one ] && mount -o move /$one /newroot/$one
        done
        exec switch_root /newroot "${init:-/sbin/init}" "$@"
    fi
    echo "init: cannot mount $root; this is the initramfs"
fi

cd /
if [ -e /init.user ]; then
    setsid cttyhack /init.user
    status=$?
    [ $status = 0 ] || echo "init: /init.user ended with status $status"
else
    setsid cttyhack sh
fi
sync
poweroff -f
"""

POWER_SCRIPT: Final = "#!/bin/sh\nsync\npoweroff -f\n"
"""What busybox's acpid runs, from the folder of the button's name, when the power button is pressed."""


class _File(NamedTuple):
    """A regular file of the archive: its bytes, or the file of the host that they are read from."""

    source: bytes | Path
    mode: int


class _Link(NamedTuple):
    target: str


class _Node(NamedTuple):
    """A character device."""

    major: int
    minor: int
    mode: int


Entry = _File | _Link | _Node | None
"""None is a folder."""


class _Tree:
    """What is to be in the archive, by path without a leading slash."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def put(self, path: str, entry: Entry) -> None:
        """Add an entry and the folders above it; a later one takes the place of an earlier one.

        Raises:
            ConfigError: if a folder would take the place of something else, or something else that of a folder.
        """
        for depth, character in enumerate(path):
            if character == "/":
                self.put(path[:depth], None)
        if path in self._entries and (self._entries[path] is None) != (entry is None):
            raise ConfigError(f"/{path} is to be a folder and something else in one initramfs")
        self._entries[path] = entry

    def write(self, archive: CpioWriter) -> None:
        """Write all entries, sorted, so that folders go before what is in them."""
        for path, entry in sorted(self._entries.items()):
            match entry:
                case None:
                    archive.folder(path, 0o1777 if path == "tmp" else 0o755)
                case _File(bytes() as data, mode):
                    archive.file(path, data, mode)
                case _File(Path() as source, mode):
                    _copy(source, path, mode, archive)
                case _Link(target):
                    archive.symlink(path, target)
                case _Node(major, minor, mode):
                    archive.character_device(path, major, minor, mode)
        archive.finish()


def _copy(source: Path, path: str, mode: int, archive: CpioWriter) -> None:
    """Add a file of the host; raises ConfigError if it cannot be read."""
    try:
        archive.stream(path, source.stat().st_size, _chunks(source), mode)
    except ValueError as error:
        raise ConfigError(f"{source} cannot go into an initramfs") from error


def _chunks(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from error


# --- what goes in ----------------------------------------------------------------------------------------------------


def _base(busybox: Path, applets: Iterable[str]) -> _Tree:
    """Return a tree with busybox, its names, /init and what programs expect."""
    tree = _Tree()
    for folder in FOLDERS:
        tree.put(folder, None)
    for applet in applets:
        tree.put(applet, _Link("/bin/busybox"))
    tree.put("bin/busybox", _File(busybox, 0o755))
    # Linux's allocated devices (admin-guide/devices.txt): 5,1 is the system console, 1,3 the null device.
    tree.put("dev/console", _Node(5, 1, 0o600))
    tree.put("dev/null", _Node(1, 3, 0o666))
    tree.put("init", _File(INIT.encode(), 0o755))
    tree.put("etc/acpi/PWRF/00000080", _File(POWER_SCRIPT.encode(), 0o755))
    tree.put("etc/passwd", _File(b"root:x:0:0:root:/root:/bin/sh\n", 0o644))
    tree.put("etc/group", _File(b"root:x:0:\n", 0o644))
    return tree


def _put_modules(tree: _Tree, modules: ModuleTree, lists: dict[str, Iterable[str]]) -> None:
    """Add the modules of each list with what they depend on, the lists for /init, and modules.dep for modprobe."""
    from hypervisor.kernels.modules import canonical, unpack  # noqa: PLC0415 - most archives hold none

    root = f"lib/modules/{modules.folder.name}"
    inside: dict[Path, str] = {}
    for name, wanted in lists.items():
        ordered = modules.order(wanted)
        for path in ordered:
            relative = path.relative_to(modules.folder)
            inside[path] = str(relative.with_name(relative.name.partition(".ko")[0] + ".ko"))
        lines = [f"{canonical(path.name)} /{root}/{inside[path]}\n" for path in ordered]
        tree.put(f"{LISTS}/{name}", _File("".join(lines).encode(), 0o644))
    dependencies = []
    for path, name in sorted(inside.items()):
        tree.put(f"{root}/{name}", _File(unpack(path), 0o644))
        before = [inside[other] for other in reversed(modules.order([path.name])[:-1])]
        dependencies.append(f"{name}: {' '.join(before)}".rstrip() + "\n")
    tree.put(f"{root}/modules.dep", _File("".join(dependencies).encode(), 0o644))


def _put_added(tree: _Tree, source: Path, target: str, *, follow: bool) -> None:
    """Add a file of the host, or a folder with all that is in it, as `target`; "" is the root.

    Args:
        tree: where to.
        source: what.
        target: its path, without slashes around it.
        follow: take what a symbolic link stands for; otherwise the link itself.

    Raises:
        ConfigError: if it cannot be read, or is neither file, folder nor symbolic link.
    """
    try:
        mode = source.stat().st_mode if follow else source.lstat().st_mode
        if stat.S_ISLNK(mode):
            tree.put(target, _Link(str(source.readlink())))
        elif stat.S_ISREG(mode):
            tree.put(target, _File(source, stat.S_IMODE(mode)))
        elif stat.S_ISDIR(mode):
            if target:
                tree.put(target, None)
            for child in sorted(source.iterdir()):
                _put_added(tree, child, f"{target}/{child.name}".lstrip("/"), follow=False)
        else:
            raise ConfigError(f"{source} is neither a file nor a folder")
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from error


def _target(source: Path, text: str) -> str:
    """Return where to put `source` for the DST of SRC=DST; a file goes into a DST that ends with a slash."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts or not text:
        raise ConfigError(
            f"{source} cannot be added as {text!r}", hint="it is a path inside the initramfs, as in /bin/tool"
        )
    if text.endswith("/") and not source.is_dir():
        parts.append(source.name)
    return "/".join(parts)


# --- what comes out ---------------------------------------------------------------------------------------------------


class _Sink(Protocol):
    """Takes the archive's bytes; `close` writes what is left and leaves the file below open."""

    def write(self, data: bytes, /) -> object: ...

    def close(self) -> object: ...


class _Plain:
    """No compression."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write

    def close(self) -> None:
        """Nothing is held back."""


class _Lz4Legacy:
    """lz4's legacy frame, which the kernel's build uses too; the `lz4 -l` of the command line."""

    def __init__(self, file: IO[bytes]) -> None:
        from lz4.block import compress  # noqa: PLC0415 - each format's library only when it is asked for

        self._compress = compress
        self._file = file
        self._held = bytearray()
        file.write(LZ4_LEGACY_MAGIC.to_bytes(4, "little"))

    def write(self, data: bytes) -> None:
        """Hold the bytes until there is a block of them."""
        self._held += data
        while len(self._held) >= LZ4_LEGACY_BLOCK:
            self._put(bytes(self._held[:LZ4_LEGACY_BLOCK]))
            del self._held[:LZ4_LEGACY_BLOCK]

    def _put(self, block: bytes) -> None:
        packed = self._compress(block, mode="high_compression", store_size=False)
        self._file.write(len(packed).to_bytes(4, "little") + packed)

    def close(self) -> None:
        """Write the last block."""
        if self._held:
            self._put(bytes(self._held))


def _sink(file: IO[bytes], compress: str) -> _Sink:
    """Return what compresses into `file`, in a form that the kernel can undo and without a time of day in it."""
    if compress == "gzip":
        import gzip  # noqa: PLC0415 - each format's library only when it is asked for

        return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
    if compress == "xz":
        import lzma  # noqa: PLC0415 - each format's library only when it is asked for

        # The kernel's decoder knows no other check than CRC32 (Documentation/staging/xz.rst).
        return lzma.LZMAFile(file, "wb", check=lzma.CHECK_CRC32)
    if compress == "zstd":
        import zstandard  # noqa: PLC0415 - each format's library only when it is asked for

        writer: _Sink = zstandard.ZstdCompressor(level=19).stream_writer(file, closefd=False)
        return writer
    return _Lz4Legacy(file) if compress == "lz4" else _Plain(file)


@contextlib.contextmanager
def _whole_file(out: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `out` at the end, or leaves no trace if that end is not reached.

    Raises:
        ConfigError: if there can be no file `out`.
        HostError: if the disk is full.
    """
    out = Path(os.path.realpath(out))
    if out.exists() and not out.is_file():
        raise ConfigError(f"cannot write {out}: it is there, and no regular file")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(work.unlink, missing_ok=True)
            with work.open("xb") as file:
                yield file
            work.replace(out)
    except OSError as error:
        kind = HostError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else ConfigError
        raise kind(f"cannot write {out}: {error.strerror}") from error


def _write(out: Path, tree: _Tree, compress: str) -> None:
    with _whole_file(out) as file:
        sink = _sink(file, compress)
        tree.write(CpioWriter(sink.write))
        sink.close()


def _check_compression(compress: str, kernel: Kernel | None) -> None:
    if compress not in COMPRESSIONS:
        raise ConfigError(f"compression {compress!r} is not known", hint=f"it is one of {', '.join(COMPRESSIONS)}")
    if compress != "none" and kernel is not None and kernel.config is not None:
        from hypervisor.kernels import kconfig  # noqa: PLC0415 - see above

        option = f"CONFIG_RD_{compress.upper()}"
        if kconfig.parse(kernel.config.read_text()).get(option) != "y":
            raise ConfigError(f"the kernel {kernel.name} cannot unpack {compress}: {option} is not set in it")


def build(  # noqa: PLR0913 - an archive is these facts, all of them by name
    out: str | os.PathLike[str],
    *,
    kernel: str | None = None,
    init: str | os.PathLike[str] | None = None,
    modules: Iterable[str] = (),
    add: Iterable[tuple[str | os.PathLike[str], str]] = (),
    compress: str = "none",
    progress: Progress | None = None,
) -> Path:
    """Write an initramfs and return its path.

    Args:
        out: the file to write; an earlier one is replaced when the new one is whole.
        kernel: name of the guest kernel that modules are of; it must be in the cache.
        init: script or static program of the host to run in place of a shell; the guest powers off when it ends.
        modules: names of modules to load first; what they depend on goes before them.
        add: (host path, guest path) of files and folders to add. They win over what is there.
        compress: one of COMPRESSIONS.
        progress: told of a busybox that has to be fetched; nobody by default.

    Raises:
        ConfigError: for a wrong name or value, a file that cannot be read, or an `out` that cannot be written.
        HostError: if no busybox can be had, or the disk is full.
    """
    from hypervisor import kernels  # noqa: PLC0415 - the two need each other
    from hypervisor.kernels import busybox  # noqa: PLC0415 - the same

    wanted = list(modules)
    named = None if kernel is None else kernels.kernel(kernel)
    _check_compression(compress, named)
    tool = busybox.ensure(progress=progress)
    tree = _base(tool, busybox.applets(tool))
    if wanted:
        _put_modules(tree, _modules_of(named), {"named": wanted})
    if init is not None:
        script = Path(init)
        if not script.is_file():
            raise ConfigError(f"{script}: no such script", hint="--init takes a file of this host")
        tree.put("init.user", _File(script, 0o755))
    for source, target in add:
        _put_added(tree, Path(source), _target(Path(source), target), follow=True)
    _write(Path(out), tree, compress)
    return Path(out)


def _modules_of(kernel: Kernel | None) -> ModuleTree:
    from hypervisor.kernels.modules import ModuleTree  # noqa: PLC0415 - most archives hold none

    if kernel is None:
        raise ConfigError("modules are wanted, and no kernel is named that they are of", hint="kernel='debian'")
    if kernel.modules is None:
        raise ConfigError(f"the guest kernel {kernel.name} has no modules")
    return ModuleTree(kernel.modules)


def default(kernel: Kernel) -> Path:
    """Return an initramfs that gives a shell on the console of `kernel`, from the cache or made now.

    It loads the drivers of virtio devices and of the power button where the machine has them.

    Raises:
        ConfigError: if the kernel takes no initramfs.
        HostError: if it cannot be made.
    """
    from hypervisor.kernels import busybox  # noqa: PLC0415 - the two need each other
    from hypervisor.kernels.cache import Slot, refusals  # noqa: PLC0415 - the same
    from hypervisor.kernels.progress import Progress  # noqa: PLC0415 - the same

    if not kernel.is_linux:
        raise ConfigError(f"the guest {kernel.name} is no Linux kernel: it takes no initramfs")
    slot = Slot("initramfs", kernel.name)
    fingerprint = _fingerprint(kernel)
    manifest = slot.current()
    if manifest is None or manifest.fingerprint != fingerprint or manifest.damage(deep=False):
        tool = busybox.ensure()
        with refusals("an initramfs", slot.folder), slot.locked(Progress()), slot.workspace() as work:
            tree = _base(tool, busybox.applets(tool))
            if kernel.modules is not None:
                found = _modules_of(kernel)
                lists = {"virtio": VIRTIO, "power": POWER_BUTTON}
                _put_modules(
                    tree, found, {key: [name for name in names if found.has(name)] for key, names in lists.items()}
                )
            made = work / "made"
            made.mkdir()
            _write(made / "initramfs.cpio", tree, "none")
            roles = {"image": "initramfs.cpio"}
            manifest = slot.publish(made, version=kernel.version, fingerprint=fingerprint, roles=roles, notes=[])
    return manifest.folder / "initramfs.cpio"


def _fingerprint(kernel: Kernel) -> str:
    """Return a hash of what the default initramfs of `kernel` is made of; a kernel's folder is named by its content."""
    from hashlib import sha256  # noqa: PLC0415 - only the default archive has a fingerprint

    parts = (INIT, POWER_SCRIPT, *FOLDERS, *VIRTIO, *POWER_BUTTON, str(kernel.image.parent))
    return sha256("\0".join(parts).encode()).hexdigest()

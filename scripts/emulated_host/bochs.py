"""A VT-x host: the distribution's kernel and its kvm_intel under Bochs, which emulates an Intel CPU with VMX.

Slower still than the AMD-V host (some 25 million instructions a second, one CPU), so everything it has lies in a lean
initramfs: the root image's Python without what guests do not need, and the checkout. An ISO boots it.
"""

from __future__ import annotations

import ctypes
import os
import pty
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from emulated_host.errors import HostCannotError, call, find_tool, say
from emulated_host.machine import LOG_BYTES, PR_SET_PDEATHSIG
from emulated_host.recipe import INSIDE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from emulated_host.image import Image

VERSION: Final = 1
"""Raise this when the way the base archive is made changes, so that old ones are no longer taken."""

PACKAGES: Final = "bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso binutils"
"""Debian packages that bring FILES and PROGRAMS."""

PROGRAMS: Final = ("bochs-bin", "xorriso", "objcopy")

BIOS: Final = "/usr/share/bochs/BIOS-bochs-latest"
VGA_BIOS: Final = "/usr/share/vgabios/vgabios.bin"
BOOT_FILES: Final = ("/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32")
DISPLAY: Final = "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so"
FILES: Final = (BIOS, VGA_BIOS, *BOOT_FILES, DISPLAY)

APPEND: Final = (
    *("console=ttyS0,115200", "panic=-1", "mitigations=off", "nokaslr", "random.trust_cpu=on"),
    # Self-tests of the crypto code take half of the boot; the rest is what takes seconds and no guest needs.
    "cryptomgr.notests",
    "initcall_blacklist=load_system_certificate_list,init_kprobe_trace,crypto_kdf108_init,slab_sysfs_init",
)

MODULES: Final = ("virt/lib/irqbypass", "arch/x86/kvm/kvm", "arch/x86/kvm/kvm-intel")
"""Kernel modules, in the order of loading."""

STRIP: Final = ("-g", "-R", ".BTF", "-R", ".rela__mcount_loc", "-R", "__mcount_loc")
"""What loading a module spends most of its time on: types for BPF, and patching the calls of the function tracer."""

LIBRARIES: Final = (
    "libc.so.6",
    "libm.so.6",
    "libz.so.1",
    "libexpat.so.1",
    "libffi.so.8",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libutil.so.1",
)
LIBRARIES_IN: Final = "usr/lib/x86_64-linux-gnu"

NOT_STDLIB: Final = frozenset(
    (
        *("__pycache__", "test", "idlelib", "tkinter", "lib2to3", "distutils", "ensurepip", "pydoc_data", "turtledemo"),
        *("unittest", "venv", "xmlrpc", "wsgiref", "dbm", "curses", "sqlite3", "multiprocessing"),
    )
)
"""Folders of the standard library that stay outside."""

WHEELS: Final = ("cffi", "structlog", "iced_x86")
"""Installed packages that come along, beside cffi's extension module."""

BOOT_SECONDS: Final = 600.0
"""A boot takes fifteen seconds; a machine with other work on it may take several times that."""

TIMED_OUT: Final = 124


class Mark(NamedTuple):
    """A line of inside/init-vtx in the command's output."""

    word: str
    """"start" or "end"."""
    status: int
    """The command's exit status; 0 in a "start"."""


class Splitter:
    """Takes the first serial port's bytes apart: log, output, marks."""

    def __init__(self, secret: str) -> None:
        """Look for marks that carry `secret`, which nothing else prints."""
        self._lead = b"\x1e" + secret.encode() + b" "
        self._held = b""

    def feed(self, data: bytes) -> Iterator[bytes | Mark]:
        """Yield what `data` completes, in order; a beginning that may become a mark is held back."""
        held = self._held + data
        while True:
            at = held.find(self._lead)
            if at < 0:
                keep = self._suffix(held)
                self._held = held[len(held) - keep :]
                if len(held) > keep:
                    yield held[: len(held) - keep]
                return
            end = held.find(b"\n", at)
            if end < 0:
                self._held = held[at:]
                if at:
                    yield held[:at]
                return
            if at:
                yield held[:at]
            word, *status = held[at + len(self._lead) : end].decode(errors="replace").split()
            yield Mark(word, int(status[0]) if status else 0)
            held = held[end + 1 :]

    def _suffix(self, data: bytes) -> int:
        """Return how many bytes at the end of `data` may begin a mark."""
        longest = min(len(data), len(self._lead) - 1)
        return next((n for n in range(longest, 0, -1) if data.endswith(self._lead[:n])), 0)


def check_installed() -> None:
    """Do nothing if all that this needs is installed.

    Raises:
        HostCannotError: something is missing; the message names the Debian packages.
    """
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    missing += [name for name in FILES if not Path(name).exists()]
    if missing:
        raise HostCannotError(f"--vt-x: {missing[0]} is missing: apt-get install {PACKAGES}")


def bochsrc(iso: Path, log: Path, ports: Sequence[str]) -> str:
    """Return Bochs's configuration: a Haswell CPU, 1 GiB, the ISO, and serial ports that write to the files `ports`."""
    lines = [
        "cpu: model=corei7_haswell_4770, count=1, ips=50000000, reset_on_triple_fault=0",
        "memory: guest=1024, host=1024",
        "clock: sync=none",
        f"romimage: file={BIOS}",
        f"vgaromimage: file={VGA_BIOS}",
        "pci: enabled=1, chipset=i440fx",
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        f'ata0-master: type=cdrom, path="{iso}", status=inserted',
        "boot: cdrom",
        "display_library: term",
        f'log: "{log}"',
        "panic: action=fatal",
        "error: action=ignore",
        "info: action=ignore",
        "debug: action=ignore",
    ]
    lines += [f"com{number}: enabled=1, mode=file, dev={port}" for number, port in enumerate(ports, 1)]
    return "\n".join(lines) + "\n"


def script_for(argv: Sequence[str], environment: Mapping[str, str], folder: str) -> str:
    """Return the shell script that runs a command inside."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*exports, f"cd {shlex.quote(folder)} || exit", f"exec {shlex.join(argv)}"]) + "\n"


def base_archive(image: Image) -> Path:
    """Return the part of the initramfs that no run changes, made from the root image's tree if need be."""
    archive = image.folder / f"vtx-{VERSION}.cpio"
    if not archive.is_file():
        layout = image.folder / f"vtx.new-{os.getpid()}"
        try:
            _lay_out_base(image, layout)
            unfinished = layout.with_suffix(".cpio")
            _write_archive(layout, unfinished)
            for older in image.folder.glob("vtx-*.cpio"):
                older.unlink(missing_ok=True)
            unfinished.rename(archive)
        finally:
            shutil.rmtree(layout, ignore_errors=True)
    return archive


def _lay_out_base(image: Image, layout: Path) -> None:
    """Copy what is wanted of the root image's tree to the folder `layout`."""
    tree, python = image.tree, f"python{image.facts['python']}"
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "etc", "modules", "usr/bin", "usr/lib64", LIBRARIES_IN):
        (layout / name).mkdir(parents=True)
    for name, target in (("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")):
        (layout / name).symlink_to(target)
    (layout / "usr/sbin").symlink_to("bin")
    wanted = ["usr/bin/busybox", f"usr/bin/{python}", "usr/lib64/ld-linux-x86-64.so.2", "etc/passwd", "etc/group"]
    for wish in (*wanted, *(f"{LIBRARIES_IN}/{library}" for library in LIBRARIES)):
        shutil.copy(tree / wish, layout / wish)
    for name in ("python3", "python"):
        (layout / "usr/bin" / name).symlink_to(python)
    for applet in call([tree / "bin/busybox", "--list"]).split():
        path = layout / "usr/bin" / applet
        if not path.exists():
            path.symlink_to("busybox")
    _copy_compiled(tree / "usr/lib" / python, layout / "usr/lib" / python, NOT_STDLIB)
    wheels = f"usr/local/lib/{python}/dist-packages"
    for name in WHEELS:
        _copy_compiled(tree / wheels / name, layout / wheels / name, frozenset(("__pycache__",)))
    for extension in (tree / wheels).glob("_cffi_backend.*.so"):
        shutil.copy(extension, layout / wheels)
    kernel = tree / "usr/lib/modules" / image.facts["kernel"] / "kernel"
    for module in MODULES:
        stripped = layout / "modules" / f"{Path(module).name}.ko"
        call([find_tool("objcopy"), *STRIP, kernel / f"{module}.ko", stripped])


def _copy_compiled(source: Path, target: Path, left_out: frozenset[str]) -> None:
    """Copy a folder of Python modules, compiled ones in the place of their sources."""
    for path, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in left_out]
        here = Path(path)
        there = target / here.relative_to(source)
        there.mkdir(parents=True)
        for name in files:
            if name.endswith(".so") and not name.startswith("_test"):
                shutil.copy(here / name, there)
        for compiled in (here / "__pycache__").glob("*.pyc"):
            shutil.copy(compiled, there / f"{compiled.name.split('.')[0]}.pyc")


def _write_archive(layout: Path, archive: Path) -> None:
    """Write the content of a folder as a cpio archive, in which all belongs to root."""
    sys.path.append(str(INSIDE.parents[2]))
    from hypervisor.cpio import CpioWriter  # noqa: PLC0415 - the checkout's, which the line above makes reachable

    with archive.open("wb") as file:
        writer = CpioWriter(file.write)
        for path, folders, files in os.walk(layout):
            folders.sort()
            for name in sorted(folders + files):
                item = Path(path, name)
                place = str(item.relative_to(layout))
                if item.is_symlink():
                    writer.symlink(place, str(item.readlink()))
                elif item.is_dir():
                    writer.folder(place)
                else:
                    writer.file(place, item.read_bytes(), 0o755 if os.access(item, os.X_OK) else 0o644)
        writer.finish()


def make_iso(image: Image, layout: Path, script: str, secret: str, work: Path) -> Path:
    """Make the disc that boots the emulated host.

    Args:
        image: the root image.
        layout: a folder with the checkout and all else that goes over the base; the run's own files are added to it.
        script: what runs the command.
        secret: what marks carry.
        work: the run's folder.
    """
    shutil.copy(INSIDE / "init-vtx", layout / "init")
    (layout / "init").chmod(0o755)
    (layout / "command").write_text(script)
    (layout / "mark").write_text(f"{secret}\n")
    disc = work / "disc"
    disc.mkdir()
    _write_archive(layout, disc / "run.img")
    shutil.copy(base_archive(image), disc / "base.img")
    shutil.copy(image.kernel, disc / "vmlinuz")
    for name in BOOT_FILES:
        shutil.copy(name, disc)
    append = " ".join((*APPEND, "quiet"))
    menu = f"DEFAULT linux\nPROMPT 0\nLABEL linux\n  KERNEL vmlinuz\n  INITRD base.img,run.img\n  APPEND {append}\n"
    (disc / "isolinux.cfg").write_text(menu)
    iso = work / "host.iso"
    boot = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    call([find_tool("xorriso"), "-as", "mkisofs", "-quiet", "-J", "-R", *boot, "-o", iso, disc])
    shutil.rmtree(disc)
    return iso


class Run:
    """One command in Bochs, from the start to its status."""

    def __init__(self, secret: str, timeout: float | None, *, verbose: bool) -> None:
        """Prepare; `timeout` is in seconds and includes the boot."""
        self._splitter = Splitter(secret)
        self._verbose = verbose
        self._began = time.monotonic()
        self._timeout = timeout
        self._running = False
        self._log = b""
        self._screen = b""

    def follow(self, output: int, errors: int, screen: int) -> int:
        """Pass on what comes from Bochs's descriptors and return the command's status, or 124 after the timeout.

        Raises:
            HostCannotError: the emulated host did not come up, or ended before the command did.
        """
        while True:
            ready, _, _ = select.select([output, errors, screen], [], [], self._seconds_left())
            if errors in ready:
                self._pass_on(2, os.read(errors, LOG_BYTES))
            if screen in ready:
                self._look_at(screen)
            if output in ready:
                data = os.read(output, LOG_BYTES)
                if not data:
                    raise self._failure("the emulated host ended before the command did")
                for part in self._splitter.feed(data):
                    status = self._take(part)
                    if status is not None:
                        return self._finish(errors, status)
            if self._seconds_left() == 0:
                if not self._timed_out():
                    raise self._failure(f"the emulated host was not up after {BOOT_SECONDS:g} s")
                say(f"the command did not end within {self._timeout:g} s")
                return TIMED_OUT

    def _seconds_left(self) -> float | None:
        """Return the seconds until the next deadline, 0 once it has passed, None if there is none."""
        limits = [] if self._timeout is None else [self._timeout]
        if not self._running:
            limits.append(BOOT_SECONDS)
        return max(0.0, self._began + min(limits) - time.monotonic()) if limits else None

    def _timed_out(self) -> bool:
        return self._timeout is not None and time.monotonic() >= self._began + self._timeout

    def _look_at(self, screen: int) -> None:
        """Keep the end of what is on the emulated screen: there Bochs and the BIOS complain."""
        try:
            self._screen = (self._screen + os.read(screen, LOG_BYTES))[-LOG_BYTES:]
        except OSError:
            pass  # EIO: Bochs is gone, and the first port will say so

    def _take(self, part: bytes | Mark) -> int | None:
        """Deal with a piece of the first port's output; return the status if that is the end."""
        if isinstance(part, Mark):
            if self._verbose:
                say(f"{part.word} after {time.monotonic() - self._began:.1f} s")
            if part.word == "end":
                return part.status
            if self._running:
                raise self._failure("the emulated host started anew while the command ran: its kernel panicked")
            self._running = True
        elif self._running:
            self._pass_on(1, part)
        else:
            self._log = (self._log + part)[-LOG_BYTES:]
            if self._verbose:
                self._pass_on(2, part.replace(b"\r", b""))
            if b"Kernel panic" in self._log:
                raise self._failure("the emulated host's kernel panicked")
        return None

    def _finish(self, errors: int, status: int) -> int:
        """Pass on the rest of stderr, all of which was sent before the mark."""
        while select.select([errors], [], [], 0)[0] and (data := os.read(errors, LOG_BYTES)):
            self._pass_on(2, data)
        return status

    @staticmethod
    def _pass_on(descriptor: int, data: bytes) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    def _failure(self, text: str) -> HostCannotError:
        said = self._screen if not self._log else b"" if self._verbose else self._log
        log = said.decode(errors="replace").replace("\r", "")[-2000:]
        return HostCannotError(f"{text}; the end of its log follows" if log else text, log)


def run(iso: Path, secret: str, work: Path, timeout: float | None, *, verbose: bool) -> int:
    """Boot the disc and return the command's exit status. Nothing of Bochs is left afterwards.

    Raises:
        HostCannotError: the emulated host failed.
    """
    (work / "rc").write_text("c\n")  # Debian's build stops at its debugger's prompt: continue
    output, output_in = os.pipe()
    errors, errors_in = os.pipe()
    screen, terminal = pty.openpty()
    with ExitStack() as stack:
        for descriptor in (output, errors, screen):
            stack.callback(os.close, descriptor)
        try:
            ports = [f"/proc/self/fd/{descriptor}" for descriptor in (output_in, errors_in)]
            (work / "bochsrc").write_text(bochsrc(iso, work / "bochs.log", ports))
            argv = [find_tool("bochs-bin"), "-q", "-f", str(work / "bochsrc"), "-rc", str(work / "rc")]
            process = _start(argv, terminal, (output_in, errors_in))
        finally:
            for descriptor in (output_in, errors_in, terminal):
                os.close(descriptor)  # Bochs alone has them: when it ends, so do the streams
        stack.callback(process.wait)
        stack.callback(process.kill)
        try:
            return Run(secret, timeout, verbose=verbose).follow(output, errors, screen)
        except BrokenPipeError:  # nobody reads the output any more
            return 128 + signal.SIGPIPE


def _start(argv: Sequence[str], terminal: int, ports: tuple[int, int]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it died before prctl

    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "linux"},
        pass_fds=ports,
        start_new_session=True,  # Ctrl-C at the terminal is not for Bochs
        preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads here
    )


def new_secret() -> str:
    """Return what the marks of a run carry."""
    return secrets.token_hex(8)

"""The root image: built once for a recipe, kept in the cache, shared read-only by all runs."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from emulated_host.apt import fetch_all
from emulated_host.errors import HostCannotError, call, find_tool, say
from emulated_host.ext4 import make_image
from emulated_host.recipe import INSIDE, KERNELS, PACKAGES, Recipe, cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

LEFT_OUT: Final = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "var")
"""Parts of packages that nobody reads in an emulated host."""

MERGED: Final = ("bin", "sbin", "lib", "lib64")
"""Folders that are links into /usr, as in every current Debian; packages are free to unpack through them."""

PLATFORMS: Final = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
"""Wheels that run with the C library of Debian 12 and anything later."""

UNUSED_DAYS: Final = 30
"""Images of other recipes that no run took for this long are removed when a new one is built."""


class Image(NamedTuple):
    """A finished root image in its folder."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The raw ext4 root disk."""
        return self.folder / "root.ext4"

    @property
    def kernel(self) -> Path:
        """The distribution's kernel, a bzImage."""
        return self.folder / "vmlinuz"

    @property
    def tree(self) -> Path:
        """What `disk` was made from."""
        return self.folder / "root"

    @property
    def facts(self) -> dict[str, str]:
        """What the building found out: "kernel" and "python" versions, "disk" controller ("nvme" or "virtio-blk")."""
        facts: dict[str, str] = json.loads((self.folder / "facts.json").read_text())
        return facts

    def native_python(self) -> tuple[list[str], dict[str, str]]:
        """Return the argv and environment that run the image's own Python out here, at full speed."""
        return native_python(self.tree, self.facts["python"])


def native_python(tree: Path, version: str) -> tuple[list[str], dict[str, str]]:
    """Return the argv and environment that run the Python `version` ("3.11") of an unpacked tree on this machine."""
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    loader = tree / "lib64/ld-linux-x86-64.so.2"
    argv = [str(loader), "--library-path", str(libraries), str(tree / f"usr/bin/python{version}"), "-B", "-s"]
    return argv, {**os.environ, "PYTHONHOME": str(tree / "usr"), "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


def ready_image(recipe: Recipe, checkout: Path, *, rebuild: bool = False) -> Image:
    """Return the image of this recipe, building it first if it is not in the cache.

    Args:
        recipe: what it is made of.
        checkout: where a virtual environment with pip may be found.
        rebuild: build it anew, with today's packages.

    Raises:
        HostCannotError: it cannot be built here.
    """
    cache = cache_folder()
    image = Image(cache / recipe.key())
    if not image.folder.is_dir() or rebuild:
        with _one_builder(cache, recipe):
            if rebuild or not image.folder.is_dir():
                _build(recipe, checkout, image)
                _forget_unused(cache)
    os.utime(image.folder)
    return image


@contextmanager
def _one_builder(cache: Path, recipe: Recipe) -> Iterator[None]:
    """Hold the lock of a recipe's image; wait for whoever builds it now."""
    with (cache / f"{recipe.key()}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run that builds the image")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(recipe: Recipe, checkout: Path, image: Image) -> None:
    """Build in a folder beside, and rename that when all is done: there are no half-built images."""
    began = time.monotonic()
    say(f"building its root image in {image.folder} (once; about a minute)")
    find_tool("mke2fs")
    for stale in image.folder.parent.glob(f"{image.folder.name}.new-*"):
        shutil.rmtree(stale)  # under the lock, so nobody builds there any more
    work = Path(tempfile.mkdtemp(prefix=f"{image.folder.name}.new-", dir=image.folder.parent))
    try:
        tree = work / "root"
        say("  packages ...")
        _unpack(fetch_all(work / "apt", PACKAGES, KERNELS), tree)
        shutil.rmtree(work / "apt")
        facts = _finish_kernel(tree, work)
        facts["python"] = (tree / "usr/bin/python3").readlink().name.removeprefix("python")
        say("  Python packages ...")
        _install_wheels(recipe, checkout, tree, facts["python"])
        _compile(tree, facts["python"])
        say("  disk ...")
        _finish_tree(tree)
        make_image(tree, work / "root.ext4")
        (work / "facts.json").write_text(json.dumps(facts))
        work.chmod(0o755)
        if image.folder.is_dir():
            image.folder.rename(work / "old")  # runs that use it keep their open files
        work.rename(image.folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(image.folder / "old", ignore_errors=True)
    say(f"  done in {time.monotonic() - began:.0f} s")


def _unpack(packages: list[Path], tree: Path) -> None:
    """Unpack .deb files over each other; no maintainer script runs."""
    for name in MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    left_out = [f"--exclude=./{path}" for path in LEFT_OUT]
    for package in packages:
        archive = subprocess.Popen([find_tool("dpkg-deb"), "--fsys-tarfile", package], stdout=subprocess.PIPE)
        tar: list[str | Path] = [
            find_tool("tar"),
            "-x",
            "--keep-directory-symlink",
            "--no-same-owner",
            *left_out,
            "-C",
            tree,
        ]
        unpacked = subprocess.run(tar, stdin=archive.stdout, stderr=subprocess.PIPE, check=False)
        if archive.wait() or unpacked.returncode:
            raise HostCannotError(f"cannot unpack {package.name}", unpacked.stderr.decode(errors="replace"))


def _finish_kernel(tree: Path, work: Path) -> dict[str, str]:
    """Take the kernel out of the tree, index its modules, and find out which disk it can mount without an initramfs."""
    kernel = next((tree / "boot").glob("vmlinuz-*"))
    version = kernel.name.removeprefix("vmlinuz-")
    built_in = set(re.findall(r"^(CONFIG_\w+)=y$", (tree / f"boot/config-{version}").read_text(), re.MULTILINE))
    if "CONFIG_BLK_DEV_NVME" in built_in:
        disk = "nvme"
    elif {"CONFIG_VIRTIO_BLK", "CONFIG_VIRTIO_PCI"} <= built_in:
        disk = "virtio-blk"
    else:
        raise HostCannotError(f"kernel {version} has neither NVMe nor virtio-blk built in, so it cannot mount its root")
    kernel.rename(work / "vmlinuz")
    shutil.rmtree(tree / "boot")
    # The tree's own depmod, run by the tree's own loader; kmod goes by the name it is called by.
    depmod = work / "depmod"
    depmod.symlink_to(tree / "bin/kmod")
    loader: list[str | Path] = [
        tree / "lib64/ld-linux-x86-64.so.2",
        "--library-path",
        tree / "usr/lib/x86_64-linux-gnu",
    ]
    call([*loader, depmod, "-b", tree, version])
    depmod.unlink()
    return {"kernel": version, "disk": disk}


def _install_wheels(recipe: Recipe, checkout: Path, tree: Path, version: str) -> None:
    """Install the requirements for the tree's Python with a pip of this machine, under its own configuration."""
    packages = tree / f"usr/local/lib/python{version}/dist-packages"
    target = ["--python-version", version, "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    quiet = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--no-compile", "--no-user"]
    options: list[str | Path] = ["--only-binary=:all:", "--target", packages, *target, *quiet]
    call([*_find_pip(checkout), "install", *options, *recipe.requirements])
    # The programs' first lines name a Python of this machine; inside, `python3 -m` does it.
    shutil.rmtree(packages / "bin", ignore_errors=True)


def _find_pip(checkout: Path) -> list[str]:
    environments = (checkout / ".venv", Path(os.environ.get("VIRTUAL_ENV") or "/usr"))
    for python in (*(str(path / "bin/python3") for path in environments), sys.executable, "/usr/bin/python3"):
        pip = [python, "-m", "pip"]
        try:
            subprocess.run([*pip, "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return pip
    raise HostCannotError("pip is missing: install Debian's package python3-pip, or make the .venv with scripts/setup")


def _compile(tree: Path, version: str) -> None:
    """Compile all Python sources of the tree: inside it would take twenty times longer, and at every run."""
    python, environment = native_python(tree, version)
    compiler: list[str | Path] = [
        *python,
        "-m",
        "compileall",
        "-q",
        "--invalidation-mode",
        "unchecked-hash",
        "-s",
        tree,
        "-p",
        "/",
    ]
    # compileall's own parallel mode starts Python by a path that needs this system's C library: two processes instead.
    folders = [tree / f"usr/lib/python{version}", tree / "usr/local/lib"]
    running = [
        subprocess.Popen(
            [*compiler, folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for folder in folders
    ]
    said = [process.communicate()[0].decode(errors="replace") for process in running]
    if any(process.returncode for process in running):
        raise HostCannotError("cannot compile the image's Python files", "".join(said)[-2000:])


def _finish_tree(tree: Path) -> None:
    """Add what maintainer scripts would have made: mount points, a shell and its friends, a few files of /etc."""
    for name in ("dev", "proc", "sys", "run", "tmp", "mnt", "root", "out", "var/tmp"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for applet in call([tree / "bin/busybox", "--list-full"]).split():
        path = tree / "usr" / applet.removeprefix("usr/")
        if not path.exists() and not path.is_symlink():
            path.parent.mkdir(exist_ok=True)
            path.symlink_to("/bin/busybox")
    (tree / "usr/bin/python").symlink_to("python3")
    texts = {
        "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        "group": "root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 emulated\n",
        "hostname": "emulated\n",
        "ld.so.conf": "include /etc/ld.so.conf.d/*.conf\n",
    }
    for name, text in texts.items():
        (tree / "etc" / name).write_text(text)
    shutil.copy(INSIDE / "init", tree / "sbin/emulated-host-init")
    (tree / "sbin/emulated-host-init").chmod(0o755)


def _forget_unused(cache: Path) -> None:
    """Remove images that no run took for UNUSED_DAYS."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for facts in cache.glob("*/facts.json"):
        if facts.parent.stat().st_mtime < oldest:
            shutil.rmtree(facts.parent, ignore_errors=True)

"""The guest that a test asks for: its marks, the options of the command line and the ini file, made one description."""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hypervisor.config import MachineConfig

__all__ = ["FAIL_ON", "GuestSpec", "merge"]

FAIL_ON: Final = (
    r"BUG: ",
    r"Oops: ",
    r"general protection fault",
    r"WARNING: CPU: ",
    r"Unable to handle kernel ",
    r"rcu: INFO: rcu\S* (self-)?detected",
    r"INFO: task \S+ blocked for more than",
)
"""Regular expressions for lines of a Linux kernel's console that fail a test. A panic always does."""
OWN: Final = (
    *("agent", "boot_timeout", "fail_on", "fresh", "hang_seconds", "ready", "setup", "share"),
    *("kernel", "append", "disks", "initrd"),
)
"""Keys of the mark that are not simply handed to MachineConfig."""
PROMPT: Final = "/ # "
SHARE_PLACE: Final = "/host"
TEST_WORDS: Final = "loglevel=5"
"""Added to the command line of a kernel that has a name: with "quiet" or without, warnings reach the console."""


class GuestSpec(NamedTuple):
    """A guest, described; two tests with equal descriptions can use the same machine, one after the other.

    Attributes:
        kernel: path or name.
        settings: what else MachineConfig takes, sorted by name.
        agent: whether the guest runs the agent, which `run`, `copy_in` and the like need; None: Linux guests do.
        ready: a regular expression for the guest's console: when it has come, and the agent is there if there is one,
            the guest is ready for tests, and is reset to that moment for each. None: see `ready_text`.
        share: folders of the host and where the guest sees them.
        setup: commands for the guest's shell, run once after its boot; tests start after them.
        fresh: boot a machine for this test alone.
        boot_timeout: seconds from the start until the guest is ready.
        hang_seconds: seconds without any sign of progress after which the guest counts as hung; 0: never.
        fail_on: regular expressions for lines of the console that fail the test.
    """

    kernel: str
    settings: tuple[tuple[str, Any], ...] = ()
    agent: bool | None = None
    ready: str | None = None
    share: tuple[tuple[str, str], ...] = ()
    setup: tuple[str, ...] = ()
    fresh: bool = False
    boot_timeout: float = 60.0
    hang_seconds: float = 30.0
    fail_on: tuple[str, ...] = FAIL_ON

    def key(self) -> str:
        """Return 16 hexadecimal digits for what decides the machine, with the files that it is made from."""
        files = [self.kernel, *_paths(self.settings)]
        if self.share:
            from hypervisor.testing.disks import host_folder_image  # noqa: PLC0415 - few guests share a folder

            files += [host_folder_image(folder) for folder, _ in self.share]  # named by what is in the folder
        stamps = [(path, _stamp(path)) for path in files]
        parts = [self.kernel, self.settings, self.agent, self.ready, self.share, self.setup, stamps]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()[:16]

    @property
    def is_linux(self) -> bool:
        """Whether the kernel takes an initramfs and an agent: a named Linux, or a file that looks like one."""
        if self.agent is not None:
            return self.agent
        from hypervisor import kernels  # noqa: PLC0415 - a test session without guests reads no catalogue

        if self.kernel in kernels.names():
            return self.kernel in kernels.LINUX
        return looks_like_linux(self.kernel)

    @property
    def ready_text(self) -> str | None:
        """The regular expression to wait for: `ready`, or the prompt of the initramfs that hv makes."""
        is_own = self.is_linux and not {"initrd", "append"} & {name for name, _ in self.settings}
        return PROMPT if self.ready is None and is_own else self.ready

    @property
    def has_moment(self) -> bool:
        """Whether there is a moment at which the guest is ready, so that it can be put back to it."""
        return self.is_linux or self.ready is not None

    def config(self, **changes: Any) -> MachineConfig:
        """Return the machine's description; `changes` win over the spec's own settings."""
        from hypervisor.config import MachineConfig  # noqa: PLC0415 - as above

        settings = dict(self.settings) | changes
        if "append" not in settings and self.is_linux:
            settings["append"] = default_command_line(self.kernel)
        return MachineConfig(self.kernel, **settings)

    def title(self) -> str:
        """Return the guest in a few words: "debian cpus=2"."""
        words = [os.path.basename(self.kernel)]
        words += [f"{name}={value}" for name, value in self.settings if name in {"cpus", "ram_mib"}]
        return " ".join(words)


def default_command_line(kernel: str) -> str:
    """Return the command line of a Linux guest whose mark has none."""
    from hypervisor import kernels  # noqa: PLC0415 - as above

    found = kernels.find(kernel)
    own = "console=ttyS0 panic=-1" if found is None else found.command_line
    return f"{own} quiet {TEST_WORDS}"


def looks_like_linux(path: str) -> bool:
    """Tell by a file's content: a bzImage has its magic, a vmlinux its banner; anything else is none."""
    try:
        with open(path, "rb") as file:
            head = file.read(0x210)
            if head[0x202:0x206] == b"HdrS":
                return True
            if not head.startswith(b"\x7fELF"):
                return False
            file.seek(0)
            tail = b""
            while chunk := file.read(1 << 22):
                if b"Linux version " in tail + chunk:
                    return True
                tail = chunk[-16:]
    except OSError as error:
        raise ConfigError(f"cannot read kernel {path}: {error.strerror}") from error
    return False


def merge(marks: Iterable[Mapping[str, Any]], kernel: str, defaults: Mapping[str, Any]) -> GuestSpec:
    """Make one description of a test's marks.

    Args:
        marks: keyword arguments of its `guest` marks, the closest to the test first: each value is taken from the
            first one that has it.
        kernel: the kernel, already chosen.
        defaults: `boot_timeout`, `hang_seconds` and `fail_on` of the session.

    Raises:
        ConfigError: a key that is not known, or a value that it cannot have.
    """
    from hypervisor.config import MachineConfig  # noqa: PLC0415 - as above

    values: dict[str, Any] = {}
    for mark in reversed(list(marks)):
        values |= mark
    known = {*OWN, *MachineConfig.__slots__}
    for name in values:
        if name not in known:
            raise ConfigError(f"the guest mark has no key {name!r}", hint=f"known keys: {', '.join(sorted(known))}")
    fail_on = values.pop("fail_on", defaults["fail_on"])
    values.pop("kernel", None)
    spec = GuestSpec(
        kernel,
        agent=values.pop("agent", None),
        ready=values.pop("ready", None),
        share=_shares(values.pop("share", ())),
        setup=tuple(_listed(values.pop("setup", ()))),
        fresh=bool(values.pop("fresh", False)),
        boot_timeout=float(values.pop("boot_timeout", defaults["boot_timeout"])),
        hang_seconds=float(values.pop("hang_seconds", defaults["hang_seconds"])),
        fail_on=(fail_on,) if isinstance(fail_on, str) else tuple(fail_on),
        settings=_settings(values),
    )
    for pattern in (*spec.fail_on, *([spec.ready] if spec.ready else [])):
        _check_pattern(pattern)
    if spec.settings:  # a wrong value is the test's own mistake, and named before anything boots
        MachineConfig(kernel, **dict(spec.settings))
    return spec


def _settings(values: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return what MachineConfig takes, in a form that can be compared."""
    if "disks" in values:
        values["disks"] = tuple(_disk(one) for one in _listed(values["disks"]))
    for name in ("nets", "ports", "modules"):
        if name in values:
            values[name] = tuple(_listed(values[name]))
    for name in ("initrd", "symbols"):
        if values.get(name) is not None:
            values[name] = os.fspath(values[name])
    return tuple(sorted((name, value) for name, value in values.items() if value is not None))


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | dict | os.PathLike) else list(value)


def _disk(what: Any) -> Any:
    """Return a disk's description, whose image no test may change unless it says so.

    Several tests, and several processes, start from the same image: what a guest writes goes to memory.
    """
    if isinstance(what, os.PathLike):
        what = os.fspath(what).replace(",", ",,")
    if isinstance(what, str) and not re.search(r"(?<!,),(?!,)(readonly|overlay=|inplace\b)", what):
        return f"{what},overlay=memory"
    if isinstance(what, str):
        return re.sub(r",inplace\b", "", what)
    return what


def _shares(value: Any) -> tuple[tuple[str, str], ...]:
    """Return (folder of the host, place in the guest) from a path, or from a table of such pairs."""
    if not value:
        return ()
    pairs = value.items() if isinstance(value, dict) else [(value, SHARE_PLACE)]
    shares = []
    for folder, place in pairs:
        path = os.path.abspath(os.fspath(folder))
        if not os.path.isdir(path):
            raise ConfigError(f"share is {path!r}", hint="it is a folder of this host")
        if not str(place).startswith("/"):
            raise ConfigError(f"share {path!r} goes to {place!r}", hint="that is an absolute path in the guest")
        shares.append((path, str(place)))
    return tuple(shares)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from error


def _paths(settings: Iterable[tuple[str, Any]]) -> list[str]:
    found = []
    for name, value in settings:
        if name == "initrd":
            found.append(str(value))
        elif name == "disks":
            found += [one.split(",")[0].removeprefix("path=") for one in value if isinstance(one, str)]
    return found


def _stamp(path: str) -> tuple[int, int] | None:
    """Return a file's size and time of change, None where there is none: a kernel that has a name, say."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns

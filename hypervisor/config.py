"""What a machine is made of: checked at birth, units in the names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from hypervisor import layout
from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike
    from typing import Any

    from hypervisor.options import BalloonConfig, DiskConfig, NetConfig, PortConfig, RngConfig, VsockConfig

MIN_RAM_MIB: Final = 1
MAX_RAM_MIB: Final = 1 << 20
MAX_CPUS: Final = 255
"""As many as have an 8-bit APIC id, 255 being broadcast: what the MP table and the MADT's entries can name."""
CHOICES: Final = {
    "flat": (None, 16, 32, 64),
    "decompress": ("guest", "host"),
    "protocol": ("auto", "linux64", "pvh"),
    "irqchip": ("kernel", "none"),
    "debug_exit": ("qemu", "raw"),
    "virtio": ("pci", "mmio"),
}
MOST_DEVICES: Final = {"pci": 31, "mmio": len(layout.VIRTIO_MMIO_GSIS)}
"""PCI has device numbers 1 to 31; the host bridge is number 0."""


class MachineConfig:
    """A machine, described. Immutable; every value is checked here, so that a Machine gets none that is wrong.

    Attributes:
        kernel: path of a kernel image (bzImage, ELF, multiboot, flat), the image itself as bytes, or the name of a
            kernel of `hv kernel list`.
        initrd: path of an initial RAM disk, or None.
        append: the kernel's command line; None takes the default of a kernel that is named, else an empty one.
        modules: multiboot modules, "PATH" or "PATH STRING" each.
        ram_mib: guest RAM in MiB.
        cpus: number of vCPUs.
        cpu: CPU model: "host", then ",+FEATURE" and ",-FEATURE" as often as wanted.
        flat: 16, 32 or 64: the kernel is a flat binary for that mode. None looks at its content.
        decompress: who unpacks a bzImage, "guest" or "host".
        protocol: entry of an ELF kernel that has several: "auto", "linux64", "pvh".
        irqchip: "kernel" for KVM's interrupt controllers and PIT; "none" for a machine without: there HLT ends it.
        debug_exit: status when the guest writes v to port 0xf4: "qemu" gives (v << 1) | 1, "raw" gives v.
        symbols: System.map or ELF file to name addresses of a dead guest by; None looks beside the kernel.
        force: try a Linux kernel on a software KVM all the same.
        disks: what `hv run --disk` takes: texts, tables or a DiskConfig of `hypervisor.options`; so are the rest.
        nets: network interfaces.
        ports: of the virtio console.
        rng: an entropy source, or None; True stands for one without a limit.
        vsock: a vsock device, or None.
        balloon: a memory balloon, or None; True stands for an empty one.
        virtio: what the guest finds them by: "pci" or "mmio".
    """

    append: str | None
    balloon: BalloonConfig | None
    cpu: str
    cpus: int
    debug_exit: str
    decompress: str
    disks: tuple[DiskConfig, ...]
    flat: int | None
    force: bool
    initrd: str | PathLike[str] | None
    irqchip: str
    kernel: str | PathLike[str] | bytes
    modules: tuple[str, ...]
    nets: tuple[NetConfig, ...]
    ports: tuple[PortConfig, ...]
    protocol: str
    ram_mib: int
    rng: RngConfig | None
    symbols: str | PathLike[str] | None
    virtio: str
    vsock: VsockConfig | None

    __slots__ = (
        *("append", "cpu", "cpus", "debug_exit", "decompress", "flat", "force", "initrd"),
        *("irqchip", "kernel", "modules", "protocol", "ram_mib", "symbols"),
        *("balloon", "disks", "nets", "ports", "rng", "virtio", "vsock"),
    )

    def __init__(  # noqa: PLR0913 - a machine is these facts, all of them by name
        self,
        kernel: str | PathLike[str] | bytes,
        *,
        initrd: str | PathLike[str] | None = None,
        append: str | None = None,
        modules: tuple[str, ...] = (),
        ram_mib: int = 256,
        cpus: int = 1,
        cpu: str = "host",
        flat: int | None = None,
        decompress: str = "guest",
        protocol: str = "auto",
        irqchip: str = "kernel",
        debug_exit: str = "qemu",
        symbols: str | PathLike[str] | None = None,
        force: bool = False,
        disks: Sequence[object] = (),
        nets: Sequence[object] = (),
        ports: Sequence[object] = (),
        rng: object = None,
        vsock: object = None,
        balloon: object = None,
        virtio: str = "pci",
    ) -> None:
        """Check and keep the description; raises ConfigError naming the value that is wrong."""
        values = locals()
        if disks or nets or ports or (rng, vsock, balloon) != (None, None, None):
            values |= _devices(values)
        for name in self.__slots__:
            object.__setattr__(self, name, values[name])
        _check_number("ram_mib", ram_mib, MIN_RAM_MIB, MAX_RAM_MIB, "MiB")
        _check_number("cpus", cpus, 1, MAX_CPUS, "vCPUs")
        for name, choices in CHOICES.items():
            if values[name] not in choices:
                wanted = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ConfigError(f"{name} is {values[name]!r}", hint=f"it is one of: {wanted}")
        if self.virtio_count > (most := MOST_DEVICES[virtio]):
            raise ConfigError(f"{self.virtio_count} virtio devices", hint=f"{most} find room on {virtio}")
        if irqchip == "none" and cpus > 1:
            raise ConfigError("irqchip none allows one vCPU only", hint="the others are started through their LAPICs")

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a description is for good; `replace` makes another."""
        raise AttributeError(f"MachineConfig is immutable; use replace({name}=...)")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__ if name != "kernel")
        kernel = f"<{len(self.kernel)} bytes>" if isinstance(self.kernel, bytes) else repr(self.kernel)
        return f"MachineConfig({kernel}, {shown})"

    def replace(self, **changes: Any) -> MachineConfig:
        """Return a copy with some values changed, checked again."""
        return MachineConfig(**{name: getattr(self, name) for name in self.__slots__} | changes)

    def to_plain(self) -> dict[str, Any]:
        """Return the description as texts, numbers, lists and tables; `MachineConfig(**plain)` makes it again."""
        plain: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if name in {"disks", "nets", "ports"}:
                plain[name] = [one._asdict() for one in value]
            elif hasattr(value, "_asdict"):
                plain[name] = value._asdict()
            elif isinstance(value, bytes):  # a kernel that is no file
                plain[name] = ""
            elif isinstance(value, list | tuple):
                plain[name] = list(value)
            else:
                plain[name] = value if isinstance(value, str | int | None) else os.fspath(value)
        return plain

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> MachineConfig:
        """Build a config from a TOML table; `source` names the file in errors.

        Raises:
            ConfigError: an unknown key or a value of the wrong type.
        """
        known = {name: _TYPES[name] for name in cls.__slots__}
        for key, value in values.items():
            if key not in known:
                raise ConfigError(f"{source}: unknown key {key!r}", hint=f"known keys: {', '.join(sorted(known))}")
            if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is int):
                wanted = getattr(known[key], "__name__", "text or a table")
                raise ConfigError(f"{source}: {key} is {value!r}", hint=f"it takes a {wanted}")
        if "kernel" not in values:
            raise ConfigError(
                f"{source}: no kernel is named", hint='write kernel = "PATH", or name one on the command line'
            )
        arguments = dict(values)
        arguments["modules"] = tuple(arguments.get("modules", ()))
        return cls(**arguments)

    @property
    def virtio_count(self) -> int:
        """How many virtio devices there are."""
        singles = (bool(self.ports), self.rng is not None, self.vsock is not None, self.balloon is not None)
        return len(self.disks) + len(self.nets) + sum(singles)

    @property
    def virtio_mmio_places(self) -> list[tuple[int, int]]:
        """Register address and GSI of every virtio-mmio device."""
        return layout.virtio_mmio_places(self.virtio_count) if self.virtio == "mmio" else []


_DEVICE: Final = (bool, str, dict)
_TYPES: Final[dict[str, type | tuple[type, ...]]] = {
    "balloon": _DEVICE,
    "disks": list,
    "nets": list,
    "ports": list,
    "rng": _DEVICE,
    "virtio": str,
    "vsock": _DEVICE,
    "kernel": str,
    "initrd": str,
    "append": str,
    "modules": list,
    "ram_mib": int,
    "cpus": int,
    "cpu": str,
    "flat": int,
    "decompress": str,
    "protocol": str,
    "irqchip": str,
    "debug_exit": str,
    "symbols": str,
    "force": bool,
}


def _check_number(name: str, value: object, low: int, high: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}", hint=f"it is a whole number from {low} to {high} {unit}")


def _devices(values: dict[str, Any]) -> dict[str, Any]:
    """Parse what describes virtio devices."""
    from hypervisor import options  # noqa: PLC0415 - most small guests have none

    parsed: dict[str, Any] = {}
    lists: dict[str, tuple[str, Any]] = {
        "disks": ("--disk", options.DiskConfig),
        "nets": ("--net", options.NetConfig),
        "ports": ("--port", options.PortConfig),
    }
    singles: dict[str, Any] = {
        "rng": options.RngConfig,
        "vsock": options.VsockConfig,
        "balloon": options.BalloonConfig,
    }
    for name, (option, kind) in lists.items():
        if isinstance(values[name], str):
            raise ConfigError(f"{name} is a text", hint=f'it is a list: {name} = ["..."]')
        parsed[name] = tuple(options.parse(kind, one, option) for one in values[name])
    for name, kind in singles.items():
        what = {} if values[name] is True else values[name]
        parsed[name] = None if what is None or what is False else options.parse(kind, what, f"--{name}")
    names = [port.name for port in parsed["ports"]]
    if len(set(names)) < len(names):
        raise ConfigError("two ports of the virtio console have the same name")
    return parsed

"""Devices in words: `path=disk.img,readonly` as the command line, a TOML file and the library take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from hypervisor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_CID: Final = 0xFFFF_FFFE
PORT: Final = 0xFFFF
CACHES: Final = ("writeback", "none", "unsafe")
PROTOCOLS: Final = ("tcp", "udp")


class DiskConfig(NamedTuple):
    """A disk.

    Attributes:
        path: image file (raw or qcow2, told apart by content) or block device.
        format: "raw" or "qcow2"; None tells by the content, and refuses a qcow2 image that names another file, since a
            guest can write such a header to a raw image. Without a name it could still make its raw image grow.
        readonly: whether the guest may only read.
        overlay: where writes go instead of the image: "memory", or a qcow2 file, made if need be; None: the image.
        serial: what the guest reads as the disk's serial number; at most 20 ASCII characters.
        cache: "writeback" (the host's page cache; a flush is durable), "none" (past it) or "unsafe" (flushes ignored).
        iops: most requests a second, None without a limit.
        bandwidth: most bytes a second, None without a limit.
    """

    path: str
    format: str | None = None
    readonly: bool = False
    overlay: str | None = None
    serial: str = ""
    cache: str = "writeback"
    iops: int | None = None
    bandwidth: int | None = None


class NetConfig(NamedTuple):
    """A network interface.

    Attributes:
        kind: "tap", "user", "link", "switch" or "none" (an interface whose cable leads nowhere).
        name: the TAP's or the link's; of a switch NETWORK/PORT, a `hypervisor.Network` of this process and its port.
        mac: the guest's address as aa:bb:cc:dd:ee:ff; None takes a random one.
        pcap: file to capture every frame in.
        forward: "HOSTPORT:GUESTPORT" or "HOSTPORT:GUESTPORT/udp" each; with "user" only.
    """

    kind: str
    name: str = ""
    mac: str | None = None
    pcap: str | None = None
    forward: tuple[str, ...] = ()

    def forwards(self) -> list[tuple[int, int, str]]:
        """Return the forwarded ports: on the host, in the guest, protocol."""
        return [_forward(text) for text in self.forward]


class PortConfig(NamedTuple):
    """A port of the virtio console.

    Attributes:
        name: what the guest finds it by, in /dev/virtio-ports; "" is the console itself, /dev/hvc0.
        socket: a unix socket to listen on.
        file: a file that takes the guest's output.
        inner: the program that has the machine is the other end (`devices.backends.ports_host.InnerPort`).
    """

    name: str = ""
    socket: str | None = None
    file: str | None = None
    inner: bool = False


class VsockConfig(NamedTuple):
    """A vsock device: the guest's address, and the unix socket that is the host's side."""

    cid: int
    path: str


class BalloonConfig(NamedTuple):
    """A memory balloon: how much it takes at first, and whether the guest reports pages that it does not use."""

    mib: int = 0
    reporting: bool = True


class RngConfig(NamedTuple):
    """An entropy source: at most so many bytes a second, None without a limit."""

    bandwidth: int | None = None


UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
FIRST_WORD: Final = {DiskConfig: "path", PortConfig: "name", VsockConfig: "cid", BalloonConfig: "mib"}
"""The key that may be left out when its value comes first."""
REPEATED: Final = {"forward"}

T = TypeVar("T", DiskConfig, NetConfig, PortConfig, VsockConfig, BalloonConfig, RngConfig)


def parse(kind: type[T], what: object, option: str) -> T:
    """Return the device that `what` describes.

    Args:
        kind: the class of the description.
        what: one of them, a text such as "disk.img,readonly", or a table of TOML.
        option: the option's name, for messages.

    Raises:
        ConfigError: an unknown key, or a value that it cannot have.
    """
    if isinstance(what, kind):
        values = dict(what._asdict())
    elif isinstance(what, str):
        values = _split(kind, what, option)
    elif isinstance(what, dict):
        values = dict(what)
    else:
        raise ConfigError(f"{option} is {what!r}", hint=f'it is a text such as "{option} KEY=VALUE,..." or a table')
    if kind is NetConfig:
        _name_net(values, option)
    for key in values:
        if key not in kind._fields:
            raise ConfigError(f"{option}: unknown key {key!r}", hint=f"known keys: {', '.join(kind._fields)}")
    values = {key: _convert(key, value, kind.__annotations__[key], option) for key, value in values.items()}
    for key in kind._fields:
        if key not in values and key not in kind._field_defaults:
            raise ConfigError(f"{option}: {key} is missing", hint=f"`hv run --help` shows what {option} takes")
    made: T = kind(**values)
    _CHECKS[kind](made, option)
    return made


def _split(kind: type, text: str, option: str) -> dict[str, Any]:
    """Take "first,key=value,flag" apart; a comma in a value is written twice."""
    values: dict[str, Any] = {}
    for position, word in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = word.replace("\0", ",").partition("=")
        if not equals and position == 0 and kind in FIRST_WORD:
            key, value = FIRST_WORD[kind], key
        elif not equals and not key:
            continue
        elif key in REPEATED:
            values[key] = (*values.get(key, ()), value)
            continue
        elif key in values:
            raise ConfigError(f"{option}: {key} is given twice")
        values[key] = value if equals or (position == 0 and kind in FIRST_WORD) else True
    return values


def _name_net(values: dict[str, Any], option: str) -> None:
    """Turn tap=NAME, link=NAME, switch=NETWORK/PORT, user and none into kind and name."""
    kinds = [key for key in ("tap", "user", "link", "switch", "none") if key in values]
    if "kind" in values:
        return
    if len(kinds) != 1:
        raise ConfigError(f"{option}: which network?", hint="it begins with tap=NAME, user, link=NAME or none")
    name = values.pop(kinds[0])
    values["kind"] = kinds[0]
    if kinds[0] in {"tap", "link", "switch"}:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{option}: {kinds[0]} needs a name", hint=f"{kinds[0]}=NAME")
        values["name"] = name


def _convert(key: str, value: Any, annotation: Any, option: str) -> Any:
    """Make of a value what its field holds."""
    wanted: str = annotation.__forward_arg__
    if wanted.startswith("bool"):
        return _switch(key, value, option)
    if wanted.startswith("int"):
        return _number(key, value, option)
    if wanted.startswith("tuple"):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    if value is None or (value == "" and key in {"serial", "name"}):
        return value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{option}: {key} has no value", hint=f"{key}=...")
    return value


def _switch(key: str, value: Any, option: str) -> bool:
    if isinstance(value, bool):
        return value
    if value in {"on", "off"}:
        return bool(value == "on")
    raise ConfigError(f"{option}: {key} is {value!r}", hint=f"{key}, {key}=on or {key}=off")


def _number(key: str, value: Any, option: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    text = str(value).lower()
    digits = text.rstrip("kmg")
    if not digits.isdecimal() or text[len(digits) :] not in UNITS:
        raise ConfigError(f"{option}: {key} is {value!r}", hint="it is a number, or one with a unit: 512, 64K, 10M, 1G")
    return int(digits) * UNITS[text[len(digits) :]]


def _forward(text: str) -> tuple[int, int, str]:
    ports, slash, protocol = text.partition("/")
    host, colon, guest = ports.partition(":")
    guest = guest if colon else host
    protocol = protocol if slash else "tcp"
    if not (host.isdecimal() and guest.isdecimal() and 0 < int(host) <= PORT and 0 < int(guest) <= PORT):
        raise ConfigError(f"forward is {text!r}", hint="it is HOSTPORT:GUESTPORT or HOSTPORT:GUESTPORT/udp, 1..65535")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"forward is {text!r}", hint="the protocol is tcp or udp")
    return int(host), int(guest), protocol


def _check_disk(disk: DiskConfig, option: str) -> None:
    if disk.format not in {None, "raw", "qcow2"}:
        raise ConfigError(f"{option}: format is {disk.format!r}", hint="it is raw or qcow2; left out it is told apart")
    if disk.cache not in CACHES:
        raise ConfigError(f"{option}: cache is {disk.cache!r}", hint=f"it is one of: {', '.join(CACHES)}")
    if len(disk.serial) > 20 or not disk.serial.isascii():
        raise ConfigError(f"{option}: serial is {disk.serial!r}", hint="at most 20 ASCII characters")
    for name, value in (("iops", disk.iops), ("bandwidth", disk.bandwidth)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option}: {name} is {value}", hint="it is above 0; leave it out for no limit")
    if disk.readonly and disk.overlay is not None:
        raise ConfigError(
            f"{option}: readonly and overlay contradict each other", hint="an overlay is there to write to"
        )


def _check_net(net: NetConfig, option: str) -> None:
    if net.kind not in {"tap", "user", "link", "switch", "none"}:
        raise ConfigError(f"{option}: kind is {net.kind!r}", hint="it is tap, user, link, switch or none")
    if net.forward and net.kind != "user":
        raise ConfigError(f"{option}: forward goes with user only", hint="user,forward=HOSTPORT:GUESTPORT")
    ports = [(host, protocol) for host, _, protocol in net.forwards()]
    for host, protocol in ports:
        if ports.count((host, protocol)) > 1:
            raise ConfigError(f"{option}: port {host}/{protocol} is forwarded twice", hint="one way for each port")
    if net.mac is not None:
        from devices.virtio.net import parse_mac  # noqa: PLC0415 - only a machine with a network needs it

        try:
            parse_mac(net.mac)
        except ValueError as error:
            raise ConfigError(
                f"{option}: {error}", hint="six bytes as 52:54:00:12:34:56, the first one even"
            ) from error


def _check_port(port: PortConfig, option: str) -> None:
    if [port.socket is not None, port.file is not None, port.inner].count(True) != 1:
        raise ConfigError(f"{option}: where does it lead?", hint="socket=PATH or file=PATH")


def _check_vsock(vsock: VsockConfig, option: str) -> None:
    if not 3 <= vsock.cid <= MAX_CID:
        raise ConfigError(f"{option}: cid is {vsock.cid}", hint="a guest's is 3 or more; 0 to 2 have a meaning")


def _check_balloon(balloon: BalloonConfig, option: str) -> None:
    if balloon.mib < 0:
        raise ConfigError(f"{option}: mib is {balloon.mib}", hint="it is how many MiB the balloon takes at first")


def _check_rng(rng: RngConfig, option: str) -> None:
    if rng.bandwidth is not None and rng.bandwidth <= 0:
        raise ConfigError(f"{option}: bandwidth is {rng.bandwidth}", hint="it is a number of bytes a second")


_CHECKS: Final[Mapping[Any, Any]] = {
    DiskConfig: _check_disk,
    NetConfig: _check_net,
    PortConfig: _check_port,
    VsockConfig: _check_vsock,
    BalloonConfig: _check_balloon,
    RngConfig: _check_rng,
}

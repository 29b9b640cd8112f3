"""`hv run`: a machine on this terminal."""

from __future__ import annotations

import gc
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

from hypervisor.cli.hostconsole import KINDS, HostConsole
from hypervisor.config import MachineConfig
from hypervisor.errors import ConfigError, HostError
from hypervisor.images import is_name
from hypervisor.machine import Machine
from hypervisor.outcome import Outcome, Stop

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from types import FrameType

    from hypervisor.profile.metrics import MetricsServer

SUMMARY: Final = "run a guest, its console on this terminal"
DESCRIPTION: Final = """\
Run a guest on KVM. KERNEL is a bzImage, an ELF vmlinux (64-bit entry or PVH), a multiboot image, a flat binary, or the
name of a kernel of `hv kernel list`. What it is is told by its content.

On the terminal: Ctrl-A x ends the guest, Ctrl-A h lists the other keys. SIGTERM presses the guest's power button, a
second SIGTERM ends it."""
EPILOG: Final = """\
examples:
  hv run debian
  hv run bzImage --initrd root.cpio.gz --append "console=ttyS0 quiet" --ram 1G --cpus 4
  hv run vmlinux --cpu host,-x2apic --console file=boot.log --timeout 60
  hv run kernel.elf --module "ramdisk.img ro" --debug-exit raw

disks, networks and more (--disk, --net and --port may be repeated; N takes K, M, G):
  --disk FILE[,readonly][,overlay=memory|QCOW2][,serial=TEXT][,cache=writeback|none|unsafe][,iops=N][,bandwidth=N]
         [,format=raw|qcow2]   told by the content if left out; qcow2 over a backing file must be named
  --net tap=NAME | user[,forward=HOSTPORT:GUESTPORT[/udp]]... | link=NAME | none   [,mac=ADDRESS][,pcap=FILE]
  --port socket=PATH | file=PATH          the console /dev/hvc0;  --port NAME,socket=PATH  a named port
  --vsock 3,path=/tmp/vm.vsock            host connects and says "CONNECT PORT"; the guest reaches PATH_PORT
  --balloon 64,reporting=off              takes 64 MiB at first; free pages are reported unless switched off

  hv run debian --disk root.qcow2 --append "console=ttyS0 root=/dev/vda" --net user,forward=2222:22 --rng
  hv run debian --disk base.img,overlay=memory --net tap=tap0,pcap=frames.pcap
  sudo ip netns exec lab hv run debian --net tap=tap0        a TAP of the network namespace lab

profile:
  --profile FILE[,every=N][,trace=off][,kernel=off]
         every=N samples where exits came from (RIP) only at one in N, 0 at none; trace=off writes counts and
         histograms, no single exits; kernel=off leaves out what KVM handles itself, which takes root and tracefs
  hv run debian --profile boot.hvprof --mark-text "Run /init"
  hv profile report boot.hvprof
  --profile-metrics PORT | HOST:PORT | unix=PATH   counters of the running machine at http://127.0.0.1:PORT/metrics, in
                                          Prometheus' format; port 0 takes one that is free. `hv top` needs no option.

exit status: 0 power-off, reset or halt; 2 bad usage, configuration or image; 3 the host cannot; 4 the guest died
(triple fault, kernel panic, KVM internal error); 5 a fault of hv; 124 timeout; 128+N signal N; else the guest's own.
"""
UNITS: Final = {"m": 1, "mib": 1, "g": 1024, "gib": 1024, "": 1}
TIMEOUT_STATUS: Final = 124
RUN_KEYS: Final[dict[str, Any]] = {
    "console": str,
    "timeout": (int, float),
    "log_level": str,
    "log_format": str,
    "profile": str,
    "profile_metrics": (str, int),
    "mark_port": int,
    "mark_text": str,
    "name": str,
}
"""Keys of a configuration file beside those of MachineConfig."""


def parse_ram(text: str) -> int:
    """Return MiB from "256", "512M" or "4G"."""
    digits = text.rstrip("GgMmIiBb")
    unit = text[len(digits) :].lower()
    if not digits.isdecimal() or unit not in UNITS:
        raise ConfigError(f"--ram {text!r}", hint="it is a number of MiB, or one with a unit: 256, 512M, 4G")
    return int(digits) * UNITS[unit]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `hv run`."""
    add = parser.add_argument
    add("kernel", nargs="?", metavar="KERNEL", help="image file, or the name of a kernel of `hv kernel list`")
    add("--initrd", metavar="FILE", help="initial RAM disk")
    add("--append", metavar="STRING", help="the kernel's command line")
    add("--module", dest="modules", action="append", metavar='"FILE [ARGS]"', help="multiboot module; repeatable")
    add("--ram", metavar="MIB", help="RAM: MiB, or with a unit as in 4G (default 256)")
    add("--cpus", type=int, metavar="N", help="number of vCPUs (default 1)")
    add("--cpu", metavar="SPEC", help="CPU model: host, then ,-FEATURE or ,+FEATURE (default host)")
    add("--flat", type=int, metavar="BITS", help="KERNEL is a flat binary for 16-, 32- or 64-bit mode")
    add("--decompress", metavar="WHO", help="who unpacks a bzImage: guest (default) or host")
    add("--protocol", metavar="NAME", help="entry of an ELF kernel: auto (default), linux64 or pvh")
    add("--irqchip", metavar="KIND", help="kernel (default), or none: no interrupts, and HLT ends the run")
    add("--debug-exit", metavar="HOW", help="status of `out 0xf4, v`: qemu (default) gives (v<<1)|1, raw gives v")
    add("--symbols", metavar="FILE", help="System.map or ELF file to name a dead guest's addresses by")
    add("--disk", dest="disks", action="append", metavar="FILE[,...]", help="raw, qcow2 or block device; see below")
    add("--net", dest="nets", action="append", metavar="KIND[,...]", help="network: tap=NAME, user, link=NAME or none")
    add("--rng", nargs="?", const=True, metavar="bandwidth=N", help="an entropy source")
    add("--port", dest="ports", action="append", metavar="[NAME],WHERE", help="port of a virtio console; see below")
    add("--vsock", metavar="CID,path=SOCKET", help="a vsock device, its host side on a unix socket")
    add("--balloon", nargs="?", const=True, metavar="MIB", help="a memory balloon")
    add("--virtio", metavar="BUS", help="what the guest finds all these by: pci (default) or mmio")
    add("--name", metavar="NAME", help="what `hv top` calls it (default: the kernel's name and the process's number)")
    add("--console", metavar="WHERE", help=f"{KINDS} (default stdio)")
    add("--profile", metavar="FILE[,...]", help="record every exit in FILE, for `hv profile report`; see below")
    add(
        "--profile-metrics",
        metavar="WHERE",
        help="serve metrics for Prometheus: PORT, HOST:PORT or unix=PATH; see below",
    )
    add("--mark-port", type=_number, metavar="PORT", help="bytes that the guest writes to this port mark its phases")
    add("--mark-text", metavar="REGEX", help="lines of the console that match mark the guest's phases")
    add("--timeout", type=float, metavar="SECONDS", help="end the guest after this time, with status 124")
    add("--log-level", metavar="LEVEL", help="debug, info, warning (default) or error: events of hv on stderr")
    add("--log-format", metavar="FORMAT", help="console (default) or json")
    add("--config", metavar="FILE.toml", help="take all of this from a file; options given here win")
    add("--force", action="store_true", default=None, help="try a Linux kernel on a software KVM all the same")


def _number(text: str) -> int:
    """Return a number that may be hexadecimal."""
    try:
        return int(text, 0)
    except ValueError:
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 0x5658") from None


def parse_profile(text: str) -> tuple[str, dict[str, Any]]:
    """Return the file and the arguments of `Machine.record` from "FILE,every=100,trace=off"."""
    path, *options = text.split(",")
    settings: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name == "every" and value.isdecimal():
            settings["every"] = int(value)
        elif name in {"trace", "kernel"} and value in {"on", "off"}:
            settings[name] = value == "on"
        else:
            raise ConfigError(f"--profile {text!r}: {option!r}", hint="it is FILE, then every=N, trace=off, kernel=off")
    if not path:
        raise ConfigError(f"--profile {text!r} names no file", hint="it is FILE, then every=N, trace=off, kernel=off")
    return path, settings


def default_settings() -> dict[str, Any]:
    """Return the settings of a run that nobody has said anything about."""
    settings: dict[str, Any] = dict.fromkeys(RUN_KEYS)
    return settings | {"console": "stdio", "log_level": "warning", "log_format": "console"}


def load_settings(options: argparse.Namespace) -> tuple[MachineConfig, dict[str, Any]]:
    """Merge the configuration file and the options into a machine's description and the run's own settings."""
    values: dict[str, Any] = {}
    source = "the command line"
    if options.config is not None:
        source = options.config
        values = _read_toml(source)
    given = {name: value for name, value in vars(options).items() if value is not None}
    for name in ("verb", "run", "version", "config", "rest"):
        given.pop(name, None)
    if "ram" in given:
        given["ram_mib"] = parse_ram(given.pop("ram"))
    values |= given
    settings = default_settings()
    for key, kind in RUN_KEYS.items():
        if key in values:
            if not isinstance(values[key], kind) or isinstance(values[key], bool):
                raise ConfigError(f"{source}: {key} is {values[key]!r}", hint="`hv run --help` tells what it takes")
            settings[key] = values.pop(key)
    if settings["timeout"] is not None and settings["timeout"] <= 0:
        raise ConfigError(f"timeout is {settings['timeout']:g}", hint="it is a number of seconds above 0")
    if "kernel" not in values and source == "the command line":
        raise ConfigError("no kernel is named", hint="hv run KERNEL; `hv kernel list` shows those that have a name")
    return MachineConfig.from_mapping(values, source), settings


def _read_toml(path: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


class Signals:
    """Turns the process's signals into the machine's end while a run lasts."""

    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

    def __init__(self, machine: Machine) -> None:
        """Handle signals for `machine`."""
        self._machine = machine
        self._asked = False
        self._saved = {number: signal.signal(number, self._handle) for number in self.HANDLED}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGTERM and not self._asked:
            self._asked = True
            if not self._machine.press_power_button():
                print("hv: the guest does not listen to its power button; a second SIGTERM ends it", file=sys.stderr)
            return
        name = signal.Signals(number).name
        self._machine.end(Outcome(Stop.KILLED, status=128 + number, message=f"ended by {name}"))

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._saved.items():
            signal.signal(number, handler)


def configure_logging(level: str, style: str) -> None:
    """Let events of `level` and above go to stderr, as lines or as JSON objects."""
    from devices import events

    if level not in events.LEVELS:
        raise ConfigError(f"log level {level!r}", hint=f"it is one of: {', '.join(events.LEVELS)}")
    if style not in {"console", "json"}:
        raise ConfigError(f"log format {style!r}", hint="it is console or json")
    events.set_level(level)
    events.set_format(style)


def run(options: argparse.Namespace) -> int:
    """Run a guest to its end and return the exit status."""
    config, settings = load_settings(options)
    if isinstance(config.kernel, str) and is_name(config.kernel):
        _get_kernel(config.kernel)
    return serve(lambda: Machine(config), settings)


def serve(make: Callable[[], Machine], settings: dict[str, Any]) -> int:
    """Run the machine that `make` makes to its end, its console where `settings` say, and return the exit status."""
    configure_logging(settings["log_level"], settings["log_format"])
    console = HostConsole(settings["console"])
    try:
        with make() as machine:
            _publish(machine, settings["name"])
            _watch(machine, settings)
            console.enter_raw_mode()
            console.attach(machine)
            signals = Signals(machine)
            try:
                gc.enable()  # from here on the process lives long; see hypervisor.cli.command
                outcome = _run(machine, settings)
            finally:
                signals.restore()
    finally:
        lost = console.close()
    _report(outcome, console, lost)
    if machine.profile_trouble:
        print(f"hv: {machine.profile_trouble}", file=sys.stderr)
    return outcome.status


def _publish(machine: Machine, name: str | None) -> None:
    """Let `hv top` find the machine; without a name that was asked for it runs all the same where that cannot be."""
    from hypervisor.control import default_name

    if name is not None:
        machine.publish(name)
        return
    try:
        machine.publish(default_name(machine.config.kernel))
    except HostError:
        pass  # no folder for sockets


def _watch(machine: Machine, settings: dict[str, Any]) -> None:
    """Have recorded what was asked for."""
    if settings["mark_port"] is not None:
        machine.mark_by_port(settings["mark_port"])
    if settings["mark_text"] is not None:
        machine.mark_by_text(settings["mark_text"])
    if settings["profile"] is not None:
        path, options = parse_profile(settings["profile"])
        machine.record(path, **options)


def _metrics(machine: Machine, where: str | int | None) -> MetricsServer | None:
    """Listen for scrapers if that was asked for."""
    if where is None:
        return None
    from hypervisor.profile.metrics import MetricsServer

    server = MetricsServer(machine.profile, where)
    if str(where).endswith(":0") or str(where) == "0":
        print(f"hv: metrics are at {server.url}", file=sys.stderr, flush=True)
    return server


def _run(machine: Machine, settings: dict[str, Any]) -> Outcome:
    metrics = _metrics(machine, settings["profile_metrics"])
    try:
        machine.start()
        if metrics is not None:
            metrics.start()
        return _wait(machine, settings["timeout"])
    finally:
        if metrics is not None:
            metrics.close()


def _get_kernel(name: str) -> None:
    """Fetch or build a kernel of the catalogue that is not in the cache yet."""
    from hypervisor import kernels
    from hypervisor.kernels.progress import for_stream

    if name in kernels.names():
        kernels.ensure(name, progress=for_stream(sys.stderr))


def _wait(machine: Machine, timeout: float | None) -> Outcome:
    try:
        return machine.wait(timeout)
    except TimeoutError:
        message = f"timeout: the guest still ran after {timeout:g} s"
        return machine.kill(Outcome(Stop.KILLED, status=TIMEOUT_STATUS, message=message))


def _report(outcome: Outcome, console: HostConsole, lost: int) -> None:
    if lost and outcome.reason is not Stop.OUTPUT_LOST:
        print(f"hv: {lost} bytes of console output were lost: {console.target} did not take them", file=sys.stderr)
    if outcome.status == 0 or outcome.reason is Stop.GUEST_EXIT or not outcome.message:
        return
    print(f"hv: {outcome.message}", file=sys.stderr)
    if outcome.detail:
        print(outcome.detail, file=sys.stderr)

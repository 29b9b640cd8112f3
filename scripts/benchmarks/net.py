"""A virtio network driven from ring 3 on a TAP of the host, the same guest under hv and its peers: time a frame.

What the guest receives waits for it in the TAP's queue: nobody sends while it is measured, so the sender's pace does
not matter, and takes no processor from either side. What it pings is the host's kernel, which answers in the VMM's own
write to the TAP.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.peers import Device, Held, Peers, mhz
from benchmarks.table import CannotRunError, Row
from hypervisor import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.tools import Settings

GUEST: Final = "virtio-net-bench"
TAP: Final = "hvbench0"
GUEST_MAC: Final = "52:54:00:12:34:56"
GUEST_IP: Final = "169.254.77.2"
HOST_MAC: Final = "02:00:00:00:00:01"
HOST_IP: Final = "169.254.77.1"
RESULT: Final = re.compile(r"^packets (\d+) bytes (\d+) ticks (\d+) rx-kicks (\d+) tx-kicks (\d+)$", re.MULTILINE)
SEND, RECEIVE, RETURN = range(3)
"""Modes of the guest."""
PACKET: Final = 64
SEGMENT: Final = 65214
"""45 times 1448 bytes of TCP payload with its headers: as much as Linux sends at once."""
HEADERS: Final = 54
REACH: Final = 1 / 0.8
SOL_PACKET, PACKET_VNET_HDR, PACKET_QDISC_BYPASS = 263, 15, 20
"""<linux/if_packet.h>"""


class Pattern(NamedTuple):
    """What the guest does.

    Attributes:
        what: for the table.
        count, depth, size, mode: the guest's arguments.
    """

    what: str
    count: int
    depth: int
    size: int
    mode: int


PATTERNS: Final = (
    Pattern("64-byte frames to the TAP, depth 64", 100_000, 64, PACKET, SEND),
    Pattern("64-byte frames from the TAP", 50_000, 1, PACKET, RECEIVE),
    Pattern("64-byte frames to the TAP and back, depth 1", 10_000, 1, PACKET, RETURN),
    Pattern("64-byte frames to the TAP and back, depth 32", 30_000, 32, PACKET, RETURN),
    Pattern("64 KiB TCP segments to the TAP, depth 16", 10_000, 16, SEGMENT, SEND),
    Pattern("64 KiB TCP segments from the TAP", 2000, 1, SEGMENT, RECEIVE),
)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotRunError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _tap(queue: int) -> Iterator[None]:
    """Make a TAP that holds `queue` frames, with nothing of the host's own on it."""
    if os.geteuid():
        raise CannotRunError("making a TAP takes root")
    _ip("tuntap", "add", "dev", TAP, "mode", "tap")
    try:
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            Path(f"/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6").write_text("1")
        _ip("link", "set", TAP, "address", HOST_MAC, "txqueuelen", str(queue), "up")
        _ip("addr", "add", f"{HOST_IP}/30", "dev", TAP)
        _ip("neigh", "replace", GUEST_IP, "lladdr", GUEST_MAC, "dev", TAP, "nud", "permanent")
        yield
    finally:
        _ip("link", "delete", TAP)


def _segment() -> bytes:
    """Return a TCP segment of SEGMENT bytes behind a struct virtio_net_hdr that says how to cut it."""
    ip = pack(">BBHHHBBH4s4s", 0x45, 0, SEGMENT - 14, 1, 0x4000, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    tcp = pack(">HHIIHHHH", 4096, 8192, 1, 1, 0x5010, 0xFFFF, 0, 0)
    header = pack("<BBHHHH", 1, 1, HEADERS, 1448, 34, 16)  # NEEDS_CSUM, TCPV4
    return header + _ethernet(0x0800) + (ip + tcp).ljust(SEGMENT - 14, b"\x5a")


def _ethernet(kind: int) -> bytes:
    return bytes.fromhex((GUEST_MAC + HOST_MAC).replace(":", "")) + kind.to_bytes(2, "big")


def _fill(count: int, size: int) -> None:
    """Put frames into the TAP's queue."""
    dropped = Path(f"/sys/class/net/{TAP}/statistics/tx_dropped")
    before = dropped.read_text()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        frame = _ethernet(0x88B5).ljust(size, b"\x5a")
        if size > PACKET:
            wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            frame = _segment()
        wire.bind((TAP, 0))
        for _ in range(count):
            wire.send(frame)
    if dropped.read_text() != before:
        raise CannotRunError(f"{TAP} did not hold {count} frames")


def _run(scratch: Path, command: list[str], pattern: Pattern, count: int, megahertz: float) -> float:
    """Run the guest and return microseconds a frame."""
    with Held(command, scratch) as run:
        if pattern.mode == RECEIVE:
            _fill(count, pattern.size)
        found = run.measure(RESULT)
    if int(found[2]) != count * pattern.size:
        raise CannotRunError(f"{command[0]}: {found[2]} bytes went by, not {count} times {pattern.size}")
    return int(found[3]) / megahertz / count


def _device() -> Device:
    netdev = ["-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off,vnet_hdr=on"]
    mac = f"netdev=n,mac={GUEST_MAC}"
    return Device(
        ["--net", f"tap={TAP},mac={GUEST_MAC}"],
        netdev,
        f"virtio-net-device,{mac}",
        f"virtio-net-pci,{mac},romfile=",
        ["-n", f"mode=tap,tapif={TAP},script=none,guest_mac={GUEST_MAC}"],
    )


def measure(settings: Settings, name: str) -> list[Row]:
    """Run each pattern in alternating rounds."""
    megahertz = mhz()
    peers = Peers(settings, kernels.ensure(GUEST), _device())
    rows = []
    with _tap(max(pattern.count for pattern in PATTERNS)):
        for pattern in PATTERNS:
            count = settings.pick(pattern.count, pattern.count // 10)
            words = f"{count} {pattern.depth} {pattern.size} {pattern.mode} 1"

            def run(command: list[str], pattern: Pattern = pattern, count: int = count) -> float:
                return _run(settings.scratch, command, pattern, count, megahertz)

            # kvmtool does not offer GUEST_CSUM, without which no segments are received (Virtio 1.2, 5.1.3.1).
            without = "kvmtool" if (pattern.mode, pattern.size) == (RECEIVE, SEGMENT) else ""
            rows += peers.compare(name, pattern.what, REACH, words, settings.pick(7, 2), "us", run, without)
    return rows

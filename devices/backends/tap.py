"""A TAP interface of the host: frames go to its kernel, which may do checksums and segmentation (offloads)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from struct import pack
from typing import TYPE_CHECKING, Final

from devices.backends.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tap"]

# <linux/if_tun.h>
TUNSETIFF: Final = 0x400454CA
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04
TUN_F_TSO_ECN: Final = 0x08

# VIRTIO_NET_F_ (Virtio 1.2, 5.1.3): what the guest takes, and the TUN_F_ bit that says so to the kernel
GUEST_OFFLOADS: Final = {1 << 1: TUN_F_CSUM, 1 << 7: TUN_F_TSO4, 1 << 8: TUN_F_TSO6, 1 << 9: TUN_F_TSO_ECN}
HOST_OFFLOADS: Final = 1 << 0 | 1 << 11 | 1 << 12 | 1 << 13
HEADER_SIZE: Final = 12
NAME_MAX: Final = 15
GONE: Final = {errno.EBADFD, errno.EIO, errno.ENODEV}


class Tap:
    """An existing TAP interface. See `devices.backends.net.NetBackend`."""

    header_size = HEADER_SIZE
    offered = HOST_OFFLOADS | sum(GUEST_OFFLOADS)

    def __init__(self, name: str) -> None:
        """Attach to interface `name`; raises BackendError when that cannot be done."""
        if not name or len(name) > NAME_MAX or "/" in name or not name.isascii():
            raise BackendError(f"{name!r} is no name of an interface", hint=f"1 to {NAME_MAX} characters, no slash")
        try:
            # Asked of the network namespace that we are in; /sys may still show another one's interfaces.
            socket.if_nametoindex(name)
        except OSError:
            make = f"`sudo ip tuntap add dev {name} mode tap user $USER && sudo ip link set {name} up` makes it"
            elsewhere = "one in a network namespace is found by `ip netns exec NAMESPACE hv run ...`"
            raise BackendError(f"there is no interface {name}", hint=f"{make}; {elsewhere}") from None
        try:
            self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            hint = "`sudo modprobe tun`; in a container, pass the device in"
            if error.errno == errno.EACCES:
                hint = "run as root, or let all users have it, as udev does: `sudo chmod 666 /dev/net/tun`"
            raise BackendError(f"/dev/net/tun: {error.strerror}", hint=hint) from error
        try:
            request = pack("16sH22x", name.encode("ascii"), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            fcntl.ioctl(self._fd, TUNSETIFF, request)
            fcntl.ioctl(self._fd, TUNSETVNETHDRSZ, pack("i", HEADER_SIZE))
            self.set_offloads(0)
        except OSError as error:
            self.close()
            raise self._refusal(name, error) from None

    @staticmethod
    def _refusal(name: str, error: OSError) -> BackendError:
        if error.errno == errno.EINVAL:
            hint = "`ip tuntap add ... mode tap` makes one; a bridge has TAPs as its ports"
            return BackendError(f"interface {name} is no TAP, or one made with multi_queue", hint=hint)
        hints = {
            errno.EBUSY: "another program has it; each machine needs a TAP of its own",
            errno.EPERM: f"it is another user's: `sudo ip tuntap add dev {name} mode tap user $USER`, or run as root",
        }
        return BackendError(f"interface {name}: {error.strerror}", hint=hints.get(error.errno or 0, ""))

    @property
    def plain_fd(self) -> int | None:
        """The TAP."""
        return self._fd

    def fileno(self) -> int:
        """Return the TAP."""
        return self._fd

    def send(self, buffers: Sequence[memoryview]) -> bool:
        """Send one frame behind its header; what the kernel refuses is dropped."""
        try:
            os.writev(self._fd, buffers)
        except OSError:
            return False
        return True

    def receive(self, buffer: memoryview) -> int | None:
        """Take the next frame with its header; raises OSError when the interface is gone."""
        try:
            return os.readv(self._fd, [buffer])
        except BlockingIOError:
            return None

    def set_offloads(self, features: int) -> None:
        """Tell the kernel which unfinished frames the guest takes."""
        flags = sum(flag for feature, flag in GUEST_OFFLOADS.items() if features & feature)
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, flags)

    def close(self) -> None:
        """Detach from the interface."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

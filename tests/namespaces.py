"""Network namespaces of the host: what a test does in one leaves the host's own interfaces and ports alone."""

import contextlib
import ctypes
import os
import subprocess

IP = "/usr/bin/ip"  # iproute2's: busybox has another one
CLONE_NEWNET = 0x40000000  # <linux/sched.h>


def may_make_interfaces():
    """Tell whether this user may make namespaces and TAPs, on this host."""
    return os.geteuid() == 0 and os.path.exists("/dev/net/tun") and os.path.exists(IP)


def ip(*words):
    subprocess.run([IP, *words], check=True)


@contextlib.contextmanager
def namespace(name):
    """Make a namespace with its loopback interface up; remove it and all in it."""
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "delete", name)


@contextlib.contextmanager
def entered(name):
    """Be in a namespace, as `nsenter --net` is: with the calling thread, and what it starts meanwhile."""
    with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{name}") as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(ours.fileno())


def _enter(fd):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):  # os.setns came with Python 3.12
        raise OSError(ctypes.get_errno(), "setns")


def make_tap(space, name, *options, address=None):
    """Make a TAP in a namespace, and bring it up."""
    ip("-n", space, "tuntap", "add", "dev", name, "mode", "tap", *options)
    if address is not None:
        ip("-n", space, "addr", "add", address, "dev", name)
    ip("-n", space, "link", "set", name, "up")

"""`hv run` on networks, as a user meets them: in a namespace, and all that can be wrong with them."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys

import pytest
from guest_code import EXIT_WITH
from namespaces import IP, entered, make_tap, may_make_interfaces, namespace

from devices.backends.tap import Tap

pytestmark = pytest.mark.kvm

SPACE = f"hvnet{os.getpid()}"
needs_root = pytest.mark.skipif(not may_make_interfaces(), reason="only root makes TAPs and namespaces")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("guest") / "guest.bin"
    path.write_bytes(EXIT_WITH[77])
    return str(path)


@pytest.fixture
def space():
    with namespace(SPACE):
        yield SPACE


def without_net_admin():
    """Be a root without CAP_NET_ADMIN after the next exec, as in many containers (capabilities(7), prctl(2))."""
    pr_capbset_drop, cap_net_admin = 24, 12
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_net_admin, 0, 0, 0)


def run(image, *words, before=(), preexec_fn=None, **environment):
    command = [sys.executable, "-m", "hypervisor", "run", image, "--flat", "16", "--ram", "2", "--debug-exit", "raw"]
    done = subprocess.run(
        [*before, *command, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
        preexec_fn=preexec_fn,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stderr.splitlines()


def refused(result, what, hint=None):
    """One line that says what is wrong and, where something can be done, one that says what; status 2."""
    status, lines = result
    assert status == 2, lines
    assert len(lines) == (1 if hint is None else 2), lines
    assert lines[0].startswith("hv: ")
    assert what in lines[0]
    if hint is not None:
        assert hint in lines[1]


# --- TAPs -----------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("way", ["ip netns exec", "nsenter --net"])
def test_a_tap_of_a_namespace(image, space, way):
    """The second way leaves /sys behind, which then shows the interfaces of another namespace."""
    make_tap(space, "hvtap0")
    before = [IP, "netns", "exec", space] if way == "ip netns exec" else ["nsenter", f"--net=/run/netns/{space}"]
    assert run(image, "--net", "tap=hvtap0", before=before) == (77, [])
    refused(run(image, "--net", "tap=hvtap0"), "there is no interface hvtap0", "ip netns exec NAMESPACE hv run")


def test_a_tap_that_is_not_there(image):
    refused(run(image, "--net", "tap=hvnone9"), "no interface hvnone9", "sudo ip tuntap add dev hvnone9 mode tap")


@needs_root
def test_an_interface_that_is_no_tap(image):
    refused(run(image, "--net", "tap=lo"), "interface lo is no TAP", "`ip tuntap add ... mode tap`")


@needs_root
def test_a_tap_that_another_program_has(image, space):
    make_tap(space, "hvtap0")
    with entered(space):
        other = Tap("hvtap0")
        refused(run(image, "--net", "tap=hvtap0"), "hvtap0: Device or resource busy", "a TAP of its own")
        other.close()
        assert run(image, "--net", "tap=hvtap0") == (77, [])


@needs_root
def test_a_tap_of_another_user(image, space):
    make_tap(space, "hvtap0", "user", "12345")
    with entered(space):
        result = run(image, "--net", "tap=hvtap0", preexec_fn=without_net_admin)
    refused(result, "interface hvtap0: Operation not permitted", "mode tap user $USER`, or run as root")


# --- user networking ------------------------------------------------------------------------------------------------


def test_no_passt_is_named_with_its_package(image, tmp_path):
    refused(run(image, "--net", "user", PATH=str(tmp_path)), "there is no passt", "`sudo apt-get install passt`")


@pytest.mark.parametrize(("family", "kind"), [(socket.AF_INET, "tcp"), (socket.AF_INET6, "udp")])
@pytest.mark.skipif(shutil.which("passt") is None, reason="there is no passt")
def test_a_forwarded_port_that_is_in_use(image, kind, family):
    """Passt itself is content when one of the two families is free, and the other one leads to somebody else."""
    with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as other:
        if family == socket.AF_INET6:
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        other.bind(("", 0))
        if kind == "tcp":
            other.listen()
        port = other.getsockname()[1]
        result = run(image, "--net", f"user,forward={port}:80/{kind}")
    refused(result, f"port {port}/{kind} of the host is in use", f"ss -lnp 'sport = {port}'")


@pytest.mark.parametrize("forward", ["80:", "80:65536/udp"])
def test_a_forward_that_is_none(image, forward):
    refused(run(image, "--net", f"user,forward={forward}"), f"forward is '{forward}'", "udp")


# --- addresses, links, sockets --------------------------------------------------------------------------------------


def test_a_multicast_address(image):
    refused(run(image, "--net", "none,mac=33:33:00:00:00:01"), "a multicast address", "the first one even")


def test_a_links_folder_whose_path_is_too_long(image, tmp_path):
    long = tmp_path / ("x" * 100)
    refused(run(image, "--net", "link=lab", XDG_RUNTIME_DIR=str(long)), "longer than 107", "XDG_RUNTIME_DIR")


def test_a_switch_is_for_machines_of_one_process(image):
    refused(run(image, "--net", "switch=lab/a"), "there is no network 'lab' in this process", "link=NAME")


def test_a_capture_that_cannot_be_written(image, tmp_path):
    refused(run(image, "--net", f"none,pcap={tmp_path}/no/file"), f"capture file {tmp_path}/no/file: No such file")


def test_a_vsock_path_that_is_in_use(image, tmp_path):
    path = tmp_path / "vsock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        refused(run(image, "--vsock", f"3,path={path}"), f"{path}: Address already in use", "another machine has it")
    assert run(image, "--vsock", f"3,path={path}") == (77, [])  # nobody listens any more: it is taken over


def test_a_vsock_path_that_is_too_long(image, tmp_path):
    refused(run(image, "--vsock", f"3,path={tmp_path}/{'x' * 107}"), "longer than 107 bytes", "choose a shorter one")

"""What networks stand on: TAPs, links, captures, passt."""

import contextlib
import errno
import os
import socket
import subprocess
from struct import pack, unpack_from

import pytest
from namespaces import may_make_interfaces

from devices.backends import passt as passt_module
from devices.backends.errors import BackendError
from devices.backends.link import Link
from devices.backends.net import Nowhere, open_backend
from devices.backends.passt import Passt, refuse_taken_ports
from devices.backends.pcap import Capture
from devices.backends.tap import Tap
from devices.events import EventLog

A, B, C = (bytes([2, 0, 0, 0, 0, number]) for number in (1, 2, 3))
ALL = b"\xff" * 6


def frame(target, source, text=b"hello"):
    return target + source + b"\x08\x00" + text


def send(backend, data):
    return backend.send([memoryview(data)])


def receive(backend):
    buffer = memoryview(bytearray(70000))
    size = backend.receive(buffer)
    return None if size is None else bytes(buffer[:size])


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def members(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    links = [Link("lab") for _ in range(3)]
    yield links
    for link in links:
        link.close()
    assert list((tmp_path / "trapvisor-links").iterdir()) == []  # nothing is left


def test_an_unknown_station_is_reached_by_all_and_a_known_one_alone(members):
    one, two, three = members
    assert send(one, frame(ALL, A))
    assert receive(two) == receive(three) == frame(ALL, A)
    assert receive(one) is None
    send(two, frame(A, B))
    assert receive(one) == frame(A, B)
    assert receive(three) is None
    send(one, frame(B, A))
    assert receive(two) == frame(B, A)
    assert receive(three) is None


def test_a_member_that_is_gone_is_forgotten(members, tmp_path):
    one, two, three = members
    send(two, frame(ALL, B))
    receive(one)
    two._socket.close()  # as a killed process leaves it: the file stays
    assert not send(one, frame(B, A))
    send(one, frame(B, A))
    assert receive(three) == frame(ALL, B)
    assert receive(three) == frame(B, A)
    assert len(list((tmp_path / "trapvisor-links" / "lab").iterdir())) == 2


def test_a_member_that_does_not_read_loses_its_own_frames_only(members):
    one, two, three = members
    for _ in range(3000):
        send(one, frame(ALL, A, bytes(1400)))
        receive(three)
    assert send(one, frame(ALL, A, b"last"))
    assert receive(three) == frame(ALL, A, b"last")
    del two


def test_frames_of_the_largest_size_and_none_at_all(members):
    one, two, _ = members
    assert send(one, frame(ALL, A, bytes(65000)))
    assert len(receive(two)) == 65014
    assert not send(one, b"short")
    assert receive(two) is None


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "x" * 33, "a b"])
def test_names_of_links(name):
    with pytest.raises(BackendError, match="no name of a link"):
        Link(name)


def test_a_folder_whose_path_is_too_long(tmp_path, monkeypatch):
    """A unix socket's path has 107 bytes at most (unix(7))."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(BackendError, match="longer than 107") as caught:
        Link("lab")
    assert "XDG_RUNTIME_DIR" in caught.value.hint


def test_a_folder_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "trapvisor-links" / "lab").mkdir(parents=True)
    (tmp_path / "trapvisor-links" / "lab").chmod(0o777)
    with pytest.raises(BackendError, match="yours alone"):
        Link("lab")


# --- captures -------------------------------------------------------------------------------------------------------


class Wire(Nowhere):
    def __init__(self, header_size=0):
        self.header_size = header_size
        self.frames = []

    def send(self, buffers):
        return True

    def receive(self, buffer):
        if not self.frames:
            return None
        data = self.frames.pop(0)
        buffer[: len(data)] = data
        return len(data)


def records(path):
    """The file format, restated: a header of 24 bytes, then 16 before each frame."""
    data = path.read_bytes()
    magic, major, minor, _, _, snap, link = unpack_from("<IHHiIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 1)
    at, found = 24, []
    while at < len(data):
        seconds, nanoseconds, kept, length = unpack_from("<IIII", data, at)
        assert kept == length <= snap
        found.append((seconds, nanoseconds, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    return found


@pytest.mark.parametrize("header", [0, 12])
def test_both_directions_are_captured_without_the_header(tmp_path, header):
    wire = Wire(header)
    now = iter([1_500_000_007, 3_000_000_000])
    capture = Capture(wire, str(tmp_path / "c"), log=EventLog(), clock=lambda: next(now))
    assert capture.plain_fd is None
    assert capture.send([memoryview(bytes(header)), memoryview(b"out")])
    wire.frames.append(bytes(header) + b"in")
    assert receive(capture) == bytes(header) + b"in"
    assert records(tmp_path / "c") == [(1, 500_000_007, b"out"), (3, 0, b"in")]  # there before it is closed
    capture.close()
    assert (tmp_path / "c").stat().st_mode & 0o77 == 0


def test_a_full_disk_ends_the_capture_and_not_the_network():
    capture = Capture(Wire(), "/dev/full", log=EventLog())
    assert send(capture, b"x")
    assert send(capture, b"y")
    capture.close()


def test_a_capture_that_cannot_be_written(tmp_path):
    with pytest.raises(BackendError, match="capture file"):
        open_backend("none", pcap=str(tmp_path / "no" / "file"), log=EventLog())


# --- passt ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wire(monkeypatch):
    """A Passt whose program is this test: the other end of its socket."""
    ends = socket.socketpair()
    passt = Passt.__new__(Passt)
    passt._socket, theirs = ends
    passt._socket.setblocking(False)
    passt._unsent, passt._received, passt._is_gone = b"", bytearray(), False
    yield passt, theirs
    for end in ends:
        end.close()


def test_frames_have_their_length_in_front(wire):
    passt, theirs = wire
    assert send(passt, b"frame")
    assert theirs.recv(100) == b"\0\0\0\5frame"
    theirs.sendall(pack(">I", 3) + b"one" + pack(">I", 3) + b"tw")
    assert receive(passt) == b"one"
    assert receive(passt) is None
    theirs.sendall(b"o")
    assert receive(passt) == b"two"


def test_a_passt_that_does_not_read_costs_frames_and_no_memory(wire):
    passt, theirs = wire
    sent = 0
    while send(passt, bytes(60000)):
        sent += 1
    for _ in range(100):
        assert not send(passt, bytes(60000))
    assert len(passt._unsent) <= 60004
    data = b""
    while len(data) < sent * 60004:
        data += theirs.recv(1 << 20)
        passt._flush()
    assert data == (pack(">I", 60000) + bytes(60000)) * sent  # whole frames only
    assert send(passt, b"again")


@pytest.mark.parametrize("length", [0, 1 << 20, 0xFFFFFFFF])
def test_a_length_that_cannot_be(wire, length):
    passt, theirs = wire
    theirs.sendall(pack(">I", length))
    with pytest.raises(OSError, match="frame of"):
        receive(passt)


def test_a_passt_that_ends(wire):
    passt, theirs = wire
    theirs.close()
    with pytest.raises(OSError, match="ended"):
        receive(passt)
    assert not send(passt, b"x")


def test_no_passt(monkeypatch):
    monkeypatch.setattr(passt_module.shutil, "which", lambda _: None)
    with pytest.raises(BackendError, match="no passt") as caught:
        Passt()
    assert "apt-get install passt" in caught.value.hint


@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")])
def test_a_port_of_the_host_that_is_in_use(kind, protocol):
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BackendError, match=f"port {port}/{protocol} .* in use"):
            refuse_taken_ports([(port, 80, protocol)])
    refuse_taken_ports([(port, 80, protocol)])  # it is free again


@pytest.mark.parametrize(("number", "words"), [(errno.EACCES, "not yours"), (errno.EAFNOSUPPORT, None)])
def test_a_port_of_the_host_that_cannot_be_bound(monkeypatch, number, words):
    def refuse(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(passt_module, "_bind", refuse)
    with pytest.raises(BackendError, match=words) if words else contextlib.nullcontext():
        refuse_taken_ports([(80, 80, "tcp")])


def test_a_passt_that_says_why_it_cannot(tmp_path, monkeypatch):
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho 'No routable interface for IPv4' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BackendError, match="No routable interface") as caught:
        Passt()
    assert "default route" in caught.value.hint


# --- TAPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("hvnone9", "no interface hvnone9"), ("", "no name"), ("x" * 16, "no name"), ("a/b", "no name")],
)
def test_interfaces_that_are_no_taps(name, words):
    with pytest.raises(BackendError, match=words) as caught:
        Tap(name)
    if name == "hvnone9":
        assert "ip tuntap add dev hvnone9 mode tap" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "chmod 666 /dev/net/tun"), (errno.ENOENT, "modprobe tun")]
)
def test_a_tun_device_that_cannot_be_opened(monkeypatch, number, remedy):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(BackendError, match="/dev/net/tun") as caught:
        Tap("lo")
    assert remedy in caught.value.hint


def test_no_network_of_that_kind():
    with pytest.raises(BackendError, match="bridge"):
        open_backend("bridge", log=EventLog())
    nowhere = open_backend("none", log=EventLog())
    assert not send(nowhere, b"x")
    assert receive(nowhere) is None


@pytest.mark.skipif(not may_make_interfaces(), reason="only root makes TAPs; tests/linux has one as well")
def test_a_tap_of_the_kernel():
    name = f"hvt{os.getpid() % 100000}"
    subprocess.run(["ip", "tuntap", "add", "dev", name, "mode", "tap"], check=True)
    try:
        tap = Tap(name)
        with pytest.raises(BackendError, match="busy"):
            Tap(name)
        with pytest.raises(BackendError, match="lo is no TAP"):
            Tap("lo")
        tap.set_offloads(1 << 1 | 1 << 7 | 1 << 8)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        assert send(tap, bytes(12) + frame(ALL, A, bytes(50)))
        assert not send(tap, b"\xff" * 12 + frame(ALL, A))  # a header that the kernel does not like
        seen = []
        while (data := receive(tap)) is not None:
            seen.append(data)
        assert all(len(data) > 12 + 14 for data in seen)
        subprocess.run(["ip", "link", "delete", name], check=True)
        with pytest.raises(OSError, match=r"bad state|No such device|error"):
            receive(tap)
        tap.close()
        tap.close()
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)

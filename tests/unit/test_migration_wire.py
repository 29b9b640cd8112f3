"""The connection between the two ends of a migration: frames, addresses, certificates."""

import random
import socket
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.errors import ConfigError
from hypervisor.migration.wire import HEADER, MOST_DATA, MOST_FORM, Kind, Listener, MigrationError, Tls, Wire, connect

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@pytest.fixture
def pair():
    here, there = socket.socketpair()
    wires = Wire(here, seconds=60), Wire(there, seconds=60)
    yield wires
    for wire in wires:
        wire.close()


@given(form=st.dictionaries(st.text(), PLAIN, max_size=5), pieces=st.lists(st.binary(max_size=5000), max_size=4))
def test_a_frame_arrives_as_it_was_sent(form, pieces):
    here, there = socket.socketpair()
    with here, there:
        sender, receiver = Wire(here, seconds=60), Wire(there, seconds=60)
        sender.send(Kind.STATE, form, [memoryview(piece) for piece in pieces])
        frame = receiver.receive()
        data = bytearray(frame.size)
        receiver.read_into(memoryview(data))
        assert (frame.kind, frame.form, bytes(data)) == (Kind.STATE, form, b"".join(pieces))


def test_an_end_between_frames_is_not_one_within(pair):
    here, there = pair
    here.send(Kind.GO)
    here.close()
    assert there.receive().kind is Kind.GO
    with pytest.raises(EOFError):
        there.receive()


def test_an_end_within_a_frame_is_a_broken_connection():
    here, there = socket.socketpair()
    with here, there:
        here.sendall(HEADER.pack(b"HVM1", Kind.STATE, 100, 0) + b"short")
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            Wire(there, seconds=60).receive()


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(b"HTTP", 1, 0, 0),
        HEADER.pack(b"HVM1", 0, 0, 0),
        HEADER.pack(b"HVM1", 99, 0, 0),
        HEADER.pack(b"HVM1", 1, MOST_FORM + 1, 0),
        HEADER.pack(b"HVM1", 1, 0, MOST_DATA + 1),
        HEADER.pack(b"HVM1", 1, 3, 0) + b"\x93\x01\x02",
        HEADER.pack(b"HVM1", 1, 1, 0) + b"\xc1",
        HEADER.pack(b"HVM1", 1, 1000, 0) + b"\x91" * 1000,
    ],
)
def test_what_is_no_frame_is_refused_before_anything_is_kept(header):
    here, there = socket.socketpair()
    with here, there:
        here.sendall(header)
        with pytest.raises(MigrationError):
            Wire(there, seconds=60).receive()


def test_noise():
    for seed in range(300):
        here, there = socket.socketpair()
        with here, there:
            here.sendall(random.Random(seed).randbytes(100))
            here.shutdown(socket.SHUT_WR)
            with pytest.raises((MigrationError, OSError)):
                Wire(there, seconds=60).receive()


def test_a_silent_end_is_gone_after_a_while(pair):
    here, _ = pair
    here._socket.settimeout(0.05)
    with pytest.raises(TimeoutError):
        here.receive()


# --- addresses --------------------------------------------------------------------------------------------------------


def accepted(listener):
    """Accept in a thread; return a function that returns what came of it."""
    result = []

    def accept():
        try:
            result.append(listener.accept(60))
        except (OSError, MigrationError) as error:
            result.append(error)

    thread = threading.Thread(target=accept)
    thread.start()

    def come():
        thread.join()
        return result[0]

    return come


@pytest.mark.parametrize("address", ["unix:{}/socket", "tcp:127.0.0.1:0"])
def test_two_ends_meet(tmp_path, address):
    listener = Listener(address.format(tmp_path))
    come = accepted(listener)
    wire = connect(listener.address, seconds=60)
    other = come()
    wire.send(Kind.GO)
    assert other.receive().kind is Kind.GO
    for one in (wire, other, listener):
        one.close()
    assert not list(tmp_path.iterdir())


def test_an_address_that_is_taken(tmp_path):
    listener = Listener(f"unix:{tmp_path}/socket")
    with pytest.raises(ConfigError, match="cannot listen"):
        Listener(f"unix:{tmp_path}/socket")
    listener.close()


def test_nobody_comes(tmp_path):
    listener = Listener(f"unix:{tmp_path}/socket")
    with pytest.raises(TimeoutError):
        listener.accept(0.01)
    listener.close()


# --- TLS --------------------------------------------------------------------------------------------------------------


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def authority(folder, name):
    """Make an authority and a certificate for 127.0.0.1 that it has signed."""
    ca, key, request, signed = (folder / f"{name}.{end}" for end in ("ca", "key", "csr", "pem"))
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *curve, "-subj", f"/CN={name} authority", "-keyout", f"{ca}.key", "-out", ca)
    openssl("req", *curve, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
    extension = folder / "san"
    extension.write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", f"{ca}.key", "-out", signed, "-extfile", extension)
    return Tls(str(ca), str(signed), str(key))


def test_tls_with_certificates_of_one_authority_only(tmp_path):
    ours, others = authority(tmp_path, "ours"), authority(tmp_path, "others")
    for tls in (others, None):
        listener = Listener("tcp:127.0.0.1:0", tls=ours)
        come = accepted(listener)
        try:
            wire = connect(listener.address, tls=tls, seconds=60)
            wire.send(Kind.HELLO)
            with pytest.raises((MigrationError, OSError, EOFError)):
                wire.receive()
            wire.close()
        except MigrationError:
            assert tls is others, "the source finds out"
        assert isinstance(come(), MigrationError)
        listener.close()
    listener = Listener("tcp:127.0.0.1:0", tls=ours)
    come = accepted(listener)
    wire = connect(listener.address, tls=ours, seconds=60)
    other = come()
    wire.send(Kind.PAGES, {"runs": []}, [memoryview(b"x" * 100000)])
    frame = other.receive()
    data = bytearray(frame.size)
    other.read_into(memoryview(data))
    assert bytes(data) == b"x" * 100000
    for one in (wire, other, listener):
        one.close()


@pytest.mark.parametrize("missing", range(3))
def test_a_certificate_that_is_not_there(tmp_path, missing):
    files = list(authority(tmp_path, "ours"))
    files[missing] = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"there is no file .*nothing"):
        Listener("tcp:127.0.0.1:0", tls=Tls(*files))


def test_a_file_that_is_no_certificate(tmp_path):
    files = authority(tmp_path, "ours")
    (tmp_path / "noise").write_text("noise")
    with pytest.raises(ConfigError, match="TLS"):
        Listener("tcp:127.0.0.1:0", tls=files._replace(certificate=str(tmp_path / "noise")))

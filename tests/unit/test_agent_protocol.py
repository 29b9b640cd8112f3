"""The agent's line, byte by byte: hostile hosts, hostile agents, and finding back into step (agent/PROTOCOL.md)."""

import contextlib
import errno
import os
import struct
import threading
import time

import pytest
from agent_driver import (
    CLOSE,
    CREDIT,
    DATA,
    EXIT,
    FAILED,
    HELLO,
    SIGNAL,
    WELCOME,
    WINDOW,
    Line,
    agent_process,
    frame,
    start,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from hypervisor.testing import Agent
from hypervisor.testing.protocol import FrameReader, ProtocolError

PAIR = struct.Struct("<II")


@pytest.fixture(scope="module")
def line():
    with agent_process() as (_, end):
        yield Line(end)


# --- the agent against any host --------------------------------------------------------------------------------------


def test_it_announces_itself_and_answers_a_hello(line):
    assert line.read(32) == WELCOME + bytes(16)
    assert struct.unpack("<IIII", line.read(16)) == (1, 256 << 10, 128 << 10, 32)
    assert line.greet() == (1, 256 << 10, 128 << 10, 32)
    line.send(start(7, b"sh", b"-c", b"echo out; echo err >&2; exit 9"))
    assert line.all_of(7) == ((EXIT, 0, 9), b"out\n", b"err\n")


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 40, 41, 42, 43, 55])
def test_a_hello_is_found_in_the_middle_of_a_frame(line, cut):
    """Whatever part of a frame has come, what follows is no part of it."""
    line.greet()
    whole = start(1, b"sh", b"-c", b"echo never")
    line.send(whole[:cut])
    time.sleep(0.01)
    line.greet()
    line.send(start(1, b"sh", b"-c", b"echo on"))
    assert line.all_of(1) == ((EXIT, 0, 0), b"on\n", b"")


@pytest.mark.parametrize("left", [1, 2, 9])
def test_no_hello_completes_a_frame(line, left, tmp_path):
    """Not even one that comes in two parts, of which the first is as long as what the frame lacks."""
    line.greet()
    line.send(start(1, b"touch", os.fsencode(tmp_path / "never") + b"12345678")[:-left] + HELLO[:left])
    time.sleep(0.05)
    line.send(HELLO[left:] + bytes(20))
    line.greet()
    line.send(start(1, b"true"))
    assert line.all_of(1)[0] == (EXIT, 0, 0)
    time.sleep(0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(1, 36, 5))
def test_a_hello_is_found_in_the_middle_of_another(line, cut):
    line.send((HELLO + bytes(20))[:cut])
    time.sleep(0.01)
    line.greet()
    line.send(start(1, b"true"))
    assert line.all_of(1)[0] == (EXIT, 0, 0)


def test_a_hello_that_comes_byte_by_byte(line):
    nonce = os.urandom(16)
    for byte in b"\xc4\xc4\xbf" + HELLO + nonce + struct.pack("<I", 1) + start(3, b"true"):
        line.send(bytes([byte]))
    while WELCOME + nonce not in line.held:
        line.held += line.end.recv(4096)
    line.held = line.held.split(WELCOME + nonce)[1]
    line.read(16)
    assert line.all_of(3)[0] == (EXIT, 0, 0)


def test_a_frame_may_end_in_the_beginning_of_the_mark(line):
    """Otherwise it would wait for ever for the byte that decides."""
    line.greet()
    for size in (1, 2, 15):
        line.send(start(1, b"cat", flags=0) + frame(DATA, 1, HELLO[:size]) + frame(DATA, 1))
        assert line.all_of(1) == ((EXIT, 0, 0), HELLO[:size], b"")


WRONG = {
    "unknown type": frame(9, 1),
    "its own type": frame(EXIT, 1, bytes(8)),
    "too long": struct.pack("<BBHII", START := 1, 0, 0, 1, (256 << 10) + 1),
    "not zero": struct.pack("<BBHII", START, 0, 1, 1, 0) + b"\0",
    "no end": frame(DATA, 1, b"x")[:-1] + b"\1",
    "another stream": frame(DATA, 1, b"x", stream=1),
    "credit for input": frame(CREDIT, 1, bytes(4)),
    "short credit": frame(CREDIT, 1, b"xxx", stream=1),
    "signal 65": frame(SIGNAL, 1, struct.pack("<I", 65)),
    "close with more": frame(CLOSE, 1, b"x"),
    "empty start": frame(START, 1),
    "no arguments": start(1),
    "unknown operation": start(1, b"x", operation=7),
    "too few texts": frame(START, 1, struct.pack("<BBHHHI", 0, 0, 2, 0, 0, 0) + b"/\0x\0"),
    "too many texts": frame(START, 1, struct.pack("<BBHHHI", 0, 0, 1, 0, 0, 0) + b"/\0x\0y\0"),
    "no last NUL": frame(START, 1, struct.pack("<BBHHHI", 0, 0, 1, 0, 0, 0) + b"/\0x"),
    "65535 arguments": frame(START, 1, struct.pack("<BBHHHI", 0, 0, 65535, 65535, 0, 0) + bytes(200000)),
    "the same id twice": start(1, b"sleep", b"1000") + start(1, b"true"),
    "more input than room": start(1, b"sleep", b"1000", flags=0) + frame(DATA, 1, bytes(200 << 10)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_host_must_not_send_loses_step_until_the_next_hello(line, name):
    line.greet(flags=0)
    line.send(WRONG[name] + start(2, b"true"))
    assert line.read(32) == WELCOME + bytes(16)
    line.send(start(3, b"true"))
    line.greet(flags=0)
    line.send(start(4, b"true"))
    assert line.all_of(4)[0] == (EXIT, 0, 0)


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from([HELLO, HELLO[:7], HELLO + bytes(20), start(1, b"true"), start(2, b"cat", flags=0)]),
            st.builds(
                frame,
                st.integers(0, 9),
                st.integers(0, 3),
                st.binary(max_size=20),
                st.integers(0, 3),
            ),
        ),
        max_size=12,
    )
)
def test_no_host_breaks_it(line, pieces):
    line.greet(flags=0)
    line.send(b"".join(pieces))
    line.greet(flags=0)
    line.send(start(4, b"echo", b"on"))
    assert line.all_of(4) == ((EXIT, 0, 0), b"on\n", b"")


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_no_tree_breaks_it(line, tmp_path_factory, data):
    line.greet(flags=0)
    folder = os.fsencode(tmp_path_factory.getbasetemp() / "hostile")
    root = struct.pack("<BBHI", 1, 0, 0, 0o755)
    line.send(start(1, folder, operation=4, flags=0) + frame(DATA, 1, root + data) + frame(DATA, 1))
    end = line.all_of(1)[0]
    assert end[0] in {EXIT, FAILED}
    assert end[0] == FAILED or end[2] == 0  # never a signal


def test_windows_are_kept(line):
    line.greet(flags=0)
    line.send(start(1, b"head", b"-c", b"400000", b"/dev/zero", window=70000))
    got = 0
    while got < 70000:
        kind, stream, _, payload = line.frame()
        assert (kind, stream) != (DATA, 1) or payload
        got += len(payload) if (kind, stream) == (DATA, 1) else 0
    assert got == 70000
    line.end.settimeout(0.1)
    with pytest.raises(TimeoutError):
        line.frame()
    line.end.settimeout(60)
    line.send(frame(CREDIT, 1, struct.pack("<I", 100000), stream=1))
    kind, stream, _, payload = line.frame()
    assert (kind, stream) == (DATA, 1)
    assert 0 < len(payload) <= 32768


def test_places_of_processes_that_nobody_waits_for(line):
    """64 places: when what was kept has them all, a start is refused, and they come back."""
    line.greet(flags=0)
    for _ in range(2):
        for number in range(1, 33):
            line.send(start(number, b"sh", b"-c", b"echo; exec sleep 1000"))
        assert all(line.frame()[3] == b"\n" for _ in range(32))
        line.greet(flags=1)
    line.send(start(1, b"true"))
    assert line.frame() == (FAILED, 0, 1, PAIR.pack(0, errno.EAGAIN))
    line.greet(flags=0)

    def starts():
        line.send(start(1, b"true"))
        end = line.all_of(1)[0]
        assert end in {(EXIT, 0, 0), (FAILED, 0, errno.EAGAIN)}
        return end[0] == EXIT

    until(starts)  # they have been killed, which takes its time


# --- the host against any agent --------------------------------------------------------------------------------------


class FakeLine:
    """A line whose other end is the test."""

    def __init__(self):
        self.sent = []
        self.on_data = self.on_end = None
        self.gone = ""

    def send(self, data):
        self.sent.append(data)

    def drop(self):
        pass

    def trouble(self):
        return self.gone

    def close(self):
        pass

    def welcome(self, *, version=1, window=65536, processes=32):
        nonce = self.sent[-1][16:32]
        self.on_data(WELCOME + nonce + struct.pack("<IIII", version, 1 << 18, window, processes))


@pytest.fixture
def fake():
    return FakeLine()


@contextlib.contextmanager
def calling(fake, call):
    """Run a call that waits for the agent in a thread, up to its frame; yields what becomes of it."""
    result = []

    def work():
        try:
            result.append(call())
        except Exception as error:  # noqa: BLE001 - it is looked at below
            result.append(error)

    before = len(fake.sent)
    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: len(fake.sent) > before)
    yield result
    thread.join(60)
    assert not thread.is_alive()


def greeted(fake):
    agent = Agent(fake)
    with calling(fake, lambda: agent.ready(60)):
        fake.welcome()
    return agent


def test_the_hello_and_its_answer(fake):
    agent = Agent(fake)
    with calling(fake, lambda: agent.ready(60)) as result:
        assert fake.sent[0][:16] == HELLO
        assert len(fake.sent[0]) == 36
        fake.on_data(b"noise" + WELCOME[:9])
        fake.on_data(WELCOME + os.urandom(16) + bytes(7))  # an answer of another time, cut off
        fake.welcome()
    assert result == [None]
    assert len(fake.sent) == 1


def test_an_agent_that_begins_is_greeted_again(fake):
    agent = Agent(fake)
    with calling(fake, lambda: agent.ready(60)):
        first = fake.sent[0]
        fake.on_data(WELCOME + bytes(16) + struct.pack("<IIII", 1, 1 << 18, 65536, 32))
        until(lambda: len(fake.sent) == 2)
        assert fake.sent[1][:16] == HELLO
        assert fake.sent[1][16:32] != first[16:32]
        fake.on_data(WELCOME + first[16:32] + struct.pack("<IIII", 1, 1 << 18, 65536, 32))  # too late
        assert agent._session.welcome is None
        fake.welcome()


@pytest.mark.parametrize("facts", [{"version": 2}, {"window": 0}, {"window": 1 << 30}, {"processes": 0}])
def test_a_welcome_that_cannot_be(fake, facts):
    agent = Agent(fake)
    with calling(fake, lambda: agent.ready(60)) as result:
        fake.welcome(**facts)
    assert isinstance(result[0], ProtocolError)


HOSTILE = {
    "unknown id": frame(DATA, 99, b"x", stream=1),
    "unknown type": frame(8, 1),
    "a start": start(1, b"x"),
    "input": frame(DATA, 1, b"x", stream=0),
    "stream 3": frame(DATA, 1, b"x", stream=3),
    "a long frame": struct.pack("<BBHII", DATA, 1, 0, 1, 32769),
    "the longest frame": struct.pack("<BBHII", DATA, 1, 0, 1, 0xFFFFFFFF),
    "a frame without end": frame(DATA, 1, b"x", stream=1)[:-1] + b"x",
    "an announcement": WELCOME + bytes(32),
    "more than the window": frame(DATA, 1, bytes(32768), stream=1) * (WINDOW // 32768 + 1),
    "an end twice": frame(DATA, 1, stream=1) * 2,
    "output after its end": frame(DATA, 1, stream=1) + frame(DATA, 1, b"x", stream=1),
    "an exit twice": frame(EXIT, 1, PAIR.pack(0, 0)) * 2,
    "a short exit": frame(EXIT, 1, bytes(7)),
    "too much credit": frame(CREDIT, 1, struct.pack("<I", 1)),
    "credit for another": frame(CREDIT, 1, struct.pack("<I", 0), stream=1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_an_agent_must_not_send_ends_the_conversation(fake, name):
    agent = greeted(fake)
    process = agent.popen("x")
    fake.on_data(HOSTILE[name])
    assert isinstance(process._running.error, ProtocolError)
    assert not agent._session._running
    if process._running.end is None:
        with pytest.raises(ProtocolError):
            process.wait(60)
    with calling(fake, lambda: agent.ready(60)) as result:  # and the next call begins another
        fake.welcome()
    assert result == [None]


def test_an_agent_that_says_nothing_more(fake):
    agent = greeted(fake)
    with calling(fake, lambda: agent.run("x", timeout=0.1)) as result:
        fake.gone = "the machine has ended: PANIC"
    assert "the machine has ended: PANIC" in str(result[0]) or "not done after" in str(result[0])


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(frame, st.integers(0, 9), st.integers(0, 3), st.binary(max_size=9), st.integers(0, 3)),
        ),
        max_size=20,
    ),
    st.randoms(),
)
def test_no_agent_breaks_it(pieces, random):
    fake = FakeLine()
    agent = greeted(fake)
    processes = [agent.popen("x") for _ in range(2)]
    data = b"".join(pieces)
    while data:
        size = random.randrange(1, 50)
        fake.on_data(data[:size])
        data = data[size:]
    held = sum(len(output) for one in processes for output in one._running.outputs.values())
    assert held <= 4 * WINDOW
    agent._session.greet(keep=True, why="again")
    fake.welcome()
    agent.ready(60)


@given(st.lists(st.tuples(st.sampled_from([DATA, CREDIT, EXIT]), st.binary(max_size=50)), max_size=9), st.randoms())
def test_frames_are_the_same_however_they_are_cut(items, random):
    sizes = {CREDIT: 4, EXIT: 8}
    items = [(kind, payload.ljust(8, b"\0")[: sizes.get(kind, 50)]) for kind, payload in items]
    nonce = bytes(range(16))
    stream = WELCOME + nonce + struct.pack("<IIII", 1, 1, 1, 1)
    stream += b"".join(frame(kind, 5, payload) for kind, payload in items)
    reader = FrameReader()
    reader.expect(nonce)
    found = []
    while stream:
        size = random.randrange(1, 30)
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert [(one.type, one.payload) for one in found[1:]] == items

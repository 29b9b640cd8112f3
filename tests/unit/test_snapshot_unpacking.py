"""Pages of a snapshot that are unpacked one by one, and sent to who asks: by a driver of the other end."""

import random
import socket
import threading
from itertools import pairwise
from struct import pack, unpack

import pytest
from snapshots import CHUNK, PAGE, ram, save

from hypervisor.errors import DamagedSnapshotError
from hypervisor.pageserver import PageServer
from hypervisor.snapshot.store import Snapshot
from hypervisor.snapshot.unpacking import KEPT, PackedPages, runs_of

NO_MORE = (1 << 64) - 1
IN_A_CHUNK = 16


@pytest.fixture(params=["raw", "zstd", "change"])
def saved(tmp_path, request):
    """A snapshot with a short last chunk, and its RAM."""
    memory = ram(70, pages=3, dense=(0, 3, 4, 69, 70))
    if request.param == "change":
        save(tmp_path / "base", memory, compress=True)
        memory[3 * CHUNK : 4 * CHUNK] = bytes(CHUNK)
        memory[5 * CHUNK] = 7
        with Snapshot.open(tmp_path / "base") as base:
            save(tmp_path / "s", memory, base=base, compress=False)
    else:
        save(tmp_path / "s", memory, compress=request.param == "zstd")
    with Snapshot.open(tmp_path / "s") as snapshot:
        yield snapshot, memory


def packed(snapshot, **how):
    return PackedPages([one.memory for one in snapshot.chain()], **({"verify": True} | how))


def test_all_but_zeroes_is_missing(saved):
    snapshot, memory = saved
    runs = runs_of(snapshot.memory)
    assert all(first + count < after for (first, count), (after, _) in pairwise(runs))
    missing = {page for first, count in runs for page in range(first, first + count)}
    pages = len(memory) // PAGE
    expected = {page for page in range(pages) if any(memory[page // IN_A_CHUNK * CHUNK :][:CHUNK])}
    assert missing == expected


def test_pages_are_what_was_saved_wherever_they_begin(saved):
    snapshot, memory = saved
    pages = packed(snapshot)
    assert pages.size == len(memory)
    chance = random.Random(1)
    for _ in range(300):
        first = chance.randrange(len(memory) // PAGE)
        count = chance.randint(1, min(40, len(memory) // PAGE - first))
        assert pages.pages(first, count) == memory[first * PAGE : (first + count) * PAGE]
        assert len(pages._unpacked) <= KEPT


def test_a_damaged_chunk_is_found_when_it_is_wanted(tmp_path):
    save(tmp_path / "s", ram(8, dense=(1, 5)), compress=True)
    file = tmp_path / "s" / "memory"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with Snapshot.open(tmp_path / "s") as snapshot:
        pages = packed(snapshot, verify=False)
        pages.pages(IN_A_CHUNK, 1)
        with pytest.raises(DamagedSnapshotError) as caught:
            pages.pages(5 * IN_A_CHUNK + 3, 1)
    assert (caught.value.chunk, caught.value.gpa) == (5, 5 * CHUNK)


# --- the line ---------------------------------------------------------------------------------------------------------


class Guest:
    """The end that wants pages."""

    def __init__(self, snapshot, runs, seconds=60):
        self.connection, self.there = socket.socketpair()
        self.server = PageServer(packed(snapshot), self.there, runs, seconds)
        self.error = None
        self.thread = threading.Thread(target=self._main)
        self.thread.start()

    def _main(self):
        try:
            self.server.serve()
        except OSError as error:
            self.error = error
        finally:
            self.there.close()

    def receive(self, size):
        data = b""
        while len(data) < size:
            more = self.connection.recv(size - len(data))
            assert more
            data += more
        return data

    def run(self):
        first, count = unpack("<QQ", self.receive(16))
        return first, self.receive(count * PAGE)

    def ask(self, *pages):
        self.connection.sendall(pack(f"<{len(pages)}Q", *pages))

    def end(self):
        self.connection.close()
        self.thread.join()
        return self.error


@pytest.fixture
def guest(saved):
    made = Guest(saved[0], runs_of(saved[0].memory))
    yield made
    made.end()


def test_every_page_comes_once_asked_or_not(saved, guest):
    memory = saved[1]
    chance = random.Random(2)
    missing = {page for first, count in runs_of(saved[0].memory) for page in range(first, first + count)}
    guest.ask(max(missing))
    for number in range(len(missing)):
        if not missing:
            break
        first, data = guest.run()
        pages = set(range(first, first + len(data) // PAGE))
        assert pages <= missing
        assert data == memory[first * PAGE : first * PAGE + len(data)]
        missing -= pages
        if missing and number % 3 == 0:
            guest.ask(chance.choice(sorted(missing)))
    assert not missing
    guest.ask(NO_MORE)
    guest.thread.join()
    assert guest.server.is_done
    assert guest.server.asked >= 1


def test_what_is_asked_for_twice_or_never_was_there_is_not_sent(saved, guest):
    sent = 0
    guest.ask(0, 0, 1 << 40, 2 * IN_A_CHUNK)
    while sent < guest.server.pages:
        first, data = guest.run()
        assert first // IN_A_CHUNK != 2
        sent += len(data) // PAGE
    guest.ask(0, NO_MORE)
    guest.thread.join()
    assert guest.connection.recv(1) == b""


def test_an_altered_raw_chunk_is_found_unless_it_is_trusted(tmp_path):
    with_change, base = tmp_path / "s", tmp_path / "base"
    memory = ram(8, dense=(1, 5))
    save(base, memory)
    memory[CHUNK] ^= 1
    with Snapshot.open(base) as below:
        save(with_change, memory, base=below)
    with (with_change / "memory").open("r+b") as file:
        file.seek(CHUNK + 5)
        file.write(bytes([memory[CHUNK + 5] ^ 1]))
    with Snapshot.open(with_change) as snapshot:
        with pytest.raises(DamagedSnapshotError):
            packed(snapshot).pages(IN_A_CHUNK, 1)
        assert packed(snapshot, verify=False).pages(IN_A_CHUNK, 1) != memory[CHUNK : CHUNK + PAGE]


@pytest.mark.parametrize("word", [b"", b"\1\2\3"])
def test_an_end_that_is_gone_ends_it(saved, word):
    guest = Guest(saved[0], [])
    guest.connection.sendall(word)
    guest.connection.shutdown(socket.SHUT_WR)
    guest.thread.join(60)
    assert isinstance(guest.end(), ConnectionResetError)


def test_an_end_that_takes_nothing_is_gone_after_a_time(saved):
    guest = Guest(saved[0], runs_of(saved[0].memory), seconds=0.05)
    guest.thread.join(60)
    assert isinstance(guest.end(), TimeoutError)

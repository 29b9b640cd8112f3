"""The recorder in C without any KVM: exact totals, and a bound on all that a guest can make grow."""

import errno
import os
import resource
import struct
import threading
from types import SimpleNamespace

import pytest
from hypervisor.kvm._kvm import ffi, lib
from profile_files import EXIT, HLT, IO, MMIO, PIO_IN, PIO_OUT

from hypervisor.errors import HostError
from hypervisor.kvm.recorder import TraceFile, raw_rows
from hypervisor.profile.histogram import bucket_of

ROWS, SPARE, SPACES, RING = 1024, 64, 4096, 1 << 16
ELSEWHERE = (1 << 64) - 1
MMIO_READ, MMIO_WRITE = 3, 4


class Recorder:
    """A vCPU's recorder, and the exits of a vCPU that is none; time passes as told."""

    def __init__(self):
        self.recorder = ffi.new("struct hv_recorder *")
        assert lib.hv_recorder_init(self.recorder) == 0
        self._exit = ffi.new("struct hv_record *")
        self.now = 1000

    def close(self):
        lib.hv_recorder_free(self.recorder)

    def exit(self, reason=IO, kind=PIO_OUT, size=1, address=0x80, *, operations=1, ran=10, took=5, place=None):
        self.now += ran
        out = self._exit
        out.tick, out.address, out.operations = self.now, address, operations
        out.reason, out.kind, out.size = reason, kind, size
        lib.hv_record_exit(self.recorder, out, ran, 0)
        if place is not None:
            lib.hv_record_place(self.recorder, *place)
        self.now += took
        lib.hv_record_entry(self.recorder, self.now)

    def rows(self):
        recorder = self.recorder
        size = recorder.row_count * ffi.sizeof("struct hv_row")
        return raw_rows(bytes(ffi.buffer(recorder.row, size)))


@pytest.fixture
def vcpu():
    made = Recorder()
    yield made
    made.close()


def chunks_of(data):
    assert data[:8] == b"hvprof\r\n"
    at, found = 8, []
    while at < len(data):
        kind, number, size = struct.unpack_from("<4sIQ", data, at)
        assert at + 16 + size <= len(data)
        found.append((kind.decode(), number, data[at + 16 : at + 16 + size]))
        at += 16 + size
    return found


def records_of(chunks, vcpu=0):
    data = b"".join(data for kind, number, data in chunks if (kind, number) == ("TRAC", vcpu))
    return list(struct.iter_unpack("<QQIHH", data))


@pytest.fixture
def file_of(tmp_path):
    """Return a maker of trace files; each comes with how to read its chunks."""
    path = tmp_path / "trace"
    made = []

    def make():
        made.append(TraceFile(str(path), b"hvprof\r\n"))
        return made[-1], lambda: chunks_of(path.read_bytes())

    yield make
    for file in made:
        file.close()


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_row_is_exact(vcpu):
    for ran, took in ((100, 7), (200, 9), (5, 1 << 20)):
        vcpu.exit(IO, PIO_IN, 2, 0x3F8, operations=3, ran=ran, took=took)
    (row,) = vcpu.rows()
    assert row[:6] == (0x3F8, IO, PIO_IN, 2, 3, 9)
    total, largest, words = row.guest
    assert (total, largest, sum(words)) == (305, 200, 3)
    assert [words[bucket_of(t)] for t in (100, 200, 5)] == [1, 1, 1]
    total, largest, words = row.handler
    assert (total, largest, sum(words)) == (16 + (1 << 20), 1 << 20, 3)
    assert [words[bucket_of(t)] for t in (7, 9, 1 << 20)] == [1, 1, 1]


def test_reason_direction_size_and_address_each_make_a_row(vcpu):
    keys = [(IO, PIO_OUT, 1, 1), (IO, PIO_IN, 1, 1), (IO, PIO_OUT, 2, 1), (IO, PIO_OUT, 1, 2), (MMIO, PIO_OUT, 1, 1)]
    for times in (1, 2):
        for key in keys * times:
            vcpu.exit(*key)
    assert [(r.reason, r.kind, r.size, r.address) for r in vcpu.rows()] == keys
    assert [r.exits for r in vcpu.rows()] == [3] * 5


def test_an_exit_that_leads_nowhere_has_no_handler_time_yet(vcpu):
    out = ffi.new("struct hv_record *", {"tick": 50, "reason": HLT, "kind": EXIT, "operations": 1})
    lib.hv_record_exit(vcpu.recorder, out, 10, 0)
    (row,) = vcpu.rows()
    assert (row.exits, row.handler[0], sum(row.handler[2])) == (1, 0, 0)
    lib.hv_record_entry(vcpu.recorder, 80)
    lib.hv_record_entry(vcpu.recorder, 500)  # a second entry without an exit between is none
    assert (vcpu.rows()[0].handler[0], vcpu.recorder.handler_ticks) == (30, 30)


def test_what_is_switched_off_records_only_the_sums(vcpu):
    vcpu.recorder.enabled = 0
    vcpu.exit(ran=10, took=5)
    assert vcpu.rows() == []
    assert (vcpu.recorder.guest_ticks, vcpu.recorder.handler_ticks) == (10, 5)


def test_a_guest_that_touches_every_port_gets_no_more_rows_and_loses_no_count(vcpu):
    for port in range(65536):
        vcpu.exit(IO, PIO_OUT if port % 3 else PIO_IN, 1, port)
    for page in range(5000):
        vcpu.exit(MMIO, MMIO_READ, 8, 0xD0000000 + 4096 * page)
        vcpu.exit(MMIO, MMIO_WRITE, 4, 0xD0000000 + 4096 * page)
    vcpu.exit(HLT, EXIT, 0, 0)
    rows = vcpu.rows()
    assert len(rows) == ROWS - SPARE + 5  # what came late shares a row for each reason and direction
    assert sum(r.exits for r in rows) == 65536 + 10_000 + 1
    assert sum(r.exits for r in rows if r.kind == PIO_IN) == 21846
    spare = {(r.reason, r.kind): (r.size, r.exits) for r in rows if r.address == ELSEWHERE}
    assert set(spare) == {(IO, PIO_IN), (IO, PIO_OUT), (MMIO, MMIO_READ), (MMIO, MMIO_WRITE), (HLT, EXIT)}
    assert spare[MMIO, MMIO_READ] == (0, 5000)
    assert sum(r.guest[0] for r in rows) == 10 * (65536 + 10_001)
    vcpu.exit(IO, PIO_IN, 1, 0)
    assert [r.exits for r in vcpu.rows() if r.address == 0] == [2]  # who came early keeps a row


def test_more_reasons_than_spare_rows_still_are_counted(vcpu):
    for port in range(2000):
        vcpu.exit(address=port)
    for reason in range(10, 250):
        vcpu.exit(reason, EXIT, 0, 0)
    assert vcpu.recorder.row_count == ROWS
    assert sum(r.exits for r in vcpu.rows()) == 2240


def test_address_spaces_are_bounded(vcpu, file_of):
    file, chunks = file_of()
    file.start([vcpu])
    for number in range(SPACES + 500):
        vcpu.exit(place=(0x400000, (number + 1) << 12))
    vcpu.exit(place=(0x400000, 1 << 12))
    file.stop()
    assert vcpu.recorder.space_count == SPACES
    found = chunks()
    spaces = struct.unpack(f"<{SPACES}Q", b"".join(data for kind, _, data in found if kind == "SPAC"))
    assert spaces == tuple((number + 1) << 12 for number in range(SPACES))
    numbers = [record[4] for record in records_of(found)]
    assert numbers == [*range(1, SPACES + 1), *[0] * 500, 1]


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_trace_has_every_exit_in_order(vcpu, file_of):
    file, chunks = file_of()
    file.start([vcpu])
    expected, started = [], vcpu.now
    for number in range(1000):
        place = (0xFFFFFFFF81000000 + number, 0x1000) if number % 10 == 0 else None
        vcpu.exit(address=number % 7, ran=100, took=50 + number, place=place)
        started += 100
        expected.append((started, place[0] if place else 0, 50 + number, number % 7, 1 if place else 0))
        started += 50 + number
    assert file.stop() == [0]
    found = chunks()
    assert records_of(found) == expected
    keys = [key for kind, _, data in found if kind == "ROWS" for key in struct.iter_unpack("<QIBBBx", data)]
    assert keys == [(port, port, IO, PIO_OUT, 1) for port in range(7)]
    kinds = [kind for kind, _, _ in found]
    assert kinds.index("ROWS") < kinds.index("TRAC")
    assert kinds.index("SPAC") < kinds.index("TRAC")


@pytest.mark.parametrize(
    ("took", "written"),
    [((1 << 32) - 1, ((1 << 32) - 1, 0)), (1 << 32, (1 << 22, 0x8000)), (1 << 50, ((1 << 32) - 1, 0x8000))],
)
def test_long_handler_times_are_written_coarsely(vcpu, file_of, took, written):
    file, chunks = file_of()
    file.start([vcpu])
    vcpu.exit(took=took)
    file.stop()
    ((_, _, handler, row, _),) = records_of(chunks())
    assert (handler, row) == written
    assert vcpu.rows()[0].handler[0] == took


def test_a_full_ring_drops_and_counts(vcpu, tmp_path):
    """Nobody drains while 65536 + 100 exits come: the last hundred are not in the trace, all are in the counts."""
    path = tmp_path / "trace"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    stop, event = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    file = lib.hv_trace_file_new(fd, stop, event)
    assert lib.hv_trace_file_add(file, vcpu.recorder) == 0
    for number in range(RING + 100):
        vcpu.exit(ran=1, took=number & 0xFF)
    assert os.eventfd_read(event) == 1  # half full was told once
    assert lib.hv_trace_dropped(vcpu.recorder) == 100
    os.eventfd_write(stop, 1)
    lib.hv_trace_file_run(file)
    for _ in range(3):
        vcpu.exit()
    lib.hv_trace_file_run(file)
    assert lib.hv_trace_dropped(vcpu.recorder) == 100
    lib.hv_trace_file_free(file)
    for each in (fd, stop, event):
        os.close(each)
    records = records_of(chunks_of(b"hvprof\r\n" + path.read_bytes()))
    assert len(records) == RING + 3
    assert [record[2] for record in records[:RING]] == [number & 0xFF for number in range(RING)]
    assert vcpu.rows()[0].exits == RING + 103


def test_several_vcpus_and_python_never_interleave(file_of):
    """Four vCPUs at full speed, and two threads that write chunks of their own: each chunk is whole."""
    vcpus = [Recorder() for _ in range(4)]
    file, chunks = file_of()
    file.start(vcpus)

    def run(vcpu):
        for number in range(3000):
            vcpu.exit(address=number % 50, took=number)

    def write(letter):
        for number in range(200):
            file.write("NAME", letter * (1 + 37 * number % 5000))

    threads = [threading.Thread(target=run, args=(vcpu,)) for vcpu in vcpus]
    threads += [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.stop() == [0] * 4
    found = chunks()
    texts = [data for kind, _, data in found if kind == "NAME"]
    assert len(texts) == 400
    assert all(len(set(text)) == 1 for text in texts)
    for index in range(4):
        assert [record[2] for record in records_of(found, index)] == list(range(3000))
    file.close()
    for vcpu in vcpus:
        vcpu.close()


# --- files that end early ---------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit():
    """Set the largest size of a file, in bytes, until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_ends_with_a_whole_chunk(vcpu, file_of, file_limit):
    file, chunks = file_of()
    file.start([vcpu])
    file_limit(10_000)
    for _ in range(300):
        vcpu.exit()
    for _ in range(20):
        file.write("NAME", b"x" * 1000)
    lost = file.stop()
    assert file.error == errno.EFBIG
    found = chunks()  # which looks that each is whole
    texts = sum(kind == "NAME" for kind, _, _ in found)
    assert len(records_of(found)) + sum(lost) == 300
    assert texts < 10
    file_limit(resource.RLIM_INFINITY)
    file.write("NAME", b"later")
    assert chunks() == found  # it has ended for good
    file.close()
    assert file.error == errno.EFBIG
    vcpu.exit()  # nobody traces it any more
    assert vcpu.rows()[0].exits == 301


def test_a_disk_that_is_full_from_the_start_is_told_at_once():
    with pytest.raises(HostError, match="/dev/full"):
        TraceFile("/dev/full", b"hvprof\r\n")


def test_writing_after_the_end_does_nothing(file_of):
    file, chunks = file_of()
    file.write("NAME", b"1")
    file.close()
    file.close()
    file.write("NAME", b"2")
    assert [data for _, _, data in chunks()] == [b"1"]


def test_more_vcpus_than_a_file_takes(file_of):
    vcpus = [Recorder() for _ in range(257)]
    file, _ = file_of()
    with pytest.raises(HostError):
        file.start([SimpleNamespace(recorder=vcpu.recorder) for vcpu in vcpus])
    file.close()
    for vcpu in vcpus:
        vcpu.close()

"""Single exits as arrays: what a killed run counted, and places."""

import mmap
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from profile_files import EXIT, HLT, IO, PIO_IN, PIO_OUT, START, record
from test_recorder import Recorder, chunks_of, records_of

from hypervisor.kvm.recorder import TraceFile
from hypervisor.profile import trace as trace_module
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.trace import RowKey, Trace

OUT, IN, HALT = RowKey(0x80, IO, PIO_OUT, 1), RowKey(0x60, IO, PIO_IN, 1), RowKey(0, HLT, EXIT, 0)
KERNEL = 0xFFFFFFFF81000000


def trace_of(*chunks, keys=None, spaces=None):
    """Make a trace of (vcpu, records) chunks that lie behind one another."""
    data, places = b"", []
    for vcpu, records in chunks:
        packed = b"".join(records)
        places.append((vcpu, len(data), len(packed)))
        data += packed
    keys = {0: [OUT, IN, HALT]} if keys is None else keys
    spaces = {vcpu: np.array(values, "<u8") for vcpu, values in (spaces or {}).items()}
    return Trace(data, places, keys=keys, spaces=spaces, start_tick=START)


def histogram(raw):
    total, largest, words = raw
    return Histogram({bucket: count for bucket, count in enumerate(list(words)) if count}, total, largest)


def test_counts_and_times_are_those_of_the_records():
    records = [record(100, 0, 7), record(200, 1, 10), record(250, 0, 8)]
    out, inp, halt = trace_of((0, records)).counts()[0]
    assert (out.address, out.reason, out.kind, out.size) == OUT
    assert (out.exits, inp.exits, halt.exits) == (2, 1, 0)
    assert histogram(out.handler) == Histogram.of([7, 8])
    assert histogram(out.guest) == Histogram.of([100, 40])  # from the entry before: 0, and 200 + 10
    assert histogram(inp.guest) == Histogram.of([93])
    assert histogram(halt.guest) == Histogram()


def test_chunks_of_one_vcpu_go_on_where_the_last_ended():
    whole = trace_of((0, [record(100, 0, 7), record(200, 0, 9)])).counts()
    parts = trace_of((0, [record(100, 0, 7)]), (0, []), (0, [record(200, 0, 9)])).counts()
    assert histogram(whole[0][0].guest) == histogram(parts[0][0].guest) == Histogram.of([100, 93])


def test_vcpus_are_told_apart():
    made = trace_of(
        (0, [record(100, 0, 1)]),
        (1, [record(150, 0, 2)]),
        (0, [record(300, 1, 3)]),
        keys={0: [OUT, IN], 1: [HALT]},
    )
    counts = made.counts()
    assert [row.exits for row in counts[0]] == [1, 1]
    assert [row.exits for row in counts[1]] == [1]
    assert histogram(counts[1][0].guest) == Histogram.of([150])
    chunks = list(made.chunks(2.0))
    assert [chunk.vcpu for chunk in chunks] == [0, 1, 0]
    assert [chunk.row.tolist() for chunk in chunks] == [[0], [2], [1]]  # numbered through all vCPUs
    assert [chunk.at_ns.tolist() for chunk in chunks] == [[200.0], [300.0], [600.0]]
    assert [chunk.handler_ns.tolist() for chunk in chunks] == [[2.0], [4.0], [6.0]]
    assert made.last_tick == START + 303


def test_coarse_handler_times():
    long = 3 << 40
    made = trace_of((0, [record(100, 1, long), record(200 + long, 0, 9)]))
    counts = made.counts()[0]
    assert histogram(counts[1].handler) == Histogram.of([long])
    assert histogram(counts[0].guest) == Histogram.of([100])
    assert next(iter(made.chunks(1.0))).handler_ns.tolist() == [float(long), 9.0]


def test_rows_that_nobody_explained_are_left_out():
    made = trace_of((0, [record(100, 0, 7), record(200, 77, 9), record(300, 1, 5)]), (5, [record(400, 0, 1)]))
    assert [row.exits for row in made.counts()[0]] == [1, 1, 0]
    assert [len(chunk.row) for chunk in made.chunks(1.0)] == [2]
    assert made.sample(lambda rip, cr3: "x") == {}


def test_an_incomplete_record_at_the_end_is_left_out():
    data = record(100, 0, 7) + record(200, 0, 9)[:-1]
    made = Trace(data, [(0, 0, len(data))], keys={0: [OUT]}, spaces={}, start_tick=START)
    assert made.counts()[0][0].exits == 1


def test_user_places_are_named_by_their_space_kernel_places_by_address_alone():
    asked = []

    def name(rip, cr3):
        asked.append((rip, cr3))
        return f"{rip:#x} in {cr3:#x}"

    records = [
        record(1, 0, 1, rip=0x401000, space=1),
        record(2, 0, 1, rip=0x401000, space=2),
        record(3, 0, 1, rip=0x401000),
        record(4, 1, 1, rip=KERNEL, space=1),
        record(5, 1, 1, rip=KERNEL, space=2),
        record(6, 0, 1),
        record(7, 0, 1, rip=0x401000, space=9),
    ]
    made = trace_of((0, records), spaces={0: [0x1000, 0x2000]})
    found = made.sample(name)
    assert found == {
        (0, 0): {"0x401000 in 0x1000": 1, "0x401000 in 0x2000": 1, "0x401000 in 0x0": 2},
        (0, 1): {f"{KERNEL:#x} in 0x0": 2},
    }
    assert len(asked) == 5  # each place once; one that has no CR3, or an unknown one, is in space 0
    (chunk,) = made.chunks(1.0)
    names = [made.places[place] if place >= 0 else None for place in chunk.place.tolist()]
    assert names == [
        "0x401000 in 0x1000",
        "0x401000 in 0x2000",
        "0x401000 in 0x0",
        f"{KERNEL:#x} in 0x0",
        f"{KERNEL:#x} in 0x0",
        None,
        "0x401000 in 0x0",
    ]


def test_the_numbers_of_address_spaces_are_a_vcpus_own():
    """Number 1 is one process on vCPU 0 and another on vCPU 1: the same address there is another place."""
    user, kernel = record(1, 0, 1, rip=0x401000, space=1), record(2, 0, 1, rip=KERNEL, space=1)
    made = trace_of(
        (0, [user, kernel]), (1, [user, kernel]), keys={0: [OUT], 1: [OUT]}, spaces={0: [0x1000], 1: [0x2000]}
    )
    asked = []
    found = made.sample(lambda rip, cr3: asked.append(rip) or f"{cr3:#x}")
    assert found == {(0, 0): {"0x1000": 1, "0x0": 1}, (1, 0): {"0x2000": 1, "0x0": 1}}
    assert sorted(asked) == [0x401000, 0x401000, KERNEL]
    assert [[made.places[place] for place in chunk.place.tolist()] for chunk in made.chunks(1.0)] == [
        ["0x1000", "0x0"],
        ["0x2000", "0x0"],
    ]


@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), max_size=20), max_size=6))
def test_places_are_counted_exactly(chunks):
    """A place's count by row is that of the records, however they are divided; RIP 0 is none."""
    made = trace_of(*[(0, [record(n + 1, row, 1, rip=rip) for n, (row, rip) in enumerate(some)]) for some in chunks])
    expected = {}
    for row, rip in (pair for some in chunks for pair in some if pair[1]):
        expected.setdefault((0, row), {}).setdefault(str(rip // 3), 0)
        expected[0, row][str(rip // 3)] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_module._Tally, "LARGE", 4)
        assert made.sample(lambda rip, cr3: str(rip // 3)) == expected


def test_addresses_of_one_function_are_one_place():
    records = [record(n + 1, 0, 1, rip=KERNEL + n) for n in range(20)]
    made = trace_of((0, records))
    assert made.sample(lambda rip, cr3: f"f{(rip - KERNEL) // 10}") == {(0, 0): {"f0": 10, "f1": 10}}
    assert made.places == ["f0", "f1"]


def test_too_many_places_share_a_name(monkeypatch):
    monkeypatch.setattr(trace_module, "MOST_PLACES", 10)
    asked = []
    records = [record(n + 1, 0, 1, rip=KERNEL + n) for n in range(1000)]
    made = trace_of((0, records), (0, records))
    found = made.sample(lambda rip, cr3: asked.append(rip) or hex(rip))
    assert len(asked) == 10
    assert sum(found[0, 0].values()) == 2000
    assert found[0, 0]["[one place too many]"] == 2 * 990
    for chunk in made.chunks(1.0):
        names = [made.places[place] for place in chunk.place.tolist()]
        assert names.count("[one place too many]") == 990


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 1 << 33), st.integers(0, 1 << 33)), max_size=40))
def test_what_c_traced_counts_as_what_c_counted(exits):
    """The trace's counts and histograms are those of the recorder, but for the bits that coarse times lose."""
    keys = [OUT, IN, HALT]
    vcpu = Recorder()
    vcpu.now = START
    with tempfile.NamedTemporaryFile() as kept:
        file = TraceFile(kept.name, b"hvprof\r\n")
        file.start([vcpu])
        for which, ran, took in exits:
            key = keys[which]
            coarse = took if took < 1 << 32 else took >> 10 << 10
            vcpu.exit(key.reason, key.kind, key.size, key.address, ran=ran, took=coarse)
        assert file.stop() == [0]
        counted = {(r.address, r.reason, r.kind, r.size): r for r in vcpu.rows()}
        file.close()
        chunks = chunks_of(kept.read())
    vcpu.close()
    packed = b"".join(data for kind, _, data in chunks if kind == "TRAC")
    order = [RowKey(*key) for key in counted]
    traced = Trace(packed, [(0, 0, len(packed))], keys={0: order}, spaces={}, start_tick=START).counts()[0]
    assert len(records_of(chunks)) == len(exits)
    for row in traced:
        same = counted[row.address, row.reason, row.kind, row.size]
        assert row.exits == same.exits
        assert histogram(row.guest) == histogram(same.guest)
        assert histogram(row.handler) == histogram(same.handler)


@pytest.mark.parametrize("tick", [0, (1 << 63) - 1, (1 << 64) - 1 - START])
def test_times_that_cannot_be_are_no_error(tick):
    made = trace_of((0, [record(tick, 0, 1 << 41), record(3, 0, 5)]), (0, [record(tick, 1, 1 << 41)]))
    assert sum(row.exits for row in made.counts()[0]) == 3
    assert made.last_tick >= START
    assert all(len(chunk.at_ns) for chunk in made.chunks(1.0))


def test_it_reads_a_mapped_file_in_place(tmp_path):
    path = tmp_path / "records"
    path.write_bytes(b"\0" + record(100, 0, 7))  # at an odd offset, as in a profile
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    made = Trace(data, [(0, 1, 24)], keys={0: [OUT]}, spaces={}, start_tick=START)
    assert made.counts()[0][0].exits == 1

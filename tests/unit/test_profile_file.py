"""Profile files: whole, cut at every byte, damaged, and what is no profile. One clear line each, never a traceback."""

import base64
import json
import os
import random
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_files import (
    EXIT,
    HLT,
    IO,
    MAGIC,
    PIO_IN,
    PIO_OUT,
    ROW_BYTES,
    chunk,
    counted,
    head,
    record,
    row_keys,
    spaces,
    summary,
    tail,
    trace,
)

from hypervisor.errors import ImageError, VmmError
from hypervisor.kvm.recorder import row_size
from hypervisor.profile.exits import ExitRow
from hypervisor.profile.file import load
from hypervisor.profile.fileformat import pack_row
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.names import GuestNames

KEYS = [(0x3F8, IO, PIO_OUT, 1), (0x60, IO, PIO_IN, 1), (0, HLT, EXIT, 0)]
NAMES = chunk(b"NAME", json.dumps([[PIO_OUT, 0x3F8, "uart0", "THR"], [PIO_IN, 0x60, None, None]]).encode())
EXITS = [(100, 0, 7), (200, 1, 10), (300, 0, 9), (400, 2, 50)]
COUNTED = [(KEYS[0], [100, 90], [7, 9]), (KEYS[1], [93], [10]), (KEYS[2], [91], [50])]


def mark(name, at_ns, *rows):
    packed = [base64.b64encode(zlib.compress(counted(some))).decode() for some in rows]
    return chunk(b"MARK", json.dumps({"name": name, "at_ns": at_ns, "rows": packed}).encode())


def traced(exits=EXITS):
    return trace([record(tick, row, took, rip=0xFFFFFFFF81000000 + tick, space=1) for tick, row, took in exits])


BEFORE_END = head() + NAMES + row_keys(KEYS) + spaces([0x5000]) + traced()
NAMED = chunk(b"SYMS", GuestNames().to_bytes())
COUNTERS = chunk(b"KVMS", json.dumps({"vm": {"a": 1}, "vcpu0": {"exits": 4}}).encode())
KERNEL_ROW = ExitRow("kernel", "npf", None, None, None, None, None, 0, 3, 3, Histogram.of([8]), Histogram.of([9]), {})
KERNEL = chunk(b"KERN", json.dumps([pack_row(KERNEL_ROW)]).encode())
WHOLE = MAGIC + BEFORE_END + mark("start", 50, []) + mark("half", 150, COUNTED[:2]) + summary(COUNTED) + NAMED + tail()


@pytest.fixture
def load_bytes(tmp_path):
    path = tmp_path / "some.hvprof"

    def put(data):
        path.write_bytes(data)
        return load(str(path))

    return put


def read_all(profile):
    """Look at everything that a report may look at."""
    assert profile.exits.count >= 0
    repr(profile.exits)
    json.dumps(profile.as_json())
    for chunk_of in profile.trace():
        assert len(chunk_of.at_ns) == len(chunk_of.row) == len(chunk_of.place)
        assert all(row < len(profile.trace_rows) for row in chunk_of.row.tolist())
        assert all(place < len(profile.places) for place in chunk_of.place.tolist())
    for name in profile.exits.marks:
        assert profile.exits.between(name).count >= 0


def test_the_layout_is_the_recorders():
    assert row_size() == ROW_BYTES


def test_a_whole_file(load_bytes):
    profile = load_bytes(WHOLE)
    assert profile.notes == ()
    assert profile.info == {"kernel": "flat", "cpus": 1, "ram_mib": 2, "outcome": "HALTED"}
    assert profile.wall_ns == 1_000_000
    assert [(row.name, row.count) for row in profile.exits] == [("io uart0 THR out", 2), ("io 0x60 in", 1), ("hlt", 1)]
    assert profile.exits.pio("uart0").latency.total == 16 * 0.5  # two million ticks were a million nanoseconds
    assert profile.exits.pio("uart0").symbols == {"0xffffffff81000064": 1, "0xffffffff8100012c": 1}
    assert profile.marks == (("start", 50), ("half", 150))
    assert profile.exits.between("start", "half").count == 3
    assert profile.exits.between("half").count == 1
    (times,) = profile.vcpus
    assert (times.exits, times.guest_ns, times.handler_ns) == (4, 187, 38)
    (single,) = profile.trace()
    assert single.at_ns.tolist() == [50.0, 100.0, 150.0, 200.0]
    assert [profile.trace_rows[row].name for row in single.row.tolist()] == [
        *("io uart0 THR out", "io 0x60 in", "io uart0 THR out", "hlt")
    ]
    read_all(profile)


def test_a_run_that_was_killed_is_counted_from_its_trace(load_bytes):
    profile = load_bytes(MAGIC + BEFORE_END)
    assert profile.notes == (
        "the run did not end in order: its last moments are not in the file",
        "places have no names: the run ended before the guest's symbols were looked for",
    )
    assert [(row.name, row.count) for row in profile.exits] == [("io uart0 THR out", 2), ("io 0x60 in", 1), ("hlt", 1)]
    assert profile.exits.pio("uart0").latency == Histogram.of([7, 9])
    assert profile.wall_ns == 450  # KVM said a tick is a nanosecond
    read_all(profile)


def test_counts_that_go_further_than_the_trace_win(load_bytes):
    more = [(KEYS[0], [10] * 9, [5] * 9)]
    assert load_bytes(MAGIC + head() + row_keys(KEYS) + traced() + summary(more)).exits.count == 9
    assert load_bytes(MAGIC + head() + row_keys(KEYS) + traced() + summary(COUNTED[:1])).exits.count == 4


def test_a_profile_without_a_trace(load_bytes):
    profile = load_bytes(MAGIC + head(trace=False) + summary(COUNTED[:1]) + summary(COUNTED) + tail(dropped=[]))
    assert not profile.has_trace
    assert profile.exits.count == 4  # the last ones count
    assert profile.exits.symbols == {}
    read_all(profile)


def test_exits_that_the_trace_lacks_are_told(load_bytes):
    profile = load_bytes(MAGIC + BEFORE_END + summary(COUNTED) + NAMED + tail(dropped=[17]))
    assert len(profile.notes) == 1
    assert "17 single exits" in profile.notes[0]


def test_ticks_of_unknown_length_are_told(load_bytes):
    profile = load_bytes(MAGIC + head(khz=0) + row_keys(KEYS) + traced())
    assert any("not known" in note for note in profile.notes)


def test_vcpus_that_a_profile_says_nothing_of_are_no_error(load_bytes):
    profile = load_bytes(MAGIC + head() + trace([record(1, 0, 1)], vcpu=3) + summary(COUNTED, vcpu=7) + tail())
    assert [times.index for times in profile.vcpus] == [7]
    read_all(profile)


def test_chunks_of_a_later_kind_are_passed_over(load_bytes):
    assert load_bytes(MAGIC + head() + chunk(b"ZZZZ", b"?" * 99) + summary(COUNTED) + tail()).exits.count == 4


def test_a_file_cut_at_every_byte_gives_what_it_holds_and_says_so(load_bytes):
    head_ends = len(MAGIC) + len(head())
    counts = []
    for length in range(len(WHOLE)):
        try:
            profile = load_bytes(WHOLE[:length])
        except ImageError:
            assert length < head_ends
            continue
        assert length >= head_ends
        assert any("did not end in order" in note for note in profile.notes)
        read_all(profile)
        counts.append(profile.exits.count)
    assert counts == sorted(counts)  # more bytes never tell less
    assert (counts[0], counts[-1]) == (0, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\n", "is no profile"),
        (b"hvprof\n", "is no profile"),  # line ends were changed
        (b"\x7fELF" + bytes(100), "is no profile"),
        (random.Random(1).randbytes(5000), "is no profile"),
        (MAGIC, "holds nothing"),
        (MAGIC + random.Random(2).randbytes(5000), "holds nothing"),
        (MAGIC + chunk(b"HEAD", b""), "is damaged"),
        (MAGIC + chunk(b"HEAD", b"[]"), "is damaged"),
        (MAGIC + chunk(b"HEAD", b"{}"), "is damaged"),
        (MAGIC + chunk(b"HEAD", b"[" * 100_000), "is damaged"),
        (MAGIC + head(version=2), "of version 2, not 1"),
        (MAGIC + head(tick=-1), "is damaged"),
        (MAGIC + head(tick=1 << 70), "is damaged"),
        (MAGIC + head(tick="0"), "is damaged"),
        (MAGIC + head(reasons=[]), "is damaged"),
        (MAGIC + head() + chunk(b"ROWS", b"123"), "is damaged"),
        (MAGIC + head() + row_keys(KEYS, first=1), "is damaged"),
        (MAGIC + head() + chunk(b"SPAC", b"123") + traced(), "is damaged"),
        (MAGIC + head() + chunk(b"SUMM", b"no zlib"), "is damaged"),
        (MAGIC + head() + chunk(b"SUMM", zlib.compress(b"12345")), "is damaged"),
        (MAGIC + head() + chunk(b"SUMM", zlib.compress(bytes(ROW_BYTES * 1025))), "is damaged"),
        (MAGIC + head() + chunk(b"SUMM", zlib.compress(counted(COUNTED))[:-1]), "is damaged"),
        (MAGIC + head() + chunk(b"NAME", b"[1]"), "is damaged"),
        (MAGIC + head() + chunk(b"MARK", b"{}"), "is damaged"),
        (MAGIC + head() + chunk(b"TAIL", b"{}"), None),
        (MAGIC + head() + tail(wall_ns=1e999), "is damaged"),
    ],
)
def test_what_is_no_profile(load_bytes, data, words):
    if words is None:
        assert load_bytes(data).exits.count == 0
        return
    with pytest.raises(ImageError) as caught:
        load_bytes(data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.hint


def test_a_bomb_takes_no_memory(load_bytes):
    bomb = zlib.compress(bytes(1 << 30), 9)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError):
            load_bytes(MAGIC + head() + chunk(b"SUMM", bomb))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_mark_that_is_damaged_is_told_when_it_is_asked_for(load_bytes):
    bad = chunk(b"MARK", json.dumps({"name": "m", "at_ns": 1, "rows": ["AAAA"]}).encode())
    profile = load_bytes(MAGIC + head() + bad + summary(COUNTED) + tail())
    with pytest.raises(ImageError, match="is damaged"):
        profile.exits.between("m")


def try_all(load_bytes, data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(VmmError):
            read_all(load_bytes(data))


@settings(max_examples=300)
@given(st.data())
def test_flipped_bytes(load_bytes, data):
    spoiled = bytearray(WHOLE + COUNTERS + KERNEL)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(8, len(spoiled) - 1))] ^= data.draw(st.integers(1, 255))
    try_all(load_bytes, bytes(spoiled))


PIECES = [
    NAMED,
    COUNTERS,
    KERNEL,
    head(),
    NAMES,
    row_keys(KEYS),
    row_keys(KEYS, 1),
    spaces([1]),
    traced(),
    summary(COUNTED),
    tail(),
    mark("m", 1),
]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=40), max_size=8))
def test_chunks_in_any_order(load_bytes, pieces):
    try_all(load_bytes, MAGIC + head() + b"".join(pieces))


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_records(load_bytes, data):
    try_all(load_bytes, MAGIC + head() + row_keys(KEYS) + spaces([1]) + chunk(b"TRAC", data))


# --- files that cannot be read ----------------------------------------------------------------------------------------


def test_a_missing_file_and_a_directory(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ImageError, match=f"cannot read {path}") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)


def test_a_file_that_is_not_yours(tmp_path):
    (tmp_path / "secret").write_bytes(WHOLE)
    (tmp_path / "secret").chmod(0)
    tmp_path.chmod(0o755)
    script = (
        "import os\n"
        "from hypervisor.errors import ImageError\n"
        "from hypervisor.profile.file import load\n"
        "if not os.getuid(): os.setuid(65534)\n"  # root may read everything
        "try: load('secret')\n"
        "except ImageError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "cannot read secret: Permission denied\n", result.stderr

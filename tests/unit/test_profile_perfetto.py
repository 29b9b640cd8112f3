"""Perfetto traces, read back with the package's own classes."""

import io
import sys
import tracemalloc

import numpy as np
import pytest
from profiles import sample

from hypervisor.errors import ConfigError
from hypervisor.profile.exits import Exits
from hypervisor.profile.model import Profile, TraceChunk, VcpuTimes
from hypervisor.profile.report import perfetto

BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4  # TrackEvent.Type
CLEARED, NEEDED = 1, 2  # TracePacket.SequenceFlags


def parse(data):
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace  # noqa: PLC0415 - the package is optional

    trace = Trace()
    trace.ParseFromString(data)
    return trace


class Read:
    """A trace as a viewer takes it: tracks by name, slices by track, in the order of their times."""

    def __init__(self, profile):
        packets = parse(perfetto.render(profile)).packet
        interned = packets[0].interned_data
        assert packets[0].sequence_flags == CLEARED
        assert len({packet.trusted_packet_sequence_id for packet in packets}) == 1
        self.names = {entry.iid: entry.name for entry in interned.event_names}
        self.categories = {entry.iid: entry.name for entry in interned.event_categories}
        self.strings = {entry.iid: entry.str.decode() for entry in interned.debug_annotation_string_values}
        self.annotations = {entry.iid: entry.name for entry in interned.debug_annotation_names}
        self.tracks = {p.track_descriptor.uuid: p.track_descriptor for p in packets if p.HasField("track_descriptor")}
        self.events = [packet for packet in packets if packet.HasField("track_event")]
        for packet in self.events:
            assert packet.track_event.track_uuid in self.tracks
            if packet.track_event.name_iid:
                assert packet.sequence_flags & NEEDED

    def on(self, name):
        found = [uuid for uuid, track in self.tracks.items() if track.name == name]
        assert len(found) == 1, name
        return [packet for packet in self.events if packet.track_event.track_uuid == found[0]]

    def slices(self, name):
        """Return (begin, end, name, category, annotations) of a track; they must follow each other, not overlap."""
        out, open_slice, last = [], None, 0
        for packet in self.on(name):
            event = packet.track_event
            assert packet.timestamp >= last
            last = packet.timestamp
            if event.type == BEGIN:
                assert open_slice is None
                notes = {
                    self.annotations[note.name_iid]: self.strings[note.string_value_iid]
                    if note.string_value_iid
                    else note.pointer_value
                    for note in event.debug_annotations
                }
                (category,) = event.category_iids
                open_slice = (packet.timestamp, self.names[event.name_iid], self.categories[category], notes)
            else:
                assert event.type == END
                begin, what, category, notes = open_slice
                out.append((begin, packet.timestamp, what, category, notes))
                open_slice = None
        assert open_slice is None
        return out


def exits_of(profile, vcpu):
    chunks = [chunk for chunk in profile.trace() if chunk.vcpu == vcpu]
    return [
        np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("at_ns", "handler_ns", "row", "place")
    ]


@pytest.mark.parametrize("vcpu", [0, 1])
def test_slices_are_the_exits_and_the_guest_between_them(vcpu):
    profile = sample()
    at, took, rows, places = exits_of(profile, vcpu)
    slices = Read(profile).slices(f"vCPU {vcpu}")
    exits, guest = slices[::2], slices[1::2]
    assert len(exits) == len(at) == profile.vcpus[vcpu].exits
    assert {(entry[2], entry[3]) for entry in guest} == {("guest", "guest")}
    assert [entry[2] for entry in exits] == [profile.trace_rows[row].name for row in rows]
    assert [entry[3] for entry in exits] == [profile.trace_rows[row].reason for row in rows]
    assert [entry[4].get("symbol") for entry in exits] == [profile.places[place] for place in places]
    assert [entry[4].get("address") for entry in exits] == [profile.trace_rows[row].address for row in rows]
    # an exit ends where the next one begins at the latest: the sample's happen at random times
    ends = np.minimum(np.rint(at) + np.rint(took), np.append(np.rint(at[1:]), np.inf))
    assert np.array_equal([entry[0] for entry in exits], np.rint(at))
    assert np.array_equal([entry[1] for entry in exits], ends)
    assert guest[-1][1] == max(exits[-1][1], profile.wall_ns)


def test_tracks_have_names_and_a_parent():
    read = Read(sample())
    machine = next(track for track in read.tracks.values() if track.HasField("process"))
    assert machine.process.process_name == "hv: debian <6.1>"
    names = {track.name for track in read.tracks.values() if track.parent_uuid == machine.uuid}
    assert names == {"marks", "vCPU 0", "vCPU 1", "vCPU 0 exits/s", "vCPU 1 exits/s"}


def test_marks_and_notes_are_instants():
    events = Read(sample()).on("marks")
    assert {packet.track_event.type for packet in events} == {INSTANT}
    found = [(packet.timestamp, packet.track_event.name) for packet in events]
    assert found[:2] == [(2_000_000, "kernel"), (7_000_000, "init </script>")]
    assert found[2][1].startswith("note: in-kernel exits")


def test_rates_add_up_to_the_exits():
    profile = sample()
    points = Read(profile).on("vCPU 0 exits/s")
    assert {packet.track_event.type for packet in points} == {COUNTER}
    width = profile.wall_ns / (len(points) - 1)
    assert sum(packet.track_event.double_counter_value for packet in points) * width / 1e9 == pytest.approx(929)
    assert points[-1].track_event.double_counter_value == 0


def test_interned_names_are_there_once():
    read = Read(sample())
    for names in (read.names, read.categories, read.strings):
        assert len(set(names.values())) == len(names)


def test_without_a_trace_there_are_totals():
    read = Read(sample(trace=False))
    values = [packet.track_event.counter_value for packet in read.on("io uart0 LSR in: exits (user)")]
    assert values == [0, 420]
    assert [p.track_event.counter_value for p in read.on("npf: handler ns (kernel)")] == [0, 1_400_000]
    assert not [packet for packet in read.events if packet.track_event.type == BEGIN]


def traced(count, *, chunk=50_000, at=None, places=("here",)):
    """A profile with a long trace: an exit each microsecond on two vCPUs in turn, in chunks."""
    rows = sample().trace_rows

    def chunks():
        for number, start in enumerate(range(0, count, chunk)):
            size = min(chunk, count - start)
            times = (start + np.arange(size)) * 1000.0 if at is None else np.array(at[start : start + size])
            row = (start + np.arange(size)) % len(rows)
            yield TraceChunk(number % 2, times, np.full(size, 400.0), row, np.full(size, -1))

    vcpus = [VcpuTimes(index, count // 2, 1, 1, 1) for index in range(2)]
    wall = count * 1000
    return Profile(info={}, wall_ns=wall, vcpus=vcpus, exits=Exits([]), trace=chunks, trace_rows=rows, places=places)


def test_chunks_and_pieces_join_without_a_seam():
    profile = traced(perfetto.PIECE * 3 + 7, chunk=perfetto.PIECE + 5)
    read = Read(profile)
    found = sorted(entry for vcpu in (0, 1) for entry in read.slices(f"vCPU {vcpu}")[::2])
    assert [entry[0] for entry in found] == [number * 1000 for number in range(perfetto.PIECE * 3 + 7)]
    assert {entry[1] - entry[0] for entry in found} == {400}
    assert all("symbol" not in entry[4] for entry in found)


def test_times_that_go_back_or_overlap_still_nest():
    read = Read(traced(5, at=[1000.0, 1100.0, 900.0, 1e15, 1e15 + 1]))
    slices = read.slices("vCPU 0")
    assert len(slices) == 10
    assert [entry[0] for entry in slices[::2]] == [1000, 1100, 1100, 10**15, 10**15 + 1]


def test_an_exit_that_outlasts_its_chunk_still_nests():
    """The chunk's last exit takes 400 ns; the next one of its vCPU, in a later chunk, is said to begin before that."""
    slices = Read(traced(3, chunk=1, at=[1000.0, 0.0, 1100.0])).slices("vCPU 0")
    assert [entry[:2] for entry in slices[::2]] == [(1000, 1400), (1400, 1800)]


def test_memory_does_not_grow_with_the_trace():
    class Sink(io.RawIOBase):
        size = 0

        def write(self, data):
            self.size += len(data)
            return len(data)

    def cost(count):
        sink = Sink()
        tracemalloc.start()
        perfetto.write(traced(count, chunk=5000), sink)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return sink.size, peak

    cost(1000)  # imports
    small, large = cost(10_000), cost(200_000)
    assert large[0] > 15 * small[0]
    assert large[1] < 1.5 * small[1] + 1_000_000


def test_hostile_names_are_text():
    read = Read(traced(3, places=("\udcff", "a\nb", "\x1b")))
    assert list(read.strings.values()) == ["\\udcff", "a\\nb", "\\x1b"]


def test_the_package_is_optional(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "perfetto"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "perfetto", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        perfetto.render(sample())
    assert "pip install" in caught.value.hint


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 1 << 35, (1 << 63) - 1])
def test_numbers_are_varints(value):
    """Seven bits a byte, lowest first; the top bit says that more follow."""
    data = perfetto.varint(value)
    assert sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(data)) == value
    assert [byte >> 7 for byte in data] == [1] * (len(data) - 1) + [0]

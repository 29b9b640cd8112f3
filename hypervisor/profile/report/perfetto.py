"""A profile as a Perfetto trace, for ui.perfetto.dev and trace_processor: written as it is read, packet by packet.

Packets are made by the package's own classes. Those of exits of one kind differ only by their time, so each kind is
made once, and numpy puts the times into copies of it, two thousand exits at once: that is ten times as fast as a
message for each, and the memory that it takes does not depend on the trace's length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, Final

from hypervisor.errors import ConfigError
from hypervisor.profile.report.units import plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hypervisor.profile.exits import ExitRow
    from hypervisor.profile.model import Profile, TraceChunk

__all__ = ["BINS", "render", "write"]

SEQUENCE: Final = 1
TRACE_PACKET: Final = b"\x0a"
"""Tag of Trace.packet: field 1, length-delimited."""
TIMESTAMP: Final = b"\x40"
"""Tag of TracePacket.timestamp: field 8, a varint."""
TIME_SIZE: Final = 8
"""Bytes of an exit's time: enough for two years. Zeros at the upper end of a varint are no fault."""
PIECE: Final = 1 << 11
"""Exits that are turned into packets at once: what that takes stays in the cache."""
BINS: Final = 500
"""Points of a rate's counter track."""
GUEST: Final = "guest"
MACHINE, MARKS, FIRST_VCPU, FIRST_RATE, FIRST_TOTAL = 1, 2, 1 << 8, 1 << 16, 1 << 24
"""Numbers (uuid) of the tracks."""


def write(profile: Profile, file: BinaryIO) -> None:
    """Write the trace to `file`: a track for each vCPU with its exits and the guest between them, rates, marks.

    Without single exits in the profile there are only totals: a counter for each kind of exit.

    Raises:
        ConfigError: the package `perfetto` is not installed.
    """
    _Writer(profile, file).write()


def render(profile: Profile) -> bytes:
    """Return the trace as `write` writes it: for profiles that are small."""
    import io

    out = io.BytesIO()
    write(profile, out)
    return out.getvalue()


def _messages() -> Any:
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
    except ImportError as error:
        raise ConfigError(
            "the package `perfetto` is not installed", hint='pip install "trapvisor[perfetto]", or: perfetto protobuf'
        ) from error
    return perfetto_trace_pb2


def varint(value: int, size: int = 1) -> bytes:
    """Return a number as protobuf writes it, filled up to `size` bytes."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < size:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _numbered(*texts: str) -> dict[str, int]:
    """Number different texts from 1, as interned data is: 0 is none."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts), 1)}


class _Writer:
    """One trace."""

    def __init__(self, profile: Profile, file: BinaryIO) -> None:
        self._profile = profile
        self._file = file
        self._proto = _messages()
        self._first = True

    def write(self) -> None:
        """Write all of it."""
        self._write_tracks()
        for name, at_ns in self._profile.marks:
            self._instant(plain(name), at_ns)
        for note in self._profile.notes:
            self._instant(f"note: {plain(note)}", 0)
        if self._profile.has_trace:
            _Slices(self._profile, self._proto, self._file).write()
        else:
            self._write_totals()

    # --- single packets -----------------------------------------------------------------------------------------------

    def _put(self, packet: Any) -> None:
        packet.trusted_packet_sequence_id = SEQUENCE
        if self._first:  # whoever reads forgets the names of an earlier trace, and learns ours
            packet.sequence_flags = self._proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
            packet.first_packet_on_sequence = True
            self._intern(packet.interned_data)
            self._first = False
        data = packet.SerializeToString()
        self._file.write(TRACE_PACKET + varint(len(data)) + data)

    def _intern(self, interned: Any) -> None:
        rows = self._profile.trace_rows
        for text, number in _numbered(GUEST, *(row.reason for row in rows)).items():
            interned.event_categories.add(iid=number, name=plain(text))
        for text, number in _numbered(GUEST, *(row.name for row in rows)).items():
            interned.event_names.add(iid=number, name=plain(text))
        for number, text in enumerate(("address", "symbol"), 1):
            interned.debug_annotation_names.add(iid=number, name=text)
        for number, text in enumerate(self._profile.places, 1):
            interned.debug_annotation_string_values.add(iid=number, str=plain(text).encode())

    def _write_tracks(self) -> None:
        packet = self._proto.TracePacket()
        kernel = self._profile.info.get("kernel")
        name = f"hv: {plain(str(kernel))}" if kernel else "hv"
        packet.track_descriptor.uuid = MACHINE
        packet.track_descriptor.process.pid = 1
        packet.track_descriptor.process.process_name = name
        self._put(packet)
        self._track(MARKS, "marks")
        if self._profile.has_trace:
            for vcpu in self._profile.vcpus:
                self._track(FIRST_VCPU + vcpu.index, f"vCPU {vcpu.index}")
                self._track(FIRST_RATE + vcpu.index, f"vCPU {vcpu.index} exits/s", counter=True)

    def _track(self, uuid: int, name: str, *, counter: bool = False) -> None:
        packet = self._proto.TracePacket()
        packet.track_descriptor.uuid = uuid
        packet.track_descriptor.parent_uuid = MACHINE
        packet.track_descriptor.name = name
        if counter:
            packet.track_descriptor.counter.SetInParent()
        self._put(packet)

    def _instant(self, name: str, at_ns: int) -> None:
        packet = self._proto.TracePacket(timestamp=at_ns)
        packet.track_event.type = self._proto.TrackEvent.TYPE_INSTANT
        packet.track_event.track_uuid = MARKS
        packet.track_event.name = name
        self._put(packet)

    def _counter(self, uuid: int, at_ns: int, value: int) -> None:
        packet = self._proto.TracePacket(timestamp=at_ns)
        packet.track_event.type = self._proto.TrackEvent.TYPE_COUNTER
        packet.track_event.track_uuid = uuid
        packet.track_event.counter_value = value
        self._put(packet)

    def _write_totals(self) -> None:
        """Write exits and handler time of each kind as counters that rise from the start to the end."""
        number = FIRST_TOTAL
        for row in self._profile.exits.merged():
            for what, value in (("exits", row.count), ("handler ns", round(row.handler.total))):
                self._track(number, f"{plain(row.name)}: {what} ({row.layer})", counter=True)
                self._counter(number, 0, 0)
                self._counter(number, self._profile.wall_ns, value)
                number += 1


class _Slices:
    """The slices of single exits, and of the guest between them."""

    def __init__(self, profile: Profile, proto: Any, file: BinaryIO) -> None:
        self._profile = profile
        self._proto = proto
        self._file = file
        self._categories = _numbered(GUEST, *(row.reason for row in profile.trace_rows))
        self._ends: dict[int, int] = {}
        self._rates: dict[int, NDArray[np.int64]] = {}
        self._kinds: dict[tuple[int, int, int], bytes] = {}
        self._names = _numbered(GUEST, *(row.name for row in profile.trace_rows))

    def write(self) -> None:
        """Write them all, and the rates that they make."""
        for chunk in self._profile.trace():
            for start in range(0, len(chunk.at_ns), PIECE):
                some = slice(start, start + PIECE)
                at_ns, handler_ns = chunk.at_ns[some], chunk.handler_ns[some]
                self._write_piece(
                    chunk._replace(at_ns=at_ns, handler_ns=handler_ns, row=chunk.row[some], place=chunk.place[some])
                )
        for vcpu, end in self._ends.items():  # the guest's last slice lasts until the machine's end
            packet = self._packet(vcpu, "TYPE_SLICE_END")
            packet.timestamp = max(end, self._profile.wall_ns)
            self._put(packet)
        self._write_rates()

    def _put(self, packet: Any) -> None:
        data = packet.SerializeToString()
        self._file.write(TRACE_PACKET + varint(len(data)) + data)

    def _write_piece(self, piece: TraceChunk) -> None:
        """Write some exits of one vCPU: for each the guest's end, its begin, its end, the guest's begin."""
        import numpy as np

        begin = np.rint(piece.at_ns).astype(np.int64)
        begin = np.maximum.accumulate(np.maximum(begin, self._ends.get(piece.vcpu, 0)))
        end = begin + np.rint(piece.handler_ns).astype(np.int64)
        end[:-1] = np.minimum(end[:-1], begin[1:])  # two clocks that are read one after the other may disagree a little
        times = np.stack((begin, begin, end, end), axis=1).reshape(-1)

        place_count = len(self._profile.places) + 1
        kind = piece.row * place_count + piece.place + 1
        kinds = np.unique(kind)  # not its inverse, too: numpy sorts for that wrongly on processors of QEMU's TCG
        kind_of = np.searchsorted(kinds, kind)
        middle = [self._exit_kind(piece.vcpu, *divmod(one, place_count)) for one in kinds.tolist()]
        templates = [self._frame(self._packet(piece.vcpu, "TYPE_SLICE_END")), self._guest_kind(piece.vcpu), *middle]
        numbers = np.tile(np.array((0, 0, 0, 1), np.int64), len(begin))
        numbers[1::4] = kind_of.reshape(-1) + 2
        if piece.vcpu not in self._ends:  # before the first exit there is no guest's slice to end
            numbers, times = numbers[1:], times[1:]
        self._file.write(_stamp(templates, numbers, times))
        self._ends[piece.vcpu] = int(end[-1])
        self._count(piece.vcpu, begin)

    # --- kinds of packets, as bytes that lack a time ------------------------------------------------------------------

    def _packet(self, vcpu: int, kind: str) -> Any:
        packet = self._proto.TracePacket()
        packet.trusted_packet_sequence_id = SEQUENCE
        packet.sequence_flags = self._proto.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        packet.track_event.type = getattr(self._proto.TrackEvent, kind)
        packet.track_event.track_uuid = FIRST_VCPU + vcpu
        return packet

    def _frame(self, packet: Any) -> bytes:
        data = packet.SerializeToString()
        size = len(data) + 1 + TIME_SIZE
        return bytes(TRACE_PACKET + varint(size) + data + TIMESTAMP + bytes(TIME_SIZE))

    def _guest_kind(self, vcpu: int) -> bytes:
        packet = self._packet(vcpu, "TYPE_SLICE_BEGIN")
        packet.track_event.name_iid = self._names[GUEST]
        packet.track_event.category_iids.append(self._categories[GUEST])
        return self._frame(packet)

    def _exit_kind(self, vcpu: int, number: int, place: int) -> bytes:
        """Return the begin of a slice of a row, `place` - 1 being the place it was sampled at, none at 0."""
        key = vcpu, number, place
        if key not in self._kinds:
            row: ExitRow = self._profile.trace_rows[number]
            packet = self._packet(vcpu, "TYPE_SLICE_BEGIN")
            packet.track_event.name_iid = self._names[row.name]
            packet.track_event.category_iids.append(self._categories[row.reason])
            if row.address is not None:
                packet.track_event.debug_annotations.add(name_iid=1, pointer_value=row.address)
            if place:
                packet.track_event.debug_annotations.add(name_iid=2, string_value_iid=place)
            self._kinds[key] = self._frame(packet)
        return self._kinds[key]

    # --- rates --------------------------------------------------------------------------------------------------------

    def _count(self, vcpu: int, begin: NDArray[np.int64]) -> None:
        import numpy as np

        bins = np.minimum(begin * BINS // max(self._profile.wall_ns, 1), BINS - 1)
        counted = self._rates.setdefault(vcpu, np.zeros(BINS, np.int64))
        counted += np.bincount(bins, minlength=BINS)

    def _write_rates(self) -> None:
        """Write a point for each part of the run, and a zero at the end."""
        width = self._profile.wall_ns / BINS
        for vcpu, counts in self._rates.items():
            for number, value in enumerate((*(counts * 1e9 / max(width, 1)).tolist(), 0.0)):
                packet = self._packet(vcpu, "TYPE_COUNTER")
                packet.timestamp = round(number * width)
                packet.track_event.track_uuid = FIRST_RATE + vcpu
                packet.track_event.double_counter_value = value
                self._put(packet)


def _stamp(templates: list[bytes], numbers: NDArray[np.int64], times: NDArray[np.int64]) -> bytes:
    """Return the templates with these numbers, one behind the other, each with its time in its last bytes."""
    import numpy as np

    lengths = np.array([len(template) for template in templates])
    starts = np.cumsum(lengths) - lengths
    all_templates = np.frombuffer(b"".join(templates), np.uint8)
    ends = np.cumsum(lengths[numbers])
    source = np.repeat(starts[numbers] - (ends - lengths[numbers]), lengths[numbers])
    source += np.arange(ends[-1])
    out = all_templates[source]
    for place in range(TIME_SIZE):
        more = 0x80 if place < TIME_SIZE - 1 else 0
        out[ends - TIME_SIZE + place] = times >> (7 * place) & 0x7F | more
    data: bytes = out.tobytes()
    return data

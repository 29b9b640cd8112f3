"""The statistics file, made by hand from the KVM API document, section 4.133 (KVM_GET_STATS_FD)."""

import os
import struct

import pytest

from hypervisor.errors import HostError
from hypervisor.kvm.stats import StatsFile
from hypervisor.profile.halts import halted_ns

NAME_SIZE = 48
CUMULATIVE, INSTANT, PEAK, LINEAR, LOG = range(5)  # flags, bits 0-3
NONE, BYTES, SECONDS, CYCLES, BOOLEAN = (n << 4 for n in range(5))  # bits 4-7
POW10, POW2 = 0, 1 << 8  # bits 8-11

STATS = (
    # flags, exponent, bucket size, name, values
    (CUMULATIVE | NONE | POW10, 0, 0, b"exits", [7]),
    (LINEAR | BYTES | POW10, 0, 100, b"sizes", [1, 0, 3]),
    (LOG | SECONDS | POW10, -9, 0, b"halt_wait_hist", [5, 4, 0, 2]),
    (INSTANT | BOOLEAN | POW10, 0, 0, b"blocking", [1]),
    (PEAK | BYTES | POW2, 10, 0, b"most", [1 << 63]),
    (CUMULATIVE | SECONDS | POW10, -9, 0, b"halt_wait_ns", [123456789012]),
)


def layout(stats=STATS, *, gap=64):
    """The four blocks in an order and with gaps that the document allows: data, then descriptors, then the id."""
    values, table, offset = b"", b"", 0
    for flags, exponent, bucket_size, name, numbers in stats:
        table += struct.pack("=IhHII", flags, exponent, len(numbers), offset, bucket_size) + name.ljust(
            NAME_SIZE, b"\0"
        )
        values += struct.pack(f"={len(numbers)}Q", *numbers)
        offset += 8 * len(numbers)
    data_at = 24 + gap
    desc_at = data_at + len(values) + gap
    id_at = desc_at + len(table) + gap
    image = bytearray(id_at + NAME_SIZE)
    struct.pack_into("=6I", image, 0, 0, NAME_SIZE, len(stats), id_at, desc_at, data_at)
    image[data_at : data_at + len(values)] = values
    image[desc_at : desc_at + len(table)] = table
    image[id_at : id_at + 12] = b"kvm-1/vcpu-0"
    return bytes(image), data_at


@pytest.fixture
def opened(tmp_path):
    """Return a maker of statistics files; what it made is closed when the test ends."""
    made = []

    def make(image):
        path = tmp_path / f"stats{len(made)}"
        path.write_bytes(image)
        made.append((path, StatsFile(os.open(path, os.O_RDONLY))))
        return made[-1][1]

    yield make
    for _, file in made:
        file.close()


def test_every_counter_by_its_name(opened):
    file = opened(layout()[0])
    assert file.id == "kvm-1/vcpu-0"
    assert file.values() == {
        "exits": 7,
        "sizes": 4,  # samples
        "halt_wait_hist": 11,
        "blocking": 1,
        "most": 1 << 63,
        "halt_wait_ns": 123456789012,
    }


def test_what_a_counter_is(opened):
    stats = {stat.name: stat for stat in opened(layout()[0]).stats}
    assert [stats[name].kind for name in ("exits", "blocking", "most", "sizes", "halt_wait_hist")] == [
        *("cumulative", "instant", "peak", "linear", "log")
    ]
    assert [stats[name].unit for name in ("exits", "blocking", "most", "halt_wait_ns")] == [
        *("", "boolean", "bytes", "seconds")
    ]
    assert (stats["most"].base, stats["most"].exponent) == (2, 10)
    assert (stats["halt_wait_ns"].base, stats["halt_wait_ns"].exponent) == (10, -9)
    assert stats["sizes"].bucket_size == 100


def test_ranges_of_histograms(opened):
    """Linear: n times the bucket size. Logarithmic: [0, 1), [1, 2), [2, 4); the last bucket has no end."""
    assert opened(layout()[0]).histograms() == {
        "sizes": [(0, 100, 1), (200, None, 3)],
        "halt_wait_hist": [(0, 1, 5), (1, 2, 4), (4, None, 2)],
    }


def test_a_read_sees_what_has_changed(opened, tmp_path):
    image, data_at = layout()
    file = opened(image)
    with open(tmp_path / "stats0", "r+b") as other:
        other.seek(data_at)
        other.write(struct.pack("=Q", 8))
    assert file.values()["exits"] == 8


def test_a_kind_or_unit_of_a_later_kernel_is_still_a_number(opened):
    file = opened(layout([(5 | 5 << 4 | 2 << 8, 0, 0, b"new", [3])])[0])
    assert file.values() == {"new": 3}
    assert (file.stats[0].kind, file.stats[0].unit, file.stats[0].base) == ("", "", 0)
    assert file.histograms() == {}


def test_no_counters_at_all(opened):
    assert opened(layout([])[0]).values() == {}


@pytest.mark.parametrize("size", [0, 23, 24, 100, 300, 500])
def test_a_file_that_ends_early_is_refused_and_closed(opened, size):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(HostError, match=r"KVM's statistics end at \d+, not at \d+"):
        opened(layout()[0][:size])
    assert os.listdir("/proc/self/fd") == before


def test_numbers_that_do_not_fit_are_refused(opened):
    image = bytearray(layout()[0])
    struct.pack_into("=I", image, 8, 0xFFFF_FFFF)  # num_desc
    with pytest.raises(HostError, match="end at"):
        opened(image)
    image, data_at = layout([(CUMULATIVE, 0, 0, b"odd", [1])])
    image = bytearray(image)
    struct.pack_into("=I", image, data_at + 8 + 64 + 8, 4)  # the descriptor's offset
    with pytest.raises(HostError, match="64-bit numbers"):
        opened(image)


def test_halted_time_is_sleeping_and_polling():
    stats = {"halt_wait_ns": 100, "halt_poll_success_ns": 20, "halt_poll_fail_ns": 3, "halt_wait_hist": 9}
    assert halted_ns(stats) == 123
    assert halted_ns({"halt_wait_ns": 100}) == 100
    assert halted_ns({}) is None
    assert halted_ns({"halt_poll_fail_ns": 3}) is None


def test_a_vcpu_that_was_never_started_has_only_waited():
    """An AP without its SIPI sits in KVM_RUN, and KVM counts neither an exit nor a halt."""
    assert halted_ns({"exits": 0, "halt_wait_ns": 0}, 700) == 700
    assert halted_ns({"exits": 1, "halt_wait_ns": 0}, 700) == 0
    assert halted_ns({"exits": 0}, 700) is None

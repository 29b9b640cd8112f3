"""Guest RAM: bounds and the hole below 4 GiB."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.ports import GuestFault
from hypervisor.memory import Content, GuestMemory

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture(scope="module")
def small():
    memory = GuestMemory(2 * MIB)
    yield memory
    memory.close()


@pytest.fixture(scope="module")
def large():
    memory = GuestMemory(5 * GIB)  # only touched pages cost the host anything
    yield memory
    memory.close()


def test_what_is_written_is_read_back(small):
    small.write(0x1234, b"hello")
    assert small.read(0x1233, 7) == b"\0hello\0"


def test_the_last_byte_is_ram_and_the_next_is_not(small):
    small.write(2 * MIB - 1, b"x")
    assert small.read(2 * MIB - 1, 1) == b"x"
    with pytest.raises(GuestFault) as caught:
        small.read(2 * MIB - 1, 2)
    assert (caught.value.gpa, caught.value.size) == (2 * MIB - 1, 2)


def test_nothing_is_written_when_the_range_leaves_ram(small):
    small.write(2 * MIB - 4, b"\0\0\0\0")
    with pytest.raises(GuestFault):
        small.write(2 * MIB - 4, b"12345")
    assert small.read(2 * MIB - 4, 4) == b"\0\0\0\0"


def test_an_empty_range_at_the_end_is_allowed(small):
    assert small.read(2 * MIB, 0) == b""


def test_views_write_through_and_outlive_close():
    memory = GuestMemory(MIB)
    view = memory.view(0x100, 4)
    view[:] = b"abcd"
    assert memory.read(0x100, 4) == b"abcd"
    memory.close()
    assert bytes(view) == b"abcd"


def test_ram_above_three_gib_continues_at_four(large):
    assert [(r.gpa, r.size) for r in large.ranges] == [(0, 3 * GIB), (4 * GIB, 2 * GIB)]
    large.write(3 * GIB - 2, b"lo")
    large.write(4 * GIB, b"hi")
    assert large.read(3 * GIB - 2, 2) == b"lo"
    assert large.read(4 * GIB, 2) == b"hi"


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(3 * GIB - 1, 2), (3 * GIB, 1), (4 * GIB - 1, 2), (6 * GIB, 1), (6 * GIB - 1, 2), (-1, 1), (0, -1), (2**64, 1)],
)
def test_the_hole_and_the_ends_are_no_ram(large, gpa, size):
    with pytest.raises(GuestFault):
        large.read(gpa, size)


@given(gpa=st.integers(-10, 2**64 + 10), size=st.integers(-5, 1 << 16))
def test_any_range_is_whole_or_a_fault(small, gpa, size):
    inside = gpa >= 0 and size >= 0 and gpa + size <= 2 * MIB
    if inside:
        assert len(small.read(gpa, size)) == size
    else:
        with pytest.raises(GuestFault):
            small.read(gpa, size)


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(b"head" + bytes(4092) + b"A" * 8192 + bytes(2 * MIB - 8192))
    with open(path, "rb") as file:
        yield Content(file.fileno(), 4096)
    assert path.read_bytes()[4096 : 4096 + 8192] == b"A" * 8192, "a machine wrote to the file"


def test_memory_from_a_file_is_read_from_it_and_writes_stay_apart(content):
    one, other = GuestMemory(2 * MIB, content), GuestMemory(2 * MIB, content)
    assert one.read(4090, 8) == b"A" * 8
    one.write(4094, b"wrote")
    assert one.read(4090, 12) == b"AAAAwroteAAA"
    assert other.read(4090, 12) == b"A" * 12
    one.close()
    other.close()


def test_reclaimed_pages_of_a_file_read_as_zeroes_and_can_be_written(content):
    memory = GuestMemory(2 * MIB, content)
    memory.write(0, b"guest")
    memory.reclaim(0, 4096)
    assert memory.read(0, 4096) == bytes(4096)
    assert memory.read(4096, 4096) == b"A" * 4096
    memory.write(1, b"again")
    assert memory.read(0, 7) == b"\0again\0"
    memory.close()

"""A Linux kernel's log in memory, written as kernel/printk/printk_ringbuffer.h lays it out."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.testing.kernellog import _find, _lines

BASE = 0xFFFF_FFFF_8200_0000
PRB, STATIC, RING, DESCS, INFOS, TEXT = (BASE + 0x10_0000 * number for number in range(6))
FINALIZED, REUSABLE = 2, 3


class Log:
    """A ring of 2**bits messages and 2**text_bits bytes, filled as the kernel does it."""

    def __init__(self, *, bits=3, text_bits=8, word=False):
        self.bits, self.text_bits, self.word = bits, text_bits, word
        self.text = bytearray(1 << text_bits)
        self.descs = bytearray(24 << bits)
        self.infos = bytearray(88 << bits)
        self.head = 0
        self.count = 0

    def say(self, text, ns, *, state=FINALIZED, length=None):
        size = len(self.text)
        need = (8 + len(text) + 7) & ~7
        begin = self.head
        following = begin + need
        data = begin
        if begin // size != (following - 1) // size:  # no room before the end: from the start, an id before the end
            struct.pack_into("<Q", self.text, begin % size, self.count)
            data = (begin // size + 1) * size
            following = data + need
        struct.pack_into("<Q", self.text, data % size, self.count)
        self.text[data % size + 8 : data % size + 8 + len(text)] = text
        index = self.count % (1 << self.bits)
        struct.pack_into("<QQQ", self.descs, 24 * index, state << 62 | self.count, begin, following)
        length = len(text) if length is None else length
        struct.pack_into("<QQHBBI", self.infos, 88 * index, self.count, ns, length, 0, 6 << 5, 0)
        self.head = following
        self.count += 1

    def memory(self, **broken):
        fields = {"bits": self.bits, "descs": DESCS, "infos": INFOS, "text_bits": self.text_bits, "data": TEXT} | broken
        ring = struct.pack("<I4xQQQQ", fields["bits"], fields["descs"], fields["infos"], 0, 0)
        ring += bytes(8) if self.word else b""
        ring += struct.pack("<I4xQQQ", fields["text_bits"], fields["data"], 0, self.head)
        parts = {PRB: struct.pack("<Q", RING), RING: ring + bytes(64)}
        return parts | {DESCS: bytes(self.descs), INFOS: bytes(self.infos), TEXT: bytes(self.text)}


def lines(parts, names=("prb",)):
    def read(address, size):
        for start, data in parts.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        return None

    ring = _find({"prb": PRB, "printk_rb_static": RING}.get if len(names) > 1 else {names[0]: PRB}.get, read)
    return None if ring is None else list(_lines(ring))


@pytest.mark.parametrize("word", [False, True], ids=["before 6.8", "6.8 and later"])
def test_messages_come_with_their_times_oldest_first(word):
    log = Log(word=word)
    log.say(b"Linux version 6.1", 0)
    log.say(b"two\nlines", 12_345_678_901)
    assert lines(log.memory()) == ["[    0.000000] Linux version 6.1", "[   12.345678] two", "[   12.345678] lines"]


def test_old_messages_are_overwritten_and_one_that_found_no_room_at_the_end_is_at_the_start():
    log = Log(bits=2, text_bits=7)
    for number in range(11):
        log.say(b"message number %d, of some length" % number, number * 1_000_000_000)
    found = lines(log.memory())
    assert found[-3:] == [f"[{number:5}.000000] message number {number}, of some length" for number in (8, 9, 10)]


def test_a_message_that_is_being_written_or_was_given_up_is_left_out():
    log = Log()
    log.say(b"whole", 0)
    log.say(b"half", 0, state=0)
    log.say(b"gone", 0, state=REUSABLE)
    assert lines(log.memory()) == ["[    0.000000] whole"]


@pytest.mark.parametrize(
    "broken",
    [{"bits": 0}, {"bits": 40}, {"text_bits": 60}, {"descs": 0x1000}, {"infos": 0}, {"data": 8}, {"bits": 17}],
)
def test_what_is_no_ring_is_not_believed(broken):
    log = Log()
    log.say(b"text", 0)
    assert lines(log.memory(**broken)) is None


@given(st.binary(min_size=24 * 8, max_size=24 * 8), st.binary(min_size=88 * 8, max_size=88 * 8))
def test_a_guest_may_have_left_anything_there(descs, infos):
    log = Log()
    log.descs, log.infos = descs, infos
    found = lines(log.memory())
    assert all(line.startswith("[") and len(line) < 4 * 256 + 64 for line in found)

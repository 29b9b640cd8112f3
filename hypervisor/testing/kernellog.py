"""The log of a Linux kernel, read from the memory of a guest that cannot tell it any more.

Since Linux 5.10 it is a ring of descriptors, each with a record of its message and a place in a ring of text
(kernel/printk/printk_ringbuffer.h). Nothing of it is believed: a guest may have left anything there.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.errors import VmmError
from hypervisor.profile.reading import image_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisor import Machine
    from hypervisor.profile.names import GuestNames

    Reader = Callable[[int, int], bytes | None]

__all__ = ["read_log"]

DESCRIPTORS: Final = struct.Struct("<I4xQQQQ")
"""count_bits, descs, infos, head_id, tail_id of struct prb_desc_ring."""
TEXTS: Final = struct.Struct("<I4xQQQ")
"""size_bits, data, head_lpos, tail_lpos of struct prb_data_ring."""
TEXTS_AT: Final = (40, 48)
"""Where it lies in struct printk_ringbuffer; since 6.8 the descriptors' ring has a word more."""
DESCRIPTOR: Final = struct.Struct("<QQQ")
"""state_var, begin, next of struct prb_desc."""
INFO: Final = struct.Struct("<QQHBBI64x")
"""seq, ts_nsec, text_len, facility, flags and level, caller_id of struct printk_info, then of which device it is."""
ID_BITS: Final = 62
"""The state is in the two bits above the id."""
COMMITTED, FINALIZED = 1, 2
MOST_BITS: Final = 18
"""Of the number of messages; MOST_TEXT_BITS of the bytes of text."""
MOST_TEXT_BITS: Final = 25
HIGHER_HALF: Final = 1 << 63
NS: Final = 1_000_000_000


class _Ring(NamedTuple):
    """The ring, copied out of the guest."""

    slots: int
    descriptors: bytes
    infos: bytes
    text: bytes


def read_log(machine: Machine, names: GuestNames | None = None) -> str:
    """Return the log as `dmesg` prints it, "" when there is no Linux in the machine.

    Args:
        machine: alive or dead, not closed.
        names: of its kernel, if they are at hand already.

    Raises:
        VmmError: there is a Linux, and its log is not where it should be.
    """
    if not machine.boot_plan.is_linux:
        return ""
    from hypervisor.testing.stack import names_of  # noqa: PLC0415 - the two are for the same dead guest

    names = names or names_of(machine)
    read = None if names.kernel is None else image_reader(machine.memory, names.kernel)
    if names.kernel is None or read is None:
        raise VmmError("the kernel's symbols are not found in the guest's memory")
    ring = _find(names.kernel.address_of, read)
    if ring is None:
        raise VmmError("the kernel's log is not found in the guest's memory")
    return "\n".join(_lines(ring))


def _find(address_of: Callable[[str], int | None], read: Reader) -> _Ring | None:
    """Return the ring that the kernel uses, or the one that it was built with, which it used before."""
    pointer = address_of("prb")
    word = None if pointer is None else read(pointer, 8)
    places = [None if word is None else int.from_bytes(word, "little"), address_of("printk_rb_static")]
    for place in places:
        if place is not None and place >= HIGHER_HALF:
            for texts_at in TEXTS_AT:
                ring = _ring(place, texts_at, read)
                if ring is not None:
                    return ring
    return None


def _ring(place: int, texts_at: int, read: Reader) -> _Ring | None:
    """Copy a ring out of the guest; None unless it makes sense."""
    head = read(place, texts_at + TEXTS.size)
    if head is None:
        return None
    bits, descs, infos, *_ = DESCRIPTORS.unpack_from(head)
    text_bits, data, *_ = TEXTS.unpack_from(head, texts_at)
    if not 0 < bits <= MOST_BITS or not 0 < text_bits <= MOST_TEXT_BITS or min(descs, infos, data) < HIGHER_HALF:
        return None
    count = 1 << bits
    parts = read(descs, count * DESCRIPTOR.size), read(infos, count * INFO.size), read(data, 1 << text_bits)
    if parts[0] is None or parts[1] is None or parts[2] is None:
        return None
    return _Ring(count, parts[0], parts[1], parts[2])


def _lines(ring: _Ring) -> Iterator[str]:
    """Yield the messages, oldest first, with their times."""
    found = []
    for index in range(ring.slots):
        state, begin, following = DESCRIPTOR.unpack_from(ring.descriptors, index * DESCRIPTOR.size)
        if state >> ID_BITS in {COMMITTED, FINALIZED} and (state & ring.slots - 1) == index and not begin & 1:
            seq, ns, length, *_ = INFO.unpack_from(ring.infos, index * INFO.size)
            found.append((seq, ns, _text(ring.text, begin, following, length)))
    for _, ns, text in sorted(found):
        for line in text.decode(errors="backslashreplace").split("\n"):
            yield f"[{ns // NS:5}.{ns % NS // 1000:06}] {line}"


def _text(data: bytes, begin: int, following: int, length: int) -> bytes:
    """Return a message: it follows its id, and lies at the start of the ring when the end had no room for it."""
    size = len(data)
    at = begin % size
    if begin // size != following // size and following % size:
        at = 0
    return data[at + 8 : min(at + 8 + length, size)]

"""The exits that user space never sees: KVM's own reasons, their counts and times, from its tracepoints.

Two small BPF programs, on `kvm_exit` and `kvm_entry`, add up in the kernel what concerns this machine's vCPU threads.
Nothing is streamed, so nothing is lost, and nothing is left behind: programs and tables are file descriptors of this
process. The rows are of the same shape as those of the user layer: a histogram of nanoseconds, whose buckets are those
of `profile.histogram`.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.profile.bpf import FP, MAP_ARRAY, MAP_HASH, MAP_MMAPABLE, PSEUDO_MAP_FD, Code, Map, Reg, attach, load
from hypervisor.profile.exits import ExitRow
from hypervisor.profile.histogram import BUCKETS, Histogram

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


__all__ = ["KernelExits", "ReasonTable", "read_format"]

TRACEFS: Final = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
ROWS: Final = 64
"""Reasons of a vCPU that are told apart; the last row is for all others. A guest of any kind has some 20."""
OTHERS: Final = "other"
OTHER_TRACEPOINTS: Final = "this kernel's kvm_exit tracepoint is another one"

# A thread's state, as the programs keep it: when it entered and left the guest (0: it has not), its vCPU, the row of
# the exit that is being handled, how many rows it has.
THREAD: Final = struct.Struct("=5Q")
ENTERED, LEFT, VCPU, ROW, USED = range(0, 40, 8)

# A row: exits, reason, isa (1: VT-x, 2: AMD-V), then two histograms: total, maximum, buckets.
HISTOGRAM_SIZE: Final = 16 + 8 * BUCKETS
COUNT, REASON, ISA, GUEST = 0, 8, 16, 24
HANDLER: Final = GUEST + HISTOGRAM_SIZE
ROW_SIZE: Final = HANDLER + HISTOGRAM_SIZE

# The programs' stack, from its end: key of the threads' table; vCPU and reason, the key of the table of the rows'
# numbers; a row's number.
TID_AT, KEY_AT, NUMBER_AT = -8, -24, -32


class ReasonTable(NamedTuple):
    """Names of exit reasons, and the bits of a reason that are its number."""

    mask: int
    names: dict[int, str]


class EventFormat(NamedTuple):
    """What an event's `format` file says: its number, offset and size of each field, and tables of names."""

    id: int
    fields: dict[str, tuple[int, int]]
    tables: list[ReasonTable]


def read_format(text: str) -> EventFormat:
    """Take an event's `format` file apart; raises ValueError when it is none."""
    number = re.search(r"^ID: (\d+)$", text, re.MULTILINE)
    if number is None:
        raise ValueError("no event's format")
    fields = {
        name: (int(offset), int(size))
        for name, offset, size in re.findall(r"field:[^;]*?(\w+);\s*offset:(\d+);\s*size:(\d+);", text)
    }
    tables = []
    for expression, pairs in re.findall(r"__print_symbolic\(([^,]*),((?:\s*\{[^}]*\},?)*)", text):
        mask = re.search(r"& *(0x[0-9a-f]+)", expression)
        names = {}
        for value, name in re.findall(r'\{ *([-+x0-9a-fA-F ]+), *"([^"]*)" *\}', pairs):
            names[sum(int(part, 0) for part in value.split("+")) & 0xFFFF_FFFF] = name
        tables.append(ReasonTable(int(mask[1], 16) if mask else 0xFFFF_FFFF, names))
    return EventFormat(int(number[1]), fields, tables)


class KernelExits:
    """What KVM does for a machine's vCPUs, counted from `watch` on. A context manager.

    `read` may be called at any time, from any thread; the numbers of a running vCPU may be one exit apart.
    """

    def __init__(self, vcpus: int, events: dict[str, EventFormat]) -> None:
        """Load the programs; raises OSError when the kernel refuses."""
        self._vcpus = vcpus
        self._tables = events["kvm_exit"].tables
        self._fds: list[int] = []
        self._rows_map: mmap.mmap | None = None
        try:
            self._threads = self._keep(Map(MAP_HASH, 4, THREAD.size, vcpus))
            numbers = self._keep(Map(MAP_HASH, 16, 4, vcpus * ROWS))
            rows = self._keep(Map(MAP_ARRAY, 4, ROW_SIZE, vcpus * ROWS, MAP_MMAPABLE))
            self._rows_map = mmap.mmap(rows.fd, vcpus * ROWS * ROW_SIZE, prot=mmap.PROT_READ)
            programs = {
                "kvm_entry": entry_program(self._threads, rows),
                "kvm_exit": exit_program(self._threads, numbers, rows, events["kvm_exit"].fields),
            }
            for name, code in programs.items():
                self._fds.append(load(code, name))
                self._fds.append(attach(self._fds[-1], events[name].id))
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, vcpus: int) -> tuple[KernelExits | None, str]:
        """Load the programs for a machine of `vcpus` vCPUs; where that cannot be, return None and why not."""
        events, why_not = find_events()
        if events is None:
            return None, why_not
        try:
            return cls(vcpus, events), ""
        except OSError as error:
            if error.errno in {errno.EPERM, errno.EACCES} and os.geteuid():
                return None, "it needs root"
            return None, f"this kernel refuses BPF programs on KVM's tracepoints: {error.strerror}"

    def _keep(self, table: Map) -> Map:
        self._fds.append(table.fd)
        return table

    def watch(self, vcpu: int, tid: int) -> None:
        """Count from now on what thread `tid` of this process does; it is to run vCPU number `vcpu`, once."""
        self._threads.update(struct.pack("=I", tid), THREAD.pack(0, 0, vcpu, 0, 0))

    def close(self) -> None:
        """Stop counting and give everything back."""
        while self._fds:
            os.close(self._fds.pop())
        if self._rows_map is not None:
            self._rows_map.close()
            self._rows_map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self) -> list[ExitRow]:
        """Return what has been counted: one row for each vCPU and reason, with times in nanoseconds.

        The handler's time is that from the exit to the next entry: KVM's work, the time in user space if KVM left to
        it, and sleep if the guest halted. The guest's time is that between entry and exit, and nothing else. An exit
        that is not over has no handler's time yet; one without an entry that KVM told of has no guest's time.
        """
        rows = self._rows_map
        if rows is None:
            return []
        found = []
        for number in range(self._vcpus * ROWS):
            vcpu, place = divmod(number, ROWS)
            base = number * ROW_SIZE
            count, reason, isa = struct.unpack_from("=3Q", rows, base)
            if count:
                name = OTHERS if place == ROWS - 1 else self._name(reason, isa)
                handler, guest = _histogram(rows, base + HANDLER), _histogram(rows, base + GUEST)
                row = ExitRow("kernel", name, None, None, None, None, None, vcpu, count, count, handler, guest, {})
                found.append(row)
        return found

    def _name(self, reason: int, isa: int) -> str:
        """Return KVM's name of a reason; the first table is VT-x's (isa 1), the second AMD-V's (2)."""
        if 0 < isa <= len(self._tables):
            table = self._tables[isa - 1]
            if reason & table.mask in table.names:
                return table.names[reason & table.mask]
        return f"{reason:#x}"


def find_events() -> tuple[dict[str, EventFormat] | None, str]:
    """Read what tracefs says of KVM's two events; where it says nothing, return None and why."""
    for root in TRACEFS:
        try:
            os.stat(f"{root}/events")
            events = {}
            for name in ("kvm_entry", "kvm_exit"):
                with open(f"{root}/events/kvm/{name}/format", encoding="ascii") as file:
                    events[name] = read_format(file.read(1 << 20))
        except PermissionError:
            return None, "it needs root"
        except ValueError:
            return None, OTHER_TRACEPOINTS
        except OSError:
            if os.path.isdir(f"{root}/events"):
                return None, "this host's KVM has no tracepoints"
            continue
        fields = events["kvm_exit"].fields
        if fields.get("exit_reason", (0, 0))[1] not in {4, 8} or fields.get("isa", (0, 0))[1] != 4:
            return None, OTHER_TRACEPOINTS
        return events, ""
    return None, f"tracefs is not mounted (mount -t tracefs tracefs {TRACEFS[0]})"


def _histogram(data: mmap.mmap, at: int) -> Histogram:
    total, largest, *buckets = struct.unpack_from(f"={2 + BUCKETS}Q", data, at)
    return Histogram({bucket: count for bucket, count in enumerate(buckets) if count}, total, largest)


# --- the programs -----------------------------------------------------------------------------------------------------


def entry_program(threads: Map, rows: Map) -> bytes:
    """Return the program for kvm_entry: the exit before, if there was one, is over."""
    code, now, thread, left, row = Code(), Reg(8), Reg(7), Reg(6), Reg(9)
    code.call("ktime_get_ns")  # first, so that the time that this takes is not the exit's
    code.do("mov", now, Reg(0))
    _find_thread(code, threads)
    code.store(8, thread, ENTERED, now)
    code.load(8, left, thread, LEFT)
    code.jump("out", "==", left, 0)
    code.clear(thread, LEFT)
    code.load(8, row, thread, ROW)
    _find_row(code, rows)
    code.do("sub", now, left)
    _add_time(code, HANDLER)
    code.label("out")
    code.leave()
    return code.assemble()


def exit_program(threads: Map, numbers: Map, rows: Map, fields: dict[str, tuple[int, int]]) -> bytes:
    """Return the program for kvm_exit: find the reason's row, making one if need be, and count."""
    code, event, thread, now, row, scratch = Code(), Reg(6), Reg(7), Reg(8), Reg(9), Reg(1)
    code.do("mov", event, Reg(1))
    _find_thread(code, threads)
    code.load(8, scratch, thread, VCPU)
    code.store(8, FP, KEY_AT, scratch)
    code.load(fields["exit_reason"][1], scratch, event, fields["exit_reason"][0])
    code.store(8, FP, KEY_AT + 8, scratch)
    code.look_up(numbers, KEY_AT)
    code.jump("new", "==", Reg(0), 0)
    code.load(4, row, Reg(0), 0)
    code.jump("found")
    code.label("new")
    code.load(8, row, thread, USED)
    code.jump("found", ">=", row, ROWS - 1)  # the spare row: USED never grows past it
    code.do("mov", scratch, row)
    code.do("add", scratch, 1)
    code.store(8, thread, USED, scratch)
    code.store(8, FP, NUMBER_AT, row)
    code.number(Reg(1), numbers.fd, PSEUDO_MAP_FD)
    for register, place in ((Reg(2), KEY_AT), (Reg(3), NUMBER_AT)):
        code.do("mov", register, FP)
        code.do("add", register, place)
    code.do("mov", Reg(4), 0)
    code.call("map_update_elem")
    code.label("found")
    code.store(8, thread, ROW, row)
    _find_row(code, rows)
    code.load(8, scratch, FP, KEY_AT + 8)
    code.store(8, row, REASON, scratch)
    code.load(4, scratch, event, fields["isa"][0])
    code.store(8, row, ISA, scratch)
    _add(code, row, COUNT, 1)
    code.call("ktime_get_ns")  # last, for the same reason
    code.do("mov", now, Reg(0))
    code.store(8, thread, LEFT, now)
    code.load(8, scratch, thread, ENTERED)
    code.jump("out", "==", scratch, 0)
    code.clear(thread, ENTERED)
    code.do("sub", now, scratch)
    _add_time(code, GUEST)
    code.label("out")
    code.leave()
    return code.assemble()


def _find_thread(code: Code, threads: Map) -> None:
    """Point r7 to the state of the thread that runs; go to `out` when it is none of ours."""
    namespace = os.stat("/proc/self/ns/pid")  # thread ids are this process's, not the host's
    code.number(Reg(1), os.major(namespace.st_dev) << 20 | os.minor(namespace.st_dev))
    code.number(Reg(2), namespace.st_ino)
    code.do("mov", Reg(3), FP)
    code.do("add", Reg(3), TID_AT)
    code.do("mov", Reg(4), 8)
    code.call("get_ns_current_pid_tgid")
    code.jump("out", "!=", Reg(0), 0)
    code.look_up(threads, TID_AT)
    code.jump("out", "==", Reg(0), 0)
    code.do("mov", Reg(7), Reg(0))


def _find_row(code: Code, rows: Map) -> None:
    """Point r9 to the row whose number it is, of the vCPU of the thread at r7."""
    code.load(8, Reg(1), Reg(7), VCPU)
    code.do("mul", Reg(1), ROWS)
    code.do("add", Reg(1), Reg(9))
    code.store(8, FP, NUMBER_AT, Reg(1))
    code.look_up(rows, NUMBER_AT)
    code.jump("out", "==", Reg(0), 0)
    code.do("mov", Reg(9), Reg(0))


def _add(code: Code, base: int, offset: int, value: int) -> None:
    """Add to a number in memory; only this thread writes there, so it need not be atomic."""
    code.load(8, Reg(5), Reg(base), offset)
    code.do("add", Reg(5), value)
    code.store(8, Reg(base), offset, Reg(5))


def _add_time(code: Code, histogram: int) -> None:
    """Count the nanoseconds in r8 in the histogram at this offset of the row at r9; see `histogram.bucket_of`."""
    time, row, rest, power, scratch = Reg(8), Reg(9), Reg(1), Reg(2), Reg(3)
    _add(code, row, histogram, time)
    code.load(8, scratch, row, histogram + 8)
    code.jump("smaller", ">=", scratch, time)
    code.store(8, row, histogram + 8, time)
    code.label("smaller")
    code.do("mov", power, time)
    code.jump("bucket", "<", time, 16)
    code.do("mov", power, 0)
    code.do("mov", rest, time)
    for shift in (32, 16, 8, 4, 2, 1):  # there is no instruction that finds the highest bit
        code.do("mov", scratch, rest)
        code.do("rsh", scratch, shift)
        code.jump(f"shift{shift}", "==", scratch, 0)
        code.do("mov", rest, scratch)
        code.do("add", power, shift)
        code.label(f"shift{shift}")
    code.do("mov", scratch, power)
    code.do("sub", scratch, 4)
    code.do("rsh", time, scratch)
    code.do("and", time, 15)
    code.do("sub", power, 3)
    code.do("lsh", power, 4)
    code.do("add", power, time)
    code.label("bucket")
    code.jump("bounded", "<=", power, BUCKETS - 1)
    code.do("mov", power, BUCKETS - 1)
    code.label("bounded")
    code.do("lsh", power, 3)
    code.do("add", power, row)
    _add(code, power, histogram + 16, 1)

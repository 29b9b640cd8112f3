"""What is needed of BPF: a small assembler, maps, programs, and programs on tracepoints.

Everything is a file descriptor. The kernel removes it all when they are closed, and they are when the process ends,
however it ends. To be imported only where a program is loaded: ctypes costs milliseconds.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Final

__all__ = ["FP", "Code", "Map", "Reg", "attach", "load"]

# System calls of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
SYS_PERF_EVENT_OPEN: Final = 298
SYS_BPF: Final = 321

# Commands, types and flags of <linux/bpf.h> and <linux/perf_event.h>.
MAP_CREATE, MAP_UPDATE_ELEM, PROG_LOAD = 0, 2, 5
MAP_HASH, MAP_ARRAY = 1, 2
MAP_MMAPABLE: Final = 1 << 10
PROG_TRACEPOINT: Final = 5
PERF_TYPE_TRACEPOINT: Final = 2
PERF_FLAG_FD_CLOEXEC: Final = 8
PERF_EVENT_IOC_SET_BPF: Final = 0x4004_2408

# Instructions: the class in the low three bits, then for arithmetic and jumps the operand's kind, then the operation.
LD, LDX, ST, STX, JMP, ALU64 = 0, 1, 2, 3, 5, 7
REGISTER: Final = 0x08
WORD, DOUBLE = 0x00, 0x18
SIZES: Final = {4: WORD, 8: DOUBLE}
MEM: Final = 0x60
OPERATIONS: Final = {"add": 0x00, "sub": 0x10, "mul": 0x20, "and": 0x50, "lsh": 0x60, "rsh": 0x70, "mov": 0xB0}
CONDITIONS: Final = {"always": 0x00, "==": 0x10, ">": 0x20, ">=": 0x30, "!=": 0x50, "<": 0xA0, "<=": 0xB0}
CALL, EXIT = 0x80, 0x90
PSEUDO_MAP_FD: Final = 1
HELPERS: Final = {"map_lookup_elem": 1, "map_update_elem": 2, "ktime_get_ns": 5, "get_ns_current_pid_tgid": 120}


class Reg(int):
    """A register: 0 the result, 1 to 5 arguments (lost by a call), 6 to 9 kept, 10 the end of the stack."""


FP: Final = Reg(10)


class Code:
    """Instructions, added one by one; a jump goes forward to a label."""

    def __init__(self) -> None:
        """Begin with none."""
        self._code: list[tuple[int, int, int, int, int]] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def _add(self, opcode: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> None:
        self._code.append((opcode, target, source, offset, value))

    def do(self, operation: str, target: Reg, operand: int) -> None:
        """Add a 64-bit operation of a register with another one, or with a 32-bit number."""
        if isinstance(operand, Reg):
            self._add(OPERATIONS[operation] | REGISTER | ALU64, target, operand)
        else:
            self._add(OPERATIONS[operation] | ALU64, target, value=operand)

    def number(self, target: Reg, value: int, kind: int = 0) -> None:
        """Put a 64-bit number into a register."""
        self._add(LD | DOUBLE, target, kind, value=value & 0xFFFF_FFFF)
        self._add(0, value=value >> 32)

    def load(self, size: int, target: Reg, base: Reg, offset: int) -> None:
        """Read 4 or 8 bytes of memory into a register."""
        self._add(LDX | SIZES[size] | MEM, target, base, offset)

    def store(self, size: int, base: Reg, offset: int, source: Reg) -> None:
        """Write a register's low 4, or 8, bytes to memory."""
        self._add(STX | SIZES[size] | MEM, base, source, offset)

    def clear(self, base: Reg, offset: int) -> None:
        """Write 8 zero bytes to memory."""
        self._add(ST | DOUBLE | MEM, base, offset=offset)

    def jump(self, label: str, condition: str = "always", left: Reg | None = None, right: int = 0) -> None:
        """Go to a label, always or if a comparison of unsigned numbers holds."""
        self._jumps.append((len(self._code), label))
        opcode = CONDITIONS[condition] | JMP
        if isinstance(right, Reg):
            self._add(opcode | REGISTER, left or 0, right)
        else:
            self._add(opcode, left or 0, value=right)

    def label(self, name: str) -> None:
        """Name the next instruction."""
        self._labels[name] = len(self._code)

    def call(self, helper: str) -> None:
        """Call a function of the kernel's."""
        self._add(CALL | JMP, value=HELPERS[helper])

    def look_up(self, table: Map, key: int) -> None:
        """Point r0 to the value for the key at this offset from the end of the stack; 0: there is none."""
        self.number(Reg(1), table.fd, PSEUDO_MAP_FD)
        self.do("mov", Reg(2), FP)
        self.do("add", Reg(2), key)
        self.call("map_lookup_elem")

    def leave(self) -> None:
        """End with result 0: the event goes nowhere else."""
        self.do("mov", Reg(0), 0)
        self._add(EXIT | JMP)

    def assemble(self) -> bytes:
        """Return the program."""
        code = list(self._code)
        for at, label in self._jumps:
            opcode, target, source, _, value = code[at]
            code[at] = (opcode, target, source, self._labels[label] - at - 1, value)
        return b"".join(
            struct.pack("<BBhI", opcode, source << 4 | target, offset, value & 0xFFFF_FFFF)
            for opcode, target, source, offset, value in code
        )


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    return _call(SYS_BPF, ctypes.c_int(command), buffer, ctypes.c_uint(len(attributes)))


class Map:
    """A table that programs and this process share."""

    def __init__(self, kind: int, key_size: int, value_size: int, entries: int, flags: int = 0) -> None:
        """Make it: MAP_HASH or MAP_ARRAY, sizes in bytes. Raises OSError when the kernel refuses."""
        self.fd = _bpf(MAP_CREATE, struct.pack("<5I", kind, key_size, value_size, entries, flags))

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value for a key."""
        keys, values = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(value, len(value))
        places = ctypes.addressof(keys), ctypes.addressof(values)
        _bpf(MAP_UPDATE_ELEM, struct.pack("<IxxxxQQQ", self.fd, *places, 0))


def load(code: bytes, name: str) -> int:
    """Load a program for tracepoints; return its descriptor. The caller closes it.

    Raises:
        OSError: the kernel refuses it: EPERM without CAP_BPF and CAP_PERFMON, EINVAL or EACCES when its verifier does.
    """
    program = ctypes.create_string_buffer(code, len(code))
    license_ = ctypes.create_string_buffer(b"Apache-2.0")
    places = ctypes.addressof(program), ctypes.addressof(license_)
    attributes = struct.pack("<IIQQIIQII16s", PROG_TRACEPOINT, len(code) // 8, *places, 0, 0, 0, 0, 0, name.encode())
    return _bpf(PROG_LOAD, attributes)


def attach(program: int, tracepoint: int) -> int:
    """Run a program at a tracepoint until the descriptor that is returned is closed.

    Args:
        program: its descriptor.
        tracepoint: the number in the event's `id` file.
    """
    attributes = ctypes.create_string_buffer(
        struct.pack("<IIQQQQQIIQ", PERF_TYPE_TRACEPOINT, 64, tracepoint, 1, 0, 0, 0, 0, 0, 0), 64
    )
    # One event of one CPU is enough: a program belongs to the tracepoint and runs on all of them.
    process, cpu, group = (ctypes.c_int(n) for n in (-1, 0, -1))
    event = _call(SYS_PERF_EVENT_OPEN, attributes, process, cpu, group, ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC))
    try:
        fcntl.ioctl(event, PERF_EVENT_IOC_SET_BPF, program)
    except OSError:
        os.close(event)
        raise
    return event

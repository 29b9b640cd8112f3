"""A pretended Linux kernel in guest memory: its variables, tasks, modules, type information and page tables.

Offsets of members are this file's own choice: what reads them has to go by the type information.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from btf_writer import BtfWriter

from hypervisor.symbols import Symbols

if TYPE_CHECKING:
    from hypervisor.memory import GuestMemory

__all__ = ["LinuxMemory"]

MIB = 1 << 20
START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
TEXT = START_KERNEL_MAP + 16 * MIB + 64 * MIB  # KASLR moved it by 64 MiB
PHYSICAL = 8 * MIB
DIRECT_MAP = 0xFFFF_9C00_0000_0000
MODULES_VADDR = 0xFFFF_FFFF_C020_0000
"""Mapped to physical 6 MiB."""

TASKS, PID, TGID, COMM, MM = 0x50, 0x90, 0x94, 0x120, 0xD8
PGD = 0x38
MODULE_LIST, MODULE_NAME, MODULE_BASE, MODULE_SIZE, MODULE_KALLSYMS = 8, 24, 0x140, 0x14C, 0x200
BANNER = b"Linux version 6.1.0-test (who@where) (cc 1, ld 2) #1 SMP yesterday"
BUILD_ID = bytes(range(20))

VARIABLES = {
    "phys_base": 0x100,
    "page_offset_base": 0x108,
    "modules": 0x110,
    "linux_banner": 0x200,
    "__start_notes": 0x400,
    "__stop_notes": 0x440,
    "init_task": 0x1000,
    "init_top_pgt": 0x8_0000,
    "__start_BTF": 0x10000,
}


class LinuxMemory:
    """The kernel.

    Attributes:
        memory: where it is written.
        addresses: of its symbols, where it runs.
        cr3: physical address of its page tables.
    """

    def __init__(self, memory: GuestMemory, *, text_members: tuple[str, ...] = ("core_layout",)) -> None:
        self.memory = memory
        self.addresses = {name: TEXT + at for name, at in VARIABLES.items()} | {"_text": TEXT}
        types = self.types(text_members)
        self.addresses["__stop_BTF"] = self.addresses["__start_BTF"] + len(types)
        self.write("__start_BTF", types)
        shift = PHYSICAL - (TEXT - START_KERNEL_MAP)
        self.write("phys_base", struct.pack("<q", shift))
        self.write("page_offset_base", struct.pack("<Q", DIRECT_MAP))
        self.write("linux_banner", BANNER + b"\n\0")
        note = struct.pack("<III", 4, 4, 6) + b"Xen\0abcd"
        self.write("__start_notes", note + struct.pack("<III", 4, len(BUILD_ID), 3) + b"GNU\0" + BUILD_ID)
        head = self.addresses["modules"]
        self.write("modules", struct.pack("<QQ", head, head))
        self.places = [self.physical(self.addresses["init_task"])]
        self.module_heads = [head]
        self._task(self.places[0], 0, "swapper/0", None)
        self.cr3 = self.physical(self.addresses["init_top_pgt"])
        self._tables()

    @staticmethod
    def types(text_members: tuple[str, ...]) -> bytes:
        out = BtfWriter()
        number, word, byte = out.int("int", 4), out.int("unsigned long", 8), out.int("char", 1)
        links = out.structure("list_head", 16, [("next", word, 0), ("prev", word, 8)])
        inner = out.structure("", 0x100, [("pgd", word, PGD)])
        out.structure("mm_struct", 0x100, [("", inner, 0)])
        out.structure(
            "task_struct",
            0x200,
            [
                ("tasks", links, TASKS),
                ("pid", number, PID),
                ("tgid", number, TGID),
                ("mm", word, MM),
                ("comm", out.array(byte, 16), COMM),
            ],
        )
        members = [("list", links, MODULE_LIST), ("name", out.array(byte, 56), MODULE_NAME)]
        if "core_layout" in text_members:
            layout = out.structure(
                "module_layout", 32, [("base", word, 0), ("size", number, 8), ("text_size", number, 12)]
            )
            members.append(("core_layout", layout, MODULE_BASE))
        else:
            layout = out.structure("module_memory", 32, [("base", word, 0), ("size", number, 12)])
            members.append(("mem", out.array(layout, 7), MODULE_BASE))
        members.append(("kallsyms", word, MODULE_KALLSYMS))
        out.structure("module", 0x300, members)
        out.structure("mod_kallsyms", 32, [("symtab", word, 0), ("num_symtab", number, 8), ("strtab", word, 16)])
        return out.data()

    @staticmethod
    def physical(virtual: int) -> int:
        return virtual - TEXT + PHYSICAL

    def symbols(self, *, without: tuple[str, ...] = ()) -> Symbols:
        return Symbols((address, 0, name) for name, address in self.addresses.items() if name not in without)

    def write(self, name: str, data: bytes) -> None:
        self.memory.write(self.physical(self.addresses[name]), data)

    def _task(self, place: int, pid: int, comm: str, mm: int | None) -> None:
        self.memory.write(place + PID, struct.pack("<II", pid, pid))
        self.memory.write(place + COMM, comm.encode().ljust(16, b"\0")[:16])
        # a kernel thread borrows an address space, and only active_mm says so
        self.memory.write(place + MM, struct.pack("<QQ", DIRECT_MAP + mm if mm else 0, DIRECT_MAP + (mm or 0x3000)))
        self._link(place + TASKS, self.places[0] + TASKS)
        self._link(place + TASKS + 8, self.places[-1] + TASKS)

    def _virtual(self, place: int) -> int:
        return place - PHYSICAL + TEXT if place >= PHYSICAL else DIRECT_MAP + place

    def _link(self, place: int, target: int) -> None:
        self.memory.write(place, struct.pack("<Q", self._virtual(target)))

    def task(self, pid: int, comm: str, directory: int | None) -> int:
        """Add a task at the end of the list, with an address space of this page-global directory or with none."""
        place = 2 * MIB + 0x2000 * len(self.places)
        if directory is not None:
            self.memory.write(place + 0x800 + PGD, struct.pack("<Q", DIRECT_MAP + directory))
            self.memory.write(directory + 8 * 511, self.memory.read(self.cr3 + 8 * 511, 8))
        self._task(place, pid, comm, None if directory is None else place + 0x800)
        self._link(self.places[-1] + TASKS, place + TASKS)
        self.places.append(place)
        return place

    def module(self, name: str, functions: list[tuple[int, str]], size: int = 0x800) -> int:
        """Add a module with functions at offsets of its text; returns its base."""
        at = 0x4000 * (len(self.module_heads) - 1)
        base, place = MODULES_VADDR + at, 6 * MIB + at
        strings, table = b"\0", b""
        for value, function in functions:
            table += struct.pack("<IBBHQQ", len(strings), 2, 0, 1, base + value, 4)
            strings += function.encode() + b"\0"
        table += struct.pack("<IBBHQQ", len(strings), 2, 0, 2, base + 0x3000, 4)  # of another section
        strings += b"elsewhere\0"
        head, module = self.addresses["modules"], base + 0x1000
        self.memory.write(place + 0x1000 + MODULE_LIST, struct.pack("<QQ", head, self.module_heads[-1]))
        self.memory.write(place + 0x1000 + MODULE_NAME, name.encode() + b"\0")
        self.memory.write(place + 0x1000 + MODULE_BASE, struct.pack("<QII", base, 0xFFFF, size))
        self.memory.write(place + 0x1000 + MODULE_KALLSYMS, struct.pack("<Q", base + 0x2000))
        tables = (base + 0x2100, len(functions) + 1, 0, base + 0x3800)
        self.memory.write(place + 0x2000, struct.pack("<QIIQ", *tables))
        self.memory.write(place + 0x2100, table)
        self.memory.write(place + 0x3800, strings)
        before = self.module_heads[-1]
        link = self.physical(before) if before == head else before - MODULES_VADDR + 6 * MIB
        self.memory.write(link, struct.pack("<Q", module + MODULE_LIST))
        self.module_heads.append(module + MODULE_LIST)
        return base

    def _tables(self) -> None:
        """Write page tables of 4 levels: image and modules in pages of 2 MiB, the direct map in one of 1 GiB."""
        top, image, direct, low = (self.cr3 + 0x1000 * at for at in range(4))
        put = self.memory.write
        put(top + 8 * 511, struct.pack("<Q", image | 1))
        put(top + 8 * (DIRECT_MAP >> 39 & 511), struct.pack("<Q", direct | 1))
        put(direct, struct.pack("<Q", 0x81))
        put(image + 8 * 510, struct.pack("<Q", low | 1))
        put(image + 8 * 511, struct.pack("<Q", low + 0x1000 | 1))
        for at in range(2):
            put(low + 8 * ((TEXT >> 21) + at & 511), struct.pack("<Q", PHYSICAL + 2 * MIB * at | 0x81))
        put(low + 0x1000 + 8 * (MODULES_VADDR >> 21 & 511), struct.pack("<Q", 6 * MIB | 0x81))

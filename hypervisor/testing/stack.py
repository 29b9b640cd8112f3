"""What each vCPU of a guest is doing: its place, and the calls on its stack, by name.

Kernels are built without frame pointers, so the stack is read word by word: what lies behind a call instruction in code
that has a name is taken for a return address. A word that was left from an earlier call looks the same.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from hypervisor import paging
from hypervisor.errors import VmmError
from hypervisor.images import is_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hypervisor import Machine
    from hypervisor.profile.names import GuestNames

    Reader = Callable[[int, int], bytes | None]

__all__ = ["lines", "names_of", "virtual_reader"]

HIGHER_HALF: Final = 1 << 63
STACK: Final = 16 << 10
"""Bytes of a Linux kernel's stack, and what it is aligned to (THREAD_SIZE)."""
MOST: Final = 24
"""Calls that are shown of one vCPU."""
LONGEST_CALL: Final = 7
CALL_NEAR: Final = 0xE8
EXCEPTION_ENTRY: Final = "asm_exc_"
"""How the names of the functions begin that the processor calls by itself, for a page fault say."""
FRAME_IP: Final = 16 * 8
"""Where the interrupted place is in what such a function saves (struct pt_regs, arch/x86/include/asm/ptrace.h)."""
GROUP_5: Final = 0xFF
"""The opcode of an indirect call, with 2 in the middle field of its ModRM byte (SDM volume 2, CALL)."""


def virtual_reader(machine: Machine, special: Mapping[str, Any]) -> Reader:
    """Return a function that copies (address, size) out of the guest's virtual memory, as these registers map it."""
    controls = {name: special.get(name, 0) for name in ("cr0", "cr3", "cr4", "efer")}
    return paging.reader(machine.memory.read, **controls)


def names_of(machine: Machine) -> GuestNames:
    """Return the names of what runs in the guest: of its kernel, of its modules, or of the file it was booted from."""
    from hypervisor.profile.names import GuestNames  # noqa: PLC0415 - most tests pass

    plan = machine.boot_plan
    file, name = plan.symbols, "the kernel image"
    path = _symbols_of(machine)
    if path is not None:
        with open(path, "rb") as opened:
            file, name = opened.read(), path
    return GuestNames.of_guest(
        machine.memory, is_linux=plan.is_linux, file=None if file is None else bytes(file), file_name=name
    )


def _symbols_of(machine: Machine) -> str | None:
    """Return the path of a System.map or of an ELF file with the kernel's symbols, if there is one."""
    from hypervisor import kernels  # noqa: PLC0415 - as above

    config = machine.config
    if config.symbols is not None:
        return os.fspath(config.symbols)
    known = kernels.find(config.kernel) if isinstance(config.kernel, str) and is_name(config.kernel) else None
    found = None if known is None else known.system_map or (None if known.is_linux else known.vmlinux)
    return None if found is None else os.fspath(found)


def lines(machine: Machine, names: GuestNames) -> Iterator[str]:
    """Yield where each vCPU is and the calls that led there, the innermost first."""
    for vcpu in machine.vcpus:
        try:
            registers, special = vcpu.registers, vcpu.special_registers
        except VmmError as error:
            yield f"vCPU {vcpu.index}: its registers could not be read: {error}"
            continue
        read = virtual_reader(machine, special)
        cr3 = special["cr3"]
        place = _named(names, registers["rip"]) or names.name(registers["rip"], cr3 if isinstance(cr3, int) else 0)
        yield f"vCPU {vcpu.index} at {registers['rip']:#x}: {place}"
        if registers["rip"] >= HIGHER_HALF:
            for address, name in _calls(read, registers["rsp"], names):
                yield f"    {address:#x}: {name}"


def _calls(read: Reader, top: int, names: GuestNames) -> Iterator[tuple[int, str]]:
    """Yield the return addresses on a kernel's stack, and the places where exceptions came, with their names."""
    shown = 0
    for at in range(top & ~7, (top | STACK - 1) + 1, 8):
        data = read(at, 8)
        if data is None:
            return
        word = int.from_bytes(data, "little")
        name = _named(names, word) if word >= HIGHER_HALF else None
        if name is not None and _follows_call(read, word):
            yield word, name
            if name.startswith(EXCEPTION_ENTRY):
                yield from _interrupted(read, at + 8 + FRAME_IP, names)
            shown += 1
            if shown == MOST:
                return


def _interrupted(read: Reader, at: int, names: GuestNames) -> Iterator[tuple[int, str]]:
    """Yield the place in the kernel that an exception's frame says it came at: no call led from there."""
    data = read(at, 8)
    address = 0 if data is None else int.from_bytes(data, "little")
    name = _named(names, address) if address >= HIGHER_HALF else None
    if name is not None:
        yield address, f"{name}, where the exception came"


def _named(names: GuestNames, address: int) -> str | None:
    """Return "function+0x12/0x40", None for an address that is in none."""
    found = names.kernel.find(address) if names.kernel is not None else None
    return found or names.modules.find(address)


def _follows_call(read: Reader, address: int) -> bool:
    before = read(address - LONGEST_CALL, LONGEST_CALL)
    if before is None:
        return False
    if before[-5] == CALL_NEAR:
        return True
    return any(before[-size] == GROUP_5 and before[1 - size] >> 3 & 7 == 2 for size in range(2, LONGEST_CALL + 1))

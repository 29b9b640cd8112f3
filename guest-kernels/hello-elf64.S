# summary: a vmlinux in miniature: 64-bit ELF with two entries, says which one was taken and prints its command line
# build: elf64
#
# The ELF entry point is the one of the Linux 64-bit boot protocol: long mode, RSI = address of `struct boot_params`,
# where offset 0x228 holds the command line's address (Linux, Documentation/arch/x86/boot.rst).
#
# The note names the PVH entry point, a 32-bit physical address: protected mode, EBX = address of `struct
# hvm_start_info`, which begins with a magic number and has the command line's address at offset 24 (Xen,
# docs/misc/pvh.pandoc and xen/include/public/arch-x86/hvm/start_info.h). `hv run --protocol pvh` takes it.
.include "machine.inc"

.equ BOOT_PARAMS_CMD_LINE_PTR, 0x228

.equ XEN_ELFNOTE_PHYS32_ENTRY, 18
.equ START_INFO_MAGIC, 0x336ec578
.equ START_INFO_CMDLINE, 24

.section .note.Xen, "a", @note
    .balign 4
    .long 4, 8, XEN_ELFNOTE_PHYS32_ENTRY        # bytes of the name, bytes of the value, type
    .asciz "Xen"
    .quad pvh_entry

.section .rodata
by_linux64: .asciz "64-bit boot protocol: "
by_pvh: .asciz "PVH: "
newline: .asciz "\n"

# Print the string at RSI and leave; assembled once for each mode, because the bytes of the two differ.
.macro PRINT_UNTIL_ZERO
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:
.endm

.macro SAY which, command_line
    cld
    mov ebx, \command_line
    mov dx, COM1
    mov esi, offset \which
    PRINT_UNTIL_ZERO
    mov esi, ebx
    PRINT_UNTIL_ZERO
    mov esi, offset newline
    PRINT_UNTIL_ZERO
    mov al, 0
3:  out DEBUG_EXIT, al
4:  cli
    hlt
    jmp 4b
.endm

    .text
    .globl _start
_start:
    SAY by_linux64, [rsi + BOOT_PARAMS_CMD_LINE_PTR]

    .code32
pvh_entry:
    cmp dword ptr [ebx], START_INFO_MAGIC
    mov al, 1
    jne 3f
    SAY by_pvh, [ebx + START_INFO_CMDLINE]

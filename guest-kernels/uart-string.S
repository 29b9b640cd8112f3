# summary: sends N bytes to the UART by string instructions (number: N = 10000)
# build: multiboot
#
# `rep outsb` hands the VMM up to a page of bytes in one exit, if the CPU runs it; a software KVM, which emulates ring
# 0, exits for every byte.
.include "multiboot.inc"
.include "arguments.inc"

.section .rodata
rows:
    .rept 64
    .ascii "abcdefghijklmnopqrstuvwxyz0123456789 the quick brown fox jumps\r\n"    # 64 bytes
    .endr
rows_end:

START
    mov eax, 10000
    call next_number
    mov ebx, eax
    mov dx, COM1
1:  mov esi, offset rows
    mov ecx, offset rows_end - rows
    cmp ecx, ebx
    jbe 2f
    mov ecx, ebx
2:  sub ebx, ecx
    rep outsb
    test ebx, ebx
    jnz 1b
    EXIT 0

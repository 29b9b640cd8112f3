# summary: says hello in 32-bit protected mode, from a flat binary
# build: flat32
#
# Started with flat segments and paging off, and nothing else promised: the code finds its data by its own address.
.include "machine.inc"
    .code32

    .globl _start
_start:
    cld
    call 1f
1:  pop esi                     # the address of this instruction
    add esi, offset text - 1b
    mov ecx, offset text_end - text
    mov dx, COM1
    rep outsb
    mov al, 0
    out DEBUG_EXIT, al
2:  cli
    hlt
    jmp 2b

text: .ascii "hello from protected mode\n"
text_end:

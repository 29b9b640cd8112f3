# summary: says hello in real mode
# build: flat16
#
# A flat binary has no header: its first byte is its first instruction, in 16-bit mode as after a reset. It may be
# loaded anywhere below 1 MiB, so it finds its data by its own address.
.include "machine.inc"
    .code16

    .globl _start
_start:
    push cs
    pop ds
    mov sp, 0x4000              # a stack below
    call 1f
1:  pop si                      # the offset of this instruction
    add si, offset text - 1b
    mov cx, offset text_end - text
    mov dx, COM1
    cld
    rep outsb
    mov al, 0
    out DEBUG_EXIT, al
2:  cli
    hlt
    jmp 2b

text: .ascii "hello from real mode\n"
text_end:

# summary: says hello in long mode, from a flat binary
# build: flat64
#
# Started in 64-bit mode with the first 4 GiB mapped one to one. RIP-relative addresses make it run wherever it lies.
.include "machine.inc"
    .code64

    .globl _start
_start:
    cld
    lea rsi, [rip + text]
    mov ecx, offset text_end - text
    mov dx, COM1
    rep outsb
    mov al, 0
    out DEBUG_EXIT, al
1:  cli
    hlt
    jmp 1b

text: .ascii "hello from long mode\n"
text_end:

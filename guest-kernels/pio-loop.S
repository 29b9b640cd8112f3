# summary: for benchmarks: writes a byte to a port N times (numbers: N = 100000, port = 0x5659)
# build: multiboot
.include "multiboot.inc"
.include "arguments.inc"

START
    mov eax, 100000
    call next_number
    mov ecx, eax
    mov eax, TEST_PORT + 1
    call next_number
    mov edx, eax
1:  out dx, al
    loop 1b
    EXIT 0

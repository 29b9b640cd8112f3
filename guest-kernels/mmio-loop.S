# summary: for benchmarks: writes four bytes to memory-mapped I/O N times (number: N = 100000)
# build: multiboot
.include "multiboot.inc"
.include "arguments.inc"

START
    mov eax, 100000
    call next_number
    mov ecx, eax
    mov edx, TEST_MMIO
1:  mov [edx], eax
    loop 1b
    EXIT 0

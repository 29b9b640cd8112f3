# summary: for benchmarks: reads the UART's line status N times (number: N = 100000)
# build: multiboot
.include "multiboot.inc"
.include "arguments.inc"

START
    mov eax, 100000
    call next_number
    mov ecx, eax
    mov dx, COM1_LSR
1:  in al, dx
    loop 1b
    EXIT 0

# summary: says hello on the serial port, a byte at a time by port I/O
# build: multiboot
#
# Every `out` leaves the guest: KVM stops the CPU with KVM_EXIT_IO, the VMM finds whose port 0x3f8 is and hands the byte
# to its UART.
.include "multiboot.inc"

.section .rodata
text: .asciz "hello\n"

START
    mov dx, COM1
    mov esi, offset text
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  EXIT 0

# summary: sends N bytes through the UART as a driver would (numbers: N = 10000, bytes for one look at the status = 1)
# build: multiboot
#
# A driver reads the line status until the transmitter is empty, then writes a byte; one that has switched the FIFOs on
# may write up to 16 before it looks again.
.include "multiboot.inc"
.include "arguments.inc"

.equ FIFO_ENABLE_AND_CLEAR, 0x07        # FCR
.equ LINE_8N1, 0x03                     # LCR

.section .rodata
row: .ascii "abcdefghijklmnopqrstuvwxyz0123456789 the quick brown fox jumps\r\n"    # 64 bytes

START
    mov dx, COM1_LCR
    mov al, LINE_8N1
    out dx, al
    mov dx, COM1_FCR
    mov al, FIFO_ENABLE_AND_CLEAR
    out dx, al
    mov eax, 10000
    call next_number
    mov ecx, eax                # bytes to send
    mov eax, 1
    call next_number
    mov edi, eax                # bytes that may go at once
    xor esi, esi                # bytes sent

1:  mov dx, COM1_LSR
2:  in al, dx
    test al, LSR_THR_EMPTY
    jz 2b
    mov dx, COM1
    mov ebx, edi
3:  mov eax, esi
    and eax, 63
    mov al, [row + eax]
    out dx, al
    inc esi
    cmp esi, ecx
    jae 4f
    dec ebx
    jnz 3b
    jmp 1b
4:  EXIT 0

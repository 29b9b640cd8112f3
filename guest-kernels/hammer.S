# summary: floods ports, MMIO, the UART and the debug console (number: rounds, 0 = for ever, the default)
# build: multiboot
#
# Nothing in it is wrong, there is only too much of it: the VMM's memory and its log must not grow with it. A round is
# about 200 accesses, half of them to addresses where nobody is.
.include "multiboot.inc"
.include "arguments.inc"

.equ NOBODY_PORT, 0x6000
.equ NOBODY_MMIO, 0xe0000000
.equ RTC, 0x70
.equ PCI_CONFIG, 0xcf8

START
    xor eax, eax
    call next_number
    mov ebp, eax                # rounds to go, counted down
    mov edi, eax                # 0 if nobody counts

round:
    mov ecx, 16
1:  mov dx, COM1_LSR            # as a driver that polls
    in al, dx
    mov dx, COM1
    mov al, '.'
    out dx, al
    out DEBUG_CONSOLE, al
    lea edx, [ecx + NOBODY_PORT]
    in al, dx
    out dx, ax
    in eax, dx
    mov eax, [NOBODY_MMIO + 4 * ecx]
    mov [NOBODY_MMIO + 4 * ecx], ax
    mov [TEST_MMIO + 4 * ecx], eax
    mov eax, ecx
    out RTC, al
    in al, RTC + 1
    mov dx, PCI_CONFIG
    out dx, eax
    in al, I8042_COMMAND
    loop 1b
    dec ebp
    jnz round
    test edi, edi
    jz round
    EXIT 0

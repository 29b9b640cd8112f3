# summary: string I/O in both directions, of every width, forwards and backwards
# build: multiboot
#
# What it reads from TEST_PORT it writes back there by the string instruction of the same width. The rest works without
# any device of a test.
.include "multiboot.inc"
.include "console.inc"

.equ COUNT, 6
.equ FW_CFG_SIGNATURE, 0        # its four bytes say "QEMU" wherever there is a fw_cfg

.section .rodata
text: .ascii "forwards\n"
text_end:
reversed: .ascii "\nsdrawkcab"
reversed_end:

.bss
buffer: .skip 4 * COUNT

# Read COUNT elements of 1, 2 or 4 bytes (suffix b, w or d) from the port in DX, then write them back.
.macro THERE_AND_BACK suffix
    mov edi, offset buffer
    mov ecx, COUNT
    rep ins\suffix
    mov esi, offset buffer
    mov ecx, COUNT
    rep outs\suffix
.endm

START
    mov dx, COM1
    mov esi, offset text
    mov ecx, offset text_end - text
    rep outsb

    mov esi, offset reversed_end - 1
    mov ecx, offset reversed_end - reversed
    std                         # ESI goes down
    rep outsb
    cld

    xor ecx, ecx                # a count of zero does nothing at all
    rep outsb

    mov dx, FW_CFG_SELECT
    mov ax, FW_CFG_SIGNATURE
    out dx, ax
    mov dx, FW_CFG_DATA
    mov edi, offset buffer
    mov ecx, 4
    rep insb
    PRINT "fw_cfg says "
    mov esi, offset buffer
    mov ecx, 4
    call print
    PRINT "\n"

    mov dx, TEST_PORT
    THERE_AND_BACK b
    THERE_AND_BACK w
    THERE_AND_BACK d

    mov edi, offset buffer + COUNT - 1  # backwards in, forwards out: the device gets its bytes in reverse
    mov ecx, COUNT
    std
    rep insb
    cld
    mov esi, offset buffer
    mov ecx, COUNT
    rep outsb
    EXIT 0

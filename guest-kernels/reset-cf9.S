# summary: resets the machine by the chipset's reset control register
# build: multiboot
#
# Bit 1 chooses a hard reset, then bit 2 going from 0 to 1 does it.
.include "multiboot.inc"

START
    mov dx, RESET_CONTROL
    mov al, 0x02
    out dx, al
    mov al, 0x06
    out dx, al
1:  hlt
    jmp 1b

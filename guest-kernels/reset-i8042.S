# summary: resets the machine by the keyboard controller
# build: multiboot
#
# Commands 0xf0 to 0xff pulse the controller's low output lines; line 0 is the CPU's reset.
.include "multiboot.inc"

START
    mov al, 0xfe
    out I8042_COMMAND, al
1:  hlt
    jmp 1b

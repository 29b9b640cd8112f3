# summary: spins for ever with interrupts off
# build: multiboot
#
# It never leaves the guest by itself: only a signal to the vCPU's thread gets it out.
.include "multiboot.inc"

START
    cli
1:  jmp 1b

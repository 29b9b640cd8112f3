# summary: halts for ever with interrupts off
# build: multiboot
#
# With KVM's own interrupt controller a halted CPU sleeps inside KVM_RUN. Nothing but a non-maskable interrupt or an
# INIT could wake this one.
.include "multiboot.inc"

START
1:  cli
    hlt
    jmp 1b

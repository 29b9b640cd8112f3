# summary: dies of a triple fault
# build: multiboot
#
# With an empty IDT no exception can be delivered: the invalid opcode becomes a double fault, and that, undeliverable
# as well, a shutdown of the processor. KVM stops with KVM_EXIT_SHUTDOWN.
.include "multiboot.inc"

.data
no_idt:
    .word 0
    .long 0

START
    lidt [no_idt]
    ud2
    EXIT 1                      # never reached

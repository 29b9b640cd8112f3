# summary: jumps to an address where no memory is, which KVM cannot emulate
# build: multiboot
#
# Data may live behind MMIO, instructions may not: KVM would have to fetch them from the VMM, which it does not do. It
# gives up with KVM_EXIT_INTERNAL_ERROR.
.include "multiboot.inc"

START
    mov eax, TEST_MMIO
    jmp eax

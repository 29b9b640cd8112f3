# summary: says hello to a device behind memory-mapped I/O and prints what it answers
# build: multiboot
#
# Where the guest's address is no RAM, KVM decodes the instruction that touched it and stops with KVM_EXIT_MMIO. The
# guest needs no special instruction: a `mov` does it. Nobody need listen: then writes are lost and reads are all ones.
#
#   offset 0   takes the text, a byte at a time
#   offset 4   four bytes, read once
#   offset 8   takes what was read there
.include "multiboot.inc"
.include "console.inc"

.section .rodata
text: .asciz "hello\n"

START
    mov esi, offset text
1:  lodsb
    test al, al
    jz 2f
    mov [TEST_MMIO], al
    jmp 1b
2:  mov eax, [TEST_MMIO + 4]
    mov [TEST_MMIO + 8], eax
    PRINT "the device answers 0x"
    call print_hex
    PRINT "\n"
    EXIT 0

# summary: powers the machine off by ACPI
# build: multiboot
#
# A kernel would take the sleep type of S5 from the DSDT. This one tries all eight: the machine has to ignore those
# that mean nothing to it. Status 1 if it is still on after that.
.include "multiboot.inc"

# ACPI 6.4, PM1 Control Registers Fixed Hardware Feature Control Bits
.equ SLP_EN, 1 << 13
.equ SLP_TYP_SHIFT, 10

START
    mov dx, PM1_CONTROL
    xor ecx, ecx
1:  mov eax, ecx
    shl eax, SLP_TYP_SHIFT
    or eax, SLP_EN
    out dx, ax
    inc ecx
    cmp ecx, 8
    jb 1b
    EXIT 1

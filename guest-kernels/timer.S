# summary: sleeps until the PIT has ticked N times (number: N = 10)
# build: multiboot
#
# `hlt` stops the CPU until an interrupt comes. With KVM's own interrupt controllers and PIT it waits inside the host's
# kernel, and not one of these interrupts is seen by the VMM.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "legacy_irq.inc"

.data
ticks: .long 0

START
    call load_tables
    call start_pic
    GATE IRQ_BASE, tick
    mov eax, 10
    call next_number
    mov ebx, eax
    call start_pit
    UNMASK 0

1:  sti                         # takes effect after hlt has begun: no tick can slip in between and be slept over
    hlt
    cli
    cmp [ticks], ebx
    jb 1b

    mov eax, ebx
    call print_decimal
    PRINT " ticks\n"
    EXIT 0

tick:
    inc dword ptr [ticks]
    push eax
    mov al, PIC_EOI
    out PIC1_COMMAND, al
    pop eax
    INTERRUPT_RETURN

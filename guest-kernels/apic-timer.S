# summary: sleeps until the local APIC's timer has fired N times (number: N = 10)
# build: multiboot
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "legacy_irq.inc"
.include "apic.inc"

.equ TIMER_VECTOR, 0x30
.equ PERIODIC, 1 << 17
.equ DIVIDE_BY_1, 0xb

.data
ticks: .long 0

START
    call load_tables
    call start_pic              # masks whatever firmware may have left running
    GATE TIMER_VECTOR, tick
    GATE SPURIOUS_VECTOR, spurious_interrupt
    mov eax, 10
    call next_number
    mov ebx, eax
    call start_apic
    mov dword ptr [APIC_TIMER_DIVIDE], DIVIDE_BY_1
    mov dword ptr [APIC_LVT_TIMER], PERIODIC | TIMER_VECTOR
    mov dword ptr [APIC_TIMER_INITIAL], 10000000    # 10 ms: under KVM the timer counts nanoseconds

1:  sti
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
    mov dword ptr [APIC_EOI], 0
    INTERRUPT_RETURN

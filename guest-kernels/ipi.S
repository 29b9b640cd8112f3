# summary: plays ping-pong by inter-processor interrupts, N rounds, on two processors (number: N = 1000)
# build: multiboot
#
# The boot processor sends PING to the first application processor, whose handler answers PONG; both sleep by `hlt` in
# between. Status 0 when all rounds are played, 1 when there is nobody to play with.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "legacy_irq.inc"
.include "apic.inc"
.include "processors.inc"

.equ PING, 0x40
.equ PONG, 0x41

.data
ready: .long 0
partner: .long 0                # APIC id in the top byte, as the interrupt command register wants it
boot_id: .long 0
pongs: .long 0

START
    call load_tables
    call start_pic              # masks whatever firmware may have left running
    call start_apic
    GATE SPURIOUS_VECTOR, spurious_interrupt
    GATE PING, ping
    GATE PONG, pong
    mov eax, [APIC_ID]
    mov [boot_id], eax
    mov eax, 1000
    call next_number
    mov ebx, eax

    call start_aps
    mov esi, offset ready
    mov edi, 1
    call wait_for
    jnz 3f

    xor edi, edi                # rounds played
1:  mov eax, [partner]
    mov [APIC_ICR_HIGH], eax
    mov dword ptr [APIC_ICR_LOW], ICR_FIXED | PING
    inc edi
2:  sti
    hlt
    cli
    cmp [pongs], edi
    jb 2b
    cmp edi, ebx
    jb 1b

    mov eax, edi
    call print_decimal
    PRINT " rounds\n"
    EXIT 0
3:  PRINT "no second processor\n"
    EXIT 1

# Application processors. The first one plays, the others stay out of it.
ap_main:
    cmp eax, 1
    jne 2f
    mov eax, [APIC_ID]
    mov [partner], eax
    lock inc dword ptr [ready]
1:  sti
    hlt
    jmp 1b
2:  cli
    hlt
    jmp 2b

ping:                           # on the partner
    push eax
    mov eax, [boot_id]
    mov [APIC_ICR_HIGH], eax
    mov dword ptr [APIC_ICR_LOW], ICR_FIXED | PONG
    mov dword ptr [APIC_EOI], 0
    pop eax
    INTERRUPT_RETURN

pong:                           # on the boot processor
    inc dword ptr [pongs]
    mov dword ptr [APIC_EOI], 0
    INTERRUPT_RETURN

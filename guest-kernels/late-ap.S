# summary: four processors add up a sum, the last is started when the others are done (number: N = 20000 rounds each)
# build: multiboot
#
# The sum, printed in hexadecimal, is the same in whatever order they come. Processor 3 gets its INIT at the beginning and
# waits from there on. Status 0; 1 when somebody did not come.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "apic.inc"
.include "processors.inc"

.equ ICR_DESTINATION, 24        # bits 24-31 of the ICR's upper half: the APIC id

.data
    .balign 4
rounds: .long 20000
sum: .long 0
finished: .long 0

# Send an IPI to one processor.
.macro SEND_TO id, command
    mov dword ptr [APIC_ICR_HIGH], \id << ICR_DESTINATION
    mov dword ptr [APIC_ICR_LOW], \command
.endm

START
    mov eax, [rounds]
    call next_number
    mov [rounds], eax
    call load_tables
    call start_apic
    mov esi, offset ap_stub
    mov edi, AP_PAGE << 12
    mov ecx, offset ap_stub_end - ap_stub
    rep movsb
    SEND_TO 3, ICR_INIT
    SEND_TO 1, ICR_INIT
    SEND_TO 1, ICR_STARTUP | AP_PAGE
    SEND_TO 2, ICR_INIT
    SEND_TO 2, ICR_STARTUP | AP_PAGE
    call work
    mov esi, offset finished
    mov edi, 3
    call wait_for
    mov al, 1
    jnz exit
    SEND_TO 3, ICR_STARTUP | AP_PAGE
    mov edi, 4
    call wait_for
    mov al, 1
    jnz exit
    mov eax, [sum]
    call print_hex
    PRINT "\n"
    EXIT 0

ap_main:
    call work
1:  hlt
    jmp 1b

# work: the same on each processor. Changes EAX, ECX.
work:
    mov ecx, [rounds]
    mov eax, 0x12345678
1:  imul eax, eax, 0x19660d
    add eax, ecx
    dec ecx
    jnz 1b
    lock add [sum], eax
    lock inc dword ptr [finished]
    ret

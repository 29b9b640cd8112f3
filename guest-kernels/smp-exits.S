# summary: every processor writes N bytes to a port of its own at the same time (number: N = 1000)
# build: multiboot
#
# They are TEST_PORT and the three ports behind it: there may be four processors. Status 0 when all have done so.
.include "multiboot.inc"
.include "arguments.inc"
.include "tables.inc"
.include "apic.inc"
.include "processors.inc"

.data
rounds: .long 1000
finished: .long 0

START
    call load_tables
    call start_apic
    mov eax, [rounds]
    call next_number
    mov [rounds], eax
    call fw_cfg_cpus
    push eax
    call start_aps
    xor eax, eax
    call work
    pop edi
1:  pause
    cmp [finished], edi
    jb 1b
    EXIT 0

ap_main:
    call work
1:  hlt
    jmp 1b

# work: processor EAX does its part.
work:
    lea edx, [eax + TEST_PORT]
    mov ecx, [rounds]
1:  out dx, al
    loop 1b
    lock inc dword ptr [finished]
    ret
